"""Bodies of jobs."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from app.infra.ids import id_pattern
from app.jobs.models import Job as JobRow
from app.jobs.models import Step as StepRow
from app.jobs.vocabulary import INPUT_FAULTS, TERMINAL, JobErrorCode, JobKind, JobStatus, StepStatus
from app.schemas import Body, Metadata, Resource, TargetFields
from app.settings import DEFAULT_GPU_CLASS, GpuClass
from orthokv.spec.methods import default_steps
from orthokv.spec.settings import FitSettings
from orthokv.spec.vocabulary import KeyMode, MethodName, Parameterisation, SharingChoice


class ModelRef(Body):
    """A model of the hub, or a folder of the server's machine where the server allows that."""

    id: Annotated[str, Field(min_length=1, max_length=1024, examples=["org/name"])]
    revision: Annotated[str, Field(min_length=1, max_length=255)] | None = None


class TextRef(Body):
    """A text: an uploaded dataset, or what the model writes itself."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": ["id"], "properties": {"id": {"type": "string"}, "source": {"type": "null"}}},
                {"required": ["source"], "properties": {"source": {"const": "self"}, "id": {"type": "null"}}},
            ]
        }
    )

    id: Annotated[str, Field(pattern=id_pattern("ds"))] | None = None
    source: Literal["self"] | None = Field(None, description="`self`: the model samples its own text.")
    field: Annotated[str, Field(min_length=1, max_length=128)] = "text"

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.id is None) == (self.source is None):
            raise ValueError("give either id or source")
        return self


class DatasetRef(TextRef):
    """Which text to calibrate on, and how much of it."""

    num_samples: Annotated[int, Field(ge=1, le=65_536)] = 64
    sequence_length: Annotated[int, Field(ge=2, le=131_072)] = 1024
    also: Annotated[list[TextRef], Field(max_length=7)] = Field(
        [], description="Other texts, mixed in so that all have equal parts of the samples."
    )

    @property
    def texts(self) -> list[TextRef]:
        return [TextRef(id=self.id, source=self.source, field=self.field), *self.also]

    @model_validator(mode="after")
    def _mixed(self) -> Self:
        texts = self.texts
        if any(texts.count(text) > 1 for text in texts):
            raise ValueError("a text is named twice")
        if len(texts) > self.num_samples:
            raise ValueError(f"{self.num_samples} samples cannot be shared among {len(texts)} texts")
        return self


class Method(Body):
    """How the bases are fitted."""

    type: MethodName = "oblique"
    sharing: SharingChoice = Field(
        "joint",
        description="Which heads of a layer share a basis; `auto`: each layer has its best group of 2, 4 or all.",
    )
    key_mode: KeyMode = "pre"
    parameterisation: Parameterisation = "direct"
    steps: Annotated[int, Field(ge=1, le=1_000_000)] | None = Field(
        None, description="Optimisation steps per layer; absent: the method's own."
    )
    refine_steps: Annotated[int, Field(ge=0, le=1_000_000)] | None = Field(
        None, description="Steps of the last stage, all layers together; 0: none; absent: the method's own."
    )
    positions: Annotated[int, Field(ge=2)] | None = Field(
        None,
        description="Key mode `post` only, whose bases depend on positions: calibrate on positions 0 to this, exclusive, "
        "which should be the longest context to be served; absent: the model's longest.",
    )

    @model_validator(mode="after")
    def _effective(self) -> Self:
        if self.positions is not None and self.key_mode != "post":
            raise ValueError("positions has no effect in key mode pre")
        return self

    def settings(self, *, num_samples: int, sequence_length: int, seed: int) -> FitSettings:
        """What a fit is told, as the library has it; `InvalidSetting` (a ValueError) for what it refuses."""
        predictor = self.parameterisation == "predictor"
        return FitSettings(
            method=self.type,
            sharing=self.sharing,
            key_mode=self.key_mode,
            # What every method does unless it is told otherwise has no word in the library; a predictor's step is an epoch.
            parameterisation=self.parameterisation if predictor else None,
            epochs=self.steps if predictor else None,
            steps=None if predictor else self.steps,
            refine_steps=self.refine_steps,
            num_samples=num_samples,
            sequence_length=sequence_length,
            positions=self.positions,
            seed=seed,
        )


class JobCreate(TargetFields, Body):
    """A model, a dataset and an error budget."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": {"id": "org/name"},
                    "dataset": {"source": "self", "num_samples": 16, "sequence_length": 512},
                    "budget": {"metric": "kept", "value": 0.25},
                }
            ]
        }
    )

    model: ModelRef
    dataset: DatasetRef
    method: Method = Method()
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    metadata: Metadata = Field(default_factory=dict)
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    gpu_class: GpuClass = Field(
        DEFAULT_GPU_CLASS, description="Which workers may run the job: one of the server's classes."
    )
    max_runtime_minutes: Annotated[int, Field(ge=1, le=525_600)] | None = Field(
        None,
        description="Fail the job with `time_limit_exceeded` this long after its first step has begun; "
        "absent: the server's own limit, if it has one.",
    )

    @model_validator(mode="after")
    def _can_work(self) -> Self:
        # Here and not in `Method`: a stored job is shown as it was asked for.
        method = self.method
        if method.parameterisation == "predictor" and method.type != "stiefel":
            raise ValueError(f"method {method.type} has no predictor")
        if method.steps is not None and default_steps(method.type) == 0:
            raise ValueError(f"method {method.type} is a closed form and has no steps")
        self.target()
        if self.dataset.num_samples < 2:
            raise ValueError("num_samples must be at least 2: one is held out")
        method.settings(
            num_samples=self.dataset.num_samples,
            sequence_length=self.dataset.sequence_length,
            seed=self.seed,
        )
        return self


class CheckpointSpec(TargetFields, Resource):
    """What a job of kind `checkpoint` was asked for."""

    profile_id: str


class CompressSpec(TargetFields, Resource):
    """What a job of kind `compress` was asked for."""

    model: ModelRef
    dataset: DatasetRef
    method: Method
    seed: int

    def settings(self) -> FitSettings:
        """What the fit is told."""
        return self.method.settings(
            num_samples=self.dataset.num_samples,
            sequence_length=self.dataset.sequence_length,
            seed=self.seed,
        )


class JobProgress(Resource):
    done: int
    total: int
    unit: str = Field(examples=["layer"])
    fraction: float


class JobError(Resource):
    """Why a job failed. `best` is the closest that a budget out of reach can be met."""

    code: JobErrorCode = Field(json_schema_extra={"x-input-faults": [*sorted(INPUT_FAULTS)]})
    message: str
    retryable: bool
    phase: str
    layer: int | None
    attempt: int
    best: float | None


class JobResult(Resource):
    """What a job has made so far; the profile stays useful when a later step fails."""

    profile_id: str | None = None
    checkpoint_id: str | None = None
    plan: dict[str, Any] | None = None
    measured: dict[str, Any] | None = None


class Step(Resource):
    """One unit of a job's work."""

    name: str
    layers: list[int] | None
    status: StepStatus
    attempts: int
    failures: int
    started_at: datetime | None
    finished_at: datetime | None


class Links(Resource):
    self: str
    events: str
    layers: str


class Job(Resource):
    """A request for a compressed cache and what became of it."""

    object: Literal["job"] = "job"
    id: str
    kind: JobKind
    status: JobStatus = Field(json_schema_extra={"x-ended": [*sorted(TERMINAL)]})
    phase: str = Field(description="An open vocabulary: tolerate phases you do not know.")
    version: int = Field(description="Rises with every change; `?wait=&if_version=` waits for the next one.")
    attempt: int
    priority: int
    gpu_class: str
    progress: JobProgress | None
    spec: CompressSpec | CheckpointSpec
    resolved: dict[str, Any] = Field(description="What was really run: revision, digests, geometry.")
    result: JobResult | None
    error: JobError | None
    steps: list[Step]
    metadata: dict[str, str]
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    cancel_requested_at: datetime | None
    max_runtime_minutes: int | None = None
    deadline_at: datetime | None = Field(None, description="When the job's time is up, once it has begun.")
    links: Links

    @property
    def ended(self) -> bool:
        return self.status in TERMINAL

    @classmethod
    def of(cls, row: JobRow, steps: Iterable[StepRow]) -> Job:
        spec = CompressSpec if row.kind == JobKind.COMPRESS else CheckpointSpec
        path = f"/v1/jobs/{row.id}"
        return cls(
            id=row.id,
            kind=JobKind(row.kind),
            status=JobStatus(row.status),
            phase=row.phase,
            version=row.version,
            attempt=row.attempt,
            priority=row.priority,
            gpu_class=row.gpu_class,
            progress=_progress(row.progress),
            spec=spec.model_validate(row.spec),
            resolved=row.resolved,
            result=None if row.result is None else JobResult.model_validate(row.result),
            error=None if row.error is None else JobError.model_validate(row.error),
            steps=[Step.model_validate(step) for step in steps],
            metadata=row.labels,
            created_at=row.created_at,
            started_at=row.started_at,
            finished_at=row.finished_at,
            cancel_requested_at=row.cancel_requested_at,
            max_runtime_minutes=row.max_runtime_minutes,
            deadline_at=row.deadline_at,
            links=Links(self=path, events=f"{path}/events", layers=f"{path}/layers"),
        )


class Layer(Resource):
    """A fitted layer that is safe, whatever happens to the job."""

    object: Literal["layer"] = "layer"
    layer: int
    artifact_id: str
    bytes: int
    sha256: str
    metrics: dict[str, Any]
    attempt: int
    committed_at: datetime


class LayerList(Resource):
    """All committed layers of a job, in order."""

    object: Literal["list"] = "list"
    data: list[Layer]


class Event(Resource):
    """One line of a job's history; `seq` has no gaps."""

    object: Literal["event"] = "event"
    seq: int
    type: str = Field(
        examples=["layer.committed"], description="An open vocabulary: ignore types you do not know."
    )
    data: dict[str, Any]
    created_at: datetime


class EventPage(Resource):
    """Events in order. Ask for the next page with `after=last_seq` while `has_more`."""

    object: Literal["list"] = "list"
    data: list[Event]
    last_seq: int
    has_more: bool


def _progress(value: dict[str, Any] | None) -> JobProgress | None:
    if value is None:
        return None
    fraction = value["done"] / value["total"] if value["total"] else 0.0
    return JobProgress(**value, fraction=min(1.0, fraction))
