"""Writes the tables of the documentation that follow from the code: `python docs/generate.py [--check]`.

A generated block stands between `<!-- generated: NAME -->` and `<!-- end -->`. With `--check` nothing is written, and
the exit status is 1 when a block is stale.
"""  # noqa: INP001 - a program beside the pages, not a package

import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AwareDatetime, BaseModel, SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from fastapi_hardening.audit import CHECKS
from fastapi_hardening.core.sources import PREFIX
from fastapi_hardening.handle import Slot
from fastapi_hardening.harden import INBOUND, OUTBOUND
from fastapi_hardening.settings import PROFILES, NotBuiltYet, Settings
from fastapi_hardening.upstreams import OutboundSlot

DOCS = Path(__file__).resolve().parent
BLOCK = re.compile(r"(<!-- generated: (?P<name>[\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)
COMMAND = "python docs/generate.py"

# A default that is longer would make the table too wide to read; it is printed under it.
LONG = 120

Path_ = tuple[str, ...]


def pipeline() -> Iterator[str]:
    """The layers in the order in which a request meets them."""
    yield from _head("", "layer", "state", "switch", "purpose")
    for number, slot in enumerate(INBOUND, start=1):
        state = "planned" if slot.build is None else "built"
        yield _row(str(number), _linked(slot), state, f"`{slot.setting}.enabled`", slot.purpose)


def outbound() -> Iterator[str]:
    """The layers around a call of an upstream."""
    yield from _head("", "layer", "settings", "purpose")
    for number, slot in enumerate(OUTBOUND, start=1):
        key = f"`upstreams.NAME.{slot.setting}`"
        yield _row(str(number), _linked(slot), key, slot.purpose)


def _linked(slot: Slot | OutboundSlot) -> str:
    """The name of a layer, as a link where its concern has a page."""
    for name in (slot.name, slot.setting):
        page = f"concerns/{re.sub('[ _]', '-', name.lower())}.md"
        if (DOCS / page).is_file():
            return f"[{slot.name}]({page})"
    return slot.name


def settings() -> Iterator[str]:
    """The keys of the suite, then those of each concern, then those of the planned ones."""
    general, built, planned = _fields()
    yield "### General { #general }"
    yield ""
    yield from _table([((name,), field) for name, field in general])
    for name, model, field in built:
        yield f"### `{name}` {{ #{name} }}"
        yield ""
        yield _text(field.description)
        yield ""
        # Sections of one kind have names of the user's choice.
        above = (name,) if _model_in(Settings.model_fields[name].annotation) else (name, "NAME")
        yield from _table(list(_rows(model, above)))
    if not planned:
        return
    yield "### Planned concerns { #planned }"
    yield ""
    yield "Their names are taken, and switching one on is refused. The other keys are accepted and do **nothing** yet."
    yield ""
    rows: list[tuple[Path_, FieldInfo]] = []
    for name, model, field in planned:
        switch, *others = model.model_fields.items()
        rows.append(((name, switch[0]), _described(switch[1], field.description)))
        rows += [((name, key), inner) for key, inner in others]
    yield from _table(rows)


def profiles() -> Iterator[str]:
    """What each environment changes."""
    yield from _head("key", *PROFILES)
    changed = sorted({(field, key) for changes in PROFILES.values() for field in changes for key in changes[field]})
    for field, key in changed:
        model = _model_in(Settings.model_fields[field].annotation)
        if model is None:
            raise TypeError(f"{field} is no concern, yet a profile changes {key} of it")
        default = model.model_fields[key].default
        values = (changes.get(field, {}).get(key, default) for changes in PROFILES.values())
        yield _row(f"`{field}.{key}`", *map(_value, values))


def checks() -> Iterator[str]:
    """What `fastapi-hardening check` looks for."""
    yield from _head("id", "severity", "what", "why")
    for check in CHECKS:
        yield _row(f"`{check.id}`", check.severity, check.title, _text(check.find.__doc__))


GENERATORS: dict[str, Callable[[], Iterator[str]]] = {
    "pipeline": pipeline,
    "outbound": outbound,
    "settings": settings,
    "profiles": profiles,
    "checks": checks,
}


Concerns = list[tuple[str, type[BaseModel], FieldInfo]]


def _fields() -> tuple[list[tuple[str, FieldInfo]], Concerns, Concerns]:
    """The settings' fields: single keys, concerns that are built, concerns that are planned."""
    general: list[tuple[str, FieldInfo]] = []
    built: Concerns = []
    planned: Concerns = []
    for name, field in Settings.model_fields.items():
        model = _model_in(field.annotation)
        if model is None:
            named = [each for each in get_args(field.annotation) if _model_in(each) is not None]
            if named:
                built.append((name, named[0], field))
            else:
                general.append((name, field))
        else:
            (planned if issubclass(model, NotBuiltYet) else built).append((name, model, field))
    return general, built, planned


def _model_in(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _rows(model: type[BaseModel], above: Path_) -> Iterator[tuple[Path_, FieldInfo]]:
    """The keys of a concern, and in place of a part with keys of its own those keys."""
    for key, field in model.model_fields.items():
        # A list of parts is one value, and so are sections under names of the user's choice.
        is_one = get_origin(field.annotation) in (list, tuple, dict)
        choices = () if is_one else (field.annotation, *get_args(field.annotation))
        inner = next((found for choice in choices if (found := _model_in(choice)) is not None), None)
        if inner is None:
            yield (*above, key), field
        else:
            yield from _rows(inner, (*above, key))


def _described(field: FieldInfo, description: str | None) -> FieldInfo:
    copy = FieldInfo(annotation=field.annotation, default=field.default, description=description)
    copy.metadata = field.metadata
    return copy


def _table(rows: list[tuple[Path_, FieldInfo]]) -> Iterator[str]:
    yield from _head("key and variable", "type", "default", "meaning")
    below: list[tuple[str, str]] = []
    for path, field in rows:
        key = ".".join(path)
        default = _value(field.get_default(call_default_factory=True))
        if len(default) > LONG:
            below.append((key, default.strip("`")))
            default = "below"
        # A browser may break the long name of a variable where it has an underscore.
        variable = re.sub(r"(_+)", r"\1<wbr>", PREFIX + "__".join(path).upper())
        yield _row(f"`{key}`<br><code>{variable}</code>", _type(field), default, _text(field.description))
    yield ""
    for key, default in below:
        yield f"The default of `{key}`:"
        yield ""
        yield "```text"
        # A policy is read directive by directive.
        yield from default.replace("; ", ";\n").split("\n") if "; " in default else textwrap.wrap(default, 90)
        yield "```"
        yield ""


def _head(*cells: str) -> Iterator[str]:
    yield _row(*cells)
    yield "|" + "---|" * len(cells)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _text(docstring: str | None) -> str:
    """A docstring in Markdown, on one line."""
    text = re.sub(r":\w+:`~?([^`]+)`", lambda role: f"`{role[1].rpartition('.')[2]}`", docstring or "")
    return " ".join(text.replace("``", "`").split())


def _value(value: Any) -> str:
    """A default as one would write it in the environment."""
    if value is PydanticUndefined:
        return "required"
    if value is None or value in ("", (), {}):
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, (tuple, list)):
        return f"`{', '.join(map(str, value))}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


_KINDS: dict[Any, str] = {
    bool: "`true` or `false`",
    int: "whole number",
    float: "number",
    str: "text",
    SecretStr: "secret",
    Path: "path",
    AwareDatetime: "date and time with a time zone",
    tuple: "list",
    dict: "object in JSON",
    Mapping: "object in JSON",
    type(None): "none",
}
_BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


def _type(field: FieldInfo) -> str:
    """The type in words, with its bounds."""
    words = " or ".join(dict.fromkeys(_kinds(field.annotation)))
    bounds = [
        f"{word} {getattr(constraint, name):g}"
        for constraint in field.metadata
        for name, word in _BOUNDS.items()
        if getattr(constraint, name, None) is not None
    ]
    return ", ".join((words, *bounds))


def _kinds(annotation: Any) -> Iterator[str]:
    origin = get_origin(annotation)
    if origin is Literal:
        yield " or ".join(f"`{choice}`" for choice in get_args(annotation))
    elif origin is Annotated:
        yield from _kinds(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for choice in get_args(annotation):
            yield from _kinds(choice)
    else:
        yield _KINDS[origin or annotation]


def generated(page: str) -> str:
    """A page with its generated blocks as they should be."""

    def block(match: re.Match[str]) -> str:
        body = "\n".join(GENERATORS[match["name"]]()).strip()
        return f"{match[1]}\n{body}\n\n{match[3]}"

    return BLOCK.sub(block, page)


def stale_pages() -> list[str]:
    """The pages with a block that does not follow from the code any more."""
    pages = {page: page.read_text(encoding="utf-8") for page in sorted(DOCS.rglob("*.md"))}
    return [page.relative_to(DOCS).as_posix() for page, text in pages.items() if generated(text) != text]


def main() -> None:
    """Rewrites the blocks, or only tells which are stale."""
    stale = stale_pages()
    if "--check" in sys.argv[1:]:
        sys.exit(f"stale: {', '.join(stale)}; run {COMMAND}" if stale else 0)
    for name in stale:
        page = DOCS / name
        page.write_text(generated(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
