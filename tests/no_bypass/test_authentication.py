"""With authentication required nothing leads round it: no placement, no outcome, no surroundings, no websocket."""

from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.requests import HTTPConnection

from fastapi_hardening import Settings
from fastapi_hardening.core.identity import InvalidCredentials, Principal
from tests.no_bypass import test_matrix, test_websockets
from tests.no_bypass.conftest import Ask, Build, Hardened, Knock, Site

ANNA = ("authorization", "Bearer anna")
FORGED = ("authorization", "Bearer forged")


class Tokens:
    """Knows one token."""

    scheme = "bearer"
    challenge = "Bearer"

    async def authenticate(self, connection: HTTPConnection) -> Principal | None:
        sent = connection.headers.get("authorization")
        if sent not in (None, "Bearer anna"):
            raise InvalidCredentials("unknown token")
        return None if sent is None else Principal("anna")


def closed(app: FastAPI) -> FastAPI:
    """The application, to be hardened with everything closed."""
    settings = Settings(_env_file=None, auth={"default": "required"})
    app.state.hardened_with = {"settings": settings, "authenticators": [Tokens()]}
    return app


@pytest.fixture(scope="module")
def site(surround: Callable[[Build], Site], tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Give a closed application with every placement, in surroundings of each kind."""
    files = test_matrix.make_files(tmp_path_factory.mktemp("files"))
    return surround(lambda telemetry: closed(test_matrix.make_app(files, telemetry)))


@pytest.fixture(scope="module")
def talking(surround: Callable[[Build], Site]) -> Site:
    """Give a closed application with every placement of a websocket, in surroundings of each kind."""
    return surround(lambda telemetry: closed(test_websockets.make_app(telemetry)))


@pytest.mark.parametrize("placement", test_matrix.PLACEMENTS)
def test_nothing_answers_somebody_unknown(ask: Ask, hardened: Hardened, site: Site, placement: str) -> None:
    """Each outcome that an endpoint, a mount or an error could have is a 401 instead, and a forged token no key."""
    leaks: list[Any] = []
    outcomes = [o for o in test_matrix.OUTCOMES if test_matrix.PLACEMENTS[placement] in o.where.split()]
    for outcome in outcomes:
        method, path = outcome.asked.split()
        headers, body = test_matrix.SENT[outcome.sent]
        host = [("host", "host.test")] if placement == "/host" else []
        for credentials, challenge in (([], "Bearer"), ([FORGED], 'Bearer error="invalid_token"')):
            answer = ask(
                site.app,
                f"{method} {site.prefix}{placement}{path}",
                headers=[*host, *headers, *credentials],
                chunks=body,
                root_path=site.root_path,
            )
            hardened(answer)
            # What says itself that it is too large is refused before anybody is asked who it is.
            too_large = outcome.sent in ("declared", "11 bytes") and answer.status == 413
            if not too_large and (answer.status != 401 or answer.all("www-authenticate") != [challenge]):
                leaks.append((outcome.asked, outcome.sent, answer.status))
            if test_matrix.SECRET.encode() in answer.body or answer.raised is not None:
                leaks.append((outcome.asked, "said something"))
    assert leaks == []
    assert outcomes


@pytest.mark.parametrize("placement", test_matrix.PLACEMENTS)
def test_who_is_known_gets_what_there_is(ask: Ask, site: Site, placement: str) -> None:
    """The layer changes nothing for a caller that it lets in."""
    for outcome in test_matrix.OUTCOMES:
        if test_matrix.PLACEMENTS[placement] not in outcome.where.split():
            continue
        expected = test_matrix.as_the_framework_has_it(site, placement, outcome)
        method, path = outcome.asked.split()
        headers, body = test_matrix.SENT[outcome.sent]
        host = [("host", "host.test")] if placement == "/host" else []
        asked = f"{method} {site.prefix}{placement}{path}"
        answer = ask(site.app, asked, headers=[*host, *headers, ANNA], chunks=body, root_path=site.root_path)
        assert answer.status == expected.status, (outcome, answer.messages, answer.raised)


@pytest.mark.parametrize("denial", [True, False], ids=["denial", "close"])
@pytest.mark.parametrize("placement", test_websockets.PLACEMENTS)
def test_no_websocket_opens_for_somebody_unknown(
    knock: Knock, hardened: Hardened, talking: Site, placement: str, denial: bool
) -> None:
    """It is denied, or closed as a violation of policy, before anything of the application runs."""
    for outcome in test_websockets.OUTCOMES:
        for credentials in ([], [FORGED]):
            host = [("host", "host.test")] if placement == "/host" else []
            answer = knock(
                talking.app,
                talking.prefix + placement + outcome.path,
                headers=[*host, *credentials],
                incoming=[{"type": "websocket.receive", "text": "hello"}],
                denial=denial,
                root_path=talking.root_path,
            )
            assert answer.raised is None
            if denial:
                assert answer.status == 401, (outcome, answer.messages)
                hardened(answer)
            else:
                assert answer.messages == [{"type": "websocket.close", "code": 1008, "reason": "Unauthorized"}]


@pytest.mark.parametrize("placement", test_websockets.PLACEMENTS)
def test_a_websocket_opens_for_who_is_known(knock: Knock, talking: Site, placement: str) -> None:
    """Wherever it is."""
    mount = placement.rpartition("/")[2]
    if talking.around == "bare root path" and mount in ("mounted", "starlette", "router"):
        return  # Starlette itself does not find it there.
    host = [("host", "host.test")] if placement == "/host" else []
    answer = knock(
        talking.app,
        f"{talking.prefix}{placement}/echo",
        headers=[*host, ANNA],
        incoming=[{"type": "websocket.receive", "text": "hello"}],
        root_path=talking.root_path,
    )
    assert answer.kinds[0] == "websocket.accept"
