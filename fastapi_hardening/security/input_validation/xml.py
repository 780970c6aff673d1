"""XML entities: a document that has the parser read files, call addresses or fill the memory.

A declaration of an entity is enough, for a document that only holds data has none; so is ``XInclude``. The doctype of a
page of HTML is none.
"""

from collections.abc import Iterator

from fastapi_hardening.security.input_validation.pattern import Pattern
from fastapi_hardening.security.input_validation.reading import Reading

CLASS = "xml"
CERTAIN = 5

_ENTITY = Pattern(
    r"<!entity\s|<!doctype\s[^>\[]{0,200}\[|<!doctype\s{1,9}\S{1,60}\s{1,9}(?:system\b|"
    r"public\s{1,9}[\"'](?!-//w3c|-//ietf))|<!(?:element|attlist|notation)\s"
)
_INCLUDE = Pattern(
    r"<xi:include\b|http://www\.w3\.org/2001/xinclude|<xsl:(?:stylesheet|value-of|include|"
    r"import|copy-of|variable|template)\b|<\?xml-stylesheet\b|xsi:schemalocation\s{0,3}=|"
    r"<!\[cdata\[\s{0,3}[<'\"]"
)


def find(reading: Reading) -> Iterator[tuple[str, int]]:
    """The declarations in a document, each with its score."""
    lower = reading.lower
    if "<!" in lower and reading.search(_ENTITY):
        yield "entity", CERTAIN
    if (
        "<x" in lower or "xinclude" in lower or "<?xml-s" in lower or "xsi:" in lower or "<![" in lower
    ) and reading.search(_INCLUDE):
        yield "include", CERTAIN
