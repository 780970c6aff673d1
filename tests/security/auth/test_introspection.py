"""Introspection: what a provider must say before anybody is let in, and how often it is asked."""

import asyncio
import base64
import json
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import parse_qs

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr
from starlette.requests import HTTPConnection

from fastapi_hardening.core.clock import ManualClock
from fastapi_hardening.core.identity import Authenticator, CredentialsUnchecked, InvalidCredentials, Principal
from fastapi_hardening.security.auth.introspection import IntrospectionAuthenticator, IntrospectionSettings

TOKEN = "2YotnFZFEjr1zCsicMWpAA"
URL = "https://login.example/introspect"
NOW = 1_700_000_000
GOOD: dict[str, Any] = {"active": True, "sub": "anna", "aud": "shop", "exp": NOW + 1_000}


def settings(**changes: Any) -> IntrospectionSettings:
    given = {"url": URL, "client_id": "shop: api", "client_secret": SecretStr("p%+&\u00e9"), "audience": ("shop",)}
    return IntrospectionSettings.model_validate(given | changes)


class Provider:
    """A provider that answers what it is told to, and keeps what it was asked."""

    def __init__(self, answer: Any = None, status: int = 200) -> None:
        self.answer: Any = GOOD if answer is None else answer
        self.status = status
        self.raises: Exception | None = None
        self.asked: list[tuple[str, Mapping[str, str], bytes]] = []
        self.gate: asyncio.Event | None = None

    async def __call__(self, url: str, headers: Mapping[str, str], body: bytes) -> tuple[int, bytes]:
        self.asked.append((url, headers, body))
        await (self.gate.wait() if self.gate else asyncio.sleep(0))
        if self.raises is not None:
            raise self.raises
        answer = self.answer if isinstance(self.answer, bytes) else json.dumps(self.answer).encode()
        return self.status, answer


class Kit:
    """An authenticator beside its provider, and a clock that can be moved."""

    def __init__(self, answer: Any = None, status: int = 200, **changes: Any) -> None:
        self.clock = ManualClock()
        self.provider = Provider(answer, status)
        self.authenticator = IntrospectionAuthenticator(settings(**changes), fetch=self.provider, clock=self.clock)

    def ask(self, token: str = TOKEN) -> Principal | str:
        """The principal, or why there is none."""
        return asyncio.run(self.outcome(token))

    async def outcome(self, token: str = TOKEN) -> Principal | str:
        try:
            return await self.authenticator.principal_of(token)
        except CredentialsUnchecked as error:
            return f"503: {error.reason}"
        except InvalidCredentials as error:
            return error.reason


# --- what an answer must say ------------------------------------------------------------------------------------------


def test_a_good_answer_is_a_principal() -> None:
    """With subject, scopes, roles, tenant, issuer, id and end, as the provider says."""
    answer = GOOD | {
        "token_type": "bearer",
        "scope": "orders:read orders:write",
        "roles": ["clerk"],
        "org": "t1",
        "iss": "https://login.example",
        "jti": "j-1",
        "aud": ["other", "shop"],
    }
    principal = Kit(answer, tenant_claim="org", issuer="https://login.example").ask()
    assert isinstance(principal, Principal)
    assert (principal.id, principal.scheme, principal.tenant) == ("anna", "bearer", "t1")
    assert principal.scopes == {"orders:read", "orders:write"}
    assert principal.roles == {"clerk"}
    assert (principal.issuer, principal.credential) == ("https://login.example", "j-1")
    assert principal.expires_at == NOW + 1_000
    assert principal.claims["org"] == "t1"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"active": False}, "not active"),
        ({"token_type": "DPoP"}, "not a bearer token"),
        ({"token_type": None}, "not a bearer token"),
        ({"token_type": 7}, "not a bearer token"),
        ({"cnf": {"jkt": "x"}}, "bound to a key"),
        ({"aud": "other"}, "for another audience"),
        ({"aud": "shopper"}, "for another audience"),
        ({"aud": ["other"]}, "for another audience"),
        ({"aud": []}, "for another audience"),
        ({"aud": None}, "for another audience"),
        ({"aud": {"shop": 1}}, "for another audience"),
        ({"iss": "https://evil.example"}, "of another issuer"),
        ({"iss": None}, "of another issuer"),
        ({"exp": NOW}, "expired"),
        ({"exp": NOW - 1}, "expired"),
        ({"exp": 0}, "expired"),
        ({"exp": str(NOW + 1_000)}, "a time that is none"),
        ({"exp": True}, "a time that is none"),
        ({"exp": float("inf")}, "a time that is none"),
        ({"exp": float("nan")}, "a time that is none"),
        ({"exp": 10**400}, "a time that is none"),
        ({"exp": [NOW + 1_000]}, "a time that is none"),
        ({"nbf": NOW + 1}, "not yet good"),
        ({"nbf": "0"}, "a time that is none"),
        ({"sub": ""}, "without a subject"),
        ({"sub": None}, "without a subject"),
        ({"sub": 7}, "without a subject"),
        ({"sub": None, "client_id": ""}, "without a subject"),
        ({"sub": None, "client_id": 7}, "without a subject"),
        ({"scope": 7}, "of another form"),
        ({"roles": [7]}, "of another form"),
        ({"roles": {"admin": True}}, "of another form"),
        ({"org": 7}, "of another form"),
    ],
)
def test_an_answer_that_does_not_fit_is_an_invalid_token(changes: dict[str, Any], reason: str) -> None:
    """Whatever else it says; and asked again at once, nobody is bothered."""
    good = GOOD | {"iss": "https://login.example"}
    kit = Kit(good | changes, issuer="https://login.example", tenant_claim="org")
    for _ in range(3):
        assert reason in str(kit.ask())
    assert len(kit.provider.asked) == 1


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"active": "true"},
        {"active": 1},
        {"active": None},
        {"active": [True]},
        [GOOD],
        b"",
        b"true",
        b"<html>",
        b"\xff",
        b'{"active": false, "active": true, "sub": "anna"}',
        b"[" * 60_000,
        GOOD | {"padding": "x" * 70_000},
    ],
)
def test_an_answer_that_rfc_7662_does_not_know_lets_nobody_in(answer: Any) -> None:
    """It says nothing about the token, so that is a 503; and the next request asks again."""
    kit = Kit(answer)
    assert kit.ask() == "503: the provider's answer cannot be read"
    kit.provider.answer = GOOD
    assert isinstance(kit.ask(), Principal)


@pytest.mark.parametrize("status", [201, 204, 302, 400, 401, 403, 404, 429, 500, 503])
def test_another_status_lets_nobody_in(status: int) -> None:
    """Whatever is in its body."""
    assert Kit(GOOD, status).ask() == f"503: the provider answers with status {status}"


@pytest.mark.parametrize("error", [ConnectionError(), TimeoutError(), ValueError("boom"), RuntimeError()])
def test_a_provider_that_does_not_answer_lets_nobody_in(error: Exception) -> None:
    """But for whom it has vouched a moment ago; the caller is told when to come back."""
    kit = Kit(retry_after_seconds=7)
    kit.ask("known")
    kit.provider.raises = error
    assert isinstance(kit.ask("known"), Principal)
    for _ in range(2):
        with pytest.raises(CredentialsUnchecked) as refused:
            asyncio.run(kit.authenticator.principal_of("new"))
        assert refused.value.retry_after_seconds == 7
        assert "boom" not in refused.value.reason
    kit.provider.raises = None
    assert isinstance(kit.ask("new"), Principal)


def test_a_provider_that_takes_too_long_does_not_answer() -> None:
    """The time is for the answer as a whole."""

    async def check() -> Principal | str:
        kit = Kit(timeout_seconds=0.001)
        kit.provider.gate = asyncio.Event()
        return await kit.outcome()

    assert asyncio.run(check()) == "503: the provider does not answer: TimeoutError"


@given(
    st.dictionaries(
        st.sampled_from(["active", "sub", "aud", "exp", "nbf", "iss", "scope", "roles", "token_type", "client_id"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.sampled_from(["shop"]),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
            max_leaves=4,
        ),
    )
    | st.binary(max_size=40)
)
def test_whatever_a_provider_answers_only_a_literal_yes_for_us_lets_anybody_in(answer: Any) -> None:
    """And nothing but our two exceptions comes out."""
    outcome = Kit(answer).ask()
    if isinstance(outcome, Principal):
        assert answer["active"] is True
        assert answer["aud"] == "shop" or "shop" in answer["aud"]
        assert outcome.id in (answer.get("sub"), f"client:{answer.get('client_id')}")


def test_a_program_without_a_subject_has_a_name_that_no_person_has() -> None:
    """Its client id, marked as one."""
    kit = Kit({"active": True, "client_id": "anna", "aud": "shop"})
    principal = kit.ask()
    assert isinstance(principal, Principal)
    assert (principal.id, principal.expires_at) == ("client:anna", None)


def test_clocks_may_differ_by_the_leeway() -> None:
    """Not by default."""
    kit = Kit(GOOD | {"exp": NOW - 5, "nbf": NOW + 5}, leeway_seconds=6)
    assert isinstance(kit.ask(), Principal)
    kit.clock.advance(1)
    assert kit.ask() == "expired"


def test_an_audience_may_be_left_open_on_purpose() -> None:
    """Where the provider has one application; it is not the default."""
    assert isinstance(Kit({"active": True, "sub": "anna"}, audience=()).ask(), Principal)
    with pytest.raises(ValueError, match="audience"):
        IntrospectionSettings.model_validate({"url": URL, "client_id": "x", "client_secret": "y"})


# --- how often it is asked --------------------------------------------------------------------------------------------


def test_an_answer_is_remembered_for_a_while() -> None:
    """And asked for again after it."""
    kit = Kit(cache_seconds=60)
    for _ in range(3):
        kit.ask()
    assert len(kit.provider.asked) == 1
    kit.clock.advance(60)
    kit.provider.answer = {"active": False}
    assert kit.ask() == "not active"
    assert len(kit.provider.asked) == 2


def test_no_answer_is_remembered_beyond_the_end_of_its_token() -> None:
    """However long the cache would be."""
    kit = Kit(GOOD | {"exp": NOW + 10}, cache_seconds=1_000)
    assert isinstance(kit.ask(), Principal)
    kit.clock.advance(9.9)
    assert isinstance(kit.ask(), Principal)
    kit.clock.advance(0.1)
    assert kit.ask() == "expired"


def test_a_clock_that_is_set_forward_ends_tokens_at_once() -> None:
    """The end is on the wall, the cache is not."""
    kit = Kit()
    kit.ask()
    kit.clock._epoch += 2_000
    assert kit.ask() == "expired"


def test_a_bad_answer_is_remembered_shortly() -> None:
    """So a token that becomes good soon is."""
    kit = Kit({"active": False}, negative_cache_seconds=5)
    kit.ask()
    kit.provider.answer = GOOD
    assert kit.ask() == "not active"
    kit.clock.advance(5)
    assert isinstance(kit.ask(), Principal)


@pytest.mark.parametrize("answer", [GOOD, {"active": False}])
def test_without_a_cache_every_request_asks(answer: Any) -> None:
    """Where a revoked token must not pass once more."""
    kit = Kit(answer, cache_seconds=0, negative_cache_seconds=0)
    for _ in range(3):
        kit.ask()
    assert len(kit.provider.asked) == 3


def test_many_requests_with_one_token_ask_once() -> None:
    """And all of them get the answer, good or not."""

    async def check(answer: Any) -> tuple[set[str], int]:
        kit = Kit(answer, cache_seconds=0, negative_cache_seconds=0)
        outcomes = await asyncio.gather(*(kit.outcome() for _ in range(50)))
        assert kit.authenticator._under_way == {}
        return {str(outcome) for outcome in outcomes}, len(kit.provider.asked)

    assert asyncio.run(check(GOOD)) == ({"anna"}, 1)
    assert asyncio.run(check({"active": False})) == ({"not active"}, 1)
    assert asyncio.run(check(b"nonsense")) == ({"503: the provider's answer cannot be read"}, 1)


def test_a_caller_that_leaves_does_not_end_the_question_of_others() -> None:
    """Whoever began it."""

    async def check() -> Principal | str:
        kit = Kit()
        kit.provider.gate = asyncio.Event()
        first, second = (asyncio.create_task(kit.outcome()) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        kit.provider.gate.set()
        outcome = await second
        assert len(kit.provider.asked) == 1
        return outcome

    assert isinstance(asyncio.run(check()), Principal)


def test_made_up_tokens_do_not_flood_the_provider() -> None:
    """So many questions are under way, further ones are refused, and those remembered are served."""

    async def check() -> tuple[list[Any], int, Any]:
        kit = Kit(max_under_way=3)
        await kit.outcome("known")
        kit.provider.gate = asyncio.Event()
        tasks = [asyncio.create_task(kit.outcome(f"made-up-{number}")) for number in range(10)]
        for _ in range(3):
            await asyncio.sleep(0)
        known = await kit.outcome("known")
        kit.provider.gate.set()
        return await asyncio.gather(*tasks), len(kit.provider.asked), known

    outcomes, asked, known = asyncio.run(check())
    assert isinstance(known, Principal)
    assert asked == 1 + 3
    assert [str(outcome) for outcome in outcomes].count("503: too many questions to the provider are under way") == 7


def test_memory_is_bounded_and_bad_tokens_take_no_place_from_good_ones() -> None:
    """However many are made up."""
    kit = Kit({"active": False}, max_keys=5)
    for number in range(50):
        kit.ask(f"made-up-{number}")
    kit.provider.answer = GOOD
    for number in range(50):
        kit.ask(f"good-{number}")
    assert (len(kit.authenticator._bad), len(kit.authenticator._good)) == (5, 5)
    before = len(kit.provider.asked)
    kit.ask("good-0")
    assert len(kit.provider.asked) == before


# --- the request ------------------------------------------------------------------------------------------------------


def connection(*fields: str) -> HTTPConnection:
    headers = [(b"authorization", field.encode("latin-1")) for field in fields]
    return HTTPConnection({"type": "http", "headers": headers})


def authenticate(kit: Kit, *fields: str) -> Principal | str | None:
    try:
        return asyncio.run(kit.authenticator.authenticate(connection(*fields)))
    except InvalidCredentials as error:
        return error.reason


@pytest.mark.parametrize("field", [f"Bearer {TOKEN}", f"bearer {TOKEN}", f"BEARER  {TOKEN} "])
def test_a_bearer_token_is_found_in_the_request(field: str) -> None:
    """The scheme in any case."""
    kit = Kit()
    authenticator: Authenticator = kit.authenticator
    assert (authenticator.scheme, authenticator.challenge) == ("bearer", "Bearer")
    assert str(authenticate(kit, field)) == "anna"
    assert parse_qs(kit.provider.asked[0][2].decode())["token"] == [TOKEN]


@pytest.mark.parametrize("fields", [(), ("Basic eDp5",), ("",), ("Bearerx abc",), ("Basic x", "Digest y")])
def test_other_credentials_are_none_of_ours(fields: tuple[str, ...]) -> None:
    """Another authenticator may take them."""
    assert authenticate(Kit(), *fields) is None


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (("Bearer",), "malformed"),
        (("Bearer ",), "malformed"),
        (("Bearer a b",), "malformed"),
        (("Bearer a,b",), "malformed"),
        (("Bearer \u00e9",), "malformed"),
        (("Bearer a=b",), "malformed"),
        (("Bearer a\n",), "malformed"),
        (("Bearer " + "x" * 4_097,), "malformed"),
        ((f"Bearer {TOKEN}", f"Bearer {TOKEN}"), "more than one Authorization field"),
        (("Basic eDp5", f"Bearer {TOKEN}"), "more than one Authorization field"),
    ],
)
def test_what_cannot_be_a_token_is_refused_without_asking(fields: tuple[str, ...], reason: str) -> None:
    """And without a word to the provider."""
    kit = Kit()
    assert authenticate(kit, *fields) == reason
    assert kit.provider.asked == []


def test_switched_off_it_finds_nobody() -> None:
    """Nor asks."""
    assert authenticate(Kit(enabled=False), f"Bearer {TOKEN}") is None


def test_the_provider_is_asked_as_rfc_7662_has_it() -> None:
    """With the application's own credentials, encoded as a form inside of Basic, or in the body."""
    kit = Kit()
    kit.ask()
    [(url, headers, body)] = kit.provider.asked
    assert url == URL
    assert parse_qs(body.decode()) == {"token": [TOKEN], "token_type_hint": ["access_token"]}
    assert headers["Content-Type"] == "application/x-www-form-urlencoded"
    assert base64.b64decode(headers["Authorization"].removeprefix("Basic ")) == b"shop%3A+api:p%25%2B%26%C3%A9"
    kit = Kit(client_authentication="body")
    kit.ask()
    [(_, headers, body)] = kit.provider.asked
    assert "Authorization" not in headers
    assert parse_qs(body.decode())["client_secret"] == ["p%+&\u00e9"]


@pytest.mark.parametrize(
    "url", ["http://login.example/x", "ftp://login.example", "login.example", "https://", "https://a:b@login.example/x"]
)
def test_the_secret_is_sent_only_where_it_is_safe(url: str) -> None:
    """Https, or this machine."""
    with pytest.raises(ValueError, match=r"https|address of an endpoint"):
        settings(url=url)
    assert settings(url="http://127.0.0.1:8080/x").url == "http://127.0.0.1:8080/x"
    assert "p%+" not in repr(settings())


# --- with httpx2, against a real server -------------------------------------------------------------------------------


@asynccontextmanager
async def serving(answer: bytes) -> AsyncIterator[tuple[str, list[bytes]]]:
    """A server that gives this answer to every request, and its address."""
    requests: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        requests.append(head + await reader.readexactly(length))
        writer.write(answer)
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}/introspect", requests


def http(body: bytes, *fields: bytes, status: bytes = b"200 OK") -> bytes:
    head = [b"HTTP/1.1 " + status, b"Content-Length: %d" % len(body), b"Connection: close", *fields]
    return b"\r\n".join(head) + b"\r\n\r\n" + body


async def over_the_wire(answer: bytes) -> tuple[str, list[bytes]]:
    async with serving(answer) as (url, requests):
        authenticator = IntrospectionAuthenticator(settings(url=url), clock=ManualClock())
        try:
            outcome = str(await authenticator.principal_of(TOKEN))
        except CredentialsUnchecked as error:
            outcome = error.reason
        finally:
            await authenticator.aclose()
        return outcome, requests


def test_httpx2_asks_the_provider() -> None:
    """One request, with the token in its body."""
    outcome, [request] = asyncio.run(over_the_wire(http(json.dumps(GOOD).encode())))
    assert outcome == "anna"
    head, _, body = request.partition(b"\r\n\r\n")
    assert head.startswith(b"POST /introspect HTTP/1.1\r\n")
    assert b"authorization: basic" in head.lower()
    assert b"accept-encoding: identity" in head.lower()
    assert parse_qs(body.decode())["token"] == [TOKEN]


def test_a_redirect_is_not_followed() -> None:
    """The token and the secret go nowhere else."""
    answer = http(b"", b"Location: http://127.0.0.1:1/elsewhere", status=b"302 Found")
    assert asyncio.run(over_the_wire(answer))[0] == "the provider answers with status 302"


def test_an_answer_without_end_is_read_only_so_far() -> None:
    """Then it cannot be read."""
    endless = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + b" " * 1_000_000
    assert asyncio.run(over_the_wire(endless))[0] == "the provider's answer cannot be read"


def test_nobody_there_is_a_provider_that_does_not_answer() -> None:
    """Not an exception of httpx2."""

    async def check() -> str:
        async with serving(b"") as (url, _):
            pass
        authenticator = IntrospectionAuthenticator(settings(url=url))
        with pytest.raises(CredentialsUnchecked) as refused:
            await authenticator.principal_of(TOKEN)
        await authenticator.aclose()
        return refused.value.reason

    assert asyncio.run(check()) == "the provider does not answer: ConnectError"


def test_an_authenticator_with_its_own_fetch_has_nothing_to_close() -> None:
    """Whoever gave it closes it."""
    kit = Kit()
    asyncio.run(kit.authenticator.aclose())
    assert isinstance(kit.ask(), Principal)


def test_without_httpx2_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the authenticator is made, not at the first request."""
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(ModuleNotFoundError, match=r"fastapi-hardening\[http\]"):
        IntrospectionAuthenticator(settings())
