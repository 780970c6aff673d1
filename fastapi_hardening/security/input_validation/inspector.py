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

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from fastapi_hardening.security.input_validation import (
    command,
    crlf,
    html,
    jndi,
    ldap,
    nosql,
    sql,
    ssrf,
    template,
    traversal,
    xml,
)
from fastapi_hardening.security.input_validation.reading import Reading, is_plain

ENCODING = "encoding"

_Find = Callable[[Reading], Iterator[tuple[str, int]]]

_GRAMMARS: dict[str, _Find] = {
    sql.CLASS: sql.find,
    html.CLASS: html.find,
    traversal.CLASS: traversal.find,
    command.CLASS: command.find,
    template.CLASS: template.find,
    ldap.CLASS: ldap.find,
    nosql.CLASS: nosql.find,
    nosql.PROTOTYPE: nosql.find_prototype,
    xml.CLASS: xml.find,
    crlf.CLASS: crlf.find,
    jndi.CLASS: jndi.find,
    ssrf.CLASS: ssrf.find,
}

# Without any of these signs a grammar finds nothing; a text without any signs at all is shown to all of them.
_SIGNS: dict[str, bytes] = {
    html.CLASS: b"<>(`=:[+$",
    traversal.CLASS: b"/\\:%\xef\xee\xe2" + b"=",
    command.CLASS: b";|&\n\r$`<>(\\/?[{'\"+%:",
    template.CLASS: b"{<@[#$(_",
    ldap.CLASS: b"*|&()@/",
    nosql.CLASS: b"$'\"|=(;:",
    nosql.PROTOTYPE: b"[.:='\"(",
    xml.CLASS: b"<:",
    crlf.CLASS: b"\r\n\\:\xe5",
    jndi.CLASS: b"$:",
    ssrf.CLASS: b":",
}

CLASSES: tuple[str, ...] = (*_GRAMMARS, ENCODING)
"""Every class of attack that is known."""

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
        self._grammars = [
            (name, find, frozenset(_SIGNS.get(name, bytes(range(256)))))
            for name, find in _GRAMMARS.items()
            if name in wanted
        ]
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
        if is_plain(value):
            return ()
        return self._closely(Reading(value, in_line=in_line))

    def _closely(self, reading: Reading) -> tuple[Hit, ...]:
        found: list[Hit] = []
        signs = frozenset(reading.signs)
        for name, find, needed in self._grammars:
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
