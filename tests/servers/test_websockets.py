"""Websockets on real servers: accepted and refused with the id and the header fields, on every implementation."""

from collections.abc import Iterator

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from tests.servers.conftest import COMMANDS, Server, starter

IMPLEMENTATIONS = {
    "websockets": (*COMMANDS["httptools"], "--ws", "websockets"),
    "websockets-sansio": (*COMMANDS["httptools"], "--ws", "websockets-sansio"),
    "wsproto": (*COMMANDS["h11"], "--ws", "wsproto"),
    "hypercorn": COMMANDS["hypercorn"],
}


@pytest.fixture(scope="module", params=IMPLEMENTATIONS)
def serving(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Give a server with each implementation of websockets."""
    for start in starter(tmp_path_factory.mktemp("websockets")):
        yield start(IMPLEMENTATIONS[request.param])


def url(server: Server, path: str) -> str:
    """Where a websocket is."""
    return f"ws://127.0.0.1:{server.port}{path}"


@pytest.mark.parametrize("path", ["/echo", "/number/7"])
def test_acceptance_carries_the_fields_once(serving: Server, path: str) -> None:
    """An accepted handshake has the id that was sent and the header fields, each once."""
    with connect(url(serving, path), additional_headers={"X-Request-ID": "theirs"}) as websocket:
        assert websocket.response is not None
        assert websocket.response.headers.get_all("x-request-id") == ["theirs"]
        assert websocket.response.headers.get_all("x-content-type-options") == ["nosniff"]
        if path == "/echo":
            websocket.send("hello")
            assert websocket.recv(5) == "hello"
        else:
            assert websocket.recv(5) == "7"


@pytest.mark.parametrize(("path", "status"), [("/refused", 403), ("/number/x", 422), ("/boom", 500)])
def test_refusal_is_a_problem(serving: Server, path: str, status: int) -> None:
    """A handshake that is not accepted gets an HTTP answer: the problem, with the id and the header fields."""
    with pytest.raises(InvalidStatus) as refused, connect(url(serving, path)):
        pass
    response = refused.value.response
    assert response.status_code == status
    assert response.headers.get_all("content-type") == ["application/problem+json"]
    (request_id,) = response.headers.get_all("x-request-id")
    assert response.headers.get_all("x-content-type-options") == ["nosniff"]
    assert response.body is not None
    assert request_id.encode() in response.body
    assert b"secret" not in response.body


@pytest.mark.parametrize("path", ["/nowhere", "/ok"])
def test_path_without_a_websocket_is_refused(serving: Server, path: str) -> None:
    """Where there is no websocket the server itself refuses, and goes on serving."""
    with pytest.raises((InvalidStatus, ConnectionClosed)), connect(url(serving, path)) as websocket:
        websocket.recv(5)
    assert serving.ask("GET /ok").status == 200


def test_open_websocket_does_not_keep_the_server_unready(serving: Server) -> None:
    """While a websocket is open, probes and requests are answered as ever."""
    with connect(url(serving, "/echo")):
        assert serving.tries("GET /readyz") == 200
        assert serving.tries("GET /ok") == 200
