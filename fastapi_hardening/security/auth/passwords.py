"""Passwords: hashed so that a stolen table is of little use, and so that a flood of logins does not stop the service.

Argon2id by argon2-cffi (the extra ``auth``), in threads, never on the event loop. What a hash costs an attacker it
costs this process as well: so only so many are worked out at once, a further one waits a moment, and is then refused
with 503. An account that does not exist takes the same way as one that does.

It is *not* a throttle: who may try how often is :mod:`~fastapi_hardening.security.auth.throttle`'s.

Example:
    >>> import asyncio
    >>> async def sign_up_and_log_in() -> list[bool]:
    ...     hasher = PasswordHasher()
    ...     stored = await hasher.hash("correct horse battery staple")
    ...     tries = ("correct horse battery staple", stored), ("tr0ub4dor&3", stored), ("anything", None)
    ...     return [await hasher.verify(password, hashed) for password, hashed in tries]
    >>> asyncio.run(sign_up_and_log_in())
    [True, False, False]
"""

import asyncio
import base64
import inspect
import logging
import os
import secrets
import unicodedata
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from pydantic import Field

from fastapi_hardening.core.configuration import Section
from fastapi_hardening.core.problem import IANA, Problem, retry_after

logger = logging.getLogger("fastapi_hardening.auth")

T = TypeVar("T")

_SALT_BYTES = 16
_HASH_BYTES = 32


class PasswordSettings(Section):
    """What a hash costs, and how many may be worked out at once. The costs are OWASP's for Argon2id."""

    memory_kib: int = Field(19_456, ge=1_024, le=4_194_304)
    """Memory of one hash in KiB."""

    time_cost: int = Field(2, ge=1, le=100)
    """Passes over the memory."""

    parallelism: int = Field(1, ge=1, le=64)
    """Threads of one hash; more of them answer sooner and take more cores."""

    max_concurrent: int | None = Field(None, ge=1)
    """How many hashes this process works out at once; by default half of its cores, at least one."""

    wait_seconds: float = Field(1.0, ge=0)
    """How long a further one waits for its turn before it is refused."""

    max_password_bytes: int = Field(1_024, ge=64)
    """What is longer, in UTF-8, is no password; it is refused before any work."""

    retry_after_seconds: float = Field(2.0, gt=0)
    """When a refused caller may come back; it is told up to twice as many, at random."""


class PasswordRejected(Problem):
    """A password that a person chose cannot be taken; the detail says why, for that person to read."""

    status = 422
    title = "Password not accepted"


class HashingOverloaded(Problem):
    """All places are taken by passwords that are being checked."""

    status = 503
    type = IANA + "temporary-reduced-capacity"
    title = "Temporarily reduced capacity"


# --- engine -----------------------------------------------------------------------------------------------------------


class WorkLimit:
    """At most so much work in threads at once. A place is free again when its thread is, also if nobody waits for it.

    Args:
        max_concurrent: The places.
        wait_seconds: How long one more waits for a place.

    Example:
        >>> async def double() -> int:
        ...     return await WorkLimit(1, wait_seconds=0).run(lambda: 2 * 21)
        >>> asyncio.run(double())
        42
    """

    def __init__(self, max_concurrent: int, *, wait_seconds: float) -> None:
        self.max_concurrent = max_concurrent
        self._wait_seconds = wait_seconds
        # asyncio's semaphore belongs to one event loop; a hasher is made at import, and tests have a loop each.
        self._free = max_concurrent
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def run(self, work: Callable[..., T], *arguments: Any) -> T:
        """Does the work in a thread.

        Raises:
            TimeoutError: No place came free in time.
        """
        await self._enter()
        task = asyncio.ensure_future(asyncio.to_thread(work, *arguments))
        task.add_done_callback(lambda _: self._leave())
        # A caller that is cancelled leaves the thread running, and its place taken.
        return await asyncio.shield(task)

    async def _enter(self) -> None:
        if self._free:
            self._free -= 1
            return
        place = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        try:
            async with asyncio.timeout(self._wait_seconds):
                await place
        except (TimeoutError, asyncio.CancelledError):
            if not place.cancelled():
                self._leave()  # it was given at the same moment
            raise

    def _leave(self) -> None:
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)
                return
        self._free += 1


class PasswordHasher:
    """Hashes and verifies passwords.

    A password is normalised (NFKC) before it is hashed, as NIST SP 800-63B-4 (section 3.1.1.2) asks, so that it is the
    same from every keyboard.

    Args:
        settings: Costs and limits.

    Raises:
        ModuleNotFoundError: argon2-cffi is not installed.
    """

    def __init__(self, settings: PasswordSettings | None = None) -> None:
        self.settings = settings = settings or PasswordSettings()
        try:
            import argon2  # noqa: PLC0415 - an extra
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "passwords are hashed by argon2-cffi: pip install 'fastapi-hardening[auth]'", name="argon2"
            ) from error
        self._argon2 = argon2.PasswordHasher(
            time_cost=settings.time_cost,
            memory_cost=settings.memory_kib,
            parallelism=settings.parallelism,
            hash_len=_HASH_BYTES,
            salt_len=_SALT_BYTES,
        )
        self._wrong = (argon2.exceptions.VerifyMismatchError,)
        self._unreadable = (argon2.exceptions.InvalidHashError, argon2.exceptions.VerificationError)
        self._limit = WorkLimit(
            settings.max_concurrent or max(1, len(_cores()) // 2), wait_seconds=settings.wait_seconds
        )
        self._nobodys = _nobodys_hash(settings)

    async def hash(self, password: str) -> str:
        """The hash to store, with its costs and salt in it.

        Raises:
            PasswordRejected: The password is too long or is no text.
            HashingOverloaded: Too many passwords are being checked.
        """
        encoded = self._encoded(password)
        if encoded is None:
            raise PasswordRejected(f"A password has at most {self.settings.max_password_bytes} bytes of valid text.")
        return await self._run(self._argon2.hash, encoded)

    async def verify(self, password: str, hashed: str | None) -> bool:
        """Whether a password has this hash. It never says why not, and takes as long if there is no hash.

        Args:
            password: What was sent.
            hashed: What is stored; ``None`` where there is no such account, or where it has no password.

        Raises:
            HashingOverloaded: Too many passwords are being checked.
        """
        encoded = self._encoded(password)
        if encoded is None:
            return False
        return await self._run(self._matches, encoded, hashed)

    def needs_rehash(self, hashed: str) -> bool:
        """Whether a hash was made at other costs than today's: hash the password again while it is at hand."""
        try:
            return self._argon2.check_needs_rehash(hashed)
        except self._unreadable:
            return True

    def _matches(self, encoded: bytes, hashed: str | None) -> bool:
        try:
            return self._argon2.verify(self._nobodys if hashed is None else hashed, encoded)
        except self._wrong:
            return False
        except (*self._unreadable, UnicodeEncodeError):
            logger.error("a stored password hash cannot be read; its account cannot log in")  # noqa: TRY400
            return self._matches(encoded, None)

    async def _run(self, work: Callable[..., T], *arguments: Any) -> T:
        try:
            return await self._limit.run(work, *arguments)
        except TimeoutError:
            raise HashingOverloaded(
                "Too many logins at once; come back later.", headers=retry_after(self.settings.retry_after_seconds)
            ) from None

    def _encoded(self, password: str) -> bytes | None:
        """The bytes that are hashed; ``None`` for what cannot be a password."""
        limit = self.settings.max_password_bytes
        if len(password) > limit:  # before normalising it, which may make it longer
            return None
        try:
            encoded = unicodedata.normalize("NFKC", password).encode()
        except UnicodeEncodeError:
            return None
        return encoded if len(encoded) <= limit else None


def _cores() -> set[int] | range:
    """The cores that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)


def _nobodys_hash(settings: PasswordSettings) -> str:
    """A hash that no password has: a random tag, checked at the costs of a real one."""
    salt, tag = (
        base64.b64encode(secrets.token_bytes(size)).rstrip(b"=").decode() for size in (_SALT_BYTES, _HASH_BYTES)
    )
    return f"$argon2id$v=19$m={settings.memory_kib},t={settings.time_cost},p={settings.parallelism}${salt}${tag}"


# --- policy -----------------------------------------------------------------------------------------------------------


Denied = Callable[[str], bool | Awaitable[bool]]


class PasswordPolicy:
    """What a person may choose as a password (NIST SP 800-63B-4, section 3.1.1.2): length, and nobody's first guess.

    No rules of composition and no expiry: both make people choose worse. Ask it where a password is chosen, not where
    one is verified.

    Args:
        min_length: Characters, at least 8; NIST asks for 15 where the password is the only factor.
        denied: Whether a password is known to attackers: a look-up in a list of leaked ones, sync or async. It gets
            the normalised password, which must not be logged.

    Raises:
        ValueError: ``min_length`` is below 8 or above 64.

    Example:
        >>> policy = PasswordPolicy(denied={"passwordpassword", "correct horse battery staple"}.__contains__)
        >>> asyncio.run(policy.check("a phrase that only I know"))
    """

    def __init__(self, min_length: int = 15, *, denied: Denied | None = None) -> None:
        if not 8 <= min_length <= 64:  # noqa: PLR2004 - NIST's own numbers, in the sentence
            raise ValueError(f"min_length is from 8 to 64 characters, not {min_length} (NIST SP 800-63B-4, 3.1.1.2)")
        self.min_length = min_length
        self._denied = denied

    async def check(self, password: str) -> None:
        """Takes a password, or says why not.

        Raises:
            PasswordRejected: With the sentence for the person.
        """
        chosen = unicodedata.normalize("NFKC", password)
        if len(chosen) < self.min_length:
            raise PasswordRejected(f"A password has at least {self.min_length} characters.")
        if self._denied is not None:
            denied = self._denied(chosen)
            if await denied if inspect.isawaitable(denied) else denied:
                raise PasswordRejected("This password is known to attackers; choose another one.")
