"""Channels on which all workers hear each other, by Redis publish and subscribe.

Nothing is kept there: who is not connected hears nothing. So it is told of each channel when it may have missed
something, as soon as it hears again; what it reads then elsewhere is not older than what comes next.

One connection listens to those channels that somebody here wants. On a cluster any node will do, because each hands
messages to all.
"""

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

from fastapi_hardening.core.redis_address import Address
from fastapi_hardening.core.redis_transport import PooledTransport, packed

logger = logging.getLogger("fastapi_hardening.store")

_FIRST_PAUSE_SECONDS, _LAST_PAUSE_SECONDS = 0.1, 1.0
_PING_SECONDS = 1.0
_SILENCE_SECONDS = 5.0


class RedisChannels:
    """Channels by name.

    Args:
        address: Where the server is.
        prefix: What the names of channels begin with on the server.
        budget_seconds: How long somebody may be kept waiting.
        command: Sends a command.
    """

    def __init__(
        self, address: Address, prefix: bytes, budget_seconds: float, command: Callable[..., Awaitable[Any]]
    ) -> None:
        self._prefix = prefix
        self._budget = budget_seconds
        self._command = command
        # A node of a cluster is a server as any other, here.
        self._addresses = [address]
        if address.kind == "cluster":
            self._addresses = [address._replace(kind="server", hosts=(host,)) for host in address.hosts]
        # What is wanted, and whoever waits until it is heard.
        self._wanted: dict[str, asyncio.Future[None]] = {}
        self._missed: set[str] = set()
        self._connection: Any = None

    async def publish(self, name: str, payload: bytes) -> None:
        """Sends something to all who listen, this process among them.

        Raises:
            StoreUnavailable: There is no answer within the budget.
        """
        await self._command("PUBLISH", self._key(name), payload)

    async def subscribe(self, name: str) -> None:
        """Listens to a channel; returns when it is heard, or the budget is used up. Then it is told when it is."""
        heard = self._wanted.get(name)
        if heard is None:
            heard = self._wanted[name] = asyncio.get_running_loop().create_future()
            await self._say(b"SUBSCRIBE", name)
        try:
            async with asyncio.timeout(self._budget):
                await asyncio.shield(heard)
        except TimeoutError:
            self._missed.add(name)

    async def unsubscribe(self, name: str) -> None:
        """Listens no longer."""
        if self._wanted.pop(name, None) is not None:
            self._missed.discard(name)
            await self._say(b"UNSUBSCRIBE", name)

    async def run(self, on_message: Callable[[str, bytes], None], on_missed: Callable[[str], None]) -> NoReturn:
        """Connects, listens, and connects again.

        Args:
            on_message: Called with the name of a channel and what came.
            on_missed: Called with the name of a channel that is heard again after it was not.
        """
        try:
            await self._connect_for_ever(on_message, on_missed)
        finally:
            # What was wanted belongs to an event loop that may end.
            self._wanted.clear()
            self._missed.clear()
        raise AssertionError  # pragma: no cover - it is cancelled

    async def _connect_for_ever(
        self, on_message: Callable[[str, bytes], None], on_missed: Callable[[str], None]
    ) -> None:
        pause, told = _FIRST_PAUSE_SECONDS, False
        for address in itertools.cycle(self._addresses):
            transport = PooledTransport(address, self._budget, connections=1)
            try:
                async with transport.connected() as connection:
                    pause, told = _FIRST_PAUSE_SECONDS, False
                    await self._listen(connection, on_message, on_missed)
            except Exception as error:  # noqa: BLE001 - whatever it is, the next connection may not have it
                if not told:
                    told = True
                    logger.warning("channels of the shared store at %s are not heard: %r", address.where, error)
            finally:
                self._lose()
                await transport.close()
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LAST_PAUSE_SECONDS)

    async def _listen(
        self, connection: Any, on_message: Callable[[str, bytes], None], on_missed: Callable[[str], None]
    ) -> None:
        self._connection = connection
        if self._wanted:
            await connection.send_packed_command(packed([(b"SUBSCRIBE", *map(self._key, self._wanted))]))
        pings = asyncio.create_task(self._ping(connection))
        try:
            while True:
                async with asyncio.timeout(_SILENCE_SECONDS):
                    reply = await connection.read_response()
                # While nothing is wanted, a ping is answered by a single word.
                kind, *about = reply if isinstance(reply, list) else [reply]
                if kind == b"message":
                    on_message(self._name(about[0]), about[1])
                elif kind == b"subscribe":
                    self._heard(self._name(about[0]), on_missed)
        finally:
            pings.cancel()

    def _heard(self, name: str, on_missed: Callable[[str], None]) -> None:
        heard = self._wanted.get(name)
        if heard is None:
            return  # it was given up meanwhile
        if not heard.done():
            heard.set_result(None)
        if name in self._missed:
            self._missed.discard(name)
            on_missed(name)

    def _lose(self) -> None:
        """Notes that nothing is heard any more."""
        self._connection = None
        self._missed.update(self._wanted)
        for name, heard in self._wanted.items():
            if heard.done():
                self._wanted[name] = heard.get_loop().create_future()

    async def _ping(self, connection: Any) -> None:
        """Has the server say something, so that its silence means something."""
        while True:
            await asyncio.sleep(_PING_SECONDS)
            await connection.send_packed_command(packed([(b"PING",)]))

    async def _say(self, command: bytes, name: str) -> None:
        connection = self._connection
        if connection is not None:
            try:
                await connection.send_packed_command(packed([(command, self._key(name))]))
            except Exception:  # whoever reads the connection sees it too
                logger.debug("the channel %s could not be asked for now", name, exc_info=True)

    def _key(self, name: str) -> bytes:
        return self._prefix + name.encode()

    def _name(self, key: bytes) -> str:
        return key[len(self._prefix) :].decode()
