"""Prints what hardening costs, beside the packages that are assembled by hand for the same job.

    scripts/bench                       everything, in under six minutes
    scripts/bench --quick               the same with fewer rounds, in under a minute
    scripts/bench --only layers         one part (may be given several times)

Two measurements of one thing on a shared machine differ by more than what is measured here. So nothing is measured
twice in a row: in every short round each application answers the same few requests, in a new order, and only the
differences to the bare application within a round count. Ours and each stack of peers have rounds of their own, because
slowapi and OpenTelemetry start threads, which would slow whoever is measured beside them. What is printed is the median
of the differences, with the interval in which 95 % of the medians lie that other rounds could have given (bootstrap).
The row «bare again» is a second bare application: what it shows is noise.

Time is the CPU time of this process, but for the requests through uvicorn, where it is the time on the wall.
"""

import argparse
import asyncio
import gc
import importlib.metadata
import json
import logging
import math
import os
import platform
import random
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from itertools import chain
from pathlib import Path
from types import MethodType
from typing import Any, Literal, NamedTuple

import uvicorn
from asgi_correlation_id import CorrelationIdMiddleware
from fastapi import APIRouter, FastAPI, Request, Response
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, Sampler
from prometheus_client import CollectorRegistry
from prometheus_fastapi_instrumentator import Instrumentator
from secure.middleware import SecureASGIMiddleware
from slowapi import Limiter as SlowapiLimiter
from slowapi.middleware import SlowAPIASGIMiddleware
from slowapi.util import get_remote_address
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope

from fastapi_hardening import Settings, harden
from fastapi_hardening.core.clock import ManualClock
from fastapi_hardening.core.window import Limit, Limiter, Strategy
from fastapi_hardening.harden import INBOUND

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "performance.md"
BLOCK = re.compile(r"(<!-- benchmark -->\n).*?(<!-- end of benchmark -->)", re.DOTALL)

ROUTES = (10, 40, 200, 600)
ROUTES_A_ROUTER = 10
HOST = "shop.example"
ORIGIN = "https://app.example"
NEVER_REACHED = "1000000000/minute"

# The share of the whole that each layer may take, in microseconds a request; the page of the documentation says why.
BUDGET_US: Mapping[str, float] = {
    "probes": 0.7,
    "request context": 5.0,
    "access log": 9.0,
    "metrics": 5.0,
    "tracing": 1.0,
    "security headers": 4.0,
    "CORS": 1.5,
    "errors": 1.5,
    "drain": 0.5,
    "load shedding": 1.0,
    "request limits": 3.0,
    "address limit": 2.0,
    "version": 1.0,
    "authentication": 1.0,
    "tenancy": 1.0,
    "rate limit": 5.0,
    "input validation": 5.0,
    "timeout": 3.0,
    "idempotency": 0.5,
    "compression": 1.0,
    "response cache": 1.0,
}


# --- the applications -------------------------------------------------------------------------------------------------

Placement = Literal["direct", "included"]


def bare(routes: int = 40, placement: Placement = "direct") -> FastAPI:
    """An application with so many routes, all its own or on included routers of ten."""
    app = FastAPI()
    targets: list[tuple[FastAPI | APIRouter, range]] = [(app, range(routes))]
    if placement == "included":
        numbers = range(0, routes, ROUTES_A_ROUTER)
        targets = [(APIRouter(), range(first, min(first + ROUTES_A_ROUTER, routes))) for first in numbers]
    for target, numbers in targets:
        for number in numbers:
            target.get(f"/things{number}/{{thing_id}}")(_read)
        if isinstance(target, APIRouter):
            app.include_router(target, prefix="/api")
    return app


async def _read(thing_id: str) -> dict[str, str]:
    return {"id": thing_id, "name": "a thing"}


def path_of(routes: int = 40, placement: Placement = "direct") -> str:
    """The path of the route in the middle."""
    return f"{'/api' if placement == 'included' else ''}/things{routes // 2}/42"


def receiving() -> FastAPI:
    """An application that takes an upload and throws it away."""
    app = FastAPI()

    @app.post("/upload")
    async def upload(request: Request) -> dict[str, int]:
        return {"bytes": sum([len(chunk) async for chunk in request.stream()])}

    return app


def settings(**more: Any) -> Settings:
    """The default list; told what the peers are told, and with limits that the benchmark does not reach."""
    known: dict[str, Any] = {
        "allowed_hosts": [HOST],
        "cors": {"allow_origins": [ORIGIN]},
        "address_limit": {"limit": NEVER_REACHED},
        "rate_limit": {"default": NEVER_REACHED},
    }
    return Settings(**known | more)


def hardened(app: FastAPI, **more: Any) -> FastAPI:
    """The application after one call."""
    harden(app, settings(**more))
    return app


def with_layers(app: FastAPI, names: set[str]) -> FastAPI:
    """The application inside these layers alone, each built by its slot."""
    # The whole router is asked, as in the bare application: what the table saves there is no layer's.
    handle = harden(app, settings(routing={"fast": False}))
    inner = MethodType(FastAPI.build_middleware_stack, app)

    def build() -> ASGIApp:
        stack: ASGIApp = inner()
        for slot in reversed(INBOUND):
            if slot.build is not None and slot.name in names:
                stack = slot.build(handle, stack)
        return stack

    app.build_middleware_stack = build  # type: ignore[method-assign]
    return app


# --- the peers, as their documentation has them added -----------------------------------------------------------------


async def _log_request(request: Request, call_next: RequestResponseEndpoint) -> Response:
    started = time.perf_counter()
    response = await call_next(request)
    milliseconds = (time.perf_counter() - started) * 1000
    peer = request.client.host if request.client else "-"
    logging.getLogger("peers.access").info(
        "%s %s %s %s %.2fms", peer, request.method, request.url.path, response.status_code, milliseconds
    )
    return response


class _Stdout(logging.StreamHandler[Any]):
    """Writes to what standard output is now."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stdout
        super().emit(record)


def _access_log(app: FastAPI) -> None:
    log = logging.getLogger("peers.access")
    if not log.handlers:
        handler = _Stdout()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False
    app.add_middleware(BaseHTTPMiddleware, dispatch=_log_request)


def _slowapi(app: FastAPI) -> None:
    app.state.limiter = SlowapiLimiter(key_func=get_remote_address, default_limits=[NEVER_REACHED])
    app.add_middleware(SlowAPIASGIMiddleware)


def _instrumentator(app: FastAPI) -> None:
    Instrumentator(registry=CollectorRegistry()).instrument(app)


class _NoExporter(SpanExporter):
    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:  # noqa: ARG002
        return SpanExportResult.SUCCESS


_providers: list[TracerProvider] = []


def _opentelemetry(app: FastAPI, sampler: Sampler) -> None:
    provider = TracerProvider(sampler=sampler)
    _providers.append(provider)
    provider.add_span_processor(BatchSpanProcessor(_NoExporter()))
    FastAPIInstrumentor.instrument_app(app, tracer_provider=provider)


def end_threads() -> None:
    """Ends the threads of OpenTelemetry, so that they do not slow what is measured next."""
    while _providers:
        _providers.pop().shutdown()


class Peer(NamedTuple):
    """A package, and how it is put on an application."""

    name: str
    add: Callable[[FastAPI], None]


# By the slot that does the same job; the innermost first, as ``add_middleware`` wants it.
PEERS: dict[str, Peer] = {
    "rate limit": Peer("slowapi, `SlowAPIASGIMiddleware`", _slowapi),
    "request limits": Peer(
        "Starlette, `TrustedHostMiddleware`",
        lambda app: app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST]),
    ),
    "CORS": Peer("Starlette, `CORSMiddleware`", lambda app: app.add_middleware(CORSMiddleware, allow_origins=[ORIGIN])),
    "security headers": Peer("secure, `SecureASGIMiddleware`", lambda app: app.add_middleware(SecureASGIMiddleware)),
    "metrics": Peer("prometheus-fastapi-instrumentator", _instrumentator),
    "access log": Peer("a `BaseHTTPMiddleware` that logs a line", _access_log),
    "request context": Peer("asgi-correlation-id", lambda app: app.add_middleware(CorrelationIdMiddleware)),
}
TRACING = Peer("opentelemetry-instrumentation-fastapi, not sampled", partial(_opentelemetry, sampler=ALWAYS_OFF))
TRACING_SAMPLED = Peer("opentelemetry-instrumentation-fastapi, sampled", partial(_opentelemetry, sampler=ALWAYS_ON))


def assembled(app: FastAPI, *more: Peer) -> FastAPI:
    """The application with the peers around it."""
    for peer in (*PEERS.values(), *more):
        peer.add(app)
    return app


# --- requests in process ----------------------------------------------------------------------------------------------

FIELDS = {
    "host": HOST,
    "user-agent": "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0",
    "accept": "application/json, text/plain, */*",
    "accept-language": "en-GB,en;q=0.7",
    "accept-encoding": "gzip, deflate, br",
    "origin": ORIGIN,
    "connection": "keep-alive",
    "cookie": "theme=dark",
}
Serve = Callable[[int], Awaitable[None]]


def scope_of(path: str, method: str = "GET", **fields: str) -> Scope:
    """What a server makes of a request."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in (FIELDS | fields).items()],
        "client": ("203.0.113.9", 50000),
        "server": ("127.0.0.1", 8000),
        "extensions": {},
    }


async def _no_body() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


async def _ignore(_message: Message) -> None:
    pass


def serving(app: ASGIApp, scope: Scope, receive: Callable[[], Receive] = lambda: _no_body) -> Serve:
    """What has an application answer a request so many times."""

    async def serve(times: int) -> None:
        for _ in range(times):
            await app(dict(scope), receive(), _ignore)

    return serve


async def answers(app: ASGIApp, scope: Scope, receive: Receive = _no_body) -> None:
    """Makes sure that an application does what is measured.

    Raises:
        RuntimeError: It answers something else than 200.
    """
    seen: list[int] = []

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            seen.append(message["status"])

    await app(dict(scope), receive, send)
    if seen != [200]:
        raise RuntimeError(f"{scope['method']} {scope['path']} is answered with {seen}, not with 200")


# --- rounds and what follows from them --------------------------------------------------------------------------------

Rounds = dict[str, list[float]]
_dice = random.Random(20)  # noqa: S311 - orders and resamples


@contextmanager
def quiet_collector() -> Iterator[None]:
    """Keeps the garbage collector from walking the applications; what requests leave behind it still collects."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


async def in_turn(
    variants: Mapping[str, Serve], seconds: float, *, slice_seconds: float = 0.002, at_least: int = 16
) -> Rounds:
    """The microseconds of CPU time a request, round by round; the first variant is the cheapest and sets the number."""
    for serve in variants.values():
        await serve(3)
    times = max(at_least, round(slice_seconds * 1e6 / await _microseconds(next(iter(variants.values())), 20)))
    rounds: Rounds = {name: [] for name in variants}
    order = list(variants)
    ends = time.monotonic() + seconds
    with quiet_collector():
        while time.monotonic() < ends or len(rounds[order[0]]) < MIN_ROUNDS:
            _dice.shuffle(order)
            for name in order:
                # What ran before has filled the processor's caches with something else; a server runs one application.
                await variants[name](1 + times // 4)
                rounds[name].append(await _microseconds(variants[name], times))
    return rounds


MIN_ROUNDS = 5


async def _microseconds(serve: Serve, times: int) -> float:
    started = time.process_time()
    await serve(times)
    return (time.process_time() - started) * 1e6 / times


class Estimate(NamedTuple):
    """A value, and the interval in which 95 % of the values lie that other rounds could have given."""

    value: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        return f"{self.value:{spec}} ({self.low:{spec}} to {self.high:{spec}})"


RESAMPLES = 500


def estimate(statistic: Callable[..., float], *columns: Sequence[float]) -> Estimate:
    """A statistic of the rounds, with its interval; what belongs to one round stays together."""
    number = len(columns[0])
    resampled = []
    for _ in range(RESAMPLES):
        picked = _dice.choices(range(number), k=number)
        resampled.append(statistic(*([column[index] for index in picked] for column in columns)))
    resampled.sort()
    low, high = resampled[RESAMPLES // 40], resampled[-1 - RESAMPLES // 40]
    return Estimate(statistic(*columns), low, high)


def _minus(rounds: Rounds, name: str, other: str = "bare") -> list[float]:
    return [a - b for a, b in zip(rounds[name], rounds[other], strict=True)]


def added(rounds: Rounds, name: str, to: str = "bare") -> Estimate:
    """The microseconds that a variant takes longer than another."""
    return estimate(statistics.median, _minus(rounds, name, to))


def share(rounds: Rounds, name: str, of: str = "bare") -> Estimate:
    """The percentage of another variant's throughput that a variant keeps."""
    return estimate(statistics.median, [100 * b / a for a, b in zip(rounds[name], rounds[of], strict=True)])


def quotient(above: Sequence[float], below: Sequence[float]) -> Estimate:
    """How many times what is added in some rounds is of what is added in others."""

    def of(above: Sequence[float], below: Sequence[float]) -> float:
        divisor = statistics.median(below)
        return statistics.median(above) / divisor if divisor > 0 else float("inf")

    resampled = sorted(
        of(_dice.choices(above, k=len(above)), _dice.choices(below, k=len(below))) for _ in range(RESAMPLES)
    )
    return Estimate(of(above, below), resampled[RESAMPLES // 40], resampled[-1 - RESAMPLES // 40])


# --- the report -------------------------------------------------------------------------------------------------------


class Goal(NamedTuple):
    """What is to be reached, and what was."""

    text: str
    result: str
    reached: bool


@dataclass
class Report:
    """The parts in Markdown, and the goals that they speak about."""

    quick: bool
    goals: list[Goal] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def goal(self, text: str, result: str, *, reached: bool) -> None:
        """Puts a result beside its goal."""
        self.goals.append(Goal(text, result, reached))

    def section(self, title: str, text: str) -> None:
        """Begins a part."""
        self.lines += ["", f"### {title}", "", text]

    def table(self, *head: str, rows: Sequence[Sequence[str]]) -> None:
        """A table; what is not in the first column is a number."""
        self.lines += ["", _row(head), _row(["---"] + ["---:"] * (len(head) - 1)), *map(_row, rows)]

    def seconds(self, whole: float, quick: float) -> float:
        """How long to measure."""
        return quick if self.quick else whole

    def __str__(self) -> str:
        goals = [(text, result, "reached" if reached else "**not reached**") for text, result, reached in self.goals]
        lines = [_versions(), ""]
        if goals:
            lines += [_row(("goal", "result", "")), _row(("---", "---:", "---")), *map(_row, goals)]
        return "\n".join([*lines, *self.lines]) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


PACKAGES = (
    "fastapi starlette pydantic uvicorn httptools h11 uvloop slowapi secure asgi-correlation-id prometheus-client "
    "prometheus-fastapi-instrumentator opentelemetry-sdk opentelemetry-instrumentation-fastapi"
)


def _versions() -> str:
    names = [f"{name} {_version(name)}" for name in PACKAGES.split()]
    python = f"{platform.python_implementation()} {platform.python_version()}"
    return (
        f"Measured on {datetime.now(UTC):%d %B %Y}: {python}, {platform.system()} on {platform.machine()} with "
        f"{os.cpu_count()} CPUs, {', '.join(names)}."
    )


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def progress(text: str) -> None:
    """Says what is going on, where it is not in the way of the report."""
    print(f"  {text}", file=sys.stderr, flush=True)


# --- the parts --------------------------------------------------------------------------------------------------------

GOAL_ROUTES = 40
KEPT = 70.0
TIMES_LESS = 10.0
GROWTH_US = 5.0
KEPT_BY_SERVER = 85.0
KEPT_BY_UPLOAD = 97.0
DECISION_US = 2.0
BYTES_A_KEY = 200.0


async def stack(report: Report) -> None:
    """The whole list beside the whole stack of peers."""
    handle = harden(bare(), settings())
    on = [layer.name for layer in handle.pipeline if layer.state == "on"]
    report.section(
        "The whole list",
        f"Layers that were on: {', '.join(on)}. «Added» is CPU time on top of the bare application, in microseconds a "
        "request; «keeps» is throughput. The peers are slowapi, secure, CORS, trusted host, "
        "prometheus-fastapi-instrumentator, asgi-correlation-id and an access log on `BaseHTTPMiddleware`.",
    )
    rows = []
    for routes in (few for few in ROUTES if not report.quick or few != ROUTES[2]):
        for placement in ("direct", "included"):
            progress(f"{routes} routes, {placement}")
            rows += await _stack_of(report, routes, placement)
    report.table("application", "µs", "added µs", "keeps %", "adds, times ours", rows=rows)


async def _stack_of(report: Report, routes: int, placement: Placement) -> list[list[str]]:
    groups: list[dict[str, Callable[[FastAPI], FastAPI]]] = [
        {"bare again": lambda app: app, "hardened": hardened},
        {"peers": assembled},
        {"peers, OpenTelemetry not sampled": lambda app: assembled(app, TRACING)},
        {"peers, OpenTelemetry sampled": lambda app: assembled(app, TRACING_SAMPLED)},
    ]
    scope = scope_of(path_of(routes, placement))
    rows = [[f"**{routes} routes, {placement}**", "", "", "", ""]]
    ours: list[float] = []
    for group in groups:
        applications = {"bare": bare(routes, placement)}
        applications |= {name: make(bare(routes, placement)) for name, make in group.items()}
        for app in applications.values():
            await answers(app, scope)
        variants = {name: serving(app, scope) for name, app in applications.items()}
        rounds = await in_turn(variants, report.seconds(3, 0.25))
        end_threads()
        ours = ours or _minus(rounds, "hardened")
        if "hardened" in group:
            rows.append(["bare", f"{statistics.median(rounds['bare']):.1f}", "", "", ""])
        for name in group:
            row = [name, f"{statistics.median(rounds[name]):.1f}", f"{added(rounds, name):.1f}"]
            times = quotient(_minus(rounds, name), ours)
            rows.append([*row, f"{share(rounds, name):.0f}", _times(times) if name.startswith("peers") else ""])
            if routes == GOAL_ROUTES and name == "hardened":
                kept = share(rounds, name)
                text = f"{routes} routes, {placement}: keeps at least {KEPT:.0f} % of bare throughput"
                report.goal(text, f"{kept:.0f} %", reached=kept.value >= KEPT)
            elif routes == GOAL_ROUTES and name == "peers":
                text = f"{routes} routes, {placement}: adds at least {TIMES_LESS:.0f} times less than the peers"
                report.goal(
                    f"{text} without OpenTelemetry", f"{_times(times)} times", reached=times.value >= TIMES_LESS
                )
    return rows


def _times(times: Estimate) -> str:
    """How many times more the peers add; there is no such number where hardening adds nothing."""
    return "ours adds nothing" if math.isinf(times.value) else f"{times:.1f}"


async def growth(report: Report) -> None:
    """What is added at 600 routes, less what is added at 10, in the same rounds."""
    few, many = ROUTES[0], ROUTES[-1]
    report.section(
        "Growth with the number of routes",
        f"What hardening adds at {many} routes, less what it adds at {few}, in microseconds a request; they "
        f"take turns in the same rounds. With an early route, the sixth, the router has as little to do as at {few}: "
        "what grows there is ours. With the route in the middle the bare router asks half of all routes, and the "
        "hardened one the few that can match (`routing.fast`), so what is added may be less than nothing. «Bare again» "
        "is noise.",
    )
    rows = []
    for placement in ("direct", "included"):
        progress(f"growth from {few} to {many} routes, {placement}")
        for target, of in (("the middle", many), ("an early one", few)):
            ours, noise = await _growth_of(report, few, many, placement, path_of(of, placement))
            rows.append([f"{placement}, {target}", f"{ours:.1f}", f"{noise:.1f}"])
            if of == many:
                text = f"{placement} routes: adds less than {GROWTH_US:.0f} µs more at {many} routes than at {few}"
                report.goal(text, f"{ours:.1f} µs", reached=ours.value < GROWTH_US)
    report.table("route", "hardened", "bare again", rows=rows)


async def _growth_of(report: Report, few: int, many: int, placement: Placement, path: str) -> tuple[Estimate, Estimate]:
    variants = {}
    for routes, requested in ((few, path_of(few, placement)), (many, path)):
        for name, harden_it in (("bare", False), ("again", False), ("hardened", True)):
            app = bare(routes, placement)
            app = hardened(app) if harden_it else app
            await answers(app, scope_of(requested))
            variants[f"{name} {routes}"] = serving(app, scope_of(requested))
    rounds = await in_turn(variants, report.seconds(14, 0.9))

    def difference(name: str) -> Estimate:
        above = _minus(rounds, f"{name} {many}", f"bare {many}")
        below = _minus(rounds, f"{name} {few}", f"bare {few}")
        return estimate(statistics.median, [a - b for a, b in zip(above, below, strict=True)])

    return difference("hardened"), difference("again")


async def layers(report: Report) -> None:
    """Each layer alone, beside its peer alone."""
    handle = harden(bare(), settings())
    on = [slot for slot in INBOUND if handle.state_of(slot) == "on"]
    context = next(slot for slot in INBOUND if slot.setting == "request_id")
    peers = PEERS | {"tracing": TRACING}
    applications = {"bare": bare(), "bare again": bare()}
    applications["context"] = with_layers(bare(), {context.name})
    above = {}
    for slot in on:
        # What stands further in finds the request's context made; it would make one by itself otherwise.
        above[slot.name] = "context" if INBOUND.index(slot) > INBOUND.index(context) else "bare"
        chosen = {slot.name, context.name} if above[slot.name] == "context" else {slot.name}
        applications[slot.name] = with_layers(bare(), chosen)
    scope = scope_of(path_of())
    for app in applications.values():
        await answers(app, scope)
    progress("layers one by one")
    rounds = await in_turn({name: serving(app, scope) for name, app in applications.items()}, report.seconds(25, 3))
    theirs = {}
    for name, peer in peers.items():
        app = bare()
        peer.add(app)
        await answers(app, scope)
        pair = {"bare": serving(bare(), scope), "peer": serving(app, scope)}
        theirs[name] = added(await in_turn(pair, report.seconds(2.5, 0.3)), "peer")
        end_threads()
    report.section(
        "Each layer alone",
        "At 40 direct routes, in added microseconds a request: the layer, built by its slot, around the bare "
        "application (with the request context around it, where it stands further in), and the peer alone.",
    )
    rows = [["(bare again)", f"{added(rounds, 'bare again'):.1f}", "", "", "", ""]]
    for name in (*(slot.name for slot in on), *(name for name in peers if name not in {slot.name for slot in on})):
        ours = added(rounds, name, above[name]) if name in above else None
        budget = BUDGET_US.get(name)
        row = [name, "planned or off" if ours is None else f"{ours:.1f}", "" if budget is None else f"{budget:.1f}"]
        kept_to = None if ours is None or budget is None else ours.value <= budget
        row.append({None: "", True: "reached", False: "**not reached**"}[kept_to])
        row += [peers[name].name, f"{theirs[name]:.1f}"] if name in peers else ["", ""]
        rows.append(row)
    report.table("layer", "added µs", "budget µs", "", "peer", "added by the peer µs", rows=rows)


async def limiter(report: Report) -> None:
    """What a decision costs, and what a key takes."""
    strategies: tuple[Strategy, ...] = ("token-bucket", "fixed-window", "sliding-window")
    quota = Limit("benchmark", 1_000_000_000, 60)
    crowd = [f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}" for n in range(100_000)]
    _dice.shuffle(crowd)
    progress("decisions of the limiter")
    variants: dict[str, Serve] = {}
    for strategy in strategies:
        for keys in ([crowd[0]], crowd):
            one = Limiter(quota, strategy)
            for key in keys:
                one.hit(key)
            variants[f"{strategy} {len(keys)}"] = _hitting(one, keys)
    rounds = await in_turn(variants, report.seconds(8, 1), slice_seconds=0.005)
    report.section(
        "Decisions of the limiter in memory",
        "CPU time of a decision that lets pass, and the memory of a million addresses, each in a process of its own "
        "(the growth of its resident size, keys included). Then the limiter is full of debtors: the debt of one of "
        "them must survive 20 000 newcomers.",
    )
    rows = []
    for strategy in strategies:
        costs = [estimate(statistics.median, rounds[f"{strategy} {number}"]) for number in (1, len(crowd))]
        worst = max(cost.value for cost in costs)
        report.goal(
            f"{strategy}: a decision takes at most {DECISION_US:.0f} µs",
            f"{worst:.2f} µs",
            reached=worst <= DECISION_US,
        )
        progress(f"a million keys, {strategy}")
        child = _child("--memory", strategy, stdout=subprocess.PIPE, text=True)
        found = json.loads(child.communicate(timeout=120)[0])
        survives = "survives" if found["survives"] else "is forgotten"
        report.goal(
            f"{strategy}: at most {BYTES_A_KEY:.0f} bytes a key, and a debt survives a flood of keys",
            f"{found['bytes']:.0f} bytes, {survives}",
            reached=found["bytes"] <= BYTES_A_KEY and found["survives"],
        )
        rows.append([strategy, f"{costs[0]:.2f}", f"{costs[1]:.2f}", f"{found['bytes']:.0f}", survives])
    report.table("strategy", "µs, 1 key", "µs, 100 000 keys", "bytes a key", "a debt", rows=rows)


def _hitting(one: Limiter, keys: Sequence[str]) -> Serve:
    position = 0

    async def hit(times: int) -> None:
        nonlocal position
        chosen = [keys[(position + step) % len(keys)] for step in range(times)]
        position += times
        decide = one.hit
        for key in chosen:
            decide(key)

    return hit


def remember(strategy: Strategy, keys: int = 1_000_000, newcomers: int = 20_000) -> None:
    """Fills a limiter and prints what a key takes, and whether a debt survives; in a process of its own."""
    one = Limiter(Limit("benchmark", 2, 3600), strategy, max_keys=keys, clock=ManualClock())
    before = _resident_bytes()
    for number in range(keys - 1):
        one.hit(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}")
    one.hit("debtor", cost=2)
    grown = _resident_bytes() - before
    for number in range(newcomers):
        one.hit(f"192.{number >> 16}.{number >> 8 & 255}.{number & 255}")
    survives = not one.hit("debtor").allowed and len(one) <= keys + 1
    print(json.dumps({"bytes": grown / keys, "survives": survives}))


def _resident_bytes() -> int:
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource  # noqa: PLC0415 - there is none on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# --- uploads ----------------------------------------------------------------------------------------------------------

CHUNK_BYTES = 64 * 1024
CHUNKS = 1024


async def upload(report: Report) -> None:
    """A large body through the layers."""
    size = CHUNKS * CHUNK_BYTES
    roomy = {"request_limits": {"max_body_bytes": 2 * size}}
    scope = scope_of("/upload", "POST", **{"content-length": str(size), "content-type": "application/octet-stream"})
    progress("uploads")
    ours = {"bare": receiving(), "bare again": receiving(), "hardened": hardened(receiving(), **roomy)}
    theirs = {"bare": receiving(), "peers": assembled(receiving())}
    results = []
    for applications in (ours, theirs):
        for app in applications.values():
            await answers(app, scope, _body())
        variants = {name: serving(app, scope, _body) for name, app in applications.items()}
        results.append(await in_turn(variants, report.seconds(6, 1), at_least=1))
    report.section(
        "A large upload",
        f"{size >> 20} MB in chunks of {CHUNK_BYTES >> 10} KB, read by the endpoint from `receive`. Each chunk is "
        "copied once, as a server must. In process there is no socket, so that the share of the layers is what they "
        "cost a chunk of memory; through uvicorn it is what they cost a client.",
    )
    rows = []
    for name, rounds in ((name, result) for result in results for name in result):
        if name == "bare" and rounds is not results[0]:
            continue
        a_second = size / 1e6 / (statistics.median(rounds[name]) / 1e6)
        row = [name, f"{a_second:.0f}", "", ""]
        if name != "bare":
            chunkwise = Estimate(*(value / CHUNKS for value in added(rounds, name)))
            row[2:] = f"{chunkwise:.2f}", f"{share(rounds, name):.0f}"
        rows.append(row)
    rows += await _uploads_through_uvicorn(report, size)
    report.table("application", "MB/s", "added µs a chunk", "keeps %", rows=rows)


async def _uploads_through_uvicorn(report: Report, size: int) -> list[list[str]]:
    progress("uploads through uvicorn")
    async with _servers("httptools", UPLOADED) as ports:
        speeds: dict[str, list[float]] = {name: [] for name in ports}
        for name in ports:
            await _upload(ports[name], size)
        for _ in range(5 if report.quick else 40):
            for name in _dice.sample(list(ports), len(ports)):
                speeds[name].append(await _upload(ports[name], size))
    rows, first = [], next(iter(speeds))
    for name, measured in speeds.items():
        kept = estimate(statistics.median, [100 * a / b for a, b in zip(measured, speeds[first], strict=True)])
        rows.append(
            [f"uvicorn, {name}", f"{statistics.median(measured):.0f}", "", "" if name == first else f"{kept:.0f}"]
        )
        if name == "upload, hardened":
            text = f"a large upload through uvicorn keeps at least {KEPT_BY_UPLOAD:.0f} % of its throughput"
            report.goal(text, f"{kept:.0f} %", reached=kept.value >= KEPT_BY_UPLOAD)
    return rows


async def _upload(port: int, size: int) -> float:
    """Sends a large body, and says how many megabytes a second it took."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    fields = "".join(f"{name}: {value}\r\n" for name, value in FIELDS.items())
    head = f"POST /upload HTTP/1.1\r\n{fields}content-length: {size}\r\ncontent-type: application/octet-stream\r\n\r\n"
    started = time.perf_counter()
    writer.write(head.encode())
    chunk = bytes(CHUNK_BYTES)
    for _ in range(size // CHUNK_BYTES):
        writer.write(chunk)
        await writer.drain()
    answer = await reader.readuntil(b"\r\n\r\n")
    if not answer.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"the upload is answered with {answer[:60]!r}")
    seconds = time.perf_counter() - started
    writer.close()
    return size / 1e6 / seconds


def _body() -> Receive:
    left = CHUNKS
    source = bytearray(CHUNK_BYTES)

    async def receive() -> Message:
        nonlocal left
        left -= 1
        return {"type": "http.request", "body": bytes(source), "more_body": left > 0}

    return receive


# --- through uvicorn --------------------------------------------------------------------------------------------------

CONNECTIONS = 16
MAX_REQUESTS = 20_000  # in one round
PATIENCE_SECONDS = 10.0
SERVED: dict[str, Callable[[], FastAPI]] = {
    "bare": bare,
    "bare again": bare,
    "hardened": lambda: hardened(bare()),
    "peers": lambda: assembled(bare()),
}
UPLOADED: dict[str, Callable[[], FastAPI]] = {
    "upload": receiving,
    "upload again": receiving,
    "upload, hardened": lambda: hardened(receiving(), request_limits={"max_body_bytes": 2 * CHUNKS * CHUNK_BYTES}),
}


async def through_uvicorn(report: Report) -> None:
    """Requests over the loopback interface."""
    report.section(
        "Through uvicorn",
        f"One worker each at 40 direct routes, {CONNECTIONS} connections that are kept alive, the load generator "
        "beside it on the same machine; no access log of uvicorn. The applications take turns in short rounds.",
    )
    rows = []
    for http in ("httptools", "h11"):
        progress(f"uvicorn with {http}")
        async with _servers(http, SERVED) as ports:
            rounds = await _load_in_turn(ports, 3 if report.quick else 16, 0.35 if report.quick else 0.5)
        rows.append([f"**{http}**", "", "", "", ""])
        for name, loads in rounds.items():
            kept = estimate(
                statistics.median, [100 * a.a_second / b.a_second for a, b in zip(loads, rounds["bare"], strict=True)]
            )
            latencies = sorted(chain.from_iterable(load.latencies for load in loads))
            cuts = statistics.quantiles(latencies, n=100)
            a_second = statistics.median(load.a_second for load in loads)
            row = [name, f"{a_second:.0f}", "" if name == "bare" else f"{kept:.0f}"]
            rows.append([*row, *(f"{cuts[percent - 1] * 1000:.2f}" for percent in (50, 99))])
            if name == "hardened":
                text = f"uvicorn with {http}: keeps at least {KEPT_BY_SERVER:.0f} % of bare requests a second"
                report.goal(text, f"{kept:.0f} %", reached=kept.value >= KEPT_BY_SERVER)
    report.table("application", "requests a second", "keeps %", "p50 ms", "p99 ms", rows=rows)


class Load(NamedTuple):
    """What one round of requests has shown."""

    a_second: float
    latencies: list[float]


async def _load_in_turn(ports: Mapping[str, int], rounds: int, seconds: float) -> dict[str, list[Load]]:
    for port in ports.values():
        await _load(port, seconds)
    loads: dict[str, list[Load]] = {name: [] for name in ports}
    for _ in range(rounds):
        for name in _dice.sample(list(ports), len(ports)):
            loads[name].append(await _load(ports[name], seconds))
    return loads


async def _load(port: int, seconds: float) -> Load:
    loop = asyncio.get_running_loop()
    fields = "".join(f"{name}: {value}\r\n" for name, value in FIELDS.items())
    request = f"GET {path_of()} HTTP/1.1\r\n{fields}\r\n".encode()
    latencies: list[float] = []
    started = time.perf_counter()
    connections = [_Connection(request, latencies, started + seconds) for _ in range(CONNECTIONS)]
    async with asyncio.timeout(seconds + PATIENCE_SECONDS):
        for connection in connections:
            await loop.create_connection(partial(_same, connection), "127.0.0.1", port)
        await asyncio.gather(*(connection.done for connection in connections))
    return Load(len(latencies) / (time.perf_counter() - started), latencies)


def _same(connection: "_Connection") -> "_Connection":
    return connection


class _Connection(asyncio.Protocol):
    """Sends the same request again and again until its time is over."""

    _LENGTH = re.compile(rb"\r\ncontent-length: (\d+)", re.IGNORECASE)

    def __init__(self, request: bytes, latencies: list[float], ends: float) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = request
        self._latencies = latencies
        self._ends = ends
        self._sent = 0.0
        self._answer = b""
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(exc or ConnectionError("the server has closed the connection"))

    def data_received(self, data: bytes) -> None:
        self._answer += data
        head, blank, body = self._answer.partition(b"\r\n\r\n")
        if not blank:
            return
        length = self._LENGTH.search(head)
        if length is None or not head.startswith(b"HTTP/1.1 200"):
            self._stop(ConnectionError(f"an unexpected answer: {head[:80]!r}"))
        elif len(body) >= int(length[1]):
            now = time.perf_counter()
            self._latencies.append(now - self._sent)
            if now < self._ends and len(self._latencies) < MAX_REQUESTS:
                self._send()
            else:
                self._stop()

    def _send(self) -> None:
        self._answer = b""
        self._sent = time.perf_counter()
        self._transport.write(self._request)

    def _stop(self, error: Exception | None = None) -> None:
        if not self.done.done():
            self.done.set_exception(error) if error else self.done.set_result(None)
        self._transport.close()


@asynccontextmanager
async def _servers(http: str, served: Iterable[str]) -> AsyncIterator[dict[str, int]]:
    """A server process for each application, by name the port; they end when their standard input does."""
    ports: dict[str, int] = {}
    processes: list[subprocess.Popen[Any]] = []
    try:
        for name in served:
            with socket.create_server(("127.0.0.1", 0)) as listening:
                ports[name] = listening.getsockname()[1]
                number = listening.fileno()
                arguments = ("--serve", name, "--http", http, "--socket", str(number))
                processes.append(
                    _child(*arguments, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=(number,))
                )
        yield ports
    finally:
        for process in processes:
            if process.stdin is not None:
                process.stdin.close()
        for process in processes:
            try:
                await asyncio.to_thread(process.wait, PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def _child(*arguments: str, **options: Any) -> "subprocess.Popen[Any]":
    return subprocess.Popen([sys.executable, __file__, *arguments], **options)  # noqa: S603 - this very program


def serve_until_told(name: str, http: Literal["httptools", "h11"], number: int) -> None:
    """Serves an application on a socket that was opened before, until standard input ends."""
    config = uvicorn.Config((SERVED | UPLOADED)[name](), http=http, access_log=False, log_level="warning")
    server = uvicorn.Server(config)

    def wait() -> None:
        sys.stdin.read()
        server.should_exit = True

    threading.Thread(target=wait, daemon=True).start()
    with socket.socket(fileno=number) as listening:
        server.run(sockets=[listening])


# --- the program ------------------------------------------------------------------------------------------------------

PARTS: Mapping[str, Callable[[Report], Awaitable[None]]] = {
    "stack": stack,
    "growth": growth,
    "layers": layers,
    "limiter": limiter,
    "uvicorn": through_uvicorn,
    "upload": upload,
}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench", description="What hardening costs, beside its peers.")
    parser.add_argument("--quick", action="store_true", help="fewer rounds: under a minute, with wider intervals")
    parser.add_argument("--only", action="append", choices=PARTS, metavar="PART", help=f"one of {', '.join(PARTS)}")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the report there")
    parser.add_argument("--docs", action="store_true", help="also put the report into docs/performance.md")
    # How this program starts itself:
    parser.add_argument("--serve", choices=[*SERVED, *UPLOADED], help=argparse.SUPPRESS)
    parser.add_argument("--http", choices=("httptools", "h11"), help=argparse.SUPPRESS)
    parser.add_argument("--socket", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    return parser.parse_args()


async def _measure(report: Report, names: Sequence[str]) -> None:
    for name in names:
        await PARTS[name](report)


def main() -> None:
    """Runs the parts that are asked for, and prints the report."""
    for name in [name for name in os.environ if name.upper().startswith(("HARDENING_", "OTEL_", "RATELIMIT_"))]:
        del os.environ[name]
    arguments = _arguments()
    if arguments.memory:
        remember(arguments.memory)
    elif arguments.serve:
        serve_until_told(arguments.serve, arguments.http, arguments.socket)
    else:
        report = Report(quick=arguments.quick)
        # Every log line is made and written, but to nowhere.
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
            asyncio.run(_measure(report, arguments.only or list(PARTS)))
        print(report, end="")
        if arguments.out:
            arguments.out.write_text(f"# What hardening costs\n\n{report}", encoding="utf-8")
        if arguments.docs:
            page = PAGE.read_text(encoding="utf-8")
            PAGE.write_text(BLOCK.sub(lambda block: f"{block[1]}\n{report}\n{block[2]}", page), encoding="utf-8")


if __name__ == "__main__":
    main()
