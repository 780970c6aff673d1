"""Many deadlines of the same length, with one timer for all of them.

A timer of the event loop for each request costs two to three microseconds, nearly always to be cancelled. Deadlines of
one length come in the order in which they were set, so a queue with a timer for the first one is enough.

Example:
    >>> async def serve() -> None:
    ...     queue = DeadlineQueue(30.0)
    ...     entry = queue.add(lambda: print("too late"))
    ...     entry.cancel()
"""

import asyncio
from collections import deque
from collections.abc import Callable

from fastapi_hardening.core.clock import Clock, SystemClock


class Entry:
    """A deadline that was set.

    Attributes:
        at: When it is reached, in monotonic seconds.
        call: What is called then; ``None`` once that has happened, or is not wanted any more.
    """

    __slots__ = ("at", "call")

    def __init__(self, at: float, call: Callable[[], None]) -> None:
        self.at = at
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        """Calls nothing; and keeps nothing alive that would be called."""
        self.call = None


class DeadlineQueue:
    """The deadlines of one length on one event loop, which is the running one.

    Args:
        seconds: How far away each deadline is when it is set.
        clock: Where the time comes from; the timer is the loop's, and looks at this clock when it rings.
    """

    def __init__(self, seconds: float, clock: Clock | None = None) -> None:
        self._seconds = seconds
        self._now = (clock or SystemClock()).monotonic
        self._loop = asyncio.get_running_loop()
        self._entries: deque[Entry] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def is_closed(self) -> bool:
        """Whether the event loop has ended."""
        return self._loop.is_closed()

    def add(self, call: Callable[[], None]) -> Entry:
        """Sets a deadline.

        Args:
            call: What is called when it is reached.
        """
        entries = self._entries
        # Most are cancelled long before they are reached; what is at the front goes as soon as it can.
        while entries and entries[0].call is None:
            entries.popleft()
        entry = Entry(self._now() + self._seconds, call)
        entries.append(entry)
        if self._timer is None:
            self._timer = self._loop.call_later(self._seconds, self._ring)
        return entry

    def _ring(self) -> None:
        self._timer = None
        entries = self._entries
        now = self._now()
        while entries:
            entry = entries[0]
            if entry.call is not None and entry.at > now:
                self._timer = self._loop.call_later(entry.at - now, self._ring)
                return
            entries.popleft()
            call, entry.call = entry.call, None
            if call is not None:
                call()
