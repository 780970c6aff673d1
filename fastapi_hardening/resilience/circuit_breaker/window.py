"""What became of the last calls: of so many, or of those of so many seconds.

Nothing is locked: calls may end in several threads, and what two of them write at the same moment may be counted once.
Sums are made anew each time, so such a slip leaves with its bucket.
"""

import math
from typing import NamedTuple, Protocol

_BUCKETS = 20


class Counts(NamedTuple):
    """How many calls ended, how many of them failed, and how many were slow; a call may be both."""

    calls: int
    failed: int
    slow: int


class Window(Protocol):
    """What a breaker decides by."""

    troubled: bool
    """Whether there may be a failed or slow call in the window; while there is none, nothing has to be decided."""

    def succeed(self, now: float) -> None:
        """Counts a call that ends at ``now``, in monotonic seconds, well and quickly."""
        ...

    def record(self, now: float, *, failed: bool, slow: bool) -> None:
        """Counts a call that ends at ``now``, in monotonic seconds."""
        ...

    def counts(self, now: float) -> Counts:
        """What the window holds."""
        ...


class CountWindow:
    """The last ``size`` calls, however old."""

    def __init__(self, size: int) -> None:
        # 1 for a call that went well, 3 if it was slow, 5 if it failed, 7 for both; 0 for a place not used yet.
        self._ring = bytearray(size)
        self._next = 0
        self.troubled = False

    def succeed(self, now: float) -> None:  # noqa: ARG002 - the other window needs the time
        """Counts a call that went well, and quickly, in place of the oldest."""
        self._put(1)

    def record(self, now: float, *, failed: bool, slow: bool) -> None:  # noqa: ARG002
        """Counts a call in place of the oldest."""
        self.troubled = self.troubled or failed or slow
        self._put(1 + 4 * failed + 2 * slow)

    def _put(self, call: int) -> None:
        position = self._next
        self._ring[position] = call
        self._next = position + 1 if position + 1 < len(self._ring) else 0

    def counts(self, now: float) -> Counts:  # noqa: ARG002
        """What the ring holds."""
        ring = self._ring
        both = ring.count(7)
        failed, slow = ring.count(5) + both, ring.count(3) + both
        self.troubled = bool(failed or slow)
        return Counts(len(ring) - ring.count(0), failed, slow)


class TimeWindow:
    """The calls that ended within the last ``seconds``, or up to a twentieth of it less."""

    def __init__(self, seconds: float) -> None:
        self._width = seconds / _BUCKETS
        self._buckets = [[0, 0, 0] for _ in range(_BUCKETS)]
        self._tick = -_BUCKETS
        self._current = self._buckets[0]
        self._current_ends = -math.inf
        self.troubled = False

    def succeed(self, now: float) -> None:
        """Counts a call that went well, and quickly, in the bucket of its end."""
        if now >= self._current_ends:
            self._turn(now)
        self._current[0] += 1

    def record(self, now: float, *, failed: bool, slow: bool) -> None:
        """Counts a call in the bucket of its end."""
        self.succeed(now)
        if failed or slow:
            self.troubled = True
            self._current[1] += failed
            self._current[2] += slow

    def counts(self, now: float) -> Counts:
        """What the buckets hold that are young enough."""
        if now >= self._current_ends:
            self._turn(now)
        calls, failed, slow = map(sum, zip(*self._buckets, strict=True))
        self.troubled = bool(failed or slow)
        return Counts(calls, failed, slow)

    def _turn(self, now: float) -> None:
        """Empties the buckets that have become too old, and begins the one of this moment."""
        tick = int(now / self._width)
        for each in range(max(self._tick + 1, tick - _BUCKETS + 1), tick + 1):
            self._current = self._buckets[each % _BUCKETS] = [0, 0, 0]
        self._tick = max(tick, self._tick)
        self._current_ends = (tick + 1) * self._width


class Throttle:
    """Client-side throttling: refuses with a probability that follows how many calls the service does not take.

    With the ``requests`` and ``accepts`` of the window: ``max(0, (requests - spared - k * accepts) / (requests + 1))``.
    A call counts where it *began*, and its success is added there. (Counted where they end, calls that hang would not
    be seen, and if a timeout is longer than the window, successes would meet none of their requests.) Calls that began
    a moment ago and have not ended do not count yet: they are no failures.

    Args:
        seconds: How long a call counts.
        k: How many calls are made for each one that is accepted.
        spared: So many failed calls are never a reason to refuse.
    """

    def __init__(self, seconds: float, *, k: float, spared: int) -> None:
        self._width = seconds / _BUCKETS
        self._k = k
        self._spared = spared
        # By tick: calls that began, ended, and were accepted.
        self._buckets: dict[int, list[int]] = {}
        self._tick = 0

    def begin(self, now: float) -> None:
        """Counts a call that begins."""
        self._bucket(int(now / self._width))[0] += 1

    def refuse(self, now: float) -> None:
        """Counts a call that was refused here: it says how much is wanted."""
        bucket = self._bucket(int(now / self._width))
        bucket[0] += 1
        bucket[1] += 1

    def end(self, began: float, *, accepted: bool) -> None:
        """Counts the end of a call that began then."""
        bucket = self._buckets.get(int(began / self._width))
        if bucket is not None:
            bucket[1] += 1
            bucket[2] += accepted

    def forget(self, began: float) -> None:
        """Takes a call back that says nothing."""
        bucket = self._buckets.get(int(began / self._width))
        if bucket is not None:
            bucket[0] -= 1

    def probability(self, now: float) -> float:
        """How likely the next call should be refused."""
        tick = int(now / self._width)
        self._bucket(tick)
        requests = accepts = 0
        for each, (began, ended, accepted) in self._buckets.items():
            requests += ended if each >= tick - 1 else began
            accepts += accepted
        return max(0.0, (requests - self._spared - self._k * accepts) / (requests + 1))

    def _bucket(self, tick: int) -> list[int]:
        bucket = self._buckets.get(tick)
        if bucket is None:
            if tick > self._tick:
                self._tick = tick
                for old in [each for each in self._buckets if each <= tick - _BUCKETS]:
                    del self._buckets[old]
            bucket = self._buckets[tick] = [0, 0, 0]
        return bucket
