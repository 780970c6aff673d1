"""Starts the sample application for `scripts/run`: finds a free port, says what to open, then becomes uvicorn."""

import contextlib
import os
import secrets
import signal
import socket
import sys
from types import FrameType

LAST_PORT = 65535
ALWAYS = ("sample_app.main:app", "--no-server-header", "--no-access-log", "--timeout-graceful-shutdown", "10")
WELCOME = """\
The shop is at  {shop}/
its API at      {shop}/docs
its health at   {shop}/health

Register, or sign in, at {shop}/login
the admin is             admin@shop.example
with the password        {password}

Try:
  curl -i {shop}/api/products    # a good answer, with its security headers
  curl -i {shop}/no-such-page    # a 404: the problem document
  curl -i {shop}/api/admin/orders.csv    # a 401: who may see that?
  curl -i {shop}/readyz          # 200, or 503 while it starts or drains

Ctrl-C ends it.
"""


def leave(_signal: int, _frame: FrameType | None) -> None:
    """Ctrl-C while something is still being imported is no error; uvicorn handles what comes later."""
    sys.exit(0)


# Not under the guard below: the processes of --reload and --workers import this file, too.
signal.signal(signal.SIGINT, leave)


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there, and none does already."""
    # Where the system lets two servers share a port, binding alone would not tell.
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
        return False
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def find_port(host: str, wish: str) -> int:
    """The first free port from the one that is wished for; 0 wishes for any."""
    if not wish.isdecimal() or int(wish) > LAST_PORT:
        sys.exit(f"PORT is {wish!r}; a port is a number from 0 to {LAST_PORT}.")
    if int(wish) == 0:
        with socket.create_server((host, 0)) as server:
            port: int = server.getsockname()[1]
        return port
    for candidate in range(int(wish), min(int(wish) + 100, LAST_PORT + 1)):
        if is_free(host, candidate):
            return candidate
    sys.exit(f"No port is free on {host} from {wish} on; choose another with PORT=...")


def set_secrets() -> str:
    """Give all workers the same secrets, new ones at each start where none are set; returns the admin's password."""
    for variable in ("SHOP_SESSION_SECRET", "SHOP_SIGNING_SECRET"):
        os.environ.setdefault(variable, secrets.token_hex(32))
    if "SHOP_ADMIN_PASSWORD" in os.environ:
        return "that is in SHOP_ADMIN_PASSWORD"
    os.environ["SHOP_ADMIN_PASSWORD"] = password = secrets.token_urlsafe(15)
    return password


def main() -> None:
    """Tell where the shop will be, and serve it there."""
    from click.core import ParameterSource  # noqa: PLC0415 - slow, and no business of the other processes
    from uvicorn.main import main as uvicorn  # noqa: PLC0415 - the same

    arguments = [*ALWAYS, *sys.argv[1:]]
    context = uvicorn.make_context("scripts/run", list(arguments), resilient_parsing=True)
    host, port = context.params["host"], context.params["port"]
    if context.get_parameter_source("port") is not ParameterSource.COMMANDLINE:
        port = find_port(host, os.environ.get("PORT", "8000"))
        arguments += ["--port", str(port)]
    scheme = "https" if context.params["ssl_certfile"] else "http"
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
    if "--help" not in arguments and "--version" not in arguments:
        password = set_secrets()
        print(WELCOME.format(shop=f"{scheme}://{shown}:{port}", password=password), flush=True)
    uvicorn(arguments, prog_name="scripts/run")


if __name__ == "__main__":
    main()
