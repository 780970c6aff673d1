"""So many at the same time, so many more that wait in the order in which they came, and nobody beyond.

Taking a free place costs no turn of the event loop. A place that is given back goes to whoever waits longest, and not
to whoever comes by. It belongs to one event loop.

Example:
    >>> places = Places(1, max_waiting=0)
    >>> places.take_now(), places.take_now(), places.in_use
    (True, False, 1)
    >>> places.give_back()
    >>> places.in_use
    0
"""

import asyncio
from collections import deque


class NoRoomError(Exception):
    """As many wait already as may."""


class Places:
    """A number of places, and a queue in front of them.

    Args:
        most: How many may be inside at the same time.
        max_waiting: How many may wait for a place.

    Attributes:
        in_use: How many are inside.
    """

    __slots__ = ("_queue", "in_use", "max_waiting", "most")

    def __init__(self, most: int, *, max_waiting: int) -> None:
        if most < 1 or max_waiting < 0:
            raise ValueError(f"there is at least one place, and no less than nobody waits: {most}, {max_waiting}")
        self.most = most
        self.max_waiting = max_waiting
        self.in_use = 0
        self._queue: deque[asyncio.Future[None]] = deque()

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._queue)

    def take_now(self) -> bool:
        """Takes a place if one is free and nobody waits for it."""
        if self.in_use >= self.most or self._queue:
            return False
        self.in_use += 1
        return True

    async def take(self, wait_seconds: float | None = None) -> None:
        """Takes a place, and waits for one if it must.

        Args:
            wait_seconds: For how long at most; as long as it takes if ``None``.

        Raises:
            NoRoomError: As many wait already as may.
            TimeoutError: No place became free in time.
        """
        if self.take_now():
            return
        if self.waiting >= self.max_waiting:
            raise NoRoomError
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append(place)
        try:
            async with asyncio.timeout(wait_seconds):
                await place
        except BaseException:
            if place.done() and not place.cancelled():
                # It was given a place in the very moment in which it gave up.
                self.give_back()
            elif place in self._queue:
                self._queue.remove(place)
            raise

    def give_back(self) -> None:
        """Gives a place back, to whoever waits longest."""
        while self._queue:
            place = self._queue.popleft()
            if not place.done():
                place.set_result(None)
                return
        self.in_use -= 1
