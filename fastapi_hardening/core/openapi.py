"""How concerns add to the OpenAPI document of an application what they change about its answers.

FastAPI makes the document when it is first asked for, and again after a route was added; so an amendment is a function
that runs on each new document, and never twice on one.
"""

from collections.abc import Callable, Iterator
from typing import Any

from fastapi import FastAPI

Document = dict[str, Any]
Amendment = Callable[[Document], None]

_AMENDED = "_fastapi_hardening_amendments"
_METHODS = ("get", "put", "post", "delete", "options", "head", "patch", "trace", "query")


def amend(app: FastAPI, amendment: Amendment) -> None:
    """Has every document that the application makes pass through a function once, which changes it in place.

    Args:
        app: The application; an ``openapi`` function that was put on it before is kept and amended.
        amendment: What to do; asking for it a second time changes nothing.
    """
    original = app.openapi
    amendments: list[Amendment] = getattr(original, _AMENDED, [])
    if amendments:
        if amendment not in amendments:
            amendments.append(amendment)
        return
    amendments.append(amendment)
    last: Document | None = None

    def openapi() -> Document:
        nonlocal last
        document = original()
        if document is not last:
            for each in amendments:
                each(document)
            last = document
        return document

    setattr(openapi, _AMENDED, amendments)
    app.openapi = openapi  # type: ignore[method-assign]


def operations(document: Document) -> Iterator[dict[str, Any]]:
    """Every operation of a document, path by path."""
    for item in (document.get("paths") or {}).values():
        yield from (item[method] for method in _METHODS if method in item)


def reference(schema: str) -> str:
    """The JSON reference to a component schema."""
    return f"#/components/schemas/{schema}"


def free_name(schemas: dict[str, Any], name: str) -> str:
    """The name for a schema of ours: another one where the application has a schema of that name itself."""
    return name if name not in schemas else f"Hardening{name}"
