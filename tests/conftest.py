"""What every test relies on: no settings of the machine it runs on."""

import os

import pytest


@pytest.fixture(autouse=True)
def no_settings_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes every ``HARDENING_`` variable away; a test that needs one sets it."""
    for name in os.environ:
        if name.upper().startswith("HARDENING_"):
            monkeypatch.delenv(name)
