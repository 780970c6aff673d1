"""Origins: how they are written, which of them a list or a pattern takes in, and what a request says of its own.

An origin that is written carelessly lets in everybody: a prefix, a suffix, a dot that stands for any character. So what
cannot be meant is refused with what to write instead, and what is sent is compared byte by byte, as browsers do. It is
*not* CORS: nothing here knows what follows from an origin, in which field, or whether cookies go along.

Example:
    >>> checked_origin("HTTPS://*.Shop.example")
    'https://*.shop.example'
    >>> origins = OriginList(["https://*.shop.example"])
    >>> origins.admits(b"https://www.shop.example"), origins.admits(b"https://shop.example.evil.example")
    (True, False)
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

ANY = "*"
"""Stands for every origin, and in other lists for every method or field."""

# What a browser sends: scheme, host and a port that is not the scheme's own; in lower case, names as punycode.
_ORIGIN = re.compile(
    r"[a-z][a-z0-9+.-]*://(?:[a-z0-9_-]+(?:\.[a-z0-9_-]+)*|\[[0-9a-f:.]+\])(?::[1-9][0-9]{0,4})?", re.ASCII
)
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}
# A name has at most 253 characters; what is longer is no origin, and is not shown to a pattern that may be slow.
_LONGEST = 300


def checked_origin(text: str) -> str:
    """An origin, or a wildcard for the subdomains of one, as browsers write it.

    Raises:
        ValueError: It is no origin, or not one that a browser would send; the message says what to write.
    """
    if text.lower() == "null":
        raise ValueError(
            "'null' is what every sandboxed frame and local file sends, of any site; serve the page from an origin"
        )
    scheme, separator, rest = text.partition("://")
    if not separator:
        local = text.startswith(("localhost", "127.", "[::1]"))
        guess = f"{'http' if local else 'https'}://{text}".lower()
        meant = f"; did you mean {guess!r}?" if _ORIGIN.fullmatch(guess.replace("*.", "", 1)) else ""
        raise ValueError(f"{text!r} has no scheme, as in 'https://example.com'{meant}")
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    origin = f"{scheme}://{authority}".lower()
    if authority != rest:
        raise ValueError(f"{text!r}: an origin ends after host and port; did you mean {origin!r}?")
    port = _DEFAULT_PORTS.get(scheme.lower())
    if port is not None and origin.endswith(port):
        raise ValueError(f"{text!r}: browsers leave out the default port; did you mean {origin[: -len(port)]!r}?")
    if not origin.isascii():
        raise ValueError(f"{text!r}: browsers send names as punycode{_punycode(scheme, authority)}")
    host = origin.replace("://*.", "://", 1)
    if host.endswith(":*"):
        raise ValueError(rf"{text!r}: for any port write allow_origin_regex='{re.escape(host[:-2])}(:\d+)?'")
    if "*" in host:
        raise ValueError(f"{text!r}: '*' stands for subdomains only, as in 'https://*.example.com'")
    if not _ORIGIN.fullmatch(host):
        raise ValueError(f"{text!r} is no origin like 'https://example.com' or 'http://localhost:3000'")
    if host != origin and "." not in host and "://localhost" not in host:
        raise ValueError(f"{text!r} takes in a whole top-level domain; name the domain, as in 'https://*.example.com'")
    return origin


def _punycode(scheme: str, authority: str) -> str:
    try:
        return f"; did you mean '{scheme}://{authority.encode('idna').decode('ascii')}'?"
    except UnicodeError:
        return ""


# Any text, followed by a letter or by nothing: what precedes a name, or what follows it, is then anybody's.
_OPEN_END = re.compile(r"(?<!\\)\.(?:[*+]|\{[^}]*\})[?+]?(?=[A-Za-z0-9]|\)*(?:\$|\\Z)?$)")
_NOBODYS = ("https://b9f3.invalid", "http://b9f3.invalid", "https://b9f3.invalid:8443", "https://b9f3.example.invalid")


def checked_pattern(pattern: str) -> str:
    """A pattern for origins that is not wider than it looks.

    Raises:
        ValueError: It is no pattern, a dot in it is not escaped, or it also matches origins of anybody.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"'{pattern}' is no regular expression: {error}") from None
    if any(compiled.fullmatch(origin) for origin in _NOBODYS):
        raise ValueError(f"'{pattern}' matches everybody's origins; name yours, or write allow_origins='*'")
    escaped = _with_dots_escaped(pattern)
    if escaped != pattern:
        # Not by its repr, which would double the backslashes of what is to be copied.
        raise ValueError(f"'{pattern}': a dot that is not escaped stands for any character; did you mean '{escaped}'?")
    if _OPEN_END.search(pattern):
        raise ValueError(
            f"'{pattern}' also matches names that only begin or end like yours; for subdomains write "
            r"'https://(.+\.)?example\.com', for ports '(:\d+)?'"
        )
    return pattern


def _with_dots_escaped(pattern: str) -> str:
    """The pattern with every dot escaped that stands for a single character; ``.*`` is meant as it is."""
    written: list[str] = []
    in_class = False
    escaped = False
    for position, sign in enumerate(pattern):
        if escaped:
            escaped = False
        elif sign == "\\":
            escaped = True
        elif sign in "[]":
            in_class = sign == "["
        elif sign == "." and not in_class and pattern[position + 1 : position + 2] not in ("*", "+", "{"):
            written.append("\\")
        written.append(sign)
    return "".join(written)


class OriginList:
    """The origins that are taken: by name, by ``*.`` and the name above, by a pattern, or every one.

    Args:
        origins: As :func:`checked_origin` returns them, or ``*``.
        pattern: As :func:`checked_pattern` returns it; it must match the whole origin.
    """

    def __init__(self, origins: Iterable[str] = (), pattern: str | None = None) -> None:
        given = [origin.encode("ascii") for origin in origins]
        self.everybody = ANY.encode("ascii") in given
        self.exact = frozenset(origin for origin in given if b"*" not in origin)
        # The scheme, and how the host and the port end.
        self._subdomains = [
            (scheme + b"://", rest[1:]) for scheme, _, rest in (o.partition(b"://") for o in given) if b"*." in rest
        ]
        self._pattern = re.compile(pattern) if pattern else None
        self._judges = bool(self._subdomains) or self._pattern is not None

    def admits(self, origin: bytes) -> bool:
        """Whether this origin is one of them."""
        return self.everybody or origin in self.exact or self.matches(origin)

    def matches(self, origin: bytes) -> bool:
        """Whether it is one of those that are not named one by one."""
        if not self._judges:
            return False
        text = origin.decode("latin-1")
        if len(text) > _LONGEST or not _ORIGIN.fullmatch(text):
            return False
        for scheme, end in self._subdomains:
            if origin.startswith(scheme) and origin.endswith(end) and len(origin) > len(scheme) + len(end):
                return True
        return self._pattern is not None and self._pattern.fullmatch(text) is not None


class Preflight(NamedTuple):
    """What a browser asks before a call that an HTML form could not make.

    Attributes:
        origin: The origin of the page.
        method: The method that the call will have.
        headers: The names of the fields that it will send, separated by commas.
        private_network: It comes from a public page to a server in a private network.
    """

    origin: bytes
    method: bytes
    headers: bytes = b""
    private_network: bool = False

    @classmethod
    def of(cls, headers: Iterable[tuple[bytes, bytes]], origin: bytes) -> "Preflight | None":
        """The question in the fields of an ``OPTIONS`` request; ``None`` if it is an ordinary one."""
        asked: dict[bytes, bytes] = {}
        for name, value in headers:
            if name.startswith(b"access-control-request-"):
                asked[name] = asked[name] + b"," + value if name in asked else value
        method = asked.get(b"access-control-request-method")
        if method is None:
            return None
        fields = asked.get(b"access-control-request-headers", b"")
        return cls(origin, method, fields, b"access-control-request-private-network" in asked)


def origin_of(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """The origin that a request names, ``None`` without one; two make an origin that nobody has."""
    found: bytes | None = None
    for name, value in headers:
        if name == b"origin":
            found = value if found is None else b""
    return found


_FROM_BROWSERS = (b"basic", b"digest", b"negotiate", b"ntlm")


def has_browser_credentials(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether a request carries what a browser adds by itself, whoever's page it is: cookies, or a login it keeps."""
    for name, value in headers:
        if name == b"cookie":
            return True
        if name == b"authorization" and value.partition(b" ")[0].lower() in _FROM_BROWSERS:
            return True
    return False


_OWN_PORTS = {b"http": b":80", b"https": b":443"}


def is_same_origin(origin: bytes, headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether the page comes from the host that its request goes to, or its browser says so.

    The scheme is not compared, for behind a proxy it is not known. ``X-Forwarded-Host`` counts as well: anybody may
    write it, except a page, and it is pages that this is about.
    """
    scheme, _, authority = origin.lower().partition(b"://")
    port = _OWN_PORTS.get(scheme, b":")
    for name, value in headers:
        if name == b"sec-fetch-site" and value == b"same-origin":
            return True
        if name in (b"host", b"x-forwarded-host"):
            for host in value.lower().split(b","):
                if authority and host.strip().removesuffix(port) == authority:
                    return True
    return False
