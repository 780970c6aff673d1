"""The shop: start it with `uvicorn sample_app.main:app` and open `/`.

Everything that hardens it is the one line `harden(app, ...)`; the rest of this package is an ordinary application.
"""

import logging
import os
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles

from fastapi_hardening import InputPolicy, Settings, harden
from sample_app import admin, basket, catalogue, orders, search, storefront, upload
from sample_app.database import Database, default_database_url

HERE = Path(__file__).parent
# Write your own address and date; the health report warns before the date comes.
SECURITY_TXT = {
    "contact": ["mailto:security@shop.example"],
    "expires": "2027-09-30T00:00:00Z",
    "preferred_languages": ["en"],
}
logger = logging.getLogger(__name__)


def create_app(database_url: str | None = None, admin_token: str | None = None) -> FastAPI:
    """Make the shop.

    Args:
        database_url: an SQLite file; else `SHOP_DATABASE_URL`, else a file in the user's cache folder.
        admin_token: opens the admin part; else `SHOP_ADMIN_TOKEN`, else a random one that is logged at start.
            Set it when there are several workers: each would make its own.
    """
    database = Database(database_url or os.environ.get("SHOP_DATABASE_URL") or default_database_url())
    configured_token = admin_token or os.environ.get("SHOP_ADMIN_TOKEN")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if not configured_token:
            logger.warning("SHOP_ADMIN_TOKEN is not set; the admin token of this run is %s", app.state.admin_token)
        await database.open()
        try:
            yield
        finally:
            await database.close()

    app = FastAPI(title="Hardened shop", lifespan=lifespan)
    app.state.database = database
    app.state.admin_token = configured_token or secrets.token_urlsafe(24)

    # The one line; all other settings come from HARDENING_* variables.
    handle = harden(app, Settings(csp_reports={"enabled": True}, security_txt=SECURITY_TXT))

    @handle.checks.add("database", critical=True)
    async def database_answers() -> None:
        await database.ping()

    for router in (catalogue.router, search.router, basket.router, orders.router, admin.router, upload.router):
        # What looks like an attack is refused on the API; the search says for itself that it only reports.
        app.include_router(router, prefix="/api", dependencies=[InputPolicy(mode="enforce")])
    app.include_router(storefront.router)
    app.mount("/static", StaticFiles(directory=HERE / "static"), name="static")
    return app


app = create_app()
