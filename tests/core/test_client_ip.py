"""Who the client is, told by peers and forwarding headers."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastapi_hardening.core.client_ip import (
    NO_ADDRESS,
    ClientAddressResolver,
    UnknownProxySeen,
    parse_address,
    peer_of,
)
from fastapi_hardening.core.events import Events

ONE_PROXY = ClientAddressResolver(["10.0.0.0/8"])


@pytest.mark.parametrize(
    ("peer", "lines", "client"),
    [
        ("203.0.113.9", [], "203.0.113.9"),
        # Not a trusted peer: whatever it claims, it is the client.
        ("203.0.113.9", [b"1.1.1.1"], "203.0.113.9"),
        # One proxy, two proxies: from the right, past the trusted ones.
        ("10.0.0.1", [b"203.0.113.9"], "203.0.113.9"),
        ("10.0.0.1", [b"203.0.113.9, 10.0.0.2"], "203.0.113.9"),
        # The client wrote the left part.
        ("10.0.0.1", [b"6.6.6.6, 203.0.113.9"], "203.0.113.9"),
        ("10.0.0.1", [b"10.0.0.5, 203.0.113.9, 10.0.0.2"], "203.0.113.9"),
        # Repeated lines are one list; the last line is the nearest.
        ("10.0.0.1", [b"6.6.6.6", b"203.0.113.9"], "203.0.113.9"),
        ("10.0.0.1", [b"203.0.113.9", b"10.0.0.2"], "203.0.113.9"),
        # Ports, brackets, zones, mapped addresses, blanks.
        ("10.0.0.1", [b"203.0.113.9:4711"], "203.0.113.9"),
        ("10.0.0.1", [b'"[2001:db8::1]:443"'], "2001:db8::1"),
        ("10.0.0.1", [b"2001:db8::1%eth0"], "2001:db8::1"),
        ("10.0.0.1", [b"::ffff:203.0.113.9"], "203.0.113.9"),
        ("10.0.0.1", [b"  203.0.113.9  "], "203.0.113.9"),
        # What cannot be read hides everything behind it.
        ("10.0.0.1", [b"203.0.113.9, unknown"], "10.0.0.1"),
        ("10.0.0.1", [b"203.0.113.9, unknown, 10.0.0.2"], "10.0.0.2"),
        ("10.0.0.1", [b""], "10.0.0.1"),
        ("10.0.0.1", [b"203.0.113.9,"], "10.0.0.1"),
        ("10.0.0.1", [b"\xff\xfe"], "10.0.0.1"),
        # Nothing but proxies: the farthest of them.
        ("10.0.0.1", [b"10.0.0.3, 10.0.0.2"], "10.0.0.3"),
        # A mapped peer is the proxy that it is.
        ("::ffff:10.0.0.1", [b"203.0.113.9"], "203.0.113.9"),
    ],
)
def test_the_client_is_the_first_hop_from_the_right_that_is_no_trusted_proxy(
    peer: str, lines: list[bytes], client: str
) -> None:
    """Nothing that a client can write moves its address."""
    assert ONE_PROXY.resolve(peer, lines).address == client


@pytest.mark.parametrize(
    ("line", "client"),
    [
        (b"for=203.0.113.9", "203.0.113.9"),
        (b'for="[2001:db8::1]:443";proto=https', "2001:db8::1"),
        (b"For=6.6.6.6, proto=https;FOR=203.0.113.9;by=10.0.0.2", "203.0.113.9"),
        (b"for=_hidden", "10.0.0.1"),
        (b"proto=https", "10.0.0.1"),
    ],
)
def test_forwarded_is_read_like_the_other_where_it_is_chosen(line: bytes, client: str) -> None:
    """RFC 7239, section 4."""
    resolver = ClientAddressResolver(["10.0.0.0/8"], forwarded_header="forwarded")
    assert resolver.header == b"forwarded"
    assert resolver.resolve("10.0.0.1", [line]).address == client


def test_no_more_hops_are_read_than_anybody_has_proxies() -> None:
    """A header of any length costs a bounded number of looks."""
    line = b"203.0.113.9, " + b"10.0.0.2, " * 100 + b"10.0.0.3"
    assert ONE_PROXY.resolve("10.0.0.1", [line]).address == "10.0.0.2"


def test_ipv6_is_keyed_by_its_64() -> None:
    """One subscriber has 2^64 addresses; they are one client."""
    resolver = ClientAddressResolver()
    first, second = resolver.resolve("2001:db8:0:1::1"), resolver.resolve("2001:db8:0:1:ffff::2")
    assert first.address != second.address
    assert first.key == second.key == "2001:db8:0:1::/64"
    assert resolver.resolve("2001:db8:0:2::1").key != first.key


def test_a_peer_that_is_no_address_is_a_client_by_its_name() -> None:
    """A test client and a socket have a limit of their own, the normal one."""
    assert ClientAddressResolver().resolve("testclient").key == "testclient"
    assert ClientAddressResolver().resolve("unix").known


def test_no_peer_at_all_is_known_as_such() -> None:
    """Such requests share one strict key."""
    assert ClientAddressResolver().resolve(None) is NO_ADDRESS
    assert not NO_ADDRESS.known


@pytest.mark.parametrize(
    ("client", "server", "peer"),
    [
        (("203.0.113.9", 4711), ("10.0.0.1", 80), "203.0.113.9"),
        (None, ("/run/app.sock", None), "unix"),
        (("", 0), ["/run/app.sock", None], "unix"),
        (None, ("10.0.0.1", 80), None),
        (None, None, None),
    ],
)
def test_the_peer_of_a_scope(client: tuple[str, int] | None, server: tuple[str, int | None] | None, peer: str) -> None:
    """A socket is told by its server entry, a path without a port."""
    assert peer_of(client, server) == peer


def test_a_unix_socket_is_a_proxy_where_it_is_named() -> None:
    """``trusted_proxies=["unix"]`` believes what came through the socket."""
    assert ClientAddressResolver(["unix"]).resolve("unix", [b"203.0.113.9"]).address == "203.0.113.9"
    assert ClientAddressResolver().resolve("unix", [b"203.0.113.9"]).address == "unix"


def test_an_unknown_proxy_is_not_believed_and_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    """The day behind a load balancer is no outage, and the log says which setting ends the state."""
    events = Events()
    resolver = ClientAddressResolver(events=events)
    with caplog.at_level(logging.WARNING):
        clients = [resolver.resolve("10.0.0.7", [b"203.0.113.9"]) for _ in range(3)]
    assert {client.address for client in clients} == {"10.0.0.7"}
    assert all(client.behind_unknown_proxy for client in clients)
    assert all(client.own_key is None for client in clients)
    assert events.count(UnknownProxySeen) == 1
    assert [record.getMessage().count("HARDENING_TRUSTED_PROXIES") for record in caplog.records] == [1]


def test_a_public_peer_with_forwarding_headers_is_only_a_liar() -> None:
    """Wide limits are for proxies, and a proxy of yours has a private address."""
    client = ClientAddressResolver().resolve("8.8.8.8", [b"1.1.1.1"])
    assert not client.behind_unknown_proxy
    assert client.own_key == "8.8.8.8"


def test_somebody_who_trusts_a_proxy_is_told_of_no_other() -> None:
    """Where proxies are configured, a private client that forwards is not one of them."""
    assert not ONE_PROXY.resolve("192.168.0.9", [b"1.1.1.1"]).behind_unknown_proxy


@pytest.mark.parametrize("entry", ["10.0.0.0/33", "proxy.internal", "", "10.0.0.1/8"])
def test_an_entry_that_is_no_network_is_refused(entry: str) -> None:
    """The sentence shows what one looks like."""
    with pytest.raises(ValueError, match="such as"):
        ClientAddressResolver([entry])


@given(peer=st.text(max_size=20) | st.none(), lines=st.lists(st.binary(max_size=40), max_size=4))
def test_whatever_is_sent_there_is_a_client(peer: str | None, lines: list[bytes]) -> None:
    """No bytes make the resolver fail, and a peer that is not trusted is the client whatever the lines say."""
    client = ONE_PROXY.resolve(peer, lines)
    assert client.key
    if peer and not ONE_PROXY.trusts(peer):
        assert client == ONE_PROXY.resolve(peer)


@given(st.ip_addresses())
def test_every_address_is_read_back(address: object) -> None:
    """With or without what stands around it in a header."""
    parsed = parse_address(str(address))
    assert parsed is not None
    assert parse_address(f"[{parsed}]:80" if parsed.version == 6 else f"{parsed}:80") == parsed
