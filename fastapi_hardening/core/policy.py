"""How a route changes what a layer does there, and how a concern that needs a guard is given one.

An override is a dependency: ``dependencies=[RateLimit("5/minute")]`` on an application, a router, an include or a
route. The layer finds it in the route table before the request is routed. After routing FastAPI calls it like any
dependency; then it asks whether its layer has dealt with it, and if not (no such layer, a user middleware rewrote the
path, a custom router), it acts by itself. So a path that a layer misjudged never loses its policy.

Of several overrides of one class on a route the innermost counts, unless the class says that all hold.
"""

import secrets
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, ClassVar

from fastapi import params
from pydantic import SecretStr
from starlette.requests import HTTPConnection
from starlette.types import Scope

from fastapi_hardening.core import context as request_context
from fastapi_hardening.core.client_ip import parse_address
from fastapi_hardening.core.problem import Problem

Guard = Callable[[HTTPConnection], Awaitable[None]]


class Override(params.Depends):
    """A dependency that changes what a layer does on a route. Each concern derives its own.

    Attributes:
        every_level_holds: All overrides of this class on a route apply, outermost first; else only the innermost.
        may_refuse: It may refuse a request after routing, where its layer has not dealt with it; then nothing may
            answer in place of the endpoint.
    """

    every_level_holds: ClassVar[bool] = False
    may_refuse: ClassVar[bool] = True

    def __init__(self) -> None:
        # The bound method is what FastAPI calls and what the route table recognises.
        super().__init__(dependency=self.after_routing, use_cache=False)

    def __repr__(self) -> str:
        own = {name: value for name, value in vars(self).items() if name not in self.__dataclass_fields__}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in own.items())})"

    async def after_routing(self, connection: HTTPConnection) -> None:
        """Acts where the layer has not, if this override is one that counts on the route."""
        handled = getattr(request_context.of(connection.scope), "state", {}).get(type(self))
        if handled is not None and any(override is self for override in handled):
            return
        levels = overrides_of(dependant_of(connection.scope)).get(type(self), (self,))
        if type(self).every_level_holds or levels[-1] is self:
            await self.act_late(connection)

    async def act_late(self, connection: HTTPConnection) -> None:
        """What the override does by itself, after routing. Raises a :class:`Problem` to refuse."""
        raise NotImplementedError


Overrides = dict[type[Override], tuple[Override, ...]]


def overrides_of(dependant: Any) -> Overrides:
    """The overrides that a FastAPI dependant carries, by class, the outermost level first."""
    found: dict[type[Override], list[Override]] = {}
    for override in _walk(dependant):
        found.setdefault(type(override), []).append(override)
    return {kind: tuple(overrides) for kind, overrides in found.items()}


def overrides_in(dependencies: Sequence[params.Depends]) -> Overrides:
    """The overrides in a list of dependencies, as an application or a router declares it."""
    found: dict[type[Override], tuple[Override, ...]] = {}
    for dependency in dependencies:
        if isinstance(dependency, Override):
            kind = type(dependency)
            found[kind] = (*found.get(kind, ()), dependency)
    return found


def refusing(overrides: Overrides) -> Overrides:
    """Those that may refuse a request."""
    return {kind: each for kind, each in overrides.items() if kind.may_refuse}


def all_handled(overrides: Overrides, scope: Scope) -> bool:
    """Whether their layers have dealt with all of them, so that none is left to refuse after routing."""
    state = getattr(request_context.of(scope), "state", {})
    for kind, each in overrides.items():
        handled = state.get(kind, ())
        if not all(any(override is known for known in handled) for override in each):
            return False
    return True


def mark_handled(scope: Scope, overrides: tuple[Override, ...]) -> None:
    """Tells these overrides, all of one class, that their layer has dealt with them."""
    if overrides:
        request_context.ensure(scope).state[type(overrides[0])] = overrides


def _walk(dependant: Any) -> Iterator[Override]:
    if dependant is None:
        return
    for child in dependant.dependencies:
        owner = getattr(child.call, "__self__", None)
        if isinstance(owner, Override):
            yield owner
        yield from _walk(child)


def dependant_of(scope: Scope) -> Any:
    """The dependant of the endpoint that runs; for an included route that of the include, which has all levels."""
    included = scope.get("fastapi", {}).get("effective_route_context")
    for holder in (getattr(included, "starlette_route", None), included, scope.get("route")):
        dependant = getattr(holder, "dependant", None)
        if dependant is not None:
            return dependant
    return None


class GuardRefused(Problem):
    """The guard of a protected view did not let the caller in."""

    status = 403
    title = "Forbidden"


async def allow_everybody(_connection: HTTPConnection) -> None:
    """A guard that lets everybody in."""


async def allow_nobody(_connection: HTTPConnection) -> None:
    """A guard that lets nobody in."""
    raise GuardRefused


async def allow_private_peers(connection: HTTPConnection) -> None:
    """Lets in who calls directly from a private or loopback address, such as a scraper in the cluster.

    Anything that a proxy forwarded carries a forwarding header, and is refused, whatever it claims.
    """
    forwarded = (b"x-forwarded-for", b"forwarded", b"x-real-ip", b"via", b"x-forwarded-host")
    peer = connection.scope.get("client")
    ip = parse_address(peer[0]) if peer else None
    if ip is None or not ip.is_private or any(name in forwarded for name, _ in connection.scope["headers"]):
        raise GuardRefused


def either(first: Guard, second: Guard) -> Guard:
    """A guard that lets in whoever one of the two lets in; the second says why it does not."""

    async def guard(connection: HTTPConnection) -> None:
        try:
            await first(connection)
        except Problem:
            await second(connection)

    return guard


def require_token(token: SecretStr) -> Guard:
    """A guard that lets in who sends ``Authorization: Bearer`` with this token; the comparison takes constant time.

    Raises:
        ValueError: The token is shorter than 16 characters.
    """
    expected = token.get_secret_value().encode()
    if len(expected) < 16:  # noqa: PLR2004 - said in the sentence below
        raise ValueError("a token that guards a view needs at least 16 characters; `openssl rand -hex 16` makes one")

    async def guard(connection: HTTPConnection) -> None:
        scheme, _, sent = connection.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not secrets.compare_digest(sent.strip().encode(), expected):
            raise GuardRefused(status=401, headers={"WWW-Authenticate": "Bearer"})

    return guard
