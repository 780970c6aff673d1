"""Regular expressions that are compiled when they are first used.

The grammars have some hundred, and compiling all of them takes longer than importing the whole rest of the package;
most processes never need most of them. All are written so that they cannot go back without end: a repeat has a bound,
or is possessive. A test holds them to it.

Example:
    >>> digits = Pattern(r"[0-9]{1,3}")
    >>> digits.search("a1")[0]
    '1'
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

_METHODS = ("findall", "finditer", "fullmatch", "match", "search", "split", "sub")


class Pattern:
    """A regular expression.

    Args:
        source: How it is written.
        flags: Those of :mod:`re`.
    """

    __slots__ = ("findall", "finditer", "flags", "fullmatch", "match", "search", "source", "split", "sub")

    findall: Callable[..., list[str]]
    finditer: Callable[..., Iterator[re.Match[str]]]
    fullmatch: Callable[..., re.Match[str] | None]
    match: Callable[..., re.Match[str] | None]
    search: Callable[..., re.Match[str] | None]
    split: Callable[..., list[str]]
    sub: Callable[..., str]

    def __init__(self, source: str | bytes, flags: int = 0) -> None:
        self.source = source
        self.flags = flags

    def __getattr__(self, name: str) -> Any:
        # Comes here only before the first use, as the slots of the methods are empty until then.
        if name not in _METHODS:
            raise AttributeError(name)
        compiled = re.compile(self.source, self.flags)
        for method in _METHODS:
            setattr(self, method, getattr(compiled, method))
        return getattr(self, name)
