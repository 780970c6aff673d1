"""So many at the same time, a few more in a queue, and no more: a semaphore that says no.

The queue is first in, first out. A permit is handed over to the first who waits, so that a newcomer never overtakes;
who gives up while waiting, or is given a permit in the same moment, loses none. For one event loop.

Example:
    >>> permits = Permits(1, max_queue=0)
    >>> permits.take(), permits.take()
    (True, False)
    >>> permits.give_back()
    >>> permits
    Permits(0 of 1 in use, 0 of 0 waiting)
"""

import asyncio
from collections import deque


class PermitsExhausted(Exception):  # noqa: N818 - it tells a state, and is no fault
    """There is no permit, and no place in the queue, or none has come free in time."""


class Permits:
    """Permits, and a queue of those that wait for one.

    Args:
        most: So many there are.
        max_queue: So many may wait; 0 for nobody.
    """

    def __init__(self, most: int, *, max_queue: int = 0) -> None:
        self.most = most
        self.max_queue = max_queue
        self.in_use = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    def __repr__(self) -> str:
        return f"Permits({self.in_use} of {self.most} in use, {self.waiting} of {self.max_queue} waiting)"

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def take(self) -> bool:
        """Takes a permit if one is free and nobody waits for it."""
        if self.in_use >= self.most or self._waiting:
            return False
        self.in_use += 1
        return True

    async def wait(self, max_seconds: float | None = None) -> None:
        """Takes a permit, waiting in the queue for it.

        Args:
            max_seconds: For so long; ``None`` for as long as it takes.

        Raises:
            PermitsExhausted: There is no place in the queue, or the time is up.
        """
        if self.take():
            return
        if len(self._waiting) >= self.max_queue:
            raise PermitsExhausted
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            async with asyncio.timeout(max_seconds):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                # It was its turn in the same moment.
                self.give_back()
            elif turn in self._waiting:
                self._waiting.remove(turn)
            if isinstance(error, TimeoutError):
                raise PermitsExhausted from None
            raise

    def give_back(self) -> None:
        """Gives a permit back, or on to the first who waits."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.in_use -= 1
