"""Which features of an application are on, and why the others are off.

A feature is off when somebody has switched it off, when a health check that it needs fails, or when there is too much
to do. Nothing runs in the background: whoever asks for a feature gets the answer as of now.

Example:
    >>> features = Features()
    >>> features.add("recommendations", level=1)
    >>> features.is_on("recommendations")
    True
    >>> features.switch_off("recommendations", "the new model is wrong")
    >>> [(status.name, status.on, status.reason) for status in features]
    [('recommendations', False, 'the new model is wrong')]
"""

import asyncio
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from fastapi_hardening.core.check import CheckResult, Checks, Status
from fastapi_hardening.core.clock import Clock, SystemClock
from fastapi_hardening.core.events import Events
from fastapi_hardening.core.load import NAMES, Level, Load
from fastapi_hardening.core.store import StateStore

logger = logging.getLogger("fastapi_hardening.features")

# What was switched by hand is forgotten by the shared store after this long; then it should be a setting.
_KEPT_SECONDS = 30 * 86_400.0
_PREFIX = "feature:"

_BELOW: dict[Level, Level] = {3: 2, 2: 1, 1: 0}


@dataclass(frozen=True, slots=True)
class FeatureDegraded:
    """A feature is off.

    Attributes:
        name: Which one.
        reason: Why.
    """

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class FeatureRestored:
    """A feature that was off is on.

    Attributes:
        name: Which one.
    """

    name: str


class FeatureStatus(NamedTuple):
    """Whether a feature is on.

    Attributes:
        name: Its name.
        on: Whether it is.
        reason: Why it is not.
    """

    name: str
    on: bool
    reason: str | None


class _Need(NamedTuple):
    """What a feature needs to be on: less load than this level, and a check that does not fail."""

    level: Level | None = None
    check: str | None = None


class _Switch(NamedTuple):
    """What somebody has said of a feature, and when, in seconds since the epoch."""

    off: bool
    reason: str
    at: float


class Features:
    """The features of one application; reachable as ``handle.features``.

    Args:
        off: What is off until somebody switches it on.
        load: How much there is to do; ``None`` where features do not depend on it.
        recovery_seconds: The load must be lower for so long before what was switched off for it comes back, a level at
            a time.
        checks: Where a check is added that warns while a feature is off.
        store: Where workers tell each other what was switched by hand.
        sync_seconds: How often they do.
        events: Where :class:`FeatureDegraded` and :class:`FeatureRestored` go.
        clock: Where the time comes from.
    """

    def __init__(
        self,
        *,
        off: Iterable[str] = (),
        load: Load | None = None,
        recovery_seconds: float = 10.0,
        checks: Checks | None = None,
        store: StateStore | None = None,
        sync_seconds: float = 5.0,
        events: Events | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._needs: dict[str, _Need] = {}
        self._switches = {name: _Switch(off=True, reason="off by the settings", at=0.0) for name in off}
        self._told: set[str] = set()
        self._failing: set[str] = set()
        self._load = load
        self._held: Level = 0
        self._held_until = 0.0
        self._recovery = recovery_seconds
        self._checks = checks
        self._store = store
        self._sync_seconds = sync_seconds
        self._synced_at = float("-inf")
        self._sync: asyncio.Task[None] | None = None
        self._events = events
        self._clock = clock or SystemClock()

    def __iter__(self) -> Iterator[FeatureStatus]:
        """Every feature that is known."""
        for name in sorted(self._needs):
            reason = self.reason(name)
            yield FeatureStatus(name, reason is None, reason)

    def add(self, name: str, *, level: Level | None = None, check: str | None = None) -> None:
        """Makes a feature known; a second time does no harm.

        Args:
            name: Its name.
            level: From which level of load on it is off; ``None`` for none.
            check: The health check without which it is off.

        Raises:
            ValueError: It is known already, and needs something else.
        """
        need = _Need(level, check)
        if self._needs.setdefault(name, need) != need:
            raise ValueError(
                f"the feature {name!r} is declared twice, with different needs; declare it once, and use it"
            )
        if self._checks is not None:
            checks, self._checks = self._checks, None
            checks.add("features", self.check, critical=False, ttl_seconds=0)

    def is_on(self, name: str) -> bool:
        """Whether a feature is on; one that nobody has made known is, unless it was switched off."""
        return self.reason(name) is None

    def reason(self, name: str) -> str | None:
        """Why a feature is off; ``None`` if it is on."""
        if self._store is not None and self._clock.monotonic() >= self._synced_at + self._sync_seconds:
            self._sync_soon()
        reason = self._reason(name)
        if (reason is not None) != (name in self._told):
            self._tell(name, reason)
        return reason

    def switch_off(self, name: str, reason: str = "switched off by hand") -> None:
        """Switches a feature off, for all workers where they share a store, until it is switched on."""
        self._switch(name, _Switch(off=True, reason=reason, at=self._clock.time()))

    def switch_on(self, name: str) -> None:
        """Takes back what somebody, or the settings, had switched off."""
        self._switch(name, _Switch(off=False, reason="", at=self._clock.time()))

    def learn(self, check: str, status: Status) -> None:
        """Takes note of what a health check has found."""
        (self._failing.add if status == "fail" else self._failing.discard)(check)

    def check(self) -> CheckResult:
        """Warns while a feature is off; it is no failure, but somebody should know."""
        off = [f"{status.name} ({status.reason})" for status in self if not status.on]
        return CheckResult("warn", f"off: {', '.join(off)}", len(off)) if off else CheckResult("pass", observed=0)

    def _reason(self, name: str) -> str | None:
        switch = self._switches.get(name)
        if switch is not None and switch.off:
            return switch.reason
        need = self._needs.get(name)
        if need is None:
            return None
        if need.check in self._failing:
            return f"the check {need.check} fails"
        if need.level is not None and (level := self._level()) >= need.level:
            return f"the process is {NAMES[level]}"
        return None

    def _level(self) -> Level:
        """The level of load; up at once, down slowly, or features would flicker."""
        if self._load is None:
            return 0
        now, level = self._clock.monotonic(), self._load.level
        if level >= self._held:
            self._held, self._held_until = level, now + self._recovery
        while self._held > level and now >= self._held_until:
            self._held = _BELOW[self._held]
            self._held_until += self._recovery
        return self._held

    def _switch(self, name: str, switch: _Switch) -> None:
        self._switches[name] = switch
        self.reason(name)
        if self._store is not None:
            self._sync_soon()

    def _tell(self, name: str, reason: str | None) -> None:
        event: FeatureDegraded | FeatureRestored
        if reason is None:
            self._told.discard(name)
            logger.warning("the feature %s is on again", name)
            event = FeatureRestored(name)
        else:
            self._told.add(name)
            logger.warning("the feature %s is off: %s", name, reason)
            event = FeatureDegraded(name, reason)
        if self._events is not None:
            self._events.emit(event)

    # --- between workers ----------------------------------------------------------------------------------------------

    def _sync_soon(self) -> None:
        if self._sync is not None and not self._sync.done():
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return  # in a thread, or outside of the server; the next request sees to it
        self._synced_at = self._clock.monotonic()
        self._sync = loop.create_task(self.exchange())

    async def exchange(self) -> None:
        """Takes over what other workers were told last, and tells them the same."""
        if self._store is None:
            return
        names = sorted(self._needs.keys() | self._switches.keys())
        try:
            for name, value in zip(names, await self._store.get_many([_PREFIX + each for each in names]), strict=True):
                theirs = None if value is None else _Switch(*json.loads(value))
                ours = self._switches.get(name)
                if theirs is not None and (ours is None or theirs.at > ours.at):
                    self._switches[name] = theirs
                elif ours is not None and ours.at and (theirs is None or ours.at > theirs.at):
                    await self._store.put(_PREFIX + name, json.dumps(ours).encode(), _KEPT_SECONDS)
        except Exception as error:  # noqa: BLE001 - the store is gone, or holds what is none of ours
            logger.warning("features could not be exchanged with other workers: %s", error)
