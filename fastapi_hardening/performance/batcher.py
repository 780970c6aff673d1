"""Many loads of one thing become one load of many: ``await products.load(7)`` in each request, one query for all.

It protects what stands behind from a call for every key: a hundred requests that each want a few products in the same
moment make one call, and each key is in it once. The first one who asks waits for at most ``max_wait_seconds``, so that
others can join; with 0 it is the rest of this turn of the event loop, which costs no time at all.

It is *not* a cache: who asks after a batch has left has a new one made, so he never has what was read before he asked.
And it does not know who asks: the function is called outside of every request, with the keys alone, so whatever an
answer depends on, such as the tenant, is a part of the key.

It is no layer. Make one where the application is made, and use it in endpoints; it belongs to its process.

Example:
    >>> import asyncio
    >>> async def load_many(numbers: Sequence[int]) -> dict[int, str]:
    ...     print("asked for", sorted(numbers))
    ...     return {number: f"product {number}" for number in numbers}
    >>> products = Batcher(load_many, max_wait_seconds=0)
    >>> async def requests() -> list[str]:
    ...     return await asyncio.gather(*(products.load(number) for number in (1, 2, 1, 3)))
    >>> asyncio.run(requests())
    asked for [1, 2, 3]
    ['product 1', 'product 2', 'product 1', 'product 3']
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable, Iterable, Mapping, Sequence
from contextvars import Context
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

from prometheus_client import CollectorRegistry, Counter

from fastapi_hardening.core.events import Events
from fastapi_hardening.core.problem import IANA, Problem, retry_after

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

Loaded = Mapping[K, V | Exception] | Sequence[V | Exception]
"""Values by key, or in the order of the keys; an exception among them is for its key alone."""


class KeyNotLoaded(KeyError):  # noqa: N818 - named as problems are, by what happened
    """The function gave nothing for this key."""


class BatcherFull(Problem):
    """So many keys wait already that another one would wait too long."""

    status = 503
    type = IANA + "temporary-reduced-capacity"
    title = "Temporarily reduced capacity"


@dataclass(frozen=True, slots=True)
class BatchLoaded:
    """A batch was loaded, or could not be.

    Attributes:
        batcher: Its name.
        keys: How many keys it had.
        loads: How many loads it was made for.
        seconds: How long the function took.
        failed: Whether it raised.
    """

    batcher: str
    keys: int
    loads: int
    seconds: float
    failed: bool


class Batcher(Generic[K, V]):
    """Gathers the keys that are asked for at the same time, and has them loaded together.

    Args:
        load_many: Loads several keys; gives a mapping, in which a key may be missing, or a sequence in their order.
            It is called in a context of its own, not in that of a request.
        max_size: A batch has at most so many keys; a full one leaves at once.
        max_wait_seconds: So long the first key of a batch waits for others; 0 for the rest of this turn of the event
            loop. It is all that a batcher adds to a load, unless ``max_concurrent`` calls are under way.
        max_concurrent: So many calls are under way at the same time; other keys wait for one of them to end.
        max_keys: So many keys may wait or be under way; beyond that, loads are refused.
        timeout_seconds: After this long a call has failed.
        name: How events and metrics call it.
        events: Where :class:`BatchLoaded` goes: ``handle.events``.

    Raises:
        ValueError: A number is not above 0, or the wait below it.
    """

    def __init__(
        self,
        load_many: Callable[[Sequence[K]], Awaitable[Loaded[K, V]]],
        *,
        max_size: int = 100,
        max_wait_seconds: float = 0.002,
        max_concurrent: int = 10,
        max_keys: int = 10_000,
        timeout_seconds: float = 30.0,
        name: str | None = None,
        events: Events | None = None,
    ) -> None:
        if min(max_size, max_concurrent, max_keys, timeout_seconds) <= 0 or max_wait_seconds < 0:
            raise ValueError("the sizes and the timeout of a batcher are above 0, and its wait is at least 0")
        self.name: str = name or getattr(load_many, "__qualname__", None) or type(load_many).__name__
        self._load_many = load_many
        self._max_size = max_size
        self._max_wait = max_wait_seconds
        self._max_concurrent = max_concurrent
        self._max_keys = max_keys
        self._timeout = timeout_seconds
        self._events = events or Events()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._begin_anew()

    def _begin_anew(self) -> None:
        # What waits: for each key all who want it.
        self._waiting: dict[K, list[asyncio.Future[V]]] = {}
        self._under_way: dict[asyncio.Task[None], int] = {}
        self._timer: asyncio.Handle | None = None
        self._is_due = False

    async def load(self, key: K) -> V:
        """The value of a key, loaded together with what others ask for now.

        Raises:
            KeyNotLoaded: There is none.
            BatcherFull: Too many keys wait already.
            TimeoutError: The call took too long.
            Exception: Whatever the function raised, or gave for this key.
        """
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            # An event loop that has ended left things behind that never come.
            self._loop = loop
            self._begin_anew()
        waiting = self._waiting.get(key)
        if waiting is None:
            if len(self._waiting) + sum(self._under_way.values()) >= self._max_keys:
                raise BatcherFull("Too much is asked for at the same time.", headers=retry_after(1))
            waiting = self._waiting[key] = []
        future: asyncio.Future[V] = loop.create_future()
        waiting.append(future)
        if len(self._waiting) >= self._max_size:
            self._leave()
        elif self._timer is None and not self._is_due:
            call = loop.call_later(self._max_wait, self._leave) if self._max_wait else loop.call_soon(self._leave)
            self._timer = call
        return await future

    async def load_all(self, keys: Iterable[K]) -> list[V]:
        """The values of several keys in their order; raises what the first of them raises that fails."""
        return await asyncio.gather(*(self.load(key) for key in keys))

    def _leave(self) -> None:
        """Sends what waits on its way, as far as there is room for it."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._is_due = True
        while self._waiting and len(self._under_way) < self._max_concurrent:
            batch = {key: self._waiting.pop(key) for key in [*islice(self._waiting, self._max_size)]}
            # Nobody waits any more for what was cancelled.
            batch = {key: wanted for key, futures in batch.items() if (wanted := [f for f in futures if not f.done()])}
            if batch:
                # In a context of its own: it is for several requests, and belongs to none of them.
                task = asyncio.get_running_loop().create_task(self._run(batch), context=Context())
                self._under_way[task] = len(batch)
                task.add_done_callback(self._landed)
        self._is_due = bool(self._waiting)

    def _landed(self, task: "asyncio.Task[None]") -> None:
        self._under_way.pop(task, None)
        if self._is_due:
            self._leave()

    async def _run(self, batch: "dict[K, list[asyncio.Future[V]]]") -> None:
        keys, started = [*batch], time.monotonic()
        try:
            async with asyncio.timeout(self._timeout):
                values = _by_key(keys, await self._load_many(keys))
        except asyncio.CancelledError:
            for future in _open(batch):
                future.cancel()
            raise
        except Exception as error:  # noqa: BLE001 - it is raised where the values are awaited
            for future in _open(batch):
                future.set_exception(error)
        else:
            for key, futures in batch.items():
                value = values.get(key, _MISSING)
                for future in futures:
                    if not future.done():
                        _settle(future, key, value)
        failed = any(not f.cancelled() and f.exception() is not None for futures in batch.values() for f in futures)
        loads = sum(map(len, batch.values()))
        self._events.emit(BatchLoaded(self.name, len(keys), loads, time.monotonic() - started, failed))


_MISSING: Any = object()


def _by_key(keys: Sequence[Any], loaded: Any) -> Mapping[Any, Any]:
    """What the function gave, by key.

    Raises:
        ValueError: It gave a sequence of another length.
    """
    if isinstance(loaded, Mapping):
        return loaded
    if len(loaded) != len(keys):
        raise ValueError(
            f"a batch of {len(keys)} keys was loaded as {len(loaded)} values; give a mapping, or one for each"
        )
    return dict(zip(keys, loaded, strict=True))


def _open(batch: "dict[Any, list[asyncio.Future[Any]]]") -> "list[asyncio.Future[Any]]":
    """Those that somebody waits for."""
    return [future for futures in batch.values() for future in futures if not future.done()]


def _settle(future: "asyncio.Future[Any]", key: Any, value: Any) -> None:
    if value is _MISSING:
        future.set_exception(KeyNotLoaded(key))
    elif isinstance(value, Exception):
        future.set_exception(value)
    else:
        future.set_result(value)


def measure(registry: CollectorRegistry, events: Events) -> None:
    """Has every batch counted, by batcher: loads against calls is what batching saves."""
    loads = Counter("hardening_batch_loads", "Loads that were asked for.", ("batcher",), registry=registry)
    keys = Counter("hardening_batch_keys", "Keys that were loaded.", ("batcher",), registry=registry)
    calls = Counter("hardening_batch_calls", "Calls that loaded them.", ("batcher",), registry=registry)
    seconds = Counter("hardening_batch_seconds", "Seconds that the calls took.", ("batcher",), registry=registry)

    def count(batch: BatchLoaded) -> None:
        loads.labels(batch.batcher).inc(batch.loads)
        keys.labels(batch.batcher).inc(batch.keys)
        calls.labels(batch.batcher).inc()
        seconds.labels(batch.batcher).inc(batch.seconds)

    events.subscribe(BatchLoaded, count)
