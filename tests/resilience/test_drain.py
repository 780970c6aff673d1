"""Draining: served, asked to leave, refused."""

from typing import Any

import pytest
from fastapi import FastAPI, WebSocket
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from fastapi_hardening.core.clock import ManualClock
from fastapi_hardening.core.lifecycle import Lifecycle
from fastapi_hardening.resilience.drain import DrainMiddleware

CLOCK = ManualClock()


@pytest.fixture
def lifecycle() -> Lifecycle:
    return Lifecycle(drain_deadline_seconds=30, clock=CLOCK)


@pytest.fixture
def client(lifecycle: Lifecycle) -> TestClient:
    app = FastAPI()
    app.add_middleware(DrainMiddleware, lifecycle=lifecycle, retry_after_seconds=2)

    @app.get("/")
    async def index() -> str:
        return "ok"

    @app.websocket("/talk")
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text("hello")

    return TestClient(app)


def test_while_serving_nothing_changes(client: TestClient) -> None:
    """No field, no refusal."""
    assert "connection" not in client.get("/").headers


def test_while_draining_requests_are_served_and_connections_end(client: TestClient, lifecycle: Lifecycle) -> None:
    """The client's next request goes over a new connection, to another process."""
    lifecycle.drain()
    answer = client.get("/")
    assert (answer.json(), answer.headers["connection"]) == ("ok", "close")
    with client.websocket_connect("/talk") as websocket:
        assert websocket.receive_text() == "hello"


def test_http_2_has_no_such_field(lifecycle: Lifecycle) -> None:
    """RFC 9113, section 8.2.2."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await DrainMiddleware(PlainTextResponse("ok"), lifecycle=lifecycle)(
            dict(scope) | {"http_version": "2"}, receive, send
        )

    lifecycle.drain()
    assert "connection" not in TestClient(app).get("/").headers


def test_past_the_deadline_requests_are_refused_with_the_time_to_come_back(
    client: TestClient, lifecycle: Lifecycle
) -> None:
    """503 as a problem, jittered; websockets too."""
    lifecycle.drain()
    CLOCK.advance(30)
    answer = client.get("/")
    assert answer.status_code == 503
    assert answer.json()["type"] == "https://iana.org/assignments/http-problem-types#temporary-reduced-capacity"
    assert 2 <= int(answer.headers["retry-after"]) <= 4
    assert answer.headers["connection"] == "close"
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/talk"):
        raise AssertionError("was accepted")


def test_it_works_on_starlette_and_leaves_the_lifespan_alone(lifecycle: Lifecycle) -> None:
    """Ending the process is the lifespan's own business."""
    app = Starlette(routes=[Route("/", lambda request: PlainTextResponse("ok"))])
    app.add_middleware(DrainMiddleware, lifecycle=lifecycle)
    lifecycle.drain()
    with TestClient(app) as client:
        assert client.get("/").headers["connection"] == "close"
