"""The layer: begins a span where none is, and ends it with the answer.

Example:
    >>> from opentelemetry.sdk.trace import TracerProvider
    >>> from starlette.applications import Starlette
    >>> app = TracingMiddleware(Starlette(), TracingSettings(include_query=False), provider=TracerProvider())
"""

from typing import Any

from opentelemetry import context as otel_context
from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, SpanKind
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_hardening.core import context as request_context
from fastapi_hardening.core.context import RequestContext
from fastapi_hardening.core.redaction import Redactor
from fastapi_hardening.core.routes import route_of
from fastapi_hardening.observability.tracing.engines import Tracing, instrumented, is_instrumented, is_traced
from fastapi_hardening.observability.tracing.settings import TracingSettings
from fastapi_hardening.observability.tracing.span import FIELDS, Attributes, Recording, name_of, server_timing

_SCHEMA = "https://opentelemetry.io/schemas/1.26.0"

# Asking OpenTelemetry for its provider costs more than the rest of a layer that is silent. So it is asked by each of
# the first requests, and later by one of so many.
_LOOKS = 64


def around(app: ASGIApp, tracing: Tracing) -> ASGIApp:
    """The layer around an application; FastAPI's own telemetry needs none."""
    return app if tracing.settings.engine == "native" else TracingMiddleware(app, tracing=tracing)


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
        if scope["type"] not in ("http", "websocket") or not (self._tracer or self._found()) or is_traced():
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
            recording = Recording(span, scope, context)
            timing = self._timing

            async def send_and_note(message: Message) -> None:
                if message["type"] != "http.response.body":
                    recording.began(message)
                    if timing and message["type"] == "http.response.start":
                        message["headers"] = [*message.get("headers", ()), server_timing(span)]
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
            told = propagate.extract(scope, around, FIELDS)
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
            attributes=Attributes(scope, context, self._redactor),
            links=links,
        )
        return span, trace.set_span_in_context(span, around)
