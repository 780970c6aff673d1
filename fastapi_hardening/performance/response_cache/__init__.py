"""Answers that are kept; see :mod:`fastapi_hardening.performance.response_cache.layer` for where it sits and why."""

from fastapi_hardening.performance.response_cache.asked import CacheResponse
from fastapi_hardening.performance.response_cache.layer import OnlyIfCached, ResponseCacheMiddleware
from fastapi_hardening.performance.response_cache.settings import ResponseCacheSettings

__all__ = ["CacheResponse", "OnlyIfCached", "ResponseCacheMiddleware", "ResponseCacheSettings"]
