"""Where alerts go: the log, a webhook in one of three forms, or a function of the application.

A webhook that does not answer must not hold anything up. So each has an outbox of its own, which is bounded: what does
not fit is dropped, logged and told as an event. What failed for a reason that may pass is tried again, a few times.
"""

import asyncio
import inspect
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from pydantic import Field, SecretStr, field_validator, model_validator

from fastapi_hardening.core.configuration import Section
from fastapi_hardening.core.events import Events
from fastapi_hardening.observability.alerts.engine import Notification

logger = logging.getLogger("fastapi_hardening.alerts")

Sink = Callable[[Notification], Awaitable[None] | None]
"""Is given what is told; may be async. What it raises is logged."""

Post = Callable[[str, Mapping[str, str], bytes], Awaitable[int]]
"""Posts a body to an address; gives the status of the answer."""

_PAGERDUTY = "https://events.pagerduty.com/v2/enqueue"
_TOO_MANY, _TIMEOUT, _SERVER_ERROR, _REDIRECT = 429, 408, 500, 300
_LONGEST_WAIT_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class AlertUndelivered:
    """An alert did not reach where it was to go.

    Attributes:
        alert: The name of its rule.
        sink: Where it was to go, without anything secret.
        reason: Why it did not.
    """

    alert: str
    sink: str
    reason: str


class UndeliveredError(Exception):
    """A sink could not deliver; the message says why."""


class WebhookSettings(Section):
    """An address that alerts are posted to. Needs the extra ``http``."""

    url: SecretStr = SecretStr(_PAGERDUTY)
    """The address. It often has a token in it, so it is not shown."""

    format: Literal["json", "slack", "pagerduty"] = "json"
    """``json`` is the form of Alertmanager's webhooks (version 4), which many tools take; Slack's is also Mattermost's;
    PagerDuty's is its Events API v2."""

    routing_key: SecretStr | None = None
    """PagerDuty's integration key."""

    severities: tuple[Literal["page", "ticket", "info"], ...] = ("page", "ticket")
    """Which alerts go there."""

    timeout_seconds: float = Field(5.0, gt=0)
    """How long one attempt may take."""

    attempts: int = Field(4, ge=1, le=10)
    """How often it is tried; the waits in between double, from a second."""

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, url: SecretStr) -> SecretStr:
        if not url.get_secret_value().startswith(("https://", "http://")):
            raise ValueError("an address of a webhook begins with https://")
        return url

    @model_validator(mode="after")
    def _has_a_key(self) -> "WebhookSettings":
        if (self.format == "pagerduty") is not (self.routing_key is not None):
            raise ValueError("routing_key goes with format='pagerduty', and with no other")
        if self.format != "pagerduty" and "url" not in self.model_fields_set:
            raise ValueError("a webhook needs its url")
        return self


def sentence(told: Notification, service: str) -> str:
    """An alert in one line."""
    if told.status == "resolved":
        return f"[resolved] {service}: {told.rule.name} is over after {told.seconds:.0f} s. {told.rule.summary}"
    again = "still firing" if told.repeated else "firing"
    return f"[{again}] {service}: {told.rule.name} ({told.rule.severity}), at {told.value:.4g}. {told.rule.summary}"


def log(told: Notification, service: str) -> None:
    """Writes an alert to the log: a page as an error, a ticket as a warning, the end as a notice."""
    levels = {"page": logging.ERROR, "ticket": logging.WARNING, "info": logging.INFO}
    level = levels[told.rule.severity] if told.status == "firing" else logging.INFO
    extra = {"alert": told.rule.name, "alert_status": told.status, "value": told.value}
    logger.log(level, "%s", sentence(told, service), extra=extra)


def body_of(told: Notification, settings: WebhookSettings, *, service: str, now: float) -> dict[str, Any]:
    """What is posted.

    Args:
        told: What is told.
        settings: In which form.
        service: Which service tells it.
        now: Seconds since the epoch.
    """
    rule = told.rule
    # The same for every worker and every time, so that the receiver sees that it is one.
    key = f"{service}/{rule.name}"
    if settings.format == "slack":
        return {"text": sentence(told, service)}
    if settings.format == "pagerduty":
        severities = {"page": "critical", "ticket": "warning", "info": "info"}
        return {
            "routing_key": settings.routing_key.get_secret_value() if settings.routing_key else "",
            "event_action": "trigger" if told.status == "firing" else "resolve",
            "dedup_key": key,
            "payload": {
                "summary": sentence(told, service),
                "source": service,
                "severity": severities[rule.severity],
                "custom_details": {"value": told.value, "condition": rule.when.expression()},
            },
        }
    began = datetime.fromtimestamp(now, UTC) - timedelta(seconds=told.seconds)
    ended = datetime.fromtimestamp(now, UTC) if told.status == "resolved" else datetime(1, 1, 1, tzinfo=UTC)
    labels = {"alertname": rule.name, "service": service, "severity": rule.severity}
    annotations = {"summary": rule.summary, "value": f"{told.value:g}"}
    if rule.runbook_url is not None:
        annotations["runbook_url"] = rule.runbook_url
    return {
        "version": "4",
        "groupKey": key,
        "status": told.status,
        "receiver": "fastapi-hardening",
        "groupLabels": {"alertname": rule.name},
        "commonLabels": labels,
        "commonAnnotations": annotations,
        "externalURL": "",
        "alerts": [
            {
                "status": told.status,
                "labels": labels,
                "annotations": annotations,
                "startsAt": _iso(began),
                "endsAt": _iso(ended),
                "generatorURL": "",
                "fingerprint": key,
            }
        ],
    }


def _iso(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds").replace("+00:00", "Z")


class Webhook:
    """Posts alerts to an address.

    Args:
        settings: The address, and the form.
        service: Which service tells it.
        now: Seconds since the epoch.
        post: Posts; by default httpx2 does (the extra ``http``), without following redirects.
        sleep: Waits between attempts.

    Raises:
        ModuleNotFoundError: There is no ``post``, and httpx2 is not installed.
    """

    def __init__(
        self,
        settings: WebhookSettings,
        *,
        service: str,
        now: Callable[[], float],
        post: Post | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._settings = settings
        self._service = service
        self._now = now
        self._post = post or _poster(settings.timeout_seconds)
        self._sleep = sleep

    def __repr__(self) -> str:
        host = self._settings.url.get_secret_value().split("/")[2].rpartition("@")[2]
        return f"{self._settings.format} webhook at {host}"

    async def __call__(self, told: Notification) -> None:
        """Posts one, and again where that may help.

        Raises:
            UndeliveredError: It was refused, or every attempt has failed.
        """
        if told.rule.severity not in self._settings.severities:
            return
        document = body_of(told, self._settings, service=self._service, now=self._now())
        body, headers = json.dumps(document).encode(), {"Content-Type": "application/json"}
        reason = ""
        for attempt in range(self._settings.attempts):
            if attempt:
                await self._sleep(min(2.0 ** (attempt - 1), _LONGEST_WAIT_SECONDS))
            try:
                status = await self._post(self._settings.url.get_secret_value(), headers, body)
            except Exception as error:  # noqa: BLE001 - whatever the client raises; its text may show the address
                reason = type(error).__name__
                continue
            if status < _REDIRECT:
                return
            reason = f"status {status}"
            if status not in (_TIMEOUT, _TOO_MANY) and status < _SERVER_ERROR:
                break
        raise UndeliveredError(reason)


def _poster(timeout_seconds: float) -> Post:
    try:
        import httpx2  # noqa: PLC0415 - an extra
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "webhooks are posted by httpx2: pip install 'fastapi-hardening[http]'", name="httpx2"
        ) from error

    async def post(url: str, headers: Mapping[str, str], body: bytes) -> int:
        # A client for each: they are rare, and none is left open.
        async with httpx2.AsyncClient(timeout=timeout_seconds, trust_env=False) as client:
            answer = await client.post(url, headers=dict(headers), content=body)
            return answer.status_code

    return post


class Outbox:
    """What waits for one sink.

    Args:
        sink: Where it goes.
        size: How many may wait.
        events: Where :class:`AlertUndelivered` goes.
    """

    def __init__(self, sink: Sink, *, size: int = 100, events: Events | None = None) -> None:
        self._sink = sink
        self._waiting: asyncio.Queue[Notification] = asyncio.Queue(size)
        self._events = events

    def put(self, told: Notification) -> None:
        """Takes one in; where there is no room it is dropped, and that is told."""
        try:
            self._waiting.put_nowait(told)
        except asyncio.QueueFull:
            self._failed(told, "too many wait")

    async def deliver(self) -> None:
        """Hands one after the other to the sink, until it is cancelled."""
        while True:
            told = await self._waiting.get()
            try:
                waits = self._sink(told)
                if inspect.isawaitable(waits):
                    await waits
            except UndeliveredError as error:
                self._failed(told, str(error))
            except Exception as error:
                logger.exception("%r failed", self._sink)
                self._tell(told, type(error).__name__)
            finally:
                self._waiting.task_done()

    async def empty(self) -> None:
        """Waits until everything is delivered."""
        await self._waiting.join()

    def _failed(self, told: Notification, reason: str) -> None:
        logger.error("alert %s was not delivered to %r: %s", told.rule.name, self._sink, reason)
        self._tell(told, reason)

    def _tell(self, told: Notification, reason: str) -> None:
        if self._events is not None:
            self._events.emit(AlertUndelivered(told.rule.name, repr(self._sink), reason))
