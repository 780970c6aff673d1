"""Hardens any FastAPI application with one call.

Example:
    >>> from fastapi import FastAPI
    >>> from fastapi_hardening import harden
    >>> app = FastAPI()
    >>> handle = harden(app)
"""

from fastapi_hardening.core.check import CheckResult
from fastapi_hardening.core.configuration import ConfigurationError
from fastapi_hardening.core.problem import Problem
from fastapi_hardening.handle import Hardening
from fastapi_hardening.harden import harden
from fastapi_hardening.observability.access_log import configure_logging
from fastapi_hardening.observability.request_context import CurrentRequest, RequestId
from fastapi_hardening.security.cors import Cors
from fastapi_hardening.security.input_validation import InputPolicy
from fastapi_hardening.security.rate_limit import RateLimit
from fastapi_hardening.security.request_limits import RequestLimits
from fastapi_hardening.security.security_headers import CspNonce, SecurityHeaders
from fastapi_hardening.settings import Settings

__all__ = [
    "CheckResult",
    "ConfigurationError",
    "Cors",
    "CspNonce",
    "CurrentRequest",
    "Hardening",
    "InputPolicy",
    "Problem",
    "RateLimit",
    "RequestId",
    "RequestLimits",
    "SecurityHeaders",
    "Settings",
    "configure_logging",
    "harden",
]

__version__ = "0.1.0"
