"""Every circuit breaker of an application by its name: listed, checked, measured, told to other workers."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, Metric
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector
from pydantic import Field

from fastapi_hardening.core.check import CheckResult
from fastapi_hardening.core.clock import Clock, SystemClock
from fastapi_hardening.core.configuration import ConcernSettings, did_you_mean
from fastapi_hardening.core.events import Events
from fastapi_hardening.core.outbound import Outgoing, Send
from fastapi_hardening.core.store import StateStore
from fastapi_hardening.resilience.circuit_breaker.breaker import CircuitBreaker
from fastapi_hardening.resilience.circuit_breaker.states import (
    CLOSED,
    DISABLED,
    FORCED_OPEN,
    METRICS_ONLY,
    OPEN,
    CircuitBreakerSettings,
    CircuitClosed,
    CircuitForced,
    CircuitHalfOpened,
    CircuitOpened,
    CircuitSnapshot,
)

logger = logging.getLogger("fastapi_hardening.circuit_breaker")

# How long other workers can hear of what was done by hand.
_REMEMBERED_SECONDS = 86_400.0


class CircuitBreakersSettings(CircuitBreakerSettings, ConcernSettings):
    """The settings of all circuit breakers; not enabled, they are made ``disabled`` and let everything through."""

    named: dict[str, CircuitBreakerSettings] = Field(default_factory=dict)
    """What is different for single breakers, by their name."""

    sync_seconds: float = Field(1.0, gt=0)
    """How often workers that share a store tell each other."""

    def of(self, name: str) -> CircuitBreakerSettings:
        """The settings of one breaker: its own, and for the rest those of all."""
        own = self.named.get(name)
        changes = {} if own is None else {key: getattr(own, key) for key in own.model_fields_set}
        general = {key: getattr(self, key) for key in CircuitBreakerSettings.model_fields}
        return CircuitBreakerSettings.model_validate(general | changes)


class CircuitBreakers:
    """The circuit breakers of one application; reachable as ``handle.breakers``.

    Args:
        settings: When they open, in general and by name.
        events: Where changes of state are told.
        clock: Where the time comes from.
        store: Where workers tell each other, if they share one. No call waits for it.

    Example:
        >>> breakers = CircuitBreakers()
        >>> breakers.get("payments").force_open()
        >>> [(breaker.name, breaker.state) for breaker in breakers]
        [('payments', 'forced-open')]
    """

    def __init__(
        self,
        settings: CircuitBreakersSettings | None = None,
        *,
        events: Events | None = None,
        clock: Clock | None = None,
        store: StateStore | None = None,
    ) -> None:
        self.settings = settings or CircuitBreakersSettings()
        self._events = events = events or Events()
        self._clock = clock or SystemClock()
        self._store = store
        self._breakers: dict[str, CircuitBreaker] = {}
        # What other workers have not been told yet, and when by hand was last told or heard: by name.
        self._untold: dict[str, tuple[dict[str, Any], float]] = {}
        self._forced_at: dict[str, float] = {}
        # Each opening counts once, or a circuit whose trials went well would be opened again by an older one.
        self._opened_until: dict[str, float] = {}
        self._applying = False
        self._is_cut_off = False
        self.on_first: list[Callable[[], None]] = []
        if store is not None:
            events.subscribe(CircuitOpened, self._note_opened)
            events.subscribe(CircuitForced, self._note_forced)

    def __iter__(self) -> Iterator[CircuitBreaker]:
        return iter(tuple(self._breakers.values()))

    def __len__(self) -> int:
        return len(self._breakers)

    def __contains__(self, name: str) -> bool:
        return name in self._breakers

    def __getitem__(self, name: str) -> CircuitBreaker:
        """A breaker that is there already.

        Raises:
            KeyError: There is none of that name; the message guesses which one was meant.
        """
        breaker = self._breakers.get(name)
        if breaker is None:
            raise KeyError(f"there is no circuit breaker {name!r}{did_you_mean(name, self._breakers)}")
        return breaker

    def get(self, name: str) -> CircuitBreaker:
        """The breaker of that name, made with its settings the first time."""
        return self._breakers.get(name) or self.add(name)

    def add(
        self,
        name: str,
        settings: CircuitBreakerSettings | None = None,
        *,
        ignore: tuple[type[Exception], ...] = (),
        is_failure: Callable[[Any], bool] | None = None,
    ) -> CircuitBreaker:
        """Makes a breaker.

        Args:
            name: A name of the code, never of a request: breakers are kept for ever.
            settings: In place of those that the application has for the name.
            ignore: Exceptions that say nothing about the service.
            is_failure: Says of a result that came back whether it counts as a failure.

        Raises:
            ValueError: There is one of that name already.
        """
        if name in self._breakers:
            raise ValueError(f"there is a circuit breaker named {name!r} already; get() gives it")
        breaker = CircuitBreaker(
            name,
            settings or self.settings.of(name),
            ignore=ignore,
            is_failure=is_failure,
            state=CLOSED if self.settings.enabled else DISABLED,
            events=self._events,
            clock=self._clock,
        )
        is_first = not self._breakers
        self._breakers[name] = breaker
        if is_first:
            for call in self.on_first:
                call()
        return breaker

    def around(self, send: Send, name_of: Callable[[str], str]) -> Send:
        """The breakers of the endpoints of an upstream, as a layer around it.

        Args:
            send: The next layer.
            name_of: The name of the breaker of an endpoint.
        """

        async def sending(outgoing: Outgoing) -> Any:
            return await self.get(name_of(outgoing.endpoint)).call(send, outgoing)

        return sending

    def list(self) -> list[CircuitSnapshot]:
        """Every breaker as it is at the moment."""
        return [breaker.snapshot() for breaker in self]

    def check(self) -> CheckResult:
        """A health check: warns while a circuit is not closed. The service behind is not this one, so nothing fails."""
        wrong = [
            f"{breaker.name} is {state}"
            for breaker in self
            if (state := breaker.state) != CLOSED and (self.settings.enabled or state != DISABLED)
        ]
        return CheckResult("warn", ", ".join(wrong)) if wrong else CheckResult("pass")

    # --- between workers ----------------------------------------------------------------------------------------------

    def _note_opened(self, opened: CircuitOpened) -> None:
        if opened.counts is not None and opened.name in self._breakers:
            until = self._opened_until[opened.name] = self._clock.time() + opened.seconds
            self._untold[opened.name] = ({"state": OPEN, "until": until}, opened.seconds)

    def _note_forced(self, forced: CircuitForced) -> None:
        if not self._applying and forced.name in self._breakers:
            now = self._forced_at[forced.name] = self._clock.time()
            self._untold[forced.name] = ({"state": forced.state, "at": now}, _REMEMBERED_SECONDS)

    @asynccontextmanager
    async def sharing(self) -> AsyncIterator[None]:
        """While the block runs, workers tell each other in the background, if they share a store."""
        task = None if self._store is None else asyncio.create_task(self._exchange_for_ever())
        try:
            yield
        finally:
            if task is not None:
                task.cancel()
                await asyncio.wait([task])

    async def _exchange_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self.settings.sync_seconds)
            await self.exchange()

    async def exchange(self) -> None:
        """Tells other workers which circuits have opened here or were set by hand, and takes over what they tell."""
        names = list(self._breakers)
        if self._store is None or not names:
            return
        untold, self._untold = self._untold, {}
        try:
            for name, (news, ttl_seconds) in untold.items():
                await self._store.put(_key(name), json.dumps(news).encode(), ttl_seconds)
            told = await self._store.get_many([_key(name) for name in names])
            for name, value in zip(names, told, strict=True):
                if value is not None:
                    self._hear(self._breakers[name], json.loads(value))
        except Exception as error:  # noqa: BLE001 - the store is gone, or holds what is none of ours
            # Once, and not every second.
            level = logging.DEBUG if self._is_cut_off else logging.WARNING
            logger.log(level, "circuits could not be exchanged with other workers: %s", error)
            self._is_cut_off = True
            self._untold = untold | self._untold
        else:
            self._is_cut_off = False

    def _hear(self, breaker: CircuitBreaker, told: dict[str, Any]) -> None:
        if told["state"] == OPEN:
            until = float(told["until"])
            left = min(until - self._clock.time(), breaker.settings.longest_open_seconds)
            if left > 0 and until > self._opened_until.get(breaker.name, 0.0):
                breaker.trip(left)
            self._opened_until[breaker.name] = until
        elif told["at"] > self._forced_at.get(breaker.name, 0.0):
            self._forced_at[breaker.name] = told["at"]
            by_hand = {
                FORCED_OPEN: breaker.force_open,
                DISABLED: breaker.disable,
                METRICS_ONLY: breaker.only_measure,
                CLOSED: breaker.reset,
            }
            self._applying = True
            try:
                by_hand[told["state"]]()
            finally:
                self._applying = False


def _key(name: str) -> str:
    return f"circuit:{name}"


def measure(registry: CollectorRegistry, breakers: CircuitBreakers, events: Events) -> None:
    """Shows the state of each circuit, and what became of its calls, as metrics."""
    state = Gauge(
        "hardening_circuit_state",
        "0 closed, 1 half-open, 2 open; by hand or not.",
        ("circuit",),
        registry=registry,
        multiprocess_mode="livemax",
    )
    by_hand = {FORCED_OPEN: 2}
    events.subscribe(CircuitOpened, lambda event: state.labels(event.name).set(2))
    events.subscribe(CircuitHalfOpened, lambda event: state.labels(event.name).set(1))
    events.subscribe(CircuitClosed, lambda event: state.labels(event.name).set(0))
    events.subscribe(CircuitForced, lambda event: state.labels(event.name).set(by_hand.get(event.state, 0)))
    registry.register(_Calls(breakers))


class _Calls(Collector):
    """What became of calls; read from the breakers, so that a call pays nothing for it."""

    def __init__(self, breakers: CircuitBreakers) -> None:
        self._breakers = breakers

    def describe(self) -> Iterable[Metric]:
        """The name, for the registry."""
        return [_calls()]

    def collect(self) -> Iterable[Metric]:
        """One series for each circuit and outcome."""
        calls = _calls()
        for each in self._breakers.list():
            for outcome in ("succeeded", "failed", "ignored", "refused"):
                calls.add_metric((each.name, outcome), getattr(each, outcome))
        return [calls]


def _calls() -> CounterMetricFamily:
    return CounterMetricFamily(
        "hardening_circuit_calls", "Calls by what became of them.", labels=("circuit", "outcome")
    )
