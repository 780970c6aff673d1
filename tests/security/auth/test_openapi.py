"""The OpenAPI document tells what is demanded."""

from typing import Any

import pytest
from fastapi import APIRouter, Depends, FastAPI
from fastapi.security import HTTPBearer
from pydantic import SecretStr

from fastapi_hardening import Public, RequireRoles, RequireScopes, RequireUser
from fastapi_hardening.security.auth import (
    ApiKeyAuthenticator,
    ApiKeys,
    BasicAuthenticator,
    MemoryApiKeyStore,
    Sessions,
    SessionSettings,
    Tickets,
)
from fastapi_hardening.security.auth.openapi import scheme_of
from tests.security.auth.conftest import Kit, Tokens

BASIC = BasicAuthenticator({"operator": SecretStr("correct horse battery")})


async def ok() -> str:
    return "ok"


def make() -> FastAPI:
    app, router = FastAPI(), APIRouter(dependencies=[RequireScopes("orders:read")])
    app.get("/plain")(ok)
    app.get("/public", dependencies=[Public()])(ok)
    app.get("/user", dependencies=[RequireUser()])(ok)
    app.get("/roles", dependencies=[RequireRoles("admin")], responses={403: {"description": "mine"}})(ok)
    app.get("/own", dependencies=[RequireUser(), Depends(HTTPBearer(scheme_name="mine", auto_error=False))])(ok)
    router.get("/scopes/{number}", dependencies=[RequireScopes("orders:write")])(ok)
    app.include_router(router, prefix="/in")
    return app


def operation(document: dict[str, Any], path: str) -> dict[str, Any]:
    found: dict[str, Any] = document["paths"][path]["get"]
    return found


def test_schemes_and_demands_are_described() -> None:
    """Each operation with the scopes that it needs, and its refusals."""
    document = Kit(make(), [Tokens(), BASIC]).app.openapi()
    assert document["components"]["securitySchemes"] == {
        "bearer": {"type": "http", "scheme": "bearer"},
        "basic": {"type": "http", "scheme": "basic"},
        "mine": {"type": "http", "scheme": "bearer"},
    }
    scopes = operation(document, "/in/scopes/{number}")
    needed = ["orders:read", "orders:write"]
    assert scopes["security"] == [{"bearer": needed}, {"basic": needed}]
    assert operation(document, "/user")["security"] == [{"bearer": []}, {"basic": []}]
    refused = scopes["responses"]["401"]
    assert refused["headers"]["WWW-Authenticate"]["schema"] == {"type": "string"}
    reference = {"$ref": "#/components/schemas/Problem"}
    assert refused["content"]["application/problem+json"]["schema"] == reference
    assert scopes["responses"]["403"]["content"]["application/problem+json"]["schema"] == reference


def test_what_is_open_demands_nothing() -> None:
    """Unless the default closes it."""
    for auth, plain in (({}, False), ({"default": "required"}, True)):
        document = Kit(make(), auth=auth).app.openapi()
        assert "security" not in operation(document, "/public")
        assert "401" not in operation(document, "/public")["responses"]
        assert ("security" in operation(document, "/plain")) == plain
        assert "403" not in operation(document, "/plain")["responses"]


def test_what_the_application_declares_stays() -> None:
    """Answers, and security dependencies of FastAPI."""
    document = Kit(make()).app.openapi()
    assert operation(document, "/roles")["responses"]["403"]["description"] == "mine"
    assert operation(document, "/own")["security"] == [{"mine": []}]


def test_a_mounted_application_is_described_too() -> None:
    """In its own document; and only once, however often the stack is built."""
    app, child = FastAPI(), FastAPI()
    child.get("/user", dependencies=[RequireUser()])(ok)
    app.mount("/child", child)
    kit = Kit(app)
    kit.app.build_middleware_stack()
    kit.app.build_middleware_stack()
    assert operation(child.openapi(), "/user")["security"] == [{"bearer": []}]


@pytest.mark.parametrize("errors", [{"enabled": False}, {"format": "fastapi"}])
def test_without_problems_the_answers_have_no_schema(errors: dict[str, Any]) -> None:
    """They are described all the same."""
    document = Kit(make(), errors=errors).app.openapi()
    assert "content" not in operation(document, "/user")["responses"]["401"]
    assert operation(document, "/user")["security"] == [{"bearer": []}]


def test_without_authenticators_the_document_is_left_alone() -> None:
    """As without us."""
    app = FastAPI()
    app.get("/")(ok)
    assert "securitySchemes" not in Kit(app, []).app.openapi().get("components", {})


def test_every_authenticator_has_words_or_none() -> None:
    """Its own, or those of its challenge."""
    sessions = Sessions(SessionSettings(secrets=(SecretStr("x" * 32),)))
    assert scheme_of(sessions) == {"type": "apiKey", "in": "cookie", "name": "__Host-session"}
    keys = ApiKeyAuthenticator(ApiKeys(MemoryApiKeyStore()))
    assert scheme_of(keys) == {"type": "apiKey", "in": "header", "name": "X-API-Key"}
    assert scheme_of(Tickets()) is None
