"""Ends handlers that take too long and answers for them, and how a route says how long that is.

Example:
    >>> from fastapi import FastAPI
    >>> app = FastAPI()
    >>> app.add_middleware(TimeoutMiddleware, settings=TimeoutSettings(first_byte_seconds=10))
"""

import asyncio
import logging
from dataclasses import dataclass
from typing import Any

from anyio.to_thread import current_default_thread_limiter
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_hardening.core import context as request_context
from fastapi_hardening.core.clock import Clock, SystemClock
from fastapi_hardening.core.context import RequestContext
from fastapi_hardening.core.deadlines import DeadlineQueue, Entry
from fastapi_hardening.core.policy import Override, mark_handled
from fastapi_hardening.core.problem import IANA, Problem, refuse, retry_after, tell
from fastapi_hardening.core.routes import route_of
from fastapi_hardening.resilience.timeout.settings import Bounds, TimeoutSettings
from fastapi_hardening.resilience.timeout.threads import needs_thread

logger = logging.getLogger("fastapi_hardening.timeout")

LAYER = "timeout"
_STARTS = frozenset({"http.response.start", "websocket.accept", "websocket.close", "websocket.http.response.start"})
_WITHOUT_BODY = frozenset({"GET", "HEAD", "OPTIONS", "DELETE", None})

# A handler that is cancelled may clean up for so long before its client is answered without it.
_GRACE_SECONDS = 1.0
# How often is looked whether a thread has ended, and when a client is asked to come back to one.
_LOOK_SECONDS = 1.0


class DeadlineExceeded(Problem):
    """The handler has not begun to answer in time."""

    status = 504


class ThreadsExhausted(Problem):
    """Every thread is kept by a handler that takes too long, so what needs one would only wait."""

    status = 503
    type = IANA + "temporary-reduced-capacity"
    title = "Temporarily reduced capacity"


class DeadlineUnwatched(Problem):
    """The deadline that the route demands is watched by nobody."""

    status = 500


@dataclass(frozen=True, slots=True)
class HandlerAbandoned:
    """A client was answered for a handler that could not be stopped, and which runs on.

    Attributes:
        template: The path template of the route.
        request_id: The id that the client got.
    """

    template: str | None
    request_id: str


@dataclass(frozen=True, slots=True)
class AnswerCutOff:
    """An answer that had begun took too long as a whole, and its connection was cut.

    Attributes:
        template: The path template of the route.
        request_id: The id that the client got.
        seconds: How long it was allowed to take.
    """

    template: str | None
    request_id: str
    seconds: float


class TimeoutMiddleware:
    """Ends handlers that take too long, and answers for them.

    Args:
        app: The application inside.
        settings: The deadlines.
        clock: Where the time comes from.
    """

    def __init__(self, app: ASGIApp, settings: TimeoutSettings | None = None, *, clock: Clock | None = None) -> None:
        self.app = app
        self.settings = settings = settings or TimeoutSettings()
        self.clock = clock or SystemClock()
        self.abandoned: set[_Answer] = set()
        self._bounds = Bounds(settings.first_byte_seconds, settings.total_seconds)
        self._queues: dict[tuple[Any, float], DeadlineQueue] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        kind = scope["type"]
        if kind not in ("http", "websocket") or not self.settings.enabled:
            await self.app(scope, receive, send)
            return
        context = request_context.ensure(scope)
        entry = context.route or route_of(scope)
        overrides: tuple[Any, ...] = entry.of(Timeout)
        if overrides:
            mark_handled(scope, overrides)
        if self.abandoned and self._exhausted() and needs_thread(entry):
            problem = ThreadsExhausted("The server is at its limit; come back later.", headers=retry_after(1.0))
            await refuse(problem, scope, receive, send, layer=LAYER)
            return
        bounds = overrides[-1].bounds if overrides else self._bounds
        answer = _Answer(self, bounds, context, scope, receive=receive, send=send)
        try:
            # A client that sends its body slowly does not make the handler slow.
            reads = kind == "http" and scope.get("method") not in _WITHOUT_BODY
            await self.app(scope, answer.receive if reads else receive, answer.send)
        except asyncio.CancelledError:
            if not answer.is_stopped():
                raise
        finally:
            answering = answer.end()
            if answering is not None:
                await asyncio.wait({answering})
        if answer.wanting:
            await refuse(too_late(), scope, receive, send, layer=LAYER)

    def queue_of(self, seconds: float) -> DeadlineQueue:
        """The deadlines of one length on the running event loop."""
        key = asyncio.get_running_loop(), seconds
        queue = self._queues.get(key)
        if queue is None:
            self._queues = {key: queue for key, queue in self._queues.items() if not queue.is_closed}
            queue = self._queues[key] = DeadlineQueue(seconds, self.clock)
        return queue

    def _exhausted(self) -> bool:
        """Whether no thread is free, and all of them are kept by abandoned handlers."""
        limiter = current_default_thread_limiter()
        return limiter.available_tokens <= 0 and len(self.abandoned) >= limiter.total_tokens


def too_late() -> DeadlineExceeded:
    """The answer for a handler that takes too long."""
    return DeadlineExceeded("The server took too long to answer.")


class _Answer:
    """The answer to one request, and the time that is left for it."""

    __slots__ = (
        "_begun", "_bounds", "_cancelled", "_context", "_layer", "_over", "_receive", "_scope", "_send", "_since",
        "_started", "_stopping", "_task", "_timer", "given_up",
    )  # fmt: skip

    def __init__(
        self,
        layer: TimeoutMiddleware,
        bounds: Bounds,
        context: RequestContext,
        scope: Scope,
        *,
        receive: Receive,
        send: Send,
    ) -> None:
        self.given_up = False
        self._layer = layer
        self._bounds = bounds
        self._context = context
        self._scope = scope
        self._receive = receive
        self._send = send
        self._begun = False
        self._cancelled = False
        self._over: asyncio.Future[None] | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._task: asyncio.Task[Any] = asyncio.current_task()  # type: ignore[assignment]
        self._started = self._since = layer.clock.monotonic()
        self._timer: Entry | asyncio.TimerHandle | None = None
        context.state[TimeoutMiddleware] = self
        first_byte, total = bounds
        if first_byte is not None and (total is None or first_byte <= total):
            context.deadline = self._started + first_byte
            self._timer = layer.queue_of(first_byte).add(self._ring)
        elif total is not None:
            self._set_timer(self._left())

    @property
    def wanting(self) -> bool:
        """Whether the client was left without an answer."""
        return self._cancelled and not self._begun and not self.given_up

    async def receive(self) -> Message:
        """The next message of the client; a piece of the body that is not the last moves the deadline."""
        message = await self._receive()
        if not self._begun and message["type"] == "http.request":
            self._since = self._layer.clock.monotonic()
            self._context.deadline = self._bounds.at(self._started, self._since)
        return message

    async def send(self, message: Message) -> None:
        """Sends on, unless the client was answered already."""
        timer = self._timer
        if timer is not None:
            if not self._begun:
                self._begun = message["type"] in _STARTS
                if self._begun:
                    timer.cancel()
                    self._timer = self._context.deadline = None
                    if self._bounds.total is not None:
                        self._set_timer(self._left())
            elif message["type"] == "http.response.body" and not message.get("more_body"):
                # What runs after the answer is no longer the client's business.
                self._set_timer(None)
        elif self.given_up:
            return
        else:
            self._begun = True
        await self._send(message)

    def change(self, bounds: Bounds) -> None:
        """Goes on with the bounds of an override that was learnt of late."""
        self._bounds = bounds
        self._set_timer(self._left())

    def is_stopped(self) -> bool:
        """Whether a cancellation is ours alone; one from outside, such as the server's end, stays what it is."""
        return self._cancelled and self._task.cancelling() == 1

    def end(self) -> "asyncio.Task[None] | None":
        """Ends with the request; gives what still has to be waited for, where the client is answered from aside."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._cancelled:
            self._task.uncancel()
        # The context may outlive the request; it must not keep what leads back to it.
        self._context.state.pop(TimeoutMiddleware, None)
        if self._over is None:
            return None
        self._layer.abandoned.discard(self)
        self._over.set_result(None)
        return self._stopping if self.given_up else None

    def _left(self) -> float | None:
        """The seconds that are left; ``None`` for any number."""
        if self._begun:
            is_bounded = self._bounds.total is not None and self._scope["type"] == "http"
            at = self._started + (self._bounds.total or 0) if is_bounded else None
        else:
            at = self._bounds.at(self._started, self._since)
        self._context.deadline = at
        return None if at is None else at - self._layer.clock.monotonic()

    def _set_timer(self, seconds: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        loop = asyncio.get_running_loop()
        self._timer = None if seconds is None else loop.call_later(max(0.0, seconds), self._ring)

    def _ring(self) -> None:
        self._timer = None
        left = self._left()
        if left is not None and left > 0:
            # A piece of the body has come meanwhile.
            self._set_timer(left)
        elif self._task.cancelling():
            # Somebody else ends it: the server, which wants no answer.
            return
        elif self._layer.settings.report_only:
            tell(too_late(), self._context, f"{LAYER} (report only)")
        else:
            loop = asyncio.get_running_loop()
            self._over = loop.create_future()
            self._stopping = loop.create_task(self._stop(self._over, cutting=self._begun))

    async def _stop(self, over: asyncio.Future[None], *, cutting: bool) -> None:
        """Stops the handler, and answers its client if it does not stop."""
        if over.done():
            return
        if cutting:
            self._emit(AnswerCutOff(self._template, self._context.request_id, self._bounds.total or 0))
        elif self._begun:
            # It has begun in the last moment.
            self._set_timer(self._left())
            return
        self._cancel()
        if self._cancelled:
            await asyncio.wait({over}, timeout=_GRACE_SECONDS)
        if over.done():
            return
        if not self._begun:
            self.given_up = True
            self._layer.abandoned.add(self)
            self._emit(HandlerAbandoned(self._template, self._context.request_id))
            await refuse(too_late(), self._scope, self._receive, self._send, layer=LAYER)
        while not over.done() and not self._cancelled:
            await asyncio.wait({over}, timeout=_LOOK_SECONDS)
            self._cancel()

    def _cancel(self) -> None:
        """Cancels the handler, once, but not while it waits for a thread.

        That would give the thread's place in the pool away while it still runs, and one thread more would be made for
        each handler that hangs.
        """
        in_thread = self._task in current_default_thread_limiter().statistics().borrowers
        ended = self._over is None or self._over.done()
        if not in_thread and not ended and not self._task.cancelling():
            self._cancelled = True
            self._task.cancel()

    @property
    def _template(self) -> str | None:
        return None if self._context.route is None else self._context.route.template

    def _emit(self, event: HandlerAbandoned | AnswerCutOff) -> None:
        logger.warning("%s on %s (request id %s)", type(event).__name__, self._template, self._context.request_id)
        if self._context.events is not None:
            self._context.events.emit(event)


# --- override -------------------------------------------------------------------------------------------------------


class Timeout(Override):
    """The deadline of a route, a router or an application, in place of the settings; the innermost counts.

    Where its layer has judged the path wrong, the deadline is moved after routing. Where there is no layer at all, the
    request is refused with 500: nobody would watch what the route relies on. A layer that is switched off by the
    settings is meant to be off.

    Args:
        first_byte_seconds: So long may the handler take until its answer begins; ``None`` for as long as it likes.
        total_seconds: So long may the whole answer take; ``None`` for as long as it likes.

    Raises:
        ValueError: A number of seconds is not above 0.

    Example:
        >>> quick, report, long_poll = Timeout(2), Timeout(120), Timeout(None)
        >>> export = Timeout(10, total_seconds=600)
    """

    def __init__(self, first_byte_seconds: float | None, *, total_seconds: float | None = None) -> None:
        super().__init__()
        TimeoutSettings(first_byte_seconds=first_byte_seconds, total_seconds=total_seconds)
        self.bounds = Bounds(first_byte_seconds, total_seconds)

    async def act_late(self, connection: HTTPConnection) -> None:
        """Moves the deadline, or refuses the request where there is none to move."""
        context = request_context.ensure(connection.scope)
        answer: _Answer | None = context.state.get(TimeoutMiddleware)
        if answer is not None:
            answer.change(self.bounds)
        elif not context.hardened and self.bounds != (None, None):
            problem = DeadlineUnwatched("This request cannot be answered.")
            tell(problem, context, LAYER)
            raise problem
