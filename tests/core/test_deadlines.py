"""Deadlines of one length: called in their order, once, and never when they are cancelled."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastapi_hardening.core.clock import ManualClock
from fastapi_hardening.core.deadlines import DeadlineQueue

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    """Run on asyncio, as uvicorn does."""
    return "asyncio"


@given(st.lists(st.sampled_from(("add", "cancel first", "cancel last", "advance")), max_size=40))
def test_what_is_not_cancelled_is_called_when_its_time_has_come(steps: list[str]) -> None:
    """In the order in which it was set, and nothing before."""

    async def run() -> None:
        clock, called = ManualClock(), list[int]()
        queue = DeadlineQueue(10.0, clock)
        kept = {}
        for number, step in enumerate(steps):
            if step == "add":
                kept[number] = queue.add(lambda number=number: called.append(number))  # type: ignore[misc]
            elif step == "advance":
                clock.advance(3)
                queue._ring()
            elif waiting := [each for each, entry in kept.items() if entry.call is not None]:
                kept.pop(waiting[0 if step == "cancel first" else -1]).cancel()
        due = [each for each, entry in kept.items() if entry.at <= clock.monotonic()]
        assert called == due
        clock.advance(10)
        queue._ring()
        assert called == list(kept)
        assert len(queue) == 0

    asyncio.run(run())


async def test_the_timer_is_the_loops() -> None:
    """It is set for the first deadline, and again for the next one."""
    rung = [asyncio.Event(), asyncio.Event()]
    queue = DeadlineQueue(0.002)
    for event in rung:
        queue.add(event.set)
        await asyncio.sleep(0)
    await rung[1].wait()
    assert rung[0].is_set()
    assert len(queue) == 0


async def test_what_was_cancelled_takes_no_place() -> None:
    """As soon as the next one is set, if nothing is in front of it."""
    queue = DeadlineQueue(30.0, ManualClock())
    for _ in range(100):
        queue.add(lambda: None).cancel()
    assert len(queue) == 1
    first = queue.add(lambda: None)
    for _ in range(3):
        queue.add(lambda: None).cancel()
    assert len(queue) == 4
    first.cancel()
    queue.add(lambda: None)
    assert len(queue) == 1


def test_a_queue_ends_with_its_loop() -> None:
    """So that nobody keeps it."""

    async def make() -> DeadlineQueue:
        queue = DeadlineQueue(30.0)
        assert not queue.is_closed
        return queue

    assert asyncio.run(make()).is_closed
