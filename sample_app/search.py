"""Finding a product by a part of its name or description."""

from typing import Annotated

from fastapi import APIRouter, Query
from sqlalchemy import or_, select

from fastapi_hardening import InputPolicy, Public, RateLimit
from sample_app.database import CurrentSession
from sample_app.models import Product
from sample_app.schemas import Limit, Offset, ProductPage

# A search reads the whole table, so a client may do it less often than anything else. People search for anything, and
# the query takes the text as a parameter: what looks like an attack is only reported.
router = APIRouter(
    prefix="/search",
    tags=["search"],
    dependencies=[Public(), RateLimit("120/minute", name="search"), InputPolicy(mode="report")],
)


@router.get("", response_model=ProductPage)
async def search_products(
    q: Annotated[str, Query(min_length=1, max_length=80)],
    session: CurrentSession,
    offset: Offset = 0,
    limit: Limit = 20,
) -> dict[str, object]:
    """Search the products; `%` and `_` mean themselves."""
    # The text is a bound parameter, and autoescape takes the wildcards out of it.
    matches = or_(Product.name.icontains(q, autoescape=True), Product.description.icontains(q, autoescape=True))
    query = select(Product).where(matches).order_by(Product.name).offset(offset).limit(limit + 1)
    found = (await session.scalars(query)).all()
    return {"items": found[:limit], "next_offset": offset + limit if len(found) > limit else None}
