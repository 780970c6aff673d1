"""The tenant that this task or thread works for, for the place where queries are made."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from fastapi_hardening.api.tenancy.engine import Tenant

current: ContextVar[Tenant | None] = ContextVar("fastapi_hardening.tenant", default=None)


def current_tenant() -> Tenant | None:
    """The tenant that this task or thread works for: that of the request, or of :func:`as_tenant`."""
    return current.get()


@contextmanager
def as_tenant(tenant: Tenant | str) -> Iterator[Tenant]:
    """Works for a tenant where there is no request: in a job, a script, a test."""
    tenant = Tenant(tenant) if isinstance(tenant, str) else tenant
    token = current.set(tenant)
    try:
        yield tenant
    finally:
        current.reset(token)
