"""Records as lines: what stands in them, what cannot, and who writes them."""

import asyncio
import io
import json
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from pydantic import BaseModel

from fastapi_hardening.core import context as request_context
from fastapi_hardening.core.client_ip import NO_ADDRESS
from fastapi_hardening.core.context import RequestContext
from fastapi_hardening.core.log_handlers import (
    LineHandler,
    QueuedHandler,
    make_visible,
    take_over_root,
    write_fields,
)
from fastapi_hardening.core.logs import (
    CorrelationFilter,
    JsonFormatter,
    TextFormatter,
    line_formatter,
    printable,
    to_json,
    trace_id_of,
    write,
)
from fastapi_hardening.core.redaction import RedactionFilter, Redactor

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACEPARENT = f"00-{TRACE}-00f067aa0ba902b7-01".encode()


@contextmanager
def bare_logging() -> Iterator[logging.Logger]:
    """A root logger without handlers, not even pytest's, which come with each phase of a test."""
    root = logging.getLogger()
    loggers = [root, *(logging.getLogger(name) for name in ("fastapi_hardening", "uvicorn", "uvicorn.access"))]
    before = [(logger, logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers[:] = []
    try:
        yield root
    finally:
        for logger, handlers, level, propagate in before:
            logger.handlers[:] = handlers
            logger.setLevel(level)
            logger.propagate = propagate


def record(message: str = "hello", *args: Any, **attributes: Any) -> logging.LogRecord:
    values = {"name": "shop", "levelno": 20, "levelname": "INFO", "msg": message, "args": args, "created": 1.5}
    return logging.makeLogRecord(values | attributes)


def context(traceparent: bytes | None = None) -> RequestContext:
    return RequestContext("an-id", NO_ADDRESS, 0, traceparent=traceparent)


def failed() -> Any:
    """The exception info of an exception whose text tries to look like a line of its own."""
    error = ValueError("no\n12:00:00 INFO shop: paid https://api.example/?api_key=abc")
    return type(error), error, error.__traceback__


# --- which request ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "trace_id"),
    [
        (TRACEPARENT, TRACE),
        (b"01" + TRACEPARENT[2:] + b"-more", TRACE),
        (TRACEPARENT + b"-more", None),
        (b"01" + TRACEPARENT[2:] + b"more", None),
        (b"ff" + TRACEPARENT[2:], None),
        (TRACEPARENT.upper(), None),
        (b"00-" + b"0" * 32 + b"-00f067aa0ba902b7-01", None),
        (TRACEPARENT[:36] + b"0" * 16 + b"-01", None),
        (TRACEPARENT[:-1] + b"\n", None),
        (b"", None),
        (None, None),
    ],
)
def test_only_a_well_formed_traceparent_gives_a_trace_id(header: bytes | None, trace_id: str | None) -> None:
    """As the W3C recommendation says."""
    assert trace_id_of(context(header)) == trace_id


@given(st.binary(max_size=60))
def test_whatever_a_client_sends_as_traceparent_a_trace_id_is_32_digits(header: bytes) -> None:
    """Or there is none."""
    trace_id = trace_id_of(context(header))
    assert trace_id is None or (len(trace_id) == 32 and set(trace_id) <= set("0123456789abcdef"))


def test_without_a_traceparent_the_span_that_records_gives_the_trace_id() -> None:
    """Also outside a request."""
    with TracerProvider().get_tracer("test").start_as_current_span("work") as span:
        assert trace_id_of(None) == format(span.get_span_context().trace_id, "032x")
        assert trace_id_of(context(TRACEPARENT)) == TRACE
    with trace.use_span(trace.NonRecordingSpan(span.get_span_context())):
        assert trace_id_of(None) is None


def test_records_know_their_request_in_tasks_and_threads() -> None:
    """Whoever inherits the context logs with its id; outside a request there is a dash."""
    seen: list[tuple[str, str]] = []

    def note() -> None:
        noted: Any = record()
        assert CorrelationFilter().filter(noted)
        seen.append((noted.request_id, noted.trace_id))

    async def noting() -> None:
        note()

    async def request() -> None:
        token = request_context.enter(context(TRACEPARENT))
        await asyncio.create_task(noting())
        await asyncio.to_thread(note)
        request_context.leave(token)
        note()

    asyncio.run(request())
    assert seen == [("an-id", TRACE), ("an-id", TRACE), ("-", "-")]


def test_an_id_that_a_record_has_already_stays() -> None:
    """The application may log about another request."""
    noted: Any = record(request_id="another")
    CorrelationFilter().filter(noted)
    assert noted.request_id == "another"


# --- redaction --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "password",
        "PASSWORD",
        "user[password]",
        "X-API-Key",
        "apiKey",
        "access_token",
        "Authorization",
        "Set-Cookie",
        "client_secret",
        "pin",
    ],
)
def test_names_of_credentials_are_known_however_they_are_written(name: str) -> None:
    """Case, hyphens, underscores and brackets make no difference."""
    assert Redactor().is_sensitive(name)


@pytest.mark.parametrize("name", ["page", "author", "hotpath", "footprint", "code", "shipping", "keyboard", ""])
def test_other_names_are_not(name: str) -> None:
    """Short words count as a whole only."""
    assert not Redactor().is_sensitive(name)


def test_names_of_ones_own_count_as_well() -> None:
    """With everything that contains them; an empty one hides nothing."""
    redactor = Redactor(["Tax-ID", "-"])
    assert redactor.is_sensitive("customer_tax_id")
    assert not redactor.is_sensitive("page")


@pytest.mark.parametrize(
    ("query", "clean"),
    [
        ("page=2&token=abc&x", "page=2&token=[redacted]&x"),
        ("pass%77ord=abc", "pass%77ord=[redacted]"),
        ("code=abc&state=1", "code=[redacted]&state=1"),
        ("next=%2Fcb%3Ftoken%3Dabc", "next=[redacted]"),
        ("next=/cb?token=abc", "next=[redacted]"),
        ("q=a%20b&next=/cb?page=1", "q=a%20b&next=/cb?page=1"),
        ("token=a=b", "token=[redacted]"),
        ("plain", "plain"),
    ],
)
def test_a_query_is_shown_without_its_credentials(query: str, clean: str) -> None:
    """Also where they are percent-encoded, or inside of another address."""
    assert Redactor().query(query) == clean


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (
            "GET https://api.example/a?page=1&api_key=abc#top 200",
            "GET https://api.example/a?page=1&api_key=[redacted]#top 200",
        ),
        ("redis://:pass@cache:6379/0 is gone", "redis://[redacted]@cache:6379/0 is gone"),
        ("Authorization: Bearer abcdefghijklmnop.qrs", "Authorization: Bearer [redacted]"),
        ("Basic instructions follow", "Basic instructions follow"),
        ("x = 1; y = 2", "x = 1; y = 2"),
        ("/a;jsessionid=abc", "/a;jsessionid=[redacted]"),
        ("see https://shop.example/", "see https://shop.example/"),
    ],
)
def test_a_text_is_shown_without_the_credentials_in_addresses(text: str, clean: str) -> None:
    """The usual way in which they get into a log: another library's message."""
    assert Redactor().text(text) == clean


@given(st.text("ab=&?%;#/: 37tokenBearer\n", max_size=200))
def test_redaction_is_done_after_once(text: str) -> None:
    """A second pass finds nothing more."""
    redactor = Redactor()
    assert redactor.text(redactor.text(text)) == redactor.text(text)
    assert redactor.query(redactor.query(text)) == redactor.query(text)


@given(st.text("abcxyz0189", min_size=8), st.text("abc&=? ", max_size=20))
def test_the_value_of_a_token_never_stays(secret: str, around: str) -> None:
    """Wherever it stands in a query."""
    secret = f"SECRET{secret}"
    assert secret not in Redactor().query(f"{around}&access_token={secret}&{around}")
    assert secret not in Redactor().text(f"{around}?access_token={secret}&{around}")


class Account(BaseModel):
    name: str
    password: str


@dataclass
class Login:
    user: str
    pin: int


def test_structures_are_shown_without_credentials_at_any_depth() -> None:
    """As copies: what the application passed stays as it is."""
    given_ = {
        "login": Login("eve", 1234),
        "list": [{"token": "a"}, ("b",)],
        "account": Account(name="eve", password="p"),
    }
    assert Redactor().value("extra", given_) == {
        "login": {"user": "eve", "pin": "[redacted]"},
        "list": [{"token": "[redacted]"}, ["b"]],
        "account": {"name": "eve", "password": "[redacted]"},
    }
    assert given_["list"][0] == {"token": "a"}  # type: ignore[index]
    assert Redactor().value("has_token", value=True) is True
    assert Redactor().value("count", 3) == 3
    assert Redactor().value("kind", Login) is Login


def test_a_structure_in_itself_ends() -> None:
    """Below a depth that nobody reads."""
    endless: dict[str, Any] = {}
    endless["again"] = endless
    assert "[redacted]" in str(Redactor().value("extra", endless))


def test_the_filter_cleans_extras_arguments_and_messages_of_any_logger() -> None:
    """Before a formatter of anybody sees them."""
    noted: Any = record("called %s", "https://x.example/?token=abc", password="p", order=17)
    assert RedactionFilter(["order"]).filter(noted)
    assert noted.getMessage() == "called https://x.example/?token=[redacted]"
    assert (noted.password, noted.order) == ("[redacted]", "[redacted]")
    named = record("%(user)s %(password)s")
    named.args = {"user": "eve", "password": "p"}
    RedactionFilter().filter(named)
    assert named.getMessage() == "eve [redacted]"


def test_the_filter_leaves_a_wrong_format_to_the_handler() -> None:
    """Which tells where it was."""
    wrong = record("%d and %d", 1)
    assert RedactionFilter().filter(wrong)
    assert wrong.args == (1,)


# --- lines ------------------------------------------------------------------------------------------------------------


@given(st.text())
def test_printable_text_is_one_line_and_unchanged_where_it_was_plain(text: str) -> None:
    """No line end, terminal control or reversal of text is left, and any output can encode it."""
    shown = printable(text)
    assert shown.isprintable()
    assert shown == text or not text.isprintable()
    assert len(shown.encode().splitlines()) <= 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=6,
)


@given(st.dictionaries(st.text(), JSON))
def test_every_line_of_json_is_one_line_of_json_in_ascii(fields: dict[str, Any]) -> None:
    """Whatever is in the fields."""
    line = to_json(fields)
    assert len(line.splitlines()) == 1
    assert line.isascii()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(line, parse_constant=refuse).keys() == fields.keys()


class Silent:
    def __str__(self) -> str:
        raise RuntimeError("no")


def test_what_json_has_no_form_for_becomes_text() -> None:
    """A record is not lost for the sake of one value."""
    endless: list[Any] = []
    endless.append(endless)
    fields = json.loads(to_json({"a": {1, 2}, "b": float("nan"), "c": {(1, 2): 3}, "d": Silent(), "e": endless}))
    assert fields == {"a": "{1, 2}", "b": "nan", "c": "{(1, 2): 3}", "d": "<Silent>", "e": "[[...]]"}


def test_a_record_becomes_one_object() -> None:
    """With its extras; those that take a name of ours get another one."""
    line = JsonFormatter().format(record("paid %d", 3, order=17, level="gold", request_id="-", trace_id=TRACE))
    assert json.loads(line) == {
        "time": "1970-01-01T00:00:01.500Z",
        "level": "info",
        "logger": "shop",
        "message": "paid 3",
        "order": 17,
        "extra_level": "gold",
        "trace_id": TRACE,
    }


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_a_traceback_forges_no_line_and_shows_no_credential(log_format: Any) -> None:
    """In JSON it is a value, in text its lines are indented."""
    text = line_formatter(log_format).format(record(exc_info=failed(), stack_info="Stack (most recent call last):"))
    first, *more = text.splitlines()
    assert "hello" in first
    assert all(line.startswith("    | ") for line in more)
    assert "ValueError: no" in text
    assert "Stack (most" in text
    assert "api_key=[redacted]" in text


def test_text_is_for_people_and_cannot_be_forged_either() -> None:
    """Extras follow the message; what has blanks is quoted."""
    line = TextFormatter().format(record("a\nb \x1b[31m", city="New York", order=17, empty="", nothing=None))
    assert "\n" not in line
    assert line.endswith(r'INFO    shop: a\nb \x1b[31m city="New York" order=17 empty=""')


# --- handlers ---------------------------------------------------------------------------------------------------------


class Output(io.StringIO):
    """An output that can stand still, and can be gone."""

    def __init__(self) -> None:
        super().__init__()
        self.writing = threading.Event()
        self.go_on = threading.Event()
        self.gone = False
        self.go_on.set()

    def write(self, text: str) -> int:
        self.writing.set()
        self.go_on.wait(10)
        if self.gone:
            raise BrokenPipeError
        return super().write(text)


def test_lines_of_a_queue_are_written_in_order() -> None:
    """And the handler can be used again after it was closed, as uvicorn closes all of them when it starts."""
    output = Output()
    handler = QueuedHandler(output)
    handler.setFormatter(JsonFormatter())
    for message in "abc":
        handler.handle(record(message))
    handler.close()
    handler.handle(record("d"))
    handler.close()
    handler.close()
    assert [json.loads(line)["message"] for line in output.getvalue().splitlines()] == list("abcd")
    assert handler.dropped == 0


def test_an_output_that_stands_still_stalls_nobody() -> None:
    """What does not fit is dropped and counted, and a line says so."""
    output = Output()
    output.go_on.clear()
    handler = QueuedHandler(output, max_records=2)
    handler.setFormatter(JsonFormatter())
    handler.handle(record("first"))
    assert output.writing.wait(10)
    for _ in range(5):
        handler.handle(record("more"))
    assert handler.dropped == 3
    output.go_on.set()
    handler.close()
    messages = [json.loads(line)["message"] for line in output.getvalue().splitlines()]
    assert messages == ["first", "more", "more", "3 log records were dropped: the output is too slow"]


def test_lines_for_an_output_that_is_gone_are_counted() -> None:
    """And the thread lives on."""
    output = Output()
    output.gone = True
    handler = QueuedHandler(output)
    handler.handle(record())
    handler.close()
    assert handler.dropped == 1
    output.gone = False
    handler.handle(record("again"))
    handler.close()
    assert output.getvalue().startswith("again")


def test_after_a_fork_the_child_has_a_thread_and_a_queue_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines that wait are the parent's to write."""
    output = Output()
    output.go_on.clear()
    handler = QueuedHandler(output)
    handler.handle(record("parent"))
    assert output.writing.wait(10)
    handler.handle(record("waits"))
    parent = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: parent + 1)
    # The child's copy of the handler leaves the thread alone that it has not.
    handler.close()
    output.go_on.set()
    handler.handle(record("child"))
    handler.close()
    assert "child" in output.getvalue()


@pytest.mark.parametrize("make", [LineHandler, QueuedHandler])
def test_a_record_that_cannot_be_formatted_harms_nobody(
    make: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Logging says where it was."""
    handler = make(io.StringIO())
    handler.handle(record("%d", "no number"))
    assert "Logging error" in capsys.readouterr().err


def test_a_queue_needs_room() -> None:
    """For one line at least."""
    with pytest.raises(ValueError, match="at least 1, not 0"):
        QueuedHandler(max_records=0)


def test_where_nobody_shows_our_records_they_go_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    """Until somebody does: nothing is ever shown twice, and no other logger is touched."""
    with bare_logging() as root:
        logger = logging.getLogger("fastapi_hardening.test_logs")
        make_visible(logger, "json")
        make_visible(logger, "json")
        logger.info("seen")
        assert json.loads(capsys.readouterr().out)["message"] == "seen"
        assert root.handlers == []
        root.addHandler(logging.NullHandler())
        logger.info("the root logger's")
        root.handlers[:] = []
        logging.getLogger("fastapi_hardening").addHandler(logging.NullHandler())
        logger.info("somebody's")
        assert capsys.readouterr().out == ""


def test_a_level_of_ones_own_stays() -> None:
    """Whoever wants errors only has set it."""
    logger = logging.getLogger("fastapi_hardening.test_level")
    logger.setLevel(logging.ERROR)
    make_visible(logger, "json")
    assert logger.level == logging.ERROR


def test_the_root_logger_gets_one_handler_however_often_it_is_taken_over(capsys: pytest.CaptureFixture[str]) -> None:
    """Plain stream handlers give way, uvicorn's too; others stay."""
    with bare_logging() as root:
        file = logging.NullHandler()
        access = logging.getLogger("uvicorn.access")
        root.handlers[:] = [logging.StreamHandler(io.StringIO()), file]
        access.addHandler(logging.StreamHandler(io.StringIO()))
        first, output = LineHandler(), io.StringIO()
        take_over_root(first, "text", (), "INFO")
        take_over_root(first, "text", (), "INFO")
        assert root.handlers == [file, first]
        second = LineHandler(output)
        take_over_root(second, "json", ["tax_id"], "INFO")
        assert root.handlers == [file, second]
        assert not access.hasHandlers()
        logging.getLogger("uvicorn.error").info("up", extra={"tax_id": "12", "color_message": "\x1b[1mup"})
        line = json.loads(output.getvalue())
        assert (line["message"], line["tax_id"]) == ("up", "[redacted]")
        assert "color_message" not in line


def test_fields_are_attributes_of_the_record_for_formatters_of_others() -> None:
    """As with ``extra``, and with the application's own kind of record where it has one."""
    seen: list[Any] = []
    logger = logging.getLogger("test_logs.fields")
    logger.setLevel(logging.INFO)

    def keep(noted: logging.LogRecord) -> bool:
        seen.append(noted)
        return True

    logger.addFilter(keep)

    class Own(logging.LogRecord):
        mine = True

    write(logger, logging.INFO, {"order": 17}, "order %s", ("17",), created=1.5)
    logging.setLogRecordFactory(Own)
    try:
        write(logger, logging.INFO, {"order": 17}, "order %s", ("17",), created=1.5)
    finally:
        logging.setLogRecordFactory(logging.LogRecord)
    for noted in seen:
        assert (noted.order, noted.getMessage(), noted.threadName) == (17, "order 17", "MainThread")
        assert json.loads(JsonFormatter().format(noted))["order"] == 17
        # A formatter of anybody finds what it may ask for.
        assert logging.Formatter("%(asctime)s %(process)d %(levelname)s %(filename)s %(message)s").format(noted)
    assert seen[1].mine


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_the_short_way_writes_the_line_that_the_long_one_writes(
    capsys: pytest.CaptureFixture[str], log_format: Any
) -> None:
    """Whether the record is made or left out, and only where nobody but us would see it."""
    lines = []
    with bare_logging():
        logger = logging.getLogger("fastapi_hardening.short")
        make_visible(logger, log_format)
        for looked_at in (False, True):
            if looked_at:
                logger.addFilter(lambda record: True)
            write_fields(logger, logging.INFO, {"event": "request"}, "%s", ("request",), created=0.0)
            lines.append(capsys.readouterr().out)
        assert lines[0] == lines[1] != ""
        logging.getLogger().addHandler(logging.NullHandler())
        write_fields(logger, logging.INFO, {"event": "request"}, "%s", ("request",), created=0.0)
        assert capsys.readouterr().out == ""


def test_a_stream_that_fails_does_not_fail_the_request(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Logging says so in its own way, as far as the application lets it."""

    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError("no space left")

    with bare_logging():
        logger = logging.getLogger("fastapi_hardening.broken")
        make_visible(logger, "json")
        monkeypatch.setattr("sys.stdout", Broken())
        write_fields(logger, logging.INFO, {"event": "request"}, "%s", ("request",), created=0.0)
    assert "no space left" in capsys.readouterr().err
