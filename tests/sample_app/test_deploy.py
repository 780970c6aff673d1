"""The files of the deployment kit agree with the settings, with the shop and with each other."""

import json
import re
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from fastapi import FastAPI
from fastapi.testclient import TestClient

from fastapi_hardening import Bulkhead, Settings, harden
from fastapi_hardening.cli import main
from fastapi_hardening.core.events import AttackFound, RequestRefused
from fastapi_hardening.core.lifecycle import DrainStarted
from fastapi_hardening.observability.health import HealthChanged
from fastapi_hardening.resilience.retry import RetryGivenUp
from fastapi_hardening.security.bans import BanLifted, Banned, ClientBanned
from fastapi_hardening.security.rate_limit import RateLimited

DEPLOY = Path(__file__).resolve().parents[2] / "sample_app" / "deploy"
SECRETS = {"HARDENING_METRICS__TOKEN": "0123456789abcdef"}  # what docs/deploy.md puts into the Secret


def dockerfile() -> str:
    """The Dockerfile, its continued lines joined."""
    return (DEPLOY / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", "")


def instruction(name: str) -> str:
    """The last instruction of that name."""
    found: list[str] = re.findall(rf"^{name} (.*)$", dockerfile(), re.MULTILINE)
    return found[-1]


def command() -> list[str]:
    arguments: list[str] = json.loads(instruction("CMD"))
    return arguments


@pytest.fixture(scope="module")
def manifests() -> dict[str, Any]:
    text = (DEPLOY / "kubernetes" / "shop.yaml").read_text(encoding="utf-8")
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


@pytest.fixture(scope="module")
def pod(manifests: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = manifests["Deployment"]["spec"]["template"]["spec"]
    return spec


def test_the_image_runs_as_nobody_special_and_without_a_shell() -> None:
    """The user is a number that is not root, and the command is a list, so that SIGTERM reaches uvicorn."""
    user, group = map(int, instruction("USER").split(":"))
    assert user > 0
    assert group > 0
    assert command()[:3] == ["python", "-m", "uvicorn"]


def test_the_image_installs_only_pinned_versions() -> None:
    """Every package comes in the version of constraints.txt."""
    installs = [line for line in dockerfile().splitlines() if "pip install" in line]
    assert installs
    assert all("--constraint constraints.txt" in line for line in installs)


def test_what_is_copied_is_not_ignored() -> None:
    """The ignore file lets in each source of a COPY."""
    let_in = set(
        re.findall(r"^!(\S+)$", (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8"), re.MULTILINE)
    )
    copies = re.findall(r"^COPY (?!--from)(.*) \S+$", dockerfile(), re.MULTILINE)
    assert {source for copy in copies for source in copy.split()} == let_in


def test_uvicorn_waits_from_the_drain_delay_to_the_drain_deadline() -> None:
    """When uvicorn is told to stop, the drain delay is over, and the rest up to the deadline is left."""
    health = Settings().health
    arguments = command()
    seconds = float(arguments[arguments.index("--timeout-graceful-shutdown") + 1])
    assert seconds == health.drain_deadline_seconds - health.drain_delay_seconds
    assert {"--no-server-header", "--no-access-log", "--no-proxy-headers"} <= set(arguments)


def test_kubernetes_waits_longer_than_the_drain(pod: dict[str, Any]) -> None:
    """Nothing is killed that still drains, and the load balancer knows of the drain before its delay is over."""
    health = Settings().health
    drain = health.drain_delay_seconds + health.drain_deadline_seconds
    assert pod["terminationGracePeriodSeconds"] == drain + 5
    probe = pod["containers"][0]["readinessProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] + probe["timeoutSeconds"] < health.drain_delay_seconds


def test_each_probe_asks_its_own_path(pod: dict[str, Any]) -> None:
    """The probes of Kubernetes and of the image name paths that the settings serve."""
    health = Settings().health
    container = pod["containers"][0]
    paths = {name: container[name]["httpGet"]["path"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert paths == {
        "startupProbe": health.startupz_path,
        "readinessProbe": health.readyz_path,
        "livenessProbe": health.livez_path,
    }
    assert f"http://127.0.0.1:{instruction('EXPOSE')}{health.livez_path}'" in instruction("HEALTHCHECK")


def test_every_port_is_the_one_that_uvicorn_opens(manifests: dict[str, Any], pod: dict[str, Any]) -> None:
    """The image, the pod, the service and the network policy speak of one port."""
    arguments = command()
    port = int(arguments[arguments.index("--port") + 1])
    (opened,) = pod["containers"][0]["ports"]
    assert int(instruction("EXPOSE")) == opened["containerPort"] == port
    assert manifests["Service"]["spec"]["ports"][0]["targetPort"] == opened["name"]
    assert manifests["NetworkPolicy"]["spec"]["ingress"][0]["ports"] == [{"port": port}]


def test_the_pod_keeps_the_restricted_profile(pod: dict[str, Any]) -> None:
    """What the restricted pod security standard asks for is set, and the root file system is read-only."""
    security = pod["containers"][0]["securityContext"]
    assert security == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}" == instruction("USER")


def test_settings_take_every_variable_of_the_manifests(
    manifests: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The settings start from what the ConfigMap and the Secret set, in production."""
    for name, value in {**manifests["ConfigMap"]["data"], **SECRETS}.items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert settings.environment == "production"
    assert settings.trusted_proxies == ("10.244.0.0/16",)
    assert settings.metrics.token is not None


def test_the_rules_are_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """`fastapi-hardening alerts sample_app.main:app` prints prometheus/rules.yaml."""
    main(["alerts", "sample_app.main:app"])
    printed = capsys.readouterr().out
    assert printed == (DEPLOY / "prometheus" / "rules.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(printed)["groups"]


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    return loaded


def directive(name: str) -> str:
    """The arguments of a directive that nginx.conf has once."""
    text = (DEPLOY / "nginx.conf").read_text(encoding="utf-8")
    (found,) = re.findall(rf"^ *{name} +(.*);$", text, re.MULTILINE)
    return str(found)


def test_every_container_is_confined(compose: dict[str, Any]) -> None:
    """No container of compose.yaml writes to its image, has a capability, may gain one or is without a health check."""
    for name, service in compose["services"].items():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "healthcheck" in service or name == "shop"  # the image of the shop has one
        assert "privileged" not in service


def test_only_this_machine_reaches_the_proxy_and_grafana(compose: dict[str, Any]) -> None:
    """No other container publishes a port, and these two only on the loopback address."""
    published = {name: service["ports"] for name, service in compose["services"].items() if "ports" in service}
    assert set(published) == {"proxy", "grafana"}
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)
    inner = {name for name, network in compose["networks"].items() if network and network["internal"]}
    assert set(compose["services"]["shop"]["networks"]) <= inner
    assert set(compose["services"]["valkey"]["networks"]) <= inner


def test_compose_runs_the_command_of_the_image_with_two_workers(compose: dict[str, Any]) -> None:
    """The workers are as many as the settings are told, and share metrics in a folder that is empty at the start."""
    shop = compose["services"]["shop"]
    workers = shop["environment"]["HARDENING_WORKERS"]
    assert shop["command"] == [*command(), "--workers", workers]
    folders = [mount.partition(":")[0] for mount in shop["tmpfs"]]
    assert shop["environment"]["PROMETHEUS_MULTIPROC_DIR"] in folders


def test_compose_waits_longer_than_the_drain(compose: dict[str, Any]) -> None:
    """Neither the shop nor the proxy is killed while answers end."""
    health = Settings().health
    assert 0 < float(directive("worker_shutdown_timeout")[:-1]) <= health.drain_deadline_seconds
    for name in ("shop", "proxy"):
        grace = compose["services"][name]["stop_grace_period"]
        assert grace == f"{health.drain_delay_seconds + health.drain_deadline_seconds + 5:g}s"


def test_the_shop_believes_the_proxy_and_nobody_else(compose: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is trusted is the proxy's own address, in a network that only it and the shop are in."""
    services = compose["services"]
    for name, value in services["shop"]["environment"].items():
        monkeypatch.setenv(name, value)
    trusted = Settings().trusted_proxies
    assert trusted == (services["proxy"]["networks"]["front"]["ipv4_address"],)
    (network,) = compose["networks"]["front"]["ipam"]["config"]
    shop = services["shop"]["networks"]["front"]["ipv4_address"]
    assert all(ip_address(each) in ip_network(network["subnet"]) for each in (*trusted, shop))
    assert {name for name, service in services.items() if "front" in service["networks"]} == {"proxy", "shop"}
    port = command()[command().index("--port") + 1]
    assert directive("server").split()[0] == f"{shop}:{port}"


def test_the_proxy_replaces_what_a_client_forwards() -> None:
    """The address that the shop reads is the peer's, and nothing that a client wrote is appended to or passed on."""
    assert directive("proxy_set_header X-Forwarded-For") == "$remote_addr"
    assert directive("proxy_set_header Forwarded") == '""'
    assert directive("proxy_set_header X-Forwarded-Host") == '""'


def test_the_proxy_takes_what_the_shop_takes() -> None:
    """Its limits of size are those of the settings, and it waits longer than the shop lets a handler take."""
    settings = Settings()
    assert int(directive("client_max_body_size")) == settings.request_limits.max_body_bytes
    count, size = directive("large_client_header_buffers").split()
    assert int(count) * int(size.removesuffix("k")) * 1024 == settings.request_limits.max_header_bytes
    first_byte = settings.timeout.first_byte_seconds
    assert first_byte is not None
    assert float(directive("proxy_read_timeout").removesuffix("s")) > first_byte


def test_the_proxy_lets_slow_senders_go() -> None:
    """A header and each piece of a body have ten seconds."""
    assert directive("client_header_timeout") == "10s"
    assert directive("client_body_timeout") == "10s"


def test_the_store_has_a_password_a_limit_and_evicts_nothing(compose: dict[str, Any]) -> None:
    """The lines that Valkey starts from say so, and the password is none of them."""
    lines = compose["services"]["valkey"]["command"][-1].splitlines()
    assert {"requirepass $$VALKEY_PASSWORD", "maxmemory 128mb", "maxmemory-policy noeviction"} <= set(lines)


def test_prometheus_reads_what_the_settings_serve(compose: dict[str, Any]) -> None:
    """It asks the shop's port for the default path, with the token, and has the rules."""
    prometheus = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yaml").read_text(encoding="utf-8"))
    mounted = dict(mount.split(":")[1::-1] for mount in compose["services"]["prometheus"]["volumes"])
    (job,) = prometheus["scrape_configs"]
    assert job.get("metrics_path", "/metrics") == Settings().metrics.path
    assert job["static_configs"] == [{"targets": [f"shop:{instruction('EXPOSE')}"]}]
    assert mounted[job["authorization"]["credentials_file"]] == "./secrets/metrics_token"
    assert [mounted[rules] for rules in prometheus["rule_files"]] == ["./prometheus/rules.yaml"]
    assert f"location = {Settings().metrics.path} {{" in (DEPLOY / "nginx.conf").read_text(encoding="utf-8")


# --- the dashboard ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text(encoding="utf-8"))
    return loaded


@pytest.fixture(scope="module")
def exposed() -> dict[str, set[str]]:
    """The series of a hardened application to which most things happened, with the labels that they have."""
    app = FastAPI()
    settings = Settings(upstreams={"stock": {"base_urls": "http://127.0.0.1:9"}}, state_url="redis://127.0.0.1:9/0")
    handle = harden(app, settings)
    handle.retries.add("stock")
    for breaker in handle.breakers.list():
        handle.breakers[breaker.name].force_open()
    levels = handle.cache.levels.metrics
    levels.hit("memory")
    levels.stale.labels("error").inc()
    levels.computations.labels("made").inc()
    levels.up.labels("memory").set(1)
    recorder = handle.metrics
    recorder.record_aborted("/rare", "disconnect")
    recorder.record_websocket("/rare", "accepted")
    for event in (
        RequestRefused("quota-exceeded", 429, "rate limit", "/rare", "1", "203.0.113.9", None),
        AttackFound("sql.quoted-tautology", "sql", "/body", False, "/rare", "1", "203.0.113.9"),
        HealthChanged("database", "pass", "fail", None),
        RetryGivenUp("stock", 3, "attempts", "TimeoutError"),
    ):
        handle.events.emit(event)

    @app.get("/rare", dependencies=[Bulkhead(1)])
    async def rare() -> None: ...

    TestClient(app).get("/rare")
    found: dict[str, set[str]] = {"up": set()}  # Prometheus makes this one itself
    for family in recorder.registry.collect():
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def expressions(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]


def test_the_dashboard_reads_only_what_is_exposed(dashboard: dict[str, Any], exposed: dict[str, set[str]]) -> None:
    """Each series of each expression is one that a hardened application shows, and has the labels that are asked."""
    read = 0
    for expression in expressions(dashboard):
        series = re.findall(r"(\w+)\{", expression)
        assert series
        assert set(series) <= set(exposed), expression
        labels = set().union(*(exposed[name] for name in series)) | {"job", "instance"}
        grouped = {each.strip() for group in re.findall(r"by \(([^)]*)\)", expression) for each in group.split(",")}
        matched = set(re.findall(r"(\w+)=~?\"", expression))
        assert grouped | matched <= labels, expression
        read += len(series)
    assert read >= len(expressions(dashboard)) > 30


def test_each_legend_names_a_label_that_is_left(dashboard: dict[str, Any]) -> None:
    """A legend can only show what the expression groups by."""
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            grouped = set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", target["expr"]))))
            assert named <= grouped | {"instance"}, panel["title"]


def test_each_event_of_the_dashboard_is_one(dashboard: dict[str, Any]) -> None:
    """The events that panels ask for by name are classes of events."""
    named = set(re.findall(r'event="(\w+)"', " ".join(expressions(dashboard))))
    assert named == {event.__name__ for event in (ClientBanned, BanLifted, DrainStarted)}
    problems = set(re.findall(r'problem="([\w-]+)"', " ".join(expressions(dashboard))))
    assert problems == {Banned.type.rpartition("#")[2], RateLimited.type.rpartition("#")[2]}


def test_panels_do_not_overlap(dashboard: dict[str, Any]) -> None:
    """Each panel has an id and a place of its own."""
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)


def test_grafana_is_given_the_dashboard_and_its_source(compose: dict[str, Any]) -> None:
    """What the provisioning names is mounted, and the source is Prometheus of this compose.yaml."""
    folder = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yaml").read_text(encoding="utf-8"))["datasources"]
    (provider,) = yaml.safe_load((folder / "dashboards" / "hardening.yaml").read_text(encoding="utf-8"))["providers"]
    mounted = {mount.split(":")[1] for mount in compose["services"]["grafana"]["volumes"]}
    assert f"{provider['options']['path']}/dashboard.json" in mounted
    assert "/etc/grafana/provisioning" in mounted
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in compose["services"]
