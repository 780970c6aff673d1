"""The token issuer: what an access token says, and how often a refresh token works."""

import asyncio
import base64
import json
from collections.abc import Callable, Coroutine
from random import Random
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from jose import jwk, jws  # type: ignore[import-untyped]
from jose.exceptions import JWSError  # type: ignore[import-untyped]
from pydantic import SecretStr

from fastapi_hardening.core.clock import ManualClock
from fastapi_hardening.core.events import Events
from fastapi_hardening.core.identity import CredentialsUnchecked
from fastapi_hardening.core.store import MemoryStore
from fastapi_hardening.security.auth.issuer import (
    FamilyRevoked,
    InvalidGrant,
    InvalidScope,
    IssuedTokens,
    IssuerSettings,
    RefreshTokenReused,
    SigningKey,
    SubjectRevoked,
    TokenIssuer,
    TokensIssued,
    _RefreshToken,
    _thumbprint,
)
from tests.effort import EFFORT

NAMES = {"issuer": "https://shop.example", "audience": "https://api.shop.example"}
SECRET = "0123456789abcdef0123456789abcdef"


def pem(private: Any, password: bytes | None = None) -> str:
    encryption = NoEncryption() if password is None else BestAvailableEncryption(password)
    return str(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption).decode())


EC_KEY = ec.generate_private_key(ec.SECP256R1())
RSA_KEY = rsa.generate_private_key(65537, 2048)
KEYS = {
    "HS256": SigningKey(SECRET, "HS256"),
    "ES256": SigningKey(pem(EC_KEY), "ES256"),
    "RS256": SigningKey(SecretStr(pem(RSA_KEY)), "RS256"),
}


class Slow(MemoryStore):
    """A store on another machine: others get their turn while it is asked, some or many turns.

    It may fail, at the n-th call from now.
    """

    def __init__(self, max_keys: int = 100_000, *, clock: ManualClock | None = None) -> None:
        super().__init__(max_keys, clock=clock)
        self.fails_in: int | None = None
        self.failures = 1_000
        self.calls = 0
        self.turns: Callable[[], int] = lambda: 1

    async def _turn(self) -> None:
        self.calls += 1
        for _ in range(self.turns()):
            await asyncio.sleep(0)
        if self.fails_in is not None:
            self.fails_in -= 1
            if self.fails_in < 0 <= self.fails_in + self.failures:
                raise ConnectionError("the store is gone")

    async def get(self, key: str) -> bytes | None:
        await self._turn()
        return await super().get(key)

    async def put(self, key: str, value: bytes, ttl_seconds: float) -> bool:
        await self._turn()
        return await super().put(key, value, ttl_seconds)

    async def add(self, key: str, value: bytes, ttl_seconds: float) -> bool:
        await self._turn()
        return await super().add(key, value, ttl_seconds)

    async def delete(self, key: str) -> None:
        await self._turn()
        await super().delete(key)


class Kit:
    """An issuer with a clock that can be moved, a store that takes its time, and the events it tells."""

    def __init__(self, *keys: SigningKey, max_keys: int = 100_000, **changes: Any) -> None:
        self.clock = ManualClock()
        self.store = Slow(max_keys, clock=self.clock)
        self.events = Events()
        self.seen: list[object] = []
        self.events.subscribe(object, self.seen.append)
        self.issuer = TokenIssuer(
            IssuerSettings.model_validate(NAMES | changes),
            keys=keys or KEYS["HS256"],
            store=self.store,
            events=self.events,
            clock=self.clock,
        )

    async def login(self, subject: str = "anna", client_id: str = "app", **more: Any) -> IssuedTokens:
        return await self.issuer.issue(subject, client_id=client_id, **more)

    async def refresh(self, token: str | None, client_id: str = "app", **more: Any) -> IssuedTokens:
        assert token is not None
        return await self.issuer.refresh(token, client_id=client_id, **more)

    async def refused(self, token: str | None, client_id: str = "app", **more: Any) -> str:
        """Why a refresh is refused."""
        with pytest.raises(InvalidGrant) as refusal:
            await self.refresh(token, client_id, **more)
        return refusal.value.reason

    def told(self, kind: type) -> list[Any]:
        return [event for event in self.seen if type(event) is kind]


def run(check: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(check)


def claims_of(tokens: IssuedTokens) -> dict[str, Any]:
    payload = tokens.access_token.split(".")[1]
    claims: dict[str, Any] = json.loads(base64.urlsafe_b64decode(payload + "=="))
    return claims


# --- access tokens ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", KEYS)
def test_an_access_token_says_what_rfc_9068_asks_for(algorithm: str) -> None:
    """Type, key id, and the seven claims; it verifies by the key that the issuer hands out, and by no other."""
    kit = Kit(KEYS[algorithm])
    tokens = run(kit.login(scope={"orders:write", "orders:read"}, claims={"roles": ["clerk"]}))
    [key] = kit.issuer.verification_keys()["keys"]
    assert jws.get_unverified_header(tokens.access_token) == {"alg": algorithm, "typ": "at+jwt", "kid": key["kid"]}
    claims = json.loads(jws.verify(tokens.access_token, jwk.construct(key), algorithms=[algorithm]))
    now = int(kit.clock.time())
    assert claims == {
        "iss": "https://shop.example",
        "sub": "anna",
        "aud": "https://api.shop.example",
        "client_id": "app",
        "iat": now,
        "exp": now + 600,
        "jti": tokens.jti,
        "scope": "orders:read orders:write",
        "roles": ["clerk"],
    }
    assert len(tokens.jti) == 32
    other = SigningKey(pem(ec.generate_private_key(ec.SECP256R1())), "ES256").verifying_jwk()
    with pytest.raises(JWSError):
        jws.verify(tokens.access_token, jwk.construct(other), algorithms=["ES256"])


def test_tokens_are_not_printed() -> None:
    """Neither by mistake in a log nor in a traceback."""
    tokens = run(Kit().login())
    assert tokens.access_token not in repr(tokens)
    assert tokens.refresh_token not in repr(tokens)
    assert SECRET not in repr(KEYS["HS256"])


def test_public_keys_are_a_jwk_set_as_rfc_7517_has_it() -> None:
    """With what a verifier needs to pick the key and nothing private; a secret is not among them."""
    issuer = Kit(KEYS["ES256"], KEYS["RS256"], KEYS["HS256"]).issuer
    elliptic, rivest = issuer.jwks()["keys"]
    assert elliptic.keys() == {"kty", "crv", "x", "y", "kid", "use", "alg"}
    assert rivest.keys() == {"kty", "n", "e", "kid", "use", "alg"}
    assert (elliptic["kty"], elliptic["crv"], elliptic["use"], elliptic["alg"]) == ("EC", "P-256", "sig", "ES256")
    assert (rivest["kty"], rivest["e"], rivest["use"], rivest["alg"]) == ("RSA", "AQAB", "sig", "RS256")
    assert [len(base64.urlsafe_b64decode(elliptic[name] + "=")) for name in ("x", "y")] == [32, 32]
    assert [key["kty"] for key in issuer.verification_keys()["keys"]] == ["EC", "RSA", "oct"]


def test_the_name_of_a_key_is_its_thumbprint() -> None:
    """RFC 7638, by its own example; so every process gives a key the same name."""
    example = {
        "kty": "RSA",
        "n": "0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjBZCiF"
        "V4n3oknjhMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu"
        "6qMQvRL5hajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awa"
        "pJzKnqDKgw",
        "e": "AQAB",
        "alg": "RS256",
        "kid": "2011-04-29",
    }
    assert _thumbprint(example) == "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs"
    assert SigningKey(pem(EC_KEY), "ES256").kid == KEYS["ES256"].kid
    assert SigningKey(SECRET, "HS256").kid == KEYS["HS256"].kid != SigningKey(SECRET + "x", "HS256").kid
    assert SigningKey(SECRET, "HS256", kid="mine").kid == "mine"


@pytest.mark.parametrize(
    ("key", "algorithm", "sentence"),
    [
        ("short", "HS256", "at least 32 bytes"),
        ("", "HS256", "at least 32 bytes"),
        (pem(EC_KEY), "HS256", "this is a PEM"),
        (pem(EC_KEY), "RS256", "takes an RSA key"),
        (pem(RSA_KEY), "ES256", "P-256"),
        (pem(ec.generate_private_key(ec.SECP384R1())), "ES256", "P-256"),
        (pem(rsa.generate_private_key(65537, 1024)), "RS256", "at least 2048 bits, this one has 1024"),
        (pem(EC_KEY, b"password"), "ES256", "not encrypted"),
        (EC_KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), "ES256", "private key"),
        (SECRET, "ES256", "private key as PEM"),
        (SECRET, "none", "is not HS256, RS256 or ES256"),
        (SECRET, "HS512", "is not HS256, RS256 or ES256"),
    ],
)
def test_a_key_that_cannot_do_is_refused_when_it_is_given(key: Any, algorithm: Any, sentence: str) -> None:
    """With what to do about it, and without the key."""
    with pytest.raises(ValueError, match=sentence) as refusal:
        SigningKey(key, algorithm)
    assert not key or str(key) not in str(refusal.value)


@pytest.mark.parametrize("kid", ["", "a b", "../../etc/passwd", "x" * 65, "\u00e9"])
def test_a_kid_is_plain(kid: str) -> None:
    """It goes into headers and look-ups."""
    with pytest.raises(ValueError, match="is no kid"):
        SigningKey(SECRET, "HS256", kid=kid)


def test_a_secret_that_looks_like_json_is_taken_as_it_is() -> None:
    """python-jose would read it as a key."""
    kit = Kit(SigningKey('{"kty":"oct","k":"AAAA"}........', "HS256"))
    token = run(kit.login()).access_token
    key = jwk.construct(kit.issuer.verification_keys()["keys"][0])
    assert json.loads(jws.verify(token, key, algorithms=["HS256"]))["sub"] == "anna"


@pytest.mark.parametrize("name", ["iss", "sub", "aud", "exp", "nbf", "iat", "jti", "client_id", "scope", "cnf"])
def test_no_further_claim_takes_the_place_of_one_of_the_issuer(name: str) -> None:
    """Wherever it comes from."""
    kit = Kit()

    async def check() -> None:
        with pytest.raises(ValueError, match="set by the issuer"):
            await kit.login(claims={name: "x"})
        tokens = await kit.login()
        with pytest.raises(ValueError, match="set by the issuer"):
            await kit.refresh(tokens.refresh_token, claims={name: "x"})
        with pytest.raises(ValueError, match="needs a subject"):
            await kit.login("")
        await kit.refresh(tokens.refresh_token)

    run(check())
    assert len(kit.told(TokensIssued)) == 2


# --- rotation of keys -------------------------------------------------------------------------------------------------


def kids(kit: Kit) -> list[str]:
    return [key["kid"] for key in kit.issuer.verification_keys()["keys"]]


def secret(kid: str) -> SigningKey:
    return SigningKey(SECRET + kid, "HS256", kid=kid)


def test_after_a_rotation_the_new_key_signs_and_former_ones_verify_while_tokens_live() -> None:
    """No token becomes invalid by it, and no key stays for ever."""
    kit = Kit(secret("a"))
    before = run(kit.login()).access_token
    kit.issuer.rotate(secret("b"))
    after = run(kit.login()).access_token
    assert [jws.get_unverified_header(token)["kid"] for token in (before, after)] == ["a", "b"]
    assert kids(kit) == ["b", "a"]
    kit.clock.advance(600)
    kit.issuer.rotate(secret("c"))
    assert kids(kit) == ["c", "b", "a"]
    kit.clock.advance(121)
    kit.issuer.rotate(secret("d"))
    assert kids(kit) == ["d", "c", "b"]


def test_the_next_key_may_be_known_before_it_signs() -> None:
    """So that no other process meets a key that it does not know."""
    kit = Kit(secret("a"), secret("b"))
    assert jws.get_unverified_header(run(kit.login()).access_token)["kid"] == "a"
    kit.issuer.rotate(secret("b"))
    assert kids(kit) == ["b", "a"]
    kit.issuer.rotate(secret("a"))
    assert kids(kit) == ["a", "b"]


def test_keys_have_different_names() -> None:
    """And there is one."""
    with pytest.raises(ValueError, match="two keys have one kid"):
        Kit(secret("a"), secret("a"))
    with pytest.raises(ValueError, match="two keys have one kid"):
        Kit(secret("a")).issuer.rotate(secret("a"))
    with pytest.raises(ValueError, match="needs a key"):
        TokenIssuer(IssuerSettings.model_validate(NAMES), keys=(), store=MemoryStore())


def test_lifetimes_fit_each_other() -> None:
    """Told when the settings are made."""
    with pytest.raises(ValueError, match="no token outlives its family"):
        Kit(family_seconds=100, refresh_idle_seconds=101)


# --- refresh tokens ---------------------------------------------------------------------------------------------------


def test_a_refresh_gives_a_new_pair_for_the_same_subject_client_scope_and_claims() -> None:
    """As they were at the login; the refresh token is opaque."""
    kit = Kit()

    async def check() -> list[IssuedTokens]:
        first = await kit.login(scope={"a", "b"}, claims={"roles": ["clerk"], "tenant": "t1"})
        return [first, await kit.refresh(first.refresh_token)]

    first, second = run(check())
    assert first.refresh_token is not None
    assert first.refresh_token.startswith("fhr_")
    assert len(first.refresh_token) == 68
    assert first.refresh_token != second.refresh_token
    assert first.family == second.family
    before, after = claims_of(first), claims_of(second)
    assert before.pop("jti") != after.pop("jti")
    assert before == after
    assert [event.refreshed for event in kit.told(TokensIssued)] == [False, True]


def test_the_store_has_no_token_in_it() -> None:
    """Neither whole nor as a part: who reads the store cannot refresh."""
    kit = Kit(reuse_grace_seconds=10)

    async def check() -> list[str]:
        first = await kit.login()
        second = await kit.refresh(first.refresh_token)
        return [str(first.refresh_token), str(second.refresh_token), first.access_token]

    tokens = run(check())
    stored = repr(kit.store._values._entries)
    for token in tokens:
        data = base64.urlsafe_b64decode(token.removeprefix("fhr_").split(".")[0] + "==")
        for part in (token, token[4:], data.hex(), data[:16].hex(), data[16:].hex()):
            assert part not in stored


def test_nobody_needs_to_listen() -> None:
    """Without a bus, tokens are issued all the same."""
    issuer = TokenIssuer(IssuerSettings.model_validate(NAMES), keys=KEYS["HS256"], store=MemoryStore())
    assert run(issuer.issue("anna", client_id="app")).refresh_token is not None


def test_a_login_may_have_no_refresh_token() -> None:
    """Then the store is not asked."""
    kit = Kit()
    tokens = run(kit.login(refreshable=False))
    assert (tokens.refresh_token, tokens.family, kit.store.calls) == (None, None, 0)


def test_a_used_token_ends_its_family_and_no_other() -> None:
    """The thief's and the client's next refresh both fail; another login of the same person lives on."""
    kit = Kit()

    async def check() -> tuple[str, str, IssuedTokens]:
        first, other = await kit.login(), await kit.login()
        second = await kit.refresh(first.refresh_token)
        reasons = await kit.refused(first.refresh_token), await kit.refused(second.refresh_token)
        return *reasons, await kit.refresh(other.refresh_token)

    reused, after, other = run(check())
    assert reused == "used before"
    assert after == "unknown, ended or revoked"
    assert other.refresh_token is not None
    [event], [ended] = kit.told(RefreshTokenReused), kit.told(FamilyRevoked)
    assert (event.subject, event.client_id, event.family) == ("anna", "app", ended.family)
    assert ended.reason == "reused"


def test_a_used_token_is_known_as_used_long_after() -> None:
    """Also when the mark of its use has gone from the store."""
    kit = Kit()

    async def check() -> str:
        first = await kit.login()
        await kit.refresh(first.refresh_token)
        kit.clock.advance(100_000)
        return await kit.refused(first.refresh_token)

    assert run(check()) == "used before"
    assert len(kit.told(FamilyRevoked)) == 1


def test_of_fifty_refreshes_at_once_one_wins_and_the_family_ends() -> None:
    """As RFC 9700 has it without a grace: nobody can tell who sent the others."""
    kit = Kit()

    async def check() -> tuple[list[IssuedTokens], list[str]]:
        first = await kit.login()
        answers = await asyncio.gather(*(kit.refresh(first.refresh_token) for _ in range(50)), return_exceptions=True)
        won = [answer for answer in answers if isinstance(answer, IssuedTokens)]
        lost = [answer.reason for answer in answers if isinstance(answer, InvalidGrant)]
        assert len(won) + len(lost) == 50
        lost.append(await kit.refused(won[0].refresh_token))
        return won, lost

    won, lost = run(check())
    assert len(won) == 1
    assert set(lost) <= {"used before", "unknown, ended or revoked"}
    assert kit.told(RefreshTokenReused)


def test_within_the_grace_fifty_refreshes_at_once_get_the_same_successor() -> None:
    """Which works once; then each has its own access token, and there is still one line of refresh tokens."""
    kit = Kit(reuse_grace_seconds=10)

    async def check() -> tuple[list[IssuedTokens], IssuedTokens]:
        first = await kit.login()
        answers = await asyncio.gather(*(kit.refresh(first.refresh_token) for _ in range(50)))
        kit.clock.advance(10)
        answers.append(await kit.refresh(first.refresh_token))
        return answers, await kit.refresh(answers[0].refresh_token)

    answers, following = run(check())
    assert len({answer.refresh_token for answer in answers}) == 1
    assert len({answer.jti for answer in answers}) == 51
    assert following.refresh_token not in {answer.refresh_token for answer in answers}
    assert kit.told(RefreshTokenReused) == []


def record_of(token: str) -> str:
    read = _RefreshToken.read(token)
    assert read is not None
    return f"auth:token:{read.digest}"


@settings(max_examples=60 * EFFORT, deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from([0, 10]), st.integers(2, 5), st.integers(0, 2))
def test_however_requests_are_interleaved_no_token_is_taken_twice(
    random: Random, grace: int, clients: int, failures: int
) -> None:
    """Several clients refresh one line of tokens at once on a store that is now fast, now slow, and fails sometimes.

    Without a grace a token has one successor and one winner; with one it has one successor. In the end no more than one
    token is good, and none that has a successor ever is again.
    """
    kit = Kit(reuse_grace_seconds=grace)
    kit.store.turns = lambda: random.randint(0, 6)
    successors: dict[str, list[str]] = {}

    async def client(token: str) -> None:
        for _ in range(3):
            try:
                tokens = await kit.refresh(token)
            except (InvalidGrant, CredentialsUnchecked):
                continue
            successors.setdefault(token, []).append(str(tokens.refresh_token))
            token = str(tokens.refresh_token)

    async def check() -> None:
        first = str((await kit.login()).refresh_token)
        kit.store.fails_in, kit.store.failures = random.randint(0, 20), failures - 1
        await asyncio.gather(*(client(first) for _ in range(clients)))
        kit.store.fails_in = None
        for each in successors.values():
            assert len(set(each)) == 1
            assert grace or len(each) == 1
        known = {token for each in successors.values() for token in each} | {first}
        assert len([token for token in known if record_of(token) in kit.store._values._entries]) <= 1
        kit.clock.advance(700)
        for token in successors:
            assert await kit.refused(token) in ("used before", "unknown, ended or revoked")

    run(check())
    assert len(kit.told(TokensIssued)) == 1 + sum(map(len, successors.values()))


def test_within_the_grace_a_refresh_that_failed_is_done_again() -> None:
    """By whoever comes with the same token; the successor that it gets is good."""
    kit = Kit(reuse_grace_seconds=10)
    calls_before_the_successor_is_stored = calls_of_a_refresh() - 2

    async def check() -> IssuedTokens:
        first = await kit.login()
        kit.store.fails_in, kit.store.failures = calls_before_the_successor_is_stored, 1
        with pytest.raises(CredentialsUnchecked):
            await kit.refresh(first.refresh_token)
        second = await kit.refresh(first.refresh_token)
        third = await kit.refresh(second.refresh_token)
        assert await kit.refused(first.refresh_token) == "used before"
        return third

    assert run(check()).refresh_token is not None


@pytest.mark.parametrize("successor_used", [False, True])
def test_after_the_grace_or_the_next_refresh_a_used_token_ends_the_family(successor_used: bool) -> None:
    """Whichever comes first."""
    kit = Kit(reuse_grace_seconds=10)

    async def check() -> str:
        first = await kit.login()
        second = await kit.refresh(first.refresh_token)
        if successor_used:
            await kit.refresh(second.refresh_token)
        else:
            kit.clock.advance(10.001)
        return await kit.refused(first.refresh_token)

    assert run(check()) == "used before"
    assert len(kit.told(FamilyRevoked)) == 1


def test_a_token_that_is_not_used_expires() -> None:
    """That is no reuse, so no alarm; each refresh begins the time anew."""
    kit = Kit(refresh_idle_seconds=100, family_seconds=1_000)

    async def check() -> str:
        tokens = await kit.login()
        for _ in range(5):
            kit.clock.advance(99)
            tokens = await kit.refresh(tokens.refresh_token)
        kit.clock.advance(100)
        reason = await kit.refused(tokens.refresh_token)
        assert await kit.refused(tokens.refresh_token) == "unknown, ended or revoked"
        return reason

    assert run(check()) == "expired"
    assert kit.told(RefreshTokenReused) == []


def test_a_family_ends_however_often_it_is_refreshed() -> None:
    """A login does not last for ever."""
    kit = Kit(refresh_idle_seconds=100, family_seconds=250)

    async def check() -> str:
        tokens = await kit.login()
        for _ in range(2):
            kit.clock.advance(90)
            tokens = await kit.refresh(tokens.refresh_token)
        kit.clock.advance(70)
        return await kit.refused(tokens.refresh_token)

    assert run(check()) == "unknown, ended or revoked"
    assert kit.told(RefreshTokenReused) == []


def test_the_end_of_a_family_does_not_depend_on_the_store_forgetting_it() -> None:
    """A store may be late."""
    kit = Kit(family_seconds=100, refresh_idle_seconds=100)
    kit.store._values._now = lambda: 0.0
    tokens = run(kit.login())
    kit.clock.advance(100)
    assert run(kit.refused(tokens.refresh_token)) == "unknown, ended or revoked"


def test_another_client_gets_nothing_and_harms_nothing() -> None:
    """A refresh token is its client's."""
    kit = Kit()
    tokens = run(kit.login())
    assert run(kit.refused(tokens.refresh_token, "thief")) == "of another client, not of thief"
    with pytest.raises(InvalidGrant):
        run(kit.issuer.revoke(str(tokens.refresh_token), client_id="thief"))
    assert run(kit.refresh(tokens.refresh_token)).refresh_token is not None


def test_a_refresh_may_ask_for_less_and_the_next_one_for_all_again() -> None:
    """RFC 6749, section 6: the refresh token keeps the scope of the login."""
    kit = Kit()

    async def check() -> list[frozenset[str]]:
        tokens = [await kit.login(scope={"a", "b"})]
        tokens.append(await kit.refresh(tokens[-1].refresh_token, scope={"a"}))
        with pytest.raises(InvalidScope):
            await kit.refresh(tokens[-1].refresh_token, scope={"a", "admin"})
        tokens.append(await kit.refresh(tokens[-1].refresh_token))
        assert claims_of(tokens[1])["scope"] == "a"
        return [each.scope for each in tokens]

    assert run(check()) == [{"a", "b"}, {"a"}, {"a", "b"}]


def test_claims_may_be_found_anew_and_who_is_gone_gets_no_more() -> None:
    """Roles as they are now; a subject that may no longer log in ends the family."""
    kit = Kit()
    roles: dict[str, Any] = {"anna": {"roles": ["admin"]}}

    async def find(subject: str) -> Any:
        return roles.get(subject)

    async def check() -> tuple[IssuedTokens, str, str]:
        first = await kit.login(claims={"roles": ["clerk"]})
        second = await kit.refresh(first.refresh_token, claims=find)
        roles.clear()
        return second, await kit.refused(second.refresh_token, claims=find), await kit.refused(second.refresh_token)

    second, gone, after = run(check())
    assert claims_of(second)["roles"] == ["admin"]
    assert (gone, after) == ("the subject may no longer log in", "unknown, ended or revoked")
    assert [event.reason for event in kit.told(FamilyRevoked)] == ["no longer allowed"]


@given(st.text(max_size=90) | st.from_regex(r"fhr_[A-Za-z0-9_-]{60,70}", fullmatch=True))
def test_what_was_never_issued_is_refused_and_leaves_nothing_in_the_store(text: str) -> None:
    """Whatever it looks like."""
    kit = Kit()
    assert run(kit.refused(text)) in ("malformed", "unknown, ended or revoked")
    assert run(kit.issuer.revoke(text)) is False
    assert len(kit.store._values) == 0


@pytest.mark.parametrize("tail", ["\n", " ", "=", "A", "\u0660"])
def test_a_token_has_one_spelling(tail: str) -> None:
    """Nothing can be added to it."""
    kit = Kit()
    tokens = run(kit.login())
    assert run(kit.refused(str(tokens.refresh_token) + tail)) == "malformed"


# --- revocation -------------------------------------------------------------------------------------------------------


def test_revoking_ends_the_family_and_is_told_once() -> None:
    """By any of its tokens, or by its name."""
    kit = Kit()

    async def check() -> None:
        first, other = await kit.login(), await kit.login()
        second = await kit.refresh(first.refresh_token)
        assert await kit.issuer.revoke(str(first.refresh_token), client_id="app")
        assert not await kit.issuer.revoke(str(second.refresh_token))
        assert await kit.refused(second.refresh_token) == "unknown, ended or revoked"
        assert await kit.issuer.revoke_family(str(other.family))
        assert not await kit.issuer.revoke_family(str(other.family))
        assert await kit.refused(other.refresh_token) == "unknown, ended or revoked"

    run(check())
    assert [event.reason for event in kit.told(FamilyRevoked)] == ["revoked", "revoked"]


def test_revoking_a_subject_ends_all_its_families_and_later_logins_live() -> None:
    """Also those that were made between two revocations, and when the mark of it has gone."""
    kit = Kit(family_seconds=1_000, refresh_idle_seconds=1_000)

    async def check() -> None:
        old = [await kit.login(), await kit.login(client_id="other")]
        neighbour = await kit.login("otto")
        await kit.issuer.revoke_subject("anna")
        new = await kit.login()
        assert await kit.refused(old[0].refresh_token) == "unknown, ended or revoked"
        assert await kit.refused(old[1].refresh_token, "other") == "unknown, ended or revoked"
        new, neighbour = await kit.refresh(new.refresh_token), await kit.refresh(neighbour.refresh_token)
        kit.clock.advance(900)
        last = await kit.login()
        kit.clock.advance(250)
        last = await kit.refresh(last.refresh_token)
        await kit.issuer.revoke_subject("anna")
        assert await kit.refused(last.refresh_token) == "unknown, ended or revoked"

    run(check())
    assert kit.told(SubjectRevoked) == [SubjectRevoked("anna")] * 2


def test_a_subject_that_is_revoked_during_a_login_is_revoked() -> None:
    """The login began before."""
    kit = Kit()

    async def check() -> str:
        tokens, _ = await asyncio.gather(kit.login(), kit.issuer.revoke_subject("anna"))
        return await kit.refused(tokens.refresh_token)

    assert run(check()) == "unknown, ended or revoked"


def test_a_revocation_during_a_refresh_is_final() -> None:
    """At whatever step of it: no successor brings the family back."""

    async def check(step: int) -> str:
        kit = Kit()
        tokens = await kit.login()
        refresh = asyncio.create_task(kit.refresh(tokens.refresh_token))
        for _ in range(step):
            await asyncio.sleep(0)
        await kit.issuer.revoke_family(str(tokens.family))
        answer = (await asyncio.gather(refresh, return_exceptions=True))[0]
        token = answer.refresh_token if isinstance(answer, IssuedTokens) else tokens.refresh_token
        return await kit.refused(token)

    assert {run(check(step)) for step in range(12)} == {"unknown, ended or revoked"}


# --- a store that fails -----------------------------------------------------------------------------------------------


def calls_of_a_refresh() -> int:
    kit = Kit()
    tokens = run(kit.login())
    before = kit.store.calls
    run(kit.refresh(tokens.refresh_token))
    return kit.store.calls - before


@pytest.mark.parametrize("step", range(calls_of_a_refresh()))
def test_a_store_that_fails_issues_nothing_and_locks_nobody_out(step: int) -> None:
    """At whatever call it does; once it is back, the same token works, and only once."""
    kit = Kit()

    async def check() -> None:
        first = await kit.login()
        kit.store.fails_in = step
        with pytest.raises(CredentialsUnchecked) as refusal:
            await kit.refresh(first.refresh_token)
        assert refusal.value.retry_after_seconds > 0
        kit.store.fails_in = None
        assert len(kit.told(TokensIssued)) == 1
        # It is still down for the clearing up, so the mark of the use stays for its ten minutes.
        kit.clock.advance(600)
        second = await kit.refresh(first.refresh_token)
        await kit.refresh(second.refresh_token)
        assert await kit.refused(first.refresh_token) == "used before"

    run(check())


def test_a_short_failure_is_over_at_once() -> None:
    """Where the mark of the use could be taken back."""
    kit = Kit()
    calls_before_the_successor_is_stored = calls_of_a_refresh() - 2

    async def check() -> IssuedTokens:
        first = await kit.login()
        kit.store.fails_in, kit.store.failures = calls_before_the_successor_is_stored, 1
        with pytest.raises(CredentialsUnchecked):
            await kit.refresh(first.refresh_token)
        return await kit.refresh(first.refresh_token)

    assert run(check()).refresh_token is not None
    assert kit.told(RefreshTokenReused) == []


def test_without_a_store_there_is_no_login_and_no_revocation() -> None:
    """Each says so."""
    kit = Kit()
    tokens = run(kit.login())
    kit.store.fails_in = 0
    for attempt in (
        kit.login(),
        kit.refresh(tokens.refresh_token),
        kit.issuer.revoke(str(tokens.refresh_token)),
        kit.issuer.revoke_family(str(tokens.family)),
        kit.issuer.revoke_subject("anna"),
    ):
        with pytest.raises(CredentialsUnchecked):
            run(attempt)
    assert [type(event) for event in kit.seen] == [TokensIssued]


def test_a_full_store_issues_nothing_and_still_revokes() -> None:
    """Ending a family needs no room; a refresh that finds none is no reuse."""
    kit = Kit(max_keys=2)
    tokens = run(kit.login())
    for attempt in (kit.login("otto"), kit.refresh(tokens.refresh_token), kit.issuer.revoke_subject("anna")):
        with pytest.raises(CredentialsUnchecked, match="no room"):
            run(attempt)
    assert kit.told(RefreshTokenReused) == []
    assert run(kit.issuer.revoke(str(tokens.refresh_token)))
    assert run(kit.refused(tokens.refresh_token)) == "unknown, ended or revoked"


def test_a_refresh_that_stood_still_gives_up() -> None:
    """Its claim on the token may have ended meanwhile, and another one may have used it."""
    kit = Kit()

    async def check() -> None:
        first = await kit.login()
        delete = kit.store.delete

        async def late(key: str) -> None:
            kit.clock.advance(300)
            await delete(key)

        kit.store.delete = late  # type: ignore[method-assign]
        with pytest.raises(CredentialsUnchecked, match="so long"):
            await kit.refresh(first.refresh_token)

    run(check())
    assert len(kit.told(TokensIssued)) == 1


# --- everything together ----------------------------------------------------------------------------------------------


class Family:
    """What a login should be, by the simplest of books."""

    def __init__(self, subject: str, client_id: str, ends_at: float) -> None:
        self.subject, self.client_id, self.ends_at = subject, client_id, ends_at
        self.alive = True
        self.expires_at = 0.0


class Refreshes(RuleBasedStateMachine):
    """Logins, refreshes, replays, thefts and revocations in any order, beside a book of what should be."""

    live = Bundle("live")
    used = Bundle("used")

    def __init__(self) -> None:
        super().__init__()
        self.kit = Kit(refresh_idle_seconds=100, family_seconds=300)
        self.accepted: set[str] = set()
        self.given: list[tuple[Family, str]] = []
        self.families: list[Family] = []

    def _now(self) -> float:
        return self.kit.clock.time()

    def _try(self, token: str, client_id: str) -> str | None:
        try:
            tokens: IssuedTokens = run(self.kit.refresh(token, client_id))
        except InvalidGrant:
            return None
        assert token not in self.accepted
        self.accepted.add(token)
        return tokens.refresh_token

    @rule(target=live, subject=st.sampled_from("ab"), client_id=st.sampled_from(["app", "web"]))
    def login(self, subject: str, client_id: str) -> tuple[Family, str]:
        """Anybody may log in at any time."""
        family = Family(subject, client_id, self._now() + 300)
        family.expires_at = self._now() + 100
        self.families.append(family)
        return family, str(run(self.kit.login(subject, client_id)).refresh_token)

    @rule(target=used, pair=consumes(live))
    def refresh(self, pair: tuple[Family, str]) -> tuple[Family, str]:
        """The latest token works exactly if its family is alive and neither has expired; then the next one does."""
        family, token = pair
        good = family.alive and self._now() < min(family.ends_at, family.expires_at)
        following = self._try(token, family.client_id)
        assert (following is not None) == good
        if following is not None:
            family.expires_at = min(self._now() + 100, family.ends_at)
            self.given.append((family, following))
        return family, token

    @rule(target=live)
    def take_the_next(self) -> Any:
        """A client picks up what it was given."""
        return self.given.pop() if self.given else self.login("a", "app")

    @rule(pair=used)
    def replay(self, pair: tuple[Family, str]) -> None:
        """What was used, or was refused, is never taken again; what was used ends its family."""
        family, token = pair
        assert self._try(token, family.client_id) is None
        if token in self.accepted:
            family.alive = False

    @rule(pair=live)
    def another_client(self, pair: tuple[Family, str]) -> None:
        """It gets nothing, and changes nothing."""
        family, token = pair
        assert self._try(token, "web" if family.client_id == "app" else "app") is None

    @rule(pair=live)
    def revoke(self, pair: tuple[Family, str]) -> None:
        """A logout ends the family."""
        family, token = pair
        assert run(self.kit.issuer.revoke(token)) == (family.alive and self._now() < family.ends_at)
        family.alive = False

    @rule(subject=st.sampled_from("ab"))
    def revoke_subject(self, subject: str) -> None:
        """All families of one subject end."""
        run(self.kit.issuer.revoke_subject(subject))
        for family in self.families:
            family.alive = family.alive and family.subject != subject

    @rule(seconds=st.sampled_from([1, 50, 99, 100, 200]))
    def wait(self, seconds: int) -> None:
        """Time goes by."""
        self.kit.clock.advance(seconds)

    @invariant()
    def nothing_is_issued_twice_for_one_token(self) -> None:
        """As many refreshes were answered as tokens were used up."""
        assert len([event for event in self.kit.told(TokensIssued) if event.refreshed]) == len(self.accepted)


Refreshes.TestCase.settings = settings(max_examples=25 * EFFORT, stateful_step_count=30, deadline=None)
TestRefreshes = Refreshes.TestCase
