"""Keeps what is slow to make: in memory, in a folder, and in the Redis that all workers share, whichever are there.

It protects what stands behind it from the stampede: a thousand requests that miss the same key together make one call,
in this process and, with a shared store, in all of them: one holds a lock there that ends by itself, the others wait
for what it makes (Redis, "Distributed locks", one instance: it saves work, and nothing depends on it). What is a little
stale is answered at once while a fresh one is made (``stale_while_revalidate_seconds``), and when none can be made
(``stale_if_error_seconds``), both as in RFC 5861. That something is *not* there is remembered too. Lifetimes are
shortened at random by up to a tenth, so that what was made together does not expire together.

It is *not* a database: an entry may be gone at any time. It does not know who asks: whatever an answer depends on, such
as the tenant, belongs into its key. Values are JSON, bytes, or what pydantic can write; never pickled.

It is no layer: ``handle.cache`` is used by endpoints, and by the :mod:`~fastapi_hardening.performance.response_cache`.

Example:
    >>> import asyncio
    >>> from fastapi_hardening.performance.cache import Cache
    >>> cache = Cache()
    >>> async def rates() -> dict[str, float]:
    ...     print("asking the bank")
    ...     return {"EUR": 1.0, "USD": 1.1}
    >>> async def many() -> list[dict[str, float]]:
    ...     return await asyncio.gather(*(cache.get_or_compute("rates", rates, ttl_seconds=60) for _ in range(100)))
    >>> len(asyncio.run(many()))
    asking the bank
    100
"""

import asyncio
import functools
import inspect
import json
import logging
import random
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, get_type_hints

from pydantic import Field, SecretStr, TypeAdapter, field_validator

from fastapi_hardening.core.cache_levels import CacheEntry, CacheLevels, CacheMetrics
from fastapi_hardening.core.check import CheckResult
from fastapi_hardening.core.clock import Clock, SystemClock
from fastapi_hardening.core.configuration import ConcernSettings
from fastapi_hardening.core.events import Events
from fastapi_hardening.core.file_level import FileLevel
from fastapi_hardening.core.redis_address import read_address
from fastapi_hardening.core.redis_store import RedisStore
from fastapi_hardening.core.single_flight import SingleFlight, landed
from fastapi_hardening.core.store import StateStore

logger = logging.getLogger("fastapi_hardening.cache")

P = ParamSpec("P")
T = TypeVar("T")

# After a failure a stale value is used for so long before the next attempt.
_RETRY_SECONDS = 1.0
_FIRST_LOOK_SECONDS, _LAST_LOOK_SECONDS = 0.01, 0.1


class CacheSettings(ConcernSettings):
    """The settings of the cache."""

    memory_max_entries: int = Field(50_000, ge=0)
    """How many entries memory has room for; 0 keeps none there."""

    memory_max_bytes: int = Field(64 * 1024 * 1024, ge=0)
    """How much the entries in memory may take together; one of them at most a quarter."""

    folder: Path | None = None
    """A folder that keeps entries over a restart, on a disk of this machine; none if unset."""

    folder_max_bytes: int = Field(1024**3, ge=1024)
    """How much that folder may take; one entry at most a tenth."""

    shared: bool = True
    """Whether entries are also kept in the store of ``state_url``, where all workers find them."""

    shared_url: SecretStr | None = None
    """A Redis or Valkey for entries alone, which may evict (``allkeys-lru``); that of ``state_url`` if unset."""

    shared_max_entry_bytes: int = Field(256 * 1024, ge=0)
    """A larger entry is not sent to that store."""

    local_seconds: float = Field(5.0, ge=0)
    """So long a worker uses its copy before it compares it with the last level: what another worker has deleted is seen
    after at most so long."""

    ttl_seconds: float = Field(60.0, gt=0)
    """How long a value is fresh, where the call does not say it."""

    negative_ttl_seconds: float = Field(5.0, ge=0)
    """How long it is remembered that there is no value (``None``), where the call does not say it."""

    ttl_jitter: float = Field(0.1, ge=0, lt=1)
    """Up to this part of its lifetime a value expires earlier, at random."""

    stale_while_revalidate_seconds: float = Field(0.0, ge=0)
    """So long after it has expired a value is still used at once, while a fresh one is made."""

    stale_if_error_seconds: float = Field(0.0, ge=0)
    """So long after it has expired a value is still used when no fresh one can be made."""

    compute_timeout_seconds: float = Field(30.0, gt=0)
    """After this long the making of a value is given up."""

    lock_wait_seconds: float = Field(5.0, ge=0)
    """So long a worker waits for a value that another worker makes, before it makes one itself."""

    @field_validator("shared_url")
    @classmethod
    def _leads_to_a_store(cls, url: SecretStr | None) -> SecretStr | None:
        if url is not None:
            read_address(url.get_secret_value())
        return url


@dataclass(frozen=True, slots=True)
class CacheRefreshFailed:
    """A fresh value could not be made, and a stale one was used.

    Attributes:
        namespace: Of which part of the cache; keys are not told, for they may name people.
        reason: The class of what was raised.
    """

    namespace: str
    reason: str


@dataclass(frozen=True, slots=True)
class _Recipe:
    """How an entry is made, and for how long it is good."""

    key: str
    make: Callable[[], Awaitable[Any]]
    ttl: float
    negative_ttl: float
    revalidate: float
    on_error: float
    tags: tuple[str, ...]
    adapter: "TypeAdapter[Any] | None"


class Cache:
    """A cache of values by key, reachable as ``handle.cache``.

    Args:
        settings: Levels, sizes and lifetimes.
        store: The store that all workers share, if there is one.
        levels: The levels, where they are made already.
        metrics: What is counted.
        events: Where :class:`CacheRefreshFailed` and the events of the levels go.
        clock: Where the time comes from.
        service_name: What keys begin with in ``shared_url``.

    Attributes:
        levels: Where entries are kept.
        settings: The settings in effect.

    Raises:
        ConfigurationError: The folder or the URL cannot be used.
    """

    def __init__(
        self,
        settings: CacheSettings | None = None,
        *,
        store: StateStore | None = None,
        levels: CacheLevels | None = None,
        metrics: CacheMetrics | None = None,
        events: Events | None = None,
        clock: Clock | None = None,
        service_name: str = "fastapi-hardening",
    ) -> None:
        self.settings = settings = settings or CacheSettings()
        self._events = events or Events()
        self._clock = clock or SystemClock()
        self._own_store: RedisStore | None = None
        self._file: FileLevel | None = None
        self.levels = levels or self._levels(store if settings.shared else None, metrics, service_name)
        self._name = ""
        self._tag: str | None = None
        self._lookups: SingleFlight[CacheEntry] = SingleFlight()
        self._makings: SingleFlight[CacheEntry] = SingleFlight()

    def _levels(self, store: StateStore | None, metrics: CacheMetrics | None, service_name: str) -> CacheLevels:
        settings = self.settings
        if not settings.enabled:
            return CacheLevels(memory_max_entries=0, metrics=metrics, clock=self._clock)
        if settings.folder is not None:
            self._file = FileLevel(settings.folder, max_bytes=settings.folder_max_bytes, clock=self._clock)
        if settings.shared_url is not None:
            # With events of its own: what it says is not about the store of limits.
            url = settings.shared_url.get_secret_value()
            store = self._own_store = RedisStore(url, prefix=service_name, events=Events())
        return CacheLevels(
            memory_max_entries=settings.memory_max_entries,
            memory_max_bytes=settings.memory_max_bytes,
            file=self._file,
            shared=store,
            shared_max_entry_bytes=settings.shared_max_entry_bytes,
            local_seconds=settings.local_seconds,
            metrics=metrics,
            events=self._events,
            clock=self._clock,
        )

    # --- use ----------------------------------------------------------------------------------------------------------

    async def get(self, key: str, default: Any = None, *, of: Any = None) -> Any:
        """The value of a key, if there is a fresh one.

        Args:
            key: Which value.
            default: What is given where there is none; a ``None`` that was stored is given as ``None``.
            of: The type of the value, where it is more than JSON has, such as a pydantic model.
        """
        entry = await self.levels.get(self._full(key))
        if entry is not None and entry.fresh_until > self._clock.time():
            # What another version of the application has written may not fit.
            with suppress(ValueError):
                return _decoded(entry.body, _adapter(of))
        self.levels.metrics.misses.inc()
        return default

    async def set(
        self, key: str, value: Any, *, ttl_seconds: float | None = None, tags: Sequence[str] = (), of: Any = None
    ) -> None:
        """Stores a value.

        Args:
            key: Under which name.
            value: JSON, bytes, or what ``of`` says.
            ttl_seconds: How long it is fresh; by default as the settings say.
            tags: What it is about, so that it can be invalidated with others.
            of: The type of the value, where it is more than JSON has.

        Raises:
            TypeError: The value cannot be written as JSON, or is not what ``of`` says.
        """
        recipe = self._recipe(key, ttl=ttl_seconds, tags=tags, of=of)
        self._makings.forget(recipe.key)
        await self._store(recipe, value, await self.levels.tagged(recipe.tags), self._clock.time())

    async def delete(self, key: str) -> None:
        """Forgets a key, everywhere; what is being made for it now is answered, and not stored."""
        full = self._full(key)
        self._lookups.forget(full)
        self._makings.forget(full)
        await self.levels.delete(full)

    async def invalidate(self, *tags: str) -> None:
        """Forgets everything with one of these tags, everywhere, also what is being made now."""
        await self.levels.invalidate([self._full(tag) for tag in tags])

    async def get_or_compute(
        self,
        key: str,
        make: Callable[[], Awaitable[T]],
        *,
        ttl_seconds: float | None = None,
        negative_ttl_seconds: float | None = None,
        stale_while_revalidate_seconds: float | None = None,
        stale_if_error_seconds: float | None = None,
        tags: Sequence[str] = (),
        of: Any = None,
    ) -> T:
        """The value of a key; made once, for all who ask meanwhile, where there is none.

        Everybody has a value of their own, as it was read from the cache, so it may be changed. (So a tuple comes back
        as a list, unless ``of`` says that it is a tuple.)

        Args:
            key: Which value; everything that it depends on, such as the tenant, is in it.
            make: Makes it. It must not ask for the same key. ``None`` says that there is none.
            ttl_seconds: How long the value is fresh.
            negative_ttl_seconds: How long ``None`` is.
            stale_while_revalidate_seconds: So long after that it is still used while a fresh one is made.
            stale_if_error_seconds: So long after that it is still used when none can be made.
            tags: What it is about, so that it can be invalidated with others.
            of: The type of the value, where it is more than JSON has, such as a pydantic model.

        Raises:
            TypeError: The value cannot be written as JSON, or is not what ``of`` says.
            TimeoutError: ``make`` took longer than ``compute_timeout_seconds``.
            Exception: Whatever ``make`` raises, where nothing stale may be used.
        """
        adapter = _adapter(of)
        entry = self.levels.peek(self._full(key))
        if entry is not None and self._is_good(entry):
            self.levels.metrics.memory_hit()
            # What another version of the application has written may not fit.
            with suppress(ValueError):
                found: T = _decoded(entry.body, adapter)
                return found
        recipe = self._recipe(
            key,
            make,
            ttl=ttl_seconds,
            negative_ttl=negative_ttl_seconds,
            revalidate=stale_while_revalidate_seconds,
            on_error=stale_if_error_seconds,
            tags=tags,
            of=of,
        )
        entry = await self._lookups.run(recipe.key, lambda: self._look(recipe))
        try:
            found = _decoded(entry.body, adapter)
        except ValueError:
            await self.delete(key)
            entry = await self._lookups.run(recipe.key, lambda: self._look(recipe))
            found = _decoded(entry.body, adapter)
        return found

    def cached(
        self,
        *,
        ttl_seconds: float | None = None,
        key: Callable[..., str] | None = None,
        tags: Sequence[str] | Callable[..., Sequence[str]] = (),
        negative_ttl_seconds: float | None = None,
        stale_while_revalidate_seconds: float | None = None,
        stale_if_error_seconds: float | None = None,
    ) -> Callable[[Callable[P, Awaitable[T]]], Callable[P, Coroutine[Any, Any, T]]]:
        """Has the results of an async function kept; the type of a result is the one that the function declares.

        Args:
            ttl_seconds: How long a result is fresh.
            key: Makes the key of the arguments. By default they are written as JSON; those that cannot be need one.
            tags: Tags of a result, or a function of the arguments that gives them.
            negative_ttl_seconds: How long ``None`` is.
            stale_while_revalidate_seconds: So long after that it is still used while a fresh one is made.
            stale_if_error_seconds: So long after that it is still used when none can be made.

        Raises:
            TypeError: An argument is no JSON, and there is no ``key``; raised by the call.

        Example:
            >>> cache = Cache()
            >>> @cache.cached(ttl_seconds=60)
            ... async def square(number: int) -> int:
            ...     print("working")
            ...     return number * number
            >>> [asyncio.run(square(7)), asyncio.run(square(7)), asyncio.run(square(number=7))]
            working
            [49, 49, 49]
        """

        def decorate(function: Callable[P, Awaitable[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
            signature = inspect.signature(function)
            name = f"{function.__module__}.{function.__qualname__}"
            returned = get_type_hints(function).get("return")

            @functools.wraps(function)
            async def cached_function(*args: P.args, **kwargs: P.kwargs) -> T:
                text = key(*args, **kwargs) if key is not None else _written(signature, name, args, kwargs)
                return await self.get_or_compute(
                    f"{name}({text})",
                    lambda: function(*args, **kwargs),
                    ttl_seconds=ttl_seconds,
                    negative_ttl_seconds=negative_ttl_seconds,
                    stale_while_revalidate_seconds=stale_while_revalidate_seconds,
                    stale_if_error_seconds=stale_if_error_seconds,
                    tags=tags(*args, **kwargs) if callable(tags) else tags,
                    of=None if returned in (Any, bytes, type(None)) else returned,
                )

            return cached_function

        return decorate

    def namespace(self, name: str) -> "Cache":
        """A part of the cache with keys and tags of its own, which :meth:`clear` empties at once.

        Raises:
            ValueError: The name is empty or has a colon in it.
        """
        if not name or ":" in name:
            raise ValueError(f"a namespace has a name without colons, not {name!r}")
        part = Cache(self.settings, levels=self.levels, events=self._events, clock=self._clock)
        part._name = f"{self._name}{name}:"
        part._tag = f"all of {part._name}"
        part._lookups, part._makings = self._lookups, self._makings
        return part

    async def clear(self) -> None:
        """Forgets everything in this namespace.

        Raises:
            ValueError: It is the whole cache; what else is in it is not this call's to forget.
        """
        if self._tag is None:
            raise ValueError("only a namespace can be cleared: cache.namespace('products').clear()")
        await self.levels.invalidate((self._tag,))

    def check(self) -> CheckResult:
        """What a health check says of the levels; asks nobody."""
        return self.levels.check()

    async def close(self) -> None:
        """Ends what is being made, the threads of the folder, and the connections to ``shared_url``."""
        self._lookups.cancel_all()
        self._makings.cancel_all()
        if self._file is not None:
            self._file.close()
        if self._own_store is not None:
            await self._own_store.close()

    # --- making -------------------------------------------------------------------------------------------------------

    def _recipe(
        self,
        key: str,
        make: Callable[[], Awaitable[Any]] | None = None,
        *,
        ttl: float | None,
        negative_ttl: float | None = None,
        revalidate: float | None = None,
        on_error: float | None = None,
        tags: Sequence[str],
        of: Any,
    ) -> _Recipe:
        settings = self.settings
        own = () if self._tag is None else (self._tag,)
        return _Recipe(
            key=self._full(key),
            make=make or _nothing,
            ttl=settings.ttl_seconds if ttl is None else ttl,
            negative_ttl=settings.negative_ttl_seconds if negative_ttl is None else negative_ttl,
            revalidate=settings.stale_while_revalidate_seconds if revalidate is None else revalidate,
            on_error=settings.stale_if_error_seconds if on_error is None else on_error,
            tags=(*own, *(self._full(tag) for tag in tags)),
            adapter=_adapter(of),
        )

    def _full(self, key: str) -> str:
        return f"value:{self._name}{key}"

    def _is_good(self, entry: CacheEntry) -> bool:
        now = self._clock.time()
        if entry.fresh_until > now:
            return True
        if entry.retry_at > now:
            self.levels.metrics.stale.labels("error").inc()
            return True
        return False

    async def _look(self, recipe: _Recipe) -> CacheEntry:
        """The entry that is there, or one that is made."""
        entry = await self.levels.get(recipe.key)
        if entry is not None and self._is_good(entry):
            return entry
        making = self._makings.start(recipe.key, lambda: self._make(recipe, entry))
        if entry is not None and entry.fresh_until + recipe.revalidate > self._clock.time():
            self.levels.metrics.stale.labels("revalidating").inc()
            making.add_done_callback(_tell_failure)
            return entry
        if entry is None:
            self.levels.metrics.misses.inc()
        return await landed(making)

    async def _make(self, recipe: _Recipe, stale: CacheEntry | None) -> CacheEntry:
        """Makes an entry, or waits for the worker that does."""
        metrics, settings = self.levels.metrics, self.settings
        locked, found = await self._turn(recipe)
        if found is not None:
            metrics.computations.labels("elsewhere").inc()
            return found
        try:
            tags, made_at = await self.levels.tagged(recipe.tags), self._clock.time()
            async with asyncio.timeout(settings.compute_timeout_seconds):
                value = await recipe.make()
            entry = await self._store(recipe, value, tags, made_at, if_current=True)
        except Exception as error:
            metrics.computations.labels("failed").inc()
            now = self._clock.time()
            if stale is None or stale.fresh_until + recipe.on_error <= now:
                raise
            logger.warning("a stale value is used, for no fresh one could be made: %s", type(error).__name__)
            metrics.stale.labels("error").inc()
            stale.retry_at = now + _RETRY_SECONDS
            self._events.emit(CacheRefreshFailed(self._name.rstrip(":"), type(error).__name__))
            return stale
        else:
            metrics.computations.labels("made").inc()
            return entry
        finally:
            if locked:
                await self.levels.unlock(recipe.key)

    async def _turn(self, recipe: _Recipe) -> tuple[bool, CacheEntry | None]:
        """Whether this worker has the lock, and what another one has made, where there are others."""
        levels, settings = self.levels, self.settings
        if not levels.is_shared:
            return False, None
        waited, pause = 0.0, _FIRST_LOOK_SECONDS
        while True:
            locked = await levels.lock(recipe.key, settings.compute_timeout_seconds)
            entry = await levels.get(recipe.key)
            if entry is not None and entry.fresh_until > self._clock.time():
                if locked:
                    await levels.unlock(recipe.key)
                return False, entry
            if locked or waited >= settings.lock_wait_seconds:
                return locked, None
            await asyncio.sleep(pause)
            waited += pause
            pause = min(2 * pause, _LAST_LOOK_SECONDS)

    async def _store(
        self, recipe: _Recipe, value: Any, tags: Any, made_at: float, *, if_current: bool = False
    ) -> CacheEntry:
        ttl = recipe.negative_ttl if value is None else recipe.ttl
        ttl *= 1 - self.settings.ttl_jitter * random.random()  # noqa: S311 - not a secret
        fresh_until = self._clock.time() + ttl
        keep_until = fresh_until + max(recipe.revalidate, recipe.on_error)
        entry = CacheEntry(_encoded(value, recipe.adapter), made_at, fresh_until, keep_until, tags)
        if ttl > 0 and not (if_current and not self._makings.is_current(recipe.key)):
            await self.levels.put(recipe.key, entry)
        return entry


def _tell_failure(task: "asyncio.Task[CacheEntry]") -> None:
    if not task.cancelled() and task.exception() is not None:
        logger.warning("a stale value could not be made again", exc_info=task.exception())


async def _nothing() -> None:
    """What is made where nothing is to be made."""


@functools.lru_cache(maxsize=256)
def _adapter_of(kind: Any) -> "TypeAdapter[Any]":
    return TypeAdapter(kind)


def _adapter(of: Any) -> "TypeAdapter[Any] | None":
    return None if of is None else _adapter_of(of)


def _encoded(value: Any, adapter: "TypeAdapter[Any] | None") -> bytes:
    """A value as bytes, the first of which says how to read the others; nothing for ``None``."""
    if value is None:
        return b""
    if isinstance(value, bytes):
        return b"b" + value
    try:
        if adapter is not None:
            return b"j" + adapter.dump_json(value, warnings="error")
        return b"j" + json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise TypeError(f"the cache keeps JSON and bytes ({error}); for anything else say what it is: of=...") from None


def _decoded(body: bytes, adapter: "TypeAdapter[Any] | None") -> Any:
    if not body:
        return None
    if body[:1] == b"b":
        return body[1:]
    return json.loads(body[1:]) if adapter is None else adapter.validate_json(body[1:])


def _written(signature: inspect.Signature, name: str, args: Any, kwargs: Any) -> str:
    """The arguments of a call, each under its name, however they were given."""
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    try:
        return json.dumps(bound.arguments, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError):
        raise TypeError(f"the arguments of {name} cannot be written as JSON; give the decorator a key") from None
