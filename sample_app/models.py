"""The tables. Money is whole cents; a shopper is a user, or somebody of whom only the digest of a cookie is known."""

from datetime import UTC, datetime
from enum import StrEnum
from uuid import UUID, uuid4

from sqlalchemy import CheckConstraint, ForeignKey, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship


def utc_now() -> datetime:
    """Now, without a zone, because SQLite stores none; every time in the database is UTC."""
    return datetime.now(UTC).replace(tzinfo=None)


class Base(DeclarativeBase):
    """What all tables have in common."""


class Role(StrEnum):
    """What a user is; `main.py` says what each may do."""

    CUSTOMER = "customer"
    CLERK = "clerk"
    ADMIN = "admin"


class User(Base):
    """Somebody with an account."""

    __tablename__ = "user_account"

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4)
    email: Mapped[str] = mapped_column(unique=True)
    name: Mapped[str]
    role: Mapped[Role] = mapped_column(default=Role.CUSTOMER)
    password_hash: Mapped[str]


class PartnerKey(Base):
    """An API key of a partner. The key itself is nowhere, only a digest."""

    __tablename__ = "partner_key"

    id: Mapped[str] = mapped_column(primary_key=True)
    digest: Mapped[bytes]
    subject: Mapped[str]
    scopes: Mapped[str]
    created_at: Mapped[float]
    expires_at: Mapped[float | None]
    last_used_at: Mapped[float | None]
    revoked: Mapped[bool]


class Product(Base):
    """Something that the shop sells."""

    __tablename__ = "product"
    # The last line of defence: the shop's own UPDATE never takes more than there is.
    __table_args__ = (CheckConstraint("stock >= 0"), CheckConstraint("price_cents > 0"))

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    description: Mapped[str]
    price_cents: Mapped[int]
    stock: Mapped[int]
    picture_digest: Mapped[str | None] = mapped_column(default=None)

    @property
    def picture(self) -> str | None:
        """Where the picture is; a new picture has a new address, so that each can be cached for ever."""
        return self.picture_digest and f"/api/products/{self.id}/pictures/{self.picture_digest}"


class Picture(Base):
    """The picture of a product. A table of its own, so that a list of products does not read the bytes."""

    __tablename__ = "picture"

    product_id: Mapped[int] = mapped_column(ForeignKey("product.id"), primary_key=True)
    digest: Mapped[str]
    media_type: Mapped[str]
    data: Mapped[bytes]


class BasketItem(Base):
    """How many of a product a shopper wants."""

    __tablename__ = "basket_item"

    shopper: Mapped[str] = mapped_column(primary_key=True)
    product_id: Mapped[int] = mapped_column(ForeignKey("product.id"), primary_key=True)
    quantity: Mapped[int]
    changed_at: Mapped[datetime] = mapped_column(default=utc_now, onupdate=utc_now)


class OrderStatus(StrEnum):
    """What can happen to an order, in this order."""

    PLACED = "placed"
    CONFIRMED = "confirmed"
    SHIPPED = "shipped"


class OrderLine(Base):
    """One product of an order, with its name and price on that day."""

    __tablename__ = "order_line"

    order_id: Mapped[UUID] = mapped_column(ForeignKey("shop_order.id"), primary_key=True)
    product_id: Mapped[int] = mapped_column(ForeignKey("product.id"), primary_key=True)
    name: Mapped[str]
    price_cents: Mapped[int]
    quantity: Mapped[int]


class OrderEvent(Base):
    """One thing that happened to an order. The unique pair makes each happen at most once."""

    __tablename__ = "order_event"
    __table_args__ = (UniqueConstraint("order_id", "status"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[UUID] = mapped_column(ForeignKey("shop_order.id"))
    status: Mapped[OrderStatus]
    at: Mapped[datetime] = mapped_column(default=utc_now)


class Order(Base):
    """What a shopper bought."""

    __tablename__ = "shop_order"

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4)
    shopper: Mapped[str] = mapped_column(index=True)
    name: Mapped[str]
    email: Mapped[str]
    placed_at: Mapped[datetime] = mapped_column(default=utc_now)
    lines: Mapped[list[OrderLine]] = relationship(lazy="selectin", order_by=OrderLine.product_id)
    events: Mapped[list[OrderEvent]] = relationship(lazy="selectin", order_by=OrderEvent.id)

    @property
    def status(self) -> OrderStatus:
        """The last thing that happened."""
        return self.events[-1].status

    @property
    def total_cents(self) -> int:
        """What the shopper pays."""
        return sum(line.price_cents * line.quantity for line in self.lines)
