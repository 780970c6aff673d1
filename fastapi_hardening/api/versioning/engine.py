"""Decides which version a request gets, and what is told about it; without ASGI."""

from collections.abc import Callable, Iterable
from datetime import UTC
from email.utils import format_datetime
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter

from fastapi_hardening.api.versioning.problems import VersionGone, VersionNotServed
from fastapi_hardening.api.versioning.settings import Source, VersioningSettings
from fastapi_hardening.core import headers as header_fields
from fastapi_hardening.core.clock import Clock, SystemClock
from fastapi_hardening.core.headers import RawHeaders
from fastapi_hardening.core.routes import RouteEntry

UNMATCHED = "unmatched"

_STATUS = {"path": 404, "media-type": 406}


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


def measure(registry: CollectorRegistry) -> Callable[[str | None, RouteEntry], None]:
    """Counts requests in ``hardening_api_version_requests_total``, by version and route."""
    counter = Counter(
        "hardening_api_version_requests",
        "Requests by the version of the API that they get.",
        ("version", "handler"),
        registry=registry,
    )
    # Finding a series takes longer than counting; there are as many as routes and versions.
    found: dict[tuple[str, str], Counter] = {}

    def count(version: str | None, entry: RouteEntry) -> None:
        labels = (version or "none", entry.template or UNMATCHED)
        series = found.get(labels)
        if series is None:
            series = found[labels] = counter.labels(*labels)
        series.inc()

    return count
