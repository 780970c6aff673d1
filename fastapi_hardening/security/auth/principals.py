"""Principals as bytes, for what keeps them: sessions, and tickets for websockets. Never shown to a client unsigned."""

import json
from typing import Any

from fastapi_hardening.core.identity import Principal

_SETS = ("scopes", "roles", "permissions")
_PLAIN = ("tenant", "issuer", "credential", "expires_at")


def to_members(principal: Principal) -> dict[str, Any]:
    """A principal as members of a JSON object; what is empty is left out.

    Raises:
        TypeError: A claim is nothing that JSON can write.
    """
    members: dict[str, Any] = {"id": principal.id, "scheme": principal.scheme}
    members |= {name: sorted(value) for name in _SETS if (value := getattr(principal, name))}
    members |= {name: value for name in _PLAIN if (value := getattr(principal, name)) is not None}
    if principal.tenant_roles:
        members["tenant_roles"] = {tenant: sorted(roles) for tenant, roles in principal.tenant_roles.items()}
    if principal.claims:
        members["claims"] = dict(principal.claims)
    json.dumps(members)
    return members


def from_members(members: dict[str, Any]) -> Principal:
    """The principal that :func:`to_members` wrote.

    Raises:
        KeyError, TypeError, ValueError: They are not such members.
    """
    given = dict(members)
    for name in _SETS:
        given[name] = frozenset(given.get(name, ()))
    roles = given.pop("tenant_roles", None)
    if roles:
        given["tenant_roles"] = {tenant: frozenset(names) for tenant, names in roles.items()}
    return Principal(**given)
