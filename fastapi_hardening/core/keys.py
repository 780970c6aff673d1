"""Whose budget it is: the text that a limit is counted by, and a ban holds for.

A client is an address, or whoever the layers in front have found out: a principal, a credential, a tenant. A caller for
whom a key gives nothing is counted by address, so that not to be known is no way round a limit. Every text but an
address says of which kind it is (``principal=anna``): nobody passes for somebody else by writing his key.

Example:
    >>> check_key("principal, address")
    ('principal', 'address')
    >>> counted("header:x-api-key", "k1"), len(counted("session", "long" * 100))
    ('header:x-api-key=k1', 40)
"""

import hashlib
import inspect
from collections.abc import Awaitable, Callable, Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from starlette.requests import HTTPConnection
from starlette.types import Scope

from fastapi_hardening.core import headers as header_fields
from fastapi_hardening.core.client_ip import UNIX, ClientAddress, parse_address, parse_network
from fastapi_hardening.core.context import RequestContext

if TYPE_CHECKING:
    from fastapi_hardening.core.identity import Principal

OneKey = str | Callable[[HTTPConnection], str | None] | Callable[[HTTPConnection], Awaitable[str | None]]
Key = OneKey | tuple[OneKey, ...]

_NAMED = ("address", "principal", "credential", "tenant")
_LONGEST = 64


def check_key(key: Key) -> Key:
    """A key as it is meant: a text with commas is several.

    Raises:
        ValueError: It is none; with what a key looks like.
    """
    if isinstance(key, str) and "," in key:
        key = tuple(part.strip() for part in key.split(","))
    parts: tuple[Any, ...] = tuple(key) if isinstance(key, (tuple, list)) else (key,)
    for part in parts or ("",):
        if isinstance(part, str) and part.startswith("header:"):
            header_fields.field(part.removeprefix("header:"), "x")
        elif part not in _NAMED and not callable(part):
            raise ValueError(
                f"{part!r} is no key; use 'address', 'principal', 'credential', 'tenant', 'header:X-API-Key', a "
                "function of the connection, or several of them"
            )
    return parts if len(parts) > 1 else parts[0]


async def key_of(key: Key, scope: Scope, context: RequestContext) -> str:
    """The text that a request is counted by. Whoever cannot be told apart shares one with its like.

    Args:
        key: A key that was checked; of several, each combination is counted by itself.
        scope: The connection.
        context: What is known about it.
    """
    if key == "address":
        return context.client.key
    if not isinstance(key, tuple):
        return await _one(key, scope, context) or context.client.key
    texts = [await _one(part, scope, context) or context.client.key for part in key]
    different = list(dict.fromkeys(texts))
    # Doubled inside a part, so that no part can look like two.
    return different[0] if len(different) == 1 else " + ".join(text.replace("+", "++") for text in different)


def counted(kind: str, value: str) -> str:
    """A value with its kind in front; a long one in a short form, for it may be as long as the client likes."""
    if len(value) > _LONGEST:
        value = hashlib.blake2b(value.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return f"{kind}={value}"


def name_of(function: Any) -> str:
    """What the values of a function are called: by its own name."""
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def stands_for_one(key: str, client: ClientAddress) -> bool:
    """Whether a key is one client: an address may be that of a proxy with everybody behind it, or no address at all."""
    return key != client.key or (
        client.known and not client.behind_unknown_proxy and parse_address(client.address) is not None
    )


async def _one(key: OneKey, scope: Scope, context: RequestContext) -> str | None:
    if isinstance(key, str):
        if key == "address":
            return context.client.key
        if not key.startswith("header:"):
            return _identified(key, context)
        name = key.removeprefix("header:").lower()
        value = header_fields.get(scope["headers"], name.encode("ascii"))
        return counted(f"header:{name}", value.decode("latin-1")) if value else None
    answer = key(HTTPConnection(scope))
    found = await answer if inspect.isawaitable(answer) else answer
    return counted(name_of(key), found) if found else None


def _identified(kind: str, context: RequestContext) -> str | None:
    principal: Principal | None = context.principal
    if kind == "tenant":
        tenant = context.tenant or (principal and principal.tenant)
        return counted(kind, tenant) if tenant else None
    if principal is None:
        return None
    # A subject is unique for its issuer only; a local one cannot be written so that it looks like a foreign one.
    issuer = f"@{principal.issuer}" if principal.issuer else ""
    if kind == "credential" and principal.credential:
        return counted(f"credential/{principal.scheme}{issuer}", principal.credential)
    return counted(f"principal{issuer}", principal.id)


class AllowList:
    """Who is never limited nor banned: addresses, networks, and keys as limits count by.

    Args:
        entries: Addresses, CIDR networks, ``unix``, and keys such as ``principal=monitor``.

    Raises:
        ValueError: An entry is neither.

    Example:
        >>> allowed = AllowList(["10.0.0.0/8", "principal=monitor"])
        >>> allowed.has_address("10.1.2.3"), allowed.has_address("11.1.2.3"), allowed.has_key("principal=monitor")
        (True, False, True)
    """

    def __init__(self, entries: Iterable[str]) -> None:
        entries = tuple(entries)
        self._keys = frozenset(entry for entry in entries if "=" in entry)
        self._literal = UNIX in entries
        self._networks = [parse_network(entry) for entry in entries if entry not in self._keys and entry != UNIX]
        self.has_address = lru_cache(maxsize=4096)(self._has_address)

    def has_key(self, key: str) -> bool:
        """Whether a key is in the list."""
        return key in self._keys

    def _has_address(self, address: str) -> bool:
        if address == UNIX:
            return self._literal
        ip = parse_address(address)
        return ip is not None and any(ip in network for network in self._networks)
