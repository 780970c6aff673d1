"""Features that can be off: who switches them, what is given instead, and how they come back."""

import asyncio
from typing import Annotated, Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from fastapi_hardening import CheckResult, Feature, Hardening, Settings, harden
from fastapi_hardening.core.clock import ManualClock
from fastapi_hardening.core.events import Events, RequestRefused
from fastapi_hardening.core.features import FeatureDegraded, FeatureRestored, Features, FeatureStatus
from fastapi_hardening.core.load import Load
from fastapi_hardening.core.store import MemoryStore, StoreUnavailable

# --- engine -----------------------------------------------------------------------------------------------------------


def test_a_feature_is_off_from_its_level_of_load_on() -> None:
    """Those of level 1 first; one without a level never."""
    load = Load()
    features = Features(load=load)
    for name, level in (("first", 1), ("second", 2), ("last", 3), ("never", None)):
        features.add(name, level=level)  # type: ignore[arg-type]
    seen = []
    for each in (0, 1, 2, 3):
        load.tell(each)
        seen.append([status.name for status in features if not status.on])
    assert seen == [[], ["first"], ["first", "second"], ["first", "last", "second"]]
    assert features.reason("last") == "the process is drowning"


def test_features_come_back_a_level_at_a_time() -> None:
    """Only after the load has been lower for a while, or they would flicker."""
    load, clock = Load(), ManualClock()
    features = Features(load=load, clock=clock, recovery_seconds=10)
    for name, level in (("first", 1), ("second", 2)):
        features.add(name, level=level)  # type: ignore[arg-type]
    load.tell(2)
    assert not features.is_on("second")
    load.tell(0)
    clock.advance(9)
    assert not features.is_on("second")
    clock.advance(1)
    assert (features.is_on("first"), features.is_on("second")) == (False, True)
    clock.advance(10)
    assert features.is_on("first")
    load.tell(1)
    assert not features.is_on("first")


def test_by_hand_has_the_first_word_and_the_reason_is_kept() -> None:
    """What the settings switch off can be switched on by hand."""
    features = Features(off=["export"])
    features.add("export")
    features.add("search")
    features.switch_off("search", "the index is being built")
    assert list(features) == [
        FeatureStatus("export", False, "off by the settings"),
        FeatureStatus("search", False, "the index is being built"),
    ]
    features.switch_on("export")
    features.switch_on("search")
    assert all(status.on for status in features)
    assert features.is_on("nobody has heard of it")


def test_a_failing_check_switches_its_features_off() -> None:
    """A warning does not."""
    features = Features()
    features.add("similar", check="recommender")
    for status, on in (("fail", False), ("warn", True), ("fail", False), ("pass", True)):
        features.learn("recommender", status)  # type: ignore[arg-type]
        assert features.is_on("similar") is on
    features.learn("another", "fail")
    assert features.is_on("similar")


def test_every_change_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """To the log and as an event, with its reason."""
    events, heard = Events(), list[object]()
    events.subscribe(object, heard.append)
    features = Features(events=events)
    features.add("search")
    features.switch_off("search", "broken")
    assert not features.is_on("search")
    features.switch_on("search")
    assert features.is_on("search")
    assert heard == [FeatureDegraded("search", "broken"), FeatureRestored("search")]
    assert "the feature search is off: broken" in caplog.text


def test_a_feature_has_one_declaration() -> None:
    """A second one that says something else is a mistake; the same again is none."""
    features = Features()
    features.add("search", level=1)
    features.add("search", level=1)
    with pytest.raises(ValueError, match="declared twice"):
        features.add("search", level=2)


def test_workers_tell_each_other_what_was_switched_by_hand() -> None:
    """The last word counts, whoever has said it."""

    async def run() -> None:
        store, clock = MemoryStore(), ManualClock()
        first, second = (Features(store=store, clock=clock, sync_seconds=5) for _ in range(2))
        for features in (first, second):
            features.add("search")
        clock.advance(1)
        first.switch_off("search", "broken")
        await asyncio.sleep(0)
        await first.exchange()
        assert second.is_on("search")
        await second.exchange()
        assert second.reason("search") == "broken"
        clock.advance(1)
        second.switch_on("search")
        await second.exchange()
        await first.exchange()
        assert first.is_on("search")
        # Afterwards it is by itself that they ask again.
        clock.advance(1)
        second.switch_off("search")
        await second.exchange()
        clock.advance(5)
        assert first.is_on("search")
        for _ in range(5):
            await asyncio.sleep(0)
        assert not first.is_on("search")

    asyncio.run(run())


def test_a_store_that_is_gone_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Each worker goes on with what it knows; in a thread nothing is asked at all."""

    class Gone(MemoryStore):
        async def get_many(self, keys: Any) -> Any:
            raise StoreUnavailable("gone")

    features = Features(store=Gone())
    features.switch_off("search")
    assert not features.is_on("search")
    asyncio.run(features.exchange())
    assert not features.is_on("search")
    assert "could not be exchanged with other workers: gone" in caplog.text
    asyncio.run(Features().exchange())


# --- in an application ------------------------------------------------------------------------------------------------


def hardened(app: FastAPI, **settings: Any) -> tuple[TestClient, Hardening]:
    handle = harden(app, Settings(degradation=settings, health={"details": "always"}), clock=ManualClock())
    return TestClient(app), handle


def test_a_route_of_a_feature_that_is_off_says_when_to_come_back() -> None:
    """503 as a problem; health warns, and the metrics say so."""
    app = FastAPI()
    app.get("/export", dependencies=[Feature("export", level=2, retry_after_seconds=20)])(lambda: "ok")
    client, handle = hardened(app)
    assert client.get("/export").status_code == 200
    assert client.get("/health").json()["checks"]["features"][0]["status"] == "pass"
    handle.features.switch_off("export", "the disk is full")
    answer = client.get("/export")
    assert answer.status_code == 503
    assert answer.json()["type"].endswith("#temporary-reduced-capacity")
    assert 20 <= int(answer.headers["retry-after"]) <= 40
    report = client.get("/health")
    assert (report.status_code, report.json()["status"]) == (200, "warn")
    assert report.json()["checks"]["features"][0]["output"] == "off: export (the disk is full)"
    assert client.get("/readyz").status_code == 200
    assert handle.metrics.registry.get_sample_value("hardening_feature_on", {"feature": "export"}) == 0
    assert handle.events.count(RequestRefused) == 1


def test_features_are_known_before_anybody_asks_for_them() -> None:
    """Those of routes, from the start."""
    app = FastAPI()
    app.get("/export", dependencies=[Feature("export", level=2)])(lambda: "ok")
    client, handle = hardened(app, off=["export"])
    assert client.get("/livez").status_code == 200
    assert [status.name for status in handle.features] == ["export"]
    assert client.get("/export").status_code == 503


def test_something_else_is_given_instead() -> None:
    """A value or what a function gives, through the model of the response like the endpoint's own."""
    app = FastAPI()
    similar, sync = Feature("similar", level=1), Feature("sync", level=1)

    async def best_sellers(number: int) -> list[int]:
        return [number, 1]

    @app.get("/similar/{number}")
    @similar.otherwise(best_sellers)
    async def recommend(number: int) -> list[int]:
        return [number, 2]

    @app.get("/sync")
    @sync.otherwise(lambda: ["nothing"])
    def synchronous() -> list[str]:
        return ["something"]

    @app.get("/value")
    @sync.otherwise([])
    def value() -> list[str]:
        return ["something"]

    client, handle = hardened(app)
    paths = ("/similar/7", "/sync", "/value")
    assert [client.get(path).json() for path in paths] == [[7, 2], ["something"], ["something"]]
    handle.load.tell(1)
    assert [client.get(path).json() for path in paths] == [[7, 1], ["nothing"], []]


def test_a_signature_may_ask() -> None:
    """And so may any code that runs for the request."""
    app, similar = FastAPI(), Feature("similar", level=1)

    @app.get("/")
    async def product(shown: Annotated[bool, similar.on]) -> list[bool]:
        return [shown, similar.is_on]

    client, handle = hardened(app)
    assert client.get("/").json() == [True, True]
    handle.features.switch_off("similar")
    assert client.get("/").json() == [False, False]
    assert similar.is_on


def test_what_fails_is_replaced_where_it_may_be(caplog: pytest.LogCaptureFixture) -> None:
    """Only for the exceptions that are named."""
    app, similar = FastAPI(), Feature("similar")

    @app.get("/async/{kind}")
    @similar.otherwise("instead", on=(ConnectionError,))
    async def asynchronous(kind: str) -> str:
        raise ConnectionError if kind == "known" else RuntimeError

    @app.get("/sync")
    @similar.otherwise("instead", on=(ConnectionError,))
    def synchronous() -> str:
        raise ConnectionError

    harden(app)
    client = TestClient(app, raise_server_exceptions=False)
    assert (client.get("/async/known").json(), client.get("/sync").json()) == ("instead", "instead")
    assert client.get("/async/unknown").status_code == 500
    assert caplog.text.count("the feature similar has failed (ConnectionError)") == 2


def test_a_check_of_the_application_switches_its_feature_off() -> None:
    """When health is asked, and found bad."""
    app, broken = FastAPI(), list[bool]()
    similar = Feature("similar", check="recommender")
    app.get("/", dependencies=[similar])(lambda: "ok")
    client, handle = hardened(app)

    @handle.checks.add("recommender", critical=False, ttl_seconds=0)
    def recommender() -> CheckResult:
        return CheckResult("fail" if broken else "pass")

    assert client.get("/health").status_code == 200
    assert client.get("/").status_code == 200
    broken.append(True)
    for _ in range(3):
        client.get("/health")
    assert client.get("/").status_code == 503


@pytest.mark.parametrize(("settings", "status"), [({}, 503), ({"by_load": False}, 200), ({"enabled": False}, 200)])
def test_it_can_be_switched_off(settings: dict[str, Any], status: int) -> None:
    """For load, or altogether; by hand always works."""
    app = FastAPI()
    app.get("/", dependencies=[Feature("export", level=1)])(lambda: "ok")
    client, handle = hardened(app, **settings)
    handle.load.tell(3)
    assert client.get("/").status_code == status
    handle.features.switch_off("export")
    assert client.get("/").status_code == 503


def test_without_harden_everything_is_on() -> None:
    """A feature is a dependency like others."""
    app, feature = FastAPI(), Feature("export", level=1)
    app.get("/", dependencies=[feature])(lambda: "ok")

    @app.get("/value")
    async def value(shown: Annotated[bool, feature.on]) -> bool:
        return shown

    client = TestClient(app)
    assert (client.get("/").status_code, client.get("/value").json()) == (200, True)


def test_what_cannot_be_is_refused_when_it_is_made() -> None:
    """A level that there is none of, and a fallback that nobody could wait for."""
    with pytest.raises(ValueError, match="1 goes first"):
        Feature("export", level=4)  # type: ignore[arg-type]

    async def fallback() -> None: ...

    with pytest.raises(TypeError, match="not async either"):
        Feature("export").otherwise(fallback)(lambda: None)
