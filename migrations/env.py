"""Alembic's entry.

Migrations run on the connection that the caller gives, or on a fresh one for the command line.
"""

from __future__ import annotations

from alembic import context
from sqlalchemy import Connection, text

from app.database import SyncDatabase
from app.models import metadata

# Any constant will do; it names "the schema of OrthoKV" among the advisory locks of the database.
_LOCK = 0x0F7408


def run(connection: Connection) -> None:
    context.configure(
        connection=connection, target_metadata=metadata, render_as_batch=True, compare_type=True
    )
    with context.begin_transaction():
        if connection.dialect.name == "postgresql":
            # Released with the transaction; SQLite's own BEGIN IMMEDIATE serves there.
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
            connection.execute(text("SET LOCAL lock_timeout = '5s'"))
        context.run_migrations()


if (given := context.config.attributes.get("connection")) is not None:
    run(given)
else:
    database = SyncDatabase(
        context.config.get_main_option("sqlalchemy.url") or "sqlite:///orthokv-data/orthokv.db"
    )
    with database.engine.connect() as connection:
        run(connection)
    database.close()
