"""HTTP Basic: what is read, who is let in, and that a comparison tells nothing."""

import base64
import secrets
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from fastapi_hardening import CurrentUser, RequirePermissions
from fastapi_hardening.core.identity import InvalidCredentials, Principal
from fastapi_hardening.security.auth import BasicAuthenticator
from fastapi_hardening.security.auth.basic import decoded
from tests.security.auth.conftest import Kit

USERS = {"operator": SecretStr("correct horse battery"), "jörg": SecretStr("größtes Geheimnis")}


def kit_of(authenticator: BasicAuthenticator | None = None, **auth: Any) -> Kit:
    kit = Kit(authenticators=[] if authenticator is None else [authenticator], auth=auth)

    @kit.app.get("/me")
    async def me(user: CurrentUser) -> str:
        return user.id

    return kit


def header(text: str | bytes) -> dict[str, str]:
    raw = text if isinstance(text, bytes) else text.encode()
    return {"Authorization": "Basic " + base64.b64encode(raw).decode()}


def test_a_user_is_let_in() -> None:
    """In UTF-8 too, as the challenge says."""
    client = kit_of(BasicAuthenticator(USERS)).client()
    assert client.get("/me", headers=header("operator:correct horse battery")).json() == "operator"
    assert client.get("/me", headers=header("jörg:größtes Geheimnis")).json() == "jörg"
    answer = client.get("/me", headers=header("operator:wrong"))
    assert answer.headers["www-authenticate"] == 'Basic realm="operations", charset="UTF-8"'
    assert answer.status_code == 401


@pytest.mark.parametrize(
    "sent",
    [
        header(b"operator:correct horse battery\xff"),
        header("operator"),
        header("operator:correct\x00horse"),
        header("operator:" + "x" * 5000),
        {"Authorization": "Basic ***"},
        {"Authorization": "Basic "},
        header("jörg:größtes Geheimnis".encode("latin-1")),
    ],
)
def test_what_cannot_be_read_is_refused(sent: dict[str, str]) -> None:
    """It is credentials, and they prove nothing."""
    assert kit_of(BasicAuthenticator(USERS)).client().get("/me", headers=sent).status_code == 401


def test_two_fields_are_refused() -> None:
    """Somebody in between might have looked at the other one."""
    field = header("operator:correct horse battery")["Authorization"]
    client = kit_of(BasicAuthenticator(USERS)).client()
    assert client.get("/me", headers=[("Authorization", field), ("Authorization", field)]).status_code == 401


@given(st.binary(max_size=60))
def test_any_bytes_are_credentials_or_are_refused(sent: bytes) -> None:
    """Nothing else is raised."""
    for each in (sent, base64.b64encode(sent)):
        try:
            name, password = decoded(each)
        except InvalidCredentials:
            continue
        assert ":" not in name
        assert isinstance(password, str)


def test_an_unknown_user_costs_the_same_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    """By construction: one comparison in constant time of two digests of one length, whoever asks."""
    compared: list[tuple[int, int]] = []
    real = secrets.compare_digest

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return real(one, other)

    client = kit_of(BasicAuthenticator(USERS)).client()
    monkeypatch.setattr(secrets, "compare_digest", compare)
    statuses = [
        client.get("/me", headers=header(sent)).status_code
        for sent in ("nobody:wrong", "operator:wrong", "operator:correct horse battery")
    ]
    assert statuses == [401, 401, 200]
    assert compared == [(32, 32)] * 3


def sync(name: str, password: str) -> bool:
    return password == "right"


async def later(name: str, password: str) -> bool:
    return password == "right"


class Verifying:
    """A verifier that is an object."""

    async def __call__(self, name: str, password: str) -> Principal | None:
        return Principal(name, scheme="basic") if password == "right" else None


def deferred(name: str, password: str) -> Any:
    return later(name, password)


@pytest.mark.parametrize("verify", [sync, later, Verifying(), deferred])
def test_a_function_may_decide(verify: Any) -> None:
    """Sync in a thread, or async; it says yes, or who it is."""
    client = kit_of(BasicAuthenticator(verify)).client()
    assert client.get("/me", headers=header("anna:right")).json() == "anna"
    assert client.get("/me", headers=header("anna:wrong")).status_code == 401


def test_users_of_the_settings_have_roles_and_permissions() -> None:
    """So that a deployment needs no code."""
    kit = kit_of(
        basic={"users": {"operator": "correct horse battery"}, "roles": ["ops"], "permissions": ["shop:read"]},
        rbac={"roles": {"ops": ["ops:*"]}},
    )
    kit.app.get("/ops", dependencies=[RequirePermissions("ops:read", "shop:read")])(lambda: "ok")
    assert kit.client().get("/ops", headers=header("operator:correct horse battery")).status_code == 200


def test_a_browser_of_another_site_is_refused() -> None:
    """Because it sends the password along by itself."""
    kit = kit_of(BasicAuthenticator(USERS))
    kit.app.post("/do")(lambda: "ok")
    sent = header("operator:correct horse battery")
    assert kit.client().post("/do", headers=sent).status_code == 200
    assert kit.client().post("/do", headers=sent | {"Sec-Fetch-Site": "cross-site"}).status_code == 403
