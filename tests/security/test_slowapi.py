"""What was declared with slowapi holds: as its documentation has it, and where slowapi itself does not look."""

import logging
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fastapi import APIRouter, Depends, FastAPI, Request, Response, WebSocket
from fastapi.responses import JSONResponse, PlainTextResponse
from slowapi import Limiter, _rate_limit_exceeded_handler
from slowapi.errors import RateLimitExceeded
from slowapi.middleware import SlowAPIASGIMiddleware, SlowAPIMiddleware
from slowapi.util import get_ipaddr, get_remote_address
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.testclient import TestClient, WebSocketDenialResponse

from fastapi_hardening import ConfigurationError, RateLimit, Settings, harden
from fastapi_hardening.core.clock import ManualClock
from fastapi_hardening.core.events import RequestRefused
from fastapi_hardening.security import slowapi_limits
from fastapi_hardening.security.slowapi_limits import MARKED, PROVIDER, READ_OF_LIMITER, SCOPE

HERE = "203.0.113.1"


def build(**arguments: Any) -> tuple[FastAPI, Limiter]:
    """An application as slowapi's documentation makes it."""
    limiter = Limiter(**{"key_func": get_remote_address} | arguments)
    app = FastAPI()
    app.state.limiter = limiter
    app.add_exception_handler(RateLimitExceeded, _rate_limit_exceeded_handler)  # type: ignore[arg-type]
    return app, limiter


class Site:
    """A hardened application, and clients of it."""

    def __init__(self, app: FastAPI, *, clock: ManualClock | None = None, **settings: Any) -> None:
        self.clock = clock or ManualClock()
        self.handle = harden(app, Settings(_env_file=None, **settings), clock=self.clock)
        self.app = app

    def client(self, address: str = HERE) -> TestClient:
        return TestClient(self.app, client=(address, 1), raise_server_exceptions=False)

    def statuses(self, path: str, times: int, address: str = HERE, method: str = "GET", **headers: str) -> list[int]:
        client = self.client(address)
        return [client.request(method, path, headers=headers).status_code for _ in range(times)]


# --- the examples of slowapi's documentation --------------------------------------------------------------------------


def test_quick_start_for_fastapi() -> None:
    """Five requests a minute, then slowapi's own handler answers; async, sync, and with a response to inject into."""
    app, limiter = build()

    @app.get("/home")
    @limiter.limit("5/minute")
    async def homepage(request: Request) -> Any:
        return PlainTextResponse("test")

    @app.get("/mars")
    @limiter.limit("5/minute")
    def mars(request: Request, response: Response) -> Any:
        return {"key": "value"}

    site = Site(app)
    for path in ("/home", "/mars"):
        assert site.statuses(path, 6) == [200] * 5 + [429]
        assert site.client().get(path).json() == {"error": "Rate limit exceeded: 5 per 1 minute"}
    assert site.statuses("/home", 1, "203.0.113.2") == [200]
    site.clock.advance(60)
    assert site.statuses("/home", 1) == [200]


def test_quick_start_for_starlette() -> None:
    """A route of Starlette, in the application or mounted under it."""
    app, limiter = build()

    @limiter.limit("2/minute")
    async def homepage(request: Request) -> Any:
        return PlainTextResponse("test")

    app.add_route("/home", homepage)
    mounted = Starlette(routes=[Route("/home", homepage)])
    mounted.state.limiter = limiter
    mounted.add_exception_handler(RateLimitExceeded, _rate_limit_exceeded_handler)  # type: ignore[arg-type]
    app.mount("/star", mounted)
    site = Site(app)
    assert site.statuses("/home", 3) == [200, 200, 429]
    assert site.statuses("/star/home", 3) == [200, 200, 429]
    assert site.client().get("/star/home").json() == {"error": "Rate limit exceeded: 2 per 1 minute"}


@pytest.mark.parametrize("middleware", [SlowAPIMiddleware, SlowAPIASGIMiddleware, None])
def test_a_default_for_all_routes_and_an_exempt_one(middleware: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Each route has its own; the middleware, if it was added, is taken off with a notice."""
    app, limiter = build(default_limits=["1/minute"])

    @app.get("/home")
    async def homepage(request: Request) -> Any:
        return PlainTextResponse("Only once per minute")

    @app.get("/other/{number}")
    def other(number: int) -> int:
        return number

    @app.get("/someroute")
    @limiter.exempt  # type: ignore[untyped-decorator]
    def t(request: Request) -> Any:
        return PlainTextResponse("I'm unlimited")

    @app.get("/async")
    @limiter.exempt  # type: ignore[untyped-decorator]
    async def later(request: Request) -> Any:
        return PlainTextResponse("I'm unlimited")

    site = Site(app, rate_limit={"default": "3/minute"})
    if middleware is not None:
        app.add_middleware(middleware)
    with caplog.at_level(logging.WARNING):
        assert site.statuses("/home", 2) == [200, 429]
    assert app.user_middleware == []
    assert ("is taken off" in caplog.text) == (middleware is not None)
    assert site.statuses("/other/1", 1) + site.statuses("/other/2", 1) == [200, 429]
    assert site.statuses("/someroute", 9) + site.statuses("/async", 9) == [200] * 18


def test_disabled_entirely_and_switched_while_it_serves() -> None:
    """As if the limiter was not there: our own default holds."""
    app, limiter = build(enabled=False, default_limits=["1/minute"])

    @app.get("/someroute")
    @limiter.limit("2/minute")
    def t(request: Request) -> Any:
        return PlainTextResponse("I'm unlimited")

    site = Site(app, rate_limit={"default": "4/minute"})
    assert site.statuses("/someroute", 3) == [200] * 3
    limiter.enabled = True
    assert site.statuses("/someroute", 3) == [200, 200, 429]
    limiter.enabled = False
    assert site.statuses("/someroute", 2) == [200, 429]


def test_a_custom_cost_per_hit() -> None:
    """A number, or what a function of the request says, which may be no whole number."""
    app, limiter = build()

    def get_hit_cost(request: Request) -> float:
        return int(request.headers["foo"]) * 1.5

    @app.get("/t1")
    @limiter.limit("50/minute", cost=10)
    async def t1(request: Request) -> Any:
        return PlainTextResponse("test")

    @app.get("/t2")
    @limiter.limit("50/minute", cost=get_hit_cost)  # type: ignore[arg-type]
    async def t2(request: Request) -> Any:
        return PlainTextResponse("test")

    site = Site(app)
    assert site.statuses("/t1", 6) == [200] * 5 + [429]
    assert site.statuses("/t2", 5, foo="10") == [200] * 3 + [429] * 2


@pytest.mark.parametrize(("style", "shared"), [("url", [200, 200]), ("endpoint", [200, 429])])
def test_key_style(style: Any, shared: list[int]) -> None:
    """By path template or by function; concrete paths of one template share a budget in both."""
    app, _ = build(key_func=lambda: "mock", default_limits=["1/minute"], key_style=style)

    async def my_func(some_param: str) -> str:
        return some_param

    app.add_api_route("/some_route/{some_param}", my_func)
    app.add_api_route("/other_route/{some_param}", my_func)
    site = Site(app)
    assert site.statuses("/some_route/a", 1) + site.statuses("/other_route/a", 1) == shared
    assert site.statuses("/some_route/b", 1, "203.0.113.2") == [429]


# --- everything that a decorator takes --------------------------------------------------------------------------------


def test_several_decorators_and_the_same_name_twice() -> None:
    """All hold, each by its own key; a refusal spends nothing of the others. A function has its own limits only."""
    app, limiter = build()

    @app.get("/t1")
    @limiter.limit("4 per minute", lambda: "test")  # for all users together
    @limiter.limit("2/minute")
    async def t(request: Request) -> str:
        return "test"

    first = t

    @app.get("/t2")  # type: ignore[no-redef]
    @limiter.limit("3/minute")
    async def t(request: Request) -> str:
        return "test"

    @app.get("/t3")  # type: ignore[no-redef]
    async def t(request: Request) -> str:
        return "test"

    assert first is not t
    site = Site(app)
    assert site.statuses("/t1", 3) == [200, 200, 429]
    assert site.statuses("/t1", 3, "203.0.113.2") == [200, 200, 429]
    assert site.statuses("/t1", 1, "203.0.113.3") == [429]
    assert site.statuses("/t2", 4) == [200] * 3 + [429]
    assert site.statuses("/t3", 9) == [200] * 9


def test_functions_of_one_name_that_cannot_be_told_apart_have_the_limits_of_both() -> None:
    """Stricter, never weaker."""
    app, limiter = build()

    def declare(path: str, limit: Any) -> None:
        async def t(request: Request) -> str:
            return "test"

        app.get(path)(limiter.limit(limit)(t))

    declare("/a", "3/minute; 9/hour")
    declare("/b", lambda: "2/minute")
    assert Site(app).statuses("/a", 3) == [200, 200, 429]


def test_several_limits_in_one_text_and_the_strategy() -> None:
    """Moving windows slide; the fields tell all of them."""
    app, limiter = build(strategy="moving-window")

    @app.get("/")
    @limiter.limit("2/second; 3/minute")
    async def t(request: Request) -> str:
        return "test"

    site = Site(app)
    answer = site.client().get("/")
    assert answer.headers["ratelimit-policy"] == '"2/second";q=2;w=1, "3/minute";q=3;w=60'
    assert answer.headers["ratelimit"].startswith('"2/second";r=1;t=')
    assert site.statuses("/", 2) == [200, 429]
    site.clock.advance(2)
    assert site.statuses("/", 2) == [200, 429]


def test_by_method() -> None:
    """One for each, or only for some; without either they share it."""
    app, limiter = build()
    both = ["GET", "POST"]

    @limiter.limit("1/minute", per_method=True)
    async def each(request: Request) -> str:
        return "test"

    @limiter.limit("1/minute", methods=["POST"])
    async def some(request: Request) -> str:
        return "test"

    @limiter.limit("1/minute")
    async def shared(request: Request) -> str:
        return "test"

    for endpoint in (each, some, shared):
        app.add_api_route(f"/{endpoint.__name__}", endpoint, methods=both)
    site = Site(app)
    assert site.statuses("/each", 2) + site.statuses("/each", 2, method="POST") == [200, 429] * 2
    assert site.statuses("/some", 3) + site.statuses("/some", 2, method="POST") == [200] * 3 + [200, 429]
    assert site.statuses("/shared", 1) + site.statuses("/shared", 1, method="POST") == [200, 429]


@pytest.mark.parametrize("message", ["slow down", lambda: "slow down"])
def test_an_error_message(message: Any) -> None:
    """In the answer of slowapi's handler, and in ours where there is none."""
    app, limiter = build()

    @app.get("/")
    @limiter.limit("1/minute", error_message=message)
    async def t(request: Request) -> str:
        return "test"

    site = Site(app)
    assert site.client().get("/").status_code == 200
    assert site.client().get("/").json() == {"error": "Rate limit exceeded: slow down"}
    del app.exception_handlers[RateLimitExceeded]
    problem = site.client().get("/").json()
    assert (problem["type"].rpartition("#")[2], problem["detail"]) == ("quota-exceeded", "slow down")
    assert problem["violated-policies"] == ["1/minute"]


def test_exempt_when() -> None:
    """With and without the request."""
    app, limiter = build(default_limits=["1/day"])
    holiday = [False]

    @app.get("/a")
    @limiter.limit("1/minute", exempt_when=lambda: holiday[0])
    async def a(request: Request) -> str:
        return "test"

    @app.get("/b")
    @limiter.limit("1/minute", exempt_when=lambda request: request.headers.get("vip") == "yes")
    async def b(request: Request) -> str:
        return "test"

    site = Site(app)
    assert site.statuses("/a", 2) + site.statuses("/b", 2) == [200, 429] * 2
    holiday[0] = True
    assert site.statuses("/a", 2) + site.statuses("/b", 2, vip="yes") == [200] * 4


def test_dynamic_limits() -> None:
    """By a function, by a function of the key; a wrong one gives way to the other limits."""
    app, limiter = build(default_limits=["4/minute"])

    def custom_key_func(request: Request) -> str:
        return "admin" if request.headers.get("TOKEN") == "secret" else "user"

    def dynamic_limit_provider(key: str) -> str:
        return "3/minute" if key == "admin" else "2/minute"

    @app.get("/t1")
    @limiter.limit(dynamic_limit_provider, key_func=custom_key_func)
    async def t1(request: Request, response: Response) -> Any:
        return {"key": "value"}

    @app.get("/t2")
    @limiter.limit(lambda: "1/minute")
    def t2(request: Request) -> str:
        return "test"

    @app.get("/t3")
    @limiter.limit(lambda: "rather few")
    def t3(request: Request) -> str:
        return "test"

    site = Site(app)
    assert site.statuses("/t1", 3) == [200, 200, 429]
    assert site.statuses("/t1", 4, TOKEN="secret") == [200] * 3 + [429]
    assert site.statuses("/t2", 2) == [200, 429]
    assert site.statuses("/t3", 5) == [200] * 4 + [429]


def test_shared_limits() -> None:
    """One budget for all routes of a scope; a function may say which."""
    app, limiter = build()

    @app.get("/a")
    @limiter.shared_limit("2/minute", scope="database")
    async def a(request: Request) -> str:
        return "test"

    @app.get("/b")
    @limiter.shared_limit("2/minute", scope="database")
    def b(request: Request) -> str:
        return "test"

    @app.get("/c")
    @limiter.shared_limit("2/minute", scope=lambda place: place.strip("/"))
    def c(request: Request) -> str:
        return "test"

    site = Site(app)
    assert site.statuses("/a", 1) + site.statuses("/b", 2) + site.statuses("/a", 1) == [200, 200, 429, 429]
    assert site.statuses("/c", 3) == [200, 200, 429]


def test_application_limits_are_one_budget_for_everything() -> None:
    """Also for unknown paths, what is mounted, and decorated routes; an exempt route is not part of it."""
    app, limiter = build(application_limits=["4/minute"])

    @app.get("/a")
    async def a(request: Request) -> str:
        return "test"

    @app.get("/b")
    @limiter.limit("1/minute")
    async def b(request: Request) -> str:
        return "test"

    @app.get("/free")
    @limiter.exempt  # type: ignore[untyped-decorator]
    async def free(request: Request) -> str:
        return "test"

    app.mount("/m", Starlette(routes=[Route("/x", lambda request: PlainTextResponse("ok"))]))
    site = Site(app)
    assert site.statuses("/a", 1) + site.statuses("/b", 2) == [200, 200, 429]
    assert site.statuses("/m/x", 1) + site.statuses("/nope", 2) == [200, 404, 429]
    assert site.statuses("/a", 1) + site.statuses("/free", 1) == [429, 200]


def test_a_decorator_stands_in_place_of_the_default_unless_it_says_otherwise() -> None:
    """As slowapi documents it; ours is replaced by either."""
    app, limiter = build(default_limits=["2/minute"])

    @app.get("/wider")
    @limiter.limit("3/minute")
    async def wider(request: Request) -> str:
        return "test"

    @app.get("/both")
    @limiter.limit("3/minute", override_defaults=False)
    async def both(request: Request) -> str:
        return "test"

    site = Site(app, rate_limit={"default": "1/minute"})
    assert site.statuses("/wider", 4) == [200] * 3 + [429]
    assert site.statuses("/both", 3) == [200, 200, 429]


def test_an_override_of_ours_stands_in_place_of_the_default_and_beside_a_decorator() -> None:
    """So a route can be moved from one to the other."""
    app, limiter = build(default_limits=["1/minute"])

    @app.get("/moved", dependencies=[RateLimit("3/minute")])
    async def moved(request: Request) -> str:
        return "test"

    @app.get("/both", dependencies=[RateLimit("3/minute", concurrent=9)])
    @limiter.limit("2/minute")
    async def both(request: Request) -> str:
        return "test"

    @app.get("/lifted", dependencies=[RateLimit.exempt])
    async def lifted(request: Request) -> str:
        return "test"

    site = Site(app)
    assert site.statuses("/moved", 4) == [200] * 3 + [429]
    assert site.statuses("/both", 3) == [200, 200, 429]
    assert site.statuses("/lifted", 5) == [200] * 5


# --- who is counted ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key_func", [get_remote_address, get_ipaddr, lambda request: "" or get_remote_address(request)]
)
def test_addresses_are_those_that_are_believed(key_func: Callable[..., str]) -> None:
    """Behind trusted proxies the client's, IPv6 by its /64; no header makes another client of one."""
    app, limiter = build(key_func=key_func)

    @app.get("/")
    @limiter.limit("1/minute")
    async def t(request: Request) -> str:
        return "test"

    site = Site(app, trusted_proxies=("10.0.0.0/8",))
    assert site.statuses("/", 2, "10.0.0.1", **{"X-Forwarded-For": "1.1.1.1, 203.0.113.1"}) == [200, 429]
    assert site.statuses("/", 1, "10.0.0.1", **{"X-Forwarded-For": "1.1.1.1, 203.0.113.2"}) == [200]
    assert site.statuses("/", 1, "2001:db8::1") + site.statuses("/", 1, "2001:db8::ffff") == [200, 429]
    assert site.statuses("/", 1, "203.0.113.1", X_FORWARDED_FOR="9.9.9.9") == [429]


def test_who_has_no_key_is_counted_by_address() -> None:
    """slowapi would not count them at all."""
    app, limiter = build(key_func=lambda request: request.headers.get("x-key"))

    @app.get("/")
    @limiter.limit("1/minute")
    async def t(request: Request) -> str:
        return "test"

    site = Site(app)
    assert site.statuses("/", 2) + site.statuses("/", 2, **{"X-Key": "a"}) == [200, 429] * 2
    assert site.statuses("/", 1, **{"X-Key": "203.0.113.2"}) + site.statuses("/", 1, "203.0.113.2") == [200, 200]


def test_a_key_function_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    """Is a 500, as in slowapi; with ``swallow_errors``, or for a default, the request is counted by address."""

    def failing(request: Request) -> str:
        return request.headers["x-key"]

    app, limiter = build(key_func=failing, default_limits=["2/minute"])
    quiet = Limiter(key_func=failing, swallow_errors=True)

    @app.get("/strict")
    @limiter.limit("1/minute")
    async def strict(request: Request) -> str:
        return "test"

    @app.get("/quiet")
    @quiet.limit("1/minute")
    async def swallowed(request: Request) -> str:
        return "test"

    site = Site(app)
    assert site.statuses("/strict", 2) == [500, 500]
    assert site.statuses("/quiet", 2) == [200, 429]
    assert site.statuses("/nope", 3) == [404, 404, 429]
    assert caplog.text.count("counted by address") == 1


class SetsUser:
    """A middleware of the application that finds out who calls."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            scope["state"]["user"] = dict(scope["headers"]).get(b"x-user", b"").decode()
        await self.app(scope, receive, send)


def by_user(request: Request) -> str:
    user = getattr(request.state, "user", None)
    return user or get_remote_address(request)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_decorator_counts_by_what_only_the_application_finds_out(asynchronous: bool) -> None:
    """A user that a middleware or a dependency puts on the state, or a parameter of the path: before the endpoint."""
    app, limiter = build(key_func=by_user, headers_enabled=True)
    app.add_middleware(SetsUser)

    async def add_tenant(request: Request) -> None:
        request.state.tenant = request.headers.get("x-tenant")

    def endpoint() -> Any:
        async def later(request: Request, response: Response) -> str:
            return "test"

        def now(request: Request, response: Response) -> str:
            return "test"

        return later if asynchronous else now

    by_tenant = limiter.limit("1/minute", key_func=lambda request: request.state.tenant)
    by_number = limiter.limit("1/minute", key_func=lambda request: request.path_params["number"])
    app.get("/user")(limiter.limit("1/minute")(endpoint()))
    app.get("/tenant", dependencies=[Depends(add_tenant)])(by_tenant(endpoint()))
    app.get("/path/{number}")(by_number(endpoint()))
    site = Site(app)
    refused: list[RequestRefused] = []
    site.handle.events.subscribe(RequestRefused, refused.append)
    for path, name in (("/user", "X-User"), ("/tenant", "X-Tenant")):
        assert site.statuses(path, 2, **{name: "anna"}) + site.statuses(path, 1, **{name: "bert"}) == [200, 429, 200]
    assert site.statuses("/path/1", 2) + site.statuses("/path/2", 1) == [200, 429, 200]
    answer = site.client().get("/path/1")
    assert answer.json() == {"error": "Rate limit exceeded: 1 per 1 minute"}
    assert answer.headers["ratelimit"] == '"1/minute";r=0;t=60'
    assert answer.headers["retry-after"] == "60"
    assert [event.layer for event in refused] == ["rate limit"] * 4
    assert refused[0].key == "by_user=anna"


@pytest.mark.parametrize("asynchronous", [True, False])
def test_without_a_handler_such_a_refusal_is_a_problem_too(asynchronous: bool) -> None:
    """With the time to come back."""
    app, limiter = build(key_func=by_user)
    del app.exception_handlers[RateLimitExceeded]

    async def later(request: Request) -> str:
        return "test"

    def now(request: Request) -> str:
        return "test"

    app.get("/")(limiter.limit("1/minute")(later if asynchronous else now))
    site = Site(app)
    assert site.statuses("/", 1) == [200]
    answer = site.client().get("/")
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "60")
    assert answer.headers["content-type"] == "application/problem+json"


def test_a_default_counts_by_what_a_middleware_finds_out() -> None:
    """Behind the middlewares, wherever slowapi's own stood; unknown paths and what is mounted are counted too."""
    app, _ = build(key_func=by_user, default_limits=["1/minute"])
    app.add_middleware(SlowAPIMiddleware)
    app.add_middleware(SetsUser)
    app.get("/")(lambda: "test")
    site = Site(app)
    refused: list[RequestRefused] = []
    site.handle.events.subscribe(RequestRefused, refused.append)
    assert site.statuses("/", 2, **{"X-User": "anna"}) + site.statuses("/", 1, **{"X-User": "bert"}) == [200, 429, 200]
    assert site.statuses("/nope", 2) == [404, 429]
    assert site.client().get("/nope").json() == {"error": "Rate limit exceeded: 1 per 1 minute"}
    assert [event.key for event in refused] == ["by_user=anna", HERE, HERE]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_bans_and_the_allow_list_hold_for_what_is_counted_later(asynchronous: bool) -> None:
    """By a decorator or by a default, once it is known who calls."""
    app, limiter = build(key_func=by_user, default_limits=["2/minute"])
    app.add_middleware(SetsUser)

    async def later(request: Request) -> str:
        return "test"

    def now(request: Request) -> str:
        return "test"

    app.get("/decorated")(limiter.limit("2/minute")(later if asynchronous else now))
    app.get("/default")(lambda: "test")
    site = Site(app, rate_limit={"allow": ["by_user=monitor"]}, bans={"after_refusals": 1})
    site.handle.bans.add("by_user=mallory", 60)
    refused: list[RequestRefused] = []
    site.handle.events.subscribe(RequestRefused, refused.append)
    for path in ("/decorated", "/default"):
        answer = site.client().get(path, headers={"X-User": "mallory"})
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "60")
        assert answer.json()["type"].endswith("#abnormal-usage-detected")
        assert site.statuses(path, 5, **{"X-User": "monitor"}) == [200] * 5
    assert [event.key for event in refused] == [None, None]
    assert site.statuses("/decorated", 3, **{"X-User": "anna"}) == [200, 200, 429]
    assert site.handle.bans.find("by_user=anna") is not None


def test_what_only_waits_is_still_limited_by_our_default() -> None:
    """A caller that never gets as far as the decorator, such as one with a wrong parameter."""
    app, limiter = build()

    @app.get("/path/{number}")
    @limiter.limit("9/minute", key_func=lambda request: request.path_params["number"])
    async def t(request: Request, number: int) -> int:
        return number

    assert Site(app, rate_limit={"default": "2/minute"}).statuses("/path/x", 3) == [422, 422, 429]


def test_what_the_lifespan_has_set_is_known_at_once() -> None:
    """So that also a request that never gets to the endpoint is counted by it."""

    @asynccontextmanager
    async def lifespan(_app: Any) -> AsyncIterator[dict[str, str]]:
        yield {"stage": "blue"}

    app, limiter = build()
    app.router.lifespan_context = lifespan

    @app.get("/path/{number}")
    @limiter.limit("1/minute", key_func=lambda request: request.state.stage)
    async def t(request: Request, number: int) -> int:
        return number

    site = Site(app)
    with site.client() as client:
        assert [client.get("/path/x").status_code for _ in range(2)] == [422, 429]


@pytest.mark.parametrize("what", ["user", "auth", "session"])
def test_what_authentication_and_sessions_set_is_waited_for(what: str) -> None:
    """Whatever a key function looks at."""
    app, limiter = build(key_func=lambda request: getattr(request, what)["id"])

    class Sets:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            scope[what] = {"id": "anna"}
            await self.app(scope, receive, send)

    app.add_middleware(Sets)

    @app.get("/")
    @limiter.limit("1/minute")
    async def t(request: Request) -> str:
        return "test"

    site = Site(app)
    assert site.statuses("/", 1) + site.statuses("/", 1, "203.0.113.2") == [200, 429]


# --- what the client sees ---------------------------------------------------------------------------------------------


def test_slowapis_fields_are_sent_where_they_are_enabled() -> None:
    """Under their names, beside ours; an answer that is no response needs no parameter for them."""
    app, limiter = build(headers_enabled=True)

    @app.get("/")
    @limiter.limit("2/minute")
    async def t(request: Request) -> Any:
        return {"key": "value"}

    site = Site(app)
    first, _, refused = (site.client().get("/") for _ in range(3))
    assert first.status_code == 200
    assert [first.headers[f"x-ratelimit-{name}"] for name in ("limit", "remaining")] == ["2", "1"]
    assert int(first.headers["x-ratelimit-reset"]) == site.clock.time() + 60
    assert first.headers["ratelimit"] == '"2/minute";r=1;t=60'
    assert "retry-after" not in first.headers
    assert refused.status_code == 429
    assert (refused.headers["x-ratelimit-remaining"], refused.headers["retry-after"]) == ("0", "60")
    assert refused.headers.get_list("x-ratelimit-limit") == ["2"]


def test_the_time_to_come_back_may_be_a_date() -> None:
    """If slowapi was told so."""
    app, limiter = build(headers_enabled=True, retry_after="http-date")

    @app.get("/")
    @limiter.limit("1/minute", cost=2)
    async def t(request: Request) -> Any:
        return {"key": "value"}

    assert Site(app).client().get("/").headers["retry-after"] == "Tue, 14 Nov 2023 22:14:20 GMT"


def test_a_refusal_always_says_when_to_come_back() -> None:
    """Also by a handler that does not."""
    app, limiter = build()

    @app.get("/")
    @limiter.limit("1/minute")
    async def t(request: Request) -> str:
        return "test"

    seen: list[Any] = []

    async def mine(request: Request, exc: RateLimitExceeded) -> JSONResponse:
        seen.append((exc.detail, str(exc.limit and exc.limit.limit), request.state.view_rate_limit[0].amount))
        return JSONResponse({"detail": "later"}, status_code=429)

    app.add_exception_handler(RateLimitExceeded, mine)  # type: ignore[arg-type]
    site = Site(app)
    assert site.statuses("/", 1) == [200]
    answer = site.client().get("/")
    assert (answer.json(), answer.headers["retry-after"]) == ({"detail": "later"}, "60")
    assert seen == [("1 per 1 minute", "1 per 1 minute", 1)]


def test_in_report_only_mode_nothing_is_refused() -> None:
    """Neither at once nor later."""
    app, limiter = build()

    @app.get("/")
    @limiter.limit("1/minute")
    async def t(request: Request) -> str:
        return "test"

    @app.get("/late")
    @limiter.limit("1/minute", key_func=by_user)
    async def late(request: Request) -> str:
        return "test"

    site = Site(app, rate_limit={"report_only": True})
    assert site.statuses("/", 3) + site.statuses("/late", 3) == [200] * 6
    assert site.handle.events.count(RequestRefused) == 4


# --- where slowapi does not look --------------------------------------------------------------------------------------


def test_limiters_of_modules_and_of_mounted_applications_hold_too() -> None:
    """Not only that of the application; the default of a mounted application stands in place of the outer one's."""
    app, _ = build(default_limits=["1/minute"])
    of_module = Limiter(key_func=get_remote_address)
    router = APIRouter(prefix="/r")

    @router.get("/x")
    @of_module.limit("2/minute")
    async def x(request: Request) -> str:
        return "test"

    outer = APIRouter(prefix="/outer")
    outer.include_router(router)
    app.include_router(outer)
    child, of_child = build(default_limits=["3/minute"])
    child.add_middleware(SlowAPIMiddleware)

    @child.get("/d")
    async def d(request: Request) -> str:
        return "test"

    @child.get("/l")
    @of_child.limit("4/minute")
    def decorated(request: Request) -> str:
        return "test"

    app.mount("/child", child)
    site = Site(app)
    assert site.statuses("/outer/r/x", 3) == [200, 200, 429]
    assert site.statuses("/child/d", 4) == [200] * 3 + [429]
    assert site.statuses("/child/l", 5) == [200] * 4 + [429]
    assert child.user_middleware == []


def test_a_mounted_application_is_part_of_the_outer_one() -> None:
    """Its limiter stands in place of the default only; the outer application's own limit counts everything."""
    app, _ = build(default_limits=["1/minute"], application_limits=["5/minute"])
    middle, _ = build(default_limits=["2/minute"])
    inner = FastAPI()
    inner.get("/x")(lambda: "x")
    middle.mount("/inner", inner)
    app.mount("/middle", middle)
    site = Site(app)
    assert site.statuses("/middle/inner/x", 3) == [200, 200, 429]
    assert site.statuses("/middle/nope", 3) == [404, 404, 429]
    assert site.statuses("/nope", 2) == [404, 429]
    site.clock.advance(60)
    # The shared five: only what passed was spent.
    assert site.statuses("/middle/inner/x", 2) + site.statuses("/middle/nope", 2) + site.statuses("/nope", 1) == [
        200,
        200,
        404,
        404,
        404,
    ]
    assert site.statuses("/middle/nope", 1) == [429]


def test_a_decorator_above_the_route_holds() -> None:
    """In slowapi it does nothing."""
    app, limiter = build()

    @limiter.limit("1/minute")
    @app.get("/test")
    async def test(request: Request) -> str:
        return "hi"

    assert Site(app).statuses("/test", 2) == [200, 429]


def test_routes_that_are_added_while_it_serves_are_limited() -> None:
    """And a limiter that comes with them."""
    app, _ = build()
    late = Limiter(key_func=get_remote_address)
    site = Site(app)
    assert site.statuses("/late", 1) == [404]

    async def t(request: Request) -> str:
        return "test"

    app.get("/late")(late.limit("1/minute")(t))
    assert site.statuses("/late", 2) == [200, 429]


class Rewrite:
    """A middleware of the application that sends everything to one route."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(dict(scope) | {"path": "/t"}, receive, send)


def test_a_rewritten_path_keeps_the_limit_of_the_endpoint_that_runs() -> None:
    """By slowapi's own check, for the rate limit has counted another route."""
    app, limiter = build()
    app.add_middleware(Rewrite)

    @app.get("/t")
    @limiter.limit("2/minute")
    async def t(request: Request) -> str:
        return "test"

    @app.get("/elsewhere")
    @limiter.limit("9/minute")
    async def elsewhere(request: Request) -> str:
        return "test"

    # slowapi counts on the machine's clock.
    assert Site(app).statuses("/elsewhere", 3) == [200, 200, 429]


def test_a_websocket_handshake_is_refused_by_the_default() -> None:
    """Whatever the key function."""
    app, _ = build(key_func=lambda request: request.method + get_remote_address(request), default_limits=["1/minute"])

    @app.websocket("/talk")
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close()

    client = Site(app).client()
    with client.websocket_connect("/talk"):
        pass
    with pytest.raises(WebSocketDenialResponse) as refusal, client.websocket_connect("/talk"):
        raise AssertionError("was accepted")
    assert refusal.value.status_code == 429


def test_without_harden_slowapi_is_as_it_was() -> None:
    """Also with a limiter that a hardened application has as well; and where the rate limit is off."""
    app, limiter = build()

    @limiter.limit("1/minute")
    async def t(request: Request) -> Any:
        return PlainTextResponse("test")

    app.get("/t")(t)
    site = Site(app)
    assert site.statuses("/t", 2) == [200, 429]
    bare = FastAPI()
    bare.state.limiter = limiter
    bare.add_exception_handler(RateLimitExceeded, _rate_limit_exceeded_handler)  # type: ignore[arg-type]
    bare.add_middleware(SlowAPIMiddleware)
    bare.get("/t")(t)
    client = TestClient(bare)
    assert [client.get("/t").status_code for _ in range(2)] == [200, 429]
    off, other = build()
    off.add_middleware(SlowAPIMiddleware)
    off.get("/t")(other.limit("1/minute")(t.__wrapped__))
    assert Site(off, rate_limit={"enabled": False}).statuses("/t", 2) == [200, 429]
    assert len(off.user_middleware) == 1


def test_a_middleware_that_is_derived_from_slowapis_stays_and_counts_nothing_twice() -> None:
    """Its check finds that the rate limit has counted."""

    class Mine(SlowAPIMiddleware):
        pass

    app, _ = build(default_limits=["2/minute"])
    app.add_middleware(Mine)

    @app.get("/")
    async def t(request: Request) -> str:
        return "test"

    assert Site(app).statuses("/", 3) == [200, 200, 429]


def test_the_storage_of_slowapi_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    """Which is said, because each process counts for itself without ours."""
    app, limiter = build(storage_uri="redis://127.0.0.1:1", headers_enabled=True)

    @app.get("/")
    @limiter.limit("1/minute")
    async def t(request: Request) -> str:
        return "test"

    site = Site(app)
    with caplog.at_level(logging.WARNING):
        assert site.statuses("/", 2) == [200, 429]
    assert "storage_uri" in caplog.text
    assert site.client().get("/").json() == {"error": "Rate limit exceeded: 1 per 1 minute"}


# --- beside slowapi itself --------------------------------------------------------------------------------------------


def decorated_at_will(decorators: list[dict[str, Any] | None], defaults: list[str]) -> FastAPI:
    """An application with a route for each decorator, in the one shape in which slowapi misses nothing."""
    app, limiter = build(default_limits=defaults)
    app.add_middleware(SlowAPIMiddleware)
    for number, decorator in enumerate(decorators):

        async def endpoint(request: Request) -> Any:
            return PlainTextResponse("ok")

        endpoint.__name__ = f"endpoint{number}"
        chosen = endpoint if decorator is None else limiter.limit(**decorator)(endpoint)
        app.add_api_route(f"/{number}", chosen, methods=["GET", "POST"])
    return app


GET, POST = "GET", "POST"


# None of the defaults is a limit that a decorator has, too: slowapi counts such a one twice, and refuses the last.
@pytest.mark.parametrize(
    ("decorators", "defaults", "asked"),
    [
        ([None], ["4/day"], [(0, GET)] * 6),
        ([{"limit_value": "2/day"}, None], ["4/day"], [(0, GET), (1, GET), (0, POST), (0, GET), (1, GET), (1, POST)]),
        ([{"limit_value": "3/day", "cost": 2}], [], [(0, GET), (0, GET), (0, POST)]),
        ([{"limit_value": "1/day", "per_method": True}], [], [(0, GET), (0, POST), (0, GET), (0, POST)]),
        ([{"limit_value": "1/day", "methods": ["post"]}], ["5/day"], [(0, GET), (0, POST), (0, GET), (0, POST)]),
        ([{"limit_value": "3/day", "override_defaults": False}], ["4/day"], [(0, GET)] * 5),
        (
            [{"limit_value": "2/day"}, {"limit_value": "2/day"}, None],
            [],
            [(0, GET), (1, GET), (0, GET), (1, GET), (0, GET), (2, GET)],
        ),
    ],
)
def test_where_slowapi_looks_it_decides_the_same(
    decorators: list[dict[str, Any] | None], defaults: list[str], asked: list[tuple[int, str]]
) -> None:
    """Route by route, whatever its decorators say."""
    hardened = decorated_at_will(decorators, defaults)
    harden(hardened, Settings(_env_file=None), clock=ManualClock())
    theirs, ours = TestClient(decorated_at_will(decorators, defaults)), TestClient(hardened)
    for number, method in asked:
        path = f"/{number % len(decorators)}"
        assert ours.request(method, path).status_code == theirs.request(method, path).status_code, (method, path)


# --- the contract with slowapi ----------------------------------------------------------------------------------------


def test_slowapi_keeps_what_is_read_of_it() -> None:
    """Should this fail, slowapi has changed: read its new version, and mend ``security/slowapi_limits.py``."""
    limiter = Limiter(key_func=get_remote_address, default_limits=["1/minute"], application_limits=[lambda: "2/minute"])
    asked: list[tuple[Any, ...]] = []
    limiter._check_request_limit = lambda *arguments: asked.append(arguments)  # type: ignore[method-assign]

    @limiter.limit("3/minute; 4/hour", methods=["GET"])
    @limiter.shared_limit(lambda: "5/minute", scope="s")
    def t(request: Request) -> str:
        return "test"

    @limiter.exempt  # type: ignore[untyped-decorator]
    def free(request: Request) -> str:
        return "test"

    name = f"{t.__module__}.t"
    missing = [each for each in READ_OF_LIMITER if not hasattr(limiter, each)]
    assert not missing, f"slowapi's Limiter has no {missing} any more: slowapi_limits.py reads them"
    assert [str(each.limit) for each in limiter._route_limits[name]] == ["3 per 1 minute", "4 per 1 hour"]
    [group] = limiter._dynamic_route_limits[name]
    [made] = group.with_request(None)  # type: ignore[no-untyped-call]
    assert (str(made.limit), getattr(made, SCOPE), callable(getattr(group, PROVIDER))) == ("5 per 1 minute", "s", True)
    assert len(getattr(limiter, MARKED)[name]) == 2
    assert limiter._exempt_routes == {f"{free.__module__}.free"}
    assert [next(iter(each)).override_defaults for each in limiter._default_limits] == [False]
    assert limiter._header_mapping[4] == "Retry-After"
    request = Request({"type": "http", "state": {"view_rate_limit": None}})
    assert t(request=request) == "test"
    inner = t.__wrapped__
    assert asked == [(request, inner, False)], "slowapi's decorators no longer ask _check_request_limit for themselves"
    assert list(slowapi_limits._limiters_around(t)) == [limiter, limiter], "decorators no longer know their limiter"


def test_a_slowapi_that_cannot_be_read_is_refused_at_the_start() -> None:
    """With what to do."""
    app, limiter = build()
    site = Site(app)
    del limiter._exempt_routes
    with pytest.raises(ConfigurationError, match="this version of slowapi has no _exempt_routes"):
        TestClient(site.app).get("/")


def test_nothing_of_slowapi_is_needed_where_nobody_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor asked for."""
    app = FastAPI()
    assert Site(app).handle.declared_limits is None
    TestClient(app).get("/")
    monkeypatch.delitem(sys.modules, "slowapi")
    other = FastAPI()
    site = Site(other)
    assert site.statuses("/", 1) == [404]
    assert site.handle.declared_limits is None
