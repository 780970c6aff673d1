"""Verifies JSON Web Tokens as RFC 8725 wants it: what a client sent proves its claims, or nothing.

It protects from forged, altered, confused and expired tokens, and from tokens that break their reader: a strict parser
takes exactly one spelling of a token, the key and not the token decides the algorithm, and every claim has its type
checked before it is believed. It is *not* a session, and signs nothing; whether a token was revoked is asked by
:mod:`fastapi_hardening.security.auth.bearer`.

The signature itself is verified by python-jose with one prebuilt key, behind :class:`JoseBackend`, so that another
library can take over. Its ``jwt.decode`` never sees what a client sent.

Example:
    >>> import asyncio
    >>> from fastapi_hardening.security.auth.jwk import VerificationKey
    >>> from fastapi_hardening.security.auth.keys import StaticKeys
    >>> settings = JwtSettings(issuer="https://id.example", audience="orders", algorithms=["HS256"])
    >>> keys = StaticKeys(VerificationKey.from_secret(b"0123456789abcdef0123456789abcdef"))
    >>> asyncio.run(JwtVerifier(settings, keys).verify("eyJhbGciOiJub25lIn0.e30."))
    Traceback (most recent call last):
    ...
    fastapi_hardening.core.identity.InvalidCredentials: malformed
"""

import logging
from collections.abc import Callable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, Self
from weakref import WeakKeyDictionary

from pydantic import Field, field_validator, model_validator

from fastapi_hardening.core.clock import Clock, SystemClock
from fastapi_hardening.core.configuration import ConcernSettings, did_you_mean
from fastapi_hardening.core.identity import CredentialsUnchecked, InvalidCredentials
from fastapi_hardening.security.auth.jwk import ALGORITHMS, VerificationKey, decode_canonical, strict_object
from fastapi_hardening.security.auth.keys import KeySource

logger = logging.getLogger("fastapi_hardening.auth.jwt")

Claims = Mapping[str, Any]

_ALWAYS_REQUIRED = ("exp", "iss", "aud", "sub")
_LATEST_DATE = 253_402_300_799  # the end of the year 9999
_LONGEST_SUBJECT = 512
_LONGEST_TOKEN_ID = 256


class JwtSettings(ConcernSettings):
    """What the tokens of one issuer look like."""

    issuer: str = Field(min_length=1)
    """The ``iss`` of its tokens, compared character by character."""

    audience: tuple[str, ...] = Field(min_length=1)
    """What the ``aud`` of a token may name: this application, by the name that the issuer gives it."""

    algorithms: tuple[str, ...] = ("RS256", "ES256", "PS256", "EdDSA")
    """The allow list. Each key is bound to one of them; shared secrets (``HS256``) must be named to be allowed."""

    types: tuple[str, ...] = Field(("at+jwt", "JWT"), min_length=1)
    """The ``typ`` of its access tokens (RFC 9068). Name only ``at+jwt`` if the issuer sets it."""

    require_type: bool = True
    """Whether a token without ``typ`` is refused."""

    required_claims: tuple[str, ...] = ("exp", "iat", "iss", "aud", "sub")
    """What a token must say. ``exp``, ``iss``, ``aud`` and ``sub`` cannot be left out."""

    leeway_seconds: float = Field(30.0, ge=0, le=300)
    """How far the issuer's clock may differ from ours."""

    max_age_seconds: float | None = Field(86_400.0, gt=0)
    """So long after ``iat`` a token is too old, whatever its ``exp`` says; ``None`` for no such end."""

    max_token_bytes: int = Field(8192, ge=256, le=65_536)
    """Longer tokens are refused before anything of them is read."""

    scope_claims: tuple[str, ...] = ("scope", "scp")
    """Where scopes are: a string with spaces or a list; all that are there count."""

    role_claims: tuple[str, ...] = ("roles",)
    """Where roles are: a list, or a string with one role. A dotted path goes into objects: ``realm_access.roles``."""

    permission_claims: tuple[str, ...] = ("permissions",)
    """Where permissions are, as roles."""

    tenant_claim: str | None = None
    """Where the tenant is, such as ``tid`` or ``org_id``."""

    allow_thumbprints: bool = False
    """Whether the header may have ``x5t`` (Entra's v1 tokens, AD FS). It is never used to find a key."""

    allow_bound_tokens: bool = False
    """Whether a token that is bound to a key of its holder (``cnf``, RFC 7800) is taken without proof of that key."""

    @field_validator("algorithms")
    @classmethod
    def _are_known(cls, algorithms: tuple[str, ...]) -> tuple[str, ...]:
        if not algorithms:
            raise ValueError("at least one algorithm must be allowed")
        for algorithm in algorithms:
            if algorithm not in ALGORITHMS:
                raise ValueError(f"{algorithm!r} is no algorithm here{did_you_mean(algorithm, ALGORITHMS)}")
        return algorithms

    @field_validator("required_claims")
    @classmethod
    def _are_enough(cls, claims: tuple[str, ...]) -> tuple[str, ...]:
        missing = [name for name in _ALWAYS_REQUIRED if name not in claims]
        if missing:
            raise ValueError(f"{', '.join(missing)} cannot be left out")
        return claims

    @model_validator(mode="after")
    def _can_tell_the_age(self) -> Self:
        if self.max_age_seconds is not None and "iat" not in self.required_claims:
            raise ValueError("max_age_seconds counts from iat: require that claim, or set it to None")
        return self


# --- the parser -------------------------------------------------------------------------------------------------------

# Header members that carry or name a key, change what is signed, or belong to encryption (RFC 7515, 7516, 7518, 7797).
_THUMBPRINTS = frozenset({"x5t", "x5t#S256"})
_REFUSED_MEMBERS = frozenset(
    {"crit", "b64", "jku", "jwk", "x5u", "x5c", "zip", "enc", "p2c", "p2s", "epk", "apu", "apv", "iv", "tag", "cty"}
)


class CompactToken(NamedTuple):
    """The parts of a token that is well-formed; nothing in it is proven.

    Attributes:
        header: Its header.
        algorithm: What the header calls ``alg``.
        kid: The key it asks for.
        payload: The bytes of its payload.
        signing_input: What is signed.
        signature: The signature.
    """

    header: Mapping[str, Any]
    algorithm: str
    kid: str | None
    payload: bytes
    signing_input: bytes
    signature: bytes


def parse_compact(token: str | bytes, *, max_bytes: int = 8192, allow_thumbprints: bool = False) -> CompactToken:
    """Reads a signed token in compact form (RFC 7515, section 7.1), in its one canonical spelling.

    Args:
        token: What the client sent.
        max_bytes: The most that is read.
        allow_thumbprints: Whether ``x5t`` and ``x5t#S256`` may be in the header; they are ignored.

    Raises:
        InvalidCredentials: It is anything else: too long, encrypted, with other characters, with a header that is not
            strict JSON, or has members that are refused.
    """
    if len(token) > max_bytes:
        raise InvalidCredentials("too-large")
    if isinstance(token, bytes):
        token = token.decode("latin-1")
    parts = token.split(".", 3)
    if len(parts) != 3 or not parts[0] or not parts[2]:  # noqa: PLR2004 - header, payload, signature
        raise InvalidCredentials("malformed")
    first, second, third = parts
    try:
        payload, signature = decode_canonical(second), decode_canonical(third)
        head = decode_canonical(first)
    except ValueError:
        raise InvalidCredentials("malformed") from None
    header = _header(head)
    if not _THUMBPRINTS.isdisjoint(header) and not allow_thumbprints:
        raise InvalidCredentials("refused-header")
    signing_input = token[: -1 - len(third)].encode("ascii")
    return CompactToken(header, header["alg"], header.get("kid"), payload, signing_input, signature)


@lru_cache(maxsize=64)
def _header(data: bytes) -> Mapping[str, Any]:
    """A header that may be in a token. The tokens of an issuer have the same few, so the last ones are remembered."""
    header = _object_of(data, "header")
    if not _REFUSED_MEMBERS.isdisjoint(header):
        raise InvalidCredentials("refused-header")
    if not isinstance(header.get("alg"), str):
        raise InvalidCredentials("algorithm")
    kid = header.get("kid")
    if "kid" in header and not (isinstance(kid, str) and kid):
        raise InvalidCredentials("kid")
    if not isinstance(header.get("typ", ""), str):
        raise InvalidCredentials("type")
    return MappingProxyType(header)


def _object_of(data: bytes, reason: str) -> dict[str, Any]:
    try:
        return strict_object(data)
    except (ValueError, RecursionError):
        raise InvalidCredentials(reason) from None


def unverified_issuer(token: str | bytes, *, max_bytes: int = 8192, allow_thumbprints: bool = False) -> str:
    """Who a token says has issued it: good for choosing the verifier that must prove it, and for nothing else.

    Raises:
        InvalidCredentials: It is no token, or does not say.
    """
    parsed = parse_compact(token, max_bytes=max_bytes, allow_thumbprints=allow_thumbprints)
    issuer = _object_of(parsed.payload, "claims").get("iss")
    if not isinstance(issuer, str):
        raise InvalidCredentials("issuer")
    return issuer


# --- signatures -------------------------------------------------------------------------------------------------------

SignatureCheck = Callable[[bytes, bytes], bool]
"""Whether a signature, the second argument, is one of the first."""


class JoseBackend(Protocol):
    """The library that verifies signatures."""

    def prepare(self, key: VerificationKey) -> SignatureCheck:
        """What verifies with this key and its algorithm; called once for each key.

        The check may raise whatever it likes: that, too, is a signature that does not hold.
        """
        ...


class PythonJose:
    """python-jose, with the algorithms that it lacks (``PS*``, ``EdDSA``) straight from ``cryptography``."""

    def __init__(self) -> None:
        from jose import jwk  # type: ignore[import-untyped]  # noqa: PLC0415 - takes 170 ms, not always needed

        self._construct = jwk.construct

    def prepare(self, key: VerificationKey) -> SignatureCheck:
        """One prebuilt key of ``jose.jwk``, bound to one algorithm."""
        if key.algorithm.startswith("PS"):
            return _pss(key)
        if key.algorithm.startswith("Ed"):
            return _ed25519(key)
        check: SignatureCheck = self._construct(key.material, key.algorithm).verify
        return check


def _pss(key: VerificationKey) -> SignatureCheck:
    from cryptography.hazmat.primitives import hashes  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric import padding  # noqa: PLC0415

    kinds = {"PS256": hashes.SHA256(), "PS384": hashes.SHA384(), "PS512": hashes.SHA512()}
    chosen = kinds[key.algorithm]
    scheme = padding.PSS(padding.MGF1(chosen), chosen.digest_size)

    def check(signed: bytes, signature: bytes) -> bool:
        key.material.verify(signature, signed, scheme, chosen)
        return True

    return check


def _ed25519(key: VerificationKey) -> SignatureCheck:
    def check(signed: bytes, signature: bytes) -> bool:
        key.material.verify(signature, signed)
        return True

    return check


# --- the verifier -----------------------------------------------------------------------------------------------------


class VerifiedToken(NamedTuple):
    """A token that has proven what it says.

    Attributes:
        claims: What it says.
        key: The key that proved it.
        valid_until: When it stops being accepted, in seconds since the epoch, leeway included.
    """

    claims: Claims
    key: VerificationKey
    valid_until: float


class JwtVerifier:
    """Verifies the tokens of one issuer.

    Args:
        settings: What its tokens look like.
        keys: Where its keys are.
        clock: Where the time comes from.
        backend: What verifies signatures.
    """

    def __init__(
        self,
        settings: JwtSettings,
        keys: KeySource,
        *,
        clock: Clock | None = None,
        backend: JoseBackend | None = None,
    ) -> None:
        self.settings = settings
        self.keys = keys
        self._now = (clock or SystemClock()).time
        self._backend = backend or PythonJose()
        self._algorithms = frozenset(settings.algorithms)
        self._types = frozenset(_plain_type(name) for name in settings.types)
        self._audience = frozenset(settings.audience)
        self._checks: WeakKeyDictionary[VerificationKey, SignatureCheck] = WeakKeyDictionary()

    async def verify(self, token: str | bytes) -> VerifiedToken:
        """What a token has proven.

        Raises:
            InvalidCredentials: It proves nothing; the reason says why. Nothing else is raised, whatever was sent.
        """
        settings = self.settings
        parsed = parse_compact(token, max_bytes=settings.max_token_bytes, allow_thumbprints=settings.allow_thumbprints)
        self._check_type(parsed.header)
        key = await self.verify_signature(parsed)
        claims = _object_of(parsed.payload, "claims")
        return VerifiedToken(MappingProxyType(claims), key, self.check_claims(claims))

    async def verify_signature(self, token: CompactToken) -> VerificationKey:
        """The key that has signed a token; its claims are still to be checked.

        Raises:
            InvalidCredentials: The algorithm is not allowed, there is no such key, or the signature does not hold.
        """
        if token.algorithm not in self._algorithms:
            raise InvalidCredentials("algorithm")
        try:
            keys = await self.keys.find(token.kid, token.algorithm)
        except InvalidCredentials:
            raise
        except Exception:
            logger.exception("the source of keys for %s failed", self.settings.issuer)
            raise CredentialsUnchecked("keys-unavailable") from None
        found = False
        for key in keys:
            # The key decides, and not the source that has found it.
            if key.algorithm != token.algorithm or token.kid not in (None, key.kid):
                continue
            found = True
            if self._holds(key, token):
                return key
        raise InvalidCredentials("signature" if found else "unknown-key")

    def _holds(self, key: VerificationKey, token: CompactToken) -> bool:
        try:
            check = self._checks.get(key)
            if check is None:
                check = self._checks[key] = self._backend.prepare(key)
            return check(token.signing_input, token.signature) is True
        except Exception:  # noqa: BLE001 - whatever a library raises over a signature, it does not hold
            return False

    def _check_type(self, header: Mapping[str, Any]) -> None:
        name = header.get("typ")
        if name is None:
            if self.settings.require_type:
                raise InvalidCredentials("type")
        elif _plain_type(name) not in self._types:
            raise InvalidCredentials("type")

    def check_claims(self, claims: Claims) -> float:
        """Checks what a token says against the settings; RFC 7519, section 4.1, and RFC 9068, section 4.

        Returns:
            When the token stops being accepted, in seconds since the epoch.

        Raises:
            InvalidCredentials: A claim is missing, has the wrong type, or does not hold.
        """
        settings, now = self.settings, self._now()
        for name in settings.required_claims:
            if claims.get(name) is None:
                raise InvalidCredentials(f"missing-{name}")
        if _text(claims, "iss") != settings.issuer:
            raise InvalidCredentials("issuer")
        if self._audience.isdisjoint(_audience(claims["aud"])):
            raise InvalidCredentials("audience")
        _text(claims, "sub", _LONGEST_SUBJECT)
        if "jti" in claims:
            _text(claims, "jti", _LONGEST_TOKEN_ID)
        if "at_hash" in claims or "c_hash" in claims:
            raise InvalidCredentials("id-token")
        if "cnf" in claims and not settings.allow_bound_tokens:
            raise InvalidCredentials("bound-token")
        return self._check_times(claims, now)

    def _check_times(self, claims: Claims, now: float) -> float:
        leeway = self.settings.leeway_seconds
        ends = _date(claims, "exp") + leeway
        if now >= ends:
            raise InvalidCredentials("expired")
        if "nbf" in claims and now < _date(claims, "nbf") - leeway:
            raise InvalidCredentials("not-yet-valid")
        if "iat" in claims:
            issued = _date(claims, "iat")
            if now < issued - leeway:
                raise InvalidCredentials("issued-in-the-future")
            if self.settings.max_age_seconds is not None:
                too_old = issued + self.settings.max_age_seconds + leeway
                if now >= too_old:
                    raise InvalidCredentials("too-old")
                ends = min(ends, too_old)
        return ends


def _plain_type(name: str) -> str:
    """A media type as RFC 7515, section 4.1.9, compares it."""
    return name.lower().removeprefix("application/")


def _text(claims: Claims, name: str, longest: int | None = None) -> str:
    value = claims[name]
    if not isinstance(value, str) or not value or not value.isprintable():
        raise InvalidCredentials(f"bad-{name}")
    if longest is not None and len(value) > longest:
        raise InvalidCredentials(f"bad-{name}")
    return value


def _audience(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise InvalidCredentials("bad-aud")
    return value


def _date(claims: Claims, name: str) -> float:
    """A NumericDate: seconds since the epoch, as a number (RFC 7519, section 2)."""
    value = claims[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= _LATEST_DATE:
        raise InvalidCredentials(f"bad-{name}")
    return value


# --- what claims say of the caller ------------------------------------------------------------------------------------


def claim_at(claims: Claims, path: str) -> Any:
    """The claim at a dotted path, such as ``realm_access.roles``; ``None`` where there is none.

    A claim whose own name has dots (``https://shop.example/roles``) is found by its name first.
    """
    if path in claims:
        return claims[path]
    position = path.find(".")
    while position > 0:
        inner = claims.get(path[:position])
        if isinstance(inner, Mapping):
            found = claim_at(inner, path[position + 1 :])
            if found is not None:
                return found
        position = path.find(".", position + 1)
    return None


def names_at(claims: Claims, paths: tuple[str, ...], *, split: bool = False) -> frozenset[str]:
    """The names in a string or in lists of strings, at all of these paths together.

    Args:
        claims: What a token says.
        paths: Where to look.
        split: Whether a string has several names, with spaces between them, as scopes do.

    Raises:
        InvalidCredentials: Something else is there.
    """
    names: set[str] = set()
    for path in paths:
        value = claim_at(claims, path)
        if value is None:
            continue
        if isinstance(value, str):
            names.update(value.split() if split else [value])
        elif isinstance(value, list) and all(isinstance(name, str) for name in value):
            names.update(value)
        else:
            raise InvalidCredentials(f"bad-{path}")
    return frozenset(names)
