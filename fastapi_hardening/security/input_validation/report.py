"""What the validator has seen, route by route: whether refusing would have hurt anybody.

It is what somebody reads before turning ``report`` into ``enforce``: a route that was inspected often and has no
findings is clean; one with findings says of which class, and where they were.
"""

from collections import Counter
from dataclasses import dataclass

_MOST_PLACES = 200


@dataclass(frozen=True, slots=True)
class RouteReport:
    """What was seen on a route.

    Attributes:
        template: The path template, or ``None`` for paths without a route.
        inspected: How many requests and messages were looked at.
        found: How many of them had a finding.
        refused: How many of them were refused.
        not_inspected: How many bodies were too large, or in a coding that could not be undone.
        kinds: How often each class was found.
        places: How often each finding was found in each place, as ``sql.quoted-tautology at /body/q``.
    """

    template: str | None
    inspected: int
    found: int
    refused: int
    not_inspected: int
    kinds: dict[str, int]
    places: dict[str, int]

    @property
    def clean(self) -> bool:
        """Whether ``enforce`` would have refused nothing that was seen."""
        return self.inspected > 0 and not self.found


class _Seen:
    __slots__ = ("found", "inspected", "kinds", "not_inspected", "places", "refused")

    def __init__(self) -> None:
        self.inspected = self.found = self.refused = self.not_inspected = 0
        self.kinds: Counter[str] = Counter()
        self.places: Counter[str] = Counter()


class ValidationReport:
    """Counts, by route. As many entries as the application has routes; within each the places are bounded."""

    def __init__(self) -> None:
        self._seen: dict[str | None, _Seen] = {}

    def of(self, template: str | None) -> _Seen:
        """The counts of a route, made at its first request."""
        seen = self._seen.get(template)
        if seen is None:
            seen = self._seen[template] = _Seen()
        return seen

    def count(self, template: str | None, findings: list[tuple[str, str]], *, refused: bool) -> None:
        """Counts what was found in one request: pairs of a finding's name and its pointer."""
        seen = self.of(template)
        seen.found += 1
        seen.refused += refused
        seen.kinds.update({finding.partition(".")[0] for finding, _ in findings})
        for finding, pointer in findings:
            place = f"{finding} at {pointer}"
            if place in seen.places or len(seen.places) < _MOST_PLACES:
                seen.places[place] += 1

    def routes(self) -> tuple[RouteReport, ...]:
        """A report for each route that was asked for, those with the most findings first."""
        reports = [
            RouteReport(
                template,
                seen.inspected,
                seen.found,
                seen.refused,
                seen.not_inspected,
                dict(seen.kinds),
                dict(seen.places),
            )
            for template, seen in list(self._seen.items())
        ]
        return tuple(sorted(reports, key=lambda report: -report.found))
