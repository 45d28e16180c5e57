"""Bodies of the API. Generated from openapi.json by `make client`: do not edit."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, ConfigDict, Field, StringConstraints

from orthokv_client.base import Model


class Artifact(Model):
    """An immutable file."""

    bytes: int
    created_at: AwareDatetime
    expires_at: AwareDatetime | None = None
    """When it is deleted with its job, by the project's `retention_days`."""
    filename: Annotated[str, Field(examples=["orthokv.safetensors"])]
    id: str
    media_type: str
    object: Literal["artifact"] = "artifact"
    sha256: str
    url: Annotated[str, Field(examples=["/v1/artifacts/art_0/content"])]


class AuditEvent(Model):
    """Who did what."""

    action: Annotated[str, Field(examples=["api_key.created"])]
    """An open vocabulary."""
    actor: Annotated[str, Field(examples=["key_0"])]
    """The id of a key; `local`; `cli`; or `system`."""
    created_at: AwareDatetime
    data: dict[str, Any]
    id: str
    object: Literal["audit_event"] = "audit_event"
    project_id: str
    request_id: str | None
    subject_id: str


class Budget(Model):
    """How much may be lost, or kept."""

    model_config = ConfigDict(
        extra="forbid",
    )
    metric: Literal["kept", "layer_error", "perplexity_increase"]
    """`kept`: stored bytes of the cache / bytes of the 16-bit cache. `layer_error`: relative error of the worst layer's output. `perplexity_increase`: relative, on a held-out slice of the calibration data."""
    value: Annotated[float, Field(examples=[0.25], gt=0.0)]


class Checkpoint(Model):
    """A compressed checkpoint: packed, loaded again and measured."""

    budget: Budget
    created_at: AwareDatetime
    files_url: str
    form: Literal["adapter", "full"]
    """`adapter`: bases only. `full`: with the base model's own files, loadable by path."""
    id: str
    job_id: str
    measured: dict[str, Any]
    object: Literal["checkpoint"] = "checkpoint"
    plan: dict[str, Any]
    profile_id: str


class CheckpointCreate(Model):
    """Another budget for what was fitted."""

    model_config = ConfigDict(
        extra="forbid",
    )
    budget: Budget
    form: Literal["adapter", "full"] = "adapter"
    """`adapter`: bases only. `full`: with the base model's own files, loadable by path."""
    metadata: dict[Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$")], str] | None = None
    """Up to 16 labels of the client's own; jobs can be listed by them."""
    polish_steps: Annotated[int | None, Field(ge=0, le=1000000)] = None
    """Steps of a refinement of the bases at the ranks of this checkpoint's plan, before it is packed; 0: none, the profile's own bases; absent: half as many as the profile was refined with. A `layer_error` budget is met by the profile's own bases and takes none."""
    rank_multiple: Annotated[int, Field(ge=1, le=1024)] = 1
    """Every rank is a multiple of this, e.g. 16 for the matrix units of a GPU."""


class CheckpointSpec(Model):
    """What a job of kind `checkpoint` was asked for."""

    budget: Budget
    form: Literal["adapter", "full"] = "adapter"
    """`adapter`: bases only. `full`: with the base model's own files, loadable by path."""
    polish_steps: Annotated[int | None, Field(ge=0, le=1000000)] = None
    """Steps of a refinement of the bases at the ranks of this checkpoint's plan, before it is packed; 0: none, the profile's own bases; absent: half as many as the profile was refined with. A `layer_error` budget is met by the profile's own bases and takes none."""
    profile_id: str
    rank_multiple: Annotated[int, Field(ge=1, le=1024)] = 1
    """Every rank is a multiple of this, e.g. 16 for the matrix units of a GPU."""


class DatasetComplete(Model):
    """What the client believes it sent."""

    model_config = ConfigDict(
        extra="forbid",
    )
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class DatasetCreate(Model):
    """A dataset to be uploaded. The name is a label; where the bytes go is the server's choice."""

    model_config = ConfigDict(
        extra="forbid",
    )
    filename: Annotated[str, Field(examples=["calibration.jsonl"], max_length=255, min_length=1)]
    format: Literal["jsonl", "text", "parquet"] | None = None
    """Taken from the name's ending when it is absent."""


class Event(Model):
    """One line of a job's history; `seq` has no gaps."""

    created_at: AwareDatetime
    data: dict[str, Any]
    object: Literal["event"] = "event"
    seq: int
    type: Annotated[str, Field(examples=["layer.committed"])]
    """An open vocabulary: ignore types you do not know."""


class EventPage(Model):
    """Events in order. Ask for the next page with `after=last_seq` while `has_more`."""

    data: list[Event]
    has_more: bool
    last_seq: int
    object: Literal["list"] = "list"


class FieldProblem(Model):
    """One field at fault; `pointer` is a JSON pointer into the body, or names the parameter."""

    code: str
    message: str
    pointer: str


class Health(Model):
    status: Literal["ok"] = "ok"


class JobProgress(Model):
    done: int
    fraction: float
    total: int
    unit: Annotated[str, Field(examples=["layer"])]


class JobResult(Model):
    """What a job has made so far; the profile stays useful when a later step fails."""

    checkpoint_id: str | None = None
    measured: dict[str, Any] | None = None
    plan: dict[str, Any] | None = None
    profile_id: str | None = None


class Layer(Model):
    """A fitted layer that is safe, whatever happens to the job."""

    artifact_id: str
    attempt: int
    bytes: int
    committed_at: AwareDatetime
    layer: int
    metrics: dict[str, Any]
    object: Literal["layer"] = "layer"
    sha256: str


class LayerList(Model):
    """All committed layers of a job, in order."""

    data: list[Layer]
    object: Literal["list"] = "list"


class Limits(Model):
    """Limits of a project. `null`: the server's default."""

    model_config = ConfigDict(
        extra="forbid",
    )
    dataset_bytes: Annotated[int | None, Field(ge=0, lt=9223372036854776000)] = None
    model_bytes: Annotated[int | None, Field(ge=0, lt=9223372036854776000)] = None
    """Weights of the largest model, as stored."""
    queued_jobs: Annotated[int | None, Field(ge=0, lt=2147483648)] = None
    retention_days: Annotated[int | None, Field(ge=1, le=36500)] = None
    """Jobs and all that they made are deleted this long after their end. `null`: never."""
    running_steps: Annotated[int | None, Field(ge=1, lt=2147483648)] = None
    stored_bytes: Annotated[int | None, Field(ge=0, lt=9223372036854776000)] = None


class Links(Model):
    events: str
    layers: str
    self: str


class Manifest(Model):
    """Every file of a checkpoint. Put them into one folder under their names, and it loads."""

    bytes: int
    data: list[Artifact]
    object: Literal["list"] = "list"


class Method(Model):
    """How the bases are fitted."""

    model_config = ConfigDict(
        extra="forbid",
    )
    key_mode: Literal["pre", "post"] = "pre"
    parameterisation: Literal["direct", "predictor"] = "direct"
    positions: Annotated[int | None, Field(ge=2)] = None
    """Key mode `post` only, whose bases depend on positions: calibrate on positions 0 to this, exclusive, which should be the longest context to be served; absent: the model's longest."""
    refine_steps: Annotated[int | None, Field(ge=0, le=1000000)] = None
    """Steps of the last stage, all layers together; 0: none; absent: the method's own."""
    sharing: Literal["head", "tied", "pair", "quad", "joint", "auto"] = "joint"
    """Which heads of a layer share a basis; `auto`: each layer has its best group of 2, 4 or all."""
    steps: Annotated[int | None, Field(ge=1, le=1000000)] = None
    """Optimisation steps per layer; absent: the method's own."""
    type: Literal["oblique", "stiefel", "weighted", "eigen", "palu"] = "oblique"


class Minutes(Model):
    """Time of one worker, without any wait in the queue."""

    high: float
    likely: float
    low: float


class ModelRef(Model):
    """A model of the hub, or a folder of the server's machine where the server allows that."""

    model_config = ConfigDict(
        extra="forbid",
    )
    id: Annotated[str, Field(examples=["org/name"], max_length=1024, min_length=1)]
    revision: Annotated[str | None, Field(max_length=255, min_length=1)] = None


class PageAuditEvent(Model):
    data: list[AuditEvent]
    first_id: str | None
    has_more: bool
    last_id: str | None
    object: Literal["list"] = "list"


class PageCheckpoint(Model):
    data: list[Checkpoint]
    first_id: str | None
    has_more: bool
    last_id: str | None
    object: Literal["list"] = "list"


class ProblemDetail(Model):
    """Body of every problem."""

    code: Literal[
        "bad_request",
        "invalid_host",
        "invalid_cursor",
        "invalid_idempotency_key",
        "unauthenticated",
        "foreign_origin",
        "insufficient_scope",
        "quota_exceeded",
        "not_found",
        "method_not_allowed",
        "not_acceptable",
        "conflict",
        "dataset_not_ready",
        "body_too_large",
        "unsupported_media_type",
        "range_not_satisfiable",
        "invalid_request",
        "idempotency_key_reused",
        "digest_mismatch",
        "local_models_disabled",
        "webhooks_disabled",
        "queue_full",
        "rate_limited",
        "internal",
        "unavailable",
        "storage_error",
    ]
    """What went wrong, for programs."""
    detail: Annotated[str, Field(examples=["No such job."])]
    errors: Annotated[list[FieldProblem], Field(validate_default=True)] = []
    instance: Annotated[str, Field(examples=["/v1/jobs/job_0"])]
    request_id: str
    status: Annotated[int, Field(examples=[404])]
    title: Annotated[str, Field(examples=["Not found"])]
    type: Annotated[str, Field(examples=["urn:orthokv:problem:not-found"])]


class ProfileFiles(Model):
    """`json` and `tensors` are the profile itself, `plot` shows it."""

    json_: Annotated[Artifact, Field(alias="json")]
    plot: Artifact
    tensors: Artifact


class Project(Model):
    """A tenant: everything that its keys make is seen by its keys only."""

    created_at: AwareDatetime
    id: str
    limits: Limits
    name: str
    object: Literal["project"] = "project"


class ProjectCreate(Model):
    """A tenant."""

    model_config = ConfigDict(
        extra="forbid",
    )
    limits: Limits | None = None
    name: Annotated[str, Field(examples=["search-team"], pattern="^[a-z0-9][a-z0-9-]{0,62}$")]


class ProjectUpdate(Model):
    """All limits of a project, as they are to be."""

    model_config = ConfigDict(
        extra="forbid",
    )
    limits: Limits


class Quota(Model):
    """What is used of a limit. Without a limit, `limit` and `left` are null."""

    left: int | None
    limit: int | None
    used: int


class TextRef1(Model):
    """A text: an uploaded dataset, or what the model writes itself."""

    model_config = ConfigDict(
        extra="forbid",
    )
    field: Annotated[str, Field(max_length=128, min_length=1)] = "text"
    id: Annotated[str, Field(pattern="^ds_[0123456789abcdefghjkmnpqrstvwxyz]{26}$")]
    source: Literal["self"] | None = None
    """`self`: the model samples its own text."""


class TextRef2(Model):
    """A text: an uploaded dataset, or what the model writes itself."""

    model_config = ConfigDict(
        extra="forbid",
    )
    field: Annotated[str, Field(max_length=128, min_length=1)] = "text"
    id: Annotated[None, Field(None)] = None
    source: Literal["self"] = "self"
    """`self`: the model samples its own text."""


class Upload(Model):
    """How to send the bytes."""

    max_bytes: int
    method: Literal["PUT"] = "PUT"
    url: Annotated[str, Field(examples=["/v1/datasets/ds_0/content"])]


class Usage(Model):
    """What the key's project uses now, and may use."""

    dataset_bytes: int
    """Most that one dataset may have."""
    model_bytes: int | None
    """Most that a model's weights may have; null: no limit."""
    object: Literal["usage"] = "usage"
    project_id: str
    queued_jobs: Quota
    retention_days: int | None
    """How long jobs are kept after their end; null: for ever."""
    running_jobs: int
    running_steps: Quota
    stored_bytes: Quota
    """Uploads and all that jobs have made; not what was deleted."""


class ValidationProblem(Model):
    """Why the job would be refused, or would fail at once."""

    code: Annotated[str, Field(examples=["queue_full"])]
    """A code of problems or of jobs that failed."""
    detail: str
    errors: list[FieldProblem] | None = None


class WebhookSecretRotate(Model):
    """How long the present secret goes on signing beside the new one."""

    model_config = ConfigDict(
        extra="forbid",
    )
    overlap_hours: Annotated[float, Field(ge=0.0, le=168.0)] = 24.0


class ApiKey(Model):
    """A key, without its secret."""

    created_at: AwareDatetime
    expires_at: AwareDatetime | None
    id: str
    last_used_at: AwareDatetime | None
    """To the minute."""
    name: str
    object: Literal["api_key"] = "api_key"
    prefix: Annotated[str, Field(examples=["okv_0"])]
    """The beginning of the key, which is not secret."""
    project_id: str
    revoked_at: AwareDatetime | None
    scopes: list[
        Literal[
            "jobs:read",
            "jobs:write",
            "datasets:read",
            "datasets:write",
            "profiles:read",
            "checkpoints:read",
            "checkpoints:write",
            "artifacts:read",
            "webhooks:manage",
            "keys:manage",
            "admin",
        ]
    ]


class ApiKeyCreate(Model):
    """A key for some program or person."""

    model_config = ConfigDict(
        extra="forbid",
    )
    expires_in_days: Annotated[float | None, Field(gt=0.0, le=3650.0)] = None
    """Absent: until it is revoked."""
    name: Annotated[str, Field(examples=["nightly compression"], max_length=255, min_length=1)]
    project_id: Annotated[str | None, Field(pattern="^proj_[0123456789abcdefghjkmnpqrstvwxyz]{26}$")] = None
    """Absent: the project of the key that asks. Another one needs `admin`."""
    scopes: Annotated[
        list[
            Literal[
                "jobs:read",
                "jobs:write",
                "datasets:read",
                "datasets:write",
                "profiles:read",
                "checkpoints:read",
                "checkpoints:write",
                "artifacts:read",
                "webhooks:manage",
                "keys:manage",
                "admin",
            ]
        ],
        Field(max_length=11, min_length=1),
    ]


class ApiKeyCreated(Model):
    """A new key. `key` is shown this once and stored nowhere."""

    created_at: AwareDatetime
    expires_at: AwareDatetime | None
    id: str
    key: Annotated[str, Field(examples=["okv_..."])]
    last_used_at: AwareDatetime | None
    """To the minute."""
    name: str
    object: Literal["api_key"] = "api_key"
    prefix: Annotated[str, Field(examples=["okv_0"])]
    """The beginning of the key, which is not secret."""
    project_id: str
    revoked_at: AwareDatetime | None
    scopes: list[
        Literal[
            "jobs:read",
            "jobs:write",
            "datasets:read",
            "datasets:write",
            "profiles:read",
            "checkpoints:read",
            "checkpoints:write",
            "artifacts:read",
            "webhooks:manage",
            "keys:manage",
            "admin",
        ]
    ]


class Dataset(Model):
    """Calibration text. Jobs take it once it is `ready`; from then on it never changes."""

    bytes: int | None
    completed_at: AwareDatetime | None
    created_at: AwareDatetime
    filename: str
    format: Literal["jsonl", "text", "parquet"]
    id: str
    object: Literal["dataset"] = "dataset"
    sha256: str | None
    status: Literal["awaiting_upload", "uploaded", "ready"]
    upload: Upload | None
    """Present until the dataset is ready."""


class DatasetRef1(Model):
    """Which text to calibrate on, and how much of it."""

    model_config = ConfigDict(
        extra="forbid",
    )
    also: Annotated[list[TextRef1 | TextRef2], Field(max_length=7, validate_default=True)] = []
    """Other texts, mixed in so that all have equal parts of the samples."""
    field: Annotated[str, Field(max_length=128, min_length=1)] = "text"
    id: Annotated[str, Field(pattern="^ds_[0123456789abcdefghjkmnpqrstvwxyz]{26}$")]
    num_samples: Annotated[int, Field(ge=1, le=65536)] = 64
    sequence_length: Annotated[int, Field(ge=2, le=131072)] = 1024
    source: Literal["self"] | None = None
    """`self`: the model samples its own text."""


class DatasetRef2(Model):
    """Which text to calibrate on, and how much of it."""

    model_config = ConfigDict(
        extra="forbid",
    )
    also: Annotated[list[TextRef1 | TextRef2], Field(max_length=7, validate_default=True)] = []
    """Other texts, mixed in so that all have equal parts of the samples."""
    field: Annotated[str, Field(max_length=128, min_length=1)] = "text"
    id: Annotated[None, Field(None)] = None
    num_samples: Annotated[int, Field(ge=1, le=65536)] = 64
    sequence_length: Annotated[int, Field(ge=2, le=131072)] = 1024
    source: Literal["self"] = "self"
    """`self`: the model samples its own text."""


class Estimate(Model):
    """What a job would take. `null` is what cannot be known."""

    artifact_bytes: int | None
    """Files that the job would leave in the store."""
    basis: Annotated[str, Field(examples=["fitted to 12 past runs"])]
    """Where the minutes come from: `fitted to N past runs` of the class and method, or `priors`."""
    download_bytes: int | None
    """Weights that a worker without them has to fetch."""
    gpu_class: str
    gpu_memory_bytes: int | None
    """Peak on a GPU that holds the whole model; with less, a worker streams it from disk."""
    host_memory_bytes: int | None
    """Peak on a worker that computes on its CPU, in float32, with the whole model in memory."""
    known_from: Literal["files", "config", "nothing"]
    """What of the model was looked at: its files, the hub's `config.json` alone, or nothing."""
    layers: int | None
    minutes: Minutes | None
    parameters: int | None
    tokens: int
    """Calibration tokens asked for; a shorter text gives fewer."""


class JobCreate(Model):
    """A model, a dataset and an error budget."""

    model_config = ConfigDict(
        extra="forbid",
    )
    budget: Budget
    dataset: DatasetRef1 | DatasetRef2
    """Which text to calibrate on, and how much of it."""
    form: Literal["adapter", "full"] = "adapter"
    """`adapter`: bases only. `full`: with the base model's own files, loadable by path."""
    gpu_class: Annotated[str, Field(pattern="^[a-z0-9][a-z0-9-]{0,31}$")] = "default"
    """Which workers may run the job: one of the server's classes."""
    max_runtime_minutes: Annotated[int | None, Field(ge=1, le=525600)] = None
    """Fail the job with `time_limit_exceeded` this long after its first step has begun; absent: the server's own limit, if it has one."""
    metadata: dict[Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$")], str] | None = None
    """Up to 16 labels of the client's own; jobs can be listed by them."""
    method: Method | None = None
    model: ModelRef
    polish_steps: Annotated[int | None, Field(ge=0, le=1000000)] = None
    """Steps of a refinement of the bases at the ranks of this checkpoint's plan, before it is packed; 0: none, the profile's own bases; absent: half as many as the profile was refined with. A `layer_error` budget is met by the profile's own bases and takes none."""
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    rank_multiple: Annotated[int, Field(ge=1, le=1024)] = 1
    """Every rank is a multiple of this, e.g. 16 for the matrix units of a GPU."""
    seed: Annotated[int, Field(ge=0, lt=2147483648)] = 0


class JobError(Model):
    """Why a job failed. `best` is the closest that a budget out of reach can be met."""

    attempt: int
    best: float | None
    code: Literal[
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
    """Why a job failed. Closed: clients may branch on these."""
    layer: int | None
    message: str
    phase: str
    retryable: bool


class PageApiKey(Model):
    data: list[ApiKey]
    first_id: str | None
    has_more: bool
    last_id: str | None
    object: Literal["list"] = "list"


class PageDataset(Model):
    data: list[Dataset]
    first_id: str | None
    has_more: bool
    last_id: str | None
    object: Literal["list"] = "list"


class PageProject(Model):
    data: list[Project]
    first_id: str | None
    has_more: bool
    last_id: str | None
    object: Literal["list"] = "list"


class Step(Model):
    """One unit of a job's work."""

    attempts: int
    failures: int
    finished_at: AwareDatetime | None
    layers: list[int] | None
    name: str
    started_at: AwareDatetime | None
    status: Literal["pending", "ready", "running", "succeeded", "failed", "cancelled"]


class Validation(Model):
    """What would become of a request. Nothing was stored."""

    estimate: Estimate
    object: Literal["validation"] = "validation"
    problems: list[ValidationProblem]
    valid: bool


class WebhookDelivery(Model):
    """One message to one endpoint, with the outcome of its last attempt."""

    attempts: int
    created_at: AwareDatetime
    endpoint_id: str
    error: str | None
    finished_at: AwareDatetime | None
    id: str
    """The `webhook-id` of every attempt."""
    job_id: str
    last_attempt_at: AwareDatetime | None
    next_attempt_at: AwareDatetime | None
    object: Literal["webhook_delivery"] = "webhook_delivery"
    response_body: str | None
    """Its first 2048 bytes."""
    response_status: int | None
    status: Literal["pending", "succeeded", "failed"]
    type: Literal[
        "job.created",
        "job.started",
        "job.cancelling",
        "job.succeeded",
        "job.failed",
        "job.cancelled",
        "job.retried",
    ]
    """What an endpoint can be told."""


class WebhookEndpoint(Model):
    """An address of the project's, without its secret."""

    cloud_events: bool
    created_at: AwareDatetime
    description: str
    disabled_at: AwareDatetime | None
    disabled_reason: Literal["client", "gone", "failing"] | None
    """`client`: by request. `gone`: it answered 410. `failing`: every retry of a delivery failed."""
    enabled: bool
    event_types: (
        list[
            Literal[
                "job.created",
                "job.started",
                "job.cancelling",
                "job.succeeded",
                "job.failed",
                "job.cancelled",
                "job.retried",
            ]
        ]
        | None
    )
    id: str
    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    previous_secret_expires_at: AwareDatetime | None
    """Until then two secrets sign."""
    url: str


class WebhookEndpointCreate(Model):
    """An address to be told about jobs."""

    model_config = ConfigDict(
        extra="forbid",
    )
    cloud_events: bool = False
    """Send the headers of a CloudEvent (`ce-id`, `ce-type`, ...), too."""
    description: Annotated[str, Field(max_length=255)] = ""
    event_types: Annotated[
        list[
            Literal[
                "job.created",
                "job.started",
                "job.cancelling",
                "job.succeeded",
                "job.failed",
                "job.cancelled",
                "job.retried",
            ]
        ]
        | None,
        Field(max_length=7, min_length=1),
    ] = None
    """`null`: all types."""
    url: Annotated[
        str,
        Field(
            examples=["https://hooks.example.com/orthokv"],
            max_length=2048,
            min_length=1,
        ),
    ]
    """https, port 443, a public host."""


class WebhookEndpointCreated(Model):
    """An endpoint with its new secret, which is shown this once."""

    cloud_events: bool
    created_at: AwareDatetime
    description: str
    disabled_at: AwareDatetime | None
    disabled_reason: Literal["client", "gone", "failing"] | None
    """`client`: by request. `gone`: it answered 410. `failing`: every retry of a delivery failed."""
    enabled: bool
    event_types: (
        list[
            Literal[
                "job.created",
                "job.started",
                "job.cancelling",
                "job.succeeded",
                "job.failed",
                "job.cancelled",
                "job.retried",
            ]
        ]
        | None
    )
    id: str
    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    previous_secret_expires_at: AwareDatetime | None
    """Until then two secrets sign."""
    secret: Annotated[str, Field(examples=["whsec_..."])]
    url: str


class WebhookEndpointUpdate(Model):
    """What is to change; fields that are left out stay as they are."""

    model_config = ConfigDict(
        extra="forbid",
    )
    cloud_events: bool | None = None
    """Send the headers of a CloudEvent (`ce-id`, `ce-type`, ...), too."""
    description: Annotated[str | None, Field(max_length=255)] = None
    enabled: bool | None = None
    event_types: Annotated[
        list[
            Literal[
                "job.created",
                "job.started",
                "job.cancelling",
                "job.succeeded",
                "job.failed",
                "job.cancelled",
                "job.retried",
            ]
        ]
        | None,
        Field(max_length=7, min_length=1),
    ] = None
    """`null`: all types."""
    url: Annotated[
        str | None,
        Field(
            examples=["https://hooks.example.com/orthokv"],
            max_length=2048,
            min_length=1,
        ),
    ] = None
    """https, port 443, a public host."""


class CompressSpec(Model):
    """What a job of kind `compress` was asked for."""

    budget: Budget
    dataset: DatasetRef1 | DatasetRef2
    """Which text to calibrate on, and how much of it."""
    form: Literal["adapter", "full"] = "adapter"
    """`adapter`: bases only. `full`: with the base model's own files, loadable by path."""
    method: Method
    model: ModelRef
    polish_steps: Annotated[int | None, Field(ge=0, le=1000000)] = None
    """Steps of a refinement of the bases at the ranks of this checkpoint's plan, before it is packed; 0: none, the profile's own bases; absent: half as many as the profile was refined with. A `layer_error` budget is met by the profile's own bases and takes none."""
    rank_multiple: Annotated[int, Field(ge=1, le=1024)] = 1
    """Every rank is a multiple of this, e.g. 16 for the matrix units of a GPU."""
    seed: int


class Job(Model):
    """A request for a compressed cache and what became of it."""

    attempt: int
    cancel_requested_at: AwareDatetime | None
    created_at: AwareDatetime
    deadline_at: AwareDatetime | None = None
    """When the job's time is up, once it has begun."""
    error: JobError | None
    finished_at: AwareDatetime | None
    gpu_class: str
    id: str
    kind: Literal["compress", "checkpoint"]
    links: Links
    max_runtime_minutes: int | None = None
    metadata: dict[str, str]
    object: Literal["job"] = "job"
    phase: str
    """An open vocabulary: tolerate phases you do not know."""
    priority: int
    progress: JobProgress | None
    resolved: dict[str, Any]
    """What was really run: revision, digests, geometry."""
    result: JobResult | None
    spec: CompressSpec | CheckpointSpec
    started_at: AwareDatetime | None
    status: Literal["queued", "running", "cancelling", "succeeded", "failed", "cancelled"]
    steps: list[Step]
    version: int
    """Rises with every change; `?wait=&if_version=` waits for the next one."""


class PageJob(Model):
    data: list[Job]
    first_id: str | None
    has_more: bool
    last_id: str | None
    object: Literal["list"] = "list"


class PageWebhookDelivery(Model):
    data: list[WebhookDelivery]
    first_id: str | None
    has_more: bool
    last_id: str | None
    object: Literal["list"] = "list"


class PageWebhookEndpoint(Model):
    data: list[WebhookEndpoint]
    first_id: str | None
    has_more: bool
    last_id: str | None
    object: Literal["list"] = "list"


class Profile(Model):
    """
    The error of every layer at every candidate rank.

    Checkpoints for other budgets come from it without fitting.
    """

    created_at: AwareDatetime
    files: ProfileFiles
    id: str
    job_id: str
    object: Literal["profile"] = "profile"
    resolved: dict[str, Any]
    """What was really run: revision, digests, geometry."""
    spec: CompressSpec
    """What the fitting job was asked for."""
    summary: dict[str, Any]


class PageProfile(Model):
    data: list[Profile]
    first_id: str | None
    has_more: bool
    last_id: str | None
    object: Literal["list"] = "list"
