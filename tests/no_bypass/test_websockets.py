"""A websocket is hardened like any answer: its acceptance and its refusal carry the id and the header fields."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from fastapi import APIRouter, Depends, FastAPI, HTTPException, WebSocket, WebSocketException
from fastapi.responses import PlainTextResponse
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Mount, Router, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from fastapi_hardening import Problem, harden
from fastapi_hardening.core.clock import ManualClock
from tests.no_bypass.conftest import Build, Hardened, Knock, Site

SECRET = "a secret of the exception"


class BrokenError(Exception):
    """Raised by an endpoint."""


# --- endpoints, one for each outcome ----------------------------------------------------------------------------------


async def echo(websocket: WebSocket) -> None:
    await websocket.accept(headers=[(b"x-mine", b"yes"), (b"x-request-id", b"mine")])
    await websocket.send_text(await websocket.receive_text())
    await websocket.close(4001, "enough")


async def bare(websocket: WebSocket) -> None:
    await websocket.receive()
    await websocket.send({"type": "websocket.accept"})


async def close(websocket: WebSocket) -> None:
    await websocket.close(4002, "not you")


async def deny(websocket: WebSocket) -> None:
    await websocket.send_denial_response(PlainTextResponse("not you", 403))


async def raise_websocket_exception(_websocket: WebSocket) -> None:
    raise WebSocketException(4003, "not you")


async def boom(_websocket: WebSocket) -> None:
    raise BrokenError(SECRET)


async def late_boom(websocket: WebSocket) -> None:
    await websocket.accept()
    raise BrokenError(SECRET)


async def refuse() -> None:
    raise Problem("Not you.", status=403)


async def refuse_plainly() -> None:
    raise HTTPException(403, "not you")


async def number(websocket: WebSocket, number: int) -> None:
    await websocket.accept(headers=[(b"x-number", str(number).encode())])


IN_BOTH = (echo, bare, close, deny, raise_websocket_exception, boom, late_boom)


def add_fastapi_routes(to: FastAPI | APIRouter, prefix: str = "") -> None:
    """Adds all of them in FastAPI's manner."""
    for endpoint in IN_BOTH:
        to.add_api_websocket_route(f"{prefix}/{endpoint.__name__}", endpoint)
    to.add_api_websocket_route(prefix + "/number/{number}", number)
    to.add_api_websocket_route(prefix + "/refused", bare, dependencies=[Depends(refuse)])
    to.add_api_websocket_route(prefix + "/refused-plainly", bare, dependencies=[Depends(refuse_plainly)])


def starlette_routes() -> list[WebSocketRoute]:
    """Those that Starlette can have."""
    return [WebSocketRoute("/" + endpoint.__name__, endpoint) for endpoint in IN_BOTH]


async def opaque(scope: Scope, receive: Receive, send: Send) -> None:
    """A few of them as a bare ASGI function, which nothing looks into."""
    name = scope["path"].rpartition("/")[2]
    assert (await receive())["type"] == "websocket.connect"
    if name == "boom":
        raise BrokenError(SECRET)
    if name == "close":
        await send({"type": "websocket.close", "code": 4002, "reason": "not you"})
    else:
        await send({"type": "websocket.accept"})


PLACEMENTS = {
    "/direct": "fastapi",
    "/included": "fastapi",
    "/1/2/3/4/5/6/7/8": "fastapi",
    "/mounted": "fastapi",
    "/included/mounted": "fastapi",
    "/mounted/mounted": "fastapi",
    "/host": "fastapi",
    "/starlette": "starlette",
    "/router": "starlette",
    "/opaque": "opaque",
}


def make_app(telemetry: Any) -> FastAPI:
    """Makes an application with every placement."""
    app = FastAPI(telemetry=telemetry)
    included, child, grandchild, host = APIRouter(), FastAPI(), FastAPI(), FastAPI()
    add_fastapi_routes(app, "/direct")
    add_fastapi_routes(included)
    add_fastapi_routes(child)
    add_fastapi_routes(grandchild)
    add_fastapi_routes(host, "/host")
    child.mount("/mounted", grandchild)
    nested = included
    for segment in "8765432":
        outer = APIRouter()
        outer.include_router(nested, prefix=f"/{segment}")
        nested = outer
    app.include_router(nested, prefix="/1")
    app.mount("/mounted", child)
    included.mount("/mounted", child)
    app.include_router(included, prefix="/included")
    app.mount("/starlette", Starlette(routes=starlette_routes()))
    app.router.routes.append(Mount("/router", app=Router(starlette_routes())))
    app.mount("/opaque", opaque)
    app.host("host.test", host)
    return app


@pytest.fixture(scope="module")
def site(surround: Callable[[Build], Site]) -> Site:
    """Give an application with every placement, in surroundings of each kind."""
    return surround(make_app)


class Outcome(NamedTuple):
    """What is knocked at, where, and what comes back with and without the denial extension.

    Attributes:
        path: The path below the placement.
        where: The sorts of placement that it is for.
        denied: With the extension: an HTTP status, or ``None`` if the websocket is accepted, or a close code.
        closed: Without it.
        problem: Whether the denial is a problem document.
        raises: What goes on to the server.
    """

    path: str
    where: str
    denied: int | None
    closed: int | None
    problem: bool = False
    raises: type[Exception] | None = None


OUTCOMES = (
    Outcome("/echo", "fastapi starlette opaque", None, None),
    Outcome("/bare", "fastapi starlette", None, None),
    Outcome("/number/7", "fastapi", None, None),
    Outcome("/late_boom", "fastapi starlette", None, None, raises=BrokenError),
    Outcome("/close", "fastapi starlette opaque", 4002, 4002),
    Outcome("/nowhere", "fastapi starlette", 1000, 1000),
    Outcome("/raise_websocket_exception", "fastapi starlette", 4003, 4003),
    Outcome("/deny", "fastapi starlette", 403, 1011, raises=RuntimeError),
    Outcome("/refused", "fastapi", 403, 1008, problem=True),
    Outcome("/refused-plainly", "fastapi", 403, 1008, problem=True),
    Outcome("/number/x", "fastapi", 422, 1008, problem=True),
    Outcome("/boom", "fastapi starlette opaque", 500, 1011, problem=True, raises=BrokenError),
)


@pytest.mark.parametrize("denial", [True, False], ids=["denial", "close"])
@pytest.mark.parametrize(
    ("placement", "outcome"),
    [
        pytest.param(placement, outcome, id=placement + outcome.path)
        for placement, sort in PLACEMENTS.items()
        for outcome in OUTCOMES
        if sort in outcome.where.split()
    ],
)
def test_every_handshake_is_hardened(
    knock: Knock, hardened: Hardened, site: Site, *, placement: str, outcome: Outcome, denial: bool
) -> None:
    """Acceptance and denial carry the id and the header fields; a plain close, which has no fields, stays as it was."""
    answer = knock(
        site.app,
        site.prefix + placement + outcome.path,
        headers=[("host", "host.test")] if placement == "/host" else [],
        incoming=[{"type": "websocket.receive", "text": "hello"}],
        denial=denial,
        root_path=site.root_path,
    )
    expected = outcome.denied if denial else outcome.closed
    mount = placement.rpartition("/")[2]
    if site.around == "bare root path" and mount in ("mounted", "starlette", "router"):
        # Starlette routes by the path below a mount only if the whole path begins with the root path.
        assert answer.messages == [{"type": "websocket.close", "code": 1000, "reason": ""}]
    elif expected is None:
        assert answer.kinds[0] == "websocket.accept", (answer.messages, answer.raised)
        hardened(answer)
        assert answer.all("x-mine") == (["yes"] if outcome.path == "/echo" and mount != "opaque" else [])
    elif expected >= 1000:
        assert answer.kinds == ["websocket.close"], (answer.messages, answer.raised)
        assert answer.messages[0]["code"] == expected
        assert SECRET not in answer.messages[0].get("reason", "")
    else:
        assert answer.kinds == ["websocket.http.response.start", "websocket.http.response.body"]
        assert answer.status == expected
        hardened(answer)
        assert SECRET.encode() not in answer.body
        if outcome.problem:
            assert answer.problem["request_id"] == answer.one("x-request-id")


# --- refusals ---------------------------------------------------------------------------------------------------------


class Raising:
    """A user's middleware that fails."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise BrokenError(SECRET)


@pytest.mark.parametrize(("denial", "kind"), [(True, "websocket.http.response.start"), (False, "websocket.close")])
@pytest.mark.parametrize("path", ["/direct/echo", "/mounted/echo", "/opaque/echo", "/nowhere"])
def test_refusal_of_a_layer_is_hardened(knock: Knock, hardened: Hardened, path: str, denial: bool, kind: str) -> None:
    """A layer refuses a handshake by a hardened problem where the server can send one, else by a close code."""
    app, child, clock = FastAPI(), FastAPI(), ManualClock()
    add_fastapi_routes(app, "/direct")
    add_fastapi_routes(child)
    app.mount("/mounted", child)
    app.mount("/opaque", opaque)
    handle = harden(app, clock=clock)
    handle.lifecycle.drain()
    clock.advance(handle.settings.health.drain_deadline_seconds)
    answer = knock(app, path, denial=denial)
    assert answer.kinds[0] == kind
    if denial:
        assert answer.status == 503
        assert answer.problem["request_id"] == answer.one("x-request-id")
        assert int(answer.one("retry-after")) >= 1
        hardened(answer)
    else:
        assert answer.messages == [{"type": "websocket.close", "code": 1013, "reason": "Service Unavailable"}]


@pytest.mark.parametrize(("denial", "kind"), [(True, "websocket.http.response.start"), (False, "websocket.close")])
@pytest.mark.parametrize("after", [False, True], ids=["added before harden()", "added after harden()"])
def test_middleware_that_raises_ends_in_a_refusal(
    knock: Knock, hardened: Hardened, after: bool, denial: bool, kind: str
) -> None:
    """A middleware of the application that fails ends the handshake as a failed endpoint does."""
    app = FastAPI(middleware=None if after else [Middleware(Raising)])
    harden(app)
    if after:
        app.add_middleware(Raising)
    answer = knock(app, "/anywhere", denial=denial)
    assert answer.kinds[0] == kind
    assert isinstance(answer.raised, BrokenError)
    if denial:
        assert answer.status == 500
        assert SECRET.encode() not in answer.body
        hardened(answer)
    else:
        assert answer.messages == [{"type": "websocket.close", "code": 1011, "reason": "Internal Server Error"}]


@pytest.mark.parametrize(("sent", "kept"), [("a-good.one_1", True), ("x" * 129, False), ("a b", False)])
@pytest.mark.parametrize("path", ["/direct/echo", "/direct/number/x", "/direct/deny", "/direct/boom"])
def test_id_of_the_client_is_kept_if_it_is_well_formed(
    knock: Knock, hardened: Hardened, path: str, sent: str, kept: bool
) -> None:
    """A well-formed id comes back on the acceptance or the denial; anything else is replaced."""
    app = FastAPI()
    add_fastapi_routes(app, "/direct")
    harden(app)
    incoming = [{"type": "websocket.receive", "text": "hello"}]
    answer = knock(app, path, headers=[("x-request-id", sent)], incoming=incoming)
    assert (answer.one("x-request-id") == sent) == kept
    hardened(answer)
