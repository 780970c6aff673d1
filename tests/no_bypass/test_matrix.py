"""Wherever a route is placed and whatever comes of a request: the answer carries the id and the header fields, once."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import pytest
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, File, HTTPException, Request, Response
from fastapi.responses import FileResponse, HTMLResponse, PlainTextResponse, RedirectResponse, StreamingResponse
from fastapi.sse import EventSourceResponse
from opentelemetry.trace import SpanKind
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.routing import Mount, Route, Router
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from fastapi_hardening import Problem
from tests.no_bypass.conftest import Answer, Ask, Build, Hardened, Site

SECRET = "a secret of the exception"
LARGEST_BODY = 1000
LARGE = b"x" * (LARGEST_BODY + 1)


class Item(BaseModel):
    """A body."""

    price: int


class BrokenError(Exception):
    """What an endpoint raises and nobody handles."""


# --- routes that come to every outcome --------------------------------------------------------------------------------

FASTAPI_ROUTES: list[tuple[str, str, Any, dict[str, Any]]] = []
STARLETTE_ROUTES: list[Route] = []


def in_fastapi(asked: str, **options: Any) -> Callable[[Any], Any]:
    """Adds a route in FastAPI's manner."""

    def add(endpoint: Any) -> Any:
        method, path = asked.split()
        FASTAPI_ROUTES.append((method, path, endpoint, options))
        return endpoint

    return add


def in_starlette(asked: str) -> Callable[[Any], Any]:
    """Adds a route in Starlette's manner; the endpoint takes a request and returns a response."""

    def add(endpoint: Any) -> Any:
        method, path = asked.split()
        STARLETTE_ROUTES.append(Route(path, endpoint, methods=[method]))
        return endpoint

    return add


def add_fastapi_routes(to: FastAPI | APIRouter, prefix: str = "") -> None:
    """Adds all of FastAPI's."""
    for method, path, endpoint, options in FASTAPI_ROUTES:
        to.add_api_route(prefix + path, endpoint, methods=[method], **options)


async def refuse() -> None:
    raise HTTPException(403, "not you")


async def fail() -> None:
    raise BrokenError(SECRET)


async def parts() -> AsyncIterator[str]:
    for part in ("one", "two", "three"):
        yield part


@in_fastapi("GET /ok")
@in_fastapi("HEAD /head")
@in_fastapi("OPTIONS /options")
@in_fastapi("POST /unread")
@in_fastapi("DELETE /deleted", status_code=204)
@in_fastapi("GET /refused", dependencies=[Depends(refuse)])
async def ok() -> None: ...


@in_fastapi("GET /sync")
def sync() -> None: ...


@in_fastapi("GET /sync-boom")
def sync_boom() -> None:
    raise BrokenError(SECRET)


@in_fastapi("GET /not-a-number", response_model=int)
async def not_a_number() -> Any:
    return SECRET


@in_fastapi("GET /number/{number}")
async def number(number: int) -> int:
    return number


@in_fastapi("POST /item")
async def item(item: Item) -> Item:
    return item


@in_fastapi("POST /form")
async def form(file: Annotated[bytes, File()]) -> int:
    return len(file)


@in_fastapi("GET /same-raised")
async def same_raised() -> None:
    raise HTTPException(304)


@in_fastapi("GET /missing")
async def missing() -> None:
    raise HTTPException(404)


@in_fastapi("GET /problem")
async def problem() -> None:
    raise Problem("Only 3 are left.", status=409, extensions={"available": 3})


@in_fastapi("GET /lines")
def lines() -> Iterator[Item]:
    yield from (Item(price=price) for price in range(3))


@in_fastapi("GET /events", response_class=EventSourceResponse)
async def events() -> AsyncIterator[Item]:
    for price in range(3):
        yield Item(price=price)


@in_fastapi("GET /later")
async def later(tasks: BackgroundTasks) -> None:
    tasks.add_task(asyncio.sleep, 0)


@in_fastapi("GET /later-boom")
async def later_boom(tasks: BackgroundTasks) -> None:
    tasks.add_task(fail)


@in_fastapi("GET /file")
async def file() -> Response:
    return FileResponse(__file__)


@in_starlette("GET /ok")
async def ok_response(_request: Request) -> Response:
    return PlainTextResponse("ok")


@in_starlette("POST /unread")
async def unread(_request: Request) -> Response:
    return Response()


@in_fastapi("POST /small", max_body_size=10)
@in_fastapi("POST /read")
@in_starlette("POST /read")
async def read(request: Request) -> Response:
    return PlainTextResponse(str(len(await request.body())))


@in_fastapi("GET /page")
@in_starlette("GET /page")
async def page(_request: Request) -> Response:
    return HTMLResponse("<p>page</p>")


@in_fastapi("GET /same")
@in_starlette("GET /same")
async def same(_request: Request) -> Response:
    return Response(status_code=304)


@in_fastapi("GET /away")
@in_starlette("GET /away")
async def away(_request: Request) -> Response:
    return RedirectResponse("/elsewhere")


@in_fastapi("GET /teapot")
@in_starlette("GET /teapot")
async def teapot(_request: Request) -> Response:
    raise HTTPException(418, "short and stout", {"X-Teapot": "yes"})


@in_fastapi("GET /boom")
@in_starlette("GET /boom")
async def boom(_request: Request) -> Response:
    raise BrokenError(SECRET)


@in_fastapi("GET /stream")
@in_starlette("GET /stream")
async def stream(_request: Request) -> Response:
    return StreamingResponse(parts(), media_type="text/plain")


@in_fastapi("GET /own-id")
@in_starlette("GET /own-id")
async def own_id(_request: Request) -> Response:
    return Response(headers={"X-Request-ID": "mine", "X-Frame-Options": "DENY"})


async def opaque(scope: Scope, receive: Receive, send: Send) -> None:
    """The same as a bare ASGI function, which nothing looks into."""
    name = scope["path"].rpartition("/")[2]
    if name == "boom":
        raise BrokenError(SECRET)
    if name == "read":
        while (await receive()).get("more_body", False):
            pass
    headers: list[tuple[bytes, bytes]] = [(b"content-type", b"text/html" if name == "page" else b"text/plain")]
    if name == "own-id":
        # Capitals are against ASGI's rules, and so what an application may send that did not read them.
        headers += [(b"X-Request-ID", b"mine"), (b"X-Frame-Options", b"DENY")]
    if name == "bare":
        await send({"type": "http.response.start", "status": 200})
    else:
        await send({"type": "http.response.start", "status": 404 if name == "nowhere" else 200, "headers": headers})
    if name == "late-boom":
        raise BrokenError(SECRET)
    for part in (b"one", b"two", b"three") if name == "stream" else (b"ok",):
        await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body"})


# --- the table --------------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What is asked, where it can be asked, and what comes back.

    Attributes:
        asked: The method and the path below the placement.
        status: The status of the answer.
        kind: ``problem`` or ``page`` (HTML) or anything else.
        where: The sorts of placement that it is for: FastAPI, Starlette, files, opaque, frontend.
        sent: What of the request matters beside the first line.
        raises: What goes on to the server.
    """

    asked: str
    status: int
    kind: str
    where: str
    sent: str = ""
    raises: type[Exception] | None = None


# What is sent: header fields, and the parts of the body.
SENT: dict[str, tuple[list[tuple[str, str]], list[bytes]]] = {
    "": ([], [b""]),
    "declared": ([("content-length", str(len(LARGE)))], [LARGE]),
    "chunked": ([("transfer-encoding", "chunked")], [LARGE[:600], LARGE[600:]]),
    "11 bytes": ([("content-length", "11")], [b"x" * 11]),
    "11 bytes chunked": ([("transfer-encoding", "chunked")], [b"x" * 5, b"x" * 6]),
    "wrong json": ([("content-type", "application/json")], [b'{"price": "much"}']),
    "no json": ([("content-type", "application/json")], [b"{"]),
    "no form": ([("content-type", "multipart/form-data")], [b"x"]),
    "range": ([("range", "bytes=1-2")], [b""]),
    "range after the end": ([("range", "bytes=999999-")], [b""]),
    "known": ([("if-modified-since", "Fri, 01 Jan 2100 00:00:00 GMT")], [b""]),
}

OUTCOMES = (
    Outcome("GET /ok", 200, "plain", "fastapi starlette opaque"),
    Outcome("GET /sync", 200, "plain", "fastapi"),
    Outcome("GET /page", 200, "page", "fastapi starlette opaque"),
    Outcome("GET /bare", 200, "plain", "opaque"),
    Outcome("GET /text.txt", 200, "plain", "files frontend"),
    Outcome("GET /page.html", 200, "page", "files frontend"),
    Outcome("DELETE /deleted", 204, "plain", "fastapi"),
    Outcome("GET /text.txt", 206, "plain", "files frontend", "range"),
    Outcome("GET /file", 206, "plain", "fastapi", "range"),
    Outcome("GET /same", 304, "plain", "fastapi starlette"),
    Outcome("GET /same-raised", 304, "plain", "fastapi"),
    Outcome("GET /text.txt", 304, "plain", "files frontend", "known"),
    Outcome("GET /ok/", 307, "plain", "fastapi starlette"),
    Outcome("GET /away", 307, "plain", "fastapi starlette"),
    Outcome("POST /form", 400, "problem", "fastapi", "no form"),
    Outcome("GET /refused", 403, "problem", "fastapi"),
    Outcome("GET /nowhere", 404, "problem", "fastapi starlette files frontend"),
    Outcome("GET /nowhere", 404, "plain", "opaque"),
    Outcome("GET /missing", 404, "problem", "fastapi"),
    Outcome("PUT /ok", 405, "problem", "fastapi starlette"),
    Outcome("PUT /text.txt", 405, "problem", "files"),
    Outcome("GET /problem", 409, "problem", "fastapi"),
    Outcome("POST /small", 413, "problem", "fastapi", "11 bytes"),
    Outcome("POST /small", 413, "problem", "fastapi", "11 bytes chunked"),
    Outcome("POST /read", 413, "problem", "fastapi starlette opaque", "declared"),
    Outcome("POST /read", 413, "problem", "fastapi starlette opaque", "chunked"),
    Outcome("POST /unread", 413, "problem", "fastapi starlette opaque", "declared"),
    Outcome("POST /text.txt", 413, "problem", "files frontend", "declared"),
    Outcome("GET /text.txt", 416, "plain", "files frontend", "range after the end"),
    Outcome("GET /file", 416, "plain", "fastapi", "range after the end"),
    Outcome("GET /teapot", 418, "problem", "fastapi starlette"),
    Outcome("GET /number/x", 422, "problem", "fastapi"),
    Outcome("POST /item", 422, "problem", "fastapi", "wrong json"),
    Outcome("POST /item", 422, "problem", "fastapi", "no json"),
    Outcome("GET /boom", 500, "problem", "fastapi starlette opaque", raises=BrokenError),
    Outcome("GET /sync-boom", 500, "problem", "fastapi", raises=BrokenError),
    Outcome("GET /not-a-number", 500, "problem", "fastapi", raises=Exception),
    Outcome("GET /late-boom", 200, "plain", "opaque", raises=BrokenError),
    Outcome("GET /later-boom", 200, "plain", "fastapi", raises=BrokenError),
    Outcome("GET /stream", 200, "plain", "fastapi starlette opaque"),
    Outcome("GET /lines", 200, "plain", "fastapi"),
    Outcome("GET /events", 200, "plain", "fastapi"),
    Outcome("GET /later", 200, "plain", "fastapi"),
    Outcome("HEAD /ok", 405, "problem", "fastapi"),
    Outcome("HEAD /head", 200, "plain", "fastapi"),
    Outcome("HEAD /ok", 200, "plain", "starlette"),
    Outcome("HEAD /text.txt", 200, "plain", "files frontend"),
    Outcome("OPTIONS /ok", 405, "problem", "fastapi starlette"),
    Outcome("OPTIONS /options", 200, "plain", "fastapi"),
    Outcome("GET /own-id", 200, "plain", "fastapi starlette opaque"),
)

PLACEMENTS = {
    # The placement and what its paths begin with: its sort.
    "/direct": "fastapi",
    "/included": "fastapi",
    "/1/2/3/4/5/6/7/8": "fastapi",
    "/mounted": "fastapi",
    "/included/mounted": "fastapi",
    "/mounted/mounted": "fastapi",
    "/host": "fastapi",
    "/starlette": "starlette",
    "/router": "starlette",
    "/included/starlette": "starlette",
    "/files": "files",
    "/mounted/files": "files",
    "/opaque": "opaque",
    "/included/opaque": "opaque",
    "/frontend": "frontend",
}

MATRIX = [
    pytest.param(placement, outcome, id=f"{placement} {outcome.status} {outcome.asked} {outcome.sent}".strip())
    for placement, sort in PLACEMENTS.items()
    for outcome in OUTCOMES
    if sort in outcome.where.split()
]


def make_files(files: Path) -> Path:
    """Writes the static files into a folder."""
    (files / "text.txt").write_text("text")
    (files / "page.html").write_text("<p>page</p>")
    (files / "404.html").write_text("<p>not here</p>")
    return files


def make_app(files: Path, telemetry: Any) -> FastAPI:
    """Makes an application with every placement."""
    app = FastAPI(max_body_size=LARGEST_BODY, telemetry=telemetry)
    add_fastapi_routes(app, "/direct")
    included = APIRouter()
    add_fastapi_routes(included)

    nested = included
    for segment in "8765432":
        outer = APIRouter()
        outer.include_router(nested, prefix=f"/{segment}")
        nested = outer
    app.include_router(nested, prefix="/1")

    child = FastAPI()
    add_fastapi_routes(child)
    child.mount("/files", StaticFiles(directory=files))
    grandchild = FastAPI()
    add_fastapi_routes(grandchild)
    child.mount("/mounted", grandchild)
    app.mount("/mounted", child)

    included.mount("/mounted", child)
    included.mount("/starlette", Starlette(routes=STARLETTE_ROUTES))
    included.mount("/opaque", opaque)
    app.include_router(included, prefix="/included")

    app.mount("/starlette", Starlette(routes=STARLETTE_ROUTES))
    app.router.routes.append(Mount("/router", app=Router(STARLETTE_ROUTES)))
    app.mount("/files", StaticFiles(directory=files))
    app.mount("/opaque", opaque)
    app.frontend("/frontend", directory=files, fallback=None)
    host = FastAPI()
    add_fastapi_routes(host, "/host")
    app.host("host.test", host)
    return app


@pytest.fixture(scope="module")
def site(surround: Callable[[Build], Site], tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Give an application with every placement, in surroundings of each kind."""
    files = make_files(tmp_path_factory.mktemp("files"))
    return surround(lambda telemetry: make_app(files, telemetry))


def answer_of(ask: Ask, site: Site, placement: str, outcome: Outcome) -> Answer:
    """Asks for an outcome at a placement."""
    method, path = outcome.asked.split()
    headers, body = SENT[outcome.sent]
    if site.exporter is not None:
        site.exporter.clear()
    host = [("host", "host.test")] if placement == "/host" else []
    asked = f"{method} {site.prefix}{placement}{path}"
    return ask(site.app, asked, headers=[*host, *headers], chunks=body, root_path=site.root_path)


def as_the_framework_has_it(site: Site, placement: str, outcome: Outcome) -> Outcome:
    """The outcome where Starlette itself comes to another one than usual, hardened or not."""
    mount = placement.rpartition("/")[2]
    if site.around == "bare root path" and mount in ("mounted", "starlette", "router", "files"):
        # It routes by the path below a mount only if the whole path begins with the root path.
        if outcome.sent != "declared" and (placement, outcome.asked) != ("/files", "PUT /text.txt"):
            return outcome._replace(status=404, kind="problem", raises=None)
    elif site.around == "middleware after" and mount == "starlette" and outcome.sent == "chunked":
        # A mounted Starlette application takes the limit's exception group from a BaseHTTPMiddleware for a failure.
        return outcome._replace(status=500, raises=RuntimeError)
    return outcome


@pytest.mark.parametrize(("placement", "outcome"), MATRIX)
def test_every_answer_is_hardened(ask: Ask, hardened: Hardened, site: Site, placement: str, outcome: Outcome) -> None:
    """Each outcome at each placement has its status, one id and each header field once; an error is a problem."""
    outcome = as_the_framework_has_it(site, placement, outcome)
    answer = answer_of(ask, site, placement, outcome)
    assert answer.status == outcome.status, (answer.messages, answer.raised)
    hardened(answer, html=outcome.kind == "page")
    assert SECRET.encode() not in answer.body
    if outcome.raises is None:
        assert answer.raised is None
    else:
        assert isinstance(answer.raised, outcome.raises)
    if outcome.kind != "problem":
        assert answer.all("content-type") != ["application/problem+json"]
    elif outcome.asked.startswith("HEAD"):
        assert answer.one("content-type") == "application/problem+json"
        assert answer.body == b""
    else:
        assert answer.problem["status"] == outcome.status
        assert answer.problem["request_id"] == answer.one("x-request-id")
        assert answer.one("content-length") == str(len(answer.body))
    if site.exporter is not None:
        spans = [span for span in site.exporter.get_finished_spans() if span.kind is SpanKind.SERVER]
        if outcome.status == 413 and not spans:
            # A declared length is refused before an instrumentation that was there first, and so lies inside, sees it.
            assert site.around == "instrumented before"
            return
        assert len(spans) == 1
        assert (spans[0].attributes or {})["http.status_code"] == outcome.status


def test_matrix_has_every_placement_and_outcome() -> None:
    """No line of the table is left out for a misspelt sort of placement."""
    sorts = set(PLACEMENTS.values())
    assert sorts == {sort for outcome in OUTCOMES for sort in outcome.where.split()}
    assert {outcome.sent for outcome in OUTCOMES} == set(SENT)
