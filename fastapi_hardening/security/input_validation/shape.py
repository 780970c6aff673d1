"""Which fields of a route can hold an attack at all, by the types that it declares.

A number, a date, a UUID, a choice of words: whatever a client sends there, FastAPI refuses what is not one, so there is
nothing to inspect, and nothing to find by mistake. The same is true of text whose pattern admits only harmless
characters. A ``SecretStr`` is exempt because a password may be anything and is only ever hashed. Everything else, and
everything that is not understood, is free text.
"""

import datetime as dt
import decimal
import enum
import ipaddress
import re
import types
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from re import _constants as constants  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, SecretBytes, SecretStr
from pydantic.fields import FieldInfo

_TYPED = (
    bool, int, float, decimal.Decimal, enum.Enum, uuid.UUID, dt.date, dt.time, dt.timedelta,
    ipaddress.IPv4Address, ipaddress.IPv6Address, ipaddress.IPv4Network, ipaddress.IPv6Network, SecretStr, SecretBytes,
    type(None),
)  # fmt: skip
_HARMLESS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-.:@+#")


@dataclass(slots=True)
class Shape:
    """What is known of a value before it comes.

    Attributes:
        exempt: It cannot hold an attack.
        fields: The shapes of its members, by their names in the document.
        items: The shape of every item, of a list, or of every value, of a dictionary.
    """

    exempt: bool = False
    fields: Mapping[str, "Shape"] = field(default_factory=dict)
    items: "Shape | None" = None

    def member(self, key: str) -> "Shape":
        """The shape of a member."""
        return self.fields.get(key) or self.items or FREE

    @property
    def item(self) -> "Shape":
        """The shape of an item."""
        return self.items or FREE


FREE = Shape()
EXEMPT = Shape(exempt=True)


_Models = dict[type, Shape]


def shape_of(  # noqa: PLR0911 - a table of cases
    annotation: Any, metadata: tuple[Any, ...] = (), models: _Models | None = None
) -> Shape:
    """The shape of what an annotation admits.

    Example:
        >>> shape_of(int | None).exempt, shape_of(str).exempt, shape_of(dict[str, uuid.UUID]).member("any").exempt
        (True, False, True)
    """
    # Models may have themselves as members.
    models = {} if models is None else models
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *more = get_args(annotation)
        return shape_of(inner, (*metadata, *more), models)
    if origin is Literal:
        return EXEMPT
    if origin in (Union, types.UnionType):
        shapes = [shape_of(choice, metadata, models) for choice in get_args(annotation)]
        shapes = [shape for shape in shapes if not shape.exempt]
        # Of several that are not exempt nothing is known; of one and None it is that one.
        return EXEMPT if not shapes else shapes[0] if len(shapes) == 1 else FREE
    if origin in (list, set, frozenset) and get_args(annotation):
        return Shape(items=shape_of(get_args(annotation)[0], (), models))
    if origin is dict:
        return Shape(items=shape_of(get_args(annotation)[1], (), models))
    if not isinstance(annotation, type):
        return FREE
    if issubclass(annotation, BaseModel):
        return _model(annotation, models)
    if issubclass(annotation, _TYPED):
        return EXEMPT
    if annotation is str and any(_is_narrow(pattern) for pattern in _patterns(metadata)):
        return EXEMPT
    return FREE


def _model(model: type[BaseModel], models: _Models) -> Shape:
    if model in models:
        return models[model]
    fields: dict[str, Shape] = {}
    shape = models[model] = Shape(fields=fields)
    for name, info in model.model_fields.items():
        inner = shape_of(info.annotation, tuple(info.metadata), models)
        for key in names_of(name, info):
            fields[key] = inner
    return shape


def names_of(name: str, info: FieldInfo) -> Iterator[str]:
    """The names that a field has in a document."""
    yield name
    for alias in (info.alias, info.validation_alias):
        if isinstance(alias, str):
            yield alias


def _patterns(metadata: tuple[Any, ...]) -> Iterator[str]:
    for each in metadata:
        pattern = getattr(each, "pattern", None)
        if isinstance(pattern, re.Pattern):
            pattern = pattern.pattern if not pattern.flags & re.VERBOSE else None
        if isinstance(pattern, str):
            yield pattern
        # A FieldInfo among the metadata keeps its own.
        yield from _patterns(tuple(getattr(each, "metadata", ())))


def _is_narrow(pattern: str) -> bool:
    """Whether a pattern stands for the whole text and admits only characters that no attack is made of.

    Example:
        >>> _is_narrow("^[a-z0-9-]+$"), _is_narrow("^[^<>]+$"), _is_narrow("[a-z]+")
        (True, False, False)
    """
    try:
        tree = parser.parse(pattern)
    except re.error:
        return False
    items = list(tree)
    anchors = [argument for kind, argument in items if kind is constants.AT]
    whole = (
        len(items) > 1
        and items[0] in ((constants.AT, constants.AT_BEGINNING), (constants.AT, constants.AT_BEGINNING_STRING))
        and items[-1] in ((constants.AT, constants.AT_END), (constants.AT, constants.AT_END_STRING))
    )
    return whole and len(anchors) == 2 and _admits_harmless(items[1:-1])  # noqa: PLR2004 - one at each end


_CATEGORIES = (constants.CATEGORY_DIGIT,)


def _admits_harmless(items: list[tuple[Any, Any]]) -> bool:
    for kind, argument in items:
        if kind is constants.LITERAL:
            admitted = chr(argument) in _HARMLESS
        elif kind is constants.IN:
            admitted = all(_class_is_harmless(*each) for each in argument)
        elif kind in (constants.MAX_REPEAT, constants.MIN_REPEAT):
            admitted = _admits_harmless(list(argument[2]))
        elif kind is constants.SUBPATTERN:
            admitted = _admits_harmless(list(argument[3]))
        elif kind is constants.BRANCH:
            admitted = all(_admits_harmless(list(branch)) for branch in argument[1])
        else:
            admitted = False
        if not admitted:
            return False
    return True


def _class_is_harmless(kind: Any, argument: Any) -> bool:
    if kind is constants.LITERAL:
        return chr(argument) in _HARMLESS
    if kind is constants.RANGE:
        first, last = argument
        return last - first < len(_HARMLESS) and all(chr(code) in _HARMLESS for code in range(first, last + 1))
    return kind is constants.CATEGORY and argument in _CATEGORIES
