"""What an operator says of versions: which are served, where they are asked for, and when they end."""

import re
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import AwareDatetime, field_validator, model_validator

from fastapi_hardening.core import headers as header_fields
from fastapi_hardening.core.configuration import ConcernSettings, Section, from_json

Source = Literal["path", "header", "query", "media-type"]

# What a version looks like: 2, 2.1, 2026-11-25.
VERSION = re.compile(r"[0-9][0-9A-Za-z.-]{0,31}")
_URL = re.compile(r"(?:https?://|/)[!#-+.-:=?-~-]+")


class DeprecationPolicy(Section):
    """What the clients of an old version are told."""

    version: str
    """The version that will end."""

    since: AwareDatetime
    """When it was or will be deprecated, such as ``2026-07-01T00:00:00Z``."""

    sunset: AwareDatetime | None = None
    """When it is likely to stop answering."""

    link: str | None = None
    """The page that says how to move on."""

    @model_validator(mode="after")
    def _ends_after_it_began(self) -> Self:
        if self.sunset is not None and self.sunset < self.since:
            raise ValueError("sunset is before since; a version is deprecated before it ends (RFC 9745, section 4)")
        if self.link is not None and not _URL.fullmatch(self.link):
            raise ValueError(f"{self.link!r} is no address of a page, such as 'https://shop.example/docs/migration'")
        return self


class VersioningSettings(ConcernSettings):
    """The settings of API versions."""

    enabled: bool = False
    """Whether requests ask for versions; on by itself when another key is set."""

    versions: tuple[str, ...] = ()
    """The versions that are served, the oldest first, such as ``1, 2`` or ``2026-01-15, 2026-11-25``."""

    sources: tuple[Source, ...] = ("path", "header")
    """Where a version is asked for: ``path``, ``header``, ``query`` and ``media-type``, a parameter of ``Accept``."""

    path_prefix: str = "/v"
    """What stands before the version in a path: ``/v2/orders``."""

    header: str = "API-Version"
    """The header field, also of answers."""

    query_parameter: str = "api-version"
    """The parameter of the query."""

    media_type_parameter: str = "version"
    """The parameter of a media type, as in ``Accept: application/json; version=2``."""

    default: str | None = None
    """What a request gets that asks for none, where the route serves it."""

    required: bool = False
    """Whether a request must ask for a version where the route serves several and there is no default."""

    deprecated: tuple[DeprecationPolicy, ...] = ()
    """Versions that will end: since when they are deprecated, when they end, and where to read how to move on."""

    after_sunset: Literal["serve", "gone"] = "serve"
    """Whether a version is still served after its sunset, or answers 410."""

    @model_validator(mode="before")
    @classmethod
    def _on_when_set(cls, values: Any) -> Any:
        values = from_json(values) if isinstance(values, str) else values
        return {"enabled": True, **values} if isinstance(values, Mapping) and values else values

    @field_validator("versions")
    @classmethod
    def _are_versions(cls, versions: tuple[str, ...]) -> tuple[str, ...]:
        for version in versions:
            if not VERSION.fullmatch(version):
                raise ValueError(f"{version!r} is no version; it begins with a digit: '2', '2.1', '2026-11-25'")
        return versions

    @field_validator("header")
    @classmethod
    def _is_a_header(cls, header: str) -> str:
        header_fields.field(header, "x")
        return header

    @model_validator(mode="after")
    def _fit(self) -> Self:
        if self.enabled and not self.versions:
            raise ValueError("name the versions that are served: versions=('1', '2')")
        for version in (*(each.version for each in self.deprecated), self.default):
            if version is not None and version not in self.versions:
                raise ValueError(f"{version!r} is not among the versions {', '.join(self.versions)}")
        if not self.path_prefix.startswith("/"):
            raise ValueError(f"path_prefix {self.path_prefix!r} starts with a slash: '/v'")
        return self
