"""The command ``fastapi-hardening``: looks at an application before it is deployed, and shows its settings.

``fastapi-hardening check shop.main:app`` says what is wrong with how it is set up, and fails a pipeline for it.
``fastapi-hardening config`` says which settings are in effect, and where each came from. Neither prints a secret.
``fastapi-hardening alerts`` prints the rules of alerts as a rule file of Prometheus.

The exit status is 0 if all is well, 1 if something was found, and 2 if the command could not do its work.

Example:
    >>> main(["config", "--changed"])
    Every setting has its default.
    0
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from fastapi_hardening.audit import SEVERITIES, Finding, audit, broken
from fastapi_hardening.core.configuration import ConfigurationError
from fastapi_hardening.observability.alerts import prometheus_rules
from fastapi_hardening.settings import Settings

_COLORS = {"error": "bold red", "warning": "yellow", "info": "cyan"}


class CannotLoadError(Exception):
    """What the command line names cannot be loaded; the message says why."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; gives its exit status.

    Args:
        arguments: Those of the command line; by default this process's.
    """
    options = _parser().parse_args(arguments)
    try:
        run: Callable[[argparse.Namespace], int] = options.run
        return run(options)
    except CannotLoadError as error:
        sys.stderr.write(f"fastapi-hardening: {error}\n")
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastapi-hardening", description="Looks at a hardened application.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, text in (
        ("check", _check, "say what is wrong with how an application is set up"),
        ("config", _config, "show the settings in effect, and where each came from"),
        ("alerts", _alerts, "print the rules of alerts for Prometheus, in YAML"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        command.add_argument("--factory", action="store_true", help="APP is a function that makes the application")
        command.add_argument("--app-dir", default=".", metavar="FOLDER", help="where the module is (default: here)")
        if name != "alerts":
            command.add_argument("--json", action="store_true", help="print JSON")
        if name == "check":
            command.add_argument("app", metavar="APP", help="the application, such as shop.main:app")
            command.add_argument(
                "--fail-level",
                choices=(*SEVERITIES, "never"),
                default="error",
                help="the least that makes the command fail (default: error)",
            )
            command.add_argument("--ignore", default="", metavar="IDS", help="findings that are meant: FH005,FH033")
        else:
            command.add_argument(
                "app", metavar="APP", nargs="?", help="the application; else the environment's settings"
            )
        if name == "config":
            command.add_argument("--changed", action="store_true", help="only what is not the default")
    return parser


# --- commands ---------------------------------------------------------------------------------------------------------


def _check(options: argparse.Namespace) -> int:
    ignored = {each.strip().upper() for each in options.ignore.split(",")}
    try:
        found = audit(_load(options))
    except ConfigurationError as error:
        found = (broken(error),)
    found = tuple(finding for finding in found if finding.id not in ignored)
    failing = SEVERITIES[: SEVERITIES.index(options.fail_level) + 1] if options.fail_level != "never" else ()
    failed = any(finding.severity in failing for finding in found)
    if options.json:
        _say(json.dumps({"failed": failed, "findings": [_as_json(finding) for finding in found]}, indent=2))
    else:
        _show(found)
    return int(failed)


def _as_json(finding: Finding) -> dict[str, str]:
    return {key: getattr(finding, key) for key in ("id", "severity", "message", "fix")}


def _show(found: Sequence[Finding]) -> None:
    console = _console()
    for finding in found:
        head, fix = f"{finding.id} {finding.severity}: ", f"\n    {finding.fix}"
        if console is None:
            _say(f"{head}{finding.message}{fix}")
        else:
            text = import_module("rich.text").Text
            console.print(text.assemble((head, _COLORS[finding.severity]), finding.message, (fix, "dim")))
    counted = [f"{number} {severity}" for severity in SEVERITIES if (number := _count(found, severity))]
    _say(", ".join(counted) or "Nothing found.")


def _count(found: Iterable[Finding], severity: str) -> int:
    return sum(finding.severity == severity for finding in found)


def _config(options: argparse.Namespace) -> int:
    settings = _settings(options)
    values = [each for each in settings.describe() if not (options.changed and each.source == "default")]
    if options.json:
        _say(
            json.dumps(
                {each.key: {"value": each.value, "source": each.source} for each in values}, indent=2, default=str
            )
        )
        return 0
    if not values:
        _say("Every setting has its default.")
    console = _console()
    if console is not None and values:
        table = import_module("rich.table").Table("key", "value", "from")
        for each in values:
            table.add_row(each.key, import_module("rich.text").Text(_written(each.value)), each.source)
        console.print(table)
        return 0
    for each in values:
        _say(f"{each.key} = {_written(each.value)}  # {each.source}")
    return 0


def _alerts(options: argparse.Namespace) -> int:
    settings = _settings(options)
    _say(prometheus_rules(settings.alerts.rules, group=settings.service_name or "fastapi-hardening").rstrip())
    return 0


def _written(value: Any) -> str:
    return json.dumps(value, default=str)


# --- what is loaded, and where it is printed --------------------------------------------------------------------------


def _load(options: argparse.Namespace) -> Any:
    """The application that the command line names, as uvicorn would find it.

    Raises:
        CannotLoadError: There is none.
        ConfigurationError: It refuses to be made.
    """
    module_name, _, path = options.app.partition(":")
    sys.path.insert(0, str(Path(options.app_dir).resolve()))
    try:
        found: Any = import_module(module_name)
        for name in (path or "app").split("."):
            found = getattr(found, name)
        return found() if options.factory else found
    except ConfigurationError:
        raise
    except ModuleNotFoundError as error:
        raise CannotLoadError(f"{options.app} cannot be loaded: {error}") from error
    except AttributeError as error:
        raise CannotLoadError(f"{options.app} cannot be loaded: {error}; name it as MODULE:ATTRIBUTE") from error
    finally:
        sys.path.pop(0)


def _settings(options: argparse.Namespace) -> Settings:
    """The settings of the application that the command line names, or else those of the environment."""
    try:
        settings: Settings = _load(options).state.hardening.settings if options.app else Settings()
    except ConfigurationError as error:
        raise CannotLoadError(str(error)) from None
    except AttributeError:
        raise CannotLoadError(f"{options.app} is not hardened: call harden(app)") from None
    return settings


def _console() -> Any:
    """Rich's console, where it is installed and somebody looks; else ``None``."""
    if not (sys.stdout.isatty() or "FORCE_COLOR" in os.environ):
        return None
    try:
        return import_module("rich.console").Console()
    except ImportError:
        return None


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
