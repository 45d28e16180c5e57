"""The service that the client's tests talk to, on SQLite and on Postgres."""

from __future__ import annotations

import pytest

from tests.service.conftest import (
    bucket,
    client,
    database,
    database_url,
    make,
    postgres,
    s3,
    script,
    settings,
    sqlite_template,
)
from tests.support.tenants import TOKEN

__all__ = [
    "bucket",
    "client",
    "database",
    "database_url",
    "make",
    "postgres",
    "s3",
    "script",
    "settings",
    "sqlite_template",
]


@pytest.fixture(autouse=True)
def _owner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients without a key are the owner's: the servers of these tests show their token nowhere."""
    monkeypatch.setenv("ORTHOKV_TOKEN", TOKEN)
