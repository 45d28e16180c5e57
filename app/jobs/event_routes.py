"""Route of a job's events."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.sse import EventSourceResponse

from app.auth.dependency import JobsRead, guarded
from app.http.accept import prefers
from app.http.dependencies import Config, Db
from app.http.errors import Code, Problem
from app.infra.counted import EVENT_STREAMS
from app.jobs import events as service
from app.jobs.dependencies import JobId, Watch
from app.jobs.schemas import EventPage

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])
LARGEST_NUMBER = 2**31 - 1  # of an integer column


class StreamSlots:
    """How many event streams this process has open, in all and by key, and may have."""

    def __init__(self, limit: int, per_key: int) -> None:
        self._limit = limit
        self._per_key = per_key
        self._open: Counter[str] = Counter()

    async def use(self, key: str, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        self._open[key] += 1
        try:
            with EVENT_STREAMS.track_inprogress():
                async for chunk in chunks:
                    yield chunk
        finally:
            self._open[key] -= 1
            self._open += Counter()  # forgets keys without a stream

    def require_free(self, key: str) -> None:
        if self._open.total() >= self._limit:
            raise Problem(
                Code.UNAVAILABLE,
                "Too many event streams are open; poll instead.",
                headers={"Retry-After": "30"},
            )
        if self._open[key] >= self._per_key:
            raise Problem(
                Code.RATE_LIMITED,
                f"This key has {self._per_key} event streams open and may have no more; poll instead.",
                headers={"Retry-After": "30"},
            )


@router.get(
    "/{job_id}/events",
    operation_id="jobs.events",
    response_model=EventPage,
    responses={
        200: {
            "description": "A page of events, or with `Accept: text/event-stream` all events as they come.",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        },
        204: {"description": "The stream has ended: the job is over and all its events have been seen."},
        **guarded(Code.NOT_FOUND),
    },
)
async def events(
    request: Request,
    response: Response,
    job_id: JobId,
    principal: JobsRead,
    db: Db,
    watch: Watch,
    settings: Config,
    after: Annotated[
        int, Query(ge=0, le=LARGEST_NUMBER, description="The number of the last event seen.")
    ] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    accept: Annotated[str, Header()] = "application/json",
    last_event_id: Annotated[
        int | None,
        Header(ge=0, le=LARGEST_NUMBER, description="As `after`, which it overrides; browsers send it."),
    ] = None,
) -> EventPage | Response:
    """What happened to a job, in order and without gaps."""
    if last_event_id is not None:
        after = last_event_id
    response.headers["Vary"] = "Accept"
    if not prefers(accept, "text/event-stream"):
        return await db.read(service.page, job_id=job_id, principal=principal, after=after, limit=limit)
    slots: StreamSlots = request.app.state.streams
    slots.require_free(principal.actor)
    first = await db.read(service.next_batch, job_id=job_id, principal=principal, after=after)
    if first.last and not first.events:
        return Response(status_code=204)  # tells an EventSource not to come back
    chunks = service.stream(
        db,
        watch,
        job_id=job_id,
        principal=principal,
        first=first,
        after=after,
        max_seconds=settings.max_stream_seconds,
    )
    return EventSourceResponse(
        slots.use(principal.actor, chunks),
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no", "Vary": "Accept"},
    )
