"""The bounded memory, against a dictionary that forgets nothing."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastapi_hardening.core.clock import ManualClock
from fastapi_hardening.core.store import BoundedMap, MemoryStore

KEYS = st.sampled_from("abcdefgh")


@given(
    st.lists(
        st.tuples(st.just("put"), KEYS, st.floats(0.5, 10)) | st.tuples(st.just("wait"), st.just(""), st.floats(0, 5))
    )
)
def test_what_is_alive_is_never_forgotten(steps: list[tuple[str, str, float]]) -> None:
    """A put that was taken stays until it expires, whatever else comes; the number of places holds."""
    clock, model = ManualClock(), {}
    places: BoundedMap[float] = BoundedMap(4, clock=clock)
    for step, key, number in steps:
        if step == "wait":
            clock.advance(number)
        elif places.put(key, number, ttl_seconds=number):
            model[key] = (number, clock.monotonic() + number)
        else:
            alive = [1 for _, until in model.values() if until > clock.monotonic()]
            assert len(alive) == 4
        assert len(places) <= 4
        for known, (value, until) in model.items():
            assert places.get(known) == (value if until > clock.monotonic() else None)


def test_expired_entries_make_room_at_once() -> None:
    """A flood that has passed costs nobody a place."""
    clock = ManualClock()
    places: BoundedMap[int] = BoundedMap(3, clock=clock)
    assert [places.put(str(number), number, ttl_seconds=1) for number in range(4)] == [True, True, True, False]
    clock.advance(1)
    assert [places.put(f"new {number}", number, ttl_seconds=1) for number in range(3)] == [True, True, True]


def test_a_key_that_is_there_is_renewed_even_when_all_places_are_taken() -> None:
    """Being full refuses newcomers only."""
    places: BoundedMap[int] = BoundedMap(1, clock=ManualClock())
    assert places.put("a", 1, ttl_seconds=1)
    assert places.put("a", 2, ttl_seconds=1)
    assert places.get("a") == 2


def test_expired_entries_leave_though_nobody_asks_for_them() -> None:
    """Memory follows what is alive: each newcomer clears away more than it takes."""
    clock = ManualClock()
    places: BoundedMap[int] = BoundedMap(1000, clock=clock)
    for number in range(500):
        places.put(f"old {number}", number, ttl_seconds=1)
    clock.advance(1)
    for number in range(300):
        places.put(f"new {number}", number, ttl_seconds=1)
    assert len(places) < 400


def test_places_must_be_some() -> None:
    """No place at all would refuse everything."""
    with pytest.raises(ValueError, match="at least 1"):
        BoundedMap(0)


def test_the_memory_store_keeps_adds_and_forgets() -> None:
    """The protocol that a shared store will speak too."""

    async def use() -> None:
        clock = ManualClock()
        store = MemoryStore(1, clock=clock)
        assert await store.add("a", b"1", ttl_seconds=5)
        assert not await store.add("a", b"2", ttl_seconds=5)
        assert not await store.put("b", b"1", ttl_seconds=5)
        assert await store.get("a") == b"1"
        await store.delete("a")
        await store.delete("a")
        assert await store.get("a") is None
        assert await store.put("b", b"1", ttl_seconds=5)
        clock.advance(5)
        assert await store.get("b") is None
        assert await store.put("c", b"1", ttl_seconds=5)
        assert await store.get_many(["b", "c", "c"]) == [None, b"1", b"1"]

    asyncio.run(use())
