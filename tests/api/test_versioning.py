"""Which version of the API a request gets, and what clients of an old one are told."""

from datetime import UTC, datetime
from functools import cache
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI, Response, WebSocket
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect

from fastapi_hardening import ConfigurationError, CurrentVersion, Idempotent, Settings, Version, current_tenant, harden
from fastapi_hardening.api.versioning import (
    Asked,
    VersioningMiddleware,
    VersioningSettings,
    Versions,
    document_of,
)
from fastapi_hardening.core.clock import ManualClock
from fastapi_hardening.core.problem import Problem
from fastapi_hardening.performance.response_cache import CacheResponse

SINCE, SUNSET, LINK = "2026-01-01T00:00:00Z", "2026-07-01T02:00:00+02:00", "https://shop.test/migration"
VALUES: dict[str, Any] = {
    "versions": ["1", "2", "3"],
    "sources": ["path", "header", "query", "media-type"],
    "deprecated": [{"version": "1", "since": SINCE, "sunset": SUNSET, "link": LINK}, {"version": "2", "since": SINCE}],
}
ENDS = datetime(2026, 7, 1, tzinfo=UTC).timestamp()


def clock_at(epoch: float) -> ManualClock:
    return ManualClock(epoch=epoch)


async def told(version: CurrentVersion) -> str | None:
    return version


def shop(clock: ManualClock | None = None, **values: Any) -> FastAPI:
    """A hardened application with routes of several versions."""
    app, old, child = FastAPI(title="Shop"), APIRouter(prefix="/v1"), FastAPI()
    old.get("/orders")(told)
    app.include_router(old)
    app.get("/orders")(told)
    app.get("/some", dependencies=[Version(since="2")])(told)
    app.get("/old", dependencies=[Version("1")])(told)
    app.get("/ending", dependencies=[Version(until="2")])(told)
    app.get("/videos")(told)

    async def own(response: Response) -> None:
        response.headers["Deprecation"] = "@1"
        response.headers["Link"] = "</next>; rel=next"

    app.get("/own", dependencies=[Version("1")])(own)
    child.get("/orders")(told)
    app.mount("/v2", child)

    @app.websocket("/talk")
    async def talk(websocket: WebSocket, version: CurrentVersion) -> None:
        await websocket.accept()
        await websocket.send_text(str(version))

    harden(app, Settings.model_validate({"versioning": VALUES | values}), clock=clock)
    return app


@cache
def usual() -> FastAPI:
    """The one with the usual settings; no test changes it."""
    return shop()


# --- engine -----------------------------------------------------------------------------------------------------------


@given(
    asked=st.lists(st.builds(Asked, st.sampled_from(VALUES["sources"]), st.sampled_from(("1", "v2", "3", "9", "")))),
    served=st.sampled_from([None, ("1",), ("2", "3"), ()]),
    default=st.sampled_from([None, "1", "3"]),
    required=st.booleans(),
)
def test_a_version_is_what_was_asked_for_or_nothing(
    asked: list[Asked], served: tuple[str, ...] | None, default: str | None, required: bool
) -> None:
    """Never another one than the request names, never one that the route does not serve."""
    versions = Versions(VersioningSettings.model_validate(VALUES | {"default": default, "required": required}))
    possible: list[str | None] = list(VALUES["versions"] if served is None else served)
    try:
        got = versions.decide(asked, served)
    except Problem as problem:
        refused = problem
    else:
        assert got in [*possible, None]
        assert got is not None or not required
        assert all(each.version.removeprefix("v") == got for each in asked)
        return
    assert refused.status_code in (400, 404, 406)
    assert refused.extensions["supported"] == possible


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"versions": ["one"]}, "begins with a digit"),
        ({"enabled": True}, "name the versions"),
        ({"versions": ["1"], "default": "2"}, "'2' is not among the versions 1"),
        ({"versions": ["1"], "deprecated": [{"version": "0", "since": SINCE}]}, "'0' is not among"),
        (
            {"versions": ["1"], "deprecated": [{"version": "1", "since": SUNSET, "sunset": SINCE}]},
            "RFC 9745",
        ),
        (
            {"versions": ["1"], "deprecated": [{"version": "1", "since": SINCE, "link": "x>; y"}]},
            "no address of",
        ),
        ({"versions": ["1"], "header": "API Version"}, "not a header name"),
        ({"versions": ["1"], "path_prefix": "v"}, "starts with a slash"),
    ],
)
def test_settings_that_cannot_work_are_refused(values: dict[str, Any], sentence: str) -> None:
    """With the sentence that mends them."""
    with pytest.raises(ValidationError, match=sentence):
        VersioningSettings.model_validate(values)


def test_a_mark_names_versions_or_a_range() -> None:
    """A range ends nowhere where its ends do not exist; nothing and both are mistakes."""
    order = ("1", "2", "3")
    assert Version("3", "1").of(order) == ("1", "3")
    assert Version(until="2").of(order) == ("1", "2")
    assert Version(since="2", until="2").of(order) == ("2",)
    assert Version(since="9").of(order) == Version(until="9").of(order) == Version("9").of(order) == ()
    for wrong in ({}, {"names": ("1",), "since": "2"}):
        with pytest.raises(ValueError, match="by name"):
            Version(*wrong.pop("names", ()), **wrong)  # type: ignore[arg-type]


# --- layer ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "headers", "expected"),
    [
        ("/orders", {}, None),
        ("/orders", {"API-Version": "2"}, "2"),
        ("/orders", {"API-Version": "v2"}, "2"),
        ("/orders?api-version=3&x=1", {}, "3"),
        ("/orders", {"Accept": 'text/html;q=0.5, application/json; Version="1"'}, "1"),
        ("/v1/orders", {}, "1"),
        ("/v2/orders", {}, "2"),
        ("/v1/orders", {"API-Version": "1"}, "1"),
        ("/old", {}, "1"),
        ("/some", {"API-Version": "3"}, "3"),
        ("/videos", {}, None),
    ],
)
def test_every_source_is_read(path: str, headers: dict[str, str], expected: str | None) -> None:
    """The endpoint and the answer say which version it is; caches are told what it depends on."""
    answer = TestClient(usual()).get(path, headers=headers)
    assert answer.json() == expected
    assert answer.headers.get("api-version") == expected
    assert answer.headers.get_list("vary") == ["API-Version", "Accept"]


@pytest.mark.parametrize(
    ("path", "headers", "status", "supported"),
    [
        ("/orders", {"API-Version": "9"}, 400, ["1", "2", "3"]),
        ("/orders", {"API-Version": ""}, 400, ["1", "2", "3"]),
        ("/orders?api-version=9", {}, 400, ["1", "2", "3"]),
        ("/orders", {"Accept": "application/json;version=9"}, 406, ["1", "2", "3"]),
        ("/v9/orders", {}, 404, ["1", "2", "3"]),
        ("/nowhere", {"API-Version": "9"}, 400, ["1", "2", "3"]),
        ("/some", {"API-Version": "1"}, 400, ["2", "3"]),
        ("/v1/orders", {"API-Version": "2"}, 400, ["1", "2", "3"]),
        ("/v2/orders", {"API-Version": "1"}, 400, ["1", "2", "3"]),
    ],
)
def test_what_is_not_served_is_refused_with_what_is(
    path: str, headers: dict[str, str], status: int, supported: list[str]
) -> None:
    """On every route, on mounts, and where no route matches; nobody gets another version than they asked for."""
    answer = TestClient(usual()).get(path, headers=headers)
    problem = answer.json()
    assert (answer.status_code, problem["title"], problem["supported"]) == (status, "Version not served", supported)
    assert "api-version" not in answer.headers


def test_a_default_and_a_duty_to_ask() -> None:
    """The default holds where the route serves it; with ``required`` the request must say what nothing else does."""
    client = TestClient(shop(default="1"))
    assert [client.get(path).json() for path in ("/orders", "/some", "/old")] == ["1", None, "1"]
    strict = TestClient(shop(required=True))
    assert [strict.get(path).status_code for path in ("/orders", "/v1/orders", "/old")] == [400, 200, 200]


def test_clients_of_a_deprecated_version_are_told() -> None:
    """In the fields of RFC 9745 and RFC 8594; what the application says of one route itself is kept."""
    client = TestClient(usual())
    old = client.get("/v1/orders").headers
    assert (old["deprecation"], old["sunset"]) == ("@1767225600", "Wed, 01 Jul 2026 00:00:00 GMT")
    assert old["link"] == f'<{LINK}>; rel="deprecation"; type="text/html", <{LINK}>; rel="sunset"; type="text/html"'
    second = client.get("/v2/orders").headers
    assert second["deprecation"] == "@1767225600"
    assert not {"sunset", "link"} & set(second)
    assert "deprecation" not in client.get("/orders", headers={"API-Version": "3"}).headers
    own = client.get("/own").headers
    assert own.get_list("deprecation") == ["@1"]
    assert len(own.get_list("link")) == 2


def test_after_its_sunset_a_version_may_be_gone() -> None:
    """From that second on it is 410, with the way to the next one, if the settings say so."""
    clock = clock_at(ENDS - 1)
    client, serving = TestClient(shop(clock, after_sunset="gone")), TestClient(shop(clock))
    assert client.get("/v1/orders").status_code == 200
    clock.advance(1)
    answer = client.get("/v1/orders")
    assert (answer.status_code, answer.json()["supported"]) == (410, ["2", "3"])
    assert answer.headers["sunset"] == "Wed, 01 Jul 2026 00:00:00 GMT"
    assert LINK in answer.headers["link"]
    assert answer.headers.get_list("vary") == ["API-Version", "Accept"]
    assert client.get("/orders", headers={"API-Version": "9"}).json()["supported"] == ["2", "3"]
    assert serving.get("/v1/orders").status_code == 200


def test_websockets_have_versions_as_well() -> None:
    """The handshake is answered with the version, or refused."""
    client = TestClient(usual())
    with client.websocket_connect("/talk", headers={"API-Version": "1"}) as websocket:
        assert websocket.receive_text() == "1"
        fields: Any = websocket.extra_headers
        names = {name for name, _ in fields}
        assert {b"api-version", b"deprecation", b"sunset"} <= names
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/talk", headers={"API-Version": "9"}):
        raise AssertionError("it opened")


def test_who_still_calls_an_old_version_is_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    """By version and route; a line of the access log names the version beside the caller."""
    app = shop()
    client = TestClient(app)
    caplog.set_level("INFO", logger="fastapi_hardening.access")
    for path in ("/v1/orders", "/v1/orders", "/orders", "/nowhere"):
        client.get(path)
    value = app.state.hardening.metrics.registry.get_sample_value
    name = "hardening_api_version_requests_total"
    assert value(name, {"version": "1", "handler": "/v1/orders"}) == 2
    assert value(name, {"version": "none", "handler": "/orders"}) == 1
    assert value(name, {"version": "none", "handler": "unmatched"}) == 1
    assert '"version":"1"' in caplog.text or any(getattr(r, "version", None) == "1" for r in caplog.records)


def moving(to: str) -> Any:
    def around(app: ASGIApp) -> ASGIApp:
        async def move(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["path"] == "/orders":
                scope["path"], scope["raw_path"] = to, to.encode()
            await app(scope, receive, send)

        return move

    return around


def test_a_moved_request_gets_no_other_version() -> None:
    """A route that a middleware leads to checks by itself what it serves."""
    app = shop()
    app.add_middleware(moving("/some"))
    client = TestClient(app)
    assert [client.get("/orders", headers={"API-Version": each}).status_code for each in "12"] == [400, 200]
    assert client.get("/orders").json() is None


def test_alone_it_needs_nothing_else() -> None:
    """On a bare application; a mark without the layer changes nothing."""
    app = FastAPI()
    app.get("/some", dependencies=[Version("2")])(told)
    assert TestClient(app).get("/some", headers={"API-Version": "1"}).json() is None
    app = FastAPI()
    app.get("/some", dependencies=[Version("2")])(told)
    app.add_middleware(VersioningMiddleware, settings=VersioningSettings(versions=("1", "2"), sources=("header",)))
    with TestClient(app) as client:
        assert client.get("/some", headers={"API-Version": "1"}).status_code == 400
        assert client.get("/some").headers["api-version"] == "2"
    plain = FastAPI()
    plain.get("/some")(told)
    plain.add_middleware(VersioningMiddleware, settings=VersioningSettings(versions=("1", "2"), sources=("path",)))
    assert "vary" not in TestClient(plain).get("/some", headers={"API-Version": "1"}).headers


def test_what_keeps_answers_keeps_versions_and_tenants_apart() -> None:
    """A cache gives nobody the answer of another version or tenant, nor is one replayed for a repeated key."""
    app = FastAPI()

    async def whose(version: CurrentVersion) -> list[str | None]:
        tenant = current_tenant()
        return [version, tenant.id if tenant else None]

    app.get("/kept", dependencies=[CacheResponse(60, per="everybody")])(whose)
    app.post("/once", dependencies=[Idempotent()])(whose)
    tenancy = {"sources": ["header"], "trusted_callers": ["127.0.0.1"]}
    harden(app, Settings.model_validate({"versioning": VALUES, "tenancy": tenancy}))
    client = TestClient(app, client=("127.0.0.1", 1))
    for _ in range(2):
        for version in "12":
            for tenant in ("north", "south"):
                sent = {"API-Version": version, "X-Tenant": tenant, "Idempotency-Key": "k"}
                assert client.get("/kept", headers=sent).json() == [version, tenant]
                once = client.post("/once", headers=sent)
                assert once.status_code == 422 if version == "2" else once.json() == ["1", tenant]
    kept = client.get("/kept", headers={"API-Version": "1", "X-Tenant": "north"})
    assert "hit" in kept.headers["cache-status"]


# --- routes and documents ---------------------------------------------------------------------------------------------


def test_documents_say_what_is_deprecated_and_what_each_version_has() -> None:
    """An operation is deprecated when all that it serves is; the document of a version has nothing of another."""
    app = shop()
    TestClient(app).get("/orders")
    document = app.openapi()
    deprecated = {path for path, item in document["paths"].items() if item["get"].get("deprecated")}
    assert deprecated == {"/v1/orders", "/old", "/own", "/ending"}
    third = document_of(app, "3", app.state.hardening.settings.versioning)
    assert set(third["paths"]) == {"/orders", "/some", "/videos"}
    assert (third["info"]["version"], document["info"]["version"]) == ("3", "0.1.0")
    with pytest.raises(ValueError, match="not among"):
        document_of(app, "9", app.state.hardening.settings.versioning)


@pytest.mark.parametrize(
    ("routes", "sentence"),
    [
        ([("/a", Version("9"))], "does not fit versioning.versions"),
        ([("/a", Version(since="3", until="1"))], "does not fit"),
        ([("/v9/a", None)], "add it there"),
        ([("/a", Version("1")), ("/a", Version("2"))], "is served by two functions"),
        ([("/a", None), ("/a", Version("2"))], "is served by two functions"),
    ],
)
def test_routes_that_cannot_be_meant_are_told_at_the_start(
    routes: list[tuple[str, Version | None]], sentence: str
) -> None:
    """A version that does not exist, and a function that no request could reach."""
    app = FastAPI()
    for path, mark in routes:
        app.get(path, dependencies=[] if mark is None else [mark])(lambda: None)
    harden(app, Settings.model_validate({"versioning": VALUES}))
    with pytest.raises(ConfigurationError, match=sentence):
        app.build_middleware_stack()


def test_it_is_on_as_soon_as_something_is_set() -> None:
    """And off by itself."""
    assert VersioningSettings(versions=("1",)).enabled
    assert VersioningSettings.model_validate('{"versions": ["1"]}').enabled
    assert not VersioningSettings().enabled
    app = FastAPI()
    app.get("/v9", dependencies=[Version("9")])(told)
    harden(app, Settings(_env_file=None))
    assert TestClient(app).get("/v9", headers={"API-Version": "1"}).json() is None
