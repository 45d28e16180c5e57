"""The edges of jobs and steps, and that nothing but `states.py` walks them."""

from __future__ import annotations

import ast
from itertools import product
from pathlib import Path

import pytest
from sqlalchemy.orm import Session

import app
import workers
from app.infra.database import SyncDatabase
from app.jobs.repository import events_after, lock_job, steps_of
from app.jobs.states import IllegalTransition, move_step, transition
from app.jobs.vocabulary import (
    JOB_EDGES,
    STEP_EDGES,
    TERMINAL,
    JobErrorCode,
    JobStatus,
    StepName,
    StepStatus,
)
from tests.support.factories import complete, queue_job


def test_every_status_has_edges_and_every_job_can_end() -> None:
    assert set(JOB_EDGES) == set(JobStatus)
    assert set(STEP_EDGES) == set(StepStatus)
    for status in set(JobStatus) - TERMINAL:
        assert reachable(status) & TERMINAL


def reachable(status: JobStatus) -> set[JobStatus]:
    seen = {status}
    while new := {after for one in seen for after in JOB_EDGES[one]} - seen:
        seen |= new
    return seen


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    ("old", "new"), [pair for pair in product(JobStatus, JobStatus) if pair[1] not in JOB_EDGES[pair[0]]]
)
def test_a_job_cannot_leave_its_edges(database: SyncDatabase, old: JobStatus, new: JobStatus) -> None:
    job_id = queue_job(database).id

    def move(session: Session) -> None:
        job = lock_job(session, job_id)
        assert job is not None
        setattr(job, "status", old)  # noqa: B010  # the forbidden way, to get there
        with pytest.raises(IllegalTransition):
            transition(session, job, new, event="job.test")

    database.write(move)


def test_a_step_that_leaves_running_loses_its_lease_and_its_fence(database: SyncDatabase) -> None:
    from tests.support.factories import must_claim

    job_id = queue_job(database).id
    lease = must_claim(database)

    def move(session: Session) -> None:
        step = steps_of(session, [job_id])[0]
        move_step(session, step, StepStatus.READY)
        assert (step.fence, step.lease_owner, step.lease_expires_at) == (lease.fence + 1, None, None)
        with pytest.raises(IllegalTransition):
            move_step(session, step, StepStatus.SUCCEEDED)

    database.write(move)


def test_events_of_a_whole_job_have_no_gap_and_one_end(database: SyncDatabase) -> None:
    job = complete(database, queue_job(database).id)
    assert job.status == JobStatus.SUCCEEDED
    events = database.read(events_after, job.id, after=0, limit=1000)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    types = [event.type for event in events]
    assert types[:2] == ["job.created", "job.started"]
    assert types.count("job.succeeded") == 1
    assert types[-1] == "job.succeeded"
    assert types.count("layer.committed") == 3
    assert job.version >= len(events)


def test_steps_run_in_the_order_of_their_names() -> None:
    assert [name.stage for name in StepName] == sorted(name.stage for name in StepName)
    assert len({code.value for code in JobErrorCode}) == len(JobErrorCode)


def python_files() -> list[Path]:
    folders = [Path(package.__path__[0]) for package in (app, workers)]
    return [file for folder in folders for file in folder.rglob("*.py")]


def assigns_status(node: ast.AST) -> bool:
    """Whether a node is `x.status = ...`, `setattr(x, "status", ...)` or `.values(status=...)`."""
    match node:
        case ast.Assign(targets=targets):
            flat = [one for target in targets for one in ast.walk(target)]
            return any(isinstance(one, ast.Attribute) and one.attr == "status" for one in flat)
        case (
            ast.AugAssign(target=ast.Attribute(attr="status"))
            | ast.AnnAssign(target=ast.Attribute(attr="status"))
        ):
            return True
        case ast.Call(func=ast.Name(id="setattr"), args=[_, ast.Constant(value="status"), _]):
            return True
        case ast.Call(func=ast.Attribute(attr="values"), keywords=keywords):
            return any(keyword.arg == "status" for keyword in keywords)
    return False


def test_only_states_assigns_a_status_and_only_the_claim_updates_one() -> None:
    found = {
        (file.parent.name, file.name)
        for file in python_files()
        for node in ast.walk(ast.parse(file.read_text()))
        if assigns_status(node)
        # A problem's status is an HTTP status.
        and file.name not in {"errors.py", "client.py"}
        and file.parent.name != "webhooks"  # a delivery's status is its own
    }
    assert found == {("jobs", "states.py"), ("jobs", "repository.py")}
