"""A value as every class of attack reads it: as it came, as it is meant, in lower case; and how much work it was.

Most values are plain words and numbers. One pass over the bytes, in C, tells them from the others, and they are read no
further: :func:`is_plain`.

Example:
    >>> is_plain("Only 3 are left, in size 42."), is_plain("3' or 1=1")
    (True, False)
"""

import re
from functools import cached_property, lru_cache

from fastapi_hardening.core.private_address import is_private_host
from fastapi_hardening.security.input_validation.decoding import decode
from fastapi_hardening.security.input_validation.pattern import Pattern

PLAIN = bytes(range(0x30, 0x3A)) + bytes(range(0x41, 0x5B)) + bytes(range(0x61, 0x7B)) + b" _-.,!?\t"
"""Letters, digits, blanks and the punctuation that no grammar begins with."""
_IN_ADDRESS = b":/{}"

# Words alone can be an attack on a number that is put into a query unquoted, or a command with its arguments.
_WORDS_SOURCE = (
    r"\s{0,9}(?:[-.\d]{1,40}(?:e\d{1,3})?\s{0,9}(?:or|and|xor|union|order|group|having|waitfor|limit|exec|execute|select|"
    r"insert|drop|delete|update|rlike|like|between|"
    r"in|where|procedure|as|is|not)|union|select|exec|order\s{1,9}by|having|etc|or|and|drop|truncate|"
    r"waitfor|procedure|shutdown|ping|which|ls|uname|netstat|nslookup|nc|ncat|powershell|wget|curl|telnet|create|grant|"
    r"insert|delete|update|alter|print|declare|where)\s"
)
_WORDS = Pattern(_WORDS_SOURCE, re.IGNORECASE)
_COMMON = Pattern(
    r"\d{1,4}[-:.]\d\d[-:.T ][\d:.T+ -]{1,30}Z?|[\w.+-]{1,64}+@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}"
    r"|(?!0x|etc/|proc/|boot|var/|win|web-inf|meta-inf|Li4v|L2V0)[\w-](?:[\w.+-]{1,200}+/?+[\w.+-]{0,200}+(?==|$)|"
    r"[A-Za-z0-9+/]{1,400}+)={0,2}",
    re.IGNORECASE,
)
# An apostrophe in a contraction or a name, which no query goes on from.
_APOSTROPHES = Pattern(
    r"(?<=[A-Za-z])'(?!And|Xor|Or|Union|Select|Like|Rlike|Regexp|Between|Having|Order|Group|Limit|Procedure|Into|Where|From|"
    r"Exec|Drop|Insert|Delete|Update|Waitfor|Not|Div|Mod|Case|Collate|Sounds|Intersect|Except)"
    r"(?:(?:s|t|re|ve|ll|d|m|em|clock)(?![\w'])|[A-Z][a-z]{2,30}(?![\w']))"
)
# A web address that is nothing else: its host is looked at, and where it goes up.
_ADDRESS = Pattern(r"https?://([a-z][a-z0-9.-]{2,80})(?=[/:]|$)", re.IGNORECASE)
_LONG, _LONG_ENOUGH, _MANY_WORDS = 120, 4000, 15
_WORD = Pattern(r"(?<![^\s(])[A-Za-z\u00c0-\u024f]{2,20}[,.]?\s")


def is_plain(text: str) -> bool:
    """Whether nothing in a text can be an attack of any class, as one look tells."""
    signs = text.encode("utf-8", "surrogatepass").translate(None, PLAIN)
    if signs:
        if not signs.strip(b"'"):
            return ".." not in text and not starts_like_a_query(text) and len(_APOSTROPHES.findall(text)) == len(signs)
        if text[:4] == "http":
            return ".." not in text and not signs.translate(None, _IN_ADDRESS) and _is_address(text)
        return ".." not in text and _is_common(text)
    if ".." in text or "__proto__" in text:
        return False
    return " " not in text or (not starts_like_a_query(text) and "select" not in text.lower())


def starts_like_a_query(text: str) -> bool:
    """Whether a text begins with words that are an attack without any sign."""
    words = text.split(None, 1)
    if not words or (words[0][0].isalpha() and words[0].lower() not in _FIRST_WORDS):
        return False
    return _WORDS.match(text) is not None


# Without blanks there are no words that could be a query.
_PLAIN_IN_TARGET = PLAIN.replace(b" ", b"").replace(b"\t", b"")


def is_plain_query(query: bytes) -> bool:
    """Whether no name and no value of a query needs a look, told from the query as it was sent."""
    if query.translate(None, _PLAIN_IN_TARGET + b"=&+") or b".." in query or b"proto" in query:
        return False
    if b"+" not in query:
        return True
    query = query.lower()
    if b"select" in query:
        return False
    for text in query.replace(b"&", b"=").split(b"="):
        first, blank, _ = text.partition(b"+")
        if blank and (not first.isalpha() or first.decode() in _FIRST_WORDS):
            return False
    return True


def is_plain_path(path: str) -> bool:
    """Whether no single segment of a path needs a look."""
    return path.isascii() and not path.encode().translate(None, _PLAIN_IN_TARGET + b"/") and ".." not in path


_JSON_MARKS = b'{}[]":,\r\n'
_BEGINS_IN_JSON = Pattern(rb'"' + _WORDS_SOURCE.encode(), re.IGNORECASE)


def is_plain_json(data: bytes) -> bool:
    """Whether every text in a JSON document is plain, told without reading it as JSON; if in doubt it is not."""
    return (
        not data.translate(None, PLAIN + _JSON_MARKS)
        and b".." not in data
        and b"{{" not in data
        and b"proto" not in data
        and b"script" not in data
        and b"select" not in data.lower()
        and _BEGINS_IN_JSON.search(data) is None
    )


def _is_common(text: str) -> bool:
    """Whether a text is one of those that most documents have: a time, a mail address, base64, a name with a slash."""
    return _COMMON.fullmatch(text) is not None and ".ht" not in text


def _is_address(text: str) -> bool:
    """Whether a text is a web address on the public internet, and goes nowhere by itself."""
    match = _ADDRESS.match(text)
    if match is None or "{{" in text or " " in text or ":" in text[8:]:
        return False
    return not _is_private(match[1])


_is_private = lru_cache(maxsize=1024)(is_private_host)


def words(text: str) -> frozenset[str]:
    """A list of words."""
    return frozenset(text.split())


# Those that an attack without any sign begins with, so that most texts are told by their first word.
_FIRST_WORDS = words(
    "union select exec order having etc or and drop truncate waitfor procedure shutdown ping which ls uname netstat "
    "nslookup nc ncat powershell wget curl telnet create grant insert delete update alter print declare where"
)


class Reading:
    """One value under inspection.

    Args:
        value: The text.
        in_line: It stands where a line break has no business: in a path, a query, a header field or a name.

    Attributes:
        value: The text as it came.
        text: The text as it is meant; see :func:`~fastapi_hardening.security.input_validation.decoding.decode`.
        signs: What is left of the text without letters, digits and plain punctuation.
        exhausted: The text is still encoded.
        in_line: As given.
        steps: How many characters and tokens have been looked at, a number that does not depend on the machine.
    """

    def __init__(self, value: str, *, in_line: bool = False) -> None:
        self.value = value
        self.in_line = in_line
        self.text, self.exhausted = decode(value)
        self.signs = self.text.encode("utf-8", "surrogatepass").translate(None, PLAIN)
        self.steps = len(value) + 2 * len(self.text)

    @cached_property
    def lower(self) -> str:
        """The text as it is meant, in lower case."""
        self.steps += len(self.text)
        return self.text.lower()

    @cached_property
    def is_long_prose(self) -> bool:
        """Whether this is a text of many words, such as an article or an issue, which may quote code."""
        start = self.text[:_LONG_ENOUGH]
        self.steps += len(start)
        return len(start) > _LONG and len(_WORD.findall(start)) > _MANY_WORDS

    def has_any(self, *words: str) -> bool:
        """Whether the text has one of these, given in lower case."""
        lower = self.lower
        self.steps += len(lower)
        return any(word in lower for word in words)

    def search(self, pattern: Pattern, text: str | None = None) -> re.Match[str] | None:
        """Searches the text in lower case, or another one, with a pattern that looks ahead only so far."""
        text = self.lower if text is None else text
        self.steps += len(text)
        return pattern.search(text)
