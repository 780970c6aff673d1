"""Server-side request forgery: an address that only the server can reach.

A value that is a URL as a whole, and whose host is this machine, its network or the metadata service of a cloud, in any
notation; or a scheme that no client has a use for. A text that mentions ``http://localhost`` is none.

It is *not* the control: where an application calls what a client names, it takes ``HttpUrl`` and checks the address
that it really connects to.
"""

from collections.abc import Iterator

from fastapi_hardening.core.private_address import is_private_host
from fastapi_hardening.security.input_validation.pattern import Pattern
from fastapi_hardening.security.input_validation.reading import Reading

CLASS = "ssrf"
CERTAIN = 5

_URL = Pattern(
    r"\s{0,8}(?:url=)?(https?|ftps?|wss?|gopher|dict|ldaps?|tftp|sftp|rmi|nfs|smb|imap|pop3|"
    r"telnet|redis):[/\\]{1,4}([^\s/\\?#]{1,300})"
)
_WEB = frozenset(("http", "https", "ws", "wss", "ftp", "ftps", "sftp"))
_PROTOCOL_SMUGGLING = frozenset(("gopher", "dict", "tftp"))
_PORT = Pattern(r":\d{0,5}$")


def find(reading: Reading) -> Iterator[tuple[str, int]]:
    """Where a URL would send the server, with a score."""
    lower = reading.lower
    if ":" not in lower:
        return
    reading.steps += min(len(lower), 400)
    match = _URL.match(lower)
    if match is None:
        return
    scheme, authority = match.groups()
    host = _PORT.sub("", authority.rpartition("@")[2])
    if scheme in _PROTOCOL_SMUGGLING:
        yield "scheme", CERTAIN
    if (
        "@" in authority
        and is_private_host(_PORT.sub("", authority.partition("@")[0]))
        and authority.partition("@")[0].count(".")
    ):
        yield "private-address", CERTAIN
    elif is_private_host(host):
        yield "private-address" if scheme in _WEB else "private-service", CERTAIN
