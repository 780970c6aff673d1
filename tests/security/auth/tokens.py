"""What the tests of tokens share: an issuer that signs whatever it is told to, well or badly."""

import base64
import hashlib
import hmac
import json
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from fastapi_hardening.core.clock import ManualClock
from fastapi_hardening.security.auth.jwk import ALGORITHMS, VerificationKey
from fastapi_hardening.security.auth.jwt import JwtSettings, JwtVerifier
from fastapi_hardening.security.auth.keys import KeySource, StaticKeys

ISSUER = "https://id.example/realms/shop"
AUDIENCE = "https://orders.example"
SECRET = b"a secret with more than 64 bytes, so that it is long enough for HS512 as well"
NOW = 1_700_000_000
CURVES: dict[str, tuple[ec.EllipticCurve, int]] = {
    "ES256": (ec.SECP256R1(), 32),
    "ES384": (ec.SECP384R1(), 48),
    "ES512": (ec.SECP521R1(), 66),
}

Sign = Callable[[bytes], bytes]


def b64(data: bytes) -> str:
    """Base64url without padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def number(value: int) -> str:
    """An unsigned integer as JWK has it."""
    return b64(value.to_bytes((value.bit_length() + 7) // 8, "big"))


@cache
def private(algorithm: str, which: int = 0) -> Any:
    """A private key for an algorithm; a secret where it is symmetric."""
    if algorithm.startswith("HS"):
        return SECRET + b"!" * which
    if algorithm.startswith("ES"):
        return ec.generate_private_key(CURVES[algorithm][0])
    if algorithm.startswith("Ed"):
        return ed25519.Ed25519PrivateKey.generate()
    return _rsa(which)


@cache
def _rsa(which: int) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


def public(algorithm: str, which: int = 0) -> Any:
    """What verifies for that private key."""
    key = private(algorithm, which)
    return key if isinstance(key, bytes) else key.public_key()


def key(algorithm: str = "HS256", kid: str | None = "k1", which: int = 0) -> VerificationKey:
    """A verification key."""
    return VerificationKey(algorithm, public(algorithm, which), kid)


def jwk(algorithm: str, kid: Any = "k1", which: int = 0, **more: Any) -> dict[str, Any]:
    """A public key, or a secret, as JWK."""
    material = public(algorithm, which)
    members: dict[str, Any] = {"use": "sig", "alg": algorithm} | ({} if kid is None else {"kid": kid})
    if isinstance(material, bytes):
        members |= {"kty": "oct", "k": b64(material)}
    elif isinstance(material, rsa.RSAPublicKey):
        numbers = material.public_numbers()
        members |= {"kty": "RSA", "n": number(numbers.n), "e": number(numbers.e)}
    elif isinstance(material, ec.EllipticCurvePublicKey):
        point, length = material.public_numbers(), CURVES[algorithm][1]
        x, y = (b64(value.to_bytes(length, "big")) for value in (point.x, point.y))
        members |= {"kty": "EC", "crv": {32: "P-256", 48: "P-384", 66: "P-521"}[length], "x": x, "y": y}
    else:
        members |= {"kty": "OKP", "crv": "Ed25519", "x": b64(material.public_bytes_raw())}
    return {name: value for name, value in (members | more).items() if value is not ...}


def jwks(*keys: Mapping[str, Any]) -> bytes:
    """A JWK set as it is served."""
    return json.dumps({"keys": keys}).encode()


def signer(algorithm: str, which: int = 0) -> Sign:
    """What signs with the private key of an algorithm."""
    secret = private(algorithm, which)
    if algorithm[:2] in ("HS", "RS", "PS", "ES"):
        digest = {"256": hashes.SHA256(), "384": hashes.SHA384(), "512": hashes.SHA512()}[algorithm[2:]]

    def sign(data: bytes) -> bytes:
        if algorithm.startswith("HS"):
            return hmac.new(secret, data, f"sha{algorithm[2:]}").digest()
        if algorithm.startswith("RS"):
            return bytes(secret.sign(data, padding.PKCS1v15(), digest))
        if algorithm.startswith("PS"):
            return bytes(secret.sign(data, padding.PSS(padding.MGF1(digest), digest.digest_size), digest))
        if algorithm.startswith("ES"):
            length = CURVES[algorithm][1]
            numbers = decode_dss_signature(secret.sign(data, ec.ECDSA(digest)))
            return b"".join(part.to_bytes(length, "big") for part in numbers)
        return bytes(secret.sign(data))

    return sign


def hmac_with(secret: bytes) -> Sign:
    """What signs HS256 with any secret, however bad."""
    return lambda data: hmac.new(secret, data, hashlib.sha256).digest()


def claims(**changes: Any) -> dict[str, Any]:
    """What a good token says, with changes; ``...`` takes a claim away."""
    good: dict[str, Any] = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": "anna",
        "iat": NOW,
        "exp": NOW + 600,
        "jti": "token-1",
    }
    return {name: value for name, value in (good | changes).items() if value is not ...}


def token(
    payload: Mapping[str, Any] | bytes | None = None,
    header: Mapping[str, Any] | bytes | None = None,
    *,
    algorithm: str = "HS256",
    sign: Sign | None = None,
    which: int = 0,
) -> str:
    """A token: a good one unless told otherwise; a header given as a mapping changes the good one's."""
    head: dict[str, Any] = {"alg": algorithm, "typ": "at+jwt", "kid": "k1"}
    if isinstance(header, bytes):
        first = header
    else:
        head |= header or {}
        first = json.dumps({name: value for name, value in head.items() if value is not ...}).encode()
    second = payload if isinstance(payload, bytes) else json.dumps(claims() if payload is None else payload).encode()
    signed = f"{b64(first)}.{b64(second)}"
    return f"{signed}.{b64((sign or signer(algorithm, which))(signed.encode()))}"


def settings(**changes: Any) -> JwtSettings:
    """The settings of that issuer, with every algorithm allowed."""
    known: dict[str, Any] = {"issuer": ISSUER, "audience": [AUDIENCE], "algorithms": ALGORITHMS, "leeway_seconds": 0}
    return JwtSettings(**known | changes)


def verifier(
    keys: KeySource | VerificationKey | None = None,
    *,
    clock: ManualClock | None = None,
    backend: Any = None,
    **changes: Any,
) -> JwtVerifier:
    """A verifier for that issuer, whose clock stands at ``NOW``."""
    source = StaticKeys(keys) if isinstance(keys, VerificationKey) else keys or StaticKeys(key())
    return JwtVerifier(settings(**changes), source, clock=clock or ManualClock(), backend=backend)
