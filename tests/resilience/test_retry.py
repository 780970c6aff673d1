"""Retries: what is tried again, after how long, how often, and when a budget or a deadline says no."""

import asyncio
import gc
import logging
import socket
from email.utils import formatdate
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI, HTTPException
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from starlette.responses import Response

from fastapi_hardening import Settings, harden
from fastapi_hardening.core.call_deadline import within
from fastapi_hardening.core.clock import ManualClock
from fastapi_hardening.core.events import Events
from fastapi_hardening.core.outbound import CallRefused, is_repeatable
from fastapi_hardening.resilience.retry import (
    Retries,
    RetriesSettings,
    Retry,
    RetryBudget,
    RetryGivenUp,
    RetryScheduled,
    RetrySettings,
    is_transient,
    retry_after_of,
)


class Kit:
    """A policy whose waits move the clock, and a function that gives one outcome after the other."""

    def __init__(self, *outcomes: Any, **options: Any) -> None:
        self.clock = ManualClock()
        self.outcomes = list(outcomes)
        self.calls = 0
        self.waits: list[float] = []
        self.told: list[Any] = []
        events = Events()
        events.subscribe(object, self.told.append)
        names = RetrySettings.model_fields
        changes = {key: value for key, value in options.items() if key in names}
        others = {key: value for key, value in options.items() if key not in names}
        self.retry = Retry(
            "payments",
            RetrySettings(**changes),
            events=events,
            clock=self.clock,
            sleep=self.sleep,
            sleep_sync=self.sleep_sync,
            **others,
        )

    def sleep_sync(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.clock.advance(seconds)

    async def sleep(self, seconds: float) -> None:
        self.sleep_sync(seconds)

    def function_sync(self, *args: Any) -> Any:
        self.calls += 1
        outcome = self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    async def function(self, *args: Any) -> Any:
        return self.function_sync(*args)

    def run(self) -> Any:
        return asyncio.run(self.retry.call(self.function, 1))


LOST = ConnectionResetError("lost")


# --- what is tried again ----------------------------------------------------------------------------------------------


def test_what_fails_for_the_moment_is_tried_again() -> None:
    """Until it works, and what it returns is returned."""
    kit = Kit(LOST, TimeoutError(), "paid")
    assert kit.run() == "paid"
    assert kit.calls == 3
    assert kit.told == [
        RetryScheduled("payments", 1, kit.waits[0], "ConnectionResetError"),
        RetryScheduled("payments", 2, kit.waits[1], "TimeoutError"),
    ]


def test_the_last_error_is_raised_as_it_is() -> None:
    """Not wrapped: whoever catches it need not know that there were several."""
    errors = [ConnectionResetError(str(number)) for number in range(3)]
    kit = Kit(*errors)
    with pytest.raises(ConnectionResetError, match="2"):
        kit.run()
    assert kit.calls == 3
    assert kit.told[-1] == RetryGivenUp("payments", 3, "attempts", "ConnectionResetError")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("ours"),
        HTTPException(404),
        HTTPException(500),
        CallRefused("not now", seconds_left=1),
        asyncio.CancelledError(),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
def test_what_another_attempt_cannot_help_is_raised_at_once(error: BaseException) -> None:
    """Mistakes of the caller, refusals of ours, and the end of the caller himself; even if it is asked for."""
    kit = Kit(error)
    with pytest.raises(type(error)):
        drive(kit.retry.call(kit.function))
    everything = Kit(error, on=lambda _: True)
    if not isinstance(error, (ValueError, HTTPException)) or isinstance(error, CallRefused):
        with pytest.raises(type(error)):
            drive(everything.retry.call(everything.function))
        assert everything.calls == 1
    assert (kit.calls, kit.told) == (1, [])


def drive(coroutine: Any) -> Any:
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("it waited")


def test_a_cancelled_wait_ends_the_retries() -> None:
    """A client that goes away is not called for."""
    kit = Kit(LOST)

    async def for_ever(_seconds: float) -> None:
        await asyncio.Event().wait()

    kit.retry._attempts._sleep = for_ever

    async def go_away() -> None:
        task = asyncio.create_task(kit.retry.call(kit.function))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(go_away())
    assert kit.calls == 1


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (socket.gaierror(), True),
        (FileNotFoundError(), False),
        (HTTPException(503), True),
        (HTTPException(429), True),
        (httpx2.ConnectError("refused"), True),
        (httpx2.ReadTimeout("slow"), True),
        (httpx2.InvalidURL("no url"), False),
        (httpx2.HTTPStatusError("", request=httpx2.Request("GET", "http://a"), response=httpx2.Response(502)), True),
        (httpx2.HTTPStatusError("", request=httpx2.Request("GET", "http://a"), response=httpx2.Response(400)), False),
    ],
    ids=repr,
)
def test_what_may_pass_by_itself(error: Exception, transient: bool) -> None:
    """Connections, timeouts, and some answers, also as the usual client raises them."""
    assert is_transient(error) is transient


def test_the_exceptions_can_be_named() -> None:
    """And then no others are tried again."""
    assert Kit(KeyError(), "found", on=(KeyError,)).run() == "found"
    kit = Kit(LOST, on=(KeyError,))
    with pytest.raises(ConnectionResetError):
        kit.run()
    assert kit.calls == 1


def test_an_answer_can_be_worth_another_attempt() -> None:
    """For clients that raise nothing; the last one is returned."""

    def bad(status: int) -> bool:
        return status >= 500

    assert Kit(503, 200, is_failure=bad).run() == 200
    kit = Kit(503, 502, 500, is_failure=bad)
    assert kit.run() == 500
    assert kit.told[-1] == RetryGivenUp("payments", 3, "attempts", "int")
    assert Kit(LOST, 503, 200, is_failure=bad).run() == 200


def test_methods_that_may_not_happen_twice() -> None:
    """But for an Idempotency-Key, whatever the case of its letters."""
    assert [is_repeatable(method) for method in ("GET", "put", "DELETE", "POST", "PATCH")] == [True] * 3 + [False] * 2
    assert is_repeatable("POST", {"idempotency-key": "7"})
    assert not is_repeatable("POST", {"Accept": "*/*"})


# --- how long it waits ------------------------------------------------------------------------------------------------


def test_waits_are_random_and_grow_up_to_the_longest() -> None:
    """Full jitter: anything from nothing to the bound."""
    waits: list[list[float]] = [[], [], [], []]
    for _ in range(60):
        kit = Kit(LOST, attempts=5, backoff_seconds=1, longest_backoff_seconds=3)
        with pytest.raises(ConnectionResetError):
            kit.run()
        for each, wait in zip(waits, kit.waits, strict=True):
            each.append(wait)
    for each, bound in zip(waits, (1, 2, 3, 3), strict=True):
        assert 0 <= min(each) < bound / 4
        assert bound * 3 / 4 < max(each) <= bound


def refusal(value: str | None) -> HTTPException:
    return HTTPException(503, headers=None if value is None else {"Retry-After": value})


@pytest.mark.parametrize(
    ("value", "waited"), [("3", 3.0), ("86400", 10.0), (formatdate(1_700_000_004, usegmt=True), 4.0)]
)
def test_retry_after_is_waited_for_up_to_a_bound(value: str, waited: float) -> None:
    """In seconds or as a date."""
    kit = Kit(refusal(value), "paid")
    assert kit.run() == "paid"
    assert kit.waits == [waited]


@pytest.mark.parametrize("value", ["soon", "-5", "0", None, formatdate(1_600_000_000, usegmt=True)])
def test_a_retry_after_that_says_nothing_shortens_no_wait(value: str | None) -> None:
    """The jitter is waited for then."""
    kit = Kit(refusal(value), "paid")
    assert kit.run() == "paid"
    assert 0 <= kit.waits[0] <= 0.1


def test_retry_after_is_found_on_answers() -> None:
    """Those of clients, and those that an exception carries."""
    answer = httpx2.Response(503, headers={"retry-after": "2"})
    error = httpx2.HTTPStatusError("", request=httpx2.Request("GET", "http://a"), response=answer)
    found = [answer, error, Response(headers={"Retry-After": "2"}), 503]
    assert [retry_after_of(each, 0.0) for each in found] == [2, 2, 2, None]


@given(st.text(st.characters(codec="ascii"), max_size=30))
@settings(max_examples=50)
def test_no_retry_after_is_a_mistake(value: str) -> None:
    """Whatever a service writes there, it is a time or nothing."""
    told = retry_after_of(HTTPException(503, headers={"Retry-After": value}), 1_700_000_000.0)
    assert told is None or told >= 0


# --- how much in all --------------------------------------------------------------------------------------------------


def test_the_load_on_a_dead_service_is_bounded() -> None:
    """A fifth more than the calls, and the floor; not three times as much."""
    kit = Kit(LOST, budget_per_second=1, backoff_seconds=0.001, longest_backoff_seconds=0.001)
    for _ in range(1000):
        with pytest.raises(ConnectionResetError):
            drive(kit.retry.call(kit.function))
        kit.clock.advance(0.01)
    seconds = kit.clock.monotonic()
    assert kit.calls <= 1000 * 1.2 + seconds + 10
    assert kit.calls >= 1000 * 1.15
    assert {told.why for told in kit.told if isinstance(told, RetryGivenUp)} == {"budget", "attempts"}


def test_what_a_budget_has_expires() -> None:
    """A busy hour does not pay for a storm in the next one."""
    clock = ManualClock()
    budget = RetryBudget(0.2, 0, 10, clock=clock)
    for _ in range(1000):
        budget.deposit()
    clock.advance(10)
    assert not budget.withdraw()
    clock.advance(10)
    for _ in range(5):
        budget.deposit()
    assert [budget.withdraw(), budget.withdraw()] == [True, False]


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 4)), max_size=80))
@settings(max_examples=30)
def test_a_budget_never_gives_more_than_its_share(steps: list[tuple[bool, float]]) -> None:
    """In no ten seconds."""
    clock = ManualClock()
    budget = RetryBudget(0.5, 0.1, 10, clock=clock)
    calls: list[float] = []
    given: list[float] = []
    for retry, pause in steps:
        clock.advance(pause)
        now = clock.monotonic()
        if retry:
            if budget.withdraw():
                given.append(now)
        else:
            budget.deposit()
            calls.append(now)
        within_window = len([each for each in given if each > now - 9])
        assert within_window <= 1 + 0.5 * len([each for each in calls if each > now - 20])


def test_policies_may_share_a_budget() -> None:
    """Two ways to one service are one load."""
    budget = RetryBudget(0, 0.1, 10)
    one, other = Kit(LOST, budget=budget), Kit(LOST, budget=budget)
    for kit in (one, other):
        with pytest.raises(ConnectionResetError):
            kit.run()
    assert (one.calls, other.calls) == (2, 1)
    assert other.told == [RetryGivenUp("payments", 1, "budget", "ConnectionResetError")]


def test_it_never_sleeps_past_the_deadline_of_its_caller() -> None:
    """It raises what it has, at once."""
    kit = Kit(refusal("5"), "paid")

    async def bounded() -> Any:
        async with within(4):
            return await kit.retry.call(kit.function)

    with pytest.raises(HTTPException):
        asyncio.run(bounded())
    assert kit.waits == []
    assert kit.told == [RetryGivenUp("payments", 1, "deadline", "HTTPException")]
    assert kit.retry.budget._current[1] == 0, "what is not tried costs nothing"


# --- ways to use it ---------------------------------------------------------------------------------------------------


def test_it_is_a_decorator_asynchronous_or_not() -> None:
    """And knows what it may not be put around."""
    kit = Kit(LOST, "a", ConnectionResetError(), "b")

    @kit.retry
    async def call(number: int) -> Any:
        """Calls."""
        return await kit.function(number)

    @kit.retry
    def call_sync(number: int) -> Any:
        return kit.function_sync(number)

    assert (asyncio.run(call(1)), call_sync(2), call_sync(3)) == ("a", "b", "b")
    assert call.__doc__ == "Calls."
    with pytest.raises(TypeError, match="generator"):

        @kit.retry
        def rows() -> Any:
            yield 1


def test_it_does_the_same_in_a_thread() -> None:
    """Mistakes at once, answers that are failures, the last error."""
    with pytest.raises(ValueError, match="ours"):
        Kit().retry.call_sync(Kit(ValueError("ours")).function_sync)
    assert run_sync(Kit(503, 200, is_failure=lambda status: status == 503)) == 200
    kit = Kit(LOST)
    with pytest.raises(ConnectionResetError):
        run_sync(kit)
    assert (kit.calls, len(kit.waits)) == (3, 2)


def run_sync(kit: Kit) -> Any:
    return kit.retry.call_sync(kit.function_sync)


def test_concurrent_calls_do_not_mix() -> None:
    """Fifty at once, each with its own failures, each gets its own answer."""
    kit = Kit(None, budget_per_second=100)
    failed: set[int] = set()

    async def answer(number: int) -> int:
        await asyncio.sleep(0)
        if number not in failed:
            failed.add(number)
            raise ConnectionResetError
        return number

    async def everybody() -> list[int]:
        return await asyncio.gather(*(kit.retry.call(answer, number) for number in range(50)))

    assert asyncio.run(everybody()) == list(range(50))


def test_a_success_leaves_nothing_for_the_collector() -> None:
    """No cycle of references for each call."""
    kit = Kit("paid")

    async def many() -> None:
        for _ in range(100):
            await kit.retry.call(kit.function)

    asyncio.run(many())
    gc.collect()
    asyncio.run(many())
    assert gc.collect() < 100


# --- by name ----------------------------------------------------------------------------------------------------------


def test_policies_have_the_settings_of_their_name() -> None:
    """And are made once; switched off, every call is made once."""
    retries = Retries(RetriesSettings(attempts=5, named={"payments": RetrySettings(budget_ratio=0.1)}))
    payments = retries.get("payments")
    assert retries.get("payments") is payments
    assert (payments.settings.attempts, payments.settings.budget_ratio) == (5, 0.1)
    assert [retry.name for retry in retries] == ["payments"]
    with pytest.raises(ValueError, match="already"):
        retries.add("payments")
    off = Retries(RetriesSettings(enabled=False)).add("stock", on=(KeyError,))
    assert off.settings.attempts == 1
    with pytest.raises(ValidationError, match="below backoff_seconds"):
        RetrySettings(longest_backoff_seconds=0.01)


def test_an_application_counts_them(caplog: pytest.LogCaptureFixture) -> None:
    """By policy and outcome; the log says which attempt failed with what."""
    handle = harden(FastAPI(), Settings(_env_file=None, retry={"backoff_seconds": 0.001, "attempts": 2}))
    assert "hardening_retries" not in handle.metrics.expose().decode()
    kit = Kit(LOST)
    with caplog.at_level(logging.INFO), pytest.raises(ConnectionResetError):
        asyncio.run(handle.retries.get("payments").call(kit.function))
    assert "payments: attempt 1 failed with ConnectionResetError" in caplog.text
    metrics = handle.metrics.expose().decode()
    assert 'hardening_retries_total{outcome="scheduled",policy="payments"} 1.0' in metrics
    assert 'hardening_retries_total{outcome="attempts",policy="payments"} 1.0' in metrics
    assert handle.retries.get("stock").name == "stock"
