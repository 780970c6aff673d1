"""Whose budget it is: nobody passes for another, and nobody is without a key."""

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastapi_hardening.core.client_ip import ClientAddress
from fastapi_hardening.core.context import RequestContext
from fastapi_hardening.core.identity import Principal
from fastapi_hardening.core.keys import AllowList, Key, check_key, counted, key_of, name_of, stands_for_one

CLIENT = ClientAddress("203.0.113.1", "203.0.113.1")


def text(key: Key, *, principal: Principal | None = None, tenant: str | None = None, **headers: str) -> str:
    """What a request is counted by."""
    context = RequestContext("id", CLIENT, 0.0)
    context.principal, context.tenant = principal, tenant
    pairs = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
    return asyncio.run(key_of(check_key(key), {"type": "http", "headers": pairs}, context))


ANNA = Principal("anna", credential="t1", tenant="acme")


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("address", "203.0.113.1"),
        ("principal", "principal=anna"),
        ("credential", "credential/bearer=t1"),
        ("tenant", "tenant=acme"),
        ("header:X-Key", "header:x-key=k"),
        (("principal", "address"), "principal=anna + 203.0.113.1"),
        ("tenant, header:X-Key", "tenant=acme + header:x-key=k"),
    ],
)
def test_a_key_says_of_which_kind_it_is(key: Key, expected: str) -> None:
    """So that the same text of another kind is another client."""
    assert text(key, principal=ANNA, x_key="k") == expected


@pytest.mark.parametrize("key", ["principal", "credential", "tenant", "header:x", ("principal", "tenant", "address")])
def test_who_is_not_known_is_counted_by_address(key: Key) -> None:
    """Not to be known is no way round a limit."""
    assert text(key) == "203.0.113.1"


def test_what_is_known_best_is_taken() -> None:
    """A credential without an id is its owner; the tenant of the request goes before that of the credential."""
    nameless = Principal("anna", tenant="acme")
    assert text("credential", principal=nameless) == "principal=anna"
    assert text("tenant", principal=nameless, tenant="other") == "tenant=other"


def test_subjects_of_two_issuers_are_two_clients() -> None:
    """However they are written."""
    foreign = Principal("anna", issuer="https://login.example")
    local = Principal("https://login.example=anna")
    assert len({text("principal", principal=each) for each in (foreign, local, ANNA)}) == 3


def test_a_long_value_takes_little_room() -> None:
    """And is still told apart from another."""
    assert len(counted("k", "a" * 10_000)) < 50
    assert counted("k", "a" * 100) != counted("k", "a" * 101)


PARTS = st.tuples(*[st.text("+ =:ab", min_size=1, max_size=8)] * 2)


@settings(deadline=None)
@given(PARTS, PARTS)
def test_two_parts_are_never_taken_for_two_others(one: tuple[str, str], other: tuple[str, str]) -> None:
    """Whatever a client writes into them: only the same parts make the same key."""
    first, second = (text(("header:a", "header:b"), a=a, b=b) for a, b in (one, other))
    assert (first == second) is (one == other)


@pytest.mark.parametrize(
    "key", ["", "adress", "header:X Key", ("principal", "nobody"), (), ("principal", ("address",))]
)
def test_what_is_no_key_is_refused(key: Any) -> None:
    """Where it is written."""
    with pytest.raises(ValueError, match=r"key|header"):
        check_key(key)


def test_a_function_is_called_by_its_name() -> None:
    """An object by that of its class."""

    class BySession:
        def __call__(self, connection: Any) -> str:
            return "s"

    assert name_of(test_a_function_is_called_by_its_name).endswith("test_a_function_is_called_by_its_name")
    assert text(BySession()).endswith("BySession=s")


@pytest.mark.parametrize(
    ("client", "one"),
    [
        (CLIENT, True),
        (ClientAddress("2001:db8::1", "2001:db8::/64"), True),
        (ClientAddress("10.0.0.1", "10.0.0.1", behind_unknown_proxy=True), False),
        (ClientAddress("unknown", "unknown", known=False), False),
        (ClientAddress("unix", "unix"), False),
    ],
)
def test_an_address_may_stand_for_many(client: ClientAddress, one: bool) -> None:
    """A key that is not an address is one client."""
    assert stands_for_one(client.key, client) is one
    assert stands_for_one("principal=anna", client)


def test_an_allow_list_knows_networks_keys_and_sockets() -> None:
    """And refuses what is neither."""
    allowed = AllowList(["10.0.0.0/8", "2001:db8::/32", "unix", "principal=monitor"])
    assert [allowed.has_address(each) for each in ("10.9.9.9", "2001:db8:1::1", "unix")] == [True] * 3
    assert [allowed.has_address(each) for each in ("11.0.0.1", "testclient", "unknown")] == [False] * 3
    assert not AllowList(["10.0.0.0/8"]).has_address("unix")
    assert allowed.has_key("principal=monitor")
    assert not allowed.has_key("principal=anna")
    with pytest.raises(ValueError, match="network"):
        AllowList(["10.0.0.0/33"])
