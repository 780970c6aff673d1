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

from fastapi_hardening.resilience.retry.budget import RetryBudget
from fastapi_hardening.resilience.retry.outcome import is_transient, retry_after_of
from fastapi_hardening.resilience.retry.policy import Retry, RetryGivenUp, RetryScheduled, RetrySettings
from fastapi_hardening.resilience.retry.registry import Retries, RetriesSettings, measure

__all__ = [
    "Retries",
    "RetriesSettings",
    "Retry",
    "RetryBudget",
    "RetryGivenUp",
    "RetryScheduled",
    "RetrySettings",
    "is_transient",
    "measure",
    "retry_after_of",
]
