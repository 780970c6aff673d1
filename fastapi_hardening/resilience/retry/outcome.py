"""What became of an attempt: whether it may pass by itself, and how long the service says to wait."""

import socket
import sys
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

from fastapi_hardening.core.outbound import status_of

STATUSES = (408, 429, 502, 503, 504)
"""The answers that are worth another attempt, if nothing else is said."""


def is_transient(error: Exception, statuses: tuple[int, ...] = STATUSES) -> bool:
    """Whether a failure may pass by itself: no connection, no answer in time, or an answer with one of the statuses.

    Example:
        >>> [is_transient(error) for error in (ConnectionResetError(), TimeoutError(), ValueError())]
        [True, True, False]
    """
    if isinstance(error, (ConnectionError, TimeoutError, socket.gaierror)):
        return True
    status = status_of(error)
    if status is not None:
        return status in statuses
    # The clients whose exceptions are not Python's own; who has not imported one cannot have its exceptions.
    clients = (sys.modules.get(name) for name in ("httpx2", "httpx"))
    return any(client is not None and isinstance(error, client.TransportError) for client in clients)


def retry_after_of(outcome: Any, now: float) -> float | None:
    """How many seconds an answer or an exception says to wait (RFC 9110, section 10.2.3); ``None`` if it does not.

    Args:
        outcome: An answer, an exception with one, or an exception with headers.
        now: Seconds since the epoch, for a date.
    """
    headers = getattr(getattr(outcome, "response", outcome), "headers", None)
    if not isinstance(headers, Mapping):
        return None
    value = next((value for name, value in headers.items() if name.lower() == "retry-after"), None)
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - now)
    except (ValueError, OverflowError):
        return None


def reason_of(outcome: Any) -> str:
    """The class of an exception, or the status of an answer, in a word."""
    status = None if isinstance(outcome, Exception) else status_of(outcome)
    return type(outcome).__name__ if status is None else str(status)
