"""Prints what a limit costs that all workers share through one Redis, beside slowapi and limits.

    scripts/bench shared-store              everything, in about two minutes
    scripts/bench shared-store --quick      the same with fewer rounds
    scripts/bench shared-store --docs       also puts the report into docs/scale.md

The server is a real one, on this machine, as the tests find it. As in the other benchmark everything takes turns in
short rounds; what is printed is the median, with the interval in which 95 % of the medians lie that other rounds could
have given. What the server does is what it says itself (`INFO`).
"""

import argparse
import asyncio
import contextlib
import logging
import os
import platform
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import redis  # noqa: E402
from limits import RateLimitItem, parse_many  # noqa: E402
from limits.aio.storage import RedisStorage  # noqa: E402
from limits.aio.strategies import FixedWindowRateLimiter  # noqa: E402
from overhead import Estimate, _Connection, _dice, _row, _version, estimate, progress, scope_of  # noqa: E402
from slowapi import Limiter as SlowapiLimiter  # noqa: E402
from slowapi.util import get_remote_address  # noqa: E402
from starlette.types import Message, Receive, Scope, Send  # noqa: E402

from fastapi_hardening.core.redis_store import BUDGET_SECONDS, RedisStore  # noqa: E402
from fastapi_hardening.core.store import SharedLimits  # noqa: E402
from fastapi_hardening.core.window import Strategy, parse_limits  # noqa: E402
from fastapi_hardening.security.rate_limit import RateLimitMiddleware, RateLimitSettings  # noqa: E402
from tests.state_server import StateServer, free_port  # noqa: E402

PAGE = ROOT / "docs" / "scale.md"
BLOCK = re.compile(r"(<!-- benchmark -->\n).*?(<!-- end of benchmark -->)", re.DOTALL)
PACKAGES = "fastapi starlette uvicorn uvloop redis limits slowapi"

ONE = "1000000000/minute"
THREE = "1000000000/minute; 1000000000/hour; 1000000000/day"
CONCURRENCY = (1, 32, 256)
CLIENTS = [f"203.0.113.{number}" for number in range(256)]
STRATEGIES: tuple[Strategy, ...] = ("token-bucket", "fixed-window", "sliding-window")
LATE_MS = 50.0
CONNECTIONS = 32
PATIENCE_SECONDS = 60.0
COUNTERS = ("total_reads_processed", "total_net_input_bytes", "total_net_output_bytes")

Decide = Callable[[str], Awaitable[Any]]


class Report:
    """The parts in Markdown."""

    def __init__(self, *, quick: bool) -> None:
        self.quick = quick
        self.lines: list[str] = []

    def section(self, title: str, text: str) -> None:
        """Begins a part."""
        self.lines += ["", f"### {title}", "", text]

    def table(self, *head: str, rows: Sequence[Sequence[str]]) -> None:
        """A table; what is not in the first column is a number."""
        self.lines += ["", _row(head), _row(["---"] + ["---:"] * (len(head) - 1)), *map(_row, rows)]

    def __str__(self) -> str:
        python = f"{platform.python_implementation()} {platform.python_version()}"
        packages = ", ".join(f"{name} {_version(name)}" for name in PACKAGES.split())
        first = (
            f"Measured on {datetime.now(UTC):%d %B %Y}: {python}, {platform.system()} on {platform.machine()} with "
            f"{os.cpu_count()} CPUs, {SERVER_NAME}, {packages}. The machine's load average was {LOAD:.1f} at the "
            "start: what is above the number of CPUs was others' work, and widens every interval."
        )
        return "\n".join([first, *self.lines]) + "\n"


SERVER_NAME = ""
LOAD = os.getloadavg()[0]


# --- a decision -------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _ours(url: str, text: str, strategy: Strategy) -> AsyncIterator[Decide]:
    store = RedisStore(url, prefix="bench", budget_seconds=5)
    limits = SharedLimits(text, parse_limits(text), strategy)
    try:
        yield lambda client: store.spend(client, (limits, 1))
    finally:
        await store.close()


@asynccontextmanager
async def _slowapi(url: str, text: str) -> AsyncIterator[Decide]:
    """What slowapi does for a request: it hits each limit, and asks for its window to write the header fields."""
    limiter = SlowapiLimiter(key_func=get_remote_address, storage_uri=url, headers_enabled=True)
    items = parse_many(text)

    async def decide(client: str) -> None:
        for item in items:
            limiter.limiter.hit(item, client, "/")
        limiter.limiter.get_window_stats(items[0], client, "/")

    yield decide


@asynccontextmanager
async def _limits(url: str, text: str) -> AsyncIterator[Decide]:
    storage = RedisStorage(f"async+{url}", implementation="redispy", max_connections=300)
    limiter = FixedWindowRateLimiter(storage)
    items: list[RateLimitItem] = parse_many(text)

    async def decide(client: str) -> None:
        for item in items:
            await limiter.hit(item, client, "/")
        await limiter.get_window_stats(items[0], client, "/")

    yield decide
    await storage.bridge.get_connection().aclose()


class Cost(NamedTuple):
    """What one decision cost in one round."""

    cpu_us: float
    wall_us: float


async def _round(decide: Decide, concurrency: int, seconds: float) -> Cost:
    done = 0
    ends = time.perf_counter() + seconds

    async def one(client: str) -> None:
        nonlocal done
        while done == 0 or time.perf_counter() < ends:
            await decide(client)
            done += 1

    cpu, wall = time.process_time(), time.perf_counter()
    await asyncio.gather(*(one(client) for client in CLIENTS[:concurrency]))
    return Cost((time.process_time() - cpu) / done * 1e6, (time.perf_counter() - wall) / done * 1e6)


async def decisions(report: Report, server: StateServer) -> None:
    """Ours and the peers', at three concurrencies."""
    report.section(
        "A decision",
        "In microseconds a decision: CPU time of the process that asks, and time on the wall, which is how many pass "
        "one process. «Three limits» hold at once. slowapi and limits count a fixed window, hit limit by limit, and "
        "ask once more for what the header fields say; ours is a token bucket, and its answer has all of it. slowapi "
        "asks synchronously: while it waits, so does every other request of the process, whatever the concurrency.",
    )
    variants: dict[str, Any] = {
        "ours": _ours(server.url, ONE, "token-bucket"),
        "limits, async": _limits(server.url, ONE),
        "slowapi": _slowapi(server.url, ONE),
        "ours, three limits": _ours(server.url, THREE, "token-bucket"),
        "limits, async, three limits": _limits(server.url, THREE),
        "slowapi, three limits": _slowapi(server.url, THREE),
    }
    rounds, seconds = (4, 0.05) if report.quick else (20, 0.12)
    measured: dict[tuple[str, int], list[Cost]] = {}
    async with contextlib.AsyncExitStack() as stack:
        decides = {name: await stack.enter_async_context(variant) for name, variant in variants.items()}
        for concurrency in CONCURRENCY:
            progress(f"decisions, {concurrency} at a time")
            for decide in decides.values():
                await _round(decide, concurrency, seconds)
            for _ in range(rounds):
                for name in _dice.sample(list(decides), len(decides)):
                    cost = await _round(decides[name], concurrency, seconds)
                    measured.setdefault((name, concurrency), []).append(cost)
        trips = {name: await _trips(decide, server) for name, decide in decides.items()}
    rows = []
    for name in decides:
        for concurrency in CONCURRENCY:
            costs = measured[name, concurrency]
            cpu, wall = (estimate(statistics.median, [cost[which] for cost in costs]) for which in (0, 1))
            rows.append([f"{name}, {concurrency} at a time", f"{cpu:.0f}", f"{wall:.0f}", f"{1e6 / wall.value:.0f}"])
    report.table("", "CPU µs", "wall µs", "decisions a second", rows=rows)
    report.section(
        "Round trips",
        "What the server has counted for a decision: round trips (reads of a socket; what is pipelined comes in one), "
        "when decisions are made one after another and when they are made 32 at a time; and bytes in both directions.",
    )
    report.table(
        "",
        *("round trips", "round trips, 32 at a time", "bytes to it", "bytes from it"),
        rows=[[name, *columns] for name, columns in trips.items()],
    )


async def _trips(decide: Decide, server: StateServer) -> list[str]:
    alone, together = await _seen(decide, server, 1, 200), await _seen(decide, server, 32, 50)
    trips, to_it, from_it = (alone[name] for name in COUNTERS)
    return [f"{trips:.1f}", f"{together[COUNTERS[0]]:.2f}", f"{to_it:.0f}", f"{from_it:.0f}"]


async def _seen(decide: Decide, server: StateServer, concurrency: int, times: int) -> dict[str, float]:
    """What the server has counted for a decision, without what it takes to ask it."""

    async def one(client: str) -> None:
        for _ in range(times):
            await decide(client)

    with redis.Redis(port=server.port) as client:
        counted = []
        for work in (True, False):
            before = _counters(client)
            if work:
                await asyncio.gather(*(one(client) for client in CLIENTS[:concurrency]))
            counted.append({name: value - before[name] for name, value in _counters(client).items()})
    return {name: (counted[0][name] - counted[1][name]) / times / concurrency for name in counted[0]}


def _counters(client: Any) -> dict[str, float]:
    stats = client.info("stats")
    return {name: float(stats[name]) for name in COUNTERS}


# --- the server -------------------------------------------------------------------------------------------------------


async def inside(report: Report, server: StateServer) -> None:
    """What a decision costs the server."""
    report.section(
        "Inside the server",
        "What a decision costs the server, which does one thing at a time: the time in which it runs the script, as it "
        "says (`commandstats`), the bytes of a client's key (`MEMORY USAGE`), and the decisions a second that one "
        "thread of it could do if it had nothing else to do, neither read nor write sockets.",
    )
    rows = []
    with redis.Redis(port=server.port) as client:
        for strategy in STRATEGIES:
            for words, text in (("one limit", ONE), ("three limits", THREE)):
                progress(f"{strategy}, {words}")
                async with _ours(server.url, text, strategy) as decide:
                    await decide("203.0.113.1")
                    client.config_resetstat()
                    await _round(decide, 32, 0.2 if report.quick else 1.0)
                    micros = float(client.info("commandstats")["cmdstat_evalsha"]["usec_per_call"])
                key = f"bench:{{limit:203.0.113.1}}:{SharedLimits(text, parse_limits(text), strategy).id}"
                size = client.memory_usage(key)
                rows.append([f"{strategy}, {words}", f"{micros:.1f}", f"{size}", f"{1e6 / micros:.0f}"])
    report.table("", "µs in the script", "bytes a client", "decisions a second at most", rows=rows)


# --- failures ---------------------------------------------------------------------------------------------------------


async def _application(_scope: Scope, _receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def _no_body() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


async def failures(report: Report, _server: StateServer) -> None:
    """What requests see when the server goes."""
    report.section(
        "When it fails",
        f"64 clients send one request after another through the layer, in process; after 0.5 s the server is done "
        f"something to, after 1.5 s it is back. The budget is {BUDGET_SECONDS * 1000:.0f} ms. «Slowest» is the slowest "
        f"request of all; the goal is the budget and {LATE_MS:.0f} ms.",
    )
    rows = []
    for name, (harm, mend) in FAILURES.items():
        progress(f"failure: {name}")
        with tempfile.TemporaryDirectory() as folder:
            server = StateServer(Path(folder)).start()
            try:
                statuses, slowest, failed, back = await _fail(server, harm, mend)
            finally:
                with contextlib.suppress(Exception):
                    server.tell(signal.SIGCONT)
                server.kill()
        said = ", ".join(f"{status}: {count}" for status, count in sorted(statuses.items()))
        goal = "reached" if slowest * 1000 <= BUDGET_SECONDS * 1000 + LATE_MS else "**not reached**"
        rows.append([name, said, f"{slowest * 1000:.0f}", goal, f"{failed}", "yes" if back else "**no**"])
    report.table(
        "", "answers by status", "slowest ms", "", "times it was given up", "asked again at the end", rows=rows
    )


async def _fail(
    server: StateServer, harm: Callable[[StateServer], Any], mend: Callable[[StateServer], Any]
) -> tuple[Counter[int], float, int, bool]:
    from fastapi_hardening.core.events import Events  # noqa: PLC0415
    from fastapi_hardening.core.store import StoreFailed  # noqa: PLC0415

    events = Events()
    store = RedisStore(server.url, prefix="bench", events=events)
    layer = RateLimitMiddleware(_application, RateLimitSettings(default="100/second"), store=store)
    statuses: Counter[int] = Counter()
    slowest = 0.0
    ends = time.perf_counter() + 3.5

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            statuses[message["status"]] += 1

    async def one(number: int) -> None:
        nonlocal slowest
        while time.perf_counter() < ends:
            scope = scope_of("/")
            scope["client"] = (CLIENTS[number], 1)
            started = time.perf_counter()
            await layer(scope, _no_body, send)
            slowest = max(slowest, time.perf_counter() - started)
            await asyncio.sleep(0.005)

    async def fail() -> None:
        await asyncio.sleep(0.5)
        await asyncio.to_thread(harm, server)
        await asyncio.sleep(1.5)
        await asyncio.to_thread(mend, server)

    await store.open()
    await asyncio.gather(fail(), *(one(number) for number in range(64)))
    back = store.available
    await store.close()
    return statuses, slowest, events.count(StoreFailed), back


FAILURES: dict[str, tuple[Callable[[StateServer], Any], Callable[[StateServer], Any]]] = {
    "killed, and started again": (lambda server: server.kill(), lambda server: server.start()),
    "accepts and never answers (SIGSTOP)": (
        lambda server: server.tell(signal.SIGSTOP),
        lambda server: server.tell(signal.SIGCONT),
    ),
    "full (`OOM`)": (
        lambda server: server.ask("CONFIG", "SET", "maxmemory", "1"),
        lambda server: server.ask("CONFIG", "SET", "maxmemory", "0"),
    ),
    "a replica (`READONLY`)": (
        lambda server: server.ask("REPLICAOF", "127.0.0.1", str(free_port())),
        lambda server: server.ask("REPLICAOF", "NO", "ONE"),
    ),
    "forgets the scripts (`SCRIPT FLUSH`)": (
        lambda server: server.ask("SCRIPT", "FLUSH"),
        lambda server: server.ask("SCRIPT", "FLUSH"),
    ),
}


# --- the shop ---------------------------------------------------------------------------------------------------------


async def shop(report: Report, server: StateServer) -> None:
    """Requests a second of the sample application."""
    report.section(
        "The shop with several workers",
        f"Requests a second of `GET /api/products/1` of the sample application under uvicorn, {CONNECTIONS} "
        "connections that are kept alive, everything on with its defaults but limits that are never reached. The load "
        "generator and Redis are on the same machine and share its processors, so the sum ends where those do. «In "
        "memory» is the same without `HARDENING_STATE_URL`.",
    )
    rows = []
    for workers in (1, 2, 4):
        rates: dict[str, Estimate] = {}
        for name, url in (("in memory", None), ("shared", server.url)):
            progress(f"the shop, {workers} workers, {name}")
            with tempfile.TemporaryDirectory() as folder:
                async with _serving(Path(folder), workers, url) as port:
                    await _load(port, 0.5)
                    rounds = 3 if report.quick else 12
                    rates[name] = estimate(statistics.median, [await _load(port, 0.5) for _ in range(rounds)])
        kept = 100 * rates["shared"].value / rates["in memory"].value
        rows.append([f"{workers}", f"{rates['in memory']:.0f}", f"{rates['shared']:.0f}", f"{kept:.0f}"])
    report.table("workers", "in memory", "shared", "shared, % of in memory", rows=rows)


@asynccontextmanager
async def _serving(folder: Path, workers: int, url: str | None) -> AsyncIterator[int]:
    port = free_port()
    environment = {
        **os.environ,
        "SHOP_DATABASE_URL": f"sqlite+aiosqlite:///{folder / 'shop.sqlite3'}",
        "SHOP_ADMIN_PASSWORD": "the password of the benchmark",
        "HARDENING_RATE_LIMIT__DEFAULT": ONE,
        "HARDENING_ADDRESS_LIMIT__LIMIT": ONE,
        "HARDENING_WORKERS": str(workers),
        **({} if url is None else {"HARDENING_STATE_URL": url}),
    }
    command = [sys.executable, "-m", "uvicorn", "sample_app.main:app", "--port", str(port), "--no-access-log"]
    log = (folder / "log").open("wb")
    process = subprocess.Popen(  # noqa: ASYNC220, S603 - it has to run beside
        [*command, "--workers", str(workers)], cwd=ROOT, env=environment, stdout=log, stderr=log
    )
    try:
        ends = time.monotonic() + PATIENCE_SECONDS
        while (folder / "log").read_text().count("Application startup complete") < workers or not _accepts(port):
            if process.poll() is not None or time.monotonic() > ends:
                sys.exit((folder / "log").read_text())
            await asyncio.sleep(0.05)
        yield port
    finally:
        process.terminate()
        await asyncio.to_thread(process.wait, PATIENCE_SECONDS)
        log.close()


def _accepts(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


async def _load(port: int, seconds: float) -> float:
    request = b"GET /api/products/1 HTTP/1.1\r\nHost: shop.example\r\nAccept: application/json\r\n\r\n"
    latencies: list[float] = []
    started = time.perf_counter()
    connections = [_Connection(request, latencies, started + seconds) for _ in range(CONNECTIONS)]
    async with asyncio.timeout(seconds + PATIENCE_SECONDS):
        for connection in connections:
            await asyncio.get_running_loop().create_connection(lambda c=connection: c, "127.0.0.1", port)  # type: ignore[misc]
        await asyncio.gather(*(connection.done for connection in connections))
    return len(latencies) / (time.perf_counter() - started)


# --- the program ------------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Report, StateServer], Awaitable[None]]] = {
    "decisions": decisions,
    "inside": inside,
    "failures": failures,
    "shop": shop,
}


def main() -> None:
    """Runs the parts that are asked for, and prints the report."""
    global SERVER_NAME  # noqa: PLW0603 - a program
    for name in [name for name in os.environ if name.upper().startswith(("HARDENING_", "RATELIMIT_"))]:
        del os.environ[name]
    logging.disable(logging.CRITICAL)
    parser = argparse.ArgumentParser(prog="scripts/bench shared-store", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, with wider intervals")
    parser.add_argument("--only", action="append", choices=PARTS, metavar="PART", help=f"one of {', '.join(PARTS)}")
    parser.add_argument("--docs", action="store_true", help="also put the report into docs/scale.md")
    arguments = parser.parse_args()
    report = Report(quick=arguments.quick)
    with tempfile.TemporaryDirectory() as folder:
        server = StateServer(Path(folder)).start()
        try:
            about = server.ask("INFO", "server")
            name = about.get("server_name", "redis")
            SERVER_NAME = f"{name} {about.get(f'{name}_version', about['redis_version'])}"
            for part in arguments.only or PARTS:
                asyncio.run(PARTS[part](report, server))
                if arguments.docs:  # after each part: what is measured is not lost
                    page = PAGE.read_text(encoding="utf-8")
                    PAGE.write_text(
                        BLOCK.sub(lambda block: f"{block[1]}\n{report}\n{block[2]}", page), encoding="utf-8"
                    )
        finally:
            server.kill()
    print(report, end="")


if __name__ == "__main__":
    main()
