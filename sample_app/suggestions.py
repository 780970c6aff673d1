"""What else was bought with a product. Nice to have: under load it goes first, and nothing is missing but a list."""

from fastapi import APIRouter
from sqlalchemy import func, select
from sqlalchemy.orm import aliased

from fastapi_hardening import Feature, Public
from sample_app.database import CurrentDatabase
from sample_app.dependencies import CurrentHardening
from sample_app.models import OrderLine, Product
from sample_app.schemas import ProductId, SuggestionOut

# Level 1: off as soon as requests stand in a queue. By hand: `handle.features.switch_off("bought-together", "why")`.
bought_together = Feature("bought-together", level=1)
router = APIRouter(prefix="/products", tags=["suggestions"], dependencies=[Public()])


@router.get("/{product_id}/bought-together")
@bought_together.otherwise([])
async def suggest(product_id: ProductId, database: CurrentDatabase, hardening: CurrentHardening) -> list[SuggestionOut]:
    """Name up to three products that were bought with this one."""

    async def look() -> list[SuggestionOut]:
        # A session of its own: others wait for this result, whoever began it may be gone.
        other = aliased(OrderLine)
        query = (
            select(Product.id, Product.name)
            .join(other, other.product_id == Product.id)
            .join(OrderLine, OrderLine.order_id == other.order_id)
            .where(OrderLine.product_id == product_id, other.product_id != product_id)
            .group_by(Product.id)
            # What a single customer has bought is nobody's business.
            .having(func.count() > 1)
            .order_by(func.count().desc(), Product.id)
            .limit(3)
        )
        async with database.session() as session:
            return [SuggestionOut.model_validate(row) for row in await session.execute(query)]

    # The query reads all orders: once a minute, and for an hour an old answer is better than a slow one.
    return await hardening.cache.get_or_compute(
        f"bought-together:{product_id}",
        look,
        ttl_seconds=60,
        stale_while_revalidate_seconds=3600,
        of=list[SuggestionOut],
    )
