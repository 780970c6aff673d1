"""Every retry policy of an application by its name, and what is measured of them."""

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter
from pydantic import Field

from fastapi_hardening.core.clock import Clock
from fastapi_hardening.core.configuration import ConcernSettings
from fastapi_hardening.core.events import Events
from fastapi_hardening.core.tally import BoundedCounter
from fastapi_hardening.resilience.retry.budget import RetryBudget
from fastapi_hardening.resilience.retry.policy import Retry, RetryGivenUp, RetryScheduled, RetrySettings


class RetriesSettings(RetrySettings, ConcernSettings):
    """The settings of all retry policies; not enabled, every call is made once."""

    named: dict[str, RetrySettings] = Field(default_factory=dict)
    """What is different for single policies, by their name."""

    def of(self, name: str) -> RetrySettings:
        """The settings of one policy: its own, and for the rest those of all."""
        own = self.named.get(name)
        changes = {} if own is None else {key: getattr(own, key) for key in own.model_fields_set}
        general = {key: getattr(self, key) for key in RetrySettings.model_fields}
        if not self.enabled:
            changes["attempts"] = 1
        return RetrySettings.model_validate(general | changes)


class Retries:
    """The retry policies of one application by name; reachable as ``handle.retries``.

    Args:
        settings: In general and by name.
        events: Where retries are told.
        clock: Where the time comes from.

    Example:
        >>> retries = Retries()
        >>> retries.get("payments") is retries.get("payments")
        True
    """

    def __init__(
        self, settings: RetriesSettings | None = None, *, events: Events | None = None, clock: Clock | None = None
    ) -> None:
        self.settings = settings or RetriesSettings()
        self._events = events
        self._clock = clock
        self._retries: dict[str, Retry] = {}
        self.on_first: list[Callable[[], None]] = []

    def __iter__(self) -> Iterator[Retry]:
        return iter(tuple(self._retries.values()))

    def get(self, name: str) -> Retry:
        """The policy of that name, made with its settings the first time."""
        return self._retries.get(name) or self.add(name)

    def add(
        self,
        name: str,
        settings: RetrySettings | None = None,
        *,
        on: tuple[type[Exception], ...] | Callable[[Exception], bool] | None = None,
        is_failure: Callable[[Any], bool] | None = None,
        budget: RetryBudget | None = None,
    ) -> Retry:
        """Makes a policy; the arguments are those of :class:`Retry`.

        Raises:
            ValueError: There is one of that name already.
        """
        if name in self._retries:
            raise ValueError(f"there is a retry policy named {name!r} already; get() gives it")
        if settings is None:
            settings = self.settings.of(name)
        elif not self.settings.enabled:
            settings = settings.model_copy(update={"attempts": 1})
        is_first = not self._retries
        retry = self._retries[name] = Retry(
            name,
            settings,
            on=on,
            is_failure=is_failure,
            budget=budget,
            events=self._events,
            clock=self._clock,
        )
        if is_first:
            for call in self.on_first:
                call()
        return retry


def measure(registry: CollectorRegistry, events: Events) -> None:
    """Has retries counted in ``hardening_retries_total``, by policy and outcome."""
    counter = BoundedCounter(
        Counter(
            "hardening_retries",
            "Retries that were made (scheduled), and calls given up by the reason.",
            ("policy", "outcome"),
            registry=registry,
        )
    )
    events.subscribe(RetryScheduled, lambda event: counter.count(event.name, "scheduled"))
    events.subscribe(RetryGivenUp, lambda event: counter.count(event.name, event.why))
