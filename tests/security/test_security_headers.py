"""The header fields: what is sent on which answer, who wins, and what cannot be configured."""

import re
from typing import Any

import pytest
from fastapi import APIRouter, Depends, FastAPI, Request, WebSocket
from fastapi.responses import HTMLResponse, PlainTextResponse, Response
from fastapi.templating import Jinja2Templates
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import DictLoader, Environment
from starlette.applications import Starlette
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient

from fastapi_hardening import CspNonce, SecurityHeaders, csp_nonce_context
from fastapi_hardening.security.security_headers import (
    STRICT_CSP,
    HeaderPolicy,
    SecurityHeadersMiddleware,
    SecurityHeadersSettings,
)

HTML = [(b"content-type", b"text/html; charset=utf-8")]
JSON = [(b"content-type", b"application/json")]


def handshake(websocket: Any) -> list[tuple[bytes, bytes]]:
    """The fields of the answer that accepted a websocket."""
    fields: list[tuple[bytes, bytes]] = websocket.extra_headers
    return fields


def applied(headers: list[tuple[bytes, bytes]], *, tls: bool = False, **changes: Any) -> dict[str, str]:
    """The fields of an answer, by name; each may stand there once."""
    answer = HeaderPolicy(SecurityHeadersSettings(**changes)).apply(headers, tls=tls)
    names = [name for name, _ in answer]
    assert len(names) == len(set(names))
    return {name.decode(): value.decode() for name, value in answer}


# --- engine -----------------------------------------------------------------------------------------------------------


def test_every_answer_gets_the_owasp_list_but_for_what_hurts_everywhere() -> None:
    """No Cross-Origin-Embedder-Policy, no Cache-Control, no Clear-Site-Data."""
    fields = applied(JSON, tls=True)
    assert set(fields) == {
        "content-type",
        "strict-transport-security",
        "x-frame-options",
        "x-content-type-options",
        "referrer-policy",
        "permissions-policy",
        "cross-origin-opener-policy",
        "cross-origin-resource-policy",
        "x-dns-prefetch-control",
        "x-permitted-cross-domain-policies",
        "content-security-policy",
    }
    assert fields["strict-transport-security"] == "max-age=63072000; includeSubDomains"
    assert fields["referrer-policy"] == "strict-origin-when-cross-origin"


@pytest.mark.parametrize("content_type", ["text/html", "TEXT/HTML; charset=utf-8", "application/xhtml+xml"])
def test_html_gets_a_policy_that_breaks_no_page_and_a_strict_one_that_reports(content_type: str) -> None:
    """Both at once."""
    fields = applied([(b"content-type", content_type.encode())])
    assert fields["content-security-policy"].startswith("frame-ancestors 'none'")
    assert fields["content-security-policy-report-only"].startswith("default-src 'self'; script-src 'self';")


@pytest.mark.parametrize("headers", [JSON, [], [(b"content-type", b"text/plain")], [(b"content-type", b"text/htm")]])
def test_what_is_not_html_gets_the_strictest_policy(headers: list[tuple[bytes, bytes]]) -> None:
    """Also what does not say what it is."""
    fields = applied(headers)
    assert fields["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
    assert "content-security-policy-report-only" not in fields


def test_what_browsers_ignore_in_a_report_is_not_in_it() -> None:
    """They would say so on the console of every page."""
    fields = applied(HTML, content_security_policy=STRICT_CSP)
    assert "upgrade-insecure-requests" in fields["content-security-policy"]
    assert "upgrade-insecure-requests" not in fields["content-security-policy-report-only"]


def test_hsts_is_for_tls_only() -> None:
    """RFC 6797, section 7.2."""
    assert "strict-transport-security" not in applied(JSON)


def test_a_field_of_the_application_stays_unless_the_settings_say_otherwise() -> None:
    """In whatever case a bare ASGI application writes it."""
    sent = [(b"X-Frame-Options", b"SAMEORIGIN")]
    assert applied(sent)["X-Frame-Options"] == "SAMEORIGIN"
    replaced = applied(sent, on_conflict="replace")
    assert replaced["x-frame-options"] == "DENY"
    assert "X-Frame-Options" not in replaced


def test_fields_that_name_a_product_are_taken_off() -> None:
    """And those alone: several cookies stay several."""
    policy = HeaderPolicy(SecurityHeadersSettings(remove=("X-Powered-By", "server")))
    sent = [(b"set-cookie", b"a=1"), (b"x-powered-by", b"PHP"), (b"set-cookie", b"b=2"), (b"Server", b"x")]
    assert policy.apply(sent, tls=False)[:2] == [(b"set-cookie", b"a=1"), (b"set-cookie", b"b=2")]
    assert b"PHP" not in dict(policy.apply(sent, tls=False)).values()


def test_a_field_set_to_none_is_left_out() -> None:
    """Or to an empty text, as an environment variable says it."""
    assert "x-frame-options" not in applied(JSON, x_frame_options=None)
    assert "permissions-policy" not in applied(JSON, permissions_policy="")


def test_switched_off_nothing_changes() -> None:
    """Neither added nor taken off."""
    sent = [(b"server", b"x")]
    assert HeaderPolicy(SecurityHeadersSettings(enabled=False)).apply(sent, tls=True) == sent


def test_the_nonce_stands_where_the_policy_has_its_place_and_the_answer_is_not_cached() -> None:
    """Without one the place is empty, not a placeholder."""
    policy = HeaderPolicy(SecurityHeadersSettings(content_security_policy=STRICT_CSP, cache_control="max-age=60"))
    plain = dict(policy.apply(HTML, tls=False))
    assert b"script-src 'self'; style-src 'self';" in plain[b"content-security-policy"]
    answer = policy.apply([*HTML, (b"cache-control", b"public")], tls=False, nonce="abc")
    assert b"script-src 'self' 'nonce-abc'; style-src 'self' 'nonce-abc';" in dict(answer)[b"content-security-policy"]
    assert [value for name, value in answer if name == b"cache-control"] == [b"no-store"]


@pytest.mark.parametrize("tls", [True, False])
def test_an_endpoint_is_told_in_both_policies_of_html(tls: bool) -> None:
    """By its name only over TLS: elsewhere browsers would take neither the named endpoint nor the older way."""
    fields = applied(HTML, tls=tls, reporting_endpoint="/reports")
    policies = fields["content-security-policy"], fields["content-security-policy-report-only"]
    assert all(policy.endswith("; report-uri /reports" + "; report-to csp" * tls) for policy in policies)
    assert fields.get("reporting-endpoints") == ('csp="/reports"' if tls else None)
    assert "report" not in "".join(applied(JSON, tls=tls, reporting_endpoint="/reports"))


def test_an_endpoint_without_a_policy_is_not_told() -> None:
    """And a policy that names its own keeps it."""
    silent = {"content_security_policy": None, "content_security_policy_report_only": None}
    assert "reporting-endpoints" not in applied(HTML, tls=True, reporting_endpoint="/reports", **silent)
    policy = "img-src 'self'; report-uri https://their.example"
    fields = applied(HTML, tls=True, reporting_endpoint="/reports", content_security_policy=policy)
    assert fields["content-security-policy"] == policy


@given(
    st.lists(
        st.tuples(
            st.sampled_from([b"server", b"set-cookie", b"x-frame-options", b"cache-control", b"etag", b"X-Powered-By"]),
            st.sampled_from([b"1", b"2"]),
        )
    ),
    st.booleans(),
    st.sampled_from(["keep", "replace"]),
)
def test_no_field_of_the_application_is_lost_but_those_meant(
    sent: list[tuple[bytes, bytes]], tls: bool, on_conflict: str
) -> None:
    """The ``secure`` package's own middleware drops ``Set-Cookie``; this one drops nothing unrelated."""
    settings = SecurityHeadersSettings.model_validate({"on_conflict": on_conflict})
    answer = HeaderPolicy(settings).apply(sent, tls=tls)
    kept = (b"set-cookie", b"etag", b"cache-control")
    assert [pair for pair in answer if pair[0] in kept] == [pair for pair in sent if pair[0] in kept]
    assert not {b"server", b"x-powered-by"} & {name.lower() for name, _ in answer}


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"content_security_policy": "scrpt-src 'self'"},
            "'scrpt-src' is not a CSP directive; did you mean 'script-src'",
        ),
        ({"content_security_policy": "default-src 'self'\r\nx: y; img-src a\x00b"}, "content_security_policy"),
        ({"referrer_policy": "no-refferer"}, "referrer_policy"),
        ({"referrer_policy": "no-referrer\r\nset-cookie: a=1"}, "referrer_policy"),
        ({"clear_site_data": "x\r\nset-cookie: a=1"}, "clear_site_data|Clear-Site-Data"),
        ({"x_frame_options": "ALLOW"}, "DENY"),
        ({"cross_origin_opener_policy": "same-orgin"}, "same-origin-allow-popups"),
        ({"permissions_policy": "camera=()\r\nx: y"}, "permissions_policy"),
        ({"strict_transport_security": "maxage=1"}, "is not like 'max-age="),
        ({"strict_transport_security": "max-age=60; includeSubDomains; preload"}, "at least a year"),
        ({"strict_transport_security": "max-age=63072000; preload"}, "includeSubDomains only"),
        ({"reporting_endpoint": "http://reports.example"}, "nor an https URL"),
        ({"reporting_endpoint": "//reports.example"}, "nor an https URL"),
        ({"reporting_endpoint": "/a; script-src *"}, "neither a path"),
        ({"reporting_endpoint": '/a", evil="/b'}, "neither a path"),
        ({"x_frame_option": "DENY"}, "did you mean 'x_frame_options'"),
    ],
)
def test_a_value_that_cannot_be_sent_is_refused_when_the_settings_are_made(
    changes: dict[str, Any], sentence: str
) -> None:
    """With the key in the message."""
    with pytest.raises(ValueError, match=sentence):
        SecurityHeadersSettings(**changes)
    with pytest.raises(ValueError, match=sentence):
        SecurityHeaders(**changes)


# --- layer ------------------------------------------------------------------------------------------------------------


async def _index() -> dict[str, str]:
    return {}


def fastapi_app(**changes: Any) -> FastAPI:
    app = FastAPI()
    app.add_middleware(SecurityHeadersMiddleware, settings=SecurityHeadersSettings(**changes))
    app.get("/")(_index)
    return app


def test_it_works_alone_on_fastapi() -> None:
    """With settings, and without."""
    assert TestClient(fastapi_app(referrer_policy="no-referrer")).get("/").headers["referrer-policy"] == "no-referrer"
    app = FastAPI()
    app.add_middleware(SecurityHeadersMiddleware)
    assert TestClient(app).get("/nope").headers["x-content-type-options"] == "nosniff"


def test_it_works_alone_on_starlette() -> None:
    """Nothing of FastAPI is needed around it."""

    async def talk(websocket: Any) -> None:
        await websocket.accept()
        await websocket.close()

    app = Starlette(routes=[Route("/", lambda request: PlainTextResponse("ok")), WebSocketRoute("/talk", talk)])
    app.add_middleware(SecurityHeadersMiddleware, settings=SecurityHeadersSettings())
    client = TestClient(app)
    assert client.get("/").headers["x-content-type-options"] == "nosniff"
    with client.websocket_connect("/talk") as websocket:
        assert (b"x-content-type-options", b"nosniff") in handshake(websocket)


def test_over_https_the_answer_has_hsts() -> None:
    """By the scheme of the connection."""
    assert "strict-transport-security" in TestClient(fastapi_app(), base_url="https://test").get("/").headers
    assert "strict-transport-security" not in TestClient(fastapi_app()).get("/").headers


def test_a_lifespan_passes_through() -> None:
    """A layer has nothing to say to it."""
    with TestClient(fastapi_app()) as client:
        assert client.get("/").status_code == 200


# --- override ---------------------------------------------------------------------------------------------------------


def app_with_overrides() -> FastAPI:
    app = fastapi_app()
    router = APIRouter(dependencies=[SecurityHeaders(x_frame_options="SAMEORIGIN", cache_control="no-store")])

    @router.get("/inner", dependencies=[SecurityHeaders(x_frame_options=None)])
    async def inner() -> Response:
        return Response("x", headers={"cache-control": "public", "x-frame-options": "ALLOW-FROM x"})

    @router.websocket("/talk")
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close()

    app.include_router(router, prefix="/r")
    return app


def test_levels_merge_field_by_field_and_the_innermost_wins() -> None:
    """What the router says and the route does not contradict still holds."""
    headers = TestClient(app_with_overrides()).get("/r/inner").headers
    assert headers["cache-control"] == "no-store"
    assert headers["x-content-type-options"] == "nosniff"


def test_a_field_that_an_override_names_replaces_what_the_endpoint_has_set() -> None:
    """FastAPI itself sets Cache-Control on event streams; who writes an override means it."""
    app = fastapi_app()

    @app.get("/page", dependencies=[SecurityHeaders(cache_control="no-store", api_content_security_policy="sandbox")])
    async def page() -> Response:
        return Response("x", headers={"cache-control": "public", "content-security-policy": "img-src *", "etag": "1"})

    headers = TestClient(app).get("/page").headers
    assert (headers["cache-control"], headers["content-security-policy"], headers["etag"]) == (
        "no-store",
        "sandbox",
        "1",
    )


def test_an_override_holds_on_the_405_and_the_handshake_of_its_route() -> None:
    """The layer knows the route before it is reached."""
    client = TestClient(app_with_overrides())
    assert client.post("/r/inner").headers["cache-control"] == "no-store"
    with client.websocket_connect("/r/talk") as websocket:
        assert (b"x-frame-options", b"SAMEORIGIN") in handshake(websocket)


def test_an_override_may_switch_the_layer_off() -> None:
    """For an answer that another program makes."""
    app = fastapi_app()
    app.get("/bare", dependencies=[SecurityHeaders(enabled=False)])(_index)
    assert "x-content-type-options" not in TestClient(app).get("/bare").headers


class Rewrite:
    """A middleware of the application that sends everything to one route."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(dict(scope) | {"path": "/r/inner"}, receive, send)


def test_an_override_holds_where_a_middleware_rewrote_the_path() -> None:
    """The layer learns of it after routing, before anything is sent."""
    app = FastAPI()
    app.get("/")(_index)
    app.router.routes.extend(app_with_overrides().router.routes)
    app.add_middleware(Rewrite)
    app.add_middleware(SecurityHeadersMiddleware)
    assert TestClient(app).get("/").headers["cache-control"] == "no-store"


def test_without_the_layer_an_override_sets_what_it_names() -> None:
    """On an application that was never hardened, on answers that FastAPI builds."""
    app = FastAPI()
    app.get("/", dependencies=[SecurityHeaders(cache_control="no-store", strict_transport_security="max-age=1")])(
        _index
    )
    app.get("/page", dependencies=[SecurityHeaders(content_security_policy="img-src 'self'")])(_index)
    headers = TestClient(app).get("/").headers
    assert headers["cache-control"] == "no-store"
    assert TestClient(app).get("/page").headers["content-security-policy"] == "img-src 'self'"
    assert "strict-transport-security" not in headers
    assert "x-content-type-options" not in headers


# --- nonce ------------------------------------------------------------------------------------------------------------


def test_a_page_that_asks_for_a_nonce_gets_its_own_each_time() -> None:
    """The same in the page and in the policy, never twice, and never cached."""
    app = fastapi_app(content_security_policy=STRICT_CSP)

    @app.get("/page")
    async def page(first: CspNonce, second: CspNonce) -> HTMLResponse:
        assert first == second
        return HTMLResponse(first, headers={"cache-control": "public, max-age=60"})

    client = TestClient(app)
    answers = [client.get("/page") for _ in range(3)]
    assert len({answer.text for answer in answers}) == 3
    for answer in answers:
        assert f"'nonce-{answer.text}'" in answer.headers["content-security-policy"]
        assert answer.headers["cache-control"] == "no-store"


def test_a_template_calls_for_the_nonce() -> None:
    """It is made at the first call, so a page that does not call for it can be cached."""
    pages = {
        "with.html": "<script nonce='{{ csp_nonce() }}'></script><style nonce='{{ csp_nonce() }}'></style>",
        "without.html": "<p>Hello</p>",
    }
    templates = Jinja2Templates(
        env=Environment(loader=DictLoader(pages), autoescape=True), context_processors=[csp_nonce_context]
    )
    app = fastapi_app(content_security_policy=STRICT_CSP)

    @app.get("/{name}")
    async def page(request: Request, name: str) -> HTMLResponse:
        return templates.TemplateResponse(request, name)

    client = TestClient(app)
    answers = [client.get("/with.html") for _ in range(2)]
    assert answers[0].text != answers[1].text
    for answer in answers:
        first, second = re.findall("nonce='([^']*)'", answer.text)
        assert first == second
        assert f"script-src 'self' 'nonce-{first}'" in answer.headers["content-security-policy"]
        assert answer.headers["cache-control"] == "no-store"
    without = client.get("/without.html").headers
    assert "nonce" not in without["content-security-policy"]
    assert "cache-control" not in without


def test_without_the_layer_an_override_knows_the_nonce() -> None:
    """Where the page has asked for it before."""
    app = FastAPI()
    strictly = SecurityHeaders(content_security_policy="script-src 'nonce-{nonce}'")

    async def ask(nonce: CspNonce) -> str:
        return nonce

    @app.get("/page", dependencies=[Depends(ask), strictly])
    async def page(nonce: CspNonce) -> str:
        return nonce

    @app.get("/plain", dependencies=[strictly])
    async def plain() -> None: ...

    answer = TestClient(app).get("/page")
    assert answer.headers["content-security-policy"] == f"script-src 'nonce-{answer.json()}'"
    assert TestClient(app).get("/plain").headers["content-security-policy"] == "script-src"
