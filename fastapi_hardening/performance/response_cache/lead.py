"""A request that reaches the endpoint, and what is kept of its answer."""

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Literal, Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_hardening.core import context as request_context
from fastapi_hardening.core.cache_levels import CacheEntry, CacheLevels, Tags
from fastapi_hardening.core.headers import RawHeaders, get
from fastapi_hardening.core.http_caching import (
    Lifetime,
    lifetime_of,
    on_not_modified,
    strong_etag,
    variant,
    varies_by,
)
from fastapi_hardening.performance.response_cache.asked import CONDITIONS, Asked, CacheResponse
from fastapi_hardening.performance.response_cache.settings import ResponseCacheSettings

logger = logging.getLogger("fastapi_hardening.response_cache")

Outcome = Literal["kept", "not kept", "ended"]

RETRY_SECONDS = 1.0
"""After a failure a stale answer is used for so long before the next attempt."""


class Kept:
    """An answer as it is used: its fields and its body."""

    __slots__ = ("body", "headers", "status")

    def __init__(self, status: int, headers: RawHeaders, body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    def pack(self) -> bytes:
        """As bytes."""
        fields = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in self.headers]
        return json.dumps([self.status, fields]).encode() + b"\n" + self.body

    @classmethod
    def unpack(cls, data: bytes) -> "Kept | tuple[bytes, ...] | None":
        """An answer; or the names of the fields under whose values the answers lie; ``None`` for neither."""
        head, _, body = data.partition(b"\n")
        try:
            said = json.loads(head)
            if isinstance(said, dict):
                return tuple(name.encode("latin-1") for name in said["vary"])
            status, fields = said
            headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in fields]
            return cls(int(status), headers, body)
        except (ValueError, TypeError, KeyError, AttributeError):
            return None


Found = tuple[CacheEntry, Kept]


class Keeper(Protocol):
    """The cache, as a lead needs it."""

    app: ASGIApp
    settings: ResponseCacheSettings
    levels: CacheLevels
    now: Callable[[], float]

    def entry_of(
        self, override: CacheResponse, said: Lifetime, kept: Kept, tags: Tags, made_at: float
    ) -> CacheEntry | None:
        """The entry of an answer; ``None`` where it would be stale at once."""
        ...

    def has(self, asked: Asked, kept: Kept) -> bool:
        """Whether the client has this answer already."""
        ...

    def landed(self, key: str, flight: asyncio.Future[Outcome], outcome: Outcome) -> None:
        """Tells those who wait what became of the answer."""
        ...

    def counted(self, outcome: str) -> None:
        """Counts what became of a request."""
        ...

    async def forgive(self, found: Found, asked: Asked, scope: Scope, send: Send) -> None:
        """Answers with what is stale, for the endpoint has failed."""
        ...


class Lead:
    """A request that reaches the endpoint, and whose answer may be kept for others."""

    def __init__(
        self,
        cache: Keeper,
        override: CacheResponse,
        asked: Asked,
        scope: Scope,
        client: Send,
        *,
        flight: asyncio.Future[Outcome] | None,
    ) -> None:
        self.cache = cache
        self.override = override
        self.asked = asked
        self.scope = scope
        self.client = client
        self.stale: tuple[CacheEntry, Kept] | None = None
        self._flight = flight
        self._flight_key = asked.key
        self._context = request_context.ensure(scope)
        self._route, self._principal = self._context.route, self._context.principal
        self._start: Message | None = None  # as long as it is not sent
        self._started = self._failed = False
        self._status = 0
        self._headers: RawHeaders = []
        self._lifetime: Lifetime | None = None  # as long as the answer may be kept
        self._body: list[bytes] = []
        self._size = 0
        self._tags: Tags = ()
        self._made_at = 0.0
        self._kept: list[tuple[str, CacheEntry]] = []

    def land(self, outcome: Outcome) -> None:
        """Ends the waiting of others; only the first call counts."""
        flight, self._flight = self._flight, None
        if flight is not None:
            self.cache.landed(self._flight_key, flight, outcome)

    async def run(self, receive: Receive) -> None:
        """Has the endpoint answer, and keeps the answer if it may be."""
        cache, scope = self.cache, self.scope
        self._tags = await cache.levels.tagged([f"value:{tag}" for tag in self.asked.tags])
        self._made_at = cache.now()
        if self.asked.conditions:
            # The whole answer is wanted; whether the client has it is found out here.
            scope["headers"] = [pair for pair in scope["headers"] if pair[0] not in CONDITIONS]
        try:
            await cache.app(scope, receive, self.send)
        except Exception:
            self.land("not kept" if self.stale is None else "kept")
            if self.stale is None or self._started:
                raise
            logger.exception("the endpoint failed; what was kept is used")
            self._failed = True
        if self._failed and self.stale is not None:
            await cache.forgive(self.stale, self.asked, scope, self.client)
        for key, entry in self._kept:
            await cache.levels.put(key, entry)

    async def send(self, message: Message) -> None:
        """Takes a message of the endpoint."""
        kind = message["type"]
        if self._failed:
            return
        if kind == "http.response.start":
            if self.stale is not None and message["status"] >= 500:  # noqa: PLR2004 - the endpoint fails
                self._failed = True
                self.stale[0].retry_at = self.cache.now() + RETRY_SECONDS
                self.land("kept")
                return
            self._begin(message)
            if self._lifetime is not None:
                return  # until it is known whether the body is whole
            await self._flush()
            return
        if self._lifetime is not None:
            if kind == "http.response.body":
                message = self._take(message)
            else:
                self._give_up("extension")  # such as a file that the server sends itself
        await self._flush()
        await self.client(message)

    def _begin(self, message: Message) -> None:
        """Finds out whether an answer may be kept."""
        headers = [(name.lower(), value) for name, value in message.get("headers") or ()]
        self._status, self._headers = message["status"], headers
        self._start = {**message, "headers": headers.copy()}
        private = self.override.per == "principal" and self._context.principal is not None
        said = lifetime_of(message["status"], headers, private=private)
        if isinstance(said, Lifetime) and not message.get("trailers"):
            self._lifetime = said
        else:
            self._give_up(said if isinstance(said, str) else "trailers")

    def _take(self, message: Message) -> Message:
        """Takes a part of the body; gives what is sent in its place."""
        self._body.append(message.get("body", b""))
        self._size += len(self._body[-1])
        if self._size > self.cache.settings.max_body_bytes:
            self._give_up("size")
        elif not message.get("more_body", False):
            body = b"".join(self._body)
            etag = get(self._headers, b"etag")
            if etag is None:
                self._headers.append((b"etag", strong_etag(body)))
                if self._start is not None:
                    self._start["headers"].append(self._headers[-1])
            kept = Kept(self._status, self._headers, body)
            self._keep(kept)
            if self._start is not None and self.cache.has(self.asked, kept):
                self._start["status"] = 304
                self._start["headers"] = on_not_modified(self._start["headers"])
                message = {**message, "body": b""}
            self._say("fwd=miss; stored" if self._kept else "fwd=miss")
        elif self._start is not None:
            self._say("fwd=miss")
        return message

    def _keep(self, kept: Kept) -> None:
        """Keeps the answer in memory at once, so that nobody waits for the client that it is sent to."""
        lifetime, self._lifetime = self._lifetime, None
        length = get(kept.headers, b"content-length")
        whole = length is None or length == b"%d" % len(kept.body)
        # A middleware may have moved the request to another route, with other demands; and an application that is
        # mounted may have a gate of its own, which a hit would not reach.
        moved = self._context.route is not self._route or self._context.principal is not self._principal
        entry = None
        if lifetime is not None and whole and not moved and not self._context.unique:
            entry = self.cache.entry_of(self.override, lifetime, kept, self._tags, self._made_at)
        if entry is None:
            self.land("not kept")
            return
        names = varies_by(kept.headers)
        key = self.asked.primary
        if names:
            marker = json.dumps({"vary": [name.decode("latin-1") for name in names]}).encode() + b"\n"
            self._kept.append((key, CacheEntry(marker, entry.made_at, entry.fresh_until, entry.keep_until, entry.tags)))
            key += variant(names, self.asked.headers)
        self._kept.append((key, entry))
        for each in self._kept:
            self.cache.levels.keep(*each)
        self.land("kept")

    def _say(self, what: str) -> None:
        if self._start is not None and self.cache.settings.cache_status:
            self._start["headers"].append(status_field(what))

    def _give_up(self, why: str) -> None:
        self._say(f"fwd=miss; detail={why}")
        self._lifetime = None
        self._body.clear()
        self.land("not kept")

    async def _flush(self) -> None:
        start, self._start = self._start, None
        if start is not None:
            self._started = True
            self.cache.counted("miss")
            await self.client(start)


def form_of(entry: CacheEntry) -> "Kept | tuple[bytes, ...] | None":
    """What an entry is; it is read once in a process."""
    if entry.form is None:
        entry.form = Kept.unpack(entry.body)
    form: Kept | tuple[bytes, ...] | None = entry.form
    return form


def status_field(what: str) -> tuple[bytes, bytes]:
    """What the cache did, as RFC 9211 has it."""
    return b"cache-status", b"fastapi-hardening; " + what.encode("ascii")
