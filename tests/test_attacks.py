"""Attacks that got through elsewhere, against a whole hardened application. Each test names what it guards."""

from typing import Any

import pytest
from fastapi import APIRouter, FastAPI, WebSocket
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient, WebSocketDenialResponse
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from fastapi_hardening import RateLimit, Settings, harden
from fastapi_hardening.core.client_ip import UnknownProxySeen
from fastapi_hardening.core.clock import ManualClock


async def _ok() -> str:
    return "ok"


def limited(limit: str = "2/minute", **settings: Any) -> FastAPI:
    app = FastAPI()
    harden(app, Settings(rate_limit={"default": limit, "unknown_proxy_factor": 1}, **settings), clock=ManualClock())
    app.get("/items/{number}")(_ok)
    return app


def statuses(app: Any, requests: list[tuple[str, dict[str, str]]], peer: str = "8.8.8.8") -> list[int]:
    client = TestClient(app, client=(peer, 1))
    return [client.get(path, headers=headers).status_code for path, headers in requests]


def test_spoofed_forwarding_headers_over_repeated_lines() -> None:
    """A client that sends many ``X-Forwarded-For`` lines stays one client, with and without a trusted proxy."""
    client = TestClient(limited(), client=("8.8.8.8", 1))
    lines = [("X-Forwarded-For", f"1.1.1.{number}") for number in range(5)]
    assert [client.get("/items/1", headers=lines[: number + 1]).status_code for number in range(3)] == [200, 200, 429]
    behind = TestClient(limited(trusted_proxies=["10.0.0.0/8"]), client=("10.0.0.1", 1))
    answers = []
    for number in range(3):
        spoofed = [("X-Forwarded-For", f"1.1.1.{number}"), ("X-Forwarded-For", "203.0.113.9")]
        answers.append(behind.get("/items/1", headers=spoofed).status_code)
    assert answers == [200, 200, 429]


@pytest.mark.parametrize("proxies", [["10.0.0.1"], ["10.0.0.1", "10.0.0.2"]])
def test_forwarding_through_one_proxy_and_through_two(proxies: list[str]) -> None:
    """What stands left of the first untrusted hop was written by the client."""
    app = limited("1/minute", trusted_proxies=proxies)
    chain = "".join(f", {proxy}" for proxy in proxies[1:])
    requests = [
        ("/items/1", {"X-Forwarded-For": f"{claimed}, 203.0.113.9{chain}"}) for claimed in ("1.1.1.1", "2.2.2.2")
    ]
    assert statuses(app, requests, peer="10.0.0.1") == [200, 429]


@pytest.mark.parametrize("trusted", [(), ("127.0.0.1",)])
def test_uvicorns_own_proxy_headers_before_us(trusted: tuple[str, ...]) -> None:
    """uvicorn believes its loopback peer by default; what it found is the client, and nothing is read twice."""
    app = limited("1/minute", trusted_proxies=trusted)
    server = ProxyHeadersMiddleware(app, trusted_hosts="127.0.0.1")  # type: ignore[arg-type]
    first = {"X-Forwarded-For": "6.6.6.6, 203.0.113.9"}
    same = {"X-Forwarded-For": "7.7.7.7, 203.0.113.9"}
    other = {"X-Forwarded-For": "203.0.113.10"}
    assert statuses(server, [("/items/1", each) for each in (first, same, other)], peer="127.0.0.1") == [200, 429, 200]


def test_ipv6_rotation() -> None:
    """All addresses of a /64 are one client."""
    app = limited("2/minute")
    got = [statuses(app, [("/items/1", {})], peer=f"2001:db8::{number:x}")[0] for number in range(4)]
    assert got == [200, 200, 429, 429]


def test_key_flood() -> None:
    """A flood of addresses fills a bounded memory, and no debt is forgiven for it."""
    app = limited("1/minute")
    bounded = FastAPI()
    handle = harden(bounded, Settings(rate_limit={"default": "1/minute", "max_keys": 50}), clock=ManualClock())
    bounded.get("/")(_ok)
    assert statuses(bounded, [("/", {})] * 2, peer="203.0.113.1") == [200, 429]
    flood = [statuses(bounded, [("/", {})], peer=f"8.8.{number // 200}.{number % 200}")[0] for number in range(200)]
    assert flood.count(200) <= 50
    assert statuses(bounded, [("/", {})], peer="203.0.113.1") == [429]
    assert handle.events.count(UnknownProxySeen) == 0
    assert statuses(app, [("/items/1", {})]) == [200]


def test_concrete_path_keys() -> None:
    """Counting by the path as it was asked for would give every number a bucket of its own."""
    assert statuses(limited(), [(f"/items/{number}", {}) for number in range(3)]) == [200, 200, 429]


def test_included_router_bypass() -> None:
    """FastAPI no longer flattens included routers; a limiter that walks ``app.routes`` exempts them silently."""
    app = FastAPI()
    harden(app, Settings(rate_limit={"default": "1/minute"}), clock=ManualClock())
    router = APIRouter()
    router.get("/included")(_ok)
    nested = APIRouter(prefix="/deep")
    nested.get("/nested", dependencies=[RateLimit("1/minute")])(_ok)
    router.include_router(nested)
    app.include_router(router, prefix="/api")
    app.mount("/mounted", Starlette(routes=[Route("/x", lambda request: PlainTextResponse("ok"))]))

    @app.websocket("/talk")
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()

    assert statuses(app, [("/api/included", {})] * 2, peer="1.0.0.1") == [200, 429]
    assert statuses(app, [("/api/deep/nested", {})] * 2, peer="1.0.0.2") == [200, 429]
    assert statuses(app, [("/mounted/x", {}), ("/nope", {})], peer="1.0.0.3") == [200, 429]
    client = TestClient(app, client=("1.0.0.4", 1))
    with client.websocket_connect("/talk"):
        pass
    with pytest.raises(WebSocketDenialResponse) as refusal, client.websocket_connect("/talk"):
        raise AssertionError("was accepted")
    assert refusal.value.status_code == 429


def test_no_client_address() -> None:
    """Requests without one share a budget; they are not skipped."""
    app = limited()

    async def nameless(scope: Any, receive: Any, send: Any) -> None:
        await app(dict(scope) | {"client": None, "server": None}, receive, send)

    assert statuses(nameless, [("/items/1", {})] * 3) == [200, 200, 429]


@pytest.mark.parametrize("injected", ["a\r\nSet-Cookie: x=1", "a\nb", "x" * 4000, "a b", "%0d%0a", "\x1b[31m"])
def test_header_injection_through_ids(injected: str) -> None:
    """An id that could end a header line, forge a log record or colour a terminal is replaced."""
    app = limited()
    sent = [(b"x-request-id", injected.encode())]
    answer = TestClient(app).get("/items/1", headers=sent)
    assert answer.headers["x-request-id"].isalnum()
    assert len(answer.headers["x-request-id"]) == 32
    assert "set-cookie" not in answer.headers


def test_probes_are_not_a_way_to_exhaust_a_client() -> None:
    """They are neither counted nor refused, whatever the client owes."""
    app = limited("1/minute")
    client = TestClient(app, client=("8.8.8.8", 1))
    assert [client.get("/items/1").status_code for _ in range(2)] == [200, 429]
    assert [client.get("/livez").status_code for _ in range(5)] == [200] * 5
