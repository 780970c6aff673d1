"""Orders: placed once however often they are sent, stock that cannot be sold twice, and a stream of what happens."""

from collections.abc import AsyncIterator
from typing import Annotated
from uuid import UUID

import anyio
from fastapi import APIRouter, BackgroundTasks, Depends, Header, HTTPException, Response, status
from fastapi.sse import EventSourceResponse, ServerSentEvent
from sqlalchemy import delete, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from fastapi_hardening import Idempotent, Priority, SecurityHeaders
from sample_app.catalogue import changes_catalogue
from sample_app.database import CurrentDatabase, Database
from sample_app.dependencies import Shopper
from sample_app.models import BasketItem, Order, OrderEvent, OrderLine, OrderStatus, Product
from sample_app.schemas import MAX_ID, OrderIn, OrderOut

# Shorter than the 30 seconds that a server usually has to stop; browsers come back with Last-Event-ID.
STREAM_SECONDS = 25.0
POLL_SECONDS = 1.0

router = APIRouter(prefix="/orders", tags=["orders"], dependencies=[SecurityHeaders(cache_control="no-store")])


async def confirm(database: Database, order_id: UUID) -> None:
    """Confirm an order. A real shop sends a letter here; a process that dies first leaves the order unconfirmed."""
    async with database.session() as session:
        session.add(OrderEvent(order_id=order_id, status=OrderStatus.CONFIRMED))
        await session.commit()


async def _sell(session: AsyncSession, product_id: int, quantity: int) -> OrderLine:
    # Check and sale are one statement: between two there would be room for another buyer.
    sold = await session.execute(
        update(Product)
        .where(Product.id == product_id, Product.stock >= quantity)
        .values(stock=Product.stock - quantity)
        .returning(Product.name, Product.price_cents)
        .execution_options(synchronize_session=False)
    )
    row = sold.one_or_none()
    if row is None:
        raise HTTPException(status.HTTP_409_CONFLICT, f"Product {product_id} is out of stock.")
    return OrderLine(product_id=product_id, name=row.name, price_cents=row.price_cents, quantity=quantity)


@router.post(
    "",
    status_code=status.HTTP_201_CREATED,
    response_model=OrderOut,
    # A repeated order has the first one's answer; and an order is taken when there is too much to do for all else.
    dependencies=[Idempotent(), Priority("critical"), changes_catalogue],
)
async def place_order(
    customer: OrderIn, shopper: Shopper, database: CurrentDatabase, response: Response, background: BackgroundTasks
) -> Order:
    """Order what is in the basket, all or nothing: 409 if the basket is empty or something is out of stock."""
    async with database.session() as session:
        # Emptying comes first: a second click finds nothing. Whatever raises below rolls it back.
        basket = delete(BasketItem).where(BasketItem.shopper == shopper)
        wanted = await session.execute(
            basket.returning(BasketItem.product_id, BasketItem.quantity).execution_options(synchronize_session=False)
        )
        # Sorted, so that two orders cannot wait for each other.
        lines = [await _sell(session, product_id, quantity) for product_id, quantity in sorted(wanted)]
        if not lines:
            raise HTTPException(status.HTTP_409_CONFLICT, "The basket is empty.")
        placed = OrderEvent(status=OrderStatus.PLACED)
        order = Order(shopper=shopper, name=customer.name, email=customer.email, lines=lines, events=[placed])
        session.add(order)
        await session.commit()
    response.headers["Location"] = f"/api/orders/{order.id}"
    background.add_task(confirm, database, order.id)
    return order


async def _own_order(order_id: UUID, shopper: Shopper, database: CurrentDatabase) -> Order:
    # A session of its own, given back at once: a stream must not keep a connection of the pool.
    async with database.session() as session:
        order = await session.get(Order, order_id)
    # The order of somebody else is as absent as one that never was.
    if order is None or order.shopper != shopper:
        raise HTTPException(status.HTTP_404_NOT_FOUND, "You have no such order.")
    return order


OwnOrder = Annotated[Order, Depends(_own_order)]


@router.get("/{order_id}", response_model=OrderOut)
async def read_order(order: OwnOrder) -> Order:
    """Read an order; only the shopper who placed it can."""
    return order


@router.get("/{order_id}/events", response_class=EventSourceResponse)
async def follow_order(
    order: OwnOrder, database: CurrentDatabase, last_event_id: Annotated[int, Header(ge=0, le=MAX_ID)] = 0
) -> AsyncIterator[ServerSentEvent]:
    """Stream what happens to an order until it is shipped; resumes after `Last-Event-ID`."""
    # The events are read from the database, because another worker may have written them.
    until = anyio.current_time() + STREAM_SECONDS
    while anyio.current_time() < until:
        news = select(OrderEvent).where(OrderEvent.order_id == order.id, OrderEvent.id > last_event_id)
        async with database.session() as session:
            events = (await session.scalars(news.order_by(OrderEvent.id))).all()
        for event in events:
            last_event_id = event.id
            yield ServerSentEvent(id=str(event.id), event=event.status, data={"at": event.at.isoformat() + "Z"})
            if event.status is OrderStatus.SHIPPED:
                return
        await anyio.sleep(POLL_SECONDS)
