"""API keys: what is kept of them, who is let in, and that a comparison tells nothing."""

import asyncio
import hashlib
import re
import secrets
from collections.abc import Awaitable
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastapi_hardening import CurrentUser
from fastapi_hardening.core.clock import ManualClock
from fastapi_hardening.core.identity import InvalidCredentials
from fastapi_hardening.security.auth import ApiKeyAuthenticator, ApiKeyRecord, ApiKeys, MemoryApiKeyStore
from fastapi_hardening.security.auth.api_key import checksum
from tests.security.auth.conftest import Kit

T = TypeVar("T")


class Till:
    """Keys with a clock that can be moved."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.store = MemoryApiKeyStore()
        self.keys = ApiKeys(self.store, prefix="shop_live", clock=self.clock)

    def refusal(self, key: str) -> str:
        with pytest.raises(InvalidCredentials) as refused:
            run(self.keys.verify(key))
        return refused.value.reason


def run(work: Awaitable[T]) -> T:
    async def wait() -> T:
        return await work

    return asyncio.run(wait())


def test_a_key_says_whose_it_is_and_only_a_hash_is_kept() -> None:
    """Its form is one that a scanner of secrets finds."""
    till = Till()
    issued = run(till.keys.create("partner", name="till 3", scopes=["a"], roles=["b"], tenant="north"))
    assert re.fullmatch(r"shop_live_[0-9A-Za-z]{12}_[0-9A-Za-z]{46}", issued.key)
    secret = issued.key.rpartition("_")[2][:-6]
    assert issued.record.digest == hashlib.sha256(secret.encode()).digest()
    assert secret not in repr(issued)
    principal = run(till.keys.verify(issued.key))
    assert (principal.id, principal.scheme, principal.credential) == ("partner", "api-key", issued.record.id)
    assert (sorted(principal.scopes), sorted(principal.roles), principal.tenant) == (["a"], ["b"], "north")


def test_no_two_keys_are_alike() -> None:
    """Neither their ids nor their secrets."""
    till = Till()
    keys = [run(till.keys.create("partner")).key for _ in range(50)]
    assert len({key.split("_")[2] for key in keys}) == len({key.split("_")[3] for key in keys}) == 50


def test_what_is_no_key_of_ours_is_not_looked_up() -> None:
    """A typing error is found by the checksum."""
    till = Till()
    key = run(till.keys.create("partner")).key
    looked: list[str] = []

    class Watching(MemoryApiKeyStore):
        async def get(self, key_id: str) -> ApiKeyRecord | None:
            looked.append(key_id)
            return await super().get(key_id)

    till.keys.store = Watching()
    other = "0" if key[30] != "0" else "1"
    for wrong in ("", key + "x", key[:30] + other + key[31:], key.replace("live", "test"), "x" * 10_000, key + "\n"):
        assert till.refusal(wrong) == "not a key of this service"
    assert looked == []


@given(st.text(max_size=80))
def test_any_text_is_a_key_or_is_refused(text: str) -> None:
    """Nothing else is raised."""
    till = Till()
    assert till.refusal(text) == "not a key of this service"
    assert till.refusal(f"shop_live_{text}") == "not a key of this service"


def forged(key_id: str, secret: str) -> str:
    begin = f"shop_live_{key_id}_{secret}"
    return begin + checksum(begin)


def test_an_unknown_id_costs_the_same_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    """By construction: one comparison in constant time of two digests of one length, whoever asks."""
    till = Till()
    known = run(till.keys.create("partner"))
    compared: list[tuple[int, int]] = []
    real = secrets.compare_digest

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return real(one, other)

    monkeypatch.setattr(secrets, "compare_digest", compare)
    assert till.refusal(forged("0" * 12, "a" * 40)) == "unknown key"
    assert till.refusal(forged(known.record.id, "a" * 40)) == "unknown key"
    assert run(till.keys.verify(known.key)).id == "partner"
    assert compared == [(32, 32)] * 3


def test_a_key_ends() -> None:
    """At its time, or when it is taken back."""
    till = Till()
    short, other = run(till.keys.create("a", ttl_seconds=10)), run(till.keys.create("b"))
    assert run(till.keys.verify(short.key)).expires_at == till.clock.time() + 10
    till.clock.advance(10)
    assert till.refusal(short.key) == "expired"
    run(till.keys.revoke(other.record.id))
    assert till.refusal(other.key) == "revoked"


def test_a_rotation_lets_both_keys_in_for_a_while() -> None:
    """So that whoever uses it has time to change."""
    till = Till()
    old = run(till.keys.create("partner", scopes=["a"]))
    new = run(till.keys.rotate(old.record.id, overlap_seconds=60, ttl_seconds=1000))
    assert old.key != new.key
    for key in (old.key, new.key):
        assert run(till.keys.verify(key)).scopes == {"a"}
    till.clock.advance(60)
    assert till.refusal(old.key) == "expired"
    assert run(till.keys.verify(new.key)).id == "partner"
    assert new.record.expires_at == 1_700_001_000


def test_a_rotation_does_not_prolong_the_old_key() -> None:
    """Which ends at its own time, if that comes first."""
    till = Till()
    old = run(till.keys.create("partner", ttl_seconds=10))
    run(till.keys.rotate(old.record.id))
    till.clock.advance(10)
    assert till.refusal(old.key) == "expired"


def test_a_key_that_is_not_there_cannot_be_changed() -> None:
    """Whoever asks should know it."""
    with pytest.raises(KeyError):
        run(Till().keys.rotate("0" * 12))
    with pytest.raises(KeyError):
        run(Till().keys.revoke("0" * 12))


def test_the_last_use_is_written_now_and_then() -> None:
    """Not at each request; and a store that cannot refuses nobody."""
    till = Till()
    issued = run(till.keys.create("partner"))
    writes: list[float] = []

    class Counting(MemoryApiKeyStore):
        async def used(self, key_id: str, at: float) -> None:
            writes.append(at)
            await super().used(key_id, at)
            if len(writes) > 2:
                raise OSError("disk full")

    till.keys.store = store = Counting([issued.record])
    for _ in range(5):
        run(till.keys.verify(issued.key))
        till.clock.advance(20)
    assert [at - 1_700_000_000 for at in writes] == [0, 60]
    record = run(store.get(issued.record.id))
    assert record is not None
    assert record.last_used_at == 1_700_000_060
    till.clock.advance(60)
    assert run(till.keys.verify(issued.key)).id == "partner"
    assert len(writes) == 3


def test_a_key_that_is_gone_meanwhile_has_no_last_use() -> None:
    """Nothing is made anew."""
    store = MemoryApiKeyStore()
    run(store.used("0" * 12, 1.0))
    assert run(store.get("0" * 12)) is None


@pytest.mark.parametrize("prefix", ["", "Shop", "shop_", "_shop", "sh op", "shop__live", "sh*p"])
def test_a_prefix_that_scanners_would_miss_is_refused(prefix: str) -> None:
    """Or that would make keys ambiguous."""
    with pytest.raises(ValueError, match="is no prefix"):
        ApiKeys(MemoryApiKeyStore(), prefix=prefix)


def test_a_key_is_taken_from_its_field_and_never_from_the_query() -> None:
    """Two of them are none."""
    keys = ApiKeys(MemoryApiKeyStore())
    kit = Kit(authenticators=[ApiKeyAuthenticator(keys)])

    @kit.app.get("/me")
    async def me(user: CurrentUser) -> str:
        return user.id

    assert keys.clock is kit.clock
    key = run(keys.create("partner", ttl_seconds=60)).key
    client = kit.client()
    assert client.get("/me", headers={"X-API-Key": key}).json() == "partner"
    assert client.get("/me", headers=[("X-API-Key", key), ("X-API-Key", key)]).status_code == 401
    for path in (f"/me?X-API-Key={key}", f"/me?api_key={key}", f"/me?key={key}"):
        assert client.get(path).status_code == 401
    assert client.get("/me", headers={b"X-API-Key": b"\xff"}).status_code == 401
    assert client.get("/me").headers["www-authenticate"] == 'ApiKey header="X-API-Key"'
    kit.clock.advance(60)
    assert client.get("/me", headers={"X-API-Key": key}).status_code == 401


def test_a_clock_that_was_given_is_kept_and_the_field_may_have_another_name() -> None:
    """As the application wants it."""
    clock = ManualClock()
    keys = ApiKeys(MemoryApiKeyStore(), clock=clock)
    kit = Kit(authenticators=[ApiKeyAuthenticator(keys, header="X-Partner")])
    assert keys.clock is clock
    kit.app.get("/")(lambda: "ok")
    key = run(keys.create("partner")).key
    assert kit.client().get("/", headers={"X-Partner": key}).status_code == 200
    with pytest.raises(ValueError, match="is not a header name"):
        ApiKeyAuthenticator(keys, header="X Partner")
