"""The settings of load shedding, and how important a request can be."""

from typing import Literal

from pydantic import Field

from fastapi_hardening.core.configuration import ConcernSettings

Importance = Literal["critical", "default", "background"]
IMPORTANCES: tuple[Importance, ...] = ("critical", "default", "background")


class LoadSheddingSettings(ConcernSettings):
    """The settings of load shedding."""

    target_seconds: float = Field(0.01, gt=0, le=10)
    """A newcomer that waits for the event loop longer than this waits in a queue."""

    interval_seconds: float = Field(1.0, gt=0, le=60)
    """For so long the queue must have stood, without a moment's break, before anything is refused."""

    min_rate: float = Field(1.0, gt=0)
    """So many requests a second are admitted whatever happens."""

    max_memory_ratio: float | None = Field(None, gt=0, le=1)
    """From this share of the container's memory on, only what is critical is admitted, such as 0.95; unset, memory is
    not looked at."""

    retry_after_seconds: float = Field(2.0, gt=0)
    """When a refused client is asked to come back; up to twice as long at random."""

    report_only: bool = False
    """Whether refusals are only logged and counted."""
