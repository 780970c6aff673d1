"""What the concerns around calls to other services share: how a call is refused, and what an error says.

A call that one of ours did not let through says nothing about the service behind: it must not open a circuit, and
trying it again at once cannot help.

Around an upstream these concerns are layers, as inbound: each is given the next one, and gives a function that takes a
call on its way.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi_hardening.core.problem import IANA, Problem, retry_after


class CallRefused(Problem):
    """A call to another service was not made, because something of ours stands before it.

    Args:
        detail: What the client reads; names no service.
        seconds_left: After how long a call may be let through; the header ``Retry-After`` is up to twice as long.

    Attributes:
        seconds_left: That time.
    """

    status = 503
    type = IANA + "temporary-reduced-capacity"
    title = "Temporarily reduced capacity"

    def __init__(self, detail: str, *, seconds_left: float) -> None:
        super().__init__(detail, headers=retry_after(max(seconds_left, 0.001)))
        self.seconds_left = seconds_left


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an exception carries, as httpx's and FastAPI's do; ``None`` for others.

    Example:
        >>> from fastapi import HTTPException
        >>> status_of(HTTPException(404)), status_of(ValueError())
        (404, None)
    """
    status = getattr(getattr(error, "response", error), "status_code", None)
    return status if isinstance(status, int) else None


IDEMPOTENT = frozenset(("GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE", "QUERY"))
"""The methods that may be repeated (RFC 9110, section 9.2.2)."""


def is_repeatable(method: str, headers: Mapping[str, str] | None = None) -> bool:
    """Whether a request of HTTP may be sent twice: by its method, or because it carries an ``Idempotency-Key``.

    Example:
        >>> is_repeatable("get"), is_repeatable("POST"), is_repeatable("POST", {"Idempotency-Key": "7"})
        (True, False, True)
    """
    return method.upper() in IDEMPOTENT or any(name.lower() == "idempotency-key" for name in headers or ())


@dataclass(slots=True)
class Outgoing:
    """One call of an upstream on its way.

    Attributes:
        request: The request, as the client has made it.
        repeatable: It may be sent twice.
        hedged: It may be sent to a second endpoint before the first has answered.
        whole: The answer is read to its end within the call; else its body is read later, by whoever has called.
        endpoint: The endpoint that this attempt goes to.
        tried: The endpoints that attempts went to already.
        when_closed: Called once the body of an answer that is read later has ended.
        answer: The last answer; it is closed if another attempt follows.
    """

    request: Any
    repeatable: bool = False
    hedged: bool = False
    whole: bool = True
    endpoint: str = ""
    tried: set[str] = field(default_factory=set)
    when_closed: list[Callable[[], None]] = field(default_factory=list)
    answer: Any = None


Send = Callable[[Outgoing], Awaitable[Any]]
"""What a layer around an upstream is given, and what it makes."""
