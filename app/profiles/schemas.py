"""Bodies of profiles."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from app.artifacts.schemas import Artifact
from app.jobs.schemas import CompressSpec
from app.schemas import Body, Metadata, Resource, TargetFields


class ProfileFiles(Resource):
    """`json` and `tensors` are the profile itself, `plot` shows it."""

    json_: Artifact = Field(serialization_alias="json")
    tensors: Artifact
    plot: Artifact


class Profile(Resource):
    """The error of every layer at every candidate rank.

    Checkpoints for other budgets come from it without fitting.
    """

    object: Literal["profile"] = "profile"
    id: str
    job_id: str
    spec: CompressSpec = Field(description="What the fitting job was asked for.")
    resolved: dict[str, Any] = Field(description="What was really run: revision, digests, geometry.")
    summary: dict[str, Any]
    files: ProfileFiles
    created_at: datetime


class CheckpointCreate(TargetFields, Body):
    """Another budget for what was fitted."""

    metadata: Metadata = Field(default_factory=dict)

    @model_validator(mode="after")
    def _can_work(self) -> Self:
        self.target()
        return self
