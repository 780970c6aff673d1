"""Takes back what a token has proven: one token, everything of a subject, or everything that is older than a moment.

A signed token is believed until it expires, whatever happened to its owner meanwhile. Revocations are what ends it
earlier: after a logout, a lost device, a changed password, a dismissal. They are asked for every request, also for
tokens whose verification is remembered, so that a revocation holds at once in this process, and in all processes that
share the store. They are *not* a list of tokens: the store never holds one, and a key of it tells nothing.

Example:
    >>> import asyncio
    >>> from fastapi_hardening.core.store import MemoryStore
    >>> async def lost_phone() -> str | None:
    ...     revocations = Revocations(MemoryStore())
    ...     await revocations.revoke_token("the jti", issuer="https://id.example")
    ...     return await revocations.reason("https://id.example", "anna", "the jti", issued_at=None)
    >>> asyncio.run(lost_phone())
    'revoked-token'
"""

import hashlib
import logging
import struct
from dataclasses import dataclass

from fastapi_hardening.core.clock import Clock, SystemClock
from fastapi_hardening.core.events import Events
from fastapi_hardening.core.store import StateStore

logger = logging.getLogger("fastapi_hardening.auth.revocation")

UNAVAILABLE = "revocations-unavailable"
"""Why a token is refused while nobody can say whether it was revoked."""

_WEEK = 604_800.0
_BLOCKED = b"1"


class RevocationNotStored(RuntimeError):  # noqa: N818 - named by what happened
    """The store has no room: the token is still accepted, and somebody must act."""


@dataclass(frozen=True, slots=True)
class TokenRevoked:
    """One token was revoked.

    Attributes:
        issuer: Who issued it.
        token_id: Its ``jti``.
    """

    issuer: str
    token_id: str


@dataclass(frozen=True, slots=True)
class SubjectRevoked:
    """The tokens of a subject were revoked.

    Attributes:
        issuer: Who issues them.
        subject: Whose they are.
        issued_before: Those issued before this moment, in seconds since the epoch; ``None`` for all, later ones too.
    """

    issuer: str
    subject: str
    issued_before: float | None


@dataclass(frozen=True, slots=True)
class RevocationsUnavailable:
    """The store did not say what is revoked.

    Attributes:
        error: Why.
        accepted: Whether tokens are accepted all the same.
    """

    error: str
    accepted: bool


class Revocations:
    """What is revoked, in a state store.

    Args:
        store: Where it is kept. In memory it holds for one process, and ends with it.
        max_token_seconds: The longest life of a token: so long a revocation is kept that says no end itself.
        accept_when_unavailable: Whether tokens are accepted while the store does not answer. By default they are not,
            because whoever can stop the store could use a stolen token otherwise.
        clock: Where the time comes from.
        events: Where the events go.
    """

    def __init__(
        self,
        store: StateStore,
        *,
        max_token_seconds: float = _WEEK,
        accept_when_unavailable: bool = False,
        clock: Clock | None = None,
        events: Events | None = None,
    ) -> None:
        if max_token_seconds <= 0:
            raise ValueError("max_token_seconds is the longest life of a token, more than 0")
        self._store = store
        self._longest = max_token_seconds
        self._accept = accept_when_unavailable
        self._now = (clock or SystemClock()).time
        self._events = events

    async def revoke_token(self, token_id: str, *, issuer: str, expires_at: float | None = None) -> None:
        """Revokes one token by its ``jti``.

        Args:
            token_id: The ``jti``; ``Principal.credential`` has it.
            issuer: Who issued it; ``Principal.issuer`` has it.
            expires_at: When it expires, in seconds since the epoch; the revocation is kept so long, and five minutes
                more for clocks that differ.

        Raises:
            RevocationNotStored: There is no room.
        """
        left = self._longest if expires_at is None else max(0.0, expires_at - self._now()) + 300
        await self._put(_key("token", issuer, token_id), _BLOCKED, left)
        self._emit(TokenRevoked(issuer, token_id))

    async def revoke_subject(self, subject: str, *, issuer: str, seconds: float | None = None) -> None:
        """Refuses every token of a subject, also one issued later, until :meth:`restore_subject` or the time is over.

        Args:
            subject: The ``sub``; ``Principal.id`` has it.
            issuer: Who issues its tokens.
            seconds: For how long; by default as long as a token may live.

        Raises:
            RevocationNotStored: There is no room.
        """
        await self._put(_key("subject", issuer, subject), _BLOCKED, self._longest if seconds is None else seconds)
        self._emit(SubjectRevoked(issuer, subject, None))

    async def restore_subject(self, subject: str, *, issuer: str) -> None:
        """Takes back :meth:`revoke_subject`; single tokens that were revoked stay so."""
        await self._store.delete(_key("subject", issuer, subject))

    async def revoke_issued_before(self, subject: str, *, issuer: str, moment: float | None = None) -> None:
        """Refuses what was issued to a subject before a moment: a logout everywhere, after which it may log in again.

        ``iat`` often has whole seconds: a token of the very second of the moment is refused, too.

        Args:
            subject: The ``sub``.
            issuer: Who issues its tokens.
            moment: In seconds since the epoch; by default now. An earlier one than before changes nothing.

        Raises:
            RevocationNotStored: There is no room.
        """
        moment = self._now() if moment is None else moment
        key = _key("before", issuer, subject)
        known = await self._store.get(key)
        if known is None or _moment(known) < moment:
            await self._put(key, struct.pack(">d", moment), self._longest + max(0.0, moment - self._now()))
        self._emit(SubjectRevoked(issuer, subject, moment))

    async def reason(self, issuer: str, subject: str, token_id: str | None, *, issued_at: float | None) -> str | None:
        """Why a token is refused; ``None`` if it is not. One trip to the store.

        Args:
            issuer: The ``iss``.
            subject: The ``sub``.
            token_id: The ``jti``, if there is one.
            issued_at: The ``iat``; a token without one counts as older than every moment.
        """
        keys = [_key("subject", issuer, subject), _key("before", issuer, subject)]
        if token_id is not None:
            keys.append(_key("token", issuer, token_id))
        try:
            blocked, before, *token = await self._store.get_many(keys)
        except Exception as error:  # noqa: BLE001 - any store may stand behind the protocol
            logger.warning("the store does not say what is revoked: %s", error)
            self._emit(RevocationsUnavailable(str(error) or type(error).__name__, self._accept))
            return None if self._accept else UNAVAILABLE
        if any(token):
            return "revoked-token"
        if blocked:
            return "revoked-subject"
        if before is not None and (issued_at is None or issued_at < _moment(before)):
            return "revoked-before"
        return None

    async def _put(self, key: str, value: bytes, seconds: float) -> None:
        if not await self._store.put(key, value, seconds):
            raise RevocationNotStored("the state store is full: nothing was revoked")

    def _emit(self, event: object) -> None:
        if self._events is not None:
            self._events.emit(event)


def _key(kind: str, issuer: str, name: str) -> str:
    """A key of fixed length; one issuer's names never meet another's."""
    digest = hashlib.sha256(f"{len(issuer)}:{issuer}{name}".encode("utf-8", "surrogatepass")).hexdigest()
    return f"revoked:{kind}:{digest[:40]}"


def _moment(value: bytes) -> float:
    """When everything before is revoked; a value that cannot be read revokes everything."""
    try:
        moment: float = struct.unpack(">d", value)[0]
    except struct.error:
        return float("inf")
    return moment
