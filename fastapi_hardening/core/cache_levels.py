"""Where caches keep what they have: memory, a folder, and the Redis that all workers share, one behind the other.

What is nearer is asked first. The last level is the one that is believed: a copy nearer by is used for a few seconds
after it was taken from there, and then compared, so that what another worker has deleted is gone everywhere soon. Where
the last level is gone, copies are used until they expire, and what was deleted meanwhile is deleted there as well, as
soon as it is back. Nothing waits for a level that fails, and nothing fails with it.

Only bytes are kept, with a frame that is checked when it is read: whoever can write into the folder or into Redis can
change values, but never run code (there is no pickle). It is *not* a place for what must not be lost.

Tags: each has a random version, and an entry carries those of its tags from before it was made. To change the version
is to invalidate all of them at once, also what is still being made; a version that was lost is never guessed.
"""

import asyncio
import hashlib
import json
import logging
import secrets
import struct
import zlib
from collections.abc import Awaitable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge

from fastapi_hardening.core.check import CheckResult
from fastapi_hardening.core.clock import Clock, SystemClock
from fastapi_hardening.core.events import Events
from fastapi_hardening.core.eviction import OVERHEAD_BYTES, S3Fifo
from fastapi_hardening.core.store import StoreUnavailable

logger = logging.getLogger("fastapi_hardening.cache")

T = TypeVar("T")
Tags = tuple[tuple[str, str], ...]

_FRAME = struct.Struct(">4sIdddd?I")
_MARK = b"fhc1"
_PLAIN_KEY = 120
_MOST_TAGS = 100_000
_MOST_OWED = 10_000
_TAG_SECONDS = 30 * 86_400.0
_FIRST_PAUSE_SECONDS, _LAST_PAUSE_SECONDS = 0.5, 30.0


@dataclass(frozen=True, slots=True)
class CacheLevelFailed:
    """A level of the cache is not asked for a while.

    Attributes:
        level: ``file`` or ``shared``.
        reason: What went wrong.
    """

    level: str
    reason: str


@dataclass(frozen=True, slots=True)
class CacheLevelRecovered:
    """A level of the cache answers again.

    Attributes:
        level: ``file`` or ``shared``.
        seconds: How long it did not.
    """

    level: str
    seconds: float


class CacheEntry:
    """Bytes, and until when they are good for what. Times are seconds since the epoch.

    Attributes:
        body: What is kept.
        made_at: When it was made.
        fresh_until: Until then it is as good as new.
        keep_until: Until then it is kept, for those who take what is stale.
        tags: The tags, each with its version from before the entry was made.
        copied_at: When it was last compared with the last level.
        retry_at: Until then a stale entry is used without another attempt; only in this process.
        form: What its owner has made of the body; only in this process, so it must not be changed.
    """

    __slots__ = ("body", "copied_at", "form", "fresh_until", "keep_until", "made_at", "retry_at", "tags")

    def __init__(self, body: bytes, made_at: float, fresh_until: float, keep_until: float, tags: Tags = ()) -> None:
        self.body = body
        self.made_at = self.copied_at = made_at
        self.fresh_until = fresh_until
        self.keep_until = keep_until
        self.tags = tags
        self.retry_at = 0.0
        self.form: Any = None

    def pack(self, *, whole: bool = True) -> bytes:
        """As it is kept outside of the process; without the body where that is too large for the level."""
        tags = json.dumps(self.tags).encode() if self.tags else b""
        body = self.body if whole else b""
        rest = tags + body
        head = (_MARK, zlib.crc32(rest), self.made_at, self.fresh_until, self.keep_until, self.copied_at)
        return _FRAME.pack(*head, whole, len(tags)) + rest

    @classmethod
    def unpack(cls, data: bytes) -> "tuple[CacheEntry, bool] | None":
        """What :meth:`pack` gave, and whether it is whole; ``None`` where it is damaged or something else."""
        try:
            mark, checksum, made_at, fresh_until, keep_until, copied_at, whole, length = _FRAME.unpack_from(data)
            rest = data[_FRAME.size :]
            if mark != _MARK or zlib.crc32(rest) != checksum:
                return None
            tags = tuple((str(tag), str(version)) for tag, version in json.loads(rest[:length])) if length else ()
        except (struct.error, ValueError, TypeError):
            return None
        entry = cls(rest[length:], made_at, fresh_until, keep_until, tags)
        entry.copied_at = copied_at
        return entry, whole


class Level(Protocol):
    """Bytes by key, somewhere outside of the process; a :class:`~fastapi_hardening.core.store.StateStore` is one."""

    async def get(self, key: str) -> bytes | None:
        """The value, or ``None`` when there is none."""
        ...

    async def put(self, key: str, value: bytes, ttl_seconds: float) -> bool:
        """Stores a value."""
        ...

    async def add(self, key: str, value: bytes, ttl_seconds: float) -> bool:
        """Stores a value unless the key is there already."""
        ...

    async def delete(self, key: str) -> None:
        """Forgets a key."""
        ...


class CacheMetrics:
    """What caches count.

    Args:
        registry: Where the series are shown; ``None`` for nowhere.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self._hits = Counter(
            "hardening_cache_hits", "Entries that were found, by level.", ("level",), registry=registry
        )
        self.memory_hit = self._hits.labels("memory").inc
        self.misses = Counter("hardening_cache_misses", "Entries that were not found.", registry=registry)
        self.stale = Counter(
            "hardening_cache_stale", "Stale entries that were used, and why.", ("reason",), registry=registry
        )
        self.computations = Counter(
            "hardening_cache_computations", "Values that were made, by outcome.", ("outcome",), registry=registry
        )
        self.responses = Counter(
            "hardening_response_cache",
            "Requests on routes whose answers are kept, by what came of them.",
            ("outcome",),
            registry=registry,
        )
        self.evictions = Counter(
            "hardening_cache_evictions", "Entries that memory dropped for want of room.", registry=registry
        )
        self.bytes = Gauge(
            "hardening_cache_memory_bytes",
            "What the entries in memory take.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.up = Gauge(
            "hardening_cache_level_up",
            "Whether a level answers.",
            ("level",),
            registry=registry,
            multiprocess_mode="livemin",
        )

    def hit(self, level: str) -> None:
        """Counts an entry that was found."""
        self._hits.labels(level).inc()


class _Guarded:
    """A level that may fail; then it is not asked, for longer each time."""

    def __init__(self, name: str, level: Level, max_entry_bytes: int, metrics: CacheMetrics, events: Events) -> None:
        self.name = name
        self.level = level
        self.max_entry_bytes = max_entry_bytes
        self.reason: str | None = None
        self._up = metrics.up.labels(name)
        self._up.set(1)
        self._events = events
        self._failed_at = self._ask_at = 0.0
        self._pause = _FIRST_PAUSE_SECONDS
        self._now = SystemClock().monotonic

    async def ask(self, operation: Awaitable[T]) -> T:
        """The result of an operation.

        Raises:
            StoreUnavailable: There is none, or nobody is asked just now.
        """
        if self.reason is not None and self._now() < self._ask_at:
            getattr(operation, "close", bool)()
            raise StoreUnavailable(self.reason)
        try:
            result = await operation
        except (StoreUnavailable, OSError) as error:
            raise self._failed(error) from error
        if self.reason is not None:
            seconds, self.reason, self._pause = self._now() - self._failed_at, None, _FIRST_PAUSE_SECONDS
            self._up.set(1)
            logger.info("the %s level of the cache is back after %.1f s", self.name, seconds)
            self._events.emit(CacheLevelRecovered(self.name, seconds))
        return result

    def _failed(self, error: Exception) -> StoreUnavailable:
        reason = str(error) if isinstance(error, StoreUnavailable) else f"{type(error).__name__}: {error}"
        first, self.reason = self.reason is None, reason
        # A store says at once that it is gone, and finds out by itself when it is back.
        if not isinstance(error, StoreUnavailable):
            self._ask_at = self._now() + self._pause
            self._pause = min(2 * self._pause, _LAST_PAUSE_SECONDS)
        if first:
            self._failed_at = self._now()
            self._up.set(0)
            logger.warning("the %s level of the cache is gone: %s", self.name, reason)
            self._events.emit(CacheLevelFailed(self.name, reason))
        return StoreUnavailable(reason)


class CacheLevels:
    """All levels together.

    Args:
        memory_max_entries: How many entries memory has room for; 0 for none.
        memory_max_bytes: How much they may take.
        file: A folder, if there is one.
        shared: The store of all workers, if there is one.
        shared_max_entry_bytes: A larger entry is not sent there, only that it exists.
        local_seconds: So long a copy is used before it is compared with the last level.
        metrics: What is counted.
        events: Where :class:`CacheLevelFailed` and :class:`CacheLevelRecovered` go.
        clock: Where the time comes from.
    """

    def __init__(
        self,
        *,
        memory_max_entries: int = 50_000,
        memory_max_bytes: int = 64 * 1024 * 1024,
        file: Level | None = None,
        shared: Level | None = None,
        shared_max_entry_bytes: int = 256 * 1024,
        local_seconds: float = 5.0,
        metrics: CacheMetrics | None = None,
        events: Events | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.metrics = metrics or CacheMetrics()
        self._now = (clock or SystemClock()).time
        self._local_seconds = local_seconds
        self._memory: S3Fifo[CacheEntry] = S3Fifo(memory_max_entries, memory_max_bytes, self.metrics.evictions.inc)
        events = events or Events()
        self._outer: list[_Guarded] = []
        if file is not None:
            self._outer.append(_Guarded("file", file, 2**62, self.metrics, events))
        if shared is not None:
            self._outer.append(_Guarded("shared", shared, shared_max_entry_bytes, self.metrics, events))
        self._shared = self._outer[-1] if shared is not None else None
        self._last = self._outer[-1] if self._outer else None
        self._tags: S3Fifo[tuple[str, float]] = S3Fifo(_MOST_TAGS, _MOST_TAGS)
        # What the last level has not heard of yet: values to be put, or None to delete.
        self._owed: dict[str, bytes | None] = {}

    @property
    def only_memory(self) -> bool:
        """Whether nothing lies behind memory, so that :meth:`peek` says all there is to say."""
        return self._last is None

    @property
    def is_shared(self) -> bool:
        """Whether other workers find what this one keeps."""
        return self._shared is not None

    def peek(self, key: str) -> CacheEntry | None:
        """What memory has and may say without asking anybody; it may be stale. Whoever uses it counts the hit."""
        entry = self._memory.get(key)
        if entry is None:
            return None
        now = self._now()
        if entry.keep_until <= now:
            self._drop(key)
            return None
        if self._last is not None and not self._may_say(entry, now):
            return None
        if entry.tags and not self._are_current(entry.tags, now):
            return None
        return entry

    async def get(self, key: str) -> CacheEntry | None:
        """What there is of a key; it may be stale, but is never one that was deleted or invalidated."""
        entry = self.peek(key)
        if entry is not None:
            self.metrics.memory_hit()
        if entry is not None or self._last is None:
            return entry
        found, level = await self._find(key)
        if found is None or found.keep_until <= self._now() or not await self._still_tagged(found):
            self._drop(key)
            return None
        self._keep(key, found)
        self.metrics.hit(level)
        return found

    async def put(self, key: str, entry: CacheEntry) -> None:
        """Keeps an entry on every level that has room for it."""
        entry.copied_at = now = self._now()
        seconds = entry.keep_until - now
        if seconds <= 0:
            return
        self._keep(key, entry)
        address = _address(key)
        for level in self._outer:
            whole = len(entry.body) <= level.max_entry_bytes
            try:
                if level is self._last:
                    await self._settle()
                await level.ask(level.level.put(address, entry.pack(whole=whole), seconds))
            except StoreUnavailable:
                # An older entry that is there must not come back.
                self._owe(level, address, None)

    def keep(self, key: str, entry: CacheEntry) -> None:
        """Keeps an entry in memory at once; :meth:`put` brings it to the other levels."""
        entry.copied_at = now = self._now()
        if entry.keep_until > now:
            self._keep(key, entry)

    async def delete(self, key: str) -> None:
        """Forgets a key on every level."""
        self._drop(key)
        address = _address(key)
        for level in self._outer:
            try:
                await level.ask(level.level.delete(address))
            except StoreUnavailable:
                self._owe(level, address, None)
            else:
                self._pay(level, address)

    async def invalidate(self, tags: Iterable[str]) -> None:
        """Makes every entry with one of these tags worthless, wherever it is."""
        for tag in tags:
            version = secrets.token_hex(8)
            self._tags.put(tag, (version, self._now()), 1)
            if self._last is None:
                continue
            address = _address(f"tag:{tag}")
            try:
                await self._last.ask(self._last.level.put(address, version.encode(), _TAG_SECONDS))
            except StoreUnavailable:
                self._owe(self._last, address, version.encode())
            else:
                self._pay(self._last, address)

    async def tagged(self, tags: Sequence[str]) -> Tags:
        """Tags with their versions as they are now; to be asked before that is made which will carry them."""
        return tuple(zip(tags, await asyncio.gather(*(self._version(tag) for tag in tags)), strict=True))

    async def lock(self, key: str, seconds: float) -> bool:
        """Whether this worker may make the entry; ``False`` where another one does. Without a shared level all may."""
        if self._shared is None:
            return True
        try:
            return await self._shared.ask(self._shared.level.add(_address(f"lock:{key}"), b"1", seconds))
        except StoreUnavailable:
            return True

    async def unlock(self, key: str) -> None:
        """Lets other workers make the entry."""
        if self._shared is not None:
            try:
                await self._shared.ask(self._shared.level.delete(_address(f"lock:{key}")))
            except StoreUnavailable:
                logger.debug("a lock of the cache ends by its time, for the shared level is gone")

    def clear_memory(self) -> None:
        """Forgets what is in memory; for tests, and where memory is scarce."""
        self._memory.clear()
        self.metrics.bytes.set(0)

    def check(self) -> CheckResult:
        """What a health check says of the levels; asks nobody."""
        failing = [f"{level.name}: {level.reason}" for level in self._outer if level.reason is not None]
        return CheckResult("warn", "; ".join(failing)) if failing else CheckResult("pass")

    def _may_say(self, entry: CacheEntry, now: float) -> bool:
        """Whether a copy is recent, and no other worker can have made a better one meanwhile."""
        recent = entry.copied_at <= now < entry.copied_at + self._local_seconds
        return recent and (entry.fresh_until > now or entry.retry_at > now)

    async def _find(self, key: str) -> tuple[CacheEntry | None, str]:
        """The entry that is believed, and where it was; nearer copies where the last level is gone."""
        address, now = _address(key), self._now()
        spare, where = self._memory.get_quietly(key), "memory"
        in_file: float | None = None
        for level in self._outer:
            try:
                if level is self._last:
                    await self._settle()
                data = await level.ask(level.level.get(address))
            except StoreUnavailable:
                continue
            entry, whole = (None if data is None else CacheEntry.unpack(data)) or (None, True)
            if level is not self._last:
                if entry is not None and self._may_say(entry, now):
                    return entry, level.name
                in_file = None if entry is None else entry.made_at
                if entry is not None and (spare is None or spare.made_at < entry.made_at):
                    spare, where = entry, level.name
                continue
            if entry is not None and not whole:
                # Too large to be kept there, but if it is the same as the copy, the copy is good.
                entry, level_name = (spare if spare is not None and spare.made_at == entry.made_at else None), where
            else:
                level_name = level.name
            if entry is not None:
                entry.copied_at = now
                if level is not self._outer[0] and in_file != entry.made_at:
                    await self._copy(self._outer[0], address, entry)
            return entry, level_name
        return spare, where

    async def _copy(self, level: _Guarded, address: str, entry: CacheEntry) -> None:
        """Keeps nearer by what was found further away, for the day on which it is gone there."""
        with suppress(StoreUnavailable):
            await level.ask(level.level.put(address, entry.pack(), entry.keep_until - self._now()))

    async def _still_tagged(self, entry: CacheEntry) -> bool:
        return not entry.tags or await self.tagged([tag for tag, _ in entry.tags]) == entry.tags

    def _are_current(self, tags: Tags, now: float) -> bool:
        """Whether nothing is known against these versions, and they were looked at lately."""
        for tag, version in tags:
            known = self._tags.get(tag)
            if known is None or known[0] != version or not self._is_recent(known, now):
                return False
        return True

    def _is_recent(self, known: tuple[str, float], now: float) -> bool:
        return self._last is None or known[1] <= now < known[1] + self._local_seconds

    async def _version(self, tag: str) -> str:
        """The version of a tag; a new one where it has none."""
        now = self._now()
        known = self._tags.get(tag)
        if known is not None and self._is_recent(known, now):
            return known[0]
        version = known[0] if known is not None else secrets.token_hex(8)
        if self._last is not None:
            address, level = _address(f"tag:{tag}"), self._last
            try:
                await self._settle()
                kept = await level.ask(level.level.get(address))
                if kept is None and not await level.ask(level.level.add(address, version.encode(), _TAG_SECONDS)):
                    kept = await level.ask(level.level.get(address))
                version = version if kept is None else kept.decode("ascii", "replace")
            except StoreUnavailable:
                logger.debug("the versions of tags that are known here hold, for the last level is gone")
        self._tags.put(tag, (version, now), 1)
        return version

    def _keep(self, key: str, entry: CacheEntry) -> None:
        self._memory.put(key, entry, len(entry.body) + 2 * len(key) + OVERHEAD_BYTES)
        self.metrics.bytes.set(self._memory.bytes)

    def _drop(self, key: str) -> None:
        self._memory.pop(key)
        self.metrics.bytes.set(self._memory.bytes)

    def _owe(self, level: _Guarded, address: str, value: bytes | None) -> None:
        if level is not self._last:
            return
        if len(self._owed) >= _MOST_OWED and address not in self._owed:
            logger.error("more was deleted than can be remembered until the %s level is back", level.name)
            return
        self._owed[address] = value

    def _pay(self, level: _Guarded, address: str) -> None:
        if level is self._last:
            self._owed.pop(address, None)

    async def _settle(self) -> None:
        """Has the last level hear what it has missed, before it is asked anything."""
        while self._owed and self._last is not None:
            address, value = next(iter(self._owed.items()))
            level = self._last.level
            if value is None:
                await self._last.ask(level.delete(address))
            else:
                await self._last.ask(level.put(address, value, _TAG_SECONDS))
            if self._owed.get(address, b"") is value:
                del self._owed[address]


def _address(key: str) -> str:
    """Where a key is kept outside of the process: the key itself, or its digest where that is shorter."""
    if len(key) <= _PLAIN_KEY:
        return f"cache:{key}"
    return f"cache:#{hashlib.blake2b(key.encode('utf-8', 'surrogatepass'), digest_size=20).hexdigest()}"
