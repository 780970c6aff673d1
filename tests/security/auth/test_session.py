"""Sessions: their cookie, their ends, and what cannot be done with one."""

import asyncio
import sys
from http.cookies import SimpleCookie
from typing import Any

import pytest
from fastapi import FastAPI, Request, Response, WebSocket
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr
from starlette.requests import HTTPConnection
from starlette.testclient import TestClient, WebSocketDenialResponse

from fastapi_hardening import ConfigurationError, CurrentUser, OptionalUser, Public, Settings, harden
from fastapi_hardening.core.identity import Principal
from fastapi_hardening.core.store import MemoryStore
from fastapi_hardening.security.auth import Csrf, Sessions, SessionSettings
from tests.security.auth.conftest import Kit

SECRET = "0123456789abcdef0123456789abcdef"
OTHER = "fedcba9876543210fedcba9876543210"


class House(Kit):
    """An application with a login, a logout and a page that says who is there."""

    def __init__(self, *, claims: Any = None, sessions: Sessions | None = None, **session: Any) -> None:
        settings = SessionSettings.model_validate({"secrets": [SECRET], **session})
        self.sessions = sessions or Sessions(settings)
        app = FastAPI()
        super().__init__(app, [self.sessions], auth={"default": "required"})

        @app.post("/login", dependencies=[Public(), Csrf("always")])
        async def login(request: Request, response: Response, name: str = "anna") -> None:
            principal = Principal(name, roles=frozenset({"customer"}), claims=claims or {})
            await self.sessions.login(request, response, principal)

        @app.post("/logout", dependencies=[Public()])
        async def logout(request: Request, response: Response, everywhere: bool = False) -> None:
            await self.sessions.logout(request, response, everywhere=everywhere)

        @app.get("/me")
        async def me(user: CurrentUser) -> list[Any]:
            return [user.id, user.scheme, sorted(user.roles), user.credential, user.expires_at]

        @app.get("/front", dependencies=[Public()])
        async def front(user: OptionalUser) -> str:
            return "stranger" if user is None else user.id

        @app.post("/buy")
        async def buy() -> str:
            return "bought"

        @app.websocket("/talk")
        async def talk(websocket: WebSocket, user: CurrentUser) -> None:
            await websocket.accept()
            await websocket.send_text(user.id)


STORAGES = pytest.mark.parametrize("storage", ["cookie", "store"])


def cookie_of(answer: Any) -> str:
    """The one cookie that an answer sets, as it was sent."""
    [cookie] = answer.headers.get_list("set-cookie")
    return str(cookie)


def me(client: TestClient) -> int:
    return int(client.get("/me").status_code)


@STORAGES
def test_a_login_is_remembered(storage: str) -> None:
    """By a cookie that scripts cannot read."""
    house = House(storage=storage)
    client = house.client()
    assert me(client) == 401
    cookie = cookie_of(client.post("/login"))
    assert cookie.startswith("session=")
    assert cookie.partition("; ")[2] == "Path=/; HttpOnly; SameSite=Lax"
    name, scheme, roles, credential, expires_at = client.get("/me").json()
    assert (name, scheme, roles) == ("anna", "session", ["customer"])
    assert expires_at == house.clock.time() + 43_200
    assert credential not in cookie
    assert "set-cookie" not in client.get("/me").headers


@STORAGES
def test_on_https_the_cookie_cannot_be_planted(storage: str) -> None:
    """With the prefix, Secure, for the whole host and no other; the plain name is not read there."""
    house = House(storage=storage, same_site="strict")
    client = house.client("https://shop.test")
    cookie = cookie_of(client.post("/login"))
    assert cookie.startswith("__Host-session=")
    assert cookie.partition("; ")[2] == "Path=/; HttpOnly; SameSite=Strict; Secure"
    assert me(client) == 200
    value = SimpleCookie(cookie)["__Host-session"].value
    planted = house.client("https://shop.test")
    assert planted.get("/me", headers={"Cookie": f"session={value}"}).status_code == 401


def test_secure_may_be_said() -> None:
    """Where a proxy that is not trusted ends TLS."""
    assert cookie_of(House(secure=True).client().post("/login")).startswith("__Host-session=")
    assert cookie_of(House(secure=False).client("https://shop.test").post("/login")).startswith("session=")


@STORAGES
def test_a_login_makes_a_new_session_and_ends_the_old_one(storage: str) -> None:
    """So that nobody can fix a session upon somebody (session fixation)."""
    house = House(storage=storage)
    client = house.client()
    before = cookie_of(client.post("/login?name=mallory")).partition(";")[0]
    after = cookie_of(client.post("/login")).partition(";")[0]
    assert before != after
    fresh = house.client()
    assert fresh.get("/me", headers={"Cookie": before}).status_code == 401
    assert fresh.get("/me", headers={"Cookie": after}).json()[0] == "anna"


def test_an_id_of_the_client_is_never_taken() -> None:
    """What was not given out is nothing."""
    house = House(storage="store")
    client = house.client()
    client.cookies.set("session", "an-id-of-mine")
    cookie = cookie_of(client.post("/login"))
    assert "an-id-of-mine" not in cookie


@STORAGES
def test_a_logout_ends_the_session_everywhere_it_was_copied_to(storage: str) -> None:
    """The cookie is taken away, and the browser forgets what it kept."""
    house = House(storage=storage)
    client = house.client()
    copied = cookie_of(client.post("/login")).partition(";")[0]
    answer = client.post("/logout")
    assert cookie_of(answer) == "session=; Path=/; HttpOnly; SameSite=Lax; Max-Age=0"
    assert answer.headers["clear-site-data"] == '"cache", "cookies", "storage"'
    assert me(client) == 401
    assert house.client().get("/me", headers={"Cookie": copied}).status_code == 401


@STORAGES
def test_all_sessions_of_a_person_can_be_ended(storage: str) -> None:
    """Those that began until then; others, and later ones, go on."""
    house = House(storage=storage)
    one, two, ben = house.client(), house.client(), house.client()
    one.post("/login")
    two.post("/login")
    ben.post("/login?name=ben")
    one.post("/logout?everywhere=true")
    assert [me(one), me(two), me(ben)] == [401, 401, 200]
    house.clock.advance(1)
    two.post("/login")
    assert me(two) == 200


def test_a_logout_of_somebody_unknown_does_no_harm() -> None:
    """The cookie is taken away all the same."""
    assert cookie_of(House().client().post("/logout")).startswith("session=;")


@STORAGES
def test_an_idle_session_ends(storage: str) -> None:
    """And one that is used does not, until it is old."""
    house = House(storage=storage, idle_seconds=100, absolute_seconds=350)
    used, idle = house.client(), house.client()
    used.post("/login")
    idle.post("/login")
    for _ in range(4):
        house.clock.advance(80)
        assert me(used) == 200
    assert me(idle) == 401
    house.clock.advance(30)
    assert me(used) == 401


def test_a_session_ends_with_what_it_was_made_of() -> None:
    """A principal that ends earlier takes its session with it."""
    house = House()

    @house.app.post("/short", dependencies=[Public()])
    async def short(request: Request, response: Response) -> None:
        principal = Principal("anna", expires_at=house.clock.time() + 10)
        await house.sessions.login(request, response, principal)

    client = house.client()
    client.post("/short")
    assert client.get("/me").json()[4] == house.clock.time() + 10
    house.clock.advance(10)
    assert me(client) == 401


def test_a_signed_cookie_is_written_again_now_and_then() -> None:
    """Not at each request."""
    house = House(idle_seconds=100)
    client = house.client()
    client.post("/login")
    house.clock.advance(9)
    assert "set-cookie" not in client.get("/me").headers
    house.clock.advance(1)
    assert cookie_of(client.get("/me")).startswith("session=")


@pytest.mark.parametrize(("path", "status"), [("/login?name=ben", 200), ("/logout", 401)])
def test_a_login_or_logout_comes_before_a_renewal(path: str, status: int) -> None:
    """Of one request: an answer sets the cookie once, to what it is from then on."""
    house = House(idle_seconds=100)
    client = house.client()
    client.post("/login")
    house.clock.advance(50)
    cookie_of(client.post(path))
    assert me(client) == status
    if status == 200:
        assert client.get("/me").json()[0] == "ben"


def test_a_session_that_was_ended_is_not_written_again() -> None:
    """By a request that was under way meanwhile: the mark of its end stays."""
    house = House(storage="store", idle_seconds=100)
    client = house.client()
    client.post("/login")
    [key] = [key for key in house.handle.store._values._entries if "kept" in key]  # type: ignore[attr-defined]
    kept = asyncio.run(house.handle.store.get(key))
    client.post("/logout")
    assert kept is not None
    asyncio.run(house.handle.store.put(key, kept, 100))
    client.cookies.set("session", __import__("json").loads(kept)["i"])
    assert me(client) == 401


def test_the_store_holds_no_cookie() -> None:
    """Its keys are hashes."""
    house = House(storage="store")
    client = house.client()
    value = SimpleCookie(cookie_of(client.post("/login")))["session"].value
    assert not any(value in key for key in house.handle.store._values._entries)  # type: ignore[attr-defined]


def test_a_cookie_that_proves_nothing_is_no_credential() -> None:
    """The browser sends it whatever the person wants: what is public stays so, what is not asks who it is."""
    house = House()
    client = house.client()
    for value in ("forged", "a.b.c", "x" * 5000, ""):
        sent = {"Cookie": f"session={value}"}
        assert client.get("/front", headers=sent).json() == "stranger"
        answer = client.get("/me", headers=sent)
        assert answer.json()["type"].endswith("#authentication-required")
        assert answer.headers["www-authenticate"] == 'Cookie cookie-name="session"'


@given(st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters=';,"\\'), max_size=200))
def test_any_cookie_is_a_session_or_nothing(value: str) -> None:
    """Nothing is raised."""
    scope = {"type": "http", "headers": [(b"cookie", f"session={value}".encode())], "server": ("x", 1), "client": None}
    for storage in ("cookie", "store"):
        sessions = Sessions(SessionSettings.model_validate({"secrets": [SECRET], "storage": storage}))
        assert asyncio.run(sessions.authenticate(HTTPConnection(dict(scope)))) is None


def test_a_session_of_another_version_is_ended(caplog: pytest.LogCaptureFixture) -> None:
    """What it says is not understood any more."""
    house = House()
    serializer = house.sessions._serializer
    assert serializer is not None
    for members in ({"i": "x"}, {"i": "x", "b": 0, "s": 0, "p": {"name": "anna"}}, ["a list"]):
        value = serializer.written(members)  # type: ignore[arg-type]
        assert house.client().get("/me", headers={"Cookie": f"session={value}"}).status_code == 401
    assert "another version" in caplog.text


def test_secrets_are_changed_without_a_logout() -> None:
    """The newest signs, older ones are taken while they are listed."""
    old, both, new = (House(secrets=secrets) for secrets in ([SECRET], [OTHER, SECRET], [OTHER]))
    signed = cookie_of(old.client().post("/login")).partition(";")[0]
    assert both.client().get("/me", headers={"Cookie": signed}).status_code == 200
    assert new.client().get("/me", headers={"Cookie": signed}).status_code == 401
    signed = cookie_of(both.client().post("/login")).partition(";")[0]
    assert new.client().get("/me", headers={"Cookie": signed}).status_code == 200


def test_a_session_too_large_for_a_cookie_is_told() -> None:
    """With what to do; the store takes it."""
    claims = {"book": [str(number) for number in range(3000)]}
    with pytest.raises(ValueError, match=r"set auth\.session\.storage to 'store'"):
        House(claims=claims).client().post("/login")
    client = House(claims=claims, storage="store").client()
    client.post("/login")
    assert me(client) == 200


def test_a_store_without_room_begins_and_ends_no_session() -> None:
    """It is told, and not forgotten."""
    settings = SessionSettings.model_validate({"secrets": [SECRET], "storage": "store"})
    full = MemoryStore(max_keys=1)
    asyncio.run(full.put("taken", b"", 100_000))
    house = House(sessions=Sessions(settings, store=full))
    with pytest.raises(ConnectionError, match="no room for the session"):
        house.client().post("/login")
    with pytest.raises(ConnectionError, match="no room for the revocation"):
        asyncio.run(house.sessions.revoke_all("anna"))
    signed = SessionSettings.model_validate({"secrets": [SECRET]})
    house = House(sessions=Sessions(signed, store=full))
    client = house.client()
    client.post("/login")
    with pytest.raises(ConnectionError, match="no room for the end"):
        client.post("/logout")


def test_another_site_cannot_act() -> None:
    """Neither with the cookie, nor by logging somebody in, nor by a websocket."""
    house = House()
    client = house.client()
    assert client.post("/login", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    client.post("/login")
    assert client.post("/buy", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert client.post("/buy", headers={"Origin": "https://evil.example"}).status_code == 403
    assert client.post("/buy", headers={"Origin": "http://testserver"}).status_code == 200
    for origin in ({"Origin": "https://evil.example"}, {}):
        with (
            pytest.raises(WebSocketDenialResponse) as denied,
            client.websocket_connect("/talk", headers=origin),
        ):
            raise AssertionError("accepted")
        assert denied.value.status_code == 403
    with client.websocket_connect("/talk", headers={"Origin": "http://testserver"}) as websocket:
        assert websocket.receive_text() == "anna"


def test_the_settings_can_make_sessions() -> None:
    """The handle finds them."""
    app = FastAPI()
    handle = harden(app, Settings(_env_file=None, auth={"session": {"secrets": SECRET}}))
    sessions = handle.auth.find(Sessions)
    assert sessions is handle.auth.authenticators[0]
    assert SECRET not in repr(handle.settings)
    assert handle.auth.find(type(handle)) is None


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"secrets": ["short"]}, "at least 32 bytes"),
        ({"cookie": "a b"}, "not a header name"),
        ({"cookie": "__Host-session"}, "leave the prefix out"),
        ({"idle_seconds": 10, "absolute_seconds": 5}, "no session would ever be idle for so long"),
    ],
)
def test_settings_that_cannot_be_are_refused(values: dict[str, Any], sentence: str) -> None:
    """By the sentence that mends them."""
    with pytest.raises(ConfigurationError, match=sentence) as refused:
        Settings(_env_file=None, auth={"session": {"secrets": [SECRET], **values}})
    assert SECRET not in str(refused.value)


def test_signed_sessions_need_a_secret_and_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are told at the start."""
    with pytest.raises(ConfigurationError, match=r"auth\.session\.secrets is empty"):
        Sessions(SessionSettings())
    monkeypatch.setitem(sys.modules, "itsdangerous", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'fastapi-hardening\[auth\]'"):
        Sessions(SessionSettings(secrets=(SecretStr(SECRET),)))
    assert Sessions(SessionSettings(storage="store")).scheme == "session"
