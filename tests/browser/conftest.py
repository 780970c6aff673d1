"""What the tests in a real browser share: Chromium, servers of applications, and what the browser complains of."""

import os
import socket
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pytest
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

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

    def __call__(self, app: Any, host: str = "127.0.0.1", *, tls: bool = False) -> str: ...


class Certificate(NamedTuple):
    """A certificate of ``localhost``, with its key in one file, and what Chromium knows its key by."""

    file: Path
    key_hash: str


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
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    """Give a new certificate, which nobody has signed but itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    file = tmp_path_factory.mktemp("tls") / "localhost.pem"
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    file.write_bytes(private + certificate.public_bytes(Encoding.PEM))
    public = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return Certificate(file, b64encode(sha256(public).digest()).decode())


@pytest.fixture(scope="session")
def browser(certificate: Certificate) -> Iterator[Browser]:
    """Give Chromium without a window; ``scripts/browser`` says where it is."""
    # Believed as if it were signed: reports go only to servers whose certificate has no fault.
    flags = [*FLAGS, f"--ignore-certificate-errors-spki-list={certificate.key_hash}"]
    if os.geteuid() == 0:
        flags.append("--no-sandbox")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=os.environ["CHROMIUM"], args=flags)
        yield browser
        browser.close()


@pytest.fixture
def tab(browser: Browser) -> Iterator[Tab]:
    """Give an empty page that shares nothing with those of other tests."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    context.set_default_timeout(DEADLINE_SECONDS * 1000)
    expect.set_options(timeout=DEADLINE_SECONDS * 1000)
    yield Tab(context.new_page())
    context.close()


@pytest.fixture
def serve(certificate: Certificate) -> Iterator[Serve]:
    """Give a function that serves an application with uvicorn; all of them end with the test."""
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(app: Any, host: str = "127.0.0.1", *, tls: bool = False) -> str:
        listener = socket.create_server((host, 0))
        file = certificate.file if tls else None
        quiet: dict[str, Any] = {"log_config": None, "server_header": False, "access_log": False}
        server = uvicorn.Server(uvicorn.Config(app, ssl_certfile=file, timeout_graceful_shutdown=1, **quiet))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        running.append((server, thread))
        thread.start()
        until(lambda: server.started or not thread.is_alive(), "the server has started")
        assert server.started
        return f"http{'s' if tls else ''}://{host}:{listener.getsockname()[1]}"

    yield start
    for server, _ in running:
        server.should_exit = True
    for _, thread in running:
        thread.join(DEADLINE_SECONDS)


def until(holds: Callable[[], object], what: str) -> None:
    """Polls until something holds; fails when the deadline has passed."""
    ends = time.monotonic() + DEADLINE_SECONDS
    while not holds():
        assert time.monotonic() < ends, f"not within {DEADLINE_SECONDS:g} s: {what}"
        time.sleep(0.02)
