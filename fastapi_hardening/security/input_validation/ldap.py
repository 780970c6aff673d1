"""LDAP and XPath injection: a value that ends the condition it is put into and adds one of its own.

A parenthesis closes, another opens, and what follows is an operator of a filter (RFC 4515) or an attribute with a wild
card; or a quote ends a string of XPath and its functions follow. An asterisk alone searches.
"""

from collections.abc import Iterator

from fastapi_hardening.security.input_validation.pattern import Pattern
from fastapi_hardening.security.input_validation.reading import Reading

CLASS = "ldap"
CERTAIN = 5

_FILTER = Pattern(
    r"\*\s{0,3}\)?\s{0,3}\(\s{0,3}[|&!]|\*\)\((?!\w{1,20}\))|\)\s{0,3}\(\s{0,3}[|&!]\s{0,3}[()]|\(\s{0,3}[|"
    r"&]\s{0,3}\(\s{0,3}!?\s{0,3}\(?\s{0,3}[\w-]{1,40}\s{0,3}[~<>]?=|"
    r"\)\s{0,3}\(\s{0,3}[\w-]{1,40}\s{0,3}[~<>]?=\s{0,3}[^()]{0,60}(?:\*|\)\s{0,3}$|$)|"
    r"\*\s{0,3}\)\s{0,3}(?:\)\s{0,3}){1,5}(?:%00|$)|\(\s{0,3}[\w-]{1,40}=\*\s{0,3}\)"
)
_ONLY = Pattern(
    r"\s{0,3}(?:\*\s{0,3}\|{1,2}|\*\(\)\|.{0,8}|\(\*\)\*\)|@\*|//\*|\*/\*|"
    r"[\w.@-]{0,40}\*\)\s{0,3}\(?\s{0,3}(?:[|&].{0,60})?)\s{0,3}$"
)
_XPATH_WORDS = (
    "name(",
    "count(",
    "count (",
    " //",
    "'//",
    "|//",
    "length(",
    "substring(",
    "position(",
    "with(",
    "contains(",
    "node(",
    "text(",
)
_XPATH = Pattern(
    r"['\"]\s{0,4}(?:or|and|\|)\s{0,4}(?:name\(|count\(|//|string-length\(|substring\(|"
    r"position\(|starts-with\(|contains\(|node\(|text\()|\|\s{0,3}//\*|count\s{0,3}\(\s{0,3}/"
)


def find(reading: Reading) -> Iterator[tuple[str, int]]:
    """The condition that a value adds, with its score."""
    lower = reading.lower
    reading.steps += 2 * len(lower)
    if "(" in lower or ")" in lower or "*" in lower:
        if (
            any(sign in lower for sign in ("*", "(|", "(&", "(!", ")("))
            and _FILTER.search(lower)
            and ("*" in lower or "|" in lower or "&" in lower or "!" in lower or "objectclass" in lower)
        ):
            yield "filter", CERTAIN
        elif _ONLY.match(lower):
            yield "wild-card", CERTAIN
        if any(word in lower for word in _XPATH_WORDS) and _XPATH.search(lower):
            yield "xpath", CERTAIN
