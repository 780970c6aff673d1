"""What concerns are told of each other: who decides for whom, who counts what, and what a mounted application is given.

No concern knows another. Where one needs something that another has, a function here hands it over, when the stack is
built. The order of the layers is in :mod:`fastapi_hardening.harden`.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI
from prometheus_client import Gauge
from starlette.types import Scope

from fastapi_hardening.api import docs_pages, errors, realtime, tenancy, versioning
from fastapi_hardening.core import context as request_context
from fastapi_hardening.core.configuration import ConfigurationError
from fastapi_hardening.core.context import RequestContext
from fastapi_hardening.core.headers import RawHeaders
from fastapi_hardening.core.policy import Guard, allow_nobody, either
from fastapi_hardening.core.problem import Problem
from fastapi_hardening.core.routes import RouteEntry, RouteTable, table_of
from fastapi_hardening.core.store import MemoryStore
from fastapi_hardening.handle import Hardening
from fastapi_hardening.observability.health import HealthChanged
from fastapi_hardening.observability.request_context import ContextMaker
from fastapi_hardening.observability.tracing import record_exception
from fastapi_hardening.performance import batcher, monitor
from fastapi_hardening.performance.fast_routing import FastRouting
from fastapi_hardening.resilience import circuit_breaker, concurrency, degradation, failover, load_shedding, retry
from fastapi_hardening.resilience.degradation import Feature
from fastapi_hardening.security import csp_reports, security_txt, slowapi_limits
from fastapi_hardening.security.auth import openapi as auth_openapi
from fastapi_hardening.security.auth.layer import check_routes, demand_again
from fastapi_hardening.security.auth.overrides import require_permissions
from fastapi_hardening.security.cors import CorsPolicy
from fastapi_hardening.security.security_headers import (
    HeaderPolicy,
    SecurityHeaders,
    SecurityHeadersSettings,
    csp_nonce,
)

logger = logging.getLogger("fastapi_hardening")


def introduce(handle: Hardening) -> None:
    """Has concerns that know nothing of metrics and health counted and checked."""
    settings = handle.settings
    if settings.versioning.enabled:
        handle.versions.count = versioning.measure(handle.metrics.registry)
    if settings.tenancy.enabled and settings.tenancy.max_measured:
        handle.tenancy.count = tenancy.measure(handle.metrics.registry, settings.tenancy.max_measured)
    batcher.measure(handle.metrics.registry, handle.events)
    if settings.csp_reports.enabled:
        csp_reports.measure(handle.metrics.registry, handle.events)
    if not settings.errors.reraise:
        # What is not raised on does not come by the layer that records it.
        details = settings.tracing.record_exceptions
        handle.events.subscribe(
            errors.ExceptionUnhandled, lambda event: record_exception(event.exception, details=details)
        )
    status = Gauge(
        "hardening_health_check_status",
        "How a check went when it last ran: 0 pass, 1 warn, 2 fail.",
        ("check",),
        registry=handle.metrics.registry,
        multiprocess_mode="livemax",
    )
    handle.events.subscribe(
        HealthChanged, lambda event: status.labels(event.check).set(("pass", "warn", "fail").index(event.after))
    )
    if settings.load_shedding.enabled:
        load_shedding.measure(handle.metrics.registry, handle.shedder)
    if settings.monitor.enabled:
        monitor.measure(handle.metrics.registry, handle.events, handle.monitor)
    if settings.realtime.enabled:
        realtime.measure(handle.metrics.registry, handle.events, handle.realtime)
    concurrency.measure(handle.metrics.registry, handle.table)
    if settings.degradation.enabled:
        degradation.measure(handle.metrics.registry, handle.features)
        handle.events.subscribe(HealthChanged, lambda each: handle.features.learn(each.check, each.after))
        handle.table.on_rebuilt.append(_declaring(handle))
    if settings.security_txt.enabled:
        handle.checks.add("security_txt", security_txt.check(settings.security_txt, handle.clock), critical=False)
    handle.breakers.on_first.append(lambda: watch_circuits(handle))
    handle.upstreams.on_first.append(lambda: watch_upstreams(handle))
    handle.retries.on_first.append(lambda: retry.measure(handle.metrics.registry, handle.events))
    handle.upstreams.make()


def watch_circuits(handle: Hardening) -> None:
    """Has circuits measured and checked, once there is one."""
    circuit_breaker.measure(handle.metrics.registry, handle.breakers, handle.events)
    handle.checks.add("circuit_breakers", handle.breakers.check, critical=False)


def watch_upstreams(handle: Hardening) -> None:
    """Has upstreams measured and checked, once there is one."""
    failover.measure(handle.metrics.registry, lambda: (each.failover for each in handle.upstreams), handle.clock)
    handle.checks.add("upstreams", handle.upstreams.check, critical=False)


def _declaring(handle: Hardening) -> Callable[[RouteTable], None]:
    """Makes the features of all routes known, so that they are listed before anybody asks for one."""

    def declare(table: RouteTable) -> None:
        for entry in table:
            for feature in entry.of(Feature):
                if isinstance(feature, Feature):
                    feature.declare(handle.features)

    return declare


def banned(handle: Hardening) -> Callable[[str], Problem | None] | None:
    """Says why a key is refused whatever it has left; ``None`` where nobody is banned."""
    return handle.bans.refusal if handle.settings.bans.enabled else None


def adopt_slowapi(handle: Hardening, app: FastAPI) -> None:
    """Has the rate limit enforce what the application has declared with slowapi."""
    if not handle.settings.rate_limit.enabled:
        return
    shared = not isinstance(handle.store, MemoryStore)
    found = handle.declared_limits = slowapi_limits.adopt(handle.table, clock=handle.clock, shared=shared)
    if found is not None and found.asks_behind_middlewares:
        app.router.middleware_stack = slowapi_limits.BehindMiddlewares(app.router.middleware_stack)


def adopting(handle: Hardening) -> Callable[[RouteTable], None]:
    """Has every application of the tree answer errors alike, and show its documentation under the strict policy.

    Called again for what is mounted later.
    """
    docs = handle.settings.docs_pages
    policies = _docs_policies(docs) if docs.enabled else {}

    def adopt(table: RouteTable) -> None:
        for number, application in enumerate(table.applications):
            if number:
                handle.tracing.settle(application, mounted=True)
            if handle.settings.errors.enabled:
                errors.install(application, handle.settings.errors)
            if docs.enabled:
                docs_pages.install(application, docs, nonce=csp_nonce, policies=policies)
            if handle.settings.versioning.enabled and isinstance(application, FastAPI):
                versioning.describe(application, handle.versions)
            if not handle.auth.idle and isinstance(application, FastAPI):
                auth_openapi.describe(application, handle.auth)
            route(application, handle)

    return adopt


def route(application: Any, handle: Hardening) -> None:
    """Puts routing by the table in front of a router, which asks again who may call where a middleware moves them."""
    stack = application.router.middleware_stack
    while stack is not None and not isinstance(stack, FastRouting):
        stack = getattr(stack, "app", None)
    if stack is None or not (handle.auth.idle or stack.owner is handle):
        application.router.middleware_stack = FastRouting(
            application.router,
            table_of(application),
            handle.settings.routing,
            moved=_demanding_again(handle),
            owner=handle,
        )


def _demanding_again(handle: Hardening) -> Callable[[RouteEntry, Scope, RequestContext], Awaitable[None]]:
    """Asks again who may call, and for whom, where a middleware has moved a request."""

    async def moved(entry: RouteEntry, scope: Scope, context: RequestContext) -> None:
        await demand_again(handle.auth, entry, scope, context)
        await tenancy.admit_again(entry, scope, context)

    return moved


def telling_of_routes(handle: Hardening) -> Callable[[RouteTable], None]:
    """Says of routes that are added later what would have been refused at the start; they are closed by themselves."""

    def tell(table: RouteTable) -> None:
        try:
            check_routes(handle.auth, table)
            versioning.check_routes(table, handle.settings.versioning)
        except ConfigurationError as error:
            logger.warning("%s", error)

    return tell


def operations_guard(handle: Hardening, guard: Guard) -> Guard:
    """A guard that also lets in who has the permission for operations, where the settings name one."""
    permission = handle.settings.auth.operations_permission
    if permission is None or guard is allow_nobody:
        return guard
    return either(guard, require_permissions(permission, gate=handle.auth))


def _docs_policies(docs: docs_pages.DocsPagesSettings) -> docs_pages.Policies:
    """The header fields of each documentation page."""
    strictly: dict[str, Any] = {"content_security_policy_report_only": None}
    page = strictly | {"content_security_policy": docs_pages.policy(docs)}
    redirect = strictly | {"content_security_policy": docs_pages.REDIRECT_POLICY}
    fields = {
        # A sign-in opens a window of another origin, and hears from it when it has come back.
        "swagger_ui_html": SecurityHeaders(**page, cross_origin_opener_policy="same-origin-allow-popups"),
        "swagger_ui_redirect": SecurityHeaders(**redirect, cross_origin_opener_policy=None),
        "redoc_html": SecurityHeaders(**page),
    }
    return {name: override.after_routing for name, override in fields.items()}


def header_settings(handle: Hardening) -> SecurityHeadersSettings:
    """The header fields, which tell browsers of the report route if there is one."""
    headers, reports = handle.settings.security_headers, handle.settings.csp_reports
    if not reports.enabled or headers.reporting_endpoint is not None:
        return headers
    return headers.model_copy(update={"reporting_endpoint": reports.path})


def probe_fields(handle: Hardening) -> Callable[[RawHeaders, Scope], RawHeaders]:
    """What every answer carries, for the probes, which are answered above the layers that would add it."""
    policy = HeaderPolicy(handle.settings.security_headers)
    maker = context_maker(handle)

    def fields(headers: RawHeaders, scope: Scope) -> RawHeaders:
        context = maker.make(scope)
        if handle.settings.request_id.enabled:
            headers.append((maker.header, context.request_id.encode("ascii")))
        return policy.apply(headers, tls=context.secure)

    return fields


def policy_fields(handle: Hardening) -> Callable[[RawHeaders, Scope], RawHeaders]:
    """The header fields that protect browsers, for an answer that is made above their layer."""
    policy = HeaderPolicy(handle.settings.security_headers)
    return lambda headers, scope: policy.apply(headers, tls=request_context.ensure(scope).secure)


def allowed_origins(handle: Hardening) -> Callable[[bytes], bool]:
    """Whose pages may open websockets: those that CORS names. ``*`` names nobody: it is for answers without cookies."""
    policy = None if "*" in handle.cors.allow_origins else CorsPolicy.of(handle.cors)
    return policy.allows if policy is not None else lambda _origin: False


def context_maker(handle: Hardening) -> ContextMaker:
    """What makes the context of each request, by the settings."""
    settings = handle.settings
    return ContextMaker(
        settings.request_id,
        client_addresses=handle.client_addresses,
        error_format=settings.errors.format,
        events=handle.events,
        clock=handle.clock,
        hardened=True,
        features=handle.features,
    )
