"""Websockets of browsers: tokens in the subprotocols, tickets, and what becomes of one whose credentials end."""

import asyncio
import json
import logging
from typing import Any

import pytest
from fastapi import FastAPI, WebSocket
from starlette.requests import HTTPConnection
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.websockets import WebSocketDisconnect

from fastapi_hardening import CurrentUser
from fastapi_hardening.core.clock import ManualClock
from fastapi_hardening.core.identity import InvalidCredentials, Principal
from fastapi_hardening.core.store import MemoryStore
from fastapi_hardening.security.auth import Tickets
from fastapi_hardening.security.auth.handshake import take_credentials
from fastapi_hardening.security.auth.principals import from_members, to_members
from tests.security.auth.conftest import ANNA, Kit, Tokens, bearer


class Talk(Kit):
    """An application with a websocket that tells what it sees of its handshake."""

    def __init__(self, authenticators: Any = None, chooses: str | None = None, **settings: Any) -> None:
        self.tickets = Tickets()
        app = FastAPI()
        super().__init__(app, authenticators or [Tokens(), self.tickets], auth={"default": "required"}, **settings)
        app.include_router(self.tickets.router())

        @app.websocket("/talk")
        async def talk(websocket: WebSocket, user: CurrentUser) -> None:
            await websocket.accept(subprotocol=chooses)
            await websocket.send_json([user.id, websocket.scope["subprotocols"], str(websocket.url)])
            await websocket.send_text(str(websocket.headers))
            await websocket.close()


def offered(client: TestClient, *protocols: str) -> tuple[str | None, list[Any], str]:
    """What was agreed on, and what the application saw."""
    with client.websocket_connect("/talk", subprotocols=list(protocols)) as websocket:
        return websocket.accepted_subprotocol, websocket.receive_json(), websocket.receive_text()


# --- subprotocols -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocols", [("bearer", "anna"), ("chat", "bearer", "anna"), ("Bearer", "anna", "chat")])
def test_a_token_may_come_as_a_subprotocol(protocols: tuple[str, ...]) -> None:
    """The application does not see it, and it is not agreed on."""
    agreed, (name, seen, _), headers = offered(Talk().client(), *protocols)
    assert (agreed, name) == ("bearer", "anna")
    assert seen == [protocol for protocol in protocols if protocol != "anna"]
    assert "anna" not in headers


def test_the_application_may_choose_one() -> None:
    """Of those that were offered."""
    assert offered(Talk(chooses="chat").client(), "bearer", "anna", "chat")[0] == "chat"
    assert offered(Talk(chooses="anna").client(), "bearer", "anna", "chat")[0] == "bearer"


@pytest.mark.parametrize("protocols", [("bearer", "forged"), ("bearer",), ("chat", "bearer"), ("anna",)])
def test_a_token_that_proves_nothing_is_refused(protocols: tuple[str, ...]) -> None:
    """As one in the field is."""
    with pytest.raises(WebSocketDenialResponse) as denied:
        offered(Talk().client(), *protocols)
    assert denied.value.status_code == 401


def test_a_token_twice_is_refused() -> None:
    """Which of them counts would be anybody's guess."""
    kit = Talk()
    with (
        pytest.raises(WebSocketDenialResponse) as denied,
        kit.client().websocket_connect("/talk", subprotocols=["bearer", "anna"], headers=bearer("ben")),
    ):
        raise AssertionError("accepted")
    assert denied.value.status_code == 401


def test_no_token_is_written_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """Neither one in the subprotocols nor a ticket, whatever is logged."""
    known = {"a-long-token-of-anna": ANNA}
    log = {"request_headers": ["sec-websocket-protocol", "authorization"], "include_path": True}
    kit = Talk([Tokens(known), tickets := Tickets()], access_log=log)
    kit.app.include_router(tickets.router("/t"))
    with caplog.at_level(logging.DEBUG):
        offered(kit.client(), "bearer", "a-long-token-of-anna")
        ticket = kit.client().post("/t", headers=bearer("a-long-token-of-anna")).json()["ticket"]
        with kit.client().websocket_connect(f"/talk?room=1&ticket={ticket}") as websocket:
            assert websocket.receive_json()[2].endswith("/talk?room=1")
        with pytest.raises(WebSocketDenialResponse), kit.client().websocket_connect(f"/talk?ticket={ticket}"):
            raise AssertionError("accepted")
    text = caplog.text + str([record.__dict__ for record in caplog.records])
    assert "/talk" in text
    assert "a-long-token-of-anna" not in text
    assert ticket not in text


# --- tickets ----------------------------------------------------------------------------------------------------------


def test_a_ticket_opens_one_websocket() -> None:
    """For whoever asked for it; it is random, and no cache keeps it."""
    kit = Talk()
    client = kit.client()
    assert client.post("/websocket-ticket").status_code == 401
    answer = client.post("/websocket-ticket", headers=bearer("anna"))
    assert answer.headers["cache-control"] == "no-store"
    assert answer.json()["expires_in"] == 30
    ticket = answer.json()["ticket"]
    assert len(ticket) == 43
    with client.websocket_connect(f"/talk?ticket={ticket}") as websocket:
        assert websocket.receive_json()[0] == "anna"
    for wrong in (ticket, "unknown", "", "x" * 500, f"{ticket}&ticket=x"):
        with pytest.raises(WebSocketDenialResponse), client.websocket_connect(f"/talk?ticket={wrong}"):
            raise AssertionError("accepted")


def test_a_ticket_is_for_websockets_only() -> None:
    """In the query of a request it would be in every log."""
    kit = Talk()
    kit.app.get("/page")(lambda: "page")
    ticket = kit.client().post("/websocket-ticket", headers=bearer("anna")).json()["ticket"]
    assert kit.client().get(f"/page?ticket={ticket}").status_code == 401


def test_a_ticket_ends() -> None:
    """Soon, and with the credentials that it was made of."""
    clock = ManualClock()
    tickets = Tickets(clock=clock, store=MemoryStore(clock=clock))
    tickets.attach(store=MemoryStore(), clock=ManualClock())

    async def refused(ticket: str) -> str:
        with pytest.raises(InvalidCredentials) as error:
            await tickets.redeem(ticket)
        return error.value.reason

    async def check() -> list[str]:
        old = await tickets.issue(ANNA)
        ended = await tickets.issue(Principal("anna", expires_at=clock.time() + 10))
        clock.advance(10)
        first = await refused(ended)
        clock.advance(20)
        return [first, await refused(old)]

    assert asyncio.run(check()) == ["expired", "unknown or old ticket"]


def test_of_those_who_come_at_the_same_time_one_gets_in() -> None:
    """However the store answers."""

    class Slow(MemoryStore):
        async def get(self, key: str) -> bytes | None:
            value = await super().get(key)
            await asyncio.sleep(0)
            return value

    tickets = Tickets(store=Slow())

    async def race() -> list[Any]:
        ticket = await tickets.issue(ANNA)
        return await asyncio.gather(*(tickets.redeem(ticket) for _ in range(20)), return_exceptions=True)

    outcomes = asyncio.run(race())
    assert sum(isinstance(outcome, Principal) for outcome in outcomes) == 1
    assert sum(isinstance(outcome, InvalidCredentials) for outcome in outcomes) == 19


def test_a_store_without_room_gives_no_ticket() -> None:
    """Nor one that could not be used up."""
    full = MemoryStore(max_keys=1)
    tickets = Tickets(store=full)

    async def check() -> None:
        ticket = await tickets.issue(ANNA)
        with pytest.raises(ConnectionError):
            await tickets.issue(ANNA)
        with pytest.raises(InvalidCredentials):
            await tickets.redeem(ticket)

    asyncio.run(check())


def test_a_principal_survives_being_kept() -> None:
    """All of it."""
    whole = Principal(
        "anna",
        scheme="bearer",
        scopes=frozenset({"a", "b"}),
        roles=frozenset({"c"}),
        permissions=frozenset({"d:*"}),
        tenant="north",
        tenant_roles={"north": frozenset({"e"})},
        issuer="https://issuer.example",
        credential="7",
        expires_at=1.5,
        claims={"age": 30},
    )
    for principal in (whole, Principal("ben")):
        assert from_members(json.loads(json.dumps(to_members(principal)))) == principal


# --- the end of credentials -------------------------------------------------------------------------------------------


def test_a_websocket_is_closed_when_its_token_ends() -> None:
    """While the application waits for a message."""
    known = {"short": Principal("anna", expires_at=1_700_000_000.01)}
    kit = Talk([Tokens(known)])
    ended: list[int] = []

    @kit.app.websocket("/wait")
    async def wait(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text("hello")
        kit.clock.advance(1)
        try:
            await websocket.receive_text()
        except WebSocketDisconnect as error:
            ended.append(error.code)

    with kit.client().websocket_connect("/wait", headers=bearer("short")) as websocket:
        assert websocket.receive_text() == "hello"
        with pytest.raises(WebSocketDisconnect) as closed:
            websocket.receive_text()
    assert closed.value.code == 3000
    assert ended == [3000]


def test_a_handshake_without_credentials_is_left_as_it_is() -> None:
    """Nothing is copied."""
    scope = {"type": "websocket", "headers": [], "subprotocols": ["chat"], "query_string": b"room=1"}
    assert take_credentials(scope, {"ticket"}).connection_scope is scope
    assert take_credentials({"type": "websocket", "headers": []}).offered_token is False


def test_a_ticket_is_found_however_it_is_written() -> None:
    """Percent-encoded names too; parameters of others stay."""
    scope = {"type": "websocket", "headers": [], "query_string": b"a=1&%74icket=x&b=ticket&ticket"}
    whole = take_credentials(scope, {"ticket"}).connection_scope
    assert scope["query_string"] == b"a=1&b=ticket"
    assert b"%74icket=x" in whole["query_string"]


def test_alone_tickets_find_nothing_where_there_is_nothing() -> None:
    """They are not asked about requests, and handshakes may have none."""
    tickets = Tickets()
    for scope in ({"type": "http", "query_string": b"ticket=x"}, {"type": "websocket", "query_string": b"a=1"}):
        assert asyncio.run(tickets.authenticate(HTTPConnection({**scope, "headers": []}))) is None
