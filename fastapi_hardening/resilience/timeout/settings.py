"""How long an answer may take."""

from typing import Annotated, NamedTuple

from pydantic import BeforeValidator, Field

from fastapi_hardening.core.configuration import ConcernSettings

Seconds = Annotated[Annotated[float, Field(gt=0)] | None, BeforeValidator(lambda value: None if value == "" else value)]


class TimeoutSettings(ConcernSettings):
    """The settings of deadlines; ``None`` (or an empty text) switches one off."""

    first_byte_seconds: Seconds = 30.0
    """So long may a handler take until its answer begins, from the last piece of the request's body; then 504."""

    total_seconds: Seconds = None
    """So long may the whole answer take; then the connection is cut. Unset, an answer that has begun may last."""

    report_only: bool = False
    """Whether a handler that takes too long is only logged and counted."""


class Bounds(NamedTuple):
    """How long an answer may take.

    Attributes:
        first_byte: Until it begins, in seconds; ``None`` for as long as it likes.
        total: Until it ends, in seconds; ``None`` for as long as it likes.
    """

    first_byte: float | None
    total: float | None

    def at(self, started: float, since: float) -> float | None:
        """When the time is up before the answer has begun.

        Args:
            started: When the request arrived, in monotonic seconds.
            since: When the last piece of its body did.
        """
        if self.total is None:
            return None if self.first_byte is None else since + self.first_byte
        return started + self.total if self.first_byte is None else min(started + self.total, since + self.first_byte)
