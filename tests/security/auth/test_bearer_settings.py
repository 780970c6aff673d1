"""Bearer tokens by settings alone: which keys are used, what is refused at the start, and what a client sees."""

import asyncio
import json
import time
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from fastapi import FastAPI
from fastapi.testclient import TestClient
from jose import jwk, jws  # type: ignore[import-untyped]

from fastapi_hardening import ConfigurationError, CurrentUser, Settings, harden
from fastapi_hardening.core.store import MemoryStore
from fastapi_hardening.handle import Hardening
from fastapi_hardening.security.auth import IssuerSettings, SigningKey, TokenIssuer
from fastapi_hardening.security.auth.keys import RemoteKeys

SECRET = "a secret of at least thirty-two bytes"
ISSUER: dict[str, Any] = {"issuer": "https://id.example", "audience": "orders"}
SHARED: dict[str, Any] = ISSUER | {"algorithms": ["HS256"], "secrets": [SECRET]}


def token(secret: str = SECRET, **claims: Any) -> str:
    now = int(time.time())
    whole = {"iss": "https://id.example", "aud": "orders", "sub": "anna", "iat": now, "exp": now + 60, "jti": "1"}
    signed: str = jws.sign(whole | claims, secret, {"typ": "at+jwt"}, "HS256")
    return signed


def shop(**jwt: Any) -> tuple[Hardening, TestClient]:
    app = FastAPI()

    @app.get("/me")
    async def me(user: CurrentUser) -> str:
        return user.id

    return harden(app, Settings(auth={"jwt": SHARED | jwt})), TestClient(app)


def ask(client: TestClient, sent: str) -> Any:
    return client.get("/me", headers={"Authorization": f"Bearer {sent}"})


def test_a_shared_secret_is_enough() -> None:
    """Two settings and a secret: who has a good token is known, who has another is told why not."""
    _, client = shop()
    assert ask(client, token()).json() == "anna"
    answer = ask(client, token("another secret of thirty-two bytes!!"))
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, 'Bearer error="invalid_token"')


def test_a_secret_that_is_being_changed_still_holds() -> None:
    """The current one comes first, the previous one is taken as well."""
    _, client = shop(secrets=["the new secret of thirty-two bytes ...", SECRET])
    assert ask(client, token()).json() == "anna"


def test_tokens_of_our_own_issuer_need_nothing_but_its_secret() -> None:
    """The name of the key, which they carry, follows from it; the previous secret still holds, an unknown one not."""
    _, client = shop(secrets=["the new secret of thirty-two bytes ...", SECRET])
    settings = IssuerSettings(issuer=ISSUER["issuer"], audience=ISSUER["audience"])
    answers = []
    for secret in ("the new secret of thirty-two bytes ...", SECRET, "another secret of thirty-two bytes!!"):
        issuer = TokenIssuer(settings, keys=SigningKey(secret, "HS256"), store=MemoryStore())
        issued = asyncio.run(issuer.issue("anna", client_id="app", refreshable=False))
        answers.append(ask(client, issued.access_token).status_code)
    assert answers == [200, 200, 401]


def test_what_is_revoked_is_refused_at_once() -> None:
    """The handle revokes, also a token that was verified a moment ago."""
    handle, client = shop()
    sent = token()
    assert ask(client, sent).status_code == 200
    asyncio.run(handle.auth.revocations.revoke_token("1", issuer="https://id.example"))
    assert ask(client, sent).status_code == 401


def test_without_keys_the_answer_is_503() -> None:
    """A client must not throw its token away because the issuer is down for a moment; and nobody is let in."""
    app = FastAPI()

    @app.get("/me")
    async def me(user: CurrentUser) -> str:
        return user.id

    unreachable = ISSUER | {"jwks_url": "http://127.0.0.1:9/keys", "allow_loopback_http": True}
    handle = harden(app, Settings(auth={"jwt": unreachable}, health={"details": "always"}))
    assert isinstance(handle.auth.keys, RemoteKeys)
    client = TestClient(app)
    answer = ask(client, token().replace("eyJhbGciOiJIUzI1NiIs", "eyJhbGciOiJSUzI1NiIs"))
    assert answer.status_code == 503, answer.text
    assert answer.headers["retry-after"] == "5"
    assert client.get("/health").json()["checks"]["issuer_keys"][0]["status"] == "fail"
    assert client.get("/readyz").status_code == 200


def test_when_the_store_of_revocations_is_gone_the_answer_is_503(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can say whether the token was revoked."""
    handle, client = shop()

    async def gone(_keys: Any) -> Any:
        raise ConnectionError("gone")

    monkeypatch.setattr(handle.store, "get_many", gone)
    assert ask(client, token()).status_code == 503


def pem(key: Any) -> str:
    encoded: bytes = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return encoded.decode()


@pytest.mark.parametrize(
    ("key", "algorithm"),
    [(rsa.generate_private_key(65537, 2048), "RS256"), (ec.generate_private_key(ec.SECP256R1()), "ES256")],
    ids=["rsa", "ec"],
)
def test_a_public_key_is_bound_to_the_first_algorithm_of_its_kind(key: Any, algorithm: str) -> None:
    """Keys of several kinds stand side by side; each has one algorithm."""
    settings = Settings(auth={"jwt": ISSUER | {"public_keys": [pem(key)]}})
    keys = harden(FastAPI(), settings).auth.keys
    assert keys is not None
    assert [found.algorithm for found in asyncio.run(keys.find(None, algorithm))] == [algorithm]


def test_a_set_that_is_written_down_has_named_keys() -> None:
    """Tokens name their key; nobody is asked for it."""
    key = ec.generate_private_key(ec.SECP256R1())
    public = jwk.construct(pem(key), "ES256").to_dict() | {"kid": "q4", "use": "sig"}
    public = {name: value.decode() if isinstance(value, bytes) else value for name, value in public.items()}
    keys = harden(FastAPI(), Settings(auth={"jwt": ISSUER | {"jwks": json.dumps({"keys": [public]})}})).auth.keys
    assert keys is not None
    assert [found.kid for found in asyncio.run(keys.find("q4", "ES256"))] == ["q4"]
    assert list(asyncio.run(keys.find("q3", "ES256"))) == []


@pytest.mark.parametrize(
    ("jwt", "sentence"),
    [
        (ISSUER | {"secrets": [SECRET]}, "set algorithms to HS256"),
        (SHARED | {"secrets": ["short"]}, "32 bytes"),
        (SHARED | {"jwks_url": "https://id.example/keys"}, "one of them"),
        (ISSUER | {"jwks": "{}"}, "auth.jwt"),
        (ISSUER | {"jwks_url": "http://id.example/keys"}, "https"),
        (ISSUER | {"issuer": "http://id.example"}, "https"),
        (ISSUER | {"public_keys": ["-----BEGIN PUBLIC KEY-----"]}, "no public key"),
        (ISSUER | {"public_keys": [pem(rsa.generate_private_key(65537, 2048))], "algorithms": ["ES256"]}, "auth.jwt"),
        ({"issuer": "https://id.example"}, "audience"),
    ],
)
def test_what_cannot_work_fails_at_the_start(jwt: dict[str, Any], sentence: str) -> None:
    """With the sentence that mends it."""
    with pytest.raises(ConfigurationError, match=sentence):
        Settings(auth={"jwt": jwt})


def test_switched_off_it_is_not_there() -> None:
    """And no key is read."""
    handle = harden(FastAPI(), Settings(auth={"jwt": SHARED | {"enabled": False}}))
    assert handle.auth.keys is None
    assert handle.auth.idle
