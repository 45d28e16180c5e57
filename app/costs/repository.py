"""Statements over what past steps have taken."""

from __future__ import annotations

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app.costs.models import RunCost
from app.costs.regression import Run
from app.jobs.models import Layer

_NEWEST = 200  # of each step: older runs were on older workers


def runs(session: Session, *, gpu_class: str, method: str, step: str) -> list[Run]:
    statement = (
        select(RunCost.flop, RunCost.seconds)
        .where(RunCost.gpu_class == gpu_class, RunCost.method == method, RunCost.step == step)
        .order_by(RunCost.id.desc())
        .limit(_NEWEST)
    )
    return [Run(row[0], row[1]) for row in session.execute(statement)]


def count_layers_of_attempt(session: Session, *, step_id: str, fence: int) -> int:
    statement = select(func.count()).where(Layer.step_id == step_id, Layer.fence == fence)
    return session.execute(statement).scalar_one()
