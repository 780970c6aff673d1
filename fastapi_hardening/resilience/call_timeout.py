"""Bounds how long a call of a service may take, and lets everything further in know how long that still is.

It protects from waiting for what does not come: clients of HTTP and databases have timeouts for a connection or a read,
and a service that sends one byte a second is within all of them for ever. It is *not* the deadline of a handler, which
is inbound.

Outbound it stands twice: outermost around a call with all its attempts (total), and innermost around a single attempt,
inside the circuit breaker, which sees it as a failure. Deadlines nest, so a retry further in never sleeps past the
total. A function that blocks its thread cannot be ended this way.

Example:
    >>> import asyncio
    >>> timeout = CallTimeout("payments", 0.001)
    >>> async def wait():
    ...     try:
    ...         await timeout.call(asyncio.Event().wait)
    ...     except CallTimedOut as error:
    ...         return error.status_code, isinstance(error, TimeoutError)
    >>> asyncio.run(wait())
    (504, True)
"""

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import update_wrapper
from types import TracebackType
from typing import Any, TypeVar, cast

from fastapi_hardening.core.call_deadline import within
from fastapi_hardening.core.events import Events
from fastapi_hardening.core.outbound import Outgoing, Send
from fastapi_hardening.core.problem import Problem

R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])


class CallTimedOut(Problem, TimeoutError):  # noqa: N818 - named as problems are, by what happened
    """A service has not answered in time.

    Attributes:
        name: The call; for logs, not for clients.
        seconds: How long it was allowed to take.
    """

    status = 504

    def __init__(self, name: str, seconds: float) -> None:
        super().__init__("A service that this needs has not answered in time.")
        self.name = name
        self.seconds = seconds

    def __str__(self) -> str:
        return f"{self.name} has not answered within {self.seconds:.3g} s"


@dataclass(frozen=True, slots=True)
class CallWasTooLong:
    """A call was ended because it took too long.

    Attributes:
        name: The call.
        seconds: How long it was allowed to take.
    """

    name: str
    seconds: float


class _Guard(within):
    """The timeout around one block."""

    __slots__ = ("_of",)

    def __init__(self, timeout: "CallTimeout") -> None:
        super().__init__(timeout.seconds)
        self._of = timeout

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await super().__aexit__(kind, error, trace)
        except TimeoutError as ended:
            raise self._of.told() from ended


class CallTimeout:
    """A timeout around calls of one service. One serves any number of tasks.

    Use it as ``async with timeout.guard():``, ``await timeout.call(function, ...)``, or as a decorator.

    Args:
        name: What it is called in events and logs.
        seconds: How long a call may take; an earlier deadline of the caller holds, too.
        events: Where it is told.
    """

    def __init__(self, name: str, seconds: float, *, events: Events | None = None) -> None:
        if not seconds > 0:
            raise ValueError(f"a timeout is some seconds, not {seconds}")
        self.name = name
        self.seconds = seconds
        self._events = events

    def guard(self) -> within:
        """The timeout around one block, which raises :class:`CallTimedOut` when what it waited for was cancelled."""
        return _Guard(self)

    def told(self) -> CallTimedOut:
        """Tells that a call took too long, and gives what to raise."""
        if self._events is not None:
            self._events.emit(CallWasTooLong(self.name, self.seconds))
        return CallTimedOut(self.name, self.seconds)

    async def call(self, function: Callable[..., Awaitable[R]], *args: Any, **kwargs: Any) -> R:
        """Calls a function, and ends it when it takes too long.

        Raises:
            CallTimedOut: It did.
        """
        async with self.guard():
            return await function(*args, **kwargs)

    def around(self, send: Send) -> Send:
        """The timeout as a layer around an upstream."""

        async def sending(outgoing: Outgoing) -> Any:
            async with self.guard():
                return await send(outgoing)

        return sending

    def __call__(self, function: F) -> F:
        """Puts the timeout around an asynchronous function, as a decorator.

        Raises:
            TypeError: The function is not asynchronous, and cannot be ended.
        """
        if not inspect.iscoroutinefunction(function):
            raise TypeError(f"{function!r} is not asynchronous: a thread cannot be ended")

        async def calling(*args: Any, **kwargs: Any) -> Any:
            return await self.call(function, *args, **kwargs)

        return cast("F", update_wrapper(calling, function))
