"""Reads what an application has declared with slowapi, so that it holds: on every route, and without blocking.

slowapi's own checks leave holes with today's FastAPI: nothing is limited on an included router, in a mounted
application or on an unknown path, ``/orders/1`` and ``/orders/2`` have a budget each, and a shared store is asked while
the event loop waits. Its declarations are good. So they are read from its ``Limiter`` objects, and the rate limit
enforces them: ``default_limits``, ``application_limits``, ``limit``, ``shared_limit`` and ``exempt``, with everything
that they take. It is *not* slowapi: its storage is not used, and its middlewares are taken off.

It works for applications under ``harden()``; everywhere else slowapi goes on as it is, also with the same ``Limiter``.

What a function of the application needs may not be known when the rate limit looks: what its own middlewares or
dependencies put on ``request.state``, the parameters of the path. Such a default is counted behind the middlewares,
such a decorator where slowapi itself would count: before the endpoint, in the memory of this process if that is async.

Example:
    >>> from fastapi import FastAPI, Request
    >>> from fastapi_hardening import Settings, harden
    >>> from slowapi import Limiter
    >>> from slowapi.util import get_remote_address
    >>> app = FastAPI()
    >>> app.state.limiter = limiter = Limiter(key_func=get_remote_address)
    >>> @app.get("/mars")
    ... @limiter.limit("5/minute")
    ... async def mars(request: Request) -> str:
    ...     return "red"
    >>> handle = harden(app, Settings(_env_file=None))
"""

# Nearly all that slowapi keeps is private (READ_OF_LIMITER, held by a test), and only who uses it imports it.
# ruff: noqa: PLC0415, SLF001

import asyncio
import copy
import inspect
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from email.utils import formatdate
from functools import lru_cache
from typing import Any

from anyio import from_thread
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from fastapi_hardening.core import context as request_context
from fastapi_hardening.core.charge import Charge, Spender, Spent
from fastapi_hardening.core.clock import Clock, SystemClock
from fastapi_hardening.core.configuration import ConfigurationError
from fastapi_hardening.core.context import RequestContext
from fastapi_hardening.core.headers import RawHeaders, get, replace
from fastapi_hardening.core.keys import counted, name_of, stands_for_one
from fastapi_hardening.core.problem import Problem, refuse, tell
from fastapi_hardening.core.routes import RouteEntry, RouteTable, route_of
from fastapi_hardening.core.window import Limit, Strategy

logger = logging.getLogger("fastapi_hardening.slowapi")

MARKED = "_Limiter__marked_for_limiting"
PROVIDER = "_LimitGroup__limit_provider"
SCOPE = "_Limit__scope"
READ_OF_LIMITER = (
    "_application_limits",
    "_auto_check",
    "_check_request_limit",
    "_default_limits",
    "_dynamic_route_limits",
    "_exempt_routes",
    "_header_mapping",
    "_headers_enabled",
    "_key_prefix",
    "_key_style",
    "_limiter",
    "_retry_after",
    "_route_limits",
    "_storage",
    "_swallow_errors",
    "enabled",
    MARKED,
)
"""What is read of a ``Limiter``; most of it is private, so a test holds that it is there and means what it meant."""

# Limits of a group that is made for each request are other ones each time; only so many are remembered.
_MOST_READY = 32

# The keys of `_header_mapping`, and what the decorators look for when the endpoint has answered.
_RESET, _REMAINING, _LIMIT, _RETRY_AFTER = 1, 2, 3, 4
_VIEW = "view_rate_limit"


class _TooEarly(BaseException):
    """A function asks for what is not known yet. Not an ``Exception``: the function must not catch it."""


class _State:
    """The state of a request to which the application may still add something."""

    def __init__(self, known: dict[str, Any]) -> None:
        self._known = known

    def __getattr__(self, name: str) -> Any:
        if name not in self._known:
            raise _TooEarly
        return self._known[name]


class _Early(HTTPConnection):
    """A connection before middlewares, routing and dependencies."""

    @property
    def method(self) -> str:
        return str(self.scope.get("method", "GET"))

    @property
    def state(self) -> Any:
        return _State(self.scope["state"])

    @property
    def path_params(self) -> Any:
        raise _TooEarly

    @property
    def user(self) -> Any:
        raise _TooEarly

    @property
    def auth(self) -> Any:
        raise _TooEarly

    @property
    def session(self) -> Any:
        raise _TooEarly


class _EarlyRequest(_Early, Request):
    """The same for a request."""


@dataclass(slots=True)
class _Plan:
    """What slowapi's limiters say about a route.

    Attributes:
        functions: The endpoint and everything that its decorators have wrapped.
        place: What its own budgets are called: its path template, or its function.
        app: Its application.
        around: The limiters of its application and of those that this one is mounted in, the outermost first.
        lifted_by: The limiters from which it is exempt.
        decorated: What decorators on it declare, by limiter: a limit, or a group that is made for each request.
        ready: Charges of limits that need nothing but the client, by the identity of the limit.
    """

    functions: tuple[Any, ...]
    place: str
    app: Any
    around: list[Any]
    lifted_by: list[Any] = field(default_factory=list)
    decorated: list[tuple[Any, list[Any]]] = field(default_factory=list)
    ready: dict[int, Charge] = field(default_factory=dict)


class _Once:
    """A request as functions of the application see it, made when the first of them asks for it.

    Args:
        scope: The connection.
        context: What is known about it.
        plan: What is declared on its route.
        kind: What is made of the scope; by default a request that is not routed yet.
    """

    __slots__ = ("_context", "_kind", "_made", "_plan", "_scope")

    def __init__(self, scope: Scope, context: RequestContext, plan: _Plan, kind: Any = None) -> None:
        self._scope = scope
        self._context = context
        self._plan = plan
        self._kind = kind
        self._made: Any = None

    def __call__(self) -> Any:
        if self._made is None:
            kind = self._kind or (_EarlyRequest if self._scope["type"] == "http" else _Early)
            self._made = kind(_believed(self._scope, self._context, self._plan))
        return self._made


class _Seen:
    """What was found out about one request, for whoever looks further in."""

    __slots__ = ("by_decorators", "by_default", "owner", "plan", "spender")

    def __init__(self, owner: "SlowapiLimits", plan: _Plan, spender: Spender) -> None:
        self.owner = owner
        self.plan = plan
        self.spender = spender
        # What could not be worked out yet.
        self.by_default: list[tuple[Any, Any]] = []
        self.by_decorators: list[tuple[Any, Any]] = []


# --- reading ----------------------------------------------------------------------------------------------------------


class SlowapiLimits:
    """The limits that slowapi's limiters of an application, and of everything mounted under it, declare.

    Args:
        table: The routes.
        clock: Where the time of ``X-RateLimit-Reset`` comes from.
    """

    def __init__(self, table: RouteTable, *, clock: Clock | None = None) -> None:
        self._table = table
        self._time = (clock or SystemClock()).time
        self._plans: dict[RouteEntry, _Plan] = {}
        self._fixed: dict[int, tuple[Any, list[Any]]] = {}
        self._complained: set[str] = set()
        table.on_rebuilt.append(self.begin_anew)

    def limiters(self) -> list[Any]:
        """Every limiter that declares something here, each once."""
        found = [limiter_of(app) for app in self._table.applications]
        found += [limiter for entry in self._table for limiter in _limiters_around(entry.endpoint)]
        return list({id(limiter): limiter for limiter in found if limiter is not None}.values())

    @property
    def asks_behind_middlewares(self) -> bool:
        """Whether a default is counted by a function, which may need what middlewares of the application find out."""
        groups = [group for each in self.limiters() for group in (*each._default_limits, *each._application_limits)]
        return any(not _is_address(group.key_function) for group in groups)

    def charges(
        self, scope: Scope, context: RequestContext, spender: Spender, *, defaults: bool
    ) -> Sequence[Charge] | None:
        """What a request spends; see :class:`~fastapi_hardening.core.charge.Declarations`."""
        # With nothing in it, the decorators leave the answer alone.
        scope.setdefault("state", {})[_VIEW] = None
        entry = route_of(scope)
        plan = self._plans.get(entry) or self._planned(entry, scope)
        seen = context.state[SlowapiLimits] = _Seen(self, plan, spender)
        request = _Once(scope, context, plan)
        charges: list[Charge] = []
        overridden = False
        for limiter, groups in plan.decorated:
            for group in groups if _is_on(limiter) else ():
                try:
                    limits = self._limits(group, request)
                    charges += self._charged(limiter, limits, plan, request, context)
                except _TooEarly:
                    limits = [group]
                    seen.by_decorators.append((limiter, group))
                overridden = overridden or any(limit.override_defaults for limit in limits)
        lifted = any(_is_on(limiter) for limiter in plan.lifted_by)
        for limiter, group in () if lifted else _defaults_of(plan, alone=defaults and not overridden):
            try:
                charges += self._charged(limiter, self._limits(group, request), plan, request, context, default=True)
            except _TooEarly:
                seen.by_default.append((limiter, group))
        # One that is declared twice in the same words is one.
        if len(charges) > 1:
            charges = list({(charge.budget, charge.key): charge for charge in charges}.values())
        return charges if charges or lifted else None

    def late_defaults(self, seen: _Seen, scope: Scope, context: RequestContext) -> list[Charge]:
        """The defaults that had to wait for the middlewares of the application."""
        groups, seen.by_default = seen.by_default, []
        request = _Once(scope, context, seen.plan, Request if scope["type"] == "http" else _Early)
        return [
            charge
            for limiter, group in groups
            for charge in self._charged(
                limiter, self._limits(group, request), seen.plan, request, context, default=True
            )
        ]

    def late_decorators(self, seen: _Seen, request: Request, context: RequestContext) -> list[Charge]:
        """What decorators declare that had to wait for the endpoint."""
        groups, seen.by_decorators = seen.by_decorators, []
        seen_by_them = copy.copy(request)
        seen_by_them.scope = _believed(request.scope, context, seen.plan)
        believed = _Once(request.scope, context, seen.plan, lambda _scope: seen_by_them)
        return [
            charge
            for limiter, group in groups
            for charge in self._charged(limiter, self._limits(group, believed), seen.plan, believed, context)
        ]

    def _limits(self, group: Any, request: "_Once") -> list[Any]:
        """The limits of a group, as slowapi makes them; a limit is one already."""
        if not hasattr(group, "with_request"):
            return [group]
        known = self._fixed.get(id(group))
        if known is not None:
            return known[1]
        try:
            limits = list(group.with_request(request()))
        except ValueError as error:
            self._complain("%r gives what is no limit (%s); other limits hold", getattr(group, PROVIDER), error)
            return []
        if not callable(getattr(group, PROVIDER)):
            # The group is kept as well, or another one could get its id.
            self._fixed[id(group)] = (group, limits)
        return limits

    def _charged(
        self,
        limiter: Any,
        limits: list[Any],
        plan: _Plan,
        request: "_Once",
        context: RequestContext,
        *,
        default: bool = False,
    ) -> list[Charge]:
        charges = []
        for limit in limits:
            ready = plan.ready.get(id(limit))
            if ready is not None and ready.source[1] is limit:
                budget, ours, strategy, _, cost, source = ready
                charges.append(Charge(budget, ours, strategy, context.client.key, cost, source))
                continue
            charge = self._charge(limiter, limit, plan, request, context, default=default)
            if charge is not None:
                charges.append(charge)
                if _needs_nothing(limit) and len(plan.ready) < _MOST_READY:
                    plan.ready[id(limit)] = charge
        return charges

    def _charge(
        self,
        limiter: Any,
        limit: Any,
        plan: _Plan,
        request: "_Once",
        context: RequestContext,
        *,
        default: bool,
    ) -> Charge | None:
        if limit.methods is not None and request().method.lower() not in limit.methods:
            return None
        if limit.is_exempt(request()) if limit._exempt_when_takes_request else limit.is_exempt():
            return None
        scope = getattr(limit, SCOPE) or plan.place
        scope = scope(plan.place) if callable(scope) else scope
        scope = f"{scope}:{request().method}" if limit.per_method else scope
        ours = _counted_as(limit.limit)
        return Charge(
            budget=f"slowapi {limiter._key_prefix or ''} {scope} {ours.name}",
            limits=(ours,),
            strategy=_strategy_of(limiter),
            key=self._key(limiter, limit.key_func, request, context, default=default),
            cost=max(0, math.ceil(limit.cost(request()) if callable(limit.cost) else limit.cost)),
            source=(limiter, limit),
        )

    def _key(self, limiter: Any, function: Any, request: "_Once", context: RequestContext, *, default: bool) -> str:
        if _is_address(function):
            return context.client.key
        try:
            found = function(request()) if _takes_request(function) else function()
        except Exception as error:
            # A default also holds on paths for which the function was not made.
            if not default and not limiter._swallow_errors:
                raise
            self._complain("the key function %r failed (%r); such requests are counted by address", function, error)
            found = None
        if not found or found == context.client.address:
            return context.client.key
        return counted(name_of(function), str(found))

    def _planned(self, entry: RouteEntry, scope: Scope) -> _Plan:
        apps = entry.applications or (scope.get("app"),)
        around = [limiter for limiter in map(limiter_of, apps) if limiter is not None]
        name = _name(entry.endpoint)
        by_name = bool(around and around[-1]._key_style == "endpoint" and name)
        functions = tuple(_unwrapped(entry.endpoint))
        plan = self._plans[entry] = _Plan(functions, name if by_name else str(entry.template), apps[-1], around)
        for limiter in {id(each): each for each in (*around, *_limiters_around(entry.endpoint))}.values():
            if name in limiter._exempt_routes:
                plan.lifted_by.append(limiter)
            else:
                plan.decorated.append((limiter, _declared_on(limiter, name, functions)))
        return plan

    def begin_anew(self, _table: RouteTable) -> None:
        """Forgets what it knows of routes, which have changed."""
        self._plans.clear()
        self.listen()

    def listen(self) -> None:
        """Has the checks of slowapi ask here first, and takes its middlewares off."""
        for limiter in self.limiters():
            _listen_to(limiter)
        for app in self._table.applications:
            _take_off(app)

    def _complain(self, message: str, function: object, error: Exception) -> None:
        """Logs once what goes wrong with every request."""
        if repr(function) not in self._complained:
            self._complained.add(repr(function))
            logger.error(message, function, error)

    # --- answering ----------------------------------------------------------------------------------------------------

    def refused(self, problem: Problem, spent: Spent, scope: Scope) -> tuple[HTTPException, Scope]:
        """What the handlers of the application know a refusal as: slowapi's own exception, and its application."""
        limiter, limit = spent.charge.source
        exceeded = _exceeded(limit, problem)
        if limit.error_message:
            problem.explanation = str(exceeded.detail)
        context = request_context.ensure(scope)
        plan: _Plan = context.state[SlowapiLimits].plan
        # Some handlers look at it. Those that hand it to slowapi would ask its storage, which must not be another host.
        if not limiter._headers_enabled or _keeps_in_memory(limiter):
            scope.setdefault("state", {})[_VIEW] = (limit.limit, [spent.charge.key, spent.charge.budget])
        return exceeded, {**scope, "app": plan.app}

    def write(self, headers: RawHeaders, spent: Sequence[Spent]) -> None:
        """Adds slowapi's fields where they are enabled, and when to come back to a refusal that does not say so."""
        refused = next((each for each in spent if each.refused_by is not None), None)
        shown = refused or min(spent, key=lambda each: each.decisions[0].remaining)
        limiter, limit = shown.charge.source
        enabled = limiter._headers_enabled
        if refused is None and not enabled:
            return
        [decision] = shown.decisions
        names = {key: name.lower().encode("latin-1") for key, name in limiter._header_mapping.items()}
        now = self._time()
        if enabled:
            replace(headers, names[_LIMIT], str(limit.limit.amount).encode("ascii"))
            replace(headers, names[_REMAINING], str(decision.remaining).encode("ascii"))
            replace(headers, names[_RESET], str(math.ceil(now + decision.reset_seconds)).encode("ascii"))
        if refused is not None and (enabled or get(headers, names[_RETRY_AFTER]) is None):
            wait = limit.limit.get_expiry() if math.isinf(decision.retry_seconds) else decision.retry_seconds
            seconds = max(1, math.ceil(wait - 1e-6))
            dated = limiter._retry_after == "http-date"
            text = formatdate(now + seconds, usegmt=True) if dated else str(seconds)
            replace(headers, names[_RETRY_AFTER], text.encode("ascii"))


class BehindMiddlewares:
    """Counts defaults that had to wait for the middlewares of the application; stands where the router is called.

    Args:
        app: The router.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        context = request_context.of(scope)
        seen: _Seen | None = None if context is None else context.state.get(SlowapiLimits)
        if context is None or seen is None or not seen.by_default:
            await self.app(scope, receive, send)
            return
        charges = seen.owner.late_defaults(seen, scope, context)
        refusal = await seen.spender.spend_late(charges, context) if charges else None
        if refusal is None:
            await self.app(scope, receive, send)
            return
        problem, spent = refusal
        key, known_as = spent.charge.key, None
        if spent.decisions:
            known_as, scope = seen.owner.refused(problem, spent, scope)
        told = key if spent.decisions and stands_for_one(key, context.client) else None
        await refuse(problem, scope, receive, send, layer="rate limit", key=told, known_as=known_as)


# --- what the application already has ---------------------------------------------------------------------------------


def adopt(table: RouteTable, *, clock: Clock | None = None, shared: bool = False) -> SlowapiLimits | None:
    """What slowapi's limiters declare for an application; ``None`` where there are none.

    To be called when the stack of the application is built, because limiters and middlewares may be added until then.

    Args:
        table: The routes of the application.
        clock: Where the time comes from.
        shared: Whether the rate limit counts in a store that all workers share.

    Raises:
        ConfigurationError: This version of slowapi is not one that can be read.
    """
    if "slowapi" not in sys.modules:
        return None
    found = SlowapiLimits(table, clock=clock)
    limiters = found.limiters()
    if not limiters:
        table.on_rebuilt.remove(found.begin_anew)
        return None
    missing = sorted({name for limiter in limiters for name in READ_OF_LIMITER if not hasattr(limiter, name)})
    if missing:
        raise ConfigurationError(
            f"this version of slowapi has no {', '.join(missing)}, so that its limits cannot be taken over: install "
            "the version of slowapi before, or write them as RateLimit(...)"
        )
    found.listen()
    logger.info("the limits that are declared with slowapi are enforced by the rate limit")
    if not shared and not all(map(_keeps_in_memory, limiters)):
        logger.warning(
            "the storage of slowapi (storage_uri) is not used, and each process counts for itself: set state_url to a "
            "Redis (HARDENING_STATE_URL) to count together"
        )
    return found


def _defaults_of(plan: _Plan, *, alone: bool) -> Iterator[tuple[Any, Any]]:
    """The limits of whole applications; the default is that of the innermost, if it stands ``alone`` on the route."""
    on = [limiter for limiter in plan.around if _is_on(limiter)]
    for limiter in on:
        for group in limiter._application_limits:
            yield limiter, group
    for group in on[-1]._default_limits if on and alone else ():
        yield on[-1], group


def limiter_of(app: Any) -> Any:
    """The limiter of an application, if it has one."""
    from slowapi import Limiter

    limiter = getattr(getattr(app, "state", None), "limiter", None)
    return limiter if isinstance(limiter, Limiter) else None


def _take_off(app: Any) -> None:
    """Takes slowapi's middlewares off an application that does not serve yet; classes derived from them stay."""
    middleware = sys.modules.get("slowapi.middleware")
    if middleware is None or getattr(app, "middleware_stack", None) is not None:
        return
    kinds = (middleware.SlowAPIMiddleware, middleware.SlowAPIASGIMiddleware)
    for entry in [entry for entry in getattr(app, "user_middleware", ()) if entry.cls in kinds]:
        app.user_middleware.remove(entry)
        logger.warning(
            "the application's %s is taken off: what the limiter declares is enforced by the rate limit, on every "
            "route; remove it to say so yourself",
            entry.cls.__name__,
        )


def _listen_to(limiter: Any) -> None:
    """Has slowapi's own check step aside where the rate limit has counted.

    Where it has not, the check does what it always did: in an application that is not hardened, and on an endpoint
    that a middleware of the application leads to, behind the rate limit.
    """
    theirs = limiter._check_request_limit
    if getattr(theirs, "__module__", None) == __name__:
        return

    def check(request: Request, endpoint_func: Any, in_middleware: bool = True) -> None:  # noqa: FBT001, FBT002
        context = request_context.of(request.scope)
        seen: _Seen | None = None if context is None else context.state.get(SlowapiLimits)
        if context is None or seen is None:
            theirs(request, endpoint_func, in_middleware)
            return
        known = in_middleware or any(function is endpoint_func for function in seen.plan.functions)
        if not known:
            theirs(request, endpoint_func, in_middleware)
            return
        setattr(request.state, _VIEW, None)
        charges = seen.owner.late_decorators(seen, request, context) if seen.by_decorators and not in_middleware else ()
        refusal = _spend(seen.spender, charges, context) if charges else None
        if refusal is not None:
            problem, spent = refusal
            key = spent.charge.key if spent.decisions and stands_for_one(spent.charge.key, context.client) else None
            tell(problem, context, "rate limit", key)
            raise _exceeded(spent.charge.source[1], problem) if spent.decisions else problem

    limiter._check_request_limit = check


def _spend(spender: Spender, charges: Sequence[Charge], context: RequestContext) -> tuple[Problem, Spent] | None:
    """Spends in the loop, which an endpoint that is not async is not in."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return from_thread.run(spender.spend_late, charges, context)
    return spender.spend_now(charges, context)


def _exceeded(limit: Any, problem: Problem) -> HTTPException:
    from slowapi.errors import RateLimitExceeded

    exceeded: HTTPException = RateLimitExceeded(limit)
    exceeded.headers = problem.headers
    return exceeded


def _declared_on(limiter: Any, name: str, functions: tuple[Any, ...]) -> list[Any]:
    """What the decorators of a limiter declare on an endpoint.

    slowapi knows functions by their name only, so that two of one name have the limits of both. As far as it can be
    told which are whose, each has its own.
    """
    marked = getattr(limiter, MARKED).get(name, [])
    mine = [any(function is each for each in functions) for function in marked]
    limits = limiter._route_limits.get(name, [])
    groups = limiter._dynamic_route_limits.get(name, [])
    if not any(mine):
        return []
    if len(marked) == len(limits) + len(groups) and not (limits and groups):
        return [each for each, is_mine in zip([*limits, *groups], mine, strict=True) if is_mine]
    return [*limits, *groups]


def _limiters_around(endpoint: Any) -> Iterator[Any]:
    """The limiters whose decorators are around an endpoint."""
    from slowapi import Limiter

    for function in _unwrapped(endpoint):
        if getattr(function, "__globals__", {}).get("__name__") == Limiter.__module__:
            for cell in function.__closure__ or ():
                if isinstance(cell.cell_contents, Limiter):
                    yield cell.cell_contents


def _unwrapped(endpoint: Any) -> Iterator[Any]:
    while endpoint is not None:
        yield getattr(endpoint, "__func__", endpoint)
        endpoint = getattr(endpoint, "__wrapped__", None)


def _name(endpoint: Any) -> str:
    """What slowapi calls a function."""
    name = getattr(endpoint, "__name__", None)
    return f"{endpoint.__module__}.{name}" if name else ""


def _is_on(limiter: Any) -> bool:
    return bool(limiter.enabled and limiter._auto_check)


@lru_cache(maxsize=1024)
def _is_address(function: Any) -> bool:
    """Whether it is one of slowapi's own key functions: what they look for is found better already."""
    from slowapi import util

    return function is util.get_remote_address or function is util.get_ipaddr


@lru_cache(maxsize=1024)
def _takes_request(function: Any) -> bool:
    return "request" in inspect.signature(function).parameters


@lru_cache(maxsize=1024)
def _counted_as(item: Any) -> Limit:
    many = item.multiples if item.multiples > 1 else ""
    return Limit(f"{item.amount}/{many}{item.GRANULARITY.name}", item.amount, item.get_expiry())


def _strategy_of(limiter: Any) -> Strategy:
    """A window that moves is counted as one that slides, in two numbers instead of one for each request."""
    return "fixed-window" if type(limiter._limiter).__name__.startswith("FixedWindow") else "sliding-window"


def _keeps_in_memory(limiter: Any) -> bool:
    return type(limiter._storage).__name__ == "MemoryStorage"


def _believed(scope: Scope, context: RequestContext, plan: _Plan) -> Scope:
    """The scope as functions of the application see it: the client is whom we believe it to be."""
    peer = scope.get("client")
    return {**scope, "client": (context.client.address, peer[1] if peer else 0), "app": plan.app}


def _needs_nothing(limit: Any) -> bool:
    """Whether what a limit costs, and whom, is the same for all requests of an address."""
    return (
        limit.methods is None
        and limit.exempt_when is None
        and not limit.per_method
        and not callable(limit.cost)
        and not callable(getattr(limit, SCOPE))
        and _is_address(limit.key_func)
    )
