"""Finds out whose data a request is about, and keeps every caller inside the tenant that is theirs.

It protects from the worst mistake of a shared service: the customer who writes another one's name into a header, a host
or a path, and gets that one's data. Names come from sources that the settings name; all that speak must agree, and who
calls must belong to the tenant that is asked for. It is *not* row-level security: a query that forgets its tenant reads
everybody's rows. :func:`current_tenant` is for the place where queries are made, so that none can forget.

It sits behind authentication, because who calls decides, and before limits, idempotency and caches, which count and
keep by tenant. It holds on every path alike: on mounts, websockets, and where no route matches.
"""

from fastapi_hardening.api.tenancy.current import as_tenant, current_tenant
from fastapi_hardening.api.tenancy.engine import Asked, FindTenant, Tenancy, Tenant, measure
from fastapi_hardening.api.tenancy.layer import TenancyMiddleware, admit_again
from fastapi_hardening.api.tenancy.overrides import CurrentTenant, OptionalTenant, RequireTenant
from fastapi_hardening.api.tenancy.problems import (
    CrossTenantRefused,
    TenantAmbiguous,
    TenantRequired,
    TenantUnavailable,
    TenantUnknown,
)
from fastapi_hardening.api.tenancy.settings import TenancySettings

__all__ = [
    "Asked",
    "CrossTenantRefused",
    "CurrentTenant",
    "FindTenant",
    "OptionalTenant",
    "RequireTenant",
    "Tenancy",
    "TenancyMiddleware",
    "TenancySettings",
    "Tenant",
    "TenantAmbiguous",
    "TenantRequired",
    "TenantUnavailable",
    "TenantUnknown",
    "admit_again",
    "as_tenant",
    "current_tenant",
    "measure",
]
