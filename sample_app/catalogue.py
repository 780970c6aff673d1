"""The products, for everybody."""

from fastapi import APIRouter, HTTPException, status
from sqlalchemy import select

from fastapi_hardening import Public
from sample_app.database import CurrentSession
from sample_app.models import Product
from sample_app.schemas import Limit, Offset, ProductId, ProductOut, ProductPage

router = APIRouter(prefix="/products", tags=["catalogue"], dependencies=[Public()])


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
