"""Lets pages of other origins read answers: those that you name, and nobody else.

A browser keeps a page from reading what another origin answers. CORS (the Fetch standard, section 3.3) is how a server
lifts that for the origins it trusts. The layer protects from lifting it for everybody by a careless setting: a prefix,
a suffix, an unescaped dot, ``null``, or ``*`` together with cookies. It is *not* access control: whoever is no browser
ignores it, a request of another origin is served all the same (the page only cannot read the answer), and websocket
handshakes are not subject to it.

It sits above everything that refuses, so that a page can read the 429 and the 500 of a call and not only "CORS error";
and it answers preflights itself, before limits and authentication, which a preflight could never pass. Where no origin
is configured, for the application or by :class:`Cors` on a route, nothing is added. Whoever has set
``Access-Control-Allow-Origin`` further in, such as a mounted application, is not contradicted: there are never two.

Example:
    >>> from fastapi import FastAPI
    >>> from fastapi_hardening.security.cors import Cors, CorsMiddleware, CorsSettings
    >>> app = FastAPI()
    >>> app.add_middleware(CorsMiddleware, settings=CorsSettings(allow_origins=("https://shop.example",)))
    >>> @app.get("/prices", dependencies=[Cors(allow_origins="*")])
    ... async def prices() -> list[int]:
    ...     return [1, 2, 3]
"""

import inspect
import logging
import re
from typing import Any, Self

from fastapi import Response
from pydantic import Field, ValidationError, field_validator, model_validator
from starlette.middleware.cors import ALL_METHODS, SAFELISTED_HEADERS, CORSMiddleware
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_hardening.core import context as request_context
from fastapi_hardening.core import headers as header_fields
from fastapi_hardening.core.configuration import ConcernSettings, ConfigurationError
from fastapi_hardening.core.headers import RawHeaders
from fastapi_hardening.core.mounted_cors import MountedCors, take_off
from fastapi_hardening.core.origins import ANY, OriginList, Preflight, checked_origin, checked_pattern, origin_of
from fastapi_hardening.core.policy import Override, mark_handled
from fastapi_hardening.core.problem import Problem, refuse
from fastapi_hardening.core.routes import route_of, table_of

logger = logging.getLogger("fastapi_hardening.cors")

_ALLOW_ORIGIN = b"access-control-allow-origin"
_ALLOW_ORIGIN_LENGTH = len(_ALLOW_ORIGIN)
_VARY_LENGTH = len(b"vary")

_VARY_ORIGIN = (b"vary", b"Origin")
_VARY_PREFLIGHT = (
    "Origin, Access-Control-Request-Method, Access-Control-Request-Headers, Access-Control-Request-Private-Network"
)


# --- settings ---------------------------------------------------------------------------------------------------------


class CorsSettings(ConcernSettings):
    """Whose pages may read answers, and what they may send. Without an origin nothing is allowed, and nothing sent."""

    allow_origins: tuple[str, ...] = ()
    """``https://shop.example``, ``https://*.shop.example`` for every subdomain (not for ``shop.example`` itself), or
    ``*`` for everybody."""

    allow_origin_regex: str | None = None
    """Origins as a pattern, which must match the whole origin. Prefer ``allow_origins``: it cannot be misread."""

    allow_methods: tuple[str, ...] = ("GET", "HEAD", "POST")
    """Methods that pages may use; ``*`` for all. The default is what a browser sends without asking."""

    allow_headers: tuple[str, ...] = ()
    """Header fields that pages may send beside ``Accept``, ``Accept-Language``, ``Content-Language`` and
    ``Content-Type``; ``*`` for all. Bearer tokens need ``Authorization``."""

    allow_credentials: bool = False
    """Whether cookies are sent along and the answer may still be read."""

    expose_headers: tuple[str, ...] = ("X-Request-ID", "Retry-After", "RateLimit", "RateLimit-Policy")
    """Header fields of the answer that a page may read beside the common ones."""

    max_age_seconds: int = Field(600, ge=0, le=86_400)
    """How long a browser remembers the answer to a preflight. No browser takes more than a day."""

    allow_private_network: bool = False
    """Whether public pages may call this server when it stands in a private network."""

    @field_validator("allow_origins")
    @classmethod
    def _are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        if ANY in origins and len(set(origins)) > 1:
            raise ValueError("'*' allows every origin, so the others say nothing: leave out '*', or the others")
        return tuple(origin if origin == ANY else checked_origin(origin) for origin in origins)

    @field_validator("allow_origin_regex")
    @classmethod
    def _is_a_narrow_pattern(cls, pattern: str | None) -> str | None:
        return checked_pattern(pattern) if pattern else None

    @field_validator("allow_methods")
    @classmethod
    def _are_methods(cls, methods: tuple[str, ...]) -> tuple[str, ...]:
        for method in methods:
            header_fields.field(method, "a method is a token, as a name is")
        return tuple(method.upper() for method in methods)

    @field_validator("allow_headers", "expose_headers")
    @classmethod
    def _are_field_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            header_fields.field(name, "any")
        return names

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if ANY in self.allow_origins and self.allow_credentials:
            raise ValueError(
                "allow_origins='*' with allow_credentials would show every site what a signed-in user sees: name the "
                "origins, or set allow_credentials=false"
            )
        if ANY in self.allow_origins and self.allow_origin_regex is not None:
            raise ValueError("allow_origins='*' allows every origin, so leave out '*', or allow_origin_regex")
        if ANY in self.expose_headers and self.allow_credentials:
            raise ValueError("with allow_credentials a browser takes '*' in expose_headers as a name: list the fields")
        return self


# --- problem ----------------------------------------------------------------------------------------------------------


class PreflightRefused(Problem):
    """The page that asks may not make the call. Only people read it, in the browser's tools: no page can."""

    status = 400
    title = "Cross-origin call refused"


# --- engine -----------------------------------------------------------------------------------------------------------


class CorsPolicy:
    """Settings frozen to bytes.

    Args:
        settings: At least one origin or a pattern.

    Example:
        >>> policy = CorsPolicy(CorsSettings(allow_origins=("https://*.shop.example",), expose_headers=()))
        >>> policy.fields(b"https://www.shop.example")
        ((b'vary', b'Origin'), (b'access-control-allow-origin', b'https://www.shop.example'))
        >>> policy.fields(b"https://shop.example.evil.example")
        ((b'vary', b'Origin'),)
    """

    def __init__(self, settings: CorsSettings) -> None:
        self._origins = OriginList(settings.allow_origins, settings.allow_origin_regex)
        self._everybody = self._origins.everybody
        self._credentials = ((b"access-control-allow-credentials", b"true"),) if settings.allow_credentials else ()
        exposed = ", ".join(settings.expose_headers)
        self._exposed = (header_fields.field("Access-Control-Expose-Headers", exposed),) if exposed else ()
        # Sent always, `*` needs no Vary; sent only to who asks, it would (Fetch, section 3.3.5).
        self._otherwise: tuple[tuple[bytes, bytes], ...] = (
            ((_ALLOW_ORIGIN, b"*"), *self._exposed) if self._everybody else (_VARY_ORIGIN,)
        )
        self._known = {origin: self._fields_for(origin) for origin in self._origins.exact}
        self._methods = frozenset(
            m.encode("ascii") for m in (ALL_METHODS if ANY in settings.allow_methods else settings.allow_methods)
        )
        self._any_field = ANY in settings.allow_headers
        names = sorted(SAFELISTED_HEADERS.union(settings.allow_headers) - {ANY})
        self._names = frozenset(name.lower().encode("ascii") for name in names)
        self._private_network = settings.allow_private_network
        self._preflight = (
            header_fields.field("Vary", _VARY_PREFLIGHT),
            (b"access-control-allow-methods", b", ".join(sorted(self._methods))),
            (b"access-control-max-age", str(settings.max_age_seconds).encode("ascii")),
            *self._credentials,
        )
        self._allowed_names = ", ".join(names).encode("ascii")

    @classmethod
    def of(cls, settings: CorsSettings) -> "CorsPolicy | None":
        """The policy of these settings; ``None`` where they allow nobody anything."""
        if not settings.enabled or not (settings.allow_origins or settings.allow_origin_regex):
            return None
        return cls(settings)

    def allows(self, origin: bytes) -> bool:
        """Whether pages of this origin may read answers; it is compared byte by byte, as browsers do."""
        return self._origins.admits(origin)

    def fields(self, origin: bytes | None) -> tuple[tuple[bytes, bytes], ...]:
        """What an answer gets for a request of this origin, or of none."""
        if origin is None or self._everybody:
            return self._otherwise
        known = self._known.get(origin)
        if known is None:
            known = self._fields_for(origin) if self._origins.matches(origin) else self._otherwise
        return known

    def apply(self, headers: RawHeaders, origin: bytes | None) -> None:
        """Adds to the fields of an answer what is missing; who has set ``Access-Control-Allow-Origin`` has decided."""
        varies = False
        for name, _ in headers:
            # By the length first: most names are neither, and need no copy in lower case.
            if len(name) == _ALLOW_ORIGIN_LENGTH and name.lower() == _ALLOW_ORIGIN:
                return
            if len(name) == _VARY_LENGTH and name.lower() == b"vary":
                varies = True
        fields = self.fields(origin)
        if varies and fields[0] is _VARY_ORIGIN:
            _vary_by_origin(headers)
            fields = fields[1:]
        headers += fields

    def refused(self, asked: Preflight) -> list[str]:
        """What of a call is not allowed: ``origin``, ``method``, ``headers``, ``private network``; empty if it is."""
        refused = [] if self.allows(asked.origin) else ["origin"]
        if asked.method not in self._methods:
            refused.append("method")
        names = _names_in(asked.headers)
        if not (all(map(_is_name, names)) if self._any_field else self._names.issuperset(names)):
            refused.append("headers")
        if asked.private_network and not self._private_network:
            refused.append("private network")
        return refused

    def answer(self, asked: Preflight) -> RawHeaders:
        """The fields of the answer to a call that is allowed."""
        headers = [(_ALLOW_ORIGIN, b"*" if self._everybody else asked.origin), *self._preflight]
        # A literal `*` means nothing with credentials, and never Authorization: what was asked for is named.
        names = b", ".join(_names_in(asked.headers)) if self._any_field else self._allowed_names
        if names:
            headers.append((b"access-control-allow-headers", names))
        if asked.private_network:
            headers.append((b"access-control-allow-private-network", b"true"))
        return headers

    def _fields_for(self, origin: bytes) -> tuple[tuple[bytes, bytes], ...]:
        return (_VARY_ORIGIN, (_ALLOW_ORIGIN, origin), *self._credentials, *self._exposed)


def _names_in(fields: bytes) -> list[bytes]:
    return [name for part in fields.split(b",") if (name := part.strip(b" \t").lower())]


_is_name = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+").fullmatch


def _vary_by_origin(headers: RawHeaders) -> None:
    """Adds the origin to the ``Vary`` line that is there: some caches read only one."""
    lines = [index for index, (name, _) in enumerate(headers) if name.lower() == b"vary"]
    named = {token for index in lines for token in _names_in(headers[index][1])}
    if named.isdisjoint((b"*", b"origin")):
        name, value = headers[lines[-1]]
        headers[lines[-1]] = (name, value + b", Origin" if value.strip() else b"Origin")


# --- layer ------------------------------------------------------------------------------------------------------------


class CorsMiddleware:
    """Answers preflights, and lets pages of allowed origins read every other answer.

    Args:
        app: The application inside.
        settings: Who may; by default nobody, so that only :class:`Cors` on a route allows something.
    """

    def __init__(self, app: ASGIApp, settings: CorsSettings | None = None) -> None:
        self.app = app
        self._policy = CorsPolicy.of(settings or CorsSettings())
        self._mounted: MountedCors | None = None
        self._is_of_a_mount = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        # A websocket handshake is not subject to CORS: a browser lets a page read it whatever the answer says.
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        context = request_context.ensure(scope)
        fields = context.fields
        origin = origin_of(scope["headers"]) if fields is None else fields.get(b"origin")
        if origin is not None:
            mounted = self._mounted
            own = self._own_of_a_mount(scope) if mounted is None or mounted.exist else None
            if own is not None:
                # What routes further in say is not heard: half of it could not be kept, behind that middleware.
                mark_handled(scope, route_of(scope).of(Cors))
                await own(scope, receive, send)
                return
            if scope["method"] == "OPTIONS" and await self._has_answered(origin, scope, receive, send):
                return
        overrides: tuple[Any, ...] = (context.route or route_of(scope)).of(Cors)
        policy = self._policy
        if overrides:
            policy = overrides[-1].policy
            mark_handled(scope, overrides)
        if policy is None:
            await self.app(scope, receive, send)
            return
        state = context.state
        state[CorsMiddleware] = self

        async def send_with_cors(message: Message) -> None:
            if message["type"] == "http.response.start":
                holding: CorsPolicy | None = state.get(_Late, policy)
                if holding is not None:
                    headers = message["headers"] = list(message.get("headers") or ())
                    holding.apply(headers, origin)
            await send(message)

        await self.app(scope, receive, send_with_cors)

    async def _has_answered(self, origin: bytes, scope: Scope, receive: Receive, send: Send) -> bool:
        """Answers a preflight by the policy of the route that the call itself will reach, if there is one."""
        asked = Preflight.of(scope["headers"], origin)
        if asked is None:
            return False
        route, policy = None, self._policy
        if "app" in scope:
            route = table_of(scope["app"]).find({**scope, "method": asked.method.decode("latin-1")})
            overrides: tuple[Any, ...] = route.of(Cors)
            policy = overrides[-1].policy if overrides else policy
        if policy is None:
            return False
        refused = policy.refused(asked)
        if refused:
            context = request_context.ensure(scope)
            context.route = context.route or route
            problem = PreflightRefused(f"Not allowed: {', '.join(refused)}.", headers={"Vary": _VARY_PREFLIGHT})
            await refuse(problem, scope, receive, send, layer="cors")
            return True
        # 200, because some old clients take nothing else for a yes.
        headers = [*policy.answer(asked), (b"content-length", b"0")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b""})
        return True

    def _own_of_a_mount(self, scope: Scope) -> ASGIApp | None:
        """The CORS middleware of a mounted application that this request is for, put around everything here.

        So it answers for its own paths as before, and its pages too can read what the layers between refuse.
        """
        if "app" not in scope or self._is_of_a_mount:
            return None
        if self._mounted is None:
            self._mounted = MountedCors(self.app, table_of(scope["app"]), (CORSMiddleware, CorsMiddleware))
        own = self._mounted.of(scope) if self._mounted.exist else None
        if isinstance(own, CorsMiddleware):
            # Or it would find itself.
            own._is_of_a_mount = True  # noqa: SLF001
        return own


# --- override ---------------------------------------------------------------------------------------------------------


class _Late:
    """Key of the policy of an override that its layer learnt of only after routing."""


class _Fields:
    """Key of the fields of the answer that FastAPI will build."""


class Cors(Override):
    """Who may call a route, a router or an application; the innermost holds, and alone.

    It is a whole policy: what it does not name has its default, not the setting of the application. So a route that is
    opened to everybody does not take credentials along. ``Cors(allow_origins=())`` closes a route.

    A preflight is answered by the layer only. On an application without one, the override still lets pages read the
    answers of calls that need no preflight.

    Args:
        **settings: Keys of :class:`CorsSettings`; ``allow_origins`` or ``allow_origin_regex`` must be among them.

    Raises:
        ValueError: A key is unknown, a value cannot be, or nobody is named.

    Example:
        >>> public = Cors(allow_origins="*")
        >>> partner = Cors(allow_origins=("https://partner.example",), allow_methods=("PUT",), allow_credentials=True)
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        checked = CorsSettings(**settings)
        if not checked.model_fields_set & {"allow_origins", "allow_origin_regex", "enabled"}:
            raise ValueError("Cors() replaces the whole policy: name allow_origins, or allow_origins=() for nobody")
        self.policy = CorsPolicy.of(checked)

    async def after_routing(self, connection: HTTPConnection, response: Response) -> None:  # type: ignore[override]
        """Acts where the layer has not seen the route."""
        if connection.scope["type"] == "http":
            request_context.ensure(connection.scope).state[_Fields] = response.headers.raw
            await super().after_routing(connection)

    async def act_late(self, connection: HTTPConnection) -> None:
        """Tells the layer, which has not sent anything yet, of this override; without one, sets the fields itself."""
        state = request_context.ensure(connection.scope).state
        if CorsMiddleware in state:
            state[_Late] = self.policy
        elif self.policy is not None:
            self.policy.apply(state[_Fields], origin_of(connection.scope["headers"]))


# --- what the application already has ---------------------------------------------------------------------------------


def take_over(app: Any, settings: CorsSettings | None = None) -> CorsSettings | None:
    """Takes Starlette's ``CORSMiddleware`` off an application, and returns its settings as ours.

    It stands too far in: a page could not read what is refused further out, nor the 500. To be called when the stack
    of the application is built, because the middleware may be added until then.

    Args:
        app: The application; a middleware of it that is derived from Starlette's is left where it is.
        settings: Ours; if they allow an origin as well, nobody could say which holds.

    Returns:
        Its settings; our default of ``expose_headers`` is added to them. ``None`` if there is no such middleware.

    Raises:
        ConfigurationError: Both are configured, it stands twice, or its settings are unsafe.
    """
    if settings is not None and not settings.enabled:
        return None
    found = [entry for entry in app.user_middleware if entry.cls is CORSMiddleware]
    if not found:
        return None
    if settings is not None and CorsPolicy.of(settings) is not None:
        raise ConfigurationError(
            "CORS is configured twice, by the settings (cors.allow_origins) and by app.add_middleware(CORSMiddleware, "
            "...): remove the middleware, or leave cors.allow_origins and cors.allow_origin_regex empty"
        )
    if len(found) > 1:
        raise ConfigurationError("CORSMiddleware was added twice to one application: leave the one that is meant")
    try:
        taken = _translated(found[0])
    except ValidationError as error:
        sentences = "\n".join(
            f"  - {'.'.join(('cors', *map(str, each['loc'])))}: {each['msg'].removeprefix('Value error, ')}"
            for each in error.errors(include_input=False)
        )
        raise ConfigurationError(
            f"the CORSMiddleware of the application cannot be taken over; mend it where it is added:\n{sentences}"
        ) from None
    take_off(app, found[0])
    logger.warning(
        "the application's CORSMiddleware is taken over, so that it also holds for refusals and the 500 page; write "
        "its arguments as cors settings to say so yourself"
    )
    return taken


def _translated(entry: Any) -> CorsSettings:
    bound = inspect.signature(CORSMiddleware).bind(None, *entry.args, **entry.kwargs)
    bound.apply_defaults()
    given = bound.arguments
    exposed = given["expose_headers"]
    everything = ANY in exposed and not given["allow_credentials"]
    everybody = ANY in given["allow_origins"]
    return CorsSettings(
        allow_origins=(ANY,) if everybody else given["allow_origins"],
        # Where everybody may, a pattern says nothing.
        allow_origin_regex=None if everybody else given["allow_origin_regex"],
        allow_methods=given["allow_methods"],
        allow_headers=given["allow_headers"],
        allow_credentials=given["allow_credentials"],
        expose_headers=(
            (ANY,)
            if everything
            else tuple(dict.fromkeys((*exposed, *CorsSettings.model_fields["expose_headers"].default)))
        ),
        # Browsers cap it at a day by themselves; Starlette's -1 means not at all.
        max_age_seconds=min(max(given["max_age"], 0), 86_400),
        allow_private_network=given.get("allow_private_network", False),
    )
