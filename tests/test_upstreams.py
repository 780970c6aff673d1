"""Upstreams: calls of other services through every layer, over real sockets."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from fastapi_hardening import ConfigurationError, Hardening, Settings, harden
from fastapi_hardening.core.outbound import Outgoing
from fastapi_hardening.harden import OUTBOUND
from fastapi_hardening.resilience.bulkhead import BulkheadFull
from fastapi_hardening.resilience.call_timeout import CallTimedOut
from fastapi_hardening.resilience.circuit_breaker import CircuitOpen
from fastapi_hardening.resilience.failover import CallHedged, EndpointEjected
from fastapi_hardening.resilience.retry import RetryScheduled
from fastapi_hardening.upstreams import Upstream, UpstreamSettings
from tests.small_server import DROP, HANG, Answer, Seen, SmallServer

QUICK: dict[str, Any] = {"retry": {"backoff_seconds": 0.001}, "total_seconds": 5, "attempt_seconds": 2}

ORDER = "total timeout, bulkhead, retry, failover, circuit breaker, attempt timeout, connection pool"


def test_the_order_of_the_layers_is_this() -> None:
    """Frozen: a timeout outside of a breaker, or a retry inside of it, is another thing."""
    assert [slot.name for slot in OUTBOUND] == ORDER.split(", ")
    assert all(slot.setting in UpstreamSettings.model_fields for slot in OUTBOUND)


Course = Callable[[Hardening, list[SmallServer]], Awaitable[Any]]


def run(course: Course, servers: int = 1, **changes: Any) -> Any:
    """Runs something with small servers, and an application whose upstream ``stock`` they are."""

    async def with_servers() -> Any:
        async with AsyncExitStack() as stack:
            running = [await stack.enter_async_context(SmallServer()) for _ in range(servers)]
            upstream = QUICK | {"base_urls": [server.url for server in running]} | changes
            handle = harden(FastAPI(), Settings(_env_file=None, upstreams={"stock": upstream}))
            stack.push_async_callback(handle.upstreams.close)
            return await course(handle, running)

    return asyncio.run(with_servers())


# --- one call ---------------------------------------------------------------------------------------------------------


def test_a_call_is_what_it_is_with_the_client_alone() -> None:
    """Path, query, header fields, body; status, header fields, decoded body and time of the answer."""

    async def course(handle: Hardening, servers: list[SmallServer]) -> None:
        client = handle.upstream("stock")
        servers[0].behave = lambda _: Answer(201, b'{"left":3}', (("Content-Type", "application/json"), ("X-A", "1")))
        answer = await client.post("/items/7?full=1", json={"by": 2}, headers={"X-B": "2"})
        assert (answer.status_code, answer.json(), answer.headers["x-a"]) == (201, {"left": 3}, "1")
        assert answer.elapsed.total_seconds() > 0
        assert str(answer.request.url) == "http://stock/items/7?full=1"
        [seen] = servers[0].seen
        assert (seen.method, seen.target, seen.body) == ("POST", "/items/7?full=1", b'{"by":2}')
        assert seen.headers["host"] == f"127.0.0.1:{servers[0].port}"
        assert seen.headers["x-b"] == "2"
        await client.get("/", headers={"Host": "shop.example"})
        assert servers[0].seen[-1].headers["host"] == "shop.example"
        assert servers[0].connections == 1, "the connection is kept"
        assert handle.upstream("stock") is client

    run(course)


def test_an_endpoint_may_have_a_path() -> None:
    """It stands before that of each request."""

    async def course(handle: Hardening, servers: list[SmallServer]) -> list[str]:
        upstream = {"base_urls": [f"{servers[0].url}/api/v2/"]}
        other = harden(FastAPI(), Settings(_env_file=None, upstreams={"stock": upstream}))
        await other.upstream("stock").get("/items", params={"q": "a b"})
        await other.upstreams.close()
        return [seen.target for seen in servers[0].seen]

    assert run(course) == ["/api/v2/items?q=a+b"]


def test_no_cookie_goes_with_the_call_of_another_user() -> None:
    """Unless it is sent with the call itself."""

    async def course(handle: Hardening, servers: list[SmallServer]) -> None:
        client = handle.upstream("stock")
        servers[0].behave = lambda _: Answer(headers=(("Set-Cookie", "session=anna; Path=/"),))
        assert (await client.get("/")).cookies["session"] == "anna"
        await client.get("/", headers={"Cookie": "own=1"})
        await client.get("/")
        assert [seen.headers.get("cookie") for seen in servers[0].seen] == [None, "own=1", None]

    run(course)


@pytest.mark.parametrize("target", ["http://169.254.169.254/latest", "https://stock/", "/redirect"])
def test_a_client_calls_its_upstream_only(target: str) -> None:
    """Neither an absolute URL nor a redirect leads elsewhere."""

    async def course(handle: Hardening, servers: list[SmallServer]) -> None:
        servers[0].behave = lambda _: Answer(302, headers=(("Location", "http://169.254.169.254/"),))
        with pytest.raises(httpx2.UnsupportedProtocol, match="'stock' only"):
            await handle.upstream("stock").get(target, follow_redirects=True)

    run(course)


def test_the_id_and_the_trace_of_the_request_go_along() -> None:
    """So that both logs are of one request; what the caller sets himself stays."""
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    seen: list[Seen] = []

    async def course(_handle: Hardening, servers: list[SmallServer]) -> None:
        app = FastAPI()
        handle = harden(app, Settings(_env_file=None, upstreams={"stock": QUICK | {"base_urls": [servers[0].url]}}))

        @app.get("/")
        async def index(own: bool = False) -> None:
            await handle.upstream("stock").get("/", headers={"X-Request-ID": "mine"} if own else {})

        transport = httpx2.ASGITransport(app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            answer = await client.get("/", headers={"traceparent": trace})
            await client.get("/?own=1", headers={"traceparent": "00-nonsense"})
        seen.extend(servers[0].seen)
        assert seen[0].headers["x-request-id"] == answer.headers["x-request-id"]
        await handle.upstreams.close()

    run(course)
    assert seen[0].headers["traceparent"] == trace
    assert seen[1].headers["x-request-id"] == "mine"
    assert "traceparent" not in seen[1].headers


def test_a_name_may_have_lines_in_it() -> None:
    """It is the host in the URLs of the client."""
    upstream = {"base_urls": "http://127.0.0.1:9"}
    handle = harden(FastAPI(), Settings(_env_file=None, upstreams={"stock-room_2": upstream, "7": upstream}))
    for name in ("stock-room_2", "7"):
        client = handle.upstream(name)
        assert client.build_request("GET", "/x").url.host == name


@pytest.mark.parametrize("status", [200, 503])
def test_a_call_is_a_span_under_the_request_that_needs_it(status: int) -> None:
    """One for all attempts, and the parent of what the other service does; without the query."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))

    async def course(_handle: Hardening, servers: list[SmallServer]) -> Seen:
        servers[0].behave = lambda _: Answer(status)
        app = FastAPI()
        upstream = QUICK | {"base_urls": [servers[0].url]}
        handle = harden(app, Settings(_env_file=None, upstreams={"stock": upstream}), tracer_provider=provider)

        @app.get("/")
        async def index() -> None:
            await handle.upstream("stock").get("/items?secret=1")

        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://test") as client:
            await client.get("/")
        await handle.upstreams.close()
        return servers[0].seen[-1]

    seen = run(course)
    call, request = exporter.get_finished_spans()
    assert (call.kind, request.kind) == (SpanKind.CLIENT, SpanKind.SERVER)
    assert call.parent is not None
    assert request.context is not None
    assert call.context is not None
    assert call.parent.span_id == request.context.span_id
    assert seen.headers["traceparent"].split("-")[2] == f"{call.context.span_id:016x}"
    assert dict(call.attributes or {}) == {
        "http.request.method": "GET",
        "http.response.status_code": status,
        "server.address": "stock",
        "url.full": "http://stock/items",
    }
    assert call.status.is_ok is (status == 200)


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", [Answer(503), DROP, Answer(200, b"0123456789", cut=5)], ids=str)
def test_what_may_be_repeated_is_tried_elsewhere(trouble: Answer) -> None:
    """After an answer 503, a connection that breaks, or one that breaks in the middle of the body."""

    async def course(handle: Hardening, servers: list[SmallServer]) -> None:
        for server in servers:
            server.behave = lambda _: trouble if sum(len(each.seen) for each in servers) == 1 else Answer()
        answer = await handle.upstream("stock").get("/")
        assert (answer.status_code, answer.text) == (200, "ok")
        assert sorted(len(server.seen) for server in servers) == [1, 1]
        assert handle.events.count(RetryScheduled) == 1

    run(course, servers=2)


@pytest.mark.parametrize("trouble", [Answer(503), DROP], ids=str)
def test_what_may_not_happen_twice_is_sent_once(trouble: Answer) -> None:
    """But for an Idempotency-Key."""

    async def course(handle: Hardening, servers: list[SmallServer]) -> None:
        client = handle.upstream("stock")
        for server in servers:
            server.behave = lambda _: trouble
        [outcome] = await asyncio.gather(client.post("/", json={}), return_exceptions=True)
        assert isinstance(outcome, httpx2.RemoteProtocolError if trouble.drop else httpx2.Response)
        assert sum(len(server.seen) for server in servers) == 1
        await asyncio.gather(client.post("/", json={}, headers={"Idempotency-Key": "7"}), return_exceptions=True)
        assert sum(len(server.seen) for server in servers) == 4

    run(course, servers=2)


def test_what_was_not_sent_is_tried_elsewhere_whatever_it_is() -> None:
    """No connection, so nothing has happened yet."""

    async def course(handle: Hardening, servers: list[SmallServer]) -> None:
        await servers[0].die()
        for number in range(6):
            assert (await handle.upstream("stock").post("/", json={"number": number})).status_code == 200
        assert len(servers[1].seen) == 6

    run(course, servers=2)


def test_a_body_from_a_generator_is_sent_once() -> None:
    """It is gone once it was sent."""

    async def body() -> AsyncIterator[bytes]:
        yield b"once"

    async def course(handle: Hardening, servers: list[SmallServer]) -> None:
        servers[0].behave = lambda _: Answer(503)
        assert (await handle.upstream("stock").put("/", content=body())).status_code == 503
        assert len(servers[0].seen) == 1

    run(course)


def test_an_endpoint_that_hangs_costs_one_attempt() -> None:
    """The attempt's timeout ends it, the breaker counts it, the next attempt goes elsewhere."""

    async def course(handle: Hardening, servers: list[SmallServer]) -> None:
        servers[0].behave = lambda _: HANG
        for _ in range(10):
            assert (await handle.upstream("stock").get("/")).status_code == 200
        failed = {snapshot.name: snapshot.failed for snapshot in handle.breakers.list()}
        assert failed[f"stock at {servers[0].url}"] == len(servers[0].seen) > 0

    run(course, servers=2, attempt_seconds=0.25, connections={"connect_seconds": 0.25})


def test_the_whole_call_has_an_end() -> None:
    """With all its attempts; then it is a problem 504."""

    async def course(handle: Hardening, servers: list[SmallServer]) -> None:
        servers[0].behave = lambda _: HANG
        with pytest.raises(CallTimedOut) as error:
            await handle.upstream("stock").get("/")
        assert error.value.status_code == 504

    run(
        course,
        total_seconds=0.05,
        attempt_seconds=0.05,
        bulkhead={"wait_seconds": 0.05},
        connections={"connect_seconds": 0.05},
    )


def test_an_upstream_that_fails_is_no_longer_called() -> None:
    """Its circuit opens, and the caller gets a problem 503; health warns."""

    async def course(handle: Hardening, servers: list[SmallServer]) -> None:
        servers[0].behave = lambda _: Answer(500)
        client = handle.upstream("stock")
        assert [(await client.get("/")).status_code for _ in range(3)] == [500] * 3
        with pytest.raises(CircuitOpen):
            await client.get("/")
        assert len(servers[0].seen) == 3
        assert handle.breakers.check().status == "warn"

    run(course, circuit_breaker={"minimum_calls": 3})


def test_too_many_calls_at_once_are_refused() -> None:
    """An answer that is streamed keeps its place until it is read."""

    async def course(handle: Hardening, servers: list[SmallServer]) -> None:
        client = handle.upstream("stock")
        places = handle.upstreams.get("stock").bulkhead.places
        async with client.stream("GET", "/") as answer:
            assert places.in_use == 1
            with pytest.raises(BulkheadFull):
                await client.get("/")
            assert await answer.aread() == b"ok"
        assert places.in_use == 0
        await servers[0].die()
        with pytest.raises(httpx2.TransportError):
            await client.get("/")
        assert places.in_use == 0

    run(course, bulkhead={"max_concurrent": 1, "max_waiting": 0})


def test_a_stream_is_tried_again_until_it_begins() -> None:
    """The answer that is given up is closed."""

    async def course(handle: Hardening, servers: list[SmallServer]) -> None:
        servers[0].behave = lambda _: Answer(503 if len(servers[0].seen) == 1 else 200, b"x" * 100)
        async with handle.upstream("stock").stream("GET", "/") as answer:
            assert b"".join([chunk async for chunk in answer.aiter_bytes()]) == b"x" * 100
        assert len(servers[0].seen) == 2

    run(course)


def test_a_slow_endpoint_is_hedged() -> None:
    """A GET is, a POST is not."""

    async def course(handle: Hardening, servers: list[SmallServer]) -> None:
        client = handle.upstream("stock")
        first: list[SmallServer] = []

        def behave_of(server: SmallServer) -> Callable[[Seen], Answer]:
            def behave(seen: Seen) -> Answer:
                first.append(server)
                return HANG if len(first) == 1 else Answer()

            return behave

        for server in servers:
            server.behave = behave_of(server)
        assert (await client.get("/")).text == "ok"
        assert len(first) == 2
        assert first[0] is not first[1]
        assert handle.events.count(CallHedged) == 1

    run(course, servers=2, failover={"hedge_after_seconds": 0.02})


def test_one_of_three_endpoints_dies_and_nobody_notices() -> None:
    """Not one of the calls fails; the endpoint is left out, and measured."""

    async def course(handle: Hardening, servers: list[SmallServer]) -> None:
        client = handle.upstream("stock")
        statuses: list[int] = []

        async def load() -> None:
            for _ in range(30):
                statuses.append((await client.get("/")).status_code)
                if len(statuses) == 100:
                    await servers[0].die()

        await asyncio.gather(*(load() for _ in range(10)))
        assert statuses == [200] * 300
        assert handle.events.count(EndpointEjected) <= 1
        metrics = handle.metrics.expose().decode()
        assert f'hardening_upstream_calls_total{{endpoint="{servers[1].url}",outcome="succeeded"' in metrics
        assert 'hardening_upstream_in_flight{endpoint="' in metrics

    run(course, servers=3)


# --- by name ----------------------------------------------------------------------------------------------------------


def test_an_upstream_that_is_not_in_the_settings_is_a_mistake() -> None:
    """The message guesses which one was meant; those that are in them are made at once."""
    handle = harden(FastAPI(), Settings(_env_file=None, upstreams={"stock": {"base_urls": "http://a"}}))
    with pytest.raises(KeyError, match="did you mean 'stock'"):
        handle.upstream("stokc")
    assert [upstream.name for upstream in handle.upstreams] == ["stock"]
    assert [snapshot.name for snapshot in handle.breakers.list()] == ["stock at http://a"]
    assert list(harden(FastAPI(), Settings(_env_file=None)).upstreams) == []


def test_health_warns_while_an_endpoint_is_left_out() -> None:
    """The application itself is well."""
    upstream = {"base_urls": "http://127.0.0.1:1,http://127.0.0.1:2"}
    handle = harden(FastAPI(), Settings(_env_file=None, upstreams={"stock": upstream}))
    failover = handle.upstreams.get("stock").failover
    assert handle.upstreams.check().status == "pass"
    failover._eject(failover.endpoints["http://127.0.0.1:1"])
    assert handle.upstreams.check().output == "stock: 1 of 2 endpoints left out: http://127.0.0.1:1"
    assert "upstreams" in [check.name for check in handle.checks]


def test_a_client_that_somebody_closed_is_made_anew() -> None:
    """``async with`` is how httpx2's own documentation uses one."""

    async def course(handle: Hardening, _servers: list[SmallServer]) -> None:
        for _ in range(2):
            async with handle.upstream("stock") as client:
                assert (await client.get("/")).status_code == 200

    run(course)


def test_connections_belong_to_their_event_loop() -> None:
    """A second loop opens its own; those of the application are closed with it."""
    upstream = {"stock": QUICK | {"base_urls": ["http://127.0.0.1:9"]}}
    app = FastAPI()
    handle = harden(app, Settings(_env_file=None, upstreams=upstream))
    pool = handle.upstreams.get("stock").pool

    async def open_one() -> Any:
        return await pool._transport("http://127.0.0.1:9")

    one, other = asyncio.run(open_one()), asyncio.run(open_one())
    assert one is not other
    with TestClient(app):
        pass
    assert pool._transports == {}


def test_certificates_are_read_for_https_only() -> None:
    """And once for all endpoints."""
    handle = harden(FastAPI(), Settings(_env_file=None, upstreams={"stock": {"base_urls": "https://a,https://b"}}))
    pool = handle.upstreams.get("stock").pool

    async def open_all() -> list[Any]:
        read = []
        for url in ("http://c", "https://a", "https://b"):
            await pool._transport(url)
            read.append(pool._tls)
        await pool.aclose()
        return read

    none, first, second = asyncio.run(open_all())
    assert none is None
    assert first is second is not None


def test_settings_come_from_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Endpoint by endpoint, key by key."""
    monkeypatch.setenv("HARDENING_UPSTREAMS__STOCK__BASE_URLS", "http://10.0.0.1:8000, http://10.0.0.2:8000/api")
    monkeypatch.setenv("HARDENING_UPSTREAMS__STOCK__RETRY__ATTEMPTS", "5")
    settings = Settings(_env_file=None, upstreams={"stock": {"retry": {"budget_ratio": 0.1}}})
    stock = settings.upstreams["stock"]
    assert stock.base_urls == ("http://10.0.0.1:8000", "http://10.0.0.2:8000/api")
    assert (stock.retry.attempts, stock.retry.budget_ratio) == (5, 0.1)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"attempt_seconds": 40}, "above total_seconds"),
        ({"connections": {"connect_seconds": 11}}, "above attempt_seconds"),
        ({"bulkhead": {"wait_seconds": 31}}, "wait_seconds is above total_seconds"),
        ({"bulkhead": {"max_concurrent": 101}}, "where nothing is fair"),
        ({"failover": {"hedge_after_seconds": 10}}, "nothing would be hedged"),
        ({"circuit_breaker": {"window_seconds": 10}}, "forgotten too early"),
        ({"base_urls": ["ftp://a"]}, "is no address such as"),
        ({"base_urls": ["http://u:p@a"]}, "no query, fragment or credentials"),
        ({"base_urls": ["http://a", "http://a"]}, "twice"),
        ({"base_urls": []}, "at least 1 item"),
        ({"base_url": "http://a"}, "did you mean 'base_urls'"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_together_are_refused(changes: dict[str, Any], sentence: str) -> None:
    """When they are made, with the sentence that mends them; a secret in them is not repeated."""
    with pytest.raises(ConfigurationError, match=sentence) as error:
        Settings(_env_file=None, upstreams={"stock": {"base_urls": ["http://a"]} | changes})
    assert "u:p" not in str(error.value)


def test_a_name_is_one_that_fits_everywhere() -> None:
    """In a URL and in a variable of the environment."""
    with pytest.raises(ConfigurationError, match="lower-case letters"):
        Settings(_env_file=None, upstreams={"Stock Room": {"base_urls": ["http://a"]}})


def test_a_list_without_a_last_layer_says_so() -> None:
    """The innermost one sends the request."""

    async def course(handle: Hardening, _servers: list[SmallServer]) -> None:
        upstream = handle.upstreams.get("stock")
        with pytest.raises(ConfigurationError, match="innermost"):
            await upstream._nowhere(Outgoing("a request"))

    run(course)


def test_retries_are_off_where_all_are(caplog: pytest.LogCaptureFixture) -> None:
    """By the switch of the concern."""
    caplog.set_level(logging.CRITICAL)
    settings = Settings(_env_file=None, retry={"enabled": False}, upstreams={"stock": {"base_urls": "http://a"}})
    upstream: Upstream = harden(FastAPI(), settings).upstreams.get("stock")
    assert upstream.retry.settings.attempts == 1
