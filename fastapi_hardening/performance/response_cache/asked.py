"""What a request asks the cache for: whether it may be asked at all, and under which key.

Whatever an answer may depend on is in the key, or sends the request to the endpoint. That is also what keeps a cache
from being poisoned: a field that frameworks build addresses of, such as ``X-Forwarded-Host``, is a part of the key, and
one that makes another request of it, such as ``X-Original-URL``, is never answered from here.
"""

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from starlette.requests import HTTPConnection
from starlette.types import Scope

from fastapi_hardening.core.context import RequestContext
from fastapi_hardening.core.credentials import has_unknown_scheme, sounds_like_credentials
from fastapi_hardening.core.headers import RawHeaders
from fastapi_hardening.core.identity import Principal
from fastapi_hardening.core.policy import Override, Overrides, all_handled, refusing
from fastapi_hardening.core.routes import RouteEntry

logger = logging.getLogger("fastapi_hardening.response_cache")

Per = Literal["anonymous", "everybody", "principal"]

_MOST_PLANS = 10_000
_MOST_NAMES = 1_000

# Fields that say how the application is reached; frameworks build addresses of them, so answers may hold them.
_IN_KEY = frozenset(
    {b"host", b"forwarded", b"x-forwarded-host", b"x-forwarded-proto", b"x-forwarded-port", b"x-forwarded-prefix"}
    | {b"x-forwarded-scheme", b"x-forwarded-server", b"x-forwarded-ssl", b"x-host"}
)
# Fields that make it another request.
_BYPASS = frozenset(
    {b"range", b"if-range", b"if-match", b"if-unmodified-since", b"upgrade"}
    | {b"x-original-url", b"x-rewrite-url", b"x-http-method-override", b"x-http-method", b"x-method-override"}
)
CONDITIONS = frozenset({b"if-none-match", b"if-modified-since"})
"""The fields by which a client says which answer it has."""

_KINDS: dict[bytes, str] = {
    **dict.fromkeys(_IN_KEY, "key"),
    **dict.fromkeys(_BYPASS, "bypass"),
    **dict.fromkeys(CONDITIONS, "condition"),
    b"cache-control": "control",
}


class CacheResponse(Override):
    """Has the answers of a route kept. Only ``GET``, and ``HEAD`` from what ``GET`` has left; the innermost counts.

    What the answer itself says in ``Cache-Control`` goes before what is said here.

    Args:
        ttl_seconds: How long an answer is fresh; ``None`` takes the setting.
        per: Whom one answer is for. ``anonymous``: whoever sends no credentials; others go to the endpoint.
            ``principal``: each caller that authentication has identified has his own. ``everybody``: the same for all
            who may call the route, whatever they send.
        key: A further part of the key, as a function of the connection; ``None`` from it sends the request to the
            endpoint.
        tags: What answers are about, so that ``handle.cache.invalidate(...)`` forgets them; or a function of the
            connection that gives them. Every answer has the tag ``path:`` and its path.
        negative_ttl_seconds: How long 404 and 410 are kept; they are not by default.
        stale_while_revalidate_seconds: So long after it has expired an answer is used while a fresh one is made.
        stale_if_error_seconds: So long it is used when the endpoint fails.

    Raises:
        ValueError: ``per`` is none of the three.
    """

    may_refuse: ClassVar[bool] = False
    off: ClassVar["CacheResponse"]
    """Keeps nothing, on a route of a router that does."""

    def __init__(
        self,
        ttl_seconds: float | None = None,
        *,
        per: Per = "anonymous",
        key: Callable[[HTTPConnection], str | None] | None = None,
        tags: Sequence[str] | Callable[[HTTPConnection], Iterable[str]] = (),
        negative_ttl_seconds: float = 0.0,
        stale_while_revalidate_seconds: float | None = None,
        stale_if_error_seconds: float | None = None,
    ) -> None:
        super().__init__()
        if per not in ("anonymous", "everybody", "principal"):
            raise ValueError(f"per is 'anonymous', 'principal' or 'everybody', not {per!r}")
        self.ttl_seconds = ttl_seconds
        self.per: Per = per
        self.key = key
        self.tags = tags
        self.negative_ttl_seconds = negative_ttl_seconds
        self.stale_while_revalidate_seconds = stale_while_revalidate_seconds
        self.stale_if_error_seconds = stale_if_error_seconds

    async def act_late(self, connection: HTTPConnection) -> None:
        """Does nothing: where the layer has not seen the route, its answers are not kept."""


CacheResponse.off = CacheResponse(0)


@dataclass(frozen=True, slots=True)
class Plan:
    """What holds on a route.

    Attributes:
        override: Who says so.
        overrides: All levels that say something.
        gates: What has to be decided before an answer may be used.
    """

    override: CacheResponse
    overrides: tuple[Override, ...]
    gates: Overrides


class Asked:
    """A request that may be answered from the cache.

    Attributes:
        primary: Its key.
        key: The same; that of the variant, where it is known by which fields answers differ.
        headers: Its fields.
        conditions: ``If-None-Match`` and ``If-Modified-Since``.
        tags: What its answer is about.
    """

    __slots__ = ("conditions", "headers", "key", "primary", "tags")

    def __init__(self, key: str, headers: RawHeaders, conditions: dict[bytes, bytes], tags: tuple[str, ...]) -> None:
        self.primary = self.key = key
        self.headers = headers
        self.conditions = conditions
        self.tags = tags


class Desk:
    """Where requests are read: it remembers what it has found out about routes and names of fields."""

    def __init__(self) -> None:
        self._plans: dict[RouteEntry, Plan | None] = {}
        self._kinds = dict(_KINDS)

    def plan(self, entry: RouteEntry) -> Plan | None:
        """What holds on a route that has an override; ``None`` where nothing may be kept."""
        try:
            return self._plans[entry]
        except KeyError:
            if len(self._plans) >= _MOST_PLANS:
                self._plans.clear()
            plan = self._plans[entry] = self._planned(entry)
            return plan

    def _planned(self, entry: RouteEntry) -> Plan | None:
        overrides = entry.of(CacheResponse)
        override: Any = overrides[-1]  # the innermost counts
        if override.ttl_seconds == 0:
            return None
        if has_unknown_scheme(entry.dependant):
            logger.warning(
                "answers of %s are not kept: it has a security scheme of FastAPI, and what that decides is not known",
                entry.template,
            )
            return None
        return Plan(override, overrides, refusing(entry.overrides))

    def ask(self, plan: Plan, scope: Scope, context: RequestContext) -> Asked | None:
        """What a request asks for; ``None`` where the endpoint has to answer it."""
        if plan.gates and not all_handled(plan.gates, scope):
            return None
        override, principal = plan.override, context.principal
        parts = ["https" if context.secure else "http", scope.get("root_path", ""), scope["path"]]
        parts.append(scope.get("query_string", b"").decode("latin-1"))
        conditions: dict[bytes, bytes] = {}
        headers: RawHeaders = scope["headers"]
        credentials = self._read(headers, parts, conditions)
        if credentials is None:
            return None
        who = _who(principal) if override.per == "principal" and principal is not None else None
        if who is not None:
            parts.append(who)
        elif override.per != "everybody" and (credentials or principal is not None):
            return None
        tenant = context.tenant or getattr(principal, "tenant", None)
        if tenant is not None:
            parts.append(f"tenant {tenant!r}")
        if context.version is not None:
            parts.append(f"version {context.version!r}")
        tags = override.tags
        if override.key is not None:
            own = override.key(HTTPConnection(scope))
            if own is None:
                return None
            parts.append(f"key {own!r}")
        if callable(tags):
            tags = tuple(tags(HTTPConnection(scope)))
        # The parts may hold anything, so the key is a digest of all of them, each with its length.
        text = "".join([f"{len(part)}:{part}" for part in parts])
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16)
        return Asked(f"http:{digest.hexdigest()}", headers, conditions, (tag_of(scope["path"]), *tags))

    def _read(self, headers: RawHeaders, parts: list[str], conditions: dict[bytes, bytes]) -> bool | None:
        """Whether a request has credentials; ``None`` where it is not for the cache at all."""
        kinds, credentials = self._kinds, False
        for name, value in headers:
            kind = kinds.get(name)
            if kind is None:
                kind = self._kind(name)
            if kind == "other":
                continue
            if kind == "key":
                parts.append(f"{name!r}{value!r}")
            elif kind == "credential":
                credentials = True
            elif kind == "condition":
                conditions[name] = value if name not in conditions else conditions[name] + b", " + value
            elif kind == "bypass" or b"no-store" in value.lower():
                return None
        return credentials

    def _kind(self, name: bytes) -> str:
        """What a field means for the cache, by its name."""
        kind = "credential" if sounds_like_credentials(name) else "other"
        if len(self._kinds) < _MOST_NAMES:
            self._kinds[name] = kind
        return kind


def tag_of(path: str) -> str:
    """The tag that all answers of a path have."""
    return f"path:{path}"


def _who(principal: Any) -> str | None:
    """Everything by which an endpoint may tell callers apart; ``None`` where that cannot be said."""
    if not isinstance(principal, Principal):
        return None
    sets = [sorted(each) for each in (principal.scopes, principal.roles, principal.permissions)]
    tenants = sorted((tenant, sorted(roles)) for tenant, roles in principal.tenant_roles.items())
    return repr((principal.scheme, principal.issuer, principal.id, principal.tenant, sets, tenants))
