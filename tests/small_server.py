"""A small HTTP server on a real socket that behaves as a test wants: answers, hangs, breaks off, or is not there."""

import asyncio
import socket
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple, Self


class Seen(NamedTuple):
    """A request as it arrived."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes


class Answer(NamedTuple):
    """What is sent; ``cut`` bytes of the body are left out and the connection is closed instead."""

    status: int = 200
    body: bytes = b"ok"
    headers: tuple[tuple[str, str], ...] = ()
    cut: int = 0
    hang: bool = False
    drop: bool = False


HANG = Answer(hang=True)
DROP = Answer(drop=True)


class SmallServer:
    """Serves while the block runs; ``behave`` says what a request gets, and may be changed at any time."""

    def __init__(self, behave: Callable[[Seen], Answer] = lambda _: Answer()) -> None:
        self.behave = behave
        self.seen: list[Seen] = []
        self.connections = 0
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.die()

    async def die(self) -> None:
        """Closes the port and breaks every connection off."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in self._open:
            writer.transport.abort()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._open.add(writer)
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while await self._answer(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._open.discard(writer)
            self._tasks.discard(task)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, target, _ = head[0].split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:-2])}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        if "transfer-encoding" in headers:
            body = await reader.readuntil(b"0\r\n\r\n")
        seen = Seen(method, target, headers, body)
        self.seen.append(seen)
        answer = self.behave(seen)
        if answer.drop:
            return False
        if answer.hang:
            await asyncio.Event().wait()
        fields = [*answer.headers, ("Content-Length", str(len(answer.body)))]
        lines = [f"HTTP/1.1 {answer.status} X", *(f"{name}: {value}" for name, value in fields), "", ""]
        writer.write("\r\n".join(lines).encode("latin-1") + answer.body[: len(answer.body) - answer.cut])
        await writer.drain()
        return not answer.cut
