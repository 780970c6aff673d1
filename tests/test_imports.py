"""What importing the package brings with it, and what it offers."""

import subprocess
import sys
from pathlib import Path

import pytest

import fastapi_hardening
from fastapi_hardening.security import auth

OPTIONAL = ("redis", "httpx2", "argon2", "itsdangerous", "nh3", "rich", "fastapi_offline")

PUBLIC = [
    "Authorize",
    "Bulkhead",
    "CacheResponse",
    "CheckResult",
    "ConfigurationError",
    "Cors",
    "CspNonce",
    "CurrentRequest",
    "CurrentTenant",
    "CurrentUser",
    "CurrentVersion",
    "Feature",
    "Hardening",
    "Idempotent",
    "InputPolicy",
    "OptionalUser",
    "Principal",
    "Priority",
    "Problem",
    "Public",
    "RateLimit",
    "RequestId",
    "RequestLimits",
    "RequirePermissions",
    "RequireRoles",
    "RequireScopes",
    "RequireTenant",
    "RequireUser",
    "SecurityHeaders",
    "Settings",
    "Tenant",
    "Timeout",
    "Version",
    "WebSocketLimits",
    "configure_logging",
    "csp_nonce_context",
    "current_tenant",
    "harden",
]


def run(program: str) -> str:
    """Runs a program in a process of its own, where nothing is imported yet; gives what it prints."""
    root = Path(fastapi_hardening.__file__).parent.parent
    command = [sys.executable, "-W", "error", "-c", f"import sys; sys.path.insert(0, {str(root)!r}); {program}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


HARDEN = "from fastapi import FastAPI; import fastapi_hardening as f; f.harden(FastAPI(), f.Settings(_env_file=None)); "


def test_package_works_without_its_extras() -> None:
    """Where no optional dependency is installed, an application is hardened all the same."""
    blocked = f"sys.modules.update(dict.fromkeys({OPTIONAL})); "
    assert run(blocked + HARDEN + f"print([n for n in {OPTIONAL} if sys.modules[n] is not None])") == "[]"


def test_extras_are_not_imported_unless_they_are_used() -> None:
    """Where they are installed, optional dependencies are left alone until something needs them."""
    assert run(HARDEN + f"print([n for n in {OPTIONAL} if n in sys.modules])") == "[]"


def test_what_signs_tokens_is_imported_when_it_is_asked_for() -> None:
    """The names of authentication are in one place, and who issues no tokens does not pay for those who do."""
    asked = "import fastapi_hardening.security.auth as auth; before = 'jose' in sys.modules; auth.TokenIssuer; "
    assert run(HARDEN + asked + "print(before, 'jose' in sys.modules)") == "False True"
    for name in auth.__all__:
        assert getattr(auth, name).__name__ == name or name in ("CurrentUser", "OptionalUser")
    with pytest.raises(AttributeError, match="TokenIsuer"):
        auth.TokenIsuer  # noqa: B018 - reading it is what fails


def test_every_module_can_be_imported_first() -> None:
    """No module depends on another one having been imported before it."""
    root = Path(fastapi_hardening.__file__).parent
    names = [
        ".".join(path.relative_to(root.parent).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted(root.rglob("*.py"))
    ]
    assert "fastapi_hardening.core.routes" in names
    # The package itself comes first whatever is imported, and with it most modules; the others are tried one by one.
    program = (
        "import importlib, fastapi_hardening\n"
        "known = set(sys.modules)\n"
        "for name in names:\n"
        "    for each in [n for n in sys.modules if n.startswith('fastapi_hardening') and n not in known]:\n"
        "        del sys.modules[each]\n"
        "    importlib.import_module(name)"
    )
    run(f"names = {names}; exec({program!r})")


def test_public_names_are_pinned() -> None:
    """What the package offers is a promise: a name comes with the changelog, and goes only with a major version."""
    assert sorted(fastapi_hardening.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(fastapi_hardening, name) is not None


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_says_what_it_is(name: str) -> None:
    """Everything that is offered and can carry a docstring has one."""
    offered = getattr(fastapi_hardening, name)
    if callable(offered) and name not in ("CspNonce", "CurrentRequest", "CurrentUser", "OptionalUser", "RequestId"):
        assert offered.__doc__
