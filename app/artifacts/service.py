"""Reading artifacts."""

from __future__ import annotations

import base64
from urllib.parse import quote

from sqlalchemy.orm import Session

from app.artifacts import repository
from app.artifacts.models import Artifact as Row
from app.artifacts.schemas import Artifact
from app.audit.service import record
from app.auth.principal import Principal
from app.errors import not_found


def get(session: Session, *, artifact_id: str, principal: Principal) -> Artifact:
    return Artifact.of(_row(session, artifact_id, principal))


def locate(session: Session, *, artifact_id: str, principal: Principal) -> tuple[Artifact, str]:
    """An artifact and the key of its object."""
    row = _row(session, artifact_id, principal)
    return Artifact.of(row), row.object_key


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
