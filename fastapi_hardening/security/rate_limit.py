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

import hashlib
import inspect
import math
from collections.abc import Awaitable, Callable, Hashable
from typing import Any, ClassVar, Literal, NamedTuple

from fastapi import Response
from pydantic import Field, field_validator
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_hardening.core import context as request_context
from fastapi_hardening.core import headers as header_fields
from fastapi_hardening.core.clock import Clock
from fastapi_hardening.core.configuration import ConcernSettings
from fastapi_hardening.core.context import RequestContext
from fastapi_hardening.core.policy import Override, mark_handled
from fastapi_hardening.core.problem import IANA, Problem, refuse, retry_after, tell
from fastapi_hardening.core.routes import route_of, table_of
from fastapi_hardening.core.store import SharedCounters, SharedLimits, StateStore, StoreUnavailable
from fastapi_hardening.core.window import Decision, Limit, Limiter, Strategy, parse_limits

Key = str | Callable[[HTTPConnection], str | None] | Callable[[HTTPConnection], Awaitable[str | None]]
Cost = int | Callable[[HTTPConnection], int]
OnStoreFailure = Literal["rescue", "allow", "refuse"]

_STARTS = frozenset({"http.response.start", "websocket.http.response.start"})
_POLICY, _STATE = b"ratelimit-policy", b"ratelimit"
_OURS = frozenset({_POLICY, _STATE})
_LONGEST_KEY = 64


class RateLimitSettings(ConcernSettings):
    """The settings of rate limits."""

    default: str | tuple[str, ...] = "600/minute"
    """What holds where no route says otherwise: a limit, or several (``100/minute; 2000/hour``)."""

    strategy: Strategy = "token-bucket"
    """``token-bucket`` (bursts of the whole quota, even refill), ``fixed-window`` or ``sliding-window``."""

    key: str = "address"
    """Whose budget it is: the client's ``address``, or ``header:X-API-Key`` where something in front checks the key."""

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
    def _is_a_key(cls, key: str) -> str:
        _check_key(key)
        return key


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
        self._shared = SharedLimits(name, limits, strategy)
        self._counters = counters
        self._on_store_failure = on_store_failure
        self._rescue_of: Callable[[tuple[Limit, ...]], Budget] = lambda shares: Budget(
            shares, strategy, max_keys=max_keys, clock=clock
        )
        self._rescue: Budget | None = None

    async def spend(self, key: str, cost: int = 1) -> list[Decision]:
        """A decision for each limit; without the store, as the settings say."""
        try:
            return await self._counters.spend(key, (self._shared, cost))
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


def _check_key(key: Key) -> None:
    if isinstance(key, str):
        if key.startswith("header:"):
            header_fields.field(key.removeprefix("header:"), "x")
        elif key != "address":
            raise ValueError(f"{key!r} is no key; use 'address', 'header:X-API-Key' or a function of the connection")


async def _key_of(key: Key, scope: Scope, context: RequestContext) -> str:
    """The text that a budget is counted by. Whoever cannot be told apart shares one with its like."""
    if key == "address":
        return context.client.key
    if isinstance(key, str):
        value = header_fields.get(scope["headers"], key.removeprefix("header:").lower().encode("ascii"))
        found = None if value is None else value.decode("latin-1")
    else:
        answer = key(HTTPConnection(scope))
        found = await answer if inspect.isawaitable(answer) else answer
    if not found:
        return context.client.key
    # A prefix, so that nobody passes for an address by writing one.
    return "=" + (found if len(found) <= _LONGEST_KEY else hashlib.blake2b(found.encode(), digest_size=16).hexdigest())


class Verdict(NamedTuple):
    """What a budget says about a request."""

    budget: Budget
    key: str
    decisions: list[Decision]

    @property
    def allowed(self) -> bool:
        """Whether all limits allow it."""
        decisions = self.decisions
        return decisions[0].allowed if len(decisions) == 1 else all(decision.allowed for decision in decisions)


# --- layer ------------------------------------------------------------------------------------------------------------


class RateLimitMiddleware:
    """Counts every request and websocket handshake, and refuses what exceeds its budget.

    Args:
        app: The application inside.
        settings: The settings of rate limits.
        clock: Where the time comes from.
        store: Where all workers count together, if it is a shared one; else each counts for itself.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: RateLimitSettings | None = None,
        *,
        clock: Clock | None = None,
        store: StateStore | None = None,
    ) -> None:
        self.app = app
        self.settings = settings = settings or RateLimitSettings()
        self._clock = clock
        self._counters = None if store is None else store.counters
        self._by_address = settings.key == "address" and self._counters is None
        limits = parse_limits(settings.default, "default")
        self._default = self._budget(limits, settings.strategy, "default")
        wider = (Limit(each.name, each.quota * settings.unknown_proxy_factor, each.window_seconds) for each in limits)
        self._behind_unknown_proxy = self._budget(tuple(wider), settings.strategy, "behind an unknown proxy")
        self._budgets: dict[Hashable, Budget] = {}
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
        if override is not None and not override.limits:
            await self.app(scope, receive, send)
            return
        if override is None and self._by_address:
            # What most requests are: no override, no function to ask for a key, no store to wait for.
            budget = self._behind_unknown_proxy if context.client.behind_unknown_proxy else self._default
            verdict = Verdict(budget, context.client.key, budget.hit(context.client.key))
        else:
            verdict = await self.decide(override, scope, context)

        async def send_with_limits(message: Message) -> None:
            if message["type"] in _STARTS:
                said: Verdict = context.state.get(_Late, verdict)
                fields = (_POLICY, said.budget.policy), (_STATE, said.budget.state(said.decisions))
                headers = message["headers"] = [p for p in message.get("headers") or () if p[0] not in _OURS]
                headers += fields
            await send(message)

        send_limited = send_with_limits if self.settings.headers else send
        if not verdict.allowed:
            problem = verdict.budget.problem(verdict.decisions)
            if not self.settings.report_only:
                await refuse(problem, scope, receive, send_limited, layer="rate limit")
                return
            tell(problem, context, "rate limit (report only)")
        most = self.settings.concurrent if override is None else override.concurrent
        if most is None:
            await self.app(scope, receive, send_limited)
        else:
            await self._serve(most, (verdict.budget, verdict.key), scope, receive, send_limited)

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

    async def decide(self, override: "RateLimit | None", scope: Scope, context: RequestContext) -> "Verdict":
        """Which budget a request belongs to, and what each of its limits says."""
        if override is None:
            unknown = context.client.behind_unknown_proxy and self.settings.key == "address"
            budget = self._behind_unknown_proxy if unknown else self._default
            key = await _key_of(self.settings.key, scope, context)
            return Verdict(budget, key, await budget.spend(key))
        budget = self.budget_of(override, scope)
        key = await _key_of(override.key or self.settings.key, scope, context)
        return Verdict(budget, key, await budget.spend(key, override.cost_of(scope)))

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
        limits: ``5/minute``, ``100 per hour``, several with ``;`` or as a list.
        key: Whose budget it is: ``address``, ``header:X-API-Key``, or a function of the connection (sync or async) that
            gives a text; ``None`` takes the setting. A caller for whom it gives nothing is counted by address.
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
        >>> by_user = RateLimit("60/minute", key=lambda connection: connection.cookies.get("session"))
    """

    exempt: ClassVar["RateLimit"]
    """Lifts the limit."""

    def __init__(
        self,
        limits: str | tuple[str, ...] | list[str],
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
        if key is not None:
            _check_key(key)
        if name is not None:
            header_fields.field("x", name.replace('"', "\n").replace("\\", "\n"))
        self.limits = parse_limits(limits, name)
        self.key = key
        self.cost = cost
        self.scope_name = scope
        self.concurrent = concurrent
        self.strategy = strategy
        self.on_store_failure = on_store_failure
        self._own: RateLimitMiddleware | None = None

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
        if not self.limits:
            return
        context = request_context.ensure(connection.scope)
        layer: RateLimitMiddleware | None = context.state.get(RateLimitMiddleware)
        if layer is None:
            layer = self._own = self._own or RateLimitMiddleware(_nowhere)
        verdict = context.state[_Late] = await layer.decide(self, connection.scope, context)
        if not verdict.allowed:
            problem = verdict.budget.problem(verdict.decisions)
            tell(problem, context, "rate limit")
            raise problem

    @classmethod
    def _lifted(cls) -> "RateLimit":
        override = cls("1/second")
        override.limits = ()
        return override


async def _nowhere(_scope: Scope, _receive: Receive, _send: Send) -> None:
    raise NotImplementedError


RateLimit.exempt = RateLimit._lifted()  # noqa: SLF001 - its own
