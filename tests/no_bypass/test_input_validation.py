"""Content is inspected wherever it goes in: on routes of every placement, on paths without one, by every way in."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI, Request, WebSocket
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route, Router, WebSocketRoute
from starlette.types import Receive, Scope, Send

from fastapi_hardening import InputPolicy, Settings, harden
from tests.no_bypass.conftest import Answer, Ask, Build, Hardened, Knock, Site

MARKUP = "<script>alert(1)</script>"
QUERY = "?q=%3Cscript%3Ealert(1)%3C/script%3E"
BODY = b"{\"text\": \"1' or '1'='1\"}"


async def take(request: Request) -> Response:
    return PlainTextResponse(await request.body())


async def listen(websocket: WebSocket) -> None:
    await websocket.accept()
    async for text in websocket.iter_text():
        await websocket.send_text(text)


async def opaque(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await listen(WebSocket(scope, receive, send))
    else:
        await (await take(Request(scope, receive)))(scope, receive, send)


PLACEMENTS = ("/direct", "/included", "/1/2/3/4/5/6/7/8", "/mounted", "/included/mounted", "/mounted/mounted", "/host")
UNKNOWN = ("/starlette", "/router", "/opaque")
NOWHERE = ("/nowhere", "/mounted/nowhere", "/opaque/nowhere")


@pytest.fixture(scope="module")
def site(surround: Callable[[Build], Site]) -> Site:
    """Give an application that enforces, with every placement, in surroundings of each kind."""

    def build(telemetry: Any) -> FastAPI:
        app = FastAPI(telemetry=telemetry)
        app.state.hardened_with = {"settings": Settings(_env_file=None, input_validation={"mode": "enforce"})}
        included, child, grandchild, host = APIRouter(), FastAPI(), FastAPI(), FastAPI()
        for to, prefix in ((app, "/direct"), (included, ""), (child, ""), (grandchild, ""), (host, "/host")):
            to.add_api_route(prefix + "/take", take, methods=["GET", "POST"])
            to.add_api_websocket_route(prefix + "/listen", listen)
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
        routes = [Route("/take", take, methods=["GET", "POST"]), WebSocketRoute("/listen", listen)]
        app.mount("/starlette", Starlette(routes=routes))
        app.router.routes.append(Mount("/router", app=Router(routes)))
        app.mount("/opaque", opaque)
        app.host("host.test", host)
        return app

    return surround(build)


def host_of(placement: str) -> tuple[str, str]:
    return ("host", "host.test" if placement == "/host" else "shop.test")


@pytest.mark.parametrize("placement", [*PLACEMENTS, *UNKNOWN, *NOWHERE])
@pytest.mark.parametrize(
    "attack",
    [
        ("GET /take" + QUERY, (), b""),
        ("PUT /take" + QUERY, (), b""),
        ("GET /take", [("cookie", "a=" + MARKUP)], b""),
        ("GET /take", [("user-agent", "() { :;}; /bin/cat /etc/passwd")], b""),
        ("POST /take", [("content-type", "application/json")], BODY),
        ("POST /take", [("content-type", "image/png")], MARKUP.encode()),
        ("POST /take", [], b"x=" + QUERY[3:].encode()),
    ],
    ids=["query", "wrong method", "cookie", "header", "JSON", "false type", "no type"],
)
def test_attack_is_refused_wherever_it_goes(
    ask: Ask, hardened: Hardened, site: Site, placement: str, attack: tuple[str, Sequence[tuple[str, str]], bytes]
) -> None:
    """With a problem that has the id, and before anything else answers, be it a 404 or a 405."""
    asked, headers, body = attack
    length = [("content-length", str(len(body)))] if body else []
    method, _, target = asked.partition(" ")
    # Half of the body in each of two messages.
    answer = ask(
        site.app,
        f"{method} {site.prefix}{placement}{target}",
        headers=[host_of(placement), *headers, *length],
        chunks=[body[:9], body[9:]],
        root_path=site.root_path,
    )
    if site.around == "in hardened":
        # The application around it is not told to refuse, and its layers are the ones that work.
        assert answer.status in (200, 404, 405)
        return
    assert answer.status == 422
    assert answer.problem["type"].endswith("#content-refused")
    assert answer.problem["request_id"] == answer.one("x-request-id")
    assert b"alert" not in answer.body
    hardened(answer)


@pytest.mark.parametrize("placement", [*PLACEMENTS, *UNKNOWN])
def test_attack_in_a_message_closes_the_websocket(knock: Knock, site: Site, placement: str) -> None:
    """Wherever the websocket is, and in text as in bytes."""
    for message in ({"text": MARKUP}, {"bytes": MARKUP.encode()}):
        answer: Answer = knock(
            site.app,
            f"{site.prefix}{placement}/listen",
            headers=[host_of(placement)],
            incoming=[{"type": "websocket.receive"} | message],
            root_path=site.root_path,
        )
        if site.around == "in hardened":
            continue
        # Starlette routes by the path below a mount only if the whole path begins with the root path.
        if answer.kinds != ["websocket.close"]:
            assert answer.messages[-1] == {"type": "websocket.close", "code": 1008, "reason": "Content refused"}
        else:
            assert site.around == "bare root path"


LEVELS = ("app", "include", "router", "route")


@pytest.mark.parametrize("outer", LEVELS)
@pytest.mark.parametrize("inner", LEVELS)
def test_innermost_mode_wins(ask: Ask, outer: str, inner: str) -> None:
    """Of two levels that name a mode the inner one has the word, and its allowances do not reach its neighbours."""
    at: dict[str, list[InputPolicy]] = {level: [] for level in LEVELS}
    at[outer].append(InputPolicy(mode="enforce"))
    at[inner].append(InputPolicy(mode="report"))
    wins = "report" if LEVELS.index(inner) >= LEVELS.index(outer) else "enforce"
    app, router = FastAPI(dependencies=at["app"]), APIRouter(dependencies=at["router"])
    router.add_api_route("/take", take, dependencies=at["route"])
    router.add_api_route("/other", take, dependencies=[InputPolicy(mode="enforce", allow={"query.q": ["xss"]})])
    app.include_router(router, prefix="/in", dependencies=at["include"])
    harden(app, Settings(_env_file=None))
    assert ask(app, "GET /in/take" + QUERY).status == (200 if wins == "report" else 422)
    assert ask(app, "GET /in/other" + QUERY).status == 200
    assert ask(app, "GET /in/other" + QUERY.replace("q=", "r=")).status == 422
