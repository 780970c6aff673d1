"""Reads which versions a request asks for: in its path, header fields and query."""

from collections.abc import Iterator
from urllib.parse import parse_qsl

from starlette.types import Scope

from fastapi_hardening.api.versioning.engine import Asked
from fastapi_hardening.api.versioning.settings import VERSION, VersioningSettings
from fastapi_hardening.core import headers as header_fields
from fastapi_hardening.core.routes import route_path


class Reader:
    """Reads which versions a request asks for."""

    def __init__(self, settings: VersioningSettings) -> None:
        self._prefix = settings.path_prefix if "path" in settings.sources else None
        self._header = settings.header.lower().encode("ascii") if "header" in settings.sources else None
        self._query = settings.query_parameter if "query" in settings.sources else None
        self._media = settings.media_type_parameter.lower() if "media-type" in settings.sources else None

    def asked(self, scope: Scope) -> Iterator[Asked]:
        """What the request asks for, each source once for each value."""
        if self._prefix is not None:
            name = self.of_path(route_path(scope["path"], scope.get("root_path", "")))
            if name is not None:
                yield Asked("path", name)
        if self._header is not None:
            for value in header_fields.get_all(scope["headers"], self._header):
                yield Asked("header", value.decode("latin-1").strip())
        if self._query is not None and scope.get("query_string"):
            for key, text in parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True):
                if key == self._query:
                    yield Asked("query", text)
        if self._media is not None:
            for value in header_fields.get_all(scope["headers"], b"accept"):
                yield from self._of_accept(value.decode("latin-1"))

    def of_path(self, path: str) -> str | None:
        """The version in a path: ``2`` in ``/v2/orders``; nothing in ``/videos``."""
        if self._prefix is None or not path.startswith(self._prefix):
            return None
        name = path[len(self._prefix) :].partition("/")[0]
        return name if VERSION.fullmatch(name) else None

    def _of_accept(self, value: str) -> Iterator[Asked]:
        # What is refused by its weight (q=0) is not looked at: nobody writes a version to say that it is unwanted.
        for media_range in value.split(","):
            for parameter in media_range.split(";")[1:]:
                name, _, text = parameter.partition("=")
                if name.strip().lower() == self._media:
                    yield Asked("media-type", text.strip().strip('"'))
