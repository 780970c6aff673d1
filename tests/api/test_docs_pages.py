"""The documentation pages: FastAPI's own are replaced wherever they are, and nothing else is."""

import importlib.util
import json
import re
from base64 import b64encode
from hashlib import sha384
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.responses import HTMLResponse
from starlette.applications import Starlette
from starlette.testclient import TestClient

from fastapi_hardening import ConfigurationError, SecurityHeaders, Settings, harden
from fastapi_hardening.api import docs_pages
from fastapi_hardening.api.docs_pages import ASSETS, DocsPagesSettings, Html, content, folder, install, policy

PAGES = ["/docs", "/redoc", "/docs/oauth2-redirect"]
NONCE = re.compile(r"'nonce-([\w-]{22})'")


def files() -> Path:
    where = folder()
    assert where is not None
    return where


def hardened(app: FastAPI | None = None, **settings: Any) -> TestClient:
    app = app or FastAPI()
    harden(app, Settings(_env_file=None, **settings))
    return TestClient(app)


# --- engine -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asset", ASSETS, ids=lambda asset: asset.name)
def test_files_of_the_network_are_those_of_the_extra(asset: docs_pages.Asset) -> None:
    """Byte by byte: so the tests in a browser try what a browser would fetch. Who moves a version moves both."""
    digest = sha384((files() / asset.name).read_bytes()).digest()
    assert asset.integrity == "sha384-" + b64encode(digest).decode()
    assert re.search(r"@\d+\.\d+\.\d+/", asset.url)


def test_what_the_application_serves_fetches_nothing_from_elsewhere() -> None:
    """ReDoc asks its maker for a logo on every page, unless it is kept from it."""
    script = content(docs_pages.REDOC_SCRIPT, files())
    assert b"https://cdn.redoc.ly" not in script
    assert len(script) > 1_000_000


def test_policy_lets_nothing_in_but_what_carries_the_nonce() -> None:
    """No 'unsafe-inline', no host that serves other scripts as well, no other origin to send data to."""
    text = policy(DocsPagesSettings(assets="self-hosted"))
    assert "script-src 'nonce-{nonce}';" in text
    assert "connect-src 'self';" in text
    assert "unsafe" not in text
    assert "https:" not in text
    text = policy(DocsPagesSettings(assets="cdn", connect_src=("'self'", "https://api.example"), img_src=("https:",)))
    assert "connect-src 'self' https://api.example;" in text
    assert "img-src https: https://cdn.redoc.ly;" in text
    assert "jsdelivr" not in text


@pytest.mark.parametrize("sources", ["a b", "https://a;script-src *", "a\nb", ""])
def test_a_source_that_would_end_its_directive_is_refused(sources: str) -> None:
    """When the settings are made."""
    with pytest.raises(ValueError, match="is not a source"):
        DocsPagesSettings(connect_src=(sources,))


def test_sources_can_be_written_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the quotes that a policy has."""
    monkeypatch.setenv("HARDENING_DOCS_PAGES__CONNECT_SRC", "'self',https://login.example")
    assert Settings(_env_file=None).docs_pages.connect_src == ("'self'", "https://login.example")


def test_nothing_of_the_application_can_become_markup() -> None:
    """Neither its title, nor its parameters, nor the path that a proxy tells."""
    evil = "</script><script>alert(1)</script>'\""
    app = FastAPI(title=evil, swagger_ui_parameters={"x": evil}, swagger_ui_init_oauth={"clientId": evil})
    for page in (Html("1").swagger_ui(app, evil, "n"), Html("1").redoc(app, evil, "n")):
        assert "alert(1)</script>" not in page
        assert (
            page.count("<script")
            == page.count("</script>")
            == page.count('nonce="n"></script>') + page.count('<script nonce="n">')
        )


def test_page_has_the_parameters_of_the_application() -> None:
    """As FastAPI's own page has them."""
    app = FastAPI(swagger_ui_parameters={"deepLinking": False}, swagger_ui_init_oauth={"clientId": "docs"})
    page = Html(None).swagger_ui(app, "/proxy", "n")
    [options] = re.findall(r"const options = (\{.*\});", page)
    told = json.loads(options)
    assert told["url"] == "/proxy/openapi.json"
    assert told["oauth2RedirectUrl"] == "/proxy/docs/oauth2-redirect"
    assert (told["deepLinking"], told["layout"]) == (False, "BaseLayout")
    assert 'ui.initOAuth({"clientId": "docs"});' in page
    bare = Html(None).swagger_ui(FastAPI(swagger_ui_oauth2_redirect_url=None), "", "n")
    assert "auth2" not in bare
    assert "initOAuth" not in bare


# --- pages ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_every_script_carries_the_nonce_of_the_policy(page: str) -> None:
    """A new one with each answer, which is therefore not to be cached; nothing only reports."""
    client = hardened()
    first, second = client.get(page), client.get(page)
    for answer in (first, second):
        nonces = set(NONCE.findall(answer.headers["content-security-policy"]))
        assert len(nonces) == 1
        scripts = re.findall(r"<script[^>]*>", answer.text)
        assert scripts
        assert all(f'nonce="{nonce}"' in script for script in scripts for nonce in nonces)
        assert answer.headers["cache-control"] == "no-store"
        assert "content-security-policy-report-only" not in answer.headers
    assert first.text != second.text
    assert client.head(page).status_code == 200


def test_a_sign_in_may_open_a_window_and_come_back() -> None:
    """Only where it has to: the page that opens it, and the one to which it comes back."""
    client = hardened()
    name = "cross-origin-opener-policy"
    assert client.get("/docs").headers[name] == "same-origin-allow-popups"
    assert name not in client.get("/docs/oauth2-redirect").headers
    assert client.get("/redoc").headers[name] == "same-origin"


@pytest.mark.parametrize(
    ("page", "asset", "media_type"),
    [
        ("/docs", "swagger-ui-bundle.js", "text/javascript; charset=utf-8"),
        ("/docs", "swagger-ui.css", "text/css; charset=utf-8"),
        ("/redoc", "redoc.standalone.js", "text/javascript; charset=utf-8"),
    ],
)
def test_files_come_by_the_route_of_their_page(page: str, asset: str, media_type: str) -> None:
    """To be kept for ever, because their address has their version."""
    client = hardened()
    [address] = re.findall(rf'"(\?asset={re.escape(asset)}&amp;v=[\d.]+)"', client.get(page).text)
    answer = client.get(page + address.replace("&amp;", "&"))
    assert answer.status_code == 200
    assert answer.headers["content-type"] == media_type
    assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert len(answer.content) > 100_000


@pytest.mark.parametrize("asset", ["nope.js", "../__init__.py", "redoc.standalone.js", "favicon.png"])
def test_no_other_file_can_be_asked_for(asset: str) -> None:
    """The page itself is the answer."""
    answer = hardened().get("/docs", params={"asset": asset})
    assert answer.headers["content-type"] == "text/html; charset=utf-8"


def test_without_the_extra_files_come_from_the_network_and_are_verified() -> None:
    """In one version each; the application serves none."""
    client = hardened(docs_pages={"assets": "cdn"})
    for page in ("/docs", "/redoc"):
        text = client.get(page).text
        sources = re.findall(
            r'(?:src|href)="(https://[^"]+)" integrity="sha384-[^"]{64}" crossorigin="anonymous"', text
        )
        assert len(sources) == text.count("https://") > 0
    assert client.get("/docs?asset=swagger-ui.css").headers["content-type"] == "text/html; charset=utf-8"


def test_self_hosted_files_need_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever demands them is told what to install; by default the network is what is left."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "cdn.jsdelivr.net" in hardened().get("/docs").text
    with pytest.raises(ConfigurationError, match=r"pip install 'fastapi-hardening\[docs\]'"):
        hardened(docs_pages={"assets": "self-hosted"})


# --- where ------------------------------------------------------------------------------------------------------------


def strict(answer: Any) -> bool:
    """Whether an answer is one of these pages."""
    return answer.status_code == 200 and "script-src 'nonce-" in answer.headers["content-security-policy"]


def test_addresses_are_those_of_the_application() -> None:
    """Moved ones are moved, and those that are off stay off."""
    client = hardened(FastAPI(docs_url="/", redoc_url="/a/b/", swagger_ui_oauth2_redirect_url="/back"))
    assert all(strict(client.get(path)) for path in ("/", "/a/b/", "/back"))
    off = hardened(FastAPI(docs_url=None, redoc_url=None))
    assert [off.get(page).status_code for page in PAGES] == [404] * 3
    assert hardened(FastAPI(openapi_url=None)).get("/docs").status_code == 404


def test_pages_of_mounted_and_included_applications_are_replaced_too() -> None:
    """Each documents its own application, also when it was mounted after the first request."""
    app, child, late, included = FastAPI(), FastAPI(title="Child"), FastAPI(title="Late"), FastAPI(title="Included")
    child.mount("/deep", FastAPI(title="Deep"))
    app.mount("/child", child)
    app.mount("/starlette", Starlette())
    app.include_router(included.router, prefix="/included")
    client = hardened(app)
    for path, title in (("/child", "Child"), ("/child/deep", "Deep"), ("/included", "Included")):
        assert strict(client.get(f"{path}/docs"))
        assert f"<title>{title} - Swagger UI</title>" in client.get(f"{path}/docs").text
    assert '"url": "/child/openapi.json"' in client.get("/child/docs").text
    app.mount("/late", late)
    assert strict(client.get("/late/docs"))


def test_a_page_of_your_own_is_left_alone() -> None:
    """It has the policy of any other page."""
    app = FastAPI(docs_url=None)
    app.add_api_route("/docs", lambda: HTMLResponse("<p>mine</p>"))
    answer = hardened(app).get("/docs")
    assert answer.text == "<p>mine</p>"
    assert "content-security-policy-report-only" in answer.headers


def test_a_page_that_is_made_by_a_function_of_yours_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A known way to fetch the files from elsewhere is to put another function in the place of FastAPI's."""
    monkeypatch.setattr("fastapi.applications.get_swagger_ui_html", lambda **_parameters: HTMLResponse("mine"))
    client = hardened()
    assert client.get("/docs").text == "mine"
    assert strict(client.get("/redoc"))


def test_names_and_order_of_the_routes_stay() -> None:
    """What links to a page by its name finds it, and no request has more routes to be matched with."""
    app, bare = FastAPI(), FastAPI()
    hardened(app).get("/docs")
    assert [(route.name, route.path) for route in app.routes] == [(route.name, route.path) for route in bare.routes]  # type: ignore[attr-defined]
    assert [type(route) for route in app.router.routes] == [type(route) for route in bare.router.routes]
    assert app.url_path_for("swagger_ui_html") == "/docs"
    assert list(app.openapi()["paths"]) == []


def test_switched_off_fastapis_pages_are_as_they_were() -> None:
    """With the policy of any other page."""
    answer = hardened(docs_pages={"enabled": False}).get("/docs")
    assert "https://cdn.jsdelivr.net/npm/swagger-ui-dist@5/" in answer.text
    assert "script-src" not in answer.headers["content-security-policy"]


def test_what_the_application_says_of_other_fields_holds_on_the_pages() -> None:
    """Their policy is their own."""
    app = FastAPI(dependencies=[SecurityHeaders(referrer_policy="no-referrer", content_security_policy="img-src *")])
    answer = hardened(app).get("/docs")
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert strict(answer)


def test_without_the_layer_of_header_fields_the_pages_bring_their_policy() -> None:
    """It is part of the page."""
    answer = hardened(security_headers={"enabled": False}).get("/docs")
    assert strict(answer)
    assert "x-frame-options" not in answer.headers
    nonce = NONCE.findall(answer.headers["content-security-policy"])[0]
    assert f'<script nonce="{nonce}">' in answer.text


def test_it_works_alone() -> None:
    """Then without a policy; a second call changes nothing."""
    app = FastAPI()
    install(app)
    install(app)
    answer = TestClient(app).get("/docs")
    assert "?asset=swagger-ui.css" in answer.text
    assert "content-security-policy" not in answer.headers
