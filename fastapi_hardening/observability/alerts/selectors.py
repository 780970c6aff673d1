"""Which samples of which series a rule reads, written as PromQL writes it.

Example:
    >>> errors = selector('http_requests_total{status=~"5.."}')
    >>> errors.total({"http_requests_total": [({"status": "2xx"}, 90.0), ({"status": "5xx"}, 10.0)]})
    10.0
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import NamedTuple

from prometheus_client.registry import Collector, CollectorRegistry

Labels = Mapping[str, str]
Snapshot = Mapping[str, list[tuple[Labels, float]]]
"""Samples by their name, each with its labels and its value."""

_SELECTOR = re.compile(r"(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(?P<matchers>.*)\})?")
_MATCHER = re.compile(r'\s*([a-zA-Z_][a-zA-Z0-9_]*)\s*(=~|!~|!=|=)\s*("(?:[^"\\]|\\.)*")\s*(?:,|$)')


class Selector(NamedTuple):
    """Which samples are meant.

    Attributes:
        name: The name of the samples, ``_total`` and ``_bucket`` included.
        matchers: Functions of the labels, all of which must hold.
    """

    name: str
    matchers: tuple[Callable[[Labels], bool], ...]

    def samples(self, snapshot: Snapshot) -> Iterator[tuple[Labels, float]]:
        """The samples that are meant."""
        for labels, value in snapshot.get(self.name, ()):
            if all(matches(labels) for matches in self.matchers):
                yield labels, value

    def total(self, snapshot: Snapshot) -> float:
        """Their sum; 0 where there are none yet."""
        return sum(value for _, value in self.samples(snapshot))


@lru_cache(maxsize=256)
def selector(text: str) -> Selector:
    """Reads ``name{label="value", other=~"pattern"}``, as PromQL writes it.

    Raises:
        ValueError: It is not written like that.
    """
    whole = _SELECTOR.fullmatch(text.strip())
    if whole is None:
        raise ValueError(f'{text!r} is no selector; one looks like http_requests_total{{status=~"5.."}}')
    matchers: list[Callable[[Labels], bool]] = []
    rest = whole["matchers"] or ""
    while rest.strip():
        one = _MATCHER.match(rest)
        if one is None:
            raise ValueError(f'{text!r}: {rest.strip()!r} is no list of matchers, such as status="5xx"')
        matchers.append(_matcher(one[1], one[2], json.loads(one[3])))
        rest = rest[one.end() :]
    return Selector(whole["name"], tuple(matchers))


def _matcher(label: str, operator: str, value: str) -> Callable[[Labels], bool]:
    wanted = operator.startswith("=")
    if operator in ("=", "!="):
        return lambda labels: (labels.get(label, "") == value) is wanted
    try:
        pattern = re.compile(value)
    except re.error as error:
        raise ValueError(f"{value!r} is no pattern: {error}") from None
    return lambda labels: (pattern.fullmatch(labels.get(label, "")) is not None) is wanted


def read(collector: Collector, names: Iterable[str]) -> dict[str, list[tuple[Labels, float]]]:
    """The samples of these names as they are now."""
    wanted = set(names)
    if isinstance(collector, CollectorRegistry):
        collector = collector.restricted_registry(wanted)
    found: dict[str, list[tuple[Labels, float]]] = {}
    for metric in collector.collect():
        for sample in metric.samples:
            if sample.name in wanted:
                found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found
