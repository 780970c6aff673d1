"""The users: found by their password, made, and turned into what `fastapi_hardening` calls a principal."""

import logging
import secrets
from uuid import UUID

from sqlalchemy import func, select, update
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.ext.asyncio import AsyncSession

from fastapi_hardening import Principal
from fastapi_hardening.security.auth import PasswordHasher, PasswordPolicy
from sample_app.database import Database
from sample_app.dependencies import shopper_of
from sample_app.models import BasketItem, Order, Role, User

ADMIN_EMAIL = "admin@shop.example"
MOST_OF_A_PRODUCT = 99

logger = logging.getLogger(__name__)
hasher = PasswordHasher()
policy = PasswordPolicy()


def principal_of(user: User) -> Principal:
    """What routes, limits and logs know of a user. The claims can be read in the cookie, so only the name is there."""
    return Principal(str(user.id), roles=frozenset({user.role.value}), claims={"name": user.name})


async def find_user(session: AsyncSession, email: str) -> User | None:
    """The user with this address, however it is written."""
    found: User | None = await session.scalar(select(User).where(User.email == email.casefold()))
    return found


async def authenticate(database: Database, email: str, password: str) -> Principal | None:
    """Who has this address and password; takes as long for an address that nobody has."""
    async with database.session() as session:
        user = await find_user(session, email)
    # Outside of the session: a hash takes a while, and must not keep a connection of the pool.
    right = await hasher.verify(password, None if user is None else user.password_hash)
    if user is None or not right:
        return None
    if hasher.needs_rehash(user.password_hash):
        # Hashes are stronger today than when this one was made, and only now the password is at hand.
        stronger = {"password_hash": await hasher.hash(password)}
        async with database.session() as session:
            await session.execute(update(User).where(User.id == user.id).values(stronger))
            await session.commit()
    return principal_of(user)


async def load_principal(database: Database, user_id: str) -> Principal | None:
    """The user as they are now; `None` for one who is gone."""
    async with database.session() as session:
        user = await session.get(User, UUID(user_id))
    return None if user is None else principal_of(user)


async def add_user(database: Database, email: str, name: str, password: str) -> Principal | None:
    """Make a customer; `None` if the address is taken.

    Raises:
        PasswordRejected: The password cannot be taken; the client is told why.
    """
    await policy.check(password)
    statement = insert(User).values(email=email.casefold(), name=name, password_hash=await hasher.hash(password))
    async with database.session() as session:
        added: User | None = await session.scalar(statement.on_conflict_do_nothing().returning(User))
        await session.commit()
    return None if added is None else principal_of(added)


async def ensure_admin(database: Database, password: str | None) -> None:
    """Make the first admin, once, whatever number of workers asks for it.

    Args:
        database: The database.
        password: The admin's password, also where there is an admin already. Without one a new admin gets a random
            password, which is logged; nobody can read it later.
    """
    async with database.session() as session:
        if password is None and await find_user(session, ADMIN_EMAIL) is not None:
            return
    chosen = password or secrets.token_urlsafe(18)
    hashed = await hasher.hash(chosen)
    statement = insert(User).values(email=ADMIN_EMAIL, name="Admin", role=Role.ADMIN, password_hash=hashed)
    if password is None:
        statement = statement.on_conflict_do_nothing()
    else:
        statement = statement.on_conflict_do_update(index_elements=["email"], set_={"password_hash": hashed})
    async with database.session() as session:
        made = await session.scalar(statement.returning(User.id))
        await session.commit()
    if made is not None and password is None:
        logger.warning("SHOP_ADMIN_PASSWORD is not set; %s has the password %s", ADMIN_EMAIL, chosen)


async def take_over(session: AsyncSession, anonymous: str, user: Principal) -> None:
    """Give a user what they put into the basket, and ordered, before they signed in."""
    owner = shopper_of(user)
    basket = select(BasketItem).where(BasketItem.shopper == anonymous)
    for item in await session.scalars(basket):
        both = func.min(BasketItem.quantity + item.quantity, MOST_OF_A_PRODUCT)
        await session.execute(
            insert(BasketItem)
            .values(shopper=owner, product_id=item.product_id, quantity=item.quantity)
            .on_conflict_do_update(index_elements=["shopper", "product_id"], set_={"quantity": both})
        )
        await session.delete(item)
    await session.execute(update(Order).where(Order.shopper == anonymous).values(shopper=owner))
    await session.commit()
