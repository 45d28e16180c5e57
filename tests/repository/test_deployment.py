"""Compose file, images and manifests: pinned, unprivileged, watched, and spelled as the settings are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from sqlalchemy import text

from app.infra.database import SyncDatabase
from app.migrate import upgrade
from app.settings import Settings
from tests.support.factories import must_claim, queue_job
from tests.support.paths import REPOSITORY
from tests.support.postgres import postgres_url

KUBERNETES = REPOSITORY / "deploy" / "kubernetes"
COMPOSE: dict[str, Any] = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())
MANIFESTS: list[dict[str, Any]] = [
    document
    for file in sorted(KUBERNETES.glob("*.yaml"))
    for document in yaml.safe_load_all(file.read_text())
]
PODS = {
    one["metadata"]["name"]: one["spec"]["template"]["spec"]
    for one in MANIFESTS
    if one["kind"] in ("Deployment", "Job")
}
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILES = ("Dockerfile", "gpu_worker.Dockerfile")
# A version of its own: not `latest`, not only a major one.
PINNED = re.compile(r"[\w./-]+:v?\d+\.\d+[\w.-]*")
ONCE = {"migrate", "bucket"}


def settings_of(environment: dict[str, str]) -> Settings:
    """The settings that a container would have: every name known, every value accepted."""
    told: dict[str, Any] = {}
    for name, value in environment.items():
        if not name.startswith("ORTHOKV_"):
            continue
        field = name.removeprefix("ORTHOKV_").lower()
        assert field in Settings.model_fields, f"{name} is no setting"
        value = re.sub(r"\$\{\w+:-\}", "", value)  # may stay empty
        value = re.sub(r"\$\{(\w+)(:\?)?\}", "x", value)
        told[field] = json.loads(value) if value.startswith(("[", "{")) else value
    return Settings.model_validate(told)


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_pinned_unprivileged_and_watched(name: str) -> None:
    service = SERVICES[name]
    assert PINNED.fullmatch(service["image"]), service["image"]
    assert service["user"].split(":")[0] not in ("0", "root")
    assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
    assert ("healthcheck" in service) == (name not in ONCE)
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    for other, wanted in service.get("depends_on", {}).items():
        ends = "service_completed_successfully" if other in ONCE else "service_healthy"
        assert wanted == {"condition": ends}


@pytest.mark.parametrize("name", ["migrate", "api", "worker", "gpu-worker"])
def test_settings_of_services_exist(name: str) -> None:
    settings = settings_of(SERVICES[name]["environment"])
    assert settings.storage_options["endpoint"].get_secret_value() == "http://store:8333"
    assert settings.resolved_database_url.startswith("postgresql://")


def test_workers_are_given_the_time_to_drain() -> None:
    for name in ("worker", "gpu-worker"):
        grace = int(SERVICES[name]["stop_grace_period"].removesuffix("s"))
        assert grace > settings_of(SERVICES[name]["environment"]).drain_seconds
    shared = next(one["data"] for one in MANIFESTS if one["kind"] == "ConfigMap")
    grace = PODS["orthokv-worker"]["terminationGracePeriodSeconds"]
    assert grace > settings_of(shared).drain_seconds


def test_workers_serve_classes_that_jobs_may_name() -> None:
    for name in ("worker", "gpu-worker"):
        served = SERVICES[name]["command"][2]
        assert served in settings_of(SERVICES["api"]["environment"]).gpu_classes


def test_the_example_environment_is_all_that_compose_asks_for() -> None:
    asked = set(re.findall(r"\$\{(\w+)", (REPOSITORY / "docker-compose.yml").read_text()))
    given = set(re.findall(r"^(\w+)=", (REPOSITORY / ".env.example").read_text(), re.MULTILINE))
    assert given == asked


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_is_pinned_unprivileged_and_watched(name: str) -> None:
    lines = (REPOSITORY / name).read_text().splitlines()
    bases = [line.split()[1] for line in lines if line.startswith("FROM ")]
    assert bases
    assert all(PINNED.fullmatch(base) for base in bases)
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users[-1] == "10001"
    assert any(line.startswith("HEALTHCHECK ") for line in lines)
    installs = [line for line in lines if "pip install" in line]
    assert installs
    assert all("-c constraints.txt" in line for line in installs)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_copies_what_the_context_holds(name: str) -> None:
    allowed = {
        line.removeprefix("!")
        for line in (REPOSITORY / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    for line in (REPOSITORY / name).read_text().splitlines():
        if line.startswith("COPY "):
            for source in line.split()[1:-1]:
                assert (REPOSITORY / source).exists(), source
                # The context holds it, or a folder that it lies in.
                assert allowed & {str(path) for path in (Path(source), *Path(source).parents)}, source


@pytest.mark.parametrize("name", PODS)
def test_a_pod_is_pinned_and_unprivileged(name: str) -> None:
    pod = PODS[name]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False
    for container in pod["containers"]:
        assert PINNED.fullmatch(container["image"])
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert "memory" in container["resources"]["limits"]
        if name != "orthokv-migrate":
            assert "livenessProbe" in container
        plain = {one["name"]: one["value"] for one in container.get("env", []) if "value" in one}
        settings_of(plain)
        assert {one["name"] for one in container.get("env", [])} <= {*plain, "ORTHOKV_WORKER_NAME"}


def test_settings_of_the_cluster_exist() -> None:
    for one in MANIFESTS:
        if one["kind"] in ("ConfigMap", "Secret"):
            settings_of(one.get("data") or one["stringData"])


def test_settings_in_the_documents_exist() -> None:
    others = {
        "ORTHOKV_URL",
        "ORTHOKV_API_KEY",
        "ORTHOKV_TOKEN_FILE",
        "ORTHOKV_TEST_POSTGRES_URL",
        "ORTHOKV_TEST_REDIS_URL",
    }
    others |= {"ORTHOKV_MLFLOW_TRACKING_URI"}
    known = {f"ORTHOKV_{name.upper()}" for name in Settings.model_fields} | others
    files = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *(REPOSITORY / "docs").rglob("*.md")]
    for file in files:
        named = set(re.findall(r"ORTHOKV_[A-Z]+(?:_[A-Z]+)*\b", file.read_text()))
        assert named <= known, file.name


def test_the_kustomization_lists_every_manifest() -> None:
    listed = next(one["resources"] for one in MANIFESTS if one["kind"] == "Kustomization")
    files = {file.name for file in KUBERNETES.glob("*.yaml")}
    assert set(listed) == files - {"kustomization.yaml", "secret.example.yaml"}


def test_scaling_asks_for_workers_by_the_age_of_the_queue() -> None:
    scaled = next(one for one in MANIFESTS if one["kind"] == "ScaledObject")
    assert scaled["spec"]["scaleTargetRef"]["name"] in PODS
    (trigger,) = scaled["spec"]["triggers"]
    with postgres_url() as url:
        upgrade(url)
        database = SyncDatabase(url)

        def wanted() -> int:
            return int(
                database.read(
                    lambda session: session.execute(text(trigger["metadata"]["query"]))
                ).scalar_one()
            )

        def wait(seconds: float) -> None:
            database.write(
                lambda session: session.execute(
                    text("UPDATE step SET not_before = clock_timestamp() + :s * interval '1 second'"),
                    {"s": -seconds},
                )
            )

        assert wanted() == 0
        for _ in range(3):
            queue_job(database)
        queue_job(database, gpu_class="h100")
        wait(10)
        assert wanted() == 1
        wait(45)
        assert wanted() == 2
        wait(3600)
        assert wanted() == 3  # never more than steps wait
        must_claim(database)
        assert wanted() == 1 + 2
        wait(-60)
        assert wanted() == 1  # steps that may not run yet want nobody
        database.close()
