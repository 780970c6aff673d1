"""How much the process has to do, as a level that concerns can act on.

What measures it says so here; whoever wants to do less under load subscribes to :class:`LoadChanged`, or asks.

Example:
    >>> load = Load()
    >>> load.tell(2)
    >>> load.level
    2
"""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fastapi_hardening.core.events import Events

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger("fastapi_hardening.load")

Level = Literal[0, 1, 2, 3]

NAMES = ("calm", "busy", "overloaded", "drowning")


@dataclass(frozen=True, slots=True)
class LoadChanged:
    """The process has more or less to do than before.

    Attributes:
        level: From 0 (calm) over 1 (busy: more comes than can be done) and 2 (a quarter of it is refused) to 3 (most
            is).
        before: What it was.
    """

    level: Level
    before: Level


class Load:
    """The level of one process; reachable as ``handle.load``.

    Args:
        events: Where :class:`LoadChanged` goes.

    Attributes:
        level: 0 calm, 1 busy, 2 overloaded, 3 drowning.
        queues: Queues of the application that are looked at as well; each says how long it is, as a multiple of what is
            too long: ``handle.load.queues.append(lambda: pool.waiting / pool.size)``.
        on_look: What is called when the event loop has been looked at: with when that is done again, in monotonic
            seconds (infinite for not until something comes), and how long a newcomer has just waited, in seconds.
    """

    def __init__(self, events: Events | None = None) -> None:
        self.level: Level = 0
        self.queues: list[Callable[[], float]] = []
        self.on_look: list[Callable[[float, float], None]] = []
        self._events = events

    def tell(self, level: Level) -> None:
        """Says what the level is now."""
        before = self.level
        if level == before:
            return
        self.level = level
        logger.warning("the load was %s and is %s", NAMES[before], NAMES[level])
        if self._events is not None:
            self._events.emit(LoadChanged(level, before))
