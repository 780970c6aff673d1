"""What the standards say of stored answers, as functions of header fields: RFC 9111 (caching), RFC 9110 (conditions).

Example:
    >>> lifetime_of(200, [(b"cache-control", b"max-age=60, stale-while-revalidate=30")])
    Lifetime(fresh=60.0, revalidate=30.0, on_error=None)
    >>> lifetime_of(200, [(b"set-cookie", b"session=1")])
    'set-cookie'
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from email.utils import parsedate_to_datetime
from typing import NamedTuple

from fastapi_hardening.core.headers import RawHeaders, get, get_all

STORABLE = frozenset({200, 203, 301, 308, 404, 410})
"""The statuses that may be kept here; of those that RFC 9110 (15.1) calls heuristically cacheable."""

ABSENT = frozenset({404, 410})
"""Those that say that there is nothing."""

# RFC 9110, section 5.6.2 to 5.6.4: a token, perhaps with a value, which may be quoted.
_DIRECTIVE = re.compile(
    r"""([!#$%&'*+\-.^_`|~0-9a-z]+)(?:=(?:"((?:[^"\\]|\\.)*)"|([^\s,;"]*)))?\s*(?:,|\Z)""", re.IGNORECASE
)
_ETAG = re.compile(rb'(?:W/)?"[\x21\x23-\x7e\x80-\xff]*"')
_LONGEST_SECONDS = 2**31

# What a 304 repeats of the answer that it stands for (RFC 9110, section 15.4.5), and what else is safe to.
_ON_NOT_MODIFIED = frozenset(
    {b"cache-control", b"content-location", b"date", b"etag", b"expires", b"vary", b"last-modified", b"link"}
)


class Lifetime(NamedTuple):
    """How long an answer may be used, in seconds; ``None`` where it does not say.

    Attributes:
        fresh: As good as new.
        revalidate: After that, while a fresh one is made.
        on_error: After that, when none can be made.
    """

    fresh: float | None
    revalidate: float | None
    on_error: float | None


def directives(values: Iterable[bytes]) -> dict[str, str | None]:
    """What ``Cache-Control`` says, names in lower case; of one that stands twice the first counts (RFC 9111, 4.2.1)."""
    found: dict[str, str | None] = {}
    for name, quoted, plain in _DIRECTIVE.findall(b", ".join(values).decode("latin-1")):
        found.setdefault(name.lower(), quoted or plain or None)
    return found


def seconds(text: str | None) -> float | None:
    """Delta-seconds (RFC 9111, section 1.2.2); 0 for what is no number, so that it is stale; ``None`` for none."""
    if text is None:
        return None
    return float(min(int(text[:12]), _LONGEST_SECONDS)) if text.isascii() and text.isdigit() else 0.0


def lifetime_of(status: int, headers: RawHeaders, *, private: bool = False) -> Lifetime | str:
    """How long an answer may be used, or why it may not be kept.

    Args:
        status: Its status.
        headers: Its fields, names in lower case.
        private: It is kept for one caller alone.
    """
    said = directives(get_all(headers, b"cache-control"))
    reason = _forbidden(status, headers, said, private=private)
    if reason is not None:
        return reason
    fresh = seconds(said["max-age"]) if "max-age" in said else None
    shared = not private and "s-maxage" in said
    if shared:
        fresh = seconds(said["s-maxage"])
    if "max-age" in said and fresh is None:
        fresh = 0.0
    if fresh is None and get(headers, b"expires") is not None:
        fresh = _until_expires(headers)
    # RFC 9111, 5.2.2.2, 5.2.2.8 and 5.2.2.10: never stale, whatever else is said.
    if shared or "must-revalidate" in said or (not private and "proxy-revalidate" in said):
        return Lifetime(fresh, 0.0, 0.0)
    return Lifetime(fresh, seconds(said.get("stale-while-revalidate")), seconds(said.get("stale-if-error")))


def _forbidden(status: int, headers: RawHeaders, said: Mapping[str, str | None], *, private: bool) -> str | None:
    """Why an answer may not be kept, if it may not."""
    names = {name for name, _ in headers}
    types = get_all(headers, b"content-type")
    reasons = {
        "status": status not in STORABLE,
        "set-cookie": b"set-cookie" in names,
        "partial": b"content-range" in names,
        "stream": any(value.strip().lower().startswith(b"text/event-stream") for value in types),
        "vary": any(b"*" in value for value in get_all(headers, b"vary")),
        "no-store": "no-store" in said,
        "no-cache": "no-cache" in said,
        "private": "private" in said and not private,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _until_expires(headers: RawHeaders) -> float:
    """The seconds from ``Date`` to ``Expires``; 0 where either cannot be read, as RFC 9111 (5.3) wants it."""
    expires, date = _time(get(headers, b"expires")), _time(get(headers, b"date"))
    return 0.0 if expires is None or date is None else min(max(0.0, expires - date), _LONGEST_SECONDS)


def _time(value: bytes | None) -> float | None:
    """A date of HTTP in seconds since the epoch."""
    if value is None:
        return None
    try:
        return parsedate_to_datetime(value.decode("ascii")).timestamp()
    except (ValueError, OverflowError):
        return None


def varies_by(headers: RawHeaders) -> tuple[bytes, ...]:
    """The request fields that an answer depends on, in lower case and sorted."""
    names = b",".join(get_all(headers, b"vary")).split(b",")
    return tuple(sorted({name.strip().lower() for name in names} - {b""}))


def variant(names: tuple[bytes, ...], request: RawHeaders) -> str:
    """What a request has in these fields, as a part of a key: blanks around values do not count."""
    digest = hashlib.blake2b(digest_size=16)
    for name in names:
        for value in get_all(request, name):
            digest.update(b"%d:%d:" % (len(name), len(value.strip())) + name + value.strip())
        digest.update(b";")
    return digest.hexdigest()


def strong_etag(body: bytes) -> bytes:
    """The entity tag of a body that has none."""
    return b'"%b"' % hashlib.blake2b(body, digest_size=12).hexdigest().encode("ascii")


def weakened(etag: bytes) -> bytes:
    """The entity tag of what means the same, but not byte for byte (RFC 9110, section 8.8.1)."""
    return etag if etag.startswith(b"W/") else b"W/" + etag


def not_modified(request: Mapping[bytes, bytes], headers: RawHeaders) -> bool:
    """Whether the client has the answer already (RFC 9110, section 13.2.2).

    Args:
        request: ``if-none-match`` and ``if-modified-since``, as far as they are there.
        headers: The fields of the answer.
    """
    asked = request.get(b"if-none-match")
    if asked is not None:
        etag = get(headers, b"etag")
        if asked.strip() == b"*":
            return True
        # If-None-Match compares weakly.
        return etag is not None and weakened(etag) in {weakened(each) for each in _ETAG.findall(asked)}
    since, modified = _time(request.get(b"if-modified-since")), _time(get(headers, b"last-modified"))
    return since is not None and modified is not None and modified <= since


def on_not_modified(headers: RawHeaders) -> RawHeaders:
    """The fields that a 304 repeats."""
    return [pair for pair in headers if pair[0] in _ON_NOT_MODIFIED]
