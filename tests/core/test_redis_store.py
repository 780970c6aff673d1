"""The shared store on a real server: the same decisions as in memory, one round trip, and what happens without it."""

import asyncio
import datetime as dt
import importlib.util
import ipaddress
import math
import os
import signal
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st
from redis import Redis

from fastapi_hardening.core.clock import ManualClock
from fastapi_hardening.core.configuration import ConfigurationError
from fastapi_hardening.core.events import Events
from fastapi_hardening.core.redis_scripts import SPEND_DIGEST
from fastapi_hardening.core.redis_store import RedisStore
from fastapi_hardening.core.redis_transport import Command
from fastapi_hardening.core.store import SharedLimits, StoreFailed, StoreRecovered, StoreUnavailable
from fastapi_hardening.core.window import Decision, Limit, Limiter, Strategy
from tests.state_server import StateServer, free_port

STRATEGIES: tuple[Strategy, ...] = ("token-bucket", "fixed-window", "sliding-window")
StartServer = Callable[..., StateServer]
LOGIN = SharedLimits("login", (Limit("login", 5, 1000),), "token-bucket")


class Watched:
    """A store, and what it tells."""

    def __init__(self, url: str, prefix: str = "test", **options: Any) -> None:
        self.events = Events()
        self.seen: list[object] = []
        self._changed = asyncio.Event()
        self.events.subscribe(object, self._note)
        self.store = RedisStore(url, prefix=prefix, events=self.events, **options)

    def _note(self, event: object) -> None:
        self.seen.append(event)
        self._changed.set()

    async def happened(self, kind: type, times: int = 1) -> None:
        """Waits until the store has told something so many times."""
        while sum(1 for event in self.seen if type(event) is kind) < times:
            self._changed.clear()
            await self._changed.wait()

    async def fails(self) -> str:
        """What somebody is told who asks in vain."""
        with pytest.raises(StoreUnavailable) as caught:
            await self.store.spend("k", (LOGIN, 1))
        return str(caught.value)


@asynccontextmanager
async def watching(url: str, prefix: str = "test", **options: Any) -> AsyncIterator[Watched]:
    """Opens a store, and closes it at the end; with a budget that a busy machine does not exceed."""
    watched = Watched(url, prefix, **{"budget_seconds": 20, **options})
    async with asyncio.timeout(60):
        try:
            yield watched
        finally:
            await watched.store.close()


def run(use: Callable[[Watched], Awaitable[None]], url: str, prefix: str = "test", **options: Any) -> None:
    """Runs a piece of a test with a store."""

    async def using() -> None:
        async with watching(url, prefix, **options) as watched:
            await use(watched)

    asyncio.run(using())


# --- the same decisions as in memory ----------------------------------------------------------------------------------

# Limits with other windows, so that they do not agree; the windows are long, because keys also expire by real time.
LIMITS = (Limit("a", 5, 1000), Limit("b", 7, 2500), Limit("c", 3, 700))
STEPS = st.lists(
    st.tuples(st.sampled_from([0, 0, 0.25, 33, 100, 142.5, 250, 700, 999.75, 1000, 2500]), st.integers(0, 6)),
    min_size=1,
    max_size=25,
)


class Memory:
    """Several limits in memory: all or nothing, as the layer has it."""

    def __init__(self, limits: Sequence[Limit], strategy: Strategy, clock: ManualClock) -> None:
        self._limiters = [Limiter(limit, strategy, clock=clock) for limit in limits]

    def hit(self, key: str, cost: int) -> list[Decision]:
        looks = [limiter.peek(key, cost) for limiter in self._limiters]
        return [limiter.hit(key, cost) for limiter in self._limiters] if all(look.allowed for look in looks) else looks


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """Give an event loop that many examples use."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.mark.parametrize("limits", [LIMITS[:1], LIMITS], ids=["one", "several"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_decision_is_the_one_that_memory_makes(
    strategy: Strategy, limits: tuple[Limit, ...], state_url: str, prefix: str, runner: asyncio.Runner
) -> None:
    """Number by number, whatever the times and the costs; the server is told the time, which it otherwise knows."""
    clock = ManualClock()
    store = RedisStore(state_url, prefix=prefix, clock=clock, budget_seconds=20)
    shared = SharedLimits("x", limits, strategy)
    examples = 0

    @given(steps=STEPS)
    @settings(deadline=None, max_examples=60)
    def decide_alike(steps: list[tuple[float, int]]) -> None:
        nonlocal examples
        examples += 1
        memory = Memory(limits, strategy, clock)

        async def compare() -> None:
            for seconds, cost in steps:
                clock.advance(seconds)
                expected = memory.hit("k", cost)
                decisions = await store.spend(f"{examples}", (shared, cost))
                assert [d[:2] for d in decisions] == [d[:2] for d in expected]
                for decision, other in zip(decisions, expected, strict=True):
                    for number, same in zip(decision[2:], other[2:], strict=True):
                        assert number == same or math.isclose(number, same, abs_tol=1e-6)

        runner.run(compare())

    decide_alike()
    runner.run(store.close())


def test_the_time_is_the_servers_if_nobody_tells_another(state_url: str, prefix: str) -> None:
    """A unit of a bucket that was just emptied comes back a little before its interval has passed."""

    async def use(watched: Watched) -> None:
        spent = [await watched.store.spend("k", (LOGIN, 1)) for _ in range(6)]
        assert [each.allowed for [each] in spent] == [True] * 5 + [False]
        # 200 seconds a unit; nobody is so slow that another one comes while this test runs.
        assert 0 < spent[-1][0].retry_seconds < 200

    run(use, state_url, prefix)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_clock_that_goes_back_neither_forgives_nor_punishes(strategy: Strategy, state_url: str, prefix: str) -> None:
    """After a failover the other server's clock is behind: a debt stays, and is never longer than a window."""
    clock = ManualClock(monotonic=10_000)
    limits = SharedLimits("x", (Limit("x", 2, 1000),), strategy)

    async def use(watched: Watched) -> None:
        assert [(await watched.store.spend("k", (limits, 1)))[0].allowed for _ in range(3)] == [True, True, False]
        clock.advance(-0.5)
        [decision] = await watched.store.spend("k", (limits, 1))
        assert not decision.allowed
        assert decision.retry_seconds <= 2000
        clock.advance(-1_000_000)
        [decision] = await watched.store.spend("k", (limits, 1))
        assert decision.allowed or decision.retry_seconds <= 1000

    run(use, state_url, prefix, clock=clock)


def test_several_budgets_of_a_key_are_spent_together_or_not_at_all(state_url: str, prefix: str) -> None:
    """What one refuses costs the other nothing, and each has its own cost."""
    narrow = SharedLimits("narrow", (Limit("n", 2, 1000),), "token-bucket")
    wide = SharedLimits("wide", (Limit("w", 9, 1000), Limit("v", 100, 9000)), "fixed-window")

    async def use(watched: Watched) -> None:
        spend = watched.store.spend
        assert [d.remaining for d in await spend("k", (narrow, 1), (wide, 3))] == [1, 6, 97]
        assert not all(d.allowed for d in await spend("k", (narrow, 2), (wide, 1)))
        assert [d.remaining for d in await spend("k", (wide, 0), (narrow, 0))] == [6, 97, 1]
        assert [d.remaining for d in await spend("other", (narrow, 0))] == [2]

    run(use, state_url, prefix)


def test_what_is_not_ours_under_a_key_counts_as_nothing(state_url: str, prefix: str) -> None:
    """A value that no script of ours has written is written over."""
    client = Redis.from_url(state_url)
    for strategy in STRATEGIES:
        limits = SharedLimits("x", (Limit("x", 2, 1000),), strategy)
        client.set(f"{prefix}:{{limit:k}}:{limits.id}", b"\xffnonsense;1:2")

        async def use(watched: Watched, limits: SharedLimits = limits) -> None:
            assert [d.remaining for d in await watched.store.spend("k", (limits, 1))] == [1]

        run(use, state_url, prefix)
    client.close()


# --- what it leaves on the server -------------------------------------------------------------------------------------


def test_every_key_is_the_services_and_expires(state_url: str, prefix: str) -> None:
    """No key without a time to live, none longer than the state means something; a refusal and a look leave none."""

    async def use(watched: Watched) -> None:
        await watched.store.open()
        for strategy in STRATEGIES:
            limits = SharedLimits("x", LIMITS, strategy)
            await watched.store.spend("203.0.113.1", (limits, 1))
            await watched.store.spend("looks only", (limits, 0))
            await watched.store.spend("refused", (limits, 99))
        await watched.store.put("v", b"1", ttl_seconds=90)
        client = Redis.from_url(state_url)
        left = {key.decode(): client.pttl(key) for key in client.scan_iter(f"{prefix}:*")}
        client.close()
        assert sum("{limit:203.0.113.1}" in key for key in left) == 3
        assert len(left) == 3 + 1 + 1
        assert all(0 < milliseconds <= 5_000_001 for milliseconds in left.values())

    run(use, state_url, prefix)


def test_the_memory_of_the_server_is_bounded_by_those_in_debt(state_url: str, prefix: str) -> None:
    """A thousand clients that came and owe nothing any more leave nothing; one who is in debt takes 200 bytes."""
    limits = SharedLimits("x", (Limit("x", 100_000, 1),), "token-bucket")
    debts = SharedLimits("y", (Limit("y", 10, 1000),), "token-bucket")
    client = Redis.from_url(state_url)

    async def use(watched: Watched) -> None:
        await asyncio.gather(*(watched.store.spend(f"{number}", (limits, 1)) for number in range(1000)))
        await watched.store.spend("203.0.113.1", (debts, 1))
        left = list(client.scan_iter(f"{prefix}:{{limit*"))
        while len(left) > 1:  # a debt of a hundred-thousandth of a second is gone at once; so is its key
            left = list(client.scan_iter(f"{prefix}:{{limit*"))
        assert (client.memory_usage(left[0]) or 0) in range(1, 201)

    run(use, state_url, prefix)
    client.close()


def test_values_are_kept_added_once_and_forgotten(state_url: str, prefix: str) -> None:
    """The protocol that memory speaks too."""

    async def use(watched: Watched) -> None:
        store = watched.store
        assert await store.add("a", b"1", ttl_seconds=50)
        assert not await store.add("a", b"2", ttl_seconds=50)
        assert await store.put("b", b"3", ttl_seconds=50)
        assert await store.get_many(["b", "none", "a"]) == [b"3", None, b"1"]
        assert await store.get_many([]) == []
        await store.delete("a")
        await store.delete("a")
        assert await store.get("a") is None
        assert await store.put("short", b"1", ttl_seconds=0.000001)
        won = await asyncio.gather(*(store.add("c", b"%d" % each, ttl_seconds=50) for each in range(20)))
        assert won.count(True) == 1

    run(use, state_url, prefix)


def test_names_that_mean_something_to_a_server_mean_nothing(state_url: str) -> None:
    """Braces, blanks and half a surrogate in the name of a service or a client are text."""

    async def use(watched: Watched) -> None:
        for key in ("}{", "", "a b", "\ud800", "ключ"):
            assert [d.remaining for d in await watched.store.spend(key, (LOGIN, 0))] == [5]

    run(use, state_url, "my {shop}")


# --- round trips ------------------------------------------------------------------------------------------------------


class Counting:
    """A transport that counts the round trips of another one."""

    def __init__(self, watched: Watched) -> None:
        link = watched.store._here()
        self._transport = link._transport
        self.trips: list[int] = []
        link._transport = self

    async def send(self, commands: Sequence[Command]) -> list[Any]:
        if commands[0][1] == SPEND_DIGEST or commands[0][0] == "GET":
            self.trips.append(len(commands))
        return await self._transport.send(commands)

    async def close(self) -> None:
        await self._transport.close()


def test_what_is_asked_in_one_turn_of_the_loop_is_one_round_trip(state_url: str, prefix: str) -> None:
    """Fifty decisions of three limits each, or fifty values."""
    limits = SharedLimits("x", LIMITS, "sliding-window")

    async def use(watched: Watched) -> None:
        await watched.store.spend("k", (limits, 0))  # the server knows the script from here on
        counting = Counting(watched)
        decisions = await asyncio.gather(*(watched.store.spend("k", (limits, 1)) for _ in range(50)))
        assert counting.trips == [50]
        assert sum(all(d.allowed for d in each) for each in decisions) == 3
        await watched.store.get_many([str(number) for number in range(50)])
        assert counting.trips == [50, 50]

    run(use, state_url, prefix)


def test_what_is_asked_while_all_lanes_are_taken_goes_together_with_the_next(state_url: str, prefix: str) -> None:
    """So that the server is not asked by more connections, but by longer messages."""

    async def use(watched: Watched) -> None:
        await watched.store.spend("k", (LOGIN, 0))
        counting = Counting(watched)

        async def ask_later(turns: int) -> None:
            for _ in range(turns):
                await asyncio.sleep(0)
            await watched.store.spend("k", (LOGIN, 0))

        await asyncio.gather(*(ask_later(turns) for turns in range(20)))
        assert sum(counting.trips) == 20
        assert len(counting.trips) < 20

    run(use, state_url, prefix)


def test_whoever_goes_away_does_not_disturb_those_who_wait(state_url: str, prefix: str) -> None:
    """A request that is cancelled while its decision is under way."""

    async def use(watched: Watched) -> None:
        tasks = [asyncio.create_task(watched.store.spend("k", (LOGIN, 1))) for _ in range(3)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        first, second, third = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(second, asyncio.CancelledError)
        assert isinstance(first, list)
        assert isinstance(third, list)

    run(use, state_url, prefix)


def test_a_store_serves_one_event_loop_after_another(state_url: str, prefix: str) -> None:
    """As under a test client, or where no lifespan is run: it connects anew, and leaves nothing open."""
    store = RedisStore(state_url, prefix=prefix, budget_seconds=20)
    for turn in range(3):
        [decision] = asyncio.run(store.spend("k", (LOGIN, 1)))
        assert decision.remaining == 4 - turn
    assert not store._links
    assert store._link is None


def test_a_store_may_be_closed_that_was_never_opened_or_by_another_loop(state_url: str, prefix: str) -> None:
    """Each event loop closes its own."""
    store = RedisStore(state_url, prefix=prefix, budget_seconds=20)

    async def use() -> None:
        await store.close()
        await store.spend("k", (LOGIN, 1))
        await asyncio.to_thread(asyncio.run, store.spend("k", (LOGIN, 1)))
        assert len(store._links) == 1
        assert [d.remaining for d in await store.spend("k", (LOGIN, 1))] == [2]
        check = store.check()
        assert (check.status, check.unit) == ("pass", "workers")
        await store.close()

    asyncio.run(use())


async def _until_it_knows(workers: int, store: RedisStore) -> None:
    while store.workers != workers:
        await store.get("anything")  # one round trip later the heartbeat has had its answer, too


def test_workers_count_each_other(state_url: str, prefix: str) -> None:
    """Each by its heartbeat; one that ends says so."""

    async def use() -> None:
        stores = [RedisStore(state_url, prefix=prefix, workers=9, budget_seconds=20) for _ in range(3)]
        assert stores[0].workers == 9
        for number, store in enumerate(stores, 1):
            await store.open()
            await _until_it_knows(number, store)
        await stores[0].close()
        again = RedisStore(state_url, prefix=prefix, budget_seconds=20)
        await again.open()
        await _until_it_knows(3, again)
        for store in (*stores, again):
            await store.close()

    asyncio.run(asyncio.wait_for(use(), 30))


# --- without it -------------------------------------------------------------------------------------------------------


def test_a_server_that_refuses_connections_is_given_up_at_once() -> None:
    """The next who ask do not even try; the reason is in the event and in the health check."""

    async def use(watched: Watched) -> None:
        reason = await watched.fails()
        assert reason.startswith("ConnectionError")
        assert not watched.store.available
        assert await watched.fails() == reason
        with pytest.raises(StoreUnavailable):
            await watched.store.put("a", b"1", 1)
        with pytest.raises(StoreUnavailable):
            await watched.store.get("a")
        assert watched.seen == [StoreFailed(reason)]
        check = watched.store.check()
        assert check.status == "fail"
        assert reason in (check.output or "")

    run(use, f"redis://:s3cr3t@127.0.0.1:{free_port()}")


def test_a_server_that_accepts_and_never_answers_is_given_up_within_the_budget() -> None:
    """A black hole costs those who ask at that moment the budget, and nobody else anything."""

    async def use() -> None:
        connected = []

        async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connected.append(writer)
            await reader.read()
            writer.close()

        async with await asyncio.start_server(swallow, "127.0.0.1", 0) as hole:
            port = hole.sockets[0].getsockname()[1]
            async with watching(f"redis://127.0.0.1:{port}", budget_seconds=0.05) as watched:
                answers = await asyncio.gather(
                    *(watched.store.spend("k", (LOGIN, 1)) for _ in range(10)), return_exceptions=True
                )
                assert [str(answer) for answer in answers] == ["no answer within 0.05 s"] * 10
                tried = len(connected)
                await watched.fails()
                assert len(connected) == tried
                assert watched.events.count(StoreFailed) == 1

    asyncio.run(use())


def test_those_who_wait_for_a_lane_are_told_with_those_who_are_under_way(state_server: StartServer) -> None:
    """Their time began when they asked, so it does not begin again."""
    server = state_server()

    async def use(watched: Watched) -> None:
        await watched.store.spend("k", (LOGIN, 1))
        server.tell(signal.SIGSTOP)

        async def ask_later(turns: int) -> None:
            for _ in range(turns):
                await asyncio.sleep(0)
            await watched.fails()

        await asyncio.gather(*(ask_later(turns) for turns in range(12)))
        server.tell(signal.SIGCONT)
        await watched.happened(StoreRecovered)
        [decision] = await watched.store.spend("k", (LOGIN, 0))
        assert decision.remaining <= 4

    run(use, server.url, budget_seconds=1)


def test_a_loop_that_was_busy_is_not_taken_for_a_server_that_is_slow(state_server: StartServer) -> None:
    """What arrived while something else kept the process busy is still taken."""
    server = state_server()

    async def use(watched: Watched) -> None:
        await watched.store.spend("k", (LOGIN, 1))
        watched.store._state.budget_seconds = 0.1
        server.tell(signal.SIGSTOP)
        asked = asyncio.create_task(watched.store.spend("k", (LOGIN, 1)))
        loop = asyncio.get_running_loop()
        for _ in range(10):
            await asyncio.sleep(0)  # it is sent meanwhile
        server.tell(signal.SIGCONT)
        busy_until = loop.time() + 0.3
        while loop.time() < busy_until:
            pass
        assert [d.remaining for d in await asked] == [3]
        assert watched.seen == []

    run(use, server.url)


def test_what_is_under_way_when_the_loop_ends_is_cancelled(state_server: StartServer) -> None:
    """Nobody waits for it any more, and nothing is left open."""
    server = state_server()
    store = RedisStore(server.url, budget_seconds=20)

    async def ask_and_leave() -> "asyncio.Future[Any]":
        await store.spend("k", (LOGIN, 1))
        server.tell(signal.SIGSTOP)
        answer = store._here().ask(("PING",))
        for _ in range(10):
            await asyncio.sleep(0)  # it is sent meanwhile
        return answer

    assert asyncio.run(ask_and_leave()).cancelled()
    assert store.available
    assert not store._links


def test_a_server_that_is_killed_and_started_again_is_found_again(state_server: StartServer) -> None:
    """Nobody has to do anything, and the limit holds from then on."""
    server = state_server()

    async def use(watched: Watched) -> None:
        await watched.store.spend("k", (LOGIN, 5))
        server.kill()
        await watched.fails()
        server.start()
        await watched.happened(StoreRecovered)
        spent = [await watched.store.spend("k", (LOGIN, 1)) for _ in range(6)]
        assert [d.allowed for [d] in spent] == [True] * 5 + [False]
        assert [type(event) for event in watched.seen] == [StoreFailed, StoreRecovered]
        assert isinstance(watched.seen[1], StoreRecovered)
        assert watched.seen[1].seconds > 0

    run(use, server.url)


def test_a_server_that_forgets_the_scripts_is_given_them_again(state_server: StartServer) -> None:
    """Nobody notices: not those who ask, and not the counters."""
    server = state_server()

    async def use(watched: Watched) -> None:
        assert [d.remaining for d in await watched.store.spend("k", (LOGIN, 1))] == [4]
        server.ask("SCRIPT", "FLUSH")
        answers = await asyncio.gather(*(watched.store.spend("k", (LOGIN, 1)) for _ in range(5)))
        assert sorted(d.remaining for [d] in answers) == [0, 0, 1, 2, 3]
        assert watched.seen == []

    run(use, server.url)


async def _until_it_works(watched: Watched) -> None:
    await watched.happened(StoreRecovered, watched.events.count(StoreFailed))
    await watched.store.spend("other", (LOGIN, 1))


def test_a_full_server_is_still_read(state_server: StartServer) -> None:
    """What writes goes on without it; a revocation that it holds still holds."""
    server = state_server()

    async def use(watched: Watched) -> None:
        await watched.store.put("revoked", b"1", ttl_seconds=900)
        server.ask("CONFIG", "SET", "maxmemory", "1")
        assert "OOM" in await watched.fails() or "memory" in await watched.fails()
        assert await watched.store.get("revoked") == b"1"
        assert not watched.store.available
        server.ask("CONFIG", "SET", "maxmemory", "0")
        await _until_it_works(watched)

    run(use, server.url)


def test_a_replica_is_still_read(state_server: StartServer) -> None:
    """After a failover that left us with the wrong one."""
    server = state_server()

    async def use(watched: Watched) -> None:
        await watched.store.put("revoked", b"1", ttl_seconds=900)
        server.ask("REPLICAOF", "127.0.0.1", free_port())
        assert "read only" in await watched.fails()
        assert await watched.store.get("revoked") == b"1"
        server.ask("REPLICAOF", "NO", "ONE")
        await _until_it_works(watched)

    run(use, server.url)


def test_a_server_that_loads_its_data_is_waited_for_in_the_background(state_server: StartServer) -> None:
    """``LOADING`` is an answer, and not the one that was asked for."""
    server = state_server()
    for number in range(500):
        server.ask("SET", f"key {number}", os.urandom(2000))  # nothing that can be packed into fewer bytes
    server.ask("SAVE")
    server.kill()
    server.start("--key-load-delay", "3000", "--loading-process-events-interval-bytes", "1024", ready=False)

    while not server.is_loading():
        pass

    async def use(watched: Watched) -> None:
        assert "loading" in await watched.fails()
        await _until_it_works(watched)

    run(use, server.url)


def test_a_wrong_password_is_a_failure_like_others_and_is_not_shown(
    state_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    """With the right one the same store works."""
    server = state_server("--requirepass", "correct horse")

    async def use(watched: Watched) -> None:
        assert "s3cr3t" not in await watched.fails()
        assert "s3cr3t" not in str(watched.store.check())
        assert "s3cr3t" not in caplog.text
        assert "invalid" in caplog.text

    run(use, server.url.replace("//", "//:s3cr3t@"))

    async def work(watched: Watched) -> None:
        await watched.store.spend("k", (LOGIN, 1))

    run(work, server.url.replace("//", "//:correct%20horse@"))


def test_a_reply_that_is_an_error_fails_only_after_the_others_have_theirs(state_url: str, prefix: str) -> None:
    """Replies are told apart by their place."""

    async def use(watched: Watched) -> None:
        link = watched.store._here()
        good, bad, better = (link.ask(command) for command in (("PING",), ("NONSENSE",), ("ECHO", "x")))
        assert await good == b"PONG"
        with pytest.raises(StoreUnavailable, match="unknown command"):
            await bad
        assert await better == b"x"
        await _until_it_works(watched)

    run(use, state_url, prefix)


def test_without_redis_py_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is served."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'fastapi-hardening\[redis\]'"):
        RedisStore("redis://host")


def test_a_url_that_leads_nowhere_is_refused() -> None:
    """Alone as in the settings."""
    with pytest.raises(ConfigurationError, match="the URL of the shared store begins with redis://"):
        RedisStore("ftp://host")


# --- other ways to a server -------------------------------------------------------------------------------------------


async def _works(watched: Watched) -> None:
    spent = [await watched.store.spend(f"k{number % 3}", (LOGIN, 1)) for number in range(18)]
    assert sum(each.allowed for [each] in spent) == 15
    answers = await asyncio.gather(*(watched.store.spend(f"c{number}", (LOGIN, 1)) for number in range(40)))
    assert all(each.allowed for [each] in answers)
    assert await watched.store.put("a", b"1", 50)
    assert not await watched.store.add("a", b"1", 50)
    assert await watched.store.get_many(["a", "b", "c"]) == [b"1", None, None]
    await watched.store.delete("a")
    assert watched.seen == []


def test_a_socket_is_a_way(state_server: StartServer, tmp_path: Path) -> None:
    """``unix:///path``."""
    state_server("--unixsocket", str(tmp_path / "s"))
    run(_works, f"unix://{tmp_path / 's'}?db=3")


def test_sentinels_lead_to_the_server_and_to_its_successor(state_server: StartServer, tmp_path: Path) -> None:
    """Killed, it is followed by its replica, and the store follows."""
    first = state_server()
    second = state_server("--replicaof", "127.0.0.1", str(first.port))
    port = free_port()
    configuration = tmp_path / "sentinel.conf"
    configuration.write_text(
        f"port {port}\nbind 127.0.0.1\ndir {tmp_path}\n"
        f"sentinel monitor orders 127.0.0.1 {first.port} 1\n"
        "sentinel down-after-milliseconds orders 300\nsentinel failover-timeout orders 3000\n"
    )
    sentinel = StateServer(tmp_path, port=port)
    sentinel._arguments = lambda: [str(configuration), "--sentinel"]  # type: ignore[method-assign]
    try:
        sentinel.start()

        async def use(watched: Watched) -> None:
            await _works(watched)
            first.until_it_says(str(second.port), "INFO", "replication")
            sentinel.until_it_says(str(second.port), "SENTINEL", "REPLICAS", "orders")
            first.kill()
            await watched.fails()
            await watched.happened(StoreRecovered)
            assert [d.remaining for d in await watched.store.spend("new", (LOGIN, 1))] == [4]

        run(use, f"redis+sentinel://127.0.0.1:{port}/orders")
    finally:
        sentinel.kill()


def test_a_cluster_is_a_way(state_server: StartServer) -> None:
    """Three nodes share the keys; all keys of a decision are on one of them."""
    buses = [free_port() for _ in range(3)]
    nodes = [
        state_server(
            *("--cluster-enabled", "yes", "--cluster-port", str(bus), "--cluster-config-file", f"nodes-{bus}.conf")
        )
        for bus in buses
    ]
    for number, (node, slots) in enumerate(zip(nodes, [(0, 5000), (5001, 11000), (11001, 16383)], strict=True)):
        node.ask("CLUSTER", "ADDSLOTSRANGE", *slots)
        node.ask("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        node.ask("CLUSTER", "MEET", "127.0.0.1", nodes[0].port, buses[0])
    both = SharedLimits("other", (Limit("x", 9, 1000),), "fixed-window")

    async def use(watched: Watched) -> None:
        for node in nodes:
            node.until_it_says("cluster_state:ok", "CLUSTER", "INFO")
        await _works(watched)
        for client in range(20):
            assert len(await watched.store.spend(f"{client}", (LOGIN, 1), (both, 1))) == 2
        assert all(node.ask("DBSIZE") > 0 for node in nodes)
        for node in nodes:
            node.ask("SCRIPT", "FLUSH")
        await _works_still(watched)

    run(use, f"redis+cluster://127.0.0.1:{nodes[0].port},127.0.0.1:{nodes[1].port}")


async def _works_still(watched: Watched) -> None:
    answers = await asyncio.gather(*(watched.store.spend(f"d{number}", (LOGIN, 1)) for number in range(40)))
    assert all(each.allowed for [each] in answers)
    assert watched.seen == []


def test_tls_is_spoken_and_certificates_are_checked(state_url: str, prefix: str, tmp_path: Path) -> None:
    """``rediss://``: with the authority it works, without it the server is not believed."""
    certificate, key = _certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = Redis.from_url(state_url)
    place = server.connection_pool.connection_kwargs
    server.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner, outer = await asyncio.open_connection(place["host"], place["port"])
        await asyncio.gather(_pass_on(reader, outer), _pass_on(inner, writer))

    async def use() -> None:
        async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context) as proxy:
            port = proxy.sockets[0].getsockname()[1]
            url = f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={certificate}"
            async with watching(url, prefix) as watched:
                await _works(watched)
            async with watching(f"rediss://127.0.0.1:{port}/0", prefix) as watched:
                assert "certificate" in (await watched.fails()).lower()

    asyncio.run(use())


async def _pass_on(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    while data := await source.read(65536):
        sink.write(data)
    sink.close()


def _certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    paths = folder / "certificate.pem", folder / "key.pem"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return paths
