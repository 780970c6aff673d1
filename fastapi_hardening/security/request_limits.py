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
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from fastapi import params
from pydantic import BeforeValidator, Field, field_validator
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_hardening.core import context as request_context
from fastapi_hardening.core.body_meter import BodyLimits, BodyMeter, BodyTooLarge, BodyTooSlow, too_large
from fastapi_hardening.core.clock import Clock, SystemClock
from fastapi_hardening.core.configuration import ConcernSettings
from fastapi_hardening.core.context import RequestContext
from fastapi_hardening.core.headers import get, get_all
from fastapi_hardening.core.policy import Override, dependant_of, mark_handled, overrides_of
from fastapi_hardening.core.problem import Problem, refuse, tell
from fastapi_hardening.core.request_head import (
    ENDLESS,
    PATH_FINDINGS,
    HostList,
    authority_of,
    checked_host,
    framing_mistake,
    is_of_type,
    length_of,
    media_type_of,
    target_findings,
    well_formed_host,
)
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
        self.body_limits = _body_limits(settings)
        self._hosts = HostList(settings.allowed_hosts)
        # What the quick look remembers of values that come again and again.
        self._host_problem = lru_cache(maxsize=256)(self._look_at_host)
        self._type_problem = lru_cache(maxsize=64)(self._look_at_type)

    def look(self, scope: Scope, fields: dict[bytes, bytes] | None = None) -> bool | None:
        """Looks quickly, which is enough for most requests: whether a body may come, or ``None`` for a close look.

        Args:
            scope: The request.
            fields: Its header fields by name, if somebody has them already and none stands twice.
        """
        headers = scope["headers"]
        fields = dict(headers) if fields is None else fields
        size = sum(map(len, fields)) + sum(map(len, fields.values()))
        path: str = scope["path"]
        raw: bytes = scope.get("raw_path") or b"%"
        if (
            len(fields) == len(headers) <= self._max_count
            and size <= self._max_header
            and len(raw) + len(scope["query_string"]) <= self._max_url
            and raw.isascii()
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
        if not length.isdigit() or length_of(length) > self._max_body:
            return False
        return self._type_problem(content_type) is None

    def findings(self, scope: Scope) -> list[Finding]:
        """Everything about a request's head that is beyond a limit; what is not refused is only to be reported."""
        found = [Finding(problem) for problem in self._head_problems(scope)]
        paths = target_findings(scope["path"], scope.get("raw_path"))
        for name, sentence in PATH_FINDINGS if paths else ():
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
        for host in (*(hosts or (b"",)), *authority_of(scope["path"])):
            problem = self._look_at_host(host)
            if problem is not None:
                yield problem
        if scope["type"] == "http":
            yield from self._body_problems(scope, headers)

    def _look_at_host(self, host: bytes) -> Problem | None:
        if self.settings.strict_host and not well_formed_host(host):
            return AmbiguousRequest("The Host field is not a host name.")
        return None if self._hosts.serves(host) else HostNotServed("This server does not serve that host.")

    def _body_problems(self, scope: Scope, headers: list[tuple[bytes, bytes]]) -> Iterator[Problem]:
        lengths = get_all(headers, b"content-length")
        codings = get_all(headers, b"transfer-encoding")
        if self.settings.strict_framing:
            mistake = framing_mistake(scope.get("http_version"), lengths, codings)
            if mistake is not None:
                # RFC 9112, section 6.1: what follows on this connection may be a part of the attack.
                yield AmbiguousRequest(mistake, headers=_closing(scope))
        length = max(map(length_of, lengths), default=0)
        if length > self._max_body:
            yield too_large(self._max_body, _closing(scope))
        if length or codings:
            problem = self._look_at_type(get(headers, b"content-type"))
            if problem is not None:
                yield problem

    def _look_at_type(self, content_type: bytes | None) -> Problem | None:
        media_type = media_type_of(content_type)
        # A body that does not say what it is: what a route makes of it is FastAPI's to say; a list takes no risk.
        for types, given in (
            (self.settings.content_types, media_type or "application/octet-stream"),
            (self._declared, media_type),
        ):
            if types and given and not any(is_of_type(given, pattern) for pattern in types):
                accepted = ", ".join(types)
                return ContentTypeNotTaken(f"This route takes {accepted}.", headers={"Accept": accepted})
        return None

    def is_json(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        """Whether a body may be read as JSON: it says so, or it says nothing on a route that declares JSON."""
        media_type = media_type_of(get(headers, b"content-type"))
        return "json" in media_type or (not media_type and "application/json" in self._declared)


def _or_endless(limit: int | None) -> int:
    return ENDLESS if limit is None else limit


def _body_limits(settings: RequestLimitsSettings) -> BodyLimits:
    return BodyLimits._make(getattr(settings, name) for name in BodyLimits._fields)


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
        context = request_context.ensure(scope)
        policy = self.policy_of(context.route or route_of(scope))
        mark_handled(scope, policy.overrides)
        if not policy.enabled:
            await self.app(scope, receive, send)
            return
        has_body = policy.look(scope, context.fields)
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
        self._meter = BodyMeter(policy.body_limits, is_json=policy.is_json(scope["headers"]))
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
        meter = self._meter
        patience = meter.patience_seconds
        message = await (self._receive() if patience is None else self._wait(patience))
        if message["type"] != "http.request":
            self._end()
            return message
        problem = meter.take(message.get("body", b""))
        if problem is not None:
            self._refuse(problem)
        if not message.get("more_body"):
            self._end()
        elif (left := meter.patience_seconds) is not None and left <= 0 and not self.answering:
            self._refuse(meter.give_up())
        return message

    def change(self, changes: dict[str, Any]) -> None:
        """Goes on with the limits of an override that was learnt of late; raises if they are exceeded already."""
        settings = _changed(self._settings, changes)
        self._settings = settings if settings.enabled else _changed(settings, _OFF)
        self._meter.limit(_body_limits(self._settings))
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

    async def _wait(self, patience: float) -> Message:
        meter, now = self._meter, self._clock.monotonic
        # Two may wait at once: who streams an answer out of a body, and who listens for the client to go.
        since = self._since = now()
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
            meter.waited_seconds += now() - since
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
