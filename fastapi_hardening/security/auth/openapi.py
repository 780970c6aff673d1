"""What the OpenAPI document says of authentication: the schemes, what each operation demands, its 401 and 403."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI

from fastapi_hardening.core import openapi
from fastapi_hardening.core.identity import Authenticator
from fastapi_hardening.core.routes import RouteEntry, table_of
from fastapi_hardening.security.auth.gate import Gate
from fastapi_hardening.security.auth.overrides import RequireScopes, is_open, requirements_of

_CHALLENGE = {"WWW-Authenticate": {"description": "How to authenticate.", "schema": {"type": "string"}}}


def describe(app: FastAPI, gate: Gate) -> None:
    """Has an application's document tell what is demanded; a second call changes nothing."""
    if gate.authenticators:
        openapi.amend(app, _Description(app, gate))


def scheme_of(authenticator: Authenticator) -> dict[str, Any] | None:
    """An authenticator as a security scheme object; ``None`` where OpenAPI has no words for it.

    It may say so itself, by an attribute ``openapi``; else its challenge is read.
    """
    own: Mapping[str, Any] | None = getattr(authenticator, "openapi", None)
    if own is not None:
        return dict(own)
    scheme = authenticator.challenge.partition(" ")[0].lower()
    return {"type": "http", "scheme": scheme} if scheme in ("bearer", "basic", "digest") else None


@dataclass(frozen=True)
class _Description:
    """The amendment of one application's document; equal to another one of the same application."""

    app: FastAPI
    gate: Gate

    def __call__(self, document: openapi.Document) -> None:
        schemes = {each.scheme: scheme for each in self.gate.authenticators if (scheme := scheme_of(each)) is not None}
        declared = document.setdefault("components", {}).setdefault("securitySchemes", {})
        for name, scheme in schemes.items():
            declared.setdefault(name, scheme)
        paths: Mapping[str, Any] = document.get("paths") or {}
        for entry in table_of(self.app):
            for method in entry.methods or ():
                operation = paths.get(entry.template or "", {}).get(method.lower())
                if operation is not None and not is_open(entry, required=self.gate.required):
                    _amend(operation, entry, list(schemes))


def _amend(operation: dict[str, Any], entry: RouteEntry, schemes: list[str]) -> None:
    requirements = requirements_of(entry)
    scopes = sorted({scope for each in requirements if isinstance(each, RequireScopes) for scope in each.scopes})
    # What the route declares by a security dependency of FastAPI stays as it is.
    operation.setdefault("security", [{scheme: scopes} for scheme in schemes])
    answers = operation.setdefault("responses", {})
    answers.setdefault("401", _answer(answers, "Who calls is not known") | {"headers": _CHALLENGE})
    if requirements:
        answers.setdefault("403", _answer(answers, "The caller may not do this"))


def _answer(answers: Mapping[str, Any], description: str) -> dict[str, Any]:
    """An answer with the body that errors have, where the document says what that is."""
    content = answers.get("4XX", {}).get("content")
    return {"description": description} | ({} if content is None else {"content": content})
