"""The products, for everybody: kept for a while, forgotten when one of them changes."""

from collections.abc import AsyncIterator

from fastapi import APIRouter, Depends, HTTPException, status
from sqlalchemy import select

from fastapi_hardening import CacheResponse, Public
from sample_app.database import CurrentSession
from sample_app.dependencies import CurrentHardening
from sample_app.models import Product
from sample_app.schemas import Limit, Offset, ProductId, ProductOut, ProductPage

TAG = "catalogue"
# `everybody`, because no answer depends on the cookie that each shopper sends. Without the database old answers do.
cached = CacheResponse(30, per="everybody", stale_if_error_seconds=600, tags=(TAG,))
router = APIRouter(prefix="/products", tags=["catalogue"], dependencies=[Public(), cached])


async def _forget_answers(hardening: CurrentHardening) -> AsyncIterator[None]:
    yield
    await hardening.cache.invalidate(TAG)


# For routes that change a product. `function`: before the answer is sent, so who has it sees the change.
changes_catalogue = Depends(_forget_answers, scope="function")


@router.get("", response_model=ProductPage)
async def list_products(session: CurrentSession, offset: Offset = 0, limit: Limit = 20) -> dict[str, object]:
    """List the products by number."""
    found = (await session.scalars(select(Product).order_by(Product.id).offset(offset).limit(limit + 1))).all()
    return {"items": found[:limit], "next_offset": offset + limit if len(found) > limit else None}


@router.get("/{product_id}", response_model=ProductOut)
async def read_product(product_id: ProductId, session: CurrentSession) -> Product:
    """Read one product."""
    product = await session.get(Product, product_id)
    if product is None:
        raise HTTPException(status.HTTP_404_NOT_FOUND, f"There is no product {product_id}.")
    return product
