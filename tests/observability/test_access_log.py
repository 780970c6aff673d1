"""One line a request: what is in it, what is not, and when it is written."""

import asyncio
import io
import json
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import APIRouter, BackgroundTasks, FastAPI, Request, WebSocket
from fastapi.responses import StreamingResponse
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import TracerProvider
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from fastapi_hardening.core import context as request_context
from fastapi_hardening.core.clock import ManualClock
from fastapi_hardening.core.log_handlers import QueuedHandler
from fastapi_hardening.core.logs import JsonFormatter
from fastapi_hardening.observability.access_log import (
    AccessLog,
    AccessLogMiddleware,
    AccessLogSettings,
    HttpExchange,
    WebSocketExchange,
    configure_logging,
)
from fastapi_hardening.observability.request_context import RequestContextMiddleware

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


class Lines(logging.Handler):
    """Keeps the lines of the access log."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JsonFormatter())
        self.records: list[logging.LogRecord] = []
        self.all: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        self.all.append(json.loads(self.format(record)))

    @property
    def one(self) -> dict[str, Any]:
        (line,) = self.all
        return line


@contextmanager
def kept() -> Iterator[Lines]:
    """Keeps what the access log writes meanwhile."""
    handler = Lines()
    logger = logging.getLogger("fastapi_hardening.access")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture
def lines() -> Iterator[Lines]:
    """Gives what the access log writes."""
    with kept() as handler:
        yield handler


Application = Callable[[Any, Any, Any], Awaitable[None]]


def served(
    app: Application, *messages: dict[str, Any], settings: AccessLogSettings | None = None, **scope: Any
) -> list[Any]:
    """Lets the layer serve one connection, which says these messages and then nothing; gives what was sent."""
    sent: list[Any] = []
    incoming = iter(messages)

    async def receive() -> Any:
        message = next(incoming, None)
        if message is None:
            await asyncio.Event().wait()
        return message

    async def send(message: Any) -> None:
        sent.append(message)

    whole = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": []} | scope
    asyncio.run(AccessLogMiddleware(app, settings or AccessLogSettings())(whole, receive, send))
    return sent


SCOPE: dict[str, Any] = {"type": "http", "method": "GET", "headers": []}
START = {"type": "http.response.start", "status": 200, "headers": []}
END = {"type": "http.response.body", "body": b"{}"}


async def answers(scope: Any, receive: Any, send: Any) -> None:
    await send(START)
    await send(END)


# --- engine -----------------------------------------------------------------------------------------------------------


def write_one(
    exchange: HttpExchange,
    *,
    chance: float = 0.5,
    principal: Any = None,
    scope: dict[str, Any] | None = None,
    **settings: Any,
) -> None:
    exchange.scope = SCOPE | (scope or {})
    exchange.context = request_context.ensure(exchange.scope)
    exchange.context.principal = principal
    log = AccessLog(AccessLogSettings(**settings), clock=ManualClock(epoch=1.5), chance=lambda: chance)
    log.write(exchange)
    # Once is enough.
    log.write(exchange)


def exchange(status: int = 200, *, seconds: float = 0.0, kind: type[HttpExchange] = HttpExchange) -> HttpExchange:
    clock = ManualClock()
    made = kind(clock.monotonic, request_context.ensure({}), SCOPE)
    clock.advance(seconds)
    made.sent(START | {"status": status})
    made.sent(END)
    return made


def test_times_are_those_of_the_answer_not_of_what_comes_after(lines: Lines) -> None:
    """To the first and to the last byte, in milliseconds."""
    clock = ManualClock()
    made = HttpExchange(clock.monotonic, request_context.ensure({}), SCOPE)
    clock.advance(0.25)
    assert not made.sent(START)
    clock.advance(0.5)
    assert not made.sent({"type": "http.response.body", "body": b"abc", "more_body": True})
    clock.advance(0.25)
    assert made.sent(END)
    clock.advance(60)
    write_one(made)
    assert (lines.one["first_byte_ms"], lines.one["duration_ms"], lines.one["bytes_out"]) == (250.0, 1000.0, 5)
    assert lines.one["time"] == "1970-01-01T00:00:01.500Z"


@pytest.mark.parametrize(
    ("made", "written"),
    [
        (exchange(200), False),
        (exchange(304), False),
        (exchange(404), True),
        (exchange(503), True),
        (exchange(200, seconds=1.5), True),
        (HttpExchange(ManualClock().monotonic, request_context.ensure({}), SCOPE), True),
    ],
)
def test_sampling_leaves_out_only_what_went_well(made: HttpExchange, written: bool, lines: Lines) -> None:
    """Errors, slow answers and broken ones are always there."""
    write_one(made, sample_rate=0.25, chance=0.25)
    assert len(lines.all) == written
    write_one(exchange(200), sample_rate=0.25, chance=0.24)
    assert len(lines.all) == written + 1


def test_a_slow_answer_is_marked(lines: Lines) -> None:
    """By its first byte: a long download is not slow."""
    write_one(exchange(seconds=1.5))
    assert lines.one["slow"] is True


@pytest.mark.parametrize(("status", "level"), [(200, "info"), (404, "info"), (500, "error"), (503, "error")])
def test_the_level_is_that_of_whose_fault_it_is(status: int, level: str, lines: Lines) -> None:
    """A client's mistake wakes nobody."""
    write_one(exchange(status))
    assert lines.one["level"] == level


def test_a_logger_that_takes_errors_only_gets_errors_only(lines: Lines) -> None:
    """As with any logger."""
    logger = logging.getLogger("fastapi_hardening.access")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        write_one(exchange(200))
        write_one(exchange(500))
    finally:
        logger.setLevel(before)
    assert lines.one["status"] == 500


class Principal:
    """Shows more than a log may know."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)

    def __repr__(self) -> str:
        return "the password is 12345"


@pytest.mark.parametrize(
    ("principal", "name"),
    [
        ("eve", "eve"),
        (17, "17"),
        (Principal(id="7", subject="eve"), "7"),
        (Principal(id=None, subject="eve"), "eve"),
        (SimpleNamespace(name="eve\n"), "eve\\n"),
        (Principal(), "Principal"),
    ],
)
def test_the_caller_is_named_by_an_id_alone(principal: Any, name: str, lines: Lines) -> None:
    """Never by what an object shows of itself."""
    write_one(exchange(), principal=principal)
    assert lines.one["principal"] == name


HOSTILE = st.text(max_size=40) | st.text('\r\n\t\x00\x1b\x9b\u2028\u202e"\\,{}é', max_size=40)


@given(agent=HOSTILE, method=HOSTILE, tenant=HOSTILE)
def test_no_value_of_a_client_ends_a_line_or_forges_a_field(agent: str, method: str, tenant: str) -> None:
    """In JSON and in text alike, by our formatters and by others."""
    with kept() as handler:
        scope = {"type": "http", "method": method, "headers": [(b"user-agent", agent.encode("utf-8", "replace"))]}
        request_context.ensure(scope).tenant = tenant
        write_one(exchange(), scope=scope)
    assert handler.one["status"] == 200
    assert handler.one["user_agent"].isprintable()
    for formatter in (JsonFormatter(), logging.Formatter("%(message)s %(user_agent)s %(tenant)s")):
        assert len(formatter.format(handler.records[0]).splitlines()) == 1


MESSAGES = st.lists(
    st.sampled_from(
        [
            START,
            END,
            END | {"more_body": True},
            {"type": "http.response.pathsend", "path": "/x"},
            {"type": "http.response.debug"},
            {"type": "http.request", "body": b"a"},
            {"type": "http.disconnect"},
        ]
    )
)


@given(MESSAGES)
def test_an_exchange_takes_any_messages_and_knows_how_it_went(messages: list[dict[str, Any]]) -> None:
    """Whatever an application or a server does, there is a line."""
    made = HttpExchange(ManualClock().monotonic, request_context.ensure({}), SCOPE)
    for message in messages:
        (made.sent if "response" in message["type"] else made.received)(message)
    assert made.outcome() in ("completed", "disconnected", "unfinished")
    assert (made.ended is not None) == any(m == END or m["type"] == "http.response.pathsend" for m in messages)


# --- layer ------------------------------------------------------------------------------------------------------------


def fastapi_app(**settings: Any) -> FastAPI:
    app = FastAPI()
    router = APIRouter()

    @router.get("/items/{item_id}")
    async def item(item_id: int) -> int:
        return item_id

    @router.post("/items")
    async def add(request: Request) -> int:
        return len(await request.body())

    @router.get("/boom")
    async def boom() -> None:
        raise RuntimeError("the password is 12345")

    app.include_router(router, prefix="/api")
    app.add_middleware(AccessLogMiddleware, settings=AccessLogSettings(**settings))
    app.add_middleware(RequestContextMiddleware)
    return app


def test_a_request_has_one_line_with_all_that_is_known(lines: Lines) -> None:
    """The template and not the path, the id of the answer, and no query."""
    answer = TestClient(fastapi_app()).get(
        "/api/items/17?token=abc", headers={"User-Agent": "curl/8", "traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}
    )
    line = lines.one
    assert {name: line[name] for name in ("event", "method", "route", "status", "outcome", "level")} == {
        "event": "request",
        "method": "GET",
        "route": "/api/items/{item_id}",
        "status": 200,
        "outcome": "completed",
        "level": "info",
    }
    assert (line["request_id"], line["trace_id"]) == (answer.headers["x-request-id"], TRACE)
    assert (line["client"], line["user_agent"], line["bytes_in"], line["bytes_out"]) == ("testclient", "curl/8", 0, 2)
    assert "17" not in json.dumps(line["route"])
    assert "abc" not in json.dumps(line)
    assert not {"path", "principal", "tenant", "slow", "error"} & line.keys()
    assert lines.records[0].getMessage().startswith("GET /api/items/{item_id} 200 in ")


def test_a_path_that_matches_nothing_is_not_shown(lines: Lines) -> None:
    """Scanners write what they like into paths."""
    assert TestClient(fastapi_app()).get("/wp-admin").status_code == 404
    assert (lines.one["status"], lines.one["route"]) == (404, None)


def test_bytes_are_counted_as_they_are_read(lines: Lines) -> None:
    """Whether or not the client said before how many."""
    TestClient(fastapi_app()).post("/api/items", content=iter([b"abc", b"de"]))
    assert lines.one["bytes_in"] == 5


def test_an_exception_is_named_and_not_told(lines: Lines) -> None:
    """It has no status here: the page is made further out."""
    assert TestClient(fastapi_app(), raise_server_exceptions=False).get("/api/boom").status_code == 500
    line = lines.one
    assert (line["outcome"], line["error"], line["status"], line["level"]) == ("failed", "RuntimeError", None, "error")
    assert "12345" not in json.dumps(line)


def test_an_exception_that_was_answered_further_in_is_named_too(lines: Lines) -> None:
    """The line of a 500 waits for what is raised after it."""

    async def answered(scope: Any, receive: Any, send: Any) -> None:
        await send(START | {"status": 500})
        await send(END)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        served(answered)
    assert (lines.one["status"], lines.one["error"], lines.one["outcome"]) == (500, "RuntimeError", "completed")


def test_the_line_is_written_before_background_tasks_run_and_they_keep_the_id(lines: Lines) -> None:
    """They may take an hour, and log under the id of their request."""
    app = fastapi_app()
    seen: list[tuple[int, str]] = []

    def work() -> None:
        context = request_context.current()
        assert context is not None
        seen.append((len(lines.all), context.request_id))

    @app.get("/later")
    async def later(tasks: BackgroundTasks) -> None:
        tasks.add_task(work)

    answer = TestClient(app).get("/later")
    assert seen == [(1, answer.headers["x-request-id"])]


def test_a_client_that_leaves_is_no_error(lines: Lines) -> None:
    """The stream ends, and the status is the one that was sent."""

    async def endless() -> Any:
        while True:
            yield b"x"
            await asyncio.sleep(0)

    async def stream(scope: Any, receive: Any, send: Any) -> None:
        await StreamingResponse(endless(), status_code=200)(scope, receive, send)

    served(stream, {"type": "http.disconnect"})
    assert (lines.one["outcome"], lines.one["status"], lines.one["level"]) == ("disconnected", 200, "info")


def test_a_server_that_raises_for_a_client_that_left_says_the_same(lines: Lines) -> None:
    """As ASGI 2.4 has it."""

    async def gone(*_: Any) -> Any:
        raise OSError("gone")

    async def run() -> None:
        await AccessLogMiddleware(answers)({"type": "http", "headers": [], "path": "/"}, gone, gone)

    with pytest.raises(OSError, match="gone"):
        asyncio.run(run())
    assert (lines.one["outcome"], lines.one["status"]) == ("disconnected", None)


def test_a_client_that_leaves_after_the_answer_had_it(lines: Lines) -> None:
    """Applications listen on."""

    async def listens(scope: Any, receive: Any, send: Any) -> None:
        await answers(scope, receive, send)
        assert await receive() == {"type": "http.disconnect"}

    served(listens, {"type": "http.disconnect"})
    assert lines.one["outcome"] == "completed"


def test_what_is_cancelled_or_never_finished_has_a_line_too(lines: Lines) -> None:
    """Without a status that nobody sent."""

    async def cancelled(scope: Any, receive: Any, send: Any) -> None:
        raise asyncio.CancelledError

    async def nothing(scope: Any, receive: Any, send: Any) -> None:
        await send(START)

    with pytest.raises(asyncio.CancelledError):
        served(cancelled)
    served(nothing)
    assert [(line["outcome"], line["status"]) for line in lines.all] == [("cancelled", None), ("unfinished", 200)]


def test_the_trace_of_a_layer_further_in_is_found(lines: Lines) -> None:
    """Its span ends before the layer returns."""
    tracer = TracerProvider().get_tracer("test")
    traced: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        with tracer.start_as_current_span("server") as span:
            traced.append(format(span.get_span_context().trace_id, "032x"))
            await send(START | {"status": 503})
            await send(END)

    served(app)
    assert [lines.one["trace_id"]] == traced


def test_a_websocket_has_one_line_at_its_close(lines: Lines) -> None:
    """With its close code and its messages, whoever closes it."""
    app = fastapi_app()

    @app.websocket("/echo")
    async def echo(websocket: WebSocket) -> None:
        await websocket.accept()
        try:
            while (text := await websocket.receive_text()) != "close":
                await websocket.send_text(text)
        except WebSocketDisconnect:
            return
        await websocket.close(4000)

    client = TestClient(app)
    with client.websocket_connect("/echo") as websocket:
        websocket.send_text("hello")
        assert websocket.receive_text() == "hello"
        assert lines.all == []
        websocket.send_text("close")
        assert websocket.receive()["code"] == 4000
    with client.websocket_connect("/echo"):
        pass
    names = ("event", "route", "outcome", "status", "code", "messages_in", "messages_out")
    assert [tuple(line[name] for name in names) for line in lines.all] == [
        ("websocket", "/echo", "completed", None, 4000, 2, 1),
        ("websocket", "/echo", "completed", None, 1000, 0, 0),
    ]


@pytest.mark.parametrize(
    ("messages", "outcome", "status", "code"),
    [
        ([{"type": "websocket.close", "code": 1008}], "refused", None, 1008),
        ([{"type": "websocket.close"}], "refused", None, 1000),
        (
            [
                {"type": "websocket.http.response.start", "status": 429, "headers": []},
                {"type": "websocket.http.response.body", "body": b"no"},
            ],
            "refused",
            429,
            None,
        ),
        ([{"type": "websocket.accept"}, {"type": "websocket.close", "code": 1011}], "completed", None, 1011),
        ([{"type": "websocket.accept"}], "unfinished", None, None),
    ],
)
def test_how_a_websocket_went_is_in_its_line(
    messages: list[Any], outcome: str, status: int | None, code: int | None, lines: Lines
) -> None:
    """A refused handshake has the status that was sent, if one was."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for message in messages:
            await send(message)

    served(app, type="websocket")
    assert (lines.one["outcome"], lines.one["status"], lines.one["code"]) == (outcome, status, code)


@pytest.mark.parametrize(("code", "outcome"), [(1000, "completed"), (1006, "disconnected"), (None, "completed")])
def test_a_websocket_that_breaks_off_was_not_closed(code: int | None, outcome: str) -> None:
    """By the code that the server gives for it; what comes after the end changes nothing."""
    made = WebSocketExchange(ManualClock().monotonic, request_context.ensure({}), SCOPE)
    made.received({"type": "websocket.connect"})
    made.sent({"type": "websocket.accept"})
    message = {"type": "websocket.disconnect"} | ({} if code is None else {"code": code})
    assert made.received(message)
    assert not made.received({"type": "websocket.disconnect", "code": 1011})
    assert (made.outcome(), made.close_code) == (outcome, code or 1005)


def test_path_and_headers_are_shown_by_option_and_without_credentials(lines: Lines) -> None:
    """Cut off where they are long."""
    app = fastapi_app(
        include_path=True,
        request_headers=["Authorization", "Accept", "X-Tax", "X-Many"],
        response_headers=["Content-Type", "Set-Cookie"],
        redact=["tax"],
        max_value_chars=64,
    )

    @app.get("/cookie")
    async def cookie() -> PlainTextResponse:
        answer = PlainTextResponse("x")
        answer.set_cookie("session", "abc")
        return answer

    headers = [("Authorization", "Bearer abc"), ("Accept", "a\x7f"), ("X-Tax", "12"), ("X-Many", "1"), ("X-Many", "2")]
    TestClient(app).get("/cookie?page=1&token=abc&" + "x" * 99, headers=headers)
    line = lines.one
    assert line["path"] == "/cookie?page=1&token=[redacted]&" + "x" * 47
    assert line["request_headers"] == {
        "authorization": "[redacted]",
        "accept": "a\\x7f",
        "x-tax": "[redacted]",
        "x-many": "1, 2",
    }
    assert line["response_headers"]["set-cookie"] == "[redacted]"
    assert line["response_headers"]["content-type"].startswith("text/plain")


def test_a_path_is_shown_as_it_was_sent(lines: Lines) -> None:
    """A line end in it stays encoded; a server that keeps no raw path has its text escaped."""
    settings = AccessLogSettings(include_path=True)
    served(answers, settings=settings, path="/a\nb", raw_path=b"/a%0Ab")
    served(answers, settings=settings, path="/a\nb")
    assert [line["path"] for line in lines.all] == ["/a%0Ab", "/a\\nb"]


def test_fields_that_may_not_be_kept_are_left_out(lines: Lines) -> None:
    """Such as what is personal."""
    served(answers, settings=AccessLogSettings(omit=("client", "user_agent")), headers=[(b"user-agent", b"x")])
    assert not {"client", "user_agent"} & lines.one.keys()


def test_one_of_two_layers_writes(lines: Lines) -> None:
    """The outer one: a request has one line."""
    TestClient(AccessLogMiddleware(fastapi_app())).get("/api/items/1")
    assert len(lines.all) == 1


def test_switched_off_nothing_is_written(lines: Lines) -> None:
    """And nothing is wrapped."""
    assert TestClient(fastapi_app(enabled=False)).get("/api/items/1").status_code == 200
    assert lines.all == []


def test_it_works_alone_on_starlette_and_a_lifespan_passes(lines: Lines) -> None:
    """Nothing of FastAPI is needed around it."""
    app = Starlette(routes=[Route("/", lambda request: PlainTextResponse("ok"))])
    app.add_middleware(AccessLogMiddleware)
    with TestClient(app) as client:
        assert client.get("/").text == "ok"
    assert (lines.one["route"], lines.one["status"]) == ("/", 200)


# --- settings and all of it -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sample_rate": 1.5}, "less than or equal to 1"),
        ({"request_headers": ["a b"]}, "is not a header name"),
        ({"omit": ["clint"]}, "'clint' cannot be left out; did you mean 'client'"),
        ({"formt": "text"}, "did you mean 'format'"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], sentence: str) -> None:
    """With the sentence that mends them."""
    with pytest.raises(ValueError, match=sentence):
        AccessLogSettings(**changes)


def test_all_records_take_the_form_and_know_their_request() -> None:
    """Those of the application, too; without credentials."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    output = io.StringIO()
    try:
        handler = configure_logging(AccessLogSettings(redact=("tax",)), stream=output)
        assert handler in root.handlers
        app = fastapi_app()

        @app.get("/pay")
        def pay() -> None:
            logging.getLogger("shop").info("paid", extra={"order": 17, "password": "p", "tax_id": "1"})

        answer = TestClient(app).get("/pay")
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    # The test client logs, too.
    ours = [json.loads(line) for line in output.getvalue().splitlines()]
    paid, access = (line for line in ours if line.get("logger") == "shop" or line.get("event") == "request")
    assert paid["request_id"] == access["request_id"] == answer.headers["x-request-id"]
    assert (paid["order"], paid["password"], paid["tax_id"]) == (17, "[redacted]", "[redacted]")


def test_a_queue_is_asked_for_by_its_size() -> None:
    """The level of the access log stays where somebody has set one."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    access = logging.getLogger("fastapi_hardening.access")
    of_access = access.level
    output = io.StringIO()
    try:
        access.setLevel(logging.NOTSET)
        handler = configure_logging(queue_size=100, stream=output, level="WARNING")
        assert isinstance(handler, QueuedHandler)
        assert access.level == logging.INFO
        access.setLevel(logging.ERROR)
        assert configure_logging(queue_size=100, stream=output) is not handler
        assert access.level == logging.ERROR
        with TestClient(fastapi_app()):
            logging.getLogger("shop").warning("late")
        # When the lifespan ends, all is written: uvicorn then ends by its signal, without any clean-up.
        written = output.getvalue()
    finally:
        root.handlers[:] = before
        root.setLevel(level)
        access.setLevel(of_access)
    assert '"message":"late"' in written
