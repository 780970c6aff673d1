"""What can be seen of an application in one look: its life, its health, its requests, its traces and its alerts.

Each of them has a place of its own, where there is more: ``handle.health``, ``handle.metrics``, ``handle.tracing``,
``handle.alerts``. This is what a dashboard or a support page shows first. It is *not* for probes: it says things that
are nobody's business outside.
"""

from dataclasses import dataclass
from typing import Any

from fastapi_hardening.core.lifecycle import Lifecycle
from fastapi_hardening.observability.alerts import Alerts
from fastapi_hardening.observability.alerts.selectors import read
from fastapi_hardening.observability.health import Health
from fastapi_hardening.observability.metrics import Recorder
from fastapi_hardening.observability.tracing import Tracing
from fastapi_hardening.performance.monitor import Monitor, MonitorSnapshot

_REQUESTS, _IN_PROGRESS, _REFUSALS = "http_requests_total", "http_requests_inprogress", "hardening_refusals_total"


@dataclass(frozen=True, slots=True)
class Overview:
    """One look.

    Attributes:
        service: How the service calls itself.
        state: ``starting``, ``serving`` or ``draining``.
        status: ``pass``, ``warn`` or ``fail``: the worst that a check says.
        checks: What each check says, by its name.
        requests: How many were answered since the start, by status.
        in_progress: How many are being answered.
        refusals: How many were refused, by layer.
        tracing: What makes the spans; ``None`` while nothing does.
        alerts: What fires, and how severe it is.
        monitor: Where the time goes; ``None`` where it is switched off.
    """

    service: str
    state: str
    status: str
    checks: dict[str, str]
    requests: dict[str, int]
    in_progress: int
    refusals: dict[str, int]
    tracing: str | None
    alerts: dict[str, str]
    monitor: MonitorSnapshot | None = None


class Observability:
    """Looks at all of it; reachable as ``handle.observability``.

    Args:
        service: How the service calls itself.
        lifecycle: Whether the process starts, serves or drains.
        health: Runs the checks, and remembers what they said.
        metrics: What is recorded.
        tracing: What makes spans.
        alerts: What is watched.
        monitor: What knows where the time goes.
    """

    def __init__(
        self,
        service: str,
        *,
        lifecycle: Lifecycle,
        health: Health,
        metrics: Recorder,
        tracing: Tracing,
        alerts: Alerts,
        monitor: Monitor,
    ) -> None:
        self._service = service
        self._lifecycle = lifecycle
        self._health = health
        self._metrics = metrics
        self._tracing = tracing
        self._alerts = alerts
        self._monitor = monitor

    async def overview(self) -> Overview:
        """One look, now. Checks whose result is no longer fresh run for it."""
        report = await self._health.report()
        samples: dict[str, Any] = read(self._metrics.collector(), (_REQUESTS, _IN_PROGRESS, _REFUSALS))
        traces = self._tracing.settings.enabled and self._tracing.provider is not None
        serving = "draining" if self._lifecycle.draining else "serving"
        return Overview(
            service=self._service,
            state=serving if self._lifecycle.started else "starting",
            status=report.status,
            checks={each.check.name: each.status for each in report.observations},
            requests=_by(samples.get(_REQUESTS, ()), "status"),
            in_progress=int(sum(value for _, value in samples.get(_IN_PROGRESS, ()))),
            refusals=_by(samples.get(_REFUSALS, ()), "layer"),
            tracing=self._tracing.emitter if traces or self._tracing.emitter == "application" else None,
            alerts={alert.rule.name: alert.rule.severity for alert in self._alerts.active},
            monitor=self._monitor.snapshot() if self._monitor.settings.enabled else None,
        )


def _by(samples: Any, label: str) -> dict[str, int]:
    """The sums of samples by one of their labels."""
    found: dict[str, int] = {}
    for labels, value in samples:
        found[labels[label]] = found.get(labels[label], 0) + int(value)
    return found
