"""The database: one SQLite file that several workers share."""

import os
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Annotated

from fastapi import Depends
from sqlalchemy import delete, event, make_url, text
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry
from starlette.requests import HTTPConnection

from sample_app.models import Base, BasketItem, Product, utc_now

KEEP_BASKETS = timedelta(days=30)
SEED = [
    ("Enamel mug", "White with a blue rim. Survives the campfire.", 1450, 40),
    ("Linen apron", "Two pockets, cross back, gets softer.", 4900, 12),
    ("Bread knife", "Beech handle, 22 cm blade.", 3200, 18),
    ("Cast-iron pan", "Heavy, honest, lasts longer than you.", 6900, 7),
    ("Tea towel, set of 3", "Half linen, loop to hang it by.", 2100, 55),
    ("Salt cellar", "Stoneware with an oak lid; the last one.", 2800, 1),
]


def default_database_url() -> str:
    """A file in the user's cache folder: shared by all workers, and no rubbish where the shop was cloned."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or Path.home() / ".cache"
    return f"sqlite+aiosqlite:///{Path(cache) / 'hardened-shop' / 'shop.sqlite3'}"


def _prepare_connection(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
    cursor = connection.cursor()
    for pragma in ("busy_timeout = 15000", "foreign_keys = ON", "synchronous = NORMAL"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


class Database:
    """Engine and sessions. Making one does no I/O; `open()` does, and may be called again after `close()`."""

    def __init__(self, url: str) -> None:
        self._engine = create_async_engine(make_url(url))
        # Objects stay readable after a commit, because nothing can be loaded implicitly in async code.
        self.session = async_sessionmaker(self._engine, expire_on_commit=False)
        event.listen(self._engine.sync_engine, "connect", _prepare_connection)

    async def open(self) -> None:
        """Create and fill the tables unless that is done; safe while other workers do the same."""
        if file := self._engine.url.database:
            Path(file).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        async with self._engine.connect() as connection:
            # Readers, such as the streamed export, then do not block writers.
            await connection.exec_driver_sql("PRAGMA journal_mode = WAL")
            # Takes the write lock first, so that only one worker finds the tables missing.
            await connection.exec_driver_sql("BEGIN IMMEDIATE")
            await connection.run_sync(Base.metadata.create_all)
            rows = [
                {"id": number, "name": name, "description": description, "price_cents": price_cents, "stock": stock}
                for number, (name, description, price_cents, stock) in enumerate(SEED, start=1)
            ]
            await connection.execute(insert(Product).on_conflict_do_nothing(), rows)
            await connection.execute(delete(BasketItem).where(BasketItem.changed_at < utc_now() - KEEP_BASKETS))
            await connection.commit()

    async def close(self) -> None:
        """Close every connection."""
        await self._engine.dispose()

    async def ping(self) -> None:
        """Raise if the database does not answer."""
        async with self.session() as session:
            await session.execute(text("SELECT 1 FROM product LIMIT 1"))


# A connection, not a request, so that it works on websockets, too.
async def _database(connection: HTTPConnection) -> Database:
    database: Database = connection.app.state.database
    return database


CurrentDatabase = Annotated[Database, Depends(_database)]


async def _session(database: CurrentDatabase) -> AsyncIterator[AsyncSession]:
    # No commit here: this runs after the answer was sent, too late to report that it failed.
    async with database.session() as session:
        yield session


CurrentSession = Annotated[AsyncSession, Depends(_session)]
