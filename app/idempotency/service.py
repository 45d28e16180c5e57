"""Run a creating request once per key."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel
from sqlalchemy.orm import Session

from app.http.errors import Code, Problem
from app.idempotency import repository

_KEY = re.compile(r"[\x21-\x7e]{1,255}")


@dataclass(frozen=True)
class Answer:
    """What a creating request answers, the first time and every time."""

    status_code: int
    body: dict[str, Any]
    location: str
    replayed: bool = False

    def response(self) -> JSONResponse:
        headers = {"Location": self.location}
        if self.replayed:
            headers["Idempotent-Replayed"] = "true"
        return JSONResponse(self.body, status_code=self.status_code, headers=headers)


def once(
    session: Session,
    *,
    project_id: str,
    key: str | None,
    path: str,
    body: BaseModel,
    keep_hours: float,
    create: Callable[[], Answer],
) -> Answer:
    """`create()`, or what it answered the first time that this project sent this key with this path and body.

    The key's row is written in the transaction of the resource: it exists if and only if the resource does,
    and a second request with the key waits for the first one's transaction.
    """
    if key is None:
        return create()
    if _KEY.fullmatch(key) is None:
        raise Problem(
            Code.INVALID_IDEMPOTENCY_KEY, "An idempotency key is 1 to 255 visible ASCII characters."
        )
    canonical = json.dumps([path, body.model_dump(mode="json")], sort_keys=True, separators=(",", ":"))
    fingerprint = hashlib.sha256(canonical.encode()).hexdigest()
    keep_seconds = keep_hours * 3600
    if not repository.reserve(
        session, project_id=project_id, key=key, fingerprint=fingerprint, keep_seconds=keep_seconds
    ):
        row = repository.get(session, project_id=project_id, key=key)
        if row.fingerprint != fingerprint:
            raise Problem(Code.IDEMPOTENCY_KEY_REUSED, "This idempotency key belongs to another request.")
        assert row.status_code is not None, "a key is committed with its answer"
        assert row.body is not None
        assert row.location is not None
        return Answer(row.status_code, row.body, row.location, replayed=True)
    created = create()
    row = repository.get(session, project_id=project_id, key=key)
    row.status_code, row.body, row.location = created.status_code, created.body, created.location
    return created
