"""Finds out which version of the API a request asks for, and tells the clients of an old one that it will end.

It protects from two surprises: a client that asks for a version that nobody serves and gets another one, and an old
version that ends without its clients having been told in the language of machines (RFC 9745, RFC 8594). It is *not* a
router: it neither rewrites a path nor chooses between two functions at one path. Whatever the request asks for, the
route that matches its path runs, or is refused.

It sits above authentication: which version is asked for needs no I/O, and an answer that tells of the end of a version
is for everybody.

Example:
    >>> from fastapi import FastAPI
    >>> from fastapi_hardening.api.versioning import CurrentVersion, Version, VersioningMiddleware, VersioningSettings
    >>> app = FastAPI()
    >>> app.add_middleware(VersioningMiddleware, settings=VersioningSettings(versions=("1", "2"), default="1"))
    >>> @app.get("/orders", dependencies=[Version(since="1")])
    ... async def orders(version: CurrentVersion) -> str:
    ...     return f"orders as of version {version}"
"""

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC
from email.utils import format_datetime
from typing import Annotated, Any, Literal, NamedTuple, Self
from urllib.parse import parse_qsl

from fastapi import Depends, FastAPI
from prometheus_client import CollectorRegistry, Counter
from pydantic import AwareDatetime, field_validator, model_validator
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_hardening.core import context as request_context
from fastapi_hardening.core import headers as header_fields
from fastapi_hardening.core import openapi
from fastapi_hardening.core.clock import Clock, SystemClock
from fastapi_hardening.core.configuration import ConcernSettings, ConfigurationError, Section, from_json
from fastapi_hardening.core.headers import RawHeaders
from fastapi_hardening.core.policy import Override, mark_handled
from fastapi_hardening.core.problem import OWN, Problem, refuse, tell
from fastapi_hardening.core.routes import RouteEntry, RouteTable, route_of, route_path, table_of

LAYER = "version"
UNMATCHED = "unmatched"

Source = Literal["path", "header", "query", "media-type"]

# What a version looks like: 2, 2.1, 2026-11-25.
_VERSION = re.compile(r"[0-9][0-9A-Za-z.-]{0,31}")
_URL = re.compile(r"(?:https?://|/)[!#-+.-:=?-~-]+")
_STARTS = frozenset({"http.response.start", "websocket.accept", "websocket.http.response.start"})
_STATUS = {"path": 404, "media-type": 406}


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
            if not _VERSION.fullmatch(version):
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


# --- problems ---------------------------------------------------------------------------------------------------------


class VersionNotServed(Problem):
    """The version that is asked for does not exist, or not on this route."""

    status = 400
    type = OWN + "version-not-served"
    title = "Version not served"


class VersionGone(Problem):
    """The version that is asked for is past its sunset."""

    status = 410
    type = OWN + "version-gone"
    title = "Version gone"


# --- engine -----------------------------------------------------------------------------------------------------------


class Asked(NamedTuple):
    """What one source of a request asks for."""

    source: Source
    version: str


class Versions:
    """Decides which version a request gets, and what is told about it.

    Args:
        settings: The versions and their ends.
        clock: Where the time comes from.

    Attributes:
        count: Told of the version and the route of every request.

    Example:
        >>> versions = Versions(VersioningSettings(versions=("1", "2"), default="1"))
        >>> versions.decide([Asked("header", "2")], None), versions.decide([], None)
        ('2', '1')
    """

    def __init__(self, settings: VersioningSettings | None = None, *, clock: Clock | None = None) -> None:
        self.settings = settings = settings or VersioningSettings()
        self.count: Callable[[str | None, RouteEntry], None] | None = None
        self._now = (clock or SystemClock()).time
        self._known = frozenset(settings.versions)
        self._policies = {policy.version: policy for policy in settings.deprecated}
        self._gone_at = {
            version: policy.sunset.timestamp()
            for version, policy in self._policies.items()
            if policy.sunset is not None and settings.after_sunset == "gone"
        }
        self.fields: dict[str | None, RawHeaders] = {version: self._fields(version) for version in settings.versions}
        self.fields[None] = self._fields(None)

    def decide(self, asked: Iterable[Asked], served: tuple[str, ...] | None) -> str | None:
        """The version of a request; ``None`` where nothing says which.

        Args:
            asked: What the request asks for.
            served: What the route serves; ``None`` for every version.

        Raises:
            VersionNotServed: There is no such version, not on this route, or several are asked for.
            VersionGone: It is past its sunset.
        """
        known = self.settings.versions if served is None else served
        version: str | None = None
        for source, name in asked:
            # People write v2 as well.
            wanted = name if name in self._known else name.removeprefix("v")
            if wanted not in known:
                self._refuse("The version that the request asks for is not served here.", known, source)
            if version not in (None, wanted):
                self._refuse("The request asks for several versions.", known, source)
            version = wanted
        if version is None:
            default = self.settings.default
            version = default if default in known else known[0] if len(known) == 1 else None
            if version is None and self.settings.required:
                self._refuse("The request does not say which version it asks for.", known)
        if version in self._gone_at and self._now() >= self._gone_at[version]:
            raise VersionGone(
                "This version is not served any more.",
                headers=self._end_of(version),
                extensions={"supported": self._living(known)},
            )
        return version

    def _refuse(self, detail: str, known: tuple[str, ...], source: Source | None = None) -> None:
        status = _STATUS.get(source or "", 400)
        raise VersionNotServed(detail, status=status, extensions={"supported": self._living(known)})

    def _living(self, versions: tuple[str, ...]) -> list[str]:
        now = self._now()
        return [each for each in versions if now < self._gone_at.get(each, now + 1)]

    def _end_of(self, version: str) -> dict[str, str]:
        policy = self._policies.get(version)
        if policy is None:
            return {}
        # RFC 9745, section 2: a date of structured fields (RFC 9651, section 3.3.7).
        said = {"Deprecation": f"@{int(policy.since.timestamp())}"}
        relations = ["deprecation"]
        if policy.sunset is not None:
            said["Sunset"] = format_datetime(policy.sunset.astimezone(UTC), usegmt=True)
            relations.append("sunset")
        if policy.link is not None:
            said["Link"] = ", ".join(f'<{policy.link}>; rel="{relation}"; type="text/html"' for relation in relations)
        return said

    def _fields(self, version: str | None) -> RawHeaders:
        """What answers of a version carry."""
        fields = [] if version is None else [(self.settings.header, version), *self._end_of(version).items()]
        # Caches must not give the answer of one version to who asks for another (RFC 9110, section 12.5.5).
        varies = {"header": self.settings.header, "media-type": "Accept"}
        fields += [("Vary", varies[source]) for source in self.settings.sources if source in varies]
        return [header_fields.field(name, value) for name, value in fields]


# --- layer ------------------------------------------------------------------------------------------------------------


class _Reader:
    """Reads which versions a request asks for."""

    def __init__(self, settings: VersioningSettings) -> None:
        self._prefix = settings.path_prefix if "path" in settings.sources else None
        self._header = settings.header.lower().encode("ascii") if "header" in settings.sources else None
        self._query = settings.query_parameter if "query" in settings.sources else None
        self._media = settings.media_type_parameter.lower() if "media-type" in settings.sources else None

    def asked(self, scope: Scope) -> Iterator[Asked]:
        """What the request asks for, each source once for each value."""
        if self._prefix is not None:
            name = self.of_path(route_path(scope["path"], scope.get("root_path", "")))
            if name is not None:
                yield Asked("path", name)
        if self._header is not None:
            for value in header_fields.get_all(scope["headers"], self._header):
                yield Asked("header", value.decode("latin-1").strip())
        if self._query is not None and scope.get("query_string"):
            for key, text in parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True):
                if key == self._query:
                    yield Asked("query", text)
        if self._media is not None:
            for value in header_fields.get_all(scope["headers"], b"accept"):
                yield from self._of_accept(value.decode("latin-1"))

    def of_path(self, path: str) -> str | None:
        """The version in a path: ``2`` in ``/v2/orders``; nothing in ``/videos``."""
        if self._prefix is None or not path.startswith(self._prefix):
            return None
        name = path[len(self._prefix) :].partition("/")[0]
        return name if _VERSION.fullmatch(name) else None

    def _of_accept(self, value: str) -> Iterator[Asked]:
        # What is refused by its weight (q=0) is not looked at: nobody writes a version to say that it is unwanted.
        for media_range in value.split(","):
            for parameter in media_range.split(";")[1:]:
                name, _, text = parameter.partition("=")
                if name.strip().lower() == self._media:
                    yield Asked("media-type", text.strip().strip('"'))


class VersioningMiddleware:
    """Finds the version of every request, refuses what is not served, and tells of versions that will end.

    Args:
        app: The application inside.
        settings: The versions and their ends.
        versions: The engine, made already; then settings are left out.
        clock: Where the time comes from.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: VersioningSettings | None = None,
        *,
        versions: Versions | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.app = app
        self._versions = versions or Versions(settings, clock=clock)
        self._reader = _Reader(self._versions.settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        context = request_context.ensure(scope)
        entry = route_of(scope)
        context.state[Versions] = self._versions
        overrides = entry.of(Version)
        mark_handled(scope, overrides)
        try:
            version = self._versions.decide(self._reader.asked(scope), served_by(entry, self._versions.settings))
        except Problem as problem:
            # A cache may keep a 410, and must not answer with it who asks for another version.
            await refuse(problem, scope, receive, _adding(send, self._versions.fields[None]), layer=LAYER)
            return
        context.version = version
        if self._versions.count is not None:
            self._versions.count(version, entry)
        fields = self._versions.fields[version]
        await self.app(scope, receive, _adding(send, fields) if fields else send)


def _adding(send: Send, fields: RawHeaders) -> Send:
    async def send_with_fields(message: Message) -> None:
        if message["type"] in _STARTS:
            headers = list(message.get("headers") or ())
            names = {name.lower() for name, _ in headers}
            # What the application says of this one route wins; of these two there may be several.
            headers += [pair for pair in fields if pair[0] not in names or pair[0] in (b"vary", b"link")]
            message["headers"] = headers
        await send(message)

    return send_with_fields


def measure(registry: CollectorRegistry) -> Callable[[str | None, RouteEntry], None]:
    """Counts requests in ``hardening_api_version_requests_total``, by version and route."""
    counter = Counter(
        "hardening_api_version_requests",
        "Requests by the version of the API that they get.",
        ("version", "handler"),
        registry=registry,
    )
    return lambda version, entry: counter.labels(version or "none", entry.template or UNMATCHED).inc()


# --- override ---------------------------------------------------------------------------------------------------------


class Version(Override):
    """The versions that a route serves: some by name, or a range of those in the settings; the innermost counts.

    Args:
        names: Versions by name.
        since: The first one.
        until: The last one, included.

    Raises:
        ValueError: Nothing is said, or both names and a range.

    Example:
        >>> settings = VersioningSettings(versions=("1", "2", "3"))
        >>> Version("1", "3").of(settings.versions), Version(since="2").of(settings.versions)
        (('1', '3'), ('2', '3'))
    """

    def __init__(self, *names: str, since: str | None = None, until: str | None = None) -> None:
        super().__init__()
        if bool(names) == (since is not None or until is not None):
            raise ValueError("write the versions by name, Version('1', '2'), or as a range, Version(since='2')")
        self.names = names
        self.since = since
        self.until = until

    def of(self, versions: tuple[str, ...]) -> tuple[str, ...]:
        """Which of all versions, the oldest first, these are; one that does not exist begins or ends no range."""
        if self.names:
            return tuple(version for version in versions if version in self.names)
        first = 0 if self.since is None else _place(versions, self.since)
        last = len(versions) - 1 if self.until is None else _place(versions, self.until)
        return versions[first : last + 1] if first >= 0 and last >= 0 else ()

    async def act_late(self, connection: HTTPConnection) -> None:
        """Refuses a request that a middleware has moved here and that asked for another version."""
        context = request_context.ensure(connection.scope)
        versions: Versions | None = context.state.get(Versions)
        if versions is None or context.version is None:
            return
        try:
            versions.decide([Asked("header", context.version)], self.of(versions.settings.versions))
        except Problem as problem:
            tell(problem, context, LAYER)
            raise


def _place(versions: tuple[str, ...], version: str) -> int:
    return versions.index(version) if version in versions else -1


def served_by(entry: RouteEntry, settings: VersioningSettings) -> tuple[str, ...] | None:
    """The versions that a route serves; ``None`` where it does not say so."""
    overrides = entry.of(Version)
    innermost = overrides[-1] if overrides else None
    return innermost.of(settings.versions) if isinstance(innermost, Version) else None


async def _version(connection: HTTPConnection) -> str | None:
    context = request_context.of(connection.scope)
    return None if context is None else context.version


CurrentVersion = Annotated[str | None, Depends(_version)]
"""In a signature: the version that the request gets, ``None`` where nothing says which."""


# --- routes and their description -------------------------------------------------------------------------------------


def check_routes(table: RouteTable, settings: VersioningSettings) -> None:
    """Refuses routes that name versions which do not exist, and functions that no request can reach.

    Raises:
        ConfigurationError: With the route and what to do.
    """
    if not settings.enabled:
        return
    reader, known = _Reader(settings), ", ".join(settings.versions)
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
    reader = _Reader(settings)
    for entry in table_of(app):
        in_path = reader.of_path(entry.template or "")
        served = served_by(entry, settings)
        if served is None and in_path is not None:
            served = (in_path,)
        for method in entry.methods or ():
            operation = paths.get(entry.template or "", {}).get(method.lower())
            if operation is not None:
                yield operation, served
