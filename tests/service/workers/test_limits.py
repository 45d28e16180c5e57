"""What a step may take, and what becomes of a job whose step takes more: a precise code, and a worker that lives."""

from __future__ import annotations

import errno
import io
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from app.infra.database import SyncDatabase
from app.jobs.vocabulary import JobErrorCode, JobStatus, StepName
from app.settings import Settings
from tests.service.workers.test_supervisor import alive, run_to_end, running, until
from tests.support.factories import Script, queue_job, read_job
from tests.support.requests import step_request
from workers.cli import worker
from workers.limits import OPEN_FILES, CannotIsolate, Limits, memory_of_session, require_isolation

MEBIBYTE = 1 << 20


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    ("do", "limit", "code", "said", "runs"),
    [
        ("eat_memory", {"step_memory_bytes": 80 * MEBIBYTE}, JobErrorCode.OUT_OF_MEMORY, "83886080 bytes", 2),
        (
            "eat_memory_in_a_grandchild",
            {"step_memory_bytes": 80 * MEBIBYTE},
            JobErrorCode.OUT_OF_MEMORY,
            "83886080 bytes",
            2,
        ),
        ("write_much", {"step_file_bytes": 3 * MEBIBYTE}, JobErrorCode.STORAGE_ERROR, "File too large", 1),
        ("hang", {"step_seconds": 1.0}, JobErrorCode.STEP_TIMEOUT, "more than 1 seconds", 1),
    ],
)
def test_a_step_that_takes_too_much_fails_its_job_and_not_the_worker(
    database: SyncDatabase,
    settings: Settings,
    script: Script,
    do: str,
    limit: dict[str, Any],
    code: JobErrorCode,
    said: str,
    runs: int,
) -> None:
    script.write(*({"step": "calibrate", "run": run, "do": do} for run in range(3)))
    greedy, modest = queue_job(database).id, queue_job(database).id
    with running(settings.model_copy(update=limit)):
        until(lambda: read_job(database, greedy).status == JobStatus.FAILED, "the job fails")
        script.write()
        until(lambda: read_job(database, modest).status == JobStatus.SUCCEEDED, "the worker goes on")
    error = read_job(database, greedy).error
    assert error is not None
    assert error.code == code
    assert said in error.message
    of_greedy = [run for run in script.runs("calibrate") if run["request"]["job_id"] == greedy]
    assert len(of_greedy) == runs
    assert not any(alive(run["pid"]) for run in of_greedy)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_fit_step_that_takes_too_long_keeps_its_layers(
    database: SyncDatabase, settings: Settings, script: Script
) -> None:
    script.write({"step": "fit", "run": 0, "do": "hang", "layer": 1})
    job = run_to_end(database, settings.model_copy(update={"step_seconds": 2.0}), queue_job(database).id)
    assert job.error is not None
    assert job.error.code == JobErrorCode.STEP_TIMEOUT
    assert job.progress is not None
    assert job.progress.done == 1


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_child_is_confined(database: SyncDatabase, settings: Settings, script: Script) -> None:
    run_to_end(
        database, settings.model_copy(update={"step_file_bytes": 5 * MEBIBYTE}), queue_job(database).id
    )
    for run in script.runs():
        assert run["limits"]["CORE"] == [0, 0]
        assert run["limits"]["FSIZE"] == [5 * MEBIBYTE] * 2
        assert run["limits"]["NOFILE"][0] <= OPEN_FILES
        assert run["umask"] == 0o077
        assert run["no_new_privs"]
        # A folder of its own for what it writes aside, gone with the step.
        assert Path(run["temporary"]).is_relative_to(settings.work_dir)
        assert not Path(run["temporary"]).exists()


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("isolate", [False, True])
def test_steps_have_no_network_where_they_shall_have_none(
    database: SyncDatabase, settings: Settings, script: Script, isolate: bool
) -> None:
    if isolate:
        try:
            require_isolation()
        except CannotIsolate as refused:
            pytest.skip(str(refused))
    job = run_to_end(database, settings.model_copy(update={"isolate_steps": isolate}), queue_job(database).id)
    assert job.status == JobStatus.SUCCEEDED
    for run in script.runs():
        alone = isolate and run["step"] != "resolve"
        assert run["network"] == ("ENETUNREACH" if alone else "ECONNREFUSED"), run["step"]
        assert ("HF_HUB_OFFLINE" in run["environment"]) >= alone


def test_a_worker_that_cannot_keep_steps_from_the_network_says_so_and_does_not_start(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "refusing.py").write_text("import sys; sys.exit('no namespace without a network: refused')")
    monkeypatch.setattr("workers.limits.TETHER", tmp_path / "refusing.py")
    monkeypatch.setenv("ORTHOKV_DATABASE_URL", settings.resolved_database_url)
    monkeypatch.setenv("ORTHOKV_DATA_DIR", str(settings.data_dir))
    monkeypatch.setenv("ORTHOKV_ISOLATE_STEPS", "true")
    command = typer.Typer()
    command.command()(worker)
    result = CliRunner().invoke(command)
    assert result.exit_code == 2
    assert result.stderr == (
        "orthokv: ORTHOKV_ISOLATE_STEPS cannot be kept here: no namespace without a network: refused\n"
    )


def test_memory_that_is_held_counts_and_mapped_files_do_not(tmp_path: Path) -> None:
    import mmap

    file = tmp_path / "weights"
    file.write_bytes(b"x" * (64 * MEBIBYTE))
    session = os.getsid(0)
    before = memory_of_session(session)
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[:: mmap.PAGESIZE]) > 0
        with_file = memory_of_session(session)
    held = bytearray(b"x" * (64 * MEBIBYTE))
    with_memory = memory_of_session(session)
    del held
    assert with_file - before < 32 * MEBIBYTE
    assert with_memory - before > 48 * MEBIBYTE


def test_without_a_limit_of_its_own_a_step_may_have_nearly_all_memory() -> None:
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Limits.of(Settings(), StepName.FIT).memory_bytes
    assert limit is not None
    assert 0 < limit < machine
    assert Limits.of(Settings(step_memory_bytes=7), StepName.FIT).memory_bytes == 7


@pytest.mark.parametrize(
    ("number", "again"), [(errno.EFBIG, False), (errno.ENOSPC, True)], ids=["too-large", "disk-full"]
)
def test_the_runner_tells_a_file_too_large_from_a_full_disk(
    monkeypatch: pytest.MonkeyPatch, number: int, again: bool
) -> None:
    from workers import runner

    def step(_job: object) -> dict[str, Any]:
        raise OSError(number, os.strerror(number))

    monkeypatch.setitem(runner.STEPS, "resolve", step)
    said = io.StringIO()
    assert runner.run(step_request("resolve"), runner.Wire(said)) == 1
    message = json.loads(said.getvalue().splitlines()[-1])
    assert (message["code"], message["retryable"]) == ("storage_error", again)


def test_the_hub_is_out_of_reach_once_the_model_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    from tests.support.paths import DEMO
    from workers import runner

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    job = runner.Job(step_request("resolve", model=str(DEMO)), runner.Wire(io.StringIO()))
    assert job.source().files
    with pytest.raises(OfflineModeIsEnabled):
        HfApi().model_info("org/model")


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_what_a_step_leaves_is_its_users_alone(
    database: SyncDatabase, settings: Settings, script: Script
) -> None:
    script.write({"step": "calibrate", "run": 0, "do": "hang"})
    queue_job(database)
    with running(settings.model_copy(update={"drain_seconds": 0.1})):
        until(lambda: script.is_hanging("calibrate"), "the child hangs")
        folders = [path for path in settings.work_dir.rglob("*") if path.is_dir()]
        assert folders
        assert {stat.S_IMODE(path.stat().st_mode) for path in [settings.work_dir, *folders]} == {0o700}
