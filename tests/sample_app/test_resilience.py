"""The shop under load, with what it needs gone, and with requests that come twice."""

import asyncio
import json
from collections.abc import AsyncIterator

import httpx2
import pytest
from fastapi import FastAPI

from sample_app import rates_server
from sample_app.rates import Rates
from sample_app.upload import uploads
from tests.sample_app.conftest import CUSTOMER, SHOP, NewClient, new_key
from tests.sample_app.test_pictures import PNG, upload
from tests.small_server import Answer, SmallServer

pytestmark = pytest.mark.anyio


async def test_order_that_is_sent_again_is_one_order(client: httpx2.AsyncClient) -> None:
    """The second attempt has the answer of the first, and takes nothing, whatever is in the basket by then."""
    key = new_key()
    await client.put("/api/basket/1", json={"quantity": 1})
    first = await client.post("/api/orders", json=CUSTOMER, headers=key)
    await client.put("/api/basket/1", json={"quantity": 5})
    second = await client.post("/api/orders", json=CUSTOMER, headers=key)
    assert (first.status_code, second.status_code) == (201, 201)
    assert second.json() == first.json()
    assert second.headers["idempotent-replayed"] == "true"
    assert (await client.get("/api/products/1")).json()["stock"] == 39


async def test_order_without_a_key_is_refused(client: httpx2.AsyncClient) -> None:
    """Nobody could tell whether it came before."""
    await client.put("/api/basket/1", json={"quantity": 1})
    assert (await client.post("/api/orders", json=CUSTOMER)).status_code == 400
    assert len((await client.get("/api/basket")).json()["lines"]) == 1


async def test_catalogue_is_kept_until_something_is_sold(
    client: httpx2.AsyncClient, new_client: NewClient, admin: httpx2.AsyncClient
) -> None:
    """One answer for all shoppers, and after a sale, a new price or a picture nobody sees the old one."""
    await client.get("/api/products")
    async with new_client() as other:
        await other.get("/api/basket")
        assert (await other.get("/api/products")).headers["cache-status"].startswith("fastapi-hardening; hit")

    async def mug() -> dict[str, object]:
        product: dict[str, object] = (await client.get("/api/products")).json()["items"][0]
        return product

    await client.put("/api/basket/1", json={"quantity": 1})
    await client.post("/api/orders", json=CUSTOMER, headers=new_key())
    assert (await mug())["stock"] == 39
    await admin.post("/api/admin/products/1/deliveries", json={"quantity": 2})
    assert (await mug())["stock"] == 41
    await upload(admin, PNG)
    assert (await mug())["picture"] is not None


async def buy_two_together(client: httpx2.AsyncClient, times: int) -> None:
    """Orders a mug and an apron."""
    for _ in range(times):
        for product in (1, 2):
            await client.put(f"/api/basket/{product}", json={"quantity": 1})
        assert (await client.post("/api/orders", json=CUSTOMER, headers=new_key())).status_code == 201


TOGETHER = "/api/products/1/bought-together"


async def test_what_was_bought_together_is_suggested(client: httpx2.AsyncClient) -> None:
    """As soon as it is not the purchase of one customer."""
    await buy_two_together(client, 1)
    assert (await client.get("/api/products/2/bought-together")).json() == []
    await buy_two_together(client, 1)
    assert (await client.get(TOGETHER)).json() == [{"id": 2, "name": "Linen apron"}]


async def test_without_suggestions_the_shop_sells(client: httpx2.AsyncClient, shop: FastAPI) -> None:
    """Off by hand or for load, the list is empty, and the page and everything else is as before."""
    await buy_two_together(client, 2)
    hardening = shop.state.hardening
    hardening.features.switch_off("bought-together", "a test")
    assert (await client.get(TOGETHER)).json() == []
    assert (await client.get("/")).status_code == 200
    hardening.features.switch_on("bought-together")
    assert (await client.get(TOGETHER)).json() != []
    hardening.load.tell(1)
    assert (await client.get(TOGETHER)).json() == []
    await buy_two_together(client, 1)


async def test_overloaded_shop_takes_orders(
    client: httpx2.AsyncClient, clerk: httpx2.AsyncClient, shop: FastAPI
) -> None:
    """Everything else is refused, an export too, and comes back later."""
    await client.put("/api/basket/1", json={"quantity": 1})
    shop.state.hardening.shedder.exhausted = True
    assert (await client.get("/api/search?q=mug")).status_code == 503
    assert (await clerk.get("/api/admin/orders.csv")).status_code == 503
    assert (await client.post("/api/orders", json=CUSTOMER, headers=new_key())).status_code == 201


async def test_uploads_that_come_all_at_once_wait_or_are_refused(admin: httpx2.AsyncClient) -> None:
    """Four are looked at, four wait, and the ninth is told to come back."""
    for _ in range(4):
        assert uploads.places.take_now()
    waiting = [asyncio.create_task(upload(admin, PNG)) for _ in range(5)]
    refused, others = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    assert [task.result().status_code for task in refused] == [503]
    for _ in range(4):
        uploads.places.give_back()
    assert [answer.status_code for answer in await asyncio.gather(*others)] == [200] * 4


async def test_orders_are_counted_where_the_alert_looks(client: httpx2.AsyncClient, shop: FastAPI) -> None:
    """The rule names a series that there is."""
    await buy_two_together(client, 1)
    assert "OrdersFail" in {rule.name for rule in shop.state.hardening.alerts.settings.rules}
    series = b'http_requests_total{handler="/api/orders",method="POST",status="2xx"} 1.0'
    assert series in shop.state.hardening.metrics.expose()


# --- rates ------------------------------------------------------------------------------------------------------------

GOOD = Answer(body=json.dumps({"rates": {"USD": 1.25}}).encode())


async def test_without_a_service_there_are_only_euros(client: httpx2.AsyncClient) -> None:
    """Nobody is asked."""
    assert (await client.get("/api/rates")).json() == {"rates": {}}


@pytest.fixture
async def upstream(monkeypatch: pytest.MonkeyPatch, anyio_backend: str) -> AsyncIterator[SmallServer]:
    """Give the service that a shop asks; it begins before the shop."""
    async with SmallServer(lambda _: GOOD) as server:
        monkeypatch.setenv("SHOP_RATES_URL", server.url)
        yield server


async def test_rates_are_asked_for_once(upstream: SmallServer, client: httpx2.AsyncClient) -> None:
    """For all shoppers, with the id of the first one's request; the service may be gone after that."""
    first = await client.get("/api/rates")
    await upstream.die()
    assert first.json() == (await client.get("/api/rates")).json() == {"rates": {"USD": 1.25}}
    assert [seen.target for seen in upstream.seen] == ["/latest"]
    assert upstream.seen[0].headers["x-request-id"] == first.headers["x-request-id"]


@pytest.mark.parametrize(
    "answer",
    [
        Answer(503),
        Answer(404),
        Answer(body=b"<html>"),
        Answer(body=b'{"rates": {"USD": -1}}'),
        Answer(body=b'{"rates": {"<b>": 1}}'),
    ],
)
async def test_service_that_is_wrong_costs_the_shop_nothing(
    upstream: SmallServer, client: httpx2.AsyncClient, answer: Answer
) -> None:
    """An error, another page, and rates that are none: the shop sells in euros."""
    upstream.behave = lambda _: answer
    assert (await client.get("/api/rates")).json() == {"rates": {}}
    assert (await client.get("/api/products")).status_code == 200


async def test_service_that_is_dead_is_left_alone(
    upstream: SmallServer, client: httpx2.AsyncClient, shop: FastAPI
) -> None:
    """The shop answers, and after a few attempts in vain its circuit is open."""
    await upstream.die()
    for _ in range(3):
        answer = await client.get("/api/rates")
        assert (answer.status_code, answer.json()) == (200, {"rates": {}})
    states = {circuit.state for circuit in shop.state.hardening.breakers.list()}
    assert states == {"open"}
    assert (await client.get("/readyz")).status_code == 200
    await buy_two_together(client, 1)


async def test_stand_in_says_what_the_shop_understands() -> None:
    """The shop shows what the server says that comes with it."""
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(rates_server.app), base_url=SHOP) as client:
        latest = await client.get("/latest")
    assert Rates.model_validate_json(latest.content).rates["USD"] > 0
