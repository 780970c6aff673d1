"""A server that works two milliseconds a request, on a socket that was opened before: what outbound.py calls.

python benchmarks/small_server.py NUMBER_OF_THE_SOCKET
"""

import asyncio
import socket
import sys
from typing import Any

import uvicorn


async def app(scope: Any, _receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        await asyncio.sleep(0.002)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})


if __name__ == "__main__":
    config = uvicorn.Config(app, access_log=False, log_level="error", lifespan="off")
    with socket.socket(fileno=int(sys.argv[1])) as listening:
        uvicorn.Server(config).run(sockets=[listening])
