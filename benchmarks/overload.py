"""Prints what becomes of a server that is asked for three times as much as it can do, with load shedding and without.

    scripts/bench overload                       two kinds of work, in under a minute
    scripts/bench overload --only threads        one of them: cpu, mixed, threads

The server is uvicorn in a process of its own, with the whole default stack but for the limits by client. Requests are
sent whether the ones before were answered or not (an open loop, as the world sends them), at random times, and a client
gives up after two seconds. Goodput is what is answered with 200 within that time.
"""

import argparse
import asyncio
import contextlib
import hashlib
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PATIENCE_SECONDS = 2.0
WARM_UP_SECONDS = 4.0
WORK = {
    "cpu": "5 ms of computing",
    "mixed": "waits 20 ms, computes 2 ms",
    "threads": "waits 100 ms in one of 40 threads",
}
DEFAULT = ("cpu", "mixed")


# --- the server -------------------------------------------------------------------------------------------------------


def compute(seconds: float) -> None:
    """Keeps the processor busy."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        hashlib.sha256(b"x" * 10_000).digest()


def serve(port: int, *, sheds: bool) -> None:
    """Serves the three kinds of work."""
    import uvicorn  # noqa: PLC0415 - only the server needs them
    from fastapi import FastAPI  # noqa: PLC0415

    from fastapi_hardening import Settings, harden  # noqa: PLC0415

    app = FastAPI()

    @app.get("/cpu")
    async def cpu() -> str:
        compute(0.005)
        return "done"

    @app.get("/mixed")
    async def mixed() -> str:
        await asyncio.sleep(0.02)
        compute(0.002)
        return "done"

    @app.get("/threads")
    def threads() -> str:
        time.sleep(0.1)
        return "done"

    off = {"enabled": False}
    harden(app, Settings(rate_limit=off, address_limit=off, load_shedding={"enabled": sheds}))
    uvicorn.run(app, port=port, log_level="critical", access_log=False)


# --- the clients ------------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    """What became of a round.

    Attributes:
        offered: How many requests were sent in a second.
        goodput: How many were answered with 200 in a second.
        p50: The median of their times, in milliseconds.
        p99: The 99th percentile.
        refused: The share that was answered with 503.
        lost: The share that had no answer in time.
        probes: How many of the probes were answered with 200.
        probe_ms: How long the slowest probe took.
        core: What the server had of a processor; on a machine that does something else as well, a goodput says only
            with it how good it is.
    """

    offered: float
    goodput: float
    p50: float
    p99: float
    refused: float
    lost: float
    probes: str
    probe_ms: float
    core: float


class Clients:
    """Many clients of one server, which keep their connections."""

    def __init__(self, port: int, path: str, server: int) -> None:
        self._port = port
        self._stat = Path(f"/proc/{server}/stat")
        self._free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self.request = f"GET /{path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        self.probe = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"

    async def ask(self, request: bytes) -> tuple[int, float]:
        """The status, 0 for none in time, and how long it took in milliseconds."""
        began = time.perf_counter()
        status = 0
        with contextlib.suppress(TimeoutError, OSError, asyncio.IncompleteReadError):
            async with asyncio.timeout(PATIENCE_SECONDS):
                status = await self._exchange(request)
        return status, (time.perf_counter() - began) * 1000

    async def _exchange(self, request: bytes) -> int:
        reader, writer = self._free.pop() if self._free else await asyncio.open_connection("127.0.0.1", self._port)
        try:
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            _, found, rest = head.partition(b"content-length: ")
            if found:
                await reader.readexactly(int(rest.partition(b"\r")[0]))
        except BaseException:
            writer.close()
            raise
        self._free.append((reader, writer))
        return int(head.split(b" ", 2)[1])

    def used(self) -> float:
        """The seconds of a processor that the server has had."""
        try:
            fields = self._stat.read_text(encoding="ascii").rpartition(")")[2].split()
        except OSError:  # not on Linux
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    async def peak(self, seconds: float) -> float:
        """How many requests a second are done by clients that wait for their answer."""
        done = 0
        end = time.perf_counter() + seconds

        async def client() -> None:
            nonlocal done
            while time.perf_counter() < end:
                status, _ = await self.ask(self.request)
                done += status == 200  # noqa: PLR2004

        # Enough to keep every thread busy, and no queue to speak of for the event loop.
        await asyncio.gather(*(client() for _ in range(48 if b"threads" in self.request else 12)))
        return done / seconds

    async def round(self, rate: float, seconds: float) -> Result:
        """Sends at a rate, at random times, whatever becomes of it; the first second is not counted."""
        dice = random.Random(7)  # noqa: S311
        asked: list[asyncio.Task[tuple[int, float]]] = []
        probes: list[asyncio.Task[tuple[int, float]]] = []
        used = self.used()
        began = at = probe_at = time.perf_counter()
        while at < began + WARM_UP_SECONDS + seconds:
            await asyncio.sleep(max(0.0, at - time.perf_counter()))
            task = asyncio.create_task(self.ask(self.request))
            if at >= began + WARM_UP_SECONDS:
                used = used if asked else self.used()
                asked.append(task)
                if at >= probe_at:
                    probe_at = at + 0.1
                    probes.append(asyncio.create_task(self.ask(self.probe)))
            at += dice.expovariate(rate)
        used = self.used() - used
        answers = await asyncio.gather(*asked)
        probed = await asyncio.gather(*probes)
        times = sorted(ms for status, ms in answers if status == 200) or [float("nan")]  # noqa: PLR2004
        number = len(answers)
        return Result(
            number / seconds,
            sum(status == 200 for status, _ in answers) / seconds,  # noqa: PLR2004
            times[len(times) // 2],
            times[int(len(times) * 0.99)],
            sum(status == 503 for status, _ in answers) / number,  # noqa: PLR2004
            sum(status == 0 for status, _ in answers) / number,
            f"{sum(status == 200 for status, _ in probed)}/{len(probed)}",  # noqa: PLR2004
            max(ms for _, ms in probed),
            used / seconds,
        )


async def measure(
    port: int, work: str, seconds: float, peak: float, server: int
) -> tuple[float, list[tuple[str, Result]]]:
    """The peak, unless it is known, and the rounds: nearly idle, at the peak, at three times as much."""
    if not peak:
        await Clients(port, work, server).peak(0.5)
        peak = await Clients(port, work, server).peak(2.0)
    rounds = [("0.2x", 0.2), ("1x", 1.0), ("3x", 3.0)]
    return peak, [(name, await Clients(port, work, server).round(peak * factor, seconds)) for name, factor in rounds]


def main() -> None:
    """Starts the servers one after another, and prints what their clients saw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=WORK, action="append", help="one kind of work; may be repeated")
    parser.add_argument("--seconds", type=float, default=2.5, help="how long a round is counted")
    parser.add_argument("--peak", type=float, default=0.0, help="the peak if it is known; then only with load shedding")
    parser.add_argument("--serve", nargs=2, metavar=("PORT", "SHEDS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(int(options.serve[0]), sheds=options.serve[1] == "True")
        return
    head = "work, shedding, load, offered/s, goodput/s, of peak, p50 ms, p99 ms, 503, lost, probes, slowest ms, core"
    print(f"| {head.replace(', ', ' | ')} |")
    print("|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for work in options.only or DEFAULT:
        peak = options.peak
        for sheds in (True,) if peak else (False, True):
            with socket.create_server(("127.0.0.1", 0)) as listening:
                port = listening.getsockname()[1]
            command = [sys.executable, __file__, "--serve", str(port), str(sheds)]
            server = subprocess.Popen(command, stdout=subprocess.DEVNULL)  # noqa: S603 - ourselves
            try:
                while True:
                    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                        break
                    time.sleep(0.05)
                peak, rounds = asyncio.run(measure(port, work, options.seconds, peak, server.pid))
            finally:
                server.kill()
                server.wait()
            for name, each in rounds:
                cells = (
                    f"{WORK[work]} | {'on' if sheds else 'off'} | {name} | {each.offered:.0f} | {each.goodput:.0f} | "
                    f"{each.goodput / peak:.0%} | {each.p50:.0f} | {each.p99:.0f} | {each.refused:.0%} | "
                    f"{each.lost:.0%} | {each.probes} | {each.probe_ms:.0f} | {each.core:.0%}"
                )
                print(f"| {cells} |", flush=True)


if __name__ == "__main__":
    main()
