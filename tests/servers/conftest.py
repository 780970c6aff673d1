"""What the tests of real servers share: how one is started, asked, told to end, and cleared away."""

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import pytest

import fastapi_hardening

HERE = Path(__file__).parent
DEADLINE_SECONDS = 30.0  # for a machine that does something else as well; nothing waits for all of it

UVICORN = ("uvicorn", "shop:app")
COMMANDS: dict[str, tuple[str, ...]] = {
    "h11": (*UVICORN, "--http", "h11"),
    "httptools": (*UVICORN, "--http", "httptools"),
    "workers": (*UVICORN, "--workers", "2"),
    "hypercorn": ("hypercorn", "shop:app", "--graceful-timeout", "10"),
}


@dataclass
class Reply:
    """An answer as it came over the wire."""

    status: int
    fields: list[tuple[str, str]]
    body: bytes

    def all(self, name: str) -> list[str]:
        """Every value of a header field."""
        return [value for key, value in self.fields if key.lower() == name]

    def one(self, name: str) -> str:
        """The value of a header field that must be there exactly once."""
        values = self.all(name)
        assert len(values) == 1, (name, self.fields)
        return values[0]


class UnixConnection(http.client.HTTPConnection):
    """A connection to a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=DEADLINE_SECONDS)
        self._path = path

    def connect(self) -> None:
        """Connects to the socket's file."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class Held:
    """A request in flight: the server has its beginning, and waits for its end."""

    def __init__(self, connection: http.client.HTTPConnection, name: str) -> None:
        self.name = name
        self._connection = connection
        connection.putrequest("POST", f"/held/{name}")
        connection.putheader("Content-Length", "5")
        connection.endheaders(b"12")

    def finish(self) -> Reply:
        """Sends the rest, and gives the answer."""
        self._connection.send(b"345")
        reply = reply_of(self._connection)
        self._connection.close()
        return reply


@dataclass
class Server:
    """A server in a process of its own."""

    process: subprocess.Popen[bytes]
    log: Path
    port: int
    unix: Path | None = None
    _open: list[http.client.HTTPConnection] = field(default_factory=list)

    def connect(self) -> http.client.HTTPConnection:
        """Opens a new connection, which the teardown closes at the latest."""
        if self.unix is not None:
            connection: http.client.HTTPConnection = UnixConnection(self.unix)
        else:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE_SECONDS)
        self._open.append(connection)
        return connection

    def ask(
        self, asked: str, headers: Sequence[tuple[str, str]] = (), *, timeout_seconds: float = DEADLINE_SECONDS
    ) -> Reply:
        """Sends a request on a new connection."""
        connection = self.connect()
        connection.timeout = timeout_seconds
        method, _, path = asked.partition(" ")
        connection.request(method, path, headers=dict(headers))
        reply = reply_of(connection)
        connection.close()
        return reply

    def tries(self, asked: str) -> int | None:
        """The status of an answer, or ``None`` if there is no server that answers."""
        try:
            return self.ask(asked, timeout_seconds=1).status
        except OSError:
            return None

    def hold(self, *names: str) -> list[Held]:
        """Puts requests in flight; returns when the endpoint has all of them."""
        requests = [Held(self.connect(), name) for name in names]
        arrived: set[str] = set()

        def all_arrived() -> bool:
            body = self.ask("GET /held").body.decode()
            arrived.update(name for name in names if f'"{name}"' in body)
            return len(arrived) == len(names)

        until(all_arrived, f"{names} are in flight")
        return requests

    def tell(self, number: signal.Signals = signal.SIGTERM, *, everybody: bool = False) -> None:
        """Sends a signal to the process that was started; to those that it has started only if it is for everybody."""
        if everybody and self.process.poll() is None:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)

    def has_logged(self, text: str) -> int:
        """How often a text stands in what the server has written."""
        return self.log.read_text(errors="replace").count(text)

    def ends(self) -> int:
        """Waits for the end of the process; gives its exit code."""
        return self.process.wait(DEADLINE_SECONDS)

    def clear_away(self) -> None:
        """Ends every process of the server, and closes every connection to it."""
        for connection in self._open:
            connection.close()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(DEADLINE_SECONDS)


class Start(Protocol):
    """Starts a server."""

    def __call__(
        self,
        command: Sequence[str],
        *options: str,
        ready: bool = True,
        unix: bool = False,
        environment: Mapping[str, object] | None = None,
    ) -> Server: ...


def reply_of(connection: http.client.HTTPConnection) -> Reply:
    """Reads the answer to what was sent on a connection."""
    response = connection.getresponse()
    return Reply(response.status, response.getheaders(), response.read())


def until(holds: Callable[[], object], what: str, deadline_seconds: float = DEADLINE_SECONDS) -> None:
    """Polls until something holds; fails when the deadline has passed."""
    ends = time.monotonic() + deadline_seconds
    while not holds():
        assert time.monotonic() < ends, f"not within {deadline_seconds:g} s: {what}"
        time.sleep(0.01)


def is_ready(server: Server, command: Sequence[str]) -> bool:
    """Whether every process of a server serves; the probe is answered by any one."""
    started = server.has_logged("Application startup complete") >= (2 if "2" in command else 1)
    return (started or command[0] != "uvicorn") and server.tries("GET /readyz") == 200


def starter(folder: Path) -> Iterator[Start]:
    """Gives a function that starts servers; ends them all afterwards."""
    servers: list[Server] = []

    def start(
        command: Sequence[str],
        *options: str,
        ready: bool = True,
        unix: bool = False,
        environment: Mapping[str, object] | None = None,
    ) -> Server:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        number = len(servers)
        path, log = folder / f"{number}.sock", folder / f"{number}.log"
        if command[0] == "uvicorn":
            where = ["--uds", str(path)] if unix else ["--host", "127.0.0.1", "--port", str(port)]
        else:
            where = ["--bind", f"unix:{path}" if unix else f"127.0.0.1:{port}"]
        root = Path(fastapi_hardening.__file__).parent.parent
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("HARDENING_")}
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", *command, *where, *options],
                cwd=folder,
                env={
                    **inherited,
                    "PYTHONPATH": os.pathsep.join((str(HERE), str(root))),
                    **{key: str(value) for key, value in (environment or {}).items()},
                },
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        server = Server(process, log, port, path if unix else None)
        servers.append(server)
        if ready:
            until(lambda: process.poll() is not None or is_ready(server, command), "the server is ready")
            assert process.poll() is None, log.read_text()
        return server

    yield start
    for server in servers:
        server.clear_away()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Give a function that starts a server for one test."""
    yield from starter(tmp_path)


@pytest.fixture(scope="module", params=COMMANDS)
def serving(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Give a server of each kind, for tests that leave it as it was."""
    for start in starter(tmp_path_factory.mktemp("serving")):
        yield start(COMMANDS[request.param])


@pytest.fixture
def poll() -> Callable[[Callable[[], object], str], None]:
    """Give the function that polls until something holds."""
    return until
