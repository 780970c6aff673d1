"""Bulkheads: how many get in, who waits, who is refused, and that every permit comes back."""

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any

import httpx2
import pytest
from fastapi import APIRouter, FastAPI, WebSocket
from fastapi.responses import StreamingResponse
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.types import ASGIApp

from fastapi_hardening import Bulkhead, Settings, Timeout, harden
from fastapi_hardening.core.events import RequestRefused

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    """Run on asyncio, as uvicorn does."""
    return "asyncio"


class Gate:
    """What a handler waits at, so that the test says when it ends."""

    def __init__(self) -> None:
        self.waiting = 0
        self.most = 0
        self.open = asyncio.Event()

    async def __call__(self) -> str:
        """The endpoint."""
        self.waiting += 1
        self.most = max(self.most, self.waiting)
        try:
            await self.open.wait()
        finally:
            self.waiting -= 1
        return "ok"


async def ask(app: ASGIApp, path: str = "/") -> httpx2.Response:
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://shop.test") as client:
        return await client.get(path)


async def settle() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


async def test_so_many_get_in_a_few_wait_and_the_rest_is_refused() -> None:
    """At once, with the time to come back; those who wait get in when others leave."""
    app, gate, bulkhead = FastAPI(), Gate(), Bulkhead(2, max_queue=1, retry_after_seconds=3)
    app.get("/", dependencies=[bulkhead])(gate.__call__)
    handle = harden(app)
    asked = [asyncio.create_task(ask(app)) for _ in range(5)]
    await settle()
    assert (bulkhead.places.in_use, bulkhead.places.waiting) == (2, 1)
    gate.open.set()
    answers = await asyncio.gather(*asked)
    assert sorted(answer.status_code for answer in answers) == [200, 200, 200, 503, 503]
    refused = next(answer for answer in answers if answer.status_code == 503)
    assert refused.json()["type"].endswith("#temporary-reduced-capacity")
    assert 3 <= int(refused.headers["retry-after"]) <= 6
    assert gate.most == 2
    assert bulkhead.places.in_use == 0
    assert handle.events.count(RequestRefused) == 2


async def test_as_many_wait_as_are_served_if_nobody_says_otherwise() -> None:
    """And any number may be refused in place of a route that is nobody's business."""
    assert Bulkhead(7).places.max_waiting == 7
    app, gate = FastAPI(), Gate()
    app.get("/", dependencies=[Bulkhead(1, max_queue=0)])(gate.__call__)
    app.get("/other")(lambda: "ok")
    harden(app)
    first = asyncio.create_task(ask(app))
    await settle()
    assert (await ask(app)).status_code == 503
    assert (await ask(app, "/other")).status_code == 200
    gate.open.set()
    assert (await first).status_code == 200


async def test_one_object_is_one_bulkhead_wherever_it_stands() -> None:
    """On two routes it is shared; on a route and on its router it counts once, and does not wait for itself."""
    app, gate, shared = FastAPI(), Gate(), Bulkhead(1, max_queue=0)
    router = APIRouter(dependencies=[shared])
    router.get("/one", dependencies=[shared])(gate.__call__)
    router.get("/two")(gate.__call__)

    @router.get("/three")
    async def three(_held: Annotated[None, shared]) -> int:
        return shared.places.in_use

    app.include_router(router)
    first = asyncio.create_task(ask(app, "/one"))
    await settle()
    assert (await ask(app, "/two")).status_code == 503
    gate.open.set()
    assert (await first).status_code == 200
    assert (await ask(app, "/two")).status_code == 200
    assert (await ask(app, "/three")).json() == 1
    assert shared.places.in_use == 0


async def test_every_level_holds() -> None:
    """A narrow one does not lift a wide one around it, and gives back what it had when that refuses."""
    app, gate = FastAPI(), Gate()
    wide, narrow = Bulkhead(3, max_queue=0), Bulkhead(1, max_queue=0)
    router = APIRouter(dependencies=[wide])
    router.get("/narrow", dependencies=[narrow])(gate.__call__)
    app.include_router(router)
    first = asyncio.create_task(ask(app, "/narrow"))
    await settle()
    assert (await ask(app, "/narrow")).status_code == 503
    assert (wide.places.in_use, narrow.places.in_use) == (1, 1)
    gate.open.set()
    await first
    assert (wide.places.in_use, narrow.places.in_use) == (0, 0)


async def test_who_waits_too_long_is_refused() -> None:
    """Before its place in the queue is worth nothing to anybody."""
    app, gate = FastAPI(), Gate()
    app.get("/", dependencies=[Bulkhead(1, max_wait_seconds=0.005)])(gate.__call__)
    first = asyncio.create_task(ask(app))
    await settle()
    assert (await ask(app)).status_code == 503
    gate.open.set()
    await first


async def test_a_deadline_ends_the_wait_and_gives_the_permit_back() -> None:
    """Of the one that is served and of the one that waits."""
    app, gate, bulkhead = FastAPI(), Gate(), Bulkhead(1)
    app.get("/", dependencies=[bulkhead, Timeout(0.01)])(gate.__call__)
    harden(app)
    answers = await asyncio.gather(ask(app), ask(app))
    assert [answer.status_code for answer in answers] == [504, 504]
    assert (bulkhead.places.in_use, bulkhead.places.waiting) == (0, 0)


async def test_a_stream_holds_its_permit_to_the_end() -> None:
    """What it sends needs what the bulkhead protects."""
    app, go_on, bulkhead = FastAPI(), asyncio.Event(), Bulkhead(1, max_queue=0)

    async def parts() -> AsyncIterator[bytes]:
        yield b"one"
        await go_on.wait()
        yield b"two"

    @app.get("/", dependencies=[bulkhead])
    async def stream() -> StreamingResponse:
        return StreamingResponse(parts())

    first = asyncio.create_task(ask(app))
    await settle()
    assert (await ask(app)).status_code == 503
    go_on.set()
    assert (await first).content == b"onetwo"
    assert bulkhead.places.in_use == 0


def test_a_failing_endpoint_gives_its_permit_back() -> None:
    """Whatever it fails with."""
    app, bulkhead = FastAPI(), Bulkhead(1, max_queue=0)

    @app.get("/", dependencies=[bulkhead])
    async def fails() -> None:
        raise RuntimeError("no")

    client = TestClient(app, raise_server_exceptions=False)
    assert [client.get("/").status_code for _ in range(3)] == [500, 500, 500]
    assert bulkhead.places.in_use == 0


def test_a_websocket_holds_its_permit_while_it_is_open() -> None:
    """The next one is refused as an HTTP answer."""
    app, bulkhead = FastAPI(), Bulkhead(1, max_queue=0)

    @app.websocket("/", dependencies=[bulkhead])
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.receive_text()

    harden(app)
    client = TestClient(app)
    with client.websocket_connect("/") as websocket:
        with pytest.raises(WebSocketDenialResponse) as denied, client.websocket_connect("/"):
            raise AssertionError("was accepted")
        assert denied.value.status_code == 503
        websocket.send_text("bye")
    assert bulkhead.places.in_use == 0


@pytest.mark.parametrize(
    "bad",
    [
        {"max_concurrency": 0},
        {"max_concurrency": 1, "max_queue": -1},
        {"max_concurrency": 1, "max_wait_seconds": 0},
        {"max_concurrency": 1, "retry_after_seconds": 0},
    ],
)
def test_a_bulkhead_that_cannot_be_is_refused_when_it_is_made(bad: dict[str, Any]) -> None:
    """With the sentence that says what is wrong."""
    with pytest.raises(ValueError, match="a bulkhead"):
        Bulkhead(**bad)


async def test_the_metrics_tell_what_is_in_use() -> None:
    """By the bulkhead's name, or else by the route that it stands on first; routes may be added later."""
    app, gate = FastAPI(), Gate()
    handle = harden(app, Settings(metrics={"enabled": True}))
    named = Bulkhead(1, name="database")
    app.get("/one", dependencies=[named])(gate.__call__)
    app.get("/two", dependencies=[named, Bulkhead(5)])(gate.__call__)
    asked = [asyncio.create_task(ask(app, path)) for path in ("/one", "/two")]
    await settle()

    def value(series: str, bulkhead: str) -> float | None:
        return handle.metrics.registry.get_sample_value(f"hardening_bulkhead_{series}", {"bulkhead": bulkhead})

    assert (value("in_use", "database"), value("waiting", "database")) == (1, 1)
    assert (value("in_use", "/two"), value("waiting", "/two")) == (0, 0)
    gate.open.set()
    await asyncio.gather(*asked)
    assert value("in_use", "database") == 0
