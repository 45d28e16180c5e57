"""`orthokv mlflow-export` from a real service to a real MLflow server: every ended job once, whatever breaks on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import httpx2
import pytest

from orthokv_client import OrthoKV
from tests.support.factories import LAYERS, Script, job_body
from tests.support.mlflow_server import Cut, Tracking, mlflow_url, tags
from tests.support.orthokv_server import Server, until
from tests.support.paths import REPOSITORY, SCRIPTED_RUNNER

pytestmark = pytest.mark.mlflow
AWAY = "http://someone:tracking-canary@127.0.0.1:9"


@pytest.fixture(scope="module")
def tracking() -> Iterator[Tracking]:
    with mlflow_url() as url:
        yield Tracking(url)


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Script:
    return Script(tmp_path_factory.mktemp("script") / "script")


@pytest.fixture(scope="module")
def server(script: Script, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    command = json.dumps([sys.executable, str(SCRIPTED_RUNNER), str(script.folder)])
    with Server(tmp_path_factory.mktemp("serve") / "data", {"ORTHOKV_RUNNER_COMMAND": command}) as server:
        yield server


@pytest.fixture(scope="module")
def done(server: Server) -> str:
    """A job that has succeeded."""
    job_id: str = server.post("/v1/jobs", job_body(metadata={"team": "search"}, seed=11))["id"]
    server.wait_for_end(job_id)
    return job_id


@pytest.fixture
def name() -> str:
    """Of an experiment and of a registered model that only this test has."""
    return f"test-{uuid.uuid4().hex[:8]}"


def ended(server: Server, job_id: str) -> dict[str, Any]:
    def job() -> dict[str, Any] | None:
        found = server.job(job_id)
        return found if found["status"] in ("succeeded", "failed", "cancelled") else None

    found: dict[str, Any] = until(job, "the job ends")
    return found


def command(server: Server, tracking_uri: str, name: str, *more: str) -> list[str]:
    program = "from orthokv.cli import main; main()"
    options = ["--url", server.url, "--experiment", name, "--model-name", name, *more]
    return [sys.executable, "-c", program, "mlflow-export", "--tracking-uri", tracking_uri, *options]


def export(server: Server, tracking_uri: str, name: str, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(server, tracking_uri, name, "--once", *more),
        capture_output=True,
        text=True,
        timeout=180,
        cwd=REPOSITORY,
        env={**os.environ, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"},
    )


Make = Callable[..., Any]


@pytest.fixture
def exporter(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Exporters in this process, which is faster where many are needed."""
    from app.mlflow_export.export import Exporter, Options

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with OrthoKV(server.url) as client:

        def make(tracking_uri: str, name: str, **options: Any) -> Any:
            chosen = Options(server.url, experiment=name, model_name=name, **options)
            return Exporter(client, tracking_uri, chosen)

        yield make


def state(tracking: Tracking, name: str) -> Any:
    """Everything that an exporter writes, without the times of MLflow's own."""
    runs = tracking.runs(name)
    versions = [
        {key: value for key, value in version.items() if "timestamp" not in key}
        for version in tracking.versions(name)
    ]
    histories = {
        (job_id, metric["key"]): tracking.history(run["info"]["run_id"], metric["key"])
        for job_id, run in runs.items()
        for metric in run["data"]["metrics"]
    }
    return runs, histories, versions


def test_an_ended_job_is_a_run_with_its_spec_layers_and_digests(
    server: Server, tracking: Tracking, done: str, name: str
) -> None:
    said = export(server, tracking.url, name)
    assert said.returncode == 0, said.stderr
    run, job = tracking.runs(name)[done], server.job(done)
    params = {param["key"]: param["value"] for param in run["data"]["params"]}
    assert (params["model.id"], params["budget.value"], params["seed"]) == ("org/model", "0.25", "11")
    run_id = run["info"]["run_id"]
    assert tracking.history(run_id, "layer.error") == [(layer, 0.1) for layer in range(LAYERS)]
    assert tracking.history(run_id, "measured.perplexity") == [(0, 11.5)]
    found = tags(run["data"])
    assert found["orthokv.model.digest"] == job["resolved"]["model"]["digest"]
    assert found["orthokv.dataset.digest"] == "d" * 64
    assert found["orthokv.metadata.team"] == "search"
    assert found["orthokv.checkpoint_id"] == job["result"]["checkpoint_id"]
    files = server.get(f"/v1/checkpoints/{job['result']['checkpoint_id']}/files")["data"]
    assert found["orthokv.manifest_sha256"] in {f["sha256"] for f in files if f["filename"] == "SHA256SUMS"}
    assert run["info"]["status"] == "FINISHED"
    assert run["info"]["run_name"] == done


def test_a_checkpoint_is_a_model_version_by_uri_and_nothing_is_uploaded(
    server: Server, tracking: Tracking, done: str, name: str
) -> None:
    said = export(server, tracking.url, name, "--alias", "newest", "--public-url", "https://kv.example.com/")
    assert said.returncode == 0, said.stderr
    run = tracking.runs(name)[done]
    checkpoint = server.job(done)["result"]["checkpoint_id"]
    version = next(v for v in tracking.versions(name) if tags(v)["orthokv.checkpoint_id"] == checkpoint)
    assert version["source"] == f"orthokv://kv.example.com/v1/checkpoints/{checkpoint}"
    assert tags(version)["orthokv.url"] == f"https://kv.example.com/v1/checkpoints/{checkpoint}"
    assert version["run_id"] == run["info"]["run_id"]
    assert version["status"] == "READY"
    assert tracking.alias(name)["newest"] == tracking.versions(name)[-1]["version"]
    assert "files" not in tracking.call(f"artifacts/list?run_id={run['info']['run_id']}")


def test_exported_again_nothing_changes(server: Server, tracking: Tracking, done: str, name: str) -> None:
    export(server, tracking.url, name)
    before = state(tracking, name)
    said = export(server, tracking.url, name)
    assert said.returncode == 0, said.stderr
    assert state(tracking, name) == before
    assert '"exported": 0' in said.stderr


def test_without_registration_there_are_runs_alone(
    tracking: Tracking, done: str, name: str, exporter: Make
) -> None:
    exporter(tracking.url, name, register=False).sweep()
    assert done in tracking.runs(name)
    assert not tracking.versions(name)


def test_wherever_it_breaks_off_the_next_sweep_completes_it_once(
    server: Server, tracking: Tracking, done: str, name: str, exporter: Make
) -> None:
    exporter(tracking.url, name, alias="newest").sweep()
    wanted = complete(tracking, name)
    changes = 0
    while True:
        changes += 1
        trial = f"{name}-{changes}"
        cut = Cut(tracking.url, changes)
        with cut.serving() as url, suppress(tracking_away()):
            exporter(url, trial, alias="newest").sweep()
        exporter(tracking.url, trial, alias="newest").sweep()
        assert complete(tracking, trial) == wanted, f"broken off after {changes} changes"
        if not cut.broke:
            break
    assert changes > 9, "one job alone takes nine requests that change something"


def tracking_away() -> type[Exception]:
    from app.mlflow_export.export import TrackingAway

    return TrackingAway


def complete(tracking: Tracking, name: str) -> Any:
    """What has to be the same in every experiment that is complete: all but MLflow's own ids."""
    runs, histories, versions = state(tracking, name)
    return (
        {
            job_id: (run["data"]["params"], own(run["data"]), run["info"]["status"])
            for job_id, run in runs.items()
        },
        histories,
        [(version["version"], version["source"], own(version)) for version in versions],
        tracking.alias(name),
    )


def own(data: dict[str, Any]) -> dict[str, str]:
    return {key: value for key, value in tags(data).items() if key.startswith("orthokv.")}


def test_exporters_at_the_same_time_leave_one_run_and_one_version(
    server: Server, tracking: Tracking, done: str, name: str, exporter: Make
) -> None:
    exporters = [exporter(tracking.url, name) for _ in range(4)]
    start = threading.Barrier(len(exporters))

    def sweep(one: Any) -> None:
        start.wait()
        one.sweep()

    threads = [threading.Thread(target=sweep, args=(one,)) for one in exporters]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    exporter(tracking.url, name).sweep()
    assert done in tracking.runs(name)  # which refuses two of one job
    sources = [version["source"] for version in tracking.versions(name)]
    assert len(sources) == len(set(sources))
    assert all(own(run["data"]).get("orthokv.job_version") for run in tracking.runs(name).values())


def test_a_failed_job_is_a_failed_run_and_its_retry_the_same_run_finished(
    server: Server, tracking: Tracking, script: Script, name: str, exporter: Make
) -> None:
    script.write({"step": "evaluate", "run": len(script.runs("evaluate")), "do": "user_error"})
    job_id = server.post("/v1/jobs", job_body(seed=12))["id"]
    failed = ended(server, job_id)
    follower = exporter(tracking.url, name)
    follower.sweep()
    first = tracking.runs(name)[job_id]
    assert first["info"]["status"] == "FAILED"
    assert own(first["data"])["orthokv.error"] == failed["error"]["code"]
    assert not any(job_id == tags(version)["orthokv.job_id"] for version in tracking.versions(name))
    script.write()
    httpx2.post(f"{server.url}/v1/jobs/{job_id}/retry", headers=server.headers).raise_for_status()
    server.wait_for_end(job_id)
    follower.sweep()
    second = tracking.runs(name)[job_id]
    assert second["info"]["run_id"] == first["info"]["run_id"]
    assert second["info"]["status"] == "FINISHED"
    assert tracking.history(second["info"]["run_id"], "layer.error") == [(n, 0.1) for n in range(LAYERS)]


def test_the_alias_does_not_go_back_to_an_older_checkpoint(
    server: Server, tracking: Tracking, done: str, name: str, exporter: Make
) -> None:
    newer = server.post("/v1/jobs", job_body(seed=13))["id"]
    server.wait_for_end(newer)
    exporter(tracking.url, name, alias="newest").sweep()
    versions = {tags(version)["orthokv.job_id"]: version["version"] for version in tracking.versions(name)}
    assert tracking.alias(name)["newest"] == versions[newer]
    run = tracking.runs(name)[done]
    body = {"run_id": run["info"]["run_id"], "key": "orthokv.job_version"}
    tracking.call("runs/delete-tag", body)  # as if its export had broken off
    exporter(tracking.url, name, alias="newest").sweep()
    assert tracking.alias(name)["newest"] == versions[newer]


def test_a_run_that_somebody_deleted_stays_deleted(
    tracking: Tracking, done: str, name: str, exporter: Make
) -> None:
    exporter(tracking.url, name).sweep()
    tracking.call("runs/delete", {"run_id": tracking.runs(name)[done]["info"]["run_id"]})
    exporter(tracking.url, name).sweep()
    assert done not in tracking.runs(name)


def test_jobs_older_than_the_days_are_left_alone(
    tracking: Tracking, done: str, name: str, exporter: Make
) -> None:
    exporter(tracking.url, name, days=0.0).sweep()
    assert not tracking.runs(name)


def test_mlflow_away_costs_no_job_anything(server: Server, tracking: Tracking, name: str) -> None:
    job_id = server.post("/v1/jobs", job_body(seed=14))["id"]
    said = export(server, AWAY, name)
    assert server.wait_for_end(job_id)["status"] == "succeeded"
    assert said.returncode == 1
    assert "mlflow.away" in said.stderr
    assert "Traceback" not in said.stderr
    assert "tracking-canary" not in said.stderr + said.stdout
    assert export(server, tracking.url, name).returncode == 0
    assert job_id in tracking.runs(name)


def test_the_loop_outlives_a_service_that_is_away(
    server: Server, tracking: Tracking, done: str, name: str
) -> None:
    with subprocess.Popen(
        command(server, tracking.url, name, "--every", "1"),
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ},
    ) as process:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        try:
            next(line for line in lines if "mlflow.swept" in line)
            server.stop()
            next(line for line in lines if "mlflow.service_away" in line)
            server.start()
        finally:
            process.kill()
    job_id = server.post("/v1/jobs", job_body(seed=15))["id"]
    server.wait_for_end(job_id)
    assert export(server, tracking.url, name).returncode == 0
    assert job_id in tracking.runs(name)
