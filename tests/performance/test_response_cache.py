"""Answers that are kept: for whom, for how long, and never for somebody else."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.security import APIKeyHeader, HTTPBearer
from fastapi.testclient import TestClient
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_hardening import CacheResponse, CspNonce, Principal, RateLimit, RequireUser, Settings, harden
from fastapi_hardening.core import context as request_context
from fastapi_hardening.core.cache_levels import CacheLevels
from fastapi_hardening.core.clock import ManualClock
from fastapi_hardening.core.redis_store import RedisStore
from fastapi_hardening.core.store import MemoryStore
from fastapi_hardening.performance.response_cache import ResponseCacheMiddleware, ResponseCacheSettings
from fastapi_hardening.performance.response_cache.lead import Kept
from fastapi_hardening.security.auth import Authorize


class Anybody:
    """Takes the name of the caller from a field."""

    scheme = "bearer"
    challenge = "Bearer"

    async def authenticate(self, connection: HTTPConnection) -> Principal | None:
        name = connection.headers.get("authorization")
        if name is None:
            return None
        name, _, scope = name.partition("+")
        return Principal(name, scopes=frozenset(scope.split()))


class Shop:
    """A hardened application whose endpoints count how often they are reached."""

    def __init__(self, **settings: Any) -> None:
        self.clock = ManualClock()
        self.calls = 0
        self.response: Callable[[], Any] = lambda: {"call": self.calls}
        self.app = FastAPI()
        self.handle = harden(
            self.app,
            Settings(rate_limit={"enabled": False}, health={"details": "always"}, **settings),
            authenticators=[Anybody()],
            clock=self.clock,
        )
        self.client = TestClient(self.app, raise_server_exceptions=False)

    def route(self, override: CacheResponse | None = None, path: str = "/", *others: Any, **options: Any) -> None:
        self.app.add_api_route(
            path, self.endpoint, dependencies=[override or CacheResponse(60), *others], response_model=None, **options
        )

    async def endpoint(self) -> Any:
        """Answers as the test has set it."""
        self.calls += 1
        return self.response()

    def ask(self, *fields: dict[str, str], path: str = "/", method: str = "GET") -> list[Any]:
        """The bodies of the answers to requests with these fields."""
        return [self.client.request(method, path, headers=each).text for each in fields]

    def status_of(self, path: str = "/", **fields: str) -> str:
        headers = {name.replace("_", "-"): value for name, value in fields.items()}
        said: str = self.client.get(path, headers=headers).headers.get("cache-status", "")
        return said

    def count(self, outcome: str) -> float:
        sample = self.handle.metrics.registry.get_sample_value("hardening_response_cache_total", {"outcome": outcome})
        return sample or 0.0


@pytest.fixture
def shop() -> Shop:
    """Give a shop that keeps its answers in memory."""
    return Shop()


# --- hits -------------------------------------------------------------------------------------------------------------


def test_a_hit_does_not_reach_the_endpoint(shop: Shop) -> None:
    """It says how old it is and how long it is good, and everything outside has had its say."""
    shop.route()
    first = shop.client.get("/")
    shop.clock.advance(18.5)
    second = shop.client.get("/")
    assert (first.json(), second.json(), shop.calls) == ({"call": 1}, {"call": 1}, 1)
    assert first.headers["cache-status"] == "fastapi-hardening; fwd=miss; stored"
    assert second.headers["cache-status"] == "fastapi-hardening; hit; ttl=41"
    assert second.headers["age"] == "18"
    assert "age" not in first.headers
    assert first.headers["x-request-id"] != second.headers["x-request-id"]
    assert second.headers["x-content-type-options"] == "nosniff"
    assert first.headers["etag"] == second.headers["etag"]
    shop.clock.advance(41.5)
    assert shop.client.get("/").json() == {"call": 2}
    assert (shop.count("hit"), shop.count("miss")) == (1, 2)


def test_only_routes_that_say_so_are_kept(shop: Shop) -> None:
    """And one may say that it is not."""
    router = APIRouter(dependencies=[CacheResponse(60)])
    router.add_api_route("/kept", shop.endpoint)
    router.add_api_route("/not", shop.endpoint, dependencies=[CacheResponse.off])
    shop.app.include_router(router)
    shop.app.add_api_route("/other", shop.endpoint)
    for path, calls in (("/kept", 1), ("/not", 2), ("/other", 2)):
        shop.calls = 0
        shop.ask({}, {}, path=path)
        assert shop.calls == calls
    assert shop.status_of("/other") == shop.status_of("/not") == ""


def test_what_differs_is_kept_apart(shop: Shop) -> None:
    """Query, host, scheme, and whatever addresses are built of."""
    shop.route()
    for fields in ({}, {"host": "b.test"}, {"x-forwarded-host": "evil.test"}, {"forwarded": "host=evil.test"}):
        assert len(set(shop.ask(fields, fields))) == 1
    assert shop.calls == 4
    for path in ("/?a=1", "/?a=2", "/?a=1&b=2"):
        shop.ask({}, {}, path=path)
    assert shop.calls == 7
    TestClient(shop.app, base_url="https://testserver").get("/")
    assert shop.calls == 8


def test_what_is_another_request_reaches_the_endpoint(shop: Shop) -> None:
    """It is neither answered from the cache nor kept."""
    shop.route()
    shop.ask({})
    for name, value in (
        ("range", "bytes=0-1"),
        ("if-match", '"a"'),
        ("x-original-url", "/admin"),
        ("x-http-method-override", "DELETE"),
        ("cache-control", "no-store"),
        ("authorization", "anna"),
        ("cookie", "session=1"),
        ("x-api-key", "1"),
        ("x-user-id", "1"),
        ("x-tenant", "a"),
    ):
        shop.calls = 0
        shop.ask({name: value}, {name: value}, {})
        assert shop.calls == 2, name
    assert shop.count("bypass") == 20


def test_what_browsers_always_send_is_no_credential(shop: Shop) -> None:
    """Two people with different browsers share what is public."""
    shop.route()
    shop.ask({"user-agent": "a", "sec-fetch-user": "?1"}, {"user-agent": "b", "upgrade-insecure-requests": "1"})
    assert shop.calls == 1


def test_a_client_cannot_have_everything_made_anew(shop: Shop) -> None:
    """``no-cache`` of a request is a wish; whoever only wants what is stored is told that nothing is."""
    shop.route()
    shop.response = lambda: Response("x", headers={"cache-control": "no-store"})
    assert shop.client.get("/", headers={"cache-control": "only-if-cached"}).status_code == 504
    assert shop.calls == 0
    shop.ask({}, path="/")
    assert shop.client.get("/", headers={"cache-control": "only-if-cached"}).status_code == 504
    shop.response = lambda: "y"
    shop.clock.advance(6)
    shop.ask({}, {"cache-control": "no-cache"}, {"pragma": "no-cache"})
    assert shop.calls == 2
    assert shop.client.get("/", headers={"cache-control": "only-if-cached"}).status_code == 200


# --- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "detail"),
    [
        (lambda: JSONResponse({}, headers={"set-cookie": "session=1"}), "set-cookie"),
        (lambda: JSONResponse({}, headers={"cache-control": "private, max-age=60"}), "private"),
        (lambda: JSONResponse({}, headers={"cache-control": "no-store"}), "no-store"),
        (lambda: JSONResponse({}, headers={"vary": "*"}), "vary"),
        (lambda: JSONResponse({}, status_code=202), "status"),
        (lambda: JSONResponse({}, status_code=500), "status"),
        (lambda: PlainTextResponse("data: 1\n\n", media_type="text/event-stream"), "stream"),
        (lambda: PlainTextResponse("x" * 2000), "size"),
    ],
)
def test_what_may_not_be_kept_is_not(response: Callable[[], Response], detail: str) -> None:
    """It reaches everybody as it was made, and says why."""
    shop = Shop(response_cache={"max_body_bytes": 1000})
    shop.route()
    shop.response = response
    assert shop.status_of() == f"fastapi-hardening; fwd=miss; detail={detail}"
    answer = shop.client.get("/")
    assert (answer.content, shop.calls) == (response().body, 2)


@pytest.mark.parametrize("seconds", [0, 60])
def test_that_something_is_not_there_is_kept_where_the_route_says_so(shop: Shop, seconds: float) -> None:
    """404 and 410 for that long; by default not at all."""

    def missing() -> Any:
        raise HTTPException(404)

    shop.route(CacheResponse(600, negative_ttl_seconds=seconds))
    shop.response = missing
    answers = [shop.client.get("/", headers={"if-none-match": "*"}) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [404, 404]
    assert shop.calls == (1 if seconds else 2)
    shop.clock.advance(60)
    shop.ask({})
    assert shop.calls == (2 if seconds else 3)


def test_the_answer_says_more_than_the_route(shop: Shop) -> None:
    """Its own lifetime counts, also where it is none."""
    shop.route()
    shop.response = lambda: JSONResponse({}, headers={"cache-control": "max-age=5"})
    shop.ask({})
    assert shop.status_of().endswith("hit; ttl=5")
    shop.clock.advance(5)
    shop.response = lambda: JSONResponse({}, headers={"cache-control": "max-age=0"})
    assert shop.status_of().endswith("fwd=miss")
    shop.ask({}, {})
    assert shop.calls == 4


def test_the_settings_say_what_the_route_leaves_open() -> None:
    """A lifetime, and that nothing is told of the cache."""
    shop = Shop(response_cache={"ttl_seconds": 7, "cache_status": False})
    shop.route(CacheResponse())
    first, second = shop.client.get("/"), shop.client.get("/")
    assert "cache-status" not in first.headers
    assert "cache-status" not in second.headers
    shop.clock.advance(7)
    shop.ask({})
    assert shop.calls == 2


def test_variants_are_kept_apart(shop: Shop) -> None:
    """By the fields that the answer names, whatever they are."""

    async def greeting(request: Request) -> Response:
        shop.calls += 1
        language = request.headers.get("accept-language", "en")
        return PlainTextResponse(language, headers={"vary": "Accept-Language"})

    shop.app.add_api_route("/hello", greeting, dependencies=[CacheResponse(60)])
    for _ in range(2):
        assert shop.ask({"accept-language": "de"}, {"accept-language": "fr"}, {}, path="/hello")[:2] == ["de", "fr"]
    assert shop.calls == 3


def test_a_page_with_a_nonce_is_not_kept(shop: Shop) -> None:
    """A nonce that is used twice is none."""

    @shop.app.get("/page", dependencies=[CacheResponse(60)])
    async def page(nonce: CspNonce) -> HTMLResponse:
        return HTMLResponse(f"<script nonce={nonce}></script>")

    assert len(set(shop.ask({}, {}, path="/page"))) == 2


def test_streams_are_passed_as_they_come_and_kept_when_they_have_ended(shop: Shop) -> None:
    """In the same parts; the first answer has no entity tag, for nobody knows yet what it will be."""

    async def parts() -> AsyncIterator[str]:
        for part in ("one", "two"):
            yield part

    shop.route()
    shop.response = lambda: StreamingResponse(parts(), media_type="text/plain")
    first, second = shop.client.get("/"), shop.client.get("/")
    assert (first.text, second.text, shop.calls) == ("onetwo", "onetwo", 1)
    assert first.headers["cache-status"] == "fastapi-hardening; fwd=miss"
    assert "etag" not in first.headers
    assert "etag" in second.headers


@pytest.mark.parametrize("large", [False, True])
def test_a_stream_that_breaks_off_or_grows_too_large_is_not_kept(large: bool) -> None:
    """What is half an answer is no answer."""
    shop = Shop(response_cache={"max_body_bytes": 100})

    async def parts() -> AsyncIterator[bytes]:
        yield b"x" * 60
        if not large:
            raise OSError("broken")
        yield b"x" * 60

    shop.route()
    shop.response = lambda: StreamingResponse(parts())
    if large:
        assert [len(each) for each in shop.ask({}, {})] == [120, 120]
    else:
        for _ in range(2):
            with pytest.raises(OSError, match="broken"):
                TestClient(shop.app).get("/")
    assert shop.calls == 2


def test_files_are_kept_and_those_that_the_server_sends_itself_are_not(shop: Shop, tmp_path: Path) -> None:
    """As with uvicorn, and with a server that takes a path."""
    (tmp_path / "file.txt").write_text("content")
    shop.route()
    shop.response = lambda: FileResponse(tmp_path / "file.txt")
    assert shop.ask({}, {}) == ["content", "content"]
    assert shop.calls == 1

    async def with_pathsend(scope: Scope, receive: Receive, send: Send) -> None:
        await shop.app({**scope, "extensions": {"http.response.pathsend": {}}}, receive, send)

    sent: list[Message] = []

    async def drive() -> None:
        scope: dict[str, Any] = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http"}
        scope |= {"method": "GET", "path": "/", "raw_path": b"/", "query_string": b"again", "server": ("a", 80)}
        scope |= {"headers": [(b"host", b"a")], "client": ("1.2.3.4", 5)}

        async def receive() -> Message:
            return {"type": "http.request"}

        async def send(message: Message) -> None:
            sent.append(message)

        for _ in range(2):
            await with_pathsend(scope, receive, send)

    asyncio.run(drive())
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.pathsend"] * 2
    assert dict(sent[0]["headers"])[b"cache-status"].endswith(b"detail=extension")


def test_an_answer_of_another_length_than_it_says_is_not_kept(shop: Shop) -> None:
    """And one with trailers neither."""

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        shop.calls += 1
        trailers = scope["query_string"] == b"trailers"
        headers = [] if trailers else [(b"content-length", b"5")]
        await send({"type": "http.response.start", "status": 200, "headers": headers, "trailers": trailers})
        await send({"type": "http.response.body", "body": b"four"})

    layer = ResponseCacheMiddleware(application)
    for query in (b"", b"trailers"):
        drive(layer, query_string=query)
        drive(layer, query_string=query)
    assert shop.calls == 4


def drive(layer: ASGIApp, **scope: Any) -> list[Message]:
    """Sends a layer alone a request for a route that keeps its answers."""
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        sent.append(message)

    app = FastAPI()
    app.add_api_route("/", receive, dependencies=[CacheResponse(60)])
    whole = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": [], "app": app, **scope}
    asyncio.run(layer(whole, receive, send))  # type: ignore[arg-type]
    return sent


# --- for whom ---------------------------------------------------------------------------------------------------------


def test_each_caller_has_his_own(shop: Shop) -> None:
    """Also the same one with another credential; whoever is unknown shares with who is unknown."""
    shop.route(CacheResponse(60, per="principal"))
    shop.response = lambda: JSONResponse({"call": shop.calls}, headers={"cache-control": "private"})
    anna, bert = {"authorization": "anna"}, {"authorization": "bert"}
    assert shop.ask(anna, bert, anna, bert) == ['{"call":1}', '{"call":2}', '{"call":1}', '{"call":2}']
    shop.ask({"authorization": "anna+admin"}, {"authorization": "anna+admin"})
    assert shop.calls == 3
    shop.response = lambda: JSONResponse({"call": shop.calls})
    shop.ask({}, {})
    assert shop.calls == 4
    shop.ask({"x-api-key": "unknown here"}, {"x-api-key": "unknown here"})
    assert shop.calls == 6


def test_what_is_for_everybody_is_still_only_for_those_who_are_let_in(shop: Shop) -> None:
    """The layer outside asks each time."""
    shop.route(CacheResponse(60, per="everybody"), "/", RequireUser())
    assert shop.ask({"authorization": "anna"}, {"authorization": "bert", "cookie": "a=b"}) == ['{"call":1}'] * 2
    assert shop.client.get("/").status_code == 401
    assert shop.calls == 1


def test_tenants_are_kept_apart(shop: Shop) -> None:
    """Whatever a route says of callers."""

    class WithTenant(Anybody):
        async def authenticate(self, connection: HTTPConnection) -> Principal | None:
            return Principal("anna", tenant=connection.headers.get("authorization"))

    app = FastAPI()
    harden(app, authenticators=[WithTenant()])
    app.add_api_route("/", shop.endpoint, dependencies=[CacheResponse(60, per="everybody")])
    client = TestClient(app)
    for tenant in ("a", "b", "a", "b"):
        client.get("/", headers={"authorization": tenant})
    assert shop.calls == 2


def test_a_caller_of_an_unknown_kind_is_not_kept_for() -> None:
    """What he is cannot be said in a key."""
    calls: list[int] = []

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        calls.append(1)
        await PlainTextResponse("x")(scope, receive, send)

    class Known:
        def __init__(self, app: ASGIApp) -> None:
            self.app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            request_context.ensure(scope).principal = {"name": "anna"}
            await self.app(scope, receive, send)

    layer = Known(ResponseCacheMiddleware(application))
    app = FastAPI()
    app.add_api_route("/", application, dependencies=[CacheResponse(60, per="principal")])
    drive(layer, app=app)
    drive(layer, app=app)
    assert len(calls) == 2


@pytest.mark.parametrize("scheme", [HTTPBearer(auto_error=False), APIKeyHeader(name="x-key", auto_error=False)])
def test_a_route_with_a_scheme_that_nobody_knows_is_never_kept(
    shop: Shop, scheme: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Wherever among its dependencies it stands; the log says why."""

    async def user(credentials: Annotated[Any, Depends(scheme)]) -> Any:
        return credentials

    with caplog.at_level(logging.WARNING, "fastapi_hardening.response_cache"):
        shop.route(CacheResponse(60, per="everybody"), "/", Depends(user))
        shop.ask({}, {})
    assert shop.calls == 2
    assert "it has a security scheme of FastAPI" in caplog.text
    assert len(caplog.records) == 1


def test_what_only_the_route_itself_can_decide_is_not_kept(shop: Shop) -> None:
    """A question about the object, or a limit that no layer has counted, is asked each time."""
    shop.route(
        CacheResponse(60, per="everybody"),
        "/own/{name}",
        Authorize(lambda principal, connection: principal.id == connection.path_params["name"]),
    )
    anna, bert = {"authorization": "anna"}, {"authorization": "bert"}
    assert [shop.client.get("/own/anna", headers=each).status_code for each in (anna, anna, bert)] == [200, 200, 403]
    assert shop.calls == 2
    shop.route(CacheResponse(60), "/limited", RateLimit("2/minute"))
    assert [shop.client.get("/limited").status_code for _ in range(3)] == [200, 200, 429]


def test_an_answer_of_a_route_that_a_middleware_chose_is_not_kept(shop: Shop) -> None:
    """Its demands are others than those that were met on the way in."""

    class Moves:
        def __init__(self, app: ASGIApp) -> None:
            self.app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http" and scope["path"] == "/":
                scope["path"] = "/inside"
            await self.app(scope, receive, send)

    shop.app.add_middleware(Moves)
    shop.route(CacheResponse(60, per="everybody"))
    shop.app.add_api_route("/inside", shop.endpoint, dependencies=[RequireUser()])
    assert shop.client.get("/", headers={"authorization": "anna"}).status_code == 200
    assert shop.client.get("/").status_code == 401


def test_a_gate_further_in_is_asked_each_time(shop: Shop) -> None:
    """An application that is mounted lets in whom it will, and a cache outside of it cannot know whom."""
    inner = FastAPI()
    harden(inner, Settings(auth={"default": "required"}), authenticators=[Anybody()])
    inner.add_api_route("/", shop.endpoint, dependencies=[CacheResponse(60, per="everybody")])
    outer = FastAPI()
    outer.mount("/inner", inner)
    harden(outer)
    client = TestClient(outer)
    assert client.get("/inner/", headers={"authorization": "anna"}).json() == {"call": 1}
    assert client.get("/inner/").status_code == 401
    assert client.get("/inner/", headers={"authorization": "anna"}).json() == {"call": 2}


def test_a_route_may_have_a_key_of_its_own(shop: Shop) -> None:
    """Where it gives none, the endpoint answers."""
    shop.route(CacheResponse(60, key=lambda connection: connection.headers.get("x-plan")))
    shop.ask({"x-plan": "a"}, {"x-plan": "b"}, {"x-plan": "a"}, {}, {})
    assert shop.calls == 4
    with pytest.raises(ValueError, match="per is 'anonymous'"):
        CacheResponse(per="me")  # type: ignore[arg-type]


# --- what the client has already --------------------------------------------------------------------------------------


def test_who_has_it_is_told_so(shop: Shop) -> None:
    """304 without a body, from the first answer on; the endpoint never hears of the condition."""

    async def page(request: Request) -> PlainTextResponse:
        shop.calls += 1
        assert "if-none-match" not in request.headers
        return PlainTextResponse("page", headers={"x-more": "more"})

    shop.app.add_api_route("/page", page, dependencies=[CacheResponse(60)])
    etag = shop.client.get("/page").headers["etag"]
    for _ in range(2):
        answer = shop.client.get("/page", headers={"if-none-match": f'"other", {etag}'})
        assert (answer.status_code, answer.content) == (304, b"")
        assert answer.headers["etag"] == etag
        assert "x-more" not in answer.headers
        shop.clock.advance(61)
    assert shop.client.get("/page", headers={"if-none-match": '"other"'}).status_code == 200
    assert shop.calls == 3
    assert shop.count("not_modified") == 1


def test_an_entity_tag_of_the_application_stays(shop: Shop) -> None:
    """Ours is only for answers that have none."""
    shop.route()
    shop.response = lambda: Response("x", headers={"etag": 'W/"own"', "last-modified": "Thu, 01 Jan 2026 00:00:00 GMT"})
    assert [shop.client.get("/").headers["etag"] for _ in range(2)] == ['W/"own"'] * 2
    assert shop.client.get("/", headers={"if-modified-since": "Thu, 01 Jan 2026 00:00:00 GMT"}).status_code == 304
    assert shop.client.get("/", headers={"if-modified-since": "Wed, 31 Dec 2025 00:00:00 GMT"}).status_code == 200


def test_head_is_answered_from_what_get_has_left(shop: Shop) -> None:
    """With the same fields and no body; it leaves nothing itself."""
    shop.route(methods=["GET", "HEAD"])
    assert shop.client.head("/").headers["content-length"] == "10"
    full = shop.client.get("/")
    head = shop.client.head("/")
    assert head.content == b""
    assert head.headers["content-length"] == full.headers["content-length"]
    assert head.headers["cache-status"].startswith("fastapi-hardening; hit")
    assert shop.calls == 2


# --- stale ------------------------------------------------------------------------------------------------------------


def test_stale_while_revalidate(shop: Shop) -> None:
    """The old answer at once, and a fresh one for the next; the request that asked is over by then."""
    shop.route(CacheResponse(10, stale_while_revalidate_seconds=30))
    with shop.client as client:
        assert client.get("/").json() == {"call": 1}
        shop.clock.advance(15)
        stale = client.get("/")
        assert stale.json() == {"call": 1}
        assert stale.headers["cache-status"] == "fastapi-hardening; hit; ttl=-5"
        assert client.get("/").json() == {"call": 2}
        shop.clock.advance(41)
        assert client.get("/").json() == {"call": 3}
    assert shop.count("stale") == 1


def test_what_must_be_revalidated_is_never_stale(shop: Shop) -> None:
    """Whatever the route would allow."""
    shop.route(CacheResponse(10, stale_while_revalidate_seconds=30, stale_if_error_seconds=30))
    shop.response = lambda: JSONResponse(shop.calls, headers={"cache-control": "max-age=10, must-revalidate"})
    shop.ask({})
    shop.clock.advance(11)
    assert shop.ask({}) == ["2"]


@pytest.mark.parametrize("how", ["raises", "answers"])
def test_stale_if_error(how: str, caplog: pytest.LogCaptureFixture) -> None:
    """While the endpoint fails the old answer is used; the next attempt waits a second."""
    shop = Shop(response_cache={"stale_if_error_seconds": 30})
    shop.route(CacheResponse(10))

    def fail() -> Any:
        if how == "raises":
            raise OSError("the database is gone")
        return JSONResponse({}, status_code=503)

    shop.ask({})
    shop.clock.advance(11)
    shop.response = fail
    answers = [shop.client.get("/") for _ in range(3)]
    assert [(answer.status_code, answer.json()) for answer in answers] == [(200, {"call": 1})] * 3
    assert answers[0].headers["cache-status"] == "fastapi-hardening; fwd=stale; ttl=-1"
    assert shop.calls == 2
    shop.clock.advance(30)
    assert shop.client.get("/").status_code == (500 if how == "raises" else 503)
    assert ("the endpoint failed" in caplog.text) is (how == "raises")
    assert shop.count("error") == 1


def test_a_refresh_that_fails_is_told(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    """And the stale answer is used on, as long as it may."""

    def fail() -> Any:
        raise OSError("gone")

    shop.route(CacheResponse(10, stale_while_revalidate_seconds=30))
    with shop.client as client:
        client.get("/")
        shop.clock.advance(11)
        shop.response = fail
        assert [client.get("/").json() for _ in range(3)] == [{"call": 1}] * 3
    assert "a stale answer could not be made again" in caplog.text


# --- together ---------------------------------------------------------------------------------------------------------


class Crowd:
    """Many requests at once for a route, in one event loop; the endpoint ends when the test says so."""

    def __init__(self, layer: Callable[[ASGIApp], ASGIApp], **override: Any) -> None:
        self.calls = 0
        self.begun = asyncio.Event()
        self.may_end = asyncio.Event()
        self.response: Callable[[Scope], ASGIApp] = lambda scope: PlainTextResponse(str(self.calls))
        self.app = FastAPI()
        self.app.add_api_route("/", lambda: None, dependencies=[CacheResponse(60, **override)])
        self.layer = layer(self.endpoint)

    async def endpoint(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Works until it may end."""
        self.calls += 1
        self.begun.set()
        await self.may_end.wait()
        await self.response(scope)(scope, receive, send)

    async def ask(self, method: str = "GET", **fields: str) -> str:
        sent: list[Message] = []

        async def receive() -> Message:
            return {"type": "http.request", "body": b""}

        async def send(message: Message) -> None:
            sent.append(message)

        headers = [(name.replace("_", "-").encode(), value.encode()) for name, value in fields.items()]
        scope = {
            "type": "http",
            "method": method,
            "path": "/",
            "query_string": b"",
            "headers": headers,
            "app": self.app,
        }
        await self.layer(scope, receive, send)
        return b"".join(message.get("body", b"") for message in sent).decode()


def test_a_thousand_who_miss_together_make_one_call() -> None:
    """And the others are answered though the first one went away: one of them asks again."""

    async def use() -> tuple[set[str], int, int]:
        crowd = Crowd(ResponseCacheMiddleware)
        asking = [asyncio.create_task(crowd.ask()) for _ in range(1000)]
        await crowd.begun.wait()
        crowd.may_end.set()
        together, calls = set(await asyncio.gather(*asking)), crowd.calls
        crowd.begun.clear()
        crowd.may_end.clear()
        other = [asyncio.create_task(crowd.ask(host="other")) for _ in range(100)]
        await crowd.begun.wait()
        other[0].cancel()
        crowd.may_end.set()
        assert {str(each) for each in await asyncio.gather(*other[1:])} == {"3"}
        return together, calls, crowd.calls

    assert asyncio.run(use()) == ({"1"}, 1, 3)


def test_nobody_waits_for_what_will_not_be_kept() -> None:
    """As soon as that is known all of them ask, and those who come after do not wait at all."""

    async def use() -> int:
        crowd = Crowd(ResponseCacheMiddleware)
        crowd.response = lambda scope: PlainTextResponse("own", headers={"set-cookie": "a=b"})
        asking = [asyncio.create_task(crowd.ask()) for _ in range(10)]
        await crowd.begun.wait()
        assert crowd.calls == 1
        crowd.may_end.set()
        await asyncio.gather(*asking)
        crowd.may_end.clear()
        more = [asyncio.create_task(crowd.ask()) for _ in range(10)]
        await asyncio.sleep(0)
        calls = crowd.calls
        crowd.may_end.set()
        await asyncio.gather(*more)
        return calls

    assert asyncio.run(use()) == 20


def test_an_error_of_the_first_is_not_the_error_of_all() -> None:
    """Each asks for itself then."""

    async def use() -> tuple[list[str], int]:
        crowd = Crowd(ResponseCacheMiddleware)

        async def fails(scope: Scope, receive: Receive, send: Send) -> None:
            raise OSError("gone")

        crowd.response = lambda scope: fails
        asking = [asyncio.create_task(crowd.ask()) for _ in range(5)]
        await crowd.begun.wait()
        crowd.may_end.set()
        said = await asyncio.gather(*asking, return_exceptions=True)
        return [str(each) for each in said], crowd.calls

    assert asyncio.run(use()) == (["gone"] * 5, 5)


def test_who_waits_too_long_asks_himself() -> None:
    """A slow answer holds up nobody for longer than was said."""

    async def use() -> int:
        crowd = Crowd(lambda app: ResponseCacheMiddleware(app, ResponseCacheSettings(wait_seconds=0)))
        asking = [asyncio.create_task(crowd.ask()) for _ in range(3)]
        for _ in range(20):
            await asyncio.sleep(0)
        assert crowd.calls == 3
        crowd.may_end.set()
        await asyncio.gather(*asking)
        return crowd.calls

    assert asyncio.run(use()) == 3


def test_a_slow_client_keeps_nobody_waiting() -> None:
    """The others are answered as soon as the endpoint has: not when the first client has read."""

    async def use() -> str:
        crowd = Crowd(ResponseCacheMiddleware)
        crowd.may_end.set()
        forever = asyncio.Event()

        async def receive() -> Message:
            return {"type": "http.request"}

        async def stuck(message: Message) -> None:
            await forever.wait()

        async def ask_slowly() -> None:
            scope = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": [], "app": crowd.app}
            await crowd.layer(scope, receive, stuck)

        slow = asyncio.create_task(ask_slowly())
        said = await crowd.ask()
        forever.set()
        await slow
        return said

    assert asyncio.run(use()) == "1"


def test_variants_that_are_missed_together_are_made_once_each() -> None:
    """Whoever learns that his is another one asks for that."""

    async def use() -> tuple[set[str], int]:
        crowd = Crowd(ResponseCacheMiddleware)

        def language(scope: Scope) -> ASGIApp:
            return PlainTextResponse(
                str(dict(scope["headers"])[b"accept-language"]), headers={"vary": "accept-language"}
            )

        crowd.response = language
        asking = [asyncio.create_task(crowd.ask(accept_language=each)) for each in ("de", "en") * 50]
        await crowd.begun.wait()
        crowd.may_end.set()
        return set(await asyncio.gather(*asking)), crowd.calls

    assert asyncio.run(use()) == ({"b'de'", "b'en'"}, 2)


# --- workers ----------------------------------------------------------------------------------------------------------


def test_workers_share_what_they_keep(state_url: str, prefix: str) -> None:
    """Through a real server, variants and all; and forget it together."""

    async def use() -> list[Any]:
        stores = [RedisStore(state_url, prefix=prefix, budget_seconds=20) for _ in range(2)]
        levels = [CacheLevels(shared=store, local_seconds=0) for store in stores]
        crowds = [Crowd(lambda app, each=each: ResponseCacheMiddleware(app, levels=each)) for each in levels]  # type: ignore[misc]
        said: list[Any] = []
        for crowd in crowds:
            crowd.may_end.set()
            crowd.response = lambda scope: PlainTextResponse("x", headers={"vary": "accept"})
        for crowd in crowds:
            said += [await crowd.ask(accept="a"), await crowd.ask(accept="a"), await crowd.ask(accept="b"), crowd.calls]
        await levels[0].invalidate(["value:path:/"])
        said += [await crowds[1].ask(accept="a"), crowds[1].calls]
        for store in stores:
            await store.close()
        return said

    assert asyncio.run(use()) == ["x", "x", "x", 2, "x", "x", "x", 0, "x", 1]


def test_head_is_answered_from_what_another_worker_has_left() -> None:
    """And goes to the endpoint where nobody has left anything."""

    async def use() -> tuple[list[int], int]:
        store = MemoryStore()
        first, second = (
            Crowd(lambda app: ResponseCacheMiddleware(app, levels=CacheLevels(shared=store))) for _ in range(2)
        )
        for crowd in (first, second):
            crowd.may_end.set()
        await second.ask(method="HEAD")
        before = second.calls
        await first.ask()
        await second.ask(method="HEAD")
        return [before, second.calls], first.calls

    assert asyncio.run(use()) == ([1, 1], 1)


def test_a_stale_answer_is_made_again_without_its_client() -> None:
    """Whatever the endpoint reads of the request, there is no body, and no client that goes away."""
    said: list[str] = []
    done = asyncio.Event()

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        said.append((await receive())["type"])
        waiting = asyncio.ensure_future(receive())
        await asyncio.sleep(0)
        said.append("waits" if not waiting.done() else waiting.result()["type"])
        waiting.cancel()
        await PlainTextResponse("x")(scope, receive, send)
        done.set()

    async def use() -> None:
        clock = ManualClock()
        crowd = Crowd(
            lambda _app: ResponseCacheMiddleware(application, clock=clock), stale_while_revalidate_seconds=100
        )
        await crowd.ask()
        clock.advance(70)
        done.clear()
        await crowd.ask()
        await done.wait()

    asyncio.run(use())
    assert said == ["http.request", "http.request", "http.request", "waits"]


def test_one_worker_makes_a_stale_answer_again() -> None:
    """The others go on with what they have."""

    async def use() -> list[int]:
        clock = ManualClock()
        store = MemoryStore(clock=clock)
        crowds = [
            Crowd(
                lambda app: ResponseCacheMiddleware(app, levels=CacheLevels(shared=store, clock=clock), clock=clock),
                stale_while_revalidate_seconds=100,
            )
            for _ in range(2)
        ]
        for crowd in crowds:
            crowd.may_end.set()
            await crowd.ask()
        clock.advance(70)
        for crowd in crowds:
            crowd.may_end.clear()
            for _ in range(3):
                assert await crowd.ask() == "1"
        for _ in range(20):
            await asyncio.sleep(0)
        for crowd in crowds:
            crowd.may_end.set()
        for _ in range(20):
            await asyncio.sleep(0)
        return [crowd.calls for crowd in crowds]

    assert sorted(asyncio.run(use())) == [0, 2]


# --- forgetting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "calls"), [(200, 2), (422, 1)])
def test_who_changes_something_has_it_forgotten(shop: Shop, status: int, calls: int) -> None:
    """RFC 9111, section 4.4: a change of the path that succeeds, and only that path."""

    async def change() -> Response:
        return Response(status_code=status)

    shop.route()
    shop.route(path="/other")
    shop.app.add_api_route("/", change, methods=["PUT"])
    shop.app.add_api_route("/elsewhere", change, methods=["PUT"])
    shop.ask({})
    shop.ask({}, path="/other")
    shop.calls = 1
    shop.client.put("/")
    shop.client.put("/elsewhere")
    shop.client.options("/")
    shop.ask({})
    shop.ask({}, path="/other")
    assert shop.calls == calls


def test_tags_are_those_of_the_cache(shop: Shop) -> None:
    """One call forgets values and answers."""
    shop.route(CacheResponse(60, tags=("products",)))
    shop.route(CacheResponse(60, tags=lambda connection: (f"q {connection.query_params['q']}",)), "/find")
    for path in ("/", "/find?q=1"):
        shop.ask({}, {}, path=path)
    assert shop.calls == 2
    asyncio.run(shop.handle.cache.invalidate("products"))
    shop.ask({})
    shop.ask({}, path="/find?q=1")
    assert shop.calls == 3
    asyncio.run(shop.handle.cache.invalidate("q 1"))
    shop.ask({}, path="/find?q=1")
    assert shop.calls == 4
    asyncio.run(shop.handle.cache.invalidate("path:/"))
    shop.ask({})
    assert shop.calls == 5


# --- odds and ends ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"\xff", b"{}", b'{"vary": 1}', b"[1]", b'[200, [["a"]]]', b'["x", []]', b"1"])
def test_what_is_no_answer_is_none(data: bytes) -> None:
    """Whatever lies under a key."""
    assert Kept.unpack(data) is None


def test_it_is_bounded(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it remembers of routes and of the names of fields."""
    from fastapi_hardening.performance.response_cache import asked  # noqa: PLC0415

    monkeypatch.setattr(asked, "_MOST_PLANS", 1)
    monkeypatch.setattr(asked, "_MOST_NAMES", 0)
    shop.route()
    shop.route(path="/other")
    for path in ("/", "/other"):
        shop.ask({"x-one": "1", "x-two": "2", "x-token": "3"}, {}, {}, path=path)
    assert shop.calls == 4


@pytest.fixture
def alone() -> Iterator[TestClient]:
    """Give a client of an application with this layer alone."""
    app = FastAPI()
    app.add_middleware(ResponseCacheMiddleware)
    calls = 0

    @app.get("/", dependencies=[CacheResponse(60)])
    async def index() -> int:
        nonlocal calls
        calls += 1
        return calls

    @app.post("/")
    async def change() -> None: ...

    @app.websocket("/ws")
    async def websocket(socket: Any) -> None: ...

    with TestClient(app) as client:
        yield client


def test_it_works_alone(alone: TestClient) -> None:
    """Without harden(), and without touching anything but HTTP."""
    assert [alone.get("/").json() for _ in range(2)] == [1, 1]
    alone.post("/")
    assert alone.get("/").json() == 2


def test_it_can_be_switched_off() -> None:
    """Then it is not there."""
    shop = Shop(response_cache={"enabled": False})
    shop.route()
    shop.ask({}, {})
    assert shop.calls == 2
    drive(ResponseCacheMiddleware(shop.app, ResponseCacheSettings(enabled=False)))
