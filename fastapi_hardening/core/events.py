"""Facts that concerns tell each other without knowing each other.

A concern emits a frozen dataclass named in the past tense (``CircuitOpened``); whoever wants to know subscribes to its
class. Delivery is synchronous and in the order of subscription, so a subscriber must be quick; what it raises is logged
and reaches neither the request nor the next subscriber. Nothing is delivered to other processes.

Example:
    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True, slots=True)
    ... class KettleBoiled:
    ...     degrees: int
    >>> events = Events()
    >>> seen = []
    >>> stop = events.subscribe(KettleBoiled, seen.append)
    >>> events.emit(KettleBoiled(100))
    >>> seen, events.count(KettleBoiled)
    ([KettleBoiled(degrees=100)], 1)
    >>> stop()
"""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

logger = logging.getLogger("fastapi_hardening.events")

E = TypeVar("E")
Subscriber = Callable[[Any], None]


@dataclass(frozen=True, slots=True)
class RequestRefused:
    """A layer or an override answered instead of the endpoint.

    Attributes:
        problem: The slug of the problem type, such as ``quota-exceeded``.
        status: The HTTP status sent.
        layer: The concern that refused.
        template: The path template of the route, or ``None`` where no route matches.
        request_id: The id that the client got.
        client: The client's address, as far as it is believed.
        detail: The sentence sent to the client.
        key: Whose budget was spent, where that is one client; ``None`` for refusals that count nobody.
    """

    problem: str
    status: int
    layer: str
    template: str | None
    request_id: str
    client: str
    detail: str | None
    key: str | None = None


@dataclass(frozen=True, slots=True)
class AttackFound:
    """A request has in it what looks like an attack; told once for each class of attack and place in the request.

    Attributes:
        finding: The stable name, such as ``sql.quoted-tautology``.
        kind: The class of attack, such as ``sql``.
        pointer: Where it is, as a JSON pointer (RFC 6901) such as ``/body/comment``; never what it is.
        refused: Whether the request was refused for it.
        template: The path template of the route, or ``None`` where no route matches.
        request_id: The id that the client got.
        client: The client's address, as far as it is believed.
    """

    finding: str
    kind: str
    pointer: str
    refused: bool
    template: str | None
    request_id: str
    client: str


class Events:
    """The event bus of one hardened application; reachable as ``handle.events``."""

    def __init__(self) -> None:
        self._subscribers: dict[type, list[Subscriber]] = {}
        self._counts: Counter[type] = Counter()

    def subscribe(self, event: type[E], subscriber: Callable[[E], None]) -> Callable[[], None]:
        """Calls ``subscriber`` with every later event of exactly this class, or of any class if it is ``object``.

        Returns:
            A function that ends the subscription; calling it twice does no harm.
        """
        subscribers = self._subscribers.setdefault(event, [])
        subscribers.append(subscriber)

        def unsubscribe() -> None:
            if subscriber in subscribers:
                subscribers.remove(subscriber)

        return unsubscribe

    def emit(self, event: object) -> None:
        """Counts an event and hands it to its subscribers."""
        kind = type(event)
        self._counts[kind] += 1
        for subscriber in (*self._subscribers.get(kind, ()), *self._subscribers.get(object, ())):
            try:
                subscriber(event)
            except Exception:
                logger.exception("a subscriber of %s failed: %r", kind.__name__, subscriber)

    def count(self, event: type) -> int:
        """How many events of this class were emitted since the start."""
        return self._counts[event]
