"""What is wrong with how an application is set up: each check finds it, and is silent where it is right."""

from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.security import OAuth2PasswordBearer
from fastapi.testclient import TestClient
from opentelemetry.sdk.trace import TracerProvider

from fastapi_hardening import Public, RequireUser, Settings, harden
from fastapi_hardening.audit import CHECKS, SEVERITIES, audit

SECRET = "0f3b91c87d5ea26470bd1c9f58e2a637"  # as `openssl rand -hex 16` makes them

# Settings that leave nothing to say.
GOOD: dict[str, Any] = {
    "allowed_hosts": ["shop.example", "*.shop.example"],
    "trusted_proxies": ["10.0.0.0/8", "104.16.0.0/13", "2400:cb00::/32", "unix"],
    "input_validation": {"mode": "enforce"},
    "metrics": {"token": SECRET},
    "auth": {"session": {"secrets": [SECRET + SECRET]}, "basic": {"users": {"anna": SECRET}}},
}


def found(
    settings: dict[str, Any] | None = None, *, app: FastAPI | None = None, environ: dict[str, str] | None = None
) -> dict[str, str]:
    """What is found in an application with good settings but for these, by id; of several of one id the last."""
    app = app or FastAPI(openapi_url=None)
    harden(app, Settings(**(GOOD | (settings or {}))), tracer_provider=TracerProvider(shutdown_on_exit=False))
    return {finding.id: f"{finding.message}: {finding.fix}" for finding in audit(app, environ=environ or {})}


def test_an_application_that_is_set_up_well_has_no_findings() -> None:
    """Silence has to be possible, or nobody reads on."""
    app = FastAPI(openapi_url=None)

    @app.post("/orders", dependencies=[RequireUser()])
    async def order() -> None:
        return

    @app.post("/contact", dependencies=[Public()])
    async def contact() -> None:
        return

    scheme = OAuth2PasswordBearer(tokenUrl="/token")

    async def user(token: Annotated[str, Depends(scheme)]) -> str:
        return token

    @app.delete("/account")
    async def leave(who: Annotated[str, Depends(user)]) -> str:
        return who

    assert found(app=app) == {}


CASES: list[tuple[str, dict[str, Any], dict[str, str], str]] = [
    ("FH002", {"environment": "development"}, {}, "HARDENING_ENVIRONMENT=production"),
    ("FH004", {"errors": {"details": True}}, {}, "errors.details is on"),
    ("FH006", {"metrics": {"enabled": True}}, {}, "metrics.token"),
    ("FH007", {"health": {"details": "always"}}, {}, "health.details='authorized'"),
    ("FH010", {"allowed_hosts": []}, {}, "allowed_hosts"),
    ("FH010", {"allowed_hosts": ["*"]}, {}, "every Host is served"),
    ("FH011", {"allowed_hosts": ["*.com"]}, {}, "*.shop.com"),
    ("FH012", {"trusted_proxies": []}, {}, "behind a load balancer"),
    ("FH013", {"trusted_proxies": ["0.0.0.0/0"]}, {}, "0.0.0.0/0"),
    ("FH013", {"trusted_proxies": ["203.0.0.0/11"]}, {}, "203.0.0.0/11"),
    ("FH013", {"trusted_proxies": ["2000::/3"]}, {}, "2000::/3"),
    ("FH014", {}, {"FORWARDED_ALLOW_IPS": "*"}, "--no-proxy-headers"),
    ("FH014", {"trusted_proxies": []}, {"UVICORN_FORWARDED_ALLOW_IPS": "*"}, "--no-proxy-headers"),
    ("FH015", {}, {"FORWARDED_ALLOW_IPS": "10.0.0.1"}, "both set"),
    ("FH020", {"workers": 4}, {}, "4 workers"),
    ("FH020", {}, {"WEB_CONCURRENCY": "3"}, "3 workers"),
    ("FH021", {"workers": 2}, {"UVICORN_WORKERS": "3"}, "set workers=3"),
    ("FH022", {"state_url": "redis://store.internal:6379/0"}, {}, "rediss://"),
    ("FH030", {"rate_limit": {"enabled": False}}, {}, "switched off: rate_limit"),
    ("FH031", {"security_headers": {"strict_transport_security": None}}, {}, "max-age=63072000"),
    ("FH031", {"security_headers": {"strict_transport_security": "max-age=3600"}}, {}, "below half a year"),
    ("FH031", {"security_headers": {"enabled": False}}, {}, "HSTS is off"),
    ("FH032", {"input_validation": {"mode": "off"}}, {}, "'report'"),
    ("FH033", {"input_validation": {"mode": "report"}}, {}, "'enforce'"),
    ("FH034", {"rate_limit": {"report_only": True}}, {}, "report_only"),
    ("FH035", {"metrics": {"token": "aaaaaaaabbbbbbbb"}}, {}, "metrics.token can be guessed"),
    ("FH035", {"health": {"token": "please-changeme-now"}}, {}, "health.token can be guessed"),
    ("FH035", {"auth": {"basic": {"users": {"anna": "Password-1984"}}}}, {}, "auth.basic.users can be guessed"),
    ("FH035", {"auth": {"session": {"secrets": ["a secret of the session, isn't it"]}}}, {}, "session.secrets"),
    ("FH036", {"auth": {"session": {"secrets": [SECRET], "secure": False}}}, {}, "auth.session.secure"),
    ("FH037", {"cors": {"allow_origins": ["http://localhost:3000"]}}, {}, "http://localhost:3000"),
    ("FH037", {"cors": {"allow_origin_regex": r"https://[a-z]+\.shop\.example"}}, {}, "pattern"),
    (
        "FH037",
        {"cors": {"allow_origins": ["https://shop.example"], "allow_private_network": True}},
        {},
        "private network",
    ),
    ("FH038", {"cors": {"allow_origins": ["*"]}}, {}, "every origin"),
]


@pytest.mark.parametrize(("name", "settings", "environ", "says"), CASES)
def test_a_setting_that_is_wrong_is_found(
    name: str, settings: dict[str, Any], environ: dict[str, str], says: str
) -> None:
    """With the sentence that mends it."""
    assert says in found(settings, environ=environ)[name]


def test_no_secret_is_told() -> None:
    """A report ends up in the log of a pipeline."""
    said = str(found({"metrics": {"token": "aaaaaaaabbbbbbbb"}, "state_url": "redis://:hunter2@store.internal"}))
    assert "can be guessed" in said
    assert "aaaa" not in said
    assert "hunter2" not in said


@pytest.mark.parametrize("url", ["redis://localhost:6379/0", "redis://127.0.0.1", "redis://[::1]:6379"])
def test_a_store_on_this_machine_needs_no_password(url: str) -> None:
    """Nobody else reaches it."""
    assert "FH022" not in found({"state_url": url, "workers": 4})


def test_a_store_with_password_and_tls_is_fine() -> None:
    """And with it several workers count together."""
    assert found({"state_url": "rediss://:x@store.internal:6379", "workers": 4}, environ={"WEB_CONCURRENCY": "4"}) == {}


def test_a_workers_variable_that_is_no_number_is_one() -> None:
    """The server says itself what it makes of it."""
    assert found(environ={"WEB_CONCURRENCY": "many"}) == {}


def test_debug_is_found_in_mounted_applications_too() -> None:
    """Where nothing switches it off: the layer of errors does, unless details are wanted."""
    said = []
    for details in (True, False):
        app = FastAPI(openapi_url=None)
        app.mount("/inner", FastAPI(title="Inner", openapi_url=None, debug=True))
        said.append(found({"errors": {"details": details}}, app=app).get("FH003", ""))
    assert said == ["Inner: debug is on: leave out debug=True", ""]


def test_documentation_that_is_open_is_found() -> None:
    """Unless everything is closed."""
    assert "/docs, /openapi.json, /redoc" in found(app=FastAPI())["FH005"]
    closed = GOOD["auth"] | {"default": "required"}
    assert "FH005" not in found({"auth": closed}, app=FastAPI())


def test_routes_that_anybody_may_use_to_change_something_are_found() -> None:
    """The first five by name."""
    app = FastAPI(openapi_url=None)
    for number in range(7):
        app.add_api_route(f"/things/{number}", lambda: None, methods=["POST", "GET"])
    said = found({"timeout": {"enabled": False}}, app=app)
    assert "POST /things/0, POST /things/1" in said["FH039"]
    assert "and 2 more" in said["FH039"]
    assert "7 endpoints run in threads, such as /things/0" in said["FH040"]
    assert "FH039" not in found({"auth": GOOD["auth"] | {"default": "required"}}, app=app_with_post())


def app_with_post() -> FastAPI:
    """One open route."""
    app = FastAPI(openapi_url=None)
    app.add_api_route("/things", lambda: None, methods=["POST"])
    return app


def test_a_middleware_of_the_application_is_looked_at() -> None:
    """CORS that was set up before, and is taken over."""
    app = FastAPI(openapi_url=None)
    app.add_middleware(CORSMiddleware, allow_origins=["http://shop.example"])
    assert "http://shop.example" in found(app=app)["FH037"]


def test_an_endpoint_for_spans_that_nothing_can_reach_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where a package is missing and nobody else exports."""
    app = FastAPI(openapi_url=None)
    harden(app, Settings(**GOOD))
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}
    assert audit(app, environ=environ) == ()
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    monkeypatch.setattr("fastapi_hardening.audit.checks.find_spec", lambda _name: None)
    assert [finding.id for finding in audit(app, environ=environ)] == ["FH051"]

    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("fastapi_hardening.audit.checks.find_spec", missing)
    assert [finding.id for finding in audit(app, environ=environ)] == ["FH051"]
    assert audit(app, environ={}) == ()


def test_an_application_without_harden_is_found() -> None:
    """That is one finding, and an error."""
    for app in (FastAPI(), object()):
        (finding,) = audit(app)
        assert (finding.id, finding.severity) == ("FH001", "error")


def test_an_application_that_cannot_serve_is_found() -> None:
    """What the first request would say, the audit says."""
    app = FastAPI()
    app.add_middleware(CORSMiddleware, allow_origins=["https://shop.example"])
    harden(app, Settings(cors={"allow_origins": ["https://shop.example"]}))
    (finding,) = audit(app)
    assert (finding.id, finding.severity) == ("FH000", "error")


def test_an_application_that_was_looked_at_serves() -> None:
    """Nothing is changed by looking."""
    app = app_with_post()
    harden(app)
    before = audit(app)
    assert TestClient(app).post("/things").status_code == 200
    assert audit(app) == before


def test_the_worst_comes_first() -> None:
    """In the order of severity."""
    app = FastAPI()
    harden(app, Settings(errors={"details": True}))
    severities = [SEVERITIES.index(finding.severity) for finding in audit(app, environ={})]
    assert severities == sorted(severities)
    assert set(severities) == {0, 1, 2}


def test_ids_are_pinned() -> None:
    """Pipelines ignore findings by their id: one that is gone is never given to another check."""
    assert [check.id for check in CHECKS] == [
        f"FH{number:03d}" for number in (*range(8), *range(10, 16), *range(20, 23), *range(30, 41), 50, 51)
    ]


def test_a_key_without_effect_is_found() -> None:
    """A concern that is planned does nothing with it yet."""
    from fastapi_hardening.settings import NotBuiltYet  # noqa: PLC0415

    class Planned(NotBuiltYet):
        """A concern whose keys are known before it is built."""

        speed: int = 1

    class Later(Settings):
        """Settings with such a concern."""

        planned: Planned = Planned()

    app = FastAPI(openapi_url=None)
    harden(app, Later(**(GOOD | {"planned": {"speed": 2}})))
    assert [(finding.id, finding.message.split()[0]) for finding in audit(app, environ={})] == [
        ("FH050", "planned.speed")
    ]
