"""The client for calls to other services: pooled connections, bounded waits, one id through all services.

It protects from what a client does by default: a new connection for each call, a pool that one slow service empties, a
call that waits for ever in the queue of the pool, a cookie of one user that is sent for the next, a redirect or an
absolute URL that leads to somewhere inside the own network. It is *not* another client to learn:
``handle.upstream("payments")`` is an ``httpx2.AsyncClient`` (the extra ``http``), whose requests go through the layers
around the upstream.

Outbound it is both ends: the client that is called, and innermost the connections, a pool for each endpoint. The id of
the request that is being served goes along in ``X-Request-ID``, and its trace in ``traceparent``. The body of an answer
is read within the attempt, so that a connection that breaks half-way is an attempt that failed; answers that are
streamed are read by the caller.

Example:
    >>> pool = ConnectionPool(ConnectionSettings(max_connections=10))
    >>> client = client_of("stock", pool.send, pool.aclose)
    >>> client.base_url
    URL('http://stock')
"""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import cache
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import TYPE_CHECKING, Any

from opentelemetry import propagate, trace
from opentelemetry.trace import SpanKind, StatusCode, TracerProvider
from pydantic import Field

from fastapi_hardening.core import context as request_context
from fastapi_hardening.core.configuration import ConfigurationError, Section
from fastapi_hardening.core.outbound import Outgoing, Send, is_repeatable

if TYPE_CHECKING:
    import httpx2

Provider = Callable[[], TracerProvider | None]

_WHOLE = "fastapi_hardening.whole"
_TRACEPARENT = re.compile(rb"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_HEDGED = frozenset(("GET", "HEAD"))


class ConnectionSettings(Section):
    """The settings of the connections to one endpoint."""

    max_connections: int = Field(100, ge=1)
    """How many connections to one endpoint there may be."""

    keepalive_seconds: float = Field(4.0, ge=0)
    """For how long an idle connection is kept. Shorter than the server keeps it (uvicorn: 5), or a request meets a
    connection that is being closed."""

    connect_seconds: float = Field(2.0, gt=0)
    """How long it may take to connect; in vain, the request was not sent, so any method is tried elsewhere."""


class ConnectionPool:
    """The connections to the endpoints of one upstream: a pool for each, so that a slow one takes none from the others.

    Args:
        settings: How many, and for how long.

    Raises:
        ConfigurationError: httpx2 is not installed.
    """

    def __init__(self, settings: ConnectionSettings | None = None) -> None:
        self._settings = settings or ConnectionSettings()
        self._httpx2 = _client_library()
        # httpx2 loads what it connects with when it is first used: tenths of a second, and the first call would wait.
        self._httpx2.AsyncHTTPTransport(verify=False, trust_env=False)
        self._urls: dict[str, httpx2.URL] = {}
        self._transports: dict[str, httpx2.AsyncHTTPTransport] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tls: Any = None

    @property
    def unsent(self) -> tuple[type[Exception], ...]:
        """The exceptions that say that nothing of the request has left."""
        return self._httpx2.ConnectError, self._httpx2.ConnectTimeout, self._httpx2.PoolTimeout

    async def send(self, outgoing: Outgoing) -> Any:
        """Sends a request to the endpoint that was picked for it; the innermost layer."""
        original: httpx2.Request = outgoing.request
        endpoint = self._urls.get(outgoing.endpoint)
        if endpoint is None:
            endpoint = self._urls[outgoing.endpoint] = self._httpx2.URL(outgoing.endpoint)
        url = endpoint.copy_with(raw_path=endpoint.raw_path.rstrip(b"/") + original.url.raw_path)
        headers = original.headers.copy()
        if headers.get("host") == original.url.netloc.decode("ascii"):
            headers["host"] = url.netloc.decode("ascii")
        timeout = original.extensions.get("timeout", {})
        connect = timeout.get("connect") or self._settings.connect_seconds
        request = self._httpx2.Request(
            original.method,
            url,
            headers=headers,
            stream=original.stream,
            extensions={**original.extensions, "timeout": {**timeout, "connect": connect}},
        )
        answer = await (await self._transport(outgoing.endpoint)).handle_async_request(request)
        if not outgoing.whole:
            return answer
        stream: httpx2.AsyncByteStream = answer.stream  # type: ignore[assignment]
        try:
            # As it came, still encoded: decoding it is the client's.
            body = b"".join([chunk async for chunk in stream])
        finally:
            await stream.aclose()
        answer.stream = self._httpx2.ByteStream(body)
        return answer

    async def _transport(self, endpoint: str) -> "httpx2.AsyncHTTPTransport":
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            # Connections belong to an event loop; those of one that has ended are of no use, and cannot be closed.
            self._loop = loop
            self._transports = {}
        transport = self._transports.get(endpoint)
        if transport is None:
            if endpoint.startswith("https:") and self._tls is None:
                # Reading the certificates of the system takes tens of milliseconds.
                self._tls = await asyncio.to_thread(self._httpx2.create_ssl_context)
            limits = self._httpx2.Limits(
                max_connections=self._settings.max_connections,
                max_keepalive_connections=self._settings.max_connections,
                keepalive_expiry=self._settings.keepalive_seconds,
            )
            # A second task may have come here meanwhile.
            transport = self._transports.setdefault(
                endpoint, self._httpx2.AsyncHTTPTransport(verify=self._tls or False, trust_env=False, limits=limits)
            )
        return transport

    async def aclose(self) -> None:
        """Closes every connection; the next request opens new ones."""
        transports, self._transports = self._transports, {}
        if self._loop is asyncio.get_running_loop():
            for transport in transports.values():
                await transport.aclose()


def client_of(
    name: str, send: Send, aclose: Callable[[], Awaitable[None]], *, provider: Provider = lambda: None
) -> "httpx2.AsyncClient":
    """A client whose requests go through the layers around an upstream.

    Args:
        name: The upstream; the host in the URLs of the client, such as ``http://payments/accounts/7``.
        send: The outermost layer.
        aclose: Closes the connections.
        provider: Gives what makes the spans of calls, one for each with all its attempts; ``None`` for none.

    Raises:
        ConfigurationError: httpx2 is not installed.
    """
    # A cookie that the service sets for one of its users must not go with the calls for the next.
    no_cookies = CookieJar(DefaultCookiePolicy(allowed_domains=()))
    # No proxies or credentials of the environment, and no timeouts but those of the layers.
    client: httpx2.AsyncClient = _client_class()(
        transport=_transport_class()(name, send, aclose, provider),
        base_url=f"http://{name}",
        cookies=no_cookies,
        trust_env=False,
        timeout=None,
    )
    return client


def trace_headers(context: request_context.RequestContext | None) -> dict[str, str]:
    """What tells another service which request it works for: its id, and its trace (W3C Trace Context).

    The trace is that of the current span, as OpenTelemetry's propagators write it; without a span, what came in is
    passed on as it is.
    """
    headers: dict[str, str] = {}
    if context is not None:
        headers["x-request-id"] = context.request_id
    if trace.get_current_span().get_span_context().is_valid:
        propagate.inject(headers)
    elif context is not None and context.traceparent is not None and _TRACEPARENT.fullmatch(context.traceparent):
        headers["traceparent"] = context.traceparent.decode("ascii")
    return headers


def _client_library() -> Any:
    try:
        import httpx2  # noqa: PLC0415 - an extra
    except ModuleNotFoundError:
        raise ConfigurationError("upstreams are called with httpx2: pip install 'fastapi-hardening[http]'") from None
    return httpx2


@cache
def _client_class() -> Any:
    """The classes that derive from httpx2's are made when they are needed."""
    httpx2 = _client_library()

    class UpstreamClient(httpx2.AsyncClient):  # type: ignore[misc, name-defined]
        """Tells the layers whether the answer is read at once."""

        async def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:
            request.extensions[_WHOLE] = not stream
            return await super().send(request, stream=stream, **options)

    return UpstreamClient


@cache
def _transport_class() -> Any:
    httpx2 = _client_library()

    class UpstreamTransport(httpx2.AsyncBaseTransport):  # type: ignore[misc, name-defined]
        """Hands requests to the layers."""

        def __init__(self, name: str, send: Send, aclose: Callable[[], Awaitable[None]], provider: Provider) -> None:
            self._name = name
            self._send = send
            self._close = aclose
            self._provider = provider

        async def handle_async_request(self, request: Any) -> Any:
            if request.url.host != self._name or request.url.scheme != "http":
                raise httpx2.UnsupportedProtocol(
                    f"this client calls {self._name!r} only, by paths such as '/x', and not {request.url.host!r}"
                )
            provider = self._provider()
            if provider is None:
                return await self._exchange(request)
            attributes = {
                "http.request.method": request.method,
                "server.address": self._name,
                # Without the query, which may be anything.
                "url.full": f"http://{self._name}{request.url.path}",
            }
            tracer = provider.get_tracer("fastapi_hardening")
            with tracer.start_as_current_span(request.method, kind=SpanKind.CLIENT, attributes=attributes) as span:
                answer = await self._exchange(request)
                span.set_attribute("http.response.status_code", answer.status_code)
                if answer.status_code >= 400:  # noqa: PLR2004 - for a client, errors of both classes
                    span.set_status(StatusCode.ERROR)
                return answer

        async def _exchange(self, request: Any) -> Any:
            for header, value in trace_headers(request_context.current()).items():
                request.headers.setdefault(header, value)
            # What is sent from a generator is gone once it was sent.
            is_kept = isinstance(request.stream, httpx2.ByteStream)
            repeatable = is_kept and is_repeatable(request.method, request.headers)
            outgoing = Outgoing(
                request,
                repeatable=repeatable,
                hedged=repeatable and request.method in _HEDGED,
                whole=request.extensions.get(_WHOLE, False),
            )
            answer = await self._send(outgoing)
            if not outgoing.whole:
                answer.stream = _stream_class()(answer.stream, outgoing.when_closed)
            return answer

        async def aclose(self) -> None:
            await self._close()

    return UpstreamTransport


@cache
def _stream_class() -> Any:
    httpx2 = _client_library()

    class WatchedStream(httpx2.AsyncByteStream):  # type: ignore[misc, name-defined]
        """A body that says when it is closed."""

        def __init__(self, stream: Any, when_closed: list[Callable[[], None]]) -> None:
            self._stream = stream
            self._when_closed = when_closed

        async def __aiter__(self) -> AsyncIterator[bytes]:
            async for chunk in self._stream:
                yield chunk

        async def aclose(self) -> None:
            calls, self._when_closed = self._when_closed, []
            try:
                await self._stream.aclose()
            finally:
                for call in calls:
                    call()

    return WatchedStream
