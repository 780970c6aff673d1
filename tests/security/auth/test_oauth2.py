"""The token endpoint: what OAuth clients are answered, in an application that is hardened and in one that is not."""

import asyncio
import base64
import json
from collections.abc import Callable
from typing import Any
from urllib.parse import quote_plus, urlencode

import httpx2
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from fastapi import FastAPI, HTTPException, Request
from hypothesis import given
from hypothesis import strategies as st
from jose import jwk, jws  # type: ignore[import-untyped]

from fastapi_hardening import Settings, harden
from fastapi_hardening.core.clock import ManualClock
from fastapi_hardening.core.events import Events, RequestRefused
from fastapi_hardening.core.identity import Principal
from fastapi_hardening.core.store import MemoryStore
from fastapi_hardening.security.auth.issuer import IssuerSettings, SigningKey, TokenIssuer
from fastapi_hardening.security.auth.oauth2 import (
    GrantType,
    OAuthClient,
    OAuthError,
    hash_client_secret,
    jwks_router,
    narrow,
    new_client_secret,
    token_router,
)
from fastapi_hardening.security.auth.passwords import PasswordHasher, PasswordSettings
from fastapi_hardening.security.auth.throttle import LoginThrottle

FORM = "application/x-www-form-urlencoded"
PASSWORD = "correct horse battery staple"
OLD_SECRET, SECRET = "the secret of before: %+&=:/\u00e9 and longer", new_client_secret()
PRIVATE = ec.generate_private_key(ec.SECP256R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
EVERYTHING: set[GrantType] = {"password", "refresh_token", "client_credentials"}

CLIENTS = [
    OAuthClient("app", {"password", "refresh_token"}, {"orders:read", "orders:write", "admin"}),
    OAuthClient("kiosk", {"password"}, {"orders:read"}),
    OAuthClient(
        "service: \u00e9",
        {"client_credentials", "refresh_token"},
        {"stock"},
        [hash_client_secret(OLD_SECRET), hash_client_secret(SECRET)],
    ),
    OAuthClient("trusted", EVERYTHING, {"orders:read"}, [hash_client_secret(SECRET)]),
]


class Gone(MemoryStore):
    """A store that has gone."""

    async def get(self, key: str) -> bytes | None:
        raise ConnectionError

    async def put(self, key: str, value: bytes, ttl_seconds: float) -> bool:
        raise ConnectionError


class Kit:
    """An application with both endpoints, and a client that speaks to it in process."""

    def __init__(self, *, hardened: bool = False, store: MemoryStore | None = None, **changes: Any) -> None:
        self.clock = ManualClock()
        self.events = Events()
        self.users: dict[str, Principal] = {
            "anna": Principal(
                "user-1",
                roles=frozenset({"clerk"}),
                permissions=frozenset({"refund"}),
                tenant="t1",
                tenant_roles={"t1": frozenset({"owner"})},
                claims={"locale": "de"},
            ),
            "otto": Principal("user-2", scopes=frozenset({"orders:read"})),
        }
        self.hasher = PasswordHasher(PasswordSettings(memory_kib=1024, time_cost=1, max_concurrent=1, wait_seconds=0))
        self.hashed = asyncio.run(self.hasher.hash(PASSWORD))
        self.raises: Exception | None = None
        self.issuer = TokenIssuer(
            IssuerSettings(issuer="https://shop.example", audience="https://api.shop.example"),
            keys=SigningKey(PRIVATE, "ES256"),
            store=store or MemoryStore(clock=self.clock),
            events=self.events,
            clock=self.clock,
        )
        self.app = FastAPI()
        options: dict[str, Any] = {"clients": CLIENTS, "throttle": LoginThrottle(clock=self.clock)} | changes
        self.app.include_router(token_router(self.issuer, self.authenticate, **options), prefix="/api")
        self.app.include_router(jwks_router(self.issuer))
        self.handle = harden(self.app, Settings(_env_file=None), clock=self.clock) if hardened else None

    async def authenticate(self, username: str, password: str) -> Principal | None:
        if self.raises is not None:
            raise self.raises
        user = self.users.get(username)
        return user if await self.hasher.verify(password, self.hashed if user else None) else None

    def request(
        self, method: str, path: str, *, content: bytes | None = None, address: str = "203.0.113.9", **headers: str
    ) -> httpx2.Response:
        async def ask() -> httpx2.Response:
            transport = httpx2.ASGITransport(app=self.app, client=(address, 1))
            async with httpx2.AsyncClient(transport=transport, base_url="https://shop.example") as client:
                return await client.request(method, path, content=content, headers=headers)

        return asyncio.run(ask())

    def post(
        self,
        path: str = "/api/oauth/token",
        *,
        basic: tuple[str, str] | None = None,
        address: str = "203.0.113.9",
        **parameters: str,
    ) -> httpx2.Response:
        headers = {"Content-Type": FORM}
        if basic is not None:
            pair = ":".join(quote_plus(part) for part in basic)
            headers["Authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
        return self.request("POST", path, content=urlencode(parameters).encode(), address=address, **headers)

    def login(self, username: str = "anna", password: str = PASSWORD, **more: Any) -> httpx2.Response:
        parameters = {"grant_type": "password", "username": username, "password": password, "client_id": "app"} | more
        return self.post(**parameters)


@pytest.fixture(params=[False, True], ids=["alone", "hardened"])
def kit(request: pytest.FixtureRequest) -> Kit:
    """Gives both kinds of application."""
    return Kit(hardened=request.param)


def refusal(answer: httpx2.Response, status: int, error: str) -> str:
    """Checks that an answer is the error as RFC 6749, section 5.2, writes it; gives the description."""
    body = answer.json()
    assert (answer.status_code, body["error"]) == (status, error)
    assert body.keys() == {"error", "error_description"}
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["pragma"] == "no-cache"
    assert ("www-authenticate" in answer.headers) == (status == 401)
    description: str = body["error_description"]
    # The characters that the RFC allows.
    assert all(0x20 <= ord(letter) <= 0x7E and letter not in '"\\' for letter in description)
    return description


def claims_of(answer: httpx2.Response, kit: Kit) -> dict[str, Any]:
    """The claims of the access token in an answer, verified by the key set that the application serves."""
    [key] = kit.request("GET", "/.well-known/jwks.json").json()["keys"]
    claims: dict[str, Any] = json.loads(jws.verify(answer.json()["access_token"], jwk.construct(key), ["ES256"]))
    return claims


# --- password ---------------------------------------------------------------------------------------------------------


def test_a_password_gives_a_pair_of_tokens(kit: Kit) -> None:
    """As RFC 6749, section 5.1, writes it; the access token says who it is and what they are."""
    answer = kit.login(scope="orders:read orders:write")
    body = answer.json()
    assert answer.status_code == 200
    assert body.keys() == {"access_token", "token_type", "expires_in", "scope", "refresh_token"}
    assert (body["token_type"], body["expires_in"], body["scope"]) == ("Bearer", 600, "orders:read orders:write")
    assert (answer.headers["cache-control"], answer.headers["pragma"]) == ("no-store", "no-cache")
    assert answer.headers["content-type"] == "application/json"
    claims = claims_of(answer, kit)
    assert (claims["sub"], claims["client_id"], claims["scope"]) == ("user-1", "app", body["scope"])
    assert (claims["roles"], claims["permissions"], claims["tenant"]) == (["clerk"], ["refund"], "t1")
    assert (claims["tenant_roles"], claims["locale"]) == ({"t1": ["owner"]}, "de")


@pytest.mark.parametrize(("username", "password"), [("anna", "wrong"), ("nobody", PASSWORD), ("\u00e9", "x" * 2_000)])
def test_a_wrong_name_and_a_wrong_password_are_answered_alike(kit: Kit, username: str, password: str) -> None:
    """Nobody learns which accounts there are."""
    answer = kit.login(username, password)
    assert refusal(answer, 400, "invalid_grant") == "The name or the password is wrong."


def test_a_client_without_the_refresh_grant_gets_no_refresh_token(kit: Kit) -> None:
    """It could do nothing with it."""
    assert kit.login(client_id="kiosk").json().keys() == {"access_token", "token_type", "expires_in", "scope"}


def test_who_guesses_is_told_when_to_come_back_and_the_owner_at_home_logs_in(kit: Kit) -> None:
    """429 in the shape that OAuth clients read."""
    assert kit.login(address="192.0.2.1").status_code == 200
    for _ in range(5):
        refusal(kit.login(password="a guess"), 400, "invalid_grant")
    answer = kit.login()
    refusal(answer, 429, "temporarily_unavailable")
    assert answer.headers["retry-after"] == "12"
    assert kit.login(address="192.0.2.1").status_code == 200


def test_under_a_flood_of_hashes_a_client_is_told_when_to_come_back(kit: Kit) -> None:
    """503; and it was no failure of the user."""

    class Held(PasswordHasher):
        async def verify(self, password: str, hashed: str | None) -> bool:
            self._limit._free = 0
            return await super().verify(password, hashed)

    free, kit.hasher = kit.hasher, Held(kit.hasher.settings)
    for _ in range(10):
        answer = kit.login()
        refusal(answer, 503, "temporarily_unavailable")
        assert int(answer.headers["retry-after"]) >= 2
    kit.hasher = free
    assert kit.login().status_code == 200


def test_what_an_application_raises_is_its_own_affair(kit: Kit) -> None:
    """Its own status and its own answer."""
    kit.raises = HTTPException(418, "short and stout")
    answer = kit.login()
    assert answer.status_code == 418
    assert answer.json()["detail"] == "short and stout"


def test_behind_a_proxy_that_is_not_known_nobody_closes_the_door_for_all(kit: Kit) -> None:
    """There, only the account counts."""
    for number in range(40):
        form = urlencode({"grant_type": "password", "client_id": "app", "username": f"u{number}", "password": "x"})
        headers = {"Content-Type": FORM, "X-Forwarded-For": "203.0.113.1"}
        answer = kit.request("POST", "/api/oauth/token", content=form.encode(), address="10.0.0.1", **headers)
        refusal(answer, 400, "invalid_grant")
    answer = kit.login(address="10.0.0.1")
    assert answer.status_code == 200


def test_without_a_throttle_logins_work_too() -> None:
    """Where something else slows them down."""
    kit = Kit(throttle=None)
    assert [kit.login(password="wrong").status_code for _ in range(10)] == [400] * 10
    assert kit.login().status_code == 200


# --- scope ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("username", "requested", "granted"),
    [
        ("anna", None, "admin orders:read orders:write"),
        ("anna", "admin", "admin"),
        ("anna", "", "admin orders:read orders:write"),
        ("otto", None, "orders:read"),
        ("otto", "orders:read admin", "orders:read"),
    ],
)
def test_a_scope_is_what_client_and_user_may_both_give(
    kit: Kit, username: str, requested: str | None, granted: str
) -> None:
    """What the user may not give is left out, and the answer says what is left."""
    more = {} if requested is None else {"scope": requested}
    answer = kit.login(username, **more)
    assert answer.json()["scope"] == granted
    assert claims_of(answer, kit)["scope"] == granted


@pytest.mark.parametrize(
    ("username", "requested"),
    [
        ("anna", "unknown"),
        ("anna", "orders:read unknown"),
        ("anna", "orders:read  admin"),
        ("anna", ' "'),
        ("otto", "admin"),
    ],
)
def test_a_scope_beyond_the_client_or_without_anything_left_is_refused(kit: Kit, username: str, requested: str) -> None:
    """And so is one that is malformed."""
    refusal(kit.login(username, scope=requested), 400, "invalid_scope")


@given(
    st.none() | st.text(max_size=20) | st.lists(st.sampled_from("abcx"), min_size=1, max_size=4).map(" ".join),
    st.frozensets(st.sampled_from("abc")),
)
def test_nobody_gets_more_than_client_and_user_have(requested: str | None, own: frozenset[str]) -> None:
    """Whatever is asked for: part of each, or the one error."""
    client = OAuthClient("c", {"password"}, {"a", "b"})
    try:
        granted = narrow(requested, client, Principal("u", scopes=own))
    except OAuthError as error:
        code: str | None = error.error
    else:
        code = None
        assert granted <= {"a", "b"}
        assert granted <= own or not own
        assert requested is None or granted <= set(requested.split(" "))
        assert granted
    assert code in (None, "invalid_scope")


# --- refresh token ----------------------------------------------------------------------------------------------------


def refresh(kit: Kit, answer: httpx2.Response, **more: str) -> httpx2.Response:
    parameters = {"grant_type": "refresh_token", "refresh_token": answer.json()["refresh_token"], "client_id": "app"}
    return kit.post(**(parameters | more))


def test_a_refresh_token_works_once_and_its_reuse_ends_the_family(kit: Kit) -> None:
    """The second use, and everything after it, is ``invalid_grant``."""
    first = kit.login(scope="admin orders:read")
    second = refresh(kit, first, scope="admin")
    assert (second.status_code, second.json()["scope"]) == (200, "admin")
    third = refresh(kit, second)
    assert third.json()["scope"] == "admin orders:read"
    assert claims_of(third, kit)["roles"] == ["clerk"]
    assert refusal(refresh(kit, second), 400, "invalid_grant") == "The refresh token is not good."
    refusal(refresh(kit, third), 400, "invalid_grant")


def test_a_refresh_token_is_of_its_client_and_of_its_scope(kit: Kit) -> None:
    """Neither mistake uses it up."""
    first = kit.login(scope="orders:read")
    trusted = {"client_id": "trusted", "client_secret": SECRET}
    refusal(refresh(kit, first, **trusted), 400, "invalid_grant")
    refusal(refresh(kit, first, scope="orders:read admin"), 400, "invalid_scope")
    refusal(refresh(kit, first, scope='"'), 400, "invalid_scope")
    refusal(refresh(kit, first, refresh_token="nonsense"), 400, "invalid_grant")
    assert refresh(kit, first).status_code == 200


@pytest.mark.parametrize("hardened", [False, True])
def test_a_refresh_finds_the_user_as_they_are_now(hardened: bool) -> None:
    """New roles at once; who is gone gets no more."""
    users = {"user-1": Principal("user-1", roles=frozenset({"admin"}))}

    async def load(subject: str) -> Principal | None:
        return users.get(subject)

    kit = Kit(hardened=hardened, load_user=load)
    second = refresh(kit, kit.login())
    claims = claims_of(second, kit)
    assert claims["roles"] == ["admin"]
    assert "tenant" not in claims
    users.clear()
    refusal(refresh(kit, second), 400, "invalid_grant")


# --- client credentials -----------------------------------------------------------------------------------------------

SERVICE = "service: \u00e9"


@pytest.mark.parametrize("secret", [SECRET, OLD_SECRET], ids=["new", "old"])
@pytest.mark.parametrize("way", ["basic", "body"])
def test_a_service_gets_an_access_token_for_its_secret(kit: Kit, secret: str, way: str) -> None:
    """By Basic, whose parts are encoded as a form, or by the body; with either secret, and no refresh token."""
    who: dict[str, Any] = {"client_id": SERVICE, "client_secret": secret}
    if way == "basic":
        who = {"basic": (SERVICE, secret)}
    answer = kit.post(grant_type="client_credentials", **who)
    assert answer.json().keys() == {"access_token", "token_type", "expires_in", "scope"}
    claims = claims_of(answer, kit)
    assert (claims["sub"], claims["client_id"], claims["scope"]) == (SERVICE, SERVICE, "stock")


def basic(text: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(text.encode()).decode()}


@pytest.mark.parametrize(
    ("parameters", "headers"),
    [
        ({}, {}),
        ({"client_id": "nobody"}, {}),
        ({"client_id": "nobody", "client_secret": SECRET}, {}),
        ({"client_id": "trusted"}, {}),
        ({"client_id": "trusted", "client_secret": "wrong"}, {}),
        ({"client_id": "trusted", "client_secret": SECRET[:-1]}, {}),
        ({"client_id": "trusted", "client_secret": hash_client_secret(SECRET)}, {}),
        ({"client_id": "app", "client_secret": SECRET}, {}),
        ({"client_id": "x" * 257}, {}),
        ({}, basic("trusted:wrong")),
        ({}, basic("trusted:")),
        ({}, basic("trusted")),
        ({}, basic("nobody:" + SECRET)),
        ({}, basic("%ff:x")),
        ({}, {"Authorization": "Basic"}),
        ({}, {"Authorization": "Basic ????"}),
        ({}, {"Authorization": "basic " + base64.b64encode(b"\xff\xff:x").decode()}),
        ({}, {"Authorization": "Bearer abc"}),
    ],
)
def test_a_client_that_cannot_be_authenticated_is_told_how(
    kit: Kit, parameters: dict[str, str], headers: dict[str, str]
) -> None:
    """401 with ``WWW-Authenticate: Basic``, and one sentence for all."""
    content = urlencode({"grant_type": "client_credentials"} | parameters).encode()
    answer = kit.request("POST", "/api/oauth/token", content=content, **{"Content-Type": FORM}, **headers)
    assert refusal(answer, 401, "invalid_client") == "The client could not be authenticated."
    assert answer.headers["www-authenticate"].startswith('Basic realm="')


# --- requests that are wrong ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "media_type", "error"),
    [
        (b"", FORM, "invalid_client"),
        (b"client_id=app", FORM, "invalid_request"),
        (b"client_id=app&grant_type=", FORM, "invalid_request"),
        (b"client_id=app&grant_type=password&password=x", FORM, "invalid_request"),
        (b"client_id=app&grant_type=password&username=anna", FORM, "invalid_request"),
        (b"client_id=app&grant_type=refresh_token", FORM, "invalid_request"),
        (b"client_id=app&grant_type=password&grant_type=password", FORM, "invalid_request"),
        (b"client_id=app&client_id=&grant_type=password", FORM, "invalid_request"),
        (b"client_id=app&grant_type=%ff", FORM, "invalid_request"),
        (b"client_id=app&grant_type=\xff", FORM, "invalid_request"),
        (b"client_id=app&grant_type=password&x=" + b"x" * 17_000, FORM, "invalid_request"),
        (b"&".join(b"p%d=x" % number for number in range(40)), FORM, "invalid_request"),
        (b"client_id=app&grant_type=authorization_code", FORM, "unsupported_grant_type"),
        (b"client_id=app&grant_type=Password", FORM, "unsupported_grant_type"),
        (b"client_id=app&grant_type=client_credentials", FORM, "unauthorized_client"),
        (b"client_id=kiosk&grant_type=refresh_token&refresh_token=x", FORM, "unauthorized_client"),
        (b'{"client_id": "app"}', "application/json", "invalid_request"),
        (b"client_id=app", "", "invalid_request"),
        (b"--x--\r\n", "multipart/form-data; boundary=x", "invalid_request"),
    ],
)
def test_what_is_wrong_with_a_request_has_its_code(kit: Kit, content: bytes, media_type: str, error: str) -> None:
    """Those of RFC 6749, section 5.2, and never a validation error of another shape."""
    answer = kit.request("POST", "/api/oauth/token", content=content, **{"Content-Type": media_type})
    refusal(answer, 401 if error == "invalid_client" else 400, error)


def test_a_client_authenticates_in_one_way(kit: Kit) -> None:
    """RFC 6749, section 2.3."""
    grant = {"grant_type": "client_credentials"}
    refusal(kit.post(basic=("trusted", SECRET), client_secret=SECRET, **grant), 400, "invalid_request")
    refusal(kit.post(basic=("trusted", SECRET), client_id="app", **grant), 400, "invalid_request")
    assert kit.post(basic=("trusted", SECRET), client_id="trusted", **grant).status_code == 200


def test_two_authorization_fields_are_refused() -> None:
    """Another program on the way might read the other one."""
    kit = Kit()

    async def ask() -> httpx2.Response:
        transport = httpx2.ASGITransport(app=kit.app)
        fields = [("Content-Type", FORM), *[("Authorization", "Basic eDp5")] * 2]
        async with httpx2.AsyncClient(transport=transport, base_url="https://shop.example") as client:
            return await client.post("/api/oauth/token", headers=fields, content=b"grant_type=client_credentials")

    refusal(asyncio.run(ask()), 400, "invalid_request")


def test_parameters_in_the_address_do_not_count(kit: Kit) -> None:
    """They end up in logs (RFC 6749, section 2.3.1)."""
    query = urlencode({"grant_type": "password", "username": "anna", "password": PASSWORD, "client_id": "app"})
    answer = kit.request("POST", "/api/oauth/token?" + query, content=b"", **{"Content-Type": FORM})
    refusal(answer, 401, "invalid_client")
    assert kit.request("GET", "/api/oauth/token?" + query).status_code == 405


@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_any_body_is_answered_by_an_error_of_the_rfc(body: bytes) -> None:
    """Never by an exception."""
    answer = ALONE.request("POST", "/api/oauth/token", content=body, **{"Content-Type": FORM})
    assert answer.json()["error"] in ("invalid_request", "invalid_client")


ALONE = Kit()


# --- revocation -------------------------------------------------------------------------------------------------------


def test_a_revoked_refresh_token_is_not_good_any_more(kit: Kit) -> None:
    """RFC 7009: 200, also for one that never was; an unknown hint does no harm."""
    first = kit.login()
    token = first.json()["refresh_token"]
    for hint in ("", "refresh_token", "unknown"):
        answer = kit.post("/api/oauth/revoke", token=token, client_id="app", token_type_hint=hint)
        assert (answer.status_code, answer.content, answer.headers["cache-control"]) == (200, b"", "no-store")
    assert kit.post("/api/oauth/revoke", token="never was", client_id="app").status_code == 200
    refusal(refresh(kit, first), 400, "invalid_grant")


def test_only_its_client_revokes_a_token(kit: Kit) -> None:
    """And who cannot be authenticated revokes nothing."""
    first = kit.login()
    token = first.json()["refresh_token"]
    refusal(kit.post("/api/oauth/revoke", token=token, basic=("trusted", SECRET)), 400, "invalid_grant")
    refusal(kit.post("/api/oauth/revoke", token=token, basic=("trusted", "wrong")), 401, "invalid_client")
    refusal(kit.post("/api/oauth/revoke", token=token), 401, "invalid_client")
    refusal(kit.post("/api/oauth/revoke", client_id="app"), 400, "invalid_request")
    assert refresh(kit, first).status_code == 200


def test_an_access_token_is_revoked_where_the_application_can(kit: Kit) -> None:
    """Else the client is told that it cannot (RFC 7009, section 2.2.1)."""
    answer = kit.login()
    token = answer.json()["access_token"]
    refusal(kit.post("/api/oauth/revoke", token=token, client_id="app"), 400, "unsupported_token_type")
    revoked: list[tuple[str, str]] = []

    async def take_back(token: str, client_id: str) -> None:
        revoked.append((token, client_id))

    other = Kit(revoke_access_token=take_back)
    assert other.post("/api/oauth/revoke", token=token, client_id="app").status_code == 200
    assert revoked == [(token, "app")]


@pytest.mark.parametrize("hardened", [False, True])
def test_without_a_store_nothing_is_issued_or_revoked(hardened: bool) -> None:
    """503, and when to come back."""
    kit = Kit(hardened=hardened, store=Gone())
    token = "fhr_" + "A" * 64
    for answer in (
        kit.login(),
        kit.post(grant_type="refresh_token", refresh_token=token, client_id="app"),
        kit.post("/api/oauth/revoke", token=token, client_id="app"),
    ):
        refusal(answer, 503, "temporarily_unavailable")
        assert 5 <= int(answer.headers["retry-after"]) <= 10
    assert kit.post(grant_type="client_credentials", basic=("trusted", SECRET)).status_code == 200


# --- the application around it ----------------------------------------------------------------------------------------


def test_refusals_of_a_hardened_application_are_told_and_carry_its_header_fields() -> None:
    """As those of any layer."""
    kit = Kit(hardened=True)
    assert kit.handle is not None
    seen: list[RequestRefused] = []
    kit.handle.events.subscribe(RequestRefused, seen.append)
    answer = kit.login(password="wrong")
    [event] = seen
    assert (event.layer, event.problem, event.status) == ("token endpoint", "invalid_grant", 400)
    assert event.request_id == answer.headers["x-request-id"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "wrong" not in str(event.detail).split(" is ")[0]


def test_keys_are_served_to_everybody(kit: Kit) -> None:
    """As a JWK set that may be cached; a secret is never in it."""
    answer = kit.request("GET", "/.well-known/jwks.json")
    assert answer.headers["content-type"] == "application/jwk-set+json"
    assert answer.headers["cache-control"] == "public, max-age=300"
    [key] = answer.json()["keys"]
    assert key.keys() == {"kty", "crv", "x", "y", "kid", "use", "alg"}
    kit.issuer.rotate(SigningKey(SECRET, "HS256"))
    assert kit.request("GET", "/.well-known/jwks.json").json() == {"keys": [key]}


def test_a_client_may_be_found_by_the_application() -> None:
    """In its database, at each request."""

    async def find(client_id: str) -> OAuthClient | None:
        return {client.client_id: client for client in CLIENTS}.get(client_id)

    kit = Kit(clients=find)
    assert kit.login().status_code == 200
    refusal(kit.login(client_id="nobody"), 401, "invalid_client")


def test_a_request_that_names_no_client_may_mean_one() -> None:
    """For the login dialog of FastAPI's documentation page."""
    kit = Kit(default_client_id="app")
    answer = kit.post(grant_type="password", username="anna", password=PASSWORD)
    assert claims_of(answer, kit)["client_id"] == "app"


def test_without_users_there_is_no_password_grant() -> None:
    """Told at once where the clients are known, else when one asks."""
    issuer = ALONE.issuer
    with pytest.raises(ValueError, match="needs authenticate_user"):
        token_router(issuer, clients=CLIENTS)

    async def find(client_id: str) -> OAuthClient | None:
        return CLIENTS[0]

    kit = Kit()
    kit.app = FastAPI()
    kit.app.include_router(token_router(issuer, clients=find), prefix="/api")
    refusal(kit.login(), 400, "unauthorized_client")


def test_dependencies_of_the_routes_run() -> None:
    """Such as overrides of the application's layers."""
    from fastapi import Depends  # noqa: PLC0415 - for this test only

    seen: list[str] = []

    async def note(request: Request) -> None:
        seen.append(request.url.path)

    kit = Kit(dependencies=[Depends(note)])
    kit.login()
    assert seen == ["/api/oauth/token"]


def test_the_openapi_document_tells_the_parameters_and_the_answers() -> None:
    """Though FastAPI reads none of them."""
    kit = Kit()
    operation = kit.app.openapi()["paths"]["/api/oauth/token"]["post"]
    schema = operation["requestBody"]["content"][FORM]["schema"]
    assert schema["required"] == ["grant_type"]
    assert schema["properties"]["grant_type"]["enum"] == ["password", "refresh_token", "client_credentials"]
    assert schema["properties"]["password"]["format"] == "password"
    assert operation["responses"].keys() == {"200", "400", "401", "429", "503"}


# --- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: OAuthClient("x", {"implicit"}), "implicit: not a grant"),  # type: ignore[arg-type]
        (lambda: OAuthClient("x", {"client_credentials"}), "would let everybody in"),
        (lambda: OAuthClient("", set()), "is no client id"),
        (lambda: OAuthClient("a\nb", set()), "is no client id"),
        (lambda: OAuthClient("x", set(), "a b"), "collection of names"),
        (lambda: OAuthClient("x", set(), {"a b"}), "collection of names"),
        (lambda: OAuthClient("x", set(), {'"'}), "collection of names"),
        (lambda: hash_client_secret("chosen by a person"), "at least 32 characters"),
        (lambda: token_router(ALONE.issuer, ALONE.authenticate, clients=CLIENTS * 2), "two clients"),
        (
            lambda: token_router(ALONE.issuer, ALONE.authenticate, clients=CLIENTS, default_client_id="y"),
            "there is no client 'y'",
        ),
    ],
)
def test_a_mistake_is_told_when_it_is_made(make: Callable[[], object], sentence: str) -> None:
    """With what is wrong."""
    with pytest.raises(ValueError, match=sentence):
        make()


def test_a_secret_of_a_client_is_not_printed() -> None:
    """Nor is its hash."""
    assert hash_client_secret(SECRET) not in repr(CLIENTS[3])
    assert len(SECRET) == 47
    assert new_client_secret() != new_client_secret()
