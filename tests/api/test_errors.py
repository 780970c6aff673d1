"""Error answers: their form, who may write them, and what they never say."""

import asyncio
import json
import logging
from typing import Annotated, Any

import pytest
from fastapi import FastAPI, File, HTTPException, Query, Request, UploadFile, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Discriminator, Tag, field_validator
from starlette.applications import Starlette
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.routing import Route
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.websockets import WebSocketDisconnect

from fastapi_hardening import Problem
from fastapi_hardening.api.errors import ErrorsMiddleware, ErrorsSettings, ExceptionUnhandled, install
from fastapi_hardening.core import context as request_context
from fastapi_hardening.core.events import Events
from fastapi_hardening.observability.request_context import ContextMaker, RequestContextMiddleware, RequestIdSettings


def with_errors(app: Any = None, *, events: Events | None = None, **changes: Any) -> FastAPI:
    app = app or FastAPI()
    settings = ErrorsSettings(**changes)
    app.add_middleware(ErrorsMiddleware, settings=settings)
    maker = ContextMaker(RequestIdSettings(), events=events, error_format=settings.format)
    app.add_middleware(RequestContextMiddleware, maker=maker)
    install(app, settings)
    made: FastAPI = app
    return made


def client_of(app: Any) -> TestClient:
    return TestClient(app, raise_server_exceptions=False)


# --- HTTPException ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raised", "members"),
    [
        (HTTPException(404), {"title": "Not Found", "status": 404}),
        (HTTPException(404, "No such item."), {"title": "Not Found", "status": 404, "detail": "No such item."}),
        (HTTPException(409, {"left": 3}), {"title": "Conflict", "status": 409, "details": {"left": 3}}),
        (HTTPException(409, ["a", "b"]), {"title": "Conflict", "status": 409, "details": ["a", "b"]}),
        (Problem("No.", status=418, title="Teapot"), {"title": "Teapot", "status": 418, "detail": "No."}),
    ],
)
def test_what_an_endpoint_raises_becomes_a_problem(raised: HTTPException, members: dict[str, Any]) -> None:
    """A detail that is no sentence survives beside it; the header fields are kept."""
    raised.headers = {"X-Own": "1"}
    app = with_errors()

    @app.get("/")
    async def index() -> None:
        raise raised

    answer = client_of(app).get("/")
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["x-own"] == "1"
    document = answer.json()
    assert document.pop("type") == "about:blank"
    assert document.pop("request_id") == answer.headers["x-request-id"]
    assert document == members


@pytest.mark.parametrize("status", [204, 302, 304])
def test_an_exception_that_is_no_error_is_left_to_fastapi(status: int) -> None:
    """Some redirect and answer 304 by raising."""
    app = with_errors()

    @app.get("/")
    async def index() -> None:
        raise HTTPException(status, headers={"Location": "/x"})

    answer = client_of(app).get("/", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (status, "/x")


# --- validation -------------------------------------------------------------------------------------------------------


class Cat(BaseModel):
    """A model of a tagged union."""

    kind: str
    lives: int


class Secretive(BaseModel):
    """A model whose own rule repeats the input."""

    name: str

    @field_validator("name")
    @classmethod
    def _no(cls, name: str) -> str:
        raise ValueError(f"{name} is not good enough")


def validating() -> FastAPI:
    app = with_errors()

    @app.post("/cats")
    async def cats(cats: list[Cat], limit: Annotated[int, Query(ge=1)]) -> None:
        return

    @app.post("/tagged")
    async def tagged(body: Annotated[Annotated[Cat, Tag("cat")], Discriminator(lambda v: v.get("kind"))]) -> None:
        return

    @app.post("/secretive")
    async def secretive(body: Secretive) -> None:
        return

    @app.post("/upload")
    async def upload(file: Annotated[UploadFile, File()]) -> None:
        return

    @app.websocket("/talk")
    async def talk(websocket: WebSocket, limit: int) -> None:
        await websocket.accept()

    return app


def test_a_validation_error_says_where_what_and_which_rule() -> None:
    """A JSON pointer each, without the input."""
    answer = client_of(validating()).post("/cats?limit=0", json=[{"kind": "cat", "lives": "seventeen"}, {"kind": "x"}])
    assert answer.status_code == 422
    assert answer.json()["errors"] == [
        {
            "pointer": "#/query/limit",
            "detail": "Input should be greater than or equal to 1",
            "type": "greater_than_equal",
        },
        {
            "pointer": "#/body/0/lives",
            "detail": "Input should be a valid integer, unable to parse string as an integer",
            "type": "int_parsing",
        },
        {"pointer": "#/body/1/lives", "detail": "Field required", "type": "missing"},
    ]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tagged", {"kind": "s3cr3t"}),
        ("/secretive", {"name": "s3cr3t"}),
        ("/cats?limit=s3cr3t", [{"kind": "s3cr3t", "lives": "s3cr3t"}]),
        ("/cats?limit=1", "s3cr3t"),
    ],
)
def test_a_validation_error_never_repeats_the_input(path: str, body: Any) -> None:
    """Not by FastAPI's ``input``, nor by a message that contains it."""
    answer = client_of(validating()).post(path, json=body)
    assert answer.status_code == 422
    assert "s3cr3t" not in answer.text


def test_broken_json_is_a_validation_error_without_the_text() -> None:
    """The position alone helps who wrote it."""
    answer = client_of(validating()).post(
        "/secretive", content=b'{"name": s3cr3t}', headers={"content-type": "application/json"}
    )
    assert (answer.status_code, answer.json()["errors"][0]["type"]) == (422, "json_invalid")
    assert "s3cr3t" not in answer.text


def test_a_pointer_escapes_what_json_pointers_reserve() -> None:
    """RFC 6901: tilde and slash."""

    class Odd(BaseModel):
        """A model that takes any numbers by name."""

        numbers: dict[str, int]

    app = with_errors()

    @app.post("/")
    async def index(body: Odd) -> None:
        return

    answer = client_of(app).post("/", json={"numbers": {"a/b~c": "none"}})
    assert answer.json()["errors"][0]["pointer"] == "#/body/numbers/a~1b~0c"


@given(st.text(min_size=4, max_size=20))
def test_no_text_gets_back_through_a_validation_error(text: str) -> None:
    """Whatever it is, if it is long enough to be told from the message's own words."""
    answer = client_of(SECRETIVE).post("/secretive", json={"name": text})
    assert answer.json()["errors"][0]["detail"] == "The value is not valid."


SECRETIVE = validating()


def test_a_websocket_that_does_not_validate_is_refused_without_an_echo() -> None:
    """By an HTTP denial where the server can send one."""
    client = client_of(validating())
    with pytest.raises(WebSocketDenialResponse) as caught, client.websocket_connect("/talk?limit=s3cr3t"):
        raise AssertionError("was accepted")
    assert caught.value.status_code == 422
    assert caught.value.json()["errors"][0]["pointer"] == "#/query/limit"
    assert "s3cr3t" not in caught.value.text


# --- unhandled --------------------------------------------------------------------------------------------------------


def failing(**changes: Any) -> FastAPI:
    app = with_errors(**changes)

    @app.get("/")
    async def index() -> None:
        raise RuntimeError("s3cr3t")

    return app


def test_an_unhandled_exception_is_a_500_that_says_nothing() -> None:
    """But the id under which the log says everything."""
    answer = client_of(failing()).get("/")
    assert answer.status_code == 500
    assert answer.json()["title"] == "Internal Server Error"
    assert answer.json()["request_id"]
    assert "s3cr3t" not in answer.text


def test_in_development_it_tells_the_traceback() -> None:
    """By ``errors.details``."""
    document = client_of(failing(details=True)).get("/").json()
    assert document["detail"] == "RuntimeError: s3cr3t"
    assert any("raise RuntimeError" in line for line in document["traceback"])


def test_an_unhandled_exception_is_logged_with_its_id_and_told(caplog: pytest.LogCaptureFixture) -> None:
    """Once; the traceback is left to the server, which logs what is raised on."""
    events = Events()
    seen: list[ExceptionUnhandled] = []
    events.subscribe(ExceptionUnhandled, seen.append)
    with caplog.at_level(logging.ERROR, "fastapi_hardening.errors"):
        answer = client_of(failing(events=events)).get("/")
    [record] = [record for record in caplog.records if record.name == "fastapi_hardening.errors"]
    assert answer.headers.get("x-request-id", answer.json()["request_id"]) in record.getMessage()
    assert record.exc_info is None
    assert [(event.template, str(event.exception)) for event in seen] == [("/", "s3cr3t")]


def test_it_goes_on_to_the_server_unless_the_settings_say_otherwise(caplog: pytest.LogCaptureFixture) -> None:
    """Then the traceback is in our log line."""
    app = failing()
    with pytest.raises(RuntimeError):
        TestClient(app).get("/")
    # Inside Starlette's own error middleware swallowing is not ours to decide, so the layer is put outside of it.
    inner = FastAPI()
    inner.add_api_route("/", failing_endpoint)
    install(inner, ErrorsSettings())
    outer = ErrorsMiddleware(inner, ErrorsSettings(reraise=False))
    with caplog.at_level(logging.ERROR, "fastapi_hardening.errors"):
        assert TestClient(outer).get("/").status_code == 500
    assert "s3cr3t" in caplog.text


async def failing_endpoint() -> None:
    raise RuntimeError("s3cr3t")


class Raises:
    """A middleware of the application that raises."""

    def __init__(self, app: Any, error: Exception) -> None:
        self.app = app
        self.error = error

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        else:
            raise self.error


@pytest.mark.parametrize(
    ("error", "details", "status", "detail"),
    [
        (RuntimeError("s3cr3t"), False, 500, None),
        (RuntimeError("s3cr3t"), True, 500, "RuntimeError: s3cr3t"),
        (HTTPException(403, "Not you."), False, 403, "Not you."),
        (HTTPException(304), False, 500, None),
        (Problem("Tea only.", status=418), True, 418, "Tea only."),
    ],
)
def test_what_a_middleware_raises_becomes_a_problem(
    error: Exception, details: bool, status: int, detail: str | None
) -> None:
    """Starlette's handlers do not see it; with the layer around the application or among its middlewares."""
    for around in (True, False):
        app = FastAPI()
        app.add_middleware(Raises, error=error)
        settings = ErrorsSettings(details=details)
        if around:
            install(app, settings)
        answer = client_of(ErrorsMiddleware(app, settings) if around else with_errors(app, details=details)).get("/")
        assert (answer.status_code, answer.json().get("detail")) == (status, detail)


@pytest.mark.parametrize("around", [True, False])
def test_a_handler_of_the_application_answers_for_its_middlewares_too(around: bool) -> None:
    """By status, and for whatever is not handled; as it does for endpoints."""

    async def mine(request: Request, error: Exception) -> PlainTextResponse:
        return PlainTextResponse(f"mine: {error!r}", status_code=418)

    for key, error in ((403, HTTPException(403)), (Exception, RuntimeError("no")), (500, RuntimeError("no"))):
        app = FastAPI()
        app.add_exception_handler(key, mine)
        app.add_middleware(Raises, error=error)
        if around:
            install(app, ErrorsSettings())
        answer = client_of(ErrorsMiddleware(app) if around else with_errors(app)).get("/")
        assert (answer.status_code, answer.text) == (418, f"mine: {error!r}")


def test_an_answer_that_a_middleware_raises_is_no_accident(caplog: pytest.LogCaptureFixture) -> None:
    """It neither reaches the server nor the error log."""
    app = FastAPI()
    app.add_middleware(Raises, error=HTTPException(403))
    with caplog.at_level(logging.ERROR):
        assert TestClient(with_errors(app)).get("/").status_code == 403
    assert caplog.records == []


def test_debug_pages_are_for_development() -> None:
    """``FastAPI(debug=True)`` left on would show the traceback to everybody."""
    for details in (True, False):
        app = FastAPI(debug=True)
        app.add_api_route("/", failing_endpoint)
        install(app, ErrorsSettings(details=details))
        assert ("s3cr3t" in client_of(app).get("/").text) is details


def test_a_websocket_before_accept_is_refused_and_after_it_closed_by_the_server() -> None:
    """The layer answers only what was not answered yet."""
    app = FastAPI()
    app.add_middleware(Raises, error=RuntimeError("s3cr3t"))
    with pytest.raises(Exception, match="s3cr3t"), TestClient(with_errors(app)).websocket_connect("/"):
        raise AssertionError("was accepted")
    talking = with_errors()

    @talking.websocket("/talk")
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        raise RuntimeError("s3cr3t")

    with (
        pytest.raises((RuntimeError, WebSocketDisconnect)),
        TestClient(talking).websocket_connect("/talk") as websocket,
    ):
        websocket.receive_text()


def test_an_answer_that_has_begun_is_not_begun_again() -> None:
    """A stream that fails in the middle ends there."""
    app = with_errors()

    @app.get("/")
    async def index() -> StreamingResponse:
        async def parts() -> Any:
            yield b"a"
            raise RuntimeError("s3cr3t")

        return StreamingResponse(parts())

    sent: list[Any] = []
    received = iter([{"type": "http.request", "body": b""}])

    async def receive() -> Any:
        # Starlette listens for a disconnect: after the body there is nothing to hear.
        return next(received, None) or await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message["type"])

    scope = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": []}
    with pytest.raises(RuntimeError):
        asyncio.run(app(scope, receive, send))
    assert sent == ["http.response.start", "http.response.body"]


# --- the application's own handlers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [404, StarletteHTTPException, 500, Exception, RequestValidationError])
def test_a_handler_of_the_application_always_wins(key: Any) -> None:
    """For a status, a class, everything: registered before or after the installation."""
    paths = {
        404: "/nope",
        StarletteHTTPException: "/nope",
        500: "/",
        Exception: "/",
        RequestValidationError: "/number/x",
    }

    async def mine(request: Request, error: Exception) -> PlainTextResponse:
        return PlainTextResponse("mine", status_code=418)

    for before in (True, False):
        app = FastAPI()
        app.add_api_route("/", failing_endpoint)
        app.add_api_route("/number/{number}", _number)
        if before:
            app.add_exception_handler(key, mine)
        install(app, ErrorsSettings())
        app.add_exception_handler(key, mine)
        assert client_of(app).get(paths[key]).text == "mine"


async def _number(number: int) -> int:
    return number


def test_the_other_format_keeps_fastapis_bodies() -> None:
    """For clients that read ``detail``; a 500 still says nothing."""
    app = with_errors(format="fastapi")
    app.add_api_route("/", failing_endpoint)
    app.add_api_route("/number/{number}", _number)
    client = client_of(app)
    assert client.get("/nope").json() == {"detail": "Not Found"}
    assert client.get("/number/x").json()["detail"][0]["loc"] == ["path", "number"]
    assert client.get("/").json() == {"detail": "Internal Server Error"}
    assert "Problem" not in app.openapi().get("components", {}).get("schemas", {})


def test_a_starlette_application_answers_problems_too() -> None:
    """It has no handlers of its own to keep."""

    async def fails(request: Request) -> None:
        raise RuntimeError("s3cr3t")

    app = Starlette(routes=[Route("/", fails)])
    install(app, ErrorsSettings())
    client = client_of(app)
    assert client.get("/nope").json()["status"] == 404
    assert client.get("/").json()["status"] == 500


# --- the native body limit --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("declared", [True, False])
def test_the_native_body_limit_answers_a_problem(declared: bool) -> None:
    """Starlette sends its 413 past every handler, by the declared length or by the bytes that came."""
    app = FastAPI(max_body_size=10)
    install(app, ErrorsSettings())

    @app.post("/")
    async def index(request: Request) -> int:
        return len(await request.body())

    content: Any = b"x" * 11 if declared else iter([b"x" * 6, b"x" * 6])
    answer = client_of(ErrorsMiddleware(app)).post("/", content=content)
    assert answer.status_code == 413
    assert answer.json()["title"] == "Content Too Large"
    assert int(answer.headers["content-length"]) == len(answer.content)


@pytest.mark.parametrize("declared", [True, False])
def test_alone_inside_the_native_body_limit_its_answer_passes(declared: bool) -> None:
    """The signals of Starlette's limit are no accidents of the application."""
    app = with_errors(FastAPI(max_body_size=10))

    @app.post("/")
    async def index(request: Request) -> int:
        return len(await request.body())

    content: Any = b"x" * 11 if declared else iter([b"x" * 6, b"x" * 6])
    assert client_of(app).post("/", content=content).status_code == 413


def test_a_413_that_the_application_writes_is_left_alone() -> None:
    """Only Starlette's own is replaced."""
    app = with_errors()
    app.add_api_route("/", lambda: JSONResponse({"mine": True}, status_code=413))
    assert client_of(app).get("/").json() == {"mine": True}
    fastapi = with_errors(format="fastapi")
    fastapi.add_api_route("/", lambda: PlainTextResponse("Content Too Large", status_code=413))
    assert client_of(fastapi).get("/").text == "Content Too Large"


# --- OpenAPI ----------------------------------------------------------------------------------------------------------


def documented() -> FastAPI:
    app = with_errors()

    @app.get("/items/{number}", responses={404: {"description": "No such item."}, "5XX": {"description": "Mine."}})
    async def item(number: int) -> int:
        return number

    @app.get("/plain")
    async def plain() -> None:
        return

    return app


def test_the_openapi_document_describes_the_errors_as_they_are() -> None:
    """Problems for 4XX and 5XX, the 422 as it is sent; what the application declares is kept."""
    document = documented().openapi()
    item = document["paths"]["/items/{number}"]["get"]["responses"]
    assert item["404"] == {"description": "No such item."}
    assert item["5XX"] == {"description": "Mine."}
    assert list(item["422"]["content"]) == ["application/problem+json"]
    assert set(document["paths"]["/plain"]["get"]["responses"]) == {"200", "4XX", "5XX"}
    assert set(document["components"]["schemas"]) == {"Problem", "ValidationProblem"}


def test_a_document_is_amended_once_and_again_after_a_new_route() -> None:
    """FastAPI makes a new one then."""
    app = documented()
    first = json.dumps(app.openapi())
    install(app, ErrorsSettings())
    assert json.dumps(app.openapi()) == first

    @app.get("/late")
    async def late(number: int) -> None:
        return

    assert "4XX" in app.openapi()["paths"]["/late"]["get"]["responses"]


def test_a_schema_of_the_application_keeps_its_name() -> None:
    """Ours takes another."""

    class Problem(BaseModel):
        """The application's own."""

        mine: int

    app = documented()

    @app.get("/own")
    async def own() -> Problem:
        return Problem(mine=1)

    schemas = app.openapi()["components"]["schemas"]
    assert "mine" in schemas["Problem"]["properties"]
    assert "request_id" in schemas["HardeningProblem"]["properties"]
    assert schemas["ValidationProblem"]["allOf"][0] == {"$ref": "#/components/schemas/HardeningProblem"}


def test_a_validation_answer_that_the_application_declares_is_kept_with_its_schema() -> None:
    """Whoever describes a 422 of its own means it."""
    app = with_errors()

    @app.get("/own", responses={422: {"description": "Mine.", "model": Cat}})
    async def own(number: int) -> None:
        return

    document = app.openapi()
    assert document["paths"]["/own"]["get"]["responses"]["422"]["description"] == "Mine."
    assert "Cat" in document["components"]["schemas"]


def test_the_context_of_an_error_is_the_requests() -> None:
    """Without any layer around there is no id to tell."""
    app = FastAPI()
    install(app, ErrorsSettings())
    assert "request_id" not in client_of(app).get("/nope").json()
    assert request_context.current() is None
