"""Fill a migrated database with jobs that look like real ones: one job is run by the service's own functions, then copied."""

from __future__ import annotations

from typing import Any

from sqlalchemy import insert, inspect, select
from sqlalchemy.orm import Session

from app.infra.database import SyncDatabase
from app.infra.ids import new_id
from app.jobs.models import Event, Job, Step
from tests.support.factories import complete, queue_job

_AT_ONCE = 2_000  # jobs a transaction


def seed(database: SyncDatabase, *, finished: int, queued: int, events: int) -> list[str]:
    """Store jobs, and `events` of the finished ones in all; returns the ids of the finished ones, oldest first."""
    done = queue_job(database)
    complete(database, done.id)
    ids = _copies(database, done.id, finished - 1, events // finished)
    waiting = queue_job(database)
    _copies(database, waiting.id, queued - 1, 1)
    return [done.id, *ids]


def _copies(database: SyncDatabase, template: str, count: int, events: int) -> list[str]:
    job, steps, history = database.read(_rows, template)
    job["event_seq"] = events
    made: list[str] = []
    for first in range(0, count, _AT_ONCE):
        ids = [new_id("job") for _ in range(min(_AT_ONCE, count - first))]
        jobs = [{**job, "id": id_} for id_ in ids]
        copies = [{**step, "id": new_id("step"), "job_id": id_} for id_ in ids for step in steps]
        lines = [
            {**history[n % len(history)], "job_id": id_, "seq": n + 1} for id_ in ids for n in range(events)
        ]
        database.write(_store, jobs, copies, lines)
        made += ids
    return made


def _rows(session: Session, job_id: str) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    job = session.get_one(Job, job_id)
    steps = session.execute(select(Step).where(Step.job_id == job_id)).scalars()
    events = session.execute(select(Event).where(Event.job_id == job_id).order_by(Event.seq)).scalars()
    return _values(job), [_values(step) for step in steps], [_values(event) for event in events]


def _values(row: Any) -> dict[str, Any]:
    return {attribute.key: getattr(row, attribute.key) for attribute in inspect(type(row)).column_attrs}


def _store(
    session: Session, jobs: list[dict[str, Any]], steps: list[dict[str, Any]], events: list[dict[str, Any]]
) -> None:
    for model, rows in ((Job, jobs), (Step, steps), (Event, events)):
        session.execute(insert(model), rows)
