"""Looks at an application before it faces production, and says what is wrong with how it is set up.

What can never work is refused when ``harden()`` is called. What is looked for here may be meant: documentation that
everybody may read, a limit that each worker counts for itself. Each check has an id that stays the same, a severity,
and a sentence that mends what it found. It is *not* a scanner: nothing is sent, and no code of endpoints is read.

Example:
    >>> from fastapi import FastAPI
    >>> from fastapi_hardening import Settings, harden
    >>> from fastapi_hardening.audit import audit
    >>> app = FastAPI()
    >>> handle = harden(app, Settings(errors={"details": True}))
    >>> [finding.message for finding in audit(app) if finding.severity == "error"]
    ['errors.details is on']
"""

import os
from collections.abc import Mapping
from typing import Any

from fastapi_hardening.audit.checks import CHECKS
from fastapi_hardening.audit.finding import SEVERITIES, Check, Finding, Severity, Subject
from fastapi_hardening.core.configuration import ConfigurationError
from fastapi_hardening.handle import Hardening

__all__ = ["CHECKS", "SEVERITIES", "Check", "Finding", "Severity", "audit", "broken"]


def audit(app: Any, *, environ: Mapping[str, str] | None = None) -> tuple[Finding, ...]:
    """Everything that the checks find in an application, the worst first.

    The stack of the application is built for it, as its first request would do.

    Args:
        app: The application, with ``harden()`` behind it.
        environ: The environment that it is to run in; by default this one.
    """
    handle = getattr(getattr(app, "state", None), "hardening", None)
    if not isinstance(handle, Hardening):
        return (Finding("FH001", "error", "harden() was not called on the application", "call harden(app)"),)
    try:
        if app.middleware_stack is None:
            app.build_middleware_stack()
    except ConfigurationError as error:
        return (broken(error),)
    subject = Subject(app, handle, os.environ if environ is None else environ)
    develops = handle.settings.environment == "development"
    found = [
        Finding(check.id, check.severity, message, fix)
        for check in CHECKS
        if check.everywhere or not develops
        for message, fix in check.find(subject)
    ]
    return tuple(sorted(found, key=lambda finding: SEVERITIES.index(finding.severity)))


def broken(error: Exception) -> Finding:
    """The finding of an application that cannot be made, whose message says what to do."""
    return Finding("FH000", "error", "the application cannot serve as it is configured", str(error))
