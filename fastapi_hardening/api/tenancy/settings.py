"""What an operator says of tenants: where they are named, and who may ask for which."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from fastapi_hardening.core import headers as header_fields
from fastapi_hardening.core.client_ip import parse_network
from fastapi_hardening.core.configuration import ConcernSettings, from_json
from fastapi_hardening.core.request_head import checked_host

Source = Literal["identity", "subdomain", "header", "path"]


class TenancySettings(ConcernSettings):
    """The settings of tenancy."""

    enabled: bool = False
    """Whether requests belong to tenants; on by itself when another key is set."""

    sources: tuple[Source, ...] = ("identity",)
    """Where the tenant is named: ``subdomain``, ``header``, ``path``, which must agree where several speak, and
    ``identity`` where none of them does."""

    header: str = "X-Tenant"
    """The header field of the source ``header``."""

    trusted_callers: tuple[str, ...] = ()
    """Addresses and networks of your own gateways: the header is believed of them also where nobody is known."""

    domains: tuple[str, ...] = ()
    """The hosts above the tenants' own: with ``shop.example``, ``acme.shop.example`` is about ``acme``."""

    reserved_subdomains: tuple[str, ...] = ("www",)
    """Names below these hosts that are no tenants."""

    path_parameter: str = "tenant"
    """The parameter of the route of the source ``path``, as in ``/t/{tenant}/orders``."""

    default: str | None = None
    """The tenant of requests that name none."""

    required: bool = True
    """Whether a request without a tenant is refused where the route says nothing else."""

    unknown: Literal["not-found", "forbidden"] = "not-found"
    """What is answered for a tenant that does not exist or is not active: 404 or 403."""

    callers_without_tenant: Literal["refuse", "allow"] = "refuse"
    """Whether somebody known, whose identity names no tenant, may ask for any; then the application must check."""

    cross_tenant_roles: tuple[str, ...] = ()
    """Whoever has one of these roles may ask for any tenant; for your own staff."""

    ttl_seconds: float = Field(60.0, ge=0, le=86_400)
    """How long what the resolver said is remembered; so long a tenant that was closed may still be served."""

    max_remembered: int = Field(10_000, ge=1)
    """How many tenants are remembered at once."""

    max_measured: int = Field(0, ge=0, le=10_000)
    """For how many tenants requests are counted in the metrics, the others together; 0 for none."""

    @model_validator(mode="before")
    @classmethod
    def _on_when_set(cls, values: Any) -> Any:
        # Who has named the sources and sees no refusal would believe that he is protected.
        values = from_json(values) if isinstance(values, str) else values
        return {"enabled": True, **values} if isinstance(values, Mapping) and values else values

    @field_validator("header")
    @classmethod
    def _is_a_header(cls, header: str) -> str:
        header_fields.field(header, "x")
        return header

    @field_validator("trusted_callers")
    @classmethod
    def _are_networks(cls, entries: tuple[str, ...]) -> tuple[str, ...]:
        for entry in entries:
            parse_network(entry)
        return entries

    @field_validator("domains")
    @classmethod
    def _are_hosts(cls, entries: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(checked_host(entry) for entry in entries)

    @model_validator(mode="after")
    def _can_name_somebody(self) -> Self:
        if ("subdomain" in self.sources) != bool(self.domains):
            raise ValueError("the source 'subdomain' and domains belong together: domains=('shop.example',)")
        if any("*" in domain for domain in self.domains):
            raise ValueError("domains are the hosts above the tenants, without '*': 'shop.example'")
        if not self.sources and self.default is None:
            raise ValueError("without sources no request names a tenant; name one, or a default")
        return self
