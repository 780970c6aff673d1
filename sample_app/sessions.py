"""Signing in and out with a browser: a password for a signed cookie, which the scripts of the page cannot read."""

from fastapi import APIRouter, HTTPException, Request, Response, status

from fastapi_hardening import CurrentRequest, OptionalUser, Principal, Public, RateLimit, SecurityHeaders
from fastapi_hardening.security.auth import Csrf, LoginThrottle, Sessions
from sample_app import users
from sample_app.database import CurrentDatabase, Database
from sample_app.dependencies import COOKIE, anonymous_shopper
from sample_app.schemas import CredentialsIn, NewUserIn, UserOut
from sample_app.tokens import end_everything

router = APIRouter(tags=["session"], dependencies=[SecurityHeaders(cache_control="no-store")])

# A password costs the server much more than its sender. Nobody is known yet, so requests of other sites have to be
# refused on purpose: else a page of somebody else signs a shopper in as somebody else.
for_strangers = [Public(), RateLimit("10/minute", name="login"), Csrf("always")]


@router.get("/session", dependencies=[Public()])
async def who_am_i(user: OptionalUser) -> UserOut | None:
    """Tell who is signed in; null for nobody."""
    return None if user is None else _shown(user)


@router.post("/session", dependencies=for_strangers)
async def sign_in(
    credentials: CredentialsIn, request: Request, response: Response, context: CurrentRequest, database: CurrentDatabase
) -> UserOut:
    """Sign in; 401 if the address or the password is wrong, which of them is not told."""
    sessions: Sessions = request.app.state.sessions
    throttle: LoginThrottle = request.app.state.throttle
    async with throttle.attempt(credentials.email, context.client.own_key) as attempt:
        user = await users.authenticate(database, credentials.email, credentials.password.get_secret_value())
        if user is None:
            challenge = {"WWW-Authenticate": sessions.challenge}
            raise HTTPException(status.HTTP_401_UNAUTHORIZED, "The e-mail or the password is wrong.", challenge)
        await attempt.succeeded()
    return await _begin(user, sessions, database, request, response)


@router.post("/users", status_code=status.HTTP_201_CREATED, dependencies=for_strangers)
async def register(new: NewUserIn, request: Request, response: Response, database: CurrentDatabase) -> UserOut:
    """Make an account and sign in; 422 says what is wrong with a password.

    409 tells strangers that an address has an account. A shop that sends letters answers the same to both instead.
    """
    user = await users.add_user(database, new.email, new.name, new.password.get_secret_value())
    if user is None:
        raise HTTPException(status.HTTP_409_CONFLICT, "There is an account with this e-mail already.")
    return await _begin(user, request.app.state.sessions, database, request, response)


@router.delete("/session", status_code=status.HTTP_204_NO_CONTENT)
async def sign_out(request: Request, response: Response, user: OptionalUser, *, everywhere: bool = False) -> None:
    """End the session, or with `everywhere` all that this user signed in to; the browser forgets what it kept."""
    await request.app.state.sessions.logout(request, response)
    if user is not None and everywhere:
        await end_everything(request.app, user.id)


async def _begin(
    user: Principal, sessions: Sessions, database: Database, request: Request, response: Response
) -> UserOut:
    await sessions.login(request, response, user)
    shopper = anonymous_shopper(request)
    if shopper is not None:
        async with database.session() as session:
            await users.take_over(session, shopper, user)
        response.delete_cookie(COOKIE)
    return _shown(user)


def _shown(user: Principal) -> UserOut:
    return UserOut(id=user.id, name=user.claims.get("name", user.id), roles=sorted(user.roles))
