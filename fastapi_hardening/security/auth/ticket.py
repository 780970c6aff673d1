"""Tickets for websockets: a browser cannot send ``Authorization`` with a handshake, so it sends one of these.

A page that is authenticated asks a route for a ticket and opens the websocket with ``?ticket=...``. A ticket is random,
works once, within about 30 seconds, and only for a handshake; what is kept of it is a hash. So what ends up in a log of
somebody in between opens nothing. It is *not* for HTTP requests, which can carry real credentials.

Example:
    >>> import asyncio
    >>> from fastapi_hardening.core.identity import Principal
    >>> tickets = Tickets()
    >>> ticket = asyncio.run(tickets.issue(Principal("anna")))
    >>> asyncio.run(tickets.redeem(ticket)).id
    'anna'
"""

import hashlib
import json
import secrets
from typing import Annotated
from urllib.parse import parse_qs

from fastapi import APIRouter, Response
from pydantic import BaseModel
from starlette.requests import HTTPConnection

from fastapi_hardening.core.clock import Clock, SystemClock
from fastapi_hardening.core.identity import InvalidCredentials, Principal
from fastapi_hardening.core.store import MemoryStore, StateStore, StoreUnavailable
from fastapi_hardening.security.auth.overrides import RequireUser
from fastapi_hardening.security.auth.principals import from_members, to_members
from fastapi_hardening.security.auth.problems import AuthenticationUnavailable

_LONGEST = 128


class Ticket(BaseModel):
    """What the route answers."""

    ticket: str
    """Goes into the query of the handshake as ``ticket``."""

    expires_in: int
    """For so many seconds it works."""


class Tickets:
    """Hands out tickets and takes them once; one of the authenticators of :func:`~fastapi_hardening.harden`.

    Args:
        ttl_seconds: For so long a ticket works.
        store: Where tickets are kept; by default that of the application, which all workers must share.
        clock: Where the time comes from; by default that of the application.
    """

    scheme = "ticket"
    challenge = ""
    query_parameter = "ticket"

    def __init__(
        self, *, ttl_seconds: float = 30.0, store: StateStore | None = None, clock: Clock | None = None
    ) -> None:
        self._ttl_seconds = ttl_seconds
        self._given = store, clock
        self._clock: Clock = clock or SystemClock()
        self._store: StateStore = store or MemoryStore(clock=self._clock)

    def attach(self, *, store: StateStore, clock: Clock) -> None:
        """Takes the store and the clock of the application where none was given."""
        own_store, own_clock = self._given
        self._store = own_store or store
        self._clock = own_clock or clock

    async def issue(self, principal: Principal) -> str:
        """A ticket for somebody.

        Raises:
            ConnectionError: The store has no room.
        """
        ticket = secrets.token_urlsafe(32)
        kept = json.dumps(to_members(principal)).encode()
        if not await self._store.put(_place(ticket, "kept"), kept, self._ttl_seconds):
            raise ConnectionError("the store has no room for the ticket")
        return ticket

    async def redeem(self, ticket: str) -> Principal:
        """Whose ticket it is; from then on it is used.

        Raises:
            InvalidCredentials: It is unknown, too old, or was used before.
        """
        kept = await self._store.get(_place(ticket, "kept"))
        if kept is None:
            raise InvalidCredentials("unknown or old ticket")
        # Of those who come at the same time one adds the mark; all others find it.
        if not await self._store.add(_place(ticket, "used"), b"1", self._ttl_seconds * 2):
            raise InvalidCredentials("ticket used before")
        await self._store.delete(_place(ticket, "kept"))
        principal = from_members(json.loads(kept))
        if principal.expires_at is not None and principal.expires_at <= self._clock.time():
            raise InvalidCredentials("expired")
        return principal

    async def authenticate(self, connection: HTTPConnection) -> Principal | None:
        """Whose ticket the handshake has; ``None`` without one, and for anything but a handshake.

        Raises:
            InvalidCredentials: The ticket opens nothing.
        """
        if connection.scope["type"] != "websocket":
            return None
        query = connection.scope.get("query_string", b"").decode("latin-1")
        sent = parse_qs(query, keep_blank_values=True).get(self.query_parameter)
        if sent is None:
            return None
        if len(sent) > 1 or len(sent[0]) > _LONGEST:
            raise InvalidCredentials("not a ticket")
        return await self.redeem(sent[0])

    def router(self, path: str = "/websocket-ticket") -> APIRouter:
        """A router with the route that hands out tickets: ``POST``, for callers who are known."""
        router = APIRouter()

        @router.post(path)
        async def websocket_ticket(user: Annotated[Principal, RequireUser()], response: Response) -> Ticket:
            response.headers["cache-control"] = "no-store"
            try:
                return Ticket(ticket=await self.issue(user), expires_in=int(self._ttl_seconds))
            except (StoreUnavailable, ConnectionError) as down:
                raise AuthenticationUnavailable from down

        return router


def _place(ticket: str, what: str) -> str:
    return f"ticket:{what}:{hashlib.sha256(ticket.encode()).hexdigest()}"
