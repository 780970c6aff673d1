"""The layer that finds the tenant of every request, and refuses who does not belong there.

Example:
    >>> from fastapi import FastAPI
    >>> from fastapi_hardening.api.tenancy import CurrentTenant, TenancyMiddleware, TenancySettings
    >>> app = FastAPI()
    >>> settings = TenancySettings(sources=("subdomain",), domains=("shop.example",))
    >>> app.add_middleware(TenancyMiddleware, settings=settings)
    >>> @app.get("/orders")
    ... async def orders(tenant: CurrentTenant) -> str:
    ...     return tenant.id
"""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_hardening.api.tenancy.current import current
from fastapi_hardening.api.tenancy.engine import FindTenant, Tenancy, Tenant
from fastapi_hardening.api.tenancy.overrides import LAYER, RequireTenant
from fastapi_hardening.api.tenancy.problems import CrossTenantRefused, TenantRequired
from fastapi_hardening.api.tenancy.reader import Reader
from fastapi_hardening.api.tenancy.settings import TenancySettings
from fastapi_hardening.core import context as request_context
from fastapi_hardening.core.clock import Clock
from fastapi_hardening.core.context import RequestContext
from fastapi_hardening.core.policy import mark_handled
from fastapi_hardening.core.problem import Problem, refuse, tell
from fastapi_hardening.core.routes import RouteEntry, RouteTable, route_of

_STARTS = frozenset({"http.response.start", "websocket.accept", "websocket.http.response.start"})


class TenancyMiddleware:
    """Finds the tenant of every request, and refuses who does not belong there.

    Args:
        app: The application inside.
        settings: Where tenants are named and who may ask for them.
        tenancy: The engine, made already; then settings are left out.
        find: Gives the tenant of a name.
        clock: Where the time comes from.
        table: The routes to look in, where they are not those of the outermost application.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: TenancySettings | None = None,
        *,
        tenancy: Tenancy | None = None,
        find: FindTenant | None = None,
        clock: Clock | None = None,
        table: RouteTable | None = None,
    ) -> None:
        self.app = app
        self._table = table
        self._tenancy = tenancy or Tenancy(settings, find, clock=clock)
        self._reader = Reader(self._tenancy.settings)
        by_header = "header" in self._tenancy.settings.sources
        self._varies = self._tenancy.settings.header.encode("ascii") if by_header else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        context = request_context.ensure(scope)
        context.state[TenancyMiddleware] = self
        if self._varies is not None:
            send = _varying(send, self._varies)
        entry = route_of(scope) if self._table is None else self._table.find(scope)
        try:
            tenant = await self.admit(entry, scope, context)
        except Problem as problem:
            await refuse(problem, scope, receive, send, layer=LAYER)
            return
        if tenant is not None and self._tenancy.count is not None:
            self._tenancy.count(tenant)
        token = current.set(tenant)
        try:
            await self.app(scope, receive, send)
        finally:
            current.reset(token)

    async def admit(self, entry: RouteEntry, scope: Scope, context: RequestContext) -> Tenant | None:
        """The tenant of a request to this route, left on the context as well.

        Raises:
            Problem: The caller does not belong there, or names no tenant where one is needed.
        """
        tenant = await self._tenancy.decide(self._reader.asked(scope, entry), context.principal)
        before: Tenant | None = context.state.get(Tenant)
        if before is not None:
            # Decided for another path, or by a layer around: no later name leads out of it.
            if tenant is not None and tenant.id != before.id:
                raise CrossTenantRefused("The tenant that the request names is not yours.")
            tenant = before
        overrides = entry.of(RequireTenant)
        innermost = overrides[-1] if overrides else None
        needed = innermost.needed if isinstance(innermost, RequireTenant) else self._tenancy.settings.required
        if tenant is None and needed:
            raise TenantRequired("The request does not say which tenant it is about.")
        if tenant is not None:
            context.tenant = tenant.id
            context.state[Tenant] = tenant
        mark_handled(scope, overrides)
        return tenant


def _varying(send: Send, name: bytes) -> Send:
    """Tells caches that an answer, or a refusal, is for one value of the header field only (RFC 9110, 12.5.5)."""

    async def send_with_vary(message: Message) -> None:
        if message["type"] in _STARTS:
            message["headers"] = [*(message.get("headers") or ()), (b"vary", name)]
        await send(message)

    return send_with_vary


async def admit_again(entry: RouteEntry, scope: Scope, context: RequestContext) -> None:
    """Decides anew about a request that was moved to another path, by the layer that it has passed.

    Raises:
        Problem: The caller does not belong there; it has been told.
    """
    layer: TenancyMiddleware | None = context.state.get(TenancyMiddleware)
    if layer is None:
        return
    try:
        # The layer takes it back when it is done.
        current.set(await layer.admit(entry, scope, context))
    except Problem as problem:
        tell(problem, context, LAYER)
        raise
