"""The route table, against the router itself."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import APIRouter, Depends, FastAPI, WebSocket
from fastapi.routing import APIRoute
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse
from starlette.routing import Host, Match, Mount, Route, Router
from starlette.types import Receive, Scope, Send

from fastapi_hardening.core.policy import Override
from fastapi_hardening.core.routes import RouteEntry, RouteTable, route_of, table_of
from tests.effort import EFFORT


class Mark(Override):
    """An override that only has a name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    async def act_late(self, connection: HTTPConnection) -> None:
        """Does nothing: the table is what is tested here."""


async def endpoint() -> str:
    return "ok"


def scope_of(path: str, method: str = "GET", kind: str = "http", root_path: str = "", host: str = "test") -> Scope:
    return {
        "type": kind,
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "root_path": root_path,
        "query_string": b"",
        "headers": [(b"host", host.encode())],
        "scheme": "http",
        "server": ("test", 80),
    }


def find(app: Any, path: str, method: str = "GET", kind: str = "http", root_path: str = "") -> RouteEntry:
    return table_of(app).find(scope_of(path, method, kind, root_path))


def marks(entry: RouteEntry) -> list[str]:
    return [mark.name for mark in entry.of(Mark) if isinstance(mark, Mark)]


# --- levels -----------------------------------------------------------------------------------------------------------


def app_with_levels() -> FastAPI:
    inner = APIRouter(dependencies=[Mark("router")])
    inner.get("/items/{item}", dependencies=[Mark("route")])(endpoint)
    outer = APIRouter()
    outer.include_router(inner, prefix="/v1", dependencies=[Mark("include")])
    app = FastAPI(dependencies=[Mark("app")])
    app.include_router(outer, prefix="/api")
    return app


def test_an_entry_has_the_overrides_of_every_level_outermost_first() -> None:
    """What FastAPI would run, in the order in which it would run it."""
    entry = find(app_with_levels(), "/api/v1/items/7")
    assert entry.template == "/api/v1/items/{item}"
    assert marks(entry) == ["app", "include", "router", "route"]


def test_another_method_reaches_the_entry_that_answers_405() -> None:
    """A 405 belongs to the route whose path it is, with its overrides."""
    assert marks(find(app_with_levels(), "/api/v1/items/7", method="DELETE")) == ["app", "include", "router", "route"]


def test_a_missing_slash_reaches_the_entry_that_is_redirected_to() -> None:
    """A redirect belongs to its target."""
    assert find(app_with_levels(), "/api/v1/items/7/").template == "/api/v1/items/{item}"


@pytest.mark.parametrize("path", ["/", "/nope", "/api", "/api/v1/items", "//", "/api/v1/items/7/8"])
def test_an_unknown_path_has_the_overrides_of_the_application(path: str) -> None:
    """Unknown means the default policy, never exempt."""
    entry = find(app_with_levels(), path)
    assert (entry.kind, entry.template, marks(entry)) == ("unmatched", None, ["app"])


def test_an_override_inside_a_dependency_counts() -> None:
    """A policy may be bundled with what needs it."""

    async def bundle(_: None = Mark("bundled")) -> None:  # type: ignore[assignment]
        return

    app = FastAPI()
    app.get("/", dependencies=[Depends(bundle)])(endpoint)
    assert marks(find(app, "/")) == ["bundled"]


def test_a_mounted_application_has_the_overrides_of_its_parent_first() -> None:
    """FastAPI runs no dependency of the parent on a mount; the table knows them all the same."""
    child = FastAPI(dependencies=[Mark("child")])
    child.get("/x", dependencies=[Mark("route")])(endpoint)
    app = FastAPI(dependencies=[Mark("app")])
    app.mount("/child", child)
    entry = find(app, "/child/x")
    assert entry.template == "/child/x"
    assert marks(entry) == ["app", "child", "route"]
    assert marks(find(app, "/child/nope")) == ["app", "child"]


@pytest.mark.parametrize("mounted", ["starlette", "router", "opaque"])
def test_what_is_mounted_and_knows_no_overrides_has_those_of_the_application(mounted: str) -> None:
    """Opaque means the default policy of the application around."""

    async def opaque(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse("ok")(scope, receive, send)

    route = Route("/x", lambda request: PlainTextResponse("ok"))
    inner: Any = {"starlette": Starlette(routes=[route]), "router": Router([route]), "opaque": opaque}[mounted]
    app = FastAPI(dependencies=[Mark("app")])
    app.mount("/in", inner)
    entry = find(app, "/in/x")
    assert marks(entry) == ["app"]
    assert entry.kind == ("mount" if mounted == "opaque" else "http")


def test_a_websocket_and_a_get_of_one_path_are_told_apart() -> None:
    """The type of the connection decides, not only the path."""
    app = FastAPI()
    app.get("/both", dependencies=[Mark("http")])(endpoint)

    @app.websocket("/both", dependencies=[Mark("websocket")])
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()

    assert marks(find(app, "/both")) == ["http"]
    assert marks(find(app, "/both", kind="websocket")) == ["websocket"]


def test_the_first_declared_route_wins() -> None:
    """As in the router, a general route before a special one hides it."""
    app = FastAPI()
    app.get("/items/{item}")(endpoint)
    app.get("/items/me")(endpoint)
    assert find(app, "/items/me").template == "/items/{item}"


def test_a_root_path_is_taken_off() -> None:
    """Behind a prefix the same route is found, whether the server keeps the prefix in the path or not."""
    app = FastAPI()
    app.get("/x")(endpoint)
    assert find(app, "/prefix/x", root_path="/prefix").template == "/x"
    assert find(app, "/x", root_path="/prefix").template == "/x"
    assert find(app, "/prefixes/x", root_path="/prefix").kind == "unmatched"


def test_a_child_with_a_root_path_of_its_own_matches_as_it_would() -> None:
    """FastAPI overwrites the root path in such a child, so that no path of it matches."""
    child = FastAPI()
    child.root_path = "/elsewhere"  # the argument is deprecated, the attribute is what is read
    child.get("/x")(endpoint)
    app = FastAPI()
    app.mount("/child", child)
    assert find(app, "/child/x").kind == "unmatched"


def test_a_route_with_matching_code_of_its_own_is_asked() -> None:
    """``Host`` looks at a header, and a custom class at whatever it likes."""

    class Odd(APIRoute):
        def matches(self, scope: Scope) -> tuple[Match, Scope]:
            return (Match.FULL if scope["path"].endswith("!") else Match.NONE), {}

    app = FastAPI(dependencies=[Mark("app")])
    app.router.routes.append(Host("api.example", Router([Route("/x", lambda request: PlainTextResponse("ok"))])))
    app.router.routes.append(Odd("/odd", endpoint, dependencies=[Mark("odd")]))
    table = table_of(app)
    assert table.find(scope_of("/x", host="api.example")).template == "/x"
    assert marks(table.find(scope_of("/x", host="api.example"))) == ["app"]
    assert table.find(scope_of("/y", host="api.example")).kind == "unmatched"
    assert table.find(scope_of("/x", host="other.example")).kind == "unmatched"
    assert marks(table.find(scope_of("/anything!"))) == ["app", "odd"]


def test_a_foreign_route_that_matches_by_path_alone_answers_405() -> None:
    """A partial match counts when nothing matches fully."""

    class Picky(APIRoute):
        def matches(self, scope: Scope) -> tuple[Match, Scope]:
            return Match.PARTIAL, {}

    app = FastAPI()
    app.router.routes.append(Picky("/odd", endpoint, dependencies=[Mark("picky")]))
    app.get("/x")(endpoint)
    assert marks(find(app, "/y")) == ["picky"]
    assert marks(find(app, "/x")) == []


def test_a_line_break_at_the_end_of_a_path_does_not_hide_the_route() -> None:
    """Python's ``$`` matches before a final line break, so the router takes ``/admin%0A`` for ``/admin``."""
    app = FastAPI()
    app.get("/admin", dependencies=[Mark("admin")])(endpoint)
    assert marks(find(app, "/admin\n")) == ["admin"]


# --- changes ----------------------------------------------------------------------------------------------------------

Change = Callable[[FastAPI, APIRouter, FastAPI], object]


@pytest.mark.parametrize(
    ("change", "path"),
    [
        (lambda app, router, child: app.get("/late")(endpoint), "/late"),
        (lambda app, router, child: router.get("/late")(endpoint), "/included/late"),
        (lambda app, router, child: child.get("/late")(endpoint), "/child/late"),
        (lambda app, router, child: app.mount("/late", Starlette(routes=[Route("/x", endpoint)])), "/late/x"),
        (lambda app, router, child: app.include_router(APIRouter(routes=[APIRoute("/late", endpoint)])), "/late"),
        (lambda app, router, child: app.add_route("/late", lambda request: None), "/late"),
        (lambda app, router, child: app.router.routes.insert(0, APIRoute("/late", endpoint)), "/late"),
        (lambda app, router, child: app.router.routes.extend([APIRoute("/late", endpoint)]), "/late"),
        (lambda app, router, child: app.router.routes.__iadd__([APIRoute("/late", endpoint)]), "/late"),
        (lambda app, router, child: app.router.routes.__setitem__(0, APIRoute("/late", endpoint)), "/late"),
        (lambda app, router, child: setattr(app.router, "routes", [APIRoute("/late", endpoint)]), "/late"),
    ],
)
def test_a_route_added_in_any_way_is_found(change: Change, path: str) -> None:
    """The table is built again when a list of routes changes, on any level."""
    app, router, child = FastAPI(), APIRouter(), FastAPI()
    app.include_router(router, prefix="/included")
    app.mount("/child", child)
    assert find(app, path).kind == "unmatched"
    change(app, router, child)
    assert find(app, path).template == path


@pytest.mark.parametrize(
    "change",
    [
        lambda routes: routes.pop(),
        lambda routes: routes.remove(routes[-1]),
        lambda routes: routes.clear(),
        lambda routes: routes.__delitem__(-1),
    ],
)
def test_a_route_taken_away_is_gone(change: Callable[[list[Any]], object]) -> None:
    """An entry that outlived its route would carry a policy of something that no longer runs."""
    app = FastAPI()
    app.get("/x")(endpoint)
    assert find(app, "/x").template == "/x"
    change(app.router.routes)
    assert find(app, "/x").kind == "unmatched"


def test_the_order_of_the_routes_may_change() -> None:
    """Sorting and reversing change which route wins."""
    app = FastAPI()
    app.get("/{x}")(endpoint)
    app.get("/a")(endpoint)
    assert find(app, "/a").template == "/{x}"
    app.router.routes.reverse()
    assert find(app, "/a").template == "/a"
    app.router.routes.sort(key=lambda route: -len(getattr(route, "path", "")))
    assert find(app, "/a").template == "/{x}"


def test_who_wants_to_know_is_told_when_the_table_is_built_again() -> None:
    """What is mounted later must be treated like the rest."""
    app = FastAPI()
    table = table_of(app)
    built: list[int] = []
    table.on_rebuilt.append(lambda table: built.append(len(table.applications)))
    table.built()
    app.mount("/child", FastAPI())
    table.built()
    assert built == [1, 2]


def test_an_unchanged_table_is_built_once() -> None:
    """Looking up builds nothing."""
    app = FastAPI()
    table = table_of(app)
    built: list[RouteTable] = []
    table.on_rebuilt.append(built.append)
    for _ in range(3):
        table.find(scope_of("/"))
    assert built == [table]


def test_the_route_of_a_request_is_looked_up_once() -> None:
    """Routing changes the scope, so a second look-up could give another answer."""
    app = FastAPI()
    app.get("/x")(endpoint)
    scope = scope_of("/x")
    scope["app"] = app
    entry = route_of(scope)
    scope["path"] = "/nope"
    assert route_of(scope) is entry


def test_without_an_application_there_is_no_route() -> None:
    """A layer around a bare ASGI function works by its default policy."""
    assert route_of(scope_of("/x")).kind == "unmatched"


def test_entries_come_in_order_of_declaration_mounts_looked_into() -> None:
    """The inventory reads like the source."""
    child = FastAPI(openapi_url=None)
    child.get("/x")(endpoint)
    app = FastAPI(openapi_url=None)
    app.get("/a")(endpoint)
    app.mount("/child", child)
    app.get("/b")(endpoint)
    assert [entry.template for entry in table_of(app)] == ["/a", "/child/x", "/b"]


# --- the same as the router, whatever the routes ----------------------------------------------------------------------

SEGMENTS = ["a", "b", "{x}", "{y:int}", "{p:path}", "a{x}", "{u:uuid}-b", ""]
templates = st.lists(st.sampled_from(SEGMENTS), max_size=3).map(lambda segments: "/" + _distinct(segments))
methods = st.sampled_from([["GET"], ["POST"], ["GET", "DELETE"]])
placements = st.sampled_from(["direct", "included", "nested", "fastapi", "starlette", "route", "websocket", "opaque"])
paths = st.lists(st.sampled_from(["a", "b", "ab", "1", "", "z", "a\n", "é"]), max_size=5).map(
    lambda segments: "/" + "/".join(segments)
)


def _distinct(segments: list[str]) -> str:
    """Gives each parameter of a template a name of its own."""
    return "/".join(segment.replace("{", f"{{v{number}") for number, segment in enumerate(segments))


def build(routes: list[tuple[str, str, list[str]]]) -> FastAPI:
    app = FastAPI(openapi_url=None)
    for number, (placement, template, allowed) in enumerate(routes):
        _add(app, number, placement, template, allowed)
    return app


def _add(  # noqa: C901 - a list of placements
    app: FastAPI, number: int, placement: str, template: str, allowed: list[str]
) -> None:
    async def plain() -> int:
        return number

    async def starlettes(request: Request) -> PlainTextResponse:
        return PlainTextResponse(str(number))

    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close()

    async def opaque(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse(str(number))(scope, receive, send)

    named: list[Any] = [plain, starlettes, talk, opaque]
    for function in named:
        function.number = number
    if placement == "direct":
        app.add_api_route(template, plain, methods=allowed)
    elif placement in ("included", "nested"):
        router = APIRouter()
        router.add_api_route(template, plain, methods=allowed)
        if placement == "nested":
            middle = APIRouter()
            middle.include_router(router, prefix="/b")
            router = middle
        app.include_router(router, prefix="/a")
    elif placement == "fastapi":
        child = FastAPI(openapi_url=None)
        child.add_api_route(template, plain, methods=allowed)
        app.mount("/a", child)
    elif placement == "starlette":
        app.router.routes.append(Mount("/b", routes=[Route(template, starlettes, methods=allowed)]))
    elif placement == "route":
        app.add_route(template, starlettes, methods=allowed)
    elif placement == "websocket":
        app.add_api_websocket_route(template, talk)
    else:
        app.mount("/a/b", opaque)


async def reached(app: FastAPI, scope: Scope) -> tuple[int | None, Any]:
    """The status, and what the router chose: it writes that into the scope."""
    sent: list[Any] = []

    async def receive() -> Any:
        kind = scope["type"]
        return {"type": "http.request", "body": b""} if kind == "http" else {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent[0].get("status"), scope.get("endpoint")


@settings(max_examples=150 * EFFORT, deadline=None)
@given(
    routes=st.lists(st.tuples(placements, templates, methods), min_size=1, max_size=6),
    path=paths,
    method=st.sampled_from(["GET", "POST", "DELETE", "HEAD", "OPTIONS"]),
    kind=st.sampled_from(["http", "http", "http", "websocket"]),
    root_path=st.sampled_from(["", "", "/a", "/z"]),
)
def test_the_table_chooses_what_the_router_chooses(
    routes: list[tuple[str, str, list[str]]], path: str, method: str, kind: str, root_path: str
) -> None:
    """The entry is the one whose endpoint runs, or answers 405, or is redirected to, whatever the routes are."""
    app = build(routes)
    scope = scope_of(path, method, kind, root_path)
    entry = table_of(app).find(dict(scope))
    status, chosen = asyncio.run(reached(app, scope))
    number = getattr(chosen, "number", None)
    if number is not None:
        assert getattr(entry.endpoint, "number", None) == number
    elif status == 307:
        target = path.rstrip("/") if path.endswith("/") else path + "/"
        assert entry is table_of(app).find(scope_of(target, method, kind, root_path))
    else:
        # Not found: in the application itself, or in something mounted, which the router has put into the scope.
        assert entry.kind == "unmatched"
