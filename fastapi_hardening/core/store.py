"""Where state that concerns share is kept: a small protocol, and the bounded memory of one process.

A limiter that forgets its debtors when memory is full can be flooded into forgiving them. So the memory here never
evicts what is still alive: it drops only what has expired, and when everything is alive it says no, and the caller
falls back to something stricter (the limiter: one shared overflow bucket).
"""

from collections import OrderedDict
from typing import Generic, Protocol, TypeVar

from fastapi_hardening.core.clock import Clock, SystemClock

V = TypeVar("V")


class StateStore(Protocol):
    """Values by key, each with a time to live. Every method may be one round trip to another machine."""

    async def get(self, key: str) -> bytes | None:
        """The value, or ``None`` when there is none or it has expired."""
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

    async def get(self, key: str) -> bytes | None:
        """The value, or ``None`` when there is none or it has expired."""
        return self._values.get(key)

    async def put(self, key: str, value: bytes, ttl_seconds: float) -> bool:
        """Stores a value; ``False`` when every place holds something alive."""
        return self._values.put(key, value, ttl_seconds)

    async def add(self, key: str, value: bytes, ttl_seconds: float) -> bool:
        """Stores a value unless a live one is there; ``False`` then, and when there is no room."""
        return self._values.get(key) is None and self._values.put(key, value, ttl_seconds)

    async def delete(self, key: str) -> None:
        """Forgets a key."""
        self._values.delete(key)
