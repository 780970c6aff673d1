"""The report route: what it takes, what it refuses, what it makes of what anybody can write."""

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI, WebSocket
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.testclient import TestClient
from starlette.types import Message

from fastapi_hardening import Settings, harden
from fastapi_hardening.core.clock import ManualClock
from fastapi_hardening.core.csp import DIRECTIVES
from fastapi_hardening.core.events import Events, RequestRefused
from fastapi_hardening.security.csp_reports import (
    REPORT,
    REPORTS,
    CspReportsMiddleware,
    CspReportsSettings,
    CspViolationReported,
    violations,
)

PATH = "/.well-known/csp-reports"
LOGGER = "fastapi_hardening.csp_reports"

# As Chromium and Firefox send them.
NEW = {
    "effectiveDirective": "script-src-elem",
    "disposition": "enforce",
    "blockedURL": "inline",
    "documentURL": "https://shop.example/basket?token=secret#part",
    "sourceFile": "https://shop.example/static/shop.js?v=secret",
    "lineNumber": 12,
    "originalPolicy": "script-src 'self'",
    "sample": "alert('secret')",
}
OLD = {
    "violated-directive": "img-src https://a.example",
    "blocked-uri": "https://user:secret@evil.example:8443/pixel.png?secret",
    "document-uri": "https://shop.example/basket",
    "disposition": "report",
}


def new(*bodies: Any, kind: str = "csp-violation") -> bytes:
    return json.dumps(
        [{"type": kind, "age": 1, "url": "https://shop.example/", "body": body} for body in bodies]
    ).encode()


def old(body: Any) -> bytes:
    return json.dumps({"csp-report": body}).encode()


# --- engine -----------------------------------------------------------------------------------------------------------


def test_a_report_is_read_in_the_newer_form() -> None:
    """Several may come at once, and of addresses nothing stays that could be secret."""
    assert (
        list(violations(new(NEW, NEW), REPORTS))
        == [
            CspViolationReported(
                "script-src-elem", "enforce", "inline", "/basket", "https://shop.example/static/shop.js", 12
            )
        ]
        * 2
    )


def test_a_report_is_read_in_the_older_form() -> None:
    """Whose directive may be told with its sources, under an older name still."""
    assert list(violations(old(OLD), REPORT)) == [
        CspViolationReported("img-src", "report", "https://evil.example:8443", "/basket", None, None)
    ]
    [violation] = violations(old({"effective-directive": "style-src-attr"} | OLD), REPORT)
    assert violation.directive == "style-src-attr"


def test_one_report_may_come_without_a_list() -> None:
    """Some versions of WebKit send it so."""
    [report] = json.loads(new(NEW))
    assert len(list(violations(json.dumps(report).encode(), REPORTS))) == 1


@pytest.mark.parametrize(
    "body",
    [
        new(NEW, kind="deprecation"),
        new(None),
        new("text"),
        b"[]",
        new(NEW | {"blockedURL": "chrome-extension://abc/x.js"}),
        new(NEW | {"sourceFile": "moz-extension://abc/x.js"}),
    ],
)
def test_what_is_no_violation_of_the_page_is_passed_over(body: bytes) -> None:
    """Reports of other kinds, and what an extension of the browser did."""
    assert list(violations(body, REPORTS)) == []


@pytest.mark.parametrize(
    ("body", "media_type"),
    [
        (b"", REPORTS),
        (b"{", REPORTS),
        (b"\xff\xfe", REPORTS),
        (b'"text"', REPORTS),
        (b"[1]", REPORTS),
        (b"[" * 16_000, REPORTS),
        (b"9" * 9_000, REPORT),
        (b"[]", REPORT),
        (b"{}", REPORT),
        (b'{"csp-report": []}', REPORT),
    ],
)
def test_what_is_no_report_is_refused(body: bytes, media_type: str) -> None:
    """However deep it nests, and whatever number it is."""
    with pytest.raises(ValueError, match=r"."):
        list(violations(body, media_type))


@pytest.mark.parametrize(
    ("member", "value", "attribute", "told"),
    [
        ("effectiveDirective", "script-src'\n", "directive", "other"),
        ("effectiveDirective", "x" * 5_000, "directive", "other"),
        ("effectiveDirective", 7, "directive", "other"),
        ("disposition", "<script>", "disposition", "enforce"),
        ("blockedURL", "INLINE\r\nforged line", "blocked", "unknown"),
        ("blockedURL", "data", "blocked", "data"),
        ("blockedURL", "blob:https://a/b", "blocked", "blob"),
        ("blockedURL", "http://[::1", "blocked", "unknown"),
        ("blockedURL", None, "blocked", "unknown"),
        ("documentURL", "https://a/\x1b[31mred é", "page", "/?[31mred??"),
        ("documentURL", "https://a/" + "x" * 5_000, "page", "/" + "x" * 199),
        ("documentURL", None, "page", "/"),
        ("sourceFile", 7, "source", None),
        ("lineNumber", "12", "line", None),
        ("lineNumber", -1, "line", None),
        ("lineNumber", 10**9, "line", None),
    ],
)
def test_what_a_report_says_is_made_harmless(member: str, value: Any, attribute: str, told: Any) -> None:
    """Anybody can write one."""
    [violation] = violations(new(NEW | {member: value}), REPORTS)
    assert getattr(violation, attribute) == told


text = st.text(st.characters(max_codepoint=0x17F), max_size=300)
anything = st.none() | st.booleans() | st.integers() | text | text.map("https://{}".format) | st.lists(text, max_size=2)


@given(st.dictionaries(st.sampled_from([*NEW, *OLD]), anything), st.booleans())
def test_whatever_is_in_a_report_the_event_is_bounded(body: dict[str, Any], newer: bool) -> None:
    """In the number of its names, in length, and in characters."""
    for violation in violations(new(body) if newer else old(body), REPORTS if newer else REPORT):
        assert violation.directive in (*DIRECTIVES, "other")
        assert violation.disposition in ("enforce", "report")
        for text in (violation.blocked, violation.page, violation.source or ""):
            assert len(text) <= 200
            assert all(" " < character <= "~" for character in text)


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"path": "reports"}, "is no path"),
        ({"path": "//evil.example"}, "is no path"),
        ({"path": "/a;b"}, "is no path"),
        ({"limit": "1/minute; 5/hour"}, "one limit"),
        ({"log_limit": "often"}, "is not a limit"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], sentence: str) -> None:
    """With what they should look like."""
    with pytest.raises(ValueError, match=sentence):
        CspReportsSettings(**changes)


# --- layer ------------------------------------------------------------------------------------------------------------


def client(events: Events | None = None, clock: ManualClock | None = None, **settings: Any) -> TestClient:
    app = FastAPI()
    checked = CspReportsSettings.model_validate({"enabled": True} | settings)
    app.add_middleware(CspReportsMiddleware, settings=checked, events=events, clock=clock or ManualClock())
    return TestClient(app)


def post(client: TestClient, body: bytes, media_type: str = REPORTS) -> Any:
    return client.post(PATH, content=body, headers={"content-type": media_type})


@pytest.mark.parametrize(
    ("body", "media_type"), [(new(NEW), REPORTS), (old(OLD), REPORT), (new(NEW), REPORTS.upper() + "; charset=utf-8")]
)
def test_a_report_is_taken(body: bytes, media_type: str) -> None:
    """And nothing is said about it."""
    events = Events()
    answer = post(client(events), body, media_type)
    assert (answer.status_code, answer.content) == (204, b"")
    assert events.count(CspViolationReported) == 1


@pytest.mark.parametrize(
    ("body", "media_type", "status"),
    [
        (b"secret", REPORTS, 400),
        (new(NEW), "application/json", 415),
        (new(NEW), "text/plain", 415),
        (new(NEW) + b" " * 16_384, REPORTS, 413),
    ],
)
def test_anything_else_is_refused_without_an_echo(body: bytes, media_type: str, status: int) -> None:
    """Also where a form of another site sends it."""
    events = Events()
    answer = post(client(events), body, media_type)
    assert answer.status_code == status
    assert "secret" not in answer.text
    assert events.count(CspViolationReported) == 0


def test_a_body_without_a_length_is_counted_as_it_comes() -> None:
    """And not read to its end when it is too large."""
    taken: list[int] = []

    def chunks() -> Any:
        for number in range(20):
            taken.append(number)
            yield b" " * 1_000

    answer = client(max_bytes=3_000).post(PATH, content=chunks(), headers={"content-type": REPORTS})
    assert answer.status_code == 413
    assert answer.json()["max_bytes"] == 3_000


@pytest.mark.anyio
async def test_no_more_is_asked_for_than_is_needed() -> None:
    """A body that is too large, or that its client gives up, ends the reading."""
    for bodies, status in (([b" " * 9, b" " * 9], 413), ([b"[", None], 400)):
        messages = iter(
            {"type": "http.disconnect"} if body is None else {"type": "http.request", "body": body, "more_body": True}
            for body in bodies
        )
        sent: list[Message] = []

        async def receive(messages: Iterator[Message] = messages) -> Message:
            return next(messages)

        async def send(message: Message, sent: list[Message] = sent) -> None:
            sent.append(message)

        layer = CspReportsMiddleware(Starlette(), CspReportsSettings(enabled=True, max_bytes=10))
        headers = [(b"content-type", REPORTS.encode())]
        scope = {"type": "http", "method": "POST", "path": PATH, "headers": headers}
        await layer(scope, receive, send)
        assert sent[0]["status"] == status
        assert next(messages, None) is None


@pytest.fixture
def anyio_backend() -> str:
    """Run on asyncio, as uvicorn does."""
    return "asyncio"


def test_an_address_may_send_so_many() -> None:
    """Beyond that it is told when to come back, before anything is read."""
    clock = ManualClock()
    sender = client(clock=clock, limit="2/minute")
    assert [post(sender, new(NEW)).status_code for _ in range(3)] == [204, 204, 429]
    refused = post(sender, b"not even looked at", "text/plain")
    assert refused.status_code == 429
    assert 0 < int(refused.headers["retry-after"]) <= 30
    clock.advance(30)
    assert post(sender, new(NEW)).status_code == 204


def test_reports_are_logged_rarely_and_the_rest_is_told_later(caplog: pytest.LogCaptureFixture) -> None:
    """A page with a mistake has many visitors; all of them are counted."""
    clock, events = ManualClock(), Events()
    sender = client(events, clock, log_limit="2/minute")
    post(sender, new(*[NEW] * 5))
    clock.advance(60)
    post(sender, old(OLD), REPORT)
    lines = [record.getMessage() for record in caplog.records if record.name == LOGGER]
    assert events.count(CspViolationReported) == 6
    assert lines[0] == (
        "a browser reports that inline was blocked by script-src-elem on /basket "
        "(line 12 of https://shop.example/static/shop.js)"
    )
    assert lines[2] == (
        "a browser reports that https://evil.example:8443 was let through, though not allowed by img-src on /basket "
        "(line ? of an unknown source); 3 reports before it were not logged"
    )
    assert len(lines) == 3
    assert "secret" not in caplog.text


@pytest.mark.parametrize(
    ("method", "path"), [("GET", PATH), ("POST", "/x" + PATH), ("POST", PATH + "/"), ("PUT", PATH)]
)
def test_what_is_no_report_passes(method: str, path: str) -> None:
    """To the application, which knows no such page."""
    assert client().request(method, path).status_code == 404


def test_switched_off_it_is_not_there() -> None:
    """By default, too."""
    assert post(client(enabled=False), new(NEW)).status_code == 404
    app = FastAPI()
    harden(app, Settings(_env_file=None))
    assert post(TestClient(app), new(NEW)).status_code == 404


def test_a_websocket_passes() -> None:
    """The layer has nothing to say to it."""
    app = FastAPI()

    @app.websocket(PATH)
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text("ok")

    app.add_middleware(CspReportsMiddleware)
    with TestClient(app).websocket_connect(PATH) as websocket:
        assert websocket.receive_text() == "ok"


# --- hardened ---------------------------------------------------------------------------------------------------------


def hardened(**settings: Any) -> FastAPI:
    app = FastAPI()
    harden(app, Settings(_env_file=None, csp_reports={"enabled": True} | settings))
    return app


def test_violations_are_counted_by_directive() -> None:
    """In the metrics, beside the event."""
    app = hardened()
    post(TestClient(app), new(NEW, NEW | {"effectiveDirective": "no-such-directive"}))
    text = app.state.hardening.metrics.expose().decode()
    assert 'hardening_csp_violations_total{directive="script-src-elem",disposition="enforce"} 1.0' in text
    assert 'hardening_csp_violations_total{directive="other",disposition="enforce"} 1.0' in text
    assert app.state.hardening.events.count(CspViolationReported) == 2


def test_a_refusal_is_told_like_any_other() -> None:
    """With its layer, and with the header fields of every answer."""
    app = hardened()
    seen: list[RequestRefused] = []
    app.state.hardening.events.subscribe(RequestRefused, seen.append)
    answer = post(TestClient(app), b"{", REPORT)
    assert [refusal.layer for refusal in seen] == ["CSP reports"]
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_route_of_the_application_wins(caplog: pytest.LogCaptureFixture) -> None:
    """With one notice; a catch-all route does not win."""
    app = hardened()

    @app.post(PATH)
    async def theirs() -> str:
        return "theirs"

    sender = TestClient(app)
    assert [post(sender, new(NEW)).json() for _ in range(2)] == ["theirs", "theirs"]
    assert caplog.text.count("is a route of the application, so no reports are taken") == 1
    other = hardened()
    other.add_api_route("/{path:path}", theirs, methods=["POST"])
    assert post(TestClient(other), new(NEW)).status_code == 204


def test_reports_are_taken_under_a_root_path() -> None:
    """As every path is."""
    sender = TestClient(hardened(), root_path="/proxy")
    assert sender.post("/proxy" + PATH, content=new(NEW), headers={"content-type": REPORTS}).status_code == 204


def test_pages_tell_browsers_of_the_route_and_nothing_else_does() -> None:
    """Both policies name it; over plain HTTP in the older way only, for browsers take the newer over TLS alone."""
    app = hardened(path="/reports")
    over_tls, plain = TestClient(app, base_url="https://test"), TestClient(app)
    page = over_tls.get("/docs").headers
    assert page["reporting-endpoints"] == 'csp="/reports"'
    assert page["content-security-policy"].endswith("; report-uri /reports; report-to csp")
    assert "reporting-endpoints" not in over_tls.get("/openapi.json").headers
    assert "report" not in over_tls.get("/nothing").headers["content-security-policy"]
    assert "reporting-endpoints" not in plain.get("/docs").headers
    assert plain.get("/docs").headers["content-security-policy"].endswith("; report-uri /reports")


def test_an_endpoint_that_is_set_wins() -> None:
    """Reports may go to a collector elsewhere, or by the path that a proxy shows."""
    app = FastAPI()
    headers = {"reporting_endpoint": "https://reports.example/csp"}
    harden(app, Settings(_env_file=None, csp_reports={"enabled": True}, security_headers=headers))
    answer = TestClient(app, base_url="https://test").get("/docs")
    assert answer.headers["reporting-endpoints"] == 'csp="https://reports.example/csp"'


def test_reports_are_logged_as_warnings(caplog: pytest.LogCaptureFixture) -> None:
    """Somebody should look at them."""
    post(TestClient(hardened()), new(NEW))
    assert [record.levelno for record in caplog.records if record.name == LOGGER] == [logging.WARNING]
