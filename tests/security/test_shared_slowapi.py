"""What is declared with slowapi, limits of plans and bans, where several workers count together."""

import asyncio
from typing import Any

import httpx2
from fastapi import FastAPI, Request
from slowapi import Limiter, _rate_limit_exceeded_handler
from slowapi.errors import RateLimitExceeded
from slowapi.util import get_remote_address

from fastapi_hardening import RateLimit, Settings, harden


def worker(url: str, name: str) -> FastAPI:
    """A hardened application as one worker has it."""
    limiter = Limiter(key_func=get_remote_address, application_limits=["9/day"])
    app = FastAPI(title=name)
    app.state.limiter = limiter
    app.add_exception_handler(RateLimitExceeded, _rate_limit_exceeded_handler)  # type: ignore[arg-type]

    @app.get("/declared")
    @limiter.limit("2/day")
    async def declared(request: Request) -> str:
        return "ok"

    @app.get("/plan", dependencies=[RateLimit(lambda _connection: "2/day")])
    async def plan() -> str:
        return "ok"

    harden(app, Settings(_env_file=None, state_url=url, state_budget_seconds=5, bans={"sync_seconds": 0.001}))
    return app


def test_workers_count_what_is_declared_with_slowapi_and_plans_together(state_url: str, prefix: str) -> None:
    """In one budget, and tell each other of bans."""
    apps = [worker(state_url, prefix) for _ in range(2)]

    async def story() -> None:
        async with (
            asyncio.timeout(60),
            apps[0].router.lifespan_context(apps[0]),
            apps[1].router.lifespan_context(apps[1]),
        ):
            clients = [
                httpx2.AsyncClient(
                    transport=httpx2.ASGITransport(app, client=("203.0.113.1", 1)), base_url="http://shop.example"
                )
                for app in apps
            ]

            async def statuses(path: str) -> list[Any]:
                return [(await clients[number % 2].get(path)).status_code for number in range(3)]

            assert await statuses("/declared") == [200, 200, 429]
            assert await statuses("/plan") == [200, 200, 429]
            handles = [app.state.hardening for app in apps]
            handles[0].bans.add("203.0.113.9", 600, "scraper")
            await handles[0].bans.exchange()
            await handles[1].bans.exchange()
            assert [ban.reason for ban in handles[1].bans.list()] == ["scraper"]
            for client in clients:
                await client.aclose()

    asyncio.run(story())
