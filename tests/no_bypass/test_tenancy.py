"""With tenancy nothing answers a request without a tenant: no placement, no outcome, no websocket."""

from typing import Any

import pytest
from fastapi import FastAPI

from fastapi_hardening import Settings, harden
from tests.no_bypass import test_matrix, test_websockets
from tests.no_bypass.conftest import Ask, Hardened, Knock

NAMED = ("x-tenant", "acme")


def parted(app: FastAPI) -> FastAPI:
    """The application, hardened with a tenant for every request; headers are believed of the tests' client."""
    tenancy = {"sources": ["header"], "trusted_callers": ["0.0.0.0/0", "::/0"]}
    harden(app, Settings.model_validate({"tenancy": tenancy}))
    return app


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    """Give an application with every placement."""
    return parted(test_matrix.make_app(test_matrix.make_files(tmp_path_factory.mktemp("files")), None))


@pytest.fixture(scope="module")
def talking() -> FastAPI:
    """Give an application with every placement of a websocket."""
    return parted(test_websockets.make_app(None))


@pytest.mark.parametrize("placement", test_matrix.PLACEMENTS)
def test_nothing_answers_without_a_tenant(ask: Ask, hardened: Hardened, site: FastAPI, placement: str) -> None:
    """Each outcome that an endpoint, a mount or an error could have is a 400 instead, and with a tenant it is none."""
    leaks: list[Any] = []
    host = [("host", "host.test")] if placement == "/host" else []
    outcomes = [o for o in test_matrix.OUTCOMES if test_matrix.PLACEMENTS[placement] in o.where.split()]
    for outcome in outcomes:
        method, path = outcome.asked.split()
        headers, body = test_matrix.SENT[outcome.sent]
        asked = f"{method} {placement}{path}"
        answer = ask(site, asked, headers=[*host, *headers], chunks=body)
        hardened(answer)
        too_large = outcome.sent in ("declared", "11 bytes") and answer.status == 413
        said = method == "HEAD" or answer.problem["title"] in ("Tenant required", "Content Too Large")
        if not too_large and not (answer.status == 400 and said):
            leaks.append((outcome.asked, outcome.sent, answer.status))
    assert leaks == []
    assert outcomes
    path = outcomes[0].asked.split()[1]
    named = ask(site, f"GET {placement}{path}", headers=[*host, NAMED])
    assert named.status < 300


@pytest.mark.parametrize("placement", test_websockets.PLACEMENTS)
def test_no_websocket_opens_without_a_tenant(
    knock: Knock, hardened: Hardened, talking: FastAPI, placement: str
) -> None:
    """It is denied before anything of the application runs."""
    host = [("host", "host.test")] if placement == "/host" else []
    for outcome in test_websockets.OUTCOMES:
        path = placement + outcome.path
        answer = knock(talking, path, headers=host)
        assert answer.raised is None
        assert answer.status == 400, (outcome, answer.messages)
        hardened(answer)
