"""What the head of a request says: its host, its path, its framing. Functions on bytes, which know no limit.

Two servers in a row have to read the same request. These find where they may not: a host that is no host name, a path
that means another one once somebody has decoded it, a length that is given twice. It is *not* a parser, for the server
has parsed already; and it refuses nothing: what is done about a finding is the caller's to say.

Example:
    >>> well_formed_host(b"shop.example:8443"), well_formed_host(b"shop.example/..")
    (True, False)
    >>> framing_mistake("1.1", [b"3"], [b"chunked"])
    'The request has both Content-Length and Transfer-Encoding.'
"""

import ipaddress
from collections.abc import Iterable
from urllib.parse import unquote_to_bytes

# RFC 3986, section 3.2.2, and the port. What else stands in a Host field breaks out of the URLs made of it.
_HOST_BYTES = b"abcdefghijklmnopqrstuvwxyz0123456789-._~%!$&'()*+,;=:[]"


def checked_host(pattern: str) -> str:
    """A pattern of a host name in the form in which it is compared.

    Raises:
        ValueError: It can match no host; the message says what one looks like.
    """
    if pattern == "*":
        return pattern
    host = pattern.strip().lower().removesuffix(".")
    name = host.removeprefix("*.")
    if "/" in host:
        raise ValueError(f"{pattern!r} is a URL or a path; a host is only the name, such as 'shop.example'")
    if not host.isascii():
        raise ValueError(f"{pattern!r} is not ASCII; write it as browsers send it: {host.encode('idna').decode()!r}")
    address = name.startswith("[")
    if (address and not name.endswith("]")) or (not address and ":" in name):
        raise ValueError(f"{pattern!r} has a port, or is an IPv6 address without brackets; ports do not matter here")
    if "*" in name or not well_formed_host(name.encode()) or not host_name(name.encode()):
        raise ValueError(f"{pattern!r} is not like 'shop.example', '*.shop.example' or '[::1]'")
    return host.removesuffix(name) + host_name(name.encode())


def host_name(value: bytes) -> str:
    """The host of a ``Host`` field without its port, in one spelling."""
    text = value.decode("latin-1").lower()
    if text.startswith("["):
        try:
            return f"[{ipaddress.IPv6Address(text[1:].partition(']')[0])}]"
        except ValueError:
            return ""
    return text.partition(":")[0].removesuffix(".")


class HostList:
    """The hosts that are served, by name or by ``*.`` and the name above; any if there is none.

    Example:
        >>> hosts = HostList(["shop.example", "*.shop.example"])
        >>> hosts.serves(b"SHOP.example:8443"), hosts.serves(b"eu.shop.example"), hosts.serves(b"evilshop.example")
        (True, True, False)
    """

    def __init__(self, patterns: Iterable[str] = ()) -> None:
        patterns = [checked_host(pattern) for pattern in patterns]
        self._any = not patterns or "*" in patterns
        self._names = frozenset(patterns)
        self._endings = tuple(pattern[1:] for pattern in patterns if pattern.startswith("*."))

    def serves(self, host: bytes) -> bool:
        """Whether the host of a ``Host`` field is one of them."""
        if self._any:
            return True
        name = host_name(host)
        # "*.shop.example" is not a name; a client that sends it literally is none of ours.
        return "*" not in name and (name in self._names or name.endswith(self._endings))


def well_formed_host(host: bytes) -> bool:
    """Whether this is what a ``Host`` field may be: a name or an address, perhaps with a port."""
    if host.lower().translate(None, _HOST_BYTES):
        return False
    name, colon, port = host.rpartition(b":") if not host.endswith(b"]") and b":" in host else (host, b"", b"")
    if colon and port and not port.isdigit():
        return False
    if name.startswith(b"["):
        return name.endswith(b"]") and bool(host_name(name))
    return not any(c in name for c in b":[]")


PATH_FINDINGS: tuple[tuple[str, str], ...] = (
    ("path_nulls", "The path has a null byte."),
    ("path_traversal", "The path climbs out of its directory."),
    ("path_backslashes", "The path has a backslash."),
    ("path_encoded_slashes", "The path has an encoded slash."),
    ("path_parameters", "The path has a semicolon."),
    ("path_empty_segments", "The path has an empty segment."),
)
"""What can be suspicious about a path, and the sentence that says so."""

# Each unmasks one layer; who encodes more often than this is not read by anybody.
_DECODINGS = 4
_OVERLONG = (b"\xc0", b"\xc1", b"\xe0\x80", b"\xf0\x80\x80")


def path_findings(raw: bytes) -> frozenset[str]:
    """What is suspicious about a path as it was sent, by the names in ``PATH_FINDINGS``.

    Example:
        >>> sorted(path_findings(b"/files/%252e%252e%255cetc"))
        ['path_backslashes', 'path_traversal']
        >>> path_findings(b"/files/a..b/...;v=1")
        frozenset({'path_parameters'})
    """
    found = set()
    if b"%2f" in raw.lower():
        found.add("path_encoded_slashes")
    if b";" in raw:
        found.add("path_parameters")
    if b"//" in raw:
        found.add("path_empty_segments")
    for _ in range(_DECODINGS):
        if b"\0" in raw:
            found.add("path_nulls")
        if b"\\" in raw:
            found.add("path_backslashes")
        # "..;" is what some servers make ".." of.
        segments = raw.replace(b"\\", b"/").split(b"/")
        if any(s == b".." or s.startswith(b"..;") for s in segments) or any(o in raw for o in _OVERLONG):
            found.add("path_traversal")
        decoded = unquote_to_bytes(raw)
        if decoded == raw:
            break
        raw = decoded
    return frozenset(found)


def target_findings(path: str, raw_path: bytes | None) -> frozenset[str]:
    """What is suspicious about a path as it was sent, and about the one that the router goes by, if they differ."""
    routed = _bytes_of(path)
    found = path_findings(_divided(routed if raw_path is None else raw_path)[1])
    if raw_path is not None and unquote_to_bytes(raw_path) != routed:
        # Somebody has rewritten it.
        found |= path_findings(_divided(routed)[1])
    return found


def authority_of(path: str) -> tuple[bytes, ...]:
    """The host of a target that is a whole URL, which h11 hands on as the path; none of any other."""
    return _divided(_bytes_of(path))[0]


def _bytes_of(path: str) -> bytes:
    return path.encode("utf-8", "surrogateescape")


def _divided(target: bytes) -> tuple[tuple[bytes, ...], bytes]:
    scheme, separator, rest = target.partition(b"://")
    if not separator or b"/" in scheme:
        return (), target
    authority, _, path = rest.partition(b"/")
    return (authority,), b"/" + path


ENDLESS = 2**63
"""More than anything has."""

_DIGITS = 18


def length_of(value: bytes) -> int:
    """The number in a ``Content-Length``; 0 where there is none, more than endless where it is not worth reading."""
    if not value.isdigit():
        return 0
    # Reading a number takes a time that grows with the square of its digits.
    return int(value) if len(value) <= _DIGITS else ENDLESS + 1


def framing_mistake(version: str | None, lengths: list[bytes], codings: list[bytes]) -> str | None:
    """Why two servers may not agree where a body ends (RFC 9112, section 6.3); ``None`` if they will.

    Args:
        version: The version of HTTP, as the server tells it.
        lengths: The values of every ``Content-Length``.
        codings: The values of every ``Transfer-Encoding``.
    """
    if codings and lengths:
        return "The request has both Content-Length and Transfer-Encoding."
    if codings and (version == "1.0" or [coding.strip().lower() for coding in codings] != [b"chunked"]):
        return "The Transfer-Encoding is not one that is read here."
    if len(set(lengths)) > 1:
        return "The request has several Content-Length fields that differ."
    return None if all(value.isdigit() for value in lengths) else "The Content-Length is not a number."


def is_of_type(media_type: str, pattern: str) -> bool:
    """Whether a type is this one, or of this kind, such as ``image/*`` or ``application/*+json``."""
    kind, _, subtype = pattern.partition("/")
    if not subtype.startswith("*"):
        return media_type == pattern
    return media_type.startswith(f"{kind}/") and media_type.endswith(subtype[1:])


def media_type_of(content_type: bytes | None) -> str:
    """The type without its parameters, in lower case; empty where there is none."""
    return (content_type or b"").partition(b";")[0].strip().lower().decode("latin-1")
