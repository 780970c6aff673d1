"""Answers again what was answered before, on the routes that say so: ``dependencies=[CacheResponse(60)]``.

It protects endpoints from doing the same work for everybody: a hit does not reach the endpoint, and of all who miss
together one does. It is a shared cache inside the origin, as RFC 9111 has it, innermost in the pipeline: every layer
outside has had its say first, so nobody is answered who would not have been let in, and limits count hits.

It is *not* a cache of pages by guess: no route is cached that does not say so, and one caller is never answered with
what was made for another. A request with credentials of any kind (``Authorization``, cookies, a field that sounds like
a key or a user) goes to the endpoint, unless the route says whom its answer is for. An answer that sets a cookie, is
``private`` or ``no-store``, or has a nonce in it is never kept; nor is one of a route with a security scheme that
nobody here knows, or whose demands can only be judged by itself.

Example:
    >>> from fastapi import FastAPI
    >>> from fastapi_hardening.performance.response_cache import CacheResponse, ResponseCacheMiddleware
    >>> app = FastAPI()
    >>> app.add_middleware(ResponseCacheMiddleware)
    >>> @app.get("/products", dependencies=[CacheResponse(60, stale_if_error_seconds=600)])
    ... async def products() -> list[str]:
    ...     return ["lamp"]
"""

import asyncio
import copy
import logging
from contextvars import Context
from typing import Literal

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_hardening.core import context as request_context
from fastapi_hardening.core.cache_levels import CacheEntry, CacheLevels, Tags
from fastapi_hardening.core.clock import Clock, SystemClock
from fastapi_hardening.core.headers import get
from fastapi_hardening.core.http_caching import ABSENT, Lifetime, lifetime_of, not_modified, on_not_modified, variant
from fastapi_hardening.core.policy import mark_handled
from fastapi_hardening.core.problem import Problem, refuse
from fastapi_hardening.core.routes import RouteEntry, RouteTable, route_of, table_of
from fastapi_hardening.core.store import BoundedMap
from fastapi_hardening.performance.response_cache.asked import Asked, CacheResponse, Desk, Plan, tag_of
from fastapi_hardening.performance.response_cache.lead import (
    RETRY_SECONDS,
    Found,
    Kept,
    Lead,
    Outcome,
    form_of,
    status_field,
)
from fastapi_hardening.performance.response_cache.settings import ResponseCacheSettings

logger = logging.getLogger("fastapi_hardening.response_cache")

_READING = frozenset({"GET", "HEAD"})
_SAFE = frozenset({"OPTIONS", "TRACE"})
_UNKEPT_SECONDS = 5.0
_MOST_UNKEPT = 10_000
_MOST_WAITS = 3
_SAID = {"hit": "hit", "stale": "hit", "collapsed": "fwd=miss; collapsed", "error": "fwd=stale"}


class OnlyIfCached(Problem):
    """The client wants a stored answer or none, and there is none."""

    status = 504


class ResponseCacheMiddleware:
    """Answers from what was kept, and keeps what may be.

    Args:
        app: The application inside.
        settings: Lifetimes and sizes.
        levels: Where answers are kept; memory of its own by default.
        clock: Where the time comes from.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: ResponseCacheSettings | None = None,
        *,
        levels: CacheLevels | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.app = app
        self.settings = settings or ResponseCacheSettings()
        self._clock = clock = clock or SystemClock()
        self.levels = levels or CacheLevels(clock=clock)
        self.now = clock.time
        self._desk = Desk()
        self._flights: dict[str, asyncio.Future[Outcome]] = {}
        self._unkept: BoundedMap[bool] = BoundedMap(_MOST_UNKEPT, clock=clock)
        self._refreshing: dict[str, asyncio.Task[None]] = {}
        self._caching: tuple[RouteTable, bool] | None = None
        self._count = {
            outcome: self.levels.metrics.responses.labels(outcome).inc
            for outcome in ("hit", "not_modified", "stale", "error", "miss", "collapsed", "bypass")
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        if scope["type"] != "http" or not self.settings.enabled:
            await self.app(scope, receive, send)
            return
        context = request_context.ensure(scope)
        entry = context.route or route_of(scope)
        if scope["method"] not in _READING:
            await self._change(entry, scope, receive, send)
            return
        plan = self._desk.plan(entry) if CacheResponse in entry.overrides else None
        if plan is None:
            await self.app(scope, receive, send)
            return
        mark_handled(scope, plan.overrides)
        asked = self._desk.ask(plan, scope, context)
        if asked is None:
            self._count["bypass"]()
            await self.app(scope, receive, send)
            return
        found = self._find_now(asked)
        if found is not None and found[0].fresh_until > self.now():
            self.levels.metrics.memory_hit()
            await self._answer(found, asked, scope, send, "hit")
            return
        await self._serve(plan, asked, scope, receive, send)

    # --- what is there ------------------------------------------------------------------------------------------------

    def _find_now(self, asked: Asked) -> Found | None:
        """What memory has and may say."""
        asked.key = asked.primary
        entry = self.levels.peek(asked.key)
        form = None if entry is None else form_of(entry)
        if type(form) is tuple:
            asked.key += variant(form, asked.headers)
            entry = self.levels.peek(asked.key)
            form = None if entry is None else form_of(entry)
        return (entry, form) if entry is not None and isinstance(form, Kept) else None

    async def _find(self, asked: Asked) -> Found | None:
        """The same, where other levels may have to be asked."""
        if self.levels.only_memory:
            return self._find_now(asked)
        asked.key = asked.primary
        entry = await self.levels.get(asked.key)
        form = None if entry is None else form_of(entry)
        if type(form) is tuple:
            asked.key += variant(form, asked.headers)
            entry = await self.levels.get(asked.key)
            form = None if entry is None else form_of(entry)
        return (entry, form) if entry is not None and isinstance(form, Kept) else None

    async def _answer(self, found: Found, asked: Asked, scope: Scope, send: Send, how: str) -> None:
        """Sends what was kept, or that the client has it."""
        entry, kept = found
        now = self.now()
        modified = not (asked.conditions and self.has(asked, kept))
        headers = kept.headers.copy() if modified else on_not_modified(kept.headers)
        headers.append((b"age", b"%d" % max(0, now - entry.made_at)))
        if self.settings.cache_status:
            headers.append(status_field(f"{_SAID[how]}; ttl={int(entry.fresh_until - now)}"))
        self._count[how if modified or how != "hit" else "not_modified"]()
        await send({"type": "http.response.start", "status": kept.status if modified else 304, "headers": headers})
        body = kept.body if modified and scope["method"] != "HEAD" else b""
        await send({"type": "http.response.body", "body": body})

    # --- what is not there --------------------------------------------------------------------------------------------

    async def _serve(self, plan: Plan, asked: Asked, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers what memory alone cannot: after others, from other levels, or by the endpoint."""
        for _ in range(_MOST_WAITS):
            flight = self._flights.get(asked.key)
            if flight is None or flight.get_loop() is not asyncio.get_running_loop():
                break
            await asyncio.wait((flight,), timeout=self.settings.wait_seconds)
            if not flight.done() or flight.result() == "not kept":
                await self._pass(asked, scope, receive, send)
                return
            found = self._find_now(asked)
            if found is not None and self._is_usable(found[0]):
                await self._answer(found, asked, scope, send, "collapsed")
                return
        if scope["method"] == "GET" and self._unkept.get(asked.key) is None:
            flight = self._flights[asked.key] = asyncio.get_running_loop().create_future()
            lead = Lead(self, plan.override, asked, scope, send, flight=flight)
            try:
                await self._lead(lead, receive)
            finally:
                lead.land("ended")
            return
        found = await self._find(asked)
        if found is not None and self._is_usable(found[0]):
            await self._answer(found, asked, scope, send, "hit")
        else:
            await self._pass(asked, scope, receive, send)

    async def _lead(self, lead: Lead, receive: Receive) -> None:
        """Answers for all who ask meanwhile."""
        asked, scope = lead.asked, lead.scope
        found = await self._find(asked)
        if found is not None:
            entry = found[0]
            if self._is_usable(entry):
                lead.land("kept")
                await self._answer(found, asked, scope, lead.client, "hit")
                return
            if entry.fresh_until + self._revalidates(lead.override, found[1]) > self.now():
                lead.land("kept")
                self._refresh(lead)
                await self._answer(found, asked, scope, lead.client, "stale")
                return
            if entry.fresh_until + self._forgives(lead.override, found[1]) > self.now():
                lead.stale = found
        if await self._refuse_to_ask(asked, scope, receive, lead.client):
            return
        await lead.run(receive)

    async def _refuse_to_ask(self, asked: Asked, scope: Scope, receive: Receive, send: Send) -> bool:
        said = get(asked.headers, b"cache-control")
        if said is None or b"only-if-cached" not in said.lower():
            return False
        await refuse(OnlyIfCached("There is no stored answer."), scope, receive, send, layer="response cache")
        return True

    async def _pass(self, asked: Asked, scope: Scope, receive: Receive, send: Send) -> None:
        """Has the endpoint answer this request alone."""
        if not await self._refuse_to_ask(asked, scope, receive, send):
            self._count["miss"]()
            await self.app(scope, receive, send)

    def _is_usable(self, entry: CacheEntry) -> bool:
        now = self.now()
        return entry.fresh_until > now or entry.retry_at > now

    def _refresh(self, lead: Lead) -> None:
        """Has a fresh answer made that nobody waits for; in one worker, where they share what they keep."""
        key = lead.asked.key
        running = self._refreshing.get(key)
        if running is not None and running.get_loop() is asyncio.get_running_loop():
            return
        # What the request has found out stays as it is: it goes on meanwhile.
        scope = dict(lead.scope)
        context = copy.copy(request_context.ensure(scope))
        context.state, context.unique = dict(context.state), False
        scope[request_context.SCOPE_KEY] = context
        # By the time it runs the client may be gone, so the answer goes nowhere.
        background = Lead(self, lead.override, lead.asked, scope, _nowhere, flight=None)

        async def refresh() -> None:
            try:
                if await self.levels.lock(key, self.settings.wait_seconds):
                    try:
                        await background.run(_no_body())
                    finally:
                        await self.levels.unlock(key)
            except Exception:
                logger.exception("a stale answer could not be made again")
            finally:
                self._refreshing.pop(key, None)

        # In a context of its own: it outlives the request.
        self._refreshing[key] = asyncio.get_running_loop().create_task(refresh(), context=Context())

    def _revalidates(self, override: CacheResponse, kept: Kept) -> float:
        return self._stale(override.stale_while_revalidate_seconds, kept, "revalidate")

    def _forgives(self, override: CacheResponse, kept: Kept) -> float:
        return self._stale(override.stale_if_error_seconds, kept, "on_error")

    def _stale(self, route: float | None, kept: Kept, which: Literal["revalidate", "on_error"]) -> float:
        said = lifetime_of(kept.status, kept.headers, private=True)
        own: float | None = getattr(said, which, None)
        return self._window(route, own, which)

    def _window(self, route: float | None, own: float | None, which: Literal["revalidate", "on_error"]) -> float:
        """How long something stale is used: as the answer says, else the route, else the settings."""
        if own is not None:
            return own
        settings = self.settings
        default = settings.stale_while_revalidate_seconds if which == "revalidate" else settings.stale_if_error_seconds
        return default if route is None else route

    def entry_of(
        self, override: CacheResponse, said: Lifetime, kept: Kept, tags: Tags, made_at: float
    ) -> CacheEntry | None:
        """The entry of an answer; ``None`` where it would be stale at once."""
        ttl = said.fresh
        if kept.status in ABSENT:
            ttl = min(override.negative_ttl_seconds, override.negative_ttl_seconds if ttl is None else ttl)
        elif ttl is None:
            ttl = self.settings.ttl_seconds if override.ttl_seconds is None else override.ttl_seconds
        if ttl <= 0:
            return None
        fresh_until = made_at + ttl
        keep = max(
            self._window(override.stale_while_revalidate_seconds, said.revalidate, "revalidate"),
            self._window(override.stale_if_error_seconds, said.on_error, "on_error"),
        )
        entry = CacheEntry(kept.pack(), made_at, fresh_until, fresh_until + keep, tags)
        entry.form = kept
        return entry

    # --- what changes -------------------------------------------------------------------------------------------------

    async def _change(self, entry: RouteEntry, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a request that changes something: what was kept of its path is forgotten (RFC 9111, section 4.4)."""
        app = scope.get("app")
        path = scope["path"]
        if scope["method"] in _SAFE or app is None or not self._keeps_anything(table_of(app)):
            await self.app(scope, receive, send)
            return
        reading = table_of(app).find({**scope, "method": "GET"})
        if CacheResponse not in reading.overrides and CacheResponse not in entry.overrides:
            await self.app(scope, receive, send)
            return

        async def send_and_forget(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] < 400:  # noqa: PLR2004 - no error
                await self.levels.invalidate((f"value:{tag_of(path)}",))
            await send(message)

        await self.app(scope, receive, send_and_forget)

    def _keeps_anything(self, table: RouteTable) -> bool:
        if self._caching is None or self._caching[0] is not table:

            def look(changed: RouteTable) -> None:
                self._caching = (changed, any(CacheResponse in entry.overrides for entry in changed))

            table.on_rebuilt.append(look)
            look(table.built())
        return self._caching is not None and self._caching[1]

    def has(self, asked: Asked, kept: Kept) -> bool:
        """Whether the client has this answer already."""
        return bool(asked.conditions) and kept.status not in ABSENT and not_modified(asked.conditions, kept.headers)

    # --- for those who lead -------------------------------------------------------------------------------------------

    def landed(self, key: str, flight: "asyncio.Future[Outcome]", outcome: Outcome) -> None:
        """Tells those who wait what became of the answer that they wait for."""
        if self._flights.get(key) is flight:
            del self._flights[key]
        if not flight.done():
            flight.set_result(outcome)
        if outcome == "not kept":
            self._unkept.put(key, value=True, ttl_seconds=_UNKEPT_SECONDS)

    async def forgive(self, found: Found, asked: Asked, scope: Scope, send: Send) -> None:
        """Answers with what is stale, for the endpoint has failed; the next attempt waits a moment."""
        found[0].retry_at = self.now() + RETRY_SECONDS
        await self._answer(found, asked, scope, send, "error")

    def counted(self, outcome: str) -> None:
        """Counts what became of a request."""
        self._count[outcome]()


async def _nowhere(_message: Message) -> None:
    """Where an answer goes that is made for the cache alone."""


def _no_body() -> Receive:
    """The channel of a request without a body, whose client never goes away."""
    asked = False

    async def receive() -> Message:
        nonlocal asked
        if asked:
            await asyncio.Event().wait()
        asked = True
        return {"type": "http.request", "body": b"", "more_body": False}

    return receive
