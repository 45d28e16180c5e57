"""What a process counts as it happens, in memory, from its start on.

Every process has its own; Prometheus adds them up. Changes of rows are counted once they are committed
(`app.infra.database.after_commit`). Labels come from closed lists only: no ids, no names of projects, no paths.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.platform_collector import PlatformCollector

REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)
PlatformCollector(registry=REGISTRY)

_REQUEST_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_WORK_SECONDS = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 14400)

# The API.
HTTP_REQUEST_SECONDS = Histogram(
    "orthokv_http_request_seconds",
    "From a request to the beginning of its answer.",
    ["method", "route", "status"],
    buckets=_REQUEST_SECONDS,
    registry=REGISTRY,
)
PROBLEMS = Counter(
    "orthokv_problems",
    "Requests that were refused or failed, by the code of the problem; rate_limited among them.",
    ["code"],
    registry=REGISTRY,
)
EVENT_STREAMS = Gauge("orthokv_event_streams", "Event streams that are open.", registry=REGISTRY)

# Jobs, wherever they end.
JOBS = Counter(
    "orthokv_jobs",
    "Jobs that ended, by how; code says why they failed.",
    ["status", "code"],
    registry=REGISTRY,
)
LEASE_EXPIRIES = Counter(
    "orthokv_lease_expiries",
    "Attempts taken from workers that died or were cut off.",
    registry=REGISTRY,
)

# The reaper.
REAPER_SWEEPS = Counter("orthokv_reaper_sweeps", "Rounds of the reaper.", ["outcome"], registry=REGISTRY)
REAPER_RESCUED = Counter(
    "orthokv_reaper_rescued", "What the reaper had to put right or clear away.", ["what"], registry=REGISTRY
)

WEBHOOK_ATTEMPTS = Counter(
    "orthokv_webhook_attempts",
    "Attempts at webhook deliveries that this process made: taken with a 2xx, or not.",
    ["outcome"],
    registry=REGISTRY,
)

# Workers.
WORKER_IDLE = Gauge(
    "orthokv_worker_idle",
    "For each GPU class that this worker serves: 1 while it waits for work, 0 while it runs a step.",
    ["gpu_class"],
    registry=REGISTRY,
)
ATTEMPTS = Counter(
    "orthokv_attempts",
    "Attempts at a step that this worker ended, by how; code says why they failed.",
    ["step", "outcome", "code"],
    registry=REGISTRY,
)
ATTEMPT_SECONDS = Histogram(
    "orthokv_attempt_seconds",
    "From a claim to the last write about it.",
    ["step"],
    buckets=_WORK_SECONDS,
    registry=REGISTRY,
)
LAYER_SECONDS = Histogram(
    "orthokv_layer_seconds",
    "From the layer before, or from the beginning of the fit, to a committed layer.",
    buckets=_WORK_SECONDS,
    registry=REGISTRY,
)
PEAK_MEMORY_BYTES = Gauge(
    "orthokv_peak_memory_bytes",
    "Most memory that the latest attempt at a step of this kind held, of the host and of the GPU.",
    ["step", "memory"],
    registry=REGISTRY,
)
HEARTBEAT_FAILURES = Counter(
    "orthokv_heartbeat_failures", "Heartbeats that did not reach the database.", registry=REGISTRY
)

# From zero, so that the first one shows as a rise.
for _outcome in ("done", "failed"):
    REAPER_SWEEPS.labels(_outcome)
for _outcome in ("succeeded", "failed"):
    WEBHOOK_ATTEMPTS.labels(_outcome)
for _what in ("attempts_lost", "cancels_forced", "hints_resent", "keys_expired", "orphans_deleted"):
    REAPER_RESCUED.labels(_what)
