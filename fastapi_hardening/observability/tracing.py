"""Gives every request one server span, in the trace that the caller began, by OpenTelemetry.

It protects from requests that are slow somewhere between five services, and nobody can say where. It is *not* a tracing
back end, and it makes no span of what the endpoint does: instrument your database and HTTP clients for that, and their
spans become children of this one.

It sits below the access log and the metrics, which tell the trace's id, and above everything that refuses, so that a
refusal has a span too. Probes are answered above it, and have none. It is silent until there is a tracer provider: the
application's own, or the one that is made when ``OTEL_EXPORTER_OTLP_ENDPOINT`` says where spans go.

Three engines can make the span, and of all that might only one ever does. ``own`` is this layer. ``instrumentation`` is
the package opentelemetry-instrumentation-fastapi, without its spans for each message. ``native`` is FastAPI's own
telemetry. Whatever the engine, a span that the application makes itself, by the package or by
``FastAPI(telemetry=...)`` with a provider, is the only one.

Example:
    >>> from fastapi import FastAPI
    >>> from opentelemetry.sdk.trace import TracerProvider
    >>> from fastapi_hardening.observability.tracing import TracingMiddleware
    >>> app = FastAPI()
    >>> app.add_middleware(TracingMiddleware, provider=TracerProvider())
"""

import asyncio
import logging
import os
from collections.abc import Callable, ItemsView, Iterator, Mapping
from importlib import import_module
from time import time_ns
from typing import Any, Literal

from opentelemetry import context as otel_context
from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.propagators.textmap import Getter
from opentelemetry.trace import Link, NoOpTracerProvider, ProxyTracerProvider, Span, SpanKind, StatusCode
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect

from fastapi_hardening.core import context as request_context
from fastapi_hardening.core.client_ip import NO_ADDRESS
from fastapi_hardening.core.configuration import ConcernSettings, ConfigurationError
from fastapi_hardening.core.context import RequestContext
from fastapi_hardening.core.headers import get, get_all
from fastapi_hardening.core.redaction import Redactor
from fastapi_hardening.core.routes import route_of
from fastapi_hardening.core.tally import OTHER, method_of

logger = logging.getLogger("fastapi_hardening.tracing")

Engine = Literal["own", "instrumentation", "native"]

# https://opentelemetry.io/docs/specs/semconv/http/http-spans/
_SCHEMA = "https://opentelemetry.io/schemas/1.26.0"
_SERVER_ERROR = 500
_SWITCHING_PROTOCOLS = 101
_FORBIDDEN = 403
_INTERNAL_ERROR = 1011
_FLUSH_MILLISECONDS = 5_000

# Asking OpenTelemetry for its provider costs more than the rest of a layer that is silent. So it is asked by each of
# the first requests, and later by one of so many.
_LOOKS = 64

_EXPORTERS = {
    "http/protobuf": "opentelemetry.exporter.otlp.proto.http.trace_exporter",
    "grpc": "opentelemetry.exporter.otlp.proto.grpc.trace_exporter",
}


class TracingSettings(ConcernSettings):
    """The settings of tracing. Where spans go, and which are sampled, is said by OpenTelemetry's own ``OTEL_*``."""

    engine: Engine = "own"
    """What makes the server span: this layer, opentelemetry-instrumentation-fastapi, or FastAPI's own telemetry."""

    export: bool = True
    """Whether the SDK is set up from ``OTEL_*`` where the application has not done it, and there is an endpoint."""

    trust_incoming: bool = True
    """Whether the trace of the caller is continued. Switch it off where anybody may call: a new trace then begins, with
    a link to theirs, and the sampling is yours. Only the own engine knows it."""

    include_query: bool = True
    """Whether the span has the query, credentials taken out. Only the own engine knows it."""

    redact: tuple[str, ...] = ()
    """Further names whose values are taken out of the query: whatever contains one of them."""

    record_exceptions: bool = True
    """Whether the span has the message and the traceback of an unhandled exception, and not only its type."""

    server_timing: bool = False
    """Whether answers tell the trace's id in ``Server-Timing``, for monitoring in the browser. On in development. Only
    the own engine knows it."""


# --- which of all emits -----------------------------------------------------------------------------------------------


class Tracing:
    """What makes the spans of an application, and where they go.

    Args:
        settings: The settings.
        service_name: How the service calls itself, where ``OTEL_*`` does not say it.
        provider: Makes the tracers; by default OpenTelemetry's global one, as soon as there is one.
        is_probe: Says of a scope that it is a probe, for FastAPI's own telemetry, which is outside of everything.

    Attributes:
        settings: The settings.
        given: The provider that was given.
        emitter: What makes the spans: an engine, or ``application`` where it does it itself.
    """

    def __init__(
        self,
        settings: TracingSettings | None = None,
        *,
        service_name: str | None = None,
        provider: trace.TracerProvider | None = None,
        is_probe: Callable[[Scope], bool] | None = None,
    ) -> None:
        self.settings = settings or TracingSettings()
        self.emitter: Engine | Literal["application"] = self.settings.engine
        self._service_name = service_name
        self.given = provider
        self._is_probe = is_probe
        self._made: Any = None
        self._told = False

    @property
    def provider(self) -> trace.TracerProvider | None:
        """Where spans go; ``None`` as long as nobody has said it."""
        provider = self.given or trace.get_tracer_provider()
        return None if isinstance(provider, (ProxyTracerProvider, NoOpTracerProvider)) else provider

    def settle(self, app: Any, *, mounted: bool = False) -> None:
        """Has FastAPI's own telemetry make the spans of an application, or leave it to another engine.

        One that the application has given a provider is the application's own choice, and is left as it is.

        Raises:
            ConfigurationError: It is the engine, and this FastAPI has none.
        """
        config = getattr(app, "_telemetry", None) if self.settings.enabled else {}
        if not isinstance(config, dict) or "tracing" not in config:
            if self.settings.enabled and self.settings.engine == "native" and not mounted:
                raise ConfigurationError("tracing.engine = 'native' needs FastAPI 0.142 or newer")
            return
        if not mounted and (config["tracer_provider"] is not None or config["auto_configure"]):
            self.emitter = "application" if config["tracing"] else self.emitter
        elif self.settings.engine == "native":
            config.update(tracing=True, operation_spans=False, tracer_provider=self.given)
            config["exclude"] = self._excluding(config["exclude"])
        else:
            config["tracing"] = False

    def _excluding(self, further: Callable[[Scope], bool] | None) -> Callable[[Scope], bool]:
        """What FastAPI's own telemetry makes no span of: probes, what has one already, what its user says."""
        known = [excluded for excluded in (further, self._is_probe) if excluded is not None]
        return lambda scope: any(excluded(scope) for excluded in known) or _is_traced()

    def around(self, app: ASGIApp) -> ASGIApp:
        """The layer around an application; FastAPI's own telemetry needs none."""
        return app if self.settings.engine == "native" else TracingMiddleware(app, tracing=self)

    def start(self) -> None:
        """Sets up the SDK as ``OTEL_*`` says, once, where nobody has; called when start-up is done."""
        if self._told or not (self.settings.enabled and self.settings.export) or self.provider is not None:
            return
        self._told = True
        self._made = provider_from_environment(self._service_name)
        if self._made is not None:
            trace.set_tracer_provider(self._made)

    async def stop(self) -> None:
        """Has the spans that wait sent, if the SDK was set up here; at most for five seconds."""
        if self._made is not None:
            await asyncio.to_thread(self._made.force_flush, _FLUSH_MILLISECONDS)


def provider_from_environment(service_name: str | None = None) -> Any:
    """A provider that exports to where ``OTEL_*`` says; ``None`` where it says nothing, or what is needed is missing.

    Sampler, limits, batches, headers and certificates are the SDK's to read, from the same variables.
    """
    value = os.environ.get
    endpoint = value("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or value("OTEL_EXPORTER_OTLP_ENDPOINT")
    exporter = (value("OTEL_TRACES_EXPORTER") or "otlp").strip().lower()
    if not endpoint or exporter == "none" or value("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    protocol = (
        value("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or value("OTEL_EXPORTER_OTLP_PROTOCOL") or "http/protobuf"
    ).strip()
    if exporter != "otlp" or protocol not in _EXPORTERS:
        logger.warning(
            "spans are not exported: OTEL_TRACES_EXPORTER may be otlp or none, and OTEL_EXPORTER_OTLP_PROTOCOL "
            "http/protobuf or grpc; for anything else set a tracer provider before the application starts"
        )
        return None
    try:
        sdk = import_module("opentelemetry.sdk.trace")
        export = import_module("opentelemetry.sdk.trace.export")
        resources = import_module("opentelemetry.sdk.resources")
        exporters = import_module(_EXPORTERS[protocol])
    except ImportError as error:
        package = "fastapi-hardening[otlp]" if protocol != "grpc" else "opentelemetry-exporter-otlp-proto-grpc"
        logger.warning("spans are not exported to %s: %s; pip install '%s'", endpoint, error, package)
        return None
    named = value("OTEL_SERVICE_NAME") or "service.name=" in value("OTEL_RESOURCE_ATTRIBUTES", "")
    attributes = {} if named or not service_name else {"service.name": service_name}
    provider = sdk.TracerProvider(resource=resources.Resource.create(attributes))
    provider.add_span_processor(export.BatchSpanProcessor(exporters.OTLPSpanExporter()))
    return provider


def instrumented(app: ASGIApp, provider: trace.TracerProvider | None = None) -> ASGIApp:
    """An application inside the package's middleware: stable conventions, no spans for single messages.

    Process-wide, as the package is: the conventions, and the spans of background tasks, are those of its first use.
    """
    os.environ.setdefault("OTEL_SEMCONV_STABILITY_OPT_IN", "http")
    stack: Any = _Stack(app)
    FastAPIInstrumentor.instrument_app(stack, tracer_provider=provider, exclude_spans=["receive", "send"])
    built: ASGIApp = stack.build_middleware_stack()
    return built


class _Stack:
    """What the package takes for an application: it only wraps what builds the stack."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    def build_middleware_stack(self) -> ASGIApp:
        return ServerErrorMiddleware(self._app)


def is_instrumented(app: Any) -> bool:
    """Whether the package's middleware is in a stack, found along the ``app`` of each layer."""
    while app is not None:
        if isinstance(app, OpenTelemetryMiddleware):
            return True
        app = getattr(app, "app", None)
    return False


def record_exception(exception: BaseException, *, details: bool = True) -> None:
    """Notes an exception that goes no further on the current span."""
    span = trace.get_current_span()
    if details and span.is_recording():
        span.record_exception(exception)


# --- the span ---------------------------------------------------------------------------------------------------------


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


_FIELDS = _Fields()


class _Attributes(Mapping[str, Any]):
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


class _Recording:
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


# --- layer ------------------------------------------------------------------------------------------------------------


class TracingMiddleware:
    """Makes one server span of each request and each websocket, unless something else does.

    Args:
        app: The application inside.
        settings: What is traced, and how.
        provider: Makes the tracer; by default OpenTelemetry's global one, as soon as there is one.
        tracing: Both of these and who else makes spans, from ``harden()``.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: TracingSettings | None = None,
        *,
        provider: trace.TracerProvider | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self._tracing = tracing = tracing or Tracing(settings, provider=provider)
        settings = tracing.settings
        self._untraced = self.app = app
        if is_instrumented(app):
            tracing.emitter = "application"
        elif settings.engine == "instrumentation" and tracing.emitter != "application":
            self.app = instrumented(app, tracing.given)
        self._trust = settings.trust_incoming
        self._redactor = Redactor(settings.redact) if settings.include_query else None
        self._details = settings.record_exceptions
        self._timing = settings.server_timing
        self._enabled = settings.enabled
        self._tracer: trace.Tracer | None = None
        self._propagated: frozenset[bytes] = frozenset()
        self._looks = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        if scope["type"] not in ("http", "websocket") or not (self._tracer or self._found()) or _is_traced():
            await self._untraced(scope, receive, send)
            return
        if self.app is not self._untraced:
            await self.app(scope, receive, send)
            return
        context = request_context.ensure(scope)
        context.route or route_of(scope)
        span, inside = self._begin(scope, context)
        token = otel_context.attach(inside)
        try:
            if not span.is_recording():
                await self.app(scope, receive, send)
                return
            recording = _Recording(span, scope, context)
            timing = self._timing

            async def send_and_note(message: Message) -> None:
                if message["type"] != "http.response.body":
                    recording.began(message)
                    if timing and message["type"] == "http.response.start":
                        message["headers"] = [*message.get("headers", ()), _server_timing(span)]
                await send(message)
                recording.sent(message)

            try:
                await self.app(scope, receive, send_and_note)
            except BaseException as exception:
                recording.failed(exception, details=self._details)
                raise
            finally:
                recording.end()
        finally:
            otel_context.detach(token)

    def _found(self) -> bool:
        """Looks for a tracer, if this layer is to make spans; found once, it is kept."""
        self._looks = looks = self._looks + 1
        if looks > _LOOKS and looks % _LOOKS:
            return False
        # Where no lifespan runs, this is when start-up is done.
        self._tracing.start()
        provider = self._tracing.provider
        if provider is None or not self._enabled or self._tracing.emitter == "application":
            return False
        self._propagated = frozenset(name.lower().encode("latin-1") for name in propagate.get_global_textmap().fields)
        self._tracer = provider.get_tracer("fastapi_hardening", schema_url=_SCHEMA)
        return True

    def _begin(self, scope: Scope, context: RequestContext) -> tuple[Span, Context]:
        """Begins the span; gives it, and the context in which the application runs."""
        around = otel_context.get_current()
        links: list[Link] = []
        if context.fields is None or not self._propagated.isdisjoint(context.fields):
            told = propagate.extract(scope, around, _FIELDS)
            if self._trust:
                around = told
            else:
                caller = trace.get_current_span(told).get_span_context()
                links = [Link(caller)] if caller.is_valid else []
                # Log lines would name the trace of the caller.
                context.traceparent = None
        tracer: Any = self._tracer
        span: Span = tracer.start_span(
            name_of(scope, context),
            context=around,
            kind=SpanKind.SERVER,
            attributes=_Attributes(scope, context, self._redactor),
            links=links,
        )
        return span, trace.set_span_in_context(span, around)


def _is_traced() -> bool:
    """Whether a server span of this request was begun already, or it was decided that there is none."""
    current = trace.get_current_span()
    if current is trace.INVALID_SPAN:
        return False
    kind = getattr(current, "kind", None)
    return kind is SpanKind.SERVER or (kind is None and not current.get_span_context().is_remote)


def _server_timing(span: Span) -> tuple[bytes, bytes]:
    """The trace's id as a metric without a duration, which is how scripts of a page can read it."""
    told = span.get_span_context()
    value = f'traceparent;desc="00-{told.trace_id:032x}-{told.span_id:016x}-{told.trace_flags & 0xFF:02x}"'
    return b"server-timing", value.encode("ascii")
