"""Decides when an alert begins, goes on and ends. Pure data: it is given samples and the time.

Example:
    >>> from fastapi_hardening.observability.alerts import AlertRule, Count
    >>> engine = Engine([AlertRule(name="Boom", summary="It went boom.", when=Count(of="booms_total"))])
    >>> [len(engine.evaluate({"booms_total": [({}, booms)]}, now)) for now, booms in ((0, 0), (15, 3), (30, 3))]
    [0, 1, 0]
    >>> engine.active[0].rule.name, engine.active[0].value
    ('Boom', 3)
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from fastapi_hardening.observability.alerts.conditions import Vector
from fastapi_hardening.observability.alerts.rules import AlertRule
from fastapi_hardening.observability.alerts.selectors import Snapshot

Status = Literal["firing", "resolved"]

# So finely a window is kept; with one of three days that is a step of 72 minutes.
_STEPS = 60


@dataclass(frozen=True, slots=True)
class Notification:
    """What is told of an alert.

    Attributes:
        rule: The rule.
        status: ``firing``, also when it is told again, or ``resolved``.
        value: What was compared with the rule's limit; the last one while it held.
        seconds: For how long it has been firing.
        repeated: It was told before.
    """

    rule: AlertRule
    status: Status
    value: float
    seconds: float
    repeated: bool = False


class _Window:
    """What a vector was at the beginning of a window, in bounded memory."""

    __slots__ = ("_kept", "_seconds")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._kept: deque[tuple[float, Vector]] = deque()

    def add(self, now: float, vector: Vector) -> None:
        """Takes note of what is now."""
        kept = self._kept
        if not kept or now - kept[-1][0] >= self._seconds / _STEPS:
            kept.append((now, vector))
        while len(kept) > 1 and kept[1][0] <= now - self._seconds:
            kept.popleft()

    def increase(self, vector: Vector) -> Vector:
        """By how much it has grown since; what was not there yet was nothing, and what shrinks began anew."""
        before = self._kept[0][1]
        if len(before) != len(vector):
            before = (0.0,) * len(vector)
        return tuple(new - old if new >= old else new for new, old in zip(vector, before, strict=True))


@dataclass(slots=True)
class Alert:
    """A rule, and how it stands.

    Attributes:
        rule: The rule.
        value: What was last compared with the limit.
        pending_since: Since when the condition holds, in monotonic seconds; ``None`` while it does not.
        firing_since: Since when it fires; ``None`` while it does not.
    """

    rule: AlertRule
    value: float | None = None
    pending_since: float | None = None
    firing_since: float | None = None
    _held: float = 0.0
    _told: float | None = None
    _value_held: float = 0.0

    def step(self, value: float | None, now: float, repeat_seconds: float, *, silenced: bool) -> Notification | None:
        """Goes on to the next moment; gives what is to be told."""
        rule = self.rule
        self.value = value
        limit = rule.when.limit
        if self.firing_since is not None and rule.clear_at is not None:
            limit = rule.clear_at
        if value is not None and rule.when.exceeds(value, limit):
            self._held, self._value_held = now, value
            if self.pending_since is None:
                self.pending_since = now
            if self.firing_since is None and now - self.pending_since >= rule.for_seconds:
                self.firing_since = now
        elif self.firing_since is None:
            self.pending_since = None
        elif now - self._held >= rule.keep_firing_seconds:
            return self._end(now)
        if self.firing_since is None or silenced:
            return None
        again = self._told is not None
        if self._told is not None and now - self._told < repeat_seconds:
            return None
        self._told = now
        return Notification(rule, "firing", self._value_held, now - self.firing_since, repeated=again)

    def _end(self, now: float) -> Notification | None:
        """Ends it; what nobody was told of needs no end."""
        told, since = self._told is not None, self.firing_since or now
        self.pending_since = self.firing_since = self._told = None
        return Notification(self.rule, "resolved", self._value_held, now - since) if told else None


class Engine:
    """All rules, and how they stand.

    Args:
        rules: The rules, each with a name of its own.
        repeat_seconds: How long until an alert that still fires is told again.

    Attributes:
        alerts: Each rule and how it stands, by its name.
        silences: Until when a rule is not told of, in monotonic seconds, by its name.
    """

    def __init__(self, rules: Iterable[AlertRule], *, repeat_seconds: float = 14_400.0) -> None:
        self.alerts = {rule.name: Alert(rule) for rule in rules}
        self.silences: dict[str, float] = {}
        self._repeat = repeat_seconds
        self._windows = {
            name: {seconds: _Window(seconds) for seconds in alert.rule.when.windows}
            for name, alert in self.alerts.items()
        }
        self.names = frozenset(name for alert in self.alerts.values() for name in alert.rule.when.names)

    @property
    def active(self) -> Sequence[Alert]:
        """The alerts that fire."""
        return [alert for alert in self.alerts.values() if alert.firing_since is not None]

    def evaluate(self, snapshot: Snapshot, now: float) -> list[Notification]:
        """Looks at every rule; gives what is to be told.

        Args:
            snapshot: The samples as they are; those of :attr:`names` are read.
            now: Monotonic seconds.
        """
        told = []
        for name, alert in self.alerts.items():
            condition, windows = alert.rule.when, self._windows[name]
            vector = condition.vector(snapshot)
            for window in windows.values():
                window.add(now, vector)
            increases = {seconds: window.increase(vector) for seconds, window in windows.items()}
            value = condition.value(vector, increases)
            silenced = self.silences.get(name, now) > now
            notification = alert.step(value, now, self._repeat, silenced=silenced)
            if notification is not None:
                told.append(notification)
        return told
