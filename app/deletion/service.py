"""What clients may delete, and what stands in the way.

Rows go in the caller's transaction: from its commit on there is nothing left to see, to count or to hand out.
The bytes go with the next sweep of the garbage.
"""

from __future__ import annotations

from sqlalchemy.orm import Session

from app.audit.service import record
from app.auth.repository import project_named
from app.checkpoints.repository import find_checkpoint
from app.datasets.repository import lock_dataset
from app.deletion import repository
from app.http.errors import Code, Problem, not_found
from app.jobs.models import Job
from app.jobs.repository import find_locked_job
from app.jobs.vocabulary import TERMINAL, JobStatus
from app.principal import DEFAULT_PROJECT_ID, Principal
from app.profiles.repository import find_profile


def delete_job(session: Session, *, job_id: str, principal: Principal) -> None:
    """Delete a job that has ended, with its events, layers, profile, checkpoint and files."""
    job = _lock_job(session, job_id, principal)
    _refuse_open(job)
    profile = repository.lock_profile_of(session, job.id)
    if profile is not None:
        _refuse_used_profile(session, profile.id, principal)
    repository.delete_job(session, job.id)
    record(session, principal, "job.deleted", job_id)


def delete_dataset(session: Session, *, dataset_id: str, principal: Principal) -> None:
    """Delete a dataset that no open job names. Jobs that have ended keep its id."""
    row = lock_dataset(session, dataset_id, project_id=principal.project_id)
    if row is None:
        raise not_found("dataset")
    users = repository.count_using_dataset(session, dataset_id, project_id=principal.project_id)
    if users:
        raise Problem(Code.CONFLICT, f"{_jobs(users)} not ended and may still need this dataset.")
    repository.delete_dataset(session, dataset_id)
    record(session, principal, "dataset.deleted", dataset_id)


def delete_profile(session: Session, *, profile_id: str, principal: Principal) -> None:
    """Delete a profile and its files. Checkpoints that were made from it stay whole."""
    found = find_profile(session, profile_id, project_id=principal.project_id)
    if found is None:
        raise not_found("profile")
    _refuse_open(_lock_job(session, found.job_id, principal))
    profile = repository.lock_profile(session, profile_id, project_id=principal.project_id)
    if profile is None:  # another request was faster
        raise not_found("profile")
    _refuse_used_profile(session, profile_id, principal)
    repository.delete_profile(session, profile)
    record(session, principal, "profile.deleted", profile_id)


def delete_checkpoint(session: Session, *, checkpoint_id: str, principal: Principal) -> None:
    """Delete a checkpoint and its files. It exists only once its job has succeeded, so nothing needs it."""
    found = find_checkpoint(session, checkpoint_id, project_id=principal.project_id)
    if found is None:
        raise not_found("checkpoint")
    _lock_job(session, found.job_id, principal)
    if find_checkpoint(session, checkpoint_id, project_id=principal.project_id) is None:
        raise not_found("checkpoint")
    repository.delete_checkpoint(session, found)
    record(session, principal, "checkpoint.deleted", checkpoint_id)


def delete_artifact(session: Session, *, artifact_id: str, principal: Principal) -> None:
    """Delete a file that is a part of nothing: of a profile or checkpoint, that is to be deleted as a whole."""
    job_id = repository.job_of_artifact(session, artifact_id, project_id=principal.project_id)
    if job_id is None:
        raise not_found("artifact")
    job = _lock_job(session, job_id, principal)
    if repository.job_of_artifact(session, artifact_id, project_id=principal.project_id) is None:
        raise not_found("artifact")
    if job.status != JobStatus.SUCCEEDED:
        raise Problem(Code.CONFLICT, "Its job has not succeeded and may still need it; delete the job.")
    if (holder := repository.holder_of(session, artifact_id)) is not None:
        raise Problem(Code.CONFLICT, f"The file belongs to {holder}; delete that.")
    repository.delete_artifacts(session, [artifact_id])
    record(session, principal, "artifact.deleted", artifact_id)


def delete_project(session: Session, *, name: str, principal: Principal) -> None:
    """Erase a project with its keys and everything that they made. The command line's own."""
    project = project_named(session, name)
    if project is None:
        raise not_found("project")
    if project.id == DEFAULT_PROJECT_ID:
        raise Problem(Code.CONFLICT, "The default project cannot be deleted.")
    if open_jobs := repository.count_open_jobs(session, project.id):
        raise Problem(Code.CONFLICT, f"{_jobs(open_jobs)} not ended; cancel them first.")
    project_id = project.id
    repository.delete_project(session, project_id)
    record(session, principal, "project.deleted", project_id, project_id=project_id, data={"name": name})


def _lock_job(session: Session, job_id: str, principal: Principal) -> Job:
    job = find_locked_job(session, job_id, project_id=principal.project_id)
    if job is None:
        raise not_found("job")
    return job


def _refuse_open(job: Job) -> None:
    if job.status not in TERMINAL:
        raise Problem(Code.CONFLICT, f"The job is {job.status}; cancel it first, or wait for its end.")


def _refuse_used_profile(session: Session, profile_id: str, principal: Principal) -> None:
    users = repository.count_using_profile(session, profile_id, project_id=principal.project_id)
    if users:
        raise Problem(Code.CONFLICT, f"{_jobs(users)} not ended and may still need the profile.")


def _jobs(count: int) -> str:
    return "1 job has" if count == 1 else f"{count} jobs have"
