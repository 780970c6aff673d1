"""Refuses what would only make everybody wait: 503 at once while more comes than can be done.

It protects what can be done from what cannot: without it, at three times the capacity every request waits until its
client has given up, and all the work is for nobody. It is *not* a rate limit: it looks at the server, not at the
client. Nor does it need a number from you: it looks for a queue that does not go away.

A queue is nothing bad: each burst makes one, and it drains. A *standing* queue is: if for half a second there was not
one moment in which a newcomer had waited for less than ``target_seconds``, more comes than goes (CoDel's test, RFC
8289). Then requests are admitted by a rate. It is cut as long as the queue stands, and grows when it does not (additive
increase, multiplicative decrease: Chiu and Jain, 1989). Queues that are looked at: the event loop, where everything
waits for the one processor; the pool of threads, where what is not async waits; those of yours that are added.

Latency is not looked at, so streams, websockets, long polling and slow routes do not disturb it, and a service with few
requests is never refused one for being slow.

It sits behind the drain and before everything that costs. Probes and metrics are answered above it.

Example:
    >>> from fastapi import FastAPI
    >>> from fastapi_hardening import Priority
    >>> from fastapi_hardening.resilience.load_shedding import LoadSheddingMiddleware
    >>> app = FastAPI()
    >>> app.add_middleware(LoadSheddingMiddleware)
    >>> @app.post("/orders", dependencies=[Priority("critical")])
    ... async def order() -> None: ...
    >>> @app.get("/recommendations", dependencies=[Priority("background")])
    ... async def recommend() -> None: ...
"""

import asyncio
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from anyio.to_thread import current_default_thread_limiter
from prometheus_client import CollectorRegistry, Counter, Gauge
from pydantic import Field
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from fastapi_hardening.core import context as request_context
from fastapi_hardening.core.clock import Clock, SystemClock
from fastapi_hardening.core.configuration import ConcernSettings
from fastapi_hardening.core.load import Level, Load
from fastapi_hardening.core.memory import Memory
from fastapi_hardening.core.policy import Override, mark_handled
from fastapi_hardening.core.problem import IANA, Problem, refuse, retry_after, tell
from fastapi_hardening.core.routes import route_of

if TYPE_CHECKING:
    from anyio import CapacityLimiter

LAYER = "load shedding"
Importance = Literal["critical", "default", "background"]
IMPORTANCES: tuple[Importance, ...] = ("critical", "default", "background")

# How often is looked, and after how many looks without a request no more.
_LOOK_SECONDS = 0.02
_IDLE_LOOKS = 50
# A queue is made of requests: of so many at least while it stands, and a newcomer waits for several of them.
_ENOUGH = 20
_SEVERAL = 4.0
# How many are admitted in one turn of the event loop at least; else the queue that there may be.
_AT_ONCE = 2.0
# While requests are refused: how often the rate is changed, and by how much.
_STEP_SECONDS = 0.1
_CUT = 0.9
_GROWTH = 0.1
_MOST = 1.5
# How fast it is forgotten what could be done in the best step.
_FORGET = 0.005
# As long as the queue drains, the rate is cut no further than to this share of what can be done.
_DRAINING = 0.1
# What stood for so long has much in it: at first, only this share is admitted.
_AT_FIRST = 0.5
# Without a refusal for so long there is no rate any more.
_CALM_SECONDS = 2.0
_MEMORY_SECONDS = 1.0
# The share of refusals from which the process is overloaded, or drowning.
_OVERLOADED, _DROWNING = 0.25, 0.6


class LoadSheddingSettings(ConcernSettings):
    """The settings of load shedding."""

    target_seconds: float = Field(0.01, gt=0, le=10)
    """A newcomer that waits for the event loop longer than this waits in a queue."""

    interval_seconds: float = Field(1.0, gt=0, le=60)
    """For so long the queue must have stood, without a moment's break, before anything is refused."""

    min_rate: float = Field(1.0, gt=0)
    """So many requests a second are admitted whatever happens."""

    max_memory_ratio: float | None = Field(None, gt=0, le=1)
    """From this share of the container's memory on, only what is critical is admitted, such as 0.95; unset, memory is
    not looked at."""

    retry_after_seconds: float = Field(2.0, gt=0)
    """When a refused client is asked to come back; up to twice as long at random."""

    report_only: bool = False
    """Whether refusals are only logged and counted."""


class Overloaded(Problem):
    """More comes than can be done."""

    status = 503
    type = IANA + "temporary-reduced-capacity"
    title = "Temporarily reduced capacity"


# --- engine -----------------------------------------------------------------------------------------------------------


class Shedder:
    """Finds out whether a queue stands, and then at which rate requests are admitted.

    Args:
        settings: What is a queue, and for how long it must stand.

    Attributes:
        rate: How many requests a second are admitted; ``None`` for all.
        delay: How long a newcomer waited at the last look, in seconds.
        seen: How many requests have come.
        served: How many were served to their end, of those that may have waited.
        exhausted: There is no memory left.
        next_look: When the next look is due, in monotonic seconds.
        in_flight: How many requests are being served.
        on_look: What is called after each look.
        on_refusal: What is called with the importance of each request that is refused.

    Example:
        >>> shedder = Shedder(LoadSheddingSettings())
        >>> for number in range(60):
        ...     admitted = shedder.admit("default", now=number / 50)
        ...     shedder.look(number / 50, delay=0.2)
        ...     shedder.served += 1
        >>> shedder.rate is not None, shedder.admit("background", now=1.2), shedder.admit("critical", now=1.2)
        (True, False, True)
    """

    def __init__(self, settings: LoadSheddingSettings) -> None:
        self.rate: float | None = None
        self.delay = 0.0
        self.seen = 0
        self.served = 0
        self.exhausted = False
        self.next_look = math.inf
        self.in_flight = 0
        self.on_look: Callable[[], None] | None = None
        self.on_refusal: Callable[[Importance], None] | None = None
        self._settings = settings
        self._interval = settings.interval_seconds
        self._began: float | None = None
        self._served_before = 0
        self._entered = 0
        self._entered_at = 0.0
        self._tokens = 0.0
        self._turned_at = 0.0
        self._capacity = 0.0
        self._least = self._least_before = math.inf
        self._admitted = 0
        self._refused = 0
        self._last_refusal = 0.0
        self._share = 0.0

    @property
    def acts(self) -> bool:
        """Whether anything is refused at the moment."""
        return self.rate is not None or self.exhausted

    @property
    def level(self) -> Level:
        """How much there is to do: by the share of requests that is refused."""
        if self.exhausted or self._share >= _DROWNING:
            return 3
        if self._share >= _OVERLOADED:
            return 2
        return 0 if self.rate is None else 1

    def admit(self, importance: Importance, now: float, *, queues: bool = True) -> bool:
        """Decides about a request.

        Args:
            importance: What is critical is admitted always, what is in the background never while there is a rate.
            now: The time, in monotonic seconds.
            queues: It may have waited; one that is sent by the same task as the one before has not.
        """
        self.seen += 1
        if queues and self.rate is None and now > self.next_look:
            # The look waits. It may be that so many have come at once that it waits behind all of them.
            if not self._entered:
                self._entered_at = now
            self._entered += 1
            if now - self._entered_at > self._interval:
                self._begin_to_act(now, self._entered_at, self._entered)
        if self.rate is None and not self.exhausted:
            return True
        admitted = importance == "critical" or (
            importance == "default" and not self.exhausted and (self.rate is None or self._tokens >= 1)
        )
        if admitted:
            self._tokens -= 1
            self._admitted += 1
        else:
            self._refused += 1
            self._last_refusal = now
        return admitted

    def turn(self, now: float) -> None:
        """Gives out what may be admitted in this turn of the event loop.

        Not more in its course: what is admitted meanwhile makes the turn longer, and with it the wait of all others.
        """
        rate = self.rate or 0.0
        most = max(_AT_ONCE, rate * self._settings.target_seconds)
        self._tokens = min(most, max(-most, self._tokens) + (now - self._turned_at) * rate)
        self._turned_at = now

    def look(self, now: float, delay: float, others: float = 0.0) -> None:
        """Takes a look at the queues.

        Args:
            now: The time, in monotonic seconds.
            delay: How long a newcomer has just waited for the event loop, in seconds.
            others: The longest of the other queues, as a multiple of what is too long.
        """
        self.delay = delay
        self._entered = 0
        began = self._began
        if began is None:
            self._began, began, self._served_before = now, now, self.served
        lasted = now - began
        served = self.served - self._served_before
        # A queue has several in it. One alone that takes long is none.
        rate = self._capacity if self.rate is not None else served / lasted if lasted else 0.0
        spacing = 1 / rate if rate else 0.0
        pressure = max(others, delay / max(self._settings.target_seconds, _SEVERAL * spacing))
        if self.rate is not None:
            self._least = min(self._least, pressure)
            if lasted >= _STEP_SECONDS:
                self._change_rate(now, lasted, self.rate, served / lasted)
        elif pressure <= 1:
            self._began = None
            self._share = 0.0
        elif lasted >= self._interval:
            self._begin_to_act(now, began, served)

    def _begin_to_act(self, now: float, began: float, served: int) -> None:
        if served < _ENOUGH:
            return
        self._capacity = served / max(now - began, 0.001)
        self.rate = max(self._settings.min_rate, self._capacity * _AT_FIRST)
        self._tokens = 0.0
        self._turned_at = self._last_refusal = now
        self._begin_step(now)

    def _change_rate(self, now: float, lasted: float, rate: float, done: float) -> None:
        asked = self._admitted + self._refused
        # Of about a second, so that a single moment says nothing.
        self._share += ((self._refused / asked if asked else 0.0) - self._share) * min(1.0, lasted)
        self._capacity = max(done, self._capacity * (1 - _FORGET))
        if self._least > 1:
            drains = self._least < self._least_before
            least = max(self._settings.min_rate, self._capacity * _DRAINING if drains else 0.0)
            self.rate = max(least, min(rate, done) * _CUT)
        elif self._refused:
            self.rate = min(rate + self._capacity * _GROWTH, self._capacity * _MOST)
        elif now - self._last_refusal >= _CALM_SECONDS:
            self.rate = None
        self._begin_step(now)

    def _begin_step(self, now: float) -> None:
        self._began = now
        self._served_before = self.served
        self._least_before, self._least = self._least, math.inf
        self._admitted = self._refused = 0


class Probe:
    """Looks how long a newcomer waits on an event loop, as long as requests come.

    Args:
        shedder: Who is told.
        clock: Where the time comes from.
        load: Who is told the level, and knows further queues.
        memory: What is looked at for memory; ``None`` for nothing.
    """

    def __init__(
        self,
        shedder: Shedder,
        clock: Clock,
        load: Load,
        memory: Callable[[], bool] | None = None,
    ) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self._shedder = shedder
        self._now = clock.monotonic
        self._load = load
        self._memory = memory
        self._memory_at = 0.0
        self._threads: CapacityLimiter | None = None
        self._seen = 0
        self._idle = 0
        self._chain = 0
        self._due = 0.0
        self._turning = False

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begins to look; called from a task on this loop."""
        self.loop = loop
        self._threads = current_default_thread_limiter()
        self._idle = 0
        # Of two loops that take turns in starting it, each has one chain of looks, and not one more each time.
        self._chain += 1
        self._arm(loop, self._chain)

    def mark_turn(self, loop: asyncio.AbstractEventLoop) -> None:
        """Has the shedder told when the next turn of the event loop begins."""
        if not self._turning:
            self._turning = True
            loop.call_soon(self._turn)

    def _turn(self) -> None:
        self._turning = False
        self._shedder.turn(self._now())

    def _arm(self, loop: asyncio.AbstractEventLoop, chain: int) -> None:
        self._due = self._shedder.next_look = self._now() + _LOOK_SECONDS
        loop.call_later(_LOOK_SECONDS, self._ring, loop, chain)

    def _ring(self, loop: asyncio.AbstractEventLoop, chain: int) -> None:
        # It was due before it rang, and what is added now waits for all that is ready: the two together are the wait.
        now = self._now()
        if chain == self._chain:
            loop.call_soon(self._look, loop, chain, now - self._due, now)

    def _look(self, loop: asyncio.AbstractEventLoop, chain: int, late: float, since: float) -> None:
        now, shedder = self._now(), self._shedder
        if self._memory is not None and now >= self._memory_at:
            self._memory_at = now + _MEMORY_SECONDS
            shedder.exhausted = self._memory()
        shedder.look(now, max(0.0, late) + now - since, self._longest())
        self._load.tell(shedder.level)
        if shedder.on_look is not None:
            shedder.on_look()
        self._idle = self._idle + 1 if shedder.seen == self._seen else 0
        self._seen = shedder.seen
        if self._idle < _IDLE_LOOKS or shedder.acts:
            self._arm(loop, chain)
        else:
            self.loop = None
            shedder.next_look = math.inf

    def _longest(self) -> float:
        threads = self._threads
        longest = 0.0
        if threads is not None and threads.available_tokens <= 0:
            # A quarter of those that are served: the last of them waits for a quarter of the time that it then takes.
            longest = threads.statistics().tasks_waiting / (threads.total_tokens / 4)
        for queue in self._load.queues:
            longest = max(longest, queue())
        return longest


# --- layer ------------------------------------------------------------------------------------------------------------


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
        if now <= shedder.next_look and shedder.rate is None and not shedder.exhausted:
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


# --- override ---------------------------------------------------------------------------------------------------------


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
