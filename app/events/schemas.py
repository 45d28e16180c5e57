"""Bodies of events."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import Field

from app.schemas import Resource


class Event(Resource):
    """One line of a job's history; `seq` has no gaps."""

    object: Literal["event"] = "event"
    seq: int
    type: str = Field(
        examples=["layer.committed"], description="An open vocabulary: ignore types you do not know."
    )
    data: dict[str, Any]
    created_at: datetime


class EventPage(Resource):
    """Events in order. Ask for the next page with `after=last_seq` while `has_more`."""

    object: Literal["list"] = "list"
    data: list[Event]
    last_seq: int
    has_more: bool
