"""The attempts after the first one, by tenacity: its waits, stops and predicates, anew for each call.

One of its objects may not be shared between tasks, so each call has its own. It is imported with the first policy.
"""

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, cast

from tenacity import AsyncRetrying, Future, RetryCallState, Retrying, retry_if_exception, retry_if_result
from tenacity.stop import stop_after_attempt, stop_any, stop_base
from tenacity.wait import wait_base, wait_random_exponential

from fastapi_hardening.core.call_deadline import remaining
from fastapi_hardening.resilience.retry.outcome import retry_after_of

R = TypeVar("R")


class First:
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


class Attempts:
    """Makes the further attempts of the calls of one policy.

    Args:
        settings: How often, and how long between.
        is_worth_it: Whether an exception is worth another attempt.
        is_failure: Whether a result is.
        withdraw: Takes a retry from the budget.
        scheduled: Is told the number of the attempt, the wait, and what the attempt came to.
        given_up: Is told the number of the attempt, why, and what the attempt came to.
        now: Seconds since the epoch.
        sleep: How it waits.
        sleep_sync: How it waits in a thread.
    """

    def __init__(
        self,
        settings: Any,
        *,
        is_worth_it: Callable[[BaseException], bool],
        is_failure: Callable[[Any], bool] | None,
        withdraw: Callable[[], bool],
        scheduled: Callable[[int, float, Any], None],
        given_up: Callable[[int, Any, Any], None],
        now: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]],
        sleep_sync: Callable[[float], None],
    ) -> None:
        self.most: int = settings.attempts
        self.withdraw = withdraw
        self.given_up = given_up
        self._sleep = sleep
        self._sleep_sync = sleep_sync
        predicate: Any = retry_if_exception(is_worth_it)
        if is_failure is not None:
            predicate |= retry_if_result(is_failure)
        self._options: dict[str, Any] = {
            "retry": predicate,
            "wait": _Wait(settings, now),
            "before_sleep": lambda state: scheduled(state.attempt_number, state.upcoming_sleep, _outcome(state)),
        }

    async def go_on(self, first: First, function: Callable[[], Awaitable[R]]) -> R:
        """Waits and calls again, until it works or must stop."""

        async def attempt() -> R:
            return cast("R", first.take()) if first.is_there else await function()

        return await AsyncRetrying(**self._options, **_Course(self).options, sleep=self._sleep)(attempt)

    def go_on_sync(self, first: First, function: Callable[[], R]) -> R:
        """As :meth:`go_on`, in a thread."""

        def attempt() -> R:
            return cast("R", first.take()) if first.is_there else function()

        return Retrying(**self._options, **_Course(self).options, sleep=self._sleep_sync)(attempt)


class _Course:
    """One call on its way: when it stops, and what becomes of it then."""

    __slots__ = ("_attempts", "_why", "options")

    def __init__(self, attempts: Attempts) -> None:
        self._attempts = attempts
        self._why = "attempts"
        # The budget last: what it gives must be used.
        stop = stop_any(stop_after_attempt(attempts.most), _Stop(self._past_deadline), _Stop(self._over_budget))
        self.options: dict[str, Any] = {"stop": stop, "retry_error_callback": self._give_up}

    def _past_deadline(self, state: RetryCallState) -> bool:
        left = remaining()
        if left is None or state.upcoming_sleep < left:
            return False
        self._why = "deadline"
        return True

    def _over_budget(self, _state: RetryCallState) -> bool:
        if self._attempts.withdraw():
            return False
        self._why = "budget"
        return True

    def _give_up(self, state: RetryCallState) -> Any:
        """Returns or raises what the last attempt came to."""
        self._attempts.given_up(state.attempt_number, self._why, _outcome(state))
        return cast("Future", state.outcome).result()


class _Stop(stop_base):
    """A reason to stop, as tenacity has them."""

    def __init__(self, is_over: Callable[[RetryCallState], bool]) -> None:
        self._is_over = is_over

    def __call__(self, retry_state: RetryCallState) -> bool:
        return self._is_over(retry_state)


class _Wait(wait_base):
    """Full jitter, or as long as the service says."""

    def __init__(self, settings: Any, now: Callable[[], float]) -> None:
        self._jitter = wait_random_exponential(
            settings.backoff_seconds, settings.longest_backoff_seconds, settings.backoff_growth
        )
        self._longest: float = settings.longest_retry_after_seconds
        self._now = now

    def __call__(self, retry_state: RetryCallState) -> float:
        told = retry_after_of(_outcome(retry_state), self._now())
        jitter = self._jitter(retry_state)
        return jitter if told is None else max(jitter, min(told, self._longest))


def _outcome(state: RetryCallState) -> Any:
    """What the last attempt raised or returned."""
    ended = cast("Future", state.outcome)  # tenacity asks nothing before
    return ended.exception() or ended.result()
