"""A closed application that the servers of these tests serve: tokens, tickets, and websockets that end."""

import asyncio
import logging
import time

from fastapi import FastAPI, WebSocket
from starlette.requests import HTTPConnection
from starlette.websockets import WebSocketDisconnect

from fastapi_hardening import CurrentUser, Settings, harden
from fastapi_hardening.core.identity import InvalidCredentials, Principal
from fastapi_hardening.security.auth import Tickets

logging.basicConfig(level=logging.INFO)


class Tokens:
    """Knows a member by a token, and a guest whose token ends soon after it was shown."""

    scheme = "bearer"
    challenge = "Bearer"

    async def authenticate(self, connection: HTTPConnection) -> Principal | None:
        sent = connection.headers.get("authorization")
        if sent is None:
            return None
        if sent == "Bearer a-secret-token-of-a-member":
            return Principal("member")
        if sent == "Bearer a-secret-token-of-a-guest":
            return Principal("guest", expires_at=time.time() + 1.0)
        raise InvalidCredentials("unknown token")


app = FastAPI()
tickets = Tickets()
app.include_router(tickets.router("/ticket"))
harden(app, Settings(auth={"default": "required"}), authenticators=[Tokens(), tickets])


@app.websocket("/talk")
async def talk(websocket: WebSocket, user: CurrentUser) -> None:
    """Says who is there, and waits."""
    await websocket.accept()
    await websocket.send_text(user.id)
    try:
        await websocket.receive_text()
    except WebSocketDisconnect as gone:
        logging.getLogger().info("%s is gone with %s", user.id, gone.code)


@app.websocket("/tick")
async def tick(websocket: WebSocket, user: CurrentUser) -> None:
    """Only sends."""
    await websocket.accept()
    try:
        while True:
            await websocket.send_text(user.id)
            await asyncio.sleep(0.01)
    except WebSocketDisconnect:
        logging.getLogger().info("%s hears no more", user.id)
