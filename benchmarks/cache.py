"""What caching brings and costs: `scripts/bench cache [--quick]`.

It prints what the layer of a hit takes, how many times more requests a second an endpoint answers that works for a
millisecond, how many calls a thousand misses make that come together, and what a value of `handle.cache` costs.
"""

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI
from starlette.types import Message, Receive, Scope, Send

from fastapi_hardening import CacheResponse, Settings, harden
from fastapi_hardening.core import context as request_context
from fastapi_hardening.core.routes import route_of
from fastapi_hardening.performance.cache import Cache
from fastapi_hardening.performance.response_cache import ResponseCacheMiddleware

FIELDS = [
    (b"host", b"shop.test"),
    (b"user-agent", b"Mozilla/5.0"),
    (b"accept", b"*/*"),
    (b"accept-encoding", b"gzip, br"),
    (b"accept-language", b"de"),
    (b"connection", b"keep-alive"),
    (b"sec-fetch-mode", b"cors"),
    (b"referer", b"https://shop.test/"),
]


def scope_of(app: FastAPI, path: str) -> Scope:
    scope: dict[str, Any] = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http"}
    scope |= {"method": "GET", "path": path, "raw_path": path.encode(), "query_string": b"page=1", "headers": FIELDS}
    return scope | {"client": ("203.0.113.9", 40000), "server": ("127.0.0.1", 8000), "app": app, "root_path": ""}


async def receive() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


async def send(_message: Message) -> None:
    pass


async def microseconds(work: Callable[[], Awaitable[Any]], number: int) -> float:
    started = time.perf_counter()
    for _ in range(number):
        await work()
    return (time.perf_counter() - started) / number * 1e6


def shop(override: CacheResponse | None) -> FastAPI:
    """A hardened application with an endpoint that works for a millisecond."""
    app = FastAPI()
    harden(
        app, Settings(rate_limit={"enabled": False}, address_limit={"enabled": False}, access_log={"enabled": False})
    )

    @app.get("/items", dependencies=[override] if override else [])
    async def items() -> dict[str, int]:
        until = time.perf_counter() + 0.001
        while time.perf_counter() < until:
            pass
        return {"items": 1}

    return app


async def layer_of_a_hit(number: int) -> float:
    app = FastAPI()
    app.add_api_route("/items", lambda: {"items": 1}, dependencies=[CacheResponse(600)])
    layer = ResponseCacheMiddleware(app)

    async def found_out() -> Scope:
        scope = scope_of(app, "/items")
        request_context.ensure(scope)
        route_of(scope)
        return scope

    async def hit() -> None:
        await layer(await found_out(), receive, send)

    await hit()
    # The least of several: whatever else the machine does only adds.
    hits = [await microseconds(hit, number) for _ in range(9)]
    return min(hits) - min([await microseconds(found_out, number) for _ in range(9)])


async def throughput(number: int) -> tuple[float, float]:
    said = []
    for override in (None, CacheResponse(600)):
        app = shop(override)

        async def ask(app: FastAPI = app) -> None:
            await app(scope_of(app, "/items"), receive, send)

        await ask()
        said.append(1e6 / await microseconds(ask, number))
    return said[0], said[1]


async def calls_of_a_crowd(size: int) -> tuple[int, float]:
    calls = 0
    app = FastAPI()

    async def endpoint(_scope: Scope, _receive: Receive, send: Send) -> None:
        nonlocal calls
        calls += 1
        await asyncio.sleep(0.05)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x"})

    app.add_api_route("/items", lambda: None, dependencies=[CacheResponse(600)])
    layer = ResponseCacheMiddleware(endpoint)
    started = time.perf_counter()
    await asyncio.gather(*(layer(scope_of(app, "/items"), receive, send) for _ in range(size)))
    return calls, time.perf_counter() - started


async def value(number: int) -> tuple[float, float]:
    cache = Cache()

    async def make() -> dict[str, int]:
        return {"a": 1}

    async def ask() -> None:
        await cache.get_or_compute("key", make, ttl_seconds=600)

    async def tagged() -> None:
        await cache.get_or_compute("tagged", make, ttl_seconds=600, tags=("a", "b"))

    await ask()
    await tagged()
    plain = min([await microseconds(ask, number) for _ in range(5)])
    return plain, min([await microseconds(tagged, number) for _ in range(5)])


async def report(number: int) -> None:
    print(f"response cache, the layer of a hit: {await layer_of_a_hit(number):.1f} us (to reach: at most 15)")
    without, with_cache = await throughput(max(200, number // 20))
    print(
        f"endpoint that works 1 ms, whole stack: {without:,.0f} requests a second without, {with_cache:,.0f} with: "
        f"{with_cache / without:.1f} times (to reach: 5)"
    )
    calls, seconds = await calls_of_a_crowd(1000)
    print(
        f"1000 misses at once: {calls} call in {seconds * 1000:.0f} ms, of which the call takes 50 (to reach: 1 call)"
    )
    plain, tagged = await value(number)
    print(f"handle.cache, a value in memory: {plain:.1f} us, with two tags {tagged:.1f} us")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    asyncio.run(report(2_000 if parser.parse_args().quick else 20_000))
