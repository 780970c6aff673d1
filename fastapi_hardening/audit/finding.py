"""What a check is given, what it gives, and where all of them are registered."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from fastapi_hardening.handle import Hardening, RoutePolicies
from fastapi_hardening.settings import Settings

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong, or that should be meant.

    Attributes:
        id: The check's id, which stays the same.
        severity: ``error``, ``warning`` or ``info``.
        message: What is so.
        fix: What to do.
    """

    id: str
    severity: Severity
    message: str
    fix: str


@dataclass(frozen=True, slots=True)
class Subject:
    """What is looked at.

    Attributes:
        app: The application.
        handle: Its handle.
        environ: The environment that it is to run in.
    """

    app: Any
    handle: Hardening
    environ: Mapping[str, str]

    @property
    def settings(self) -> Settings:
        """The settings in effect."""
        return self.handle.settings

    @property
    def workers(self) -> int:
        """How many processes the server is told to run; 1 if it is told nothing."""
        said = self.environ.get("WEB_CONCURRENCY") or self.environ.get("UVICORN_WORKERS") or "1"
        return int(said) if said.isdigit() else 1

    def routes(self) -> Iterator[RoutePolicies]:
        """The routes that have a template."""
        return (route for route in self.handle.routes() if route.template is not None)


Problems = Iterator[tuple[str, str]]


class Check(NamedTuple):
    """One check.

    Attributes:
        id: What it is called, for ever.
        severity: How bad what it finds is.
        title: What it looks for, in a few words.
        find: Gives what it found, each with what to do.
        everywhere: Whether it also holds where people develop.
    """

    id: str
    severity: Severity
    title: str
    find: Callable[[Subject], Problems]
    everywhere: bool


CHECKS: list[Check] = []


def check(
    number: int, severity: Severity, title: str, *, everywhere: bool = False
) -> Callable[[Callable[[Subject], Problems]], Callable[[Subject], Problems]]:
    """Registers a check; its docstring is what the documentation says."""

    def register(find: Callable[[Subject], Problems]) -> Callable[[Subject], Problems]:
        CHECKS.append(Check(f"FH{number:03d}", severity, title, find, everywhere))
        return find

    return register
