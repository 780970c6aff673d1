"""Looks how long a newcomer waits on an event loop, and tells the shedder."""

import asyncio
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from anyio.to_thread import current_default_thread_limiter

from fastapi_hardening.core.clock import Clock
from fastapi_hardening.core.load import Load
from fastapi_hardening.resilience.load_shedding.shedder import Shedder

if TYPE_CHECKING:
    from anyio import CapacityLimiter

# How often is looked, and after how many looks without a request no more.
_LOOK_SECONDS = 0.02
_IDLE_LOOKS = 50
_MEMORY_SECONDS = 1.0


class Probe:
    """Looks how long a newcomer waits on an event loop, as long as requests come.

    Args:
        shedder: Who is told.
        clock: Where the time comes from.
        load: Who is told the level, and knows further queues.
        memory: What is looked at for memory; ``None`` for nothing.
    """

    def __init__(
        self,
        shedder: Shedder,
        clock: Clock,
        load: Load,
        memory: Callable[[], bool] | None = None,
    ) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self._shedder = shedder
        self._now = clock.monotonic
        self._load = load
        self._memory = memory
        self._memory_at = 0.0
        self._threads: CapacityLimiter | None = None
        self._seen = 0
        self._idle = 0
        self._chain = 0
        self._due = 0.0
        self._turning = False

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begins to look; called from a task on this loop."""
        self.loop = loop
        self._threads = current_default_thread_limiter()
        self._idle = 0
        # Of two loops that take turns in starting it, each has one chain of looks, and not one more each time.
        self._chain += 1
        self._arm(loop, self._chain)
        self._tell(0.0)

    def mark_turn(self, loop: asyncio.AbstractEventLoop) -> None:
        """Has the shedder told when the next turn of the event loop begins."""
        if not self._turning:
            self._turning = True
            loop.call_soon(self._turn)

    def _turn(self) -> None:
        self._turning = False
        self._shedder.turn(self._now())

    def _arm(self, loop: asyncio.AbstractEventLoop, chain: int) -> None:
        self._due = self._shedder.next_look = self._now() + _LOOK_SECONDS
        loop.call_later(_LOOK_SECONDS, self._ring, loop, chain)

    def _ring(self, loop: asyncio.AbstractEventLoop, chain: int) -> None:
        # It was due before it rang, and what is added now waits for all that is ready: the two together are the wait.
        now = self._now()
        if chain == self._chain:
            loop.call_soon(self._look, loop, chain, now - self._due, now)

    def _look(self, loop: asyncio.AbstractEventLoop, chain: int, late: float, since: float) -> None:
        now, shedder = self._now(), self._shedder
        if self._memory is not None and now >= self._memory_at:
            self._memory_at = now + _MEMORY_SECONDS
            shedder.exhausted = self._memory()
        delay = max(0.0, late) + now - since
        shedder.look(now, delay, self._longest())
        self._load.tell(shedder.level)
        if shedder.on_look is not None:
            shedder.on_look()
        self._idle = self._idle + 1 if shedder.seen == self._seen else 0
        self._seen = shedder.seen
        if self._idle < _IDLE_LOOKS or shedder.acts:
            self._arm(loop, chain)
        else:
            self.loop = None
            shedder.next_look = math.inf
        self._tell(delay)

    def _tell(self, delay: float) -> None:
        for told in self._load.on_look:
            told(self._shedder.next_look, delay)

    def _longest(self) -> float:
        threads = self._threads
        longest = 0.0
        if threads is not None and threads.available_tokens <= 0:
            # A quarter of those that are served: the last of them waits for a quarter of the time that it then takes.
            longest = threads.statistics().tasks_waiting / (threads.total_tokens / 4)
        for queue in self._load.queues:
            longest = max(longest, queue())
        return longest
