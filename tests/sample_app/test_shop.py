"""What the shop promises to shoppers, and how it starts."""

import asyncio
import json
from pathlib import Path

import httpx2
import pytest
from asgi_lifespan import LifespanManager
from fastapi import FastAPI
from sqlalchemy import text

from sample_app.database import Database
from tests.sample_app.conftest import CUSTOMER, SHOP, NewClient, make_shop, new_key, order

pytestmark = pytest.mark.anyio

LAST_ITEM = 6  # the seeded product of which there is one


async def test_page_renders_with_its_own_files(client: httpx2.AsyncClient) -> None:
    """The page at / names the shop and loads nothing but files that the shop serves."""
    page = await client.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert "<h1>Hardened shop</h1>" in page.text
    for path in ("/static/shop.css", "/static/api.js", "/static/shop.js", "/static/icon.svg"):
        assert path in page.text
        assert (await client.get(path)).status_code == 200
    assert "//" not in page.text.replace("http://www.w3.org/", "")
    assert "default-src 'none'; script-src 'self'" in page.headers["content-security-policy"]
    assert "content-security-policy-report-only" not in page.headers


async def test_page_escapes_what_it_shows(tmp_path: Path) -> None:
    """Markup in a value becomes text on the page."""
    app = make_shop(tmp_path)
    app.title = "<script>alert(1)</script>"
    client = httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url=SHOP)
    async with LifespanManager(app), client:
        page = await client.get("/")
    assert "<script>alert" not in page.text
    assert "&lt;script&gt;alert(1)" in page.text


async def test_list_of_products_goes_on_where_it_stopped(client: httpx2.AsyncClient) -> None:
    """Following next_offset reads every product once."""
    seen: list[int] = []
    offset: int | None = 0
    while offset is not None:
        page = (await client.get("/api/products", params={"offset": offset, "limit": 4})).json()
        seen += [product["id"] for product in page["items"]]
        offset = page["next_offset"]
    assert seen == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("path", ["/api/products/0", f"/api/products/{2**70}", "/api/products/mug"])
async def test_impossible_product_number_is_unprocessable(client: httpx2.AsyncClient, path: str) -> None:
    """A number that no product can have is a 422, even if the database could not hold it."""
    assert (await client.get(path)).status_code == 422


async def test_unknown_product_is_a_problem_with_an_id(client: httpx2.AsyncClient) -> None:
    """A 404 is a problem document, and its id is that of the answer."""
    answer = await client.get("/api/products/999")
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["status"] == 404
    assert problem["detail"] == "There is no product 999."
    assert answer.headers["x-request-id"] in answer.text


async def test_search_takes_wildcards_literally(client: httpx2.AsyncClient) -> None:
    """Searching ignores case and finds a percent sign only where there is one."""
    found = (await client.get("/api/search", params={"q": "ENAMEL"})).json()
    assert [product["name"] for product in found["items"]] == ["Enamel mug"]
    for literal in ("%", "_", "' OR 1=1 --"):
        assert (await client.get("/api/search", params={"q": literal})).json()["items"] == []


async def test_basket_belongs_to_its_cookie(client: httpx2.AsyncClient, new_client: NewClient) -> None:
    """A basket adds up, is kept by a cookie that scripts cannot read, and is nobody else's."""
    first = await client.put("/api/basket/1", json={"quantity": 1})
    cookie = first.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=lax" in cookie
    await client.put("/api/basket/1", json={"quantity": 2})
    await client.put("/api/basket/2", json={"quantity": 1})
    await client.delete("/api/basket/2")
    basket = (await client.get("/api/basket")).json()
    assert [(line["product_id"], line["quantity"]) for line in basket["lines"]] == [(1, 2)]
    assert basket["total_cents"] == 2900
    async with new_client() as other:
        assert (await other.get("/api/basket")).json()["lines"] == []


async def test_malformed_cookie_is_replaced(client: httpx2.AsyncClient) -> None:
    """A cookie that the shop did not make is not taken for a shopper."""
    answer = await client.get("/api/basket", headers={"cookie": "shopper=guess"})
    assert answer.status_code == 200
    assert "shopper=" in answer.headers["set-cookie"]


@pytest.mark.parametrize(
    "body",
    [{"quantity": 0}, {"quantity": 100}, {"quantity": True}, {"quantity": "1"}, {"quantity": 1, "price_cents": 1}, {}],
)
async def test_basket_refuses_what_it_does_not_know(client: httpx2.AsyncClient, body: dict[str, object]) -> None:
    """A quantity out of range or of another type, an extra field and a missing one are each a 422."""
    assert (await client.put("/api/basket/1", json=body)).status_code == 422


async def test_order_is_created_confirmed_and_empties_the_basket(client: httpx2.AsyncClient) -> None:
    """Placing an order answers 201 with its address, takes the stock, and a background task confirms it."""
    placed = await order(client, 1, 3)
    assert placed.status_code == 201
    assert placed.json()["status"] == "placed"
    assert placed.json()["total_cents"] == 3 * 1450
    assert placed.headers["cache-control"] == "no-store"
    read = (await client.get(placed.headers["location"])).json()
    assert read["status"] == "confirmed"
    assert read["placed_at"].endswith("Z")
    assert (await client.get("/api/products/1")).json()["stock"] == 37
    assert (await client.get("/api/basket")).json()["lines"] == []


async def test_last_item_is_sold_exactly_once(new_client: NewClient) -> None:
    """Of 20 shoppers who order the last item at the same time one gets it, and 19 get a 409."""
    clients = [new_client() for _ in range(20)]
    answers = await asyncio.gather(*(order(client, LAST_ITEM) for client in clients))
    assert sorted(answer.status_code for answer in answers) == [201] + [409] * 19
    assert (await clients[0].get(f"/api/products/{LAST_ITEM}")).json()["stock"] == 0
    await asyncio.gather(*(client.aclose() for client in clients))


async def test_second_click_orders_nothing(client: httpx2.AsyncClient) -> None:
    """The same basket ordered twice at the same time becomes one order."""
    await client.put("/api/basket/1", json={"quantity": 1})
    answers = await asyncio.gather(*(client.post("/api/orders", json=CUSTOMER, headers=new_key()) for _ in range(5)))
    assert sorted(answer.status_code for answer in answers) == [201, 409, 409, 409, 409]
    assert (await client.get("/api/products/1")).json()["stock"] == 39


async def test_order_is_all_or_nothing(client: httpx2.AsyncClient) -> None:
    """If one product is out of stock, none is taken and the basket stays as it was."""
    await client.put("/api/basket/1", json={"quantity": 1})
    assert (await order(client, LAST_ITEM, 2)).status_code == 409
    assert (await client.get("/api/products/1")).json()["stock"] == 40
    assert len((await client.get("/api/basket")).json()["lines"]) == 2


@pytest.mark.parametrize("name", ["", "   ", "a\r\nBcc: all", "x" * 121, "\ud800"])
async def test_order_refuses_an_impossible_name(client: httpx2.AsyncClient, name: str) -> None:
    """A name that is empty, too long, of several lines, or no text at all is a 422."""
    content = json.dumps({**CUSTOMER, "name": name})
    answer = await client.post("/api/orders", content=content, headers={"content-type": "application/json"} | new_key())
    assert answer.status_code == 422


async def test_order_of_somebody_else_is_absent(client: httpx2.AsyncClient, new_client: NewClient) -> None:
    """Who knows the address of an order but has another cookie gets a 404, for the stream too."""
    address = (await order(client, 1)).headers["location"]
    async with new_client() as other:
        assert (await other.get(address)).status_code == 404
        assert (await other.get(f"{address}/events")).status_code == 404


async def test_every_answer_is_hardened(client: httpx2.AsyncClient) -> None:
    """The page, the API, a static file and an error all carry an id and the security headers."""
    for path in ("/", "/api/products", "/static/shop.js", "/nowhere"):
        answer = await client.get(path)
        assert answer.headers["x-request-id"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]


async def test_shop_is_ready_once_it_started(client: httpx2.AsyncClient) -> None:
    """A started shop whose database answers is ready."""
    assert (await client.get("/readyz")).status_code == 200


async def test_shop_without_its_tables_is_alive_but_not_ready(client: httpx2.AsyncClient, shop: FastAPI) -> None:
    """When the database stops answering, the shop asks for no traffic and for no restart either."""
    async with shop.state.database.session() as session:
        await session.execute(text("ALTER TABLE product RENAME TO gone"))
        await session.commit()
    assert (await client.get("/readyz")).status_code == 503
    assert (await client.get("/livez")).status_code == 200


async def test_workers_may_start_together(tmp_path: Path) -> None:
    """Several workers that open a new database at the same time fill it once."""
    url = f"sqlite+aiosqlite:///{tmp_path / 'new' / 'shop.sqlite3'}"
    workers = [Database(url) for _ in range(8)]
    await asyncio.gather(*(worker.open() for worker in workers))
    await asyncio.gather(*(worker.ping() for worker in workers))
    await asyncio.gather(*(worker.close() for worker in workers))


async def test_who_finds_a_hole_knows_whom_to_tell(client: httpx2.AsyncClient) -> None:
    """The file says whom, and until when that holds."""
    answer = await client.get("/.well-known/security.txt")
    assert answer.status_code == 200
    assert answer.text.startswith("Contact: mailto:security@shop.example\nExpires: ")


async def test_browsers_report_what_the_policy_of_the_page_blocks(client: httpx2.AsyncClient, shop: FastAPI) -> None:
    """The page tells them where, and the shop counts it."""
    page = await client.get("/")
    assert "report-uri /.well-known/csp-reports" in page.headers["content-security-policy"]
    report = {"csp-report": {"effective-directive": "script-src-elem", "blocked-uri": "inline"}}
    media_type = {"Content-Type": "application/csp-report"}
    answer = await client.post("/.well-known/csp-reports", content=json.dumps(report), headers=media_type)
    assert answer.status_code == 204
    assert b'hardening_csp_violations_total{directive="script-src-elem"' in shop.state.hardening.metrics.expose()


ATTACK = "x' OR '1'='1"


async def test_order_with_an_attack_is_refused(client: httpx2.AsyncClient) -> None:
    """The API refuses what looks like an attack, and says where, not what."""
    refused = await client.post("/api/orders", json=CUSTOMER | {"name": ATTACK}, headers=new_key())
    assert refused.status_code == 422
    assert {error["pointer"] for error in refused.json()["errors"]} == {"#/body/name"}
    assert ATTACK not in refused.text
    innocent = await client.post("/api/orders", json=CUSTOMER | {"name": "Ada O'Brien"}, headers=new_key())
    assert innocent.status_code == 409


async def test_search_only_reports(client: httpx2.AsyncClient, shop: FastAPI) -> None:
    """Whoever searches for something odd finds nothing, and the report has it."""
    found = await client.get("/api/search", params={"q": ATTACK})
    assert found.status_code == 200
    assert found.json()["items"] == []
    reports = {report.template: report for report in shop.state.hardening.validation.routes()}
    assert reports["/api/search"].kinds == {"sql": 1}
    assert reports["/api/search"].refused == 0
