"""What is inspected, how closely, and what comes of a finding."""

from typing import Literal

from pydantic import Field, field_validator

from fastapi_hardening.core.configuration import ConcernSettings, did_you_mean
from fastapi_hardening.security.input_validation.inspector import CLASSES, DEFAULT_THRESHOLD

Mode = Literal["off", "report", "enforce"]
Oversize = Literal["pass", "refuse"]


class InputValidationSettings(ConcernSettings):
    """The settings of the inspection of content."""

    mode: Mode = "report"
    """``off``; ``report``: findings are logged and counted, and nothing else changes; ``enforce``: they are refused."""

    classes: tuple[str, ...] = CLASSES
    """The classes of attack that are looked for."""

    threshold: int = Field(DEFAULT_THRESHOLD, ge=1)
    """The score that the findings of a class need together: 5 for a certain one, less for a suspicion. A higher value
    finds less."""

    max_inspected_bytes: int = Field(1_000_000, ge=1)
    """The largest body that is inspected; it is held in memory for that."""

    oversize: Oversize = "refuse"
    """What comes of a larger document (JSON, form, XML, text) where findings are refused: 413, or passed unseen."""

    uploads: Oversize = "pass"
    """The same of larger uploads: multipart forms and files. What is passed is never held in memory."""

    inspect_files: bool = False
    """Whether the content of uploaded files is inspected, too, and not only their names."""

    headers: tuple[str, ...] = (
        "user-agent", "referer", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "forwarded", "x-original-url",
        "x-rewrite-url",
    )  # fmt: skip
    """Header fields that are inspected besides cookies and those that the route declares."""

    @field_validator("classes")
    @classmethod
    def _are_known(cls, classes: tuple[str, ...]) -> tuple[str, ...]:
        return checked_classes(classes)

    @field_validator("headers")
    @classmethod
    def _in_lower_case(cls, headers: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(header.lower() for header in headers)


def checked_classes(classes: tuple[str, ...] | list[str]) -> tuple[str, ...]:
    """The classes as they came.

    Raises:
        ValueError: One is unknown; the message guesses which one was meant.
    """
    for each in classes:
        if each not in CLASSES:
            raise ValueError(f"unknown class {each!r}{did_you_mean(each, CLASSES)}")
    return tuple(classes)
