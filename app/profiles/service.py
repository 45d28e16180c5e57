"""Reading profiles and asking for checkpoints of them."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy.orm import Session

from app.artifacts.repository import by_ids
from app.artifacts.schemas import Artifact
from app.errors import not_found
from app.jobs.repository import jobs_by_ids
from app.jobs.schemas import CompressSpec, Job
from app.jobs.service import create_from_profile
from app.pagination import Cursor, Page, page
from app.profiles import repository
from app.profiles.models import Profile as Row
from app.profiles.schemas import CheckpointCreate, Profile, ProfileFiles


def get(session: Session, *, profile_id: str) -> Profile:
    return _profiles(session, [_row(session, profile_id)])[0]


def list_page(session: Session, *, cursor: Cursor) -> Page[Profile]:
    rows, has_more = repository.list_profiles(session, cursor)
    data = _profiles(session, rows)
    return page(data, has_more)


def locate_plot(session: Session, *, profile_id: str) -> tuple[Artifact, str]:
    """The plot and the key of its object."""
    artifact_id = _row(session, profile_id).plot_artifact_id
    row = by_ids(session, [artifact_id])[artifact_id]
    return Artifact.of(row), row.object_key


def create_checkpoint(session: Session, *, profile_id: str, body: CheckpointCreate) -> Job:
    """Queue the job that makes the checkpoint: it plans, packs and measures, and fits nothing."""
    profile = _row(session, profile_id)
    spec = {"profile_id": profile.id, **body.model_dump(mode="json", exclude={"metadata"})}
    return create_from_profile(
        session, profile_id=profile.id, spec=spec, labels=body.metadata, origin_id=profile.job_id
    )


def _profiles(session: Session, rows: Sequence[Row]) -> list[Profile]:
    jobs = jobs_by_ids(session, [row.job_id for row in rows])
    artifacts = by_ids(
        session,
        [
            key
            for row in rows
            for key in (row.json_artifact_id, row.tensors_artifact_id, row.plot_artifact_id)
        ],
    )
    return [
        Profile(
            id=row.id,
            job_id=row.job_id,
            spec=CompressSpec.model_validate(jobs[row.job_id].spec),
            resolved=jobs[row.job_id].resolved,
            summary=row.summary,
            files=ProfileFiles(
                json_=Artifact.of(artifacts[row.json_artifact_id]),
                tensors=Artifact.of(artifacts[row.tensors_artifact_id]),
                plot=Artifact.of(artifacts[row.plot_artifact_id]),
            ),
            created_at=row.created_at,
        )
        for row in rows
    ]


def _row(session: Session, profile_id: str) -> Row:
    row = repository.get_profile(session, profile_id)
    if row is None:
        raise not_found("profile")
    return row
