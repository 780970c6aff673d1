"""The shop: start it with `uvicorn sample_app.main:app` and open `/`.

Everything that hardens it is the one call `harden(app, ...)`; the rest of this package is an ordinary application.
"""

import logging
import os
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from fastapi_hardening import InputPolicy, Settings, harden
from fastapi_hardening.observability.alerts import DEFAULT_RULES, AlertRule, Ratio
from fastapi_hardening.security.auth import ApiKeyAuthenticator, ApiKeys, LoginThrottle, Sessions, Tickets
from sample_app import (
    admin,
    basket,
    catalogue,
    live,
    orders,
    partners,
    rates,
    search,
    sessions,
    storefront,
    suggestions,
    tokens,
    upload,
)
from sample_app.database import Database, default_database_url
from sample_app.users import ensure_admin

# What each role may do. A clerk may do whatever a customer may, and the admin whatever a clerk may.
RBAC = {
    "roles": {"customer": [], "clerk": ["orders:*"], "admin": ["*"]},
    "inherits": {"clerk": ["customer"], "admin": ["clerk"]},
}
# Write your own address and date; the health report warns before the date comes.
SECURITY_TXT = {
    "contact": ["mailto:security@shop.example"],
    "expires": "2027-09-30T00:00:00Z",
    "preferred_languages": ["en"],
}
# What the shop lives on has an alert of its own. Alerts are logged; HARDENING_ALERTS__WEBHOOKS says who else is told.
ORDERS_FAIL = AlertRule(
    name="OrdersFail",
    summary="More than one order in twenty fails, and it is not the customer's mistake.",
    when=Ratio(
        of='http_requests_total{handler="/api/orders",method="POST",status="5xx"}',
        to='http_requests_total{handler="/api/orders",method="POST"}',
        above=0.05,
    ),
    severity="page",
)
logger = logging.getLogger(__name__)


def create_app(database_url: str | None = None, admin_password: str | None = None) -> FastAPI:
    """Make the shop.

    Args:
        database_url: an SQLite file; else `SHOP_DATABASE_URL`, else a file in the user's cache folder.
        admin_password: of the first admin; else `SHOP_ADMIN_PASSWORD`, else a random one that is logged once.
    """
    database = Database(database_url or os.environ.get("SHOP_DATABASE_URL") or default_database_url())
    signing_secret = secret("SHOP_SIGNING_SECRET")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await database.open()
        try:
            await ensure_admin(database, admin_password or os.environ.get("SHOP_ADMIN_PASSWORD"))
            yield
        finally:
            await database.close()

    app = FastAPI(title="Hardened shop", lifespan=lifespan)

    # Who calls: people by a session, our app and services by a token, partners by a key; a websocket also by a ticket.
    auth: dict[str, object] = {
        "rbac": RBAC,
        "session": {"secrets": [secret("SHOP_SESSION_SECRET")]},
        "jwt": {
            "issuer": tokens.ISSUER,
            "audience": tokens.AUDIENCE,
            "algorithms": ["HS256"],
            "secrets": [signing_secret],
        },
        "operations_permission": "operations:read",
    }
    cors: dict[str, object] = {}
    # Pages of the shop that are hosted elsewhere may read answers, and act for who is signed in.
    if origins := os.environ.get("SHOP_ORIGINS", "").replace(",", " ").split():
        auth["trusted_origins"] = origins
        cors = {
            "allow_origins": origins,
            "allow_credentials": True,
            "allow_methods": ["GET", "HEAD", "POST", "PUT", "DELETE"],
            "allow_headers": ["Authorization", "Idempotency-Key"],
        }
    api_keys = ApiKeys(partners.PartnerKeyTable(database), prefix="shop")
    tickets = Tickets()
    rates_url = os.environ.get("SHOP_RATES_URL")
    # The one call; all other settings come from HARDENING_* variables.
    handle = harden(
        app,
        Settings(
            auth=auth,
            cors=cors,
            csp_reports={"enabled": True},
            security_txt=SECURITY_TXT,
            alerts={"rules": (*DEFAULT_RULES, ORDERS_FAIL)},
            upstreams={rates.UPSTREAM: rates.upstream(rates_url)} if rates_url else {},
        ),
        authenticators=[ApiKeyAuthenticator(api_keys), tickets],
    )

    @handle.checks.add("database", critical=True)
    async def database_answers() -> None:
        await database.ping()

    app.state.database = database
    app.state.api_keys = api_keys
    app.state.sessions = handle.auth.find(Sessions)
    app.state.throttle = LoginThrottle(store=handle.store, events=handle.events)
    app.state.issuer = tokens.make_issuer(handle, signing_secret)
    for router in (
        catalogue.router,
        suggestions.router,
        rates.router,
        search.router,
        basket.router,
        live.router,
        orders.router,
        sessions.router,
        admin.router,
        upload.router,
        partners.admin_router,
        partners.router,
        tickets.router(),
    ):
        # What looks like an attack is refused on the API; the search says for itself that it only reports.
        app.include_router(router, prefix="/api", dependencies=[InputPolicy(mode="enforce")])
    app.include_router(tokens.make_router(handle, app.state.issuer, app.state.throttle, database))
    app.include_router(storefront.router)
    return app


def secret(variable: str) -> str:
    """What something is signed with; one for this process only where the variable is not set."""
    value = os.environ.get(variable)
    if not value:
        logger.warning(
            "%s is not set: what is signed ends with this process, and other workers do not know it; "
            "set it to the output of `openssl rand -hex 32`",
            variable,
        )
        value = secrets.token_hex(32)
    return value


app = create_app()
