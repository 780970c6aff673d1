"""What a docstring shows is what happens."""

import doctest
import importlib
import os
import pkgutil
from pathlib import Path

import pytest

import fastapi_hardening

MODULES = [
    fastapi_hardening.__name__,
    *(module.name for module in pkgutil.walk_packages(fastapi_hardening.__path__, "fastapi_hardening.")),
]
EXAMPLES = [
    example
    for module in MODULES
    for example in doctest.DocTestFinder().find(importlib.import_module(module))
    if example.examples
]


@pytest.fixture(autouse=True)
def nothing_around(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keeps settings of the machine away from the examples."""
    for variable in list(os.environ):
        if variable.startswith("HARDENING_"):
            monkeypatch.delenv(variable)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_example_of_a_docstring_runs(example: doctest.DocTest) -> None:
    """An example in a docstring runs and prints what stands below it."""
    printed: list[str] = []
    doctest.DocTestRunner().run(example, out=printed.append)
    assert "".join(printed) == ""


def test_every_concern_shows_how_it_is_used() -> None:
    """A module with a middleware has an example in its docstring."""
    with_middleware = {
        module for module in MODULES if any(name.endswith("Middleware") for name in _own(module)) and "." in module
    }
    assert with_middleware <= {example.name for example in EXAMPLES}


def _own(module: str) -> list[str]:
    """The names that a module defines itself."""
    members = vars(importlib.import_module(module)).items()
    return [name for name, value in members if getattr(value, "__module__", None) == module]
