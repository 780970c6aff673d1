"""What a route says about versions: ``Version(since="2")``, ``version: CurrentVersion``."""

from typing import Annotated

from fastapi import Depends
from starlette.requests import HTTPConnection

from fastapi_hardening.api.versioning.engine import Asked, Versions
from fastapi_hardening.api.versioning.settings import VersioningSettings
from fastapi_hardening.core import context as request_context
from fastapi_hardening.core.policy import Override
from fastapi_hardening.core.problem import Problem, tell
from fastapi_hardening.core.routes import RouteEntry

LAYER = "version"


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
