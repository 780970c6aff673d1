"""Bans: who is shut out, for how long, and who never is."""

import asyncio
import logging
from typing import Any

import pytest
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient, WebSocketDenialResponse

from fastapi_hardening import RateLimit, Settings, harden
from fastapi_hardening.core.clock import ManualClock
from fastapi_hardening.core.events import Events, RequestRefused
from fastapi_hardening.core.identity import Principal
from fastapi_hardening.core.keys import AllowList
from fastapi_hardening.core.store import MemoryStore
from fastapi_hardening.security.bans import BanLifted, BanList, BansSettings, ClientBanned

HERE = "203.0.113.1"


class Kit:
    """A hardened application whose clock can be moved."""

    def __init__(self, **settings: Any) -> None:
        self.clock = ManualClock()
        self.app = FastAPI()
        self.handle = harden(self.app, Settings(_env_file=None, **settings), clock=self.clock)

    def client(self, address: str = HERE) -> TestClient:
        return TestClient(self.app, client=(address, 1))

    def statuses(self, path: str, times: int, address: str = HERE, **headers: str) -> list[int]:
        return [self.client(address).get(path, headers=headers).status_code for _ in range(times)]


def ban_list(**settings: Any) -> tuple[BanList, ManualClock]:
    clock = ManualClock()
    return BanList(BansSettings(**settings), clock=clock), clock


# --- engine -----------------------------------------------------------------------------------------------------------


def test_each_further_ban_is_longer_until_the_record_is_clean() -> None:
    """By the factor, not above the longest; a client that behaves for as long begins anew."""
    bans, clock = ban_list(after_refusals=1, ban_seconds=10, growth=3, longest_seconds=60)
    lengths = []
    for _ in range(4):
        assert bans.count_refusal("k")
        [ban] = bans.list()
        lengths.append(ban.until - clock.time())
        clock.advance(lengths[-1])
        assert bans.find("k") is None
    assert lengths == [10, 30, 60, 60]
    clock.advance(60)
    bans.count_refusal("k")
    assert [ban.times for ban in bans.list()] == [1]


def test_only_refusals_within_the_window_count() -> None:
    """From the first one on."""
    bans, clock = ban_list(after_refusals=2, window_seconds=10)
    assert not bans.count_refusal("k")
    clock.advance(10)
    assert not bans.count_refusal("k")
    clock.advance(9)
    assert bans.count_refusal("k")
    assert not bans.count_refusal("k"), "a banned client is not banned again"


def test_off_by_default() -> None:
    """Refusals alone ban nobody; by hand anybody may be banned."""
    bans, clock = ban_list()
    assert not any(bans.count_refusal("k") for _ in range(1000))
    assert bans.add("k", 5, "scraper").reason == "scraper"
    assert bans.refusal("k") is not None
    clock.advance(5)
    assert bans.refusal("k") is None


def test_memory_is_bounded_and_who_has_no_place_is_not_banned(caplog: pytest.LogCaptureFixture) -> None:
    """But told once; places are free again when bans are forgotten."""
    bans, clock = ban_list(after_refusals=1, max_keys=2, ban_seconds=1, longest_seconds=10)
    assert [bans.count_refusal(key) for key in "abcd"] == [True, True, False, False]
    assert caplog.text.count("max_keys") == 1
    with pytest.raises(ValueError, match="max_keys"):
        bans.add("e", 5)
    clock.advance(11)
    assert bans.count_refusal("c")


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), float("nan")])
def test_a_ban_has_an_end(seconds: float) -> None:
    """And a beginning."""
    with pytest.raises(ValueError, match="some seconds"):
        ban_list()[0].add("k", seconds)


def test_who_is_allowed_is_never_banned() -> None:
    """Neither by hand nor by refusals."""
    bans = BanList(BansSettings(after_refusals=1), allow=AllowList(["10.0.0.0/8", "principal=monitor"]))
    assert not bans.count_refusal("10.1.2.3")
    assert not bans.count_refusal("principal=monitor")
    with pytest.raises(ValueError, match="allow"):
        bans.add("10.1.2.3", 60)


def test_lifting_forgets_everything() -> None:
    """Also earlier bans; what is not banned cannot be lifted."""
    bans, _ = ban_list(after_refusals=1)
    bans.count_refusal("k")
    assert bans.lift("k")
    assert not bans.lift("k")
    bans.count_refusal("k")
    assert [ban.times for ban in bans.list()] == [1]


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 100)), max_size=60))
def test_no_client_is_banned_for_the_refusals_of_another(steps: list[tuple[str, float]]) -> None:
    """A client is banned only by as many refusals of its own within the window."""
    bans, clock = ban_list(after_refusals=3, window_seconds=50, ban_seconds=20, growth=1, max_keys=2)
    own: dict[str, list[float]] = {}
    for key, wait in steps:
        clock.advance(wait)
        own.setdefault(key, []).append(clock.time())
        if bans.count_refusal(key):
            assert len([at for at in own[key] if at >= clock.time() - 50]) >= 3
    assert len(bans.list()) <= 2


# --- what the client sees ---------------------------------------------------------------------------------------------


def test_repeated_refusals_shut_a_client_out_and_nobody_else() -> None:
    """With the third problem of the draft and the time to come back; told, counted, and over by itself."""
    kit = Kit(rate_limit={"default": "1/minute"}, bans={"after_refusals": 2, "ban_seconds": 300})
    told: list[ClientBanned] = []
    kit.handle.events.subscribe(ClientBanned, told.append)
    assert kit.statuses("/", 3) == [404, 429, 429]
    kit.clock.advance(60)
    answer = kit.client().get("/")
    assert answer.json()["type"].endswith("#abnormal-usage-detected")
    assert answer.headers["retry-after"] == "240"
    assert [(event.ban.key, event.automatic) for event in told] == [(HERE, True)]
    assert kit.statuses("/", 1, "203.0.113.2") == [404]
    with pytest.raises(WebSocketDenialResponse) as refusal, kit.client().websocket_connect("/"):
        raise AssertionError("was accepted")
    assert refusal.value.status_code == 429
    assert kit.statuses("/livez", 1) == [200]
    kit.clock.advance(240)
    assert kit.statuses("/", 1) == [404]


def test_a_ban_is_listed_and_lifted_through_the_handle() -> None:
    """And added: an IPv6 client by its /64."""
    kit = Kit()
    lifted: list[BanLifted] = []
    kit.handle.events.subscribe(BanLifted, lifted.append)
    kit.handle.bans.add("2001:db8::/64", 60, "scraper")
    assert kit.statuses("/", 1, "2001:db8::1") == [429]
    assert [(ban.key, ban.reason) for ban in kit.handle.bans.list()] == [("2001:db8::/64", "scraper")]
    assert kit.handle.bans.lift("2001:db8::/64")
    assert lifted == [BanLifted("2001:db8::/64")]
    assert kit.statuses("/", 1, "2001:db8::1") == [404]


@pytest.mark.parametrize("layer", ["address_limit", "rate_limit"])
def test_a_ban_holds_with_either_layer_alone(layer: str) -> None:
    """Also on a route without a limit; without both, nothing asks."""
    kit = Kit(**{layer: {"enabled": False}})
    kit.app.get("/free", dependencies=[RateLimit.exempt])(lambda: "free")
    kit.handle.bans.add(HERE, 60)
    assert kit.statuses("/free", 1) == [429]


def test_switched_off_nobody_is_banned() -> None:
    """Whatever the list says."""
    kit = Kit(bans={"enabled": False, "after_refusals": 1}, rate_limit={"default": "1/minute"})
    assert kit.statuses("/", 2) == [404, 429]
    assert kit.handle.bans.list() == []
    kit.handle.bans.add("203.0.113.2", 60)
    assert kit.statuses("/", 1, "203.0.113.2") == [404]


def test_who_is_allowed_passes_every_limit() -> None:
    """The flood guard, too; nobody else does."""
    kit = Kit(address_limit={"limit": "1/minute"}, rate_limit={"default": "2/minute", "allow": ["203.0.113.0/28"]})
    assert kit.statuses("/", 4) == [404] * 4
    assert kit.statuses("/", 2, "203.0.113.99") == [404, 429]


def test_a_flood_is_a_reason_too() -> None:
    """The refusals of the address limit count as well."""
    kit = Kit(address_limit={"limit": "1/minute"}, bans={"after_refusals": 2})
    assert kit.statuses("/", 4) == [404, 429, 429, 429]
    assert kit.client().get("/").headers["retry-after"] == "300"


@pytest.mark.parametrize(
    ("address", "headers"),
    [
        ("10.0.0.1", {"X-Forwarded-For": "203.0.113.9"}),
        ("testclient", {}),
    ],
)
def test_an_address_that_stands_for_many_is_never_banned_automatically(address: str, headers: dict[str, str]) -> None:
    """A proxy that is not known, and what is no address: one client more would take all others along."""
    kit = Kit(
        rate_limit={"default": "1/minute", "unknown_proxy_factor": 1},
        address_limit={"limit": "2/minute", "unknown_proxy_factor": 1},
        bans={"after_refusals": 1},
    )
    assert 429 in kit.statuses("/", 9, address, **headers)
    assert kit.handle.bans.list() == []


class Identifies:
    """A layer in front that knows who calls, as authentication will."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        name = dict(scope["headers"]).get(b"x-user", b"").decode()
        if name:
            scope["fastapi_hardening.context"].principal = Principal(name)
        await self.app(scope, receive, send)


def identified(kit: Kit) -> None:
    """Has the caller known before the rate limit."""
    stack: Any = kit.app.middleware_stack or kit.app.build_middleware_stack()
    kit.app.middleware_stack = stack
    while type(stack.app).__name__ != "RateLimitMiddleware":
        stack = stack.app
    stack.app = Identifies(stack.app)


def test_the_key_that_was_refused_is_banned_and_the_address_is_not() -> None:
    """A principal, wherever it comes from."""
    kit = Kit(rate_limit={"default": "1/minute", "key": "principal"}, bans={"after_refusals": 1})
    identified(kit)
    assert kit.statuses("/", 3, **{"X-User": "anna"}) == [404, 429, 429]
    assert [ban.key for ban in kit.handle.bans.list()] == ["principal=anna"]
    kit.clock.advance(60)
    assert kit.statuses("/", 1, "203.0.113.2", **{"X-User": "anna"}) == [429]
    assert kit.statuses("/", 1, **{"X-User": "bert"}) == [404]


def test_a_refusal_of_an_override_that_acts_late_counts() -> None:
    """And a banned key is refused there."""

    class Rewrite:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await self.app(dict(scope) | {"path": "/inner"}, receive, send)

    kit = Kit(bans={"after_refusals": 1})
    kit.app.add_middleware(Rewrite)
    kit.app.get("/inner", dependencies=[RateLimit("1/minute", key="header:X-User")])(lambda: "ok")
    seen: list[RequestRefused] = []
    kit.handle.events.subscribe(RequestRefused, seen.append)
    assert kit.statuses("/elsewhere", 3, **{"X-User": "anna"}) == [200, 429, 429]
    assert [event.problem for event in seen] == ["quota-exceeded", "abnormal-usage-detected"]
    assert [ban.key for ban in kit.handle.bans.list()] == ["header:x-user=anna"]


# --- between workers --------------------------------------------------------------------------------------------------


class Worker:
    """One of several processes that share a store."""

    def __init__(self, store: Any, clock: ManualClock, **settings: Any) -> None:
        self.bans = BanList(BansSettings(**settings), events=Events(), clock=clock, store=store)

    async def refuses(self, key: str) -> bool:
        """Whether a key is refused, once what the worker has begun is done."""
        self.bans.refusal(key)
        if self.bans._sync is not None:
            await self.bans._sync
        return self.bans.refusal(key) is not None


def test_workers_tell_each_other_of_bans_and_of_lifted_ones() -> None:
    """Every few seconds, not with each request."""

    async def story() -> None:
        clock = ManualClock()
        store = MemoryStore(clock=clock)
        one, two = Worker(store, clock), Worker(store, clock)
        assert not await two.refuses("k")
        one.bans.add("k", 1000, "scraper")
        assert await one.refuses("k")
        assert not await two.refuses("k")
        clock.advance(5)
        assert await two.refuses("k")
        assert two.bans.list() == one.bans.list()
        clock.advance(1)
        two.bans.lift("k")
        assert not await two.refuses("k")
        clock.advance(5)
        assert not await one.refuses("k")
        # A shorter ban after a longer one that was lifted holds as well.
        one.bans.add("k", 100)
        assert await one.refuses("k")
        clock.advance(6)
        assert await two.refuses("k")
        clock.advance(100)
        assert not await two.refuses("k")

    asyncio.run(story())


def test_a_ban_from_outside_of_the_server_is_told_with_the_next_request() -> None:
    """A shell has no event loop."""
    clock = ManualClock()
    store = MemoryStore(clock=clock)
    one, two = Worker(store, clock), Worker(store, clock)
    one.bans.add("k", 1000)

    async def story() -> None:
        assert await one.refuses("k")
        assert await two.refuses("k")

    asyncio.run(story())


def test_a_store_that_holds_something_else_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """What a worker knows by itself holds."""

    async def story() -> None:
        clock = ManualClock()
        store = MemoryStore(clock=clock)
        await store.put("bans", b"[1", 60)
        worker = Worker(store, clock)
        worker.bans.add("k", 60)
        assert await worker.refuses("k")
        assert "could not be exchanged" in caplog.text

    with caplog.at_level(logging.WARNING):
        asyncio.run(story())


def test_alone_nothing_is_exchanged() -> None:
    """There is nobody to tell."""
    bans, _ = ban_list()
    bans.add("k", 60)
    asyncio.run(bans.exchange())
    assert bans._sync is None
