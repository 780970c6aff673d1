r"""Undoes the encodings under which an attack hides from a reader that does not decode, within a budget.

Percent signs, also twice and in Microsoft's ``%u``; UTF-8 that is longer than it may be; HTML entities; the escapes of
JavaScript and JSON; full-width letters and curly quotes; characters that nobody sees. One round undoes one layer of
each. What is still encoded after the last round is not believed to be anything: it is told as ``exhausted``, which
counts as a finding, so that one layer more does not buy a way around.

It is *not* what the application gets: nothing that is decoded here is handed on.

Example:
    >>> decode("%252e%252e%2fetc%2fpasswd").text
    '../etc/passwd'
    >>> decode("&lt;scr\u0069pt&gt;").text
    '<script>'
"""

import re
import unicodedata
from html.entities import html5
from typing import NamedTuple

from fastapi_hardening.security.input_validation.pattern import Pattern

MOST_ROUNDS = 4

_PERCENT = Pattern(r"(?:%[0-9A-Fa-f]{2})++")
_MICROSOFT = Pattern(r"%[uU]([0-9A-Fa-f]{4})")
_ENTITY = Pattern(r"&(?:#[xX]0*+([0-9A-Fa-f]{1,6})|#0*+([0-9]{1,7})|([A-Za-z][A-Za-z0-9]{1,31}));?")
_ESCAPE = Pattern(r"\\(?:u([0-9A-Fa-f]{4})|u\{0*+([0-9A-Fa-f]{1,6})\}|x([0-9A-Fa-f]{2})|0(?![0-9xX]))")

_OLDEST = ("lt", "gt", "quot", "amp", "LT", "GT", "QUOT", "AMP")
_HIGHEST = 0x10FFFF
_SURROGATES = range(0xD800, 0xE000)

# What is not seen: controls but for blanks, soft hyphen, zero-width characters, marks of direction, byte order mark.
_UNSEEN = dict.fromkeys(
    [
        *range(9),
        *range(14, 32),
        0x7F,
        0xAD,
        *range(0x200B, 0x2010),
        *range(0x202A, 0x202F),
        *range(0x2060, 0x2065),
        0xFEFF,
    ]
)
# Best-fit conversions of databases make quotes and slashes of these.
_ALIKE = str.maketrans(
    "\u2018\u2019\u201a\u201b\u02b9\u02bc\u2032\u2035\u201c\u201d\u201e\u201f\u2033\u2044\u2215\u2571\u2216",
    "'" * 8 + '"' * 5 + "///" + "\\",
)
_HIDDEN = Pattern("[\\x00-\\x08\\x0e-\\x1f\\x7f]")


class Decoded(NamedTuple):
    """A text as it is meant.

    Attributes:
        text: The text with its encodings undone.
        exhausted: It is still encoded after the last round.
    """

    text: str
    exhausted: bool


def decode(text: str, rounds: int = MOST_ROUNDS) -> Decoded:
    """Undoes every layer of every encoding.

    Args:
        text: What the client sent, as the application's parser would hand it over.
        rounds: How many layers are undone.

    Returns:
        The text; the same again if there was nothing to undo.
    """
    for _ in range(rounds):
        decoded = _one_layer(text)
        if decoded == text:
            return Decoded(text, exhausted=False)
        text = decoded
    return Decoded(text, exhausted=_one_layer(text) != text)


def _one_layer(text: str) -> str:
    if "%" in text:
        text = _MICROSOFT.sub(_from_hexadecimal, _PERCENT.sub(_from_percent, text))
    if "&" in text:
        text = _ENTITY.sub(_from_entity, text)
    if "\\" in text:
        text = _ESCAPE.sub(_from_hexadecimal, text)
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text.translate(_ALIKE).translate(_UNSEEN))
    elif _HIDDEN.search(text) is not None:
        text = text.translate(_UNSEEN)
    return text


def _character(code: int) -> str:
    return "\ufffd" if code > _HIGHEST or code in _SURROGATES else chr(code)


def _from_hexadecimal(match: re.Match[str]) -> str:
    if match.lastindex is None:
        return ""
    return _character(int(match[match.lastindex], 16))


def _from_entity(match: re.Match[str]) -> str:
    hexadecimal, decimal, name = match.groups()
    if hexadecimal is not None:
        return _character(int(hexadecimal, 16))
    if decimal is not None:
        return _character(int(decimal))
    known = html5.get(name + ";") or html5.get(name)
    if known is not None:
        return known
    # As a browser reads it, which needs no semicolon after the oldest names.
    for old in _OLDEST:
        if name.startswith(old):
            return html5[old] + name[len(old) :] + (";" if match[0].endswith(";") else "")
    return match[0]


def _from_percent(match: re.Match[str]) -> str:
    return as_text(bytes.fromhex(match[0].replace("%", "")))


def as_text(data: bytes) -> str:
    r"""Bytes as text: UTF-8, also where it is longer than it may be (RFC 3629, section 10); else byte by byte.

    Example:
        >>> as_text(b"\xc0\xae\xe0\x80\xaf\xff")
        './ÿ'
    """
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "".join(_loosely(data))


# What a first byte begins with, and how many bytes then follow; up to six bytes in all, as UTF-8 once had them.
_LEADS = ((0xC0, 0), (0xE0, 1), (0xF0, 2), (0xF8, 3), (0xFC, 4), (0x100, 5))
_CONTINUES = range(0x80, 0xC0)


def _loosely(data: bytes) -> list[str]:
    found: list[str] = []
    position, end = 0, len(data)
    while position < end:
        lead = data[position]
        position += 1
        length = next(length for limit, length in _LEADS if lead < limit)
        tail = data[position : position + length]
        if length and len(tail) == length and all(byte in _CONTINUES for byte in tail):
            code = lead & (0x3F >> length)
            for byte in tail:
                code = code << 6 | byte & 0x3F
            found.append(_character(code))
            position += length
        elif lead not in (0xC0, 0xC1):
            # These two begin nothing but a form that is too long; a lax decoder takes what follows for itself.
            found.append(chr(lead))
    return found
