"""How much may be retried in all, as in Twitter's Finagle: a share of the calls, and a floor."""

import math

from fastapi_hardening.core.clock import Clock, SystemClock


class RetryBudget:
    """How many retries are allowed: a share of the calls of the last seconds, and a floor.

    Args:
        ratio: Retries for each call.
        per_second: Retries a second however few calls there are.
        seconds: How long the allowance of a call lasts.
        clock: Where the time comes from.

    Example:
        >>> budget = RetryBudget(ratio=0.5, per_second=0)
        >>> budget.deposit(), budget.deposit()
        (None, None)
        >>> budget.withdraw(), budget.withdraw()
        (True, False)
    """

    _BUCKETS = 10

    def __init__(
        self, ratio: float = 0.2, per_second: float = 10.0, seconds: float = 10.0, *, clock: Clock | None = None
    ) -> None:
        self._ratio = ratio
        self._reserve = per_second * seconds
        self._width = seconds / self._BUCKETS
        # Calls and retries by the tenth of the time in which they were.
        self._buckets = [[0, 0] for _ in range(self._BUCKETS)]
        self._current = self._buckets[0]
        self._tick = -self._BUCKETS
        self._ends = -math.inf
        self._now = (clock or SystemClock()).monotonic

    def deposit(self) -> None:
        """Counts a call."""
        now = self._now()
        if now >= self._ends:
            self._turn(now)
        self._current[0] += 1

    def withdraw(self) -> bool:
        """Takes one retry, if there is one left."""
        now = self._now()
        if now >= self._ends:
            self._turn(now)
        calls, retries = map(sum, zip(*self._buckets, strict=True))
        if self._reserve + calls * self._ratio - retries < 1 - 1e-9:
            return False
        self._current[1] += 1
        return True

    def _turn(self, now: float) -> None:
        tick = int(now / self._width)
        for each in range(max(self._tick + 1, tick - self._BUCKETS + 1), tick + 1):
            self._current = self._buckets[each % self._BUCKETS] = [0, 0]
        self._tick = max(tick, self._tick)
        self._ends = (tick + 1) * self._width
