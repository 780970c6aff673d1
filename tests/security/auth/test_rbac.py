"""Roles and permissions: what they come to, what is refused at the start, and how long an answer holds."""

import asyncio
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastapi_hardening.core.clock import ManualClock
from fastapi_hardening.core.identity import Principal
from fastapi_hardening.security.auth.rbac import Permissions, Rbac, RbacSettings, checked_permission, roles_of


def allowed(rbac: Rbac, roles: Iterable[str], permission: str, granted: Iterable[str] = ()) -> bool:
    permissions = asyncio.run(rbac.permissions(frozenset(roles), frozenset(granted)))
    return permissions.allow(permission)


@pytest.mark.parametrize(
    ("granted", "permission", "allows"),
    [
        ("orders:read", "orders:read", True),
        ("orders:read", "orders:write", False),
        ("orders:read", "orders:read:own", False),
        ("orders:*", "orders:read", True),
        ("orders:*", "orders:items:read", True),
        ("orders:*", "orders", False),
        ("orders:*", "orders2:read", False),
        ("orders:items:*", "orders:read", False),
        ("*", "anything:at:all", True),
    ],
)
def test_a_wildcard_stands_for_all_below_a_name(granted: str, permission: str, allows: bool) -> None:
    """At any depth, and never for the name itself."""
    assert Permissions([granted]).allow(permission) is allows


NAMES = st.text("ab", min_size=1, max_size=2)


@given(st.lists(NAMES, min_size=1, max_size=4), st.lists(NAMES, min_size=1, max_size=4))
def test_a_wildcard_is_a_prefix_of_whole_names(granted: list[str], asked: list[str]) -> None:
    """For any names: what the look-up says is what comparing part by part says."""
    permissions = Permissions([":".join(granted) + ":*"])
    assert permissions.allow(":".join(asked)) == (len(asked) > len(granted) and asked[: len(granted)] == granted)


def test_roles_inherit() -> None:
    """Over several steps, and from several roles."""
    rbac = Rbac(
        {"customer": ["shop:read"], "clerk": ["orders:*"], "admin": ["users:write"]},
        {"clerk": ["customer"], "admin": ["clerk", "auditor"], "auditor": []},
    )
    assert rbac.effective(frozenset({"admin"})) == {"admin", "clerk", "customer", "auditor"}
    assert allowed(rbac, ["admin"], "shop:read")
    assert allowed(rbac, ["clerk"], "orders:refund")
    assert not allowed(rbac, ["clerk"], "users:write")
    assert not allowed(rbac, ["nobody knows it"], "shop:read")
    assert allowed(rbac, ["customer"], "orders:refund", granted=["orders:refund"])


@pytest.mark.parametrize(
    ("roles", "inherits", "sentence"),
    [
        ({}, {"a": ["b"], "b": ["c"], "c": ["a"]}, r"in a circle: \w -> \w -> \w -> \w"),
        ({}, {"a": ["a"]}, "in a circle: a -> a"),
        ({}, {"a": ["b"]}, "'b', which is no role"),
        ({"a": ["orders:*:read"]}, {}, "only at the end"),
        ({"a": ["ord*"]}, {}, "only at the end"),
        ({"a": ["orders:"]}, {}, "names parted by colons"),
        ({"a": [" orders"]}, {}, "names parted by colons"),
    ],
)
def test_what_cannot_be_worked_out_is_refused_at_the_start(
    roles: dict[str, list[str]], inherits: dict[str, list[str]], sentence: str
) -> None:
    """By the engine and by the settings."""
    with pytest.raises(ValueError, match=sentence):
        Rbac(roles, inherits)
    with pytest.raises(ValueError, match=sentence):
        RbacSettings.model_validate({"roles": roles, "inherits": inherits})


def test_a_route_cannot_demand_a_wildcard() -> None:
    """It would be unclear which permission is meant."""
    with pytest.raises(ValueError, match="a wildcard is for roles"):
        checked_permission("orders:*", wildcards=False)


@pytest.mark.parametrize("is_async", [True, False])
def test_a_function_is_asked_once_for_a_set_of_roles(is_async: bool) -> None:
    """And again when its answer is old."""
    asked: list[frozenset[str]] = []

    def sync(roles: frozenset[str]) -> list[str]:
        asked.append(roles)
        return ["orders:read"]

    async def later(roles: frozenset[str]) -> list[str]:
        return sync(roles)

    clock = ManualClock()
    rbac = Rbac(permissions_of=later if is_async else sync, cache_seconds=10, clock=clock)
    assert allowed(rbac, ["a"], "orders:read")
    assert allowed(rbac, ["a"], "orders:read")
    assert not allowed(rbac, ["b"], "orders:write")
    assert asked == [frozenset({"a"}), frozenset({"b"})]
    clock.advance(10)
    assert allowed(rbac, ["a"], "orders:read")
    assert len(asked) == 3


def test_a_function_that_fails_lets_nobody_in() -> None:
    """Its failure goes on, and is not remembered."""
    answers: list[Exception | list[str]] = [RuntimeError("no database"), ["orders:read"]]

    def permissions_of(roles: frozenset[str]) -> list[str]:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    rbac = Rbac(permissions_of=permissions_of)
    with pytest.raises(RuntimeError):
        allowed(rbac, ["a"], "orders:read")
    assert allowed(rbac, ["a"], "orders:read")


def test_answers_are_kept_for_so_many_sets_of_roles() -> None:
    """The oldest gives way, and is worked out again."""
    rbac = Rbac({"a": ["x"]}, max_cached=2)
    assert [allowed(rbac, [role], "x") for role in ("a", "b", "c", "a")] == [True, False, False, True]
    assert len(rbac._cache) == 2


def test_roles_of_one_tenant_hold_in_no_other() -> None:
    """Beside those that hold everywhere."""
    principal = Principal("anna", roles=frozenset({"user"}), tenant_roles={"north": frozenset({"admin"})})
    assert roles_of(principal, "north") == {"user", "admin"}
    assert roles_of(principal, "south") == {"user"}
    assert roles_of(principal, None) == {"user"}
