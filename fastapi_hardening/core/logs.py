"""Log records as lines: JSON for machines or text for people, with the request they belong to, without credentials.

Everything is the standard library's ``logging``, so the records of every other library become such lines too. A line
cannot be forged: JSON escapes what is in a value, and in text every character that is not printable is escaped. What
goes to a queue is formatted first, in the task that logs it, so that it still knows its request.

Example:
    >>> record = logging.makeLogRecord({"name": "shop", "levelname": "INFO", "msg": "paid", "created": 0, "order": 1})
    >>> JsonFormatter().format(record)
    '{"time":"1970-01-01T00:00:00.000Z","level":"info","logger":"shop","message":"paid","order":1}'
    >>> Redactor().query("page=2&access_token=abc")
    'page=2&access_token=[redacted]'
"""

import atexit
import dataclasses
import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from functools import lru_cache
from json.encoder import encode_basestring_ascii as _quoted
from queue import SimpleQueue
from typing import Any, Literal, TextIO

from opentelemetry import trace

from fastapi_hardening.core import context as request_context
from fastapi_hardening.core.context import RequestContext

LogFormat = Literal["json", "text"]

REDACTED = "[redacted]"
PACKAGE = "fastapi_hardening"

# Record attributes that are not what the application gave as `extra`. The last one is uvicorn's, with colours.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}
_OURS = frozenset({"time", "level", "logger", "exception"})
_NONE = "-"


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


# --- redaction --------------------------------------------------------------------------------------------------------

# A name that contains one of these, or is one of those, is a credential's, whatever its case, hyphens and underscores.
_CONTAINED = (
    "accesskey apikey authorization clientcert cookie credential jwt passphrase passwd password privatekey secret "
    "sessionid sessionkey signature token"
)
_WHOLE = "auth cvc cvv otp pin pwd session sid sig xauth"
# The authorization code of OAuth; anywhere but in a query a code is something else.
_WHOLE_IN_QUERY = "code key"

_PAIR = re.compile(r"([?&;#])([^=&;#?\s\"'<>]{1,128})=([^&;#\s\"'<>]+)")
_SCHEME = re.compile(r"\b(bearer|basic)(\s+)[A-Za-z0-9._~+/=-]{16,}", re.IGNORECASE)
_USER_INFO = re.compile(r"://[^/\s@:]*:[^/\s@]+@")
_NOT_IN_NAMES = re.compile(r"[^a-z0-9]+")
_ESCAPED = re.compile(r"%([0-9A-Fa-f]{2})")
_MAX_DEPTH = 8


class Redactor:
    """Knows the names of credentials, and takes their values out of queries, texts and structures.

    It goes by names and by the forms in which credentials travel. It cannot know that ``order 4711 for eve's-password``
    holds one: do not log those.

    Args:
        names: Further names, beside the usual ones (password, secret, token, cookie, authorization, ...). A name that
            contains one of them counts, whatever its case and its hyphens.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        further = filter(None, (_plain(name) for name in names))
        self._contained = (*_CONTAINED.split(), *further)
        self._whole = frozenset(_WHOLE.split())
        self._whole_in_query = self._whole | frozenset(_WHOLE_IN_QUERY.split())
        # Names come from clients too, so they are not kept for ever.
        self.is_sensitive = lru_cache(maxsize=1024)(self._is_sensitive)

    def _is_sensitive(self, name: str, *, in_query: bool = False) -> bool:
        """Whether the value under this name is a credential."""
        plain = _plain(name)
        whole = self._whole_in_query if in_query else self._whole
        return plain in whole or any(part in plain for part in self._contained)

    def query(self, query: str) -> str:
        """A query string, or a form, without the values of credentials."""
        return "&".join(self._pair(pair) for pair in query.split("&")) if "=" in query else query

    def _pair(self, pair: str) -> str:
        name, equals, value = pair.partition("=")
        if not equals:
            return pair
        hidden = self.is_sensitive(_unescaped(name)[:128], in_query=True)
        if not hidden and ("=" in value or "%" in value):
            # Such as the address to return to, with a token of its own.
            inner = _unescaped(value)
            hidden = self.text(inner) != inner
        return f"{name}={REDACTED}" if hidden else pair

    def text(self, text: str) -> str:
        """A message without the credentials in addresses, and without those of ``Bearer`` and ``Basic``."""
        if "=" in text:
            text = _PAIR.sub(lambda found: found[1] + self._pair(f"{found[2]}={found[3]}"), text)
        if "://" in text:
            text = _USER_INFO.sub(f"://{REDACTED}@", text)
        return _SCHEME.sub(rf"\1\2{REDACTED}", text)

    def value(self, name: str, value: Any, _depth: int = 0) -> Any:
        """What may be logged under a name: a copy without credentials, of structures at any level."""
        if value is None or isinstance(value, bool):
            return value
        if self.is_sensitive(name[:128]) or _depth > _MAX_DEPTH:
            return REDACTED
        if isinstance(value, str):
            return self.text(value)
        if hasattr(value, "model_dump"):
            value = value.model_dump()
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            return {str(key): self.value(str(key), inner, _depth + 1) for key, inner in value.items()}
        if isinstance(value, (list, tuple, set, frozenset)):
            return [self.value("", inner, _depth + 1) for inner in value]
        return value


def _plain(name: str) -> str:
    return _NOT_IN_NAMES.sub("", name.lower())


def _unescaped(text: str) -> str:
    """Percent-encoding undone; what is not ASCII is in no name that we know."""
    return _ESCAPED.sub(lambda found: chr(int(found[1], 16)), text) if "%" in text else text


class RedactionFilter(logging.Filter):
    """Takes credentials out of the ``extra`` and the message of every record. Add it to a handler of yours.

    Args:
        names: Further names of credentials.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        super().__init__()
        self._redactor = Redactor(names)

    def filter(self, record: logging.LogRecord) -> bool:
        """Amends the record, and nothing of what it refers to."""
        values = record.__dict__
        if "_fields" in values:
            return True
        for name in values.keys() - _STANDARD:
            values[name] = self._redactor.value(name, values[name])
        if isinstance(record.args, Mapping):
            record.args = self._redactor.value("", record.args)
        try:
            message = record.getMessage()
        except (TypeError, ValueError, KeyError):
            # The handler tells of a format that does not fit its arguments.
            return True
        clean = self._redactor.text(message)
        if clean != message:
            record.msg, record.args = clean, ()
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
        return "{" + ",".join(f"{_quoted(name)}:{_part(value)}" for name, value in fields.items()) + "}"


def _part(value: Any) -> str:
    try:
        return _encode(value)
    except (TypeError, ValueError, RecursionError):
        return _quoted(_as_text(value))


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
        second = int(record.created)
        known, prefix = self._second
        if known != second:
            prefix = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
            self._second = (second, prefix)
        head = f'{{"time":"{prefix}.{int(record.created % 1 * 1000):03d}Z","level":{_quoted(record.levelname.lower())},'
        fields = record.__dict__.get("_fields")
        if fields is None:
            head += f'"logger":{_quoted(record.name)},'
            fields = {"message": record.getMessage()}
            for name, value in _extras(record):
                fields[f"extra_{name}" if name in _OURS else name] = value
            text = _traceback(self, record)
            if text:
                fields["exception"] = self._redactor.text(text)
        return head + to_json(fields)[1:]


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
                line += f" {printable(name)}={_quoted(text) if ' ' in text or not text else text}"
        text = self._redactor.text(_traceback(self, record))
        # Indented, or the text of an exception could pass for a line of its own.
        return line + "".join(f"\n    | {printable(part)}" for part in text.splitlines())


def _extras(record: logging.LogRecord) -> Iterable[tuple[str, Any]]:
    for name, value in record.__dict__.items():
        if name not in _STANDARD and not (value == _NONE and name in ("request_id", "trace_id")):
            yield name, value


def _traceback(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    parts = [formatter.formatException(record.exc_info)] if record.exc_info else [record.exc_text or ""]
    if record.stack_info:
        parts.append(record.stack_info)
    return "\n".join(filter(None, parts))


def line_formatter(log_format: LogFormat, redact: Iterable[str] = ()) -> logging.Formatter:
    """The formatter of a format."""
    return (JsonFormatter if log_format == "json" else TextFormatter)(Redactor(redact))


# --- handlers ---------------------------------------------------------------------------------------------------------


class QueuedHandler(logging.Handler):
    """Writes lines in a thread of its own, so that an output that stands still does not stall the event loop.

    When the queue is full, records are dropped and counted; a line says how many once there is room again. The thread
    starts with the first record, in each process anew.

    Args:
        stream: Where lines go; standard output by default.
        max_records: How many lines may wait.

    Attributes:
        dropped: How many records were dropped so far.
    """

    _BATCH = 256
    _PATIENCE_SECONDS = 2.0

    def __init__(self, stream: TextIO | None = None, *, max_records: int = 10_000) -> None:
        super().__init__()
        if max_records < 1:
            raise ValueError(f"max_records is how many lines may wait, at least 1, not {max_records}")
        self.dropped = 0
        self._told = 0
        self._stream = stream
        self._max_records = max_records
        self._lines: SimpleQueue[str | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._process = 0
        atexit.register(self.close)

    def emit(self, record: logging.LogRecord) -> None:
        """Puts the line of a record on the queue; :mod:`logging` holds this handler's lock meanwhile."""
        if self._lines.qsize() >= self._max_records:
            self.dropped += 1
            return
        try:
            line = self.format(record)
        except Exception:  # noqa: BLE001 - what logging does with it is the application's to configure
            self.handleError(record)
            return
        if self._thread is None or self._process != os.getpid():
            self._start()
        self._lines.put(line)

    def _start(self) -> None:
        if self._process != os.getpid():
            # After a fork the thread is the parent's, and so are the lines that wait.
            self._lines = SimpleQueue()
            self._process = os.getpid()
        self._thread = threading.Thread(
            target=self._write_all, args=(self._lines,), name="fastapi_hardening.logs", daemon=True
        )
        self._thread.start()

    def _write_all(self, lines: "SimpleQueue[str | None]") -> None:
        ended = False
        while not ended:
            batch = [lines.get()]
            while len(batch) < self._BATCH and not lines.empty():
                batch.append(lines.get())
            ended = None in batch
            texts = [line for line in batch if line is not None]
            dropped = self.dropped
            if dropped > self._told:
                texts.append(self._loss(dropped - self._told))
            if texts:
                try:
                    stream = self._stream or sys.stdout
                    stream.write("\n".join(texts) + "\n")
                    stream.flush()
                    self._told = dropped
                except (OSError, ValueError):
                    # The output is gone. There is nowhere left to say so, but in the count.
                    self.dropped += len(texts)

    def _loss(self, number: int) -> str:
        record = logging.LogRecord(
            f"{PACKAGE}.logs", logging.WARNING, "", 0, "%d log records were dropped: the output is too slow", (), None
        )
        record.args = (number,)
        return self.format(record)

    def flush(self) -> None:
        """Has what waits written, for at most two seconds."""
        thread = self._thread
        if thread is not None and self._process == os.getpid():
            self._thread = None
            self._lines.put(None)
            thread.join(self._PATIENCE_SECONDS)

    def close(self) -> None:
        """Flushes. A record that comes later is written all the same: uvicorn closes all handlers when it starts."""
        self.flush()
        super().close()


class LineHandler(logging.StreamHandler[TextIO]):
    """Writes lines at once; ``logging.StreamHandler`` with one lock and two calls less.

    Args:
        stream: Where lines go; by default whatever is standard output at that moment.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__(stream)
        self._stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a record; :mod:`logging` holds this handler's lock meanwhile."""
        try:
            stream = self._stream or sys.stdout
            stream.write(self.format(record) + "\n")
            stream.flush()
        except Exception:  # noqa: BLE001 - what logging does with it is the application's to configure
            self.handleError(record)


class _LastResort(LineHandler):
    """Shows this package's records as long as nobody else would: as ``logging.lastResort``, with a format."""

    def handle(self, record: logging.LogRecord) -> bool:
        if logging.root.handlers or len(_package.handlers) > 1:
            return False
        return bool(super().handle(record))


_package = logging.getLogger(PACKAGE)
_last_resort = _LastResort()
_root_handler: logging.Handler | None = None


def make_visible(logger: logging.Logger, log_format: LogFormat, redact: Iterable[str] = ()) -> None:
    """Has a logger of this package seen where no logging is configured, at INFO unless it has a level of its own.

    Nothing is shown twice: as soon as the root logger or that of the package has a handler of somebody else, those
    alone show it. Other loggers are not touched.
    """
    _prepare(_last_resort, line_formatter(log_format, redact), redact)
    if _last_resort not in _package.handlers:
        _package.addHandler(_last_resort)
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)


def take_over_root(handler: logging.Handler, log_format: LogFormat, redact: Iterable[str], level: int | str) -> None:
    """Makes a handler the one that writes every library's records, with our format and filters.

    Plain stream handlers of the root logger give way to it, and those of uvicorn, whose access log is switched off.
    Others (a file, an error tracker) stay. A second call replaces what the first has installed.
    """
    global _root_handler  # noqa: PLW0603 - there is one root logger in a process
    _prepare(handler, line_formatter(log_format, redact), redact)
    root = logging.getLogger()
    for old in tuple(root.handlers):
        if old is _root_handler or type(old) is logging.StreamHandler:
            root.removeHandler(old)
            if old is not handler:
                old.close()
    root.addHandler(handler)
    root.setLevel(level)
    _root_handler = handler
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        library = logging.getLogger(name)
        library.handlers.clear()
        # uvicorn writes an access line only where one of these loggers, or one above, has a handler.
        library.propagate = name != "uvicorn.access"


def flush() -> None:
    """Has the lines written that wait. A server that was told to stop may end by its signal, which runs no clean-up."""
    if _root_handler is not None:
        _root_handler.flush()


def _prepare(handler: logging.Handler, formatter: logging.Formatter, redact: Iterable[str]) -> None:
    handler.setFormatter(formatter)
    handler.filters[:] = [_Completion(redact)]


class _Completion(RedactionFilter):
    """Both filters in one, for handlers of ours; fields that are clean already pass."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "_fields" in record.__dict__ or (_correlation.filter(record) and super().filter(record))


_correlation = CorrelationFilter()
