"""Settings of the service, read from `ORTHOKV_*` environment variables. Units are in the names."""

from __future__ import annotations

import base64
import os
import sys
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from app.infra import failpoints

Seconds = Annotated[float, Field(gt=0)]
Bytes = Annotated[int, Field(gt=0)]
Port = Annotated[int, Field(ge=0, le=65535)]
GPU_CLASS_PATTERN = r"^[a-z0-9][a-z0-9-]{0,31}$"
GpuClass = Annotated[str, Field(pattern=GPU_CLASS_PATTERN)]
DEFAULT_GPU_CLASS = "default"


def _hub_url() -> str:
    """The hub that workers use, by its client's own variables."""
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        return ""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")


class Settings(BaseSettings):
    """Everything an operator may set. A data folder alone is a complete configuration."""

    model_config = SettingsConfigDict(
        env_prefix="ORTHOKV_",
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,  # a value may be a secret
    )

    data_dir: Path = Path("orthokv-data")
    database_url: str = ""
    """SQLAlchemy URL without a driver (`sqlite:///FILE`, `postgresql://...`).

    Empty: a file in the data folder.
    """
    storage_url: str = ""
    """Where objects live (`file:///FOLDER`, `s3://BUCKET/PREFIX`, ...).

    Empty: a folder in the data folder.
    """
    storage_options: dict[str, SecretStr] = {}
    """Endpoint, region and credentials of a bucket, by obstore's names (`endpoint`, `access_key_id`, ...).

    What is not here is read from the provider's own variables (`AWS_*`, `GOOGLE_*`, `AZURE_*`).
    """
    signed_download_seconds: Seconds | None = None
    """Answer downloads with a redirect to the bucket, signed for this long.

    None: the API sends the bytes itself.
    """
    broker_url: str = ""
    """A Redis (`redis://...`, `rediss://...`) that carries hints, so that idle workers start in milliseconds.

    Empty: workers look at the database every `idle_poll_seconds`.
    """
    gpu_classes: Annotated[tuple[GpuClass, ...], Field(min_length=1)] = (DEFAULT_GPU_CLASS,)
    """Classes that jobs may name. A worker serves all of them unless it is told which."""

    allowed_hosts: tuple[str, ...] = ("127.0.0.1", "localhost", "[::1]")
    """Names a request may carry in its Host header.

    The defence of a loopback server against DNS rebinding.
    """
    hub_url: str = Field(default_factory=_hub_url)
    """Where `POST /v1/jobs:validate` reads the `config.json` of hub models; empty: nowhere."""
    model_roots: tuple[Path, ...] = ()
    """Absolute folders below which jobs may name a model; set it for the API and for its workers.

    The owner of a loopback server needs none: he may name every folder that the server can read.
    """

    auth_required: bool = True
    """Take API keys alone. False, on the loopback only: the owner's token, too.

    `orthokv serve` on the loopback turns it off, unless it is set.
    """
    token: SecretStr = SecretStr("")
    """The owner's token of a loopback server, such as another one has made.

    Empty: a new one at every start, in a file of the data folder.
    """
    key_pepper: SecretStr = SecretStr("")
    """A secret that is mixed into the stored digests of API keys. Changing it ends every key."""
    secret_keys: SecretStr = SecretStr("")
    """Keys that encrypt clients' secrets in the database: Fernet keys, parted by commas.

    The first seals, all open. Empty: webhook endpoints are refused. `orthokv serve` keeps one in its data folder.
    """
    outbound_private_hosts: tuple[str, ...] = ()
    """Hosts that clients' webhooks may reach although they are private, by plain http and on any port: for
    development, or for receivers in the own network."""
    rate_limit_requests: Annotated[int, Field(ge=1)] = 600
    """Requests that one key may send in `rate_limit_window_seconds`, to each API process."""
    rate_limit_window_seconds: Seconds = 60.0
    max_queued_jobs: Annotated[int, Field(ge=0)] | None = 1000
    """Limits of a project that has none of its own; None: no limit."""
    max_running_steps: Annotated[int, Field(ge=1)] | None = None
    max_stored_bytes: Annotated[int, Field(ge=0)] | None = None
    max_model_bytes: Annotated[int, Field(ge=0)] | None = None
    """Bytes of weights, as stored, that a model may have. Refused before anything is downloaded or read."""
    max_runtime_minutes: Annotated[int, Field(ge=1)] | None = None
    """How long a job that names no limit of its own may take from its first step on; None: as long as it needs."""

    statement_timeout_seconds: Seconds = 30.0
    """On Postgres, a statement that takes longer is ended; a request then gets 503."""
    lock_timeout_seconds: Seconds = 10.0
    """The same for a statement that waits for a lock."""

    max_body_bytes: Bytes = 1 << 20
    max_dataset_bytes: Bytes = 4 << 30
    max_wait_seconds: Seconds = 60.0
    max_event_streams: Annotated[int, Field(ge=1)] = 100
    """Event streams that one process serves at a time, and how many of them one key may have."""
    max_event_streams_per_key: Annotated[int, Field(ge=1)] = 20
    max_stream_seconds: Seconds = 900.0
    """An event stream ends after this long; the client comes back with `Last-Event-ID`, and with its key."""
    poll_seconds: Seconds = 0.25
    """How often long polls and event streams look at the database."""
    idempotency_hours: Annotated[float, Field(gt=0)] = 24.0

    metrics_port: Port | None = None
    """Where Prometheus reads the API (0: any free port). None: nowhere."""
    worker_metrics_port: Port | None = None
    """The same for a worker; each of a machine's workers needs its own."""
    metrics_host: str = "127.0.0.1"
    """The address of both. They ask for no key: only a private network may reach them."""
    log_requests: bool = True
    """One line in the log for each request, but those of probes."""

    lease_seconds: Seconds = 60.0
    heartbeat_seconds: Seconds = 15.0
    reaper_seconds: Seconds = 15.0
    idle_poll_seconds: Seconds = 2.0
    """How long an idle worker sleeps when no hint wakes it."""
    hint_after_seconds: Seconds = 30.0
    cancel_grace_seconds: Seconds = 300.0
    """A cancelling job whose worker does not answer is ended after this long."""
    drain_seconds: Annotated[float, Field(ge=0)] = 10.0
    """On SIGTERM a worker waits this long for the layer it is fitting, then stops.

    Neither costs a failure.
    """
    retry_backoff_seconds: Seconds = 5.0
    max_failures: Annotated[int, Field(ge=1)] = 3
    """Failures of one step, without a layer committed in between, that end the job."""
    orphan_hours: Annotated[float, Field(gt=0)] = 24.0
    orphan_sweep_seconds: Seconds = 3600.0
    garbage_seconds: Annotated[float, Field(ge=0)] = 300.0
    """Bytes of what was deleted go this much later, so that downloads that have begun can end."""

    webhook_senders: Annotated[int, Field(ge=0)] = 4
    """Threads of an API process that send webhooks; 0: others send."""
    webhook_poll_seconds: Seconds = 1.0
    webhook_timeout_seconds: Seconds = 15.0
    webhook_retry_seconds: tuple[Seconds, ...] = (5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400)
    """Waits between the attempts of a delivery; after the last one its endpoint is disabled."""
    webhook_keep_days: Annotated[float, Field(gt=0)] = 30.0

    worker_name: str = ""
    """A name that only one living worker has.

    With it a restarted worker takes back its own leases at once.
    """
    layers_per_fit_step: Annotated[int, Field(ge=1)] | None = None
    """Split a job's fit over steps of this many layers, so that several workers share one job.

    None: one step.
    """
    runner_command: tuple[str, ...] = (sys.executable, "-P", "-m", "workers.runner")
    runner_environment: tuple[str, ...] = ()
    """Names of further variables to hand to the runner, which otherwise sees no secret."""
    step_memory_bytes: Bytes | None = None
    """Memory that a step's process and its children may hold, on Linux. Not counted: GPU memory, mapped files.

    None: nearly all that the machine or container has.
    """
    step_seconds: Seconds | None = 86_400.0
    """How long one attempt at a step may take; None: as long as it likes."""
    step_file_bytes: Bytes = 256 << 30
    """The largest file that a step may write."""
    isolate_steps: bool = False
    """Leave every step but `resolve` no network at all, by a namespace of its own (Linux).

    Only `resolve` can then fetch a model: all workers share one cache of the hub's client (`HF_HOME`).
    """
    device: str = "auto"
    spill_activations: bool = False
    """Keep hidden states in files of a step's working folder instead of memory."""
    progress_seconds: Seconds = 1.0
    """Progress lines of a child are written to the database at most this often."""

    failpoint: str = ""
    """For tests: where this process dies, pauses or fails (`app/infra/failpoints.py`)."""
    failpoint_dir: Path | None = None
    """Without this folder `failpoint` has no effect."""

    @field_validator("failpoint")
    @classmethod
    def _is_a_failpoint(cls, failpoint: str) -> str:
        if failpoint:
            failpoints.parse(failpoint)
        return failpoint

    @field_validator("broker_url")
    @classmethod
    def _is_redis(cls, url: str) -> str:
        # Other transports lose the message of a killed worker, or cannot wait without polling.
        if url and not url.startswith(("redis://", "rediss://")):
            raise ValueError("must be a redis:// or rediss:// URL")
        return url

    @field_validator("model_roots")
    @classmethod
    def _are_plain_folders(cls, roots: tuple[Path, ...]) -> tuple[Path, ...]:
        if not all(root.is_absolute() and ".." not in root.parts for root in roots):
            raise ValueError("must be absolute folders, without '..'")
        return roots

    @field_validator("secret_keys")
    @classmethod
    def _are_fernet_keys(cls, value: SecretStr) -> SecretStr:
        for key in split_keys(value):
            try:
                raw = base64.urlsafe_b64decode(key)
            except ValueError:
                raw = b""
            if len(raw) != 32:
                raise ValueError("must be Fernet keys (32 bytes in URL-safe base64), parted by commas")
        return value

    @model_validator(mode="after")
    def _heartbeats_fit_into_the_lease(self) -> Self:
        # A worker gives up after two thirds of a lease without a heartbeat; one heartbeat has to fit in
        # before.
        if self.heartbeat_seconds > self.lease_seconds / 2:
            raise ValueError("heartbeat_seconds must be at most half of lease_seconds")
        return self

    @property
    def resolved_database_url(self) -> str:
        return self.database_url or f"sqlite:///{self.data_dir.resolve() / 'orthokv.db'}"

    @property
    def resolved_storage_url(self) -> str:
        return self.storage_url or (self.data_dir.resolve() / "objects").as_uri()

    @property
    def work_dir(self) -> Path:
        return self.data_dir.resolve() / "work"

    @property
    def wake_file(self) -> Path:
        """The named pipe through which the API wakes an idle worker of the same data folder."""
        return self.data_dir.resolve() / "wake"


def split_keys(value: SecretStr) -> tuple[str, ...]:
    """The keys of `secret_keys`."""
    return tuple(key.strip() for key in value.get_secret_value().split(",") if key.strip())
