"""The settings of the response cache."""

from pydantic import Field

from fastapi_hardening.core.configuration import ConcernSettings


class ResponseCacheSettings(ConcernSettings):
    """The settings of the response cache; which routes use it, they say themselves."""

    ttl_seconds: float = Field(60.0, gt=0)
    """How long an answer is fresh, where neither it nor its route says so."""

    stale_while_revalidate_seconds: float = Field(0.0, ge=0)
    """So long after that it is still used at once, while a fresh one is made."""

    stale_if_error_seconds: float = Field(0.0, ge=0)
    """So long after that it is still used when the endpoint fails."""

    max_body_bytes: int = Field(1024 * 1024, ge=0)
    """A larger answer is sent and not kept."""

    wait_seconds: float = Field(5.0, ge=0)
    """So long a request waits for an answer that is being made for another one; then it is answered by itself."""

    cache_status: bool = True
    """Whether answers say what the cache did, in ``Cache-Status`` (RFC 9211)."""
