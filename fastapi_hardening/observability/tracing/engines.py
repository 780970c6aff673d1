"""Which of all that could make the spans of an application does, and where they go. Exactly one ever does."""

import asyncio
import os
from collections.abc import Callable
from typing import Any, Literal

from opentelemetry import trace
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.trace import NoOpTracerProvider, ProxyTracerProvider, SpanKind
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.types import ASGIApp, Scope

from fastapi_hardening.core.configuration import ConfigurationError
from fastapi_hardening.observability.tracing.export import provider_from_environment
from fastapi_hardening.observability.tracing.settings import Engine, TracingSettings

__all__ = ["Engine", "Tracing", "instrumented", "is_instrumented", "is_traced"]

_FLUSH_MILLISECONDS = 5_000


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
        return lambda scope: any(excluded(scope) for excluded in known) or is_traced()

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


def is_traced() -> bool:
    """Whether a server span of this request was begun already, or it was decided that there is none."""
    current = trace.get_current_span()
    if current is trace.INVALID_SPAN:
        return False
    kind = getattr(current, "kind", None)
    return kind is SpanKind.SERVER or (kind is None and not current.get_span_context().is_remote)
