"""The settings of authentication: what is demanded of every route, and the credentials that need no code."""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, SecretStr, field_validator, model_validator

from fastapi_hardening.core import headers as header_fields
from fastapi_hardening.core.clock import Clock
from fastapi_hardening.core.configuration import ConcernSettings
from fastapi_hardening.core.events import Events
from fastapi_hardening.core.origins import ANY, checked_origin
from fastapi_hardening.security.auth.jwk import InvalidKey, KeySet, VerificationKey, kid_of_secret
from fastapi_hardening.security.auth.jwt import JwtSettings
from fastapi_hardening.security.auth.keys import KeySource, RemoteKeys, RemoteKeysSettings, StaticKeys
from fastapi_hardening.security.auth.rbac import RbacSettings, checked_permission

_SHORTEST_SECRET = 32
_SHORTEST_PASSWORD = 12


class BasicSettings(ConcernSettings):
    """HTTP Basic for operations: a few users that the deployment names."""

    users: dict[str, SecretStr] = Field(default_factory=dict)
    """Passwords by user name; at least 12 characters each."""

    realm: str = "operations"
    """What a browser shows where it asks for the password."""

    roles: tuple[str, ...] = ()
    """The roles that these users have."""

    permissions: tuple[str, ...] = ()
    """The permissions that these users have, beside those of their roles."""

    @field_validator("users")
    @classmethod
    def _can_be_sent(cls, users: dict[str, SecretStr]) -> dict[str, SecretStr]:
        for name, password in users.items():
            if not name or ":" in name:
                raise ValueError(f"{name!r}: a user name for HTTP Basic is not empty and has no colon (RFC 7617)")
            if len(password.get_secret_value()) < _SHORTEST_PASSWORD:
                raise ValueError(
                    f"the password of {name!r} is shorter than {_SHORTEST_PASSWORD} characters; "
                    "`openssl rand -hex 16` makes one"
                )
        return users

    @field_validator("realm")
    @classmethod
    def _is_quotable(cls, realm: str) -> str:
        header_fields.field("realm", realm.replace('"', "\n").replace("\\", "\n"))
        return realm

    @field_validator("permissions")
    @classmethod
    def _are_permissions(cls, permissions: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(checked_permission, permissions))


class SessionSettings(ConcernSettings):
    """Sessions in a cookie."""

    secrets: tuple[SecretStr, ...] = ()
    """What cookies are signed with, at least 32 bytes each: the first signs, all are taken. To change it, put the new
    one in front and take the old one out after ``absolute_seconds``."""

    storage: Literal["cookie", "store"] = "cookie"
    """Where a session is kept: signed in the ``cookie``, or in the state ``store`` with only an id in the cookie."""

    cookie: str = "session"
    """The name of the cookie; ``__Host-`` stands before it on https."""

    secure: bool | None = None
    """Whether the cookie is for https only; unset, it is where the request came by https."""

    same_site: Literal["lax", "strict"] = "lax"
    """Whether the cookie comes along when another site links here (``lax``) or never from elsewhere (``strict``)."""

    idle_seconds: float = Field(1800.0, gt=0)
    """A session ends when nothing was asked for so long."""

    absolute_seconds: float = Field(43_200.0, gt=0)
    """A session ends so long after its login, whatever was asked."""

    @field_validator("secrets")
    @classmethod
    def _are_long(cls, secrets: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        for secret in secrets:
            if len(secret.get_secret_value().encode()) < _SHORTEST_SECRET:
                raise ValueError(f"a secret needs at least {_SHORTEST_SECRET} bytes; `openssl rand -hex 32` makes one")
        return secrets

    @field_validator("cookie")
    @classmethod
    def _is_a_name(cls, cookie: str) -> str:
        header_fields.field(cookie, "x")
        if cookie.startswith("__"):
            raise ValueError(f"{cookie!r}: leave the prefix out; '__Host-' is put before the name on https")
        return cookie

    @model_validator(mode="after")
    def _fit_together(self) -> "SessionSettings":
        if self.absolute_seconds < self.idle_seconds:
            raise ValueError(
                f"absolute_seconds ({self.absolute_seconds:g}) is below idle_seconds ({self.idle_seconds:g}): "
                "no session would ever be idle for so long"
            )
        return self


class BearerSettings(JwtSettings):
    """Bearer tokens of one issuer. Its keys are found by OpenID Connect Discovery, unless something else is set."""

    jwks_url: str | None = None
    """The address of its JWK set, for an issuer that has no metadata."""

    secrets: tuple[SecretStr, ...] = ()
    """Secrets that it shares with this application, the current one first; at least 32 bytes each. The allow list must
    name ``HS256``. Tokens have no ``kid``, or the one that ``SigningKey`` makes of the secret."""

    public_keys: tuple[str, ...] = ()
    """Its public keys as PEM, the current one first; for tokens without a ``kid``."""

    jwks: str | None = None
    """Its JWK set, written down as JSON; for tokens that name their key by ``kid``."""

    allow_loopback_http: bool = False
    """Whether an issuer on this machine may be asked without TLS; for development."""

    @model_validator(mode="after")
    def _keys_of_one_kind(self) -> "BearerSettings":
        if sum(map(bool, (self.jwks_url, self.secrets, self.public_keys, self.jwks))) > 1:
            raise ValueError("jwks_url, jwks, secrets and public_keys: one of them says where the keys come from")
        keys_of(self)
        return self


def keys_of(settings: BearerSettings, *, clock: Clock | None = None, events: Events | None = None) -> KeySource:
    """Where the keys of an issuer come from.

    Raises:
        ValueError: A key cannot be used with what the allow list names, or an address is not https.
    """
    if settings.secrets:
        algorithm = next((name for name in settings.algorithms if name.startswith("HS")), None)
        if algorithm is None:
            raise ValueError("secrets are for HMAC: set algorithms to HS256")
        # Each without a name, and by the name that tokens of our own issuer have.
        return StaticKeys(
            *(
                VerificationKey.from_secret(secret, algorithm, kid=kid)
                for secret in settings.secrets
                for kid in (None, kid_of_secret(secret.get_secret_value().encode()))
            )
        )
    if settings.public_keys:
        return StaticKeys(*(_public_key(pem, settings.algorithms) for pem in settings.public_keys))
    issuer = settings.issuer if settings.jwks_url is None else None
    usable = tuple(name for name in settings.algorithms if not name.startswith("HS"))
    if settings.jwks is not None:
        return StaticKeys(KeySet.from_jwks(settings.jwks, algorithms=usable, public=True))
    remote = RemoteKeysSettings(
        issuer=issuer,
        jwks_url=settings.jwks_url,
        algorithms=usable,
        allow_loopback_http=settings.allow_loopback_http,
    )
    return RemoteKeys(remote, clock=clock, events=events)


def _public_key(pem: str, algorithms: Sequence[str]) -> VerificationKey:
    """A public key, for the first of the algorithms that is one of its kind."""
    for algorithm in algorithms[:-1]:
        try:
            return VerificationKey.from_pem(pem, algorithm)
        except InvalidKey:
            continue
    return VerificationKey.from_pem(pem, algorithms[-1])


class AuthSettings(ConcernSettings):
    """The settings of authentication."""

    default: Literal["optional", "required"] = "optional"
    """Whether a route that says nothing demands a caller who is known; ``required`` closes all but ``Public()``."""

    resource_metadata: str | None = None
    """The address of the protected resource metadata (RFC 9728) that Bearer challenges name."""

    trusted_origins: tuple[str, ...] = ()
    """Other origins whose pages may send unsafe requests with the cookies of this one."""

    operations_permission: str | None = None
    """Who has this permission may read the metrics and the details of the health report, beside their tokens."""

    rbac: RbacSettings = RbacSettings()
    """Roles and their permissions."""

    jwt: BearerSettings | None = None
    """Bearer tokens of an issuer."""

    basic: BasicSettings | None = None
    """HTTP Basic for operations."""

    session: SessionSettings | None = None
    """Sessions in a cookie."""

    @field_validator("trusted_origins")
    @classmethod
    def _are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        if ANY in origins:
            raise ValueError("'*' would let every site act for your users; name the origins that you trust")
        return tuple(map(checked_origin, origins))

    @field_validator("resource_metadata")
    @classmethod
    def _is_an_address(cls, address: str | None) -> str | None:
        if address is not None:
            if not address.startswith(("https://", "http://localhost", "http://127.0.0.1")):
                raise ValueError(f"{address!r} is no https address (RFC 9728, section 3)")
            header_fields.field("x", address.replace('"', "\n").replace("\\", "\n"))
        return address

    @field_validator("operations_permission")
    @classmethod
    def _is_a_permission(cls, permission: str | None) -> str | None:
        return None if permission is None else checked_permission(permission, wildcards=False)

    @model_validator(mode="after")
    def _closes_something(self) -> "AuthSettings":
        if self.default == "required" and not self.enabled:
            raise ValueError("enabled is false, so default='required' would close nothing; leave one of them out")
        return self
