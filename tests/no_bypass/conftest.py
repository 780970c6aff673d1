"""What the no-bypass tests share: a server that records, the surroundings of an application, and what is hardened."""

import asyncio
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pytest
from fastapi import FastAPI
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_hardening import harden
from fastapi_hardening.observability.request_context import well_formed

API_CSP = "default-src 'none'; frame-ancestors 'none'"
DOCS_CSP = "default-src 'none'; script-src 'nonce-"
PAGE_CSP = "frame-ancestors 'none'; base-uri 'self'; object-src 'none'; form-action 'self'"

# On every answer, each once.
PROTECTING = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "strict-origin-when-cross-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "x-dns-prefetch-control": "off",
    "x-permitted-cross-domain-policies": "none",
}

STARTS = ("http.response.start", "websocket.accept", "websocket.http.response.start")
BODIES = ("http.response.body", "websocket.http.response.body")


@dataclass
class Answer:
    """What a server saw of one request or handshake: every message in its order, and what was raised to it."""

    messages: list[Message] = field(default_factory=list)
    raised: Exception | None = None

    @property
    def start(self) -> Message:
        """The one message that starts the answer."""
        starts = [message for message in self.messages if message["type"] in STARTS]
        assert len(starts) == 1, self.messages
        return starts[0]

    @property
    def status(self) -> int:
        """The HTTP status."""
        status: int = self.start["status"]
        return status

    @property
    def kinds(self) -> list[str]:
        """The types of the messages."""
        return [message["type"] for message in self.messages]

    @property
    def body(self) -> bytes:
        """The whole body."""
        return b"".join(message.get("body", b"") for message in self.messages if message["type"] in BODIES)

    @property
    def problem(self) -> dict[str, Any]:
        """The body, which must be a problem document."""
        assert self.one("content-type") == "application/problem+json", (self.start, self.body)
        document: dict[str, Any] = json.loads(self.body)
        return document

    def all(self, name: str) -> list[str]:
        """Every value of a header field, whatever the case of its name."""
        return [value.decode() for key, value in self.start.get("headers", ()) if key.decode().lower() == name]

    def one(self, name: str) -> str:
        """The value of a header field that must be there exactly once."""
        values = self.all(name)
        assert len(values) == 1, f"{name}: {values} in {self.start}"
        return values[0]


class Ask(Protocol):
    """Sends a request."""

    def __call__(
        self,
        app: ASGIApp,
        asked: str,
        *,
        headers: Sequence[tuple[str, str]] = (),
        chunks: Sequence[bytes] = (b"",),
        root_path: str = "",
        scheme: str = "http",
    ) -> Answer: ...


class Knock(Protocol):
    """Opens a websocket."""

    def __call__(
        self,
        app: ASGIApp,
        path: str,
        *,
        headers: Sequence[tuple[str, str]] = (),
        incoming: Sequence[Message] = (),
        denial: bool = True,
        root_path: str = "",
    ) -> Answer: ...


class Hardened(Protocol):
    """Asserts that an answer carries the id and every protecting header field, each exactly once."""

    def __call__(self, answer: Answer, *, html: bool = False, docs: bool = False, tls: bool = False) -> None: ...


@pytest.fixture(scope="session")
def runner() -> Iterator[asyncio.Runner]:
    """Give one event loop for all requests, as a server has one."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture
def ask(runner: asyncio.Runner) -> Ask:
    """Give a function that sends one request, as a server would, and returns what it saw."""

    def ask(
        app: ASGIApp,
        asked: str,
        *,
        headers: Sequence[tuple[str, str]] = (),
        chunks: Sequence[bytes] = (b"",),
        root_path: str = "",
        scheme: str = "http",
    ) -> Answer:
        method, _, target = asked.partition(" ")
        scope = _scope("http", target, headers, root_path=root_path, scheme=scheme) | {"method": method}
        parts = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
        parts[-1]["more_body"] = False
        answer, ended = Answer(), asyncio.Event()

        async def receive() -> Message:
            if parts:
                return parts.pop(0)
            await ended.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            assert not ended.is_set(), f"{message} after the end of the answer"
            answer.messages.append(dict(message))
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                ended.set()

        runner.run(_serve(app, scope, receive, send, answer))
        return answer

    return ask


@pytest.fixture
def knock(runner: asyncio.Runner) -> Knock:
    """Give a function that opens one websocket, sends messages and returns what it saw."""

    def knock(
        app: ASGIApp,
        path: str,
        *,
        headers: Sequence[tuple[str, str]] = (),
        incoming: Sequence[Message] = (),
        denial: bool = True,
        root_path: str = "",
    ) -> Answer:
        scope = _scope("websocket", path, headers, root_path=root_path, scheme="ws") | {
            "subprotocols": [],
            "extensions": {"websocket.http.response": {}} if denial else {},
        }
        messages = [{"type": "websocket.connect"}, *incoming, {"type": "websocket.disconnect", "code": 1000}]
        answer = Answer()

        async def receive() -> Message:
            return messages.pop(0)

        async def send(message: Message) -> None:
            answer.messages.append(dict(message))

        runner.run(_serve(app, scope, receive, send, answer))
        return answer

    return knock


@pytest.fixture
def hardened() -> Hardened:
    """Give a function that asserts that an answer carries the id and the header fields."""

    def hardened(answer: Answer, *, html: bool = False, docs: bool = False, tls: bool = False) -> None:
        assert well_formed(answer.one("x-request-id").encode())
        for name, value in PROTECTING.items():
            # A sign-in on the documentation pages opens a window of another origin and hears from it.
            assert (docs and name == "cross-origin-opener-policy") or answer.one(name) == value
        assert answer.one("permissions-policy").startswith("accelerometer=(), ")
        if docs:
            assert answer.one("content-security-policy").startswith(DOCS_CSP)
        else:
            assert answer.one("content-security-policy") == (PAGE_CSP if html else API_CSP)
        assert len(answer.all("content-security-policy-report-only")) == html
        assert len(answer.all("strict-transport-security")) == tls
        names = [name for name, _ in answer.start["headers"] if name != b"set-cookie"]
        assert len(names) == len(set(names)), names

    return hardened


_clients = itertools.count()


def _scope(
    kind: str, target: str, headers: Sequence[tuple[str, str]], *, root_path: str, scheme: str
) -> dict[str, Any]:
    path, _, query = target.partition("?")
    # Every request comes from an address of its own, so that no limit by address is met.
    number = next(_clients)
    return {
        "type": kind,
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "scheme": scheme,
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": root_path,
        "headers": [(b"host", b"shop.test")] * (not any(name == "host" for name, _ in headers))
        + [(name.encode(), value.encode()) for name, value in headers],
        "client": (f"198.51.{number >> 8 & 255}.{number & 255}", 40000),
        "server": ("127.0.0.1", 8000),
        "state": {},
    }


async def _serve(app: ASGIApp, scope: Scope, receive: Receive, send: Send, answer: Answer) -> None:
    try:
        async with asyncio.timeout(5):
            await app(scope, receive, send)
    except Exception as raised:  # noqa: BLE001 - a server takes whatever comes
        answer.raised = raised


# --- surroundings -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """An application in its surroundings.

    Attributes:
        around: The kind of surroundings.
        app: What the server calls.
        prefix: What clients write before the paths of the application.
        root_path: What the server sets as the root path.
        exporter: What spans end up in, where the application is instrumented.
    """

    around: str
    app: ASGIApp
    prefix: str = ""
    root_path: str = ""
    exporter: InMemorySpanExporter | None = None


class Rewriting:
    """A user's middleware that serves ``/asked/...`` by the routes of ``/...``."""

    def __init__(self, app: ASGIApp, *, copies: bool) -> None:
        self.app = app
        self._copies = copies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket") and scope["path"].startswith("/asked/"):
            path = scope["path"].removeprefix("/asked")
            if self._copies:
                scope = dict(scope) | {"path": path}
            else:
                scope["path"] = path
        await self.app(scope, receive, send)


async def _pass_on(request: Request, call_next: RequestResponseEndpoint) -> Response:
    return await call_next(request)


Build = Callable[[Any], FastAPI]
"""Makes an application, not hardened, with this ``telemetry``; ``app.state.hardened_with`` is for harden()."""


def _hardened(app: FastAPI) -> FastAPI:
    harden(app, **getattr(app.state, "hardened_with", {}))
    return app


def _alone(build: Build) -> Site:
    return Site("alone", _hardened(build(None)))


def _middleware_after(build: Build) -> Site:
    """Give an application to which a middleware was added after it was hardened."""
    app = _hardened(build(None))
    app.add_middleware(BaseHTTPMiddleware, dispatch=_pass_on)
    return Site("middleware after", app)


def _root_path(build: Build) -> Site:
    """Give an application under ``uvicorn --root-path``, which writes the root path before every path."""
    return Site("root path", _hardened(build(None)), prefix="/proxy", root_path="/proxy")


def _bare_root_path(build: Build) -> Site:
    """Give an application behind a proxy that strips a prefix, and a server that does not put it before the path."""
    return Site("bare root path", _hardened(build(None)), root_path="/proxy")


def _rewritten(build: Build) -> Site:
    """Give an application whose author's middleware sends other paths to its routes, by a copy of the scope."""
    app = build(None)
    app.add_middleware(Rewriting, copies=True)
    return Site("rewritten", _hardened(app), prefix="/asked")


def _rewritten_in_place(build: Build) -> Site:
    """Give an application whose author's middleware sends other paths to its routes, in the scope itself."""
    app = _hardened(build(None))
    app.add_middleware(Rewriting, copies=False)
    return Site("rewritten in place", app, prefix="/asked")


def _in_hardened(build: Build) -> Site:
    """Give a hardened application, mounted in another one."""
    outer = FastAPI()
    outer.mount("/inner", _hardened(build(None)))
    return Site("in hardened", _hardened(outer), prefix="/inner")


def _in_bare(build: Build) -> Site:
    """Give a hardened application, mounted in one that is not."""
    outer = FastAPI()
    outer.mount("/inner", _hardened(build(None)))
    return Site("in bare", outer, prefix="/inner")


def _instrumented_before(build: Build) -> Site:
    """Give an application that was instrumented before it was hardened; FastAPI's own telemetry has to yield."""
    exporter, provider = _telemetry()
    app = build({"tracer_provider": provider})
    FastAPIInstrumentor.instrument_app(app, tracer_provider=provider)
    return Site("instrumented before", _hardened(app), exporter=exporter)


def _instrumented_after(build: Build) -> Site:
    """Give an application that was instrumented after it was hardened; FastAPI's own telemetry has to yield."""
    exporter, provider = _telemetry()
    app = _hardened(build({"tracer_provider": provider}))
    FastAPIInstrumentor.instrument_app(app, tracer_provider=provider)
    return Site("instrumented after", app, exporter=exporter)


def _telemetry() -> tuple[InMemorySpanExporter, TracerProvider]:
    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return exporter, provider


SURROUNDINGS = (
    _alone,
    _middleware_after,
    _root_path,
    _bare_root_path,
    _rewritten,
    _rewritten_in_place,
    _in_hardened,
    _in_bare,
    _instrumented_before,
    _instrumented_after,
)


@pytest.fixture(scope="module", params=SURROUNDINGS, ids=lambda give: give.__name__.strip("_").replace("_", " "))
def surround(request: pytest.FixtureRequest) -> Iterator[Callable[[Build], Site]]:
    """Give a function that hardens an application and puts it into surroundings of each kind."""
    sites: list[Site] = []

    def surround(build: Build) -> Site:
        site: Site = request.param(build)
        sites.append(site)
        return site

    yield surround
    for site in sites:
        if site.exporter is not None:
            # Instrumentation reaches beyond the application: it also replaces a method of background tasks.
            assert isinstance(site.app, FastAPI)
            FastAPIInstrumentor.uninstrument_app(site.app)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave these tests out of the coverage: they are many, and every line that they run has a test of its own."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker("no_cover")
