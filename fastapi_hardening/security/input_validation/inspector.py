"""Looks at single values, by every class or by some, and says what was found. Knows neither ASGI nor documents.

Every look is linear in the length of the value, the whole value is looked at, and how much work it was is counted, so
that a test can hold it.

Example:
    >>> inspector = Inspector()
    >>> [found.id for found in inspector.inspect("1' or '1'='1")]
    ['sql.quoted-tautology']
    >>> inspector.inspect("It's 1 or 2 o'clock; select the best from our union of workers.")
    ()
"""

import importlib
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

from fastapi_hardening.security.input_validation.prose import is_prose
from fastapi_hardening.security.input_validation.reading import Reading, is_plain

ENCODING = "encoding"

_EVERY_SIGN = bytes(range(256))

# Of each class the module, the function, and the signs without any of which it finds nothing. A text without any signs
# at all is shown to all of them.
_GRAMMARS: dict[str, tuple[str, str, bytes]] = {
    "sql": ("sql", "find", _EVERY_SIGN),
    "xss": ("html", "find", b"<>(`=:[+$*"),
    "traversal": ("traversal", "find", b"/\\:%\xef\xee\xe2="),
    "command": ("command", "find", b";|&\n\r$`<>(\\/?[{'\"+%:^"),
    "template": ("template", "find", b"{<@[#$(_"),
    "ldap": ("ldap", "find", b"*|&()@/"),
    "nosql": ("nosql", "find", b"$'\"|=(;:"),
    "prototype": ("nosql", "find_prototype", b"[.:='\"("),
    "xml": ("xml", "find", b"<:"),
    "crlf": ("crlf", "find", b"\r\n\\:\xe5"),
    "jndi": ("jndi", "find", b"$:"),
    "ssrf": ("ssrf", "find", b":"),
}

CLASSES: tuple[str, ...] = (*_GRAMMARS, ENCODING)
"""Every class of attack that is known."""

_Find = Callable[[Reading], Iterator[tuple[str, int]]]


@lru_cache(maxsize=1)
def _grammars() -> tuple[tuple[str, _Find, frozenset[int]], ...]:
    """The grammars; imported at the first look, because many processes never look."""
    package = __name__.rpartition(".")[0]
    return tuple(
        (kind, getattr(importlib.import_module(f"{package}.{module}"), function), frozenset(signs))
        for kind, (module, function, signs) in _GRAMMARS.items()
    )


DEFAULT_THRESHOLD = 5


class Hit(NamedTuple):
    """What a grammar found in a value.

    Attributes:
        id: Its stable name: the class, a dot, and the reason.
        score: How sure it is; one of 5 stands alone, several weaker ones of a class add up.
    """

    id: str
    score: int

    @property
    def kind(self) -> str:
        """The class."""
        return self.id.partition(".")[0]


class Inspector:
    """Looks at values.

    Args:
        classes: The classes that are looked for.
        threshold: The score that the findings of one class need together to count.

    Attributes:
        steps: How many characters and tokens were looked at so far.
    """

    def __init__(self, classes: Iterable[str] = CLASSES, *, threshold: int = DEFAULT_THRESHOLD) -> None:
        wanted = frozenset(classes)
        self._budget = ENCODING in wanted
        self.classes = wanted
        self.threshold = threshold
        self.steps = 0

    def inspect(self, value: str, *, in_line: bool = False) -> tuple[Hit, ...]:
        """What is in a value.

        Args:
            value: The text, as the application will get it.
            in_line: It stands where a line break has no business.

        Returns:
            The findings of every class that reaches the threshold; nothing for most values.
        """
        if is_plain(value) or (is_prose(value) and not (in_line and "\n" in value)):
            return ()
        return self._closely(Reading(value, in_line=in_line))

    def _closely(self, reading: Reading) -> tuple[Hit, ...]:
        found: list[Hit] = []
        signs = frozenset(reading.signs)
        for name, find, needed in _grammars():
            if name not in self.classes:
                continue
            if signs and signs.isdisjoint(needed):
                continue
            hits: dict[str, int] = {}
            for reason, score in find(reading):
                hits[reason] = max(score, hits.get(reason, 0))
            if hits and sum(hits.values()) >= self.threshold:
                found += [Hit(f"{name}.{reason}", score) for reason, score in hits.items()]
        if reading.exhausted and self._budget:
            found.append(Hit(f"{ENCODING}.budget", self.threshold))
        self.steps += reading.steps
        return tuple(found)
