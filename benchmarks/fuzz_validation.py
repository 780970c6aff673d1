"""Looks for texts that the validator takes long to read: `scripts/fuzz [SECONDS] [SEED]`.

Texts are made of the pieces that the grammars begin with, repeated and mixed at random, and read at two lengths. Two
things are bounded: what a byte may cost, as a multiple of what a byte of an ordinary slow text (a page of source code)
costs in the same run, and how much more a byte of a text ten times as long may cost, which is what shows work that
grows faster than the text. The worst texts are shrunk and printed. The run ends with 1 where a bound is broken.
"""

import random
import string
import sys
import time
from collections.abc import Callable
from pathlib import Path

from fastapi_hardening.security.input_validation import Inspector
from fastapi_hardening.security.input_validation.sql import KEYWORDS

SHORT, LONG = 2_000, 20_000
MOST_TIMES_CODE = 6.0
MOST_GROWTH = 2.5
SHOWN = 5

PIECES = [
    *string.punctuation, " ", "\n", "\t", "a", "1", "é", "\x00", "../", "..\\", "%25", "%27", "&#", "&lt;",
    "\\u0027", "<a ", "<svg ", "</", "<!--", "/*", "*/", "--", "{{", "}}", "${", "$(", "`", "''", '""', "x=", "on",
    "onload=", "script", "javascript:", "data:", "http://", "file:", "jndi:", "[[", "]]", "()", ")(", "|(", "0x", ".e",
    "=1", "' or ", "\\n", "__proto__", "$where", "alert(", "(select ", ";cat ", "|id", "&&ls ", "/etc/", "/bin/",
    "c:\\", "<?", "<%", "#{", *sorted(KEYWORDS)[::3], "cat", "id", "ls", "wget", "bash", "if", "for", "echo", "$ifs",
]  # fmt: skip


def spent(text: str) -> float:
    """Seconds of the processor's time a character, the least of three looks."""
    inspector = Inspector()
    best = float("inf")
    for _ in range(3):
        started = time.process_time()
        inspector.inspect(text)
        best = min(best, time.process_time() - started)
    return best / len(text)


def filled(pieces: list[str], length: int) -> str:
    """Pieces again and again, up to a length; the last one only once, at the end."""
    *body, tail = pieces
    piece = "".join(body) or tail
    return (piece * (length // len(piece) + 1))[:length] + tail


def shrunk(pieces: list[str], is_bad: Callable[[list[str]], bool]) -> list[str]:
    """Fewer pieces that are still bad."""
    smaller = True
    while smaller and len(pieces) > 1:
        smaller = False
        for index in range(len(pieces)):
            fewer = pieces[:index] + pieces[index + 1 :]
            if is_bad(fewer):
                pieces, smaller = fewer, True
                break
    return pieces


def main() -> None:
    """Searches for so many seconds, and says what was worst."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 1  # noqa: PLR2004 - the second argument
    chance = random.Random(seed)  # noqa: S311 - no secrets are made of it
    code = Path(__file__).read_text(encoding="utf-8")
    usual = spent(filled([code, ""], LONG))
    results: list[tuple[float, float, list[str]]] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pieces = chance.choices(PIECES, k=chance.randint(1, 8))
        if chance.random() < 0.5:  # noqa: PLR2004 - every other one
            pieces = [piece * chance.randint(1, 40) for piece in pieces]
        long = spent(filled(pieces, LONG))
        results.append((long / usual, long / spent(filled(pieces, SHORT)), pieces))
    print(f"{len(results)} texts of {LONG} characters, seed {seed}; source code takes {usual * 1e6:.2f} us a character")
    broken = False
    for name, index, most in (("times the source code", 0, MOST_TIMES_CODE), ("growth", 1, MOST_GROWTH)):
        results.sort(key=lambda result: result[index], reverse=True)
        print(f"\n{name}, at most {most}:")
        for result in results[:SHOWN]:
            # Measured again, for another program may have run meanwhile.
            def is_bad(pieces: list[str], index: int = index, most: float = most) -> bool:
                long = spent(filled(pieces, LONG))
                return (long / usual, long / spent(filled(pieces, SHORT)))[index] > most

            bad = result[index] > most and is_bad(result[2])
            pieces = shrunk(result[2], is_bad) if bad else result[2]
            broken = broken or bad
            print(f"  {result[index]:6.1f}  {'BROKEN ' if bad else ''}{''.join(pieces)[:160]!r}")
    sys.exit(broken)


if __name__ == "__main__":
    main()
