"""Sessions: a person logs in once, and a cookie says so from then on.

The cookie is signed and holds who it is, or holds a random id of what the state store keeps. It is ``HttpOnly``,
``SameSite=Lax``, and on https ``Secure`` with the prefix ``__Host-``, so that no subdomain can plant one. A session has
a new id at each login (against fixation), ends when it is idle or old, and can be ended from the server. It is *not*
encrypted: the person can read what a signed cookie says.

A cookie that proves nothing any more is no credential, because a browser sends it whatever the person wants: the caller
is then anonymous, and a route that demands somebody answers as if nothing had been sent. What a browser sends along by
itself other sites can make use of, so unsafe requests are checked for where they come from.

Example:
    >>> from pydantic import SecretStr
    >>> from fastapi_hardening.security.auth.settings import SessionSettings
    >>> sessions = Sessions(SessionSettings(secrets=[SecretStr("0123456789abcdef0123456789abcdef")]))
    >>> sessions.cookie_name(secure=True)
    '__Host-session'
"""

import hashlib
import json
import logging
import secrets
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import HTTPConnection
from starlette.responses import Response

from fastapi_hardening.core import context as request_context
from fastapi_hardening.core.clock import Clock, SystemClock
from fastapi_hardening.core.configuration import ConfigurationError
from fastapi_hardening.core.identity import Principal
from fastapi_hardening.core.store import MemoryStore, StateStore
from fastapi_hardening.security.auth.principals import from_members, to_members
from fastapi_hardening.security.auth.settings import SessionSettings

logger = logging.getLogger("fastapi_hardening.auth")

_ID_BYTES = 32
# Browsers keep 4096 bytes of a cookie, its name and its attributes among them.
_LARGEST_COOKIE = 3800
# A session is written again when so much of its idle time has passed, not at each request.
_RENEWED_AFTER = 0.1
_CLEARED = '"cache", "cookies", "storage"'


class AnswerFields:
    """Header fields that an authenticator adds to the answer; kept under this class in the state of the context."""

    __slots__ = ("fields",)

    def __init__(self) -> None:
        self.fields: list[tuple[bytes, bytes]] = []


@dataclass(frozen=True, slots=True)
class _Session:
    """One session: its id, who it is, when it began and when it was last written, in seconds since the epoch."""

    id: str
    principal: Principal
    began: float
    seen: float

    def members(self) -> dict[str, Any]:
        return {"i": self.id, "b": self.began, "s": self.seen, "p": to_members(self.principal)}

    @classmethod
    def of(cls, members: dict[str, Any]) -> "_Session":
        return cls(members["i"], from_members(members["p"]), float(members["b"]), float(members["s"]))


class Sessions:
    """Begins, finds and ends sessions; one of the authenticators of :func:`~fastapi_hardening.harden`.

    Args:
        settings: Secrets, cookie and times.
        store: Where sessions, and those that were ended, are kept; by default that of the application.
        clock: Where the time comes from; by default that of the application.

    Raises:
        ConfigurationError: There is no secret for a signed cookie, or the extra ``auth`` is not installed.
    """

    scheme = "session"
    ambient = True

    def __init__(
        self, settings: SessionSettings, *, store: StateStore | None = None, clock: Clock | None = None
    ) -> None:
        self._settings = settings
        self._given = store, clock
        self._clock: Clock = clock or SystemClock()
        self._store: StateStore = store or MemoryStore(clock=self._clock)
        self._serializer = _serializer(settings) if settings.storage == "cookie" else None
        # A name for a scheme that has none; no browser reacts to it, and a 401 has to name one (RFC 9110).
        self.challenge = f'Cookie cookie-name="{settings.cookie}"'
        name = self.cookie_name(secure=settings.secure is not False)
        self.openapi = {"type": "apiKey", "in": "cookie", "name": name}

    def attach(self, *, store: StateStore, clock: Clock) -> None:
        """Takes the store and the clock of the application where none was given."""
        own_store, own_clock = self._given
        self._store = own_store or store
        self._clock = own_clock or clock

    def cookie_name(self, *, secure: bool) -> str:
        """What the cookie is called."""
        return f"__Host-{self._settings.cookie}" if secure else self._settings.cookie

    async def authenticate(self, connection: HTTPConnection) -> Principal | None:
        """Whose session it is; ``None`` without a cookie, and with one that proves nothing any more."""
        session = await self._session(connection)
        if session is None:
            return None
        now = self._clock.time()
        if now - session.seen >= self._settings.idle_seconds * _RENEWED_AFTER:
            await self._renew(connection, replace(session, seen=now))
        return session.principal

    async def login(self, connection: HTTPConnection, response: Response, principal: Principal) -> None:
        """Begins a session for somebody who has just proven who they are; one that was there before ends.

        Args:
            connection: The request of the login.
            response: Its answer, which gets the cookie.
            principal: Who it is.

        Raises:
            ValueError: The cookie would be larger than browsers keep.
        """
        before = await self._session(connection)
        if before is not None:
            await self._end(before)
        now = self._clock.time()
        identity = secrets.token_urlsafe(_ID_BYTES)
        ends = now + self._settings.absolute_seconds
        session = _Session(
            identity,
            replace(
                principal,
                scheme=self.scheme,
                credential=_hash(identity)[:16],
                expires_at=ends if principal.expires_at is None else min(ends, principal.expires_at),
            ),
            began=now,
            seen=now,
        )
        self._set(connection, response, await self._kept(session))

    async def logout(self, connection: HTTPConnection, response: Response, *, everywhere: bool = False) -> None:
        """Ends the session of a request, takes its cookie away and has the browser forget what it kept of the site.

        Args:
            connection: The request.
            response: Its answer.
            everywhere: Ends all sessions of this person.
        """
        session = await self._session(connection)
        if session is not None:
            await self._end(session)
            if everywhere:
                await self.revoke_all(session.principal.id)
        self._set(connection, response, "")
        response.headers["clear-site-data"] = _CLEARED

    async def revoke_all(self, subject: str) -> None:
        """Ends every session of a person that has begun until now."""
        moment = json.dumps(self._clock.time()).encode()
        if not await self._store.put(self._revoked(subject), moment, self._settings.absolute_seconds):
            raise ConnectionError("the store has no room for the revocation")

    # --- what a cookie comes to

    async def _session(self, connection: HTTPConnection) -> _Session | None:
        value = connection.cookies.get(self.cookie_name(secure=self._is_secure(connection)))
        if not value or len(value) > _LARGEST_COOKIE:
            return None
        members = await self._members(value)
        if members is None:
            return None
        try:
            session = _Session.of(members)
        except (KeyError, TypeError, ValueError):
            logger.warning("a session was written by another version of the application, and is ended")
            return None
        return session if await self._lives(session) else None

    async def _members(self, value: str) -> dict[str, Any] | None:
        if self._serializer is not None:
            members = self._serializer(value)
        else:
            kept = await self._store.get(_place(value))
            members = None if kept is None else json.loads(kept)
        return members if isinstance(members, dict) else None

    async def _lives(self, session: _Session) -> bool:
        now = self._clock.time()
        if now - session.seen >= self._settings.idle_seconds or now - session.began >= self._settings.absolute_seconds:
            return False
        expires_at = session.principal.expires_at
        if expires_at is not None and now >= expires_at:
            return False
        if await self._store.get(_ended(session.id)) is not None:
            return False
        moment = await self._store.get(self._revoked(session.principal.id))
        return moment is None or session.began > float(moment)

    # --- what is written

    async def _kept(self, session: _Session) -> str:
        """The value of the cookie, with the session kept where it is kept."""
        if self._serializer is not None:
            value = self._serializer.written(session.members())
            if len(value) > _LARGEST_COOKIE:
                raise ValueError(
                    f"the session takes {len(value)} bytes, more than a cookie holds; keep fewer claims in the "
                    "principal, or set auth.session.storage to 'store'"
                )
            return value
        ends = session.began + self._settings.absolute_seconds
        ttl = min(self._settings.idle_seconds, ends - session.seen)
        if not await self._store.put(_place(session.id), json.dumps(session.members()).encode(), ttl):
            raise ConnectionError("the store has no room for the session")
        return session.id

    async def _renew(self, connection: HTTPConnection, session: _Session) -> None:
        value = await self._kept(session)
        if self._serializer is not None:
            state = request_context.ensure(connection.scope).state
            fields: AnswerFields = state.setdefault(AnswerFields, AnswerFields())
            cookie = self._cookie(value, secure=self._is_secure(connection))
            fields.fields.append((b"set-cookie", cookie.encode("ascii")))

    async def _end(self, session: _Session) -> None:
        # A mark, and not only the session taken away: a request under way could write it again.
        if not await self._store.put(_ended(session.id), b"1", self._settings.absolute_seconds):
            raise ConnectionError("the store has no room for the end of a session")
        await self._store.delete(_place(session.id))

    def _set(self, connection: HTTPConnection, response: Response, value: str) -> None:
        """Puts the cookie on an answer, in place of a renewal that this request has brought about."""
        renewals = request_context.ensure(connection.scope).state.get(AnswerFields)
        if renewals is not None:
            renewals.fields.clear()
        response.headers.append("set-cookie", self._cookie(value, secure=self._is_secure(connection)))

    def _cookie(self, value: str, *, secure: bool) -> str:
        parts = [f"{self.cookie_name(secure=secure)}={value}", "Path=/", "HttpOnly"]
        parts.append(f"SameSite={self._settings.same_site.capitalize()}")
        if secure:
            parts.append("Secure")
        if not value:
            parts.append("Max-Age=0")
        return "; ".join(parts)

    def _is_secure(self, connection: HTTPConnection) -> bool:
        if self._settings.secure is not None:
            return self._settings.secure
        return request_context.ensure(connection.scope).secure

    def _revoked(self, subject: str) -> str:
        return f"session:revoked:{_hash(subject)}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _place(identity: str) -> str:
    """Where a session is kept: by the hash of its id, so that nobody who reads the store has a cookie."""
    return f"session:kept:{_hash(identity)}"


def _ended(identity: str) -> str:
    return f"session:ended:{_hash(identity)}"


class _Signed:
    """Reads and writes signed values, by the newest key, and by older ones as long as they are listed."""

    def __init__(self, settings: SessionSettings) -> None:
        try:
            from itsdangerous import BadData, URLSafeSerializer  # noqa: PLC0415 - an extra
        except ImportError:
            raise ConfigurationError(
                "signed sessions need itsdangerous: pip install 'fastapi-hardening[auth]'"
            ) from None
        self._bad = BadData
        self._serializer = URLSafeSerializer(
            [secret.get_secret_value() for secret in reversed(settings.secrets)],
            salt="fastapi_hardening.session",
            signer_kwargs={"key_derivation": "hmac", "digest_method": hashlib.sha256},
        )

    def __call__(self, value: str) -> Any:
        try:
            return self._serializer.loads(value)
        except self._bad:
            return None

    def written(self, members: dict[str, Any]) -> str:
        return self._serializer.dumps(members)


def _serializer(settings: SessionSettings) -> _Signed:
    if not settings.secrets:
        raise ConfigurationError(
            "auth.session.secrets is empty; set it to the output of `openssl rand -hex 32`, the same for all workers"
        )
    return _Signed(settings)
