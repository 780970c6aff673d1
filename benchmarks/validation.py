"""How well the validator tells attacks from the rest, and what it costs: `python benchmarks/validation.py CORPUS`.

CORPUS is a folder with public lists, each in a folder of its own: `injection/HttpParamsDataset`, `injection/fuzzdb`,
`injection/libinjection`, `injection/crs-regression` and `benign/github-webhooks`; what is missing is left out. No list
is a part of this project.

How parts are held out: of every file the lines are split in two by a hash of the line. One half was read while the
grammars were written, of the other one only these numbers were. Two whole sources were never read at all:
HttpParamsDataset and crs-regression. The page of the concern says more.
"""

import csv
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import parse_qsl, unquote_plus, urlsplit

import yaml

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
