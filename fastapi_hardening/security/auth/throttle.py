"""Slows down who guesses passwords, and never the owner of the account at a place where they have logged in before.

A lock after some failures lets anybody lock anybody out. So failures are counted in three budgets, and only failures:

* of an account, by all who were never let in there: what stops a distributed guess at one account;
* of an account at a known place, an address or device where a login has succeeded: its own, which nobody elsewhere can
  spend;
* of an address, over all accounts: what stops one guesser from trying a password on each of them.

Each has several limits, so that the wait grows with every step: after 5 failures 12 seconds, after 10 a minute, after
20 six minutes, after 40 more than an hour. Known places are the device cookies of OWASP (*Slow Down Online Guessing
Attacks with Device Cookies*), taken to addresses as well; the waits follow its Authentication Cheat Sheet.

It is *not* a rate limit: a login that succeeds costs nothing. It says the same whether an account exists or not.
Counters are of this process, bounded; known places are in the state store.

Example:
    >>> import asyncio
    >>> throttle = LoginThrottle()
    >>> async def log_in(password: str) -> bool:
    ...     async with throttle.attempt("anna@example.com", "203.0.113.9") as attempt:
    ...         if password != "correct horse battery staple":
    ...             return False  # left without a word, an attempt has failed
    ...         await attempt.succeeded()
    ...         return True
    >>> asyncio.run(log_in("a guess")), asyncio.run(log_in("correct horse battery staple"))
    (False, True)
"""

import hashlib
import logging
import math
import secrets
import unicodedata
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus

from pydantic import Field, field_validator
from starlette.exceptions import HTTPException

from fastapi_hardening.core.clock import Clock
from fastapi_hardening.core.configuration import ConcernSettings
from fastapi_hardening.core.events import Events
from fastapi_hardening.core.identity import CredentialsUnchecked
from fastapi_hardening.core.problem import IANA, Problem
from fastapi_hardening.core.store import MemoryStore, StateStore
from fastapi_hardening.core.window import Limit, Limiter, parse_limits

logger = logging.getLogger("fastapi_hardening.auth")


class ThrottleSettings(ConcernSettings):
    """How many failures there may be."""

    account_limits: str = "5/minute; 10/10 minutes; 20/2 hours; 40/2 days"
    """Failures on one account from places that it does not know, and, counted apart, from each place that it does."""

    address_limits: str = "20/minute; 100/hour; 300/day"
    """Failures from one address over all accounts that do not know it."""

    known_seconds: float = Field(30 * 86_400, gt=0)
    """How long an account remembers a place where a login has succeeded; each success begins it anew."""

    max_keys: int = Field(100_000, ge=1)
    """For how many accounts, and for how many addresses, there is a place; newcomers share one when all are taken."""

    @field_validator("account_limits", "address_limits")
    @classmethod
    def _are_limits(cls, limits: str) -> str:
        parse_limits(limits)
        return limits


class TooManyFailures(Problem):
    """Too many failed logins, of this account or from this address; which of them is not told."""

    status = 429
    type = IANA + "quota-exceeded"
    title = "Too many failed logins"


@dataclass(frozen=True, slots=True)
class LoginFailed:
    """A login has failed.

    Attributes:
        account: A digest of the account's name; people type passwords there by mistake.
        address: Where from; ``None`` where that is not known.
        known: Whether the account knows the place.
    """

    account: str
    address: str | None
    known: bool


@dataclass(frozen=True, slots=True)
class LoginThrottled:
    """A login was refused before the password was looked at.

    Attributes:
        account: A digest of the account's name.
        address: Where from; ``None`` where that is not known.
        known: Whether the account knows the place.
        budget: What was spent: ``account``, ``known place`` or ``address``.
        retry_seconds: When the next attempt is let through.
    """

    account: str
    address: str | None
    known: bool
    budget: str
    retry_seconds: float


# --- engine -----------------------------------------------------------------------------------------------------------


class FailureBudget:
    """Counts failures by key against several limits; attempts under way count as if they had failed.

    Args:
        limits: The limits; all of them hold.
        max_keys: For how many keys each has a place.
        clock: Where the time comes from.

    Example:
        >>> from fastapi_hardening.core.clock import ManualClock
        >>> budget = FailureBudget(parse_limits("2/minute"), clock=ManualClock())
        >>> budget.enter("k"), budget.enter("k"), budget.enter("k")
        (0.0, 0.0, 30.0)
        >>> budget.leave("k", failed=True)
        >>> budget.leave("k", failed=False)
        >>> budget.enter("k")
        0.0
    """

    def __init__(self, limits: tuple[Limit, ...], *, max_keys: int = 100_000, clock: Clock | None = None) -> None:
        self._limiters = [Limiter(limit, max_keys=max_keys, clock=clock) for limit in limits]
        self._under_way: dict[str, int] = {}

    def wait(self, key: str) -> float:
        """Seconds until one more attempt may begin; 0 for now."""
        units = self._under_way.get(key, 0) + 1
        longest = 0.0
        for limiter in self._limiters:
            decision = limiter.peek(key, units)
            if not decision.allowed:
                retry = decision.retry_seconds
                interval = limiter.limit.window_seconds / limiter.limit.quota
                longest = max(longest, interval if math.isinf(retry) else retry)
        return longest

    def enter(self, key: str) -> float:
        """Begins an attempt, unless it has to wait; says how long."""
        wait = self.wait(key)
        if not wait:
            self._under_way[key] = self._under_way.get(key, 0) + 1
        return wait

    def leave(self, key: str, *, failed: bool) -> None:
        """Ends an attempt; only a failure is counted."""
        under_way = self._under_way[key] - 1
        if under_way:
            self._under_way[key] = under_way
        else:
            del self._under_way[key]
        if failed:
            for limiter in self._limiters:
                limiter.hit(key)


class Attempt:
    """A login that is under way. Left without a word, or by an exception, it has failed.

    Only what says that nothing was checked counts for nothing: a status of 500 or above, such as 503 for too many
    hashes at once, :class:`~fastapi_hardening.core.identity.CredentialsUnchecked`, or a client that went away.
    """

    def __init__(self, throttle: "LoginThrottle", account: str, places: tuple[str, ...], *, known: bool) -> None:
        self._throttle = throttle
        self._account = account
        self._places = places
        self.known = known
        self.success = False

    async def succeeded(self) -> None:
        """The password was right: the account knows this place from now on."""
        self.success = True
        await self._throttle.remember(self._account, self._places)


class LoginThrottle:
    """Decides whether a login may be tried, and counts the failed ones.

    Args:
        settings: The limits.
        store: Where the places are kept that accounts know; by default in this process.
        events: Where :class:`LoginFailed` and :class:`LoginThrottled` go.
        clock: Where the time comes from.
    """

    def __init__(
        self,
        settings: ThrottleSettings | None = None,
        *,
        store: StateStore | None = None,
        events: Events | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.settings = settings = settings or ThrottleSettings()
        self._store = store or MemoryStore(settings.max_keys, clock=clock)
        self._events = events
        by_account, by_address = parse_limits(settings.account_limits), parse_limits(settings.address_limits)
        self._accounts = FailureBudget(by_account, max_keys=settings.max_keys, clock=clock)
        self._known = FailureBudget(by_account, max_keys=settings.max_keys, clock=clock)
        self._addresses = FailureBudget(by_address, max_keys=settings.max_keys, clock=clock)

    @staticmethod
    def new_device() -> str:
        """A value for a device cookie: 256 random bits. Set it, ``HttpOnly`` and ``Secure``, after a login."""
        return secrets.token_urlsafe(32)

    @asynccontextmanager
    async def attempt(self, account: str, address: str | None, *, device: str | None = None) -> AsyncIterator[Attempt]:
        """Surrounds the check of a password.

        Args:
            account: What was typed as the name of the account, whether there is one or not.
            address: The client's address; ``context.client.own_key`` has it, or ``None`` where many share one.
            device: The value of the device cookie, where the application sets one (:meth:`new_device`).

        Raises:
            TooManyFailures: Too many have failed; nothing was checked.
        """
        name = _digest("account", _canonical(account))
        places = tuple(
            _digest("place", name, kind, value) for kind, value in (("address", address), ("device", device)) if value
        )
        if not self.settings.enabled:
            yield Attempt(self, name, (), known=False)
            return
        place = await self._known_place(places)
        budgets: list[tuple[str, FailureBudget, str]]
        if place is not None:
            budgets = [("known place", self._known, place)]
        else:
            budgets = [("account", self._accounts, name)]
            if address:
                budgets.append(("address", self._addresses, address))
        waits = [(budget.wait(key), label) for label, budget, key in budgets]
        longest, label = max(waits, key=lambda each: each[0])
        if longest:
            self._tell(LoginThrottled(name, address, place is not None, label, longest))
            raise TooManyFailures(
                "Too many logins have failed; come back later.", headers={"Retry-After": str(math.ceil(longest))}
            )
        for _, budget, key in budgets:
            budget.enter(key)
        attempt = Attempt(self, name, places, known=place is not None)
        failed = False
        try:
            yield attempt
            failed = not attempt.success
        except Exception as error:
            failed = not attempt.success and not _nothing_was_checked(error)
            raise
        finally:
            for _, budget, key in budgets:
                budget.leave(key, failed=failed)
            if failed:
                self._tell(LoginFailed(name, address, place is not None))

    async def remember(self, account: str, places: tuple[str, ...]) -> None:
        """Has an account know these places; a store that fails only makes them unknown."""
        for place in places:
            try:
                if not await self._store.put(place, b"1", self.settings.known_seconds):
                    logger.warning("no room to remember where account %s has logged in", account)
            except Exception:
                logger.exception("the state store did not remember where an account has logged in")

    async def _known_place(self, places: tuple[str, ...]) -> str | None:
        """The place, of those that the client is at, that the account knows; the surest one if it knows several."""
        for place in reversed(places):
            try:
                if await self._store.get(place) is not None:
                    return place
            except Exception:
                logger.exception("the state store did not say whether an account knows a place; it counts as unknown")
        return None

    def _tell(self, event: LoginFailed | LoginThrottled) -> None:
        logger.info("%r", event)
        if self._events is not None:
            self._events.emit(event)


def _nothing_was_checked(error: Exception) -> bool:
    if isinstance(error, HTTPException):
        return error.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR
    return isinstance(error, CredentialsUnchecked)


def _canonical(account: str) -> str:
    """One name for all spellings, or each spelling would have a budget of its own."""
    return unicodedata.normalize("NFKC", account[:1024]).casefold().strip()


def _digest(*parts: str) -> str:
    text = "".join(f"{len(part)}:{part}" for part in parts)
    return "login:" + hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
