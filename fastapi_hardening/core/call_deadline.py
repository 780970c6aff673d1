"""Until when the work of this task is wanted: a deadline that everything further in can see, and keeps to.

A call that waits for longer than its caller does works for nobody. So whoever bounds a piece of work says so here, and
whoever is further in, a retry that wants to sleep or a call with a timeout of its own, asks what is left.

Example:
    >>> import asyncio
    >>> async def inner():
    ...     async with within(60):
    ...         return remaining() <= 5
    >>> async def outer():
    ...     async with within(5):
    ...         return await inner()
    >>> asyncio.run(outer()), remaining()
    (True, None)
"""

import asyncio
import time
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Self

from fastapi_hardening.core import context as request_context

_deadline: ContextVar[float | None] = ContextVar("fastapi_hardening.deadline", default=None)


def remaining() -> float | None:
    """Seconds until the deadline, below 0 when it is past; ``None`` without one.

    While a request waits for its answer to begin, its own deadline counts, too.
    """
    deadline = _deadline.get()
    context = request_context.current()
    if context is not None and context.deadline is not None:
        deadline = context.deadline if deadline is None else min(deadline, context.deadline)
    return None if deadline is None else deadline - time.monotonic()


class within:  # noqa: N801 - reads as asyncio.timeout does
    """Bounds a block: cancels what it waits for after so many seconds, or earlier, if an outer deadline is earlier.

    Args:
        seconds: How long the block may take; ``None`` leaves it to the outer deadline.

    Raises:
        TimeoutError: The time was over.
    """

    __slots__ = ("_seconds", "_timeout", "_token")

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._timeout: asyncio.Timeout | None = None
        self._token: Token[float | None] | None = None

    async def __aenter__(self) -> Self:
        if self._seconds is not None:
            left = remaining()
            seconds = self._seconds
            if left is not None and left <= seconds:
                # A moment before the outer one: the innermost knows best what took too long.
                seconds = max(0.0, left - min(0.05, left / 10))
            own = time.monotonic() + seconds
            self._token = _deadline.set(own if left is None else min(own, time.monotonic() + left))
            self._timeout = asyncio.timeout(seconds)
            await self._timeout.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timeout is not None and self._token is not None:
            _deadline.reset(self._token)
            await self._timeout.__aexit__(kind, error, trace)
