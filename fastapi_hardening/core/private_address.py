"""Whether a host is one that only this machine or its network can reach, however it is written.

The place where a server must not be sent by somebody else's URL (server-side request forgery, SSRF): loopback, private
and link-local networks, the metadata services of clouds, and names that mean them. Browsers and C libraries read
``2130706433``, ``0x7f.1``, ``0177.0.0.1`` and ``[::ffff:127.0.0.1]`` as 127.0.0.1 (WHATWG URL, section 3.5), so these
are read the same way here.

It does not resolve names. A name may mean a public address when it is looked at and a private one when it is called
(DNS rebinding), so whoever calls must ask :func:`is_private_address` about the address that is really connected to.

Example:
    >>> [is_private_host(host) for host in ("example.com", "0x7f.1", "2130706433", "[::1]", "10.0.0.7", "8.8.8.8")]
    [False, True, True, True, True, False]
"""

import ipaddress
import unicodedata

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

_NAMES = frozenset(
    ("localhost", "ip6-localhost", "ip6-loopback", "localhost.localdomain", "metadata", "metadata.google.internal",
     "metadata.goog", "instance-data", "kubernetes", "kubernetes.default", "host.docker.internal",
     "gateway.docker.internal", "broadcasthost"),
)  # fmt: skip
_SUFFIXES = (
    ".localhost",
    ".local",
    ".internal",
    ".localdomain",
    ".svc",
    ".cluster.local",
    ".home.arpa",
    ".lan",
    ".intranet",
)
# Public names that anybody can point anywhere, whose labels are the address.
_WILD_CARDS = (".nip.io", ".sslip.io", ".xip.io", ".localtest.me", ".lvh.me", ".vcap.me", ".lacolhost.com")
_OWN_WILD_CARDS = frozenset(("localtest.me", "lvh.me", "vcap.me", "lacolhost.com", "spoofed.burpcollaborator.net"))

_NAT64 = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48"))
_MOST_PARTS = 4


def is_private_host(host: str) -> bool:
    """Whether the host of a URL is an address or a name of this machine or its network.

    Args:
        host: The host as it stands in a URL, IPv6 with or without brackets.
    """
    name = unicodedata.normalize("NFKC", host).strip().strip("[]").rstrip(".").lower()
    if not name or name in _NAMES or name in _OWN_WILD_CARDS or name.endswith((*_SUFFIXES, *_WILD_CARDS)):
        return True
    address = parse_host(name)
    return address is not None and is_private_address(address)


def is_private_address(address: IPAddress | str) -> bool:
    """Whether an address is not one of the public internet; also one that is hidden in an IPv6 address.

    Args:
        address: The address that is connected to, after the name was resolved.

    Raises:
        ValueError: It is text, and no address.

    Example:
        >>> is_private_address("::ffff:169.254.169.254"), is_private_address("2001:4860:4860::8888")
        (True, False)
    """
    if isinstance(address, str):
        address = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if inner is None and (int(address) >> 32 == 0 or any(address in network for network in _NAT64)):
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            address = inner
    return not address.is_global or address.is_multicast


def parse_host(host: str) -> IPAddress | None:
    """The address that a host is, in any notation that resolvers take; ``None`` for a name.

    Example:
        >>> parse_host("0300.0250.1"), parse_host("example.com")
        (IPv4Address('192.168.0.1'), None)
    """
    if ":" in host:
        try:
            return ipaddress.IPv6Address(host.partition("%")[0])
        except ValueError:
            return None
    parts = host.split(".")
    if len(parts) > _MOST_PARTS:
        return None
    numbers = [_number(part) for part in parts]
    if None in numbers:
        return None
    *first, last = (number or 0 for number in numbers)
    if any(number > 0xFF for number in first) or last >= 256 ** (_MOST_PARTS + 1 - len(parts)):  # noqa: PLR2004 - octets
        return None
    value = last
    for place, number in enumerate(first):
        value += number << 8 * (3 - place)
    return ipaddress.IPv4Address(value)


def _number(part: str) -> int | None:
    """A number as the C library reads it: hexadecimal after ``0x``, octal after ``0``."""
    if not part.isascii() or not part or len(part) > 16:  # noqa: PLR2004 - longer than any address
        return None
    try:
        if part.startswith("0x"):
            return int(part[2:] or "0", 16)
        if not part.isdigit():
            return None
        return int(part, 8) if part[0] == "0" and len(part) > 1 else int(part)
    except ValueError:
        return None
