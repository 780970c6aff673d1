"""What authentication answers: nobody was named, what was sent proves nothing, this caller may not, try again later.

None of them says why. What helps a client that made a mistake helps one that guesses; the reason is in the log, under
the id that the client gets.
"""

from collections.abc import Iterable

from fastapi_hardening.core.problem import OWN, Problem


class NotAuthenticated(Problem):
    """The route wants to know who calls, and nothing was sent that says so."""

    status = 401
    type = OWN + "authentication-required"
    title = "Authentication required"


class CredentialsRefused(Problem):
    """Credentials were sent, and they are wrong, expired or revoked."""

    status = 401
    type = OWN + "invalid-credentials"
    title = "Invalid credentials"


class NotAllowed(Problem):
    """The caller is known, and may not do this."""

    status = 403
    type = OWN + "not-allowed"
    title = "Not allowed"


class CrossSiteRefused(Problem):
    """A page of another site had the browser send a request with the credentials that it keeps for this one."""

    status = 403
    type = OWN + "cross-site-request"
    title = "Cross-site request"


class AuthenticationUnavailable(Problem):
    """Who calls cannot be found out now, because what would know it does not answer.

    Authenticators raise it when their provider, store or database is down. Never answered by letting the caller in.

    Args:
        retry_after_seconds: What the client is told to wait.
    """

    status = 503
    type = OWN + "authentication-unavailable"
    title = "Authentication unavailable"

    def __init__(self, retry_after_seconds: int = 5) -> None:
        super().__init__(
            "Who you are cannot be found out right now; come back later.",
            headers={"Retry-After": str(retry_after_seconds)},
        )


# --- WWW-Authenticate -------------------------------------------------------------------------------------------------

BEARER = "Bearer"


def is_bearer(challenge: str) -> bool:
    """Whether a challenge is of the scheme of RFC 6750, whose parameters tell more."""
    return challenge.partition(" ")[0].lower() == "bearer"


def with_parameters(challenge: str, **parameters: str | None) -> str:
    """A challenge with further parameters (RFC 9110, section 11.6.1); those that are ``None`` are left out.

    Example:
        >>> with_parameters('Bearer realm="shop"', error="invalid_token")
        'Bearer realm="shop", error="invalid_token"'
        >>> with_parameters("Bearer", error="insufficient_scope", scope="orders:write")
        'Bearer error="insufficient_scope", scope="orders:write"'
    """
    scheme, _, given = challenge.partition(" ")
    added = [f'{name}="{value}"' for name, value in parameters.items() if value is not None]
    said = ", ".join((*([given] if given else []), *added))
    return f"{scheme} {said}" if said else scheme


def joined(challenges: Iterable[str]) -> dict[str, str]:
    """The header field of several challenges; none where there is nothing to say."""
    field = ", ".join(challenges)
    return {"WWW-Authenticate": field} if field else {}
