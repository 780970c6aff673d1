"""Tokens: what proves its claims, and what proves nothing."""

import asyncio
import json
import string
from collections.abc import Sequence
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from hypothesis import given
from hypothesis import strategies as st

from fastapi_hardening.core.clock import ManualClock
from fastapi_hardening.core.identity import InvalidCredentials
from fastapi_hardening.security.auth.jwk import ALGORITHMS, KeySet, VerificationKey
from fastapi_hardening.security.auth.jwt import (
    JwtSettings,
    JwtVerifier,
    SignatureCheck,
    VerifiedToken,
    claim_at,
    names_at,
    parse_compact,
    unverified_issuer,
)
from fastapi_hardening.security.auth.keys import StaticKeys
from tests.security.auth.tokens import (
    AUDIENCE,
    ISSUER,
    NOW,
    SECRET,
    b64,
    claims,
    hmac_with,
    key,
    public,
    settings,
    signer,
    token,
    verifier,
)

GOOD = token()
ASYMMETRIC = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA", "Ed25519")


def verified(sent: Any, by: JwtVerifier | None = None) -> VerifiedToken:
    """What a token proves."""
    return asyncio.run((by or verifier()).verify(sent))


def refused(sent: Any, by: JwtVerifier | None = None) -> str:
    """Why a token proves nothing."""
    with pytest.raises(InvalidCredentials) as caught:
        verified(sent, by)
    return caught.value.reason


class Cryptography:
    """Another library behind the verifier."""

    def __init__(self) -> None:
        self.prepared: list[VerificationKey] = []

    def prepare(self, key: VerificationKey) -> SignatureCheck:
        self.prepared.append(key)
        digest = hashes.SHA256()

        def check(signed: bytes, signature: bytes) -> bool:
            if key.algorithm == "HS256":
                return hmac_with(key.material)(signed) == signature
            if key.algorithm == "RS256":
                key.material.verify(signature, signed, padding.PKCS1v15(), digest)
            else:
                numbers = (int.from_bytes(half, "big") for half in (signature[:32], signature[32:]))
                key.material.verify(encode_dss_signature(*numbers), signed, ec.ECDSA(digest))
            return True

        return check


# --- what holds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_good_token_proves_its_claims(algorithm: str) -> None:
    """Every algorithm verifies what its key has signed, and what it says is handed out."""
    found = verified(token(algorithm=algorithm), verifier(key(algorithm)))
    assert found.claims == claims()
    assert found.key.algorithm == algorithm
    assert found.valid_until == NOW + 600


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_no_byte_of_a_signature_is_free(algorithm: str) -> None:
    """A changed signature, a cut one, a longer one, and one of another token do not hold."""
    by, sent = verifier(key(algorithm)), token(algorithm=algorithm)
    head, _, _ = sent.rpartition(".")
    signature = signer(algorithm)(head.encode())
    for other in (
        bytes([signature[0] ^ 1]) + signature[1:],
        signature[:-1] + bytes([signature[-1] ^ 128]),
        signature[:-1],
        signature + b"\0",
        bytes(len(signature)),
        b"\xff" * len(signature),
        signer(algorithm)(b"something else"),
    ):
        assert refused(f"{head}.{b64(other)}", by) == "signature"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_key_verifies_only_what_its_own_algorithm_has_signed(algorithm: str) -> None:
    """Guards against algorithm confusion: the same key material under any other name is no key at all."""
    by = verifier(key(algorithm))
    for other in ALGORITHMS:
        if other != algorithm:
            sign = signer(other) if other[:2] == algorithm[:2] else signer(algorithm)
            assert refused(token(header={"alg": other}, sign=sign), by) == "unknown-key"


def test_another_key_of_the_same_kind_does_not_verify() -> None:
    """What somebody else has signed under our key's name proves nothing."""
    for algorithm in ("HS256", "RS256"):
        assert refused(token(algorithm=algorithm, which=1), verifier(key(algorithm))) == "signature"


def test_the_library_is_exchangeable_and_prepares_each_key_once() -> None:
    """Another backend verifies the same, with its key built once."""
    for algorithm in ("HS256", "RS256", "ES256"):
        backend = Cryptography()
        by = verifier(key(algorithm), backend=backend)
        sent = token(algorithm=algorithm)
        assert [verified(sent, by).claims["sub"] for _ in range(3)] == ["anna"] * 3
        assert refused(token(algorithm=algorithm, sign=lambda _: b"\1" * 64), by) == "signature"
        assert len(backend.prepared) == 1


def test_what_a_library_raises_is_a_signature_that_does_not_hold() -> None:
    """Also when it fails to build the key, or answers something else than yes."""

    class Broken:
        def prepare(self, _key: VerificationKey) -> SignatureCheck:
            raise RuntimeError("out of order")

    class Vague:
        def prepare(self, _key: VerificationKey) -> Any:
            return lambda _signed, _signature: "maybe"

    for backend in (Broken(), Vague()):
        assert refused(GOOD, verifier(backend=backend)) == "signature"


def test_the_key_decides_and_not_the_source_that_found_it() -> None:
    """A source that hands out a key of another algorithm or name is not believed."""

    class Careless:
        generation = 0

        async def find(self, kid: str | None, algorithm: str) -> Sequence[VerificationKey]:
            return [key("HS256", "k1"), key("HS512", "other")]

    assert verified(GOOD, verifier(Careless())).claims["sub"] == "anna"
    for header in ({"alg": "HS384"}, {"kid": "another"}, {"alg": "HS512"}):
        assert refused(token(header=header), verifier(Careless())) == "unknown-key"


def test_a_source_of_keys_that_fails_refuses(caplog: pytest.LogCaptureFixture) -> None:
    """Its own refusal keeps its reason; whatever else it raises is logged, and no 500."""

    class Failing:
        generation = 0

        def __init__(self, error: Exception) -> None:
            self.error = error

        async def find(self, kid: str | None, algorithm: str) -> Sequence[VerificationKey]:
            raise self.error

    assert refused(GOOD, verifier(Failing(InvalidCredentials("closed")))) == "closed"
    assert "failed" not in caplog.text
    assert refused(GOOD, verifier(Failing(OSError("the vault is shut")))) == "keys-unavailable"
    assert "the vault is shut" in caplog.text


# --- the attack list --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["none", "None", "NONE", "nOnE", "", " none", "none\0"])
def test_alg_none_is_never_accepted(name: str) -> None:
    """Guards against CVE-2015-9235: no spelling of none, with or without something where the signature was."""
    empty = token(header={"alg": name}, sign=lambda _: b"")
    assert refused(empty) == "malformed"
    assert refused(empty.rstrip(".")) == "malformed"
    assert refused(token(header={"alg": name})) == "algorithm"
    assert refused(token(header={"alg": name}), verifier(algorithms=["HS256"])) == "algorithm"


@pytest.mark.parametrize("name", ["hs256", "Hs256", "HS256 ", "HS-256", "SHA256", None, 256, ["HS256"], True, {"a": 1}])
def test_alg_is_exact(name: Any) -> None:
    """Case, white space and types are not forgiven, although the signature holds."""
    assert refused(token(header={"alg": name})) == "algorithm"


def test_alg_must_be_there() -> None:
    """A header that does not say how it was signed says nothing."""
    assert refused(token(header={"alg": ...})) == "algorithm"


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
def test_a_public_key_is_no_hmac_secret(algorithm: str) -> None:
    """Guards against the confusion of HS256 with RS256, in PEM, in DER (python-jose #398), and as raw numbers."""
    material = public(algorithm)
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    forms = [
        material.public_bytes(encoding, spki) for encoding in (serialization.Encoding.PEM, serialization.Encoding.DER)
    ]
    if isinstance(material, rsa.RSAPublicKey):
        forms.append(material.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.PKCS1))
        forms.append(material.public_numbers().n.to_bytes(256, "big"))
    for form in forms:
        for secret in (form, form.strip(), form + b"\n"):
            forged = token(header={"alg": "HS256"}, sign=hmac_with(secret))
            assert refused(forged, verifier(key(algorithm))) == "unknown-key"


@pytest.mark.parametrize("secret", [b"", b"\0" * 32, b"secret", b"null", b"undefined"])
def test_a_token_signed_with_nothing_is_refused(secret: bytes) -> None:
    """Guards against an empty or well-known secret, such as what a missing key file gives."""
    assert refused(token(sign=hmac_with(secret))) == "signature"


@pytest.mark.parametrize(
    "kid",
    [
        "../../../../dev/null",
        "/dev/null",
        "k1' OR '1'='1",
        "k1; DROP TABLE keys",
        "k1\0",
        "K1",
        " k1",
        "k1\n",
        "https://attacker.example/key",
        "$(id)",
        "x" * 3000,
    ],
)
def test_kid_is_looked_up_and_nothing_else(kid: str) -> None:
    """Guards against paths, SQL and nulls in ``kid``: it is compared, in full."""
    assert refused(token(header={"kid": kid}, sign=hmac_with(b""))) == "unknown-key"
    assert refused(token(header={"kid": kid})) == "unknown-key"


@pytest.mark.parametrize("kid", [None, "", 1, True, ["k1"], {"k1": 1}])
def test_kid_is_a_string(kid: Any) -> None:
    """Another type is no name, not even ``null``."""
    assert refused(token(header={"kid": kid})) == "kid"


@pytest.mark.parametrize(
    "member",
    [
        {"jku": "https://attacker.example/jwks"},
        {"x5u": "https://attacker.example/cert"},
        {"x5c": ["MIIB"]},
        {"x5t": "AAAA"},
        {"x5t#S256": "AAAA"},
        {"jwk": {"kty": "oct", "k": b64(SECRET)}},
        {"crit": ["exp"]},
        {"crit": []},
        {"crit": ["b64"], "b64": False},
        {"b64": False},
        {"b64": True},
        {"zip": "DEF"},
        {"enc": "A256GCM"},
        {"p2c": 2_147_483_647, "p2s": "AAAA"},
        {"epk": {}},
        {"cty": "JWT"},
        {"jwk": None},
    ],
)
def test_members_that_choose_a_key_or_change_the_rules_are_refused(member: dict[str, Any]) -> None:
    """Guards against ``jku``, ``x5u``, ``x5c``, an embedded ``jwk`` (CVE-2018-0114), ``crit``, ``b64``, ``p2c``."""
    assert refused(token(header=member)) == "refused-header"


def test_thumbprints_can_be_let_through_and_find_no_key() -> None:
    """Entra's v1 tokens have them; they are ignored."""
    by = verifier(allow_thumbprints=True)
    assert verified(token(header={"x5t": "AAAA", "x5t#S256": "BBBB"}), by).key.kid == "k1"
    assert refused(token(header={"x5t": "k1", "kid": "k2"}), by) == "unknown-key"
    assert refused(token(header={"x5c": ["AAAA"]}), by) == "refused-header"


@pytest.mark.parametrize("algorithm", ["ES256", "ES384", "ES512"])
def test_psychic_signatures_are_refused(algorithm: str) -> None:
    """Guards against CVE-2022-21449: r and s of zero, of the order, and one of them zero."""
    length = {"ES256": 32, "ES384": 48, "ES512": 66}[algorithm]
    zero, one = bytes(length), bytes(length - 1) + b"\1"
    order = (0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551).to_bytes(length, "big")
    head = token(algorithm=algorithm).rpartition(".")[0]
    for signature in (zero + zero, one + zero, zero + one, order + order, order + one, one + order):
        assert refused(f"{head}.{b64(signature)}", verifier(key(algorithm))) == "signature"


def test_a_der_signature_is_not_the_one_of_jws() -> None:
    """ECDSA signatures have two numbers of fixed length; another encoding is another spelling."""

    def sign(data: bytes) -> bytes:
        raw = signer("ES256")(data)
        return encode_dss_signature(int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big"))

    assert refused(token(algorithm="ES256", sign=sign), verifier(key("ES256"))) == "signature"


@pytest.mark.parametrize(
    "sent",
    [
        "",
        ".",
        "..",
        "...",
        "a.b.c",
        GOOD + ".",
        "." + GOOD,
        GOOD + "=",
        GOOD + "!!!!",
        GOOD + " ",
        " " + GOOD,
        GOOD + "\n",
        GOOD + "\0",
        GOOD.replace(".", ". ", 1),
        GOOD.replace(".", "=.", 1),
        GOOD.replace(".", "?.", 1),
        GOOD.replace(".", "..", 1),
        GOOD.rpartition(".")[0],
        GOOD.rpartition(".")[0] + ".",
        "." + GOOD.partition(".")[2],
        GOOD + "." + GOOD,
        "e30." * 4 + "e30",  # encrypted: five parts
        '{"payload":"e30","protected":"e30","signature":"AA"}',
        '{"payload":"e30","signatures":[]}',
        "Bearer " + GOOD,
        GOOD.replace("a", "а", 1),  # noqa: RUF001 - a Cyrillic letter
        GOOD + "\ud800",
        "é" * 20,
        b"\xff\xfe",
        GOOD.encode() + b"\x80",
    ],
)
def test_a_token_has_one_spelling(sent: Any) -> None:
    """Guards against malleable tokens: nothing is added, left out, padded, or encoded in another way."""
    assert refused(sent) == "malformed"


def test_the_last_character_has_no_free_bits() -> None:
    """Guards against three other spellings of one signature, each of which would be another token to a cache."""
    last = string.ascii_uppercase + string.ascii_lowercase + string.digits + "-_"
    others = [GOOD[:-1] + last[last.index(GOOD[-1]) + step] for step in (1, 2, 3)]
    assert [refused(other) for other in others] == ["malformed"] * 3
    assert verified(GOOD.encode()).claims["sub"] == "anna"


def test_a_token_has_a_largest_size() -> None:
    """Before anything of it is read, whatever it is made of."""
    for sent in (GOOD + "A" * 8192, "." * 8193, "é" * 8193, b"\0" * 8193, token(claims(note="x" * 8192))):
        assert refused(sent) == "too-large"
    assert verified(token(claims(note="x" * 8192)), verifier(max_token_bytes=65_536)).claims["sub"] == "anna"


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b"null",
        b'"HS256"',
        b'{"alg":"HS256"',
        b'{"alg":"none","alg":"HS256","typ":"at+jwt","kid":"k1"}',
        b'{"alg":"HS256","typ":"at+jwt","kid":"k1","kid":"k1"}',
        b'{"alg":"HS256","typ":"at+jwt","kid":"k1","x":NaN}',
        b'{"alg":"HS256","typ":"at+jwt","kid":"k1","x":1e400}',
        b'{"alg":"HS256","typ":"at+jwt","kid":"\xff"}',
        b'{"alg":"HS256","typ":"at+jwt","kid":"\\ud800"}',
        b'\xef\xbb\xbf{"alg":"HS256","typ":"at+jwt","kid":"k1"}',
        b'{"alg":"HS256","typ":"at+jwt","kid":"k1","x":' + b"[" * 2000 + b"]" * 2000 + b"}",
        b'{"a":' * 800,
        b"[" * 5000,
    ],
)
def test_a_header_is_strict_json(header: bytes) -> None:
    """Guards against duplicates, and against the RecursionError that a deep header raises in python-jose."""
    assert refused(token(header=header)) == ("header" if header else "malformed")


def test_a_deep_header_does_not_exhaust_the_stack() -> None:
    """Guards against the 500 of python-jose: 40 kB of brackets, before any signature is looked at."""
    by = verifier(max_token_bytes=65_536)
    assert refused(token(header=b'{"a":' + b"[" * 40_000), by) == "header"


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"[]",
        b"1",
        json.dumps(claims()).encode()[:-1],
        json.dumps(claims()).encode()[:-1] + b',"sub":"admin"}',
        json.dumps(claims(x=...)).encode()[:-1] + b',"x":Infinity}',
        json.dumps(claims()).encode()[:-1] + b',"exp":1e400}',
        json.dumps(claims()).encode("utf-16"),
    ],
)
def test_claims_are_strict_json(payload: bytes) -> None:
    """Also when the signature holds: two readers could disagree on who is meant."""
    assert refused(token(payload)) == "claims"


# --- types ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["at+jwt", "AT+JWT", "application/at+jwt", "JWT", "jwt"])
def test_the_types_of_access_tokens_are_accepted(name: str) -> None:
    """They are media types, compared as such (RFC 7515, section 4.1.9)."""
    assert verified(token(header={"typ": name})).claims["sub"] == "anna"


@pytest.mark.parametrize(
    "name", ["rt+jwt", "refresh+jwt", "logout+jwt", "dpop+jwt", "JOSE", "", "jwt ", 1, None, ["JWT"]]
)
def test_a_token_of_another_type_is_no_access_token(name: Any) -> None:
    """Guards against the confusion of token types (RFC 8725, section 3.11): refresh, proof, logout tokens."""
    assert refused(token(header={"typ": name})) == "type"


def test_a_token_without_type_is_accepted_only_if_the_issuer_is_known_for_it() -> None:
    """Some issuers leave it out."""
    sent = token(header={"typ": ...})
    assert refused(sent) == "type"
    assert verified(sent, verifier(require_type=False)).claims["sub"] == "anna"
    assert refused(token(header={"typ": "rt+jwt"}), verifier(require_type=False)) == "type"
    assert refused(token(header={"typ": "JWT"}), verifier(types=["at+jwt"])) == "type"


@pytest.mark.parametrize(("name", "reason"), [("at_hash", "id-token"), ("c_hash", "id-token"), ("cnf", "bound-token")])
def test_tokens_that_are_for_something_else_are_refused(name: str, reason: str) -> None:
    """An ID token is for a client; a token bound to its holder's key (RFC 7800) proves nothing without that key."""
    assert refused(token(claims(**{name: {"jkt": "AAAA"}}))) == reason


def test_bound_tokens_can_be_taken_as_they_are() -> None:
    """Where something in front has checked the binding."""
    assert verified(token(claims(cnf={"x5t#S256": "A"})), verifier(allow_bound_tokens=True)).claims["sub"] == "anna"


# --- claims -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["exp", "iat", "iss", "aud", "sub"])
def test_a_required_claim_is_there(name: str) -> None:
    """Guards against a token without expiry, and others that say too little; ``null`` says nothing."""
    assert refused(token(claims(**{name: ...}))) == f"missing-{name}"
    assert refused(token(claims(**{name: None}))) == f"missing-{name}"


def test_more_claims_can_be_required() -> None:
    """Such as the ``client_id`` and ``jti`` of RFC 9068."""
    by = verifier(required_claims=["exp", "iat", "iss", "aud", "sub", "client_id"])
    assert refused(GOOD, by) == "missing-client_id"
    assert verified(token(claims(client_id="web")), by).claims["client_id"] == "web"


@pytest.mark.parametrize("name", ["exp", "iat", "nbf"])
@pytest.mark.parametrize("value", [str(NOW), "", True, False, [NOW], {"a": NOW}, -1, 1e15, 253_402_300_800])
def test_a_date_is_a_number(name: str, value: Any) -> None:
    """Guards against strings, booleans, and dates that no clock shows."""
    assert refused(token(claims(**{name: value}))) == f"bad-{name}"


@pytest.mark.parametrize("text", [b"NaN", b"Infinity", b"1e400", b"9" * 400, b"-Infinity"])
def test_a_date_is_a_number_that_json_has(text: bytes) -> None:
    """Guards against the OverflowError that an infinite ``exp`` raises in python-jose."""
    sent = json.dumps(claims(exp="?")).encode().replace(b'"?"', text)
    assert refused(token(sent)) == "claims"


def test_a_token_ends_at_its_exp() -> None:
    """Not a moment later; fractions count; the leeway moves the end."""
    clock = ManualClock()
    by, lenient = verifier(clock=clock), verifier(clock=clock, leeway_seconds=10)
    clock.advance(599.5)
    assert verified(GOOD, by).valid_until == NOW + 600
    clock.advance(0.5)
    assert refused(GOOD, by) == "expired"
    clock.advance(9.5)
    assert verified(GOOD, lenient).valid_until == NOW + 610
    clock.advance(0.5)
    assert refused(GOOD, lenient) == "expired"


@pytest.mark.parametrize(
    ("changes", "leeway", "reason"),
    [
        ({"nbf": NOW + 1}, 0, "not-yet-valid"),
        ({"nbf": NOW + 11}, 10, "not-yet-valid"),
        ({"iat": NOW + 1}, 0, "issued-in-the-future"),
        ({"iat": NOW + 11}, 10, "issued-in-the-future"),
        ({"iat": NOW - 86_400}, 0, "too-old"),
        ({"iat": NOW - 86_410}, 10, "too-old"),
        ({"iat": 0}, 300, "too-old"),
    ],
)
def test_a_token_has_its_time(changes: dict[str, Any], leeway: float, reason: str) -> None:
    """Neither before it begins, nor issued tomorrow, nor older than tokens get."""
    assert refused(token(claims(**changes)), verifier(leeway_seconds=leeway)) == reason


@pytest.mark.parametrize(
    ("changes", "leeway"),
    [({"nbf": NOW}, 0), ({"nbf": NOW + 10}, 10), ({"iat": NOW + 10}, 10), ({"iat": NOW - 86_399.5}, 0)],
)
def test_clocks_may_differ_by_the_leeway(changes: dict[str, Any], leeway: float) -> None:
    """So that a token can be used the moment it is issued."""
    assert verified(token(claims(**changes)), verifier(leeway_seconds=leeway)).claims["sub"] == "anna"


def test_age_need_not_end_a_token() -> None:
    """Where the issuer's tokens live long, or do not say when they were issued."""
    old = token(claims(iat=NOW - 10**8))
    assert verified(old, verifier(max_age_seconds=None)).valid_until == NOW + 600
    by = verifier(max_age_seconds=None, required_claims=["exp", "iss", "aud", "sub"])
    assert verified(token(claims(iat=...)), by).claims["sub"] == "anna"
    assert verified(token(claims(iat=NOW - 86_000)), verifier()).valid_until == NOW + 400


@pytest.mark.parametrize(
    "value", [ISSUER + "/", ISSUER.upper(), "https://id.example", "https://evil.example", "", 7, [ISSUER]]
)
def test_the_issuer_is_exact(value: Any) -> None:
    """Guards against the mix-up of issuers: a slash more is another one."""
    assert refused(token(claims(iss=value))) in ("issuer", "bad-iss")


@pytest.mark.parametrize("value", [AUDIENCE, [AUDIENCE], ["other", AUDIENCE]])
def test_the_audience_may_be_a_string_or_a_list(value: Any) -> None:
    """Both are in RFC 7519, section 4.1.3."""
    assert verified(token(claims(aud=value))).claims["aud"] == value


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("other", "audience"),
        (["other"], "audience"),
        ([], "audience"),
        ("", "audience"),
        (AUDIENCE[:-1], "audience"),
        (AUDIENCE + "/", "audience"),
        ([[AUDIENCE]], "bad-aud"),
        ({AUDIENCE: 1}, "bad-aud"),
        (1, "bad-aud"),
        ([AUDIENCE, 1], "bad-aud"),
    ],
)
def test_a_token_for_somebody_else_is_refused(value: Any, reason: str) -> None:
    """Guards against a token that was issued for another service."""
    assert refused(token(claims(aud=value))) == reason


@pytest.mark.parametrize(
    ("name", "value"), [("sub", 7), ("sub", ""), ("sub", ["anna"]), ("sub", "a" * 513), ("sub", "a\nb")]
)
def test_the_subject_is_a_name(name: str, value: Any) -> None:
    """Of printable characters, because it is counted by, logged and looked up."""
    assert refused(token(claims(**{name: value}))) == "bad-sub"


@pytest.mark.parametrize("value", [7, "", None, "j" * 257, "a\0"])
def test_the_token_id_is_a_string(value: Any) -> None:
    """It is what revocations look for."""
    assert refused(token(claims(jti=value))) == "bad-jti"


# --- anything at all --------------------------------------------------------------------------------------------------

VERIFIER = verifier()
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8))
TREES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
NAMES = st.sampled_from(
    ["alg", "typ", "kid", "crit", "jwk", "iss", "aud", "sub", "exp", "iat", "nbf", "jti", "cnf", "x"]
)
HEADS = st.dictionaries(NAMES, st.one_of(TREES, st.sampled_from(["HS256", "none", "k1", "JWT"])), max_size=5)


async def _claims_or_refusal(sent: Any) -> None:
    try:
        found = await VERIFIER.verify(sent)
    except InvalidCredentials as refusal:
        if not refusal.reason:
            raise AssertionError("a refusal has a reason") from None
    else:
        assert found.claims["iss"] == ISSUER


@given(st.one_of(st.text(), st.binary(), st.text("AQgw_-.=", max_size=40)))
def test_anything_is_a_token_or_refused(sent: Any) -> None:
    """Whatever is sent, nothing but our one exception comes of it."""
    asyncio.run(_claims_or_refusal(sent))


@given(st.binary(), st.binary(), st.binary(max_size=40))
def test_any_three_parts_are_a_token_or_refused(first: bytes, second: bytes, third: bytes) -> None:
    """Well-formed around whatever bytes."""
    asyncio.run(_claims_or_refusal(f"{b64(first)}.{b64(second)}.{b64(third)}"))


@given(HEADS, st.booleans())
def test_any_header_is_a_token_or_refused(header: dict[str, Any], changes: bool) -> None:
    """Signed with the right key, whatever it says: by itself, or as a change of a good one."""
    sent = token(header=header) if changes else token(header=json.dumps(header).encode("utf-8", "surrogatepass"))
    asyncio.run(_claims_or_refusal(sent))


@given(HEADS)
def test_any_claims_are_a_token_or_refused(payload: dict[str, Any]) -> None:
    """Signed with the right key, whatever they are."""
    for sent in (payload, claims() | payload):
        asyncio.run(_claims_or_refusal(token(sent)))


@given(st.integers(0, len(GOOD) - 1), st.characters(max_codepoint=0x2FF))
def test_no_character_of_a_token_is_free(position: int, character: str) -> None:
    """A good token with any other character at any place proves nothing."""
    other = GOOD[:position] + character + GOOD[position + 1 :]
    if other != GOOD:
        assert refused(other, VERIFIER)


# --- settings and parts -----------------------------------------------------------------------------------------------


def test_settings_come_as_text() -> None:
    """As the environment has them."""
    made = JwtSettings.model_validate(
        {"issuer": ISSUER, "audience": "a, b", "algorithms": "RS256,ES256", "types": "JWT"}
    )
    assert (made.audience, made.algorithms, made.types) == (("a", "b"), ("RS256", "ES256"), ("JWT",))
    assert not any(name.startswith("HS") for name in JwtSettings(issuer="i", audience=("a",)).algorithms)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithms": ["none"]}, "no algorithm here"),
        ({"algorithms": ["rs256"]}, "did you mean 'RS256'"),
        ({"algorithms": []}, "at least one"),
        ({"audience": []}, "audience"),
        ({"issuer": ""}, "issuer"),
        ({"types": []}, "types"),
        ({"required_claims": ["sub", "iat"]}, "exp, iss, aud cannot be left out"),
        ({"required_claims": ["exp", "iss", "aud", "sub"]}, "max_age_seconds"),
        ({"leeway_seconds": 301}, "leeway_seconds"),
        ({"leeway": 3}, "did you mean 'leeway_seconds'"),
    ],
)
def test_settings_that_are_unsafe_are_refused(changes: dict[str, Any], message: str) -> None:
    """At the start, with the key and what to do."""
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_the_issuer_is_read_to_choose_a_verifier() -> None:
    """Strictly, although nothing is proven yet."""
    assert unverified_issuer(token(sign=lambda _: b"\0")) == ISSUER
    for sent, reason in (
        (token(claims(iss=7)), "issuer"),
        (token(b"{}"), "issuer"),
        (token(b""), "claims"),
        ("x", "malformed"),
    ):
        with pytest.raises(InvalidCredentials) as caught:
            unverified_issuer(sent)
        assert caught.value.reason == reason


def test_a_parsed_token_has_its_parts() -> None:
    """What is signed are the first two parts, as they were sent; a payload may be empty."""
    parsed = parse_compact(token(b"", algorithm="HS256"))
    assert (parsed.algorithm, parsed.kid, parsed.payload) == ("HS256", "k1", b"")
    assert parsed.signing_input.endswith(b".")
    assert asyncio.run(verifier().verify_signature(parsed)).kid == "k1"


def test_keys_without_a_name_are_tried_in_turn() -> None:
    """While one secret takes the place of another, tokens that name no key hold with either."""
    keys = StaticKeys(KeySet([key("HS256", None), key("HS256", None, 1)]))
    for which in (0, 1):
        assert verified(token(header={"kid": ...}, which=which), verifier(keys)).claims["sub"] == "anna"
    assert refused(token(header={"kid": ...}, which=2), verifier(keys)) == "signature"


def test_claims_are_found_by_path() -> None:
    """A claim whose own name has dots comes first."""
    says = {
        "realm_access": {"roles": ["clerk"]},
        "https://shop.example/roles": ["admin"],
        "resource_access": {"shop.api": {"roles": ["x"]}, "shop": {"api": 1}},
        "a.b": {"c": 2},
        "text": "t",
    }
    assert claim_at(says, "realm_access.roles") == ["clerk"]
    assert claim_at(says, "https://shop.example/roles") == ["admin"]
    assert claim_at(says, "resource_access.shop.api.roles") == ["x"]
    assert claim_at(says, "a.b.c") == 2
    for path in ("realm_access.groups", "text.roles", "nothing", ".roles", "realm_access."):
        assert claim_at(says, path) is None


def test_names_are_a_string_or_a_list() -> None:
    """Scopes are split at spaces; a role may have one in its name; anything else is no name."""
    says = {"scope": "a b  c", "scp": ["d"], "role": "Store Manager", "bad": {"x": 1}, "mixed": ["a", 1]}
    assert names_at(says, ("scope", "scp", "none"), split=True) == {"a", "b", "c", "d"}
    assert names_at(says, ("role",)) == {"Store Manager"}
    for path in ("bad", "mixed"):
        with pytest.raises(InvalidCredentials) as caught:
            names_at(says, (path,))
        assert caught.value.reason == f"bad-{path}"
