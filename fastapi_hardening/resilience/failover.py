"""Several endpoints of one service as one: picks the one that is best at the moment, and leaves out what fails.

It protects from the endpoint that is down, or slow, or answers nonsense quickly. It is *not* a health check: nothing is
sent but the calls themselves. It does not repeat what failed, that is the retry's, whose next attempt goes elsewhere.

Outbound it stands inside the retry and outside of the circuit breakers, of which there is one an endpoint. Two
endpoints are drawn at random, and mostly the one with the lower load is taken («the power of two choices»): its
latency, as an average that forgets quickly, times what is under way, and the more the less it succeeds. After some
failures in a row an endpoint is left out for a while, each time for longer, as in Envoy's outlier detection; but never
more than a share of them, and if too few are left, all are used again («panic»). Of a request that may be repeated a
second copy can be sent elsewhere when the first takes long (a hedge); it is charged to the retry budget.

Example:
    >>> import asyncio
    >>> failover = Failover("stock", ["http://a:8000", "http://b:8000"])
    >>> async def send(outgoing):
    ...     return outgoing.endpoint
    >>> asyncio.run(failover.around(send)(Outgoing("GET /"))) in ("http://a:8000", "http://b:8000")
    True
"""

import asyncio
import logging
import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector
from pydantic import Field

from fastapi_hardening.core.check import CheckResult
from fastapi_hardening.core.clock import Clock, SystemClock
from fastapi_hardening.core.configuration import Section
from fastapi_hardening.core.events import Events
from fastapi_hardening.core.outbound import CallRefused, Outgoing, Send, status_of

logger = logging.getLogger("fastapi_hardening.failover")

# How quickly the averages forget, and after how long an endpoint is asked again to know it at all, in seconds.
_TAU = 0.6
_FORCED_AFTER = 3.0


class FailoverSettings(Section):
    """The settings of one failover."""

    eject_after_failures: int = Field(5, ge=1)
    """After so many failures in a row an endpoint is left out."""

    ejection_seconds: float = Field(30.0, gt=0)
    """For how long; times the number of times in a row."""

    longest_ejection_seconds: float = Field(300.0, gt=0)
    """For how long at most."""

    max_ejected: float = Field(0.1, ge=0, le=1)
    """The share of endpoints that may be left out at the same time; one may be in any case, unless it is 0."""

    panic_below: float = Field(0.5, ge=0, le=1)
    """When a smaller share than this is left, all are used, as if none had failed."""

    ejecting_statuses: tuple[int, ...] = (502, 503, 504)
    """Answers that count as failures of the endpoint, as exceptions do."""

    hedge_after_seconds: Annotated[float, Field(gt=0)] | Literal["p95"] | None = None
    """When a GET or HEAD has no answer after so long, a second one is sent to another endpoint. ``p95`` is the time in
    which 95 of the last 100 calls were answered. Unset, nothing is hedged."""


@dataclass(frozen=True, slots=True)
class EndpointEjected:
    """An endpoint is left out for a while.

    Attributes:
        name: The upstream.
        endpoint: The endpoint.
        seconds: For how long.
    """

    name: str
    endpoint: str
    seconds: float


@dataclass(frozen=True, slots=True)
class CallHedged:
    """A second request was sent, because the first takes long.

    Attributes:
        name: The upstream.
        seconds: How long the first had taken.
    """

    name: str
    seconds: float


# --- engine -----------------------------------------------------------------------------------------------------------


class Endpoint:
    """What is known of one endpoint.

    Attributes:
        url: Its address.
        in_flight: How many calls are under way.
        succeeded: Calls that it answered.
        failed: Calls that it did not.
        ejected_until: Until when it is left out, on the monotonic clock.
    """

    __slots__ = (
        "_ejections",
        "_in_a_row",
        "_latency",
        "_seen_at",
        "_success",
        "ejected_until",
        "failed",
        "in_flight",
        "picked_at",
        "succeeded",
        "url",
    )

    def __init__(self, url: str) -> None:
        self.url = url
        self.in_flight = 0
        self.succeeded = self.failed = 0
        self.picked_at = self._seen_at = self.ejected_until = -math.inf
        self._latency = 0.0
        self._success = 1.0
        self._in_a_row = self._ejections = 0

    @property
    def load(self) -> float:
        """How much is asked of it: higher is worse."""
        return (self._latency + 0.001) * (self.in_flight + 1) / max(self._success, 0.01)

    def end(self, started: float, now: float, *, failed: bool | None) -> int:
        """Counts a call that has ended; ``failed=None`` says only that it took that long.

        Returns:
            How many calls have failed in a row.
        """
        old = math.exp(-max(0.0, now - self._seen_at) / _TAU)
        self._seen_at = now
        self._latency = self._latency * old + (now - started) * (1 - old)
        if failed is None:
            return 0
        self._success = self._success * old + (not failed) * (1 - old)
        if failed:
            self.failed += 1
            self._in_a_row += 1
        else:
            self.succeeded += 1
            self._in_a_row = 0
        return self._in_a_row

    def eject(self, now: float, settings: FailoverSettings) -> float:
        """Leaves it out, for longer than the last time if that was not long ago; for how many seconds."""
        behaved = 0 if self.ejected_until == -math.inf else int((now - self.ejected_until) / settings.ejection_seconds)
        self._ejections = max(0, self._ejections - behaved) + 1
        self._in_a_row = 0
        seconds = min(settings.ejection_seconds * self._ejections, settings.longest_ejection_seconds)
        self.ejected_until = now + seconds
        return seconds


class Percentile:
    """The time in which most of the last calls were answered, reckoned anew every twenty calls.

    Args:
        share: Which share of the calls.

    Example:
        >>> p95 = Percentile(0.95)
        >>> [p95.add(each / 100) for each in range(1, 101)][-1], p95.seconds
        (None, 0.96)
    """

    _CALLS = 100
    _EVERY = 20

    __slots__ = ("_added", "_last", "_share", "seconds")

    def __init__(self, share: float) -> None:
        self._share = share
        self._last: deque[float] = deque(maxlen=self._CALLS)
        self._added = 0
        self.seconds: float | None = None

    def add(self, seconds: float) -> None:
        """Counts a call that was answered within so long."""
        self._last.append(seconds)
        self._added += 1
        if self._added % self._EVERY == 0:
            self.seconds = sorted(self._last)[int(len(self._last) * self._share)]


class Failover:
    """The endpoints of one upstream.

    Args:
        name: What it is called in events, metrics and logs.
        urls: The endpoints.
        settings: When one is left out, and when a request is hedged.
        is_open: Whether the circuit of an endpoint is open, so that it is not worth asking.
        charge: Takes what a hedge costs from a budget; ``False`` when there is nothing left.
        events: Where it is told.
        clock: Where the time comes from.
    """

    def __init__(
        self,
        name: str,
        urls: Sequence[str],
        settings: FailoverSettings | None = None,
        *,
        is_open: Callable[[str], bool] = lambda _url: False,
        charge: Callable[[], bool] = lambda: True,
        events: Events | None = None,
        clock: Clock | None = None,
    ) -> None:
        if not urls or len(set(urls)) < len(urls):
            raise ValueError(f"{name} has at least one endpoint, and none twice: {', '.join(urls)}")
        self.name = name
        self.settings = settings or FailoverSettings()
        self.endpoints = {url: Endpoint(url) for url in urls}
        self._p95 = Percentile(0.95)
        self._is_open = is_open
        self._charge = charge
        self._events = events
        self._now = (clock or SystemClock()).monotonic

    def pick(self, avoided: Iterable[str] = ()) -> Endpoint:
        """The endpoint for the next call.

        Args:
            avoided: Endpoints that are taken only if there are no others.
        """
        now = self._now()
        known = list(self.endpoints.values())
        healthy = [each for each in known if each.ejected_until <= now]
        if len(healthy) < self.settings.panic_below * len(known):
            healthy = known
        avoided = set(avoided)
        # Better one that was tried already than one that is left out, and better that one than an open circuit.
        for group in (
            [each for each in healthy if each.url not in avoided and not self._is_open(each.url)],
            [each for each in healthy if not self._is_open(each.url)],
            [each for each in known if not self._is_open(each.url)],
        ):
            if group:
                return self._better_of_two(group, now)
        return self._better_of_two(healthy, now)

    def _better_of_two(self, group: list[Endpoint], now: float) -> Endpoint:
        if len(group) == 1:
            picked = group[0]
        else:
            one, other = random.sample(group, 2)
            # Nearly always the better one: one that is ten times worse is taken once in a hundred times. Always it, and
            # of two equal endpoints one would get nothing for the last digit of an average.
            ours, theirs = one.load**2, other.load**2
            picked, left = (one, other) if random.random() * (ours + theirs) < theirs else (other, one)  # noqa: S311
            if now - left.picked_at > _FORCED_AFTER:
                picked = left
        picked.picked_at = now
        return picked

    def around(self, send: Send) -> Send:
        """The failover as a layer around an upstream."""
        is_hedging = self.settings.hedge_after_seconds is not None and len(self.endpoints) > 1

        async def sending(outgoing: Outgoing) -> Any:
            after = self._hedge_after() if is_hedging and outgoing.hedged else None
            attempt = self._send(send, outgoing) if after is None else self._hedge(send, outgoing, after)
            before, outgoing.answer = outgoing.answer, await attempt
            if before is not None and not outgoing.whole:
                await before.aclose()
            return outgoing.answer

        return sending

    def _hedge_after(self) -> float | None:
        after = self.settings.hedge_after_seconds
        return self._p95.seconds if after == "p95" else after

    async def _send(self, send: Send, outgoing: Outgoing) -> Any:
        """One attempt; an endpoint that is not asked because its circuit is open costs none."""
        while True:
            endpoint = self.pick(outgoing.tried)
            is_new = endpoint.url not in outgoing.tried
            outgoing.tried.add(endpoint.url)
            try:
                return await self._ask(send, outgoing, endpoint)
            except CallRefused:
                if not is_new:
                    raise

    async def _ask(self, send: Send, outgoing: Outgoing, endpoint: Endpoint) -> Any:
        started = self._now()
        endpoint.in_flight += 1
        failed: bool | None = None
        refused = False
        try:
            answer = await send(replace(outgoing, endpoint=endpoint.url))
            failed = self._is_failure(answer)
        except CallRefused:
            refused = True
            raise
        except Exception:
            failed = True
            raise
        finally:
            endpoint.in_flight -= 1
            if not refused:
                now = self._now()
                if failed is False:
                    self._p95.add(now - started)
                in_a_row = endpoint.end(started, now, failed=failed)
                if in_a_row >= self.settings.eject_after_failures:
                    self._eject(endpoint)
        return answer

    def _is_failure(self, answer: Any) -> bool:
        return status_of(answer) in self.settings.ejecting_statuses

    async def _hedge(self, send: Send, outgoing: Outgoing, after: float) -> Any:
        tasks = [asyncio.create_task(self._send(send, outgoing))]
        winner: asyncio.Task[Any] | None = None
        try:
            await asyncio.wait(tasks, timeout=after)
            if not tasks[0].done() and self.pick(outgoing.tried).url not in outgoing.tried and self._charge():
                if self._events is not None:
                    self._events.emit(CallHedged(self.name, after))
                tasks.append(asyncio.create_task(self._send(send, outgoing)))
            winner = await self._first_good(tasks)
            return winner.result()
        finally:
            await _abandon([task for task in tasks if task is not winner])

    async def _first_good(self, tasks: list[asyncio.Task[Any]]) -> asyncio.Task[Any]:
        """The first that has an answer which is no failure, else the last of them."""
        pending: set[asyncio.Task[Any]] = set(tasks)
        while True:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if task.exception() is None and not self._is_failure(task.result()):
                    return task
            if not pending:
                return done.pop()

    def _eject(self, endpoint: Endpoint) -> None:
        now = self._now()
        ejected = sum(each.ejected_until > now for each in self.endpoints.values())
        most = max(1, int(self.settings.max_ejected * len(self.endpoints))) if self.settings.max_ejected else 0
        if endpoint.ejected_until > now or ejected >= most or len(self.endpoints) == 1:
            return
        seconds = endpoint.eject(now, self.settings)
        logger.warning("%s: %s is left out for %.3g s", self.name, endpoint.url, seconds)
        if self._events is not None:
            self._events.emit(EndpointEjected(self.name, endpoint.url, seconds))

    def check(self) -> CheckResult:
        """A health check: warns while an endpoint is left out."""
        now = self._now()
        ejected = [each.url for each in self.endpoints.values() if each.ejected_until > now]
        if not ejected:
            return CheckResult("pass")
        return CheckResult("warn", f"{len(ejected)} of {len(self.endpoints)} endpoints left out: {', '.join(ejected)}")


async def _abandon(tasks: list[asyncio.Task[Any]]) -> None:
    """Ends attempts that nobody waits for any more, and closes what they have answered."""
    for task in tasks:
        task.cancel()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        if hasattr(outcome, "aclose"):
            await outcome.aclose()


def measure(registry: CollectorRegistry, failovers: Callable[[], Iterable[Failover]], clock: Clock) -> None:
    """Shows the calls of each endpoint, those under way, and whether it is left out."""
    registry.register(_Endpoints(failovers, clock))


class _Endpoints(Collector):
    """Read from the endpoints, so that a call pays nothing for it."""

    def __init__(self, failovers: Callable[[], Iterable[Failover]], clock: Clock) -> None:
        self._failovers = failovers
        self._clock = clock

    def describe(self) -> Iterable[Metric]:
        """The names, for the registry."""
        return _families()

    def collect(self) -> Iterable[Metric]:
        """The series of each endpoint."""
        calls, in_flight, ejected = families = _families()
        now = self._clock.monotonic()
        for failover in self._failovers():
            for each in failover.endpoints.values():
                labels = (failover.name, each.url)
                calls.add_metric((*labels, "succeeded"), each.succeeded)
                calls.add_metric((*labels, "failed"), each.failed)
                in_flight.add_metric(labels, each.in_flight)
                ejected.add_metric(labels, float(each.ejected_until > now))
        return families


def _families() -> tuple[CounterMetricFamily, GaugeMetricFamily, GaugeMetricFamily]:
    labels = ("upstream", "endpoint")
    return (
        CounterMetricFamily(
            "hardening_upstream_calls", "Attempts by endpoint and outcome.", labels=(*labels, "outcome")
        ),
        GaugeMetricFamily("hardening_upstream_in_flight", "Attempts under way.", labels=labels),
        GaugeMetricFamily("hardening_upstream_ejected", "1 while an endpoint is left out.", labels=labels),
    )
