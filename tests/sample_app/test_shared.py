"""Several workers that share a store and their secrets are one shop."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import httpx2
import pytest
from asgi_lifespan import LifespanManager

from tests.sample_app.conftest import CUSTOMER, PASSWORD, SHOP, make_shop, register, sign_in
from tests.state_server import StateServer

pytestmark = pytest.mark.anyio

Workers = tuple[httpx2.AsyncClient, httpx2.AsyncClient]


@pytest.fixture
async def workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Workers]:
    """Give two workers of one shop; the browser that asks them has the same cookies."""
    server = StateServer(tmp_path).start()
    monkeypatch.setenv("HARDENING_STATE_URL", server.url)
    for variable in ("SHOP_SESSION_SECRET", "SHOP_SIGNING_SECRET"):
        monkeypatch.setenv(variable, "a" * 64)
    async with AsyncExitStack() as stack:
        cookies = httpx2.Cookies()
        clients = []
        for _ in range(2):
            app = make_shop(tmp_path)
            await stack.enter_async_context(LifespanManager(app))
            client = httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url=SHOP)
            client._cookies = cookies
            clients.append(await stack.enter_async_context(client))
        yield clients[0], clients[1]
    server.kill()


async def test_session_begins_at_one_worker_and_ends_at_another(workers: Workers) -> None:
    """Signed in here, signed out there, and unknown to both, also with the cookie of before."""
    here, there = workers
    await register(here)
    cookie = here.cookies["session"]
    assert (await there.get("/api/session")).json()["name"] == "Ada"
    await there.delete("/api/session")
    here.cookies.set("session", cookie)
    assert (await here.get("/api/session")).json() is None


async def test_token_of_one_worker_is_revoked_at_another(workers: Workers) -> None:
    """So is what is used up: a refresh token works once, wherever it is used."""
    here, there = workers
    await register(here)
    here.cookies.clear()
    app = {"client_id": "shop-app"}
    login = app | {"grant_type": "password", "username": CUSTOMER["email"], "password": PASSWORD}
    tokens = (await here.post("/oauth/token", data=login)).json()
    bearer = {"Authorization": f"Bearer {tokens['access_token']}"}
    assert (await there.get("/api/session", headers=bearer)).status_code == 200
    await there.post("/oauth/revoke", data=app | {"token": tokens["access_token"]})
    assert (await here.get("/api/session", headers=bearer)).status_code == 401
    refresh = app | {"grant_type": "refresh_token", "refresh_token": tokens["refresh_token"]}
    assert [(await each.post("/oauth/token", data=refresh)).status_code for each in workers] == [200, 400]


async def test_logins_are_limited_by_all_workers_together(workers: Workers) -> None:
    """Ten in a minute, not ten at each."""
    statuses = [(await sign_in(workers[n % 2], f"nobody-{n}@example.org")).status_code for n in range(12)]
    assert statuses == [401] * 10 + [429] * 2
