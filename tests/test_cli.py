"""The command line: what it prints, and how it ends."""

import json
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from fastapi_hardening.cli import main

ROOT = Path(__file__).resolve().parent.parent

PROGRAM = """
from fastapi import FastAPI
from fastapi_hardening import Settings, harden


def make(**settings):
    app = FastAPI(openapi_url=None)
    harden(app, Settings(**settings))
    return app


app = make(metrics={"token": "aaaaaaaabbbbbbbb"}, service_name="till [1]")
bare = FastAPI()


class Holder:
    inner = make()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[str]:
    """Give a folder with applications, which are forgotten afterwards."""
    (tmp_path / "till_of_the_tests.py").write_text(PROGRAM)
    (tmp_path / "broken_of_the_tests.py").write_text(PROGRAM + "\nmake(workers=0)\n")
    (tmp_path / "empty_of_the_tests.py").write_text("import nothing_that_is_there\n")
    yield str(tmp_path)
    for name in ("till_of_the_tests", "broken_of_the_tests"):
        sys.modules.pop(name, None)


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away what the machine says."""
    for name in ("FORCE_COLOR", "WEB_CONCURRENCY", "FORWARDED_ALLOW_IPS"):
        monkeypatch.delenv(name, raising=False)


def test_the_command_is_installed() -> None:
    """By the name that the documentation says."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts["fastapi-hardening"].partition(":")
    assert getattr(import_module(module), function) is main


@pytest.mark.parametrize(
    ("level", "ignore", "status"),
    [("error", "", 1), ("error", "fh035", 0), ("warning", "FH035", 1), ("info", "FH035,FH010", 1), ("never", "", 0)],
)
def test_a_finding_of_the_level_fails(folder: str, level: str, ignore: str, status: int) -> None:
    """So that a pipeline stops; what is meant is ignored by its id."""
    arguments = ["check", "till_of_the_tests:app", "--app-dir", folder, "--fail-level", level, "--ignore", ignore]
    assert main(arguments) == status


def test_findings_are_told_with_what_to_do(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line for what is so, one for what mends it, and how many there are."""
    assert main(["check", "till_of_the_tests", "--app-dir", folder]) == 1
    said = capsys.readouterr().out
    assert "FH035 error: metrics.token can be guessed\n    make one by `openssl rand -hex 32`\n" in said
    assert said.splitlines()[-1].startswith("1 error, ")


def test_findings_are_told_as_json(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    """For programs."""
    assert main(["check", "till_of_the_tests:Holder.inner", "--app-dir", folder, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["failed"] is False
    assert {"id": "FH010", "severity": "warning", "message": "every Host is served"}.items() <= said["findings"][
        0
    ].items()


def test_nothing_found_is_said(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Silence could also be a command that did nothing."""
    ignored = ",".join(f"FH{number:03d}" for number in range(60))
    assert main(["check", "till_of_the_tests:make", "--factory", "--app-dir", folder, "--ignore", ignored]) == 0
    assert capsys.readouterr().out == "Nothing found.\n"


def test_an_application_that_cannot_be_made_fails(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Its own sentence is the finding."""
    assert main(["check", "broken_of_the_tests:app", "--app-dir", folder]) == 1
    said = capsys.readouterr().out
    assert "FH000 error" in said
    assert "workers" in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["check", "nothing_of_the_tests:app"], "No module named 'nothing_of_the_tests'"),
        (["check", "empty_of_the_tests:app"], "No module named 'nothing_that_is_there'"),
        (["check", "till_of_the_tests:nothing"], "name it as MODULE:ATTRIBUTE"),
        (["config", "till_of_the_tests:bare"], "is not hardened"),
        (["config", "broken_of_the_tests:app"], "workers"),
    ],
)
def test_what_cannot_be_loaded_is_told(
    folder: str, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    """On standard error, with a status of its own."""
    assert main([*arguments, "--app-dir", folder]) == 2
    said = capsys.readouterr()
    assert (said.out, says in said.err) == ("", True)


def test_a_command_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    """Without one its usage is told."""
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_settings_are_told_with_their_source(
    folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The strongest source that set each, and never a secret."""
    monkeypatch.setenv("HARDENING_WORKERS", "3")
    monkeypatch.setenv("HARDENING_ENVIRONMENT", "staging")
    assert main(["config", "till_of_the_tests:app", "--app-dir", folder]) == 0
    said = capsys.readouterr().out
    assert "workers = 3  # environment variable HARDENING_WORKERS\n" in said
    assert 'metrics.token = "********"  # argument\n' in said
    assert 'rate_limit.default = "600/minute"  # default\n' in said
    assert "aaaa" not in said


def test_only_what_was_changed_can_be_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an application: what the environment says."""
    monkeypatch.setenv("HARDENING_WORKERS", "3")
    assert main(["config", "--changed", "--json"]) == 0
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert said["workers"] == {"value": 3, "source": "environment variable HARDENING_WORKERS"}
    assert "health.details" not in said


def test_rules_are_printed_for_prometheus(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Of an application, or those of the environment."""
    assert main(["alerts", "till_of_the_tests:app", "--app-dir", folder]) == 0
    assert capsys.readouterr().out.startswith('groups:\n  - name: "till [1]"\n')
    assert main(["alerts"]) == 0
    assert '- alert: "ErrorBudgetBurns"' in capsys.readouterr().out


def test_defaults_are_told_to_be_all(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """So that an empty answer is not taken for a mistake."""
    for name in ("HARDENING_ENVIRONMENT", "HARDENING_FILE"):
        monkeypatch.delenv(name, raising=False)
    assert main(["config", "--changed"]) == 0
    assert capsys.readouterr().out == "Every setting has its default.\n"


def test_for_people_there_are_tables_and_colors(
    folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where rich is installed; what is in brackets is text, and no markup."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    main(["check", "till_of_the_tests:app", "--app-dir", folder])
    assert "\x1b[1;31mFH035 error: \x1b[0m" in capsys.readouterr().out
    main(["config", "till_of_the_tests:app", "--app-dir", folder])
    said = capsys.readouterr().out
    assert "till [1]" in said
    assert "┃" in said


def test_without_rich_it_is_plain(
    folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The extra is no condition."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setitem(sys.modules, "rich.console", None)
    main(["check", "till_of_the_tests:app", "--app-dir", folder])
    assert "FH035 error: metrics.token can be guessed" in capsys.readouterr().out
