"""Limits on the request: what passes, what is refused with which status, and what is only reported."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Annotated, Any
from urllib.parse import unquote

import pytest
from fastapi import APIRouter, Body, Depends, FastAPI, Form, Request, WebSocket
from fastapi.responses import StreamingResponse
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from fastapi_hardening.core import context as request_context
from fastapi_hardening.core.body_meter import BodyTooLarge
from fastapi_hardening.core.clock import ManualClock
from fastapi_hardening.core.events import Events, RequestRefused
from fastapi_hardening.core.request_head import path_findings
from fastapi_hardening.security.request_limits import (
    RequestLimitReported,
    RequestLimits,
    RequestLimitsMiddleware,
    RequestLimitsSettings,
    RequestPolicy,
    declared_types,
    may_have_body,
)

Fields = list[tuple[bytes, bytes]]


def head(
    raw_path: bytes = b"/items",
    headers: Iterable[tuple[str, str]] = (("host", "shop.example"),),
    *,
    query: bytes = b"",
    method: str = "POST",
    version: str = "1.1",
    kind: str = "http",
    path: str | None = None,
) -> dict[str, Any]:
    """A scope as a server makes it."""
    return {
        "type": kind,
        "http_version": version,
        "method": method,
        "path": unquote(raw_path.decode("latin-1")) if path is None else path,
        "raw_path": raw_path,
        "query_string": query,
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in headers],
    }


HOST = ("host", "shop.example")


def statuses(scope: dict[str, Any], **changes: Any) -> list[int]:
    """What the head of a request is refused with; the quick look agrees wherever it is sure."""
    policy = RequestPolicy(RequestLimitsSettings(**changes))
    found = policy.findings(scope)
    if policy.look(scope) is not None:
        assert found == []
    return [problem.status_code for problem, refused in found if refused]


def reported(scope: dict[str, Any], **changes: Any) -> list[str | None]:
    """What the head of a request is only reported for."""
    findings = RequestPolicy(RequestLimitsSettings(**changes)).findings(scope)
    return [problem.explanation for problem, refused in findings if not refused]


# --- settings ---------------------------------------------------------------------------------------------------------


def test_the_defaults_are_those_that_do_not_hurt() -> None:
    """Ten megabytes, 500 bytes a second after ten seconds, depth 64, any host."""
    settings = RequestLimitsSettings()
    assert (settings.max_body_bytes, settings.max_json_depth) == (10_000_000, 64)
    assert (settings.min_body_bytes_per_second, settings.body_grace_seconds) == (500, 10)
    assert settings.allowed_hosts == ()


def test_an_empty_text_switches_a_limit_off() -> None:
    """As an environment variable says it."""
    settings = RequestLimitsSettings.model_validate({"max_body_bytes": "", "min_body_bytes_per_second": ""})
    assert settings.max_body_bytes is None
    assert settings.min_body_bytes_per_second is None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"allowed_hosts": ["https://shop.example"]}, "only the name"),
        ({"allowed_hosts": ["shop.example:443"]}, "has a port"),
        ({"allowed_hosts": ["::1"]}, "without brackets"),
        ({"allowed_hosts": ["[::1]:80"]}, "has a port"),
        ({"allowed_hosts": ["[::x]"]}, "is not like"),
        ({"allowed_hosts": ["sh*p.example"]}, "is not like"),
        ({"allowed_hosts": ["*."]}, "is not like"),
        ({"allowed_hosts": ["bücher.example"]}, "xn--bcher-kva.example"),
        ({"content_types": ["json"]}, "is not like"),
        ({"content_types": ["text/html; charset=utf-8"]}, "without parameters"),
        ({"max_body_bytes": -1}, "greater than or equal to 0"),
        ({"path_nulls": "deny"}, "refuse"),
        ({"max_body_size": 1}, "did you mean 'max_body_bytes'"),
    ],
)
def test_a_limit_that_cannot_be_is_refused_when_the_settings_are_made(changes: dict[str, Any], sentence: str) -> None:
    """In the settings and in an override, with the sentence that mends it."""
    with pytest.raises(ValueError, match=sentence):
        RequestLimitsSettings(**changes)
    with pytest.raises(ValueError, match=sentence):
        RequestLimits(**changes)


# --- engine: hosts ----------------------------------------------------------------------------------------------------


def test_a_foreign_host_is_421() -> None:
    """On websockets too, and where the request has no host at all."""
    hosts = {"allowed_hosts": ["shop.example"]}
    assert statuses(head(), **hosts) == []
    assert statuses(head(headers=[("host", "shop.example:8000")]), **hosts) == []
    assert statuses(head(headers=[("host", "evil.example")]), **hosts) == [421]
    assert statuses(head(headers=[("host", "evil.example")], kind="websocket"), **hosts) == [421]
    assert statuses(head(headers=[], version="1.0"), **hosts) == [421]


def test_the_host_of_an_absolute_target_counts() -> None:
    """h11 hands ``GET http://evil.example/ HTTP/1.1`` on as the path; RFC 9112, section 3.2.2."""
    absolute = head(b"http://evil.example/items//x", method="GET")
    assert statuses(absolute, allowed_hosts=["shop.example"]) == [421]
    assert statuses(head(b"http://shop.example/items", method="GET"), allowed_hosts=["shop.example"]) == []
    assert reported(absolute) == ["The path has an empty segment."]
    assert reported(head(b"http://shop.example/items", method="GET")) == []
    assert statuses(head(b"http://a@b/items", method="GET")) == [400]


@pytest.mark.parametrize(
    "host", ["a b", "a/b", "a@b", "a?b", "a#b", "a\\b", "a:b", "a:80:80", "::1", "[::1", "[x]", "é"]
)
def test_a_host_that_is_no_host_name_is_400(host: str) -> None:
    """It would break out of every URL that is made of it."""
    assert statuses(head(headers=[("host", host)])) == [400]
    assert statuses(head(headers=[("host", host)]), strict_host=False) == []


@pytest.mark.parametrize("host", ["a", "a_b.c", "a:", "a:80", "127.0.0.1:80", "[::1]", "[::1]:80", ""])
def test_a_host_name_passes(host: str) -> None:
    """With a port, an address, or nothing, as RFC 9112, section 3.2, has it."""
    assert statuses(head(headers=[("host", host)])) == []


def test_two_host_lines_are_400() -> None:
    """Also when they say the same: httptools hands them on, and every server takes another one."""
    assert statuses(head(headers=[HOST, HOST])) == [400]
    assert statuses(head(headers=[HOST, HOST]), strict_host=False) == []


def test_no_host_line_is_400_over_http_1_1_only() -> None:
    """HTTP/1.0 had none, HTTP/2 has another field for it."""
    assert statuses(head(headers=[])) == [400]
    assert statuses(head(headers=[], version="1.0")) == []
    assert statuses(head(headers=[], version="2")) == []


# --- engine: framing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        [("content-length", "3"), ("transfer-encoding", "chunked")],
        [("content-length", "3"), ("content-length", "4")],
        [("content-length", "+3")],
        [("content-length", "-3")],
        [("content-length", "3, 3")],
        [("content-length", "0x3")],
        [("content-length", "")],
        [("transfer-encoding", "xchunked")],
        [("transfer-encoding", "gzip, chunked")],
        [("transfer-encoding", "chunked"), ("transfer-encoding", "chunked")],
    ],
)
def test_framing_that_can_be_read_in_two_ways_is_400(fields: list[tuple[str, str]]) -> None:
    """RFC 9112, section 6.3; the connection ends with the answer."""
    scope = head(headers=[HOST, *fields])
    assert statuses(scope) == [400]
    assert statuses(scope, strict_framing=False) == []
    problem = RequestPolicy(RequestLimitsSettings()).findings(scope)[0].problem
    assert problem.headers == {"Connection": "close"}


def test_framing_that_can_be_read_in_one_way_passes() -> None:
    """The same length twice is one length."""
    assert statuses(head(headers=[HOST, ("content-length", "3"), ("content-length", "3")])) == []
    assert statuses(head(headers=[HOST, ("transfer-encoding", "Chunked")])) == []
    assert statuses(head(headers=[HOST, ("transfer-encoding", "chunked")], version="1.0")) == [400]


def test_http_2_connections_are_not_ended() -> None:
    """There is no such field in HTTP/2."""
    scope = head(headers=[("content-length", "11")], version="2")
    findings = RequestPolicy(RequestLimitsSettings(max_body_bytes=10)).findings(scope)
    assert [(problem.status_code, problem.headers) for problem, _ in findings] == [(413, None)]


def test_a_declared_length_is_measured_whatever_its_digits() -> None:
    """Exactly the limit passes; a number that takes seconds to read is not read."""
    for length, expected in (("10", []), ("11", [413]), ("9" * 5000, [413]), ("0" * 5000, [413])):
        assert statuses(head(headers=[HOST, ("content-length", length)]), max_body_bytes=10) == expected
    assert statuses(head(headers=[HOST, ("content-length", "9" * 18)]), max_body_bytes=None) == []


# --- engine: line and header ------------------------------------------------------------------------------------------


def test_a_long_url_is_414() -> None:
    """Path and query together; exactly the limit passes."""
    assert statuses(head(b"/" + b"a" * 5, query=b"b" * 4), max_url_bytes=10) == []
    assert statuses(head(b"/" + b"a" * 5, query=b"b" * 5), max_url_bytes=10) == [414]
    assert statuses(head(b"/" + b"a" * 100_000), max_url_bytes=None) == []
    without_raw = head(b"/aaaaaaaaaa")
    del without_raw["raw_path"]
    assert statuses(without_raw, max_url_bytes=10) == [414]
    assert statuses(without_raw, max_url_bytes=11) == []


def test_a_huge_header_is_431() -> None:
    """By lines and by bytes; uvicorn on httptools has no limit of its own."""
    assert statuses(head(headers=[HOST, ("x", "a" * 90_000)])) == [431]
    assert statuses(head(headers=[HOST, ("x" * 90_000, "a")])) == [431]
    assert statuses(head(headers=[HOST, *[("x", "a")] * 100])) == [431]
    assert statuses(head(headers=[HOST, *[(f"x{n}", "a") for n in range(100)]])) == [431]
    assert statuses(head(headers=[HOST, *[("x", "a")] * 99])) == []
    assert statuses(head(headers=[HOST, ("x", "a" * 90_000)]), max_header_bytes=None) == []
    assert statuses(head(headers=[HOST, *[("x", "a")] * 999]), max_header_count=None) == []


# --- engine: paths ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"/a/../b", {"path_traversal"}),
        (b"/..", {"path_traversal"}),
        (b"/a/%2e%2e/b", {"path_traversal"}),
        (b"/a/.%2E/b", {"path_traversal"}),
        (b"/..%2f..%2fetc/passwd", {"path_traversal", "path_encoded_slashes"}),
        (b"/%252e%252e/etc", {"path_traversal"}),
        (b"/%252e%252e%252fetc", {"path_traversal"}),
        (b"/%25252e%25252e/etc", {"path_traversal"}),
        (b"/a/..;/b", {"path_traversal", "path_parameters"}),
        (b"/..\\etc", {"path_traversal", "path_backslashes"}),
        (b"/..%5cetc", {"path_traversal", "path_backslashes"}),
        (b"/%c0%ae%c0%ae/etc", {"path_traversal"}),
        (b"/%e0%80%ae/etc", {"path_traversal"}),
        (b"/a\\b", {"path_backslashes"}),
        (b"/a%255cb", {"path_backslashes"}),
        (b"/a\0b", {"path_nulls"}),
        (b"/a%00.png", {"path_nulls"}),
        (b"/a%2500", {"path_nulls"}),
        (b"/a%2Fb", {"path_encoded_slashes"}),
        (b"/a;v=1", {"path_parameters"}),
        (b"//a", {"path_empty_segments"}),
        (b"/a/b/", set()),
        (b"/a..b/...x/.well-known/..hidden", set()),
        (b"/caf%C3%A9/100%25/a%20b", set()),
        (b"/", set()),
        (b"*", set()),
    ],
)
def test_what_is_suspicious_about_a_path(raw: bytes, expected: set[str]) -> None:
    """Plain, encoded, encoded twice and three times; a dot in a name is no traversal."""
    assert path_findings(raw) == expected
    refused = expected & {"path_traversal", "path_nulls", "path_backslashes"}
    assert statuses(head(raw)) == [400] * len(refused)
    assert len(reported(head(raw))) == len(expected - refused)
    everything = {name: "allow" for name in RequestLimitsSettings.model_fields if name.startswith("path_")}
    assert statuses(head(raw), **everything) == []


def test_a_rewritten_path_is_looked_at_as_well() -> None:
    """The router goes by ``path``, whatever was sent; a server may not tell what was sent."""
    assert statuses(head(b"/a", path="/../b")) == [400]
    without_raw = head(b"/a/../b")
    del without_raw["raw_path"]
    assert statuses(without_raw) == [400]


def test_a_policy_of_the_path_can_be_made_stricter() -> None:
    """Refused instead of reported."""
    assert statuses(head(b"/a//b"), path_empty_segments="refuse") == [400]


@given(
    st.lists(
        st.sampled_from(
            [b"/", b"..", b".", b"a", b"%2e", b"%2f", b"%5c", b"\\", b"%25", b"2e", b"%00", b";", b"%", b"\xc0"]
        )
    ),
    st.lists(
        st.sampled_from(
            [
                ("host", "a"),
                ("host", "b c"),
                ("content-length", "1"),
                ("content-length", "99"),
                ("transfer-encoding", "chunked"),
                ("content-type", "text/plain"),
                ("x", "y" * 60),
            ]
        )
    ),
    st.sampled_from(["1.0", "1.1", "2"]),
    st.sampled_from(["http", "websocket"]),
)
def test_what_the_quick_look_passes_a_close_look_passes(
    parts: list[bytes], headers: list[tuple[str, str]], version: str, kind: str
) -> None:
    """The quick look may only be more careful, and agrees on whether a body can come."""
    scope = head(b"/" + b"".join(parts), headers, version=version, kind=kind)
    policy = RequestPolicy(
        RequestLimitsSettings(max_body_bytes=50, max_header_bytes=200, max_url_bytes=20, content_types=("text/plain",))
    )
    quick = policy.look(scope)
    if quick is not None:
        assert policy.findings(scope) == []
        assert quick is may_have_body(scope)


# --- engine: content types --------------------------------------------------------------------------------------------


class Item(BaseModel):
    name: str


def dependant_of(endpoint: Callable[..., Any]) -> Any:
    app = FastAPI()
    app.post("/")(endpoint)
    route: Any = app.router.routes[-1]
    return route.dependant


def takes(content_type: str | None, declared: tuple[str, ...] = (), **changes: Any) -> bool:
    fields = [HOST, ("content-length", "1")]
    if content_type is not None:
        fields.append(("content-type", content_type))
    policy = RequestPolicy(RequestLimitsSettings(**changes), declared=declared)
    scope = head(headers=fields)
    found = [problem for problem, _ in policy.findings(scope)]
    assert (policy.look(scope) is None) == bool(found)
    assert all(problem.status_code == 415 for problem in found)
    return not found


def test_a_route_takes_the_types_that_it_declares() -> None:
    """A model is JSON; form fields are forms; in a dependency too."""

    async def model(item: Item) -> None: ...

    async def form(name: Annotated[str, Form()]) -> None: ...

    async def inner(item: Item) -> None: ...

    async def outer(found: Annotated[None, Depends(inner)]) -> None: ...

    async def several(a: Annotated[bytes, Body()], b: Annotated[bytes, Body()]) -> None: ...

    async def items(these: list[Item]) -> None: ...

    for endpoint in (model, outer, several, items):
        declared = declared_types(dependant_of(endpoint))
        assert takes("application/json; charset=utf-8", declared)
        assert takes("application/vnd.api+json", declared)
        assert takes(None, declared)
        assert not takes("text/plain", declared)
        assert not takes("application/x-www-form-urlencoded", declared)
        assert takes("text/plain", declared, check_content_type=False)
    declared = declared_types(dependant_of(form))
    assert takes("multipart/form-data; boundary=x", declared)
    assert not takes("application/json", declared)


def test_where_the_parameters_leave_a_doubt_every_type_is_taken() -> None:
    """Bytes, text, anything, another documented type, no body, no FastAPI."""

    async def raw(body: Annotated[bytes, Body()]) -> None: ...

    async def perhaps(body: Annotated[Item | str, Body()]) -> None: ...

    async def anything(body: Annotated[Any, Body()]) -> None: ...

    async def documented(item: Annotated[Item, Body(media_type="application/x-yaml")]) -> None: ...

    async def nothing() -> None: ...

    for endpoint in (raw, perhaps, anything, documented, nothing):
        assert declared_types(dependant_of(endpoint)) == ()
    assert declared_types(None) == ()


def test_a_list_of_types_takes_those_alone() -> None:
    """A body that does not say what it is, is none of them."""
    only = {"content_types": ("image/*", "application/JSON")}
    assert takes("image/png", **only)
    assert takes("application/json", **only)
    assert not takes("text/html", **only)
    assert not takes("imagex/png", **only)
    assert not takes(None, **only)
    assert statuses(head(headers=[HOST]), **only) == []
    assert statuses(head(headers=[HOST, ("content-length", "0")]), **only) in ([], [415])


# --- layer ------------------------------------------------------------------------------------------------------------


class Heard:
    """An event bus of which every event is kept."""

    def __init__(self) -> None:
        self.events = Events()
        self.all: list[Any] = []
        self.events.subscribe(object, self.all.append)


class AroundEverything:
    """Gives requests a context with the event bus of a test."""

    def __init__(self, app: Any, heard: Heard) -> None:
        self.app = app
        self.heard = heard

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            request_context.ensure(scope).events = self.heard.events
        await self.app(scope, receive, send)


def fastapi_app(heard: Heard | None = None, **changes: Any) -> FastAPI:
    app = FastAPI()
    app.add_middleware(RequestLimitsMiddleware, settings=RequestLimitsSettings(**changes))
    if heard is not None:
        app.add_middleware(AroundEverything, heard=heard)

    @app.get("/")
    async def index() -> str:
        return "ok"

    @app.post("/json")
    async def take_json(body: dict[str, Any]) -> int:
        return len(body)

    @app.post("/raw")
    async def take_raw(request: Request) -> int:
        return len(await request.body())

    @app.post("/blind")
    async def take_nothing() -> str:
        return "never looked"

    @app.websocket("/talk")
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text(await websocket.receive_text())
        await websocket.close()

    return app


def chunks(count: int, chunk: bytes = b"x" * 10) -> Iterator[bytes]:
    for _ in range(count):
        yield chunk


def test_requests_within_the_limits_pass() -> None:
    """With and without a body, over http and websockets, and the lifespan."""
    with TestClient(fastapi_app()) as client:
        assert client.get("/").json() == "ok"
        assert client.post("/json", json={"a": 1}).json() == 1
        assert client.post("/raw", content=chunks(3)).json() == 30
        with client.websocket_connect("/talk") as websocket:
            websocket.send_text("x" * 100)
            assert websocket.receive_text() == "x" * 100


def test_a_declared_body_over_the_limit_is_refused_before_the_endpoint() -> None:
    """Even where the endpoint would never read it; exactly the limit passes."""
    heard = Heard()
    client = TestClient(fastapi_app(heard, max_body_bytes=10))
    answer = client.post("/blind", content=b"x" * 11)
    assert answer.status_code == 413
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["connection"] == "close"
    assert answer.json()["max_body_bytes"] == 10
    assert client.post("/raw", content=b"x" * 10).json() == 10
    assert [(type(event), event.status, event.layer) for event in heard.all] == [
        (RequestRefused, 413, "request limits")
    ]


def test_a_chunked_body_over_the_limit_is_refused_where_it_is_read() -> None:
    """As a problem raised inside ``receive``; told once."""
    heard = Heard()
    client = TestClient(fastapi_app(heard, max_body_bytes=10))
    assert client.post("/raw", content=chunks(1)).json() == 10
    answer = client.post("/raw", content=chunks(2))
    assert (answer.status_code, answer.headers["connection"]) == (413, "close")
    assert [(event.problem, event.status) for event in heard.all] == [("413", 413)]


def test_a_depth_bomb_is_400_for_json_alone() -> None:
    """Split over chunks, before it is parsed; where the body says nothing and the route declares JSON, too."""
    client = TestClient(fastapi_app())
    bomb = [b"[" * 40, b"[" * 40]
    as_json = {"content-type": "application/vnd.x+json"}
    assert client.post("/raw", content=iter(bomb), headers=as_json).status_code == 400
    assert client.post("/raw", content=iter(bomb), headers={"content-type": "text/plain"}).status_code == 200
    assert client.post("/raw", content=iter(bomb)).status_code == 200
    answer = client.post("/json", content=iter([b'{"a":', *bomb]))
    assert (answer.status_code, answer.json()["detail"]) == (400, "The JSON body nests too deep.")


def test_traversal_is_400_and_an_encoded_slash_is_reported() -> None:
    """The endpoint of a catch-all route is not reached."""
    heard = Heard()
    app = fastapi_app(heard)

    @app.get("/files/{name:path}")
    async def read(name: str) -> str:
        return name

    client = TestClient(app)
    assert client.get("/files/..%2fetc%2fpasswd").status_code == 400
    assert client.get("/files/%252e%252e/etc").status_code == 400
    assert client.get("/files/a%00b").status_code == 400
    assert [event.status for event in heard.all] == [400, 400, 400] or RequestLimitReported in map(type, heard.all)
    heard.all.clear()
    assert client.get("/files/a%2Fb").json() == "a/b"
    (event,) = heard.all
    assert isinstance(event, RequestLimitReported)
    assert (event.problem, event.status, event.detail) == ("UnsafePath", 400, "The path has an encoded slash.")
    assert (event.template, event.client) == ("/files/{name}", "testclient")


def test_a_websocket_handshake_is_refused_by_its_head() -> None:
    """Its messages are the business of another limit."""
    client = TestClient(fastapi_app(allowed_hosts=["shop.example"]))
    with client.websocket_connect("/talk", headers={"host": "shop.example:80"}) as websocket:
        websocket.send_text("hi")
        assert websocket.receive_text() == "hi"
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/talk", headers={"host": "evil.example"}):
        raise AssertionError("was accepted")


def test_hosts_of_the_whole_settings_are_added() -> None:
    """Named in either place, a host is served."""
    app = FastAPI()
    settings = RequestLimitsSettings(allowed_hosts=("a.example",))
    app.add_middleware(RequestLimitsMiddleware, settings=settings, allowed_hosts=["*.b.example"])
    client = TestClient(app)
    for host, status in (("a.example", 404), ("x.b.example:1", 404), ("c.example", 421)):
        assert client.get("/", headers={"host": host}).status_code == status


def test_switched_off_everything_passes() -> None:
    """Whatever it is."""
    client = TestClient(fastapi_app(enabled=False, max_body_bytes=1))
    assert client.post("/raw", content=b"xx", headers={"host": "a b"}).json() == 2


def test_reporting_only_refuses_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """The head, the length, the depth: each is told, as an event and in the log, and passes."""
    caplog.set_level(logging.INFO, logger="fastapi_hardening.request_limits")
    heard = Heard()
    client = TestClient(fastapi_app(heard, report_only=True, max_body_bytes=10, max_json_depth=1))
    assert client.post("/raw", content=b"x" * 11, headers={"host": "a b"}).json() == 11
    assert [event.status for event in heard.all] == [400, 413, 413]
    heard.all.clear()
    assert client.post("/raw", content=chunks(2, b'[[{"a":')).json() == 14
    assert client.post("/json", json={"a": []}).json() == 1
    assert {type(event) for event in heard.all} == {RequestLimitReported}
    assert [event.problem for event in heard.all] == ["BodyTooLarge", "JsonTooDeep"]
    assert "not refused with 413" in caplog.text


def test_it_works_on_starlette() -> None:
    """A problem raised while the body is read has the right status there."""

    async def take(request: Any) -> Response:
        return PlainTextResponse(str(len(await request.body())))

    app = Starlette(routes=[Route("/", take, methods=["POST"])])
    app.add_middleware(RequestLimitsMiddleware, settings=RequestLimitsSettings(max_body_bytes=10))
    client = TestClient(app)
    assert client.post("/", content=chunks(1)).text == "10"
    assert client.post("/", content=chunks(2)).status_code == 413
    assert client.get("/../x%00").status_code == 400


Receive = Callable[[], Awaitable[dict[str, Any]]]


def answered(
    application: Any, receive: Receive, *, clock: ManualClock | None = None, **changes: Any
) -> tuple[list[dict[str, Any]], list[Any]]:
    """What is sent and which events are told where this application stands below the layer alone."""
    sent: list[dict[str, Any]] = []
    heard = Heard()

    async def send(message: Any) -> None:
        sent.append(message)

    async def run() -> None:
        layer = RequestLimitsMiddleware(application, RequestLimitsSettings(**changes), clock=clock)
        scope = head(headers=[HOST, ("transfer-encoding", "chunked")])
        await AroundEverything(layer, heard)(scope, receive, send)

    asyncio.run(run())
    return sent, heard.all


def endless(chunk: bytes = b"x") -> Receive:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": chunk, "more_body": True}

    return receive


async def silence() -> dict[str, Any]:
    await asyncio.Event().wait()
    raise AssertionError


async def reader(scope: Any, receive: Any, send: Any) -> None:
    """Reads to the end, and answers 204."""
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body"})


def test_a_bare_application_that_lets_the_problem_through_is_answered_for() -> None:
    """Even where it comes in a group of exceptions, as from a task group."""

    async def grouping(scope: Any, receive: Any, send: Any) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(reader(scope, receive, send))

    for application in (reader, grouping):
        sent, events = answered(application, endless(), max_body_bytes=10)
        assert [message.get("status") for message in sent] == [413, None]
        assert [event.status for event in events] == [413]


def test_a_refusal_that_the_application_takes_for_an_accident_is_still_a_refusal() -> None:
    """A middleware with a task group wraps it, the application's own last resort answers 500: the client gets 413."""

    async def last_resort(scope: Any, receive: Any, send: Any) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(reader(scope, receive, send))
        except ExceptionGroup:
            await send({"type": "http.response.start", "status": 500, "headers": []})
            await send({"type": "http.response.body", "body": b"Internal Server Error"})
            raise

    async def silent(scope: Any, receive: Any, send: Any) -> None:
        with contextlib.suppress(BodyTooLarge):
            await reader(scope, receive, send)

    for application in (last_resort, silent):
        sent, events = answered(application, endless(), max_body_bytes=10)
        assert [message.get("status") for message in sent] == [413, None]
        assert [event.status for event in events] == [413]


def test_a_500_that_the_application_means_is_sent() -> None:
    """Its handler of the refusal failed, or it chose that status; in one message or in many."""

    async def failing(scope: Any, receive: Any, send: Any) -> None:
        try:
            await reader(scope, receive, send)
        except BodyTooLarge:
            await send({"type": "http.response.start", "status": 500, "headers": []})
            for _ in range(parts):
                await send({"type": "http.response.body", "body": b"a", "more_body": True})
            await send({"type": "http.response.body", "body": b"b"})

    async def raising(scope: Any, receive: Any, send: Any) -> None:
        await failing(scope, receive, send)
        raise KeyError("x")

    for parts in (0, 1, 9):
        sent, events = answered(failing, endless(), max_body_bytes=10)
        assert [message.get("status", message.get("body")) for message in sent] == [500, *[b"a"] * parts, b"b"]
        assert [event.status for event in events] == [413]
    with pytest.raises(KeyError):
        answered(raising, endless(), max_body_bytes=10)


def test_an_error_of_the_application_is_its_own() -> None:
    """The layer answers only for what it has raised, and before an answer has begun."""

    async def failing(scope: Any, receive: Any, send: Any) -> None:
        raise KeyError("x")

    async def answering(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await reader(scope, receive, send)

    with pytest.raises(KeyError):
        answered(failing, endless())
    with pytest.raises(BodyTooLarge):
        answered(answering, endless(), max_body_bytes=10)


def test_an_application_that_answers_the_problem_itself_is_told_of_once() -> None:
    """The event does not depend on who answers."""

    async def catching(scope: Any, receive: Any, send: Any) -> None:
        try:
            await reader(scope, receive, send)
        except BodyTooLarge:
            await send({"type": "http.response.start", "status": 413, "headers": []})
            await send({"type": "http.response.body"})

    sent, events = answered(catching, endless(), max_body_bytes=10)
    assert [message.get("status") for message in sent] == [413, None]
    assert [event.status for event in events] == [413]


def test_a_slow_drip_is_408() -> None:
    """A hundred bytes a second: after ten seconds that is too slow; a fast body takes as long as it needs."""
    clock = ManualClock()

    def dripping(bytes_a_second: int, seconds: int) -> Receive:
        left = seconds

        async def receive() -> dict[str, Any]:
            nonlocal left
            left -= 1
            clock.advance(1)
            return {"type": "http.request", "body": b"x" * bytes_a_second, "more_body": left > 0}

        return receive

    assert answered(reader, dripping(100, 9), clock=clock)[0][0]["status"] == 204
    sent, events = answered(reader, dripping(100, 60), clock=clock)
    assert sent[0]["status"] == 408
    assert (b"connection", b"close") in sent[0]["headers"]
    assert [event.status for event in events] == [408]
    assert answered(reader, dripping(600, 60), clock=clock)[0][0]["status"] == 204
    off = answered(reader, dripping(1, 60), clock=clock, min_body_bytes_per_second=None)
    assert off[0][0]["status"] == 204
    reporting, events = answered(reader, dripping(1, 60), clock=clock, report_only=True)
    assert (reporting[0]["status"], [type(event) for event in events]) == (204, [RequestLimitReported])


def test_time_that_the_application_takes_is_not_the_clients() -> None:
    """Only waiting for the body counts."""
    clock = ManualClock()
    left = 3

    async def receive() -> dict[str, Any]:
        nonlocal left
        left -= 1
        return {"type": "http.request", "body": b"x", "more_body": left > 0}

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        clock.advance(3600)
        await receive()
        clock.advance(3600)
        await reader(scope, receive, send)

    assert answered(slow, receive, clock=clock)[0][0]["status"] == 204


def test_a_body_that_stops_is_408_while_it_is_waited_for() -> None:
    """A grace of nothing makes the deadline now; the wait is interrupted."""
    sent, events = answered(reader, silence, body_grace_seconds=0)
    assert sent[0]["status"] == 408
    assert [event.status for event in events] == [408]


def test_the_deadline_moves_with_what_has_come() -> None:
    """The timer rings, sees that there is patience left, and is set again; it rings in vain while nobody waits."""
    clock = ManualClock()
    messages = iter([(b"x" * 10, False), (b"x", False)])

    async def receive() -> dict[str, Any]:
        # The machine's time goes on, and the clock of the layer does not: the first rings come too early.
        body, _ = next(messages, (b"", True))
        if not body:
            clock.advance(60)
            return await silence()
        await asyncio.sleep(0.002)
        return {"type": "http.request", "body": body, "more_body": True}

    async def pausing(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await asyncio.sleep(0.005)
        await reader(scope, receive, send)

    sent, _ = answered(pausing, receive, clock=clock, body_grace_seconds=0.001, min_body_bytes_per_second=1e9)
    assert sent[0]["status"] == 408


def test_a_body_that_stops_is_only_reported_where_nothing_is_refused() -> None:
    """The wait goes on until the client goes."""

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0.002)
        return {"type": "http.disconnect"}

    sent, events = answered(reader, receive, body_grace_seconds=0, report_only=True)
    assert sent[0]["status"] == 204
    assert [type(event) for event in events] == [RequestLimitReported]


def test_a_cancelled_request_stays_cancelled() -> None:
    """A server that gives up is not answered with a problem."""

    async def run() -> None:
        layer = RequestLimitsMiddleware(reader)
        scope = head(headers=[HOST, ("transfer-encoding", "chunked")])
        task = asyncio.create_task(layer(scope, silence, silence))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())


def test_once_the_answer_has_begun_slowness_is_not_judged() -> None:
    """An endpoint that answers while it reads, or never reads, is not cut."""

    async def answering(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await receive()
        await send({"type": "http.response.body"})

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0.002)
        return {"type": "http.request", "body": b"", "more_body": True}

    sent, events = answered(answering, receive, body_grace_seconds=0)
    assert [message.get("status") for message in sent] == [200, None]
    assert events == []


def test_who_listens_for_the_client_to_go_may_listen_for_ever() -> None:
    """When the body has ended, a stream has no deadline."""
    ended = False

    async def receive() -> dict[str, Any]:
        nonlocal ended
        if ended:
            await asyncio.sleep(0.002)
            return {"type": "http.disconnect"}
        ended = True
        return {"type": "http.request", "body": b"", "more_body": False}

    async def listening(scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["type"] == "http.request"
        assert (await receive())["type"] == "http.disconnect"
        assert (await receive())["type"] == "http.disconnect"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    assert answered(listening, receive, body_grace_seconds=0)[0][0]["status"] == 200


def test_a_stream_after_a_body_is_not_cut() -> None:
    """Starlette listens for the client while it streams."""
    app = fastapi_app(body_grace_seconds=0)

    @app.post("/stream")
    async def stream(body: dict[str, Any]) -> StreamingResponse:
        async def parts() -> Any:
            for _ in range(3):
                await asyncio.sleep(0.001)
                yield "part "

        return StreamingResponse(parts())

    assert TestClient(app).post("/stream", json={}).text == "part part part "


# --- override ---------------------------------------------------------------------------------------------------------


async def _length(request: Request) -> int:
    return len(await request.body())


def app_with_overrides(app: FastAPI) -> FastAPI:
    router = APIRouter(dependencies=[RequestLimits(max_body_bytes=20, max_json_depth=2)])
    router.post("/router")(_length)
    router.post("/route", dependencies=[RequestLimits(max_body_bytes=30)])(_length)
    router.post("/free", dependencies=[RequestLimits(enabled=False)])(_length)
    app.include_router(router, prefix="/r")
    return app


def test_the_innermost_limit_holds_and_the_others_stay() -> None:
    """Limit by limit: what the router says and the route does not contradict still holds."""
    client = TestClient(app_with_overrides(fastapi_app(max_body_bytes=10)))
    for path, fits in (("/raw", 10), ("/r/router", 20), ("/r/route", 30)):
        assert client.post(path, content=b"x" * fits).json() == fits
        assert client.post(path, content=b"x" * (fits + 1)).status_code == 413
        assert client.post(path, content=iter([b"x" * fits, b"x"])).status_code == 413
    deep = {"content-type": "application/json"}
    assert client.post("/r/route", content=b"[[[]]]", headers=deep).status_code == 400
    assert client.post("/r/free", content=b"[[[" * 99, headers=deep).json() == 297


class Rewrite:
    """A middleware of the application that sends everything to one route."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(dict(scope) | {"path": "/r/" + scope["path"].rpartition("/")[2]}, receive, send)


def rewritten(**changes: Any) -> TestClient:
    app = FastAPI()
    app_with_overrides(app)
    app.add_middleware(Rewrite)
    app.add_middleware(RequestLimitsMiddleware, settings=RequestLimitsSettings(**changes))
    return TestClient(app)


def test_an_override_holds_where_a_middleware_rewrote_the_path() -> None:
    """The layer goes on with what it learnt of late; what is exceeded already is refused."""
    client = rewritten()
    assert client.post("/route", content=b"x" * 30).json() == 30
    assert client.post("/route", content=b"x" * 31).status_code == 413
    assert client.post("/route", content=iter([b"x" * 30, b"x"])).status_code == 413
    assert client.post("/free", content=b"x" * 999).json() == 999


def unhardened() -> FastAPI:
    app = app_with_overrides(FastAPI())

    @app.post("/json", dependencies=[RequestLimits(max_body_bytes=20)])
    async def take_json(body: dict[str, Any]) -> int:
        return len(body)

    @app.post("/form", dependencies=[RequestLimits(max_body_bytes=20)])
    async def take_form(name: Annotated[str, Form()]) -> str:
        return name

    @app.get("/host", dependencies=[RequestLimits(allowed_hosts=("shop.example",), path_empty_segments="report")])
    async def host() -> str:
        return "ok"

    @app.websocket("/talk")
    async def talk(websocket: WebSocket, _limit: Annotated[None, RequestLimits(max_url_bytes=10)]) -> None:
        await websocket.accept()
        await websocket.close()

    return app


def test_without_the_layer_an_override_enforces_what_it_names() -> None:
    """On an application that was never hardened: declared, streamed, read already, by the head."""
    client = TestClient(unhardened())
    assert client.post("/r/route", content=iter([b"x" * 30])).json() == 30
    assert client.post("/r/route", content=b"x" * 31).status_code == 413
    assert client.post("/r/router", content=iter([b"x" * 20, b"x"])).status_code == 413
    assert client.post("/r/free", content=b"x" * 999).json() == 999
    as_json = {"content-type": "application/json"}
    assert client.post("/json", content=iter([b'{"a": 1}']), headers=as_json).json() == 1
    assert client.post("/json", content=iter([b'{"a": "%s"}' % (b"x" * 20)]), headers=as_json).status_code == 413
    assert client.get("/host", headers={"host": "shop.example:80"}).json() == "ok"
    assert client.get("/host", headers={"host": "evil.example"}).status_code == 421
    with client.websocket_connect("/talk"):
        pass
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/talk?" + "x" * 20):
        raise AssertionError("was accepted")


def test_without_the_layer_a_form_has_to_say_its_length() -> None:
    """It was read before anybody could count it."""
    client = TestClient(unhardened())
    form = {"content-type": "application/x-www-form-urlencoded"}
    assert client.post("/form", content=b"name=x", headers=form).json() == "x"
    assert client.post("/form", content=b"name=" + b"x" * 20, headers=form).status_code == 413
    assert client.post("/form", content=iter([b"name=x"]), headers=form).status_code == 411


def test_without_the_layer_a_report_is_a_report() -> None:
    """And a limit that only reports refuses nothing."""
    heard = Heard()
    app = FastAPI()
    app.post("/", dependencies=[RequestLimits(max_body_bytes=1, report_only=True)])(_length)
    app.add_middleware(AroundEverything, heard=heard)
    assert TestClient(app).post("/", content=b"xx").json() == 2
    assert {type(event) for event in heard.all} == {RequestLimitReported}


# --- FastAPI's own limit ----------------------------------------------------------------------------------------------


def test_fastapis_own_limit_of_a_route_takes_the_place_of_the_setting() -> None:
    """On a route, a router and an include; an override counts more, but cannot lift what FastAPI enforces itself."""
    app = fastapi_app(max_body_bytes=10)
    router = APIRouter()
    router.post("/larger", max_body_size=20)(_length)
    router.post("/include")(_length)
    router.post("/smaller", max_body_size=20, dependencies=[RequestLimits(max_body_bytes=5)])(_length)
    app.include_router(router, prefix="/r", max_body_size=15)
    client = TestClient(app)
    for path, fits in (("/r/larger", 20), ("/r/include", 15), ("/r/smaller", 5)):
        assert client.post(path, content=b"x" * fits).json() == fits
        answer = client.post(path, content=b"x" * (fits + 1))
        assert (answer.status_code, answer.json()["max_body_bytes"]) == (413, fits)
