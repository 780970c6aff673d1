"""The settings of tracing."""

from typing import Literal

from fastapi_hardening.core.configuration import ConcernSettings

Engine = Literal["own", "instrumentation", "native"]


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
