"""What is declared with slowapi holds for the endpoint that runs, wherever it stands and whatever is around."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import APIRouter, Depends, FastAPI, Request, WebSocket
from fastapi.responses import PlainTextResponse
from slowapi import Limiter, _rate_limit_exceeded_handler
from slowapi.errors import RateLimitExceeded
from slowapi.middleware import SlowAPIMiddleware
from starlette.applications import Starlette
from starlette.routing import Mount, Route

from fastapi_hardening import harden
from tests.no_bypass.conftest import Ask, Build, Knock, Site

Surround = Callable[[Build], Site]


def everybody() -> str:
    """The key of all clients: in these tests each request has an address of its own."""
    return "everybody"


async def _ok() -> str:
    return "ok"


def declared(telemetry: Any, *, middleware: bool, **arguments: Any) -> tuple[FastAPI, Limiter]:
    """An application that has everything in every place; each endpoint has a name of its own, as slowapi wants it."""
    app = FastAPI(telemetry=telemetry)
    limiter = Limiter(everybody, **arguments)
    app.state.limiter = limiter
    app.add_exception_handler(RateLimitExceeded, _rate_limit_exceeded_handler)  # type: ignore[arg-type]
    if middleware:
        app.add_middleware(SlowAPIMiddleware)

    def endpoint(name: str, *, asynchronous: bool = True) -> Any:
        async def later(request: Request) -> Any:
            return PlainTextResponse("ok")

        def now(request: Request) -> Any:
            return PlainTextResponse("ok")

        chosen: Any = later if asynchronous else now
        chosen.__name__ = name
        return limiter.limit("2/day")(chosen)

    router = APIRouter(prefix="/router")
    places: tuple[FastAPI | APIRouter, ...] = (app, router)
    for number, to in enumerate(places):
        to.get("/async/{number}")(endpoint(f"later{number}"))
        to.get("/sync/{number}")(endpoint(f"now{number}", asynchronous=False))
        to.get("/plain/{number}")(_ok)
    nested = APIRouter(prefix="/nested")
    nested.include_router(router)
    app.include_router(router)
    app.include_router(nested)
    child = FastAPI()
    child.get("/async/{number}")(endpoint("child"))
    child.get("/plain/{number}")(_ok)
    app.mount("/child", child)
    star = Starlette(routes=[Route("/async/{number}", endpoint("star")), Route("/plain/{number}", endpoint("plain"))])
    app.router.routes.append(Mount("/star", star))

    @app.websocket("/talk")
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()

    return app, limiter


PLACES = ("", "/router", "/nested/router", "/child", "/star")


@pytest.mark.parametrize("place", PLACES)
def test_a_decorator_holds(surround: Surround, ask: Ask, place: str) -> None:
    """On async and sync endpoints, by template: a path parameter makes no budget of its own."""
    site = surround(lambda telemetry: declared(telemetry, middleware=False)[0])
    for kind in ("async", "sync") if place in PLACES[:3] else ("async",):
        paths = [f"GET {site.prefix}{place}/{kind}/{number}" for number in range(3)]
        if site.around.startswith("rewritten"):
            # Behind a rewritten path slowapi itself counts, and by path.
            paths = paths[:1] * 3
        statuses = [ask(site.app, path, root_path=site.root_path).status for path in paths]
        # Where the server's path has not got the root path in it, Starlette itself does not find what is mounted.
        lost = site.around == "bare root path" and place in PLACES[3:]
        assert statuses == ([404] * 3 if lost else [200, 200, 429]), kind


@pytest.mark.parametrize("middleware", [True, False])
@pytest.mark.parametrize("place", [*PLACES[:4], "/unknown"])
def test_a_default_holds(surround: Surround, ask: Ask, place: str, middleware: bool) -> None:
    """Also for what no route matches, or not with this method, and without slowapi's middleware."""
    site = surround(lambda telemetry: declared(telemetry, middleware=middleware, default_limits=["2/day"])[0])
    asked = [f"{method} {site.prefix}{place}/plain/{number}" for number, method in enumerate(("GET", "PUT", "GET"))]
    statuses = [ask(site.app, each, root_path=site.root_path).status for each in asked]
    lost = place == "/unknown" or (site.around == "bare root path" and place in PLACES[3:])
    assert statuses == ([404, 404, 429] if lost else [200, 405, 429])


def test_a_websocket_is_counted_by_the_default(surround: Surround, knock: Knock) -> None:
    """Its handshake is refused by an HTTP answer."""
    site = surround(lambda telemetry: declared(telemetry, middleware=False, default_limits=["2/day"])[0])
    answers = [knock(site.app, f"{site.prefix}/talk", root_path=site.root_path) for _ in range(3)]
    assert [answer.kinds[0] for answer in answers] == ["websocket.accept"] * 2 + ["websocket.http.response.start"]
    assert answers[-1].status == 429


def test_the_limit_of_the_application_is_one_for_everything(surround: Surround, ask: Ask) -> None:
    """Wherever the requests go."""
    site = surround(lambda telemetry: declared(telemetry, middleware=False, application_limits=["3/day"])[0])
    asked = ("/plain/1", "/nested/router/plain/1", "/unknown", "/child/plain/1")
    statuses = [ask(site.app, f"GET {site.prefix}{path}", root_path=site.root_path).status for path in asked]
    assert statuses == [200, 200, 404, 429]


async def at_the_same_time(app: FastAPI, path: str) -> list[int]:
    """The statuses of twenty requests of twenty clients."""
    found: list[int] = []

    async def one(number: int) -> None:
        async def receive() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                found.append(message["status"])

        scope = {"type": "http", "method": "GET", "path": path, "query_string": b"", "headers": [(b"host", b"h")]}
        await app(scope | {"client": (f"203.0.113.{number}", 1)}, receive, send)

    await asyncio.gather(*map(one, range(20)))
    return found


def test_requests_at_the_same_time_are_counted_exactly() -> None:
    """As many pass as the limit says, of async and sync endpoints, also where it is counted right before them."""
    app, limiter = declared(None, middleware=False)

    def by_tenant(request: Request) -> str:
        return str(request.state.tenant)

    async def tenant(request: Request) -> None:
        request.state.tenant = "acme"

    for asynchronous in (True, False):

        async def later(request: Request) -> str:
            return "ok"

        def now(request: Request) -> str:
            return "ok"

        chosen: Any = later if asynchronous else now
        app.get(f"/late/{asynchronous}", dependencies=[Depends(tenant)])(
            limiter.limit("5/day", key_func=by_tenant)(chosen)
        )
    harden(app)
    paths = ("/async/1", "/sync/1", "/late/True", "/late/False")

    async def story() -> list[int]:
        return [(await at_the_same_time(app, path)).count(200) for path in paths]

    assert asyncio.run(story()) == [2, 2, 5, 5]
