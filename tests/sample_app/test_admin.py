"""What admins and clerks may do, and that nobody else may."""

import csv
from collections.abc import Mapping

import httpx2
import pytest
from fastapi import FastAPI

from sample_app.main import create_app
from tests.sample_app.conftest import CUSTOMER, new_key, order, register, send_malformed, sign_in

pytestmark = pytest.mark.anyio

NO_ORDER = "00000000-0000-0000-0000-000000000000"
# Each route, and whether a clerk may call it, too.
ADMIN_ROUTES: Mapping[tuple[str, str], bool] = {
    ("POST", "/api/admin/products"): False,
    ("PUT", "/api/admin/products/1"): False,
    ("POST", "/api/admin/products/1/deliveries"): False,
    ("PUT", "/api/admin/products/1/picture"): False,
    ("POST", f"/api/admin/orders/{NO_ORDER}/shipment"): True,
    ("GET", "/api/admin/orders.csv"): True,
    ("PUT", "/api/admin/users/ada@example.org/role"): False,
    ("POST", "/api/admin/api-keys"): False,
    ("GET", "/api/admin/api-keys"): False,
    ("DELETE", "/api/admin/api-keys/1"): False,
}
PARAMETERS = {"product_id": "1", "order_id": NO_ORDER, "email": "ada@example.org", "key_id": "1"}


def test_list_of_admin_routes_is_complete() -> None:
    """Every route below /api/admin is in the list that the next tests go through."""
    paths = create_app().openapi()["paths"]
    ours = [path for path in paths if "/admin/" in path]
    documented = {(method.upper(), path.format(**PARAMETERS)) for path in ours for method in paths[path]}
    assert documented == set(ADMIN_ROUTES)


async def test_admin_part_refuses_strangers_whatever_they_send(client: httpx2.AsyncClient) -> None:
    """Somebody unknown gets 401 and how to sign in, on every route, before the body is looked at."""
    for method, path in ADMIN_ROUTES:
        answer = await send_malformed(client, method, path)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == 'ApiKey header="X-API-Key", Bearer, Cookie cookie-name="session"'


async def test_admin_part_refuses_customers(client: httpx2.AsyncClient) -> None:
    """A customer gets 403 on every route."""
    await register(client)
    for method, path in ADMIN_ROUTES:
        assert (await send_malformed(client, method, path)).status_code == 403


async def test_clerks_handle_orders_and_nothing_else(clerk: httpx2.AsyncClient) -> None:
    """A clerk ships and exports orders; products, users and partners are the admin's."""
    for (method, path), allowed in ADMIN_ROUTES.items():
        answer = await send_malformed(clerk, method, path)
        assert (answer.status_code != 403) == allowed


async def test_new_role_ends_what_has_the_old_one_in_it(
    client: httpx2.AsyncClient, admin: httpx2.AsyncClient, shop: FastAPI
) -> None:
    """Who was made a clerk, or is one no more, has to sign in again, with every credential."""
    await register(client)
    form = {"grant_type": "password", "client_id": "shop-app", "username": CUSTOMER["email"]}
    tokens = (await client.post("/oauth/token", data=form | {"password": "correct horse battery staple"})).json()
    made = await admin.put(f"/api/admin/users/{CUSTOMER['email'].upper()}/role", json={"role": "clerk"})
    assert made.status_code == 204
    assert (await client.get("/api/session")).json() is None
    bearer = {"Authorization": f"Bearer {tokens['access_token']}"}
    assert (await client.get("/api/session", headers=bearer)).status_code == 401
    form = {"grant_type": "refresh_token", "client_id": "shop-app", "refresh_token": tokens["refresh_token"]}
    assert (await client.post("/oauth/token", data=form)).json()["error"] == "invalid_grant"
    assert (await sign_in(client)).json()["roles"] == ["clerk"]
    nobody = await admin.put("/api/admin/users/nobody@example.org/role", json={"role": "clerk"})
    assert nobody.status_code == 404


async def test_admin_adds_prices_and_stocks_a_product(client: httpx2.AsyncClient, admin: httpx2.AsyncClient) -> None:
    """A new product is a 201 with its address; it can be repriced and restocked; its name is taken."""
    mug = {"name": "Tin mug", "description": "Dents well.", "price_cents": 900}
    added = await admin.post("/api/admin/products", json={**mug, "stock": 1})
    assert added.status_code == 201
    address = added.headers["location"]
    assert (await admin.post("/api/admin/products", json=mug)).status_code == 409
    changed = await admin.put(address.replace("/api/", "/api/admin/"), json={**mug, "name": "Enamel mug"})
    assert changed.status_code == 409
    await admin.put(address.replace("/api/", "/api/admin/"), json={**mug, "price_cents": 950})
    deliveries = address.replace("/api/", "/api/admin/") + "/deliveries"
    assert (await admin.post(deliveries, json={"quantity": 4})).status_code == 200
    product = (await client.get(address)).json()
    assert (product["price_cents"], product["stock"]) == (950, 5)


async def test_export_is_csv_that_is_no_formula(client: httpx2.AsyncClient, clerk: httpx2.AsyncClient) -> None:
    """The export has a row for each product of each order, and a name that looks like a formula is text in it."""
    await client.put("/api/basket/2", json={"quantity": 2})
    await client.put("/api/basket/1", json={"quantity": 1})
    await client.post("/api/orders", json={**CUSTOMER, "name": "=HYPERLINK(1)"}, headers=new_key())
    export = await clerk.get("/api/admin/orders.csv")
    assert export.headers["content-type"].startswith("text/csv")
    assert "attachment" in export.headers["content-disposition"]
    rows = list(csv.DictReader(export.text.splitlines()))
    assert [(row["product"], row["quantity"]) for row in rows] == [("Enamel mug", "1"), ("Linen apron", "2")]
    assert {row["name"] for row in rows} == {"'=HYPERLINK(1)"}


async def test_stream_tells_an_order_to_its_end(client: httpx2.AsyncClient, clerk: httpx2.AsyncClient) -> None:
    """The stream of a shipped order ends, and with Last-Event-ID it tells only what is new."""
    placed = await order(client, 1)
    shipment = f"/api/admin/orders/{placed.json()['id']}/shipment"
    assert (await clerk.post(shipment)).json()["status"] == "shipped"
    assert (await clerk.post(shipment)).status_code == 409
    stream = await client.get(placed.headers["location"] + "/events")
    assert stream.headers["content-type"].startswith("text/event-stream")
    told = [line for line in stream.text.splitlines() if line.startswith(("event:", "id:"))]
    assert [line for line in told if line.startswith("event")] == [
        "event: placed",
        "event: confirmed",
        "event: shipped",
    ]
    ids = [line.removeprefix("id: ") for line in told if line.startswith("id")]
    rest = await client.get(placed.headers["location"] + "/events", headers={"Last-Event-ID": ids[1]})
    assert "event: shipped" in rest.text
    assert "event: placed" not in rest.text
