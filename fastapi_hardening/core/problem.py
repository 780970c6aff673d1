"""Error answers as ``application/problem+json`` (RFC 9457), and the one way in which every layer refuses a request.

A :class:`Problem` *is* an ``HTTPException``: raised in an application that was never hardened it still gives the right
status. Dependencies raise theirs; layers send theirs with :func:`refuse`, which asks the user's own exception handlers
first, tells the event bus, and answers HTTP and websocket handshakes alike.

Example:
    >>> problem = Problem("Only 3 are left.", status=409, title="Out of stock", extensions={"available": 3})
    >>> problem.status_code, problem.document()["title"], problem.document()["available"]
    (409, 'Out of stock', 3)
"""

import inspect
import json
import logging
import math
import random
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, ClassVar, Literal

from fastapi import HTTPException, Request
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from fastapi_hardening.core import context as request_context
from fastapi_hardening.core.context import RequestContext
from fastapi_hardening.core.events import RequestRefused
from fastapi_hardening.core.headers import RawHeaders
from fastapi_hardening.core.logs import trace_id_of

ErrorFormat = Literal["problem", "fastapi"]

BLANK = "about:blank"
IANA = "https://iana.org/assignments/http-problem-types#"
OWN = "https://fastapi-hardening.readthedocs.io/problems/#"

logger = logging.getLogger("fastapi_hardening.refusals")

MEDIA_TYPE = "application/problem+json"

# How a websocket is closed that cannot be refused by an HTTP answer (RFC 6455, section 7.4, and its registry).
_POLICY_VIOLATION = 1008
_INTERNAL_ERROR = 1011
_TRY_AGAIN_LATER = 1013

_RESERVED = frozenset({"type", "title", "status", "detail", "instance", "request_id"})


class Problem(HTTPException):
    """An error answer with a type, a title and members of its own.

    Raise it from an endpoint or a dependency; subclass it for a kind of problem of your application.

    Args:
        detail: What went wrong this time, for the client to read. Never put input or internals into it.
        status: The HTTP status; by default that of the class.
        type: The problem type's URI; ``about:blank`` says that the status tells all.
        title: What kind of problem it is; by default the phrase of the status.
        headers: Header fields of the answer, such as ``Retry-After``.
        extensions: Further members of the document.

    Raises:
        ValueError: An extension has the name of a standard member, or the status is no error.
    """

    status: ClassVar[int] = 500
    type: str = BLANK
    title: str | None = None

    def __init__(
        self,
        detail: str | None = None,
        *,
        status: int | None = None,
        type: str | None = None,  # noqa: A002 - the member's name in RFC 9457
        title: str | None = None,
        headers: Mapping[str, str] | None = None,
        extensions: Mapping[str, Any] | None = None,
    ) -> None:
        status = self.status if status is None else status
        if not 400 <= status <= 599:  # noqa: PLR2004 - the two error classes
            raise ValueError(f"a problem has a status from 400 to 599, not {status}")
        if extensions and (taken := _RESERVED & extensions.keys()):
            raise ValueError(f"{', '.join(sorted(taken))}: a standard member of a problem cannot be an extension")
        super().__init__(status, detail, dict(headers) if headers else None)
        self.explanation = detail
        self.extensions = dict(extensions or {})
        if type is not None:
            self.type = type
        if title is not None:
            self.title = title

    @property
    def slug(self) -> str:
        """The short name of the type, as events, logs and metrics use it: what follows ``#``, else the status."""
        return self.type.rpartition("#")[2] if "#" in self.type else str(self.status_code)

    def document(self, request_id: str | None = None, trace_id: str | None = None) -> dict[str, Any]:
        """The members of the problem document, standard ones first."""
        document: dict[str, Any] = {
            "type": self.type,
            "title": self.title or phrase(self.status_code),
            "status": self.status_code,
        }
        if self.explanation is not None:
            document["detail"] = self.explanation
        if request_id is not None:
            document["request_id"] = request_id
        if trace_id is not None:
            document["trace_id"] = trace_id
        return document | self.extensions


# Python's own names of these still differ by its version.
_PHRASES = {413: "Content Too Large", 414: "URI Too Long", 416: "Range Not Satisfiable", 422: "Unprocessable Content"}


def phrase(status: int) -> str:
    """The reason phrase of a status (RFC 9110, section 15); of its class where the status is unknown."""
    try:
        return _PHRASES.get(status) or HTTPStatus(status).phrase
    except ValueError:
        return "Client Error" if status < 500 else "Server Error"  # noqa: PLR2004


def render(problem: Problem, context: RequestContext | None) -> tuple[RawHeaders, bytes]:
    """The header fields and the body of a problem, in the format that the application has chosen."""
    problem_format: ErrorFormat = "problem" if context is None else context.error_format
    if problem_format == "problem":
        document = problem.document(None if context is None else context.request_id, trace_id_of(None))
    else:
        document = {"detail": problem.explanation or problem.title or phrase(problem.status_code)}
    body = json.dumps(document, ensure_ascii=False, separators=(",", ":"), default=str).encode()
    media_type = MEDIA_TYPE if problem_format == "problem" else "application/json"
    headers: RawHeaders = [
        (b"content-type", media_type.encode("ascii")),
        (b"content-length", str(len(body)).encode("ascii")),
    ]
    headers += [(k.lower().encode("latin-1"), v.encode("latin-1")) for k, v in (problem.headers or {}).items()]
    return headers, body


class ProblemResponse:
    """A problem as an ASGI response, for exception handlers."""

    def __init__(self, problem: Problem, context: RequestContext | None) -> None:
        self.status_code = problem.status_code
        self.raw_headers, self.body = render(problem, context)

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        """Sends the answer; a websocket handshake gets it if the server can send one, else the fitting close code."""
        if scope["type"] == "websocket" and "websocket.http.response" not in scope.get("extensions", {}):
            await send(
                {"type": "websocket.close", "code": _close_code(self.status_code), "reason": phrase(self.status_code)}
            )
            return
        prefix = "websocket." if scope["type"] == "websocket" else ""
        await send({"type": f"{prefix}http.response.start", "status": self.status_code, "headers": self.raw_headers})
        body = b"" if scope.get("method") == "HEAD" else self.body
        await send({"type": f"{prefix}http.response.body", "body": body})


async def refuse(
    problem: Problem,
    scope: Scope,
    receive: Receive,
    send: Send,
    *,
    layer: str,
    key: str | None = None,
    known_as: StarletteHTTPException | None = None,
) -> None:
    """Answers a request that a layer does not let through.

    The user's own exception handler for the problem's status or type answers if there is one; a handler that fails
    gives way to the problem itself. A websocket gets an HTTP denial where the server can send one, else the fitting
    close code.

    Args:
        problem: What to say.
        scope: The connection, HTTP or websocket; nothing may have been sent on it.
        receive: Its receive channel, for the user's handler.
        send: Its send channel.
        layer: The concern that refuses, for the event.
        key: Whose budget was spent, for the event.
        known_as: The exception that the application has a handler for, where it is not the problem.
    """
    context = request_context.ensure(scope)
    tell(problem, context, layer, key)
    response: ASGIApp = ProblemResponse(problem, context)
    exception = known_as or problem
    handler = users_handler(scope, exception) if scope["type"] == "http" else None
    if handler is not None:
        try:
            response = await call_handler(handler, Request(scope, receive), exception)
        except Exception:
            logger.exception("the application's handler for %s failed", problem.status_code)
    await response(scope, receive, send)


def _close_code(status: int) -> int:
    if status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
        return _TRY_AGAIN_LATER
    return _INTERNAL_ERROR if status >= HTTPStatus.INTERNAL_SERVER_ERROR else _POLICY_VIOLATION


async def call_handler(handler: Any, request: Request, exception: Exception) -> ASGIApp:
    """Has an exception handler of the application answer, in a thread if it is not async."""
    is_async = inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(type(handler).__call__)
    response: ASGIApp = (
        await handler(request, exception) if is_async else await run_in_threadpool(handler, request, exception)
    )
    return response


def retry_after(seconds: float) -> dict[str, str]:
    """``Retry-After``: from ``seconds`` to twice as many, at random, or everybody comes back at once."""
    return {"Retry-After": str(math.ceil(seconds * random.uniform(1.0, 2.0)))}  # noqa: S311 - not a secret


def tell(problem: Problem, context: RequestContext, layer: str, key: str | None = None) -> None:
    """Logs a refusal with the id that the client gets, and puts it on the event bus, where it is counted."""
    event = RequestRefused(
        problem=problem.slug,
        status=problem.status_code,
        layer=layer,
        template=None if context.route is None else context.route.template,
        request_id=context.request_id,
        client=context.client.address,
        detail=problem.explanation,
        key=key,
    )
    logger.info(
        "%s refused a request to %s from %s with %d %s: %s (request id %s)",
        layer,
        event.template or "an unknown path",
        event.client,
        event.status,
        event.problem,
        event.detail or phrase(event.status),
        event.request_id,
    )
    if context.events is not None:
        context.events.emit(event)


def users_handler(scope: Scope, problem: StarletteHTTPException) -> Any:
    """The handler that the application's author registered for this status or type; never FastAPI's or ours."""
    handlers: Mapping[Any, Any] = getattr(scope.get("app"), "exception_handlers", {})
    for key in (problem.status_code, *type(problem).__mro__):
        if key is Exception:
            return None
        handler = handlers.get(key)
        if handler is not None and not is_framework_handler(handler):
            return handler
    return None


def is_framework_handler(handler: Any) -> bool:
    """Whether an exception handler is FastAPI's own function or ours, and so may be replaced."""
    return getattr(handler, "__module__", "").partition(".")[0] in ("fastapi", "fastapi_hardening", "starlette")
