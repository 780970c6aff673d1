"""Circuit breakers: when they open, what they let through, who hears of it, and what other workers are told."""

import asyncio
import contextlib
import logging
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI, HTTPException
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fastapi_hardening import Settings, harden
from fastapi_hardening.core.clock import ManualClock
from fastapi_hardening.core.events import Events
from fastapi_hardening.core.outbound import CallRefused, status_of
from fastapi_hardening.core.store import MemoryStore
from fastapi_hardening.resilience.circuit_breaker import (
    CircuitBreaker,
    CircuitBreakers,
    CircuitBreakerSettings,
    CircuitBreakersSettings,
    CircuitClosed,
    CircuitForced,
    CircuitHalfOpened,
    CircuitOpen,
    CircuitOpened,
)
from fastapi_hardening.resilience.circuit_breaker.window import CountWindow, Throttle, TimeWindow


class DownError(Exception):
    """What a service raises that does not work."""


class Kit:
    """A breaker whose clock is moved by hand."""

    def __init__(self, **changes: Any) -> None:
        self.clock = ManualClock()
        self.events = Events()
        self.told: list[object] = []
        self.events.subscribe(object, self.told.append)
        self.breaker = CircuitBreaker(
            "payments", CircuitBreakerSettings(**changes), events=self.events, clock=self.clock
        )

    def call(self, outcome: str = "ok", seconds: float = 0.0) -> bool:
        """One call that ends so; whether it was let through."""
        breaker = self.breaker
        try:
            permit = breaker.acquire()
        except CircuitOpen:
            self.clock.advance(seconds)
            return False
        started = self.clock.monotonic()
        self.clock.advance(seconds)
        breaker.end(permit, started, {"ok": None, "err": DownError(), "cancel": asyncio.CancelledError()}[outcome])
        return True

    def calls(self, *outcomes: str) -> list[str]:
        """The state after each of these calls."""
        states: list[str] = []
        for outcome in outcomes:
            assert self.call(outcome)
            states.append(self.breaker.state)
        return states

    def opened(self) -> "Kit":
        while self.breaker.state == "closed":
            self.call("err")
        return self

    def half_opened(self) -> "Kit":
        self.opened().clock.advance(self.breaker.seconds_left)
        assert self.breaker.state == "half-open"
        return self


# --- when it opens ----------------------------------------------------------------------------------------------------


def test_below_the_minimum_of_calls_there_is_no_rate() -> None:
    """Three failures of three are nothing yet."""
    kit = Kit(minimum_calls=4)
    assert kit.calls("err", "err", "err") == ["closed"] * 3
    assert kit.breaker.snapshot().failure_rate is None
    assert kit.calls("ok") == ["open"]


def test_the_call_that_completes_the_minimum_decides_even_if_it_succeeds() -> None:
    """Because the rate is known from then on."""
    kit = Kit(minimum_calls=5, failure_rate=0.6, window="count")
    assert kit.calls("err", "err", "err", "ok", "ok") == ["closed"] * 4 + ["open"]
    [opened] = [event for event in kit.told if isinstance(event, CircuitOpened)]
    assert (opened.name, opened.seconds, opened.counts) == ("payments", 30.0, (5, 3, 0))


@pytest.mark.parametrize("window", ["time", "count"])
def test_a_rate_that_is_exactly_the_threshold_opens(window: str) -> None:
    """7 of 100 are 7 %, also for a computer."""
    kit = Kit(minimum_calls=100, failure_rate=0.07, window=window)
    assert kit.calls(*["err"] * 7, *["ok"] * 93)[-2:] == ["closed", "open"]
    kit = Kit(minimum_calls=100, failure_rate=0.07, window=window)
    assert kit.calls(*["err"] * 6, *["ok"] * 94)[-1] == "closed"


def test_slow_calls_open_it_though_they_succeed() -> None:
    """A service that hangs is worse than one that fails at once."""
    kit = Kit(minimum_calls=4, slow_call_seconds=4, slow_call_rate=0.5)
    for seconds in (5, 0.1, 4, 5):
        assert kit.call("ok", seconds)
    assert kit.breaker.state == "open"
    quick = Kit(minimum_calls=4, slow_call_seconds=4, slow_call_rate=0.5)
    assert all(quick.call("ok", 4) for _ in range(9))
    assert quick.breaker.state == "closed"


def test_a_window_by_time_forgets_what_is_old() -> None:
    """Failures of a minute ago say nothing about now."""
    kit = Kit(minimum_calls=2, window_seconds=20)
    kit.calls("err")
    kit.clock.advance(20)
    kit.calls("ok", "ok")
    snapshot = kit.breaker.snapshot()
    assert (snapshot.calls, snapshot.failure_rate, snapshot.state) == (2, 0.0, "closed")


def test_a_window_by_count_forgets_all_but_the_last() -> None:
    """However long they take to come."""
    kit = Kit(minimum_calls=2, window="count", window_calls=4, failure_rate=0.6)
    kit.calls("err")
    kit.clock.advance(10_000)
    kit.calls("ok", "ok", "ok")
    assert kit.breaker.snapshot().failure_rate == 0.25
    kit.calls("ok")
    assert kit.breaker.snapshot().failure_rate == 0.0
    assert kit.calls("err", "err", "err") == ["closed", "closed", "open"]


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.floats(0, 3)), max_size=60), st.integers(1, 8))
@settings(max_examples=40)
def test_windows_count_what_a_list_would_count(calls: list[tuple[bool, bool, float]], size: int) -> None:
    """The one exactly, the other up to the width of one bucket."""
    by_count, by_time = CountWindow(size), TimeWindow(20.0)
    now = 0.0
    ended: list[tuple[float, bool, bool]] = []
    for failed, slow, pause in calls:
        now += pause
        ended.append((now, failed, slow))
        for window in (by_count, by_time):
            window.record(now, failed=failed, slow=slow)
        last = ended[-size:]
        assert by_count.counts(now) == (len(last), sum(f for _, f, _ in last), sum(s for _, _, s in last))
        young = [each for each in ended if each[0] > now - 19]
        counts = by_time.counts(now)
        assert len(young) <= counts.calls <= len([each for each in ended if each[0] > now - 20])
        assert by_time.troubled == (counts.failed + counts.slow > 0)


# --- what does not count ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "counts"),
    [
        (DownError(), True),
        (TimeoutError(), True),
        (HTTPException(500), True),
        (HTTPException(404), False),
        (HTTPException(429), True),
        (HTTPException(408), False),
        (KeyError("an argument"), False),
        (CallRefused("not now", seconds_left=1), False),
        (CircuitOpen("inner", 1), False),
        (asyncio.CancelledError(), False),
        (KeyboardInterrupt(), False),
    ],
    ids=repr,
)
def test_only_failures_of_the_service_count(error: BaseException, counts: bool) -> None:
    """Not refusals of ours, nor cancelled calls, nor what the caller did wrong."""
    config = CircuitBreakerSettings(minimum_calls=1, counted_statuses=(429,))
    breaker = CircuitBreaker("payments", config, ignore=(KeyError,))

    async def fail() -> None:
        raise error

    with pytest.raises(type(error)):
        drive(breaker.call(fail))
    assert breaker.state == ("open" if counts else "closed")
    snapshot = breaker.snapshot()
    assert (snapshot.failed, snapshot.ignored) == (int(counts), int(not counts))


def drive(coroutine: Any) -> Any:
    """Runs what never waits, without a loop that would swallow what ends it."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("it waited")


def test_a_status_is_found_where_clients_put_it() -> None:
    """On the exception, or on its response."""

    class Answer:
        status_code = 502

    class AnswerError(Exception):
        response = Answer()

    assert [status_of(each) for each in (AnswerError(), HTTPException(404), DownError())] == [502, 404, None]


def test_a_result_can_be_a_failure() -> None:
    """Such as an answer 500, for clients that raise nothing."""
    breaker = CircuitBreaker("stock", CircuitBreakerSettings(minimum_calls=2), is_failure=lambda status: status >= 500)

    async def answer(status: int) -> int:
        return status

    assert [drive(breaker.call(answer, status)) for status in (200, 503)] == [200, 503]
    assert breaker.state == "open"


def test_a_judgement_that_fails_gives_the_permit_back() -> None:
    """Its error is the application's, and says nothing about the service."""
    breaker = CircuitBreaker("stock", is_failure=lambda result: result.nonsense)
    with pytest.raises(AttributeError):
        breaker.call_sync(dict)
    assert breaker.snapshot().ignored == 1


# --- open and half-open -----------------------------------------------------------------------------------------------


def test_open_refuses_and_says_for_how_long() -> None:
    """A refusal is a problem 503, with the time left."""
    kit = Kit(minimum_calls=1, open_seconds=10).opened()
    kit.clock.advance(4)
    with pytest.raises(CircuitOpen) as refused:
        kit.breaker.acquire()
    assert (refused.value.status_code, refused.value.seconds_left, refused.value.slug) == (503, 6.0, "circuit-open")
    assert 6 <= int((refused.value.headers or {})["Retry-After"]) <= 12
    assert str(refused.value) == "the circuit of payments is open for 6 s"
    assert "payments" not in str(refused.value.document()), "a client learns no names"
    assert kit.breaker.snapshot().refused == 1


def test_half_open_lets_exactly_the_permitted_trials_through() -> None:
    """However many ask at once."""
    kit = Kit(minimum_calls=1, half_open_calls=4).half_opened()
    permits = 0
    for _ in range(50):
        try:
            kit.breaker.acquire()
        except CircuitOpen:
            continue
        permits += 1
    assert permits == 4


def test_threads_get_no_more_permits_either() -> None:
    """The count is exact between threads too."""
    kit = Kit(minimum_calls=1, half_open_calls=7).half_opened()
    got: list[int] = []

    def ask() -> None:
        for _ in range(50):
            with contextlib.suppress(CircuitOpen):
                got.append(kit.breaker.acquire())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 7


def test_a_trial_that_says_nothing_gives_its_permit_back() -> None:
    """Else cancelled trials would keep the circuit half-open for ever."""
    kit = Kit(minimum_calls=1, half_open_calls=2).half_opened()
    assert [kit.call("cancel") for _ in range(5)] == [True] * 5
    assert kit.calls("ok", "ok") == ["half-open", "closed"]


def test_trials_close_it_or_open_it_for_longer() -> None:
    """Each time twice as long, up to the longest; closed, it begins anew."""
    kit = Kit(minimum_calls=1, half_open_calls=2, open_seconds=10, longest_open_seconds=30)
    lengths: list[float] = []
    for _ in range(4):
        kit.half_opened() if lengths else kit.opened()
        while kit.breaker.state == "half-open":
            kit.call("err")
        lengths.append(kit.breaker.seconds_left)
    assert lengths == [10, 20, 30, 30]
    kit.half_opened().calls("ok", "ok")
    assert kit.opened().breaker.seconds_left == 10
    kinds = [type(event) for event in kit.told]
    assert kinds.count(CircuitHalfOpened) == 4
    assert kinds.count(CircuitClosed) == 1


def test_it_opens_as_soon_as_the_other_trials_cannot_help() -> None:
    """Two failures of four are half, whatever the other two do."""
    kit = Kit(minimum_calls=1, half_open_calls=4).half_opened()
    assert kit.calls("ok", "err", "err") == ["half-open", "half-open", "open"]


def test_slow_trials_open_it_too() -> None:
    """A service that answers after the patience of its callers has not recovered."""
    kit = Kit(minimum_calls=1, half_open_calls=2, slow_call_seconds=1, slow_call_rate=0.5).half_opened()
    kit.call("ok", 2)
    assert kit.breaker.state == "open"


def test_trials_that_never_end_open_it_after_the_longest_wait() -> None:
    """And without a longest wait it waits."""
    kit = Kit(minimum_calls=1, half_open_calls=1, longest_half_open_seconds=60).half_opened()
    kit.breaker.acquire()
    kit.clock.advance(60)
    assert kit.breaker.state == "open"
    patient = Kit(minimum_calls=1, half_open_calls=1, longest_half_open_seconds=None).half_opened()
    patient.breaker.acquire()
    patient.clock.advance(1e9)
    assert patient.breaker.state == "half-open"


def test_a_call_that_began_in_an_earlier_state_does_not_decide_in_this_one() -> None:
    """A late failure must not spoil the trials, nor a late release add one."""
    kit = Kit(minimum_calls=1, half_open_calls=1)
    late, lost = kit.breaker.acquire(), kit.breaker.acquire()
    kit.half_opened()
    kit.breaker.record(late, 0.0, failed=True)
    kit.breaker.release(lost, 0.0)
    assert kit.breaker.state == "half-open"
    assert kit.breaker.acquire()
    with pytest.raises(CircuitOpen):
        kit.breaker.acquire()


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_forced_open_refuses_until_the_reset() -> None:
    """Time does not change it."""
    kit = Kit()
    kit.breaker.force_open()
    kit.clock.advance(1e9)
    assert not kit.call()
    assert kit.breaker.seconds_left == math.inf
    kit.breaker.reset()
    assert kit.call()
    assert kit.told == [CircuitForced("payments", "forced-open"), CircuitForced("payments", "closed")]


def test_disabled_lets_everything_through_and_counts_nothing() -> None:
    """So nothing is left of it after the reset."""
    kit = Kit(minimum_calls=1)
    kit.breaker.disable()
    assert kit.calls(*["err"] * 20)[-1] == "disabled"
    assert kit.breaker.snapshot().calls == 0


def test_only_measuring_tells_once_that_it_would_open(caplog: pytest.LogCaptureFixture) -> None:
    """And refuses nothing; to try settings out."""
    kit = Kit(minimum_calls=1)
    kit.breaker.only_measure()
    with caplog.at_level(logging.WARNING):
        assert kit.calls(*["err"] * 5)[-1] == "metrics-only"
    assert caplog.text.count("would open") == 1
    assert kit.breaker.snapshot().failure_rate == 1.0


# --- throttle ---------------------------------------------------------------------------------------------------------


def test_the_throttle_is_the_formula_of_the_book() -> None:
    """No refusal while one of two calls is accepted, then by what is missing."""
    throttle = Throttle(120, k=2, spared=0)
    for number in range(100):
        throttle.begin(0.0)
        throttle.end(0.0, accepted=number < 50)
    assert throttle.probability(30.0) == 0.0
    for _ in range(100):
        throttle.refuse(1.0)
    assert throttle.probability(30.0) == pytest.approx(100 / 201)
    assert throttle.probability(121.0) == 0.0, "the window is over"


def test_calls_that_hang_are_seen_before_they_end() -> None:
    """Counted only where they end, they would not be, and a service that hangs would never be spared."""
    throttle = Throttle(20, k=2, spared=0)
    for _ in range(10):
        throttle.begin(0.0)
    assert throttle.probability(0.5) == 0.0, "they have just begun"
    assert throttle.probability(3.0) == pytest.approx(10 / 11)
    throttle.end(0.0, accepted=True)
    throttle.forget(0.0)
    assert throttle.probability(3.0) == pytest.approx((9 - 2) / 10)


def test_a_success_after_its_window_counts_nowhere() -> None:
    """Its request does not count there either: a timeout longer than the window gives no credit."""
    throttle = Throttle(20, k=2, spared=0)
    throttle.begin(0.0)
    throttle.begin(30.0)
    throttle.end(0.0, accepted=True)
    throttle.forget(0.0)
    assert throttle.probability(35.0) == pytest.approx(1 / 2)


def test_a_throttle_refuses_most_calls_of_a_dead_service_and_recovers() -> None:
    """One a second is let through whatever happens, so it sees the service come back."""
    kit = Kit(mode="throttle", minimum_calls=5, window_seconds=120)
    down = [kit.call("err", 0.1) for _ in range(1000)]
    assert all(down[:5])
    assert 80 < sum(down) < 300
    assert kit.breaker.state == "closed"
    up = [kit.call("ok", 0.1) for _ in range(4000)]
    assert all(up[-100:])
    kit.call("cancel")
    assert all(kit.call("ok") for _ in range(10))


# --- ways to use it ---------------------------------------------------------------------------------------------------


def test_every_way_to_use_it_counts() -> None:
    """Call, decorator and block, asynchronous or not."""
    breaker = CircuitBreaker("stock")

    @breaker
    async def reading(number: int) -> int:
        """Reads."""
        return number

    @breaker
    def reading_sync(number: int) -> int:
        return number

    async def everything() -> list[int]:
        async with breaker.guard() as block:
            block.failed()
        return [await reading(1), reading_sync(2), await breaker.call(reading, 3)]

    assert asyncio.run(everything()) == [1, 2, 3]
    with pytest.raises(DownError), breaker.guard():
        raise DownError
    assert reading.__doc__ == "Reads."
    snapshot = breaker.snapshot()
    assert (snapshot.succeeded, snapshot.failed) == (4, 2)
    with pytest.raises(DownError):
        breaker.call_sync(_fail)
    assert breaker.snapshot().failed == 3


def _fail() -> None:
    raise DownError


@pytest.mark.parametrize("window", ["time", "count"])
def test_calls_that_succeed_are_counted_in_every_state(window: str) -> None:
    """Also by the short way that most of them take."""
    kit = Kit(window=window, minimum_calls=2, failure_rate=0.5, half_open_calls=1, slow_call_seconds=1)
    breaker = kit.breaker

    async def succeed(seconds: float = 0) -> None:
        kit.clock.advance(seconds)

    def calls() -> int:
        return breaker.snapshot().calls

    drive(breaker.call(succeed))
    with breaker.guard():
        pass
    assert calls() == 2
    kit.calls("err")
    drive(breaker.call(succeed, 2))
    assert (calls(), breaker.snapshot().slow_call_rate) == (4, 0.25)
    kit.half_opened()
    drive(breaker.call(succeed))
    assert breaker.state == "closed"
    breaker.disable()
    drive(breaker.call(succeed))
    assert calls() == 0
    assert breaker.snapshot().succeeded == 5


def test_a_throttle_takes_back_what_says_nothing() -> None:
    """A cancelled call is no request that the service has not accepted."""
    kit = Kit(mode="throttle", minimum_calls=1)
    assert [kit.call("cancel") for _ in range(100)] == [True] * 100
    kit.breaker.release(-1, 0.0)
    assert kit.breaker._throttle is not None
    assert kit.breaker._throttle.probability(kit.clock.monotonic()) == 0.0


def test_a_function_that_has_not_happened_yet_is_no_success() -> None:
    """A coroutine in place of a result, or a generator, is refused loudly."""
    breaker = CircuitBreaker("stock")

    async def reading() -> None: ...

    loop = asyncio.new_event_loop()
    waiting = loop.create_future()
    with pytest.raises(TypeError, match="use call"):
        _ = breaker.call_sync(reading)
    with pytest.raises(TypeError, match="use call"):
        _ = breaker.call_sync(lambda: waiting)
    loop.close()
    with pytest.raises(TypeError, match="guard"):

        @breaker
        def rows() -> Any:
            yield 1

    assert breaker.snapshot().succeeded == 0


def test_a_cancelled_task_gives_its_permit_back() -> None:
    """A client that goes away in the middle of a trial."""
    kit = Kit(minimum_calls=1, half_open_calls=1).half_opened()

    async def go_away() -> None:
        task = asyncio.create_task(kit.breaker.call(asyncio.Event().wait))
        await asyncio.sleep(0)
        assert not kit.call()
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(go_away())
    assert kit.calls("ok") == ["closed"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"window": "count", "window_calls": 5}, "could never open"),
        ({"open_seconds": 400}, "below open_seconds"),
        ({"counted_statuses": (500,)}, "from 400 to 499"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], sentence: str) -> None:
    """With the sentence that mends them."""
    with pytest.raises(ValidationError, match=sentence):
        CircuitBreakerSettings(**changes)


# --- registry ---------------------------------------------------------------------------------------------------------


def test_breakers_are_made_once_with_the_settings_of_their_name() -> None:
    """The general ones, and what is different for it."""
    breakers = CircuitBreakers(
        CircuitBreakersSettings(open_seconds=10, named={"payments": CircuitBreakerSettings(failure_rate=0.2)})
    )
    payments, stock = breakers.get("payments"), breakers.get("stock")
    assert breakers.get("payments") is payments is breakers["payments"]
    assert [(each.settings.open_seconds, each.settings.failure_rate) for each in (payments, stock)] == [
        (10, 0.2),
        (10, 0.5),
    ]
    assert "stock" in breakers
    assert len(breakers) == 2
    assert [snapshot.name for snapshot in breakers.list()] == ["payments", "stock"]
    with pytest.raises(ValueError, match="already"):
        breakers.add("stock")
    with pytest.raises(KeyError, match="did you mean 'payments'"):
        breakers["paiments"]


def test_settings_of_single_breakers_come_from_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Key by key, from arguments and the environment at once, and are told with their source."""
    monkeypatch.setenv("HARDENING_CIRCUIT_BREAKER__NAMED__PAYMENTS__OPEN_SECONDS", "7")
    config = Settings(_env_file=None, circuit_breaker={"named": {"payments": {"failure_rate": 0.1}}})
    payments = config.circuit_breaker.of("payments")
    assert (payments.open_seconds, payments.failure_rate) == (7, 0.1)
    told = {value.key: value.source for value in config.describe()}
    assert (
        "HARDENING_CIRCUIT_BREAKER__NAMED__PAYMENTS__OPEN_SECONDS"
        in told["circuit_breaker.named.payments.open_seconds"]
    )
    with pytest.raises(ValueError, match=r"circuit_breaker\.named\.payments\.open_second: unknown key"):
        Settings(_env_file=None, circuit_breaker={"named": {"payments": {"open_second": 1}}})
    with pytest.raises(ValueError, match="takes keys of its own, not int"):
        Settings(_env_file=None, circuit_breaker={"named": {"payments": 5}})


def test_switched_off_they_let_everything_through() -> None:
    """And warn of nothing."""
    breakers = CircuitBreakers(CircuitBreakersSettings(enabled=False, minimum_calls=1))
    breaker = breakers.get("payments")
    for _ in range(20):
        with pytest.raises(DownError), breaker.guard():
            raise DownError
    assert (breaker.state, breakers.check().status) == ("disabled", "pass")


class Workers:
    """Two workers that share a store."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.store = MemoryStore(clock=self.clock)
        config = CircuitBreakersSettings(minimum_calls=1, open_seconds=10)
        self.one, self.other = (CircuitBreakers(config, clock=self.clock, store=self.store) for _ in range(2))
        self.mine, self.theirs = self.one.get("payments"), self.other.get("payments")

    def exchange(self) -> None:
        for workers in (self.one, self.other, self.one):
            asyncio.run(workers.exchange())


def test_a_circuit_that_opens_opens_in_other_workers_too() -> None:
    """For as long; then each tries for itself."""
    workers = Workers()
    workers.mine.record(workers.mine.acquire(), 0.0, failed=True)
    workers.clock.advance(4)
    workers.exchange()
    assert (workers.theirs.state, workers.theirs.seconds_left) == ("open", 6)
    workers.clock.advance(6)
    workers.exchange()
    assert workers.theirs.state == workers.mine.state == "half-open"


def test_an_opening_that_is_known_opens_nothing_again() -> None:
    """A worker whose trials went well stays closed, though another one's circuit is open still."""
    workers = Workers()

    def trials(breaker: CircuitBreaker, *, failed: bool) -> str:
        for _ in range(3 if failed else 5):
            breaker.record(breaker.acquire(), workers.clock.monotonic(), failed=failed)
        return breaker.state

    workers.mine.record(workers.mine.acquire(), 0.0, failed=True)
    workers.exchange()
    workers.clock.advance(10)
    assert [workers.mine.state, workers.theirs.state] == ["half-open", "half-open"]
    assert trials(workers.mine, failed=True) == "open"
    workers.exchange()
    assert trials(workers.theirs, failed=False) == "closed"
    workers.exchange()
    assert [workers.mine.state, workers.theirs.state] == ["open", "closed"]


def test_workers_share_a_real_store(state_url: str, prefix: str) -> None:
    """Over Redis or Valkey, in two applications of one service."""
    settings = Settings(_env_file=None, state_url=state_url, service_name=prefix, circuit_breaker={"minimum_calls": 1})
    one, other = (harden(FastAPI(), settings) for _ in range(2))
    mine, theirs = (handle.breakers.get("payments") for handle in (one, other))

    async def tell() -> None:
        mine.record(mine.acquire(), 0.0, failed=True)
        await one.breakers.exchange()
        await other.breakers.exchange()
        for handle in (one, other):
            await handle.store.close()

    asyncio.run(tell())
    assert theirs.state == "open"
    assert 25 < theirs.seconds_left <= 30


@pytest.mark.parametrize(
    ("by_hand", "state"),
    [
        (CircuitBreaker.force_open, "forced-open"),
        (CircuitBreaker.disable, "disabled"),
        (CircuitBreaker.only_measure, "metrics-only"),
    ],
)
def test_what_is_done_by_hand_is_done_in_every_worker_once(
    by_hand: Callable[[CircuitBreaker], None], state: str
) -> None:
    """And undone there, by whichever worker."""
    workers = Workers()
    by_hand(workers.mine)
    workers.exchange()
    assert workers.theirs.state == state
    workers.clock.advance(1)
    workers.theirs.reset()
    workers.exchange()
    workers.exchange()
    assert workers.mine.state == workers.theirs.state == "closed"


def test_without_the_store_each_worker_decides_for_itself(caplog: pytest.LogCaptureFixture) -> None:
    """What could not be told is told later."""
    workers = Workers()

    class Gone(MemoryStore):
        async def put(self, key: str, value: bytes, ttl_seconds: float) -> bool:
            raise ConnectionError("no store")

    workers.one._store = Gone()
    workers.mine.force_open()
    for _ in range(3):
        asyncio.run(workers.one.exchange())
    assert caplog.text.count("could not be exchanged") == 1
    workers.one._store = workers.store
    workers.exchange()
    assert workers.theirs.state == "forced-open"
    asyncio.run(CircuitBreakers().exchange())


def test_workers_tell_each_other_while_the_application_runs() -> None:
    """In the background, until it ends."""
    store = MemoryStore()
    config = CircuitBreakersSettings(sync_seconds=0.001)
    one, other = (CircuitBreakers(config, store=store) for _ in range(2))
    one.get("payments").force_open()
    breaker = other.get("payments")
    heard = asyncio.Event()
    other._events.subscribe(CircuitForced, lambda _: heard.set())

    async def both() -> None:
        async with one.sharing(), other.sharing(), asyncio.timeout(5):
            await heard.wait()

    asyncio.run(both())
    assert breaker.state == "forced-open"


# --- in an application ------------------------------------------------------------------------------------------------


def test_an_application_answers_503_warns_and_measures() -> None:
    """The endpoint raises, the client gets a problem, health and metrics tell which service it is."""
    clock = ManualClock()
    app = FastAPI()
    handle = harden(
        app, Settings(_env_file=None, circuit_breaker={"minimum_calls": 2}, health={"details": "always"}), clock=clock
    )
    assert "hardening_circuit" not in handle.metrics.expose().decode()
    payments = handle.breakers.get("payments")

    @app.get("/pay")
    async def pay() -> None:
        async with payments.guard():
            raise HTTPException(502)

    with TestClient(app) as client:
        answers = [client.get("/pay") for _ in range(3)]
        health = client.get("/health").json()
        metrics = handle.metrics.expose().decode()
    assert [answer.status_code for answer in answers] == [502, 502, 503]
    assert answers[-1].json()["type"].endswith("/problems/#circuit-open")
    assert 30 <= int(answers[-1].headers["retry-after"]) <= 60
    assert health["status"] == "warn"
    assert health["checks"]["circuit_breakers"][0]["output"] == "payments is open"
    assert 'hardening_circuit_state{circuit="payments"} 2.0' in metrics
    assert 'hardening_circuit_calls_total{circuit="payments",outcome="refused"} 1.0' in metrics
    clock.advance(30)
    assert payments.state == "half-open"
    handle.breakers["payments"].reset()
    assert 'hardening_circuit_state{circuit="payments"} 0.0' in handle.metrics.expose().decode()
    assert handle.breakers.check().status == "pass"
