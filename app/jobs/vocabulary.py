"""The closed words of jobs: statuses with their allowed changes, steps with their order, error codes."""

from __future__ import annotations

from enum import StrEnum


class JobKind(StrEnum):
    COMPRESS = "compress"
    CHECKPOINT = "checkpoint"
    """Another budget for a stored profile: nothing is fitted."""


class JobStatus(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class StepStatus(StrEnum):
    PENDING = "pending"
    """An earlier stage has not succeeded yet."""
    READY = "ready"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


JOB_EDGES: dict[JobStatus, frozenset[JobStatus]] = {
    JobStatus.QUEUED: frozenset({JobStatus.RUNNING, JobStatus.CANCELLED}),
    JobStatus.RUNNING: frozenset(
        {JobStatus.QUEUED, JobStatus.CANCELLING, JobStatus.CANCELLED, JobStatus.SUCCEEDED, JobStatus.FAILED}
    ),
    JobStatus.CANCELLING: frozenset({JobStatus.CANCELLED}),
    JobStatus.SUCCEEDED: frozenset(),
    JobStatus.FAILED: frozenset({JobStatus.QUEUED}),
    JobStatus.CANCELLED: frozenset({JobStatus.QUEUED}),
}

STEP_EDGES: dict[StepStatus, frozenset[StepStatus]] = {
    StepStatus.PENDING: frozenset({StepStatus.READY, StepStatus.CANCELLED}),
    StepStatus.READY: frozenset({StepStatus.RUNNING, StepStatus.CANCELLED}),
    StepStatus.RUNNING: frozenset(
        {StepStatus.READY, StepStatus.SUCCEEDED, StepStatus.FAILED, StepStatus.CANCELLED}
    ),
    StepStatus.SUCCEEDED: frozenset(),
    StepStatus.FAILED: frozenset({StepStatus.READY, StepStatus.PENDING}),
    StepStatus.CANCELLED: frozenset({StepStatus.READY, StepStatus.PENDING}),
}

TERMINAL = frozenset({JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED})
ENDED_STEPS = frozenset({StepStatus.SUCCEEDED, StepStatus.FAILED, StepStatus.CANCELLED})


class StepName(StrEnum):
    RESOLVE = "resolve"
    CALIBRATE = "calibrate"
    FIT = "fit"
    PROFILE = "profile"
    PACKAGE = "package"
    EVALUATE = "evaluate"

    @property
    def stage(self) -> int:
        """Place in the job; steps of one stage do not depend on each other."""
        return list(StepName).index(self)

    @property
    def phase(self) -> str:
        """What a client reads in `job.phase`. An open vocabulary: a runner may report finer phases."""
        return _PHASES[self]


_PHASES = {
    StepName.RESOLVE: "resolving",
    StepName.CALIBRATE: "calibrating",
    StepName.FIT: "fitting",
    StepName.PROFILE: "profiling",
    StepName.PACKAGE: "packaging",
    StepName.EVALUATE: "evaluating",
}


class JobErrorCode(StrEnum):
    """Why a job failed. Closed: clients may branch on these."""

    MODEL_NOT_FOUND = "model_not_found"
    MODEL_GATED = "model_gated"
    MODEL_UNSAFE_FORMAT = "model_unsafe_format"
    MODEL_UNSUPPORTED = "model_unsupported"
    MODEL_INVALID = "model_invalid"
    MODEL_TOO_LARGE = "model_too_large"
    DATASET_INVALID = "dataset_invalid"
    BUDGET_UNREACHABLE = "budget_unreachable"
    CHECKPOINT_INVALID = "checkpoint_invalid"
    CHECKPOINT_MISMATCH = "checkpoint_mismatch"
    INVALID_SETTING = "invalid_setting"
    STORAGE_ERROR = "storage_error"
    OUT_OF_MEMORY = "out_of_memory"
    STEP_TIMEOUT = "step_timeout"
    TIME_LIMIT_EXCEEDED = "time_limit_exceeded"
    WORKER_LOST = "worker_lost"
    INTERNAL = "internal"


INPUT_FAULTS = frozenset(
    {
        JobErrorCode.MODEL_NOT_FOUND,
        JobErrorCode.MODEL_GATED,
        JobErrorCode.MODEL_UNSAFE_FORMAT,
        JobErrorCode.MODEL_UNSUPPORTED,
        JobErrorCode.MODEL_INVALID,
        JobErrorCode.MODEL_TOO_LARGE,
        JobErrorCode.DATASET_INVALID,
        JobErrorCode.BUDGET_UNREACHABLE,
        JobErrorCode.CHECKPOINT_INVALID,
        JobErrorCode.CHECKPOINT_MISMATCH,
        JobErrorCode.INVALID_SETTING,
    }
)
"""Codes that another model, dataset, budget or setting would mend; with the others, the same job may succeed elsewhere."""
