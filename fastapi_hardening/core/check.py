"""Health checks as concerns and applications declare them; when they run is the business of ``observability.health``.

Example:
    >>> checks = Checks()
    >>> @checks.add("database", critical=True)
    ... async def database() -> None:
    ...     await connection.execute("SELECT 1")
    >>> [check.name for check in checks]
    ['database']
"""

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, overload

Status = Literal["pass", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What a check found, as an ``application/health+json`` check object has it.

    Attributes:
        status: ``pass``, ``warn`` (works, but somebody should look) or ``fail``.
        output: A sentence for the operator; shown only where health details are.
        observed: The value measured, if there is one.
        unit: The unit of ``observed``.
    """

    status: Status = "pass"
    output: str | None = None
    observed: float | int | str | None = None
    unit: str | None = None


# A check passes when it returns None or True, fails when it raises or returns False, or says more with a CheckResult.
CheckFunction = Callable[[], Awaitable[CheckResult | bool | None] | CheckResult | bool | None]
F = TypeVar("F", bound=Callable[[], Any])


@dataclass(frozen=True, slots=True)
class Check:
    """One health check.

    Attributes:
        name: The key in the report.
        function: Called without arguments; a plain function runs in a thread.
        critical: Whether a failure makes the application not ready. Else it only warns.
        timeout_seconds: After this long the check has failed; ``None`` takes the setting ``health.timeout_seconds``.
        ttl_seconds: For this long a result is used again; ``None`` takes the setting ``health.ttl_seconds``.
    """

    name: str
    function: CheckFunction
    critical: bool = True
    timeout_seconds: float | None = None
    ttl_seconds: float | None = None


class Checks:
    """The health checks of one application; reachable as ``handle.checks``."""

    def __init__(self) -> None:
        self._checks: dict[str, Check] = {}

    def __iter__(self) -> Iterator[Check]:
        return iter(tuple(self._checks.values()))

    def __len__(self) -> int:
        return len(self._checks)

    @overload
    def add(
        self,
        name: str,
        function: None = None,
        *,
        critical: bool = True,
        timeout_seconds: float | None = None,
        ttl_seconds: float | None = None,
    ) -> Callable[[F], F]: ...

    @overload
    def add(
        self,
        name: str,
        function: F,
        *,
        critical: bool = True,
        timeout_seconds: float | None = None,
        ttl_seconds: float | None = None,
    ) -> F: ...

    def add(
        self,
        name: str,
        function: F | None = None,
        *,
        critical: bool = True,
        timeout_seconds: float | None = None,
        ttl_seconds: float | None = None,
    ) -> F | Callable[[F], F]:
        """Adds a check, as a call or as a decorator. May be called at any time.

        Args:
            name: The key in the report; unique.
            function: What to run: async, or plain (then in a thread).
            critical: Whether a failure makes the application not ready.
            timeout_seconds: After this long the check has failed.
            ttl_seconds: For this long a result is used again.

        Raises:
            ValueError: The name is taken, or a time is not positive.
        """
        if name in self._checks:
            raise ValueError(f"there is a health check named {name!r} already; give each its own name")
        if (timeout_seconds is not None and timeout_seconds <= 0) or (ttl_seconds is not None and ttl_seconds < 0):
            raise ValueError(f"health check {name!r}: timeout_seconds must be above 0, ttl_seconds at least 0")

        def register(function: F) -> F:
            self._checks[name] = Check(name, function, critical, timeout_seconds, ttl_seconds)
            return function

        return register if function is None else register(function)

    def remove(self, name: str) -> None:
        """Takes a check away; an unknown name does no harm."""
        self._checks.pop(name, None)
