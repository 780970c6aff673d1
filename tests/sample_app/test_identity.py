"""Accounts: how somebody registers, signs in and out, and who cannot get in."""

import asyncio
import logging
import re
from pathlib import Path

import httpx2
import pytest
from asgi_lifespan import LifespanManager
from fastapi import FastAPI

from fastapi_hardening.security.auth import PasswordHasher, PasswordSettings
from sample_app import users
from sample_app.database import Database
from sample_app.main import create_app
from sample_app.users import authenticate, ensure_admin
from tests.sample_app.conftest import (
    ADMIN_PASSWORD,
    CUSTOMER,
    PASSWORD,
    SHOP,
    NewClient,
    make_shop,
    order,
    register,
    sign_in,
)

pytestmark = pytest.mark.anyio

ELSEWHERE = {"Sec-Fetch-Site": "cross-site"}


async def test_login_page_loads_nothing_but_its_own_files(client: httpx2.AsyncClient) -> None:
    """The page at /login has the strictest policy and no code in it."""
    page = await client.get("/login")
    assert page.status_code == 200
    for path in ("/static/shop.css", "/static/api.js", "/static/login.js", "/static/icon.svg"):
        assert path in page.text
        assert (await client.get(path)).status_code == 200
    assert re.findall(r"<script(?! src=)|<style|\son\w+=|\sstyle=", page.text) == []
    assert "default-src 'none'; script-src 'self'" in page.headers["content-security-policy"]


async def test_who_registers_is_signed_in(client: httpx2.AsyncClient) -> None:
    """An account is a customer's; its cookie cannot be read by scripts, and the password is in no answer."""
    assert (await client.get("/api/session")).json() is None
    answer = await register(client)
    assert answer.status_code == 201
    assert answer.json()["roles"] == ["customer"]
    assert PASSWORD not in answer.text
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith("session=")
    assert cookie.endswith("; Path=/; HttpOnly; SameSite=Lax")
    assert (await client.get("/api/session")).json() == answer.json()


async def test_address_has_one_account_however_it_is_written(client: httpx2.AsyncClient) -> None:
    """A second one is a 409, and either spelling signs in."""
    await register(client)
    assert (await register(client, "ADA@example.org")).status_code == 409
    assert (await sign_in(client, "Ada@Example.org")).status_code == 200


@pytest.mark.parametrize("password", ["", "short", "fourteen chars", "x" * 1001])
async def test_password_that_cannot_be_taken_is_not_echoed(client: httpx2.AsyncClient, password: str) -> None:
    """It is a 422, and no account is made."""
    new = {"email": "ada@example.org", "name": "Ada", "password": password}
    answer = await client.post("/api/users", json=new)
    assert answer.status_code == 422
    assert not password or password not in answer.text
    assert (await sign_in(client, password=password or "x")).status_code in (401, 422)


async def test_wrong_password_and_unknown_address_get_one_answer(client: httpx2.AsyncClient) -> None:
    """401 with the same sentence, so nobody learns who has an account."""
    await register(client)
    answers = [await sign_in(client, password="a guess"), await sign_in(client, "nobody@example.org")]
    assert [answer.status_code for answer in answers] == [401, 401]
    assert answers[0].json()["detail"] == answers[1].json()["detail"]
    assert {answer.headers["www-authenticate"] for answer in answers} == {'Cookie cookie-name="session"'}


async def test_hash_gets_stronger_at_a_login(
    client: httpx2.AsyncClient, shop: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When hashes cost more than they did, that of an account follows; who logs in notices nothing."""
    await register(client)
    monkeypatch.setattr(users, "hasher", PasswordHasher(PasswordSettings(time_cost=3)))
    for _ in range(2):
        assert (await sign_in(client)).status_code == 200
    async with shop.state.database.session() as session:
        user = await users.find_user(session, CUSTOMER["email"])
    assert user is not None
    assert "t=3" in user.password_hash


async def test_guessing_is_slowed_down(client: httpx2.AsyncClient) -> None:
    """After five failures an account answers 429, and when to come back, also to the right password."""
    guesses = [await sign_in(client, "admin@shop.example", "a guess") for _ in range(6)]
    assert [answer.status_code for answer in guesses] == [401] * 5 + [429]
    assert guesses[-1].json()["title"] == "Too many failed logins"
    right = await sign_in(client, "admin@shop.example", ADMIN_PASSWORD)
    assert right.status_code == 429
    assert int(right.headers["retry-after"]) > 0


async def test_logins_are_limited_whoever_tries(client: httpx2.AsyncClient) -> None:
    """Ten logins and registrations in a minute, of one address, whether they succeed or not."""
    answers = [await sign_in(client, f"nobody-{number}@example.org") for number in range(11)]
    assert [answer.status_code for answer in answers] == [401] * 10 + [429]
    assert answers[-1].headers["ratelimit-policy"] == '"login";q=10;w=60'
    assert (await register(client)).status_code == 429


async def test_other_sites_sign_nobody_in_or_out(client: httpx2.AsyncClient) -> None:
    """A page of another site can neither send the forms, nor act with the session."""
    body = {"email": CUSTOMER["email"], "name": "Ada", "password": PASSWORD}
    assert (await client.post("/api/users", json=body, headers=ELSEWHERE)).status_code == 403
    await register(client)
    del body["name"]
    assert (await client.post("/api/session", json=body, headers=ELSEWHERE)).status_code == 403
    assert (await client.delete("/api/session", headers=ELSEWHERE)).status_code == 403
    assert (await client.put("/api/basket/1", json={"quantity": 1}, headers=ELSEWHERE)).status_code == 403
    assert (await client.get("/api/session")).json() is not None


async def test_signing_out_makes_the_browser_forget(client: httpx2.AsyncClient) -> None:
    """The cookie opens nothing any more, even if somebody has kept it."""
    await register(client)
    kept = client.cookies["session"]
    answer = await client.delete("/api/session")
    assert answer.status_code == 204
    assert answer.headers["clear-site-data"] == '"cache", "cookies", "storage"'
    assert "session" not in client.cookies
    client.cookies.set("session", kept)
    assert (await client.get("/api/session")).json() is None


async def test_signing_out_everywhere_ends_all_sessions(client: httpx2.AsyncClient, new_client: NewClient) -> None:
    """Those of the same person on other devices; who is not signed in ends nothing, and gets no error."""
    await register(client)
    async with new_client() as phone:
        assert (await phone.delete("/api/session?everywhere=true")).status_code == 204
        await sign_in(phone)
        await client.delete("/api/session?everywhere=true")
        assert (await phone.get("/api/session")).json() is None


async def test_basket_and_orders_come_along(client: httpx2.AsyncClient, new_client: NewClient) -> None:
    """What a stranger ordered, and put into the basket, is theirs after signing in, on every device, and added up."""
    await register(client)
    await client.put("/api/basket/1", json={"quantity": 60})
    await client.delete("/api/session")
    address = (await order(client, 2)).headers["location"]
    await client.put("/api/basket/1", json={"quantity": 60})
    await client.put("/api/basket/3", json={"quantity": 1})
    stranger = client.cookies["shopper"]
    await sign_in(client)
    assert "shopper" not in client.cookies
    async with new_client() as phone:
        await sign_in(phone)
        lines = (await phone.get("/api/basket")).json()["lines"]
        assert [(line["product_id"], line["quantity"]) for line in lines] == [(1, 99), (3, 1)]
        assert (await phone.get(address)).status_code == 200
        await phone.delete("/api/session")
        phone.cookies.set("shopper", stranger)
        assert (await phone.get("/api/basket")).json()["lines"] == []
        assert (await phone.get(address)).status_code == 404


# --- the first admin --------------------------------------------------------------------------------------------------


async def test_first_admin_is_made_once_by_many_workers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without a password in the environment one of them makes one up, and says which; a restart says nothing."""
    database = Database(f"sqlite+aiosqlite:///{tmp_path / 'shop.sqlite3'}")
    await database.open()
    await asyncio.gather(*(ensure_admin(database, None) for _ in range(3)))
    await ensure_admin(database, None)
    [told] = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    password = told.rpartition(" ")[2]
    admin = await authenticate(database, "admin@shop.example", password)
    assert admin is not None
    assert admin.roles == {"admin"}
    await database.close()


async def test_password_of_the_environment_is_always_the_admins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever runs the shop gets in again by setting another one; the old one is no longer good, and neither logged."""
    async with LifespanManager(make_shop(tmp_path)):
        pass
    monkeypatch.setenv("SHOP_ADMIN_PASSWORD", "another password for it")
    app = create_app(f"sqlite+aiosqlite:///{tmp_path / 'shop.sqlite3'}")
    client = httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url=SHOP)
    async with LifespanManager(app), client:
        assert (await sign_in(client, "admin@shop.example", ADMIN_PASSWORD)).status_code == 401
        assert (await sign_in(client, "admin@shop.example", "another password for it")).status_code == 200
    assert "another password for it" not in caplog.text


async def test_secrets_of_the_environment_outlive_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another worker, or the next one, knows the session; one with other secrets does not."""
    seen = []
    cookie = ""
    for secret in ("a" * 64, "a" * 64, ""):
        monkeypatch.setenv("SHOP_SESSION_SECRET", secret)
        app = make_shop(tmp_path)
        client = httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url=SHOP)
        async with LifespanManager(app), client:
            if cookie:
                client.cookies.set("session", cookie)
            else:
                await register(client)
                cookie = client.cookies["session"]
            seen.append((await client.get("/api/session")).json() is not None)
    assert seen == [True, True, False]
