"""What every test relies on: no settings of the machine it runs on, and a real server for shared state."""

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.effort import EFFORT
from tests.state_server import StateServer

# How long an example takes says what else the machine does.
hypothesis.settings.register_profile("suite", deadline=None, max_examples=50 * EFFORT)
hypothesis.settings.load_profile("suite")


@pytest.fixture(autouse=True)
def no_settings_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes every ``HARDENING_`` variable away; a test that needs one sets it."""
    for name in os.environ:
        if name.upper().startswith("HARDENING_"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def state_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Give the URL of a Redis or Valkey that all tests share: ``REDIS_URL``, or a server that is started for them."""
    if url := os.environ.get("REDIS_URL"):
        yield url
        return
    server = StateServer(tmp_path_factory.mktemp("state")).start()
    yield server.url
    server.kill()


@pytest.fixture
def prefix() -> str:
    """Give a test keys of its own on the server that all share."""
    return f"test-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def state_server(tmp_path: Path) -> Iterator[Callable[..., StateServer]]:
    """Give a function that starts a server for one test, which may kill it."""
    servers: list[StateServer] = []

    def start(*options: str, port: int | None = None) -> StateServer:
        servers.append(StateServer(tmp_path, *options, port=port))
        return servers[-1].start()

    yield start
    for server in servers:
        server.kill()
