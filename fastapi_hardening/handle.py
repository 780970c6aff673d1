"""The handle of a hardened application: what its concerns share, and what an application may ask about itself."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from fastapi import FastAPI
from opentelemetry.trace import TracerProvider
from prometheus_client import Gauge
from starlette.types import ASGIApp

from fastapi_hardening.api.realtime import Realtime
from fastapi_hardening.api.tenancy import FindTenant, Tenancy
from fastapi_hardening.api.versioning import Versions
from fastapi_hardening.core.cache_levels import CacheMetrics
from fastapi_hardening.core.charge import Declarations
from fastapi_hardening.core.check import CheckResult, Checks
from fastapi_hardening.core.client_ip import ClientAddressResolver
from fastapi_hardening.core.clock import Clock, SystemClock
from fastapi_hardening.core.events import Events
from fastapi_hardening.core.features import Features
from fastapi_hardening.core.identity import Authenticator
from fastapi_hardening.core.keys import AllowList
from fastapi_hardening.core.lifecycle import Lifecycle
from fastapi_hardening.core.load import Load
from fastapi_hardening.core.redis_store import RedisStore
from fastapi_hardening.core.routes import RouteEntry, RouteTable, table_of
from fastapi_hardening.core.store import MemoryStore, StateStore, StoreFailed, StoreRecovered
from fastapi_hardening.observability.alerts import Alerts
from fastapi_hardening.observability.health import Health, is_probe
from fastapi_hardening.observability.metrics import Recorder
from fastapi_hardening.observability.tracing import Tracing
from fastapi_hardening.overview import Observability
from fastapi_hardening.performance.cache import Cache
from fastapi_hardening.performance.monitor import Monitor
from fastapi_hardening.resilience.circuit_breaker import CircuitBreakers
from fastapi_hardening.resilience.load_shedding import Shedder
from fastapi_hardening.resilience.retry import Retries
from fastapi_hardening.security.auth.gate import Gate
from fastapi_hardening.security.auth.keys import RemoteKeys
from fastapi_hardening.security.auth.overrides import is_open
from fastapi_hardening.security.auth.rbac import PermissionsOf
from fastapi_hardening.security.bans import BanList
from fastapi_hardening.security.cors import CorsSettings
from fastapi_hardening.security.input_validation import ValidationReport
from fastapi_hardening.settings import Settings
from fastapi_hardening.upstreams import OutboundSlot, Upstreams

if TYPE_CHECKING:
    import httpx2

LayerState = Literal["on", "off", "planned"]


class Slot(NamedTuple):
    """A place in the pipeline.

    Attributes:
        name: What the layer is called.
        setting: The field of the settings that switches it.
        purpose: What it is for, in a few words.
        build: Puts the layer around an application; ``None`` where it is planned.
    """

    name: str
    setting: str
    purpose: str
    build: Callable[["Hardening", ASGIApp], ASGIApp] | None = None


@dataclass(frozen=True, slots=True)
class Layer:
    """A line of the pipeline's description.

    Attributes:
        name: What the layer is called.
        state: ``on``, ``off`` by the settings, or ``planned``.
        purpose: What it is for, in a few words.
        setting: The field of the settings that switches it.
    """

    name: str
    state: LayerState
    purpose: str
    setting: str


@dataclass(frozen=True, slots=True)
class RoutePolicies:
    """What holds on a route.

    Attributes:
        template: The path template with every prefix and mount.
        methods: The methods that it takes; empty for any.
        kind: ``http``, ``websocket``, ``mount`` (not looked into) or ``other``.
        overrides: The overrides by the name of their class, the outermost level first.
        open: Somebody unknown may call it.
    """

    template: str | None
    methods: tuple[str, ...]
    kind: str
    overrides: Mapping[str, tuple[Any, ...]]
    open: bool = True


class Hardening:
    """What :func:`~fastapi_hardening.harden` returns and leaves on ``app.state.hardening``.

    Attributes:
        settings: The settings in effect.
        cors: The CORS policy in effect: that of the settings, or of the application's own middleware, taken over.
        service_name: How the service calls itself.
        events: Facts that concerns tell; subscribe to them.
        checks: Health checks; add your own.
        health: Runs the checks, and remembers what they said.
        validation: What the validator found on each route, and whether refusing it would hurt anybody.
        metrics: What is recorded; add your own series and functions.
        monitor: Which requests are slow, and what blocks the event loop.
        tracing: What makes the spans of requests, and where they go.
        alerts: What is wrong now, and who is told; silence rules and add sinks here.
        observability: One look at life, health, requests, traces and alerts.
        bans: Who is banned; add and lift bans here.
        allow: Who is never limited nor banned; ``None`` for nobody.
        breakers: Circuit breakers by name; look at them, force and reset them.
        retries: Retry policies by name.
        upstreams: Other services by name; :meth:`upstream` gives the client of one.
        store: Where shared state is kept: in this process, or in the Redis of ``state_url``.
        cache: What is slow to make and kept for a while; use it in endpoints.
        realtime: Channels of websockets and event streams; publish, and say who may subscribe.
        auth: Who calls, and what they may do.
        versions: Which versions of the API there are.
        tenancy: Whose data a request is about; forget a tenant here when it is closed.
        lifecycle: Whether the process starts, serves or drains.
        load: How much there is to do; add queues of your own.
        features: Which features are on; switch them off and on by hand here.
        shedder: Who decides which requests are refused when it is too much.
        client_addresses: Finds the client's address.
        table: The routes of the application and of everything mounted under it.
        clock: Where the time comes from.
        declared_limits: Limits that the application has declared with slowapi; ``None`` for none, and before it serves.
    """

    settings: Settings
    cors: CorsSettings
    service_name: str
    events: Events
    checks: Checks
    health: Health
    validation: ValidationReport
    metrics: Recorder
    monitor: Monitor
    tracing: Tracing
    alerts: Alerts
    observability: Observability
    bans: BanList
    allow: AllowList | None
    breakers: CircuitBreakers
    retries: Retries
    upstreams: Upstreams
    store: StateStore
    cache: Cache
    realtime: Realtime
    auth: Gate
    versions: Versions
    tenancy: Tenancy
    lifecycle: Lifecycle
    load: Load
    features: Features
    shedder: Shedder
    client_addresses: ClientAddressResolver
    table: RouteTable
    clock: Clock
    declared_limits: Declarations | None

    def __init__(
        self,
        app: FastAPI,
        settings: Settings,
        inbound: Sequence[Slot] = (),
        outbound: Sequence[OutboundSlot] = (),
        *,
        authenticators: Sequence[Authenticator] = (),
        permissions_of: PermissionsOf | None = None,
        tenants: FindTenant | None = None,
        tracer_provider: TracerProvider | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._inbound = inbound
        self.declared_limits = None
        self.settings = settings
        self.cors = settings.cors
        self.service_name = settings.service_name or app.title
        self.clock = clock or SystemClock()
        self.events = Events()
        self.checks = Checks()
        self.health = Health(self.checks, settings.health, events=self.events, clock=self.clock)
        self.validation = ValidationReport()
        self.metrics = Recorder(
            settings.metrics,
            events=self.events,
            build={"service": self.service_name, "version": app.version},
            clock=self.clock,
        )
        self.tracing = Tracing(
            settings.tracing,
            service_name=self.service_name,
            provider=tracer_provider,
            is_probe=is_probe(settings.health),
        )
        self.alerts = Alerts(
            settings.alerts,
            source=self.metrics.collector,
            prepare=self.health.report,
            service=self.service_name,
            events=self.events,
            clock=self.clock,
        )
        self.store = MemoryStore(clock=self.clock)
        if settings.state_url is not None:
            self.store = self._shared_store(settings.state_url.get_secret_value(), clock)
        self.cache = Cache(
            settings.cache,
            store=shared(self.store),
            metrics=CacheMetrics(self.metrics.registry),
            events=self.events,
            clock=self.clock,
            service_name=self.service_name,
        )
        if not self.cache.levels.only_memory:
            self.checks.add("cache", self.cache.check, critical=False)
        self.auth = Gate(
            settings.auth,
            authenticators,
            permissions_of=permissions_of,
            store=self.store,
            events=self.events,
            clock=self.clock,
        )
        self.versions = Versions(settings.versioning, clock=self.clock)
        self.tenancy = Tenancy(settings.tenancy, tenants, clock=self.clock)
        self.allow = AllowList(settings.rate_limit.allow) if settings.rate_limit.allow else None
        self.bans = BanList(
            settings.bans,
            allow=self.allow,
            events=self.events,
            clock=self.clock,
            store=shared(self.store),
        )
        self.breakers = CircuitBreakers(
            settings.circuit_breaker, events=self.events, clock=self.clock, store=shared(self.store)
        )
        self.retries = Retries(settings.retry, events=self.events, clock=self.clock)
        self.upstreams = Upstreams(
            settings.upstreams,
            outbound,
            breakers=self.breakers,
            retries=self.retries,
            events=self.events,
            clock=self.clock,
            provider=lambda: self.tracing.provider if settings.tracing.enabled else None,
        )
        self.table = table_of(app)
        self.client_addresses = ClientAddressResolver(
            settings.trusted_proxies, forwarded_header=settings.forwarded_header, events=self.events
        )
        self.load = Load(self.events)
        self.monitor = Monitor(settings.monitor, load=self.load, events=self.events, clock=self.clock)
        if settings.monitor.enabled:
            self.metrics.watch = self.monitor.record
        self.shedder = Shedder(settings.load_shedding)
        degradation = settings.degradation
        self.features = Features(
            off=degradation.off if degradation.enabled else (),
            load=self.load if degradation.enabled and degradation.by_load else None,
            recovery_seconds=degradation.recovery_seconds,
            checks=self.checks,
            store=shared(self.store),
            sync_seconds=degradation.sync_seconds,
            events=self.events,
            clock=self.clock,
        )
        self.lifecycle = Lifecycle(
            drain_delay_seconds=settings.health.drain_delay_seconds,
            drain_deadline_seconds=settings.health.drain_deadline_seconds,
            events=self.events,
            clock=self.clock,
        )
        self.realtime = Realtime(
            settings.realtime,
            channels=self.store.channels("realtime") if isinstance(self.store, RedisStore) else None,
            lifecycle=self.lifecycle,
            events=self.events,
            clock=self.clock,
        )
        self.observability = Observability(
            self.service_name,
            lifecycle=self.lifecycle,
            health=self.health,
            metrics=self.metrics,
            tracing=self.tracing,
            alerts=self.alerts,
            monitor=self.monitor,
        )
        self.checks.add("client_address", self._client_address, critical=False)
        if isinstance(self.auth.keys, RemoteKeys):
            self.checks.add("issuer_keys", self.auth.keys.check, critical=False)

    def _shared_store(self, url: str, clock: Clock | None) -> StateStore:
        """A store on another machine, with its health check and its metric; a clock is handed on for tests only."""
        store = RedisStore(
            url,
            prefix=self.service_name,
            workers=self.settings.workers,
            budget_seconds=self.settings.state_budget_seconds,
            events=self.events,
            clock=clock,
        )
        up = Gauge(
            "hardening_state_store_up",
            "Whether the shared store answers.",
            registry=self.metrics.registry,
            multiprocess_mode="livemin",
        )
        up.set(1)
        self.events.subscribe(StoreFailed, lambda _event: up.set(0))
        self.events.subscribe(StoreRecovered, lambda _event: up.set(1))
        self.checks.add("state_store", store.check, critical=False)
        return store

    def upstream(self, name: str) -> "httpx2.AsyncClient":
        """The client of another service, as the settings name it; with the extra ``http``.

        Raises:
            KeyError: The settings have none of that name.
            ConfigurationError: httpx2 is not installed.
        """
        return self.upstreams.get(name).client

    @property
    def pipeline(self) -> tuple[Layer, ...]:
        """The layers in the order in which a request meets them."""
        return tuple(Layer(slot.name, self.state_of(slot), slot.purpose, slot.setting) for slot in self._inbound)

    def state_of(self, slot: Slot) -> LayerState:
        """Whether a slot's layer is there."""
        if slot.build is None:
            return "planned"
        return "on" if getattr(self.settings, slot.setting).enabled else "off"

    def routes(self) -> tuple[RoutePolicies, ...]:
        """Every route, mounts looked into, with the overrides that hold on it."""
        return tuple(_policies(entry, required=self.auth.required) for entry in self.table)

    def _client_address(self) -> CheckResult:
        proxy = self.client_addresses.unknown_proxy
        if proxy is None:
            return CheckResult("pass")
        return CheckResult("warn", f"{proxy} sends forwarding headers; if it is your proxy, add it to trusted_proxies")


def shared(store: StateStore) -> StateStore | None:
    """The store, if other processes see it too."""
    return None if isinstance(store, MemoryStore) else store


def _policies(entry: RouteEntry, *, required: bool) -> RoutePolicies:
    overrides = {kind.__name__: overrides for kind, overrides in entry.overrides.items()}
    methods = tuple(sorted(entry.methods or ()))
    return RoutePolicies(entry.template, methods, entry.kind, overrides, is_open(entry, required=required))
