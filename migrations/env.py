"""Alembic's entry.

Migrations run on the connection that the caller gives, or on a fresh one for the command line.
"""

from __future__ import annotations

from alembic import context
from sqlalchemy import Connection, text

from app.infra.database import SyncDatabase
from app.models import metadata

# Any constant will do; it names "the schema of OrthoKV" among the advisory locks of the database.
_LOCK = 0x0F7408


def run(connection: Connection) -> None:
    sqlite = connection.dialect.name == "sqlite"
    if sqlite:
        # SQLite changes a table by making it anew, and with foreign keys on, dropping the old one would delete
        # what refers to it. The switch works between transactions only, hence below SQLAlchemy.
        _sqlite_foreign_keys(connection, "OFF")
    context.configure(
        connection=connection, target_metadata=metadata, render_as_batch=True, compare_type=True
    )
    with context.begin_transaction():
        if connection.dialect.name == "postgresql":
            # Released with the transaction; SQLite's own BEGIN IMMEDIATE serves there.
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
            connection.execute(text("SET LOCAL lock_timeout = '5s'"))
        context.run_migrations()
        if sqlite and (broken := connection.execute(text("PRAGMA foreign_key_check")).all()):
            raise RuntimeError(f"the migration breaks foreign keys: {broken[:5]}")
    if sqlite:
        _sqlite_foreign_keys(connection, "ON")


def _sqlite_foreign_keys(connection: Connection, state: str) -> None:
    cursor = connection.connection.cursor()
    cursor.execute(f"PRAGMA foreign_keys={state}")
    cursor.close()


if (given := context.config.attributes.get("connection")) is not None:
    run(given)
else:
    database = SyncDatabase(
        context.config.get_main_option("sqlalchemy.url") or "sqlite:///orthokv-data/orthokv.db"
    )
    with database.engine.connect() as connection:
        run(connection)
    database.close()
