"""One client floods a real server: it is refused, told when to come back, and nobody else notices."""

import http.client
import json
import time

import pytest

from tests.servers.conftest import COMMANDS, DEADLINE_SECONDS, Reply, Server, Start, reply_of

FLOODER, OTHER = "127.0.0.1", "127.0.0.2"


class Client:
    """A client with an address of its own and one connection, which it keeps."""

    def __init__(self, server: Server, address: str) -> None:
        self._connection = http.client.HTTPConnection(
            "127.0.0.1", server.port, timeout=DEADLINE_SECONDS, source_address=(address, 0)
        )

    def get(self, path: str) -> Reply:
        """Sends a request, and reads the answer."""
        self._connection.request("GET", path)
        return reply_of(self._connection)

    def close(self) -> None:
        """Hangs up."""
        self._connection.close()


@pytest.mark.parametrize("name", ["h11", "httptools"])
def test_a_flood_is_refused_and_explained_and_others_are_served(start: Start, name: str) -> None:
    """429 problems, ``Retry-After`` right to the second, metrics and log with the id; others see only 200."""
    server = start(COMMANDS[name], environment={"HARDENING_RATE_LIMIT__DEFAULT": "20 per 20 seconds"})
    flooder, other = Client(server, FLOODER), Client(server, OTHER)
    answers: list[Reply] = []
    others: list[int] = []
    for number in range(200):
        answers.append(flooder.get("/ok"))
        if number % 20 == 0:
            others.append(other.get("/ok").status)
    refused = [answer for answer in answers if answer.status == 429]
    assert others == [200] * 10
    assert len(answers) - len(refused) <= 25
    last = refused[-1]
    problem = json.loads(last.body)
    assert problem["violated-policies"] == ["default"]
    assert last.one("retry-after") == "1"
    # The time itself is what is tested here: who waits as long as it was told passes.
    time.sleep(int(last.one("retry-after")))
    assert flooder.get("/ok").status == 200

    counted = [line for line in other.get("/metrics").body.decode().splitlines() if "hardening_refusals_total{" in line]
    assert any('layer="rate limit"' in line and 'problem="quota-exceeded"' in line for line in counted)
    assert problem["request_id"] == last.one("x-request-id")
    explained = [line for line in server.log.read_text().splitlines() if problem["request_id"] in line]
    assert any("rate limit" in line and "quota-exceeded" in line and FLOODER in line for line in explained)
    for client in (flooder, other):
        client.close()
