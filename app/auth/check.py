"""The check of a key."""

from __future__ import annotations

import hmac

from sqlalchemy.orm import Session

from app.auth import repository
from app.infra import keys
from app.principal import Principal, Scope

_NO_DIGEST = "0" * 64


def check_key(session: Session, text: str, *, pepper: str) -> tuple[Principal, bool] | None:
    """The principal of a key and whether its use is due to be noted; None when the key is not valid."""
    key_id = keys.key_id_of(text)
    if key_id is None:
        return None
    found = repository.usable_key(session, key_id)
    # Compared in constant time, and also when there is no such key: the time tells nothing.
    expected = _NO_DIGEST if found is None else found[0].digest
    matches = hmac.compare_digest(keys.digest(text, pepper), expected)
    if found is None or not matches:
        return None
    row, stale = found
    return Principal(row.project_id, row.id, frozenset(map(Scope, row.scopes))), stale
