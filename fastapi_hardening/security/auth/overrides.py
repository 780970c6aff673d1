"""What a route says about its callers: ``Public()``, ``RequireScopes("orders:write")``, ``user: CurrentUser``.

The layer finds them in the route table and enforces them before the body is read; where it has not seen the route,
they enforce themselves. All levels hold: what an application demands, none of its routes gives away. ``Public()``
cancels only the default of the settings, never a requirement. Where there is no layer at all nobody is known, and they
refuse.

Example:
    >>> from fastapi import FastAPI
    >>> from fastapi_hardening import CurrentUser, Public, RequireScopes
    >>> app = FastAPI()
    >>> @app.get("/", dependencies=[Public()])
    ... async def welcome() -> str:
    ...     return "welcome"
    >>> @app.post("/orders", dependencies=[RequireScopes("orders:write")])
    ... async def order(user: CurrentUser) -> str:
    ...     return user.id
"""

import inspect
import logging
import re
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, ClassVar, Literal

from fastapi import Depends
from starlette.requests import HTTPConnection

from fastapi_hardening.core import context as request_context
from fastapi_hardening.core.context import RequestContext
from fastapi_hardening.core.identity import Principal
from fastapi_hardening.core.policy import Guard, Override, overrides_of
from fastapi_hardening.core.problem import Problem, tell
from fastapi_hardening.core.routes import RouteEntry
from fastapi_hardening.security.auth.gate import Gate, gate_of, tenant_of
from fastapi_hardening.security.auth.problems import CrossSiteRefused
from fastapi_hardening.security.auth.rbac import checked_permission, roles_of

logger = logging.getLogger("fastapi_hardening.auth")

LAYER = "authentication"

# RFC 6749, section 3.3.
_SCOPE = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]+")

Question = Callable[[Principal, HTTPConnection], bool] | Callable[[Principal, HTTPConnection], Awaitable[bool]]
"""Asked whether this caller may do this, on this object. It may also raise a problem of its own."""


class Public(Override):
    """Anybody may call the route, although ``auth.default`` is ``required``. It cancels nothing else."""

    every_level_holds: ClassVar[bool] = True
    may_refuse: ClassVar[bool] = False

    async def act_late(self, connection: HTTPConnection) -> None:
        """Does nothing: where the layer has not seen it, the default holds."""


class Requirement(Override):
    """What a route demands of its callers; derive your own and write ``check``.

    In a signature it hands over the caller: ``user: Annotated[Principal, RequireScopes("orders:read")]``.
    """

    every_level_holds: ClassVar[bool] = True

    async def check(self, principal: Principal, connection: HTTPConnection, gate: Gate) -> None:
        """Raises a problem, such as ``gate.not_allowed(principal)``, where this caller does not meet the demand."""

    def waits(self, principal: Principal, context: RequestContext) -> bool:  # noqa: ARG002 - for those that do
        """Whether the demand cannot be judged before the request is routed."""
        return False

    async def after_routing(self, connection: HTTPConnection) -> Principal:  # type: ignore[override]
        """Checks where the layer has not, and hands over the caller."""
        await super().after_routing(connection)
        principal: Principal = request_context.ensure(connection.scope).principal
        return principal

    async def act_late(self, connection: HTTPConnection) -> None:
        """Checks by itself. Raises a problem to refuse."""
        context = request_context.ensure(connection.scope)
        gate = gate_of(context)
        try:
            if context.principal is None:
                raise gate.not_authenticated()
            await self.check(context.principal, connection, gate)
        except Problem as problem:
            tell(problem, context, LAYER)
            raise


class RequireUser(Requirement):
    """The caller must be known."""


class RequireScopes(Requirement):
    """The caller's credential must cover all of these scopes.

    Args:
        scopes: OAuth 2 scopes.

    Raises:
        ValueError: None is named, or one has a character that scopes cannot have (RFC 6749, section 3.3).
    """

    def __init__(self, *scopes: str) -> None:
        super().__init__()
        for scope in _some(scopes, "scope"):
            if not _SCOPE.fullmatch(scope):
                raise ValueError(f"{scope!r} is no scope (RFC 6749, section 3.3); give several as several arguments")
        self.scopes = scopes

    async def check(self, principal: Principal, connection: HTTPConnection, gate: Gate) -> None:
        """Refuses with the scopes that would do."""
        allowed = principal.has_scopes(*self.scopes)
        _log(allowed, connection, principal, "scopes", self.scopes)
        if not allowed:
            raise gate.not_allowed(principal, self.scopes)


class RequireRoles(Requirement):
    """The caller must have all of these roles, by itself or by inheritance; :meth:`any_of` takes one of them.

    Args:
        roles: The roles.

    Raises:
        ValueError: None is named.
    """

    def __init__(self, *roles: str) -> None:
        super().__init__()
        self.roles = _some(roles, "role")
        self.one_suffices = False

    @classmethod
    def any_of(cls, *roles: str) -> "RequireRoles":
        """One of these roles is enough."""
        requirement = cls(*roles)
        requirement.one_suffices = True
        return requirement

    def waits(self, principal: Principal, context: RequestContext) -> bool:
        """Roles of one tenant are judged when it is known which one it is about."""
        return bool(principal.tenant_roles) and context.tenant is None

    async def check(self, principal: Principal, connection: HTTPConnection, gate: Gate) -> None:
        """Refuses who does not have them in the tenant that the request is about."""
        tenant = tenant_of(request_context.ensure(connection.scope), principal)
        held = gate.rbac.effective(roles_of(principal, tenant))
        allowed = not held.isdisjoint(self.roles) if self.one_suffices else held.issuperset(self.roles)
        _log(allowed, connection, principal, "one of the roles" if self.one_suffices else "roles", self.roles)
        if not allowed:
            raise gate.not_allowed(principal)


class RequirePermissions(Requirement):
    """The caller must have all of these permissions, by its roles or by its credential.

    Args:
        permissions: Such as ``orders:refund``.

    Raises:
        ValueError: None is named, or one is a wildcard.
    """

    def __init__(self, *permissions: str) -> None:
        super().__init__()
        self.permissions = tuple(
            checked_permission(permission, wildcards=False) for permission in _some(permissions, "permission")
        )

    def waits(self, principal: Principal, context: RequestContext) -> bool:
        """Roles of one tenant are judged when it is known which one it is about."""
        return bool(principal.tenant_roles) and context.tenant is None

    async def check(self, principal: Principal, connection: HTTPConnection, gate: Gate) -> None:
        """Refuses who does not have them in the tenant that the request is about."""
        tenant = tenant_of(request_context.ensure(connection.scope), principal)
        held = await gate.permissions(principal, tenant)
        lacking = [permission for permission in self.permissions if not held.allow(permission)]
        _log(not lacking, connection, principal, "permissions", lacking or self.permissions)
        if lacking:
            raise gate.not_allowed(principal)


class Authorize(Requirement):
    """A function says whether this caller may do this with this object: the path's parameters are at hand.

    It is asked after routing. That somebody is known is demanded before, as of every route with a requirement.

    Args:
        question: Takes the principal and the connection and answers with ``True``, or raises a problem; sync or async.
            A sync one runs on the event loop, so it must not block.

    Example:
        >>> async def owns(user, connection):
        ...     return connection.path_params.get("user_id") == user.id
        >>> mine = Authorize(owns)
    """

    def __init__(self, question: Question) -> None:
        super().__init__()
        self.question = question

    def waits(self, principal: Principal, context: RequestContext) -> bool:  # noqa: ARG002
        """What is asked about is known after routing."""
        return True

    async def check(self, principal: Principal, connection: HTTPConnection, gate: Gate) -> None:
        """Asks the question. Only ``True`` lets the caller in."""
        answer: Any = self.question(principal, connection)
        if inspect.isawaitable(answer):
            answer = await answer
        _log(answer is True, connection, principal, "what is asked by", (getattr(self.question, "__name__", "?"),))
        if answer is not True:
            raise gate.not_allowed(principal)


class Csrf(Override):
    """Whether requests that a page of another site had a browser send are refused here; the innermost counts.

    By default they are where the browser's own credentials (a cookie, HTTP Basic) say who calls.

    Args:
        check: ``always`` also checks anonymous requests, as a login form needs it; ``never`` none, for a route that
            other sites call on purpose and that checks its callers itself.
    """

    def __init__(self, check: Literal["always", "never"]) -> None:
        super().__init__()
        if check not in ("always", "never"):
            raise ValueError(f"check is 'always' or 'never', not {check!r}")
        self.checks = check == "always"

    async def act_late(self, connection: HTTPConnection) -> None:
        """Checks where the layer has not; what the layer has refused is not let in any more."""
        if not self.checks:
            return
        context = request_context.ensure(connection.scope)
        try:
            refuse_cross_site(connection, context, gate_of(context))
        except Problem as problem:
            tell(problem, context, LAYER)
            raise


def refuse_cross_site(connection: HTTPConnection, context: RequestContext, gate: Gate) -> None:
    """Raises a problem for a request that another site had a browser send."""
    scope = connection.scope
    if scope["type"] == "websocket":
        allowed = gate.cross_site.allows_websocket(scope["headers"], secure=context.secure)
    else:
        allowed = gate.cross_site.allows(scope["method"], scope["headers"], secure=context.secure)
    if not allowed:
        raise CrossSiteRefused("The request comes from a page of another site.")


CurrentUser = Annotated[Principal, RequireUser()]
"""In a signature: the caller, who must be known."""


async def _whoever(connection: HTTPConnection) -> Principal | None:
    context = request_context.of(connection.scope)
    principal: Principal | None = None if context is None else context.principal
    return principal


OptionalUser = Annotated[Principal | None, Depends(_whoever)]
"""In a signature: the caller, or ``None`` for somebody unknown."""


# --- what holds on a route --------------------------------------------------------------------------------------------


def requirements_of(entry: RouteEntry) -> list[Requirement]:
    """Everything that a route demands of its callers."""
    return [
        requirement
        for kind, overrides in entry.overrides.items()
        if issubclass(kind, Requirement)
        for requirement in overrides
        if isinstance(requirement, Requirement)
    ]


def is_open(entry: RouteEntry, *, required: bool) -> bool:
    """Whether somebody unknown may call a route."""
    return not requirements_of(entry) and (not required or bool(entry.of(Public)))


def acts_itself(requirement: Override, entry: RouteEntry) -> bool:
    """Whether FastAPI will call this override before it runs the endpoint; not on what is mounted below it."""
    return any(requirement is each for each in overrides_of(entry.dependant).get(type(requirement), ()))


# --- guards -----------------------------------------------------------------------------------------------------------


def require_permissions(*permissions: str, gate: Gate | None = None) -> Guard:
    """A guard for a view above the layer, such as the metrics: it finds out by itself who calls.

    Args:
        permissions: What the caller must be permitted.
        gate: Who is asked; by default the gate of the hardened application.

    Raises:
        ValueError: None is named, or one is a wildcard.
    """
    requirement = RequirePermissions(*permissions)

    async def guard(connection: HTTPConnection) -> None:
        hardening = getattr(getattr(connection.scope.get("app"), "state", None), "hardening", None)
        asked: Gate = gate or getattr(hardening, "auth", None) or gate_of(None)
        found = await asked.identify(connection)
        if found is None:
            raise asked.not_authenticated()
        await requirement.check(found.principal, connection, asked)

    return guard


def _some(names: tuple[str, ...], what: str) -> tuple[str, ...]:
    if not all(names or ("",)):
        raise ValueError(f"name at least one {what}; for any known caller write RequireUser()")
    return names


def _log(allowed: bool, connection: HTTPConnection, principal: Principal, what: str, names: Any) -> None:  # noqa: FBT001
    if logger.isEnabledFor(logging.DEBUG):
        verdict = "is allowed" if allowed else "is not allowed"
        logger.debug("%s %s %r: %s %s", principal, verdict, connection.scope["path"], what, ", ".join(names))
