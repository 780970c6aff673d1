"""The monitor says which requests are slow, and what blocked the event loop."""

import asyncio
import gc
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from fastapi_hardening import Settings, harden
from fastapi_hardening.core.clock import ManualClock
from fastapi_hardening.core.events import Events
from fastapi_hardening.core.load import Load
from fastapi_hardening.performance.monitor import (
    OTHER,
    LoopBlocked,
    Monitor,
    MonitorSettings,
    Sketch,
    Watcher,
    max_open_files,
    open_files,
    resident_bytes,
)


def scope() -> dict[str, Any]:
    return {"type": "http", "client": None, "headers": []}


def record(monitor: Monitor, seconds: float, route: str = "/", now: float = 0.0, trace_id: int = 0) -> str:
    """Records a request; gives its id."""
    a_scope = scope()
    monitor.record("GET", route, seconds, now, (a_scope, 200, trace_id))
    context = a_scope.get("fastapi_hardening.context")
    return "" if context is None else context.request_id


# --- times ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(2e-5, 3000), min_size=1, max_size=50), st.sampled_from((0.0, 0.5, 0.95, 0.99, 1.0)))
@settings(max_examples=60)
def test_quantile_is_right_within_five_percent(times: list[float], share: float) -> None:
    """Whatever the times are, a quantile is one of them, or within 5 % of it."""
    sketch = Sketch()
    for seconds in times:
        sketch.add(seconds)
    exact = sorted(times)[math.floor(share * (len(times) - 1))]
    assert abs(sketch.quantile(share) - exact) <= 0.051 * exact


def test_sketch_takes_any_time() -> None:
    """None at all, a clock that stands still, and a stream of a day are counted too."""
    sketch = Sketch()
    assert sketch.quantile(0.5) == 0
    for seconds in (0.0, -1.0, 86_400.0):
        sketch.add(seconds)
    assert (sketch.total, sketch.longest) == (3, 86_400.0)
    assert sketch.quantile(0) < 1e-4
    assert sketch.quantile(1) > 3000


def test_slowest_requests_of_each_route_are_kept() -> None:
    """So many as the settings say, with id and trace, the slowest first; no route hides another."""
    monitor = Monitor(MonitorSettings(slowest=2), clock=ManualClock())
    ids = [record(monitor, seconds, trace_id=int(seconds)) for seconds in (1, 5, 3, 2, 4)]
    record(monitor, 0.1, route="/fast")
    slowest = monitor.snapshot().slowest
    assert [(each.seconds, each.route) for each in slowest] == [(5, "/"), (4, "/"), (0.1, "/fast")]
    assert [each.request_id for each in slowest[:2]] == [ids[1], ids[4]]
    assert ids[3] == ""  # of a request that is not among them nothing is made
    assert (slowest[0].trace_id, slowest[2].trace_id) == (f"{5:032x}", None)


def test_what_is_long_ago_is_forgotten() -> None:
    """The window and the one before it are shown, and nothing older."""
    clock = ManualClock()
    monitor = Monitor(MonitorSettings(window_seconds=10), clock=clock)
    record(monitor, 1.0, "/first", now=clock.monotonic())
    clock.advance(12)
    record(monitor, 2.0, "/second", now=clock.monotonic())
    assert [each.route for each in monitor.snapshot().routes] == ["/second", "/first"]
    clock.advance(12)
    assert [each.route for each in monitor.snapshot().routes] == ["/second"]
    clock.advance(30)
    assert monitor.snapshot().routes == ()


def test_routes_are_bounded() -> None:
    """What comes after the last one that is told apart is one route."""
    monitor = Monitor(MonitorSettings(max_routes=2), clock=ManualClock())
    for number in range(5):
        record(monitor, 0.1, f"/{number}")
    assert {each.route: each.requests for each in monitor.snapshot().routes} == {"/0": 1, "/1": 1, OTHER: 3}


# --- what blocks ------------------------------------------------------------------------------------------------------


def elsewhere(function: Callable[[], None]) -> None:
    """Calls a function in another thread, and waits for it as code does that blocks."""
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


class Loop:
    """An event loop of this thread that is late by as much as the clock is moved."""

    def __init__(self, **settings: Any) -> None:
        self.clock, self.load, self.events = ManualClock(), Load(), Events()
        self.monitor = Monitor(MonitorSettings(**settings), load=self.load, events=self.events, clock=self.clock)
        self.blocks: list[LoopBlocked] = []
        self.events.subscribe(LoopBlocked, self.blocks.append)

    def look(self, delay: float = 0.0) -> None:
        self.monitor.watcher._thread_id = threading.get_ident()
        for told in self.load.on_look:
            told(self.clock.monotonic() + 0.02, delay)

    def check_late(self, seconds: float) -> None:
        self.clock.advance(seconds)
        elsewhere(self.monitor.watcher.check)


def test_what_blocks_is_named_with_its_request() -> None:
    """A handler that holds up the event loop is told by line, route and request; and how long it was."""
    loop, app = Loop(), FastAPI()

    @app.get("/reports/{number}")
    async def report(number: int) -> None:
        loop.look()
        for _ in range(4):
            loop.check_late(0.06)

    harden(app, Settings(monitor={"enabled": False}))
    request_id = TestClient(app).get("/reports/7").headers["x-request-id"]
    loop.look(0.22)
    [block] = loop.blocks
    assert (block.seconds, block.route, block.request_id) == (0.22, "/reports/{number}", request_id)
    assert block.code is not None
    assert block.code.startswith(f"{__name__}.")
    assert loop.monitor.snapshot().blocks == (block,)


def test_many_that_take_long_together_are_not_blamed() -> None:
    """The loop is as late when a hundred take their turn, and then none of them is named."""
    loop = Loop()

    async def one() -> None:
        loop.check_late(0.08)

    async def two() -> None:
        loop.look()
        await asyncio.gather(one(), one(), one())

    asyncio.run(two())
    loop.look(0.22)
    assert loop.blocks == [LoopBlocked(0.22, None, None, None)]


def test_callback_that_blocks_is_named() -> None:
    """What the event loop calls without a task has no request, and a line."""
    loop = Loop()

    def callback() -> None:
        loop.look()
        loop.check_late(0.08)
        loop.check_late(0.08)

    async def main() -> None:
        asyncio.get_running_loop().call_soon(callback)
        await asyncio.sleep(0)

    asyncio.run(main())
    loop.look(0.14)
    [block] = loop.blocks
    assert (block.route, block.request_id) == (None, None)
    assert block.code is not None


def test_short_waits_are_nobodys_fault() -> None:
    """Below the limit nothing is told; the longest wait is kept, for two windows."""
    loop = Loop(window_seconds=10)
    assert loop.monitor.snapshot().loop_delay_seconds is None
    loop.look(0.09)
    loop.look(0.01)
    assert loop.blocks == []
    seen = loop.monitor.snapshot()
    assert (seen.loop_delay_seconds, seen.longest_loop_delay_seconds) == (0.01, 0.09)
    loop.clock.advance(15)
    loop.look(0.02)
    assert loop.monitor.snapshot().longest_loop_delay_seconds == 0.09
    loop.clock.advance(15)
    loop.look(0.0)
    assert loop.monitor.snapshot().longest_loop_delay_seconds == 0.02


def test_thread_that_is_gone_is_not_looked_at() -> None:
    """An event loop whose thread has ended has no stack."""
    clock = ManualClock()
    watcher = Watcher(0.1, clock)
    watcher.looked(0.0)
    clock.advance(1)
    watcher.check()
    assert watcher.looked(2.0) is None


def test_thread_finds_what_blocks() -> None:
    """While the application runs, a thread of its own looks, and finds the line on which the loop is held up."""
    monitor = Monitor(MonitorSettings(blocked_seconds=0.02))
    with monitor.running():
        monitor.watcher.looked(monitor._clock.monotonic())
        while monitor.watcher._found is None:
            pass
        due = monitor.watcher._due
        found = monitor.watcher.looked(math.inf)
    assert due < math.inf
    assert found is not None
    assert found[0] is not None
    assert "test_thread_finds_what_blocks" in found[0]
    assert "monitor of the event loop" not in {thread.name for thread in threading.enumerate()}


def test_switched_off_it_does_nothing() -> None:
    """Neither thread nor callbacks are there, and the overview says nothing."""
    app, before = FastAPI(), [*gc.callbacks]
    handle = harden(app, Settings(monitor={"enabled": False}))
    with TestClient(app):
        assert gc.callbacks == before
        assert "monitor of the event loop" not in {thread.name for thread in threading.enumerate()}
    assert handle.metrics.watch is None
    assert handle.load.on_look == []
    assert asyncio.run(handle.observability.overview()).monitor is None


# --- the process ------------------------------------------------------------------------------------------------------


def test_pauses_are_measured_while_it_runs() -> None:
    """Each collection is counted, with or without the thread; afterwards none is."""
    monitor = Monitor(MonitorSettings(blocked_seconds=None))
    with monitor.running():
        gc.collect()
    gc.collect()
    seen = monitor.snapshot()
    assert seen.gc_pauses >= 1
    assert seen.gc_seconds >= seen.longest_gc_seconds >= 0
    assert monitor.pauses._called not in gc.callbacks


def test_memory_and_files_are_read_from_the_system(tmp_path: Path) -> None:
    """And where the system does not say, neither do we."""
    (tmp_path / "fd").mkdir()
    for name in "0123":
        (tmp_path / "fd" / name).touch()
    (tmp_path / "statm").write_text("900 250 100 1 0 300 0\n")
    assert open_files(tmp_path) == 3
    assert (resident_bytes(tmp_path) or 0) % 250 == 0
    assert resident_bytes(tmp_path / "nothing") is None
    assert open_files(tmp_path / "nothing") is None
    assert max_open_files("no_such_module") is None
    assert (max_open_files() or 1) > 0


# --- in harden() ------------------------------------------------------------------------------------------------------


def test_requests_reach_it_through_the_metrics() -> None:
    """Every request is seen, by its template and with the id that its client got."""
    app = FastAPI(openapi_url=None)

    @app.get("/orders/{number}")
    async def order(number: int) -> int:
        return number

    handle = harden(app)
    with TestClient(app) as client:
        request_id = client.get("/orders/1").headers["x-request-id"]
        client.get("/nothing")
        seen = asyncio.run(handle.observability.overview()).monitor
    assert seen is not None
    assert {(each.method, each.route, each.requests) for each in seen.routes} == {
        ("GET", "/orders/{number}", 1),
        ("GET", "none", 1),
    }
    assert {(each.route, each.status) for each in seen.slowest} == {("/orders/{number}", 200), ("none", 404)}
    assert request_id in {each.request_id for each in seen.slowest}
    assert seen.loop_delay_seconds is not None


def test_blocks_and_pauses_are_metrics() -> None:
    """Blocks by route, pauses by number and time."""
    handle = harden(FastAPI(), Settings(monitor={"blocked_seconds": 0.5}))
    handle.monitor.pauses.count, handle.monitor.pauses.seconds = 3, 0.25
    handle.monitor.look(math.inf, 0.75)
    handle.monitor.look(math.inf, 0.1)
    text = handle.metrics.expose().decode()
    assert 'hardening_loop_blocked_seconds_sum{handler="none"} 0.75' in text
    assert "hardening_gc_pauses_total 3.0" in text
    assert "hardening_gc_pause_seconds_total 0.25" in text
