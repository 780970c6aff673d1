"""Failover: which endpoint is picked, which is left out, and what a hedge does."""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastapi_hardening.core.clock import ManualClock
from fastapi_hardening.core.events import Events
from fastapi_hardening.core.outbound import CallRefused, Outgoing
from fastapi_hardening.resilience.failover import CallHedged, EndpointEjected, Failover, FailoverSettings


class Reply:
    """An answer that knows whether it was closed."""

    def __init__(self, status_code: int = 200, endpoint: str = "") -> None:
        self.status_code = status_code
        self.endpoint = endpoint
        self.closed = False

    async def aclose(self) -> None:
        self.closed = True


class Kit:
    """Three endpoints; ``behave`` says what each does, and how many seconds it takes."""

    def __init__(self, *urls: str, **changes: Any) -> None:
        self.clock = ManualClock(monotonic=1000.0)
        self.open: set[str] = set()
        self.told: list[object] = []
        events = Events()
        events.subscribe(object, self.told.append)
        self.charged = 0
        self.failover = Failover(
            "stock",
            urls or ("a", "b", "c"),
            FailoverSettings(**changes),
            is_open=lambda url: url in self.open,
            charge=self.charge,
            events=events,
            clock=self.clock,
        )
        self.behave: Callable[[str], Any] = lambda _: 200
        self.seconds: dict[str, float] = {}
        self.asked: list[str] = []

    def charge(self) -> bool:
        self.charged += 1
        return self.charged <= 1

    async def send(self, outgoing: Outgoing) -> Reply:
        self.asked.append(outgoing.endpoint)
        self.clock.advance(self.seconds.get(outgoing.endpoint, 0.01))
        outcome = self.behave(outgoing.endpoint)
        if isinstance(outcome, BaseException):
            raise outcome
        return Reply(outcome, outgoing.endpoint)

    def call(self, outgoing: Outgoing | None = None) -> Any:
        async def run() -> Any:
            return await self.failover.around(self.send)(outgoing or Outgoing("a request"))

        try:
            return asyncio.run(run())
        except Exception as error:  # noqa: BLE001 - the test looks at it
            return error

    def share(self, calls: int = 300) -> Counter[str]:
        random.seed(7)
        before = len(self.asked)

        async def run() -> None:
            call = self.failover.around(self.send)
            for _ in range(calls):
                await asyncio.gather(call(Outgoing("a request")), return_exceptions=True)

        asyncio.run(run())
        return Counter(self.asked[before:])


# --- which one --------------------------------------------------------------------------------------------------------


def test_equal_endpoints_get_equal_shares() -> None:
    """More or less."""
    share = Kit().share()
    assert min(share.values()) > 60
    assert len(share) == 3


def test_a_slow_endpoint_gets_little() -> None:
    """But is asked now and then, or it would never be known to be quick again."""
    kit = Kit()
    kit.seconds = {"a": 0.5}
    share = kit.share()
    assert 0 < share["a"] < 30
    kit.seconds = {}
    kit.share()
    assert kit.share()["a"] > 40


def test_an_endpoint_that_fails_quickly_attracts_nothing() -> None:
    """Though its latency is the best."""
    kit = Kit(eject_after_failures=10_000)
    kit.seconds = {"a": 0.0001}
    kit.behave = lambda url: ConnectionRefusedError() if url == "a" else 200
    assert kit.share()["a"] < 30


def test_calls_under_way_count() -> None:
    """Of two equal endpoints the idle one is taken."""
    kit = Kit("a", "b")
    busy = kit.failover.endpoints["a"]
    for _ in range(2):
        kit.share(20)
    busy.in_flight = 5
    for each in kit.failover.endpoints.values():
        each.picked_at = kit.clock.monotonic()
    assert [kit.failover.pick().url for _ in range(50)].count("b") > 40


def test_a_further_attempt_goes_elsewhere() -> None:
    """While there is an endpoint that was not tried; an answer that is given up is closed."""
    kit = Kit()
    kit.behave = lambda _: 500
    outgoing = Outgoing("a request", whole=False)

    async def attempts() -> list[Reply]:
        call = kit.failover.around(kit.send)
        return [await call(outgoing) for _ in range(4)]

    replies = asyncio.run(attempts())
    assert sorted(kit.asked[:3]) == ["a", "b", "c"]
    assert [reply.closed for reply in replies] == [True, True, True, False]


def test_one_endpoint_is_enough() -> None:
    """It is always asked, however often it fails."""
    kit = Kit("a")
    kit.behave = lambda _: ConnectionResetError()
    assert kit.share(20) == {"a": 20}
    assert kit.told == []


@pytest.mark.parametrize("urls", [(), ("a", "a")])
def test_endpoints_are_some_and_different(urls: tuple[str, ...]) -> None:
    """A mistake of the configuration is found where it is made."""
    with pytest.raises(ValueError, match="at least one endpoint"):
        Failover("stock", urls)


# --- which one not ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [ConnectionResetError(), TimeoutError(), 502, 503])
def test_an_endpoint_is_left_out_after_failures_in_a_row(failure: Any) -> None:
    """No more than one of three, for the time that is set."""
    kit = Kit(eject_after_failures=2)
    kit.behave = lambda url: failure if url == "a" else 200
    assert kit.share(1000)["a"] == 2
    assert kit.told == [EndpointEjected("stock", "a", 30.0)]
    assert kit.failover.check().output == "1 of 3 endpoints left out: a"
    kit.behave = lambda _: 200
    kit.clock.advance(30)
    assert kit.failover.check().status == "pass"
    assert kit.share()["a"] > 30


@pytest.mark.parametrize("outcome", [500, 404, asyncio.CancelledError(), CallRefused("not now", seconds_left=1)])
def test_what_says_nothing_of_the_endpoint_ejects_none(outcome: Any) -> None:
    """A mistake of the application behind it, of the caller, a caller that has gone, or a refusal of ours."""
    kit = Kit(eject_after_failures=1)
    kit.behave = lambda _: outcome

    async def run() -> None:
        await asyncio.gather(*(kit.failover.around(kit.send)(Outgoing("r")) for _ in range(9)), return_exceptions=True)

    asyncio.run(run())
    assert kit.told == []
    assert all(each.in_flight == 0 for each in kit.failover.endpoints.values())


def test_each_time_it_is_left_out_for_longer() -> None:
    """Unless it has behaved meanwhile; never longer than the longest."""
    kit = Kit("a", "b", eject_after_failures=1, ejection_seconds=10, longest_ejection_seconds=25, panic_below=0)
    endpoint = kit.failover.endpoints["a"]
    lengths: list[float] = []
    for pause in (0, 0, 0, 10, 1000):
        kit.clock.advance(max(0.0, endpoint.ejected_until - kit.clock.monotonic()) if lengths else 0.0)
        kit.clock.advance(pause)
        kit.failover._eject(endpoint)
        lengths.append(endpoint.ejected_until - kit.clock.monotonic())
    assert lengths == [10, 20, 25, 25, 10]


def test_no_more_than_a_share_is_left_out() -> None:
    """One in any case, none if it is 0."""
    for share, most in ((0.1, 1), (0.5, 2), (1.0, 4), (0.0, 0)):
        kit = Kit("a", "b", "c", "d", eject_after_failures=1, max_ejected=share)
        for endpoint in kit.failover.endpoints.values():
            kit.failover._eject(endpoint)
        assert len(kit.told) == most


def test_in_a_panic_all_are_used() -> None:
    """When most are left out it is hardly their fault."""
    kit = Kit("a", "b", "c", eject_after_failures=1, max_ejected=1.0, panic_below=0.5)
    for url in ("a", "b"):
        kit.failover._eject(kit.failover.endpoints[url])
    assert set(kit.share()) == {"a", "b", "c"}


def test_open_circuits_are_not_asked() -> None:
    """Unless all are, and then the breaker says so itself."""
    kit = Kit()
    kit.open = {"a", "b"}
    assert set(kit.share(50)) == {"c"}
    kit.failover._eject(kit.failover.endpoints["c"])
    assert set(kit.share(50)) == {"c"}, "better one that was left out than an open circuit"
    kit.open = {"a", "b", "c"}
    kit.behave = lambda _: CallRefused("open", seconds_left=1)
    assert isinstance(kit.call(), CallRefused)


def test_a_refusal_costs_no_attempt() -> None:
    """A trial that was taken by somebody else in this very moment: the next endpoint is asked at once."""
    kit = Kit()
    kit.behave = lambda url: 200 if url == "c" else CallRefused("open", seconds_left=1)
    assert all(kit.call().endpoint == "c" for _ in range(10))
    assert all(each.failed == 0 for each in kit.failover.endpoints.values())


@given(st.lists(st.sampled_from(["ok", "fail", "wait", "long"]), max_size=40), st.integers(1, 5))
@settings(max_examples=25)
def test_somebody_is_always_asked(steps: list[str], endpoints: int) -> None:
    """Whatever fails when, and nothing under way is counted twice."""
    kit = Kit(*"abcde"[:endpoints], eject_after_failures=1, max_ejected=0.5)
    for step in steps:
        kit.clock.advance({"wait": 1.0, "long": 40.0}.get(step, 0.0))
        outcome = ConnectionResetError() if step == "fail" else 200
        kit.behave = dict.fromkeys(kit.failover.endpoints, outcome).get
        kit.call()
    assert len(kit.asked) == len(steps)
    assert all(each.in_flight == 0 and each.load > 0 for each in kit.failover.endpoints.values())


# --- hedges -----------------------------------------------------------------------------------------------------------


class Race(Kit):
    """Endpoints that answer when they are told to."""

    def __init__(self, **changes: Any) -> None:
        super().__init__("a", "b", hedge_after_seconds=0.001, **changes)
        self.started: list[str] = []
        self.may_end: dict[str, asyncio.Event] = {}
        self.replies: list[Reply] = []
        self.cancelled: list[str] = []

    async def send(self, outgoing: Outgoing) -> Reply:
        url = outgoing.endpoint
        self.started.append(url)
        if len(self.started) == 2:
            self.two_started.set()
        try:
            await self.may_end[url].wait()
        except asyncio.CancelledError:
            self.cancelled.append(url)
            raise
        outcome = self.behave(url)
        if isinstance(outcome, BaseException):
            raise outcome
        self.replies.append(Reply(outcome, url))
        return self.replies[-1]

    def run(self, course: Callable[["Race", "asyncio.Task[Any]"], Awaitable[None]], **outgoing: Any) -> Any:
        async def run() -> Any:
            self.two_started = asyncio.Event()
            self.may_end = {url: asyncio.Event() for url in self.failover.endpoints}
            call = self.failover.around(self.send)
            task = asyncio.ensure_future(call(Outgoing("r", hedged=outgoing.get("hedged", True))))
            assert isinstance(task, asyncio.Task)
            await course(self, task)
            return (await asyncio.gather(task, return_exceptions=True))[0]

        return asyncio.run(run())

    async def both_under_way(self) -> None:
        async with asyncio.timeout(5):
            await self.two_started.wait()


async def second_is_quicker(race: Race, _task: "asyncio.Task[Any]") -> None:
    await race.both_under_way()
    race.may_end[race.started[1]].set()


def test_a_hedge_answers_for_the_one_that_takes_long() -> None:
    """The other call is ended, and it cost the budget one retry."""
    race = Race()
    reply = race.run(second_is_quicker)
    assert reply.endpoint == race.started[1] != race.started[0]
    assert race.cancelled == [race.started[0]]
    assert race.charged == 1
    assert race.told == [CallHedged("stock", 0.001)]
    assert all(each.in_flight == 0 for each in race.failover.endpoints.values())


def test_a_hedge_that_fails_decides_nothing() -> None:
    """The first is waited for; what both fail with is raised."""
    race = Race()
    race.behave = lambda url: 503 if url == race.started[1] else 200

    async def first_ends_last(race: Race, task: "asyncio.Task[Any]") -> None:
        await second_is_quicker(race, task)
        await asyncio.sleep(0.01)
        race.may_end[race.started[0]].set()

    assert race.run(first_ends_last).status_code == 200
    assert [reply.closed for reply in race.replies] == [True, False]
    broken = Race()
    broken.behave = lambda _: ConnectionResetError("both")
    assert isinstance(broken.run(first_ends_last), ConnectionResetError)


def test_a_first_call_that_fails_at_once_is_not_hedged() -> None:
    """Another attempt is the retry's."""
    race = Race()
    race.behave = lambda _: ConnectionResetError("at once")

    async def at_once(race: Race, _task: "asyncio.Task[Any]") -> None:
        for event in race.may_end.values():
            event.set()

    assert isinstance(race.run(at_once), ConnectionResetError)
    assert (len(race.started), race.charged) == (1, 0)


@pytest.mark.parametrize("why", ["not repeatable", "no budget", "no other endpoint"])
def test_what_may_not_be_hedged_is_not(why: str) -> None:
    """What may not happen twice, what the budget does not pay for, and where there is nobody else."""
    race = Race()
    if why == "no budget":
        race.charged = 1
    if why == "no other endpoint":
        race.open = {"b"}

    async def wait(race: Race, _task: "asyncio.Task[Any]") -> None:
        await asyncio.sleep(0.02)
        race.may_end[race.started[0]].set()

    assert race.run(wait, hedged=why != "not repeatable").status_code == 200
    assert len(race.started) == 1


def test_a_hedge_may_follow_what_is_usual() -> None:
    """Nothing is hedged before that is known, and then what takes longer than 95 of the last 100 calls."""
    race = Race()
    race.failover.settings = FailoverSettings(hedge_after_seconds="p95")
    assert race.failover._hedge_after() is None

    async def wait(race: Race, _task: "asyncio.Task[Any]") -> None:
        await asyncio.sleep(0.002)
        race.may_end[race.started[0]].set()

    assert race.run(wait).status_code == 200
    assert len(race.started) == 1
    for seconds in [0.001] * 189 + [9.0] * 11:
        race.failover._p95.add(seconds)
    assert race.failover._hedge_after() == 9.0
    for seconds in [0.001] * 96 + [9.0] * 4:
        race.failover._p95.add(seconds)
    race.started.clear()
    assert race.run(second_is_quicker).status_code == 200
    assert len(race.started) == 2


def test_who_goes_away_ends_both() -> None:
    """Nothing is left under way."""
    race = Race()

    async def go_away(race: Race, task: "asyncio.Task[Any]") -> None:
        await race.both_under_way()
        task.cancel()

    assert isinstance(race.run(go_away), asyncio.CancelledError)
    assert sorted(race.cancelled) == ["a", "b"]
