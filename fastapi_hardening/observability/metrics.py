"""Counts every request by route, and shows the counts to Prometheus and to nobody else.

It protects from running blind, and from what metrics themselves do wrong: a series for every path that a scanner tries,
until memory is gone; a ``/metrics`` that tells the internet which routes exist and how busy they are. It is *not* a
log: no address, user or raw path is ever a label.

It sits above everything that answers, so that refusals are counted too. The series are those of
``prometheus-fastapi-instrumentator``, by name and label, so that its dashboards keep working; they are written without
matching routes again. The package itself can record instead (``engine = "instrumentator"``). Each application has a
registry of its own; a route is named by its template, a method by a closed set, and everything else shares one name.

Example:
    >>> from fastapi import FastAPI
    >>> from fastapi_hardening.observability.metrics import MetricsMiddleware, MetricsSettings
    >>> app = FastAPI()
    >>> app.add_middleware(MetricsMiddleware, settings=MetricsSettings(token="0123456789abcdef"))
"""

import asyncio
import inspect
import logging
import math
import os
import platform
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Literal, Self

from opentelemetry import trace
from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
    multiprocess,
    start_http_server,
)
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.registry import Collector
from prometheus_fastapi_instrumentator.metrics import Info
from prometheus_fastapi_instrumentator.metrics import default as instrumentators_series
from prometheus_fastapi_instrumentator.middleware import PrometheusInstrumentatorMiddleware
from pydantic import Field, SecretStr, model_validator
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_hardening.core import context as request_context
from fastapi_hardening.core.clock import Clock, SystemClock
from fastapi_hardening.core.configuration import ConcernSettings
from fastapi_hardening.core.events import AttackFound, Events, RequestRefused
from fastapi_hardening.core.headers import RawHeaders, get_all
from fastapi_hardening.core.policy import Guard, allow_private_peers, require_token
from fastapi_hardening.core.problem import Problem, refuse
from fastapi_hardening.core.routes import route_of, route_path, table_of
from fastapi_hardening.core.tally import (
    BoundedCounter,
    SharedTally,
    Tally,
    Together,
    is_multiprocess,
    method_of,
    status_label,
)

logger = logging.getLogger("fastapi_hardening.metrics")

PLAIN = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"

UNMATCHED = "none"
"""The ``handler`` of every path without a route; the instrumentator's word."""

# A length of more digits is no size of a body, and would spoil the sum for ever.
_MAX_DIGITS = 15

_FIRST_SECOND = (0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0)
_LATER = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 7.5, 10.0, 30.0, 60.0)

Instrumentation = Callable[[Info], Awaitable[None] | None]
Watch = Callable[[str, str, float, float, tuple[Scope, int, int]], None]
AbortCause = Literal["disconnect", "cancelled", "exception"]


class MetricsSettings(ConcernSettings):
    """The settings of metrics."""

    engine: Literal["own", "instrumentator"] = "own"
    """What records requests: the layer itself, or the package ``prometheus-fastapi-instrumentator``. Same series."""

    path: str | None = "/metrics"
    """Where they are read; empty serves them nowhere."""

    token: SecretStr | None = None
    """Lets in whoever sends ``Authorization: Bearer`` with it. Without a token, private peers whose request was not
    forwarded are let in."""

    port: int | None = Field(None, ge=1, le=65535)
    """A port of their own, opened while the application runs; the path is then not served. Whoever reaches the port may
    read."""

    port_address: str = "127.0.0.1"
    """The address that the port is bound to; ``0.0.0.0`` for every one of this machine."""

    in_progress: bool = True
    """Whether requests in progress are counted."""

    status_classes: bool = True
    """Whether the label ``status`` says ``2xx``, or else ``200``."""

    exemplars: bool = True
    """Whether durations name the trace of a request that was sampled; shown in the OpenMetrics format only."""

    process: bool = True
    """Whether memory, processor time and garbage collection of the process are shown too."""

    default_registry: bool = False
    """Whether what the application registered with ``prometheus_client``'s default registry is shown too."""

    duration_buckets: tuple[float, ...] = _FIRST_SECOND + _LATER
    """Upper bounds of ``http_request_duration_highr_seconds``, in seconds."""

    route_duration_buckets: tuple[float, ...] = (0.1, 0.5, 1.0)
    """Upper bounds of ``http_request_duration_seconds``, in seconds. Few: each route and method has a series for every
    one of them."""

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.path and not self.path.startswith("/"):
            raise ValueError(f"path {self.path!r} starts with a slash, or is empty to serve nothing")
        if self.token is not None:
            if self.port is not None:
                raise ValueError("token guards the path, and nothing guards a port of its own: leave one of them out")
            require_token(self.token)
        for name in ("duration_buckets", "route_duration_buckets"):
            bounds = getattr(self, name)
            rising = all(low < high for low, high in pairwise(bounds))
            if not bounds or not rising or bounds[0] <= 0 or not math.isfinite(sum(bounds)):
                raise ValueError(f"{name} are numbers of seconds above 0, each greater than the one before")
        return self


# --- engine -----------------------------------------------------------------------------------------------------------


class Recorder:
    """The series of one application, in a registry of their own; reachable as ``handle.metrics``.

    Args:
        settings: What is recorded.
        events: Refusals and other facts to count.
        build: Names and versions of what runs here: the labels of ``hardening_build_info``.
        clock: Where the time comes from.

    Attributes:
        registry: Where series of the application itself belong: ``Counter("orders", "...", registry=...)``.
        multiprocess: Whether several processes write to ``PROMETHEUS_MULTIPROC_DIR`` and are read together.
        requests: What requests are counted in; ``None`` where the instrumentator counts them.
        websockets_open: The websockets that are open.
        functions: What :meth:`add` was given, but for async functions.
        async_functions: The async functions that :meth:`add` was given.
        watch: What is told of each request that has ended: method, handler, seconds, the time; scope, status and trace.

    Raises:
        ConfigurationError: That directory is not there, or was named after ``prometheus_client`` was imported.
    """

    def __init__(
        self,
        settings: MetricsSettings | None = None,
        *,
        events: Events | None = None,
        build: Mapping[str, str] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.settings = settings = settings or MetricsSettings()
        self.multiprocess = settings.enabled and is_multiprocess()
        self.registry = registry = CollectorRegistry()
        self.requests: Tally | SharedTally | None = None
        self.functions: list[Callable[[Info], None]] = []
        self.async_functions: list[Callable[[Info], Awaitable[None]]] = []
        self.watch: Watch | None = None
        buckets = fine, coarse = settings.duration_buckets, settings.route_duration_buckets
        if settings.engine == "instrumentator":
            self.add(instrumentators_series(registry=registry, latency_highr_buckets=fine, latency_lowr_buckets=coarse))
        elif self.multiprocess:
            self.requests = SharedTally(*buckets, status_classes=settings.status_classes, registry=registry)
        else:
            self.requests = Tally(*buckets, status_classes=settings.status_classes, clock=clock)
            registry.register(self.requests)
        self._in_progress = 0
        self._shared_in_progress: Gauge | None = None
        if settings.in_progress:
            in_progress = Gauge(
                "http_requests_inprogress",
                "Requests in progress.",
                registry=registry,
                multiprocess_mode="livesum",
            )
            if self.multiprocess:
                self._shared_in_progress = in_progress
            else:
                in_progress.set_function(lambda: self._in_progress)
        self._aborted = Counter(
            "hardening_responses_aborted",
            "Answers that did not reach their end.",
            ("handler", "cause"),
            registry=registry,
        )
        self._websockets = Counter(
            "hardening_websockets", "Websocket handshakes.", ("handler", "outcome"), registry=registry
        )
        self.websockets_open = Gauge(
            "hardening_websockets_open", "Websockets that are open.", registry=registry, multiprocess_mode="livesum"
        )
        self._describe_process(build or {})
        if events is not None:
            self._count_events(events)

    def _describe_process(self, build: Mapping[str, str]) -> None:
        labels = {**build, "python": platform.python_version()}
        # A gauge, because `Info` does not work with several processes.
        info = Gauge(
            "hardening_build_info",
            "What runs here; always 1.",
            tuple(labels),
            registry=self.registry,
            multiprocess_mode="livemax",
        )
        info.labels(**labels).set(1)
        if self.settings.process and not self.settings.default_registry and not self.multiprocess:
            ProcessCollector(registry=self.registry)
            PlatformCollector(registry=self.registry)
            GCCollector(registry=self.registry)

    def _count_events(self, events: Events) -> None:
        registry = self.registry
        refusals = BoundedCounter(
            Counter("hardening_refusals", "Requests that a layer refused.", ("layer", "problem"), registry=registry)
        )
        facts = BoundedCounter(Counter("hardening_events", "Facts that concerns told.", ("event",), registry=registry))
        attacks = BoundedCounter(
            Counter("hardening_attacks", "Attacks found, by class.", ("kind", "refused"), registry=registry)
        )
        events.subscribe(AttackFound, lambda found: attacks.count(found.kind, str(found.refused).lower()))
        events.subscribe(RequestRefused, lambda refusal: refusals.count(refusal.layer, refusal.problem))
        events.subscribe(object, lambda event: facts.count(type(event).__name__))

    def add(self, *functions: Instrumentation | None) -> Self:
        """Has functions written for the instrumentator called with its ``Info`` after every answer.

        A function that makes series takes the registry: ``metrics.latency(registry=handle.metrics.registry)``. May be
        called at any time; ``None``, which such a maker gives for series that exist already, is passed over.
        """
        for function in functions:
            if inspect.iscoroutinefunction(function):
                self.async_functions.append(function)
            elif function is not None:
                self.functions.append(function)  # type: ignore[arg-type]
        return self

    def enter(self) -> None:
        """Counts a request in progress."""
        self._in_progress += 1
        if self._shared_in_progress is not None:
            self._shared_in_progress.inc()

    def leave(self) -> None:
        """Ends what :meth:`enter` began."""
        self._in_progress -= 1
        if self._shared_in_progress is not None:
            self._shared_in_progress.dec()

    def record_aborted(self, handler: str, cause: AbortCause) -> None:
        """Writes that an answer did not reach its end."""
        self._aborted.labels(handler, cause).inc()

    def record_websocket(self, handler: str, outcome: Literal["accepted", "refused", "failed"]) -> None:
        """Writes how a websocket's handshake ended."""
        self._websockets.labels(handler, outcome).inc()

    def collector(self) -> Collector:
        """Everything that is shown: of this process, or of all that write to the multiprocess directory."""
        if self.multiprocess:
            together = CollectorRegistry()
            multiprocess.MultiProcessCollector(together)  # type: ignore[no-untyped-call]
            return together
        return Together(self.registry, REGISTRY) if self.settings.default_registry else self.registry

    def expose(self, *, openmetrics: bool = False) -> bytes:
        """The text that Prometheus reads; takes milliseconds, so not on the event loop."""
        generate: Callable[[Collector], bytes] = generate_openmetrics if openmetrics else generate_latest
        return generate(self.collector())

    @contextmanager
    def serving(self) -> Iterator[None]:
        """While the block runs, the port is open if one is set; at its end this process no longer counts as live."""
        server = None
        if self.settings.enabled and self.settings.port is not None:
            try:
                server, _ = start_http_server(self.settings.port, self.settings.port_address, self.collector())
            except OSError as error:
                logger.log(
                    logging.INFO if self.multiprocess else logging.ERROR,
                    "this process does not serve metrics: port %d of %s cannot be opened (%s). Several workers cannot "
                    "share it: set PROMETHEUS_MULTIPROC_DIR, and the one that has the port answers for all",
                    self.settings.port,
                    self.settings.port_address,
                    error,
                )
        try:
            yield
        finally:
            if server is not None:
                server.shutdown()
                server.server_close()
            if self.multiprocess:
                multiprocess.mark_process_dead(os.getpid())  # type: ignore[no-untyped-call]


def declared_length(headers: Iterable[tuple[bytes, bytes]]) -> int:
    """The ``Content-Length`` in bytes; 0 where there is none or it cannot be one."""
    for name, value in headers:
        if len(name) == 14 and name.lower() == b"content-length":  # noqa: PLR2004 - spares the others `lower`
            return int(value) if value.isdigit() and len(value) <= _MAX_DIGITS else 0
    return 0


def accepts_openmetrics(accept: Iterable[bytes]) -> bool:
    """Whether ``Accept`` prefers OpenMetrics 1.0 to plain text (RFC 9110, section 12.5.1).

    Example:
        >>> accepts_openmetrics([b"application/openmetrics-text;version=1.0.0;q=0.6,text/plain;q=0.4"])
        True
        >>> accepts_openmetrics([b"text/plain, application/openmetrics-text;q=0.5"])
        False
    """
    openmetrics = plain = 0.0
    for choice in b",".join(accept).decode("latin-1").lower().split(","):
        kind, *parameters = (part.strip() for part in choice.split(";"))
        said = dict(parameter.partition("=")[::2] for parameter in parameters)
        try:
            quality = float(said.get("q", "1"))
        except ValueError:
            continue
        if kind == "application/openmetrics-text" and said.get("version", "1.0.0") == "1.0.0":
            openmetrics = max(openmetrics, quality)
        elif kind == "text/plain":
            plain = max(plain, quality)
    return openmetrics > 0 and openmetrics >= plain


def sampled_trace() -> int:
    """The trace of the current span if it is sampled, else 0: what is not kept cannot be looked at."""
    current = trace.get_current_span()
    if current is trace.INVALID_SPAN:
        return 0
    span = current.get_span_context()
    return span.trace_id if span.trace_flags & trace.TraceFlags.SAMPLED else 0


# --- layer ------------------------------------------------------------------------------------------------------------


class MetricsMiddleware:
    """Records every request and websocket, and answers the path where the metrics are read.

    A route of the application with exactly that path wins, with one notice in the log. The port of their own, if set,
    is open while the lifespan runs.

    Args:
        app: The application inside.
        settings: What is recorded, and who may read it.
        recorder: Where it is recorded; by default one of this layer's own, with its settings.
        instrumentations: Functions for :meth:`Recorder.add`.
        guard: Decides who may read; by default the token of the settings, else private peers.
        fields: Adds the header fields that every answer has.
        clock: Where the time comes from.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: MetricsSettings | None = None,
        *,
        recorder: Recorder | None = None,
        instrumentations: Iterable[Instrumentation] = (),
        guard: Guard | None = None,
        fields: Callable[[RawHeaders, Scope], RawHeaders] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.recorder = recorder = (recorder or Recorder(settings, clock=clock)).add(*instrumentations)
        settings = recorder.settings
        self._enabled = settings.enabled
        now = (clock or SystemClock()).monotonic
        tally = recorder.requests
        self._tally = tally
        self._now = now
        self.app: ASGIApp = _Instrumentator(app, recorder) if tally is None and self._enabled else app
        self._path = settings.path if settings.port is None else None
        self._guard = guard or metrics_guard(settings)
        self._fields = fields
        self._told = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        kind = scope["type"]
        if kind not in ("http", "websocket") or not self._enabled:
            with self.recorder.serving() if kind == "lifespan" else nullcontext():
                await self.app(scope, receive, send)
            return
        if kind == "http" and self._path and scope["path"].endswith(self._path) and self._is_asked(scope):
            await self._answer(scope, receive, send)
            return
        exchange: _Exchange | _Handshake
        if kind == "websocket":
            exchange = _Handshake(self.recorder, scope)
        elif self._tally is None:
            await self.app(scope, receive, send)
            return
        else:
            exchange = _Exchange(self.recorder, scope, self._tally, self._now)

        async def send_and_record(message: Message) -> None:
            await send(message)
            more = exchange.sent(message)
            if more is not None:
                await more

        try:
            await self.app(scope, receive, send_and_record)
        except BaseException as exception:
            await (exchange.end(exception) or _nothing())
            raise
        more = exchange.end(None)
        if more is not None:
            await more

    def _is_asked(self, scope: Scope) -> bool:
        """Whether this request reads the metrics, and the application has no route of its own there."""
        if (
            scope["method"] not in ("GET", "HEAD")
            or route_path(scope["path"], scope.get("root_path", "")) != self._path
        ):
            return False
        app = scope.get("app")
        if app is None or table_of(app).find(scope).template != self._path:
            return True
        if not self._told:
            self._told = True
            logger.warning("%s is a route of the application, so the metrics are not served there", self._path)
        return False

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        fields = self._fields

        async def send_with_fields(message: Message) -> None:
            if fields is not None and message["type"] == "http.response.start":
                message["headers"] = fields(list(message["headers"]), scope)
            await send(message)

        try:
            await self._guard(HTTPConnection(scope))
        except Problem as problem:
            await refuse(problem, scope, receive, send_with_fields, layer="metrics")
            return
        # Of several processes older client libraries write invalid OpenMetrics, and none writes exemplars.
        openmetrics = not self.recorder.multiprocess and accepts_openmetrics(get_all(scope["headers"], b"accept"))
        # Thousands of series take milliseconds to write, which the requests must not wait for.
        body = await asyncio.to_thread(self.recorder.expose, openmetrics=openmetrics)
        headers: RawHeaders = [
            (b"content-type", (OPENMETRICS if openmetrics else PLAIN).encode("ascii")),
            (b"content-length", str(len(body)).encode("ascii")),
            (b"cache-control", b"no-store"),
        ]
        await send_with_fields({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})


def metrics_guard(settings: MetricsSettings) -> Guard:
    """Who may read the metrics, as the settings say."""
    return allow_private_peers if settings.token is None else require_token(settings.token)


async def _nothing() -> None:
    """What is awaited where nothing is."""


# What can end an answer; a file may be handed to the server by its path.
_LAST = frozenset({"http.response.body", "http.response.pathsend", "http.response.zerocopysend"})


class _Exchange:
    """One request on its way to being recorded, once: at the last byte, or where the answer ends before it."""

    __slots__ = (
        *(
            "_answer",
            "_ended",
            "_fields",
            "_functions",
            "_handler",
            "_method",
            "_now",
            "_recorder",
            "_scope",
            "_seconds",
        ),
        *("_seconds_to_start", "_started", "_tally"),
    )

    def __init__(self, recorder: Recorder, scope: Scope, tally: Tally | SharedTally, now: Callable[[], float]) -> None:
        self._recorder = recorder
        self._tally = tally
        self._scope = scope
        self._now = now
        self._method = method_of(scope["method"])
        context = request_context.ensure(scope)
        self._handler = (context.route or route_of(scope)).template or UNMATCHED
        self._fields = context.fields
        self._functions = recorder.functions or recorder.async_functions
        self._answer: Message | None = None
        self._seconds_to_start = 0.0
        self._ended = False
        recorder.enter()
        self._started = now()

    def sent(self, message: Message) -> Awaitable[None] | None:
        """Takes note of what was sent; what is to be awaited now, if anything."""
        kind = message["type"]
        if kind == "http.response.start":
            self._answer = message
            if self._functions:
                self._seconds_to_start = self._now() - self._started
        elif kind in _LAST and not message.get("more_body") and not self._ended:
            return self._record()
        return None

    def end(self, exception: BaseException | None) -> Awaitable[None] | None:
        """Takes note that the application is done, at its last byte or before; what is to be awaited then."""
        if self._ended:
            return None
        unanswered = self._answer is None
        if isinstance(exception, ClientDisconnect) or (isinstance(exception, OSError) and not unanswered):
            cause: AbortCause = "disconnect"
        elif isinstance(exception, Exception):
            cause = "exception"
        else:
            # What returns early was told that the client is gone; what is ended from outside was cancelled.
            cause = "disconnect" if exception is None else "cancelled"
        if cause != "exception" or not unanswered:
            self._recorder.record_aborted(self._handler, cause)
        return self._record()

    def _record(self) -> Awaitable[None] | None:
        self._ended = True
        now = self._now()
        self._seconds = now - self._started
        self._recorder.leave()
        status, headers = self._status_and_headers()
        trace_id = sampled_trace() if self._recorder.settings.exemplars else 0
        self._tally.record(
            self._method,
            self._handler,
            status,
            seconds=self._seconds,
            request_bytes=self._declared(),
            response_bytes=declared_length(headers),
            trace_id=trace_id,
        )
        watch = self._recorder.watch
        if watch is not None:
            watch(self._method, self._handler, self._seconds, now, (self._scope, status, trace_id))
        return self._call_functions() if self._functions else None

    def _declared(self) -> int:
        """The length that the request declares."""
        fields = self._fields
        if fields is not None and b"content-length" not in fields:
            return 0
        return declared_length(self._scope["headers"])

    def _status_and_headers(self) -> tuple[int, Iterable[tuple[bytes, bytes]]]:
        answer = self._answer
        # Whatever is not answered, the server answers with 500.
        return (500, ()) if answer is None else (answer["status"], answer.get("headers") or ())

    async def _call_functions(self) -> None:
        """Calls what was added to the recorder; what they raise is logged and reaches nobody."""
        status, headers = self._status_and_headers()
        info = Info(
            request=Request(self._scope),
            response=Response(b"", status_code=status, headers=Headers(raw=list(headers))),
            method=self._method,
            modified_handler=self._handler,
            modified_status=status_label(status, classes=self._recorder.settings.status_classes),
            modified_duration=self._seconds,
            modified_duration_without_streaming=self._seconds_to_start,
        )
        for function in (*self._recorder.functions, *self._recorder.async_functions):
            try:
                told = function(info)
                if told is not None:
                    await told
            except Exception:
                logger.exception("a function added to the metrics failed: %r", function)


class _Handshake:
    """One websocket, recorded when its handshake is over."""

    __slots__ = ("_handler", "_outcome", "_recorder")

    def __init__(self, recorder: Recorder, scope: Scope) -> None:
        self._recorder = recorder
        self._handler = route_of(scope).template or UNMATCHED
        self._outcome: Literal["accepted", "refused"] | None = None

    def sent(self, message: Message) -> None:
        """Takes note of what was sent."""
        if self._outcome is None:
            self._outcome = "accepted" if message["type"] == "websocket.accept" else "refused"
            self._recorder.record_websocket(self._handler, self._outcome)
            if self._outcome == "accepted":
                self._recorder.websockets_open.inc()

    def end(self, _exception: BaseException | None) -> None:
        """Takes note that the websocket is over."""
        if self._outcome is None:
            self._recorder.record_websocket(self._handler, "failed")
        elif self._outcome == "accepted":
            self._recorder.websockets_open.dec()


# --- the package ------------------------------------------------------------------------------------------------------


class _Instrumentator(PrometheusInstrumentatorMiddleware):
    """The package's own middleware, with its holes closed: it is told the route and shown nothing a client made up."""

    def __init__(self, app: ASGIApp, recorder: Recorder) -> None:
        super().__init__(
            _Unchanged(app),
            should_group_status_codes=recorder.settings.status_classes,
            instrumentations=recorder.functions,
            async_instrumentations=recorder.async_functions,
            registry=recorder.registry,
        )
        self._recorder = recorder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Asked here, so that the copy shares the context that keeps the answer.
        route_of(scope)
        # Counted here, because the package's own gauge would go to the default registry.
        self._recorder.enter()
        try:
            await super().__call__(_harmless(scope), receive, send)
        finally:
            self._recorder.leave()

    def _get_handler(self, request: Request) -> tuple[str, bool]:
        template = route_of(request.scope).template
        return template or UNMATCHED, bool(template)


class _Unchanged:
    """Gives the application the scope as it came."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope.get(_AS_IT_CAME, scope), receive, send)


_AS_IT_CAME = "fastapi_hardening.metrics.scope"


def _harmless(scope: Scope) -> Scope:
    """The scope, or a copy where its method or length would make a new series, or an error after the answer."""
    method = method_of(scope["method"])
    lengths = get_all(scope["headers"], b"content-length")
    if method == scope["method"] and all(value.isdigit() and len(value) <= _MAX_DIGITS for value in lengths):
        return scope
    headers = [pair for pair in scope["headers"] if pair[0] != b"content-length"]
    return {**scope, "method": method, "headers": headers, _AS_IT_CAME: scope}
