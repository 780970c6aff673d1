"""Prices in other currencies, by a service that may be slow, wrong or gone: the shop sells in euros then.

`rates_server.py` is one to try it with. Without `SHOP_RATES_URL` nobody is asked.
"""

from typing import Annotated

from fastapi import APIRouter
from pydantic import BaseModel, Field, StringConstraints

from fastapi_hardening import Feature, Problem, Public
from sample_app.dependencies import CurrentHardening

UPSTREAM = "rates"
Currency = Annotated[str, StringConstraints(pattern="^[A-Z]{3}$")]
Rate = Annotated[float, Field(gt=0, lt=1_000_000)]

# Level 2: off when a quarter of the requests is refused.
in_other_currencies = Feature("other-currencies", level=2)
router = APIRouter(prefix="/rates", tags=["rates"], dependencies=[Public()])


class Rates(BaseModel):
    """What one euro is worth; what the service says is checked as if a client had sent it."""

    rates: dict[Currency, Rate] = Field(default={}, max_length=200)


def upstream(url: str) -> dict[str, object]:
    """How the service is asked: settings for `upstreams`. Nobody waits longer for it than a second."""
    return {
        "base_urls": [url],
        "total_seconds": 1.0,
        "attempt_seconds": 0.5,
        "connections": {"connect_seconds": 0.3},
        "bulkhead": {"max_concurrent": 4, "max_waiting": 4},
        "retry": {"attempts": 2},
        "circuit_breaker": {"minimum_calls": 4},
    }


class NoRatesError(Exception):
    """The service cannot be asked, or has not answered with rates."""


@router.get("")
@in_other_currencies.otherwise(Rates(), on=(NoRatesError,))
async def read_rates(hardening: CurrentHardening) -> Rates:
    """Read what one euro is worth; nothing if nobody knows."""
    if UPSTREAM not in hardening.settings.upstreams:
        return Rates()
    import httpx2  # noqa: PLC0415 - the shop runs without it

    async def ask() -> Rates:
        answer = await hardening.upstream(UPSTREAM).get("/latest")
        return Rates.model_validate_json(answer.raise_for_status().content)

    try:
        # Yesterday's rates are better than none.
        return await hardening.cache.get_or_compute(
            "rates", ask, ttl_seconds=60, stale_while_revalidate_seconds=600, stale_if_error_seconds=86_400, of=Rates
        )
    # Nobody there; too slow, or the circuit is open; or something else than rates.
    except (httpx2.HTTPError, Problem, TimeoutError, ValueError) as error:
        raise NoRatesError from error
