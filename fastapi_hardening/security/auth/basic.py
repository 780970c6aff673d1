"""HTTP Basic (RFC 7617) for operations: a scraper, a dashboard, a person with ``curl``.

It suits few users with long passwords over TLS. It is *not* a login for customers: the password travels with each
request, and a browser keeps it until it is closed. A browser also sends it along for other sites, so unsafe requests
are checked for where they come from, as with cookies.

A password is compared in constant time, and an unknown user costs what a known one costs.

Example:
    >>> from pydantic import SecretStr
    >>> basic = BasicAuthenticator({"prometheus": SecretStr("correct horse battery")}, permissions=["ops:read"])
    >>> basic.challenge
    'Basic realm="operations", charset="UTF-8"'
"""

import base64
import binascii
import hashlib
import inspect
import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping

from pydantic import SecretStr
from starlette.concurrency import run_in_threadpool
from starlette.requests import HTTPConnection

from fastapi_hardening.core.headers import get_all
from fastapi_hardening.core.identity import InvalidCredentials, Principal

Answer = Principal | bool | None
Verifier = Callable[[str, str], Answer] | Callable[[str, str], Awaitable[Answer]]
"""Says whether a user name and a password fit, or who it is. One that is not async runs in a thread."""

_LONGEST = 4096
_NOBODY = secrets.token_bytes(32)


class BasicAuthenticator:
    """Finds out who calls by a user name and a password.

    Args:
        users: Passwords by user name, or a function that checks the two.
        realm: What a browser shows where it asks.
        roles: The roles of everybody whom the mapping names.
        permissions: Their permissions.
    """

    scheme = "basic"
    ambient = True

    def __init__(
        self,
        users: Mapping[str, SecretStr] | Verifier,
        *,
        realm: str = "operations",
        roles: Iterable[str] = (),
        permissions: Iterable[str] = (),
    ) -> None:
        self.challenge = f'Basic realm="{realm}", charset="UTF-8"'
        self._roles = frozenset(roles)
        self._permissions = frozenset(permissions)
        self._verify: Verifier | None = None if isinstance(users, Mapping) else users
        self._digests = (
            {name: _digest(password.get_secret_value()) for name, password in users.items()}
            if isinstance(users, Mapping)
            else {}
        )

    async def authenticate(self, connection: HTTPConnection) -> Principal | None:
        """Who calls; ``None`` without Basic credentials.

        Raises:
            InvalidCredentials: They cannot be read, or do not fit.
        """
        sent = get_all(connection.scope["headers"], b"authorization")
        basic = [value[6:] for value in sent if value[:6].lower() == b"basic "]
        if not basic:
            return None
        if len(sent) > 1:
            raise InvalidCredentials("more than one Authorization field")
        name, password = decoded(basic[0])
        answer = self._fits(name, password) if self._verify is None else await _ask(self._verify, name, password)
        if isinstance(answer, Principal):
            return answer
        if answer is not True:
            raise InvalidCredentials("unknown user or wrong password")
        return Principal(name, scheme=self.scheme, roles=self._roles, permissions=self._permissions)

    def _fits(self, name: str, password: str) -> bool:
        # The same work for a user who is not there: the digest of nobody's password never fits.
        expected = self._digests.get(name, _NOBODY)
        return secrets.compare_digest(_digest(password), expected)


def decoded(sent: bytes) -> tuple[str, str]:
    """The user name and the password in Basic credentials.

    Raises:
        InvalidCredentials: They are not in the form of RFC 7617.

    Example:
        >>> decoded(b"QWxhZGRpbjpvcGVuIHNlc2FtZQ==")
        ('Aladdin', 'open sesame')
    """
    if len(sent) > _LONGEST:
        raise InvalidCredentials("too long")
    try:
        text = base64.b64decode(sent.strip(), validate=True).decode("utf-8")
    except (binascii.Error, UnicodeDecodeError):
        raise InvalidCredentials("not base64 of UTF-8") from None
    name, colon, password = text.partition(":")
    if not colon or any(character < " " or character == "\x7f" for character in text):
        raise InvalidCredentials("not a user name, a colon and a password")
    return name, password


async def _ask(verify: Verifier, name: str, password: str) -> Answer:
    if inspect.iscoroutinefunction(verify) or inspect.iscoroutinefunction(getattr(verify, "__call__", None)):  # noqa: B004
        answer = verify(name, password)
    else:
        answer = await run_in_threadpool(verify, name, password)
    return await answer if inspect.isawaitable(answer) else answer


def _digest(password: str) -> bytes:
    # Only so that what is compared has one length; passwords of a deployment are long, and are not kept like this.
    return hashlib.sha256(password.encode()).digest()
