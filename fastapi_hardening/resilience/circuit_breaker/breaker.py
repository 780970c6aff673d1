"""The engine of one circuit breaker. It knows no HTTP but for the status of an error."""

import inspect
import logging
import math
import random
import threading
from collections.abc import Awaitable, Callable
from functools import update_wrapper
from types import TracebackType
from typing import Any, Self, TypeVar, cast

from fastapi_hardening.core.clock import Clock, SystemClock
from fastapi_hardening.core.events import Events
from fastapi_hardening.core.outbound import CallRefused, status_of
from fastapi_hardening.resilience.circuit_breaker.states import (
    CLOSED,
    DISABLED,
    FORCED_OPEN,
    HALF_OPEN,
    METRICS_ONLY,
    OPEN,
    CircuitBreakerSettings,
    CircuitClosed,
    CircuitForced,
    CircuitHalfOpened,
    CircuitOpen,
    CircuitOpened,
    CircuitSnapshot,
    CircuitState,
)
from fastapi_hardening.resilience.circuit_breaker.window import Counts, CountWindow, Throttle, TimeWindow, Window

logger = logging.getLogger("fastapi_hardening.circuit_breaker")

R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])


class CircuitBreaker:
    """Decides which calls of one service are made. One serves any number of tasks and threads.

    Use it as ``await breaker.call(function, ...)``, as a decorator, or around a block: ``async with breaker.guard():``.
    Functions and blocks that are not asynchronous do as well: ``call_sync``, the decorator, ``with breaker.guard():``.

    Args:
        name: What it is called in events, metrics and logs; a name of the code, never of a request.
        settings: When it opens, and for how long.
        ignore: Exceptions that say nothing about the service, such as a validation error of the caller.
        is_failure: Says of a result that came back whether it counts as a failure, such as an answer 500.
        state: The state in which it begins.
        events: Where changes of its state are told.
        clock: Where the time comes from.
    """

    def __init__(
        self,
        name: str,
        settings: CircuitBreakerSettings | None = None,
        *,
        ignore: tuple[type[Exception], ...] = (),
        is_failure: Callable[[Any], bool] | None = None,
        state: CircuitState = CLOSED,
        events: Events | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.name = name
        self.settings = settings = settings or CircuitBreakerSettings()
        self._ignore: tuple[type[Exception], ...] = (CallRefused, *ignore)
        self._is_failure = is_failure
        self._events = events
        self._now = (clock or SystemClock()).monotonic
        self._slow_after = math.inf if settings.slow_call_seconds is None else settings.slow_call_seconds
        # Re-entrant, because who hears of a change may look at the breaker. Never held while a call is made.
        self._lock = threading.RLock()
        self._succeeded = self._failed = self._ignored = self._refused = 0
        # Calls that began in an earlier state do not count in this one.
        self._generation = 0
        self._openings = 0
        self._state = state
        self._window: Window
        self._throttle: Throttle | None = None
        self._until = math.inf
        self._permits = 0
        self._minimum = 0
        self._probe_at = 0.0
        self._would_be_open = False
        self._become(state)

    # --- single steps -------------------------------------------------------------------------------------------------

    def acquire(self) -> int:
        """Asks whether a call may be made; each permit is given back by :meth:`record` or :meth:`release`, once.

        Returns:
            The permit.

        Raises:
            CircuitOpen: It may not.
        """
        return self._generation if self._lets_everything_through else self._acquire_slowly()

    def record(self, permit: int, started: float, *, failed: bool = False) -> None:
        """Counts a call that has ended.

        Args:
            permit: What :meth:`acquire` gave.
            started: When the call began, on the monotonic clock.
            failed: Whether it failed.
        """
        now = self._now()
        slow = now - started > self._slow_after
        if failed:
            self._failed += 1
        else:
            self._succeeded += 1
        if permit != self._generation or self._state == DISABLED:
            return
        if self._throttle is not None:
            with self._lock:
                self._throttle.end(started, accepted=not failed)
        window = self._window
        if self._state == HALF_OPEN:
            with self._lock:
                if permit == self._generation:
                    window.record(now, failed=failed, slow=slow)
                    self._judge_trials(window.counts(now))
            return
        window.record(now, failed=failed, slow=slow)
        if window.troubled:
            self._judge(now, permit)

    def _succeed(self, permit: int, started: float) -> None:
        """As :meth:`record`, in a hurry: nearly every call ends here."""
        now = self._now()
        if self._is_plainly_counting and permit == self._generation and now - started <= self._slow_after:
            self._succeeded += 1
            window = self._window
            window.succeed(now)
            if window.troubled:
                self._judge(now, permit)
        else:
            self.record(permit, started)

    def release(self, permit: int, started: float) -> None:
        """Gives a permit back for a call that says nothing: cancelled, refused by ours, or the caller's own mistake."""
        self._ignored += 1
        with self._lock:
            if permit != self._generation:
                return
            if self._throttle is not None:
                self._throttle.forget(started)
            if self._state == HALF_OPEN:
                self._permits += 1

    def end(self, permit: int, started: float, error: BaseException | None, result: Any = None) -> None:
        """Counts a call by what it raised or returned, or gives its permit back."""
        if error is None:
            try:
                failed = self._is_failure is not None and self._is_failure(result)
            except BaseException:
                self.release(permit, started)
                raise
            self.record(permit, started, failed=failed)
        elif self.is_counted(error):
            self.record(permit, started, failed=True)
        else:
            self.release(permit, started)

    def is_counted(self, error: BaseException) -> bool:
        """Whether an exception is a failure of the service."""
        if not isinstance(error, Exception) or isinstance(error, self._ignore):
            return False
        status = status_of(error)
        return status is None or not 400 <= status <= 499 or status in self.settings.counted_statuses  # noqa: PLR2004

    # --- ways to use it -----------------------------------------------------------------------------------------------

    async def call(self, function: Callable[..., Awaitable[R]], *args: Any, **kwargs: Any) -> R:
        """Calls a function if the circuit lets it.

        Args:
            function: What to call.
            *args: Its arguments.
            **kwargs: Its arguments by name.

        Returns:
            What the function returns.

        Raises:
            CircuitOpen: The circuit is open, and the function was not called.
        """
        permit = self._generation if self._lets_everything_through else self._acquire_slowly()
        started = self._now()
        try:
            result = await function(*args, **kwargs)
        except BaseException as error:
            self.end(permit, started, error)
            raise
        if self._is_failure is None:
            self._succeed(permit, started)
        else:
            self.end(permit, started, None, result)
        return result

    def call_sync(self, function: Callable[..., R], *args: Any, **kwargs: Any) -> R:
        """As :meth:`call`, for a function that is not asynchronous.

        Raises:
            CircuitOpen: The circuit is open, and the function was not called.
            TypeError: The function is asynchronous: what it returns has not happened yet.
        """
        permit = self.acquire()
        started = self._now()
        try:
            result = function(*args, **kwargs)
        except BaseException as error:
            self.end(permit, started, error)
            raise
        if inspect.isawaitable(result):
            self.release(permit, started)
            if inspect.iscoroutine(result):
                result.close()
            raise TypeError(f"{function!r} is asynchronous: use call() and await it")
        self.end(permit, started, None, result)
        return result

    def __call__(self, function: F) -> F:
        """Puts the breaker around a function, as a decorator.

        Raises:
            TypeError: The function is a generator, which is not over when it returns.
        """
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(f"{function!r} is a generator: put guard() around the block that reads from it")

        async def calling(*args: Any, **kwargs: Any) -> Any:
            return await self.call(function, *args, **kwargs)

        def calling_sync(*args: Any, **kwargs: Any) -> Any:
            return self.call_sync(function, *args, **kwargs)

        wrapper = calling if inspect.iscoroutinefunction(function) else calling_sync
        return cast("F", update_wrapper(wrapper, function))

    def guard(self) -> "CircuitGuard":
        """The breaker around one block, with ``async with`` or ``with``."""
        return CircuitGuard(self)

    # --- to look at, and by hand --------------------------------------------------------------------------------------

    @property
    def state(self) -> CircuitState:
        """The state; an open circuit whose time is over is half-open."""
        with self._lock:
            self._refresh(self._now())
            return self._state

    @property
    def seconds_left(self) -> float:
        """How long it stays open; 0 where it is not, infinite where it was forced."""
        if self._state == FORCED_OPEN:
            return math.inf
        return max(0.0, self._until - self._now()) if self._state == OPEN else 0.0

    def snapshot(self) -> CircuitSnapshot:
        """The breaker as it is at the moment."""
        with self._lock:
            state = self.state
            calls, failed, slow = self._window.counts(self._now())
            known = calls >= self._minimum
            return CircuitSnapshot(
                self.name,
                state,
                calls,
                failed / calls if known else None,
                slow / calls if known else None,
                self.seconds_left,
                self._succeeded,
                self._failed,
                self._ignored,
                self._refused,
            )

    def reset(self) -> None:
        """Closes it, and forgets what it has counted."""
        self._force(CLOSED)

    def force_open(self) -> None:
        """Refuses every call, until :meth:`reset`."""
        self._force(FORCED_OPEN)

    def disable(self) -> None:
        """Lets every call through and counts none, until :meth:`reset`; also known as forced closed."""
        self._force(DISABLED)

    def only_measure(self) -> None:
        """Counts, tells when it would open, and never refuses, until :meth:`reset`."""
        self._force(METRICS_ONLY)

    def trip(self, seconds: float) -> None:
        """Opens a closed circuit for so long, because somebody else knows that the service fails."""
        with self._lock:
            if self._state == CLOSED:
                self._open(None, seconds)

    # --- the states ---------------------------------------------------------------------------------------------------

    def _acquire_slowly(self) -> int:
        with self._lock:
            now = self._now()
            self._refresh(now)
            left = 0.0
            if self._state == HALF_OPEN:
                if self._permits > 0:
                    self._permits -= 1
                    return self._generation
            elif self._state == OPEN:
                left = self._until - now
            elif self._state == FORCED_OPEN:
                left = self.settings.open_seconds
            elif self._throttle is None or self._passes(self._throttle, now):
                return self._generation
            else:
                left = self.settings.throttle_probe_seconds
            self._refused += 1
        raise CircuitOpen(self.name, left)

    def _passes(self, throttle: Throttle, now: float) -> bool:
        likely = throttle.probability(now)
        if likely > 0 and now < self._probe_at and random.random() < likely:  # noqa: S311 - not a secret
            throttle.refuse(now)
            return False
        self._probe_at = now + self.settings.throttle_probe_seconds
        throttle.begin(now)
        return True

    def _refresh(self, now: float) -> None:
        """What the time alone changes."""
        if now < self._until:
            return
        if self._state == OPEN:
            self._become(HALF_OPEN)
            self._tell(CircuitHalfOpened(self.name))
        elif self._state == HALF_OPEN:
            self._open(self._window.counts(now))

    def _judge(self, now: float, permit: int) -> None:
        counts = self._window.counts(now)
        if counts.calls < self._minimum or not self._is_too_much(counts, counts.calls):
            return
        with self._lock:
            if permit != self._generation:
                return
            if self._state == CLOSED and self._throttle is None:
                self._open(counts)
            elif self._state == METRICS_ONLY and not self._would_be_open:
                self._would_be_open = True
                logger.warning("the circuit of %s would open, if it did more than measure: %s", self.name, counts)

    def _judge_trials(self, counts: Counts) -> None:
        """Opens as soon as the other trials cannot help any more, closes when the last has ended."""
        trials = self.settings.half_open_calls
        if self._is_too_much(counts, trials):
            self._open(counts)
        elif counts.calls >= trials:
            self._openings = 0
            self._become(CLOSED)
            logger.info("the circuit of %s is closed again", self.name)
            self._tell(CircuitClosed(self.name))

    def _is_too_much(self, counts: Counts, calls: int) -> bool:
        settings = self.settings
        return counts.failed / calls >= settings.failure_rate or counts.slow / calls >= settings.slow_call_rate

    def _open(self, counts: Counts | None, seconds: float | None = None) -> None:
        settings = self.settings
        if seconds is None:
            # Further powers would not be numbers any more.
            grown = settings.open_seconds * settings.open_growth ** min(self._openings, 64)
            seconds = min(grown, settings.longest_open_seconds)
            self._openings += 1
        self._become(OPEN)
        self._until = self._now() + seconds
        logger.warning("the circuit of %s is open for %.3g s: %s", self.name, seconds, counts or "as elsewhere")
        self._tell(CircuitOpened(self.name, seconds, counts))

    def _force(self, state: CircuitState) -> None:
        with self._lock:
            self._openings = 0
            self._become(state)
            logger.warning("the circuit of %s is %s by hand", self.name, state)
            self._tell(CircuitForced(self.name, state))

    def _become(self, state: CircuitState) -> None:
        """Begins a state: nothing that was counted before counts in it."""
        settings = self.settings
        self._generation += 1
        self._state = state
        self._until = math.inf
        self._permits = 0
        self._would_be_open = False
        self._throttle = None
        self._probe_at = 0.0
        self._minimum = settings.minimum_calls
        if state is HALF_OPEN:
            self._minimum = min(self._minimum, settings.half_open_calls)
            self._permits = settings.half_open_calls
            self._window = CountWindow(settings.half_open_calls)
            if settings.longest_half_open_seconds is not None:
                self._until = self._now() + settings.longest_half_open_seconds
        else:
            by_count = settings.window == "count"
            self._window = CountWindow(settings.window_calls) if by_count else TimeWindow(settings.window_seconds)
            if state is CLOSED and settings.mode == "throttle":
                self._throttle = Throttle(settings.window_seconds, k=settings.throttle_factor, spared=self._minimum)
        self._is_plainly_counting = state in (CLOSED, METRICS_ONLY) and self._throttle is None
        self._lets_everything_through = self._is_plainly_counting or state == DISABLED

    def _tell(self, event: object) -> None:
        if self._events is not None:
            self._events.emit(event)


class CircuitGuard:
    """A breaker around one block.

    Example:
        >>> breaker = CircuitBreaker("stock")
        >>> with breaker.guard() as call:
        ...     answer = 500
        ...     if answer >= 500:
        ...         call.failed()
        >>> breaker.snapshot().failed
        1
    """

    __slots__ = ("_breaker", "_has_failed", "_permit", "_started")

    def __init__(self, breaker: CircuitBreaker) -> None:
        self._breaker = breaker
        self._has_failed = False
        self._permit = 0
        self._started = 0.0

    def failed(self) -> None:
        """Says that the call has failed, though nothing was raised."""
        self._has_failed = True

    def __enter__(self) -> Self:
        self._permit = self._breaker.acquire()
        self._started = self._breaker._now()  # noqa: SLF001 - a part of it
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            if self._has_failed:
                self._breaker.record(self._permit, self._started, failed=True)
            else:
                self._breaker._succeed(self._permit, self._started)  # noqa: SLF001
        else:
            self._breaker.end(self._permit, self._started, error)

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, trace)
