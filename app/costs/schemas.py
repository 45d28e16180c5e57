"""Bodies of what a job would cost."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from app.http.errors import FieldProblem
from app.schemas import Resource


class Minutes(Resource):
    """Time of one worker, without any wait in the queue."""

    low: float
    likely: float
    high: float


class Estimate(Resource):
    """What a job would take. `null` is what cannot be known."""

    gpu_class: str
    known_from: Literal["files", "config", "nothing"] = Field(
        description="What of the model was looked at: its files, the hub's `config.json` alone, or nothing."
    )
    tokens: int = Field(description="Calibration tokens asked for; a shorter text gives fewer.")
    layers: int | None
    parameters: int | None
    download_bytes: int | None = Field(description="Weights that a worker without them has to fetch.")
    gpu_memory_bytes: int | None = Field(
        description="Peak on a GPU that holds the whole model; with less, a worker streams it from disk."
    )
    host_memory_bytes: int | None = Field(
        description="Peak on a worker that computes on its CPU, in float32, with the whole model in memory."
    )
    artifact_bytes: int | None = Field(description="Files that the job would leave in the store.")
    minutes: Minutes | None
    basis: str = Field(
        description="Where the minutes come from: `fitted to N past runs` of the class and method, or `priors`.",
        examples=["fitted to 12 past runs"],
    )


class ValidationProblem(Resource):
    """Why the job would be refused, or would fail at once."""

    code: str = Field(description="A code of problems or of jobs that failed.", examples=["queue_full"])
    detail: str
    errors: list[FieldProblem] = Field(default_factory=list)


class Validation(Resource):
    """What would become of a request. Nothing was stored."""

    object: Literal["validation"] = "validation"
    valid: bool
    problems: list[ValidationProblem]
    estimate: Estimate
