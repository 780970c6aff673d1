"""Somebody is told when the service is not well: once, soon enough, and not for what flickers."""

import asyncio
import json
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from pydantic import SecretStr, ValidationError

from fastapi_hardening import Settings, harden
from fastapi_hardening.core.check import CheckResult
from fastapi_hardening.core.clock import ManualClock
from fastapi_hardening.core.events import Events
from fastapi_hardening.core.tally import Together
from fastapi_hardening.observability.alerts import (
    DEFAULT_RULES,
    AlertFired,
    AlertResolved,
    AlertRule,
    Alerts,
    AlertsSettings,
    AlertUndelivered,
    BurnRate,
    Count,
    Level,
    Notification,
    Quantile,
    Ratio,
    WebhookSettings,
    prometheus_rules,
)
from fastapi_hardening.observability.alerts.conditions import Condition
from fastapi_hardening.observability.alerts.engine import Engine
from fastapi_hardening.observability.alerts.selectors import Snapshot, read, selector
from fastapi_hardening.observability.alerts.sinks import (
    Outbox,
    Post,
    UndeliveredError,
    Webhook,
    body_of,
    log,
    sentence,
)

BOOMS = "booms_total"


def snapshot(**samples: float) -> dict[str, list[tuple[Mapping[str, str], float]]]:
    """Samples without labels."""
    return {name: [({}, value)] for name, value in samples.items()}


def rule(when: Condition, **arguments: Any) -> AlertRule:
    """A rule with this condition."""
    return AlertRule(name="Boom", summary="It went boom.", when=when, **arguments)  # type: ignore[arg-type]


def statuses(engine: Engine, steps: Sequence[tuple[float, Snapshot]]) -> list[str]:
    """What is told at each step: nothing, or the status."""
    return [" ".join(told.status for told in engine.evaluate(samples, now)) for now, samples in steps]


# --- selectors --------------------------------------------------------------------------------------------------------

SAMPLES: Snapshot = {
    "http_requests_total": [
        ({"status": "2xx", "handler": "/"}, 90.0),
        ({"status": "5xx", "handler": "/"}, 7.0),
        ({"status": "503", "handler": "/items/{id}"}, 3.0),
    ]
}


@pytest.mark.parametrize(
    ("text", "total"),
    [
        ("http_requests_total", 100),
        ("http_requests_total{}", 100),
        ('http_requests_total{status="5xx"}', 7),
        ('http_requests_total{status=~"5.."}', 10),
        ('http_requests_total{status!="2xx", handler="/"}', 7),
        ('http_requests_total{status!~"5..|4..",}', 90),
        ('http_requests_total{handler="/items/{id}"}', 3),
        ('http_requests_total{method=""}', 100),
        ("nothing_total", 0),
    ],
)
def test_a_selector_means_what_prometheus_means(text: str, total: float) -> None:
    """Labels that are not there are empty; patterns must match the whole value."""
    assert selector(text).total(SAMPLES) == total


@pytest.mark.parametrize(
    "text", ["", "9lives", "a b", 'a{b="c"', "a{b=c}", 'a{b="c" d="e"}', 'a{b=~"("}', "a{b='c'}", "sum(a)"]
)
def test_what_is_no_selector_is_refused(text: str) -> None:
    """When the settings are made, not when it is night."""
    with pytest.raises(ValidationError, match=r"selector|matchers|pattern"):
        Count(of=text)


def test_only_what_is_asked_for_is_read() -> None:
    """Of a registry, and of two that are shown as one."""
    registry = CollectorRegistry()
    counter = Counter("booms", "", ("kind",), registry=registry)
    Gauge("other", "", registry=registry).set(3)
    counter.labels("a").inc(2)
    for collector in (registry, Together(registry, CollectorRegistry())):
        assert read(collector, [BOOMS]) == {BOOMS: [({"kind": "a"}, 2.0)]}


# --- conditions -------------------------------------------------------------------------------------------------------


def fires(condition: Condition, before: Snapshot, after: Snapshot, seconds: float = 60) -> bool:
    """Whether a condition holds after what happened in so many seconds."""
    return statuses(Engine([rule(condition)]), [(0, before), (seconds, after)])[-1] == "firing"


@pytest.mark.parametrize(("bad", "total", "expected"), [(3, 20, True), (2, 20, False), (3, 19, False), (0, 0, False)])
def test_a_ratio_is_of_what_happened_in_the_window(bad: int, total: int, expected: bool) -> None:
    """And of enough of it; what happened before does not count."""
    condition = Ratio(of="bad_total", to="all_total", above=0.1, at_least=20)
    before, after = snapshot(bad_total=1000, all_total=1000), snapshot(bad_total=1000 + bad, all_total=1000 + total)
    assert fires(condition, before, after) is expected


def test_a_window_forgets_what_is_older() -> None:
    """An error of an hour ago is no error of the last five minutes."""
    engine = Engine([rule(Count(of=BOOMS, window_seconds=300), keep_firing_seconds=0)])
    steps = [(now, snapshot(booms_total=float(now >= 60))) for now in range(0, 600, 15)]
    told = statuses(engine, steps)
    assert told.index("firing") * 15 == 60
    assert told.index("resolved") * 15 in range(345, 376)


def test_a_counter_that_begins_anew_has_grown_by_what_it_is() -> None:
    """Where several processes are read together, one may be gone."""
    assert fires(Count(of=BOOMS, above=4), snapshot(booms_total=100), snapshot(booms_total=5))
    assert not fires(Count(of=BOOMS, above=5), snapshot(booms_total=100), snapshot(booms_total=5))


def histogram(*seconds: float) -> Snapshot:
    """The samples of a histogram."""
    registry = CollectorRegistry()
    made = Histogram("latency_seconds", "", buckets=(0.1, 0.5, 1.0, 5.0), registry=registry)
    for each in seconds:
        made.observe(each)
    return read(registry, ["latency_seconds_bucket"])


@pytest.mark.parametrize(
    ("seconds", "quantile", "expected"),
    [
        ([0.05] * 10, 0.5, 0.05),
        ([0.05] * 5 + [0.3] * 5, 0.75, 0.3),
        ([9.0] * 10, 0.99, 5.0),
        ([0.05] * 9, 0.5, None),
        ([], 0.5, None),
    ],
)
def test_a_quantile_lies_in_its_bucket(seconds: list[float], quantile: float, expected: float | None) -> None:
    """By the straight line, as Prometheus has it; beyond the last bound nothing more is known."""
    engine = Engine([rule(Quantile(of="latency_seconds", quantile=quantile, above=100, at_least=10))])
    engine.evaluate(histogram(), 0)
    engine.evaluate(histogram(*seconds), 60)
    assert engine.alerts["Boom"].value == (None if expected is None else pytest.approx(expected))


@given(st.lists(st.floats(0.001, 4.9), min_size=1, max_size=50), st.floats(0.01, 0.99))
@settings(max_examples=30, deadline=None)
def test_a_quantile_is_between_the_bounds_around_the_true_one(seconds: list[float], quantile: float) -> None:
    """Whatever was observed."""
    condition = Quantile(of="latency_seconds", quantile=quantile, above=100, at_least=0)
    engine = Engine([rule(condition)])
    engine.evaluate(histogram(), 0)
    engine.evaluate(histogram(*seconds), 60)
    found = engine.alerts["Boom"].value
    rank = quantile * len(seconds)
    true = sorted(seconds)[max(0, int(-(-rank // 1)) - 1)]
    bounds = [0.0, 0.1, 0.5, 1.0, 5.0]
    lower = max(bound for bound in bounds if bound < true)
    upper = min(bound for bound in bounds if bound >= true)
    assert found is not None
    assert lower <= found <= upper + 1e-9


def test_a_histogram_that_appears_later_is_counted_whole() -> None:
    """A route that nobody had called has no series before."""
    engine = Engine([rule(Quantile(of="latency_seconds", above=1, at_least=1))])
    assert engine.evaluate({}, 0) == []
    assert [told.status for told in engine.evaluate(histogram(3.0, 3.0), 15)] == ["firing"]


BURN = BurnRate(bad="bad_total", total="all_total", objective=0.99, pairs=((3600, 300, 10),), at_least=100)


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ([0.2] * 60, True),  # ten times one percent, all the time
        ([0.05] * 60, False),  # spent, but slowly
        ([0.3] * 50 + [0.0] * 10, False),  # it is over, which the short window says
        ([0.0] * 58 + [1.0] * 2, False),  # it just began, which the long one says
        ([0.0] * 50 + [1.0] * 10, True),
    ],
)
def test_a_budget_burns_when_both_windows_say_so(shares: list[float], expected: bool) -> None:
    """The long one that it matters, the short one that it goes on: an hour, by the minute."""
    engine = Engine([rule(BURN, keep_firing_seconds=0)])
    bad = total = 0.0
    engine.evaluate(snapshot(bad_total=0, all_total=0), 0)
    for minute, share in enumerate(shares, start=1):
        bad, total = bad + 100 * share, total + 100
        engine.evaluate(snapshot(bad_total=bad, all_total=total), 60 * minute)
    assert bool(engine.active) is expected


def test_a_budget_of_few_requests_does_not_burn() -> None:
    """One error of ten requests at night wakes nobody."""
    assert not fires(BURN, snapshot(), snapshot(bad_total=10, all_total=99))
    assert fires(BURN, snapshot(), snapshot(bad_total=11, all_total=100))


def test_the_memory_of_a_window_is_bounded() -> None:
    """Three days by the second are kept in sixty steps."""
    engine = Engine([rule(Count(of=BOOMS, window_seconds=259_200, above=1e9))])
    for now in range(0, 1_000_000, 100):
        engine.evaluate(snapshot(booms_total=now), now)
    (window,) = engine._windows["Boom"].values()
    assert len(window._kept) <= 62
    assert engine.alerts["Boom"].value == pytest.approx(259_200, rel=0.03)


@pytest.mark.parametrize(
    ("condition", "samples", "expected"),
    [
        (Level(of="up", below=1), [({"h": "a"}, 1.0), ({"h": "b"}, 0.0)], True),
        (Level(of="up", below=1), [({"h": "a"}, 1.0)], False),
        (Level(of="up", below=1), [], False),
        (Level(of="up", above=0.5), [({"h": "a"}, 0.0), ({"h": "b"}, 1.0)], True),
        (Level(of='up{h="a"}', above=0.5), [({"h": "a"}, 0.0), ({"h": "b"}, 1.0)], False),
    ],
)
def test_of_several_gauges_the_worst_counts(
    condition: Level, samples: list[tuple[dict[str, str], float]], expected: bool
) -> None:
    """And of none, nothing is known."""
    assert fires(condition, {}, {"up": samples}) is expected  # type: ignore[dict-item]


def test_a_level_is_too_high_or_too_low() -> None:
    """One rule says one thing."""
    for arguments in ({}, {"above": 1.0, "below": 0.0}):
        with pytest.raises(ValidationError, match="above or below"):
            Level.model_validate({"of": "up"} | arguments)
    with pytest.raises(ValidationError, match="no name of an alert"):
        AlertRule(name="too high", summary="", when=Count(of=BOOMS))


# --- how an alert goes ------------------------------------------------------------------------------------------------


def levels(*values: float, step: float = 60, **arguments: Any) -> list[str]:
    """What is told of a gauge with these values, one a minute; above 10 is too high."""
    engine = Engine([rule(Level(of="load", above=10), **arguments)], repeat_seconds=600)
    return statuses(engine, [(number * step, snapshot(load=value)) for number, value in enumerate(values)])


def test_a_condition_must_hold_for_its_time() -> None:
    """A peak is no alert, and a new one begins anew."""
    assert levels(20, 20, 5, 20, 20, 20, for_seconds=120) == ["", "", "", "", "", "firing"]


def test_what_flickers_is_told_once() -> None:
    """It is over only when it has not held for a while."""
    values = (20, 5, 20, 5, 5, 5, 5)
    assert levels(*values, keep_firing_seconds=180) == ["firing", "", "", "", "", "resolved", ""]


def test_while_it_fires_the_limit_is_lower() -> None:
    """So that a value on the edge is told once."""
    values = (11, 9, 11, 8.5, 7, 7)
    assert levels(*values, clear_at=8, keep_firing_seconds=0) == ["firing", "", "", "", "resolved", ""]


def test_it_is_told_again_after_a_while() -> None:
    """Somebody may have overlooked it; not every minute, though."""
    engine = Engine([rule(Level(of="load", above=10))], repeat_seconds=600)
    told = [(now, engine.evaluate(snapshot(load=20), now)) for now in range(0, 1500, 60)]
    assert [(now, each[0].repeated) for now, each in told if each] == [(0, False), (600, True), (1200, True)]


def test_a_silenced_alert_is_not_told_until_the_silence_ends() -> None:
    """It fires all the same, and nobody hears of an end that had no beginning."""
    engine = Engine([rule(Level(of="load", above=10), keep_firing_seconds=0)])
    engine.silences["Boom"] = 120
    steps = [(now, snapshot(load=20.0 if now < 180 else 1.0)) for now in (0, 60, 120, 180)]
    assert statuses(engine, steps) == ["", "", "firing", "resolved"]
    engine.silences["Boom"] = 1000
    assert statuses(engine, [(240, snapshot(load=20)), (300, snapshot(load=1))]) == ["", ""]


@given(st.lists(st.tuples(st.floats(1, 600), st.floats(0, 20)), max_size=40), st.sampled_from([0.0, 90.0]))
@settings(max_examples=60, deadline=None)
def test_every_end_has_a_beginning(steps: list[tuple[float, float]], wait: float) -> None:
    """Whatever the values do: firing and resolved take turns, apart from what is told again."""
    engine = Engine([rule(Level(of="load", above=10), for_seconds=wait, keep_firing_seconds=wait, clear_at=8)])
    now, fresh = 0.0, []
    for seconds, value in steps:
        now += seconds
        fresh += [told.status for told in engine.evaluate(snapshot(load=value), now) if not told.repeated]
    assert fresh == ["firing", "resolved"] * (len(fresh) // 2) + ["firing"] * (len(fresh) % 2)


# --- settings ---------------------------------------------------------------------------------------------------------


def test_names_are_unique_and_silences_are_of_rules() -> None:
    """A misspelt silence would page; a name that two have would hide one."""
    one = rule(Count(of=BOOMS))
    with pytest.raises(ValidationError, match="two rules are called 'Boom'"):
        AlertsSettings(rules=(one, one))
    with pytest.raises(ValidationError, match="did you mean 'HighLatency'"):
        AlertsSettings(silenced=("HighLatenzy",))


def test_rules_and_webhooks_can_be_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """As JSON; the address, which is a secret, is not shown."""
    monkeypatch.setenv(
        "HARDENING_ALERTS__RULES",
        '[{"name": "Boom", "summary": "x", "when": {"kind": "count", "of": "booms_total", "above": 3}}]',
    )
    monkeypatch.setenv("HARDENING_ALERTS__WEBHOOKS", '[{"url": "https://hooks.example/T0K3N", "format": "slack"}]')
    found = Settings().alerts
    assert found.rules[0].when == Count(of=BOOMS, above=3)
    assert found.webhooks[0].url.get_secret_value() == "https://hooks.example/T0K3N"
    assert "T0K3N" not in str(Settings().describe())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"format": "json"}, "needs its url"),
        ({"url": "hooks.example"}, "begins with https://"),
        ({"format": "pagerduty"}, "routing_key goes with"),
        ({"url": "https://hooks.example", "routing_key": "x"}, "routing_key goes with"),
    ],
)
def test_a_webhook_that_cannot_work_is_refused(arguments: dict[str, Any], says: str) -> None:
    """With what is missing."""
    with pytest.raises(ValidationError, match=says):
        WebhookSettings(**arguments)


# --- Prometheus -------------------------------------------------------------------------------------------------------


def test_default_rules_are_these() -> None:
    """As Prometheus is given them; `promtool check rules` accepts the file."""
    written = prometheus_rules(DEFAULT_RULES)
    expressions = [json.loads(line.partition(": ")[2]) for line in written.splitlines() if line.strip()[:5] == "expr:"]
    assert expressions[1:] == [
        (
            "histogram_quantile(0.99, sum by (le) (rate(http_request_duration_highr_seconds_bucket[5m]))) > 1"
            " and sum(increase(http_request_duration_highr_seconds_count[5m])) >= 100"
        ),
        (
            'sum(rate(hardening_refusals_total{problem=~"quota-exceeded|temporary-reduced-capacity"}[5m]))'
            " / sum(rate(http_requests_total[5m])) > 0.2 and sum(increase(http_requests_total[5m])) >= 100"
        ),
        'sum(increase(hardening_events_total{event="CircuitOpened"}[10m])) > 0',
        "max(hardening_health_check_status) > 1",
        "min(hardening_state_store_up) < 1",
        "sum(increase(hardening_attacks_total[10m])) > 100",
    ]
    assert expressions[0].startswith(
        '(sum(rate(http_requests_total{status=~"5.."}[1h])) / sum(rate(http_requests_total[1h])'
    )
    assert ") or (" in expressions[0]
    assert "> 0.0144 and" in expressions[0]


def test_a_runbook_and_odd_durations_are_written() -> None:
    """Prometheus takes whole numbers only."""
    one = rule(Ratio(of="a", to="b", above=1, at_least=0), for_seconds=1.5, runbook_url="https://wiki.example/boom")
    written = prometheus_rules([one], group="shop")
    assert 'for: "1500ms"' in written
    assert '"runbook_url": "https://wiki.example/boom"' in written
    assert 'expr: "sum(rate(a[5m])) / sum(rate(b[5m])) > 1"' in written
    bare = BurnRate(bad="a", total="b", pairs=((60, 1, 2),), at_least=0).expression()
    assert bare == "(sum(rate(a[1m])) / sum(rate(b[1m])) > 0.002 and sum(rate(a[1s])) / sum(rate(b[1s])) > 0.002)"
    quantile = Quantile(of='a{h="b"}', above=1, at_least=0).expression()
    assert quantile == 'histogram_quantile(0.99, sum by (le) (rate(a_bucket{h="b"}[5m]))) > 1'


def test_default_rules_read_what_there_is() -> None:
    """A name that is misspelt would never fire."""
    app = FastAPI()
    handle = harden(app)
    TestClient(app).get("/nothing")
    known = {name for metric in handle.metrics.registry.collect() for name in (metric.name, metric.name + "_total")}
    known |= {f"{name}_bucket" for name in known} | {"hardening_state_store_up"}
    assert Engine(DEFAULT_RULES).names <= known


# --- sinks ------------------------------------------------------------------------------------------------------------

FIRING = Notification(rule(Count(of=BOOMS), severity="page", runbook_url="https://wiki.example"), "firing", 3.0, 60.0)
RESOLVED = Notification(FIRING.rule, "resolved", 3.0, 600.0)


def test_an_alert_is_one_sentence() -> None:
    """Who, what, how bad, for how long."""
    again = Notification(FIRING.rule, "firing", 3.0, 60.0, repeated=True)
    assert sentence(FIRING, "shop") == "[firing] shop: Boom (page), at 3. It went boom."
    assert sentence(again, "shop").startswith("[still firing] shop")
    assert sentence(RESOLVED, "shop") == "[resolved] shop: Boom is over after 600 s. It went boom."


def test_the_log_has_a_level_for_each_severity(caplog: pytest.LogCaptureFixture) -> None:
    """A page is an error, an end is a notice."""
    with caplog.at_level(logging.INFO, "fastapi_hardening.alerts"):
        log(FIRING, "shop")
        log(RESOLVED, "shop")
    assert [(record.levelname, vars(record)["alert"]) for record in caplog.records] == [
        ("ERROR", "Boom"),
        ("INFO", "Boom"),
    ]


def test_the_json_is_alertmanagers() -> None:
    """Version 4, which many tools take."""
    url = SecretStr("https://hooks.example")
    firing = body_of(FIRING, WebhookSettings(url=url), service="shop", now=1_700_000_060)
    resolved = body_of(RESOLVED, WebhookSettings(url=url), service="shop", now=1_700_000_600)
    (one,), (other,) = firing["alerts"], resolved["alerts"]
    assert (firing["version"], firing["status"], resolved["status"]) == ("4", "firing", "resolved")
    assert one["labels"] == {"alertname": "Boom", "service": "shop", "severity": "page"}
    assert (one["startsAt"], one["endsAt"]) == ("2023-11-14T22:13:20Z", "0001-01-01T00:00:00Z")
    assert (other["startsAt"], other["endsAt"]) == ("2023-11-14T22:13:20Z", "2023-11-14T22:23:20Z")
    assert one["fingerprint"] == other["fingerprint"]
    assert one["annotations"]["runbook_url"] == "https://wiki.example"


def test_slack_and_pagerduty_have_their_own() -> None:
    """PagerDuty knows by the key what belongs together."""
    slack = WebhookSettings(url=SecretStr("https://hooks.example"), format="slack")
    assert body_of(FIRING, slack, service="shop", now=0) == {"text": sentence(FIRING, "shop")}
    duty = WebhookSettings(format="pagerduty", routing_key=SecretStr("R0UT3"))
    firing, resolved = (body_of(told, duty, service="shop", now=0) for told in (FIRING, RESOLVED))
    assert (firing["event_action"], resolved["event_action"]) == ("trigger", "resolve")
    assert firing["dedup_key"] == resolved["dedup_key"] == "shop/Boom"
    assert (firing["routing_key"], firing["payload"]["severity"]) == ("R0UT3", "critical")
    bare = Notification(rule(Count(of=BOOMS)), "firing", 1, 0)
    assert "runbook_url" not in body_of(bare, WebhookSettings(url=slack.url), service="s", now=9)["commonAnnotations"]


class Hook:
    """Answers as it is told, and keeps what was posted and how long was waited."""

    def __init__(self, *answers: int | Exception) -> None:
        self.answers = list(answers)
        self.posted: list[dict[str, Any]] = []
        self.waited: list[float] = []

    async def post(self, _url: str, _headers: Mapping[str, str], body: bytes) -> int:
        self.posted.append(json.loads(body))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def sleep(self, seconds: float) -> None:
        self.waited.append(seconds)

    def webhook(self, **arguments: Any) -> Webhook:
        """Gives a webhook that posts here."""
        made = WebhookSettings(url=SecretStr("https://user:secret@hooks.example/T0K3N"), **arguments)
        post: Post = self.post
        return Webhook(made, service="shop", now=lambda: 1e9, post=post, sleep=self.sleep)


@pytest.mark.parametrize(
    ("answers", "waited", "reason"),
    [
        ([200], [], None),
        ([503, OSError("refused"), 202], [1, 2], None),
        ([429, 408, 500, 204], [1, 2, 4], None),
        ([404], [], "status 404"),
        ([302], [], "status 302"),
        ([500] * 4, [1, 2, 4], "status 500"),
        ([OSError("https://hooks.example/T0K3N")] * 4, [1, 2, 4], "OSError"),
    ],
)
def test_a_webhook_is_tried_again_where_that_may_help(
    answers: list[int | Exception], waited: list[float], reason: str | None
) -> None:
    """A few times, with growing waits; what is refused for good is not."""
    hook = Hook(*answers)
    if reason is None:
        asyncio.run(hook.webhook()(FIRING))
    else:
        with pytest.raises(UndeliveredError, match=f"^{reason}$"):
            asyncio.run(hook.webhook()(FIRING))
    assert hook.waited == waited
    assert hook.answers == []


def test_a_webhook_takes_its_severities_only() -> None:
    """What is for the record goes nowhere by itself."""
    hook = Hook()
    asyncio.run(hook.webhook(severities=("ticket",))(FIRING))
    assert hook.posted == []


def test_a_webhook_does_not_show_its_address() -> None:
    """The path is often the credential."""
    assert repr(Hook().webhook()) == "json webhook at hooks.example"


async def delivered(outbox: Outbox, *told: Notification) -> None:
    """Puts these in, and waits until each was handed over."""
    for each in told:
        outbox.put(each)
    task = asyncio.create_task(outbox.deliver())
    await outbox.empty()
    task.cancel()


def test_what_a_sink_raises_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """The next alert is delivered all the same, and the event bus hears of what was not."""
    events, got = Events(), []
    undelivered: list[AlertUndelivered] = []
    events.subscribe(AlertUndelivered, undelivered.append)

    def sink(told: Notification) -> None:
        got.append(told.status)
        if told.status == "firing":
            raise RuntimeError("no")

    async def refusing(_told: Notification) -> None:
        raise UndeliveredError("status 404")

    asyncio.run(delivered(Outbox(sink, events=events), FIRING, RESOLVED))
    asyncio.run(delivered(Outbox(refusing, events=events), FIRING))
    asyncio.run(delivered(Outbox(refusing), FIRING))
    assert got == ["firing", "resolved"]
    assert [each.reason for each in undelivered] == ["RuntimeError", "status 404"]
    assert "was not delivered" in caplog.text


def test_an_outbox_is_bounded() -> None:
    """What does not fit is dropped, and told."""
    events = Events()

    async def fill() -> None:
        outbox = Outbox(lambda _told: None, size=2, events=events)
        for _ in range(5):
            outbox.put(FIRING)

    asyncio.run(fill())
    assert events.count(AlertUndelivered) == 3


# --- together ---------------------------------------------------------------------------------------------------------


class Machine:
    """An application's counter, its alerts, and a clock; the task goes on when it is told to."""

    def __init__(self, **arguments: Any) -> None:
        self.registry = CollectorRegistry()
        self.booms = Counter("booms", "", registry=self.registry)
        self.clock = ManualClock()
        self.events = Events()
        self.told: list[str] = []
        self.turn = asyncio.Event()
        self.done = asyncio.Event()
        made = AlertsSettings(rules=(rule(Count(of=BOOMS), keep_firing_seconds=0),), log=False, **arguments)
        self.alerts = Alerts(
            made, source=lambda: self.registry, events=self.events, clock=self.clock, sleep=self._sleep
        )
        self.alerts.sinks.append(lambda told: self.told.append(told.status))

    async def _sleep(self, seconds: float) -> None:
        self.done.set()
        await self.turn.wait()
        self.turn.clear()
        self.clock.advance(seconds)

    async def next(self) -> None:
        """Goes on to the next look."""
        self.done.clear()
        self.turn.set()
        await self.done.wait()


def test_the_task_looks_tells_and_ends() -> None:
    """What waits when the application ends is delivered before."""

    async def live() -> list[str]:
        machine = Machine()
        async with machine.alerts.running():
            await machine.done.wait()
            machine.booms.inc()
            await machine.next()
            assert [alert.rule.name for alert in machine.alerts.active] == ["Boom"]
            machine.clock.advance(10_000)
            await machine.next()
        counts = [machine.events.count(kind) for kind in (AlertFired, AlertResolved)]
        assert counts == [1, 1]
        return machine.told

    assert asyncio.run(live()) == ["firing", "resolved"]


def test_health_checks_run_though_no_probe_asks() -> None:
    """Where a rule reads what they say, and not at the first look: a process that starts has other things to do."""

    async def looks(of: str) -> list[int]:
        asked: list[int] = []

        async def report() -> None:
            asked.append(1)

        machine = Machine()
        Gauge(of, "", registry=machine.registry).set(2)
        alerts = Alerts(
            AlertsSettings(rules=(rule(Level(of=of, above=1)),), log=False),
            source=lambda: machine.registry,
            prepare=report,
            sleep=machine._sleep,
        )
        async with alerts.running():
            await machine.done.wait()
            assert asked == []
            await machine.next()
            return list(asked)

    assert asyncio.run(looks("hardening_health_check_status")) == [1]
    assert asyncio.run(looks("load")) == []


def test_a_look_that_fails_is_not_the_last(caplog: pytest.LogCaptureFixture) -> None:
    """A collector of the application may raise."""

    async def live() -> list[str]:
        machine = Machine()
        good, broken = machine.registry, [True]

        def source() -> CollectorRegistry:
            if broken[0]:
                raise RuntimeError("no")
            return good

        machine.alerts._source = source
        async with machine.alerts.running():
            await machine.done.wait()
            broken[0] = False
            await machine.next()
            machine.booms.inc()
            await machine.next()
        return machine.told

    assert asyncio.run(live()) == ["firing"]
    assert "could not be looked at" in caplog.text


def test_a_sink_that_hangs_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor the other sinks."""
    monkeypatch.setattr("fastapi_hardening.observability.alerts._LAST_DELIVERIES_SECONDS", 0.01)

    async def live() -> list[str]:
        machine = Machine()

        async def hanging(_told: Notification) -> None:
            await asyncio.Event().wait()

        machine.alerts.sinks.insert(0, hanging)
        async with machine.alerts.running():
            await machine.done.wait()
            machine.booms.inc()
            await machine.next()
        return machine.told

    assert asyncio.run(live()) == ["firing"]


def test_a_rule_is_silenced_for_a_while() -> None:
    """By its name, or for good by the settings."""
    registry = CollectorRegistry()
    gauge, clock = Gauge("load", "", registry=registry), ManualClock()
    made = AlertsSettings(rules=(rule(Level(of="load", above=1)),))
    alerts = Alerts(made, source=lambda: registry, clock=clock)
    gauge.set(9)
    alerts.silence("Boom", 60)
    assert alerts.evaluate() == []
    assert len(alerts.active) == 1
    clock.advance(61)
    assert [told.status for told in alerts.evaluate()] == ["firing"]
    with pytest.raises(ValueError, match="did you mean 'Boom'"):
        alerts.silence("Bom", 60)
    always = Alerts(AlertsSettings(rules=made.rules, silenced=("Boom",)), source=lambda: registry, clock=clock)
    assert always.evaluate() == []


@pytest.mark.parametrize("arguments", [{"enabled": False}, {"rules": ()}])
def test_switched_off_nothing_runs(arguments: dict[str, Any]) -> None:
    """No task, no sink."""

    async def tasks() -> int:
        alerts = Alerts(AlertsSettings(**arguments), source=CollectorRegistry)
        async with alerts.running():
            return len(asyncio.all_tasks())

    assert asyncio.run(tasks()) == 1


class Receiver(HTTPServer):
    """Takes what is posted to a webhook."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), self.Handler)
        self.arrived = threading.Event()
        self.bodies: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        """Keeps the body."""

        def do_POST(self) -> None:
            assert isinstance(self.server, Receiver)
            self.server.bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()
            self.server.arrived.set()

        def log_message(self, *_arguments: Any) -> None:
            """Say nothing."""


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """Give a server that takes webhooks."""
    with Receiver() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_hardened_application_tells_of_a_check_that_fails(receiver: Receiver) -> None:
    """From the check over the metrics and the rule to somebody's webhook."""
    app = FastAPI(title="Shop")
    failing = AlertRule(
        name="CheckFails", summary="A check fails.", when=Level(of="hardening_health_check_status", above=1)
    )
    url = f"http://127.0.0.1:{receiver.server_port}/hook"
    handle = harden(
        app,
        Settings(
            health={"failure_threshold": 1},
            alerts={"rules": [failing], "interval_seconds": 0.01, "webhooks": [{"url": url}]},
        ),
    )
    handle.checks.add("database", lambda: CheckResult("fail"))
    with TestClient(app) as client:
        assert client.get("/readyz").status_code == 503
        assert receiver.arrived.wait(10)
    labels = receiver.bodies[0]["alerts"][0]["labels"]
    assert labels == {"alertname": "CheckFails", "service": "Shop", "severity": "ticket"}


def test_a_webhook_without_its_extra_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    """When harden() is called, and not when it is night."""
    monkeypatch.setitem(__import__("sys").modules, "httpx2", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fastapi-hardening\[http\]'"):
        harden(FastAPI(), Settings(alerts={"webhooks": [{"url": "https://hooks.example"}]}))
