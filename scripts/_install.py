"""Brings `.venv` up to date with one dependency group. `scripts/_env` runs it, with a Python >= 3.11 and nothing else.

What is installed is remembered in stamps under `.venv/.installed`, one for each group. A stamp holds everything that it
depends on, so that a changed pin, another Python and a moved clone all lead to an installation, and nothing else does.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
HALF_MADE = VENV / ".half-made"
STAMPS = VENV / ".installed"
INPUTS = ("pyproject.toml", "constraints.txt", "scripts/_install.py")


def say(sentence: str) -> None:
    """Tell the user; on stderr, because stdout belongs to the script that called."""
    print(f"fastapi-hardening: {sentence}", file=sys.stderr, flush=True)


@contextmanager
def alone() -> Iterator[tuple[int, ...]]:
    """Only one installation in this clone at a time; yields what its commands inherit.

    The kernel holds the lock for as long as this program or a command of it lives, so it cannot be left behind.
    """
    try:
        import fcntl  # noqa: PLC0415 - there is none on Windows
    except ImportError:
        yield ()
        return
    with (ROOT / ".venv.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another script is installing here; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            say(f"this file system has no locks ({error.strerror}); run one script at a time here")
        yield (lock.fileno(),)


def python_in_venv() -> str | None:
    """What the Python of `.venv` says of itself; `None` if it is not there, half made, too old, or does not run."""
    about = "import sys, sysconfig, pip; print(sys.version_info >= (3, 11), sys.version, sysconfig.get_platform())"
    if HALF_MADE.exists():
        return None
    try:
        answer = subprocess.run([PYTHON, "-I", "-c", about], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return answer.stdout if answer.returncode == 0 and answer.stdout.startswith("True") else None


def bring_up_to_date(group: str, inherited: tuple[int, ...]) -> None:
    """Make `.venv` unless it is there, then install the project and the group unless that is done."""

    def run(*command: str | Path) -> None:
        subprocess.run(command, cwd=ROOT, check=True, pass_fds=inherited, env={**os.environ, "PIP_USER": "0"})

    def pip_install(*what: str) -> None:
        quietly = ("--quiet", "--quiet", "--disable-pip-version-check", "--no-input")  # errors only
        run(PYTHON, "-I", "-m", "pip", "install", *quietly, "--constraint", "constraints.txt", *what)

    about_python = python_in_venv()
    if about_python is None:
        say(f"making the virtual environment .venv with Python {sys.version.split()[0]}")
        if VENV.is_dir() and not VENV.is_symlink():
            shutil.rmtree(VENV)
        else:
            VENV.unlink(missing_ok=True)
        VENV.mkdir()
        HALF_MADE.touch()
        run(sys.executable, "-I", "-m", "venv", VENV)
        HALF_MADE.unlink()
        about_python = python_in_venv() or ""

    inputs = [about_python.encode(), os.fsencode(ROOT), *((ROOT / name).read_bytes() for name in INPUTS)]
    wanted = hashlib.sha256(b"\0".join(inputs)).hexdigest()
    stale = [part for part in ("project", group) if not _has_stamp(part, wanted)]
    if not stale:
        return
    say(f"installing what the group «{group}» of pyproject.toml needs (once; it can take a minute or two)")
    project: tuple[str, ...] = ()
    if "project" in stale:
        # First, because pip knows groups since 25.1 and a fresh environment has the pip that came with Python.
        pip_install("--upgrade", "pip")
        project = ("--build-constraint", "constraints.txt", "--editable", ".")
    pip_install("--group", group, *project)
    STAMPS.mkdir(exist_ok=True)
    for part in stale:
        (STAMPS / part).write_text(wanted)


def _has_stamp(part: str, wanted: str) -> bool:
    stamp = STAMPS / part
    return stamp.is_file() and stamp.read_text() == wanted


def main(group: str) -> int:
    """Run it, and turn what can go wrong into a sentence."""
    try:
        with alone() as inherited:
            bring_up_to_date(group, inherited)
    except KeyboardInterrupt:
        say("interrupted; the next run goes on from here")
        return 130
    except subprocess.CalledProcessError:
        say("could not install; the lines above say why. It needs the network, or a mirror that pip is set up for.")
        return 1
    except OSError as error:
        say(f"could not install: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
