"""Makes every error answer of the application a problem document (RFC 9457), and leaks nothing with it.

It protects from stack traces, input and internals in answers, and from five shapes of errors in an API. It is *not* a
place for your own errors: raise :class:`~fastapi_hardening.Problem` for those. Handlers that you register yourself
always win; only FastAPI's own functions are replaced, in mounted applications too.

It sits below CORS and the security headers, so that a 500 page carries both, and above every layer that refuses.

Example:
    >>> from fastapi import FastAPI
    >>> from fastapi_hardening.api.errors import ErrorsMiddleware, ErrorsSettings, install
    >>> app = FastAPI()
    >>> app.add_middleware(ErrorsMiddleware)
    >>> install(app, ErrorsSettings())
"""

import logging
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

from fastapi import FastAPI, Request, WebSocket
from fastapi.exception_handlers import http_exception_handler as fastapis_http_exception_handler
from fastapi.exceptions import RequestValidationError, WebSocketRequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_hardening.core import context as request_context
from fastapi_hardening.core import openapi
from fastapi_hardening.core.configuration import ConcernSettings
from fastapi_hardening.core.problem import (
    MEDIA_TYPE,
    OWN,
    Problem,
    ProblemResponse,
    call_handler,
    is_framework_handler,
    phrase,
    refuse,
    render,
    users_handler,
)

logger = logging.getLogger("fastapi_hardening.errors")


class ErrorsSettings(ConcernSettings):
    """The settings of error answers."""

    format: Literal["problem", "fastapi"] = "problem"
    """``problem`` answers as RFC 9457 says; ``fastapi`` keeps ``{"detail": ...}`` for clients that read it."""

    details: bool = False
    """Whether a 500 answer names the exception and shows its traceback. On in development only."""

    reraise: bool = True
    """Whether an unhandled exception goes on to the server after it was answered, which logs it once more. Test clients
    rely on it."""


class ValidationFailed(Problem):
    """The request does not have the shape that the endpoint declares."""

    status = 422
    type = OWN + "validation-failed"
    title = "Validation failed"


class InternalError(Problem):
    """The application raised something that nobody handles."""

    status = 500
    type = OWN + "internal-error"
    title = "Internal Server Error"


@dataclass(frozen=True, slots=True)
class ExceptionUnhandled:
    """An exception reached the outside of the application.

    Attributes:
        exception: The exception itself.
        template: The path template of the route, or ``None``.
        request_id: The id that the client got.
    """

    exception: Exception
    template: str | None
    request_id: str


# --- engine -----------------------------------------------------------------------------------------------------------


def problem_of(exception: HTTPException) -> Problem:
    """An ``HTTPException`` as a problem. Its detail, if it is not a sentence, becomes the member ``details``."""
    if isinstance(exception, Problem):
        return exception
    detail: Any = exception.detail
    said = isinstance(detail, str) and detail != phrase(exception.status_code)
    return Problem(
        detail if said else None,
        status=exception.status_code,
        headers=exception.headers,
        extensions=None if isinstance(detail, str) or detail is None else {"details": detail},
    )


def validation_problem(errors: Iterator[Mapping[str, Any]] | list[Any]) -> ValidationFailed:
    """FastAPI's validation errors as a problem: where (a JSON pointer), what is wrong, which rule. Never the input.

    Example:
        >>> error = {"loc": ("body", "items", 0, "price"), "msg": "Field required", "type": "missing", "input": {}}
        >>> validation_problem([error]).extensions
        {'errors': [{'pointer': '#/body/items/0/price', 'detail': 'Field required', 'type': 'missing'}]}
    """
    return ValidationFailed(
        "The request does not have the expected form.",
        extensions={
            "errors": [
                {"pointer": _pointer(error["loc"]), "detail": _without_input(error), "type": error["type"]}
                for error in errors
            ]
        },
    )


def _pointer(location: tuple[str | int, ...]) -> str:
    """A JSON pointer (RFC 6901) in a fragment; its first part says where: body, query, path, header or cookie."""
    return "#" + "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in location)


# Rules whose message is written by the application, or contains the input by pydantic's own template.
_WRITTEN_FREELY = frozenset({"value_error", "assertion_error", "union_tag_invalid"})
_LONG_ENOUGH_TO_TELL = 4


def _without_input(error: Mapping[str, Any]) -> str:
    """The message of a validation error, or a plain one where it would repeat what the client sent."""
    message = str(error["msg"])
    shortest = 1 if error["type"] in _WRITTEN_FREELY else _LONG_ENOUGH_TO_TELL
    if any(len(text) >= shortest and text in message for text in _texts(error.get("input"))):
        return "The value is not valid."
    return message


def _texts(value: Any) -> Iterator[str]:
    """The leaves of an input, as text."""
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, (list, tuple, set)):
        for inner in value:
            yield from _texts(inner)
    elif value is not None and not isinstance(value, bool):
        yield str(value)


# --- handlers ---------------------------------------------------------------------------------------------------------


async def http_exception_handler(request: Request, exception: HTTPException) -> Response | ProblemResponse:
    """Answers an ``HTTPException``; one that is no error (a redirect, a 304) as FastAPI does."""
    if not 400 <= exception.status_code <= 599:  # noqa: PLR2004 - the two error classes
        return await fastapis_http_exception_handler(request, exception)
    return ProblemResponse(problem_of(exception), request_context.of(request.scope))


async def validation_exception_handler(request: Request, exception: RequestValidationError) -> ProblemResponse:
    """Answers a request that FastAPI could not validate."""
    return ProblemResponse(validation_problem(list(exception.errors())), request_context.of(request.scope))


async def websocket_validation_exception_handler(
    websocket: WebSocket, exception: WebSocketRequestValidationError
) -> None:
    """Refuses a websocket whose handshake FastAPI could not validate."""
    problem = validation_problem(list(exception.errors()))
    await refuse(problem, websocket.scope, websocket.receive, websocket.send, layer="errors")


async def exception_handler(request: Request, exception: Exception) -> ASGIApp:
    """Answers an exception that nobody handles, and says nothing about it.

    A middleware of the application may raise an ``HTTPException`` where Starlette's handlers do not see it; it gets the
    answer that an endpoint's would.
    """
    return await _unhandled(request, exception, InternalError())


async def telling_exception_handler(request: Request, exception: Exception) -> ASGIApp:
    """Answers an exception that nobody handles with its traceback; for development."""
    return await _unhandled(request, exception, _telling(exception))


async def _unhandled(request: Request, exception: Exception, problem: InternalError) -> ASGIApp:
    if not is_answer(exception):
        return ProblemResponse(problem, request_context.of(request.scope))
    handler = users_handler(request.scope, exception)
    if handler is not None:
        return await call_handler(handler, request, exception)
    return ProblemResponse(problem_of(exception), request_context.of(request.scope))


def is_answer(exception: Exception) -> TypeGuard[HTTPException]:
    """Whether an exception is meant as an error answer, not an accident."""
    return isinstance(exception, HTTPException) and 400 <= exception.status_code <= 599  # noqa: PLR2004


def _telling(exception: Exception) -> InternalError:
    return InternalError(
        f"{type(exception).__name__}: {exception}",
        extensions={"traceback": "".join(traceback.format_exception(exception)).splitlines()},
    )


def install(app: Any, settings: ErrorsSettings) -> None:
    """Registers the handlers on an application in place of FastAPI's own; before its first request.

    Args:
        app: A FastAPI or Starlette application.
        settings: The format, and whether a 500 tells more.
    """
    if app.debug and not settings.details:
        app.debug = False
        logger.warning("debug=True would answer tracebacks to everybody; it is off unless errors.details is on")
    handlers = app.exception_handlers
    before = dict(handlers)
    _replace(handlers, settings)
    if app.middleware_stack is not None and handlers != before:
        # It has served alone before it was mounted here; its next request builds the stack with the handlers of now.
        app.middleware_stack = None
    if settings.format == "problem" and isinstance(app, FastAPI):
        describe(app)


def _replace(handlers: dict[Any, Any], settings: ErrorsSettings) -> None:
    if 500 not in handlers and Exception not in handlers:  # noqa: PLR2004 - the other name of the same handler
        handlers[Exception] = telling_exception_handler if settings.details else exception_handler
    if settings.format == "fastapi":
        return
    ours: dict[Any, Callable[..., Any]] = {
        HTTPException: http_exception_handler,
        RequestValidationError: validation_exception_handler,
        WebSocketRequestValidationError: websocket_validation_exception_handler,
    }
    for kind, handler in ours.items():
        if kind not in handlers or is_framework_handler(handlers[kind]):
            handlers[kind] = handler


def describe(app: FastAPI) -> None:
    """Has the application's OpenAPI document describe the errors as they are; a second call changes nothing."""
    openapi.amend(app, _describe)


# --- layer ------------------------------------------------------------------------------------------------------------


class ErrorsMiddleware:
    """Answers what is raised through the application, and the 413 that Starlette sends past every handler.

    Args:
        app: The application inside.
        settings: The settings of error answers.
    """

    def __init__(self, app: ASGIApp, settings: ErrorsSettings | None = None) -> None:
        self.app = app
        self._settings = settings or ErrorsSettings()
        self._normalises = self._settings.format == "problem"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        outgoing = _Outgoing(scope, send, normalises=self._normalises)
        try:
            await self.app(scope, receive, outgoing.send)
        except Exception as exception:
            if type(exception).__module__ == _BODY_LIMIT:
                raise
            if not outgoing.started:
                await self._answer(exception, scope, receive, send)
            if not is_answer(exception):
                self._tell(exception, scope)
                if self._settings.reraise:
                    raise

    def _tell(self, exception: Exception, scope: Scope) -> None:
        context = request_context.ensure(scope)
        template = None if context.route is None else context.route.template
        if context.events is not None:
            context.events.emit(ExceptionUnhandled(exception, template, context.request_id))
        logger.error(
            "unhandled %s in %s %s (request id %s)",
            type(exception).__name__,
            scope.get("method", "websocket"),
            template or "an unknown path",
            context.request_id,
            # The server logs the traceback of what is raised on; without that it must be here.
            exc_info=None if self._settings.reraise else exception,
        )

    async def _answer(self, exception: Exception, scope: Scope, receive: Receive, send: Send) -> None:
        handler = _handler_of_the_application(exception, scope)
        if handler is not None:
            try:
                response = await call_handler(handler, Request(scope, receive), exception)
            except Exception:
                logger.exception("the application's handler for %s failed", type(exception).__name__)
            else:
                await response(scope, receive, send)
                return
        unhandled: Problem = _telling(exception) if self._settings.details else InternalError()
        problem = problem_of(exception) if is_answer(exception) else unhandled
        await refuse(problem, scope, receive, send, layer="errors")


class _Outgoing:
    """What has been sent of an answer, and the 413 of Starlette's body limit replaced by a problem."""

    __slots__ = ("_normalises", "_replacement", "_scope", "_send", "started")

    def __init__(self, scope: Scope, send: Send, *, normalises: bool) -> None:
        self.started = False
        self._scope = scope
        self._send = send
        self._normalises = normalises
        self._replacement: bytes | None = None

    async def send(self, message: Message) -> None:
        self.started = True
        kind = message["type"]
        if kind == "http.response.start":
            if message["status"] == 413 and self._normalises and _is_starlettes(message):  # noqa: PLR2004
                problem = Problem("The request body is larger than this route takes.", status=413)
                message["headers"], self._replacement = render(problem, request_context.of(self._scope))
        elif kind == "http.response.body" and self._replacement is not None:
            message["body"], self._replacement = self._replacement, b""
        await self._send(message)


def _handler_of_the_application(exception: Exception, scope: Scope) -> Any:
    if scope["type"] != "http":
        return None
    if is_answer(exception):
        return users_handler(scope, exception)
    handlers = getattr(scope.get("app"), "exception_handlers", {})
    handler = handlers.get(500) or handlers.get(Exception)
    return None if handler is None or is_framework_handler(handler) else handler


# Where this layer is used alone it sits inside Starlette's body limit, whose signals pass through it.
_BODY_LIMIT = "starlette.middleware.body_limit"


def _is_starlettes(message: Message) -> bool:
    """Whether a 413 is the one that Starlette's body limit sends, and not one that the application wrote."""
    headers = dict(message.get("headers") or ())
    kind = headers.get(b"content-type"), headers.get(b"content-length")
    return kind in ((b"text/plain; charset=utf-8", b"17"), (b"application/json", b"30"))


# --- OpenAPI ----------------------------------------------------------------------------------------------------------

_PROBLEM_SCHEMA = {
    "type": "object",
    "title": "Problem",
    "description": "An error answer (RFC 9457).",
    "required": ["type", "title", "status"],
    "properties": {
        "type": {"type": "string", "format": "uri-reference", "description": "What kind of problem it is."},
        "title": {"type": "string", "description": "The kind of problem in words."},
        "status": {"type": "integer", "minimum": 400, "maximum": 599},
        "detail": {"type": "string", "description": "What went wrong this time."},
        "request_id": {"type": "string", "description": "The id under which the request is logged."},
        "trace_id": {"type": "string", "description": "The trace in which the request can be looked at."},
    },
}
_VALIDATION_SCHEMA = {
    "title": "ValidationProblem",
    "description": "The request does not have the shape that the operation declares.",
}
_VALIDATION_MEMBERS = {
    "type": "object",
    "required": ["errors"],
    "properties": {
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["pointer", "detail", "type"],
                "properties": {
                    "pointer": {"type": "string", "description": "Where: a JSON pointer (RFC 6901)."},
                    "detail": {"type": "string", "description": "What is wrong there."},
                    "type": {"type": "string", "description": "The rule that does not hold."},
                },
            },
        }
    },
}


def _describe(document: openapi.Document) -> None:
    """Gives every operation problem answers for 4XX and 5XX, and its 422 the schema that is really sent.

    Answers that the application declares itself are kept.
    """
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    problem = openapi.free_name(schemas, "Problem")
    validation = openapi.free_name(schemas, "ValidationProblem")
    schemas[problem] = _PROBLEM_SCHEMA
    schemas[validation] = _VALIDATION_SCHEMA | {"allOf": [{"$ref": openapi.reference(problem)}, _VALIDATION_MEMBERS]}
    for operation in openapi.operations(document):
        responses = operation.setdefault("responses", {})
        if openapi.reference("HTTPValidationError") in str(responses.get("422")):
            responses["422"] = _answer_of(validation, "Validation failed")
        responses.setdefault("4XX", _answer_of(problem, "The request is refused"))
        responses.setdefault("5XX", _answer_of(problem, "The server cannot answer"))
    for replaced in ("HTTPValidationError", "ValidationError"):
        elsewhere = {name: schema for name, schema in schemas.items() if name != replaced}
        if f"{openapi.reference(replaced)}'" not in str(document.get("paths")) + str(elsewhere):
            schemas.pop(replaced, None)


def _answer_of(schema: str, description: str) -> dict[str, Any]:
    return {
        "description": description,
        "content": {MEDIA_TYPE: {"schema": {"$ref": openapi.reference(schema)}}},
    }
