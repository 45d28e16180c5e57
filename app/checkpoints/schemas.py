"""Bodies of checkpoints."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from app.artifacts.schemas import Artifact
from app.checkpoints.models import Checkpoint as Row
from app.schemas import Budget, Form, Resource


class Checkpoint(Resource):
    """A compressed checkpoint: packed, loaded again and measured."""

    object: Literal["checkpoint"] = "checkpoint"
    id: str
    job_id: str
    profile_id: str
    form: Form
    budget: Budget
    plan: dict[str, Any]
    measured: dict[str, Any]
    files_url: str
    created_at: datetime

    @classmethod
    def of(cls, row: Row) -> Checkpoint:
        return cls.model_validate(
            {
                "id": row.id,
                "job_id": row.job_id,
                "profile_id": row.profile_id,
                "form": row.form,
                "budget": row.budget,
                "plan": row.plan,
                "measured": row.measured,
                "files_url": f"/v1/checkpoints/{row.id}/files",
                "created_at": row.created_at,
            }
        )


class Manifest(Resource):
    """Every file of a checkpoint. Put them into one folder under their names, and it loads."""

    object: Literal["list"] = "list"
    data: list[Artifact]
    bytes: int
