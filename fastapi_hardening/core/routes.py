"""Which route a request will reach, known before it is routed, in constant time.

Layers act before the router does, so they need to know the route by themselves. Asking each route in turn, as the
router does, costs 190 us at 200 routes; this table costs about two, whatever the number. It is built from FastAPI's own
``iter_route_contexts``, so prefixes, includes and the dependencies of every level are FastAPI's, and it keeps the
order of declaration, because the router takes the first route that matches.

What it does not know gets the default policy, never an exemption: an opaque ASGI mount, a frontend, an unknown path. A
route with matching code of its own (``Host``, a custom class) is asked, at its place in the order.

The table notices changes where they happen: the route lists that it has read are replaced by lists that report a
change.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, SupportsIndex

from fastapi.routing import APIRoute, APIWebSocketRoute, RouteContext, iter_route_contexts
from starlette.routing import BaseRoute, Host, Match, Mount, Route, Router, WebSocketRoute
from starlette.types import Scope

from fastapi_hardening.core import context as request_context
from fastapi_hardening.core.policy import Override, Overrides, overrides_in, overrides_of

_TABLE = "_fastapi_hardening_routes"

# Convertors whose text never contains a slash, so that a segment of the path stands for them.
_ONE_SEGMENT = ("", "str", "int", "float", "uuid")

_KNOWN_MATCHING = {
    Route.matches: "http",
    APIRoute.matches: "http",
    WebSocketRoute.matches: "websocket",
    APIWebSocketRoute.matches: "websocket",
    Mount.matches: "mount",
}


@dataclass(frozen=True, slots=True, eq=False)
class RouteEntry:
    """One route as the layers see it.

    Attributes:
        template: The whole path template with every prefix and mount (``/api/items/{id}``); ``None`` where nothing
        matches.
        methods: The methods that the route takes; ``None`` for any.
        kind: ``http``, ``websocket``, ``mount`` (an application that is not looked into), ``other`` or ``unmatched``.
        overrides: The overrides that hold here, by class, the outermost level first.
        endpoint: The function or application that runs.
        dependant: FastAPI's description of the endpoint, for concerns that read its parameters.
        max_body_size: FastAPI's own limit of the body, of the route, its includes or its application, in bytes.
        applications: The applications that it is in, the outermost first.
        declared: The template as it was written, with the convertors of its parameters (``/files/{name:path}``).
    """

    template: str | None
    methods: frozenset[str] | None = None
    kind: str = "http"
    overrides: Overrides = field(default_factory=dict)
    endpoint: Any = None
    dependant: Any = None
    max_body_size: int | None = None
    applications: tuple[Any, ...] = ()
    declared: str | None = None

    def of(self, kind: type[Override]) -> tuple[Override, ...]:
        """The overrides of one class, the outermost level first."""
        return self.overrides.get(kind, ())


_Reached = tuple[RouteEntry | None, bool]


class RouteTable:
    """The routes of an application, of everything mounted under it, and the overrides on them.

    Args:
        app: A FastAPI or Starlette application, or a router.
    """

    def __init__(self, app: Any) -> None:
        self._app = app
        self._tree: _Level | None = None
        self._routes: list[BaseRoute] | None = None
        self.on_rebuilt: list[Callable[[RouteTable], None]] = []
        self.applications: list[Any] = []

    def find(self, scope: Scope) -> RouteEntry:
        """The entry of the route that the router will choose for this scope.

        As in the router, a path that matches with another method gives that route (it answers 405), and a path that
        only matches with or without its trailing slash gives the route that it is redirected to.
        """
        return self._current().find(scope, scope["path"], scope.get("root_path", ""))

    def candidates(self, scope: Scope) -> Sequence["Candidate"]:
        """The routes of the application itself that could match: all that do, in their order, and few others."""
        return self._current().candidates(route_path(scope["path"], scope.get("root_path", "")))

    def __iter__(self) -> Iterator[RouteEntry]:
        """Every entry, in the order of declaration, mounts looked into."""
        return self._current().entries()

    def built(self) -> "RouteTable":
        """The table itself, built now if it was not: mistakes show before the first request."""
        self._current()
        return self

    def invalidate(self) -> None:
        """Has the table built again before its next use."""
        self._tree = None

    def _current(self) -> "_Level":
        tree = self._tree
        # A list put in place of the one that was read cannot report itself; the comparison costs 30 ns.
        if tree is None or _router(self._app).routes is not self._routes:
            tree = self._build()
        return tree

    def _build(self) -> "_Level":
        self.applications = []
        tree = _Level(self, self._app, "", {})
        self._routes = _router(self._app).routes
        self._tree = tree
        for rebuilt in self.on_rebuilt:
            rebuilt(self)
        return tree


def table_of(app: Any) -> RouteTable:
    """The route table of an application, made at its first use and kept on the application."""
    table: RouteTable | None = vars(app).get(_TABLE)
    if table is None:
        table = RouteTable(app)
        setattr(app, _TABLE, table)
    return table


def route_of(scope: Scope) -> RouteEntry:
    """The route of this request, looked up once and kept on its context.

    The layer that asks first must do so before it calls its inner application: routing changes the scope.
    """
    context = scope.get(request_context.SCOPE_KEY) or request_context.ensure(scope)
    entry: RouteEntry | None = context.route
    if entry is None:
        app = scope.get("app")
        context.path = scope["path"]
        entry = context.route = _NO_ROUTER if app is None else table_of(app).find(scope)
    return entry


_NO_ROUTER = RouteEntry(None, kind="unmatched")


class Candidate:
    """A route at its place in the order, and whether a path reaches it.

    Attributes:
        order: Its place.
        route: FastAPI's ``RouteContext`` of it.
        entry: What the layers are told.
        regex: The pattern of its path, if it has one.
    """

    __slots__ = ("entry", "order", "regex", "route")

    def __init__(self, order: int, route: Any, entry: RouteEntry) -> None:
        self.order = order
        self.route = route
        self.entry = entry
        self.regex: Any = getattr(_effective(route), "path_regex", None)

    def admits(self, path: str) -> bool:
        """Whether the path has the form of the template."""
        return self.regex is None or self.regex.match(path) is not None

    def reach(self, scope: Scope, _full_path: str, _root_path: str, path: str, *, exact: bool) -> _Reached:
        """The entry that is reached, and whether it is reached by method too; ``exact`` says that the path fits."""
        entry = self.entry
        if entry.kind != scope["type"] or not (exact or self.regex.match(path)):
            return None, False
        return entry, entry.methods is None or scope.get("method") in entry.methods


class _Mounted(Candidate):
    """A mount; what is mounted has routes of its own, or is taken as it is."""

    __slots__ = ("inside",)

    def __init__(self, order: int, route: Any, entry: RouteEntry, inside: "_Level | None") -> None:
        super().__init__(order, route, entry)
        self.inside = inside

    def reach(self, scope: Scope, full_path: str, root_path: str, path: str, *, exact: bool) -> _Reached:  # noqa: ARG002
        matched = self.regex.match(path)
        if matched is None:
            return None, False
        if self.inside is None:
            return self.entry, True
        consumed = path[: len(path) - len("/" + matched.group("path"))]
        return self.inside.find(scope, full_path, self.inside.root_path or root_path + consumed), True


class _Foreign(Candidate):
    """A route with matching code of its own, which is asked; behind a ``Host`` there may be routes to look into."""

    __slots__ = ("inside",)

    def __init__(self, order: int, route: Any, entry: RouteEntry, inside: "_Level | None") -> None:
        super().__init__(order, route, entry)
        self.inside = inside

    def reach(self, scope: Scope, full_path: str, root_path: str, _path: str, *, exact: bool) -> _Reached:  # noqa: ARG002
        match, _ = self.route.matches(scope)
        if match is Match.FULL and self.inside is not None:
            return self.inside.find(scope, full_path, self.inside.root_path or root_path), True
        return (None if match is Match.NONE else self.entry), match is Match.FULL


# Where a pattern alone does not say whether the route matches.
_Unfiltered = (_Mounted, _Foreign)


class _Node:
    """One segment of the paths below a level: what follows by its text, by any text, and what swallows the rest."""

    __slots__ = ("anything", "ends", "segments", "tails")

    def __init__(self) -> None:
        self.segments: dict[str, _Node] = {}
        self.anything: _Node | None = None
        self.ends: list[Candidate] = []
        self.tails: list[Candidate] = []


class _Level:
    """The routes of one application or router of the tree; mounts have levels of their own."""

    def __init__(
        self, table: RouteTable, app: Any, prefix: str, inherited: Overrides, around: tuple[Any, ...] = ()
    ) -> None:
        router = _router(app)
        self._prefix = prefix
        self.root_path: str = getattr(app, "root_path", "") or ""
        self._redirects: bool = getattr(router, "redirect_slashes", False)
        self._root = _Node()
        self._exact: dict[str, list[Candidate]] = {}
        self._all: list[Candidate] = []
        self._everywhere = _merge(inherited, overrides_in(getattr(router, "dependencies", ())))
        self._applications = around
        if hasattr(app, "exception_handlers"):
            table.applications.append(app)
            self._applications = (*around, app)
        self._default = RouteEntry(None, kind="unmatched", overrides=self._everywhere, applications=self._applications)
        _watch(router, table)
        levels: dict[int, list[Overrides]] = {}
        _levels_above(router.routes, {}, levels)
        for route_context in iter_route_contexts(router.routes):
            above = levels.get(id(route_context.original_route)) or [{}]
            self._add(table, route_context, above.pop(0))
        for candidate in self._all:
            path = candidate.entry.template
            if candidate.entry.kind in ("http", "websocket") and path is not None and "{" not in path:
                path = path[len(prefix) :]
                self._exact[path] = [c for c in self._walk(path) if isinstance(c, _Unfiltered) or c.admits(path)]

    def entries(self) -> Iterator[RouteEntry]:
        for candidate in self._all:
            if isinstance(candidate, _Unfiltered) and candidate.inside is not None:
                yield from candidate.inside.entries()
            else:
                yield candidate.entry

    def find(self, scope: Scope, full_path: str, root_path: str) -> RouteEntry:
        path = route_path(full_path, root_path)
        found = self._match(scope, full_path, root_path, path)
        if found is None and self._redirects and path != "/" and scope["type"] == "http":
            other = full_path.rstrip("/") if path.endswith("/") else full_path + "/"
            found = self._match(scope, other, root_path, route_path(other, root_path))
        return found or self._default

    def _match(self, scope: Scope, full_path: str, root_path: str, path: str) -> RouteEntry | None:
        known = self._exact.get(path)
        partial: RouteEntry | None = None
        for candidate in self._walk(path) if known is None else known:
            entry, full = candidate.reach(scope, full_path, root_path, path, exact=known is not None)
            if full:
                return entry
            partial = partial or entry
        return partial

    def candidates(self, path: str) -> list[Candidate]:
        """Every route that could match a path, in the order of declaration, and few others."""
        known = self._exact.get(path)
        return self._walk(path) if known is None else known

    def _walk(self, path: str) -> list[Candidate]:
        """The candidates for a path, in the order of declaration: every route that could match, and few others."""
        if "\n" in path:
            # The router's patterns end in ``$``, which also matches before a final line break.
            return self._all
        found: list[Candidate] = []
        nodes = [self._root]
        for segment in path.split("/")[1:]:
            following: list[_Node] = []
            for node in nodes:
                if node.tails:
                    found += node.tails
                child = node.segments.get(segment)
                if child is not None:
                    following.append(child)
                if node.anything is not None:
                    following.append(node.anything)
            nodes = following
            if not nodes:
                break
        for node in nodes:
            found += node.ends
            found += node.tails
        if len(found) > 1:
            found.sort(key=_by_order)
        return found

    def _add(self, table: RouteTable, route: RouteContext, above: Overrides) -> None:
        everywhere = _merge(self._everywhere, above)
        # A route context answers for the route as it is effective here, with the prefixes and levels of its includes.
        kind = _KNOWN_MATCHING.get(type(route.original_route).matches, "other")
        effective = _effective(route)
        app = getattr(effective, "app", None)
        dependant = getattr(effective, "dependant", None)
        path = None if isinstance(route.original_route, Host) else effective.path
        template = effective.path_format if kind in ("http", "websocket") else path
        entry = RouteEntry(
            template=None if template is None else self._prefix + template,
            methods=frozenset(methods) if (methods := getattr(effective, "methods", None)) else None,
            kind=kind,
            overrides=everywhere if dependant is None else _merge(self._everywhere, overrides_of(dependant)),
            endpoint=getattr(effective, "endpoint", None) or app,
            dependant=dependant,
            max_body_size=getattr(effective, "max_body_size", None),
            applications=self._applications,
            declared=None if path is None else self._prefix + path,
        )
        order = len(self._all)
        inside = None
        if isinstance(route.original_route, (Mount, Host)) and isinstance(_router(app), Router):
            inside = _Level(table, app, self._prefix + (path or ""), everywhere, self._applications)
        if kind == "mount":
            candidate: Candidate = _Mounted(order, route, entry, inside)
        elif kind == "other":
            candidate = _Foreign(order, route, entry, inside)
        else:
            candidate = Candidate(order, route, entry)
        self._all.append(candidate)
        self._place(candidate, path)

    def _place(self, candidate: Candidate, path: str | None) -> None:
        node = self._root
        if isinstance(candidate, _Foreign) or path is None:
            node.tails.append(candidate)
            return
        for segment in path.split("/")[1:]:
            if "{" not in segment:
                node = node.segments.setdefault(segment, _Node())
            elif _one_segment(segment):
                node.anything = node.anything or _Node()
                node = node.anything
            else:
                node.tails.append(candidate)
                return
        (node.tails if isinstance(candidate, _Mounted) else node.ends).append(candidate)


class _ReportingList(list[BaseRoute]):
    """A list of routes that tells its tables when it changes."""

    def __init__(self, routes: Iterable[BaseRoute]) -> None:
        super().__init__(routes)
        self.tables: list[RouteTable] = []

    def _report(self) -> None:
        for table in self.tables:
            table.invalidate()

    def append(self, route: BaseRoute) -> None:
        super().append(route)
        self._report()

    def extend(self, routes: Iterable[BaseRoute]) -> None:
        super().extend(routes)
        self._report()

    def insert(self, index: SupportsIndex, route: BaseRoute) -> None:
        super().insert(index, route)
        self._report()

    def remove(self, route: BaseRoute) -> None:
        super().remove(route)
        self._report()

    def pop(self, index: SupportsIndex = -1) -> BaseRoute:
        route = super().pop(index)
        self._report()
        return route

    def clear(self) -> None:
        super().clear()
        self._report()

    def reverse(self) -> None:
        super().reverse()
        self._report()

    def sort(self, **arguments: Any) -> None:
        super().sort(**arguments)
        self._report()

    def __setitem__(self, index: Any, routes: Any) -> None:
        super().__setitem__(index, routes)
        self._report()

    def __delitem__(self, index: SupportsIndex | slice) -> None:
        super().__delitem__(index)
        self._report()

    def __iadd__(self, routes: Iterable[BaseRoute]) -> Self:  # type: ignore[override,misc]
        self.extend(routes)
        return self


def _watch(router: Any, table: RouteTable) -> None:
    """Has the table told of every later change to the routes of a router and of the routers included in it."""
    routes = router.routes
    if not isinstance(routes, _ReportingList):
        routes = _ReportingList(routes)
        router.routes = routes
    if not any(known is table for known in routes.tables):
        routes.tables.append(table)
    for route in routes:
        # FastAPI keeps an included router as a live node; older versions copied its routes.
        included = getattr(route, "original_router", None)
        if included is not None:
            _watch(included, table)


def _levels_above(routes: Iterable[BaseRoute], above: Overrides, found: dict[int, list[Overrides]]) -> None:
    """The overrides of the includes and routers around each route, by its identity, in the order of its inclusions.

    FastAPI puts them on the routes that it knows; mounts and routes of Starlette in a router have no dependencies.
    """
    for route in routes:
        included = getattr(route, "original_router", None)
        if included is None:
            found.setdefault(id(route), []).append(above)
        else:
            include: Any = getattr(route, "include_context", None)
            levels = [*getattr(include, "dependencies", ()), *included.dependencies]
            _levels_above(included.routes, _merge(above, overrides_in(levels)), found)


def _effective(route: Any) -> Any:
    """A route as it is below its includes; of Starlette's own ones the first versions of FastAPI do not say it."""
    return getattr(getattr(route, "_route_context", None), "starlette_route", None) or route


def _router(app: Any) -> Any:
    return getattr(app, "router", app)


def route_path(path: str, root_path: str) -> str:
    """The part of the path that routes are matched against; the same rule as Starlette's."""
    if root_path and path.startswith(root_path):
        rest = path[len(root_path) :]
        if not rest or rest[0] == "/":
            return rest
    return path


def _one_segment(segment: str) -> bool:
    """Whether this segment of a template always stands for exactly one segment of a path."""
    return all(part.partition("}")[0].partition(":")[2] in _ONE_SEGMENT for part in segment.split("{")[1:])


def _merge(outer: Overrides, inner: Overrides) -> Overrides:
    """Both, the outer level first; what an application declares for itself is on its routes already."""
    merged = dict(outer)
    for kind, overrides in inner.items():
        known = merged.get(kind, ())
        merged[kind] = (*known, *overrides[_overlap(known, overrides) :])
    return merged


def _overlap(outer: Sequence[Override], inner: Sequence[Override]) -> int:
    """With how many of the last of ``outer`` the ``inner`` begins."""
    for number in range(min(len(outer), len(inner)), 0, -1):
        if all(a is b for a, b in zip(outer[-number:], inner, strict=False)):
            return number
    return 0


def _by_order(candidate: Candidate) -> int:
    return candidate.order
