"""What may be above what it should be: ratios, burn rates, quantiles, counts and levels, and the same in PromQL.

A condition looks at the difference that a counter made in a window, as PromQL's ``increase`` does, or at a gauge as it
stands.

Example:
    >>> Count(of='hardening_events_total{event="LoginFailed"}', window_seconds=300, above=50).expression()
    'sum(increase(hardening_events_total{event="LoginFailed"}[5m])) > 50'
"""

from collections.abc import Callable, Mapping
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from fastapi_hardening.core.configuration import Section
from fastapi_hardening.observability.alerts.selectors import Snapshot, selector

Vector = tuple[float, ...]
"""What a condition reads at one moment; counters only rise."""

Increases = Mapping[float, Vector]
"""How much a condition's vector has grown in so many seconds, for each of its windows."""


class Condition(Section):
    """Something that may be above what it should be."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the samples that are read."""
        raise NotImplementedError

    @property
    def windows(self) -> tuple[float, ...]:
        """The windows that are looked back, in seconds."""
        raise NotImplementedError

    @property
    def limit(self) -> float:
        """What the value is compared with."""
        raise NotImplementedError

    def vector(self, snapshot: Snapshot) -> Vector:
        """What is read at one moment."""
        raise NotImplementedError

    def value(self, now: Vector, increases: Increases) -> float | None:
        """What is compared with the limit; ``None`` where there is too little to say anything."""
        raise NotImplementedError

    def exceeds(self, value: float, limit: float) -> bool:
        """Whether a value is worth an alert."""
        return value > limit

    def expression(self) -> str:
        """The same in PromQL."""
        raise NotImplementedError


def _checked(text: str) -> str:
    selector(text)
    return text


class Ratio(Condition):
    """A share of what was counted: errors of requests, say."""

    kind: Literal["ratio"] = "ratio"
    """Which condition this is."""
    of: str
    """What is counted above the line, as a selector."""
    to: str
    """What is counted below the line."""
    window_seconds: float = Field(300.0, gt=0)
    """How long is looked back."""
    above: float
    """The share above which it is too much."""
    at_least: float = Field(20.0, ge=0)
    """With fewer below the line nothing is said: one error of two requests is no half."""

    _selectors = field_validator("of", "to")(_checked)

    @property
    def names(self) -> tuple[str, ...]:
        """Both selectors' names."""
        return selector(self.of).name, selector(self.to).name

    @property
    def windows(self) -> tuple[float, ...]:
        """The one window."""
        return (self.window_seconds,)

    @property
    def limit(self) -> float:
        """The share."""
        return self.above

    def vector(self, snapshot: Snapshot) -> Vector:
        """Both totals."""
        return selector(self.of).total(snapshot), selector(self.to).total(snapshot)

    def value(self, now: Vector, increases: Increases) -> float | None:  # noqa: ARG002 - others need what is now
        """The share in the window."""
        of, to = increases[self.window_seconds]
        return of / to if to > 0 and to >= self.at_least else None

    def expression(self) -> str:
        """A ratio of sums of rates."""
        window = duration(self.window_seconds)
        enough = f" and sum(increase({self.to}[{window}])) >= {self.at_least:g}" if self.at_least else ""
        return f"{_share(self.of, self.to, window)} > {self.above:g}{enough}"


class BurnRate(Condition):
    """A service level objective whose error budget is spent too fast, by several windows at once.

    Two windows of a pair must both be above the factor: the long one says that it matters, the short one that it still
    goes on. The default pairs are those of Google's SRE workbook (chapter 5, "Alerting on SLOs") for paging.
    """

    kind: Literal["burn-rate"] = "burn-rate"
    """Which condition this is."""
    objective: float = Field(0.999, gt=0, lt=1)
    """The share that is to be good, such as 0.999."""
    bad: str
    """What is counted as bad, as a selector."""
    total: str
    """What is counted at all."""
    pairs: tuple[tuple[float, float, float], ...] = ((3600.0, 300.0, 14.4), (21_600.0, 1800.0, 6.0))
    """Long window, short window (seconds), and how many times faster than allowed the budget is spent."""
    at_least: float = Field(100.0, ge=0)
    """With fewer in the long window nothing is said."""

    _selectors = field_validator("bad", "total")(_checked)

    @property
    def names(self) -> tuple[str, ...]:
        """Both selectors' names."""
        return selector(self.bad).name, selector(self.total).name

    @property
    def windows(self) -> tuple[float, ...]:
        """Every window of every pair."""
        return tuple(window for long, short, _ in self.pairs for window in (long, short))

    @property
    def limit(self) -> float:
        """The value is counted in factors."""
        return 1.0

    def vector(self, snapshot: Snapshot) -> Vector:
        """Both totals."""
        return selector(self.bad).total(snapshot), selector(self.total).total(snapshot)

    def value(self, now: Vector, increases: Increases) -> float | None:  # noqa: ARG002
        """By how much the budget is spent faster than the factor of the worst pair."""
        found = []
        for long, short, factor in self.pairs:
            shares = []
            for window, enough in ((long, self.at_least), (short, 0.0)):
                bad, total = increases[window]
                shares.append(bad / total if total > 0 and total >= enough else 0.0)
            found.append(min(shares) / ((1 - self.objective) * factor))
        return max(found, default=None)

    def expression(self) -> str:
        """Each pair's windows, joined."""
        budget = 1 - self.objective
        pairs = []
        for long, short, factor in self.pairs:
            windows = (_share(self.bad, self.total, duration(window)) for window in (long, short))
            enough = f" and sum(increase({self.total}[{duration(long)}])) >= {self.at_least:g}" if self.at_least else ""
            pairs.append("(" + " and ".join(f"{share} > {factor * budget:.6g}" for share in windows) + enough + ")")
        return " or ".join(pairs)


class Quantile(Condition):
    """A quantile of a histogram: how long the slowest of a hundred take, say."""

    kind: Literal["quantile"] = "quantile"
    """Which condition this is."""
    of: str
    """The histogram, as a selector without ``_bucket``."""
    quantile: float = Field(0.99, gt=0, lt=1)
    """Which one."""
    window_seconds: float = Field(300.0, gt=0)
    """How long is looked back."""
    above: float
    """What is too much, in the histogram's unit."""
    at_least: float = Field(100.0, ge=0)
    """With fewer observations nothing is said."""

    _selectors = field_validator("of")(_checked)

    @property
    def _buckets(self) -> str:
        name, brace, matchers = self.of.partition("{")
        return f"{name}_bucket{brace}{matchers}"

    @property
    def names(self) -> tuple[str, ...]:
        """The buckets' name."""
        return (selector(self._buckets).name,)

    @property
    def windows(self) -> tuple[float, ...]:
        """The one window."""
        return (self.window_seconds,)

    @property
    def limit(self) -> float:
        """What is too much."""
        return self.above

    def vector(self, snapshot: Snapshot) -> Vector:
        """Upper bounds and counts, one after the other; the bounds do not grow, so they are there once more."""
        counts: dict[float, float] = {}
        for labels, value in selector(self._buckets).samples(snapshot):
            bound = float(labels["le"])
            counts[bound] = counts.get(bound, 0.0) + value
        return tuple(number for bound in sorted(counts) for number in (bound, counts[bound]))

    def value(self, now: Vector, increases: Increases) -> float | None:
        """The quantile, by the straight line through its bucket, as ``histogram_quantile`` does."""
        grown = increases[self.window_seconds]
        bounds, counts = now[::2], grown[1::2]
        total = counts[-1] if counts else 0.0
        if total <= 0 or total < self.at_least:
            return None
        rank = self.quantile * total
        index = next(index for index, count in enumerate(counts) if count >= rank)
        lower, before = (bounds[index - 1], counts[index - 1]) if index else (0.0, 0.0)
        if bounds[index] == float("inf"):
            # Of what is beyond every bound nothing is known but that it is at least the last one.
            return lower
        return lower + (bounds[index] - lower) * (rank - before) / (counts[index] - before)

    def expression(self) -> str:
        """``histogram_quantile``."""
        window, name = duration(self.window_seconds), self._buckets
        count = name.replace("_bucket", "_count", 1)
        enough = f" and sum(increase({count}[{window}])) >= {self.at_least:g}" if self.at_least else ""
        rate = f"sum by (le) (rate({name}[{window}]))"
        return f"histogram_quantile({self.quantile:g}, {rate}) > {self.above:g}{enough}"


class Count(Condition):
    """How often something happened."""

    kind: Literal["count"] = "count"
    """Which condition this is."""
    of: str
    """What is counted, as a selector."""
    window_seconds: float = Field(600.0, gt=0)
    """How long is looked back."""
    above: float = 0.0
    """More often than this is too often."""

    _selectors = field_validator("of")(_checked)

    @property
    def names(self) -> tuple[str, ...]:
        """The selector's name."""
        return (selector(self.of).name,)

    @property
    def windows(self) -> tuple[float, ...]:
        """The one window."""
        return (self.window_seconds,)

    @property
    def limit(self) -> float:
        """How often is too often."""
        return self.above

    def vector(self, snapshot: Snapshot) -> Vector:
        """The total."""
        return (selector(self.of).total(snapshot),)

    def value(self, now: Vector, increases: Increases) -> float | None:  # noqa: ARG002
        """How often it happened in the window."""
        return increases[self.window_seconds][0]

    def expression(self) -> str:
        """A sum of increases."""
        return f"sum(increase({self.of}[{duration(self.window_seconds)}])) > {self.above:g}"


class Level(Condition):
    """A gauge that stands too high, or too low; of several the worst counts."""

    kind: Literal["level"] = "level"
    """Which condition this is."""
    of: str
    """The gauge, as a selector."""
    above: float | None = None
    """What is too high."""
    below: float | None = None
    """What is too low."""

    _selectors = field_validator("of")(_checked)

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.above is None) == (self.below is None):
            raise ValueError("set above or below, and not both: two rules can say both")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The selector's name."""
        return (selector(self.of).name,)

    @property
    def windows(self) -> tuple[float, ...]:
        """None: a gauge is looked at as it stands."""
        return ()

    @property
    def limit(self) -> float:
        """What is too high or too low."""
        return self.above if self.above is not None else self.below or 0.0

    def vector(self, snapshot: Snapshot) -> Vector:
        """Every gauge that is meant."""
        return tuple(value for _, value in selector(self.of).samples(snapshot))

    def value(self, now: Vector, increases: Increases) -> float | None:  # noqa: ARG002
        """The worst."""
        worst: Callable[[Vector], float] = max if self.above is not None else min
        return worst(now) if now else None

    def exceeds(self, value: float, limit: float) -> bool:
        """Whether it stands too high, or too low."""
        return value > limit if self.above is not None else value < limit

    def expression(self) -> str:
        """The worst, compared."""
        return f"max({self.of}) > {self.limit:g}" if self.above is not None else f"min({self.of}) < {self.limit:g}"


def duration(seconds: float) -> str:
    """A duration as PromQL writes it: whole numbers only."""
    for unit, length in (("h", 3600), ("m", 60), ("s", 1)):
        if seconds >= length and seconds % length == 0:
            return f"{seconds / length:g}{unit}"
    return f"{round(seconds * 1000)}ms" if seconds else "0s"


def _share(of: str, to: str, window: str) -> str:
    return f"sum(rate({of}[{window}])) / sum(rate({to}[{window}]))"
