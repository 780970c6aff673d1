"""Keeps one client from taking what is meant for all: so many requests in so much time, then 429.

It protects from password guessing, scraping, runaway scripts and bills. It is *not* protection from a distributed
flood, which has an address for every request, nor load shedding, which looks at the server and not at the client.

It sits behind everything that says who the client is, and before everything that costs. Every path has the default
limit, also one that no route has; a route changes it by an override, and what is declared once is one budget a client:
a limit on a router is shared by the routes of the router. Every limited answer says what is left, in the fields of the
IETF draft (``RateLimit``, ``RateLimit-Policy``); a refusal spends nothing.

Example:
    >>> from fastapi import FastAPI
    >>> from fastapi_hardening import RateLimit
    >>> from fastapi_hardening.security.rate_limit import RateLimitMiddleware, RateLimitSettings
    >>> app = FastAPI()
    >>> app.add_middleware(RateLimitMiddleware, settings=RateLimitSettings(default="100/minute; 2000/hour"))
    >>> @app.post("/login", dependencies=[RateLimit("5/minute")])
    ... async def login() -> None: ...
    >>> @app.get("/version", dependencies=[RateLimit.exempt])
    ... async def version() -> str:
    ...     return "1.0"
"""

import inspect
import logging
import math
from collections.abc import Awaitable, Callable, Hashable, Sequence
from itertools import islice
from typing import Any, ClassVar, Literal, NamedTuple

from fastapi import Response
from pydantic import Field, field_validator
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_hardening.core import context as request_context
from fastapi_hardening.core import headers as header_fields
from fastapi_hardening.core.charge import Charge, Declarations, Spent
from fastapi_hardening.core.clock import Clock
from fastapi_hardening.core.configuration import ConcernSettings
from fastapi_hardening.core.context import RequestContext
from fastapi_hardening.core.keys import AllowList, Key, check_key, key_of, stands_for_one
from fastapi_hardening.core.policy import Override, mark_handled
from fastapi_hardening.core.problem import IANA, Problem, refuse, retry_after, tell
from fastapi_hardening.core.routes import route_of, table_of
from fastapi_hardening.core.store import SharedCounters, SharedLimits, StateStore, StoreUnavailable
from fastapi_hardening.core.window import Decision, Limit, Limiter, Strategy, parse_limits

Cost = int | Callable[[HTTPConnection], int]
Texts = str | tuple[str, ...] | list[str]
LimitsOf = Callable[[HTTPConnection], Texts | None] | Callable[[HTTPConnection], Awaitable[Texts | None]]
Banned = Callable[[str], Problem | None]
OnStoreFailure = Literal["rescue", "allow", "refuse"]

logger = logging.getLogger("fastapi_hardening.rate_limit")

_STARTS = frozenset({"http.response.start", "websocket.http.response.start"})
_POLICY, _STATE = b"ratelimit-policy", b"ratelimit"
_OURS = frozenset({_POLICY, _STATE})

# A function that makes up ever new limits would fill the memory with budgets.
_MOST_BUDGETS = 1_000


class RateLimitSettings(ConcernSettings):
    """The settings of rate limits."""

    default: str | tuple[str, ...] = "600/minute"
    """What holds where no route says otherwise: a limit, or several (``100/minute; 2000/hour``)."""

    strategy: Strategy = "token-bucket"
    """``token-bucket`` (bursts of the whole quota, even refill), ``fixed-window`` or ``sliding-window``."""

    key: str | tuple[str, ...] = "address"
    """Whose budget it is: the client's ``address``, the ``principal``, the ``credential`` or the ``tenant`` as soon as
    it is known, ``header:X-API-Key`` where something in front checks the key; of several, each combination."""

    allow: tuple[str, ...] = ()
    """Who is never limited nor banned: addresses, networks, and keys such as ``principal=monitor``."""

    max_keys: int = Field(1_000_000, ge=1)
    """For how many clients each limit has a place; newcomers share one when all are taken by clients in debt."""

    unknown_proxy_factor: int = Field(100, ge=1)
    """So many times wider is the default for a private peer that forwards requests while ``trusted_proxies`` is not
    set: it stands for all its clients."""

    headers: bool = True
    """Whether limited answers carry ``RateLimit`` and ``RateLimit-Policy``."""

    on_store_failure: OnStoreFailure = "rescue"
    """What holds while the shared store is gone: ``rescue`` counts in memory, each worker its share of the limit;
    ``allow`` lets everything pass; ``refuse`` answers 503."""

    concurrent: int | None = Field(None, ge=1)
    """So many requests of one client may be served at the same time by one worker; any number if unset."""

    report_only: bool = False
    """Whether refusals are only logged and counted."""

    @field_validator("default")
    @classmethod
    def _is_a_limit(cls, default: str | tuple[str, ...]) -> str | tuple[str, ...]:
        parse_limits(default)
        return default

    @field_validator("key")
    @classmethod
    def _is_a_key(cls, key: str | tuple[str, ...]) -> Any:
        return check_key(key)

    @field_validator("allow")
    @classmethod
    def _are_clients(cls, entries: tuple[str, ...]) -> tuple[str, ...]:
        AllowList(entries)
        return entries


class RateLimited(Problem):
    """The client has spent its quota."""

    status = 429
    type = IANA + "quota-exceeded"
    title = "Quota exceeded"


class LimitUnknown(Problem):
    """The shared store is gone, and the limit is one that is not to be exceeded even then."""

    status = 503
    type = IANA + "temporary-reduced-capacity"
    title = "Temporarily reduced capacity"


# --- engine -----------------------------------------------------------------------------------------------------------


class Budget:
    """Several limits that hold at once, such as a burst and a sustained one; a request passes all or spends nothing.

    Args:
        limits: The limits.
        strategy: How they are counted.
        max_keys: For how many keys each has a place.
        clock: Where the time comes from.

    Example:
        >>> budget = Budget(parse_limits("2/second; 100/day"))
        >>> budget.hit("somebody")[0].remaining
        1
        >>> budget.policy
        b'"2/second";q=2;w=1, "100/day";q=100;w=86400'
    """

    def __init__(
        self,
        limits: tuple[Limit, ...],
        strategy: Strategy = "token-bucket",
        *,
        max_keys: int = 1_000_000,
        clock: Clock | None = None,
    ) -> None:
        self.limits = limits
        self._limiters = [Limiter(limit, strategy, max_keys=max_keys, clock=clock) for limit in limits]
        self._quoted = [f'"{limit.name}"' for limit in limits]
        # What most budgets are: one limit.
        self._one = (self._limiters[0], self._quoted[0].encode("ascii")) if len(limits) == 1 else None
        self.policy = ", ".join(
            f"{name};q={limit.quota};w={limit.window_seconds}" for name, limit in zip(self._quoted, limits, strict=True)
        ).encode("ascii")

    def hit(self, key: str, cost: int = 1) -> list[Decision]:
        """A decision for each limit; the units are spent only if all of them allow it."""
        if self._one is not None:
            return [self._one[0].hit(key, cost)]
        looks = [limiter.peek(key, cost) for limiter in self._limiters]
        if all(look.allowed for look in looks):
            return [limiter.hit(key, cost) for limiter in self._limiters]
        return looks

    async def spend(self, key: str, cost: int = 1) -> list[Decision]:
        """The same, wherever the units are counted."""
        return self.hit(key, cost)

    def look(self, key: str, cost: int = 1) -> list[Decision]:
        """What would be decided, as far as this process knows; nothing is spent."""
        return [limiter.peek(key, cost) for limiter in self._limiters]

    def state(self, decisions: list[Decision]) -> bytes:
        """The ``RateLimit`` field: of each policy what remains, and the seconds until there is more."""
        if self._one is not None:
            _, remaining, next_seconds, _, _ = decisions[0]
            return b"%b;r=%d;t=%d" % (self._one[1], remaining, math.ceil(next_seconds))
        return ", ".join(
            f"{name};r={decision.remaining};t={math.ceil(decision.next_seconds)}"
            for name, decision in zip(self._quoted, decisions, strict=True)
        ).encode("ascii")

    def problem(self, decisions: list[Decision]) -> Problem:
        """The refusal: which policies are violated, and when the same request would pass."""
        refusals = [(limit, each) for limit, each in zip(self.limits, decisions, strict=True) if not each.allowed]
        waits = [
            limit.window_seconds if math.isinf(each.retry_seconds) else each.retry_seconds for limit, each in refusals
        ]
        return RateLimited(
            "You have sent too many requests; come back later.",
            headers={"Retry-After": str(max(1, math.ceil(max(waits) - 1e-6)))},
            extensions={"violated-policies": [limit.name for limit, _ in refusals]},
        )


_UNKNOWN = Decision(allowed=False, remaining=0, next_seconds=1.0, retry_seconds=1.0, reset_seconds=1.0)


class SharedBudget(Budget):
    """A budget that all workers count together, and what holds while they cannot.

    Args:
        name: What tells it from the other budgets of the service; the same in every worker.
        limits: The limits.
        strategy: How they are counted.
        counters: Where they are counted.
        on_store_failure: What holds while that is gone.
        max_keys: For how many keys there is a place in memory meanwhile.
        clock: Where the time comes from meanwhile.

    Attributes:
        shared: The limits, as the store knows them.
    """

    def __init__(
        self,
        name: str,
        limits: tuple[Limit, ...],
        strategy: Strategy = "token-bucket",
        *,
        counters: SharedCounters,
        on_store_failure: OnStoreFailure = "rescue",
        max_keys: int = 1_000_000,
        clock: Clock | None = None,
    ) -> None:
        super().__init__(limits, strategy, max_keys=max_keys, clock=clock)
        self.shared = SharedLimits(name, limits, strategy)
        self._counters = counters
        self._on_store_failure = on_store_failure
        self._rescue_of: Callable[[tuple[Limit, ...]], Budget] = lambda shares: Budget(
            shares, strategy, max_keys=max_keys, clock=clock
        )
        self._rescue: Budget | None = None

    async def spend(self, key: str, cost: int = 1) -> list[Decision]:
        """A decision for each limit; without the store, as the settings say."""
        try:
            return await self._counters.spend(key, (self.shared, cost))
        except StoreUnavailable:
            if self._on_store_failure == "rescue":
                return self._share().hit(key, cost)
            if self._on_store_failure == "refuse":
                return [_UNKNOWN] * len(self.limits)
            return [Decision(True, limit.quota, 0.0, 0.0, 0.0) for limit in self.limits]  # noqa: FBT003 - a tuple

    def problem(self, decisions: list[Decision]) -> Problem:
        """The refusal, which may be that nobody knows."""
        if decisions[0] is _UNKNOWN:
            return LimitUnknown("Requests cannot be counted at the moment; try again soon.", headers=retry_after(1.0))
        return super().problem(decisions)

    def _share(self) -> Budget:
        """What this worker lets pass by itself: the limits, divided by the workers."""
        workers = self._counters.workers
        shares = tuple(Limit(each.name, max(1, each.quota // workers), each.window_seconds) for each in self.limits)
        if self._rescue is None or self._rescue.limits != shares:
            self._rescue = self._rescue_of(shares)
        return self._rescue


class InFlight:
    """How many requests of each key are being served; a key without any takes no place."""

    def __init__(self) -> None:
        self._counts: dict[Hashable, int] = {}

    def enter(self, key: Hashable, most: int) -> bool:
        """Counts one more, unless there are ``most`` already."""
        count = self._counts.get(key, 0)
        if count >= most:
            return False
        self._counts[key] = count + 1
        return True

    def leave(self, key: Hashable) -> None:
        """Counts one less."""
        count = self._counts[key] - 1
        if count:
            self._counts[key] = count
        else:
            del self._counts[key]


class Together:
    """Several budgets that hold at once, each with a key of its own, told to the client as one list.

    Args:
        budgets: The budgets; decisions are given in their order.
    """

    def __init__(self, budgets: tuple[Budget, ...]) -> None:
        self._budgets = budgets
        self.policy = b", ".join(dict.fromkeys(budget.policy for budget in budgets))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Together) and other._budgets == self._budgets

    def __hash__(self) -> int:
        return hash(self._budgets)

    def parts(self, decisions: list[Decision]) -> list[tuple[Budget, list[Decision]]]:
        """Each budget with its decisions."""
        found, start = [], 0
        for budget in self._budgets:
            found.append((budget, decisions[start : start + len(budget.limits)]))
            start += len(budget.limits)
        return found

    def state(self, decisions: list[Decision]) -> bytes:
        """The ``RateLimit`` field."""
        return b", ".join(budget.state(part) for budget, part in self.parts(decisions))

    def problem(self, decisions: list[Decision]) -> Problem:
        """The refusal by the budget that refuses longest."""
        problems = [
            budget.problem(part)
            for budget, part in self.parts(decisions)
            if not all(decision.allowed for decision in part)
        ]
        return max(problems, key=lambda problem: int((problem.headers or {})["Retry-After"]))


class Asked(NamedTuple):
    """Units of a budget that a request asks for."""

    budget: Budget
    key: str
    cost: int = 1
    charge: Charge | None = None


class Verdict(NamedTuple):
    """What a budget says about a request; of several budgets, what each of them was charged with."""

    budget: Budget | Together
    key: str
    decisions: list[Decision]
    spent: tuple[Spent, ...] = ()

    @property
    def allowed(self) -> bool:
        """Whether all limits allow it."""
        decisions = self.decisions
        return decisions[0].allowed if len(decisions) == 1 else all(decision.allowed for decision in decisions)

    @property
    def refusing(self) -> Spent | None:
        """The charge that is refused, if one of several budgets refuses."""
        return next((spent for spent in self.spent if spent.refused_by is not None), None)


# --- layer ------------------------------------------------------------------------------------------------------------


class RateLimitMiddleware:
    """Counts every request and websocket handshake, and refuses what exceeds its budget.

    Args:
        app: The application inside.
        settings: The settings of rate limits.
        clock: Where the time comes from.
        store: Where all workers count together, if it is a shared one; else each counts for itself.
        declared: Limits that are declared by something else than overrides.
        banned: Says why a key is refused whatever it has left, if it is.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: RateLimitSettings | None = None,
        *,
        clock: Clock | None = None,
        store: StateStore | None = None,
        declared: Declarations | None = None,
        banned: Banned | None = None,
    ) -> None:
        self.app = app
        self.settings = settings = settings or RateLimitSettings()
        self._clock = clock
        self._declared = declared
        self._banned = banned
        self._allow = AllowList(settings.allow) if settings.allow else None
        self._counters = None if store is None else store.counters
        plain = declared is None and self._counters is None and not settings.allow
        self._by_address = settings.key == "address" and plain
        limits = parse_limits(settings.default, "default")
        self._default = self._budget(limits, settings.strategy, "default")
        wider = (Limit(each.name, each.quota * settings.unknown_proxy_factor, each.window_seconds) for each in limits)
        self._behind_unknown_proxy = self._budget(tuple(wider), settings.strategy, "behind an unknown proxy")
        self._budgets: dict[Hashable, Budget] = {}
        self._computed: dict[Hashable, Budget] = {}
        self._together: dict[tuple[Budget, ...], Together] = {}
        self._complained: set[Hashable] = set()
        self._in_flight = InFlight()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        if scope["type"] not in ("http", "websocket") or not self.settings.enabled:
            await self.app(scope, receive, send)
            return
        context = request_context.ensure(scope)
        overrides = (context.route or route_of(scope)).of(RateLimit)
        if overrides:
            mark_handled(scope, overrides)
        context.state[RateLimitMiddleware] = self
        override: Any = overrides[-1] if overrides else None
        key = context.client.key
        verdict: Verdict | Problem | None
        if override is None and self._by_address and (self._banned is None or self._banned(key) is None):
            # What most requests are: no override, no function to ask for a key, no store to wait for.
            budget = self._behind_unknown_proxy if context.client.behind_unknown_proxy else self._default
            verdict = Verdict(budget, key, budget.hit(key))
        else:
            verdict = await self._judged(override, scope, context)
        if not isinstance(verdict, Verdict):
            await (self.app(scope, receive, send) if verdict is None else self._bar(verdict, scope, receive, send))
            return
        if self.settings.headers or self._declared is not None:
            send = self._telling(verdict, context, send)
        if not verdict.allowed and await self._has_refused(verdict, scope, receive, send):
            return
        most = self.settings.concurrent if override is None else override.concurrent
        if most is None:
            await self.app(scope, receive, send)
        else:
            await self._serve(most, (verdict.budget, verdict.key), scope, receive, send)

    def _telling(self, verdict: "Verdict", context: RequestContext, send: Send) -> Send:
        """A channel for the answer that adds what is left to it."""

        async def send_with_limits(message: Message) -> None:
            if message["type"] in _STARTS:
                said: Verdict = context.state.get(_Late, verdict)
                headers = message["headers"] = [p for p in message.get("headers") or () if p[0] not in _OURS]
                if self.settings.headers:
                    headers += (_POLICY, said.budget.policy), (_STATE, said.budget.state(said.decisions))
                if said.spent and self._declared is not None:
                    self._declared.write(headers, said.spent)
            await send(message)

        return send_with_limits

    async def _bar(self, ban: Problem, scope: Scope, receive: Receive, send: Send) -> None:
        await refuse(ban, scope, receive, send, layer="rate limit")

    async def _judged(
        self, override: "RateLimit | None", scope: Scope, context: RequestContext
    ) -> "Verdict | Problem | None":
        """What the budgets say, or why the client is refused whatever they say; ``None`` where nothing limits it."""
        if self.admits(context):
            return None
        if self._banned is not None and (ban := self._banned(context.client.key)) is not None:
            return ban
        asked = await self.ask(override, scope, context)
        if not asked:
            return None
        return self.barred(asked) or await self.spend(asked)

    async def _has_refused(self, verdict: "Verdict", scope: Scope, receive: Receive, send: Send) -> bool:
        """Answers in place of the application, as whatever has declared the limit would have it; or only tells."""
        context = request_context.ensure(scope)
        problem = verdict.budget.problem(verdict.decisions)
        if self.settings.report_only:
            tell(problem, context, "rate limit (report only)")
            return False
        key, known_as, refusing = verdict.key, None, verdict.refusing
        if refusing is not None and self._declared is not None:
            key = refusing.charge.key
            known_as, scope = self._declared.refused(problem, refusing, scope)
        told = key if stands_for_one(key, context.client) else None
        await refuse(problem, scope, receive, send, layer="rate limit", key=told, known_as=known_as)
        return True

    async def _serve(self, most: int, place: Hashable, scope: Scope, receive: Receive, send: Send) -> None:
        """Has the application answer, if the client has no more than ``most`` requests under way."""
        if not self._in_flight.enter(place, most):
            problem = RateLimited(
                f"You may have {most} requests under way at the same time.",
                headers={"Retry-After": "1"},
                extensions={"violated-policies": ["concurrent"]},
            )
            await refuse(problem, scope, receive, send, layer="rate limit")
            return
        serving = True

        async def send_and_leave(message: Message) -> None:
            nonlocal serving
            await send(message)
            # The answer has ended; background tasks are no longer the client's business.
            if serving and message["type"] == "http.response.body" and not message.get("more_body", False):
                serving = False
                self._in_flight.leave(place)

        try:
            await self.app(scope, receive, send_and_leave)
        finally:
            if serving:
                self._in_flight.leave(place)

    async def ask(
        self, override: "RateLimit | None", scope: Scope, context: RequestContext, *, declared: bool = True
    ) -> list[Asked]:
        """Which budgets a request belongs to; none where its limits are lifted, or it is never limited."""
        charges: Sequence[Charge] | None = None
        if declared and self._declared is not None:
            charges = self._declared.charges(scope, context, self, defaults=override is None)
        asked = [self._charged(charge) for charge in charges or ()]
        if override is not None and not override.lifts:
            asked.insert(0, await self._overridden(override, scope, context))
        elif override is None and charges is None:
            key = await key_of(self.settings.key, scope, context)
            # Whoever is known by more than an address is told apart, also behind a proxy.
            unknown = context.client.behind_unknown_proxy and key == context.client.key
            asked = [Asked(self._behind_unknown_proxy if unknown else self._default, key)]
        if self._allow is not None and any(self._allow.has_key(each.key) for each in asked):
            return []
        return asked

    def barred(self, asked: Sequence[Asked]) -> Problem | None:
        """Why a request is refused whatever is left, if it is."""
        if self._banned is None:
            return None
        return next((ban for each in asked if (ban := self._banned(each.key)) is not None), None)

    def admits(self, context: RequestContext) -> bool:
        """Whether a client is never limited, by its address."""
        return self._allow is not None and self._allow.has_address(context.client.address)

    async def spend_late(self, charges: Sequence[Charge], context: RequestContext) -> tuple[Problem, Spent] | None:
        """Spends what could only be worked out further in, of all budgets or of none."""
        asked = self._late_asked(charges)
        ban = self.barred(asked)
        if ban:
            return ban, Spent(charges[0], ())
        return self._late(await self.spend(asked), context) if asked else None

    def spend_now(self, charges: Sequence[Charge], context: RequestContext) -> tuple[Problem, Spent] | None:
        """The same where nothing can be awaited, counted in this process."""
        asked = self._late_asked(charges)
        ban = self.barred(asked)
        if ban:
            return ban, Spent(charges[0], ())
        if not asked:
            return None
        refused = self._looked(asked)
        said = refused or self._verdict(asked, [each.budget.hit(each.key, each.cost) for each in asked])
        return self._late(said, context)

    def _late_asked(self, charges: Sequence[Charge]) -> list[Asked]:
        if self._allow is not None and any(self._allow.has_key(charge.key) for charge in charges):
            return []
        return [self._charged(charge) for charge in charges]

    def _late(self, verdict: Verdict, context: RequestContext) -> tuple[Problem, Spent] | None:
        """What to refuse with, if a verdict is no; answers say what was left then."""
        context.state[_Late] = verdict
        refusing = verdict.refusing
        if refusing is None:
            return None
        problem = verdict.budget.problem(verdict.decisions)
        if self.settings.report_only:
            tell(problem, context, "rate limit (report only)")
            return None
        return problem, refusing

    async def spend(self, asked: Sequence[Asked]) -> Verdict:
        """Spends the units of all budgets, or of none."""
        if len(asked) == 1:
            [(budget, key, cost, charge)] = asked
            decisions = await budget.spend(key, cost)
            return Verdict(budget, key, decisions, () if charge is None else (Spent(charge, decisions),))
        if self._counters is not None:
            return self._verdict(asked, await self._spend_shared(asked, self._counters))
        refused = self._looked(asked)
        return refused or self._verdict(asked, [each.budget.hit(each.key, each.cost) for each in asked])

    async def _spend_shared(self, asked: Sequence[Asked], counters: SharedCounters) -> list[list[Decision]]:
        """One trip for budgets of one key, which all pass or spend nothing; else a trip for each, until one refuses."""
        budgets = [each.budget for each in asked if isinstance(each.budget, SharedBudget) and each.key == asked[0].key]
        if len(budgets) == len(asked):
            charges = [(budget.shared, each.cost) for budget, each in zip(budgets, asked, strict=True)]
            try:
                decisions = iter(await counters.spend(asked[0].key, *charges))
            except StoreUnavailable:
                logger.debug("the shared store is gone: what holds meanwhile is each budget's to say")
            else:
                return [list(islice(decisions, len(budget.limits))) for budget in budgets]
        said: list[list[Decision]] = []
        for each in asked:
            refused = any(not decision.allowed for part in said for decision in part)
            ask = each.budget.look(each.key, each.cost) if refused else await each.budget.spend(each.key, each.cost)
            said.append(ask)
        return said

    def _looked(self, asked: Sequence[Asked]) -> Verdict | None:
        looks = self._verdict(asked, [each.budget.look(each.key, each.cost) for each in asked])
        return None if looks.allowed else looks

    def _verdict(self, asked: Sequence[Asked], said: Sequence[list[Decision]]) -> Verdict:
        budgets = tuple(each.budget for each in asked)
        together = self._together.get(budgets)
        if together is None:
            together = Together(budgets)
            if len(self._together) < _MOST_BUDGETS:
                self._together[budgets] = together
        spent = tuple(Spent(each.charge, part) for each, part in zip(asked, said, strict=True) if each.charge)
        return Verdict(together, asked[0].key, [decision for part in said for decision in part], spent)

    async def _overridden(self, override: "RateLimit", scope: Scope, context: RequestContext) -> Asked:
        key = await key_of(override.key or self.settings.key, scope, context)
        if override.limits_of is None:
            budget = self.budget_of(override, scope)
        else:
            budget = await self._budget_for(override, override.limits_of, scope)
        return Asked(budget, key, override.cost_of(scope))

    async def _budget_for(self, override: "RateLimit", limits_of: LimitsOf, scope: Scope) -> Budget:
        """The budget of the limits that a function gives; of the default where it gives none that can be."""
        try:
            answer = limits_of(HTTPConnection(scope))
            texts = await answer if inspect.isawaitable(answer) else answer
            limits = parse_limits(texts, override.name) if texts else ()
        except Exception:  # noqa: BLE001 - whatever it raises, it is logged
            self._complain(override, "the function that gives the limits of %r failed; the default holds", override)
            return self._default
        if not limits:
            return self._default
        strategy = override.strategy or self.settings.strategy
        name = "" if self._counters is None else _name_of(override, scope)
        identity = (override.scope_name or override, limits)
        return self._computed_budget(identity, limits, strategy, name, override.on_store_failure)

    def _charged(self, charge: Charge) -> Asked:
        budget = self._computed_budget(charge.budget, charge.limits, charge.strategy, charge.budget)
        return Asked(budget, charge.key, charge.cost, charge)

    def _computed_budget(
        self,
        identity: Hashable,
        limits: tuple[Limit, ...],
        strategy: Strategy,
        name: str,
        on_store_failure: OnStoreFailure | None = None,
    ) -> Budget:
        budget = self._computed.get(identity)
        if budget is None:
            if len(self._computed) >= _MOST_BUDGETS:
                self._complain("most", "functions gave more than %d different limits; the default holds", _MOST_BUDGETS)
                return self._default
            budget = self._computed[identity] = self._budget(limits, strategy, name, on_store_failure)
        return budget

    def _complain(self, what: Hashable, message: str, *arguments: object) -> None:
        """Logs once what goes wrong with every request."""
        if what not in self._complained:
            self._complained.add(what)
            logger.error(message, *arguments, exc_info=what != "most")

    def budget_of(self, override: "RateLimit", scope: Scope) -> Budget:
        """The budget that an override declares; those of one scope with the same limits share theirs."""
        identity = (override.scope_name, override.limits) if override.scope_name else override
        budget = self._budgets.get(identity)
        if budget is None:
            strategy = override.strategy or self.settings.strategy
            name = "" if self._counters is None else _name_of(override, scope)
            failing = override.on_store_failure
            budget = self._budgets[identity] = self._budget(override.limits, strategy, name, failing)
        return budget

    def _budget(
        self, limits: tuple[Limit, ...], strategy: Strategy, name: str, on_store_failure: OnStoreFailure | None = None
    ) -> Budget:
        max_keys, clock = self.settings.max_keys, self._clock
        if self._counters is None:
            return Budget(limits, strategy, max_keys=max_keys, clock=clock)
        failing = on_store_failure or self.settings.on_store_failure
        return SharedBudget(
            name,
            limits,
            strategy,
            counters=self._counters,
            on_store_failure=failing,
            max_keys=max_keys,
            clock=clock,
        )


def _name_of(override: "RateLimit", scope: Scope) -> str:
    """What a budget is called in a store, the same in every worker: by the first route on which its limit counts.

    A limit that stands on no route of the table shares a budget with its like.
    """
    if override.scope_name:
        return f"scope {override.scope_name}"
    app = scope.get("app")
    seen: list[str] = []
    for entry in () if app is None else table_of(app):
        label = f"{entry.kind} {','.join(sorted(entry.methods or ()))} {entry.template}"
        if entry.of(RateLimit)[-1:] == (override,):
            return f"{label} {seen.count(label)}"
        seen.append(label)
    return "elsewhere"


# --- override ---------------------------------------------------------------------------------------------------------


class _Late:
    """Key of the verdict of an override that its layer had not seen."""


class RateLimit(Override):
    """The limit of a route, a router or an application, in place of the default; the innermost counts.

    One declaration is one budget a client, however many routes it stands on. On an application that was never hardened
    it counts by itself, after routing.

    Args:
        limits: ``5/minute``, ``100 per hour``, several with ``;`` or as a list; or a function of the connection (sync
            or async) that gives them, such as the limits of the caller's plan. Where it gives nothing, fails, or gives
            what is no limit, the default holds, and the log says so once.
        key: Whose budget it is: ``address``, ``principal``, ``credential``, ``tenant``, ``header:X-API-Key``, or a
            function of the connection (sync or async) that gives a text; of several, each combination has a budget.
            ``None`` takes the setting. A caller for whom it gives nothing is counted by address.
        cost: How many units a request spends, or a function of the connection that says so.
        scope: Declarations of one scope with the same limits share a budget.
        concurrent: So many requests of one client may be served at the same time here.
        name: What the policy is called in ``RateLimit-Policy``; by default by its limit.
        strategy: How it is counted; by default as the settings say.
        on_store_failure: What holds while the shared store is gone; by default as the settings say.

    Raises:
        ValueError: The limits cannot be read, or the key is none.

    Example:
        >>> login = RateLimit("5/minute", name="login")
        >>> report = RateLimit("100/day", key="header:X-API-Key", cost=10)
        >>> by_session = RateLimit("60/minute", key=lambda connection: connection.cookies.get("session"))
        >>> guesses = RateLimit("5/minute", key=("principal", "address"))
        >>> plans = {"free": "10/minute", "paid": "1000/minute; 50000/day"}
        >>> by_plan = RateLimit(lambda connection: plans.get(connection.headers.get("x-plan")), key="tenant")
    """

    exempt: ClassVar["RateLimit"]
    """Lifts the limit."""

    def __init__(
        self,
        limits: Texts | LimitsOf,
        *,
        key: Key | None = None,
        cost: Cost = 1,
        scope: str | None = None,
        concurrent: int | None = None,
        name: str | None = None,
        strategy: Strategy | None = None,
        on_store_failure: OnStoreFailure | None = None,
    ) -> None:
        super().__init__()
        if name is not None:
            header_fields.field("x", name.replace('"', "\n").replace("\\", "\n"))
        self.limits_of: LimitsOf | None = limits if callable(limits) else None
        self.limits = () if callable(limits) else parse_limits(limits, name)
        self.key = None if key is None else check_key(key)
        self.name = name
        self.cost = cost
        self.scope_name = scope
        self.concurrent = concurrent
        self.strategy = strategy
        self.on_store_failure = on_store_failure
        self._own: RateLimitMiddleware | None = None

    @property
    def lifts(self) -> bool:
        """Whether there is no limit at all."""
        return not self.limits and self.limits_of is None

    def cost_of(self, scope: Scope) -> int:
        """The units that this request spends."""
        return self.cost if isinstance(self.cost, int) else max(0, self.cost(HTTPConnection(scope)))

    async def after_routing(self, connection: HTTPConnection, response: Response) -> None:  # type: ignore[override]
        """Acts where the layer has not seen the route."""
        await super().after_routing(connection)
        state = request_context.ensure(connection.scope).state
        if _Late in state and RateLimitMiddleware not in state:
            verdict: Verdict = state[_Late]
            response.headers["RateLimit-Policy"] = verdict.budget.policy.decode("ascii")
            response.headers["RateLimit"] = verdict.budget.state(verdict.decisions).decode("ascii")

    async def act_late(self, connection: HTTPConnection) -> None:
        """Counts after routing, with the layer's counters where there is a layer."""
        if self.lifts:
            return
        context = request_context.ensure(connection.scope)
        layer: RateLimitMiddleware | None = context.state.get(RateLimitMiddleware)
        if layer is None:
            layer = self._own = self._own or RateLimitMiddleware(_nowhere)
        if layer.admits(context):
            return
        asked = await layer.ask(self, connection.scope, context, declared=False)
        ban = layer.barred(asked)
        if ban is not None:
            tell(ban, context, "rate limit")
            raise ban
        if asked:
            verdict = context.state[_Late] = await layer.spend(asked)
            if not verdict.allowed:
                problem = verdict.budget.problem(verdict.decisions)
                tell(
                    problem, context, "rate limit", verdict.key if stands_for_one(verdict.key, context.client) else None
                )
                raise problem

    @classmethod
    def _lifted(cls) -> "RateLimit":
        override = cls("1/second")
        override.limits = ()
        return override


async def _nowhere(_scope: Scope, _receive: Receive, _send: Send) -> None:
    raise NotImplementedError


RateLimit.exempt = RateLimit._lifted()  # noqa: SLF001 - its own
