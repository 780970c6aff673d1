"""Deadlines, priorities, bulkheads and features hold on the endpoint that runs, in all surroundings."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI
from starlette.routing import Mount

from fastapi_hardening import Bulkhead, Feature, Hardening, Priority, Timeout
from tests.no_bypass.conftest import Ask, Build, Hardened, Site

PATHS = ("/direct", "/nested/included", "/mounted/direct")


async def never() -> None:
    """Does not answer."""
    await asyncio.Event().wait()


def building(override: Callable[[], Any]) -> Build:
    """Makes an application with the override on a route, on a router, and on a mounted application."""

    def build(telemetry: Any) -> FastAPI:
        app = FastAPI(telemetry=telemetry) if telemetry is not None else FastAPI()
        router, mounted = APIRouter(dependencies=[override()]), FastAPI(dependencies=[override()])
        app.add_api_route("/direct", never, dependencies=[override()])
        router.add_api_route("/included", never)
        app.include_router(router, prefix="/nested")
        mounted.add_api_route("/direct", never)
        app.mount("/mounted", mounted)
        return app

    return build


def full() -> Bulkhead:
    bulkhead = Bulkhead(1, max_queue=0)
    bulkhead.places.take_now()
    return bulkhead


def handle_of(site: Site) -> Hardening:
    """The handle whose layers are around the endpoint: that of the outermost hardened application."""
    app: Any = site.app
    handle: Hardening | None = getattr(app.state, "hardening", None)
    if handle is None:
        mounted: Any = next(route.app for route in app.routes if isinstance(route, Mount))
        handle = mounted.state.hardening
    return handle


CASES: dict[str, tuple[Callable[[], Any], int]] = {
    "timeout": (lambda: Timeout(0.01), 504),
    "bulkhead": (full, 503),
    "feature": (lambda: Feature("nice to have"), 503),
    "priority": (lambda: Priority("background"), 503),
}


@pytest.mark.parametrize("case", CASES)
def test_it_holds_wherever_the_endpoint_is(
    surround: Callable[[Build], Site], ask: Ask, hardened: Hardened, case: str
) -> None:
    """Direct, included and mounted, behind middlewares that change the path; answers are problems with every header."""
    override, status = CASES[case]
    site = surround(building(override))
    handle = handle_of(site)
    if case == "feature":
        handle.features.switch_off("nice to have")
    if case == "priority":
        # What is not known to be in the background still has something of the rate: only its priority refuses it.
        handle.shedder.rate, handle.shedder._tokens = 1.0, 1e9
        handle.shedder.turn = lambda now: None  # type: ignore[method-assign]
    for path in PATHS:
        if site.around == "bare root path" and path.startswith("/mounted") and case != "priority":
            continue  # Starlette does not find what is mounted there
        answer = ask(site.app, f"GET {site.prefix}{path}", root_path=site.root_path)
        assert answer.status == status, path
        assert answer.problem["status"] == status
        hardened(answer)
