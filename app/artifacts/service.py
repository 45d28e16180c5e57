"""Reading artifacts."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from datetime import timedelta
from urllib.parse import quote

from sqlalchemy.orm import Session

from app.artifacts import repository
from app.artifacts.models import Artifact as Row
from app.artifacts.schemas import Artifact
from app.audit.service import record
from app.http.errors import not_found
from app.principal import Principal


def get(session: Session, *, artifact_id: str, principal: Principal) -> Artifact:
    return describe(session, [_row(session, artifact_id, principal)])[0]


def describe(session: Session, rows: Sequence[Row]) -> list[Artifact]:
    """What clients see of these rows."""
    ends = repository.ends_of_jobs(session, [row.job_id for row in rows])
    described: list[Artifact] = []
    for row in rows:
        ended, days = ends[row.job_id]
        expires_at = None if ended is None or days is None else ended + timedelta(days=days)
        described.append(Artifact.of(row, expires_at))
    return described


def locate(session: Session, *, artifact_id: str, principal: Principal) -> tuple[Artifact, str]:
    """An artifact and the key of its object."""
    row = _row(session, artifact_id, principal)
    return describe(session, [row])[0], row.object_key


def hand_out(session: Session, *, artifact_id: str, principal: Principal) -> tuple[Artifact, str]:
    """As `locate`, for a download: it is noted."""
    found = locate(session, artifact_id=artifact_id, principal=principal)
    record(session, principal, "artifact.downloaded", artifact_id)
    return found


def content_headers(artifact: Artifact, *, inline: bool = False) -> dict[str, str]:
    """Headers of an immutable file.

    The digest is that of the whole file, also in front of a part of it (RFC 9530).
    """
    disposition = "inline" if inline else "attachment"
    digest = base64.b64encode(bytes.fromhex(artifact.sha256)).decode()
    return {
        "ETag": etag(artifact),
        "Repr-Digest": f"sha-256=:{digest}:",
        "Accept-Ranges": "bytes",
        "Content-Disposition": f"{disposition}; filename*=UTF-8''{quote(artifact.filename, safe='')}",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "private, max-age=31536000, immutable",
    }


def etag(artifact: Artifact) -> str:
    """Strong: derived from the bytes, not from when or where they were written."""
    return f'"sha256-{artifact.sha256}"'


def _row(session: Session, artifact_id: str, principal: Principal) -> Row:
    row = repository.find_artifact(session, artifact_id, project_id=principal.project_id)
    if row is None:
        raise not_found("artifact")
    return row
