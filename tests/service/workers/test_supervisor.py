"""A supervisor with a real child process, which follows a script."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import select, update

from app.artifacts.models import Artifact
from app.artifacts.repository import files_of_job
from app.deletion.orphans import sweep_orphans
from app.infra.database import SyncDatabase, now
from app.infra.storage import Storage
from app.jobs import service
from app.jobs.models import Step
from app.jobs.schemas import Job
from app.jobs.vocabulary import TERMINAL, JobErrorCode, JobStatus
from app.principal import local_principal
from app.profiles.schemas import CheckpointCreate
from app.profiles.service import create_checkpoint
from app.settings import Settings
from tests.support.factories import Script, job_body, queue_job, read_job
from workers.supervisor import Supervisor

PATIENCE_SECONDS = 30.0


def until(condition: Callable[[], Any], what: str) -> None:
    """Wait for another process or thread; fails with a name when it never comes."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.01)


@contextmanager
def running(settings: Settings) -> Iterator[Supervisor]:
    """A supervisor at work in a thread, drained at the end."""
    supervisor = Supervisor(settings)
    thread = threading.Thread(target=supervisor.run)
    thread.start()
    try:
        yield supervisor
    finally:
        supervisor.stop()
        thread.join(PATIENCE_SECONDS)
        assert not thread.is_alive(), "the supervisor did not stop"
        supervisor.close()


def run_to_end(database: SyncDatabase, settings: Settings, job_id: str) -> Job:
    with running(settings):
        until(lambda: read_job(database, job_id).status in TERMINAL, "the job ends")
    return read_job(database, job_id)


def alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def committed(database: SyncDatabase, job_id: str) -> list[int]:
    return [
        layer.layer
        for layer in database.read(service.layers, job_id=job_id, principal=local_principal()).data
    ]


def contents(database: SyncDatabase, settings: Settings, job_id: str) -> dict[str, bytes]:
    """Bytes of every committed file of a job."""
    artifacts = database.read(
        lambda session: session.execute(select(Artifact).where(Artifact.job_id == job_id)).scalars().all()
    )
    root = settings.data_dir / "objects"
    return {artifact.filename: (root / artifact.object_key).read_bytes() for artifact in artifacts}


def test_a_job_runs_from_its_first_step_to_its_checkpoint(
    database: SyncDatabase, settings: Settings, script: Script
) -> None:
    job = run_to_end(database, settings, queue_job(database).id)
    assert job.status == JobStatus.SUCCEEDED
    assert [run["step"] for run in script.runs()] == [
        "resolve",
        "calibrate",
        "fit",
        "profile",
        "package",
        "evaluate",
    ]
    assert job.resolved["model"]["revision"] == "0123abcd"
    assert job.resolved["dataset"]["tokens"] == 256
    assert job.result is not None
    assert job.result.measured is not None
    assert job.result.measured["perplexity"] == 11.5
    # Later steps run on the revision that was resolved, not on the name that was asked for.
    assert script.runs("fit")[0]["request"]["model"]["revision"] == "0123abcd"
    assert sorted(script.runs("profile")[0]["request"]["inputs"]) == [
        "blocks.safetensors",
        "layer-000.safetensors",
        "layer-001.safetensors",
        "layer-002.safetensors",
    ]
    assert sorted(script.runs("package")[0]["request"]["inputs"]) == [
        "blocks.safetensors",
        "profile.json",
        "profile.safetensors",
    ]


def test_objects_lie_under_their_fence_and_no_work_folder_stays(
    database: SyncDatabase, settings: Settings, script: Script
) -> None:
    script.write({"step": "calibrate", "run": 0, "do": "die"})
    job = run_to_end(database, settings, queue_job(database).id)
    files = database.read(files_of_job, job.id, "calibrate")
    assert files["blocks.safetensors"].object_key.split("/")[3] == "3"  # claimed, lost, claimed
    assert [path for path in settings.work_dir.rglob("*") if path.is_file()] == []


def test_the_child_sees_no_secret_of_the_service(
    database: SyncDatabase, settings: Settings, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORTHOKV_DATABASE_URL", "postgresql://user:secret@host/db")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("HF_TOKEN", "for the child")
    named = settings.model_copy(update={"runner_environment": ("HF_TOKEN",)})
    run_to_end(database, named, queue_job(database).id)
    names = set(script.runs("resolve")[0]["environment"])
    assert not {name for name in names if name.startswith(("ORTHOKV_", "AWS_"))}
    assert {"PATH", "HF_TOKEN"} <= names


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    "fault",
    [
        {"step": "resolve", "run": 0, "do": "die"},
        {"step": "calibrate", "run": 0, "do": "die_in_a_line"},
        {"step": "fit", "run": 0, "do": "die", "layer": 0},
        {"step": "fit", "run": 0, "do": "die", "layer": 2},
        {"step": "package", "run": 0, "do": "transient"},
        {"step": "evaluate", "run": 0, "do": "out_of_memory"},
        {"step": "profile", "run": 0, "do": "full_disk"},
    ],
    ids=lambda fault: f"{fault['do']}-{fault['step']}-{fault.get('layer', '')}",
)
def test_a_fault_that_passes_costs_one_more_run_and_changes_no_byte(
    database: SyncDatabase, settings: Settings, script: Script, fault: dict[str, Any]
) -> None:
    script.write(fault)
    job = run_to_end(database, settings, queue_job(database).id)
    assert job.status == JobStatus.SUCCEEDED
    runs = script.runs()
    assert len(runs) == 7
    script.write()
    unbroken = run_to_end(database, settings, queue_job(database).id)
    assert contents(database, settings, job.id) == contents(database, settings, unbroken.id)
    if fault["step"] == "fit":
        first, second = (run["layers"] for run in runs if run["step"] == "fit")
        assert (first, second) == ([0, 1, 2], list(range(fault["layer"], 3)))


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    ("step", "do", "code", "runs"),
    [
        ("resolve", "user_error", JobErrorCode.MODEL_UNSUPPORTED, 1),
        ("package", "unreachable", JobErrorCode.BUDGET_UNREACHABLE, 1),
        ("calibrate", "babble", JobErrorCode.INTERNAL, 1),
        ("calibrate", "unknown_field", JobErrorCode.INTERNAL, 1),
        ("calibrate", "no_result", JobErrorCode.INTERNAL, 1),
        ("calibrate", "foreign_file", JobErrorCode.INTERNAL, 1),
        ("calibrate", "linked_file", JobErrorCode.INTERNAL, 1),
        ("calibrate", "slash_in_name", JobErrorCode.INTERNAL, 1),
        ("fit", "poison", JobErrorCode.INTERNAL, 2),
        ("calibrate", "out_of_memory", JobErrorCode.OUT_OF_MEMORY, 2),
        ("calibrate", "transient", JobErrorCode.STORAGE_ERROR, 3),
        ("calibrate", "full_disk", JobErrorCode.STORAGE_ERROR, 3),
        ("calibrate", "die", JobErrorCode.WORKER_LOST, 3),
    ],
)
def test_a_fault_that_stays_fails_the_job_with_its_code(
    database: SyncDatabase,
    settings: Settings,
    script: Script,
    step: str,
    do: str,
    code: JobErrorCode,
    runs: int,
) -> None:
    script.write(*({"step": step, "run": run, "do": do} for run in range(4)))
    job = run_to_end(database, settings, queue_job(database).id)
    assert job.status == JobStatus.FAILED
    assert job.error is not None
    assert job.error.code == code
    assert len(script.runs(step)) == runs
    assert job.error.best == (0.07 if do == "unreachable" else None)
    assert "/etc/passwd" not in job.error.message


def test_a_profile_outlives_a_budget_that_cannot_be_met(
    database: SyncDatabase, settings: Settings, script: Script
) -> None:
    script.write({"step": "package", "run": 0, "do": "unreachable"})
    failed = run_to_end(database, settings, queue_job(database).id)
    assert failed.result is not None
    assert failed.result.profile_id is not None
    body = CheckpointCreate.model_validate(
        {"budget": {"metric": "kept", "value": 0.5}, "rank_multiple": 16, "polish_steps": 7}
    )
    queued = database.write(
        create_checkpoint,
        profile_id=failed.result.profile_id,
        body=body,
        principal=local_principal(),
        settings=settings,
    )
    job = run_to_end(database, settings, queued.id)
    assert job.status == JobStatus.SUCCEEDED
    assert len(script.runs("fit")) == 1, "another budget fits nothing"
    package, evaluate = script.runs("package")[-1]["request"], script.runs("evaluate")[-1]["request"]
    target = package["target"]
    assert target["budget"] == {"metric": "kept", "value": 0.5}
    assert (target["grid"]["multiple"], target["polish_steps"]) == (16, 7)
    assert sorted(evaluate["inputs"]) == [
        "README.md",
        "SHA256SUMS",
        "blocks.safetensors",
        "orthokv.json",
        "orthokv.safetensors",
    ]


def test_a_cancel_kills_the_child(database: SyncDatabase, settings: Settings, script: Script) -> None:
    script.write({"step": "fit", "run": 0, "do": "hang", "layer": 1})
    job_id = queue_job(database).id
    with running(settings):
        until(lambda: script.is_hanging("fit"), "the child hangs")
        until(lambda: committed(database, job_id) == [0], "the first layer is safe")
        database.write(service.cancel, job_id=job_id, principal=local_principal())
        until(lambda: read_job(database, job_id).status == JobStatus.CANCELLED, "the job is cancelled")
    assert not alive(script.runs("fit")[0]["pid"])
    assert committed(database, job_id) == [0]


def test_a_lost_lease_kills_the_child_and_writes_nothing(
    database: SyncDatabase, settings: Settings, script: Script
) -> None:
    script.write({"step": "fit", "run": 0, "do": "hang", "layer": 1})
    job_id = queue_job(database).id
    with running(settings):
        until(lambda: script.is_hanging("fit"), "the child hangs")
        # Somebody else has the step: a higher fence and another owner.
        database.write(
            lambda session: session.execute(
                update(Step)
                .where(Step.status == "running")
                .values(fence=Step.fence + 1, lease_owner="other", lease_expires_at=now(3600.0))
            )
        )
        until(lambda: not alive(script.runs("fit")[0]["pid"]), "the child is killed")
    job = read_job(database, job_id)
    fit = next(step for step in job.steps if step.name == "fit")
    assert (job.status, fit.status, fit.failures) == (JobStatus.RUNNING, "running", 0)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_worker_without_a_heartbeat_gives_up_before_its_lease_ends(
    database: SyncDatabase, settings: Settings, script: Script
) -> None:
    script.write({"step": "fit", "run": 0, "do": "hang", "layer": 1})
    hasty = settings.model_copy(update={"lease_seconds": 3.0})
    queue_job(database)
    with running(hasty):
        until(lambda: script.is_hanging("fit"), "the child hangs")
        blocked_at = time.monotonic()
        # Nobody can write while this transaction lasts, so no heartbeat succeeds.
        database.write(
            lambda _session: until(lambda: not alive(script.runs("fit")[0]["pid"]), "the child is killed")
        )
        assert 0.5 < time.monotonic() - blocked_at < 3.0


def test_a_planned_stop_finishes_the_layer_and_costs_nothing(
    database: SyncDatabase, settings: Settings, script: Script
) -> None:
    # The last layer hangs, too, so that nothing of it is in the pipe when the child is stopped.
    script.write(
        {"step": "fit", "run": 0, "do": "hang_until_released", "layer": 1},
        {"step": "fit", "run": 0, "do": "hang", "layer": 2},
    )
    job_id = queue_job(database).id
    with running(settings) as supervisor:
        until(lambda: script.is_hanging("fit"), "the child hangs")
        until(lambda: committed(database, job_id) == [0], "the first layer is safe")
        supervisor.stop()
        script.go_on()
    job = read_job(database, job_id)
    fit = next(step for step in job.steps if step.name == "fit")
    assert (job.status, fit.status, fit.failures) == (JobStatus.QUEUED, "ready", 0)
    assert committed(database, job_id) == [0, 1]
    assert run_to_end(database, settings, job_id).status == JobStatus.SUCCEEDED
    assert [run["layers"] for run in script.runs("fit")] == [[0, 1, 2], [2]]


def test_a_planned_stop_does_not_wait_for_ever(
    database: SyncDatabase, settings: Settings, script: Script
) -> None:
    script.write({"step": "fit", "run": 0, "do": "hang", "layer": 1})
    job_id = queue_job(database).id
    with running(settings.model_copy(update={"drain_seconds": 0.1})):
        until(lambda: script.is_hanging("fit"), "the child hangs")
    job = read_job(database, job_id)
    fit = next(step for step in job.steps if step.name == "fit")
    assert (job.status, fit.status, fit.failures) == (JobStatus.QUEUED, "ready", 0)
    assert not alive(script.runs("fit")[0]["pid"])


def test_two_workers_share_one_job(database: SyncDatabase, settings: Settings, script: Script) -> None:
    script.write({"step": "fit", "run": 0, "do": "hang_until_released"}, layers=4)
    split = settings.model_copy(update={"layers_per_fit_step": 1})
    job_id = queue_job(database).id
    with running(split), running(split):
        until(lambda: script.is_hanging("fit"), "one worker is busy")
        until(lambda: len(script.runs("fit")) == 4, "the other fits the rest")
        script.go_on()
        until(lambda: read_job(database, job_id).status in TERMINAL, "the job ends")
    assert read_job(database, job_id).status == JobStatus.SUCCEEDED
    assert sorted(run["layers"] for run in script.runs("fit")) == [[0], [1], [2], [3]]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_grandchild_that_stays_behind_is_ended(
    database: SyncDatabase, settings: Settings, script: Script
) -> None:
    script.write({"step": "calibrate", "run": 0, "do": "leave_grandchild"})
    job = run_to_end(database, settings, queue_job(database).id)
    assert (script.folder / "had-grandchild").exists()
    assert job.status == JobStatus.SUCCEEDED


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_an_input_that_changed_in_the_store_is_not_used(
    database: SyncDatabase, settings: Settings, script: Script
) -> None:
    script.write({"step": "fit", "run": 0, "do": "user_error"})
    failed = run_to_end(database, settings, queue_job(database).id)
    blocks = database.read(files_of_job, failed.id, "calibrate")["blocks.safetensors"]
    (settings.data_dir / "objects" / blocks.object_key).write_bytes(b"tampered")
    database.write(service.retry, job_id=failed.id, principal=local_principal(), settings=settings)
    job = run_to_end(database, settings, failed.id)
    assert job.error is not None
    assert job.error.code == JobErrorCode.STORAGE_ERROR
    assert len(script.runs("fit")) == 1


def test_the_sweep_deletes_what_no_row_refers_to(
    database: SyncDatabase, settings: Settings, storage: Storage, script: Script, tmp_path: Path
) -> None:
    from datetime import timedelta

    script.write({"step": "profile", "run": 0, "do": "die"})
    job = run_to_end(database, settings, queue_job(database).id)
    expected = contents(database, settings, job.id)
    orphan = tmp_path / "orphan"
    orphan.write_bytes(b"uploaded, never committed")
    storage.put_file(f"jobs/{job.id}/step_x/1/layer-000.safetensors", orphan)
    storage.put_file("datasets/ds_x/up_x", orphan)
    assert sweep_orphans(database, storage, age=timedelta(hours=1)) == 0
    assert sweep_orphans(database, storage, age=timedelta(seconds=-5)) == 2
    assert contents(database, settings, job.id) == expected


def test_a_job_of_a_dataset_gets_its_bytes(
    database: SyncDatabase, settings: Settings, storage: Storage, script: Script, tmp_path: Path
) -> None:
    from app.datasets.models import Dataset
    from app.infra.database import clock
    from app.infra.ids import new_id
    from app.principal import DEFAULT_PROJECT_ID

    text = tmp_path / "text"
    text.write_text("calibration text")
    dataset_id = new_id("ds")
    stored = storage.put_file(f"datasets/{dataset_id}/up", text)
    database.write(
        lambda session: session.add(
            Dataset(
                id=dataset_id,
                project_id=DEFAULT_PROJECT_ID,
                filename="my text.txt",
                format="text",
                object_key=f"datasets/{dataset_id}/up",
                bytes=stored.bytes,
                sha256=stored.sha256,
                completed_at=clock(session),
            )
        )
    )
    dataset = {**job_body()["dataset"], "source": None, "id": dataset_id}
    run_to_end(database, settings, queue_job(database, dataset=dataset).id)
    (asked,) = script.runs("calibrate")[0]["request"]["dataset"]
    assert asked["format"] == "text"
    assert Path(asked["source"]).name == "dataset.text"
    assert script.runs("fit")[0]["request"]["dataset"][0]["source"] == dataset_id
