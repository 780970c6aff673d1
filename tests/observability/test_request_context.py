"""The request id and what else is known of a request."""

import asyncio
import re
from typing import Any

import pytest
from fastapi import FastAPI, WebSocket
from fastapi.responses import PlainTextResponse, Response
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.testclient import TestClient

from fastapi_hardening import CurrentRequest, RequestId
from fastapi_hardening.core import context as request_context
from fastapi_hardening.core.client_ip import ClientAddressResolver
from fastapi_hardening.core.clock import ManualClock
from fastapi_hardening.observability.request_context import (
    ContextMaker,
    RequestContextMiddleware,
    RequestIdSettings,
    well_formed,
)


def hardened(**changes: Any) -> FastAPI:
    app = FastAPI()
    app.add_middleware(RequestContextMiddleware, settings=RequestIdSettings(**changes))

    @app.get("/")
    async def index(request_id: RequestId) -> str:
        return request_id

    return app


def test_the_answer_and_the_endpoint_have_the_same_id() -> None:
    """A fresh one for each request."""
    client = TestClient(hardened())
    answers = [client.get("/") for _ in range(2)]
    assert [answer.json() for answer in answers] == [answer.headers["x-request-id"] for answer in answers]
    assert len({answer.json() for answer in answers}) == 2


def test_a_well_formed_id_of_the_client_is_kept() -> None:
    """So that it can be followed through several services."""
    answer = TestClient(hardened()).get("/", headers={"X-Request-ID": "order-17.a_B"})
    assert answer.headers["x-request-id"] == answer.json() == "order-17.a_B"


@pytest.mark.parametrize(
    "sent", [b"", b"a b", b"a\tb", b"x" * 129, "é".encode(), b"a;b", b"<script>", b'{"a":1}', b"a\x00", b"$(id)"]
)
def test_anything_else_is_replaced(sent: bytes) -> None:
    """Nothing that could forge a log line or a header gets into either."""
    client = TestClient(hardened())
    answer = client.get("/", headers=[(b"x-request-id", sent)])
    assert len(answer.headers["x-request-id"]) == 32


def test_two_ids_are_none() -> None:
    """Which of them would be logged, would be up to the client."""
    answer = TestClient(hardened()).get("/", headers=[("X-Request-ID", "a"), ("X-Request-ID", "b")])
    assert len(answer.headers["x-request-id"]) == 32


def test_clients_may_be_kept_from_choosing() -> None:
    """Where ids are also used for something else."""
    answer = TestClient(hardened(trust_incoming=False)).get("/", headers={"X-Request-ID": "mine"})
    assert answer.headers["x-request-id"] != "mine"


def test_the_field_may_have_another_name() -> None:
    """In both directions."""
    answer = TestClient(hardened(header="X-Correlation-ID")).get("/", headers={"X-Correlation-ID": "mine"})
    assert answer.headers["x-correlation-id"] == "mine"
    assert "x-request-id" not in answer.headers


def test_an_id_that_the_application_sets_itself_gives_way() -> None:
    """One answer has one id, the one in the log."""
    app = hardened()
    app.add_api_route("/own", lambda: Response("", headers={"X-Request-ID": "own"}))
    assert TestClient(app).get("/own").headers.get_list("x-request-id") != ["own"]
    assert len(TestClient(app).get("/own").headers.get_list("x-request-id")) == 1


def test_switched_off_the_context_is_there_and_the_field_is_not() -> None:
    """Other layers still need to know."""
    answer = TestClient(hardened(enabled=False)).get("/")
    assert len(answer.json()) == 32
    assert "x-request-id" not in answer.headers


def test_it_works_alone_on_starlette_and_on_websockets() -> None:
    """The handshake's answer carries the id as well."""
    app = Starlette(routes=[Route("/", lambda request: PlainTextResponse("ok"))])
    app.add_middleware(RequestContextMiddleware)
    assert len(TestClient(app).get("/").headers["x-request-id"]) == 32
    fastapi = hardened()

    @fastapi.websocket("/talk")
    async def talk(websocket: WebSocket, request_id: RequestId) -> None:
        await websocket.accept()
        await websocket.send_text(request_id)

    with TestClient(fastapi).websocket_connect("/talk") as websocket:
        fields: Any = websocket.extra_headers
        assert websocket.receive_text().encode() == dict(fields)[b"x-request-id"]


def test_the_dependency_works_without_the_layer() -> None:
    """The id is then made where it is first asked for."""
    app = FastAPI()

    @app.get("/")
    async def index(request_id: RequestId) -> str:
        return request_id

    assert len(TestClient(app).get("/").json()) == 32


@given(st.binary(max_size=140) | st.text("abzAZ09._-", max_size=130).map(str.encode))
def test_what_is_well_formed_is_what_a_pattern_says(request_id: bytes) -> None:
    """Plain letters, digits and three signs: harmless in logs, headers and shells."""
    assert well_formed(request_id) == bool(re.fullmatch(rb"[A-Za-z0-9._-]{1,128}", request_id))


def seen(scope: dict[str, Any], **collaborators: Any) -> request_context.RequestContext:
    """The context that an application finds."""
    found: list[request_context.RequestContext] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        context = request_context.current()
        assert context is request_context.of(scope)
        assert context is not None
        found.append(context)

    layer = RequestContextMiddleware(app, maker=ContextMaker(RequestIdSettings(), **collaborators))
    whole = {"type": "http", "method": "GET", "path": "/", "headers": []} | scope

    async def run() -> None:
        await layer(whole, _never, _never)
        assert request_context.current() is None

    asyncio.run(run())
    return found[0]


async def _never(*_: Any) -> Any:
    raise AssertionError("nothing is received or sent here")


def test_the_context_knows_when_who_and_how() -> None:
    """Start, client, TLS and trace."""
    context = seen(
        {
            "client": ("10.0.0.1", 1),
            "headers": [
                (b"x-forwarded-for", b"203.0.113.9"),
                (b"x-forwarded-proto", b"https"),
                (b"traceparent", b"00-1-2-01"),
            ],
        },
        clock=ManualClock(monotonic=7),
        client_addresses=ClientAddressResolver(["10.0.0.1"]),
    )
    assert (context.started, context.client.address, context.secure) == (7, "203.0.113.9", True)
    assert context.traceparent == b"00-1-2-01"


def test_tls_in_front_of_a_proxy_is_believed_only_of_a_trusted_one() -> None:
    """HSTS on plain HTTP would lock people out of it."""
    claim = {"client": ("10.0.0.1", 1), "headers": [(b"x-forwarded-proto", b"https")]}
    assert not seen(claim).secure
    assert seen({"scheme": "https"}).secure


def test_a_context_that_is_there_is_left_alone() -> None:
    """The outermost layer makes it, and there is one."""
    outer = RequestContextMiddleware(hardened(), settings=RequestIdSettings(header="X-Outer"))
    answer = TestClient(outer).get("/")
    assert answer.headers["x-outer"] == answer.json()
    assert "x-request-id" not in answer.headers


def test_the_current_context_ends_with_the_request_also_when_it_fails() -> None:
    """Or the next request on the connection would log under this one's id."""

    async def fails(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("no")

    async def run() -> None:
        with pytest.raises(RuntimeError):
            await RequestContextMiddleware(fails)({"type": "http", "path": "/", "headers": []}, _never, _never)
        assert request_context.current() is None

    asyncio.run(run())


def test_the_id_of_a_probe_follows_the_same_rules() -> None:
    """It is answered above the layer."""
    maker = ContextMaker(RequestIdSettings())
    assert maker.make({"headers": [(b"x-request-id", b"mine")]}).request_id == "mine"
    assert maker.make({"headers": [(b"x-request-id", b"a b")]}).request_id != "a b"


def test_an_endpoint_may_ask_for_all_that_is_known() -> None:
    """Such as the address that limits and logs go by."""
    app = hardened()

    @app.get("/who")
    async def who(current: CurrentRequest) -> list[str]:
        return [current.client.address, current.request_id]

    answer = TestClient(app).get("/who")
    assert answer.json() == ["testclient", answer.headers["x-request-id"]]
