"""Says where the time goes: slow requests, what blocks the event loop, garbage collection, memory, open files.

It protects from guessing. One ``time.sleep`` in an ``async def`` makes every other request slow, and all of them look
guilty; here the one that ran is named, with its line. It is *not* a profiler: it looks at the event loop only when it
is late, and at no request more than once. It looks at this process only.

It is no layer. The recorder of metrics tells it of each request when that has ended, the probe of load shedding tells
it how late the event loop is; it has no timer of its own. One thread waits for the moment in which the event loop is
late, and looks what it is doing: asyncio's debug mode, which could say that too, makes every callback slower.

Quantiles come from a sketch with logarithmic buckets (DDSketch, Masson et al., VLDB 2019), right within 5 %.

Example:
    >>> from fastapi_hardening.core.clock import ManualClock
    >>> monitor = Monitor(clock=ManualClock())
    >>> scope = {"type": "http", "client": None, "headers": []}
    >>> for milliseconds in range(1, 101):
    ...     monitor.record("GET", "/orders/{id}", milliseconds / 1000, 1.0, (scope, 200, 0))
    >>> [route] = monitor.snapshot().routes
    >>> route.route, route.requests, round(route.p50, 2), round(route.p99, 1)
    ('/orders/{id}', 100, 0.05, 0.1)
"""

import gc
import importlib
import inspect
import math
import os
import sys
import sysconfig
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Summary
from pydantic import Field
from starlette.types import Scope

from fastapi_hardening.core import context as request_context
from fastapi_hardening.core.clock import Clock, SystemClock
from fastapi_hardening.core.configuration import ConcernSettings
from fastapi_hardening.core.events import Events
from fastapi_hardening.core.load import Load

OTHER = "_OTHER"
"""The route of all that come after ``max_routes``."""

# A bucket is 10.5 % wider than the one before, so its middle is right within 5 %. From 10 us to 1 hour.
_WIDTH = math.log(1.05 / 0.95)
_FACTOR = 1 / _WIDTH
_LEAST = 1e-5
_PER_LEAST = 1 / _LEAST
_log = math.log
_BUCKETS = int(math.log(3600 / _LEAST) * _FACTOR) + 1

_BLOCKS_KEPT = 20
_PROC = Path("/proc/self")


class MonitorSettings(ConcernSettings):
    """The settings of the monitor."""

    blocked_seconds: float | None = Field(0.1, ge=0.02, le=60)
    """From this lateness on, the event loop was blocked, and it is told by what. Unset, no thread looks for it."""

    window_seconds: float = Field(300.0, ge=1, le=86_400)
    """What is shown is of this last time, up to twice as long."""

    slowest: int = Field(3, ge=1, le=100)
    """How many of the slowest requests of each route are kept."""

    max_routes: int = Field(500, ge=1)
    """How many routes are told apart; the rest is one."""


@dataclass(frozen=True, slots=True)
class LoopBlocked:
    """The event loop did nothing else for a while.

    Attributes:
        seconds: For how long.
        code: What ran, as ``module.function:line``; ``None`` where several things took long together, or nobody looked.
        route: The route of the request that it ran for; ``None`` where it ran for none.
        request_id: That request's id.
    """

    seconds: float
    code: str | None
    route: str | None
    request_id: str | None


class SlowRequest(NamedTuple):
    """One of the slowest requests of a route.

    Attributes:
        seconds: From its arrival to the last byte of the answer.
        method: Its method.
        route: The template of its route, or ``none``.
        status: The status of the answer.
        request_id: Its id.
        trace_id: Its trace, 32 hexadecimal digits; ``None`` where it was not sampled.
        at: When it ended, in seconds since the epoch.
    """

    seconds: float
    method: str
    route: str
    status: int
    request_id: str
    trace_id: str | None
    at: float


@dataclass(frozen=True, slots=True)
class RouteTimes:
    """How long the requests of a route take, in seconds.

    Attributes:
        method: The method.
        route: The template of the route, or ``none``.
        requests: How many there were.
        p50: Half of them were faster.
        p95: Of a hundred, 95 were faster.
        p99: Of a hundred, 99 were faster.
        longest: The slowest one.
    """

    method: str
    route: str
    requests: int
    p50: float
    p95: float
    p99: float
    longest: float


@dataclass(frozen=True, slots=True)
class MonitorSnapshot:
    """What is known of the last minutes.

    Attributes:
        loop_delay_seconds: How long a newcomer waited for the event loop at the last look; ``None`` where load
            shedding, which looks, is off, or nothing has come yet.
        longest_loop_delay_seconds: The longest such wait.
        blocks: What blocked the event loop, the latest last.
        gc_pauses: How often garbage was collected.
        gc_seconds: How long that took in all.
        longest_gc_seconds: The longest pause.
        memory_bytes: What is resident; ``None`` where ``/proc`` is not there.
        open_files: File descriptors that are open, sockets among them; likewise.
        max_open_files: How many there may be.
        routes: How long requests take, the route with the highest ``p99`` first.
        slowest: The slowest requests, the slowest first.
    """

    loop_delay_seconds: float | None
    longest_loop_delay_seconds: float
    blocks: tuple[LoopBlocked, ...]
    gc_pauses: int
    gc_seconds: float
    longest_gc_seconds: float
    memory_bytes: int | None
    open_files: int | None
    max_open_files: int | None
    routes: tuple[RouteTimes, ...]
    slowest: tuple[SlowRequest, ...]


class Sketch:
    """Times in logarithmic buckets: bounded, and each quantile is right within 5 %, from 10 us to an hour.

    Example:
        >>> sketch = Sketch()
        >>> for seconds in (0.1, 0.2, 0.3):
        ...     sketch.add(seconds)
        >>> round(sketch.quantile(0.5), 1)
        0.2
    """

    __slots__ = ("counts", "least", "longest", "slowest")

    def __init__(self) -> None:
        self.counts = [0] * _BUCKETS
        self.longest = 0.0
        self.slowest: list[SlowRequest] = []
        # What is faster is not among the slowest.
        self.least = -1.0

    @property
    def total(self) -> int:
        """How many times were counted."""
        return sum(self.counts)

    def add(self, seconds: float) -> None:
        """Counts a time."""
        bucket = int(_log(seconds * _PER_LEAST) * _FACTOR) if seconds > _LEAST else 0
        self.counts[bucket if bucket < _BUCKETS else -1] += 1
        self.longest = max(self.longest, seconds)

    def merge(self, other: "Sketch") -> None:
        """Adds what another one has counted."""
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        self.longest = max(self.longest, other.longest)
        self.slowest = self.slowest + other.slowest

    def quantile(self, share: float) -> float:
        """The time than which this share is faster, in seconds; 0 where there is none."""
        rank, seen = share * (self.total - 1), 0
        for bucket, count in enumerate(self.counts):
            seen += count
            if seen > rank:
                return min(self.longest, _LEAST * math.exp((bucket + 0.5) * _WIDTH))
        return 0.0


_Routes = dict[tuple[str, str], Sketch]


class Monitor:
    """What is known of one process; reachable as ``handle.monitor``.

    Args:
        settings: What is kept.
        load: Tells how late the event loop is.
        events: Where :class:`LoopBlocked` goes.
        clock: Where the time comes from.

    Attributes:
        pauses: How long garbage was collected.
        watcher: Finds what blocks the event loop.
        on_look: What is called at each look at the event loop.
    """

    def __init__(
        self,
        settings: MonitorSettings | None = None,
        *,
        load: Load | None = None,
        events: Events | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.settings = settings = settings or MonitorSettings()
        self._events = events or Events()
        self._clock = clock or SystemClock()
        self.on_look: Callable[[], None] | None = None
        self._slowest = settings.slowest
        self._routes: _Routes = {}
        self._routes_before: _Routes = {}
        self._turns_at = -math.inf
        self._delay: float | None = None
        self._longest = self._longest_before = 0.0
        self._blocks: deque[LoopBlocked] = deque(maxlen=_BLOCKS_KEPT)
        self.pauses = Pauses(self._clock)
        self.watcher = Watcher(settings.blocked_seconds or math.inf, self._clock)
        if settings.enabled and load is not None:
            load.on_look.append(self.look)

    def record(self, method: str, route: str, seconds: float, now: float, about: tuple[Scope, int, int]) -> None:
        """Takes note of a request that has ended.

        Args:
            method: One of a closed set.
            route: The template of its route.
            seconds: How long it took.
            now: The time, in monotonic seconds.
            about: The scope, where its id is; the status that was sent; its trace, 0 for none.
        """
        if now >= self._turns_at:
            self._turn(now)
        sketch = self._routes.get((method, route)) or self._new(method, route)
        # As `add`, without the call.
        bucket = int(_log(seconds * _PER_LEAST) * _FACTOR) if seconds > _LEAST else 0
        sketch.counts[bucket if bucket < _BUCKETS else -1] += 1
        if seconds > sketch.least:
            self._keep(sketch, method, route, seconds, about)

    def _new(self, method: str, route: str) -> Sketch:
        key = (method, route) if len(self._routes) < self.settings.max_routes else (OTHER, OTHER)
        sketch = self._routes.get(key)
        if sketch is None:
            sketch = self._routes[key] = Sketch()
        return sketch

    def _keep(self, sketch: Sketch, method: str, route: str, seconds: float, about: tuple[Scope, int, int]) -> None:
        scope, status, trace_id = about
        request_id = request_context.ensure(scope).request_id
        trace = f"{trace_id:032x}" if trace_id else None
        slow = SlowRequest(seconds, method, route, status, request_id, trace, self._clock.time())
        sketch.longest = max(sketch.longest, seconds)
        sketch.slowest = sorted([*sketch.slowest, slow], reverse=True)[: self._slowest]
        if len(sketch.slowest) == self._slowest:
            sketch.least = sketch.slowest[-1].seconds

    def _turn(self, now: float) -> None:
        """Begins a window; the one before is still shown, if it has not been over for a whole window."""
        window = self.settings.window_seconds
        recent = now < self._turns_at + window
        self._routes_before = self._routes if recent else {}
        self._longest_before = self._longest if recent else 0.0
        self._routes, self._longest = {}, 0.0
        self._turns_at = now + window

    def look(self, due: float, delay: float) -> None:
        """Takes note of a look at the event loop.

        Args:
            due: When the next look is due, in monotonic seconds; infinite for none.
            delay: How long a newcomer has just waited, in seconds.
        """
        now = self._clock.monotonic()
        if now >= self._turns_at:
            self._turn(now)
        self._delay = delay
        self._longest = max(self._longest, delay)
        if self.on_look is not None:
            self.on_look()
        found = self.watcher.looked(due)
        if delay >= (self.settings.blocked_seconds or math.inf):
            block = LoopBlocked(delay, *(found or (None, None, None)))
            self._blocks.append(block)
            self._events.emit(block)

    @contextmanager
    def running(self) -> Iterator[None]:
        """While the block runs, garbage collection is measured and the event loop of this thread is watched."""
        if not self.settings.enabled:
            yield
            return
        with self.pauses.measured(), self.watcher.watching() if self.settings.blocked_seconds else _nothing():
            yield

    def snapshot(self) -> MonitorSnapshot:
        """What is known now; reads two files, and sorts the routes."""
        now = self._clock.monotonic()
        if now >= self._turns_at:
            self._turn(now)
        merged: _Routes = {}
        for routes in (self._routes_before, self._routes):
            for key, sketch in routes.items():
                merged.setdefault(key, Sketch()).merge(sketch)
        times = [
            RouteTimes(*key, each.total, each.quantile(0.5), each.quantile(0.95), each.quantile(0.99), each.longest)
            for key, each in merged.items()
        ]
        slowest = (slow for each in merged.values() for slow in sorted(each.slowest, reverse=True)[: self._slowest])
        return MonitorSnapshot(
            loop_delay_seconds=self._delay,
            longest_loop_delay_seconds=max(self._longest, self._longest_before),
            blocks=tuple(self._blocks),
            gc_pauses=self.pauses.count,
            gc_seconds=self.pauses.seconds,
            longest_gc_seconds=self.pauses.longest,
            memory_bytes=resident_bytes(),
            open_files=open_files(),
            max_open_files=max_open_files(),
            routes=tuple(sorted(times, key=lambda each: each.p99, reverse=True)),
            slowest=tuple(sorted(slowest, reverse=True)),
        )


@contextmanager
def _nothing() -> Iterator[None]:
    yield


# --- garbage collection ---------------------------------------------------------------------------------------------


class Pauses:
    """How long this process stood still to collect garbage.

    Args:
        clock: Where the time comes from.

    Attributes:
        count: How often.
        seconds: How long in all.
        longest: The longest pause, in seconds.
    """

    def __init__(self, clock: Clock) -> None:
        self.count = 0
        self.seconds = 0.0
        self.longest = 0.0
        self._now = clock.monotonic
        self._began = 0.0

    @contextmanager
    def measured(self) -> Iterator[None]:
        """While the block runs, pauses are measured."""
        gc.callbacks.append(self._called)
        try:
            yield
        finally:
            gc.callbacks.remove(self._called)

    def _called(self, phase: str, _info: dict[str, int]) -> None:
        # No lock and nothing that is allocated and kept: it is called in the middle of anything.
        if phase == "start":
            self._began = self._now()
        else:
            took = self._now() - self._began
            self.count += 1
            self.seconds += took
            self.longest = max(self.longest, took)


# --- what blocks ------------------------------------------------------------------------------------------------------

Culprit = tuple[str | None, str | None, str | None]
"""What ran, and the route and the id of the request that it ran for."""


class Watcher:
    """Looks what the event loop does while it is late.

    One look does not tell one long thing from many short ones. So there are two, at half of the time and at the whole
    of it, and only what runs at both is named.

    Args:
        blocked_seconds: From which lateness on something blocks.
        clock: Where the time comes from.
    """

    def __init__(self, blocked_seconds: float, clock: Clock) -> None:
        self._blocked = blocked_seconds
        self._now = clock.monotonic
        self._due = math.inf
        # A reference and no number, which another task could have by then.
        self._first: tuple[float, object] | None = None
        self._found: tuple[float, Culprit] | None = None
        self._thread_id = 0
        self._wake = threading.Event()
        self._ends = False

    def looked(self, due: float) -> Culprit | None:
        """Takes note that the event loop turns; gives what has blocked it since the last time."""
        found, before = self._found, self._due
        self._due = due
        self._first = None
        if math.isinf(before) and due < math.inf:
            self._wake.set()
        return found[1] if found is not None and found[0] == before else None

    def check(self) -> None:
        """Looks whether the event loop is late, and at what it does; called in another thread."""
        due, late = self._due, self._now() - self._due
        if late < self._blocked / 2 or (self._found is not None and self._found[0] == due):
            return
        frame = sys._current_frames().get(self._thread_id)  # noqa: SLF001 - the one way to see another thread's stack
        if frame is None:
            return
        running, culprit = _read(frame)
        if self._first is None or self._first[0] != due:
            self._first = due, running
        elif late >= self._blocked:
            # Kept even where it is something else, so that the rest of the wait is not looked at.
            self._found = due, culprit if running is self._first[1] else (None, None, None)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While the block runs, a thread looks at the event loop of the thread that calls."""
        self._thread_id = threading.get_ident()
        self._ends = False
        thread = threading.Thread(target=self._run, name="monitor of the event loop", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ends = True
            self._wake.set()
            thread.join()

    def _run(self) -> None:
        while not self._ends:
            if math.isinf(self._due):
                # Nothing comes, so nothing is looked at.
                self._wake.wait()
            self._wake.clear()
            self._wake.wait(self._blocked / 4)
            self.check()


_NOT_THE_APPLICATIONS = tuple(
    {os.path.realpath(sysconfig.get_path(name)) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    | {os.path.realpath(Path(__file__).parents[1]) + os.sep}
)


def _read(innermost: FrameType) -> tuple[object, Culprit]:
    """What runs: the coroutine of its task, or its callback; and for people the line, and the request."""
    code: FrameType | None = None
    context: Any = None
    task: FrameType | None = None
    callback: object = None
    frame: FrameType | None = innermost
    while frame is not None:
        if code is None and not os.path.realpath(frame.f_code.co_filename).startswith(_NOT_THE_APPLICATIONS):
            code = frame
        if context is None and isinstance(scope := frame.f_locals.get("scope"), dict):
            context = request_context.of(scope)
        if frame.f_code.co_flags & inspect.CO_COROUTINE:
            task = frame
        elif frame.f_globals.get("__name__") == "asyncio.events":
            callback = frame.f_locals.get("self")
            break
        frame = frame.f_back
    shown = code or innermost
    place = f"{shown.f_globals.get('__name__')}.{shown.f_code.co_qualname}:{shown.f_lineno}"
    route = getattr(context, "route", None)
    return task or callback or shown, (place, getattr(route, "template", None), getattr(context, "request_id", None))


# --- the process ------------------------------------------------------------------------------------------------------


def resident_bytes(proc: Path = _PROC) -> int | None:
    """How much memory of this process is resident; ``None`` where ``/proc`` is not there."""
    with suppress(OSError, ValueError, IndexError):
        return int((proc / "statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return None


def open_files(proc: Path = _PROC) -> int | None:
    """How many file descriptors are open; ``None`` where ``/proc`` is not there."""
    with suppress(OSError):
        # The folder itself is open while it is read.
        return sum(1 for _ in (proc / "fd").iterdir()) - 1
    return None


def max_open_files(module: str = "resource") -> int | None:
    """How many file descriptors there may be; ``None`` for any number, and on systems that do not say."""
    try:
        resource: Any = importlib.import_module(module)
    except ImportError:
        return None
    soft: int = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None if soft == resource.RLIM_INFINITY else soft


# --- metrics ----------------------------------------------------------------------------------------------------------


def measure(registry: CollectorRegistry, events: Events, monitor: Monitor) -> None:
    """Has blocks counted by the route that made them, and pauses shown.

    Memory and open files are among the series of the process already, quantiles among those of requests.
    """
    blocks = Summary(
        "hardening_loop_blocked_seconds",
        "How long the event loop was blocked, by the route that did it.",
        ("handler",),
        registry=registry,
    )
    events.subscribe(LoopBlocked, lambda block: blocks.labels(block.route or "none").observe(block.seconds))
    pauses = Counter("hardening_gc_pauses", "Collections of garbage.", registry=registry)
    seconds = Counter("hardening_gc_pause_seconds", "Seconds that they took.", registry=registry)
    longest = Gauge(
        "hardening_gc_longest_pause_seconds",
        "The longest of them.",
        registry=registry,
        multiprocess_mode="livemax",
    )
    told = [0, 0.0]

    def tell() -> None:
        found = monitor.pauses
        pauses.inc(found.count - told[0])
        seconds.inc(max(0.0, found.seconds - told[1]))
        longest.set(found.longest)
        told[:] = found.count, found.seconds

    monitor.on_look = tell
