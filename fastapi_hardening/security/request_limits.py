"""Refuses requests that are too large, too slow, too deep or not what they seem, before they cost anything.

It protects memory and workers from bodies without end, bodies that drip and JSON that nests without end; the router
and the file system from paths that mean another file; links and caches from foreign ``Host`` fields; and everybody
behind the same proxy from requests that two servers cut at different places (request smuggling). It is *not* a
validator, which looks at content; nor can it stop slow *header fields*: a server calls its application only when it has
all of them, so that is the proxy's work.

It sits below shedding and above everything that would look at the request, for most of this needs one look at the
header fields. The body is counted where the application asks for it, in ``receive``; nothing is ever buffered.

Example:
    >>> from fastapi import FastAPI
    >>> from fastapi_hardening.security.request_limits import (
    ...     RequestLimits,
    ...     RequestLimitsMiddleware,
    ...     RequestLimitsSettings,
    ... )
    >>> app = FastAPI()
    >>> app.add_middleware(RequestLimitsMiddleware, settings=RequestLimitsSettings(max_body_bytes=1_000_000))
    >>> @app.post("/films", dependencies=[RequestLimits(max_body_bytes=None)])
    ... async def upload() -> str:
    ...     return "as large as you like"
"""

import asyncio
import ipaddress
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Annotated, Any, ClassVar, Literal, NamedTuple
from urllib.parse import unquote_to_bytes

from fastapi import params
from pydantic import BeforeValidator, Field, field_validator
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_hardening.core import context as request_context
from fastapi_hardening.core.clock import Clock, SystemClock
from fastapi_hardening.core.configuration import ConcernSettings
from fastapi_hardening.core.context import RequestContext
from fastapi_hardening.core.headers import get, get_all
from fastapi_hardening.core.policy import Override, dependant_of, mark_handled, overrides_of
from fastapi_hardening.core.problem import Problem, refuse, tell
from fastapi_hardening.core.routes import RouteEntry, route_of

logger = logging.getLogger("fastapi_hardening.request_limits")

LAYER = "request limits"


# --- settings ---------------------------------------------------------------------------------------------------------


def _empty_is_none(value: object) -> object:
    return None if value == "" else value


Count = Annotated[Annotated[int, Field(ge=0)] | None, BeforeValidator(_empty_is_none)]
Rate = Annotated[Annotated[float, Field(gt=0)] | None, BeforeValidator(_empty_is_none)]
Verdict = Literal["refuse", "report", "allow"]


class RequestLimitsSettings(ConcernSettings):
    """The limits; ``None`` (or an empty text) switches one off."""

    report_only: bool = False
    """Whether what is found is only told, as an event and in the log, and nothing is refused."""

    max_body_bytes: Count = 10_000_000
    """The largest body that is taken, as it is sent: declared or counted. Above: 413. A ``max_body_size`` of FastAPI on
    the route, its router or the application takes its place."""

    min_body_bytes_per_second: Rate = 500.0
    """A body that comes slower than this on average, once ``body_grace_seconds`` are over, is 408. Only the time counts
    in which the application waits for the client."""

    body_grace_seconds: float = Field(10.0, ge=0)
    """For this long a body may be as slow as it likes."""

    max_url_bytes: Count = 8_192
    """The longest path and query together. Above: 414. RFC 9110, section 4.1, wants at least 8000."""

    max_header_count: Count = 100
    """How many lines the header may have. Above: 431."""

    max_header_bytes: Count = 65_536
    """How many bytes names and values of the header may have together. Above: 431."""

    max_json_depth: Count = 64
    """How deep arrays and objects of a JSON body may nest. Deeper, or not UTF-8: 400."""

    allowed_hosts: tuple[str, ...] = ()
    """Host names that are served, such as ``shop.example`` or ``*.shop.example`` (every subdomain, not the domain
    itself); any if empty. Ports do not matter. Others: 421."""

    strict_framing: bool = True
    """Whether what two servers may read as two different requests is 400: ``Content-Length`` beside
    ``Transfer-Encoding``, several different lengths, a length that is no number (RFC 9112, section 6.3)."""

    strict_host: bool = True
    """Whether a request is 400 that has several ``Host`` lines, one that is no host name, or over HTTP/1.1 none
    (RFC 9112, section 3.2)."""

    check_content_type: bool = True
    """Whether a route that declares a JSON or form body answers 415 to a body that says it is something else."""

    content_types: tuple[str, ...] = ()
    """The only types of bodies that are taken, such as ``application/json`` or ``image/*``; any if empty. Others:
    415."""

    path_nulls: Verdict = "refuse"
    """Null bytes in the path, encoded or not. Each of these: refused with 400, only reported, or allowed."""

    path_traversal: Verdict = "refuse"
    """Segments ``..``, plain, encoded once or several times, or in overlong UTF-8."""

    path_backslashes: Verdict = "refuse"
    """Backslashes, encoded or not, which some servers take for slashes."""

    path_encoded_slashes: Verdict = "report"
    """``%2F``: whether it divides segments, servers do not agree."""

    path_parameters: Verdict = "report"
    """``;``: some servers cut off what follows it, others do not."""

    path_empty_segments: Verdict = "report"
    """``//``: some servers make it one slash, others do not."""

    @field_validator("allowed_hosts")
    @classmethod
    def _are_hosts(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(checked_host(pattern) for pattern in patterns)

    @field_validator("content_types")
    @classmethod
    def _are_types(cls, types: tuple[str, ...]) -> tuple[str, ...]:
        for each in types:
            kind, slash, subtype = each.partition("/")
            if not (kind and slash and subtype) or ";" in each:
                raise ValueError(f"{each!r} is not like 'application/json' or 'image/*', without parameters")
        return tuple(each.lower() for each in types)


# What an override is measured by where there is no layer: nothing but what it names.
_OFF: dict[str, Any] = {
    "max_body_bytes": None,
    "min_body_bytes_per_second": None,
    "max_url_bytes": None,
    "max_header_count": None,
    "max_header_bytes": None,
    "max_json_depth": None,
    "strict_framing": False,
    "strict_host": False,
    "check_content_type": False,
} | dict.fromkeys((name for name in RequestLimitsSettings.model_fields if name.startswith("path_")), "allow")


# --- problems and events ----------------------------------------------------------------------------------------------


class BodyTooLarge(Problem):
    """The body has, or says that it has, more bytes than the route takes."""

    status = 413


class BodyTooSlow(Problem):
    """The body came slower than its client has to send."""

    status = 408


class UriTooLong(Problem):
    """Path and query are longer than the limit."""

    status = 414


class HeaderTooLarge(Problem):
    """The header has too many lines, or too many bytes."""

    status = 431
    title = "Request Header Fields Too Large"


class HostNotServed(Problem):
    """The request was meant for another host."""

    status = 421


class ContentTypeNotTaken(Problem):
    """The body is of a type that the route does not take."""

    status = 415


class LengthRequired(Problem):
    """The body was read before it could be counted, and did not say how long it is."""

    status = 411


class AmbiguousRequest(Problem):
    """Two servers could read this request in two ways: its framing, its host."""

    status = 400


class UnsafePath(Problem):
    """The path means another one than it looks like."""

    status = 400


class JsonTooDeep(Problem):
    """Arrays and objects of the body nest deeper than the limit, or the body is not UTF-8."""

    status = 400


@dataclass(frozen=True, slots=True)
class RequestLimitReported:
    """A request was beyond a limit that only reports.

    Attributes:
        problem: The name of the problem's class, such as ``UnsafePath``.
        status: The status that a refusal would have had.
        template: The path template of the route, or ``None`` where no route matches.
        request_id: The id that the client got.
        client: The client's address, as far as it is believed.
        detail: What was found.
    """

    problem: str
    status: int
    template: str | None
    request_id: str
    client: str
    detail: str | None


def _report(problem: Problem, context: RequestContext) -> None:
    template = None if context.route is None else context.route.template
    event = RequestLimitReported(
        type(problem).__name__,
        problem.status_code,
        template,
        context.request_id,
        context.client.address,
        problem.explanation,
    )
    logger.info(
        "reported a request to %s from %s, not refused with %d: %s (request id %s)",
        template or "an unknown path",
        event.client,
        event.status,
        event.detail,
        event.request_id,
    )
    if context.events is not None:
        context.events.emit(event)


# --- engine: hosts and paths ------------------------------------------------------------------------------------------

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
    if "*" in name or not _well_formed_host(name.encode()) or not _host_name(name.encode()):
        raise ValueError(f"{pattern!r} is not like 'shop.example', '*.shop.example' or '[::1]'")
    return host.removesuffix(name) + _host_name(name.encode())


def _host_name(value: bytes) -> str:
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
        name = _host_name(host)
        # "*.shop.example" is not a name; a client that sends it literally is none of ours.
        return "*" not in name and (name in self._names or name.endswith(self._endings))


def _well_formed_host(host: bytes) -> bool:
    if host.lower().translate(None, _HOST_BYTES):
        return False
    name, colon, port = host.rpartition(b":") if not host.endswith(b"]") and b":" in host else (host, b"", b"")
    if colon and port and not port.isdigit():
        return False
    if name.startswith(b"["):
        return name.endswith(b"]") and bool(_host_name(name))
    return not any(c in name for c in b":[]")


# Each unmasks one layer; who encodes more often than this is not read by anybody.
_DECODINGS = 4
_OVERLONG = (b"\xc0", b"\xc1", b"\xe0\x80", b"\xf0\x80\x80")

_PATHS: tuple[tuple[str, str], ...] = (
    ("path_nulls", "The path has a null byte."),
    ("path_traversal", "The path climbs out of its directory."),
    ("path_backslashes", "The path has a backslash."),
    ("path_encoded_slashes", "The path has an encoded slash."),
    ("path_parameters", "The path has a semicolon."),
    ("path_empty_segments", "The path has an empty segment."),
)


def path_findings(raw: bytes) -> frozenset[str]:
    """What is suspicious about a path as it was sent, by the names of the settings.

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


# --- engine: the body -------------------------------------------------------------------------------------------------

_KEPT = b'[]{}"'
_DROPPED = bytes(byte for byte in range(256) if byte not in _KEPT)
_TO_BRACES = bytes.maketrans(b"[]", b"{}")
_STEP = {ord("{"): 1, ord("}"): -1}.__getitem__
_FOLDS = 8

# What JSON may begin with, blanks and byte order marks included; and a null byte, which UTF-16 and UTF-32 begin with.
_JSON_STARTS = b' \t\r\n[{"-0123456789tfn\xef\xfe\xff\0'


class JsonNesting:
    """How deep a JSON text nests, chunk by chunk, at about a tenth of what parsing it costs.

    Everything but brackets and quotes is dropped by C code, then what stands in strings. Only where more brackets open
    than the limit leaves room for are they counted one after the other.

    Args:
        max_depth: The limit.

    Example:
        >>> nesting = JsonNesting(2)
        >>> nesting.exceeds(b'[["[[[') or nesting.exceeds(b'"]]')
        False
        >>> nesting.exceeds(b"[[[")
        True
    """

    __slots__ = ("_depth", "_escaping", "_in_string", "max_depth")

    def __init__(self, max_depth: int) -> None:
        self.max_depth = max_depth
        self._depth = 0
        self._in_string = False
        self._escaping = False

    def exceeds(self, chunk: bytes) -> bool:
        """Reads on; whether some bracket opened deeper than the limit."""
        if self._escaping:
            chunk = b"\\" + chunk
            self._escaping = False
        if b"\\" in chunk:
            chunk = chunk.replace(b"\\\\", b"").replace(b'\\"', b"")
            self._escaping = chunk.endswith(b"\\")
        # Two quotes side by side change nothing for what stands after them, wherever they are.
        kept = chunk.translate(_TO_BRACES, _DROPPED).replace(b'""', b"")
        parts = kept.split(b'"')
        brackets = b"".join(parts[self._in_string :: 2])
        self._in_string ^= len(parts) % 2 == 0
        opened = brackets.count(b"{")
        if self._depth + opened > self.max_depth and self._peak(brackets) > self.max_depth:
            return True
        self._depth = max(0, self._depth + 2 * opened - len(brackets))
        return False

    def _peak(self, brackets: bytes) -> int:
        """The depth of the deepest bracket, or a bound that is within the limit."""
        folded, folds = brackets, 0
        # Taking away every innermost pair takes one off the depth, and most of the text.
        while folds < _FOLDS and len(shorter := folded.replace(b"{}", b"")) < len(folded):
            folded, folds = shorter, folds + 1
        bound = max(accumulate(map(_STEP, folded), initial=self._depth)) + folds
        return bound if bound <= self.max_depth else max(accumulate(map(_STEP, brackets), initial=self._depth))


class BodyMeter:
    """What a body has used of what it may: bytes, seconds, nesting.

    Args:
        settings: The limits.
        is_json: Whether its nesting matters.
    """

    __slots__ = ("_grace", "_is_json", "_max_bytes", "_nesting", "_rate", "received", "waited_seconds")

    def __init__(self, settings: RequestLimitsSettings, *, is_json: bool) -> None:
        self.received = 0
        self.waited_seconds = 0.0
        self._is_json = is_json
        self._nesting: JsonNesting | None = None
        self.limit(settings)

    def limit(self, settings: RequestLimitsSettings) -> None:
        """Goes on with these limits."""
        self._max_bytes = settings.max_body_bytes
        self._rate = settings.min_body_bytes_per_second
        self._grace = settings.body_grace_seconds
        depth = settings.max_json_depth
        if depth is None or (self.received and self._nesting is None):
            # Nesting cannot be counted from the middle.
            self._nesting = None
        elif self._nesting is not None:
            self._nesting.max_depth = depth
        elif self._is_json:
            self._nesting = JsonNesting(depth)

    @property
    def patience_seconds(self) -> float | None:
        """How much longer the client may be waited for; ``None`` for ever."""
        if self._rate is None:
            return None
        return max(self._grace, self.received / self._rate) - self.waited_seconds

    def take(self, chunk: bytes) -> Problem | None:
        """Counts a chunk; what it goes beyond, once each."""
        first = not self.received
        self.received += len(chunk)
        if self._max_bytes is not None and self.received > self._max_bytes:
            problem, self._max_bytes = too_large(self._max_bytes), None
            return problem
        if self._nesting is None or not chunk:
            return None
        if first and chunk[0] not in _JSON_STARTS:
            # Compressed perhaps; no parser of JSON reads beyond this byte.
            self._nesting = None
            return None
        return self._nested(chunk, self._nesting)

    def _nested(self, chunk: bytes, nesting: JsonNesting) -> Problem | None:
        # UTF-8 has no null byte in JSON. UTF-16 has, and Python's parser would read it, but the count would be wrong.
        if b"\0" in chunk:
            problem = JsonTooDeep("JSON has to be UTF-8 (RFC 8259, section 8.1).")
        elif nesting.exceeds(chunk):
            limit = {"max_json_depth": nesting.max_depth}
            problem = JsonTooDeep("The JSON body nests too deep.", extensions=limit)
        else:
            return None
        self._nesting = None
        return problem

    def give_up(self) -> Problem:
        """What is said of a body that was waited for too long; from now on it has all the time there is."""
        self._rate = None
        return BodyTooSlow("The request body came too slowly.")


def too_large(max_body_bytes: int, headers: Mapping[str, str] | None = None) -> Problem:
    """What is said of a body that is larger than this."""
    sentence = "The request body is larger than this route takes."
    return BodyTooLarge(sentence, headers=headers, extensions={"max_body_bytes": max_body_bytes})


# --- engine: the head -------------------------------------------------------------------------------------------------


class Finding(NamedTuple):
    """Something about a request that is beyond a limit, and whether it is refused for it or only reported."""

    problem: Problem
    refused: bool = True


_FORMS = ("application/x-www-form-urlencoded", "multipart/form-data")


def declared_types(dependant: Any) -> tuple[str, ...]:
    """The types of bodies that an endpoint can read, as far as its parameters leave no doubt; else none.

    A body of bytes or text, or one that documents another type, may be anything; only models, dictionaries and lists
    are certain to be JSON.
    """
    fields = list(_body_fields(dependant))
    infos = [field.field_info for field in fields]
    if any(isinstance(info, params.Form) for info in infos):
        return _FORMS
    if not infos or any(getattr(info, "media_type", "") != "application/json" for info in infos):
        return ()
    certain = len(fields) > 1 or _is_structure(infos[0].annotation)
    return ("application/json", "application/*+json") if certain else ()


def _body_fields(dependant: Any) -> Iterator[Any]:
    if dependant is not None:
        yield from dependant.body_params
        for child in dependant.dependencies:
            yield from _body_fields(child)


def _is_structure(annotation: Any) -> bool:
    kind = getattr(annotation, "__origin__", annotation)
    return isinstance(kind, type) and (hasattr(kind, "model_fields") or issubclass(kind, (dict, list)))


def _is_of(media_type: str, pattern: str) -> bool:
    kind, _, subtype = pattern.partition("/")
    if not subtype.startswith("*"):
        return media_type == pattern
    return media_type.startswith(f"{kind}/") and media_type.endswith(subtype[1:])


def _media_type(content_type: bytes | None) -> str:
    return (content_type or b"").partition(b";")[0].strip().lower().decode("latin-1")


class RequestPolicy:
    """The limits of one route, made once: a quick look that most requests pass, and a close one for the others.

    Args:
        settings: The limits.
        declared: The types of bodies that the route declares, if it does.
        overrides: The overrides that are among the limits.
    """

    def __init__(
        self,
        settings: RequestLimitsSettings,
        *,
        declared: tuple[str, ...] = (),
        overrides: tuple[Any, ...] = (),
    ) -> None:
        self.settings = settings
        self.overrides = overrides
        self.enabled = settings.enabled
        self._declared = declared if settings.check_content_type else ()
        self._max_url = _or_endless(settings.max_url_bytes)
        self._max_count = _or_endless(settings.max_header_count)
        self._max_header = _or_endless(settings.max_header_bytes)
        self._max_body = _or_endless(settings.max_body_bytes)
        self._hosts = HostList(settings.allowed_hosts)
        # What the quick look remembers of values that come again and again.
        self._host_problem = lru_cache(maxsize=256)(self._look_at_host)
        self._type_problem = lru_cache(maxsize=64)(self._look_at_type)

    def look(self, scope: Scope) -> bool | None:
        """Looks quickly, which is enough for most requests: whether a body may come, or ``None`` for a close look."""
        headers = scope["headers"]
        fields = dict(headers)
        size = 0
        for name, value in headers:
            size += len(name) + len(value)
        path: str = scope["path"]
        raw: bytes = scope.get("raw_path") or b"%"
        if (
            len(fields) == len(headers) <= self._max_count
            and size <= self._max_header
            and len(raw) + len(scope["query_string"]) <= self._max_url
            and b"%" not in raw
            and path[:1] == "/"
            and ".." not in path
            and "//" not in path
            and ";" not in path
            and "%" not in path
            and "\\" not in path
            and "\0" not in path
            and b"host" in fields
            and self._host_problem(fields[b"host"]) is None
            and b"transfer-encoding" not in fields
        ):
            length = fields.get(b"content-length")
            if length is None:
                return _may_have_unannounced_body(scope)
            if self._passes_body(length, fields.get(b"content-type")):
                return True
        return None

    def _passes_body(self, length: bytes, content_type: bytes | None) -> bool:
        if not length.isdigit() or len(length) > _DIGITS or int(length) > self._max_body:
            return False
        return self._type_problem(content_type) is None

    def findings(self, scope: Scope) -> list[Finding]:
        """Everything about a request's head that is beyond a limit; what is not refused is only to be reported."""
        found = [Finding(problem) for problem in self._head_problems(scope)]
        routed = scope["path"].encode("utf-8", "surrogateescape")
        sent: bytes | None = scope.get("raw_path")
        paths = path_findings(_without_authority(routed if sent is None else sent))
        if sent is not None and unquote_to_bytes(sent) != routed:
            # Somebody has rewritten what the router goes by.
            paths |= path_findings(_without_authority(routed))
        for name, sentence in _PATHS if paths else ():
            verdict: Verdict = getattr(self.settings, name)
            if name in paths and verdict != "allow":
                found.append(Finding(UnsafePath(sentence), verdict == "refuse"))
        if self.settings.report_only:
            return [Finding(problem, refused=False) for problem, _ in found]
        return found

    def _head_problems(self, scope: Scope) -> Iterator[Problem]:
        headers = scope["headers"]
        settings = self.settings
        if len(scope.get("raw_path") or scope["path"].encode()) + len(scope["query_string"]) > self._max_url:
            yield UriTooLong("The URL is too long.", extensions={"max_url_bytes": settings.max_url_bytes})
        if len(headers) > self._max_count:
            sentence = "The header has too many lines."
            yield HeaderTooLarge(sentence, extensions={"max_header_count": settings.max_header_count})
        if sum(len(name) + len(value) for name, value in headers) > self._max_header:
            sentence = "The header is too large."
            yield HeaderTooLarge(sentence, extensions={"max_header_bytes": settings.max_header_bytes})
        hosts = get_all(headers, b"host")
        if settings.strict_host and len(hosts) > 1:
            yield AmbiguousRequest("The request has several Host fields.")
        if settings.strict_host and not hosts and scope.get("http_version") == "1.1":
            yield AmbiguousRequest("The request has no Host field.")
        # Where the target is a whole URL, its host counts (RFC 9112, section 3.2.2); h11 hands it on as the path.
        for host in (*(hosts or (b"",)), *_authority(scope["path"])):
            problem = self._look_at_host(host)
            if problem is not None:
                yield problem
        if scope["type"] == "http":
            yield from self._body_problems(scope, headers)

    def _look_at_host(self, host: bytes) -> Problem | None:
        if self.settings.strict_host and not _well_formed_host(host):
            return AmbiguousRequest("The Host field is not a host name.")
        return None if self._hosts.serves(host) else HostNotServed("This server does not serve that host.")

    def _body_problems(self, scope: Scope, headers: list[tuple[bytes, bytes]]) -> Iterator[Problem]:
        lengths = get_all(headers, b"content-length")
        codings = get_all(headers, b"transfer-encoding")
        if self.settings.strict_framing:
            mistake = _framing_mistake(scope.get("http_version"), lengths, codings)
            if mistake is not None:
                # RFC 9112, section 6.1: what follows on this connection may be a part of the attack.
                yield AmbiguousRequest(mistake, headers=_closing(scope))
        length = max(map(_length, lengths), default=0)
        if length > self._max_body:
            yield too_large(self._max_body, _closing(scope))
        if length or codings:
            problem = self._look_at_type(get(headers, b"content-type"))
            if problem is not None:
                yield problem

    def _look_at_type(self, content_type: bytes | None) -> Problem | None:
        media_type = _media_type(content_type)
        # A body that does not say what it is: what a route makes of it is FastAPI's to say; a list takes no risk.
        for types, given in (
            (self.settings.content_types, media_type or "application/octet-stream"),
            (self._declared, media_type),
        ):
            if types and given and not any(_is_of(given, pattern) for pattern in types):
                accepted = ", ".join(types)
                return ContentTypeNotTaken(f"This route takes {accepted}.", headers={"Accept": accepted})
        return None

    def is_json(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        """Whether a body may be read as JSON: it says so, or it says nothing on a route that declares JSON."""
        media_type = _media_type(get(headers, b"content-type"))
        return "json" in media_type or (not media_type and "application/json" in self._declared)


_ENDLESS = 2**63
_DIGITS = 18


def _length(value: bytes) -> int:
    if not value.isdigit():
        return 0
    # Reading a number takes a time that grows with the square of its digits.
    return int(value) if len(value) <= _DIGITS else _ENDLESS + 1


def _or_endless(limit: int | None) -> int:
    return _ENDLESS if limit is None else limit


def _without_authority(path: bytes) -> bytes:
    scheme, separator, rest = path.partition(b"://")
    return b"/" + rest.partition(b"/")[2] if separator and b"/" not in scheme else path


def _authority(path: str) -> tuple[bytes, ...]:
    scheme, separator, rest = path.partition("://")
    return (rest.partition("/")[0].encode("utf-8", "surrogateescape"),) if separator and "/" not in scheme else ()


def _framing_mistake(version: str | None, lengths: list[bytes], codings: list[bytes]) -> str | None:
    if codings and lengths:
        return "The request has both Content-Length and Transfer-Encoding."
    if codings and (version == "1.0" or [coding.strip().lower() for coding in codings] != [b"chunked"]):
        return "The Transfer-Encoding is not one that is read here."
    if len(set(lengths)) > 1:
        return "The request has several Content-Length fields that differ."
    return None if all(value.isdigit() for value in lengths) else "The Content-Length is not a number."


def _closing(scope: Scope) -> dict[str, str] | None:
    """Ends an HTTP/1 connection on which the rest of a body would still come."""
    return {"Connection": "close"} if scope.get("http_version", "1.1").startswith("1") else None


# --- layer ------------------------------------------------------------------------------------------------------------


class RequestLimitsMiddleware:
    """Refuses a request by its head, and counts its body as the application reads it.

    Args:
        app: The application inside.
        settings: The limits.
        allowed_hosts: Hosts that are served besides those of the settings.
        clock: Where the time comes from.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: RequestLimitsSettings | None = None,
        *,
        allowed_hosts: Iterable[str] = (),
        clock: Clock | None = None,
    ) -> None:
        self.app = app
        settings = settings or RequestLimitsSettings()
        self._settings = _changed(settings, {"allowed_hosts": (*settings.allowed_hosts, *allowed_hosts)})
        self._clock = clock or SystemClock()
        # As many as the application has routes; bounded for those that add routes all the time.
        self.policy_of = lru_cache(maxsize=10_000)(self._policy_of)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        policy = self.policy_of(route_of(scope))
        mark_handled(scope, policy.overrides)
        if not policy.enabled:
            await self.app(scope, receive, send)
            return
        has_body = policy.look(scope)
        if has_body is None:
            if await self._refused(policy, scope, receive, send):
                return
            has_body = may_have_body(scope)
        if not has_body:
            await self.app(scope, receive, send)
            return
        body = _Body(policy, scope, receive, send, self._clock)
        try:
            await self.app(scope, body.receive, body.send)
        except Exception as exception:
            if not body.was_raised(exception):
                await body.let_go()
                raise
        else:
            await body.let_go()
        finally:
            refusal = body.close()
        if refusal is not None:
            await refuse(refusal, scope, receive, send, layer=LAYER)

    @staticmethod
    async def _refused(policy: RequestPolicy, scope: Scope, receive: Receive, send: Send) -> bool:
        for problem, refused in policy.findings(scope):
            if refused:
                await refuse(problem, scope, receive, send, layer=LAYER)
                return True
            _report(problem, request_context.ensure(scope))
        return False

    def _policy_of(self, entry: RouteEntry) -> RequestPolicy:
        settings = limits_of(self._settings, entry)
        return RequestPolicy(settings, declared=declared_types(entry.dependant), overrides=entry.of(RequestLimits))


def limits_of(settings: RequestLimitsSettings, entry: RouteEntry) -> RequestLimitsSettings:
    """The limits on a route: what its overrides name, then FastAPI's own limit of the body, then the settings."""
    native = entry.max_body_size
    changes: dict[str, Any] = {} if native is None else {"max_body_bytes": native}
    overrides: tuple[Any, ...] = entry.of(RequestLimits)
    for override in overrides:
        changes |= override.changes
    return _changed(settings, changes)


def widest_body(settings: RequestLimitsSettings, entries: Iterable[RouteEntry]) -> int | None:
    """The largest body that any route takes, for FastAPI's own ``max_body_size``, which then refuses none of ours."""
    widest = 0
    for limits in (settings, *(limits_of(settings, entry) for entry in entries)):
        if limits.max_body_bytes is None or limits.report_only or not limits.enabled:
            return None
        widest = max(widest, limits.max_body_bytes)
    return widest


def _changed(settings: RequestLimitsSettings, changes: dict[str, Any]) -> RequestLimitsSettings:
    return RequestLimitsSettings.model_validate(dict(settings) | changes) if changes else settings


def may_have_body(scope: Scope) -> bool:
    """Whether a body can come: on HTTP/1 it announces itself (RFC 9112, section 6.3)."""
    announced = any(name in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"])
    return scope["type"] == "http" and (announced or _may_have_unannounced_body(scope))


def _may_have_unannounced_body(scope: Scope) -> bool:
    # Where a server may have taken the announcement away, only the methods that never have one are let off.
    if scope["type"] != "http":
        return False
    version: str = scope.get("http_version", "")
    return version[:1] != "1" or scope["method"] not in ("GET", "HEAD", "OPTIONS")


_ACCIDENT = 500
# Its start and its body, which other middlewares may have cut in two.
_MOST_HELD = 4


class _Body:
    """The body of one request on its way to the application: counted, and not waited for without end.

    ``asyncio.timeout`` around each message would do the same for 4 us a message. This keeps one timer a request,
    which looks at what has come when it rings.
    """

    __slots__ = (
        "_clock",
        "_context",
        "_ended",
        "_expired",
        "_held",
        "_meter",
        "_receive",
        "_scope",
        "_send",
        "_settings",
        "_since",
        "_task",
        "_timer",
        "answering",
        "refusal",
    )

    def __init__(self, policy: RequestPolicy, scope: Scope, receive: Receive, send: Send, clock: Clock) -> None:
        self.answering = False
        self.refusal: Problem | None = None
        self._meter = BodyMeter(policy.settings, is_json=policy.is_json(scope["headers"]))
        self._settings = policy.settings
        self._scope = scope
        self._receive = receive
        self._send = send
        self._held: list[Message] = []
        self._clock = clock
        self._context = request_context.ensure(scope)
        self._context.state[_Body] = self
        self._ended = False
        self._expired = False
        self._since: float | None = None
        self._task: asyncio.Task[Any] | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def receive(self) -> Message:
        """The next message; raises the problem that the body has become."""
        if self._ended:
            # Whoever still listens, listens for the client to go: that may take as long as it likes.
            return await self._receive()
        message = await self._wait()
        if message["type"] != "http.request":
            self._end()
            return message
        self.count(message.get("body", b""))
        patience = self._meter.patience_seconds
        if not message.get("more_body", False):
            self._end()
        elif patience is not None and patience <= 0 and not self.answering:
            self._refuse(self._meter.give_up())
        return message

    def change(self, changes: dict[str, Any]) -> None:
        """Goes on with the limits of an override that was learnt of late; raises if they are exceeded already."""
        settings = _changed(self._settings, changes)
        self._settings = settings if settings.enabled else _changed(settings, _OFF)
        self._meter.limit(self._settings)
        self.count(b"")

    def count(self, chunk: bytes) -> None:
        """Counts what has come; raises what it goes beyond."""
        problem = self._meter.take(chunk)
        if problem is not None:
            self._refuse(problem)

    async def send(self, message: Message) -> None:
        """Sends on, but for a 500 after a refusal: it is held until it shows what it is about.

        A middleware with a task group wraps what is raised, and the application's last resort takes it for an accident.
        """
        held = self._held
        if self.refusal is not None and not self.answering and (held or message.get("status") == _ACCIDENT):
            held.append(message)
            if len(held) > _MOST_HELD:
                await self.let_go()
            return
        self.answering = True
        await self._send(message)

    async def let_go(self) -> None:
        """Sends what was held."""
        held, self._held = self._held, []
        for message in held:
            self.answering = True
            await self._send(message)

    def was_raised(self, exception: Exception) -> bool:
        """Whether this is the refusal, alone or in a group, and can still be answered."""
        refusal = self.refusal
        if refusal is None or self.answering:
            return False
        if isinstance(exception, ExceptionGroup):
            return exception.subgroup(lambda each: each is refusal) is not None
        return exception is refusal

    def close(self) -> Problem | None:
        """Ends with the request. A refusal that the application has answered is told of; another one is handed back."""
        self._end()
        if self.refusal is None or not self.answering:
            return self.refusal
        tell(self.refusal, self._context, LAYER)
        return None

    def _end(self) -> None:
        self._ended = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, problem: Problem) -> None:
        if self._settings.report_only:
            _report(problem, self._context)
            return
        if problem.status_code in (BodyTooLarge.status, BodyTooSlow.status):
            problem.headers = _closing(self._scope)
        self.refusal = problem
        raise problem

    async def _wait(self) -> Message:
        meter = self._meter
        patience = meter.patience_seconds
        if patience is None:
            return await self._receive()
        # Two may wait at once: who streams an answer out of a body, and who listens for the client to go.
        since = self._since = self._clock.monotonic()
        task = self._task = asyncio.current_task()
        cancelling = 0 if task is None else task.cancelling()
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(patience, self._ring)
        try:
            return await self._receive()
        except asyncio.CancelledError:
            # As in asyncio.timeout: only our own cancellation is turned into an error.
            if self._expired and task is not None and task.uncancel() <= cancelling:
                self._expired = False
                self._refuse(meter.give_up())
            raise
        finally:
            meter.waited_seconds += self._clock.monotonic() - since
            self._since = None

    def _ring(self) -> None:
        self._timer = None
        patience = self._meter.patience_seconds
        if self._since is None or patience is None or self.answering or self._task is None:
            return
        patience -= self._clock.monotonic() - self._since
        if patience > 0:
            self._timer = asyncio.get_running_loop().call_later(patience, self._ring)
        elif self._settings.report_only:
            self._refuse(self._meter.give_up())
        else:
            self._expired = True
            self._task.cancel()


# --- override ---------------------------------------------------------------------------------------------------------


class RequestLimits(Override):
    """Changes single limits on a route, a router or an application; every level holds, limit by limit the innermost.

    Without the layer (an application that was never hardened) it enforces what it names, after routing: FastAPI has
    read JSON and forms by then, so that the time they took is not measured, and a form without ``Content-Length`` is
    411.

    Args:
        **changes: Fields of :class:`RequestLimitsSettings`; ``None`` switches a limit off.

    Raises:
        ValueError: A field is unknown, or its value is not one that it can have.

    Example:
        >>> films = RequestLimits(max_body_bytes=2_000_000_000, body_grace_seconds=60)
        >>> webhook = RequestLimits(max_body_bytes=100_000, content_types=("application/json",))
    """

    every_level_holds: ClassVar[bool] = True

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        checked = RequestLimitsSettings(**changes)
        self.changes = {name: getattr(checked, name) for name in checked.model_fields_set}
        # By the levels that hold together: as many as the application's source has.
        self._policies: dict[tuple[RequestLimits, ...], RequestPolicy] = {}

    async def act_late(self, connection: HTTPConnection) -> None:
        """Enforces what the levels of a route name, on what has been read and on what is still to come; once."""
        scope = connection.scope
        levels: tuple[Any, ...] = overrides_of(dependant_of(scope)).get(RequestLimits, (self,))
        if levels[-1] is not self:
            return
        changes = {name: value for level in levels for name, value in level.changes.items()}
        policy = self._policies.get(levels)
        if policy is None:
            policy = self._policies[levels] = RequestPolicy(_changed(RequestLimitsSettings(), _OFF | changes))
        context = request_context.ensure(scope)
        for problem, refused in policy.findings(scope) if policy.enabled else ():
            if refused:
                raise problem
            _report(problem, context)
        body: _Body | None = context.state.get(_Body)
        if body is not None:
            body.change(changes)
        elif policy.enabled and may_have_body(scope):
            self._meter_late(policy, connection)

    @staticmethod
    def _meter_late(policy: RequestPolicy, connection: Any) -> None:
        """Puts the count into the request object, which is the one that the endpoint gets."""
        body = _Body(policy, connection.scope, connection._receive, connection._send, SystemClock())  # noqa: SLF001
        read: bytes | None = getattr(connection, "_body", None)
        if read is not None:
            body.count(read)
        elif not connection._stream_consumed:  # noqa: SLF001
            connection._receive = body.receive  # noqa: SLF001
        elif get(connection.scope["headers"], b"content-length") is None:
            raise LengthRequired("This route takes a form only with its Content-Length.")
