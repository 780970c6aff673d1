"""Many who want the same make one call."""

import asyncio

import pytest

from fastapi_hardening.core.single_flight import FlightCancelled, SingleFlight


class Slow:
    """A call that ends when the test says so."""

    def __init__(self) -> None:
        self.calls = 0
        self.begun = asyncio.Event()
        self.may_end = asyncio.Event()

    async def __call__(self) -> int:
        self.calls += 1
        self.begun.set()
        await self.may_end.wait()
        return self.calls


def test_a_thousand_at_once_make_one_call() -> None:
    """And each has its result; the next one after that makes another."""

    async def together() -> tuple[set[int], int, int]:
        flights: SingleFlight[int] = SingleFlight()
        slow = Slow()
        waiting = [asyncio.create_task(flights.run("k", slow)) for _ in range(1000)]
        await slow.begun.wait()
        assert flights.under_way("k")
        slow.may_end.set()
        results = set(await asyncio.gather(*waiting))
        return results, slow.calls, await flights.run("k", slow)

    assert asyncio.run(together()) == ({1}, 1, 2)


def test_who_began_may_be_cancelled() -> None:
    """The others are answered all the same, by the same call."""

    async def cancelled() -> tuple[bool, int, int, int]:
        flights: SingleFlight[int] = SingleFlight()
        slow = Slow()
        first, second = (asyncio.create_task(flights.run("k", slow)) for _ in range(2))
        await slow.begun.wait()
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        slow.may_end.set()
        return first.cancelled(), await second, slow.calls, len(flights)

    assert asyncio.run(cancelled()) == (True, 1, 1, 0)


def test_an_exception_is_for_everybody_who_waits() -> None:
    """And is not remembered."""

    async def failing() -> list[str]:
        flights: SingleFlight[int] = SingleFlight()
        calls = 0

        async def fails() -> int:
            nonlocal calls
            calls += 1
            raise OSError(f"call {calls}")

        said = await asyncio.gather(*(flights.run("k", fails) for _ in range(2)), return_exceptions=True)
        said += await asyncio.gather(flights.run("k", fails), return_exceptions=True)
        return [str(each) for each in said]

    assert asyncio.run(failing()) == ["call 1", "call 1", "call 2"]


def test_a_call_that_is_cancelled_from_elsewhere_cancels_nobody() -> None:
    """Who waits was not cancelled, so no CancelledError says that he was."""

    async def ended() -> int:
        flights: SingleFlight[int] = SingleFlight()
        slow = Slow()
        waiting = asyncio.create_task(flights.run("k", slow))
        await slow.begun.wait()
        flights.cancel_all()
        with pytest.raises(FlightCancelled):
            await waiting
        return len(flights)

    assert asyncio.run(ended()) == 0


def test_a_call_that_was_forgotten_is_not_the_current_one() -> None:
    """Who asks then makes a call of his own; who waited keeps his."""

    async def forgotten() -> list[object]:
        flights: SingleFlight[object] = SingleFlight()
        go = asyncio.Event()

        async def tells() -> bool:
            await go.wait()
            return flights.is_current("k")

        first = flights.start("k", tells)
        await asyncio.sleep(0)
        flights.forget("k")
        second = flights.start("k", tells)
        go.set()
        return [first is second, await first, await second]

    assert asyncio.run(forgotten()) == [False, False, True]


def test_an_event_loop_that_has_ended_keeps_nobody_waiting() -> None:
    """A call that it left behind is not waited for in the next one."""
    flights: SingleFlight[int] = SingleFlight()

    async def forever() -> int:
        await asyncio.Event().wait()
        return 0

    loop = asyncio.new_event_loop()
    try:
        loop.call_soon(lambda: flights.start("k", forever))
        loop.call_soon(loop.stop)
        loop.run_forever()

        async def one() -> int:
            return 1

        async def next_loop() -> int:
            assert not flights.under_way("k")
            flights.cancel_all()
            return await flights.run("k", one)

        assert asyncio.run(next_loop()) == 1
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
