"""Routing by candidates: what it answers is what the router answers, only sooner."""

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI, Request, WebSocket
from fastapi.routing import APIRoute
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.routing import Host, Match, Mount, Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from fastapi_hardening import Settings, harden
from fastapi_hardening.core.routes import table_of
from fastapi_hardening.performance.fast_routing import FastRouting, RoutingSettings
from tests.effort import EFFORT

# Nothing else of ours, so that only routing can make a difference.
ALONE: dict[str, Any] = {
    name: {"enabled": False}
    for name in ("access_log", "address_limit", "cors", "errors", "health", "metrics", "rate_limit", "request_limits",
                 "security_headers", "request_id")
}  # fmt: skip


def scope_of(asked: str, root_path: str = "", host: str = "test") -> Scope:
    method, _, path = asked.partition(" ")
    return {
        "type": "websocket" if method == "WS" else "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": root_path,
        "headers": [(b"host", host.encode())],
        "server": ("test", 80),
        "client": ("203.0.113.9", 40000),
        "extensions": {"websocket.http.response": {}},
    }


async def ask(app: ASGIApp, scope: Scope) -> list[Any]:
    """Everything that a server is sent; in an error's place, what it is."""
    sent: list[Any] = []

    async def receive() -> Any:
        if scope["type"] == "http":
            return {"type": "http.request", "body": b"", "more_body": False}
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    try:
        await app(dict(scope), receive, send)
    except Exception as error:  # noqa: BLE001 - whatever it is, both must raise it
        sent.append((type(error), str(error)))
    return sent


def matched(app: FastAPI, asked: str) -> int:
    """How many times FastAPI asks one of its routes, until it has an answer."""
    times = 0

    def count(frame: FrameType, event: str, _argument: object) -> None:
        nonlocal times
        times += event == "call" and frame.f_code is APIRoute.matches.__code__

    previous = sys.getprofile()
    sys.setprofile(count)
    try:
        asyncio.run(ask(app, scope_of(asked)))
    finally:
        sys.setprofile(previous)
    return times


def hardened(app: FastAPI, *, fast: bool = True) -> FastAPI:
    harden(app, Settings(routing={"fast": fast}, **ALONE))
    return app


async def nothing() -> None:
    """An endpoint."""


def many_routes() -> FastAPI:
    app = FastAPI()
    inner, outer = APIRouter(), APIRouter()
    for number in range(50):
        app.get(f"/direct/{number}/{{thing}}")(nothing)
        inner.get(f"/included/{number}/{{thing}}")(nothing)
    outer.include_router(inner, prefix="/deep")
    app.include_router(inner, prefix="/api")
    app.include_router(outer, prefix="/outer")
    return app


# --- how much is asked ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "times"), [("/direct/49/x", 1), ("/api/included/49/x", 2), ("/outer/deep/included/49/x", 3)]
)
def test_only_the_candidates_are_asked(path: str, times: int) -> None:
    """The last of many routes is reached by asking it alone; once more for each level of includes, as FastAPI does."""
    assert matched(many_routes(), f"GET {path}") >= 50
    assert matched(hardened(many_routes(), fast=False), f"GET {path}") >= 50
    assert matched(hardened(many_routes()), f"GET {path}") == times


def test_an_unknown_path_is_answered_by_the_whole_router() -> None:
    """What no candidate matches is left to the router: it alone knows redirects, frontends and its default."""
    asked = "GET /nowhere"
    bare = matched(many_routes(), asked)
    assert matched(hardened(many_routes()), asked) == bare


def test_the_short_lists_are_remembered_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths that a client makes up fill no memory, and are routed all the same."""
    monkeypatch.setattr("fastapi_hardening.performance.fast_routing._MOST_LISTS", 3)
    app = hardened(many_routes())
    for number in range(6):
        assert matched(app, f"GET /direct/{number}/x") == 1
    routing = app.router.middleware_stack
    assert isinstance(routing, FastRouting)
    assert len(routing._short) == 3


def test_a_router_with_middlewares_of_its_own_is_called_as_it_is() -> None:
    """Behind them it calls itself, where no list could be handed to it."""

    class Through:
        def __init__(self, app: ASGIApp) -> None:
            self.app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            await self.app(scope, receive, send)

    router: Any = Router([Route("/a", nothing)], middleware=[Middleware(Through)])
    assert not FastRouting(router, table_of(router))._fast
    assert FastRouting(Router([Route("/a", nothing)]), table_of(router))._fast


@pytest.mark.parametrize("off", [RoutingSettings(fast=False), RoutingSettings(enabled=False)])
def test_it_can_be_switched_off(off: RoutingSettings) -> None:
    """Then the router is called as it is."""
    router = many_routes().router
    assert not FastRouting(router, table_of(router), off)._fast


# --- that nothing else is different -----------------------------------------------------------------------------------


def test_urls_and_documents_know_every_route() -> None:
    """Only dispatch is narrowed: an endpoint makes URLs of other routes, and the document has all of them."""
    app = FastAPI()
    router = APIRouter()

    @router.get("/here")
    async def here(request: Request) -> str:
        return str(request.url_for("there", thing="5"))

    @app.get("/there/{thing}")
    async def there(thing: str) -> str:
        return thing

    app.include_router(router, prefix="/api")
    hardened(app)
    sent = asyncio.run(ask(app, scope_of("GET /api/here")))
    assert sent[1]["body"] == b'"http://test/there/5"'
    sent = asyncio.run(ask(app, scope_of("GET /openapi.json")))
    assert b"/api/here" in sent[1]["body"]
    assert b"/there/{thing}" in sent[1]["body"]


def test_a_route_that_is_added_later_is_reached() -> None:
    """Also in a router that was included before, and before a route that matches too."""
    app, router = FastAPI(), APIRouter()
    router.get("/{anything}")(nothing)
    app.include_router(router, prefix="/api")
    hardened(app)
    assert asyncio.run(ask(app, scope_of("GET /api/late")))[0]["status"] == 200
    assert asyncio.run(ask(app, scope_of("GET /later")))[0]["status"] == 404

    @router.get("/a/late")
    async def late() -> str:
        return "late"

    @app.get("/later")
    async def later() -> str:
        return "later"

    assert asyncio.run(ask(app, scope_of("GET /api/a/late")))[1]["body"] == b'"late"'
    assert asyncio.run(ask(app, scope_of("GET /later")))[1]["body"] == b'"later"'


class AnyCase(APIRoute):
    """A route with matching of its own, which its pattern does not tell."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        return super().matches({**scope, "path": scope["path"].lower()})


def test_a_route_with_matching_of_its_own_is_always_asked() -> None:
    """It keeps its place in the order, also in front of a path that another route has to the letter."""
    app = FastAPI()

    async def loose() -> str:
        return "loose"

    async def exact() -> str:
        return "exact"

    app.router.routes.append(AnyCase("/b", loose))
    app.get("/B")(exact)
    app.get("/C")(exact)
    hardened(app)
    assert asyncio.run(ask(app, scope_of("GET /B")))[1]["body"] == b'"loose"'
    assert asyncio.run(ask(app, scope_of("GET /C")))[1]["body"] == b'"exact"'
    assert table_of(app).find(scope_of("GET /B")).endpoint is loose


def test_a_path_that_a_middleware_changes_is_routed_by_the_new_one() -> None:
    """The candidates are those of the path at the router."""
    app = many_routes()

    class Rewrite:
        def __init__(self, app: ASGIApp) -> None:
            self.app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            await self.app({**scope, "path": "/direct/7/x"} if scope["type"] == "http" else scope, receive, send)

    app.add_middleware(Rewrite)
    assert asyncio.run(ask(hardened(app), scope_of("GET /nowhere")))[0]["status"] == 200


# --- any application, any request -------------------------------------------------------------------------------------

SEGMENTS = ["a", "b", "{v}", "{v:int}", "{v:path}", "a{v}", "{v}.{v}", ""]
PLACEMENTS = [
    "direct",
    "included",
    "nested",
    "twice",
    "websocket",
    "route",
    "mount",
    "child",
    "host",
    "any case",
    "front",
]
templates = st.lists(st.sampled_from(SEGMENTS), max_size=3).map(lambda segments: "/" + _distinct(segments))
methods = st.sampled_from([["GET"], ["POST"], ["GET", "DELETE"]])
asked_paths = st.lists(st.sampled_from(["a", "b", "ab", "1", "", "A", "a.b", "a\n", "é"]), max_size=5).map(
    lambda segments: "/" + "/".join(segments)
)
asked_methods = st.sampled_from(["GET", "GET", "POST", "DELETE", "HEAD", "OPTIONS", "WS"])


def _distinct(segments: list[str]) -> str:
    named, number = [], 0
    for segment in segments:
        while "{v" in segment:
            segment = segment.replace("{v", f"{{p{number}", 1)  # noqa: PLW2901
            number += 1
        named.append(segment)
    return "/".join(named)


def build(routes: list[tuple[str, str, list[str]]], page: Path) -> FastAPI:
    """An application whose endpoints tell what the router has made of the scope."""
    app = FastAPI(openapi_url=None)
    for number, (placement, template, allowed) in enumerate(routes):
        _ADD[placement](app, template, allowed, _Told(number), page)
    return app


class _Told:
    """Endpoints that answer with their number and what they were given."""

    def __init__(self, number: int) -> None:
        self.number = number

    def _of(self, connection: Any) -> dict[str, Any]:
        scope = connection.scope
        route = scope.get("route")
        return {
            "number": self.number,
            "parameters": {name: str(value) for name, value in scope["path_params"].items()},
            "root_path": scope.get("root_path"),
            "route": None if route is None else [type(route).__name__, route.path],
            "whole router": len(scope["router"].routes),
        }

    def api(self) -> Callable[..., Any]:
        async def endpoint(request: Request) -> JSONResponse:
            return JSONResponse(self._of(request))

        return endpoint

    def talk(self) -> Callable[..., Any]:
        async def endpoint(websocket: WebSocket) -> None:
            await websocket.accept()
            await websocket.send_json(self._of(websocket))
            await websocket.close()

        return endpoint


def _router(template: str, allowed: list[str], told: _Told) -> APIRouter:
    router = APIRouter()
    router.add_api_route(template, told.api(), methods=allowed)
    router.add_api_websocket_route(template, told.talk())
    return router


def _nested(app: FastAPI, template: str, allowed: list[str], told: _Told, _page: Path) -> None:
    middle = APIRouter()
    middle.add_api_route("/a", told.api())
    middle.include_router(_router(template, allowed, told), prefix="/b")
    app.include_router(middle, prefix="/a")


def _twice(app: FastAPI, template: str, allowed: list[str], told: _Told, _page: Path) -> None:
    router = _router(template, allowed, told)
    app.include_router(router, prefix="/a")
    app.include_router(router, prefix="/b")


def _child(app: FastAPI, template: str, allowed: list[str], told: _Told, _page: Path) -> None:
    child = FastAPI(openapi_url=None)
    child.include_router(_router(template, allowed, told))
    app.mount("/a", child)


def _front(app: FastAPI, _template: str, _allowed: list[str], told: _Told, page: Path) -> None:
    if told.number % 2:
        app.frontend("/a", directory=page)
    else:
        router = APIRouter()
        router.frontend("/b", directory=page)
        app.include_router(router, prefix="/a")


_ADD: dict[str, Callable[[FastAPI, str, list[str], _Told, Path], Any]] = {
    "direct": lambda app, template, allowed, told, _: app.add_api_route(template, told.api(), methods=allowed),
    "included": lambda app, template, allowed, told, _: app.include_router(
        _router(template, allowed, told), prefix="/a"
    ),
    "nested": _nested,
    "twice": _twice,
    "websocket": lambda app, template, _allowed, told, _: app.add_api_websocket_route(template, told.talk()),
    "route": lambda app, template, allowed, told, _: app.add_route(template, told.api(), methods=allowed),
    "mount": lambda app, template, allowed, told, _: app.router.routes.append(
        Mount("/b", routes=[Route(template, told.api(), methods=allowed)])
    ),
    "child": _child,
    "host": lambda app, template, allowed, told, _: app.router.routes.append(
        Host("other", Router([Route(template, told.api(), methods=allowed)]))
    ),
    "any case": lambda app, template, allowed, told, _: app.router.routes.append(
        AnyCase(template, told.api(), methods=allowed)
    ),
    "front": _front,
}


declared = st.lists(st.tuples(st.sampled_from(sorted(_ADD)), templates, methods), min_size=1, max_size=9)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one page, as a frontend."""
    folder = tmp_path_factory.mktemp("front")
    (folder / "index.html").write_text("<p>front</p>")
    (folder / "b").write_text("file")
    return folder


def comparable(sent: list[Any]) -> list[Any]:
    """What was sent, without what differs from one answer to the next."""
    for message in sent:
        if isinstance(message, dict) and "headers" in message:
            message["headers"] = sorted(pair for pair in message["headers"] if pair[0] != b"date")
    return sent


@settings(max_examples=100 * EFFORT)
@given(
    routes=declared,
    requests=st.lists(
        st.tuples(asked_methods, asked_paths, st.sampled_from(["", "", "/a"]), st.sampled_from(["test", "other"])),
        min_size=1,
        max_size=4,
    ),
)
def test_any_request_is_answered_as_by_the_router_alone(
    page: Path, routes: list[tuple[str, str, list[str]]], requests: list[tuple[str, str, str, str]]
) -> None:
    """Whatever the routes, the path, the method and the host are: every message is the same."""
    fast, slow = hardened(build(routes, page)), hardened(build(routes, page), fast=False)
    for method, path, root_path, host in requests:
        scope = scope_of(f"{method} {path}", root_path, host)
        expected = comparable(asyncio.run(ask(slow, scope)))
        assert comparable(asyncio.run(ask(fast, scope))) == expected


def test_the_applications_above_have_what_they_say(page: Path) -> None:
    """A frontend, a host, a mount and a socket answer there, with and without the short list."""
    routes = [("front", "/", ["GET"]), ("front", "/", ["GET"]), ("host", "/h", ["GET"]), ("mount", "/m", ["GET"]),
              ("websocket", "/w", ["GET"])]  # fmt: skip
    for fast in (True, False):
        app = hardened(build(routes, page), fast=fast)
        for path, host, expected in (("/a/", "test", 200), ("/a/b/b", "test", 200), ("/h", "other", 200),
                                     ("/h", "test", 404), ("/b/m", "test", 200)):  # fmt: skip
            sent = asyncio.run(ask(app, scope_of(f"GET {path}", host=host)))
            assert sent[0]["status"] == expected, path
        assert asyncio.run(ask(app, scope_of("WS /w")))[0]["type"] == "websocket.accept"
