"""Waiting for a job to change: short transactions at intervals, none held in between."""

from __future__ import annotations

import asyncio
import time

from app.auth.principal import Principal
from app.database import Database
from app.jobs import service
from app.jobs.schemas import Job
from app.jobs.vocabulary import TERMINAL


async def wait_for_change(
    database: Database,
    *,
    job_id: str,
    principal: Principal,
    wait_seconds: float,
    if_version: int | None,
    poll_seconds: float,
) -> Job:
    """The job, once its version differs from `if_version` (by default.

    The present one), it ended, or time is up.
    """
    deadline = time.monotonic() + wait_seconds
    version, status = await database.read(service.get_version, job_id=job_id, principal=principal)
    seen = version if if_version is None else if_version
    while version == seen and status not in TERMINAL and (left := deadline - time.monotonic()) > 0:
        await asyncio.sleep(min(poll_seconds, left))
        version, status = await database.read(service.get_version, job_id=job_id, principal=principal)
    return await database.read(service.get, job_id=job_id, principal=principal)
