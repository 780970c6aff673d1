"""What answers in place of an endpoint: it holds wherever the route is, and nobody has an answer who is not let in."""

from typing import Any

import pytest
from fastapi import APIRouter, FastAPI
from fastapi.testclient import TestClient
from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from fastapi_hardening import (
    CacheResponse,
    Cors,
    Idempotent,
    InputPolicy,
    Principal,
    Public,
    RateLimit,
    RequestLimits,
    RequireScopes,
    SecurityHeaders,
    Settings,
    WebSocketLimits,
    harden,
)

KEY = {"idempotency-key": "one"}
PATHS = ("/direct", "/in/included", "/in/deep/nested", "/child/direct", "/child/in/included", "/starlette/page")


class ByName:
    """Takes the name of the caller, and perhaps a scope, from a field."""

    scheme = "bearer"
    challenge = "Bearer"

    async def authenticate(self, connection: HTTPConnection) -> Principal | None:
        name, _, scopes = connection.headers.get("authorization", "").partition(" ")
        return Principal(name, scopes=frozenset(scopes.split())) if name else None


class Site:
    """An application with a route of every kind below one override, whose endpoint counts."""

    def __init__(self, *overrides: Any, **settings: Any) -> None:
        self.calls = 0

        async def endpoint() -> int:
            self.calls += 1
            return self.calls

        async def page(_request: Request) -> PlainTextResponse:
            self.calls += 1
            return PlainTextResponse(str(self.calls))

        def add(to: FastAPI | APIRouter, path: str) -> None:
            for method in ("GET", "POST"):
                to.add_api_route(path, endpoint, methods=[method])

        def fill(app: FastAPI) -> FastAPI:
            nested, router = APIRouter(), APIRouter()
            add(nested, "/nested")
            add(router, "/included")
            router.include_router(nested, prefix="/deep")
            add(app, "/direct")
            app.include_router(router, prefix="/in")
            return app

        self.app = fill(FastAPI(dependencies=[*overrides]))
        self.app.mount("/child", fill(FastAPI()))
        self.app.mount("/starlette", Starlette(routes=[Route("/page", page, methods=["GET", "POST"])]))
        harden(self.app, Settings(**settings), authenticators=[ByName()])
        self.client = TestClient(self.app)


@pytest.mark.parametrize("path", PATHS)
def test_a_repeated_request_is_carried_out_once(path: str) -> None:
    """Direct, included, nested, mounted: wherever the override stands above."""
    site = Site(Idempotent())
    assert site.client.post(path).status_code == 400
    assert [site.client.post(path, headers=KEY).text for _ in range(2)] == ["1", "1"]
    assert site.calls == 1


@pytest.mark.parametrize("path", PATHS)
def test_an_answer_is_kept(path: str) -> None:
    """Direct, included, nested, mounted."""
    site = Site(CacheResponse(60))
    assert [site.client.get(path).text for _ in range(2)] == ["1", "1"]
    assert site.client.get(path + "-not").status_code == 404


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("path", PATHS)
def test_nobody_has_an_answer_who_is_not_let_in(path: str, method: str) -> None:
    """What was kept for those who are let in is behind the same door, with the same key or path."""
    site = Site(CacheResponse(60, per="everybody"), Idempotent(), auth={"default": "required"})
    anna = {"authorization": "anna", **KEY}
    assert [site.client.request(method, path, headers=anna).text for _ in range(2)] == ["1", "1"]
    assert site.client.request(method, path, headers=KEY).status_code == 401


@pytest.mark.parametrize("path", PATHS)
def test_a_scope_is_demanded_of_each_request(path: str) -> None:
    """Not only of the one that was kept."""
    site = Site(CacheResponse(60, per="everybody"), RequireScopes("read"))
    assert site.client.get(path, headers={"authorization": "anna read"}).text == "1"
    assert site.client.get(path, headers={"authorization": "anna"}).status_code == 403
    assert site.client.get(path).status_code == 401
    assert site.client.get(path, headers={"authorization": "bert read"}).text == "1"


def test_what_refuses_nothing_any_more_keeps_no_answer_from_being_kept() -> None:
    """Every layer has dealt with its overrides before: what is open, or limited, is still kept."""
    others = (
        Public(),
        Cors(allow_origins=["https://shop.example"]),
        SecurityHeaders(x_frame_options=None),
        RateLimit("100/minute"),
        RequestLimits(max_body_bytes=100),
        InputPolicy(mode="enforce"),
        WebSocketLimits(max_message_bytes=100),
    )
    site = Site(CacheResponse(60), *others, auth={"default": "required"})
    assert [site.client.get("/in/deep/nested").text for _ in range(2)] == ["1", "1"]


def test_a_limit_that_no_layer_counts_is_not_passed_by() -> None:
    """Then the endpoint answers each time, and the limit counts by itself."""
    site = Site(CacheResponse(60), RateLimit("2/minute"), rate_limit={"enabled": False})
    assert [site.client.get("/direct").status_code for _ in range(3)] == [200, 200, 429]
