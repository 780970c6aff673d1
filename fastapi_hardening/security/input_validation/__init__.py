"""Finds attacks in what clients send, and refuses them where you say so: injection, scripts, traversal and their kin.

It protects what the application forgot to protect: the one query that is put together from text, the one page that
shows a value as it came. It is *not* the control itself. Parameterised queries, encoded output and checked paths are
(OWASP ASVS 5, 1.2.1, 1.2.4 and 1.2.5); this stands in front of them for the day when one of them is missing.

It looks at texts and not at bytes: query, path, form, JSON leaves and keys, file names, cookies, some header fields,
the messages of websockets. What a route declares as a number, a date or a choice is left out. A text is decoded as far
as it is encoded, and then read by a grammar for each class of attack, in time that is linear in its length.

It sits behind everything that refuses by the head alone, for it has to read the body. In the mode ``report``, which is
the default, it only looks on.

Example:
    >>> from fastapi import FastAPI
    >>> from fastapi_hardening import InputPolicy
    >>> from fastapi_hardening.security.input_validation import InputValidationMiddleware, InputValidationSettings
    >>> app = FastAPI()
    >>> app.add_middleware(InputValidationMiddleware, settings=InputValidationSettings(mode="enforce"))
    >>> @app.post("/articles", dependencies=[InputPolicy(allow={"body.html": ["xss"]})])
    ... async def publish(html: str) -> None: ...
"""

from fastapi_hardening.security.input_validation.inspector import CLASSES, Hit, Inspector
from fastapi_hardening.security.input_validation.layer import InputValidationMiddleware
from fastapi_hardening.security.input_validation.policy import ContentNotInspected, ContentRefused, InputPolicy
from fastapi_hardening.security.input_validation.report import RouteReport, ValidationReport
from fastapi_hardening.security.input_validation.settings import InputValidationSettings

__all__ = [
    "CLASSES",
    "ContentNotInspected",
    "ContentRefused",
    "Hit",
    "InputPolicy",
    "InputValidationMiddleware",
    "InputValidationSettings",
    "Inspector",
    "RouteReport",
    "ValidationReport",
]
