"""What a route says about its tenant: ``RequireTenant()``, ``tenant: CurrentTenant``."""

from typing import Annotated, ClassVar

from fastapi import Depends
from starlette.requests import HTTPConnection

from fastapi_hardening.api.tenancy.engine import Tenant
from fastapi_hardening.api.tenancy.problems import TenantRequired
from fastapi_hardening.core import context as request_context
from fastapi_hardening.core.policy import Override
from fastapi_hardening.core.problem import tell

LAYER = "tenancy"


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
