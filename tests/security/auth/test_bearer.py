"""Bearer tokens: from the request to the caller, remembered for as long as they hold and no longer."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI, HTTPException
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import HTTPConnection

from fastapi_hardening.core.clock import ManualClock
from fastapi_hardening.core.configuration import ConfigurationError
from fastapi_hardening.core.identity import Authenticator, CredentialsUnchecked, InvalidCredentials, Principal
from fastapi_hardening.core.store import MemoryStore, StoreUnavailable
from fastapi_hardening.security.auth.bearer import BearerAuthenticator, bearer_token
from fastapi_hardening.security.auth.jwk import VerificationKey
from fastapi_hardening.security.auth.jwt import JwtSettings, JwtVerifier, SignatureCheck
from fastapi_hardening.security.auth.keys import RemoteKeys, RemoteKeysSettings, RotatingKeys, StaticKeys
from fastapi_hardening.security.auth.revocation import Revocations
from tests.security.auth.tokens import AUDIENCE, ISSUER, NOW, claims, hmac_with, jwk, jwks, key, token, verifier

GOOD = token()
OTHER = "https://other.example"


class Counting:
    """A library that says how often it has verified."""

    def __init__(self) -> None:
        self.verified = 0

    def prepare(self, key: VerificationKey) -> SignatureCheck:
        def check(signed: bytes, signature: bytes) -> bool:
            self.verified += 1
            return hmac_with(key.material)(signed) == signature

        return check


class Kit:
    """An authenticator, with a clock that can be moved and a count of verifications."""

    def __init__(
        self, keys: Any = None, *, revoking: bool = False, settings: dict[str, Any] | None = None, **more: Any
    ):
        self.clock = ManualClock()
        self.backend = Counting()
        self.verifier = verifier(keys, clock=self.clock, backend=self.backend, **settings or {})
        self.revocations = Revocations(MemoryStore(clock=self.clock), clock=self.clock)
        if revoking:
            more["revocations"] = self.revocations
        self.authenticator = BearerAuthenticator(self.verifier, clock=self.clock, **more)

    def accepts(self, sent: str = GOOD) -> Principal:
        return asyncio.run(self.authenticator.authenticate_token(sent))

    def refuses(self, sent: str = GOOD) -> str:
        return reason(self.authenticator.authenticate_token(sent))


def reason(refusing: Awaitable[Any]) -> str:
    """Why credentials are refused."""

    async def wait() -> None:
        await refusing

    with pytest.raises(InvalidCredentials) as caught:
        asyncio.run(wait())
    return caught.value.reason


def connection(*fields: str | bytes, kind: str = "http") -> HTTPConnection:
    """A connection with these ``Authorization`` fields."""
    values = [field.encode() if isinstance(field, str) else field for field in fields]
    return HTTPConnection(
        {"type": kind, "headers": [(b"host", b"x"), *((b"authorization", value) for value in values)]}
    )


# --- from the request -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", [f"Bearer {GOOD}", f"bearer {GOOD}", f"BEARER {GOOD}", f"Bearer   {GOOD}"])
def test_the_token_is_in_the_authorization_field(field: str) -> None:
    """The scheme has no case; spaces may be several (RFC 9110, section 11.4)."""
    kit = Kit()
    for kind in ("http", "websocket"):
        principal = asyncio.run(kit.authenticator.authenticate(connection(field, kind=kind)))
        assert (principal and principal.id) == "anna"


@pytest.mark.parametrize(
    "fields", [(), ("Basic YTpi",), ("Negotiate abc",), ("Bearerx abc",), ("BearerToken abc",), ("",), ("Digest a=b",)]
)
def test_credentials_of_another_kind_are_somebody_elses(fields: tuple[str, ...]) -> None:
    """So that several kinds can be asked in turn."""
    assert asyncio.run(Kit().authenticator.authenticate(connection(*fields))) is None


@pytest.mark.parametrize(
    "field",
    [
        "Bearer",
        "Bearer ",
        f"Bearer {GOOD} {GOOD}",
        f"Bearer {GOOD},",
        f"Bearer {GOOD}, Bearer {GOOD}",
        f'Bearer token="{GOOD}"',
        f"Bearer\t{GOOD}",
        f"Bearer {GOOD}\t",
        "Bearer =",
        b"Bearer \xff",
        b"Bearer a\0b",
    ],
)
def test_a_malformed_field_is_refused(field: Any) -> None:
    """RFC 6750, section 2.1. A tab after the scheme is another scheme."""
    authenticator = Kit().authenticator
    if isinstance(field, str) and field.startswith("Bearer\t"):
        assert asyncio.run(authenticator.authenticate(connection(field))) is None
    else:
        assert reason(authenticator.authenticate(connection(field))) == "malformed-authorization"


def test_two_fields_are_refused() -> None:
    """Guards against a proxy that looks at one and an application that looks at the other."""
    authenticator = Kit().authenticator
    for fields in ((f"Bearer {GOOD}", f"Bearer {GOOD}"), ("Basic YTpi", f"Bearer {GOOD}"), (f"Bearer {GOOD}", "")):
        assert reason(authenticator.authenticate(connection(*fields))) == "several-authorization-fields"


def test_any_bearer_is_not_good_enough() -> None:
    """Guards against the check that only looks for the scheme (an advisory against fastapi-guard)."""
    authenticator = Kit().authenticator
    for sent in ("x", "test", "null", "undefined", "eyJhbGciOiJub25lIn0.e30.", GOOD[:-2]):
        assert reason(authenticator.authenticate(connection(f"Bearer {sent}"))) == "malformed"


@given(st.lists(st.binary(max_size=60) | st.binary(max_size=30).map(b"Bearer ".__add__), max_size=3))
def test_any_fields_are_read_or_refused(fields: list[bytes]) -> None:
    """Whatever comes in, nothing but our exception comes out, and a token is text of the grammar."""
    try:
        found = bearer_token(connection(*fields))
    except InvalidCredentials:
        return
    assert found is None or (found.isascii() and " " not in found)


@given(st.text(max_size=60))
def test_any_text_is_a_token_or_refused(sent: str) -> None:
    """Such as what a websocket has in its subprotocol."""
    assert Kit().refuses(sent) in ("malformed", "too-large", "header", "algorithm", "kid", "type")


def test_opaque_tokens_can_be_left_to_another_authenticator() -> None:
    """A token that is no JWT may be one that only its issuer understands."""
    ours = Kit(ignore_opaque=True).authenticator
    assert asyncio.run(ours.authenticate(connection("Bearer 2YotnFZFEjr1zCsicMWpAA"))) is None
    assert reason(ours.authenticate(connection("Bearer a.b.c"))) == "malformed"
    assert asyncio.run(ours.authenticate(connection(f"Bearer {GOOD}"))) is not None


def test_a_long_token_is_not_even_hashed() -> None:
    """The size comes first."""
    assert Kit().refuses("x" * 8193) == "too-large"


# --- to the caller ----------------------------------------------------------------------------------------------------


def test_claims_become_a_principal() -> None:
    """Who it is, by whom it is known, what for, and until when."""
    principal = Kit().accepts(token(claims(scope="orders:read orders:write", roles=["clerk"], permissions=["a", "b"])))
    assert principal == Principal(
        "anna",
        scheme="bearer",
        scopes=frozenset({"orders:read", "orders:write"}),
        roles=frozenset({"clerk"}),
        permissions=frozenset({"a", "b"}),
        issuer=ISSUER,
        credential="token-1",
        expires_at=NOW + 600,
        claims=principal.claims,
    )
    assert principal.claims["aud"] == AUDIENCE
    assert isinstance(Kit().authenticator.scheme, str)


@pytest.mark.parametrize(
    ("settings", "says", "expected"),
    [
        ({"role_claims": ["realm_access.roles"]}, {"realm_access": {"roles": ["a"]}}, {"roles": {"a"}}),
        ({"role_claims": ["roles", "groups"]}, {"roles": "a", "groups": ["b"]}, {"roles": {"a", "b"}}),
        ({"role_claims": ["https://x.example/roles"]}, {"https://x.example/roles": ["a"]}, {"roles": {"a"}}),
        ({}, {"scp": "a b"}, {"scopes": {"a", "b"}}),
        ({}, {"scp": ["a"], "scope": "b"}, {"scopes": {"a", "b"}}),
        ({}, {"scope": ["a b"]}, {"scopes": {"a b"}}),
        ({"tenant_claim": "org.id"}, {"org": {"id": "t1"}}, {"tenant": "t1"}),
        ({"tenant_claim": "tid"}, {}, {"tenant": None}),
    ],
)
def test_claims_are_where_the_issuer_puts_them(
    settings: dict[str, Any], says: dict[str, Any], expected: dict[str, Any]
) -> None:
    """Each has its own way."""
    principal = Kit(settings=settings).accepts(token(claims(**says)))
    assert {name: getattr(principal, name) for name in expected} == expected


@pytest.mark.parametrize(
    "says",
    [{"scope": 7}, {"scope": {"a": 1}}, {"roles": [1]}, {"permissions": True}, {"tid": 7}, {"tid": ""}, {"tid": ["t"]}],
)
def test_claims_of_a_wrong_type_are_refused(says: dict[str, Any]) -> None:
    """Rather than half understood."""
    [name] = says
    assert Kit(settings={"tenant_claim": "tid"}).refuses(token(claims(**says))) == f"bad-{name}"


def test_what_one_request_does_to_claims_does_not_reach_the_next() -> None:
    """They are remembered, so they are read-only, all the way down."""
    kit = Kit()
    sent = token(claims(roles=["clerk"], nested={"list": [{"a": 1}]}))
    says: Any = kit.accepts(sent).claims
    assert says["roles"] == ("clerk",)
    with pytest.raises(AttributeError):
        says.update(a=1)
    with pytest.raises(AttributeError):
        says["nested"]["list"][0].update(a=2)
    with pytest.raises(AttributeError):
        says["roles"].append("admin")
    assert kit.accepts(sent) is kit.accepts(sent)


# --- what is remembered -----------------------------------------------------------------------------------------------


def test_a_token_is_verified_once() -> None:
    """However often it comes; another one is verified by itself."""
    kit = Kit()
    for _ in range(5):
        kit.accepts()
    kit.accepts(token(claims(jti="2")))
    assert kit.backend.verified == 2


def test_bad_tokens_are_not_remembered() -> None:
    """They are refused each time, and take no room."""
    kit = Kit()
    for number in range(20):
        assert kit.refuses(token(claims(jti=str(number)), sign=hmac_with(b"wrong"))) == "signature"
    assert (kit.backend.verified, len(kit.authenticator._cache)) == (20, 0)


def test_memory_ends_with_the_token() -> None:
    """At its exp, to the second, although its verification is remembered."""
    kit = Kit(cache_seconds=10_000)
    kit.accepts()
    kit.clock.advance(599.9)
    kit.accepts()
    kit.clock.advance(0.1)
    assert kit.backend.verified == 1
    assert kit.refuses() == "expired"
    assert len(kit.authenticator._cache) == 0
    aged = Kit(cache_seconds=10_000, settings={"max_age_seconds": 60})
    aged.accepts()
    aged.clock.advance(60)
    assert aged.refuses() == "too-old"


def test_memory_ends_after_its_own_time() -> None:
    """So that the keys are asked for now and then, and refreshed."""
    kit = Kit(cache_seconds=100)
    kit.accepts()
    kit.clock.advance(99)
    kit.accepts()
    assert kit.backend.verified == 1
    kit.clock.advance(1)
    kit.accepts()
    assert kit.backend.verified == 2


def test_memory_is_bounded_and_keeps_who_comes_often() -> None:
    """The one that was longest not seen makes room."""
    kit = Kit(cache_size=2)
    first, second, third = (token(claims(jti=str(number))) for number in range(3))
    for sent in (first, second, first, third, first):
        kit.accepts(sent)
    assert (kit.backend.verified, len(kit.authenticator._cache)) == (3, 2)
    kit.accepts(second)
    assert kit.backend.verified == 4


def test_memory_can_be_off_and_can_be_emptied() -> None:
    """Then every request verifies."""
    kit = Kit(cache_size=0)
    kit.accepts()
    kit.accepts()
    assert (kit.backend.verified, len(kit.authenticator._cache)) == (2, 0)
    other = Kit()
    other.accepts()
    other.authenticator.forget()
    other.accepts()
    assert other.backend.verified == 2


def test_memory_ends_with_the_key() -> None:
    """A key that is retired takes what it has proven with it; the current one's tokens are verified again."""
    keys = RotatingKeys(key("HS256", "k1"))
    kit = Kit(keys)
    kit.accepts()
    keys.rotate(key("HS256", "k2", 1))
    kit.accepts()
    assert kit.backend.verified == 1
    keys.retire()
    assert kit.refuses() == "unknown-key"
    kit.accepts(token(header={"kid": "k2"}, which=1))


def test_a_key_that_goes_during_a_verification_is_not_remembered() -> None:
    """The generation is read before the key is looked for."""

    class Going(StaticKeys):
        generation = 0

        async def find(self, kid: str | None, algorithm: str) -> Sequence[VerificationKey]:
            found = await super().find(kid, algorithm)
            self.generation += 1
            return found

    kit = Kit(Going(key()))
    kit.accepts()
    kit.accepts()
    assert kit.backend.verified == 2


def test_the_keys_of_a_provider_rotate_under_load() -> None:
    """While tokens of the old and the new key come in, no good one is refused; the old key ends with its set."""

    async def story() -> None:
        clock = ManualClock()
        published = [jwk("RS256", "old")]

        async def fetch(_url: str) -> bytes:
            return jwks(*published)

        keys = RemoteKeys(RemoteKeysSettings(jwks_url="https://id.example/keys"), fetch=fetch, clock=clock)
        authenticator = BearerAuthenticator(verifier(keys, clock=clock), clock=clock)

        def tokens(kid: str, which: int) -> list[str]:
            return [token(claims(jti=f"{kid}{n}"), {"kid": kid}, algorithm="RS256", which=which) for n in range(20)]

        old, new = tokens("old", 0), tokens("new", 1)
        ask = authenticator.authenticate_token
        assert len(await asyncio.gather(*map(ask, old))) == 20
        clock.advance(60)
        published.append(jwk("RS256", "new", which=1))
        assert len(await asyncio.gather(*map(ask, old + new))) == 40
        del published[0]
        assert await keys.refresh()
        left = await asyncio.gather(*map(ask, old + new), return_exceptions=True)
        assert [isinstance(each, InvalidCredentials) for each in left] == [True] * 20 + [False] * 20

    asyncio.run(story())


# --- revocation -------------------------------------------------------------------------------------------------------


def test_a_revocation_holds_at_once() -> None:
    """Although the verification is remembered: of the token, of the subject, of what was issued before."""
    revocations: list[tuple[Callable[[Revocations], Awaitable[None]], str]] = [
        (lambda at: at.revoke_token("token-1", issuer=ISSUER), "revoked-token"),
        (lambda at: at.revoke_subject("anna", issuer=ISSUER), "revoked-subject"),
        (lambda at: at.revoke_issued_before("anna", issuer=ISSUER, moment=NOW + 1), "revoked-before"),
    ]

    async def apply(revoke: Callable[[Revocations], Awaitable[None]], at: Revocations) -> None:
        await revoke(at)

    for revoke, why in revocations:
        kit = Kit(revoking=True)
        kit.accepts()
        asyncio.run(apply(revoke, kit.revocations))
        assert kit.refuses() == why
        assert kit.backend.verified == 1
        kit.accepts(token(claims(jti="token-2", sub="bob")))


def test_a_revoked_subject_can_come_back() -> None:
    """With the token it has."""
    kit = Kit(revoking=True)
    asyncio.run(kit.revocations.revoke_subject("anna", issuer=ISSUER))
    assert kit.refuses() == "revoked-subject"
    asyncio.run(kit.revocations.restore_subject("anna", issuer=ISSUER))
    assert kit.accepts().id == "anna"


def test_a_token_without_id_is_revoked_with_its_subject() -> None:
    """There is no other name for it."""
    kit = Kit(revoking=True)
    sent = token(claims(jti=...))
    assert kit.accepts(sent).credential is None
    asyncio.run(kit.revocations.revoke_issued_before("anna", issuer=ISSUER, moment=NOW + 1))
    assert kit.refuses(sent) == "revoked-before"


def test_a_client_takes_back_a_token_that_it_was_given() -> None:
    """Only that client, only a good token; nothing is said of others."""
    sent = token(claims(client_id="app"))
    kit = Kit(revoking=True)
    asyncio.run(kit.authenticator.revoke(sent, "another app"))
    asyncio.run(kit.authenticator.revoke(sent[:-4] + "AAAA", "app"))
    asyncio.run(kit.authenticator.revoke(token(claims(jti=..., client_id="app")), "app"))
    kit.accepts(sent)
    asyncio.run(kit.authenticator.revoke(sent, "app"))
    assert kit.refuses(sent) == "revoked-token"


def test_a_token_that_cannot_be_taken_back_is_not_said_to_be() -> None:
    """The store is full, or does not answer, or there is none: whoever asks must come back."""

    class Gone(MemoryStore):
        async def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
            raise StoreUnavailable("gone")

    sent = token(claims(client_id="app"))
    full = MemoryStore(1)
    asyncio.run(full.put("something", b"1", 600))
    for store in (full, Gone()):
        kit = Kit(revocations=Revocations(store))
        with pytest.raises(CredentialsUnchecked):
            asyncio.run(kit.authenticator.revoke(sent, "app"))
    with pytest.raises(ConfigurationError, match="revocations="):
        asyncio.run(Kit().authenticator.revoke(sent, "app"))


# --- several issuers --------------------------------------------------------------------------------------------------


def several() -> tuple[BearerAuthenticator, ManualClock]:
    """An authenticator for two issuers, each with its own keys, audience and types."""
    clock = ManualClock()
    ours = JwtSettings(issuer=ISSUER, audience=(AUDIENCE,), algorithms=("HS256",))
    theirs = JwtSettings(issuer=OTHER, audience=("other",), algorithms=("RS256",), types=("JWT",), max_token_bytes=600)
    return (
        BearerAuthenticator(
            [
                JwtVerifier(ours, StaticKeys(key("HS256")), clock=clock),
                JwtVerifier(theirs, StaticKeys(key("RS256")), clock=clock),
            ],
            clock=clock,
        ),
        clock,
    )


def test_each_issuer_has_its_own_rules() -> None:
    """Its keys, its audience, its types, its sizes."""
    authenticator, _ = several()
    theirs = token(claims(iss=OTHER, aud="other", jti=...), {"typ": "JWT"}, algorithm="RS256")
    for sent, issuer in ((GOOD, ISSUER), (theirs, OTHER)):
        principal = asyncio.run(authenticator.authenticate_token(sent))
        assert principal.issuer == issuer
    ask = authenticator.authenticate_token
    assert (
        reason(ask(token(claims(iss=OTHER, aud="other", note="x" * 500), {"typ": "JWT"}, algorithm="RS256")))
        == "too-large"
    )
    assert reason(ask(token(claims(iss=OTHER, aud="other", jti=...), algorithm="RS256"))) == "type"


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (token(claims(iss=OTHER, aud="other"), {"typ": "JWT"}), "algorithm"),
        (token(claims(iss=ISSUER), {"typ": "JWT"}, algorithm="RS256"), "algorithm"),
        (token(claims(iss="https://third.example")), "issuer"),
        (token(claims(iss=OTHER + "/")), "issuer"),
        (token(claims(iss=[ISSUER, OTHER])), "issuer"),
        (token(claims(iss=...)), "issuer"),
        (token(b"[]"), "claims"),
        ("a.b.c", "malformed"),
    ],
)
def test_no_issuer_vouches_for_anothers_subjects(sent: str, why: str) -> None:
    """Guards against the mix-up of issuers: a token is verified with the keys of the one it names."""
    assert reason(several()[0].authenticate_token(sent)) == why


def test_the_same_subject_of_two_issuers_is_two() -> None:
    """A revocation of one is not one of the other."""
    authenticator, clock = several()
    authenticator._revocations = Revocations(MemoryStore(clock=clock), clock=clock)
    asyncio.run(authenticator._revocations.revoke_subject("anna", issuer=OTHER))
    assert asyncio.run(authenticator.authenticate_token(GOOD)).id == "anna"


def test_an_issuer_has_one_verifier() -> None:
    """Two would be a way round the stricter one."""
    for verifiers in ([], [verifier(), verifier()]):
        with pytest.raises(ConfigurationError, match="verifier"):
            BearerAuthenticator(verifiers)


# --- in an application ------------------------------------------------------------------------------------------------


def test_it_works_behind_a_plain_dependency() -> None:
    """Without any layer of ours: 200 for a good token, 401 for a bad one and for none."""
    authenticator: Authenticator = Kit().authenticator
    app = FastAPI()

    async def caller(connection: HTTPConnection) -> Principal:
        try:
            principal = await authenticator.authenticate(connection)
        except InvalidCredentials:
            principal = None
        if principal is None:
            raise HTTPException(401, headers={"WWW-Authenticate": authenticator.challenge})
        return principal

    @app.get("/me")
    async def me(principal: Annotated[Principal, Depends(caller)]) -> str:
        return principal.id

    client = TestClient(app)
    answers: list[Callable[[], Any]] = [
        lambda: client.get("/me", headers={"Authorization": f"Bearer {GOOD}"}),
        lambda: client.get("/me", headers={"Authorization": f"Bearer {GOOD}x"}),
        lambda: client.get("/me", headers=[("Authorization", f"Bearer {GOOD}"), ("Authorization", "Bearer x")]),
        lambda: client.get("/me"),
    ]
    assert [answer().status_code for answer in answers] == [200, 401, 401, 401]
    assert answers[0]().json() == "anna"
    assert answers[3]().headers["www-authenticate"] == "Bearer"
