"""Takes credentials out of what is logged: by the names they go by, and by the forms in which they travel.

It cannot know that ``order 4711 for eve's-password`` holds one: do not log those. It is *not* a check of what the
application may log otherwise, such as personal data. Knows queries and texts, no requests.

Example:
    >>> Redactor().query("page=2&access_token=abc")
    'page=2&access_token=[redacted]'
    >>> Redactor(["tax"]).value("order", {"id": 1, "tax_id": "12", "note": "see https://eve:pw@shop.example"})
    {'id': 1, 'tax_id': '[redacted]', 'note': 'see https://[redacted]@shop.example'}
"""

import dataclasses
import logging
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

REDACTED = "[redacted]"

STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}
"""Attributes of a record that are not what was given as ``extra``. The last one is uvicorn's, with colours."""

# A name that contains one of these, or is one of those, is a credential's, whatever its case, hyphens and underscores.
_CONTAINED = (
    "accesskey apikey authorization clientcert cookie credential jwt passphrase passwd password privatekey secret "
    "sessionid sessionkey signature token"
)
# The last one carries tokens of websockets.
_WHOLE = "auth cvc cvv otp pin pwd session sid sig xauth secwebsocketprotocol"
# The authorization code of OAuth, the ticket of a websocket; anywhere but in a query they are something else.
_WHOLE_IN_QUERY = "code key ticket"

_PAIR = re.compile(r"([?&;#])([^=&;#?\s\"'<>]{1,128})=([^&;#\s\"'<>]+)")
_SCHEME = re.compile(r"\b(bearer|basic)(\s+)[A-Za-z0-9._~+/=-]{16,}", re.IGNORECASE)
_USER_INFO = re.compile(r"://[^/\s@:]*:[^/\s@]+@")
_NOT_IN_NAMES = re.compile(r"[^a-z0-9]+")
_ESCAPED = re.compile(r"%([0-9A-Fa-f]{2})")
_MAX_DEPTH = 8


class Redactor:
    """Knows the names of credentials, and takes their values out of queries, texts and structures.

    Args:
        names: Further names, beside the usual ones (password, secret, token, cookie, authorization, ...). A name that
            contains one of them counts, whatever its case and its hyphens.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        further = filter(None, (_plain(name) for name in names))
        self._contained = (*_CONTAINED.split(), *further)
        self._whole = frozenset(_WHOLE.split())
        self._whole_in_query = self._whole | frozenset(_WHOLE_IN_QUERY.split())
        # Names come from clients too, so they are not kept for ever.
        self.is_sensitive = lru_cache(maxsize=1024)(self._is_sensitive)

    def _is_sensitive(self, name: str, *, in_query: bool = False) -> bool:
        """Whether the value under this name is a credential."""
        plain = _plain(name)
        whole = self._whole_in_query if in_query else self._whole
        return plain in whole or any(part in plain for part in self._contained)

    def query(self, query: str) -> str:
        """A query string, or a form, without the values of credentials."""
        return "&".join(self._pair(pair) for pair in query.split("&")) if "=" in query else query

    def _pair(self, pair: str) -> str:
        name, equals, value = pair.partition("=")
        if not equals:
            return pair
        hidden = self.is_sensitive(_unescaped(name)[:128], in_query=True)
        if not hidden and ("=" in value or "%" in value):
            # Such as the address to return to, with a token of its own.
            inner = _unescaped(value)
            hidden = self.text(inner) != inner
        return f"{name}={REDACTED}" if hidden else pair

    def text(self, text: str) -> str:
        """A message without the credentials in addresses, and without those of ``Bearer`` and ``Basic``."""
        if "=" in text:
            text = _PAIR.sub(lambda found: found[1] + self._pair(f"{found[2]}={found[3]}"), text)
        if "://" in text:
            text = _USER_INFO.sub(f"://{REDACTED}@", text)
        return _SCHEME.sub(rf"\1\2{REDACTED}", text)

    def value(self, name: str, value: Any, _depth: int = 0) -> Any:
        """What may be logged under a name: a copy without credentials, of structures at any level."""
        if value is None or isinstance(value, bool):
            return value
        if self.is_sensitive(name[:128]) or _depth > _MAX_DEPTH:
            return REDACTED
        if isinstance(value, str):
            return self.text(value)
        if hasattr(value, "model_dump"):
            value = value.model_dump()
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            return {str(key): self.value(str(key), inner, _depth + 1) for key, inner in value.items()}
        if isinstance(value, (list, tuple, set, frozenset)):
            return [self.value("", inner, _depth + 1) for inner in value]
        return value


def _plain(name: str) -> str:
    return _NOT_IN_NAMES.sub("", name.lower())


def _unescaped(text: str) -> str:
    """Percent-encoding undone; what is not ASCII is in no name that we know."""
    return _ESCAPED.sub(lambda found: chr(int(found[1], 16)), text) if "%" in text else text


class RedactionFilter(logging.Filter):
    """Takes credentials out of the ``extra`` and the message of every record. Add it to a handler of yours.

    Args:
        names: Further names of credentials.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        super().__init__()
        self._redactor = Redactor(names)

    def filter(self, record: logging.LogRecord) -> bool:
        """Amends the record, and nothing of what it refers to."""
        values = record.__dict__
        if "_fields" in values:
            return True
        for name in values.keys() - STANDARD:
            values[name] = self._redactor.value(name, values[name])
        if isinstance(record.args, Mapping):
            record.args = self._redactor.value("", record.args)
        try:
            message = record.getMessage()
        except (TypeError, ValueError, KeyError):
            # The handler tells of a format that does not fit its arguments.
            return True
        clean = self._redactor.text(message)
        if clean != message:
            record.msg, record.args = clean, ()
        return True
