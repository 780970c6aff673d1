"""Prints what calls of other services cost behind the outbound layers, and what they survive.

    scripts/bench outbound                    in about a minute
    scripts/bench outbound --quick            fewer rounds and calls
    scripts/bench outbound --only failover    one part: cost, client, failover, dead
    scripts/bench outbound --docs             also puts the report into the page of the concern

Servers are processes of their own, over the loopback interface. «kill» ends one of three by SIGKILL in the middle of
the load, «hang» stops it by SIGSTOP, so that it accepts connections and never answers. The peer is httpx2 alone, asking
the endpoints in turn. The rounds are those of overhead.py.
"""

import argparse
import asyncio
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import tenacity
from fastapi import FastAPI
from overhead import BLOCK, ROOT, Report, Serve, added, in_turn, progress

from fastapi_hardening import Settings, harden
from fastapi_hardening.resilience.bulkhead import CallBulkhead
from fastapi_hardening.resilience.circuit_breaker import CircuitBreaker, CircuitBreakerSettings
from fastapi_hardening.resilience.retry import Retry

BUDGET_MICROSECONDS = 1.5
MOST_ERRORS_PERCENT = 0.1
CALLERS = 20
PAGE = ROOT / "docs" / "concerns" / "failover.md"


# --- what a layer adds around a call that succeeds --------------------------------------------------------------------


async def _work() -> int:
    return 7


def _calling(call: Callable[[], Awaitable[Any]]) -> Serve:
    async def serve(times: int) -> None:
        for _ in range(times):
            await call()

    return serve


async def cost(report: Report) -> None:
    """Each layer around a function that does nothing."""
    progress("cost")
    breaker = CircuitBreaker("stock")
    by_count = CircuitBreaker("stock", CircuitBreakerSettings(window="count"))
    retry = Retry("stock")
    bulkhead = CallBulkhead("stock")
    peer = tenacity.AsyncRetrying(stop=tenacity.stop_after_attempt(3), reraise=True).wraps(_work)

    async def guarded() -> None:
        async with breaker.guard():
            await _work()

    variants: Mapping[str, Serve] = {
        "the function alone": _calling(_work),
        "breaker, call()": _calling(lambda: breaker.call(_work)),
        "breaker, call(), window by count": _calling(lambda: by_count.call(_work)),
        "breaker, guard()": _calling(guarded),
        "retry, call()": _calling(lambda: retry.call(_work)),
        "bulkhead, call()": _calling(lambda: bulkhead.call(_work)),
        "tenacity's decorator": _calling(peer),
    }
    rounds = await in_turn(variants, report.seconds(10, 2))
    first, *others = variants
    rows = []
    for name in others:
        more = added(rounds, name, first)
        rows.append([name, f"{more:.2f}"])
        if name in ("breaker, call()", "retry, call()"):
            reached = more.value <= BUDGET_MICROSECONDS
            report.goal(f"{name} adds at most {BUDGET_MICROSECONDS} µs to a success", f"{more:.2f} µs", reached=reached)
    report.section("A call that succeeds", "CPU time in microseconds that a layer adds to a call that does nothing.")
    report.table("layer", "added µs", rows=rows)


# --- servers ----------------------------------------------------------------------------------------------------------


class Child(NamedTuple):
    """A server in a process of its own."""

    url: str
    process: "subprocess.Popen[bytes]"


@contextmanager
def servers(number: int) -> Iterator[list[Child]]:
    """So many servers, until the block ends."""
    children = []
    for _ in range(number):
        listening = socket.create_server(("127.0.0.1", 0))
        command = [sys.executable, Path(__file__).with_name("small_server.py"), str(listening.fileno())]
        process = subprocess.Popen(command, pass_fds=[listening.fileno()])  # noqa: S603 - a program of ours
        children.append(Child(f"http://127.0.0.1:{listening.getsockname()[1]}", process))
        listening.close()
    try:
        for child in children:
            _wait_for(child.url)
        yield children
    finally:
        for child in children:
            child.process.kill()
            child.process.wait()


def _wait_for(url: str) -> None:
    for _ in range(200):
        try:
            if httpx2.get(url, trust_env=False).status_code == 200:  # noqa: PLR2004
                return
        except httpx2.TransportError:
            time.sleep(0.05)
    raise RuntimeError(f"{url} did not come up")


def _upstream(children: Sequence[Child], **changes: Any) -> Any:
    config: dict[str, Any] = {"base_urls": [child.url for child in children]} | changes
    return harden(FastAPI(), Settings(_env_file=None, upstreams={"stock": config}))


# --- what the client adds ---------------------------------------------------------------------------------------------


async def client(report: Report) -> None:
    """Every outbound layer around a real request."""
    progress("client")
    with servers(1) as children:
        handle = _upstream(children)
        ours = handle.upstream("stock")
        async with httpx2.AsyncClient(base_url=children[0].url, trust_env=False) as bare:
            variants = {"httpx2": _calling(lambda: bare.get("/")), "upstream": _calling(lambda: ours.get("/"))}
            rounds = await in_turn(variants, report.seconds(10, 3), slice_seconds=0.02)
            more = added(rounds, "upstream", "httpx2")
        await handle.upstreams.close()
    report.section("The client", "CPU time in microseconds of the process that calls, for one small GET.")
    names = [(name, f"{sorted(rounds[name])[len(rounds[name]) // 2]:.0f}") for name in variants]
    report.table("client", "µs", rows=[*map(list, names), ["all outbound layers add", f"{more:.0f}"]])


# --- one of three dies ------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What callers saw."""

    calls: int
    errors: int
    slowest: float
    kinds: Counter[str]

    @property
    def percent(self) -> float:
        return 100 * self.errors / self.calls


async def _load(get: Callable[[], Awaitable[Any]], seconds: float, trouble: Callable[[], None]) -> Outcome:
    """So many callers, each with one call after the other; the trouble comes after a third of the time."""
    calls = errors = 0
    slowest = 0.0
    kinds: Counter[str] = Counter()
    ends = time.monotonic() + seconds

    async def caller() -> None:
        nonlocal calls, errors, slowest
        while (started := time.monotonic()) < ends:
            try:
                answer = await get()
                kind = "" if answer.status_code == 200 else str(answer.status_code)  # noqa: PLR2004
            except Exception as error:  # noqa: BLE001 - whatever it is, the user sees it
                kind = type(error).__name__
            calls += 1
            slowest = max(slowest, time.monotonic() - started)
            if kind:
                errors += 1
                kinds[kind] += 1

    async def later() -> None:
        await asyncio.sleep(seconds / 3)
        trouble()

    await asyncio.gather(later(), *(caller() for _ in range(CALLERS)))
    return Outcome(calls, errors, slowest, kinds)


def _in_turn(bare: httpx2.AsyncClient, children: Sequence[Child]) -> Callable[[], Awaitable[Any]]:
    turn = itertools.cycle([child.url for child in children])
    return lambda: bare.get(next(turn))


async def failover(report: Report) -> None:
    """One of three endpoints dies, or hangs, under load."""
    rows = []
    for trouble, number in (("kill", signal.SIGKILL), ("hang", signal.SIGSTOP)):
        for name in ("httpx2 in turn", "upstream"):
            progress(f"{trouble}, {name}")
            with servers(3) as children:
                victim = children[0].process
                end = partial(os.kill, victim.pid, number)
                if name == "upstream":
                    handle = _upstream(
                        children, total_seconds=5, attempt_seconds=0.5, connections={"connect_seconds": 0.5}
                    )
                    ours = handle.upstream("stock")
                    outcome = await _load(partial(ours.get, "/"), report.seconds(6, 3), end)
                    await handle.upstreams.close()
                    report.goal(
                        f"{trouble} one of three: under {MOST_ERRORS_PERCENT} % of the calls fail",
                        f"{outcome.percent:.3f} % of {outcome.calls}",
                        reached=outcome.percent < MOST_ERRORS_PERCENT,
                    )
                else:
                    async with httpx2.AsyncClient(trust_env=False, timeout=0.5) as bare:
                        outcome = await _load(_in_turn(bare, children), report.seconds(6, 3), end)
                kinds = ", ".join(f"{kind} {count}" for kind, count in outcome.kinds.most_common(3))
                rows.append(
                    [f"{trouble}, {name}", str(outcome.calls), str(outcome.errors), f"{outcome.percent:.3f}",
                     f"{outcome.slowest * 1000:.0f}", kinds]
                )  # fmt: skip
    report.section(
        "One of three endpoints",
        f"{CALLERS} callers, each with one GET after the other; after a third of the time one endpoint is killed or "
        "stopped. Both clients wait half a second for an answer.",
    )
    report.table("what, who", "calls", "errors", "%", "slowest ms", "kinds", rows=rows)


async def dead(report: Report) -> None:
    """How much is asked of a service that is down."""
    progress("dead")
    seconds = report.seconds(8, 4)
    calls = attempts = 0

    async def down() -> None:
        nonlocal attempts
        attempts += 1
        raise ConnectionRefusedError

    retry = Retry("stock")
    ends = time.monotonic() + seconds
    pending: set[asyncio.Task[Any]] = set()
    while time.monotonic() < ends:
        for _ in range(10):
            calls += 1
            task = asyncio.create_task(retry.call(down))
            pending.add(task)
            task.add_done_callback(lambda done: (pending.discard(done), done.exception()))
        await asyncio.sleep(0.01)
    await asyncio.gather(*pending, return_exceptions=True)
    floor = retry.settings.budget_per_second * (seconds + retry.settings.budget_seconds)
    ratio = (attempts - floor) / calls
    report.section("A dead service", "What retries add to the load on it; without a budget: 3 times the calls.")
    report.table("calls", "attempts", "times", rows=[[str(calls), str(attempts), f"{attempts / calls:.2f}"]])
    report.goal("a dead service is asked at most 1.2 times, and the floor", f"{ratio:.2f} times", reached=ratio <= 1.2)  # noqa: PLR2004


PARTS: Mapping[str, Callable[[Report], Awaitable[None]]] = {
    "cost": cost,
    "client": client,
    "failover": failover,
    "dead": dead,
}


def main() -> None:
    """Measures, and prints the report."""
    parser = argparse.ArgumentParser(prog="scripts/bench outbound", description="Calls of other services.")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and calls")
    parser.add_argument("--only", action="append", choices=PARTS, help="one part; may be repeated")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the report there")
    parser.add_argument("--docs", action="store_true", help="also put the report into docs/concerns/failover.md")
    chosen = parser.parse_args()
    report = Report(quick=chosen.quick)
    for name in chosen.only or PARTS:
        asyncio.run(PARTS[name](report))  # type: ignore[arg-type]
    print(report, end="")
    if chosen.out:
        chosen.out.write_text(f"# Calls of other services\n\n{report}", encoding="utf-8")
    if chosen.docs:
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(BLOCK.sub(lambda block: f"{block[1]}\n{report}\n{block[2]}", page), encoding="utf-8")


if __name__ == "__main__":
    main()
