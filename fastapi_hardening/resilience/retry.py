"""Tries again what failed for the moment: after a growing, random wait, a few times, and only as much as a budget lets.

It protects from failures that pass by themselves: a connection that breaks, a server that is being replaced. It is
*not* for what the caller did wrong, nor for what may not happen twice: of HTTP, only methods that may be repeated are
(RFC 9110, section 9.2.2), or requests with an ``Idempotency-Key``. Retries are also the usual reason why a service that
was slow for a moment stays down: everybody asks three times. So a budget holds for all calls together, as in Twitter's
Finagle: a fifth of the calls, and some a second.

Outbound it stands outside of failover and circuit breaker, so that each attempt may take another endpoint. It never
repeats what was cancelled or what one of ours refused, never sleeps past the deadline of its caller, and waits as long
as ``Retry-After`` says. Waits, stops and predicates are tenacity's, which is entered only after a first failure.

Example:
    >>> import asyncio
    >>> answers = [ConnectionError("reset by peer"), "paid"]
    >>> async def pay():
    ...     answer = answers.pop(0)
    ...     if isinstance(answer, Exception):
    ...         raise answer
    ...     return answer
    >>> retry = Retry("payments", RetrySettings(backoff_seconds=0.001))
    >>> asyncio.run(retry.call(pay))
    'paid'
"""

import asyncio
import inspect
import logging
import math
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import update_wrapper
from typing import Any, Literal, Self, TypeVar, cast

from prometheus_client import CollectorRegistry, Counter
from pydantic import Field, model_validator
from tenacity import AsyncRetrying, Future, RetryCallState, Retrying, retry_if_exception, retry_if_result
from tenacity.stop import stop_after_attempt, stop_any, stop_base
from tenacity.wait import wait_base, wait_random_exponential

from fastapi_hardening.core.call_deadline import remaining
from fastapi_hardening.core.clock import Clock, SystemClock
from fastapi_hardening.core.configuration import ConcernSettings, Section
from fastapi_hardening.core.events import Events
from fastapi_hardening.core.outbound import CallRefused, Outgoing, Send, status_of
from fastapi_hardening.core.tally import BoundedCounter

logger = logging.getLogger("fastapi_hardening.retry")

R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])
Why = Literal["attempts", "budget", "deadline"]


class RetrySettings(Section):
    """The settings of one retry policy."""

    attempts: int = Field(3, ge=1)
    """How often a call is made at most, the first time included."""

    backoff_seconds: float = Field(0.1, gt=0)
    """The wait before the second attempt is a random time up to this (full jitter)."""

    backoff_growth: float = Field(2.0, ge=1)
    """So many times longer may each further wait be."""

    longest_backoff_seconds: float = Field(5.0, gt=0)
    """No wait is longer, but for ``Retry-After``."""

    longest_retry_after_seconds: float = Field(10.0, gt=0)
    """``Retry-After`` is waited for up to this long."""

    statuses: tuple[int, ...] = (408, 429, 502, 503, 504)
    """The answers that are worth another attempt."""

    budget_ratio: float = Field(0.2, ge=0)
    """For each call, so many retries are allowed; together with the next, of all calls that share the budget."""

    budget_per_second: float = Field(10.0, ge=0)
    """So many retries a second are allowed however few calls there are."""

    budget_seconds: float = Field(10.0, gt=0)
    """How long the allowance of a call lasts."""

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.longest_backoff_seconds < self.backoff_seconds:
            raise ValueError(
                f"longest_backoff_seconds ({self.longest_backoff_seconds:g}) is below backoff_seconds "
                f"({self.backoff_seconds:g})"
            )
        return self


class RetriesSettings(RetrySettings, ConcernSettings):
    """The settings of all retry policies; not enabled, every call is made once."""

    named: dict[str, RetrySettings] = Field(default_factory=dict)
    """What is different for single policies, by their name."""

    def of(self, name: str) -> RetrySettings:
        """The settings of one policy: its own, and for the rest those of all."""
        own = self.named.get(name)
        changes = {} if own is None else {key: getattr(own, key) for key in own.model_fields_set}
        general = {key: getattr(self, key) for key in RetrySettings.model_fields}
        if not self.enabled:
            changes["attempts"] = 1
        return RetrySettings.model_validate(general | changes)


@dataclass(frozen=True, slots=True)
class RetryScheduled:
    """A call has failed and will be made again.

    Attributes:
        name: The policy.
        attempt: The number of the attempt that failed, from 1.
        seconds: How long it waits.
        reason: The class of the exception, or the status of the answer.
    """

    name: str
    attempt: int
    seconds: float
    reason: str


@dataclass(frozen=True, slots=True)
class RetryGivenUp:
    """A call has failed for good.

    Attributes:
        name: The policy.
        attempts: How often it was made.
        why: Because of the number of attempts, the budget, or the deadline of the caller.
        reason: The class of the last exception, or the status of the last answer.
    """

    name: str
    attempts: int
    why: Why
    reason: str


# --- engine -----------------------------------------------------------------------------------------------------------


class RetryBudget:
    """How many retries are allowed: a share of the calls of the last seconds, and a floor.

    Args:
        ratio: Retries for each call.
        per_second: Retries a second however few calls there are.
        seconds: How long the allowance of a call lasts.
        clock: Where the time comes from.

    Example:
        >>> budget = RetryBudget(ratio=0.5, per_second=0)
        >>> budget.deposit(), budget.deposit()
        (None, None)
        >>> budget.withdraw(), budget.withdraw()
        (True, False)
    """

    _BUCKETS = 10

    def __init__(
        self, ratio: float = 0.2, per_second: float = 10.0, seconds: float = 10.0, *, clock: Clock | None = None
    ) -> None:
        self._ratio = ratio
        self._reserve = per_second * seconds
        self._width = seconds / self._BUCKETS
        # Calls and retries by the tenth of the time in which they were.
        self._buckets = [[0, 0] for _ in range(self._BUCKETS)]
        self._current = self._buckets[0]
        self._tick = -self._BUCKETS
        self._ends = -math.inf
        self._now = (clock or SystemClock()).monotonic

    def deposit(self) -> None:
        """Counts a call."""
        now = self._now()
        if now >= self._ends:
            self._turn(now)
        self._current[0] += 1

    def withdraw(self) -> bool:
        """Takes one retry, if there is one left."""
        now = self._now()
        if now >= self._ends:
            self._turn(now)
        calls, retries = map(sum, zip(*self._buckets, strict=True))
        if self._reserve + calls * self._ratio - retries < 1 - 1e-9:
            return False
        self._current[1] += 1
        return True

    def _turn(self, now: float) -> None:
        tick = int(now / self._width)
        for each in range(max(self._tick + 1, tick - self._BUCKETS + 1), tick + 1):
            self._current = self._buckets[each % self._BUCKETS] = [0, 0]
        self._tick = max(tick, self._tick)
        self._ends = (tick + 1) * self._width


class Retry:
    """Makes calls again that failed for the moment. One serves any number of tasks.

    Use it as ``await retry.call(function, ...)``, ``retry.call_sync(function, ...)``, or as a decorator. Whoever
    puts it around a function says that the function may run twice.

    Args:
        name: What it is called in events, metrics and logs.
        settings: How often, how long between, how much in all.
        on: Exceptions that are worth another attempt, in place of :func:`is_transient`.
        is_failure: Says of a result that came back whether it is worth another attempt; the last one is returned.
        budget: Shared with other policies; by default one of its own.
        events: Where retries are told.
        clock: Where the time comes from.
        sleep: How it waits.
        sleep_sync: How it waits in a thread.
    """

    def __init__(
        self,
        name: str = "retry",
        settings: RetrySettings | None = None,
        *,
        on: tuple[type[Exception], ...] | Callable[[Exception], bool] | None = None,
        is_failure: Callable[[Any], bool] | None = None,
        budget: RetryBudget | None = None,
        events: Events | None = None,
        clock: Clock | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        sleep_sync: Callable[[float], None] = time.sleep,
    ) -> None:
        self.name = name
        self.settings = settings = settings or RetrySettings()
        self._clock = clock or SystemClock()
        self.budget = budget or RetryBudget(
            settings.budget_ratio, settings.budget_per_second, settings.budget_seconds, clock=self._clock
        )
        if on is None:
            self._on: Callable[[Exception], bool] = lambda error: is_transient(error, settings.statuses)
        elif isinstance(on, tuple):
            self._on = lambda error: isinstance(error, on)
        else:
            self._on = on
        self._is_failure = is_failure
        self._events = events
        self._sleep = sleep
        self._sleep_sync = sleep_sync
        predicate = retry_if_exception(self.is_worth_it)
        if is_failure is not None:
            predicate = cast("Any", predicate | retry_if_result(is_failure))
        self._options: dict[str, Any] = {
            "retry": predicate,
            "wait": _Wait(settings, self._clock),
            "before_sleep": self._tell,
        }

    def is_worth_it(self, error: BaseException) -> bool:
        """Whether an exception is worth another attempt."""
        if not isinstance(error, Exception) or isinstance(error, CallRefused):
            return False
        return self._on(error)

    async def call(self, function: Callable[..., Awaitable[R]], *args: Any, **kwargs: Any) -> R:
        """Calls a function, and again if it fails for the moment.

        Args:
            function: What to call; it may run several times.
            *args: Its arguments.
            **kwargs: Its arguments by name.

        Returns:
            What the function returns.

        Raises:
            Exception: What the last attempt raised.
        """
        self.budget.deposit()
        try:
            result = await function(*args, **kwargs)
        except Exception as error:
            if not self.is_worth_it(error):
                raise
            first = _First(error=error)
        else:
            if self._is_failure is None or not self._is_failure(result):
                return result
            first = _First(result)

        async def attempt() -> R:
            return cast("R", first.take()) if first.is_there else await function(*args, **kwargs)

        return await AsyncRetrying(**self._options, **_Course(self).options, sleep=self._sleep)(attempt)

    def call_sync(self, function: Callable[..., R], *args: Any, **kwargs: Any) -> R:
        """As :meth:`call`, for a function that is not asynchronous; it blocks the thread while it waits."""
        self.budget.deposit()
        try:
            result = function(*args, **kwargs)
        except Exception as error:
            if not self.is_worth_it(error):
                raise
            first = _First(error=error)
        else:
            if self._is_failure is None or not self._is_failure(result):
                return result
            first = _First(result)

        def attempt() -> R:
            return cast("R", first.take()) if first.is_there else function(*args, **kwargs)

        return Retrying(**self._options, **_Course(self).options, sleep=self._sleep_sync)(attempt)

    def __call__(self, function: F) -> F:
        """Puts the policy around a function, as a decorator.

        Raises:
            TypeError: The function is a generator, which is not over when it returns.
        """
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(f"{function!r} is a generator, and what it has given cannot be taken back")

        async def calling(*args: Any, **kwargs: Any) -> Any:
            return await self.call(function, *args, **kwargs)

        def calling_sync(*args: Any, **kwargs: Any) -> Any:
            return self.call_sync(function, *args, **kwargs)

        wrapper = calling if inspect.iscoroutinefunction(function) else calling_sync
        return cast("F", update_wrapper(wrapper, function))

    def around(self, send: Send, *, unsent: tuple[type[Exception], ...] = ()) -> Send:
        """The policy as a layer around an upstream.

        Args:
            send: The next layer.
            unsent: Exceptions that say that nothing was sent, so that also what may not happen twice is tried again.
        """
        careful = Retry(
            self.name,
            self.settings,
            on=unsent,
            budget=self.budget,
            events=self._events,
            clock=self._clock,
            sleep=self._sleep,
        )

        async def sending(outgoing: Outgoing) -> Any:
            policy = self if outgoing.repeatable else careful
            return await policy.call(send, outgoing)

        return sending

    def _tell(self, state: RetryCallState) -> None:
        scheduled = RetryScheduled(self.name, state.attempt_number, state.upcoming_sleep, _reason(state))
        logger.info("%s: attempt %d failed with %s, the next in %.3g s", *_values(scheduled))
        if self._events is not None:
            self._events.emit(scheduled)

    def given_up(self, state: RetryCallState, why: Why) -> None:
        """Tells that a call has failed for good."""
        given_up = RetryGivenUp(self.name, state.attempt_number, why, _reason(state))
        logger.info("%s: given up after attempt %d with %s (%s)", self.name, given_up.attempts, given_up.reason, why)
        if self._events is not None:
            self._events.emit(given_up)


class _First:
    """What the first attempt came to, which was made before tenacity was asked."""

    __slots__ = ("error", "is_there", "result")

    def __init__(self, result: Any = None, *, error: Exception | None = None) -> None:
        self.result = result
        self.error = error
        self.is_there = True

    def take(self) -> Any:
        """Gives it away, once."""
        self.is_there = False
        error, self.error = self.error, None
        if error is not None:
            raise error
        return self.result


class _Course:
    """One call on its way: when it stops, and what becomes of it then."""

    __slots__ = ("_retry", "_why", "options")

    def __init__(self, retry: Retry) -> None:
        self._retry = retry
        self._why: Why = "attempts"
        # The budget last: what it gives must be used.
        attempts = stop_after_attempt(retry.settings.attempts)
        self.options: dict[str, Any] = {
            "stop": stop_any(attempts, _Stop(self._past_deadline), _Stop(self._over_budget)),
            "retry_error_callback": self.give_up,
        }

    def _past_deadline(self, state: RetryCallState) -> bool:
        left = remaining()
        if left is None or state.upcoming_sleep < left:
            return False
        self._why = "deadline"
        return True

    def _over_budget(self, _state: RetryCallState) -> bool:
        if self._retry.budget.withdraw():
            return False
        self._why = "budget"
        return True

    def give_up(self, state: RetryCallState) -> Any:
        """Returns or raises what the last attempt came to."""
        self._retry.given_up(state, self._why)
        return cast("Future", state.outcome).result()


class _Stop(stop_base):
    """A reason to stop, as tenacity has them."""

    def __init__(self, is_over: Callable[[RetryCallState], bool]) -> None:
        self._is_over = is_over

    def __call__(self, retry_state: RetryCallState) -> bool:
        return self._is_over(retry_state)


class _Wait(wait_base):
    """Full jitter, or as long as the service says."""

    def __init__(self, settings: RetrySettings, clock: Clock) -> None:
        self._jitter = wait_random_exponential(
            settings.backoff_seconds, settings.longest_backoff_seconds, settings.backoff_growth
        )
        self._longest = settings.longest_retry_after_seconds
        self._clock = clock

    def __call__(self, retry_state: RetryCallState) -> float:
        told = retry_after_of(_outcome(retry_state), self._clock.time())
        jitter = self._jitter(retry_state)
        return jitter if told is None else max(jitter, min(told, self._longest))


def is_transient(error: Exception, statuses: tuple[int, ...] = RetrySettings().statuses) -> bool:
    """Whether a failure may pass by itself: no connection, no answer in time, or an answer with one of the statuses.

    Example:
        >>> [is_transient(error) for error in (ConnectionResetError(), TimeoutError(), ValueError())]
        [True, True, False]
    """
    if isinstance(error, (ConnectionError, TimeoutError, socket.gaierror)):
        return True
    status = status_of(error)
    if status is not None:
        return status in statuses
    # The clients whose exceptions are not Python's own; who has not imported one cannot have its exceptions.
    clients = (sys.modules.get(name) for name in ("httpx2", "httpx"))
    return any(client is not None and isinstance(error, client.TransportError) for client in clients)


def retry_after_of(outcome: Any, now: float) -> float | None:
    """How many seconds an answer or an exception says to wait (RFC 9110, section 10.2.3); ``None`` if it does not.

    Args:
        outcome: An answer, an exception with one, or an exception with headers.
        now: Seconds since the epoch, for a date.
    """
    headers = getattr(getattr(outcome, "response", outcome), "headers", None)
    if not isinstance(headers, Mapping):
        return None
    value = next((value for name, value in headers.items() if name.lower() == "retry-after"), None)
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - now)
    except ValueError:
        return None


def _outcome(state: RetryCallState) -> Any:
    """What the last attempt raised or returned."""
    ended = cast("Future", state.outcome)  # tenacity asks nothing before
    return ended.exception() or ended.result()


def _reason(state: RetryCallState) -> str:
    outcome = _outcome(state)
    status = None if isinstance(outcome, Exception) else status_of(outcome)
    return type(outcome).__name__ if status is None else str(status)


def _values(scheduled: RetryScheduled) -> tuple[str, int, str, float]:
    return scheduled.name, scheduled.attempt, scheduled.reason, scheduled.seconds


class Retries:
    """The retry policies of one application by name; reachable as ``handle.retries``.

    Args:
        settings: In general and by name.
        events: Where retries are told.
        clock: Where the time comes from.

    Example:
        >>> retries = Retries()
        >>> retries.get("payments") is retries.get("payments")
        True
    """

    def __init__(
        self, settings: RetriesSettings | None = None, *, events: Events | None = None, clock: Clock | None = None
    ) -> None:
        self.settings = settings or RetriesSettings()
        self._events = events
        self._clock = clock
        self._retries: dict[str, Retry] = {}
        self.on_first: list[Callable[[], None]] = []

    def __iter__(self) -> Iterator[Retry]:
        return iter(tuple(self._retries.values()))

    def get(self, name: str) -> Retry:
        """The policy of that name, made with its settings the first time."""
        return self._retries.get(name) or self.add(name)

    def add(
        self,
        name: str,
        settings: RetrySettings | None = None,
        *,
        on: tuple[type[Exception], ...] | Callable[[Exception], bool] | None = None,
        is_failure: Callable[[Any], bool] | None = None,
        budget: RetryBudget | None = None,
    ) -> Retry:
        """Makes a policy; the arguments are those of :class:`Retry`.

        Raises:
            ValueError: There is one of that name already.
        """
        if name in self._retries:
            raise ValueError(f"there is a retry policy named {name!r} already; get() gives it")
        if settings is None:
            settings = self.settings.of(name)
        elif not self.settings.enabled:
            settings = settings.model_copy(update={"attempts": 1})
        is_first = not self._retries
        retry = self._retries[name] = Retry(
            name,
            settings,
            on=on,
            is_failure=is_failure,
            budget=budget,
            events=self._events,
            clock=self._clock,
        )
        if is_first:
            for call in self.on_first:
                call()
        return retry


def measure(registry: CollectorRegistry, events: Events) -> None:
    """Has retries counted in ``hardening_retries_total``, by policy and outcome."""
    counter = BoundedCounter(
        Counter(
            "hardening_retries",
            "Retries that were made (scheduled), and calls given up by the reason.",
            ("policy", "outcome"),
            registry=registry,
        )
    )
    events.subscribe(RetryScheduled, lambda event: counter.count(event.name, "scheduled"))
    events.subscribe(RetryGivenUp, lambda event: counter.count(event.name, event.why))
