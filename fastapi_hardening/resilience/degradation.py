"""Does without what is nice to have, so that what matters goes on: features that can be off.

It protects the checkout from the recommendations: when there is too much to do, when a part is broken, or when somebody
says so, the page is shown without them. It is *not* a system of flags for experiments or customers: a feature is on or
off for everybody, and the reason is always trouble.

There is no layer. A feature is a dependency of a route, a value in a signature, or a decorator with what is given
instead. Features of level 1 go first, as soon as a queue stands (:mod:`fastapi_hardening.resilience.load_shedding`);
those of level 3 last; one without a level never for load.

Example:
    >>> from typing import Annotated
    >>> from fastapi import FastAPI
    >>> from fastapi_hardening import Feature
    >>> app = FastAPI()
    >>> recommendations = Feature("recommendations", level=1)
    >>> @app.get("/recommendations")
    ... @recommendations.otherwise([])
    ... async def recommend() -> list[str]:
    ...     return ["teapot"]
    >>> @app.get("/export", dependencies=[Feature("export", level=2)])
    ... async def export() -> None: ...
    >>> @app.get("/product")
    ... async def product(shows_similar: Annotated[bool, recommendations.on]) -> None: ...
"""

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal, TypeVar

from fastapi import params
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from pydantic import Field
from starlette.requests import HTTPConnection

from fastapi_hardening.core import context as request_context
from fastapi_hardening.core.configuration import ConcernSettings
from fastapi_hardening.core.context import RequestContext
from fastapi_hardening.core.features import Features
from fastapi_hardening.core.policy import Override
from fastapi_hardening.core.problem import IANA, Problem, retry_after, tell

logger = logging.getLogger("fastapi_hardening.features")

LAYER = "degradation"
F = TypeVar("F", bound=Callable[..., Any])


class DegradationSettings(ConcernSettings):
    """The settings of features that can be off."""

    off: tuple[str, ...] = ()
    """Features that are switched off."""

    by_load: bool = True
    """Whether features are switched off when there is too much to do."""

    recovery_seconds: float = Field(10.0, ge=0)
    """The load must be lower for so long before features come back, those of one level at a time."""

    sync_seconds: float = Field(5.0, gt=0)
    """How often workers that share a store tell each other what was switched by hand."""


class FeatureOff(Problem):
    """The feature is switched off for the time being."""

    status = 503
    type = IANA + "temporary-reduced-capacity"
    title = "Temporarily reduced capacity"


class Feature(Override):
    """Something that the application can do without; declared once, and used wherever it matters.

    As a dependency of a route, a router or an application it answers 503 while the feature is off. On an application
    that was never hardened it is on.

    Args:
        name: What it is called in settings, events and metrics.
        level: From which level of load on it is off: 1 goes first, 3 last; ``None`` for never.
        check: The health check without which it is off.
        retry_after_seconds: When a refused client is asked to come back; up to twice as long at random.

    Raises:
        ValueError: The level is none.

    Example:
        >>> similar = Feature("similar products", level=1, check="recommender")
    """

    every_level_holds: ClassVar[bool] = True

    def __init__(
        self,
        name: str,
        *,
        level: Literal[1, 2, 3] | None = None,
        check: str | None = None,
        retry_after_seconds: float = 10.0,
    ) -> None:
        super().__init__()
        if level not in (None, 1, 2, 3):
            raise ValueError(f"{level!r} is no level of load; 1 goes first, 3 last, and None never")
        self.name = name
        self.level = level
        self.check = check
        self.retry_after_seconds = retry_after_seconds

    @property
    def is_on(self) -> bool:
        """Whether it is on for the request that this code works for; outside of requests it is."""
        return self._is_on(request_context.current())

    @property
    def on(self) -> params.Depends:
        """A dependency that gives whether it is on: ``shown: Annotated[bool, feature.on]``."""

        async def is_on(connection: HTTPConnection) -> bool:
            return self._is_on(request_context.of(connection.scope))

        return params.Depends(is_on)

    def otherwise(self, fallback: Any, *, on: tuple[type[Exception], ...] = ()) -> Callable[[F], F]:
        """A decorator for a function, such as an endpoint: what it gives while the feature is off.

        Args:
            fallback: The value, or a function that is called with the same arguments (sync or async).
            on: Exceptions of the function for which the fallback is given as well.

        Raises:
            TypeError: The function is not async, and the fallback is.
        """

        def decorate(function: F) -> F:
            if inspect.iscoroutinefunction(function):

                @functools.wraps(function)
                async def wrapped(*args: Any, **kwargs: Any) -> Any:
                    if self.is_on:
                        try:
                            return await function(*args, **kwargs)
                        except on as error:
                            self._say(error)
                    given = fallback(*args, **kwargs) if callable(fallback) else fallback
                    return await given if inspect.isawaitable(given) else given

            else:
                if inspect.iscoroutinefunction(fallback):
                    raise TypeError("a function that is not async needs a fallback that is not async either")

                @functools.wraps(function)
                def wrapped(*args: Any, **kwargs: Any) -> Any:
                    if self.is_on:
                        try:
                            return function(*args, **kwargs)
                        except on as error:
                            self._say(error)
                    return fallback(*args, **kwargs) if callable(fallback) else fallback

            return wrapped  # type: ignore[return-value]

        return decorate

    async def act_late(self, connection: HTTPConnection) -> None:
        """Refuses the request while the feature is off."""
        context = request_context.ensure(connection.scope)
        if not self._is_on(context):
            problem = FeatureOff(
                "This feature is switched off for the time being.", headers=retry_after(self.retry_after_seconds)
            )
            tell(problem, context, LAYER)
            raise problem

    def declare(self, features: Features) -> None:
        """Makes itself known."""
        features.add(self.name, level=self.level, check=self.check)

    def _is_on(self, context: RequestContext | None) -> bool:
        features = None if context is None else context.features
        if features is None:
            return True
        self.declare(features)
        return features.is_on(self.name)

    def _say(self, error: Exception) -> None:
        logger.warning("the feature %s has failed (%s); its fallback is given", self.name, type(error).__name__)


class _FeaturesOn(Collector):
    """1 for each feature that is on, 0 for each that is off, when somebody asks."""

    def __init__(self, features: Features) -> None:
        self._features = features

    def describe(self) -> Iterator[Metric]:
        """The series, without its values."""
        yield self._series()

    def collect(self) -> Iterator[Metric]:
        """The series."""
        series = self._series()
        for status in self._features:
            series.add_metric((status.name,), float(status.on))
        yield series

    @staticmethod
    def _series() -> GaugeMetricFamily:
        return GaugeMetricFamily("hardening_feature_on", "Whether a feature is on.", labels=("feature",))


def measure(registry: CollectorRegistry, features: Features) -> None:
    """Has the features shown by the metrics of this process."""
    registry.register(_FeaturesOn(features))
