"""The settings of the whole suite: one field per concern, in the order of the pipeline, and how the fields relate.

Sources, strongest first: arguments, ``HARDENING_*`` environment variables, ``.env``, a TOML file named by
``HARDENING_FILE``, the profile of the environment, the defaults. They merge key by key: what a stronger source does not
set, a weaker one may. Everything wrong is said at once, each with the sentence that mends it.

Example:
    >>> settings = Settings(environment="development", security_headers={"x_frame_options": "SAMEORIGIN"})
    >>> settings.security_headers.x_frame_options, settings.health.details
    ('SAMEORIGIN', 'always')
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, Field, PrivateAttr, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from fastapi_hardening.api.docs_pages import DocsPagesSettings
from fastapi_hardening.api.errors import ErrorsSettings
from fastapi_hardening.api.idempotency import IdempotencySettings
from fastapi_hardening.api.realtime import RealtimeSettings
from fastapi_hardening.api.tenancy import TenancySettings
from fastapi_hardening.api.versioning import VersioningSettings
from fastapi_hardening.core.client_ip import UNIX, parse_network
from fastapi_hardening.core.configuration import ConcernSettings, ConfigurationError
from fastapi_hardening.core.redis_address import read_address
from fastapi_hardening.core.request_head import checked_host
from fastapi_hardening.core.sources import Key, Profiles, gather, sentence
from fastapi_hardening.observability.access_log import AccessLogSettings
from fastapi_hardening.observability.alerts import AlertsSettings
from fastapi_hardening.observability.health import HealthSettings
from fastapi_hardening.observability.metrics import MetricsSettings
from fastapi_hardening.observability.request_context import RequestIdSettings
from fastapi_hardening.observability.tracing import TracingSettings
from fastapi_hardening.performance.cache import CacheSettings
from fastapi_hardening.performance.compression import CompressionSettings
from fastapi_hardening.performance.fast_routing import RoutingSettings
from fastapi_hardening.performance.monitor import MonitorSettings
from fastapi_hardening.performance.response_cache import ResponseCacheSettings
from fastapi_hardening.resilience.circuit_breaker import CircuitBreakersSettings
from fastapi_hardening.resilience.degradation import DegradationSettings
from fastapi_hardening.resilience.load_shedding import LoadSheddingSettings
from fastapi_hardening.resilience.retry import RetriesSettings
from fastapi_hardening.resilience.timeout import TimeoutSettings
from fastapi_hardening.security.address_limit import AddressLimitSettings
from fastapi_hardening.security.auth.settings import AuthSettings
from fastapi_hardening.security.bans import BansSettings
from fastapi_hardening.security.cors import CorsSettings
from fastapi_hardening.security.csp_reports import CspReportsSettings
from fastapi_hardening.security.input_validation import InputValidationSettings
from fastapi_hardening.security.rate_limit import RateLimitSettings
from fastapi_hardening.security.request_limits import RequestLimitsSettings
from fastapi_hardening.security.security_headers import SecurityHeadersSettings
from fastapi_hardening.security.security_txt import SecurityTxtSettings
from fastapi_hardening.security.websocket_limits import WebSocketLimitsSettings
from fastapi_hardening.upstreams import UpstreamSettings


class NotBuiltYet(ConcernSettings):
    """A concern that is planned: its name is taken already, so that configurations do not change when it comes."""

    enabled: bool = False

    @model_validator(mode="after")
    def _cannot_be_enabled(self) -> Self:
        if self.enabled:
            raise ValueError("this concern is not built yet (see the changelog); leave it out for now")
        return self


# It is a host in URLs, and part of a variable's name.
_UPSTREAM = re.compile(r"[a-z0-9](?:[a-z0-9_-]*[a-z0-9])?")

Environment = Literal["production", "staging", "development"]

PROFILES: Profiles = {
    "production": {},
    "staging": {},
    "development": {
        "access_log": {"format": "text"},
        "errors": {"details": True},
        "health": {"details": "always", "drain_delay_seconds": 0.0},
        "tracing": {"server_timing": True},
    },
}
"""What an environment changes; nothing else does."""


@dataclass(frozen=True, slots=True)
class SettingValue:
    """One key as it is in effect.

    Attributes:
        key: The dotted key, such as ``health.ttl_seconds``.
        value: Its value; secrets are masked.
        source: Where it came from, such as ``default`` or ``environment variable HARDENING_HEALTH__TTL_SECONDS``.
    """

    key: str
    value: Any
    source: str


class Settings(BaseSettings):
    """All settings. Every key can be an argument, or an environment variable such as ``HARDENING_HEALTH__DETAILS``.

    Raises:
        ConfigurationError: A key is unknown or a value cannot be; the message lists all of them.
    """

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, hide_input_in_errors=True
    )

    renamed: ClassVar[Mapping[str, str]] = {}
    """Old names of fields that still work, by their new name; they warn."""

    environment: Environment = "production"
    """``production``, ``staging`` or ``development``; what each changes is in the table of profiles."""

    service_name: str | None = None
    """How this service calls itself in reports and traces; the application's title if unset."""

    state_url: SecretStr | None = None
    """A Redis or Valkey that all workers share, such as ``redis://:password@host:6379/0``. Unset, state is kept in
    memory, by each process for itself."""

    state_budget_seconds: float = Field(0.1, gt=0, le=5)
    """How long a request may be kept waiting by that store, all in all; then it is answered without."""

    workers: int = Field(1, ge=1)
    """How many processes serve: a shared limit is divided by it when the shared store is gone and has not said how many
    there are."""

    trusted_proxies: tuple[str, ...] = ()
    """Addresses and networks of your own proxies, and ``unix`` for sockets: whose forwarding headers are believed."""

    forwarded_header: Literal["x-forwarded-for", "forwarded"] = "x-forwarded-for"
    """The one header in which your proxies write the client's address."""

    allowed_hosts: tuple[str, ...] = ()
    """Host names that are served, such as ``shop.example`` or ``*.shop.example``; any if empty."""

    health: HealthSettings = HealthSettings()
    """Probes, health checks and draining."""

    request_id: RequestIdSettings = RequestIdSettings()
    """The id that every answer carries."""

    access_log: AccessLogSettings = AccessLogSettings()
    """One structured line a request."""

    metrics: MetricsSettings = MetricsSettings()
    """Prometheus metrics."""

    tracing: TracingSettings = TracingSettings()
    """One OpenTelemetry span a request."""

    monitor: MonitorSettings = MonitorSettings()
    """Slow requests, and what blocks the event loop."""

    alerts: AlertsSettings = AlertsSettings()
    """When somebody is told that the service is not well."""

    security_headers: SecurityHeadersSettings = SecurityHeadersSettings()
    """The header fields that protect browsers."""

    cors: CorsSettings = CorsSettings()
    """Whose pages may read answers."""

    errors: ErrorsSettings = ErrorsSettings()
    """Error answers."""

    load_shedding: LoadSheddingSettings = LoadSheddingSettings()
    """Refusals under overload."""

    request_limits: RequestLimitsSettings = RequestLimitsSettings()
    """Limits on the request itself."""

    address_limit: AddressLimitSettings = AddressLimitSettings()
    """The flood guard by address."""

    security_txt: SecurityTxtSettings = SecurityTxtSettings()
    """Whom to tell of a vulnerability."""

    csp_reports: CspReportsSettings = CspReportsSettings()
    """What browsers report of policies."""
    websocket_limits: WebSocketLimitsSettings = WebSocketLimitsSettings()
    """Limits on websockets once they are open, and whose pages may open them."""
    bans: BansSettings = BansSettings()
    """Who is shut out for a while."""

    versioning: VersioningSettings = VersioningSettings()
    """Which version of the API is asked for."""

    auth: AuthSettings = AuthSettings()
    """Who calls, and whether the route lets them."""

    tenancy: TenancySettings = TenancySettings()
    """Whose data a request is about."""

    rate_limit: RateLimitSettings = RateLimitSettings()
    """Rate limits."""

    input_validation: InputValidationSettings = InputValidationSettings()
    """Inspection of content."""

    timeout: TimeoutSettings = TimeoutSettings()
    """Deadlines of handlers."""

    idempotency: IdempotencySettings = IdempotencySettings()
    """Requests that are sent twice and carried out once, on the routes that say so."""

    compression: CompressionSettings = CompressionSettings()
    """Compression of answers."""

    response_cache: ResponseCacheSettings = ResponseCacheSettings()
    """Answers that are kept, on the routes that say so."""

    cache: CacheSettings = CacheSettings()
    """What is slow to make and kept for a while."""

    degradation: DegradationSettings = DegradationSettings()
    """Features that can be off."""

    circuit_breaker: CircuitBreakersSettings = CircuitBreakersSettings()
    """When calls to a service that fails are no longer made."""

    retry: RetriesSettings = RetriesSettings()
    """How calls to services are made again."""

    upstreams: dict[str, UpstreamSettings] = Field(default_factory=dict)
    """Other services by name, with everything that stands around their calls."""

    realtime: RealtimeSettings = RealtimeSettings()
    """Channels of websockets and event streams."""

    docs_pages: DocsPagesSettings = DocsPagesSettings()
    """The pages of the API's documentation."""

    routing: RoutingSettings = RoutingSettings()
    """How the router is called."""

    _sources: dict[Key, str] = PrivateAttr(default_factory=dict)

    def __init__(self, _env_file: str | os.PathLike[str] | None = ".env", **values: Any) -> None:
        problems: list[str] = []
        leaves = gather(type(self), values, _env_file, PROFILES, problems)
        nested: dict[str, Any] = {}
        for path, (value, _) in leaves.items():
            inner = nested
            for part in path[:-1]:
                inner = inner.setdefault(part, {})
            inner[path[-1]] = value
        sources = {path: source for path, (_, source) in leaves.items()}
        try:
            super().__init__(**nested)
        except ValidationError as error:
            problems += [sentence(each, sources) for each in error.errors(include_input=False)]
        if problems:
            raise ConfigurationError("\n".join(("the settings cannot be used:", *(f"  - {p}" for p in problems))))
        self._sources.update(sources)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - the signature is pydantic-settings'
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The sources are read and merged in ``__init__``, key by key and each with its name."""
        return (init_settings,)

    @field_validator("trusted_proxies")
    @classmethod
    def _are_networks(cls, entries: tuple[str, ...]) -> tuple[str, ...]:
        for entry in entries:
            if entry != UNIX:
                parse_network(entry)
        return entries

    @field_validator("allowed_hosts")
    @classmethod
    def _are_hosts(cls, entries: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(checked_host(entry) for entry in entries)

    @field_validator("upstreams")
    @classmethod
    def _are_names(cls, upstreams: dict[str, UpstreamSettings]) -> dict[str, UpstreamSettings]:
        for name in upstreams:
            if not _UPSTREAM.fullmatch(name):
                raise ValueError(f"{name!r}: the name of an upstream has lower-case letters, digits, '-' and '_' only")
        return upstreams

    @field_validator("state_url")
    @classmethod
    def _leads_to_a_store(cls, url: SecretStr | None) -> SecretStr | None:
        if url is not None:
            read_address(url.get_secret_value())
        return url

    def without_effect(self) -> tuple[str, ...]:
        """The keys that are set for concerns that are not built yet."""
        return tuple(
            f"{name}.{key}"
            for name in type(self).model_fields
            if isinstance(concern := getattr(self, name), NotBuiltYet)
            for key in sorted(concern.model_fields_set - {"enabled"})
        )

    def describe(self) -> tuple[SettingValue, ...]:
        """Every key with the value in effect and where it came from; secrets are masked."""
        return tuple(
            SettingValue(".".join(path), value, self._sources.get(path, "default")) for path, value in _walk(self)
        )


def _walk(model: BaseModel, above: Key = ()) -> Iterator[tuple[Key, Any]]:
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            yield from _walk(value, (*above, name))
        elif isinstance(value, dict) and value and all(isinstance(each, BaseModel) for each in value.values()):
            for key, section in value.items():
                yield from _walk(section, (*above, name, key))
        else:
            yield (*above, name), "********" if isinstance(value, SecretStr) else value
