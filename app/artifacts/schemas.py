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
    url: str = Field(examples=["/v1/artifacts/art_0/content"])

    @classmethod
    def of(cls, row: Row) -> Artifact:
        return cls(
            id=row.id,
            filename=row.filename,
            bytes=row.bytes,
            sha256=row.sha256,
            media_type=row.media_type,
            created_at=row.created_at,
            url=f"/v1/artifacts/{row.id}/content",
        )
