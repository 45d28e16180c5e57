"""From rows to a runner's request: what a step needs to know and to have at hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from app.artifacts.repository import files_of_job
from app.datasets.repository import get_dataset
from app.infra.storage import Storage
from app.jobs import model_folders, repository
from app.jobs.lease import Lease, LeaseLost
from app.jobs.models import Job
from app.jobs.schemas import CheckpointSpec, CompressSpec, TextRef
from app.jobs.vocabulary import StepName
from app.profiles.repository import get_profile
from app.quotas.service import largest_model
from app.settings import Settings
from orthokv.spec.settings import FitSettings
from orthokv.spec.target import Target
from workers.protocol import DatasetRef, ModelRef, Request


@dataclass(frozen=True)
class Source:
    """An object to fetch before the step begins."""

    filename: str
    object_key: str
    sha256: str


@dataclass(frozen=True)
class Text:
    """A calibration text: the object that holds it, where this step reads it."""

    name: str
    field: str
    format: str | None = None
    object: Source | None = None
    shown: str | None = None


@dataclass(frozen=True)
class Order:
    """A claimed step with everything that the database knows about it."""

    job_id: str
    model: ModelRef
    settings: FitSettings
    target: Target
    by_owner: bool
    layers: list[int]
    inputs: list[Source]
    texts: list[Text]


# Files of earlier steps that a step reads.
_READS: dict[StepName, tuple[StepName, ...]] = {
    StepName.RESOLVE: (),
    StepName.CALIBRATE: (),
    StepName.FIT: (StepName.CALIBRATE,),
    StepName.PROFILE: (StepName.CALIBRATE, StepName.FIT),
    StepName.PACKAGE: (StepName.CALIBRATE, StepName.PROFILE),
    StepName.EVALUATE: (StepName.CALIBRATE, StepName.PACKAGE),
}
# The plot is for people; no step reads it.
_NOT_READ = {"profile.png"}


def load_order(session: Session, lease: Lease, settings: Settings) -> Order:
    """Read the order of a claimed step."""
    job = repository.get_job(session, lease.job_id)
    if job is None:
        raise LeaseLost
    origin = _origin(session, job)
    reads = _READS[lease.step]
    # What was fitted comes from the origin, what was packed is always this job's own.
    fitted = files_of_job(session, origin.id, *(name for name in reads if name is not StepName.PACKAGE))
    files = fitted | files_of_job(session, job.id, *reads)
    spec = CompressSpec.model_validate(origin.spec)
    asked = spec if job is origin else CheckpointSpec.model_validate(job.spec)
    resolved: dict[str, Any] = job.resolved.get("model") or spec.model.model_dump()
    return Order(
        job_id=job.id,
        model=ModelRef(
            id=resolved["id"],
            revision=resolved["revision"],
            max_weight_bytes=largest_model(session, project_id=job.project_id, settings=settings),
        ),
        settings=spec.settings(),
        target=asked.target(),
        by_owner=job.by_owner,
        layers=_owed_layers(session, lease),
        inputs=[
            Source(file.filename, file.object_key, file.sha256)
            for file in files.values()
            if file.filename not in _NOT_READ
        ],
        texts=_texts(session, spec.dataset.texts, fetched=lease.step is StepName.CALIBRATE),
    )


def _texts(session: Session, asked: list[TextRef], *, fetched: bool) -> list[Text]:
    found: list[Text] = []
    for number, part in enumerate(asked):
        dataset = None if part.id is None else get_dataset(session, part.id)
        if dataset is None:
            found.append(Text(str(part.source or part.id), part.field))
            continue
        assert dataset.object_key is not None, "jobs take ready datasets only"
        assert dataset.sha256 is not None
        name = f"dataset-{number}.{dataset.format}" if number else f"dataset.{dataset.format}"
        source = Source(name, dataset.object_key, dataset.sha256) if fetched else None
        found.append(Text(dataset.id, part.field, dataset.format, source, dataset.filename))
    return found


def prepare(order: Order, lease: Lease, storage: Storage, settings: Settings, folder: Path) -> Request:
    """Fetch the inputs into the (new) folder, with their digests checked, and write the request.

    Raises `StorageError`, and `FolderRefused` where the model's folder is not for whoever made the job: asked again here,
    where the folder lies, and before every step, since links can change.
    """
    model_folders.require(
        order.model.id, form=order.target.form, by_owner=order.by_owner, roots=settings.model_roots
    )
    inputs, workdir = folder / "inputs", folder / "work"
    for made in (folder.parent.parent, folder.parent, folder, inputs, workdir):
        made.mkdir(mode=0o700, parents=True, exist_ok=made not in (inputs, workdir))
    for source in order.inputs:
        storage.fetch(source.object_key, inputs / source.filename, sha256=source.sha256)
    texts: list[DatasetRef] = []
    for text in order.texts:
        name = text.name
        if text.object is not None:
            path = folder / text.object.filename
            storage.fetch(text.object.object_key, path, sha256=text.object.sha256)
            name = str(path)
        texts.append(DatasetRef(source=name, format=text.format, field=text.field, shown=text.shown))
    return Request(
        step=lease.step,
        job_id=order.job_id,
        workdir=str(workdir),
        model=order.model,
        dataset=texts,
        settings=order.settings,
        target=order.target,
        layers=order.layers,
        inputs={source.filename: str(inputs / source.filename) for source in order.inputs},
        device=settings.device,
        spill=settings.spill_activations,
    )


def _origin(session: Session, job: Job) -> Job:
    """The job that fitted: this one, or the one behind the profile that this one starts from."""
    if job.profile_id is None:
        return job
    profile = get_profile(session, job.profile_id)
    origin = repository.get_job(session, profile.job_id) if profile is not None else None
    assert origin is not None, "foreign keys keep the profile and its job"
    return origin


def _owed_layers(session: Session, lease: Lease) -> list[int]:
    """Layers of a fit step that are not committed yet."""
    step = next(step for step in repository.steps_of(session, [lease.job_id]) if step.id == lease.step_id)
    committed = {layer.layer for layer in repository.committed_layers(session, lease.job_id)}
    return [layer for layer in step.layers or [] if layer not in committed]
