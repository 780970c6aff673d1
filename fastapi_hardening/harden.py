"""One call hardens an application. This file is the whole of it: the layers in their order, and where they are put.

Example:
    >>> from fastapi import FastAPI
    >>> from fastapi_hardening import harden
    >>> app = FastAPI()
    >>> handle = harden(app)
    >>> [layer.name for layer in handle.pipeline if layer.state == "on"][:3]
    ['probes', 'request context', 'access log']
"""

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, nullcontext
from typing import Any

from fastapi import FastAPI
from opentelemetry.trace import TracerProvider
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from fastapi_hardening.api import errors, idempotency
from fastapi_hardening.api.idempotency import IdempotencyMiddleware
from fastapi_hardening.api.tenancy import FindTenant, TenancyMiddleware
from fastapi_hardening.api.versioning import VersioningMiddleware
from fastapi_hardening.api.versioning import check_routes as check_versions
from fastapi_hardening.core import context as request_context
from fastapi_hardening.core.clock import Clock
from fastapi_hardening.core.configuration import ConfigurationError
from fastapi_hardening.core.identity import Authenticator
from fastapi_hardening.handle import Hardening, Slot, shared
from fastapi_hardening.introductions import (
    adopt_slowapi,
    adopting,
    allowed_origins,
    banned,
    context_maker,
    header_settings,
    introduce,
    operations_guard,
    policy_fields,
    probe_fields,
    route,
    telling_of_routes,
)
from fastapi_hardening.observability.access_log import AccessLogMiddleware
from fastapi_hardening.observability.health import HealthMiddleware, details_guard
from fastapi_hardening.observability.metrics import MetricsMiddleware, metrics_guard
from fastapi_hardening.observability.request_context import RequestContextMiddleware
from fastapi_hardening.observability.tracing import layer as tracing
from fastapi_hardening.performance.compression import CompressionMiddleware
from fastapi_hardening.performance.response_cache import ResponseCacheMiddleware
from fastapi_hardening.resilience.drain import DrainMiddleware
from fastapi_hardening.resilience.load_shedding import LoadSheddingMiddleware
from fastapi_hardening.resilience.timeout import TimeoutMiddleware
from fastapi_hardening.security.address_limit import AddressLimitMiddleware
from fastapi_hardening.security.auth import openapi as auth_openapi
from fastapi_hardening.security.auth.layer import AuthenticationMiddleware, check_routes
from fastapi_hardening.security.auth.rbac import PermissionsOf
from fastapi_hardening.security.cors import CorsMiddleware, CorsSettings, take_over
from fastapi_hardening.security.csp_reports import CspReportsMiddleware
from fastapi_hardening.security.input_validation import InputValidationMiddleware
from fastapi_hardening.security.rate_limit import RateLimitMiddleware
from fastapi_hardening.security.request_limits import RequestLimitsMiddleware
from fastapi_hardening.security.security_headers import (
    SecurityHeadersMiddleware,
)
from fastapi_hardening.security.security_txt import SecurityTxtMiddleware
from fastapi_hardening.security.websocket_limits import WebSocketLimitsMiddleware
from fastapi_hardening.settings import Settings
from fastapi_hardening.upstreams import OutboundSlot

logger = logging.getLogger("fastapi_hardening")

# A request meets the layers from top to bottom, its answer from bottom to top. A slot that builds nothing is planned.
INBOUND: tuple[Slot, ...] = (
    Slot("probes", "health", "liveness, readiness, start-up and the health report, before anything can refuse them",
         lambda h, app: HealthMiddleware(
             app, h.settings.health, health=h.health, lifecycle=h.lifecycle, fields=probe_fields(h),
             guard=operations_guard(h, details_guard(h.settings.health)), about={"serviceId": h.service_name})),
    Slot("request context", "request_id", "id, client address and route of the request, once, for everything below",
         lambda h, app: RequestContextMiddleware(app, h.settings.request_id, maker=context_maker(h))),
    Slot("access log", "access_log", "one structured line a request",
         lambda h, app: AccessLogMiddleware(app, h.settings.access_log, clock=h.clock)),
    Slot("metrics", "metrics", "rate, errors and duration by route",
         lambda h, app: MetricsMiddleware(
             app, recorder=h.metrics, guard=operations_guard(h, metrics_guard(h.settings.metrics)),
             fields=policy_fields(h), clock=h.clock)),
    Slot("tracing", "tracing", "one server span", lambda h, app: tracing.around(app, h.tracing)),
    Slot("security headers", "security_headers", "header fields that protect browsers, on every answer",
         lambda h, app: SecurityHeadersMiddleware(app, header_settings(h))),
    Slot("CORS", "cors", "above everything that refuses, so that a browser may read the refusal",
         lambda h, app: CorsMiddleware(app, h.cors)),
    Slot("errors", "errors", "whatever is raised becomes a problem document",
         lambda h, app: errors.ErrorsMiddleware(app, h.settings.errors)),
    # Refusals, the cheapest first.
    Slot("drain", "health", "new connections and, in the end, new requests go elsewhere while the process ends",
         lambda h, app: DrainMiddleware(
             app, lifecycle=h.lifecycle, retry_after_seconds=h.settings.health.retry_after_seconds)),
    Slot("load shedding", "load_shedding", "503 at once while more comes than can be done",
         lambda h, app: LoadSheddingMiddleware(
             app, h.settings.load_shedding, shedder=h.shedder, load=h.load, clock=h.clock)),
    Slot("request limits", "request_limits", "line, header fields, host, path, and the body as it is read",
         lambda h, app: RequestLimitsMiddleware(
             app, h.settings.request_limits, allowed_hosts=h.settings.allowed_hosts, clock=h.clock)),
    Slot("address limit", "address_limit", "flood guard by client address, without I/O",
         lambda h, app: AddressLimitMiddleware(
             app, h.settings.address_limit, clock=h.clock, allow=h.allow, banned=banned(h))),
    Slot("security.txt", "security_txt", "whom to tell of a vulnerability",
         lambda h, app: SecurityTxtMiddleware(app, h.settings.security_txt)),
    Slot("CSP reports", "csp_reports", "takes and counts what browsers report of policies",
         lambda h, app: CspReportsMiddleware(app, h.settings.csp_reports, events=h.events, clock=h.clock)),
    Slot("websocket limits", "websocket_limits", "who may open websockets, what they may send, how long they stay",
         lambda h, app: WebSocketLimitsMiddleware(
             app, h.settings.websocket_limits, admits=allowed_origins(h), lifecycle=h.lifecycle, clock=h.clock)),
    Slot("version", "versioning", "which version of the API is asked for",
         lambda h, app: VersioningMiddleware(app, versions=h.versions)),
    Slot("authentication", "auth", "who calls, and whether the route lets them",
         lambda h, app: AuthenticationMiddleware(app, gate=h.auth)),
    Slot("tenancy", "tenancy", "whose data it is about",
         lambda h, app: TenancyMiddleware(app, tenancy=h.tenancy)),
    Slot("rate limit", "rate_limit", "limits by client and route; by identity, plan and tenant once they are known",
         lambda h, app: RateLimitMiddleware(
             app, h.settings.rate_limit, clock=h.clock, store=h.store, declared=h.declared_limits, banned=banned(h))),
    Slot("input validation", "input_validation", "looks for attacks in content, and reports or refuses them",
         lambda h, app: InputValidationMiddleware(app, h.settings.input_validation, report=h.validation)),
    Slot("timeout", "timeout", "504 where a handler has not begun to answer in time",
         lambda h, app: TimeoutMiddleware(app, h.settings.timeout, clock=h.clock)),
    Slot("idempotency", "idempotency", "answers a repeated request once, after authorisation",
         lambda h, app: IdempotencyMiddleware(
             app, h.settings.idempotency, store=shared(h.store), events=h.events, clock=h.clock)),
    Slot("compression", "compression", "compresses answers",
         lambda h, app: CompressionMiddleware(app, h.settings.compression)),
    Slot("response cache", "response_cache", "answers from memory, after authorisation",
         lambda h, app: ResponseCacheMiddleware(
             app, h.settings.response_cache, levels=h.cache.levels, clock=h.clock)),
)  # fmt: skip

# A call of another service meets these from top to bottom, its answer from bottom to top; for each upstream anew.
OUTBOUND: tuple[OutboundSlot, ...] = (
    OutboundSlot("total timeout", "total_seconds", "how long a call may take, with all its attempts",
                 lambda upstream, send: upstream.total.around(send)),
    OutboundSlot("bulkhead", "bulkhead", "how many calls may be under way and wait",
                 lambda upstream, send: upstream.bulkhead.around(send)),
    OutboundSlot("retry", "retry", "another attempt, within the budget",
                 lambda upstream, send: upstream.retry.around(send, unsent=upstream.pool.unsent)),
    OutboundSlot("failover", "failover", "which endpoint; a second one, where the first takes long",
                 lambda upstream, send: upstream.failover.around(send)),
    OutboundSlot("circuit breaker", "circuit_breaker", "no calls of an endpoint that fails; one for each",
                 lambda upstream, send: upstream.breakers.around(send, upstream.breaker_of)),
    OutboundSlot("attempt timeout", "attempt_seconds", "how long one attempt may take",
                 lambda upstream, send: upstream.attempt.around(send)),
    OutboundSlot("connection pool", "connections", "a connection to that endpoint, and the request on it",
                 lambda upstream, _send: upstream.pool.send),
)  # fmt: skip


def harden(
    app: FastAPI,
    settings: Settings | None = None,
    *,
    authenticators: Sequence[Authenticator] = (),
    permissions_of: PermissionsOf | None = None,
    tenants: FindTenant | None = None,
    tracer_provider: TracerProvider | None = None,
    clock: Clock | None = None,
) -> Hardening:
    """Hardens an application: security headers, errors, request ids, probes, draining, in the right order.

    Call it once, where the application is made. Routes, routers, mounts, middlewares and OpenTelemetry instrumentation
    may be added before or after; the layers stay outside of all of them.

    Args:
        app: The application.
        settings: The settings; by default they come from the environment.
        authenticators: Who finds out who calls, asked in this order, before those that the settings name.
        permissions_of: Gives the permissions of a set of roles, beside the settings; sync or async.
        tenants: Gives the tenant of a name, or ``None`` for no such tenant; sync or async.
        tracer_provider: Makes the tracers of OpenTelemetry; by default the global one, as soon as there is one.
        clock: Where the time comes from; for tests.

    Returns:
        The handle, which is also ``app.state.hardening``.

    Raises:
        ConfigurationError: The settings cannot work, the application is hardened already, or it already serves.
    """
    if not isinstance(app, FastAPI):
        raise ConfigurationError(
            f"harden() takes a FastAPI application, not {type(app).__name__}; on Starlette add the middlewares singly"
        )
    if settings is not None and not isinstance(settings, Settings):
        raise ConfigurationError(f"harden() takes Settings(...), not {type(settings).__name__}; its keys are arguments")
    if getattr(app.state, "hardening", None) is not None:
        raise ConfigurationError("harden() was called on this application before; its handle is app.state.hardening")
    if app.middleware_stack is not None:
        raise ConfigurationError("harden() was called after the application began to serve; call it where it is made")
    handle = app.state.hardening = Hardening(
        app,
        settings or Settings(),
        INBOUND,
        OUTBOUND,
        authenticators=authenticators,
        permissions_of=permissions_of,
        tenants=tenants,
        tracer_provider=tracer_provider,
        clock=clock,
    )
    build, lifespan = app.build_middleware_stack, app.router.lifespan_context
    adopt_all = adopting(handle)

    def build_hardened_stack() -> ASGIApp:
        adopt_all(handle.table.built())
        check_routes(handle.auth, handle.table)
        check_versions(handle.table, handle.settings.versioning)
        handle.table.on_rebuilt += [adopt_all, telling_of_routes(handle)]
        taken = take_over(app, handle.settings.cors)
        handle.cors = taken or handle.settings.cors
        adopt_slowapi(handle, app)
        inner = build()
        # Mounted in another hardened application, ours step aside; a policy that was taken over still holds.
        bare = _bare(handle, inner, taken)
        # A server error middleware outermost: what instruments the application later expects one there.
        return ServerErrorMiddleware(_around(handle, inner, bare), handler=errors.exception_handler)  # type: ignore[arg-type]

    @asynccontextmanager
    async def hardened_lifespan(application: Any) -> AsyncIterator[Any]:
        handle.lifecycle.begin("lifespan")
        # Without the drain layer nothing would tell clients, so the server is not kept waiting either.
        drains = handle.settings.health.enabled
        with handle.lifecycle.on_sigterm() if drains else nullcontext(), handle.monitor.running():
            await handle.store.open()
            try:
                async with (
                    handle.alerts.running(),
                    handle.breakers.sharing(),
                    handle.realtime.running(),
                    lifespan(application) as state,
                ):
                    handle.tracing.start()
                    handle.lifecycle.finish("lifespan")
                    yield state
            finally:
                await handle.cache.close()
                await handle.upstreams.close()
                await handle.tracing.stop()
                await handle.store.close()

    route(app, handle)
    handle.tracing.settle(app)
    app.build_middleware_stack = build_hardened_stack  # type: ignore[method-assign]
    app.router.lifespan_context = hardened_lifespan
    if handle.settings.errors.enabled and handle.settings.errors.format == "problem":
        errors.describe(app)  # now, for a document that is exported without serving; again when the stack is built
    auth_openapi.describe(app, handle.auth)
    if handle.settings.idempotency.enabled:
        idempotency.describe(app)
    introduce(handle)
    for key in handle.settings.without_effect():
        logger.warning("%s is set, but this concern is not built yet, so it has no effect", key)
    logger.info("hardened %s: %s", app.title, ", ".join(layer.name for layer in handle.pipeline if layer.state == "on"))
    return handle


def _around(handle: Hardening, inner: ASGIApp, bare: ASGIApp) -> ASGIApp:
    """The layers that are on, around an application; ``bare`` is what is left of them inside another hardened one."""
    app = inner
    for slot in reversed(INBOUND):
        # The context is always made: layers further in rely on it. Its own switch only takes the id off answers.
        if slot.build is not None and (handle.state_of(slot) == "on" or slot.setting == "request_id"):
            app = slot.build(handle, app)
    return _StepAside(app, bare)


def _bare(handle: Hardening, inner: ASGIApp, taken: CorsSettings | None) -> ASGIApp:
    """What is left in another hardened application: who may call, and for whom, is never for others to say."""
    app = inner
    if handle.settings.tenancy.enabled:
        app = TenancyMiddleware(app, tenancy=handle.tenancy, table=handle.table)
    if not handle.auth.idle:
        app = AuthenticationMiddleware(app, gate=handle.auth, table=handle.table)
    return app if taken is None else CorsMiddleware(app, taken)


class _StepAside:
    """Leaves the work to the stack outside, where a hardened application is mounted in another one."""

    def __init__(self, app: ASGIApp, bare: ASGIApp) -> None:
        self.app = app
        self._bare = bare

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        context = request_context.of(scope)
        around = context is not None and context.hardened
        await (self._bare if around else self.app)(scope, receive, send)
