"""What the concerns around calls to other services share: how a call is refused, and what an error says.

A call that one of ours did not let through says nothing about the service behind: it must not open a circuit, and
trying it again at once cannot help.
"""

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
