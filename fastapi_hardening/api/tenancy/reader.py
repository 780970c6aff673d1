"""Reads what a request says about its tenant: its host, its header fields, its path."""

import re
from collections.abc import Iterator
from typing import Any

from starlette.routing import compile_path
from starlette.types import Scope

from fastapi_hardening.api.tenancy.engine import NAME, Asked
from fastapi_hardening.api.tenancy.settings import TenancySettings
from fastapi_hardening.core import headers as header_fields
from fastapi_hardening.core.client_ip import ClientAddressResolver, peer_of
from fastapi_hardening.core.request_head import host_name
from fastapi_hardening.core.routes import RouteEntry, route_path


class Reader:
    """Reads what a request says about its tenant."""

    def __init__(self, settings: TenancySettings) -> None:
        self._header = settings.header.lower().encode("ascii") if "header" in settings.sources else None
        self._endings = tuple(f".{domain}" for domain in settings.domains)
        self._reserved = frozenset(settings.reserved_subdomains)
        self._parameter = settings.path_parameter if "path" in settings.sources else None
        self._gateways = ClientAddressResolver(settings.trusted_callers) if settings.trusted_callers else None
        self._patterns: dict[str, tuple[re.Pattern[str], Any] | None] = {}

    def asked(self, scope: Scope, entry: RouteEntry) -> Asked:
        """What the request to this route says."""
        names: list[str] = []
        believed = True
        trusted = False
        if self._endings:
            names += self._of_hosts(header_fields.get_all(scope["headers"], b"host"))
        if self._parameter is not None:
            names += self._of_path(scope, entry)
        if self._header is not None:
            values = header_fields.get_all(scope["headers"], self._header)
            if values:
                peer = peer_of(scope.get("client"), scope.get("server"))
                believed = trusted = self._gateways is not None and self._gateways.trusts(peer)
                names += [value.decode("latin-1").strip() for value in values]
        # What cannot be a name is none, and is told like any other that there is not.
        return Asked(frozenset([name if NAME.fullmatch(name) else "" for name in names]), believed, trusted)

    def _of_hosts(self, values: list[bytes]) -> Iterator[str]:
        for value in values:
            name = host_name(value)
            for ending in self._endings:
                label = name.removesuffix(ending)
                if label != name and label not in self._reserved:
                    # A name with dots in it could be meant for somebody else's certificate.
                    yield "" if "." in label else label

    def _of_path(self, scope: Scope, entry: RouteEntry) -> Iterator[str]:
        declared = entry.declared or ""
        if declared not in self._patterns:
            self._patterns[declared] = self._compiled(declared, entry.kind)
        compiled = self._patterns[declared]
        if compiled is None:
            return
        path = route_path(scope["path"], scope.get("root_path", ""))
        other = path[:-1] if path.endswith("/") else path + "/"
        matched = compiled[0].match(path) or compiled[0].match(other)
        # The value that the endpoint will get; one that is not found has no name, and is refused as such.
        yield "" if matched is None else str(compiled[1].convert(matched[str(self._parameter)]))

    def _compiled(self, declared: str, kind: str) -> tuple[re.Pattern[str], Any] | None:
        rest = "/{fastapi_hardening_rest:path}" if kind == "mount" else ""
        pattern, _, convertors = compile_path(declared + rest)
        convertor = convertors.get(str(self._parameter))
        return None if convertor is None else (pattern, convertor)
