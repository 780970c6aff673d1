"""Refuses what would only make everybody wait: 503 at once while more comes than can be done.

It protects what can be done from what cannot: without it, at three times the capacity every request waits until its
client has given up, and all the work is for nobody. It is *not* a rate limit: it looks at the server, not at the
client. Nor does it need a number from you: it looks for a queue that does not go away.

A queue is nothing bad: each burst makes one, and it drains. A *standing* queue is: if for a whole second there was not
one moment in which a newcomer had waited for less than ``target_seconds``, more comes than goes (CoDel's test, RFC
8289). Then requests are admitted by a rate. It is cut as long as the queue stands, and grows when it does not (additive
increase, multiplicative decrease: Chiu and Jain, 1989). Queues that are looked at: the event loop, where everything
waits for the one processor; the pool of threads, where what is not async waits; those of yours that are added.

Latency is not looked at, so streams, websockets, long polling and slow routes do not disturb it, and a service with few
requests is never refused one for being slow.

It sits behind the drain and before everything that costs. Probes and metrics are answered above it.

Example:
    >>> from fastapi import FastAPI
    >>> from fastapi_hardening import Priority
    >>> from fastapi_hardening.resilience.load_shedding import LoadSheddingMiddleware
    >>> app = FastAPI()
    >>> app.add_middleware(LoadSheddingMiddleware)
    >>> @app.post("/orders", dependencies=[Priority("critical")])
    ... async def order() -> None: ...
    >>> @app.get("/recommendations", dependencies=[Priority("background")])
    ... async def recommend() -> None: ...
"""

from fastapi_hardening.resilience.load_shedding.layer import LoadSheddingMiddleware, Overloaded, Priority, measure
from fastapi_hardening.resilience.load_shedding.probe import Probe
from fastapi_hardening.resilience.load_shedding.settings import IMPORTANCES, Importance, LoadSheddingSettings
from fastapi_hardening.resilience.load_shedding.shedder import Shedder

__all__ = [
    "IMPORTANCES",
    "Importance",
    "LoadSheddingMiddleware",
    "LoadSheddingSettings",
    "Overloaded",
    "Priority",
    "Probe",
    "Shedder",
    "measure",
]
