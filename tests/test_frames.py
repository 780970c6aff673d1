"""What hardening costs, in numbers that are the same on every machine: frames in and out, calls, messages."""

import gc
import logging
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
from fastapi import FastAPI, WebSocket
from fastapi.responses import PlainTextResponse, StreamingResponse
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message

import fastapi_hardening
from fastapi_hardening import Principal, SecurityHeaders, Settings, harden

pytestmark = pytest.mark.anyio

PACKAGE = str(Path(fastapi_hardening.__file__).parent)
OURS = "our "
ANNA = Principal("anna")

# The innermost middleware of every application: what comes before it leads in, what comes after it leads out.
INNERMOST = "ExceptionMiddleware.__call__"


# Calls of Python functions that a concern may add to a request; raise a number here only knowingly.
MOST_CALLS = 16
MOST_CALLS_OF = {"access_log": 60, "auth": 1, "metrics": 26, "rate_limit": 30}
MOST_CALLS_OF_THE_REST = 30
# The same for a message of a websocket and the answer to it.
MOST_CALLS_OF_MESSAGES = 16


@pytest.fixture
def anyio_backend() -> str:
    """Run on asyncio, as uvicorn does."""
    return "asyncio"


def concern_of(parts: Sequence[str]) -> str:
    """What a module is called: by its name, or by its package where it is the layer of one."""
    return OURS + (parts[-2] if parts[-1] == "layer" else parts[-1])


class Stack:
    """The frames that are active at one place, the innermost first."""

    def __init__(self, frame: FrameType | None) -> None:
        # Nothing is called here: calls are counted meanwhile.
        self._codes: list[CodeType] = []
        while frame is not None:
            self._codes += (frame.f_code,)
            frame = frame.f_back

    @property
    def depth(self) -> int:
        """How many there are."""
        return len(self._codes)

    @property
    def ours(self) -> int:
        """How many are ours."""
        return sum(name.startswith(OURS) for name in self._names())

    @property
    def layers(self) -> list[str]:
        """The modules of ours whose frames lead into the application, in their order."""
        names = self._names()
        return [name for name in names[: names.index(INNERMOST)] if name.startswith(OURS)]

    @property
    def sends(self) -> list[str]:
        """The modules of ours whose frames lead out of it, in their order."""
        names = self._names()
        return [name for name in names[names.index(INNERMOST) :] if name.startswith(OURS)]

    def _names(self) -> list[str]:
        return [
            concern_of(Path(code.co_filename).with_suffix("").parts)
            if code.co_filename.startswith(PACKAGE)
            else code.co_qualname
            for code in reversed(self._codes)
        ]


class Recorder:
    """An application, bare or hardened, with a server that records what it costs to get into it and out again."""

    def __init__(self, settings: Settings | None = None, *, hardened: bool = True) -> None:
        self.inside: list[Stack] = []
        self.outside: list[Stack] = []
        self.messages: list[str] = []
        self.incoming: list[Message] = []
        self.calls = 0
        self.app = app = FastAPI()
        app.add_api_route("/ok", self.endpoint)
        app.add_api_route("/override", self.endpoint, dependencies=[SecurityHeaders(x_frame_options=None)])
        app.add_api_route("/stream", self.stream)
        app.add_api_websocket_route("/echo", self.websocket)
        app.add_api_websocket_route("/talk/{number}", self.talk)
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

    async def talk(self, websocket: WebSocket, number: int) -> None:
        """Takes so many messages, and answers each."""
        await websocket.accept()
        self.incoming = [{"type": "websocket.receive", "text": "hello"}] * number
        for _ in range(number):
            await websocket.send_text(await websocket.receive_text())

    async def serve(self, asked: str, app: ASGIApp | None = None) -> "Recorder":
        """Serves two requests; the second one, for which everything has been built, is recorded."""
        for _ in range(2):
            self.inside, self.outside, self.messages, self.calls = [], [], [], 0
            scope = self._scope(asked)
            # What pytest does with log records is no cost of ours, nor what hypothesis does when garbage is collected.
            gc.disable()
            root, previous = logging.getLogger(), sys.getprofile()
            handlers, root.handlers = root.handlers, []
            sys.setprofile(self._count)
            try:
                await (app or self.app)(scope, self._receive, self._send)
            finally:
                sys.setprofile(previous)
                root.handlers = handlers
                gc.enable()
        return self

    async def _receive(self) -> Message:
        return self.incoming.pop() if self.incoming else {"type": "websocket.connect"}

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
            "raw_path": path.encode("ascii"),
            "query_string": b"",
            "headers": [(b"host", b"shop.test")],
            "client": ("203.0.113.9", 40000),
            "server": ("127.0.0.1", 8000),
            "method": method,
        }


async def pair(asked: str) -> tuple[Recorder, Recorder]:
    """The same request to the bare and to the hardened application."""
    return await Recorder(hardened=False).serve(asked), await Recorder().serve(asked)


def layers_of(recorder: Recorder) -> list[str]:
    """The modules of the layers that harden() has put around an application, from the outside in."""
    found, layer = [], recorder.app.middleware_stack
    while layer is not None:
        if type(layer).__module__.startswith("fastapi_hardening."):
            found.append(concern_of(type(layer).__module__.split(".")))
        layer = getattr(layer, "app", None)
    return found


def concerns() -> list[str]:
    """The settings of the concerns that are on by default; the request's context is always made."""
    on = {layer.setting for layer in harden(FastAPI(), Settings()).pipeline if layer.state == "on"}
    return sorted(on - {"request_id"})


@pytest.mark.parametrize("asked", ["GET /ok", "GET /override", "WS /echo"])
async def test_each_layer_adds_one_frame_on_the_way_in(asked: str) -> None:
    """Between the server and the endpoint stand the layers, each with one frame."""
    bare, hardened = await pair(asked)
    layers = layers_of(hardened)
    assert layers[:3] == ["our harden", "our health", "our request_context"]
    assert hardened.inside[0].layers == layers
    # Two more: Starlette's ServerErrorMiddleware, outermost because instrumentation expects it there, and in front of
    # the router what looks whether a middleware has changed the path.
    assert hardened.inside[0].depth == bare.inside[0].depth + len(layers) + 2


@pytest.mark.parametrize("asked", ["GET /ok", "GET /override", "GET /stream", "WS /echo"])
async def test_each_layer_adds_at_most_one_function_on_the_way_out(asked: str) -> None:
    """Every message passes at most one function of each layer, from the inside out, and all pass the same ones."""
    bare, hardened = await pair(asked)
    passed = hardened.outside[0].sends
    assert all(stack.sends == passed for stack in hardened.outside)
    # The first is the frame in front of the router, which sends nothing itself.
    assert passed[0] == "our fast_routing"
    assert passed[1:] == [layer for layer in reversed(layers_of(hardened)) if layer in passed[1:]]
    assert "our security_headers" in passed
    # Starlette's ServerErrorMiddleware looks at the messages of HTTP, and lets a websocket through without a frame.
    starlettes = 0 if asked.startswith("WS") else 1
    for before, after in zip(bare.outside, hardened.outside, strict=True):
        added = len(after.layers) - len(before.layers) + 1 + len(passed) + starlettes
        assert after.depth == before.depth + added


@pytest.mark.parametrize("asked", ["GET /ok", "GET /stream", "GET /nowhere", "PUT /ok", "WS /echo", "WS /nowhere"])
async def test_number_of_messages_does_not_change(asked: str) -> None:
    """A hardened application sends as many messages as the bare one, of the same kinds."""
    bare, hardened = await pair(asked)
    assert hardened.messages == bare.messages
    assert bare.messages


@pytest.mark.parametrize("concern", concerns())
async def test_concern_that_is_off_costs_nothing(concern: str) -> None:
    """A concern that is switched off is absent: no frame on the way in, no function on the way out."""
    off: dict[str, Any] = {concern: {"enabled": False}}
    on, without = await Recorder().serve("GET /ok"), await Recorder(Settings(**off)).serve("GET /ok")
    gone = set(layers_of(on)) - set(layers_of(without))
    assert gone
    assert without.inside[0].layers == [name for name in on.inside[0].layers if name not in gone]
    assert without.outside[0].sends == [name for name in on.outside[0].sends if name not in gone]


async def test_request_id_that_is_off_costs_nothing_on_the_way_out() -> None:
    """What is known about a request is always made; its header field passes no message where it is switched off."""
    on = await Recorder().serve("GET /ok")
    off = await Recorder(Settings(request_id={"enabled": False})).serve("GET /ok")
    assert off.inside[0].layers == on.inside[0].layers
    assert off.outside[0].sends == [name for name in on.outside[0].sends if name != "our request_context"]


async def test_hardened_in_hardened_adds_two_frames() -> None:
    """Inside another hardened application what steps aside and what looks at the path add a frame, nothing else."""
    alone, recorder, outer = await Recorder().serve("GET /ok"), Recorder(), FastAPI()
    outer.mount("/inner", recorder.app)
    harden(outer)
    await recorder.serve("GET /inner/ok", outer)
    assert recorder.inside[0].layers == alone.inside[0].layers
    assert recorder.inside[0].ours == alone.inside[0].ours + 2
    assert recorder.outside[0].ours == alone.outside[0].ours + 2


@pytest.mark.parametrize("concern", [*concerns(), None])
async def test_concern_takes_few_calls(concern: str | None) -> None:
    """A request calls few Python functions for each concern, and few for what is always there."""
    without: dict[str, Any] = {name: {"enabled": False} for name in ([concern] if concern else concerns())}
    off = (await Recorder(Settings(**without)).serve("GET /ok")).calls
    if concern is None:
        assert off - (await Recorder(hardened=False).serve("GET /ok")).calls <= MOST_CALLS_OF_THE_REST
    else:
        assert (await Recorder().serve("GET /ok")).calls - off <= MOST_CALLS_OF.get(concern, MOST_CALLS)


@pytest.mark.parametrize(("asked", "most"), [("GET /ok", 30), ("WS /echo", 55)])
async def test_a_caller_who_is_let_in_costs_few_calls(asked: str, most: int) -> None:
    """What authentication adds where everything is closed, beside the authenticator; no function on the way out."""

    class Everybody:
        scheme = "bearer"
        challenge = "Bearer"

        async def authenticate(self, _connection: HTTPConnection) -> Principal:
            return ANNA

    on = Recorder(hardened=False)
    harden(on.app, Settings(auth={"default": "required"}), authenticators=[Everybody()])
    off = await Recorder(Settings(auth={"enabled": False})).serve(asked)
    await on.serve(asked)
    assert on.calls - off.calls <= most
    assert on.outside[0].sends == off.outside[0].sends


@pytest.mark.parametrize(
    ("concern", "most"),
    [({"versioning": {"versions": ["1", "2"], "default": "1"}}, 22), ({"tenancy": {"default": "acme"}}, 20)],
)
async def test_a_concern_that_is_off_by_default_takes_few_calls(concern: dict[str, Any], most: int) -> None:
    """One frame on the way in, at most one function on the way out, and few calls beside."""
    on, off = await Recorder(Settings.model_validate(concern)).serve("GET /ok"), await Recorder().serve("GET /ok")
    assert on.calls - off.calls <= most
    assert on.inside[0].ours == off.inside[0].ours + 1
    assert on.outside[0].ours <= off.outside[0].ours + 2


async def test_websocket_limits_take_few_calls_for_each_message() -> None:
    """What is counted and watched of a message and of the answer to it is a few calls, and no task or timer."""
    added: list[int] = []
    for number in (0, 100):
        calls = []
        for enabled in (True, False):
            recorder = Recorder(Settings(websocket_limits={"enabled": enabled}))
            await recorder.serve(f"WS /talk/{number}")
            calls.append(recorder.calls)
        added.append(calls[0] - calls[1])
    assert (added[1] - added[0]) / 100 <= MOST_CALLS_OF_MESSAGES


async def test_calls_do_not_grow_with_the_number_of_routes() -> None:
    """Six hundred routes more take not one call of ours more."""
    added = []
    for number in (0, 600):
        recorders = [Recorder(hardened=False), Recorder()]
        for recorder in recorders:
            for each in range(number):
                recorder.app.add_api_route(f"/route/{each}/of/many", recorder.endpoint)
        # The least of a few: a request that a busy machine holds up meets what is done once a second.
        bare, hardened = [min([(await each.serve("GET /ok")).calls for _ in range(5)]) for each in recorders]
        added.append(hardened - bare)
    assert added[1] == added[0]
