"""What is slow to make is made once, and its age is never a secret."""

import asyncio
import datetime as dt
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry
from pydantic import BaseModel, SecretStr

from fastapi_hardening import ConfigurationError, Settings, harden
from fastapi_hardening.core.cache_levels import CacheMetrics
from fastapi_hardening.core.clock import ManualClock
from fastapi_hardening.core.events import Events
from fastapi_hardening.core.redis_store import RedisStore
from fastapi_hardening.core.store import MemoryStore
from fastapi_hardening.performance.cache import Cache, CacheRefreshFailed, CacheSettings


class Product(BaseModel):
    name: str
    since: dt.date


async def given(value: Any) -> Any:
    return value


class Maker:
    """Makes values, each another one; the test says when it ends and when it fails."""

    def __init__(self) -> None:
        self.calls = 0
        self.error: Exception | None = None
        self.gate: asyncio.Event | None = None
        self.begun = asyncio.Event()

    async def __call__(self) -> Any:
        self.calls += 1
        number = self.calls
        self.begun.set()
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error
        return {"number": number}


class Bench:
    """A cache, its clock, what it counts and tells."""

    def __init__(self, store: MemoryStore | None = None, clock: ManualClock | None = None, **settings: Any) -> None:
        self.clock = clock or ManualClock()
        self.registry = CollectorRegistry()
        self.events = Events()
        self.seen: list[object] = []
        self.events.subscribe(object, self.seen.append)
        self.cache = Cache(
            CacheSettings(**{"ttl_jitter": 0.0, **settings}),
            store=store,
            metrics=CacheMetrics(self.registry),
            events=self.events,
            clock=self.clock,
        )
        self.make = Maker()

    async def ask(self, key: str = "k", **options: Any) -> Any:
        return await self.cache.get_or_compute(key, self.make, **{"ttl_seconds": 10, **options})

    def count(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"hardening_cache_{name}", labels) or 0.0


async def settled() -> None:
    """Lets everything run that waits for nothing."""
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.fixture
def bench() -> Bench:
    """Give a cache in memory."""
    return Bench()


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, 0, "text", b"\x00bytes", [1, {"a": [True, None]}], "ü\ud83d\ude00"[:1]])
def test_a_value_comes_back(bench: Bench, value: Any) -> None:
    """JSON and bytes, and that there is nothing."""

    async def use() -> Any:
        await bench.cache.set("k", value)
        return await bench.cache.get("k", "missing")

    assert asyncio.run(use()) == value


@pytest.mark.parametrize("value", [object(), {1, 2}, float("nan"), Product(name="a", since=dt.date(2026, 1, 1))])
def test_what_is_no_json_is_refused(bench: Bench, value: Any) -> None:
    """With the way out."""
    with pytest.raises(TypeError, match="say what it is: of="):
        asyncio.run(bench.cache.set("k", value))


def test_a_type_brings_back_what_json_has_not(bench: Bench) -> None:
    """Models, dates and tuples."""
    product = Product(name="a", since=dt.date(2026, 1, 1))

    async def use() -> tuple[Any, Any, Any]:
        await bench.cache.set("k", (product, 1), of=tuple[Product, int])
        made = await bench.cache.get_or_compute("m", lambda: given(product), of=Product)
        return await bench.cache.get("k", of=tuple[Product, int]), made, await bench.cache.get("k")

    typed, made, plain = asyncio.run(use())
    assert typed == (product, 1)
    assert made == product
    assert plain == [{"name": "a", "since": "2026-01-01"}, 1]


def test_everybody_has_a_value_of_their_own(bench: Bench) -> None:
    """Who changes it changes nobody else's, nor the cache."""

    async def use() -> list[dict[str, int]]:
        first, second = await asyncio.gather(bench.ask(), bench.ask())
        first["number"] = 99
        return [second, await bench.ask()]

    assert asyncio.run(use()) == [{"number": 1}] * 2


def test_what_another_version_has_written_is_made_again(bench: Bench) -> None:
    """A value that does not fit its type is as good as none."""

    async def use() -> tuple[Any, Product]:
        await bench.cache.set("k", {"title": "old"})
        missing = await bench.cache.get("k", "missing", of=Product)
        product = Product(name="new", since=dt.date(2026, 1, 1))
        return missing, await bench.cache.get_or_compute("k", lambda: given(product), of=Product)

    missing, product = asyncio.run(use())
    assert missing == "missing"
    assert product.name == "new"
    with pytest.raises(TypeError, match="Expected `Product`"):
        asyncio.run(bench.cache.get_or_compute("other", lambda: given({"title": 1}), of=Product))


# --- lifetimes --------------------------------------------------------------------------------------------------------


def test_a_value_lives_as_long_as_was_said(bench: Bench) -> None:
    """Then it is made again."""

    async def use() -> list[int]:
        said = []
        for seconds in (0, 9.9, 0.1, 9.9, 0.1):
            bench.clock.advance(seconds)
            said.append((await bench.ask())["number"])
        return said

    assert asyncio.run(use()) == [1, 1, 2, 2, 3]
    assert bench.count("hits_total", level="memory") == 2
    assert bench.count("computations_total", outcome="made") == 3
    assert bench.count("misses_total") == 3
    assert bench.count("memory_bytes") > 400


def test_lifetimes_differ(bench: Bench) -> None:
    """What was made together does not expire together; nothing lives longer than was said."""
    cache = Cache(CacheSettings(ttl_jitter=0.1), clock=bench.clock)

    async def use() -> list[float]:
        for number in range(50):
            await cache.set(str(number), number, ttl_seconds=100)
        entries = [cache.levels.peek(f"value:{number}") for number in range(50)]
        return [entry.fresh_until - bench.clock.time() for entry in entries if entry is not None]

    lifetimes = asyncio.run(use())
    assert len(set(lifetimes)) > 40
    assert 90 <= min(lifetimes) <= max(lifetimes) <= 100


def test_that_there_is_nothing_is_remembered_for_less_long(bench: Bench) -> None:
    """A key that does not exist costs one call in that time, however often it is asked for."""
    calls = 0

    async def nothing() -> int | None:
        nonlocal calls
        calls += 1
        return None

    async def use() -> None:
        for _ in range(3):
            assert await bench.cache.get_or_compute("k", nothing, ttl_seconds=60, negative_ttl_seconds=2) is None
        assert calls == 1
        assert await bench.cache.get("k", "missing") is None
        bench.clock.advance(2)
        assert await bench.cache.get("k", "missing") == "missing"
        for _ in range(2):
            await bench.cache.get_or_compute("none", nothing, negative_ttl_seconds=0)

    asyncio.run(use())
    assert calls == 3


def test_what_is_a_little_stale_is_answered_at_once(bench: Bench) -> None:
    """Meanwhile one fresh value is made, by nobody who waits."""
    options: Any = {"stale_while_revalidate_seconds": 30}

    async def use() -> list[int]:
        said = [(await bench.ask(**options))["number"]]
        bench.clock.advance(11)
        bench.make.gate = asyncio.Event()
        said += [each["number"] for each in await asyncio.gather(*(bench.ask(**options) for _ in range(100)))]
        assert bench.make.calls == 2
        bench.make.gate.set()
        await settled()
        said.append((await bench.ask(**options))["number"])
        bench.clock.advance(41)
        said.append((await bench.ask(**options))["number"])
        return said

    assert asyncio.run(use()) == [1, *[1] * 100, 2, 3]
    assert bench.count("stale_total", reason="revalidating") == 1


def test_a_refresh_that_fails_is_told(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody waits for it, so the log says it; the stale value is used on."""
    options: Any = {"stale_while_revalidate_seconds": 30}

    async def use() -> int:
        await bench.ask(**options)
        bench.clock.advance(11)
        bench.make.error = OSError("the bank is closed")
        await bench.ask(**options)
        await settled()
        number: int = (await bench.ask(**options))["number"]
        await settled()
        return number

    with caplog.at_level(logging.WARNING, "fastapi_hardening.cache"):
        assert asyncio.run(use()) == 1
    assert "could not be made again" in caplog.text


def test_what_is_stale_is_better_than_an_error(bench: Bench) -> None:
    """For as long as was said; and the next attempt waits a moment."""
    options: Any = {"stale_if_error_seconds": 30}

    async def use() -> None:
        assert (await bench.ask(**options))["number"] == 1
        bench.clock.advance(11)
        bench.make.error = OSError("closed")
        for _ in range(3):
            assert (await bench.ask(**options))["number"] == 1
        assert bench.make.calls == 2
        bench.clock.advance(1)
        assert (await bench.ask(**options))["number"] == 1
        assert bench.make.calls == 3
        bench.clock.advance(28)
        with pytest.raises(OSError, match="closed"):
            await bench.ask(**options)
        bench.make.error = None
        assert (await bench.ask(**options))["number"] == 5

    asyncio.run(use())
    assert bench.seen == [CacheRefreshFailed("", "OSError")] * 2
    assert bench.count("stale_total", reason="error") == 4
    assert bench.count("computations_total", outcome="failed") == 3


# --- stampedes --------------------------------------------------------------------------------------------------------


def test_a_thousand_who_miss_together_make_one_call(bench: Bench) -> None:
    """And the first may go away."""

    async def use() -> list[Any]:
        bench.make.gate = asyncio.Event()
        asking = [asyncio.create_task(bench.ask()) for _ in range(1000)]
        await bench.make.begun.wait()
        asking[0].cancel()
        bench.make.gate.set()
        return await asyncio.gather(*asking, return_exceptions=True)

    first, *others = asyncio.run(use())
    assert isinstance(first, asyncio.CancelledError)
    assert others == [{"number": 1}] * 999
    assert bench.make.calls == 1


def test_an_error_is_for_those_who_wait_and_is_not_kept(bench: Bench) -> None:
    """The next one asks again."""

    async def use() -> list[Any]:
        bench.make.error = OSError("closed")
        said = await asyncio.gather(bench.ask(), bench.ask(), return_exceptions=True)
        bench.make.error = None
        return [*map(str, said), await bench.ask()]

    assert asyncio.run(use()) == ["closed", "closed", {"number": 2}]


def test_what_takes_too_long_is_given_up() -> None:
    """Nobody waits forever for what never comes."""
    bench = Bench(compute_timeout_seconds=0.001)

    async def use() -> None:
        bench.make.gate = asyncio.Event()
        await bench.ask()

    with pytest.raises(TimeoutError):
        asyncio.run(use())


@pytest.mark.parametrize("how", ["delete", "set", "invalidate", "clear"])
def test_what_was_changed_meanwhile_is_not_overwritten_by_older_news(how: str) -> None:
    """A value that was being made when its key was deleted, set or invalidated is answered, and not kept."""
    bench = Bench()
    cache = bench.cache.namespace("part")

    async def use() -> tuple[Any, Any]:
        bench.make.gate = asyncio.Event()
        asking = asyncio.create_task(cache.get_or_compute("k", bench.make, tags=("t",)))
        await bench.make.begun.wait()
        if how == "set":
            await cache.set("k", "newer")
        elif how == "delete":
            await cache.delete("k")
        elif how == "invalidate":
            await cache.invalidate("t")
        else:
            await cache.clear()
        bench.make.gate.set()
        return await asking, await cache.get("k", "missing")

    made, kept = asyncio.run(use())
    assert made == {"number": 1}
    assert kept == ("newer" if how == "set" else "missing")


def test_several_workers_make_one_call(state_url: str, prefix: str) -> None:
    """Four of them, each with its own connection, who all miss at the same time."""
    stores = [RedisStore(state_url, prefix=prefix, budget_seconds=20) for _ in range(4)]
    workers = [Cache(CacheSettings(lock_wait_seconds=60), store=store) for store in stores]

    async def use() -> list[Any]:
        make = Maker()
        make.gate = asyncio.Event()
        asking = [
            asyncio.create_task(worker.get_or_compute("k", make, ttl_seconds=60))
            for worker in workers
            for _ in range(25)
        ]
        await make.begun.wait()
        make.gate.set()
        said = await asyncio.gather(*asking)
        for store in stores:
            await store.close()
        return said

    assert asyncio.run(use()) == [{"number": 1}] * 100


def test_who_has_waited_long_enough_makes_it_after_all() -> None:
    """A worker that died with the lock holds up nobody for longer than was said."""
    store = MemoryStore()
    bench = Bench(store, lock_wait_seconds=0)

    async def use() -> tuple[Any, bool]:
        other = Cache(store=store)
        await other.levels.lock("value:k", 60)
        made = await bench.ask()
        return made, await other.levels.lock("value:k", 60)

    assert asyncio.run(use()) == ({"number": 1}, False)  # and the lock of the other one stays


def test_a_value_that_came_while_waiting_for_the_lock_is_used() -> None:
    """Though this worker has the lock then."""
    clock = ManualClock()
    store = MemoryStore(clock=clock)
    bench, other = Bench(store, clock), Bench(store, clock)

    async def use() -> Any:
        recipe = bench.cache._recipe("k", bench.make, ttl=10, tags=(), of=None)
        await other.ask()
        return await bench.cache._make(recipe, None)

    entry = asyncio.run(use())
    assert entry.body == b'j{"number":1}'
    assert bench.make.calls == 0
    assert bench.count("computations_total", outcome="elsewhere") == 1
    assert asyncio.run(bench.cache.levels.lock("value:k", 1))


# --- the rest of its surface ------------------------------------------------------------------------------------------


def test_namespaces_know_nothing_of_each_other(bench: Bench) -> None:
    """Neither keys nor tags; and one can be emptied at once."""

    async def use() -> list[Any]:
        a, b = bench.cache.namespace("a"), bench.cache.namespace("b")
        for cache in (a, b, a.namespace("inner")):
            await cache.set("k", "v", tags=("t",))
        await a.invalidate("t")
        said = [await cache.get("k") for cache in (a, b, a.namespace("inner"))]
        await b.clear()
        return [*said, await b.get("k")]

    assert asyncio.run(use()) == [None, "v", "v", None]
    for name in ("", "a:b"):
        with pytest.raises(ValueError, match="without colons"):
            bench.cache.namespace(name)
    with pytest.raises(ValueError, match="only a namespace can be cleared"):
        asyncio.run(bench.cache.clear())


def test_results_of_a_function_are_kept_by_its_arguments(bench: Bench) -> None:
    """However they are written; and the type that it declares comes back."""
    calls = 0

    @bench.cache.cached(ttl_seconds=10, tags=lambda name, year=2026: (f"product:{name}",))
    async def product(name: str, year: int = 2026) -> Product:
        nonlocal calls
        calls += 1
        return Product(name=name, since=dt.date(year, 1, 1))

    async def use() -> None:
        said = [await product("a"), await product(name="a"), await product("a", 2026), await product("a", year=2025)]
        assert [each.since.year for each in said] == [2026, 2026, 2026, 2025]
        assert calls == 2
        await bench.cache.invalidate("product:a")
        await product("a")

    asyncio.run(use())
    assert calls == 3
    assert product.__name__ == "product"


def test_arguments_that_are_no_json_need_a_key(bench: Bench) -> None:
    """A database session is in no key by accident."""

    @bench.cache.cached()
    async def total(session: object) -> int:
        return 1

    @bench.cache.cached(key=lambda session, order: order)
    async def keyed(session: object, order: str) -> bytes:
        return order.encode()

    with pytest.raises(
        TypeError, match=r"the arguments of .*total cannot be written as JSON; give the decorator a key"
    ):
        asyncio.run(total(object()))
    assert [asyncio.run(keyed(object(), "a")), asyncio.run(keyed(object(), "b"))] == [b"a", b"b"]


def test_a_cache_that_is_off_keeps_nothing() -> None:
    """But those who ask together still share a call."""
    bench = Bench(enabled=False)

    async def use() -> list[int]:
        together = await asyncio.gather(bench.ask(), bench.ask())
        return [each["number"] for each in (*together, await bench.ask())]

    assert asyncio.run(use()) == [1, 1, 2]


def test_it_may_have_a_redis_of_its_own(state_url: str, tmp_path: Path) -> None:
    """Which may evict, and whose absence says nothing of the store of limits."""
    cache = Cache(
        CacheSettings(shared_url=SecretStr(state_url), folder=tmp_path / "cache", local_seconds=0), service_name="shop"
    )

    async def use() -> Any:
        await cache.set("k", "v", ttl_seconds=10)
        value = await cache.get("k")
        await cache.delete("k")
        await cache.close()
        return value

    assert asyncio.run(use()) == "v"
    with pytest.raises(ConfigurationError, match=r"cache\.shared_url"):
        Settings(cache={"shared_url": "https://elsewhere"})


# --- in harden() ------------------------------------------------------------------------------------------------------


@pytest.fixture
def client() -> Iterator[Callable[..., TestClient]]:
    """Give a function that makes a client of a hardened shop."""
    clients: list[TestClient] = []

    def make(**settings: Any) -> TestClient:
        app = FastAPI()
        handle = harden(app, Settings(**settings))
        calls = 0

        @app.get("/products")
        async def products() -> dict[str, int]:
            async def load() -> dict[str, int]:
                nonlocal calls
                calls += 1
                return {"calls": calls}

            return await handle.cache.get_or_compute("products", load)

        clients.append(TestClient(app))
        return clients[-1].__enter__()

    yield make
    for each in clients:
        each.__exit__(None, None, None)


def test_endpoints_use_the_handle(client: Callable[..., TestClient], tmp_path: Path) -> None:
    """It is counted with everything else, and checked where there is more than memory."""
    shop = client(cache={"folder": str(tmp_path / "cache")})
    assert [shop.get("/products").json() for _ in range(2)] == [{"calls": 1}] * 2
    handle = shop.app.state.hardening  # type: ignore[attr-defined]
    assert 'hardening_cache_hits_total{level="memory"} 1.0' in handle.metrics.expose().decode()
    assert "cache" in [check.name for check in handle.checks]


def test_nothing_answers_500_while_the_store_is_gone(client: Callable[..., TestClient]) -> None:
    """Memory goes on, and the health report says what is missing."""
    shop = client(state_url="redis://127.0.0.1:1", health={"details": "always"})
    assert [shop.get("/products").json() for _ in range(3)] == [{"calls": 1}] * 3
    handle = shop.app.state.hardening  # type: ignore[attr-defined]
    assert handle.cache.check().status == "warn"
