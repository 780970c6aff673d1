"""Where settings come from: arguments, the environment, ``.env``, a file, the profile.

They are merged key by key, and each key keeps the name of its source, so that a message can say who set what is wrong.
"""

import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

from dotenv import dotenv_values
from pydantic import BaseModel

from fastapi_hardening.core.configuration import did_you_mean, from_json, from_text, takes_mapping, warn_renamed

PREFIX = "HARDENING_"
_FILE = "HARDENING_FILE"

# What Kubernetes injects into every pod for a service whose name starts with "hardening".
_KUBERNETES = re.compile(r"HARDENING_(?:.*_)?(?:SERVICE_HOST|SERVICE_PORT(?:_.*)?|PORT_\d+_(?:TCP|UDP|SCTP)(?:_.*)?)")
_KUBERNETES_URL = re.compile(r"(?:tcp|udp|sctp)://")

Key = tuple[str, ...]
Leaves = dict[Key, tuple[Any, str]]
Profiles = Mapping[str, Mapping[str, Mapping[str, Any]]]


def gather(
    model: type[BaseModel],
    values: Mapping[str, Any],
    env_file: str | os.PathLike[str] | None,
    profiles: Profiles,
    problems: list[str],
) -> Leaves:
    """Every key that some source sets, with its value from the strongest source and the name of that source.

    Args:
        model: The settings whose keys count.
        values: The arguments, the strongest source.
        env_file: Where the ``.env`` file is, if there may be one.
        profiles: What each environment changes, the weakest source.
        problems: Takes a sentence for every key that is unknown or cannot be read.
    """
    leaves: Leaves = {}

    def take(source: str, nested: Mapping[str, Any]) -> None:
        for path, value in _leaves(model, nested, source, problems):
            leaves.setdefault(path, (value, source))

    for name, value in values.items():
        take("argument", {name: value})
    in_file = dotenv_values(env_file) if env_file is not None and Path(env_file).is_file() else {}
    for name, value in os.environ.items():
        _take_variable(name, value, "environment variable", take)
    for name, value in in_file.items():
        _take_variable(name, value or "", f"{env_file}:", take)
    named = os.environ.get(_FILE) or in_file.get(_FILE)
    if named:
        take(f"file {named}", _read_file(named, problems))
    environment = str(leaves.get(("environment",), ("production", ""))[0])
    take(f"profile {environment}", profiles.get(environment, {}))
    return leaves


def _take_variable(name: str, value: str, source: str, take: Callable[[str, Mapping[str, Any]], None]) -> None:
    upper = name.upper()
    if not upper.startswith(PREFIX) or upper == _FILE:
        return
    if _KUBERNETES.fullmatch(upper) or (upper.endswith("_PORT") and _KUBERNETES_URL.match(value)):
        return
    # HARDENING_HEALTH__DETAILS is the key `details` of `health`.
    nested: Any = value
    for part in reversed(upper[len(PREFIX) :].lower().split("__")):
        nested = {part: nested}
    take(f"{source} {name}", nested)


def _read_file(name: str, problems: list[str]) -> Mapping[str, Any]:
    try:
        return tomllib.loads(Path(name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(f"{_FILE} names {name}, which does not exist")
    except (OSError, ValueError) as error:
        problems.append(f"{_FILE} names {name}, which cannot be read as TOML: {error}")
    return {}


def _leaves(
    model: type[BaseModel], nested: Mapping[str, Any], source: str, problems: list[str], above: Key = ()
) -> Iterator[tuple[Key, Any]]:
    """The single keys of a nested mapping, by the fields of the model; what is unknown becomes a problem."""
    for key, given in nested.items():
        name: str = getattr(model, "renamed", {}).get(key, key)
        if name != key:
            warn_renamed(".".join((*above, key)), ".".join((*above, name)))
        path = (*above, name)
        field = model.model_fields.get(name)
        if field is None:
            problems.append(f"{'.'.join(path)}: unknown key{did_you_mean(name, model.model_fields)} (from {source})")
            continue
        try:
            value = from_text(model, name, given)
            inner = _model_in(field.annotation)
            if inner is None and (not isinstance(value, Mapping) or takes_mapping(model, name)):
                yield path, value
                continue
            value = from_json(value) if isinstance(value, str) else value
        except ValueError as error:
            problems.append(f"{'.'.join(path)}: {error} (from {source})")
            continue
        if inner is None:
            problems.append(f"{'.'.join(path)}: has no keys of its own (from {source})")
            continue
        if isinstance(value, Mapping) and takes_mapping(model, name):
            # Sections of one kind, each under a name of its own.
            for each, section in value.items():
                yield from _section(inner, section, source, problems, (*path, each))
        else:
            yield from _section(inner, value, source, problems, path)


def _section(
    model: type[BaseModel], value: Any, source: str, problems: list[str], path: Key
) -> Iterator[tuple[Key, Any]]:
    """The keys of a section, which may be given as the model itself."""
    if isinstance(value, BaseModel):
        value = {name: getattr(value, name) for name in value.model_fields_set}
    if isinstance(value, Mapping):
        yield from _leaves(model, value, source, problems, path)
    else:
        problems.append(f"{'.'.join(path)}: takes keys of its own, not {type(value).__name__} (from {source})")


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The settings model that a field holds, if it holds one; a list of them is one value."""
    if get_origin(annotation) in (list, tuple):
        return None
    for choice in (annotation, *get_args(annotation)):
        if isinstance(choice, type) and issubclass(choice, BaseModel):
            return choice
    return None


def sentence(error: Any, sources: Mapping[Key, str]) -> str:
    """A pydantic error as a line that says which key, what is wrong, and who set it."""
    path = tuple(str(part) for part in error["loc"])
    known = [path[:end] for end in range(len(path), 0, -1) if path[:end] in sources]
    # What is wrong with a whole section may come from any of its keys.
    named = [sources[known[0]]] if known else [source for key, source in sources.items() if key[: len(path)] == path]
    message = error["msg"].removeprefix("Value error, ")
    return f"{'.'.join(path)}: {message}" + (f" (from {', '.join(dict.fromkeys(named))})" if named else "")
