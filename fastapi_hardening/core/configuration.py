"""What the settings of every concern have in common: frozen, checked, and helpful about a misspelt key."""

import json
import warnings
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from types import UnionType
from typing import Any, ClassVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, model_validator


class ConfigurationError(ValueError):
    """The configuration cannot work; the message says what to change."""


class Section(BaseModel):
    """Some settings that belong together. Keys carry their unit (``ttl_seconds``); lists may be ``a,b`` or JSON."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, hide_input_in_errors=True
    )

    renamed: ClassVar[Mapping[str, str]] = {}
    """Old keys that still work, by their new name; they warn."""

    @model_validator(mode="before")
    @classmethod
    def _read(cls, values: Any) -> Any:
        if isinstance(values, str):
            values = from_json(values)
        if not isinstance(values, Mapping):
            return values
        return {key: from_text(cls, key, value) for key, value in known_keys(cls, values, cls.renamed).items()}


class ConcernSettings(Section):
    """The settings of one concern, which can be switched off."""

    enabled: bool = True
    """Whether the concern is installed at all."""


def known_keys(
    model: type[BaseModel], values: Mapping[str, Any], renamed: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The values under the model's own keys, old names translated.

    Raises:
        ValueError: A key is unknown; the message guesses which one was meant.
    """
    known = dict(values)
    for old, new in (renamed or {}).items():
        if old in known:
            warn_renamed(old, new)
            known.setdefault(new, known.pop(old))
            known.pop(old, None)
    for key in known:
        if key not in model.model_fields:
            raise ValueError(f"unknown key {key!r}{did_you_mean(key, model.model_fields)}")
    return known


def warn_renamed(old: str, new: str) -> None:
    """Tells the owner of the configuration that a key has a new name."""
    warnings.warn(
        f"the setting {old!r} is now {new!r}; the old name works until the next major version",
        DeprecationWarning,
        stacklevel=2,
    )


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """The end of a message about an unknown word: the nearest known ones, or all of them when there are few."""
    choices = list(choices)
    close = get_close_matches(word, choices, n=2, cutoff=0.6)
    if close:
        return f"; did you mean {' or '.join(repr(name) for name in close)}?"
    return f"; known are {', '.join(sorted(choices))}"


def from_text(model: type[BaseModel], key: str, value: Any) -> Any:
    """A value that came as text, from the environment or a file, in the shape that its field has."""
    if not isinstance(value, str):
        return value
    kinds = list(_containers(model.model_fields[key].annotation))
    if not kinds or str in kinds:
        return value
    text = value.strip()
    if text.startswith(("[", "{")):
        return from_json(text)
    if dict in kinds:
        return value
    return [item.strip() for item in text.split(",") if item.strip()]


def takes_mapping(model: type[BaseModel], key: str) -> bool:
    """Whether the value of a key is a mapping, and no section with keys of its own."""
    return dict in _containers(model.model_fields[key].annotation)


def from_json(text: str) -> Any:
    """A value written as JSON.

    Raises:
        ValueError: The text is not JSON.
    """
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"is not JSON ({error}); single keys can be set one by one") from None


def _containers(annotation: Any) -> Iterable[type]:
    """The containers that an annotation admits; ``str`` among them where plain text is meant as it is."""
    origin = get_origin(annotation) or annotation
    if origin in (Union, UnionType):
        for choice in get_args(annotation):
            yield from _containers(choice)
    elif isinstance(origin, type) and issubclass(origin, (list, tuple, set, frozenset, dict, str)):
        yield origin
