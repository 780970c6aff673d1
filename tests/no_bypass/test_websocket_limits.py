"""Limits on websockets hold wherever one is: by overrides where they stand, by the default where nothing is known."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI, WebSocket
from starlette.applications import Starlette
from starlette.routing import Mount, Router, WebSocketRoute
from starlette.types import Receive, Scope, Send

from fastapi_hardening import Settings, WebSocketLimits, harden
from tests.no_bypass.conftest import Answer, Build, Hardened, Knock, Site

# What is said: within the override of every route, beyond it, and beyond the default.
WITHIN, BEYOND, FAR_BEYOND = "x" * 10, "x" * 11, "x" * 1_000_001
LIMITED = WebSocketLimits(max_message_bytes=10)
FOREIGN = [("origin", "https://evil.example"), ("cookie", "session=1")]


async def listen(websocket: WebSocket) -> None:
    await websocket.accept()
    async for text in websocket.iter_text():
        await websocket.send_text(text)
    await websocket.send_text("never sent")


async def opaque(scope: Scope, receive: Receive, send: Send) -> None:
    await listen(WebSocket(scope, receive, send))


PLACEMENTS = ("/direct", "/included", "/1/2/3/4/5/6/7/8", "/mounted", "/included/mounted", "/mounted/mounted", "/host")
UNKNOWN = ("/starlette", "/router", "/opaque")
NOT_FOUND = ("/mounted", "/included/mounted", "/mounted/mounted", "/starlette", "/router")


@pytest.fixture(scope="module")
def site(surround: Callable[[Build], Site]) -> Site:
    """Give an application with every placement, in surroundings of each kind."""

    def build(telemetry: Any) -> FastAPI:
        app = FastAPI(telemetry=telemetry)
        included, child, grandchild, host = APIRouter(), FastAPI(), FastAPI(), FastAPI()
        for to, prefix in ((app, "/direct"), (included, ""), (child, ""), (grandchild, ""), (host, "/host")):
            to.add_api_websocket_route(prefix + "/listen", listen, dependencies=[LIMITED])
        child.mount("/mounted", grandchild)
        nested = included
        for segment in "8765432":
            outer = APIRouter()
            outer.include_router(nested, prefix=f"/{segment}")
            nested = outer
        app.include_router(nested, prefix="/1")
        app.mount("/mounted", child)
        included.mount("/mounted", child)
        app.include_router(included, prefix="/included")
        routes = [WebSocketRoute("/listen", listen)]
        app.mount("/starlette", Starlette(routes=routes))
        app.router.routes.append(Mount("/router", app=Router(routes)))
        app.mount("/opaque", opaque)
        app.host("host.test", host)
        return app

    return surround(build)


def ends(knock: Knock, site: Site, placement: str, text: str, headers: Sequence[tuple[str, str]] = ()) -> Answer | None:
    """What the server sees when this is said; ``None`` where Starlette does not find the websocket in any case."""
    answer = knock(
        site.app,
        f"{site.prefix}{placement}/listen",
        headers=[("host", "host.test" if placement == "/host" else "shop.test"), *headers],
        incoming=[{"type": "websocket.receive", "text": text}],
        root_path=site.root_path,
    )
    if site.around == "bare root path" and placement in NOT_FOUND and not headers:
        # Starlette routes by the path below a mount only if the whole path begins with the root path.
        assert answer.messages == [{"type": "websocket.close", "code": 1000, "reason": ""}]
        return None
    return answer


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_override_holds_on_the_websocket_that_runs(knock: Knock, site: Site, placement: str) -> None:
    """Wherever it stands, and exactly."""
    within, beyond = (ends(knock, site, placement, text) for text in (WITHIN, BEYOND))
    if within is None or beyond is None:
        return
    assert within.messages[1] == {"type": "websocket.send", "text": WITHIN}
    assert beyond.kinds == ["websocket.accept", "websocket.close"]
    assert beyond.messages[-1] == {"type": "websocket.close", "code": 1009, "reason": "message too large"}


@pytest.mark.parametrize("placement", UNKNOWN)
def test_default_holds_where_nothing_is_known(knock: Knock, site: Site, placement: str) -> None:
    """An application that is not looked into is not exempt."""
    within, beyond = (ends(knock, site, placement, text) for text in (BEYOND, FAR_BEYOND))
    if within is None or beyond is None:
        return
    assert within.messages[1] == {"type": "websocket.send", "text": BEYOND}
    assert beyond.messages[-1]["code"] == 1009


@pytest.mark.parametrize("placement", [*PLACEMENTS, *UNKNOWN, "/nowhere"])
def test_foreign_page_opens_none(knock: Knock, hardened: Hardened, site: Site, placement: str) -> None:
    """Not even one that does not exist."""
    answer = ends(knock, site, placement, WITHIN, FOREIGN)
    assert answer is not None
    assert answer.status == 403
    assert answer.problem["request_id"] == answer.one("x-request-id")
    hardened(answer)


LEVELS = ("app", "include", "router", "route")


@pytest.mark.parametrize("outer", LEVELS)
@pytest.mark.parametrize("inner", LEVELS)
def test_levels_merge_and_the_innermost_wins(knock: Knock, outer: str, inner: str) -> None:
    """Each level says what it names; of what several name, the innermost has the word."""
    at: dict[str, list[WebSocketLimits]] = {level: [] for level in LEVELS}
    at[outer].append(WebSocketLimits(max_message_bytes=5, messages="2/minute"))
    at[inner].append(WebSocketLimits(max_message_bytes=10))
    wins = 10 if LEVELS.index(inner) >= LEVELS.index(outer) else 5
    app, router = FastAPI(dependencies=at["app"]), APIRouter(dependencies=at["router"])
    router.add_api_websocket_route("/listen", listen, dependencies=at["route"])
    app.include_router(router, prefix="/in", dependencies=at["include"])
    harden(app, Settings(_env_file=None))
    codes = []
    for size, number in ((wins, 2), (wins, 3), (wins + 1, 1)):
        message = {"type": "websocket.receive", "text": "x" * size}
        answer = knock(app, "/in/listen", incoming=[message] * number)
        codes.append([message["code"] for message in answer.messages if message["type"] == "websocket.close"])
    assert codes == [[], [1008], [1009]]
