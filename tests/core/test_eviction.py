"""What memory keeps when there is not room for everything."""

from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fastapi_hardening.core.eviction import S3Fifo

STEPS = st.lists(st.tuples(st.sampled_from(["put", "get", "pop"]), st.sampled_from("abcdefghijkl"), st.integers(0, 30)))


@given(STEPS)
@hypothesis_settings(max_examples=60)
def test_the_bounds_hold_and_nothing_wrong_is_ever_given(steps: list[tuple[str, str, int]]) -> None:
    """Whatever happens: not too many, not too large together, and a key has its newest value or none."""
    evicted: list[int] = []
    kept: S3Fifo[int] = S3Fifo(5, 100, lambda: evicted.append(1))
    model: dict[str, int] = {}
    for number, (step, key, size) in enumerate(steps):
        if step == "put":
            stored = kept.put(key, number, size)
            assert stored == (size <= 25)
            model.pop(key, None)
            if stored:
                model[key] = number
                assert kept.get_quietly(key) == number
        elif step == "pop":
            kept.pop(key)
            model.pop(key, None)
        assert kept.get(key) in (model.get(key), None)
        assert len(kept) <= 5
        assert 0 <= kept.bytes <= 100
    for key in "abcdefghijkl":
        kept.pop(key)
    assert (kept.bytes, len(kept)) == (0, 0)


def test_a_walk_through_many_keys_pushes_out_nothing_that_is_used() -> None:
    """Ten pages that everybody reads stay while a robot reads ten thousand once; an LRU would lose all of them."""
    kept: S3Fifo[str] = S3Fifo(100, 1_000_000)
    lru: OrderedDict[str, str] = OrderedDict()
    popular = [f"popular {number}" for number in range(10)]
    for page in popular * 2:
        kept.put(page, page, 1)
        kept.get(page)
        lru[page] = page
    hits = 0
    for number in range(10_000):
        kept.put(f"robot {number}", "", 1)
        lru[f"robot {number}"] = ""
        if len(lru) > 100:
            lru.popitem(last=False)
        if number % 50 == 49:
            hits += sum(kept.get(page) is not None for page in popular)
    assert hits == 10 * 200
    assert not any(page in lru for page in popular)


def test_who_comes_back_soon_stays() -> None:
    """A key that was dropped as a newcomer and comes again goes straight to the main queue."""
    kept: S3Fifo[int] = S3Fifo(10, 1_000)
    for number in range(11):
        kept.put(f"first {number}", number, 1)
    assert kept.get_quietly("first 0") is None
    kept.put("first 0", 0, 1)
    for number in range(30):
        kept.put(f"later {number}", number, 1)
    assert kept.get("first 0") == 0


def test_what_was_used_long_ago_leaves_in_the_end() -> None:
    """The main queue forgets, too: a hit is worth a round, and no more than three."""
    kept: S3Fifo[int] = S3Fifo(4, 1_000)
    for number in range(4):
        kept.put(f"old {number}", number, 1)
        for _ in range(10):
            kept.get(f"old {number}")
    for number in range(40):
        kept.put(f"new {number}", number, 1)
        kept.get(f"new {number}")
    assert not any(kept.get_quietly(f"old {number}") is not None for number in range(4))


def test_what_is_used_in_the_main_queue_has_another_round() -> None:
    """Of two that came there together the one that nobody asks for leaves first."""
    kept: S3Fifo[int] = S3Fifo(4, 1_000)
    for name in ("used", "unused"):
        kept.put(name, 1, 1)
        kept.get(name)
    for number in range(60):
        kept.put(f"new {number}", number, 1)
        kept.get(f"new {number}")
        kept.get("used")
    assert kept.get_quietly("used") == 1
    assert kept.get_quietly("unused") is None


@pytest.mark.parametrize("entries", [0, 3])
def test_what_is_too_large_is_not_kept(entries: int) -> None:
    """One value may take a quarter of the room; a cache without places keeps nothing at all."""
    kept: S3Fifo[str] = S3Fifo(entries, 100)
    assert kept.put("a", "small", 25) is (entries > 0)
    assert kept.put("a", "large", 26) is False
    assert (kept.get("a"), kept.bytes) == (None, 0)


def test_everything_can_be_forgotten() -> None:
    """After it, there is room again."""
    kept: S3Fifo[int] = S3Fifo(2, 100)
    kept.put("a", 1, 10)
    kept.clear()
    assert (len(kept), kept.bytes, kept.get("a")) == (0, 0, None)
