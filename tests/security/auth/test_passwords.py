"""Passwords: what is a match, what it costs, how many at once."""

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from fastapi_hardening.security.auth.passwords import (
    HashingOverloaded,
    PasswordHasher,
    PasswordPolicy,
    PasswordRejected,
    PasswordSettings,
    WorkLimit,
)

CHEAP = {"memory_kib": 1_024, "time_cost": 1}


def hasher(**changes: object) -> PasswordHasher:
    return PasswordHasher(PasswordSettings.model_validate(CHEAP | changes))


@contextmanager
def all_taken(hasher: PasswordHasher) -> Iterator[None]:
    """Has every place taken by somebody."""
    limit = hasher._limit
    free, limit._free = limit._free, 0
    yield
    limit._free = free


# --- hashing ----------------------------------------------------------------------------------------------------------


async def _round_trip(password: str) -> tuple[str, bool, bool]:
    mine = hasher()
    hashed = await mine.hash(password)
    return hashed, await mine.verify(password, hashed), await mine.verify(password + "x", hashed)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(st.characters(codec="utf-8"), max_size=60))
def test_a_password_matches_its_own_hash_and_no_other(password: str) -> None:
    """Whatever the characters, NUL among them."""
    hashed, same, longer = asyncio.run(_round_trip(password))
    assert hashed.startswith("$argon2id$v=19$m=1024,t=1,p=1$")
    assert same
    assert not longer


def test_a_password_is_the_same_from_every_keyboard() -> None:
    """Composed or not, full width or not (NFKC)."""

    async def check() -> list[bool]:
        mine = hasher()
        stored = await mine.hash("caf\u00e9 \u2460")
        return [await mine.verify(typed, stored) for typed in ("cafe\u0301 1", "caf\u00e9 \uff11", "cafe 1")]

    assert asyncio.run(check()) == [True, True, False]


def test_two_hashes_of_one_password_differ() -> None:
    """Each has its own salt."""

    async def both() -> set[str]:
        mine = hasher()
        return {await mine.hash("the same") for _ in range(2)}

    assert len(asyncio.run(both())) == 2


def test_an_account_that_does_not_exist_costs_a_hash_too() -> None:
    """The hash that is verified in its place has today's costs, so the answer takes as long, and nothing matches it."""
    mine = hasher(time_cost=3)
    assert not asyncio.run(mine.verify("", None))
    assert not mine.needs_rehash(mine._nobodys)
    assert mine._nobodys != hasher(time_cost=3)._nobodys


@pytest.mark.parametrize(
    "stored", ["", "!", "plain text", "$argon2id$v=19$m=1024,t=1,p=1$AAAA$AAAA", "$2b$12$x", "\ud800"]
)
def test_a_hash_that_cannot_be_read_lets_nobody_in(stored: str, caplog: pytest.LogCaptureFixture) -> None:
    """It costs a hash too, the log says so, and the hash should be replaced."""
    mine = hasher()
    assert not asyncio.run(mine.verify("secret", stored))
    assert mine.needs_rehash(stored)
    assert "cannot be read" in caplog.text
    assert "secret" not in caplog.text


def test_hashes_at_former_costs_still_match_and_are_to_be_made_again() -> None:
    """So that costs can be raised while accounts live on."""

    async def check() -> tuple[bool, bool, bool]:
        before, today = hasher(), hasher(time_cost=2)
        stored = await before.hash("a password")
        return await today.verify("a password", stored), today.needs_rehash(stored), before.needs_rehash(stored)

    assert asyncio.run(check()) == (True, True, False)


@pytest.mark.parametrize("password", ["x" * 1_025, "\u00e9" * 513, "\ufdfa" * 100, "lone \ud800"])
def test_what_is_too_long_or_no_text_is_refused_before_any_work(password: str) -> None:
    """By its bytes, also when only normalising makes it so long; it is wrong as any wrong password is."""
    mine = hasher(max_concurrent=1, wait_seconds=0)

    async def check() -> bool:
        with all_taken(mine):  # nothing could be worked out now
            with pytest.raises(PasswordRejected):
                await mine.hash(password)
            return await mine.verify(password, None)

    assert not asyncio.run(check())


def test_without_argon2_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the hasher is made, not at the first login."""
    monkeypatch.setitem(sys.modules, "argon2", None)
    with pytest.raises(ModuleNotFoundError, match=r"fastapi-hardening\[auth\]"):
        PasswordHasher()


def test_by_default_half_of_the_cores_may_hash() -> None:
    """At least one, so that the event loop keeps a core where there are two."""
    assert hasher()._limit.max_concurrent >= 1
    assert hasher(max_concurrent=7)._limit.max_concurrent == 7


# --- work limit -------------------------------------------------------------------------------------------------------


class Bench:
    """Work that is held until it is let go, and counts how many did it at once."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.most = self.now = 0
        self._lock = threading.Lock()

    def work(self) -> None:
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
        assert self.gate.wait(30)
        with self._lock:
            self.now -= 1


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - what it waits for happens in a thread
            await asyncio.sleep(0)


def test_no_more_than_the_limit_work_at_once_and_all_get_their_turn() -> None:
    """However many come together."""
    bench, limit = Bench(), WorkLimit(3, wait_seconds=30)

    async def flood() -> None:
        tasks = [asyncio.create_task(limit.run(bench.work)) for _ in range(40)]
        await until(lambda: bench.now == 3)
        bench.gate.set()
        await asyncio.gather(*tasks)

    asyncio.run(flood())
    assert bench.most <= 3
    assert bench.now == 0


def test_one_more_is_refused_when_no_place_comes_free_in_time() -> None:
    """And the next one passes when there is one."""
    bench, limit = Bench(), WorkLimit(1, wait_seconds=0.001)

    async def check() -> None:
        task = asyncio.create_task(limit.run(bench.work))
        await until(lambda: bench.now == 1)
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await limit.run(bench.work)
        bench.gate.set()
        await task
        await limit.run(bench.work)

    asyncio.run(check())
    assert bench.most == 1


def test_a_caller_that_leaves_does_not_free_the_place_of_its_thread() -> None:
    """A thread cannot be stopped, so requests that are cut off must not let more of them begin."""
    bench, limit = Bench(), WorkLimit(1, wait_seconds=0)

    async def check() -> None:
        task = asyncio.create_task(limit.run(bench.work))
        await until(lambda: bench.now == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(TimeoutError):
            await limit.run(bench.work)
        bench.gate.set()
        await until(lambda: limit._free == 1)
        await limit.run(bench.work)

    asyncio.run(check())
    assert bench.most == 1


def test_a_place_that_is_given_to_who_leaves_goes_to_the_next() -> None:
    """At the very same moment."""
    limit = WorkLimit(1, wait_seconds=30)

    async def check() -> int:
        await limit._enter()
        first, second = (asyncio.create_task(limit.run(lambda: 7)) for _ in range(2))
        await until(lambda: len(limit._waiting) == 2)
        limit._leave()
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        return await second

    assert asyncio.run(check()) == 7


def test_what_the_work_raises_reaches_the_caller_and_frees_the_place() -> None:
    """A failure takes no place for ever."""
    limit = WorkLimit(1, wait_seconds=0)

    async def check() -> None:
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                await limit.run(lambda: 1 // 0)
            await until(lambda: limit._free == 1)

    asyncio.run(check())
    assert limit._free == 1


def test_a_limit_serves_one_event_loop_after_the_other() -> None:
    """Also when somebody had to wait in each: tests have a loop each."""
    limit = WorkLimit(1, wait_seconds=30)

    async def both() -> list[int]:
        return list(await asyncio.gather(limit.run(lambda: 1), limit.run(lambda: 2)))

    assert [asyncio.run(both()) for _ in range(2)] == [[1, 2]] * 2


def test_under_a_flood_of_logins_a_client_is_told_when_to_come_back() -> None:
    """503 with ``Retry-After``, in an application that was never hardened too."""
    mine = hasher(max_concurrent=1, wait_seconds=0, retry_after_seconds=3)
    app = FastAPI()

    @app.get("/login")
    async def login() -> bool:
        with all_taken(mine):
            return await mine.verify("a password", None)

    answer = TestClient(app).get("/login")
    assert answer.status_code == 503
    assert 3 <= int(answer.headers["retry-after"]) <= 6


def test_a_flood_is_a_problem_with_a_type() -> None:
    """So that a program can tell it from a failure."""
    mine = hasher(max_concurrent=1, wait_seconds=0)

    async def check() -> HashingOverloaded:
        with all_taken(mine), pytest.raises(HashingOverloaded) as refused:
            await mine.hash("a password")
        return refused.value

    assert asyncio.run(check()).slug == "temporary-reduced-capacity"


# --- policy -----------------------------------------------------------------------------------------------------------


async def _denied(password: str) -> bool:
    return password == "denied by async "


@pytest.mark.parametrize(
    ("policy", "password", "sentence"),
    [
        (PasswordPolicy(), "x" * 14, "at least 15 characters"),
        (PasswordPolicy(8), "\u00e9" * 7, "at least 8 characters"),
        (PasswordPolicy(8), "e\u0301" * 7, "at least 8 characters"),
        (PasswordPolicy(denied={"passwordpassword"}.__contains__), "passwordpassword", "known to attackers"),
        (PasswordPolicy(denied={"passwordpassword"}.__contains__), "\uff50asswordpassword", "known to attackers"),
        (PasswordPolicy(denied=_denied), "denied by async ", "known to attackers"),
    ],
)
def test_a_short_or_known_password_is_refused_with_a_sentence(
    policy: PasswordPolicy, password: str, sentence: str
) -> None:
    """By characters, after normalising; the sentence does not repeat the password."""
    with pytest.raises(PasswordRejected, match=sentence) as refused:
        asyncio.run(policy.check(password))
    assert refused.value.status_code == 422
    assert password not in str(refused.value.document())


@pytest.mark.parametrize("password", ["x" * 15, "a" * 64, "only lower case letters", "\u00e9" * 15, " " * 15])
def test_there_are_no_rules_of_composition(password: str) -> None:
    """Length is what counts."""
    for policy in (PasswordPolicy(), PasswordPolicy(denied=_denied)):
        asyncio.run(policy.check(password))
    assert len(password) >= PasswordPolicy().min_length


@pytest.mark.parametrize("length", [7, 65])
def test_a_policy_that_nist_does_not_allow_is_refused(length: int) -> None:
    """Neither too short nor so long that nobody can use it."""
    with pytest.raises(ValueError, match="from 8 to 64"):
        PasswordPolicy(length)
