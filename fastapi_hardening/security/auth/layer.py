"""Finds out who calls, and refuses whom the route does not let in, before anything of the body is read.

It protects every path alike: direct, included, nested, mounted, static, websocket, and one that no route has. With
``auth.default = "required"`` everything is closed but what says ``Public()``. It is *not* a login: who calls is found
out by authenticators, from credentials that something has given out.

It is a layer and not only a dependency, because FastAPI parses the body before it solves dependencies, dependencies run
neither on mounts nor on a 404, and what answers from a cache would answer one caller with what is another's. It sits
below what refuses without I/O, and above limits by identity, idempotency and caches.

Example:
    >>> from fastapi import FastAPI
    >>> from pydantic import SecretStr
    >>> from fastapi_hardening.security.auth import AuthenticationMiddleware, AuthSettings, BasicAuthenticator
    >>> app = FastAPI()
    >>> app.add_middleware(
    ...     AuthenticationMiddleware,
    ...     settings=AuthSettings(default="required"),
    ...     authenticators=[BasicAuthenticator({"operator": SecretStr("correct horse battery")})],
    ... )
"""

import logging
from collections.abc import Sequence

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_hardening.core import context as request_context
from fastapi_hardening.core.configuration import ConfigurationError
from fastapi_hardening.core.context import RequestContext
from fastapi_hardening.core.identity import Authenticator
from fastapi_hardening.core.policy import mark_handled
from fastapi_hardening.core.problem import Problem, refuse, tell
from fastapi_hardening.core.routes import RouteEntry, RouteTable, route_of
from fastapi_hardening.security.auth.gate import Found, Gate, is_ambient
from fastapi_hardening.security.auth.handshake import Handshake, agreeing, take_credentials
from fastapi_hardening.security.auth.overrides import (
    LAYER,
    Csrf,
    Requirement,
    acts_itself,
    is_open,
    refuse_cross_site,
    requirements_of,
)
from fastapi_hardening.security.auth.session import AnswerFields
from fastapi_hardening.security.auth.settings import AuthSettings

logger = logging.getLogger("fastapi_hardening.auth")

_STARTS = frozenset({"http.response.start", "websocket.accept", "websocket.http.response.start"})


class AuthenticationMiddleware:
    """Identifies every caller, and refuses as the settings and the route demand.

    Args:
        app: The application inside.
        settings: The settings of authentication.
        authenticators: Who finds out who calls, asked in this order.
        gate: Both of them made already; then they are left out.
        table: The routes to look in, where they are not those of the outermost application.

    Raises:
        ConfigurationError: Everything is closed and nobody could be let in.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: AuthSettings | None = None,
        *,
        authenticators: Sequence[Authenticator] = (),
        gate: Gate | None = None,
        table: RouteTable | None = None,
    ) -> None:
        self.app = app
        self.gate = gate or Gate(settings, authenticators)
        self._table = table

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        if self.gate.idle or scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        context = request_context.ensure(scope)
        entry = route_of(scope) if self._table is None else self._table.find(scope)
        seen = Handshake(scope, offered_token=False)
        if scope["type"] == "websocket":
            seen = take_credentials(scope, self.gate.query_parameters)
        context.state[Gate] = self.gate
        try:
            if seen.ambiguous:
                raise self.gate.credentials_refused()
            connection = HTTPConnection(seen.connection_scope)
            found = await self.gate.identify(connection, open_to_all=is_open(entry, required=self.gate.required))
            context.principal = None if found is None else found.principal
            context.state.setdefault(Found, {})[self.gate] = found
            await demand(self.gate, found, entry, scope, context)
        except Problem as problem:
            await refuse(problem, scope, receive, send, layer=LAYER)
            return
        added = context.state.get(AnswerFields)
        if added is not None:
            send = _adding(send, added)
        if seen.offered_token:
            send = agreeing(send, tuple(scope["subprotocols"]))
        await self.app(scope, receive, send)


async def demand(gate: Gate, found: Found | None, entry: RouteEntry, scope: Scope, context: RequestContext) -> None:
    """Demands of a caller what the default and a route demand.

    Raises:
        Problem: The caller is not let in.
    """
    ambient = found is not None and is_ambient(found.authenticator)
    if not entry.overrides and not ambient:
        # What most requests are: nothing is said by the route, and the credentials are the caller's own.
        if found is None and gate.required:
            raise gate.not_authenticated()
        return
    connection = HTTPConnection(scope)
    csrf = entry.of(Csrf)
    checked = csrf[-1].checks if csrf and isinstance(csrf[-1], Csrf) else None  # the innermost counts
    mark_handled(scope, csrf)
    if checked or (checked is None and ambient):
        refuse_cross_site(connection, context, gate)
    if found is None:
        if not is_open(entry, required=gate.required):
            raise gate.not_authenticated()
        return
    handled: dict[type[Requirement], list[Requirement]] = {}
    for requirement in requirements_of(entry):
        waits = requirement.waits(found.principal, context)
        if waits and acts_itself(requirement, entry):
            continue
        await requirement.check(found.principal, connection, gate)
        if not waits:
            handled.setdefault(type(requirement), []).append(requirement)
    for requirements in handled.values():
        mark_handled(scope, tuple(requirements))


async def demand_again(gate: Gate, entry: RouteEntry, scope: Scope, context: RequestContext) -> None:
    """Demands what another route demands, where a middleware has sent the request there after the layer.

    Raises:
        Problem: The caller is not let in; it has been told.
    """
    found = context.state.get(Found, {})
    if gate not in found:
        return  # What is inside of another hardened application and has no gate of its own.
    try:
        await demand(gate, found[gate], entry, scope, context)
    except Problem as problem:
        tell(problem, context, LAYER)
        raise


def _adding(send: Send, added: AnswerFields) -> Send:
    async def send_with_fields(message: Message) -> None:
        if message["type"] in _STARTS:
            message["headers"] = [*(message.get("headers") or ()), *added.fields]
        await send(message)

    return send_with_fields


def _unmet(gate: Gate, table: RouteTable) -> set[str]:
    """The routes with requirements, but for those of mounted applications that are hardened with their own gate."""
    met: set[int] = set()
    for application in table.applications:
        hardening = getattr(application.state, "hardening", None)
        if hardening is not None and hardening.auth is not gate and not hardening.auth.idle:
            met.update(id(each) for entry in hardening.table for each in requirements_of(entry))
    return {str(entry.template) for entry in table if any(id(each) not in met for each in requirements_of(entry))}


def check_routes(gate: Gate, table: RouteTable) -> None:
    """Tells what is open, and refuses routes whose demands nobody could meet.

    Args:
        gate: The gate of the application.
        table: Its routes.

    Raises:
        ConfigurationError: A route demands a caller who is known, and there is no authenticator.
    """
    closed = set() if gate.authenticators else _unmet(gate, table)
    if closed:
        gate.idle = False  # Should the application go on all the same: on a mount no dependency would refuse.
        raise ConfigurationError(
            f"{', '.join(sorted(closed)[:5])}: the route demands a caller who is known, but nothing could let anybody "
            "in; give harden() authenticators, as in harden(app, authenticators=[...]), or set auth.basic or "
            "auth.session"
        )
    if gate.required:
        free = {entry.template or f"a {entry.kind} route" for entry in table if is_open(entry, required=True)}
        logger.info("open to everybody: %s", ", ".join(sorted(free)) or "nothing")
