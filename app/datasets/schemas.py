"""Bodies of datasets."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field

from app.datasets.models import Dataset as Row
from app.schemas import Body, Resource

DatasetFormat = Literal["jsonl", "text", "parquet"]
SUFFIXES: dict[str, DatasetFormat] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "text",
    ".md": "text",
    ".parquet": "parquet",
}


class DatasetCreate(Body):
    """A dataset to be uploaded. The name is a label; where the bytes go is the server's choice."""

    filename: Annotated[str, Field(min_length=1, max_length=255, examples=["calibration.jsonl"])]
    format: DatasetFormat | None = Field(None, description="Taken from the name's ending when it is absent.")


class DatasetComplete(Body):
    """What the client believes it sent."""

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Upload(Resource):
    """How to send the bytes."""

    method: Literal["PUT"] = "PUT"
    url: str = Field(examples=["/v1/datasets/ds_0/content"])
    max_bytes: int


class Dataset(Resource):
    """Calibration text. Jobs take it once it is `ready`; from then on it never changes."""

    object: Literal["dataset"] = "dataset"
    id: str
    filename: str
    format: DatasetFormat
    status: Literal["awaiting_upload", "uploaded", "ready"]
    bytes: int | None
    sha256: str | None
    created_at: datetime
    completed_at: datetime | None
    upload: Upload | None = Field(description="Present until the dataset is ready.")

    @classmethod
    def of(cls, row: Row, *, max_bytes: int) -> Dataset:
        upload = Upload(url=f"/v1/datasets/{row.id}/content", max_bytes=max_bytes)
        return cls.model_validate(
            {
                "id": row.id,
                "filename": row.filename,
                "format": row.format,
                "status": row.status,
                "bytes": row.bytes,
                "sha256": row.sha256,
                "created_at": row.created_at,
                "completed_at": row.completed_at,
                "upload": None if row.completed_at is not None else upload,
            }
        )
