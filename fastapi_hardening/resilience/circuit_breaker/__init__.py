"""Stops calling a service that fails: answers at once instead of waiting for a timeout, and lets the service recover.

It protects both sides. A service that hangs ties up every request that needs it, until nothing is served any more; one
that comes back is met by all who waited. It is *not* a retry, and not a timeout: a call that never ends says nothing,
so put the timeout inside.

Outbound it stands behind the failover, one breaker an endpoint, around each single attempt. Closed, it counts; when too
many calls fail or are slow, it opens and refuses with 503 and the time left. Then it is half-open: exactly so many
trial calls are let through, and they decide. Refusals of ours, cancelled calls, and errors that are the caller's (4xx)
do not count; a trial that ended so is given back.

The states and cases are those of resilience4j; ``mode = "throttle"`` is the client-side throttling of Google's book
«Site Reliability Engineering», chapter 21.

Example:
    >>> import asyncio
    >>> from fastapi_hardening.core.clock import ManualClock
    >>> clock = ManualClock()
    >>> settings = CircuitBreakerSettings(minimum_calls=2, open_seconds=10)
    >>> breaker = CircuitBreaker("payments", settings, clock=clock)
    >>> async def pay():
    ...     raise ConnectionError("nobody there")
    >>> async def try_to_pay():
    ...     try:
    ...         await breaker.call(pay)
    ...     except (ConnectionError, CircuitOpen) as error:
    ...         return type(error).__name__
    >>> [asyncio.run(try_to_pay()) for _ in range(3)], breaker.state
    (['ConnectionError', 'ConnectionError', 'CircuitOpen'], 'open')
    >>> clock.advance(10)
    >>> breaker.state
    'half-open'
"""

from fastapi_hardening.resilience.circuit_breaker.breaker import CircuitBreaker
from fastapi_hardening.resilience.circuit_breaker.registry import CircuitBreakers, CircuitBreakersSettings, measure
from fastapi_hardening.resilience.circuit_breaker.states import (
    CircuitBreakerSettings,
    CircuitClosed,
    CircuitForced,
    CircuitHalfOpened,
    CircuitOpen,
    CircuitOpened,
    CircuitSnapshot,
    CircuitState,
)

__all__ = [
    "CircuitBreaker",
    "CircuitBreakerSettings",
    "CircuitBreakers",
    "CircuitBreakersSettings",
    "CircuitClosed",
    "CircuitForced",
    "CircuitHalfOpened",
    "CircuitOpen",
    "CircuitOpened",
    "CircuitSnapshot",
    "CircuitState",
    "measure",
]
