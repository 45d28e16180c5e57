"""What tests begin with: requests, jobs in some state, scripts for the runner."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import update
from sqlalchemy.orm import Session

from app.infra.database import SyncDatabase, now
from app.jobs import service
from app.jobs.commits import Produced, commit_layer, finish_step
from app.jobs.lease import Lease, RetryPolicy, claim
from app.jobs.models import Step
from app.jobs.schemas import Job, JobCreate
from app.jobs.vocabulary import StepName
from app.principal import Principal, local_principal
from app.settings import DEFAULT_GPU_CLASS, Settings

POLICY = RetryPolicy(max_failures=3, backoff_seconds=0.001)
LEASE_SECONDS = 30.0
LAYERS = 3


class Script:
    """The folder that a scripted runner reads and writes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.write()

    def write(self, *faults: dict[str, Any], layers: int = LAYERS) -> None:
        (self.folder / "script.json").write_text(json.dumps({"layers": layers, "faults": faults}))

    def runs(self, step: str | None = None) -> list[dict[str, Any]]:
        """Every run so far, in order."""
        file = self.folder / "runs.jsonl"
        runs = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [run for run in runs if step in (None, run["step"])]

    def is_hanging(self, step: str) -> bool:
        return (self.folder / f"hanging-{step}").exists()

    def go_on(self) -> None:
        (self.folder / "go-on").touch()


def job_body(**changes: Any) -> dict[str, Any]:
    """A valid body of POST /v1/jobs."""
    body: dict[str, Any] = {
        "model": {"id": "org/model"},
        "dataset": {"source": "self", "num_samples": 4, "sequence_length": 64},
        "budget": {"metric": "kept", "value": 0.25},
    }
    return {**body, **changes}


def queue_job(database: SyncDatabase, principal: Principal | None = None, **changes: Any) -> Job:
    body = JobCreate.model_validate(job_body(**changes))
    settings = Settings(gpu_classes=(body.gpu_class,))
    return database.write(
        service.create, body=body, principal=principal or local_principal(), settings=settings
    )


def read_job(database: SyncDatabase, job_id: str) -> Job:
    return database.read(service.get, job_id=job_id, principal=local_principal())


def claim_next(
    database: SyncDatabase, owner: str = "worker-1", *, gpu_classes: Sequence[str] = (DEFAULT_GPU_CLASS,)
) -> Lease | None:
    return database.write(
        claim, owner=owner, lease_seconds=LEASE_SECONDS, max_running_steps=None, gpu_classes=gpu_classes
    )


def must_claim(database: SyncDatabase, owner: str = "worker-1") -> Lease:
    lease = claim_next(database, owner)
    assert lease is not None, "a step should be ready"
    return lease


def produced(lease: Lease, filename: str, *, layer: int | None = None) -> Produced:
    """A file as if it had been stored under this lease."""
    return Produced(
        filename=filename,
        object_key=f"jobs/{lease.job_id}/{lease.step_id}/{lease.fence}/{filename}",
        bytes=3,
        sha256="0" * 64,
        media_type="application/octet-stream",
        layer=layer,
        metrics={"error": 0.5} if layer is not None else {},
    )


_FILES: dict[StepName, tuple[str, ...]] = {
    StepName.RESOLVE: (),
    StepName.CALIBRATE: ("blocks.safetensors",),
    StepName.FIT: (),
    StepName.PROFILE: ("profile.json", "profile.safetensors", "profile.png"),
    StepName.PACKAGE: ("orthokv.json", "orthokv.safetensors", "README.md", "SHA256SUMS"),
    StepName.EVALUATE: ("orthokv.json", "README.md", "SHA256SUMS"),
}
_DATA: dict[StepName, dict[str, Any]] = {
    StepName.RESOLVE: {
        "model": {"id": "org/model", "revision": "abc", "digest": "f"},
        "geometry": {"layers": LAYERS},
    },
    StepName.CALIBRATE: {"dataset": {"digest": "d"}},
    StepName.FIT: {},
    StepName.PROFILE: {"summary": {"layers": LAYERS}},
    StepName.PACKAGE: {"plan": {"kept": 0.25}},
    StepName.EVALUATE: {"measured": {"kept": 0.25, "perplexity": 9.0}},
}


def put_layer(database: SyncDatabase, lease: Lease, layer: int) -> None:
    database.write(commit_layer, lease, produced(lease, f"layer-{layer:03d}.safetensors", layer=layer))


def finish(database: SyncDatabase, lease: Lease, *, layers_per_fit_step: int | None = None) -> None:
    """End a step as a worker would that did all of it."""
    files = [produced(lease, name) for name in _FILES[lease.step]]
    database.write(
        finish_step,
        lease,
        files=files,
        data=_DATA[lease.step],
        layers_per_fit_step=layers_per_fit_step,
    )


def advance(database: SyncDatabase, job_id: str, until: StepName) -> Lease:
    """Run a job's steps up to one, and claim that."""
    while True:
        lease = must_claim(database)
        assert lease.job_id == job_id
        if lease.step is until:
            return lease
        if lease.step is StepName.FIT:
            for layer in range(LAYERS):
                put_layer(database, lease, layer)
        finish(database, lease)


def complete(database: SyncDatabase, job_id: str) -> Job:
    """Run a job to its end."""
    finish(database, advance(database, job_id, StepName.EVALUATE))
    return read_job(database, job_id)


def expire(database: SyncDatabase, lease: Lease) -> None:
    """Let a lease run out now."""

    def age(session: Session) -> None:
        session.execute(update(Step).where(Step.id == lease.step_id).values(lease_expires_at=now(-1.0)))

    database.write(age)


def hurry(database: SyncDatabase) -> None:
    """End every back-off now."""
    database.write(lambda session: session.execute(update(Step).values(not_before=now(-1.0))))
