"""Tells the requests that a page of another site had a browser send from those that the user meant.

Browsers send cookies and Basic credentials along whoever asks for the request, so a page anywhere can act for its
visitor (CSRF). They also say where a request comes from: ``Sec-Fetch-Site`` since 2023, ``Origin`` long before. That is
the whole of the protection, with no token to embed and to lose; the rules are those of Go's ``CrossOriginProtection``
(Go 1.25). It is *not* needed where the credentials are sent by the page itself, such as a bearer token.

Example:
    >>> protection = CrossSite(["https://partner.example"])
    >>> protection.allows("POST", [(b"sec-fetch-site", b"cross-site"), (b"origin", b"https://evil.example")])
    False
    >>> protection.allows("POST", [(b"sec-fetch-site", b"cross-site"), (b"origin", b"https://partner.example")])
    True
"""

from collections.abc import Iterable

from fastapi_hardening.core.origins import OriginList, origin_of

_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_OURS = frozenset({b"same-origin", b"none"})


class CrossSite:
    """Decides by the fields of a request.

    Args:
        trusted_origins: Origins whose pages may send requests all the same.
    """

    def __init__(self, trusted_origins: Iterable[str] = ()) -> None:
        self._trusted = OriginList(trusted_origins)

    def allows(self, method: str, headers: Iterable[tuple[bytes, bytes]], *, secure: bool = False) -> bool:
        """Whether the request may act with credentials that the browser added by itself.

        What changes nothing (GET, HEAD, OPTIONS) always may. A request with neither field was not sent by a browser of
        today, so nobody's credentials were added to it. Where only ``Origin`` is there, its host must be that of the
        request, and its scheme https where the connection is known to be.
        """
        if method in _SAFE:
            return True
        headers = list(headers)
        site = _one(headers, b"sec-fetch-site")
        origin = origin_of(headers)
        if site in _OURS:
            return True
        if site is not None:
            return origin is not None and self._trusted.admits(origin)
        return origin is None or self._is_ours(origin, headers, secure=secure)

    def allows_websocket(self, headers: Iterable[tuple[bytes, bytes]], *, secure: bool = False) -> bool:
        """Whether a handshake may: browsers ask nobody before they open a websocket, so ``Origin`` must be there."""
        headers = list(headers)
        origin = origin_of(headers)
        return origin is not None and self._is_ours(origin, headers, secure=secure)

    def _is_ours(self, origin: bytes, headers: list[tuple[bytes, bytes]], *, secure: bool) -> bool:
        if self._trusted.admits(origin):
            return True
        scheme, separator, host = origin.partition(b"://")
        if not separator or not host or (secure and scheme.lower() != b"https"):
            return False
        return host.lower() == (_one(headers, b"host") or b"").lower()


def _one(headers: list[tuple[bytes, bytes]], name: bytes) -> bytes | None:
    """The value of a field; of several that differ one that means nothing, so that none of them is believed."""
    values = {value for key, value in headers if key == name}
    if not values:
        return None
    return values.pop() if len(values) == 1 else b""
