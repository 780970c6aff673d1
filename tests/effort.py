"""How hard the tests look: ``TEST_EFFORT=10`` has properties tried ten times as often; ``scripts/fuzz`` sets it."""

import os

EFFORT = int(os.environ.get("TEST_EFFORT", "1"))
