"""Time as a collaborator, so that engines are tested by moving a clock and never by sleeping."""

import time
from typing import Protocol


class Clock(Protocol):
    """What an engine asks for the time."""

    def monotonic(self) -> float:
        """Seconds that never go backwards; for durations and deadlines."""
        ...

    def time(self) -> float:
        """Seconds since the Unix epoch; for what people and other machines read."""
        ...


class SystemClock:
    """The clock of this machine."""

    monotonic = staticmethod(time.monotonic)
    time = staticmethod(time.time)


class ManualClock:
    """A clock that stands still until it is moved; for tests, ours and yours.

    Example:
        >>> clock = ManualClock()
        >>> clock.advance(2.5)
        >>> clock.monotonic()
        2.5
    """

    def __init__(self, monotonic: float = 0.0, epoch: float = 1_700_000_000.0) -> None:
        self._monotonic = monotonic
        self._epoch = epoch

    def monotonic(self) -> float:
        """Seconds since the clock was made, as far as it was moved."""
        return self._monotonic

    def time(self) -> float:
        """Seconds since the Unix epoch, as far as the clock was moved."""
        return self._epoch

    def advance(self, seconds: float) -> None:
        """Moves both readings forward by ``seconds``."""
        self._monotonic += seconds
        self._epoch += seconds
