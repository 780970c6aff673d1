"""Where the shared store is: the URL of a Redis or Valkey server, of its sentinels, or of a cluster, taken apart.

URLs are those of redis-py, and for several servers those of ``limits``: ``redis://host:6379/0``, ``rediss://`` with
TLS, ``unix:///path``, ``redis+sentinel://host:26379,host:26379/service/0`` and ``redis+cluster://host:6379,host:6379``.

Example:
    >>> read_address("rediss+sentinel://:secret@a.example,b.example:26380/orders").where
    'rediss+sentinel://a.example:26379,b.example:26380'
"""

import re
from typing import Any, Literal, NamedTuple
from urllib.parse import parse_qsl, unquote

from fastapi_hardening.core.configuration import did_you_mean

_SCHEMES: dict[str, tuple[Literal["server", "sentinel", "cluster"], str]] = {
    "redis": ("server", "redis"),
    "valkey": ("server", "redis"),
    "rediss": ("server", "rediss"),
    "valkeys": ("server", "rediss"),
    "unix": ("server", "unix"),
    "redis+sentinel": ("sentinel", "redis"),
    "rediss+sentinel": ("sentinel", "rediss"),
    "redis+cluster": ("cluster", "redis"),
    "rediss+cluster": ("cluster", "rediss"),
}
_OPTIONS = ("ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_check_hostname", "ssl_keyfile")
_OPTIONS_OF_SENTINELS = ("sentinel_username", "sentinel_password")
# Not a word of the URL: a password with a slash or a question mark in it ends up anywhere.
_SPECIAL_CHARACTERS = "has no host:port where one belongs; write special characters of a password as %2F, %3F, %40"
_PORTS = {"server": 6379, "sentinel": 26379, "cluster": 6379}
_HOST = re.compile(r"(?P<host>\[[0-9a-fA-F:.]+\]|[^\s:@/\[\]]+)(?::(?P<port>\d{1,5}))?")


class Address(NamedTuple):
    """What a URL says about where the store is.

    Attributes:
        kind: One server, the sentinels of one, or a cluster.
        scheme: ``redis``, ``rediss`` or ``unix``.
        hosts: Names or addresses with ports; none for a socket.
        path: Of a socket its path, for sentinels the name of the service.
        database: The number of the database.
        username: For the server, not for the sentinels.
        password: For the server, not for the sentinels.
        options: What stands behind the question mark: ``ssl_...`` and ``sentinel_...``.
    """

    kind: Literal["server", "sentinel", "cluster"]
    scheme: str
    hosts: tuple[tuple[str, int], ...]
    path: str
    database: int
    username: str | None
    password: str | None
    options: dict[str, Any]

    @property
    def where(self) -> str:
        """The address as a log may have it: without names and secrets."""
        hosts = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts)
        kind = "" if self.kind == "server" else f"+{self.kind}"
        return f"{self.scheme}{kind}://{hosts or self.path}"


def read_address(url: str) -> Address:
    """Takes a URL apart.

    Raises:
        ValueError: It leads to no store; the message shows nothing of a password.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or scheme.lower() not in _SCHEMES:
        shown = repr(scheme) if separator else "a text without '://'"
        raise ValueError(
            f"begins with redis://, rediss:// (TLS), unix://, redis+sentinel:// or redis+cluster://, not with {shown}"
        )
    kind, plain = _SCHEMES[scheme.lower()]
    rest, _, query = rest.partition("?")
    place, _, path = rest.partition("/")
    if "@" in path or "@" in query:
        raise ValueError(_SPECIAL_CHARACTERS)
    credentials, at, place = place.rpartition("@")
    username, _, password = credentials.partition(":")
    options = _options(kind, query)
    database = options.pop("db", "0")
    if plain == "unix":
        path = f"/{unquote(path)}"
        if place or path == "/":
            raise ValueError("a unix:// URL has three slashes and a path: unix:///run/redis.sock")
    else:
        path, _, number = path.partition("/") if kind == "sentinel" else ("", "", path)
        database = number or database
        if kind == "sentinel" and not path:
            raise ValueError("names the service that the sentinels watch: redis+sentinel://host:26379/mymaster")
    hosts = [] if plain == "unix" else [_host(each, _PORTS[kind]) for each in place.split(",")]
    if kind == "server" and len(hosts) > 1:
        raise ValueError("has several hosts: begin it with redis+sentinel:// or redis+cluster://")
    if not database.isdecimal() or (kind == "cluster" and int(database)):
        raise ValueError("ends in the number of a database, such as /0 (a cluster has no other)")
    return Address(
        kind,
        plain,
        tuple(hosts),
        path,
        int(database),
        unquote(username) or None if at else None,
        unquote(password) or None if at else None,
        options,
    )


def _host(text: str, port: int) -> tuple[str, int]:
    matched = _HOST.fullmatch(text)
    if matched is None or int(matched["port"] or port) > 65535:  # noqa: PLR2004 - the last port there is
        raise ValueError(_SPECIAL_CHARACTERS)
    return matched["host"].strip("[]"), int(matched["port"] or port)


def _options(kind: str, query: str) -> dict[str, Any]:
    known = ("db", *_OPTIONS, *(_OPTIONS_OF_SENTINELS if kind == "sentinel" else ()))
    options: dict[str, Any] = dict(parse_qsl(query))
    for option in options:
        if option not in known:
            raise ValueError(f"has an unknown option {option!r}{did_you_mean(option, known)}")
    if "ssl_check_hostname" in options:
        options["ssl_check_hostname"] = options["ssl_check_hostname"].lower() in ("1", "true", "yes")
    return options
