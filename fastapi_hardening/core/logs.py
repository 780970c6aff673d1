"""Log records as lines: JSON for machines or text for people, with the request they belong to, without credentials.

Everything is the standard library's ``logging``, so the records of every other library become such lines too. A line
cannot be forged: JSON escapes what is in a value, and in text every character that is not printable is escaped. What
goes to a queue is formatted first, in the task that logs it, so that it still knows its request.

Example:
    >>> record = logging.makeLogRecord({"name": "shop", "levelname": "INFO", "msg": "paid", "created": 0, "order": 1})
    >>> JsonFormatter().format(record)
    '{"time":"1970-01-01T00:00:00.000Z","level":"info","logger":"shop","message":"paid","order":1}'
"""

import json
import logging
import os
import re
import threading
import time
from collections.abc import Iterable, Mapping
from json.encoder import encode_basestring_ascii
from typing import Any, Literal

from opentelemetry import trace

from fastapi_hardening.core import context as request_context
from fastapi_hardening.core.context import RequestContext
from fastapi_hardening.core.redaction import STANDARD, Redactor

LogFormat = Literal["json", "text"]

_OURS = frozenset({"time", "level", "logger", "exception"})
_NONE = "-"

quoted = encode_basestring_ascii
"""A text as a string of JSON, in ASCII."""


# --- which request ----------------------------------------------------------------------------------------------------

# https://www.w3.org/TR/trace-context/#traceparent-header: in lower case, ids not all zero, and version 00 ends there.
_TRACEPARENT = re.compile(
    rb"(?!ff|00.{54})[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?", re.DOTALL
)


def trace_id_of(context: RequestContext | None) -> str | None:
    """The W3C trace id: that of the request's ``traceparent`` if it is well-formed, else of the span that records."""
    if context is not None and context.traceparent is not None:
        found = _TRACEPARENT.fullmatch(context.traceparent)
        if found is not None:
            return found[1].decode("ascii")
    span = trace.get_current_span()
    if span is trace.INVALID_SPAN:
        return None
    return format(span.get_span_context().trace_id, "032x") if span.is_recording() else None


class CorrelationFilter(logging.Filter):
    """Puts ``request_id`` and ``trace_id`` on every record; ``-`` outside a request. Add it to a handler of yours.

    It reads the current context, which endpoints in threads, tasks and background tasks inherit. A ``threading.Thread``
    of your own does not: start it with ``contextvars.copy_context().run``.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Amends the record; an id that is on it already stays."""
        values = record.__dict__
        if "request_id" not in values:
            context = request_context.current()
            values["request_id"] = _NONE if context is None else context.request_id
            values.setdefault("trace_id", trace_id_of(context) or _NONE)
        return True


# --- lines ------------------------------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """The text with every character escaped that is not printable: line ends, terminal controls, reversals of text."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def to_json(fields: Mapping[str, Any]) -> str:
    """An object of JSON on one line, in ASCII; what JSON has no form for becomes text."""
    try:
        return _encode(fields)
    except (TypeError, ValueError, RecursionError):
        # A key that is no text, a NaN, a structure in itself: by the parts that can be written.
        return "{" + ",".join(f"{quoted(name)}:{_part(value)}" for name, value in fields.items()) + "}"


def _part(value: Any) -> str:
    try:
        return _encode(value)
    except (TypeError, ValueError, RecursionError):
        return quoted(_as_text(value))


def _as_text(value: Any) -> str:
    try:
        return str(value)
    except Exception:  # noqa: BLE001 - a record must not be lost for the sake of one value
        return f"<{type(value).__name__}>"


_encode = json.JSONEncoder(check_circular=False, allow_nan=False, separators=(",", ":"), default=_as_text).encode


_BLANK = vars(logging.makeLogRecord({}))


class _FieldsRecord(logging.LogRecord):
    """A record of fields that are clean already, made without looking for its caller: a fifth of the work."""

    def __init__(
        self, name: str, level: int, *, fields: dict[str, Any], message: str, args: tuple[Any, ...], created: float
    ) -> None:
        values = self.__dict__
        values.update(_BLANK)
        values.update(fields)
        values["_fields"] = fields
        self.name = name
        self.levelno = level
        self.levelname = logging.getLevelName(level)
        self.msg = message
        self.args = args
        self.created = created
        self.msecs = created % 1 * 1000
        self.process = os.getpid()
        self.thread = threading.get_ident()
        self.threadName = threading.current_thread().name


def write(
    logger: logging.Logger,
    level: int,
    fields: dict[str, Any],
    message: str,
    arguments: tuple[Any, ...],
    *,
    created: float,
) -> None:
    """Logs fields that are clean already, with a message for formatters that show nothing else.

    The fields are attributes of the record, as with ``extra``; our own formatters take them as they are.
    """
    if logging.getLogRecordFactory() is logging.LogRecord:
        record: logging.LogRecord = _FieldsRecord(
            logger.name, level, fields=fields, message=message, args=arguments, created=created
        )
    else:
        # The application's records have something of their own, which its formatters may ask for.
        record = logger.makeRecord(logger.name, level, "", 0, message, arguments, None, extra=fields)
        record.__dict__["_fields"] = fields
        record.created = created
    logger.handle(record)


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON: time (UTC, ISO 8601), level, logger, message, then what was given as ``extra``.

    Args:
        redactor: Takes credentials out of tracebacks; messages and extras are the filter's.
    """

    def __init__(self, redactor: Redactor | None = None) -> None:
        super().__init__()
        self._redactor = redactor or Redactor()
        self._second: tuple[int, str] = (-1, "")

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        fields = record.__dict__.get("_fields")
        if fields is None:
            fields = {"logger": record.name, "message": record.getMessage()}
            for name, value in _extras(record):
                fields[f"extra_{name}" if name in _OURS else name] = value
            text = _traceback(self, record)
            if text:
                fields["exception"] = self._redactor.text(text)
        return self.line(record.created, record.levelname, fields)

    def line(self, created: float, level: str, fields: Mapping[str, Any]) -> str:
        """The line of fields that are clean already.

        Args:
            created: When it happened, in seconds since the epoch.
            level: The name of the level.
            fields: What it says, in this order behind time and level.
        """
        return self.head(created, level) + to_json(fields)[1:]

    def head(self, created: float, level: str) -> str:
        """How a line begins: the brace, time and level, each with its comma."""
        second = int(created)
        known, prefix = self._second
        if known != second:
            prefix = time.strftime('{"time":"%Y-%m-%dT%H:%M:%S.', time.gmtime(second))
            self._second = (second, prefix)
        return f'{prefix}{int((created - second) * 1000):03d}Z","level":"{level.lower()}",'


class TextFormatter(logging.Formatter):
    """A record as one line for people, local time; a traceback follows with its lines indented.

    Args:
        redactor: Takes credentials out of tracebacks; messages and extras are the filter's.
    """

    def __init__(self, redactor: Redactor | None = None) -> None:
        super().__init__()
        self._redactor = redactor or Redactor()

    def format(self, record: logging.LogRecord) -> str:
        """The lines, without the last one's end."""
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        message = printable(record.getMessage())
        line = f"{clock}.{int(record.created % 1 * 1000):03d} {record.levelname:<7} {printable(record.name)}: {message}"
        said = record.args if isinstance(record.args, tuple) else ()
        for name, value in (record.__dict__.get("_fields") or dict(_extras(record))).items():
            # What the message says already need not be said twice.
            if value is not None and (name == "request_id" or value not in said):
                text = printable(_as_text(value))
                line += f" {printable(name)}={quoted(text) if ' ' in text or not text else text}"
        text = self._redactor.text(_traceback(self, record))
        # Indented, or the text of an exception could pass for a line of its own.
        return line + "".join(f"\n    | {printable(part)}" for part in text.splitlines())


def _extras(record: logging.LogRecord) -> Iterable[tuple[str, Any]]:
    for name, value in record.__dict__.items():
        if name not in STANDARD and not (value == _NONE and name in ("request_id", "trace_id")):
            yield name, value


def _traceback(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    parts = [formatter.formatException(record.exc_info)] if record.exc_info else [record.exc_text or ""]
    if record.stack_info:
        parts.append(record.stack_info)
    return "\n".join(filter(None, parts))


def line_formatter(log_format: LogFormat, redact: Iterable[str] = ()) -> logging.Formatter:
    """The formatter of a format."""
    return (JsonFormatter if log_format == "json" else TextFormatter)(Redactor(redact))
