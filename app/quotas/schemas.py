"""Bodies of what a project uses."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from app.schemas import Resource


class Quota(Resource):
    """What is used of a limit. Without a limit, `limit` and `left` are null."""

    used: int
    limit: int | None
    left: int | None

    @classmethod
    def of(cls, used: int, limit: int | None) -> Quota:
        return cls(used=used, limit=limit, left=None if limit is None else max(0, limit - used))


class Usage(Resource):
    """What the key's project uses now, and may use."""

    object: Literal["usage"] = "usage"
    project_id: str
    queued_jobs: Quota
    running_jobs: int
    running_steps: Quota
    stored_bytes: Quota = Field(description="Uploads and all that jobs have made; not what was deleted.")
    dataset_bytes: int = Field(description="Most that one dataset may have.")
    model_bytes: int | None = Field(description="Most that a model's weights may have; null: no limit.")
    retention_days: int | None = Field(description="How long jobs are kept after their end; null: for ever.")
