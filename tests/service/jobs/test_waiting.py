"""Any number of clients that wait cost one query an interval."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from app.infra.database import Database, SyncDatabase
from app.jobs import service
from app.jobs.repository import Moment
from app.jobs.waiting import JobWatch
from app.principal import local_principal
from tests.support.factories import queue_job

POLL_SECONDS = 0.02


class Counting(Database):
    """Counts its transactions, and can be out of order."""

    looks = 0
    broken = False

    async def read(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        self.looks += 1
        if self.broken:
            raise OperationalError("SELECT", {}, Exception("gone"))
        return await super().read(function, *args, **kwargs)


def is_cancelled(moment: Moment) -> bool:
    return moment.status == "cancelled"


def test_one_look_serves_everyone_who_waits(database: SyncDatabase, database_url: str) -> None:
    jobs = [queue_job(database).id for _ in range(5)]

    async def scenario() -> tuple[list[bool], int, float]:
        counting = Counting(database_url)
        watch = JobWatch(counting, POLL_SECONDS)
        start = time.monotonic()
        waiting = [asyncio.create_task(watch.wait(job, is_cancelled, seconds=30)) for job in jobs * 40]
        await asyncio.sleep(10 * POLL_SECONDS)
        for job in jobs:
            await asyncio.to_thread(database.write, service.cancel, job_id=job, principal=local_principal())
        woken = await asyncio.gather(*waiting)
        seconds = time.monotonic() - start
        await watch.close()
        await counting.close()
        return woken, counting.looks, seconds

    woken, looks, seconds = asyncio.run(scenario())
    assert woken == [True] * 200
    assert 2 <= looks <= seconds / POLL_SECONDS + 1


def test_the_time_is_up_without_a_change_and_nothing_looks_after_it(
    database: SyncDatabase, database_url: str
) -> None:
    job = queue_job(database).id

    async def scenario() -> tuple[bool, int, int]:
        counting = Counting(database_url)
        watch = JobWatch(counting, POLL_SECONDS)
        came = await watch.wait(job, is_cancelled, seconds=5 * POLL_SECONDS)
        await asyncio.sleep(3 * POLL_SECONDS)
        before = counting.looks
        await asyncio.sleep(5 * POLL_SECONDS)
        await watch.close()
        await counting.close()
        return came, before, counting.looks

    came, before, after = asyncio.run(scenario())
    assert not came
    assert before == after > 0


def test_a_job_that_is_gone_ends_the_waiting(database_url: str) -> None:
    async def scenario() -> bool:
        counting = Counting(database_url)
        watch = JobWatch(counting, POLL_SECONDS)
        came = await watch.wait("job_" + "0" * 26, is_cancelled, seconds=30)
        await watch.close()
        await counting.close()
        return came

    assert asyncio.run(scenario())


def test_a_database_that_is_away_is_told_to_who_waits_and_not_for_ever(
    database: SyncDatabase, database_url: str
) -> None:
    job = queue_job(database).id

    async def scenario() -> bool:
        counting = Counting(database_url)
        watch = JobWatch(counting, POLL_SECONDS)
        counting.broken = True
        with pytest.raises(OperationalError):
            await watch.wait(job, is_cancelled, seconds=30)
        counting.broken = False
        came = await watch.wait(job, lambda moment: moment.status == "queued", seconds=30)
        await watch.close()
        await counting.close()
        return came

    assert asyncio.run(scenario())
