"""Tokens of our own: short access tokens that anybody with the key can check, and refresh tokens that work once.

An access token is a JWT by RFC 9068 (``at+jwt``), signed through python-jose by one key with its ``kid``. It lives for
minutes, because nothing but a revocation list takes it back. A refresh token is 256 random bits; the store has only its
digest. Each use replaces it, and all that came from one login are one family (RFC 9700, section 4.14.2): when one comes
a second time, either the client or a thief is a step behind, nobody can tell which, so the whole family ends.

How a token is used only once, on a store that knows ``get``, ``put``, ``add`` and ``delete``:

* ``family:F`` is written once, at the login, and deleted to revoke. No refresh writes it, so deleting it is final, and
  needs no room.
* ``token:T`` is there while token T is good. A refresh claims T by ``add("used:T")``, which one of any number wins; the
  winner stores the successor and deletes ``token:T``. A token of a living family without its record was used before.
* ``subject:S`` changes when everything of a subject is revoked; a family remembers what it was at its login.

A store that fails, or has no room, lets nobody in: nothing is issued. It is *not* an authorization server: no consent,
no redirects. It does not verify access tokens; the bearer authenticator does.

Example:
    >>> import asyncio
    >>> from fastapi_hardening.core.store import MemoryStore
    >>> settings = IssuerSettings(issuer="https://shop.example", audience="https://api.shop.example")
    >>> issuer = TokenIssuer(settings, keys=SigningKey(secrets.token_bytes(32), "HS256"), store=MemoryStore())
    >>> async def log_in_and_refresh() -> tuple[int, bool]:
    ...     first = await issuer.issue("anna", client_id="shop-app", scope={"orders:read"})
    ...     second = await issuer.refresh(first.refresh_token, client_id="shop-app")
    ...     return second.expires_in, second.refresh_token != first.refresh_token
    >>> asyncio.run(log_in_and_refresh())
    (600, True)
"""

import base64
import hashlib
import hmac
import json
import logging
import re
import secrets
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from jose import jwk, jws  # type: ignore[import-untyped]
from pydantic import Field, SecretStr, model_validator

from fastapi_hardening.core.clock import Clock, SystemClock
from fastapi_hardening.core.configuration import Section
from fastapi_hardening.core.events import Events
from fastapi_hardening.core.identity import CredentialsUnchecked
from fastapi_hardening.core.store import StateStore
from fastapi_hardening.security.auth.jwk import kid_of_secret

logger = logging.getLogger("fastapi_hardening.auth")

Algorithm = Literal["HS256", "RS256", "ES256"]

PREFIX = "fhr_"
"""What a refresh token begins with, so that scanners for leaked secrets know it."""

_FAMILY_BYTES = 16
_SECRET_BYTES = 32
_TOKEN = re.compile(PREFIX + r"[A-Za-z0-9_-]{64}")
_KID = re.compile(r"[A-Za-z0-9._~-]{1,64}")
_SHORTEST_SECRET = 32
_SMALLEST_RSA = 2048

# A claim on a token is kept for so long after its use; by then the record of the token is gone. A refresh that took
# half of it, because its process stood still, gives up.
_USED_SECONDS = 600.0
# Clocks of hosts differ, and a verifier may allow some leeway.
_MARGIN_SECONDS = 120.0

_RESERVED = frozenset({"iss", "sub", "aud", "exp", "nbf", "iat", "jti", "client_id", "scope", "cnf"})


class IssuerSettings(Section):
    """Who issues, for whom, and for how long."""

    issuer: str = Field(min_length=1)
    """Who issues the tokens (``iss``): the https address of this application."""

    audience: str = Field(min_length=1)
    """For whom they are (``aud``): the name of the API, usually its https address."""

    access_ttl_seconds: int = Field(600, ge=1, le=86_400)
    """How long an access token is good."""

    refresh_idle_seconds: int = Field(14 * 86_400, ge=1)
    """How long a refresh token is good that is not used."""

    family_seconds: int = Field(30 * 86_400, ge=1)
    """How long a login lasts, however often it is refreshed."""

    reuse_grace_seconds: float = Field(0.0, ge=0, le=60)
    """How long a used refresh token is answered with the same successor; above 0 a thief has that long unnoticed."""

    @model_validator(mode="after")
    def _fits(self) -> "IssuerSettings":
        if self.refresh_idle_seconds > self.family_seconds:
            raise ValueError("refresh_idle_seconds is above family_seconds: no token outlives its family")
        return self


# --- keys -------------------------------------------------------------------------------------------------------------


class SigningKey:
    """A key that signs by one algorithm.

    Args:
        key: For ``HS256`` a secret of at least 32 bytes; for ``RS256`` and ``ES256`` a private key as PEM, not
            encrypted.
        algorithm: ``ES256`` is small and fast; ``HS256`` serves where the issuer is the only one who verifies.
        kid: The name of the key in tokens and key sets; by default its thumbprint (RFC 7638), or for a secret one that
            follows from it without giving it away.

    Raises:
        ValueError: The key is too weak, of another kind, or cannot be read; the message never has the key in it.

    Example:
        >>> SigningKey("0123456789abcdef0123456789abcdef", "HS256", kid="2026-11")
        SigningKey(kid='2026-11', algorithm='HS256')
    """

    def __init__(self, key: SecretStr | str | bytes, algorithm: Algorithm, *, kid: str | None = None) -> None:
        text = key.get_secret_value() if isinstance(key, SecretStr) else key
        material = text.encode() if isinstance(text, str) else text
        self.algorithm: Algorithm = algorithm
        if algorithm == "HS256":
            self._signer = jwk.construct(_strong_secret(material), algorithm)
            derived = kid_of_secret(material)
            verifying = self._signer.to_dict()
        elif algorithm in ("RS256", "ES256"):
            self._signer = jwk.construct(_private_key(material, algorithm), algorithm)
            verifying = self._signer.public_key().to_dict()
            derived = _thumbprint(verifying)
        else:
            raise ValueError(f"{algorithm!r} is not HS256, RS256 or ES256")
        self.kid = derived if kid is None else kid
        if not _KID.fullmatch(self.kid):
            raise ValueError(f"{kid!r} is no kid: up to 64 letters, digits, '.', '_', '~' and '-'")
        self._verifying: dict[str, str] = verifying | {"kid": self.kid, "use": "sig", "alg": algorithm}

    def __repr__(self) -> str:
        return f"SigningKey(kid={self.kid!r}, algorithm={self.algorithm!r})"

    @property
    def symmetric(self) -> bool:
        """Whether who can verify can also sign."""
        return self.algorithm == "HS256"

    def verifying_jwk(self) -> dict[str, str]:
        """The key that verifies, as a JWK (RFC 7517). That of a secret *is* the secret."""
        return dict(self._verifying)

    def sign(self, claims: Mapping[str, Any]) -> str:
        """The claims as an access token (RFC 9068)."""
        token: str = jws.sign(dict(claims), self._signer, {"typ": "at+jwt", "kid": self.kid}, self.algorithm)
        return token


def _strong_secret(material: bytes) -> bytes:
    if material.lstrip().startswith(b"-----BEGIN"):
        raise ValueError("this is a PEM, and HS256 takes a secret; a private key signs by RS256 or ES256")
    if len(material) < _SHORTEST_SECRET:
        raise ValueError("a secret for HS256 has at least 32 bytes; `openssl rand -hex 32` makes one")
    return material


def _private_key(material: bytes, algorithm: str) -> Any:
    try:
        private = load_pem_private_key(material, password=None)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{algorithm} takes a private key as PEM, not encrypted; this is none") from error
    if algorithm == "RS256":
        if not isinstance(private, rsa.RSAPrivateKey):
            raise ValueError("RS256 takes an RSA key")
        if private.key_size < _SMALLEST_RSA:
            raise ValueError(f"an RSA key has at least {_SMALLEST_RSA} bits, this one has {private.key_size}")
    elif not isinstance(private, ec.EllipticCurvePrivateKey) or not isinstance(private.curve, ec.SECP256R1):
        raise ValueError("ES256 takes a key on the curve P-256")
    return private


def _thumbprint(public: Mapping[str, str]) -> str:
    """The name that follows from a public key (RFC 7638)."""
    members = ("e", "kty", "n") if public["kty"] == "RSA" else ("crv", "kty", "x", "y")
    text = json.dumps({member: public[member] for member in members}, separators=(",", ":"), sort_keys=True)
    return _base64url(hashlib.sha256(text.encode()).digest())


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


# --- errors and events ------------------------------------------------------------------------------------------------


class InvalidGrant(Exception):  # noqa: N818 - named by what happened, as in RFC 6749
    """A refresh token is not, or no longer, good for the client that sent it.

    Args:
        reason: Why, for the log; the client is told only ``invalid_grant``.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class InvalidScope(Exception):  # noqa: N818
    """A refresh asks for a scope that the login did not give."""


@dataclass(frozen=True, slots=True)
class TokensIssued:
    """A login or a refresh was answered with tokens.

    Attributes:
        subject: Whose they are.
        client_id: Who got them.
        jti: The id of the access token.
        family: The family of the refresh token; ``None`` where there is none.
        refreshed: Whether a refresh token was used for it.
    """

    subject: str
    client_id: str
    jti: str
    family: str | None
    refreshed: bool


@dataclass(frozen=True, slots=True)
class RefreshTokenReused:
    """A refresh token came a second time: it was stolen, or its client does not keep what it is given."""

    subject: str
    client_id: str
    family: str


@dataclass(frozen=True, slots=True)
class FamilyRevoked:
    """All refresh tokens of one login have ended before their time.

    Attributes:
        subject: Whose they were.
        client_id: Who had them.
        family: Which family.
        reason: ``reused``, ``revoked`` or ``no longer allowed``.
    """

    subject: str
    client_id: str
    family: str
    reason: str


@dataclass(frozen=True, slots=True)
class SubjectRevoked:
    """All refresh tokens of a subject have ended."""

    subject: str


# --- engine -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class IssuedTokens:
    """What a client is given.

    Attributes:
        access_token: The JWT.
        expires_in: Its lifetime in seconds.
        scope: What it may be used for.
        jti: Its id.
        refresh_token: For the next time; ``None`` where there is none.
        family: The family of the refresh token, as events and :meth:`TokenIssuer.revoke_family` name it.
    """

    access_token: str = field(repr=False)
    expires_in: int
    scope: frozenset[str]
    jti: str
    refresh_token: str | None = field(default=None, repr=False)
    family: str | None = None


class _Grant(NamedTuple):
    """What a family was given at its login."""

    subject: str
    client_id: str
    scope: list[str]
    ends_at: float
    generation: str
    claims: dict[str, Any]


class _RefreshToken(NamedTuple):
    """A refresh token, read: the random name of its family, and its own secret."""

    family_name: bytes
    secret: bytes

    @classmethod
    def read(cls, text: str) -> "_RefreshToken | None":
        if not _TOKEN.fullmatch(text):
            return None
        data = base64.urlsafe_b64decode(text.removeprefix(PREFIX))
        return cls(data[:_FAMILY_BYTES], data[_FAMILY_BYTES:])

    @property
    def text(self) -> str:
        return PREFIX + _base64url(self.family_name + self.secret)

    @property
    def family(self) -> str:
        return hashlib.sha256(self.family_name).hexdigest()[:32]

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.family_name + self.secret).hexdigest()

    def successor(self, nonce: bytes) -> "_RefreshToken":
        """The next one: as unknown as the nonce to who has this token, and as this token to who has the store."""
        return self._replace(secret=hmac.new(self.secret, nonce, hashlib.sha256).digest())


@contextmanager
def _failing_closed() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise CredentialsUnchecked("the state store does not answer") from error


class _Records:
    """The store as JSON; whatever goes wrong with it is one exception."""

    def __init__(self, store: StateStore) -> None:
        self._store = store

    async def get(self, key: str) -> Any:
        with _failing_closed():
            value = await self._store.get("auth:" + key)
            return None if value is None else json.loads(value)

    async def put(self, key: str, value: Any, ttl_seconds: float) -> None:
        data = json.dumps(value).encode()
        with _failing_closed():
            if await self._store.put("auth:" + key, data, ttl_seconds):
                return
        raise CredentialsUnchecked("the state store has no room")

    async def add(self, key: str, value: Any, ttl_seconds: float) -> bool:
        data = json.dumps(value).encode()
        with _failing_closed():
            return await self._store.add("auth:" + key, data, ttl_seconds)

    async def delete(self, key: str) -> None:
        with _failing_closed():
            await self._store.delete("auth:" + key)


Claims = Mapping[str, Any] | Callable[[str], Awaitable[Mapping[str, Any] | None]]


class TokenIssuer:
    """Issues, refreshes and revokes.

    Args:
        settings: Names and lifetimes.
        keys: The key that signs, then those that only verify: former ones, and the next one before it is used.
        store: Where refresh tokens are kept; shared by all workers, and never one that evicts what is alive.
        events: Where the events of this module go.
        clock: Where the time comes from.

    Raises:
        ValueError: There is no key, or two have one ``kid``.
    """

    def __init__(
        self,
        settings: IssuerSettings,
        *,
        keys: SigningKey | Sequence[SigningKey],
        store: StateStore,
        events: Events | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.settings = settings
        self._keys = (keys,) if isinstance(keys, SigningKey) else tuple(keys)
        self._retired: dict[str, float] = {}
        self._records = _Records(store)
        self._events = events
        self._clock = clock or SystemClock()
        _check_keys(self._keys)

    # Keys.

    def rotate(self, key: SigningKey) -> None:
        """Signs with another key from now on. Former ones verify until no token of theirs is alive.

        Other processes must know a key before anybody signs with it: give them the next one in ``keys`` first.

        Raises:
            ValueError: Another key has its ``kid``.
        """
        now = self._clock.time()
        current, *others = self._keys
        kept = [each for each in others if each.kid != key.kid and self._retired.get(each.kid, now) >= now]
        keys = (key, current, *kept)
        _check_keys(keys)
        self._retired.pop(key.kid, None)
        self._retired[current.kid] = now + self.settings.access_ttl_seconds + _MARGIN_SECONDS
        self._keys = keys

    def jwks(self) -> dict[str, list[dict[str, str]]]:
        """The public keys as a JWK set (RFC 7517), for everybody; secrets are not among them."""
        return {"keys": [key.verifying_jwk() for key in self._keys if not key.symmetric]}

    def verification_keys(self) -> dict[str, list[dict[str, str]]]:
        """All keys that verify as a JWK set, secrets as well: for the verifier in this process, and nobody else."""
        return {"keys": [key.verifying_jwk() for key in self._keys]}

    # Tokens.

    async def issue(
        self,
        subject: str,
        *,
        client_id: str,
        scope: Collection[str] = (),
        claims: Mapping[str, Any] | None = None,
        refreshable: bool = True,
    ) -> IssuedTokens:
        """Tokens for a subject who has just been authenticated; the beginning of a family.

        Args:
            subject: Who (``sub``).
            client_id: The client that gets them; only it may refresh.
            scope: What the access token may be used for.
            claims: Further claims, such as ``roles``; a refresh repeats them unless it is given others.
            refreshable: Whether there is a refresh token.

        Raises:
            CredentialsUnchecked: The store fails or has no room; nothing was issued.
            ValueError: A claim has the name of one that is set here, or the subject is empty.
        """
        claims = dict(claims or {})
        _check_claims(subject, claims)
        token: _RefreshToken | None = None
        if refreshable:
            token = _RefreshToken(secrets.token_bytes(_FAMILY_BYTES), secrets.token_bytes(_SECRET_BYTES))
            generation = await self._records.get(f"subject:{_digest(subject)}") or ""
            lifetime = self.settings.family_seconds
            ends_at = self._clock.time() + lifetime
            grant = _Grant(subject, client_id, sorted(scope), ends_at, generation, claims)
            await self._store_token(token, ends_at)
            await self._records.put(f"family:{token.family}", grant, lifetime)
        return self._issued(subject, client_id, scope, claims, token, refreshed=False)

    async def refresh(
        self, refresh_token: str, *, client_id: str, scope: Collection[str] | None = None, claims: Claims | None = None
    ) -> IssuedTokens:
        """New tokens for a refresh token, which is used up by it.

        Args:
            refresh_token: What the client was given.
            client_id: The client, authenticated.
            scope: A part of what was granted at the login, for this access token only; ``None`` for all of it.
            claims: Further claims in place of those at the login, or a function that finds them by the subject;
                ``None`` from it says that the subject may no longer log in, and ends the family.

        Raises:
            InvalidGrant: The token is unknown, expired, revoked, another client's, or was used before.
            InvalidScope: The scope is more than was granted; the token is still good.
            CredentialsUnchecked: The store fails or has no room; nothing was issued.
        """
        token = _RefreshToken.read(refresh_token)
        if token is None:
            raise InvalidGrant("malformed")
        grant = await self._grant(token.family)
        if grant is None:
            raise InvalidGrant("unknown, ended or revoked")
        if grant.client_id != client_id:
            raise InvalidGrant(f"of another client, not of {client_id}")
        if scope is not None and not set(scope) <= set(grant.scope):
            raise InvalidScope
        found = await claims(grant.subject) if callable(claims) else grant.claims if claims is None else claims
        if found is None:
            await self._end(token.family, grant, "no longer allowed")
            raise InvalidGrant("the subject may no longer log in")
        _check_claims(grant.subject, found)
        successor = await self._replace(token, grant)
        granted = grant.scope if scope is None else scope
        return self._issued(grant.subject, client_id, granted, found, successor, refreshed=True)

    async def revoke(self, refresh_token: str, *, client_id: str | None = None) -> bool:
        """Ends the family of a refresh token: a logout.

        Args:
            refresh_token: Any token of the family, used or not.
            client_id: The client that asks, where one does; it must be the one that has the token.

        Returns:
            Whether there was anything to end.

        Raises:
            InvalidGrant: The token is another client's.
            CredentialsUnchecked: The store fails; nothing was revoked.
        """
        token = _RefreshToken.read(refresh_token)
        grant = None if token is None else await self._grant(token.family)
        if token is None or grant is None:
            return False
        if client_id is not None and grant.client_id != client_id:
            raise InvalidGrant(f"of another client, not of {client_id}")
        await self._end(token.family, grant, "revoked")
        return True

    async def revoke_family(self, family: str) -> bool:
        """Ends a family by the name that events give it; says whether there was one.

        Raises:
            CredentialsUnchecked: The store fails; nothing was revoked.
        """
        grant = await self._grant(family)
        if grant is not None:
            await self._end(family, grant, "revoked")
        return grant is not None

    async def revoke_subject(self, subject: str) -> None:
        """Ends every family of a subject: after a new password, or when an account is closed.

        Raises:
            CredentialsUnchecked: The store fails or has no room; nothing was revoked.
        """
        # Whatever is older has ended by itself when this expires.
        lifetime = self.settings.family_seconds + _MARGIN_SECONDS
        await self._records.put(f"subject:{_digest(subject)}", secrets.token_hex(8), lifetime)
        self._tell(SubjectRevoked(subject))

    # How it is done.

    async def _grant(self, family: str) -> _Grant | None:
        """What a family was given, if it is alive."""
        record = await self._records.get(f"family:{family}")
        if record is None:
            return None
        grant = _Grant(*record)
        if self._clock.time() >= grant.ends_at:
            return None
        generation = await self._records.get(f"subject:{_digest(grant.subject)}")
        return grant if generation in (None, grant.generation) else None

    async def _replace(self, token: _RefreshToken, grant: _Grant) -> _RefreshToken:
        """Uses a token up; gives its successor."""
        now, began = self._clock.time(), self._clock.monotonic()
        nonce = secrets.token_bytes(_SECRET_BYTES)
        # Without a grace nobody will ask for the nonce again.
        mark = [now, nonce.hex() if self.settings.reuse_grace_seconds else ""]
        if await self._records.add(f"used:{token.digest}", mark, _USED_SECONDS):
            successor = await self._successor(token, grant, nonce, now, began)
        else:
            successor = await self._successor_again(token, grant, now)
        if self._clock.monotonic() - began >= _USED_SECONDS / 2:
            await self._records.delete(f"token:{successor.digest}")
            raise CredentialsUnchecked("a refresh took so long that its claim on the token may have ended")
        return successor

    async def _successor(
        self, token: _RefreshToken, grant: _Grant, nonce: bytes, now: float, began: float
    ) -> _RefreshToken:
        """What replaces a token that nobody else has claimed."""
        try:
            expires_at = await self._records.get(f"token:{token.digest}")
            if expires_at is None:
                raise await self._reused(token, grant)
            if now >= expires_at:
                await self._records.delete(f"family:{token.family}")  # it was the only one that could go on
                raise InvalidGrant("expired")
            successor = token.successor(nonce)
            await self._store_token(successor, grant.ends_at)
            await self._records.delete(f"token:{token.digest}")
        except CredentialsUnchecked:
            # Nothing was given for it, so it may be tried again. With a grace the mark itself allows that.
            if not self.settings.reuse_grace_seconds and self._clock.monotonic() - began < _USED_SECONDS / 2:
                with suppress(CredentialsUnchecked):
                    await self._records.delete(f"used:{token.digest}")
            raise
        return successor

    async def _successor_again(self, token: _RefreshToken, grant: _Grant, now: float) -> _RefreshToken:
        """What to say to a token that is in use, or was used a moment ago."""
        mark = await self._records.get(f"used:{token.digest}")
        if mark is None:
            raise CredentialsUnchecked("the state store has no room")
        used_at, nonce = mark
        if nonce and now - used_at <= self.settings.reuse_grace_seconds:
            successor = token.successor(bytes.fromhex(nonce))
            stored = await self._records.get(f"token:{successor.digest}") is not None
            if stored or await self._records.get(f"token:{token.digest}") is not None:
                # Whoever claimed it may not be done, or may have failed. What is left to do harms nobody if it is done
                # twice, unless the successor was used meanwhile: then its mark is there.
                if not stored:
                    await self._store_token(successor, grant.ends_at)
                await self._records.delete(f"token:{token.digest}")
                if await self._records.get(f"used:{successor.digest}") is None:
                    return successor
                await self._records.delete(f"token:{successor.digest}")
        raise await self._reused(token, grant)

    async def _store_token(self, token: _RefreshToken, ends_at: float) -> None:
        now = self._clock.time()
        expires_at = min(now + self.settings.refresh_idle_seconds, ends_at)
        # Kept until the family ends: one that came too late must not look like one that was used.
        await self._records.put(f"token:{token.digest}", expires_at, ends_at - now + _MARGIN_SECONDS)

    async def _reused(self, token: _RefreshToken, grant: _Grant) -> InvalidGrant:
        logger.warning(
            "a refresh token of %s came to %s a second time; its family ends", grant.subject, grant.client_id
        )
        self._tell(RefreshTokenReused(grant.subject, grant.client_id, token.family))
        await self._end(token.family, grant, "reused")
        return InvalidGrant("used before")

    async def _end(self, family: str, grant: _Grant, reason: str) -> None:
        await self._records.delete(f"family:{family}")
        self._tell(FamilyRevoked(grant.subject, grant.client_id, family, reason))

    def _issued(
        self,
        subject: str,
        client_id: str,
        scope: Iterable[str],
        claims: Mapping[str, Any],
        token: _RefreshToken | None,
        *,
        refreshed: bool,
    ) -> IssuedTokens:
        issued_at, lifetime = int(self._clock.time()), self.settings.access_ttl_seconds
        jti, scope = secrets.token_hex(16), frozenset(scope)
        payload = {
            "iss": self.settings.issuer,
            "sub": subject,
            "aud": self.settings.audience,
            "client_id": client_id,
            "iat": issued_at,
            "exp": issued_at + lifetime,
            "jti": jti,
        }
        if scope:
            payload["scope"] = " ".join(sorted(scope))
        access_token = self._keys[0].sign(payload | dict(claims))
        family = None if token is None else token.family
        self._tell(TokensIssued(subject, client_id, jti, family, refreshed))
        return IssuedTokens(access_token, lifetime, scope, jti, None if token is None else token.text, family)

    def _tell(self, event: object) -> None:
        if self._events is not None:
            self._events.emit(event)


def _check_keys(keys: Sequence[SigningKey]) -> None:
    if not keys:
        raise ValueError("a token issuer needs a key that signs")
    if len({key.kid for key in keys}) != len(keys):
        raise ValueError("two keys have one kid; give each its own, or leave it out")


def _check_claims(subject: str, claims: Mapping[str, Any]) -> None:
    if not subject:
        raise ValueError("a token needs a subject")
    if taken := _RESERVED & claims.keys():
        raise ValueError(f"{', '.join(sorted(taken))}: set by the issuer, so no further claim may have the name")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
