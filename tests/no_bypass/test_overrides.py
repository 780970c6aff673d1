"""An override holds on the route that runs, at whatever level it stands, and on the errors of that route."""

from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI, Request, WebSocket
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route, Router
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from fastapi_hardening import SecurityHeaders, harden
from tests.no_bypass.conftest import Answer, Ask, Build, Knock, Rewriting, Site


def kept(name: str) -> SecurityHeaders:
    """An override that tells its name in a field that answers do not have otherwise."""
    return SecurityHeaders(cache_control=f"max-age={MAX_AGES[name]}")


MAX_AGES = {name: number for number, name in enumerate(("app", "include", "router", "route", "child", "other"), 1)}


def holding(answer: Answer) -> str | None:
    """The name of the override that the answer shows."""
    values = answer.all("cache-control")
    assert len(values) < 2, values
    return next((name for name, age in MAX_AGES.items() if values == [f"max-age={age}"]), None)


async def ok() -> None: ...


async def boom() -> None:
    raise RuntimeError("a failure")


async def number(number: int) -> int:
    return number


async def read(request: Request) -> int:
    return len(await request.body())


async def echo(websocket: WebSocket) -> None:
    await websocket.accept()


async def page(_request: Request) -> PlainTextResponse:
    return PlainTextResponse("a page")


async def opaque(scope: Scope, _receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
    else:
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body"})


def add_routes(to: FastAPI | APIRouter, prefix: str = "", overrides: Sequence[SecurityHeaders] = ()) -> None:
    """Adds routes that come to every outcome, with these overrides at the level of the route."""
    to.add_api_route(prefix + "/ok", ok, dependencies=overrides)
    to.add_api_route(prefix + "/boom", boom, dependencies=overrides)
    to.add_api_route(prefix + "/number/{number}", number, dependencies=overrides)
    to.add_api_route(prefix + "/read", read, methods=["POST"], max_body_size=3, dependencies=overrides)
    to.add_api_websocket_route(prefix + "/echo", echo, dependencies=overrides)


# What a route comes to: with its dependencies, and without them ever running.
RUNS = ("GET /ok", "GET /boom", "GET /number/x", "POST /read")
ANSWERED_BEFORE = ("PUT /ok", "HEAD /ok", "GET /ok/")


# --- levels -----------------------------------------------------------------------------------------------------------

LEVELS = ("app", "include", "router", "route")
OWN_FIELD = {
    "app": ("referrer_policy", "no-referrer"),
    "include": ("x_frame_options", "SAMEORIGIN"),
    "router": ("cross_origin_opener_policy", "unsafe-none"),
    "route": ("cross_origin_resource_policy", "cross-origin"),
}


@pytest.mark.parametrize("asked", [*RUNS, *ANSWERED_BEFORE])
@pytest.mark.parametrize(
    "levels",
    [levels for size in range(5) for levels in combinations(LEVELS, size)],
    ids="+".join,
)
def test_every_level_holds_and_the_innermost_wins(ask: Ask, levels: tuple[str, ...], asked: str) -> None:
    """Each level changes its own field; of a field that several change, the innermost has the word."""
    at: dict[str, list[SecurityHeaders]] = {level: [] for level in LEVELS}
    for level in levels:
        field, value = OWN_FIELD[level]
        at[level] = [SecurityHeaders(cache_control=f"max-age={MAX_AGES[level]}", **{field: value})]
    app, router = FastAPI(dependencies=at["app"]), APIRouter(dependencies=at["router"])
    add_routes(router, overrides=at["route"])
    app.include_router(router, prefix="/in", dependencies=at["include"])
    harden(app)
    answer = ask(app, asked.replace(" ", " /in"), chunks=[b"four"])
    assert holding(answer) == (levels[-1] if levels else None)
    for level, (field, value) in OWN_FIELD.items():
        assert (answer.one(field.replace("_", "-")) == value) == (level in levels)


def test_two_overrides_of_one_level_hold_in_their_order(ask: Ask) -> None:
    """Of two overrides in one list both hold, and the later one has the word."""
    app = FastAPI()
    app.add_api_route("/ok", ok, dependencies=[SecurityHeaders(x_frame_options=None), kept("route"), kept("other")])
    harden(app)
    answer = ask(app, "GET /ok")
    assert holding(answer) == "other"
    assert answer.all("x-frame-options") == []


def test_override_used_again_further_in_has_the_word(ask: Ask) -> None:
    """One object at the application and at a route holds on the route against a router in between."""
    again, between = kept("app"), kept("router")
    app, router = FastAPI(dependencies=[again]), APIRouter(dependencies=[between])
    router.add_api_route("/ok", ok, dependencies=[again])
    router.add_api_route("/between", ok)
    app.include_router(router)
    harden(app)
    assert holding(ask(app, "GET /between")) == "router"
    assert holding(ask(app, "GET /ok")) == "app"


@pytest.mark.parametrize("depth", range(1, 9))
@pytest.mark.parametrize("asked", [*RUNS, *ANSWERED_BEFORE])
def test_innermost_of_nested_includes_wins(ask: Ask, depth: int, asked: str) -> None:
    """Eight includes deep, the innermost one that says something has the word."""
    nested = APIRouter()
    add_routes(nested)
    for level in reversed(range(1, 9)):
        outer = APIRouter()
        overrides = [SecurityHeaders(cache_control=f"max-age={level * 10}")] if level <= depth else []
        outer.include_router(nested, prefix=f"/{level}", dependencies=overrides)
        nested = outer
    app = FastAPI()
    app.include_router(nested)
    harden(app)
    answer = ask(app, asked.replace(" ", " /1/2/3/4/5/6/7/8"), chunks=[b"four"])
    assert answer.one("cache-control") == f"max-age={depth * 10}"


def test_router_included_twice_has_the_overrides_of_each_include(ask: Ask) -> None:
    """What one include says does not hold on the other."""
    app, router = FastAPI(), APIRouter()
    add_routes(router)
    app.include_router(router, prefix="/one", dependencies=[kept("include")])
    app.include_router(router, prefix="/two")
    harden(app)
    assert holding(ask(app, "GET /one/ok")) == "include"
    assert holding(ask(app, "GET /two/ok")) is None


# --- the application's word on everything -----------------------------------------------------------------------------


@pytest.fixture
def everywhere(tmp_path: Path) -> FastAPI:
    """Give a hardened application with an override of its own and one of everything."""
    (tmp_path / "text.txt").write_text("text")
    app, router, child = FastAPI(dependencies=[kept("app")]), APIRouter(), FastAPI()
    add_routes(app)
    add_routes(router)
    add_routes(child)
    app.add_route("/page", page)
    app.include_router(router, prefix="/in")
    router.mount("/child", child)
    app.mount("/child", child)
    app.mount("/starlette", Starlette(routes=[Route("/page", page)]))
    app.router.routes.append(Mount("/router", app=Router([Route("/page", page)])))
    app.mount("/files", StaticFiles(directory=tmp_path))
    app.mount("/opaque", opaque)
    app.host("host.test", child)
    app.frontend("/frontend", directory=tmp_path, fallback=None)
    harden(app)
    return app


@pytest.mark.parametrize(
    "asked",
    [
        *RUNS,
        *ANSWERED_BEFORE,
        "GET /nowhere",
        "GET /page",
        "GET /docs?asset=swagger-ui.css",
        "GET /openapi.json",
        *("GET " + prefix + path for prefix in ("/in", "/child", "/in/child") for path in ("/ok", "/boom", "/nowhere")),
        *("PUT " + prefix + "/ok" for prefix in ("/in", "/child", "/in/child")),
        "GET /starlette/page",
        "GET /starlette/nowhere",
        "PUT /starlette/page",
        "GET /router/page",
        "GET /router/nowhere",
        "GET /files/text.txt",
        "GET /files/nowhere",
        "POST /files/text.txt",
        "GET /opaque/anything",
        "GET /frontend/text.txt",
        "GET /frontend/nowhere",
    ],
)
def test_override_of_the_application_holds_on_every_answer(ask: Ask, everywhere: FastAPI, asked: str) -> None:
    """What the application says holds on routes, pages, mounts, files and on every error."""
    assert holding(ask(everywhere, asked, chunks=[b"four"])) == "app"


@pytest.mark.parametrize("path", ["/ok", "/boom", "/nowhere"])
def test_override_of_the_application_holds_behind_a_host(ask: Ask, everywhere: FastAPI, path: str) -> None:
    """What the application says holds on what it serves by the name of a host, too."""
    assert holding(ask(everywhere, f"GET {path}", headers=[("host", "host.test")])) == "app"


@pytest.mark.parametrize("path", ["/echo", "/in/echo", "/child/echo", "/in/child/echo", "/opaque/echo"])
def test_override_of_the_application_holds_on_websockets(knock: Knock, everywhere: FastAPI, path: str) -> None:
    """What the application says holds on the acceptance of a websocket."""
    assert holding(knock(everywhere, path)) == "app"


# --- mounted applications ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mount", ["/child", "/in/child", "/child/child"])
@pytest.mark.parametrize(
    ("asked", "holds"),
    [
        *((asked, "route") for asked in (*RUNS, *ANSWERED_BEFORE)),
        ("GET /plain", "child"),
        ("PUT /plain", "child"),
        ("GET /nowhere", "child"),
    ],
)
def test_mounted_application_has_the_word_on_its_own_routes(ask: Ask, mount: str, asked: str, holds: str) -> None:
    """Of an application and one mounted in it the mounted one is further in, and its routes are the innermost."""
    app, child, router = FastAPI(dependencies=[kept("app")]), FastAPI(dependencies=[kept("child")]), APIRouter()
    add_routes(child, overrides=[kept("route")])
    child.add_api_route("/plain", ok)
    between = FastAPI(dependencies=[kept("other")])
    between.mount("/child", child)
    router.mount("/child", child)
    app.mount("/child", between if mount == "/child/child" else child)
    app.include_router(router, prefix="/in")
    harden(app)
    assert holding(ask(app, asked.replace(" ", " " + mount), chunks=[b"four"])) == holds


@pytest.mark.parametrize("level", ["include", "router"])
@pytest.mark.parametrize("asked", ["GET /in/page", "PUT /in/page", "GET /in/child/ok", "GET /in/opaque/anything"])
def test_override_of_a_router_holds_on_what_is_mounted_in_it(ask: Ask, level: str, asked: str) -> None:
    """What an include or a router says holds on mounts and Starlette's routes in it, as an application's word does."""
    at = {name: [kept(name)] if name == level else [] for name in LEVELS}
    app, router, child = FastAPI(), APIRouter(dependencies=at["router"]), FastAPI()
    add_routes(child)
    router.add_route("/page", page)
    router.mount("/child", child)
    router.mount("/opaque", opaque)
    app.include_router(router, prefix="/in", dependencies=at["include"])
    harden(app)
    assert holding(ask(app, asked)) == level


@pytest.mark.parametrize("asked", RUNS)
def test_override_of_a_route_behind_a_host_holds(ask: Ask, asked: str) -> None:
    """A route that is found by the name of its host has its override, at the latest when it runs."""
    app, host = FastAPI(dependencies=[kept("app")]), FastAPI(dependencies=[kept("child")])
    add_routes(host, overrides=[kept("route")])
    app.host("host.test", host)
    harden(app)
    assert holding(ask(app, asked, headers=[("host", "host.test")], chunks=[b"four"])) == "route"


@pytest.mark.parametrize("level", ["app", "include", "router", "route"])
@pytest.mark.parametrize("path", ["/in/echo", "/child/in/echo"])
@pytest.mark.parametrize("denial", [True, False])
def test_override_holds_on_websockets(knock: Knock, level: str, path: str, denial: bool) -> None:
    """A websocket's acceptance shows the override of its route, whatever its level."""
    at = {name: [kept(name)] if name == level else [] for name in LEVELS}
    app, router = FastAPI(dependencies=at["app"]), APIRouter(dependencies=at["router"])
    router.add_api_websocket_route("/echo", echo, dependencies=at["route"])
    app.include_router(router, prefix="/in", dependencies=at["include"])
    served = app
    if path.startswith("/child"):
        served = FastAPI()
        served.mount("/child", app)
    harden(served)
    assert holding(knock(served, path, denial=denial)) == level


# --- surroundings -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(surround: Callable[[Build], Site]) -> Site:
    """Give an application with an override at each level, in surroundings of each kind."""

    def build(telemetry: Any) -> FastAPI:
        app = FastAPI(dependencies=[kept("app")], telemetry=telemetry)
        router, child = APIRouter(dependencies=[kept("router")]), FastAPI(dependencies=[kept("child")])
        add_routes(app, "/direct", [kept("route")])
        add_routes(router)
        add_routes(child)
        app.include_router(router, prefix="/in")
        app.mount("/child", child)
        app.mount("/opaque", opaque)
        return app

    return surround(build)


@pytest.mark.parametrize(("prefix", "holds"), [("/direct", "route"), ("/in", "router"), ("/child", "child")])
@pytest.mark.parametrize("asked", [*RUNS, *ANSWERED_BEFORE])
def test_override_holds_in_all_surroundings(ask: Ask, site: Site, prefix: str, holds: str, asked: str) -> None:
    """Behind a root path, under instrumentation, inside another application: the override of the route holds."""
    answer = ask(site.app, asked.replace(" ", f" {site.prefix}{prefix}"), root_path=site.root_path, chunks=[b"4"] * 4)
    # Where no route has run, only the application's own middleware knows which one it meant.
    unknown = site.prefix == "/asked" and asked in ANSWERED_BEFORE
    assert holding(answer) in ((holds, "app") if unknown else (holds,))


@pytest.mark.parametrize("path", ["/nowhere", "/opaque/anything"])
def test_override_of_the_application_holds_in_all_surroundings(ask: Ask, site: Site, path: str) -> None:
    """Behind a root path, under instrumentation, inside another application: the application's word holds on all."""
    assert holding(ask(site.app, f"GET {site.prefix}{path}", root_path=site.root_path)) == "app"


@pytest.mark.parametrize(("prefix", "holds"), [("/direct", "route"), ("/in", "router"), ("/child", "child")])
def test_override_of_a_websocket_holds_in_all_surroundings(knock: Knock, site: Site, prefix: str, holds: str) -> None:
    """Behind a root path, under instrumentation, inside another application: the override of the websocket holds."""
    if site.around == "bare root path" and prefix == "/child":
        return  # Starlette itself does not find it there.
    assert holding(knock(site.app, f"{site.prefix}{prefix}/echo", root_path=site.root_path)) == holds


# --- rewritten paths --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copies", [False, True], ids=["in place", "in a copy"])
@pytest.mark.parametrize("nested", ["", "/in", "/child"])
@pytest.mark.parametrize("asked_is_a_route", [False, True])
def test_override_of_the_route_that_runs_holds(ask: Ask, *, copies: bool, nested: str, asked_is_a_route: bool) -> None:
    """Where a middleware sends a request to another route, that route's override holds, not that of the path asked."""
    app, router, child = FastAPI(), APIRouter(), FastAPI()
    override = SecurityHeaders(cache_control=f"max-age={MAX_AGES['route']}")
    for to in (app, router, child):
        to.add_api_route("/ok", ok, dependencies=[override])
    app.include_router(router, prefix="/in")
    app.mount("/child", child)
    if asked_is_a_route:
        lax = SecurityHeaders(cache_control=f"max-age={MAX_AGES['other']}", x_frame_options=None)
        app.add_api_route(f"/asked{nested}/ok", ok, dependencies=[lax])
    app.add_middleware(Rewriting, copies=copies)
    harden(app)
    answer = ask(app, f"GET /asked{nested}/ok")
    assert holding(answer) == "route"
    assert answer.one("x-frame-options") == "DENY"


@pytest.mark.parametrize("copies", [False, True], ids=["in place", "in a copy"])
def test_override_of_the_path_asked_does_not_hold_on_a_route_without_one(ask: Ask, copies: bool) -> None:
    """A route without an override keeps the full protection, also if the path asked has a laxer one."""
    app = FastAPI()
    app.add_api_route("/ok", ok)
    app.add_api_route("/asked/ok", ok, dependencies=[SecurityHeaders(x_frame_options=None)])
    app.add_middleware(Rewriting, copies=copies)
    harden(app)
    assert (ask(app, "GET /asked/ok")).one("x-frame-options") == "DENY"


# --- changes while it serves ------------------------------------------------------------------------------------------


def to_app(app: FastAPI) -> tuple[FastAPI | APIRouter, str]:
    return app, ""


def to_included_router(app: FastAPI) -> tuple[FastAPI | APIRouter, str]:
    router = APIRouter()
    app.include_router(router, prefix="/in")
    return router, "/in"


def to_nested_router(app: FastAPI) -> tuple[FastAPI | APIRouter, str]:
    router, outer = APIRouter(), APIRouter()
    outer.include_router(router, prefix="/nested")
    app.include_router(outer, prefix="/in")
    return router, "/in/nested"


def to_mounted_app(app: FastAPI) -> tuple[FastAPI | APIRouter, str]:
    child = FastAPI()
    app.mount("/child", child)
    return child, "/child"


def to_router_of_a_mounted_app(app: FastAPI) -> tuple[FastAPI | APIRouter, str]:
    child = FastAPI()
    app.mount("/child", child)
    router, prefix = to_included_router(child)
    return router, f"/child{prefix}"


PLACES = (to_app, to_included_router, to_nested_router, to_mounted_app, to_router_of_a_mounted_app)


@pytest.mark.parametrize("asked", [*RUNS, *ANSWERED_BEFORE])
@pytest.mark.parametrize("place_early", [True, False], ids=["place before", "place after"])
@pytest.mark.parametrize("place", PLACES)
def test_override_of_a_late_route_holds(
    ask: Ask, place: Callable[[FastAPI], tuple[FastAPI | APIRouter, str]], place_early: bool, asked: str
) -> None:
    """A route that is added while the application serves has its override at once, wherever it is added."""
    app = FastAPI()
    app.add_api_route("/first", ok)
    harden(app)
    to, prefix = place(app) if place_early else (app, "")
    ask(app, "GET /first")
    if not place_early:
        to, prefix = place(app)
        ask(app, "GET /first")
    add_routes(to, overrides=[kept("route")])
    answer = ask(app, asked.replace(" ", " " + prefix), chunks=[b"four"])
    assert holding(answer) == "route"


def test_override_goes_with_its_route(ask: Ask) -> None:
    """A route that is taken away takes its override with it."""
    app = FastAPI()
    app.add_api_route("/ok", ok, dependencies=[kept("route")])
    app.add_api_route("/ok", ok, dependencies=[kept("other")])
    harden(app)
    assert holding(ask(app, "GET /ok")) == "route"
    del app.router.routes[-2]
    assert holding(ask(app, "GET /ok")) == "other"
    del app.router.routes[-1]
    assert holding(ask(app, "GET /ok")) is None


# --- alone ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mount", ["", "/child"])
def test_override_sets_its_fields_where_nothing_is_hardened(ask: Ask, mount: str) -> None:
    """In an application that was never hardened an override sets the fields that it names, and only those."""
    app: ASGIApp
    inner = app = FastAPI()
    inner.add_api_route("/ok", ok, dependencies=[SecurityHeaders(cache_control="no-store", x_frame_options=None)])
    if mount:
        app = FastAPI()
        app.mount(mount, inner)
    answer = ask(app, f"GET {mount}/ok")
    assert answer.one("cache-control") == "no-store"
    assert {name for name, _ in answer.start["headers"]} == {b"cache-control", b"content-length", b"content-type"}
