"""Roles and permissions: what a caller may do, worked out once for each set of roles and then looked up.

A role grants permissions (``orders:read``), all below a name (``orders:*``), or everything (``*``), and may inherit
other roles. A hierarchy that runs in a circle is refused when the application starts. It is *not* a policy language:
whether *this* order may be read by *this* caller is what :class:`~fastapi_hardening.Authorize` asks a function.

Example:
    >>> import asyncio
    >>> rbac = Rbac(roles={"clerk": ["orders:*"], "admin": ["users:*"]}, inherits={"admin": ["clerk"]})
    >>> admin = asyncio.run(rbac.permissions(frozenset({"admin"})))
    >>> admin.allow("orders:refund"), admin.allow("users:read"), admin.allow("stock:read")
    (True, True, False)
"""

import inspect
from collections.abc import Awaitable, Callable, Iterable, Mapping

from pydantic import Field, model_validator

from fastapi_hardening.core.clock import Clock, SystemClock
from fastapi_hardening.core.configuration import ConcernSettings
from fastapi_hardening.core.identity import Principal

PermissionsOf = Callable[[frozenset[str]], Iterable[str] | Awaitable[Iterable[str]]]
"""Gives the permissions of a set of roles, for instance from a database; sync or async."""

NONE: frozenset[str] = frozenset()
_ALL = "*"


class RbacSettings(ConcernSettings):
    """The settings of roles and permissions."""

    roles: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """What each role may do: permissions such as ``orders:read``, ``orders:*`` for all below a name, ``*`` for all."""

    inherits: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Which other roles each role has as well."""

    cache_seconds: float = Field(60.0, gt=0)
    """For this long the permissions that a function gives are used again; what the settings say holds for ever."""

    max_cached: int = Field(4096, ge=1)
    """For how many different sets of roles the permissions are kept."""

    @model_validator(mode="after")
    def _can_be_worked_out(self) -> "RbacSettings":
        flattened(self.roles, self.inherits)
        return self


# --- engine -----------------------------------------------------------------------------------------------------------


def checked_permission(permission: str, *, wildcards: bool = True) -> str:
    """A permission as it may be written: names parted by colons, ``*`` only at the end and only where it is granted.

    Raises:
        ValueError: It is written in another way; the message says how to.
    """
    parts = permission.split(":")
    if not all(parts) or permission.strip() != permission:
        raise ValueError(f"{permission!r} is no permission; write names parted by colons, such as 'orders:read'")
    if any("*" in part for part in parts[:-1]) or ("*" in parts[-1] and parts[-1] != _ALL):
        raise ValueError(f"{permission!r}: '*' stands only at the end, for all below a name, as in 'orders:*'")
    if parts[-1] == _ALL and not wildcards:
        raise ValueError(f"{permission!r}: name the permission that is needed; a wildcard is for roles, which grant")
    return permission


class Permissions:
    """What is granted: names, and wildcards for all below a name. A look-up takes a step for each part of the name."""

    __slots__ = ("granted",)

    def __init__(self, granted: Iterable[str]) -> None:
        self.granted = frozenset(granted)

    def allow(self, permission: str) -> bool:
        """Whether a permission is among them, by its name or by a wildcard."""
        granted = self.granted
        if permission in granted or _ALL in granted:
            return True
        end = permission.rfind(":")
        while end > 0:
            if permission[: end + 1] + _ALL in granted:
                return True
            end = permission.rfind(":", 0, end)
        return False


def flattened(
    roles: Mapping[str, Iterable[str]], inherits: Mapping[str, Iterable[str]]
) -> dict[str, tuple[frozenset[str], frozenset[str]]]:
    """For each role the roles that it comes to, itself among them, and the permissions of all of those.

    Raises:
        ValueError: A permission is written wrongly, an inherited role is unknown, or the hierarchy runs in a circle.
    """
    own = {role: frozenset(map(checked_permission, permissions)) for role, permissions in roles.items()}
    parents = {role: tuple(names) for role, names in inherits.items()}
    known = own.keys() | parents.keys()
    for role, names in parents.items():
        for name in names:
            if name not in known:
                raise ValueError(f"{role!r} inherits {name!r}, which is no role; add it to roles")
    found: dict[str, tuple[frozenset[str], frozenset[str]]] = {}

    def visit(role: str, above: tuple[str, ...]) -> tuple[frozenset[str], frozenset[str]]:
        if role in above:
            circle = " -> ".join((*above[above.index(role) :], role))
            raise ValueError(f"the roles inherit each other in a circle: {circle}; take one of the arrows out")
        if role not in found:
            below = [visit(name, (*above, role)) for name in parents.get(role, ())]
            found[role] = (
                frozenset({role}).union(*(names for names, _ in below)),
                own.get(role, NONE).union(*(permissions for _, permissions in below)),
            )
        return found[role]

    for role in known:
        visit(role, ())
    return found


def roles_of(principal: Principal, tenant: str | None) -> frozenset[str]:
    """The roles that hold everywhere, and those that hold in this tenant only."""
    if tenant is None or not principal.tenant_roles:
        return principal.roles
    return principal.roles | principal.tenant_roles.get(tenant, NONE)


class Rbac:
    """Knows what roles come to.

    Args:
        roles: The permissions of each role.
        inherits: The roles that each role has as well.
        permissions_of: Gives further permissions of a set of roles; asked again after ``cache_seconds``.
        cache_seconds: For how long its answer is used.
        max_cached: For how many sets of roles answers are kept; the oldest gives way.
        clock: Where the time comes from.

    Raises:
        ValueError: The roles cannot be worked out.
    """

    def __init__(
        self,
        roles: Mapping[str, Iterable[str]] | None = None,
        inherits: Mapping[str, Iterable[str]] | None = None,
        *,
        permissions_of: PermissionsOf | None = None,
        cache_seconds: float = 60.0,
        max_cached: int = 4096,
        clock: Clock | None = None,
    ) -> None:
        self._roles = flattened(roles or {}, inherits or {})
        self._ask = permissions_of
        self._cache_seconds = cache_seconds
        self._max_cached = max_cached
        self._now = (clock or SystemClock()).monotonic
        self._cache: dict[tuple[frozenset[str], frozenset[str]], tuple[Permissions, float]] = {}

    def effective(self, roles: frozenset[str]) -> frozenset[str]:
        """The roles and all that they inherit; a role that nobody declared is only itself."""
        if not self._roles:
            return roles
        return roles.union(*(self._roles[role][0] for role in roles if role in self._roles))

    async def permissions(self, roles: frozenset[str], granted: frozenset[str] = NONE) -> Permissions:
        """What the roles may do, together with permissions that were granted otherwise.

        Whatever the function raises goes on to the caller: nobody is let in because it failed.
        """
        key = (roles, granted)
        known = self._cache.get(key)
        if known is not None and self._now() < known[1]:
            return known[0]
        effective = self.effective(roles)
        found: set[str] = set(granted).union(*(self._roles[role][1] for role in effective if role in self._roles))
        until = float("inf")
        if self._ask is not None:
            answer = self._ask(effective)
            found.update(map(checked_permission, await answer if inspect.isawaitable(answer) else answer))
            until = self._now() + self._cache_seconds
        permissions = Permissions(found)
        if key not in self._cache and len(self._cache) >= self._max_cached:
            del self._cache[next(iter(self._cache))]
        self._cache[key] = (permissions, until)
        return permissions
