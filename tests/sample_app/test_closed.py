"""With one setting the whole shop is closed but for what says `Public()`."""

from collections.abc import Iterator

import httpx2
import pytest
from fastapi import FastAPI

from tests.sample_app.conftest import CUSTOMER, new_key, register, send_malformed

pytestmark = pytest.mark.anyio

OPEN = {
    ("GET", "/"),
    ("GET", "/login"),
    ("GET", "/api/products"),
    ("GET", "/api/products/{product_id}"),
    ("GET", "/api/products/{product_id}/pictures/{digest}"),
    ("GET", "/api/products/{product_id}/bought-together"),
    ("GET", "/api/rates"),
    ("GET", "/api/search"),
    ("GET", "/api/session"),
    ("POST", "/api/session"),
    ("POST", "/api/users"),
    ("POST", "/oauth/token"),
    ("POST", "/oauth/revoke"),
    ("", "/static"),
}


@pytest.fixture
def environment() -> dict[str, str]:
    """Close the shop."""
    return {"HARDENING_AUTH__DEFAULT": "required"}


def calls(app: FastAPI) -> Iterator[tuple[str, str, bool]]:
    """Every method of every route, and whether it is open."""
    for route in app.state.hardening.routes():
        for method in route.methods or ("",):
            if method != "HEAD" and route.kind != "websocket":
                yield method, route.template, route.open


def test_open_routes_are_these(shop: FastAPI) -> None:
    """Who adds a route and wants it open has to say so here, too."""
    assert {(method, path) for method, path, is_open in calls(shop) if is_open} == OPEN


async def test_everything_else_is_closed(shop: FastAPI, client: httpx2.AsyncClient) -> None:
    """Every other route answers 401, also the documentation, whatever the body is; so do paths that no route has."""
    closed = [(method, path) for method, path, is_open in calls(shop) if not is_open]
    assert ("GET", "/docs") in closed
    assert ("PUT", "/api/basket/{product_id}") in closed
    for method, path in [*closed, ("GET", "/no-such-page"), ("DELETE", "/api/basket")]:
        answer = await send_malformed(client, method, path)
        assert answer.status_code == 401, (method, path)
        assert answer.headers["content-type"] == "application/problem+json"


async def test_storefront_stays_open(client: httpx2.AsyncClient) -> None:
    """The pages, their files, the catalogue and the search answer strangers; so do the probes."""
    for path in ("/", "/login", "/static/shop.js", "/api/products", "/api/products/1", "/api/search?q=mug", "/readyz"):
        assert (await client.get(path)).status_code == 200, path
    assert (await client.get("/static/none.js")).status_code == 404


async def test_who_registers_is_let_in(client: httpx2.AsyncClient) -> None:
    """From the door to an order."""
    assert (await client.get("/api/basket")).status_code == 401
    assert (await register(client)).status_code == 201
    assert (await client.put("/api/basket/1", json={"quantity": 1})).status_code == 200
    assert (await client.post("/api/orders", json=CUSTOMER, headers=new_key())).status_code == 201
    assert (await client.get("/openapi.json")).status_code == 200
    assert (await client.get("/no-such-page")).status_code == 404
