"""What a job would cost, and whether it would be taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy.orm import Session

from app.costs import priors, repository
from app.costs.arithmetic import Asked, Shape, flop, group_width
from app.costs.probe import Known, Unfit
from app.costs.regression import MIN_RUNS, Band, predict
from app.costs.schemas import Estimate, Minutes, Validation, ValidationProblem
from app.http.errors import Problem
from app.jobs import service as jobs
from app.jobs.schemas import JobCreate
from app.jobs.vocabulary import JobErrorCode, StepName
from app.principal import Principal
from app.quotas.service import largest_model
from app.settings import Settings

_FLOAT = 4
_INDEX = 8  # bytes of a stored token
_KINDS = 2  # keys and values


def validate(
    session: Session, *, body: JobCreate, known: Known | Unfit, principal: Principal, settings: Settings
) -> Validation:
    """Every refusal of `POST /v1/jobs` at once, and the estimate. Writes nothing."""
    problems = [_shown(problem) for problem in jobs.refusals(session, body, principal, settings)]
    if isinstance(known, Unfit):
        problems.append(ValidationProblem(code=known.code, detail=str(known)))
        known = Known("nothing")
    limit = largest_model(session, project_id=principal.project_id, settings=settings)
    if limit is not None and known.weight_bytes is not None and known.weight_bytes > limit:
        detail = f"The model has {known.weight_bytes} bytes of weights; the project may use {limit}."
        problems.append(ValidationProblem(code=JobErrorCode.MODEL_TOO_LARGE, detail=detail))
    estimate = estimate_of(session, body=body, known=known)
    return Validation(valid=not problems, problems=problems, estimate=estimate)


def estimate_of(session: Session, *, body: JobCreate, known: Known) -> Estimate:
    """What is to be expected of a job over this model."""
    asked, shape = Asked.of(body), known.shape
    common: dict[str, Any] = {
        "gpu_class": body.gpu_class,
        "known_from": known.source,
        "tokens": asked.tokens,
        "download_bytes": known.download_bytes,
    }
    if shape is None or known.weight_bytes is None:
        names = ("layers", "parameters", "gpu_memory_bytes", "host_memory_bytes", "artifact_bytes", "minutes")
        return Estimate(**common, **dict.fromkeys(names), basis="unknown: the model's shape is not known")
    stored = known.weight_bytes / shape.parameters
    band, basis = _seconds(session, shape, asked, gpu_class=body.gpu_class)
    return Estimate(
        **common,
        layers=shape.layers,
        parameters=shape.parameters,
        gpu_memory_bytes=round(known.weight_bytes + _activations(shape, asked, stored)),
        host_memory_bytes=round(
            priors.PROCESS_BYTES + _FLOAT * shape.parameters + _activations(shape, asked, _FLOAT)
        ),
        artifact_bytes=_artifacts(shape, asked, body) + (known.weight_bytes if body.form == "full" else 0),
        minutes=Minutes(low=_minutes(band.low), likely=_minutes(band.likely), high=_minutes(band.high)),
        basis=basis,
    )


def _seconds(session: Session, shape: Shape, asked: Asked, *, gpu_class: str) -> tuple[Band, str]:
    work = {step: flop(shape, asked, step) for step in StepName}
    past = {
        step: [
            run
            for run in repository.runs(session, gpu_class=gpu_class, method=asked.method, step=step)
            # A run without arithmetic says nothing of one that has some: checkpoints with a polish, and without.
            if run.flop > 0 or work[step] == 0
        ]
        for step in work
    }
    fewest = min(map(len, past.values()))
    if fewest < MIN_RUNS:
        return priors.expect(sum(work.values()), steps=len(work)), f"priors: {priors.MEASURED_ON}"
    bands = [predict(past[step], work[step]) for step in work]
    return _total(bands), f"fitted to {fewest} past runs"


def _total(bands: Sequence[Band]) -> Band:
    """Wider than the sum of steps that vary on their own would have to be: a slow worker is slow in all of them."""
    total = bands[0]
    for band in bands[1:]:
        total = total + band
    return total


def _activations(shape: Shape, asked: Asked, number: float) -> float:
    """As in docs/large-models.md: hidden states of the fit or of the sensitivities, and the logits of a block."""
    fitting = 2.0 * asked.tokens * shape.hidden
    sensitivities = (shape.layers + 3) * 2.0 * asked.length * shape.hidden
    logits = 2.0 * asked.length * shape.vocabulary
    return max(fitting, sensitivities) * number + logits * _FLOAT


def _artifacts(shape: Shape, asked: Asked, body: JobCreate) -> int:
    """Square bases of every group, as fitted and again in the profile, and what a checkpoint keeps of them.

    An oblique basis is two matrices: into the cache and out of it.
    """
    width = group_width(shape, asked.sharing)
    matrices = 2 if asked.method == "oblique" else 1
    bases = shape.layers * _KINDS * shape.kv_width * width * matrices * _FLOAT
    kept = body.budget.value if body.budget.metric == "kept" else 1.0
    return round(bases * (2 + kept)) + asked.tokens * _INDEX


def _minutes(seconds: float) -> float:
    return round(seconds / 60, 2)


def _shown(problem: Problem) -> ValidationProblem:
    return ValidationProblem(code=problem.code, detail=problem.detail, errors=problem.errors)
