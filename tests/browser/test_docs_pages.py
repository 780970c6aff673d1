"""The documentation pages in Chromium: everything on them works, and the enforced policy has nothing to block."""

import mimetypes
import re
from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI
from fastapi.responses import HTMLResponse
from fastapi.security import OAuth2AuthorizationCodeBearer
from playwright.sync_api import Page, Route, expect

from fastapi_hardening import Settings, harden
from fastapi_hardening.api import docs_pages
from tests.browser.conftest import Serve, Tab

ASSETS = ["self-hosted", "cdn"]
NETWORK = re.compile(r"^https://")


def items(**settings: Any) -> FastAPI:
    """A hardened application with two operations, and one mounted under it."""
    app, child = FastAPI(title="Items <b>&"), FastAPI(title="Child")

    @app.get("/items/{item_id}", tags=["items"])
    async def read_item(item_id: int) -> dict[str, int]:
        """Reads **one** item."""
        return {"item_id": item_id}

    @app.post("/items", tags=["items"])
    async def add_item(name: str) -> str:
        return name

    @child.get("/toys")
    async def toys() -> list[str]:
        return []

    app.mount("/child", child)
    harden(app, Settings(_env_file=None, **settings))
    return app


def network(page: Page, *, changed: bool = False) -> None:
    """Answers what the page asks of the network, from the files of the extra; perhaps with something added."""
    where = docs_pages.folder()
    assert where is not None

    def answer(route: Route) -> None:
        url = route.request.url
        asset = next((each for each in docs_pages.ASSETS if each.url == url), None)
        if asset is None:
            assert url == "https://cdn.redoc.ly/redoc/logo-mini.svg"
            route.fulfill(body="<svg xmlns='http://www.w3.org/2000/svg'/>", content_type="image/svg+xml")
            return
        body = (where / asset.name).read_bytes() + (b"\n//" if changed else b"")
        kind = mimetypes.guess_type(asset.name)[0]
        route.fulfill(body=body, content_type=kind, headers={"Access-Control-Allow-Origin": "*"})

    page.context.route(NETWORK, answer)


@pytest.mark.parametrize("assets", ASSETS)
@pytest.mark.parametrize("path", ["", "/child"])
def test_swagger_ui_shows_the_operations(serve: Serve, tab: Tab, assets: str, path: str) -> None:
    """With not one complaint in the console, of a mounted application as well."""
    network(tab.page)
    tab.page.goto(serve(items(docs_pages={"assets": assets})) + path + "/docs")
    expect(tab.page.locator(".opblock")).to_have_count(1 if path else 2)
    tab.picture(f"swagger-ui-{assets}{path.replace('/', '-')}")
    assert tab.complaints == []
    foreign = [url for url in tab.requested if NETWORK.match(url)]
    assert bool(foreign) == (assets == "cdn")


def test_swagger_ui_tries_an_operation_out(serve: Serve, tab: Tab) -> None:
    """The request is sent, and its answer shown."""
    tab.page.goto(serve(items()) + "/docs")
    block = tab.page.locator(".opblock-get")
    block.locator(".opblock-summary-control").click()
    block.get_by_role("button", name="Try it out").click()
    block.get_by_placeholder("item_id").fill("7")
    block.get_by_role("button", name="Execute").click()
    expect(block.locator(".live-responses-table .response-col_status").last).to_contain_text("200")
    expect(block.locator(".live-responses-table")).to_contain_text('"item_id": 7')
    tab.picture("swagger-ui-tried-out")
    assert tab.complaints == []


@pytest.mark.parametrize("assets", ASSETS)
@pytest.mark.parametrize("path", ["", "/child"])
def test_redoc_shows_the_operations(serve: Serve, tab: Tab, assets: str, path: str) -> None:
    """With its styles, and not one complaint in the console."""
    network(tab.page)
    tab.page.goto(serve(items(docs_pages={"assets": assets})) + path + "/redoc")
    expect(tab.page.get_by_role("heading", name="Toys" if path else "Read Item")).to_be_visible()
    assert tab.page.locator(".menu-content").evaluate("menu => getComputedStyle(menu).position") == "sticky"
    tab.picture(f"redoc-{assets}{path.replace('/', '-')}")
    assert tab.complaints == []
    assert any(NETWORK.match(url) for url in tab.requested) == (assets == "cdn")


def test_redoc_searches(serve: Serve, tab: Tab) -> None:
    """Its search runs in a worker that it makes from a blob."""
    tab.page.goto(serve(items()) + "/redoc")
    tab.page.get_by_placeholder("Search...").fill("add item")
    expect(tab.page.locator("[data-role='search:results'] [role=menuitem]").first).to_contain_text("Add Item")
    assert tab.complaints == []


def test_script_that_was_changed_on_the_network_does_not_run(serve: Serve, tab: Tab) -> None:
    """By a single byte, even; the page stays empty."""
    network(tab.page, changed=True)
    tab.page.goto(serve(items(docs_pages={"assets": "cdn"})) + "/docs")
    expect(tab.page.locator("#swagger-ui")).to_be_attached()
    assert any("integrity" in complaint for complaint in tab.complaints)
    assert tab.page.evaluate("typeof SwaggerUIBundle") == "undefined"


def test_sign_in_comes_back_to_the_page(serve: Serve, tab: Tab) -> None:
    """Its window goes to another origin and comes back; the page keeps hold of it all the while."""
    provider = FastAPI()

    @provider.get("/authorize", response_class=HTMLResponse)
    async def authorize(redirect_uri: str, state: str) -> str:
        return f"<script>location = '{redirect_uri}?code=c&state=' + encodeURIComponent('{state}')</script>"

    @provider.post("/token")
    async def token() -> dict[str, str]:
        return {"access_token": "t", "token_type": "bearer"}

    app = FastAPI()
    address = serve(provider)
    bearer = OAuth2AuthorizationCodeBearer(f"{address}/authorize", "/token")

    @app.get("/me")
    async def me(token: Annotated[str, Depends(bearer)]) -> str:
        return token

    app.add_api_route("/token", token, methods=["POST"], include_in_schema=False)
    harden(app, Settings(_env_file=None))
    tab.page.goto(serve(app) + "/docs")
    tab.page.get_by_role("button", name="Authorize").click()
    dialog = tab.page.locator(".modal-ux")
    dialog.locator("#client_id_authorizationCode").fill("docs")
    with tab.page.expect_popup() as opened:
        dialog.locator(".modal-btn.authorize").click()
    expect(dialog.locator(".modal-btn", has_text="Logout")).to_be_visible()
    assert opened.value.is_closed()
    assert tab.complaints == []
