"""What the tests in a real browser share: Chromium, servers of applications, and what the browser complains of."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
import uvicorn
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

DEADLINE_SECONDS = 30.0  # for a machine that does something else as well; nothing waits for all of it

# The first few keep Chromium from looking for hosts that have nothing to do with a test.
FLAGS = (
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--no-first-run",
    "--disable-gpu",
    # Reports are sent at once, not a minute later.
    "--short-reporting-delay",
)


class Serve(Protocol):
    """Serves an application; gives its address, such as ``http://127.0.0.1:8000``."""

    def __call__(self, app: Any, host: str = "127.0.0.1") -> str: ...


class Tab:
    """A page, and all that the browser wrote into its console or could not load."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.requested: list[str] = []
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.complaints.append(f"uncaught: {error}"))
        page.on("requestfailed", lambda request: self.complaints.append(f"failed: {request.url}"))
        page.on("request", lambda request: self.requested.append(request.url))

    def _console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(f"{message.type}: {message.text}")

    def picture(self, name: str) -> None:
        """Leaves a picture where ``SCREENSHOTS`` says, for people to look at."""
        folder = os.environ.get("SCREENSHOTS")
        if folder:
            self.page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Give Chromium without a window; ``scripts/browser`` says where it is."""
    flags = [*FLAGS, "--no-sandbox"] if os.geteuid() == 0 else list(FLAGS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=os.environ["CHROMIUM"], args=flags)
        yield browser
        browser.close()


@pytest.fixture
def tab(browser: Browser) -> Iterator[Tab]:
    """Give an empty page that shares nothing with those of other tests."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    context.set_default_timeout(DEADLINE_SECONDS * 1000)
    yield Tab(context.new_page())
    context.close()


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Give a function that serves an application with uvicorn; all of them end with the test."""
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(app: Any, host: str = "127.0.0.1") -> str:
        listener = socket.create_server((host, 0))
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, server_header=False, access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        running.append((server, thread))
        thread.start()
        until(lambda: server.started or not thread.is_alive(), "the server has started")
        assert server.started
        return f"http://{host}:{listener.getsockname()[1]}"

    yield start
    for server, _ in running:
        server.should_exit = server.force_exit = True
    for _, thread in running:
        thread.join(DEADLINE_SECONDS)


def until(holds: Callable[[], object], what: str) -> None:
    """Polls until something holds; fails when the deadline has passed."""
    ends = time.monotonic() + DEADLINE_SECONDS
    while not holds():
        assert time.monotonic() < ends, f"not within {DEADLINE_SECONDS:g} s: {what}"
        time.sleep(0.02)
