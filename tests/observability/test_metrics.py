"""Metrics: what is counted under which name, what never becomes a series, and who may read it."""

import asyncio
import gc
import logging
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter, BackgroundTasks, FastAPI, Request, Response, WebSocket
from fastapi.responses import StreamingResponse
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import trace
from prometheus_client import REGISTRY, CollectorRegistry, Counter, values
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.parser import text_string_to_metric_families as parse_plain
from prometheus_fastapi_instrumentator import Instrumentator, metrics
from prometheus_fastapi_instrumentator.metrics import Info
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from starlette.testclient import TestClient

from fastapi_hardening.core.clock import ManualClock
from fastapi_hardening.core.configuration import ConfigurationError
from fastapi_hardening.core.context import RequestContext, ensure
from fastapi_hardening.core.events import Events
from fastapi_hardening.core.policy import allow_everybody
from fastapi_hardening.core.problem import Problem, refuse
from fastapi_hardening.core.tally import SharedTally, Tally, method_of
from fastapi_hardening.observability.metrics import (
    OPENMETRICS,
    PLAIN,
    MetricsMiddleware,
    MetricsSettings,
    Recorder,
    accepts_openmetrics,
    declared_length,
)

TOKEN = "0123456789abcdef"
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def parse_openmetrics(text: str) -> list[Any]:
    return list(text_string_to_metric_families(text))  # type: ignore[no-untyped-call]


def samples_of(families: Iterable[Any]) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def scraped(recorder: Recorder) -> Samples:
    """What Prometheus would read, by its own parser."""
    return samples_of(parse_plain(recorder.expose().decode()))


def value(recorder: Recorder, name: str, **labels: str) -> float | None:
    return scraped(recorder).get((name, tuple(sorted(labels.items()))))


# --- engine -----------------------------------------------------------------------------------------------------------


def test_a_request_is_one_of_its_series_and_its_duration_is_in_its_buckets() -> None:
    """The names, labels and groups of the instrumentator."""
    tally = Tally((0.1, 0.25), (0.5,))
    tally.record("GET", "/items/{id}", 404, seconds=0.2, request_bytes=3, response_bytes=5)
    samples = samples_of(tally.collect())
    item = ("handler", "/items/{id}")
    assert samples["http_requests_total", (item, ("method", "GET"), ("status", "4xx"))] == 1
    assert samples["http_request_size_bytes_sum", (item,)] == 3
    assert samples["http_response_size_bytes_sum", (item,)] == 5
    assert samples["http_request_duration_highr_seconds_bucket", (("le", "0.1"),)] == 0
    assert samples["http_request_duration_highr_seconds_bucket", (("le", "0.25"),)] == 1
    assert samples["http_request_duration_seconds_bucket", (item, ("le", "0.5"), ("method", "GET"))] == 1
    assert samples["http_request_duration_seconds_sum", (item, ("method", "GET"))] == 0.2


RECORDS = st.lists(
    st.tuples(
        st.sampled_from(["GET", "POST"]),
        st.sampled_from(["/a", "/b", "none"]),
        st.sampled_from([200, 204, 301, 404, 500]),
        st.one_of(st.sampled_from([0.0, 0.1, 0.3, 0.5, 1.0, 60.0]), st.floats(0, 100)),
        st.integers(0, 10**15),
        st.integers(0, 10**6),
    ),
    max_size=30,
)


@given(RECORDS, st.booleans())
def test_plain_numbers_give_the_same_series_as_the_client_library(records: list[Any], classes: bool) -> None:
    """Whatever is recorded, with buckets of which one set does not hold the other."""
    registry = CollectorRegistry()
    tally = Tally((0.1, 0.5, 2), (0.3, 1), status_classes=classes)
    shared = SharedTally((0.1, 0.5, 2), (0.3, 1), status_classes=classes, registry=registry)
    for method, handler, status, seconds, request_bytes, response_bytes in records:
        for each in (tally, shared):
            each.record(
                method, handler, status, seconds=seconds, request_bytes=request_bytes, response_bytes=response_bytes
            )
    ours, theirs = samples_of(tally.collect()), samples_of(registry.collect())
    assert ours.keys() == theirs.keys()
    assert ours == pytest.approx(theirs)


def test_an_exemplar_is_the_latest_sampled_trace_of_its_bucket() -> None:
    """In the OpenMetrics format only; 40 of the 128 characters that one may have."""
    clock = ManualClock()
    recorder = Recorder(MetricsSettings(process=False), clock=clock)
    assert recorder.requests is not None
    for trace_id, seconds in ((1, 0.2), (2, 0.2), (0, 0.2), (3, 70.0)):
        recorder.requests.record("GET", "/", 200, seconds=seconds, trace_id=trace_id)
        clock.advance(1)
    recorder.requests.record("POST", "/", 200, seconds=0.2, trace_id=4)
    found = {
        (sample.name.removeprefix("http_request_duration_"), sample.labels.get("method"), sample.labels["le"]): (
            sample.exemplar
        )
        for family in parse_openmetrics(recorder.expose(openmetrics=True).decode())
        for sample in family.samples
        if sample.exemplar is not None
    }
    assert {key: int(exemplar.labels["trace_id"], 16) for key, exemplar in found.items()} == {
        ("highr_seconds_bucket", None, "0.25"): 4,
        ("highr_seconds_bucket", None, "+Inf"): 3,
        ("seconds_bucket", "GET", "0.5"): 2,
        ("seconds_bucket", "GET", "+Inf"): 3,
        ("seconds_bucket", "POST", "0.5"): 4,
    }
    assert found["seconds_bucket", "GET", "0.5"].timestamp.sec == 1_700_000_001
    assert "trace_id" not in recorder.expose().decode()


def test_what_runs_here_and_how_the_process_does_is_shown() -> None:
    """Name and version as the application gives them; the process by its own collectors."""
    recorder = Recorder(build={"service": "Shop", "version": '1.0 "beta"\n'})
    [info] = [labels for name, labels in scraped(recorder) if name == "hardening_build_info"]
    assert dict(info)["version"] == '1.0 "beta"\n'
    assert value(recorder, "python_gc_collections_total", generation="0") is not None
    assert value(Recorder(MetricsSettings(process=False)), "python_gc_collections_total", generation="0") is None


def test_each_application_has_a_registry_of_its_own() -> None:
    """The second application of a process gets no metrics from the package alone, and says nothing."""
    first, second = Recorder(), Recorder()
    assert first.requests is not None
    first.requests.record("GET", "/", 200, seconds=0)
    assert value(second, "http_requests_total", method="GET", handler="/", status="2xx") is None
    assert REGISTRY.get_sample_value("http_requests_inprogress") is None


def test_series_of_the_default_registry_are_shown_on_request() -> None:
    """Of a name that both have, ours counts."""
    orders = Counter("test_orders", "Orders.")
    again = Counter("hardening_websockets", "Another one.")
    try:
        orders.inc()
        again.inc()
        assert value(Recorder(), "test_orders_total") is None
        recorder = Recorder(MetricsSettings(default_registry=True))
        assert value(recorder, "test_orders_total") == 1
        assert value(recorder, "hardening_websockets_total") is None
    finally:
        REGISTRY.unregister(orders)
        REGISTRY.unregister(again)


@pytest.mark.parametrize(
    ("accept", "openmetrics"),
    [
        (b"", False),
        (b"*/*", False),
        (b"application/openmetrics-text", True),
        (b"Application/OpenMetrics-Text; Version=1.0.0", True),
        (b"application/openmetrics-text;version=0.0.1", False),
        (b"application/openmetrics-text;version=2.0.0", False),
        (b"application/openmetrics-text;q=0", False),
        (b"application/openmetrics-text;q=x,text/plain;q=0.1", False),
        (b"application/openmetrics-text;q=0.5,text/plain", False),
        (b"application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.1", True),
    ],
)
def test_the_format_is_the_one_that_the_reader_prefers(accept: bytes, openmetrics: bool) -> None:
    """Plain text where it does not say."""
    assert accepts_openmetrics([accept]) is openmetrics


@given(st.lists(st.text(alphabet='application/openmetrics-text;,=q0.1 "é', max_size=40)))
def test_no_accept_breaks_the_choice(accept: list[str]) -> None:
    """Whatever a client writes there."""
    assert accepts_openmetrics([text.encode("latin-1") for text in accept]) in (True, False)


@pytest.mark.parametrize(
    ("header", "length"),
    [
        ((b"content-length", b"12"), 12),
        ((b"Content-Length", b"12"), 12),
        ((b"content-length", b"-1"), 0),
        ((b"content-length", b"1_0"), 0),
        ((b"content-length", "²".encode("latin-1")), 0),
        ((b"content-length", b"9" * 16), 0),
        ((b"accept-charset", b"12"), 0),
    ],
)
def test_a_length_that_cannot_be_one_counts_as_none(header: tuple[bytes, bytes], length: int) -> None:
    """A sum that one request has spoilt stays spoilt."""
    assert declared_length([(b"host", b"x"), header]) == length


METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "QUERY"}


@given(st.text() | st.sampled_from(sorted(METHODS)))
def test_methods_are_a_closed_set(method: str) -> None:
    """A server may let anything through."""
    assert method_of(method) == (method if method in METHODS else "_OTHER")


# --- events -----------------------------------------------------------------------------------------------------------


class SoldOut(Problem):
    """A refusal."""

    status = 409
    type = "https://shop.example/problems#sold-out"


async def refused(events: Events, problem: Problem, layer: str) -> None:
    scope: Any = {"type": "http", "method": "GET", "headers": [], "path": "/"}
    ensure(scope).events = events

    async def nowhere(message: Any) -> None:
        """Loses it."""

    await refuse(problem, scope, never, nowhere, layer=layer)


async def never() -> Any:
    await asyncio.Event().wait()


def test_refusals_and_facts_are_counted_by_name() -> None:
    """They come over the event bus; the concerns that refuse know nothing of metrics."""
    events = Events()
    recorder = Recorder(events=events)
    for _ in range(2):
        asyncio.run(refused(events, SoldOut(), "shop"))
    assert value(recorder, "hardening_refusals_total", layer="shop", problem="sold-out") == 2
    assert value(recorder, "hardening_events_total", event="RequestRefused") == 2


def test_names_that_never_end_are_counted_together() -> None:
    """A problem type that is made from input would be a series for each input."""
    events = Events()
    recorder = Recorder(events=events)
    for number in range(600):
        asyncio.run(refused(events, Problem(status=409, type=f"x#{number}"), "shop"))
    counted = {labels: n for (name, labels), n in scraped(recorder).items() if name == "hardening_refusals_total"}
    assert len(counted) == 501
    assert counted[(("layer", "_OTHER"), ("problem", "_OTHER"))] == 100


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"path": "metrics"}, "starts with a slash"),
        ({"token": "short"}, "at least 16 characters"),
        ({"token": TOKEN, "port": 9000}, "leave one of them out"),
        ({"port": 0}, "greater than or equal to 1"),
        ({"duration_buckets": ()}, "duration_buckets are numbers"),
        ({"duration_buckets": (0, 1)}, "above 0"),
        ({"route_duration_buckets": (1, 1)}, "each greater"),
        ({"route_duration_buckets": (1, float("inf"))}, "route_duration_buckets"),
        ({"engin": "own"}, "did you mean 'engine'"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], sentence: str) -> None:
    """With the key in the message."""
    with pytest.raises(ValueError, match=sentence):
        MetricsSettings(**changes)


def test_buckets_may_be_written_as_text() -> None:
    """As an environment variable says them."""
    settings = MetricsSettings.model_validate({"duration_buckets": "0.1,1", "token": TOKEN})
    assert settings.duration_buckets == (0.1, 1.0)


# --- the layer --------------------------------------------------------------------------------------------------------


async def _item(id: str) -> dict[str, str]:  # noqa: A002 - the name in the path
    return {"id": id}


def routes(app: FastAPI) -> FastAPI:
    """Routes of every kind."""
    router = APIRouter()
    router.get("/items/{id}")(_item)
    app.include_router(router, prefix="/api")

    @app.post("/echo")
    async def echo(request: Request) -> Response:
        return Response(await request.body())

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        return StreamingResponse(iter([b"a", b"b"]))

    @app.get("/broken")
    async def broken() -> None:
        raise RuntimeError

    child = FastAPI()
    child.get("/{id}")(_item)
    app.mount("/child", child)
    app.mount("/opaque", PlainTextResponse("opaque"))
    return app


def hardened(*, instrumentations: Iterable[Any] = (), **changes: Any) -> tuple[TestClient, Recorder]:
    """A client and the recorder of an application with the layer alone."""
    recorder = Recorder(MetricsSettings(process=False, **changes))
    app = routes(FastAPI())
    app.add_middleware(
        MetricsMiddleware, recorder=recorder, guard=allow_everybody, instrumentations=instrumentations, clock=CLOCK
    )
    return TestClient(app, raise_server_exceptions=False), recorder


CLOCK = ManualClock()


@pytest.mark.parametrize(
    ("method", "path", "handler", "status"),
    [
        ("GET", "/api/items/7", "/api/items/{id}", "2xx"),
        ("DELETE", "/api/items/7", "/api/items/{id}", "4xx"),
        ("GET", "/api/items/7/", "/api/items/{id}", "3xx"),
        ("GET", "/child/7", "/child/{id}", "2xx"),
        ("GET", "/opaque/7", "/opaque", "2xx"),
        ("GET", "/nothing/7", "none", "4xx"),
        ("GET", "/broken", "/broken", "5xx"),
        ("GET", "/docs", "/docs", "2xx"),
    ],
)
def test_a_request_is_counted_by_the_template_of_its_route(method: str, path: str, handler: str, status: str) -> None:
    """Included, mounted, opaque, refused, redirected, broken and unknown."""
    client, recorder = hardened()
    client.request(method, path, follow_redirects=False)
    assert value(recorder, "http_requests_total", method=method, handler=handler, status=status) == 1


def test_status_may_be_told_in_full() -> None:
    """Where dashboards need it."""
    client, recorder = hardened(status_classes=False)
    client.get("/nothing")
    assert value(recorder, "http_requests_total", method="GET", handler="none", status="404") == 1


@pytest.mark.parametrize("engine", ["own", "instrumentator"])
def test_no_client_can_make_a_series(engine: str) -> None:
    """Ten thousand paths, redirects and methods later there are as many series as before."""
    client, recorder = hardened(engine=engine)

    def attack(number: int) -> None:
        client.get(f"/{number}/{number}")
        client.get(f"/child/{number}/", follow_redirects=False)
        client.get(f"/api/items/{number}/", follow_redirects=False)
        client.get(f"/api/items/{number}?x={number}", headers={f"x-{number}": "1", "host": f"h{number}"})

    # A hundred through the whole application, for each kind of its answers ...
    attack(0)
    client.request("FOO", "/child/1")
    before = len(scraped(recorder))
    for number in range(1, 25):
        attack(number)
        client.request(f"FOO{number}", "/child/1")
    # ... and the rest past it, for the number.
    middleware = MetricsMiddleware(PlainTextResponse("", 404), recorder=recorder, clock=CLOCK)

    async def flood() -> None:
        for number in range(10_000):
            await serve(middleware, f"/{number}/x/{number}", app=client.app)

    asyncio.run(flood())
    assert len(scraped(recorder)) == before


async def serve(
    application: Any, path: str = "/", headers: Iterable[tuple[bytes, bytes]] = (), **scope: Any
) -> list[Any]:
    """What an ASGI application sends, without a client around it."""
    sent: list[Any] = []

    async def keep(message: Any) -> None:
        sent.append(message)

    base = {"type": "http", "method": "GET", "path": path, "headers": list(headers), "query_string": b""}
    await application(base | scope, never, keep)
    return sent


def answered(application: Any, **scope: Any) -> list[Any]:
    return asyncio.run(serve(application, **scope))


def test_the_duration_ends_with_the_last_byte() -> None:
    """Neither a background task nor what a middleware does afterwards belongs to it."""
    recorder = Recorder()
    app = FastAPI()

    @app.get("/")
    async def index(tasks: BackgroundTasks) -> None:
        CLOCK.advance(2)
        tasks.add_task(lambda: CLOCK.advance(100))

    app.add_middleware(MetricsMiddleware, recorder=recorder, clock=CLOCK)
    TestClient(app).get("/")
    assert value(recorder, "http_request_duration_highr_seconds_sum") == 2
    assert value(recorder, "http_request_duration_seconds_sum", method="GET", handler="/") == 2


def test_a_stream_is_counted_once_at_its_end() -> None:
    """However many pieces it has; a message after the last one changes nothing."""

    async def stream(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"Content-Length", b"3")]})
        for more in (True, True, False, False):
            CLOCK.advance(1)
            await send({"type": "http.response.body", "body": b"x", "more_body": more})

    middleware = MetricsMiddleware(stream, clock=CLOCK)
    answered(middleware)
    assert value(middleware.recorder, "http_request_duration_highr_seconds_sum") == 3
    assert value(middleware.recorder, "http_response_size_bytes_sum", handler="none") == 3
    assert value(middleware.recorder, "http_request_duration_highr_seconds_count") == 1


def test_a_file_that_the_server_sends_by_its_path_ends_the_answer() -> None:
    """The pathsend extension has no body message."""

    async def pathsend(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.pathsend", "path": "/f"})

    middleware = MetricsMiddleware(pathsend)
    answered(middleware)
    assert value(middleware.recorder, "http_requests_total", method="GET", handler="none", status="2xx") == 1
    assert value(middleware.recorder, "hardening_responses_aborted_total", handler="none", cause="disconnect") is None


def aborting(error: BaseException | None, *, started: bool) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if started:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        if error is not None:
            raise error

    return app


@pytest.mark.parametrize(
    ("error", "started", "status", "cause"),
    [
        (None, True, "2xx", "disconnect"),
        (None, False, "5xx", "disconnect"),
        (OSError(), True, "2xx", "disconnect"),
        (ClientDisconnect(), False, "5xx", "disconnect"),
        (RuntimeError(), True, "2xx", "exception"),
        (asyncio.CancelledError(), True, "2xx", "cancelled"),
        (asyncio.CancelledError(), False, "5xx", "cancelled"),
        (RuntimeError(), False, "5xx", None),
        (OSError(), False, "5xx", None),
    ],
)
def test_an_answer_that_did_not_reach_its_end_is_counted_with_its_cause(
    error: BaseException | None, started: bool, status: str, cause: str | None
) -> None:
    """With the status that was sent; an error before the answer is a 500 that the server sends whole."""
    told: list[Info] = []
    middleware = MetricsMiddleware(aborting(error, started=started), instrumentations=[told.append])
    if error is None:
        answered(middleware)
    else:
        with pytest.raises(type(error)):
            answered(middleware)
    samples = scraped(middleware.recorder)
    aborted = [dict(labels)["cause"] for name, labels in samples if name == "hardening_responses_aborted_total"]
    assert aborted == ([] if cause is None else [cause])
    assert value(middleware.recorder, "http_requests_total", method="GET", handler="none", status=status) == 1
    assert samples["http_requests_inprogress", ()] == 0
    assert [info.modified_status for info in told] == [status]


def test_an_error_after_the_answer_counts_nothing_more() -> None:
    """A background task that fails, or a server error middleware that raises again."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse("ok")(scope, receive, send)
        raise RuntimeError

    middleware = MetricsMiddleware(app)
    with pytest.raises(RuntimeError):
        answered(middleware)
    requests = {
        labels: n for (name, labels), n in scraped(middleware.recorder).items() if name == "http_requests_total"
    }
    assert list(requests.values()) == [1]


@pytest.mark.parametrize("engine", ["own", "instrumentator"])
@pytest.mark.parametrize("wanted", [True, False])
def test_requests_in_progress_are_counted_if_wanted(engine: Any, wanted: bool) -> None:
    """While they are answered; a request for the metrics is none."""
    recorder = Recorder(MetricsSettings(engine=engine, in_progress=wanted))
    seen: list[float | None] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(value(recorder, "http_requests_inprogress"))
        await PlainTextResponse("ok")(scope, receive, send)

    answered(MetricsMiddleware(app, recorder=recorder))
    seen.append(value(recorder, "http_requests_inprogress"))
    assert seen == ([1, 0] if wanted else [None, None])


def span(*, sampled: bool) -> trace.Span:
    flags = trace.TraceFlags(trace.TraceFlags.SAMPLED if sampled else trace.TraceFlags.DEFAULT)
    return trace.NonRecordingSpan(trace.SpanContext(0xABC, 1, is_remote=False, trace_flags=flags))


@pytest.mark.parametrize(("sampled", "exemplars", "named"), [(True, True, 2), (False, True, 0), (True, False, 0)])
def test_a_sampled_trace_is_named_beside_the_duration(sampled: bool, exemplars: bool, named: int) -> None:
    """As the span further in has it when the last byte is sent."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        with trace.use_span(span(sampled=sampled)):
            await PlainTextResponse("ok")(scope, receive, send)

    middleware = MetricsMiddleware(app, MetricsSettings(exemplars=exemplars))
    answered(middleware)
    assert middleware.recorder.expose(openmetrics=True).count(b'{trace_id="%032x"}' % 0xABC) == named


# --- other scopes -----------------------------------------------------------------------------------------------------


def websocket_app() -> tuple[TestClient, Recorder]:
    recorder = Recorder()
    app = FastAPI()

    @app.websocket("/talk/{room}")
    async def talk(websocket: WebSocket, room: str) -> None:
        if room == "broken":
            raise RuntimeError
        if room == "shut":
            await websocket.close()
            return
        await websocket.accept()
        await websocket.send_json(value(recorder, "hardening_websockets_open"))
        await websocket.close()

    app.add_middleware(MetricsMiddleware, recorder=recorder)
    return TestClient(app), recorder


def test_websockets_are_counted_by_how_their_handshake_ends() -> None:
    """And not among the requests, whose durations hours would spoil."""
    client, recorder = websocket_app()
    with client.websocket_connect("/talk/open") as websocket:
        assert websocket.receive_json() == 1
    for path, error in (("/talk/shut", Exception), ("/talk/broken", RuntimeError), ("/elsewhere", Exception)):
        with pytest.raises(error), client.websocket_connect(path):
            """Never open."""
    outcomes = {labels: n for (name, labels), n in scraped(recorder).items() if name == "hardening_websockets_total"}
    assert outcomes == {
        (("handler", "/talk/{room}"), ("outcome", "accepted")): 1,
        (("handler", "/talk/{room}"), ("outcome", "refused")): 1,
        (("handler", "/talk/{room}"), ("outcome", "failed")): 1,
        (("handler", "none"), ("outcome", "refused")): 1,
    }
    assert value(recorder, "hardening_websockets_open") == 0
    assert not [name for name, _ in scraped(recorder) if name == "http_requests_total"]


def test_what_is_no_request_passes_through() -> None:
    """The lifespan, and what servers may invent."""
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    middleware = MetricsMiddleware(app)
    answered(middleware, type="lifespan")
    answered(middleware, type="pubsub")
    assert seen == ["lifespan", "pubsub"]


@pytest.mark.parametrize("engine", ["own", "instrumentator"])
def test_switched_off_nothing_is_counted_and_nothing_served(engine: Any) -> None:
    """Not even websockets."""
    app = FastAPI()
    recorder = Recorder(MetricsSettings(enabled=False, engine=engine, port=1))

    @app.websocket("/talk")
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close()

    app.add_middleware(MetricsMiddleware, recorder=recorder, guard=allow_everybody)
    with TestClient(app) as client:
        assert client.get("/metrics").status_code == 404
        with client.websocket_connect("/talk"):
            """Open."""
    assert not [name for name, _ in scraped(recorder) if name in ("http_requests_total", "hardening_websockets_total")]


def test_it_works_alone_on_starlette() -> None:
    """With settings, and without an application around it at all."""
    app = Starlette(
        routes=[
            Route("/items/{id}", lambda request: PlainTextResponse("ok")),
            Mount("/child", routes=[Route("/", lambda request: PlainTextResponse("ok"))]),
        ]
    )
    app.add_middleware(MetricsMiddleware, settings=MetricsSettings(token=TOKEN))  # type: ignore[arg-type]
    client = TestClient(app)
    client.get("/items/1")
    client.get("/child/")
    text = client.get("/metrics", headers={"authorization": f"Bearer {TOKEN}"}).text
    assert 'http_requests_total{handler="/items/{id}",method="GET",status="2xx"} 1.0' in text
    assert 'http_requests_total{handler="/child/",method="GET",status="2xx"} 1.0' in text
    bare = TestClient(MetricsMiddleware(PlainTextResponse("ok"), guard=allow_everybody))
    assert bare.get("/").text == "ok"
    assert 'http_requests_total{handler="none",method="GET",status="2xx"} 1.0' in bare.get("/metrics").text


# --- the path ---------------------------------------------------------------------------------------------------------


def test_the_metrics_are_read_by_get_and_head_and_not_stored() -> None:
    """In the text format of Prometheus; a HEAD has the length and no body."""
    client, _ = hardened()
    answer, head = client.get("/metrics"), client.head("/metrics")
    assert (answer.status_code, answer.headers["content-type"], answer.headers["cache-control"]) == (
        200,
        PLAIN,
        "no-store",
    )
    assert {family.name: family.type for family in parse_plain(answer.text)}["http_requests"] == "counter"
    assert (head.content, head.headers["content-length"]) == (b"", str(len(answer.content)))
    assert client.post("/metrics").status_code == 404
    assert client.get("/metrics/").status_code == 404
    assert client.get("/child/metrics").json() == {"id": "metrics"}


def test_openmetrics_is_read_by_who_asks_for_it() -> None:
    """As Prometheus itself does; the whole text is valid."""
    client, recorder = hardened()
    client.get("/api/items/1")
    accept = (
        "application/openmetrics-text;version=1.0.0;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4,*/*;q=0.1"
    )
    answer = client.get("/metrics", headers={"accept": accept})
    assert answer.headers["content-type"] == OPENMETRICS
    assert samples_of(parse_openmetrics(answer.text)) == scraped(recorder)


def test_reading_the_metrics_is_no_request() -> None:
    """It would show in its own numbers."""
    client, recorder = hardened()
    client.get("/metrics")
    assert not [name for name, _ in scraped(recorder) if name == "http_requests_total"]


def guarded(peer: str = "10.0.0.1", **changes: Any) -> TestClient:
    app = FastAPI()
    app.add_middleware(MetricsMiddleware, settings=MetricsSettings(**changes))
    return TestClient(app, client=(peer, 1))


def test_without_a_token_private_peers_may_read_if_nobody_forwarded_them() -> None:
    """Behind a proxy everybody looks private."""
    assert guarded().get("/metrics").status_code == 200
    assert guarded("127.0.0.1").get("/metrics").status_code == 200
    for client, headers in ((guarded("8.8.8.8"), {}), (guarded(), {"x-forwarded-for": "10.0.0.2"})):
        answer = client.get("/metrics", headers=headers)
        assert (answer.status_code, answer.headers["content-type"]) == (403, "application/problem+json")
        assert "http_requests" not in answer.text


def test_with_a_token_its_bearer_may_read_and_nobody_else() -> None:
    """From wherever."""
    client = guarded(token=TOKEN)
    assert client.get("/metrics").headers["www-authenticate"] == "Bearer"
    assert client.get("/metrics").status_code == 401
    assert client.get("/metrics", headers={"authorization": f"Bearer {TOKEN}x"}).status_code == 401
    forwarded = {"authorization": f"Bearer {TOKEN}", "x-forwarded-for": "8.8.8.8"}
    assert client.get("/metrics", headers=forwarded).status_code == 200


def test_a_refusal_to_read_is_told() -> None:
    """Like every refusal."""
    events = Events()
    recorder = Recorder(events=events)

    class WithEvents:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            context: RequestContext = ensure(scope)
            context.events = events
            await self.app(scope, receive, send)

    TestClient(WithEvents(MetricsMiddleware(PlainTextResponse("ok"), recorder=recorder))).get("/metrics")
    assert value(recorder, "hardening_refusals_total", layer="metrics", problem="403") == 1


def test_every_answer_carries_the_fields_that_it_is_given() -> None:
    """This layer sits above the one that adds them."""

    def fields(headers: list[tuple[bytes, bytes]], scope: Any) -> list[tuple[bytes, bytes]]:
        return [*headers, (b"x-added", scope["method"].encode())]

    for settings, status in ((MetricsSettings(), 200), (MetricsSettings(token=TOKEN), 401)):  # type: ignore[arg-type]
        middleware = MetricsMiddleware(PlainTextResponse("ok"), settings, fields=fields)
        answer = TestClient(middleware, client=("10.0.0.1", 1)).get("/metrics")
        assert (answer.status_code, answer.headers["x-added"]) == (status, "GET")


def test_a_route_of_the_application_wins_with_one_notice(caplog: pytest.LogCaptureFixture) -> None:
    """It was there first; a catch-all was not meant."""
    app = FastAPI()
    app.add_middleware(MetricsMiddleware, guard=allow_everybody)
    app.add_api_route("/{rest:path}", lambda rest: "everything")
    assert "http_requests" in TestClient(app).get("/metrics").text
    app = FastAPI()
    app.add_middleware(MetricsMiddleware, guard=allow_everybody)
    app.add_api_route("/metrics", lambda: "mine")
    with caplog.at_level(logging.WARNING, "fastapi_hardening.metrics"):
        assert [TestClient(app).get("/metrics").json() for _ in range(2)] == ["mine", "mine"]
    assert [record.getMessage().startswith("/metrics is a route") for record in caplog.records] == [True]


def test_the_path_may_be_moved_or_switched_off_and_is_relative_to_the_root_path() -> None:
    """An empty path is none."""
    moved, _ = hardened(path="/-/metrics")
    assert moved.get("/-/metrics").status_code == 200
    assert moved.get("/metrics").status_code == 404
    off, _ = hardened(path="")
    assert off.get("/metrics").status_code == 404
    client, _ = hardened()
    below = TestClient(client.app, root_path="/api")
    assert "http_requests" in below.get("/metrics").text
    assert "http_requests" in below.get("/api/metrics").text


# --- a port of their own ----------------------------------------------------------------------------------------------


@pytest.fixture
def port() -> Iterator[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number: int = free.getsockname()[1]
    yield number
    # The client library leaves the sockets of answered connections to the collector.
    gc.collect()


def test_a_port_of_their_own_is_open_while_the_application_runs(port: int) -> None:
    """The path is not served then."""
    client, _ = hardened(port=port)
    address = f"http://127.0.0.1:{port}/metrics"
    with client:
        client.get("/api/items/1")
        assert client.get("/metrics").status_code == 404
        with urllib.request.urlopen(address) as answer:
            assert b'http_requests_total{handler="/api/items/{id}"' in answer.read()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(address)


def test_a_port_that_is_taken_is_told_and_stops_nothing(port: int, caplog: pytest.LogCaptureFixture) -> None:
    """An application without metrics still serves."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        client, _ = hardened(port=port)
        with client:
            assert client.get("/api/items/1").status_code == 200
    assert [record.levelname for record in caplog.records if record.name == "fastapi_hardening.metrics"] == ["ERROR"]


# --- several processes ------------------------------------------------------------------------------------------------

WORKER = """
from fastapi_hardening.observability.metrics import Recorder
recorder = Recorder(build={"service": "shop"})
recorder.requests.record("GET", "/", 200, seconds=0.02, request_bytes=5)
recorder.enter()
"""


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes this process one of several, as the environment of its server would."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    KEPT.append(values.MultiProcessValue())  # type: ignore[no-untyped-call]
    monkeypatch.setattr(values, "ValueClass", KEPT[-1])
    return tmp_path


# The client library never closes the files of a process while it lives; collected earlier they would warn.
KEPT: list[Any] = []


def test_several_processes_are_read_as_one(directory: Path) -> None:
    """Counts and requests in progress are added; what runs here is told once."""
    subprocess.run([sys.executable, "-c", WORKER], check=True, cwd=Path(__file__).parents[2])
    recorder = Recorder(MetricsSettings(status_classes=False), build={"service": "shop"})
    client = TestClient(MetricsMiddleware(PlainTextResponse("ok"), recorder=recorder, guard=allow_everybody))
    client.get("/")
    answer = client.get("/metrics", headers={"accept": "application/openmetrics-text"})
    assert answer.headers["content-type"] == PLAIN
    samples = samples_of(parse_plain(answer.text))
    assert samples["http_request_duration_highr_seconds_count", ()] == 2
    assert samples["http_request_size_bytes_sum", (("handler", "/"),)] == 5
    assert samples["http_requests_inprogress", ()] == 1
    assert [value for (name, _), value in samples.items() if name == "hardening_build_info"] == [1]
    assert ("http_requests_total", (("handler", "none"), ("method", "GET"), ("status", "200"))) in samples


def test_a_process_that_ends_no_longer_counts_as_live(directory: Path, port: int) -> None:
    """Its counts stay, its requests in progress go; another worker that has the port is no error."""
    recorder = Recorder(MetricsSettings(port=port))
    assert isinstance(recorder.requests, SharedTally)
    recorder.requests.record("GET", "/", 200, seconds=0)
    recorder.enter()
    with recorder.serving(), recorder.serving():
        assert value(recorder, "http_requests_inprogress") == 1
    assert value(recorder, "http_requests_inprogress") is None
    assert value(recorder, "http_requests_total", method="GET", handler="/", status="2xx") == 1


def test_a_directory_that_cannot_be_used_is_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else nothing would be shown, without a word."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigurationError, match="make it, empty"):
        Recorder()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    with pytest.raises(ConfigurationError, match="environment of the server"):
        Recorder()
    assert not Recorder(MetricsSettings(enabled=False)).multiprocess


# --- functions for the instrumentator ---------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["own", "instrumentator"])
def test_functions_written_for_the_instrumentator_work(engine: Any) -> None:
    """Plain ones, async ones and those of its own module, with what they look at."""
    told: list[Info] = []

    async def later(info: Info) -> None:
        told.append(info)

    client, recorder = hardened(engine=engine, instrumentations=[told.append, later])
    assert recorder.add(metrics.requests(metric_name="extra_total", registry=recorder.registry), None) is recorder
    client.get("/api/items/7", headers={"x-plan": "gold"})
    assert value(recorder, "extra_total", handler="/api/items/{id}", method="GET", status="2xx") == 1
    assert value(recorder, "http_requests_total", handler="/api/items/{id}", method="GET", status="2xx") == 1
    assert len(told) == 2
    for info in told:
        assert (info.method, info.modified_handler, info.modified_status) == ("GET", "/api/items/{id}", "2xx")
        assert info.response is not None
        assert info.response.headers["content-type"] == "application/json"
        assert (info.request.headers["x-plan"], info.request.url.path) == ("gold", "/api/items/7")
        assert 0 <= info.modified_duration_without_streaming <= info.modified_duration


def test_a_function_that_fails_is_logged_and_reaches_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """The answer is sent already; the next function is called."""
    told: list[Info] = []

    def failing(info: Info) -> None:
        raise RuntimeError

    client, _ = hardened(instrumentations=[failing, told.append])
    assert client.get("/api/items/7").status_code == 200
    assert len(told) == 1
    assert "a function added to the metrics failed" in caplog.text


# --- the instrumentator as the oracle ---------------------------------------------------------------------------------

REQUESTS: tuple[tuple[str, str, bytes], ...] = (
    ("GET", "/api/items/7", b""),
    ("GET", "/api/items/8", b""),
    ("DELETE", "/api/items/7", b""),
    ("HEAD", "/api/items/7", b""),
    ("OPTIONS", "/echo", b""),
    ("POST", "/echo", b"hello"),
    ("POST", "/echo", b""),
    ("GET", "/stream", b""),
    ("GET", "/child/7", b""),
    ("GET", "/child/7/8", b""),
    ("GET", "/opaque", b""),
    ("GET", "/opaque/7", b""),
    ("GET", "/nothing/7", b""),
    ("GET", "/broken", b""),
    ("GET", "/docs", b""),
    ("GET", "/openapi.json", b""),
)
DIFFERENT: tuple[tuple[str, str, bytes], ...] = (("GET", "/api/items/7/", b""), ("FOO1", "/api/items/7", b""))


def asked(client: TestClient, requests: Iterable[tuple[str, str, bytes]]) -> None:
    for method, path, body in requests:
        client.request(method, path, content=body, follow_redirects=False)


def comparable(samples: Samples) -> Samples:
    """Without times, and without what only one of them has."""
    return {
        (name, labels): number
        for (name, labels), number in samples.items()
        if name.startswith("http_") and not name.endswith(("_bucket", "seconds_sum", "_inprogress"))
    }


def packages(requests: Iterable[tuple[str, str, bytes]], **options: Any) -> Samples:
    """What the package records, as its documentation says to use it."""
    registry = CollectorRegistry()
    app = routes(FastAPI())
    Instrumentator(registry=registry, **options).instrument(app)
    asked(TestClient(app, raise_server_exceptions=False), requests)
    return samples_of(registry.collect())


@pytest.mark.parametrize("engine", ["own", "instrumentator"])
@pytest.mark.parametrize("classes", [True, False])
def test_the_same_requests_give_the_same_series_as_the_package(engine: Any, classes: bool) -> None:
    """Names, labels, counts and sizes; the bounds of the buckets too."""
    theirs = packages(REQUESTS, should_group_status_codes=classes)
    client, recorder = hardened(engine=engine, status_classes=classes)
    asked(client, REQUESTS)
    ours = scraped(recorder)
    assert comparable(ours) == comparable(theirs)
    assert {key for key in ours if key[0].endswith("seconds_bucket")} == {
        key for key in theirs if key[0].endswith("seconds_bucket")
    }


@pytest.mark.parametrize("engine", ["own", "instrumentator"])
def test_where_the_package_shows_what_a_client_made_up_both_engines_do_not(engine: Any) -> None:
    """A path that is redirected, and a method that is none."""
    theirs = {dict(labels)["handler"] for name, labels in packages(DIFFERENT) if name == "http_requests_total"}
    assert theirs == {"/api/items/7/", "/api/items/{id}"}
    client, recorder = hardened(engine=engine)
    asked(client, DIFFERENT)
    ours = {labels for name, labels in scraped(recorder) if name == "http_requests_total"}
    item = ("handler", "/api/items/{id}")
    assert ours == {
        (item, ("method", "GET"), ("status", "3xx")),
        (item, ("method", "_OTHER"), ("status", "4xx")),
    }


@pytest.mark.parametrize("engine", ["own", "instrumentator"])
def test_a_length_that_is_none_breaks_no_answer(engine: Any) -> None:
    """The package alone raises after the answer was sent. The application still sees what was sent."""
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope["method"], dict(scope["headers"])[b"content-length"]))
        await PlainTextResponse("ok")(scope, receive, send)

    middleware = MetricsMiddleware(app, MetricsSettings(engine=engine))
    answered(middleware, method="GOT", headers=[(b"content-length", b"many")])
    assert seen == [("GOT", b"many")]
    assert value(middleware.recorder, "http_request_size_bytes_sum", handler="none") == 0


def test_every_layer_keeps_its_inner_application() -> None:
    """Others walk along ``.app``, such as FastAPI looking for tracing."""
    inner = PlainTextResponse("ok")
    for engine in ("own", "instrumentator"):
        app: Any = MetricsMiddleware(inner, MetricsSettings.model_validate({"engine": engine}))
        while app is not inner:
            app = app.app
