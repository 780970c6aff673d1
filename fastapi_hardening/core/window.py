"""Counting against a limit, three ways, for any number of keys in bounded memory. Knows no HTTP.

* ``token-bucket``: the generic cell rate algorithm (GCRA, ITU-T I.371), one number a key. A burst of the whole quota
  may pass at once and the quota refills evenly, so up to twice the quota passes in the worst window.
* ``fixed-window``: one counter a window. Simple to explain; twice the quota may pass around the edge of two windows.
* ``sliding-window``: two counters, the earlier one weighted by how much of it is still in sight, which smooths that
  edge.

Whoever floods a limiter with keys must neither fill the memory nor have its debts forgotten. So keys live in
generations: an entry that was not touched for a whole lifetime of its state is as good as new and leaves with its
generation, a few at a time; nothing else ever leaves. When all places are taken by debtors, newcomers share one
strict key.

Example:
    >>> from fastapi_hardening.core.clock import ManualClock
    >>> limiter = Limiter(Limit("login", quota=2, window_seconds=60), clock=ManualClock())
    >>> [limiter.hit("203.0.113.9").allowed for _ in range(3)]
    [True, True, False]
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from limits import parse_many

from fastapi_hardening.core.clock import Clock, SystemClock

Strategy = Literal["token-bucket", "fixed-window", "sliding-window"]

OVERFLOW = "overflow"
"""The key that newcomers share when every place is taken by somebody who is in debt."""

# A sum of window fractions is not exact; a permit is not refused for the last bit of it.
_EPSILON = 1e-9


@dataclass(frozen=True, slots=True)
class Limit:
    """So many units in so many seconds.

    Attributes:
        name: What the policy is called to the client: printable ASCII.
        quota: The units.
        window_seconds: The window.
    """

    name: str
    quota: int
    window_seconds: int


class Decision(NamedTuple):
    """What a limiter says.

    Attributes:
        allowed: Whether the units may be spent.
        remaining: How many units are left.
        next_seconds: Until another unit is there; 0 when none is missing.
        retry_seconds: Until the same units could be spent; 0 when they may now, infinite when the quota is less.
        reset_seconds: Until the whole quota is there again.
    """

    allowed: bool
    remaining: int
    next_seconds: float
    retry_seconds: float
    reset_seconds: float


def parse_limits(text: str | tuple[str, ...] | list[str], name: str | None = None) -> tuple[Limit, ...]:
    """Limits as people write them: ``5/minute``, ``100 per hour``, ``10/2 minutes``, several with ``;`` or as a list.

    Args:
        text: The limits.
        name: What the policy is called; several are told apart by their text.

    Raises:
        ValueError: With what a limit looks like.
    """
    parts = [text] if isinstance(text, str) else list(text)
    found = []
    for part in parts:
        try:
            found += parse_many(part)
        except ValueError:
            raise ValueError(f"{part!r} is not a limit, such as '100/minute' or '10 per 2 hours; 50/day'") from None
    if not found or any(item.amount < 1 for item in found):
        raise ValueError(f"{text!r}: a limit lets at least one request pass; RateLimit.exempt lifts limits")
    texts = [f"{item.amount}/{item.multiples if item.multiples > 1 else ''}{item.GRANULARITY.name}" for item in found]
    names = [name] if name and len(found) == 1 else [f"{name} {each}" if name else each for each in texts]
    return tuple(Limit(n, item.amount, item.get_expiry()) for n, item in zip(names, found, strict=True))


class _Algorithm(Protocol):
    """How one key is counted; the state is whatever the algorithm makes of it."""

    lifetime_seconds: float

    def decide(self, state: Any, now: float, cost: int) -> tuple[Decision, Any]:
        """The decision, and the state if the units are spent."""
        ...


class TokenBucket:
    """GCRA: the state is the theoretical arrival time, when the bucket is full again."""

    __slots__ = ("_interval", "_quota", "_window", "lifetime_seconds")

    def __init__(self, limit: Limit) -> None:
        self._quota = limit.quota
        self._window = self.lifetime_seconds = float(limit.window_seconds)
        self._interval = self._window / limit.quota

    def decide(self, state: float | None, now: float, cost: int) -> tuple[Decision, float]:
        """Spends ``cost`` units if the arrival time stays within the window."""
        debt = 0.0 if state is None or state < now else state - now
        after = debt + self._interval * cost
        if after <= self._window + _EPSILON:
            return self._decision(True, after, 0.0), now + after  # noqa: FBT003
        retry = math.inf if cost > self._quota else after - self._window
        return self._decision(False, debt, retry), now + debt  # noqa: FBT003

    def _decision(self, allowed: bool, debt: float, retry: float) -> Decision:  # noqa: FBT001 - named ones cost more
        interval = self._interval
        remaining = int((self._window - debt) / interval + _EPSILON)
        following = debt - (self._quota - remaining - 1) * interval if debt else 0.0
        return Decision(allowed, remaining, max(0.0, following), retry, debt)


class FixedWindow:
    """The state is the number of the window and the units spent in it."""

    __slots__ = ("_quota", "_window", "lifetime_seconds")

    def __init__(self, limit: Limit) -> None:
        self._quota = limit.quota
        self._window = self.lifetime_seconds = float(limit.window_seconds)

    def decide(self, state: tuple[int, int] | None, now: float, cost: int) -> tuple[Decision, tuple[int, int]]:
        """Spends ``cost`` units if the window has them."""
        window = int(now // self._window)
        spent = state[1] if state is not None and state[0] == window else 0
        left = (window + 1) * self._window - now
        allowed = spent + cost <= self._quota
        if allowed:
            spent += cost
        retry = 0.0 if allowed else math.inf if cost > self._quota else left
        wait = left if spent else 0.0
        return Decision(allowed, self._quota - spent, wait, retry, wait), (window, spent)


class SlidingWindow:
    """The state is the number of the window, the units spent in the one before and in this one."""

    __slots__ = ("_quota", "_window", "lifetime_seconds")

    def __init__(self, limit: Limit) -> None:
        self._quota = limit.quota
        self._window = float(limit.window_seconds)
        self.lifetime_seconds = 2 * self._window

    def decide(
        self, state: tuple[int, int, int] | None, now: float, cost: int
    ) -> tuple[Decision, tuple[int, int, int]]:
        """Spends ``cost`` units if both windows, the earlier one in part, leave room for them."""
        window = int(now // self._window)
        before, spent = _carried(state, window)
        elapsed = now - window * self._window
        weighted = before * (1 - elapsed / self._window)
        allowed = weighted + spent + cost <= self._quota + _EPSILON
        if allowed:
            spent += cost
        remaining = max(0, int(self._quota - weighted - spent + _EPSILON))
        retry = 0.0 if allowed else self._wait(before, spent, elapsed, self._quota - cost)
        following = self._wait(before, spent, elapsed, self._quota - remaining - 1) if before or spent else 0.0
        reset = (2 * self._window if spent else self._window if before else elapsed) - elapsed
        return Decision(allowed, remaining, following, retry, reset), (window, before, spent)

    def _wait(self, before: int, spent: int, elapsed: float, room: int) -> float:
        """Seconds until both windows weigh no more than ``room``."""
        if room < 0:
            return math.inf
        if spent <= room:
            return max(0.0, self._window * (1 - (room - spent) / before) - elapsed) if before else 0.0
        return self._window - elapsed + self._window * (1 - room / spent)


def _carried(state: tuple[int, int, int] | None, window: int) -> tuple[int, int]:
    """The units of the window before and of this one, as the windows have moved on."""
    if state is None or state[0] < window - 1:
        return 0, 0
    return (state[1], state[2]) if state[0] == window else (state[2], 0)


_ALGORITHMS: dict[Strategy, type[TokenBucket] | type[FixedWindow] | type[SlidingWindow]] = {
    "token-bucket": TokenBucket,
    "fixed-window": FixedWindow,
    "sliding-window": SlidingWindow,
}


class Limiter:
    """One limit for many keys.

    Args:
        limit: The limit.
        strategy: How it is counted.
        max_keys: For how many keys there is a place.
        clock: Where the time comes from; should it go backwards, it stands still for the limiter.
    """

    _CLEARED = 2
    _CLEARED_WHEN_FULL = 16

    def __init__(
        self,
        limit: Limit,
        strategy: Strategy = "token-bucket",
        *,
        max_keys: int = 1_000_000,
        clock: Clock | None = None,
    ) -> None:
        self.limit = limit
        self._algorithm: _Algorithm = _ALGORITHMS[strategy](limit)
        self._max_keys = max_keys
        self._monotonic = (clock or SystemClock()).monotonic
        self._latest = -math.inf
        self._rotates_at = -math.inf
        self._young: dict[str, Any] = {}
        self._old: dict[str, Any] = {}
        # Untouched for a lifetime: as good as new, and cleared away a few at a time.
        self._gone: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return len(self._young) + len(self._old) + sum(map(len, self._gone))

    def hit(self, key: str, cost: int = 1) -> Decision:
        """Spends ``cost`` units of a key if it has them; a refusal spends nothing, and a cost of 0 only looks."""
        now = self._monotonic()
        if self._latest <= now < self._rotates_at:
            self._latest = now
        else:
            now = self._now()
        state = self._young.get(key)
        if state is None or self._gone:
            key, state = self._find(key, now)
        decision, state = self._algorithm.decide(state, now, cost)
        if decision.allowed and cost:
            self._young[key] = state
        return decision

    def peek(self, key: str, cost: int = 1) -> Decision:
        """What :meth:`hit` would say, without spending anything."""
        now = self._now()
        return self._algorithm.decide(self._find(key, now)[1], now, cost)[0]

    def _now(self) -> float:
        now = self._monotonic()
        if now < self._latest:
            return self._latest
        self._latest = now
        if now >= self._rotates_at:
            self._rotate(now)
        return now

    def _find(self, key: str, now: float) -> tuple[str, Any]:
        """The key that is counted, which is another one when all places are taken, and its state."""
        if self._gone:
            self._clear(self._CLEARED)
        state = self._young.get(key)
        if state is None:
            state = self._old.pop(key, None)
            if state is not None:
                self._young[key] = state
            elif key != OVERFLOW and len(self) >= self._max_keys and not self._make_room(now):
                return self._find(OVERFLOW, now)
        return key, state

    def _rotate(self, now: float) -> None:
        lifetime = self._algorithm.lifetime_seconds
        self._gone.append(self._old)
        self._old, self._young = self._young, {}
        if now >= self._rotates_at + lifetime:
            # Nothing was asked for a lifetime, so what was young has aged as well.
            self._gone.append(self._old)
            self._old = {}
        self._rotates_at = now + lifetime

    def _clear(self, entries: int) -> None:
        for _ in range(entries):
            while self._gone and not self._gone[-1]:
                self._gone.pop()
            if not self._gone:
                return
            self._gone[-1].popitem()

    def _make_room(self, now: float) -> bool:
        """Clears away what has expired among a few entries; what is in debt is kept."""
        self._clear(self._CLEARED_WHEN_FULL)
        for _ in range(min(self._CLEARED_WHEN_FULL, len(self._old))):
            key, state = self._old.popitem()
            if self._algorithm.decide(state, now, 0)[0].reset_seconds > 0:
                self._young[key] = state
        return len(self) < self._max_keys
