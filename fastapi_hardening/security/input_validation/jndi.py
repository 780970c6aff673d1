"""Look-ups of logging libraries: a value that a logger resolves instead of writing it (CVE-2021-44228, Log4Shell).

Look-ups nest, and that is how they are disguised: ``${${lower:j}ndi:...}``. They are resolved from the inside out, as
the logger would, a bounded number of times.
"""

import re
from collections.abc import Iterator

from fastapi_hardening.security.input_validation.pattern import Pattern
from fastapi_hardening.security.input_validation.reading import Reading

CLASS = "jndi"
CERTAIN = 5
SUSPICIOUS = 3

_MOST_ROUNDS = 8
_INNERMOST = Pattern(
    r"\$\{(?:(?:lower|upper|date|sys|env|main|ctx|java|web|bundle|map|marker|sd|log4j|"
    r"base64|k8s|spring|docker|event)?:)?([^${}]{0,200})\}"
)
_LOOKUP = Pattern(r"\$\{\s{0,3}jndi\s{0,3}:|jndi:(?:ldaps?|rmi|dns|iiop|corba|nds|nis|https?):")
_NESTED = Pattern(r"\$\{[^}]{0,60}\$\{(?:lower|upper|::-|env:|sys:|date:)")
_SECRETS = Pattern(r"\$\{(?:env|sys|java|ctx|main|bundle|web|docker|k8s|spring|log4j):[\w.:-]{1,60}\}")


def find(reading: Reading) -> Iterator[tuple[str, int]]:
    """The look-ups in a text, each with its score."""
    text = reading.lower
    if "${" not in text and "jndi:" not in text:
        return
    for _ in range(_MOST_ROUNDS):
        reading.steps += 2 * len(text)
        if _LOOKUP.search(text):
            yield "lookup", CERTAIN
            return
        resolved = _INNERMOST.sub(_resolved, text)
        if resolved == text:
            break
        text = resolved
    if reading.search(_NESTED):
        yield "nested", CERTAIN
    elif reading.search(_SECRETS):
        yield "secret", SUSPICIOUS


def _resolved(match: re.Match[str]) -> str:
    # What a look-up gives when there is no such key: its default, behind ":-".
    _, divided, default = match[1].rpartition(":-")
    return default if divided else match[1]
