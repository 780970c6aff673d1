"""What happens to orders, as it happens, by a websocket: to customers of their own orders, to clerks of all.

The browser sends the session's cookie along, and the handshake is refused if another site asks for it. A program sends
its token as a subprotocol (`["bearer", token]`), or asks `/api/websocket-ticket` for a ticket.
"""

from contextlib import suppress

import anyio
from fastapi import APIRouter, WebSocket, WebSocketDisconnect, status
from sqlalchemy import select

from fastapi_hardening import CurrentUser, Hardening
from sample_app.database import CurrentDatabase, Database
from sample_app.dependencies import shopper_of
from sample_app.models import Order, OrderEvent

POLL_SECONDS = 1.0
RECENT = 20
# Who was signed out meanwhile is asked again when the page comes back.
LIVE_SECONDS = 300.0

router = APIRouter(prefix="/orders", tags=["orders"])


@router.websocket("/live")
async def follow_orders(websocket: WebSocket, user: CurrentUser, database: CurrentDatabase) -> None:
    """Send what has happened lately, then whatever happens."""
    hardening: Hardening = websocket.app.state.hardening
    permissions = await hardening.auth.permissions(user, user.tenant)
    shopper = None if permissions.allow("orders:read") else shopper_of(user)
    await websocket.accept()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_tell, websocket, database, shopper)
        with anyio.move_on_after(LIVE_SECONDS) as patience:
            # Nothing is expected from the client, but that it goes.
            while (await websocket.receive())["type"] != "websocket.disconnect":
                pass
        tasks.cancel_scope.cancel()
    if patience.cancelled_caught:
        await websocket.close(status.WS_1001_GOING_AWAY)


async def _tell(websocket: WebSocket, database: Database, shopper: str | None) -> None:
    # Read from the database, because another worker may have written them.
    news = select(OrderEvent).join(Order, Order.id == OrderEvent.order_id)
    if shopper is not None:
        news = news.where(Order.shopper == shopper)
    async with database.session() as session:
        before = await session.scalar(news.order_by(OrderEvent.id.desc()).offset(RECENT).limit(1))
    last = 0 if before is None else before.id
    with suppress(WebSocketDisconnect):
        while True:
            async with database.session() as session:
                events = (await session.scalars(news.where(OrderEvent.id > last).order_by(OrderEvent.id))).all()
            for event in events:
                last = event.id
                at = event.at.isoformat() + "Z"
                await websocket.send_json({"order_id": str(event.order_id), "status": event.status, "at": at})
            await anyio.sleep(POLL_SECONDS)
