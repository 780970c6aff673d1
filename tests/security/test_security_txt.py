"""The file that tells whom to tell: its form (RFC 9116), its date, and where it is served."""

from datetime import UTC, datetime
from typing import Any

import pytest
from fastapi import FastAPI, WebSocket
from starlette.testclient import TestClient

from fastapi_hardening import ConfigurationError, Settings, harden
from fastapi_hardening.core.clock import ManualClock
from fastapi_hardening.security.security_txt import SecurityTxtMiddleware, SecurityTxtSettings, check, render

PATH = "/.well-known/security.txt"
CONTACT = ("mailto:security@shop.example", "https://shop.example/security")
EXPIRES = "2027-06-30T02:00:00+02:00"
EXPIRES_AT = datetime(2027, 6, 30, tzinfo=UTC).timestamp()
DAY = 86_400.0


def settings(**changes: Any) -> SecurityTxtSettings:
    return SecurityTxtSettings.model_validate({"contact": CONTACT, "expires": EXPIRES} | changes)


def clock_at(seconds: float) -> ManualClock:
    clock = ManualClock()
    clock.advance(seconds - clock.time())
    return clock


# --- engine -----------------------------------------------------------------------------------------------------------


def test_the_file_has_a_field_a_line() -> None:
    """Several contacts in their order, the date in UTC, the languages on one line."""
    file = render(
        settings(
            encryption="https://shop.example/key.asc",
            acknowledgments=["https://shop.example/thanks"],
            preferred_languages="en, de",
            canonical=["https://shop.example/.well-known/security.txt"],
            policy=["https://shop.example/policy"],
            hiring=["https://shop.example/jobs"],
        )
    )
    assert file.decode() == (
        "Contact: mailto:security@shop.example\n"
        "Contact: https://shop.example/security\n"
        "Expires: 2027-06-30T00:00:00Z\n"
        "Encryption: https://shop.example/key.asc\n"
        "Acknowledgments: https://shop.example/thanks\n"
        "Preferred-Languages: en, de\n"
        "Canonical: https://shop.example/.well-known/security.txt\n"
        "Policy: https://shop.example/policy\n"
        "Hiring: https://shop.example/jobs\n"
    )


def test_what_is_not_said_has_no_line() -> None:
    """An empty field would be an error (RFC 9116, section 4)."""
    assert [line.partition(":")[0] for line in render(settings()).decode().splitlines()] == [
        "Contact",
        "Contact",
        "Expires",
    ]


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"contact": ["security@shop.example"]}, "is no address for security.txt"),
        ({"contact": ["http://shop.example"]}, "not http"),
        ({"contact": ["mailto:a@b.example\nPolicy: https://evil.example"]}, "is no address"),
        ({"policy": ["https://shop.example/a b"]}, "no blanks"),
        ({"expires": "2027-06-30T00:00:00"}, "timezone"),
        ({"expires": None}, "expires is missing"),
        ({"contact": [], "enabled": True}, "contact is missing"),
        ({"preferred_languages": ["english please"]}, "is no language tag"),
        ({"path": "security.txt"}, "does not start with a slash"),
        ({"contacts": CONTACT}, "did you mean 'contact'"),
    ],
)
def test_a_file_that_would_not_be_valid_is_refused(changes: dict[str, Any], sentence: str) -> None:
    """When the settings are made."""
    with pytest.raises(ValueError, match=sentence):
        settings(**changes)


def test_a_contact_switches_it_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also from the environment; ``enabled`` has the last word."""
    assert settings().enabled
    assert not settings(enabled=False).enabled
    assert not SecurityTxtSettings().enabled
    assert SecurityTxtSettings.model_validate(settings().model_dump_json(exclude={"enabled"})).enabled
    monkeypatch.setenv("HARDENING_SECURITY_TXT__CONTACT", ",".join(CONTACT))
    monkeypatch.setenv("HARDENING_SECURITY_TXT__EXPIRES", EXPIRES)
    assert Settings(_env_file=None).security_txt == settings()
    monkeypatch.delenv("HARDENING_SECURITY_TXT__EXPIRES")
    with pytest.raises(ConfigurationError, match="expires is missing"):
        Settings(_env_file=None)


# --- its date ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("days_before", "status", "output"),
    [
        (31, "pass", None),
        (29, "warn", "expires in 29 days"),
        (0.2, "warn", "expires in 0 days"),
        (-1, "warn", "has expired"),
    ],
)
def test_the_health_check_warns_before_the_file_expires(
    days_before: float, status: str, output: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """And when it has; the log says it at the start, too. It never fails: the service is no worse for it."""
    result = check(settings(), clock_at(EXPIRES_AT - days_before * DAY))()
    assert result.status == status
    assert output is None or output in str(result.output)
    assert (output or "nothing") in (caplog.text or "nothing")


def test_a_date_too_far_away_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """RFC 9116 recommends less than a year, so that somebody looks at the file."""
    check(settings(), clock_at(EXPIRES_AT - 400 * DAY))
    assert "more than a year ahead" in caplog.text
    caplog.clear()
    check(settings(), clock_at(EXPIRES_AT - 360 * DAY))
    assert caplog.text == ""


def test_an_application_whose_file_has_expired_starts_all_the_same() -> None:
    """A date must not be what keeps new processes from starting."""
    app = FastAPI()
    health = {"details": "always"}
    harden(app, Settings(_env_file=None, security_txt=settings(), health=health), clock=clock_at(EXPIRES_AT + DAY))
    report = TestClient(app).get("/health")
    assert report.status_code == 200
    assert report.json()["checks"]["security_txt"][0]["status"] == "warn"
    assert TestClient(app).get(PATH).status_code == 200


# --- layer ------------------------------------------------------------------------------------------------------------


def client(**changes: Any) -> TestClient:
    app = FastAPI()
    app.add_middleware(SecurityTxtMiddleware, settings=settings(**changes))
    return TestClient(app)


def test_it_is_served_as_text() -> None:
    """In UTF-8, as the RFC wants it; without a body to HEAD."""
    answer = client().get(PATH)
    assert (answer.status_code, answer.content) == (200, render(settings()))
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    head = client().head(PATH)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == answer.headers["content-length"]


@pytest.mark.parametrize(("method", "path"), [("POST", PATH), ("GET", "/security.txt"), ("GET", PATH + "/x")])
def test_everything_else_passes(method: str, path: str) -> None:
    """To the application, which knows no such page."""
    assert client().request(method, path).status_code == 404


def test_the_path_can_be_moved() -> None:
    """Where a site keeps it at its root."""
    assert client(path="/security.txt").get("/security.txt").status_code == 200


def test_switched_off_it_is_not_there() -> None:
    """By default, too."""
    assert client(enabled=False).get(PATH).status_code == 404
    app = FastAPI()
    harden(app, Settings(_env_file=None))
    assert TestClient(app).get(PATH).status_code == 404


def test_a_websocket_passes() -> None:
    """The layer has nothing to say to it."""
    app = FastAPI()

    @app.websocket(PATH)
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text("ok")

    app.add_middleware(SecurityTxtMiddleware)
    with TestClient(app).websocket_connect(PATH) as websocket:
        assert websocket.receive_text() == "ok"


def test_a_route_of_the_application_wins(caplog: pytest.LogCaptureFixture) -> None:
    """With one notice."""
    app = FastAPI()
    harden(app, Settings(_env_file=None, security_txt=settings()))
    app.add_api_route(PATH, lambda: "theirs")
    assert [TestClient(app).get(PATH).json() for _ in range(2)] == ["theirs", "theirs"]
    assert caplog.text.count("is a route of the application, so security.txt is not served") == 1
