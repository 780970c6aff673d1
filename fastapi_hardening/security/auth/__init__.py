"""Authentication: who calls, whether the route lets them, and the credentials to say so with.

A gate asks authenticators; the layer enforces what the settings and the routes demand; overrides say it on a route. See
:mod:`fastapi_hardening.security.auth.layer` for where it sits and why.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastapi_hardening.core.identity import Authenticator, CredentialsUnchecked, InvalidCredentials, Principal
from fastapi_hardening.security.auth.api_key import (
    ApiKeyAuthenticator,
    ApiKeyRecord,
    ApiKeys,
    ApiKeyStore,
    IssuedKey,
    MemoryApiKeyStore,
)
from fastapi_hardening.security.auth.basic import BasicAuthenticator
from fastapi_hardening.security.auth.bearer import BearerAuthenticator
from fastapi_hardening.security.auth.gate import Gate
from fastapi_hardening.security.auth.jwk import KeySet, VerificationKey
from fastapi_hardening.security.auth.jwt import JwtSettings, JwtVerifier
from fastapi_hardening.security.auth.keys import RemoteKeys, RemoteKeysSettings, RotatingKeys, StaticKeys
from fastapi_hardening.security.auth.layer import AuthenticationMiddleware
from fastapi_hardening.security.auth.overrides import (
    Authorize,
    Csrf,
    CurrentUser,
    OptionalUser,
    Public,
    Requirement,
    RequirePermissions,
    RequireRoles,
    RequireScopes,
    RequireUser,
    require_permissions,
)
from fastapi_hardening.security.auth.problems import (
    AuthenticationUnavailable,
    CredentialsRefused,
    CrossSiteRefused,
    NotAllowed,
    NotAuthenticated,
)
from fastapi_hardening.security.auth.rbac import Permissions, Rbac, RbacSettings
from fastapi_hardening.security.auth.revocation import Revocations
from fastapi_hardening.security.auth.session import Sessions
from fastapi_hardening.security.auth.settings import AuthSettings, BasicSettings, BearerSettings, SessionSettings
from fastapi_hardening.security.auth.ticket import Tickets

if TYPE_CHECKING:
    from fastapi_hardening.security.auth.introspection import IntrospectionAuthenticator, IntrospectionSettings
    from fastapi_hardening.security.auth.issuer import IssuerSettings, SigningKey, TokenIssuer
    from fastapi_hardening.security.auth.oauth2 import (
        OAuthClient,
        hash_client_secret,
        jwks_router,
        new_client_secret,
        token_router,
    )
    from fastapi_hardening.security.auth.passwords import (
        PasswordHasher,
        PasswordPolicy,
        PasswordRejected,
        PasswordSettings,
    )
    from fastapi_hardening.security.auth.throttle import LoginThrottle, ThrottleSettings

# Imported when they are asked for: who issues no tokens need not wait for what signs them.
_LATER = {
    "IntrospectionAuthenticator": "introspection",
    "IntrospectionSettings": "introspection",
    "IssuerSettings": "issuer",
    "LoginThrottle": "throttle",
    "OAuthClient": "oauth2",
    "PasswordHasher": "passwords",
    "PasswordPolicy": "passwords",
    "PasswordRejected": "passwords",
    "PasswordSettings": "passwords",
    "SigningKey": "issuer",
    "ThrottleSettings": "throttle",
    "TokenIssuer": "issuer",
    "hash_client_secret": "oauth2",
    "jwks_router": "oauth2",
    "new_client_secret": "oauth2",
    "token_router": "oauth2",
}

__all__ = [
    "ApiKeyAuthenticator",
    "ApiKeyRecord",
    "ApiKeyStore",
    "ApiKeys",
    "AuthSettings",
    "AuthenticationMiddleware",
    "AuthenticationUnavailable",
    "Authenticator",
    "Authorize",
    "BasicAuthenticator",
    "BasicSettings",
    "BearerAuthenticator",
    "BearerSettings",
    "CredentialsRefused",
    "CredentialsUnchecked",
    "CrossSiteRefused",
    "Csrf",
    "CurrentUser",
    "Gate",
    "IntrospectionAuthenticator",
    "IntrospectionSettings",
    "InvalidCredentials",
    "IssuedKey",
    "IssuerSettings",
    "JwtSettings",
    "JwtVerifier",
    "KeySet",
    "LoginThrottle",
    "MemoryApiKeyStore",
    "NotAllowed",
    "NotAuthenticated",
    "OAuthClient",
    "OptionalUser",
    "PasswordHasher",
    "PasswordPolicy",
    "PasswordRejected",
    "PasswordSettings",
    "Permissions",
    "Principal",
    "Public",
    "Rbac",
    "RbacSettings",
    "RemoteKeys",
    "RemoteKeysSettings",
    "RequirePermissions",
    "RequireRoles",
    "RequireScopes",
    "RequireUser",
    "Requirement",
    "Revocations",
    "RotatingKeys",
    "SessionSettings",
    "Sessions",
    "SigningKey",
    "StaticKeys",
    "ThrottleSettings",
    "Tickets",
    "TokenIssuer",
    "VerificationKey",
    "hash_client_secret",
    "jwks_router",
    "new_client_secret",
    "require_permissions",
    "token_router",
]


def __getattr__(name: str) -> Any:
    """What is imported when it is asked for (PEP 562)."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
