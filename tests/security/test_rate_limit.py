"""Rate limits: who is counted together, what is said, who gets round."""

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI, Request, WebSocket
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection
from starlette.routing import Route
from starlette.testclient import TestClient, WebSocketDenialResponse

from fastapi_hardening import RateLimit
from fastapi_hardening.core import context as request_context
from fastapi_hardening.core.client_ip import ClientAddressResolver
from fastapi_hardening.core.clock import ManualClock
from fastapi_hardening.core.events import Events, RequestRefused
from fastapi_hardening.core.identity import Principal
from fastapi_hardening.core.window import parse_limits
from fastapi_hardening.observability.request_context import (
    ContextMaker,
    RequestContextMiddleware,
    RequestIdSettings,
)
from fastapi_hardening.security.address_limit import AddressLimitMiddleware, AddressLimitSettings
from fastapi_hardening.security.rate_limit import (
    Budget,
    InFlight,
    RateLimitMiddleware,
    RateLimitSettings,
    Together,
)


class Kit:
    """An application with the layer and a clock that can be moved."""

    def __init__(self, app: Any = None, **changes: Any) -> None:
        self.clock = ManualClock()
        self.events = Events()
        self.app: Any = app or FastAPI()
        self.app.add_middleware(RateLimitMiddleware, settings=RateLimitSettings(**changes), clock=self.clock)
        maker = ContextMaker(RequestIdSettings(), events=self.events)
        self.app.add_middleware(RequestContextMiddleware, maker=maker)

    def client(self, address: str = "203.0.113.1") -> TestClient:
        return TestClient(self.app, client=(address, 1))

    def statuses(self, path: str, times: int, address: str = "203.0.113.1", **headers: str) -> list[int]:
        client = self.client(address)
        return [client.get(path, headers=headers).status_code for _ in range(times)]


async def _ok() -> str:
    return "ok"


# --- engine -----------------------------------------------------------------------------------------------------------


def test_several_limits_spend_all_or_nothing() -> None:
    """What one refuses costs the others nothing."""
    clock = ManualClock()
    budget = Budget(parse_limits("2/second; 10/day"), clock=clock)
    for _ in range(5):
        budget.hit("k")
    assert [decision.remaining for decision in budget.hit("k", cost=0)] == [0, 8]


def test_budgets_that_hold_together_refuse_as_the_one_that_takes_longest() -> None:
    """And are the same as those of the next request."""
    clock = ManualClock()
    budgets = tuple(Budget(parse_limits(text), clock=clock) for text in ("1/second", "1/hour", "9/day"))
    together = Together(budgets)
    for budget in budgets:
        budget.hit("k")
    decisions = [decision for budget in budgets for decision in budget.hit("k")]
    problem = together.problem(decisions)
    assert (problem.headers, problem.extensions) == ({"Retry-After": "3600"}, {"violated-policies": ["1/hour"]})
    assert {Together(budgets): 1}[together] == 1


def test_requests_under_way_are_counted_and_forgotten() -> None:
    """A key without any takes no place."""
    flights = InFlight()
    assert [flights.enter("a", 2) for _ in range(3)] == [True, True, False]
    assert flights.enter("b", 1)
    for key in ("a", "a", "b"):
        flights.leave(key)
    assert flights._counts == {}


# --- what the client sees ---------------------------------------------------------------------------------------------


def parse_list(text: str) -> list[tuple[str, dict[str, int]]]:
    """A structured-field list of strings with integer parameters (RFC 9651), strictly."""
    members = []
    for member in text.split(", "):
        name, *parameters = member.split(";")
        assert name.startswith('"')
        assert name.endswith('"')
        assert name.isascii()
        pairs = [parameter.partition("=")[::2] for parameter in parameters]
        assert all(key.islower() and key.isalpha() and value.isdigit() for key, value in pairs)
        members.append((name[1:-1], {key: int(value) for key, value in pairs}))
    return members


def test_within_the_limit_an_answer_says_what_is_left() -> None:
    """The two fields of the draft, and never when to come back."""
    kit = Kit(default="3/minute; 100/day")
    kit.app.get("/")(_ok)
    headers = kit.client().get("/").headers
    assert parse_list(headers["ratelimit-policy"]) == [
        ("default 3/minute", {"q": 3, "w": 60}),
        ("default 100/day", {"q": 100, "w": 86400}),
    ]
    assert parse_list(headers["ratelimit"]) == [
        ("default 3/minute", {"r": 2, "t": 20}),
        ("default 100/day", {"r": 99, "t": 864}),
    ]
    assert "retry-after" not in headers


def test_over_the_limit_a_refusal_says_which_and_when() -> None:
    """429, the time to the next permit, the violated policies; the time is not less than the field's own."""
    kit = Kit(default="2/minute")
    client = kit.client()
    answers = [client.get("/nope") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [404, 404, 429]
    refusal = answers[-1]
    assert refusal.json()["type"] == "https://iana.org/assignments/http-problem-types#quota-exceeded"
    assert refusal.json()["violated-policies"] == ["default"]
    assert refusal.headers["retry-after"] == "30"
    assert parse_list(refusal.headers["ratelimit"]) == [("default", {"r": 0, "t": 30})]
    kit.clock.advance(29)
    assert client.get("/nope").headers["retry-after"] == "1"
    kit.clock.advance(1)
    assert client.get("/nope").status_code == 404


def test_a_cost_above_the_quota_is_told_a_time_too() -> None:
    """Though it can never pass; a 429 always says when to come back."""
    kit = Kit()
    kit.app.get("/", dependencies=[RateLimit("2/minute", cost=3)])(_ok)
    answer = kit.client().get("/")
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "60")


def test_the_applications_own_handler_writes_the_refusal() -> None:
    """The fields are there all the same."""
    kit = Kit(default="1/minute")

    async def mine(request: Request, problem: Exception) -> PlainTextResponse:
        return PlainTextResponse("slow down", status_code=429)

    kit.app.add_exception_handler(429, mine)
    kit.statuses("/", 1)
    answer = kit.client().get("/")
    assert answer.text == "slow down"
    assert "ratelimit" in answer.headers


def test_a_refusal_is_counted_with_its_reason() -> None:
    """On the event bus, with layer and type."""
    kit = Kit(default="1/minute")
    seen: list[RequestRefused] = []
    kit.events.subscribe(RequestRefused, seen.append)
    kit.statuses("/", 2)
    assert [(event.layer, event.problem, event.status) for event in seen] == [("rate limit", "quota-exceeded", 429)]


def test_in_report_only_mode_everybody_passes_and_refusals_are_told() -> None:
    """To see what a limit would do."""
    kit = Kit(default="1/minute", report_only=True)
    seen: list[RequestRefused] = []
    kit.events.subscribe(RequestRefused, seen.append)
    assert kit.statuses("/", 3) == [404, 404, 404]
    assert [event.layer for event in seen] == ["rate limit (report only)"] * 2


def test_the_fields_may_be_left_out() -> None:
    """Where nobody should know the limits."""
    kit = Kit(default="1/minute", headers=False)
    answers = [kit.client().get("/") for _ in range(2)]
    assert all("ratelimit" not in answer.headers for answer in answers)
    assert "retry-after" in answers[1].headers


def test_switched_off_nothing_is_counted() -> None:
    """Nor said."""
    kit = Kit(default="1/minute", enabled=False)
    assert kit.statuses("/", 3) == [404, 404, 404]


# --- whose budget -----------------------------------------------------------------------------------------------------


def test_each_address_has_its_own_budget_and_ipv6_is_one_client_by_its_64() -> None:
    """Rotating through a /64 gets nobody further."""
    kit = Kit(default="1/minute")
    assert kit.statuses("/", 2, "203.0.113.1") == [404, 429]
    assert kit.statuses("/", 1, "203.0.113.2") == [404]
    assert kit.statuses("/", 1, "2001:db8::1") + kit.statuses("/", 1, "2001:db8::ffff") == [404, 429]
    assert kit.statuses("/", 1, "2001:db8:0:1::1") == [404]


def test_requests_without_an_address_share_one_budget() -> None:
    """Not knowing the client is no way round."""
    kit = Kit(default="1/minute")
    statuses = []
    for _ in range(2):

        async def nameless(scope: Any, receive: Any, send: Any) -> None:
            await kit.app(dict(scope) | {"client": None}, receive, send)

        statuses.append(TestClient(nameless).get("/").status_code)
    assert statuses == [404, 429]


def test_a_spoofed_forwarding_header_changes_nothing() -> None:
    """Neither one line nor many."""
    kit = Kit(default="1/minute")
    client = kit.client("8.8.8.8")
    statuses = [client.get("/", headers={"X-Forwarded-For": f"1.1.1.{number}"}).status_code for number in range(3)]
    assert statuses == [404, 429, 429]


@pytest.mark.parametrize("hops", [1, 2])
def test_behind_trusted_proxies_clients_are_told_apart(hops: int) -> None:
    """And what the client wrote to the left of them is not believed."""
    app = FastAPI()
    app.add_middleware(RateLimitMiddleware, settings=RateLimitSettings(default="1/minute"))
    maker = ContextMaker(RequestIdSettings(), client_addresses=ClientAddressResolver(["10.0.0.0/8"]))
    app.add_middleware(RequestContextMiddleware, maker=maker)
    client = TestClient(app, client=("10.0.0.1", 1))
    chain = ", 10.0.0.2" * (hops - 1)

    def status(claimed: str, address: str) -> int:
        return client.get("/", headers={"X-Forwarded-For": f"{claimed}, {address}{chain}"}).status_code

    assert [status("1.1.1.1", "203.0.113.1"), status("2.2.2.2", "203.0.113.1")] == [404, 429]
    assert status("1.1.1.1", "203.0.113.2") == 404


def test_an_unknown_proxy_has_a_wider_default_and_the_same_overrides() -> None:
    """The day behind a load balancer is no outage, and the login is still guarded."""
    kit = Kit(default="1/minute", unknown_proxy_factor=5)
    kit.app.get("/login", dependencies=[RateLimit("2/minute")])(_ok)
    assert kit.statuses("/", 6, "10.0.0.1", **{"X-Forwarded-For": "203.0.113.9"}) == [404] * 5 + [429]
    assert kit.statuses("/login", 3, "10.0.0.1", **{"X-Forwarded-For": "203.0.113.9"}) == [200, 200, 429]


def test_a_key_may_come_from_a_header_and_who_sends_none_is_counted_by_address() -> None:
    """Leaving it out is no way round, nor is writing somebody's address into it."""
    kit = Kit(default="1/minute", key="header:X-API-Key")
    assert kit.statuses("/", 2, **{"X-API-Key": "a"}) == [404, 429]
    assert kit.statuses("/", 1, **{"X-API-Key": "b" * 500}) == [404]
    assert kit.statuses("/", 1, **{"X-API-Key": "203.0.113.1"}) == [404]
    assert kit.statuses("/", 2) == [404, 429]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_key_may_come_from_a_function(asynchronous: bool) -> None:
    """Of the connection; sync or async."""

    def by_session(connection: HTTPConnection) -> str | None:
        return connection.cookies.get("session")

    async def by_session_later(connection: HTTPConnection) -> str | None:
        return connection.cookies.get("session")

    kit = Kit()
    kit.app.get("/", dependencies=[RateLimit("1/minute", key=by_session_later if asynchronous else by_session)])(_ok)
    assert kit.statuses("/", 2, Cookie="session=a") == [200, 429]
    assert kit.statuses("/", 1, Cookie="session=b") == [200]
    assert kit.statuses("/", 2) == [200, 429]


class Identified:
    """A layer in front that knows who calls, as authentication will."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        name, _, plan = dict(scope["headers"]).get(b"x-user", b"").decode().partition(":")
        if name:
            scope["fastapi_hardening.context"].principal = Principal(name, tenant="acme", claims={"plan": plan})
        await self.app(scope, receive, send)


def identified(**changes: Any) -> Kit:
    """An application whose callers are known before the limit."""
    kit = Kit(**changes)
    kit.app.user_middleware.insert(1, Middleware(Identified))
    return kit


def test_a_principal_has_one_budget_wherever_it_calls_from() -> None:
    """And who is not known is counted by address."""
    kit = identified(default="1/minute", key="principal")
    assert kit.statuses("/", 1, **{"X-User": "anna"}) + kit.statuses("/", 1, "203.0.113.2", **{"X-User": "anna"}) == [
        404,
        429,
    ]
    assert kit.statuses("/", 2) == [404, 429]


def test_keys_may_be_combined() -> None:
    """Each combination is counted by itself."""
    kit = identified()
    kit.app.get("/", dependencies=[RateLimit("1/minute", key=("principal", "address"))])(_ok)
    assert kit.statuses("/", 2, **{"X-User": "anna"}) == [200, 429]
    assert kit.statuses("/", 1, "203.0.113.2", **{"X-User": "anna"}) == [200]
    assert kit.statuses("/", 1, **{"X-User": "bert"}) + kit.statuses("/", 2) == [200, 200, 429]


def test_the_settings_read_keys_and_clients_as_the_environment_has_them() -> None:
    """With commas."""
    read = RateLimitSettings(key="principal, address", allow="10.0.0.0/8, principal=monitor")  # type: ignore[arg-type]
    assert (read.key, read.allow) == (("principal", "address"), ("10.0.0.0/8", "principal=monitor"))
    with pytest.raises(ValueError, match="network"):
        RateLimitSettings(allow=("nobody",))


def test_who_is_known_is_told_apart_behind_an_unknown_proxy_too() -> None:
    """Only those who are not share the wider default of the proxy."""
    kit = identified(default="1/minute", key="principal", unknown_proxy_factor=3)
    forwarded = {"X-Forwarded-For": "203.0.113.9"}
    assert kit.statuses("/", 2, "10.0.0.1", **forwarded, **{"X-User": "anna"}) == [404, 429]
    assert kit.statuses("/", 4, "10.0.0.1", **forwarded) == [404, 404, 404, 429]


PLANS = {"free": "1/minute", "paid": ("3/minute", "100/day")}


@pytest.mark.parametrize("asynchronous", [True, False])
def test_limits_may_follow_the_plan_of_the_caller(asynchronous: bool) -> None:
    """By a function of the connection, sync or async; where it gives nothing, the default holds."""

    def of_plan(connection: HTTPConnection) -> Any:
        principal = request_context.ensure(connection.scope).principal
        return PLANS.get(principal.claims["plan"]) if principal else None

    async def of_plan_later(connection: HTTPConnection) -> Any:
        return of_plan(connection)

    kit = identified(default="2/minute")
    limit = RateLimit(of_plan_later if asynchronous else of_plan, key="principal", name="plan")
    kit.app.get("/", dependencies=[limit])(_ok)
    assert kit.statuses("/", 2, **{"X-User": "anna:free"}) == [200, 429]
    assert kit.statuses("/", 4, **{"X-User": "bert:paid"}) == [200, 200, 200, 429]
    assert kit.statuses("/", 3) == [200, 200, 429]
    answer = kit.client().get("/", headers={"X-User": "carl:paid"})
    assert [name for name, _ in parse_list(answer.headers["ratelimit-policy"])] == ["plan 3/minute", "plan 100/day"]


@pytest.mark.parametrize("wrong", ["many", "0/minute", ["5/minute", "few"], KeyError])
def test_a_function_that_gives_no_limit_gives_way_to_the_default(wrong: Any, caplog: pytest.LogCaptureFixture) -> None:
    """No 500, no request without a limit, and one record in the log."""

    def failing(connection: HTTPConnection) -> Any:
        if wrong is KeyError:
            raise KeyError("plan")
        return wrong

    kit = Kit(default="2/minute")
    kit.app.get("/", dependencies=[RateLimit(failing)])(_ok)
    assert kit.statuses("/", 3) == [200, 200, 429]
    assert [record.levelname for record in caplog.records if "default holds" in record.message] == ["ERROR"]


def test_a_function_cannot_fill_the_memory_with_limits(caplog: pytest.LogCaptureFixture) -> None:
    """After a thousand different ones the default holds."""
    layer = RateLimitMiddleware(FastAPI(), RateLimitSettings(default="1/minute"))
    numbers = itertools.count(2)
    override = RateLimit(lambda _connection: f"{next(numbers)}/hour")
    scope = {"type": "http", "headers": [], "client": ("203.0.113.1", 1)}

    async def story() -> list[int]:
        context = request_context.ensure(scope)
        asked = [await layer.ask(override, scope, context) for _ in range(1002)]
        return [each.budget.limits[0].quota for [each] in asked]

    assert asyncio.run(story()) == [*range(2, 1002), 1, 1]
    assert caplog.text.count("more than 1000 different limits") == 1


def test_dynamic_limits_of_one_scope_share_a_budget() -> None:
    """If the function gives the same."""
    kit = Kit()
    for path in ("/a", "/b"):
        kit.app.get(path, dependencies=[RateLimit(lambda _connection: "1/minute", scope="s")])(_ok)
    assert kit.statuses("/a", 1) + kit.statuses("/b", 1) == [200, 429]


def test_a_dynamic_limit_counts_after_routing_too() -> None:
    """On an application that was never hardened."""
    app = FastAPI()
    app.get("/", dependencies=[RateLimit(lambda _connection: "1/minute")])(_ok)
    client = TestClient(app)
    assert [client.get("/").status_code for _ in range(2)] == [200, 429]


def test_who_is_allowed_is_never_limited() -> None:
    """By address, by key, and by an override that acts late; everybody else is."""
    app = FastAPI()
    app.add_middleware(Rewrite)
    app.get("/r/inner", dependencies=[RateLimit("1/minute", key="principal")])(_ok)
    kit = Kit(app, default="1/minute", key="principal", allow=("10.0.0.0/8", "principal=monitor"))
    kit.app.user_middleware.insert(1, Middleware(Identified))
    for path in ("/", "/r/inner"):
        assert kit.statuses(path, 3, "10.1.2.3") == [200] * 3
        assert kit.statuses(path, 3, **{"X-User": "monitor"}) == [200] * 3
    assert kit.statuses("/", 2, **{"X-User": "anna"}) == [200, 429]


# --- overrides --------------------------------------------------------------------------------------------------------


def levels() -> Kit:
    kit = Kit(default="2/minute")
    router = APIRouter(dependencies=[RateLimit("3/minute")])
    router.get("/a/{number}")(_ok)
    router.get("/b")(_ok)
    router.get("/inner", dependencies=[RateLimit("1/minute")])(_ok)
    router.get("/free", dependencies=[RateLimit.exempt])(_ok)

    @router.websocket("/talk")
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close()

    kit.app.include_router(router, prefix="/r")
    kit.app.mount("/mounted", Starlette(routes=[Route("/x", lambda request: PlainTextResponse("ok"))]))
    return kit


def test_one_declaration_is_one_budget_for_all_its_routes() -> None:
    """By template: no concrete path has a bucket of its own."""
    kit = levels()
    assert kit.statuses("/r/a/1", 1) + kit.statuses("/r/a/2", 1) + kit.statuses("/r/b", 2) == [200, 200, 200, 429]


def test_the_innermost_counts_and_the_default_is_untouched_by_it() -> None:
    """A route's own limit stands in place of the router's."""
    kit = levels()
    assert kit.statuses("/r/inner", 2) == [200, 429]
    assert kit.statuses("/r/free", 9) == [200] * 9
    assert kit.statuses("/nope", 3) == [404, 404, 429]


def test_the_405_of_a_route_is_counted_with_the_route() -> None:
    """So is what is mounted, with the default."""
    kit = levels()
    client = kit.client()
    assert [client.post("/r/inner").status_code for _ in range(2)] == [405, 429]
    assert kit.statuses("/mounted/x", 3) == [200, 200, 429]


def test_a_websocket_handshake_is_refused_by_an_http_answer() -> None:
    """With the fields and the problem that a request would get."""
    kit = levels()
    client = kit.client()
    for _ in range(3):
        with client.websocket_connect("/r/talk"):
            continue
    with pytest.raises(WebSocketDenialResponse) as refusal, client.websocket_connect("/r/talk"):
        raise AssertionError("was accepted")
    assert refusal.value.status_code == 429
    assert refusal.value.headers["retry-after"] == "20"


def test_declarations_of_one_scope_share_a_budget() -> None:
    """If their limits are the same."""
    kit = Kit()
    for path, limit in (("/a", "2/minute"), ("/b", "2/minute"), ("/c", "3/minute")):
        kit.app.get(path, dependencies=[RateLimit(limit, scope="login")])(_ok)
    assert kit.statuses("/a", 1) + kit.statuses("/b", 2) == [200, 200, 429]
    assert kit.statuses("/c", 1) == [200]


def test_a_request_may_cost_more() -> None:
    """A number, or what a function of the connection says."""
    kit = Kit()
    kit.app.get("/", dependencies=[RateLimit("10/minute", cost=lambda c: int(c.query_params.get("n", 1)))])(_ok)
    assert kit.statuses("/?n=8", 1) + kit.statuses("/?n=3", 1) + kit.statuses("/?n=2", 1) == [200, 429, 200]
    assert kit.statuses("/?n=-5", 1) + kit.statuses("/", 1) == [200, 429]


@pytest.mark.parametrize("strategy", ["fixed-window", "sliding-window"])
def test_a_route_may_be_counted_another_way(strategy: Any) -> None:
    """Than the settings say."""
    kit = Kit()
    kit.app.get("/", dependencies=[RateLimit("2/minute", strategy=strategy)])(_ok)
    assert kit.statuses("/", 3) == [200, 200, 429]


@pytest.mark.parametrize(
    "declare",
    [
        lambda: RateLimit("many"),
        lambda: RateLimit(""),
        lambda: RateLimit("5/minute", key="adress"),
        lambda: RateLimit("5/minute", key="header:X Key"),
        lambda: RateLimit("5/minute", name='"'),
        lambda: RateLimitSettings(default="0/minute"),
        lambda: RateLimitSettings(key="cookie"),
        lambda: AddressLimitSettings(limit="1/second; 2/day"),
    ],
)
def test_what_cannot_be_a_limit_is_refused_where_it_is_written(declare: Callable[[], object]) -> None:
    """Not by the first request."""
    with pytest.raises(ValueError, match=r"limit|key|header|value"):
        declare()


class Rewrite:
    """A middleware of the application that sends everything to one route."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(dict(scope) | {"path": "/r/inner"}, receive, send)


def test_a_rewritten_path_keeps_the_limit_of_the_route_that_runs() -> None:
    """With the counters of the layer, and the fields of the limit that counted."""
    app = FastAPI()
    app.add_middleware(Rewrite)
    router = APIRouter(prefix="/r")
    router.get("/inner", dependencies=[RateLimit("1/minute", name="inner")])(_ok)
    app.include_router(router)
    kit = Kit(app)
    answers = [kit.client().get("/elsewhere") for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 429]
    assert parse_list(answers[0].headers["ratelimit-policy"]) == [("inner", {"q": 1, "w": 60})]


def test_on_an_application_that_was_never_hardened_an_override_counts_by_itself() -> None:
    """The innermost, with the fields and the problem; an exemption does nothing."""
    app = FastAPI(dependencies=[RateLimit("9/minute")])
    app.get("/", dependencies=[RateLimit("1/minute")])(_ok)
    app.get("/free", dependencies=[RateLimit.exempt])(_ok)
    client = TestClient(app)
    answers = [client.get("/") for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 429]
    assert answers[0].headers["ratelimit"] == '"1/minute";r=0;t=60'
    assert answers[1].headers["retry-after"] == "60"
    assert client.get("/free").status_code == 200


def test_it_works_alone_on_starlette() -> None:
    """Lifespan and all."""
    app = Starlette(routes=[Route("/", lambda request: JSONResponse({}))])
    app.add_middleware(RateLimitMiddleware, settings=RateLimitSettings(default="1/minute"))
    with TestClient(app) as client:
        assert [client.get("/").status_code for _ in range(2)] == [200, 429]


# --- at the same time -------------------------------------------------------------------------------------------------


async def _never() -> Any:
    return await asyncio.Event().wait()


def test_so_many_requests_of_a_client_are_served_at_the_same_time() -> None:  # noqa: C901 - one story
    """The place is free again with the last byte, before background tasks, and also after a failure."""

    async def story() -> None:
        kit = Kit(concurrent=1)
        gate, background = asyncio.Event(), asyncio.Event()

        async def waits() -> StreamingResponse:
            async def parts() -> Any:
                yield b"a"
                await gate.wait()

            return StreamingResponse(parts(), background=BackgroundTask(background.wait))

        async def fails() -> None:
            raise RuntimeError("no")

        kit.app.get("/waits")(waits)
        kit.app.get("/fails")(fails)
        statuses: list[int] = []
        ended = asyncio.Event()

        async def ask(path: str) -> None:
            async def send(message: Any) -> None:
                if message["type"] == "http.response.start":
                    statuses.append(message["status"])
                elif not message.get("more_body"):
                    ended.set()

            scope = {"type": "http", "method": "GET", "path": path, "query_string": b"", "headers": []}
            await kit.app(scope | {"client": ("203.0.113.1", 1)}, _never, send)

        first = asyncio.create_task(ask("/waits"))
        async with asyncio.timeout(5):
            while not statuses:  # noqa: ASYNC110 - until the stream has begun, whatever that takes
                await asyncio.sleep(0)
            await ask("/nope")
            ended.clear()
            gate.set()
            await ended.wait()
            await ask("/nope")
            for _ in range(2):
                with pytest.raises(RuntimeError):
                    await ask("/fails")
            background.set()
            await first
        assert statuses == [200, 429, 404, 500, 500]

    asyncio.run(story())


def test_a_route_may_have_its_own_number_at_the_same_time() -> None:
    """Which stands in place of the setting."""
    kit = Kit(concurrent=1)
    kit.app.get("/", dependencies=[RateLimit("9/minute", concurrent=3)])(_ok)
    kit.app.get("/any", dependencies=[RateLimit("9/minute")])(_ok)
    assert kit.statuses("/", 3) + kit.statuses("/any", 3) == [200] * 6


# --- the flood guard --------------------------------------------------------------------------------------------------


def guarded(**changes: Any) -> Kit:
    kit = Kit.__new__(Kit)
    kit.clock, kit.events, kit.app = ManualClock(), Events(), FastAPI()
    kit.app.add_middleware(AddressLimitMiddleware, settings=AddressLimitSettings(**changes), clock=kit.clock)
    kit.app.add_middleware(RequestContextMiddleware, maker=ContextMaker(RequestIdSettings(), events=kit.events))
    return kit


def test_a_flood_from_one_address_is_refused_and_others_are_not() -> None:
    """With a problem of its own, and the time to come back."""
    kit = guarded(limit="2/minute")
    assert kit.statuses("/", 3) == [404, 404, 429]
    assert kit.statuses("/", 1, "203.0.113.2") == [404]
    answer = kit.client().get("/")
    assert answer.json()["type"].endswith("#abnormal-usage-detected")
    assert answer.headers["retry-after"] == "30"
    with pytest.raises(WebSocketDenialResponse), kit.client().websocket_connect("/"):
        raise AssertionError("was accepted")


def test_the_flood_guard_is_wider_for_an_unknown_proxy_may_only_report_and_be_off() -> None:
    """As the rate limit."""
    kit = guarded(limit="1/minute", unknown_proxy_factor=3)
    assert kit.statuses("/", 4, "10.0.0.1", **{"X-Forwarded-For": "1.1.1.1"}) == [404, 404, 404, 429]
    reporting = guarded(limit="1/minute", report_only=True)
    assert reporting.statuses("/", 3) == [404] * 3
    assert reporting.events.count(RequestRefused) == 2
    assert guarded(limit="1/minute", enabled=False).statuses("/", 3) == [404] * 3


def test_the_flood_guard_works_alone_on_starlette() -> None:
    """Lifespan and all."""
    app = Starlette()
    app.add_middleware(AddressLimitMiddleware, settings=AddressLimitSettings(limit="1/minute"))
    with TestClient(app) as client:
        assert [client.get("/").status_code for _ in range(2)] == [404, 429]
