"""What hardening costs, in numbers that are the same on every machine: frames in and out, calls, messages."""

import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from fastapi import FastAPI, WebSocket
from fastapi.responses import PlainTextResponse, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import fastapi_hardening
from fastapi_hardening import SecurityHeaders, Settings, harden

pytestmark = pytest.mark.anyio

PACKAGE = str(Path(fastapi_hardening.__file__).parent)

# One frame for each layer, from the outside in, below the one that steps aside inside another hardened application.
# One more is Starlette's: the ServerErrorMiddleware that instrumentation expects outermost.
LAYERS = [
    "_StepAside",
    "HealthMiddleware",
    "RequestContextMiddleware",
    "SecurityHeadersMiddleware",
    "ErrorsMiddleware",
    "DrainMiddleware",
]

# At most one function for each layer that a message passes on its way out, from the inside out.
SENDS = ["ErrorsMiddleware", "SecurityHeadersMiddleware", "RequestContextMiddleware"]


@pytest.fixture
def anyio_backend() -> str:
    """Run on asyncio, as uvicorn does."""
    return "asyncio"


class Stack:
    """The frames that are active at one place: all of them, and the names of ours, the outermost first."""

    def __init__(self, frame: FrameType | None) -> None:
        self.depth = 0
        self.ours: list[str] = []
        while frame is not None:
            self.depth += 1
            if frame.f_code.co_filename.startswith(PACKAGE):
                self.ours.insert(0, frame.f_code.co_qualname)
            frame = frame.f_back

    @property
    def layers(self) -> list[str]:
        """The layers whose frames are active on the way in."""
        return [name.partition(".")[0] for name in self.ours if name.endswith(".__call__")]

    @property
    def sends(self) -> list[str]:
        """The layers whose functions a message passes on its way out."""
        return [name.partition(".")[0] for name in self.ours if "<locals>" in name]


class Recorder:
    """An application, bare or hardened, with a server that records what it costs to get into it and out again."""

    def __init__(self, settings: Settings | None = None, *, hardened: bool = True) -> None:
        self.inside: list[Stack] = []
        self.outside: list[Stack] = []
        self.messages: list[str] = []
        self.calls = 0
        self.app = app = FastAPI()
        app.add_api_route("/ok", self.endpoint)
        app.add_api_route("/override", self.endpoint, dependencies=[SecurityHeaders(x_frame_options=None)])
        app.add_api_route("/stream", self.stream)
        app.add_api_websocket_route("/echo", self.websocket)
        if hardened:
            harden(app, settings)

    async def endpoint(self) -> PlainTextResponse:
        """Answers, and tells the way in."""
        self.inside.append(Stack(sys._getframe()))
        return PlainTextResponse("ok")

    async def stream(self) -> StreamingResponse:
        """Answers in parts."""

        async def parts() -> AsyncIterator[str]:
            for part in ("one", "two", "three"):
                yield part

        return StreamingResponse(parts())

    async def websocket(self, websocket: WebSocket) -> None:
        """Accepts, and tells the way in."""
        self.inside.append(Stack(sys._getframe()))
        await websocket.accept()
        await websocket.send_text("ok")

    async def serve(self, asked: str, app: ASGIApp | None = None) -> "Recorder":
        """Serves two requests; the second one, for which everything has been built, is recorded."""
        for _ in range(2):
            self.inside, self.outside, self.messages, self.calls = [], [], [], 0
            scope = self._scope(asked)
            previous = sys.getprofile()
            sys.setprofile(self._count)
            try:
                await (app or self.app)(scope, self._receive, self._send)
            finally:
                sys.setprofile(previous)
        return self

    async def _receive(self) -> Message:
        return {"type": "websocket.connect"}

    async def _send(self, message: Message) -> None:
        self.outside.append(Stack(sys._getframe()))
        self.messages.append(message["type"])

    def _count(self, _frame: FrameType, event: str, _argument: object) -> None:
        self.calls += event == "call"

    @staticmethod
    def _scope(asked: str) -> dict[str, Any]:
        method, _, path = asked.partition(" ")
        return {
            "type": "websocket" if method == "WS" else "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "scheme": "ws" if method == "WS" else "http",
            "path": path,
            "query_string": b"",
            "headers": [(b"host", b"shop.test")],
            "client": ("203.0.113.9", 40000),
            "server": ("127.0.0.1", 8000),
            "method": method,
        }


async def pair(asked: str, settings: Settings | None = None) -> tuple[Recorder, Recorder]:
    """The same request to the bare and to the hardened application."""
    return await Recorder(hardened=False).serve(asked), await Recorder(settings).serve(asked)


@pytest.mark.parametrize("asked", ["GET /ok", "GET /override", "WS /echo"])
async def test_each_layer_adds_one_frame_on_the_way_in(asked: str) -> None:
    """Between the server and the endpoint stand the layers, each with one frame, in the order of the pipeline."""
    bare, hardened = await pair(asked)
    assert hardened.inside[0].layers == LAYERS
    assert hardened.inside[0].ours == [f"{layer}.__call__" for layer in LAYERS]
    assert hardened.inside[0].depth == bare.inside[0].depth + len(LAYERS) + 1


@pytest.mark.parametrize("asked", ["GET /ok", "GET /override", "GET /stream", "WS /echo"])
async def test_each_layer_adds_at_most_one_function_on_the_way_out(asked: str) -> None:
    """Every message passes at most one function of each layer, and every message passes the same ones."""
    bare, hardened = await pair(asked)
    # Starlette's ServerErrorMiddleware looks at the messages of HTTP, and lets a websocket through without a frame.
    starlettes = 0 if asked.startswith("WS") else 1
    for before, after in zip(bare.outside, hardened.outside, strict=True):
        assert after.sends == SENDS
        assert after.depth == before.depth + len(LAYERS) + 1 + len(SENDS) + starlettes


@pytest.mark.parametrize("asked", ["GET /ok", "GET /stream", "GET /nowhere", "PUT /ok", "WS /echo", "WS /nowhere"])
async def test_number_of_messages_does_not_change(asked: str) -> None:
    """A hardened application sends as many messages as the bare one, of the same kinds."""
    bare, hardened = await pair(asked)
    assert hardened.messages == bare.messages
    assert bare.messages


@pytest.mark.parametrize(
    ("off", "layers", "sends"),
    [
        ("health", {"HealthMiddleware", "DrainMiddleware"}, set()),
        # What is known about a request is always made; only the header field is switched off.
        ("request_id", set(), {"RequestContextMiddleware"}),
        ("security_headers", {"SecurityHeadersMiddleware"}, {"SecurityHeadersMiddleware"}),
        ("errors", {"ErrorsMiddleware"}, {"ErrorsMiddleware"}),
    ],
)
async def test_concern_that_is_off_costs_nothing(off: str, layers: set[str], sends: set[str]) -> None:
    """A concern that is switched off is absent: no frame on the way in, no function on the way out."""
    settings: dict[str, Any] = {off: {"enabled": False}}
    recorder = await Recorder(Settings(**settings)).serve("GET /ok")
    assert recorder.inside[0].layers == [layer for layer in LAYERS if layer not in layers]
    assert recorder.outside[0].sends == [layer for layer in SENDS if layer not in sends]


async def test_hardened_in_hardened_adds_one_frame() -> None:
    """Inside another hardened application only the frame that steps aside is added, and nothing on the way out."""
    recorder, outer = Recorder(), FastAPI()
    outer.mount("/inner", recorder.app)
    harden(outer)
    await recorder.serve("GET /inner/ok", outer)
    assert recorder.inside[0].layers == [*LAYERS, "_StepAside"]
    assert recorder.outside[0].sends == SENDS


@pytest.mark.parametrize(
    ("asked", "most"),
    [("GET /ok", 48), ("GET /override", 60), ("GET /stream", 64), ("WS /echo", 44), ("GET /nowhere", 62)],
)
async def test_request_takes_few_calls(asked: str, most: int) -> None:
    """Beside the bare application's, a request calls few Python functions; raise a number here only knowingly."""
    bare, hardened = await pair(asked)
    assert hardened.calls - bare.calls <= most


async def test_calls_do_not_grow_with_the_number_of_routes() -> None:
    """Six hundred routes more take not one call of ours more."""
    added = []
    for number in (0, 600):
        recorders = [Recorder(hardened=False), Recorder()]
        for recorder in recorders:
            for each in range(number):
                recorder.app.add_api_route(f"/route/{each}/of/many", recorder.endpoint)
        bare, hardened = [await recorder.serve("GET /ok") for recorder in recorders]
        added.append(hardened.calls - bare.calls)
    assert added[1] == added[0]


async def test_no_layer_wraps_receive() -> None:
    """The endpoint receives by the server's own function: no layer reads along."""
    found: list[Any] = []

    async def opaque(_scope: Scope, receive: Receive, send: Send) -> None:
        found.append(receive)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    recorder = Recorder()
    recorder.app.mount("/opaque", opaque)
    await recorder.serve("GET /opaque/x")
    assert found[-1] == recorder._receive
