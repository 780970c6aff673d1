"""Deadlines: who is answered for, who is let be, and that nothing is left behind."""

import asyncio
import gc
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import pytest
import uvicorn
from anyio.to_thread import current_default_thread_limiter, run_sync
from fastapi import BackgroundTasks, Depends, FastAPI, Request, WebSocket
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Message

from fastapi_hardening import Settings, Timeout, harden
from fastapi_hardening.core import context as request_context
from fastapi_hardening.core.clock import ManualClock
from fastapi_hardening.core.events import RequestRefused
from fastapi_hardening.core.routes import RouteEntry, table_of
from fastapi_hardening.resilience.timeout import (
    AnswerCutOff,
    Bounds,
    HandlerAbandoned,
    TimeoutMiddleware,
    TimeoutSettings,
    needs_thread,
)
from fastapi_hardening.resilience.timeout import layer as timeout

pytestmark = pytest.mark.anyio

SOON = 0.005


@pytest.fixture
def anyio_backend() -> str:
    """Run on asyncio, as uvicorn does."""
    return "asyncio"


async def forever() -> None:
    """Waits for what does not come."""
    await asyncio.Event().wait()


class Exchange:
    """One request as a server has it: a task of its own, and all that is sent."""

    def __init__(self, app: ASGIApp, asked: str = "GET /", *, body: tuple[bytes, ...] = (b"",)) -> None:
        method, _, path = asked.partition(" ")
        kind = "websocket" if method == "WS" else "http"
        self.sent: list[Message] = []
        self.answered = asyncio.Event()
        self.scope: dict[str, Any] = {
            "type": kind,
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "scheme": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"host", b"shop.test")],
            "client": ("203.0.113.9", 40000),
            "server": ("127.0.0.1", 8000),
            "extensions": {"websocket.http.response": {}},
        }
        self._body = [
            {"type": "http.request", "body": part, "more_body": number < len(body)}
            for number, part in enumerate(body, start=1)
        ]
        if kind == "websocket":
            self._body = [{"type": "websocket.connect"}]
        self.task = asyncio.create_task(self._serve(app))

    async def _serve(self, app: ASGIApp) -> None:
        await app(self.scope, self._receive, self._send)

    async def _receive(self) -> Message:
        if self._body:
            return self._body.pop(0)
        await forever()
        return {}

    async def _send(self, message: Message) -> None:
        self.sent.append(message)
        if message["type"].endswith("response.body") and not message.get("more_body"):
            self.answered.set()

    async def status(self) -> int:
        """The status, once the answer is there; the task need not have ended."""
        await self.answered.wait()
        starts = [message for message in self.sent if message["type"].endswith("response.start")]
        assert len(starts) == 1
        status: int = starts[0]["status"]
        return status

    @property
    def body(self) -> bytes:
        """What was sent of the body."""
        return b"".join(message.get("body", b"") for message in self.sent)


def within(application: ASGIApp, *, clock: ManualClock | None = None, **settings: Any) -> TimeoutMiddleware:
    return TimeoutMiddleware(application, TimeoutSettings(**{"first_byte_seconds": SOON, **settings}), clock=clock)


# --- settings ---------------------------------------------------------------------------------------------------------


def test_the_defaults_are_those_that_do_not_hurt() -> None:
    """Half a minute until the answer begins, and any time for the rest of it."""
    settings = TimeoutSettings()
    assert (settings.first_byte_seconds, settings.total_seconds, settings.report_only) == (30, None, False)
    assert TimeoutSettings.model_validate({"first_byte_seconds": ""}).first_byte_seconds is None


@pytest.mark.parametrize("bad", [{"first_byte_seconds": 0}, {"first_byte_seconds": 1, "total_seconds": -1}])
def test_a_time_that_is_none_is_refused_when_it_is_made(bad: dict[str, Any]) -> None:
    """In the settings and in an override."""
    with pytest.raises(ValueError, match="greater than 0"):
        TimeoutSettings(**bad)
    with pytest.raises(ValueError, match="greater than 0"):
        Timeout(**bad)


@pytest.mark.parametrize(
    ("bounds", "at"),
    [
        (Bounds(None, None), None),
        (Bounds(30, None), 37),
        (Bounds(None, 20), 20),
        (Bounds(30, 20), 20),
        (Bounds(5, 20), 12),
    ],
)
def test_the_body_moves_the_first_deadline_and_not_the_second(bounds: Bounds, at: float | None) -> None:
    """The first counts from the last piece of the body, the second from the request; the earlier one holds."""
    assert bounds.at(0, 7) == at


# --- handlers that take too long --------------------------------------------------------------------------------------


async def test_a_handler_that_does_not_answer_is_answered_for() -> None:
    """504 as a problem, and the handler is gone."""
    gone = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await forever()
        finally:
            gone.set()

    exchange = Exchange(within(app))
    assert await exchange.status() == 504
    await exchange.task
    assert gone.is_set()
    assert exchange.task.cancelling() == 0
    assert b'"detail":"The server took too long to answer."' in exchange.body


async def test_dependencies_clean_up_as_if_the_client_had_gone() -> None:
    """In their order, each with its own awaits."""
    cleaned: list[str] = []
    app = FastAPI()

    async def outer() -> AsyncIterator[None]:
        try:
            yield
        finally:
            await asyncio.sleep(0)
            cleaned.append("outer")

    async def inner(_outer: Annotated[None, Depends(outer)]) -> AsyncIterator[None]:
        try:
            yield
        except asyncio.CancelledError:
            cleaned.append("inner")
            raise

    @app.get("/", dependencies=[Depends(inner)])
    async def index() -> None:
        await forever()

    exchange = Exchange(within(app))
    assert await exchange.status() == 504
    assert cleaned == ["inner", "outer"]


async def test_what_has_begun_is_not_cut() -> None:
    """A stream goes on past the deadline, and so does what runs after the answer."""
    go_on, after = asyncio.Event(), asyncio.Event()
    app = FastAPI()

    async def parts() -> AsyncIterator[bytes]:
        yield b"one "
        await go_on.wait()
        yield b"two"

    async def later() -> None:
        await go_on.wait()
        after.set()

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        return StreamingResponse(parts())

    @app.get("/task")
    async def task(tasks: BackgroundTasks) -> str:
        tasks.add_task(later)
        return "ok"

    layer = within(app)
    exchanges = Exchange(layer, "GET /stream"), Exchange(layer, "GET /task")
    # A request that began later has run into its deadline: theirs has passed.
    assert await Exchange(within(_never)).status() == 504
    go_on.set()
    assert [await exchange.status() for exchange in exchanges] == [200, 200]
    await asyncio.gather(*(exchange.task for exchange in exchanges))
    assert exchanges[0].body == b"one two"
    assert after.is_set()


async def _never(scope: Any, receive: Any, send: Any) -> None:
    await forever()


async def test_a_timeout_of_the_application_stays_its_own() -> None:
    """What it raises is not turned into our answer."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise TimeoutError("theirs")

    exchange = Exchange(within(app, first_byte_seconds=30))
    with pytest.raises(TimeoutError, match="theirs"):
        await exchange.task
    assert exchange.sent == []


async def test_a_cancellation_from_outside_stays_one() -> None:
    """Also when the time is up while the handler cleans up after it: the server ends, and nobody is answered."""
    go_on = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await forever()
        finally:
            await go_on.wait()

    exchange = Exchange(within(app))
    await asyncio.sleep(0)
    exchange.task.cancel()
    assert await Exchange(within(_never)).status() == 504
    go_on.set()
    await asyncio.wait({exchange.task})
    assert exchange.task.cancelled()
    assert exchange.sent == []


async def test_a_cancellation_from_outside_and_ours_at_once_is_one_from_outside() -> None:
    """The server's word counts."""
    stopped = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await forever()
        except asyncio.CancelledError:
            stopped.set()
            await forever()

    exchange = Exchange(within(app))
    await stopped.wait()
    exchange.task.cancel()
    await asyncio.wait({exchange.task})
    assert exchange.task.cancelled()
    assert exchange.sent == []


async def test_a_handler_that_answers_when_it_is_stopped_is_heard() -> None:
    """What it says in the end is its answer."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await forever()
        except asyncio.CancelledError:
            await JSONResponse("almost", status_code=206)(scope, receive, send)

    exchange = Exchange(within(app))
    await exchange.task
    assert (await exchange.status(), exchange.body) == (206, b'"almost"')
    assert exchange.task.cancelling() == 0


async def test_a_handler_that_will_not_be_stopped_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client is answered after a short grace, and what it sends then goes nowhere."""
    monkeypatch.setattr(timeout, "_GRACE_SECONDS", SOON)
    go_on = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await forever()
        except asyncio.CancelledError:
            await go_on.wait()
        await PlainTextResponse("late")(scope, receive, send)

    layer = within(app)
    exchange = Exchange(layer)
    assert await exchange.status() == 504
    assert len(layer.abandoned) == 1
    go_on.set()
    await exchange.task
    assert b"late" not in exchange.body
    assert not layer.abandoned


async def test_a_middleware_that_runs_the_handler_in_a_task_of_its_own_is_no_way_round() -> None:
    """The handler is stopped there, too."""
    app = FastAPI()
    stopped = asyncio.Event()

    @app.middleware("http")
    async def passing(request: Request, call_next: Any) -> Any:
        return await call_next(request)

    @app.get("/")
    async def index() -> None:
        try:
            await forever()
        finally:
            stopped.set()

    exchange = Exchange(within(app))
    assert await exchange.status() == 504
    await exchange.task
    assert stopped.is_set()


async def test_a_slow_client_does_not_make_a_handler_slow() -> None:
    """Each piece of the body moves the deadline; after the last one it stands."""
    clock = ManualClock()
    seen: list[float | None] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for _ in range(3):
            await receive()
            seen.append(request_context.ensure(scope).deadline)
            clock.advance(2)
        await PlainTextResponse("ok")(scope, receive, send)

    exchange = Exchange(within(app, clock=clock, first_byte_seconds=3), "POST /", body=(b"a", b"b", b"c"))
    assert await exchange.status() == 200
    assert seen == [3, 5, 7]


async def test_a_timer_that_rings_while_the_body_still_came_is_set_again() -> None:
    """It is not moved with each piece, but looks at what is left when it rings."""
    clock = ManualClock()
    rung = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        clock.advance(2 * SOON)
        await receive()
        await rung.wait()
        await PlainTextResponse("ok")(scope, receive, send)

    exchange = Exchange(within(app, clock=clock), "POST /")
    assert await Exchange(within(_never)).status() == 504
    assert exchange.sent == []
    rung.set()
    assert await exchange.status() == 200


async def test_an_answer_that_begins_in_the_last_moment_is_sent() -> None:
    """After the timer has rung, before the handler is stopped; the bound of the whole answer holds from then on."""
    clock = ManualClock()
    going = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await going.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await receive()
        await forever()

    exchange = Exchange(within(app, clock=clock, total_seconds=1), "POST /")
    await asyncio.sleep(0)
    answer = request_context.ensure(exchange.scope).state[TimeoutMiddleware]
    clock.advance(0.9)
    going.set()
    answer._ring()
    for _ in range(3):
        await asyncio.sleep(0)
    assert [message["status"] for message in exchange.sent] == [200]
    clock.advance(0.1)
    answer._ring()
    await exchange.task
    assert len(exchange.sent) == 1
    assert exchange.task.cancelling() == 0


async def test_a_handler_that_ends_in_the_last_moment_has_ended() -> None:
    """After the timer has rung, without an answer: nobody is cancelled any more."""
    clock = ManualClock()
    going = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await going.wait()
        await send({"type": "http.response.debug"})

    exchange = Exchange(within(app, clock=clock))
    await asyncio.sleep(0)
    answer = request_context.ensure(exchange.scope).state[TimeoutMiddleware]
    clock.advance(1)
    going.set()
    answer._ring()
    await exchange.task
    assert [message["type"] for message in exchange.sent] == ["http.response.debug"]


async def test_a_websocket_that_is_not_accepted_in_time_is_refused() -> None:
    """As an HTTP answer; one that was accepted is no business of deadlines."""
    app = FastAPI()
    go_on = asyncio.Event()

    @app.websocket("/slow")
    async def slow(websocket: WebSocket) -> None:
        await forever()

    @app.websocket("/open")
    async def open_for_long(websocket: WebSocket) -> None:
        await websocket.accept()
        await go_on.wait()
        await websocket.send_text("hello")

    layer = within(app, total_seconds=SOON)
    accepted = Exchange(layer, "WS /open")
    assert await Exchange(layer, "WS /slow").status() == 504
    go_on.set()
    await accepted.task
    assert [message["type"] for message in accepted.sent] == ["websocket.accept", "websocket.send"]


async def test_an_answer_that_lasts_too_long_as_a_whole_is_cut() -> None:
    """Where somebody asks for that; its end is missing, so the server closes the connection."""
    app = FastAPI()

    async def parts() -> AsyncIterator[bytes]:
        yield b"one "
        await forever()

    @app.get("/", dependencies=[Timeout(30, total_seconds=SOON)])
    async def stream() -> StreamingResponse:
        return StreamingResponse(parts())

    @app.get("/quick", dependencies=[Timeout(30, total_seconds=30)])
    async def quick() -> str:
        return "ok"

    handle = harden(app)
    exchange = Exchange(app)
    await exchange.task
    assert [message["type"] for message in exchange.sent] == ["http.response.start", "http.response.body"]
    assert exchange.body == b"one "
    assert handle.events.count(AnswerCutOff) == 1
    assert await Exchange(app, "GET /quick").status() == 200


async def test_report_only_says_so_and_waits(caplog: pytest.LogCaptureFixture) -> None:
    """To find out what a deadline would do."""
    caplog.set_level("INFO")
    go_on = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await go_on.wait()
        await PlainTextResponse("ok")(scope, receive, send)

    exchange = Exchange(within(app, report_only=True))
    assert await Exchange(within(_never)).status() == 504
    go_on.set()
    assert await exchange.status() == 200
    assert caplog.text.count("timeout (report only) refused a request") == 1


async def test_the_deadline_is_there_for_everybody_further_in() -> None:
    """Until the answer has begun; then there is none."""
    clock = ManualClock()
    clock.advance(100)
    seen: list[float | None] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        context = request_context.ensure(scope)
        seen.append(context.deadline)
        await send({"type": "http.response.start", "status": 200})
        seen.append(context.deadline)
        await send({"type": "http.response.body"})

    await Exchange(within(app, clock=clock, first_byte_seconds=30)).task
    assert seen == [130, None]


async def test_nothing_is_left_behind_that_only_the_collector_finds() -> None:
    """A cycle in each request costs more than the layer."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse("ok")(scope, receive, send)

    layer = within(app, first_byte_seconds=30)
    await Exchange(layer).task
    gc.collect()
    gc.disable()
    try:
        exchange = Exchange(layer)
        await exchange.task
        del exchange
        left = [each for each in gc.get_objects() if type(each) is timeout._Answer and each._layer is layer]
    finally:
        gc.enable()
    assert left == []


async def test_switched_off_it_looks_at_nothing() -> None:
    """And of other things than requests never."""
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    layer = within(app, enabled=False)
    await layer({"type": "http"}, None, None)  # type: ignore[arg-type]
    await within(app)({"type": "lifespan"}, None, None)  # type: ignore[arg-type]
    assert seen == ["http", "lifespan"]


# --- threads ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hanging() -> Iterator[threading.Event]:
    """Give what threads of a test wait for, and let them go in the end."""
    event = threading.Event()
    yield event
    event.set()


@asynccontextmanager
async def pool_of(places: int) -> AsyncIterator[Any]:
    """A pool of so many threads."""
    limiter = current_default_thread_limiter()
    before, limiter.total_tokens = limiter.total_tokens, places
    yield limiter
    limiter.total_tokens = before


async def test_a_handler_in_a_thread_is_answered_for_and_keeps_its_place(hanging: threading.Event) -> None:
    """It cannot be stopped; were its place given away, each hanging handler would be one thread more."""
    app = FastAPI()

    @app.get("/")
    def index() -> str:
        hanging.wait()
        return "late"

    handle = harden(app, Settings(timeout={"first_byte_seconds": SOON}))
    async with pool_of(2) as limiter:
        exchange = Exchange(app)
        assert await exchange.status() == 504
        assert limiter.borrowed_tokens == 1
        assert not exchange.task.done()
        hanging.set()
        await exchange.task
        assert limiter.borrowed_tokens == 0
    assert b"late" not in exchange.body
    assert handle.events.count(HandlerAbandoned) == 1
    assert handle.events.count(RequestRefused) == 1


async def test_what_needs_a_thread_is_refused_while_all_are_kept(hanging: threading.Event) -> None:
    """It would only wait. What needs none is served, and so is all of it when a thread has come back."""
    app = FastAPI()

    @app.get("/hangs", dependencies=[Timeout(SOON)])
    def hangs() -> None:
        hanging.wait()

    @app.get("/sync")
    def sync() -> str:
        return "ok"

    @app.get("/async")
    async def asynchronous() -> str:
        return "ok"

    harden(app)
    async with pool_of(1):
        abandoned = Exchange(app, "GET /hangs")
        assert await abandoned.status() == 504
        refused = Exchange(app, "GET /sync")
        assert await refused.status() == 503
        fields = dict(refused.sent[0]["headers"])
        assert fields[b"retry-after"] in (b"1", b"2")
        assert b"temporary-reduced-capacity" in refused.body
        assert await Exchange(app, "GET /async").status() == 200
        hanging.set()
        await abandoned.task
        assert await Exchange(app, "GET /sync").status() == 200


async def test_a_handler_is_stopped_when_it_comes_back_from_its_thread(
    hanging: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not go on with the next thing for a client that has its answer."""
    monkeypatch.setattr(timeout, "_LOOK_SECONDS", SOON)
    app = FastAPI()
    stopped: list[bool] = []

    @app.get("/")
    async def index() -> None:
        await run_sync(hanging.wait)
        try:
            await forever()
        finally:
            stopped.append(True)

    exchange = Exchange(within(app))
    assert await exchange.status() == 504
    hanging.set()
    await exchange.task
    assert stopped == [True]


async def _async_dependency() -> None: ...


def _sync_dependency() -> None: ...


class _Callable:
    def __init__(self, function: Callable[..., Any]) -> None:
        self.func = function

    async def __call__(self) -> None: ...


class _AsyncCallable:
    async def __call__(self) -> None: ...


async def _generator() -> AsyncIterator[None]:
    yield


@pytest.mark.parametrize(
    ("endpoint", "dependency", "needs"),
    [
        (_async_dependency, _async_dependency, False),
        (_sync_dependency, _async_dependency, True),
        (_async_dependency, _sync_dependency, True),
        (_async_dependency, _generator, False),
        (_async_dependency, _AsyncCallable(), False),
        (_async_dependency, Timeout(3).after_routing, False),
    ],
)
def test_it_is_known_what_needs_a_thread(endpoint: Any, dependency: Any, needs: bool) -> None:
    """A function that is not async, of the endpoint or of any of its dependencies."""
    app = FastAPI(openapi_url=None)
    app.add_api_route("/", endpoint, dependencies=[Depends(dependency)])
    assert [needs_thread(entry) for entry in table_of(app)] == [needs]


def test_routes_of_starlette_are_looked_at_as_they_are() -> None:
    """They have no dependencies; what is no route needs nothing that we know of."""
    assert needs_thread(RouteEntry("/", endpoint=_sync_dependency))
    assert needs_thread(RouteEntry("/", endpoint=_Callable(_sync_dependency)))
    assert not needs_thread(RouteEntry("/", endpoint=_async_dependency))
    assert not needs_thread(RouteEntry(None, kind="unmatched"))


# --- a real server ----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def serving(app: ASGIApp) -> AsyncIterator[int]:
    """Uvicorn, on this event loop; gives its port."""
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="critical"))
    listening = socket.create_server(("127.0.0.1", 0))
    task = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        await task


async def test_a_server_sends_the_answer_and_serves_the_next_request_meanwhile(hanging: threading.Event) -> None:
    """On the same connection, while the thread of the first one still runs; and a cut answer ends its connection."""
    app = FastAPI()

    @app.get("/hangs", dependencies=[Timeout(SOON)])
    def hangs() -> None:
        hanging.wait()

    @app.get("/ok")
    async def ok() -> str:
        return "fine"

    @app.get("/cut", dependencies=[Timeout(30, total_seconds=SOON)])
    async def cut() -> StreamingResponse:
        async def parts() -> AsyncIterator[bytes]:
            yield b"one"
            await forever()

        return StreamingResponse(parts())

    harden(app)
    async with serving(app) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        statuses = []
        for path in ("hangs", "ok"):
            writer.write(f"GET /{path} HTTP/1.1\r\nHost: shop.test\r\n\r\n".encode())
            head = await reader.readuntil(b"\r\n\r\n")
            statuses.append(head.split(b" ", 2)[1])
            [length] = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")]
            await reader.readexactly(int(length.split()[1]))
        assert statuses == [b"504", b"200"]
        writer.write(b"GET /cut HTTP/1.1\r\nHost: shop.test\r\n\r\n")
        answer = await reader.read()
        writer.close()
        assert answer.endswith(b"3\r\none\r\n")
        hanging.set()


# --- override ---------------------------------------------------------------------------------------------------------


def slow_app(*overrides: Any) -> FastAPI:
    app = FastAPI()

    @app.get("/", dependencies=overrides)
    async def index() -> None:
        await forever()

    return app


async def test_the_innermost_override_counts() -> None:
    """The route's against the settings; a moment against half a minute."""
    app = slow_app(Timeout(30), Timeout(SOON))
    harden(app)
    assert await Exchange(app).status() == 504


async def test_a_deadline_is_lifted_where_it_would_hurt() -> None:
    """Long polling, for example."""
    app = FastAPI()
    go_on = asyncio.Event()

    @app.get("/", dependencies=[Timeout(None)])
    async def index() -> str:
        await go_on.wait()
        return "news"

    harden(app, Settings(timeout={"first_byte_seconds": SOON}))
    exchange = Exchange(app)
    assert await Exchange(within(_never)).status() == 504
    go_on.set()
    assert await exchange.status() == 200


async def test_an_override_that_was_learnt_of_late_moves_the_deadline() -> None:
    """A middleware of the application that changes the path does not lose it."""
    app = slow_app(Timeout(SOON))

    @app.middleware("http")
    async def rewriting(request: Request, call_next: Any) -> Any:
        request.scope["path"] = "/"
        return await call_next(request)

    harden(app)
    assert await Exchange(app, "GET /other").status() == 504


@pytest.mark.parametrize(("override", "status"), [(Timeout(3), 500), (Timeout(None), 200)])
def test_a_deadline_that_nobody_would_watch_refuses_the_request(override: Timeout, status: int) -> None:
    """On an application that was never hardened; to lift what is not there does no harm."""
    app = FastAPI()

    @app.get("/", dependencies=[override])
    async def index() -> str:
        return "ok"

    assert TestClient(app).get("/").status_code == status


def test_switched_off_by_the_settings_is_meant_to_be_off() -> None:
    """Routes with an override are served, as all others."""
    app = FastAPI()

    @app.get("/", dependencies=[Timeout(3)])
    async def index() -> str:
        return "ok"

    harden(app, Settings(timeout={"enabled": False}))
    assert TestClient(app).get("/").status_code == 200


async def test_it_works_on_starlette() -> None:
    """Alone, as a middleware among others."""

    async def index(_request: Request) -> None:
        await forever()

    app = Starlette(routes=[Route("/", index)])
    app.add_middleware(TimeoutMiddleware, settings=TimeoutSettings(first_byte_seconds=SOON))
    assert await Exchange(app).status() == 504
