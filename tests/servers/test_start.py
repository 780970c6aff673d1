"""A real server is not ready before its application is, and says so as soon as it can say anything."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.servers.conftest import COMMANDS, Start

Poll = Callable[[Callable[[], object], str], None]


@pytest.mark.parametrize("name", COMMANDS)
def test_slow_lifespan_is_not_ready_before_it_is_done(start: Start, poll: Poll, tmp_path: Path, name: str) -> None:
    """While the application's lifespan works, no probe is answered well; when it is done, all are."""
    release = tmp_path / "start"
    server = start(COMMANDS[name], ready=False, environment={"START_WHEN": str(release)})
    poll(lambda: server.has_logged("the lifespan has begun"), "it starts")
    for probe in ("/readyz", "/startupz", "/livez"):
        assert server.tries(f"GET {probe}") != 200
    release.touch()
    poll(lambda: server.tries("GET /readyz") == 200, "it is ready")
    assert server.tries("GET /startupz") == 200
    assert server.tries("GET /ok") == 200


@pytest.mark.parametrize("name", ["h11", "httptools", "hypercorn"])
def test_work_in_the_background_keeps_it_not_ready(start: Start, poll: Poll, tmp_path: Path, name: str) -> None:
    """Start-up work that goes on while the server serves keeps it not ready, though alive and answering."""
    release = tmp_path / "warm"
    server = start(COMMANDS[name], ready=False, environment={"WARM_WHEN": str(release)})
    poll(lambda: server.tries("GET /livez") == 200, "it lives")
    for probe in ("/readyz", "/startupz"):
        reply = server.ask(f"GET {probe}")
        assert reply.status == 503
        assert int(reply.one("retry-after")) >= 1
        assert b"starting" in reply.body
    assert server.tries("GET /ok") == 200
    release.touch()
    poll(lambda: server.tries("GET /readyz") == 200, "it is ready")
    assert server.tries("GET /startupz") == 200


def test_failed_start_is_an_end(start: Start) -> None:
    """An application whose start fails ends its server with an error, as without us."""
    server = start(COMMANDS["httptools"], ready=False, environment={"START_FAILS": "yes"})
    assert server.ends() != 0
    assert server.has_logged("the start failed")


def test_wrong_settings_end_the_server_with_the_sentence_that_mends_them(start: Start) -> None:
    """A misspelt variable does not start a server that is less protected than somebody thinks."""
    wrong = {"HARDENING_HEALTH__DRAIN_DELAY_SECOND": "5"}
    server = start(COMMANDS["httptools"], ready=False, environment=wrong)
    assert server.ends() != 0
    assert server.has_logged("did you mean 'drain_delay_seconds'")
