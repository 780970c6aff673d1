"""Lets only so many calls of one service be under way: the others wait in a short queue, or are refused.

It protects the rest of the process from one slow service. Without it a service that takes ten seconds instead of a
tenth of one holds a hundred times as many requests, with their memory and connections, until there is nothing left for
what does not need it. It is *not* a rate limit: it does not count how many there are in a second.

Outbound it is the first after the total timeout, so that a call holds its place through all its attempts, and retries
cannot make more calls than there are places. ``BulkheadFull`` is never retried, and no breaker counts it.

Example:
    >>> import asyncio
    >>> bulkhead = CallBulkhead("payments", BulkheadSettings(max_concurrent=1, max_waiting=0))
    >>> async def twice():
    ...     async with bulkhead:
    ...         try:
    ...             async with bulkhead:
    ...                 pass
    ...         except BulkheadFull as full:
    ...             return full.status_code
    >>> asyncio.run(twice())
    503
"""

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import update_wrapper
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, cast

from pydantic import Field

from fastapi_hardening.core.call_deadline import remaining
from fastapi_hardening.core.concurrency import NoRoomError, Places
from fastapi_hardening.core.configuration import Section
from fastapi_hardening.core.events import Events
from fastapi_hardening.core.outbound import CallRefused, Outgoing, Send

R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])
Why = Literal["queue", "wait"]


class BulkheadSettings(Section):
    """The settings of one bulkhead."""

    max_concurrent: int = Field(100, ge=1)
    """How many calls may be under way at the same time."""

    max_waiting: int = Field(100, ge=0)
    """How many more may wait for a place; 0 refuses at once."""

    wait_seconds: float = Field(1.0, gt=0)
    """For how long one waits at most."""


class BulkheadFull(CallRefused):
    """As many calls of a service are under way and waiting as may be.

    Attributes:
        name: The bulkhead; for logs, not for clients.
    """

    def __init__(self, name: str, seconds_left: float) -> None:
        super().__init__("Too many requests need the same at the moment.", seconds_left=seconds_left)
        self.name = name

    def __str__(self) -> str:
        return f"the bulkhead of {self.name} is full"


@dataclass(frozen=True, slots=True)
class BulkheadOverflowed:
    """A call was refused for want of a place.

    Attributes:
        name: The bulkhead.
        why: ``queue`` where the queue was full, ``wait`` where no place became free in time.
    """

    name: str
    why: Why


class CallBulkhead:
    """A bulkhead around the calls of one service. One serves any number of tasks of one event loop.

    Use it as ``async with bulkhead:``, ``await bulkhead.call(function, ...)``, or as a decorator.

    Args:
        name: What it is called in events and logs.
        settings: How many may be inside and wait.
        events: Where refusals are told.
    """

    def __init__(self, name: str, settings: BulkheadSettings | None = None, *, events: Events | None = None) -> None:
        self.name = name
        self.settings = settings = settings or BulkheadSettings()
        self.places = Places(settings.max_concurrent, max_waiting=settings.max_waiting)
        self._events = events

    async def __aenter__(self) -> Self:
        if not self.places.take_now():
            await self._wait()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.places.give_back()

    async def call(self, function: Callable[..., Awaitable[R]], *args: Any, **kwargs: Any) -> R:
        """Calls a function once there is a place.

        Raises:
            BulkheadFull: There is none, and the function was not called.
        """
        async with self:
            return await function(*args, **kwargs)

    def __call__(self, function: F) -> F:
        """Puts the bulkhead around an asynchronous function, as a decorator.

        Raises:
            TypeError: The function is not asynchronous: threads have a limit of their own.
        """
        if not inspect.iscoroutinefunction(function):
            raise TypeError(f"{function!r} is not asynchronous: a bulkhead belongs to an event loop")

        async def calling(*args: Any, **kwargs: Any) -> Any:
            return await self.call(function, *args, **kwargs)

        return cast("F", update_wrapper(calling, function))

    def around(self, send: Send) -> Send:
        """The bulkhead as a layer around an upstream; an answer that is read later keeps its place until it is read."""

        async def sending(outgoing: Outgoing) -> Any:
            if not self.places.take_now():
                await self._wait()
            try:
                answer = await send(outgoing)
            except BaseException:
                self.places.give_back()
                raise
            if outgoing.whole:
                self.places.give_back()
            else:
                outgoing.when_closed.append(self.places.give_back)
            return answer

        return sending

    async def _wait(self) -> None:
        left = remaining()
        seconds = self.settings.wait_seconds if left is None else min(self.settings.wait_seconds, max(left, 0.0))
        why: Why = "wait"
        try:
            await self.places.take(seconds)
        except TimeoutError:
            pass
        except NoRoomError:
            why = "queue"
        else:
            return
        if self._events is not None:
            self._events.emit(BulkheadOverflowed(self.name, why))
        raise BulkheadFull(self.name, self.settings.wait_seconds)
