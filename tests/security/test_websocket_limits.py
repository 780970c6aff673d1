"""Limits on websockets: what is counted, who may open one, how one is closed, and that nothing else changes."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from fastapi import Depends, FastAPI, WebSocket, WebSocketDisconnect
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_hardening import Settings, WebSocketLimits, harden
from fastapi_hardening.core import context as request_context
from fastapi_hardening.core.client_ip import ClientAddress
from fastapi_hardening.core.clock import ManualClock
from fastapi_hardening.core.context import RequestContext
from fastapi_hardening.core.events import Events, RequestRefused
from fastapi_hardening.core.identity import Principal
from fastapi_hardening.core.lifecycle import Lifecycle
from fastapi_hardening.core.origins import is_same_origin
from fastapi_hardening.core.routes import RouteEntry
from fastapi_hardening.security.websocket_limits import (
    EXPIRED,
    IDLE,
    NOT_READ,
    RESTART,
    TOO_LARGE,
    TOO_LONG,
    TOO_MANY,
    TOO_MUCH,
    Closing,
    MessageMeter,
    Watch,
    WebSocketClosed,
    WebSocketLimitsMiddleware,
    WebSocketLimitsSettings,
    WebSocketPolicy,
    parse_rate,
    size_of,
)

# --- settings ---------------------------------------------------------------------------------------------------------


def test_the_defaults_are_those_that_do_not_hurt() -> None:
    """A megabyte a message, a hundred messages a second over a minute, no timeout but for who does not read."""
    settings = WebSocketLimitsSettings()
    assert (settings.max_message_bytes, settings.messages, settings.bytes) == (1_000_000, "6000/minute", None)
    assert (settings.idle_seconds, settings.max_seconds, settings.max_send_seconds) == (None, None, 120)
    assert (settings.check_origin, settings.max_connections_per_client) == ("with-credentials", 100)


@pytest.mark.parametrize(
    "name",
    [
        "max_message_bytes",
        "messages",
        "bytes",
        "idle_seconds",
        "max_send_seconds",
        "close_grace_seconds",
        "max_connections_per_client",
    ],
)
def test_an_empty_text_switches_a_limit_off(name: str) -> None:
    """As an environment variable says it."""
    assert getattr(WebSocketLimitsSettings.model_validate({name: ""}), name) is None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"messages": "many"}, "is not a limit"),
        ({"bytes": "1 XB/second"}, "is not a limit"),
        ({"bytes": "0/second"}, "at least one"),
        ({"origins": ["app.example"]}, "has no scheme"),
        ({"origins": ["null"]}, "sandboxed frame"),
        ({"max_message_bytes": 0}, "greater than or equal to 1"),
        ({"idle_seconds": 0}, "greater than 0"),
        ({"check_origin": "sometimes"}, "always"),
        ({"max_message_size": 1}, "did you mean 'max_message_bytes'"),
    ],
)
def test_a_limit_that_cannot_be_is_refused_when_it_is_made(changes: dict[str, Any], sentence: str) -> None:
    """In the settings and in an override, with the sentence that mends it."""
    with pytest.raises(ValueError, match=sentence):
        WebSocketLimitsSettings(**changes)
    with pytest.raises(ValueError, match=sentence):
        WebSocketLimits(**changes)


@pytest.mark.parametrize(
    ("text", "quotas"),
    [
        ("1 MB/second", [1_000_000]),
        ("100kB per minute; 1gb/hour", [100_000, 1_000_000_000]),
        ("5/second", [5]),
        ("2 Mb/2 seconds", [2_000_000]),
    ],
)
def test_bytes_are_written_as_people_write_them(text: str, quotas: list[int]) -> None:
    """With a unit or without one, several at once."""
    assert [limit.quota for limit in parse_rate(text)] == quotas


# --- engine: messages -------------------------------------------------------------------------------------------------


def meter(**changes: Any) -> MessageMeter:
    return MessageMeter(WebSocketPolicy(WebSocketLimitsSettings(**changes)))


def test_text_is_counted_as_it_is_sent() -> None:
    """As UTF-8, however Python keeps it."""
    assert size_of({"type": "websocket.receive", "text": "ascii"}) == 5
    assert size_of({"type": "websocket.receive", "text": "é€😀"}) == 2 + 3 + 4
    assert size_of({"type": "websocket.receive", "bytes": b"1234", "text": None}) == 4
    assert size_of({"type": "websocket.receive", "bytes": b"", "text": "not this"}) == 0
    assert size_of({"type": "websocket.receive"}) == 0


def test_a_message_of_the_limit_passes_and_one_byte_more_does_not() -> None:
    """The limit is what may be sent."""
    limited = meter(max_message_bytes=10)
    assert [limited.take(size, 0.0) for size in (10, 11, 0)] == [None, TOO_LARGE, None]
    assert meter(max_message_bytes=None).take(10**9, 0.0) is None


def test_messages_refill_evenly() -> None:
    """A burst of the quota, then one at a time."""
    limited = meter(messages="10/second")
    assert [limited.take(1, 0.0) for _ in range(11)] == [None] * 10 + [TOO_MANY]
    assert [limited.take(1, 0.1) for _ in range(2)] == [None, TOO_MANY]
    assert [limited.take(1, 5.0) for _ in range(11)] == [None] * 10 + [TOO_MANY]


def test_several_limits_hold_at_once_and_what_is_refused_spends_nothing() -> None:
    """The short one stops a burst, the long one what goes on."""
    limited = meter(messages="2/second; 3/minute")
    assert [limited.take(1, 0.0) for _ in range(3)] == [None, None, TOO_MANY]
    assert [limited.take(1, 1.0) for _ in range(2)] == [None, TOO_MANY]


def test_bytes_are_limited_together() -> None:
    """A message of more than the quota never passes."""
    limited = meter(bytes="100/second", messages=None)
    assert [limited.take(size, 0.0) for size in (60, 41, 40)] == [None, TOO_MUCH, None]
    assert limited.take(101, 60.0) == TOO_MUCH


@given(
    quota=st.integers(1, 20),
    window=st.integers(1, 10),
    steps=st.lists(st.tuples(st.floats(0, 3), st.integers(0, 5)), max_size=60),
)
def test_no_window_passes_more_than_twice_the_quota(quota: int, window: int, steps: list[tuple[float, int]]) -> None:
    """Whatever the rhythm: the burst, and what refills meanwhile."""
    limited = meter(messages=f"{quota}/{window} second")
    now, passed = 0.0, list[float]()
    for pause, messages in steps:
        now += pause
        passed += [now for _ in range(messages) if limited.take(1, now) is None]
    assert all(sum(begin <= each < begin + window for each in passed) <= 2 * quota for begin in passed)


# --- engine: time -----------------------------------------------------------------------------------------------------


def watch(**changes: Any) -> Watch:
    return Watch(WebSocketLimitsSettings(**({"max_send_seconds": None} | changes)), now=100.0)


def test_without_a_timeout_nothing_ends_a_websocket() -> None:
    """No timer is needed then."""
    assert watch().next(100.0) is None


def test_messages_of_both_sides_keep_a_websocket_from_being_idle() -> None:
    """What comes as well as what goes."""
    idling = watch(idle_seconds=60)
    assert idling.next(100.0) == (60, IDLE)
    idling.received(130.0)
    assert idling.next(130.0) == (60, IDLE)
    idling.sends(140.0)
    idling.sent(141.0)
    assert idling.next(141.0) == (60, IDLE)
    assert idling.next(201.0) == (0, IDLE)


def test_the_first_end_counts() -> None:
    """Idle, too long, expired, restarted: whichever comes first."""
    watched = watch(idle_seconds=60, max_seconds=90)
    assert watched.next(100.0, expires_seconds=70, stops_seconds=80) == (60, IDLE)
    watched.received(150.0)
    assert watched.next(150.0, expires_seconds=70, stops_seconds=80) == (40, TOO_LONG)
    assert watched.next(150.0, expires_seconds=30, stops_seconds=80) == (30, EXPIRED)
    assert watched.next(150.0, expires_seconds=30, stops_seconds=5) == (5, RESTART)


def test_who_does_not_read_is_told_from_who_reads_slowly() -> None:
    """Every message that is taken is progress, and without one that waits there is nothing to take."""
    watched = watch(max_send_seconds=10)
    watched.sends(105.0)
    assert watched.next(106.0) == (9, NOT_READ)
    watched.sends(107.0)
    assert watched.next(107.0) == (8, NOT_READ)
    watched.sent(112.0)
    assert watched.next(112.0) == (10, NOT_READ)
    watched.sent(113.0)
    assert watched.next(500.0) == (10, NOT_READ)


def test_an_application_that_closes_is_only_watched_for_who_does_not_read() -> None:
    """Its own close is on the way."""
    watched = watch(idle_seconds=1, max_seconds=1)
    watched.leaving = True
    assert watched.next(200.0, expires_seconds=-1, stops_seconds=-1) is None
    watched.limit(WebSocketLimitsSettings(max_send_seconds=5))
    assert watched.next(200.0) == (5, NOT_READ)


@pytest.mark.parametrize("closing", [TOO_LARGE, TOO_MANY, TOO_MUCH, NOT_READ, IDLE, TOO_LONG, EXPIRED, RESTART])
def test_every_close_can_be_sent(closing: Closing) -> None:
    """RFC 6455: a reason has at most 123 bytes, and some codes may never be sent."""
    assert 0 < len(closing.reason.encode()) <= 123
    assert closing.code not in (1004, 1005, 1006, 1015)


# --- engine: origins --------------------------------------------------------------------------------------------------


Fields = list[tuple[bytes, bytes]]
HOST = (b"host", b"shop.example")
COOKIE = (b"cookie", b"session=1")


def of(origin: bytes) -> tuple[bytes, bytes]:
    return (b"origin", origin)


@pytest.mark.parametrize(
    ("origin", "fields", "same"),
    [
        (b"https://shop.example", [HOST], True),
        (b"http://shop.example", [HOST], True),
        (b"https://SHOP.example", [(b"host", b"Shop.Example")], True),
        (b"https://shop.example", [(b"host", b"shop.example:443")], True),
        (b"http://shop.example", [(b"host", b"shop.example:80")], True),
        (b"http://localhost:8000", [(b"host", b"localhost:8000")], True),
        (b"http://[::1]:8000", [(b"host", b"[::1]:8000")], True),
        (b"https://shop.example", [(b"host", b"10.0.0.7:8000"), (b"x-forwarded-host", b"shop.example")], True),
        (b"https://shop.example", [(b"host", b"app"), (b"x-forwarded-host", b"edge.example, shop.example")], True),
        (b"https://shop.example", [(b"host", b"app"), (b"sec-fetch-site", b"same-origin")], True),
        (b"https://evil.example", [HOST], False),
        (b"https://shop.example.evil.example", [HOST], False),
        (b"https://evil-shop.example", [HOST], False),
        (b"https://shop.example:8443", [HOST], False),
        (b"https://shop.example", [(b"host", b"shop.example:80")], False),
        (b"https://www.shop.example", [HOST, (b"sec-fetch-site", b"same-site")], False),
        (b"null", [HOST], False),
        (b"", [HOST], False),
        (b"null", [(b"host", b"")], False),
        (b"https://", [(b"host", b"")], False),
        (b"file://", [(b"host", b"")], False),
        (b"https://shop.example", [], False),
    ],
)
def test_same_origin_is_the_same_host_and_port(origin: bytes, fields: Fields, same: bool) -> None:
    """Default ports left out, behind proxies as well, and nobody who only looks like it."""
    assert is_same_origin(origin, fields) is same


@pytest.mark.parametrize(
    ("changes", "fields", "admitted"),
    [
        ({}, [COOKIE], True),
        ({}, [of(b"https://evil.example")], True),
        ({}, [of(b"https://evil.example"), COOKIE], False),
        ({}, [of(b"null"), COOKIE], False),
        ({}, [of(b"https://shop.example"), COOKIE], True),
        ({}, [of(b"https://shop.example"), of(b"https://evil.example"), COOKIE], False),
        ({}, [of(b"https://evil.example"), (b"authorization", b"Basic YTpi")], False),
        ({}, [of(b"https://evil.example"), (b"authorization", b"negotiate YTpi")], False),
        ({}, [of(b"https://evil.example"), (b"authorization", b"Bearer a.b.c")], True),
        ({}, [of(b"https://partner.example"), COOKIE], True),
        ({"origins": ["https://app.example"]}, [of(b"https://app.example"), COOKIE], True),
        ({"origins": ["https://*.app.example"]}, [of(b"https://eu.app.example"), COOKIE], True),
        ({"origins": ["https://app.example"]}, [of(b"https://evil.example"), COOKIE], False),
        ({"origins": "*"}, [of(b"https://evil.example"), COOKIE], True),
        ({"check_origin": "never"}, [of(b"https://evil.example"), COOKIE], True),
        ({"check_origin": "always"}, [of(b"https://evil.example")], False),
        ({"check_origin": "always"}, [of(b"https://shop.example")], True),
        ({"check_origin": "always"}, [], True),
    ],
)
def test_who_may_open_a_websocket(changes: dict[str, Any], fields: Fields, admitted: bool) -> None:
    """By default a page of another site may not where its browser adds credentials; who sends no origin is no page."""
    policy = WebSocketPolicy(WebSocketLimitsSettings(**changes), admits=lambda o: o == b"https://partner.example")
    assert policy.admits([HOST, *fields]) is admitted


# --- layer ------------------------------------------------------------------------------------------------------------

CHAT = RouteEntry("/chat", kind="websocket")


class Line:
    """A server with one websocket, as ASGI describes it: what the client sends, and what it gets."""

    def __init__(
        self,
        app: Callable[[Scope, Receive, Send], Awaitable[None]],
        *,
        clock: ManualClock | None = None,
        lifecycle: Lifecycle | None = None,
        principal: Principal | None = None,
        layer: WebSocketLimitsMiddleware | None = None,
        unknown_proxy: bool = False,
        headers: Sequence[tuple[bytes, bytes]] = (HOST,),
        **changes: Any,
    ) -> None:
        self.incoming: asyncio.Queue[Message] = asyncio.Queue()
        self.incoming.put_nowait({"type": "websocket.connect"})
        self.sent: list[Message] = []
        self.taken = asyncio.Event()
        self.taken.set()
        self.events = Events()
        self.told: list[Any] = []
        self.events.subscribe(object, self.told.append)
        self.clock = clock or ManualClock()
        settings = WebSocketLimitsSettings(**changes)
        self.layer = layer or WebSocketLimitsMiddleware(app, settings, lifecycle=lifecycle, clock=self.clock)
        client = ClientAddress("192.0.2.1", "192.0.2.1", behind_unknown_proxy=unknown_proxy)
        self.context = RequestContext("the-id", client, 0.0, events=self.events)
        self.context.route = CHAT
        self.context.principal = principal
        self.scope = {
            "type": "websocket",
            "path": "/chat",
            "query_string": b"",
            "headers": list(headers),
            "extensions": {"websocket.http.response": {}},
            request_context.SCOPE_KEY: self.context,
        }

    def says(self, *texts: str | bytes) -> "Line":
        """Puts messages of the client on the line."""
        for text in texts:
            kind = "text" if isinstance(text, str) else "bytes"
            self.incoming.put_nowait({"type": "websocket.receive", kind: text})
        return self

    def hangs_up(self) -> "Line":
        """The client goes."""
        self.incoming.put_nowait({"type": "websocket.disconnect", "code": 1001, "reason": ""})
        return self

    async def receive(self) -> Message:
        """What the application gets."""
        return await self.incoming.get()

    async def send(self, message: Message) -> None:
        """What the application sends; it waits while the client does not read."""
        await self.taken.wait()
        self.sent.append(message)

    async def run(self) -> "Line":
        """Serves it."""
        async with asyncio.timeout(10):
            await self.layer(self.scope, self.receive, self.send)
        return self

    @property
    def close(self) -> tuple[int, str] | None:
        """How it was closed."""
        closes = [(m["code"], m["reason"]) for m in self.sent if m["type"] == "websocket.close"]
        assert len(closes) <= 1, closes
        return closes[0] if closes else None


class Listener:
    """An application that takes what comes until it is told that there is no more."""

    def __init__(self) -> None:
        self.heard: list[str | bytes] = []
        self.end: Message | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert (await receive())["type"] == "websocket.connect"
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            self.heard.append(message.get("text") or message["bytes"])
        self.end = message


pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    """Run on asyncio, as uvicorn does."""
    return "asyncio"


async def test_what_is_within_the_limits_passes_unchanged_and_in_order() -> None:
    """The very messages of the server, both ways."""
    listener = Listener()
    line = await Line(listener).says("one", b"two", "three").hangs_up().run()
    assert listener.heard == ["one", b"two", "three"]
    assert listener.end == {"type": "websocket.disconnect", "code": 1001, "reason": ""}
    assert line.sent == [{"type": "websocket.accept"}]
    assert line.told == []


@given(said=st.lists(st.one_of(st.text(min_size=1, max_size=12), st.binary(min_size=1, max_size=12)), max_size=20))
def test_what_is_heard_is_what_was_said_up_to_the_first_message_that_is_too_large(said: list[str | bytes]) -> None:
    """None is lost, changed or put elsewhere, whatever comes in which order."""
    listener = Listener()

    async def talk() -> Line:
        return await Line(listener, max_message_bytes=10).says(*said).hangs_up().run()

    line = asyncio.run(talk())
    sizes = [len(each.encode()) if isinstance(each, str) else len(each) for each in said]
    heard = next((number for number, size in enumerate(sizes) if size > 10), len(said))
    assert listener.heard == said[:heard]
    assert line.close == (TOO_LARGE if heard < len(said) else None)


@pytest.mark.parametrize(
    ("said", "changes", "closing"),
    [
        (["ok", "x" * 11], {"max_message_bytes": 10}, TOO_LARGE),
        (["ok", "€€€€"], {"max_message_bytes": 10}, TOO_LARGE),
        (["ok", b"x" * 11], {"max_message_bytes": 10}, TOO_LARGE),
        (["ok", "no"], {"messages": "1/second"}, TOO_MANY),
        (["ok", "n" * 99], {"bytes": "100/second", "max_message_bytes": None}, TOO_MUCH),
    ],
)
async def test_what_goes_beyond_a_limit_closes_the_websocket(
    said: list[str | bytes], changes: dict[str, Any], closing: Closing, caplog: pytest.LogCaptureFixture
) -> None:
    """The client gets code and reason, the application a disconnect with the same, and what was too much not at all."""
    listener = Listener()
    with caplog.at_level(logging.INFO):
        line = await Line(listener, **changes).says(*said, "never heard").run()
    assert listener.heard == said[:1]
    assert listener.end == {"type": "websocket.disconnect", "code": closing.code, "reason": closing.reason}
    assert line.close == closing
    assert line.told == [WebSocketClosed(closing.code, closing.reason, "/chat", "the-id", "192.0.2.1")]
    assert f"with {closing.code}: {closing.reason} (request id the-id)" in caplog.text


async def test_time_gives_messages_back() -> None:
    """The clock decides, and not how many there were."""
    clock = ManualClock()
    heard: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            heard.append(message["text"])
            clock.advance(1)

    line = await Line(app, clock=clock, messages="1/second").says(*"abcde").hangs_up().run()
    assert (heard, line.close) == ([*"abcde"], None)


async def test_report_only_tells_once_and_closes_nothing() -> None:
    """Each reason once a websocket."""
    listener = Listener()
    line = Line(listener, report_only=True, max_message_bytes=1, messages="3/second").says("aa", "bb", *"cdefg")
    await line.hangs_up().run()
    assert listener.heard == ["aa", "bb", *"cdefg"]
    assert line.close is None
    assert [(event.reason, event.reported) for event in line.told] == [
        (TOO_LARGE.reason, True),
        (TOO_MANY.reason, True),
    ]


# --- layer: time ------------------------------------------------------------------------------------------------------


async def test_a_websocket_that_is_idle_is_closed_while_the_application_waits() -> None:
    """It is woken where it waits, and sees a disconnect; the timer that rings too early is set again."""
    clock = ManualClock()
    listener = Listener()
    line = Line(listener, clock=clock, idle_seconds=0.001)
    serving = asyncio.ensure_future(line.run())
    await asyncio.sleep(0.005)
    # The machine's time has gone on, and the clock of the layer has not.
    assert not serving.done()
    clock.advance(1)
    await serving
    assert line.close == IDLE
    assert listener.end == {"type": "websocket.disconnect", "code": 1001, "reason": "idle for too long"}


async def test_a_websocket_that_is_open_for_too_long_is_closed() -> None:
    """However busy it is."""
    clock = ManualClock()
    listener = Listener()
    line = Line(listener, clock=clock, max_seconds=0.001).says("hello")
    clock.advance(1)
    serving = asyncio.ensure_future(line.run())
    await asyncio.sleep(0)
    clock.advance(1)
    await serving
    assert line.close == TOO_LONG


async def test_expired_credentials_close_with_3000() -> None:
    """What authentication put on the context before the application accepted."""
    clock = ManualClock()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        # Authentication sits further in.
        request_context.ensure(scope).principal = Principal("anna", expires_at=clock.time() + 0.001)
        await Listener()(scope, receive, send)

    line = Line(app, clock=clock)
    serving = asyncio.ensure_future(line.run())
    await asyncio.sleep(0)
    clock.advance(60)
    await serving
    assert line.close == EXPIRED == (3000, "credentials have expired")


async def test_credentials_that_were_renewed_keep_the_websocket_open() -> None:
    """The principal is looked at again when the time has come."""
    clock = ManualClock()
    line = Line(Listener(), clock=clock, principal=Principal("anna", expires_at=clock.time() + 0.001))
    serving = asyncio.ensure_future(line.run())
    await asyncio.sleep(0)
    line.context.principal = Principal("anna", expires_at=clock.time() + 3600)
    clock.advance(60)
    await asyncio.sleep(0.005)
    assert not serving.done()
    line.hangs_up()
    await serving
    assert line.close is None


async def test_a_principal_that_never_expires_is_let_be() -> None:
    """And one of another kind, that knows no such thing."""
    for principal in (Principal("anna"), "anna"):
        listener = Listener()
        line = Line(listener, max_send_seconds=None)
        line.context.principal = principal
        await line.says("hello").hangs_up().run()
        assert (listener.heard, line.close) == (["hello"], None)


# --- layer: the end of the process ------------------------------------------------------------------------------------


async def test_draining_closes_open_websockets_when_the_server_stops() -> None:
    """With 1012, after the delay; the signal may come at any time."""
    clock = ManualClock()
    lifecycle = Lifecycle(drain_delay_seconds=0.001, clock=clock)
    listener = Listener()
    line = Line(listener, clock=clock, lifecycle=lifecycle, max_send_seconds=None)
    serving = asyncio.ensure_future(line.run())
    await asyncio.sleep(0.005)
    assert not serving.done()
    lifecycle.drain()
    assert line.sent == [{"type": "websocket.accept"}]
    clock.advance(1)
    await serving
    assert line.close == RESTART
    assert listener.end == {"type": "websocket.disconnect", "code": 1012, "reason": "service restart"}


async def test_a_websocket_that_opens_while_the_process_drains_is_closed_as_well() -> None:
    """At once, where the server has been told to stop already."""
    clock = ManualClock()
    lifecycle = Lifecycle(drain_delay_seconds=5, clock=clock)
    lifecycle.drain()
    clock.advance(6)
    line = Line(Listener(), clock=clock, lifecycle=lifecycle, max_connections_per_client=None)
    assert (await line.run()).close == RESTART


async def test_an_endpoint_that_does_not_notice_is_cancelled_so_that_the_process_can_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its cleanup runs, and the server sees an ordinary end."""
    clock = ManualClock()
    lifecycle = Lifecycle(clock=clock)
    cleaned: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        lifecycle.drain()
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.append("up")

    line = await Line(app, clock=clock, lifecycle=lifecycle, close_grace_seconds=0).run()
    assert (line.close, cleaned) == (RESTART, ["up"])
    assert "cancelled the endpoint" in caplog.text


async def test_an_endpoint_may_be_given_all_the_time_it_takes_to_end() -> None:
    """Without a grace period nothing is cancelled, nor is what ends within it."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await Listener()(scope, receive, send)
        await asyncio.sleep(0.005)
        ended.append("by itself")

    for grace in (None, 60):
        ended: list[str] = []
        line = await Line(app, messages="1/second", close_grace_seconds=grace).says("one", "two").run()
        assert (line.close, ended) == (TOO_MANY, ["by itself"])


# --- layer: clients that do not read ----------------------------------------------------------------------------------


async def test_a_client_that_does_not_read_loses_its_endpoint() -> None:
    """Which would wait in ``send`` for ever; a client that read what was sent gets the close."""
    clock = ManualClock()
    line = Line(Listener())

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        line.taken.clear()
        clock.advance(1)
        asyncio.get_running_loop().call_later(0.002, clock.advance, 1)
        try:
            await send({"type": "websocket.send", "text": "hello"})
        finally:
            line.taken.set()

    line.layer = WebSocketLimitsMiddleware(app, WebSocketLimitsSettings(max_send_seconds=0.001), clock=clock)
    await line.run()
    assert line.close == NOT_READ
    assert [event.reason for event in line.told] == ["messages are not read"]


async def test_a_client_that_does_not_take_the_close_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than servers wait for the answer to one."""
    monkeypatch.setattr("fastapi_hardening.security.websocket_limits._CLOSE_SECONDS", 0.001)
    line = Line(Listener(), messages="1/second").says("one", "two")

    async def accepts_only(message: Message) -> None:
        await (line.send(message) if message["type"] == "websocket.accept" else asyncio.Event().wait())

    async with asyncio.timeout(10):
        await line.layer(line.scope, line.receive, accepts_only)
    assert line.sent == [{"type": "websocket.accept"}]
    assert [event.reason for event in line.told] == ["too many messages"]


async def test_a_close_of_the_application_is_watched_too() -> None:
    """A client that does not read does not take it either."""
    clock = ManualClock()
    line = Line(Listener())

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        line.taken.clear()
        asyncio.get_running_loop().call_later(0.002, clock.advance, 1)
        await send({"type": "websocket.close", "code": 1000, "reason": ""})

    line.layer = WebSocketLimitsMiddleware(
        app, WebSocketLimitsSettings(max_send_seconds=0.001, idle_seconds=0.0001), clock=clock
    )
    serving = asyncio.ensure_future(line.run())
    line.events.subscribe(WebSocketClosed, lambda _event: line.taken.set())
    await serving
    assert [event.reason for event in line.told] == ["messages are not read"]


# --- layer: what does not change --------------------------------------------------------------------------------------


async def test_a_close_of_the_application_is_the_only_one() -> None:
    """Nothing of ours follows it."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.send", "text": "bye"})
        await send({"type": "websocket.close", "code": 4000, "reason": "bye"})
        await asyncio.sleep(0.005)

    clock = ManualClock()
    line = Line(app, clock=clock, idle_seconds=0.001)
    await line.run()
    clock.advance(10)
    assert [message["type"] for message in line.sent] == ["websocket.accept", "websocket.send", "websocket.close"]
    assert (line.close, line.told) == ((4000, "bye"), [])


async def test_a_message_that_comes_after_a_close_of_the_application_is_handed_over() -> None:
    """Servers may have it already."""
    heard: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.close", "code": 1000, "reason": ""})
        heard.extend([await receive(), await receive()])

    await Line(app).says("late").hangs_up().run()
    assert [message["type"] for message in heard] == ["websocket.receive", "websocket.disconnect"]


async def test_a_close_by_both_at_once_is_one_close() -> None:
    """The server says that it is closed already, and nobody hears of it."""
    closed: list[Message] = []

    async def send(message: Message) -> None:
        if message["type"] == "websocket.close":
            closed.append(message)
            raise RuntimeError("Unexpected ASGI message 'websocket.close', after sending 'websocket.close'.")

    line = Line(Listener(), messages="1/second").says("one", "two")
    await line.layer(line.scope, line.receive, send)
    assert [message["code"] for message in closed] == [1008]


async def test_a_message_after_the_close_is_refused_as_a_server_would() -> None:
    """By an ``OSError`` (ASGI 2.4), which Starlette makes a disconnect; again and again."""
    raised: list[type[BaseException]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        ends = [await receive() for _ in range(3)]
        assert ends[1:] == [{"type": "websocket.disconnect", "code": 1008, "reason": "too many messages"}] * 2
        for message in ({"type": "websocket.send", "text": "x"}, {"type": "websocket.close", "code": 1000}):
            try:
                await send(message)
            except OSError as error:
                raised.append(type(error))

    line = await Line(app, messages="1/second").says("one", "two", "three").run()
    assert len(raised) == 2
    assert [message["type"] for message in line.sent] == ["websocket.accept", "websocket.close"]


@pytest.mark.parametrize("in_a_group", [False, True])
async def test_an_endpoint_that_ends_with_the_news_of_its_close_has_not_failed(in_a_group: bool) -> None:
    """Most endpoints do not catch a disconnect; the server need not hear of one that we have made."""

    async def chat(websocket: WebSocket) -> None:
        await websocket.accept()
        while True:
            await websocket.receive_text()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if not in_a_group:
            await chat(WebSocket(scope, receive, send))
        async with asyncio.TaskGroup() as group:
            group.create_task(chat(WebSocket(scope, receive, send)))

    line = await Line(app, messages="1/second").says("one", "two").run()
    assert line.close == TOO_MANY


@pytest.mark.parametrize("in_a_group", [False, True])
async def test_an_endpoint_that_fails_fails_as_ever(in_a_group: bool) -> None:
    """Also after a close of ours."""

    async def fails(receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        while (await receive())["type"] == "websocket.receive":
            pass
        raise KeyError("a mistake")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if not in_a_group:
            await fails(receive, send)
        async with asyncio.TaskGroup() as group:
            group.create_task(fails(receive, send))

    for line, close in (
        (Line(app).says("one").hangs_up(), None),
        (Line(app, messages="1/second").says("one", "two"), TOO_MANY),
    ):
        with pytest.raises((KeyError, ExceptionGroup)):
            await line.run()
        assert line.close == close


async def test_a_disconnect_that_is_not_ours_goes_on_to_the_server() -> None:
    """As it did before."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        websocket = WebSocket(scope, receive, send)
        await websocket.accept()
        await websocket.receive_text()

    with pytest.raises(WebSocketDisconnect):
        await Line(app).hangs_up().run()


@pytest.mark.parametrize("when", ["waiting", "woken"])
async def test_cancellation_goes_through(when: str) -> None:
    """A server that cancels is heard, also in the moment in which we wake the application."""
    clock = ManualClock()
    lifecycle = Lifecycle(clock=clock)
    ended: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        try:
            await receive()
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    line = Line(app, clock=clock, lifecycle=lifecycle)
    serving = asyncio.ensure_future(line.layer(line.scope, line.receive, line.send))
    await asyncio.sleep(0.001)
    if when == "woken":
        [connection] = line.layer._connections
        lifecycle.drain()
        connection.look()
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    assert ended == ["cancelled"]


async def test_a_server_that_does_not_let_itself_be_woken_is_no_harm() -> None:
    """Its message comes too late, and its task is not left half cancelled."""
    clock = ManualClock()
    lifecycle = Lifecycle(clock=clock)
    cancelling: list[int] = []
    listener = Listener()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await listener(scope, receive, send)
        task = asyncio.current_task()
        assert task is not None
        cancelling.append(task.cancelling())

    line = Line(app, clock=clock, lifecycle=lifecycle)

    async def stubborn() -> Message:
        with contextlib.suppress(asyncio.CancelledError):
            return await line.receive()
        return {"type": "websocket.receive", "text": "too late"}

    asyncio.get_running_loop().call_later(0.001, lifecycle.drain)
    async with asyncio.timeout(10):
        await line.layer(line.scope, stubborn, line.send)
    assert (listener.heard, line.close, cancelling) == ([], RESTART, [0])


async def test_receiving_in_another_task_is_woken_there() -> None:
    """One task that reads and one that writes, as many endpoints are."""
    clock = ManualClock()
    lifecycle = Lifecycle(clock=clock)
    ends: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})

        async def read() -> None:
            ends.append(await receive())

        await asyncio.gather(read(), asyncio.sleep(0.002))

    line = Line(app, clock=clock, lifecycle=lifecycle)
    asyncio.get_running_loop().call_later(0.001, lifecycle.drain)
    await line.run()
    assert [end["code"] for end in ends] == [1012]


async def test_a_websocket_that_was_never_accepted_is_not_timed() -> None:
    """Its handshake has an end of its own."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.http.response.start", "status": 404, "headers": []})
        await send({"type": "websocket.http.response.body", "body": b"", "more_body": False})

    line = await Line(app, idle_seconds=0.0001).run()
    assert [message["type"] for message in line.sent] == [
        "websocket.http.response.start",
        "websocket.http.response.body",
    ]


async def test_other_scopes_and_a_layer_that_is_off_are_let_through() -> None:
    """HTTP and the lifespan; an override may switch it off on a route."""
    seen: list[Any] = []

    async def app(scope: Scope, receive: Receive, _send: Send) -> None:
        seen.append((scope["type"], receive))

    line = Line(app, enabled=False)
    for kind in ("http", "lifespan"):
        await line.layer({"type": kind}, line.receive, line.send)
    await line.run()
    assert seen == [(kind, line.receive) for kind in ("http", "lifespan", "websocket")]


# --- layer: handshakes ------------------------------------------------------------------------------------------------


async def test_a_foreign_page_is_refused_before_the_application() -> None:
    """By a problem with the request's id, where the server can send one; else by close code 1008."""
    foreign = [HOST, COOKIE, of(b"https://evil.example")]
    line = await Line(Listener(), headers=foreign).run()
    assert [message.get("status") for message in line.sent] == [403, None]
    assert b'"request_id":"the-id"' in line.sent[1]["body"]
    assert [(event.status, event.layer) for event in line.told] == [(403, "websocket limits")]
    line = Line(Listener(), headers=foreign)
    line.scope["extensions"] = {}
    assert (await line.run()).sent == [{"type": "websocket.close", "code": 1008, "reason": "Forbidden"}]


async def test_a_foreign_page_is_only_reported_where_nothing_is_refused() -> None:
    """The websocket opens."""
    line = Line(Listener(), headers=[HOST, COOKIE, of(b"https://evil.example")], report_only=True)
    await line.hangs_up().run()
    assert line.sent == [{"type": "websocket.accept"}]
    assert [(event.status, event.layer) for event in line.told] == [(403, "websocket limits (report only)")]


@pytest.mark.parametrize(("unknown_proxy", "most"), [(False, 2), (True, 6)])
async def test_one_client_has_so_many_websockets_and_no_more(unknown_proxy: bool, most: int) -> None:
    """The next one is 429 until another one ends; behind a proxy that is not known there may be more of them."""
    first = Line(Listener(), max_connections_per_client=2, unknown_proxy_factor=3, unknown_proxy=unknown_proxy)
    others = [Line(Listener(), layer=first.layer, unknown_proxy=unknown_proxy) for _ in range(most)]
    serving = [asyncio.ensure_future(line.run()) for line in (first, *others[:-1])]
    await asyncio.sleep(0)
    refused = await others[-1].run()
    assert refused.sent[0]["status"] == 429
    assert int(dict(refused.sent[0]["headers"])[b"retry-after"]) >= 1
    assert b'"violated-policies":["websockets"]' in refused.sent[1]["body"]
    first.hangs_up()
    await serving[0]
    again = Line(Listener(), layer=first.layer, unknown_proxy=unknown_proxy)
    assert (await again.hangs_up().run()).sent == [{"type": "websocket.accept"}]
    for line in others[:-1]:
        line.hangs_up()
    await asyncio.gather(*serving)
    assert first.layer._counts == {}


async def test_a_limit_of_a_route_counts_the_websockets_of_its_declaration() -> None:
    """Others do not use it up."""
    one = WebSocketLimits(max_connections_per_client=1)
    route = RouteEntry("/one", kind="websocket", overrides={WebSocketLimits: (one,)})
    plain = Line(Listener())
    serving = [asyncio.ensure_future(plain.run())]
    lines = [Line(Listener(), layer=plain.layer) for _ in range(2)]
    for line in lines:
        line.context.route = route
    serving.append(asyncio.ensure_future(lines[0].run()))
    await asyncio.sleep(0)
    assert (await lines[1].run()).sent[0]["status"] == 429
    for line in (plain, lines[0]):
        line.hangs_up()
    await asyncio.gather(*serving)
    assert lines[0].sent == [{"type": "websocket.accept"}]


# --- override ---------------------------------------------------------------------------------------------------------


def chatting(limits: Sequence[WebSocketLimits] = (), **harden_with: Any) -> FastAPI:
    """An application whose websocket says everything twice, with overrides on it; hardened if settings are given."""
    app = FastAPI()

    @app.websocket("/chat", dependencies=list(limits))
    async def chat(websocket: WebSocket) -> None:
        await websocket.accept()
        async for text in websocket.iter_text():
            await websocket.send_text(text)

    @app.get("/page", dependencies=list(limits))
    async def page() -> str:
        return "a page"

    if harden_with:
        harden(app, Settings(_env_file=None, **harden_with))
    return app


def ending(client: TestClient, *texts: str, headers: dict[str, str] | None = None) -> tuple[int, str] | None:
    """How the websocket ends when these are said; ``None`` if it does not."""
    with client.websocket_connect("/chat", headers=headers or {}) as websocket:
        try:
            for text in texts:
                websocket.send_text(text)
                assert websocket.receive_text() == text
        except WebSocketDisconnect as end:
            return end.code, end.reason
    return None


HARDENED: dict[str, Any] = {"websocket_limits": {"max_message_bytes": 5}}


@pytest.mark.parametrize("hardened", [HARDENED, {}], ids=["hardened", "alone"])
def test_levels_merge_limit_by_limit(hardened: dict[str, Any]) -> None:
    """Each says what it names, the innermost last; without the layer they act by themselves."""
    levels = [WebSocketLimits(max_message_bytes=8, messages="3/minute"), WebSocketLimits(max_message_bytes=10)]
    client = TestClient(chatting(levels, **hardened))
    assert ending(client, "x" * 10) is None
    assert ending(client, "x" * 11) == TOO_LARGE
    assert ending(client, *"abcd") == TOO_MANY
    assert client.get("/page").json() == "a page"


def test_without_a_layer_only_what_is_named_holds() -> None:
    """No default comes along."""
    client = TestClient(chatting([WebSocketLimits(messages="3/minute")]))
    assert ending(client, "x" * 2_000_000) is None
    assert ending(client, "hello", headers={"origin": "https://evil.example", "cookie": "session=1"}) is None
    off = TestClient(chatting([WebSocketLimits(messages="1/minute", enabled=False)]))
    assert ending(off, *"abcd") is None


@pytest.mark.parametrize("hardened", [{"websocket_limits": {}}, {"websocket_limits": {"enabled": False}}])
def test_origins_of_a_route_hold(hardened: dict[str, Any]) -> None:
    """With the layer, and by themselves where it is off."""
    client = TestClient(chatting([WebSocketLimits(origins=("https://app.example",))], **hardened))
    cookie = {"cookie": "session=1"}
    assert ending(client, "hello", headers={"origin": "https://app.example", **cookie}) is None
    assert ending(client, "hello", headers={"origin": "http://testserver", **cookie}) is None
    with pytest.raises(WebSocketDenialResponse) as refused:
        ending(client, headers={"origin": "https://evil.example", **cookie})
    assert refused.value.status_code == 403
    assert refused.value.json()["title"] == "Origin not allowed"


def test_origins_of_a_route_hold_where_nothing_is_hardened() -> None:
    """The handshake is not accepted."""
    client = TestClient(chatting([WebSocketLimits(origins=("https://app.example",))]))
    with pytest.raises((WebSocketDenialResponse, WebSocketDisconnect)):
        ending(client, headers={"origin": "https://evil.example", "cookie": "session=1"})


def test_origins_of_a_route_may_only_report() -> None:
    """Without the layer, too."""
    client = TestClient(chatting([WebSocketLimits(origins=("https://app.example",), report_only=True)]))
    assert ending(client, "hello", headers={"origin": "https://evil.example", "cookie": "session=1"}) is None


def test_without_a_layer_an_endpoint_that_does_not_notice_goes_on() -> None:
    """An override has nothing around the endpoint; the client gets its close all the same."""
    app = FastAPI()

    @app.websocket("/chat", dependencies=[WebSocketLimits(idle_seconds=0.001, close_grace_seconds=0)])
    async def chat(websocket: WebSocket) -> None:
        await websocket.accept()
        await asyncio.sleep(0.01)
        async for _ in websocket.iter_text():
            pass

    assert ending(TestClient(app), "hello") == IDLE


class Rewriting:
    """A user's middleware that serves ``/asked`` by the route of ``/chat``, where the layer cannot know it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket" and scope["path"] == "/asked":
            scope = {**scope, "path": "/chat"}
        await self.app(scope, receive, send)


@pytest.mark.parametrize(
    ("override", "closing"),
    [
        (WebSocketLimits(max_message_bytes=2), TOO_LARGE),
        (WebSocketLimits(max_message_bytes=100), None),
        (WebSocketLimits(enabled=False), None),
    ],
)
def test_a_route_that_the_layer_misjudged_keeps_its_limits(override: WebSocketLimits, closing: Closing | None) -> None:
    """They take the place of those that the layer has begun with."""
    app = chatting([override], **HARDENED)
    app.add_middleware(Rewriting)
    with TestClient(app).websocket_connect("/asked") as websocket:
        websocket.send_text("x" * 10)
        if closing is None:
            assert websocket.receive_text() == "x" * 10
        else:
            with pytest.raises(WebSocketDisconnect) as end:
                websocket.receive_text()
            assert (end.value.code, end.value.reason) == closing


async def test_limits_that_are_learnt_after_the_handshake_hold_from_then_on() -> None:
    """An application may accept in a dependency that runs before."""
    app = FastAPI()

    async def accept(websocket: WebSocket) -> None:
        await websocket.accept()

    @app.websocket("/chat", dependencies=[Depends(accept), WebSocketLimits(max_seconds=0.001)])
    async def chat(websocket: WebSocket) -> None:
        await websocket.receive_text()

    clock = ManualClock()
    line = Line(app, clock=clock)
    asyncio.get_running_loop().call_later(0.01, clock.advance, 1)
    await line.run()
    assert line.close == TOO_LONG


# --- in harden() ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cors", "admitted"),
    [
        ({}, False),
        ({"allow_origins": ["https://app.example"]}, True),
        ({"allow_origins": "*"}, False),
    ],
)
def test_origins_that_cors_names_may_open_websockets(cors: dict[str, Any], admitted: bool) -> None:
    """``*`` names nobody: it is for answers without cookies."""
    client = TestClient(chatting(cors=cors, websocket_limits={}))
    headers = {"origin": "https://app.example", "cookie": "session=1"}
    if admitted:
        assert ending(client, "hello", headers=headers) is None
    else:
        with pytest.raises(WebSocketDenialResponse):
            ending(client, headers=headers)


def test_closes_are_counted_by_the_handle() -> None:
    """As every event, and refusals with those of other layers."""
    app = chatting(**HARDENED)
    client = TestClient(app)
    assert ending(client, "x" * 6) == TOO_LARGE
    with pytest.raises(WebSocketDenialResponse):
        ending(client, headers={"origin": "https://evil.example", "cookie": "session=1"})
    handle = app.state.hardening
    assert handle.events.count(WebSocketClosed) == 1
    assert handle.events.count(RequestRefused) == 1


def test_the_handles_drain_closes_websockets() -> None:
    """``handle.lifecycle`` is the one that the layer looks at."""
    app = chatting(health={"drain_delay_seconds": 0}, websocket_limits={})
    with TestClient(app).websocket_connect("/chat") as websocket:
        websocket.send_text("hello")
        assert websocket.receive_text() == "hello"
        app.state.hardening.lifecycle.drain()
        with pytest.raises(WebSocketDisconnect) as end:
            websocket.receive_text()
    assert (end.value.code, end.value.reason) == RESTART


def test_it_works_on_starlette() -> None:
    """With nothing of ours around it."""

    async def chat(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text(await websocket.receive_text())

    app = Starlette(routes=[WebSocketRoute("/chat", chat)])
    app.add_middleware(WebSocketLimitsMiddleware, settings=WebSocketLimitsSettings(max_message_bytes=5))
    with TestClient(app).websocket_connect("/chat") as websocket:
        websocket.send_text("x" * 6)
        with pytest.raises(WebSocketDisconnect) as end:
            websocket.receive_text()
    assert (end.value.code, end.value.reason) == TOO_LARGE
