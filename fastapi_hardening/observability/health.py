"""Tells the platform whether this process lives, is ready, has started, and people what is wrong with it.

It protects from traffic to a process that cannot serve it, and from restarts that help nobody: ``/livez`` looks at
nothing outside the process, because a restart does not mend a database. It is *not* monitoring of the dependencies
themselves, and no probe is ever limited, authenticated, traced or logged.

It sits outermost: a probe is answered even when every layer further in is busy refusing. Checks run side by side, each
with a timeout of its own, once at a time however many probes ask, and their results are used again for a while.

Example:
    >>> from fastapi import FastAPI
    >>> from fastapi_hardening.core.check import Checks
    >>> from fastapi_hardening.observability.health import HealthMiddleware
    >>> checks = Checks()
    >>> @checks.add("disk", critical=False)
    ... def disk() -> bool:
    ...     return True
    >>> app = FastAPI()
    >>> app.add_middleware(HealthMiddleware, checks=checks)
"""

import asyncio
import inspect
import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import Field, SecretStr, model_validator
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from fastapi_hardening.core.check import Check, CheckResult, Checks, Status
from fastapi_hardening.core.clock import Clock, SystemClock
from fastapi_hardening.core.configuration import ConcernSettings
from fastapi_hardening.core.events import Events
from fastapi_hardening.core.headers import RawHeaders
from fastapi_hardening.core.lifecycle import Lifecycle
from fastapi_hardening.core.policy import Guard, allow_everybody, allow_nobody, allow_private_peers, require_token
from fastapi_hardening.core.problem import Problem, retry_after
from fastapi_hardening.core.routes import route_path, table_of

logger = logging.getLogger("fastapi_hardening.health")

MEDIA_TYPE = "application/health+json"


class HealthSettings(ConcernSettings):
    """The settings of health checks, probes and draining."""

    livez_path: str | None = "/livez"
    """Where liveness is answered; empty switches the probe off."""

    readyz_path: str | None = "/readyz"
    """Where readiness is answered; empty switches the probe off."""

    startupz_path: str | None = "/startupz"
    """Where it is answered whether start-up work is done; empty switches the probe off."""

    health_path: str | None = "/health"
    """Where the whole report is answered; empty switches it off."""

    details: Literal["never", "authorized", "always"] = "authorized"
    """Who sees the single checks in the report: nobody, who passes the guard, or everybody."""

    token: SecretStr | None = None
    """Lets in whoever sends ``Authorization: Bearer`` with it. Without a token, private peers whose request was not
    forwarded are let in."""

    timeout_seconds: float = Field(2.0, gt=0)
    """After this long a check has failed, if it does not say otherwise itself."""

    ttl_seconds: float = Field(2.0, ge=0)
    """For this long the result of a check is used again, if it does not say otherwise itself."""

    failure_threshold: int = Field(2, ge=1)
    """So many runs in a row must fail before a check that passed counts as failed; until then it warns."""

    success_threshold: int = Field(1, ge=1)
    """So many runs in a row must pass before a check that failed counts as passed."""

    retry_after_seconds: float = Field(5.0, gt=0)
    """What a failing probe says in ``Retry-After``; up to twice as long at random."""

    drain_delay_seconds: float = Field(5.0, ge=0)
    """How long the server goes on accepting connections after SIGTERM, for load balancers to look elsewhere."""

    drain_deadline_seconds: float = Field(30.0, ge=0)
    """After this long of draining, new requests are refused with 503."""

    @model_validator(mode="after")
    def _fit_together(self) -> "HealthSettings":
        if self.drain_deadline_seconds < self.drain_delay_seconds:
            raise ValueError(
                f"drain_deadline_seconds ({self.drain_deadline_seconds:g}) is below drain_delay_seconds "
                f"({self.drain_delay_seconds:g}): requests would be refused while load balancers still send them"
            )
        paths = [path for path in (self.livez_path, self.readyz_path, self.startupz_path, self.health_path) if path]
        for path in paths:
            if not path.startswith("/") or paths.count(path) > 1:
                raise ValueError(f"{path!r}: a probe's path starts with a slash and belongs to one probe")
        if self.token is not None:
            require_token(self.token)
        return self


@dataclass(frozen=True, slots=True)
class HealthChanged:
    """A check counts as something else than before.

    Attributes:
        check: Its name.
        before: What it counted as; ``None`` at its first run.
        after: What it counts as.
        output: What it said.
    """

    check: str
    before: Status | None
    after: Status
    output: str | None


# --- engine -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Observation:
    """What is known of a check.

    Attributes:
        check: The check.
        status: What it counts as, after the thresholds.
        result: What its last run said.
        duration_seconds: How long that run took.
        observed_at: When it ended, in seconds since the epoch.
    """

    check: Check
    status: Status
    result: CheckResult
    duration_seconds: float
    observed_at: float


@dataclass(frozen=True, slots=True)
class Report:
    """All observations and what they come to: ``fail`` by a critical check, ``warn`` if anything else is wrong."""

    status: Status
    observations: tuple[Observation, ...]


@dataclass(slots=True)
class _Record:
    """The memory of one check."""

    check: Check
    observation: Observation | None = None
    fresh_until: float = 0.0
    in_a_row: int = 0
    failing: bool = False
    run: asyncio.Task[Observation] | None = None
    work: asyncio.Future[Any] | None = None


class Health:
    """Runs checks when somebody asks, and remembers what they said.

    Args:
        checks: The checks; more may be added while it runs.
        settings: Timeouts, times to live and thresholds.
        events: Where :class:`HealthChanged` goes.
        clock: Where the time comes from; timeouts run on the event loop's.
    """

    def __init__(
        self,
        checks: Checks,
        settings: HealthSettings | None = None,
        *,
        events: Events | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._checks = checks
        self._settings = settings or HealthSettings()
        self._events = events
        self._clock = clock or SystemClock()
        self._records: dict[str, _Record] = {}

    async def report(self, *, critical_only: bool = False) -> Report:
        """Every check's observation, fresh or remembered; as slow as the slowest check that has to run."""
        checks = [check for check in self._checks if check.critical or not critical_only]
        observations = tuple(await asyncio.gather(*(self._observe(check) for check in checks)))
        status: Status = "pass"
        for observation in observations:
            if observation.status == "fail" and observation.check.critical:
                status = "fail"
            elif observation.status != "pass" and status == "pass":
                status = "warn"
        return Report(status, observations)

    async def _observe(self, check: Check) -> Observation:
        record = self._records.get(check.name)
        if record is None or record.check is not check:
            record = self._records[check.name] = _Record(check)
        if record.observation is not None and self._clock.monotonic() < record.fresh_until:
            return record.observation
        if record.run is None or record.run.done() or record.run.get_loop() is not asyncio.get_running_loop():
            record.run = asyncio.create_task(self._run(record), name=f"health check {check.name}")
        # Shielded: a probe that hangs up must not end the run that others wait for.
        return await asyncio.shield(record.run)

    async def _run(self, record: _Record) -> Observation:
        check = record.check
        started = self._clock.monotonic()
        result = await self._result(record)
        now = self._clock.monotonic()
        before = None if record.observation is None else record.observation.status
        status = self._status(record, result, before)
        record.observation = Observation(check, status, result, now - started, self._clock.time())
        record.fresh_until = now + (self._settings.ttl_seconds if check.ttl_seconds is None else check.ttl_seconds)
        if status != before and not (before is None and status == "pass"):
            level = logging.INFO if status == "pass" else logging.WARNING
            was = f"was {before}" if before else "at its first run"
            logger.log(level, "health check %s: %s, %s (%s)", check.name, status, was, result.output or "no output")
            if self._events is not None:
                self._events.emit(HealthChanged(check.name, before, status, result.output))
        return record.observation

    async def _result(self, record: _Record) -> CheckResult:
        """Runs the function once, unless its last run still hangs: a check that never ends must not pile up."""
        check = record.check
        timeout = check.timeout_seconds or self._settings.timeout_seconds
        work = record.work
        if work is None or work.done() or work.get_loop() is not asyncio.get_running_loop():
            work = record.work = asyncio.ensure_future(_call(check.function))
        done, _ = await asyncio.wait({work}, timeout=timeout)
        if not done:
            work.cancel()
            return CheckResult("fail", f"no answer within {timeout:g} s")
        if work.cancelled():
            return CheckResult("fail", "cancelled")
        error = work.exception()
        if error is not None:
            return CheckResult("fail", f"{type(error).__name__}: {error}")
        answer = work.result()
        if isinstance(answer, CheckResult):
            return answer
        return CheckResult("fail" if answer is False else "pass")

    def _status(self, record: _Record, result: CheckResult, before: Status | None) -> Status:
        """What the check counts as: the first run decides at once, later ones only when enough of them agree."""
        fails = result.status == "fail"
        if before is None:
            record.failing, record.in_a_row = fails, 0
            return result.status
        record.in_a_row = record.in_a_row + 1 if fails != record.failing else 0
        threshold = self._settings.failure_threshold if fails else self._settings.success_threshold
        if fails != record.failing and record.in_a_row >= threshold:
            record.failing, record.in_a_row = fails, 0
        if record.failing:
            return "fail"
        return "warn" if fails else result.status


async def _call(function: Callable[[], Any]) -> Any:
    answer = function() if inspect.iscoroutinefunction(function) else await asyncio.to_thread(function)
    return await answer if inspect.isawaitable(answer) else answer


# --- layer ------------------------------------------------------------------------------------------------------------

Answer = tuple[int, dict[str, Any]]


def is_probe(settings: HealthSettings) -> Callable[[Scope], bool]:
    """Says of a scope whether a probe will answer it, for what is outside of the layer."""
    paths = {settings.livez_path, settings.readyz_path, settings.startupz_path, settings.health_path}
    known = frozenset(filter(None, paths)) if settings.enabled else frozenset()
    return lambda scope: scope["type"] == "http" and route_path(scope["path"], scope.get("root_path", "")) in known


class HealthMiddleware:
    """Answers the probes by their exact path, relative to the root path, and passes on everything else.

    A route of the application with exactly that path wins, with one notice in the log; a catch-all route does not.

    Args:
        app: The application inside.
        settings: Paths, times and thresholds.
        checks: The checks that readiness and the report look at.
        health: Runs them, and remembers; by default one of this layer's own.
        lifecycle: Says whether the process starts or drains.
        guard: Decides who sees the details where they are for the authorized; by default the token of the settings,
            else private peers.
        fields: Adds the header fields that every answer has.
        about: Members of the report that say what runs here, such as ``serviceId``.
        events: Where changes of a check's status go.
        clock: Where the time comes from.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: HealthSettings | None = None,
        *,
        checks: Checks | None = None,
        health: Health | None = None,
        lifecycle: Lifecycle | None = None,
        guard: Guard | None = None,
        fields: Callable[[RawHeaders, Scope], RawHeaders] | None = None,
        about: dict[str, str] | None = None,
        events: Events | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.app = app
        self._settings = settings = settings or HealthSettings()
        self._health = health or Health(checks or Checks(), settings, events=events, clock=clock)
        self._lifecycle = lifecycle or Lifecycle()
        self._guard = guard or details_guard(settings)
        self._fields = fields
        self._about = about or {}
        self._told: set[str] = set()
        probes: dict[str | None, Callable[[Scope], Awaitable[Answer]]] = {
            settings.livez_path: self._livez,
            settings.readyz_path: self._readyz,
            settings.startupz_path: self._startupz,
            settings.health_path: self._report,
        }
        self._probes = {path: probe for path, probe in probes.items() if path and settings.enabled}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = route_path(scope["path"], scope.get("root_path", ""))
        probe = self._probes.get(path)
        if probe is None or scope["method"] not in ("GET", "HEAD") or self._belongs_to_the_application(path, scope):
            await self.app(scope, receive, send)
            return
        status, document = await probe(scope)
        body = json.dumps(document, separators=(",", ":"), default=str).encode()
        headers: RawHeaders = [
            (b"content-type", MEDIA_TYPE.encode("ascii")),
            (b"content-length", str(len(body)).encode("ascii")),
            (b"cache-control", b"no-store"),
        ]
        if status != 200:  # noqa: PLR2004
            after = retry_after(self._settings.retry_after_seconds)["Retry-After"]
            headers.append((b"retry-after", after.encode("ascii")))
        if self._lifecycle.draining and scope.get("http_version", "1.1").startswith("1"):
            headers.append((b"connection", b"close"))
        if self._fields is not None:
            headers = self._fields(headers, scope)
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    def _belongs_to_the_application(self, path: str, scope: Scope) -> bool:
        app = scope.get("app")
        if app is None or table_of(app).find(scope).template != path:
            return False
        if path not in self._told:
            self._told.add(path)
            logger.warning("%s is a route of the application, so the probe of that path is not answered", path)
        return True

    async def _livez(self, _scope: Scope) -> Answer:
        return 200, {"status": "pass"}

    async def _startupz(self, _scope: Scope) -> Answer:
        return (200, {"status": "pass"}) if self._lifecycle.started else (503, _failed("starting"))

    async def _readyz(self, _scope: Scope) -> Answer:
        if not self._lifecycle.started:
            return 503, _failed("starting")
        if self._lifecycle.draining:
            return 503, _failed("draining")
        report = await self._health.report(critical_only=True)
        return (503, _failed("a critical check fails")) if report.status == "fail" else (200, {"status": report.status})

    async def _report(self, scope: Scope) -> Answer:
        report = await self._health.report()
        status: Status = report.status
        document: dict[str, Any] = {"status": status}
        if self._lifecycle.draining or not self._lifecycle.started:
            document["output"] = "draining" if self._lifecycle.draining else "starting"
            document["status"] = "warn" if status == "pass" else status
        if await self._sees_details(scope):
            document |= self._about
            document["checks"] = {o.check.name: [_check_object(o)] for o in report.observations}
        return (503 if status == "fail" else 200), document

    async def _sees_details(self, scope: Scope) -> bool:
        try:
            await self._guard(HTTPConnection(scope))
        except Problem:
            return False
        return True


def details_guard(settings: HealthSettings) -> Guard:
    """Who sees the single checks, as the settings say."""
    if settings.details == "always":
        return allow_everybody
    if settings.details == "never":
        return allow_nobody
    return allow_private_peers if settings.token is None else require_token(settings.token)


def _failed(why: str) -> dict[str, Any]:
    return {"status": "fail", "output": why}


def _check_object(observation: Observation) -> dict[str, Any]:
    """A check object of ``application/health+json`` (draft-inadarei-api-health-check-06, section 4)."""
    result = observation.result
    members = {
        "status": observation.status,
        "time": datetime.fromtimestamp(observation.observed_at, UTC).isoformat(timespec="milliseconds"),
        "duration_seconds": round(observation.duration_seconds, 6),
        "critical": observation.check.critical,
        "output": result.output,
        "observedValue": result.observed,
        "observedUnit": result.unit,
    }
    return {name: value for name, value in members.items() if value is not None}
