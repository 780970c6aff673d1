"""Keeps websockets from costing more than they are worth: who may open one, what it may send, how long it may stay.

It protects signed-in people from pages of other sites that open a websocket with their cookies (cross-site websocket
hijacking: no browser applies CORS to a handshake), memory and workers from floods, from large messages and from clients
that do not read, and everybody from a websocket that outlives the credentials it was opened with. It is *not* the hard
stop for sizes: when a message can be measured, the server has it in memory already (uvicorn's ``--ws-max-size``). Nor
does it count handshakes, which the address limit and the rate limit do.

It sits behind the limits that cost least and before authentication, so that a foreign page is refused before its
cookies are looked at. What authentication finds is looked at when the application accepts, and whenever time is up. On
the way in and out it takes one function each, and one timer a websocket. A close of ours is seen by the application as
``websocket.disconnect``, as if the client had gone, so that its own cleanup runs.

Example:
    >>> from fastapi import FastAPI, WebSocket
    >>> from fastapi_hardening.security.websocket_limits import (
    ...     WebSocketLimits,
    ...     WebSocketLimitsMiddleware,
    ...     WebSocketLimitsSettings,
    ... )
    >>> app = FastAPI()
    >>> app.add_middleware(WebSocketLimitsMiddleware, settings=WebSocketLimitsSettings(idle_seconds=600))
    >>> @app.websocket("/chat", dependencies=[WebSocketLimits(messages="5/second", max_message_bytes=2_000)])
    ... async def chat(websocket: WebSocket) -> None:
    ...     await websocket.accept()
"""

import asyncio
import contextlib
import logging
import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import BeforeValidator, Field, field_validator
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect

from fastapi_hardening.core import context as request_context
from fastapi_hardening.core.clock import Clock, SystemClock
from fastapi_hardening.core.configuration import ConcernSettings
from fastapi_hardening.core.context import RequestContext
from fastapi_hardening.core.headers import RawHeaders
from fastapi_hardening.core.lifecycle import Lifecycle
from fastapi_hardening.core.origins import (
    ANY,
    OriginList,
    checked_origin,
    has_browser_credentials,
    is_same_origin,
    origin_of,
)
from fastapi_hardening.core.policy import Override, dependant_of, mark_handled, overrides_of
from fastapi_hardening.core.problem import IANA, Problem, refuse, retry_after, tell
from fastapi_hardening.core.routes import RouteEntry, route_of
from fastapi_hardening.core.window import Limit, TokenBucket, parse_limits

logger = logging.getLogger("fastapi_hardening.websocket_limits")

LAYER = "websocket limits"


# --- settings ---------------------------------------------------------------------------------------------------------


def _empty_is_none(value: object) -> object:
    return None if value == "" else value


Count = Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(_empty_is_none)]
Grace = Annotated[Annotated[float, Field(ge=0)] | None, BeforeValidator(_empty_is_none)]
Seconds = Annotated[Annotated[float, Field(gt=0)] | None, BeforeValidator(_empty_is_none)]
Rate = Annotated[str | None, BeforeValidator(_empty_is_none)]

_UNITS = {"k": 1_000, "m": 1_000_000, "g": 1_000_000_000}
_SIZE = re.compile(r"(\d+)\s*([kmg])b(?=\s*(?:/|per\b))", re.IGNORECASE)


def parse_rate(text: str) -> tuple[Limit, ...]:
    """Limits as people write them, also in kilobytes, megabytes and gigabytes: ``1 MB/second``, ``100 kB per minute``.

    Raises:
        ValueError: With what a limit looks like.

    Example:
        >>> parse_rate("1 MB/second")[0].quota
        1000000
    """
    return parse_limits(_SIZE.sub(lambda size: str(int(size[1]) * _UNITS[size[2].lower()]), text))


class WebSocketLimitsSettings(ConcernSettings):
    """The limits; ``None`` (or an empty text) switches one off."""

    report_only: bool = False
    """Whether foreign origins, too many connections, and messages that are too large or too many are only told, as an
    event and in the log. Timeouts, expired credentials and the end of the process hold all the same."""

    check_origin: Literal["with-credentials", "always", "never"] = "with-credentials"
    """When a handshake that a page of another site has made is 403: if it carries cookies or other credentials that a
    browser adds by itself, always, or never. A client that sends no ``Origin`` is no browser, and passes."""

    origins: tuple[str, ...] = ()
    """Origins whose pages may open websockets, such as ``https://app.example`` or ``https://*.shop.example``, beside
    the server's own and those that CORS allows; ``*`` for all."""

    max_connections_per_client: Count = 100
    """How many websockets one address may have open, in one process. Above: 429."""

    unknown_proxy_factor: int = Field(100, ge=1)
    """So many times more may a private peer have open that forwards requests while ``trusted_proxies`` is not set."""

    max_message_bytes: Count = 1_000_000
    """The largest message that is taken, text counted as UTF-8. Above: close code 1009."""

    messages: Rate = "6000/minute"
    """How many messages one websocket may send, as one limit or several; counted as a token bucket, so that a burst of
    all of them may come at once. Above: close code 1008."""

    bytes: Rate = None
    """How many bytes its messages may have together, such as ``1 MB/second``. Above: close code 1008."""

    idle_seconds: Seconds = None
    """A websocket on which no message came or went for this long is closed with 1001. Pings are not messages."""

    max_seconds: Seconds = None
    """A websocket that is open for this long is closed with 1001."""

    max_send_seconds: Seconds = 120.0
    """A client that for this long takes nothing of what is sent to it is closed with 1008, and its endpoint
    cancelled."""

    close_grace_seconds: Grace = 10.0
    """An endpoint that has not ended so long after its websocket was closed by one of these is cancelled."""

    @field_validator("origins")
    @classmethod
    def _are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(origin if origin == ANY else checked_origin(origin) for origin in origins)

    @field_validator("messages", "bytes")
    @classmethod
    def _is_a_rate(cls, rate: str | None) -> str | None:
        if rate is not None:
            parse_rate(rate)
        return rate


# What an override is measured by where there is no layer: nothing but what it names.
_OFF: dict[str, Any] = {
    "check_origin": "never",
    "max_connections_per_client": None,
    "max_message_bytes": None,
    "messages": None,
    "bytes": None,
    "idle_seconds": None,
    "max_seconds": None,
    "max_send_seconds": None,
}


# --- problems and events ----------------------------------------------------------------------------------------------


class ForeignOrigin(Problem):
    """A page of another site wants to open a websocket, perhaps in the name of somebody who is signed in here."""

    status = 403
    title = "Origin not allowed"


class TooManyWebSockets(Problem):
    """The client has as many websockets open as it may."""

    status = 429
    type = IANA + "quota-exceeded"
    title = "Quota exceeded"


@dataclass(frozen=True, slots=True)
class WebSocketClosed:
    """A websocket was closed by a limit, and not by its client or its endpoint.

    Attributes:
        code: The close code that was sent.
        reason: The reason that was sent, such as ``too many messages``.
        template: The path template of the route, or ``None`` where no route matches.
        request_id: The id that the client got with the handshake.
        client: The client's address, as far as it is believed.
        reported: Nothing was closed: the limit only reports. Told once a websocket and reason.
    """

    code: int
    reason: str
    template: str | None
    request_id: str
    client: str
    reported: bool = False


# --- engine -----------------------------------------------------------------------------------------------------------


class Closing(NamedTuple):
    """How a websocket is closed.

    Attributes:
        code: The close code (RFC 6455, section 7.4, and the registry of IANA).
        reason: What the client may read; at most 123 bytes.
    """

    code: int
    reason: str


TOO_LARGE = Closing(1009, "message too large")
TOO_MANY = Closing(1008, "too many messages")
TOO_MUCH = Closing(1008, "too many bytes")
NOT_READ = Closing(1008, "messages are not read")
IDLE = Closing(1001, "idle for too long")
TOO_LONG = Closing(1001, "open for too long")
EXPIRED = Closing(3000, "credentials have expired")
RESTART = Closing(1012, "service restart")


def size_of(message: Message) -> int:
    """How many bytes a message has on the wire, not compressed."""
    data: bytes | None = message.get("bytes")
    if data is not None:
        return len(data)
    text: str = message.get("text") or ""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _nobodys(_origin: bytes) -> bool:
    return False


class WebSocketPolicy:
    """The limits of one route, made once.

    Args:
        settings: The limits.
        overrides: The overrides that are among the limits.
        admits: Which origins may open websockets beside those of the limits.
    """

    def __init__(
        self,
        settings: WebSocketLimitsSettings,
        *,
        overrides: "tuple[WebSocketLimits, ...]" = (),
        admits: Callable[[bytes], bool] = _nobodys,
    ) -> None:
        self.settings = settings
        self.overrides = overrides
        self.messages = _buckets(settings.messages)
        self.bytes = _buckets(settings.bytes)
        # A limit that is declared on a route counts the websockets of that declaration.
        naming = [each for each in overrides if "max_connections_per_client" in each.changes]
        self.place: Hashable = naming[-1] if naming else None
        self._origins = OriginList(settings.origins)
        self._admits = admits

    def changed(self, overrides: "tuple[WebSocketLimits, ...]") -> "WebSocketPolicy":
        """This policy, as these overrides change it."""
        settings = _changed(self.settings, overrides)
        return WebSocketPolicy(
            settings if settings.enabled else settings.model_copy(update=_OFF), overrides=overrides, admits=self._admits
        )

    def admits(self, headers: RawHeaders) -> bool:
        """Whether a handshake with these header fields may be made by the page that makes it."""
        check = self.settings.check_origin
        origin = None if check == "never" else origin_of(headers)
        if origin is None or (check == "with-credentials" and not has_browser_credentials(headers)):
            return True
        return self._origins.admits(origin) or is_same_origin(origin, headers) or self._admits(origin)


def _buckets(rate: str | None) -> tuple[TokenBucket, ...]:
    return () if rate is None else tuple(TokenBucket(limit) for limit in parse_rate(rate))


class MessageMeter:
    """What the messages of one websocket have used of what they may.

    Args:
        policy: What they may.

    Example:
        >>> meter = MessageMeter(WebSocketPolicy(WebSocketLimitsSettings(messages="2/second", max_message_bytes=3)))
        >>> meter.take(3, now=0.0), meter.take(4, now=0.0).code
        (None, 1009)
        >>> meter.take(1, now=0.0), meter.take(1, now=0.0).reason
        (None, 'too many messages')
    """

    __slots__ = ("_bytes", "_limits_bytes", "_max_bytes", "_messages", "measures")

    def __init__(self, policy: WebSocketPolicy) -> None:
        self._max_bytes = policy.settings.max_message_bytes
        self._messages = _Spent(policy.messages)
        self._bytes = _Spent(policy.bytes)
        self._limits_bytes = bool(policy.bytes)
        self.measures = self._max_bytes is not None or self._limits_bytes

    def take(self, size: int, now: float) -> Closing | None:
        """Counts a message; what it goes beyond."""
        if self._max_bytes is not None and size > self._max_bytes:
            return TOO_LARGE
        if not self._messages.spend(1, now):
            return TOO_MANY
        return None if not self._limits_bytes or self._bytes.spend(size, now) else TOO_MUCH


class _Spent:
    """Several token buckets of one websocket; all of them allow it, or nothing is spent."""

    __slots__ = ("_buckets", "_states")

    def __init__(self, buckets: tuple[TokenBucket, ...]) -> None:
        self._buckets = buckets
        self._states: list[float | None] = [None] * len(buckets)

    def spend(self, units: int, now: float) -> bool:
        if len(self._buckets) == 1:
            # What most limits are: one.
            decision, state = self._buckets[0].decide(self._states[0], now, units)
            if decision.allowed:
                self._states[0] = state
            return decision.allowed
        decisions = [
            bucket.decide(state, now, units) for bucket, state in zip(self._buckets, self._states, strict=True)
        ]
        if all(decision.allowed for decision, _ in decisions):
            self._states = [state for _, state in decisions]
            return True
        return False


class Watch:
    """How long a websocket may go on, and what ends it first. Knows no timer: it is told the time.

    Attributes:
        leaving: The application closes by itself; only a client that does not take the close still matters.

    Args:
        settings: The limits.
        now: When it was opened, in monotonic seconds.
    """

    __slots__ = ("_last", "_opened", "_sending", "_settings", "_taken", "leaving")

    def __init__(self, settings: WebSocketLimitsSettings, now: float) -> None:
        self._settings = settings
        self._opened = self._last = self._taken = now
        self._sending = 0
        self.leaving = False

    def limit(self, settings: WebSocketLimitsSettings) -> None:
        """Goes on with these limits."""
        self._settings = settings

    def received(self, now: float) -> None:
        """A message came."""
        self._last = now

    def sends(self, now: float) -> None:
        """A message waits for the client to take it."""
        if not self._sending:
            self._taken = now
        self._sending += 1

    def sent(self, now: float) -> None:
        """A message was taken, or given up."""
        self._sending -= 1
        self._taken = self._last = now

    def next(
        self, now: float, *, expires_seconds: float | None = None, stops_seconds: float | None = None
    ) -> tuple[float, Closing] | None:
        """What ends the websocket next and in how many seconds, if nothing happens; ``None`` for never.

        Args:
            now: The time, in monotonic seconds.
            expires_seconds: In how many seconds the caller's credentials expire.
            stops_seconds: In how many seconds the server stops.
        """
        settings, ends = self._settings, []
        if settings.max_send_seconds is not None:
            since = self._taken if self._sending else now
            # While nothing waits this is only when to look again.
            ends.append((since + settings.max_send_seconds - now, NOT_READ))
        if not self.leaving:
            if settings.idle_seconds is not None:
                ends.append((self._last + settings.idle_seconds - now, IDLE))
            if settings.max_seconds is not None:
                ends.append((self._opened + settings.max_seconds - now, TOO_LONG))
            if expires_seconds is not None:
                ends.append((expires_seconds, EXPIRED))
            if stops_seconds is not None:
                ends.append((stops_seconds, RESTART))
        return min(ends, default=None)


# --- layer ------------------------------------------------------------------------------------------------------------


class WebSocketLimitsMiddleware:
    """Refuses handshakes that a page should not make or that are one too many, and closes what goes beyond a limit.

    Args:
        app: The application inside.
        settings: The limits.
        admits: Which origins may open websockets beside those of the settings, such as those that CORS allows.
        lifecycle: Says when the process ends, and calls when that is known.
        clock: Where the time comes from.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: WebSocketLimitsSettings | None = None,
        *,
        admits: Callable[[bytes], bool] = _nobodys,
        lifecycle: Lifecycle | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.app = app
        self._settings = settings or WebSocketLimitsSettings()
        self._admits = admits
        self._lifecycle = lifecycle
        self._clock = clock or SystemClock()
        self._counts: dict[Hashable, int] = {}
        self._connections: set[_Connection] = set()
        # As many as the application has routes; bounded for those that add routes all the time.
        self._policy_of = lru_cache(maxsize=10_000)(self._make_policy)
        if lifecycle is not None:
            lifecycle.on_drain.append(self._look_at_all)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        if scope["type"] != "websocket":
            await self.app(scope, receive, send)
            return
        context = request_context.ensure(scope)
        policy = self._policy_of(context.route or route_of(scope))
        mark_handled(scope, policy.overrides)
        if not policy.settings.enabled:
            await self.app(scope, receive, send)
            return
        place = (policy.place, context.client.key)
        problem = self._refusal(policy, place, scope, context)
        if problem is not None:
            if not policy.settings.report_only:
                await refuse(problem, scope, receive, send, layer=LAYER)
                return
            tell(problem, context, LAYER + " (report only)")
        connection = _Connection(
            policy,
            context,
            receive,
            send,
            clock=self._clock,
            lifecycle=self._lifecycle,
            task=asyncio.current_task(),
        )
        self._counts[place] = self._counts.get(place, 0) + 1
        self._connections.add(connection)
        try:
            try:
                await self.app(scope, connection.receive, connection.send)
            except (Exception, asyncio.CancelledError) as exception:
                # An end that is ours is none that the server has to hear of.
                if not connection.has_caused(exception):
                    if isinstance(exception, Exception):
                        await connection.finish()
                    raise
            await connection.finish()
        finally:
            connection.end()
            self._connections.discard(connection)
            self._leave(place)

    def _leave(self, place: Hashable) -> None:
        self._counts[place] -= 1
        if not self._counts[place]:
            del self._counts[place]

    def _refusal(
        self, policy: WebSocketPolicy, place: Hashable, scope: Scope, context: RequestContext
    ) -> Problem | None:
        if not policy.admits(scope["headers"]):
            return _foreign()
        most = policy.settings.max_connections_per_client
        if most is None:
            return None
        most *= policy.settings.unknown_proxy_factor if context.client.behind_unknown_proxy else 1
        return _too_many(most) if self._counts.get(place, 0) >= most else None

    def _make_policy(self, entry: RouteEntry) -> WebSocketPolicy:
        overrides: tuple[Any, ...] = entry.of(WebSocketLimits)
        return WebSocketPolicy(_changed(self._settings, overrides), overrides=overrides, admits=self._admits)

    def _look_at_all(self) -> None:
        for connection in tuple(self._connections):
            # Called out of a signal handler, where nothing else may be done to a loop; one that is closed has no more.
            with contextlib.suppress(RuntimeError):
                connection.loop.call_soon_threadsafe(connection.look)


def _changed(settings: WebSocketLimitsSettings, overrides: "tuple[WebSocketLimits, ...]") -> WebSocketLimitsSettings:
    changes = {name: value for override in overrides for name, value in override.changes.items()}
    return WebSocketLimitsSettings.model_validate(dict(settings) | changes) if changes else settings


def _foreign() -> Problem:
    return ForeignOrigin("Pages of this origin may not open this websocket.")


def _too_many(most: int) -> Problem:
    detail = f"You may have {most} websockets open at the same time."
    return TooManyWebSockets(detail, headers=retry_after(5), extensions={"violated-policies": ["websockets"]})


class _Closed(OSError):  # noqa: N818 - named as problems are, by what happened
    """What a server raises where an application sends on a websocket that is closed (ASGI, version 2.4)."""


# Nothing is waited for longer than this before it is looked at again.
_LONGEST_SECONDS = 3600.0
# How long a client is given to take a close, once its endpoint has ended; servers wait as long for its answer.
_CLOSE_SECONDS = 10.0


class _Connection:
    """One websocket: what it receives is measured, what it sends is watched, and it is closed when its time is up.

    A timer that rings while the application waits in ``receive`` wakes it there: the task that waits is cancelled, and
    the cancellation is turned into a message, as ``asyncio.timeout`` turns its own into an error.
    """

    __slots__ = (
        "_cancelling",
        "_clock",
        "_context",
        "_given_up",
        "_lifecycle",
        "_meter",
        "_policy",
        "_receive",
        "_reported",
        "_saying",
        "_send",
        "_settings",
        "_task",
        "_timer",
        "_waiting",
        "_watch",
        "_woken",
        "closing",
        "loop",
    )

    def __init__(
        self,
        policy: WebSocketPolicy,
        context: RequestContext,
        receive: Receive,
        send: Send,
        *,
        clock: Clock,
        lifecycle: Lifecycle | None = None,
        task: asyncio.Task[Any] | None = None,
    ) -> None:
        self.closing: Closing | None = None
        self.loop = asyncio.get_running_loop()
        self._policy = policy
        self._settings = policy.settings
        self._meter = MessageMeter(policy)
        self._watch: Watch | None = None
        self._context = context
        self._receive = receive
        self._send = send
        self._clock = clock
        self._lifecycle = lifecycle
        self._reported: set[Closing] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._saying: asyncio.Task[None] | None = None
        # Which task waits in `receive`, and whether it was woken; which one runs the application, and has been ended.
        self._waiting: asyncio.Task[Any] | None = None
        self._woken = False
        self._task = task
        self._cancelling = 0 if task is None else task.cancelling()
        self._given_up = False
        context.state[_Connection] = self

    async def receive(self) -> Message:
        """The next message, or the end that a limit has made."""
        over = self._over()
        if over is not None:
            return over
        task: Any = asyncio.current_task()
        self._waiting, cancelling = task, task.cancelling()
        message: Message = {}
        try:
            message = await self._receive()
        except asyncio.CancelledError:
            if not self._woken or task.uncancel() > cancelling:
                raise
        else:
            if self._woken:
                # It had its message already, or does not let itself be woken.
                task.uncancel()
        finally:
            self._waiting = None
        if self.closing is None:
            kind = message["type"]
            if kind == "websocket.receive":
                self._measure(message)
            elif kind == "websocket.disconnect":
                self.end()
        return self._over() or message

    async def send(self, message: Message) -> None:
        """Sends on, unless a limit has closed the websocket."""
        if self.closing is not None:
            raise _Closed(f"the websocket was closed: {self.closing.reason}")
        watch = self._watch
        if watch is None:
            await self._send(message)
            if message["type"] == "websocket.accept":
                self._watch = Watch(self._settings, self._clock.monotonic())
                self.look()
            return
        watch.sends(self._clock.monotonic())
        if message["type"] == "websocket.close":
            watch.leaving = True
        try:
            await self._send(message)
        finally:
            watch.sent(self._clock.monotonic())
        if watch.leaving:
            self.end()

    def change(self, overrides: "tuple[WebSocketLimits, ...]") -> WebSocketPolicy:
        """Goes on with the limits of overrides that were learnt of late."""
        policy = self._policy = self._policy.changed(overrides)
        self._settings = policy.settings
        self._meter = MessageMeter(policy)
        if self._watch is not None:
            self._watch.limit(policy.settings)
            self.look()
        return policy

    def look(self) -> None:
        """Closes the websocket if its time is up, else sets the timer to when that will be."""
        self._stop_timer()
        if self._watch is None or self.closing is not None:
            return
        now, lifecycle = self._clock.monotonic(), self._lifecycle
        expires_at = getattr(self._context.principal, "expires_at", None)
        end = self._watch.next(
            now,
            expires_seconds=None if expires_at is None else expires_at - self._clock.time(),
            stops_seconds=lifecycle.stops_at - now if lifecycle is not None and lifecycle.draining else None,
        )
        if end is None:
            return
        seconds, closing = end
        if seconds > 0:
            self._timer = self.loop.call_later(min(seconds, _LONGEST_SECONDS), self.look)
        else:
            self._close(closing)

    def has_caused(self, exception: BaseException) -> bool:
        """Whether an endpoint was cancelled by us, or ended with nothing but the news that its websocket was closed."""
        if self.closing is None:
            return False
        if isinstance(exception, asyncio.CancelledError):
            # As in asyncio.timeout: only our own cancellation ends here.
            return self._given_up and self._task is not None and self._task.uncancel() <= self._cancelling
        if isinstance(exception, ExceptionGroup):
            return exception.split((WebSocketDisconnect, _Closed))[1] is None
        return isinstance(exception, (WebSocketDisconnect, _Closed))

    async def finish(self) -> None:
        """Waits until the close is on its way, and ends."""
        self._stop_timer()
        if self._saying is not None:
            await asyncio.wait({self._saying}, timeout=_CLOSE_SECONDS)
        self.end()

    def end(self) -> None:
        """Ends with the websocket: nothing more is watched."""
        self._watch = None
        self._stop_timer()
        if self._saying is not None:
            self._saying.cancel()

    def _measure(self, message: Message) -> None:
        """Closes the websocket for what goes beyond a limit, or only tells where the limits only report."""
        now = self._clock.monotonic()
        if self._watch is not None:
            self._watch.received(now)
        closing = self._meter.take(size_of(message) if self._meter.measures else 0, now)
        if closing is None:
            return
        if not self._settings.report_only:
            self._close(closing)
        elif closing not in self._reported:
            self._reported.add(closing)
            self._tell(closing, reported=True)

    def _close(self, closing: Closing) -> None:
        self.closing = closing
        self._stop_timer()
        self._tell(closing)
        self._saying = self.loop.create_task(self._say(closing))
        if self._waiting is not None:
            self._woken = True
            self._waiting.cancel()
        # Who waits for a client that does not read will wait for ever.
        grace = 0.0 if closing is NOT_READ else self._settings.close_grace_seconds
        if grace is not None:
            self._timer = self.loop.call_later(grace, self._give_up)

    async def _say(self, closing: Closing) -> None:
        # The client, or the server, may have closed it meanwhile.
        with contextlib.suppress(OSError, RuntimeError):
            await self._send({"type": "websocket.close", "code": closing.code, "reason": closing.reason})

    def _give_up(self) -> None:
        self._timer = None
        if self._task is not None:
            self._given_up = True
            logger.warning(
                "cancelled the endpoint of a websocket that had been closed (request id %s)", self._context.request_id
            )
            self._task.cancel()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tell(self, closing: Closing, *, reported: bool = False) -> None:
        context = self._context
        event = WebSocketClosed(
            closing.code,
            closing.reason,
            None if context.route is None else context.route.template,
            context.request_id,
            context.client.address,
            reported,
        )
        logger.info(
            "%s a websocket to %s from %s with %d: %s (request id %s)",
            "reported, not closed," if reported else "closed",
            event.template or "an unknown path",
            event.client,
            event.code,
            event.reason,
            event.request_id,
        )
        if context.events is not None:
            context.events.emit(event)

    def _over(self) -> Message | None:
        """What the application is told once the websocket is closed by a limit."""
        if self.closing is None:
            return None
        return {"type": "websocket.disconnect", "code": self.closing.code, "reason": self.closing.reason}


# --- override ---------------------------------------------------------------------------------------------------------


class WebSocketLimits(Override):
    """Changes single limits on a route, a router or an application; every level holds, limit by limit the innermost.

    Without the layer (an application that was never hardened) it enforces what it names, after routing; but it cannot
    count connections then, nor cancel an endpoint.

    Args:
        **changes: Fields of :class:`WebSocketLimitsSettings`; ``None`` switches a limit off.

    Raises:
        ValueError: A field is unknown, or its value is not one that it can have.

    Example:
        >>> chat = WebSocketLimits(messages="5/second; 100/minute", max_message_bytes=2_000, idle_seconds=600)
        >>> upload = WebSocketLimits(max_message_bytes=10_000_000, messages=None, bytes="1 MB/second")
        >>> widget = WebSocketLimits(origins=("https://*.partner.example",))
    """

    every_level_holds: ClassVar[bool] = True
    may_refuse: ClassVar[bool] = False  # nothing answers in place of a websocket

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        checked = WebSocketLimitsSettings(**changes)
        self.changes = {name: getattr(checked, name) for name in checked.model_fields_set}

    async def after_routing(self, connection: HTTPConnection) -> None:
        """Acts where the layer has not seen the route of a websocket; nothing of this is about HTTP."""
        if connection.scope["type"] == "websocket":
            await super().after_routing(connection)

    async def act_late(self, connection: HTTPConnection) -> None:
        """Enforces what the levels of a route name, on a websocket whose layer has not seen them; once."""
        scope = connection.scope
        levels: tuple[Any, ...] = overrides_of(dependant_of(scope)).get(WebSocketLimits, (self,))
        if levels[-1] is not self:
            return
        context = request_context.ensure(scope)
        current: _Connection | None = context.state.get(_Connection)
        policy = _alone(levels) if current is None else current.change(levels)
        if not policy.admits(scope["headers"]):
            problem = _foreign()
            tell(problem, context, LAYER + (" (report only)" if policy.settings.report_only else ""))
            if not policy.settings.report_only:
                raise problem
        if current is None and policy.settings.enabled:
            self._watch_late(policy, context, connection)

    @staticmethod
    def _watch_late(policy: WebSocketPolicy, context: RequestContext, connection: Any) -> None:
        """Puts the limits into the websocket object, which is the one that the endpoint gets."""
        watched = _Connection(policy, context, connection._receive, connection._send, clock=SystemClock())  # noqa: SLF001
        connection._receive, connection._send = watched.receive, watched.send  # noqa: SLF001
        connection.scope["fastapi_inner_astack"].push_async_callback(watched.finish)


def _alone(levels: tuple[Any, ...]) -> WebSocketPolicy:
    """The limits where there is no layer: what the levels name. Origins that are named are meant to be checked."""
    off = dict(_OFF)
    if any("origins" in level.changes for level in levels):
        del off["check_origin"]
    return WebSocketPolicy(WebSocketLimitsSettings(**off)).changed(levels)
