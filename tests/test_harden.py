"""One call: what it installs, where, and when it refuses."""

import asyncio
import logging
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fastapi import FastAPI, Request
from starlette.applications import Starlette
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.testclient import TestClient

from fastapi_hardening import ConfigurationError, SecurityHeaders, Settings, harden
from fastapi_hardening.core.client_ip import UnknownProxySeen
from fastapi_hardening.core.clock import ManualClock
from fastapi_hardening.core.events import RequestRefused
from fastapi_hardening.core.lifecycle import ApplicationStarted
from fastapi_hardening.handle import RoutePolicies
from fastapi_hardening.harden import INBOUND
from fastapi_hardening.settings import NotBuiltYet

ORDER = (
    "probes, request context, access log, metrics, tracing, security headers, CORS, errors, drain, load shedding, "
    "request limits, address limit, security.txt, CSP reports, websocket limits, version, authentication, tenancy, "
    "rate limit, input validation, timeout, idempotency, compression, response cache"
)


def test_the_order_of_the_layers_is_this() -> None:
    """Frozen: applications rely on what is outside of what."""
    assert [slot.name for slot in INBOUND] == ORDER.split(", ")


def test_every_slot_is_switched_by_a_field_of_the_settings() -> None:
    """By its ``enabled``."""
    assert all(hasattr(getattr(Settings(), slot.setting), "enabled") for slot in INBOUND)


def layers(app: FastAPI) -> list[str]:
    """The classes around the application, outermost first, by the ``app`` that each of them keeps."""
    stack: Any = app.build_middleware_stack()
    names: list[str] = []
    while not (isinstance(stack, ServerErrorMiddleware) and names):
        names.append(type(stack).__name__)
        stack = stack.app
    return names


def test_the_layers_are_built_in_that_order_under_one_server_error_middleware() -> None:
    """Each keeps what is inside in ``app``, where instrumentation looks for it."""
    app = FastAPI()
    handle = harden(app)
    assert layers(app) == [
        "ServerErrorMiddleware",
        "_StepAside",
        "HealthMiddleware",
        "RequestContextMiddleware",
        "AccessLogMiddleware",
        "MetricsMiddleware",
        "TracingMiddleware",
        "SecurityHeadersMiddleware",
        "CorsMiddleware",
        "ErrorsMiddleware",
        "DrainMiddleware",
        "LoadSheddingMiddleware",
        "RequestLimitsMiddleware",
        "AddressLimitMiddleware",
        "WebSocketLimitsMiddleware",
        "AuthenticationMiddleware",
        "RateLimitMiddleware",
        "InputValidationMiddleware",
        "TimeoutMiddleware",
        "IdempotencyMiddleware",
        "ResponseCacheMiddleware",
    ]
    on = [layer.name for layer in handle.pipeline if layer.state == "on"]
    assert on == [
        "probes",
        "request context",
        "access log",
        "metrics",
        "tracing",
        "security headers",
        "CORS",
        "errors",
        "drain",
        "load shedding",
        "request limits",
        "address limit",
        "websocket limits",
        "authentication",
        "rate limit",
        "input validation",
        "timeout",
        "idempotency",
        "response cache",
    ]


def test_what_is_switched_off_is_not_there() -> None:
    """Not a layer that does nothing; but the context, which others need, only loses its field."""
    app = FastAPI()
    off: Any = {"enabled": False}
    handle = harden(app, Settings(**{slot.setting: off for slot in INBOUND}))
    assert layers(app) == ["ServerErrorMiddleware", "_StepAside", "RequestContextMiddleware"]
    assert {layer.state for layer in handle.pipeline} == {"off"}
    answer = TestClient(app).get("/nope")
    assert "x-request-id" not in answer.headers
    assert answer.json() == {"detail": "Not Found"}
    assert TestClient(app).get("/livez").status_code == 404


def test_the_handle_is_left_on_the_application() -> None:
    """Wherever a request is, its handle is at hand."""
    app = FastAPI(title="Shop")
    handle = harden(app, clock=ManualClock())
    assert app.state.hardening is handle
    assert handle.service_name == "Shop"
    assert [check.name for check in handle.checks] == ["client_address"]


def test_it_refuses_what_it_cannot_harden() -> None:
    """Each with the sentence that says what to do."""
    with pytest.raises(ConfigurationError, match="on Starlette add the middlewares singly"):
        harden(Starlette())  # type: ignore[arg-type]
    app = FastAPI()
    harden(app)
    with pytest.raises(ConfigurationError, match="its handle is"):
        harden(app)
    with pytest.raises(ConfigurationError, match="takes Settings"):
        harden(FastAPI(), {"environment": "development"})  # type: ignore[arg-type]
    served = FastAPI()
    TestClient(served).get("/")
    with pytest.raises(ConfigurationError, match="call it where it is made"):
        harden(served)


def test_without_settings_they_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a deployment needs no code."""
    monkeypatch.setenv("HARDENING_SERVICE_NAME", "till")
    assert harden(FastAPI()).service_name == "till"


def test_a_key_that_has_no_effect_yet_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its name is accepted from the first day, but nobody should rely on it."""

    class Planned(NotBuiltYet):
        """A concern whose keys are known before it is built."""

        speed: int = 1

    class Later(Settings):
        """Settings with such a concern."""

        planned: Planned = Planned()

    monkeypatch.setenv("HARDENING_PLANNED__SPEED", "2")
    with caplog.at_level(logging.WARNING):
        harden(FastAPI(), Later())
    assert "planned.speed is set" in caplog.text


def test_without_health_nothing_waits_for_sigterm() -> None:
    """The drain layer is off with it, so clients would not be told."""
    before = signal.getsignal(signal.SIGTERM)

    async def lifespan(enabled: bool) -> bool:
        app = FastAPI()
        harden(app, Settings(health={"enabled": enabled}))
        async with app.router.lifespan_context(app):
            return signal.getsignal(signal.SIGTERM) is not before

    assert [asyncio.run(lifespan(enabled)) for enabled in (True, False)] == [True, False]


def test_routes_are_listed_with_what_holds_on_each() -> None:
    """Mounts looked into, templates whole."""
    app = FastAPI(openapi_url=None)
    handle = harden(app)
    child = FastAPI(openapi_url=None)
    override = SecurityHeaders(cache_control="no-store")

    @child.post("/orders", dependencies=[override])
    async def orders() -> None:
        return

    app.mount("/shop", child)
    assert handle.routes() == (RoutePolicies("/shop/orders", ("POST",), "http", {"SecurityHeaders": (override,)}),)


def test_the_applications_lifespan_runs_inside_ours_and_keeps_its_state() -> None:
    """Ready only when it has started; the state reaches the requests."""
    seen: list[bool] = []

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, str]]:
        seen.append(app.state.hardening.lifecycle.started)
        yield {"greeting": "hello"}

    app = FastAPI(lifespan=lifespan)
    handle = harden(app)

    @app.get("/")
    async def index(request: Request) -> str:
        greeting: str = request.state.greeting
        return greeting

    with TestClient(app) as client:
        assert client.get("/").json() == "hello"
        assert client.get("/startupz").status_code == 200
    assert seen == [False]
    assert handle.events.count(ApplicationStarted) == 1


def test_a_start_up_that_fails_leaves_the_process_not_started() -> None:
    """And the server hears of it as without us."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if app.title:
            raise RuntimeError("no database")
        yield

    app = FastAPI(lifespan=lifespan)
    handle = harden(app)
    with pytest.raises(RuntimeError, match="no database"), TestClient(app):
        raise AssertionError("started")
    assert handle.lifecycle.pending == ("lifespan",)


def test_without_a_lifespan_everything_starts_by_itself() -> None:
    """As under a test client that does not run one."""
    app = FastAPI()
    harden(app)
    assert TestClient(app).get("/readyz").status_code == 200


def test_an_unknown_proxy_is_told_of_in_the_health_report() -> None:
    """Nobody reads a warning twice, but a dashboard shows it."""
    app = FastAPI()
    handle = harden(app, Settings(health={"details": "always", "ttl_seconds": 0}))
    client = TestClient(app, client=("10.0.0.1", 1))
    assert client.get("/health").json()["status"] == "pass"
    client.get("/", headers={"X-Forwarded-For": "203.0.113.9"})
    document = client.get("/health").json()
    assert document["status"] == "warn"
    assert "trusted_proxies" in document["checks"]["client_address"][0]["output"]
    assert handle.events.count(UnknownProxySeen) == 1


def test_a_probe_carries_what_every_answer_carries() -> None:
    """Though it is answered above the layers that would add it."""
    app = FastAPI()
    harden(app)
    headers = TestClient(app, base_url="https://test").get("/livez", headers={"X-Request-ID": "mine"}).headers
    behind = FastAPI()
    harden(behind, Settings(trusted_proxies=["10.0.0.1"])).lifecycle.drain()
    proxied = TestClient(behind, client=("10.0.0.1", 1)).get("/livez", headers={"X-Forwarded-Proto": "https"}).headers
    assert "strict-transport-security" in proxied
    assert proxied["connection"] == "close"
    assert headers["x-request-id"] == "mine"
    assert headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
    assert "strict-transport-security" in headers


def test_what_is_mounted_later_answers_errors_like_the_rest() -> None:
    """The table tells of new applications when it is built again."""
    app = FastAPI()
    harden(app)
    client = TestClient(app)
    assert client.get("/late/nope").json()["status"] == 404
    app.mount("/late", FastAPI())
    answer = client.get("/late/nope")
    assert answer.headers["content-type"] == "application/problem+json"


def test_past_the_drain_deadline_requests_are_refused_with_all_that_answers_carry() -> None:
    """The refusal of a layer passes through every layer outside of it, and is counted."""
    app = FastAPI()
    clock = ManualClock()
    handle = harden(app, clock=clock)
    client = TestClient(app)
    handle.lifecycle.drain()
    clock.advance(30)
    answer = client.get("/")
    assert answer.status_code == 503
    assert answer.headers["x-request-id"] == answer.json()["request_id"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert handle.events.count(RequestRefused) == 1
    assert client.get("/livez").status_code == 200


def test_a_second_hardening_inside_steps_aside() -> None:
    """One id, each field once, and the outer one's settings."""
    inner, outer = FastAPI(), FastAPI()
    harden(inner, Settings(security_headers={"referrer_policy": "no-referrer"}))
    inner.get("/")(lambda: "ok")
    harden(outer)
    outer.mount("/inner", inner)
    headers = TestClient(outer).get("/inner/").headers
    assert headers.get_list("referrer-policy") == ["strict-origin-when-cross-origin"]
    assert len(headers.get_list("x-request-id")) == 1
    assert TestClient(inner).get("/").headers["referrer-policy"] == "no-referrer"
