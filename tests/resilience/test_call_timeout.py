"""Timeouts around calls: what is ended, what is told, and what is not ours to tell."""

import asyncio

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from fastapi_hardening.core.call_deadline import remaining
from fastapi_hardening.core.events import Events
from fastapi_hardening.resilience.call_timeout import CallTimedOut, CallTimeout, CallWasTooLong
from fastapi_hardening.resilience.retry import is_transient


def test_a_call_that_takes_too_long_is_cancelled() -> None:
    """What it waited for too; who waits gets an error that is both a timeout and a problem."""
    events = Events()
    told: list[object] = []
    events.subscribe(object, told.append)
    timeout = CallTimeout("payments", 0.001, events=events)
    ended = []

    @timeout
    async def pay() -> None:
        """Pays."""
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.append(True)
            raise

    with pytest.raises(CallTimedOut) as error:
        asyncio.run(pay())
    assert ended == [True]
    assert told == [CallWasTooLong("payments", 0.001)]
    assert str(error.value) == "payments has not answered within 0.001 s"
    assert is_transient(error.value, statuses=())
    assert pay.__doc__ == "Pays."


def test_a_timeout_of_the_call_itself_is_not_ours() -> None:
    """It is raised as it is."""

    async def fail() -> None:
        raise TimeoutError("of the client")

    with pytest.raises(TimeoutError, match="of the client"):
        asyncio.run(CallTimeout("payments", 60).call(fail))


def test_what_is_further_in_sees_what_is_left() -> None:
    """And after the call there is no deadline any more."""

    async def look() -> float | None:
        return remaining()

    async def run() -> tuple[float | None, float | None]:
        return await CallTimeout("payments", 60).call(look), remaining()

    left, after = asyncio.run(run())
    assert left is not None
    assert 59 < left <= 60
    assert after is None


def test_a_client_gets_504() -> None:
    """Without the name of the service, also in an application that was never hardened."""
    app = FastAPI()

    @app.get("/pay")
    async def pay() -> None:
        async with CallTimeout("payments", 0.001).guard():
            await asyncio.Event().wait()

    answer = TestClient(app).get("/pay")
    assert answer.status_code == 504
    assert "payments" not in answer.text


def test_mistakes_are_found_where_they_are_made() -> None:
    """No time at all, or a function that cannot be ended."""
    with pytest.raises(ValueError, match="some seconds"):
        CallTimeout("payments", 0)
    with pytest.raises(TypeError, match="cannot be ended"):
        CallTimeout("payments", 1)(len)
