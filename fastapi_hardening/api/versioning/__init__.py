"""Finds out which version of the API a request asks for, and tells the clients of an old one that it will end.

It protects from two surprises: a client that asks for a version that nobody serves and gets another one, and an old
version that ends without its clients having been told in the language of machines (RFC 9745, RFC 8594). It is *not* a
router: it neither rewrites a path nor chooses between two functions at one path. Whatever the request asks for, the
route that matches its path runs, or is refused.

It sits above authentication: which version is asked for needs no I/O, and an answer that tells of the end of a version
is for everybody.
"""

from fastapi_hardening.api.versioning.description import check_routes, describe, document_of
from fastapi_hardening.api.versioning.engine import Asked, Versions, measure
from fastapi_hardening.api.versioning.layer import VersioningMiddleware
from fastapi_hardening.api.versioning.overrides import CurrentVersion, Version
from fastapi_hardening.api.versioning.problems import VersionGone, VersionNotServed
from fastapi_hardening.api.versioning.settings import DeprecationPolicy, VersioningSettings

__all__ = [
    "Asked",
    "CurrentVersion",
    "DeprecationPolicy",
    "Version",
    "VersionGone",
    "VersionNotServed",
    "VersioningMiddleware",
    "VersioningSettings",
    "Versions",
    "check_routes",
    "describe",
    "document_of",
    "measure",
]
