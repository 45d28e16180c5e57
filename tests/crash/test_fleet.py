"""One job on several workers: real processes on Postgres, a bucket and Redis, with a runner that follows a script."""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from app.migrate import upgrade
from orthokv_client.cli import jobs
from tests.crash.test_scripted import digests
from tests.support.factories import Script, job_body
from tests.support.fleet import Api, Worker
from tests.support.orthokv_server import until
from tests.support.paths import SCRIPTED_RUNNER
from tests.support.postgres import postgres_url
from tests.support.redis_server import redis_url
from tests.support.s3 import new_bucket, s3_endpoint

pytestmark = pytest.mark.crash


@pytest.fixture(scope="module")
def services() -> Iterator[dict[str, str]]:
    """Settings of everything that a fleet shares."""
    with ExitStack() as stack:
        database = stack.enter_context(postgres_url())
        upgrade(database)
        bucket = new_bucket(stack.enter_context(s3_endpoint()))
        yield {
            **bucket.environment,
            "ORTHOKV_DATABASE_URL": database,
            "ORTHOKV_BROKER_URL": stack.enter_context(redis_url()),
            # A queue that no other run of these tests hears.
            "ORTHOKV_GPU_CLASSES": json.dumps([f"t-{uuid.uuid4().hex[:12]}"]),
            "ORTHOKV_SIGNED_DOWNLOAD_SECONDS": "60",
            "ORTHOKV_LAYERS_PER_FIT_STEP": "1",
            "ORTHOKV_RETRY_BACKOFF_SECONDS": "0.05",
            "ORTHOKV_DRAIN_SECONDS": "0",
            "ORTHOKV_AUTH_REQUIRED": "false",  # keys have tests of their own
        }


@pytest.fixture
def script(tmp_path: Path) -> Script:
    return Script(tmp_path / "script")


@pytest.fixture
def fleet(services: dict[str, str], script: Script) -> dict[str, str]:
    """The environment of one test's processes; idle workers wake by hints alone."""
    command = json.dumps([sys.executable, str(SCRIPTED_RUNNER), str(script.folder)])
    return {**services, "ORTHOKV_RUNNER_COMMAND": command, "ORTHOKV_IDLE_POLL_SECONDS": "3600"}


@pytest.fixture
def api(fleet: dict[str, str], tmp_path: Path) -> Iterator[Api]:
    with Api(tmp_path / "api", {**fleet, "ORTHOKV_DATA_DIR": str(tmp_path / "api")}) as api:
        yield api


def body(fleet: dict[str, str]) -> dict[str, Any]:
    return job_body(gpu_class=json.loads(fleet["ORTHOKV_GPU_CLASSES"])[0])


def started_by(api: Api, job_id: str, step: str) -> list[str]:
    """Workers that began this step, in order."""
    events = api.get(f"/v1/jobs/{job_id}/events", limit=1000)["data"]
    return [
        event["data"]["worker"]
        for event in events
        if event["data"].get("step") == step and "worker" in event["data"]
    ]


def listening(worker: Worker) -> bool:
    return "worker.started" in worker.log()


def test_one_hint_wakes_as_many_workers_as_there_is_work(
    api: Api, fleet: dict[str, str], script: Script, tmp_path: Path
) -> None:
    script.write(*({"step": "fit", "run": run, "do": "hang_until_released"} for run in range(3)))
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(tmp_path / f"worker-{n}", fleet)) for n in range(3)]
        for worker in workers:
            until(lambda worker=worker: listening(worker), "the worker is up")
        job_id = api.post("/v1/jobs", body(fleet))["id"]
        until(lambda: len(script.runs("fit")) == 3, "three workers fit at the same time")
        script.go_on()
        job = api.wait_for_end(job_id)
        assert sorted(started_by(api, job_id, "fit")) == ["worker-0", "worker-1", "worker-2"]
        assert {worker.stop() for worker in workers} == {0}
    shared = digests(api, job)

    with Worker(tmp_path / "worker-alone", fleet, "--poll-only"):
        alone = api.wait_for_end(api.post("/v1/jobs", body(fleet))["id"])
    assert set(started_by(api, alone["id"], "fit")) == {"worker-alone"}
    assert digests(api, alone) == shared

    arguments = ["download", job_id, "--out", str(tmp_path / "out")]
    fetched = CliRunner().invoke(jobs, arguments, env={"ORTHOKV_URL": api.url})
    assert fetched.exit_code == 0, fetched.output
    assert (tmp_path / "out" / "SHA256SUMS").read_bytes() == b"second\n"


def test_a_drained_worker_hands_its_step_on_at_no_cost(
    api: Api, fleet: dict[str, str], script: Script, tmp_path: Path
) -> None:
    script.write({"step": "calibrate", "run": 0, "do": "hang"})
    with Worker(tmp_path / "worker-0", fleet) as first:
        job_id = api.post("/v1/jobs", body(fleet))["id"]
        until(lambda: script.is_hanging("calibrate"), "the first worker is busy")
        assert first.stop() == 0
    with Worker(tmp_path / "worker-1", fleet):
        job = api.wait_for_end(job_id)
    assert started_by(api, job_id, "calibrate") == ["worker-0", "worker-1"]
    assert {step["failures"] for step in job["steps"]} == {0}
    types = [event["type"] for event in api.get(f"/v1/jobs/{job_id}/events", limit=1000)["data"]]
    assert (types.count("attempt.released"), types.count("attempt.lost")) == (1, 0)


def test_a_killed_worker_comes_back_under_its_name(
    api: Api, fleet: dict[str, str], script: Script, tmp_path: Path
) -> None:
    script.write({"step": "profile", "run": 0, "do": "hang"})
    with Worker(tmp_path / "worker-0", fleet) as first:
        job_id = api.post("/v1/jobs", body(fleet))["id"]
        until(lambda: script.is_hanging("profile"), "the worker is busy")
        first.kill()
    with Worker(tmp_path / "worker-0", {**fleet, "ORTHOKV_IDLE_POLL_SECONDS": "0.1"}):
        job = api.wait_for_end(job_id)
    profile = next(step for step in job["steps"] if step["name"] == "profile")
    assert profile["attempts"] == 2


def test_a_worker_serves_the_classes_it_is_told(
    api: Api, fleet: dict[str, str], script: Script, tmp_path: Path
) -> None:
    ours = body(fleet)["gpu_class"]
    with Worker(tmp_path / "worker-other", fleet, "--gpu-class", "other", "--poll-only") as other:
        until(lambda: listening(other), "the worker is up")
        job_id = api.post("/v1/jobs", body(fleet))["id"]
        with Worker(tmp_path / "worker-ours", fleet, "--queue", ours, "--poll-only"):
            api.wait_for_end(job_id)
    assert set(started_by(api, job_id, "fit")) == {"worker-ours"}
