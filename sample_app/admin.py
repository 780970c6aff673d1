"""The part of those who work here: each route names the permission that it needs, and `main.py` who has it."""

import csv
import io
from collections.abc import AsyncIterator, Iterable
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, HTTPException, Path, Request, Response, status
from fastapi.responses import StreamingResponse
from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from fastapi_hardening import Bulkhead, Priority, RateLimit, RequirePermissions, RequireUser, SecurityHeaders, Timeout
from sample_app.catalogue import changes_catalogue
from sample_app.database import CurrentSession
from sample_app.models import Order, OrderEvent, OrderLine, OrderStatus, Product
from sample_app.schemas import DeliveryIn, NewProductIn, OrderOut, ProductId, ProductIn, ProductOut, RoleIn
from sample_app.tokens import end_everything
from sample_app.users import find_user

router = APIRouter(
    prefix="/admin",
    tags=["admin"],
    # Whatever a route forgets to say, nobody gets here without an account.
    dependencies=[RequireUser(), RateLimit("60/minute", name="admin"), SecurityHeaders(cache_control="no-store")],
)
write_products = [RequirePermissions("products:write"), changes_catalogue]
write_users = RequirePermissions("users:write")
# An export holds a connection to the database for minutes. Two at a time leave the others to the shoppers, none is
# begun while there is too much to do, and one whose reader has fallen asleep is cut off.
export = [
    RequirePermissions("orders:export"),
    Bulkhead(2, name="exports"),
    Priority("background"),
    Timeout(10, total_seconds=300),
]


async def _change_product(session: AsyncSession, product_id: int, **values: object) -> Product:
    change = update(Product).where(Product.id == product_id).values(**values).returning(Product)
    changed: Product | None = await session.scalar(change)
    if changed is None:
        raise HTTPException(status.HTTP_404_NOT_FOUND, f"There is no product {product_id}.")
    await session.commit()
    return changed


@router.post("/products", status_code=status.HTTP_201_CREATED, response_model=ProductOut, dependencies=write_products)
async def add_product(new: NewProductIn, session: CurrentSession, response: Response) -> Product:
    """Add a product; 409 if the name is taken."""
    product = Product(**new.model_dump())
    session.add(product)
    await _commit_or_conflict(session, f"There is already a product named {new.name}.")
    response.headers["Location"] = f"/api/products/{product.id}"
    return product


@router.put("/products/{product_id}", response_model=ProductOut, dependencies=write_products)
async def change_product(product_id: ProductId, product: ProductIn, session: CurrentSession) -> Product:
    """Describe or price a product anew; orders keep the price of their day."""
    try:
        return await _change_product(session, product_id, **product.model_dump())
    except IntegrityError:
        raise HTTPException(status.HTTP_409_CONFLICT, "Another product has that name.") from None


@router.post("/products/{product_id}/deliveries", response_model=ProductOut, dependencies=write_products)
async def take_delivery(product_id: ProductId, delivery: DeliveryIn, session: CurrentSession) -> Product:
    """Add to the stock. Setting it to a number would undo the orders placed meanwhile."""
    return await _change_product(session, product_id, stock=Product.stock + delivery.quantity)


@router.post("/orders/{order_id}/shipment", response_model=OrderOut, dependencies=[RequirePermissions("orders:ship")])
async def ship_order(order_id: UUID, session: CurrentSession) -> Order:
    """Note that an order left the house; 409 if it has already."""
    order = await session.get(Order, order_id)
    if order is None:
        raise HTTPException(status.HTTP_404_NOT_FOUND, "There is no such order.")
    order.events.append(OrderEvent(status=OrderStatus.SHIPPED))
    await _commit_or_conflict(session, "The order is shipped already.")
    return order


@router.put("/users/{email}/role", status_code=status.HTTP_204_NO_CONTENT, dependencies=[write_users])
async def change_role(
    email: Annotated[str, Path(max_length=254)], new: RoleIn, session: CurrentSession, request: Request
) -> None:
    """Make a user a customer, a clerk or an admin; they have to sign in again."""
    user = await find_user(session, email)
    if user is None:
        raise HTTPException(status.HTTP_404_NOT_FOUND, "There is no such user.")
    user.role = new.role
    await session.commit()
    # The role is in the cookie and in the tokens that they have.
    await end_everything(request.app, str(user.id))


@router.get("/orders.csv", response_class=StreamingResponse, dependencies=export)
async def export_orders(session: CurrentSession) -> StreamingResponse:
    """Export all orders, one row for each product; streamed, so that memory does not grow with the shop."""
    return StreamingResponse(
        _order_rows(session),
        media_type="text/csv; charset=utf-8",
        headers={"Content-Disposition": 'attachment; filename="orders.csv"'},
    )


async def _order_rows(session: AsyncSession) -> AsyncIterator[str]:
    columns = (Order.placed_at, Order.id, Order.name, Order.email)
    sold = (OrderLine.name.label("product"), OrderLine.quantity, OrderLine.price_cents)
    query = select(*columns, *sold).join(OrderLine).order_by(Order.placed_at, Order.id, OrderLine.product_id)
    rows = await session.stream(query.execution_options(yield_per=500))
    yield csv_line(rows.keys())
    async for row in rows:
        yield csv_line(row)


def csv_line(cells: Iterable[object]) -> str:
    """One line of CSV whose cells a spreadsheet does not take for formulas."""
    buffer = io.StringIO()
    csv.writer(buffer).writerow("'" + text if (text := str(cell)).startswith(tuple("=+-@")) else text for cell in cells)
    return buffer.getvalue()


async def _commit_or_conflict(session: AsyncSession, detail: str) -> None:
    try:
        await session.commit()
    except IntegrityError:
        raise HTTPException(status.HTTP_409_CONFLICT, detail) from None
