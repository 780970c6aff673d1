"""Shuts out for a while who does not stop: a list of bans, by hand or after repeated refusals.

A refusal costs little, but somebody who is refused a thousand times a minute is not a client that made a mistake. It
protects from guessing and scraping that goes on at the pace of the limit. It is *not* a firewall: a banned client still
reaches the server, and whoever changes his address starts anew.

It has no layer of its own. The address limit asks for the client's address, in memory and before every layer with I/O;
the rate limit asks for the key that it counts by. What was refused is learnt from events. Bans are automatic only if
``after_refusals`` is set, last longer each time, expire, and are never more than ``max_keys``. An address that may
stand for many, behind a proxy that is not known, is never banned automatically.

Example:
    >>> from fastapi_hardening.core.clock import ManualClock
    >>> clock = ManualClock()
    >>> bans = BanList(BansSettings(after_refusals=2, ban_seconds=60), clock=clock)
    >>> bans.count_refusal("203.0.113.9"), bans.count_refusal("203.0.113.9")
    (False, True)
    >>> bans.refusal("203.0.113.9").headers, bans.refusal("203.0.113.10")
    ({'Retry-After': '60'}, None)
    >>> bans.lift("203.0.113.9"), bans.list()
    (True, [])
"""

import asyncio
import json
import logging
import math
from dataclasses import astuple, dataclass

from pydantic import Field

from fastapi_hardening.core.clock import Clock, SystemClock
from fastapi_hardening.core.configuration import ConcernSettings
from fastapi_hardening.core.events import Events, RequestRefused
from fastapi_hardening.core.keys import AllowList
from fastapi_hardening.core.problem import IANA, Problem
from fastapi_hardening.core.store import BoundedMap, StateStore

logger = logging.getLogger("fastapi_hardening.bans")

# What all workers know, under one key: a list that anybody may read and write over. Newer bans come first.
_SHARED = "bans"
_MOST_SHARED = 1_000

_AUTOMATIC = "repeated refusals"


class BansSettings(ConcernSettings):
    """The settings of bans."""

    after_refusals: int | None = Field(None, ge=1)
    """After so many refusals within ``window_seconds`` a client is banned; never if unset."""

    window_seconds: float = Field(60.0, gt=0)
    """Within what time the refusals count."""

    ban_seconds: float = Field(300.0, gt=0)
    """How long the first ban lasts."""

    growth: float = Field(2.0, ge=1)
    """So many times longer is each further ban of the same client."""

    longest_seconds: float = Field(86_400.0, gt=0)
    """How long a ban lasts at most; after as long without a ban, a client has a clean record again."""

    max_keys: int = Field(100_000, ge=1)
    """How many clients are remembered; while all places are taken, nobody else is banned, but limits hold."""

    sync_seconds: float = Field(5.0, gt=0)
    """How often workers that share a store tell each other."""


class Banned(Problem):
    """The client is banned for a while."""

    status = 429
    type = IANA + "abnormal-usage-detected"
    title = "Abnormal usage detected"


@dataclass(frozen=True, slots=True)
class Ban:
    """A client that is shut out.

    Attributes:
        key: An address as limits count by (IPv6 by its /64), or a key such as ``principal=anna``.
        since: When it began, in seconds since the epoch.
        until: When it ends, in seconds since the epoch.
        reason: Why, for people.
        times: How often the client was banned, this time included.
    """

    key: str
    since: float
    until: float
    reason: str
    times: int = 1


@dataclass(frozen=True, slots=True)
class ClientBanned:
    """A client was banned.

    Attributes:
        ban: The ban.
        automatic: Whether repeated refusals were the reason.
    """

    ban: Ban
    automatic: bool


@dataclass(frozen=True, slots=True)
class BanLifted:
    """A ban was lifted before its time.

    Attributes:
        key: Whose.
    """

    key: str


# --- engine -----------------------------------------------------------------------------------------------------------


class BanList:
    """Who is banned; reachable as ``handle.bans``.

    Args:
        settings: When bans are automatic, and how long they last.
        allow: Who is never banned.
        events: Where refusals are told, and bans.
        clock: Where the time comes from.
        store: Where workers tell each other; best effort, because it is asked every few seconds and not by each
            request, and what two workers write at the same moment may be lost until the next time.
    """

    def __init__(
        self,
        settings: BansSettings | None = None,
        *,
        allow: AllowList | None = None,
        events: Events | None = None,
        clock: Clock | None = None,
        store: StateStore | None = None,
    ) -> None:
        self.settings = settings = settings or BansSettings()
        self._allow = allow
        self._events = events
        self._clock = clock = clock or SystemClock()
        self._store = store
        # With those that have ended, as long as they make the next one longer.
        self._bans: BoundedMap[Ban] = BoundedMap(settings.max_keys, clock=clock)
        self._strikes: BoundedMap[tuple[int, float]] = BoundedMap(settings.max_keys, clock=clock)
        self._lifted: dict[str, float] = {}
        self._synced_at = -math.inf
        self._sync: asyncio.Task[None] | None = None
        self._is_full = False
        if events is not None and settings.enabled and settings.after_refusals is not None:
            events.subscribe(RequestRefused, self._learn)

    def list(self) -> list[Ban]:
        """The bans in effect, the longest first."""
        now = self._clock.time()
        return sorted((ban for ban in self._bans.values() if ban.until > now), key=lambda ban: -ban.until)

    def find(self, key: str) -> Ban | None:
        """The ban of a client, if one is in effect."""
        ban = self._bans.get(key)
        return ban if ban is not None and ban.until > self._clock.time() else None

    def add(self, key: str, seconds: float, reason: str = "by hand") -> Ban:
        """Bans a client; one that is banned already is banned anew.

        Args:
            key: An address, or a key such as ``principal=anna``.
            seconds: For how long, whatever the settings say.
            reason: Why, for the list and the log.

        Raises:
            ValueError: There is no place left, the client is in the allow list, or the time is none.
        """
        if not seconds > 0 or math.isinf(seconds):
            raise ValueError(f"a ban lasts some seconds, not {seconds}")
        if self._is_allowed(key):
            raise ValueError(f"{key} is in the allow list (rate_limit.allow)")
        known = self._bans.get(key)
        now = self._clock.time()
        ban = Ban(key, now, now + seconds, reason, 1 if known is None else known.times + 1)
        if not self._keep(ban):
            raise ValueError(f"{self.settings.max_keys} clients are banned; bans.max_keys takes more")
        self._tell(ban, automatic=False)
        return ban

    def lift(self, key: str) -> bool:
        """Lifts a ban, and forgets earlier ones; ``False`` when there is none."""
        ban = self.find(key)
        self._bans.delete(key)
        self._strikes.delete(key)
        if ban is None:
            return False
        self._lifted[key] = self._clock.time()
        self._sync_soon()
        logger.info("the ban of %s is lifted", key)
        if self._events is not None:
            self._events.emit(BanLifted(key))
        return True

    def refusal(self, key: str) -> Problem | None:
        """Why a client is refused, if it is banned."""
        if self._store is not None and self._clock.monotonic() >= self._synced_at + self.settings.sync_seconds:
            self._sync_soon()
        if not len(self._bans):
            return None
        ban = self.find(key)
        if ban is None:
            return None
        seconds = max(1, math.ceil(ban.until - self._clock.time()))
        return Banned("You have sent too many requests for too long.", headers={"Retry-After": str(seconds)})

    def count_refusal(self, key: str) -> bool:
        """Counts a refusal of a client; ``True`` when that bans it."""
        most = self.settings.after_refusals
        if most is None or self._is_allowed(key) or self.find(key) is not None:
            return False
        moment = self._clock.monotonic()
        count, ends = self._strikes.get(key) or (0, moment + self.settings.window_seconds)
        if count + 1 < most:
            self._strikes.put(key, (count + 1, ends), ends - moment)
            return False
        self._strikes.delete(key)
        known = self._bans.get(key)
        times = 1 if known is None else known.times + 1
        now = self._clock.time()
        ban = Ban(key, now, now + self._seconds(times), _AUTOMATIC, times)
        if self._keep(ban):
            self._tell(ban, automatic=True)
            return True
        if not self._is_full:
            self._is_full = True
            logger.error("%d clients are banned, and no more can be (bans.max_keys)", self.settings.max_keys)
        return False

    def _learn(self, refused: RequestRefused) -> None:
        if refused.key is not None:
            self.count_refusal(refused.key)

    def _seconds(self, times: int) -> float:
        """How long a ban lasts that is the client's so-many-th."""
        settings = self.settings
        # Further powers would not be numbers any more.
        grown = settings.ban_seconds * settings.growth ** min(times - 1, 64)
        return min(grown, settings.longest_seconds)

    def _keep(self, ban: Ban) -> bool:
        remembered = ban.until - self._clock.time() + self.settings.longest_seconds
        kept = self._bans.put(ban.key, ban, remembered)
        if kept:
            self._sync_soon()
        return kept

    def _is_allowed(self, key: str) -> bool:
        return self._allow is not None and (self._allow.has_key(key) or self._allow.has_address(key))

    def _tell(self, ban: Ban, *, automatic: bool) -> None:
        seconds = ban.until - self._clock.time()
        logger.warning("%s is banned for %d seconds (%s, time %d)", ban.key, seconds, ban.reason, ban.times)
        if self._events is not None:
            self._events.emit(ClientBanned(ban, automatic))

    # --- between workers ----------------------------------------------------------------------------------------------

    def _sync_soon(self) -> None:
        """Has the list exchanged in the background, if there is somebody to exchange it with."""
        if self._store is None or (self._sync is not None and not self._sync.done()):
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return  # outside of the server; the next request sees to it
        self._synced_at = self._clock.monotonic()
        self._sync = loop.create_task(self.exchange())

    async def exchange(self) -> None:
        """Takes over what other workers have banned and lifted, and tells them the same."""
        if self._store is None:
            return
        try:
            bans, lifted = _read(await self._store.get(_SHARED))
            before = _written(bans, lifted)
            now = self._clock.time()
            for key, at in self._lifted.items():
                lifted[key] = max(at, lifted.get(key, 0.0))
            for key, at in lifted.items():
                if (known := self._bans.get(key)) is not None and known.since <= at:
                    self._bans.delete(key)
            for ban in bans:
                known = self._bans.get(ban.key)
                is_news = known is None or known.until < ban.until
                if (
                    is_news
                    and now < ban.until
                    and lifted.get(ban.key, 0.0) < ban.since
                    and not self._is_allowed(ban.key)
                ):
                    self._bans.put(ban.key, ban, ban.until - now + self.settings.longest_seconds)
            newest = sorted(lifted.items(), key=lambda each: -each[1])[:_MOST_SHARED]
            self._lifted = {key: at for key, at in newest if at > now - self.settings.longest_seconds}
            written = _written(self.list()[:_MOST_SHARED], self._lifted)
            if written != before:
                await self._store.put(_SHARED, written, self.settings.longest_seconds)
        except Exception as error:  # noqa: BLE001 - the store is gone, or holds what is none of ours
            logger.warning("bans could not be exchanged with other workers: %s", error)


def _written(bans: list[Ban], lifted: dict[str, float]) -> bytes:
    rows = [astuple(ban) for ban in bans]
    return json.dumps({"bans": rows, "lifted": lifted}, separators=(",", ":"), sort_keys=True).encode()


def _read(value: bytes | None) -> tuple[list[Ban], dict[str, float]]:
    if value is None:
        return [], {}
    document = json.loads(value)
    return [Ban(*row) for row in document["bans"]], dict(document["lifted"])
