"""What happens to orders, as it happens: to customers of their own, to clerks of all, to strangers of none."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from starlette.testclient import WebSocketDenialResponse

from sample_app import live
from tests.sample_app.conftest import ADMIN_PASSWORD, CUSTOMER, PASSWORD, make_shop, new_key

LIVE = "/api/orders/live"
# The only host that the test client opens websockets to.
SHOP = "http://testserver"
HERE = {"Origin": SHOP}


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[TestClient]:
    """Give a running shop to one browser."""
    with TestClient(make_shop(tmp_path), base_url=SHOP) as client:
        yield client


def sign_in(browser: TestClient, email: str = CUSTOMER["email"], password: str = PASSWORD) -> None:
    browser.cookies.clear()
    answer = browser.post("/api/session", json={"email": email, "password": password})
    if answer.status_code == 401:
        answer = browser.post("/api/users", json={"email": email, "name": "Ada", "password": password})
    assert answer.is_success


def buy(browser: TestClient) -> str:
    """Orders something; gives the order's id."""
    browser.put("/api/basket/1", json={"quantity": 1})
    identity: str = browser.post("/api/orders", json=CUSTOMER, headers=new_key()).json()["id"]
    return identity


def told(browser: TestClient, events: int, headers: dict[str, str] | None = None, **more: Any) -> list[tuple[str, str]]:
    """The first few events that a websocket tells."""
    with browser.websocket_connect(more.pop("url", LIVE), headers=headers or HERE, **more) as websocket:
        received = [websocket.receive_json() for _ in range(events)]
    return [(event["order_id"], event["status"]) for event in received]


def refusal(browser: TestClient, url: str = LIVE, **more: Any) -> int:
    """The status that a handshake is refused with."""
    with pytest.raises(WebSocketDenialResponse) as refused, browser.websocket_connect(url, **more):
        pass
    status: int = refused.value.status_code
    return status


def test_customer_follows_own_orders_and_a_clerk_all(browser: TestClient) -> None:
    """What happened before the connection comes first, then what happens."""
    sign_in(browser, "ben@example.org")
    bens = buy(browser)
    sign_in(browser)
    adas = buy(browser)
    assert told(browser, 2) == [(adas, "placed"), (adas, "confirmed")]
    with browser.websocket_connect(LIVE, headers=HERE) as websocket:
        [websocket.receive_json() for _ in range(2)]
        later = buy(browser)
        assert websocket.receive_json()["order_id"] == later
    sign_in(browser, "admin@shop.example", ADMIN_PASSWORD)
    assert {order for order, _ in told(browser, 6)} == {bens, adas, later}


def test_stranger_and_another_site_are_refused(browser: TestClient) -> None:
    """Before the handshake: 401 without credentials, 403 for a page that is not ours."""
    assert refusal(browser, headers=HERE) == 401
    sign_in(browser)
    assert refusal(browser, headers={"Origin": "https://evil.example"}) == 403
    assert refusal(browser) == 403


def test_program_sends_its_token_or_a_ticket(browser: TestClient) -> None:
    """As a subprotocol, which the shop does not repeat; or once, in the query."""
    sign_in(browser)
    order = buy(browser)
    form = {"grant_type": "password", "client_id": "shop-app", "username": CUSTOMER["email"], "password": PASSWORD}
    token = browser.post("/oauth/token", data=form).json()["access_token"]
    ticket = browser.post("/api/websocket-ticket").json()["ticket"]
    browser.cookies.clear()
    elsewhere = {"Origin": "https://app.example"}
    assert told(browser, 1, elsewhere, subprotocols=["bearer", token]) == [(order, "placed")]
    assert told(browser, 1, elsewhere, url=f"{LIVE}?ticket={ticket}") == [(order, "placed")]
    assert refusal(browser, f"{LIVE}?ticket={ticket}") == 401
    assert refusal(browser, subprotocols=["bearer", token[:-4] + "AAAA"]) == 401


def test_connection_ends_so_that_who_was_signed_out_is_asked_again(
    browser: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The close says that the page may come back."""
    monkeypatch.setattr(live, "LIVE_SECONDS", 0.05)
    sign_in(browser)
    with browser.websocket_connect(LIVE, headers=HERE) as websocket:
        assert websocket.receive() == {"type": "websocket.close", "code": 1001, "reason": ""}
