"""Counts answered requests by method, handler and status, in the two forms in which Prometheus can be shown them.

* :class:`Tally`: plain numbers of one process; the series are made of them only when somebody reads them.
* :class:`SharedTally`: the client library's own series, in files that every process of a server writes and one reads.

Both give the series of ``prometheus-fastapi-instrumentator``, by name and label. Every label is of a closed set, or is
bounded here, but for handlers, whose names are the caller's to bound. It is *not* what serves them. Knows no ASGI.

Example:
    >>> tally = Tally((0.1, 1.0), (0.5,))
    >>> tally.record("GET", "/items/{id}", 200, seconds=0.02, response_bytes=512)
    >>> [(sample.name, sample.labels, sample.value) for sample in next(iter(tally.collect())).samples]
    [('http_requests_total', {'method': 'GET', 'status': '2xx', 'handler': '/items/{id}'}, 1)]
"""

import math
import os
from bisect import bisect_left
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric, Summary, values
from prometheus_client.core import CounterMetricFamily, Exemplar, HistogramMetricFamily, SummaryMetricFamily
from prometheus_client.registry import Collector

from fastapi_hardening.core.clock import Clock, SystemClock
from fastapi_hardening.core.configuration import ConfigurationError

OTHER = "_OTHER"
"""The ``method`` of everything that is no method of HTTP; OpenTelemetry's word."""

_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "QUERY"))
_MULTIPROCESS_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"

# More problems or events than this are no closed set any more; the rest is counted together.
_MAX_NAMES = 500

_REQUESTS = "http_requests", "Requests by method, status and handler.", ("method", "status", "handler")
_REQUEST_SIZES = "http_request_size_bytes", "Declared length of requests by handler, 0 where none is.", ("handler",)
_RESPONSE_SIZES = "http_response_size_bytes", "Declared length of responses by handler, 0 where none is.", ("handler",)
_DURATIONS = "http_request_duration_highr_seconds", "Time to the last byte, in many buckets.", ()
_ROUTE_DURATIONS = (
    "http_request_duration_seconds",
    "Time to the last byte by method and handler, in few buckets.",
    ("method", "handler"),
)


class _Series:
    """What was counted of one method, route and status. Sizes in bytes, times in seconds."""

    __slots__ = ("buckets", "exemplars", "requests", "requests_bytes", "responses_bytes", "seconds")

    def __init__(self, buckets: int) -> None:
        self.requests = 0
        self.requests_bytes = 0
        self.responses_bytes = 0
        self.seconds = 0.0
        self.buckets = [0] * buckets
        # By bucket the last request whose trace can be looked at: trace id, seconds, seconds since the epoch.
        self.exemplars: dict[int, tuple[int, float, float]] = {}

    def merge(self, other: "_Series") -> None:
        """Adds what another one has counted."""
        self.requests += other.requests
        self.requests_bytes += other.requests_bytes
        self.responses_bytes += other.responses_bytes
        self.seconds += other.seconds
        for index, count in enumerate(other.buckets):
            self.buckets[index] += count
        for index, exemplar in list(other.exemplars.items()):
            self.exemplars[index] = max(exemplar, self.exemplars.get(index, exemplar), key=_time_of)


class Tally(Collector):
    """The requests of one process, in plain numbers.

    A request costs one look-up and five additions; the client library's own series cost several times that. It belongs
    to one event loop; reading it from another thread does no harm.

    Args:
        duration_buckets: Upper bounds of ``http_request_duration_highr_seconds``, rising, in seconds.
        route_duration_buckets: Upper bounds of ``http_request_duration_seconds``, likewise.
        status_classes: Whether the label ``status`` says ``2xx``, or else ``200``.
        clock: Where the time of an exemplar comes from.
    """

    def __init__(
        self,
        duration_buckets: tuple[float, ...],
        route_duration_buckets: tuple[float, ...],
        *,
        status_classes: bool = True,
        clock: Clock | None = None,
    ) -> None:
        self._classes = status_classes
        self._step = 100 if status_classes else 1
        self._fine = duration_buckets
        self._coarse = route_duration_buckets
        # Both histograms are sums of these buckets, so a request looks for its bucket once.
        self._bounds = sorted({*self._fine, *self._coarse})
        self._time = (clock or SystemClock()).time
        self._series: dict[tuple[str, str, int], _Series] = {}

    def record(
        self,
        method: str,
        handler: str,
        status: int,
        *,
        seconds: float,
        request_bytes: int = 0,
        response_bytes: int = 0,
        trace_id: int = 0,
    ) -> None:
        """Counts one answered request.

        Args:
            method: One of a closed set; see :func:`method_of`.
            handler: The template of the route, or ``none``.
            status: The status that was sent.
            seconds: From the arrival to the last byte of the answer.
            request_bytes: The length that the request declared.
            response_bytes: The length that the answer declared.
            trace_id: The trace in which the request can be looked at; 0 for none.
        """
        key = (method, handler, status // self._step)
        series = self._series.get(key)
        if series is None:
            series = self._series[key] = _Series(len(self._bounds) + 1)
        series.requests += 1
        series.requests_bytes += request_bytes
        series.responses_bytes += response_bytes
        series.seconds += seconds
        bucket = bisect_left(self._bounds, seconds)
        series.buckets[bucket] += 1
        if trace_id:
            series.exemplars[bucket] = (trace_id, seconds, self._time())

    def describe(self) -> Iterable[Metric]:
        """The names, for the registry, which refuses a second collector of one of them."""
        return _families()

    def collect(self) -> Iterable[Metric]:
        """The series under the names that the instrumentator gives them."""
        families = requests, requests_bytes, responses_bytes, fine, coarse = _families()
        everything = _Series(len(self._bounds) + 1)
        by_handler: dict[str, _Series] = {}
        by_route: dict[tuple[str, str], _Series] = {}
        for (method, handler, status), series in list(self._series.items()):
            shown = status_label(status * self._step, classes=self._classes)
            requests.add_metric((method, shown, handler), series.requests)
            for group in (
                everything,
                by_handler.setdefault(handler, _Series(len(series.buckets))),
                by_route.setdefault((method, handler), _Series(len(series.buckets))),
            ):
                group.merge(series)
        for handler, series in by_handler.items():
            requests_bytes.add_metric((handler,), series.requests, series.requests_bytes)
            responses_bytes.add_metric((handler,), series.requests, series.responses_bytes)
        fine.add_metric((), self._histogram(everything, self._fine), everything.seconds)
        for route, series in by_route.items():
            coarse.add_metric(route, self._histogram(series, self._coarse), series.seconds)
        return families

    def _histogram(self, series: _Series, bounds: tuple[float, ...]) -> list[Any]:
        """Cumulative buckets with these bounds, each with its latest exemplar."""
        buckets: list[Any] = []
        total = first = 0
        for bound in (*bounds, math.inf):
            following = len(self._bounds) + 1 if bound == math.inf else self._bounds.index(bound) + 1
            total += sum(series.buckets[first:following])
            known = [series.exemplars[index] for index in range(first, following) if index in series.exemplars]
            label = "+Inf" if bound == math.inf else str(float(bound))
            if known:
                trace_id, seconds, at = max(known, key=_time_of)
                buckets.append((label, total, Exemplar({"trace_id": f"{trace_id:032x}"}, seconds, at)))
            else:
                buckets.append((label, total))
            first = following
        return buckets


def _time_of(exemplar: tuple[int, float, float]) -> float:
    return exemplar[2]


def status_label(status: int, *, classes: bool) -> str:
    """The status as a label: by its class, such as ``2xx``, or as it is."""
    return f"{status // 100}xx" if classes else str(int(status))


_Families = tuple[
    CounterMetricFamily, SummaryMetricFamily, SummaryMetricFamily, HistogramMetricFamily, HistogramMetricFamily
]


def _families() -> _Families:
    return (
        CounterMetricFamily(*_REQUESTS[:2], labels=_REQUESTS[2]),
        SummaryMetricFamily(*_REQUEST_SIZES[:2], labels=_REQUEST_SIZES[2]),
        SummaryMetricFamily(*_RESPONSE_SIZES[:2], labels=_RESPONSE_SIZES[2]),
        HistogramMetricFamily(*_DURATIONS[:2], labels=_DURATIONS[2]),
        HistogramMetricFamily(*_ROUTE_DURATIONS[:2], labels=_ROUTE_DURATIONS[2]),
    )


class SharedTally:
    """The same series in the client library's own form, whose numbers other processes can read; no exemplars.

    Args:
        duration_buckets: As of :class:`Tally`.
        route_duration_buckets: Likewise.
        status_classes: Likewise.
        registry: Keeps the names.
    """

    def __init__(
        self,
        duration_buckets: tuple[float, ...],
        route_duration_buckets: tuple[float, ...],
        *,
        status_classes: bool = True,
        registry: CollectorRegistry,
    ) -> None:
        self._classes = status_classes
        self._requests = Counter(*_REQUESTS, registry=registry)
        self._request_sizes = Summary(*_REQUEST_SIZES, registry=registry)
        self._response_sizes = Summary(*_RESPONSE_SIZES, registry=registry)
        self._durations = Histogram(*_DURATIONS, buckets=duration_buckets, registry=registry)
        self._route_durations = Histogram(*_ROUTE_DURATIONS, buckets=route_duration_buckets, registry=registry)

    def record(
        self,
        method: str,
        handler: str,
        status: int,
        *,
        seconds: float,
        request_bytes: int = 0,
        response_bytes: int = 0,
        trace_id: int = 0,  # noqa: ARG002 - the files have no place for it
    ) -> None:
        """Counts one answered request; as :meth:`Tally.record`."""
        self._requests.labels(method, status_label(status, classes=self._classes), handler).inc()
        self._request_sizes.labels(handler).observe(request_bytes)
        self._response_sizes.labels(handler).observe(response_bytes)
        self._durations.observe(seconds)
        self._route_durations.labels(method, handler).observe(seconds)


class BoundedCounter:
    """A counter whose labels come from code, and are bounded all the same, for code can be wrong."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._known: dict[tuple[str, ...], Callable[[], None]] = {}

    def count(self, *labels: str) -> None:
        """Adds one to the series of these labels, or of ``_OTHER`` when there are too many."""
        count = self._known.get(labels)
        if count is None:
            if len(self._known) >= _MAX_NAMES:
                labels = (OTHER,) * len(labels)
            count = self._known[labels] = self._counter.labels(*labels).inc
        count()


class Together(Collector):
    """Two registries read as one; of a name that both have, the first counts."""

    def __init__(self, first: CollectorRegistry, second: CollectorRegistry) -> None:
        self._registries = (first, second)

    def collect(self) -> Iterable[Metric]:
        """The series of both."""
        seen = set()
        for registry in self._registries:
            for metric in registry.collect():
                if metric.name not in seen:
                    seen.add(metric.name)
                    yield metric


def is_multiprocess() -> bool:
    """Whether the client library writes to files; it decides that when it is imported."""
    directory = os.environ.get(_MULTIPROCESS_DIRECTORY)
    if directory is None:
        return False
    if not Path(directory).is_dir():
        raise ConfigurationError(
            f"{_MULTIPROCESS_DIRECTORY} names {directory}, which is no directory; make it, empty, before the start"
        )
    if values.ValueClass is values.MutexValue:
        raise ConfigurationError(
            f"{_MULTIPROCESS_DIRECTORY} was set after prometheus_client was imported, which is too late: set it in the "
            "environment of the server"
        )
    return True


def method_of(method: str) -> str:
    """The method as a label: one of HTTP's own, or ``_OTHER``. A client can write anything there."""
    return method if method in _METHODS else OTHER
