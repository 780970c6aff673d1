"""Finds the CORS middleware of a mounted application that a request is for, so that it can stand further out.

A mounted application with a middleware of its own answers for its own paths; but where it stands, a page could not read
what is refused before it. So a copy of it is made around everything that stands outside. This looks for it: which
application the router will choose, and whether that one, or one that it mounts, has one. It is *not* CORS: which
classes count it is told, and what they do it does not ask.

Example:
    >>> from starlette.applications import Starlette
    >>> from starlette.middleware.cors import CORSMiddleware
    >>> from fastapi_hardening.core.routes import table_of
    >>> app, shop = Starlette(), Starlette()
    >>> shop.add_middleware(CORSMiddleware, allow_origins=["https://shop.example"])
    >>> app.mount("/shop", shop)
    >>> mounted = MountedCors(app, table_of(app), (CORSMiddleware,))
    >>> scope = {"type": "http", "method": "GET", "path": "/shop/films", "headers": [], "app": app}
    >>> type(mounted.of(scope)).__name__, mounted.of({**scope, "path": "/films"})
    ('CORSMiddleware', None)
"""

import copy
from functools import cached_property
from typing import Any

from fastapi.routing import iter_route_contexts
from starlette.routing import Match, Mount
from starlette.types import ASGIApp, Scope

from fastapi_hardening.core.origins import Preflight
from fastapi_hardening.core.routes import RouteTable

_TAKEN_OFF = "_fastapi_hardening_cors"


def take_off(app: Any, entry: Any) -> None:
    """Takes a middleware off an application, which is still found where that application is mounted."""
    app.user_middleware.remove(entry)
    setattr(app, _TAKEN_OFF, [entry])


class MountedCors:
    """The CORS middlewares of mounted applications, looked for once, and again when routes change.

    Args:
        inner: What each of them is put around.
        table: The routes of the outer application.
        kinds: The classes that are CORS middlewares, and whose constructor or attribute ``app`` is what is inside.
    """

    def __init__(self, inner: ASGIApp, table: RouteTable, kinds: tuple[type, ...]) -> None:
        self._inner = inner
        self._kinds = kinds
        self._table = table.built()
        self._around: dict[int, tuple[Any, ASGIApp | None]] = {}
        table.on_rebuilt.append(self._forget)

    @cached_property
    def exist(self) -> bool:
        """Whether there is one at all; if not, as in most applications, nothing is matched."""
        mounted = [entry.endpoint for entry in self._table if entry.kind == "mount"]
        return any(self._own(app) is not None for app in (*self._table.applications[1:], *mounted))

    def of(self, scope: Scope) -> ASGIApp | None:
        """The one of the outermost mounted application that the router will choose and that has one.

        This matches the routes in order as the router does: it is asked only for requests that name an origin, where
        such an application is mounted.
        """
        app = scope["app"]
        preflight = scope["method"] == "OPTIONS" and Preflight.of(scope["headers"], b"")
        if preflight:
            scope = {**scope, "method": preflight.method.decode("latin-1")}
        while app is not None:
            routes = getattr(getattr(app, "router", app), "routes", None)
            app = None
            for route in iter_route_contexts(routes or ()):
                match, child_scope = route.matches(scope)
                if match is Match.FULL:
                    if isinstance(route.original_route, Mount):
                        scope, app = {**scope, **child_scope}, route.app
                    break
            own = None if app is None else self._own(app)
            if own is not None:
                return own
        return None

    def _own(self, app: Any) -> ASGIApp | None:
        known = self._around.get(id(app))
        if known is None:
            # The application is kept as well, or another one could get its id.
            known = self._around[id(app)] = (app, self._made(app))
        return known[1]

    def _made(self, app: Any) -> Any:
        if isinstance(app, self._kinds):
            own: Any = copy.copy(app)
            own.app = self._inner
            return own
        for entry in (*getattr(app, "user_middleware", ()), *getattr(app, _TAKEN_OFF, ())):
            if _is_any_of(entry.cls, self._kinds):
                return entry.cls(self._inner, *entry.args, **entry.kwargs)
        return None

    def _forget(self, _table: RouteTable) -> None:
        self._around.clear()
        vars(self).pop("exist", None)


def _is_any_of(kind: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(kind, type) and issubclass(kind, kinds)
