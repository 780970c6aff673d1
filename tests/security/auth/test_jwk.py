"""Keys: which may verify, and with which one algorithm."""

import json
import math
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import dsa, rsa
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from fastapi_hardening.security.auth.jwk import (
    ALGORITHMS,
    InvalidKey,
    KeySet,
    VerificationKey,
    decode_canonical,
    is_roca,
    strict_object,
)
from tests.security.auth.tokens import SECRET, b64, jwk, jwks, key, number, private, public

PRIMES = [p for p in range(3, 168, 2) if all(p % d for d in range(3, math.isqrt(p) + 1, 2))]


def refused(members: Any, **options: Any) -> str:
    """The reason why a JWK is refused."""
    with pytest.raises(InvalidKey) as caught:
        VerificationKey.from_jwk(members, algorithms=ALGORITHMS, **options)
    return caught.value.reason


def refused_set(data: Any, **options: Any) -> str:
    """The reason why a JWK set is refused."""
    with pytest.raises(InvalidKey) as caught:
        KeySet.from_jwks(data, algorithms=ALGORITHMS, **options)
    return caught.value.reason


def pem_of(material: Any) -> bytes:
    """A public key in PEM."""
    pem: bytes = material.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return pem


def roca_modulus(bits: int = 2048) -> int:
    """A number with the fingerprint of the broken generator; not a product of two primes, which is not looked at."""
    product = math.prod(PRIMES)
    base = pow(65537, 12_345, product)
    times = (1 << (bits - 1)) // product + 2
    return base + product * (times + (base + times + 1) % 2)


# --- one key ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_jwk_becomes_a_key_of_its_algorithm(algorithm: str) -> None:
    """Every algorithm has keys that are read, from JSON as from what JSON gives."""
    read = VerificationKey.from_jwk(jwk(algorithm), algorithms=ALGORITHMS)
    assert (read.algorithm, read.kid, read.is_symmetric) == (algorithm, "k1", algorithm.startswith("HS"))
    assert VerificationKey.from_jwk(json.dumps(jwk(algorithm)), algorithms=ALGORITHMS).algorithm == algorithm
    assert SECRET.decode() not in repr(read)


def test_a_jwk_may_say_what_it_is_for() -> None:
    """By ``key_ops`` with or without ``use``; a secret may sign as well."""
    for members in (jwk("RS256", use=..., key_ops=["verify"]), jwk("HS256", key_ops=["sign", "verify"])):
        assert VerificationKey.from_jwk(members, algorithms=ALGORITHMS).kid == "k1"
    assert VerificationKey.from_jwk(jwk("ES256", use=...)).algorithm == "ES256"


@pytest.mark.parametrize(
    ("has", "allowed", "bound"),
    [
        ("RS256", ("ES256", "PS384", "RS256"), "PS384"),
        ("ES384", ("ES256", "ES384"), "ES384"),
        ("HS256", ("HS512", "HS256"), "HS512"),
        ("EdDSA", ("RS256", "EdDSA"), "EdDSA"),
    ],
)
def test_a_jwk_without_alg_is_bound_to_the_first_that_fits(has: str, allowed: tuple[str, ...], bound: str) -> None:
    """What the owner lists first decides, within the kind and the curve of the key."""
    assert VerificationKey.from_jwk(jwk(has, alg=...), algorithms=allowed).algorithm == bound


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        (jwk("RS256", use="enc"), "use"),
        (jwk("RS256", use=None), "use"),
        (jwk("RS256", use=["sig"]), "use"),
        (jwk("RS256", use=..., key_ops=["encrypt"]), "key_ops"),
        (jwk("RS256", key_ops=["verify", "wrapKey"]), "key_ops"),
        (jwk("RS256", key_ops=["sign"]), "key_ops"),
        (jwk("RS256", key_ops=["sign, verify"]), "key_ops"),
        (jwk("RS256", key_ops=["verify", "verify"]), "key_ops"),
        (jwk("RS256", key_ops="verify"), "key_ops"),
        (jwk("RS256", key_ops=None), "key_ops"),
        (jwk("RS256", key_ops=[1]), "key_ops"),
        (jwk("HS256", use="enc"), "use"),
        (jwk("ES256", use="enc"), "use"),
        (jwk("RS256", alg="RSA-OAEP"), "alg"),
        (jwk("RS256", alg="rs256"), "alg"),
        (jwk("RS256", alg="HS256"), "alg"),
        (jwk("RS256", alg="none"), "alg"),
        (jwk("RS256", alg=None), "alg"),
        (jwk("RS256", alg=["RS256"]), "alg"),
        (jwk("ES256", alg="ES384"), "alg"),
        (jwk("ES512", alg="ES521"), "alg"),
        (jwk("HS256", alg="RS256"), "alg"),
        (jwk("EdDSA", crv="Ed448"), "crv"),
        (jwk("EdDSA", crv="X25519", alg=...), "crv"),
        (jwk("EdDSA", crv=["Ed25519"], alg=...), "crv"),
        (jwk("ES256", crv="secp256k1", alg=...), "crv"),
        (jwk("ES256", crv=["P-256"], alg=...), "crv"),
        (jwk("ES256", crv=...), "crv"),
        (jwk("RS256", kty="rsa"), "kty"),
        (jwk("RS256", kty=...), "kty"),
        (jwk("RS256", kty=["RSA"]), "kty"),
        (jwk("RS256", kid=7), "kid"),
        (jwk("RS256", kid=""), "kid"),
        (jwk("RS256", kid="k" * 257), "kid"),
        (jwk("RS256", d="AQAB"), "private-key"),
        (jwk("ES256", d="AQAB"), "private-key"),
        (jwk("EdDSA", d="AQAB"), "private-key"),
        (jwk("RS256", oth=[]), "private-key"),
        (jwk("RS256", k="AQAB"), "private-key"),
        (jwk("RS256", n=...), "encoding"),
        (jwk("RS256", n=7), "encoding"),
        (jwk("RS256", n=""), "encoding"),
        (jwk("RS256", e="AQAB=="), "encoding"),
        (jwk("RS256", e="AAEAAQ"), "encoding"),
        (jwk("RS256", e="AQ AB"), "encoding"),
        (jwk("RS256", e="AQ"), "rsa-exponent"),
        (jwk("RS256", e="Aw"), "rsa-exponent"),
        (jwk("RS256", e="AQAC"), "rsa-exponent"),
        (jwk("RS256", e=number(2**64 + 13)), "rsa-exponent"),
        (jwk("RS256", n=number(2**2047 + 2)), "weak-rsa"),
        (jwk("RS256", n=number(2**1023 + 1)), "weak-rsa"),
        (jwk("RS256", n=number(2**8192 + 1)), "weak-rsa"),
        (jwk("RS256", n=number(roca_modulus())), "roca"),
        (jwk("ES256", x=b64(b"\0" * 32)), "point"),
        (jwk("ES256", y=b64(b"\xff" * 32)), "point"),
        (jwk("ES256", x=b64(b"\1" * 31)), "encoding"),
        (jwk("ES256", x=b64(b"\1" * 33)), "encoding"),
        (jwk("EdDSA", x=b64(b"\1" * 31)), "encoding"),
        (jwk("HS256", k=b64(SECRET[:31])), "short-secret"),
        (jwk("HS384", k=b64(SECRET[:47])), "short-secret"),
        (jwk("HS512", k=b64(SECRET[:63])), "short-secret"),
        (jwk("HS256", k=""), "encoding"),
        (jwk("HS256", k=b64(SECRET) + "="), "encoding"),
        ("[]", "json"),
        ('{"kty":"oct","kty":"RSA"}', "json"),
        (b"\xff", "json"),
    ],
)
def test_a_jwk_that_must_not_verify_is_refused(members: Any, reason: str) -> None:
    """Weak, private, inconsistent and misspelt keys are refused, each with its reason."""
    assert refused(members) == reason


def test_a_key_of_an_algorithm_that_is_not_allowed_is_refused() -> None:
    """The allow list holds for what the key says and for what it could be."""
    for members in (jwk("RS512"), jwk("HS256"), jwk("ES256", alg=...)):
        with pytest.raises(InvalidKey) as caught:
            VerificationKey.from_jwk(members, algorithms=["RS256"])
        assert caught.value.reason == "algorithm-not-allowed"


def test_roca_is_told_from_other_keys() -> None:
    """The fingerprint holds for what the broken generator makes, and for no ordinary key."""
    assert is_roca(roca_modulus(1024))
    assert not is_roca(roca_modulus(1024) + 2)
    assert not any(is_roca(private("RS256", which).public_key().public_numbers().n) for which in range(2))


@pytest.mark.parametrize("algorithm", ["RS256", "PS512", "ES256", "ES512", "EdDSA"])
def test_pem_becomes_a_key_of_the_algorithm_that_is_named(algorithm: str) -> None:
    """A public key in PEM is read as text or bytes."""
    pem = pem_of(public(algorithm))
    assert VerificationKey.from_pem(pem.decode(), algorithm, kid="a").kid == "a"
    assert VerificationKey.from_pem(pem, algorithm).algorithm == algorithm


@pytest.mark.parametrize(
    ("algorithm", "has", "reason"),
    [
        ("HS256", "RS256", "kty"),
        ("ES256", "RS256", "kty"),
        ("RS256", "ES256", "kty"),
        ("EdDSA", "ES256", "kty"),
        ("ES256", "ES384", "crv"),
        ("none", "RS256", "algorithm"),
        ("RS1", "RS256", "algorithm"),
    ],
)
def test_pem_does_not_fit_another_algorithm(algorithm: str, has: str, reason: str) -> None:
    """Above all a public key is never a shared secret."""
    with pytest.raises(InvalidKey) as caught:
        VerificationKey.from_pem(pem_of(public(has)), algorithm)
    assert caught.value.reason == reason


def test_pem_that_is_private_weak_or_garbage_is_refused() -> None:
    """The message says how to get the public part."""
    secret = private("RS256").private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with pytest.raises(InvalidKey, match="pubout"):
        VerificationKey.from_pem(secret, "RS256")
    weak = rsa.generate_private_key(65537, 1024).public_key()
    with pytest.raises(InvalidKey, match="2048"):
        VerificationKey.from_pem(pem_of(weak), "RS256")
    with pytest.raises(InvalidKey, match="PEM"):
        VerificationKey.from_pem("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----", "RS256")
    other = dsa.generate_parameters(1024).generate_private_key().public_key()
    with pytest.raises(InvalidKey, match="no public key for RS256"):
        VerificationKey.from_pem(pem_of(other), "RS256")


def test_a_secret_is_as_long_as_the_hash() -> None:
    """Text counts as UTF-8, and may come as a ``SecretStr``."""
    text = "ä" * 16
    assert VerificationKey.from_secret(SecretStr(text)).material == text.encode()
    assert VerificationKey.from_secret(text, kid="a").kid == "a"
    for secret, algorithm in (("x" * 31, "HS256"), (b"x" * 47, "HS384"), (b"x" * 63, "HS512"), ("", "HS256")):
        with pytest.raises(InvalidKey) as caught:
            VerificationKey.from_secret(secret, algorithm)
        assert caught.value.reason == "short-secret"
        assert "x" * 8 not in str(caught.value)


@pytest.mark.parametrize("algorithm", ["RS256", "none", "HS1"])
def test_a_secret_is_only_for_hmac(algorithm: str) -> None:
    """Another algorithm is a mistake of the configuration."""
    with pytest.raises(InvalidKey, match="shared secret"):
        VerificationKey.from_secret(SECRET, algorithm)


def test_the_text_of_a_public_key_is_no_secret() -> None:
    """Guards against the confusion of HS256 with RS256 (CVE-2022-29217, CVE-2024-33663): everybody has that text."""
    ssh = public("RS256").public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    for text in (pem_of(public("RS256")), b"\n" + pem_of(public("ES256")), ssh):
        with pytest.raises(InvalidKey) as caught:
            VerificationKey.from_secret(text)
        assert caught.value.reason == "public-key-as-secret"


# --- sets -------------------------------------------------------------------------------------------------------------


def test_a_set_leaves_out_what_it_cannot_use_and_says_so() -> None:
    """Providers publish keys for encryption, of unknown kinds and old weak ones beside those that sign."""
    keys = KeySet.from_jwks(
        jwks(
            jwk("RS256", "good"),
            jwk("RS256", "enc", use="enc", alg="RSA-OAEP"),
            {"kty": "AKP", "kid": "later"},
            jwk("RS256", "weak", n=number(2**1023 + 1)),
            {"kty": "RSA", "kid": 3},
        )
    )
    assert [each.kid for each in keys.keys] == ["good"]
    assert keys.refused == (("enc", "use"), ("later", "kty"), ("weak", "weak-rsa"), (None, "kid"))


@pytest.mark.parametrize(
    ("data", "options", "reason"),
    [
        (jwks(), {}, "no-key"),
        (jwks(jwk("RS256", use="enc")), {}, "no-key"),
        (jwks(jwk("RS256", "a"), jwk("ES256", "a")), {}, "duplicate-kid"),
        (jwks(jwk("RS256", "a"), jwk("RS256", "a", use="enc", which=1)), {}, "duplicate-kid"),
        (jwks(jwk("RS256", "a"), jwk("HS256", "b")), {}, "mixed-set"),
        (jwks(jwk("HS256", "a"), jwk("ES256", "b")), {}, "mixed-set"),
        (jwks(jwk("HS256", "a"), jwk("RS256", "b", use="enc")), {}, "mixed-set"),
        (jwks(jwk("HS256", "a")), {"public": True}, "public-secret"),
        (jwks(*[jwk("HS256", str(n)) for n in range(101)]), {}, "jwks"),
        (b'{"keys": {}}', {}, "jwks"),
        (b'{"keys": [1]}', {}, "jwks"),
        (b"{}", {}, "jwks"),
        (b"[]", {}, "json"),
        (b'{"keys": [], "keys": []}', {}, "json"),
        (b'{"keys": [{"kty": "oct", "k": "a", "k": "b"}]}', {}, "json"),
        (b"{" * 100_000, {}, "json"),
    ],
)
def test_a_doubtful_set_is_refused_whole(data: bytes, options: dict[str, Any], reason: str) -> None:
    """Where it is not clear which key is meant, or a secret is no secret, none of the set is used."""
    assert refused_set(data, **options) == reason


def test_a_set_may_come_as_what_json_gives() -> None:
    """A mapping is read as its JSON is."""
    assert len(KeySet.from_jwks({"keys": [jwk("RS256")]}).keys) == 1


def test_a_token_gets_exactly_the_key_it_names() -> None:
    """The name and the algorithm must both fit; upper case is another name."""
    first, second = key("RS256", "a"), key("ES256", "b")
    keys = KeySet([first, second])
    assert keys.find("a", "RS256") == (first,)
    assert keys.find("b", "ES256") == (second,)
    for kid, algorithm in (("a", "ES256"), ("A", "RS256"), ("a ", "RS256"), ("", "RS256"), ("c", "RS256")):
        assert keys.find(kid, algorithm) == ()


def test_keys_that_were_read_one_by_one_make_a_set_by_the_same_rules() -> None:
    """No name is there twice, and who can sign is never beside who can only verify."""
    for keys, reason in (
        ([key("RS256", "a"), key("ES256", "a")], "duplicate-kid"),
        ([key("RS256", "a"), key("HS256", "b")], "mixed-set"),
        ([], "no-key"),
    ):
        with pytest.raises(InvalidKey) as caught:
            KeySet(keys)
        assert caught.value.reason == reason


def test_without_a_name_the_key_must_be_clear() -> None:
    """Unnamed keys are for tokens that name none; else the only key of the algorithm is, and of two neither is."""
    one, two, three = key("RS256", "a"), key("RS256", "b", 1), key("ES256", "c")
    keys = KeySet([one, two, three])
    assert keys.find(None, "RS256") == ()
    assert keys.find(None, "ES256") == (three,)
    unnamed, older = key("HS256", None), key("HS256", None, 1)
    assert KeySet([unnamed, older, key("HS256", "c", 2)]).find(None, "HS256") == (unnamed, older)
    assert KeySet([unnamed]).find("a", "HS256") == ()


# --- JSON and base64url -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        '"{}"',
        "{}x",
        '{"a":1,"a":1}',
        '{"a":{"b":1,"b":2}}',
        '{"a":NaN}',
        '{"a":Infinity}',
        '{"a":-Infinity}',
        '{"a":1e400}',
        '{"a":' + "9" * 30 + "}",
        '{"a":' + "9" * 100_000 + "}",
        '{"a":"\\ud800"}',
        '{"\\udfff":1}',
        '{"a":"\n"}',
        "{'a':1}",
        '{"a":1,}',
        '\ufeff{"a":1}',
        '{"a":' + "[" * 32 + "]" * 32 + "}",
        '{"a":' * 50_000,
        '{"\\"[[":' + "[" * 100_000,
    ],
)
def test_json_that_readers_disagree_on_is_refused(text: str) -> None:
    """Duplicates, constants, huge numbers, lone surrogates, depth: an error, and never another kind of error."""
    with pytest.raises(ValueError, match=r"."):
        strict_object(text)


@pytest.mark.parametrize("data", [b'{"a":"\xff"}', b'{"a":"\xc0\x80"}', b'{"a":"\xed\xa0\x80"}', b"\xff\xfe{\0}\0"])
def test_json_is_utf8(data: bytes) -> None:
    """Overlong forms, surrogates and other encodings are not read."""
    with pytest.raises(ValueError, match=r"."):
        strict_object(data)


def test_ordinary_json_is_read() -> None:
    """White space, escapes, pairs of surrogates, brackets in strings, and many shallow objects are no reason."""
    assert strict_object(b' {"a" : [1, -2.5e3, true, null, "\\u00e4\\ud83d\\ude00"]}\r\n')["a"][4] == "ä😀"
    assert strict_object(json.dumps({"a": "[" * 1000, "b": [{} for _ in range(100)]}))["a"] == "[" * 1000
    assert strict_object('{"a":' + "[" * 31 + "]" * 31 + "}")


@given(st.binary(max_size=40))
def test_base64url_has_one_spelling(data: bytes) -> None:
    """What is encoded is read back; with padding, or another last character, it is refused."""
    text = b64(data)
    assert decode_canonical(text) == data
    if len(text) % 4:
        last = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
        neighbour = text[:-1] + last[last.index(text[-1]) + 1]
        for other in (text + "=", neighbour, text + "\n"):
            with pytest.raises(ValueError, match="canonical"):
                decode_canonical(other)


@given(st.text(max_size=20))
def test_base64url_is_read_or_refused(text: str) -> None:
    """Any text gives bytes that encode to it, or an error."""
    try:
        data = decode_canonical(text)
    except ValueError:
        return
    assert b64(data) == text


@given(
    st.dictionaries(
        st.sampled_from(["kty", "use", "key_ops", "alg", "kid", "crv", "x", "y", "n", "e", "k", "d"]),
        st.one_of(
            st.none(),
            st.integers(),
            st.lists(st.text(max_size=5), max_size=3),
            st.text(max_size=30),
            st.sampled_from(["RSA", "EC", "OKP", "oct", "sig", "RS256", "ES256", "P-256", "Ed25519", "AQAB"]),
        ),
    )
)
def test_any_object_is_a_key_or_refused(members: dict[str, Any]) -> None:
    """A provider can publish what it likes: nothing but our error comes of it."""
    try:
        algorithm = VerificationKey.from_jwk(members, algorithms=ALGORITHMS).algorithm
    except InvalidKey:
        return
    assert algorithm in ALGORITHMS
