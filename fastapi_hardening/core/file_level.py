"""Bytes by key in a folder: what survives a restart, and is larger than memory.

A file is named by a digest of its key, never by the key, so no key leads out of the folder. It is written beside its
place and then moved there, so a reader sees the old one or the new one. Its time of modification is when it expires:
what is to go first is found without opening anything. Several processes may share a folder, on a disk of this machine.

Everything happens in two threads of its own; who waits for a disk that hangs has an :class:`OSError` after a second.
"""

import asyncio
import hashlib
import os
import secrets
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from fastapi_hardening.core.clock import Clock, SystemClock
from fastapi_hardening.core.configuration import ConfigurationError

T = TypeVar("T")

BUDGET_SECONDS = 1.0
"""How long somebody may be kept waiting by the disk."""

_THREADS = 2
# The folder is looked through when so much of its room was written since, and then emptied to nine tenths.
_SHARE_BETWEEN_SWEEPS = 10
_LEFT_AFTER_SWEEP = 0.9
# One value may take a tenth of the room.
_LARGEST_SHARE = 10
_FORGOTTEN_SECONDS = 3_600


class FileLevel:
    """A folder of values that expire, bounded in bytes; about, where several processes write to it.

    Args:
        folder: Where; made if it is not there. Only its owner may write into it.
        max_bytes: How much all files may take.
        clock: Where the time comes from.

    Raises:
        ConfigurationError: The folder cannot be made or written, or others may write into it.
    """

    def __init__(self, folder: Path, *, max_bytes: int = 1024**3, clock: Clock | None = None) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._now = (clock or SystemClock()).time
        self._written = max_bytes  # so that the first write looks at what is there
        self._threads: ThreadPoolExecutor | None = None
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            mode = folder.stat().st_mode
            usable = stat.S_ISDIR(mode) and os.access(folder, os.R_OK | os.W_OK | os.X_OK)
        except OSError as error:
            raise ConfigurationError(f"the folder of the cache cannot be made: {error}") from None
        if not usable:
            raise ConfigurationError(f"the folder of the cache, {folder}, cannot be read and written")
        if os.name == "posix" and mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ConfigurationError(
                f"others may write into the folder of the cache, {folder}, and so change what is answered; chmod 700 it"
            )

    async def get(self, key: str) -> bytes | None:
        """The value, or ``None`` when there is none or it has expired."""
        return await self._in_thread(lambda: self._read(self._path(key)))

    async def put(self, key: str, value: bytes, ttl_seconds: float) -> bool:
        """Stores a value; ``False`` where it is too large, and then nothing is kept under the key."""
        return await self._in_thread(lambda: self._write(self._path(key), value, ttl_seconds))

    async def add(self, key: str, value: bytes, ttl_seconds: float) -> bool:
        """Stores a value unless one is there; two processes that try at the same moment may both succeed."""

        def write_if_absent() -> bool:
            path = self._path(key)
            return self._read(path) is None and self._write(path, value, ttl_seconds)

        return await self._in_thread(write_if_absent)

    async def delete(self, key: str) -> None:
        """Forgets a key."""
        await self._in_thread(lambda: self._path(key).unlink(missing_ok=True))

    def close(self) -> None:
        """Ends the threads; they begin again when the folder is used again."""
        threads, self._threads = self._threads, None
        if threads is not None:
            threads.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="cache-files")
        try:
            async with asyncio.timeout(BUDGET_SECONDS):
                return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except TimeoutError:
            raise OSError(f"the disk did not answer within {BUDGET_SECONDS:g} s") from None

    def _path(self, key: str) -> Path:
        digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=20).hexdigest()
        return self._folder / digest[:2] / digest[2:]

    def _read(self, path: Path) -> bytes | None:
        try:
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_mtime <= self._now():
                    return None
                return file.read()
        except FileNotFoundError:
            return None

    def _write(self, path: Path, value: bytes, ttl_seconds: float) -> bool:
        if len(value) > self._max_bytes // _LARGEST_SHARE:
            path.unlink(missing_ok=True)
            return False
        path.parent.mkdir(mode=0o700, exist_ok=True)
        beside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
        try:
            # A file of that name is not there; should somebody have put a link, it is not followed.
            with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(value)
            expires_at = self._now() + ttl_seconds
            os.utime(beside, (expires_at, expires_at))
            beside.replace(path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
        self._written += len(value)
        if self._written > self._max_bytes // _SHARE_BETWEEN_SWEEPS:
            self._written = 0
            self._sweep()
        return True

    def _sweep(self) -> None:
        """Removes what has expired, then what expires soonest, until there is room again."""
        now, total = self._now(), 0
        alive: list[tuple[float, int, str]] = []
        for folder in self._folder.iterdir():
            if not folder.is_dir() or len(folder.name) != 2:  # noqa: PLR2004 - as `_path` names them
                continue
            for entry in os.scandir(folder):
                # Another process may be quicker.
                with suppress(FileNotFoundError):
                    found = entry.stat(follow_symlinks=False)
                    unfinished = entry.name.endswith(".part") and found.st_ctime > now - _FORGOTTEN_SECONDS
                    if unfinished:
                        continue
                    if found.st_mtime <= now or entry.name.endswith(".part"):
                        Path(entry).unlink()
                    else:
                        total += found.st_size
                        alive.append((found.st_mtime, found.st_size, entry.path))
        if total <= self._max_bytes * _LEFT_AFTER_SWEEP:
            return
        for _, size, path in sorted(alive):
            with suppress(FileNotFoundError):
                Path(path).unlink()
            total -= size
            if total <= self._max_bytes * _LEFT_AFTER_SWEEP:
                return
