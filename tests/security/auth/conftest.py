"""What the tests of authentication share: an authenticator as an application would write one, and a hardened kit."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from starlette.requests import HTTPConnection
from starlette.testclient import TestClient

from fastapi_hardening import Settings, harden
from fastapi_hardening.core.clock import ManualClock
from fastapi_hardening.core.events import RequestRefused
from fastapi_hardening.core.identity import Authenticator, InvalidCredentials, Principal

ANNA = Principal("anna", scopes=frozenset({"orders:read"}), roles=frozenset({"clerk"}))
BEN = Principal("ben", scopes=frozenset({"orders:read", "orders:write"}), roles=frozenset({"admin"}))
KNOWN: Mapping[str, Principal] = {"anna": ANNA, "ben": BEN}


class Tokens:
    """An authenticator of an application: bearer tokens that it knows by heart."""

    scheme = "bearer"
    challenge = "Bearer"
    ambient = False

    def __init__(self, known: Mapping[str, Principal] = KNOWN, *, raises: Exception | None = None) -> None:
        self.known = known
        self.raises = raises
        self.asked = 0

    async def authenticate(self, connection: HTTPConnection) -> Principal | None:
        self.asked += 1
        if self.raises is not None:
            raise self.raises
        scheme, _, token = connection.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return None
        if token not in self.known:
            raise InvalidCredentials("unknown token")
        return self.known[token]


def bearer(token: str) -> dict[str, str]:
    """The field with a token."""
    return {"Authorization": f"Bearer {token}"}


class Kit:
    """A hardened application with a clock that can be moved, and the refusals that it told of."""

    def __init__(
        self,
        app: FastAPI | None = None,
        authenticators: Sequence[Authenticator] | None = None,
        *,
        auth: Mapping[str, Any] | None = None,
        permissions_of: Any = None,
        **settings: Any,
    ) -> None:
        self.clock = ManualClock()
        self.app = app or FastAPI()
        self.tokens = Tokens()
        self.handle = harden(
            self.app,
            Settings(_env_file=None, auth=dict(auth or {}), **settings),
            authenticators=[self.tokens] if authenticators is None else authenticators,
            permissions_of=permissions_of,
            clock=self.clock,
        )
        self.refusals: list[RequestRefused] = []
        self.handle.events.subscribe(RequestRefused, self.refusals.append)

    def client(self, base_url: str = "http://testserver", *, raising: bool = True) -> TestClient:
        return TestClient(self.app, base_url=base_url, raise_server_exceptions=raising)
