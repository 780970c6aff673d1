"""Channels on a real server: who listens is told when it may have missed something."""

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from redis.asyncio import Connection

from fastapi_hardening.core import redis_channels
from fastapi_hardening.core.redis_store import RedisStore
from tests.state_server import StateServer, free_port


class Heard:
    """What was heard, and on which channels something may be missing."""

    def __init__(self) -> None:
        self.all: list[Any] = []
        self._news = asyncio.Event()

    def note(self, *what: Any) -> None:
        self.all.append(what)
        self._news.set()

    async def until(self, *what: Any) -> None:
        while what not in self.all:
            self._news.clear()
            await self._news.wait()


@asynccontextmanager
async def listening(url: str, prefix: str, budget_seconds: float = 5) -> AsyncIterator[tuple[Any, Heard]]:
    store, heard = RedisStore(url, prefix=prefix, budget_seconds=budget_seconds), Heard()
    channels = store.channels("test")
    task = asyncio.create_task(channels.run(heard.note, heard.note))
    try:
        yield channels, heard
    finally:
        task.cancel()
        await asyncio.wait([task])
        await store.close()


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(30):
            await test()

    asyncio.run(limited())


def test_a_channel_is_heard_as_soon_as_subscribing_returns(state_url: str, prefix: str) -> None:
    """By all who want it, and by nobody who has given it up; giving up twice does no harm."""

    async def test() -> None:
        async with listening(state_url, prefix) as (channels, heard):
            await asyncio.gather(channels.subscribe("a"), channels.subscribe("a"), channels.subscribe("b"))
            await channels.publish("a", b"1")
            await heard.until("a", b"1")
            await channels.unsubscribe("a")
            await channels.unsubscribe("a")
            await channels.publish("a", b"2")
            await channels.publish("b", b"3")
            await heard.until("b", b"3")
            assert heard.all == [("a", b"1"), ("b", b"3")]

    run(test)


def test_a_server_that_comes_late_is_told_of(state_server: Callable[..., StateServer], prefix: str) -> None:
    """Subscribing waits no longer than the budget; when the channel is heard at last, that is said."""
    server = state_server()
    server.kill()

    async def test() -> None:
        async with listening(server.url, prefix, budget_seconds=0.05) as (channels, heard):
            await channels.subscribe("a")
            await channels.subscribe("given up")
            await channels.unsubscribe("given up")
            assert heard.all == []
            await asyncio.to_thread(server.start)
            await heard.until("a")
            assert heard.all == [("a",)]

    run(test)


def test_a_server_that_says_nothing_is_left(
    state_server: Callable[..., StateServer], prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked whether it is there, with and without channels; without an answer another connection is tried."""
    monkeypatch.setattr(redis_channels, "_PING_SECONDS", 0.01)
    monkeypatch.setattr(redis_channels, "_SILENCE_SECONDS", 0.5)
    server = state_server()

    async def test() -> None:
        async with listening(server.url, prefix) as (channels, heard):
            while channels._connection is None:  # noqa: ASYNC110 - what is waited for is a connection
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.05)  # a few pings without a channel
            await channels.subscribe("a")
            server.tell(signal.SIGSTOP)
            while channels._connection is not None:  # noqa: ASYNC110 - likewise, that it is given up
                await asyncio.sleep(0.001)
            server.tell(signal.SIGCONT)
            await heard.until("a")

    run(test)


def test_a_connection_that_breaks_while_it_is_told_something_stops_nobody(state_url: str, prefix: str) -> None:
    """Who reads it finds out; who wants a channel waits for the next one."""

    async def test() -> None:
        async with listening(state_url, prefix, budget_seconds=0.5) as (channels, heard):
            await channels.subscribe("a")
            listens = channels._connection
            channels._connection = Connection(port=free_port())
            await channels.subscribe("b")
            await listens.disconnect()
            await heard.until("a")
            await heard.until("b")
            await channels.publish("b", b"1")
            await heard.until("b", b"1")

    run(test)


def test_what_was_given_up_meanwhile_is_not_told() -> None:
    """The server may still confirm it."""
    heard = Heard()
    RedisStore("redis://cache.example").channels("test")._heard("a", heard.note)
    assert heard.all == []


def test_any_node_of_a_cluster_will_do() -> None:
    """One after the other, as servers."""
    store = RedisStore("redis+cluster://a.example:7000,b.example:7001")
    addresses = store.channels("test")._addresses
    assert [(address.kind, address.hosts) for address in addresses] == [
        ("server", (("a.example", 7000),)),
        ("server", (("b.example", 7001),)),
    ]
