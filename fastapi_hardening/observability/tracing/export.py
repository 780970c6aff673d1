"""Where spans go: OpenTelemetry's SDK, set up as its own variables say."""

import logging
import os
from importlib import import_module
from typing import Any

logger = logging.getLogger("fastapi_hardening.tracing")

_EXPORTERS = {
    "http/protobuf": "opentelemetry.exporter.otlp.proto.http.trace_exporter",
    "grpc": "opentelemetry.exporter.otlp.proto.grpc.trace_exporter",
}


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
