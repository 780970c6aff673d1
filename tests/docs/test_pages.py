"""What the documentation shows is what happens."""

import logging
import os
import re
import runpy
import shlex
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fastapi.testclient import TestClient
from pydantic import BaseModel

from fastapi_hardening import Settings
from fastapi_hardening.handle import Slot
from fastapi_hardening.harden import INBOUND
from sample_app.main import create_app

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```$", re.DOTALL | re.MULTILINE
)
SHOP = "http://127.0.0.1:8000"


class Block(NamedTuple):
    """A fenced block and the number of its first line."""

    code: str
    line: int


def blocks(page: Path, *languages: str) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(textwrap.dedent(match["code"]), text.count("\n", 0, match.start()) + 2)
        for match in FENCE.finditer(text)
        if match["language"] in languages
    ]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def curls() -> list[str]:
    """Every call of the sample shop on the pages, as it is written there."""
    commands = [
        line
        for page in PAGES
        for block in blocks(page, "sh", "console")
        for line in block.code.replace("\\\n", " ").splitlines()
        if line.startswith("curl ") and SHOP in line
    ]
    return list(dict.fromkeys(commands))


@pytest.fixture(autouse=True)
def nothing_around(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Gives a page an environment and a folder of its own, and takes off what it has put on the access log."""
    before = dict(os.environ)
    access_log = logging.getLogger("fastapi_hardening.access")
    handlers = [*access_log.handlers]
    for variable in before:
        if variable.startswith("HARDENING_"):
            del os.environ[variable]
    monkeypatch.chdir(tmp_path)
    yield
    access_log.handlers[:] = handlers
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name)
def test_python_of_a_page_runs(page: Path) -> None:
    """The Python of a page runs from top to bottom, and what it asserts is true."""
    namespace: dict[str, Any] = {"__name__": "a_page"}
    for code, line in blocks(page, "python"):
        # Empty lines in front, so that a traceback names the line of the page.
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """Gives the sample shop, as a reader of the tutorial has it running."""
    before = {variable: os.environ.pop(variable) for variable in list(os.environ) if variable.startswith("HARDENING_")}
    database = tmp_path_factory.mktemp("shop") / "shop.sqlite3"
    app = create_app(f"sqlite+aiosqlite:///{database}", "the password of the tests")
    os.environ.update(before)
    with TestClient(app, base_url=SHOP) as client:
        yield client


@contextmanager
def cookies_of(shop: TestClient, jar: set[str]) -> Iterator[None]:
    """The calls run in the order of the pages; a cookie that one of them keeps (-c) later ones may send (-b)."""
    kept = dict(shop.cookies)
    if "-b" not in jar:
        shop.cookies.clear()
    yield
    if "-c" not in jar:
        shop.cookies.clear()
        shop.cookies.update(kept)


def test_curl_gets_what_its_comment_says(shop: TestClient) -> None:
    """Each call of the sample shop, in the order of the pages, is answered as the comment behind it says."""
    for command in curls():
        said = re.search(r"# (\d{3})\b", command)
        status = called(command, shop)
        assert status == int(said[1]) if said else status != 404, command


def called(command: str, shop: TestClient) -> int:
    """The status that a call gets."""
    method, url, headers, data, jar = "GET", "", {}, "", set()
    words = iter(shlex.split(command, comments=True)[1:])
    for word in words:
        if word in ("-X", "--request"):
            method = next(words)
        elif word in ("-H", "--header"):
            field, _, value = next(words).partition(":")
            headers[field] = value.strip()
        elif word == "--json":
            data, method = next(words), "POST"
            headers.setdefault("Content-Type", "application/json")
        elif word in ("-d", "--data", "--data-urlencode"):
            data, method = "&".join(filter(None, (data, next(words)))), "POST"
            headers.setdefault("Content-Type", "application/x-www-form-urlencoded")
        elif word in ("-b", "-c"):
            assert next(words) == "cookies"
            jar.add(word)
        elif word in ("-I", "--head"):
            method = "HEAD"
        elif word.startswith("http"):
            url = word
        else:
            assert word in ("-i", "-s"), f"{word} is new here: teach the test what it does"
    with cookies_of(shop, jar):
        answer = shop.request(method, url, headers=headers, content=data or None, follow_redirects=False)
    return answer.status_code


def test_the_pages_call_the_shop() -> None:
    """The tests above look at something: there are pages with Python, and calls of the shop."""
    assert len([page for page in PAGES if blocks(page, "python")]) > 8
    assert len(curls()) > 5


KEY = re.compile(r"`([a-z_]+)\.([a-z_]+)(?: = [^`]*)?`")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_settings_that_a_page_names_exist(page: Path) -> None:
    """A key that a page names is a key of the settings."""
    concerns = {field: info.annotation for field, info in Settings.model_fields.items()}
    for concern, key in KEY.findall(page.read_text(encoding="utf-8")):
        model = concerns.get(concern)
        if isinstance(model, type) and issubclass(model, BaseModel):
            assert key in model.model_fields, f"{concern}.{key}"


ORDER = ["Alone", "In `harden()`", "Settings", "What the client sees", "Events", "Metrics", "Don't / Do"]


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "concerns").glob("*.md")), ids=name)
def test_concerns_are_told_in_one_order(page: Path) -> None:
    """Every page of a concern begins with the danger and has the same sections in the same order."""
    text = page.read_text(encoding="utf-8")
    assert text.split("\n\n")[1].startswith("**The danger.**")
    assert [title for title in re.findall(r"^## (.+)$", text, re.MULTILINE) if title in ORDER] == ORDER


@pytest.mark.parametrize("slot", [slot for slot in INBOUND if slot.build is not None], ids=lambda slot: slot.name)
def test_built_layers_have_a_page(slot: Slot) -> None:
    """A layer that is built is linked to the page of its concern."""
    assert f"[{slot.name}](concerns/" in (ROOT / "docs" / "pipeline.md").read_text(encoding="utf-8")


def test_generated_blocks_are_fresh() -> None:
    """The generated tables follow from the code as it is."""
    program = runpy.run_path(str(ROOT / "docs" / "generate.py"), run_name="generate")
    assert program["stale_pages"]() == [], "run python docs/generate.py"
