"""Lets a process end without losing a request: what is being served is finished, and clients are sent elsewhere.

It protects from the errors of every deployment: the load balancer that still sends requests to a closed port, the
keep-alive connection that is cut under a request. It is *not* load shedding: it looks at nothing but the end of the
process.

On SIGTERM (:mod:`fastapi_hardening.core.lifecycle`) readiness fails at once; the server is told only after a delay.
From then on every answer carries ``Connection: close``; past the deadline new requests get 503. It sits first among
the layers that refuse, because nothing is cheaper.

Example:
    >>> from fastapi import FastAPI
    >>> from fastapi_hardening.core.lifecycle import Lifecycle
    >>> from fastapi_hardening.resilience.drain import DrainMiddleware
    >>> app = FastAPI()
    >>> lifecycle = Lifecycle(drain_deadline_seconds=30)
    >>> app.add_middleware(DrainMiddleware, lifecycle=lifecycle)
"""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_hardening.core.headers import replace
from fastapi_hardening.core.lifecycle import Lifecycle
from fastapi_hardening.core.problem import IANA, Problem, refuse, retry_after


class Draining(Problem):
    """The process is about to end and takes no new requests; another one will."""

    status = 503
    type = IANA + "temporary-reduced-capacity"
    title = "Temporarily reduced capacity"


class DrainMiddleware:
    """Asks clients to come back on a new connection while the process drains, and refuses them past the deadline.

    Args:
        app: The application inside.
        lifecycle: Says whether the process drains, and since when.
        retry_after_seconds: When a refused client is asked to come back; up to twice as long at random.
    """

    def __init__(self, app: ASGIApp, *, lifecycle: Lifecycle, retry_after_seconds: float = 2.0) -> None:
        self.app = app
        self._lifecycle = lifecycle
        self._retry_after = retry_after_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return

        # HTTP/2 has no such field; its server says GOAWAY.
        closes = scope.get("http_version", "1.1").startswith("1")

        async def send_and_close(message: Message) -> None:
            # Asked here and not on the way in: what was under way when the signal came ends its connection, too.
            if self._lifecycle.draining and message["type"] == "http.response.start" and closes:
                headers = message["headers"] = list(message.get("headers") or ())
                replace(headers, b"connection", b"close")
            await send(message)

        if self._lifecycle.past_deadline:
            problem = Draining("This server is about to stop.", headers=retry_after(self._retry_after))
            await refuse(problem, scope, receive, send_and_close, layer="drain")
        else:
            await self.app(scope, receive, send_and_close)
