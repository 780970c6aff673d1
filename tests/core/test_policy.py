"""Overrides: which one counts, and what becomes of one whose layer has not seen the route."""

from typing import Annotated, Any, ClassVar

import pytest
from fastapi import APIRouter, Depends, FastAPI, WebSocket
from starlette.requests import HTTPConnection
from starlette.testclient import TestClient

from fastapi_hardening.core import context as request_context
from fastapi_hardening.core.policy import Override, mark_handled
from fastapi_hardening.core.routes import route_of


class Innermost(Override):
    """Of several on a route the innermost counts."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    async def act_late(self, connection: HTTPConnection) -> None:
        acted = request_context.ensure(connection.scope).state.setdefault(list, [])
        acted.append(self.name)


class All(Innermost):
    """All on a route hold."""

    every_level_holds: ClassVar[bool] = True


async def acted(connection: HTTPConnection) -> list[str]:
    """The overrides that acted after routing, in the order in which they did."""
    names: list[str] = request_context.ensure(connection.scope).state.get(list, [])
    return names


Acted = Annotated[list[str], Depends(acted)]


def levels(kind: type[Innermost]) -> FastAPI:
    """The same override on every level."""
    router = APIRouter(dependencies=[kind("router")])
    app = FastAPI(dependencies=[kind("app")])

    @router.get("/included", dependencies=[kind("route")])
    async def included(names: Acted) -> list[str]:
        return names

    @app.get("/direct", dependencies=[kind("route")])
    async def direct(names: Acted) -> list[str]:
        return names

    @app.websocket("/talk", dependencies=[kind("route")])
    async def talk(websocket: WebSocket, names: Acted) -> None:
        await websocket.accept()
        await websocket.send_json(names)

    app.include_router(router, dependencies=[kind("include")])
    return app


@pytest.mark.parametrize("path", ["/direct", "/included"])
def test_without_a_layer_the_innermost_acts_by_itself(path: str) -> None:
    """On an application that was never hardened too, one acts, and it is the right one."""
    assert TestClient(levels(Innermost)).get(path).json() == ["route"]


def test_without_a_layer_all_act_outermost_first_where_all_hold() -> None:
    """As the class says."""
    client = TestClient(levels(All))
    assert client.get("/direct").json() == ["app", "route"]
    assert client.get("/included").json() == ["app", "include", "router", "route"]


def test_overrides_work_on_websockets() -> None:
    """A policy that stopped at HTTP would be a way round."""
    with TestClient(levels(All)).websocket_connect("/talk") as websocket:
        assert websocket.receive_json() == ["app", "route"]


class LayerOf:
    """A layer that deals with the overrides of the path that it sees."""

    def __init__(self, app: Any, kind: type[Override]) -> None:
        self.app = app
        self.kind = kind

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            mark_handled(scope, route_of(scope).of(self.kind))
        await self.app(scope, receive, send)


class Rewrite:
    """A middleware of an application that sends one path to another route."""

    def __init__(self, app: Any, to: str) -> None:
        self.app = app
        self.to = to

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(dict(scope) | {"path": self.to}, receive, send)


@pytest.mark.parametrize("kind", [Innermost, All])
def test_what_the_layer_has_dealt_with_does_not_act_again(kind: type[Innermost]) -> None:
    """Nothing is counted or refused twice."""
    app = levels(kind)
    app.add_middleware(LayerOf, kind=kind)
    assert TestClient(app).get("/included").json() == []


def test_a_route_that_the_layer_did_not_see_keeps_its_policy() -> None:
    """A middleware rewrote the path after the layer had looked: what runs is what counts."""
    app = levels(All)
    app.add_middleware(Rewrite, to="/included")
    app.add_middleware(LayerOf, kind=All)
    # The application's own override was dealt with on the other path, so only the rest acts.
    assert TestClient(app).get("/direct").json() == ["include", "router", "route"]


def test_overrides_may_stand_in_a_signature() -> None:
    """As a default, in ``Annotated``, or below another dependency."""
    app = FastAPI()

    async def bundle(_: Annotated[None, Innermost("bundled")]) -> None:
        return

    @app.get("/default")
    async def default(names: Acted, _: None = All("default")) -> list[str]:  # type: ignore[assignment]
        return names

    @app.get("/bundled", dependencies=[Depends(bundle)])
    async def bundled(names: Acted) -> list[str]:
        return names

    client = TestClient(app)
    assert client.get("/bundled").json() == ["bundled"]
    assert client.get("/default").status_code == 200
