"""Which routes cannot be meant, and what the OpenAPI document says of versions."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI

from fastapi_hardening.api.versioning.engine import Versions
from fastapi_hardening.api.versioning.overrides import Version, served_by
from fastapi_hardening.api.versioning.reader import Reader
from fastapi_hardening.api.versioning.settings import VersioningSettings
from fastapi_hardening.core import openapi
from fastapi_hardening.core.configuration import ConfigurationError
from fastapi_hardening.core.routes import RouteTable, table_of


def check_routes(table: RouteTable, settings: VersioningSettings) -> None:
    """Refuses routes that name versions which do not exist, and functions that no request can reach.

    Raises:
        ConfigurationError: With the route and what to do.
    """
    if not settings.enabled:
        return
    reader, known = Reader(settings), ", ".join(settings.versions)
    marked: dict[tuple[str | None, str, str], bool] = {}
    for entry in table:
        in_path = reader.of_path(entry.template or "")
        if in_path is not None and in_path not in settings.versions:
            raise ConfigurationError(f"{entry.template}: version {in_path} is not in versioning.versions; add it there")
        overrides = [each for each in entry.of(Version) if isinstance(each, Version)]
        for each in overrides:
            if {*each.names, each.since, each.until} - {None, *settings.versions} or not each.of(settings.versions):
                raise ConfigurationError(
                    f"{entry.template}: {each!r} does not fit versioning.versions ({known}); correct one of them"
                )
        for method in entry.methods or ("",):
            key = (entry.template, method, entry.kind)
            if key in marked and (overrides or marked[key]):
                raise ConfigurationError(
                    f"{method} {entry.template} is served by two functions, and the router takes the first; give each "
                    "version a path of its own, or write one function that asks for CurrentVersion"
                )
            marked[key] = bool(overrides)


@dataclass(frozen=True)
class _Description:
    """The amendment of one application's document; equal to another one of the same application."""

    app: FastAPI
    versions: Versions

    def __call__(self, document: openapi.Document) -> None:
        deprecated = {policy.version for policy in self.versions.settings.deprecated}
        for operation, served in _operations(self.app, document, self.versions.settings):
            if served is not None and deprecated.issuperset(served):
                operation["deprecated"] = True


def describe(app: FastAPI, versions: Versions) -> None:
    """Has an application's document say which operations are deprecated; a second call changes nothing."""
    openapi.amend(app, _Description(app, versions))


def document_of(app: FastAPI, version: str, settings: VersioningSettings) -> openapi.Document:
    """The OpenAPI document of one version: the operations that serve it, and those that say nothing of versions.

    Raises:
        ValueError: There is no such version.
    """
    if version not in settings.versions:
        raise ValueError(f"{version!r} is not among the versions {', '.join(settings.versions)}")
    document = copy.deepcopy(app.openapi())
    foreign = [
        id(operation)
        for operation, served in _operations(app, document, settings)
        if served is not None and version not in served
    ]
    paths: dict[str, Any] = document.get("paths") or {}
    for path, item in list(paths.items()):
        paths[path] = {key: value for key, value in item.items() if id(value) not in foreign}
        if not any(isinstance(value, dict) for value in paths[path].values()):
            del paths[path]
    document["info"] = {**document["info"], "version": version}
    return document


def _operations(
    app: FastAPI, document: openapi.Document, settings: VersioningSettings
) -> Iterator[tuple[dict[str, Any], tuple[str, ...] | None]]:
    """Each operation of a document with the versions that it serves, by its mark or by its path."""
    paths: Mapping[str, Any] = document.get("paths") or {}
    reader = Reader(settings)
    for entry in table_of(app):
        in_path = reader.of_path(entry.template or "")
        served = served_by(entry, settings)
        if served is None and in_path is not None:
            served = (in_path,)
        for method in entry.methods or ():
            operation = paths.get(entry.template or "", {}).get(method.lower())
            if operation is not None:
                yield operation, served
