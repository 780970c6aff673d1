"""How a route changes what is inspected on it, and the policy of a route, made once."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from starlette.requests import HTTPConnection

from fastapi_hardening.core.policy import Override
from fastapi_hardening.core.problem import OWN, Problem
from fastapi_hardening.core.routes import RouteEntry
from fastapi_hardening.security.input_validation.documents import Path
from fastapi_hardening.security.input_validation.inspector import Inspector
from fastapi_hardening.security.input_validation.settings import (
    InputValidationSettings,
    Mode,
    Oversize,
    checked_classes,
)
from fastapi_hardening.security.input_validation.shape import FREE, Shape, names_of, shape_of

_PLACES = ("path", "query", "header", "cookie", "body", "websocket")


class ContentRefused(Problem):
    """The content looks like an attack."""

    status = 422
    type = OWN + "content-refused"
    title = "Content refused"


class ContentTooLarge(Problem):
    """The body is larger than what is inspected, and may not pass without."""

    status = 413


class CodingNotTaken(Problem):
    """The body is in a coding that the inspection cannot undo."""

    status = 415


class ContentNotInspected(Problem):
    """The inspection that the route demands has not taken place; what came may not be used."""

    status = 500


class InputPolicy(Override):
    """Changes the inspection on a route, a router or an application; every level holds, key by key the innermost.

    It acts before the request is routed, for afterwards the body is read. Where its layer has not seen it (an
    application that was never hardened, a middleware that changes paths), the request is refused with 500, unless the
    policy only says that nothing is refused.

    Args:
        mode: ``off``, ``report`` or ``enforce``.
        allow: Classes that may be in a place, by the place: ``{"body.html": ["xss"], "query.q": ["sql"]}``. It holds
            for everything below the place; indices of lists are left out; ``*`` allows all classes.
        classes: The only classes that are looked for.
        threshold: The score that findings need.
        oversize: What comes of a document that is too large to be inspected: ``pass`` or ``refuse``.
        uploads: The same of an upload.
        inspect_files: Whether the content of files is inspected.

    Raises:
        ValueError: A class, a place or a mode is unknown.

    Example:
        >>> article = InputPolicy(mode="enforce", allow={"body.html": ["xss"]})
    """

    every_level_holds: ClassVar[bool] = True

    def __init__(
        self,
        *,
        mode: Mode | None = None,
        allow: Mapping[str, Iterable[str]] | None = None,
        classes: Iterable[str] | None = None,
        threshold: int | None = None,
        oversize: Oversize | None = None,
        uploads: Oversize | None = None,
        inspect_files: bool | None = None,
    ) -> None:
        super().__init__()
        named = {
            "mode": mode,
            "classes": None if classes is None else tuple(classes),
            "threshold": threshold,
            "oversize": oversize,
            "uploads": uploads,
            "inspect_files": inspect_files,
        }
        changes = {name: value for name, value in named.items() if value is not None}
        InputValidationSettings.model_validate(changes)
        self.changes: dict[str, Any] = changes
        self.allow = tuple(_allowance(place, kinds) for place, kinds in (allow or {}).items())

    async def act_late(self, connection: HTTPConnection) -> None:  # noqa: ARG002 - the signature is the override's
        """Refuses the request: what the route wanted to be inspected was not."""
        if self.changes.get("mode") in ("off", "report"):
            return
        raise ContentNotInspected("This request could not be inspected.")


def _allowance(place: str, kinds: Iterable[str]) -> tuple[Path, frozenset[str] | None]:
    path = tuple(place.split("."))
    if path[0] not in _PLACES:
        raise ValueError(f"{place!r}: a place begins with one of {', '.join(_PLACES)}, such as 'body.html'")
    if isinstance(kinds, str):
        raise TypeError(f"{place!r} takes a list of classes, such as ['xss']")
    kinds = list(kinds)
    return path, None if "*" in kinds else frozenset(checked_classes(kinds))


class RoutePolicy:
    """What is inspected on a route.

    Args:
        settings: The settings.
        entry: The route.
    """

    __slots__ = (
        "_allow", "body", "cookies", "enforces", "headers", "inspector", "off", "overrides", "path", "query",
        "segments", "settings", "template",
    )  # fmt: skip

    def __init__(self, settings: InputValidationSettings, entry: RouteEntry) -> None:
        overrides: tuple[Any, ...] = entry.of(InputPolicy)
        changes: dict[str, Any] = {}
        self._allow: list[tuple[Path, frozenset[str] | None]] = []
        for override in overrides:
            changes |= override.changes
            self._allow += override.allow
        if changes:
            settings = InputValidationSettings.model_validate(dict(settings) | changes)
        self.settings = settings
        self.overrides = overrides
        self.template = entry.template
        self.off = not settings.enabled or settings.mode == "off"
        self.enforces = settings.mode == "enforce"
        self.inspector = Inspector(settings.classes, threshold=settings.threshold)
        self.path = _shape(entry.dependant, "path_params")
        self.query = _shape(entry.dependant, "query_params")
        self.cookies = _shape(entry.dependant, "cookie_params")
        self.body = _body_shape(entry.dependant)
        declared = _shape(entry.dependant, "header_params").fields
        self.headers = {name.encode("latin-1") for name in settings.headers}
        self.headers |= {name.lower().encode("latin-1") for name, shape in declared.items() if not shape.exempt}
        self.headers -= {name.lower().encode("latin-1") for name, shape in declared.items() if shape.exempt}
        self.segments = None if entry.kind == "mount" else _segments(entry.template)
        if self.segments and all(name is None or self.path.member(name).exempt for name in self.segments):
            self.segments = ()

    def allows(self, path: Path, kind: str) -> bool:
        """Whether a class may be in a place."""
        if not self._allow:
            return False
        places = tuple(step for step in path if not step.isdigit())
        return any(
            (places[: len(allowed)] == allowed or path[: len(allowed)] == allowed) and (kinds is None or kind in kinds)
            for allowed, kinds in self._allow
        )


def _segments(template: str | None) -> tuple[str | None, ...] | None:
    """For each segment of a path what parameter it is, or ``None``; nothing if there is no parameter at all."""
    if template is None:
        return None
    if "{" not in template:
        return ()
    return tuple(
        segment.partition("{")[2].partition("}")[0].partition(":")[0] if "{" in segment else None
        for segment in template.split("/")[1:]
    )


def _params(dependant: Any, kind: str) -> list[Any]:
    if dependant is None:
        return []
    found = list(getattr(dependant, kind))
    for child in dependant.dependencies:
        found += _params(child, kind)
    return found


def _shape(dependant: Any, kind: str) -> Shape:
    """The shape of parameters, by the names that clients write; a model stands for its fields."""
    fields: dict[str, Shape] = {}
    for param in _params(dependant, kind):
        info = param.field_info
        shape = shape_of(info.annotation, tuple(info.metadata))
        if shape.fields:
            fields |= shape.fields
        for each in (param.alias, *names_of(param.name, info)):
            # Two parameters of one name: the one that is inspected counts.
            name = each.replace("_", "-") if kind == "header_params" else each
            if name not in fields or fields[name].exempt:
                fields[name] = shape
    return Shape(fields=fields)


def _body_shape(dependant: Any) -> Shape:
    params = _params(dependant, "body_params")
    if not params:
        return FREE
    if len(params) == 1 and not getattr(params[0].field_info, "embed", None):
        info = params[0].field_info
        shape = shape_of(info.annotation, tuple(info.metadata))
        kind = type(info).__name__
        if kind == "Body" or shape.fields:
            return shape
    return _shape(dependant, "body_params")
