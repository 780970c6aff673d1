"""Rate limits that several applications count together, and what holds while they cannot."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest
from fastapi import APIRouter, FastAPI
from fastapi.testclient import TestClient
from starlette.applications import Starlette
from starlette.routing import Host, Mount

from fastapi_hardening import Hardening, RateLimit, Settings, harden
from fastapi_hardening.core.redis_store import RedisStore
from fastapi_hardening.core.store import MemoryStore, StoreFailed, StoreRecovered
from fastapi_hardening.core.window import parse_limits
from fastapi_hardening.security.rate_limit import RateLimitMiddleware, RateLimitSettings, SharedBudget, _name_of
from tests.state_server import StateServer, free_port

StartServer = Callable[..., StateServer]


async def _ok() -> str:
    return "ok"


def application(url: str, name: str = "shop", **settings: Any) -> FastAPI:
    """A hardened application as one worker has it."""
    app = FastAPI(title=name)
    router = APIRouter(prefix="/reports", dependencies=[RateLimit("4/hour", name="reports")])
    router.get("/all")(_ok)
    router.get("/own", dependencies=[RateLimit("2/hour; 3/day")])(_ok)
    app.include_router(router)
    app.get("/")(_ok)
    app.get("/login", dependencies=[RateLimit("2/hour", on_store_failure="refuse")])(_ok)
    app.get("/search", dependencies=[RateLimit("2/hour", on_store_failure="allow")])(_ok)
    app.get("/one", dependencies=[RateLimit("3/hour", scope="shared")])(_ok)
    app.get("/two", dependencies=[RateLimit("3/hour", scope="shared")])(_ok)
    settings.setdefault("rate_limit", {"default": "3/hour"})
    # A budget that a busy machine does not exceed.
    harden(app, Settings(_env_file=None, state_url=url, state_budget_seconds=5, **settings))
    return app


@asynccontextmanager
async def serving(*apps: FastAPI) -> AsyncIterator[list[httpx2.AsyncClient]]:
    """Runs the lifespans of applications, and gives a client of each."""
    async with asyncio.timeout(60):
        if not apps:
            yield []
            return
        app, *others = apps
        transport = httpx2.ASGITransport(app, client=("203.0.113.1", 1))
        async with (
            app.router.lifespan_context(app),
            httpx2.AsyncClient(transport=transport, base_url="http://shop.example") as client,
            serving(*others) as clients,
        ):
            yield [client, *clients]


async def statuses(client: httpx2.AsyncClient, path: str, times: int) -> list[int]:
    return [(await client.get(path)).status_code for _ in range(times)]


# --- counted together -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["token-bucket", "fixed-window", "sliding-window"])
def test_two_workers_have_one_budget_for_a_client(state_url: str, prefix: str, strategy: str) -> None:
    """On the default, on a router, on a route with several limits; another service is another matter."""
    settings = {"rate_limit": {"default": "3/hour", "strategy": strategy}}
    one, two = (application(state_url, prefix, **settings) for _ in range(2))
    other = application(state_url, f"{prefix}-other", **settings)

    async def use() -> None:
        async with serving(one, two, other) as (first, second, third):
            assert await statuses(first, "/", 2) == [200, 200]
            assert await statuses(second, "/elsewhere", 2) == [404, 429]
            assert await statuses(third, "/", 1) == [200]
            assert await statuses(first, "/reports/all", 3) == [200] * 3
            assert await statuses(second, "/reports/all", 2) == [200, 429]
            assert await statuses(second, "/reports/own", 1) == [200]
            answer = await first.get("/reports/own")
            assert answer.headers["ratelimit-policy"] == '"2/hour";q=2;w=3600, "3/day";q=3;w=86400'
            assert answer.headers["ratelimit"].startswith('"2/hour";r=0;t=')
            refused = await second.get("/reports/own")
            assert refused.status_code == 429
            assert refused.json()["violated-policies"] == ["2/hour"]
            assert 0 < int(refused.headers["retry-after"]) <= 2 * 3600
            assert await statuses(first, "/one", 2) + await statuses(second, "/two", 2) == [200, 200, 200, 429]

    asyncio.run(use())


def test_it_works_where_no_lifespan_is_run(state_url: str, prefix: str) -> None:
    """A test client that is not entered has a new event loop for every request."""
    client = TestClient(application(state_url, prefix))
    assert [client.get("/").status_code for _ in range(4)] == [200, 200, 200, 429]


def test_the_layer_alone_shares_too(state_url: str, prefix: str) -> None:
    """A store is a collaborator of the middleware; a store in memory changes nothing."""
    app = FastAPI()
    store = RedisStore(state_url, prefix=prefix, budget_seconds=20)
    app.add_middleware(RateLimitMiddleware, settings=RateLimitSettings(default="1/hour"), store=store)
    assert [TestClient(app).get("/").status_code for _ in range(2)] == [404, 429]
    alone = FastAPI()
    alone.add_middleware(RateLimitMiddleware, settings=RateLimitSettings(default="1/hour"), store=MemoryStore())
    assert [TestClient(alone).get("/").status_code for _ in range(2)] == [404, 429]


# --- what a budget is called ------------------------------------------------------------------------------------------


def test_every_declaration_has_a_name_of_its_own_that_workers_agree_on() -> None:
    """By the first route on which it counts, not by its place in memory; equal limits on two routes are two budgets."""

    def make() -> tuple[Starlette, list[RateLimit]]:
        limits = [RateLimit("5/hour") for _ in range(8)]
        app = FastAPI(dependencies=[limits[0]])
        app.get("/bare")(_ok)
        router = APIRouter(dependencies=[limits[1]])
        router.get("/both", dependencies=[limits[2]])(_ok)
        router.get("/inner")(_ok)
        router.post("/inner", dependencies=[limits[3]])(_ok)
        app.include_router(router, prefix="/r")
        inside = [FastAPI(), FastAPI()]
        for number, child in enumerate(inside):
            child.get("/same", dependencies=[limits[4 + number]])(_ok)
        app.router.routes += [Host("a.example", inside[0]), Host("b.example", inside[1])]
        mounted = FastAPI()
        mounted.get("/same", dependencies=[limits[6]])(_ok)
        app.router.routes.append(Mount("/m", mounted))
        return app, limits

    (app, limits), (again, others) = make(), make()
    names = [_name_of(limit, {"app": app}) for limit in limits]
    assert len(set(names)) == 8
    assert names == [_name_of(limit, {"app": again}) for limit in others]
    assert names[7] == "elsewhere"
    assert _name_of(limits[0], {}) == "elsewhere"


# --- what holds without the store -------------------------------------------------------------------------------------


def dead_url() -> str:
    return f"redis://:s3cr3t@127.0.0.1:{free_port()}"


@pytest.mark.parametrize(("workers", "passed"), [(1, 8), (4, 2), (100, 1)])
def test_in_memory_each_worker_lets_its_share_pass(workers: int, passed: int) -> None:
    """The limit divided by the workers, at least one request; the policy is said as it is."""
    app = application(dead_url(), workers=workers, rate_limit={"default": "8/hour"})

    async def use() -> None:
        async with serving(app) as (client,):
            answers = [await client.get("/") for _ in range(9)]
            assert [each.status_code for each in answers] == [200] * passed + [429] * (9 - passed)
            assert answers[0].headers["ratelimit-policy"] == '"default";q=8;w=3600'
            assert int(answers[-1].headers["retry-after"]) > 0

    asyncio.run(use())


def test_each_limit_says_what_holds_meanwhile() -> None:
    """``refuse`` says when to come back, ``allow`` lets pass; the settings say it for those that say nothing."""
    app = application(dead_url(), rate_limit={"default": "1/hour", "on_store_failure": "allow"})

    async def use() -> None:
        async with serving(app) as (client,):
            assert await statuses(client, "/", 5) == [200] * 5
            assert await statuses(client, "/search", 5) == [200] * 5
            refused = await client.get("/login")
            assert refused.status_code == 503
            assert refused.headers["retry-after"] in ("1", "2")
            assert refused.json()["type"].endswith("#temporary-reduced-capacity")
            assert refused.headers["ratelimit"] == '"2/hour";r=0;t=1'

    asyncio.run(use())


def test_the_share_follows_the_workers_that_are_known() -> None:
    """Whoever was counted last is counted on."""

    class Counters:
        workers = 2

        async def spend(self, key: str, *charges: Any) -> Any:
            return await RedisStore(dead_url()).spend(key, *charges)

    async def use() -> None:
        counters = Counters()
        budget = SharedBudget("x", parse_limits("8/hour"), counters=counters)
        assert [(await budget.spend("k"))[0].remaining for _ in range(2)] == [3, 2]
        counters.workers = 8
        assert [(await budget.spend("k"))[0].allowed for _ in range(2)] == [True, False]

    asyncio.run(use())


def test_a_server_that_dies_and_comes_back_is_told_by_everything(state_server: StartServer) -> None:
    """Limits hold before, meanwhile and after, with no 5xx; events, metric and health check tell of it."""
    server = state_server()
    app = application(server.url, rate_limit={"default": "3/hour"})
    handle: Hardening = app.state.hardening

    async def health(client: httpx2.AsyncClient) -> dict[str, Any]:
        report: dict[str, Any] = (await client.get("/health")).json()
        return report

    async def use() -> None:
        back = asyncio.Event()
        handle.events.subscribe(StoreRecovered, lambda _event: back.set())
        async with serving(app) as (client,):
            assert await statuses(client, "/", 4) == [200, 200, 200, 429]
            assert b"hardening_state_store_up 1.0" in handle.metrics.expose()
            server.kill()
            assert await statuses(client, "/", 4) == [200, 200, 200, 429]
            assert b"hardening_state_store_up 0.0" in handle.metrics.expose()
            assert b'hardening_events_total{event="StoreFailed"} 1.0' in handle.metrics.expose()
            assert (await client.get("/readyz")).status_code == 200
            report = await health(client)
            assert report["status"] == "warn"
            assert handle.events.count(StoreFailed) == 1
            server.start()
            await back.wait()
            assert await statuses(client, "/", 4) == [200, 200, 200, 429]
            assert b"hardening_state_store_up 1.0" in handle.metrics.expose()

    asyncio.run(use())


def test_many_requests_at_the_moment_of_death_are_all_answered(state_server: StartServer) -> None:
    """None of those under way is lost, and none is a 5xx; together they do not exceed both limits."""
    server = state_server()
    app = application(server.url, rate_limit={"default": "50/hour"})

    async def use() -> None:
        async with serving(app) as (client,):
            await client.get("/")
            asked = [asyncio.create_task(client.get("/")) for _ in range(150)]
            await asyncio.sleep(0)
            server.kill()
            answers = [each.status_code for each in await asyncio.gather(*asked)]
            assert set(answers) <= {200, 429}
            assert answers.count(200) <= 100

    asyncio.run(use())


# --- settings ---------------------------------------------------------------------------------------------------------


def test_the_url_is_a_secret(state_url: str) -> None:
    """Neither the settings nor the handle show a password."""
    app = FastAPI()
    handle = harden(app, Settings(_env_file=None, state_url="redis://:s3cr3t@host"))
    assert "s3cr3t" not in repr(handle.settings)
    assert "s3cr3t" not in str(handle.settings.describe())
    assert isinstance(handle.store, RedisStore)
    assert handle.store.where == "redis://host:6379"


def test_the_environment_is_all_it_takes(state_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``HARDENING_STATE_URL``, and nothing in the code."""
    monkeypatch.setenv("HARDENING_STATE_URL", state_url)
    handle = harden(FastAPI())
    assert isinstance(handle.store, RedisStore)
    assert handle.store.counters is not None
