"""The page of problems tells what a client really gets."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import httpx2
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient
from pydantic import BaseModel, Field
from starlette.requests import HTTPConnection

from fastapi_hardening import (
    Hardening,
    Idempotent,
    Principal,
    Problem,
    RateLimit,
    RequireScopes,
    Settings,
    Tenant,
    harden,
)
from fastapi_hardening.api.idempotency import IdempotencyMiddleware
from fastapi_hardening.core.clock import ManualClock
from fastapi_hardening.core.identity import InvalidCredentials
from fastapi_hardening.core.problem import OWN
from fastapi_hardening.core.store import MemoryStore
from fastapi_hardening.observability.request_context import RequestContextMiddleware

DOCS = Path(__file__).resolve().parents[2] / "docs"
SECTION = re.compile(r"^## [^\n]*\{ #(?P<anchor>[\w-]+) \}$(?P<text>.*?)(?=^## |\Z)", re.DOTALL | re.MULTILINE)
EXAMPLE = re.compile(r"^```json\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def text(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def example(markdown: str) -> dict[str, Any]:
    """The first JSON document in a piece of a page."""
    found = EXAMPLE.search(markdown)
    assert found is not None
    document: dict[str, Any] = json.loads(found[1])
    return document


SECTIONS = {section["anchor"]: section["text"] for section in SECTION.finditer(text("problems.md"))}


class Line(BaseModel):
    quantity: Annotated[int, Field(ge=1)]


class Order(BaseModel):
    lines: list[Line]


CLOCK = ManualClock()


@pytest.fixture
def client() -> Iterator[TestClient]:
    """Gives a client of a hardened application in which everything can go wrong."""
    app = FastAPI()

    @app.post("/orders")
    async def place(order: Order) -> None: ...

    @app.get("/api/products/{product_id}")
    async def product(product_id: int) -> None: ...

    @app.post("/login", dependencies=[RateLimit("1/minute", name="login")])
    async def login() -> None: ...

    @app.get("/boom")
    async def boom() -> None:
        raise RuntimeError("nobody's business")

    harden(app, Settings(_env_file=None), clock=CLOCK)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def past_the_deadline(client: TestClient) -> httpx2.Response:
    app = client.app
    assert isinstance(app, FastAPI)
    handle: Hardening = app.state.hardening
    handle.lifecycle.drain()
    CLOCK.advance(handle.settings.health.drain_deadline_seconds)
    return client.get("/boom")


def too_many(client: TestClient) -> httpx2.Response:
    client.post("/login")
    return client.post("/login")


def a_flood(client: TestClient) -> httpx2.Response:
    app = FastAPI()
    harden(app, Settings(_env_file=None, address_limit={"limit": "1/minute"}))
    flooding = TestClient(app)
    flooding.get("/")
    return flooding.get("/")


class Tokens:
    """Knows two tokens, one of which may do little, and a store that is down."""

    scheme = "bearer"
    challenge = "Bearer"
    ambient = True

    async def authenticate(self, connection: HTTPConnection) -> Principal | None:
        token = connection.headers.get("authorization")
        if token == "Bearer down":
            raise ConnectionError("no store")
        if token not in (None, "Bearer anna"):
            raise InvalidCredentials("unknown token")
        return None if token is None else Principal("anna")


def closed(token: str | None, **headers: str) -> httpx2.Response:
    app = FastAPI()

    @app.post("/orders", dependencies=[RequireScopes("orders:write")])
    async def place() -> None: ...

    harden(app, Settings(_env_file=None), authenticators=[Tokens()])
    authorization = {} if token is None else {"Authorization": f"Bearer {token}"}
    return TestClient(app).post("/orders", headers={**authorization, **headers})


def in_tenancy(path: str, *also: str, **headers: str) -> httpx2.Response:
    app = FastAPI()

    @app.get("/{tenant}")
    async def data(tenant: str) -> None: ...

    def find(name: str) -> Tenant | None:
        if name == "down":
            raise ConnectionError("no database")
        return None if name == "nobody" else Tenant(name)

    tenancy = {"sources": ["path", "header"], "trusted_callers": ["127.0.0.1"]}
    harden(app, Settings.model_validate({"tenancy": tenancy}), authenticators=[Tokens()], tenants=find)
    fields = [("X-Tenant", name) for name in also] + list(headers.items())
    return TestClient(app, client=("127.0.0.1", 1)).get(path, headers=fields)


def of_version(version: str) -> httpx2.Response:
    app = FastAPI()
    old = {"version": "1", "since": "2020-01-01T00:00:00Z", "sunset": "2020-07-01T00:00:00Z"}
    versioning = {"versions": ["1", "2"], "deprecated": [old], "after_sunset": "gone"}
    harden(app, Settings.model_validate({"versioning": versioning}))
    return TestClient(app).get("/", headers={"API-Version": version})


def an_attack(_client: TestClient) -> httpx2.Response:
    app = FastAPI()
    harden(app, Settings(_env_file=None, input_validation={"mode": "enforce"}))
    return TestClient(app).get("/", params={"q": "1' or '1'='1"})


def payments(*keys: str, content: str = "", large: bool = False) -> httpx2.Response:
    """What the last of several payments gets, the last with this body."""
    app = FastAPI()
    harden(app, Settings(_env_file=None, idempotency={"max_body_bytes": 0 if large else 1000}))

    @app.post("/payments", dependencies=[Idempotent()])
    async def pay(_request: Request) -> str:
        await _request.body()
        return "paid"

    client = TestClient(app)
    answer = client.post("/payments")
    for number, key in enumerate(keys, start=1):
        body = content if number == len(keys) else ""
        answer = client.post("/payments", headers={"Idempotency-Key": key}, content=body)
    return answer


class Busy(MemoryStore):
    """A store in which every key is taken."""

    async def add(self, key: str, value: bytes, ttl_seconds: float) -> bool:
        return False


def in_progress(_client: TestClient) -> httpx2.Response:
    app = FastAPI()
    app.add_middleware(IdempotencyMiddleware, store=Busy())
    app.add_middleware(RequestContextMiddleware)
    app.add_api_route("/", lambda: None, methods=["POST"], dependencies=[Idempotent()])
    return TestClient(app).post("/", headers={"Idempotency-Key": "a"})


def a_broken_circuit(_client: TestClient) -> httpx2.Response:
    app = FastAPI()
    breaker = harden(app, Settings(_env_file=None)).breakers.get("stock")
    breaker.force_open()

    @app.get("/stock")
    async def stock() -> None:
        async with breaker.guard():
            pass

    return TestClient(app).get("/stock")


def a_foreign_channel(_client: TestClient) -> httpx2.Response:
    app = FastAPI()
    handle = harden(app, Settings(_env_file=None))

    @app.get("/events", response_class=StreamingResponse)
    async def events(request: Request) -> StreamingResponse:
        return await handle.realtime.of(request).events("orders:42")

    return TestClient(app).get("/events")


CASES: dict[str, Callable[[TestClient], httpx2.Response]] = {
    "about-blank": lambda client: client.get("/no-such-page"),
    "validation-failed": lambda client: client.post("/orders", json={"lines": [{"quantity": 0}]}),
    "internal-error": lambda client: client.get("/boom"),
    "temporary-reduced-capacity": past_the_deadline,
    "version-not-served": lambda _: of_version("9"),
    "version-gone": lambda _: of_version("1"),
    "authentication-required": lambda _: closed(None),
    "invalid-credentials": lambda _: closed("forged"),
    "not-allowed": lambda _: closed("anna"),
    "cross-site-request": lambda _: closed("anna", **{"Sec-Fetch-Site": "cross-site"}),
    "tenant-required": lambda _: in_tenancy("/"),
    "tenant-ambiguous": lambda _: in_tenancy("/north", "south"),
    "cross-tenant-request": lambda _: in_tenancy("/north", authorization="Bearer anna"),
    "tenant-unknown": lambda _: in_tenancy("/nobody"),
    "tenant-unavailable": lambda _: in_tenancy("/down"),
    "authentication-unavailable": lambda _: closed("down"),
    "quota-exceeded": too_many,
    "abnormal-usage-detected": a_flood,
    "content-refused": an_attack,
    "idempotency-key-missing": lambda _: payments(),
    "idempotency-key-malformed": lambda _: payments("a, b"),
    "idempotency-key-reused": lambda _: payments("a", "a", content="more"),
    "request-in-progress": in_progress,
    "already-done": lambda _: payments("a", "a", large=True),
    "circuit-open": a_broken_circuit,
    "channel-refused": a_foreign_channel,
}


@pytest.mark.parametrize("anchor", SECTIONS)
def test_example_is_what_the_package_answers(anchor: str, client: TestClient) -> None:
    """The example of a problem is the answer of the package, but for the id."""
    answer = CASES[anchor](client)
    document = example(SECTIONS[anchor])
    assert document["request_id"] != answer.json()["request_id"]
    assert document | {"request_id": answer.headers["x-request-id"]} == answer.json()
    assert document["status"] == answer.status_code
    assert answer.headers["content-type"] == "application/problem+json"
    assert f"`{document['type']}`" in SECTIONS[anchor]


def test_example_of_the_tutorial_is_what_the_package_answers(client: TestClient) -> None:
    """The document in the tutorial is the answer of the package, but for the id."""
    answer = client.get("/api/products/one")
    assert example(text("tutorial.md")) | {"request_id": answer.headers["x-request-id"]} == answer.json()


def _kinds(base: type[Problem]) -> Iterator[type[Problem]]:
    for kind in base.__subclasses__():
        if kind.__module__.startswith("fastapi_hardening."):
            yield kind
            yield from _kinds(kind)


@pytest.mark.parametrize("kind", list(_kinds(Problem)), ids=lambda kind: kind.__name__)
def test_type_of_every_problem_leads_to_its_section(kind: type[Problem]) -> None:
    """The fragment of a type's URI is the anchor of a section, and a type of our own is an address of the page."""
    anchor = kind.type.rpartition("#")[2] if "#" in kind.type else "about-blank"
    assert anchor in SECTIONS
    if kind.__module__.startswith("fastapi_hardening.api"):
        assert kind.type == OWN + anchor


def test_addresses_of_our_types_are_addresses_of_the_site() -> None:
    """A type of our own is a page of the site, as mkdocs.yml says where that is."""
    site = re.search(r"^site_url: (\S+)$", (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert site is not None
    assert f"{site[1]}problems/#" == OWN
