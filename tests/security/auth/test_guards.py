"""Views above the layer: who operates the application is let in by a permission."""

from typing import Any

import pytest
from fastapi import FastAPI
from pydantic import SecretStr
from starlette.requests import HTTPConnection
from starlette.testclient import TestClient

from fastapi_hardening import ConfigurationError, Settings
from fastapi_hardening.core.policy import GuardRefused, allow_everybody, allow_nobody, either
from fastapi_hardening.core.problem import Problem
from fastapi_hardening.security.auth import BasicAuthenticator, require_permissions
from tests.security.auth.conftest import Kit, Tokens, bearer

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    """Run on asyncio, as uvicorn does."""
    return "asyncio"


def kit_of(**settings: Any) -> Kit:
    auth = {"operations_permission": "ops:read", "rbac": {"roles": {"admin": ["ops:*"]}}}
    return Kit(None, [Tokens(), BasicAuthenticator({"x": SecretStr("correct horse battery")})], auth=auth, **settings)


def outside(kit: Kit) -> TestClient:
    return TestClient(kit.app, client=("8.8.8.8", 1))


def test_who_has_the_permission_reads_the_metrics() -> None:
    """Others do not, and are told how to say who they are."""
    client = outside(kit_of())
    answer = client.get("/metrics")
    assert (answer.status_code, answer.headers["www-authenticate"].partition(",")[0]) == (401, "Bearer")
    assert client.get("/metrics", headers=bearer("forged")).status_code == 401
    assert client.get("/metrics", headers=bearer("anna")).status_code == 403
    assert client.get("/metrics", headers=bearer("ben")).status_code == 200


def test_a_token_of_the_view_goes_on_to_work() -> None:
    """Beside the permission."""
    token = "0123456789abcdef"
    client = outside(kit_of(metrics={"token": token}, health={"token": token}))
    for path in ("/metrics", "/health"):
        assert client.get(path, headers=bearer(token)).status_code == 200
    assert "checks" in client.get("/health", headers=bearer(token)).json()


def test_who_has_the_permission_sees_the_details_of_health() -> None:
    """Unless nobody shall."""
    client = outside(kit_of())
    assert "checks" not in client.get("/health").json()
    assert "checks" not in client.get("/health", headers=bearer("anna")).json()
    assert "checks" in client.get("/health", headers=bearer("ben")).json()
    never = outside(kit_of(health={"details": "never"}))
    assert "checks" not in never.get("/health", headers=bearer("ben")).json()


async def test_a_guard_finds_the_gate_of_the_application() -> None:
    """By the application in the scope; where there is none it lets nobody in."""
    kit = kit_of()
    guard = require_permissions("ops:read")
    scope: dict[str, Any] = {"type": "http", "path": "/ops", "headers": [(b"authorization", b"Bearer ben")]}
    assert await guard(HTTPConnection({**scope, "app": kit.app})) is None  # type: ignore[func-returns-value]
    for app in (FastAPI(), None):
        with pytest.raises(Problem) as refused:
            await guard(HTTPConnection({**scope, "app": app}))
        assert refused.value.status_code == 401


async def test_either_of_two_guards_lets_in() -> None:
    """The second says why it does not."""
    connection = HTTPConnection({"type": "http", "headers": []})
    await either(allow_nobody, allow_everybody)(connection)
    await either(allow_everybody, allow_nobody)(connection)
    with pytest.raises(GuardRefused):
        await either(allow_nobody, allow_nobody)(connection)


@pytest.mark.parametrize(
    ("auth", "sentence"),
    [
        ({"operations_permission": "ops:*"}, "a wildcard is for roles"),
        ({"trusted_origins": ["*"]}, "would let every site act for your users"),
        ({"trusted_origins": ["shop.example"]}, "did you mean 'https://shop.example'"),
        ({"resource_metadata": "http://shop.example"}, "is no https address"),
        ({"resource_metadata": 'https://shop.example/"'}, "ends a header line"),
        ({"basic": {"users": {"a": "short"}}}, "shorter than 12 characters"),
        ({"basic": {"users": {"a:b": "correct horse battery"}}}, "has no colon"),
        ({"basic": {"realm": 'a"b'}}, "ends a header line"),
        ({"basic": {"permissions": ["ops:*:read"]}}, "only at the end"),
        ({"rbac": {"inherits": {"a": ["a"]}}}, "in a circle: a -> a"),
        ({"rbac": {"rolse": {}}}, "did you mean 'roles'"),
    ],
)
def test_settings_that_cannot_be_are_refused(auth: dict[str, Any], sentence: str) -> None:
    """By the sentence that mends them, and without a password in it."""
    with pytest.raises(ConfigurationError, match=sentence.replace("*", r"\*")) as refused:
        Settings(_env_file=None, auth=auth)
    assert "correct horse" not in str(refused.value)


def test_mappings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """As JSON, or key by key; and their secrets are not shown."""
    monkeypatch.setenv("HARDENING_AUTH__RBAC__ROLES", '{"clerk": ["orders:*"]}')
    monkeypatch.setenv("HARDENING_AUTH__BASIC__USERS__OPERATOR", "correct horse battery")
    settings = Settings(_env_file=None)
    assert settings.auth.rbac.roles == {"clerk": ("orders:*",)}
    assert settings.auth.basic is not None
    assert settings.auth.basic.users["operator"].get_secret_value() == "correct horse battery"
    assert "correct horse" not in str([value.value for value in settings.describe()])
