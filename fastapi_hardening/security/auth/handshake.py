"""What browsers need to authenticate a websocket, and what becomes of an open one when its credentials end.

A page cannot put ``Authorization`` on a handshake. It can offer subprotocols, so a token may come as the one after
``bearer`` (``new WebSocket(url, ["bearer", token])``), or in the query as a ticket. Both are taken out of the scope
before the application and the access log see them, and the token is never the subprotocol that is agreed on.

Example:
    >>> scope = {"type": "websocket", "headers": [], "subprotocols": ["bearer", "abc.def.ghi", "chat"]}
    >>> take_credentials(scope).connection_scope["headers"], scope["subprotocols"]
    ([(b'authorization', b'Bearer abc.def.ghi')], ['bearer', 'chat'])
"""

import asyncio
from collections.abc import Collection
from typing import NamedTuple
from urllib.parse import unquote_plus

from starlette.types import Message, Scope, Send

from fastapi_hardening.core.clock import Clock

BEARER = "bearer"
_PROTOCOL = b"sec-websocket-protocol"

CREDENTIALS_ENDED = 4001
"""How an open websocket is closed when its credentials end. Of the codes that applications may give a meaning
(RFC 6455, section 7.4.2), so that a page can tell "log in again" from 1008, which says only that it may not."""

# A timer that waits longer overflows in some event loops, and a clock may be set.
_LONGEST_WAIT = 3600.0


class Handshake(NamedTuple):
    """A handshake with its credentials taken out.

    Attributes:
        connection_scope: What the authenticators see: everything, and a token of the subprotocols as a field.
        offered_token: A token came as a subprotocol, so that one must be agreed on that is none.
        ambiguous: There was a token in the fields, too.
    """

    connection_scope: Scope
    offered_token: bool
    ambiguous: bool = False


def take_credentials(scope: Scope, query_parameters: Collection[str] = ()) -> Handshake:
    """Takes a token out of the subprotocols and tickets out of the query, in place.

    Args:
        scope: The scope of a websocket.
        query_parameters: The parameters of the query that are credentials.
    """
    whole: Scope = scope
    ambiguous = False
    protocols = [protocol.lower() for protocol in scope.get("subprotocols") or ()]
    place = protocols.index(BEARER) + 1 if BEARER in protocols else 0
    offered = 0 < place < len(protocols)
    query = scope.get("query_string", b"")
    taken = query_parameters and query and _is_credential_in(query, query_parameters)
    if offered or taken:
        whole = dict(scope)
    if offered:
        given: list[str] = list(scope["subprotocols"])
        token = given.pop(place)
        without = [pair for pair in scope["headers"] if pair[0] != _PROTOCOL]
        ambiguous = any(name == b"authorization" for name, _ in without)
        whole["headers"] = [*without, (b"authorization", b"Bearer " + token.encode("latin-1", "replace"))]
        scope["subprotocols"] = given
        scope["headers"] = [*without, (_PROTOCOL, ", ".join(given).encode("latin-1", "replace"))]
    if taken:
        scope["query_string"] = b"&".join(
            pair for pair in query.split(b"&") if not _is_credential(pair, query_parameters)
        )
    return Handshake(whole, offered, ambiguous)


def _is_credential_in(query: bytes, names: Collection[str]) -> bool:
    return any(_is_credential(pair, names) for pair in query.split(b"&"))


def _is_credential(pair: bytes, names: Collection[str]) -> bool:
    return unquote_plus(pair.partition(b"=")[0].decode("latin-1")) in names


def agreeing(send: Send, offered: Collection[str]) -> Send:
    """A ``send`` that agrees on ``bearer`` where the application names no subprotocol that was offered.

    A browser that offered some gives up a connection that agrees on none.
    """

    async def send_agreed(message: Message) -> None:
        if message["type"] == "websocket.accept" and message.get("subprotocol") not in offered:
            message = {**message, "subprotocol": BEARER}
        await send(message)

    return send_agreed


class Expiry:
    """Closes an open websocket when the credentials of its caller end.

    Args:
        send: The send channel of the connection.
        expires_at: When they end, in seconds since the epoch.
        clock: Where the time comes from.
    """

    def __init__(self, send: Send, expires_at: float, clock: Clock) -> None:
        self._send = send
        self._expires_at = expires_at
        self._clock = clock
        self._timer: asyncio.TimerHandle | None = None
        self._closing: asyncio.Task[None] | None = None
        self._over = False

    async def send(self, message: Message) -> None:
        """Passes a message on, and takes note of the acceptance and of the end.

        Raises:
            OSError: The websocket was closed because the credentials ended; as when a client is gone (ASGI 2.4).
        """
        if self._closing is not None:
            raise OSError("the credentials of the caller have ended, and the websocket with them")
        kind = message["type"]
        if kind == "websocket.close":
            self.stop()
        await self._send(message)
        if kind == "websocket.accept" and not self._over:
            self._wait()

    def stop(self) -> None:
        """Waits no longer."""
        self._over = True
        if self._timer is not None:
            self._timer.cancel()

    async def finish(self) -> None:
        """Waits no longer, and lets a close that is on its way go out."""
        self.stop()
        if self._closing is not None:
            await asyncio.gather(self._closing, return_exceptions=True)

    def _wait(self) -> None:
        left = self._expires_at - self._clock.time()
        if left > 0:
            self._timer = asyncio.get_running_loop().call_later(min(left, _LONGEST_WAIT), self._wait)
        elif not self._over:
            close = {"type": "websocket.close", "code": CREDENTIALS_ENDED, "reason": "The credentials have ended."}
            self._closing = asyncio.ensure_future(self._close(close))

    async def _close(self, message: Message) -> None:
        await self._send(message)
