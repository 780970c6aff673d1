"""The layer that finds the version of every request, and tells of versions that will end.

Example:
    >>> from fastapi import FastAPI
    >>> from fastapi_hardening.api.versioning import CurrentVersion, Version, VersioningMiddleware, VersioningSettings
    >>> app = FastAPI()
    >>> app.add_middleware(VersioningMiddleware, settings=VersioningSettings(versions=("1", "2"), default="1"))
    >>> @app.get("/orders", dependencies=[Version(since="1")])
    ... async def orders(version: CurrentVersion) -> str:
    ...     return f"orders as of version {version}"
"""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_hardening.api.versioning.engine import Versions
from fastapi_hardening.api.versioning.overrides import LAYER, Version, served_by
from fastapi_hardening.api.versioning.reader import Reader
from fastapi_hardening.api.versioning.settings import VersioningSettings
from fastapi_hardening.core import context as request_context
from fastapi_hardening.core.clock import Clock
from fastapi_hardening.core.headers import RawHeaders
from fastapi_hardening.core.policy import mark_handled
from fastapi_hardening.core.problem import Problem, refuse
from fastapi_hardening.core.routes import route_of

_STARTS = frozenset({"http.response.start", "websocket.accept", "websocket.http.response.start"})


class VersioningMiddleware:
    """Finds the version of every request, refuses what is not served, and tells of versions that will end.

    Args:
        app: The application inside.
        settings: The versions and their ends.
        versions: The engine, made already; then settings are left out.
        clock: Where the time comes from.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: VersioningSettings | None = None,
        *,
        versions: Versions | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.app = app
        self._versions = versions or Versions(settings, clock=clock)
        self._reader = Reader(self._versions.settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        context = request_context.ensure(scope)
        entry = route_of(scope)
        context.state[Versions] = self._versions
        served: tuple[str, ...] | None = None
        if entry.overrides:
            mark_handled(scope, entry.of(Version))
            served = served_by(entry, self._versions.settings)
        try:
            version = self._versions.decide(self._reader.asked(scope), served)
        except Problem as problem:
            # A cache may keep a 410, and must not answer with it who asks for another version.
            await refuse(problem, scope, receive, _adding(send, self._versions.fields[None]), layer=LAYER)
            return
        context.version = version
        if self._versions.count is not None:
            self._versions.count(version, entry)
        fields = self._versions.fields[version]
        await self.app(scope, receive, _adding(send, fields) if fields else send)


def _adding(send: Send, fields: RawHeaders) -> Send:
    async def send_with_fields(message: Message) -> None:
        if message["type"] in _STARTS:
            headers = list(message.get("headers") or ())
            names = {name.lower() for name, _ in headers}
            # What the application says of this one route wins; of these two there may be several.
            headers += [pair for pair in fields if pair[0] not in names or pair[0] in (b"vary", b"link")]
            message["headers"] = headers
        await send(message)

    return send_with_fields
