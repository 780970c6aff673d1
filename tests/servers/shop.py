"""The application that the servers of these tests serve; the environment says what else it does."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from anyio import Path as AsyncPath
from fastapi import Depends, FastAPI, Request, WebSocket
from fastapi.responses import PlainTextResponse

from fastapi_hardening import Problem, harden
from fastapi_hardening.core import context as request_context

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


app.websocket("/refused", dependencies=[Depends(refuse)])(echo)
app.get("/refused", dependencies=[Depends(refuse)])(ok)
