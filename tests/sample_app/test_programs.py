"""Programs: tokens for our own app and for a partner's service, keys of partners, and what each may do."""

import httpx2
import pytest

from sample_app.main import create_app
from tests.sample_app.conftest import CUSTOMER, PASSWORD, NewClient, order, register

pytestmark = pytest.mark.anyio

PARTNER_SECRET = "the secret of the partner's service"
APP = {"client_id": "shop-app"}
LOGIN = APP | {"grant_type": "password", "username": CUSTOMER["email"], "password": PASSWORD}
MILL = {"partner": "Mill & Co"}


@pytest.fixture
def environment() -> dict[str, str]:
    """Let the shop know a partner's service."""
    return {"SHOP_PARTNER_SECRET": PARTNER_SECRET}


def bearer(answer: httpx2.Response) -> dict[str, str]:
    """The token of an answer, as a field."""
    return {"Authorization": f"Bearer {answer.json()['access_token']}"}


async def test_app_signs_in_for_its_user(client: httpx2.AsyncClient, new_client: NewClient) -> None:
    """The token says who it is, and has the same basket and orders as the browser."""
    me = (await register(client)).json()
    address = (await order(client, 1)).headers["location"]
    async with new_client() as app:
        answer = await app.post("/oauth/token", data=LOGIN)
        assert answer.status_code == 200
        assert answer.headers["cache-control"] == "no-store"
        assert (await app.get("/api/session", headers=bearer(answer))).json() == me
        assert (await app.get(address, headers=bearer(answer))).status_code == 200
        assert (await app.get(address)).status_code == 404


async def test_refresh_token_works_once(client: httpx2.AsyncClient) -> None:
    """Its successor has today's name and role; the second use of one ends all that came from the login."""
    await register(client)
    refresh = APP | {"grant_type": "refresh_token"}
    first = (await client.post("/oauth/token", data=LOGIN)).json()["refresh_token"]
    second = await client.post("/oauth/token", data=refresh | {"refresh_token": first})
    assert (await client.get("/api/session", headers=bearer(second))).json()["name"] == "Ada"
    for used in (first, second.json()["refresh_token"]):
        answer = await client.post("/oauth/token", data=refresh | {"refresh_token": used})
        assert (answer.status_code, answer.json()["error"]) == (400, "invalid_grant")


async def test_access_token_is_revoked_at_once(client: httpx2.AsyncClient) -> None:
    """By the app that got it; it was good a moment ago."""
    await register(client)
    answer = await client.post("/oauth/token", data=LOGIN)
    client.cookies.clear()
    assert (await client.get("/api/session", headers=bearer(answer))).status_code == 200
    revoked = await client.post("/oauth/revoke", data=APP | {"token": answer.json()["access_token"]})
    assert revoked.status_code == 200
    refused = await client.get("/api/session", headers=bearer(answer))
    assert refused.status_code == 401
    assert 'Bearer error="invalid_token"' in refused.headers["www-authenticate"]


async def test_page_and_app_are_throttled_together(client: httpx2.AsyncClient) -> None:
    """Guesses at one account count, wherever they are made."""
    await register(client)
    wrong = LOGIN | {"password": "a guess"}
    statuses = [(await client.post("/oauth/token", data=wrong)).status_code for _ in range(5)]
    assert statuses == [400] * 5
    answer = await client.post("/api/session", json={"email": CUSTOMER["email"], "password": PASSWORD})
    assert answer.status_code == 429


async def test_token_that_does_not_cover_it_says_what_would(client: httpx2.AsyncClient) -> None:
    """403 with the scope that is missing; a session, which is no token, gets 403 without."""
    await register(client)
    token = bearer(await client.post("/oauth/token", data=LOGIN))
    assert (await client.get("/api/partner/stock")).status_code == 403
    client.cookies.clear()
    answer = await client.get("/api/partner/stock", headers=token)
    assert answer.status_code == 403
    assert answer.headers["www-authenticate"] == 'Bearer error="insufficient_scope", scope="stock:read"'


async def test_service_of_a_partner_reads_the_stock_and_nothing_else(client: httpx2.AsyncClient) -> None:
    """Its secret gives a token without a refresh token; another secret gives nothing."""
    grant = {"grant_type": "client_credentials"}
    answer = await client.post("/oauth/token", data=grant, auth=("partner", PARTNER_SECRET))
    assert answer.json()["scope"] == "stock:read"
    assert "refresh_token" not in answer.json()
    stock = (await client.get("/api/partner/stock", headers=bearer(answer))).json()
    assert stock[0] == {"id": 1, "name": "Enamel mug", "stock": 40}
    assert (await client.get("/api/admin/orders.csv", headers=bearer(answer))).status_code == 403
    wrong = await client.post("/oauth/token", data=grant, auth=("partner", PARTNER_SECRET[::-1]))
    assert (wrong.status_code, wrong.json()["error"]) == (401, "invalid_client")


def test_guessable_secret_of_a_partner_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shop does not start, and says how to make a good one."""
    monkeypatch.setenv("SHOP_PARTNER_SECRET", "12345")
    with pytest.raises(ValueError, match="at least 32 characters"):
        create_app()


async def test_key_of_a_partner_is_shown_once(client: httpx2.AsyncClient, admin: httpx2.AsyncClient) -> None:
    """It opens the stock and nothing else; the list tells when it was used, and not what it is."""
    made = await admin.post("/api/admin/api-keys", json=MILL | {"days": 30})
    assert made.status_code == 201
    assert made.headers["cache-control"] == "no-store"
    key = {"X-API-Key": made.json()["key"]}
    assert (await client.get("/api/partner/stock", headers=key)).status_code == 200
    assert (await client.get("/api/admin/orders.csv", headers=key)).status_code == 403
    answer = await admin.get("/api/admin/api-keys")
    assert key["X-API-Key"] not in answer.text
    [listed] = answer.json()
    assert (listed["partner"], listed["scopes"], listed["revoked"]) == ("Mill & Co", ["stock:read"], False)
    assert listed["last_used_at"] is not None


async def test_key_that_was_taken_back_opens_nothing(client: httpx2.AsyncClient, admin: httpx2.AsyncClient) -> None:
    """At once; another one of the same partner still does."""
    old, new = [(await admin.post("/api/admin/api-keys", json=MILL)).json() for _ in range(2)]
    assert (await admin.delete(f"/api/admin/api-keys/{old['id']}")).status_code == 204
    answers = [await client.get("/api/partner/stock", headers={"X-API-Key": each["key"]}) for each in (old, new)]
    assert [answer.status_code for answer in answers] == [401, 200]
    assert [each["revoked"] for each in (await admin.get("/api/admin/api-keys")).json()] == [False, True]
    assert (await admin.delete("/api/admin/api-keys/none")).status_code == 404
