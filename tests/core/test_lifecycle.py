"""Starting, serving, draining, and the signal in between."""

import asyncio
import signal

import pytest

from fastapi_hardening.core.clock import ManualClock
from fastapi_hardening.core.events import Events
from fastapi_hardening.core.lifecycle import ApplicationStarted, DrainStarted, Lifecycle


def has_started(lifecycle: Lifecycle) -> bool:
    return lifecycle.started


def test_a_process_without_start_up_work_has_started() -> None:
    """Servers that run no lifespan serve at once."""
    assert Lifecycle().started


def test_start_up_work_keeps_a_process_from_having_started() -> None:
    """All of it, by name; the last one done is told of."""
    events = Events()
    lifecycle = Lifecycle(events=events)
    lifecycle.begin("lifespan")
    with lifecycle.starting("warm the cache"):
        assert lifecycle.pending == ("lifespan", "warm the cache")
        lifecycle.finish("lifespan")
        assert not has_started(lifecycle)
        assert events.count(ApplicationStarted) == 0
    assert has_started(lifecycle)
    assert events.count(ApplicationStarted) == 1


def test_start_up_work_that_fails_is_not_done() -> None:
    """An application whose cache could not be warmed is not ready."""
    lifecycle = Lifecycle()
    with pytest.raises(RuntimeError), lifecycle.starting("warm the cache"):
        raise RuntimeError("no")
    assert not lifecycle.started


def test_draining_ends_in_refusing() -> None:
    """Up to the deadline requests are served; a second call does not move it."""
    clock, events = ManualClock(), Events()
    lifecycle = Lifecycle(drain_delay_seconds=5, drain_deadline_seconds=30, clock=clock, events=events)
    states = [(lifecycle.draining, lifecycle.past_deadline)]
    for seconds in (29, 1):
        lifecycle.drain()
        clock.advance(seconds)
        states.append((lifecycle.draining, lifecycle.past_deadline))
    assert states == [(False, False), (True, False), (True, True)]
    assert events.count(DrainStarted) == 1


def test_who_wants_to_know_is_called_when_draining_starts() -> None:
    """Once, when it is known at what time the server will be told to stop."""
    clock = ManualClock()
    lifecycle = Lifecycle(drain_delay_seconds=5, clock=clock)
    told: list[float] = []
    lifecycle.on_drain.append(lambda: told.append(lifecycle.stops_at))
    assert lifecycle.stops_at == float("inf")
    clock.advance(100)
    lifecycle.drain()
    lifecycle.drain()
    assert told == [105]


@pytest.fixture
def servers_handler() -> object:
    """A handler as a server installs one, which notes when it is called."""
    called: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: called.append(number))
    yield called
    signal.signal(signal.SIGTERM, before)


def test_sigterm_reaches_the_server_after_the_delay(servers_handler: list[int]) -> None:
    """First the readiness probe fails, then the server stops."""

    async def run() -> None:
        stopped = asyncio.Event()
        tell = signal.getsignal(signal.SIGTERM)
        assert callable(tell)

        def handler(number: int, frame: object) -> None:
            tell(number, None)
            stopped.set()

        signal.signal(signal.SIGTERM, handler)
        lifecycle = Lifecycle(drain_delay_seconds=0.01)
        with lifecycle.on_sigterm():
            signal.raise_signal(signal.SIGTERM)
            assert lifecycle.draining
            assert servers_handler == []
            async with asyncio.timeout(5):
                await stopped.wait()
        assert servers_handler == [signal.SIGTERM]

    asyncio.run(run())


def test_a_second_sigterm_reaches_the_server_at_once(servers_handler: list[int]) -> None:
    """Who asks twice does not want to wait."""

    async def run() -> None:
        clock = ManualClock()
        with Lifecycle(drain_delay_seconds=1000, clock=clock).on_sigterm():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            assert servers_handler == []  # one signal to a process group, heard twice
            clock.advance(1)
            signal.raise_signal(signal.SIGTERM)
            assert servers_handler == [signal.SIGTERM]
            await asyncio.sleep(0)

    asyncio.run(run())


def test_without_a_delay_sigterm_reaches_the_server_at_once(servers_handler: list[int]) -> None:
    """In development every saved file sends one."""

    async def run() -> None:
        with Lifecycle(drain_delay_seconds=0).on_sigterm():
            signal.raise_signal(signal.SIGTERM)
            assert servers_handler == [signal.SIGTERM]

    asyncio.run(run())


def test_the_servers_handler_is_put_back(servers_handler: list[int]) -> None:
    """Unless somebody else has installed one meanwhile."""
    original = signal.getsignal(signal.SIGTERM)

    async def run() -> None:
        with Lifecycle().on_sigterm():
            assert signal.getsignal(signal.SIGTERM) is not original
        assert signal.getsignal(signal.SIGTERM) is original
        with Lifecycle().on_sigterm():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN

    asyncio.run(run())


def test_an_ignored_sigterm_stays_ignored(servers_handler: list[int]) -> None:
    """The process drains, and nothing is called that does not exist."""

    async def run() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        lifecycle = Lifecycle()
        with lifecycle.on_sigterm():
            signal.raise_signal(signal.SIGTERM)
        assert lifecycle.draining

    asyncio.run(run())


def test_outside_the_main_thread_signals_are_left_alone(servers_handler: list[int]) -> None:
    """As under a test client, where Python forbids it."""
    original = signal.getsignal(signal.SIGTERM)

    async def lifespan() -> None:
        with Lifecycle().on_sigterm():
            assert signal.getsignal(signal.SIGTERM) is original

    async def run() -> None:
        await asyncio.to_thread(asyncio.run, lifespan())

    asyncio.run(run())
