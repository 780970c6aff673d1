"""A request that is sent twice is carried out once, and answered twice."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, HTTPException, Request
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.security import HTTPBearer
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_hardening import Idempotent, Principal, Priority, Problem, RequireUser, Settings, harden
from fastapi_hardening.api.idempotency import (
    Full,
    IdempotencyKeyMalformed,
    IdempotencyMiddleware,
    IdempotencySettings,
    Ledger,
    LocalRecords,
    Record,
    RequestReplayed,
    key_in,
)
from fastapi_hardening.core.clock import ManualClock
from fastapi_hardening.core.events import Events
from fastapi_hardening.core.redis_store import RedisStore
from fastapi_hardening.core.store import MemoryStore, StoreUnavailable
from fastapi_hardening.security.auth import Authorize

KEY = {"Idempotency-Key": '"8e03978e-40d5-43e8-bc93-6894a57f9324"'}


class ByName:
    """Takes the name of the caller from a field."""

    scheme = "bearer"
    challenge = "Bearer"

    async def authenticate(self, connection: HTTPConnection) -> Principal | None:
        name = connection.headers.get("authorization")
        return None if name is None else Principal(name)


class Bank:
    """A hardened application that counts its payments."""

    def __init__(self, override: Idempotent | None = None, *others: Any, **settings: Any) -> None:
        self.clock = ManualClock()
        self.payments = 0
        self.response: Callable[[], Any] = lambda: JSONResponse({"payment": self.payments}, status_code=201)
        self.app = FastAPI()
        self.handle = harden(
            self.app, Settings(rate_limit={"enabled": False}, **settings), authenticators=[ByName()], clock=self.clock
        )
        self.replayed: list[RequestReplayed] = []
        self.handle.events.subscribe(RequestReplayed, self.replayed.append)
        for method in ("POST", "PATCH", "PUT", "GET"):
            dependencies = [override or Idempotent(), *others]
            self.app.add_api_route(
                "/payments", self.pay, methods=[method], dependencies=dependencies, response_model=None
            )
        self.client = TestClient(self.app, raise_server_exceptions=False)

    async def pay(self, request: Request) -> Any:
        """Answers as the test has set it."""
        await request.body()
        self.payments += 1
        return self.response()

    def post(self, content: str = "10 EUR", path: str = "/payments", key: str = "a key", **headers: str) -> Any:
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.client.post(path, content=content, headers={"Idempotency-Key": f'"{key}"', **fields})


@pytest.fixture
def bank() -> Bank:
    """Give a bank whose payments need a key."""
    return Bank()


# --- keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "key"),
    [
        (b'"8e03978e-40d5"', b"8e03978e-40d5"),
        (b" 8e03978e-40d5 ", b"8e03978e-40d5"),
        (b'"with blanks"', b"with blanks"),
        (b"x" * 255, b"x" * 255),
    ],
)
def test_a_key_is_a_string_quoted_or_bare(value: bytes, key: bytes) -> None:
    """Both forms are one key."""
    assert key_in([(b"idempotency-key", value)]) == key
    assert key_in([]) is None


@pytest.mark.parametrize("value", [b"", b'""', b'"open', b"a, b", b'"a", "b"', b"\x01", b"\xff", b"x" * 256, b'a"b'])
def test_what_is_no_key_is_refused(value: bytes) -> None:
    """Before anything else is done."""
    with pytest.raises(IdempotencyKeyMalformed):
        key_in([(b"idempotency-key", value)])


def test_two_keys_are_none() -> None:
    """Nobody can say which one is meant."""
    with pytest.raises(IdempotencyKeyMalformed):
        key_in([(b"idempotency-key", b"a"), (b"idempotency-key", b"a")])


def test_a_route_says_whether_a_key_must_be_there(bank: Bank) -> None:
    """400 without one; only what changes something by POST or PATCH is asked for it."""
    for headers, problem in (({}, "missing"), ({"Idempotency-Key": "a, b"}, "malformed")):
        answer = bank.client.post("/payments", headers=headers)
        assert answer.status_code == 400
        assert answer.json()["type"].endswith(f"#idempotency-key-{problem}")
    assert bank.client.patch("/payments").status_code == 400
    assert bank.payments == 0
    assert bank.client.put("/payments").status_code == bank.client.get("/payments").status_code == 201
    optional = Bank(Idempotent(required=False))
    assert [optional.client.post("/payments").status_code for _ in range(2)] == [201, 201]
    assert optional.payments == 2


# --- once -------------------------------------------------------------------------------------------------------------


def test_the_second_request_has_the_answer_of_the_first(bank: Bank) -> None:
    """As it was, but for what belongs to the request itself; and it says so."""
    bank.response = lambda: JSONResponse({"n": 1}, 201, headers={"location": "/payments/1", "set-cookie": "a=b"})
    first = bank.post()
    bank.client.cookies.clear()
    second = bank.post()
    assert bank.payments == 1
    assert (second.status_code, second.content) == (201, first.content)
    assert second.headers["location"] == "/payments/1"
    assert second.headers["idempotent-replayed"] == "true"
    assert "idempotent-replayed" not in first.headers
    assert "set-cookie" in first.headers
    assert "set-cookie" not in second.headers
    assert second.headers["x-request-id"] != first.headers["x-request-id"]
    [event] = bank.replayed
    assert event.first_request_id == first.headers["x-request-id"]
    assert event.request_id == second.headers["x-request-id"]
    assert event.template == "/payments"


def test_an_answer_is_kept_in_no_coding() -> None:
    """Who sends the request again may not take what the first client took."""
    bank = Bank(compression={"enabled": True})
    bank.response = lambda: PlainTextResponse("paid " * 1000)
    for coding in ("gzip", "identity"):
        answer = bank.post(accept_encoding=coding)
        assert "content-encoding" not in answer.headers
        assert answer.text == "paid " * 1000


def test_an_answer_is_kept_for_a_day(bank: Bank) -> None:
    """Then the key is free; a route may have another time."""
    bank.post()
    bank.clock.advance(86_399)
    assert bank.post().headers["idempotent-replayed"] == "true"
    bank.clock.advance(1)
    bank.post()
    assert bank.payments == 2
    short = Bank(Idempotent(ttl_seconds=10))
    short.post()
    short.clock.advance(10)
    short.post()
    assert short.payments == 2


@pytest.mark.parametrize(
    "changed",
    [{"content": "20 EUR"}, {"path": "/payments?to=b"}, {"content_type": "text/plain"}],
)
def test_another_request_needs_another_key(bank: Bank, changed: dict[str, str]) -> None:
    """422, and nothing is carried out; the first request can still be sent again."""
    bank.post()
    answer = bank.post(**changed)
    assert answer.status_code == 422
    assert answer.json()["type"].endswith("#idempotency-key-reused")
    assert bank.client.patch("/payments", headers={"Idempotency-Key": "a"}, content="10 EUR").status_code == 201
    assert bank.client.post("/payments", headers={"Idempotency-Key": "a"}, content="10 EUR").status_code == 422
    assert bank.payments == 2
    assert bank.post().status_code == 201


@pytest.mark.parametrize(("status", "calls"), [(500, 2), (503, 2), (429, 2), (403, 2), (402, 1), (404, 1), (303, 1)])
def test_what_failed_may_be_tried_again(bank: Bank, status: int, calls: int) -> None:
    """Where nothing was begun or the server failed; what was decided stays decided."""
    bank.response = lambda: JSONResponse({}, status)
    assert [bank.client.post("/payments", headers=KEY, follow_redirects=False).status_code for _ in range(2)] == [
        status
    ] * 2
    assert bank.payments == calls


def test_an_exception_frees_the_key(bank: Bank) -> None:
    """And one that says what it is, is kept like any answer."""

    def fails() -> Any:
        raise OSError("the network is gone")

    def declined() -> Any:
        raise HTTPException(402, "declined")

    bank.response = fails
    assert [bank.post().status_code for _ in range(2)] == [500, 500]
    bank.response = declined
    assert [bank.post().status_code for _ in range(2)] == [402, 402]
    assert bank.payments == 3


def test_callers_have_keys_of_their_own(bank: Bank) -> None:
    """Whoever sends the key of another one does not have his answer."""
    for caller in ("anna", "bert", "anna", "bert"):
        bank.post(authorization=caller)
    bank.post()
    bank.post(x_api_key="a")
    bank.post(x_api_key="b")
    bank.post(x_csrf_token="another each time")
    assert bank.payments == 5


def test_who_has_other_cookies_has_no_answer_of_somebody_else(bank: Bank) -> None:
    """Nor is it carried out again: perhaps it was the first answer that gave him the cookie."""
    bank.post(cookie="session=1")
    assert bank.post(cookie="session=1").headers["idempotent-replayed"] == "true"
    assert [bank.post(cookie="session=2").status_code, bank.post().status_code] == [409, 409]
    assert bank.post(cookie="session=1", authorization="anna").status_code == 201
    assert bank.post(authorization="anna").headers["idempotent-replayed"] == "true"
    assert bank.payments == 2


def test_nobody_has_an_answer_who_is_not_let_in() -> None:
    """The layer outside asks each time."""
    bank = Bank(None, RequireUser())
    assert bank.post(authorization="anna").status_code == 201
    assert bank.post().status_code == 401
    assert bank.post(authorization="anna").headers["idempotent-replayed"] == "true"


@pytest.mark.parametrize(
    "gate", [Depends(HTTPBearer(auto_error=False)), Authorize(lambda principal, connection: principal.id == "anna")]
)
def test_where_only_the_route_can_decide_no_answer_is_handed_out_again(gate: Any) -> None:
    """But it is carried out once all the same."""
    bank = Bank(None, gate)
    assert bank.post(authorization="anna").status_code == 201
    answer = bank.post(authorization="anna")
    assert answer.status_code == 409
    assert answer.json()["type"].endswith("#already-done")
    assert bank.payments == 1


# --- what cannot be kept ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("priority", ["critical", "background"])
def test_an_important_route_has_its_answers_again(priority: Any) -> None:
    """Who is refused for load is refused before; an answer that is there already is no load."""
    app = FastAPI()

    @app.post("/orders", dependencies=[Idempotent(), Priority(priority)])
    async def order() -> str:
        return "placed"

    harden(app, Settings(_env_file=None))
    client = TestClient(app)
    answers = [client.post("/orders", headers={"Idempotency-Key": "one"}) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[1].headers["idempotent-replayed"] == "true"


def test_what_is_not_kept_is_still_not_done_twice(bank: Bank, tmp_path: Path) -> None:
    """Large answers, streams of events and files that the server sends itself reach the first client as they are."""

    async def parts() -> AsyncIterator[str]:
        yield "one"
        yield "two"

    (tmp_path / "receipt.txt").write_text("receipt")
    bank = Bank(idempotency={"max_body_bytes": 10})
    for number, (response, body) in enumerate(
        (
            (lambda: PlainTextResponse("x" * 11), "x" * 11),
            (lambda: StreamingResponse(parts(), media_type="text/event-stream"), "onetwo"),
        )
    ):
        bank.payments, bank.response = 0, response
        assert bank.post(key=str(number)).text == body
        assert bank.post(key=str(number)).status_code == 409
        assert bank.payments == 1
    bank.response = lambda: StreamingResponse(parts())
    assert [bank.post(key="short").text for _ in range(2)] == ["onetwo", "onetwo"]
    bank.response = lambda: FileResponse(tmp_path / "receipt.txt")
    assert [bank.post(key="file").text for _ in range(2)] == ["receipt", "receipt"]


class Raw:
    """An application of plain ASGI behind the layer alone, whose steps the test says."""

    def __init__(self, *messages: Message, reads: bool = True, **options: Any) -> None:
        self.calls = 0
        self.messages = messages
        self.reads = reads
        self.begun = asyncio.Event()
        self.may_end: asyncio.Event | None = None
        app = FastAPI()
        app.add_api_route("/", lambda: None, methods=["POST"], dependencies=[Idempotent()])
        self.app = app
        self.layer = IdempotencyMiddleware(self.endpoint, **options)

    async def endpoint(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.calls += 1
        self.begun.set()
        while self.reads and (await receive()).get("more_body"):
            pass
        if self.may_end is not None:
            await self.may_end.wait()
        for message in self.messages:
            await send(message)

    async def ask(self, *body: bytes, layer: ASGIApp | None = None, disconnects: bool = False) -> list[Message]:
        sent: list[Message] = []
        parts = [{"type": "http.request", "body": each, "more_body": True} for each in body]
        parts.append({"type": "http.disconnect"} if disconnects else {"type": "http.request", "body": b""})

        async def receive() -> Message:
            return parts.pop(0)

        async def send(message: Message) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "app": self.app}
        scope["headers"] = [(b"idempotency-key", b"k")]
        await (layer or self.layer)(scope, receive, send)
        return sent


START: Message = {"type": "http.response.start", "status": 200}
END: Message = {"type": "http.response.body", "body": b"done"}


def test_a_body_in_parts_is_one_body() -> None:
    """However it is cut, and a client that goes away while its second request is read is not answered."""

    async def use() -> tuple[list[Any], int]:
        raw = Raw(START, END)
        said = [(await raw.ask(*body))[0]["status"] for body in ((b"ab", b"c"), (b"a", b"bc"), (b"abd",))]
        said.append((await raw.ask(b"abc", disconnects=True))[0]["status"])
        return said, raw.calls

    assert asyncio.run(use()) == ([200, 200, 422, 422], 1)


def test_a_body_that_nobody_read_is_not_compared() -> None:
    """Of what the endpoint does not look at the answer cannot depend."""

    async def use() -> tuple[list[int], int]:
        raw = Raw(START, END, reads=False)
        return [(await raw.ask(body))[0]["status"] for body in (b"a", b"b")], raw.calls

    assert asyncio.run(use()) == ([200, 200], 1)


@pytest.mark.parametrize(
    "messages",
    [
        (START, {"type": "http.response.pathsend", "path": "/x"}),
        ({**START, "trailers": True}, END, {"type": "http.response.trailers"}),
    ],
)
def test_an_answer_of_another_kind_is_not_kept(messages: tuple[Message, ...]) -> None:
    """The first client has it whole."""

    async def use() -> tuple[list[str], int, int]:
        raw = Raw(*messages)
        first = await raw.ask(b"a")
        return [each["type"] for each in first], (await raw.ask(b"a"))[0]["status"], raw.calls

    assert asyncio.run(use()) == ([each["type"] for each in messages], 409, 1)


def test_what_comes_before_an_answer_is_no_part_of_it() -> None:
    """Such as early hints, or what a test client wants to know of a template."""

    async def use() -> tuple[list[str], int]:
        raw = Raw({"type": "http.response.early_hint", "links": []}, START, END)
        await raw.ask(b"a")
        return [each["type"] for each in await raw.ask(b"a")], raw.calls

    assert asyncio.run(use()) == (["http.response.start", "http.response.body"], 1)


def test_an_answer_that_never_came_frees_the_key() -> None:
    """Nobody knows what was done, least of all the client."""

    async def use() -> int:
        raw = Raw()
        await raw.ask(b"a")
        await raw.ask(b"a")
        return raw.calls

    assert asyncio.run(use()) == 2


def test_a_request_that_is_cancelled_frees_its_key() -> None:
    """By the server, when the client has gone."""

    async def use() -> int:
        raw = Raw(START, END)
        raw.may_end = asyncio.Event()
        asking = asyncio.create_task(raw.ask(b"a"))
        await raw.begun.wait()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        raw.may_end.set()
        await raw.ask(b"a")
        return raw.calls

    assert asyncio.run(use()) == 2


def test_work_after_the_answer_frees_nothing(bank: Bank) -> None:
    """The answer is kept before its last part is sent, so a task that fails later changes nothing."""

    @bank.app.post("/later", dependencies=[Idempotent()])
    async def later(tasks: BackgroundTasks) -> int:
        bank.payments += 1

        async def fails() -> None:
            raise OSError("too late")

        tasks.add_task(fails)
        return bank.payments

    assert [bank.post(path="/later").text for _ in range(2)] == ["1", "1"]


# --- at the same time -------------------------------------------------------------------------------------------------


def test_while_the_first_is_under_way_the_second_is_told_so() -> None:
    """409 with Retry-After, and no wait; of many at once one is carried out."""

    async def use() -> tuple[list[int], int, bytes]:
        raw = Raw(START, END)
        raw.may_end = asyncio.Event()
        first = asyncio.create_task(raw.ask(b"a"))
        await raw.begun.wait()
        others = await asyncio.gather(*(raw.ask(b"another") for _ in range(20)))
        assert all((b"retry-after", b"1") in each[0]["headers"] for each in others)
        raw.may_end.set()
        await first
        return [each[0]["status"] for each in others], raw.calls, (await raw.ask(b"a"))[1]["body"]

    assert asyncio.run(use()) == ([409] * 20, 1, b"done")


def test_a_key_of_a_worker_that_died_is_free_after_a_while() -> None:
    """Not before: the work may still go on."""
    clock = ManualClock()
    ledger = Ledger(IdempotencySettings(lock_seconds=60), clock=clock)

    async def use() -> list[bool]:
        said = []
        for seconds in (0, 59, 1):
            clock.advance(seconds)
            said.append(await ledger.claim("k", Record("r", "id"), "rescue") is None)
        return said

    assert asyncio.run(use()) == [True, False, True]


# --- memory -----------------------------------------------------------------------------------------------------------


@given(
    st.text(),
    st.text() | st.none(),
    st.integers(0, 599),
    st.binary() | st.none(),
    st.lists(st.tuples(st.binary(), st.binary())),
)
@hypothesis_settings(max_examples=40)
def test_a_record_comes_back(
    request: str, body: str | None, status: int, answer: bytes | None, headers: list[tuple[bytes, bytes]]
) -> None:
    """Through bytes, whatever is in it."""
    record = Record(request, "id", "", body, status, headers, answer)
    assert Record.unpack(b"\n".join(record.pack())) == record


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[1]", b'["a","b","",null,"x",[],true]', b'["a","b","",null,1,[["a"]],true]']
)
def test_what_is_no_record_is_none(data: bytes) -> None:
    """Written by another version, or by somebody else."""
    assert Record.unpack(data) is None


def test_memory_forgets_bodies_and_never_what_was_done() -> None:
    """The bodies that were dropped are as those that were too large."""
    clock = ManualClock()
    local = LocalRecords(3, 4_000, clock)
    for name in ("a", "b", "c"):
        assert local.put(name, Record("r", "id", status=200, answer=b"x" * 500), 100)
    assert not local.put("d", Record("r", "id"), 100)
    kept = [local.get(name) for name in ("a", "b", "c")]
    assert [record.status for record in kept if record is not None] == [200] * 3
    for size in (900, 901):
        local.put("a", Record("r", "id", status=200, answer=b"x" * size), 100)
    record = local.get("a")
    assert record is not None
    assert record.answer is None
    clock.advance(100)
    assert local.get("b") is None
    local.put("b", Record("r", "id"), 100)
    record = local.get("b")
    assert record is not None
    assert record.answer is None
    local.delete("b")
    assert local.get("b") is None


def test_when_memory_is_full_it_says_so() -> None:
    """503: to carry it out without keeping that in mind is what the client wanted to be safe from."""
    bank = Bank(idempotency={"max_keys": 1})
    assert bank.post().status_code == 201
    answer = bank.post(key="other")
    assert answer.status_code == 503
    assert answer.json()["type"].endswith("#temporary-reduced-capacity")
    assert "retry-after" in answer.headers
    assert bank.payments == 1


# --- workers ----------------------------------------------------------------------------------------------------------


def test_workers_know_of_each_other(state_url: str, prefix: str) -> None:
    """Of many who send it to four workers at once one is carried out, and all have its answer afterwards."""

    async def use() -> tuple[int, set[int], set[bytes]]:
        stores = [RedisStore(state_url, prefix=prefix, budget_seconds=20) for _ in range(4)]
        raw = Raw(START, {**END, "body": b"\x00\xff"})
        layers = [IdempotencyMiddleware(raw.endpoint, store=store) for store in stores]
        together = await asyncio.gather(*(raw.ask(b"a", layer=layer) for layer in layers for _ in range(10)))
        after = [await raw.ask(b"a", layer=layer) for layer in layers]
        mismatch = await raw.ask(b"b", layer=layers[0])
        assert mismatch[0]["status"] == 422
        for store in stores:
            await store.close()
        return raw.calls, {each[0]["status"] for each in together}, {each[1]["body"] for each in after}

    calls, statuses, bodies = asyncio.run(use())
    assert (calls, bodies) == (1, {b"\x00\xff"})
    assert statuses <= {200, 409}


class Unreliable(MemoryStore):
    """A store that the test takes away and brings back."""

    gone = False

    async def add(self, key: str, value: bytes, ttl_seconds: float) -> bool:
        await asyncio.sleep(0)
        if self.gone:
            raise StoreUnavailable("gone")
        return await super().add(key, value, ttl_seconds)

    async def put(self, key: str, value: bytes, ttl_seconds: float) -> bool:
        if self.gone:
            raise StoreUnavailable("gone")
        return await super().put(key, value, ttl_seconds)

    async def delete(self, key: str) -> None:
        if self.gone:
            raise StoreUnavailable("gone")
        await super().delete(key)


def test_while_the_store_is_gone_each_worker_keeps_keys_itself() -> None:
    """What was carried out then is not carried out again when the store is back."""

    async def use() -> list[int]:
        store = Unreliable()
        raw = Raw(START, END, store=store)
        store.gone = True
        together = await asyncio.gather(*(raw.ask(b"a") for _ in range(5)))
        said = sorted(each[0]["status"] for each in together)
        store.gone = False
        return [*said, (await raw.ask(b"a"))[0]["status"], raw.calls]

    assert asyncio.run(use()) in ([200] * 6 + [1], [200, 409, 409, 409, 409, 200, 1])


def test_what_must_not_be_done_twice_may_be_refused_instead() -> None:
    """503 while the store is gone, on the routes that say so."""

    async def use() -> tuple[int, int]:
        store = Unreliable()
        store.gone = True
        raw = Raw(START, END, store=store, settings=IdempotencySettings(on_store_failure="refuse"))
        return (await raw.ask(b"a"))[0]["status"], raw.calls

    assert asyncio.run(use()) == (503, 0)


def test_a_store_that_goes_away_meanwhile_loses_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """The answer is kept in this worker; a key that should be free stays taken until its time is over."""

    async def use() -> tuple[list[int], int]:
        store = Unreliable()
        raw = Raw(START, END, store=store)
        ledger = raw.layer.ledger
        assert await ledger.claim("done", Record("r", "id"), "rescue") is None
        assert await ledger.claim("failed", Record("r", "id"), "rescue") is None
        store.gone = True
        await ledger.finish("done", Record("r", "id", status=200, answer=b"x"), 60)
        await ledger.release("failed")
        store.gone = False
        done, failed = [await ledger.claim(name, Record("r", "id"), "rescue") for name in ("done", "failed")]
        assert done is not None
        assert failed is not None
        return [done.status, failed.status], raw.calls

    assert asyncio.run(use()) == ([200, 0], 0)
    assert "known to this worker alone" in caplog.text
    assert "stays taken" in caplog.text


def test_what_another_version_has_written_was_carried_out() -> None:
    """It cannot be read, so it cannot be answered; and it is not done again."""

    async def use() -> tuple[int, int, Record | None]:
        store = Unreliable()
        raw = Raw(START, END, store=store)
        await raw.ask(b"a")
        [key] = store._values._entries
        await store.put(key, b"\xff", 60)
        status = (await raw.ask(b"a"))[0]["status"]
        store.get = lambda _key: asyncio.sleep(0, None)  # type: ignore[assignment,method-assign]
        return status, raw.calls, await raw.layer.ledger.claim(key.partition(":")[2], Record("r", "id"), "rescue")

    status, calls, record = asyncio.run(use())
    assert (status, calls) == (409, 1)
    assert record is not None
    assert record.status == 0


def test_full_is_an_exception_of_its_own() -> None:
    """So nobody takes it for a store that is gone."""
    ledger = Ledger(IdempotencySettings(max_keys=1))

    async def use() -> None:
        await ledger.claim("a", Record("r", "id"), "rescue")
        await ledger.claim("b", Record("r", "id"), "rescue")

    with pytest.raises(Full):
        asyncio.run(use())


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_without_its_layer_it_refuses() -> None:
    """Rather than to carry out what it could not keep in mind; what needs no key goes on."""
    app = FastAPI()

    @app.post("/", dependencies=[Idempotent()])
    @app.get("/", dependencies=[Idempotent()])
    async def pay() -> None: ...

    client = TestClient(app)
    assert client.post("/", headers=KEY).status_code == 500
    assert client.get("/").status_code == 200


def test_it_works_alone() -> None:
    """Without harden(), and tells nobody else's events."""
    app = FastAPI()
    events = Events()
    seen: list[RequestReplayed] = []
    events.subscribe(RequestReplayed, seen.append)
    app.add_middleware(IdempotencyMiddleware, events=events)
    app.add_middleware(IdempotencyMiddleware, settings=IdempotencySettings(enabled=False))

    @app.post("/", dependencies=[Idempotent()])
    async def pay() -> str:
        return "paid"

    @app.post("/other")
    async def other() -> str:
        return "other"

    client = TestClient(app)
    assert [client.post("/", headers=KEY).text for _ in range(2)] == ['"paid"'] * 2
    assert client.post("/other").text == '"other"'
    assert len(seen) == 1


def test_a_problem_of_a_body_is_the_problem_of_the_second_request(bank: Bank) -> None:
    """A body that is refused while it is read is refused as it always is."""
    bank = Bank(request_limits={"max_body_bytes": 20})
    bank.post()

    def parts() -> Any:
        yield b"x" * 15
        yield b"x" * 15

    answer = bank.client.post("/payments", content=parts(), headers=KEY)
    assert answer.status_code == 413
    assert issubclass(IdempotencyKeyMalformed, Problem)


def test_the_document_names_the_key(bank: Bank) -> None:
    """On the operations that take it, once."""
    router = APIRouter(prefix="/sub", dependencies=[Idempotent(required=False)])

    @router.post("/optional")
    async def optional() -> None: ...

    @router.get("/reading")
    async def reading() -> None: ...

    bank.app.include_router(router)
    paths = bank.client.get("/openapi.json").json()["paths"]

    def keys(path: str, method: str) -> list[bool]:
        parameters = paths[path][method].get("parameters", [])
        return [each["required"] for each in parameters if each["name"] == "Idempotency-Key"]

    assert keys("/payments", "post") == keys("/payments", "patch") == [True]
    assert keys("/payments", "get") == keys("/sub/reading", "get") == []
    assert keys("/sub/optional", "post") == [False]
    assert "409" in paths["/payments"]["post"]["responses"]


def test_a_parameter_of_the_application_stays() -> None:
    """An endpoint may read the key itself."""
    app = FastAPI()

    async def own() -> None: ...

    parameter = {"name": "idempotency-key", "in": "header", "required": True}
    extra = {"parameters": [{"name": "page", "in": "query"}, parameter]}
    app.add_api_route("/", own, methods=["POST"], dependencies=[Idempotent()], openapi_extra=extra)
    app.add_api_route("/hidden", own, methods=["POST"], dependencies=[Idempotent()], include_in_schema=False)
    harden(app)
    paths = TestClient(app).get("/openapi.json").json()["paths"]
    assert list(paths) == ["/"]
    assert paths["/"]["post"]["parameters"] == [{"name": "page", "in": "query"}, parameter]


def test_it_tells_the_log_nothing_of_the_key(bank: Bank, caplog: pytest.LogCaptureFixture) -> None:
    """A key is a secret between two."""
    with caplog.at_level(logging.DEBUG, "fastapi_hardening.idempotency"):
        bank.post(key="8e03978e")
        bank.post(key="8e03978e")
    assert "8e03978e" not in caplog.text
