"""Places: so many at once, a fair queue, and none lost however one leaves."""

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastapi_hardening.core.concurrency import NoRoomError, Places


def test_the_longest_waiting_is_next_and_nobody_overtakes() -> None:
    """Not whoever asks in the moment in which a place becomes free."""
    order: list[int] = []

    async def run() -> None:
        places = Places(1, max_waiting=3)
        assert places.take_now()

        async def come(number: int) -> None:
            await places.take()
            order.append(number)
            places.give_back()

        tasks = [asyncio.create_task(come(number)) for number in range(3)]
        await asyncio.sleep(0)
        assert (places.in_use, places.waiting) == (1, 3)
        with pytest.raises(NoRoomError):
            await places.take()
        places.give_back()
        assert not places.take_now(), "the place is somebody's already"
        await asyncio.gather(*tasks)
        assert (places.in_use, places.waiting) == (0, 0)

    asyncio.run(run())
    assert order == [0, 1, 2]


def test_who_gives_up_leaves_the_queue() -> None:
    """By time or by cancellation; also in the very moment in which it is given a place."""

    async def run() -> None:
        places = Places(1, max_waiting=5)
        await places.take()
        with pytest.raises(TimeoutError):
            await places.take(0.001)
        assert (places.in_use, places.waiting, len(places._queue)) == (1, 0, 0)
        waiting = [asyncio.create_task(places.take()) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[1].cancel()
        await asyncio.sleep(0)
        assert places.waiting == 2
        places.give_back()
        waiting[0].cancel()
        await asyncio.wait(waiting)
        assert not waiting[2].cancelled()
        assert (places.in_use, places.waiting) == (1, 0)

    asyncio.run(run())


def test_a_place_is_not_given_to_who_has_just_gone() -> None:
    """But to the next, though the one who has gone has not had its turn yet."""

    async def run() -> None:
        places = Places(1, max_waiting=2)
        await places.take()
        gone, following = (asyncio.create_task(places.take()) for _ in range(2))
        await asyncio.sleep(0)
        gone.cancel()
        places.give_back()
        assert places.waiting == 0
        await following
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert places.in_use == 1

    asyncio.run(run())


@pytest.mark.parametrize(("most", "max_waiting"), [(0, 1), (1, -1)])
def test_numbers_that_make_no_sense_are_refused(most: int, max_waiting: int) -> None:
    """No place at all, or fewer than nobody who waits."""
    with pytest.raises(ValueError, match="at least one place"):
        Places(most, max_waiting=max_waiting)


@given(st.integers(1, 4), st.integers(0, 4), st.integers(0, 2**32))
@settings(max_examples=25)
def test_no_place_is_lost_or_given_twice(most: int, max_waiting: int, seed: int) -> None:
    """Whoever comes, waits, is cancelled or refused, in whatever order."""
    chance = random.Random(seed)
    inside = peak = 0

    async def come(places: Places) -> None:
        nonlocal inside, peak
        await places.take()
        inside += 1
        peak = max(peak, inside)
        try:
            for _ in range(chance.randrange(4)):
                await asyncio.sleep(0)
        finally:
            inside -= 1
            places.give_back()

    async def run() -> Places:
        places = Places(most, max_waiting=max_waiting)
        tasks: list[asyncio.Task[None]] = []
        for _ in range(60):
            if chance.random() < 0.6:
                tasks.append(asyncio.create_task(come(places)))
            elif tasks:
                chance.choice(tasks).cancel()
            if chance.random() < 0.5:
                await asyncio.sleep(0)
            assert places.waiting <= max_waiting
        await asyncio.gather(*tasks, return_exceptions=True)
        return places

    places = asyncio.run(run())
    assert peak <= most
    assert (places.in_use, places.waiting, inside) == (0, 0, 0)
    assert len(places._queue) == 0
