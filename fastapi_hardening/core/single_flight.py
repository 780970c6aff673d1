"""Many who want the same at the same time share one call.

A thousand requests that miss a cache together would make a thousand calls; here the first one makes it, and the others
wait for what it brings, also if that is an exception. The call is a task of its own: whoever waits may be cancelled,
the first one too, and the others still have their answer.

Example:
    >>> import asyncio
    >>> async def slowly() -> str:
    ...     print("asked")
    ...     return "answer"
    >>> async def three() -> list[str]:
    ...     flights = SingleFlight()
    ...     return await asyncio.gather(*(flights.run("key", slowly) for _ in range(3)))
    >>> asyncio.run(three())
    asked
    ['answer', 'answer', 'answer']
"""

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class FlightCancelled(RuntimeError):  # noqa: N818 - named as problems are, by what happened
    """What all were waiting for was cancelled, though none of them was."""


class SingleFlight(Generic[T]):
    """Calls under way, by key. Each event loop has its own."""

    def __init__(self) -> None:
        self._flights: dict[Hashable, asyncio.Task[T]] = {}

    def __len__(self) -> int:
        return len(self._flights)

    def under_way(self, key: Hashable) -> bool:
        """Whether this event loop makes a call for the key just now."""
        task = self._flights.get(key)
        return task is not None and task.get_loop() is asyncio.get_running_loop()

    async def run(self, key: Hashable, make: Callable[[], Awaitable[T]]) -> T:
        """What ``make`` gives, called once for all who ask while it works.

        Raises:
            FlightCancelled: The call was cancelled from elsewhere.
            Exception: Whatever ``make`` raises, for everybody who waits.
        """
        return await landed(self.start(key, make))

    def start(self, key: Hashable, make: Callable[[], Awaitable[T]]) -> "asyncio.Task[T]":
        """Begins a call, or gives the one that is under way; nobody has to wait for it."""
        loop = asyncio.get_running_loop()
        task = self._flights.get(key)
        # A loop that has ended may have left a task that never will.
        if task is None or task.get_loop() is not loop:
            task = self._flights[key] = loop.create_task(_awaited(make))
            task.add_done_callback(lambda done: self._landed(key, done))
        return task

    def forget(self, key: Hashable) -> None:
        """Has whoever asks next make a call of their own; those who wait are still answered."""
        self._flights.pop(key, None)

    def is_current(self, key: Hashable) -> bool:
        """For the call itself: whether it is still the one for its key, and was not forgotten."""
        return self._flights.get(key) is asyncio.current_task()

    def cancel_all(self) -> None:
        """Ends every call of this event loop."""
        loop = asyncio.get_running_loop()
        for task in [*self._flights.values()]:
            if task.get_loop() is loop:
                task.cancel()

    def _landed(self, key: Hashable, task: "asyncio.Task[T]") -> None:
        if self._flights.get(key) is task:
            del self._flights[key]
        if not task.cancelled():
            task.exception()  # is nobody's business where nobody waits any more


async def landed(task: "asyncio.Task[T]") -> T:
    """The result of a call that others wait for, too.

    Raises:
        FlightCancelled: It was cancelled from elsewhere.
        Exception: Whatever it raises.
    """
    # Waiting cancels nothing when it is cancelled itself.
    await asyncio.wait((task,))
    if task.cancelled():
        raise FlightCancelled("what makes the value was cancelled")
    return task.result()


async def _awaited(make: Callable[[], Awaitable[Any]]) -> Any:
    return await make()
