"""Four worker processes and one Redis: a limit is what it says, and its death is nobody's 500."""

import http.client
import threading
from collections.abc import Callable
from typing import Self

import pytest

from tests.servers.conftest import DEADLINE_SECONDS, Server, Start, reply_of
from tests.state_server import StateServer

WORKERS = ("uvicorn", "shop:app", "--workers", "4")


class Flood:
    """Clients that send one request after another, each on a connection that it keeps."""

    def __init__(self, server: Server, clients: int) -> None:
        self.statuses: list[int] = []
        self._server = server
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._send) for _ in range(clients)]

    def _send(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._server.port, timeout=DEADLINE_SECONDS)
        while not self._stop.is_set():
            connection.request("GET", "/ok")
            self.statuses.append(reply_of(connection).status)
        connection.close()

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def environment(url: str, prefix: str, **more: str) -> dict[str, object]:
    # A budget that a busy machine does not exceed: here it is about numbers.
    return {
        "HARDENING_STATE_URL": url,
        "HARDENING_SERVICE_NAME": prefix,
        "HARDENING_STATE_BUDGET_SECONDS": "5",
        "HARDENING_ADDRESS_LIMIT__ENABLED": "false",
        **more,
    }


@pytest.mark.parametrize("strategy", ["token-bucket", "fixed-window", "sliding-window"])
def test_of_all_that_come_at_once_exactly_as_many_pass_as_the_limit_says(
    start: Start, state_url: str, prefix: str, strategy: str, poll: Callable[[Callable[[], object], str], None]
) -> None:
    """Four processes, sixteen connections; a year is long enough that no unit comes back meanwhile."""
    limits = {"HARDENING_RATE_LIMIT__DEFAULT": "150/year", "HARDENING_RATE_LIMIT__STRATEGY": strategy}
    server = start(WORKERS, environment=environment(state_url, prefix, **limits))
    poll(lambda: server.has_logged("Application startup complete") == 4, "all workers serve")
    with Flood(server, 16) as flood:
        poll(lambda: len(flood.statuses) > 600, "many more than the limit were sent")
    assert flood.statuses.count(200) == 150
    assert set(flood.statuses) == {200, 429}


def test_a_redis_that_dies_under_load_and_comes_back_costs_no_5xx_and_no_limit(
    start: Start, state_server: Callable[..., StateServer], poll: Callable[[Callable[[], object], str], None]
) -> None:
    """Five pass before, in memory each worker's share of them, five of the new life; all else is 429."""
    store = state_server()
    server = start(WORKERS, environment=environment(store.url, "shop", HARDENING_RATE_LIMIT__DEFAULT="5/year"))
    poll(lambda: server.has_logged("4 workers share the store") == 4, "all workers have counted each other")
    with Flood(server, 8) as flood:

        def many_more() -> None:
            so_far = len(flood.statuses)
            poll(lambda: len(flood.statuses) > so_far + 100, "the flood goes on")

        many_more()
        assert flood.statuses.count(200) == 5
        store.kill()
        poll(lambda: server.has_logged("is gone") >= 1, "it is noticed")
        many_more()
        assert 5 <= flood.statuses.count(200) <= 5 + 4
        store.start()
        poll(lambda: store.ask("ZCARD", "shop:workers") == 4, "all workers are back")
        many_more()
    assert set(flood.statuses) == {200, 429}
    assert 5 + 5 <= flood.statuses.count(200) <= 5 + 4 + 5
