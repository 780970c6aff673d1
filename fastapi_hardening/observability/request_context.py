"""Gives every request an id, and everything that answers or logs it the same one.

It protects from answers that nobody can find in the logs: the id is on every answer, the 500 page and the 404 included,
in every problem document and every record that the suite logs. It is *not* a trace: one request that calls three
services has one trace id and may have four request ids; ``traceparent`` is kept for tracing.

It sits outermost, right below the probes, because whatever answers further in needs it. An incoming ``X-Request-ID`` is
kept only if it is well-formed: 1 to 128 letters, digits, ``.``, ``_`` or ``-``, once. Anything else could forge log
lines.

Example:
    >>> from fastapi import FastAPI
    >>> from fastapi_hardening.observability.request_context import RequestContextMiddleware, RequestId
    >>> app = FastAPI()
    >>> app.add_middleware(RequestContextMiddleware)
    >>> @app.get("/")
    ... async def index(request_id: RequestId) -> str:
    ...     return request_id
"""

import string
from typing import Annotated, Literal

from fastapi import Depends
from pydantic import field_validator
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_hardening.core import context as request_context
from fastapi_hardening.core.client_ip import ClientAddressResolver, peer_of
from fastapi_hardening.core.clock import Clock, SystemClock
from fastapi_hardening.core.configuration import ConcernSettings
from fastapi_hardening.core.context import SCOPE_KEY, RequestContext, new_request_id
from fastapi_hardening.core.events import Events
from fastapi_hardening.core.features import Features
from fastapi_hardening.core.headers import field, get_all, replace
from fastapi_hardening.core.routes import route_of

# What starts an answer, on HTTP and on websockets.
_STARTS = frozenset({"http.response.start", "websocket.accept", "websocket.http.response.start"})
_ALLOWED = (string.ascii_letters + string.digits + "._-").encode("ascii")
_MAX_LENGTH = 128


class RequestIdSettings(ConcernSettings):
    """The settings of the request id."""

    header: str = "X-Request-ID"
    """The header field that carries the id, in requests and answers."""

    trust_incoming: bool = True
    """Whether a well-formed id that the client sent is kept. Switch it off where clients must not choose their id."""

    @field_validator("header")
    @classmethod
    def _is_a_name(cls, name: str) -> str:
        field(name, "x")
        return name


def well_formed(request_id: bytes) -> bool:
    """Whether an id may go into logs and answers: 1 to 128 letters, digits, ``.``, ``_``, ``-``."""
    return 0 < len(request_id) <= _MAX_LENGTH and not request_id.translate(None, _ALLOWED)


class ContextMaker:
    """Makes the context of a request by one pass over its header fields.

    Args:
        settings: The request id's settings.
        client_addresses: Finds the client's address; by default the socket's peer is the client.
        error_format: The format of error answers, for every layer further in.
        events: The event bus that layers further in tell their facts.
        clock: Where the time comes from.
        hardened: Set by ``harden()``: the whole stack follows, so one inside steps aside.
        features: Which features of the application are on.
    """

    def __init__(
        self,
        settings: RequestIdSettings,
        *,
        client_addresses: ClientAddressResolver | None = None,
        error_format: Literal["problem", "fastapi"] = "problem",
        events: Events | None = None,
        clock: Clock | None = None,
        hardened: bool = False,
        features: Features | None = None,
    ) -> None:
        self.header = settings.header.lower().encode("ascii")
        self._trust = settings.trust_incoming
        self._addresses = client_addresses or ClientAddressResolver()
        self._error_format: Literal["problem", "fastapi"] = error_format
        self._events = events
        self._now = (clock or SystemClock()).monotonic
        self._hardened = hardened
        self._features = features

    def make(self, scope: Scope) -> RequestContext:
        """The context of one connection; it is not yet put into the scope."""
        addresses, headers = self._addresses, scope["headers"]
        fields = dict(headers)
        forwarded = get_all(headers, addresses.header) if addresses.header in fields else ()
        incoming = fields.get(self.header)
        unique = len(fields) == len(headers)
        if incoming is not None and not unique and len(get_all(headers, self.header)) > 1:
            # It would be left to the client which of them is logged.
            incoming = None
        peer = peer_of(scope.get("client"), scope.get("server"))
        kept = incoming.decode("ascii") if incoming and self._trust and well_formed(incoming) else None
        secure = scope.get("scheme") in ("https", "wss")
        if not secure and fields.get(b"x-forwarded-proto") == b"https":
            secure = addresses.trusts(peer)
        context = RequestContext(
            kept or new_request_id(),
            addresses.resolve(peer, forwarded),
            self._now(),
            secure=secure,
            traceparent=fields.get(b"traceparent"),
            error_format=self._error_format,
            events=self._events,
            hardened=self._hardened,
            features=self._features,
        )
        if unique:
            context.fields = fields
        return context


class RequestContextMiddleware:
    """Makes the context of each request, and puts its id on every answer.

    Args:
        app: The application inside.
        settings: The request id's settings.
        maker: Makes the contexts; by default one with these settings and no collaborators.
    """

    def __init__(
        self, app: ASGIApp, settings: RequestIdSettings | None = None, *, maker: ContextMaker | None = None
    ) -> None:
        settings = settings or RequestIdSettings()
        self.app = app
        self._maker = maker or ContextMaker(settings)
        self._answers_with_id = settings.enabled

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        if scope["type"] not in ("http", "websocket") or SCOPE_KEY in scope:
            await self.app(scope, receive, send)
            return
        context = scope[SCOPE_KEY] = self._maker.make(scope)
        route_of(scope)
        header, value = self._maker.header, context.request_id.encode("ascii")

        async def send_with_id(message: Message) -> None:
            if message["type"] in _STARTS:
                headers = message["headers"] = list(message.get("headers") or ())
                replace(headers, header, value)
            await send(message)

        token = request_context.enter(context)
        try:
            await self.app(scope, receive, send_with_id if self._answers_with_id else send)
        finally:
            request_context.leave(token)


def request_id_of(connection: HTTPConnection) -> str:
    """The id of this request; made now where no layer of ours is around."""
    return request_context.ensure(connection.scope).request_id


def context_of(connection: HTTPConnection) -> RequestContext:
    """The context of this request; made now where no layer of ours is around."""
    return request_context.ensure(connection.scope)


RequestId = Annotated[str, Depends(request_id_of)]
"""The request's id as a parameter: ``async def endpoint(request_id: RequestId)``."""

CurrentRequest = Annotated[RequestContext, Depends(context_of)]
"""What is known of the request, as a parameter: ``async def endpoint(current: CurrentRequest)``, its client's address,
say, as ``current.client.address``."""
