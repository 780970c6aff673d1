"""Keeps one slow thing from taking all there is: so many requests of a route at the same time, and no more.

It protects the routes that are well from the one that is not: without it, whatever waits for a slow database fills the
pool of threads and of connections, and the memory. It is *not* a limit by client (:class:`RateLimit` has
``concurrent``), nor load shedding, which looks at the whole process.

There is no layer: the override is a dependency of the endpoint that runs, so no path leads around it, and routes
without one pay nothing. It holds its place until the answer has been sent, streams, websockets and background tasks
included. FastAPI's own ``Depends(..., max_concurrency=)`` bounds a dependency alike, but lets any number wait.

Example:
    >>> from fastapi import FastAPI
    >>> from fastapi_hardening import Bulkhead
    >>> app = FastAPI()
    >>> database = Bulkhead(20, name="database")
    >>> @app.get("/report", dependencies=[database, Bulkhead(2, max_queue=0)])
    ... async def report() -> None: ...
    >>> @app.get("/search", dependencies=[database])
    ... async def search() -> None: ...
"""

from collections.abc import AsyncIterator, Iterable, Iterator
from typing import ClassVar

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from starlette.requests import HTTPConnection

from fastapi_hardening.core import context as request_context
from fastapi_hardening.core.concurrency import NoRoomError, Places
from fastapi_hardening.core.policy import Override
from fastapi_hardening.core.problem import IANA, Problem, retry_after, tell
from fastapi_hardening.core.routes import RouteEntry

LAYER = "bulkhead"


class BulkheadFull(Problem):
    """As many requests are served here as may be, and as many wait as may wait."""

    status = 503
    type = IANA + "temporary-reduced-capacity"
    title = "Temporarily reduced capacity"


class Bulkhead(Override):
    """So many requests at the same time; every level holds, and one object is one bulkhead wherever it stands.

    Args:
        max_concurrency: So many are served at the same time, by one worker.
        max_queue: So many may wait; by default as many as are served, so that the last of them waits about as long as
            it then takes.
        max_wait_seconds: How long one may wait; ``None`` for as long as the route's :class:`Timeout` lets it.
        name: What it is called in metrics; by default by its route.
        retry_after_seconds: When a refused client is asked to come back; up to twice as long at random.

    Raises:
        ValueError: Fewer than one, or a negative number, may never be served.

    Example:
        >>> pictures = Bulkhead(4, max_queue=16, max_wait_seconds=2, name="pictures")
    """

    every_level_holds: ClassVar[bool] = True
    may_refuse: ClassVar[bool] = False  # an answer that is there already takes no place

    def __init__(
        self,
        max_concurrency: int,
        *,
        max_queue: int | None = None,
        max_wait_seconds: float | None = None,
        name: str | None = None,
        retry_after_seconds: float = 1.0,
    ) -> None:
        super().__init__()
        if max_concurrency < 1:
            raise ValueError(f"a bulkhead with max_concurrency={max_concurrency} would never let anybody in")
        if (max_queue or 0) < 0 or (max_wait_seconds is not None and max_wait_seconds <= 0) or retry_after_seconds <= 0:
            raise ValueError("a bulkhead's max_queue must be at least 0, its times above 0")
        self.name = name
        self.places = Places(max_concurrency, max_waiting=max_concurrency if max_queue is None else max_queue)
        self.max_wait_seconds = max_wait_seconds
        self.retry_after_seconds = retry_after_seconds

    async def after_routing(self, connection: HTTPConnection) -> AsyncIterator[None]:  # type: ignore[override]
        """Holds a place while the endpoint runs and its answer is sent."""
        context = request_context.ensure(connection.scope)
        held: set[Bulkhead] = context.state.setdefault(Bulkhead, set())
        if self in held:
            # It stands here and on the router around, and would wait for itself.
            yield
            return
        try:
            await self.places.take(self.max_wait_seconds)
        except (NoRoomError, TimeoutError):
            problem = BulkheadFull(
                "Too many requests of this kind are under way; come back later.",
                headers=retry_after(self.retry_after_seconds),
            )
            tell(problem, context, LAYER)
            raise problem from None
        held.add(self)
        try:
            yield
        finally:
            held.discard(self)
            self.places.give_back()


class _Bulkheads(Collector):
    """What is in use of each bulkhead, and how many wait, when somebody asks."""

    def __init__(self, routes: Iterable[RouteEntry]) -> None:
        self._routes = routes

    def describe(self) -> Iterator[Metric]:
        """The series, without looking for routes, which are added later."""
        yield from self._series()

    def collect(self) -> Iterator[Metric]:
        """The series, by the name of the bulkhead, or of the first route that it stands on."""
        in_use, waiting = self._series()
        named: dict[Bulkhead, str] = {}
        for entry in self._routes:
            for bulkhead in entry.of(Bulkhead):
                if isinstance(bulkhead, Bulkhead) and bulkhead not in named:
                    name = named[bulkhead] = bulkhead.name or entry.template or "unnamed"
                    in_use.add_metric((name,), bulkhead.places.in_use)
                    waiting.add_metric((name,), bulkhead.places.waiting)
        yield from (in_use, waiting)

    def _series(self) -> tuple[GaugeMetricFamily, GaugeMetricFamily]:
        return (
            GaugeMetricFamily("hardening_bulkhead_in_use", "Requests that are served.", labels=("bulkhead",)),
            GaugeMetricFamily("hardening_bulkhead_waiting", "Requests that wait.", labels=("bulkhead",)),
        )


def measure(registry: CollectorRegistry, routes: Iterable[RouteEntry]) -> None:
    """Has the bulkheads on these routes shown by the metrics of this process."""
    registry.register(_Bulkheads(routes))
