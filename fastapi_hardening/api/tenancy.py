"""Finds out whose data a request is about, and keeps every caller inside the tenant that is theirs.

It protects from the worst mistake of a shared service: the customer who writes another one's name into a header, a host
or a path, and gets that one's data. Names come from sources that the settings name; all that speak must agree, and who
calls must belong to the tenant that is asked for. It is *not* row-level security: a query that forgets its tenant reads
everybody's rows. :func:`current_tenant` is for the place where queries are made, so that none can forget.

It sits behind authentication, because who calls decides, and before limits, idempotency and caches, which count and
keep by tenant. It holds on every path alike: on mounts, websockets, and where no route matches.

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

import inspect
import logging
import re
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Self

from fastapi import Depends
from prometheus_client import CollectorRegistry, Counter
from pydantic import Field, field_validator, model_validator
from starlette.concurrency import run_in_threadpool
from starlette.requests import HTTPConnection
from starlette.routing import compile_path
from starlette.types import ASGIApp, Receive, Scope, Send

from fastapi_hardening.core import context as request_context
from fastapi_hardening.core import headers as header_fields
from fastapi_hardening.core.client_ip import ClientAddressResolver, parse_network, peer_of
from fastapi_hardening.core.clock import Clock, SystemClock
from fastapi_hardening.core.configuration import ConcernSettings, from_json
from fastapi_hardening.core.context import RequestContext
from fastapi_hardening.core.policy import Override, mark_handled
from fastapi_hardening.core.problem import OWN, Problem, refuse, retry_after, tell
from fastapi_hardening.core.request_head import checked_host, host_name
from fastapi_hardening.core.routes import RouteEntry, RouteTable, route_of, route_path
from fastapi_hardening.core.store import StoreUnavailable

if TYPE_CHECKING:
    from fastapi_hardening.core.identity import Principal

logger = logging.getLogger("fastapi_hardening.tenancy")

LAYER = "tenancy"
OTHER = "other"

# What a client may write as a name: it goes into keys, logs and queries.
_NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z._:|@-]{0,127}")
_MOST_UNKNOWN = 1_000

Source = Literal["identity", "subdomain", "header", "path"]


class TenancySettings(ConcernSettings):
    """The settings of tenancy."""

    enabled: bool = False
    """Whether requests belong to tenants; on by itself when another key is set."""

    sources: tuple[Source, ...] = ("identity",)
    """Where the tenant is named: ``subdomain``, ``header``, ``path``, which must agree where several speak, and
    ``identity`` where none of them does."""

    header: str = "X-Tenant"
    """The header field of the source ``header``."""

    trusted_callers: tuple[str, ...] = ()
    """Addresses and networks of your own gateways: the header is believed of them also where nobody is known."""

    domains: tuple[str, ...] = ()
    """The hosts above the tenants' own: with ``shop.example``, ``acme.shop.example`` is about ``acme``."""

    reserved_subdomains: tuple[str, ...] = ("www",)
    """Names below these hosts that are no tenants."""

    path_parameter: str = "tenant"
    """The parameter of the route of the source ``path``, as in ``/t/{tenant}/orders``."""

    default: str | None = None
    """The tenant of requests that name none."""

    required: bool = True
    """Whether a request without a tenant is refused where the route says nothing else."""

    unknown: Literal["not-found", "forbidden"] = "not-found"
    """What is answered for a tenant that does not exist or is not active: 404 or 403."""

    callers_without_tenant: Literal["refuse", "allow"] = "refuse"
    """Whether somebody known, whose identity names no tenant, may ask for any; then the application must check."""

    cross_tenant_roles: tuple[str, ...] = ()
    """Whoever has one of these roles may ask for any tenant; for your own staff."""

    ttl_seconds: float = Field(60.0, ge=0, le=86_400)
    """How long what the resolver said is remembered; so long a tenant that was closed may still be served."""

    max_remembered: int = Field(10_000, ge=1)
    """How many tenants are remembered at once."""

    max_measured: int = Field(0, ge=0, le=10_000)
    """For how many tenants requests are counted in the metrics, the others together; 0 for none."""

    @model_validator(mode="before")
    @classmethod
    def _on_when_set(cls, values: Any) -> Any:
        # Who has named the sources and sees no refusal would believe that he is protected.
        values = from_json(values) if isinstance(values, str) else values
        return {"enabled": True, **values} if isinstance(values, Mapping) and values else values

    @field_validator("header")
    @classmethod
    def _is_a_header(cls, header: str) -> str:
        header_fields.field(header, "x")
        return header

    @field_validator("trusted_callers")
    @classmethod
    def _are_networks(cls, entries: tuple[str, ...]) -> tuple[str, ...]:
        for entry in entries:
            parse_network(entry)
        return entries

    @field_validator("domains")
    @classmethod
    def _are_hosts(cls, entries: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(checked_host(entry) for entry in entries)

    @model_validator(mode="after")
    def _can_name_somebody(self) -> Self:
        if ("subdomain" in self.sources) != bool(self.domains):
            raise ValueError("the source 'subdomain' and domains belong together: domains=('shop.example',)")
        if any("*" in domain for domain in self.domains):
            raise ValueError("domains are the hosts above the tenants, without '*': 'shop.example'")
        if not self.sources and self.default is None:
            raise ValueError("without sources no request names a tenant; name one, or a default")
        return self


# --- problems ---------------------------------------------------------------------------------------------------------


class TenantRequired(Problem):
    """The request names no tenant, and the route needs one."""

    status = 400
    type = OWN + "tenant-required"
    title = "Tenant required"


class TenantAmbiguous(Problem):
    """The request names several tenants."""

    status = 400
    type = OWN + "tenant-ambiguous"
    title = "Tenant ambiguous"


class TenantUnknown(Problem):
    """There is no such tenant, or it is not active; which of both is not told."""

    status = 404
    type = OWN + "tenant-unknown"
    title = "Tenant unknown"


class CrossTenantRefused(Problem):
    """The caller asks for a tenant that is not theirs, whether there is one of that name or not."""

    status = 403
    type = OWN + "cross-tenant-request"
    title = "Cross-tenant request"


class TenantUnavailable(Problem):
    """Whether there is such a tenant cannot be found out now."""

    status = 503
    type = OWN + "tenant-unavailable"
    title = "Tenant unavailable"


# --- engine -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tenant:
    """Somebody whose data is kept apart: a customer, an organisation.

    Attributes:
        id: Its name as everything further in knows it; a resolver may find ``t_17`` for ``acme``.
        plan: What it pays for, for limits by plan.
        active: It is served.
    """

    id: str
    plan: str | None = None
    active: bool = True


FindTenant = Callable[[str], Tenant | None] | Callable[[str], Awaitable[Tenant | None]]
"""Gives the tenant of a name, ``None`` for no such tenant. A sync one runs in a thread."""


class Asked(NamedTuple):
    """What a request says about its tenant.

    Attributes:
        names: The names that its host, header fields and path give.
        believed: They may be believed of a caller who is not known.
        trusted: They come from a gateway of one's own.
    """

    names: frozenset[str] = frozenset()
    believed: bool = True
    trusted: bool = False


class Tenancy:
    """Decides which tenant a request is about, and whether its caller belongs there.

    Args:
        settings: Where tenants are named and who may ask for them.
        find: Gives the tenant of a name; without it every well-formed name is one.
        clock: Where the time comes from.

    Attributes:
        count: Told of the tenant of every request that is let in.

    Example:
        >>> import asyncio
        >>> tenancy = Tenancy(TenancySettings(sources=("path",)))
        >>> asyncio.run(tenancy.decide(Asked(frozenset({"acme"})), None))
        Tenant(id='acme', plan=None, active=True)
    """

    def __init__(
        self, settings: TenancySettings | None = None, find: FindTenant | None = None, *, clock: Clock | None = None
    ) -> None:
        self.settings = settings or TenancySettings()
        self._find: Any = find
        self.count: Callable[[Tenant], None] | None = None
        self._now = (clock or SystemClock()).monotonic
        # Apart, so that a flood of made-up names drives no real one out.
        self._known: dict[str, tuple[Tenant | None, float]] = {}
        self._unknown: dict[str, tuple[Tenant | None, float]] = {}

    async def decide(self, asked: Asked, principal: "Principal | None") -> Tenant | None:
        """The tenant of a request; ``None`` where nothing names one.

        Raises:
            CrossTenantRefused: It is not the caller's.
            TenantAmbiguous: The names differ.
            TenantUnknown: There is none of that name, or it is not active.
            TenantUnavailable: The resolver cannot be asked.
        """
        names: Collection[str] = asked.names
        own = None if principal is None else principal.tenant
        if not names and own is not None and "identity" in self.settings.sources:
            names = (own,)
        elif not names and self.settings.default is not None:
            names, asked = (self.settings.default,), Asked(trusted=True)
        if not names:
            return None
        if principal is None and not asked.believed:
            raise CrossTenantRefused("The tenant that the request names is not believed of somebody unknown.")
        found = {name: await self.find(name) for name in names}
        if principal is not None and not await self._belongs(principal, found, trusted=asked.trusted):
            raise CrossTenantRefused("The tenant that the request names is not yours.")
        tenant, *others = found.values()
        if any((other and other.id) != (tenant and tenant.id) for other in others):
            raise TenantAmbiguous("The request names several tenants.")
        if tenant is None or not tenant.active:
            status = 404 if self.settings.unknown == "not-found" else 403
            raise TenantUnknown("There is no such tenant, or it is not active.", status=status)
        return tenant

    async def find(self, name: str) -> Tenant | None:
        """The tenant of a name, from memory or from the resolver; ``None`` for no such tenant.

        Raises:
            TenantUnavailable: The resolver cannot be asked.
        """
        if self._find is None:
            return Tenant(name) if _NAME.fullmatch(name) else None
        now = self._now()
        remembered = self._known.get(name) or self._unknown.get(name)
        if remembered is not None and remembered[1] > now:
            return remembered[0]
        try:
            is_async = inspect.iscoroutinefunction(self._find)
            tenant = self._find(name) if is_async else await run_in_threadpool(self._find, name)
            tenant = await tenant if inspect.isawaitable(tenant) else tenant
        except (StoreUnavailable, TimeoutError, ConnectionError) as down:
            logger.exception("what tenants are looked up in does not answer")
            raise TenantUnavailable("The tenant cannot be looked up at the moment.", headers=retry_after(5.0)) from down
        self.forget(name)
        memory, most = (self._unknown, _MOST_UNKNOWN) if tenant is None else (self._known, self.settings.max_remembered)
        if len(memory) >= most:
            del memory[next(iter(memory))]
        memory[name] = (tenant, now + self.settings.ttl_seconds)
        return tenant  # type: ignore[no-any-return]

    def forget(self, name: str) -> None:
        """Has the resolver asked again for a name, such as after a tenant was closed; in this process."""
        self._known.pop(name, None)
        self._unknown.pop(name, None)

    async def _belongs(self, principal: "Principal", found: Mapping[str, Tenant | None], *, trusted: bool) -> bool:
        """Whether all of these are tenants that the caller may ask for."""
        if not principal.roles.isdisjoint(self.settings.cross_tenant_roles):
            return True
        if principal.tenant is not None:
            own = await self.find(principal.tenant)
            # Of the caller's own name it is told that it is not found any more, of no other.
            return all(
                name == principal.tenant or (tenant is not None and own is not None and tenant.id == own.id)
                for name, tenant in found.items()
            )
        if principal.tenant_roles:
            return all(tenant is not None and tenant.id in principal.tenant_roles for tenant in found.values())
        return trusted or self.settings.callers_without_tenant == "allow"


_current: ContextVar[Tenant | None] = ContextVar("fastapi_hardening.tenant", default=None)


def current_tenant() -> Tenant | None:
    """The tenant that this task or thread works for: that of the request, or of :func:`as_tenant`."""
    return _current.get()


@contextmanager
def as_tenant(tenant: Tenant | str) -> Iterator[Tenant]:
    """Works for a tenant where there is no request: in a job, a script, a test."""
    tenant = Tenant(tenant) if isinstance(tenant, str) else tenant
    token = _current.set(tenant)
    try:
        yield tenant
    finally:
        _current.reset(token)


def measure(registry: CollectorRegistry, most: int) -> Callable[[Tenant], None]:
    """Counts requests in ``hardening_tenant_requests_total``: by tenant for the first ``most``, else as ``other``."""
    counter = Counter(
        "hardening_tenant_requests", "Requests by tenant, refusals further in as well.", ("tenant",), registry=registry
    )
    known: set[str] = set()

    def count(tenant: Tenant) -> None:
        if tenant.id not in known and len(known) < most:
            known.add(tenant.id)
        counter.labels(tenant.id if tenant.id in known else OTHER).inc()

    return count


# --- layer ------------------------------------------------------------------------------------------------------------


class _Reader:
    """Reads what a request says about its tenant."""

    def __init__(self, settings: TenancySettings) -> None:
        self._header = settings.header.lower().encode("ascii") if "header" in settings.sources else None
        self._endings = tuple(f".{domain}" for domain in settings.domains)
        self._reserved = frozenset(settings.reserved_subdomains)
        self._parameter = settings.path_parameter if "path" in settings.sources else None
        self._gateways = ClientAddressResolver(settings.trusted_callers) if settings.trusted_callers else None
        self._patterns: dict[str, tuple[re.Pattern[str], Any] | None] = {}

    def asked(self, scope: Scope, entry: RouteEntry) -> Asked:
        """What the request to this route says."""
        names: list[str] = []
        believed = True
        trusted = False
        if self._endings:
            names += self._of_hosts(header_fields.get_all(scope["headers"], b"host"))
        if self._parameter is not None:
            names += self._of_path(scope, entry)
        if self._header is not None:
            values = header_fields.get_all(scope["headers"], self._header)
            if values:
                peer = peer_of(scope.get("client"), scope.get("server"))
                believed = trusted = self._gateways is not None and self._gateways.trusts(peer)
                names += [value.decode("latin-1").strip() for value in values]
        # What cannot be a name is none, and is told like any other that there is not.
        return Asked(frozenset([name if _NAME.fullmatch(name) else "" for name in names]), believed, trusted)

    def _of_hosts(self, values: list[bytes]) -> Iterator[str]:
        for value in values:
            name = host_name(value)
            for ending in self._endings:
                label = name.removesuffix(ending)
                if label != name and label not in self._reserved:
                    # A name with dots in it could be meant for somebody else's certificate.
                    yield "" if "." in label else label

    def _of_path(self, scope: Scope, entry: RouteEntry) -> Iterator[str]:
        declared = entry.declared or ""
        if declared not in self._patterns:
            self._patterns[declared] = self._compiled(declared, entry.kind)
        compiled = self._patterns[declared]
        if compiled is None:
            return
        path = route_path(scope["path"], scope.get("root_path", ""))
        other = path[:-1] if path.endswith("/") else path + "/"
        matched = compiled[0].match(path) or compiled[0].match(other)
        # The value that the endpoint will get; one that is not found has no name, and is refused as such.
        yield "" if matched is None else str(compiled[1].convert(matched[str(self._parameter)]))

    def _compiled(self, declared: str, kind: str) -> tuple[re.Pattern[str], Any] | None:
        rest = "/{fastapi_hardening_rest:path}" if kind == "mount" else ""
        pattern, _, convertors = compile_path(declared + rest)
        convertor = convertors.get(str(self._parameter))
        return None if convertor is None else (pattern, convertor)


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
        self._reader = _Reader(self._tenancy.settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        context = request_context.ensure(scope)
        context.state[TenancyMiddleware] = self
        entry = route_of(scope) if self._table is None else self._table.find(scope)
        try:
            tenant = await self.admit(entry, scope, context)
        except Problem as problem:
            await refuse(problem, scope, receive, send, layer=LAYER)
            return
        if tenant is not None and self._tenancy.count is not None:
            self._tenancy.count(tenant)
        token = _current.set(tenant)
        try:
            await self.app(scope, receive, send)
        finally:
            _current.reset(token)

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
        _current.set(await layer.admit(entry, scope, context))
    except Problem as problem:
        tell(problem, context, LAYER)
        raise


# --- overrides --------------------------------------------------------------------------------------------------------


class RequireTenant(Override):
    """The route needs a tenant; ``RequireTenant.exempt`` says that it needs none.

    A tenant that is named all the same is checked on an exempt route, too.
    """

    exempt: ClassVar["RequireTenant"]

    def __init__(self) -> None:
        super().__init__()
        self.needed = True

    async def act_late(self, connection: HTTPConnection) -> None:
        """Refuses where no tenant is known. Raises :class:`TenantRequired`."""
        if self.needed:
            await _required(connection)


RequireTenant.exempt = RequireTenant()
RequireTenant.exempt.needed = False


async def _whichever(connection: HTTPConnection) -> Tenant | None:
    tenant: Tenant | None = request_context.ensure(connection.scope).state.get(Tenant)
    return tenant


async def _required(connection: HTTPConnection) -> Tenant:
    tenant = await _whichever(connection)
    if tenant is None:
        problem = TenantRequired("The request does not say which tenant it is about.")
        tell(problem, request_context.ensure(connection.scope), LAYER)
        raise problem
    return tenant


CurrentTenant = Annotated[Tenant, Depends(_required)]
"""In a signature: the tenant that the request is about."""

OptionalTenant = Annotated[Tenant | None, Depends(_whichever)]
"""In a signature: the tenant, or ``None`` where the request names none."""
