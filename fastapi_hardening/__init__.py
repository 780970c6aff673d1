"""Hardens any FastAPI application with one call.

Example:
    >>> from fastapi import FastAPI
    >>> from fastapi_hardening import harden
    >>> app = FastAPI()
    >>> handle = harden(app)
"""

from fastapi_hardening.api.idempotency import Idempotent
from fastapi_hardening.api.tenancy import CurrentTenant, RequireTenant, Tenant, current_tenant
from fastapi_hardening.api.versioning import CurrentVersion, Version
from fastapi_hardening.core.check import CheckResult
from fastapi_hardening.core.configuration import ConfigurationError
from fastapi_hardening.core.identity import Principal
from fastapi_hardening.core.problem import Problem
from fastapi_hardening.handle import Hardening
from fastapi_hardening.harden import harden
from fastapi_hardening.observability.access_log import configure_logging
from fastapi_hardening.observability.request_context import CurrentRequest, RequestId
from fastapi_hardening.performance.response_cache import CacheResponse
from fastapi_hardening.resilience.concurrency import Bulkhead
from fastapi_hardening.resilience.degradation import Feature
from fastapi_hardening.resilience.load_shedding import Priority
from fastapi_hardening.resilience.timeout import Timeout
from fastapi_hardening.security.auth.overrides import (
    Authorize,
    CurrentUser,
    OptionalUser,
    Public,
    RequirePermissions,
    RequireRoles,
    RequireScopes,
    RequireUser,
)
from fastapi_hardening.security.cors import Cors
from fastapi_hardening.security.input_validation import InputPolicy
from fastapi_hardening.security.rate_limit import RateLimit
from fastapi_hardening.security.request_limits import RequestLimits
from fastapi_hardening.security.security_headers import CspNonce, SecurityHeaders, csp_nonce_context
from fastapi_hardening.security.websocket_limits import WebSocketLimits
from fastapi_hardening.settings import Settings

__all__ = [
    "Authorize",
    "Bulkhead",
    "CacheResponse",
    "CheckResult",
    "ConfigurationError",
    "Cors",
    "CspNonce",
    "CurrentRequest",
    "CurrentTenant",
    "CurrentUser",
    "CurrentVersion",
    "Feature",
    "Hardening",
    "Idempotent",
    "InputPolicy",
    "OptionalUser",
    "Principal",
    "Priority",
    "Problem",
    "Public",
    "RateLimit",
    "RequestId",
    "RequestLimits",
    "RequirePermissions",
    "RequireRoles",
    "RequireScopes",
    "RequireTenant",
    "RequireUser",
    "SecurityHeaders",
    "Settings",
    "Tenant",
    "Timeout",
    "Version",
    "WebSocketLimits",
    "configure_logging",
    "csp_nonce_context",
    "current_tenant",
    "harden",
]

__version__ = "0.1.0"
