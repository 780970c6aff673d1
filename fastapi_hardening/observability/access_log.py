"""Writes one structured line for every request, with what is needed to find it again and nothing that must not be kept.

It protects from incidents that nobody can reconstruct, from log lines that a client forged, and from credentials in log
files. It is *not* a trail for auditors: it may sample, and under a queue that is full it drops.

It sits right below the request context and above everything that answers, so refusals and the 500 page have their
line too; probes, which are answered above it, have none. A line is written with the last byte of the answer, before
background tasks run. It goes to the logger ``fastapi_hardening.access``: where no logging is configured to standard
output, else to the handlers that are there. :func:`configure_logging` gives every library's records the same form.

Example:
    >>> from fastapi import FastAPI
    >>> from fastapi_hardening.observability.access_log import AccessLogMiddleware, AccessLogSettings
    >>> app = FastAPI()
    >>> app.add_middleware(AccessLogMiddleware, settings=AccessLogSettings(format="text", sample_rate=0.1))
"""

import asyncio
import logging
import random
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, Literal, TextIO

from pydantic import Field, field_validator
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_hardening.core import context as request_context
from fastapi_hardening.core.clock import Clock, SystemClock
from fastapi_hardening.core.configuration import ConcernSettings, did_you_mean
from fastapi_hardening.core.context import RequestContext
from fastapi_hardening.core.headers import field, get
from fastapi_hardening.core.log_handlers import (
    LineHandler,
    QueuedHandler,
    flush,
    make_visible,
    shortest_way,
    take_over_root,
    write_fields,
    write_line,
)
from fastapi_hardening.core.logs import LogFormat, printable, quoted, to_json, trace_id_of
from fastapi_hardening.core.redaction import REDACTED, Redactor
from fastapi_hardening.core.routes import route_of

logger = logging.getLogger("fastapi_hardening.access")

Outcome = Literal["completed", "refused", "disconnected", "cancelled", "failed", "unfinished"]

# What may be left out; the first fields of a line are always there.
_OPTIONAL = "first_byte_ms bytes_in bytes_out trace_id client principal tenant version user_agent"

# RFC 6455, section 7.4.1: done, going away, and a close frame without a code. Anything else was no proper end.
_PROPER_ENDS = (1000, 1001, 1005)
_NO_STATUS_RECEIVED = 1005
_ERROR = 400
_SERVER_ERROR = 500


class AccessLogSettings(ConcernSettings):
    """The settings of the access log, and of the lines that :func:`configure_logging` writes."""

    format: LogFormat = "json"
    """One JSON object a line, or text for people. Text in development."""

    sample_rate: float = Field(1.0, ge=0, le=1)
    """The share of successful requests that are written. Errors, slow requests and broken ones always are."""

    slow_seconds: float = Field(1.0, gt=0)
    """A request whose answer begins later than this is marked as slow, and always written."""

    include_path: bool = False
    """Whether the path and the query as they were sent are written, credentials in the query taken out. Paths hold
    personal data and one-time links; without this there is the route's template only."""

    request_headers: tuple[str, ...] = ()
    """Fields of the request that are written; of credentials only that they were there."""

    response_headers: tuple[str, ...] = ()
    """Fields of the answer that are written; of credentials only that they were there."""

    redact: tuple[str, ...] = ()
    """Further names whose values are taken out of queries, headers and extras: whatever contains one of them."""

    omit: tuple[str, ...] = ()
    """Fields that are left out, such as ``client`` and ``user_agent`` where they may not be kept."""

    max_value_chars: int = Field(256, ge=16)
    """What a client sent is cut off here, value by value."""

    @field_validator("request_headers", "response_headers")
    @classmethod
    def _are_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            field(name, "x")
        return names

    @field_validator("omit")
    @classmethod
    def _may_be_left_out(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in _OPTIONAL.split():
                raise ValueError(f"{name!r} cannot be left out{did_you_mean(name, _OPTIONAL.split())}")
        return names


# --- engine -----------------------------------------------------------------------------------------------------------


class HttpExchange:
    """A request and its answer, as far as they have gone.

    Args:
        now: The monotonic clock, in seconds.
        context: What is known about the request.
        scope: The request as it came.
    """

    event = "request"

    # What most exchanges never change stands on the class, which makes a new one cheaper.
    status: int | None = None
    first_byte: float | None = None
    ended: float | None = None
    headers: Iterable[tuple[bytes, bytes]] = ()
    bytes_in = bytes_out = 0
    disconnected = written = False
    error: BaseException | None = None
    trace_id: str | None = None
    path: str | None = None

    def __init__(self, now: Callable[[], float], context: RequestContext, scope: Scope) -> None:
        self.now = now
        self.context = context
        self.scope = scope
        self.started = now()

    def received(self, message: Message) -> bool:
        """Takes note of what the application was given; says whether the exchange is over with it."""
        if message["type"] == "http.request":
            self.bytes_in += len(message.get("body", b""))
        elif self.ended is None:
            self.disconnected = True
        return False

    def sent(self, message: Message) -> bool:
        """Takes note of what the application has sent; says whether the line can be written."""
        kind = message["type"]
        if kind == "http.response.body":
            self.bytes_out += len(message.get("body", b""))
            if message.get("more_body"):
                return False
        elif kind == "http.response.start":
            self.status = message["status"]
            self.began(message)
            return False
        elif kind != "http.response.pathsend":
            return False
        self.ended = self.now()
        # After a server error the exception is still on its way through here, and its name belongs in the line.
        return (self.status or 0) < _SERVER_ERROR

    def began(self, message: Message) -> None:
        """Takes note of the message that starts the answer."""
        self.first_byte = self.now()
        self.headers = message.get("headers") or ()
        # Now, because the span of a layer further in has ended when the application returns.
        self.trace_id = trace_id_of(self.context)

    def outcome(self) -> Outcome:
        """How it went, apart from what the status says."""
        if self.disconnected:
            return "disconnected"
        if self.ended is not None:
            return "completed"
        if self.error is None:
            return "unfinished"
        return "cancelled" if isinstance(self.error, asyncio.CancelledError) else "failed"

    def fields(self) -> dict[str, Any]:
        """What only this kind of exchange has."""
        return {"bytes_in": self.bytes_in, "bytes_out": self.bytes_out}


class WebSocketExchange(HttpExchange):
    """A websocket, from its handshake to its close. Its bytes are not counted, its messages are."""

    event = "websocket"

    accepted = False
    close_code: int | None = None
    messages_in = messages_out = 0

    def received(self, message: Message) -> bool:
        """Takes note of what the application was given; says whether the exchange is over with it."""
        kind = message["type"]
        if kind == "websocket.receive":
            self.messages_in += 1
        elif kind == "websocket.disconnect" and self.ended is None:
            self.close_code = message.get("code", _NO_STATUS_RECEIVED)
            self.disconnected = not self.accepted or self.close_code not in _PROPER_ENDS
            self.ended = self.now()
            return True
        return False

    def sent(self, message: Message) -> bool:
        """Takes note of what the application has sent; says whether the line can be written."""
        kind = message["type"]
        if kind == "websocket.send":
            self.messages_out += 1
        elif kind == "websocket.accept":
            self.accepted = True
            self.began(message)
        elif kind == "websocket.close":
            self.close_code = message.get("code", 1000)
            self.ended = self.now()
            return True
        else:
            # A handshake that is refused with an HTTP answer (the extension websocket.http.response).
            return super().sent({**message, "type": kind.removeprefix("websocket.")})
        return False

    def outcome(self) -> Outcome:
        """How it went, apart from what the close code says."""
        outcome = super().outcome()
        return "refused" if outcome == "completed" and not self.accepted else outcome

    def fields(self) -> dict[str, Any]:
        """What only this kind of exchange has."""
        return {"code": self.close_code, "messages_in": self.messages_in, "messages_out": self.messages_out}


class AccessLog:
    """Decides which exchanges are written, and makes their lines.

    Args:
        settings: The settings of the access log.
        clock: Where the time of a line comes from.
        chance: A number from 0 to 1 for each successful request, to sample by. At random, and not by an id: ids come
            from clients, who could stay out of the log with them.
    """

    def __init__(
        self, settings: AccessLogSettings, *, clock: Clock | None = None, chance: Callable[[], float] = random.random
    ) -> None:
        self._rate = settings.sample_rate
        self._slow = settings.slow_seconds
        self._max = settings.max_value_chars
        self._omit = settings.omit
        self._redactor = Redactor(settings.redact)
        self._request_headers = _names(settings.request_headers)
        self._response_headers = _names(settings.response_headers)
        self._chance = chance
        self._time = (clock or SystemClock()).time
        # Nothing but the usual fields, whose line is written down in one go.
        self._usual = not (
            settings.omit or settings.request_headers or settings.response_headers or settings.include_path
        )
        self._begin = lru_cache(maxsize=4096)(self._beginning)
        self._text = lru_cache(maxsize=4096)(lambda value: quoted(self._clean(value.decode("latin-1"))))

    def write(self, exchange: HttpExchange) -> None:
        """Writes the line of an exchange, once, unless it is left out as one of many that went well."""
        if exchange.written:
            return
        exchange.written = True
        outcome, status = exchange.outcome(), exchange.status or 0
        slow = (exchange.first_byte or 0.0) - exchange.started > self._slow
        if outcome == "completed" and status < _ERROR and not slow:
            if self._rate < 1 and self._chance() >= self._rate:
                return
            if self._usual and exchange.event == "request":
                formatter = shortest_way(logger)
                if formatter is not None and logger.isEnabledFor(logging.INFO):
                    write_line(formatter.head(self._time(), "INFO") + self._usual_line(exchange))
                    return
        bad = outcome == "failed" or (outcome != "disconnected" and status >= _SERVER_ERROR)
        level = logging.ERROR if bad else logging.INFO
        if not logger.isEnabledFor(level):
            return
        fields = self._fields(exchange, outcome)
        if slow:
            fields["slow"] = True
        if exchange.error is not None:
            fields["error"] = type(exchange.error).__name__
        self._add_options(fields, exchange)
        said = (fields["method"], fields["route"] or "-", exchange.status or outcome, fields["duration_ms"])
        write_fields(logger, level, fields, "%s %s %s in %s ms", said, created=self._time())

    def _usual_line(self, exchange: HttpExchange) -> str:
        """What :meth:`_fields` says of a request that went well, as JSON, behind its time: a quarter of the work."""
        context, scope, started = exchange.context, exchange.scope, exchange.started
        begin = self._begin(scope["method"], None if context.route is None else context.route.template, exchange.status)
        fields = context.fields
        agent = get(scope["headers"], b"user-agent") if fields is None else fields.get(b"user-agent")
        more = ""
        if context.principal is not None:
            more = f',"principal":{quoted(self._clean(_name_of(context.principal)))}'
        if context.tenant is not None:
            more += f',"tenant":{quoted(self._clean(context.tenant))}'
        if context.version is not None:
            more += f',"version":{quoted(context.version)}'
        if agent is not None:
            more += f',"user_agent":{self._text(agent)}'
        if exchange.trace_id is not None:
            more += f',"trace_id":"{exchange.trace_id}"'
        return (
            f"{begin}{((exchange.ended or started) - started) * 1000:.3f},"
            f'"first_byte_ms":{((exchange.first_byte or started) - started) * 1000:.3f},"bytes_in":{exchange.bytes_in},'
            f'"bytes_out":{exchange.bytes_out},"request_id":{quoted(context.request_id)},'
            f'"client":{quoted(context.client.address)}{more}}}'
        )

    def _beginning(self, method: str, route: str | None, status: int) -> str:
        fields = {"event": HttpExchange.event, "method": printable(method[: self._max]), "route": route}
        return to_json(fields | {"status": status, "outcome": "completed", "duration_ms": 0})[1:-2]

    def _fields(self, exchange: HttpExchange, outcome: Outcome) -> dict[str, Any]:
        context, scope = exchange.context, exchange.scope
        started, first_byte = exchange.started, exchange.first_byte
        ended = exchange.now() if exchange.ended is None else exchange.ended
        fields: dict[str, Any] = {
            "event": exchange.event,
            "method": printable(scope.get("method", "GET")[: self._max]),
            "route": None if context.route is None else context.route.template,
            "status": exchange.status,
            "outcome": outcome,
            "duration_ms": round((ended - started) * 1000, 3),
        }
        if first_byte is not None:
            fields["first_byte_ms"] = round((first_byte - started) * 1000, 3)
        fields.update(exchange.fields())
        fields["request_id"] = context.request_id
        fields["client"] = context.client.address
        if context.principal is not None:
            fields["principal"] = self._clean(_name_of(context.principal))
        if context.tenant is not None:
            fields["tenant"] = self._clean(context.tenant)
        if context.version is not None:
            fields["version"] = context.version
        agent = get(scope["headers"], b"user-agent")
        if agent is not None:
            fields["user_agent"] = self._clean(agent.decode("latin-1"))
        trace_id = exchange.trace_id
        if trace_id is None and exchange.status is None:
            trace_id = trace_id_of(context)
        if trace_id is not None:
            fields["trace_id"] = trace_id
        return fields

    def _add_options(self, fields: dict[str, Any], exchange: HttpExchange) -> None:
        if exchange.path is not None:
            fields["path"] = exchange.path
        if self._request_headers:
            fields["request_headers"] = self._headers(exchange.scope["headers"], self._request_headers)
        if self._response_headers:
            fields["response_headers"] = self._headers(exchange.headers, self._response_headers)
        for name in self._omit:
            fields.pop(name, None)

    def path(self, scope: Scope) -> str:
        """The path and the query as they were sent, without credentials."""
        path = scope.get("raw_path") or scope["path"].encode("utf-8", "backslashreplace")
        # Cut before it is looked through: a name stands before its value, so what is cut hides nothing.
        text = self._redactor.text(path[: self._max].decode("latin-1"))
        query = scope.get("query_string", b"")[: self._max].decode("latin-1")
        return printable(f"{text}?{self._redactor.query(query)}" if query else text)

    def _headers(self, headers: Iterable[tuple[bytes, bytes]], wanted: dict[bytes, str]) -> dict[str, str]:
        found: dict[str, str] = {}
        for raw, value in headers:
            name = wanted.get(raw.lower())
            if name is not None:
                hidden = self._redactor.is_sensitive(name)
                text = REDACTED if hidden else self._redactor.text(self._clean(value.decode("latin-1")))
                found[name] = f"{found[name]}, {text}"[: self._max] if name in found else text
        return found

    def _clean(self, text: str) -> str:
        return printable(text[: self._max])


def _names(names: Iterable[str]) -> dict[bytes, str]:
    return {name.lower().encode("ascii"): name.lower() for name in names}


def _name_of(principal: Any) -> str:
    """A name for the caller. Of an object only its id: its text may hold more than a log may."""
    for value in (principal, *(getattr(principal, name, None) for name in ("id", "subject", "name"))):
        if isinstance(value, (str, int)):
            return str(value)
    return type(principal).__name__


# --- layer ------------------------------------------------------------------------------------------------------------


class AccessLogMiddleware:
    """Writes the line of every request and websocket that passes.

    Args:
        app: The application inside.
        settings: The settings of the access log.
        clock: Where the time comes from.
    """

    def __init__(self, app: ASGIApp, settings: AccessLogSettings | None = None, *, clock: Clock | None = None) -> None:
        self.app = app
        self._settings = settings or AccessLogSettings()
        self._log = AccessLog(self._settings, clock=clock)
        self._now = (clock or SystemClock()).monotonic
        if self._settings.enabled:
            make_visible(logger, self._settings.format, self._settings.redact)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        if scope["type"] not in ("http", "websocket") or not self._settings.enabled:
            await self._pass_by(scope, receive, send)
            return
        context = request_context.ensure(scope)
        if context.state.setdefault(AccessLogMiddleware, self) is not self:
            # One further out writes the line of this request.
            await self.app(scope, receive, send)
            return
        route_of(scope)
        exchange = (HttpExchange if scope["type"] == "http" else WebSocketExchange)(self._now, context, scope)
        if self._settings.include_path:
            exchange.path = self._log.path(scope)

        async def receive_counted() -> Message:
            message = await receive()
            if exchange.received(message):
                self._log.write(exchange)
            return message

        sent = exchange.sent

        async def send_counted(message: Message) -> None:
            try:
                await send(message)
            except OSError:
                # What a server raises when the client has gone (ASGI 2.4).
                exchange.disconnected = True
                raise
            if sent(message):
                self._log.write(exchange)

        try:
            await self.app(scope, receive_counted, send_counted)
        except BaseException as error:
            exchange.error = error
            raise
        finally:
            self._log.write(exchange)

    async def _pass_by(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)
        if scope["type"] == "lifespan":
            flush()


# --- all of it --------------------------------------------------------------------------------------------------------


def configure_logging(
    settings: AccessLogSettings | None = None,
    *,
    level: int | str = "INFO",
    queue_size: int = 0,
    stream: TextIO | None = None,
) -> logging.Handler:
    """Gives the records of every library the form of ours: one line each, with its request, without credentials.

    The root logger gets one handler; plain stream handlers that it had give way, others stay. uvicorn's records go
    there too, and its own access log is switched off. Call it where the application is made; once more replaces what
    the first call did. With ``uvicorn.run(app)`` from Python pass ``log_config=None``, or uvicorn takes its own back.

    Args:
        settings: Whose ``format`` and ``redact`` count; usually ``Settings().access_log``.
        level: The level of the root logger.
        queue_size: Above 0, a thread writes the lines, and so many may wait for it; further ones are dropped and
            counted. An output that stands still then does not stall the event loop.
        stream: Where lines go; standard output by default.

    Returns:
        The handler; of a queue, ``dropped`` says how many records were lost.
    """
    settings = settings or AccessLogSettings()
    handler: logging.Handler
    handler = QueuedHandler(stream, max_records=queue_size) if queue_size > 0 else LineHandler(stream)
    take_over_root(handler, settings.format, settings.redact, level)
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    return handler
