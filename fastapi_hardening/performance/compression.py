"""Compresses answers with gzip, where that is safe and worth it.

It saves the client's bandwidth on text that no proxy in front compresses. It is *not* on by default: most deployments
have a proxy that does it better, and to compress a secret together with what an attacker chose tells him the secret by
the length of the answer (BREACH, Gluck, Harris and Prado, 2013). So an answer that sets a cookie is never compressed,
nor one to a request that a page of another site may have had a browser send with its own credentials: with a cookie or
HTTP Basic, unless ``Sec-Fetch-Site`` says that the page is one's own. A token that a program sends is no such thing.

It sits outside of the response cache, which keeps answers as they are, and inside of everything that refuses. Streams
are compressed part by part, so nothing waits; streams of events are left alone. What is compressed already, partial, or
``no-transform`` is not touched. ``Vary`` is set wherever the coding could have been another one, and an entity tag is
weakened, because the bytes are not the same any more (RFC 9110, sections 8.8.1 and 12.5.3).

Example:
    >>> from fastapi import FastAPI
    >>> from fastapi_hardening.performance.compression import CompressionMiddleware, CompressionSettings
    >>> app = FastAPI()
    >>> app.add_middleware(CompressionMiddleware, settings=CompressionSettings(enabled=True, min_bytes=500))
"""

import asyncio
import functools
import re
import zlib
from typing import Any

from pydantic import Field
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_hardening.core.configuration import ConcernSettings
from fastapi_hardening.core.headers import RawHeaders, get, get_all, replace
from fastapi_hardening.core.http_caching import directives, weakened

# So much is compressed before others have their turn in the event loop: one or two milliseconds.
_SLICE_BYTES = 64 * 1024
_GZIP_WINDOW = 16 + zlib.MAX_WBITS
_OWN_PAGES = frozenset({b"same-origin", b"none"})
_AMBIENT = re.compile(rb"\s*(?:basic|digest|negotiate|ntlm)\b", re.IGNORECASE)
_CODING = re.compile(r"\s*([!#$%&'*+\-.^_`|~0-9a-z]+)\s*(?:;\s*q=([01](?:\.\d{0,3})?)\s*)?(?:,|\Z)", re.IGNORECASE)
# Of the bytes as they were.
_OF_THE_BYTES = (b"content-digest", b"digest", b"content-md5")


class CompressionSettings(ConcernSettings):
    """The settings of compression."""

    enabled: bool = False
    """Whether answers are compressed."""

    min_bytes: int = Field(1_000, ge=0)
    """Smaller answers are not worth it: they go in one packet all the same."""

    level: int = Field(6, ge=1, le=9)
    """From 1, the fastest, to 9, the smallest."""

    content_types: tuple[str, ...] = (
        "text/*",
        "application/json",
        "application/*+json",
        "application/javascript",
        "application/xml",
        "application/*+xml",
        "application/x-ndjson",
        "application/wasm",
        "image/svg+xml",
    )
    """What is compressed: media types, in which ``*`` stands for anything; never ``text/event-stream``."""


@functools.lru_cache(maxsize=512)
def takes_gzip(accept_encoding: bytes) -> bool:
    """Whether a client takes gzip, and does not like the plain answer better (RFC 9110, section 12.5.3)."""
    weights: dict[str, float] = {}
    for name, weight in _CODING.findall(accept_encoding.decode("latin-1")):
        weights.setdefault(name.lower(), float(weight or 1))
    gzip = weights.get("gzip", weights.get("x-gzip", weights.get("*", 0.0)))
    return gzip > 0 and gzip >= weights.get("identity", 0.0)


def may_be_watched(headers: RawHeaders) -> bool:
    """Whether a page of another site may have had this request sent, with credentials of the browser's own."""
    if get(headers, b"sec-fetch-site") in _OWN_PAGES:
        return False
    authorization = get(headers, b"authorization")
    ambient = authorization is not None and _AMBIENT.match(authorization) is not None
    return ambient or get(headers, b"cookie") is not None


class MediaTypes:
    """The media types that are compressed.

    Args:
        patterns: Types, in which ``*`` stands for anything.
    """

    def __init__(self, patterns: tuple[str, ...]) -> None:
        texts = ["[^/]*".join(map(re.escape, pattern.lower().split("*"))) for pattern in patterns]
        self._pattern = re.compile("|".join(texts).encode("latin-1") or rb"(?!)")
        self._known: dict[bytes, bool] = {}

    def has(self, content_type: bytes | None) -> bool:
        """Whether an answer of this type is compressed."""
        if content_type is None:
            return False
        known = self._known.get(content_type)
        if known is None:
            plain = content_type.partition(b";")[0].strip().lower()
            known = plain != b"text/event-stream" and self._pattern.fullmatch(plain) is not None
            if len(self._known) < 1000:  # noqa: PLR2004 - bounded, whatever an application sends
                self._known[content_type] = known
        return known


class CompressionMiddleware:
    """Compresses what the application inside answers.

    Args:
        app: The application inside.
        settings: What is compressed, and how much.
    """

    def __init__(self, app: ASGIApp, settings: CompressionSettings | None = None) -> None:
        self.app = app
        self.settings = settings or CompressionSettings(enabled=True)
        self.types = MediaTypes(self.settings.content_types)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        if scope["type"] != "http" or not self.settings.enabled:
            await self.app(scope, receive, send)
            return
        headers: RawHeaders = scope["headers"]
        said = get_all(headers, b"accept-encoding")
        compresses = bool(said) and scope["method"] != "HEAD" and takes_gzip(b",".join(said))
        answer = _Answer(self, send, compresses=compresses and not may_be_watched(headers))
        await self.app(scope, receive, answer.send)


class _Answer:
    """An answer on its way to the client."""

    def __init__(self, layer: CompressionMiddleware, client: Send, *, compresses: bool) -> None:
        self._settings = layer.settings
        self._types = layer.types
        self._client = client
        self._compresses = compresses
        self._start: Message | None = None  # as long as it is held back
        self._gzip: Any = None

    async def send(self, message: Message) -> None:
        """Takes a message of the application."""
        kind = message["type"]
        if kind == "http.response.start" and self._is_eligible(message):
            self._start = {**message, "headers": [*message["headers"]]}
            return
        if kind == "http.response.body":
            if self._start is not None:
                message = await self._first(self._start, message)
            elif self._gzip is not None:
                message = {**message, "body": await self._compressed(message)}
        await self._flush()
        await self._client(message)

    def _is_eligible(self, message: Message) -> bool:
        """Whether an answer could be compressed, by its fields."""
        status, headers = message["status"], message.get("headers") or ()
        # Without a body, or a part of one.
        if status in (204, 206, 304) or message.get("trailers") or not self._types.has(get(headers, b"content-type")):
            return False
        names = {name for name, _ in headers}
        if b"content-encoding" in names or b"set-cookie" in names or not names.isdisjoint(_OF_THE_BYTES):
            return False
        return "no-transform" not in directives(get_all(headers, b"cache-control"))

    async def _first(self, start: Message, message: Message) -> Message:
        """Decides by the size, as far as it is known; gives the first part as it is sent."""
        body, more = message.get("body", b""), message.get("more_body", False)
        headers: RawHeaders = start["headers"]
        declared = get(headers, b"content-length")
        # A HEAD has only what it declares; a stream without a length is as long as it will be.
        known = int(declared) if declared is not None and declared.isdigit() else None
        size = known if known is not None else self._settings.min_bytes if more else len(body)
        if size < self._settings.min_bytes:
            return message
        _vary(headers)
        if not self._compresses:
            return message
        self._gzip = zlib.compressobj(self._settings.level, zlib.DEFLATED, _GZIP_WINDOW)
        compressed = await self._compressed(message)
        if not more and len(compressed) >= len(body):
            return message
        # The length is another one, and parts of it would be parts of something else.
        headers[:] = [pair for pair in headers if pair[0] not in (b"content-length", b"accept-ranges")]
        headers.append((b"content-encoding", b"gzip"))
        if not more:
            headers.append((b"content-length", b"%d" % len(compressed)))
        etag = get(headers, b"etag")
        if etag is not None:
            replace(headers, b"etag", weakened(etag))
        return {**message, "body": compressed}

    async def _compressed(self, message: Message) -> bytes:
        """A part, compressed so far that the client can read all of it."""
        body, gzip = message.get("body", b""), self._gzip
        parts = []
        for at in range(0, len(body), _SLICE_BYTES):
            if at:
                await asyncio.sleep(0)
            parts.append(gzip.compress(body[at : at + _SLICE_BYTES]))
        more = message.get("more_body", False)
        if body or not more:
            parts.append(gzip.flush(zlib.Z_SYNC_FLUSH if more else zlib.Z_FINISH))
        return b"".join(parts)

    async def _flush(self) -> None:
        start, self._start = self._start, None
        if start is not None:
            await self._client(start)


def _vary(headers: RawHeaders) -> None:
    """Says that the answer depends on ``Accept-Encoding``, unless it says so already."""
    said = b",".join(get_all(headers, b"vary")).lower().replace(b" ", b"").split(b",")
    if b"*" not in said and b"accept-encoding" not in said:
        headers.append((b"vary", b"Accept-Encoding"))
