"""Signing in with a program: tokens for our own app (by password) and for a partner's service (by its secret)."""

import os

from fastapi import APIRouter, FastAPI

from fastapi_hardening import Hardening, Principal, Public, RateLimit
from fastapi_hardening.security.auth import (
    BearerAuthenticator,
    IssuerSettings,
    LoginThrottle,
    OAuthClient,
    SigningKey,
    TokenIssuer,
    hash_client_secret,
    token_router,
)
from sample_app import users
from sample_app.database import Database

ISSUER = "https://shop.example"
AUDIENCE = "https://shop.example/api"


def make_issuer(handle: Hardening, signing_secret: str) -> TokenIssuer:
    """Make what issues tokens. `auth.jwt` in `main.py` verifies them: the same issuer, audience and secret."""
    return TokenIssuer(
        IssuerSettings(issuer=ISSUER, audience=AUDIENCE),
        keys=SigningKey(signing_secret, "HS256"),
        store=handle.store,
        events=handle.events,
    )


def make_router(handle: Hardening, issuer: TokenIssuer, throttle: LoginThrottle, database: Database) -> APIRouter:
    """Make `/oauth/token` and `/oauth/revoke`."""
    # The grant `password` is for our own app only, which shows our own form.
    clients = [OAuthClient("shop-app", grants={"password", "refresh_token"})]
    if secret := os.environ.get("SHOP_PARTNER_SECRET"):
        hashes = [hash_client_secret(secret)]
        clients.append(OAuthClient("partner", {"client_credentials"}, scope={"stock:read"}, secret_hashes=hashes))

    async def authenticate(email: str, password: str) -> Principal | None:
        return await users.authenticate(database, email, password)

    async def load_user(user_id: str) -> Principal | None:
        return await users.load_principal(database, user_id)

    bearer = handle.auth.find(BearerAuthenticator)
    return token_router(
        issuer,
        authenticate,
        clients=clients,
        load_user=load_user,
        throttle=throttle,
        revoke_access_token=None if bearer is None else bearer.revoke,
        dependencies=[Public(), RateLimit("30/minute", name="tokens")],
    )


async def end_everything(app: FastAPI, user_id: str) -> None:
    """End all that says who a user was until now: sessions, refresh tokens and access tokens."""
    await app.state.sessions.revoke_all(user_id)
    await app.state.issuer.revoke_subject(user_id)
    await app.state.hardening.auth.revocations.revoke_issued_before(user_id, issuer=ISSUER)
