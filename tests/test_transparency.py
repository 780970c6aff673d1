"""A hardened application does what the bare one does: the same messages in the same order, and more header fields."""

import asyncio
import contextvars
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import pytest
from fastapi import (
    APIRouter,
    BackgroundTasks,
    Cookie,
    Depends,
    FastAPI,
    File,
    Form,
    Header,
    HTTPException,
    Request,
    Response,
    UploadFile,
    WebSocket,
    WebSocketDisconnect,
)
from fastapi.responses import FileResponse, PlainTextResponse, StreamingResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel
from starlette.background import BackgroundTask
from starlette.requests import HTTPConnection
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_hardening import RequestId, Settings, harden
from fastapi_hardening.core import context as request_context
from fastapi_hardening.core.identity import Authenticator, Principal

OURS = frozenset(
    b"""x-request-id x-content-type-options x-frame-options content-security-policy content-security-policy-report-only
    referrer-policy permissions-policy cross-origin-opener-policy cross-origin-resource-policy x-dns-prefetch-control
    x-permitted-cross-domain-policies ratelimit ratelimit-policy""".split()
)

Note = Callable[[object], None]
Make = Callable[[FastAPI, Note], None]


@pytest.fixture
def anyio_backend() -> str:
    """Run on asyncio, as uvicorn does."""
    return "asyncio"


class LastStrawError(BaseException):
    """What no ``except Exception`` may stop."""


class Sent(NamedTuple):
    """What a client sends, and how it behaves.

    Attributes:
        asked: The method and the path; ``WS`` for a websocket.
        headers: Header fields.
        parts: The parts of the body, or the messages on the websocket.
        leaves: The client hangs up after its request.
        gone: From the second message on nothing can be sent any more.
        cancelled: The server gives up on the request, once the application has noted ``waiting``.
        spec: The version of ASGI.
        extensions: What the server can do beside.
        root_path: The root path.
    """

    asked: str
    headers: Sequence[tuple[str, str]] = ()
    parts: Sequence[bytes | str] = (b"",)
    leaves: bool = False
    gone: bool = False
    cancelled: bool = False
    spec: str = "2.3"
    extensions: Mapping[str, Any] = {}
    root_path: str = ""


DENIAL: dict[str, Any] = {"websocket.http.response": {}}


class Scenario(NamedTuple):
    """An application, and what is sent to it."""

    make: Make
    sent: Sequence[Sent]


SCENARIOS: dict[str, Scenario] = {}


def scenario(*sent: Sent | str) -> Callable[[Make], Make]:
    """Adds a scenario; the function adds routes to an application and notes what happens in them."""

    def add(make: Make) -> Make:
        SCENARIOS[make.__name__.replace("_", " ")] = Scenario(
            make, [Sent(each) if isinstance(each, str) else each for each in sent]
        )
        return make

    return add


# --- the server -------------------------------------------------------------------------------------------------------


class Connection:
    """Serves one connection, and writes down everything that both sides see, in one order."""

    def __init__(self, sent: Sent) -> None:
        self.sent = sent
        self.seen: list[object] = [sent.asked]
        self.method, _, self.target = sent.asked.partition(" ")
        self._incoming = self._messages()
        self._started = False
        self._ended = asyncio.Event()
        self._waiting = asyncio.Event()

    def note(self, what: object) -> None:
        """What the application sees."""
        self.seen.append(what)
        if what == "waiting":
            self._waiting.set()

    async def serve(self, app: ASGIApp) -> None:
        """Serves the connection to its end."""
        task = asyncio.create_task(self._call(app))
        if self.sent.cancelled:
            async with asyncio.timeout(5):
                await self._waiting.wait()
            task.cancel()
        done, _ = await asyncio.wait({task}, timeout=5)
        assert done, f"{self.sent} has no end: {self.seen}"
        raised = asyncio.CancelledError() if task.cancelled() else task.exception()
        if raised is not None:
            self.note(("raised", type(raised), str(raised)))

    async def _call(self, app: ASGIApp) -> None:
        await app(self._scope(), self._receive, self._send)

    async def _receive(self) -> Message:
        if not self._incoming and not self.sent.leaves:
            await self._ended.wait()
        message = self._incoming.pop(0) if self._incoming else {"type": "http.disconnect"}
        self.note((message["type"], message.get("body", message.get("text", message.get("bytes")))))
        return message

    async def _send(self, message: Message) -> None:
        if self.sent.gone and self._started:
            raise OSError("the client is gone")
        self._started = True
        copy = dict(message)
        if "headers" in copy or message["type"] == "http.response.start":
            copy["headers"] = [(name, value) for name, value in copy.get("headers", ()) if name not in OURS]
        self.note(copy)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._ended.set()

    def _messages(self) -> list[dict[str, Any]]:
        parts = self.sent.parts
        if self.method == "WS":
            received = [("text" if isinstance(part, str) else "bytes", part) for part in parts]
            return [
                {"type": "websocket.connect"},
                *({"type": "websocket.receive", kind: part} for kind, part in received),
                {"type": "websocket.disconnect", "code": 4999, "reason": "bye"},
            ]
        more = [True] * (len(parts) - 1) + [False]
        return [{"type": "http.request", "body": p, "more_body": m} for p, m in zip(parts, more, strict=True)]

    def _scope(self) -> dict[str, Any]:
        path, _, query = self.target.partition("?")
        websocket = self.method == "WS"
        return {
            "type": "websocket" if websocket else "http",
            "asgi": {"version": "3.0", "spec_version": self.sent.spec},
            "http_version": "1.1",
            "scheme": "ws" if websocket else "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": self.sent.root_path,
            "headers": [(b"host", b"shop.test"), *((n.encode(), v.encode()) for n, v in self.sent.headers)],
            "client": ("203.0.113.9", 40000),
            "server": ("127.0.0.1", 8000),
            "state": {"from_lifespan": "state"},
            "extensions": dict(self.sent.extensions),
            **({"subprotocols": ["one", "two"]} if websocket else {"method": self.method}),
        }


# --- scenarios: answers and streams -----------------------------------------------------------------------------------


@scenario(
    "GET /plain", "GET /plain?q=1", "HEAD /head", "OPTIONS /options", "POST /created", "DELETE /gone", "GET /same"
)
def plain_answers(app: FastAPI, note: Note) -> None:
    async def plain(q: int = 0) -> dict[str, int]:
        note("endpoint")
        return {"q": q}

    app.get("/plain")(plain)
    app.head("/head")(plain)
    app.options("/options")(plain)
    app.post("/created", status_code=201)(plain)

    @app.delete("/gone", status_code=204)
    async def gone() -> None:
        note("endpoint")

    @app.get("/same")
    async def same() -> Response:
        return Response(status_code=304, headers={"ETag": '"1"'})


@scenario("GET /async", "GET /sync", "GET /boom")
def streams(app: FastAPI, note: Note) -> None:
    async def chunks() -> AsyncIterator[str]:
        for chunk in ("one", "", "two", "\u20ac"):
            note("chunk")
            yield chunk

    def sync_chunks() -> Iterator[bytes]:
        yield from (b"one", b"two")

    async def failing_chunks() -> AsyncIterator[str]:
        yield "one"
        raise ValueError("in the stream")

    @app.get("/{which}")
    async def stream(which: str) -> StreamingResponse:
        content: Any = {"async": chunks, "sync": sync_chunks, "boom": failing_chunks}[which]
        return StreamingResponse(content(), media_type="text/plain")


@scenario("GET /bytes", "GET /lines")
def generating_endpoints(app: FastAPI, note: Note) -> None:
    @app.get("/bytes", response_class=StreamingResponse)
    async def by_bytes() -> AsyncIterator[bytes]:
        yield b"one"
        yield b"two"

    @app.get("/lines")
    def lines() -> Iterator[dict[str, int]]:
        for number in range(3):
            note("line")
            yield {"number": number}


@scenario("GET /events", "POST /events")
def server_sent_events(app: FastAPI, note: Note) -> None:
    @app.post("/events", response_class=EventSourceResponse)
    @app.get("/events", response_class=EventSourceResponse)
    async def events() -> AsyncIterator[ServerSentEvent]:
        yield ServerSentEvent(data={"n": 1}, event="tick", id="1", retry=10)
        yield ServerSentEvent(comment="still here")
        yield ServerSentEvent(raw_data="raw")


def raising(error: BaseException) -> Callable[[], Awaitable[None]]:
    """An endpoint that raises."""

    async def endpoint() -> None:
        raise error

    return endpoint


@scenario("GET /tasks", "GET /response", "GET /boom")
def background_tasks(app: FastAPI, note: Note) -> None:
    async def work(name: str) -> None:
        note(f"background {name}")
        await asyncio.sleep(0)
        note(f"background {name} ends")

    async def adding(tasks: BackgroundTasks) -> None:
        tasks.add_task(work, "of the dependency")

    @app.get("/tasks", dependencies=[Depends(adding)])
    async def with_tasks(tasks: BackgroundTasks) -> None:
        tasks.add_task(work, "of the endpoint")
        tasks.add_task(note, "in a thread")

    @app.get("/response")
    async def with_response() -> PlainTextResponse:
        return PlainTextResponse("ok", background=BackgroundTask(work, "of the response"))

    @app.get("/boom")
    async def boom(tasks: BackgroundTasks) -> None:
        tasks.add_task(raising(ValueError("in the background")))
        tasks.add_task(work, "after the failure")


@scenario("GET /ok", "GET /function", "GET /stream", "GET /handled", "GET /boom")
def yield_dependencies(app: FastAPI, note: Note) -> None:
    def resource(name: str) -> Callable[[], AsyncIterator[str]]:
        async def opened() -> AsyncIterator[str]:
            note(f"{name} opens")
            try:
                yield name
            except Exception as error:
                note(f"{name} sees {type(error).__name__}")
                raise
            finally:
                note(f"{name} closes")

        return opened

    both = [Depends(resource("outer")), Depends(resource("inner"))]
    app.get("/handled", dependencies=both)(raising(HTTPException(418)))
    app.get("/boom", dependencies=both)(raising(ValueError("in the endpoint")))

    @app.get("/ok", dependencies=both)
    @app.get("/function", dependencies=[Depends(resource("function"), scope="function")])
    async def ok(tasks: BackgroundTasks) -> None:
        tasks.add_task(note, "background")
        note("endpoint")

    @app.get("/stream", dependencies=both, response_class=StreamingResponse)
    async def stream() -> AsyncIterator[str]:
        yield "one"
        yield "two"


@scenario(
    "GET /file",
    "HEAD /file",
    Sent("GET /file", [("range", "bytes=10-19")]),
    Sent("HEAD /file", [("range", "bytes=10-19")]),
    Sent("GET /file", [("range", "bytes=-5")]),
    Sent("GET /file", [("range", "bytes=999999999-")]),
    Sent("GET /file", [("range", "nonsense")]),
    Sent("GET /file", [("range", "bytes=10-19"), ("if-range", '"other"')]),
    Sent("GET /file", spec="2.4"),
    Sent("GET /file", extensions={"http.response.pathsend": {}}),
    "GET /boom",
)
def files(app: FastAPI, note: Note) -> None:
    @app.head("/file")
    @app.get("/file")
    async def file() -> FileResponse:
        return FileResponse(__file__, filename="a test.py")

    @app.get("/boom")
    async def no_file() -> FileResponse:
        return FileResponse(Path(__file__).with_suffix(".not"))


async def send_other_messages(scope: Scope, _receive: Receive, send: Send) -> None:
    """A bare ASGI application that sends what frameworks seldom send."""
    name = scope["path"].rpartition("/")[2]
    if name == "hints":
        await send({"type": "http.response.informational", "status": 103, "headers": [(b"link", b"</a.css>")]})
    if name == "unknown":
        await send({"type": "http.response.something", "headers": [(b"a", b"b")]})
    headers = [(b"X-Capital", b"1"), (b"x-capital", b"2")] if name == "capitals" else [(b"trailer", b"x-sum")]
    await send({"type": "http.response.start", "status": 200, "headers": headers, "trailers": name == "trailers"})
    await send({"type": "http.response.body", "body": b"one", "more_body": True})
    await send({"type": "http.response.body", "body": b"two"})
    if name == "trailers":
        await send({"type": "http.response.trailers", "headers": [(b"x-sum", b"1")], "more_trailers": False})


@scenario("GET /asgi/trailers", "GET /asgi/hints", "GET /asgi/capitals", "GET /asgi/unknown")
def messages_of_other_kinds(app: FastAPI, note: Note) -> None:
    app.mount("/asgi", send_other_messages)


# --- scenarios: what goes in ------------------------------------------------------------------------------------------


@scenario(
    Sent("POST /body", parts=[b"x" * 65536] * 40),
    Sent("POST /stream", parts=[b"x" * 65536] * 40),
    Sent("POST /unread", parts=[b"x" * 65536] * 3),
    Sent("POST /echo", parts=[b"one", b"", b"two"], spec="2.4"),
)
def bodies(app: FastAPI, note: Note) -> None:
    @app.post("/body")
    async def body(request: Request) -> int:
        return len(await request.body())

    @app.post("/stream")
    async def stream(request: Request) -> list[int]:
        return [len(chunk) async for chunk in request.stream()]

    @app.post("/unread")
    async def unread() -> None: ...

    @app.post("/echo")
    async def echo(request: Request) -> StreamingResponse:
        return StreamingResponse(request.stream())


FORM = (
    b'--x\r\nContent-Disposition: form-data; name="name"\r\n\r\nAda\r\n'
    b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n'
    b"Content-Type: text/plain\r\n\r\ncontent\r\n"
    b"--x--\r\n"
)


@scenario(
    Sent("POST /form", [("content-type", "multipart/form-data; boundary=x")], [FORM]),
    Sent("POST /form", [("content-type", "multipart/form-data; boundary=x")], [FORM[:50], FORM[50:120], FORM[120:]]),
    Sent("POST /fields", [("content-type", "application/x-www-form-urlencoded")], [b"a=1&b=2"]),
    Sent("POST /json", [("content-type", "application/json")], [b'{"a"', b": 1}"]),
)
def forms(app: FastAPI, note: Note) -> None:
    @app.post("/form")
    async def form(name: Annotated[str, Form()], file: Annotated[UploadFile, File()]) -> list[str | None]:
        return [name, file.filename, file.content_type, (await file.read()).decode()]

    @app.post("/fields")
    async def fields(a: Annotated[int, Form()], b: Annotated[int, Form()]) -> int:
        return a + b

    @app.post("/json")
    async def json(a: dict[str, int]) -> dict[str, int]:
        return a


@scenario(
    Sent("GET /cookies", [("cookie", "visits=3")]),
    Sent("GET /fields", [("x-a", "1"), ("x-a", "2"), ("x-request-id", "mine")]),
)
def cookies_and_fields(app: FastAPI, note: Note) -> None:
    @app.get("/cookies")
    async def cookies(response: Response, visits: Annotated[int, Cookie()] = 0) -> int:
        response.set_cookie("visits", str(visits + 1))
        response.set_cookie("other", "x", httponly=True, secure=True, samesite="strict")
        response.delete_cookie("old")
        response.headers["X-Mine"] = "yes"
        response.headers.append("Vary", "Cookie")
        response.headers.append("Vary", "Accept")
        return visits

    @app.get("/fields")
    async def fields(request: Request, x_a: Annotated[list[str], Header()]) -> list[str]:
        return [*x_a, request.headers["x-request-id"]]


@scenario(
    "GET /urls",
    "GET /urls/",
    Sent("GET /proxy/urls", root_path="/proxy"),
    Sent("GET /urls", root_path="/proxy"),
    "GET /in/side/urls",
    "GET /in/side/urls/",
    "GET /child/urls",
    Sent("GET /proxy/child/urls", root_path="/proxy"),
    "GET /child/urls/",
    "GET /child",
)
def urls(app: FastAPI, note: Note) -> None:
    async def show(request: Request) -> list[str]:
        scope = request.scope
        return [
            *(str(request.url_for(name, number=7)) for name in ("one", "child:inside")),
            *(str(url) for url in (request.url, request.base_url)),
            *(scope["root_path"], scope["path"], scope["raw_path"].decode()),
        ]

    router, child, outer = APIRouter(), FastAPI(), APIRouter()
    for to in (app, router, child):
        to.add_api_route("/urls", show)
        to.add_api_route("/one/{number}", take_number, name="one")
    child.add_api_route("/inside/{number}", take_number, name="inside")
    outer.include_router(router, prefix="/side")
    app.include_router(outer, prefix="/in")
    app.mount("/child", child, name="child")


# --- scenarios: what the code sees ------------------------------------------------------------------------------------


@scenario("GET /sync", "GET /dependency")
def threads(app: FastAPI, note: Note) -> None:
    def where() -> bool:
        return threading.current_thread() is threading.main_thread()

    @app.get("/sync")
    def sync() -> bool:
        note(("in the main thread", where()))
        return True

    @app.get("/dependency")
    async def dependency(main: Annotated[bool, Depends(where)]) -> bool:
        note(("in the main thread", main, where()))
        return True


VARIABLE: contextvars.ContextVar[str] = contextvars.ContextVar("VARIABLE", default="unset")


@scenario("GET /async", "GET /sync", "GET /yield", "GET /plain")
def context_variables(app: FastAPI, note: Note) -> None:
    def tell(where: str) -> None:
        note(f"{where}: {VARIABLE.get()}")

    async def by_async() -> None:
        VARIABLE.set("async")

    def by_sync() -> None:
        VARIABLE.set("sync")

    async def by_yield() -> AsyncIterator[None]:
        token = VARIABLE.set("yield")
        yield
        VARIABLE.reset(token)
        tell("after yield")

    async def endpoint(tasks: BackgroundTasks) -> StreamingResponse:
        async def chunks() -> AsyncIterator[str]:
            tell("stream")
            yield "chunk"

        tell("endpoint")
        tasks.add_task(tell, "background")
        return StreamingResponse(chunks())

    app.get("/async", dependencies=[Depends(by_async)])(endpoint)
    app.get("/sync", dependencies=[Depends(by_sync)])(endpoint)
    app.get("/yield", dependencies=[Depends(by_yield)])(endpoint)
    app.get("/plain")(endpoint)


@scenario("GET /state", "GET /child/state", "WS /state")
def states(app: FastAPI, note: Note) -> None:
    async def state(request: Request) -> str:
        request.state.own = "own"
        return f"{request.state.from_lifespan} {request.state.own} {request.app.title}"

    child = FastAPI(title="child")
    app.get("/state")(state)
    child.get("/state")(state)
    app.mount("/child", child)

    @app.websocket("/state")
    async def of_a_websocket(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text(f"{websocket.state.from_lifespan} {websocket.app.title}")


@scenario("GET /overridden")
def overridden_dependencies(app: FastAPI, note: Note) -> None:
    async def real() -> str:
        return "real"

    @app.get("/overridden")
    async def overridden(which: Annotated[str, Depends(real)]) -> str:
        return which

    app.dependency_overrides[real] = lambda: "other"


# --- scenarios: errors ------------------------------------------------------------------------------------------------


class MineError(Exception):
    """What the application has a handler for."""


async def take_number(number: int) -> int:
    return number


async def read(request: Request) -> int:
    return len(await request.body())


async def fail_after_the_start(_scope: Scope, _receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200})
    raise ValueError("after the start")


@scenario(
    "GET /nowhere",
    "PUT /boom",
    "GET /boom",
    "GET /teapot",
    "GET /number/x",
    Sent("POST /small", [("content-length", "5")], [b"12345"]),
    Sent("POST /small", parts=[b"123", b"45"]),
    "GET /same",
    "GET /mine",
    "GET /boom/group",
    "GET /last",
    "GET /answered/",
    "GET /child/boom",
    "GET /child/nowhere",
    "WS /boom",
    "WS /nowhere",
    "WS /number/x",
    Sent("WS /number/x", extensions=DENIAL),
    Sent("WS /teapot", extensions=DENIAL),
)
def errors(app: FastAPI, note: Note) -> None:
    async def handler(_request: Request, _error: Exception) -> Response:
        return PlainTextResponse("mine", 299)

    boom = raising(ValueError("in the endpoint"))
    teapot = raising(HTTPException(418, {"short": "stout"}, {"X-Teapot": "yes"}))
    app.add_exception_handler(MineError, handler)
    app.add_api_route("/boom", boom)
    app.add_api_route("/teapot", teapot)
    app.add_api_route("/same", raising(HTTPException(304)))
    app.add_api_route("/mine", raising(MineError()))
    app.add_api_route("/boom/group", raising(ExceptionGroup("both", [ValueError("one"), TypeError("two")])))
    app.add_api_route("/last", raising(LastStrawError("stop")))
    app.add_api_route("/small", read, methods=["POST"], max_body_size=4)
    app.add_api_route("/number/{number}", take_number)
    app.add_api_websocket_route("/boom", boom)
    app.add_api_websocket_route("/teapot", teapot)
    app.add_api_websocket_route("/number/{number}", take_number)
    app.mount("/answered", fail_after_the_start)
    child = FastAPI()
    child.add_api_route("/boom", boom)
    app.mount("/child", child)


# --- scenarios: websockets --------------------------------------------------------------------------------------------


@scenario(Sent("WS /echo", parts=["one", b"two", "three"]), "WS /in/echo", "WS /close", "WS /json", "WS /boom")
def websockets(app: FastAPI, note: Note) -> None:
    async def echo(websocket: WebSocket) -> None:
        await websocket.accept("two", [(b"x-mine", b"yes")])
        message = await websocket.receive()
        while message["type"] != "websocket.disconnect":
            await websocket.send({**message, "type": "websocket.send"})
            message = await websocket.receive()
        note((message["code"], message["reason"]))

    @app.websocket("/close")
    async def close(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close(4321, "enough")

    @app.websocket("/json")
    async def json(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_json({"a": 1}, mode="binary")
        try:
            note(await websocket.receive_bytes())
            await websocket.receive_text()
        except WebSocketDisconnect as end:
            note((end.code, end.reason))

    @app.websocket("/boom")
    async def boom(websocket: WebSocket) -> None:
        await websocket.accept()
        raise ValueError("after the acceptance")

    router = APIRouter()
    router.websocket("/echo")(echo)
    app.websocket("/echo")(echo)
    app.include_router(router, prefix="/in")


async def close_at_once(websocket: WebSocket) -> None:
    await websocket.close(4002, "not you")


@scenario(
    "WS /refuse",
    Sent("WS /refuse", extensions=DENIAL),
    Sent("WS /deny", extensions=DENIAL),
    Sent("WS /deny-by-stream", extensions=DENIAL),
)
def refused_websockets(app: FastAPI, note: Note) -> None:
    app.websocket("/refuse")(close_at_once)

    @app.websocket("/deny")
    async def deny(websocket: WebSocket) -> None:
        await websocket.send_denial_response(PlainTextResponse("not you", 403))

    @app.websocket("/deny-by-stream")
    async def deny_by_stream(websocket: WebSocket) -> None:
        async def chunks() -> AsyncIterator[str]:
            yield "not"
            yield "you"

        await websocket.send_denial_response(StreamingResponse(chunks(), 403))


# --- scenarios: disconnection and cancellation ------------------------------------------------------------------------


def waiting(note: Note) -> Callable[[], Awaitable[None]]:
    """Something that waits until it is cancelled, and notes it."""

    async def wait() -> None:
        note("waiting")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            note("cancelled")
            raise
        finally:
            note("left")

    return wait


def closing(note: Note) -> Any:
    """A dependency that notes when it closes."""

    async def dependency() -> AsyncIterator[None]:
        try:
            yield
        finally:
            note("dependency closes")

    return Depends(dependency)


@scenario(
    Sent("GET /asks", leaves=True),
    Sent("GET /stream", leaves=True),
    Sent("GET /events", leaves=True),
    Sent("GET /stream", gone=True, spec="2.4"),
)
def clients_that_leave(app: FastAPI, note: Note) -> None:
    wait = waiting(note)

    @app.get("/asks")
    async def asks(request: Request) -> list[bool]:
        return [await request.is_disconnected(), await request.is_disconnected()]

    @app.get("/stream", dependencies=[closing(note)], response_class=StreamingResponse)
    async def stream() -> AsyncIterator[str]:
        yield "one"
        await wait()

    @app.get("/events", response_class=EventSourceResponse, dependencies=[closing(note)])
    async def events() -> AsyncIterator[int]:
        yield 1
        await wait()


@scenario(
    Sent("GET /waits", cancelled=True),
    Sent("GET /shields", cancelled=True),
    Sent("GET /background", cancelled=True),
    Sent("WS /waits", cancelled=True),
)
def servers_that_give_up(app: FastAPI, note: Note) -> None:
    wait = waiting(note)
    app.get("/waits", dependencies=[closing(note)])(wait)

    @app.get("/shields")
    async def shields() -> str:
        try:
            await wait()
        except asyncio.CancelledError:
            return "answered all the same"
        raise AssertionError

    @app.get("/background")
    async def background(tasks: BackgroundTasks) -> None:
        tasks.add_task(wait)

    @app.websocket("/waits")
    async def websocket(websocket: WebSocket) -> None:
        await websocket.accept()
        await wait()


# --- the comparison ---------------------------------------------------------------------------------------------------


async def seen_by(
    sent: Sent, make: Make, settings: Settings | None, authenticators: Sequence[Authenticator] = ()
) -> list[object]:
    """Everything that happens, in its order, in the bare or in the hardened application."""
    connection, app = Connection(sent), FastAPI()
    make(app, connection.note)
    if settings is not None:
        harden(app, settings, authenticators=authenticators)
    await connection.serve(app)
    return connection.seen


def kinds(seen: list[object]) -> list[object]:
    """The same without the header fields and the bodies that were sent."""
    return [(each["type"], each.get("status")) if isinstance(each, dict) else each for each in seen]


def cases(*, errors: bool) -> list[Any]:
    """The scenarios in which every answer is good, or those with errors among them."""
    return [
        pytest.param(each.make, sent, id=f"{name}: {sent.asked} {number}")
        for name, each in SCENARIOS.items()
        for number, sent in enumerate(each.sent)
        if errors == (name == "errors" or "boom" in sent.asked or sent.asked == "GET /handled")
    ]


class Everybody:
    """Knows everybody, for an hour."""

    scheme = "bearer"
    challenge = "Bearer"

    async def authenticate(self, _connection: HTTPConnection) -> Principal | None:
        return Principal("anna", expires_at=time.time() + 3600)


@pytest.mark.anyio
@pytest.mark.parametrize(("make", "sent"), cases(errors=False))
async def test_a_caller_who_is_let_in_sees_what_the_bare_application_does(make: Make, sent: Sent) -> None:
    """Authentication changes no message of a caller who is known, also on a websocket whose end is watched."""
    without = await seen_by(sent, make, Settings())
    let_in = await seen_by(sent, make, Settings(auth={"default": "required"}), [Everybody()])
    assert kinds(let_in) == kinds(without)


@pytest.mark.anyio
@pytest.mark.parametrize(("make", "sent"), cases(errors=False))
async def test_hardened_application_does_what_the_bare_one_does(make: Make, sent: Sent) -> None:
    """Every message in and out, and everything the code sees, is the same, in the same order."""
    bare = await seen_by(sent, make, None)
    assert not any(isinstance(each, dict) and each.get("status", 0) >= 500 for each in bare)
    assert await seen_by(sent, make, Settings()) == bare


@pytest.mark.anyio
@pytest.mark.parametrize(("make", "sent"), cases(errors=True))
async def test_only_the_form_of_errors_changes(make: Make, sent: Sent) -> None:
    """An error keeps its status and its place among what happens, and what is raised goes on to the server."""
    hardened, bare = kinds(await seen_by(sent, make, Settings())), kinds(await seen_by(sent, make, None))
    if sent.asked in ("WS /boom", "WS /number/x") and ("websocket.accept", None) not in bare:
        # A handshake that fails, or is not understood, is refused by us; the bare application leaves it to the server.
        refusal = ("websocket.close", None) if not sent.extensions else ("websocket.http.response.start", 422)
        assert hardened[:2] == [sent.asked, refusal]
        assert hardened[-1] == bare[-1] or sent.asked == "WS /number/x"
    else:
        assert hardened == bare


# A body above FastAPI's own limit is refused by us, in our words, before FastAPI sees it.
FASTAPIS_ERRORS = [case for case in cases(errors=True) if "POST /small" not in str(case.id)]


@pytest.mark.anyio
@pytest.mark.parametrize(("make", "sent"), FASTAPIS_ERRORS)
async def test_without_error_handling_errors_do_not_change_either(make: Make, sent: Sent) -> None:
    """With the errors concern off, errors are the bare application's to the last byte."""
    off = Settings(errors={"enabled": False})
    assert await seen_by(sent, make, off) == await seen_by(sent, make, None)


@pytest.mark.anyio
@pytest.mark.parametrize(("make", "sent"), [case for case in FASTAPIS_ERRORS if "WS" not in str(case.id)])
async def test_format_of_fastapi_keeps_its_error_bodies(make: Make, sent: Sent) -> None:
    """With ``errors.format = "fastapi"`` every body is FastAPI's own, but for the 500, which becomes JSON as well."""
    hardened = await seen_by(sent, make, Settings(errors={"format": "fastapi"}))
    bare = await seen_by(sent, make, None)
    if any(isinstance(each, dict) and each.get("status") == 500 for each in bare):
        assert {"type": "http.response.body", "body": b'{"detail":"Internal Server Error"}'} in hardened
        assert kinds(hardened) == kinds(bare)
    else:
        assert hardened == bare


@pytest.mark.anyio
async def test_scope_has_one_more_key() -> None:
    """An endpoint finds in its scope what it finds in the bare application, and one key of ours."""
    found: list[set[str]] = []

    def make(app: FastAPI, _note: Note) -> None:
        @app.get("/scope")
        async def scope(request: Request) -> None:
            found.append(set(request.scope))

    for settings in (None, Settings()):
        await seen_by(Sent("GET /scope"), make, settings)
    assert found[1] == found[0] | {"fastapi_hardening.context"}


@pytest.mark.anyio
async def test_requests_side_by_side_do_not_mix() -> None:
    """Of many requests at once each has its own id and its own context variables, and none is left over."""
    app, together = FastAPI(), asyncio.Event()

    @app.get("/{number}")
    async def endpoint(number: str, request_id: RequestId) -> PlainTextResponse:
        VARIABLE.set(number)
        if number == "49":
            together.set()
        await together.wait()
        context = request_context.current()
        assert context is not None
        return PlainTextResponse(f"{number} {VARIABLE.get()} {request_id} {context.request_id}")

    harden(app)
    connections = [Connection(Sent(f"GET /{number}", [("x-request-id", f"id-{number}")])) for number in range(50)]
    await asyncio.gather(*(connection.serve(app) for connection in connections))
    for number, connection in enumerate(connections):
        said = f"{number} {number} id-{number} id-{number}"
        assert connection.seen[-1] == {"type": "http.response.body", "body": said.encode()}
    assert request_context.current() is None


# --- lifespan ---------------------------------------------------------------------------------------------------------


def lifespan_of(
    seen: list[object], state: Mapping[str, Any] | None, fails: str = ""
) -> Callable[[FastAPI], AbstractAsyncContextManager[Any]]:
    """A lifespan that notes its course, has this state, and fails at its start or its end."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
        seen.append(("starts", app.title))
        if fails == "start":
            raise ValueError("at the start")
        yield state
        seen.append("stops")
        if fails == "end":
            raise ValueError("at the end")

    return lifespan


async def course_of(app: FastAPI, seen: list[object], *, server_has_state: bool) -> list[object]:
    """Runs the lifespan of an application as a server does; gives everything that happened."""
    scope: dict[str, Any] = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}}
    if server_has_state:
        scope["state"] = {}
    messages = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]

    async def receive() -> Message:
        return messages.pop(0)

    async def send(message: Message) -> None:
        # Of a traceback only what is raised, because its frames are ours as well.
        seen.append((message["type"], message.get("message", "").strip().rpartition("\n")[2]))

    try:
        await app(scope, receive, send)
    except Exception as raised:  # noqa: BLE001 - a server takes what comes
        seen.append(("raised", type(raised), str(raised)))
    return [*seen, scope.get("state")]


@pytest.mark.anyio
@pytest.mark.parametrize("inner", [None, {"inner": 2, "both": "inner"}])
@pytest.mark.parametrize("state", [None, {}, {"outer": 1, "both": "outer"}])
@pytest.mark.parametrize("fails", ["", "start", "end"])
@pytest.mark.parametrize("server_has_state", [True, False])
async def test_lifespan_runs_as_before(
    *, state: dict[str, Any] | None, inner: dict[str, Any] | None, fails: str, server_has_state: bool
) -> None:
    """Lifespans of application and routers start, stop, fail and hand over state as they do in the bare application."""
    courses = []
    for order in ("include", "include harden", "harden include"):
        seen: list[object] = []
        app = FastAPI(title="shop", lifespan=lifespan_of(seen, state, fails))
        for step in order.split():
            if step == "harden":
                harden(app)
            else:
                app.include_router(APIRouter(lifespan=lifespan_of(seen, inner)))
        courses.append(await course_of(app, seen, server_has_state=server_has_state))
    assert courses[1] == courses[0]
    assert courses[2] == courses[0]


@pytest.mark.parametrize("enters", [True, False], ids=["with its lifespan", "without"])
def test_test_client_works_as_before(enters: bool) -> None:
    """Starlette's test client gets the same answers, cookies, messages and exceptions, with a lifespan and without."""

    def answers(*, hardened: bool) -> list[object]:
        seen: list[object] = []
        app = FastAPI(lifespan=lifespan_of(seen, {"outer": 1}))

        @app.get("/ok")
        async def ok(request: Request, response: Response) -> dict[str, Any]:
            response.set_cookie("a", "1")
            return {"outer": getattr(request.state, "outer", None), "cookies": request.cookies}

        @app.websocket("/echo")
        async def echo(websocket: WebSocket) -> None:
            await websocket.accept()
            await websocket.send_json(await websocket.receive_json())
            await websocket.close(4001, "enough")

        app.websocket("/close")(close_at_once)
        app.get("/boom")(raising(ValueError("in the endpoint")))
        if hardened:
            harden(app)
        client = TestClient(app)
        with client if enters else nullcontext():
            for path in ("/ok", "/ok", "/ok/"):
                answer = client.get(path)
                seen.append((answer.status_code, answer.json(), [each.status_code for each in answer.history]))
            with client.websocket_connect("/echo") as websocket:
                websocket.send_json({"a": 1})
                seen.append(websocket.receive_json())
                seen.append(websocket.receive())
            with pytest.raises(WebSocketDisconnect) as refused, client.websocket_connect("/close"):
                pass
            seen.append((refused.value.code, refused.value.reason))
            with pytest.raises(ValueError, match="in the endpoint"):
                client.get("/boom")
            seen.append(TestClient(app, raise_server_exceptions=False).get("/boom").status_code)
        return seen

    assert answers(hardened=True) == answers(hardened=False)


# --- routes and documents ---------------------------------------------------------------------------------------------


async def content() -> str:
    return "content"


@pytest.mark.anyio
@pytest.mark.parametrize("late", ["/late", "/in/late", "/child/late", "/mounted/late", "/included/late"])
async def test_route_added_while_it_serves_is_reached(late: str) -> None:
    """A route, a router or an application that is added after the first request answers at once, as before."""
    courses = []
    for hardened in (False, True):
        app, router, child, new_router, mounted = FastAPI(), APIRouter(), FastAPI(), APIRouter(), FastAPI()
        router.get("/first")(content)
        app.include_router(router, prefix="/in")
        app.mount("/child", child)
        if hardened:
            harden(app)
        before, after = Connection(Sent(f"GET {late}")), Connection(Sent(f"GET {late}"))
        await before.serve(app)
        app.include_router(new_router, prefix="/included")
        app.mount("/mounted", mounted)
        for to in (app, router, child, new_router, mounted):
            to.get("/late")(content)
        await after.serve(app)
        courses.append(kinds(before.seen) + kinds(after.seen))
    assert ("http.response.start", 200) in courses[0]
    assert courses[1] == courses[0]


class Item(BaseModel):
    """A body."""

    price: int


def documented() -> FastAPI:
    """An application whose document has everything that we could touch."""
    app, router = FastAPI(title="shop", version="3"), APIRouter(tags=["items"])

    @router.post("/items/{number}", responses={404: {"description": "no such item"}})
    async def put(number: int, item: Item) -> Item:
        return item

    @app.get("/own", responses={422: {"description": "mine"}, "4XX": {"description": "mine"}})
    async def own(q: int) -> int:
        return q

    app.include_router(router, prefix="/api")
    app.get("/plain")(content)
    app.get("/hidden", include_in_schema=False)(content)
    return app


@pytest.mark.parametrize("served", [False, True], ids=["before the first request", "after it"])
def test_openapi_changes_only_in_the_errors_it_describes(served: bool) -> None:
    """Operations and schemas stay; 4XX and 5XX are added unless declared, and FastAPI's 422 is replaced by ours."""
    bare, app = documented().openapi(), documented()
    harden(app)
    hardened = TestClient(app).get("/openapi.json").json() if served else app.openapi()
    replaced, added = {"HTTPValidationError", "ValidationError"}, {"Problem", "ValidationProblem"}
    bares, hardeneds = bare["components"].pop("schemas"), hardened["components"].pop("schemas")
    assert {name: schema for name, schema in hardeneds.items() if name not in added} == {
        name: schema for name, schema in bares.items() if name not in replaced
    }
    assert added <= set(hardeneds)
    for path, operations in bare["paths"].items():
        for method, operation in operations.items():
            answers = hardened["paths"][path][method]["responses"]
            assert {"4XX", "5XX"} <= set(answers)
            for status in {"4XX", "5XX"} - set(operation["responses"]):
                assert "#/components/schemas/Problem'" in str(answers.pop(status))
            if "HTTPValidationError" in str(operation["responses"].get("422")):
                assert "#/components/schemas/ValidationProblem'" in str(answers.pop("422"))
                operation["responses"].pop("422")
    assert hardened == bare


@pytest.mark.parametrize("errors", [{"enabled": False}, {"format": "fastapi"}])
def test_openapi_does_not_change_where_errors_do_not(errors: dict[str, Any]) -> None:
    """With the errors concern off, or in FastAPI's format, the document is the bare application's."""
    app = documented()
    harden(app, Settings(errors=errors))
    assert app.openapi() == documented().openapi()


def test_application_looks_the_same() -> None:
    """Routes, middlewares, dependencies and overrides of the application are as its author left them."""
    bare, app = documented(), documented()
    harden(app)
    paths = [[getattr(route, "path", None) for route in each.routes] for each in (bare, app)]
    assert paths[1] == paths[0]
    assert app.user_middleware == []
    assert app.dependency_overrides == {}
    assert app.url_path_for("put", number=7) == bare.url_path_for("put", number=7)
