"""A server span by OpenTelemetry's semantic conventions for HTTP: its parent, its name, its attributes, its end.

https://opentelemetry.io/docs/specs/semconv/http/http-spans/
"""

from collections.abc import ItemsView, Iterator, Mapping
from time import time_ns
from typing import Any

from opentelemetry import trace
from opentelemetry.propagators.textmap import Getter
from opentelemetry.trace import Span, StatusCode
from starlette.types import Message, Scope
from starlette.websockets import WebSocketDisconnect

from fastapi_hardening.core.client_ip import NO_ADDRESS
from fastapi_hardening.core.context import RequestContext
from fastapi_hardening.core.headers import get, get_all
from fastapi_hardening.core.redaction import Redactor
from fastapi_hardening.core.tally import OTHER, method_of

_SERVER_ERROR = 500
_SWITCHING_PROTOCOLS = 101
_FORBIDDEN = 403
_INTERNAL_ERROR = 1011


class _Fields(Getter[Scope]):
    """Reads header fields for propagators; ``traceparent`` twice is none (W3C Trace Context, section 3.2)."""

    def get(self, carrier: Scope, key: str) -> list[str] | None:
        values = [value.decode("latin-1") for value in get_all(carrier["headers"], key.lower().encode("latin-1"))]
        if len(values) > 1:
            # The baggage propagator reads the first value only.
            return None if key == "traceparent" else [",".join(values)]
        return values or None

    def keys(self, carrier: Scope) -> list[str]:
        return [name.decode("latin-1") for name, _ in carrier["headers"]]


FIELDS = _Fields()


class Attributes(Mapping[str, Any]):
    """What a span says of its request, found out when it is first read: of a request that is not sampled, never."""

    __slots__ = ("_known", "_of", "_redactor")

    def __init__(self, scope: Scope, context: RequestContext, redactor: Redactor | None) -> None:
        self._of = scope, context
        self._redactor = redactor
        self._known: dict[str, Any] | None = None

    def _all(self) -> dict[str, Any]:
        if self._known is None:
            self._known = attributes_of(*self._of, redactor=self._redactor)
        return self._known

    def __getitem__(self, key: str) -> Any:
        return self._all()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def items(self) -> ItemsView[str, Any]:
        """All of them at once, which is how the SDK copies them."""
        return self._all().items()

    def __len__(self) -> int:
        return len(self._all())


def attributes_of(scope: Scope, context: RequestContext, *, redactor: Redactor | None) -> dict[str, Any]:
    """The attributes of a request, by the semantic conventions for HTTP; without a redactor those of no query."""
    headers, scheme = scope["headers"], scope.get("scheme", "http")
    method = "GET" if scope["type"] == "websocket" else scope["method"]
    found: dict[str, Any] = {
        "http.request.method": method_of(method),
        "url.scheme": "https" if context.secure and scheme == "http" else scheme,
        "url.path": scope["path"],
        "network.protocol.version": scope.get("http_version"),
        "user_agent.original": _text(get(headers, b"user-agent")),
        "client.address": None if context.client is NO_ADDRESS else context.client.address,
    }
    if found["http.request.method"] == OTHER:
        found["http.request.method_original"] = method
    if redactor is not None and scope.get("query_string"):
        found["url.query"] = redactor.query(scope["query_string"].decode("latin-1"))
    found["server.address"], found["server.port"] = scope.get("server") or (None, None)
    peer = scope.get("client")
    if peer is not None:
        found["network.peer.address"], found["network.peer.port"] = peer
        if peer[0] == context.client.address:
            found["client.port"] = peer[1]
    if context.route is not None and context.route.template is not None:
        found["http.route"] = context.route.template
    return {name: value for name, value in found.items() if value is not None}


def name_of(scope: Scope, context: RequestContext) -> str:
    """The name of a span: the method and the route's template; never anything that a client made up."""
    template = None if context.route is None else context.route.template
    method = "GET" if scope["type"] == "websocket" else method_of(scope["method"])
    method = "HTTP" if method == OTHER else method
    return f"{method} {template}" if template else method


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("latin-1")


class Recording:
    """A span that is sampled, on its way to its end: the answer's last byte, or where it breaks off before."""

    __slots__ = ("_context", "_ended", "_failure", "_over", "_route", "_scope", "_span", "_status", "_trailers")

    def __init__(self, span: Span, scope: Scope, context: RequestContext) -> None:
        self._span = span
        self._scope = scope
        self._context = context
        self._route = context.route
        self._status: int | None = None
        self._failure: str | None = None
        self._ended: int | None = None
        self._trailers = self._over = False

    def began(self, message: Message) -> None:
        """Takes note of a message that begins an answer, or says how a websocket goes on."""
        kind = message["type"]
        if kind in ("http.response.start", "websocket.http.response.start"):
            self._status = message["status"]
            self._trailers = message.get("trailers", False)
        elif kind == "websocket.accept":
            self._status = _SWITCHING_PROTOCOLS
        elif kind == "websocket.close":
            if self._status is None:
                self._status = _FORBIDDEN  # what servers answer to a handshake that is closed
            elif message.get("code") == _INTERNAL_ERROR:
                self._failure = str(_INTERNAL_ERROR)

    def sent(self, message: Message) -> None:
        """Takes note of what was sent; the span ends with the answer, and not with what is done after it."""
        kind = message["type"]
        last = "http.response.trailers" if self._trailers else "http.response.body"
        more = message.get("more_trailers" if self._trailers else "more_body", False)
        if kind == "http.response.pathsend" or (kind == last and not more):
            self._ended = time_ns()
            # After a server error the exception is still on its way through here, and belongs to the span.
            if (self._status or 0) < _SERVER_ERROR:
                self.end()

    def failed(self, exception: BaseException, *, details: bool) -> None:
        """Takes note of what was raised through the application."""
        if isinstance(exception, WebSocketDisconnect):
            return
        if details and isinstance(exception, Exception):
            self._span.record_exception(exception)
        if self._status is None or self._ended is None:
            self._failure = type(exception).__qualname__

    def end(self) -> None:
        """Ends the span, once."""
        if self._over:
            return
        self._over = True
        span, status, failure, route = self._span, self._status, self._failure, self._context.route
        if route is not self._route and route is not None:
            # A middleware of the application has sent the request to another route.
            span.update_name(name_of(self._scope, self._context))
            span.set_attribute("http.route", route.template or "")
        if status is not None:
            span.set_attribute("http.response.status_code", status)
            if status >= _SERVER_ERROR:
                failure = failure or str(status)
        if failure is not None:
            span.set_attribute("error.type", failure)
            span.set_status(StatusCode.ERROR)
        span.end(self._ended)


def server_timing(span: Span) -> tuple[bytes, bytes]:
    """The trace's id as a metric without a duration, which is how scripts of a page can read it."""
    told = span.get_span_context()
    value = f'traceparent;desc="00-{told.trace_id:032x}-{told.span_id:016x}-{told.trace_flags & 0xFF:02x}"'
    return b"server-timing", value.encode("ascii")


def record_exception(exception: BaseException, *, details: bool = True) -> None:
    """Notes an exception that goes no further on the current span."""
    span = trace.get_current_span()
    if details and span.is_recording():
        span.record_exception(exception)
