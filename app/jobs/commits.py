"""What a worker writes about its step: progress, layers, results. Each call is fenced and is one transaction.

Objects come first: every `Produced` is already in the store, verified, under a key that contains the fence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy.orm import Session

from app.artifacts.models import Artifact
from app.artifacts.repository import files_of_job
from app.checkpoints.models import Checkpoint, CheckpointFile
from app.costs.recording import note_cost
from app.infra.ids import new_id
from app.jobs import repository
from app.jobs.lease import Lease, acknowledge_cancel, hold
from app.jobs.models import Job, Layer, Step
from app.jobs.states import move_step, record, touch, transition
from app.jobs.unfold import add_fit_steps, open_next_stage
from app.jobs.vocabulary import JobKind, JobStatus, StepName, StepStatus
from app.profiles.models import Profile


class IncompleteResult(Exception):
    """The child reported success but left out something that the step owes: a defect of the runner."""


@dataclass(frozen=True)
class Produced:
    """A verified object that awaits its row."""

    filename: str
    object_key: str
    bytes: int
    sha256: str
    media_type: str
    layer: int | None = None
    metrics: dict[str, Any] = field(default_factory=dict)


def commit_progress(session: Session, lease: Lease, *, phase: str, done: int, total: int, unit: str) -> None:
    """Show how far the child is. While fitting, progress is what is committed, never what is promised."""
    job, _step = hold(session, lease)
    changed = job.phase != phase
    job.phase = phase
    if lease.step is not StepName.FIT:
        job.progress = {"done": done, "total": total, "unit": unit}
    if changed:
        record(session, job, "phase.changed", {"phase": phase})
    else:
        touch(job)


def commit_layer(session: Session, lease: Lease, produced: Produced) -> None:
    """Make one fitted layer safe: from here on nobody fits it again."""
    job, step = hold(session, lease)
    if produced.layer is None or produced.layer not in (step.layers or []):
        raise IncompleteResult(f"layer {produced.layer} is not among the layers of this step")
    artifact = _add_artifact(session, job, step, produced)
    session.flush()
    session.add(
        Layer(
            artifact_id=artifact.id,
            job_id=job.id,
            step_id=step.id,
            layer=produced.layer,
            fence=lease.fence,
            attempt=step.attempts,
            metrics=produced.metrics,
        )
    )
    step.failures = 0  # a step that gets on is not a step that fails
    _show_layers(session, job)
    committed = {
        "layer": produced.layer,
        "metrics": produced.metrics,
        "artifact": artifact.id,
        "fence": lease.fence,
    }
    record(session, job, "layer.committed", committed)


def finish_step(
    session: Session,
    lease: Lease,
    *,
    files: Sequence[Produced],
    data: dict[str, Any],
    layers_per_fit_step: int | None,
) -> None:
    """End a step with success.

    Its files and products become visible and the next stage opens, all at once.
    """
    job, step = hold(session, lease)
    if job.status == JobStatus.CANCELLING:
        acknowledge_cancel(session, lease)
        return
    artifacts = {produced.filename: _add_artifact(session, job, step, produced) for produced in files}
    session.flush()
    match lease.step:
        case StepName.RESOLVE:
            job.resolved = {**job.resolved, "model": data["model"], "geometry": data["geometry"]}
            layers = data["geometry"]["layers"]
            add_fit_steps(session, job, layers=layers, layers_per_step=layers_per_fit_step)
        case StepName.CALIBRATE:
            _owe(artifacts, "blocks.safetensors")
            job.resolved = {**job.resolved, "dataset": data["dataset"]}
        case StepName.FIT:
            _owe_layers(session, job, step)
        case StepName.PROFILE:
            _add_profile(session, job, artifacts, data["summary"])
        case StepName.PACKAGE:
            _owe(artifacts, "orthokv.json", "orthokv.safetensors", "SHA256SUMS")
            job.result = {**(job.result or {}), "plan": data["plan"]}
        case StepName.EVALUATE:
            _add_checkpoint(session, job, data["measured"])
    note_cost(session, job, step)
    move_step(session, step, StepStatus.SUCCEEDED)
    done = {"step": step.name, "ordinal": step.ordinal, "fence": lease.fence}
    record(session, job, "step.succeeded", done)
    if not open_next_stage(session, job):
        job.phase, job.progress = "finished", None
        transition(session, job, JobStatus.SUCCEEDED, event="job.succeeded", data={"result": job.result})


def _add_artifact(session: Session, job: Job, step: Step, produced: Produced) -> Artifact:
    artifact = Artifact(
        id=new_id("art"),
        project_id=job.project_id,
        job_id=job.id,
        step_id=step.id,
        fence=step.fence,
        filename=produced.filename,
        object_key=produced.object_key,
        bytes=produced.bytes,
        sha256=produced.sha256,
        media_type=produced.media_type,
    )
    session.add(artifact)
    return artifact


def _show_layers(session: Session, job: Job) -> None:
    total = job.resolved["geometry"]["layers"]
    job.progress = {"done": repository.count_layers(session, job.id), "total": total, "unit": "layer"}


def _owe(artifacts: dict[str, Artifact], *filenames: str) -> None:
    missing = [name for name in filenames if name not in artifacts]
    if missing:
        raise IncompleteResult(f"the result lacks {', '.join(missing)}")


def _owe_layers(session: Session, job: Job, step: Step) -> None:
    committed = {layer.layer for layer in repository.committed_layers(session, job.id)}
    missing = [layer for layer in step.layers or [] if layer not in committed]
    if missing:
        raise IncompleteResult(f"the result lacks layers {missing}")


def _add_profile(session: Session, job: Job, artifacts: dict[str, Artifact], summary: dict[str, Any]) -> None:
    _owe(artifacts, "profile.json", "profile.safetensors", "profile.png")
    profile = Profile(
        id=new_id("prof"),
        project_id=job.project_id,
        job_id=job.id,
        summary=summary,
        json_artifact_id=artifacts["profile.json"].id,
        tensors_artifact_id=artifacts["profile.safetensors"].id,
        plot_artifact_id=artifacts["profile.png"].id,
    )
    session.add(profile)
    job.result = {**(job.result or {}), "profile_id": profile.id}


def _add_checkpoint(session: Session, job: Job, measured: dict[str, Any]) -> None:
    """The manifest: the files of package, with those that evaluate wrote again in their place."""
    result = job.result or {}
    profile_id = job.profile_id if job.kind == JobKind.CHECKPOINT else result["profile_id"]
    files = files_of_job(session, job.id, StepName.PACKAGE) | files_of_job(session, job.id, StepName.EVALUATE)
    checkpoint = Checkpoint(
        id=new_id("ckpt"),
        project_id=job.project_id,
        job_id=job.id,
        profile_id=profile_id,
        form=job.spec["form"],
        budget=job.spec["budget"],
        plan=result["plan"],
        measured=measured,
    )
    session.add(checkpoint)
    session.flush()
    for filename, artifact in files.items():
        session.add(CheckpointFile(checkpoint_id=checkpoint.id, filename=filename, artifact_id=artifact.id))
    job.result = {**result, "measured": measured, "profile_id": profile_id, "checkpoint_id": checkpoint.id}
