"""Bodies of audit events."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import Field

from app.schemas import Resource


class AuditEvent(Resource):
    """Who did what."""

    object: Literal["audit_event"] = "audit_event"
    id: str
    project_id: str
    actor: str = Field(description="The id of a key; `local`; `cli`; or `system`.", examples=["key_0"])
    action: str = Field(examples=["api_key.created"], description="An open vocabulary.")
    subject_id: str
    request_id: str | None
    data: dict[str, Any]
    created_at: datetime
