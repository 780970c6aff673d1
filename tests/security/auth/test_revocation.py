"""Revocations: what they refuse, for how long, and when the store is gone."""

import asyncio
from collections.abc import Sequence

import pytest

from fastapi_hardening.core.clock import ManualClock
from fastapi_hardening.core.events import Events
from fastapi_hardening.core.store import MemoryStore
from fastapi_hardening.security.auth.revocation import (
    RevocationNotStored,
    Revocations,
    RevocationsUnavailable,
    SubjectRevoked,
    TokenRevoked,
    _key,
)
from tests.security.auth.tokens import ISSUER, NOW

OTHER = "https://other.example"


class Kit:
    """Revocations in memory, with a clock that can be moved."""

    def __init__(self, max_keys: int = 100, **options: bool) -> None:
        self.clock = ManualClock()
        self.events = Events()
        self.store = MemoryStore(max_keys, clock=self.clock)
        self.revocations = Revocations(
            self.store, max_token_seconds=3600, clock=self.clock, events=self.events, **options
        )

    async def reason(
        self, subject: str = "anna", jti: str | None = "t1", *, issuer: str = ISSUER, issued_at: float | None = NOW
    ) -> str | None:
        return await self.revocations.reason(issuer, subject, jti, issued_at=issued_at)


def test_nothing_is_revoked_at_first() -> None:
    """With and without an id."""
    kit = Kit()
    assert asyncio.run(kit.reason()) is None
    assert asyncio.run(kit.reason(jti=None, issued_at=None)) is None


def test_a_token_is_revoked_by_its_id() -> None:
    """That one, of that issuer, at once; and only until it has expired anyway."""

    async def story() -> None:
        kit = Kit()
        await kit.revocations.revoke_token("t1", issuer=ISSUER, expires_at=NOW + 60)
        assert await kit.reason() == "revoked-token"
        assert await kit.reason(subject="somebody else") == "revoked-token"
        assert await kit.reason(jti="t2") is None
        assert await kit.reason(issuer=OTHER) is None
        kit.clock.advance(359)
        assert await kit.reason() == "revoked-token"
        kit.clock.advance(2)
        assert await kit.reason() is None
        assert kit.events.count(TokenRevoked) == 1

    asyncio.run(story())


def test_a_revocation_without_end_lasts_as_long_as_a_token_may() -> None:
    """Also one of a token that has expired already is kept for clocks that differ."""

    async def story() -> None:
        kit = Kit()
        await kit.revocations.revoke_token("t1", issuer=ISSUER)
        await kit.revocations.revoke_token("t2", issuer=ISSUER, expires_at=NOW - 10)
        kit.clock.advance(299)
        assert await kit.reason(jti="t2") == "revoked-token"
        kit.clock.advance(3300)
        assert await kit.reason() == "revoked-token"
        kit.clock.advance(1)
        assert await kit.reason() is None

    asyncio.run(story())


def test_a_subject_is_revoked_with_what_comes_later() -> None:
    """Until it is restored, or the time is over."""

    async def story() -> None:
        kit = Kit()
        await kit.revocations.revoke_subject("anna", issuer=ISSUER, seconds=50)
        assert await kit.reason(issued_at=NOW + 1) == "revoked-subject"
        assert await kit.reason(jti=None) == "revoked-subject"
        assert await kit.reason("bob") is None
        assert await kit.reason(issuer=OTHER) is None
        await kit.revocations.restore_subject("anna", issuer=ISSUER)
        assert await kit.reason() is None
        await kit.revocations.revoke_subject("anna", issuer=ISSUER)
        kit.clock.advance(3599)
        assert await kit.reason() == "revoked-subject"
        kit.clock.advance(1)
        assert await kit.reason() is None
        assert kit.events.count(SubjectRevoked) == 2

    asyncio.run(story())


def test_everything_before_a_moment_is_revoked() -> None:
    """Tokens that come later hold; one that does not say when it was issued does not."""

    async def story() -> None:
        kit = Kit()
        kit.clock.advance(0.5)
        await kit.revocations.revoke_issued_before("anna", issuer=ISSUER)
        assert await kit.reason(issued_at=NOW - 100) == "revoked-before"
        assert await kit.reason(issued_at=NOW) == "revoked-before"
        assert await kit.reason(issued_at=None) == "revoked-before"
        assert await kit.reason(issued_at=NOW + 0.5) is None
        assert await kit.reason(issued_at=NOW + 1) is None
        assert await kit.reason("bob") is None

    asyncio.run(story())


def test_an_earlier_moment_does_not_take_a_later_one_back() -> None:
    """A later one moves it; one that lies ahead is kept until it has done its work."""

    async def story() -> None:
        kit = Kit()
        await kit.revocations.revoke_issued_before("anna", issuer=ISSUER, moment=NOW + 100)
        await kit.revocations.revoke_issued_before("anna", issuer=ISSUER, moment=NOW - 100)
        assert await kit.reason(issued_at=NOW + 99) == "revoked-before"
        await kit.revocations.revoke_issued_before("anna", issuer=ISSUER, moment=NOW + 200)
        assert await kit.reason(issued_at=NOW + 199) == "revoked-before"
        kit.clock.advance(3799)
        assert await kit.reason(issued_at=NOW + 199) == "revoked-before"

    asyncio.run(story())


def test_a_store_without_room_says_so() -> None:
    """Nobody believes that a token is revoked which is not."""

    async def story() -> None:
        kit = Kit(max_keys=1)
        await kit.revocations.revoke_token("t1", issuer=ISSUER)
        for revoke in (
            kit.revocations.revoke_token("t2", issuer=ISSUER),
            kit.revocations.revoke_subject("anna", issuer=ISSUER),
            kit.revocations.revoke_issued_before("anna", issuer=ISSUER),
        ):
            with pytest.raises(RevocationNotStored):
                await revoke
        assert kit.events.count(SubjectRevoked) == 0

    asyncio.run(story())


class Gone(MemoryStore):
    """A store that does not answer."""

    async def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        raise ConnectionError("no route to the store")


def test_without_a_store_tokens_are_refused_unless_told_otherwise() -> None:
    """Whoever can stop the store must not be able to use a stolen token; the other choice is there."""
    for accept, reason in ((False, "revocations-unavailable"), (True, None)):
        events = Events()
        seen: list[RevocationsUnavailable] = []
        events.subscribe(RevocationsUnavailable, seen.append)
        revocations = Revocations(Gone(), accept_when_unavailable=accept, events=events)
        assert asyncio.run(revocations.reason(ISSUER, "anna", "t1", issued_at=NOW)) == reason
        assert seen == [RevocationsUnavailable("no route to the store", accept)]


def test_it_is_one_trip_to_the_store() -> None:
    """For all three questions."""

    class Counting(MemoryStore):
        trips = 0

        async def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
            self.trips += 1
            assert len(keys) == 3
            return await super().get_many(keys)

    store = Counting()
    assert asyncio.run(Revocations(store).reason(ISSUER, "anna", "t1", issued_at=NOW)) is None
    assert store.trips == 1


def test_names_do_not_run_into_each_other() -> None:
    """The issuer ends where it ends, and keys tell nothing of what they stand for."""
    assert _key("token", "a", "bc") != _key("token", "ab", "c")
    assert _key("token", "a", "b") != _key("subject", "a", "b")
    assert "anna" not in _key("subject", ISSUER, "anna")
    assert len(_key("token", ISSUER, "x" * 10_000)) < 60


def test_a_moment_that_cannot_be_read_revokes_everything() -> None:
    """What somebody else wrote into the store is not taken for nothing."""

    async def story() -> None:
        kit = Kit()
        await kit.store.put(_key("before", ISSUER, "anna"), b"?", 60)
        assert await kit.reason() == "revoked-before"

    asyncio.run(story())


def test_the_longest_life_is_a_time() -> None:
    """A mistake is told at the start; events are optional."""
    with pytest.raises(ValueError, match="max_token_seconds"):
        Revocations(MemoryStore(), max_token_seconds=0)
    asyncio.run(Revocations(MemoryStore()).revoke_token("t", issuer=ISSUER))
