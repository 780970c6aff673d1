"""What is worth an alert, as data. One list of rules serves both: the process itself, and a Prometheus that sees all.

Example:
    >>> rule = AlertRule(
    ...     name="ManyLogins",
    ...     summary="Somebody tries passwords.",
    ...     when=Count(of='hardening_events_total{event="LoginFailed"}', window_seconds=300, above=50),
    ... )
    >>> rule.when.expression()
    'sum(increase(hardening_events_total{event="LoginFailed"}[5m])) > 50'
"""

import json
import re
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field, field_validator

from fastapi_hardening.core.configuration import Section
from fastapi_hardening.observability.alerts.conditions import BurnRate, Count, Level, Quantile, Ratio, duration

Severity = Literal["page", "ticket", "info"]

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


class AlertRule(Section):
    """When somebody is told, and what."""

    name: str
    """What the alert is called, such as ``HighLatency``."""
    summary: str
    """One sentence for whoever is woken up."""
    when: Annotated[Ratio | BurnRate | Quantile | Count | Level, Field(discriminator="kind")]
    """The condition."""
    severity: Severity = "ticket"
    """``page`` wakes somebody up, ``ticket`` waits for the morning, ``info`` is for the record."""
    for_seconds: float = Field(0.0, ge=0)
    """How long the condition must hold before anybody is told."""
    keep_firing_seconds: float = Field(300.0, ge=0)
    """How long it must not hold before it is over, so that what flickers is told once."""
    clear_at: float | None = None
    """While it fires, this is the limit instead: lower than the one that starts it, so that the edge is told once."""
    runbook_url: str | None = None
    """Where it says what to do."""

    @field_validator("name")
    @classmethod
    def _is_a_name(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name of an alert: letters, digits and underscores, as in HighLatency")
        return name

    def __str__(self) -> str:
        return self.name


DEFAULT_RULES: tuple[AlertRule, ...] = (
    AlertRule(
        name="ErrorBudgetBurns",
        summary="Server errors spend the error budget of 99.9 % so fast that it will not last.",
        when=BurnRate(bad='http_requests_total{status=~"5.."}', total="http_requests_total"),
        severity="page",
    ),
    AlertRule(
        name="HighLatency",
        summary="One request in a hundred takes longer than a second.",
        when=Quantile(of="http_request_duration_highr_seconds", above=1.0),
        for_seconds=300.0,
        clear_at=0.8,
    ),
    AlertRule(
        name="ManyRefused",
        summary="One request in five is refused by a limit or under load.",
        when=Ratio(
            of='hardening_refusals_total{problem=~"quota-exceeded|temporary-reduced-capacity"}',
            to="http_requests_total",
            above=0.2,
            at_least=100.0,
        ),
        for_seconds=300.0,
        clear_at=0.15,
    ),
    AlertRule(
        name="CircuitOpened",
        summary="Calls to another service fail, and are no longer made.",
        when=Count(of='hardening_events_total{event="CircuitOpened"}'),
    ),
    AlertRule(
        name="CheckFails",
        summary="A health check fails.",
        when=Level(of="hardening_health_check_status", above=1.0),
        severity="page",
        for_seconds=60.0,
    ),
    AlertRule(
        name="StateStoreGone",
        summary="The shared store does not answer; every worker counts for itself.",
        when=Level(of="hardening_state_store_up", below=1.0),
        for_seconds=60.0,
    ),
    AlertRule(
        name="UnderAttack",
        summary="The validator finds attack upon attack.",
        when=Count(of="hardening_attacks_total", above=100.0),
        severity="info",
    ),
)
"""What is watched unless the settings name other rules."""


def prometheus_rules(rules: Iterable[AlertRule], *, group: str = "fastapi-hardening") -> str:
    """The same rules as a rule file of Prometheus, in YAML: one place that sees every worker and every host.

    Example:
        >>> print(prometheus_rules([DEFAULT_RULES[5]]))
        groups:
          - name: "fastapi-hardening"
            rules:
              - alert: "StateStoreGone"
                expr: "min(hardening_state_store_up) < 1"
                for: "1m"
                keep_firing_for: "5m"
                labels: {"severity": "ticket"}
                annotations: {"summary": "The shared store does not answer; every worker counts for itself."}
        <BLANKLINE>
    """
    lines = ["groups:", f"  - name: {json.dumps(group)}", "    rules:"]
    for rule in rules:
        annotations = {"summary": rule.summary}
        if rule.runbook_url is not None:
            annotations["runbook_url"] = rule.runbook_url
        lines += [
            f"      - alert: {json.dumps(rule.name)}",
            f"        expr: {json.dumps(rule.when.expression())}",
            f'        for: "{duration(rule.for_seconds)}"',
            f'        keep_firing_for: "{duration(rule.keep_firing_seconds)}"',
            f"        labels: {json.dumps({'severity': rule.severity})}",
            f"        annotations: {json.dumps(annotations)}",
        ]
    return "\n".join([*lines, ""])
