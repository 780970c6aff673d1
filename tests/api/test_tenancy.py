"""Whose data a request is about: who names it, who may, and that nothing leads out of a tenant."""

import asyncio
import string
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI, WebSocket
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect

from fastapi_hardening import CurrentTenant, RateLimit, RequireTenant, Settings, Tenant, current_tenant, harden
from fastapi_hardening.api.tenancy import (
    Asked,
    FindTenant,
    OptionalTenant,
    Tenancy,
    TenancyMiddleware,
    TenancySettings,
    TenantUnavailable,
    as_tenant,
)
from fastapi_hardening.core import context as request_context
from fastapi_hardening.core.clock import ManualClock
from fastapi_hardening.core.identity import Principal
from fastapi_hardening.core.problem import Problem

TENANTS = {
    "north": Tenant("t1", plan="large"),
    "t1": Tenant("t1", plan="large"),
    "south": Tenant("t2", plan="small"),
    "t2": Tenant("t2", plan="small"),
    "closed": Tenant("t3", active=False),
}
PEOPLE = {
    "anna": Principal("anna", tenant="t1"),
    "bob": Principal("bob", tenant="t2"),
    "both": Principal("both", tenant_roles={"t1": frozenset({"clerk"}), "t2": frozenset()}),
    "free": Principal("free"),
    "staff": Principal("staff", roles=frozenset({"support"})),
    "gone": Principal("gone", tenant="t9"),
    "shut": Principal("shut", tenant="closed"),
}
ALL = {"sources": ("subdomain", "header", "path", "identity"), "domains": ("shop.test",)}


class Names:
    """Knows who calls by a plain name."""

    scheme = "bearer"
    challenge = "Bearer"

    async def authenticate(self, connection: HTTPConnection) -> Principal | None:
        return PEOPLE.get(connection.headers.get("authorization", "").removeprefix("Bearer "))


def decided(names: set[str], who: str | None, *, asked: Asked | None = None, **values: Any) -> str | None:
    """The tenant that is decided on, or the class of the refusal."""
    tenancy = Tenancy(TenancySettings.model_validate(values), TENANTS.get)
    request = asked or Asked(frozenset(names))
    try:
        tenant = asyncio.run(tenancy.decide(request, None if who is None else PEOPLE[who]))
    except Problem as problem:
        return f"{type(problem).__name__} {problem.status_code}"
    return None if tenant is None else tenant.id


# --- engine -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "who", "expected"),
    [
        (set(), "anna", "t1"),
        (set(), "free", None),
        (set(), None, None),
        ({"north"}, "anna", "t1"),
        ({"north", "t1"}, "anna", "t1"),
        ({"north"}, None, "t1"),
        ({"south"}, "anna", "CrossTenantRefused 403"),
        ({"nobody"}, "anna", "CrossTenantRefused 403"),
        ({"closed"}, "anna", "CrossTenantRefused 403"),
        ({"north", "south"}, "anna", "CrossTenantRefused 403"),
        ({"north", "south"}, "both", "TenantAmbiguous 400"),
        ({"north", "nobody"}, None, "TenantAmbiguous 400"),
        ({"south"}, "both", "t2"),
        ({"closed"}, "both", "CrossTenantRefused 403"),
        ({"north"}, "free", "CrossTenantRefused 403"),
        ({"south"}, "staff", "t2"),
        ({"nobody"}, None, "TenantUnknown 404"),
        ({"closed"}, None, "TenantUnknown 404"),
        (set(), "gone", "TenantUnknown 404"),
        ({"t9"}, "gone", "TenantUnknown 404"),
        ({"t8"}, "gone", "CrossTenantRefused 403"),
        ({"north"}, "gone", "CrossTenantRefused 403"),
        (set(), "shut", "TenantUnknown 404"),
    ],
)
def test_who_may_ask_for_which_tenant(names: set[str], who: str | None, expected: str | None) -> None:
    """Whoever is known gets their own; of another one it is not even told whether it exists."""
    assert decided(names, who, cross_tenant_roles=["support"]) == expected


def test_settings_open_what_is_closed() -> None:
    """A default, 403 in place of 404, callers whose identity says nothing, and gateways."""
    assert decided(set(), None, default="south") == "t2"
    assert decided(set(), "anna", default="south", sources=["header"]) == "CrossTenantRefused 403"
    assert decided(set(), "free", default="south") == "t2"
    assert decided(set(), "anna", sources=["header"]) is None
    assert decided({"nobody"}, None, unknown="forbidden") == "TenantUnknown 403"
    assert decided({"north"}, "free", callers_without_tenant="allow") == "t1"
    header = Asked(frozenset({"north"}), believed=False)
    assert decided(set(), None, asked=header) == "CrossTenantRefused 403"
    gateway = Asked(frozenset({"north"}), trusted=True)
    assert [decided(set(), who, asked=gateway) for who in (None, "free", "bob")] == [
        "t1",
        "t1",
        "CrossTenantRefused 403",
    ]


@given(
    names=st.sets(st.sampled_from([*TENANTS, "nobody", ""]), max_size=3),
    who=st.sampled_from(["anna", "bob", "both", "free", "gone", "shut"]),
    asked=st.tuples(st.booleans(), st.booleans()),
    default=st.sampled_from([None, *TENANTS]),
    sources=st.sets(st.sampled_from(["identity", "header", "path"]), min_size=1),
)
def test_nobody_who_is_bound_to_a_tenant_gets_into_another(
    names: set[str], who: str, asked: tuple[bool, bool], default: str | None, sources: set[str]
) -> None:
    """Whatever is asked for, by whatever way, with whatever settings."""
    principal = PEOPLE[who]
    got = decided(set(), who, asked=Asked(frozenset(names), *asked), default=default, sources=tuple(sources))
    if got in ("t1", "t2", "t3"):
        own = TENANTS[principal.tenant].id if principal.tenant in TENANTS else None
        assert got == own or got in principal.tenant_roles or (principal.tenant is None and not principal.tenant_roles)
        assert got != "t3"


def test_what_a_resolver_says_is_remembered_for_a_while() -> None:
    """Known and unknown names apart, both bounded, until they are forgotten or their time is over."""
    clock, asked = ManualClock(), []

    async def find(name: str) -> Tenant | None:
        asked.append(name)
        return Tenant(name) if name.startswith("t") else None

    tenancy = Tenancy(TenancySettings(ttl_seconds=60, max_remembered=2), find, clock=clock)

    async def ask(*names: str) -> list[str]:
        asked.clear()
        for name in names:
            await tenancy.find(name)
        return list(asked)

    async def story() -> None:
        assert await ask("t1", "t1", "x", "x") == ["t1", "x"]
        tenancy.forget("t1")
        assert await ask("t1", "t2", "t1") == ["t1", "t2"]
        assert await ask("t3", "t2", "t1") == ["t3", "t1"]
        await ask(*(f"x{number}" for number in range(1_001)))
        assert await ask("t3", "x", "x1000") == ["x"]
        clock.advance(60)
        assert await ask("t3", "x1000") == ["t3", "x1000"]

    asyncio.run(story())


def test_a_resolver_that_does_not_answer_lets_nobody_in() -> None:
    """It is a 503 that says when to come back; what is a mistake of the program stays one."""

    def down(_name: str) -> Tenant | None:
        raise ConnectionError("no database")

    with pytest.raises(TenantUnavailable) as caught:
        asyncio.run(Tenancy(find=down).find("t1"))
    assert int((caught.value.headers or {})["Retry-After"]) >= 5
    with pytest.raises(KeyError):
        asyncio.run(Tenancy(find={"a": Tenant("a")}.__getitem__).find("b"))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"sources": ["subdomain"]}, "belong together"),
        ({"domains": ["shop.test"]}, "belong together"),
        ({"sources": ["subdomain"], "domains": ["*.shop.test"]}, "without '*'"),
        ({"sources": ["subdomain"], "domains": ["https://shop.test"]}, "is a URL or a path"),
        ({"sources": []}, "name one, or a default"),
        ({"header": "X Tenant"}, "not a header name"),
        ({"trusted_callers": ["gateway"]}, "not an address or a network"),
    ],
)
def test_settings_that_cannot_work_are_refused(values: dict[str, Any], sentence: str) -> None:
    """With the sentence that mends them."""
    with pytest.raises(ValidationError, match=sentence.replace("*", r"\*")):
        TenancySettings.model_validate(values)


def test_it_is_on_as_soon_as_something_is_set() -> None:
    """Who names the sources means it; who switches it off means that."""
    assert not TenancySettings().enabled
    assert TenancySettings(sources=("path",)).enabled
    assert TenancySettings.model_validate('{"header": "X-Org"}').enabled
    assert not TenancySettings(enabled=False, sources=("path",)).enabled
    assert not Settings(_env_file=None).tenancy.enabled


# --- layer ------------------------------------------------------------------------------------------------------------


async def told(tenant: OptionalTenant) -> dict[str, Any]:
    """What an endpoint is told, by each way."""
    now = current_tenant()
    return {"tenant": tenant and tenant.id, "now": now and now.id}


def shop(find: FindTenant | None = TENANTS.get, **tenancy: Any) -> FastAPI:
    """A hardened application with a route of every kind."""
    app, router, child = FastAPI(), APIRouter(prefix="/t/{tenant}"), FastAPI()
    router.get("/orders")(told)
    router.get("/files/{name:path}")(told)
    app.include_router(router)
    app.get("/orders")(told)
    app.get("/open", dependencies=[RequireTenant.exempt])(told)
    app.get("/plan", dependencies=[RateLimit(of_plan, key="tenant")])(told)
    app.get("/sync")(lambda: {"now": getattr(current_tenant(), "id", None)})

    async def needs(tenant: CurrentTenant) -> dict[str, str | None]:
        return {"tenant": tenant.id, "plan": tenant.plan}

    app.get("/needs", dependencies=[RequireTenant()])(needs)
    child.get("/orders")(told)
    app.mount("/c/{tenant}", child)
    app.mount("/opaque/{tenant}", plain)

    @app.websocket("/talk")
    async def talk(websocket: WebSocket, tenant: CurrentTenant) -> None:
        await websocket.accept()
        await websocket.send_text(tenant.id)

    harden(app, Settings.model_validate({"tenancy": ALL | tenancy}), authenticators=[Names()], tenants=find)
    return app


@cache
def usual() -> FastAPI:
    """The one with the usual settings; no test changes it."""
    return shop()


def of_plan(_connection: HTTPConnection) -> str:
    tenant = current_tenant()
    return "1/minute" if tenant is None or tenant.plan == "small" else "100/minute"


async def plain(scope: Scope, receive: Receive, send: Send) -> None:
    now = current_tenant()
    await PlainTextResponse(f"opaque {now and now.id}")(scope, receive, send)


def said(app: ASGIApp, path: str, who: str | None = "anna", **headers: str) -> Any:
    """The answer's body where it is one, else its status and type."""
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    if who is not None:
        sent["authorization"] = f"Bearer {who}"
    answer = TestClient(app, base_url="http://shop.test").get(path, headers=sent, follow_redirects=False)
    if answer.status_code >= 400:
        return answer.status_code, answer.json()["type"].rpartition("#")[2]
    return answer.json() if answer.headers.get("content-type") == "application/json" else answer.text


NORTH = {"tenant": "t1", "now": "t1"}
CROSS = (403, "cross-tenant-request")
REQUIRED = (400, "tenant-required")


def test_every_source_names_a_tenant() -> None:
    """The identity, the host, the header and the path; the endpoint is told, and so is whatever it calls."""
    app = usual()
    assert said(app, "/orders") == NORTH
    assert said(app, "/orders", host="north.shop.test:8000") == NORTH
    assert said(app, "/orders", None, host="NORTH.shop.test") == NORTH
    assert said(app, "/orders", x_tenant="north") == NORTH
    assert said(app, "/t/north/orders") == said(app, "/t/t1/files/a/b") == NORTH
    assert said(app, "/c/north/orders") == NORTH
    assert said(app, "/opaque/north/x") == "opaque t1"
    assert said(app, "/needs") == {"tenant": "t1", "plan": "large"}
    assert said(app, "/sync") == {"now": "t1"}
    assert current_tenant() is None


@pytest.mark.parametrize("path", ["/orders", "/open", "/needs", "/sync", "/nowhere", "/docs"])
def test_no_header_or_host_leads_into_another_tenant(path: str) -> None:
    """On every route, also on one that needs no tenant, and where there is none."""
    app = usual()
    assert said(app, path, x_tenant="south") == CROSS
    assert said(app, path, host="south.shop.test") == CROSS
    assert said(app, path, x_tenant="nobody") == CROSS
    assert said(app, path, x_tenant="") == said(app, path, x_tenant="a b") == CROSS
    assert said(app, path, None, x_tenant="north") == CROSS
    assert said(app, path, host="a.north.shop.test") == CROSS


@pytest.mark.parametrize(
    "path",
    ["/t/south/orders", "/t/south/orders/", "/t/south/files/a", "/c/south/orders", "/opaque/south", "/opaque/south/x"],
)
def test_no_path_leads_into_another_tenant(path: str) -> None:
    """Included, mounted, and what is mounted and not looked into; a slash more is a redirect of the same tenant."""
    app = usual()
    assert said(app, path) == CROSS
    assert said(app, path.replace("south", "north"), x_tenant="south") == CROSS
    assert said(app, path, "bob") != CROSS
    assert said(app, path, "free") == CROSS


def test_what_names_no_tenant_is_refused_unless_the_route_says_so() -> None:
    """Everything by default; with ``required`` off only the routes that need one."""
    app = usual()
    for path in ("/orders", "/needs", "/nowhere", "/docs", "/openapi.json"):
        assert said(app, path, None) == REQUIRED
        assert said(app, path, None, host="www.shop.test") == REQUIRED
    assert said(app, "/open", None) == {"tenant": None, "now": None}
    lax = shop(required=False)
    assert said(lax, "/orders", None) == {"tenant": None, "now": None}
    assert said(lax, "/needs", None) == REQUIRED
    assert said(lax, "/nowhere", None)[0] == 404


def test_a_header_that_stands_twice_is_read_twice() -> None:
    """None of the two is silently left out."""
    sent = [("authorization", "Bearer both"), ("x-tenant", "north"), ("x-tenant", "south")]
    answer = TestClient(usual()).get("/orders", headers=sent)
    assert (answer.status_code, answer.json()["detail"]) == (400, "The request names several tenants.")


def test_caches_in_front_are_told_that_the_header_decides() -> None:
    """On answers and on refusals, beside what the application says; not where no header is read."""
    client = TestClient(usual(), headers={"authorization": "Bearer anna"})
    answers = [client.get("/orders"), client.get("/orders", headers={"x-tenant": "south"})]
    assert [answer.headers.get_list("vary") for answer in answers] == [["X-Tenant"]] * 2
    with client.websocket_connect("/talk") as websocket:
        fields: Any = websocket.extra_headers
        assert (b"vary", b"X-Tenant") in fields
    assert "vary" not in TestClient(shop(sources=("path",), domains=())).get("/t/north/orders").headers


def test_a_gateway_may_name_the_tenant_of_somebody_unknown() -> None:
    """By its own address, not by what it forwards."""
    app = shop(trusted_callers=["10.0.0.0/8"])
    sent = {"x-tenant": "north", "x-forwarded-for": "10.0.0.9"}
    gateway, other = (TestClient(app, client=(peer, 1)) for peer in ("10.0.0.1", "203.0.113.9"))
    assert gateway.get("/orders", headers=sent).json() == NORTH
    assert other.get("/orders", headers=sent).status_code == 403


def test_websockets_belong_to_tenants_as_well() -> None:
    """The endpoint is told; whoever does not belong there gets no handshake."""
    client = TestClient(usual())
    with client.websocket_connect("/talk", headers={"authorization": "Bearer anna"}) as websocket:
        assert websocket.receive_text() == "t1"
    for sent in ({"authorization": "Bearer anna", "x-tenant": "south"}, {}, {"x-tenant": "north"}):
        with pytest.raises(WebSocketDisconnect), client.websocket_connect("/talk", headers=sent):
            raise AssertionError("it opened")


def test_limits_by_plan_and_tenant_and_metrics_know_the_tenant() -> None:
    """A tenant has one budget for all its people; metrics name so many tenants and count the others together."""
    app = shop(max_measured=1)
    assert [said(app, "/plan", "anna")["now"] for _ in range(3)] == ["t1"] * 3
    assert said(app, "/plan", "bob")["now"] == "t2"
    assert said(app, "/plan", "both", x_tenant="south") == (429, "quota-exceeded")
    value = app.state.hardening.metrics.registry.get_sample_value
    counted = {name: value("hardening_tenant_requests_total", {"tenant": name}) for name in ("t1", "t2", "other")}
    assert counted == {"t1": 3.0, "t2": None, "other": 2.0}


def rewriting(to: str) -> Callable[[ASGIApp], ASGIApp]:
    def around(app: ASGIApp) -> ASGIApp:
        async def move(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["path"] == "/orders":
                scope["path"], scope["raw_path"] = to, to.encode()
            await app(scope, receive, send)

        return move

    return around


@pytest.mark.parametrize(
    ("to", "who", "expected"),
    [
        ("/t/south/orders", "anna", CROSS),
        ("/t/north/orders", "anna", NORTH),
        ("/t/north/orders", None, NORTH),
        ("/open", "anna", NORTH),
        ("/needs", None, REQUIRED),
    ],
)
def test_a_moved_request_comes_to_no_other_tenant(to: str, who: str | None, expected: Any) -> None:
    """The tenant of the new path is decided, too, and the first one holds."""
    app = shop(required=False)
    app.add_middleware(rewriting(to))
    assert said(app, "/orders", who) == expected
    without = shop(enabled=False)
    without.add_middleware(rewriting("/open"))
    assert said(without, "/orders", who) == {"tenant": None, "now": None}


def test_an_application_hardened_by_itself_keeps_its_tenants_inside_another() -> None:
    """The stack around knows nothing of tenants; one that does is not contradicted."""
    outer = FastAPI()
    outer.mount("/inner", shop())
    harden(outer, Settings(_env_file=None))
    assert said(outer, "/inner/t/north/orders") == NORTH
    assert said(outer, "/inner/t/south/orders") == CROSS
    assert said(outer, "/inner/orders", None) == REQUIRED
    around = FastAPI()
    around.mount("/inner", shop(sources=("path",), domains=()))
    harden(
        around,
        Settings.model_validate({"tenancy": {"sources": ["header"], "callers_without_tenant": "allow"}}),
        authenticators=[Names()],
        tenants=TENANTS.get,
    )
    assert said(around, "/inner/t/north/orders", "both", x_tenant="south") == CROSS
    assert said(around, "/inner/t/north/orders", "anna", x_tenant="north") == NORTH


def test_alone_it_works_on_starlette() -> None:
    """Without resolver a well-formed name is a tenant; without a router around, a path names none."""

    async def endpoint(request: Request) -> PlainTextResponse:
        return PlainTextResponse(str(request_context.ensure(request.scope).tenant))

    routes = [Mount("/t/{tenant}", routes=[Route("/x", endpoint)])]
    tenancy = TenancySettings(sources=("header",), trusted_callers=("127.0.0.1",))
    app = TenancyMiddleware(Starlette(routes=routes), tenancy)
    client = TestClient(app, client=("127.0.0.1", 1))
    assert client.get("/t/a/x", headers={"x-tenant": "acme"}).text == "acme"
    assert client.get("/t/a/x", headers={"x-tenant": "a/b"}).json()["title"] == "Tenant unknown"
    assert client.get("/t/a/x").status_code == 400
    with TestClient(app) as started:
        assert started.app is app


def test_overrides_hold_where_no_layer_is() -> None:
    """Nobody knows of a tenant, so a route that needs one is closed."""
    app = FastAPI()
    app.get("/needs", dependencies=[RequireTenant()])(told)
    app.get("/open", dependencies=[RequireTenant.exempt])(told)
    client = TestClient(app)
    assert [client.get(path).status_code for path in ("/needs", "/open")] == [400, 200]


def test_work_without_a_request_names_its_tenant_itself() -> None:
    """In a job, a script, a test; and it ends."""
    with as_tenant("acme") as tenant, as_tenant(Tenant("other")):
        assert (tenant, current_tenant()) == (Tenant("acme"), Tenant("other"))
    assert current_tenant() is None


@given(st.text(string.printable, max_size=200))
def test_only_a_well_formed_name_is_a_tenant_by_itself(name: str) -> None:
    """What a client wrote goes into keys, log lines and queries."""
    tenant = asyncio.run(Tenancy().find(name))
    assert tenant is None or (set(name) <= set(string.ascii_letters + string.digits + "._:|@-") and len(name) <= 128)
