"""One look at an application says how it is."""

import asyncio

from fastapi import FastAPI
from fastapi.testclient import TestClient
from opentelemetry.sdk.trace import TracerProvider

from fastapi_hardening import CheckResult, Settings, harden
from fastapi_hardening.core.clock import ManualClock
from fastapi_hardening.observability.alerts import AlertRule, Level


def test_one_look_says_how_an_application_is() -> None:
    """Its life, its checks, its requests, its traces and its alerts."""
    app, clock = FastAPI(title="Shop", openapi_url=None), ManualClock()
    failing = AlertRule(
        name="CheckFails", summary="", severity="page", when=Level(of="hardening_health_check_status", above=0)
    )
    handle = harden(
        app,
        Settings(rate_limit={"default": "2/hour"}, alerts={"rules": [failing]}),
        tracer_provider=TracerProvider(shutdown_on_exit=False),
        clock=clock,
    )
    handle.checks.add("database", lambda: CheckResult("warn"), critical=False)
    client = TestClient(app)
    for _ in range(3):
        client.get("/nothing")
    asyncio.run(handle.observability.overview())
    handle.alerts.evaluate()
    seen = asyncio.run(handle.observability.overview())
    assert (seen.service, seen.state, seen.status, seen.in_progress) == ("Shop", "serving", "warn", 0)
    assert seen.checks == {"client_address": "pass", "database": "warn"}
    assert seen.requests == {"4xx": 3}
    assert seen.refusals == {"rate limit": 1}
    assert seen.tracing == "own"
    assert seen.alerts == {"CheckFails": "page"}


def test_the_state_is_where_the_process_is_in_its_life() -> None:
    """It starts, serves and drains; without a provider nothing makes spans."""
    handle = harden(FastAPI(), clock=ManualClock())

    async def look() -> tuple[str, str | None]:
        seen = await handle.observability.overview()
        return seen.state, seen.tracing

    with handle.lifecycle.starting("a cache"):
        assert asyncio.run(look()) == ("starting", None)
    handle.lifecycle.draining = True
    assert asyncio.run(look()) == ("draining", None)


def test_spans_of_the_application_are_told_as_such() -> None:
    """Whoever looks for them looks there."""
    app = FastAPI(telemetry={"tracer_provider": TracerProvider(shutdown_on_exit=False)})
    handle = harden(app)
    assert asyncio.run(handle.observability.overview()).tracing == "application"
