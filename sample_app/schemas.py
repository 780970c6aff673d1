"""What goes in and what comes out. Input forbids unknown fields and has a limit on everything."""

from datetime import UTC, datetime
from typing import Annotated
from uuid import UUID

from fastapi import Path, Query
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, StringConstraints

from sample_app.models import OrderStatus, Role

# Larger numbers than the database can hold would be a 500.
MAX_ID = 2**31 - 1
ProductId = Annotated[int, Path(ge=1, le=MAX_ID)]
Offset = Annotated[int, Query(ge=0, le=MAX_ID)]
Limit = Annotated[int, Query(ge=1, le=100)]

# One line without control characters.
Line = Annotated[
    str, StringConstraints(strip_whitespace=True, min_length=1, max_length=120, pattern=r"^[^\x00-\x1f\x7f]+$")
]
Email = Annotated[str, StringConstraints(max_length=254, pattern=r"^[^@\s\x00-\x1f\x7f]+@[^@\s\x00-\x1f\x7f]+$")]
# No rules but a limit: what may be chosen is the business of the password policy, which says why not. The value is kept
# out of every representation, so that no log has it.
Password = Annotated[SecretStr, Field(min_length=1, max_length=1000)]


def _only_a_number(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("is not a number")  # noqa: TRY004 - only a ValueError becomes a 422
    return value


# Left to itself, Pydantic takes `true` and "1" for 1. Comes last, else the limits are missing in the OpenAPI schema.
Number = BeforeValidator(_only_a_number)
# The database stores no zone, and a browser takes a time without one for its own.
UtcTime = Annotated[datetime, AfterValidator(lambda time: time.replace(tzinfo=UTC))]


class Input(BaseModel):
    """What a client sends."""

    model_config = ConfigDict(extra="forbid")


class Output(BaseModel):
    """What a client gets, read from the tables."""

    model_config = ConfigDict(from_attributes=True)


class ProductIn(Input):
    """A product as the shopkeeper describes it."""

    name: Line
    description: Line
    price_cents: Annotated[int, Field(ge=1, le=100_000_000), Number]


class NewProductIn(ProductIn):
    """A product that the shop does not have yet."""

    stock: Annotated[int, Field(ge=0, le=1_000_000), Number] = 0


class DeliveryIn(Input):
    """Goods that arrived."""

    quantity: Annotated[int, Field(ge=1, le=10_000), Number]


class ProductOut(Output):
    """A product as a shopper sees it."""

    id: int
    name: str
    description: str
    price_cents: int
    stock: int
    picture: str | None


class ProductPage(Output):
    """A part of a list of products; `next_offset` is null on the last one."""

    items: list[ProductOut]
    next_offset: int | None


class SuggestionOut(Output):
    """A product that goes well with another one."""

    id: int
    name: str


class BasketItemIn(Input):
    """How many of a product shall be in the basket."""

    quantity: Annotated[int, Field(ge=1, le=99), Number]


class LineOut(Output):
    """One line of a basket or an order."""

    product_id: int
    name: str
    price_cents: int
    quantity: int


class BasketOut(Output):
    """What is in the basket."""

    lines: list[LineOut]
    total_cents: int


class OrderIn(Input):
    """Who orders what is in the basket."""

    name: Line
    email: Email


class OrderOut(Output):
    """An order as its shopper sees it."""

    id: UUID
    status: OrderStatus
    placed_at: UtcTime
    lines: list[LineOut]
    total_cents: int


class CredentialsIn(Input):
    """What somebody signs in with."""

    email: Email
    password: Password


class NewUserIn(CredentialsIn):
    """Somebody who wants an account."""

    name: Line


class UserOut(Output):
    """Somebody who is signed in, as they see themselves."""

    id: str
    name: str
    roles: list[str]


class RoleIn(Input):
    """What a user shall be from now on."""

    role: Role


class NewKeyIn(Input):
    """A partner that needs a key."""

    partner: Line
    days: Annotated[int, Field(ge=1, le=365), Number] = 90


class KeyOut(Output):
    """A key as the list shows it; nothing of it opens anything."""

    id: str
    partner: str
    scopes: list[str]
    expires_at: float | None
    last_used_at: float | None
    revoked: bool


class NewKeyOut(KeyOut):
    """A new key: the only answer in which it can be read."""

    key: str


class StockOut(Output):
    """How much of a product there is."""

    id: int
    name: str
    stock: int
