"""The token endpoint: what turns a password, a refresh token or a service's secret into tokens, as RFC 6749 has it.

A router to include, in an application that is hardened or not: ``POST /oauth/token`` with the grants ``password``,
``refresh_token`` and ``client_credentials``, ``POST /oauth/revoke`` (RFC 7009), and :func:`jwks_router` for the keys.
Errors are those of RFC 6749, section 5.2, not problem documents: that is what OAuth clients read.

It is *not* an authorization server for other people's applications: there is no consent and no redirect. The grant
``password`` is for clients of your own that show their own login form, and only those that list it have it: RFC 9700
(section 2.4) forbids it to everybody else, because whoever uses it sees the password.

Example:
    >>> from fastapi import FastAPI
    >>> from fastapi_hardening.core.store import MemoryStore
    >>> from fastapi_hardening.security.auth.issuer import IssuerSettings, SigningKey
    >>> issuer = TokenIssuer(
    ...     IssuerSettings(issuer="https://shop.example", audience="https://api.shop.example"),
    ...     keys=SigningKey("0123456789abcdef0123456789abcdef", "HS256"),
    ...     store=MemoryStore(),
    ... )
    >>> async def authenticate(username: str, password: str) -> Principal | None:
    ...     return Principal("anna") if (username, password) == ("anna", "only an example") else None
    >>> app = OAuthClient("shop-app", grants={"password", "refresh_token"}, scope={"orders:read"})
    >>> FastAPI().include_router(token_router(issuer, authenticate, clients=[app]))
"""

import base64
import binascii
import hashlib
import json
import logging
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args
from urllib.parse import parse_qsl, unquote_plus

from fastapi import APIRouter, Request, params
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from fastapi_hardening.core import context as request_context
from fastapi_hardening.core.identity import CredentialsUnchecked, Principal
from fastapi_hardening.core.problem import Problem, retry_after, tell
from fastapi_hardening.security.auth.issuer import InvalidGrant, InvalidScope, IssuedTokens, TokenIssuer
from fastapi_hardening.security.auth.throttle import LoginThrottle

logger = logging.getLogger("fastapi_hardening.auth")

GrantType = Literal["password", "refresh_token", "client_credentials"]
ErrorCode = Literal[
    "invalid_request",
    "invalid_client",
    "invalid_grant",
    "unauthorized_client",
    "unsupported_grant_type",
    "invalid_scope",
    "unsupported_token_type",  # RFC 7009, section 2.2.1
    "temporarily_unavailable",
]

AuthenticateUser = Callable[[str, str], Awaitable[Principal | None]]
LoadUser = Callable[[str], Awaitable[Principal | None]]
RevokeAccessToken = Callable[[str, str], Awaitable[None]]

_NO_STORE = {"Cache-Control": "no-store", "Pragma": "no-cache"}
_CHALLENGE = 'Basic realm="token endpoint", charset="UTF-8"'
_FORM = "application/x-www-form-urlencoded"
_MAX_BODY_BYTES = 16 * 1024
_MAX_FIELDS = 32
_MAX_CLIENT_ID = 256
_FORWARDING = ("forwarded", "x-forwarded-for")
# RFC 6749, section 3.3.
_SCOPE = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]+(?: [\x21\x23-\x5b\x5d-\x7e]+)*")
_SHORTEST_SECRET = 32


class OAuthError(Exception):
    """A refusal as RFC 6749, section 5.2, writes it."""

    def __init__(
        self, error: ErrorCode, description: str, *, status: int = 400, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(description)
        self.error = error
        self.description = description
        self.status = status
        self.headers = dict(headers or {})

    def response(self) -> Response:
        """The answer."""
        body = {"error": self.error, "error_description": self.description}
        return JSONResponse(body, self.status, headers=_NO_STORE | self.headers)


def _invalid_client() -> OAuthError:
    # One sentence for all: nobody learns which clients there are.
    return OAuthError(
        "invalid_client", "The client could not be authenticated.", status=401, headers={"WWW-Authenticate": _CHALLENGE}
    )


# --- clients ----------------------------------------------------------------------------------------------------------


def new_client_secret() -> str:
    """A secret for a service: 256 random bits. Show it once, store its hash."""
    return "fhc_" + secrets.token_urlsafe(32)


def hash_client_secret(secret: str) -> str:
    """What to store of a client's secret. SHA-256 is enough for what was made at random, and for nothing else.

    Raises:
        ValueError: The secret is shorter than 32 characters, so it was not made by :func:`new_client_secret`.
    """
    if len(secret) < _SHORTEST_SECRET:
        raise ValueError("a client's secret is random and has at least 32 characters; new_client_secret() makes one")
    return hashlib.sha256(secret.encode()).hexdigest()


@dataclass(frozen=True)
class OAuthClient:
    """A program that may ask for tokens.

    Args:
        client_id: Its name.
        grants: How it may ask: ``password``, ``refresh_token``, ``client_credentials``.
        scope: All that it may ever get; what a request without ``scope`` gets.
        secret_hashes: Of its secrets (:func:`hash_client_secret`), two while one is replaced. Without any it is a
            public client, such as an app or a page, which is named but not authenticated.

    Raises:
        ValueError: A grant is unknown, or a public client would have ``client_credentials``; a scope is malformed.
    """

    client_id: str
    grants: Collection[GrantType]
    scope: Collection[str] = frozenset()
    secret_hashes: Collection[str] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if not 1 <= len(self.client_id) <= _MAX_CLIENT_ID or not self.client_id.isprintable():
            raise ValueError(f"{self.client_id!r} is no client id")
        if unknown := set(self.grants) - set(get_args(GrantType)):
            raise ValueError(f"{', '.join(sorted(unknown))}: not a grant; known are {', '.join(get_args(GrantType))}")
        if "client_credentials" in self.grants and not self.secret_hashes:
            raise ValueError(f"{self.client_id} has no secret, so client_credentials would let everybody in")
        if isinstance(self.scope, str) or not all(_SCOPE.fullmatch(each) and " " not in each for each in self.scope):
            raise ValueError("scope is a collection of names without blanks, quotes or backslashes")

    @property
    def public(self) -> bool:
        """Whether there is no secret that tells it from others."""
        return not self.secret_hashes

    def has_secret(self, secret: str) -> bool:
        """Whether this is one of its secrets; takes as long for a wrong one."""
        digest = hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
        matches = [secrets.compare_digest(digest, each) for each in self.secret_hashes]
        return any(matches)


FindClient = Callable[[str], Awaitable[OAuthClient | None]]

_NOBODY = OAuthClient("nobody", (), secret_hashes=("0" * 64,))


# --- engine -----------------------------------------------------------------------------------------------------------


def narrow(requested: str | None, client: OAuthClient, owner: Principal | None = None) -> frozenset[str]:
    """The scope that is granted (RFC 6749, section 3.3).

    What the client may not have is an error. What its user may not give is left out, and the answer says what is left;
    an error only if that is nothing. A user without scopes of their own gives all that the client may have.

    Args:
        requested: The parameter; ``None`` asks for all.
        client: Who asks.
        owner: For whom, where there is somebody.

    Raises:
        OAuthError: ``invalid_scope``.

    Example:
        >>> app = OAuthClient("app", grants={"password"}, scope={"read", "write", "admin"})
        >>> sorted(narrow("read admin", app, Principal("anna", scopes=frozenset({"read", "write"}))))
        ['read']
    """
    allowed = frozenset(client.scope)
    asked = allowed if requested is None else _scope_of(requested)
    if not asked <= allowed:
        raise OAuthError("invalid_scope", "The client may not have this scope.")
    granted = asked & owner.scopes if owner is not None and owner.scopes else asked
    if asked and not granted:
        raise OAuthError("invalid_scope", "The user may give nothing of this scope.")
    return granted


def _scope_of(text: str) -> frozenset[str]:
    if not _SCOPE.fullmatch(text):
        raise OAuthError("invalid_scope", "The scope is malformed.")
    return frozenset(text.split(" "))


def claims_of(principal: Principal) -> dict[str, Any]:
    """What an access token says of its subject beside the scope: its claims, roles, permissions and tenant."""
    claims: dict[str, Any] = dict(principal.claims)
    if principal.roles:
        claims["roles"] = sorted(principal.roles)
    if principal.permissions:
        claims["permissions"] = sorted(principal.permissions)
    if principal.tenant is not None:
        claims["tenant"] = principal.tenant
    if principal.tenant_roles:
        claims["tenant_roles"] = {tenant: sorted(roles) for tenant, roles in principal.tenant_roles.items()}
    return claims


async def _form_of(request: Request) -> dict[str, str]:
    """The parameters of the body; those without a value count as left out (RFC 6749, section 3.2)."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != _FORM:
        raise OAuthError("invalid_request", f"The parameters are sent as {_FORM}.")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_BODY_BYTES:
            raise OAuthError("invalid_request", "The body is too large.")
    try:
        pairs = parse_qsl(body.decode(), keep_blank_values=True, errors="strict", max_num_fields=_MAX_FIELDS)
    except ValueError:
        raise OAuthError("invalid_request", "The body cannot be read.") from None
    if len({name for name, _ in pairs}) != len(pairs):
        raise OAuthError("invalid_request", "A parameter is there more than once.")
    return {name: value for name, value in pairs if value}


def _basic(header: str) -> tuple[str, str] | None:
    """The client's id and secret from ``Authorization: Basic`` (RFC 6749, section 2.3.1); ``None`` without it."""
    scheme, _, credentials = header.partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        decoded = base64.b64decode(credentials.strip(), validate=True).decode()
        client_id, colon, secret = decoded.partition(":")
        pair = unquote_plus(client_id, errors="strict"), unquote_plus(secret, errors="strict")
    except (binascii.Error, ValueError):
        raise _invalid_client() from None
    if not colon:
        raise _invalid_client()
    return pair


def _required(form: Mapping[str, str], name: str) -> str:
    if name not in form:
        raise OAuthError("invalid_request", f"The parameter {name} is missing.")
    return form[name]


class _TokenEndpoint:
    """What both endpoints do, apart from their routes."""

    def __init__(
        self,
        issuer: TokenIssuer,
        *,
        authenticate_user: AuthenticateUser | None,
        find_client: FindClient,
        default_client_id: str | None,
        load_user: LoadUser | None,
        throttle: LoginThrottle | None,
        revoke_access_token: RevokeAccessToken | None,
    ) -> None:
        self._issuer = issuer
        self._authenticate_user = authenticate_user
        self._find_client = find_client
        self._default_client_id = default_client_id
        self._load_user = load_user
        self._throttle = throttle
        self._revoke_access_token = revoke_access_token

    async def token(self, request: Request) -> IssuedTokens:
        form = await _form_of(request)
        client = await self._client(request, form)
        grant = _required(form, "grant_type")
        if grant not in get_args(GrantType):
            raise OAuthError("unsupported_grant_type", "Known are password, refresh_token and client_credentials.")
        if grant not in client.grants:
            raise OAuthError("unauthorized_client", "The client may not use this grant.")
        if grant == "password":
            return await self._by_password(request, form, client)
        if grant == "refresh_token":
            return await self._by_refresh_token(form, client)
        scope = narrow(form.get("scope"), client)
        return await self._issuer.issue(client.client_id, client_id=client.client_id, scope=scope, refreshable=False)

    async def revoke(self, request: Request) -> None:
        form = await _form_of(request)
        client = await self._client(request, form)
        token = _required(form, "token")
        # The hint is only a hint, and the two are told apart by their form.
        if token.count(".") == 2:  # noqa: PLR2004 - a signed JWT has three parts
            if self._revoke_access_token is None:
                raise OAuthError("unsupported_token_type", "Access tokens end by themselves; revoke the refresh token.")
            await self._revoke_access_token(token, client.client_id)
        else:
            await self._issuer.revoke(token, client_id=client.client_id)

    async def _by_password(self, request: Request, form: Mapping[str, str], client: OAuthClient) -> IssuedTokens:
        username, password = _required(form, "username"), _required(form, "password")
        scope = form.get("scope")
        narrow(scope, client)  # before the password costs anything
        if self._authenticate_user is None:
            raise OAuthError("unauthorized_client", "There are no users here.")
        async with self._throttled(request, username) as succeeded:
            principal = await self._authenticate_user(username, password)
            if principal is not None:
                await succeeded()
        if principal is None:
            raise OAuthError("invalid_grant", "The name or the password is wrong.")
        return await self._issuer.issue(
            principal.id,
            client_id=client.client_id,
            scope=narrow(scope, client, principal),
            claims=claims_of(principal),
            refreshable="refresh_token" in client.grants,
        )

    @asynccontextmanager
    async def _throttled(self, request: Request, username: str) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        if self._throttle is None:
            yield _nothing
            return
        async with self._throttle.attempt(username, _address_of(request)) as attempt:
            yield attempt.succeeded

    async def _by_refresh_token(self, form: Mapping[str, str], client: OAuthClient) -> IssuedTokens:
        token, scope, load_user = _required(form, "refresh_token"), form.get("scope"), self._load_user

        async def todays_claims(subject: str) -> Mapping[str, Any] | None:
            principal = None if load_user is None else await load_user(subject)
            return None if principal is None else claims_of(principal)

        return await self._issuer.refresh(
            token,
            client_id=client.client_id,
            scope=None if scope is None else _scope_of(scope),
            claims=None if load_user is None else todays_claims,
        )

    async def _client(self, request: Request, form: Mapping[str, str]) -> OAuthClient:
        """Who asks (RFC 6749, section 2.3): by Basic, or by the body, never both."""
        headers = request.headers.getlist("authorization")
        if len(headers) > 1:
            raise OAuthError("invalid_request", "There is more than one Authorization field.")
        basic = _basic(headers[0]) if headers else None
        in_body = form.get("client_id")
        if basic is None:
            client_id, secret = in_body or self._default_client_id, form.get("client_secret")
        elif "client_secret" in form or in_body not in (None, basic[0]):
            raise OAuthError("invalid_request", "The client authenticates in two ways at once.")
        else:
            client_id, secret = basic[0], basic[1] or None
        if client_id is None or len(client_id) > _MAX_CLIENT_ID:
            raise _invalid_client()
        client = await self._find_client(client_id)
        right = (client or _NOBODY).has_secret(secret or "")
        if client is None or (secret is not None if client.public else not right):
            raise _invalid_client()
        return client


def _address_of(request: Request) -> str | None:
    """The client's address; ``None`` where many share it, none of whom may close the door for all."""
    known_to_our_layer = request_context.of(request.scope) is not None
    client = request_context.ensure(request.scope).client
    return None if not known_to_our_layer and any(name in request.headers for name in _FORWARDING) else client.own_key


async def _nothing() -> None:
    """What a success tells where nobody counts."""


# --- routes -----------------------------------------------------------------------------------------------------------


class TokenAnswer(BaseModel):
    """Tokens, as RFC 6749, section 5.1, has them."""

    access_token: str
    token_type: Literal["Bearer"] = "Bearer"  # noqa: S105 - the kind, not the token
    expires_in: int
    scope: str | None = None
    refresh_token: str | None = None


class TokenErrorAnswer(BaseModel):
    """A refusal, as RFC 6749, section 5.2, has it."""

    error: ErrorCode
    error_description: str


def token_router(
    issuer: TokenIssuer,
    authenticate_user: AuthenticateUser | None = None,
    *,
    clients: Iterable[OAuthClient] | FindClient,
    default_client_id: str | None = None,
    load_user: LoadUser | None = None,
    throttle: LoginThrottle | None = None,
    revoke_access_token: RevokeAccessToken | None = None,
    path: str = "/oauth/token",
    revocation_path: str = "/oauth/revoke",
    dependencies: Sequence[params.Depends] = (),
) -> APIRouter:
    """The token and the revocation endpoint, to be included.

    Args:
        issuer: Makes the tokens.
        authenticate_user: Who has this name and password; ``None`` from it for nobody. Verify by
            :class:`~fastapi_hardening.security.auth.passwords.PasswordHasher`, also where there is no such user.
        clients: Who may ask; or an async function that finds one by its id.
        default_client_id: Whom a request means that names no client, such as that of FastAPI's login dialog.
        load_user: The user as they are now, by subject, at each refresh; ``None`` from it ends the family. Without it
            a refresh repeats the claims of the login.
        throttle: Slows down who guesses passwords. Without one, guard the route in another way.
        revoke_access_token: Takes an access token back, for the client that asks; it verifies the token itself, and
            does nothing for one that is invalid or another client's.
        path: Where tokens are asked for.
        revocation_path: Where they are revoked.
        dependencies: Of both routes, such as overrides.

    Raises:
        ValueError: Two clients have one id, or one has the grant ``password`` and nobody authenticates users.
    """
    find_client = clients if callable(clients) else _finder(clients, authenticate_user, default_client_id)
    endpoint = _TokenEndpoint(
        issuer,
        authenticate_user=authenticate_user,
        find_client=find_client,
        default_client_id=default_client_id,
        load_user=load_user,
        throttle=throttle,
        revoke_access_token=revoke_access_token,
    )
    router = APIRouter(tags=["tokens"], dependencies=list(dependencies))
    refusals: dict[int | str, dict[str, Any]] = {
        400: {"model": TokenErrorAnswer, "description": "Refused"},
        401: {"model": TokenErrorAnswer, "description": "The client could not be authenticated"},
        429: {"model": TokenErrorAnswer, "description": "Too many failed logins"},
        503: {"model": TokenErrorAnswer, "description": "Nothing could be checked; come back later"},
    }

    @router.post(
        path,
        summary="Get tokens",
        response_model=None,
        responses=refusals | {200: {"model": TokenAnswer}},
        openapi_extra=_body("grant_type", "username", "password", "refresh_token", "scope"),
    )
    async def token(request: Request) -> Response:
        try:
            tokens = await _oauth_errors(endpoint.token(request))
        except OAuthError as error:
            return _refused(error, request)
        answer = TokenAnswer(
            access_token=tokens.access_token,
            expires_in=tokens.expires_in,
            scope=" ".join(sorted(tokens.scope)) or None,
            refresh_token=tokens.refresh_token,
        )
        return JSONResponse(answer.model_dump(exclude_none=True), headers=_NO_STORE)

    @router.post(
        revocation_path,
        summary="Revoke a token",
        response_model=None,
        responses=refusals | {200: {"description": "It is revoked, or was not good"}},
        openapi_extra=_body("token", "token_type_hint"),
    )
    async def revoke(request: Request) -> Response:
        try:
            await _oauth_errors(endpoint.revoke(request))
        except OAuthError as error:
            return _refused(error, request)
        return Response(headers=_NO_STORE)

    return router


def jwks_router(
    issuer: TokenIssuer,
    *,
    path: str = "/.well-known/jwks.json",
    max_age_seconds: int = 300,
    dependencies: Sequence[params.Depends] = (),
) -> APIRouter:
    """The public keys of an issuer as a JWK set (RFC 7517), for everybody who verifies its tokens.

    Args:
        issuer: Whose keys.
        path: Where.
        max_age_seconds: How long they may be cached: let the next key be known for longer before it signs.
        dependencies: Of the route, such as overrides.
    """
    router = APIRouter(dependencies=list(dependencies))

    @router.get(path, summary="The keys that verify tokens", response_model=None)
    async def jwks() -> Response:
        return Response(
            json.dumps(issuer.jwks()),
            media_type="application/jwk-set+json",
            headers={"Cache-Control": f"public, max-age={max_age_seconds}"},
        )

    return router


async def _oauth_errors(work: Awaitable[Any]) -> Any:
    """Whatever refuses a request on its way, as an error that OAuth clients read."""
    try:
        return await work
    except InvalidGrant as error:
        logger.info("a refresh token was refused: %s", error.reason)
        raise OAuthError("invalid_grant", "The refresh token is not good.") from error
    except InvalidScope as error:
        raise OAuthError("invalid_scope", "The scope is more than was granted.") from error
    except CredentialsUnchecked as error:
        logger.warning("tokens could not be issued or revoked: %s", error.reason)
        raise OAuthError(
            "temporarily_unavailable",
            "Nothing could be checked; come back later.",
            status=503,
            headers=retry_after(error.retry_after_seconds),
        ) from error
    except HTTPException as error:
        # Too many failed logins, too many hashes at once. Whatever else an application raises is its own affair.
        if error.status_code not in (429, 503):
            raise
        raise OAuthError(
            "temporarily_unavailable", "Come back later.", status=error.status_code, headers=error.headers
        ) from error


def _refused(error: OAuthError, request: Request) -> Response:
    problem = Problem(error.description, status=error.status, type=f"urn:ietf:rfc:6749#{error.error}")
    tell(problem, request_context.ensure(request.scope), "token endpoint")
    return error.response()


def _finder(
    clients: Iterable[OAuthClient], authenticate_user: AuthenticateUser | None, default_client_id: str | None
) -> FindClient:
    listed = list(clients)
    by_id = {client.client_id: client for client in listed}
    if len(by_id) != len(listed):
        raise ValueError("two clients have one client_id")
    if authenticate_user is None and any("password" in client.grants for client in listed):
        raise ValueError("a client has the grant password, so token_router() needs authenticate_user")
    if default_client_id is not None and default_client_id not in by_id:
        raise ValueError(f"default_client_id: there is no client {default_client_id!r}")

    async def find(client_id: str) -> OAuthClient | None:
        return by_id.get(client_id)

    return find


def _body(required: str, *others: str) -> dict[str, Any]:
    """The form for the OpenAPI document; it is read without FastAPI, whose errors are not those of RFC 6749."""
    names = (required, *others, "client_id", "client_secret")
    properties: dict[str, Any] = {
        name: {"type": "string"} | ({"format": "password"} if name in ("password", "client_secret") else {})
        for name in names
    }
    if required == "grant_type":
        properties[required]["enum"] = list(get_args(GrantType))
    schema = {"type": "object", "required": [required], "properties": properties}
    return {"requestBody": {"required": True, "content": {_FORM: {"schema": schema}}}}
