"""Many loads of one are one load of many."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fastapi_hardening import harden
from fastapi_hardening.core.events import Events
from fastapi_hardening.performance.batcher import Batcher, BatcherFull, BatchLoaded, KeyNotLoaded

TENANT: ContextVar[str] = ContextVar("tenant", default="none")


class Upstream:
    """What is asked; it notes every call, and answers when the test says so."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.error: Exception | None = None
        self.own: dict[int, Any] = {}
        self.missing: set[int] = set()

    async def __call__(self, keys: Sequence[int]) -> dict[int, Any]:
        self.calls.append([*keys])
        await self.may_answer.wait()
        if self.error is not None:
            raise self.error
        return {key: self.own.get(key, key * 10) for key in keys if key not in self.missing}


async def turns(number: int = 5) -> None:
    """Lets the event loop turn."""
    for _ in range(number):
        await asyncio.sleep(0)


def test_a_crowd_makes_few_calls() -> None:
    """A hundred requests that each want ten of fifty products: a thousand loads, one call instead of a thousand."""

    async def use() -> tuple[int, Counter[int]]:
        upstream = Upstream()
        batcher: Batcher[int, int] = Batcher(upstream, max_wait_seconds=0)

        async def request(number: int) -> None:
            wanted = [(number * 7 + each) % 50 for each in range(10)]
            assert await batcher.load_all(wanted) == [key * 10 for key in wanted]

        await asyncio.gather(*(request(number) for number in range(100)))
        return len(upstream.calls), Counter(key for call in upstream.calls for key in call)

    calls, keys = asyncio.run(use())
    assert calls <= 1000 * 0.2
    assert calls == 1
    assert set(keys.values()) == {1}
    assert len(keys) == 50


def test_others_join_until_the_wait_is_over() -> None:
    """The first one who asks waits for so long and no longer; who comes after that is in the next batch."""

    async def use() -> tuple[float, list[list[int]]]:
        upstream = Upstream()
        batcher: Batcher[int, int] = Batcher(upstream, max_wait_seconds=0.01)
        first = asyncio.create_task(batcher.load(1))
        await turns()
        timer: Any = batcher._timer
        left = timer.when() - asyncio.get_running_loop().time()
        second = asyncio.create_task(batcher.load(2))
        await turns()
        assert batcher._timer is timer
        assert upstream.calls == []
        await asyncio.gather(first, second)
        await batcher.load(3)
        return left, upstream.calls

    left, calls = asyncio.run(use())
    assert left <= 0.01
    assert calls == [[1, 2], [3]]


def test_a_full_batch_leaves_at_once() -> None:
    """It does not wait for anybody."""

    async def use() -> list[list[int]]:
        upstream = Upstream()
        batcher: Batcher[int, int] = Batcher(upstream, max_size=2, max_wait_seconds=3600)
        assert await batcher.load_all([1, 2, 3, 4]) == [10, 20, 30, 40]
        return upstream.calls

    assert asyncio.run(use()) == [[1, 2], [3, 4]]


def test_who_asks_after_a_batch_has_left_has_a_new_one_made() -> None:
    """So nobody has what was read before he asked, such as before he changed it."""

    async def use() -> list[list[int]]:
        upstream = Upstream()
        batcher: Batcher[int, int] = Batcher(upstream, max_wait_seconds=0)
        upstream.may_answer.clear()
        first = asyncio.create_task(batcher.load(1))
        await turns()
        second = asyncio.create_task(batcher.load(1))
        await turns()
        upstream.may_answer.set()
        await asyncio.gather(first, second)
        return upstream.calls

    assert asyncio.run(use()) == [[1], [1]]


def test_an_error_is_for_its_key_alone() -> None:
    """One that is given for a key, and a key that is missing; what is raised is for all of the batch."""

    async def use() -> list[Any]:
        upstream = Upstream()
        upstream.own, upstream.missing = {2: ValueError("two"), 4: None}, {3}
        batcher: Batcher[int, int] = Batcher(upstream, max_wait_seconds=0)
        said: list[Any] = await asyncio.gather(*(batcher.load(key) for key in (1, 2, 3, 4)), return_exceptions=True)
        upstream.error = OSError("gone")
        said += await asyncio.gather(batcher.load(1), batcher.load(2), return_exceptions=True)
        return said

    one, two, three, four, *gone = asyncio.run(use())
    assert (one, four) == (10, None)
    assert isinstance(two, ValueError)
    assert isinstance(three, KeyNotLoaded)
    assert three.args == (3,)
    assert [str(each) for each in gone] == ["gone", "gone"]


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_sequence_has_one_for_each_key(length: int) -> None:
    """One of another length is refused: nobody can say which is whose."""

    async def load(keys: Sequence[str]) -> list[str]:
        return [key.upper() for key in (*keys, "more")][:length]

    batcher: Batcher[str, str] = Batcher(load, max_wait_seconds=0)
    if length == 2:
        assert asyncio.run(batcher.load_all(["a", "b"])) == ["A", "B"]
    else:
        with pytest.raises(ValueError, match=f"a batch of 2 keys was loaded as {length} values"):
            asyncio.run(batcher.load_all(["a", "b"]))


def test_who_goes_away_takes_nobody_with_him() -> None:
    """And nothing is loaded for those who have gone before the batch left."""

    async def use() -> tuple[list[list[int]], int]:
        upstream = Upstream()
        batcher: Batcher[int, int] = Batcher(upstream, max_wait_seconds=0)
        gone, stays, same = (asyncio.create_task(batcher.load(key)) for key in (1, 2, 2))
        await asyncio.sleep(0)
        gone.cancel()
        upstream.may_answer.clear()
        await turns()
        stays.cancel()
        upstream.may_answer.set()
        value = await same
        alone = asyncio.create_task(batcher.load(3))
        await asyncio.sleep(0)
        alone.cancel()
        await turns()
        return upstream.calls, value

    assert asyncio.run(use()) == ([[2]], 20)


def test_calls_that_are_under_way_are_bounded() -> None:
    """What is asked for meanwhile goes together with the next one that may leave."""

    async def use() -> list[list[int]]:
        upstream = Upstream()
        batcher: Batcher[int, int] = Batcher(upstream, max_size=2, max_wait_seconds=0, max_concurrent=1)
        upstream.may_answer.clear()
        loads = [asyncio.create_task(batcher.load(key)) for key in range(5)]
        await turns()
        assert upstream.calls == [[0, 1]]
        loads.append(asyncio.create_task(batcher.load(5)))
        await turns()
        assert len(upstream.calls) == 1
        upstream.may_answer.set()
        assert await asyncio.gather(*loads) == [0, 10, 20, 30, 40, 50]
        return upstream.calls

    assert asyncio.run(use()) == [[0, 1], [2, 3], [4, 5]]


def test_when_too_many_wait_the_next_one_is_refused() -> None:
    """With 503 where an endpoint lets it out; a key that waits already is no other one."""

    async def use() -> BatcherFull:
        upstream = Upstream()
        batcher: Batcher[int, int] = Batcher(upstream, max_wait_seconds=0, max_keys=2)
        upstream.may_answer.clear()
        first = asyncio.create_task(batcher.load(1))
        await turns()
        second, same = (asyncio.create_task(batcher.load(2)) for _ in range(2))
        await asyncio.sleep(0)
        with pytest.raises(BatcherFull) as caught:
            await batcher.load(3)
        upstream.may_answer.set()
        await asyncio.gather(first, second, same)
        await batcher.load(3)
        return caught.value

    refused = asyncio.run(use())
    assert refused.status_code == 503
    assert refused.headers is not None
    assert "Retry-After" in refused.headers


def test_a_call_that_takes_too_long_is_given_up() -> None:
    """By everybody who waits for it."""

    async def use() -> None:
        upstream = Upstream()
        upstream.may_answer.clear()
        batcher: Batcher[int, int] = Batcher(upstream, max_wait_seconds=0, timeout_seconds=0.001)
        await batcher.load(1)

    with pytest.raises(TimeoutError):
        asyncio.run(use())


def test_the_call_belongs_to_no_request() -> None:
    """What one of them has in its context is not seen for all of them."""

    async def load(keys: Sequence[int]) -> list[str]:
        return [TENANT.get()] * len(keys)

    async def use() -> list[str]:
        batcher: Batcher[int, str] = Batcher(load, max_wait_seconds=0)
        TENANT.set("anna's")
        return [await batcher.load(1), TENANT.get()]

    assert asyncio.run(use()) == ["none", "anna's"]


def test_an_event_loop_that_has_ended_keeps_nobody_waiting() -> None:
    """What it left behind is forgotten, also a call that never came back."""
    upstream = Upstream()
    batcher: Batcher[int, int] = Batcher(upstream, max_wait_seconds=0, max_concurrent=1)

    async def left_behind() -> None:
        upstream.may_answer.clear()
        load = asyncio.ensure_future(batcher.load(1))
        await turns()
        assert not load.done()

    asyncio.run(left_behind())
    upstream.may_answer = asyncio.Event()
    upstream.may_answer.set()
    assert asyncio.run(batcher.load(2)) == 20


@given(st.lists(st.lists(st.integers(0, 20), max_size=8), max_size=8), st.integers(1, 5), st.integers(1, 3))
@hypothesis_settings(max_examples=40)
def test_everybody_has_what_he_asked_for(requests: list[list[int]], size: int, concurrent: int) -> None:
    """Whoever asks for what at the same time, and however large batches may be; and no batch is larger."""

    async def use() -> None:
        upstream = Upstream()
        batcher: Batcher[int, int] = Batcher(upstream, max_size=size, max_wait_seconds=0, max_concurrent=concurrent)
        said = await asyncio.gather(*(batcher.load_all(keys) for keys in requests))
        assert said == [[key * 10 for key in keys] for keys in requests]
        assert all(len(call) <= size and len(set(call)) == len(call) for call in upstream.calls)

    asyncio.run(use())


@pytest.mark.parametrize("wrong", [{"max_size": 0}, {"max_wait_seconds": -1}, {"timeout_seconds": 0}, {"max_keys": 0}])
def test_sizes_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    """When it is made."""
    with pytest.raises(ValueError, match="above 0"):
        Batcher(Upstream(), **wrong)


def test_batches_are_told_and_counted() -> None:
    """How many loads there were against how many calls."""
    app = FastAPI()
    handle = harden(app)

    async def load_products(numbers: Sequence[int]) -> dict[int, str]:
        if 13 in numbers:
            raise OSError("gone")
        return {number: f"product {number}" for number in numbers}

    products: Batcher[int, str] = Batcher(load_products, max_wait_seconds=0, name="products", events=handle.events)
    seen: list[BatchLoaded] = []
    handle.events.subscribe(BatchLoaded, seen.append)

    @app.get("/basket")
    async def basket() -> list[str]:
        return await products.load_all([1, 2, 1])

    assert TestClient(app).get("/basket").json() == ["product 1", "product 2", "product 1"]
    with pytest.raises(OSError, match="gone"):
        asyncio.run(products.load(13))
    assert [(batch.batcher, batch.keys, batch.loads, batch.failed) for batch in seen] == [
        ("products", 2, 3, False),
        ("products", 1, 1, True),
    ]
    exposed = handle.metrics.expose().decode()
    assert 'hardening_batch_loads_total{batcher="products"} 4.0' in exposed
    assert 'hardening_batch_calls_total{batcher="products"} 2.0' in exposed
    assert Batcher(load_products, events=Events()).name.endswith("load_products")
    assert Batcher(Upstream()).name == "Upstream"
