"""What a circuit breaker can be set to and be in, and what it tells."""

from dataclasses import dataclass
from typing import Final, Literal, Self

from pydantic import Field, model_validator

from fastapi_hardening.core.configuration import Section
from fastapi_hardening.core.outbound import CallRefused
from fastapi_hardening.core.problem import OWN
from fastapi_hardening.resilience.circuit_breaker.window import Counts

CircuitState = Literal["closed", "open", "half-open", "disabled", "forced-open", "metrics-only"]
"""``closed`` lets through and counts, ``open`` refuses, ``half-open`` lets trials through. By hand: ``disabled`` lets
through and does not count, ``forced-open`` refuses, ``metrics-only`` counts and never refuses."""

CLOSED: Final = "closed"
OPEN: Final = "open"
HALF_OPEN: Final = "half-open"
DISABLED: Final = "disabled"
FORCED_OPEN: Final = "forced-open"
METRICS_ONLY: Final = "metrics-only"


class CircuitBreakerSettings(Section):
    """The settings of one circuit breaker."""

    mode: Literal["trip", "throttle"] = "trip"
    """``trip`` opens at a rate of failures. ``throttle`` refuses the more, the less the service takes."""

    window: Literal["time", "count"] = "time"
    """Whether the calls of the last ``window_seconds`` count, or the last ``window_calls`` however old they are."""

    window_seconds: float = Field(60.0, gt=0)
    """How long a call counts. Longer than calls may take, or slow ones are forgotten early."""

    window_calls: int = Field(100, ge=1)
    """How many calls count, in a window by count."""

    minimum_calls: int = Field(10, ge=1)
    """With fewer calls in the window there is no rate, and nothing opens. A throttle spares as many."""

    failure_rate: float = Field(0.5, gt=0, le=1)
    """From this share of failed calls on it opens."""

    slow_call_seconds: float | None = Field(None, gt=0)
    """A call that takes longer is slow, even if it succeeds; none is if unset."""

    slow_call_rate: float = Field(1.0, gt=0, le=1)
    """From this share of slow calls on it opens."""

    open_seconds: float = Field(30.0, gt=0)
    """How long it stays open before the first trials."""

    open_growth: float = Field(2.0, ge=1)
    """So many times longer it stays open each time that the trials fail; it begins anew once it has closed."""

    longest_open_seconds: float = Field(300.0, gt=0)
    """How long it stays open at most."""

    half_open_calls: int = Field(5, ge=1)
    """How many trial calls are let through, in all; together they decide."""

    longest_half_open_seconds: float | None = Field(60.0, gt=0)
    """When the trials have not decided after so long, it opens again; unset, it waits for them."""

    counted_statuses: tuple[int, ...] = ()
    """Statuses from 400 to 499 that count as failures all the same, such as ``408,429``."""

    throttle_factor: float = Field(2.0, ge=1)
    """A throttle makes so many calls for each one that the service takes."""

    throttle_probe_seconds: float = Field(1.0, gt=0)
    """A throttle lets one call through that often, whatever happens."""

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.window == "count" and self.minimum_calls > self.window_calls:
            raise ValueError(
                f"minimum_calls ({self.minimum_calls}) is more than window_calls ({self.window_calls}), so it could "
                "never open: lower the first or raise the second"
            )
        if self.longest_open_seconds < self.open_seconds:
            raise ValueError(
                f"longest_open_seconds ({self.longest_open_seconds:g}) is below open_seconds ({self.open_seconds:g})"
            )
        for status in self.counted_statuses:
            if not 400 <= status <= 499:  # noqa: PLR2004 - the class of client errors
                raise ValueError(f"counted_statuses are from 400 to 499 (5xx always count), not {status}")
        return self


class CircuitOpen(CallRefused):
    """A circuit breaker did not let the call through.

    Attributes:
        name: The breaker; for logs, not for clients.
        seconds_left: How long until calls are tried again.
    """

    type = OWN + "circuit-open"
    title = "Circuit open"

    def __init__(self, name: str, seconds_left: float) -> None:
        super().__init__("A service that this needs does not work at the moment.", seconds_left=seconds_left)
        self.name = name

    def __str__(self) -> str:
        return f"the circuit of {self.name} is open for {self.seconds_left:.3g} s"


@dataclass(frozen=True, slots=True)
class CircuitOpened:
    """Calls are refused from now on.

    Attributes:
        name: The breaker.
        seconds: For how long.
        counts: What it decided by; ``None`` where another worker did.
    """

    name: str
    seconds: float
    counts: Counts | None = None


@dataclass(frozen=True, slots=True)
class CircuitHalfOpened:
    """Trial calls are let through."""

    name: str


@dataclass(frozen=True, slots=True)
class CircuitClosed:
    """Calls are let through again."""

    name: str


@dataclass(frozen=True, slots=True)
class CircuitForced:
    """Somebody has put a breaker into a state by hand.

    Attributes:
        name: The breaker.
        state: The state; ``closed`` for a reset.
    """

    name: str
    state: CircuitState


@dataclass(frozen=True, slots=True)
class CircuitSnapshot:
    """A breaker as it is at the moment.

    Attributes:
        name: The breaker.
        state: Its state.
        calls: How many calls are in the window.
        failure_rate: The share that failed; ``None`` below the minimum of calls.
        slow_call_rate: The share that was slow; likewise.
        seconds_left: How long it stays open; 0 where it is not.
        succeeded: Calls that went well since the start.
        failed: Calls that failed since the start.
        ignored: Calls that said nothing since the start.
        refused: Calls that were not made since the start.
    """

    name: str
    state: CircuitState
    calls: int
    failure_rate: float | None
    slow_call_rate: float | None
    seconds_left: float
    succeeded: int
    failed: int
    ignored: int
    refused: int
