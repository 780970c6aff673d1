"""What the shop promises to shoppers, to its shopkeeper, and against people who are neither."""

import asyncio
import csv
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx2
import pytest
from asgi_lifespan import LifespanManager
from fastapi import FastAPI
from sqlalchemy import text

from sample_app.database import Database
from sample_app.main import create_app
from sample_app.upload import MAX_PICTURE_BYTES, sniff

pytestmark = pytest.mark.anyio

ADMIN_TOKEN = "the-token-of-the-tests"
ADMIN = {"X-Admin-Token": ADMIN_TOKEN}
LAST_ITEM = 6  # the seeded product of which there is one
CUSTOMER = {"name": "Ada", "email": "ada@example.org"}
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010800000000"
    "3a7e9b550000000a49444154789c636000000002000148afa4710000000049454e44ae426082"
)


NewClient = Callable[[], httpx2.AsyncClient]


@pytest.fixture
def anyio_backend() -> str:
    """Run on asyncio, because the database driver does."""
    return "asyncio"


@pytest.fixture
async def shop(tmp_path: Path, anyio_backend: str) -> AsyncIterator[FastAPI]:
    """Give a running shop with the seeded products."""
    app = create_app(f"sqlite+aiosqlite:///{tmp_path / 'shop.sqlite3'}", ADMIN_TOKEN)
    async with LifespanManager(app):
        yield app


@pytest.fixture
def new_client(shop: FastAPI) -> NewClient:
    """Give a function that makes a client with cookies of its own: one more shopper."""

    def make() -> httpx2.AsyncClient:
        return httpx2.AsyncClient(transport=httpx2.ASGITransport(shop), base_url="http://shop.test")

    return make


@pytest.fixture
async def client(new_client: NewClient) -> AsyncIterator[httpx2.AsyncClient]:
    """Give one shopper."""
    async with new_client() as client:
        yield client


async def order(client: httpx2.AsyncClient, product: int, quantity: int = 1) -> httpx2.Response:
    """Put a product into the basket and order it."""
    put = await client.put(f"/api/basket/{product}", json={"quantity": quantity})
    assert put.status_code == 200
    return await client.post("/api/orders", json=CUSTOMER)


async def upload(
    client: httpx2.AsyncClient, data: bytes, media_type: str = "image/png", product: int = 1
) -> httpx2.Response:
    """Upload a picture as the shopkeeper."""
    files = {"file": ("../../etc/passwd", data, media_type)}
    return await client.put(f"/api/admin/products/{product}/picture", files=files, headers=ADMIN)


async def test_page_renders_with_its_own_files(client: httpx2.AsyncClient) -> None:
    """The page at / names the shop and loads nothing but files that the shop serves."""
    page = await client.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert "<h1>Hardened shop</h1>" in page.text
    for path in ("/static/shop.css", "/static/shop.js", "/static/icon.svg"):
        assert path in page.text
        assert (await client.get(path)).status_code == 200
    assert "//" not in page.text.replace("http://www.w3.org/", "")
    assert "default-src 'none'; script-src 'self'" in page.headers["content-security-policy"]
    assert "content-security-policy-report-only" not in page.headers


async def test_page_escapes_what_it_shows(tmp_path: Path) -> None:
    """Markup in a value becomes text on the page."""
    app = create_app(f"sqlite+aiosqlite:///{tmp_path / 'shop.sqlite3'}")
    app.title = "<script>alert(1)</script>"
    client = httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://shop.test")
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
    answers = await asyncio.gather(*(client.post("/api/orders", json=CUSTOMER) for _ in range(5)))
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
    answer = await client.post("/api/orders", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 422


async def test_order_of_somebody_else_is_absent(client: httpx2.AsyncClient, new_client: NewClient) -> None:
    """Who knows the address of an order but has another cookie gets a 404, for the stream too."""
    address = (await order(client, 1)).headers["location"]
    async with new_client() as other:
        assert (await other.get(address)).status_code == 404
        assert (await other.get(f"{address}/events")).status_code == 404


async def test_stream_tells_an_order_to_its_end(client: httpx2.AsyncClient) -> None:
    """The stream of a shipped order ends, and with Last-Event-ID it tells only what is new."""
    placed = await order(client, 1)
    shipment = f"/api/admin/orders/{placed.json()['id']}/shipment"
    assert (await client.post(shipment, headers=ADMIN)).json()["status"] == "shipped"
    assert (await client.post(shipment, headers=ADMIN)).status_code == 409
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


ADMIN_ROUTES = [
    ("POST", "/api/admin/products"),
    ("PUT", "/api/admin/products/1"),
    ("POST", "/api/admin/products/1/deliveries"),
    ("PUT", "/api/admin/products/1/picture"),
    ("POST", "/api/admin/orders/00000000-0000-0000-0000-000000000000/shipment"),
    ("GET", "/api/admin/orders.csv"),
]


def test_list_of_admin_routes_is_complete() -> None:
    """Every route below /api/admin is in the list that the next test goes through."""
    paths = create_app().openapi()["paths"]
    documented = {(method.upper(), path) for path in paths if "/admin/" in path for method in paths[path]}
    zeros = "00000000-0000-0000-0000-000000000000"
    assert {
        (method, path.replace("{product_id}", "1").replace("{order_id}", zeros)) for method, path in documented
    } == set(ADMIN_ROUTES)


@pytest.mark.parametrize(("method", "path"), ADMIN_ROUTES)
async def test_admin_part_refuses_without_the_token(client: httpx2.AsyncClient, method: str, path: str) -> None:
    """Without the token, with a wrong one and with one that is not ASCII every admin route answers 401."""
    for token in (None, b"", b"wrong", "thé-token".encode()):
        headers = {} if token is None else {b"X-Admin-Token": token}
        answer = await client.request(method, path, headers=headers)
        assert answer.status_code == 401
        assert "www-authenticate" in answer.headers


async def test_shopkeeper_adds_prices_and_stocks_a_product(client: httpx2.AsyncClient) -> None:
    """A new product is a 201 with its address; it can be repriced and restocked; its name is taken."""
    mug = {"name": "Tin mug", "description": "Dents well.", "price_cents": 900}
    added = await client.post("/api/admin/products", json={**mug, "stock": 1}, headers=ADMIN)
    assert added.status_code == 201
    address = added.headers["location"]
    assert (await client.post("/api/admin/products", json=mug, headers=ADMIN)).status_code == 409
    changed = await client.put(
        address.replace("/api/", "/api/admin/"), json={**mug, "name": "Enamel mug"}, headers=ADMIN
    )
    assert changed.status_code == 409
    await client.put(address.replace("/api/", "/api/admin/"), json={**mug, "price_cents": 950}, headers=ADMIN)
    deliveries = address.replace("/api/", "/api/admin/") + "/deliveries"
    assert (await client.post(deliveries, json={"quantity": 4}, headers=ADMIN)).status_code == 200
    product = (await client.get(address)).json()
    assert (product["price_cents"], product["stock"]) == (950, 5)


async def test_export_is_csv_that_is_no_formula(client: httpx2.AsyncClient) -> None:
    """The export has a row for each product of each order, and a name that looks like a formula is text in it."""
    await client.put("/api/basket/2", json={"quantity": 2})
    await client.put("/api/basket/1", json={"quantity": 1})
    await client.post("/api/orders", json={**CUSTOMER, "name": "=HYPERLINK(1)"})
    export = await client.get("/api/admin/orders.csv", headers=ADMIN)
    assert export.headers["content-type"].startswith("text/csv")
    assert "attachment" in export.headers["content-disposition"]
    rows = list(csv.DictReader(export.text.splitlines()))
    assert [(row["product"], row["quantity"]) for row in rows] == [("Enamel mug", "1"), ("Linen apron", "2")]
    assert {row["name"] for row in rows} == {"'=HYPERLINK(1)"}


async def test_picture_is_served_as_what_it_is(client: httpx2.AsyncClient) -> None:
    """An uploaded picture comes back unchanged, with its type, cacheable for ever, and never sniffed."""
    product = (await upload(client, PNG)).json()
    picture = await client.get(product["picture"])
    assert picture.content == PNG
    assert picture.headers["content-type"] == "image/png"
    assert "immutable" in picture.headers["cache-control"]
    assert picture.headers["x-content-type-options"] == "nosniff"
    assert (await upload(client, PNG, product=999)).status_code == 404
    assert (await client.get(product["picture"].replace("/1/", "/2/"))).status_code == 404


@pytest.mark.parametrize(
    ("data", "media_type"),
    [
        (b"<html><script>alert(1)</script></html>", "image/png"),
        (b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>", "image/svg+xml"),
        (PNG, "image/jpeg"),
        (PNG, "text/html"),
        (PNG + b"<script>alert(1)</script>", "image/png"),
        (b"", "image/png"),
    ],
)
async def test_upload_refuses_a_disguised_type(client: httpx2.AsyncClient, data: bytes, media_type: str) -> None:
    """A file whose bytes are not the picture that it claims to be is a 415, and the product stays without one."""
    assert (await upload(client, data, media_type)).status_code == 415
    assert (await client.get("/api/products/1")).json()["picture"] is None


@pytest.mark.parametrize("size", [MAX_PICTURE_BYTES + 1, MAX_PICTURE_BYTES * 3])
async def test_upload_refuses_a_large_picture(client: httpx2.AsyncClient, size: int) -> None:
    """A picture over the limit is a 413, whether the file or already the body is too large."""
    assert (await upload(client, PNG.ljust(size, b"\0"))).status_code == 413


def test_sniff_knows_the_three_types_of_pictures() -> None:
    """PNG, JPEG and WebP are told by their bytes."""
    assert sniff(PNG) == "image/png"
    assert sniff(b"\xff\xd8\xff\xe0 \xff\xd9") == "image/jpeg"
    assert sniff(b"RIFF\x08\0\0\0WEBPVP8 ") == "image/webp"
    assert sniff(b"RIFF\x09\0\0\0WEBPVP8 ") is None


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
    refused = await client.post("/api/orders", json=CUSTOMER | {"name": ATTACK})
    assert refused.status_code == 422
    assert {error["pointer"] for error in refused.json()["errors"]} == {"#/body/name"}
    assert ATTACK not in refused.text
    assert (await client.post("/api/orders", json=CUSTOMER | {"name": "Ada O'Brien"})).status_code == 409


async def test_search_only_reports(client: httpx2.AsyncClient, shop: FastAPI) -> None:
    """Whoever searches for something odd finds nothing, and the report has it."""
    found = await client.get("/api/search", params={"q": ATTACK})
    assert found.status_code == 200
    assert found.json()["items"] == []
    reports = {report.template: report for report in shop.state.hardening.validation.routes()}
    assert reports["/api/search"].kinds == {"sql": 1}
    assert reports["/api/search"].refused == 0
