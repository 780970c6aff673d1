"""Which routes need a thread, because FastAPI runs in one what is not async."""

import inspect
from typing import Any

from fastapi_hardening.core.routes import RouteEntry


def needs_thread(entry: RouteEntry) -> bool:
    """Whether FastAPI runs the endpoint of a route, or one of its dependencies, in a thread."""
    if entry.dependant is None:
        return entry.endpoint is not None and entry.kind == "http" and _is_sync(entry.endpoint)
    return any(_is_sync(call) for call in _calls(entry.dependant))


def _calls(dependant: Any) -> list[Any]:
    return [dependant.call, *(call for child in dependant.dependencies for call in _calls(child))]


def _is_sync(call: Any) -> bool:
    call = inspect.unwrap(call)
    while hasattr(call, "func"):
        call = call.func
    functions = (call, getattr(call, "__call__", None))  # noqa: B004 - the method is looked at, not whether it is one
    return not any(inspect.iscoroutinefunction(each) or inspect.isasyncgenfunction(each) for each in functions)
