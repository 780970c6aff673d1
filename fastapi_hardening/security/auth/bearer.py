"""Finds out who calls by a bearer token (RFC 6750): takes it from the request, has it verified, and maps its claims.

It protects from what lies around the token itself: two ``Authorization`` fields of which each reader takes another one,
a signature verified again for every request, a verification that outlives the token, its key or its revocation, and an
issuer that vouches for another one's subjects. It is *not* authorisation: it says who calls and what the token says.

Example:
    >>> from fastapi_hardening.security.auth.jwk import VerificationKey
    >>> from fastapi_hardening.security.auth.jwt import JwtSettings, JwtVerifier
    >>> from fastapi_hardening.security.auth.keys import StaticKeys
    >>> settings = JwtSettings(issuer="https://id.example", audience="orders", algorithms=["HS256"])
    >>> keys = StaticKeys(VerificationKey.from_secret(b"0123456789abcdef0123456789abcdef"))
    >>> BearerAuthenticator(JwtVerifier(settings, keys)).challenge
    'Bearer'
"""

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from types import MappingProxyType
from typing import Any

from starlette.requests import HTTPConnection

from fastapi_hardening.core.clock import Clock, SystemClock
from fastapi_hardening.core.configuration import ConfigurationError
from fastapi_hardening.core.identity import CredentialsUnchecked, InvalidCredentials, Principal
from fastapi_hardening.core.store import StoreUnavailable
from fastapi_hardening.security.auth.jwt import (
    Claims,
    JwtSettings,
    JwtVerifier,
    claim_at,
    names_at,
    unverified_issuer,
)
from fastapi_hardening.security.auth.revocation import UNAVAILABLE, RevocationNotStored, Revocations

# RFC 6750, section 2.1; the token's own grammar is its verifier's business.
_BEARER = re.compile(rb"bearer +([A-Za-z0-9\-._~+/]+=*)", re.IGNORECASE)
_SCHEME = b"bearer"


def bearer_token(connection: HTTPConnection) -> str | None:
    """The token in ``Authorization: Bearer``; ``None`` where there is no such field or it has another scheme.

    Raises:
        InvalidCredentials: There are two fields, or the field is malformed.
    """
    fields = [value for name, value in connection.scope["headers"] if name == b"authorization"]
    if not fields:
        return None
    if len(fields) > 1:
        raise InvalidCredentials("several-authorization-fields")
    [field] = fields
    if field[:6].lower() != _SCHEME or field[6:7] not in (b" ", b""):
        return None
    match = _BEARER.fullmatch(field)
    if match is None:
        raise InvalidCredentials("malformed-authorization")
    return match[1].decode("ascii")


@dataclass(slots=True)
class _Verified:
    """What is remembered of a token."""

    principal: Principal
    issued_at: float | None
    verifier: JwtVerifier
    generation: int
    until: float
    verify_again_at: float


class BearerAuthenticator:
    """Identifies callers by signed tokens of one issuer, or of several.

    A verification is remembered under the digest of the token, which has only one spelling. It is forgotten when the
    token expires, when a key of its issuer is gone, and after ``cache_seconds``; whether the token was revoked is asked
    each time. Only good tokens are remembered, so nobody can fill the memory without having some.

    Args:
        verifiers: The verifier, or one for each issuer.
        revocations: What was revoked; nothing if left out.
        cache_size: How many verifications are remembered; 0 for none.
        cache_seconds: How long one is remembered at most.
        ignore_opaque: Whether a token that is no JWT (not three parts) is left to another authenticator.
        clock: Where the time comes from.

    Raises:
        ConfigurationError: There is no verifier, or two for one issuer.
    """

    scheme = "bearer"
    challenge = "Bearer"

    def __init__(
        self,
        verifiers: JwtVerifier | Sequence[JwtVerifier],
        *,
        revocations: Revocations | None = None,
        cache_size: int = 4096,
        cache_seconds: float = 300.0,
        ignore_opaque: bool = False,
        clock: Clock | None = None,
    ) -> None:
        several = [verifiers] if isinstance(verifiers, JwtVerifier) else list(verifiers)
        self._by_issuer = {verifier.settings.issuer: verifier for verifier in several}
        if not several or len(self._by_issuer) != len(several):
            raise ConfigurationError("bearer tokens need a verifier, and one only for each issuer")
        self._only = several[0] if len(several) == 1 else None
        self._longest = max(verifier.settings.max_token_bytes for verifier in several)
        self._thumbprints = any(verifier.settings.allow_thumbprints for verifier in several)
        self._revocations = revocations
        self._cache_size = cache_size
        self._cache_seconds = cache_seconds
        self._ignore_opaque = ignore_opaque
        clock = clock or SystemClock()
        self._now = clock.time
        self._monotonic = clock.monotonic
        self._cache: OrderedDict[bytes, _Verified] = OrderedDict()

    async def authenticate(self, connection: HTTPConnection) -> Principal | None:
        """Who calls; ``None`` where the request has no bearer token.

        Raises:
            InvalidCredentials: It has one that proves nothing, or a malformed field.
        """
        token = bearer_token(connection)
        if token is None or (self._ignore_opaque and token.count(".") != 2):  # noqa: PLR2004 - header, payload, signature
            return None
        return await self.authenticate_token(token)

    async def authenticate_token(self, token: str) -> Principal:
        """Whose token this is, wherever it came from, such as the subprotocol of a websocket.

        Raises:
            InvalidCredentials: It proves nothing; the reason says why.
        """
        if len(token) > self._longest:
            raise InvalidCredentials("too-large")
        digest = sha256(token.encode("utf-8", "surrogatepass")).digest()
        known = self._cache.get(digest)
        if known is not None and not self._still_holds(known):
            del self._cache[digest]
            known = None
        if known is None:
            known = await self._verify(token)
            self._remember(digest, known)
        else:
            self._cache.move_to_end(digest)
        if self._revocations is not None:
            principal = known.principal
            reason = await self._revocations.reason(
                principal.issuer or "", principal.id, principal.credential, issued_at=known.issued_at
            )
            if reason is not None:
                raise (CredentialsUnchecked if reason == UNAVAILABLE else InvalidCredentials)(reason)
        return known.principal

    async def revoke(self, token: str, client_id: str) -> None:
        """Takes a token back that a client was given: what ``token_router(revoke_access_token=...)`` needs.

        Nothing happens for a token that is not good any more, and for one of another client (RFC 7009, section 2.1).

        Args:
            token: The token.
            client_id: The client that asks, authenticated.

        Raises:
            ConfigurationError: There are no revocations.
            CredentialsUnchecked: It cannot be verified now, or there is no room: nothing was revoked.
        """
        if self._revocations is None:
            raise ConfigurationError("revoke() needs BearerAuthenticator(..., revocations=...)")
        try:
            principal = await self.authenticate_token(token)
        except CredentialsUnchecked:
            raise
        except InvalidCredentials:
            return
        if principal.claims.get("client_id") != client_id or principal.credential is None:
            return
        try:
            await self._revocations.revoke_token(
                principal.credential, issuer=principal.issuer or "", expires_at=principal.expires_at
            )
        except (RevocationNotStored, StoreUnavailable) as error:
            raise CredentialsUnchecked("the state store did not take the revocation") from error

    def forget(self) -> None:
        """Forgets all verifications; each token is verified again when it comes again."""
        self._cache.clear()

    def _still_holds(self, known: _Verified) -> bool:
        return (
            self._now() < known.until
            and self._monotonic() < known.verify_again_at
            and known.verifier.keys.generation == known.generation
        )

    async def _verify(self, token: str) -> _Verified:
        verifier = self._only
        if verifier is None:
            issuer = unverified_issuer(token, max_bytes=self._longest, allow_thumbprints=self._thumbprints)
            verifier = self._by_issuer.get(issuer)
            if verifier is None:
                raise InvalidCredentials("issuer")
        # Read first: should a key go while this token is verified, what it proves is not remembered.
        generation = verifier.keys.generation
        verified = await verifier.verify(token)
        issued_at = verified.claims.get("iat")
        return _Verified(
            principal_of(verified.claims, verifier.settings),
            issued_at,
            verifier,
            generation,
            verified.valid_until,
            self._monotonic() + self._cache_seconds,
        )

    def _remember(self, digest: bytes, known: _Verified) -> None:
        if self._cache_size < 1:
            return
        self._cache[digest] = known
        if len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)


def principal_of(claims: Claims, settings: JwtSettings) -> Principal:
    """The caller that verified claims speak of.

    Raises:
        InvalidCredentials: Scopes, roles, permissions or the tenant have a type that they cannot have.
    """
    tenant = None if settings.tenant_claim is None else claim_at(claims, settings.tenant_claim)
    if tenant is not None and not (isinstance(tenant, str) and tenant):
        raise InvalidCredentials(f"bad-{settings.tenant_claim}")
    return Principal(
        claims["sub"],
        scheme=BearerAuthenticator.scheme,
        scopes=names_at(claims, settings.scope_claims, split=True),
        roles=names_at(claims, settings.role_claims),
        permissions=names_at(claims, settings.permission_claims),
        tenant=tenant,
        issuer=claims["iss"],
        credential=claims.get("jti"),
        expires_at=claims["exp"],
        claims=_frozen(claims),
    )


def _frozen(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """What no request can change for the next one: objects that are read-only, and tuples."""
    return MappingProxyType({name: _frozen_member(member) for name, member in value.items()})


def _frozen_member(member: Any) -> Any:
    if isinstance(member, dict):
        return _frozen(member)
    return tuple(map(_frozen_member, member)) if isinstance(member, list) else member
