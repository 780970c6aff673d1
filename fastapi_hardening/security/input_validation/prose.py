r"""Tells what people write to each other from all the rest, in one look: sentences with their usual punctuation.

Comments, reviews and messages are most of what an application is sent, and their apostrophes, brackets and semicolons
are the very signs that every grammar begins with. Here each of them is asked whether it stands where a sentence has it:
an apostrophe within a word, a bracket between a blank and a word, a semicolon before a word that is no command and no
clause. If all do, no grammar could find anything, and none is asked. In doubt the answer is no, which costs time only.

Example:
    >>> is_prose("It's a fine day (at last); we said: \u201chow nice!\u201d")
    True
    >>> is_prose("a day'; drop tables"), is_prose("a day; cat it"), is_prose("f(1)")
    (False, False, False)
"""

import re
from functools import lru_cache

from fastapi_hardening.security.input_validation.command import is_command
from fastapi_hardening.security.input_validation.pattern import Pattern
from fastapi_hardening.security.input_validation.reading import PLAIN, starts_like_a_query, words
from fastapi_hardening.security.input_validation.sql import KEYWORDS, is_function

# Each sign with the character before it, the one behind it, and the word that comes next.
_SIGN = Pattern(r"['\"():/%;&\r\n](?<=(..))(?=(.?))(?=[\s\"'(.,;!-]{0,6}([a-z]{0,24}))", re.DOTALL)
_CLAUSES = KEYWORDS | words(
    "not isnull notnull escape match do done fi return var let const this while for db new throw typeof void"
)
_ALONE = ("select", "waitfor", "shutdown", "reconfigure")
_QUERIES = words("select union case exec execute exists values declare waitfor insert delete update drop")
_SINKS = words("alert prompt confirm eval function fetch atob unescape require system exec passthru")

# Letters of today's scripts that decode to nothing but themselves, and the signs that people write beside them.
_FOREIGN = Pattern(
    "[\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u0131\u0134-\u013e\u0141-\u0148\u014a-\u017e\u0386\u0388-\u03ce\u0400-\u052f\u0531-\u0556\u0561-\u0586\u05d0-\u05ea"
    "\u0621-\u064a\u0660-\u0669\u0901-\u0939\u093e-\u094d\u0966-\u096f\u0e01-\u0e32\u0e34-\u0e3a\u0e40-\u0e4e"
    "\u3041-\u3094\u30a1-\u30fe\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3"
    "\u2013\u2014\u2022\u20ac\u00a3\u00a9\u00ae\u00b0\u3001\u3002\U0001f300-\U0001f5ff\U0001f600-\U0001f64f]++"
)
_QUOTATION = str.maketrans("\u2018\u2019\u201c\u201d\u201e", '\'\'"""')


def is_prose(text: str) -> bool:
    """Whether a text is made of words and of punctuation where sentences have it, so that no grammar finds anything."""
    if not text.isascii():
        text = _FOREIGN.sub("x", text.translate(_QUOTATION))
    signs = text.encode("utf-8", "surrogatepass").translate(None, PLAIN)
    if signs.translate(None, _USUAL) or ".." in text or "--" in text or "_" in text:
        return False
    lower = text.lower()
    return (
        all(map(_is_punctuation, set(_SIGN.findall(f" {lower}"))))
        and not starts_like_a_query(text)
        and not is_command(_FIRST.match(lower)[1])  # type: ignore[index]
        and (":" not in lower or ("script" not in lower and "mocha" not in lower))
        and not any(word in lower for word in _ALONE)
        and not any(_is_called(part.rstrip().rpartition(" ")[2]) for part in lower.split("(")[:-1])
    )


_USUAL = b"'\"():/%;&\r\n"
_FIRST = Pattern(r"[\s\"'(-]{0,9}([a-z]{0,24})")


@lru_cache(maxsize=8192)
def _is_punctuation(found: tuple[str, str, str]) -> bool:  # noqa: PLR0911 - a case for each sign
    """Whether a sign stands where a sentence has it, and before a word that makes nothing else of it."""
    around, after, word = found
    before, sign = around[0], around[1]
    ends = not after or after in " \t\r\n.,;:)!?"
    if sign in "'\"":
        opens = before in " \t\r\n(" and after.isalpha()
        closes = ends and (before.isalpha() or before in ".,!?")
        within = sign == "'" and before.isalpha() and after.isalpha()
        return (opens or closes or within) and word not in _CLAUSES
    if sign == "(":
        return before in " \t\r\n\"'(" and (after.isalnum() or after in "\"'") and word not in _QUERIES
    if sign == ")":
        return ends and (before.isalnum() or before in ".!?%\"'") and word not in _CLAUSES
    if sign == ":" and not after.isdigit():
        return ends and (before.isalnum() or before == ")") and word not in _CLAUSES
    if sign in ":/":
        return before.isdigit() and after.isdigit()
    if sign == "%":
        return ends and (before.isdigit() or before == " ") and word not in _CLAUSES
    if sign in ";&" and not (after.isspace() and (sign == ";" or before.isspace()) and word):
        return False
    return word not in _CLAUSES and not is_command(word)


@lru_cache(maxsize=4096)
def _is_called(word: str) -> bool:
    """Whether a word before a bracket is a function that somebody would call."""
    return word in _SINKS or is_function(word)
