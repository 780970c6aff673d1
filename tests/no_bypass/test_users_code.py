"""What the application's author wrote keeps its word, and its answers are hardened like all others."""

from typing import Any

import pytest
from fastapi import APIRouter, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.httpsredirect import HTTPSRedirectMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.routing import Host
from starlette.types import ASGIApp, Receive, Scope, Send

from fastapi_hardening import Problem, harden
from fastapi_hardening.core.clock import ManualClock
from fastapi_hardening.resilience.drain import Draining
from tests.no_bypass.conftest import Ask, Hardened

SECRET = "a secret of the exception"
PLACEMENTS = ("/direct", "/1/2/3/4/5/6/7/8", "/mounted")


class BrokenError(Exception):
    """Raised by an endpoint."""


class SmallBrokenError(BrokenError):
    """A kind of it."""


async def ok() -> str:
    return "ok"


async def boom() -> None:
    raise SmallBrokenError(SECRET)


async def teapot() -> None:
    raise HTTPException(418, "short and stout")


async def problem() -> None:
    raise Problem(status=409)


async def number(number: int) -> int:
    return number


async def read(request: Request) -> int:
    return len(await request.body())


def add_routes(to: FastAPI | APIRouter, prefix: str = "") -> None:
    """Adds the same routes anywhere."""
    for endpoint in (ok, boom, teapot, problem):
        to.add_api_route(f"{prefix}/{endpoint.__name__}", endpoint)
    to.add_api_route(prefix + "/number/{number}", number)
    to.add_api_route(prefix + "/read", read, methods=["POST"], max_body_size=3)


def make_app(handlers: dict[Any, Any] | None = None) -> FastAPI:
    """An application with the routes in three places, and these exception handlers in both applications."""
    app, child, router = (
        FastAPI(exception_handlers=handlers, max_body_size=10),
        FastAPI(exception_handlers=handlers),
        APIRouter(),
    )
    add_routes(app, "/direct")
    add_routes(child)
    app.mount("/mounted", child)
    add_routes(router)
    for segment in "8765432":
        outer = APIRouter()
        outer.include_router(router, prefix=f"/{segment}")
        router = outer
    app.include_router(router, prefix="/1")
    return app


async def mine(_request: Request, _exception: Exception) -> JSONResponse:
    return JSONResponse({"mine": True}, 299, {"X-Mine": "yes"})


def mine_too(_request: Request, _exception: Exception) -> JSONResponse:
    return JSONResponse({"mine": True}, 299, {"X-Mine": "yes"})


HANDLED = [
    (BrokenError, "GET /boom"),
    (SmallBrokenError, "GET /boom"),
    (Exception, "GET /boom"),
    (500, "GET /boom"),
    (HTTPException, "GET /teapot"),
    (StarletteHTTPException, "GET /teapot"),
    (418, "GET /teapot"),
    (StarletteHTTPException, "GET /nowhere"),
    (404, "GET /nowhere"),
    (StarletteHTTPException, "PUT /ok"),
    (405, "PUT /ok"),
    (Problem, "GET /problem"),
    (HTTPException, "GET /problem"),
    (409, "GET /problem"),
    (RequestValidationError, "GET /number/x"),
    (413, "POST /read"),
    (StarletteHTTPException, "POST /read"),
]


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("handler", [mine, mine_too])
@pytest.mark.parametrize(("handled", "asked"), HANDLED)
def test_users_exception_handler_answers(
    ask: Ask, hardened: Hardened, *, placement: str, handler: Any, handled: Any, asked: str
) -> None:
    """An exception handler of the application answers as it wants to; the id and the header fields come with it."""
    app = make_app({handled: handler})
    harden(app)
    answer = ask(app, asked.replace(" ", " " + placement), chunks=[b"four", b"!"])
    assert answer.status == 299
    assert answer.body == b'{"mine":true}'
    assert answer.one("x-mine") == "yes"
    hardened(answer)
    assert (answer.raised is not None) == (handled in (Exception, 500))


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(("handled", "asked"), HANDLED)
def test_handler_added_after_harden_answers(
    ask: Ask, hardened: Hardened, placement: str, handled: Any, asked: str
) -> None:
    """It makes no difference whether an exception handler was added before or after harden()."""
    app = make_app()
    harden(app)
    app.add_exception_handler(handled, mine)
    for route in app.routes:
        if getattr(route, "path", "") == "/mounted":
            route.app.add_exception_handler(handled, mine)  # type: ignore[attr-defined]
    answer = ask(app, asked.replace(" ", " " + placement), chunks=[b"four", b"!"])
    assert (answer.status, answer.body) == (299, b'{"mine":true}')
    hardened(answer)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(("handled", "asked"), HANDLED)
def test_handler_that_fails_gives_way_to_a_problem(
    ask: Ask, hardened: Hardened, placement: str, handled: Any, asked: str
) -> None:
    """An exception handler that fails itself ends in a 500 problem that tells nothing of either exception."""

    async def fail(_request: Request, _exception: Exception) -> JSONResponse:
        raise RuntimeError(SECRET)

    app = make_app({handled: fail})
    harden(app)
    answer = ask(app, asked.replace(" ", " " + placement), chunks=[b"four", b"!"])
    assert answer.status == 500
    assert answer.problem["request_id"] == answer.one("x-request-id")
    assert SECRET.encode() not in answer.body
    hardened(answer)


# --- mounted applications ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["GET /nowhere", "PUT /ok", "GET /teapot", "GET /number/x", "GET /boom"])
@pytest.mark.parametrize("where", ["application", "router", "late router", "mounted application", "host"])
@pytest.mark.parametrize("late", [False, True], ids=["at once", "while it serves"])
def test_errors_of_a_mounted_application_are_problems(
    ask: Ask, hardened: Hardened, *, asked: str, where: str, late: bool
) -> None:
    """Wherever and whenever an application is mounted, its errors are problems with the id of the answer."""
    app, router, between, child = FastAPI(), APIRouter(), FastAPI(), FastAPI()
    add_routes(app)
    add_routes(child)
    if where != "late router":
        app.include_router(router, prefix="/in")
    app.mount("/between", between)
    harden(app)
    if late:
        ask(app, "GET /ok")
    if where == "late router":
        app.include_router(router, prefix="/in")
        ask(app, "GET /ok")
    if where == "host":
        app.router.routes.insert(0, Host("host.test", child))
    else:
        to = {"application": app, "mounted application": between}.get(where, router)
        to.mount("/child", child)
    prefix = {"application": "/child", "mounted application": "/between/child", "host": ""}.get(where, "/in/child")
    host = [("host", "host.test")] if where == "host" else []
    answer = ask(app, asked.replace(" ", " " + prefix), headers=host)
    assert answer.problem["request_id"] == answer.one("x-request-id")
    hardened(answer)


def test_errors_of_an_application_that_has_served_alone_are_problems(ask: Ask) -> None:
    """An application that has served on its own before it is mounted answers errors as all others do."""
    app, child = FastAPI(), make_app()
    assert (ask(child, "GET /direct/teapot")).one("content-type") == "application/json"
    app.mount("/child", child)
    harden(app)
    for asked in (
        "GET /child/nowhere",
        "GET /child/direct/teapot",
        "GET /child/direct/boom",
        "GET /child/mounted/boom",
    ):
        assert (ask(app, asked)).problem["status"] in (404, 418, 500)


# --- middlewares ------------------------------------------------------------------------------------------------------


class Raising:
    """A user's middleware that raises on the way in, or once the answer has started."""

    def __init__(self, app: ASGIApp, *, exception: Exception, late: bool = False) -> None:
        self.app = app
        self._exception = exception
        self._late = late

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._late:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        raise self._exception


class Adding:
    """A user's middleware that adds a field to what comes from inside."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_more(message: Any) -> None:
            if message["type"] == "http.response.start":
                # A tuple, which ASGI allows as well.
                more = ((b"x-mine", b"yes"), (b"x-request-id", b"mine"), (b"set-cookie", b"c=3"))
                message["headers"] = (*message["headers"], *more)
            await send(message)

        await self.app(scope, receive, send_more)


PREFLIGHT = [("origin", "https://a.test"), ("access-control-request-method", "GET")]
WHEN = pytest.mark.parametrize("after", [False, True], ids=["added before harden()", "added after harden()"])


def with_middleware(after: bool, middleware: Any, **options: Any) -> FastAPI:
    """The application, hardened before or after its middleware was added."""
    app = make_app()
    if after:
        harden(app)
    app.add_middleware(middleware, **options)
    if not after:
        harden(app)
    return app


@WHEN
@pytest.mark.parametrize("placement", [*PLACEMENTS, "/nowhere"])
def test_middleware_that_raises_ends_in_a_problem(ask: Ask, hardened: Hardened, placement: str, after: bool) -> None:
    """A middleware of the application that fails ends in a 500 problem with the id and the header fields."""
    app = with_middleware(after, Raising, exception=BrokenError(SECRET))
    answer = ask(app, f"GET {placement}/ok")
    assert answer.status == 500
    assert answer.problem["request_id"] == answer.one("x-request-id")
    assert SECRET.encode() not in answer.body
    assert isinstance(answer.raised, BrokenError)
    hardened(answer)


@WHEN
@pytest.mark.parametrize("raised", [HTTPException(403, "not you"), Problem("not you", status=403)], ids=repr)
@pytest.mark.parametrize("handled", [None, 403, StarletteHTTPException])
def test_refusal_of_a_middleware_is_answered(
    ask: Ask, hardened: Hardened, *, after: bool, raised: HTTPException, handled: Any
) -> None:
    """A middleware that raises an HTTPException refuses by it, as an endpoint would; the user's handler answers it."""
    app = make_app({handled: mine} if handled else None)
    if after:
        harden(app)
    app.add_middleware(Raising, exception=raised)
    if not after:
        harden(app)
    answer = ask(app, "GET /direct/ok")
    if handled:
        assert (answer.status, answer.body) == (299, b'{"mine":true}')
    else:
        assert answer.status == 403
        assert answer.problem["detail"] == "not you"
    assert answer.raised is None
    hardened(answer)


@WHEN
def test_middleware_that_raises_late_has_a_hardened_start(ask: Ask, hardened: Hardened, after: bool) -> None:
    """Where an answer has started before a middleware fails, its start is hardened and nothing is added to it."""
    app = with_middleware(after, Raising, exception=BrokenError(SECRET), late=True)
    answer = ask(app, "GET /direct/ok")
    assert answer.kinds == ["http.response.start"]
    assert isinstance(answer.raised, BrokenError)
    hardened(answer)


@WHEN
@pytest.mark.parametrize("asked", ["GET /direct/ok", "GET /direct/boom", "GET /nowhere", "POST /direct/read"])
def test_field_of_a_middleware_stays(ask: Ask, hardened: Hardened, after: bool, asked: str) -> None:
    """What a middleware adds to an answer stays, but for the request id, which is ours."""
    app = with_middleware(after, Adding)
    answer = ask(app, asked, chunks=[b"four"])
    if answer.status != 500:
        # The 500 page is made outside of the application's own middlewares, with and without us.
        assert answer.one("x-mine") == "yes"
    assert answer.one("x-request-id") != "mine"
    hardened(answer)


@WHEN
@pytest.mark.parametrize(
    ("middleware", "sent", "status"),
    [
        (Middleware(TrustedHostMiddleware, allowed_hosts=["other.test"]), [], 400),
        (Middleware(HTTPSRedirectMiddleware), [], 307),
        (Middleware(CORSMiddleware, allow_origins=["https://a.test"]), PREFLIGHT, 200),
        (Middleware(CORSMiddleware, allow_origins=["https://b.test"]), PREFLIGHT, 400),
    ],
)
def test_answer_of_a_middleware_is_hardened(
    ask: Ask, hardened: Hardened, *, after: bool, middleware: Middleware, sent: Any, status: int
) -> None:
    """A middleware that answers instead of the endpoint carries the id and the header fields."""
    app = with_middleware(after, middleware.cls, **middleware.kwargs)
    answer = ask(app, "OPTIONS /direct/ok", headers=sent)
    assert answer.status == status
    hardened(answer)


@WHEN
def test_every_cookie_stays(ask: Ask, hardened: Hardened, after: bool) -> None:
    """Cookies of the endpoint and of a middleware all reach the client."""
    app = with_middleware(after, Adding)

    @app.get("/cookies")
    async def cookies() -> PlainTextResponse:
        response = PlainTextResponse("ok")
        response.set_cookie("a", "1")
        response.set_cookie("b", "2")
        return response

    answer = ask(app, "GET /cookies")
    assert [cookie.partition("=")[0] for cookie in answer.all("set-cookie")] == ["a", "b", "c"]
    hardened(answer)


# --- refusals ---------------------------------------------------------------------------------------------------------


def refusing(handlers: dict[Any, Any] | None = None) -> FastAPI:
    """An application that is past its drain deadline, so that a layer of ours refuses everything."""
    app, clock = make_app(handlers), ManualClock()
    handle = harden(app, clock=clock)
    handle.lifecycle.drain()
    clock.advance(handle.settings.health.drain_deadline_seconds)
    return app


@pytest.mark.parametrize("asked", ["GET /direct/ok", "GET /mounted/ok", "GET /nowhere", "PUT /direct/ok"])
def test_refusal_of_a_layer_is_hardened(ask: Ask, hardened: Hardened, asked: str) -> None:
    """A layer that refuses sends a problem with the id and the header fields, and says when to come back."""
    answer = ask(refusing(), asked)
    assert answer.status == 503
    assert answer.problem["request_id"] == answer.one("x-request-id")
    assert int(answer.one("retry-after")) >= 1
    assert answer.one("connection") == "close"
    assert answer.raised is None
    hardened(answer)


@pytest.mark.parametrize("handled", [Draining, Problem, HTTPException, StarletteHTTPException, 503])
@pytest.mark.parametrize("handler", [mine, mine_too])
def test_users_handler_answers_refusals(ask: Ask, hardened: Hardened, handled: Any, handler: Any) -> None:
    """The application's own handler for the status or type of a refusal answers it."""
    answer = ask(refusing({handled: handler}), "GET /direct/ok")
    assert (answer.status, answer.body) == (299, b'{"mine":true}')
    hardened(answer)


def test_users_handler_of_a_refusal_that_fails_gives_way(ask: Ask, hardened: Hardened) -> None:
    """A handler that fails on a refusal leaves the refusal as it is."""

    async def fail(_request: Request, _exception: Exception) -> JSONResponse:
        raise RuntimeError(SECRET)

    answer = ask(refusing({503: fail}), "GET /direct/ok")
    assert answer.status == 503
    assert answer.problem["status"] == 503
    hardened(answer)


# --- probes and pages -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("probe", ["/livez", "/readyz", "/startupz", "/health"])
@pytest.mark.parametrize("root_path", ["", "/proxy"])
def test_probe_is_hardened(ask: Ask, hardened: Hardened, method: str, probe: str, root_path: str) -> None:
    """Probes, which are answered above the layers, carry the id and the header fields as well."""
    app = make_app()
    harden(app)
    answer = ask(app, f"{method} {root_path}{probe}", root_path=root_path, headers=[("x-request-id", "theirs")])
    assert answer.status == 200
    assert answer.one("x-request-id") == "theirs"
    assert answer.one("cache-control") == "no-store"
    assert (answer.body == b"") == (method == "HEAD")
    hardened(answer)


@pytest.mark.parametrize("page", ["/docs", "/redoc", "/docs/oauth2-redirect"])
def test_documentation_page_is_hardened(ask: Ask, hardened: Hardened, page: str) -> None:
    """The pages of the documentation carry the id and the header fields, and a policy that is stricter than others."""
    app = make_app()
    harden(app)
    answer = ask(app, f"GET {page}")
    assert answer.status == 200
    hardened(answer, docs=True)


@pytest.mark.parametrize("asked", ["GET /direct/ok", "GET /livez", "GET /nowhere", "GET /direct/boom", "GET /docs"])
def test_tls_adds_hsts_once(ask: Ask, hardened: Hardened, asked: str) -> None:
    """Over TLS every answer says that the next one has to be, too; probes and errors as well."""
    app = make_app()
    harden(app)
    hardened(ask(app, asked, scheme="https"), docs=asked == "GET /docs", tls=True)


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        (["a-good.one_1"], True),
        (["x" * 128], True),
        (["x" * 129], False),
        (["a b"], False),
        (["a\tb"], False),
        (["\xe9"], False),
        ([""], False),
        (["one", "two"], False),
    ],
)
@pytest.mark.parametrize(
    "asked", ["GET /direct/ok", "GET /nowhere", "GET /direct/boom", "GET /livez", "POST /direct/read"]
)
def test_id_of_the_client_is_kept_if_it_is_well_formed(
    ask: Ask, hardened: Hardened, asked: str, sent: list[str], kept: bool
) -> None:
    """One well-formed id comes back as it was sent; anything else is replaced, never repeated."""
    app = make_app()
    harden(app)
    answer = ask(app, asked, headers=[("x-request-id", each) for each in sent], chunks=[b"more"])
    assert (answer.one("x-request-id") in sent) == kept
    hardened(answer)
