"""Noting what a step has taken, in the transaction that ends it."""

from __future__ import annotations

from sqlalchemy.orm import Session

from app.costs import repository
from app.costs.arithmetic import Asked, Shape, flop
from app.costs.models import RunCost
from app.infra.database import clock
from app.infra.ids import new_id
from app.jobs.models import Job, Step
from app.jobs.schemas import CompressSpec
from app.jobs.vocabulary import JobKind, StepName

_SHORTEST_SECONDS = 0.001  # the resolution of SQLite's clock


def note_cost(session: Session, job: Job, step: Step) -> None:
    """Keep the seconds since the claim, beside the work done in them. Locked rows of a step that has just succeeded."""
    shape = Shape.of_resolved(job.resolved)
    if job.kind != JobKind.COMPRESS or shape is None or step.started_at is None:
        return
    asked, name = Asked.of(CompressSpec.model_validate(job.spec)), StepName(step.name)
    layers = None
    if name is StepName.FIT:
        layers = repository.count_layers_of_attempt(session, step_id=step.id, fence=step.fence)
        if layers == 0:
            return  # the worker before this one had fitted them all
    seconds = (clock(session) - step.started_at).total_seconds()
    session.add(
        RunCost(
            id=new_id("cost"),
            gpu_class=job.gpu_class,
            method=asked.method,
            step=name,
            flop=flop(shape, asked, name, layers=layers),
            seconds=max(seconds, _SHORTEST_SECONDS),
        )
    )
