"""The application that the servers of these tests serve; the environment says what else it does."""

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from anyio import Path as AsyncPath
from fastapi import Depends, FastAPI, Request, WebSocket
from fastapi.responses import PlainTextResponse

from fastapi_hardening import Problem, RateLimit, WebSocketLimits, harden
from fastapi_hardening.core import context as request_context
from fastapi_hardening.core.identity import Principal

logging.basicConfig(level=logging.INFO)

held: set[str] = set()
warm: set[asyncio.Task[None]] = set()


async def exists(path: str) -> None:
    """Waits until the test has made a file."""
    while not await AsyncPath(path).exists():  # noqa: ASYNC110 - another process makes it
        await asyncio.sleep(0.01)


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[dict[str, Any]]:
    """Starts as slowly, and ends as noisily, as the test wants it to."""
    logging.getLogger().info("the lifespan has begun")
    if "START_FAILS" in os.environ:
        raise RuntimeError("the start failed")
    if "START_WHEN" in os.environ:
        await exists(os.environ["START_WHEN"])
    if "WARM_WHEN" in os.environ:
        task = asyncio.create_task(warm_up(os.environ["WARM_WHEN"]))
        warm.add(task)
    yield {"name": "shop"}
    if "SHUT_DOWN" in os.environ:
        await AsyncPath(os.environ["SHUT_DOWN"], str(os.getpid())).touch()


app = FastAPI(lifespan=lifespan)
handle = harden(app)


async def warm_up(when: str) -> None:
    """Start-up work that goes on while the server serves already."""
    with handle.lifecycle.starting("warming up"):
        await exists(when)


async def refuse() -> None:
    """Lets nobody in."""
    raise Problem("Not you.", status=403)


@app.get("/ok")
async def ok(request: Request) -> dict[str, Any]:
    """Says who asked, and who answers."""
    context = request_context.current()
    assert context is not None
    return {"client": context.client.address, "process": os.getpid(), "state": request.state.name}


@app.post("/held/{name}")
async def hold(name: str, request: Request) -> PlainTextResponse:
    """Answers when the whole body is there, so that the client decides when it ends."""
    held.add(name)
    try:
        return PlainTextResponse(str(len(await request.body())))
    finally:
        held.discard(name)


@app.get("/held")
async def being_held() -> dict[str, Any]:
    """Which requests wait for their body, in this process."""
    return {"held": sorted(held), "process": os.getpid()}


@app.websocket("/echo")
async def echo(websocket: WebSocket) -> None:
    """Says everything twice."""
    await websocket.accept()
    async for text in websocket.iter_text():
        await websocket.send_text(text)


@app.websocket("/number/{number}")
async def number(websocket: WebSocket, number: int) -> None:
    """Takes numbers only."""
    await websocket.accept()
    await websocket.send_json(number)


@app.websocket("/boom")
async def boom(_websocket: WebSocket) -> None:
    """Fails before it has accepted."""
    raise RuntimeError("a secret of the exception")


async def recognise(websocket: WebSocket) -> None:
    """Knows everybody, for a moment."""
    request_context.ensure(websocket.scope).principal = Principal("anna", expires_at=time.time() + 0.2)


app.websocket("/small", dependencies=[WebSocketLimits(max_message_bytes=100)])(echo)
app.websocket("/few", dependencies=[WebSocketLimits(messages="3/hour")])(echo)
app.websocket("/idle", dependencies=[WebSocketLimits(idle_seconds=0.2)])(echo)
app.websocket("/expiring", dependencies=[Depends(recognise)])(echo)
app.websocket("/single", dependencies=[WebSocketLimits(max_connections_per_client=1)])(echo)
app.websocket("/rated", dependencies=[RateLimit("1/hour")])(echo)


@app.websocket("/deaf", dependencies=[WebSocketLimits(close_grace_seconds=0.2)])
async def be_deaf(websocket: WebSocket) -> None:
    """Waits for something that never happens, and notices nothing."""
    await websocket.accept()
    await websocket.send_text("ok")
    try:
        await asyncio.Event().wait()
    finally:
        logging.getLogger().info("the deaf endpoint has ended")


@app.websocket("/pour", dependencies=[WebSocketLimits(max_send_seconds=0.5, close_grace_seconds=0.2)])
async def pour(websocket: WebSocket) -> None:
    """Sends without an end, whether it is read or not."""
    await websocket.accept()
    try:
        while True:
            await websocket.send_bytes(os.urandom(100_000))
    finally:
        logging.getLogger().info("the pouring endpoint has ended")


app.websocket("/refused", dependencies=[Depends(refuse)])(echo)
app.get("/refused", dependencies=[Depends(refuse)])(ok)
