"""Who shops: a user who is signed in, or somebody of whom only a cookie is known. And what `harden()` gave."""

import hashlib
import re
import secrets
from typing import Annotated

from fastapi import Depends, Request, Response
from starlette.requests import HTTPConnection

from fastapi_hardening import Hardening, OptionalUser, Principal

COOKIE = "shopper"
COOKIE_SECONDS = 30 * 24 * 3600
_WELL_FORMED = re.compile(r"[A-Za-z0-9_-]{43}", re.ASCII)


def shopper_of(user: Principal) -> str:
    """The shopper that somebody who is signed in is; no digest of a cookie looks like it."""
    return f"user:{user.id}"


def anonymous_shopper(request: Request) -> str | None:
    """The shopper who holds the cookie of this request, if there is one."""
    secret = request.cookies.get(COOKIE, "")
    return _digest(secret) if _WELL_FORMED.fullmatch(secret) else None


async def _shopper(request: Request, response: Response, user: OptionalUser) -> str:
    shopper = anonymous_shopper(request) if user is None else shopper_of(user)
    if shopper is None:
        secret = secrets.token_urlsafe(32)
        response.set_cookie(
            COOKIE, secret, max_age=COOKIE_SECONDS, httponly=True, samesite="lax", secure=request.url.scheme == "https"
        )
        shopper = _digest(secret)
    return shopper


def _digest(secret: str) -> str:
    # Only the digest is stored: who reads the database cannot become the shopper.
    return hashlib.sha256(secret.encode()).hexdigest()


Shopper = Annotated[str, Depends(_shopper)]


async def _hardening(connection: HTTPConnection) -> Hardening:
    handle: Hardening = connection.app.state.hardening
    return handle


CurrentHardening = Annotated[Hardening, Depends(_hardening)]
