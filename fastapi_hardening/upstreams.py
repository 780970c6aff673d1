"""Upstreams: other services by name, with every outbound concern around their calls.

The concerns do not know each other; here their parts for one upstream are made and introduced. In which order they
stand around a call is the list ``OUTBOUND`` in :mod:`fastapi_hardening.harden`.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from fastapi_hardening.core.check import CheckResult
from fastapi_hardening.core.clock import Clock
from fastapi_hardening.core.configuration import ConfigurationError, Section, did_you_mean
from fastapi_hardening.core.events import Events
from fastapi_hardening.core.outbound import Outgoing, Send
from fastapi_hardening.performance.http_client import ConnectionPool, ConnectionSettings, Provider, client_of
from fastapi_hardening.resilience.bulkhead import BulkheadSettings, CallBulkhead
from fastapi_hardening.resilience.call_timeout import CallTimeout
from fastapi_hardening.resilience.circuit_breaker import CircuitBreakers, CircuitBreakerSettings
from fastapi_hardening.resilience.failover import Failover, FailoverSettings
from fastapi_hardening.resilience.retry import Retries, RetrySettings

if TYPE_CHECKING:
    import httpx2

_SERVER_ERROR = 500


class UpstreamSettings(Section):
    """The settings of one upstream."""

    base_urls: tuple[str, ...] = Field(min_length=1)
    """Its endpoints, such as ``http://10.0.0.1:8000``; a path in one of them stands before that of each request."""

    total_seconds: float = Field(30.0, gt=0)
    """How long a call may take, with all its attempts."""

    attempt_seconds: float = Field(10.0, gt=0)
    """How long one attempt may take, with the body of the answer."""

    bulkhead: BulkheadSettings = BulkheadSettings()
    """How many calls may be under way."""

    retry: RetrySettings = RetrySettings()
    """How they are made again."""

    failover: FailoverSettings = FailoverSettings()
    """How the endpoint is picked, and when one is left out."""

    circuit_breaker: CircuitBreakerSettings = CircuitBreakerSettings()
    """When the calls of an endpoint are no longer made."""

    connections: ConnectionSettings = ConnectionSettings()
    """The connections to each endpoint."""

    @field_validator("base_urls")
    @classmethod
    def _are_endpoints(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(f"{url!r} is no address such as 'http://10.0.0.1:8000'")
            if parts.query or parts.fragment or parts.username is not None:
                raise ValueError(f"{parts.hostname}: an endpoint has no query, fragment or credentials")
        if len(set(urls)) < len(urls):
            raise ValueError("an endpoint stands here twice")
        return urls

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.attempt_seconds > self.total_seconds:
            raise ValueError(
                f"attempt_seconds ({self.attempt_seconds:g}) is above total_seconds ({self.total_seconds:g}), so no "
                "attempt could use its time: lower the first"
            )
        if self.connections.connect_seconds > self.attempt_seconds:
            raise ValueError(
                f"connections.connect_seconds ({self.connections.connect_seconds:g}) is above attempt_seconds "
                f"({self.attempt_seconds:g}): lower the first"
            )
        if self.bulkhead.wait_seconds > self.total_seconds:
            raise ValueError(f"bulkhead.wait_seconds is above total_seconds ({self.total_seconds:g}): lower it")
        hedge = self.failover.hedge_after_seconds
        if isinstance(hedge, float) and hedge >= self.attempt_seconds:
            raise ValueError(
                f"failover.hedge_after_seconds ({hedge:g}) is not below attempt_seconds ({self.attempt_seconds:g}), so "
                "nothing would be hedged"
            )
        window = self.circuit_breaker
        if window.window == "time" and window.window_seconds < 2 * self.attempt_seconds:
            raise ValueError(
                f"circuit_breaker.window_seconds ({window.window_seconds:g}) is below twice attempt_seconds "
                f"({self.attempt_seconds:g}), so attempts that hang would be forgotten too early"
            )
        places = self.connections.max_connections
        if self.bulkhead.max_concurrent > places:
            raise ValueError(
                f"bulkhead.max_concurrent ({self.bulkhead.max_concurrent}) is above connections.max_connections "
                f"({places}): when one endpoint is left, calls would wait for a connection, where nothing is fair"
            )
        return self


class OutboundSlot(NamedTuple):
    """A place in the list of layers around an upstream.

    Attributes:
        name: What the layer is called.
        setting: The key of :class:`UpstreamSettings` that it follows.
        purpose: What it is for, in a few words.
        build: Puts the layer around the next one.
    """

    name: str
    setting: str
    purpose: str
    build: Callable[["Upstream", Send], Send]


class Upstream:
    """The parts of one upstream.

    Attributes:
        name: What it is called.
        settings: Its settings.
        total: Bounds the whole call.
        bulkhead: Bounds the calls at the same time.
        retry: Makes calls again.
        failover: Picks the endpoint.
        breakers: Have one breaker for each endpoint.
        attempt: Bounds one attempt.
        pool: Sends requests.
    """

    def __init__(
        self,
        name: str,
        settings: UpstreamSettings,
        slots: Sequence[OutboundSlot],
        *,
        breakers: CircuitBreakers,
        retries: Retries,
        events: Events,
        clock: Clock,
        provider: Provider,
    ) -> None:
        self.name = name
        self.settings = settings
        self.breakers = breakers
        self.pool = ConnectionPool(settings.connections)
        self.total = CallTimeout(name, settings.total_seconds, events=events)
        self.attempt = CallTimeout(f"an attempt at {name}", settings.attempt_seconds, events=events)
        self.bulkhead = CallBulkhead(name, settings.bulkhead, events=events)
        self.retry = retries.add(
            f"upstream {name}", settings.retry, is_failure=lambda answer: answer.status_code in settings.retry.statuses
        )
        for url in settings.base_urls:
            breakers.add(
                self.breaker_of(url),
                settings.circuit_breaker,
                is_failure=lambda answer: answer.status_code >= _SERVER_ERROR,
            )
        self.failover = Failover(
            name,
            settings.base_urls,
            settings.failover,
            is_open=lambda url: breakers[self.breaker_of(url)].state in ("open", "forced-open"),
            charge=self.retry.budget.withdraw,
            events=events,
            clock=clock,
        )
        send: Send = self._nowhere
        for slot in reversed(slots):
            send = slot.build(self, send)
        self._make_client = partial(client_of, name, send, self.pool.aclose, provider=provider)
        self._client = self._make_client()

    @property
    def client(self) -> "httpx2.AsyncClient":
        """What is called. Closed by somebody, as by ``async with``, it is made anew: it is not theirs alone."""
        if self._client.is_closed:
            self._client = self._make_client()
        return self._client

    def breaker_of(self, url: str) -> str:
        """The name of the breaker of an endpoint."""
        return f"{self.name} at {url}"

    async def _nowhere(self, _outgoing: Outgoing) -> None:
        raise ConfigurationError("the innermost layer of an upstream sends the request, and asks no other")


class Upstreams:
    """The upstreams of one application by name; reachable as ``handle.upstreams``.

    Args:
        settings: By name.
        slots: The layers around each, outermost first.
        breakers: Have one for each endpoint.
        retries: Have one policy for each upstream.
        events: Where it is told.
        clock: Where the time comes from.
        provider: Gives what makes the spans of calls, if anything does.
    """

    def __init__(
        self,
        settings: dict[str, UpstreamSettings],
        slots: Sequence[OutboundSlot],
        *,
        breakers: CircuitBreakers,
        retries: Retries,
        events: Events,
        clock: Clock,
        provider: Provider = lambda: None,
    ) -> None:
        self._provider = provider
        self.settings = settings
        self.slots = tuple(slots)
        self._breakers = breakers
        self._retries = retries
        self._events = events
        self._clock = clock
        self._upstreams: dict[str, Upstream] = {}
        self.on_first: list[Callable[[], None]] = []

    def __iter__(self) -> Iterator[Upstream]:
        return iter(tuple(self._upstreams.values()))

    def get(self, name: str) -> Upstream:
        """The upstream of that name.

        Raises:
            KeyError: The settings have none of that name; the message guesses which one was meant.
            ConfigurationError: httpx2 is not installed.
        """
        upstream = self._upstreams.get(name)
        if upstream is not None:
            return upstream
        settings = self.settings.get(name)
        if settings is None:
            raise KeyError(f"there is no upstream {name!r} in the settings{did_you_mean(name, self.settings)}")
        is_first = not self._upstreams
        upstream = self._upstreams[name] = Upstream(
            name,
            settings,
            self.slots,
            breakers=self._breakers,
            retries=self._retries,
            events=self._events,
            clock=self._clock,
            provider=self._provider,
        )
        if is_first:
            for call in self.on_first:
                call()
        return upstream

    def make(self) -> None:
        """Makes all of them, so that a mistake is found when the application starts.

        Raises:
            ConfigurationError: httpx2 is not installed.
        """
        for name in self.settings:
            self.get(name)

    def check(self) -> CheckResult:
        """A health check: warns while an endpoint is left out."""
        wrong = [f"{each.name}: {result.output}" for each in self if (result := each.failover.check()).status != "pass"]
        return CheckResult("warn", "; ".join(wrong)) if wrong else CheckResult("pass")

    async def close(self) -> None:
        """Closes the connections of all of them; the next call opens new ones."""
        for upstream in self:
            await upstream.pool.aclose()
