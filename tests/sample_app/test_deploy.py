"""The files of the deployment kit agree with the settings, with the shop and with each other."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from fastapi_hardening import Settings
from fastapi_hardening.cli import main

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
    """`fastapi-hardening alerts` prints prometheus/rules.yaml."""
    main(["alerts"])
    printed = capsys.readouterr().out
    assert printed == (DEPLOY / "prometheus" / "rules.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(printed)["groups"]
