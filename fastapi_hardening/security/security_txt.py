"""Serves ``/.well-known/security.txt`` (RFC 9116): whom to tell of a vulnerability, and how.

It protects from reports that reach nobody, or everybody. It is *not* a policy; it points to one.

Its route sits behind the layers that look at size and rate, and above authentication: who has found a hole has no
account. A file past its date counts as stale, so a health check warns before that day comes; the application goes on
all the same, because a date must not be able to stop it.

Example:
    >>> from fastapi import FastAPI
    >>> from fastapi_hardening.security.security_txt import SecurityTxtMiddleware, SecurityTxtSettings
    >>> settings = SecurityTxtSettings(contact=("mailto:security@shop.example",), expires="2027-06-30T00:00:00Z")
    >>> print(render(settings).decode(), end="")
    Contact: mailto:security@shop.example
    Expires: 2027-06-30T00:00:00Z
    >>> app = FastAPI()
    >>> app.add_middleware(SecurityTxtMiddleware, settings=settings)
"""

import logging
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Self

from pydantic import AwareDatetime, Field, field_validator, model_validator
from starlette.types import ASGIApp, Receive, Scope, Send

from fastapi_hardening.core.check import CheckResult
from fastapi_hardening.core.clock import Clock, SystemClock
from fastapi_hardening.core.configuration import ConcernSettings, from_json
from fastapi_hardening.core.own_path import OwnPath

logger = logging.getLogger("fastapi_hardening.security_txt")

_DAY_SECONDS = 86_400
_YEAR_DAYS = 366


class SecurityTxtSettings(ConcernSettings):
    """The fields of the file by their names; it is served as soon as there is a contact."""

    enabled: bool = False
    """Whether the file is served; on by itself when ``contact`` is set."""

    contact: tuple[str, ...] = ()
    """Where to report, the preferred one first: ``https:``, ``mailto:`` or ``tel:``."""

    expires: AwareDatetime | None = None
    """Until when the file may be relied on, such as ``2027-06-30T00:00:00Z``; less than a year ahead."""

    encryption: tuple[str, ...] = ()
    """Where the key for encrypted reports is: ``https:``, ``dns:`` or ``openpgp4fpr:``."""

    acknowledgments: tuple[str, ...] = ()
    """Where those who reported are thanked."""

    preferred_languages: tuple[str, ...] = ()
    """Languages for reports, such as ``en, de``."""

    canonical: tuple[str, ...] = ()
    """The addresses at which this file stands."""

    policy: tuple[str, ...] = ()
    """What may be tested, and what happens with a report."""

    hiring: tuple[str, ...] = ()
    """Open positions in security."""

    path: str = "/.well-known/security.txt"
    """Where the file is served."""

    warn_before_days: int = Field(30, ge=0)
    """So many days before it expires the health check begins to warn."""

    @model_validator(mode="before")
    @classmethod
    def _is_on_with_a_contact(cls, values: Any) -> Any:
        values = from_json(values) if isinstance(values, str) else values
        if isinstance(values, Mapping) and values.get("contact") and "enabled" not in values:
            return {**values, "enabled": True}
        return values

    @field_validator("contact", "encryption", "acknowledgments", "canonical", "policy", "hiring")
    @classmethod
    def _are_addresses(cls, addresses: tuple[str, ...]) -> tuple[str, ...]:
        for address in addresses:
            if not _ADDRESS.fullmatch(address):
                raise ValueError(
                    f"{address!r} is no address for security.txt, such as 'https://shop.example/security' or "
                    "'mailto:security@shop.example' (RFC 9116: not http, no blanks)"
                )
        return addresses

    @field_validator("preferred_languages")
    @classmethod
    def _are_languages(cls, tags: tuple[str, ...]) -> tuple[str, ...]:
        for tag in tags:
            if not _LANGUAGE.fullmatch(tag):
                raise ValueError(f"{tag!r} is no language tag, such as 'en' or 'pt-BR' (RFC 5646)")
        return tags

    @field_validator("path")
    @classmethod
    def _is_a_path(cls, path: str) -> str:
        if not path.startswith("/"):
            raise ValueError(f"{path!r} does not start with a slash")
        return path

    @model_validator(mode="after")
    def _says_what_it_must(self) -> Self:
        if self.enabled and not (self.contact and self.expires):
            missing = "contact" if not self.contact else "expires"
            raise ValueError(f"security.txt needs contact and expires (RFC 9116, section 2.5); {missing} is missing")
        return self


_ADDRESS = re.compile(r"(?:https://|mailto:|tel:|dns:|openpgp4fpr:)[\x21-\x7e]+")
_LANGUAGE = re.compile(r"[A-Za-z]{2,8}(?:-[A-Za-z0-9]{1,8})*")


# --- engine -----------------------------------------------------------------------------------------------------------


def render(settings: SecurityTxtSettings) -> bytes:
    """The file, a field a line, in the order of the settings."""
    expires = "" if settings.expires is None else settings.expires.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    fields = {
        "Contact": settings.contact,
        "Expires": (expires,),
        "Encryption": settings.encryption,
        "Acknowledgments": settings.acknowledgments,
        "Preferred-Languages": (", ".join(settings.preferred_languages),),
        "Canonical": settings.canonical,
        "Policy": settings.policy,
        "Hiring": settings.hiring,
    }
    return "".join(f"{name}: {value}\n" for name, values in fields.items() for value in values if value).encode("ascii")


def days_left(expires: datetime, now: float) -> float:
    """How many days the file may still be relied on; negative when it is stale."""
    return (expires.timestamp() - now) / _DAY_SECONDS


def check(settings: SecurityTxtSettings, clock: Clock | None = None) -> Callable[[], CheckResult]:
    """A health check that warns when the file is about to expire, or has; says so in the log at once.

    Args:
        settings: The fields of the file.
        clock: Where the time comes from.
    """
    time = (clock or SystemClock()).time
    expires = settings.expires or datetime.fromtimestamp(0, UTC)

    def result() -> CheckResult:
        days = days_left(expires, time())
        if days > settings.warn_before_days:
            return CheckResult("pass")
        said = f"expires in {days:.0f} days" if days > 0 else "has expired, so nobody may rely on it any more"
        return CheckResult("warn", f"security.txt {said}: set security_txt.expires anew")

    if (found := result()).status == "warn":
        logger.warning("%s", found.output)
    elif days_left(expires, time()) > _YEAR_DAYS:
        logger.warning("security_txt.expires is more than a year ahead; RFC 9116 asks for less")
    return result


# --- layer ------------------------------------------------------------------------------------------------------------


class SecurityTxtMiddleware:
    """Answers ``GET`` of the file, and passes on everything else.

    A route of the application with exactly that path wins, with one notice in the log; a catch-all route does not.

    Args:
        app: The application inside.
        settings: The fields of the file.
    """

    def __init__(self, app: ASGIApp, settings: SecurityTxtSettings | None = None) -> None:
        self.app = app
        self._settings = settings or SecurityTxtSettings()
        self._path = OwnPath(self._settings.path, ("GET", "HEAD"), "security.txt is not served")
        self._body = render(self._settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        if scope["type"] != "http" or not self._settings.enabled or not self._path.is_asked(scope):
            await self.app(scope, receive, send)
            return
        headers = [
            (b"content-type", b"text/plain; charset=utf-8"),
            (b"content-length", str(len(self._body)).encode("ascii")),
            (b"cache-control", b"public, max-age=3600"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else self._body})
