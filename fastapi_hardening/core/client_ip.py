"""Who sent this request: the one address that limits, logs and audits agree on.

A forwarding header is a claim of whoever sent it. It is believed only when the socket's peer is a proxy that was
named in ``trusted_proxies``, and then read from the right, where the nearest proxy wrote, past every further trusted
proxy, to the first address that is not one. Nothing further left counts: the client could have written it. There is
no default strategy: without ``trusted_proxies`` the peer itself is the client.

Running behind uvicorn's own ``proxy_headers`` does no harm: the peer is then already the client, which is not a trusted
proxy, so nothing is read twice.

Example:
    >>> resolver = ClientAddressResolver(trusted_proxies=["10.0.0.0/8"])
    >>> resolver.resolve("10.0.0.7", [b"6.6.6.6, 203.0.113.9"]).address
    '203.0.113.9'
    >>> resolver.resolve("203.0.113.9", [b"1.1.1.1"]).address
    '203.0.113.9'
"""

import ipaddress
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from fastapi_hardening.core.events import Events

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

logger = logging.getLogger("fastapi_hardening.client_ip")

UNIX = "unix"
UNKNOWN = "unknown"

# Nobody has this many proxies; a longer list is only work for us.
_MAX_HOPS = 64
_IPV6_SITE_BITS = 64


@dataclass(frozen=True, slots=True)
class ClientAddress:
    """Where a request comes from, as far as it is believed.

    Attributes:
        address: The address for logs: an IP, a literal such as ``unix`` or ``testclient``, or ``unknown``.
        key: What a limit is keyed by: an IPv4 address whole, an IPv6 address by its /64, else the literal.
        known: False when the server gave no address at all; such requests share one strict key.
        behind_unknown_proxy: A private peer sent forwarding headers, and no trusted proxy is configured. All its
            clients share its address, so limits must be wide until ``trusted_proxies`` is set.
    """

    address: str
    key: str
    known: bool = True
    behind_unknown_proxy: bool = False

    @property
    def own_key(self) -> str | None:
        """The key, or ``None`` where many share it, none of whom may be locked out for what another one does."""
        return self.key if self.known and not self.behind_unknown_proxy else None


@dataclass(frozen=True, slots=True)
class UnknownProxySeen:
    """A private peer sent forwarding headers, but ``trusted_proxies`` does not name it. Told once a process."""

    peer: str


NO_ADDRESS = ClientAddress(UNKNOWN, UNKNOWN, known=False)


class ClientAddressResolver:
    """Finds the client's address by the socket's peer and the forwarding headers.

    Args:
        trusted_proxies: Addresses and CIDR networks of your own proxies, and ``unix`` for Unix sockets.
        forwarded_header: The one header that your proxies write. Reading both would let a client use the other one.
        events: Where :class:`UnknownProxySeen` goes.

    Raises:
        ValueError: An entry is neither an address, nor a network, nor ``unix``.
    """

    def __init__(
        self,
        trusted_proxies: Iterable[str] = (),
        *,
        forwarded_header: Literal["x-forwarded-for", "forwarded"] = "x-forwarded-for",
        events: Events | None = None,
    ) -> None:
        self.header = forwarded_header.encode("ascii")
        self.unknown_proxy: str | None = None
        self._literal: set[str] = set()
        self._networks: list[IPNetwork] = []
        self._events = events
        for entry in trusted_proxies:
            if entry == UNIX:
                self._literal.add(entry)
            else:
                self._networks.append(parse_network(entry))
        self._trusts_anybody = bool(self._networks or self._literal)
        # By the peer's text: a few proxies, or clients one by one; bounded either way.
        self._peer = lru_cache(maxsize=4096)(self._classify)

    def resolve(self, peer: str | None, forwarded: Sequence[bytes] = ()) -> ClientAddress:
        """The client's address.

        Args:
            peer: The socket's peer: an IP, a literal, or ``None`` where the server knows none.
            forwarded: Every line of the configured forwarding header, in order.
        """
        if not peer:
            return NO_ADDRESS
        direct, trusted, private = self._peer(peer)
        if not forwarded:
            return direct
        if trusted:
            return self._walk(direct, forwarded)
        if private and not self._trusts_anybody:
            self._tell_once(peer)
            return ClientAddress(direct.address, direct.key, behind_unknown_proxy=True)
        return direct

    def trusts(self, peer: str | None) -> bool:
        """Whether the peer is one of the trusted proxies, whose word on scheme and host counts too."""
        return peer is not None and self._peer(peer)[1]

    def _classify(self, peer: str) -> tuple[ClientAddress, bool, bool]:
        """The peer as a client, whether it is a trusted proxy, and whether it is a private address."""
        ip = parse_address(peer)
        if ip is None:
            return ClientAddress(peer, peer), peer in self._literal, False
        return client_of(ip), self._is_trusted(ip), ip.is_private

    def _is_trusted(self, ip: IPAddress) -> bool:
        return any(ip in network for network in self._networks)

    def _walk(self, nearest: ClientAddress, lines: Sequence[bytes]) -> ClientAddress:
        """Reads the hops from the right; stops at the first that is no trusted proxy, or that cannot be read."""
        believed = nearest
        for hop in _hops(lines, self.header):
            ip = parse_address(hop)
            if ip is None:
                # An obfuscated or broken entry: what stands behind it cannot be told, so its writer is the client.
                return believed
            believed = client_of(ip)
            if not self._is_trusted(ip):
                return believed
        return believed

    def _tell_once(self, peer: str) -> None:
        if self.unknown_proxy is None:
            self.unknown_proxy = peer
            logger.warning(
                "%s, a private address, sends %s, but no proxy is trusted, so all its clients count as one. If it is "
                "your proxy, set trusted_proxies to its network (HARDENING_TRUSTED_PROXIES=%s)",
                peer,
                self.header.decode("ascii"),
                peer,
            )
            if self._events is not None:
                self._events.emit(UnknownProxySeen(peer))


def peer_of(client: Sequence[object] | None, server: Sequence[object] | None) -> str | None:
    """The socket's peer by the ``client`` and ``server`` of an ASGI scope: its host, ``unix``, or ``None``."""
    if client and client[0]:
        return str(client[0])
    # A Unix socket has no peer address; its server entry is a path without a port.
    if server and server[0] and len(server) > 1 and server[1] is None:
        return UNIX
    return None


def parse_address(text: str) -> IPAddress | None:
    """An IP address with or without port, brackets or zone; ``None`` for anything else."""
    text = text.strip().strip('"')
    if text.startswith("["):
        text, _, _ = text[1:].partition("]")
    elif text.count(":") == 1:
        text, _, _ = text.partition(":")
    text, _, _ = text.partition("%")
    try:
        ip = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(ip, "ipv4_mapped", None) or ip


def parse_network(entry: str) -> IPNetwork:
    """A CIDR network, or an address as a network of one.

    Raises:
        ValueError: With the sentence that says what an entry looks like.
    """
    try:
        return ipaddress.ip_network(entry)
    except ValueError as error:
        raise ValueError(
            f"{entry!r} is not an address or a network, such as '10.0.0.0/8', '::1' or 'unix' ({error})"
        ) from None


def client_of(ip: IPAddress) -> ClientAddress:
    """An IP as a client; IPv6 keyed by its /64, for one subscriber has 2^64 addresses to rotate through."""
    text = str(ip)
    if isinstance(ip, ipaddress.IPv4Address):
        return ClientAddress(text, text)
    site = ipaddress.IPv6Network((int(ip) >> _IPV6_SITE_BITS << _IPV6_SITE_BITS, _IPV6_SITE_BITS))
    return ClientAddress(text, str(site))


def _hops(lines: Sequence[bytes], header: bytes) -> Iterable[str]:
    """The hops of all lines of the header, the nearest first."""
    seen = 0
    for line in reversed(lines):
        for part in reversed(line.decode("latin-1").split(",")):
            if seen == _MAX_HOPS:
                return
            seen += 1
            yield _forwarded_for(part) if header == b"forwarded" else part


def _forwarded_for(element: str) -> str:
    """The ``for`` parameter of one element of ``Forwarded`` (RFC 7239, section 4)."""
    for pair in element.split(";"):
        name, _, value = pair.strip().partition("=")
        if name.lower() == "for":
            return value
    return ""
