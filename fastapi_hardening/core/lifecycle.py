"""Where the process is in its life: starting, serving, or draining. Health reports it, the drain layer acts on it."""

import asyncio
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from fastapi_hardening.core.clock import Clock, SystemClock
from fastapi_hardening.core.events import Events

logger = logging.getLogger("fastapi_hardening.lifecycle")

_ONE_SIGNAL_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class ApplicationStarted:
    """Start-up work is done."""


@dataclass(frozen=True, slots=True)
class DrainStarted:
    """The process was asked to end: it is no longer ready, and still serves.

    Attributes:
        delay_seconds: How long until the server is told to stop.
        deadline_seconds: How long until new requests are refused.
    """

    delay_seconds: float
    deadline_seconds: float


class Lifecycle:
    """The state of one process.

    Args:
        drain_delay_seconds: How long the server goes on accepting connections after SIGTERM, so that load balancers see
            the readiness probe fail before they meet a closed port.
        drain_deadline_seconds: After this long of draining, new requests are refused.
        events: Where :class:`ApplicationStarted` and :class:`DrainStarted` go.
        clock: Where the time comes from.

    Attributes:
        draining: The process was asked to end.
        stops_at: When the server is told to stop, in monotonic seconds; never until the process drains.
        on_drain: What is called when draining starts, perhaps out of a signal handler: it may not wait, nor touch a
            loop other than by ``call_soon_threadsafe``.
    """

    def __init__(
        self,
        *,
        drain_delay_seconds: float = 0.0,
        drain_deadline_seconds: float = 30.0,
        events: Events | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.draining = False
        self.stops_at = float("inf")
        self.on_drain: list[Callable[[], None]] = []
        self._delay = drain_delay_seconds
        self._deadline = drain_deadline_seconds
        self._events = events
        self._clock = clock or SystemClock()
        # A server that runs no lifespan starts serving at once; one that does says so with `begin`.
        self._pending: list[str] = []
        self._refuse_from = float("inf")

    @property
    def started(self) -> bool:
        """Whether all start-up work is done."""
        return not self._pending

    @property
    def pending(self) -> tuple[str, ...]:
        """The names of the start-up work that is not done."""
        return tuple(self._pending)

    @property
    def past_deadline(self) -> bool:
        """Whether the process drains for so long that it refuses new requests."""
        return self._clock.monotonic() >= self._refuse_from

    def begin(self, work: str) -> None:
        """Notes that start-up work has begun; the application is not ready until :meth:`finish`."""
        self._pending.append(work)

    def finish(self, work: str) -> None:
        """Notes that start-up work is done."""
        self._pending.remove(work)
        if not self._pending and self._events is not None:
            self._events.emit(ApplicationStarted())

    @contextmanager
    def starting(self, work: str) -> Iterator[None]:
        """Keeps the application not ready while the block runs, such as one that warms a cache in the background.

        Work that raises stays undone: the application does not become ready on a failed start.
        """
        self.begin(work)
        yield
        self.finish(work)

    def drain(self) -> None:
        """Starts draining; a second call changes nothing."""
        if self.draining:
            return
        self.draining = True
        now = self._clock.monotonic()
        self.stops_at, self._refuse_from = now + self._delay, now + self._deadline
        logger.info(
            "draining: not ready from now on, the server stops in %g s, new requests are refused in %g s",
            self._delay,
            self._deadline,
        )
        if self._events is not None:
            self._events.emit(DrainStarted(self._delay, self._deadline))
        for call in self.on_drain:
            call()

    @contextmanager
    def on_sigterm(self) -> Iterator[None]:
        """While the block runs, SIGTERM drains first and reaches the server's own handler after the delay.

        A second SIGTERM reaches it at once, if it comes later than a second after the first: a signal to a whole
        process group is heard twice by a worker, from the group and from its supervisor. Outside the main thread, as
        under a test client, signals are left alone. Servers that take signals through the event loop (hypercorn) hear
        it at once all the same; their own grace period is then the delay.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        servers_handler = signal.getsignal(signal.SIGTERM)
        pending: list[asyncio.TimerHandle] = []
        first_heard = float("inf")

        def handle(number: int, frame: FrameType | None) -> None:
            nonlocal first_heard
            now = self._clock.monotonic()
            again = now - first_heard >= _ONE_SIGNAL_SECONDS
            if self.draining and not again:
                return
            first_heard = min(first_heard, now)
            self.drain()
            if again or self._delay <= 0:
                _pass_on(servers_handler, number, frame)
            else:
                loop.call_soon_threadsafe(
                    lambda: pending.append(loop.call_later(self._delay, _pass_on, servers_handler, number, frame))
                )

        signal.signal(signal.SIGTERM, handle)
        try:
            yield
        finally:
            for timer in pending:
                timer.cancel()
            if signal.getsignal(signal.SIGTERM) is handle:
                signal.signal(signal.SIGTERM, servers_handler)


def _pass_on(handler: Any, number: int, frame: FrameType | None) -> None:
    """Does what the signal would have done without us."""
    if callable(handler):
        handler(number, frame)
    elif handler == signal.SIG_DFL:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
