"""`kill -9` of the server, of its worker and of the worker's child in every step, with a runner that hangs there."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from tests.support.factories import Script, job_body
from tests.support.orthokv_server import Server, until
from tests.support.paths import SCRIPTED_RUNNER

pytestmark = pytest.mark.crash

STEPS = ("resolve", "calibrate", "fit", "profile", "package", "evaluate")


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Script:
    return Script(tmp_path_factory.mktemp("script") / "script")


@pytest.fixture(scope="module")
def server(script: Script, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    environment = {
        "ORTHOKV_RUNNER_COMMAND": json.dumps([sys.executable, str(SCRIPTED_RUNNER), str(script.folder)]),
        "ORTHOKV_RETRY_BACKOFF_SECONDS": "0.05",
        "ORTHOKV_DRAIN_SECONDS": "0",
    }
    with Server(tmp_path_factory.mktemp("crash") / "data", environment) as server:
        yield server


@pytest.fixture(scope="module")
def unbroken(server: Server) -> dict[str, str]:
    """Digests of all files of a job that nobody disturbed."""
    return digests(server, server.wait_for_end(server.post("/v1/jobs", job_body())["id"]))


def digests(server: Server, job: dict[str, Any]) -> dict[str, str]:
    """SHA-256 of every file that a job left behind."""
    files = server.get(f"/v1/checkpoints/{job['result']['checkpoint_id']}/files")["data"]
    files += server.get(f"/v1/profiles/{job['result']['profile_id']}")["files"].values()
    found = {file["filename"]: file["sha256"] for file in files}
    layers = server.get(f"/v1/jobs/{job['id']}/layers")["data"]
    return found | {f"layer {layer['layer']}": layer["sha256"] for layer in layers}


def hang_in(script: Script, step: str) -> None:
    for leftover in ("runs.jsonl", f"hanging-{step}"):
        (script.folder / leftover).unlink(missing_ok=True)
    fault: dict[str, Any] = {"step": step, "run": 0, "do": "hang"}
    script.write(fault | ({"layer": 1} if step == "fit" else {}))


def kill_child(server: Server) -> None:
    runner = server.runner()
    assert runner is not None
    runner.kill()


def kill_worker(server: Server) -> None:
    (worker,) = psutil.Process(server.process.pid).children()
    family = worker.children(recursive=True)
    worker.kill()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive, "the child outlived its worker"


def kill_server(server: Server) -> None:
    server.kill()
    server.start()


@pytest.mark.parametrize(
    ("kill", "step"),
    [
        (kill_child, "fit"),
        (kill_worker, "fit"),
        (kill_worker, "evaluate"),
        *((kill_server, step) for step in STEPS),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_kill_costs_one_step_or_layer_and_changes_no_byte(
    server: Server, script: Script, unbroken: dict[str, str], kill: Any, step: str
) -> None:
    hang_in(script, step)
    job_id = server.post("/v1/jobs", job_body())["id"]
    until(lambda: script.is_hanging(step), f"{step} hangs")
    if step == "fit":
        until(lambda: server.layers(job_id) == [0], "the first layer is safe")
    kill(server)
    job = server.wait_for_end(job_id)
    assert digests(server, job) == unbroken
    runs = [run["step"] for run in script.runs()]
    assert sorted(runs) == sorted([*STEPS, step]), "only the killed step ran again"
    if step == "fit":
        assert [run["layers"] for run in script.runs("fit")] == [[0, 1, 2], [1, 2]]
    events = server.get(f"/v1/jobs/{job_id}/events", limit=1000)["data"]
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    types = [event["type"] for event in events]
    assert types.count("attempt.lost") == 1
    assert types.count("layer.committed") == 3
    assert types.count("job.succeeded") == 1


def test_a_stop_leaves_no_process_and_costs_nothing(server: Server, script: Script) -> None:
    hang_in(script, "fit")
    job_id = server.post("/v1/jobs", job_body())["id"]
    until(lambda: script.is_hanging("fit"), "fit hangs")
    family = server.family()
    assert server.stop() == 0
    assert not [one for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    server.start()
    job = server.wait_for_end(job_id)
    types = [event["type"] for event in server.get(f"/v1/jobs/{job_id}/events", limit=1000)["data"]]
    assert (types.count("attempt.released"), types.count("attempt.lost")) == (1, 0)
    assert {step["failures"] for step in job["steps"]} == {0}


def test_nothing_is_left_half_written(server: Server) -> None:
    """After all those kills: every object that a listing shows is whole, and no work folder stays."""
    objects = [path for path in (server.data / "objects").rglob("*") if path.is_file()]
    assert objects
    assert not [path for path in objects if "#" in path.name and path.stat().st_size]
    assert not [path for path in (server.data / "work").rglob("*") if path.is_file()]
