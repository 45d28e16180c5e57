"""Waiting for a job to change: one look at the database for everyone who waits, none held in between.

Each waiting client looking for itself would be a query per client and interval: 500 idle event streams kept a
process busy with nothing else.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from app.infra.database import Database
from app.jobs import repository, service
from app.jobs.repository import Moment
from app.jobs.schemas import Job
from app.jobs.vocabulary import TERMINAL
from app.principal import Principal

_IDS_IN_A_QUERY = 500


@dataclass(frozen=True, eq=False)
class _Waiter:
    job_id: str
    has_come: Callable[[Moment], bool]
    done: asyncio.Future[None]


class JobWatch:
    """Wakes whoever waits for a job, at most `poll_seconds` after the change and one query later."""

    def __init__(self, database: Database, poll_seconds: float) -> None:
        self._database = database
        self._poll_seconds = poll_seconds
        self._waiting: dict[str, set[_Waiter]] = defaultdict(set)
        self._looking: asyncio.Task[None] | None = None

    async def wait(self, job_id: str, has_come: Callable[[Moment], bool], *, seconds: float) -> bool:
        """Wait until `has_come` is true of the job, or the job is gone; False when the time is up before.

        Raises what looking at the database raised.
        """
        waiter = _Waiter(job_id, has_come, asyncio.get_running_loop().create_future())
        self._waiting[job_id].add(waiter)
        if self._looking is None:
            self._looking = asyncio.create_task(self._look())
        try:
            await asyncio.wait_for(waiter.done, seconds)
        except TimeoutError:
            return False
        finally:
            self._waiting[job_id].discard(waiter)
            if not self._waiting[job_id]:
                del self._waiting[job_id]
        return True

    async def close(self) -> None:
        """End everyone's waiting."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)

    async def _look(self) -> None:
        """At intervals, for as long as anybody waits."""
        try:
            while self._waiting:
                await asyncio.sleep(self._poll_seconds)
                ids = list(self._waiting)
                for first in range(0, len(ids), _IDS_IN_A_QUERY):
                    some = ids[first : first + _IDS_IN_A_QUERY]
                    moments = await self._database.read(repository.moments, some)
                    for job_id in some:
                        self._tell(job_id, moments.get(job_id))
        except Exception as error:  # whatever it was, those who wait have to hear it
            self._fail(error)
        finally:
            self._looking = None

    def _tell(self, job_id: str, moment: Moment | None) -> None:
        for waiter in self._waiting.get(job_id, ()):
            if not waiter.done.done() and (moment is None or waiter.has_come(moment)):
                waiter.done.set_result(None)

    def _fail(self, error: Exception) -> None:
        for waiter in [waiter for waiters in self._waiting.values() for waiter in waiters]:
            if not waiter.done.done():
                waiter.done.set_exception(error)


async def wait_for_change(
    database: Database,
    watch: JobWatch,
    *,
    job_id: str,
    principal: Principal,
    wait_seconds: float,
    if_version: int | None,
) -> Job:
    """The job, once its version differs from `if_version`, it ended, or time is up.

    Without `if_version`: from the version that it has now.
    """
    deadline = time.monotonic() + wait_seconds
    job = await database.read(service.get, job_id=job_id, principal=principal)
    seen = job.version if if_version is None else if_version
    left = deadline - time.monotonic()
    if job.version != seen or job.ended or left <= 0:
        return job
    await watch.wait(job_id, lambda now: now.version != seen or now.status in TERMINAL, seconds=left)
    return await database.read(service.get, job_id=job_id, principal=principal)
