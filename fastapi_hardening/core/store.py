"""Where state that concerns share is kept: a small protocol, and the bounded memory of one process.

A limiter that forgets its debtors when memory is full can be flooded into forgiving them. So the memory here never
evicts what is still alive: it drops only what has expired, and when everything is alive it says no, and the caller
falls back to something stricter (the limiter: one shared overflow bucket).

A store on another machine can be gone. Then it says :class:`StoreUnavailable` at once, and every concern has an answer
to that: a limit goes on in memory, a cache is empty.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from fastapi_hardening.core.clock import Clock, SystemClock
from fastapi_hardening.core.window import Decision, Limit, Strategy

V = TypeVar("V")


class StoreUnavailable(Exception):  # noqa: N818 - named as problems are, by what happened
    """The shared store did not answer in time, or cannot do what it was asked; the message says why."""


@dataclass(frozen=True, slots=True)
class StoreFailed:
    """The shared store is no longer asked, until it answers again.

    Attributes:
        reason: What it said, or that it said nothing.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class StoreRecovered:
    """The shared store answers again.

    Attributes:
        seconds: How long it was not asked.
    """

    seconds: float


class SharedLimits:
    """Limits that all workers count together, under one name.

    Args:
        name: What tells this budget from others of the service; the same in every worker.
        limits: The limits, all of which hold.
        strategy: How they are counted.

    Attributes:
        id: A short form of all three: whoever changes a limit starts it anew.
        text: What a script needs to know: the letter of the strategy, quota and window of each limit.
    """

    __slots__ = ("id", "limits", "name", "strategy", "text")

    def __init__(self, name: str, limits: tuple[Limit, ...], strategy: Strategy) -> None:
        self.name = name
        self.limits = limits
        self.strategy: Strategy = strategy
        self.text = " ".join([strategy[0], *(f"{limit.quota} {limit.window_seconds}" for limit in limits)])
        self.id = hashlib.blake2b(f"{self.text} {name}".encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()


class SharedCounters(Protocol):
    """Limits that are counted in one place for all workers."""

    @property
    def workers(self) -> int:
        """How many processes share them."""
        ...

    async def spend(self, key: str, *charges: tuple[SharedLimits, int]) -> list[Decision]:
        """Spends units of a key, of all these limits or of none; one round trip.

        Args:
            key: Whose units they are.
            charges: Limits, each with the units that it is asked for; 0 only looks.

        Returns:
            A decision for every limit, in their order, as :class:`~fastapi_hardening.core.window.Limiter` makes it.

        Raises:
            StoreUnavailable: There is no answer within the time that the store has.
        """
        ...


class StateStore(Protocol):
    """Values by key, each with a time to live. Every method may be one round trip to another machine.

    Where it is on another machine, every method may raise :class:`StoreUnavailable`.
    """

    @property
    def counters(self) -> SharedCounters | None:
        """What counts limits for all workers; ``None`` where each process counts for itself."""
        ...

    async def open(self) -> None:
        """Begins to look after the connection, if there is one; otherwise that begins with the first use."""
        ...

    async def close(self) -> None:
        """Gives back what the store holds; it opens again when it is used again."""
        ...

    async def get(self, key: str) -> bytes | None:
        """The value, or ``None`` when there is none or it has expired."""
        ...

    async def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """What :meth:`get` gives for each of the keys, in one round trip."""
        ...

    async def put(self, key: str, value: bytes, ttl_seconds: float) -> bool:
        """Stores a value; ``False`` when there is no room for another key."""
        ...

    async def add(self, key: str, value: bytes, ttl_seconds: float) -> bool:
        """Stores a value unless the key is there already; ``False`` when it is, or when there is no room."""
        ...

    async def delete(self, key: str) -> None:
        """Forgets a key."""
        ...


class BoundedMap(Generic[V]):
    """A dictionary of values that expire, with a fixed number of places.

    An insertion looks at a few of the entries that were longest not looked at, drops the expired ones and puts the
    others behind; so every operation takes constant time, and expired entries leave soon after newcomers arrive. (A
    plain ``dict`` would find its first entry in linear time once many were taken from its front.)

    Args:
        max_keys: The number of places.
        clock: Where the time comes from.

    Example:
        >>> from fastapi_hardening.core.clock import ManualClock
        >>> clock = ManualClock()
        >>> places = BoundedMap(2, clock=clock)
        >>> [places.put(key, key, ttl_seconds=10) for key in ("a", "b", "c")]
        [True, True, False]
        >>> clock.advance(10)
        >>> places.put("c", "c", ttl_seconds=10), places.get("a")
        (True, None)
    """

    _INSPECTED = 2
    _INSPECTED_WHEN_FULL = 16

    def __init__(self, max_keys: int, *, clock: Clock | None = None) -> None:
        if max_keys < 1:
            raise ValueError(f"max_keys is the number of places, at least 1, not {max_keys}")
        self._max_keys = max_keys
        self._entries: OrderedDict[str, tuple[V, float]] = OrderedDict()
        self._now = (clock or SystemClock()).monotonic

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: str) -> V | None:
        """The value, or ``None`` when there is none or it has expired."""
        entry = self._entries.get(key)
        return None if entry is None or entry[1] <= self._now() else entry[0]

    def put(self, key: str, value: V, ttl_seconds: float) -> bool:
        """Stores a value for ``ttl_seconds``; ``False`` when every place holds something alive."""
        now = self._now()
        if key not in self._entries:
            self._drop_expired(now)
            if len(self._entries) >= self._max_keys:
                return False
        self._entries[key] = (value, now + ttl_seconds)
        return True

    def delete(self, key: str) -> None:
        """Forgets a key."""
        self._entries.pop(key, None)

    def values(self) -> list[V]:
        """Every value that has not expired."""
        now = self._now()
        return [value for value, expires_at in self._entries.values() if expires_at > now]

    def _drop_expired(self, now: float) -> None:
        entries = self._entries
        inspected = self._INSPECTED if len(entries) < self._max_keys else self._INSPECTED_WHEN_FULL
        for _ in range(min(inspected, len(entries))):
            key = next(iter(entries))
            if entries[key][1] <= now:
                del entries[key]
            else:
                entries.move_to_end(key)


class MemoryStore:
    """The state store of one process. Several workers need a shared one, or each of them counts for itself."""

    def __init__(self, max_keys: int = 100_000, *, clock: Clock | None = None) -> None:
        self._values: BoundedMap[bytes] = BoundedMap(max_keys, clock=clock)
        self.counters: SharedCounters | None = None

    async def open(self) -> None:
        """Nothing has to be opened."""

    async def close(self) -> None:
        """Nothing has to be closed; what is stored stays."""

    async def get(self, key: str) -> bytes | None:
        """The value, or ``None`` when there is none or it has expired."""
        return self._values.get(key)

    async def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """What :meth:`get` gives for each of the keys."""
        return [self._values.get(key) for key in keys]

    async def put(self, key: str, value: bytes, ttl_seconds: float) -> bool:
        """Stores a value; ``False`` when every place holds something alive."""
        return self._values.put(key, value, ttl_seconds)

    async def add(self, key: str, value: bytes, ttl_seconds: float) -> bool:
        """Stores a value unless a live one is there; ``False`` then, and when there is no room."""
        return self._values.get(key) is None and self._values.put(key, value, ttl_seconds)

    async def delete(self, key: str) -> None:
        """Forgets a key."""
        self._values.delete(key)
