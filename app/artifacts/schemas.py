"""Bodies of artifacts."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import Field

from app.artifacts.models import Artifact as Row
from app.schemas import Resource


class Artifact(Resource):
    """An immutable file."""

    object: Literal["artifact"] = "artifact"
    id: str
    filename: str = Field(examples=["orthokv.safetensors"])
    bytes: int
    sha256: str
    media_type: str
    created_at: datetime
    expires_at: datetime | None = Field(
        None, description="When it is deleted with its job, by the project's `retention_days`."
    )
    url: str = Field(examples=["/v1/artifacts/art_0/content"])

    @classmethod
    def of(cls, row: Row, expires_at: datetime | None) -> Artifact:
        return cls(
            id=row.id,
            filename=row.filename,
            bytes=row.bytes,
            sha256=row.sha256,
            media_type=row.media_type,
            created_at=row.created_at,
            expires_at=expires_at,
            url=f"/v1/artifacts/{row.id}/content",
        )
