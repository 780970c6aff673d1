"""Clock, header fields, events, checks and guards."""

import asyncio
import logging
import time
from dataclasses import dataclass

import pytest
from pydantic import SecretStr
from starlette.requests import HTTPConnection

from fastapi_hardening.core import headers
from fastapi_hardening.core.check import Checks
from fastapi_hardening.core.clock import ManualClock, SystemClock
from fastapi_hardening.core.events import Events
from fastapi_hardening.core.policy import Guard, allow_everybody, allow_nobody, allow_private_peers, require_token
from fastapi_hardening.core.problem import Problem


def test_the_system_clock_is_the_machines() -> None:
    """Both readings are those of ``time``."""
    before = time.monotonic(), time.time()
    clock = SystemClock()
    assert clock.monotonic() >= before[0]
    assert clock.time() >= before[1]


def test_a_manual_clock_moves_both_readings() -> None:
    """What waits by one and logs by the other stays in step."""
    clock = ManualClock(monotonic=1, epoch=100)
    clock.advance(2)
    assert (clock.monotonic(), clock.time()) == (3, 102)


@pytest.mark.parametrize("value", ["", " x", "x ", "a\r\nset-cookie: x", "a\nb", "a\x00b", "é"])
def test_a_value_that_breaks_its_line_is_refused(value: str) -> None:
    """Header injection ends where the field is made."""
    with pytest.raises(ValueError, match="ends a header line"):
        headers.field("x-name", value)


@pytest.mark.parametrize("name", ["", "x name", "x:", "é", "x\n"])
def test_a_name_that_is_no_token_is_refused(name: str) -> None:
    """RFC 9110, section 5.1."""
    with pytest.raises(ValueError, match="not a header name"):
        headers.field(name, "value")


def test_fields_are_found_and_replaced_by_name() -> None:
    """Every earlier line goes, in whatever case the application wrote it."""
    raw = [(b"a", b"1"), (b"b", b"2"), (b"a", b"3"), (b"A", b"4")]
    assert headers.get(raw, b"a") == b"1"
    assert headers.get(raw, b"z") is None
    assert headers.get_all(raw, b"a") == [b"1", b"3"]
    headers.replace(raw, b"a", b"5")
    assert raw == [(b"b", b"2"), (b"a", b"5")]


@dataclass(frozen=True)
class Rang:
    """An event."""

    times: int


@dataclass(frozen=True)
class Stopped:
    """Another event."""


def test_an_event_reaches_the_subscribers_of_its_class_and_of_any() -> None:
    """In the order of subscription, and no other class's."""
    events = Events()
    seen: list[tuple[str, object]] = []
    events.subscribe(Rang, lambda event: seen.append(("first", event)))
    events.subscribe(Rang, lambda event: seen.append(("second", event)))
    events.subscribe(Stopped, lambda event: seen.append(("never", event)))
    events.subscribe(object, lambda event: seen.append(("any", event)))
    events.emit(Rang(1))
    assert [name for name, _ in seen] == ["first", "second", "any"]
    assert events.count(Rang) == 1


def test_a_subscriber_that_fails_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Neither the request nor the next subscriber; the log says who it was."""
    events = Events()
    seen: list[Rang] = []

    def fails(_: Rang) -> None:
        raise RuntimeError("no")

    events.subscribe(Rang, fails)
    events.subscribe(Rang, seen.append)
    with caplog.at_level(logging.ERROR):
        events.emit(Rang(1))
    assert seen == [Rang(1)]
    assert "fails" in caplog.text


def test_a_subscription_ends() -> None:
    """Ending it twice does no harm."""
    events = Events()
    seen: list[Rang] = []
    stop = events.subscribe(Rang, seen.append)
    stop()
    stop()
    events.emit(Rang(1))
    assert seen == []


def test_checks_are_added_by_call_and_by_decorator() -> None:
    """Both give back the function, so that it stays usable."""
    checks = Checks()

    def disk() -> bool:
        return True

    assert checks.add("disk", disk, critical=False) is disk

    @checks.add("database", timeout_seconds=1, ttl_seconds=0)
    async def database() -> None:
        return

    assert [(check.name, check.critical) for check in checks] == [("disk", False), ("database", True)]
    assert len(checks) == 2
    checks.remove("disk")
    checks.remove("disk")
    assert [check.function for check in checks] == [database]


def test_a_check_needs_a_name_of_its_own_and_times_that_can_be() -> None:
    """Two checks of one name would hide one another."""
    checks = Checks()
    checks.add("disk", bool)
    with pytest.raises(ValueError, match="give each its own name"):
        checks.add("disk", bool)
    with pytest.raises(ValueError, match="above 0"):
        checks.add("other", bool, timeout_seconds=0)
    with pytest.raises(ValueError, match="at least 0"):
        checks.add("other", bool, ttl_seconds=-1)


def lets_in(guard: Guard, peer: str | None = "10.0.0.1", **fields: str) -> bool:
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in fields.items()]
    scope = {"type": "http", "headers": raw, "client": None if peer is None else (peer, 1)}
    try:
        asyncio.run(guard(HTTPConnection(scope)))  # type: ignore[arg-type]
    except Problem:
        return False
    return True


def test_the_simple_guards() -> None:
    """Everybody, and nobody."""
    assert lets_in(allow_everybody)
    assert not lets_in(allow_nobody)


@pytest.mark.parametrize("field", ["x_forwarded_for", "forwarded", "x_real_ip", "via", "x_forwarded_host"])
def test_a_private_peer_is_let_in_unless_it_forwards(field: str) -> None:
    """A scraper in the cluster, but nothing that came through a proxy."""
    assert lets_in(allow_private_peers)
    assert lets_in(allow_private_peers, "127.0.0.1")
    assert not lets_in(allow_private_peers, **{field: "127.0.0.1"})
    assert not lets_in(allow_private_peers, "8.8.8.8")
    assert not lets_in(allow_private_peers, "::ffff:8.8.8.8")
    assert not lets_in(allow_private_peers, "testclient")
    assert not lets_in(allow_private_peers, None)


def test_a_token_is_asked_for_as_bearer() -> None:
    """The scheme in any case, the token exactly."""
    guard = require_token(SecretStr("0123456789abcdef"))
    assert lets_in(guard, authorization="Bearer 0123456789abcdef")
    assert lets_in(guard, authorization="bearer 0123456789abcdef")
    for wrong in ("Bearer 0123456789abcdeF", "Basic 0123456789abcdef", "0123456789abcdef", "Bearer", ""):
        assert not lets_in(guard, authorization=wrong)
    assert not lets_in(guard)


def test_a_short_token_guards_nothing() -> None:
    """The sentence says how to make a good one."""
    with pytest.raises(ValueError, match="openssl rand"):
        require_token(SecretStr("short"))
