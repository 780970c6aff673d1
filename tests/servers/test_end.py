"""A real server that is told to end loses no request, and tells everybody in time that it ends."""

import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.servers.conftest import COMMANDS, Start

DELAY = {"HARDENING_HEALTH__DRAIN_DELAY_SECONDS": "1"}
LONG_DELAY = {"HARDENING_HEALTH__DRAIN_DELAY_SECONDS": "60", "HARDENING_HEALTH__DRAIN_DEADLINE_SECONDS": "60"}
UNLIMITED = {"HARDENING_RATE_LIMIT__ENABLED": "false", "HARDENING_ADDRESS_LIMIT__ENABLED": "false"}

Poll = Callable[[Callable[[], object], str], None]
UVICORNS = ["h11", "httptools", "workers"]


def processes_of(name: str) -> int:
    """How many processes serve."""
    return 2 if name == "workers" else 1


def exit_code_of(name: str) -> int:
    """What the server exits with after a clean end by SIGTERM: uvicorn alone raises the signal again at last."""
    return -signal.SIGTERM if name in ("h11", "httptools") else 0


def shut_down(folder: Path) -> int:
    """In how many processes the application has shut down."""
    return len([path for path in folder.iterdir() if path.name.isdecimal()])


@pytest.mark.parametrize("everybody", [False, True], ids=["its process", "its process group"])
@pytest.mark.parametrize("name", UVICORNS)
def test_no_request_in_flight_is_lost(start: Start, poll: Poll, tmp_path: Path, *, name: str, everybody: bool) -> None:
    """After SIGTERM the server is not ready but serves for the delay, then finishes what it has, and ends cleanly.

    Service managers send the signal to a whole process group, so that a worker hears it from its supervisor, too.
    """
    server = start(COMMANDS[name], environment=DELAY | {"SHUT_DOWN": str(tmp_path)})
    held = server.hold("a", "b", "c")
    told = time.monotonic()
    server.tell(everybody=everybody)
    poll(lambda: server.tries("GET /readyz") == 503, "it is not ready any more")
    assert server.tries("GET /ok") == 200
    assert server.tries("GET /livez") == 200
    assert server.process.poll() is None
    poll(lambda: server.has_logged("Shutting down") == processes_of(name), "the server itself shuts down")
    assert time.monotonic() - told >= 1
    for request in held:
        assert request.finish().body == b"5"
    assert server.ends() == exit_code_of(name)
    assert server.has_logged("Traceback") == 0
    assert shut_down(tmp_path) == processes_of(name)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_hypercorn_loses_no_request_in_flight(start: Start, poll: Poll, tmp_path: Path, workers: str) -> None:
    """Hypercorn hears SIGTERM at once and closes its door, but finishes what it has, and ends cleanly."""
    server = start(COMMANDS["hypercorn"], "--workers", workers, environment=DELAY | {"SHUT_DOWN": str(tmp_path)})
    held = server.hold("a", "b", "c")
    server.tell()
    poll(lambda: server.tries("GET /ok") is None, "it takes no new connections")
    for request in held:
        assert request.finish().body == b"5"
    assert server.ends() == exit_code_of("hypercorn")
    assert server.has_logged("Traceback") == 0
    assert shut_down(tmp_path) == 1


@pytest.mark.parametrize("name", UVICORNS)
def test_every_answer_of_a_draining_server_closes_its_connection(start: Start, poll: Poll, name: str) -> None:
    """Once the server is not ready, every answer asks for a new connection, also to requests from before."""
    server = start(COMMANDS[name], environment=LONG_DELAY)
    kept, held = server.connect(), server.hold("a", "b")
    kept.request("GET", "/ok")
    before = kept.getresponse()
    before.read()
    assert before.getheader("connection") is None
    server.tell()
    poll(lambda: server.has_logged("draining: ") == processes_of(name), "every process drains")
    for asked in ("GET /ok", "GET /nowhere", "GET /readyz", "GET /livez"):
        assert server.ask(asked).one("connection").lower() == "close"
    kept.request("GET", "/ok")
    after = kept.getresponse()
    assert (after.status, after.getheader("connection")) == (200, "close")
    after.read()
    for request in held:
        assert request.finish().one("connection").lower() == "close"


@pytest.mark.parametrize("name", UVICORNS)
def test_no_request_is_lost_under_load(start: Start, poll: Poll, name: str) -> None:
    """Clients that keep asking into the delay, on kept and on new connections, get every answer."""
    server = start(COMMANDS[name], environment=UNLIMITED | {"HARDENING_HEALTH__DRAIN_DELAY_SECONDS": "2"})
    statuses: list[int] = []
    failures: list[BaseException] = []
    stop = threading.Event()

    def keep_asking(*, new: bool) -> None:
        connection = server.connect()
        try:
            while not stop.is_set():
                connection.request("GET", "/ok")
                response = connection.getresponse()
                response.read()
                statuses.append(response.status)
                if new:
                    connection.close()
        except OSError as failure:
            failures.append(failure)
        finally:
            connection.close()

    clients = [threading.Thread(target=keep_asking, kwargs={"new": number % 2 == 0}) for number in range(6)]
    for client in clients:
        client.start()
    poll(lambda: len(statuses) > 50, "the load is there")
    server.tell()
    told = time.monotonic()
    poll(lambda: server.tries("GET /readyz") == 503, "it is not ready any more")
    before = len(statuses)
    poll(lambda: time.monotonic() > told + 1, "the delay is half over")
    stop.set()
    for client in clients:
        client.join(10)
    assert failures == []
    assert len(statuses) > before + 10
    assert set(statuses) == {200}
    assert server.ends() == exit_code_of(name)


@pytest.mark.parametrize("name", UVICORNS)
def test_second_sigterm_ends_at_once(start: Start, poll: Poll, tmp_path: Path, name: str) -> None:
    """Who sends SIGTERM again does not wait for the delay, and the application still shuts down."""
    server = start(COMMANDS[name], environment=LONG_DELAY | {"SHUT_DOWN": str(tmp_path)})
    server.tell()
    poll(lambda: server.has_logged("draining: ") == processes_of(name), "every process drains")

    def ends_when_told_again() -> bool:
        # Uvicorn's supervisor passes on the first signal only.
        server.tell(everybody=name == "workers")
        try:
            server.process.wait(0.5)
        except subprocess.TimeoutExpired:
            return False
        return True

    poll(ends_when_told_again, "it ends")
    assert server.ends() == exit_code_of(name)
    assert shut_down(tmp_path) == processes_of(name)


@pytest.mark.parametrize("name", COMMANDS)
def test_without_a_delay_sigterm_ends_at_once(start: Start, name: str) -> None:
    """In development, where the delay is nought, SIGTERM ends the server as if it were not hardened."""
    server = start(COMMANDS[name], environment={"HARDENING_ENVIRONMENT": "development"})
    server.tell()
    assert server.ends() == exit_code_of(name)


def test_interrupt_is_not_delayed(start: Start) -> None:
    """Ctrl-C is a person who waits: it ends the server at once."""
    server = start(COMMANDS["httptools"], environment=LONG_DELAY)
    server.tell(signal.SIGINT)
    server.ends()
    assert server.has_logged("Application shutdown complete") == 1


@pytest.mark.parametrize("name", ["h11", "httptools"])
def test_sigterm_while_it_starts_is_not_lost(start: Start, poll: Poll, tmp_path: Path, name: str) -> None:
    """A server that is told to end before it has started ends after it has."""
    release = tmp_path / "start"
    server = start(COMMANDS[name], ready=False, environment=DELAY | {"START_WHEN": str(release)})
    poll(lambda: server.has_logged("Waiting for application startup"), "it starts")
    server.tell()
    release.touch()
    assert server.ends() == exit_code_of(name)
    assert server.has_logged("Application shutdown complete") == 1
