"""Refuses what the shedder does not admit, and how a route says how important it is.

Example:
    >>> from fastapi import FastAPI
    >>> app = FastAPI()
    >>> app.add_middleware(LoadSheddingMiddleware, settings=LoadSheddingSettings(interval_seconds=2))
"""

import asyncio
from typing import Any, ClassVar

from prometheus_client import CollectorRegistry, Counter, Gauge
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from fastapi_hardening.core import context as request_context
from fastapi_hardening.core.clock import Clock, SystemClock
from fastapi_hardening.core.load import Load
from fastapi_hardening.core.memory import Memory
from fastapi_hardening.core.policy import Override, mark_handled
from fastapi_hardening.core.problem import IANA, Problem, refuse, retry_after, tell
from fastapi_hardening.core.routes import route_of
from fastapi_hardening.resilience.load_shedding.probe import Probe
from fastapi_hardening.resilience.load_shedding.settings import IMPORTANCES, Importance, LoadSheddingSettings
from fastapi_hardening.resilience.load_shedding.shedder import Shedder

LAYER = "load shedding"


class Overloaded(Problem):
    """More comes than can be done."""

    status = 503
    type = IANA + "temporary-reduced-capacity"
    title = "Temporarily reduced capacity"


class LoadSheddingMiddleware:
    """Refuses requests and handshakes while a queue stands.

    Args:
        app: The application inside.
        settings: The settings of load shedding.
        shedder: Who decides.
        load: Who is told how much there is to do, and knows further queues.
        clock: Where the time comes from.
        memory: The memory of the container.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: LoadSheddingSettings | None = None,
        *,
        shedder: Shedder | None = None,
        load: Load | None = None,
        clock: Clock | None = None,
        memory: Memory | None = None,
    ) -> None:
        self.app = app
        self._settings = settings = settings or LoadSheddingSettings()
        clock = clock or SystemClock()
        self._now = clock.monotonic
        self.shedder = shedder or Shedder(settings)
        most, memory = settings.max_memory_ratio, memory or Memory()
        looks = None if most is None else lambda: (memory.ratio() or 0.0) >= most
        self._probe = Probe(self.shedder, clock, load or Load(), looks)
        self._task: asyncio.Task[Any] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        kind = scope["type"]
        if kind not in ("http", "websocket") or not self._settings.enabled:
            await self.app(scope, receive, send)
            return
        shedder = self.shedder
        loop = asyncio.get_running_loop()
        if self._probe.loop is not loop:
            self._probe.start(loop)
        # A server has a task for each request. Who sends one after another in one task, as tests do, makes no queue.
        task = asyncio.current_task()
        queues, self._task = task is not self._task, task
        now = self._now()
        if (not queues or now <= shedder.next_look) and shedder.rate is None and not shedder.exhausted:
            # What most requests meet: nothing is refused, and the next look is not due.
            shedder.seen += 1
        elif await self._stops(loop, now, scope, receive, send, queues=queues):
            return
        if kind != "http":
            await self.app(scope, receive, send)
            return
        shedder.in_flight += 1
        try:
            await self.app(scope, receive, send)
        finally:
            shedder.in_flight -= 1
            shedder.served += queues

    async def _stops(
        self, loop: asyncio.AbstractEventLoop, now: float, scope: Scope, receive: Receive, send: Send, *, queues: bool
    ) -> bool:
        """Asks whether a request is admitted, and refuses it if it is not."""
        importance: Importance = "default"
        if self.shedder.acts:
            importance = self._importance(scope)
            self._probe.mark_turn(loop)
        if self.shedder.admit(importance, now, queues=queues):
            return False
        return await self._refuses(importance, scope, receive, send)

    def _importance(self, scope: Scope) -> Importance:
        context = request_context.ensure(scope)
        # Who learns of late how important it is asks here.
        context.state[LoadSheddingMiddleware] = self
        overrides: tuple[Any, ...] = (context.route or route_of(scope)).of(Priority)
        if not overrides:
            return "default"
        mark_handled(scope, overrides)
        importance: Importance = overrides[-1].importance
        return importance

    async def _refuses(self, importance: Importance, scope: Scope, receive: Receive, send: Send) -> bool:
        if self.shedder.on_refusal is not None:
            self.shedder.on_refusal(importance)
        problem = self.problem()
        if self._settings.report_only:
            tell(problem, request_context.ensure(scope), f"{LAYER} (report only)")
            return False
        await refuse(problem, scope, receive, send, layer=LAYER)
        return True

    def refuses_late(self, importance: Importance) -> bool:
        """Whether a request that was let in would not have been, had its importance been known."""
        if importance != "background" or self._settings.report_only or not self.shedder.acts:
            return False
        if self.shedder.on_refusal is not None:
            self.shedder.on_refusal(importance)
        return True

    def problem(self) -> Overloaded:
        """The refusal."""
        seconds = self._settings.retry_after_seconds
        return Overloaded("The server has more to do than it can; come back later.", headers=retry_after(seconds))


def measure(registry: CollectorRegistry, shedder: Shedder) -> None:
    """Has refusals counted by priority, and in a few gauges what is known of the load."""
    shed = Counter("hardening_shed_requests", "Requests refused under load.", ("priority",), registry=registry)
    by_importance = {importance: shed.labels(importance) for importance in IMPORTANCES}
    in_flight = Gauge(
        "hardening_requests_in_progress",
        "Requests that are being served.",
        registry=registry,
        multiprocess_mode="livesum",
    )
    delay = Gauge(
        "hardening_loop_delay_seconds",
        "How long a newcomer waited for the event loop at the last look.",
        registry=registry,
        multiprocess_mode="livemax",
    )
    rate = Gauge(
        "hardening_admission_rate",
        "Requests that are admitted in a second; 0 for all.",
        registry=registry,
        multiprocess_mode="livesum",
    )

    def look() -> None:
        in_flight.set(shedder.in_flight)
        delay.set(shedder.delay)
        rate.set(shedder.rate or 0.0)

    shedder.on_look = look
    shedder.on_refusal = lambda importance: by_importance[importance].inc()


# --- override -------------------------------------------------------------------------------------------------------


class Priority(Override):
    """How important a route, a router or an application is under load; the innermost counts.

    What is ``critical`` is never refused, what is in the ``background`` is refused first and altogether. Few things are
    critical: if all is, nothing is. Where the layer has judged the path wrong, the request is refused after routing.

    Args:
        importance: ``critical``, ``default`` or ``background``.

    Raises:
        ValueError: There is no such importance.

    Example:
        >>> checkout, suggestions = Priority("critical"), Priority("background")
    """

    may_refuse: ClassVar[bool] = False  # an answer that is there already is no load

    def __init__(self, importance: Importance) -> None:
        super().__init__()
        if importance not in IMPORTANCES:
            raise ValueError(f"{importance!r} is no priority; known are 'critical', 'default' and 'background'")
        self.importance = importance

    async def act_late(self, connection: HTTPConnection) -> None:
        """Refuses what is in the background while requests are refused."""
        context = request_context.ensure(connection.scope)
        layer: LoadSheddingMiddleware | None = context.state.get(LoadSheddingMiddleware)
        if layer is not None and layer.refuses_late(self.importance):
            problem = layer.problem()
            tell(problem, context, LAYER)
            raise problem
