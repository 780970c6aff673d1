"""The basket of the shopper who holds the cookie."""

from fastapi import APIRouter, HTTPException, Response, status
from sqlalchemy import delete, select
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.ext.asyncio import AsyncSession

from fastapi_hardening import SecurityHeaders
from sample_app.database import CurrentSession
from sample_app.dependencies import Shopper
from sample_app.models import BasketItem, Product, utc_now
from sample_app.schemas import BasketItemIn, BasketOut, LineOut, ProductId

router = APIRouter(prefix="/basket", tags=["basket"], dependencies=[SecurityHeaders(cache_control="no-store")])


async def _basket(session: AsyncSession, shopper: str) -> BasketOut:
    query = (
        select(BasketItem.product_id, Product.name, Product.price_cents, BasketItem.quantity)
        .join(Product, Product.id == BasketItem.product_id)
        .where(BasketItem.shopper == shopper)
        .order_by(BasketItem.product_id)
    )
    lines = [LineOut.model_validate(row) for row in await session.execute(query)]
    return BasketOut(lines=lines, total_cents=sum(line.price_cents * line.quantity for line in lines))


@router.get("")
async def read_basket(shopper: Shopper, session: CurrentSession) -> BasketOut:
    """Read the basket; that of a new shopper is empty."""
    return await _basket(session, shopper)


@router.put("/{product_id}")
async def put_into_basket(
    product_id: ProductId, item: BasketItemIn, shopper: Shopper, session: CurrentSession
) -> BasketOut:
    """Set how many of a product are in the basket. Stock is taken when the order is placed, not here."""
    if await session.get(Product, product_id) is None:
        raise HTTPException(status.HTTP_404_NOT_FOUND, f"There is no product {product_id}.")
    new = {"quantity": item.quantity, "changed_at": utc_now()}
    # One statement, so that two clicks at once cannot both insert.
    await session.execute(
        insert(BasketItem)
        .values(shopper=shopper, product_id=product_id, **new)
        .on_conflict_do_update(index_elements=["shopper", "product_id"], set_=new)
    )
    await session.commit()
    return await _basket(session, shopper)


@router.delete("/{product_id}", status_code=status.HTTP_204_NO_CONTENT, response_class=Response)
async def take_out_of_basket(product_id: ProductId, shopper: Shopper, session: CurrentSession) -> None:
    """Take a product out of the basket; the result is the same if it was not in there."""
    await session.execute(delete(BasketItem).where(BasketItem.shopper == shopper, BasketItem.product_id == product_id))
    await session.commit()
