"""What crashes leave behind in jobs, put right. Each repair checks again under the job's lock."""

from __future__ import annotations

from sqlalchemy.orm import Session

from app.hints.dispatch import Dispatcher
from app.infra import failpoints
from app.infra.counted import LEASE_EXPIRIES
from app.infra.database import after_commit
from app.jobs import repository
from app.jobs.lease import WORKER_LOST, RetryPolicy, end_attempt, stop_others
from app.jobs.states import transition
from app.jobs.vocabulary import JobStatus


def return_lost(session: Session, policy: RetryPolicy, *, owner: str | None = None) -> int:
    """End attempts whose lease ran out, or all attempts of a worker that is known to be dead.

    Returns how many.
    """
    count = 0
    for job_id, step_id, fence in repository.lost_steps(session, owner=owner):
        job = repository.lock_job(session, job_id)
        step = repository.lock_step(session, step_id=step_id, fence=fence, overdue=owner is None)
        if job is None or step is None:
            continue  # a late heartbeat extended the lease, or another reaper was here first
        end_attempt(session, job, step, WORKER_LOST, policy)
        failpoints.hit("reaper.returning")
        after_commit(session, LEASE_EXPIRIES.inc)
        count += 1
    return count


def end_stuck_cancels(session: Session, *, grace_seconds: float) -> int:
    """Cancel jobs whose worker never acknowledged.

    Its fence is raised, so it cannot write when it wakes up.
    """
    count = 0
    for job_id in repository.stuck_cancels(session, grace_seconds=grace_seconds):
        job = repository.lock_job(session, job_id)
        if job is None or job.status != JobStatus.CANCELLING:
            continue
        stop_others(session, job)
        transition(session, job, JobStatus.CANCELLED, event="job.cancelled", data={"forced": True})
        count += 1
    return count


def mend_times(session: Session, policy: RetryPolicy, *, lease_seconds: float) -> int:
    """Undo what a clock that was put back leaves behind: steps and leases of a time that is long to come.

    Returns how many. Other processes may have longer leases, so only ten times our own is beyond any.
    """
    longest_wait = policy.backoff_seconds * 2**policy.max_failures
    return repository.hurry_late_steps(session, delay_seconds=longest_wait) + repository.shorten_long_leases(
        session, limit_seconds=10 * lease_seconds, lease_seconds=lease_seconds
    )


def resend_hints(session: Session, dispatcher: Dispatcher, *, after_seconds: float) -> int:
    """Wake workers when ready steps have waited for too long."""
    waiting = repository.count_waiting(session, older_than_seconds=after_seconds)
    for gpu_class in waiting:
        dispatcher.hint(gpu_class)
    return sum(waiting.values())
