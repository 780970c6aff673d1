"""Problems: what they say, in which format, and how a layer refuses with one."""

import asyncio
import json
import logging
from typing import Any

import pytest
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import PlainTextResponse
from starlette.testclient import TestClient

from fastapi_hardening import Problem
from fastapi_hardening.core import context as request_context
from fastapi_hardening.core.events import Events, RequestRefused
from fastapi_hardening.core.problem import OWN, phrase, refuse, render, retry_after


class OutOfStock(Problem):
    """A problem of an application."""

    status = 409
    type = OWN + "out-of-stock"
    title = "Out of stock"


def test_a_problem_has_the_members_of_rfc_9457() -> None:
    """Standard ones first, its own behind them, nothing that was not said."""
    problem = OutOfStock("Only 3 are left.", extensions={"available": 3})
    assert list(problem.document("id-1").items()) == [
        ("type", OWN + "out-of-stock"),
        ("title", "Out of stock"),
        ("status", 409),
        ("detail", "Only 3 are left."),
        ("request_id", "id-1"),
        ("available", 3),
    ]
    assert Problem(status=404).document() == {"type": "about:blank", "title": "Not Found", "status": 404}


def test_a_single_problem_may_differ_from_its_class() -> None:
    """Status, type and title are defaults of the class."""
    problem = OutOfStock(status=410, type="https://shop.example/gone", title="Gone for good")
    assert (problem.status_code, problem.type, problem.title) == (410, "https://shop.example/gone", "Gone for good")
    assert OutOfStock.title == "Out of stock"


def test_the_slug_is_what_events_and_metrics_call_a_problem() -> None:
    """The fragment of the type, or the status where the type says nothing."""
    assert OutOfStock().slug == "out-of-stock"
    assert Problem(status=404).slug == "404"


def test_an_extension_cannot_pass_for_a_standard_member() -> None:
    """A client reads ``status`` and ``type`` as the RFC says."""
    with pytest.raises(ValueError, match="detail, status"):
        Problem(extensions={"status": 1, "detail": 2})


@pytest.mark.parametrize("status", [200, 399, 600])
def test_a_problem_is_an_error(status: int) -> None:
    """Anything else is a mistake of who wrote it."""
    with pytest.raises(ValueError, match="400 to 599"):
        Problem(status=status)


def test_phrases_are_those_of_the_rfc_whatever_the_python() -> None:
    """Python 3.11 still calls a 422 unprocessable entity."""
    assert [phrase(status) for status in (404, 413, 422, 499, 599)] == [
        "Not Found",
        "Content Too Large",
        "Unprocessable Content",
        "Client Error",
        "Server Error",
    ]


def test_a_problem_in_an_application_that_was_never_hardened_has_its_status() -> None:
    """It is an ``HTTPException``, so FastAPI's own handler answers."""
    app = FastAPI()

    @app.get("/")
    async def index() -> None:
        raise OutOfStock("Only 3 are left.", headers={"Retry-After": "5"})

    answer = TestClient(app).get("/")
    assert (answer.status_code, answer.json(), answer.headers["retry-after"]) == (
        409,
        {"detail": "Only 3 are left."},
        "5",
    )


def test_the_other_format_is_fastapis() -> None:
    """Clients that read ``detail`` go on doing so."""
    context = request_context.ensure({"type": "http"})
    context.error_format = "fastapi"
    headers, body = render(OutOfStock("Only 3 are left."), context)
    assert (b"content-type", b"application/json") in headers
    assert json.loads(body) == {"detail": "Only 3 are left."}
    assert json.loads(render(OutOfStock(), context)[1]) == {"detail": "Out of stock"}


def test_clients_are_asked_to_come_back_at_different_times() -> None:
    """From the seconds asked for to twice as many, in whole ones."""
    values = {int(retry_after(5)["Retry-After"]) for _ in range(200)}
    assert min(values) >= 5
    assert max(values) <= 10
    assert len(values) > 2
    assert int(retry_after(0.1)["Retry-After"]) == 1


# --- refusals ---------------------------------------------------------------------------------------------------------


async def _receive() -> Any:
    return {"type": "http.request"}


def refused(app: FastAPI | None = None, problem: Problem | None = None, **scope: Any) -> list[Any]:
    """The messages that a refusal sends."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    whole = {"type": "http", "method": "GET", "path": "/", "headers": [], "app": app} | scope
    asyncio.run(refuse(problem or OutOfStock("No."), whole, _receive, send, layer="shop"))
    return sent


def test_a_refusal_is_a_problem_document_with_the_id() -> None:
    """Status, media type, length and id fit together."""
    scope: dict[str, Any] = {"type": "http"}
    request_context.ensure(scope).request_id = "id-1"
    start, body = refused(**scope)
    headers = dict(start["headers"])
    assert (start["status"], headers[b"content-type"]) == (409, b"application/problem+json")
    assert int(headers[b"content-length"]) == len(body["body"])
    assert json.loads(body["body"])["request_id"] == "id-1"


def test_a_refusal_of_head_has_no_body() -> None:
    """But the length that the body would have."""
    start, body = refused(method="HEAD")
    assert body["body"] == b""
    assert int(dict(start["headers"])[b"content-length"]) > 0


@pytest.mark.parametrize("key", [409, OutOfStock, Problem, HTTPException])
def test_the_applications_own_handler_answers_a_refusal(key: Any) -> None:
    """By status or by any class of the problem; sync or async."""
    app = FastAPI()

    async def handler(request: Request, problem: Exception) -> PlainTextResponse:
        assert isinstance(problem, OutOfStock)
        return PlainTextResponse("mine", status_code=418)

    def sync_handler(request: Request, problem: Exception) -> PlainTextResponse:
        return PlainTextResponse("mine", status_code=418)

    for each in (handler, sync_handler):
        app.exception_handlers[key] = each
        start, body = refused(app)
        assert (start["status"], body["body"]) == (418, b"mine")


def test_a_handler_for_everything_is_not_asked_about_a_refusal() -> None:
    """A refusal is not an accident, and a page for accidents would hide it."""
    app = FastAPI()
    app.exception_handlers[Exception] = lambda request, error: PlainTextResponse("oops", status_code=500)
    assert refused(app)[0]["status"] == 409


def test_a_handler_that_fails_gives_way_to_the_problem(caplog: pytest.LogCaptureFixture) -> None:
    """The client gets its answer, and the log says what is broken."""
    app = FastAPI()

    @app.exception_handler(409)
    async def handler(request: Request, problem: Exception) -> PlainTextResponse:
        raise RuntimeError("broken")

    with caplog.at_level(logging.ERROR):
        assert refused(app)[0]["status"] == 409
    assert "broken" in caplog.text


@pytest.mark.parametrize(("status", "code"), [(409, 1008), (401, 1008), (429, 1013), (503, 1013), (500, 1011)])
def test_a_websocket_is_refused_by_close_where_the_server_cannot_answer(status: int, code: int) -> None:
    """The code says whether to come back."""
    [message] = refused(problem=Problem(status=status), type="websocket")
    assert (message["type"], message["code"]) == ("websocket.close", code)


def test_a_websocket_is_refused_by_an_http_answer_where_the_server_can() -> None:
    """The ASGI extension for denial responses."""
    start, body = refused(type="websocket", extensions={"websocket.http.response": {}})
    assert (start["type"], start["status"]) == ("websocket.http.response.start", 409)
    assert json.loads(body["body"])["detail"] == "No."


def test_a_refusal_is_logged_and_counted_with_the_id_of_the_client(caplog: pytest.LogCaptureFixture) -> None:
    """Whoever gets the id from a customer finds the reason."""
    events = Events()
    seen: list[RequestRefused] = []
    events.subscribe(RequestRefused, seen.append)
    scope: dict[str, Any] = {"type": "http", "client": ("203.0.113.9", 1)}
    context = request_context.ensure(scope)
    context.events = events
    with caplog.at_level(logging.INFO, "fastapi_hardening"):
        refused(**scope)
    assert seen == [RequestRefused("out-of-stock", 409, "shop", None, context.request_id, "203.0.113.9", "No.")]
    assert context.request_id in caplog.text
    assert "203.0.113.9" in caplog.text
