"""What is compressed, what never is, and that nothing else changes."""

import asyncio
import gzip
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from starlette.types import Message, Receive, Scope, Send

from fastapi_hardening import CacheResponse, Settings, harden
from fastapi_hardening.performance.compression import (
    CompressionMiddleware,
    CompressionSettings,
    MediaTypes,
    takes_gzip,
)

TEXT = "what is said again and again " * 100


def client_of(response: Any, **settings: Any) -> TestClient:
    """A client of an application that answers this, with the layer alone around it."""

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        await response(scope, receive, send)

    return TestClient(CompressionMiddleware(application, CompressionSettings(**{"enabled": True, **settings})))


def is_compressed(answer: Any) -> bool:
    return bool(answer.headers.get("content-encoding") == "gzip")


# --- engine -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accept", "takes"),
    [
        (b"gzip", True),
        (b"br, GZIP;q=0.5", True),
        (b"x-gzip", True),
        (b"*", True),
        (b"deflate, *;q=0.1", True),
        (b"gzip;q=0", False),
        (b"gzip;q=0.000, *", False),
        (b"identity, gzip;q=0.5", False),
        (b"identity;q=0.5, gzip;q=0.5", True),
        (b"br, deflate", False),
        (b"", False),
        (b"notgzip", False),
        (b"gzip; q = 1", False),
    ],
)
def test_what_a_client_takes(accept: bytes, takes: bool) -> None:
    """By its weights; what cannot be read is not taken."""
    assert takes_gzip(accept) is takes


@given(st.binary(max_size=60))
@hypothesis_settings(max_examples=60)
def test_no_field_raises_anything(accept: bytes) -> None:
    """Whatever a client sends."""
    assert takes_gzip(accept) in (True, False)


@pytest.mark.parametrize(
    ("content_type", "has"),
    [
        (b"text/html; charset=utf-8", True),
        (b"Application/JSON", True),
        (b"application/problem+json", True),
        (b"image/svg+xml", True),
        (b"text/event-stream", False),
        (b"image/png", False),
        (b"application/zip", False),
        (b"application/x/json", False),
        (b"", False),
        (None, False),
    ],
)
def test_which_types_are_compressed(content_type: bytes | None, has: bool) -> None:
    """Text; what is compressed in itself is not."""
    types = MediaTypes(CompressionSettings().content_types)
    assert [types.has(content_type) for _ in range(2)] == [has, has]
    assert MediaTypes(()).has(content_type) is False


# --- layer ------------------------------------------------------------------------------------------------------------


def test_a_text_is_compressed() -> None:
    """The client has the same text, its length is right, and the entity tag is a weak one."""
    with_tag = PlainTextResponse(TEXT, headers={"etag": '"a"', "accept-ranges": "bytes", "vary": "Origin"})
    answer = client_of(with_tag).get("/")
    assert answer.text == TEXT
    assert is_compressed(answer)
    assert int(answer.headers["content-length"]) < len(TEXT) / 10
    assert answer.headers["etag"] == 'W/"a"'
    assert answer.headers.get_list("vary") == ["Origin", "Accept-Encoding"]
    assert "accept-ranges" not in answer.headers


@pytest.mark.parametrize(
    "response",
    [
        JSONResponse({"a": 1}),
        PlainTextResponse(TEXT, headers={"set-cookie": "session=1"}),
        PlainTextResponse(TEXT, headers={"content-encoding": "br"}),
        PlainTextResponse(TEXT, headers={"cache-control": "no-transform"}),
        PlainTextResponse(TEXT, headers={"content-digest": "sha-256=:a:"}),
        PlainTextResponse(TEXT, status_code=206),
        Response(TEXT, media_type="image/png"),
        Response(TEXT),
        Response(status_code=204),
        PlainTextResponse(TEXT, media_type="text/event-stream"),
    ],
)
def test_what_is_left_alone(response: Response) -> None:
    """Small, secret, compressed, partial, unknown: it is sent as it is, without a word."""
    sent = asyncio.run(drive(client_app(response), accept_encoding="gzip"))
    assert sent[0]["headers"] == response.raw_headers
    assert sent[1]["body"] == response.body


@pytest.mark.parametrize(
    ("fields", "compressed"),
    [
        ({"cookie": "session=1"}, False),
        ({"authorization": "Basic YTpi"}, False),
        ({"cookie": "session=1", "sec-fetch-site": "cross-site"}, False),
        ({"cookie": "session=1", "sec-fetch-site": "same-site"}, False),
        ({"cookie": "session=1", "sec-fetch-site": "same-origin"}, True),
        ({"authorization": "Bearer token"}, True),
        ({"accept-encoding": "br"}, False),
    ],
)
def test_nobody_can_measure_the_secrets_of_others(fields: dict[str, str], compressed: bool) -> None:
    """What a page of another site may have caused, with the browser's own credentials, keeps its length."""
    answer = client_of(PlainTextResponse(TEXT)).get("/", headers=fields)
    assert is_compressed(answer) is compressed
    assert answer.text == TEXT
    assert answer.headers["vary"] == "Accept-Encoding"


def test_what_would_grow_is_left_as_it_is() -> None:
    """Where there is nothing to be saved."""
    noise = zlib.compress(TEXT.encode()) * 5
    answer = client_of(Response(noise[:1000] + bytes(range(256)), media_type="text/plain"), min_bytes=0).get("/")
    assert answer.content == noise[:1000] + bytes(range(256))
    short = client_of(PlainTextResponse("short"), min_bytes=0).get("/")
    assert not is_compressed(short)
    assert short.headers["content-length"] == "5"


def client_app(response: Any) -> CompressionMiddleware:
    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        await response(scope, receive, send)

    return CompressionMiddleware(application)


async def drive(layer: CompressionMiddleware, method: str = "GET", **fields: str) -> list[Message]:
    """Sends a request, and gives every message of the answer."""
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(name.replace("_", "-").encode(), value.encode()) for name, value in fields.items()]
    asgi = {"version": "3.0", "spec_version": "2.4"}
    await layer({"type": "http", "asgi": asgi, "method": method, "path": "/", "headers": headers}, receive, send)
    return sent


def test_a_stream_is_compressed_part_by_part() -> None:
    """The client can read each part when it comes; nothing waits for the next one."""

    async def parts() -> AsyncIterator[bytes]:
        for part in (b"one " * 300, b"", b"two " * 300):
            yield part

    sent = asyncio.run(drive(client_app(StreamingResponse(parts(), media_type="text/plain")), accept_encoding="gzip"))
    headers = dict(sent[0]["headers"])
    assert headers[b"content-encoding"] == b"gzip"
    assert b"content-length" not in headers
    reader = zlib.decompressobj(16 + zlib.MAX_WBITS)
    read = [reader.decompress(message["body"]) for message in sent[1:]]
    assert read == [b"one " * 300, b"", b"two " * 300, b""]
    assert reader.eof


@given(st.lists(st.binary(max_size=200), min_size=1, max_size=6))
@hypothesis_settings(max_examples=30)
def test_whatever_comes_in_comes_out(parts: list[bytes]) -> None:
    """In however many parts."""

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        for number, part in enumerate(parts, start=1):
            await send({"type": "http.response.body", "body": part, "more_body": number < len(parts)})

    layer = CompressionMiddleware(application, CompressionSettings(enabled=True, min_bytes=0))
    sent = asyncio.run(drive(layer, accept_encoding="gzip"))
    body = b"".join(message["body"] for message in sent[1:])
    compressed = (b"content-encoding", b"gzip") in sent[0]["headers"]
    assert (gzip.decompress(body) if compressed else body) == b"".join(parts)
    assert len(sent) == len(parts) + 1


def test_a_large_answer_does_not_hold_up_others() -> None:
    """It is compressed in slices, between which the event loop turns."""

    async def both() -> int:
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        counting = asyncio.create_task(count())
        sent = await drive(client_app(PlainTextResponse(b"x" * 1_000_000)), accept_encoding="gzip")
        counting.cancel()
        assert len(gzip.decompress(sent[1]["body"])) == 1_000_000
        return turns

    assert asyncio.run(both()) >= 15


def test_head_says_that_it_depends() -> None:
    """It has no body to be compressed; by its length the answer could have been."""
    client = client_of(PlainTextResponse(TEXT))
    answer = client.head("/")
    assert answer.headers["vary"] == "Accept-Encoding"
    assert answer.headers["content-length"] == str(len(TEXT))
    assert not is_compressed(answer)


def test_what_varies_already_is_not_said_twice() -> None:
    """Nor where everything counts."""
    for vary in ("accept-encoding", "*", "Origin, Accept-Encoding"):
        answer = client_of(PlainTextResponse(TEXT, headers={"vary": vary})).get("/")
        assert answer.headers.get_list("vary") == [vary]


def test_a_file_that_the_server_sends_itself_is_left_to_it(tmp_path: Path) -> None:
    """There is nothing here to be compressed."""
    (tmp_path / "page.txt").write_text(TEXT)
    assert is_compressed(client_of(FileResponse(tmp_path / "page.txt")).get("/"))

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.pathsend", "path": "/page.txt"})

    sent = asyncio.run(drive(CompressionMiddleware(application), accept_encoding="gzip"))
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.pathsend"]
    assert len(sent[0]["headers"]) == 1


# --- in harden() ------------------------------------------------------------------------------------------------------


def test_it_is_off_until_somebody_wants_it() -> None:
    """And then it works on what the response cache keeps, which stays as it is."""
    app = FastAPI()
    handle = harden(app)
    assert {layer.name: layer.state for layer in handle.pipeline}["compression"] == "off"
    app = FastAPI()
    harden(app, Settings(compression={"enabled": True}))

    @app.get("/page", dependencies=[CacheResponse(60)])
    async def page() -> PlainTextResponse:
        return PlainTextResponse(TEXT)

    @app.websocket("/ws")
    async def websocket(socket: Any) -> None: ...

    client = TestClient(app)
    plain = client.get("/page", headers={"accept-encoding": "identity"})
    answer = client.get("/page")
    assert answer.text == plain.text == TEXT
    assert is_compressed(answer)
    assert answer.headers["cache-status"].startswith("fastapi-hardening; hit")
    assert answer.headers["etag"] == f"W/{plain.headers['etag']}"
    assert client.get("/page", headers={"if-none-match": answer.headers["etag"]}).status_code == 304


def test_it_touches_nothing_but_http() -> None:
    """And nothing at all when it is switched off."""
    seen: list[Any] = []

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(send)

    async def send(_message: Message) -> None: ...

    async def receive() -> Message:
        return {"type": "http.request"}

    off = CompressionMiddleware(application, CompressionSettings())
    asyncio.run(off({"type": "http", "method": "GET", "headers": []}, receive, send))
    asyncio.run(CompressionMiddleware(application)({"type": "websocket"}, receive, send))
    assert seen == [send, send]
