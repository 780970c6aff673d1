"""Decides which requests are admitted: finds out whether a queue stands, and what can be done. Knows no event loop."""

import math
from typing import TYPE_CHECKING

from fastapi_hardening.core.load import Level
from fastapi_hardening.resilience.load_shedding.settings import Importance, LoadSheddingSettings

if TYPE_CHECKING:
    from collections.abc import Callable

# A queue is made of requests: of so many at least while it stands, and a newcomer waits for several of them.
_ENOUGH = 20
_SEVERAL = 4.0
# How many are admitted in one turn of the event loop at least; else the queue that there may be.
_AT_ONCE = 2.0
# While requests are refused: how often the rate is changed, and by how much.
_STEP_SECONDS = 0.1
_CUT = 0.9
_GROWTH = 0.1
_MOST = 1.5
# How fast it is forgotten what could be done in the best step.
_FORGET = 0.005
# As long as the queue drains, the rate is cut no further than to this share of what can be done.
_DRAINING = 0.1
# What stood for so long has much in it: at first, only this share is admitted.
_AT_FIRST = 0.5
# Without a refusal for so long there is no rate any more.
_CALM_SECONDS = 2.0
# The share of refusals from which the process is overloaded, or drowning.
_OVERLOADED, _DROWNING = 0.25, 0.6


class Shedder:
    """Finds out whether a queue stands, and then at which rate requests are admitted.

    Args:
        settings: What is a queue, and for how long it must stand.

    Attributes:
        rate: How many requests a second are admitted; ``None`` for all.
        delay: How long a newcomer waited at the last look, in seconds.
        seen: How many requests have come.
        served: How many were served to their end, of those that may have waited.
        exhausted: There is no memory left.
        next_look: When the next look is due, in monotonic seconds.
        in_flight: How many requests are being served.
        on_look: What is called after each look.
        on_refusal: What is called with the importance of each request that is refused.

    Example:
        >>> shedder = Shedder(LoadSheddingSettings())
        >>> for number in range(60):
        ...     admitted = shedder.admit("default", now=number / 50)
        ...     shedder.look(number / 50, delay=0.2)
        ...     shedder.served += 1
        >>> shedder.rate is not None, shedder.admit("background", now=1.2), shedder.admit("critical", now=1.2)
        (True, False, True)
    """

    def __init__(self, settings: LoadSheddingSettings) -> None:
        self.rate: float | None = None
        self.delay = 0.0
        self.seen = 0
        self.served = 0
        self.exhausted = False
        self.next_look = math.inf
        self.in_flight = 0
        self.on_look: Callable[[], None] | None = None
        self.on_refusal: Callable[[Importance], None] | None = None
        self._settings = settings
        self._interval = settings.interval_seconds
        self._began: float | None = None
        self._served_before = 0
        self._entered = 0
        self._entered_at = 0.0
        self._tokens = 0.0
        self._turned_at = 0.0
        self._capacity = 0.0
        self._least = self._least_before = math.inf
        self._admitted = 0
        self._refused = 0
        self._last_refusal = 0.0
        self._share = 0.0

    @property
    def acts(self) -> bool:
        """Whether anything is refused at the moment."""
        return self.rate is not None or self.exhausted

    @property
    def level(self) -> Level:
        """How much there is to do: by the share of requests that is refused."""
        if self.exhausted or self._share >= _DROWNING:
            return 3
        if self._share >= _OVERLOADED:
            return 2
        return 0 if self.rate is None else 1

    def admit(self, importance: Importance, now: float, *, queues: bool = True) -> bool:
        """Decides about a request.

        Args:
            importance: What is critical is admitted always, what is in the background never while there is a rate.
            now: The time, in monotonic seconds.
            queues: It may have waited; one that is sent by the same task as the one before has not.
        """
        self.seen += 1
        if queues and self.rate is None and now > self.next_look:
            # The look waits. It may be that so many have come at once that it waits behind all of them.
            if not self._entered:
                self._entered_at = now
            self._entered += 1
            if now - self._entered_at > self._interval:
                self._begin_to_act(now, self._entered_at, self._entered)
        if self.rate is None and not self.exhausted:
            return True
        admitted = importance == "critical" or (
            importance == "default" and not self.exhausted and (self.rate is None or self._tokens >= 1)
        )
        if admitted:
            self._tokens -= 1
            self._admitted += 1
        else:
            self._refused += 1
            self._last_refusal = now
        return admitted

    def turn(self, now: float) -> None:
        """Gives out what may be admitted in this turn of the event loop.

        Not more in its course: what is admitted meanwhile makes the turn longer, and with it the wait of all others.
        """
        rate = self.rate or 0.0
        most = max(_AT_ONCE, rate * self._settings.target_seconds)
        self._tokens = min(most, max(-most, self._tokens) + (now - self._turned_at) * rate)
        self._turned_at = now

    def look(self, now: float, delay: float, others: float = 0.0) -> None:
        """Takes a look at the queues.

        Args:
            now: The time, in monotonic seconds.
            delay: How long a newcomer has just waited for the event loop, in seconds.
            others: The longest of the other queues, as a multiple of what is too long.
        """
        self.delay = delay
        self._entered = 0
        began = self._began
        if began is None:
            self._began, began, self._served_before = now, now, self.served
        lasted = now - began
        served = self.served - self._served_before
        # A queue has several in it. One alone that takes long is none.
        rate = self._capacity if self.rate is not None else served / lasted if lasted else 0.0
        spacing = 1 / rate if rate else 0.0
        pressure = max(others, delay / max(self._settings.target_seconds, _SEVERAL * spacing))
        if self.rate is not None:
            self._least = min(self._least, pressure)
            if lasted >= _STEP_SECONDS:
                self._change_rate(now, lasted, self.rate, served / lasted)
        elif pressure <= 1:
            self._began = None
            self._share = 0.0
        elif lasted >= self._interval:
            self._begin_to_act(now, began, served)

    def _begin_to_act(self, now: float, began: float, served: int) -> None:
        if served < _ENOUGH:
            return
        self._capacity = served / max(now - began, 0.001)
        self.rate = max(self._settings.min_rate, self._capacity * _AT_FIRST)
        self._tokens = 0.0
        self._turned_at = self._last_refusal = now
        self._begin_step(now)

    def _change_rate(self, now: float, lasted: float, rate: float, done: float) -> None:
        asked = self._admitted + self._refused
        # Of about a second, so that a single moment says nothing.
        self._share += ((self._refused / asked if asked else 0.0) - self._share) * min(1.0, lasted)
        self._capacity = max(done, self._capacity * (1 - _FORGET))
        if self._least > 1:
            drains = self._least < self._least_before
            least = max(self._settings.min_rate, self._capacity * _DRAINING if drains else 0.0)
            self.rate = max(least, min(rate, done) * _CUT)
        elif self._refused:
            self.rate = min(rate + self._capacity * _GROWTH, self._capacity * _MOST)
        elif now - self._last_refusal >= _CALM_SECONDS:
            self.rate = None
        self._begin_step(now)

    def _begin_step(self, now: float) -> None:
        self._began = now
        self._served_before = self.served
        self._least_before, self._least = self._least, math.inf
        self._admitted = self._refused = 0
