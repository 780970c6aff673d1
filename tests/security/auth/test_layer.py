"""The layer: who is let in where, what is answered, and that nothing leads round it."""

import logging
from pathlib import Path
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, WebSocket
from fastapi.responses import JSONResponse
from pydantic import BaseModel, SecretStr
from starlette.applications import Starlette
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route, Router
from starlette.staticfiles import StaticFiles
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.websockets import WebSocketDisconnect

from fastapi_hardening import (
    Authorize,
    ConfigurationError,
    CurrentUser,
    OptionalUser,
    Problem,
    Public,
    RequirePermissions,
    RequireRoles,
    RequireScopes,
    RequireUser,
    Settings,
    harden,
)
from fastapi_hardening.core import context as request_context
from fastapi_hardening.core.clock import ManualClock
from fastapi_hardening.core.identity import CredentialsUnchecked, InvalidCredentials, Principal
from fastapi_hardening.core.store import StoreUnavailable
from fastapi_hardening.security.auth import (
    AuthenticationMiddleware,
    AuthenticationUnavailable,
    AuthSettings,
    BasicAuthenticator,
    Gate,
    Requirement,
)
from tests.security.auth.conftest import ANNA, Kit, Tokens, bearer

REQUIRED = {"default": "required"}
OPERATOR = {"operator": SecretStr("correct horse battery")}


class Order(BaseModel):
    """A body."""

    number: int


async def ok() -> str:
    return "ok"


def challenge(answer: Any) -> str:
    """The one challenge field of an answer."""
    [value] = answer.headers.get_list("www-authenticate")
    return str(value)


# --- identification ---------------------------------------------------------------------------------------------------


def test_the_caller_is_handed_over() -> None:
    """As the endpoint declares it, and on the context for every other concern."""
    kit = Kit()

    @kit.app.get("/me")
    async def me(user: CurrentUser, request: Request) -> list[str]:
        context = request_context.ensure(request.scope)
        return [user.id, context.principal.id]

    assert kit.client().get("/me", headers=bearer("anna")).json() == ["anna", "anna"]


def test_where_it_is_optional_nobody_is_somebody_unknown() -> None:
    """And the route is told so."""
    kit = Kit()

    @kit.app.get("/greeting")
    async def greeting(user: OptionalUser) -> str:
        return "stranger" if user is None else user.id

    assert kit.client().get("/greeting").json() == "stranger"
    assert kit.client().get("/greeting", headers=bearer("anna")).json() == "anna"


def test_wrong_credentials_are_refused_where_none_would_do() -> None:
    """Who sends a token means to be known by it."""
    kit = Kit()
    kit.app.get("/open")(ok)
    kit.app.get("/public", dependencies=[Public()])(ok)
    for path in ("/open", "/public"):
        answer = kit.client().get(path, headers=bearer("forged"))
        assert answer.status_code == 401
        assert challenge(answer) == 'Bearer error="invalid_token"'
        assert answer.json()["type"].endswith("#invalid-credentials")


def test_the_first_that_finds_credentials_decides() -> None:
    """For better or worse: the next one is not asked to save it."""
    first, second = Tokens({}), Tokens()
    kit = Kit(authenticators=[BasicAuthenticator(OPERATOR), first, second])
    kit.app.get("/", dependencies=[RequireUser()])(ok)
    assert kit.client().get("/", headers=bearer("anna")).status_code == 401
    assert (first.asked, second.asked) == (1, 0)
    assert kit.client().get("/", auth=("operator", "correct horse battery")).status_code == 200


def test_a_principal_that_has_ended_is_nobody() -> None:
    """Also where its authenticator did not look."""
    kit = Kit(authenticators=[Tokens({"old": Principal("anna", expires_at=1_700_000_000.0)})])
    kit.app.get("/")(ok)
    assert kit.client().get("/", headers=bearer("old")).status_code == 401


# --- challenges -------------------------------------------------------------------------------------------------------


def test_a_bare_challenge_where_nothing_was_sent() -> None:
    """RFC 6750, section 3.1: no error is told where no credentials were sent."""
    kit = Kit(auth=REQUIRED)
    answer = kit.client().get("/")
    assert (answer.status_code, challenge(answer)) == (401, "Bearer")
    assert answer.json()["type"].endswith("#authentication-required")


def test_every_scheme_is_offered() -> None:
    """In the order in which they are asked; the one that failed says so."""
    kit = Kit(authenticators=[Tokens(), BasicAuthenticator(OPERATOR)], auth=REQUIRED)
    basic = 'Basic realm="operations", charset="UTF-8"'
    assert challenge(kit.client().get("/")) == f"Bearer, {basic}"
    assert challenge(kit.client().get("/", headers=bearer("x"))) == f'Bearer error="invalid_token", {basic}'
    assert challenge(kit.client().get("/", auth=("operator", "wrong"))) == f"Bearer, {basic}"


def test_the_metadata_of_the_resource_is_named() -> None:
    """RFC 9728, section 5.1, on every kind of challenge."""
    address = "https://shop.example/.well-known/oauth-protected-resource"
    kit = Kit(auth={**REQUIRED, "resource_metadata": address})
    kit.app.get("/", dependencies=[RequireScopes("orders:write")])(ok)
    client, said = kit.client(), f'resource_metadata="{address}"'
    assert challenge(client.get("/")) == f"Bearer {said}"
    assert challenge(client.get("/", headers=bearer("x"))) == f'Bearer error="invalid_token", {said}'
    insufficient = 'Bearer error="insufficient_scope", scope="orders:write"'
    assert challenge(client.get("/", headers=bearer("anna"))) == f"{insufficient}, {said}"


def test_a_token_that_covers_too_little_is_told_what_would_do() -> None:
    """RFC 6750, section 3.1."""
    kit = Kit()
    kit.app.get("/", dependencies=[RequireScopes("orders:read", "orders:write")])(ok)
    answer = kit.client().get("/", headers=bearer("anna"))
    assert answer.status_code == 403
    assert challenge(answer) == 'Bearer error="insufficient_scope", scope="orders:read orders:write"'
    assert kit.client().get("/", headers=bearer("ben")).status_code == 200


def test_what_is_no_token_is_not_told_of_scopes_by_a_challenge() -> None:
    """It could not get one by asking for more."""
    kit = Kit(authenticators=[BasicAuthenticator(OPERATOR)])
    kit.app.get("/", dependencies=[RequireScopes("orders:read")])(ok)
    answer = kit.client().get("/", auth=("operator", "correct horse battery"))
    assert (answer.status_code, "www-authenticate" in answer.headers) == (403, False)


# --- default deny -----------------------------------------------------------------------------------------------------


@pytest.fixture
def closed(tmp_path: Path) -> Kit:
    """Give an application with one of everything, all of it closed but two routes."""
    (tmp_path / "text.txt").write_text("text")
    app, router, public, child = FastAPI(), APIRouter(), APIRouter(dependencies=[Public()]), FastAPI()

    async def opaque(scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body"})

    async def page(_request: Request) -> PlainTextResponse:
        return PlainTextResponse("page")

    async def order(order: Order) -> int:
        return order.number

    for each in (app, router, child):
        each.get("/ok")(ok)
        each.post("/order")(order)
    app.get("/public", dependencies=[Public()])(ok)
    public.mount("/files", StaticFiles(directory=tmp_path))
    app.include_router(public, prefix="/public")
    nested = APIRouter()
    nested.include_router(router, prefix="/in")
    app.include_router(nested, prefix="/nested")
    app.mount("/child", child)
    app.mount("/files", StaticFiles(directory=tmp_path))
    app.mount("/opaque", opaque)
    app.mount("/starlette", Starlette(routes=[Route("/page", page)]))
    app.router.routes.append(Mount("/router", app=Router([Route("/page", page)])))
    app.host("host.test", child)
    app.frontend("/frontend", directory=tmp_path, fallback=None)
    return Kit(app, auth=REQUIRED)


ASKED = (
    *("GET " + path for path in ("/ok", "/nested/in/ok", "/child/ok", "/files/text.txt", "/opaque/x", "/opaque")),
    *("GET " + path for path in ("/starlette/page", "/router/page", "/frontend/text.txt", "/nope", "/child/nope")),
    *("GET " + path for path in ("/ok/", "/docs", "/redoc", "/openapi.json", "/child/docs", "/files/nope", "//ok")),
    *(method + " /ok" for method in ("POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH")),
    *("POST " + path for path in ("/order", "/nested/in/order", "/child/order", "/files/text.txt")),
)


@pytest.mark.parametrize("asked", ASKED)
def test_everything_is_closed(closed: Kit, asked: str) -> None:
    """Included, nested, mounted, static, unknown, another method: 401, and the body is not looked at."""
    method, path = asked.split()
    client = closed.client()
    answer = client.request(method, path, content=b"{", headers={"content-type": "application/json"})
    assert answer.status_code == 401
    assert challenge(answer) == "Bearer"
    known = client.request(method, path, headers=bearer("anna"), follow_redirects=False)
    assert known.status_code not in (401, 403)


def test_a_host_is_closed(closed: Kit) -> None:
    """Routes behind the name of a host as well."""
    client = closed.client(base_url="http://host.test")
    assert client.get("/ok").status_code == 401
    assert client.get("/ok", headers=bearer("anna")).status_code == 200


@pytest.mark.parametrize("path", ["/public", "/public/files/text.txt", "/livez", "/readyz", "/health", "/startupz"])
def test_what_says_so_is_open(closed: Kit, path: str) -> None:
    """By an override, also around a mount, or because it is a probe."""
    assert closed.client().get(path).status_code == 200


def test_metrics_have_a_guard_of_their_own(closed: Kit) -> None:
    """They are above the layer."""
    scraper = TestClient(closed.app, client=("10.0.0.1", 1))
    assert scraper.get("/metrics").status_code == 200


def test_a_preflight_is_answered_where_an_origin_is_allowed() -> None:
    """It never carries credentials."""
    kit = Kit(auth=REQUIRED, cors={"allow_origins": ["https://shop.example"]})
    kit.app.get("/ok")(ok)
    asked = {"Origin": "https://shop.example", "Access-Control-Request-Method": "GET"}
    assert kit.client().options("/ok", headers=asked).status_code == 200
    refused = kit.client().get("/ok", headers={"Origin": "https://shop.example"})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://shop.example"


def test_a_malformed_body_of_somebody_unknown_is_a_401(closed: Kit) -> None:
    """And of somebody known a 422."""
    json = {"content-type": "application/json"}
    client = closed.client()
    assert client.post("/order", content=b"{", headers=json).status_code == 401
    assert client.post("/order", content=b"{", headers=json | bearer("anna")).status_code == 422


def test_a_refusal_is_counted_and_logged(closed: Kit, caplog: pytest.LogCaptureFixture) -> None:
    """Under the id that the client gets."""
    with caplog.at_level(logging.INFO):
        answer = closed.client().get("/ok")
    [refused] = closed.refusals
    assert (refused.layer, refused.status, refused.template) == ("authentication", 401, "/ok")
    assert refused.problem == "authentication-required"
    assert refused.request_id == answer.headers["x-request-id"]
    assert f"request id {refused.request_id}" in caplog.text


def test_a_handler_of_the_application_writes_the_refusal() -> None:
    """As with every refusal."""
    app = FastAPI()

    @app.exception_handler(401)
    async def login(_request: Request, _error: Exception) -> JSONResponse:
        return JSONResponse({"login": "/login"}, 401)

    kit = Kit(app, auth=REQUIRED)
    assert kit.client().get("/").json() == {"login": "/login"}


# --- overrides --------------------------------------------------------------------------------------------------------


def test_every_level_holds() -> None:
    """What an application demands none of its routes gives away; Public() cancels only the default."""
    app = FastAPI(dependencies=[RequireUser()])
    router = APIRouter(dependencies=[RequireScopes("orders:read")])
    router.get("/write", dependencies=[RequireScopes("orders:write")])(ok)
    router.get("/public", dependencies=[Public()])(ok)
    app.include_router(router)
    app.get("/public", dependencies=[Public()])(ok)
    app.get("/open")(ok)
    kit = Kit(app)
    client = kit.client()
    assert client.get("/open").status_code == 401
    assert client.get("/public").status_code == 401
    assert client.get("/write", headers=bearer("anna")).status_code == 403
    assert client.get("/write", headers=bearer("ben")).status_code == 200
    assert client.get("/public", headers=bearer("anna")).status_code == 200


@pytest.mark.parametrize(
    ("requirement", "anna", "ben"),
    [
        (RequireUser(), 200, 200),
        (RequireScopes("orders:write"), 403, 200),
        (RequireRoles("clerk"), 200, 200),
        (RequireRoles("admin"), 403, 200),
        (RequireRoles("admin", "auditor"), 403, 403),
        (RequireRoles.any_of("admin", "auditor"), 403, 200),
        (RequirePermissions("orders:refund"), 403, 200),
        (RequirePermissions("orders:read", "orders:refund"), 403, 200),
    ],
)
def test_requirements_refuse_before_the_body_is_read(requirement: Requirement, anna: int, ben: int) -> None:
    """On a direct and an included route, below a mount, and where the body is malformed."""
    app, router, child = FastAPI(), APIRouter(dependencies=[requirement]), FastAPI(dependencies=[requirement])
    rbac = {
        "roles": {"clerk": ["orders:read"], "admin": ["orders:*"]},
        "inherits": {"admin": ["clerk"]},
    }

    async def order(order: Order) -> int:
        return order.number

    app.post("/direct", dependencies=[requirement])(order)
    router.post("/included")(order)
    child.post("/order")(order)
    app.include_router(router)
    app.mount("/child", child)
    client = Kit(app, auth={"rbac": rbac}).client()
    for path in ("/direct", "/included", "/child/order"):
        assert client.post(path, content=b"{").status_code == 401
        for name, status in (("anna", anna), ("ben", ben)):
            answer = client.post(path, content=b"{", headers=bearer(name))
            assert answer.status_code == (422 if status == 200 else status), (path, name)
            assert client.post(path, json={"number": 1}, headers=bearer(name)).status_code == status


def test_a_requirement_in_a_signature_hands_over_the_caller() -> None:
    """By an alias of the application."""
    kit = Kit()
    Reader = Annotated[Principal, RequireScopes("orders:read")]  # noqa: N806 - an alias, as an application has it

    @kit.app.get("/me")
    async def me(reader: Reader) -> str:
        return reader.id

    assert kit.client().get("/me", headers=bearer("anna")).json() == "anna"
    assert kit.client().get("/me").status_code == 401


def test_a_requirement_of_the_application_holds_like_ours() -> None:
    """A class of its own, with a problem of its own."""

    class OfAge(Requirement):
        async def check(self, principal: Principal, connection: HTTPConnection, gate: Gate) -> None:
            if principal.claims.get("age", 0) < 18:
                raise Problem("Come back when you are older.", status=403, title="Too young")

    old = Principal("old", claims={"age": 30})
    kit = Kit(authenticators=[Tokens({"anna": ANNA, "old": old})])
    kit.app.get("/", dependencies=[OfAge()])(ok)
    assert kit.client().get("/").status_code == 401
    assert kit.client().get("/", headers=bearer("anna")).json()["title"] == "Too young"
    assert kit.client().get("/", headers=bearer("old")).status_code == 200


@pytest.mark.parametrize(
    "wrong",
    [
        RequireScopes,
        lambda: RequireScopes("a b"),
        lambda: RequireScopes('a"b'),
        lambda: RequireRoles(""),
        RequirePermissions,
        lambda: RequirePermissions("orders:*"),
    ],
)
def test_a_requirement_that_demands_nothing_is_refused(wrong: Any) -> None:
    """It would look like protection."""
    with pytest.raises(ValueError, match=r"."):
        wrong()


async def owns(user: Principal, connection: HTTPConnection) -> bool:
    return bool(connection.path_params["owner"] == user.id)


def owns_sync(user: Principal, connection: HTTPConnection) -> bool:
    return bool(connection.path_params["owner"] == user.id)


def gone(user: Principal, connection: HTTPConnection) -> bool:
    raise Problem(status=404)


def truthy(user: Principal, connection: HTTPConnection) -> Any:
    return "yes"


@pytest.mark.parametrize(
    ("question", "own", "others"), [(owns, 200, 403), (owns_sync, 200, 403), (gone, 404, 404), (truthy, 403, 403)]
)
def test_a_function_decides_about_an_object(question: Any, own: int, others: int) -> None:
    """With the parameters of the path; only True lets the caller in, and somebody unknown is refused before."""
    kit = Kit()
    kit.app.get("/{owner}/orders", dependencies=[Authorize(question)])(ok)
    client = kit.client()
    assert client.get("/anna/orders").status_code == 401
    assert client.get("/anna/orders", headers=bearer("anna")).status_code == own
    assert client.get("/ben/orders", headers=bearer("anna")).status_code == others
    if others == 403:
        assert kit.refusals[-1].layer == "authentication"


def test_a_function_decides_about_what_is_mounted(tmp_path: Path) -> None:
    """Where no dependency runs, the layer asks."""
    (tmp_path / "text.txt").write_text("text")
    router = APIRouter(dependencies=[Authorize(lambda user, connection: user.id == "ben")])
    router.mount("/files", StaticFiles(directory=tmp_path))
    app = FastAPI()
    app.include_router(router)
    client = Kit(app).client()
    statuses = [client.get("/files/text.txt", headers=headers).status_code for headers in ({}, bearer("anna"))]
    assert statuses == [401, 403]
    assert client.get("/files/text.txt", headers=bearer("ben")).status_code == 200


def test_roles_of_a_tenant_are_judged_when_the_tenant_is_known() -> None:
    """By the credential before routing, else by whatever said so until the endpoint runs."""
    clerk = frozenset({"clerk"})
    known = {
        "bound": Principal("bound", tenant="north", tenant_roles={"north": clerk}),
        "other": Principal("other", tenant="south", tenant_roles={"north": clerk}),
    }
    kit = Kit(authenticators=[Tokens(known)], auth={"rbac": {"roles": {"clerk": ["orders:read"]}}})

    async def tenant(connection: HTTPConnection) -> None:
        request_context.ensure(connection.scope).tenant = connection.headers.get("x-tenant")

    needs = [RequireRoles("clerk"), RequirePermissions("orders:read")]
    kit.app.get("/", dependencies=needs)(ok)
    kit.app.get("/tenant", dependencies=[Depends(tenant), *needs])(ok)
    client = kit.client()
    assert client.get("/", headers=bearer("bound")).status_code == 200
    assert client.get("/", headers=bearer("other")).status_code == 403
    assert client.get("/tenant", headers=bearer("other") | {"X-Tenant": "north"}).status_code == 200
    assert client.get("/tenant", headers=bearer("bound") | {"X-Tenant": "south"}).status_code == 403


def test_permissions_come_from_a_function() -> None:
    """Such as a look into a database."""

    async def permissions_of(roles: frozenset[str]) -> list[str]:
        return ["orders:refund"] if "admin" in roles else []

    kit = Kit(permissions_of=permissions_of)
    kit.app.get("/", dependencies=[RequirePermissions("orders:refund")])(ok)
    assert kit.client().get("/", headers=bearer("anna")).status_code == 403
    assert kit.client().get("/", headers=bearer("ben")).status_code == 200


@pytest.mark.parametrize("error", [ConnectionError("db"), TimeoutError()])
def test_permissions_that_cannot_be_asked_for_let_nobody_in(error: Exception) -> None:
    """503, with a time to come back."""

    async def permissions_of(roles: frozenset[str]) -> list[str]:
        raise error

    kit = Kit(permissions_of=permissions_of)
    kit.app.get("/", dependencies=[RequirePermissions("orders:refund")])(ok)
    answer = kit.client().get("/", headers=bearer("ben"))
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")


def test_decisions_are_logged_with_their_reason(caplog: pytest.LogCaptureFixture) -> None:
    """At the level for debugging."""
    kit = Kit()
    kit.app.get("/", dependencies=[RequireScopes("orders:write")])(ok)
    with caplog.at_level(logging.DEBUG, logger="fastapi_hardening.auth"):
        kit.client().get("/", headers=bearer("anna"))
        kit.client().get("/", headers=bearer("ben"))
    assert "anna is not allowed '/': scopes orders:write" in caplog.text
    assert "ben is allowed '/': scopes orders:write" in caplog.text


# --- without a layer, or past it --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "requirement",
    [RequireUser(), RequireScopes("a"), RequireRoles("a"), RequirePermissions("a"), Authorize(lambda _u, _c: True)],
)
def test_without_a_layer_nobody_is_let_in(requirement: Requirement) -> None:
    """An application that was never hardened, or whose layer is switched off, is closed and not open."""
    app = FastAPI()
    app.get("/", dependencies=[requirement])(ok)

    @app.websocket("/talk", dependencies=[requirement])
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()

    for served in (app, Starlette(routes=[Mount("/", app)])):
        answer = TestClient(served).get("/", headers=bearer("anna"))
        assert (answer.status_code, challenge(answer)) == (401, "Bearer")
    with pytest.raises((WebSocketDisconnect, HTTPException)), TestClient(app).websocket_connect("/talk"):
        raise AssertionError("accepted")


def test_without_a_layer_public_and_optional_do_nothing() -> None:
    """They demand nothing."""
    app = FastAPI()

    @app.get("/", dependencies=[Public()])
    async def index(user: OptionalUser) -> bool:
        return user is None

    assert TestClient(app).get("/").json() is True


class Rewrite:
    """A middleware of an application that sends one path to another route."""

    def __init__(self, app: Any, to: str, *, copies: bool = False, of: str = "/asked") -> None:
        self.app = app
        self.to = to
        self.of = of
        self.copies = copies

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] in ("http", "websocket") and scope["path"] == self.of:
            if self.copies:
                scope = dict(scope)
            scope["path"] = self.to
        await self.app(scope, receive, send)


@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("to", ["/secret", "/in/secret", "/child/secret", "/files/text.txt", "/nope"])
def test_a_path_that_is_rewritten_does_not_lead_round_the_default(tmp_path: Path, to: str, copies: bool) -> None:
    """The route that runs is the one that must be public."""
    (tmp_path / "text.txt").write_text("text")
    app, router, child = FastAPI(), APIRouter(), FastAPI()
    for each in (app, router, child):
        each.get("/secret")(ok)
    app.include_router(router, prefix="/in")
    app.mount("/child", child)
    app.mount("/files", StaticFiles(directory=tmp_path))
    app.get("/asked", dependencies=[Public()])(ok)
    app.add_middleware(Rewrite, to=to, copies=copies)
    kit = Kit(app, auth=REQUIRED)
    answer = kit.client().get("/asked")
    assert (answer.status_code, challenge(answer)) == (401, "Bearer")
    assert [refused.status for refused in kit.refusals] == [401]
    assert kit.client().get("/asked", headers=bearer("anna")).status_code in (200, 404)


@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("requirement", [RequireScopes("orders:write"), Authorize(lambda user, _c: user.id == "ben")])
def test_a_path_that_is_rewritten_keeps_the_requirements(requirement: Requirement, copies: bool) -> None:
    """They enforce themselves."""
    app = FastAPI()
    app.get("/secret", dependencies=[requirement])(ok)
    app.get("/asked")(ok)
    app.add_middleware(Rewrite, to="/secret", copies=copies)
    client = Kit(app).client()
    assert [client.get("/asked", headers=bearer(name)).status_code for name in ("anna", "ben")] == [403, 200]
    assert client.get("/asked").status_code == 401


@pytest.mark.parametrize("copies", [True, False])
def test_a_middleware_of_a_mounted_application_does_not_lead_round_the_default(copies: bool) -> None:
    """Nor one of an application that was mounted later."""
    app = FastAPI()

    def child() -> FastAPI:
        child = FastAPI()
        child.get("/asked", dependencies=[Public()])(ok)
        child.get("/secret")(ok)
        child.add_middleware(Rewrite, of="/child/asked", to="/child/secret", copies=copies)
        child.add_middleware(Rewrite, of="/late/asked", to="/late/secret", copies=copies)
        return child

    app.mount("/child", child())
    kit = Kit(app, auth=REQUIRED)
    client = kit.client()
    assert client.get("/child/asked").status_code == 401
    assert client.get("/child/asked", headers=bearer("anna")).status_code == 200
    app.mount("/late", child())
    assert client.get("/late/asked").status_code == 401


def test_dependency_overrides_do_not_switch_the_layer_off() -> None:
    """They replace what an endpoint is handed, and nothing else."""
    requirement = RequireUser()
    kit = Kit()

    @kit.app.get("/")
    async def me(user: Annotated[Principal, requirement]) -> str:
        return user.id

    assert requirement.dependency is not None
    kit.app.dependency_overrides[requirement.dependency] = lambda: Principal("somebody else")
    assert kit.client().get("/").status_code == 401
    assert kit.client().get("/", headers=bearer("anna")).json() == "somebody else"


# --- crashes ----------------------------------------------------------------------------------------------------------


def test_a_crash_of_an_authenticator_is_a_500() -> None:
    """Never a pass, and nothing of it is told."""
    kit = Kit(authenticators=[Tokens(raises=RuntimeError("a secret of the exception"))])
    kit.app.get("/", dependencies=[Public()])(ok)
    answer = kit.client(raising=False).get("/")
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.json()["type"].endswith("#internal-error")


@pytest.mark.parametrize("error", [AuthenticationUnavailable(), ConnectionError("redis"), TimeoutError()])
def test_what_is_down_is_a_503(error: Exception) -> None:
    """With a time to come back, on a public route too: who calls is not known."""
    kit = Kit(authenticators=[Tokens(raises=error)])
    kit.app.get("/", dependencies=[Public()])(ok)
    answer = kit.client().get("/")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert answer.json()["type"].endswith("#authentication-unavailable")


@pytest.mark.parametrize("error", [CredentialsUnchecked("down"), StoreUnavailable("gone"), ConnectionError("redis")])
def test_a_public_page_does_not_go_down_with_the_sessions(error: Exception) -> None:
    """A cookie that cannot be checked counts as none where somebody unknown may call, and as 503 where nobody may."""
    cookies = Tokens(raises=error)
    cookies.ambient = True
    kit = Kit(authenticators=[cookies])
    kit.app.get("/open", dependencies=[Public()])(ok)
    kit.app.get("/closed", dependencies=[RequireUser()])(ok)
    client = kit.client()
    assert client.get("/open").status_code == 200
    assert client.get("/closed").status_code == 503


# --- configuration ----------------------------------------------------------------------------------------------------


def test_closed_without_a_key_is_refused() -> None:
    """By the sentence that mends it, when harden() is called."""
    with pytest.raises(ConfigurationError, match=r"nothing could let anybody in: give harden\(\) authenticators"):
        harden(FastAPI(), Settings(_env_file=None, auth={"default": "required"}))
    with pytest.raises(ConfigurationError, match="would not be asked"):
        harden(FastAPI(), Settings(_env_file=None, auth={"enabled": False}), authenticators=[Tokens()])
    with pytest.raises(ConfigurationError, match="nothing could let anybody in"):
        AuthenticationMiddleware(FastAPI(), AuthSettings(default="required"))


def test_what_is_switched_off_asks_nobody() -> None:
    """Neither whom the settings name; the routes that demand somebody are refused before the first request."""
    app = FastAPI()
    auth = {"enabled": False, "basic": {"users": {"operator": "correct horse battery"}}}
    handle = harden(app, Settings(_env_file=None, auth=auth))
    assert (handle.auth.authenticators, handle.auth.idle) == ((), True)


def test_a_requirement_that_nobody_could_meet_is_refused_before_the_first_request() -> None:
    """With the route that has it."""
    app = FastAPI()
    app.get("/orders", dependencies=[RequireScopes("orders:read")])(ok)
    harden(app, Settings(_env_file=None))
    with pytest.raises(ConfigurationError, match=r"/orders: the route demands a caller who is known"):
        app.build_middleware_stack()


def test_a_route_that_is_added_later_and_that_nobody_could_meet_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """It is closed, and the log says why."""
    app = FastAPI()
    harden(app, Settings(_env_file=None))
    client = TestClient(app)
    client.get("/")
    app.get("/late", dependencies=[RequireUser()])(ok)
    with caplog.at_level(logging.WARNING):
        assert client.get("/late").status_code == 401
    assert "/late: the route demands a caller who is known" in caplog.text


def test_a_mount_that_is_added_later_and_that_nobody_could_meet_is_closed(tmp_path: Path) -> None:
    """Where no dependency would refuse, the layer does, though there is no authenticator."""
    (tmp_path / "text.txt").write_text("text")
    app = FastAPI()
    app.get("/open")(ok)
    harden(app, Settings(_env_file=None))
    client = TestClient(app)
    assert client.get("/open").status_code == 200
    router = APIRouter(dependencies=[RequireUser()])
    router.mount("/files", StaticFiles(directory=tmp_path))
    app.include_router(router)
    assert client.get("/files/text.txt").status_code == 401
    assert client.get("/open").status_code == 200


@pytest.mark.parametrize("wrong", [Tokens, object(), "bearer"])
def test_what_is_no_authenticator_is_refused(wrong: Any) -> None:
    """Such as a class in place of an object."""
    with pytest.raises(ConfigurationError, match="is no authenticator"):
        harden(FastAPI(), Settings(_env_file=None), authenticators=[wrong])


def test_what_is_open_is_told_at_the_start(closed: Kit, caplog: pytest.LogCaptureFixture) -> None:
    """In one line, and by the handle."""
    with caplog.at_level(logging.INFO):
        closed.app.build_middleware_stack()
    assert "open to everybody: /public, /public/files" in caplog.text
    assert {route.template for route in closed.handle.routes() if route.open} == {"/public", "/public/files"}


def test_where_nothing_is_required_all_is_open_but_what_demands() -> None:
    """As the handle tells."""
    kit = Kit(FastAPI(openapi_url=None))
    kit.app.get("/a")(ok)
    kit.app.get("/b", dependencies=[RequireUser()])(ok)
    assert {route.template: route.open for route in kit.handle.routes()} == {"/a": True, "/b": False}


def test_alone_it_closes_an_application() -> None:
    """Without harden()."""
    app = FastAPI()
    app.get("/")(ok)
    app.add_middleware(AuthenticationMiddleware, settings=AuthSettings(default="required"), authenticators=[Tokens()])
    assert TestClient(app).get("/").status_code == 401
    assert TestClient(app).get("/", headers=bearer("anna")).status_code == 200
    with TestClient(app) as client:
        assert client.get("/").json()["title"] == "Authentication required"


# --- hardened inside hardened -----------------------------------------------------------------------------------------


def inner_app(name: str) -> FastAPI:
    """A hardened application, closed to all but one user of its own."""
    inner = FastAPI()

    @inner.get("/me")
    async def me(user: CurrentUser) -> str:
        return user.id

    inner.get("/public", dependencies=[Public()])(ok)
    inner.get("/plain")(ok)
    basic = BasicAuthenticator({name: SecretStr("correct horse battery")})
    harden(inner, Settings(_env_file=None, auth={"default": "required"}), authenticators=[basic], clock=ManualClock())
    return inner


def test_a_closed_application_stays_closed_where_it_is_mounted() -> None:
    """Under one that demands nothing: the other layers of the inner one step aside, this one does not."""
    outer = FastAPI()
    outer.mount("/inner", inner_app("operator"))
    outer.get("/plain")(ok)
    public = APIRouter(dependencies=[Public()])
    public.mount("/through-public", inner_app("operator"))
    outer.include_router(public)
    harden(outer, Settings(_env_file=None), authenticators=[Tokens()])
    client = TestClient(outer)
    assert client.get("/plain").status_code == 200
    for mount in ("/inner", "/through-public"):
        assert client.get(f"{mount}/plain").status_code == 401
        assert client.get(f"{mount}/nope").status_code == 401
        assert client.get(f"{mount}/public").status_code == 200
        assert client.get(f"{mount}/plain", auth=("operator", "correct horse battery")).status_code == 200


@pytest.mark.parametrize("hardened", ["outer", "inner", "both"])
def test_a_middleware_of_a_mounted_hardened_application_does_not_lead_round_the_default(hardened: str) -> None:
    """Whichever of the two is closed."""
    outer, inner = FastAPI(), FastAPI()
    inner.get("/asked", dependencies=[Public()])(ok)
    inner.get("/secret")(ok)
    inner.add_middleware(Rewrite, of="/inner/asked", to="/inner/secret")
    outer.mount("/inner", inner)
    for name, app in (("inner", inner), ("outer", outer)):
        is_closed = hardened in (name, "both")
        auth = {"default": "required"} if is_closed else {}
        harden(app, Settings(_env_file=None, auth=auth), authenticators=[Tokens()] if is_closed else [])
    client = TestClient(outer)
    assert client.get("/inner/asked").status_code == 401
    assert client.get("/inner/asked", headers=bearer("anna")).status_code == 200


def test_a_mounted_application_with_a_gate_of_its_own_needs_none_outside() -> None:
    """Its requirements are met there; those of others are not."""
    outer = FastAPI()
    outer.mount("/inner", inner_app("operator"))
    harden(outer, Settings(_env_file=None))
    client = TestClient(outer)
    assert client.get("/inner/me").status_code == 401
    assert client.get("/inner/me", auth=("operator", "correct horse battery")).json() == "operator"
    another = FastAPI()
    another.mount("/inner", inner_app("operator"))
    another.get("/mine", dependencies=[RequireUser()])(ok)
    harden(another, Settings(_env_file=None))
    with pytest.raises(ConfigurationError, match=r"^/mine: the route"):
        another.build_middleware_stack()


def test_who_is_known_outside_is_not_known_inside() -> None:
    """A customer of the outer application is no operator of the inner one."""
    outer = FastAPI()
    outer.mount("/inner", inner_app("operator"))
    harden(outer, Settings(_env_file=None, auth={"default": "required"}), authenticators=[Tokens()])
    client = TestClient(outer)
    assert client.get("/inner/plain", headers=bearer("anna")).status_code == 401
    # And the outer one is closed as well.
    assert client.get("/inner/plain", auth=("operator", "correct horse battery")).status_code == 401


def test_an_application_under_one_that_is_not_hardened_is_closed() -> None:
    """As alone."""
    outer = FastAPI()
    outer.mount("/inner", inner_app("operator"))
    client = TestClient(outer)
    assert client.get("/inner/plain").status_code == 401
    assert client.get("/inner/me", auth=("operator", "correct horse battery")).json() == "operator"


def test_requirements_of_a_mounted_application_are_met_by_the_outer_authenticators() -> None:
    """An inner application that has none of its own."""
    inner = FastAPI()

    @inner.get("/me")
    async def me(user: CurrentUser) -> str:
        return user.id

    app = FastAPI()
    app.mount("/inner", inner)
    kit = Kit(app)
    assert kit.client().get("/inner/me", headers=bearer("anna")).json() == "anna"
    assert kit.client().get("/inner/me").status_code == 401


# --- websockets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/talk", "/in/talk", "/child/talk", "/nope", "/opaque"])
def test_websockets_are_closed(path: str) -> None:
    """Before they are accepted, wherever they are."""
    app, router, child = FastAPI(), APIRouter(), FastAPI()

    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text("hello")
        await websocket.close()

    async def opaque(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})

    for each in (app, router, child):
        each.websocket("/talk")(talk)
    app.include_router(router, prefix="/in")
    app.mount("/child", child)
    app.mount("/opaque", opaque)
    client = Kit(app, auth=REQUIRED).client()
    with pytest.raises(WebSocketDenialResponse) as denied, client.websocket_connect(path):
        raise AssertionError("accepted")
    assert (denied.value.status_code, denied.value.headers["www-authenticate"]) == (401, "Bearer")
    if path.endswith("/talk"):
        with client.websocket_connect(path, headers=bearer("anna")) as websocket:
            assert websocket.receive_text() == "hello"


@pytest.mark.parametrize("copies", [True, False])
def test_a_handshake_that_is_rewritten_does_not_lead_round_the_default(copies: bool) -> None:
    """As with requests."""
    app = FastAPI()

    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close()

    app.websocket("/asked", dependencies=[Public()])(talk)
    app.websocket("/secret")(talk)
    app.add_middleware(Rewrite, to="/secret", copies=copies)
    client = Kit(app, auth=REQUIRED).client()
    with pytest.raises(WebSocketDenialResponse) as denied, client.websocket_connect("/asked"):
        raise AssertionError("accepted")
    assert denied.value.status_code == 401
    with client.websocket_connect("/asked", headers=bearer("anna")) as websocket:
        assert websocket.receive()["type"] == "websocket.close"


# --- regressions that were published elsewhere ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent", ["Bearer", "Bearer ", "Bearer anything", "bearer anna ", "Token anna", "Bearer null", "Basic YW5uYTphbm5h"]
)
def test_regression_any_bearer_is_accepted(sent: str) -> None:
    """fastapi-guard's require_auth() let in whoever sent any field with the right scheme."""
    kit = Kit()
    kit.app.get("/", dependencies=[RequireUser()])(ok)
    assert kit.client().get("/", headers={"Authorization": sent}).status_code == 401


def test_regression_nested_routers_are_not_looked_into() -> None:
    """fastapi-guard's decorators did nothing on routes of a router that was included in a router."""
    app, nested = FastAPI(), APIRouter()
    nested.get("/secret", dependencies=[RequireUser()])(ok)
    for level in range(8):
        outer = APIRouter()
        outer.include_router(nested, prefix=f"/{level}")
        nested = outer
    app.include_router(nested)
    client = Kit(app).client()
    path = "/7/6/5/4/3/2/1/0/secret"
    assert [client.get(path).status_code, client.get(path, headers=bearer("anna")).status_code] == [401, 200]


def test_invalid_credentials_say_why_only_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """What helps a client that made a mistake helps one that guesses."""
    kit = Kit(authenticators=[Tokens(raises=InvalidCredentials("a forged signature"))])
    with caplog.at_level(logging.INFO):
        answer = kit.client().get("/")
    assert "forged" not in answer.text + str(answer.headers)
    assert "a forged signature" in caplog.text
