"""Opaque tokens of a provider: it is asked about each one (RFC 7662), and the answer is remembered for a moment.

What a client sends is only a text; who it stands for, and whether it still does, only the provider knows. So its
answer is believed literally or not at all: ``active`` must be ``true``, audience, issuer and times must fit. While the
provider does not answer nobody is let in, and nobody is called wrong either: that is
:class:`~fastapi_hardening.core.identity.CredentialsUnchecked`, a 503.

A token that was revoked passes until its answer has expired from the cache, by default a minute. It is *not* for signed
tokens, which are verified without asking anybody.

Example:
    >>> import asyncio
    >>> settings = IntrospectionSettings(
    ...     url="https://login.example/introspect", client_id="shop-api", client_secret="kept", audience=("shop-api",)
    ... )
    >>> async def provider(url, headers, body):  # what httpx2 would do
    ...     return 200, b'{"active": true, "sub": "anna", "aud": "shop-api", "scope": "orders:read"}'
    >>> authenticator = IntrospectionAuthenticator(settings, fetch=provider)
    >>> asyncio.run(authenticator.principal_of("2YotnFZFEjr1zCsicMWpAA")).has_scopes("orders:read")
    True
"""

import asyncio
import base64
import hashlib
import json
import logging
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple
from urllib.parse import quote_plus, urlencode, urlsplit

from pydantic import Field, SecretStr, field_validator
from starlette.requests import HTTPConnection

from fastapi_hardening.core.clock import Clock, SystemClock
from fastapi_hardening.core.configuration import ConcernSettings
from fastapi_hardening.core.identity import CredentialsUnchecked, InvalidCredentials, Principal
from fastapi_hardening.core.store import BoundedMap

logger = logging.getLogger("fastapi_hardening.auth")

Fetch = Callable[[str, Mapping[str, str], bytes], Awaitable[tuple[int, bytes]]]
"""Posts a body to a URL with these header fields; gives status and body, or raises whatever it likes."""

# RFC 6750, section 2.1.
_TOKEN = re.compile(r"[A-Za-z0-9\-._~+/]+=*")
_LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})
_OK = 200
_NO_TIME = 1e15


class IntrospectionSettings(ConcernSettings):
    """Which provider is asked, as whom, and what its answers must say."""

    url: str
    """The provider's introspection endpoint: https, or http on this machine."""

    client_id: str
    """As whom this application asks."""

    client_secret: SecretStr
    """With which secret."""

    client_authentication: Literal["basic", "body"] = "basic"
    """How both are sent."""

    audience: tuple[str, ...]
    """A token must be for one of these (``aud``); empty takes tokens for anybody, which a provider of many must not."""

    issuer: str | None = None
    """A token must be issued by this one (``iss``); for providers that say so."""

    roles_claim: str | None = "roles"
    """Which member of the answer has the roles, as a list or separated by blanks."""

    tenant_claim: str | None = None
    """Which member of the answer has the tenant."""

    timeout_seconds: float = Field(2.0, gt=0)
    """How long an answer may take as a whole."""

    retry_after_seconds: float = Field(5.0, gt=0)
    """When clients may come back while there is none."""

    cache_seconds: float = Field(60.0, ge=0)
    """How long a good answer is remembered, never beyond ``exp``; so long a revoked token passes."""

    negative_cache_seconds: float = Field(5.0, ge=0)
    """How long a bad answer is remembered."""

    max_keys: int = Field(10_000, ge=1)
    """For how many good answers there is a place, and for how many bad ones."""

    max_under_way: int = Field(100, ge=1)
    """How many questions may be under way; a further one is a 503, so that made-up tokens do not flood the provider."""

    max_token_bytes: int = Field(4_096, ge=16)
    """What is longer is no token, and nobody is asked."""

    max_response_bytes: int = Field(65_536, ge=256)
    """How long an answer may be."""

    leeway_seconds: float = Field(0.0, ge=0, le=300)
    """How far the provider's clock may be from ours."""

    @field_validator("url")
    @classmethod
    def _is_safe(cls, url: str) -> str:
        parts = urlsplit(url)
        if not parts.hostname or parts.username or parts.fragment:
            raise ValueError(f"{url!r} is not the address of an endpoint")
        if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in _LOCAL_HOSTS):
            raise ValueError(f"{url!r}: tokens and the secret are sent there, so it has to be https")
        return url


# --- engine -----------------------------------------------------------------------------------------------------------


class _Verdict(NamedTuple):
    """What came of asking: a principal, or why there is none."""

    principal: Principal | None = None
    refused: str = ""
    unavailable: str = ""


class IntrospectionAuthenticator:
    """Finds out who sent a bearer token by asking the provider (RFC 7662).

    Args:
        settings: The provider, and what its answers must say.
        fetch: Asks it; by default httpx2 does (the extra ``http``), without following redirects.
        clock: Where the time comes from.

    Raises:
        ModuleNotFoundError: There is no ``fetch``, and httpx2 is not installed.
    """

    scheme = "bearer"
    challenge = "Bearer"

    def __init__(
        self, settings: IntrospectionSettings, *, fetch: Fetch | None = None, clock: Clock | None = None
    ) -> None:
        self.settings = settings
        self._client = None if fetch is not None else _HttpClient(settings)
        self._fetch: Fetch = fetch if self._client is None else self._client.post  # type: ignore[assignment]
        self._clock = clock or SystemClock()
        # Apart, so that made-up tokens take no place from good ones.
        self._good: BoundedMap[Principal] = BoundedMap(settings.max_keys, clock=clock)
        self._bad: BoundedMap[str] = BoundedMap(settings.max_keys, clock=clock)
        self._under_way: dict[bytes, asyncio.Task[_Verdict]] = {}
        self._headers, self._parameters = _client_authentication(settings)

    async def authenticate(self, connection: HTTPConnection) -> Principal | None:
        """Who calls; ``None`` without ``Authorization: Bearer``.

        Raises:
            InvalidCredentials: The token is malformed, or the provider does not vouch for it.
            CredentialsUnchecked: The provider does not answer, or not as it should.
        """
        if not self.settings.enabled:
            return None
        fields = connection.headers.getlist("authorization")
        bearers = [field for field in fields if field.partition(" ")[0].lower() == "bearer"]
        if not bearers:
            return None
        if len(fields) > 1:
            raise InvalidCredentials("more than one Authorization field")
        return await self.principal_of(fields[0].partition(" ")[2].strip(" "))

    async def principal_of(self, token: str) -> Principal:
        """Whom a token stands for.

        Raises:
            InvalidCredentials: The token is malformed, or the provider does not vouch for it.
            CredentialsUnchecked: The provider does not answer, or not as it should.
        """
        if len(token) > self.settings.max_token_bytes or not _TOKEN.fullmatch(token):
            raise InvalidCredentials("malformed")
        digest = hashlib.sha256(token.encode("ascii")).digest()
        key = digest.hex()
        principal = self._good.get(key)
        if principal is not None and not self._expired(principal.expires_at):
            return principal
        refused = self._bad.get(key)
        if refused is not None:
            raise InvalidCredentials(refused)
        verdict = await self._ask_once(token, digest)
        if verdict.unavailable:
            raise CredentialsUnchecked(verdict.unavailable, retry_after_seconds=self.settings.retry_after_seconds)
        if verdict.principal is None:
            raise InvalidCredentials(verdict.refused)
        return verdict.principal

    async def aclose(self) -> None:
        """Closes the connections to the provider."""
        if self._client is not None:
            await self._client.aclose()

    async def _ask_once(self, token: str, digest: bytes) -> _Verdict:
        """Asks about a token, or waits for who asks already; a caller that leaves does not end the question."""
        task = self._under_way.get(digest)
        if task is None:
            if len(self._under_way) >= self.settings.max_under_way:
                return _Verdict(unavailable="too many questions to the provider are under way")
            task = self._under_way[digest] = asyncio.ensure_future(self._ask(token, digest.hex()))
            task.add_done_callback(lambda _: self._under_way.pop(digest, None))
        return await asyncio.shield(task)

    async def _ask(self, token: str, key: str) -> _Verdict:
        verdict = await self._verdict(token)
        if verdict.principal is not None:
            seconds = self.settings.cache_seconds
            if verdict.principal.expires_at is not None:
                seconds = min(seconds, verdict.principal.expires_at - self._clock.time())
            if seconds > 0:
                self._good.put(key, verdict.principal, seconds)
        elif verdict.refused and self.settings.negative_cache_seconds:
            self._bad.put(key, verdict.refused, self.settings.negative_cache_seconds)
        return verdict

    async def _verdict(self, token: str) -> _Verdict:
        settings = self.settings
        body = urlencode({"token": token, "token_type_hint": "access_token"} | self._parameters).encode("ascii")
        try:
            async with asyncio.timeout(settings.timeout_seconds):
                status, answer = await self._fetch(settings.url, self._headers, body)
        except Exception as error:
            logger.exception("the introspection endpoint does not answer")
            return _Verdict(unavailable=f"the provider does not answer: {type(error).__name__}")
        if status != _OK:
            logger.error("the introspection endpoint answers with status %d", status)
            return _Verdict(unavailable=f"the provider answers with status {status}")
        members = _members(answer) if len(answer) <= settings.max_response_bytes else None
        if members is None or not isinstance(members.get("active"), bool):
            logger.error("the introspection endpoint answers in a form that RFC 7662 does not know")
            return _Verdict(unavailable="the provider's answer cannot be read")
        objection = next(self._objections(members), None)
        return self._principal(members) if objection is None else _Verdict(refused=objection)

    def _objections(self, members: Mapping[str, Any]) -> Iterator[str]:
        """What speaks against taking a token, by what the provider says of it."""
        settings = self.settings
        if members["active"] is not True:
            yield "not active"
        token_type = members.get("token_type", "Bearer")
        if not isinstance(token_type, str) or token_type.lower() != "bearer":
            yield "not a bearer token"
        if "cnf" in members:
            yield "bound to a key of its sender, which is not checked here"
        audience = members.get("aud", [])
        audiences = [audience] if isinstance(audience, str) else audience
        if settings.audience and not (isinstance(audiences, list) and any(a in audiences for a in settings.audience)):
            yield "for another audience"
        if settings.issuer is not None and members.get("iss") != settings.issuer:
            yield "of another issuer"
        expires_at, not_before = members.get("exp"), members.get("nbf")
        if not all(when is None or _is_time(when) for when in (expires_at, not_before)):
            yield "a time that is none"
        if self._expired(self._end_of(members)):
            yield "expired"
        if not_before is not None and self._clock.time() < not_before - settings.leeway_seconds:
            yield "not yet good"

    def _end_of(self, members: Mapping[str, Any]) -> float | None:
        expires_at = members.get("exp")
        return None if expires_at is None else float(expires_at) + self.settings.leeway_seconds

    def _principal(self, members: Mapping[str, Any]) -> _Verdict:
        subject, client_id = members.get("sub"), members.get("client_id")
        if subject is None and isinstance(client_id, str) and client_id:
            subject = f"client:{client_id}"  # a name that no person has
        if not isinstance(subject, str) or not subject:
            return _Verdict(refused="without a subject")
        names = _names(members.get("scope")), _names(members.get(self.settings.roles_claim or ""))
        tenant = members.get(self.settings.tenant_claim or "")
        if None in names or not isinstance(tenant, (str, type(None))):
            return _Verdict(refused="scope, roles or tenant of another form")
        scopes, roles = names
        issuer, token_id = members.get("iss"), members.get("jti")
        return _Verdict(
            Principal(
                subject,
                scheme=self.scheme,
                scopes=scopes or frozenset(),
                roles=roles or frozenset(),
                tenant=tenant,
                issuer=issuer if isinstance(issuer, str) else None,
                credential=token_id if isinstance(token_id, str) else None,
                expires_at=self._end_of(members),
                claims=MappingProxyType(dict(members)),
            )
        )

    def _expired(self, expires_at: float | None) -> bool:
        return expires_at is not None and self._clock.time() >= expires_at


def _members(answer: bytes) -> dict[str, Any] | None:
    """The members of a JSON object; ``None`` for anything else, and where one is there twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) != len(pairs):
            raise ValueError("a member is there twice")
        return members

    try:
        members = json.loads(answer, object_pairs_hook=once)
    except (ValueError, RecursionError):
        return None
    return members if isinstance(members, dict) else None


def _is_time(value: Any) -> bool:
    """Whether a value is a time as RFC 7519 writes it; a text, ``true``, infinity and what is near it are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _NO_TIME


def _names(value: Any) -> frozenset[str] | None:
    """Names, as a list or separated by blanks; ``None`` for what is neither."""
    if value is None:
        return frozenset()
    if isinstance(value, str):
        return frozenset(value.split())
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return frozenset(value)
    return None


def _client_authentication(settings: IntrospectionSettings) -> tuple[dict[str, str], dict[str, str]]:
    """What proves to the provider who asks (RFC 6749, section 2.3.1): header fields and parameters."""
    secret = settings.client_secret.get_secret_value()
    headers = {"Content-Type": "application/x-www-form-urlencoded", "Accept": "application/json"}
    headers["Accept-Encoding"] = "identity"  # so that the cap counts what is read
    if settings.client_authentication == "body":
        return headers, {"client_id": settings.client_id, "client_secret": secret}
    pair = f"{quote_plus(settings.client_id)}:{quote_plus(secret)}"
    return headers | {"Authorization": "Basic " + base64.b64encode(pair.encode("ascii")).decode("ascii")}, {}


class _HttpClient:
    """httpx2, asked to be careful: no redirects, no proxies of the environment, no more bytes than agreed."""

    def __init__(self, settings: IntrospectionSettings) -> None:
        try:
            import httpx2  # noqa: PLC0415 - an extra
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "the introspection endpoint is asked by httpx2: pip install 'fastapi-hardening[http]'", name="httpx2"
            ) from error
        self._max_bytes = settings.max_response_bytes
        limits = httpx2.Limits(max_connections=settings.max_under_way)
        self._client = httpx2.AsyncClient(timeout=settings.timeout_seconds, limits=limits, trust_env=False)

    async def post(self, url: str, headers: Mapping[str, str], body: bytes) -> tuple[int, bytes]:
        async with self._client.stream("POST", url, headers=headers, content=body, follow_redirects=False) as response:
            answer = bytearray()
            async for chunk in response.aiter_raw():
                answer += chunk
                if len(answer) > self._max_bytes:
                    break
            return response.status_code, bytes(answer)

    async def aclose(self) -> None:
        await self._client.aclose()
