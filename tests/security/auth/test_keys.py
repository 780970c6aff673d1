"""Where keys come from: rotation, providers that change, lie, are slow, or are down."""

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from fastapi_hardening.core.check import CheckResult
from fastapi_hardening.core.clock import ManualClock
from fastapi_hardening.core.configuration import ConfigurationError
from fastapi_hardening.core.events import Events
from fastapi_hardening.core.identity import InvalidCredentials
from fastapi_hardening.security.auth.jwk import InvalidKey, KeySet
from fastapi_hardening.security.auth.keys import (
    HttpFetch,
    KeysRefreshed,
    KeysUnavailable,
    RemoteKeys,
    RemoteKeysSettings,
    RotatingKeys,
    StaticKeys,
    check_url,
)
from tests.security.auth.tokens import ISSUER, jwk, jwks, key

URL = "https://id.example/keys"
METADATA = ISSUER + "/.well-known/openid-configuration"


class Provider:
    """What a provider answers, and how often it was asked."""

    def __init__(self) -> None:
        self.answers: dict[str, bytes | Exception] = {URL: jwks(jwk("RS256", "a"))}
        self.asked: list[str] = []
        self.gate: asyncio.Event | None = None

    async def __call__(self, url: str) -> bytes:
        self.asked.append(url)
        if self.gate is not None:
            await self.gate.wait()
        answer = self.answers[url]
        if isinstance(answer, Exception):
            raise answer
        return answer


class Kit:
    """Keys of a provider, with a clock that can be moved."""

    def __init__(self, **changes: Any) -> None:
        self.clock = ManualClock()
        self.events = Events()
        self.seen: list[Any] = []
        self.events.subscribe(object, self.seen.append)
        self.provider = Provider()
        known: dict[str, Any] = {} if "issuer" in changes else {"jwks_url": URL}
        self.keys = RemoteKeys(
            RemoteKeysSettings(**known | changes), fetch=self.provider, clock=self.clock, events=self.events
        )

    @property
    def asked(self) -> int:
        return len(self.provider.asked)

    async def find(self, kid: str | None = "a", algorithm: str = "RS256") -> str | int:
        """How many keys are found, or why none can be."""
        try:
            return len(await self.keys.find(kid, algorithm))
        except InvalidCredentials as refusal:
            return refusal.reason

    async def settle(self) -> None:
        """Lets what runs in the background end."""
        if self.keys._flight is not None:
            await self.keys._flight

    def publishes(self, *kids: str) -> None:
        self.provider.answers[URL] = jwks(*(jwk("RS256", kid) for kid in kids))


def run(story: Callable[[], Awaitable[None]]) -> None:
    """Runs a story; one that hangs fails."""

    async def bounded() -> None:
        async with asyncio.timeout(10):
            await story()

    asyncio.run(bounded())


# --- keys of the configuration ----------------------------------------------------------------------------------------


def test_static_keys_stay() -> None:
    """They may be given one by one or as sets, and follow the rules of one set."""
    one, two = key("RS256", "a"), key("ES256", "b")
    for source in (StaticKeys(one, two), StaticKeys(KeySet([one, two])), StaticKeys(KeySet([one]), two)):
        assert asyncio.run(source.find("b", "ES256")) == (two,)
        assert source.generation == 0
    with pytest.raises(InvalidKey):
        StaticKeys()
    with pytest.raises(InvalidKey):
        StaticKeys(one, one)


def test_the_previous_key_is_accepted_for_a_while() -> None:
    """So that tokens which were signed before a rotation live on; then the generation changes."""

    async def story() -> None:
        clock = ManualClock()
        old, new, newest = (key("HS256", kid, which) for which, kid in enumerate("abc"))
        keys = RotatingKeys(old, overlap_seconds=60, clock=clock)
        keys.rotate(new)
        clock.advance(30)
        keys.rotate(newest)
        assert keys.current is newest
        assert [len(await keys.find(kid, "HS256")) for kid in "abc"] == [1, 1, 1]
        assert keys.generation == 0
        clock.advance(30)
        assert [len(await keys.find(kid, "HS256")) for kid in "abc"] == [0, 1, 1]
        assert keys.generation == 1
        clock.advance(30)
        assert keys.generation == 2
        assert [len(await keys.find(kid, "HS256")) for kid in "abc"] == [0, 0, 1]

    run(story)


def test_previous_keys_can_come_from_the_configuration_and_be_retired_at_once() -> None:
    """A key that has leaked is not waited for."""

    async def story() -> None:
        keys = RotatingKeys(key("HS256", "b"), key("HS256", "a", 1), overlap_seconds=60)
        assert len(await keys.find("a", "HS256")) == 1
        keys.retire()
        assert (len(await keys.find("a", "HS256")), keys.generation) == (0, 1)

    run(story)


def test_a_rotation_that_cannot_be_changes_nothing() -> None:
    """A name that is taken, or a secret after a public key."""
    old = key("RS256", "a")
    keys = RotatingKeys(old)
    for wrong in (key("RS256", "a", 1), key("HS256", "b")):
        with pytest.raises(InvalidKey):
            keys.rotate(wrong)
    assert keys.current is old
    assert asyncio.run(keys.find("a", "RS256")) == (old,)


# --- keys of a provider -----------------------------------------------------------------------------------------------


def test_keys_are_fetched_once_and_used_again() -> None:
    """At the first need, and not before."""

    async def story() -> None:
        kit = Kit()
        assert kit.asked == 0
        assert [await kit.find() for _ in range(5)] == [1] * 5
        assert kit.provider.asked == [URL]
        assert kit.seen == [KeysRefreshed(URL, 1, ("a",), ())]
        assert await kit.find(None) == 1

    run(story)


def test_many_wait_for_one_fetch() -> None:
    """A hundred requests at the start are one to the provider, also when the first of them gives up."""

    async def story() -> None:
        kit = Kit()
        kit.provider.gate = asyncio.Event()
        waiting = [asyncio.create_task(kit.find()) for _ in range(100)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        await asyncio.sleep(0)
        kit.provider.gate.set()
        found = await asyncio.gather(*waiting, return_exceptions=True)
        assert isinstance(found[0], asyncio.CancelledError)
        assert (found[1:], kit.asked) == ([1] * 99, 1)

    run(story)


def test_keys_are_refreshed_in_the_background_before_they_are_old() -> None:
    """Nobody waits: the answer comes from the keys that are there."""

    async def story() -> None:
        kit = Kit(max_age_seconds=100)
        await kit.find()
        kit.clock.advance(79)
        await kit.find()
        assert kit.asked == 1
        kit.clock.advance(1)
        kit.provider.gate = asyncio.Event()
        assert [await kit.find() for _ in range(3)] == [1] * 3
        await asyncio.sleep(0)
        assert kit.asked == 2
        kit.provider.gate.set()
        await kit.settle()
        kit.clock.advance(79)
        assert (await kit.find(), kit.asked) == (1, 2)

    run(story)


def test_keys_that_are_old_are_waited_for() -> None:
    """After a quiet night the first request sees the keys of today."""

    async def story() -> None:
        kit = Kit(max_age_seconds=100)
        await kit.find()
        kit.publishes("b")
        kit.clock.advance(100)
        assert await kit.find("b") == 1
        assert await kit.find("a") == 0
        assert kit.asked == 2
        kit.publishes("c")
        kit.clock.advance(100)
        kit.provider.gate = asyncio.Event()
        first = asyncio.create_task(kit.find("c"))
        second = asyncio.create_task(kit.find("c"))
        await asyncio.sleep(0)
        kit.provider.gate.set()
        assert (await first, await second, kit.asked) == (1, 1, 3)

    run(story)


def test_the_last_good_keys_are_used_while_the_provider_is_down() -> None:
    """Nobody waits for it a second time; after a day without it they are used no more."""

    async def story() -> None:
        kit = Kit(max_age_seconds=100, max_stale_seconds=1000, min_refresh_seconds=10)
        await kit.find()
        good = kit.provider.answers[URL]
        kit.provider.answers[URL] = ConnectionError("connection refused")
        kit.clock.advance(100)
        assert (await kit.find(), kit.asked) == (1, 2)
        assert kit.seen[-1] == KeysUnavailable(URL, "connection refused", 1)
        assert (await kit.keys.check()).status == "warn"
        assert kit.asked == 2
        kit.clock.advance(10)
        kit.provider.gate = asyncio.Event()
        assert await kit.find() == 1
        kit.provider.gate.set()
        await kit.settle()
        assert (kit.asked, kit.keys.generation) == (3, 0)
        kit.clock.advance(990)
        assert (await kit.find(), kit.asked, kit.keys.generation) == ("keys-unavailable", 4, 1)
        assert (await kit.keys.check()).status == "fail"
        kit.provider.answers[URL] = good
        assert await kit.find() == "keys-unavailable"
        kit.clock.advance(10)
        assert await kit.find() == 1
        assert await kit.keys.check() == CheckResult(observed=1, unit="keys")

    run(story)


def test_a_provider_that_was_never_there_is_asked_rarely() -> None:
    """Without keys each request is refused, and only one in ten seconds asks."""

    async def story() -> None:
        kit = Kit(min_refresh_seconds=10)
        kit.provider.answers[URL] = TimeoutError()
        assert [await kit.find() for _ in range(20)] == ["keys-unavailable"] * 20
        assert kit.asked == 1
        assert kit.seen == [KeysUnavailable(URL, "TimeoutError", 0)]
        assert await kit.keys.check() == CheckResult("fail", f"no keys of {URL}: TimeoutError")
        kit.clock.advance(10)
        kit.publishes("a")
        assert (await kit.find(), kit.asked) == (1, 2)

    run(story)


def test_a_provider_that_does_not_answer_is_not_waited_for_longer() -> None:
    """The time is over for all steps together."""

    async def story() -> None:
        kit = Kit(timeout_seconds=0.001)
        kit.provider.gate = asyncio.Event()
        assert await kit.find() == "keys-unavailable"
        assert await kit.keys.refresh() is False

    run(story)


def test_a_new_kid_has_the_keys_fetched_again() -> None:
    """When the provider has rotated its keys, its new tokens hold at once."""

    async def story() -> None:
        kit = Kit()
        await kit.find()
        first = kit.keys.keys[0]
        kit.publishes("a", "b")
        kit.clock.advance(60)
        assert (await kit.find("b"), kit.asked) == (1, 2)
        assert kit.seen[-1] == KeysRefreshed(URL, 2, ("b",), ())
        assert kit.keys.keys[0] is first
        assert kit.keys.generation == 0

    run(story)


def test_unknown_kids_do_not_flood_the_provider() -> None:
    """A thousand invented names are one request in a minute; names that are known, with another algorithm, none."""

    async def story() -> None:
        kit = Kit(unknown_kid_cooldown_seconds=60, min_refresh_seconds=10)
        await kit.find()
        assert [await kit.find(f"x{number}") for number in range(1000)] == [0] * 1000
        assert kit.asked == 1
        kit.clock.advance(10)
        assert [await kit.find(f"x{number}") for number in range(1000)] == [0] * 1000
        assert kit.asked == 2
        kit.clock.advance(59)
        assert (await kit.find("x"), kit.asked) == (0, 2)
        kit.clock.advance(1)
        assert (await kit.find("x"), kit.asked) == (0, 3)
        kit.clock.advance(60)
        assert (await kit.find("a", "ES256"), await kit.find(None, "ES256"), kit.asked) == (0, 0, 3)

    run(story)


def test_whoever_comes_with_a_new_kid_during_a_fetch_waits_for_it() -> None:
    """The first hundred tokens of a rotation are one request to the provider."""

    async def story() -> None:
        kit = Kit()
        await kit.find()
        kit.publishes("b")
        kit.clock.advance(60)
        kit.provider.gate = asyncio.Event()
        waiting = [asyncio.create_task(kit.find("b")) for _ in range(100)]
        await asyncio.sleep(0)
        kit.provider.gate.set()
        assert (await asyncio.gather(*waiting), kit.asked) == ([1] * 100, 2)

    run(story)


def test_a_key_that_is_gone_changes_the_generation() -> None:
    """What it has proven is not remembered any longer; a key that has come changes nothing."""

    async def story() -> None:
        kit = Kit()
        kit.publishes("a", "b")
        await kit.find()
        kit.publishes("b", "c")
        assert await kit.keys.refresh()
        assert kit.keys.generation == 1
        assert kit.seen[-1] == KeysRefreshed(URL, 2, ("c",), ("a",))
        kit.provider.answers[URL] = jwks(jwk("RS256", "b", which=1), jwk("RS256", "c"))
        await kit.keys.refresh()
        assert kit.keys.generation == 2

    run(story)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"<html>",
        b"{}",
        b'{"keys":[]}',
        b'{"keys":[],"keys":[]}',
        jwks(jwk("HS256", "a")),
        jwks(jwk("RS256", "a"), jwk("ES256", "a")),
        jwks(jwk("RS256", "a"), jwk("HS256", "b")),
        jwks(jwk("RS256", "b", use="enc")),
        b'{"a":' * 10_000,
        b" " * 262_145,
    ],
)
def test_an_answer_that_is_no_key_set_is_not_taken(answer: bytes) -> None:
    """The last good keys stay; a published secret, doubtful names and a mixed set are no keys."""

    async def story() -> None:
        kit = Kit()
        await kit.find()
        kit.provider.answers[URL] = answer
        assert not await kit.keys.refresh()
        assert (await kit.find(), kit.keys.generation) == (1, 0)
        assert isinstance(kit.seen[-1], KeysUnavailable)

    run(story)


def test_keys_that_cannot_be_used_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """And the log says which."""
    caplog.set_level("INFO")

    async def story() -> None:
        kit = Kit(algorithms=["RS256"])
        kit.provider.answers[URL] = jwks(jwk("RS256", "a"), jwk("RS256", "e", use="enc"), jwk("ES256", "x"))
        assert (await kit.find("a"), await kit.find("e"), await kit.find("x", "ES256")) == (1, 0, 0)

    run(story)
    assert "('e', 'use'), ('x', 'algorithm-not-allowed')" in caplog.text


def test_a_fetch_left_behind_by_a_loop_that_ended_is_not_waited_for() -> None:
    """Test clients run each request in a loop of its own."""
    kit = Kit()
    kit.provider.gate = asyncio.Event()

    async def gives_up() -> None:
        kit.keys._flight = kit.keys._begin()
        await asyncio.sleep(0)

    asyncio.run(gives_up())
    kit.provider.gate = None
    kit.clock.advance(10)
    assert asyncio.run(kit.find()) == 1


def test_events_are_optional() -> None:
    """The keys of a provider work alone."""
    provider = Provider()
    keys = RemoteKeys(RemoteKeysSettings(jwks_url=URL), fetch=provider)
    assert asyncio.run(keys.refresh())
    provider.answers[URL] = b""
    assert not asyncio.run(keys.refresh())


# --- discovery --------------------------------------------------------------------------------------------------------


def metadata(**changes: Any) -> bytes:
    """What a provider says of itself."""
    return json.dumps({"issuer": ISSUER, "jwks_uri": URL} | changes).encode()


def test_the_metadata_of_an_issuer_says_where_its_keys_are() -> None:
    """At the well-known place below the issuer, or where the configuration says."""

    async def story() -> None:
        kit = Kit(issuer=ISSUER)
        kit.provider.answers[METADATA] = metadata()
        assert await kit.find() == 1
        assert kit.provider.asked == [METADATA, URL]
        assert kit.seen == [KeysRefreshed(ISSUER, 1, ("a",), ())]
        elsewhere = "https://id.example/.well-known/oauth-authorization-server/realms/shop"
        other = Kit(issuer=ISSUER, metadata_url=elsewhere)
        other.provider.answers[elsewhere] = metadata()
        assert await other.find() == 1

    run(story)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (metadata(issuer=ISSUER + "/"), "another issuer"),
        (metadata(issuer="https://evil.example"), "another issuer"),
        (metadata(issuer=None), "another issuer"),
        (metadata(jwks_uri=None), "no jwks_uri"),
        (metadata(jwks_uri=["https://id.example/keys"]), "no jwks_uri"),
        (metadata(jwks_uri="https://evil.example/keys"), "not allowed"),
        (metadata(jwks_uri="https://id.example.evil.example/keys"), "not allowed"),
        (metadata(jwks_uri="https://id.example@evil.example/keys"), "no user"),
        (metadata(jwks_uri="http://id.example/keys"), "https"),
        (metadata(jwks_uri="http://169.254.169.254/latest"), "https"),
        (metadata(jwks_uri="file:///etc/passwd"), "host"),
        (metadata(jwks_uri="https://id.example\\@evil.example/"), "characters"),
        (b'{"issuer":"' + ISSUER.encode() + b'","issuer":"x"}', "twice"),
    ],
)
def test_metadata_that_leads_elsewhere_is_not_followed(answer: bytes, error: str) -> None:
    """Guards against forged metadata: another issuer, another host, another scheme."""

    async def story() -> None:
        kit = Kit(issuer=ISSUER)
        kit.provider.answers[METADATA] = answer
        assert await kit.find() == "keys-unavailable"
        assert kit.provider.asked == [METADATA]
        assert error in kit.seen[-1].error

    run(story)


def test_metadata_may_lead_to_a_host_that_is_named() -> None:
    """Google's keys are on another host than its issuer."""

    async def story() -> None:
        kit = Kit(issuer=ISSUER, allowed_hosts=["Keys.Example"])
        kit.provider.answers |= {
            METADATA: metadata(jwks_uri="https://keys.example/k"),
            "https://keys.example/k": jwks(jwk("ES256", "a")),
        }
        assert await kit.find("a", "ES256") == 1

    run(story)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "either jwks_url or issuer"),
        ({"jwks_url": URL, "issuer": ISSUER}, "either jwks_url or issuer"),
        ({"jwks_url": URL, "metadata_url": METADATA}, "goes with issuer"),
    ],
)
def test_settings_say_where_the_keys_are(changes: dict[str, Any], message: str) -> None:
    """In one way."""
    with pytest.raises(ValueError, match=message):
        RemoteKeysSettings(**changes)


@pytest.mark.parametrize(
    "url",
    [
        "http://id.example/keys",
        "http://127.0.0.1/keys",
        "ftp://id.example/keys",
        "//id.example/keys",
        "https:///keys",
        "https://user:password@id.example/keys",
        "https://id.example/keys#fragment",
        "https://id.example/ke ys",
        "https://id.example/ke\nys",
        "https://id.exаmple/keys",  # noqa: RUF001 - a Cyrillic letter
        "https://id.example:port/keys",
        "https://[::1/keys",
        "",
    ],
)
def test_addresses_of_keys_are_https(url: str) -> None:
    """A wrong one is a mistake of the configuration, told at the start."""
    with pytest.raises(ConfigurationError):
        RemoteKeys(RemoteKeysSettings(jwks_url=url), fetch=Provider())


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1.2.3", "[::1]"])
def test_a_provider_on_this_machine_may_be_asked_without_tls_if_that_is_set(host: str) -> None:
    """For development; another machine may not."""
    check_url(f"http://{host}:8080/keys", allowed_hosts=None, allow_loopback_http=True)
    with pytest.raises(ConfigurationError, match="allow_loopback_http"):
        check_url(f"http://{host}:8080/keys", allowed_hosts=None)
    for other in ("10.0.0.1", "id.example", "localhost.example", "0.0.0.0", "[::ffff:7f00:1]0"):
        with pytest.raises(ConfigurationError):
            check_url(f"http://{other}/keys", allowed_hosts=None, allow_loopback_http=True)


# --- over a socket ----------------------------------------------------------------------------------------------------


async def fetched(answer: bytes, *, max_bytes: int = 2000) -> bytes | str:
    """What is got from a server that answers so, or the error."""
    requests: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(answer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        try:
            fetch = HttpFetch(timeout_seconds=5, max_bytes=max_bytes)
            body = await fetch(f"http://127.0.0.1:{port}/keys")
            assert await fetch(f"http://127.0.0.1:{port}/keys?again") == body
        except ValueError as error:
            return str(error)
    assert len(requests) == 2
    assert b"accept-encoding: identity" in requests[0].lower()
    return body


def reply(body: bytes, status: str = "200 OK", fields: str = "") -> bytes:
    """An answer of HTTP/1.1."""
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{fields}\r\n".encode() + body


def test_keys_come_over_http() -> None:
    """A 200 is taken as it is."""
    assert asyncio.run(fetched(reply(b'{"keys":[]}'))) == b'{"keys":[]}'


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (reply(b"", "302 Found", "Location: http://127.0.0.1:1/\r\n"), "answers 302"),
        (reply(b"{}", "404 Not Found"), "answers 404"),
        (reply(b"{}", "500 Internal Server Error"), "answers 500"),
        (reply(b"x" * 2001), "more than 2000 bytes"),
        (reply(b"x" * 100, fields="Content-Encoding: gzip\r\n"), "compressed"),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"800\r\n" + b"x" * 2048 + b"\r\n0\r\n\r\n",
            "more than",
        ),
    ],
)
def test_answers_that_are_no_keys_are_refused(answer: bytes, error: str) -> None:
    """Redirects are not followed, errors not read, bombs not unpacked, and what is long is left."""
    found = asyncio.run(fetched(answer))
    assert isinstance(found, str)
    assert error in found


def test_an_issuer_on_this_machine_is_found_and_asked() -> None:
    """Metadata, keys and their health, over real sockets, as it is in development."""

    async def story() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            line = await reader.readuntil(b"\r\n\r\n")
            is_metadata = b" /.well-known/openid-configuration " in line
            document = metadata(issuer=issuer, jwks_uri=f"{issuer}/keys") if is_metadata else jwks(jwk("ES256", "a"))
            writer.write(reply(document))
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            issuer = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            keys = RemoteKeys(RemoteKeysSettings(issuer=issuer, allow_loopback_http=True))
            assert [found.kid for found in await keys.find("a", "ES256")] == ["a"]
            assert (await keys.check()).status == "pass"
        assert not await keys.refresh()
        assert (await keys.check()).status == "warn"

    run(story)


def test_without_httpx2_the_configuration_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the start, not at the first request."""
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(ConfigurationError, match=r"fastapi-hardening\[http\]"):
        RemoteKeys(RemoteKeysSettings(jwks_url=URL))
