"""Who is asking: the anonymous shopper, or the shopkeeper. Logins would replace what is in this file only."""

import hashlib
import re
import secrets
from typing import Annotated

from fastapi import Depends, HTTPException, Request, Response, status
from fastapi.security import APIKeyHeader

COOKIE = "shopper"
COOKIE_SECONDS = 30 * 24 * 3600
_WELL_FORMED = re.compile(r"[A-Za-z0-9_-]{43}", re.ASCII)


async def _shopper(request: Request, response: Response) -> str:
    secret = request.cookies.get(COOKIE, "")
    if not _WELL_FORMED.fullmatch(secret):
        secret = secrets.token_urlsafe(32)
        response.set_cookie(
            COOKIE, secret, max_age=COOKIE_SECONDS, httponly=True, samesite="lax", secure=request.url.scheme == "https"
        )
    # Only the digest is stored: who reads the database cannot become the shopper.
    return hashlib.sha256(secret.encode()).hexdigest()


Shopper = Annotated[str, Depends(_shopper)]

_admin_token = APIKeyHeader(name="X-Admin-Token", description="The value of SHOP_ADMIN_TOKEN.")


async def _require_admin(request: Request, token: Annotated[str, Depends(_admin_token)]) -> None:
    # Compared as bytes, because `compare_digest` raises on text that is not ASCII.
    if not secrets.compare_digest(token.encode(), request.app.state.admin_token.encode()):
        raise HTTPException(
            status.HTTP_401_UNAUTHORIZED, "The admin token is wrong.", headers={"WWW-Authenticate": "APIKey"}
        )


RequireAdmin = Depends(_require_admin)
