"""Authentication on real servers: what browsers send with a handshake, what is closed, what the logs say."""

import json
from collections.abc import Iterator

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

from tests.servers.conftest import COMMANDS, Server, starter, until

IMPLEMENTATIONS = {
    "websockets": (*COMMANDS["httptools"], "--ws", "websockets"),
    "websockets-sansio": (*COMMANDS["httptools"], "--ws", "websockets-sansio"),
    "wsproto": (*COMMANDS["h11"], "--ws", "wsproto"),
    "hypercorn": COMMANDS["hypercorn"],
}
MEMBER = "a-secret-token-of-a-member"
GUEST = "a-secret-token-of-a-guest"


@pytest.fixture(scope="module", params=IMPLEMENTATIONS)
def serving(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Give a server of the closed application with each implementation of websockets."""
    command = tuple("club:app" if part == "shop:app" else part for part in IMPLEMENTATIONS[request.param])
    for start in starter(tmp_path_factory.mktemp("authentication")):
        yield start(command)


def url(server: Server, path: str) -> str:
    """Where a websocket is."""
    return f"ws://127.0.0.1:{server.port}{path}"


def protocols(token: str) -> list[Subprotocol]:
    """What a page offers."""
    return [Subprotocol("bearer"), Subprotocol(token)]


def listen(websocket: ClientConnection) -> None:
    """Takes whatever comes."""
    while True:
        websocket.recv(5)


def test_everything_is_closed(serving: Server) -> None:
    """Requests and handshakes; the probes are not."""
    for asked in ("GET /", "GET /docs", "POST /ticket"):
        refused = serving.ask(asked)
        assert (refused.status, refused.one("www-authenticate")) == (401, "Bearer")
    assert serving.ask("GET /livez").status == 200
    for path in ("/talk", "/nowhere", "/talk?ticket=unknown"):
        with pytest.raises(InvalidStatus) as denied, connect(url(serving, path)):
            pass
        assert denied.value.response.status_code == 401
        assert denied.value.response.headers["www-authenticate"].startswith("Bearer")


def test_a_token_comes_as_a_subprotocol_and_is_in_no_log(serving: Server) -> None:
    """It is not agreed on, and a browser gets one of those that it offered."""
    with connect(url(serving, "/talk"), subprotocols=protocols(MEMBER)) as websocket:
        assert websocket.recv(5) == "member"
        assert websocket.subprotocol == "bearer"
    with pytest.raises(InvalidStatus), connect(url(serving, "/talk"), subprotocols=protocols("forged-token")):
        pass
    assert serving.has_logged(MEMBER) == 0
    assert serving.has_logged("forged-token") == 0


def test_a_ticket_opens_one_websocket_and_is_in_no_log(serving: Server) -> None:
    """Neither in ours nor in the server's own, of the handshake that is accepted."""
    reply = serving.ask("POST /ticket", [("Authorization", f"Bearer {MEMBER}"), ("Content-Length", "0")])
    ticket = json.loads(reply.body)["ticket"]
    with connect(url(serving, f"/talk?ticket={ticket}")) as websocket:
        assert websocket.recv(5) == "member"
    with pytest.raises(InvalidStatus), connect(url(serving, f"/talk?ticket={ticket}")):
        pass
    assert serving.has_logged(ticket) == 0


def test_an_open_websocket_ends_with_its_token(serving: Server) -> None:
    """Whether the application waits for a message or only sends."""
    for path, said in (("/talk", "guest is gone"), ("/tick", "guest hears no more")):
        with connect(url(serving, path), additional_headers={"Authorization": f"Bearer {GUEST}"}) as websocket:
            assert websocket.recv(5) == "guest"
            with pytest.raises(ConnectionClosed) as closed:
                listen(websocket)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 3000
        until(lambda said=said: serving.has_logged(said) > 0, said)  # type: ignore[misc]
    assert serving.has_logged("Traceback") == 0
