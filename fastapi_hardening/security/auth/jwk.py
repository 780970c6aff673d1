"""Keys that verify signatures, read strictly: from JSON Web Keys (RFC 7517), PEM, and shared secrets.

It protects from the keys that make a signature worthless: too short, weak by construction (ROCA), off their curve,
meant for encryption, published although they are secret, or usable with an algorithm that their owner never chose.
Every key is bound to *one* algorithm (RFC 8725, section 3.1); whatever a token says, no other is ever tried with it.

It is *not* a store of keys (see :mod:`fastapi_hardening.security.auth.keys`), and nothing here signs.

Example:
    >>> key = VerificationKey.from_secret(b"a secret of at least 32 bytes ..", "HS256", kid="2026-11")
    >>> KeySet([key]).find("2026-11", "HS256") == (key,), KeySet([key]).find("2026-11", "HS512")
    (True, ())
    >>> VerificationKey.from_jwk({"kty": "oct", "k": "dG9vIHNob3J0"}, algorithms=["HS256"])
    Traceback (most recent call last):
    ...
    fastapi_hardening.security.auth.jwk.InvalidKey: an HS256 secret has at least 32 bytes, not 9
"""

import hashlib
import hmac
import json
import math
import re
from base64 import urlsafe_b64decode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Self

from pydantic import SecretStr

from fastapi_hardening.core.configuration import ConfigurationError

# The algorithms of RFC 7518, RFC 8037 and RFC 9864 that are safe to verify with, by the kind of key they take.
HMAC_BYTES: Mapping[str, int] = {"HS256": 32, "HS384": 48, "HS512": 64}
CURVES: Mapping[str, tuple[str, int]] = {"ES256": ("P-256", 32), "ES384": ("P-384", 48), "ES512": ("P-521", 66)}
RSA_ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
ED25519_ALGORITHMS = ("EdDSA", "Ed25519")
ALGORITHMS = (*HMAC_BYTES, *RSA_ALGORITHMS, *CURVES, *ED25519_ALGORITHMS)
ASYMMETRIC = (*RSA_ALGORITHMS, *CURVES, *ED25519_ALGORITHMS)

MIN_RSA_BITS = 2048
MAX_RSA_BITS = 8192
MIN_RSA_EXPONENT = 65537  # FIPS 186-5, section A.1.1
MAX_RSA_EXPONENT_BITS = 64
MAX_KEYS = 100
MAX_JSON_DEPTH = 32
MAX_INTEGER_DIGITS = 20
MAX_KID_CHARACTERS = 256

_PRIVATE_MEMBERS = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth"})
_OTHER_MATERIAL = ("-----BEGIN", "ssh-rsa ", "ssh-ed25519 ", "ecdsa-sha2-")


class InvalidKey(ConfigurationError):  # noqa: N818 - named as the other mistakes in credentials are
    """A key, or a set of keys, that must not verify anything.

    Args:
        reason: Why, for logs and machines, such as ``weak-rsa``.
        message: The same for people. Never has key material in it.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


# --- JSON and base64url, strictly -------------------------------------------------------------------------------------

_ALPHABET = re.compile(r"[A-Za-z0-9_-]*")
# By the number of characters over whole groups of four: which may be last, so that the unused bits are zero and there
# is one spelling of every value; and the padding that the decoder wants.
_LAST = ("", None, "AQgw", "AEIMQUYcgkosw048")
_PADDING = ("", "", "==", "=")


def decode_canonical(text: str) -> bytes:
    """The bytes of canonical base64url (RFC 7515, section 2): no padding, no other characters, no unused bits set.

    Raises:
        ValueError: It is not.
    """
    rest = len(text) & 3
    last = _LAST[rest]
    if last is None or (last and text[-1] not in last) or _ALPHABET.fullmatch(text) is None:
        raise ValueError("not canonical base64url")
    return urlsafe_b64decode(text + _PADDING[rest])


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member is there twice")
    return members


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _integer(digits: str) -> int:
    if len(digits) > MAX_INTEGER_DIGITS:
        raise ValueError("an integer is too long")
    return int(digits)


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number is too large")
    return number


_DECODER = json.JSONDecoder(
    object_pairs_hook=_no_duplicates, parse_constant=_no_constant, parse_int=_integer, parse_float=_number
)
_IN_STRINGS = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)


def strict_object(data: bytes | str) -> dict[str, Any]:
    """A JSON object (RFC 8259), as every reader understands it alike.

    Refused are invalid UTF-8, lone surrogates, members that are there twice, ``NaN`` and ``Infinity``, numbers that no
    double can hold, and nesting deeper than 32.

    Raises:
        ValueError: It is none.
    """
    text = data.decode("utf-8") if isinstance(data, bytes) else data
    if text.count("[") + text.count("{") > MAX_JSON_DEPTH:
        _check_depth(text)
    value = _DECODER.decode(text)
    if not isinstance(value, dict):
        raise ValueError("not an object")  # noqa: TRY004 - one kind of error for one kind of mistake
    if "\\u" in text:
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # a lone surrogate cannot be encoded
    return value


def _check_depth(text: str) -> None:
    depth = 0
    for character in _IN_STRINGS.sub("", text):
        if character in "[{":
            depth += 1
            if depth > MAX_JSON_DEPTH:
                raise ValueError("nested too deeply")
        elif character in "]}":
            depth -= 1


# --- one key ----------------------------------------------------------------------------------------------------------


def kid_of_secret(secret: bytes) -> str:
    """The name that follows from a shared secret without giving it away, as our own issuer writes it into tokens."""
    return hmac.new(secret, b"kid", hashlib.sha256).hexdigest()[:16]


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class VerificationKey:
    """A key, and the one algorithm that it verifies.

    Attributes:
        algorithm: The ``alg`` of the tokens it verifies, exactly as they write it.
        material: The secret as bytes, or a public key of ``cryptography``.
        kid: Its name, by which tokens ask for it.

    Raises:
        InvalidKey: The material is too weak, or does not fit the algorithm.
    """

    algorithm: str
    material: Any = field(repr=False)
    kid: str | None = None

    def __post_init__(self) -> None:
        if self.kid is not None and not 0 < len(self.kid) <= MAX_KID_CHARACTERS:
            raise InvalidKey("kid", f"a kid has 1 to {MAX_KID_CHARACTERS} characters")
        if self.algorithm in HMAC_BYTES:
            _check_secret(self.algorithm, self.material)
        elif self.algorithm in ASYMMETRIC:
            _check_public(self.algorithm, self.material)
        else:
            raise InvalidKey("algorithm", f"{self.algorithm!r} is no algorithm here; known are {', '.join(ALGORITHMS)}")

    @property
    def is_symmetric(self) -> bool:
        """Whether who verifies could sign as well."""
        return self.algorithm in HMAC_BYTES

    @classmethod
    def from_secret(cls, secret: SecretStr | str | bytes, algorithm: str = "HS256", *, kid: str | None = None) -> Self:
        """A secret that is shared with the issuer.

        Raises:
            InvalidKey: It is shorter than the hash of the algorithm, or the text of a public key.
        """
        if isinstance(secret, SecretStr):
            secret = secret.get_secret_value()
        if isinstance(secret, str):
            secret = secret.encode("utf-8")
        if algorithm not in HMAC_BYTES:
            raise InvalidKey("algorithm", f"a shared secret is for {', '.join(HMAC_BYTES)}, not for {algorithm}")
        return cls(algorithm, secret, kid)

    @classmethod
    def from_pem(cls, pem: str | bytes, algorithm: str, *, kid: str | None = None) -> Self:
        """A public key in PEM (RFC 7468).

        Raises:
            InvalidKey: It cannot be read, is private, is too weak, or does not fit the algorithm.
        """
        from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415 - slow to import, not always needed
        from cryptography.hazmat.primitives.serialization import load_pem_public_key  # noqa: PLC0415

        data = pem.encode("utf-8") if isinstance(pem, str) else pem
        if b"PRIVATE KEY-----" in data:
            raise InvalidKey(
                "private-key", "this is a private key; give the public one, made by `openssl pkey -in key.pem -pubout`"
            )
        try:
            material = load_pem_public_key(data)
        except (ValueError, UnsupportedAlgorithm):
            raise InvalidKey("pem", "this is no public key in PEM (-----BEGIN PUBLIC KEY-----)") from None
        return cls(algorithm, material, kid)

    @classmethod
    def from_jwk(cls, jwk: Mapping[str, Any] | str | bytes, *, algorithms: Sequence[str] = ASYMMETRIC) -> Self:
        """A JSON Web Key.

        A key without ``alg`` is bound to the first of ``algorithms`` that fits its kind and curve.

        Args:
            jwk: The key, as JSON or as what JSON gives.
            algorithms: Those that may be used.

        Raises:
            InvalidKey: It is no JWK, is private, is not for verifying signatures, or too weak, or none of the
                algorithms is for it.
        """
        if isinstance(jwk, (str, bytes)):
            jwk = _object(jwk)
        kid = jwk.get("kid")
        if kid is not None and not isinstance(kid, str):
            raise InvalidKey("kid", "the kid of a JWK is a string")
        _check_purpose(jwk)
        kind = jwk.get("kty")
        reader = _READERS.get(kind) if isinstance(kind, str) else None
        if reader is None:
            raise InvalidKey("kty", "the kty of a JWK is RSA, EC, OKP or oct")
        if kind != "oct" and "k" in jwk:
            raise InvalidKey("private-key", f"a key of kind {kind} has no member k")
        if not _PRIVATE_MEMBERS.isdisjoint(jwk):
            raise InvalidKey("private-key", "this JWK has private members; publish, and configure, its public part")
        material = reader(jwk)
        return cls(_algorithm_of(jwk, algorithms), material, kid)


def _object(data: str | bytes) -> dict[str, Any]:
    try:
        return strict_object(data)
    except ValueError as error:
        raise InvalidKey("json", f"this is no JSON object that can be trusted: {error}") from None


def _check_purpose(jwk: Mapping[str, Any]) -> None:
    if "use" in jwk and jwk["use"] != "sig":
        raise InvalidKey("use", 'the use of a JWK that verifies signatures is "sig"')
    operations = jwk.get("key_ops")
    if "key_ops" not in jwk:
        return
    if not isinstance(operations, list) or not all(isinstance(operation, str) for operation in operations):
        raise InvalidKey("key_ops", "the key_ops of a JWK are a list of strings")
    if "verify" not in operations or not {"sign", "verify"}.issuperset(operations):
        raise InvalidKey("key_ops", 'the key_ops of a JWK that verifies signatures are ["verify"]')
    if len(set(operations)) != len(operations):
        raise InvalidKey("key_ops", "the key_ops of a JWK name nothing twice")


def _algorithm_of(jwk: Mapping[str, Any], algorithms: Sequence[str]) -> str:
    kind, curve = jwk["kty"], jwk.get("crv")
    if kind == "oct":
        fitting: Iterable[str] = HMAC_BYTES
    elif kind == "RSA":
        fitting = RSA_ALGORITHMS
    elif kind == "EC":
        fitting = (algorithm for algorithm, (name, _) in CURVES.items() if name == curve)
    else:
        fitting = ED25519_ALGORITHMS if curve == "Ed25519" else ()
    fitting = set(fitting)
    if "alg" in jwk:
        algorithm = jwk["alg"]
        if not isinstance(algorithm, str) or algorithm not in fitting:
            raise InvalidKey("alg", "the alg of the JWK does not fit its kty and crv")
        if algorithm not in algorithms:
            raise InvalidKey("algorithm-not-allowed", f"{algorithm} is not among the allowed algorithms")
        return algorithm
    allowed = next((algorithm for algorithm in algorithms if algorithm in fitting), None)
    if allowed is None:
        raise InvalidKey("algorithm-not-allowed", "none of the allowed algorithms is for a key of this kind and curve")
    return allowed


def _bytes(jwk: Mapping[str, Any], name: str, length: int | None = None) -> bytes:
    text = jwk.get(name)
    try:
        value = decode_canonical(text) if isinstance(text, str) else b""
    except ValueError:
        value = b""
    if not value or (length is not None and len(value) != length):
        raise InvalidKey("encoding", f"the member {name} of the JWK is missing or not in canonical base64url")
    return value


def _integer_of(jwk: Mapping[str, Any], name: str) -> int:
    octets = _bytes(jwk, name)
    if octets[0] == 0 and len(octets) > 1:
        raise InvalidKey("encoding", f"the member {name} of the JWK has leading zeros (RFC 7518, section 2)")
    return int.from_bytes(octets, "big")


def _read_secret(jwk: Mapping[str, Any]) -> bytes:
    return _bytes(jwk, "k")


def _read_rsa(jwk: Mapping[str, Any]) -> Any:
    from cryptography.hazmat.primitives.asymmetric import rsa  # noqa: PLC0415 - slow to import, not always needed

    n, e = _integer_of(jwk, "n"), _integer_of(jwk, "e")
    _check_rsa(n, e)
    return rsa.RSAPublicNumbers(e, n).public_key()


def _read_ec(jwk: Mapping[str, Any]) -> Any:
    from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415

    curves: dict[Any, tuple[ec.EllipticCurve, int]] = {
        "P-256": (ec.SECP256R1(), 32),
        "P-384": (ec.SECP384R1(), 48),
        "P-521": (ec.SECP521R1(), 66),
    }
    name = jwk.get("crv")
    if not isinstance(name, str) or name not in curves:
        raise InvalidKey("crv", f"the crv of an EC key is one of {', '.join(curves)}")
    curve, length = curves[name]
    x, y = (int.from_bytes(_bytes(jwk, member, length), "big") for member in ("x", "y"))
    try:
        return ec.EllipticCurvePublicNumbers(x, y, curve).public_key()
    except ValueError:
        raise InvalidKey("point", f"the point of the EC key is not on {name}") from None


def _read_okp(jwk: Mapping[str, Any]) -> Any:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey  # noqa: PLC0415

    if jwk.get("crv") != "Ed25519":
        raise InvalidKey("crv", "the crv of an OKP key is Ed25519")
    return Ed25519PublicKey.from_public_bytes(_bytes(jwk, "x", 32))


_READERS: Mapping[str, Any] = {"RSA": _read_rsa, "EC": _read_ec, "OKP": _read_okp, "oct": _read_secret}


# --- strength ---------------------------------------------------------------------------------------------------------


def _check_secret(algorithm: str, secret: Any) -> None:
    if not isinstance(secret, bytes):
        raise InvalidKey("kty", f"{algorithm} needs a shared secret, not a public key")
    if secret.lstrip().startswith(tuple(prefix.encode("ascii") for prefix in _OTHER_MATERIAL)):
        raise InvalidKey("public-key-as-secret", "this is the text of a key file; everybody who has it could sign")
    if len(secret) < HMAC_BYTES[algorithm]:
        raise InvalidKey(
            "short-secret", f"an {algorithm} secret has at least {HMAC_BYTES[algorithm]} bytes, not {len(secret)}"
        )


def _check_public(algorithm: str, material: Any) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa  # noqa: PLC0415

    if algorithm in RSA_ALGORITHMS and isinstance(material, rsa.RSAPublicKey):
        numbers = material.public_numbers()
        _check_rsa(numbers.n, numbers.e)
    elif algorithm in CURVES and isinstance(material, ec.EllipticCurvePublicKey):
        names = {"P-256": "secp256r1", "P-384": "secp384r1", "P-521": "secp521r1"}
        if material.curve.name != names[CURVES[algorithm][0]]:
            raise InvalidKey("crv", f"{algorithm} needs a key on {CURVES[algorithm][0]}, not on {material.curve.name}")
    elif not (algorithm in ED25519_ALGORITHMS and isinstance(material, ed25519.Ed25519PublicKey)):
        raise InvalidKey("kty", f"this is no public key for {algorithm}")


def _check_rsa(n: int, e: int) -> None:
    if not MIN_RSA_BITS <= n.bit_length() <= MAX_RSA_BITS:
        raise InvalidKey("weak-rsa", f"an RSA key has {MIN_RSA_BITS} to {MAX_RSA_BITS} bits, not {n.bit_length()}")
    if e < MIN_RSA_EXPONENT or e % 2 == 0 or e.bit_length() > MAX_RSA_EXPONENT_BITS:
        raise InvalidKey("rsa-exponent", "the exponent of an RSA key is odd and at least 65537")
    if any(n % prime == 0 for prime in (2, *_prints())):
        raise InvalidKey("weak-rsa", "the modulus of the RSA key has a small factor")
    if is_roca(n):
        raise InvalidKey("roca", "the RSA key comes from a generator that can be broken (CVE-2017-15361)")


@cache
def _prints() -> dict[int, frozenset[int]]:
    """The powers of 65537 by each odd prime up to 167."""
    primes = [p for p in range(3, 168, 2) if all(p % divisor for divisor in range(3, math.isqrt(p) + 1, 2))]
    return {prime: frozenset(pow(65537, power, prime) for power in range(prime - 1)) for prime in primes}


def is_roca(modulus: int) -> bool:
    """Whether an RSA modulus has the fingerprint of Infineon's library.

    Its primes are ``k * M + 65537**a mod M`` with M a product of small primes, so the modulus is a power of 65537 by
    each of them; of other moduli one in 2**27 is. Nemec et al., "The Return of Coppersmith's Attack" (CCS 2017).
    """
    return all(modulus % prime in powers for prime, powers in _prints().items())


# --- sets of keys -----------------------------------------------------------------------------------------------------


class KeySet:
    """Some keys that are valid at the same time, looked up by their exact name.

    Args:
        keys: The keys.
        refused: Keys that were there and are not used: their ``kid``, and why.

    Raises:
        InvalidKey: There is none; two have one name; or some are secrets and others public keys.
    """

    def __init__(self, keys: Iterable[VerificationKey], *, refused: Iterable[tuple[str | None, str]] = ()) -> None:
        self.keys = tuple(keys)
        self.refused = tuple(refused)
        if not self.keys:
            because = f": {', '.join(sorted({reason for _, reason in self.refused}))}" if self.refused else ""
            raise InvalidKey("no-key", f"there is no key that can be used{because}")
        named = [key.kid for key in self.keys if key.kid is not None]
        if len(set(named)) != len(named):
            raise InvalidKey("duplicate-kid", "two keys of a set have one kid")
        if len({key.is_symmetric for key in self.keys}) != 1:
            raise InvalidKey("mixed-set", "a set has shared secrets or public keys, never both")
        self._by_kid = {key.kid: key for key in self.keys if key.kid is not None}

    def find(self, kid: str | None, algorithm: str) -> tuple[VerificationKey, ...]:
        """The keys that a token may be verified with.

        With a ``kid`` it is the key of exactly this name, if it is bound to the algorithm. Without one it is the keys
        that have no name either, else the only key of the algorithm; where several could be meant, none is.
        """
        if kid is not None:
            key = self._by_kid.get(kid)
            return () if key is None or key.algorithm != algorithm else (key,)
        fitting = tuple(key for key in self.keys if key.algorithm == algorithm)
        unnamed = tuple(key for key in fitting if key.kid is None)
        return unnamed or (fitting if len(fitting) == 1 else ())

    @classmethod
    def from_jwks(
        cls, data: Mapping[str, Any] | str | bytes, *, algorithms: Sequence[str] = ASYMMETRIC, public: bool = False
    ) -> Self:
        """A JWK set (RFC 7517, section 5).

        A key that cannot be used (for encryption, of an unknown kind, too weak) is left out and named in ``refused``,
        because providers publish such keys beside the good ones. What makes the set itself doubtful refuses it whole.

        Args:
            data: The set, as JSON or as what JSON gives.
            algorithms: Those that may be used.
            public: Whether everybody can read the set; a shared secret in it is then a leaked one.

        Raises:
            InvalidKey: It is no JWK set; it has too many keys; two have one ``kid``; it has shared secrets beside
                public keys, or in a public place; or no key can be used.
        """
        document = _object(data) if isinstance(data, (str, bytes)) else data
        members = document.get("keys")
        if not isinstance(members, list) or not all(isinstance(member, Mapping) for member in members):
            raise InvalidKey("jwks", 'a JWK set is an object with a list of keys under "keys"')
        if len(members) > MAX_KEYS:
            raise InvalidKey("jwks", f"a JWK set has at most {MAX_KEYS} keys here, not {len(members)}")
        kids = [member["kid"] for member in members if isinstance(member.get("kid"), str)]
        if len(set(kids)) != len(kids):
            raise InvalidKey("duplicate-kid", "two keys of a set have one kid")
        secrets = sum(member.get("kty") == "oct" for member in members)
        if secrets and public:
            raise InvalidKey("public-secret", "a shared secret is published in a JWK set")
        if secrets not in (0, len(members)):
            raise InvalidKey("mixed-set", "a set has shared secrets or public keys, never both")
        keys, refused = [], []
        for member in members:
            try:
                keys.append(VerificationKey.from_jwk(member, algorithms=algorithms))
            except InvalidKey as error:
                kid = member.get("kid")
                refused.append((kid if isinstance(kid, str) else None, error.reason))
        return cls(keys, refused=refused)
