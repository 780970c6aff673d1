"""One server span a request: whose it is, what it says, when it ends, and that nobody else makes a second one."""

import asyncio
import json
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from fastapi import APIRouter, BackgroundTasks, FastAPI, HTTPException, WebSocket
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.instrumentation._semconv import _OpenTelemetrySemanticConventionStability as Conventions
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased, Sampler
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.types import Message, Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect

from fastapi_hardening import ConfigurationError, Settings, harden
from fastapi_hardening.core.context import ensure
from fastapi_hardening.observability.tracing import Tracing, TracingMiddleware, TracingSettings, export, span
from fastapi_hardening.observability.tracing.export import provider_from_environment
from fastapi_hardening.observability.tracing.span import FIELDS, Attributes

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
ENGINES = ("own", "instrumentation", "native")


class Spans(InMemorySpanExporter):
    """Keeps what was exported by a provider of its own."""

    def __init__(self, sampler: Sampler = ALWAYS_ON) -> None:
        super().__init__()
        self.provider = TracerProvider(sampler=sampler, shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self))

    @property
    def servers(self) -> list[ReadableSpan]:
        """The server spans, in the order in which they ended."""
        return [span for span in self.get_finished_spans() if span.kind is trace.SpanKind.SERVER]

    @property
    def one(self) -> ReadableSpan:
        """The only span that there is, of any kind."""
        (span,) = self.get_finished_spans()
        return span


@pytest.fixture
def spans() -> Spans:
    """Give a provider that nobody else has, and what it exports."""
    return Spans()


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what the package does to the whole process: its conventions, and a method of background tasks."""
    monkeypatch.delenv("OTEL_SEMCONV_STABILITY_OPT_IN", raising=False)
    monkeypatch.setenv("OTEL_SEMCONV_STABILITY_OPT_IN", "http")
    monkeypatch.setattr(Conventions, "_initialized", False)
    mapping = dict(Conventions._OTEL_SEMCONV_STABILITY_SIGNAL_MAPPING)
    yield
    Conventions._OTEL_SEMCONV_STABILITY_SIGNAL_MAPPING = mapping
    original: Any = getattr(BackgroundTask, "_otel_original_call", None)
    if original is not None:
        BackgroundTask.__call__ = original  # type: ignore[method-assign]
        del BackgroundTask._otel_original_call  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def usual_site() -> tuple[Spans, TestClient]:
    """Give an application with the default settings, for all tests that change nothing about it."""
    spans = Spans()
    return spans, client_of(spans)


@pytest.fixture
def usual(usual_site: tuple[Spans, TestClient]) -> tuple[Spans, TestClient]:
    """Give that application, with nothing exported yet."""
    usual_site[0].clear()
    return usual_site


@pytest.fixture(scope="module")
def both() -> Iterator[list[tuple[Spans, TestClient]]]:
    """Give the same application traced by this layer and by the package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_SEMCONV_STABILITY_OPT_IN", "http")
        patch.setattr(Conventions, "_initialized", False)
        found = []
        for engine in ("own", "instrumentation"):
            spans = Spans()
            found.append((spans, client_of(spans, engine=engine)))
            found[-1][1].get("/nothing")
        yield found


def make_app(**arguments: Any) -> FastAPI:
    """An application with routes of every kind, not hardened."""
    app = FastAPI(**arguments)
    router = APIRouter()

    @router.get("/items/{id}")
    @router.post("/items/{id}", status_code=201)
    async def item(id: int) -> int:  # noqa: A002
        return id

    @app.get("/boom")
    async def boom() -> None:
        raise ValueError("boom")

    @app.get("/busy")
    async def busy() -> None:
        raise HTTPException(503)

    @app.websocket("/ws/{id}")
    async def socket(websocket: WebSocket, id: int) -> None:  # noqa: A002
        if id == 0:
            raise ValueError("none")
        await websocket.accept()
        if id == 1:
            raise RuntimeError("one")
        await websocket.send_text("hello")
        await websocket.close(1000 if id == 2 else 1011)

    app.include_router(router, prefix="/api")
    child = FastAPI()
    child.include_router(router)
    app.mount("/shop", child)
    return app


def client_of(spans: Spans, **keys: Any) -> TestClient:
    """Gives a client of the application, hardened."""
    app = make_app()
    harden(app, Settings(tracing=keys), tracer_provider=spans.provider)
    return TestClient(app, raise_server_exceptions=False)


# --- what a span says -------------------------------------------------------------------------------------------------

TABLE = (
    ("GET", "/api/items/7"),
    ("HEAD", "/api/items/7"),
    ("POST", "/api/items/7?color=red&size="),
    ("GET", "/api/items/seven"),
    ("GET", "/nothing"),
    ("DELETE", "/api/items/7"),
    ("BREW", "/boom"),
    ("GET", "/boom"),
    ("GET", "/busy"),
    ("GET", "/docs"),
    ("OPTIONS", "/busy"),
)

# What only the own engine tells, on purpose.
OURS = {"network.peer.address", "network.peer.port"}


def told(span: ReadableSpan) -> tuple[Any, ...]:
    """What two engines should say alike."""
    attributes = {name: value for name, value in (span.attributes or {}).items() if name not in OURS}
    return span.name, span.kind, span.status.status_code, attributes


@pytest.mark.parametrize(("method", "path"), TABLE, ids=lambda value: value.replace("/", "_"))
def test_own_span_says_what_the_package_says(both: list[tuple[Spans, TestClient]], method: str, path: str) -> None:
    """The package is the oracle: the same name, kind, attributes and status, whatever is asked."""
    found = []
    for spans, client in both:
        spans.clear()
        client.request(method, path, headers={"User-Agent": "curl/8"})
        found.append(told(spans.one))
    assert found[0] == found[1]


def test_a_span_is_named_by_the_whole_template(usual: tuple[Spans, TestClient]) -> None:
    """Below mounts too, where the package says the mount; also for what is redirected; never by the raw path."""
    spans, client = usual
    for path in ("/shop/items/3", "/api/items/3/", "/etc/passwd"):
        client.get(path, follow_redirects=False)
    assert [span.name for span in spans.servers] == ["GET /shop/items/{id}", "GET /api/items/{id}", "GET"]


def test_the_query_is_told_without_its_credentials(spans: Spans) -> None:
    """A trace is read by more people than may log in."""
    client_of(spans, redact=["voucher"]).get("/busy?page=2&token=abc&my_voucher=x")
    assert (spans.one.attributes or {})["url.query"] == "page=2&token=[redacted]&my_voucher=[redacted]"


def test_the_query_may_be_left_out(spans: Spans) -> None:
    """Where it holds what must not be kept."""
    client_of(spans, include_query=False).get("/busy?page=2")
    assert "url.query" not in (spans.one.attributes or {})


def test_the_client_is_who_the_proxy_says(spans: Spans) -> None:
    """Behind a trusted proxy; the socket's peer is told as such."""
    app = make_app()
    harden(app, Settings(trusted_proxies=["10.0.0.0/8"]), tracer_provider=spans.provider)
    headers = {"X-Forwarded-For": "203.0.113.9", "X-Forwarded-Proto": "https"}
    TestClient(app, client=("10.0.0.1", 4711)).get("/nothing", headers=headers)
    attributes = spans.one.attributes or {}
    assert attributes["client.address"] == "203.0.113.9"
    assert attributes["network.peer.address"] == "10.0.0.1"
    assert attributes["url.scheme"] == "https"
    assert "client.port" not in attributes


@pytest.mark.parametrize("record", [True, False])
@pytest.mark.parametrize("reraise", [True, False])
def test_an_unhandled_exception_is_on_its_span(spans: Spans, *, reraise: bool, record: bool) -> None:
    """Though it comes after the last byte of the 500; with its message only where that is wanted."""
    app = make_app()
    settings = Settings(errors={"reraise": reraise}, tracing={"record_exceptions": record})
    harden(app, settings, tracer_provider=spans.provider)
    TestClient(app, raise_server_exceptions=False).get("/boom")
    span = spans.one
    assert span.status.status_code is trace.StatusCode.ERROR
    assert (span.attributes or {})["error.type"] == "500"
    assert [event.name for event in span.events] == (["exception"] if record else [])


def test_a_refusal_has_a_span_and_a_probe_has_none(spans: Spans) -> None:
    """The layer is above what refuses, and below the probes."""
    app = make_app()
    harden(app, Settings(rate_limit={"default": "1/hour"}), tracer_provider=spans.provider)
    client = TestClient(app)
    for path in ("/livez", "/readyz", "/health", "/metrics", "/api/items/1", "/api/items/1"):
        client.get(path)
    codes = [(span.name, (span.attributes or {})["http.response.status_code"]) for span in spans.servers]
    assert codes == [("GET /api/items/{id}", 200), ("GET /api/items/{id}", 429)]
    assert all(span.status.status_code is trace.StatusCode.UNSET for span in spans.servers)


# --- whose trace it is ------------------------------------------------------------------------------------------------


def test_the_trace_of_the_caller_is_continued(usual: tuple[Spans, TestClient]) -> None:
    """W3C Trace Context: its trace, its span as the parent, its state."""
    spans, client = usual
    client.get("/nothing", headers={"traceparent": TRACEPARENT, "tracestate": "rojo=1,congo=2"})
    context, parent = spans.one.context, spans.one.parent
    assert context is not None
    assert parent is not None
    assert (format(context.trace_id, "032x"), format(parent.span_id, "016x")) == (TRACE, PARENT)
    assert context.trace_state == {"rojo": "1", "congo": "2"}


@pytest.mark.parametrize(
    "traceparent",
    [
        "00-" + "0" * 32 + f"-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"{TRACEPARENT}-more",
        f"00-{TRACE}-{PARENT}",
        "nonsense",
        "",
    ],
)
def test_an_invalid_traceparent_restarts_the_trace(usual: tuple[Spans, TestClient], traceparent: str) -> None:
    """What is malformed is not half believed."""
    spans, client = usual
    client.get("/nothing", headers={"traceparent": traceparent})
    context = spans.one.context
    assert spans.one.parent is None
    assert context is not None
    assert format(context.trace_id, "032x") != TRACE


@given(
    st.lists(
        st.tuples(
            st.sampled_from([b"traceparent", b"tracestate", b"baggage"]),
            st.binary(max_size=60) | st.just(TRACEPARENT.encode()) | st.from_regex(rb"[a-z0-9]{1,9}=[!-~]{0,9},?"),
        ),
        max_size=4,
    ),
    st.binary(max_size=20),
)
@settings(max_examples=40, deadline=None)
def test_whatever_is_sent_there_is_one_span_of_one_trace(headers: list[tuple[bytes, bytes]], query: bytes) -> None:
    """No header field breaks a request, and none makes a trace that is none."""
    spans = Spans()
    scope = {"type": "http", "method": "GET", "path": "/", "headers": headers, "query_string": query}
    asyncio.run(TracingMiddleware(_answer, provider=spans.provider)(scope, _never, _ignore))
    context = spans.one.context
    assert context is not None
    assert context.is_valid
    continued = [value for name, value in headers if name == b"traceparent"] == [TRACEPARENT.encode()]
    assert not continued or format(context.trace_id, "032x") == TRACE


def test_two_traceparents_are_none(usual: tuple[Spans, TestClient]) -> None:
    """It would be left to the client which of them counts; the log line names the trace that there is."""
    headers = [("traceparent", TRACEPARENT), ("traceparent", TRACEPARENT)]
    spans, client = usual
    client.get("/nothing", headers=headers)
    assert spans.one.parent is None


def test_a_caller_who_is_not_trusted_is_linked(
    spans: Spans, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """A new trace begins, so that nobody outside decides what is sampled; the log line names the new one."""
    with caplog.at_level(logging.INFO, "fastapi_hardening.access"):
        answer = client_of(spans, trust_incoming=False).get("/nothing", headers={"traceparent": TRACEPARENT})
    span = spans.one
    assert span.parent is None
    assert span.context is not None
    (link,) = span.links
    assert format(link.context.trace_id, "032x") == TRACE
    own = format(span.context.trace_id, "032x")
    assert answer.json()["trace_id"] == own
    assert [vars(record)["trace_id"] for record in caplog.records if "trace_id" in vars(record)] == [own]


def test_a_caller_who_is_not_trusted_and_says_nonsense_is_not_linked(spans: Spans) -> None:
    """A link to nothing says nothing."""
    client_of(spans, trust_incoming=False).get("/nothing", headers={"traceparent": "nonsense"})
    assert (spans.one.parent, list(spans.one.links)) == (None, [])


def test_baggage_on_several_lines_is_read_whole(spans: Spans) -> None:
    """RFC 9110: lines of one name are one list."""
    from opentelemetry import baggage  # noqa: PLC0415

    app = FastAPI()

    @app.get("/")
    async def index() -> Any:
        return dict(baggage.get_all())

    harden(app, tracer_provider=spans.provider)
    answer = TestClient(app).get("/", headers=[("baggage", "a=1"), ("baggage", "b=2")])
    assert answer.json() == {"a": "1", "b": "2"}


@pytest.mark.parametrize("engine", ENGINES)
def test_log_line_problem_and_exemplar_name_the_trace(
    spans: Spans, engine: str, caplog: pytest.LogCaptureFixture
) -> None:
    """From any of them the trace can be found, whichever engine makes it."""
    app = make_app()
    settings = Settings(tracing={"engine": engine}, metrics={"token": "0123456789abcdef"})
    harden(app, settings, tracer_provider=spans.provider)
    client = TestClient(app)
    with caplog.at_level(logging.INFO, "fastapi_hardening.access"):
        answer = client.get("/busy")
    context = spans.one.context
    assert context is not None
    named = format(context.trace_id, "032x")
    assert answer.json()["trace_id"] == named
    assert [vars(record).get("trace_id") for record in caplog.records if record.name.endswith("access")] == [named]
    headers = {"Authorization": "Bearer 0123456789abcdef", "Accept": "application/openmetrics-text;version=1.0.0"}
    assert f'trace_id="{named}"' in client.get("/metrics", headers=headers).text


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_a_request_that_is_not_sampled_costs_no_attributes(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are found out when they are read; and what the endpoint begins is not sampled either."""
    read: list[object] = []
    monkeypatch.setattr(span, "attributes_of", lambda *_arguments, **_: read.append(1))
    spans, inside = Spans(ParentBased(ALWAYS_OFF)), []
    app = FastAPI()

    @app.get("/")
    async def index() -> None:
        with spans.provider.get_tracer("test").start_as_current_span("inside") as span:
            inside.append(span.is_recording())

    harden(app, tracer_provider=spans.provider)
    assert TestClient(app).get("/").status_code == 200
    assert (inside, read, spans.get_finished_spans()) == ([False], [], ())


def test_a_sampler_may_read_the_attributes() -> None:
    """Those that the conventions want at the start are there for it, and are found out once."""
    scope: Scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"user-agent", b"x")]}
    context = ensure(scope)
    attributes = Attributes(scope, context, None)
    assert attributes["url.path"] == "/"
    assert len(attributes) == len(list(attributes))
    assert attributes._all() is attributes._all()


# --- when it ends -----------------------------------------------------------------------------------------------------


def test_a_stream_has_one_span_that_ends_with_its_last_byte(spans: Spans) -> None:
    """Not with the first one, and not with what is done in the background afterwards."""
    app, open_while = FastAPI(), []

    @app.get("/")
    async def stream(background: BackgroundTasks) -> StreamingResponse:
        background.add_task(lambda: open_while.append(("background", len(spans.servers))))

        async def parts() -> AsyncIterator[str]:
            for part in ("one", "two"):
                open_while.append((part, len(spans.servers)))
                yield part

        return StreamingResponse(parts(), background=background)

    harden(app, tracer_provider=spans.provider)
    assert TestClient(app).get("/").text == "onetwo"
    assert open_while == [("one", 0), ("two", 0), ("background", 1)]
    assert len(spans.get_finished_spans()) == 1


def serve(app: Any, spans: Spans, kind: str = "http", **settings: Any) -> list[Message]:
    """Serves one request to an application as a server does, without a client in between; gives what was sent."""
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": kind, "method": "GET", "path": "/", "headers": [], "scheme": "http"}
    layer = TracingMiddleware(app, TracingSettings(**settings), provider=spans.provider)
    asyncio.run(layer(scope, receive, send))
    return sent


START: dict[str, Any] = {"type": "http.response.start", "status": 200, "headers": []}
BODY: dict[str, Any] = {"type": "http.response.body", "body": b""}


@pytest.mark.parametrize(
    "messages",
    [
        [START, {"type": "http.response.pathsend", "path": "/x"}],
        [START | {"trailers": True}, BODY, {"type": "http.response.trailers", "headers": []}],
        [START, BODY | {"more_body": True}, BODY],
    ],
    ids=["file", "trailers", "parts"],
)
def test_a_span_ends_with_the_last_message(spans: Spans, messages: list[Message]) -> None:
    """Whatever the last one is: a part, a file for the server to send, or trailers."""

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        for message in messages:
            assert spans.get_finished_spans() == ()
            await send(message)
        assert len(spans.get_finished_spans()) == 1

    assert serve(app, spans) == messages


@pytest.mark.parametrize(
    ("messages", "raised", "error"),
    [
        ([], None, None),
        ([START], None, None),
        ([], ValueError("x"), "ValueError"),
        ([START], OSError("gone"), "OSError"),
        ([], asyncio.CancelledError(), "CancelledError"),
        ([START, BODY], ValueError("in the background"), None),
    ],
    ids=["nothing", "broken off", "raised", "raised in between", "cancelled", "raised afterwards"],
)
def test_an_answer_that_breaks_off_ends_the_span(
    spans: Spans, messages: list[Message], raised: BaseException | None, error: str | None
) -> None:
    """What went wrong is its error; what comes after the last byte is none of it."""

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)
        if raised is not None:
            raise raised

    if raised is None:
        serve(app, spans)
    else:
        with pytest.raises(type(raised)):
            serve(app, spans)
    assert (spans.one.attributes or {}).get("error.type") == error
    assert spans.one.status.is_ok is (error is None) or spans.one.status.status_code is trace.StatusCode.UNSET


def test_after_the_request_nothing_of_it_is_current(spans: Spans) -> None:
    """A later request of the same task does not become its child."""

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send(START)
        await send(BODY)

    async def twice() -> None:
        layer = TracingMiddleware(app, provider=spans.provider)
        for _ in range(2):
            scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
            await layer(scope, _never, _ignore)
            assert trace.get_current_span() is trace.INVALID_SPAN

    asyncio.run(twice())
    assert [span.parent for span in spans.servers] == [None, None]


async def _never() -> Message:
    raise AssertionError("nobody asked")


async def _ignore(_message: Message) -> None:
    return


# --- websockets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "status", "error"),
    [("/ws/2", 101, None), ("/ws/3", 101, "1011"), ("/ws/1", 101, "RuntimeError"), ("/ws/0", 500, "ValueError")],
)
def test_a_websocket_has_one_span(usual: tuple[Spans, TestClient], path: str, status: int, error: str | None) -> None:
    """From the handshake to the end, with the status of the handshake, however many messages there are."""
    spans, client = usual

    def talk() -> None:
        with client.websocket_connect(path) as websocket:
            while True:
                websocket.receive_text()

    with pytest.raises((WebSocketDisconnect, RuntimeError, ValueError)):
        talk()
    attributes = spans.one.attributes or {}
    assert (spans.one.name, attributes["http.response.status_code"]) == ("GET /ws/{id}", status)
    assert attributes.get("error.type") == error
    assert attributes["url.scheme"] == "ws"


def test_a_websocket_that_nobody_takes_is_a_403(spans: Spans) -> None:
    """Closed before it was accepted, which is what a server answers then; a client that goes is no error."""

    async def closing(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "websocket.close", "code": 1000})
        raise WebSocketDisconnect(1001)

    with pytest.raises(WebSocketDisconnect):
        serve(closing, spans, "websocket")
    assert (spans.one.attributes or {})["http.response.status_code"] == 403
    assert spans.one.status.status_code is trace.StatusCode.UNSET


# --- exactly one ------------------------------------------------------------------------------------------------------


def hardened(app: FastAPI, spans: Spans, engine: str) -> FastAPI:
    """Hardens with an engine."""
    harden(app, Settings(tracing={"engine": engine}), tracer_provider=spans.provider)
    return app


def instrument(app: FastAPI, spans: Spans) -> FastAPI:
    """Instruments by the package, as its users do."""
    FastAPIInstrumentor.instrument_app(app, tracer_provider=spans.provider, exclude_spans=["receive", "send"])
    return app


def added(app: FastAPI, spans: Spans) -> FastAPI:
    """Adds the package's middleware, as its users on Starlette do."""
    app.add_middleware(OpenTelemetryMiddleware, tracer_provider=spans.provider, exclude_spans=["receive", "send"])
    return app


def in_hardened(app: FastAPI, spans: Spans, engine: str) -> FastAPI:
    """Mounts a hardened application in another one."""
    outer = FastAPI()
    outer.mount("/", hardened(app, spans, engine))
    return hardened(outer, spans, engine)


def in_starlette(app: FastAPI, spans: Spans, engine: str) -> Starlette:
    """Mounts a hardened application in one that is not, and has the package's middleware."""
    outer = Starlette()
    outer.mount("/", hardened(app, spans, engine))
    outer.add_middleware(OpenTelemetryMiddleware, tracer_provider=spans.provider, exclude_spans=["receive", "send"])
    return outer


WAYS: dict[str, Callable[[Spans, str], Any]] = {
    "alone": lambda spans, engine: hardened(make_app(), spans, engine),
    "instrumented before": lambda spans, engine: hardened(instrument(make_app(), spans), spans, engine),
    "instrumented after": lambda spans, engine: instrument(hardened(make_app(), spans, engine), spans),
    "middleware before": lambda spans, engine: hardened(added(make_app(), spans), spans, engine),
    "middleware after": lambda spans, engine: added(hardened(make_app(), spans, engine), spans),
    "telemetry given": lambda spans, engine: hardened(
        make_app(telemetry={"tracer_provider": spans.provider, "operation_spans": False}), spans, engine
    ),
    "in hardened": lambda spans, engine: in_hardened(make_app(), spans, engine),
    "in starlette": lambda spans, engine: in_starlette(make_app(), spans, engine),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("way", WAYS)
def test_exactly_one_span_is_made(spans: Spans, way: str, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else is switched on, before or after, inside or outside; with a global provider, which FastAPI sees."""
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", spans.provider)
    client = TestClient(WAYS[way](spans, engine))
    client.get("/api/items/1")
    client.get("/shop/items/2")
    answered = [(span.attributes or {})["url.path"] for span in spans.get_finished_spans()]
    assert answered == ["/api/items/1", "/shop/items/2"]


def test_an_engine_of_the_application_is_told(spans: Spans) -> None:
    """So that nobody looks for the spans where they do not come from."""
    given = make_app(telemetry={"tracer_provider": spans.provider})
    handle = harden(given, tracer_provider=spans.provider)
    assert handle.tracing.emitter == "application"
    inside = instrument(make_app(), spans)
    later = harden(inside, tracer_provider=spans.provider)
    emitters = [later.tracing.emitter]
    TestClient(inside).get("/nothing")
    assert [*emitters, later.tracing.emitter] == ["own", "application"]


def test_without_a_provider_nothing_is_made() -> None:
    """No span, no context, no header field: silent until somebody says where spans go."""
    seen: list[bool] = []
    app = FastAPI()

    @app.get("/")
    async def index() -> None:
        seen.append(trace.get_current_span() is trace.INVALID_SPAN)

    handle = harden(app, Settings(environment="development"))
    answer = TestClient(app).get("/", headers={"traceparent": TRACEPARENT})
    assert seen == [True]
    assert handle.tracing.provider is None
    assert "server-timing" not in answer.headers


def test_a_provider_that_comes_later_is_seen(spans: Spans, monkeypatch: pytest.MonkeyPatch) -> None:
    """An application may set OpenTelemetry up when it starts."""
    app = make_app()
    harden(app)
    client = TestClient(app)
    client.get("/nothing")
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", spans.provider)
    client.get("/nothing")
    assert len(spans.get_finished_spans()) == 1


def test_a_provider_that_comes_much_later_is_seen_too(spans: Spans, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that is silent for long looks seldom; one of the next requests has a span."""
    layer = TracingMiddleware(_answer)

    async def serve_some(number: int) -> None:
        for _ in range(number):
            await layer({"type": "http", "method": "GET", "path": "/", "headers": []}, _never, _ignore)

    asyncio.run(serve_some(100))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", spans.provider)
    asyncio.run(serve_some(64))
    assert spans.get_finished_spans()


def test_header_fields_are_listed_for_propagators() -> None:
    """Some look at all names for those with a prefix."""
    assert FIELDS.keys({"headers": [(b"uberctx-a", b"1")]}) == ["uberctx-a"]


def test_switched_off_it_leaves_fastapis_alone(spans: Spans, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who switches the concern off has another one."""
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", spans.provider)
    app = make_app()
    harden(app, Settings(tracing={"enabled": False}))
    TestClient(app).get("/nothing")
    assert [span.name for span in spans.servers] == ["GET"]


def test_switched_off_the_layer_alone_makes_nothing(spans: Spans) -> None:
    """Its switch works without harden() too."""

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send(START)

    serve(app, spans, enabled=False)
    serve(app, spans, kind="lifespan")
    assert spans.get_finished_spans() == ()


def test_native_makes_no_spans_of_probes_nor_of_its_steps(spans: Spans) -> None:
    """FastAPI's own telemetry is outside of everything, so it is told what a probe is."""
    client = client_of(spans, engine="native")
    for path in ("/livez", "/readyz", "/api/items/1"):
        client.get(path)
    assert [span.name for span in spans.get_finished_spans()] == ["GET /api/items/{id}"]


def test_native_needs_a_fastapi_that_has_it() -> None:
    """Older ones have no telemetry; the sentence says which one does."""
    with pytest.raises(ConfigurationError, match=r"needs FastAPI 0\.142"):
        Tracing(TracingSettings(engine="native")).settle(Starlette())
    Tracing().settle(Starlette())


def test_a_span_that_somebody_continued_already_is_the_parent(spans: Spans) -> None:
    """A middleware outside may extract the caller's context itself; that is no span of this request."""
    from opentelemetry import context, propagate  # noqa: PLC0415

    layer = TracingMiddleware(_answer, provider=spans.provider)

    async def outside(scope: Scope) -> None:
        token = context.attach(propagate.extract({"traceparent": TRACEPARENT}))
        await layer(scope, _never, _ignore)
        context.detach(token)

    asyncio.run(outside({"type": "http", "method": "GET", "path": "/", "headers": []}))
    parent = spans.one.parent
    assert parent is not None
    assert format(parent.span_id, "016x") == PARENT


async def _answer(_scope: Scope, _receive: Receive, send: Send) -> None:
    await send(START)
    await send(BODY)


def test_a_route_that_a_middleware_chose_is_the_one_that_is_told(spans: Spans) -> None:
    """The span names the endpoint that ran."""

    class Rewriting:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            if scope["path"] == "/old":
                scope["path"] = "/api/items/5"
            await self.app(scope, receive, send)

    app = make_app()
    app.add_middleware(Rewriting)
    harden(app, tracer_provider=spans.provider)
    TestClient(app).get("/old")
    assert spans.one.name == "GET /api/items/{id}"
    assert (spans.one.attributes or {})["http.route"] == "/api/items/{id}"


# --- the browser ------------------------------------------------------------------------------------------------------


def test_server_timing_tells_the_trace_where_it_is_on(spans: Spans) -> None:
    """So that monitoring in the browser finds it; off in production, on in development."""
    client = client_of(spans, server_timing=True)
    answer = client.get("/api/items/1")
    context = spans.one.context
    assert context is not None
    assert answer.headers["server-timing"] == (
        f'traceparent;desc="00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags & 255:02x}"'
    )
    assert "server-timing" not in client_of(Spans()).get("/api/items/1").headers
    assert Settings(environment="development").tracing.server_timing


# --- where spans go ---------------------------------------------------------------------------------------------------


class Receiver(HTTPServer):
    """Takes spans as an OTLP collector does."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), self.Handler)
        self.requests: list[ExportTraceServiceRequest] = []

    class Handler(BaseHTTPRequestHandler):
        """Decodes what is posted."""

        def do_POST(self) -> None:
            assert isinstance(self.server, Receiver)
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.path == "/v1/traces":
                self.server.requests.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_arguments: Any) -> None:
            """Say nothing."""


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """Give a collector that listens."""
    with Receiver() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def no_otel(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Give an environment in which OpenTelemetry is told nothing, and has no global provider."""
    for name in [name for name in os.environ if name.startswith("OTEL_") and "SEMCONV" not in name]:
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize("named", [None, "till"])
def test_an_endpoint_in_the_environment_is_enough(
    receiver: Receiver, no_otel: pytest.MonkeyPatch, named: str | None
) -> None:
    """The SDK is set up with the service's name, and what waits is sent at the end, where a lifespan runs or not."""
    no_otel.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{receiver.server_port}")
    if named:
        no_otel.setenv("OTEL_SERVICE_NAME", named)
    set_globally: list[Any] = []

    def set_provider(provider: Any) -> None:
        set_globally.append(provider)
        no_otel.setattr(trace, "_TRACER_PROVIDER", provider)

    no_otel.setattr(trace, "set_tracer_provider", set_provider)
    app = make_app(title="Shop")
    harden(app)
    with TestClient(app) if named else nullcontext(TestClient(app)) as client:
        client.get("/api/items/1", headers={"traceparent": TRACEPARENT})
    set_globally[0].shutdown()
    (resource,) = receiver.requests[0].resource_spans
    attributes = {each.key: each.value.string_value for each in resource.resource.attributes}
    (span,) = resource.scope_spans[0].spans
    assert attributes["service.name"] == (named or "Shop")
    assert (span.name, span.trace_id.hex(), span.parent_span_id.hex()) == ("GET /api/items/{id}", TRACE, PARENT)
    assert resource.scope_spans[0].scope.name == "fastapi_hardening"


@pytest.mark.parametrize(
    ("environment", "warned"),
    [
        ({}, ""),
        ({"OTEL_TRACES_EXPORTER": "none"}, ""),
        ({"OTEL_SDK_DISABLED": "true"}, ""),
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "may be otlp or none"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"}, "may be otlp or none"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "pip install 'opentelemetry-exporter-otlp-proto-grpc'"),
    ],
)
def test_what_the_environment_cannot_have_is_said(
    no_otel: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, environment: dict[str, str], warned: str
) -> None:
    """An application does not fail to start because of where its traces should go; the log says what to do."""
    for name, value in ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"} if environment else {}).items():
        no_otel.setenv(name, value)
    for name, value in environment.items():
        no_otel.setenv(name, value)
    assert provider_from_environment("Shop") is None
    assert warned in caplog.text
    assert bool(caplog.text) is bool(warned)


def test_without_the_extra_the_log_says_which(no_otel: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """An endpoint that is set, and nothing that could send, is told once."""

    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    no_otel.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://127.0.0.1:1")
    no_otel.setattr(export, "import_module", missing)
    both = Tracing()
    both.start()
    both.start()
    asyncio.run(both.stop())
    assert caplog.text.count("pip install 'fastapi-hardening[otlp]'") == 1
    assert Tracing(TracingSettings(export=False)).start() is None  # type: ignore[func-returns-value]


def test_openapi_describes_the_trace_of_a_problem() -> None:
    """Clients may show it to their users."""
    app = make_app()
    harden(app)
    assert '"trace_id"' in json.dumps(app.openapi())
