"""How a job unfolds into steps."""

from __future__ import annotations

from sqlalchemy.orm import Session

from app.infra.database import now
from app.infra.ids import new_id
from app.jobs import repository
from app.jobs.models import Job, Step
from app.jobs.states import move_step
from app.jobs.vocabulary import JobKind, StepName, StepStatus

_STEPS: dict[JobKind, tuple[StepName, ...]] = {
    # The fit steps come between calibrate and profile, once resolve knows how many layers there are.
    JobKind.COMPRESS: (
        StepName.RESOLVE,
        StepName.CALIBRATE,
        StepName.PROFILE,
        StepName.PACKAGE,
        StepName.EVALUATE,
    ),
    JobKind.CHECKPOINT: (StepName.PACKAGE, StepName.EVALUATE),
}


def first_step(kind: JobKind) -> StepName:
    return _STEPS[kind][0]


def add_first_steps(session: Session, job: Job) -> None:
    """The steps that are known when the job is created; the first is ready at once."""
    for position, name in enumerate(_STEPS[JobKind(job.kind)]):
        _add(session, job, name, StepStatus.READY if position == 0 else StepStatus.PENDING)


def add_fit_steps(session: Session, job: Job, *, layers: int, layers_per_step: int | None) -> None:
    """One fit step per range of layers, independent of each other."""
    size = layers_per_step or layers
    for ordinal, start in enumerate(range(0, layers, size)):
        covered = list(range(start, min(start + size, layers)))
        _add(session, job, StepName.FIT, StepStatus.PENDING, ordinal=ordinal, layers=covered)


def open_next_stage(session: Session, job: Job) -> bool:
    """Make the next stage ready when every step before it has succeeded; False when the whole job has."""
    unfinished = [
        step for step in repository.steps_of(session, [job.id]) if step.status != StepStatus.SUCCEEDED
    ]
    if not unfinished:
        return False
    stage = min(step.stage for step in unfinished)
    for step in unfinished:
        if step.stage == stage and step.status == StepStatus.PENDING:
            step.not_before = now()  # it waits from here on, not since the job was made
            move_step(session, step, StepStatus.READY)
    return True


def reopen(session: Session, job: Job) -> None:
    """Give steps that failed or were cancelled another try; what has succeeded stays."""
    for step in repository.steps_of(session, [job.id]):
        if step.status in (StepStatus.FAILED, StepStatus.CANCELLED):
            step.failures = 0
            move_step(session, step, StepStatus.PENDING)
    open_next_stage(session, job)


def _add(
    session: Session,
    job: Job,
    name: StepName,
    status: StepStatus,
    *,
    ordinal: int = 0,
    layers: list[int] | None = None,
) -> None:
    session.add(
        Step(
            id=new_id("step"),
            job_id=job.id,
            name=name,
            stage=name.stage,
            ordinal=ordinal,
            layers=layers,
            status=status,
            precedence=-job.priority,
            gpu_class=job.gpu_class,
        )
    )
