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

from fastapi_hardening.observability.tracing.engines import Engine, Tracing
from fastapi_hardening.observability.tracing.layer import TracingMiddleware
from fastapi_hardening.observability.tracing.settings import TracingSettings
from fastapi_hardening.observability.tracing.span import record_exception

__all__ = ["Engine", "Tracing", "TracingMiddleware", "TracingSettings", "record_exception"]
