"""Header injection: a value that ends a line of a header and begins a line of its own.

A text of several lines is nothing. What counts is a line break that was hidden behind an encoding, or one where there
is none in honest input (a path, a query, a header), when the next line looks like a header field or a status line.
"""

from collections.abc import Iterator

from fastapi_hardening.security.input_validation.pattern import Pattern
from fastapi_hardening.security.input_validation.reading import Reading

CLASS = "crlf"
CERTAIN = 5

_FIELD = Pattern(
    r"(?:[\r\n]|\\r|\\n|0x0d|0x0a|[\u560a\u560d])\s{0,4}(?:(?:set-?cookie2?|location|content-?(?:type|"
    r"length|disposition|encoding|security-policy)|transfer-encoding|refresh|link|"
    r"access-control-[a-z-]{3,30}|host|x-[a-z-]{2,30}|last-modified|status|server|connection|cache-control|"
    r"strict-transport-security|bcc|cc|to|subject|from|reply-to|mime-version)\s{0,3}:|"
    r"http/\d(?:\.\d)?\s{1,3}\d{3}|(?:get|post|put|delete|head)\s{1,3}[/h]\S{0,200}\s{1,3}http/\d)"
)
# A line of a mail server (RFC 5321) or a mailbox (RFC 9051), for which a value has no line breaks either.
_COMMAND = Pattern(
    r"(?:[\r\n]|\\r|\\n)\s{0,4}(?:mail from:\s?<|rcpt to:\s?<|(?:ehlo|helo)\s[\w.-]{1,80}\s{0,3}(?:$|[\r\n])|"
    r"data\s{0,3}(?:$|[\r\n]{1,2})|[a-z]{1,3}\d{1,5}\s(?:authenticate|login|select|fetch|list|lsub|append|"
    r"(?:uid\s)?(?:store|copy|search|fetch)|status|capability|examine|create|delete|rename)\b)"
)
_BREAKS = ("\n", "\r", "\\n", "\\r", "0x0", "\u560a", "\u560d")
_MAIL = Pattern(r"(?:bcc|cc|to|subject|from|reply-to|mime-version)\s{0,3}:")


def find(reading: Reading) -> Iterator[tuple[str, int]]:
    """The line that a value adds to a header, with its score."""
    lower = reading.lower
    if not any(sign in lower for sign in _BREAKS):
        return
    if lower[:1] in "\r\n\\" and _COMMAND.match(lower):
        yield "mail-command", CERTAIN
    if ":" not in lower and "http/" not in lower:
        return
    if ("mail from:" in lower or "rcpt to:" in lower) and reading.search(_COMMAND):
        yield "mail-command", CERTAIN
    hidden = reading.in_line or not ("\n" in reading.value or "\r" in reading.value)
    found = reading.search(_FIELD)
    if found is None:
        return
    if hidden:
        yield "hidden-line", CERTAIN
    elif "set-cookie" in found[0] or "http/" in found[0]:
        yield "response-line", 3
