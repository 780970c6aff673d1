"""Where the keys of an issuer come from: the configuration, a rotation, or the issuer's own JWK set.

It protects from what happens between an issuer and those who believe it: keys that change, providers that are down or
slow, tokens that ask for keys which nobody has (each would be a request to the provider), sets from the wrong place.
It is *not* a cache of tokens, and it never fetches anything that a token names: only addresses of the configuration.

Example:
    >>> import asyncio
    >>> from fastapi_hardening.security.auth.jwk import VerificationKey
    >>> old = VerificationKey.from_secret(b"the secret of the last quarter ...", kid="q3")
    >>> new = VerificationKey.from_secret(b"the secret of the present quarter", kid="q4")
    >>> keys = RotatingKeys(old, overlap_seconds=3600)
    >>> keys.rotate(new)
    >>> asyncio.run(keys.find("q3", "HS256")) == (old,), keys.current is new
    (True, True)
"""

import asyncio
import ipaddress
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextvars import Context
from dataclasses import dataclass
from typing import Any, Protocol, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from fastapi_hardening.core.check import CheckResult
from fastapi_hardening.core.clock import Clock, SystemClock
from fastapi_hardening.core.configuration import ConcernSettings, ConfigurationError
from fastapi_hardening.core.events import Events
from fastapi_hardening.core.identity import CredentialsUnchecked
from fastapi_hardening.security.auth.jwk import ASYMMETRIC, KeySet, VerificationKey, strict_object

logger = logging.getLogger("fastapi_hardening.auth.keys")

Fetch = Callable[[str], Awaitable[bytes]]
"""Gets what is at a URL; raises whatever it likes if it cannot."""

# A set is fetched again, in the background, after this share of the time for which it is fresh.
_REFRESH_AT = 0.8
_OK = 200


class KeySource(Protocol):
    """The keys of one issuer."""

    @property
    def generation(self) -> int:
        """Changes whenever a key is gone; whoever remembers what a key has proven then forgets it."""
        ...

    async def find(self, kid: str | None, algorithm: str) -> Sequence[VerificationKey]:
        """The keys that a token may be verified with; none if there is no such key.

        Raises:
            CredentialsUnchecked: No key is known at all; the reason is ``keys-unavailable``.
        """
        ...


class StaticKeys:
    """Keys that stay what they are.

    Args:
        *keys: The keys, or one set of keys.

    Raises:
        InvalidKey: They cannot be used together.
    """

    generation = 0

    def __init__(self, *keys: VerificationKey | KeySet) -> None:
        self.keys = keys[0] if len(keys) == 1 and isinstance(keys[0], KeySet) else KeySet(_flat(keys))

    async def find(self, kid: str | None, algorithm: str) -> Sequence[VerificationKey]:
        """The keys that a token may be verified with."""
        return self.keys.find(kid, algorithm)


def _flat(keys: Iterable[VerificationKey | KeySet]) -> Iterable[VerificationKey]:
    for key in keys:
        if isinstance(key, KeySet):
            yield from key.keys
        else:
            yield key


class RotatingKeys:
    """A current key, and the ones before it for as long as tokens may live that they have signed.

    Args:
        current: The key that signs now.
        *previous: Those that did before.
        overlap_seconds: How long a key is accepted after another took its place: at least the life of a token. The
            ``previous`` ones are accepted so long from now.
        clock: Where the time comes from.

    Raises:
        InvalidKey: The keys cannot be used together.
    """

    def __init__(
        self,
        current: VerificationKey,
        *previous: VerificationKey,
        overlap_seconds: float = 86_400.0,
        clock: Clock | None = None,
    ) -> None:
        self._now = (clock or SystemClock()).monotonic
        self._overlap = overlap_seconds
        self.current = current
        self._previous = [(key, self._now() + overlap_seconds) for key in previous]
        self._set = KeySet([current, *previous])
        self._generation = 0

    @property
    def generation(self) -> int:
        """Changes when a previous key is no longer accepted."""
        self._drop_expired()
        return self._generation

    async def find(self, kid: str | None, algorithm: str) -> Sequence[VerificationKey]:
        """The keys that a token may be verified with."""
        self._drop_expired()
        return self._set.find(kid, algorithm)

    def rotate(self, key: VerificationKey) -> None:
        """Puts a key in the place of the current one, which is accepted for ``overlap_seconds`` more.

        Raises:
            InvalidKey: It has the ``kid`` of another, or is of another kind.
        """
        keys = KeySet([key, self.current, *(previous for previous, _ in self._previous)])
        self._previous.append((self.current, self._now() + self._overlap))
        self.current = key
        self._set = keys

    def retire(self) -> None:
        """Stops accepting every key but the current one, at once: what was known of a leaked key."""
        self._drop([])

    def _drop_expired(self) -> None:
        if self._previous and self._previous[0][1] <= self._now():
            self._drop([entry for entry in self._previous if entry[1] > self._now()])

    def _drop(self, left: list[tuple[VerificationKey, float]]) -> None:
        self._previous = left
        self._set = KeySet([self.current, *(key for key, _ in left)])
        self._generation += 1


# --- keys of a provider -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class KeysRefreshed:
    """The keys of a provider were read.

    Attributes:
        source: The address of the keys, or the issuer.
        keys: How many can be used.
        added: The ``kid`` of each new one.
        removed: The ``kid`` of each that is gone.
    """

    source: str
    keys: int
    added: tuple[str | None, ...]
    removed: tuple[str | None, ...]


@dataclass(frozen=True, slots=True)
class KeysUnavailable:
    """The keys of a provider could not be read.

    Attributes:
        source: The address of the keys, or the issuer.
        error: Why.
        keys: How many are still used from before.
    """

    source: str
    error: str
    keys: int


class RemoteKeysSettings(ConcernSettings):
    """Where a provider publishes its keys, and how often it is asked. Give ``jwks_url`` or ``issuer``."""

    jwks_url: str | None = None
    """The address of its JWK set."""

    issuer: str | None = None
    """Its issuer, whose metadata says where the keys are (OpenID Connect Discovery 1.0, RFC 8414)."""

    metadata_url: str | None = None
    """Where the metadata is, if not at ``/.well-known/openid-configuration`` below the issuer."""

    allowed_hosts: tuple[str, ...] = ()
    """Hosts that the metadata may send us to, beside the host that it comes from."""

    allow_loopback_http: bool = False
    """Whether a provider on this machine may be asked without TLS; for development."""

    algorithms: tuple[str, ...] = ASYMMETRIC
    """What its keys may be used with; a key that does not say takes the first that fits."""

    timeout_seconds: float = Field(5.0, gt=0)
    """How long an answer may take, all in all."""

    max_bytes: int = Field(262_144, ge=1024)
    """How long an answer may be."""

    max_age_seconds: float = Field(3600.0, gt=0)
    """How long keys are fresh; they are fetched again, in the background, when four fifths of it are over."""

    max_stale_seconds: float = Field(86_400.0, ge=0)
    """How long after that the last good keys are used while the provider is down."""

    min_refresh_seconds: float = Field(10.0, ge=0)
    """The least time between two fetches, whatever asks for them."""

    unknown_kid_cooldown_seconds: float = Field(60.0, ge=0)
    """The least time between two fetches that tokens with an unknown ``kid`` cause."""

    @model_validator(mode="after")
    def _say_where(self) -> Self:
        if (self.jwks_url is None) == (self.issuer is None):
            raise ValueError("give either jwks_url or issuer: the first is asked directly, the second says where")
        if self.metadata_url is not None and self.issuer is None:
            raise ValueError("metadata_url goes with issuer, which the metadata must name")
        return self


class RemoteKeys:
    """The keys that a provider publishes.

    One request at a time fetches them, at the first need and again before they are old; meanwhile the last good ones
    are used, and while the provider is down as well. A token with an unknown ``kid`` has them fetched again, rarely.

    Args:
        settings: Where they are.
        fetch: What gets them; httpx2 by default.
        clock: Where the time comes from.
        events: Where :class:`KeysRefreshed` and :class:`KeysUnavailable` go.

    Raises:
        ConfigurationError: An address is not https, or httpx2 is missing.
    """

    def __init__(
        self,
        settings: RemoteKeysSettings,
        *,
        fetch: Fetch | None = None,
        clock: Clock | None = None,
        events: Events | None = None,
    ) -> None:
        self.settings = settings
        self._now = (clock or SystemClock()).monotonic
        self._events = events
        self._fetch = fetch or HttpFetch(timeout_seconds=settings.timeout_seconds, max_bytes=settings.max_bytes)
        first = settings.jwks_url or settings.metadata_url or _metadata_of(settings.issuer or "")
        host = check_url(first, allowed_hosts=None, allow_loopback_http=settings.allow_loopback_http)
        self._first_url = first
        self._hosts = frozenset({host, *(name.lower() for name in settings.allowed_hosts)})
        self.source = settings.issuer or first
        self.generation = 0
        self._keys: KeySet | None = None
        self._read_at = 0.0
        self._attempted_at = float("-inf")
        self._asked_for_unknown_at = float("-inf")
        self._error: str | None = None
        self._flight: asyncio.Task[None] | None = None

    @property
    def keys(self) -> tuple[VerificationKey, ...]:
        """The keys that are used now."""
        return () if self._keys is None else self._keys.keys

    async def find(self, kid: str | None, algorithm: str) -> Sequence[VerificationKey]:
        """The keys that a token may be verified with.

        Raises:
            CredentialsUnchecked: There are none and the provider gives none; the reason is ``keys-unavailable``.
        """
        await self._keep_fresh()
        found = self._look(kid, algorithm)
        if not found and kid is not None and self._may_ask_for(kid):
            await self._fetched()
            found = self._look(kid, algorithm)
        return found

    def _look(self, kid: str | None, algorithm: str) -> Sequence[VerificationKey]:
        if self._keys is None:
            raise CredentialsUnchecked("keys-unavailable")
        return self._keys.find(kid, algorithm)

    async def check(self) -> CheckResult:
        """A health check: ``fail`` without keys, ``warn`` while the provider is down and older ones are used."""
        await self._keep_fresh()
        if self._keys is None:
            return CheckResult("fail", f"no keys of {self.source}: {self._error}")
        if self._error is not None:
            age = self._now() - self._read_at
            return CheckResult("warn", f"{self.source} gave no keys: {self._error}", round(age), "seconds old")
        return CheckResult(observed=len(self._keys.keys), unit="keys")

    async def refresh(self) -> bool:
        """Fetches the keys now, or waits for the fetch that is under way; whether that went well."""
        await self._fetched()
        return self._error is None

    async def _keep_fresh(self) -> None:
        settings = self.settings
        now = self._now()
        age = now - self._read_at
        if self._keys is not None and age >= settings.max_age_seconds + settings.max_stale_seconds:
            self._keys = None
            self.generation += 1
        if self._keys is None:
            if self._is_under_way() or self._is_due(now):
                await self._fetched()
        elif age >= settings.max_age_seconds and self._error is None:
            # Not waited for any longer once the provider is known to be down.
            if self._is_under_way() or self._is_due(now):
                await self._fetched()
        elif age >= settings.max_age_seconds * _REFRESH_AT and self._is_due(now):
            self._flight = self._begin()

    def _is_due(self, now: float) -> bool:
        return now - self._attempted_at >= self.settings.min_refresh_seconds

    def _may_ask_for(self, kid: str) -> bool:
        """Whether an unknown name is worth a fetch: not if the key is known, nor if that was tried a moment ago."""
        if any(key.kid == kid for key in self.keys):
            return False
        if self._is_under_way():
            return True
        now = self._now()
        if not self._is_due(now) or now - self._asked_for_unknown_at < self.settings.unknown_kid_cooldown_seconds:
            return False
        self._asked_for_unknown_at = now
        return True

    def _is_under_way(self) -> bool:
        flight = self._flight
        return flight is not None and not flight.done() and flight.get_loop() is asyncio.get_running_loop()

    def _begin(self) -> "asyncio.Task[None]":
        """The fetch that is under way, or a new one. Nobody needs to wait for it."""
        flight = self._flight
        if flight is None or not self._is_under_way():
            self._attempted_at = self._now()
            # In a context of its own: it belongs to no request, and must not log as one.
            flight = self._flight = asyncio.create_task(self._read(), context=Context())
        return flight

    async def _fetched(self) -> None:
        """Waits for one fetch; who stops waiting does not stop it for the others."""
        await asyncio.shield(self._begin())

    async def _read(self) -> None:
        try:
            async with asyncio.timeout(self.settings.timeout_seconds):
                keys = KeySet.from_jwks(
                    await self._get(await self._jwks_url()), algorithms=self.settings.algorithms, public=True
                )
        except Exception as error:  # noqa: BLE001 - whatever goes wrong there, the last good keys are used
            self._error = str(error) or type(error).__name__
            logger.warning("no keys of %s: %s; %d from before are used", self.source, self._error, len(self.keys))
            self._emit(KeysUnavailable(self.source, self._error, len(self.keys)))
        else:
            self._take(keys)

    async def _jwks_url(self) -> str:
        settings = self.settings
        if settings.issuer is None:
            return self._first_url
        metadata = strict_object(await self._get(self._first_url))
        if metadata.get("issuer") != settings.issuer:
            raise ValueError(f"the metadata is of another issuer than {settings.issuer}")
        url = metadata.get("jwks_uri")
        if not isinstance(url, str):
            raise ValueError("the metadata has no jwks_uri")  # noqa: TRY004 - one kind of error for bad metadata
        check_url(url, allowed_hosts=self._hosts, allow_loopback_http=settings.allow_loopback_http)
        return url

    async def _get(self, url: str) -> bytes:
        data = await self._fetch(url)
        if len(data) > self.settings.max_bytes:
            raise ValueError(f"the answer has more than {self.settings.max_bytes} bytes")
        return data

    def _take(self, keys: KeySet) -> None:
        """Uses new keys; those that are the same stay the same objects, and what they have proven stays proven."""
        before = {_fingerprint(key): key for key in self.keys}
        after = {_fingerprint(key): key for key in keys.keys}
        removed = [key for print_, key in before.items() if print_ not in after]
        added = [key for print_, key in after.items() if print_ not in before]
        self._keys = KeySet([before.get(print_, key) for print_, key in after.items()], refused=keys.refused)
        self._read_at = self._now()
        self._error = None
        if removed:
            self.generation += 1
        if keys.refused:
            logger.info("some keys of %s are not used: %s", self.source, keys.refused)
        self._emit(
            KeysRefreshed(self.source, len(self.keys), tuple(k.kid for k in added), tuple(k.kid for k in removed))
        )

    def _emit(self, event: object) -> None:
        if self._events is not None:
            self._events.emit(event)


def _metadata_of(issuer: str) -> str:
    return issuer.rstrip("/") + "/.well-known/openid-configuration"


def _fingerprint(key: VerificationKey) -> tuple[str | None, str, bytes]:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat  # noqa: PLC0415 - slow to import

    return key.kid, key.algorithm, key.material.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def check_url(url: str, *, allowed_hosts: frozenset[str] | None, allow_loopback_http: bool = False) -> str:
    """Makes sure that an address may be asked for keys.

    Args:
        url: The address.
        allowed_hosts: The hosts that it may have; ``None`` for any.
        allow_loopback_http: Whether it may be http on this machine.

    Returns:
        Its host, in lower case.

    Raises:
        ConfigurationError: It may not; the message says why.
    """
    if not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        raise ConfigurationError("an address of keys has characters that no URL has")
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ConfigurationError(f"{url!r} is no URL") from None
    if not host or "@" in parts.netloc or parts.fragment:
        raise ConfigurationError(f"{url!r}: an address of keys has a host, no user and no fragment")
    if parts.scheme != "https" and not (parts.scheme == "http" and allow_loopback_http and _is_loopback(host)):
        raise ConfigurationError(
            f"{url!r}: keys come over https (allow_loopback_http lets a provider on this machine do without)"
        )
    if allowed_hosts is not None and host not in allowed_hosts:
        raise ConfigurationError(f"{url!r}: the host {host} is not allowed; name it in allowed_hosts if it is right")
    return host


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class HttpFetch:
    """Gets small documents with httpx2: no redirects, nothing compressed, nothing longer than allowed.

    Args:
        timeout_seconds: How long each step may take.
        max_bytes: How long a document may be.

    Raises:
        ConfigurationError: httpx2 is not installed.
    """

    def __init__(self, *, timeout_seconds: float = 5.0, max_bytes: int = 262_144) -> None:
        try:
            import httpx2  # noqa: PLC0415 - an extra
        except ImportError:
            raise ConfigurationError(
                "keys of a provider are fetched with httpx2: pip install 'fastapi-hardening[http]'"
            ) from None
        self._httpx2: Any = httpx2
        self._timeout = timeout_seconds
        self._max_bytes = max_bytes
        self._tls: Any = None

    async def __call__(self, url: str) -> bytes:
        """The body of a 200.

        Raises:
            ValueError: The answer is another, or too long.
            Exception: Whatever httpx2 raises when there is no answer.
        """
        if self._tls is None:
            # Reads the certificates of the authorities, which would block the loop.
            self._tls = await asyncio.to_thread(self._httpx2.create_ssl_context)
        body = bytearray()
        # A client for each call: there are few of them, and each may run in another loop.
        async with (
            self._httpx2.AsyncClient(verify=self._tls, timeout=self._timeout, follow_redirects=False) as client,
            client.stream(
                "GET", url, headers={"Accept": "application/json", "Accept-Encoding": "identity"}
            ) as response,
        ):
            if response.status_code != _OK:
                raise ValueError(f"{url} answers {response.status_code}")
            if response.headers.get("content-encoding", "identity") != "identity":
                raise ValueError(f"{url} sends a compressed answer, which was not asked for")
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > self._max_bytes:
                    raise ValueError(f"the answer of {url} has more than {self._max_bytes} bytes")
        return bytes(body)
