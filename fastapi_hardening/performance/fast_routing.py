"""Hands the router only the routes that can match, so that routing takes as long with six hundred routes as with ten.

It protects from a cost that grows with the application: a router asks one route after the other, and FastAPI asks an
included one twice; the last of 600 included routes waits for two milliseconds. The route table knows in one or two
microseconds which few routes can match a path, so the router is given a list of these alone, in their declared order.
It is *not* a router: FastAPI's own code still decides among the candidates, answers 405, converts parameters and
handles. Whatever it does not answer from the short list goes to the whole router, as without this: an unknown path, a
redirect for a slash, a frontend.

It sits innermost, where the router is called, and leaves the router itself alone: ``app.routes``, ``url_for`` and the
OpenAPI document see every route.

Example:
    >>> from fastapi import FastAPI
    >>> from fastapi_hardening import Settings, harden
    >>> handle = harden(FastAPI(), Settings(routing={"fast": False}))  # every route is asked again
"""

import copy
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send

from fastapi_hardening.core import context as request_context
from fastapi_hardening.core.configuration import ConcernSettings
from fastapi_hardening.core.context import RequestContext
from fastapi_hardening.core.routes import RouteEntry, RouteTable

Moved = Callable[[RouteEntry, Scope, RequestContext], Awaitable[None]]

# As many sets of candidates as an application's routes make; those that a client's paths make up are not remembered.
_MOST_LISTS = 2_000


class RoutingSettings(ConcernSettings):
    """The settings of routing."""

    fast: bool = True
    """Whether the router is handed only the routes that can match."""


class FastRouting:
    """Calls a router with the candidates of the path, or as it is where there are none.

    It also looks the route up again where a middleware of the application has changed the path that is asked for: the
    answer is that of the other route, and so are the policies on it.

    Args:
        router: The router of an application.
        table: The table of its routes.
        settings: Whether it is fast.
        moved: Told of a request that a middleware has moved to another path, before it is routed there.
        owner: Whose it is, so that nobody puts a second one around.
    """

    def __init__(
        self,
        router: Any,
        table: RouteTable,
        settings: RoutingSettings | None = None,
        *,
        moved: Moved | None = None,
        owner: object = None,
    ) -> None:
        self.app: ASGIApp = router.middleware_stack
        settings = settings or RoutingSettings()
        # A router with middlewares of its own calls itself behind them, where no list could be handed to it.
        self._fast = settings.enabled and settings.fast and self.app == router.app
        self._router = router
        self._table = table
        self._moved = moved
        self.owner = owner
        self._short: dict[tuple[int, ...], ASGIApp] = {}
        table.on_rebuilt.append(lambda _table: self._short.clear())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Routes one connection."""
        context = request_context.of(scope)
        if context is not None and scope["path"] != context.path:
            entry = self._table.find(scope)
            if "app_root_path" not in scope:
                context.path, context.route = scope["path"], entry
            if self._moved is not None:
                await self._moved(entry, scope, context)
        if not self._fast or scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        candidates = self._table.candidates(scope)
        orders = tuple([candidate.order for candidate in candidates])
        short = self._short.get(orders)
        if short is None:
            short = self._shortened([candidate.route for candidate in candidates])
            if len(self._short) < _MOST_LISTS:
                self._short[orders] = short
        scope.setdefault("router", self._router)
        await short(scope, receive, send)

    def _shortened(self, wanted: Sequence[Any]) -> ASGIApp:
        """The router with these routes only, which hands on to the whole one what none of them matches."""
        router = self._router
        # An included route is known by what FastAPI makes of it for its include, another one by itself.
        identities = {id(getattr(route, "_route_context", None) or route.original_route) for route in wanted}
        routes = _only(router.routes, identities)
        if not routes:
            return self.app
        short = copy.copy(router)
        short.routes = routes
        short.redirect_slashes = False
        short.default = self.app
        # Frontends come after every route, also after those that are left out here.
        short._match_low_priority = _no_match  # noqa: SLF001
        app: ASGIApp = short.app
        return app


def _only(routes: Sequence[Any], wanted: set[int]) -> list[Any]:
    """The routes that are wanted; of an included router a copy that has only those."""
    found = []
    for route in routes:
        if id(route) in wanted:
            found.append(route)
        elif "_effective_candidates" in vars(route):
            inside = _only(route.effective_candidates(), wanted)
            if inside:
                included = copy.copy(route)
                # If routes are added to the router later, the copy finds out by itself, and takes all of them.
                included._effective_candidates = inside  # noqa: SLF001
                found.append(included)
    return found


def _no_match(_scope: Scope) -> tuple[Match, Scope, None, None]:
    return Match.NONE, {}, None, None
