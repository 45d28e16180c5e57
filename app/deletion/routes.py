"""Routes that delete. Here rather than beside the other routes of what they delete: it takes a look at every domain."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from app.artifacts.routes import ArtifactId
from app.auth.dependency import CheckpointsWrite, DatasetsWrite, JobsWrite, guarded
from app.checkpoints.routes import CheckpointId
from app.datasets.routes import DatasetId
from app.deletion import service
from app.http.dependencies import Db
from app.http.errors import Code
from app.jobs.dependencies import JobId
from app.profiles.routes import ProfileId

router = APIRouter(prefix="/v1")

_DELETE: dict[str, Any] = {
    "status_code": 204,
    "summary": "Delete",
    "responses": guarded(Code.FOREIGN_ORIGIN, Code.NOT_FOUND, Code.CONFLICT),
}


@router.delete("/jobs/{job_id}", operation_id="jobs.delete", tags=["jobs"], **_DELETE)
async def delete_job(job_id: JobId, principal: JobsWrite, db: Db) -> None:
    """Delete a job that has ended, with its events, layers, profile, checkpoint and files."""
    await db.write(service.delete_job, job_id=job_id, principal=principal)


@router.delete("/datasets/{dataset_id}", operation_id="datasets.delete", tags=["datasets"], **_DELETE)
async def delete_dataset(dataset_id: DatasetId, principal: DatasetsWrite, db: Db) -> None:
    """Delete a dataset that no open job needs."""
    await db.write(service.delete_dataset, dataset_id=dataset_id, principal=principal)


@router.delete("/profiles/{profile_id}", operation_id="profiles.delete", tags=["profiles"], **_DELETE)
async def delete_profile(profile_id: ProfileId, principal: JobsWrite, db: Db) -> None:
    """Delete a profile and its files. Checkpoints that were made from it stay."""
    await db.write(service.delete_profile, profile_id=profile_id, principal=principal)


@router.delete(
    "/checkpoints/{checkpoint_id}", operation_id="checkpoints.delete", tags=["checkpoints"], **_DELETE
)
async def delete_checkpoint(checkpoint_id: CheckpointId, principal: CheckpointsWrite, db: Db) -> None:
    """Delete a checkpoint and its files."""
    await db.write(service.delete_checkpoint, checkpoint_id=checkpoint_id, principal=principal)


@router.delete("/artifacts/{artifact_id}", operation_id="artifacts.delete", tags=["artifacts"], **_DELETE)
async def delete_artifact(artifact_id: ArtifactId, principal: JobsWrite, db: Db) -> None:
    """Delete a file that belongs to no profile and no checkpoint, such as a fitted layer of a job that has succeeded."""
    await db.write(service.delete_artifact, artifact_id=artifact_id, principal=principal)
