"""Websockets on real servers: accepted and refused with the id and the header fields, on every implementation."""

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from tests.servers.conftest import COMMANDS, DEADLINE_SECONDS, Server, Start, starter

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


# --- limits -----------------------------------------------------------------------------------------------------------


def closed(websocket: ClientConnection) -> tuple[int, str]:
    """How a websocket was closed by the server, whatever came before."""
    with suppress(ConnectionClosed):
        while True:
            websocket.recv(DEADLINE_SECONDS)
    received = websocket.protocol.close_rcvd
    assert received is not None
    return received.code, received.reason


def says(websocket: ClientConnection, text: str) -> bool:
    """Whether the server says it again."""
    websocket.send(text)
    return websocket.recv(DEADLINE_SECONDS) == text


def denied(server: Server, path: str, **headers: str) -> Any:
    """What a handshake is refused with: status, header fields and problem."""
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    with pytest.raises(InvalidStatus) as refused, connect(url(server, path), additional_headers=fields):
        pass
    response = refused.value.response
    assert response.headers["content-type"] == "application/problem+json"
    assert response.body is not None
    problem = json.loads(response.body)
    assert problem["request_id"] == response.headers["x-request-id"]
    assert response.status_code == problem["status"]
    return response.status_code, response.headers, problem


def test_a_message_that_is_too_large_is_1009(serving: Server) -> None:
    """One of the limit is answered, the next larger one ends it."""
    with connect(url(serving, "/small")) as websocket:
        assert says(websocket, "x" * 100)
        websocket.send("é" * 51)
        assert closed(websocket) == (1009, "message too large")


def test_too_many_messages_are_1008(serving: Server) -> None:
    """Those within the limit are answered first, in their order."""
    with connect(url(serving, "/few")) as websocket:
        for number in range(4):
            websocket.send(str(number))
        assert [websocket.recv(DEADLINE_SECONDS) for _ in range(3)] == ["0", "1", "2"]
        assert closed(websocket) == (1008, "too many messages")


@pytest.mark.parametrize(
    ("path", "closing"), [("/idle", (1001, "idle for too long")), ("/expiring", (3000, "credentials have expired"))]
)
def test_a_timeout_closes_while_the_endpoint_waits(serving: Server, path: str, closing: tuple[int, str]) -> None:
    """It gets a disconnect, and nothing fails."""
    failed = serving.has_logged("Traceback")
    with connect(url(serving, path)) as websocket:
        assert says(websocket, "hello")
        assert closed(websocket) == closing
    assert serving.has_logged("Traceback") == failed


def test_a_foreign_page_with_cookies_is_403(serving: Server) -> None:
    """A page of the server itself is let in, and so is a foreign one that brings nothing."""
    status, _, problem = denied(serving, "/echo", Origin="https://evil.example", Cookie="session=1")
    assert (status, problem["title"]) == (403, "Origin not allowed")
    own = {"Origin": f"http://127.0.0.1:{serving.port}", "Cookie": "session=1"}
    for headers in (own, {"Origin": "https://evil.example"}, {"Cookie": "session=1"}):
        with connect(url(serving, "/echo"), additional_headers=headers) as websocket:
            assert says(websocket, "hello")


def test_one_websocket_too_many_is_429_until_another_one_ends(
    serving: Server, poll: Callable[[Callable[[], object], str], None]
) -> None:
    """The problem says when to come back."""
    with connect(url(serving, "/single")) as websocket:
        assert says(websocket, "hello")
        status, headers, problem = denied(serving, "/single")
        assert (status, problem["violated-policies"]) == (429, ["websockets"])
        assert int(headers["retry-after"]) >= 1

    def is_let_in() -> bool:
        with suppress(InvalidStatus), connect(url(serving, "/single")) as another:
            return says(another, "hello")
        return False

    poll(is_let_in, "there is room again")


def test_a_handshake_over_the_rate_limit_is_429(serving: Server) -> None:
    """With the fields of every limited answer."""
    with connect(url(serving, "/rated")) as websocket:
        assert says(websocket, "hello")
    status, headers, problem = denied(serving, "/rated")
    assert (status, problem["type"].rpartition("#")[2]) == (429, "quota-exceeded")
    assert int(headers["retry-after"]) > 1
    assert headers["ratelimit-policy"] == '"1/hour";q=1;w=3600'


def test_a_client_that_does_not_read_loses_its_endpoint(
    serving: Server, poll: Callable[[Callable[[], object], str], None]
) -> None:
    """Which would wait for it for ever."""
    before = serving.has_logged("the pouring endpoint has ended")
    with connect(url(serving, "/pour"), max_queue=1, close_timeout=0.1):
        poll(lambda: serving.has_logged("messages are not read") > before, "the limit has noticed")
        poll(lambda: serving.has_logged("the pouring endpoint has ended") > before, "the endpoint has ended")
    assert serving.tries("GET /ok") == 200


# --- the end of the process -------------------------------------------------------------------------------------------

DELAY = {"HARDENING_HEALTH__DRAIN_DELAY_SECONDS": "1"}
# Hypercorn hears SIGTERM past the lifecycle, and closes websockets itself when its grace period ends.
DRAINING = [name for name in IMPLEMENTATIONS if name != "hypercorn"]


@pytest.mark.parametrize("path", ["/echo", "/deaf"])
@pytest.mark.parametrize("name", DRAINING)
def test_sigterm_closes_websockets_with_1012_and_the_process_ends(start: Start, name: str, path: str) -> None:
    """Whether the endpoint waits for messages or notices nothing; without a grace period of the server."""
    server = start(IMPLEMENTATIONS[name], environment=DELAY)
    with connect(url(server, path)) as websocket:
        if path == "/echo":
            assert says(websocket, "hello")
        else:
            assert websocket.recv(DEADLINE_SECONDS) == "ok"
        server.tell()
        assert closed(websocket)[0] == 1012
    assert server.ends() == -signal.SIGTERM
    assert server.has_logged("Traceback") == 0
    assert server.has_logged("the deaf endpoint has ended") == (path == "/deaf")
