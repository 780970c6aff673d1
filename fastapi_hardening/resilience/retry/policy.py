"""One retry policy: its settings, what it tells, and its first attempt."""

import asyncio
import inspect
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial, update_wrapper
from typing import Any, Literal, Self, TypeVar, cast

from pydantic import Field, model_validator

from fastapi_hardening.core.clock import Clock, SystemClock
from fastapi_hardening.core.configuration import Section
from fastapi_hardening.core.events import Events
from fastapi_hardening.core.outbound import CallRefused, Outgoing, Send
from fastapi_hardening.resilience.retry.budget import RetryBudget
from fastapi_hardening.resilience.retry.outcome import STATUSES, is_transient, reason_of

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

    statuses: tuple[int, ...] = STATUSES
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
        # Here, and not above: nearly nobody who imports this package has a policy, and tenacity is large.
        from fastapi_hardening.resilience.retry.tenacious import Attempts, First  # noqa: PLC0415

        self._first = First
        self._attempts = Attempts(
            settings,
            is_worth_it=self.is_worth_it,
            is_failure=is_failure,
            withdraw=self.budget.withdraw,
            scheduled=self._tell_scheduled,
            given_up=self._tell_given_up,
            now=self._clock.time,
            sleep=sleep,
            sleep_sync=sleep_sync,
        )

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
            first = self._first(error=error)
        else:
            if self._is_failure is None or not self._is_failure(result):
                return result
            first = self._first(result)

        return await self._attempts.go_on(first, partial(function, *args, **kwargs))

    def call_sync(self, function: Callable[..., R], *args: Any, **kwargs: Any) -> R:
        """As :meth:`call`, for a function that is not asynchronous; it blocks the thread while it waits."""
        self.budget.deposit()
        try:
            result = function(*args, **kwargs)
        except Exception as error:
            if not self.is_worth_it(error):
                raise
            first = self._first(error=error)
        else:
            if self._is_failure is None or not self._is_failure(result):
                return result
            first = self._first(result)

        return self._attempts.go_on_sync(first, partial(function, *args, **kwargs))

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

    def _tell_scheduled(self, attempt: int, seconds: float, outcome: Any) -> None:
        reason = reason_of(outcome)
        logger.info("%s: attempt %d failed with %s, the next in %.3g s", self.name, attempt, reason, seconds)
        if self._events is not None:
            self._events.emit(RetryScheduled(self.name, attempt, seconds, reason))

    def _tell_given_up(self, attempts: int, why: Why, outcome: Any) -> None:
        reason = reason_of(outcome)
        logger.info("%s: given up after attempt %d with %s (%s)", self.name, attempts, reason, why)
        if self._events is not None:
            self._events.emit(RetryGivenUp(self.name, attempts, why, reason))
