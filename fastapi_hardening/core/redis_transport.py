"""How commands get to the shared store and replies come back, by redis-py; one class for a server, one for a cluster.

Both send commands together, wait for nothing longer than they are told, and try nothing twice: whoever asks has an
answer without the store. redis-py is an extra, so it is imported where it is used.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

from fastapi_hardening.core.redis_address import Address

Command = tuple[Any, ...]
"""A command and its arguments, as redis-py takes them."""


class Transport(Protocol):
    """One way to a server: sends commands together, and gives their replies, some of which may be exceptions."""

    async def send(self, commands: Sequence[Command]) -> list[Any]:
        """The replies in the order of the commands. What concerns all of them is raised."""
        ...

    async def close(self) -> None:
        """Closes every connection."""
        ...


class PooledTransport:
    """One server, or the one that sentinels name; without redis-py's pipeline, which costs as much as the command."""

    def __init__(self, address: Address, budget_seconds: float, *, connections: int) -> None:
        from redis import asyncio as redis  # noqa: PLC0415 - an extra

        self._pool: Any
        options = _options(address, budget_seconds)
        self._clients: list[Any] = []
        if address.kind == "sentinel":
            self._pool = self._watched_by_sentinels(address, budget_seconds, options)
            return
        if address.scheme == "unix":
            options |= {"path": address.path, "connection_class": redis.UnixDomainSocketConnection}
        else:
            [(options["host"], options["port"])] = address.hosts
            if options.pop("ssl", False):
                options["connection_class"] = redis.SSLConnection
        self._pool = redis.BlockingConnectionPool(max_connections=connections, timeout=budget_seconds, **options)

    def _watched_by_sentinels(self, address: Address, budget_seconds: float, options: dict[str, Any]) -> Any:
        """The pool of the server that sentinels name; they have credentials of their own."""
        from redis.asyncio.sentinel import Sentinel  # noqa: PLC0415 - an extra

        own = {key.removeprefix("sentinel_"): options.pop(key) for key in [*options] if key.startswith("sentinel_")}
        shared = ("retry", "socket_connect_timeout", "protocol")
        own |= {key: value for key, value in options.items() if key in shared or key.startswith("ssl")}
        sentinels: Any = Sentinel(  # type: ignore[no-untyped-call]
            address.hosts, sentinel_kwargs={**own, "socket_timeout": budget_seconds}, **options
        )
        master = sentinels.master_for(address.path)
        self._clients = [master, *sentinels.sentinels]
        return master.connection_pool

    async def send(self, commands: Sequence[Command]) -> list[Any]:
        """Sends the commands on one connection."""
        from redis.exceptions import ResponseError  # noqa: PLC0415

        connection = await self._pool.get_connection()
        try:
            await connection.send_packed_command(packed(commands))
            replies: list[Any] = []
            for _ in commands:
                try:
                    replies.append(await connection.read_response())
                except ResponseError as error:
                    replies.append(error)
            return replies
        finally:
            await self._pool.release(connection)

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[Any]:
        """A connection for one alone, who reads it as it likes; closed at the end."""
        connection = await self._pool.get_connection()
        try:
            yield connection
        finally:
            await connection.disconnect()
            await self._pool.release(connection)

    async def close(self) -> None:
        """Closes the connections, to sentinels too."""
        await self._pool.disconnect()
        for client in self._clients:
            await client.aclose()


class ClusterTransport:
    """A cluster; each command goes to the node that has its key."""

    def __init__(self, address: Address, budget_seconds: float, *, connections: int) -> None:
        from redis.asyncio.cluster import ClusterNode, RedisCluster  # noqa: PLC0415 - an extra

        options = _options(address, budget_seconds)
        options.pop("db")
        nodes = [ClusterNode(host, port) for host, port in address.hosts]
        # One more, for the one that asks which node has which keys.
        self._client = RedisCluster(
            startup_nodes=nodes, require_full_coverage=False, max_connections=connections + 1, **options
        )

    async def send(self, commands: Sequence[Command]) -> list[Any]:
        """Sends each node its commands."""
        pipeline: Any = self._client.pipeline()
        for command in commands:
            pipeline.execute_command(*command)
        replies: list[Any] = await pipeline.execute(raise_on_error=False)
        return replies

    async def close(self) -> None:
        """Closes the connections to all nodes."""
        await self._client.aclose()


def packed(commands: Sequence[Command]) -> bytes:
    """Commands as they go over the wire (RESP, arrays of bulk strings); redis-py's own takes three times as long."""
    parts = []
    for command in commands:
        parts.append(b"*%d\r\n" % len(command))
        for argument in command:
            value = argument if type(argument) is bytes else str(argument).encode()
            parts.append(b"$%d\r\n%b\r\n" % (len(value), value))
    return b"".join(parts)


def _options(address: Address, budget_seconds: float) -> dict[str, Any]:
    """What redis-py is told: no retries, nothing that waits for longer than the budget."""
    from redis.asyncio.retry import Retry  # noqa: PLC0415 - an extra
    from redis.backoff import NoBackoff  # noqa: PLC0415

    options: dict[str, Any] = {
        **address.options,
        "db": address.database,
        "username": address.username,
        "password": address.password,
        # The handshake of the third protocol is a round trip more, and brings nothing here.
        "protocol": 2,
        "retry": Retry(NoBackoff(), 0),
        # The budget is one timeout around everything; one around each reply would cost more than the reply.
        "socket_timeout": None,
        "socket_connect_timeout": budget_seconds,
    }
    if address.scheme == "rediss":
        options["ssl"] = True
    return options
