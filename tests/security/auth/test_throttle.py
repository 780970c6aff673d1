"""The login throttle: who is slowed down, and who never is."""

import asyncio
from contextlib import suppress
from typing import Any

import pytest
from fastapi import HTTPException
from hypothesis import given
from hypothesis import strategies as st

from fastapi_hardening.core.clock import ManualClock
from fastapi_hardening.core.events import Events
from fastapi_hardening.core.identity import CredentialsUnchecked, InvalidCredentials
from fastapi_hardening.core.store import MemoryStore
from fastapi_hardening.core.window import parse_limits
from fastapi_hardening.security.auth.passwords import HashingOverloaded
from fastapi_hardening.security.auth.throttle import (
    FailureBudget,
    LoginFailed,
    LoginThrottle,
    LoginThrottled,
    ThrottleSettings,
    TooManyFailures,
)

HOME, ELSEWHERE = "203.0.113.9", "198.51.100.7"


def seconds(problem: TooManyFailures) -> int:
    return int((problem.headers or {})["Retry-After"])


class Kit:
    """A throttle whose clock can be moved, and logins with the right or a wrong password."""

    def __init__(self, store: Any = None, **changes: Any) -> None:
        self.clock = ManualClock()
        self.events = Events()
        self.seen: list[object] = []
        self.events.subscribe(object, self.seen.append)
        settings = ThrottleSettings.model_validate(changes)
        self.throttle = LoginThrottle(settings, store=store, events=self.events, clock=self.clock)

    async def login(
        self, account: str = "anna", address: str | None = HOME, *, right: bool = False, device: str | None = None
    ) -> bool | int:
        """Whether the login succeeded, or after how many seconds to come back."""
        try:
            async with self.throttle.attempt(account, address, device=device) as attempt:
                if right:
                    await attempt.succeeded()
                return right
        except TooManyFailures as refused:
            problem = refused
        assert problem.document() == {
            "type": "https://iana.org/assignments/http-problem-types#quota-exceeded",
            "title": "Too many failed logins",
            "status": 429,
            "detail": "Too many logins have failed; come back later.",
        }
        return seconds(problem)

    def logins(self, *, times: int, **login: Any) -> list[bool | int]:
        async def all_of_them() -> list[bool | int]:
            return [await self.login(**login) for _ in range(times)]

        return asyncio.run(all_of_them())


def test_the_wait_grows_with_the_failures() -> None:
    """Tried again as soon as it is allowed, a guess at one account is made ever more seldom."""
    kit = Kit()
    made, waits = 0, []
    while made < 45:
        [answer] = kit.logins(times=1, address=None)
        if answer is False:
            made += 1
        else:
            waits.append(answer)
            kit.clock.advance(answer)
    assert waits[0] == 12
    assert max(waits[:5]) <= 60
    assert waits[-1] > 4_000
    assert {12, 60, 360, 4_320} <= set(waits)


def test_a_right_password_costs_nothing() -> None:
    """However often."""
    assert Kit().logins(times=50, right=True) == [True] * 50


def test_who_guesses_from_everywhere_is_stopped_and_the_owner_at_home_is_not() -> None:
    """The account is closed to strangers, while its owner fails and succeeds at a known address as ever."""
    kit = Kit()
    assert kit.logins(times=1, right=True) == [True]
    guesses = [kit.logins(times=1, address=f"198.51.100.{number}")[0] for number in range(200)]
    assert guesses.count(False) == 5
    assert kit.logins(times=4) == [False] * 4
    assert kit.logins(times=3, right=True) == [True] * 3
    assert kit.logins(times=1, address="192.0.2.1", right=True) == [12]


@given(
    st.lists(
        st.tuples(st.sampled_from(["anna", "ANNA ", "otto"]), st.integers(1, 5), st.integers(0, 100), st.booleans()),
        max_size=80,
    )
)
def test_nothing_that_strangers_do_locks_the_owner_out_at_home(guesses: list[tuple[str, int, int, bool]]) -> None:
    """Whatever they try, when and where from, with wrong passwords or right ones to accounts of their own."""

    async def check() -> bool | int:
        kit = Kit(account_limits="2/minute", address_limits="3/minute")
        await kit.login(right=True)
        for account, number, seconds, right in guesses:
            kit.clock.advance(seconds)
            await kit.login(account, f"198.51.100.{number}", right=right and account == "otto")
        return await kit.login(right=True)

    assert asyncio.run(check()) is True


def test_a_known_address_has_a_budget_too() -> None:
    """Whoever sits beside the owner may not guess for ever; and other accounts there are not touched."""
    kit = Kit()
    kit.logins(times=1, right=True)
    assert kit.logins(times=6) == [False] * 5 + [12]
    assert kit.logins(times=1, address=ELSEWHERE) == [False]
    assert kit.logins(times=1, account="otto") == [False]


def test_a_known_device_is_known_at_every_address() -> None:
    """The owner on the road, and behind an address that somebody has spoilt."""
    kit = Kit()
    device = kit.throttle.new_device()
    assert kit.logins(times=1, right=True, device=device) == [True]
    kit.logins(times=10)  # somebody at the same address
    kit.logins(times=10, address=ELSEWHERE)
    assert kit.logins(times=1, address=ELSEWHERE) == [12]
    assert kit.logins(times=1, right=True) == [12]
    assert kit.logins(times=1, address=ELSEWHERE, device=device, right=True) == [True]
    assert kit.logins(times=1, device=device, right=True) == [True]
    assert kit.logins(times=1, address="192.0.2.1", device="forged") == [12]
    assert len(device) == 43


def test_one_guesser_on_many_accounts_is_stopped_by_address() -> None:
    """And nobody else is; an account that knows the address is not closed either."""
    kit = Kit()
    kit.logins(times=1, account="neighbour", right=True)
    answers = [kit.logins(times=1, account=f"user{number}")[0] for number in range(30)]
    assert answers == [False] * 20 + [3] * 10
    assert kit.logins(times=1, account="user1", address=ELSEWHERE) == [False]
    assert kit.logins(times=1, account="neighbour", right=True) == [True]


def test_without_an_address_only_the_account_counts() -> None:
    """Behind a proxy that is not known, one guesser must not close the door for everybody."""
    kit = Kit()
    answers = [kit.logins(times=1, account=f"user{number}", address=None)[0] for number in range(30)]
    assert answers == [False] * 30
    assert kit.logins(times=6, address=None) == [False] * 5 + [12]


def test_spellings_of_one_account_share_its_budget() -> None:
    """Case, width and blanks give nobody more guesses; nor does a name without end, or one that is no text."""
    kit = Kit()
    names = ["Anna", "anna ", "ANNA", "\uff41nna", " aNNa"]
    assert [kit.logins(times=1, account=name, address=None) for name in names] == [[False]] * 5
    assert kit.logins(times=1, address=None) == [12]
    assert kit.logins(times=1, account="\ud800" * 5_000) == [False]


def test_guesses_at_the_same_time_are_counted_before_they_fail() -> None:
    """A hundred at once get no further than one after the other."""

    async def flood() -> list[int]:
        kit = Kit()
        gate = asyncio.Event()

        async def guess() -> int:
            try:
                async with kit.throttle.attempt("anna", None):
                    await gate.wait()
                    return 0
            except TooManyFailures as refused:
                return seconds(refused)

        tasks = [asyncio.create_task(guess()) for _ in range(100)]
        for _ in range(5):
            await asyncio.sleep(0)
        gate.set()
        answers = await asyncio.gather(*tasks)
        assert kit.throttle._accounts._under_way == {}
        return answers

    answers = asyncio.run(flood())
    assert answers.count(0) == 5
    assert set(answers) == {0, 12}


@pytest.mark.parametrize(
    "error", [HashingOverloaded(), CredentialsUnchecked("gone"), HTTPException(502), asyncio.CancelledError()]
)
def test_what_could_not_be_checked_is_no_failure(error: BaseException) -> None:
    """Such as too many hashes at once: it costs the caller nothing."""
    kit = Kit()
    assert asyncio.run(_raise(kit, error, 20)) is False
    assert [type(event) for event in kit.seen] == [LoginFailed]


@pytest.mark.parametrize("error", [HTTPException(401), InvalidCredentials("wrong"), ValueError()])
def test_an_exception_is_no_way_round(error: Exception) -> None:
    """An endpoint may raise where the password is wrong."""
    kit = Kit()
    assert asyncio.run(_raise(kit, error, 5)) == 12


async def _raise(kit: Kit, error: BaseException, times: int) -> bool | int:
    for _ in range(times):
        with pytest.raises(type(error)):
            async with kit.throttle.attempt("anna", HOME):
                raise error
    return await kit.login()


def test_who_has_succeeded_has_not_failed() -> None:
    """Whatever breaks after it."""

    async def check() -> list[object]:
        kit = Kit()
        with suppress(ValueError):
            async with kit.throttle.attempt("anna", HOME) as attempt:
                await attempt.succeeded()
                raise ValueError
        return kit.seen

    assert asyncio.run(check()) == []


def test_events_tell_failures_and_refusals_without_the_name() -> None:
    """Because people type passwords where their name belongs."""
    kit = Kit(account_limits="1/minute")
    kit.logins(times=2, account="my secret password")
    failed, refused = kit.seen
    assert isinstance(failed, LoginFailed)
    assert isinstance(refused, LoginThrottled)
    assert (failed.address, failed.known, refused.budget, refused.retry_seconds) == (HOME, False, "account", 60)
    assert failed.account == refused.account
    assert "secret" not in repr(kit.seen)


@pytest.mark.parametrize(("limits", "budget"), [({"address_limits": "1/day"}, "address"), ({}, "known place")])
def test_an_event_says_which_budget_was_spent(limits: dict[str, str], budget: str) -> None:
    """The client is not told."""
    kit = Kit(**limits)
    if budget == "known place":
        kit.logins(times=1, right=True)
    kit.logins(times=6)
    refused = kit.seen[-1]
    assert isinstance(refused, LoginThrottled)
    assert refused.budget == budget


class Broken(MemoryStore):
    """A store that has gone."""

    async def get(self, key: str) -> bytes | None:
        raise ConnectionError

    async def put(self, key: str, value: bytes, ttl_seconds: float) -> bool:
        raise ConnectionError


@pytest.mark.parametrize("store", [Broken(), MemoryStore(1)], ids=["broken", "full"])
def test_a_store_that_fails_makes_every_place_unknown(store: MemoryStore) -> None:
    """Logins go on, with the stricter budget."""
    asyncio.run(MemoryStore.put(store, "taken", b"", 1e9))
    kit = Kit(store)
    assert kit.logins(times=2, right=True) == [True, True]
    assert kit.logins(times=6) == [False] * 5 + [12]
    assert isinstance(kit.seen[-1], LoginThrottled)
    assert not kit.seen[-1].known


def test_a_place_is_forgotten_after_a_while() -> None:
    """Each success begins the time anew."""
    kit = Kit(known_seconds=100)
    kit.logins(times=1, right=True)
    kit.clock.advance(60)
    kit.logins(times=1, right=True)
    kit.clock.advance(60)
    kit.logins(times=1)
    kit.clock.advance(60)
    kit.logins(times=1)
    assert [event.known for event in kit.seen if isinstance(event, LoginFailed)] == [True, False]


def test_switched_off_nothing_is_counted() -> None:
    """Nor remembered."""
    kit = Kit(enabled=False)
    assert kit.logins(times=50) == [False] * 50
    assert kit.logins(times=1, right=True) == [True]
    assert kit.seen == []


def test_memory_is_bounded() -> None:
    """Names without end share one strict budget when all places are taken."""
    kit = Kit(max_keys=10)
    answers = [kit.logins(times=1, account=f"user{number}", address=None)[0] for number in range(100)]
    assert answers.count(False) == 10 + 5
    assert all(len(limiter) <= 11 for limiter in kit.throttle._accounts._limiters)


def test_limits_that_cannot_be_read_are_refused() -> None:
    """When the settings are made."""
    with pytest.raises(ValueError, match="is not a limit"):
        ThrottleSettings(account_limits="few")


def test_a_budget_smaller_than_what_is_under_way_says_when_to_come_back() -> None:
    """A finite time, though so many at once could never pass."""
    budget = FailureBudget(parse_limits("1/minute"), max_keys=10, clock=ManualClock())
    assert budget.enter("k") == 0
    assert budget.enter("k") == 60
