"""State that all workers and hosts share, in Redis 6.2 or later or in Valkey.

A limit that each process counts for itself is as many times wider as there are processes. Here one script counts all
limits of a request in one round trip, by the server's clock, exactly as :mod:`fastapi_hardening.core.window` counts in
memory. What is asked in one turn of the event loop goes out together.

It is *not* a place for anything that must not be lost, and nothing waits for it: whoever asks has a reply within the
budget (100 ms for waiting, connecting and the command together), or :class:`StoreUnavailable`. From then on nobody asks
the server but a task in the background, until it answers again.

Example:
    >>> store = RedisStore("rediss://:secret@cache.example:6379/0", prefix="shop")
    >>> store.where, store.available, store.workers
    ('rediss://cache.example:6379', True, 1)
"""

import asyncio
import importlib.util
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import Context
from typing import Any

from fastapi_hardening.core.check import CheckResult
from fastapi_hardening.core.clock import Clock
from fastapi_hardening.core.configuration import ConfigurationError
from fastapi_hardening.core.events import Events
from fastapi_hardening.core.redis_address import read_address
from fastapi_hardening.core.redis_channels import RedisChannels
from fastapi_hardening.core.redis_scripts import BEAT_DIGEST, SCRIPTS, SPEND_DIGEST
from fastapi_hardening.core.redis_transport import ClusterTransport, Command, PooledTransport, Transport
from fastapi_hardening.core.store import SharedCounters, SharedLimits, StoreFailed, StoreRecovered, StoreUnavailable
from fastapi_hardening.core.window import Decision

logger = logging.getLogger("fastapi_hardening.store")

BUDGET_SECONDS = 0.1
"""How long a request may be kept waiting by the store."""

HEARTBEAT_SECONDS = 1.0
"""How often each worker says that it is there, and learns who else is."""

WORKER_LIFETIME_SECONDS = 10.0
"""For so long a worker counts that says nothing."""

# So many round trips are under way at once; what is asked meanwhile goes with the next.
_LANES = 2
# An event loop that is late by more than this was busy with something else; what has arrived is then still taken.
_GRACE_SECONDS = 0.02
_FIRST_PROBE_SECONDS, _LAST_PROBE_SECONDS = 0.1, 1.0

_FIELDS_OF_A_DECISION = 5

# What a server says that can be read, and only takes nothing: full, a replica, cannot write to its disk.
_ONLY_READS = re.compile(r"(OutOfMemory|ReadOnly)Error: |\w+: (OOM|READONLY|MISCONF|NOREPLICAS) ")


class RedisStore:
    """A state store, and counters, that all workers share.

    It connects when it is used, in the event loop that uses it: a process that forks, or has several loops, has
    connections for each.

    Args:
        url: Where the server is, with the password, if there is one.
        prefix: What the keys of this service begin with.
        workers: How many processes share the store, as long as it has not said so itself.
        budget_seconds: How long a request may be kept waiting.
        events: Where :class:`StoreFailed` and :class:`StoreRecovered` go.
        clock: Where the time of limits comes from; by default from the server, so that all hosts agree.

    Attributes:
        where: The address, without secrets.

    Raises:
        ConfigurationError: The URL leads to no store, or redis-py is not installed.
    """

    def __init__(
        self,
        url: str,
        *,
        prefix: str = "fastapi-hardening",
        workers: int = 1,
        budget_seconds: float = BUDGET_SECONDS,
        events: Events | None = None,
        clock: Clock | None = None,
    ) -> None:
        try:
            self._address = read_address(url)
        except ValueError as error:
            raise ConfigurationError(f"the URL of the shared store {error}") from None
        if importlib.util.find_spec("redis") is None:
            raise ConfigurationError("the shared store needs redis-py: pip install 'fastapi-hardening[redis]'")
        self.where = self._address.where
        # A prefix without braces, which mean something in the keys of a cluster.
        self._prefix = re.sub(r"[^\w.-]+", "-", prefix)
        self._clock = clock
        self._state = _State(self.where, budget_seconds, workers, events or Events())
        self._links: dict[asyncio.AbstractEventLoop, _Link] = {}
        self._link: _Link | None = None

    @property
    def available(self) -> bool:
        """Whether the store is asked at all."""
        return self._state.available

    @property
    def counters(self) -> SharedCounters:
        """The store itself counts."""
        return self

    @property
    def workers(self) -> int:
        """How many processes share the store: as their heartbeats say, or have said, or else as it was told."""
        return self._state.workers

    async def open(self) -> None:
        """Begins to connect and to send heartbeats; does not wait for either."""
        self._here()

    async def close(self) -> None:
        """Says that this worker ends, and closes the connections of this event loop."""
        link = self._links.get(asyncio.get_running_loop())
        if link is not None:
            if self.available:
                with suppress(StoreUnavailable):
                    await link.ask(("ZREM", self._key("workers"), link.worker))
            await link.close()

    async def spend(self, key: str, *charges: tuple[SharedLimits, int]) -> list[Decision]:
        """Spends units of a key, of all these limits or of none; one round trip.

        Raises:
            StoreUnavailable: There is no answer within the budget, or it is known that there is none.
        """
        self._state.demand()
        command: list[Any] = ["EVALSHA", SPEND_DIGEST, len(charges)]
        # The braces make all keys of a decision live on one node of a cluster.
        command += [self._key(f"{{limit:{key}}}:{limits.id}") for limits, _ in charges]
        command.append("" if self._clock is None else repr(self._clock.monotonic()))
        command += [f"{cost} {limits.text}" for limits, cost in charges]
        fields = (await self._here().ask(tuple(command))).split()
        return [
            Decision(allowed == b"1", int(remaining), float(following), float(retry), float(reset))
            for allowed, remaining, following, retry, reset in zip(*[iter(fields)] * _FIELDS_OF_A_DECISION, strict=True)
        ]

    async def get(self, key: str) -> bytes | None:
        """The value, or ``None`` when there is none or it has expired. A store that only takes no writes is asked."""
        [value] = await self.get_many((key,))
        return value

    async def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """The values of several keys in their order, in one round trip."""
        self._state.demand(writes=False)
        # Single commands that go out together: on a cluster the keys live on several nodes.
        link = self._here()
        return list(await asyncio.gather(*(link.ask(("GET", self._value_key(key))) for key in keys)))

    async def put(self, key: str, value: bytes, ttl_seconds: float) -> bool:
        """Stores a value; there is room, or the store is unavailable."""
        return bool(await self._write("SET", self._value_key(key), value, "PX", _milliseconds(ttl_seconds)))

    async def add(self, key: str, value: bytes, ttl_seconds: float) -> bool:
        """Stores a value unless the key is there already; of several who try, one succeeds."""
        return bool(await self._write("SET", self._value_key(key), value, "NX", "PX", _milliseconds(ttl_seconds)))

    async def delete(self, key: str) -> None:
        """Forgets a key."""
        await self._write("DEL", self._value_key(key))

    def channels(self, name: str) -> RedisChannels:
        """Channels on which all workers hear each other, under a name that tells them from others."""
        prefix = self._key(f"{name}:")
        return RedisChannels(self._address, prefix, self._state.budget_seconds, self._write)

    def check(self) -> CheckResult:
        """What a health check says of the store; asks nobody, for the heartbeat does."""
        if self.available:
            return CheckResult("pass", observed=self.workers, unit="workers")
        return CheckResult("fail", f"{self.where}: {self._state.reason}, {self._state.failing_seconds:.0f} s ago")

    async def _write(self, *command: Any) -> Any:
        self._state.demand()
        return await self._here().ask(command)

    def _here(self) -> "_Link":
        """The connection of the running event loop, begun if there is none."""
        link = self._link
        running = asyncio.get_running_loop()
        if link is None or link.loop is not running:
            link = self._links.get(running)
            if link is None:
                make = ClusterTransport if self._address.kind == "cluster" else PooledTransport
                transport = make(self._address, self._state.budget_seconds, connections=_LANES + 1)
                link = _Link(self._state, transport, running, self._key("workers"), self._forget)
                self._links[running] = link
            self._link = link
        return link

    def _forget(self, link: "_Link") -> None:
        self._links.pop(link.loop, None)
        if self._link is link:
            self._link = None

    def _key(self, name: str) -> bytes:
        return f"{self._prefix}:{name}".encode("utf-8", "surrogatepass")

    def _value_key(self, key: str) -> bytes:
        return self._key(f"value:{key}")


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))


class _State:
    """Whether a store answers, and what all connections of a process know about it."""

    def __init__(self, where: str, budget_seconds: float, workers: int, events: Events) -> None:
        self.budget_seconds = budget_seconds
        self.workers = workers
        self.available = True
        self.reason = ""
        self._where = where
        self._events = events
        self._failed_at = 0.0
        self._only_reads = False

    @property
    def failing_seconds(self) -> float:
        """How long ago the store failed."""
        return time.monotonic() - self._failed_at

    def demand(self, *, writes: bool = True) -> None:
        """Raises :class:`StoreUnavailable` where it is no use to ask."""
        if not self.available and (writes or not self._only_reads):
            raise StoreUnavailable(self.reason)

    def failed(self, error: Exception) -> StoreUnavailable:
        """Notes that the store did not do what it was asked; gives what those who asked are told."""
        reason = f"{type(error).__name__}: {error}"
        if type(error) is TimeoutError:
            reason = f"no answer within {self.budget_seconds:g} s"
        self._only_reads = _ONLY_READS.match(reason) is not None
        if self.available:
            self.available = False
            self.reason = reason
            self._failed_at = time.monotonic()
            logger.warning("the shared store at %s is gone: %s", self._where, reason)
            self._events.emit(StoreFailed(reason))
        return StoreUnavailable(reason)

    def answered(self, workers: int) -> None:
        """Notes that the store has taken a heartbeat, and how many workers it knows."""
        if workers != self.workers:
            logger.info("%d workers share the store at %s", workers, self._where)
            self.workers = workers
        if not self.available:
            self.available = True
            logger.info("the shared store at %s is back after %.1f s", self._where, self.failing_seconds)
            self._events.emit(StoreRecovered(self.failing_seconds))


class _Batch:
    """Commands that are sent together."""

    __slots__ = ("answers", "commands", "deadline", "expired", "task", "timer")

    task: asyncio.Task[list[Any]]
    timer: asyncio.TimerHandle

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.commands: list[Command] = []
        self.answers: list[asyncio.Future[Any]] = []
        self.expired = False


class _Link:
    """What one event loop has of a store: connections, what is waiting to be sent, and the heartbeat."""

    def __init__(
        self,
        state: _State,
        transport: Transport,
        loop: asyncio.AbstractEventLoop,
        workers_key: bytes,
        on_closed: Callable[["_Link"], None],
    ) -> None:
        self.loop = loop
        self.worker = f"{os.getpid()}-{secrets.token_hex(6)}"
        self._state = state
        self._transport = transport
        self._on_closed = on_closed
        self._waiting: _Batch | None = None
        self._under_way: set[_Batch] = set()
        self._trouble = asyncio.Event()
        self._beat = ("EVALSHA", BEAT_DIGEST, 1, workers_key, self.worker, _milliseconds(WORKER_LIFETIME_SECONDS))
        # In a context of its own: it outlives the request that happens to begin it.
        self._keeper = loop.create_task(self._keep(), name="heartbeat of the shared store", context=Context())

    def ask(self, command: Command) -> "asyncio.Future[Any]":
        """Has a command sent with what else is asked in this turn of the event loop; gives its reply to come."""
        batch = self._waiting
        if batch is None:
            # Whoever asks first in a batch has the least time.
            batch = self._waiting = _Batch(self.loop.time() + self._state.budget_seconds)
            self.loop.call_soon(self._flush)
        answer = self.loop.create_future()
        batch.commands.append(command)
        batch.answers.append(answer)
        return answer

    async def close(self) -> None:
        """Ends the heartbeat, which closes the connections."""
        self._keeper.cancel()
        await asyncio.wait((self._keeper,))

    def _flush(self) -> None:
        batch = self._waiting
        if batch is not None and len(self._under_way) < _LANES:
            self._waiting = None
            self._under_way.add(batch)
            batch.timer = self.loop.call_at(batch.deadline, self._expire, batch, _GRACE_SECONDS)
            batch.task = self.loop.create_task(self._replies(batch.commands))
            batch.task.add_done_callback(lambda task: self._sent(batch, task))

    def _expire(self, batch: _Batch, grace: float) -> None:
        """Ends a batch that is late; not yet if it is this process that was busy, and the replies may lie here."""
        if grace and self.loop.time() > batch.deadline + grace:
            batch.timer = self.loop.call_later(grace, self._expire, batch, 0)
        else:
            batch.expired = True
            batch.task.cancel()

    def _sent(self, batch: _Batch, task: "asyncio.Task[list[Any]]") -> None:
        """Hands out the replies, or says that there are none."""
        self._under_way.discard(batch)
        batch.timer.cancel()
        if task.cancelled() and not batch.expired:
            for answer in batch.answers:  # the event loop ends
                answer.cancel()
            return
        error = TimeoutError() if task.cancelled() else task.exception()
        replies = task.result() if error is None else [error] * len(batch.answers)
        for answer, reply in zip(batch.answers, replies, strict=True):
            failure = self._failed(reply) if isinstance(reply, Exception) else None
            if answer.done():
                continue  # whoever asked has gone
            if failure is not None:
                answer.set_exception(failure)
            else:
                answer.set_result(reply)
        self._flush()

    async def _replies(self, commands: list[Command]) -> list[Any]:
        """The replies. Of the scripts that the server does not know (yet, or any more) one is sent whole."""
        replies = await self._transport.send(commands)
        while unknown := [at for at, reply in enumerate(replies) if type(reply).__name__ == "NoScriptError"]:
            again = [commands[at] for at in unknown]
            # The others find it known; in a cluster perhaps only in the next turn, because each node knows its own.
            again[0] = ("EVAL", SCRIPTS[again[0][1]], *again[0][2:])
            for at, reply in zip(unknown, await self._transport.send(again), strict=True):
                replies[at] = reply
        return replies

    def _failed(self, error: Exception) -> StoreUnavailable:
        """Notes a failure, tells those whose commands were not sent yet, and wakes the heartbeat."""
        failure = self._state.failed(error)
        batch, self._waiting = self._waiting, None
        for answer in () if batch is None else batch.answers:
            if not answer.done():
                answer.set_exception(failure)
        self._trouble.set()
        return failure

    async def _keep(self) -> None:
        """Sends heartbeats as long as the store answers, and looks for it when it does not."""
        pause = _FIRST_PROBE_SECONDS
        try:
            while True:
                self._trouble.clear()
                with suppress(StoreUnavailable):
                    self._state.answered(int(await self.ask(self._beat)))
                if self._state.available:
                    pause = _FIRST_PROBE_SECONDS
                    with suppress(TimeoutError):
                        async with asyncio.timeout(HEARTBEAT_SECONDS):
                            await self._trouble.wait()
                if not self._state.available:
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, _LAST_PROBE_SECONDS)
        finally:
            self._on_closed(self)
            with suppress(Exception):
                async with asyncio.timeout(self._state.budget_seconds):
                    await self._transport.close()
