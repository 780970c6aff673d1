"""The ways of counting, against naive models that keep every request, and the memory behind them."""

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastapi_hardening.core.clock import ManualClock
from fastapi_hardening.core.window import OVERFLOW, Limit, Limiter, Strategy, parse_limits

STRATEGIES: tuple[Strategy, ...] = ("token-bucket", "fixed-window", "sliding-window")
# A request after so many seconds, which may be negative, with so many units.
REQUESTS = st.lists(st.tuples(st.sampled_from([0, 0, 0.5, 1, 2.5, 7, 10, 25, -3]), st.integers(0, 6)), max_size=60)
QUOTA, WINDOW = 5, 10
Log = list[tuple[float, int]]


# --- naive models: they keep every request that passed ----------------------------------------------------------------


def bucket(log: Log, now: float, cost: int) -> bool:
    """Tokens poured in evenly, up to the quota, and taken out by each request."""
    tokens, at = float(QUOTA), 0.0
    for when, units in log:
        tokens = min(QUOTA, tokens + (when - at) * QUOTA / WINDOW) - units
        at = when
    return min(QUOTA, tokens + (now - at) * QUOTA / WINDOW) >= cost - 1e-6


def fixed(log: Log, now: float, cost: int) -> bool:
    """What was spent in the window of the clock."""
    return sum(units for when, units in log if when // WINDOW == now // WINDOW) + cost <= QUOTA


def sliding(log: Log, now: float, cost: int) -> bool:
    """This window whole, the one before by the part of it that is still in sight."""
    this = sum(units for when, units in log if when // WINDOW == now // WINDOW)
    before = sum(units for when, units in log if when // WINDOW == now // WINDOW - 1)
    return before * (1 - now % WINDOW / WINDOW) + this + cost <= QUOTA + 1e-6


MODELS: dict[Strategy, Callable[[Log, float, int], bool]] = {
    "token-bucket": bucket,
    "fixed-window": fixed,
    "sliding-window": sliding,
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(requests=REQUESTS)
def test_a_limiter_decides_like_the_model_that_forgets_nothing(
    strategy: Strategy, requests: list[tuple[float, int]]
) -> None:
    """Whatever the times and the costs; a clock that goes backwards stands still."""
    clock = ManualClock()
    limiter = Limiter(Limit("x", QUOTA, WINDOW), strategy, clock=clock)
    limiter.peek("k", 0)  # it has seen the clock at zero
    log: Log = []
    now = 0.0
    for seconds, cost in requests:
        clock.advance(seconds)
        now = max(now, clock.monotonic())
        expected = MODELS[strategy](log, now, cost)
        assert limiter.peek("k", cost).allowed == expected
        decision = limiter.hit("k", cost)
        assert decision.allowed == expected
        if expected:
            log.append((now, cost))


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(requests=REQUESTS)
def test_what_a_decision_foretells_comes_true(strategy: Strategy, requests: list[tuple[float, int]]) -> None:
    """What remains can be spent; after ``retry`` the same request passes, after ``next`` one more does, not earlier."""
    clock = ManualClock()
    limiter = Limiter(Limit("x", QUOTA, WINDOW), strategy, clock=clock)
    limiter.peek("k", 0)
    now = 0.0
    for seconds, cost in requests:
        clock.advance(seconds)
        now = max(now, clock.monotonic())
        decision = limiter.hit("k", cost)
        assert limiter.peek("k", decision.remaining).allowed
        assert not limiter.peek("k", decision.remaining + 1).allowed
        assert math.isinf(decision.retry_seconds) == (cost > QUOTA)
        assert (decision.retry_seconds == 0) == decision.allowed

    def after(wait: float, cost: int) -> bool:
        later = ManualClock(monotonic=now + wait)
        limiter._monotonic = later.monotonic
        limiter._latest = -math.inf
        return limiter.peek("k", cost).allowed

    decision = limiter.peek("k", QUOTA)
    if not decision.allowed:
        assert not after(decision.retry_seconds - 0.01, QUOTA)
        assert after(decision.retry_seconds + 0.0001, QUOTA)
    left = limiter.peek("k", 0)
    if left.remaining < QUOTA:
        assert left.next_seconds > 0
        assert after(left.next_seconds + 0.0001, left.remaining + 1)


# Volume, then what the answer says: remaining, reset, retry; written for a bucket of 4 a second, worked out by hand.
BUCKET = [
    (0.0, 5, (False, 4, 0.0, math.inf)),
    (0.0, 3, (True, 1, 0.75, 0.0)),
    (0.0, 2, (False, 1, 0.75, 0.25)),
    (0.25, 2, (True, 0, 1.0, 0.0)),
    (0.0, 1, (False, 0, 1.0, 0.25)),
    (0.5, 0, (True, 2, 0.5, 0.0)),
    (9.0, 4, (True, 0, 1.0, 0.0)),
]


def test_a_token_bucket_by_hand() -> None:
    """Burst, refill, a peek that costs nothing, and a volume that can never pass."""
    clock = ManualClock()
    limiter = Limiter(Limit("x", 4, 1), clock=clock)
    for wait, cost, (allowed, remaining, reset, retry) in BUCKET:
        clock.advance(wait)
        decision = limiter.hit("k", cost)
        assert (decision.allowed, decision.remaining) == (allowed, remaining)
        assert decision.reset_seconds == pytest.approx(reset)
        assert decision.retry_seconds == pytest.approx(retry)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_more_than_the_burst_and_the_refill_ever_pass(strategy: Strategy) -> None:
    """In any window at most twice the quota, as the documentation says of each."""
    clock = ManualClock()
    limiter = Limiter(Limit("x", QUOTA, WINDOW), strategy, clock=clock)
    passed = []
    for _ in range(400):
        clock.advance(0.25)
        if limiter.hit("k").allowed:
            passed.append(clock.monotonic())
    worst = max(sum(1 for each in passed if start <= each < start + WINDOW) for start in passed)
    assert worst <= 2 * QUOTA


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_keys_do_not_touch_each_other(strategy: Strategy) -> None:
    """One client's debt is nobody else's."""
    limiter = Limiter(Limit("x", 1, WINDOW), strategy, clock=ManualClock())
    assert limiter.hit("a").allowed
    assert not limiter.hit("a").allowed
    assert limiter.hit("b").allowed


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_flood_of_keys_neither_fills_the_memory_nor_forgives_a_debt(strategy: Strategy) -> None:
    """The places are taken by debtors; newcomers share one strict key."""
    limiter = Limiter(Limit("x", 1, WINDOW), strategy, max_keys=100, clock=ManualClock())
    assert limiter.hit("debtor").allowed
    allowed = [limiter.hit(f"flood {number}").allowed for number in range(1000)]
    assert len(limiter) <= 101
    assert allowed.count(True) == 99 + 1
    assert not limiter.hit("debtor").allowed
    assert not limiter.hit(OVERFLOW).allowed


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_when_the_flood_is_over_newcomers_have_places_again(strategy: Strategy) -> None:
    """What was not touched for a lifetime is as good as new."""
    clock = ManualClock()
    limiter = Limiter(Limit("x", 1, WINDOW), strategy, max_keys=100, clock=clock)
    for number in range(1000):
        limiter.hit(f"flood {number}")
    clock.advance(2 * WINDOW)
    assert all(limiter.hit(f"new {number}").allowed for number in range(90))
    assert len(limiter) <= 101


def test_what_has_expired_leaves_while_others_come() -> None:
    """Memory follows those who are in debt, not those who ever came."""
    clock = ManualClock()
    limiter = Limiter(Limit("x", 10, WINDOW), clock=clock)
    for number in range(5000):
        limiter.hit(f"{number}")
        clock.advance(0.1)
    # 10 seconds are 100 keys; two generations and what is being cleared away are some more.
    assert len(limiter) < 400


def test_a_key_that_keeps_coming_is_never_lost_in_the_change_of_generations() -> None:
    """Its state moves along."""
    clock = ManualClock()
    limiter = Limiter(Limit("x", 1000, WINDOW), clock=clock)
    spent = 0
    for _ in range(100):
        clock.advance(0.5)
        limiter.hit("regular", 60)
        spent = max(spent, 1000 - limiter.peek("regular", 0).remaining)
    assert spent > 900


# --- limits as people write them --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("5/minute", [Limit("5/minute", 5, 60)]),
        ("100 per hour", [Limit("100/hour", 100, 3600)]),
        ("10/2 minutes", [Limit("10/2minute", 10, 120)]),
        ("1/second; 50/day", [Limit("1/second", 1, 1), Limit("50/day", 50, 86400)]),
        (["1/second", "50/day"], [Limit("1/second", 1, 1), Limit("50/day", 50, 86400)]),
    ],
)
def test_limits_are_read_as_people_write_them(text: str, limits: list[Limit]) -> None:
    """The notation of the ``limits`` package."""
    assert list(parse_limits(text)) == limits


def test_a_policy_has_the_name_it_is_given() -> None:
    """Several of one name are told apart by their limit."""
    assert [limit.name for limit in parse_limits("5/minute", "login")] == ["login"]
    assert [limit.name for limit in parse_limits("1/second;9/day", "api")] == ["api 1/second", "api 9/day"]


@pytest.mark.parametrize("text", ["", "many", "5", "5/fortnight", "0/minute", "-1/minute", []])
def test_what_is_no_limit_is_refused(text: str | list[str]) -> None:
    """The sentence shows what one looks like."""
    with pytest.raises(ValueError, match="limit"):
        parse_limits(text)
