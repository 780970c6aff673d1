"""Health checks and probes."""

import asyncio
import json
import logging
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from fastapi_hardening import CheckResult
from fastapi_hardening.core.check import Checks
from fastapi_hardening.core.clock import ManualClock
from fastapi_hardening.core.events import Events
from fastapi_hardening.core.lifecycle import Lifecycle
from fastapi_hardening.core.policy import allow_nobody
from fastapi_hardening.observability.health import Health, HealthChanged, HealthMiddleware, HealthSettings, Report


class Kit:
    """An engine with a clock that can be moved, and checks whose answers can be chosen."""

    def __init__(self, **changes: Any) -> None:
        self.clock = ManualClock()
        self.checks = Checks()
        self.events = Events()
        settings = HealthSettings(**{"ttl_seconds": 10.0, "failure_threshold": 1} | changes)
        self.health = Health(self.checks, settings, events=self.events, clock=self.clock)
        self.runs = 0
        self.answer: Any = None

    async def ask(self) -> Any:
        self.runs += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    async def status(self, answer: Any) -> str:
        """What one more run with this answer makes of the check."""
        self.answer = answer
        self.clock.advance(10)
        return (await self.health.report()).observations[0].status


def run(story: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(10):
            await story()

    asyncio.run(bounded())


# --- engine -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "status", "output"),
    [
        (None, "pass", None),
        (True, "pass", None),
        (False, "fail", None),
        (RuntimeError("no route"), "fail", "RuntimeError: no route"),
        (CheckResult("warn", "nearly full", observed=93, unit="percent"), "warn", "nearly full"),
    ],
)
def test_a_check_passes_fails_or_says_more(answer: Any, status: str, output: str | None) -> None:
    """Nothing and True pass, False and exceptions fail."""

    async def story() -> None:
        kit = Kit()
        kit.answer = answer
        kit.checks.add("check", kit.ask)
        report = await kit.health.report()
        [observation] = report.observations
        assert (observation.status, observation.result.output, report.status) == (status, output, status)

    run(story)


def test_a_plain_function_runs_in_a_thread_and_may_return_an_awaitable() -> None:
    """It may block without holding up the loop."""

    async def story() -> None:
        kit = Kit()
        threads: list[threading.Thread] = []
        kit.checks.add("plain", lambda: threads.append(threading.current_thread()))
        kit.checks.add("awaitable", lambda: kit.ask())  # noqa: PLW0108 - a plain function, unlike `kit.ask`
        assert (await kit.health.report()).status == "pass"
        assert threads[0] is not threading.main_thread()
        assert kit.runs == 1

    run(story)


@pytest.mark.parametrize(
    ("critical", "optional", "status"),
    [(None, None, "pass"), (None, False, "warn"), (False, None, "fail"), (False, False, "fail")],
)
def test_only_a_critical_check_makes_the_report_fail(critical: Any, optional: Any, status: str) -> None:
    """Anything else only warns."""

    async def story() -> None:
        kit = Kit()
        kit.checks.add("critical", lambda: critical)
        kit.checks.add("optional", lambda: optional, critical=False)
        assert (await kit.health.report()).status == status
        assert len((await kit.health.report(critical_only=True)).observations) == 1

    run(story)


def test_a_warning_does_not_hide_a_failure_nor_the_other_way_round() -> None:
    """The worst counts, in whatever order the checks were added."""

    async def story() -> None:
        kit = Kit()
        kit.checks.add("warns", lambda: CheckResult("warn"))
        kit.checks.add("fails", lambda: False)
        kit.checks.add("warns too", lambda: CheckResult("warn"))
        assert (await kit.health.report()).status == "fail"

    run(story)


def test_a_result_is_used_again_until_it_is_too_old() -> None:
    """Probes cost the database nothing."""

    async def story() -> None:
        kit = Kit()
        kit.checks.add("default", kit.ask)
        await kit.health.report()
        kit.clock.advance(9.9)
        await kit.health.report()
        assert kit.runs == 1
        kit.clock.advance(0.1)
        await kit.health.report()
        assert kit.runs == 2

    run(story)


def test_a_check_may_have_a_time_to_live_of_its_own() -> None:
    """Zero asks each time."""

    async def story() -> None:
        kit = Kit()
        kit.checks.add("always", kit.ask, ttl_seconds=0)
        await kit.health.report()
        await kit.health.report()
        assert kit.runs == 2

    run(story)


def test_many_probes_at_once_make_one_run() -> None:
    """And one that hangs up does not end it for the others."""

    async def story() -> None:
        kit = Kit()
        gate, started = asyncio.Event(), asyncio.Event()

        async def slow() -> None:
            kit.runs += 1
            started.set()
            await gate.wait()

        kit.checks.add("slow", slow)
        probes = [asyncio.create_task(kit.health.report()) for _ in range(50)]
        await started.wait()
        probes[0].cancel()
        gate.set()
        reports = await asyncio.gather(*probes, return_exceptions=True)
        assert isinstance(reports[0], asyncio.CancelledError)
        assert {report.status for report in reports[1:] if isinstance(report, Report)} == {"pass"}
        assert kit.runs == 1

    run(story)


def test_checks_run_side_by_side() -> None:
    """Each of two that wait for one another passes."""

    async def story() -> None:
        kit = Kit()
        first, second = asyncio.Event(), asyncio.Event()

        async def one() -> None:
            first.set()
            await second.wait()

        async def two() -> None:
            second.set()
            await first.wait()

        kit.checks.add("one", one)
        kit.checks.add("two", two)
        assert (await kit.health.report()).status == "pass"

    run(story)


def test_a_check_that_takes_too_long_fails_and_is_cancelled() -> None:
    """By its own timeout; the others are not held up by it."""

    async def story() -> None:
        kit = Kit()
        cancelled = asyncio.Event()

        async def hangs() -> None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.set()
                raise

        kit.checks.add("hangs", hangs, timeout_seconds=0.01)
        kit.checks.add("quick", kit.ask)
        hanging, quick = (await kit.health.report()).observations
        assert (hanging.status, hanging.result.output) == ("fail", "no answer within 0.01 s")
        assert quick.status == "pass"
        await cancelled.wait()

    run(story)


def test_a_check_that_cannot_be_cancelled_is_not_started_again_while_it_hangs() -> None:
    """Threads that block would pile up with every probe."""

    async def story() -> None:
        kit = Kit()
        release = threading.Event()

        def blocks() -> None:
            kit.runs += 1
            release.wait(10)

        kit.checks.add("blocks", lambda: asyncio.shield(asyncio.to_thread(blocks)), timeout_seconds=0.01, ttl_seconds=0)
        stubborn = Checks()
        stubborn.add("blocks", blocks, timeout_seconds=0.01, ttl_seconds=0)
        health = Health(stubborn, clock=kit.clock)
        for _ in range(3):
            assert (await health.report()).status == "fail"
        release.set()

    run(story)


def test_a_check_that_was_cancelled_from_elsewhere_fails() -> None:
    """Its own affair, not the probe's."""

    async def story() -> None:
        kit = Kit()

        async def gives_up() -> None:
            raise asyncio.CancelledError

        kit.checks.add("gives up", gives_up)
        [observation] = (await kit.health.report()).observations
        assert (observation.status, observation.result.output) == ("fail", "cancelled")

    run(story)


def test_the_first_run_decides_and_later_ones_only_in_a_row() -> None:
    """Hysteresis: two failures to fall, three passes to rise, and a warning in between."""

    async def story() -> None:
        kit = Kit(failure_threshold=2, success_threshold=3)
        kit.checks.add("check", kit.ask)
        said = [
            await kit.status(answer)
            for answer in (True, False, True, False, False, True, True, False, True, True, True)
        ]
        assert said == ["pass", "warn", "pass", "warn", "fail", "fail", "fail", "fail", "fail", "fail", "pass"]
        first = Kit(failure_threshold=3)
        first.checks.add("check", first.ask)
        assert await first.status(False) == "fail"

    run(story)


def test_a_change_is_told_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """A first pass is no news."""

    async def story() -> None:
        kit = Kit()
        seen: list[HealthChanged] = []
        kit.events.subscribe(HealthChanged, seen.append)
        kit.checks.add("database", kit.ask)
        for answer in (True, True, RuntimeError("gone"), RuntimeError("gone"), True):
            await kit.status(answer)
        assert seen == [
            HealthChanged("database", "pass", "fail", "RuntimeError: gone"),
            HealthChanged("database", "fail", "pass", None),
        ]

    with caplog.at_level(logging.INFO, "fastapi_hardening.health"):
        run(story)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_a_check_that_was_replaced_starts_anew() -> None:
    """Under the same name another function answers."""

    async def story() -> None:
        kit = Kit()
        kit.checks.add("database", lambda: False)
        assert (await kit.health.report()).status == "fail"
        kit.checks.remove("database")
        kit.checks.add("database", lambda: True)
        assert (await kit.health.report()).status == "pass"

    run(story)


def test_another_event_loop_runs_the_check_anew() -> None:
    """As tests and some servers have several, one after the other."""
    kit = Kit(ttl_seconds=0)
    kit.checks.add("database", kit.ask)
    for _ in range(2):
        assert asyncio.run(kit.health.report()).status == "pass"
    assert kit.runs == 2


# --- probes -----------------------------------------------------------------------------------------------------------


def app_with(**collaborators: Any) -> FastAPI:
    app = FastAPI()
    app.add_middleware(HealthMiddleware, **collaborators)
    return app


def failing() -> Checks:
    checks = Checks()
    checks.add("database", lambda: False)
    return checks


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/startupz", "/health"])
def test_a_probe_answers_get_and_head_and_is_not_stored(path: str) -> None:
    """``application/health+json``; a HEAD has the length and no body."""
    client = TestClient(app_with())
    answer, head = client.get(path), client.head(path)
    assert (answer.status_code, answer.json()["status"]) == (200, "pass")
    assert answer.headers["content-type"] == "application/health+json"
    assert answer.headers["cache-control"] == "no-store"
    assert (head.status_code, head.content, head.headers["content-length"]) == (
        200,
        b"",
        answer.headers["content-length"],
    )
    assert client.post(path).status_code == 404
    assert client.get(path + "/").status_code == 404


def test_liveness_looks_at_nothing_outside_the_process() -> None:
    """A restart does not mend a database."""
    client = TestClient(app_with(checks=failing()))
    assert client.get("/livez").status_code == 200
    assert client.get("/readyz").status_code == 503


def test_a_probe_that_fails_says_why_in_a_word_and_when_to_come_back() -> None:
    """And nothing of the check: probes are open to everybody."""
    answer = TestClient(app_with(checks=failing(), settings=HealthSettings(retry_after_seconds=3))).get("/readyz")
    assert answer.json() == {"status": "fail", "output": "a critical check fails"}
    assert 3 <= int(answer.headers["retry-after"]) <= 6


def test_a_starting_process_is_alive_and_not_ready() -> None:
    """Until its start-up work is done."""
    lifecycle = Lifecycle()
    client = TestClient(app_with(lifecycle=lifecycle))
    with lifecycle.starting("warm the cache"):
        statuses = [client.get(path).status_code for path in ("/livez", "/startupz", "/readyz", "/health")]
        assert statuses == [200, 503, 503, 200]
        assert client.get("/health").json()["output"] == "starting"
    assert client.get("/startupz").status_code == client.get("/readyz").status_code == 200


def test_a_draining_process_is_alive_and_not_ready() -> None:
    """Load balancers look at readiness."""
    lifecycle = Lifecycle()
    client = TestClient(app_with(lifecycle=lifecycle))
    lifecycle.drain()
    assert client.get("/livez").status_code == 200
    assert client.get("/readyz").json() == {"status": "fail", "output": "draining"}
    assert (client.get("/health").json()["status"], client.get("/health").json()["output"]) == ("warn", "draining")


def detailed(client: TestClient, **headers: str) -> bool:
    return "checks" in client.get("/health", headers=headers).json()


def test_the_report_shows_each_check_to_whom_it_may() -> None:
    """Status, time, duration, what was observed; who is not let in sees one word."""
    checks = Checks()
    checks.add("disk", lambda: CheckResult("warn", "nearly full", observed=93, unit="percent"), critical=False)
    app = app_with(checks=checks, settings=HealthSettings(details="always"), about={"serviceId": "shop"})
    document = TestClient(app).get("/health").json()
    [disk] = document["checks"]["disk"]
    assert document["serviceId"] == "shop"
    assert disk.pop("time").endswith("+00:00")
    assert disk.pop("duration_seconds") >= 0
    assert disk == {
        "status": "warn",
        "critical": False,
        "output": "nearly full",
        "observedValue": 93,
        "observedUnit": "percent",
    }


def test_details_are_for_private_peers_or_for_who_has_the_token() -> None:
    """By default nobody from outside."""
    for peer, sees in (("10.0.0.1", True), ("8.8.8.8", False)):
        client = TestClient(app_with(), client=(peer, 1))
        assert detailed(client) is sees
        assert not detailed(client, **{"X-Forwarded-For": "10.0.0.1"})
    token = TestClient(app_with(settings=HealthSettings(token="0123456789abcdef")), client=("10.0.0.1", 1))  # type: ignore[arg-type]
    assert not detailed(token)
    assert detailed(token, Authorization="Bearer 0123456789abcdef")
    never = TestClient(app_with(settings=HealthSettings(details="never")), client=("10.0.0.1", 1))
    assert not detailed(never)
    assert not detailed(TestClient(app_with(guard=allow_nobody), client=("10.0.0.1", 1)))


def test_a_failing_report_is_a_503_with_its_body() -> None:
    """A person reads it all the same."""
    answer = TestClient(app_with(checks=failing(), settings=HealthSettings(details="always"))).get("/health")
    assert (answer.status_code, answer.json()["checks"]["database"][0]["status"]) == (503, "fail")


def test_a_route_of_the_application_wins_over_a_probe_with_one_notice(caplog: pytest.LogCaptureFixture) -> None:
    """It was there first; a catch-all was not meant."""
    app = app_with()
    app.add_api_route("/health", lambda: "mine")
    app.add_api_route("/{rest:path}", lambda rest: "everything")
    client = TestClient(app)
    with caplog.at_level(logging.WARNING, "fastapi_hardening.health"):
        assert [client.get("/health").json() for _ in range(2)] == ["mine", "mine"]
    assert [record.getMessage().startswith("/health is a route") for record in caplog.records] == [True]
    assert client.get("/livez").json() == {"status": "pass"}


def test_a_probe_may_be_moved_or_switched_off() -> None:
    """An empty path is none."""
    client = TestClient(app_with(settings=HealthSettings(livez_path="/healthz/live", readyz_path="")))
    assert client.get("/healthz/live").status_code == 200
    assert client.get("/livez").status_code == client.get("/readyz").status_code == 404
    off = TestClient(app_with(settings=HealthSettings(enabled=False)))
    assert off.get("/health").status_code == 404


@pytest.mark.parametrize("root_path", ["/api", ""])
def test_the_path_is_relative_to_the_root_path(root_path: str) -> None:
    """Behind a prefix, whether the proxy takes it off or not."""
    client = TestClient(app_with(), root_path=root_path)
    assert client.get("/livez").status_code == 200
    assert client.get(f"{root_path}/livez").status_code == 200


def test_it_works_alone_on_starlette_and_around_anything() -> None:
    """Without an application in the scope there are no routes to win."""
    app = Starlette(routes=[Route("/", lambda request: PlainTextResponse("ok"))])
    app.add_middleware(HealthMiddleware, settings=HealthSettings())
    with TestClient(app) as client:
        assert (client.get("/livez").status_code, client.get("/").text) == (200, "ok")
    assert TestClient(HealthMiddleware(PlainTextResponse("ok"))).get("/livez").status_code == 200


def test_a_value_that_is_no_json_does_not_break_the_report() -> None:
    """What a check observed is shown as text then."""
    checks = Checks()
    checks.add("odd", lambda: CheckResult(observed=object()))  # type: ignore[arg-type]
    answer = TestClient(app_with(checks=checks, settings=HealthSettings(details="always"))).get("/health")
    assert json.loads(answer.text)["checks"]["odd"][0]["observedValue"].startswith("<object")
