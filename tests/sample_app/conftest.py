"""What the tests of the shop share: a running shop, shoppers with cookies of their own, and the admin."""

import os
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx2
import pytest
from asgi_lifespan import LifespanManager
from fastapi import FastAPI

from sample_app.main import create_app

SHOP = "http://shop.test"
ADMIN_PASSWORD = "the password of the tests"
PASSWORD = "correct horse battery staple"
CUSTOMER = {"name": "Ada", "email": "ada@example.org"}

NewClient = Callable[[], httpx2.AsyncClient]


def make_shop(folder: Path) -> FastAPI:
    """A shop with a new database; it is not running yet."""
    return create_app(f"sqlite+aiosqlite:///{folder / 'shop.sqlite3'}", ADMIN_PASSWORD)


async def register(client: httpx2.AsyncClient, email: str = CUSTOMER["email"]) -> httpx2.Response:
    """Makes an account, and signs in."""
    return await client.post("/api/users", json={"email": email, "name": "Ada", "password": PASSWORD})


async def sign_in(
    client: httpx2.AsyncClient, email: str = CUSTOMER["email"], password: str = PASSWORD
) -> httpx2.Response:
    """Signs in to an account."""
    return await client.post("/api/session", json={"email": email, "password": password})


def new_key() -> dict[str, str]:
    """The header field of an order that nobody has sent yet."""
    return {"Idempotency-Key": str(uuid.uuid4())}


async def order(client: httpx2.AsyncClient, product: int, quantity: int = 1) -> httpx2.Response:
    """Puts a product into the basket and orders it."""
    put = await client.put(f"/api/basket/{product}", json={"quantity": quantity})
    assert put.status_code == 200
    return await client.post("/api/orders", json=CUSTOMER, headers=new_key())


async def send_malformed(client: httpx2.AsyncClient, method: str, path: str) -> httpx2.Response:
    """Sends a body of the right type that no route can read."""
    media_type = "multipart/form-data; boundary=x" if path.endswith("/picture") else "application/json"
    return await client.request(method, path, content=b"{", headers={"Content-Type": media_type})


@pytest.fixture
def anyio_backend() -> str:
    """Run on asyncio, because the database driver does."""
    return "asyncio"


@pytest.fixture(autouse=True)
def nothing_around(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep settings of the machine away from the shop."""
    for variable in list(os.environ):
        if variable.startswith(("HARDENING_", "SHOP_")):
            monkeypatch.delenv(variable)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def environment() -> dict[str, str]:
    """Give the variables that the shop is started with; a test file has its own."""
    return {}


@pytest.fixture
async def shop(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, anyio_backend: str
) -> AsyncIterator[FastAPI]:
    """Give a running shop with the seeded products."""
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    app = make_shop(tmp_path)
    async with LifespanManager(app):
        yield app


@pytest.fixture
def new_client(shop: FastAPI) -> NewClient:
    """Give a function that makes a client with cookies of its own: one more shopper."""

    def make() -> httpx2.AsyncClient:
        return httpx2.AsyncClient(transport=httpx2.ASGITransport(shop), base_url=SHOP)

    return make


@pytest.fixture
async def client(new_client: NewClient) -> AsyncIterator[httpx2.AsyncClient]:
    """Give one shopper."""
    async with new_client() as client:
        yield client


@pytest.fixture
async def admin(new_client: NewClient) -> AsyncIterator[httpx2.AsyncClient]:
    """Give the admin, signed in."""
    async with new_client() as client:
        assert (await sign_in(client, "admin@shop.example", ADMIN_PASSWORD)).status_code == 200
        yield client


@pytest.fixture
async def clerk(new_client: NewClient, admin: httpx2.AsyncClient) -> AsyncIterator[httpx2.AsyncClient]:
    """Give a clerk, signed in."""
    async with new_client() as client:
        await register(client, "clerk@shop.example")
        made = await admin.put("/api/admin/users/clerk@shop.example/role", json={"role": "clerk"})
        assert made.status_code == 204
        assert (await sign_in(client, "clerk@shop.example")).json()["roles"] == ["clerk"]
        yield client
