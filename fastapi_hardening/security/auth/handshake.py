"""What browsers need to authenticate a websocket.

A page cannot put ``Authorization`` on a handshake. It can offer subprotocols, so a token may come as the one after
``bearer`` (``new WebSocket(url, ["bearer", token])``), or in the query as a ticket. Both are taken out of the scope
before the application and the access log see them, and the token is never the subprotocol that is agreed on.

Example:
    >>> scope = {"type": "websocket", "headers": [], "subprotocols": ["bearer", "abc.def.ghi", "chat"]}
    >>> take_credentials(scope).connection_scope["headers"], scope["subprotocols"]
    ([(b'authorization', b'Bearer abc.def.ghi')], ['bearer', 'chat'])
"""

from collections.abc import Collection
from typing import NamedTuple
from urllib.parse import unquote_plus

from starlette.types import Message, Scope, Send

BEARER = "bearer"
_PROTOCOL = b"sec-websocket-protocol"


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
