"""Decides which tenant a request is about, and whether its caller belongs there; without ASGI."""

import inspect
import logging
import re
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from prometheus_client import CollectorRegistry, Counter
from starlette.concurrency import run_in_threadpool

from fastapi_hardening.api.tenancy.problems import CrossTenantRefused, TenantAmbiguous, TenantUnavailable, TenantUnknown
from fastapi_hardening.api.tenancy.settings import TenancySettings
from fastapi_hardening.core.clock import Clock, SystemClock
from fastapi_hardening.core.problem import retry_after
from fastapi_hardening.core.store import StoreUnavailable

if TYPE_CHECKING:
    from fastapi_hardening.core.identity import Principal

logger = logging.getLogger("fastapi_hardening.tenancy")

OTHER = "other"

# What a client may write as a name: it goes into keys, logs and queries.
NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z._:|@-]{0,127}")
_MOST_UNKNOWN = 1_000


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
            return Tenant(name) if NAME.fullmatch(name) else None
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
