"""What is known about the request that is being served: one mutable object, made once, seen by every answer.

The outermost of our layers makes it; every other layer, dependency and log record finds it, in the scope or, where
there is no scope at hand, in a context variable. It is not a bag for the application: use ``request.state`` for that.
"""

import os
import time
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING, Any, Literal

from starlette.types import Scope

from fastapi_hardening.core.client_ip import ClientAddress, ClientAddressResolver, peer_of
from fastapi_hardening.core.events import Events

if TYPE_CHECKING:
    from fastapi_hardening.core.features import Features
    from fastapi_hardening.core.routes import RouteEntry

SCOPE_KEY = "fastapi_hardening.context"

_current: ContextVar["RequestContext | None"] = ContextVar("fastapi_hardening.context", default=None)
_direct_peers = ClientAddressResolver()


class RequestContext:
    """The facts of one request or websocket.

    Attributes:
        request_id: The id that every answer and log record carries.
        client: Where the request comes from, as far as it is believed.
        secure: The client speaks TLS, to this server or to a trusted proxy in front of it.
        started: When the request arrived, on the monotonic clock, in seconds.
        route: The route that the request will reach, with its overrides; ``None`` until a layer has looked it up.
        path: The path for which the route was looked up; a middleware of the application may change the request's.
        deadline: When the time for an answer is up, on the monotonic clock, in seconds; ``None`` without a limit.
        traceparent: The W3C ``traceparent`` as it came in, not validated; ``None`` without one.
        principal: Who the caller is, once authentication has said so.
        tenant: Whose data it is about, once tenancy has said so.
        version: Which version of the API it gets, once that is known.
        fields: The request's header fields by name; ``None`` where a name stands twice, or nobody has looked yet.
        error_format: ``problem`` (RFC 9457) or ``fastapi`` (``{"detail": ...}``).
        events: The event bus of the hardened application, or ``None`` outside one.
        features: Which features of it are on, or ``None`` outside one.
        unique: The answer holds something that is for this request alone, such as a nonce, so nobody may keep it.
        hardened: The stack of a ``harden()`` call is around; a second one inside it steps aside.
        state: What single concerns keep for this request, each under its own class.
    """

    __slots__ = (
        "client",
        "deadline",
        "error_format",
        "events",
        "features",
        "fields",
        "hardened",
        "path",
        "principal",
        "request_id",
        "route",
        "secure",
        "started",
        "state",
        "tenant",
        "traceparent",
        "unique",
        "version",
    )

    def __init__(
        self,
        request_id: str,
        client: ClientAddress,
        started: float,
        *,
        secure: bool = False,
        traceparent: bytes | None = None,
        error_format: Literal["problem", "fastapi"] = "problem",
        events: Events | None = None,
        hardened: bool = False,
        features: "Features | None" = None,
    ) -> None:
        self.request_id = request_id
        self.client = client
        self.started = started
        self.secure = secure
        self.traceparent = traceparent
        self.error_format: Literal["problem", "fastapi"] = error_format
        self.events = events
        self.hardened = hardened
        self.features = features
        self.route: RouteEntry | None = None
        self.path: str | None = None
        self.deadline: float | None = None
        self.fields: dict[bytes, bytes] | None = None
        self.principal: Any = None
        self.tenant: str | None = None
        self.version: str | None = None
        self.unique = False
        self.state: dict[type, Any] = {}


_ids: list[str] = []
_IDS_AT_ONCE = 256
# After a fork both processes would give out the same ones.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_ids.clear)


def new_request_id() -> str:
    """A fresh id: 128 random bits as 32 hexadecimal digits, which is also a valid W3C trace id."""
    try:
        return _ids.pop()
    except IndexError:
        # Asking the kernel takes longer than all the rest; so it is asked for many at once.
        digits = os.urandom(16 * _IDS_AT_ONCE).hex()
        _ids.extend([digits[start : start + 32] for start in range(32, len(digits), 32)])
        return digits[:32]


def of(scope: Scope) -> RequestContext | None:
    """The context of this scope, or ``None`` where no layer of ours is around."""
    context: RequestContext | None = scope.get(SCOPE_KEY)
    return context


def ensure(scope: Scope) -> RequestContext:
    """The context of this scope, made with defaults where none of our outer layers has made it."""
    context: RequestContext | None = scope.get(SCOPE_KEY)
    if context is None:
        client = _direct_peers.resolve(peer_of(scope.get("client"), scope.get("server")))
        secure = scope.get("scheme") in ("https", "wss")
        context = scope[SCOPE_KEY] = RequestContext(new_request_id(), client, time.monotonic(), secure=secure)
    return context


def current() -> RequestContext | None:
    """The context of the request that this task works for, or ``None`` outside a request."""
    return _current.get()


def enter(context: RequestContext) -> Token["RequestContext | None"]:
    """Makes a context the current one; hand the token to :func:`leave`."""
    return _current.set(context)


def leave(token: Token["RequestContext | None"]) -> None:
    """Ends what :func:`enter` began."""
    _current.reset(token)
