"""Where lines go: to standard output at once or from a thread, for this package alone or for every library.

What shows this package's records where no logging is configured touches nobody else's. Only :func:`take_over_root`
changes the root logger, and only an application asks for that. It is *not* a shipper: no handler here keeps files or
sends lines anywhere; that is for whatever runs the process.

Example:
    >>> import io
    >>> handler = QueuedHandler(io.StringIO(), max_records=100)
    >>> handler.setFormatter(line_formatter("json"))
    >>> record = logging.makeLogRecord({"name": "shop", "levelname": "INFO", "msg": "paid", "created": 0})
    >>> taken = handler.handle(record)
    >>> handler.close()
    >>> handler.dropped
    0
"""

import atexit
import logging
import os
import sys
import threading
from collections.abc import Iterable
from queue import SimpleQueue
from typing import Any, TextIO

from fastapi_hardening.core.logs import CorrelationFilter, JsonFormatter, LogFormat, line_formatter, write
from fastapi_hardening.core.redaction import RedactionFilter

PACKAGE = "fastapi_hardening"


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

    def __init__(self) -> None:
        super().__init__()
        self._alone: list[logging.Handler] = [self]

    def createLock(self) -> None:  # noqa: N802 - the name is the standard library's, which calls it after a fork, too
        """Makes the lock, which is also taken without :mod:`logging`'s calls."""
        super().createLock()
        self._lock: Any = self.lock

    def handle(self, record: logging.LogRecord) -> bool:
        if logging.root.handlers or len(_package.handlers) > 1:
            return False
        return bool(super().handle(record))

    def shortest_way(self, logger: logging.Logger) -> JsonFormatter | None:
        """What makes the lines of a logger, if they go here only, as JSON, and nobody else looks at the records."""
        formatter = self.formatter
        if (
            isinstance(formatter, JsonFormatter)
            and _package.handlers == self._alone
            and not (logging.root.handlers or logger.handlers or logger.filters or _package.filters)
            and logger.propagate
            and logging.getLogRecordFactory() is logging.LogRecord
        ):
            return formatter
        return None

    def write_line(self, line: str) -> None:
        """Writes what is a line already, without making a record of it, which is half of the work."""
        stream = self._stream or sys.stdout
        with self._lock:
            try:
                stream.write(line + "\n")
                stream.flush()
            except Exception:  # noqa: BLE001 - what logging does with it is the application's to configure
                self.handleError(logging.makeLogRecord({"msg": line}))


def write_fields(
    logger: logging.Logger, level: int, fields: dict[str, Any], message: str, args: tuple[Any, ...], *, created: float
) -> None:
    """Logs fields that are clean already, as :func:`~fastapi_hardening.core.logs.write` does, by the shortest way."""
    formatter = shortest_way(logger)
    if formatter is None:
        write(logger, level, fields, message, args, created=created)
    else:
        write_line(formatter.line(created, logging.getLevelName(level), fields))


_package = logging.getLogger(PACKAGE)
_last_resort = _LastResort()
shortest_way = _last_resort.shortest_way
write_line = _last_resort.write_line
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
