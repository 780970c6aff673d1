"""Takes the reports in which browsers tell what a Content-Security-Policy has blocked, and counts them by directive.

It protects from enforcing a policy blindly: what would break shows in the metrics first, and an injected script that
was blocked shows at all. It is *not* a store of reports: what they say is written by whoever sends them, so it is
counted under names of a closed set, logged rarely, shortened and without what could be secret, and kept nowhere.

Reports come without credentials and cannot be authenticated, so the layer sits above authentication, and behind the
layers that look at size, speed and rate of every request. It has a limit of its own as well, by address.

Example:
    >>> from fastapi import FastAPI
    >>> from fastapi_hardening.security.csp_reports import CspReportsMiddleware, CspReportsSettings
    >>> app = FastAPI()
    >>> app.add_middleware(CspReportsMiddleware, settings=CspReportsSettings(enabled=True, path="/reports"))
"""

import json
import logging
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import SplitResult, urlsplit

from prometheus_client import CollectorRegistry, Counter
from pydantic import Field, field_validator
from starlette.types import ASGIApp, Receive, Scope, Send

from fastapi_hardening.core import context as request_context
from fastapi_hardening.core import headers as header_fields
from fastapi_hardening.core.clock import Clock
from fastapi_hardening.core.configuration import ConcernSettings
from fastapi_hardening.core.csp import DIRECTIVES
from fastapi_hardening.core.events import Events
from fastapi_hardening.core.own_path import OwnPath
from fastapi_hardening.core.problem import IANA, Problem, refuse
from fastapi_hardening.core.routes import route_of
from fastapi_hardening.core.window import Limiter, parse_limits

logger = logging.getLogger("fastapi_hardening.csp_reports")

# The Reporting API's, a list, and that of `report-uri`, one report (CSP Level 3, section 5.5).
REPORTS = "application/reports+json"
REPORT = "application/csp-report"


class CspReportsSettings(ConcernSettings):
    """The settings of the report route."""

    enabled: bool = False
    """Whether reports are taken, and browsers are told where to send them."""

    path: str = "/.well-known/csp-reports"
    """Where they are taken. Behind a proxy that takes a prefix off, ``security_headers.reporting_endpoint`` tells
    browsers the whole path."""

    max_bytes: int = Field(16_384, ge=1)
    """How large one request may be; counted while it is read."""

    limit: str = "60/minute"
    """How many requests one address may send, as one limit; each may carry several reports."""

    log_limit: str = "10/minute"
    """How many reports are logged, as one limit; all are counted."""

    max_keys: int = Field(100_000, ge=1)
    """For how many addresses there is a place; newcomers share one when all are taken by addresses in debt."""

    @field_validator("path")
    @classmethod
    def _is_a_path(cls, path: str) -> str:
        if not _PATH.fullmatch(path):
            raise ValueError(f"{path!r} is no path, such as '/.well-known/csp-reports'")
        return path

    @field_validator("limit", "log_limit")
    @classmethod
    def _is_one_limit(cls, limit: str) -> str:
        if len(parse_limits(limit)) != 1:
            raise ValueError(f"{limit!r}: this is one limit, such as '60/minute'")
        return limit


_PATH = re.compile(r"/(?!/)[A-Za-z0-9/._~-]*")


class TooManyReports(Problem):
    """One address sends more reports than a browser would."""

    status = 429
    type = IANA + "quota-exceeded"
    title = "Quota exceeded"


@dataclass(frozen=True, slots=True)
class CspViolationReported:
    """A browser says that a policy was violated. Anybody can send that.

    Attributes:
        directive: The directive, or ``other`` for one that is unknown.
        disposition: Whether it was enforced or only reported.
        blocked: What was blocked: a word such as ``inline``, or an origin.
        page: The path of the page, without its query.
        source: The address of the script or page at fault, without its query; ``None`` if unknown.
        line: The line in it.
    """

    directive: str
    disposition: Literal["enforce", "report"]
    blocked: str
    page: str
    source: str | None
    line: int | None


# --- engine -----------------------------------------------------------------------------------------------------------

_OTHER = "other"
_KNOWN = frozenset(DIRECTIVES)
_LONGEST = 200
_WORD = re.compile(r"[a-z][a-z-]{0,31}")
_EXTENSIONS = ("chrome-extension", "moz-extension", "safari-extension", "safari-web-extension", "ms-browser-extension")

# Members of a report as the Reporting API names them, and as `report-uri` does; the older ones may be missing.
_NAMES = {
    "effectiveDirective": ("effective-directive", "violated-directive"),
    "disposition": ("disposition",),
    "blockedURL": ("blocked-uri",),
    "documentURL": ("document-uri",),
    "sourceFile": ("source-file",),
    "lineNumber": ("line-number",),
}


def violations(body: bytes, media_type: str) -> Iterator[CspViolationReported]:
    """What a request reports, made harmless; reports of other kinds and of browser extensions are passed over.

    Args:
        body: The body of the request.
        media_type: :data:`REPORTS` or :data:`REPORT`.

    Raises:
        ValueError: The body is not JSON of that form.

    Example:
        >>> body = b'{"csp-report": {"effective-directive": "img-src", "blocked-uri": "https://a.example/x.png?token"}}'
        >>> next(violations(body, REPORT)).blocked
        'https://a.example'
    """
    try:
        document = json.loads(body)
    except RecursionError:
        raise ValueError("the report nests too deep") from None
    if media_type == REPORT:
        report = document.get("csp-report") if isinstance(document, dict) else None
        if not isinstance(report, dict):
            raise ValueError("there is no csp-report in it")
        found = [{new: next(filter(None, map(report.get, old)), None) for new, old in _NAMES.items()}]
    else:
        reports = document if isinstance(document, list) else [document]
        if not all(isinstance(report, dict) for report in reports):
            raise ValueError("a report is an object")
        found = [report.get("body") for report in reports if report.get("type") == "csp-violation"]
    for report in found:
        if isinstance(report, dict):
            violation = _violation(report)
            if violation is not None:
                yield violation


def _violation(report: Mapping[str, Any]) -> CspViolationReported | None:
    blocked, source = _text(report.get("blockedURL")), _text(report.get("sourceFile"))
    if blocked.startswith(_EXTENSIONS) or source.startswith(_EXTENSIONS):
        return None
    directive = _text(report.get("effectiveDirective")).partition(" ")[0]
    line = report.get("lineNumber")
    at = _split(source)
    return CspViolationReported(
        directive=directive if directive in _KNOWN else _OTHER,
        disposition="report" if report.get("disposition") == "report" else "enforce",
        blocked=_blocked(blocked),
        page=_printable(_split(_text(report.get("documentURL"))).path) or "/",
        source=_printable(f"{at.scheme}://{at.netloc.rpartition('@')[2]}{at.path}") if at.netloc else None,
        line=line if isinstance(line, int) and 0 < line < 10**7 else None,
    )


def _blocked(text: str) -> str:
    """A word of the specification as it is, of an address its origin."""
    if _WORD.fullmatch(text):
        return text
    url = _split(text)
    if url.netloc:
        return _printable(f"{url.scheme}://{url.netloc.rpartition('@')[2]}")
    return _printable(url.scheme) or "unknown"


def _split(text: str) -> SplitResult:
    try:
        return urlsplit(text)
    except ValueError:
        return urlsplit("")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _printable(text: str) -> str:
    """At most so many characters, and none that would end or colour a line of a log."""
    return "".join(character if " " < character <= "~" else "?" for character in text[:_LONGEST])


def measure(registry: CollectorRegistry, events: Events) -> None:
    """Has every violation counted in ``hardening_csp_violations_total``, by directive and disposition."""
    counter = Counter(
        "hardening_csp_violations",
        "Violations of a Content-Security-Policy that browsers reported.",
        ("directive", "disposition"),
        registry=registry,
    )
    events.subscribe(CspViolationReported, lambda each: counter.labels(each.directive, each.disposition).inc())


# --- layer ------------------------------------------------------------------------------------------------------------


class CspReportsMiddleware:
    """Answers ``POST`` to the report route with 204, and passes on everything else.

    A route of the application with exactly that path wins, with one notice in the log; a catch-all route does not.

    Args:
        app: The application inside.
        settings: The path and the limits.
        events: Where :class:`CspViolationReported` goes.
        clock: Where the time comes from.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: CspReportsSettings | None = None,
        *,
        events: Events | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.app = app
        self._settings = settings = settings or CspReportsSettings(enabled=True)
        self._path = OwnPath(settings.path, ("POST",), "no reports are taken")
        self._events = events
        [limit] = parse_limits(settings.limit, "reports")
        self._limiter = Limiter(limit, max_keys=settings.max_keys, clock=clock)
        [limit] = parse_limits(settings.log_limit, "log")
        self._log_limiter = Limiter(limit, clock=clock)
        self._unlogged = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        if scope["type"] != "http" or not self._settings.enabled or not self._path.is_asked(scope):
            await self.app(scope, receive, send)
            return
        try:
            body, media_type = await self._read(scope, receive)
            found = list(violations(body, media_type))
        except Problem as problem:
            await refuse(problem, scope, receive, send, layer="CSP reports")
            return
        except ValueError:
            unreadable = Problem("The body is not a report.", status=400)
            await refuse(unreadable, scope, receive, send, layer="CSP reports")
            return
        for violation in found:
            self._tell(violation)
        await send({"type": "http.response.start", "status": 204, "headers": [(b"cache-control", b"no-store")]})
        await send({"type": "http.response.body", "body": b""})

    async def _read(self, scope: Scope, receive: Receive) -> tuple[bytes, str]:
        """The body and its media type.

        Raises:
            Problem: The address sends too much, the type is another one, or the body is too large.
        """
        route_of(scope)
        decision = self._limiter.hit(request_context.ensure(scope).client.key)
        if not decision.allowed:
            raise TooManyReports(
                "Your address sends too many reports; come back later.",
                headers={"Retry-After": str(max(1, math.ceil(decision.retry_seconds)))},
            )
        said = header_fields.get(scope["headers"], b"content-type") or b""
        media_type = said.partition(b";")[0].strip().lower().decode("latin-1")
        if media_type not in (REPORTS, REPORT):
            raise Problem(f"Reports are {REPORTS} or {REPORT}.", status=415, headers={"Accept": f"{REPORTS}, {REPORT}"})
        length = header_fields.get(scope["headers"], b"content-length") or b"0"
        body = b""
        more = True
        if length.isdigit() and int(length[:20]) > self._settings.max_bytes:
            raise self._too_large()
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Problem("The report has no end.", status=400)
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._settings.max_bytes:
                raise self._too_large()
        return body, media_type

    def _too_large(self) -> Problem:
        return Problem("Reports may not be so large.", status=413, extensions={"max_bytes": self._settings.max_bytes})

    def _tell(self, violation: CspViolationReported) -> None:
        if self._events is not None:
            self._events.emit(violation)
        if not self._log_limiter.hit("log").allowed:
            self._unlogged += 1
            return
        unlogged, self._unlogged = self._unlogged, 0
        logger.warning(
            "a browser reports that %s was %s by %s on %s (%s)%s",
            violation.blocked,
            "blocked" if violation.disposition == "enforce" else "let through, though not allowed",
            violation.directive,
            violation.page,
            f"line {violation.line or '?'} of {violation.source or 'an unknown source'}",
            f"; {unlogged} reports before it were not logged" if unlogged else "",
        )
