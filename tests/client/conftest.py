"""The service that the client's tests talk to, on SQLite and on Postgres."""

from __future__ import annotations

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
