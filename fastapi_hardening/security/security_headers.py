"""Puts the header fields on every answer that tell a browser what it must not do with it.

It protects from clickjacking, MIME sniffing, downgrade to plain HTTP, leaking referrers, and what is left of cross-site
scripting after output encoding. It is *not* an encoder: a Content-Security-Policy limits the damage of an injected
script, it does not keep the script out of the page.

It sits above everything that answers, so that a 404, a refusal and the 500 page carry the fields too. The list is the
OWASP Secure Headers Project's, less what hurts when it is everywhere (Cross-Origin-Embedder-Policy, Cache-Control,
Clear-Site-Data). Answers that are not HTML get the strictest Content-Security-Policy there is; HTML gets a small
enforced one that breaks no page, and a strict one that only reports. The ``secure`` package builds and checks every
value when the settings are made; at run time there are only bytes.

Example:
    >>> from fastapi import FastAPI
    >>> from fastapi_hardening import SecurityHeaders
    >>> from fastapi_hardening.security.security_headers import SecurityHeadersMiddleware, SecurityHeadersSettings
    >>> app = FastAPI()
    >>> app.add_middleware(SecurityHeadersMiddleware, settings=SecurityHeadersSettings(referrer_policy="no-referrer"))
    >>> @app.get("/widget", dependencies=[SecurityHeaders(x_frame_options=None)])
    ... async def widget() -> str:
    ...     return "may be framed"
"""

import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import secure
from fastapi import Depends, Response
from pydantic import BeforeValidator, field_validator, model_validator
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_hardening.core import context as request_context
from fastapi_hardening.core import headers as header_fields
from fastapi_hardening.core.configuration import ConcernSettings, did_you_mean
from fastapi_hardening.core.csp import DIRECTIVES
from fastapi_hardening.core.policy import Override, mark_handled
from fastapi_hardening.core.routes import route_of

_STARTS = frozenset({"http.response.start", "websocket.accept", "websocket.http.response.start"})
_HTML = (b"text/html", b"application/xhtml+xml")

# Answers of one application have a few sets of field names; those of an attacker's making are not remembered.
_MOST_SHAPES = 64

_NONCE = "'nonce-{nonce}'"

STRICT_CSP = (
    f"default-src 'self'; script-src 'self' {_NONCE}; style-src 'self' {_NONCE}; img-src 'self' data:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'; upgrade-insecure-requests"
)
"""A Content-Security-Policy for pages without inline code, or with inline code that carries the nonce."""

_FEATURES = (
    "accelerometer autoplay camera cross-origin-isolated display-capture encrypted-media fullscreen geolocation "
    "gyroscope magnetometer microphone midi payment picture-in-picture publickey-credentials-get screen-wake-lock "
    "usb xr-spatial-tracking clipboard-read clipboard-write gamepad hid idle-detection serial unload"
)

# Fields that tell an attacker which product and version answers. Tracing fields are not among them: they are wanted.
_REVEALING = (
    "server x-powered-by powered-by product x-framework x-generator x-generated-by x-content-encoded-by x-cms "
    "x-powered-cms x-cf-powered-by x-server-powered-by x-turbo-charged-by x-aspnet-version x-aspnetmvc-version "
    "x-php-version x-cocoon-version x-umbraco-version x-woodpecker-version x-owa-version host-header "
    "x-sourcefiles x-beserver x-feserver x-calculatedbetarget x-diaginfo x-varnish-backend x-varnish-server "
    "x-backside-transport x-jitsi-release x-envoy-original-dst-host x-envoy-internal x-envoy-external-address"
)


# --- settings ---------------------------------------------------------------------------------------------------------


def _empty_is_none(value: object) -> object:
    return None if value == "" else value


T = TypeVar("T")
Text = Annotated[str | None, BeforeValidator(_empty_is_none)]
OneOf = Annotated[T | None, BeforeValidator(_empty_is_none)]

_REFERRER_POLICIES = (
    "no-referrer no-referrer-when-downgrade origin origin-when-cross-origin same-origin strict-origin "
    "strict-origin-when-cross-origin unsafe-url"
)
_HSTS = re.compile(r"max-age=(\d+)(; includeSubDomains)?(; preload)?")
_YEAR_SECONDS = 31_536_000

# No character that ends a directive of the policy, or the text in the field that names the endpoint.
_ENDPOINT = re.compile(r"(?:/(?!/)|https://)[^\s,;\"\\\x00-\x1f\x7f-\U0010ffff]*")


class SecurityHeadersSettings(ConcernSettings):
    """The header fields by their names; ``None`` (or an empty text) leaves a field out."""

    strict_transport_security: Text = "max-age=63072000; includeSubDomains"
    """Sent on https only (RFC 6797, section 7.2). Two years, with every subdomain."""

    content_security_policy: Text = "frame-ancestors 'none'; base-uri 'self'; object-src 'none'; form-action 'self'"
    """On HTML, enforced. Where ``'nonce-{nonce}'`` stands, the nonce of a page that asked for one is put."""

    content_security_policy_report_only: Text = STRICT_CSP
    """On HTML, only reported to the browser's console: what the enforced one should become."""

    api_content_security_policy: Text = "default-src 'none'; frame-ancestors 'none'"
    """On every answer that is not HTML, enforced."""

    reporting_endpoint: Text = None
    """Where browsers report what the two policies of HTML block: a path of this site, or an ``https`` URL. With
    ``csp_reports.enabled`` it is the path of those reports, unless it is set."""

    x_frame_options: OneOf[Literal["DENY", "SAMEORIGIN"]] = "DENY"
    """For browsers that do not know ``frame-ancestors``."""

    x_content_type_options: OneOf[Literal["nosniff"]] = "nosniff"
    """Keeps a browser from taking an answer for another type than it says."""

    referrer_policy: Text = "strict-origin-when-cross-origin"
    """What a link or a request from the page tells about the page."""

    permissions_policy: Text = ", ".join(f"{feature}=()" for feature in _FEATURES.split())
    """Browser features that pages may use; none by default."""

    cross_origin_opener_policy: OneOf[
        Literal["unsafe-none", "same-origin", "same-origin-allow-popups", "noopener-allow-popups"]
    ] = "same-origin"
    """Cuts the tie to windows of other origins. A sign-in pop-up of another origin needs
    ``same-origin-allow-popups``."""

    cross_origin_resource_policy: OneOf[Literal["same-origin", "same-site", "cross-origin"]] = "same-origin"
    """Who may embed the answer without CORS. Public images and scripts need ``cross-origin``."""

    cross_origin_embedder_policy: OneOf[Literal["unsafe-none", "require-corp", "credentialless"]] = None
    """Demands consent of everything that a page embeds; breaks most pages, so it is left out."""

    x_dns_prefetch_control: OneOf[Literal["on", "off"]] = "off"
    """Keeps the browser from resolving the links of a page before they are followed."""

    x_permitted_cross_domain_policies: OneOf[
        Literal["none", "master-only", "by-content-type", "by-ftp-filename", "all", "none-this-response"]
    ] = "none"
    """Keeps old document viewers from reading data across origins."""

    cache_control: Text = None
    """For single routes: ``no-store`` on every answer would make nothing cacheable."""

    clear_site_data: Text = None
    """For the logout route: ``"cache", "cookies", "storage"``."""

    on_conflict: Literal["keep", "replace"] = "keep"
    """Which one stays when the application has set a field itself: its own (``keep``) or ours (``replace``)."""

    remove: tuple[str, ...] = tuple(_REVEALING.split())
    """Fields taken off every answer. The server's own ``Server`` field is added later: run uvicorn with
    ``--no-server-header``."""

    @field_validator("referrer_policy")
    @classmethod
    def _is_a_referrer_policy(cls, text: str | None) -> str | None:
        for token in (text or "no-referrer").split(","):
            if token.strip() not in _REFERRER_POLICIES:
                raise ValueError(
                    f"{token.strip()!r} is no such policy{did_you_mean(token.strip(), _REFERRER_POLICIES)}"
                )
        return text

    @field_validator("strict_transport_security")
    @classmethod
    def _is_a_transport_policy(cls, text: str | None) -> str | None:
        if text is None:
            return None
        policy = _HSTS.fullmatch(text)
        if policy is None:
            raise ValueError(f"{text!r} is not like 'max-age=63072000; includeSubDomains; preload', in this order")
        seconds, subdomains, preload = policy.groups()
        if preload and (int(seconds) < _YEAR_SECONDS or not subdomains):
            raise ValueError("preload lists take a policy of at least a year (31536000 s) with includeSubDomains only")
        return text

    @field_validator("reporting_endpoint")
    @classmethod
    def _is_an_endpoint(cls, url: str | None) -> str | None:
        if url is not None and not _ENDPOINT.fullmatch(url):
            raise ValueError(f"{url!r} is neither a path of this site, such as '/csp-reports', nor an https URL")
        return url

    @model_validator(mode="after")
    def _can_be_sent(self) -> Self:
        for html in (True, False):
            _build(self, html=html, tls=True)
        return self


# --- engine -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HeaderSet:
    """What one kind of answer gets: the fields as bytes, and their names."""

    fields: tuple[tuple[bytes, bytes], ...]
    names: frozenset[bytes]
    has_nonce: bool


class HeaderPolicy:
    """Settings frozen to bytes: a set for each of HTML and other answers, over TLS and without.

    Args:
        settings: The fields.
        insisted_on: Settings that a route has changed on purpose; their fields replace what the application sets.

    Example:
        >>> policy = HeaderPolicy(SecurityHeadersSettings())
        >>> [name for name, _ in policy.apply([(b"content-type", b"text/html")], tls=True)][:2]
        [b'content-type', b'strict-transport-security']
    """

    def __init__(self, settings: SecurityHeadersSettings, *, insisted_on: Iterable[str] = ()) -> None:
        kinds = [(html, tls) for html in (False, True) for tls in (False, True)]
        self._sets = {kind: _build(settings, html=kind[0], tls=kind[1]) for kind in kinds}
        self._plain = {kind: _with_nonce(headers, None) for kind, headers in self._sets.items()}
        self._enabled = settings.enabled
        insisted = frozenset(name.removeprefix("api_").replace("_", "-").encode("ascii") for name in insisted_on)
        ours = frozenset(name for headers in self._sets.values() for name in headers.names)
        self._removed = frozenset(name.lower().encode("latin-1") for name in settings.remove)
        self._touched = ours | self._removed
        # Where the content type stands in answers that set nothing that concerns us, by the names of their fields.
        self._simple: dict[tuple[bytes, ...], int] = {}
        # Of these fields ours stays when the application has set its own.
        self._replacing = ours if settings.on_conflict == "replace" else ours & insisted

    def apply(
        self, headers: Iterable[tuple[bytes, bytes]], *, tls: bool, nonce: str | None = None
    ) -> header_fields.RawHeaders:
        """The fields of an answer with ours among them.

        Args:
            headers: What the application has set.
            tls: Whether the client speaks TLS, which is what HSTS needs.
            nonce: The nonce that the page asked for; the answer must then not be cached.
        """
        answer = list(headers)
        if not self._enabled:
            return answer
        shape = tuple([name for name, _ in answer])
        at = self._simple.get(shape)
        if at is not None and nonce is None:
            html = at >= 0 and answer[at][1].lower().startswith(_HTML)
            answer += self._plain[html, tls].fields
            return answer
        names = {name.lower() for name, _ in answer}
        content_type = header_fields.get(answer, b"content-type") if b"content-type" in names else None
        kind = (content_type is not None and content_type.lower().startswith(_HTML), tls)
        if nonce is None:
            ours = self._plain[kind]
        else:
            ours = _with_nonce(self._sets[kind], nonce)
            header_fields.replace(answer, b"cache-control", b"no-store")
            names.add(b"cache-control")
        if not names.isdisjoint(self._removed):
            answer = [pair for pair in answer if pair[0].lower() not in self._removed]
        if names.isdisjoint(ours.names):
            if names.isdisjoint(self._touched) and len(self._simple) < _MOST_SHAPES:
                self._simple[shape] = shape.index(b"content-type") if b"content-type" in shape else -1
            answer += ours.fields
            return answer
        replaced = names & self._replacing & ours.names
        if replaced and nonce is not None:
            replaced -= {b"cache-control"}
        kept = names - replaced
        answer = [pair for pair in answer if pair[0].lower() not in replaced]
        answer += [pair for pair in ours.fields if pair[0] not in kept]
        return answer


# The setting and the builder of `secure` that names the field and checks its value.
_BUILDERS: tuple[tuple[str, Callable[[str], Any]], ...] = (
    ("strict_transport_security", lambda text: secure.StrictTransportSecurity().value(text)),
    ("x_frame_options", lambda text: secure.XFrameOptions().value(text)),
    ("x_content_type_options", lambda text: secure.XContentTypeOptions().value(text)),
    ("referrer_policy", lambda text: secure.ReferrerPolicy().value(text)),
    ("permissions_policy", lambda text: secure.PermissionsPolicy().value(text)),
    ("cross_origin_opener_policy", lambda text: secure.CrossOriginOpenerPolicy().value(text)),
    ("cross_origin_resource_policy", lambda text: secure.CrossOriginResourcePolicy().value(text)),
    ("cross_origin_embedder_policy", lambda text: secure.CrossOriginEmbedderPolicy().value(text)),
    ("x_dns_prefetch_control", lambda text: secure.XDnsPrefetchControl().value(text)),
    ("x_permitted_cross_domain_policies", lambda text: secure.XPermittedCrossDomainPolicies().value(text)),
    ("cache_control", lambda text: secure.CacheControl().value(text)),
    ("clear_site_data", lambda text: secure.CustomHeader("Clear-Site-Data", text)),
)
_NEVER_A_NONCE = "AAAAAAAAAAAAAAAAAAAAAA"


def _build(settings: SecurityHeadersSettings, *, html: bool, tls: bool) -> HeaderSet:
    """The fields for one kind of answer.

    Raises:
        ValueError: A value is not one that the field can have.
    """
    builders = []
    for name, build in _BUILDERS:
        text = getattr(settings, name)
        if text is not None and (tls or name != "strict_transport_security"):
            try:
                builders.append(build(text))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
    endpoint = settings.reporting_endpoint if html else None
    csp = settings.content_security_policy if html else settings.api_content_security_policy
    # Browsers take named endpoints over TLS only, and where a policy names one pass over the older `report-uri`.
    reporting = {} if endpoint is None else {"report-uri": endpoint} | ({"report-to": _ENDPOINT_NAME} if tls else {})
    if csp is not None:
        builders.append(_csp("content_security_policy", csp, reporting))
    if html and settings.content_security_policy_report_only is not None:
        text = settings.content_security_policy_report_only
        builders.append(_csp("content_security_policy_report_only", text, reporting).report_only())
    if "report-to" in reporting and (csp is not None or settings.content_security_policy_report_only is not None):
        builders.append(secure.CustomHeader("Reporting-Endpoints", f'{_ENDPOINT_NAME}="{endpoint}"'))
    checked = secure.Secure(custom=builders).validate_and_normalize_headers(on_invalid="raise", strict=True)
    fields = tuple(
        header_fields.field(name, value.replace(_NEVER_A_NONCE, "{nonce}")) for name, value in checked.headers.items()
    )
    return HeaderSet(fields, frozenset(n for n, _ in fields), any(b"{nonce}" in value for _, value in fields))


# Browsers ignore these in a policy that only reports, and say so on the console of every page.
_ENFORCED_ONLY = ("upgrade-insecure-requests", "sandbox")

_REPORTING = frozenset({"report-to", "report-uri"})
_ENDPOINT_NAME = "csp"


def _csp(name: str, text: str, reporting: Mapping[str, str]) -> secure.ContentSecurityPolicy:
    """A policy taken apart and put together again, so that a misspelt directive is found here and not by nobody."""
    policy = secure.ContentSecurityPolicy()
    directives = set()
    for part in text.replace("{nonce}", _NEVER_A_NONCE).split(";"):
        if not part.strip():
            continue
        directive, *sources = part.split()
        if directive in _ENFORCED_ONLY and name.endswith("report_only"):
            continue
        if directive not in DIRECTIVES:
            raise ValueError(f"{name}: {directive!r} is not a CSP directive{did_you_mean(directive, DIRECTIVES)}")
        try:
            policy.custom_directive(directive, *sources)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        directives.add(directive)
    if directives.isdisjoint(_REPORTING):
        for directive, where in reporting.items():
            policy.custom_directive(directive, where)
    return policy


def _with_nonce(headers: HeaderSet, nonce: str | None) -> HeaderSet:
    """The set with the nonce in its place, or with the place taken out."""
    if not headers.has_nonce:
        return headers
    old, new = (b" 'nonce-{nonce}'", b"") if nonce is None else (b"{nonce}", nonce.encode("ascii"))
    return HeaderSet(tuple((n, v.replace(old, new)) for n, v in headers.fields), headers.names, has_nonce=False)


# --- layer ------------------------------------------------------------------------------------------------------------


class SecurityHeadersMiddleware:
    """Sends every answer with the fields of its policy.

    Args:
        app: The application inside.
        settings: The fields; by default the OWASP list.
    """

    def __init__(self, app: ASGIApp, settings: SecurityHeadersSettings | None = None) -> None:
        self.app = app
        self._settings = settings or SecurityHeadersSettings()
        self._policy = HeaderPolicy(self._settings)
        # By the overrides that hold together on a route: as many as the application's source has.
        self._policies: dict[tuple[SecurityHeaders, ...], HeaderPolicy] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        context = request_context.ensure(scope)
        overrides = (context.route or route_of(scope)).of(SecurityHeaders)
        if overrides:
            mark_handled(scope, overrides)
        state = context.state
        state[SecurityHeadersMiddleware] = self

        async def send_with_headers(message: Message) -> None:
            if message["type"] in _STARTS:
                # The route that was reached in the end, which a middleware of the application may have changed.
                route = context.route
                found = route.overrides.get(SecurityHeaders, ()) if route is not None else ()
                late = state.get(_Late, ())
                holding = (*found, *(o for o in late if o not in found)) if late else found
                policy = self.policy_for(holding) if holding else self._policy
                nonce = state.get(_Nonce)
                message["headers"] = policy.apply(message.get("headers") or (), tls=context.secure, nonce=nonce)
            await send(message)

        await self.app(scope, receive, send_with_headers)

    def policy_for(self, overrides: tuple[Any, ...]) -> HeaderPolicy:
        """The policy where these overrides hold, the outermost first: of each field the innermost word counts."""
        policy = self._policies.get(overrides)
        if policy is None:
            changes = {name: value for override in overrides for name, value in override.changes.items()}
            settings = SecurityHeadersSettings.model_validate(dict(self._settings) | changes)
            policy = self._policies[overrides] = HeaderPolicy(settings, insisted_on=changes)
        return policy


# --- override ---------------------------------------------------------------------------------------------------------


class _Late:
    """Key of the overrides that their layer learnt of only after routing."""


class _Nonce:
    """Key of the nonce that the page asked for."""


class SecurityHeaders(Override):
    """Changes single fields on a route, a router or an application; every level holds, field by field the innermost.

    A field that it names replaces what the endpoint, or FastAPI for it, has set.

    Without the layer (an application that was never hardened) it sets the named fields by itself, on the answers that
    FastAPI builds; a ``Response`` object that the endpoint returns is then left as it is.

    Args:
        **changes: Fields of :class:`SecurityHeadersSettings`; ``None`` leaves a field out.

    Raises:
        ValueError: A field is unknown or its value cannot be sent.

    Example:
        >>> embeddable = SecurityHeaders(
        ...     x_frame_options=None, content_security_policy="frame-ancestors https://a.example"
        ... )
        >>> no_store = SecurityHeaders(cache_control="no-store")
    """

    every_level_holds: ClassVar[bool] = True
    may_refuse: ClassVar[bool] = False

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        checked = SecurityHeadersSettings(**changes)
        self.changes = {name: getattr(checked, name) for name in checked.model_fields_set}

    async def after_routing(self, connection: HTTPConnection, response: Response) -> None:  # type: ignore[override]
        """Acts where the layer has not seen the route."""
        await super().after_routing(connection)
        if SecurityHeadersMiddleware not in request_context.ensure(connection.scope).state:
            settings = SecurityHeadersSettings(**_ABSENT | self.changes)
            tls = request_context.ensure(connection.scope).secure
            nonce = request_context.ensure(connection.scope).state.get(_Nonce)
            # What kind of answer it will be is not known here, so the policies of both are set where they are named.
            for html in (False, True):
                for name, value in _with_nonce(_build(settings, html=html, tls=tls), nonce).fields:
                    response.headers[name.decode("ascii")] = value.decode("ascii")

    async def act_late(self, connection: HTTPConnection) -> None:
        """Tells the layer, which has not sent anything yet, of this override."""
        state = request_context.ensure(connection.scope).state
        state[_Late] = (*state.get(_Late, ()), self)


_ABSENT: dict[str, Any] = dict.fromkeys(name for name, _ in _BUILDERS) | {
    "content_security_policy": None,
    "content_security_policy_report_only": None,
    "api_content_security_policy": None,
}


def csp_nonce(connection: HTTPConnection) -> str:
    """The nonce of this answer: 128 random bits, made at the first call; the answer is then not to be cached."""
    context = request_context.ensure(connection.scope)
    nonce: str = context.state.get(_Nonce) or secrets.token_urlsafe(16)
    context.state[_Nonce] = nonce
    context.unique = True
    return nonce


CspNonce = Annotated[str, Depends(csp_nonce)]
"""The nonce as a parameter: ``async def page(nonce: CspNonce)``, for ``<script nonce=...>`` in the page."""


def csp_nonce_context(request: HTTPConnection) -> dict[str, Any]:
    """A context processor for Jinja2: templates write ``<script nonce="{{ csp_nonce() }}">``.

    The nonce is made where a template first calls for it, so pages without one can still be cached.

    Example:
        >>> from fastapi.templating import Jinja2Templates
        >>> templates = Jinja2Templates("templates", context_processors=[csp_nonce_context])
    """
    return {"csp_nonce": partial(csp_nonce, request)}
