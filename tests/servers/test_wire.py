"""What comes over the wire of a real server: probes and answers under every parser, with the fields once each."""

import socket
from http.client import HTTPResponse

import pytest

from tests.servers.conftest import COMMANDS, Server, Start, reply_of

ONCE = (
    "x-request-id",
    "x-content-type-options",
    "x-frame-options",
    "content-security-policy",
    "referrer-policy",
    "permissions-policy",
    "cross-origin-opener-policy",
    "cross-origin-resource-policy",
    "content-type",
    "content-length",
)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("probe", ["/livez", "/readyz", "/startupz", "/health", "/livez?verbose"])
def test_probes_answer(serving: Server, method: str, probe: str) -> None:
    """Every probe answers 200 under every server, with the header fields, and without a body to HEAD."""
    reply = serving.ask(f"{method} {probe}")
    assert reply.status == 200
    assert reply.one("cache-control") == "no-store"
    assert (reply.body == b"") == (method == "HEAD")
    for name in ONCE:
        reply.one(name)


@pytest.mark.parametrize(
    ("asked", "status"),
    [("GET /ok", 200), ("GET /nowhere", 404), ("PUT /ok", 405), ("HEAD /ok", 405), ("GET /refused", 403)],
)
def test_answers_carry_the_fields_once(serving: Server, asked: str, status: int) -> None:
    """Answers and errors have the header fields, each in one line, and the id that was sent."""
    reply = serving.ask(asked, [("X-Request-ID", "theirs")])
    assert reply.status == status
    assert reply.one("x-request-id") == "theirs"
    assert reply.one("content-type") == ("application/json" if status == 200 else "application/problem+json")
    for name in ONCE:
        reply.one(name)


def test_connection_is_kept(serving: Server) -> None:
    """One connection carries probes, errors and answers without a body one after another, each whole."""
    connection = serving.connect()
    for method, path, status in (
        ("GET", "/livez", 200),
        ("HEAD", "/livez", 200),
        ("HEAD", "/nowhere", 404),
        ("GET", "/nowhere", 404),
        ("POST", "/ok", 405),
        ("GET", "/ok", 200),
    ):
        connection.request(method, path)
        assert reply_of(connection).status == status
        assert connection.sock is not None


def test_pipelined_requests_are_answered_in_their_order(serving: Server) -> None:
    """A probe that comes in one packet with other requests is answered in its turn."""
    parts = [b"GET /ok", b"GET /livez", b"GET /nowhere", b"HEAD /livez"]
    with socket.create_connection(("127.0.0.1", serving.port), timeout=15) as connection:
        connection.sendall(b"".join(part + b" HTTP/1.1\r\nHost: a.test\r\n\r\n" for part in parts))
        received = b""
        while received.count(b"HTTP/1.1 ") < 4 or not received.endswith(b"\r\n\r\n"):
            received += connection.recv(65536)
    assert [line[:3] for line in received.split(b"HTTP/1.1 ")[1:]] == [b"200", b"200", b"404", b"200"]


STRANGE = {
    "HTTP/1.0": b"GET /ok HTTP/1.0\r\nHost: a.test\r\n\r\n",
    "a whole URL": b"GET http://a.test/ok HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n",
    "an unknown method": b"FOO /ok HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n",
    "an asterisk": b"OPTIONS * HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n",
    "two slashes": b"GET //livez HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n",
    "an encoded path": b"GET /%6C%69vez HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n",
    "an encoded line break": b"GET /ok%0A HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n",
    "an encoded null": b"GET /%00 HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n",
    "bytes that are no text": b"GET /%FF%FE HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n",
    "a field of bytes": b"GET /ok HTTP/1.1\r\nHost: a.test\r\nX-Request-ID: \xff\xfe\r\nConnection: close\r\n\r\n",
    "two ids": b"GET /ok HTTP/1.1\r\nHost: a.test\r\nX-Request-ID: a\r\nX-Request-ID: b\r\nConnection: close\r\n\r\n",
    "strange hops": b"GET /ok HTTP/1.1\r\nHost: a.test\r\nX-Forwarded-For: \xff,,;\r\nConnection: close\r\n\r\n",
    "no host": b"GET /ok HTTP/1.1\r\nConnection: close\r\n\r\n",
}


@pytest.mark.parametrize("line", STRANGE)
def test_strange_request_is_answered(serving: Server, line: str) -> None:
    """Whatever a parser lets through is answered with the fields and never by a 500; the rest is the parser's 400."""
    with socket.create_connection(("127.0.0.1", serving.port), timeout=15) as connection:
        connection.sendall(STRANGE[line])
        response = HTTPResponse(connection)
        response.begin()
        body = response.read()
    fields = [name.lower() for name, _ in response.getheaders()]
    assert response.status < 500, body
    if fields.count("x-request-id") != 1:
        assert response.status == 400, (response.status, fields)
    else:
        assert fields.count("x-content-type-options") == 1


@pytest.mark.parametrize(
    ("name", "client"),
    # Hypercorn tells of neither side of the socket.
    [("h11", b"unix"), ("httptools", b"unix"), ("hypercorn", b"unknown")],
)
def test_peer_on_a_unix_socket_is_known(start: Start, name: str, client: bytes) -> None:
    """On a Unix socket, where the peer has no address, the client is called unix, and probes answer."""
    server = start(COMMANDS[name], unix=True)
    reply = server.ask("GET /ok")
    assert reply.status == 200
    assert b'"client":"%s"' % client in reply.body
    assert server.ask("GET /health").status == 200


def test_both_workers_serve(start: Start) -> None:
    """Each of two workers is hardened by itself, and answers with an id of its own making."""
    server = start(COMMANDS["workers"])
    answers = [server.ask("GET /ok") for _ in range(40)]
    assert len({reply.body for reply in answers}) == 2
    assert len({reply.one("x-request-id") for reply in answers}) == 40


def test_server_keeps_its_name_for_itself_if_it_is_told_to(start: Start) -> None:
    """With uvicorn's ``--no-server-header`` no answer says what serves, since the application's fields are removed."""
    server = start(COMMANDS["httptools"], "--no-server-header")
    for asked in ("GET /ok", "GET /livez", "GET /nowhere"):
        assert server.ask(asked).all("server") == []


def test_root_path_of_the_server(start: Start) -> None:
    """Under ``uvicorn --root-path``, behind a proxy that strips the prefix, probes and routes answer."""
    server = start(COMMANDS["httptools"], "--root-path", "/shop")
    for path, status in (("/ok", 200), ("/livez", 200), ("/nowhere", 404)):
        reply = server.ask(f"GET {path}")
        assert reply.status == status
        reply.one("x-request-id")
