"""API keys: long random secrets for programs, of which only a hash is kept.

A key is ``prefix_id_secret``: the prefix tells a secret scanner whose it is, the id finds the record, and the end of
the secret is a checksum, so that a mistyped key is known as one without a look into the store. The secret has 238
random bits, so a plain SHA-256 of it cannot be searched for; a slow hash is for passwords, which people make up.

A hash is compared in constant time, for an id that nobody has as well. It is *not* read from the query, where every log
and every ``Referer`` would have it.

Example:
    >>> import asyncio
    >>> keys = ApiKeys(MemoryApiKeyStore(), prefix="shop")
    >>> issued = asyncio.run(keys.create("partner-7", scopes=["orders:read"]))
    >>> issued.key.startswith(f"shop_{issued.record.id}_"), issued.key in repr(issued)
    (True, False)
    >>> asyncio.run(keys.verify(issued.key)).scopes
    frozenset({'orders:read'})
"""

import hashlib
import logging
import re
import secrets
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Protocol

from starlette.requests import HTTPConnection

from fastapi_hardening.core import headers as header_fields
from fastapi_hardening.core.clock import Clock, SystemClock
from fastapi_hardening.core.identity import InvalidCredentials, Principal
from fastapi_hardening.core.store import StateStore

logger = logging.getLogger("fastapi_hardening.auth")

_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_ID_LENGTH = 12
_SECRET_LENGTH = 40
_CHECKSUM_LENGTH = 6
_LONGEST = 200
_PREFIX = re.compile(r"[a-z][a-z0-9]*(?:_[a-z0-9]+)*")
# Compared with where no record is found; nothing hashes to it that anybody could send.
_NOBODY = secrets.token_bytes(32)


@dataclass(frozen=True, slots=True)
class ApiKeyRecord:
    """What is kept of a key; nothing in it opens anything.

    Attributes:
        id: The part of the key that finds the record.
        digest: The SHA-256 of the secret.
        subject: Whose key it is; the id of the principal.
        name: What its owner calls it.
        scopes: What it may be used for.
        roles: The roles of its owner.
        tenant: The tenant that it is bound to.
        created_at: When it was made, in seconds since the epoch.
        expires_at: When it ends; ``None`` for never.
        last_used_at: When it was last used, as exact as ``used_resolution_seconds``.
        revoked: It was taken back.
    """

    id: str
    digest: bytes
    subject: str
    name: str | None = None
    scopes: frozenset[str] = frozenset()
    roles: frozenset[str] = frozenset()
    tenant: str | None = None
    created_at: float = 0.0
    expires_at: float | None = None
    last_used_at: float | None = None
    revoked: bool = False


class ApiKeyStore(Protocol):
    """Where records are kept: a table with the id as its key. Write one on your database."""

    async def get(self, key_id: str) -> ApiKeyRecord | None:
        """The record of an id."""
        ...

    async def put(self, record: ApiKeyRecord) -> None:
        """Keeps a record, in place of one with the same id."""
        ...

    async def used(self, key_id: str, at: float) -> None:
        """Notes when a key was last used, and changes nothing else of the record."""
        ...


class MemoryApiKeyStore:
    """Records in memory, for tests and examples: a restart forgets them."""

    def __init__(self, records: Iterable[ApiKeyRecord] = ()) -> None:
        self._records = {record.id: record for record in records}

    async def get(self, key_id: str) -> ApiKeyRecord | None:
        """The record of an id."""
        return self._records.get(key_id)

    async def put(self, record: ApiKeyRecord) -> None:
        """Keeps a record."""
        self._records[record.id] = record

    async def used(self, key_id: str, at: float) -> None:
        """Notes when a key was last used."""
        record = self._records.get(key_id)
        if record is not None:
            self._records[key_id] = replace(record, last_used_at=at)


@dataclass(frozen=True, slots=True)
class IssuedKey:
    """A new key. The key itself is shown to its owner once, and is kept nowhere.

    Attributes:
        key: The whole key.
        record: What was kept of it.
    """

    key: str = field(repr=False)
    record: ApiKeyRecord


# --- engine -----------------------------------------------------------------------------------------------------------


def checksum(text: str) -> str:
    """The CRC-32 of a text in six digits of base 62: tells a typing error, and proves nothing.

    Example:
        >>> checksum("shop_0_1")
        '0f4WPV'
    """
    number, digits = zlib.crc32(text.encode("ascii")), ""
    for _ in range(_CHECKSUM_LENGTH):
        number, digit = divmod(number, len(_ALPHABET))
        digits = _ALPHABET[digit] + digits
    return digits


class ApiKeys:
    """Makes keys, checks them, replaces them and takes them back.

    Args:
        store: Where the records are kept.
        prefix: What every key begins with: the name of the service, so that a leaked key is recognised as one.
        used_resolution_seconds: The last use of a key is written at most this often.
        clock: Where the time comes from.

    Raises:
        ValueError: The prefix is not made of small letters, digits and single underscores.
    """

    def __init__(
        self,
        store: ApiKeyStore,
        *,
        prefix: str = "key",
        used_resolution_seconds: float = 60.0,
        clock: Clock | None = None,
    ) -> None:
        if not _PREFIX.fullmatch(prefix):
            raise ValueError(f"{prefix!r} is no prefix; use small letters, digits and underscores, such as 'shop_live'")
        self.store = store
        self.clock: Clock = clock or SystemClock()
        self._prefix = prefix
        self._resolution = used_resolution_seconds
        self._form = re.compile(
            rf"{prefix}_([0-9A-Za-z]{{{_ID_LENGTH}}})_([0-9A-Za-z]{{{_SECRET_LENGTH}}})"
            rf"([0-9A-Za-z]{{{_CHECKSUM_LENGTH}}})"
        )

    async def create(
        self,
        subject: str,
        *,
        name: str | None = None,
        scopes: Iterable[str] = (),
        roles: Iterable[str] = (),
        tenant: str | None = None,
        ttl_seconds: float | None = None,
    ) -> IssuedKey:
        """Makes a key for somebody.

        Args:
            subject: Whose key it is.
            name: What its owner calls it.
            scopes: What it may be used for.
            roles: The roles that it has.
            tenant: The tenant that it is bound to.
            ttl_seconds: It ends after so long; without it, only when it is taken back.
        """
        now = self.clock.time()
        record = ApiKeyRecord(
            id=_random(_ID_LENGTH),
            digest=b"",
            subject=subject,
            name=name,
            scopes=frozenset(scopes),
            roles=frozenset(roles),
            tenant=tenant,
            created_at=now,
            expires_at=None if ttl_seconds is None else now + ttl_seconds,
        )
        return await self._issue(record)

    async def rotate(
        self, key_id: str, *, overlap_seconds: float = 86_400.0, ttl_seconds: float | None = None
    ) -> IssuedKey:
        """Makes another key like this one; the old one goes on to work for a while, so that nothing stands still.

        Args:
            key_id: The id of the old key.
            overlap_seconds: The old key ends after so long, or at its own end if that comes first.
            ttl_seconds: The new one ends after so long; without it, only when it is taken back.

        Raises:
            KeyError: There is no such key.
        """
        old = await self._record(key_id)
        now = self.clock.time()
        ends = now + overlap_seconds
        await self.store.put(replace(old, expires_at=ends if old.expires_at is None else min(ends, old.expires_at)))
        expires_at = None if ttl_seconds is None else now + ttl_seconds
        new = replace(old, id=_random(_ID_LENGTH), created_at=now, expires_at=expires_at, last_used_at=None)
        return await self._issue(new)

    async def revoke(self, key_id: str) -> None:
        """Takes a key back, at once.

        Raises:
            KeyError: There is no such key.
        """
        await self.store.put(replace(await self._record(key_id), revoked=True))

    async def verify(self, key: str) -> Principal:
        """Whose key it is.

        Raises:
            InvalidCredentials: It is not one of ours, has ended, or was taken back.
        """
        form = self._form.fullmatch(key) if len(key) <= _LONGEST else None
        if form is None or checksum(key[:-_CHECKSUM_LENGTH]) != form[3]:
            raise InvalidCredentials("not a key of this service")
        record = await self.store.get(form[1])
        expected = _NOBODY if record is None else record.digest
        fits = secrets.compare_digest(_digest(form[2]), expected)
        if record is None or not fits:
            raise InvalidCredentials("unknown key")
        now = self.clock.time()
        if record.revoked:
            raise InvalidCredentials("revoked")
        if record.expires_at is not None and record.expires_at <= now:
            raise InvalidCredentials("expired")
        if record.last_used_at is None or now - record.last_used_at >= self._resolution:
            await self._note_use(record.id, now)
        return Principal(
            record.subject,
            scheme=ApiKeyAuthenticator.scheme,
            scopes=record.scopes,
            roles=record.roles,
            tenant=record.tenant,
            credential=record.id,
            expires_at=record.expires_at,
        )

    async def _issue(self, record: ApiKeyRecord) -> IssuedKey:
        secret = _random(_SECRET_LENGTH)
        begin = f"{self._prefix}_{record.id}_{secret}"
        record = replace(record, digest=_digest(secret))
        await self.store.put(record)
        return IssuedKey(begin + checksum(begin), record)

    async def _record(self, key_id: str) -> ApiKeyRecord:
        record = await self.store.get(key_id)
        if record is None:
            raise KeyError(key_id)
        return record

    async def _note_use(self, key_id: str, now: float) -> None:
        try:
            await self.store.used(key_id, now)
        except Exception:
            # It is for people to look at; nobody is refused because of it.
            logger.exception("the last use of API key %s could not be noted", key_id)


def _random(length: int) -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(length))


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("ascii")).digest()


# --- authenticator ----------------------------------------------------------------------------------------------------


class ApiKeyAuthenticator:
    """Finds out who calls by a key in a header field.

    Args:
        keys: The keys.
        header: The field.

    Raises:
        ValueError: The field's name cannot be.
    """

    scheme = "api-key"

    def __init__(self, keys: ApiKeys, *, header: str = "X-API-Key") -> None:
        self.keys = keys
        self._header, _ = header_fields.field(header, "x")
        self.challenge = f'ApiKey header="{header}"'
        self.openapi = {"type": "apiKey", "in": "header", "name": header}

    def attach(self, *, store: StateStore, clock: Clock) -> None:  # noqa: ARG002 - the records have a store of their own
        """Takes the clock of the application, unless the keys were given another one."""
        if type(self.keys.clock) is SystemClock:
            self.keys.clock = clock

    async def authenticate(self, connection: HTTPConnection) -> Principal | None:
        """Whose key it is; ``None`` where the field is not there.

        Raises:
            InvalidCredentials: It is there, and opens nothing.
        """
        sent = header_fields.get_all(connection.scope["headers"], self._header)
        if not sent:
            return None
        if len(sent) > 1:
            raise InvalidCredentials("more than one key")
        return await self.keys.verify(sent[0].decode("latin-1"))
