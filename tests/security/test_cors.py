"""CORS: whose pages may read answers, what a preflight is told, and what cannot be configured."""

import logging
from typing import Any

import pytest
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Response, WebSocket
from fastapi.responses import JSONResponse, PlainTextResponse
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Mount, Route
from starlette.testclient import TestClient

from fastapi_hardening.core.configuration import ConfigurationError
from fastapi_hardening.core.origins import Preflight, checked_origin, origin_of
from fastapi_hardening.security.cors import (
    Cors,
    CorsMiddleware,
    CorsPolicy,
    CorsSettings,
    take_over,
)

SHOP = "https://shop.example"
EVIL = "https://evil.example"
PARTNER = "https://partner.example"
VARY = "Origin, Access-Control-Request-Method, Access-Control-Request-Headers, Access-Control-Request-Private-Network"


def policy(**settings: Any) -> CorsPolicy:
    return CorsPolicy(CorsSettings(**settings))


def applied(policy: CorsPolicy, origin: str | None, sent: list[tuple[bytes, bytes]] | None = None) -> dict[str, str]:
    """The fields of an answer, by name; each may stand there once."""
    headers = list(sent or [])
    policy.apply(headers, None if origin is None else origin.encode("latin-1"))
    names = [name.lower() for name, _ in headers]
    assert len(names) == len(set(names))
    return {name.decode().lower(): value.decode() for name, value in headers}


# --- engine: who ------------------------------------------------------------------------------------------------------


def test_a_page_of_an_allowed_origin_may_read_the_answer() -> None:
    """And the fields that our layers set."""
    assert applied(policy(allow_origins=(SHOP,)), SHOP) == {
        "vary": "Origin",
        "access-control-allow-origin": SHOP,
        "access-control-expose-headers": "X-Request-ID, Retry-After, RateLimit, RateLimit-Policy",
    }


@pytest.mark.parametrize("origin", [EVIL, "null", "", None])
def test_other_origins_and_none_get_vary_alone(origin: str | None) -> None:
    """Or a cache would hand the answer for one origin to another."""
    assert applied(policy(allow_origins=(SHOP,), allow_credentials=True), origin) == {"vary": "Origin"}


def test_everybody_is_the_same_answer_always() -> None:
    """Sent also without an origin, so that a cache needs no Vary (the Fetch standard, section 3.3.5)."""
    everybody = policy(allow_origins="*", expose_headers=())
    for origin in (None, SHOP, "null"):
        assert applied(everybody, origin) == {"access-control-allow-origin": "*"}


TRICKS = [
    "https://shop.example.evil.example",
    "https://shop.exampleevil.example",
    "https://evilshop.example",
    "https://shopxexample",
    "https://shop.example:8443",
    "https://shop.example:443",
    "https://shop.example.",
    "https://shop.example/",
    "https://shop.example?",
    "https://shop.example#",
    "https://shop.example%23",
    "https://shop.example, *",
    "https://shop.example https://evil.example",
    "https://shop.example\x00",
    "https://shop.example\n",
    " https://shop.example",
    "https://user@shop.example",
    "https://evil.example/https://shop.example",
    "https://evil.example?.shop.example",
    "https://evil.example#.shop.example",
    "https://evil.example\\.shop.example",
    "https://evil.example:80.shop.example",
    "https://evil_.shop.example.evil.example",
    "https://sh\u00f6p.example",
    "http://shop.example",
    "HTTPS://shop.example",
    "https://SHOP.example",
    "https:shop.example",
    "https:/shop.example",
    "//shop.example",
    "shop.example",
    "null",
    "*",
    "",
]


@pytest.mark.parametrize("origin", TRICKS)
@pytest.mark.parametrize(
    "settings",
    [
        {"allow_origins": (SHOP,)},
        {"allow_origins": (SHOP, "https://*.shop.example"), "allow_credentials": True},
        {"allow_origin_regex": r"https://(.+\.)?shop\.example"},
        {"allow_origin_regex": r"^https://shop\.example$"},
        {"allow_origin_regex": r"https://shop\.example|https://other\.example"},
    ],
)
def test_no_trick_passes_for_an_allowed_origin(settings: dict[str, Any], origin: str) -> None:
    """Neither on an answer nor in a preflight."""
    judge = policy(**settings)
    assert applied(judge, origin) == {"vary": "Origin"}
    assert judge.refused(Preflight(origin.encode("latin-1"), b"GET")) == ["origin"]
    assert judge.allows(SHOP.encode())


@pytest.mark.parametrize(
    ("allowed", "origin", "passes"),
    [
        ("https://*.shop.example", "https://www.shop.example", True),
        ("https://*.shop.example", "https://a.b.shop.example", True),
        ("https://*.shop.example", "https://xn--bcher-kva.shop.example", True),
        ("https://*.shop.example", "https://shop.example", False),
        ("https://*.shop.example", "https://.shop.example", False),
        ("https://*.shop.example", "https://a..shop.example", False),
        ("https://*.shop.example", "https://www.shop.example:8443", False),
        ("https://*.shop.example", "http://www.shop.example", False),
        ("https://*.shop.example", "https://www.shop.example.evil.example", False),
        ("https://*.shop.example", "https://" + 80 * "long." + "shop.example", False),
        ("https://*.shop.example:8443", "https://www.shop.example:8443", True),
        ("https://*.shop.example:8443", "https://www.shop.example", False),
        ("http://*.localhost:3000", "http://a.localhost:3000", True),
        ("http://[::1]:3000", "http://[::1]:3000", True),
        ("capacitor://localhost", "capacitor://localhost", True),
        ("HTTPS://Shop.Example", SHOP, True),
        ("https://xn--bcher-kva.example", "https://xn--bcher-kva.example", True),
    ],
)
def test_a_wildcard_stands_for_subdomains_of_that_scheme_and_port(allowed: str, origin: str, passes: bool) -> None:
    """Of any depth, and not for the domain itself."""
    judge = policy(allow_origins=(allowed,))
    assert judge.allows(origin.encode()) is passes
    assert ("access-control-allow-origin" in applied(judge, origin)) is passes


def test_a_pattern_must_match_the_whole_origin() -> None:
    """Anchored or not, with alternatives or without."""
    judge = policy(allow_origin_regex=r"http://localhost(:\d+)?|https://[a-z]+\.shop\.example")
    for origin in ("http://localhost", "http://localhost:5173", "https://www.shop.example"):
        assert applied(judge, origin)["access-control-allow-origin"] == origin
    for origin in ("http://localhost:", "http://localhost:3000.evil.example", "https://1.shop.example"):
        assert not judge.allows(origin.encode())


LABEL = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,8}[a-z0-9])?", fullmatch=True)


@given(st.lists(LABEL, min_size=1, max_size=4), st.sampled_from(["http", "https"]), st.integers(0, 70_000))
def test_a_wildcard_admits_exactly_what_ends_like_it(labels: list[str], scheme: str, port: int) -> None:
    """Whatever stands in front."""
    host = ".".join(labels)
    origin = f"{scheme}://{host}.shop.example" + (f":{port}" if port else "")
    judge = policy(allow_origins=("https://*.shop.example",))
    assert judge.allows(origin.encode()) is (scheme == "https" and not port)
    assert not judge.allows(f"https://{host}shop.example.{host}".encode())


@given(st.binary(max_size=60))
def test_no_bytes_that_are_not_the_origin_pass(junk: bytes) -> None:
    """Before it, after it, or alone."""
    judge = policy(allow_origins=(SHOP, "https://*.shop.example"), allow_origin_regex=r"https://[a-z]+\.other\.example")
    for origin in (junk, SHOP.encode() + junk, junk + SHOP.encode()):
        if judge.allows(origin):
            assert origin == SHOP.encode() or origin.endswith((b".shop.example", b".other.example"))
            assert not set(b"/?#@\\ \r\n\0").intersection(origin[8:])


def test_two_origins_are_no_origin() -> None:
    """Whichever of them a proxy would have looked at."""
    assert origin_of([(b"host", b"x"), (b"origin", b"https://shop.example")]) == b"https://shop.example"
    assert origin_of([(b"origin", b"https://shop.example"), (b"origin", b"https://shop.example")]) == b""
    assert origin_of([(b"host", b"x")]) is None


# --- engine: the answer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [b"access-control-allow-origin", b"Access-Control-Allow-Origin"])
@pytest.mark.parametrize("origin", [SHOP, EVIL, None])
def test_who_has_decided_further_in_is_not_contradicted(name: bytes, origin: str | None) -> None:
    """There are never two, and no field of ours beside the other one."""
    sent = [(name, b"https://child.example")]
    assert applied(policy(allow_origins=(SHOP,), allow_credentials=True), origin, sent) == {
        "access-control-allow-origin": "https://child.example"
    }


@pytest.mark.parametrize(
    ("sent", "vary"),
    [
        ([(b"vary", b"Accept-Encoding")], "Accept-Encoding, Origin"),
        ([(b"Vary", b"accept, ORIGIN")], "accept, ORIGIN"),
        ([(b"vary", b"*")], "*"),
        ([(b"vary", b"")], "Origin"),
    ],
)
def test_vary_is_added_to_what_is_there(sent: list[tuple[bytes, bytes]], vary: str) -> None:
    """On one line, once."""
    for origin in (SHOP, EVIL, None):
        assert applied(policy(allow_origins=(SHOP,)), origin, sent)["vary"] == vary


def test_vary_on_several_lines_stays_on_several() -> None:
    """The origin joins the last, unless one has it."""
    headers = [(b"vary", b"Accept"), (b"etag", b"1"), (b"vary", b"Cookie")]
    policy(allow_origins=(SHOP,)).apply(headers, None)
    assert headers == [(b"vary", b"Accept"), (b"etag", b"1"), (b"vary", b"Cookie, Origin")]


def test_credentials_are_named_to_allowed_origins_only() -> None:
    """With the origin itself, never with ``*``."""
    judge = policy(allow_origins=(SHOP,), allow_credentials=True, expose_headers=())
    assert applied(judge, SHOP) == {
        "vary": "Origin",
        "access-control-allow-origin": SHOP,
        "access-control-allow-credentials": "true",
    }


# --- engine: preflight ------------------------------------------------------------------------------------------------


def asked(origin: str = SHOP, method: str = "GET", headers: str = "", *, private_network: bool = False) -> Preflight:
    return Preflight(origin.encode(), method.encode(), headers.encode(), private_network)


def answered(policy: CorsPolicy, question: Preflight) -> dict[str, str]:
    assert policy.refused(question) == []
    answer = [(name.decode(), value.decode()) for name, value in policy.answer(question)]
    assert len(answer) == len(dict(answer))
    return dict(answer)


def test_a_preflight_is_told_what_is_allowed() -> None:
    """Everything at once, so that the browser need not ask again."""
    judge = policy(allow_origins=(SHOP,), allow_methods=("put", "GET"), allow_headers=("Authorization",))
    assert answered(judge, asked(method="PUT", headers="authorization,content-type")) == {
        "access-control-allow-origin": SHOP,
        "vary": VARY,
        "access-control-allow-methods": "GET, PUT",
        "access-control-max-age": "600",
        "access-control-allow-headers": "Accept, Accept-Language, Authorization, Content-Language, Content-Type",
    }


def test_any_header_is_answered_with_those_asked_for() -> None:
    """A literal ``*`` would mean nothing with credentials, and never ``Authorization``."""
    judge = policy(allow_origins=(SHOP,), allow_headers="*", allow_methods="*", allow_credentials=True)
    answer = answered(judge, asked(method="DELETE", headers="X-One , x-two,,"))
    assert answer["access-control-allow-headers"] == "x-one, x-two"
    assert answer["access-control-allow-credentials"] == "true"
    assert "DELETE" in answer["access-control-allow-methods"]
    assert "access-control-allow-headers" not in answered(judge, asked())


def test_everybody_gets_the_asterisk() -> None:
    """Also before the call."""
    assert answered(policy(allow_origins="*"), asked(EVIL))["access-control-allow-origin"] == "*"


@pytest.mark.parametrize(
    ("question", "refused"),
    [
        (asked(EVIL), ["origin"]),
        (asked(method="DELETE"), ["method"]),
        (asked(method="get"), ["method"]),
        (asked(method="GET, POST"), ["method"]),
        (asked(headers="x-token"), ["headers"]),
        (asked(headers="accept, x-token"), ["headers"]),
        (asked(private_network=True), ["private network"]),
        (asked(EVIL, "PUT", "x", private_network=True), ["origin", "method", "headers", "private network"]),
        (asked(headers="content-type, ACCEPT,,"), []),
    ],
)
def test_a_preflight_is_refused_for_each_thing_that_is_not_allowed(question: Preflight, refused: list[str]) -> None:
    """And says which."""
    assert policy(allow_origins=(SHOP,)).refused(question) == refused


@pytest.mark.parametrize("names", ["x\r\nset-cookie: a=1", "x y", "x;y", "\u00e9", "x:y", '"x"'])
def test_what_is_no_field_name_is_never_repeated(names: str) -> None:
    """Not even where any name is allowed."""
    judge = policy(allow_origins=(SHOP,), allow_headers="*")
    assert judge.refused(Preflight(SHOP.encode(), b"GET", names.encode("latin-1"))) == ["headers"]


def test_a_private_network_is_opened_on_request() -> None:
    """Where the settings say so."""
    judge = policy(allow_origins=(SHOP,), allow_private_network=True)
    assert answered(judge, asked(private_network=True))["access-control-allow-private-network"] == "true"
    assert "access-control-allow-private-network" not in answered(judge, asked())


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"allow_origins": "*", "allow_credentials": True}, "show every site what a signed-in user sees"),
        ({"allow_origins": ("*", SHOP)}, "leave out '\\*', or the others"),
        ({"allow_origins": "*", "allow_origin_regex": r"https://a\.example"}, "leave out '\\*', or allow_origin_regex"),
        ({"allow_origins": "null"}, "every sandboxed frame"),
        ({"allow_origins": "NULL"}, "every sandboxed frame"),
        ({"allow_origins": "shop.example"}, "no scheme.*did you mean 'https://shop.example'"),
        ({"allow_origins": "*.shop.example"}, r"no scheme.*did you mean 'https://\*.shop.example'"),
        ({"allow_origins": "localhost:3000"}, "did you mean 'http://localhost:3000'"),
        ({"allow_origins": "//shop.example"}, "has no scheme, as in 'https://example.com'"),
        ({"allow_origins": "https://shop.example/"}, "ends after host and port; did you mean 'https://shop.example'"),
        ({"allow_origins": "https://Shop.example/a?b#c"}, "did you mean 'https://shop.example'"),
        ({"allow_origins": "https://shop.example:443"}, "default port; did you mean 'https://shop.example'"),
        ({"allow_origins": "http://shop.example:80"}, "default port; did you mean 'http://shop.example'"),
        ({"allow_origins": "https://b\u00fccher.example"}, "punycode; did you mean 'https://xn--bcher-kva.example'"),
        ({"allow_origins": "https://" + 64 * "b\u00fc" + ".example"}, "punycode"),
        ({"allow_origins": "https://*shop.example"}, "stands for subdomains only"),
        ({"allow_origins": "https://a.*.example"}, "stands for subdomains only"),
        ({"allow_origins": "http*://shop.example"}, "stands for subdomains only"),
        ({"allow_origins": "https://*"}, "stands for subdomains only"),
        ({"allow_origins": "https://*.com"}, "whole top-level domain"),
        ({"allow_origins": "http://localhost:*"}, r"allow_origin_regex='http://localhost\(:\\d\+\)\?'"),
        ({"allow_origins": "https://user@shop.example"}, "is no origin"),
        ({"allow_origins": "https://shop.example:0"}, "is no origin"),
        ({"allow_origins": "https://"}, "is no origin"),
        ({"allow_origin_regex": "https://shop.example"}, r"did you mean 'https://shop\\\.example'"),
        ({"allow_origin_regex": r"https://[.a]x\.shop.example"}, "dot that is not escaped"),
        ({"allow_origin_regex": r"https://.*shop\.example"}, "only begin or end like yours"),
        ({"allow_origin_regex": r"https://shop\.example.*"}, "only begin or end like yours"),
        ({"allow_origin_regex": r"https://shop\.example(.+)$"}, "only begin or end like yours"),
        ({"allow_origin_regex": ".*"}, "matches everybody's origins"),
        ({"allow_origin_regex": r"https?://[^/]+"}, "matches everybody's origins"),
        ({"allow_origin_regex": "https://(shop"}, "is no regular expression"),
        ({"allow_methods": "GET POST"}, "is not a header name"),
        ({"allow_headers": "X Token"}, "'X Token' is not a header name"),
        ({"expose_headers": ("X-A\r\nx: y",)}, "is not a header name"),
        ({"allow_origins": SHOP, "allow_credentials": True, "expose_headers": "*"}, "list the fields"),
        ({"max_age_seconds": 100_000}, "86400"),
        ({"allow_origin": SHOP}, "did you mean 'allow_origins'"),
    ],
)
def test_what_would_open_too_much_or_nothing_is_refused(settings: dict[str, Any], sentence: str) -> None:
    """With the sentence that mends it; on a route as in the settings."""
    with pytest.raises(ValueError, match=sentence):
        CorsSettings(**settings)
    with pytest.raises(ValueError, match=sentence):
        Cors(**settings)


@pytest.mark.parametrize(
    "pattern",
    [r"https://[a-z.]+\.shop\.example", r"https://(.+\.)?shop\.example(:\d{1,5})?", r"https://.{1,9}\.shop\.example"],
)
def test_a_wildcard_that_is_meant_is_taken(pattern: str) -> None:
    """Where a literal dot keeps it inside the domain."""
    assert CorsSettings(allow_origin_regex=pattern).allow_origin_regex == pattern


def test_what_is_allowed_without_a_word_is_nothing() -> None:
    """No origin, no policy."""
    assert CorsPolicy.of(CorsSettings()) is None
    assert CorsPolicy.of(CorsSettings(allow_origin_regex="")) is None
    assert CorsPolicy.of(CorsSettings(allow_origins=SHOP, enabled=False)) is None  # type: ignore[arg-type]
    assert checked_origin("HTTPS://Shop.Example:8443") == "https://shop.example:8443"


# --- layer ------------------------------------------------------------------------------------------------------------


def shop(**settings: Any) -> FastAPI:
    app = FastAPI()
    app.add_middleware(CorsMiddleware, settings=CorsSettings(**settings))

    @app.get("/")
    async def index() -> str:
        return "ok"

    @app.options("/")
    async def options() -> str:
        return "ordinary"

    return app


def preflight(client: TestClient, path: str, origin: str, method: str = "GET", headers: str | None = None) -> Any:
    fields = {"Origin": origin, "Access-Control-Request-Method": method}
    if headers is not None:
        fields["Access-Control-Request-Headers"] = headers
    return client.options(path, headers=fields)


def test_a_page_may_read_answers_and_ask_before() -> None:
    """On every answer: 404 and 405 too."""
    client = TestClient(shop(allow_origins=(SHOP,)))
    for path, method in (("/", "GET"), ("/none", "GET"), ("/", "DELETE")):
        answer = client.request(method, path, headers={"Origin": SHOP})
        assert (answer.headers["access-control-allow-origin"], answer.headers["vary"]) == (SHOP, "Origin")
    answer = preflight(client, "/", SHOP)
    assert (answer.status_code, answer.content) == (200, b"")
    assert (answer.headers["access-control-allow-origin"], answer.headers["vary"]) == (SHOP, VARY)


def test_a_refused_preflight_is_a_problem_without_the_field() -> None:
    """And repeats nothing of the request."""
    answer = preflight(TestClient(shop(allow_origins=(SHOP,))), "/", EVIL, "DELETE")
    assert answer.status_code == 400
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["vary"] == VARY
    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert answer.json()["detail"] == "Not allowed: origin, method."


def test_a_preflight_on_several_lines_is_one() -> None:
    """A proxy may split a list."""
    client = TestClient(shop(allow_origins=(SHOP,), allow_headers=("X-One", "X-Two")))
    fields = [
        ("Origin", SHOP),
        ("Access-Control-Request-Method", "GET"),
        ("Access-Control-Request-Headers", "x-one"),
        ("Access-Control-Request-Headers", "x-two"),
    ]
    assert client.options("/", headers=fields).status_code == 200
    assert client.options("/", headers=[*fields, ("Access-Control-Request-Headers", "x")]).status_code == 400


def test_the_call_of_another_origin_is_served_all_the_same() -> None:
    """CORS is not access control: the page only cannot read the answer."""
    answer = TestClient(shop(allow_origins=(SHOP,))).get("/", headers={"Origin": EVIL})
    assert (answer.status_code, answer.headers["vary"]) == (200, "Origin")
    assert "access-control-allow-origin" not in answer.headers


def test_options_that_asks_nothing_is_an_ordinary_request() -> None:
    """Without the method that is asked for, or without an origin."""
    client = TestClient(shop(allow_origins=(SHOP,)))
    for fields in ({"Origin": SHOP}, {"Access-Control-Request-Method": "GET"}, {}):
        answer = client.options("/", headers=fields)
        assert answer.json() == "ordinary"
        assert ("access-control-allow-origin" in answer.headers) is (fields == {"Origin": SHOP})


def test_where_no_origin_is_configured_nothing_changes() -> None:
    """No field, and a preflight is the application's."""
    for settings in ({}, {"enabled": False, "allow_origins": (SHOP,)}):
        client = TestClient(shop(**settings))
        answer = client.get("/", headers={"Origin": SHOP})
        assert "vary" not in answer.headers
        assert "access-control-allow-origin" not in answer.headers
        assert preflight(client, "/", SHOP).json() == "ordinary"
    app = FastAPI()
    app.add_middleware(CorsMiddleware)
    assert preflight(TestClient(app), "/", SHOP).status_code == 404


def test_a_refusal_of_a_layer_further_in_can_be_read() -> None:
    """That is why it stands above."""

    class Refuse:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http":
                await PlainTextResponse("slow down", 429, {"Retry-After": "3"})(scope, receive, send)
            else:
                await self.app(scope, receive, send)

    app = shop()
    app.user_middleware.clear()
    app.add_middleware(Refuse)
    app.add_middleware(CorsMiddleware, settings=CorsSettings(allow_origins=(SHOP,)))
    with TestClient(app) as client:
        answer = client.get("/", headers={"Origin": SHOP})
        assert answer.status_code == 429
        assert answer.headers["access-control-allow-origin"] == SHOP
        assert "Retry-After" in answer.headers["access-control-expose-headers"]
        assert preflight(client, "/", SHOP).status_code == 200


def test_a_websocket_is_left_alone() -> None:
    """CORS does not hold for its handshake."""
    app = shop(allow_origins=(SHOP,))

    @app.websocket("/talk", dependencies=[Cors(allow_origins=())])
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close()

    with TestClient(app).websocket_connect("/talk", headers={"Origin": EVIL}) as websocket:
        assert websocket.extra_headers == []


def test_it_works_alone_on_starlette_and_around_anything() -> None:
    """Also where there is no router at all."""
    app = Starlette(routes=[Route("/", lambda request: PlainTextResponse("ok"))])
    app.add_middleware(CorsMiddleware, settings=CorsSettings(allow_origins=(SHOP,)))
    bare = CorsMiddleware(PlainTextResponse("ok"), CorsSettings(allow_origins=(SHOP,)))
    for client in (TestClient(app), TestClient(bare)):
        assert client.get("/", headers={"Origin": SHOP}).headers["access-control-allow-origin"] == SHOP
        assert preflight(client, "/", SHOP).status_code == 200
        assert preflight(client, "/", EVIL).status_code == 400


def test_what_the_endpoint_has_set_stays() -> None:
    """Alone."""
    app = shop(allow_origins=(SHOP,))

    @app.get("/own")
    async def own() -> Response:
        return Response(headers={"Access-Control-Allow-Origin": "*"})

    answer = TestClient(app).get("/own", headers={"Origin": SHOP})
    assert answer.headers.get_list("access-control-allow-origin") == ["*"]


# --- override ---------------------------------------------------------------------------------------------------------


def app_with_overrides() -> FastAPI:
    app = shop(allow_origins=(SHOP,), allow_credentials=True)
    router = APIRouter(prefix="/r", dependencies=[Cors(allow_origins=(PARTNER,), allow_methods=("GET", "PUT"))])

    @router.get("/item")
    async def read() -> str:
        return "read"

    @router.put("/item", dependencies=[Cors(allow_origins=(EVIL,), allow_methods="PUT")])
    async def write() -> str:
        return "written"

    @router.get("/closed", dependencies=[Cors(allow_origins=())])
    async def closed() -> str:
        return "closed"

    app.include_router(router)

    @app.get("/public", dependencies=[Cors(allow_origins="*")])
    async def public() -> str:
        return "public"

    return app


def test_the_innermost_override_holds_alone() -> None:
    """On a route, its router or the application; what it does not name has its default."""
    client = TestClient(app_with_overrides())
    assert client.get("/r/item", headers={"Origin": PARTNER}).headers["access-control-allow-origin"] == PARTNER
    answer = client.get("/r/item", headers={"Origin": SHOP})
    assert "access-control-allow-origin" not in answer.headers
    answer = client.get("/public", headers={"Origin": EVIL})
    assert answer.headers["access-control-allow-origin"] == "*"
    assert "access-control-allow-credentials" not in answer.headers
    assert "access-control-allow-credentials" in client.get("/", headers={"Origin": SHOP}).headers


def test_a_preflight_is_judged_by_the_route_of_the_method_that_it_asks_for() -> None:
    """Two methods on one path may differ."""
    client = TestClient(app_with_overrides())
    assert preflight(client, "/r/item", PARTNER, "GET").status_code == 200
    assert preflight(client, "/r/item", PARTNER, "PUT").status_code == 400
    assert preflight(client, "/r/item", EVIL, "PUT").headers["access-control-allow-origin"] == EVIL
    assert preflight(client, "/r/item", EVIL, "GET").status_code == 400


def test_a_closed_route_is_closed() -> None:
    """Its router, further out, does not open it again."""
    client = TestClient(app_with_overrides())
    answer = client.get("/r/closed", headers={"Origin": PARTNER})
    assert answer.json() == "closed"
    assert "access-control-allow-origin" not in answer.headers
    assert preflight(client, "/r/closed", PARTNER).status_code == 405


def test_an_override_holds_where_the_layer_is_otherwise_idle() -> None:
    """No origin is configured for the application."""
    app = shop()
    app.get("/public", dependencies=[Cors(allow_origins="*")])(lambda: "public")
    client = TestClient(app)
    assert client.get("/public").headers["access-control-allow-origin"] == "*"
    assert preflight(client, "/public", EVIL).status_code == 200
    assert "vary" not in client.get("/").headers


class Rewrite:
    """A middleware of the application that sends everything to one route."""

    def __init__(self, app: Any, path: str) -> None:
        self.app = app
        self.path = path

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(dict(scope) | {"path": self.path}, receive, send)


@pytest.mark.parametrize(("path", "allowed"), [("/r/item", PARTNER), ("/r/closed", None)])
@pytest.mark.parametrize("configured", [(), (SHOP,)])
def test_an_override_holds_where_a_middleware_rewrote_the_path(
    path: str, allowed: str | None, configured: tuple[str, ...]
) -> None:
    """Whether the layer was idle or not."""
    app = app_with_overrides()
    app.user_middleware.clear()
    app.add_middleware(Rewrite, path=path)
    app.add_middleware(CorsMiddleware, settings=CorsSettings(allow_origins=configured))
    client = TestClient(app)
    assert "access-control-allow-origin" not in client.get("/", headers={"Origin": SHOP}).headers
    for origin in (PARTNER, EVIL):
        found = client.get("/", headers={"Origin": origin}).headers.get_list("access-control-allow-origin")
        assert found == ([allowed] if origin == allowed else [])


def test_without_the_layer_an_override_lets_pages_read_simple_answers() -> None:
    """On an application that was never hardened; a preflight needs the layer."""
    app = FastAPI(dependencies=[Cors(allow_origins="*")])
    app.get("/", dependencies=[Cors(allow_origins=(SHOP,))])(lambda: "ok")
    app.get("/closed", dependencies=[Cors(enabled=False)])(lambda: "ok")
    client = TestClient(app)
    answer = client.get("/", headers={"Origin": SHOP})
    assert answer.headers.get_list("access-control-allow-origin") == [SHOP]
    assert answer.headers["vary"] == "Origin"
    assert "access-control-allow-origin" not in client.get("/", headers={"Origin": EVIL}).headers
    assert "access-control-allow-origin" not in client.get("/closed", headers={"Origin": SHOP}).headers


def test_an_override_that_names_nobody_is_a_mistake() -> None:
    """It would close the route, which one says with an empty list."""
    with pytest.raises(ValueError, match="name allow_origins"):
        Cors(allow_methods="PUT")


# --- mounted applications ---------------------------------------------------------------------------------------------


CHILD = "https://child.example"


async def _index() -> dict[str, str]:
    return {}


async def _refused() -> None:
    raise HTTPException(401)


def bare_child() -> FastAPI:
    child = FastAPI()
    child.get("/")(_index)
    child.get("/private", dependencies=[Depends(_refused)])(_index)
    return child


def child_app() -> FastAPI:
    child = bare_child()
    child.add_middleware(CORSMiddleware, allow_origins=[CHILD], allow_methods=["PUT"])
    return child


def child_app_with_ours() -> FastAPI:
    child = bare_child()
    child.add_middleware(CorsMiddleware, settings=CorsSettings(allow_origins=(CHILD,), allow_methods=("PUT",)))
    return child


def wrapped_child() -> Any:
    return CORSMiddleware(bare_child(), allow_origins=[CHILD], allow_methods=["PUT"])


class Pass:
    """A middleware that does nothing."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(scope, receive, send)


class Busy(Pass):
    """A layer between that refuses."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse("busy", 503)(scope, receive, send)


@pytest.mark.parametrize("make", [child_app, wrapped_child, child_app_with_ours])
@pytest.mark.parametrize("configured", [(), (SHOP,)])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("between", [Pass, Busy])
def test_a_mounted_application_answers_for_its_own_paths(
    make: Any, configured: tuple[str, ...], nested: bool, between: Any
) -> None:
    """By its own middleware, before anything refuses; and the application around it for the others."""
    app = shop()
    app.user_middleware.clear()
    app.add_middleware(between)
    app.add_middleware(CorsMiddleware, settings=CorsSettings(allow_origins=configured))
    app.get("/child/before")(_index)
    app.mount("/other", FastAPI())
    app.mount("/child", Starlette(routes=[Mount("/deep", make())]) if nested else make())
    client = TestClient(app)
    path = "/child/deep/" if nested else "/child/"
    for below in (path, path + "private", path + "nothing"):
        answer = client.get(below, headers={"Origin": CHILD})
        assert answer.headers.get_list("access-control-allow-origin") == [CHILD]
        for origin in (SHOP, EVIL):
            assert "access-control-allow-origin" not in client.get(below, headers={"Origin": origin}).headers
        asked = preflight(client, below, CHILD, "PUT")
        assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, CHILD)
        assert preflight(client, below, SHOP, "PUT").status_code == 400
    for beside in ("/", "/other/", "/nothing", *(("/child/before",) if not nested else ())):
        assert "access-control-allow-origin" not in client.get(beside, headers={"Origin": CHILD}).headers
        found = client.get(beside, headers={"Origin": SHOP}).headers.get_list("access-control-allow-origin")
        assert found == list(configured)


def test_an_override_says_nothing_behind_the_middleware_of_a_mounted_application() -> None:
    """That middleware would have the last word on answers, so it has it on preflights too."""
    child = child_app()
    child.get("/partner", dependencies=[Cors(allow_origins=(PARTNER,))])(_index)
    app = shop(allow_origins=(SHOP,))
    app.mount("/child", child)
    client = TestClient(app)
    assert client.get("/child/partner", headers={"Origin": CHILD}).headers["access-control-allow-origin"] == CHILD
    assert "access-control-allow-origin" not in client.get("/child/partner", headers={"Origin": PARTNER}).headers
    assert preflight(client, "/child/partner", PARTNER).status_code == 400


def test_what_is_mounted_later_is_seen() -> None:
    """The routes of an application may change while it serves."""
    app = shop(allow_origins=(SHOP,))
    client = TestClient(app)
    assert client.get("/child/", headers={"Origin": SHOP}).status_code == 404
    app.mount("/child", child_app())
    assert client.get("/child/", headers={"Origin": CHILD}).headers["access-control-allow-origin"] == CHILD
    assert preflight(client, "/child/", SHOP).status_code == 400


# --- take-over --------------------------------------------------------------------------------------------------------


def test_the_middleware_of_the_application_becomes_settings(caplog: pytest.LogCaptureFixture) -> None:
    """All of its arguments, and a notice."""
    app = FastAPI()
    app.add_middleware(Pass)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=[SHOP],
        allow_origin_regex=r"https://.*\.shop\.example",
        allow_methods=["*"],
        allow_headers=["*"],
        allow_credentials=True,
        expose_headers=["X-Total"],
        max_age=100_000,
        allow_private_network=True,
    )
    with caplog.at_level(logging.WARNING):
        taken = take_over(app, CorsSettings())
    assert taken == CorsSettings(
        allow_origins=(SHOP,),
        allow_origin_regex=r"https://.*\.shop\.example",
        allow_methods=("*",),
        allow_headers=("*",),
        allow_credentials=True,
        expose_headers=("X-Total", "X-Request-ID", "Retry-After", "RateLimit", "RateLimit-Policy"),
        max_age_seconds=86_400,
        allow_private_network=True,
    )
    assert "is taken over" in caplog.text
    assert [str(entry.cls) for entry in app.user_middleware] == [str(Pass)]
    assert take_over(app) is None


def test_its_defaults_are_taken_over_too() -> None:
    """``*`` among others, no caching."""
    app = FastAPI()
    app.add_middleware(CORSMiddleware, allow_origins=["*", SHOP], allow_origin_regex=".*", expose_headers=["*"])
    taken = take_over(app)
    assert taken == CorsSettings(allow_origins=("*",), allow_methods=("GET",), expose_headers=("*",))
    other = Starlette()
    other.add_middleware(CORSMiddleware, max_age=-1)
    assert take_over(other) == CorsSettings(allow_methods=("GET",), max_age_seconds=0)


def test_nothing_is_taken_over_where_ours_is_off() -> None:
    """Nor a class derived from it, which has code of its own."""

    class Own(CORSMiddleware):
        pass

    app = FastAPI()
    app.add_middleware(CORSMiddleware, allow_origins=[SHOP])
    assert take_over(app, CorsSettings(enabled=False)) is None
    assert len(app.user_middleware) == 1
    app = FastAPI()
    app.add_middleware(Own, allow_origins=[SHOP])
    assert take_over(app) is None
    assert take_over(FastAPI(), CorsSettings(allow_origins=(SHOP,))) is None


@pytest.mark.parametrize(
    ("settings", "added", "sentence"),
    [
        (CorsSettings(allow_origins=(SHOP,)), [{"allow_origins": [SHOP]}], "configured twice.*remove the middleware"),
        (CorsSettings(), [{"allow_origins": [SHOP]}, {}], "added twice"),
        (CorsSettings(), [{"allow_origins": ["*"], "allow_credentials": True}], "cors: allow_origins='\\*' with"),
        (
            CorsSettings(),
            [{"allow_origins": [f"{SHOP}/"]}],
            "cors.allow_origins: .*did you mean 'https://shop.example'",
        ),
        (CorsSettings(), [{"allow_origin_regex": ".*", "allow_credentials": True}], "everybody's origins"),
    ],
)
def test_what_cannot_be_taken_over_is_refused(
    settings: CorsSettings, added: list[dict[str, Any]], sentence: str
) -> None:
    """With what to do, and the application is left as it was."""
    app = FastAPI()
    for arguments in added:
        app.add_middleware(CORSMiddleware, **arguments)
    with pytest.raises(ConfigurationError, match=sentence):
        take_over(app, settings)
    assert len(app.user_middleware) == len(added)


def test_a_taken_over_application_that_is_mounted_still_answers_for_itself() -> None:
    """The one around it finds what was taken off."""
    child = child_app()
    assert take_over(child) is not None
    app = shop(allow_origins=(SHOP,))
    app.mount("/child", child)
    client = TestClient(app)
    assert client.get("/child/", headers={"Origin": CHILD}).headers["access-control-allow-origin"] == CHILD
    assert preflight(client, "/child/", CHILD, "PUT").status_code == 200


def test_a_handler_of_the_application_answers_refused_preflights() -> None:
    """Like every refusal."""
    app = shop(allow_origins=(SHOP,))

    @app.exception_handler(400)
    async def mine(request: Any, problem: Exception) -> JSONResponse:
        return JSONResponse({"mine": True}, status_code=400)

    assert preflight(TestClient(app), "/", EVIL).json() == {"mine": True}
