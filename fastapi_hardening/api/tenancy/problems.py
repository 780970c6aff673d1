"""What a caller is told who does not get to a tenant."""

from fastapi_hardening.core.problem import OWN, Problem


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
