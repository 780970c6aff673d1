"""Authentication: who calls, whether the route lets them, and the credentials to say so with.

A gate asks authenticators; the layer enforces what the settings and the routes demand; overrides say it on a route. See
:mod:`fastapi_hardening.security.auth.layer` for where it sits and why.
"""

from fastapi_hardening.core.identity import Authenticator, InvalidCredentials, Principal
from fastapi_hardening.security.auth.api_key import (
    ApiKeyAuthenticator,
    ApiKeyRecord,
    ApiKeys,
    ApiKeyStore,
    IssuedKey,
    MemoryApiKeyStore,
)
from fastapi_hardening.security.auth.basic import BasicAuthenticator
from fastapi_hardening.security.auth.gate import Gate
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
from fastapi_hardening.security.auth.session import Sessions
from fastapi_hardening.security.auth.settings import AuthSettings, BasicSettings, SessionSettings
from fastapi_hardening.security.auth.ticket import Tickets

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
    "CredentialsRefused",
    "CrossSiteRefused",
    "Csrf",
    "CurrentUser",
    "Gate",
    "InvalidCredentials",
    "IssuedKey",
    "MemoryApiKeyStore",
    "NotAllowed",
    "NotAuthenticated",
    "OptionalUser",
    "Permissions",
    "Principal",
    "Public",
    "Rbac",
    "RbacSettings",
    "RequirePermissions",
    "RequireRoles",
    "RequireScopes",
    "RequireUser",
    "Requirement",
    "SessionSettings",
    "Sessions",
    "Tickets",
    "require_permissions",
]
