"""Tells somebody when the service is not well: rules over its own metrics, without anything beside it.

It protects from outages that users report first, and from pages at night that nobody needed: a condition must hold for
a while, what flickers is told once, and again only after hours. It is *not* a monitoring system. A process that is dead
tells nothing, and each worker sees itself only. Where there is a Prometheus, let it watch: ``fastapi-hardening alerts``
prints the same rules for it.

It is no layer, and no request waits for it. One task looks at the recorder's series every few seconds while the
lifespan runs; another one for each sink delivers.

Example:
    >>> from prometheus_client import CollectorRegistry, Counter
    >>> from fastapi_hardening.core.clock import ManualClock
    >>> registry, clock = CollectorRegistry(), ManualClock()
    >>> booms = Counter("booms", "It went boom.", registry=registry)
    >>> rule = AlertRule(name="Boom", summary="It went boom.", when=Count(of="booms_total"))
    >>> alerts = Alerts(AlertsSettings(rules=[rule]), source=lambda: registry, clock=clock)
    >>> alerts.evaluate()
    []
    >>> booms.inc()
    >>> clock.advance(15)
    >>> [(told.rule.name, told.status) for told in alerts.evaluate()]
    [('Boom', 'firing')]
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from prometheus_client.registry import Collector
from pydantic import Field, field_validator, model_validator

from fastapi_hardening.core.clock import Clock, SystemClock
from fastapi_hardening.core.configuration import ConcernSettings, did_you_mean
from fastapi_hardening.core.events import Events
from fastapi_hardening.observability.alerts.conditions import BurnRate, Count, Level, Quantile, Ratio
from fastapi_hardening.observability.alerts.engine import Alert, Engine, Notification
from fastapi_hardening.observability.alerts.rules import DEFAULT_RULES, AlertRule, prometheus_rules
from fastapi_hardening.observability.alerts.selectors import read
from fastapi_hardening.observability.alerts.sinks import AlertUndelivered, Outbox, Sink, Webhook, WebhookSettings, log

__all__ = [
    "DEFAULT_RULES",
    "Alert",
    "AlertFired",
    "AlertResolved",
    "AlertRule",
    "AlertUndelivered",
    "Alerts",
    "AlertsSettings",
    "BurnRate",
    "Count",
    "Level",
    "Notification",
    "Quantile",
    "Ratio",
    "Sink",
    "WebhookSettings",
    "prometheus_rules",
]

logger = logging.getLogger("fastapi_hardening.alerts")

_LAST_DELIVERIES_SECONDS = 5.0
_CHECKS = "hardening_health_check_status"


class AlertsSettings(ConcernSettings):
    """The settings of alerts."""

    interval_seconds: float = Field(15.0, gt=0)
    """How often the rules are looked at."""

    repeat_seconds: float = Field(14_400.0, gt=0)
    """How long until an alert that still fires is told again."""

    rules: tuple[AlertRule, ...] = DEFAULT_RULES
    """What is watched. To keep the defaults: ``rules=(*DEFAULT_RULES, AlertRule(...))``."""

    silenced: tuple[str, ...] = ()
    """Names of rules that are watched, and never told of."""

    log: bool = True
    """Whether alerts go to the log."""

    webhooks: tuple[WebhookSettings, ...] = ()
    """Addresses that alerts are posted to."""

    @field_validator("rules")
    @classmethod
    def _have_names_of_their_own(cls, rules: tuple[AlertRule, ...]) -> tuple[AlertRule, ...]:
        names = [rule.name for rule in rules]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two rules are called {name!r}; give each a name of its own")
        return rules

    @model_validator(mode="after")
    def _silence_what_is_there(self) -> "AlertsSettings":
        names = [rule.name for rule in self.rules]
        for name in self.silenced:
            if name not in names:
                raise ValueError(f"silenced: there is no rule {name!r}{did_you_mean(name, names)}")
        return self


@dataclass(frozen=True, slots=True)
class AlertFired:
    """An alert began; it is told once, and of a silenced one nothing.

    Attributes:
        alert: The name of its rule.
        severity: ``page``, ``ticket`` or ``info``.
        value: What was compared with the limit.
    """

    alert: str
    severity: str
    value: float


@dataclass(frozen=True, slots=True)
class AlertResolved:
    """An alert is over.

    Attributes:
        alert: The name of its rule.
        seconds: How long it fired.
    """

    alert: str
    seconds: float


class Alerts:
    """The alerts of one application; reachable as ``handle.alerts``.

    Args:
        settings: The rules, and who is told.
        source: Gives what has the series.
        prepare: Runs the health checks, for rules that read what they say; else they would run only for probes.
        service: How the service calls itself.
        events: Where :class:`AlertFired`, :class:`AlertResolved` and :class:`AlertUndelivered` go.
        clock: Where the time comes from.
        sleep: Waits from one look to the next.

    Attributes:
        settings: The settings.
        sinks: Who is told; add functions of your own before the application starts.
    """

    def __init__(
        self,
        settings: AlertsSettings | None = None,
        *,
        source: Callable[[], Collector],
        prepare: Callable[[], Awaitable[object]] | None = None,
        service: str = "application",
        events: Events | None = None,
        clock: Clock | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.settings = settings = settings or AlertsSettings()
        self._source = source
        self._prepare: Callable[[], Awaitable[object]] | None = None
        self._events = events
        self._clock = clock = clock or SystemClock()
        self._sleep = sleep
        self._engine = Engine(settings.rules, repeat_seconds=settings.repeat_seconds)
        self._engine.silences.update(dict.fromkeys(settings.silenced, float("inf")))
        if _CHECKS in self._engine.names:
            self._prepare = prepare
        self.sinks: list[Sink] = []
        if settings.enabled:
            if settings.log:
                self.sinks.append(lambda told: log(told, service))
            self.sinks += [Webhook(each, service=service, now=clock.time) for each in settings.webhooks]

    @property
    def active(self) -> tuple[Alert, ...]:
        """The alerts that fire, silenced or not."""
        return tuple(self._engine.active)

    def silence(self, name: str, seconds: float) -> None:
        """Has nobody told of a rule for so long, from now; 0 ends it. A deployment that is planned needs no page.

        Raises:
            ValueError: There is no such rule.
        """
        if name not in self._engine.alerts:
            raise ValueError(f"there is no rule {name!r}{did_you_mean(name, self._engine.alerts)}")
        self._engine.silences[name] = self._clock.monotonic() + seconds

    def evaluate(self) -> list[Notification]:
        """Looks at the rules now; gives what is to be told, and tells it to nobody."""
        snapshot = read(self._source(), self._engine.names)
        return self._engine.evaluate(snapshot, self._clock.monotonic())

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """While the block runs, the rules are looked at, and what there is to tell is delivered."""
        if not (self.settings.enabled and self.settings.rules):
            yield
            return
        outboxes = [Outbox(sink, events=self._events) for sink in self.sinks]
        tasks = [asyncio.create_task(outbox.deliver()) for outbox in outboxes]
        watching = asyncio.create_task(self._watch(outboxes))
        try:
            yield
        finally:
            watching.cancel()
            with suppress(TimeoutError):
                async with asyncio.timeout(_LAST_DELIVERIES_SECONDS):
                    for outbox in outboxes:
                        await outbox.empty()
            for task in tasks:
                task.cancel()
            await asyncio.gather(watching, *tasks, return_exceptions=True)

    async def _watch(self, outboxes: list[Outbox]) -> None:
        prepare: Callable[[], Awaitable[object]] | None = None
        while True:
            try:
                if prepare is not None:
                    await prepare()
                # Thousands of series take milliseconds to read, which the requests must not wait for.
                found = await asyncio.to_thread(self.evaluate)
            except Exception:
                logger.exception("the rules of alerts could not be looked at")
                found = []
            for told in found:
                self._tell(told)
                for outbox in outboxes:
                    outbox.put(told)
            await self._sleep(self.settings.interval_seconds)
            # Not at the first look: a process that starts has other things to do.
            prepare = self._prepare

    def _tell(self, told: Notification) -> None:
        if self._events is None or told.repeated:
            return
        if told.status == "firing":
            self._events.emit(AlertFired(told.rule.name, told.rule.severity, told.value))
        else:
            self._events.emit(AlertResolved(told.rule.name, told.seconds))
