"""The texts that a request is made of, each with the place where it stands: query, form, JSON, multipart, plain text.

Every document is read as the application's parser would read it, and where that fails, as plain text: nothing is
skipped because it cannot be read. Bytes that are no UTF-8 are read byte by byte.
"""

import json
import re
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes

from fastapi_hardening.security.input_validation.decoding import as_text
from fastapi_hardening.security.input_validation.reading import is_plain
from fastapi_hardening.security.input_validation.shape import Shape

Path = tuple[str, ...]

_KEY = re.compile(r"[\w.-]{1,64}")
_DEEPEST = 200


class Text(NamedTuple):
    """A text of a request.

    Attributes:
        path: Where it stands, outermost first; indices of lists are digits.
        value: The text.
        in_line: A line break has no business there.
        key_of: What the text is the key of, where it is a key; ``None`` where it is a value.
    """

    path: Path
    value: str
    in_line: bool = False
    key_of: Any = None


class _NotAKey:
    """What is behind the key of a form or a query: text."""


LEAF = _NotAKey()


def pointer_of(path: Path) -> str:
    """A path as a JSON pointer (RFC 6901); a key that only a client would choose is not repeated, but ``*``.

    Example:
        >>> pointer_of(("body", "items", "0", "note")), pointer_of(("body", "'; drop table"))
        ('/body/items/0/note', '/body/*')
    """
    return "".join(f"/{step if _KEY.fullmatch(step) else '*'}" for step in path)


def pairs_of(data: bytes, where: str, shape: Shape) -> Iterator[Text]:
    """The names and values of a query or a form in the manner of a URL."""
    for pair in data.replace(b"+", b" ").split(b"&"):
        if not pair:
            continue
        raw_name, _, raw_value = pair.partition(b"=")
        name = as_text(unquote_to_bytes(raw_name))
        yield Text((where, name), name, in_line=True, key_of=LEAF)
        member = shape.member(name)
        if raw_value and not (member.exempt or member.item.exempt):
            yield Text((where, name), as_text(unquote_to_bytes(raw_value)), in_line=where == "query")


def json_texts(document: Any, path: Path, shape: Shape) -> Iterator[Text]:  # noqa: C901 - one loop, no recursion
    """The keys and the texts of a JSON document that need a look, outermost first.

    What its shape exempts is left out, and so is what is plain: most of most documents. Only what is left gets a path.
    """
    if isinstance(document, str):
        if not shape.exempt:
            yield Text(path, document)
        return
    waiting: list[tuple[Any, _Place, Shape]] = [(document, None, shape)] if isinstance(document, (dict, list)) else []
    while waiting:
        value, place, shape = waiting.pop()
        if isinstance(value, list):
            item = shape.item
            for index, child in enumerate(value):
                if isinstance(child, (dict, list)):
                    waiting.append((child, (place, str(index)), item))
                elif isinstance(child, str) and not is_plain(child) and not item.exempt:
                    yield Text((*path, *_steps(place), str(index)), child)
        else:
            for key, child in value.items():
                if not key.isidentifier() or "_proto_" in key or key == "constructor":
                    yield Text((*path, *_steps(place), key), key, in_line=True, key_of=child)
                if isinstance(child, (dict, list)):
                    waiting.append((child, (place, key), shape.member(key)))
                elif isinstance(child, str) and not is_plain(child) and not shape.member(key).exempt:
                    yield Text((*path, *_steps(place), key), child)


# A place in a document: the place that it is in, and its key there.
_Place = tuple[Any, str] | None


def _steps(place: _Place) -> list[str]:
    steps: list[str] = []
    while place is not None:
        place, step = place
        steps.append(step)
    return steps[::-1]


class Body(NamedTuple):
    """A body and what it says about itself.

    Attributes:
        data: The bytes.
        media_type: Its type without parameters, in lower case; empty where there is none.
        content_type: The whole header field.
        coding: The ``Content-Encoding``, in lower case; empty where there is none.
    """

    data: bytes
    media_type: str
    content_type: bytes
    coding: str


_FORM = "application/x-www-form-urlencoded"
_MULTIPART = "multipart/"
_BINARY = (
    "image/",
    "audio/",
    "video/",
    "font/",
    "application/octet-stream",
    "application/zip",
    "application/pdf",
    "application/gzip",
)


def is_upload(media_type: str) -> bool:
    """Whether a body of this type is an upload, which may be large, and not a document."""
    return media_type.startswith((_MULTIPART, *_BINARY))


class UnreadableError(Exception):
    """A body in a coding that cannot be undone here."""


def body_texts(body: Body, shape: Shape, *, most_bytes: int, files: bool) -> Iterator[Text]:
    """The texts of a body.

    Args:
        body: The body.
        shape: What the route declares.
        most_bytes: How large it may become when its coding is undone.
        files: Whether the content of uploaded files is among them.

    Raises:
        UnreadableError: The coding is unknown or wrong, or what is in it is too large.
    """
    data = body.data
    if body.coding not in ("", "identity"):
        data = _inflated(data, body.coding, most_bytes)
    media_type = body.media_type
    if media_type == _FORM:
        yield from pairs_of(data, "body", shape)
    elif media_type.startswith(_MULTIPART):
        yield from _multipart(data, body.content_type, shape, files=files)
    elif "json" in media_type or not media_type or data[:100].lstrip()[:1] in (b"{", b"["):
        # Also where it does not say so: an application may read it as JSON all the same.
        yield from _json_or_text(data, shape)
    else:
        yield from _plain(data, binary=media_type.startswith(_BINARY))


def _json_or_text(data: bytes, shape: Shape) -> Iterator[Text]:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        yield from _plain(data)
        return
    yield from json_texts(document, ("body",), shape)


def _plain(data: bytes, *, binary: bool = False, path: Path = ("body",)) -> Iterator[Text]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        if binary:
            return
        text = as_text(data)
    if text:
        yield Text(path, text)


def _inflated(data: bytes, coding: str, most_bytes: int) -> bytes:
    if coding not in ("gzip", "x-gzip", "deflate"):
        raise UnreadableError
    inflater = zlib.decompressobj(32 + zlib.MAX_WBITS)
    try:
        inflated = inflater.decompress(data, most_bytes)
    except zlib.error:
        raise UnreadableError from None
    if inflater.unconsumed_tail or not inflater.eof:
        raise UnreadableError
    return inflated


_BOUNDARY = re.compile(rb';\s*boundary\s*=\s*(?:"([^"]{1,200})"|([^\s;,]{1,200}))', re.IGNORECASE)
_DISPOSITION = re.compile(rb"^content-disposition\s{0,9}:(.{0,4000})$", re.IGNORECASE | re.MULTILINE)
_PARAMETER = re.compile(
    rb';\s{0,9}(name|filename)(\*?)\s{0,9}=\s{0,9}(?:"((?:[^"\\]|\\.)*)"?|([^;]*))', re.IGNORECASE | re.DOTALL
)


def _multipart(data: bytes, content_type: bytes, shape: Shape, *, files: bool) -> Iterator[Text]:
    found = _BOUNDARY.search(content_type)
    boundary = (found[1] or found[2]) if found else b""
    if not boundary or b"--" + boundary not in data:
        yield from _plain(data)
        return
    preamble, *parts = data.split(b"--" + boundary)
    yield from _plain(preamble.strip())
    for part in parts:
        if part.startswith(b"--"):
            yield from _plain(part[2:].strip())
            continue
        head, divided, content = part.partition(b"\r\n\r\n")
        if not divided:
            head, divided, content = part.partition(b"\n\n")
        yield from _part(head, content.removesuffix(b"\n").removesuffix(b"\r"), shape, files=files)


def _part(head: bytes, content: bytes, shape: Shape, *, files: bool) -> Iterator[Text]:
    disposition = _DISPOSITION.search(head)
    parameters: dict[bytes, bytes] = {}
    for key, star, quoted, bare in _PARAMETER.findall(disposition[1] if disposition else b""):
        value = quoted or bare.strip()
        # RFC 5987: charset'language'percent-encoded; a backslash is a part of a Windows path, not an escape.
        parameters[key.lower() + star] = unquote_to_bytes(value.rpartition(b"'")[2]) if star else value
    name = as_text(parameters.get(b"name*", parameters.get(b"name", b"")))
    path = ("body", name or "*")
    if name:
        yield Text(path, name, in_line=True, key_of=LEAF)
    is_file = False
    for key in (b"filename", b"filename*"):
        if key in parameters:
            is_file = True
            if parameters[key]:
                yield Text((*path, "filename"), as_text(parameters[key]), in_line=True)
    if is_file and not files:
        return
    member = shape.member(name)
    if not (member.exempt or member.item.exempt):
        yield from _plain(content, binary=is_file, path=path)
