"""Bulkheads around calls: who gets a place, who waits, who is refused."""

import asyncio

import pytest

from fastapi_hardening.core.call_deadline import within
from fastapi_hardening.core.events import Events
from fastapi_hardening.core.outbound import CallRefused
from fastapi_hardening.resilience.bulkhead import BulkheadFull, BulkheadOverflowed, BulkheadSettings, CallBulkhead


def bulkhead(places: int = 1, waiting: int = 0, seconds: float = 1.0) -> tuple[CallBulkhead, list[object]]:
    told: list[object] = []
    events = Events()
    events.subscribe(object, told.append)
    config = BulkheadSettings(max_concurrent=places, max_waiting=waiting, wait_seconds=seconds)
    return CallBulkhead("payments", config, events=events), told


def test_beyond_the_places_and_the_queue_a_call_is_refused() -> None:
    """It is not made; the refusal is a problem 503 that names no service."""
    calls = bulkhead(places=2, waiting=1)[0]
    made = 0

    async def call(done: asyncio.Event) -> None:
        nonlocal made
        made += 1
        await done.wait()

    async def run() -> list[object]:
        done = asyncio.Event()
        tasks = [asyncio.create_task(calls.call(call, done)) for _ in range(5)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert (made, calls.places.in_use, calls.places.waiting) == (2, 2, 1)
        done.set()
        return [type(each) for each in await asyncio.gather(*tasks, return_exceptions=True)]

    assert asyncio.run(run()).count(BulkheadFull) == 2
    assert made == 3
    assert calls.places.in_use == 0


def test_the_refusal_says_when_to_come_back() -> None:
    """As every refusal of a call, and the log learns which bulkhead it was."""
    full = BulkheadFull("payments", 2)
    assert isinstance(full, CallRefused)
    assert (full.status_code, full.slug, str(full)) == (
        503,
        "temporary-reduced-capacity",
        "the bulkhead of payments is full",
    )
    assert 2 <= int((full.headers or {})["Retry-After"]) <= 4
    assert "payments" not in str(full.document())


@pytest.mark.parametrize(("waiting", "why"), [(0, "queue"), (1, "wait")])
def test_a_refusal_is_told_with_its_reason(waiting: int, why: str) -> None:
    """The queue was full, or the wait was over."""
    calls, told = bulkhead(waiting=waiting, seconds=0.001)

    async def run() -> None:
        async with calls:
            with pytest.raises(BulkheadFull):
                async with calls:
                    pass

    asyncio.run(run())
    assert [(each.name, each.why) for each in told if isinstance(each, BulkheadOverflowed)] == [("payments", why)]


def test_nobody_waits_past_the_deadline_of_its_caller() -> None:
    """However long the bulkhead would let it wait."""
    calls = CallBulkhead("payments", BulkheadSettings(max_concurrent=1, wait_seconds=600))

    async def run() -> None:
        async with calls, within(60) as bound:
            assert bound._timeout is not None
            bound._timeout.reschedule(None)  # only the deadline is left of it
            async with within(0.001):
                with pytest.raises((BulkheadFull, TimeoutError)):
                    await calls.call(asyncio.sleep, 0)
                raise TimeoutError

    with pytest.raises(TimeoutError):
        asyncio.run(run())
    assert calls.places.in_use == 0


def test_it_is_a_decorator_of_asynchronous_functions() -> None:
    """A failure gives the place back; threads have a limit of their own."""
    calls = bulkhead()[0]

    @calls
    async def divide(number: int) -> float:
        """Divides."""
        return 1 / number

    assert asyncio.run(divide(2)) == 0.5
    with pytest.raises(ZeroDivisionError):
        asyncio.run(divide(0))
    assert (divide.__doc__, calls.places.in_use) == ("Divides.", 0)
    with pytest.raises(TypeError, match="not asynchronous"):
        calls(len)
