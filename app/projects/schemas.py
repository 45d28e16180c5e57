"""Bodies of projects and API keys."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field

from app.auth.models import Project as ProjectRow
from app.infra.ids import id_pattern
from app.principal import Scope
from app.schemas import Body, Resource

Limit = Annotated[int, Field(ge=0, lt=2**31)]
ByteLimit = Annotated[int, Field(ge=0, lt=2**63)]


class Limits(Body):
    """Limits of a project. `null`: the server's default."""

    queued_jobs: Limit | None = None
    running_steps: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    stored_bytes: ByteLimit | None = None
    dataset_bytes: ByteLimit | None = None
    model_bytes: ByteLimit | None = Field(None, description="Weights of the largest model, as stored.")
    retention_days: Annotated[int, Field(ge=1, le=36_500)] | None = Field(
        None, description="Jobs and all that they made are deleted this long after their end. `null`: never."
    )


class ProjectCreate(Body):
    """A tenant."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$", examples=["search-team"])]
    limits: Limits = Limits()


class ProjectUpdate(Body):
    """All limits of a project, as they are to be."""

    limits: Limits


class Project(Resource):
    """A tenant: everything that its keys make is seen by its keys only."""

    object: Literal["project"] = "project"
    id: str
    name: str
    limits: Limits
    created_at: datetime

    @classmethod
    def of(cls, row: ProjectRow) -> Project:
        limits = Limits(
            queued_jobs=row.max_queued_jobs,
            running_steps=row.max_running_steps,
            stored_bytes=row.max_stored_bytes,
            dataset_bytes=row.max_dataset_bytes,
            model_bytes=row.max_model_bytes,
            retention_days=row.max_retention_days,
        )
        return cls(id=row.id, name=row.name, limits=limits, created_at=row.created_at)


class ApiKeyCreate(Body):
    """A key for some program or person."""

    name: Annotated[str, Field(min_length=1, max_length=255, examples=["nightly compression"])]
    scopes: Annotated[list[Scope], Field(min_length=1, max_length=len(Scope))]
    project_id: Annotated[str, Field(pattern=id_pattern("proj"))] | None = Field(
        None, description="Absent: the project of the key that asks. Another one needs `admin`."
    )
    expires_in_days: Annotated[float, Field(gt=0, le=3650)] | None = Field(
        None, description="Absent: until it is revoked."
    )


class ApiKey(Resource):
    """A key, without its secret."""

    object: Literal["api_key"] = "api_key"
    id: str
    project_id: str
    name: str
    prefix: str = Field(description="The beginning of the key, which is not secret.", examples=["okv_0"])
    scopes: list[Scope]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None = Field(description="To the minute.")


class ApiKeyCreated(ApiKey):
    """A new key. `key` is shown this once and stored nowhere."""

    key: str = Field(examples=["okv_..."])
