"""Channels: who may subscribe, what a slow one costs, and what other workers hear."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI, WebSocket
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from starlette.requests import HTTPConnection, Request
from starlette.websockets import WebSocketDisconnect

from fastapi_hardening import Settings, harden
from fastapi_hardening.api.realtime import (
    ChannelRefused,
    ConnectionChannels,
    Message,
    MessagesDropped,
    Realtime,
    RealtimeSettings,
    SlowConsumer,
    Subscriber,
    SubscriptionRefused,
)
from fastapi_hardening.core.clock import ManualClock
from fastapi_hardening.core.events import Events
from fastapi_hardening.core.lifecycle import Lifecycle
from fastapi_hardening.core.problem import Problem
from fastapi_hardening.core.redis_store import RedisStore
from fastapi_hardening.core.store import StoreUnavailable
from tests.state_server import StateServer

CONNECTION = HTTPConnection({"type": "http", "headers": []})


class Kit:
    """Channels, and what they tell."""

    def __init__(self, channels: Any = None, **settings: Any) -> None:
        self.clock, self.events = ManualClock(), Events()
        self.lifecycle = Lifecycle(drain_delay_seconds=0, events=self.events, clock=self.clock)
        self.seen: list[object] = []
        self.events.subscribe(object, self.seen.append)
        self.realtime = Realtime(
            RealtimeSettings(**settings),
            channels=channels,
            lifecycle=self.lifecycle,
            events=self.events,
            clock=self.clock,
        )


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(30):
            await test()

    asyncio.run(limited())


def lost(channel: str) -> Message:
    return Message(channel, None, lost=True)


# --- subscribers ------------------------------------------------------------------------------------------------------


def test_subscribers_get_what_is_published_on_their_channels() -> None:
    """All of it, in its order, and nothing else; afterwards nobody is left."""
    kit = Kit()

    async def test() -> None:
        async with (
            kit.realtime.subscribe(None, "a", "b", "a") as both,
            kit.realtime.subscribe(None, "b") as one,
        ):
            assert (kit.realtime.count("a"), kit.realtime.count("b"), kit.realtime.count()) == (1, 2, 2)
            for channel in "abcab":
                kit.realtime.publish(channel, {"on": channel})
            assert [(await anext(both)).channel for _ in range(4)] == ["a", "b", "a", "b"]
            assert [(await anext(one)).data for _ in range(2)] == [{"on": "b"}] * 2
        assert (kit.realtime.count("a"), kit.realtime.count("c"), kit.realtime.count()) == (0, 0, 0)

    run(test)


def test_messages_are_what_json_makes_of_them() -> None:
    """Here and in other workers alike: a list that is changed later has been sent as it was."""
    kit = Kit(max_message_bytes=20)

    async def test() -> None:
        async with kit.realtime.subscribe(None, "a") as messages:
            data = [(1, 2)]
            kit.realtime.publish("a", data)
            data.clear()
            message = await anext(messages)
            assert message.data == [[1, 2]]
            assert json.loads(message.text) == {"channel": "a", "data": [[1, 2]]}
            assert json.loads(lost("a").text) == {"channel": "a", "lost": True}

    run(test)
    with pytest.raises(ValueError, match="max_message_bytes"):
        kit.realtime.publish("a", "x" * 20)
    with pytest.raises(TypeError):
        kit.realtime.publish("a", object())
    for name in ("", "a b", "a\n", "*", "ä", "x" * 201):
        with pytest.raises(ValueError, match="is no channel"):
            kit.realtime.publish(name, 1)


def test_other_threads_may_publish() -> None:
    """An endpoint that is not async runs in one."""
    kit = Kit()

    async def test() -> None:
        async with kit.realtime.subscribe(None, "a") as messages:
            await asyncio.to_thread(kit.realtime.publish, "a", 1)
            assert (await anext(messages)).data == 1

    run(test)


def test_slow_subscriber_loses_the_oldest_and_is_told() -> None:
    """What waits is bounded, the loss is told before what is left, and once."""
    kit = Kit(max_waiting=2)

    async def test() -> None:
        async with kit.realtime.subscribe(None, "a") as messages:
            for number in range(5):
                kit.realtime.publish("a", number)
            assert [await anext(messages) for _ in range(3)] == [lost("a"), Message("a", 3), Message("a", 4)]
        assert kit.seen == [MessagesDropped("a", closed=False)]

    run(test)


def test_slow_subscriber_may_be_closed() -> None:
    """Then nothing waits for it any more."""
    kit = Kit(max_waiting=2, on_slow="close")

    async def test() -> None:
        async with kit.realtime.subscribe(None, "a") as messages:
            for number in range(5):
                kit.realtime.publish("a", number)
            with pytest.raises(SlowConsumer):
                await anext(messages)
        assert kit.seen == [MessagesDropped("a", closed=True)]

    run(test)


@given(st.lists(st.one_of(st.sampled_from("ab"), st.none()), max_size=40), st.integers(1, 4))
@examples(max_examples=60)
def test_nothing_is_missing_without_being_told(steps: list[str | None], most: int) -> None:
    """However publishing and reading interleave, a message is read in its order, or its channel is told as lost."""

    async def test() -> None:
        subscriber = Subscriber(most, closes=False, on_drop=lambda _channel: None)
        sent: dict[str, int] = {"a": 0, "b": 0}
        expected: dict[str, int] = {"a": 0, "b": 0}
        unsure: set[str] = set()
        for step in [*steps, *[None] * 10]:
            if step is not None:
                subscriber.put(Message(step, sent[step]))
                sent[step] += 1
            elif subscriber._waiting or subscriber._lost:
                assert len(subscriber._waiting) <= most
                message = await anext(subscriber)
                if message.lost:
                    unsure.add(message.channel)
                    continue
                if message.channel not in unsure:
                    assert message.data == expected[message.channel]
                assert message.data >= expected[message.channel]
                unsure.discard(message.channel)
                expected[message.channel] = message.data + 1
        assert all(expected[channel] == sent[channel] or channel in unsure for channel in "ab")

    run(test)


def test_subscribers_are_bounded() -> None:
    """In number, and each in channels."""
    kit = Kit(max_subscribers=1, max_channels=2)

    async def test() -> None:
        async with kit.realtime.subscribe(None, "a", "b"):
            with pytest.raises(Problem) as caught:
                async with kit.realtime.subscribe(None, "a"):
                    pass
            assert caught.value.status_code == 503
            assert "Retry-After" in (caught.value.headers or {})
        for channels in ((), ("a", "b", "c")):
            with pytest.raises(ChannelRefused):
                async with kit.realtime.subscribe(None, *channels):
                    pass
        with pytest.raises(ValueError, match="is no channel"):
            await kit.realtime.demand(None, "a b")

    run(test)


# --- rules ------------------------------------------------------------------------------------------------------------


def test_channels_that_no_rule_names_are_refused() -> None:
    """What no rule names is nobody's, and a rule says yes with ``True`` and nothing else."""
    kit = Kit()

    async def may_see(connection: HTTPConnection, number: str) -> bool:
        return connection is CONNECTION and number == "42"

    def truthy(_connection: HTTPConnection) -> Any:
        return "yes"

    kit.realtime.allow("orders:{number}", may_see)
    kit.realtime.allow("orders:43", lambda _connection: True)
    kit.realtime.allow("truthy", truthy)
    kit.realtime.allow("news.all", lambda _connection: True)

    async def allowed(name: str) -> bool:
        try:
            await kit.realtime.demand(CONNECTION, name)
        except ChannelRefused:
            return False
        return True

    async def test() -> None:
        assert await allowed("orders:42")
        assert await allowed("news.all")
        for name in ("orders:43", "orders:42:x", "orders:", "truthy", "newsXall", "x", "*", "news.all\n", ""):
            assert not await allowed(name)

    run(test)
    assert [event for event in kit.seen if getattr(event, "channel", "") in ("orders:43", "x")] == [
        SubscriptionRefused("orders:43", named=True),
        SubscriptionRefused("x", named=False),
    ]


def test_switched_off_there_are_no_channels() -> None:
    """Nobody subscribes, and nothing is measured."""
    kit = Kit(enabled=False)
    with pytest.raises(ChannelRefused):
        asyncio.run(kit.realtime.demand(None, "a"))
    handle = harden(FastAPI(), Settings(realtime={"enabled": False}))
    assert "hardening_realtime" not in handle.metrics.expose().decode()


# --- the end ----------------------------------------------------------------------------------------------------------


def test_subscriptions_end_when_the_process_does() -> None:
    """What waits is still read; who comes later is ended as well."""
    kit = Kit()

    async def test() -> None:
        async with kit.realtime.subscribe(None, "a") as messages:
            kit.realtime.publish("a", 1)
            thread = threading.Thread(target=kit.lifecycle.drain)
            thread.start()
            thread.join()
            assert [message.data async for message in messages] == [1]
            async with kit.realtime.subscribe(None, "a") as late:
                assert [message async for message in late] == []
            kit.realtime.publish("a", 2)

    run(test)


# --- endpoints --------------------------------------------------------------------------------------------------------


class Site:
    """An application whose orders can be watched."""

    def __init__(self, **settings: Any) -> None:
        self.app = FastAPI(openapi_url=None)
        self.handle = handle = harden(self.app, Settings(realtime=settings))
        handle.realtime.allow("orders:{number}", lambda connection, number: number != "13" and bool(connection.headers))
        channels_of = Annotated[ConnectionChannels, Depends(handle.realtime.of)]

        async def watch(websocket: WebSocket, number: str, channels: channels_of) -> None:
            await channels.websocket(f"orders:{number}")

        async def events(number: str, channels: channels_of) -> StreamingResponse:
            return await channels.events(f"orders:{number}")

        async def wrong(channels: channels_of) -> None:
            await channels.websocket("orders:1")

        def publish(number: str) -> None:
            handle.realtime.publish(f"orders:{number}", {"state": "paid"})

        self.app.add_api_websocket_route("/orders/{number}", watch)
        self.app.get("/orders/{number}/events", response_class=StreamingResponse)(events)
        self.app.post("/orders/{number}")(publish)
        self.app.get("/wrong")(wrong)


def test_websocket_gets_messages_until_it_goes() -> None:
    """What it sends is thrown away; and when it has gone, so has its subscription."""
    site = Site()
    with TestClient(site.app) as client:
        with client.websocket_connect("/orders/42") as websocket:
            websocket.send_text("nobody reads this")
            client.post("/orders/42")
            assert websocket.receive_json() == {"channel": "orders:42", "data": {"state": "paid"}}
            text = site.handle.metrics.expose().decode()
            assert "hardening_realtime_subscribers 1.0" in text
            assert "hardening_realtime_published_total 1.0" in text
        assert site.handle.realtime.count() == 0


def test_refusals_come_before_anything_is_accepted() -> None:
    """A websocket is denied with 403, an event stream answered with it."""
    site = Site()
    with TestClient(site.app) as client:
        with pytest.raises(WebSocketDisconnect), client.websocket_connect("/orders/13"):
            pass
        answer = client.get("/orders/13/events")
        assert (answer.status_code, answer.json()["title"]) == (403, "Channel refused")
        assert "hardening_realtime_refused_total 2.0" in site.handle.metrics.expose().decode()


def test_websocket_is_for_websockets() -> None:
    """Elsewhere it says what to use."""
    channels = ConnectionChannels(Realtime(), Request({"type": "http"}))
    with pytest.raises(TypeError, match="events"):
        asyncio.run(channels.websocket("a"))


class Wire:
    """A websocket of which the test holds the other end."""

    def __init__(self) -> None:
        self.incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.sent: list[dict[str, Any]] = []
        self.news = asyncio.Event()
        self.incoming.put_nowait({"type": "websocket.connect"})
        self.open = asyncio.Event()
        self.open.set()
        self.websocket = WebSocket({"type": "websocket", "headers": []}, self.incoming.get, self._send)

    async def _send(self, message: Any) -> None:
        if message["type"] == "websocket.send":
            await self.open.wait()
        self.sent.append(message)
        self.news.set()

    async def until(self, kind: str) -> dict[str, Any]:
        while True:
            for message in self.sent:
                if message["type"] == kind:
                    return message
            self.news.clear()
            await self.news.wait()


@pytest.mark.parametrize(("reads", "code"), [(True, 1012), (False, 1013)])
def test_websocket_is_closed_with_its_code(*, reads: bool, code: int) -> None:
    """1012 when the process ends, 1013 when it reads too slowly."""
    kit = Kit(max_waiting=1, on_slow="close")
    kit.realtime.allow("a", lambda _connection: True)

    async def test() -> None:
        wire = Wire()
        serving = asyncio.create_task(kit.realtime.of(wire.websocket).websocket("a"))
        await wire.until("websocket.accept")
        if reads:
            kit.lifecycle.drain()
        else:
            wire.open.clear()
            for number in range(3):
                kit.realtime.publish("a", number)
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            wire.open.set()
        assert (await wire.until("websocket.close"))["code"] == code
        await serving
        assert kit.realtime.count() == 0

    run(test)


def test_event_stream_tells_messages_losses_and_silence() -> None:
    """As server-sent events; it ends with the process, and subscribes only when it is sent."""
    kit = Kit(keep_alive_seconds=0.01, max_waiting=1)
    kit.realtime.allow("a", lambda _connection: True)

    async def test() -> None:
        response = await kit.realtime.of(CONNECTION).events("a")
        assert kit.realtime.count() == 0
        parts: list[str] = []
        silent = asyncio.Event()

        async def send(message: Any) -> None:
            parts.append(message.get("body", b"").decode())
            if parts[-1].startswith(":"):
                silent.set()

        async def receive() -> Any:
            await asyncio.Event().wait()

        serving = asyncio.create_task(response({"type": "http", "asgi": {"spec_version": "2.4"}}, receive, send))
        await silent.wait()
        kit.realtime.publish("a", 1)
        kit.realtime.publish("a", 2)
        kit.lifecycle.drain()
        await serving
        told = [part for part in parts if part and not part.startswith(":")]
        assert told == [
            "retry: 3000\n\n",
            'event: lost\ndata: {"channel": "a", "lost": true}\n\n',
            'event: message\ndata: {"channel": "a", "data": 2}\n\n',
        ]
        assert kit.realtime.count() == 0

    run(test)


# --- other workers ----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def worker(url: str, prefix: str, **settings: Any) -> AsyncIterator[Realtime]:
    """One of the processes that share a server."""
    store = RedisStore(url, prefix=prefix, budget_seconds=5)
    realtime = Kit(store.channels("realtime"), **settings).realtime
    try:
        async with realtime.running():
            yield realtime
    finally:
        await store.close()


def test_workers_hear_each_other(state_url: str, prefix: str) -> None:
    """In order, each message once, on the channels that somebody there wants, from any thread."""

    async def test() -> None:
        async with worker(state_url, prefix) as one, worker(state_url, prefix) as two:
            assert one.count() == two.count() == 0
            async with one.subscribe(None, "a") as here, two.subscribe(None, "a") as there:
                for number in range(3):
                    one.publish("a", number)
                await asyncio.to_thread(one.publish, "a", 3)
                assert [(await anext(there)).data for _ in range(4)] == [0, 1, 2, 3]
                two.publish("a", 4)
                assert [(await anext(here)).data for _ in range(5)] == [0, 1, 2, 3, 4]
            async with two.subscribe(None, "a") as again:
                one.publish("a", 5)
                assert (await anext(again)).data == 5

    run(test)


def test_last_messages_of_a_worker_are_heard(state_url: str, prefix: str) -> None:
    """What is published just before it ends goes out; and it may begin again, in another event loop."""
    store = RedisStore(state_url, prefix=prefix, budget_seconds=5)
    ends = Kit(store.channels("realtime")).realtime

    async def test() -> None:
        async with worker(state_url, prefix) as stays, stays.subscribe(None, "a") as there:
            async with ends.running(), ends.subscribe(None, "b") as mine:
                ends.publish("a", 1)
                stays.publish("b", 2)
                assert (await anext(mine)).data == 2
            assert (await anext(there)).data == 1
        await store.close()

    run(test)
    run(test)


def test_gap_is_told_when_the_server_was_gone(state_server: Callable[..., StateServer], prefix: str) -> None:
    """It connects again by itself, and says of each channel that something may be missing before anything new comes."""
    server = state_server()

    async def test() -> None:
        async with (
            worker(server.url, prefix) as one,
            worker(server.url, prefix) as two,
            two.subscribe(None, "a") as there,
            one.subscribe(None, "b"),
        ):
            one.publish("a", 1)
            assert (await anext(there)).data == 1
            await asyncio.to_thread(server.kill)
            await asyncio.to_thread(server.start)
            assert await anext(there) == lost("a")
            message = lost("a")
            while message.lost:
                one.publish("a", 2)
                message = await anext(there)
            assert message.data == 2

    run(test)


class Broken:
    """Channels to which nothing can be sent, until they are mended."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, dict[str, Any]]] = []
        self.broken = True
        self.tried = asyncio.Event()
        self.done = asyncio.Event()

    async def publish(self, name: str, payload: bytes) -> None:
        self.tried.set()
        if self.broken:
            raise StoreUnavailable("gone")
        self.sent.append((name, json.loads(payload)))
        self.done.set()

    async def subscribe(self, name: str) -> None:
        """Hears nothing."""

    async def unsubscribe(self, name: str) -> None:
        """Hears nothing."""

    async def run(self, on_message: Callable[[str, bytes], None], on_missed: Callable[[str], None]) -> None:
        await asyncio.Event().wait()


@pytest.mark.parametrize(("names", "told"), [("ab", ["a", "b"]), ("abcd", ["*"])])
def test_what_could_not_be_sent_is_told_to_be_missing(names: str, told: list[str]) -> None:
    """Of each channel; of more than are kept, that it may be any. The publisher never waits."""

    async def test() -> None:
        channels = Broken()
        realtime = Kit(channels, max_outbox=2).realtime
        async with realtime.running():
            for name in names:
                realtime.publish(name, 1)
            await channels.tried.wait()
            channels.broken = False
            while len(channels.sent) < len(told):
                channels.done.clear()
                await channels.done.wait()
        assert [name for name, _ in channels.sent] == told
        assert all(said["lost"] for _, said in channels.sent)

    run(test)


def test_what_comes_from_the_server_is_not_believed(caplog: pytest.LogCaptureFixture) -> None:
    """What is no message is logged; a loss of all channels reaches all."""

    async def test() -> None:
        realtime = Kit(Broken()).realtime
        async with realtime.subscribe(None, "a") as one, realtime.subscribe(None, "b") as two:
            for payload in (b"\xff", b"[]", b"1", b"{}", b'{"from": "x"}', b'{"from": "x", "text": "{"}'):
                realtime._came("a", payload)
            realtime._came("*", b'{"from": "x", "lost": true}')
            realtime._came("*", b'{"from": "x", "lost": true}')
            realtime._came("a", b'{"from": "x", "text": "7"}')
            assert [await anext(one), await anext(one), await anext(two)] == [lost("a"), Message("a", 7), lost("b")]

    run(test)
    assert caplog.text.count("something that is no message") == 6
