"""The shop's own page may be hosted elsewhere; nobody else's page reads anything."""

import httpx2
import pytest

from tests.sample_app.conftest import register, sign_in

pytestmark = pytest.mark.anyio

OURS = {"Origin": "https://www.shop.example", "Sec-Fetch-Site": "same-site"}
THEIRS = {"Origin": "https://shop.example.evil.example", "Sec-Fetch-Site": "cross-site"}


@pytest.fixture
def environment() -> dict[str, str]:
    """Let the shop know where its page is."""
    return {"SHOP_ORIGINS": "https://www.shop.example, https://shop.example"}


def readable(answer: httpx2.Response) -> bool:
    """Whether the browser lets a page of ours read the answer, with cookies."""
    allowed = answer.headers.get("access-control-allow-origin")
    return allowed == OURS["Origin"] and answer.headers["access-control-allow-credentials"] == "true"


async def test_our_page_reads_answers_and_refusals(client: httpx2.AsyncClient) -> None:
    """A good answer, a 401, a 404 and a 429, with the fields that say when to come back."""
    for path, status in (("/api/products", 200), ("/api/admin/orders.csv", 401), ("/no-such-page", 404)):
        answer = await client.get(path, headers=OURS)
        assert answer.status_code == status
        assert readable(answer)
    bodies = [{"email": f"nobody-{number}@example.org", "password": "a guess"} for number in range(11)]
    *_, answer = [await client.post("/api/session", json=body, headers=OURS) for body in bodies]
    assert answer.status_code == 429
    assert readable(answer)
    assert "Retry-After" in answer.headers["access-control-expose-headers"]


async def test_our_page_signs_in_and_acts(client: httpx2.AsyncClient) -> None:
    """Its preflight passes, and a request with the session's cookie is none of another site."""
    asks = {"Access-Control-Request-Method": "PUT", "Access-Control-Request-Headers": "content-type,idempotency-key"}
    preflight = await client.options("/api/basket/1", headers=OURS | asks)
    assert preflight.status_code in (200, 204)
    assert readable(preflight)
    assert "PUT" in preflight.headers["access-control-allow-methods"]
    assert "idempotency-key" in preflight.headers["access-control-allow-headers"].lower()
    await register(client)
    await client.delete("/api/session")
    body = {"email": "ada@example.org", "password": "correct horse battery staple"}
    assert (await client.post("/api/session", json=body, headers=OURS)).status_code == 200
    put = await client.put("/api/basket/1", json={"quantity": 1}, headers=OURS)
    assert put.status_code == 200
    assert readable(put)


async def test_other_pages_read_nothing(client: httpx2.AsyncClient) -> None:
    """Neither a good answer nor a preflight says that they may, and with a session they are refused."""
    await register(client)
    await sign_in(client)
    for path in ("/api/products", "/api/session", "/no-such-page"):
        answer = await client.get(path, headers=THEIRS)
        assert "access-control-allow-origin" not in answer.headers
        assert "Origin" in answer.headers["vary"]
    preflight = await client.options("/api/basket/1", headers=THEIRS | {"Access-Control-Request-Method": "PUT"})
    assert "access-control-allow-origin" not in preflight.headers
    assert (await client.put("/api/basket/1", json={"quantity": 1}, headers=THEIRS)).status_code == 403
