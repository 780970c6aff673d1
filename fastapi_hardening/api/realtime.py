"""Tells clients what happens, as it happens: channels that websockets and server-sent events subscribe to.

It protects from the two ways in which such code usually fails. A client that reads slowly fills the memory with what
waits for it: here each subscriber has a bounded queue, and what does not fit is dropped and said to be, or the
subscriber is closed with 1013. And a client that names a channel gets it: here a channel that no rule names is
refused, and a rule decides for each connection. It is *not* a queue of jobs: nothing is kept for those who are not
there, and a message may be lost. Whoever was told so loads anew.

It is no layer; how many websockets there may be, and for how long, is for the websocket limits. Publishing never waits:
not for subscribers, not for the shared store. With ``state_url`` all workers hear each other, by publish and subscribe
of Redis; messages of one publisher keep their order.

Example:
    >>> import asyncio
    >>> realtime = Realtime()
    >>> async def orders() -> None:
    ...     async with realtime.subscribe(None, "orders:42") as messages:
    ...         realtime.publish("orders:42", {"state": "paid"})
    ...         print(await anext(messages))
    >>> asyncio.run(orders())
    Message(channel='orders:42', data={'state': 'paid'}, lost=False)
"""

import asyncio
import inspect
import json
import logging
import re
import secrets
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge
from pydantic import Field
from starlette.requests import HTTPConnection
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from fastapi_hardening.core.clock import Clock, SystemClock
from fastapi_hardening.core.configuration import ConcernSettings
from fastapi_hardening.core.events import Events
from fastapi_hardening.core.lifecycle import Lifecycle
from fastapi_hardening.core.problem import IANA, OWN, Problem, retry_after
from fastapi_hardening.core.store import StoreUnavailable

logger = logging.getLogger("fastapi_hardening.realtime")

# Try again later; service restart (registry of close codes of RFC 6455).
_TOO_SLOW, _RESTART = 1013, 1012
_CHANNEL = re.compile(r"[\w.:@/-]{1,200}", re.ASCII)
_PLACE = re.compile(r"\{([A-Za-z_]\w*)\}")
_RETRY_MILLISECONDS = 3000

Rule = Callable[..., bool | Awaitable[bool]]
"""Whether a connection may subscribe: called with it, and with the places of the pattern by name."""


class RealtimeSettings(ConcernSettings):
    """The settings of real-time channels."""

    max_waiting: int = Field(100, ge=1)
    """How many messages may wait for one subscriber."""

    on_slow: Literal["drop-oldest", "close"] = "drop-oldest"
    """What happens to a subscriber for whom more wait: the oldest are dropped, and it is told so; or it is closed, a
    websocket with 1013."""

    max_message_bytes: int = Field(65_536, ge=1)
    """How large a message may be, as JSON; a larger one is refused to the publisher."""

    max_channels: int = Field(50, ge=1)
    """How many channels one subscriber may have."""

    max_subscribers: int = Field(10_000, ge=1)
    """How many subscribers one process may have. Above: 503."""

    max_outbox: int = Field(10_000, ge=1)
    """How many messages may wait for the shared store; beyond, other workers are told that they missed something."""

    keep_alive_seconds: float = Field(15.0, gt=0)
    """How often an event stream on which nothing happens is kept alive, so that proxies do not close it."""


# --- problems and events ----------------------------------------------------------------------------------------------


class ChannelRefused(Problem):
    """No rule names the channel, or it does not let this connection subscribe."""

    status = 403
    type = OWN + "channel-refused"
    title = "Channel refused"


class SlowConsumer(Exception):  # noqa: N818 - named as problems are, by what happened
    """The subscriber reads more slowly than messages come, and ``on_slow`` is ``close``."""


@dataclass(frozen=True, slots=True)
class MessagesDropped:
    """A subscriber reads too slowly, and has begun to lose messages; told once until it has caught up.

    Attributes:
        channel: The channel of the message that did not fit.
        closed: The subscriber was closed for it.
    """

    channel: str
    closed: bool


@dataclass(frozen=True, slots=True)
class SubscriptionRefused:
    """Somebody wanted a channel that is not for them.

    Attributes:
        channel: Its name.
        named: A rule names it, and says no.
    """

    channel: str
    named: bool


@dataclass(frozen=True)
class Message:
    """What a subscriber gets.

    Attributes:
        channel: Where it was published.
        data: What was published; ``None`` where something was lost.
        lost: No message: some were lost here, so load anew.
    """

    channel: str
    data: Any
    lost: bool = False

    @cached_property
    def text(self) -> str:
        """All of it as JSON, for a client; made once for all of them."""
        return json.dumps({"channel": self.channel} | ({"lost": True} if self.lost else {"data": self.data}))


class Channels(Protocol):
    """Channels that other workers hear too."""

    async def publish(self, name: str, payload: bytes) -> None:
        """Sends something; raises :class:`StoreUnavailable`."""
        ...

    async def subscribe(self, name: str) -> None:
        """Listens to a channel."""
        ...

    async def unsubscribe(self, name: str) -> None:
        """Listens no longer."""
        ...

    async def run(self, on_message: Callable[[str, bytes], None], on_missed: Callable[[str], None]) -> None:
        """Listens for as long as it is not cancelled."""
        ...


# --- engine -----------------------------------------------------------------------------------------------------------


class Subscriber:
    """The messages that wait for one subscriber, as an async iterator. It ends when the process does.

    Args:
        max_waiting: How many may wait.
        closes: Whether one more closes it; else the oldest is dropped.
        on_drop: Called with the channel when the first one is lost.
    """

    def __init__(self, max_waiting: int, *, closes: bool, on_drop: Callable[[str], None]) -> None:
        self.loop = asyncio.get_running_loop()
        self.ended = False
        self._waiting: deque[Message] = deque()
        # By channel what was lost is told before what is left.
        self._lost: dict[str, None] = {}
        self._max = max_waiting
        self._closes = closes
        self._slow = False
        self._on_drop = on_drop
        self._news = asyncio.Event()

    def put(self, message: Message) -> None:
        """Adds a message; never waits."""
        if self._slow or self.ended:
            return
        if message.lost and self._waiting and self._waiting[-1] == message:
            return
        if len(self._waiting) < self._max:
            self._waiting.append(message)
        elif self._closes:
            self._slow = True
            self._waiting.clear()
            self._on_drop(message.channel)
        else:
            if not self._lost:
                self._on_drop(message.channel)
            self._lost[self._waiting.popleft().channel] = None
            self._waiting.append(message)
        self._news.set()

    def end(self) -> None:
        """Ends the iteration, when what waits is read."""
        self.ended = True
        self._news.set()

    def __aiter__(self) -> "Subscriber":
        return self

    async def __anext__(self) -> Message:
        """The next message.

        Raises:
            SlowConsumer: More came than was read.
        """
        while True:
            if self._slow:
                raise SlowConsumer
            if self._lost:
                channel = next(iter(self._lost))
                del self._lost[channel]
                return Message(channel, None, lost=True)
            if self._waiting:
                return self._waiting.popleft()
            if self.ended:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()


class Realtime:
    """Channels of one application; reachable as ``handle.realtime``.

    Args:
        settings: The limits.
        channels: Channels that other workers hear too.
        lifecycle: Says when the process ends.
        events: Where :class:`MessagesDropped` and :class:`SubscriptionRefused` go.
        clock: Where the time comes from.
    """

    def __init__(
        self,
        settings: RealtimeSettings | None = None,
        *,
        channels: Channels | None = None,
        lifecycle: Lifecycle | None = None,
        events: Events | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.settings = settings or RealtimeSettings()
        self._channels = channels
        self._lifecycle = lifecycle
        self._events = events or Events()
        self._now = (clock or SystemClock()).monotonic
        self._rules: list[tuple[re.Pattern[str], Rule]] = []
        self._subscribers: dict[str, set[Subscriber]] = {}
        self._all: set[Subscriber] = set()
        self._lock = threading.Lock()
        self._origin = secrets.token_hex(8)
        self._outbox: deque[tuple[str, str | None]] = deque()
        # Channels of which others have missed something that was published here.
        self._unsent: dict[str, None] = {}
        self._work = asyncio.Event()
        self._idle = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self.on_publish: Callable[[], None] | None = None
        self.on_change: Callable[[], None] | None = None
        if lifecycle is not None:
            lifecycle.on_drain.append(self._drain)

    def allow(self, pattern: str, rule: Rule) -> None:
        """Has a rule decide about the channels of a pattern; the first pattern that fits counts.

        Args:
            pattern: Such as ``orders:{number}``; a place is anything without a colon.
            rule: Called with the connection, and the places by name; sync (and quick) or async.

        Example:
            >>> Realtime().allow("news", lambda connection: True)
        """
        parts = _PLACE.split(pattern)
        fits = "".join(f"(?P<{part}>[^:]+)" if number % 2 else re.escape(part) for number, part in enumerate(parts))
        self._rules.append((re.compile(fits), rule))

    def publish(self, channel: str, data: Any) -> None:
        """Tells all subscribers of a channel; never waits. From any thread.

        Raises:
            ValueError: The channel has no such name, or the message is too large.
            TypeError: The data is nothing that JSON knows.
        """
        _check_name(channel)
        text = json.dumps(data)
        if len(text) > self.settings.max_message_bytes:
            raise ValueError(f"a message on {channel} has {len(text)} bytes; max_message_bytes says how many it may")
        if self.on_publish is not None:
            self.on_publish()
        # As others get it, so that a list that is changed later, or a tuple, is no surprise.
        self._deliver(channel, Message(channel, json.loads(text)))
        if self._channels is not None and self._loop is not None:
            if _running_loop() is self._loop:
                self._post(channel, text)
            else:
                self._loop.call_soon_threadsafe(self._post, channel, text)

    @asynccontextmanager
    async def subscribe(self, connection: HTTPConnection | None, *channels: str) -> AsyncIterator[Subscriber]:
        """While the block runs, what is published on these channels waits for whoever iterates.

        Args:
            connection: Who asks, for the rules; ``None`` for the application itself, which may hear everything.
            channels: Their names, at least one.

        Raises:
            ChannelRefused: One of them is not for this connection.
            Problem: 503, because the process has enough subscribers.
        """
        names = await self.demand(connection, *channels)
        if len(self._all) >= self.settings.max_subscribers:
            raise Problem(
                "There are too many subscribers; come back later.",
                status=503,
                type=IANA + "temporary-reduced-capacity",
                title="Temporarily reduced capacity",
                headers=retry_after(1),
            )
        subscriber = Subscriber(
            self.settings.max_waiting, closes=self.settings.on_slow == "close", on_drop=self._dropped
        )
        with self._lock:
            self._all.add(subscriber)
            for name in names:
                self._subscribers.setdefault(name, set()).add(subscriber)
        self._changed()
        if self._lifecycle is not None and self._lifecycle.draining:
            subscriber.loop.call_later(self._seconds_left(), subscriber.end)
        try:
            if self._channels is not None and self._loop is subscriber.loop:
                await asyncio.gather(*map(self._channels.subscribe, names))
            yield subscriber
        finally:
            await self._leave(subscriber, names)

    async def _leave(self, subscriber: Subscriber, names: list[str]) -> None:
        with self._lock:
            self._all.discard(subscriber)
            empty = []
            for name in names:
                self._subscribers[name].discard(subscriber)
                if not self._subscribers[name]:
                    del self._subscribers[name]
                    empty.append(name)
        self._changed()
        for name in empty if self._channels is not None and self._loop is subscriber.loop else ():
            # Somebody may have come while the one before was given up.
            if self._channels is not None and name not in self._subscribers:
                await self._channels.unsubscribe(name)

    def count(self, channel: str | None = None) -> int:
        """How many subscribers a channel has in this process; without a name, all of them."""
        return len(self._all) if channel is None else len(self._subscribers.get(channel, ()))

    def of(self, connection: HTTPConnection) -> "ConnectionChannels":
        """What an endpoint uses, as a dependency: ``Annotated[ConnectionChannels, Depends(handle.realtime.of)]``."""
        return ConnectionChannels(self, connection)

    async def demand(self, connection: HTTPConnection | None, *channels: str) -> list[str]:
        """The channels, each once, if all of them are for this connection; as :meth:`subscribe`.

        Raises:
            ChannelRefused: One is not.
        """
        names = list(dict.fromkeys(channels))
        if not self.settings.enabled:
            raise ChannelRefused("There are no channels here.")
        if not names or len(names) > self.settings.max_channels:
            raise ChannelRefused(f"A subscriber has 1 to {self.settings.max_channels} channels.")
        for name in names:
            await self._demand(connection, name)
        return names

    async def _demand(self, connection: HTTPConnection | None, name: str) -> None:
        if connection is None:
            _check_name(name)
            return
        named = False
        for pattern, rule in self._rules if _CHANNEL.fullmatch(name) else ():
            found = pattern.fullmatch(name)
            if found is not None:
                named, allowed = True, rule(connection, **found.groupdict())
                if (await allowed if inspect.isawaitable(allowed) else allowed) is True:
                    return
                break
        self._events.emit(SubscriptionRefused(name[:200], named))
        raise ChannelRefused("This channel is not for you.")

    def _changed(self) -> None:
        if self.on_change is not None:
            self.on_change()

    def _dropped(self, channel: str) -> None:
        self._events.emit(MessagesDropped(channel, self.settings.on_slow == "close"))

    def _deliver(self, channel: str, message: Message) -> None:
        with self._lock:
            subscribers = tuple(self._subscribers.get(channel, ()))
        running = _running_loop()
        for subscriber in subscribers:
            if subscriber.loop is running:
                subscriber.put(message)
            else:
                with suppress(RuntimeError):  # its event loop has ended meanwhile
                    subscriber.loop.call_soon_threadsafe(subscriber.put, message)

    # --- the end ---

    def _drain(self) -> None:
        """Ends all subscribers when the server stops; perhaps called out of a signal handler."""
        for loop in {subscriber.loop for subscriber in tuple(self._all)}:
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(loop.call_later, self._seconds_left(), self._end, loop)

    def _seconds_left(self) -> float:
        return 0.0 if self._lifecycle is None else max(0.0, self._lifecycle.stops_at - self._now())

    def _end(self, loop: asyncio.AbstractEventLoop) -> None:
        for subscriber in tuple(self._all):
            if subscriber.loop is loop:
                subscriber.end()

    # --- other workers ---

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """While the block runs, other workers are heard, and hear what is published here."""
        channels = self._channels
        if channels is None or not self.settings.enabled:
            yield
            return
        self._loop, self._work, self._idle = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
        tasks = [
            asyncio.create_task(channels.run(self._came, self._missed), name="channels of other workers"),
            asyncio.create_task(self._send(channels, self._work), name="channels for other workers"),
        ]
        try:
            await channels.subscribe(_ALL)
            yield
        finally:
            self._loop = None
            # What the last requests have published still goes out.
            with suppress(TimeoutError):
                async with asyncio.timeout(_PAUSE_SECONDS):
                    await self._idle.wait()
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    def _post(self, channel: str, text: str) -> None:
        if len(self._outbox) < self.settings.max_outbox:
            self._outbox.append((channel, text))
        else:
            self._unsend(channel)
        self._idle.clear()
        self._work.set()

    def _unsend(self, channel: str) -> None:
        """Notes that others have missed something; of too many channels only that it is all of them."""
        if len(self._unsent) >= self.settings.max_outbox:
            self._unsent = {_ALL: None}
        if _ALL not in self._unsent:
            self._unsent[channel] = None

    async def _send(self, channels: Channels, work: asyncio.Event) -> None:
        """Sends what is published here, in its order; what cannot be sent is told to be missing, when that can be."""
        while True:
            if not self._outbox and not self._unsent:
                self._idle.set()
                work.clear()
                await work.wait()
            # What is missing is told after what was published before it.
            channel, text = self._outbox.popleft() if self._outbox else (next(iter(self._unsent)), None)
            said: dict[str, Any] = {"from": self._origin}
            said |= {"lost": True} if text is None else {"text": text}
            try:
                await channels.publish(channel, json.dumps(said).encode())
            except StoreUnavailable:
                for name in (channel, *(name for name, _ in self._outbox)):
                    self._unsend(name)
                self._outbox.clear()
                await asyncio.sleep(_PAUSE_SECONDS)
            else:
                if text is None:
                    self._unsent.pop(channel, None)

    def _came(self, channel: str, payload: bytes) -> None:
        try:
            said = json.loads(payload)
            if said["from"] == self._origin:
                return
            message = (
                Message(channel, None, lost=True) if said.get("lost") else Message(channel, json.loads(said["text"]))
            )
        except (ValueError, TypeError, KeyError, AttributeError):
            logger.warning("something that is no message came on the channel %s of the shared store", channel)
            return
        if channel == _ALL:
            for name in tuple(self._subscribers):
                self._missed(name)
        else:
            self._deliver(channel, message)

    def _missed(self, channel: str) -> None:
        self._deliver(channel, Message(channel, None, lost=True))


# No channel of the application can have this name.
_ALL = "*"
_PAUSE_SECONDS = 0.2


def _check_name(channel: str) -> None:
    if not _CHANNEL.fullmatch(channel):
        raise ValueError(f"{channel[:200]!r} is no channel: letters, digits and _ . : @ / - only, at most 200")


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


# --- endpoints --------------------------------------------------------------------------------------------------------


class ConnectionChannels:
    """The channels as one connection may have them.

    Args:
        realtime: All channels.
        connection: Who asks.
    """

    def __init__(self, realtime: Realtime, connection: HTTPConnection) -> None:
        self._realtime = realtime
        self._connection = connection

    async def websocket(self, *channels: str) -> None:
        """Accepts the websocket and sends it every message as JSON, until it goes or the process ends.

        What the client sends is read and thrown away; it counts for the websocket limits.

        Raises:
            ChannelRefused: Before it is accepted.
            TypeError: The connection is no websocket.
        """
        websocket = self._connection
        if not isinstance(websocket, WebSocket):
            raise TypeError("websocket() is for an endpoint of a websocket; others use events()")
        async with self._realtime.subscribe(websocket, *channels) as messages:
            await websocket.accept()
            gone = asyncio.create_task(_until_gone(websocket))
            sending = asyncio.create_task(_send_all(websocket, messages))
            try:
                await asyncio.wait((gone, sending), return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (gone, sending):
                    task.cancel()
                await asyncio.wait((gone, sending))
            if not sending.cancelled():
                sending.result()

    async def events(self, *channels: str) -> StreamingResponse:
        """An answer that streams every message as a server-sent event, until the client goes or the process ends.

        Raises:
            ChannelRefused: Before anything is sent.
        """
        await self._realtime.demand(self._connection, *channels)
        return _EventStream(self._realtime, channels)


async def _until_gone(websocket: WebSocket) -> None:
    with suppress(WebSocketDisconnect, RuntimeError):
        while (await websocket.receive())["type"] != "websocket.disconnect":
            pass


async def _send_all(websocket: WebSocket, messages: Subscriber) -> None:
    with suppress(WebSocketDisconnect, RuntimeError, OSError):
        try:
            async for message in messages:
                await websocket.send_text(message.text)
        except SlowConsumer:
            await websocket.close(_TOO_SLOW, "messages are not read")
        else:
            await websocket.close(_RESTART, "service restart")


class _EventStream(StreamingResponse):
    """A stream of events, which subscribes when it is sent: an answer that is thrown away leaves nothing behind."""

    def __init__(self, realtime: Realtime, channels: tuple[str, ...]) -> None:
        super().__init__((), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._realtime = realtime
        self._names = channels

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # They were demanded for the connection already.
        async with self._realtime.subscribe(None, *self._names) as messages:
            self.body_iterator = self._events(messages)
            await super().__call__(scope, receive, send)

    async def _events(self, messages: Subscriber) -> AsyncIterator[str]:
        yield f"retry: {_RETRY_MILLISECONDS}\n\n"
        while True:
            try:
                async with asyncio.timeout(self._realtime.settings.keep_alive_seconds):
                    message = await anext(messages)
            except TimeoutError:
                yield ": nothing happens\n\n"
            except (StopAsyncIteration, SlowConsumer):
                return
            else:
                yield f"event: {'lost' if message.lost else 'message'}\ndata: {message.text}\n\n"


# --- metrics ----------------------------------------------------------------------------------------------------------


def measure(registry: CollectorRegistry, events: Events, realtime: Realtime) -> None:
    """Has subscribers, refusals and losses counted; no channel is a label, for there may be any number."""
    subscribers = Gauge(
        "hardening_realtime_subscribers", "Subscribers of channels.", registry=registry, multiprocess_mode="livesum"
    )
    realtime.on_change = lambda: subscribers.set(realtime.count())
    realtime.on_publish = Counter("hardening_realtime_published", "Messages published.", registry=registry).inc
    losses = Counter(
        "hardening_realtime_slow", "Subscribers that began to lose messages, or were closed for it.", registry=registry
    )
    refused = Counter("hardening_realtime_refused", "Subscriptions that were refused.", registry=registry)
    events.subscribe(MessagesDropped, lambda _event: losses.inc())
    events.subscribe(SubscriptionRefused, lambda _event: refused.inc())
