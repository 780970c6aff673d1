"""Serves ``/docs`` and ``/redoc`` under a strict, enforced Content-Security-Policy, and without a foreign host.

It protects from what FastAPI's own pages do: run whatever a content delivery network sends today under a name without
a version, and inline code that no strict policy lets through. With the extra ``docs`` the files of Swagger UI and ReDoc
come from the application itself, so the pages work offline; without it they come from the network in one version each,
and a browser refuses them if a single byte differs (Subresource Integrity). It does *not* decide who may read the
pages: FastAPI's ``docs_url``, ``redoc_url`` and ``openapi_url`` do.

It is no layer: the routes that FastAPI has made are replaced where they stand, in the application and in all FastAPI
applications mounted under it. Routes of your own are left alone.

Example:
    >>> from fastapi import FastAPI
    >>> from fastapi_hardening.api.docs_pages import install
    >>> app = FastAPI()
    >>> install(app)
"""

import asyncio
import importlib.metadata
import importlib.util
import inspect
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

from fastapi import FastAPI, Request, applications
from fastapi.encoders import jsonable_encoder
from fastapi.openapi import docs
from pydantic import field_validator
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from fastapi_hardening.core.configuration import ConcernSettings, ConfigurationError


class DocsPagesSettings(ConcernSettings):
    """The settings of the pages of the API's documentation."""

    assets: Literal["auto", "self-hosted", "cdn"] = "auto"
    """Where their scripts come from: this application, which needs the extra ``docs``; a content delivery network, in
    one version that is verified; or the first where the extra is installed."""

    connect_src: tuple[str, ...] = ("'self'",)
    """Where the pages may send requests: the servers that are tried out, and those that sign in."""

    img_src: tuple[str, ...] = ("'self'", "data:")
    """Where images come from that descriptions show."""

    @field_validator("connect_src", "img_src")
    @classmethod
    def _are_sources(cls, sources: tuple[str, ...]) -> tuple[str, ...]:
        for source in sources:
            if not source or any(character in " ;,\t\r\n" for character in source):
                raise ValueError(f"{source!r} is not a source, such as 'self' in quotes or https://api.example")
        return sources


# --- engine -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Asset:
    """A file of a page.

    Attributes:
        name: Its name in the extra's package.
        url: Where the same file is on the network.
        integrity: What a browser verifies it by.
        media_type: What it is.
    """

    name: str
    url: str
    integrity: str
    media_type: str = "text/javascript; charset=utf-8"


# The versions that the extra's package ships; a test compares them byte by byte.
_NETWORK = "https://cdn.jsdelivr.net/npm/"
SWAGGER_SCRIPT = Asset(
    "swagger-ui-bundle.js",
    _NETWORK + "swagger-ui-dist@5.32.6/swagger-ui-bundle.js",
    "sha384-EYdOaiRwn44zNjrw+Tfs06qYz9BGQVo2f4/pLY5i7VorbjnZNhdplAbTBk8FXHUJ",
)
SWAGGER_STYLE = Asset(
    "swagger-ui.css",
    _NETWORK + "swagger-ui-dist@5.32.6/swagger-ui.css",
    "sha384-9Q2fpS+xeS4ffJy6CagnwoUl+4ldAYhOs9pgZuEKxypVModhmZFzeMlvVsAjf7uT",
    "text/css; charset=utf-8",
)
REDOC_SCRIPT = Asset(
    "redoc.standalone.js",
    _NETWORK + "redoc@2.5.3/bundles/redoc.standalone.js",
    "sha384-xiEssMQFSpSfLbzRZCGfxxIM5QDb2DTrU6vyoZdp2sV1L6pmOMy6MpTtUoLbpC96",
)
ASSETS = (SWAGGER_SCRIPT, SWAGGER_STYLE, REDOC_SCRIPT)

# ReDoc fetches the logo of its maker on every page, from another host.
_LOGO = b"https://cdn.redoc.ly/redoc/logo-mini.svg"
_LOGO_ORIGIN = "https://cdn.redoc.ly"
_NO_LOGO = b"data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg'/>"

# ReDoc puts its styles into an empty element by script, and those of its scroll bar into one before it knows the nonce:
# the hash of nothing, and of that style sheet.
_REDOC_STYLES = (
    "'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=' 'sha256-QMIg+bpjm3JdElJ388KYke01izlUW0UoNOeKjpMxdgc='"
)

_PACKAGE = "fastapi-offline"


def folder() -> Path | None:
    """Where the extra's package has put the files; ``None`` where it is not installed."""
    spec = importlib.util.find_spec(_PACKAGE.replace("-", "_"))
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "static"


def content(asset: Asset, where: Path) -> bytes:
    """A file as it is served: ReDoc without the logo that it would fetch from its maker."""
    return (where / asset.name).read_bytes().replace(_LOGO, _NO_LOGO)


def policy(settings: DocsPagesSettings) -> str:
    """The Content-Security-Policy of the two pages; ``{nonce}`` stands where the nonce of an answer goes."""
    images = settings.img_src if assets_folder(settings) else (*settings.img_src, _LOGO_ORIGIN)
    return (
        f"default-src 'none'; script-src 'nonce-{{nonce}}'; style-src 'nonce-{{nonce}}' {_REDOC_STYLES}; "
        f"img-src {' '.join(images)}; connect-src {' '.join(settings.connect_src)}; worker-src blob:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


REDIRECT_POLICY = (
    "default-src 'none'; script-src 'nonce-{nonce}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""That of the page to which a sign-in comes back."""


class Html:
    """The HTML of the pages, with nothing in it that is not escaped.

    Args:
        version: The version of the files that the application serves; ``None`` where they come from the network.
    """

    def __init__(self, version: str | None) -> None:
        self._version = version

    def swagger_ui(self, app: FastAPI, root_path: str, nonce: str) -> str:
        """The page of Swagger UI, with the parameters that the application gives to FastAPI."""
        options: dict[str, Any] = {"url": root_path + (app.openapi_url or "")}
        options |= docs.swagger_ui_default_parameters | (app.swagger_ui_parameters or {})
        if app.swagger_ui_oauth2_redirect_url:
            options["oauth2RedirectUrl"] = root_path + app.swagger_ui_oauth2_redirect_url
        script = f"const options = {_json(options)};\n"
        if app.swagger_ui_oauth2_redirect_url:
            script += "options.oauth2RedirectUrl = window.location.origin + options.oauth2RedirectUrl;\n"
        script += (
            "options.presets = [SwaggerUIBundle.presets.apis, SwaggerUIBundle.SwaggerUIStandalonePreset];\n"
            "const ui = SwaggerUIBundle(options);\n"
        )
        if app.swagger_ui_init_oauth:
            script += f"ui.initOAuth({_json(app.swagger_ui_init_oauth)});\n"
        style = f'<link rel="stylesheet" {self._source("href", SWAGGER_STYLE)} nonce="{nonce}">'
        return _page(
            f"{app.title} - Swagger UI",
            style,
            f'<div id="swagger-ui"></div>\n<script {self._source("src", SWAGGER_SCRIPT)} nonce="{nonce}"></script>\n'
            f'<script nonce="{nonce}">\n{script}</script>',
        )

    def redoc(self, app: FastAPI, root_path: str, nonce: str) -> str:
        """The page of ReDoc."""
        return _page(
            f"{app.title} - ReDoc",
            f'<style nonce="{nonce}">body {{ margin: 0; padding: 0 }}</style>',
            "<noscript>ReDoc needs JavaScript.</noscript>\n"
            f'<redoc spec-url="{escape(root_path + (app.openapi_url or ""))}" nonce="{nonce}"></redoc>\n'
            f'<script {self._source("src", REDOC_SCRIPT)} nonce="{nonce}"></script>',
        )

    def oauth2_redirect(self, nonce: str) -> str:
        """FastAPI's page to which a sign-in comes back."""
        page = bytes(docs.get_swagger_ui_oauth2_redirect_html().body).decode()
        return page.replace("<script>", f'<script nonce="{nonce}">')

    def _source(self, attribute: str, asset: Asset) -> str:
        if self._version is not None:
            # A query of the page itself, so that it does not matter what a mount or a proxy puts before its path.
            return f'{attribute}="?asset={asset.name}&amp;v={self._version}"'
        return f'{attribute}="{asset.url}" integrity="{asset.integrity}" crossorigin="anonymous"'


def _page(title: str, head: str, body: str) -> str:
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # An icon that is no request: there may be none at /favicon.ico.
        f'<link rel="icon" href="data:,">\n<title>{escape(title)}</title>\n{head}\n</head>\n<body>\n{body}\n</body>\n'
        "</html>\n"
    )


def _json(value: Any) -> str:
    """JSON that cannot end the script in which it stands."""
    text = json.dumps(jsonable_encoder(value))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# --- routes -----------------------------------------------------------------------------------------------------------

_OF_FASTAPI = "FastAPI.setup.<locals>."

Policies = Mapping[str, Callable[[Request, Response], Awaitable[None]]]
"""By the name that FastAPI gives a page, what has the policy of its answer enforced."""


def install(
    app: Any,
    settings: DocsPagesSettings | None = None,
    *,
    nonce: Callable[[Request], str] = lambda _request: "",
    policies: Policies | None = None,
) -> None:
    """Puts these pages in the place of FastAPI's own; a second call finds nothing to replace.

    Args:
        app: A FastAPI application; of any other nothing is replaced.
        settings: Where the files come from.
        nonce: Gives the nonce of an answer, which its policy names.
        policies: What has the policy of a page enforced; of ``swagger_ui_html``, ``redoc_html`` and
            ``swagger_ui_redirect``.

    Raises:
        ConfigurationError: The files are to come from the application, and the extra is not installed.
    """
    where = assets_folder(settings or DocsPagesSettings())
    for router in list(_routers(app.router)):
        for index, route in enumerate(router.routes):
            name = _name(route)
            if name:
                page = _Page(route, name, where, nonce, (policies or {}).get(name))
                router.routes[index] = Route(route.path, page.answer, name=route.name, include_in_schema=False)
                # FastAPI remembers what an included router had.
                getattr(router, "_mark_routes_changed", lambda: None)()


def assets_folder(settings: DocsPagesSettings) -> Path | None:
    """Where the files are that the application serves; ``None`` where they come from the network.

    Raises:
        ConfigurationError: They are to come from the application, and the extra is not installed.
    """
    where = None if settings.assets == "cdn" else folder()
    if where is None and settings.assets == "self-hosted":
        raise ConfigurationError(
            "docs_pages.assets is 'self-hosted', and the files are not installed: pip install 'fastapi-hardening[docs]'"
        )
    return where


def _routers(router: Any) -> Iterator[Any]:
    """A router and those that are included in it."""
    yield router
    for route in router.routes:
        included = getattr(route, "original_router", None)
        if included is not None:
            yield from _routers(included)


def _name(route: Any) -> str:
    """Which page of FastAPI's own a route serves; empty if none."""
    endpoint = getattr(route, "endpoint", None)
    name = getattr(endpoint, "__qualname__", "")
    if getattr(endpoint, "__module__", None) != FastAPI.__module__ or not name.startswith(_OF_FASTAPI):
        return ""
    name = name.removeprefix(_OF_FASTAPI)
    made_by = _MADE_BY.get(name)
    # Applications put a function of their own in its place, to fetch the files from elsewhere.
    return name if made_by and getattr(applications, made_by) is getattr(docs, made_by) else ""


_MADE_BY = {
    "swagger_ui_html": "get_swagger_ui_html",
    "redoc_html": "get_redoc_html",
    "swagger_ui_redirect": "get_swagger_ui_oauth2_redirect_html",
}
_ASSETS_OF = {"swagger_ui_html": (SWAGGER_SCRIPT, SWAGGER_STYLE), "redoc_html": (REDOC_SCRIPT,)}


class _Page:
    """What answers on the route of a page: the page, and its files, so that they need no routes of their own."""

    def __init__(
        self,
        route: Any,
        name: str,
        where: Path | None,
        nonce: Callable[[Request], str],
        enforce: Callable[[Request, Response], Awaitable[None]] | None,
    ) -> None:
        # Which application is documented, an included router does not say.
        self._app: FastAPI | None = inspect.getclosurevars(route.endpoint).nonlocals.get("self")
        self._name = name
        self._where = where
        self._files = {} if where is None else {asset.name: asset for asset in _ASSETS_OF.get(name, ())}
        self._html = Html(None if where is None else importlib.metadata.version(_PACKAGE))
        self._nonce = nonce
        self._enforce = enforce

    async def answer(self, request: Request) -> Response:
        asset = self._files.get(request.query_params.get("asset", "")) if self._files else None
        if asset is not None and self._where is not None:
            body = await asyncio.to_thread(content, asset, self._where)
            # Its address has the version of the files.
            cached = {"Cache-Control": "public, max-age=31536000, immutable"}
            return Response(body, headers=cached, media_type=asset.media_type)
        nonce, root_path = self._nonce(request), request.scope.get("root_path", "").rstrip("/")
        if self._app is None:
            html = self._html.oauth2_redirect(nonce)
        elif self._name == "redoc_html":
            html = self._html.redoc(self._app, root_path, nonce)
        else:
            html = self._html.swagger_ui(self._app, root_path, nonce)
        response = HTMLResponse(html)
        if self._enforce is not None:
            await self._enforce(request, response)
        return response
