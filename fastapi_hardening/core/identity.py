"""Who calls: what authentication found out, and what every other concern may ask about it.

Authentication makes a :class:`Principal` and leaves it on the context of the request (``context.principal``). Limits
count by its ``id``, logs name it, caches keep one caller's answer from another. None of them knows how it was proven.

Example:
    >>> anna = Principal("anna", scheme="bearer", scopes=frozenset({"orders:read"}))
    >>> anna.has_scopes("orders:read"), anna.has_scopes("orders:read", "orders:write")
    (True, False)
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

from starlette.requests import HTTPConnection

_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Principal:
    """A caller who is known: a person, or a program.

    Attributes:
        id: The subject. Unique for its issuer; what limits count by and logs name.
        scheme: How it was proven: ``bearer``, ``api-key``, ``basic``, ``session``, or a scheme of the application.
        scopes: What the credential may be used for (OAuth 2 scopes), whatever its owner may do.
        roles: What the caller is, in every tenant.
        permissions: What the caller may do: given with the credential, or worked out from the roles.
        tenant: The tenant that the credential is bound to.
        tenant_roles: Roles that hold in one tenant only, by tenant.
        issuer: Who vouches for the subject; ``None`` for the application itself.
        credential: The id of the token, key or session, for logs and revocation; never a secret.
        expires_at: When the proof ends, in seconds since the epoch; ``None`` for never.
        claims: Whatever else the credential says.
    """

    id: str
    scheme: str = "bearer"
    scopes: frozenset[str] = frozenset()
    roles: frozenset[str] = frozenset()
    permissions: frozenset[str] = frozenset()
    tenant: str | None = None
    tenant_roles: Mapping[str, frozenset[str]] = field(default_factory=lambda: _NOTHING)
    issuer: str | None = None
    credential: str | None = None
    expires_at: float | None = None
    claims: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)

    def __str__(self) -> str:
        """The subject, which is all that a log line may say."""
        return self.id

    def has_scopes(self, *scopes: str) -> bool:
        """Whether the credential may be used for all of these."""
        return self.scopes.issuperset(scopes)


class InvalidCredentials(Exception):  # noqa: N818 - named as problems are, by what happened
    """Credentials were sent, and they prove nothing. The one exception that an authenticator lets out.

    Args:
        reason: Why, for the log, such as ``expired``; the client is not told.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class CredentialsUnchecked(InvalidCredentials):
    """The credentials could not be checked, so nobody may be let in; the caller may come back (503).

    Args:
        reason: Why, for the log, such as ``the provider does not answer``; the client is not told.
        retry_after_seconds: When it is worth another attempt.
    """

    def __init__(self, reason: str, *, retry_after_seconds: float = 5.0) -> None:
        super().__init__(reason)
        self.retry_after_seconds = retry_after_seconds


class Authenticator(Protocol):
    """Finds out who calls, by one kind of credentials.

    Attributes:
        scheme: The name of the kind, as principals carry it.
        challenge: What ``WWW-Authenticate`` says of it (RFC 9110, section 11.6.1), such as ``Bearer``; empty for none.
    """

    scheme: str
    challenge: str

    async def authenticate(self, connection: HTTPConnection) -> Principal | None:
        """Who calls; ``None`` where the request has no credentials of this kind.

        Raises:
            InvalidCredentials: There are some, and they are wrong, expired or revoked.
            CredentialsUnchecked: There are some, and what could tell does not answer.
        """
        ...
