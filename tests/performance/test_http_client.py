"""The client for other services: what it tells them, and what it needs. Its calls are in tests/test_upstreams.py."""

import sys

import pytest
from fastapi import FastAPI
from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

from fastapi_hardening import ConfigurationError, Settings, harden
from fastapi_hardening.core.client_ip import ClientAddressResolver
from fastapi_hardening.core.context import RequestContext
from fastapi_hardening.performance.http_client import ConnectionPool, trace_headers

INCOMING = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def context(traceparent: bytes | None) -> RequestContext:
    client = ClientAddressResolver().resolve("203.0.113.9")
    return RequestContext("an-id", client, 0.0, traceparent=traceparent)


def test_a_current_span_is_the_parent() -> None:
    """And not the one that came in, of which it is a child."""
    span = NonRecordingSpan(SpanContext(0xABC, 0xDEF, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED)))
    with trace.use_span(span):
        headers = trace_headers(context(INCOMING))
        assert trace_headers(None) == {"traceparent": headers["traceparent"]}
    assert headers == {"x-request-id": "an-id", "traceparent": f"00-{0xABC:032x}-{0xDEF:016x}-01"}


@pytest.mark.parametrize(
    ("traceparent", "goes_along"),
    [
        (INCOMING, True),
        (None, False),
        (b"nonsense", False),
        (b"00-" + b"0" * 32 + b"-00f067aa0ba902b7-01", False),
        (INCOMING + b"\r\nX-Evil: 1", False),
        (INCOMING + b"\n", False),
    ],
)
def test_without_a_span_what_came_in_goes_along(traceparent: bytes | None, goes_along: bool) -> None:
    """If it is well-formed: it goes into a header field as it is."""
    headers = trace_headers(context(traceparent))
    assert ("traceparent" in headers) is goes_along
    assert trace_headers(None) == {}


def test_what_connects_is_loaded_before_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading it takes longer than some calls may."""
    monkeypatch.delitem(sys.modules, "httpcore2", raising=False)
    ConnectionPool()
    assert "httpcore2" in sys.modules


def test_without_its_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the application is made, and only if it has upstreams."""
    monkeypatch.setitem(sys.modules, "httpx2", None)
    harden(FastAPI(), Settings(_env_file=None))
    with pytest.raises(ConfigurationError, match=r"fastapi-hardening\[http\]"):
        harden(FastAPI(), Settings(_env_file=None, upstreams={"stock": {"base_urls": "http://a"}}))
