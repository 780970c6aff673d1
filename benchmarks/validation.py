"""How well the validator tells attacks from the rest, and what it costs: `python benchmarks/validation.py CORPUS`.

CORPUS is a folder with public lists, each in a folder of its own: `injection/HttpParamsDataset`, `injection/fuzzdb`,
`injection/libinjection`, `injection/crs-regression` and `benign/github-webhooks`; what is missing is left out. No list
is a part of this project.

How parts are held out: of every file the lines are split in two by a hash of the line. One half was read while the
grammars were written, of the other one only these numbers were. One whole source was never read at all:
HttpParamsDataset.
"""

import argparse
import asyncio
import csv
import gc
import hashlib
import importlib
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import parse_qsl, unquote_plus, urlsplit

import yaml
from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_hardening.security.input_validation import InputValidationMiddleware, Inspector
from fastapi_hardening.security.input_validation.documents import Body, body_texts
from fastapi_hardening.security.input_validation.reading import is_plain_json
from fastapi_hardening.security.input_validation.shape import FREE

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "concerns" / "input-validation.md"
BLOCK = re.compile(r"(<!-- measured -->\n).*?(<!-- end of measured -->)", re.DOTALL)

Part = Literal["seen", "held out", "whole"]
FOUR = ("sql", "xss", "traversal", "command")
CLEAN = "clean"


class Case(NamedTuple):
    """A text, what it is, and where it comes from.

    Attributes:
        text: What a client would send as the value of one field.
        kind: The class of the attack, or ``clean``.
        source: The list.
        part: Whether it was seen while the grammars were written.
    """

    text: str
    kind: str
    source: str
    part: Part


def half_of(line: str) -> Part:
    """Which half a line belongs to; the same for the same line, in whatever file."""
    return "seen" if hashlib.sha256(line.encode("utf-8", "surrogatepass")).digest()[0] & 1 else "held out"


# --- the lists --------------------------------------------------------------------------------------------------------


def cases(corpus: Path) -> list[Case]:
    """Every case of every list that is there, each text once a source."""
    found: dict[tuple[str, str, str], Case] = {}
    for read in (_libinjection, _fuzzdb, _http_params, _crs, _webhooks):
        for case in read(corpus):
            found.setdefault((case.source, case.kind, case.text), case)
    return list(found.values())


def _lines(path: Path) -> Iterator[str]:
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.strip() and not line.startswith("#"):
            yield line


def _libinjection(corpus: Path) -> Iterator[Case]:
    for path in sorted((corpus / "injection/libinjection/data").glob("*.txt")):
        kind = {"sqli": "sql", "xss-": "xss", "fals": CLEAN}.get(path.name[:4])
        for line in _lines(path) if kind else ():
            yield Case(unquote_plus(line), kind or "", "libinjection", half_of(line))


_FUZZDB = {
    "sql": ("sql-injection/detect/*.txt", "sql-injection/payloads-sql-blind/*.txt", "sql-injection/exploit/*.txt"),
    "xss": ("xss/xss-rsnake.txt", "xss/xss-other.txt", "xss/XSSPolyglot.txt", "html_js_fuzz/HTML5sec_Injections.txt"),
    "traversal": ("path-traversal/*.txt", "lfi/JHADDIX_LFI.txt"),
    "command": ("os-cmd-execution/command-execution-unix.txt", "os-cmd-execution/OSCommandInject.Windows.txt",
                "os-cmd-execution/command-injection-template.txt"),
    "ldap": ("ldap/ldap-injection.txt",),
    "nosql": ("no-sql-injection/mongodb.txt",),
    "xml": ("xml/xml-attacks.txt",),
    "template": ("server-side-include/*.txt",),
    "crlf": ("http-protocol/crlf-injection.txt",),
}  # fmt: skip


def _fuzzdb(corpus: Path) -> Iterator[Case]:
    for kind, patterns in _FUZZDB.items():
        for pattern in patterns:
            for path in sorted((corpus / "injection/fuzzdb").glob(pattern)):
                for line in _lines(path):
                    # Templates have a place for what is to be run or read.
                    text = line.replace("{FILE}", "etc/passwd").replace("{cmd}", "id")
                    yield Case(text, kind, "fuzzdb", half_of(line))


def _http_params(corpus: Path) -> Iterator[Case]:
    kinds = {"norm": CLEAN, "sqli": "sql", "xss": "xss", "cmdi": "command", "path-traversal": "traversal"}
    path = corpus / "injection/HttpParamsDataset/payload_train.csv"
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            for row in csv.DictReader(file):
                yield Case(row["payload"], kinds[row["attack_type"]], "HttpParamsDataset", "whole")


_CRS = {"930": "traversal", "932": "command", "941": "xss", "942": "sql"}


def _crs(corpus: Path) -> Iterator[Case]:
    for path in sorted((corpus / "injection/crs-regression").glob("*/*.yaml")):
        kind = _CRS.get(path.stem[:3])
        if kind is None:
            continue
        document = yaml.load(path.read_text(encoding="utf-8", errors="replace"), Loader=yaml.CSafeLoader)
        for test in document.get("tests", ()):
            for stage in test.get("stages", ()):
                if stage.get("output", {}).get("log", {}).get("expect_ids"):
                    for text in _values_of(stage["input"]):
                        yield Case(text, kind, "crs-regression", half_of(text))


def _values_of(request: dict[str, Any]) -> Iterator[str]:
    """The one value that carries the attack, where a request has only one: the query's or the form's."""
    data = request.get("data")
    values = [value for _, value in parse_qsl(urlsplit(str(request.get("uri", ""))).query)]
    if isinstance(data, str):
        pairs = parse_qsl(data)
        values += [value for _, value in pairs] if pairs else [unquote_plus(data)]
    if len(values) == 1 and values[0]:
        yield values[0]


def _webhooks(corpus: Path) -> Iterator[Case]:
    for path in sorted((corpus / "benign/github-webhooks").glob("*.json")):
        yield Case(path.read_text(encoding="utf-8"), "webhook", "github-webhooks", half_of(path.name))


# --- the prose of this machine ----------------------------------------------------------------------------------------


def prose() -> list[str]:
    """Texts that people wrote: the paragraphs of what is installed beside the package, licences and read-me files."""
    found: set[str] = set()
    for pattern in ("*.dist-info/**/LICENSE*", "*.dist-info/**/*.md", "*.dist-info/METADATA", "**/*.rst"):
        for path in sorted(Path(yaml.__file__).resolve().parents[1].glob(pattern)):
            text = path.read_text(encoding="utf-8", errors="replace")
            found.update(part.strip() for part in re.split(r"\n\s*\n", text) if part.strip())
    return sorted(found)


# --- the detectors ----------------------------------------------------------------------------------------------------

Detect = Callable[[str], bool]


def ours() -> Detect:
    """Every class at the default threshold, without the context that the route's types give."""
    return lambda text: bool(_INSPECTOR.inspect(text))


_INSPECTOR = Inspector()


def guards() -> Detect | None:
    """The detector of fastapi-guard with its defaults, where the package is installed."""
    try:
        module = importlib.import_module("guard_core.handlers.suspatterns_handler")
    except ImportError:
        return None
    settings = importlib.import_module("guard_core.models").SecurityConfig()
    # One for the process, made at the import without settings.
    module.SusPatternsManager._instance = None  # noqa: SLF001
    manager = module.SusPatternsManager(settings)
    loop = asyncio.new_event_loop()

    def detect(text: str) -> bool:
        answer = loop.run_until_complete(manager.detect(text, "192.0.2.1", context="request_body"))
        return bool(answer["is_threat"])

    return detect


# --- scores -----------------------------------------------------------------------------------------------------------


class Score(NamedTuple):
    """How many of how many.

    Attributes:
        hits: The right ones.
        total: All of them.
    """

    hits: int
    total: int

    @property
    def rate(self) -> float:
        """The share."""
        return self.hits / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of Wilson (1927), which also holds near 0 and 1."""
        z, n, p = 1.96, self.total, self.rate
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return max(0.0, middle - half), min(1.0, middle + half)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.rate:.1%} ({low:.1%} to {high:.1%})"


def score(detect: Detect, texts: Iterable[str], *, clean: bool) -> Score:
    """How many attacks were found, or clean texts passed."""
    results = [detect(text) != clean for text in texts]
    return Score(sum(results), len(results))


def leaves(document: Any) -> Iterator[str]:
    """The texts of a JSON document."""
    if isinstance(document, str):
        yield document
    elif isinstance(document, (list, dict)):
        for child in document.values() if isinstance(document, dict) else document:
            yield from leaves(child)


def microseconds(work: Callable[[], object], rounds: int = 200) -> float:
    """The best of several rounds, of the processor's time, for other programs run here, too."""
    best = math.inf
    for _ in range(5):
        started = time.process_time()
        for _ in range(rounds):
            work()
        best = min(best, (time.process_time() - started) / rounds)
    return best * 1e6


BODIES = {
    "orders": {
        "customer": {"name": "Ann O'Brien", "email": "ann@example.com", "id": "3f2b8c1e-9d41-4c7e-8a55-0c5f5f0f7a11"},
        "placed_at": "2026-01-31T12:30:00+01:00",
        "lines": [
            {"product": number, "name": "Kettle, steel", "quantity": 1, "note": "leave it with the neighbours please",
             "picture": f"https://shop.example/pictures/kettle-{number}.png"}
            for number in range(11)
        ],
    },
    "a comment": {"text": "It's a fine day, and we were at the lake; nobody was there. (The weather was good.) " * 24},
}  # fmt: skip


def report(corpus: Path, *, peers: bool) -> Iterator[str]:
    """The tables, in Markdown."""
    every = cases(corpus)
    detectors: dict[str, Detect] = {"ours": ours()}
    guard = guards() if peers else None
    if guard is not None:
        detectors["fastapi-guard"] = guard
    yield "| list | class | part | texts | " + " | ".join(detectors) + " |"
    yield "|---|---|---|---|" + "---|" * len(detectors)
    keys = sorted({(case.source, case.kind, case.part) for case in every if case.kind != "webhook"})
    for source, kind, part in keys:
        texts = [case.text for case in every if (case.source, case.kind, case.part) == (source, kind, part)]
        cells = []
        for name, detect in detectors.items():
            # The peer takes 50 ms and more for a text.
            some = texts if name == "ours" else texts[:: max(1, len(texts) // 30)]
            cells.append(str(score(detect, some, clean=kind == CLEAN)))
        yield f"| {source} | {kind} | {part} | {len(texts)} | {' | '.join(cells)} |"
    yield ""
    yield from _summary(every, detectors["ours"])
    # What the lists above take in memory is no part of an application that would be looked through for garbage.
    gc.collect()
    gc.freeze()
    yield ""
    yield f"A GET without any sign of an attack: {get_microseconds():.1f} microseconds."
    yield ""
    yield "| body | bytes | microseconds a 2 KB body |"
    yield "|---|---|---|"
    for name, document in BODIES.items():
        body = json.dumps(document).encode()

        def work(body: bytes = body) -> None:
            if not is_plain_json(body):
                document = Body(body, "application/json", b"application/json", "")
                for text in body_texts(document, FREE, most_bytes=len(body), files=False):
                    _INSPECTOR.inspect(text.value)

        yield f"| {name} | {len(body)} | {microseconds(work) * 2048 / len(body):.0f} |"
        if guard is not None:
            text = body.decode()
            spent = microseconds(lambda text=text: guard(text), 1) * 2048 / len(body)  # type: ignore[misc]
            yield f"| {name}, fastapi-guard's detector | {len(body)} | {spent:.0f} |"


def get_microseconds() -> float:
    """What the layer adds to a GET without any sign that a grammar begins with."""

    async def answer(_scope: Scope, _receive: Receive, _send: Send) -> None: ...

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(_message: Message) -> None: ...

    shop = FastAPI()
    shop.add_api_route("/search", lambda q="", page=1: (q, page))
    layer = InputValidationMiddleware(answer)
    headers = [
        (b"host", b"shop.example"),
        (b"user-agent", b"Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0"),
        (b"accept", b"application/json"),
        (b"referer", b"https://shop.example/"),
    ]
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "GET",
        "path": "/search",
        "query_string": b"q=green+tea&page=2",
    }
    scope |= {"raw_path": b"/search", "root_path": "", "headers": headers, "client": ("192.0.2.1", 1), "server": None}

    async def spent(app: ASGIApp, times: int = 2000) -> float:
        best = math.inf
        for _ in range(5):
            started = time.process_time()
            for _ in range(times):
                await app(scope, receive, send)
            best = min(best, (time.process_time() - started) / times)
        return best * 1e6

    async def both() -> float:
        return await spent(layer) - await spent(answer)

    return asyncio.run(both())


def _summary(every: list[Case], detect: Detect) -> Iterator[str]:
    """What was held out, all lists together, but for the tests of single rules of a rule set."""
    held = [case for case in every if case.part != "seen" and case.source != "crs-regression"]
    found = {
        kind: score(detect, [case.text for case in held if case.kind == kind], clean=False)
        for kind in FOUR
        if any(case.kind == kind for case in held)
    }
    clean = score(detect, [case.text for case in held if case.kind == CLEAN], clean=True)
    written = score(detect, prose(), clean=True)
    hooks = [json.loads(case.text) for case in every if case.kind == "webhook"]
    passed = sum(not any(map(detect, leaves(hook))) for hook in hooks)
    macro = sum(each.rate for each in found.values()) / max(1, len(found))
    yield "| held out, all lists but crs-regression | |"
    yield "|---|---|"
    for kind, each in found.items():
        yield f"| {kind} found, of {each.total} | {each} |"
    yield f"| mean of the classes | {macro:.1%} |"
    yield f"| clean texts passed, of {clean.total} | {clean} |"
    yield f"| balanced accuracy | {(macro + clean.rate) / 2:.1%} |"
    yield f"| paragraphs of read-me files and licences passed, of {written.total} | {written} |"
    yield f"| whole webhook bodies passed | {passed} of {len(hooks)} |"


def main() -> None:
    """Prints the tables, and puts them into the page if asked to."""
    parser = argparse.ArgumentParser(description="How well the validator tells attacks from honest texts.")
    parser.add_argument("corpus", type=Path, help="the folder with the public lists")
    parser.add_argument("--no-peers", action="store_true", help="without fastapi-guard, which takes minutes")
    parser.add_argument("--docs", action="store_true", help="also put the tables into the page of the concern")
    options = parser.parse_args()
    if not options.corpus.is_dir():
        sys.exit(f"{options.corpus} is no folder; it has to hold the lists that {Path(__file__).name} names")
    text = "\n".join(report(options.corpus, peers=not options.no_peers))
    print(text)
    if options.docs:
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(BLOCK.sub(lambda match: f"{match[1]}\n{text}\n\n{match[2]}", page), encoding="utf-8")


if __name__ == "__main__":
    main()
