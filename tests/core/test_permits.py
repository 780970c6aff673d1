"""Permits: never more than there are, in the order of coming, and none is lost."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastapi_hardening.core.permits import Permits, PermitsExhausted

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    """Run on asyncio, as uvicorn does."""
    return "asyncio"


async def settle() -> None:
    """Lets every task go as far as it can."""
    for _ in range(5):
        await asyncio.sleep(0)


@given(
    st.integers(1, 3),
    st.integers(0, 3),
    st.lists(st.sampled_from(("come", "leave", "give up", "leave and give up")), max_size=40),
)
def test_whatever_happens_permits_are_kept_in_order(  # noqa: C901 - a model of everything that can happen
    most: int, max_queue: int, steps: list[str]
) -> None:
    """As in a model of two lists: who is in, and who waits."""

    async def run() -> None:
        permits = Permits(most, max_queue=max_queue)
        inside: list[asyncio.Task[None]] = []
        queue: list[asyncio.Task[None]] = []
        for step in steps:
            if step == "come":
                task = asyncio.create_task(permits.wait())
                await settle()
                if len(inside) < most:
                    assert task.done()
                    task.result()
                    inside.append(task)
                elif len(queue) < max_queue:
                    assert not task.done()
                    queue.append(task)
                else:
                    assert isinstance(task.exception(), PermitsExhausted)
            if step.startswith("leave") and inside:
                del inside[0]
                permits.give_back()
                if queue and step == "leave":
                    inside.append(queue.pop(0))
            if step.endswith("give up") and queue:
                # The first one is cancelled in the moment in which it may have been given a permit.
                queue.pop(0).cancel()
                await settle()
                if queue and len(inside) < most:
                    inside.append(queue.pop(0))
            await settle()
            assert (permits.in_use, permits.waiting) == (len(inside), len(queue))
            assert all(task.done() for task in inside)
        for task in queue:
            task.cancel()

    asyncio.run(run())


async def test_who_waits_too_long_is_told() -> None:
    """And takes no place any more."""
    permits = Permits(1, max_queue=1)
    assert permits.take()
    with pytest.raises(PermitsExhausted):
        await permits.wait(0.001)
    assert repr(permits) == "Permits(1 of 1 in use, 0 of 1 waiting)"


async def test_a_permit_is_given_on_past_those_that_have_left() -> None:
    """Whose task has been cancelled, and has not run since."""
    permits = Permits(1, max_queue=2)
    assert permits.take()
    waiting = [asyncio.create_task(permits.wait()) for _ in range(2)]
    await settle()
    waiting[0].cancel()
    permits.give_back()
    await settle()
    assert waiting[1].done()
    assert permits.in_use == 1
    permits.give_back()
    assert permits.in_use == 0
