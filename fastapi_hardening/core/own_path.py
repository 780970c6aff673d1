"""A path that a layer answers by itself, without a route of the application."""

import logging

from starlette.types import Scope

from fastapi_hardening.core.routes import route_path, table_of

logger = logging.getLogger("fastapi_hardening.own_path")


class OwnPath:
    """Tells whether a request is for such a path. A route of the application with exactly that path wins.

    Args:
        path: The path, relative to the root path.
        methods: The methods that are answered there.
        purpose: What is not served there if the application has such a route; for the notice in the log.
    """

    __slots__ = ("_methods", "_path", "_purpose", "_told")

    def __init__(self, path: str, methods: tuple[str, ...], purpose: str) -> None:
        self._path = path
        self._methods = methods
        self._purpose = purpose
        self._told = False

    def is_asked(self, scope: Scope) -> bool:
        """Whether a request of type ``http`` is for the path; one that is not costs a comparison of its end."""
        path = scope["path"]
        if not path.endswith(self._path) or scope["method"] not in self._methods:
            return False
        if route_path(path, scope.get("root_path", "")) != self._path:
            return False
        app = scope.get("app")
        if app is None or table_of(app).find(scope).template != self._path:
            return True
        if not self._told:
            self._told = True
            logger.warning("%s is a route of the application, so %s", self._path, self._purpose)
        return False
