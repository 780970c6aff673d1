"""Answers for a handler that takes too long: 504 if the answer has not begun in time.

It protects clients from waiting for what will not come, and the process from requests that pile up behind one slow
dependency. It is *not* a limit of streams: once the answer has begun it may last, unless ``total_seconds`` says
otherwise. Nor does it watch slow clients: the time counts from the last piece of the body, whose speed is a request
limit.

It sits behind everything that refuses, so that a refused request sets no timer and a 504 says what is left of the
limits; and above idempotency and the cache, so that whoever waits there for the answer of another request is answered,
too.

A handler in a thread cannot be stopped. Its client is answered all the same, and the thread keeps its place in the
pool until it ends. When all places are kept like that, what needs a thread is refused at once.

Example:
    >>> from fastapi import FastAPI
    >>> from fastapi_hardening import Timeout
    >>> from fastapi_hardening.resilience.timeout import TimeoutMiddleware, TimeoutSettings
    >>> app = FastAPI()
    >>> app.add_middleware(TimeoutMiddleware, settings=TimeoutSettings(first_byte_seconds=10))
    >>> @app.get("/report", dependencies=[Timeout(120)])
    ... async def report() -> None: ...
    >>> @app.get("/next-event", dependencies=[Timeout(None)])
    ... async def wait_for_the_next_event() -> None: ...
"""

from fastapi_hardening.resilience.timeout.layer import (
    AnswerCutOff,
    DeadlineExceeded,
    HandlerAbandoned,
    ThreadsExhausted,
    Timeout,
    TimeoutMiddleware,
)
from fastapi_hardening.resilience.timeout.settings import Bounds, TimeoutSettings
from fastapi_hardening.resilience.timeout.threads import needs_thread

__all__ = [
    "AnswerCutOff",
    "Bounds",
    "DeadlineExceeded",
    "HandlerAbandoned",
    "ThreadsExhausted",
    "Timeout",
    "TimeoutMiddleware",
    "TimeoutSettings",
    "needs_thread",
]
