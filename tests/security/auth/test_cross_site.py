"""Requests that another site had a browser send: the rules of Go's CrossOriginProtection, and where they apply."""

from typing import Any

import pytest
from fastapi import FastAPI

from fastapi_hardening import Public
from fastapi_hardening.security.auth import Csrf, RequireUser
from fastapi_hardening.security.auth.cross_site import CrossSite
from tests.security.auth.conftest import Kit, Tokens, bearer


class Ambient(Tokens):
    """Credentials that a browser would send along by itself."""

    ambient = True


PROTECTION = CrossSite(["https://partner.example", "https://*.shop.example"])


# The cases of net/http's TestCrossOriginProtectionSecFetchSite and its neighbours, and a few of our own.
@pytest.mark.parametrize(
    ("method", "site", "origin", "allowed"),
    [
        ("POST", "same-origin", None, True),
        ("POST", "none", None, True),
        ("POST", "cross-site", None, False),
        ("POST", "same-site", None, False),
        ("POST", None, None, True),
        ("POST", None, "https://shop.test", True),
        ("POST", None, "https://attacker.example", False),
        ("POST", None, "null", False),
        ("GET", "cross-site", None, True),
        ("HEAD", "cross-site", None, True),
        ("OPTIONS", "cross-site", None, True),
        ("PUT", "cross-site", None, False),
        ("DELETE", "cross-site", "https://shop.test", False),
        ("PATCH", "invalid", None, False),
        ("get", "cross-site", None, False),
        ("POST", "cross-site", "https://partner.example", True),
        ("POST", "cross-site", "https://www.shop.example", True),
        ("POST", "cross-site", "https://partner.example.evil.example", False),
        ("POST", None, "https://partner.example", True),
        ("POST", None, "http://partner.example", False),
        ("POST", None, "https://SHOP.test", True),
        ("POST", None, "https://shop.test:8443", False),
        ("POST", None, "shop.test", False),
        ("POST", None, "https://", False),
        ("POST", None, "", False),
    ],
)
def test_a_request_is_told_by_what_browsers_say(
    method: str, site: str | None, origin: str | None, allowed: bool
) -> None:
    """Sec-Fetch-Site first, then Origin; without both it was no browser."""
    headers = [(b"host", b"shop.test")]
    headers += [] if site is None else [(b"sec-fetch-site", site.encode())]
    headers += [] if origin is None else [(b"origin", origin.encode())]
    assert PROTECTION.allows(method, headers) is allowed


def test_what_contradicts_itself_is_not_believed() -> None:
    """Two fields that differ come from no browser."""
    twice = [(b"sec-fetch-site", b"same-origin"), (b"sec-fetch-site", b"cross-site"), (b"host", b"shop.test")]
    assert not PROTECTION.allows("POST", twice)
    origins = [(b"origin", b"https://partner.example"), (b"origin", b"https://evil.example"), (b"host", b"shop.test")]
    assert not PROTECTION.allows("POST", origins)
    hosts = [(b"origin", b"https://shop.test"), (b"host", b"shop.test"), (b"host", b"evil.example")]
    assert not PROTECTION.allows("POST", hosts)
    assert not PROTECTION.allows("POST", [(b"origin", b"https://shop.test")])


def test_a_page_without_tls_is_another_origin() -> None:
    """Where it is known that the request came by https."""
    headers = [(b"origin", b"http://shop.test"), (b"host", b"shop.test")]
    assert PROTECTION.allows("POST", headers)
    assert not PROTECTION.allows("POST", headers, secure=True)


def test_a_handshake_has_to_name_its_origin() -> None:
    """A browser always does."""
    assert not PROTECTION.allows_websocket([(b"host", b"shop.test")])
    assert not PROTECTION.allows_websocket([(b"host", b"shop.test"), (b"origin", b"https://evil.example")])
    assert PROTECTION.allows_websocket([(b"host", b"shop.test"), (b"origin", b"https://shop.test")])
    assert PROTECTION.allows_websocket([(b"host", b"shop.test"), (b"origin", b"https://partner.example")])


def kit_with(authenticator: Any, **auth: Any) -> Kit:
    app = FastAPI()

    async def act() -> str:
        return "done"

    app.post("/act", dependencies=[RequireUser()])(act)
    app.get("/act", dependencies=[RequireUser()])(act)
    app.post("/login", dependencies=[Public(), Csrf("always")])(act)
    app.post("/hook", dependencies=[RequireUser(), Csrf("never")])(act)
    return Kit(app, [authenticator], auth=auth)


CROSS = {"Sec-Fetch-Site": "cross-site", "Origin": "https://partner.example"}


def test_credentials_of_the_browser_are_protected() -> None:
    """On what changes something, with a problem of its own, before the body is read."""
    kit = kit_with(Ambient())
    client = kit.client()
    answer = client.post("/act", headers=bearer("anna") | CROSS, content=b"{")
    assert answer.status_code == 403
    assert answer.json()["type"].endswith("#cross-site-request")
    assert "www-authenticate" not in answer.headers
    assert client.get("/act", headers=bearer("anna") | CROSS).status_code == 200
    assert client.post("/act", headers=bearer("anna") | {"Sec-Fetch-Site": "same-origin"}).status_code == 200
    assert client.post("/act", headers=bearer("anna")).status_code == 200
    assert kit.refusals[0].layer == "authentication"


def test_credentials_of_the_page_are_not() -> None:
    """A token is sent by whoever has it."""
    assert kit_with(Tokens()).client().post("/act", headers=bearer("anna") | CROSS).status_code == 200


def test_an_origin_may_be_trusted() -> None:
    """By the settings."""
    client = kit_with(Ambient(), trusted_origins=["https://partner.example"]).client()
    assert client.post("/act", headers=bearer("anna") | CROSS).status_code == 200
    evil = CROSS | {"Origin": "https://evil.example"}
    assert client.post("/act", headers=bearer("anna") | evil).status_code == 403


def test_a_route_says_otherwise() -> None:
    """A login form is protected before anybody is known; a hook is not."""
    client = kit_with(Ambient()).client()
    assert client.post("/login", headers=CROSS).status_code == 403
    assert client.post("/login", headers={"Sec-Fetch-Site": "same-origin"}).status_code == 200
    assert client.post("/hook", headers=bearer("anna") | CROSS).status_code == 200


def test_without_a_layer_a_route_protects_itself() -> None:
    """After routing."""
    app = FastAPI()
    app.post("/login", dependencies=[Csrf("always")])(lambda: "done")
    app.post("/hook", dependencies=[Csrf("never")])(lambda: "done")
    client = Kit(app, []).client()
    assert client.post("/login", headers=CROSS).status_code == 403
    assert client.post("/login").status_code == 200
    assert client.post("/hook", headers=CROSS).status_code == 200


def test_a_mode_that_does_not_exist_is_refused() -> None:
    """A misspelt one would be none."""
    with pytest.raises(ValueError, match="'always' or 'never'"):
        Csrf("off")  # type: ignore[arg-type]
