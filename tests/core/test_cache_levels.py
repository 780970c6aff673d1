"""Memory, a folder and Redis behind each other: who is believed, and what happens when one of them is gone."""

import asyncio
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fastapi_hardening.core import cache_levels, file_level
from fastapi_hardening.core.cache_levels import (
    CacheEntry,
    CacheLevelFailed,
    CacheLevelRecovered,
    CacheLevels,
    CacheMetrics,
)
from fastapi_hardening.core.clock import ManualClock, SystemClock
from fastapi_hardening.core.configuration import ConfigurationError
from fastapi_hardening.core.events import Events
from fastapi_hardening.core.file_level import FileLevel
from fastapi_hardening.core.redis_store import RedisStore
from fastapi_hardening.core.store import MemoryStore, StoreUnavailable


class Unreliable(MemoryStore):
    """A shared store that the test takes away and brings back."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__(clock=clock)
        self.gone = False
        self.asked: list[str] = []

    def _ask(self, key: str) -> None:
        self.asked.append(key)
        if self.gone:
            raise StoreUnavailable("gone")

    async def get(self, key: str) -> bytes | None:
        self._ask(key)
        return await super().get(key)

    async def put(self, key: str, value: bytes, ttl_seconds: float) -> bool:
        self._ask(key)
        return await super().put(key, value, ttl_seconds)

    async def add(self, key: str, value: bytes, ttl_seconds: float) -> bool:
        self._ask(key)
        return await super().add(key, value, ttl_seconds)

    async def delete(self, key: str) -> None:
        self._ask(key)
        await super().delete(key)


class Two:
    """Two workers with a store between them."""

    def __init__(self, *, local_seconds: float = 5, **options: Any) -> None:
        self.clock = ManualClock()
        self.store = Unreliable(self.clock)
        self.events = Events()
        self.a, self.b = (
            CacheLevels(shared=self.store, clock=self.clock, local_seconds=local_seconds, events=self.events, **options)
            for _ in range(2)
        )

    def entry(self, body: bytes = b"body", *, fresh: float = 100, keep: float = 100, tags: Any = ()) -> CacheEntry:
        now = self.clock.time()
        return CacheEntry(body, now, now + fresh, now + keep, tags)


@pytest.fixture
def clock() -> ManualClock:
    """Give a clock that the test moves."""
    return ManualClock()


# --- entries ----------------------------------------------------------------------------------------------------------


@given(st.binary(max_size=50), st.lists(st.tuples(st.text(max_size=5), st.text(max_size=5)), max_size=3), st.booleans())
@hypothesis_settings(max_examples=50)
def test_an_entry_comes_back_as_it_was(body: bytes, tags: list[tuple[str, str]], whole: bool) -> None:
    """Or without its body, where it was too large."""
    entry = CacheEntry(body, 1.5, 2.5, 3.5, tuple(tags))
    unpacked = CacheEntry.unpack(entry.pack(whole=whole))
    assert unpacked is not None
    found, is_whole = unpacked
    assert (found.body, is_whole) == (body if whole else b"", whole)
    assert (found.made_at, found.fresh_until, found.keep_until, found.tags) == (1.5, 2.5, 3.5, tuple(tags))


@given(st.binary(max_size=80), st.integers(0, 200), st.integers(0, 7))
@hypothesis_settings(max_examples=80)
def test_what_is_damaged_is_no_entry(noise: bytes, place: int, bit: int) -> None:
    """Cut off, changed in one bit of its content, or something else: it is not there, and nothing is raised."""
    good = CacheEntry(b"a body", 1, 2, 3, (("tag", "version"),)).pack()
    assert CacheEntry.unpack(noise) is None
    assert CacheEntry.unpack(good[: place % len(good)]) is None
    content = len(good) - len(b'[["tag", "version"]]a body')
    at = content + place % (len(good) - content)
    assert CacheEntry.unpack(good[:at] + bytes([good[at] ^ (1 << bit)]) + good[at + 1 :]) is None


# --- memory alone -----------------------------------------------------------------------------------------------------


def test_memory_alone_needs_nobody(clock: ManualClock) -> None:
    """What it has it says at once, until it expires."""
    levels = CacheLevels(clock=clock)
    entry = CacheEntry(b"x", clock.time(), clock.time() + 10, clock.time() + 20)
    asyncio.run(levels.put("k", entry))
    assert levels.only_memory
    assert levels.peek("k") is entry
    clock.advance(15)
    assert asyncio.run(levels.get("k")) is entry
    clock.advance(5)
    assert levels.peek("k") is None
    assert asyncio.run(levels.get("k")) is None


def test_what_has_expired_already_is_not_kept(clock: ManualClock) -> None:
    """It would only take the place of something else."""
    levels = CacheLevels(clock=clock)
    asyncio.run(levels.put("k", CacheEntry(b"x", clock.time(), clock.time(), clock.time())))
    assert levels.peek("k") is None


def test_a_version_of_a_tag_that_was_lost_is_not_guessed(clock: ManualClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """So an entry that was invalidated never comes back; one that was not is made again at worst."""
    monkeypatch.setattr(cache_levels, "_MOST_TAGS", 8)
    levels = CacheLevels(clock=clock)

    async def lose() -> CacheEntry | None:
        tags = await levels.tagged(("t",))
        await levels.put("k", CacheEntry(b"x", clock.time(), clock.time() + 10, clock.time() + 10, tags))
        for number in range(20):
            await levels.tagged((str(number),))
        assert len(levels._memory) == 1
        assert levels.peek("k") is None
        return await levels.get("k")

    assert asyncio.run(lose()) is None


# --- several workers --------------------------------------------------------------------------------------------------


def test_a_worker_finds_what_another_one_has_made() -> None:
    """And has it in memory then, where it is not asked for again until the copy is a few seconds old."""
    two = Two()

    async def share() -> None:
        await two.a.put("k", two.entry())
        assert two.b.peek("k") is None
        found = await two.b.get("k")
        assert found is not None
        assert found.body == b"body"
        two.store.asked.clear()
        two.clock.advance(4.9)
        assert await two.b.get("k") is found
        assert two.store.asked == []
        two.clock.advance(0.2)
        assert two.b.peek("k") is None
        assert await two.b.get("k") is not None
        assert two.store.asked == ["cache:k"]

    asyncio.run(share())


def test_what_one_deletes_is_gone_for_the_others_soon() -> None:
    """After five seconds at the latest, and not before they look."""
    two = Two()

    async def delete() -> None:
        await two.a.put("k", two.entry())
        await two.b.get("k")
        await two.a.delete("k")
        assert two.a.peek("k") is None
        assert await two.a.get("k") is None
        assert two.b.peek("k") is not None
        two.clock.advance(5)
        assert await two.b.get("k") is None

    asyncio.run(delete())


def test_a_tag_takes_everything_with_it() -> None:
    """Everywhere, within the same five seconds; what has other tags stays."""
    two = Two()

    async def invalidate() -> None:
        for key, tags in (("a", ("x", "y")), ("b", ("y",)), ("c", ("x",))):
            await two.a.put(key, two.entry(tags=await two.a.tagged(tags)))
            assert await two.b.get(key) is not None
        await two.b.invalidate(["x"])
        assert [two.b.peek(key) is not None for key in "abc"] == [False, True, False]
        assert [await two.b.get(key) is not None for key in "abc"] == [False, True, False]
        two.clock.advance(5)
        assert [await two.a.get(key) is not None for key in "abc"] == [False, True, False]

    asyncio.run(invalidate())


def test_what_was_being_made_when_it_was_invalidated_is_not_used() -> None:
    """Its tags have the versions from before."""
    two = Two()

    async def race() -> CacheEntry | None:
        tags = await two.a.tagged(("t",))
        await two.a.invalidate(["t"])
        await two.a.put("k", two.entry(tags=tags))
        return two.a.peek("k") or await two.a.get("k")

    assert asyncio.run(race()) is None


def test_of_two_who_name_a_tag_first_both_have_one_version() -> None:
    """Whoever comes second takes the version of the first."""
    two = Two()

    async def name() -> tuple[Any, Any]:
        return await two.a.tagged(("t",)), await two.b.tagged(("t",))

    first, second = asyncio.run(name())
    assert first == second


def test_a_stale_copy_is_compared_at_once() -> None:
    """Another worker may have made a fresh one meanwhile."""
    two = Two(local_seconds=1000)

    async def stale() -> None:
        await two.a.put("k", two.entry(b"old", fresh=10))
        await two.b.get("k")
        two.clock.advance(11)
        await two.a.put("k", two.entry(b"new"))
        found = await two.b.get("k")
        assert found is not None
        assert found.body == b"new"

    asyncio.run(stale())


def test_a_stale_copy_that_could_not_be_made_again_is_used_for_a_moment() -> None:
    """Its owner has said until when."""
    two = Two()

    async def hold() -> None:
        entry = two.entry(fresh=1)
        await two.a.put("k", entry)
        two.clock.advance(2)
        assert two.a.peek("k") is None
        entry.retry_at = two.clock.time() + 1
        assert two.a.peek("k") is entry

    asyncio.run(hold())


def test_what_is_too_large_for_the_store_stays_here_and_is_known_there() -> None:
    """So it can still be deleted by another worker; who has no copy makes one."""
    two = Two(shared_max_entry_bytes=3)

    async def large() -> None:
        await two.a.put("k", two.entry(b"four"))
        assert await two.b.get("k") is None
        two.clock.advance(6)
        found = await two.a.get("k")
        assert found is not None
        assert found.body == b"four"
        await two.b.delete("k")
        two.clock.advance(6)
        assert await two.a.get("k") is None
        await two.a.put("k", two.entry(b"four"))
        two.clock.advance(1)
        await two.b.put("k", two.entry(b"five"))
        two.clock.advance(6)
        assert await two.a.get("k") is None

    asyncio.run(large())


def test_without_the_store_copies_are_used_until_they_expire() -> None:
    """It is told once that the store is gone, and once that it is back."""
    two = Two()
    seen: list[object] = []
    two.events.subscribe(object, seen.append)

    async def outage() -> None:
        await two.a.put("k", two.entry())
        two.store.gone = True
        two.clock.advance(50)
        for _ in range(3):
            assert await two.a.get("k") is not None
        assert two.a.check().status == "warn"
        assert two.a.check().output == "shared: gone"
        two.clock.advance(50)
        assert await two.a.get("k") is None
        two.store.gone = False
        await two.a.get("k")
        assert two.a.check().status == "pass"

    asyncio.run(outage())
    assert [type(event) for event in seen] == [CacheLevelFailed, CacheLevelRecovered]


def test_what_was_deleted_during_an_outage_does_not_come_back() -> None:
    """Deletions, replacements and invalidations are made up for before the store is asked anything."""
    two = Two(local_seconds=0)

    async def outage() -> None:
        tags = await two.a.tagged(("t",))
        for key in "abc":
            await two.a.put(key, two.entry(b"old", tags=tags if key == "c" else ()))
        two.store.gone = True
        await two.a.delete("a")
        await two.a.put("b", two.entry(b"new"))
        await two.a.invalidate(["t"])
        await two.a.invalidate(["t"])
        assert await two.a.get("a") is None
        assert await two.a.get("c") is None
        found = await two.a.get("b")
        assert found is not None
        assert found.body == b"new"
        two.store.gone = False
        assert [await two.a.get(key) for key in "abc"] == [None] * 3
        assert [await two.b.get(key) for key in "abc"] == [None] * 3
        await two.a.put("b", two.entry(b"newer"))
        await two.a.put("c", two.entry(b"newer", tags=await two.a.tagged(("t",))))
        assert [entry.body for key in "bc" if (entry := await two.b.get(key)) is not None] == [b"newer"] * 2

    asyncio.run(outage())


def test_a_newer_change_settles_an_older_debt() -> None:
    """What was to be made up for is forgotten once the same key was changed again."""
    two = Two(local_seconds=0)

    async def change() -> None:
        two.store.gone = True
        await two.a.invalidate(["t"])
        await two.a.delete("k")
        two.store.gone = False
        await two.a.invalidate(["t"])
        await two.a.delete("k")
        two.store.asked.clear()
        await two.a.get("k")
        assert two.store.asked == ["cache:k"]

    asyncio.run(change())


def test_debts_are_bounded(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """An outage cannot fill the memory; what is beyond is told."""
    monkeypatch.setattr(cache_levels, "_MOST_OWED", 2)
    two = Two()

    async def much() -> None:
        two.store.gone = True
        for number in range(3):
            await two.a.delete(str(number))

    with caplog.at_level(logging.ERROR, "fastapi_hardening.cache"):
        asyncio.run(much())
    assert "more was deleted than can be remembered" in caplog.text
    assert len(two.a._owed) == 2


def test_one_worker_has_a_lock() -> None:
    """Until it gives it back; without a store everybody may."""
    two = Two()

    async def locks() -> list[bool]:
        said = [await two.a.lock("k", 10), await two.b.lock("k", 10)]
        await two.a.unlock("k")
        said.append(await two.b.lock("k", 10))
        two.store.gone = True
        said.append(await two.a.lock("k", 10))
        await two.b.unlock("k")
        return [*said, await CacheLevels().lock("k", 10)]

    assert asyncio.run(locks()) == [True, False, True, True, True]
    asyncio.run(CacheLevels().unlock("k"))


def test_on_a_real_server_two_workers_share(state_url: str, prefix: str) -> None:
    """Entries, tags and locks go over the wire and come back."""

    async def share() -> None:
        stores = [RedisStore(state_url, prefix=prefix, budget_seconds=20) for _ in range(2)]
        a, b = (CacheLevels(shared=store, local_seconds=0) for store in stores)
        now = SystemClock.time()
        key = "k" * 500  # longer than a key should be on a server
        await a.put(key, CacheEntry(b"\x00body", now, now + 60, now + 60, await a.tagged(("t",))))
        found = await b.get(key)
        assert found is not None
        assert found.body == b"\x00body"
        assert [await a.lock(key, 10), await b.lock(key, 10)] == [True, False]
        await b.invalidate(["t"])
        assert await a.get(key) is None
        for store in stores:
            await store.close()

    asyncio.run(share())


# --- a folder ---------------------------------------------------------------------------------------------------------


def test_a_folder_keeps_entries_over_a_restart(tmp_path: Path, clock: ManualClock) -> None:
    """And knows when they expire."""

    async def restart() -> list[bytes | None]:
        said = []
        for step in range(3):
            levels = CacheLevels(file=FileLevel(tmp_path / "cache", clock=clock), clock=clock)
            if step == 0:
                tags = await levels.tagged(("t",))
                await levels.put("k", CacheEntry(b"x", clock.time(), clock.time() + 10, clock.time() + 10, tags))
            found = await levels.get("k")
            said.append(None if found is None else found.body)
            clock.advance(6)
        return said

    assert asyncio.run(restart()) == [b"x", b"x", None]


def test_no_key_leads_out_of_the_folder(tmp_path: Path, clock: ManualClock) -> None:
    """Files are named by digests, belong to the owner alone, and nothing unfinished is left."""
    folder = tmp_path / "cache"
    level = FileLevel(folder, clock=clock)

    async def write() -> bytes | None:
        await level.put("../../outside", b"1", 10)
        await level.put("/etc/passwd\x00", b"2", 10)
        return await level.get("../../outside")

    assert asyncio.run(write()) == b"1"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) == 2
    assert all(path.name.isalnum() and path.stat().st_mode & 0o777 == 0o600 for path in files)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]
    level.close()
    level.close()


def test_of_a_folder_the_oldest_leaves(tmp_path: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays about as large as it may be: what has expired leaves first, then what expires soonest."""
    monkeypatch.setattr(file_level, "_FORGOTTEN_SECONDS", -(10**12))
    level = FileLevel(tmp_path / "cache", max_bytes=1000, clock=clock)

    async def fill() -> list[bool]:
        (tmp_path / "cache" / "stray").write_text("not ours")
        assert await level.put("huge", b"x" * 101, 10) is False
        await level.put("expired", b"x" * 100, 1)
        unfinished = level._path("expired").with_name("0.part")
        unfinished.touch()
        clock.advance(2)
        for number in range(12):
            assert await level.put(f"key {number}", b"x" * 100, 100 + number)
        assert not unfinished.exists()
        return [await level.get(f"key {number}") is not None for number in range(12)]

    kept = asyncio.run(fill())
    assert kept == [False] * (12 - sum(kept)) + [True] * sum(kept)
    assert sum(kept) in (9, 10)
    assert (tmp_path / "cache" / "stray").exists()


def test_a_file_that_is_being_written_is_left_alone(tmp_path: Path) -> None:
    """By another process that shares the folder."""
    level = FileLevel(tmp_path / "cache", max_bytes=1000)
    part = level._path("other").with_name("0.part")
    part.parent.mkdir()
    part.touch()
    asyncio.run(level.put("k", b"x", 10))
    assert part.exists()


def test_who_may_write_to_the_folder(tmp_path: Path) -> None:
    """Only its owner; a folder that cannot be used is refused at the start."""
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(ConfigurationError, match=r"others may write.*chmod 700"):
        FileLevel(tmp_path / "open")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="cannot be made"):
        FileLevel(tmp_path / "file" / "cache")
    (tmp_path / "broken").symlink_to("/dev/null")
    with pytest.raises(ConfigurationError, match="cannot be"):
        FileLevel(tmp_path / "broken")


def test_a_disk_that_fails_keeps_nobody_from_working(tmp_path: Path, clock: ManualClock) -> None:
    """It is not asked for a while, and nothing is raised; whether a value was half written, nobody finds it."""
    folder = tmp_path / "cache"
    file = FileLevel(folder, clock=clock)
    events = Events()
    seen: list[object] = []
    events.subscribe(object, seen.append)
    levels = CacheLevels(file=file, clock=clock, events=events)
    levels._last._now = clock.monotonic  # type: ignore[union-attr]
    entry = CacheEntry(b"x", clock.time(), clock.time() + 100, clock.time() + 100)

    async def fail() -> None:
        blocked = file._path(cache_levels._address("k")).parent
        blocked.touch()  # a file stands where the folder should be
        await levels.put("k", entry)
        await levels.put("k", entry)
        assert isinstance(seen[0], CacheLevelFailed)
        assert await levels.get("k") is entry
        blocked.unlink()
        await levels.put("k", entry)
        assert not blocked.exists()
        clock.advance(1)
        await levels.put("k", entry)
        assert blocked.is_dir()

    asyncio.run(fail())
    assert [type(event) for event in seen] == [CacheLevelFailed, CacheLevelRecovered]


def test_a_file_that_cannot_be_finished_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing half written lies about."""

    def full(*_arguments: object) -> None:
        raise OSError("no space left on the device")

    level = FileLevel(tmp_path / "cache")
    monkeypatch.setattr(os, "utime", full)
    with pytest.raises(OSError, match="no space"):
        asyncio.run(level.put("k", b"x", 10))
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_disk_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits for it is told after a second; here after none."""
    monkeypatch.setattr(file_level, "BUDGET_SECONDS", 0)
    level = FileLevel(tmp_path / "cache")
    with pytest.raises(OSError, match="did not answer"):
        asyncio.run(level.get("k"))
    level.close()


# --- all three --------------------------------------------------------------------------------------------------------


def test_the_folder_stands_in_for_the_store(tmp_path: Path) -> None:
    """What another worker has made and this one has found in the store lies in the folder when the store is gone."""
    two = Two(file=FileLevel(tmp_path / "cache"))
    metrics = CacheMetrics()
    file = FileLevel(tmp_path / "other", clock=two.clock)
    levels = CacheLevels(file=file, shared=two.store, clock=two.clock, metrics=metrics)

    async def stand_in() -> None:
        await two.a.put("k", two.entry())
        assert await levels.get("k") is not None
        levels.clear_memory()
        assert await levels.get("k") is not None  # from the folder, which is recent
        two.clock.advance(6)
        levels.clear_memory()
        assert await levels.get("k") is not None  # from the store, which is believed
        two.store.gone = True
        two.clock.advance(6)
        levels.clear_memory()
        assert await levels.get("k") is not None
        two.store.gone = False
        await two.a.delete("k")
        two.clock.advance(6)
        assert await levels.get("k") is None

    asyncio.run(stand_in())
    counted = {s.labels["level"]: s.value for m in metrics._hits.collect() for s in m.samples if s.name.endswith("al")}
    assert counted == {"memory": 0, "shared": 2, "file": 2}
