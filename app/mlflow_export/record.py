"""What of a job MLflow is told: names and values, no connection."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

Job = dict[str, Any]

JOB_ID = "orthokv.job_id"
VERSION = "orthokv.job_version"
"""The version of the job that a run shows in full. Written last: a run without it is not finished."""
CHECKPOINT_ID = "orthokv.checkpoint_id"
FINISHED_AT = "orthokv.finished_at"
MANIFEST = "orthokv.manifest_sha256"
"""Digest of the checkpoint's SHA256SUMS, which names every file by its own."""

_STATUSES = {"succeeded": "FINISHED", "failed": "FAILED", "cancelled": "KILLED"}
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Metric:
    """`timestamp` in milliseconds; `step` is the layer, 0 for what belongs to the whole model."""

    key: str
    value: float
    timestamp: int
    step: int


@dataclass(frozen=True)
class Record:
    """A run. Times in milliseconds since 1970. The same job makes the same record, so writing it twice changes nothing."""

    name: str
    status: str
    start_time: int
    end_time: int
    params: dict[str, str]
    metrics: list[Metric]
    tags: dict[str, str]


def record_of(job: Job, layers: list[dict[str, Any]], *, manifest: str | None, public_url: str) -> Record:
    """An ended job, its committed layers and the digest of its checkpoint's manifest."""
    ended = milliseconds(job["finished_at"])
    result = job["result"] or {}
    metrics = [
        Metric(f"layer.{name}", float(value), milliseconds(layer["committed_at"]), layer["layer"])
        for layer in layers
        for name, value in layer["metrics"].items()
        if _is_number(value)
    ]
    for part in ("measured", "plan"):
        metrics += _numbers(part, result.get(part) or {}, ended)
    tags = {
        JOB_ID: job["id"],
        FINISHED_AT: str(ended),
        "orthokv.kind": job["kind"],
        "orthokv.status": job["status"],
        "orthokv.attempt": str(job["attempt"]),
        "orthokv.url": f"{public_url}/v1/jobs/{job['id']}",
        "orthokv.profile_id": result.get("profile_id"),
        CHECKPOINT_ID: result.get("checkpoint_id"),
        MANIFEST: manifest,
        "orthokv.error": (job["error"] or {}).get("code"),
    }
    # Revision and digests of what was really used. The geometry follows from them.
    for part in ("model", "dataset"):
        tags |= dict(_flat(f"orthokv.{part}", job["resolved"].get(part) or {}))
    tags |= {f"orthokv.metadata.{key}": value for key, value in job["metadata"].items()}
    return Record(
        name=job["id"],
        status=_STATUSES[job["status"]],
        start_time=milliseconds(job["started_at"] or job["created_at"]),
        end_time=ended,
        params=dict(_flat("", job["spec"])),
        metrics=metrics,
        tags={key: value for key, value in tags.items() if value is not None},
    )


def model_name(job: Job) -> str:
    """The registered model of a job's base model: its id without what MLflow refuses in names."""
    base = job["resolved"].get("model") or job["spec"].get("model") or {}
    # Of a folder the last part: the rest belongs to one machine.
    shown = str(base.get("id", "model"))
    shown = shown.rstrip("/").rpartition("/")[2] if shown.startswith("/") else shown
    return f"{_NOT_IN_NAMES.sub('--', shown)}-orthokv"


def milliseconds(moment: str) -> int:
    """Of an RFC 3339 time as the API writes it."""
    return round(datetime.fromisoformat(moment).timestamp() * 1000)


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else key, part)
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from _flat(f"{prefix}.{index}", part)
    elif value is not None:
        yield prefix, str(value)


def _numbers(prefix: str, values: Mapping[str, Any], timestamp: int) -> Iterator[Metric]:
    """Numbers as they are; a list has a number a layer, or several by name, such as the ranks of keys and values."""
    for name, value in values.items():
        if _is_number(value):
            yield Metric(f"{prefix}.{name}", float(value), timestamp, 0)
        elif isinstance(value, list):
            for step, part in enumerate(value):
                if _is_number(part):
                    yield Metric(f"{prefix}.{name}", float(part), timestamp, step)
                elif isinstance(part, Mapping):
                    for key, number in part.items():
                        if _is_number(number):
                            yield Metric(f"{prefix}.{name}.{key}", float(number), timestamp, step)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
