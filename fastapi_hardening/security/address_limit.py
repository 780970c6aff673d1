"""Stops a flood from one address before it costs anything: a wide limit, in memory, ahead of every layer with I/O.

It protects the layers behind it, which look into tokens, stores and bodies, from having to do so for a flood. It is
*not* the rate limit of the application: it is ten times as wide, says nothing within the limit, and no route changes
it.

It sits behind the checks of the request itself and before authentication. Clients are addresses, IPv6 by /64; requests
without an address share one budget.

Example:
    >>> from fastapi import FastAPI
    >>> from fastapi_hardening.security.address_limit import AddressLimitMiddleware, AddressLimitSettings
    >>> app = FastAPI()
    >>> app.add_middleware(AddressLimitMiddleware, settings=AddressLimitSettings(limit="100/second"))
"""

import math
from collections.abc import Callable

from pydantic import Field, field_validator
from starlette.types import ASGIApp, Receive, Scope, Send

from fastapi_hardening.core import context as request_context
from fastapi_hardening.core.clock import Clock
from fastapi_hardening.core.configuration import ConcernSettings
from fastapi_hardening.core.keys import AllowList, stands_for_one
from fastapi_hardening.core.problem import IANA, Problem, refuse, tell
from fastapi_hardening.core.routes import route_of
from fastapi_hardening.core.window import Limit, Limiter, parse_limits


class AddressLimitSettings(ConcernSettings):
    """The settings of the flood guard."""

    limit: str = "6000/minute"
    """What one address may send, as one limit; counted as a token bucket."""

    max_keys: int = Field(1_000_000, ge=1)
    """For how many addresses there is a place; newcomers share one when all are taken by addresses in debt."""

    unknown_proxy_factor: int = Field(100, ge=1)
    """So many times wider is the limit for a private peer that forwards requests while ``trusted_proxies`` is not
    set."""

    report_only: bool = False
    """Whether refusals are only logged and counted."""

    @field_validator("limit")
    @classmethod
    def _is_one_limit(cls, limit: str) -> str:
        if len(parse_limits(limit)) != 1:
            raise ValueError(f"{limit!r}: the flood guard has one limit; rate_limit.default takes several")
        return limit


class FloodRefused(Problem):
    """One address sends far more than any client of the application should."""

    status = 429
    type = IANA + "abnormal-usage-detected"
    title = "Abnormal usage detected"


class AddressLimitMiddleware:
    """Refuses what one address sends above the limit.

    Args:
        app: The application inside.
        settings: The limit.
        clock: Where the time comes from.
        allow: Who is never refused.
        banned: Says why an address is refused whatever it has left, if it is.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: AddressLimitSettings | None = None,
        *,
        clock: Clock | None = None,
        allow: AllowList | None = None,
        banned: Callable[[str], Problem | None] | None = None,
    ) -> None:
        self.app = app
        self._allow = allow
        self._banned = banned
        self._settings = settings = settings or AddressLimitSettings()
        [limit] = parse_limits(settings.limit, "address")
        wide = Limit(limit.name, limit.quota * settings.unknown_proxy_factor, limit.window_seconds)
        self._limiter = Limiter(limit, max_keys=settings.max_keys, clock=clock)
        self._wide = Limiter(wide, max_keys=settings.max_keys, clock=clock)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        if scope["type"] not in ("http", "websocket") or not self._settings.enabled:
            await self.app(scope, receive, send)
            return
        context = request_context.ensure(scope)
        client = context.client
        if self._allow is not None and self._allow.has_address(client.address):
            await self.app(scope, receive, send)
            return
        if self._banned is not None and (ban := self._banned(client.key)) is not None:
            route_of(scope)
            await refuse(ban, scope, receive, send, layer="address limit")
            return
        decision = (self._wide if client.behind_unknown_proxy else self._limiter).hit(client.key)
        if decision.allowed:
            await self.app(scope, receive, send)
            return
        problem = FloodRefused(
            "Your address sends too many requests; come back later.",
            headers={"Retry-After": str(max(1, math.ceil(decision.retry_seconds)))},
            extensions={"violated-policies": ["address"]},
        )
        if self._settings.report_only:
            tell(problem, context, "address limit (report only)")
            await self.app(scope, receive, send)
        else:
            route_of(scope)
            key = client.key if stands_for_one(client.key, client) else None
            await refuse(problem, scope, receive, send, layer="address limit", key=key)
