"""Reading a job's events, as a page or as a stream."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from sqlalchemy.orm import Session

from app.http.errors import not_found
from app.infra.database import Database
from app.jobs import repository
from app.jobs.repository import find_version
from app.jobs.schemas import Event, EventPage
from app.jobs.vocabulary import TERMINAL
from app.jobs.waiting import JobWatch
from app.principal import Principal

_BATCH = 100
_RETRY_MILLISECONDS = 5_000
_KEEPALIVE_SECONDS = 15.0


@dataclass(frozen=True)
class Batch:
    """Events after some number; `last` when the job has ended and these are the rest."""

    events: list[Event]
    last: bool


def page(session: Session, *, job_id: str, principal: Principal, after: int, limit: int) -> EventPage:
    batch = next_batch(session, job_id=job_id, principal=principal, after=after, limit=limit + 1)
    data = batch.events[:limit]
    return EventPage(data=data, last_seq=data[-1].seq if data else after, has_more=len(batch.events) > limit)


def next_batch(
    session: Session, *, job_id: str, principal: Principal, after: int, limit: int = _BATCH
) -> Batch:
    version = find_version(session, job_id, project_id=principal.project_id)
    if version is None:
        raise not_found("job")
    events = [
        Event.model_validate(row)
        for row in repository.events_after(session, job_id, after=after, limit=limit)
    ]
    return Batch(events, last=version[1] in TERMINAL and len(events) < limit)


async def stream(
    database: Database,
    watch: JobWatch,
    *,
    job_id: str,
    principal: Principal,
    first: Batch,
    after: int,
    max_seconds: float,
) -> AsyncIterator[bytes]:
    """Events in the wire format of server-sent events, until the job has ended or the time is up.

    A stream outlives the key that opened it by `max_seconds` at most: its client has to come back with one.
    A waiting stream asks the database for nothing: one look of the watch serves all streams of the process.
    """
    batch = first
    deadline = time.monotonic() + max_seconds
    while True:
        for event in batch.events:
            after = event.seq
            data = json.dumps(event.model_dump(mode="json"), separators=(",", ":"))
            yield format_sse_event(
                data_str=data, event=event.type, id=str(event.seq), retry=_RETRY_MILLISECONDS
            )
        if batch.last or time.monotonic() >= deadline:
            return
        if len(batch.events) < _BATCH:
            while not await _is_news(
                watch, job_id, after, min(_KEEPALIVE_SECONDS, deadline - time.monotonic())
            ):
                if time.monotonic() >= deadline:
                    return
                yield KEEPALIVE_COMMENT
        batch = await database.read(next_batch, job_id=job_id, principal=principal, after=after)


async def _is_news(watch: JobWatch, job_id: str, after: int, seconds: float) -> bool:
    return await watch.wait(
        job_id, lambda now: now.event_seq > after or now.status in TERMINAL, seconds=seconds
    )
