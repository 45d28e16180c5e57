"""Words of the API. Generated from openapi.json by `make client`: do not edit."""

from __future__ import annotations

from typing import Literal

MethodType = Literal["oblique", "stiefel", "weighted", "eigen", "palu"]

Sharing = Literal["head", "tied", "pair", "quad", "joint", "auto"]

KeyMode = Literal["pre", "post"]

Parameterisation = Literal["direct", "predictor"]

Form = Literal["adapter", "full"]

DatasetFormat = Literal["jsonl", "text", "parquet"]

JobStatus = Literal["queued", "running", "cancelling", "succeeded", "failed", "cancelled"]

JobErrorCode = Literal[
    "model_not_found",
    "model_gated",
    "model_unsafe_format",
    "model_unsupported",
    "model_invalid",
    "model_too_large",
    "dataset_invalid",
    "budget_unreachable",
    "checkpoint_invalid",
    "checkpoint_mismatch",
    "invalid_setting",
    "storage_error",
    "out_of_memory",
    "step_timeout",
    "time_limit_exceeded",
    "worker_lost",
    "internal",
]

DeliveryStatus = Literal["pending", "succeeded", "failed"]

Order = Literal["asc", "desc"]

ENDED: frozenset[JobStatus] = frozenset({"cancelled", "failed", "succeeded"})

INPUT_FAULTS: frozenset[JobErrorCode] = frozenset(
    {
        "budget_unreachable",
        "checkpoint_invalid",
        "checkpoint_mismatch",
        "dataset_invalid",
        "invalid_setting",
        "model_gated",
        "model_invalid",
        "model_not_found",
        "model_too_large",
        "model_unsafe_format",
        "model_unsupported",
    }
)

HELP = {
    "positions": "Key mode `post` only, whose bases depend on positions: calibrate on positions 0 to this, exclusive, which should be the longest context to be served; absent: the model's longest.",
    "refine_steps": "Steps of the last stage, all layers together; 0: none; absent: the method's own.",
    "sharing": "Which heads of a layer share a basis; `auto`: each layer has its best group of 2, 4 or all.",
    "steps": "Optimisation steps per layer; absent: the method's own.",
    "form": "`adapter`: bases only. `full`: with the base model's own files, loadable by path.",
    "gpu_class": "Which workers may run the job: one of the server's classes.",
    "max_runtime_minutes": "Fail the job with `time_limit_exceeded` this long after its first step has begun; absent: the server's own limit, if it has one.",
    "metadata": "Up to 16 labels of the client's own; jobs can be listed by them.",
    "polish_steps": "Steps of a refinement of the bases at the ranks of this checkpoint's plan, before it is packed; 0: none, the profile's own bases; absent: half as many as the profile was refined with. A `layer_error` budget is met by the profile's own bases and takes none.",
    "rank_multiple": "Every rank is a multiple of this, e.g. 16 for the matrix units of a GPU.",
}
