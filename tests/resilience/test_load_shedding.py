"""Load shedding: what is a queue, what is done about it, and who is never refused."""

import asyncio
import heapq
import itertools
import random
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import pytest
from fastapi import FastAPI, Request, WebSocket
from hypothesis import given
from hypothesis import strategies as st
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.types import Receive, Scope, Send

from fastapi_hardening import Hardening, Priority, Settings, harden
from fastapi_hardening.core.clock import ManualClock, SystemClock
from fastapi_hardening.core.events import Events, RequestRefused
from fastapi_hardening.core.load import Load, LoadChanged
from fastapi_hardening.core.memory import Memory
from fastapi_hardening.resilience.load_shedding import (
    IMPORTANCES,
    LoadSheddingMiddleware,
    LoadSheddingSettings,
    Probe,
    Shedder,
)
from fastapi_hardening.resilience.load_shedding import probe as probing

LOOK = probing._LOOK_SECONDS

# --- settings ---------------------------------------------------------------------------------------------------------


def test_the_defaults_are_those_that_do_not_hurt() -> None:
    """A queue must stand for a second; memory is not looked at."""
    settings = LoadSheddingSettings()
    assert settings.enabled
    assert (settings.target_seconds, settings.interval_seconds, settings.max_memory_ratio) == (0.01, 1, None)


@pytest.mark.parametrize("bad", [{"target_seconds": 0}, {"max_memory_ratio": 95}, {"min_rate": 0}, {"interval": 1}])
def test_what_cannot_be_is_refused_when_it_is_made(bad: dict[str, Any]) -> None:
    """With the sentence that mends it."""
    with pytest.raises(ValueError, match=r"greater than|less than|did you mean"):
        LoadSheddingSettings(**bad)


# --- engine: a server that is simulated -------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What became of a simulated server: what it did of what it can, the 99th percentile in seconds, the refusals."""

    goodput: float
    p99: float
    refused: float


def simulate(  # noqa: C901, PLR0912, PLR0915 - a loop over what happens
    load: float, *, computes: float, waits: float = 0.0, sheds: bool = True, seed: int = 1
) -> Outcome:
    """An event loop that is asked for ``load`` times what it can do, at random times, for fifteen seconds.

    As a real one it serves in turns: all that is ready runs, then it looks for what has become ready meanwhile. To
    read a request takes 0.1 ms, to refuse it as long again. The first five seconds are not counted.
    """
    reads, seconds, counted_from = 0.0001, 15.0, 5.0
    capacity = 1 / (computes + reads)
    dice, numbers = random.Random(seed), itertools.count()
    shedder = Shedder(LoadSheddingSettings())
    shedder.next_look = LOOK
    arrival, now, turning = dice.expovariate(capacity * load), 0.0, False
    timers: list[tuple[float, int, str, float]] = [(LOOK, next(numbers), "ring", LOOK)]
    ready: list[tuple[str, float]] = []
    times: list[float] = []
    refused = 0
    while now < seconds:
        while arrival <= now:
            ready.append(("enter", arrival))
            arrival += dice.expovariate(capacity * load)
        while timers and timers[0][0] <= now:
            _, _, what, since = heapq.heappop(timers)
            ready.append((what, since))
        if not ready:
            now = min(arrival, timers[0][0])
            continue
        turn, ready = ready, []
        for what, since in turn:
            if what == "turn":
                shedder.turn(now)
                turning = False
            elif what == "ring":
                ready.append((f"look {now - since}", now))
            elif what.startswith("look"):
                shedder.look(now, float(what[5:]) + now - since)
                shedder.next_look = now + LOOK
                heapq.heappush(timers, (now + LOOK, next(numbers), "ring", now + LOOK))
            elif what == "enter":
                now += reads
                if sheds and shedder.acts and not turning:
                    turning = True
                    ready.insert(0, ("turn", now))
                if sheds and not shedder.admit("default", now):
                    now += reads
                    refused += since > counted_from
                elif waits:
                    heapq.heappush(timers, (now + waits, next(numbers), "compute", since))
                else:
                    now += computes
                    shedder.served += 1
                    if since > counted_from:
                        times.append(now - since)
            else:
                now += computes
                shedder.served += 1
                if since > counted_from:
                    times.append(now - since)
    times.sort()
    done = len(times)
    return Outcome(done / (seconds - counted_from) / capacity, times[int(done * 0.99)], refused / (refused + done))


@pytest.mark.parametrize(("computes", "waits"), [(0.005, 0.0), (0.05, 0.0), (0.005, 0.05)])
def test_at_three_times_the_capacity_most_of_it_is_used_and_nobody_waits_long(computes: float, waits: float) -> None:
    """Goodput is at least 90 % of what is left of the server after the refusals, and times at most twice the idle."""
    idle, loaded = (simulate(load, computes=computes, waits=waits) for load in (0.2, 3.0))
    left = 1 - 3 * loaded.refused * 0.0002 / (computes + 0.0001)
    assert loaded.goodput >= 0.9 * left
    assert loaded.p99 <= 2 * max(idle.p99, 2 * computes + waits)
    assert loaded.refused == pytest.approx(2 / 3, abs=0.06)


def test_without_it_everybody_waits_for_ever() -> None:
    """The simulated server is one that needs it: those who are served have waited for seconds."""
    assert simulate(3.0, computes=0.05, sheds=False).p99 > 3


@pytest.mark.parametrize("load", [0.1, 0.5, 0.8])
@pytest.mark.parametrize(("computes", "waits"), [(0.001, 0.0), (0.005, 0.0), (0.002, 0.02)])
def test_a_server_that_can_do_what_comes_refuses_nothing(load: float, computes: float, waits: float) -> None:
    """However the requests come: bursts make queues, and they drain."""
    assert simulate(load, computes=computes, waits=waits).refused == 0


# --- engine -----------------------------------------------------------------------------------------------------------


def standing(shedder: Shedder, *, seconds: float = 1.1, delay: float = 0.2, each: int = 1, since: float = 0.0) -> float:
    """Serves requests for some time, with a queue; gives the time afterwards."""
    looks = int(seconds / LOOK)
    for number in range(looks):
        now = since + number * LOOK
        shedder.turn(now)
        for _ in range(each):
            if shedder.admit("default", now):
                shedder.served += 1
        shedder.look(now, delay)
    return since + looks * LOOK


def overloaded(**settings: Any) -> Shedder:
    """A shedder that acts, which began to at the 51st look."""
    shedder = Shedder(LoadSheddingSettings(**settings))
    standing(shedder, seconds=1.02)
    assert shedder.acts
    return shedder


def test_a_queue_that_goes_away_is_no_reason() -> None:
    """One look in a second that finds none is enough."""
    shedder = Shedder(LoadSheddingSettings())
    now = standing(shedder, seconds=0.9)
    shedder.look(now, delay=0.001)
    standing(shedder, seconds=0.9, since=now + LOOK)
    assert shedder.rate is None
    assert shedder.level == 0


def test_one_request_that_keeps_the_loop_busy_is_no_queue() -> None:
    """A newcomer waits for it alone, whatever its time: a queue is made of several."""
    shedder = Shedder(LoadSheddingSettings())
    for number in range(30):
        shedder.admit("default", number * 0.5)
        shedder.served += 1
        shedder.look(number * 0.5, delay=0.5)
    assert shedder.rate is None


def test_a_loop_that_others_keep_busy_is_no_reason_to_refuse_the_few() -> None:
    """Work in the background that blocks everything is not made better by refusing ten requests."""
    shedder = Shedder(LoadSheddingSettings())
    standing(shedder, seconds=20, each=0)
    for number in range(10):
        assert shedder.admit("default", 20.0 + number)
    assert shedder.rate is None


def test_a_flood_that_keeps_the_look_waiting_is_seen_from_within() -> None:
    """The look waits behind all of them, so each of them asks how late it is."""
    shedder = Shedder(LoadSheddingSettings())
    shedder.look(0.0, delay=0.5)
    shedder.next_look = LOOK
    admitted = 0
    for number in range(200):
        if shedder.admit("default", number * 0.01):
            admitted += 1
            shedder.served += 1
    assert shedder.rate is not None
    assert 100 <= admitted <= 105


def test_a_pause_of_the_whole_process_is_no_queue() -> None:
    """Those that have come meanwhile are served, and by that time the look has come, too."""
    shedder = Shedder(LoadSheddingSettings())
    now = standing(shedder, seconds=5, delay=0.0)
    shedder.next_look = now
    assert all(shedder.admit("default", now + 30 + number * 0.005) for number in range(100))
    shedder.look(now + 30.5, delay=30.5)
    shedder.look(now + 30.52, delay=0.0)
    assert shedder.rate is None


def test_requests_one_after_another_in_one_task_make_no_queue() -> None:
    """As tests send them, without a moment for the event loop to look at anything else."""
    app, clock = FastAPI(), ManualClock()
    handle = harden(app, clock=clock)

    async def run() -> set[int]:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://shop.test") as client:
            statuses = set()
            for _ in range(50):
                statuses.add((await client.get("/nothing")).status_code)
                clock.advance(0.1)
        return statuses

    assert asyncio.run(run()) == {404}
    assert handle.shedder.seen == 50
    assert handle.shedder.served == 1


def test_what_is_critical_is_admitted_and_what_is_in_the_background_is_not() -> None:
    """As long as anything is refused; the rest has what is left of the rate."""
    shedder = overloaded()
    now = 2.0
    shedder.turn(now)
    assert all(shedder.admit("critical", now) for _ in range(100))
    assert not shedder.admit("background", now)
    assert not shedder.admit("default", now)
    shedder.turn(now + 1)
    assert shedder.admit("default", now + 1)


def test_the_rate_is_cut_while_the_queue_stands_and_grows_when_it_does_not() -> None:
    """Never below its minimum; and not more is admitted than it says."""
    shedder = overloaded(min_rate=5)
    began = shedder.rate
    assert began is not None
    now = standing(shedder, since=1.02, seconds=0.5, delay=2, each=3)
    assert (shedder.rate or 0) < began
    now = standing(shedder, since=now, seconds=10, delay=2, each=3)
    # What is done falls with what is admitted, so only the minimum holds it.
    assert shedder.rate == pytest.approx(5)
    standing(shedder, since=now, seconds=1, delay=0.0, each=3)
    assert (shedder.rate or 0) > 6


def test_a_queue_that_drains_is_given_time() -> None:
    """Cut further, the rate would be too low when it has drained."""
    shedder = overloaded()
    now = 1.02
    for number in range(20):
        now = standing(shedder, since=now, seconds=0.12, delay=5.0 - number * 0.2, each=3)
    # It can do fifty in a second.
    assert (shedder.rate or 0) >= 4


def test_when_nobody_is_refused_any_more_there_is_no_rate() -> None:
    """After two seconds of calm."""
    shedder = overloaded()
    standing(shedder, since=1.02, seconds=2.5, delay=0.0, each=0)
    assert not shedder.acts
    assert shedder.level == 0


@pytest.mark.parametrize(("refused", "level"), [(0, 1), (3, 2), (8, 3)])
def test_the_level_is_the_share_of_refusals(refused: int, level: int) -> None:
    """None yet, a quarter, most."""
    shedder = overloaded()
    for number in range(60):
        now = 1.02 + number * 0.12
        for each in range(10):
            shedder.admit("background" if each < refused else "critical", now)
            shedder.served += each >= refused
        if refused == 0 and number % 10 == 0:
            shedder.admit("background", now)
        shedder.look(now, delay=0.0)
    assert shedder.level == level


def test_without_memory_only_what_is_critical_is_admitted() -> None:
    """Whatever the queues are."""
    shedder = Shedder(LoadSheddingSettings())
    shedder.exhausted = True
    assert [shedder.admit(each, 0.0) for each in IMPORTANCES] == [True, False, False]
    assert shedder.level == 3


@given(
    st.lists(st.tuples(st.floats(0, 2), st.floats(0, 5), st.floats(0, 3), st.integers(0, 30)), max_size=60),
    st.sampled_from(IMPORTANCES),
)
def test_whatever_happens_the_rate_is_one(steps: list[tuple[float, float, float, int]], importance: Any) -> None:
    """Above its minimum or none, and what is critical is never refused."""
    shedder, now = Shedder(LoadSheddingSettings(min_rate=2)), 0.0
    for passes, delay, others, requests in steps:
        now += passes
        shedder.turn(now)
        for _ in range(requests):
            admitted = shedder.admit(importance, now)
            assert admitted or importance != "critical"
            shedder.served += admitted
        shedder.look(now, delay, others)
        assert shedder.rate is None or shedder.rate >= 2
        assert shedder.level in range(4)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_memory_is_what_cannot_be_given_back(tmp_path: Path) -> None:
    """As Kubernetes counts it, from either version of control groups."""
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 600\ninactive_file 400\n")
    assert Memory(tmp_path).ratio() == 0.5
    (tmp_path / "memory.max").write_text("max\n")
    assert Memory(tmp_path).ratio() is None
    old = tmp_path / "old" / "memory"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("2000\n")
    (old / "memory.usage_in_bytes").write_text("1500\n")
    (old / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 500\n")
    assert Memory(tmp_path / "old").ratio() == 0.5
    (old / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert Memory(tmp_path / "old").ratio() is None
    assert Memory(tmp_path / "nowhere").ratio() is None


# --- the probe --------------------------------------------------------------------------------------------------------


def test_the_probe_measures_while_requests_come_and_then_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a real loop: it finds the queue that a flood makes, and stops when nothing comes any more."""
    monkeypatch.setattr(probing, "_IDLE_LOOKS", 2)
    settings = LoadSheddingSettings(target_seconds=0.001, interval_seconds=0.05)
    shedder, load, events = Shedder(settings), Load(), Events()
    delays: list[float] = []

    async def run() -> None:
        loop = asyncio.get_running_loop()
        load.queues.append(lambda: 5.0)
        probe = Probe(shedder, SystemClock(), load, lambda: False)
        shedder.on_look = lambda: delays.append(shedder.delay)
        probe.start(loop)
        while len(delays) < 8:
            shedder.admit("default", 0.0)
            shedder.served += 10
            await asyncio.sleep(0)
        assert shedder.acts
        assert load.level == 1
        shedder.rate = None
        load.queues.clear()
        probe.mark_turn(loop)
        probe.mark_turn(loop)
        while probe.loop is not None:  # noqa: ASYNC110 - what is waited for is a timer that is not set again
            await asyncio.sleep(0.001)
        assert shedder.next_look == float("inf")

    asyncio.run(run())
    assert all(delay >= 0 for delay in delays)
    assert events.count(LoadChanged) == 0


def test_loops_that_take_turns_have_one_chain_of_looks() -> None:
    """Two servers in two threads of one process, for example: it is the last one that is looked at."""
    shedder = Shedder(LoadSheddingSettings())
    looks = []
    shedder.on_look = lambda: looks.append(1)
    probe = Probe(shedder, SystemClock(), Load())

    async def run() -> None:
        loop = asyncio.get_running_loop()
        for _ in range(10):
            probe.start(loop)
        while not looks:  # noqa: ASYNC110 - what is waited for is a timer
            await asyncio.sleep(0.001)
        await asyncio.sleep(0)

    asyncio.run(run())
    assert len(looks) == 1


def test_waiting_for_threads_is_a_queue() -> None:
    """Half as many as are served is too long."""

    async def run() -> list[float]:
        from anyio import to_thread  # noqa: PLC0415 - on this loop only

        probe = Probe(Shedder(LoadSheddingSettings()), ManualClock(), Load())
        limiter = to_thread.current_default_thread_limiter()
        limiter.total_tokens = 2
        probe.start(asyncio.get_running_loop())
        holders, found = [object() for _ in range(2)], [probe._longest()]
        for holder in holders:
            limiter.acquire_on_behalf_of_nowait(holder)
        found.append(probe._longest())
        waiting = [asyncio.create_task(limiter.acquire_on_behalf_of(object())) for _ in range(3)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        found.append(probe._longest())
        for task in waiting:
            task.cancel()
        return found

    assert asyncio.run(run()) == [0, 0, 6]


# --- layer ------------------------------------------------------------------------------------------------------------


async def ok(scope: Scope, receive: Receive, send: Send) -> None:
    await PlainTextResponse("ok")(scope, receive, send)


def hardened(*overrides: Any, **settings: Any) -> tuple[TestClient, Shedder, Hardening]:
    app = FastAPI()

    @app.get("/", dependencies=overrides)
    async def index() -> str:
        return "ok"

    @app.websocket("/talk")
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text("hello")

    handle = harden(app, Settings(load_shedding=settings), clock=ManualClock())
    return TestClient(app), handle.shedder, handle


def overload(shedder: Shedder) -> None:
    shedder.rate = shedder._capacity = 0.001


def test_in_calm_nothing_is_refused_and_nothing_changes() -> None:
    """Everything is counted, that is all."""
    client, shedder, handle = hardened(Priority("background"))
    assert client.get("/").status_code == 200
    assert (shedder.seen, shedder.served) == (1, 1)
    assert handle.load.level == 0


def test_under_load_a_client_is_told_when_to_come_back() -> None:
    """503 as a problem, jittered; probes and metrics are answered."""
    client, shedder, handle = hardened(retry_after_seconds=3)
    overload(shedder)
    answer = client.get("/")
    assert answer.status_code == 503
    assert answer.json()["type"] == "https://iana.org/assignments/http-problem-types#temporary-reduced-capacity"
    assert 3 <= int(answer.headers["retry-after"]) <= 6
    assert client.get("/nowhere").status_code == 503
    for probe in ("/livez", "/readyz", "/startupz"):
        assert client.get(probe).status_code == 200
    assert handle.events.count(RequestRefused) == 2
    metrics = "".join(
        f"{sample.name}{sample.labels} {sample.value}\n"
        for metric in handle.metrics.registry.collect()
        for sample in metric.samples
    )
    assert "hardening_shed_requests_total{'priority': 'default'} 2.0" in metrics
    assert handle.shedder.on_look is not None
    handle.shedder.rate = 12.0
    handle.shedder.on_look()
    assert handle.metrics.registry.get_sample_value("hardening_admission_rate") == 12


def test_a_websocket_is_refused_as_well_and_an_open_one_is_let_be() -> None:
    """It is new work, until it is there."""
    client, shedder, _ = hardened()
    with client.websocket_connect("/talk") as websocket:
        overload(shedder)
        assert websocket.receive_text() == "hello"
    with pytest.raises(WebSocketDenialResponse) as denied, client.websocket_connect("/talk"):
        raise AssertionError("was accepted")
    assert denied.value.status_code == 503
    assert shedder.served == 0


@pytest.mark.parametrize(("importance", "status"), [("critical", 200), ("default", 503), ("background", 503)])
def test_the_innermost_priority_counts(importance: Any, status: int) -> None:
    """The route's, against that of the router around it."""
    client, shedder, _ = hardened(Priority("critical"), Priority(importance))
    overload(shedder)
    assert client.get("/").status_code == status


def test_each_turn_of_the_loop_gives_out_what_it_may() -> None:
    """As soon as there is a rate, the first request of a turn has the next turn told."""
    client, shedder, handle = hardened()
    shedder.rate = 10.0
    shedder.next_look = 0.0
    assert isinstance(handle.clock, ManualClock)
    assert client.get("/").status_code == 503
    handle.clock.advance(1)
    assert client.get("/").status_code == 503
    assert client.get("/").status_code == 200


def test_report_only_says_so_and_serves(caplog: pytest.LogCaptureFixture) -> None:
    """To find out what it would do."""
    caplog.set_level("INFO")
    client, shedder, _ = hardened(Priority("background"), report_only=True)
    overload(shedder)
    assert client.get("/").status_code == 200
    assert "load shedding (report only) refused a request to /" in caplog.text


@pytest.mark.parametrize(
    ("importance", "report_only", "status"),
    [("background", False, 503), ("background", True, 200), ("default", False, 200)],
)
def test_a_priority_that_was_learnt_of_late_still_counts(importance: Any, report_only: bool, status: int) -> None:
    """Where a middleware of the application changes the path: what is in the background is refused after routing."""
    client, shedder, handle = hardened(Priority(importance), report_only=report_only)
    app = client.app
    assert isinstance(app, FastAPI)

    @app.middleware("http")
    async def rewriting(request: Request, call_next: Any) -> Any:
        request.scope["path"] = "/"
        return await call_next(request)

    shedder.rate = 1.0
    shedder._tokens = 2.0
    assert client.get("/other").status_code == status
    assert handle.events.count(RequestRefused) == (status == 503)


def test_an_unknown_priority_is_refused_when_it_is_made() -> None:
    """With those that there are."""
    with pytest.raises(ValueError, match="known are 'critical'"):
        Priority("urgent")  # type: ignore[arg-type]


def test_alone_it_needs_nothing_and_switched_off_it_is_absent() -> None:
    """Metrics go nowhere, and a priority does nothing by itself."""
    app = FastAPI()
    app.get("/", dependencies=[Priority("background")])(lambda: "ok")
    assert TestClient(app).get("/").status_code == 200
    layer = LoadSheddingMiddleware(app)
    overload(layer.shedder)
    assert TestClient(layer).get("/").status_code == 503
    off = LoadSheddingMiddleware(ok, LoadSheddingSettings(enabled=False))
    overload(off.shedder)
    assert TestClient(off).get("/").status_code == 200


def test_memory_is_looked_at_where_somebody_asks_for_it(tmp_path: Path) -> None:
    """Before it is exhausted nothing happens."""
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("990\n")
    (tmp_path / "memory.stat").write_text("")
    layer = LoadSheddingMiddleware(ok, LoadSheddingSettings(max_memory_ratio=0.95), memory=Memory(tmp_path))

    async def run() -> list[int]:
        statuses: list[int] = []
        transport = httpx2.ASGITransport(layer)
        async with httpx2.AsyncClient(transport=transport, base_url="http://shop.test") as client:
            while not layer.shedder.exhausted:
                statuses.append((await client.get("/")).status_code)
                await asyncio.sleep(0)
            statuses.append((await client.get("/")).status_code)
        return statuses

    statuses = asyncio.run(run())
    assert set(statuses[:-1]) == {200}
    assert statuses[-1] == 503


def test_alone_it_counts_nothing_and_still_refuses_late() -> None:
    """Where nobody measures."""
    app = FastAPI()
    app.get("/", dependencies=[Priority("background")])(lambda: "ok")

    async def rewriting(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "path": "/"} if scope["type"] == "http" else scope, receive, send)

    layer = LoadSheddingMiddleware(rewriting)
    layer.shedder.rate = 1.0
    layer.shedder._tokens = 2.0
    assert TestClient(layer).get("/other").status_code == 503
    assert layer.shedder.seen == 1


# --- the level --------------------------------------------------------------------------------------------------------


def test_a_change_of_the_level_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """To the log and to whoever listens."""
    events, heard = Events(), list[LoadChanged]()
    events.subscribe(LoadChanged, heard.append)
    load = Load(events)
    for level in (0, 2, 2, 0):
        load.tell(level)
    assert heard == [LoadChanged(2, 0), LoadChanged(0, 2)]
    assert "the load was calm and is overloaded" in caplog.text
