"""Projects, API keys and audit events; every row belongs to a project, those from before to `default`.

Revision ID: 0003
Revises: 0001
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

ID = sa.String(40).with_variant(sa.String(40, collation="C"), "postgresql")
JSON = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")
TIME = sa.DateTime(timezone=True).with_variant(sa.String(23), "sqlite")

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

DEFAULT_PROJECT_ID = "proj_00000000000000000000000000"
OWNED = ("dataset", "job", "artifact", "profile", "checkpoint", "idempotency_key")
INDEXES = {
    "dataset": [["project_id", "id"]],
    "job": [["project_id", "id"], ["project_id", "status", "id"], ["project_id", "model_id", "id"]],
    "artifact": [["project_id", "bytes"]],
    "profile": [["project_id", "id"]],
    "checkpoint": [["project_id", "id"]],
    "idempotency_key": [],
}


def upgrade() -> None:
    op.create_table(
        "project",
        sa.Column("id", ID, nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("max_queued_jobs", sa.Integer(), nullable=True),
        sa.Column("max_running_steps", sa.Integer(), nullable=True),
        sa.Column("max_stored_bytes", sa.BigInteger(), nullable=True),
        sa.Column("max_dataset_bytes", sa.BigInteger(), nullable=True),
        sa.Column("created_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_project")),
        sa.UniqueConstraint("name", name=op.f("uq_project_name")),
    )
    op.execute(
        sa.text(f"INSERT INTO project (id, name, created_at) VALUES (:id, 'default', {_now()})").bindparams(
            id=DEFAULT_PROJECT_ID
        )
    )
    op.create_table(
        "api_key",
        sa.Column("id", ID, nullable=False),
        sa.Column("project_id", ID, nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("scopes", JSON, nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("expires_at", TIME, nullable=True),
        sa.Column("revoked_at", TIME, nullable=True),
        sa.Column("last_used_at", TIME, nullable=True),
        sa.ForeignKeyConstraint(["project_id"], ["project.id"], name=op.f("fk_api_key_project_id_project")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_key")),
    )
    op.create_index(op.f("ix_api_key_project_id"), "api_key", ["project_id"], unique=False)
    op.create_table(
        "audit_event",
        sa.Column("id", ID, nullable=False),
        sa.Column("project_id", ID, nullable=False),
        sa.Column("actor", sa.String(length=40), nullable=False),
        sa.Column("action", sa.String(length=64), nullable=False),
        sa.Column("subject_id", sa.String(length=40), nullable=False),
        sa.Column("request_id", sa.String(length=40), nullable=True),
        sa.Column("data", JSON, nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_event")),
    )
    op.create_index(op.f("ix_audit_event_project_id_id"), "audit_event", ["project_id", "id"], unique=False)
    _make_append_only()

    op.drop_index(op.f("ix_job_model_id_id"), table_name="job")
    for table in OWNED:
        op.add_column(table, sa.Column("project_id", ID, nullable=True))
        op.execute(sa.text(f"UPDATE {table} SET project_id = :id").bindparams(id=DEFAULT_PROJECT_ID))
        with op.batch_alter_table(table, table_args=_checks(table)) as batch:
            batch.alter_column("project_id", existing_type=ID, nullable=False)
            batch.create_foreign_key(f"fk_{table}_project_id_project", "project", ["project_id"], ["id"])
            if table == "idempotency_key":
                batch.drop_constraint("pk_idempotency_key", type_="primary")
                batch.create_primary_key("pk_idempotency_key", ["project_id", "key"])
        for columns in INDEXES[table]:
            op.create_index(f"ix_{table}_{'_'.join(columns)}", table, columns, unique=False)


def downgrade() -> None:
    foreign = sa.text("SELECT count(*) FROM project WHERE id <> :id").bindparams(id=DEFAULT_PROJECT_ID)
    if op.get_bind().execute(foreign).scalar_one():
        raise RuntimeError("other projects than 'default' exist: without projects all would see their rows")
    for table in reversed(OWNED):
        for columns in INDEXES[table]:
            op.drop_index(f"ix_{table}_{'_'.join(columns)}", table_name=table)
        with op.batch_alter_table(table, table_args=_checks(table)) as batch:
            if table == "idempotency_key":
                batch.drop_constraint("pk_idempotency_key", type_="primary")
                batch.create_primary_key("pk_idempotency_key", ["key"])
            batch.drop_constraint(f"fk_{table}_project_id_project", type_="foreignkey")
            batch.drop_column("project_id")
    op.create_index(op.f("ix_job_model_id_id"), "job", ["model_id", "id"], unique=False)
    for table in ("audit_event", "api_key", "project"):
        op.drop_table(table)
    if _is_postgres():
        op.execute("DROP FUNCTION refuse_change()")


def _make_append_only() -> None:
    if _is_postgres():
        op.execute(
            "CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION '% is append-only', TG_TABLE_NAME; END $$"
        )
        op.execute(
            "CREATE TRIGGER audit_event_append_only BEFORE UPDATE OR DELETE ON audit_event "
            "FOR EACH ROW EXECUTE FUNCTION refuse_change()"
        )
        return
    for act in ("UPDATE", "DELETE"):
        op.execute(
            f"CREATE TRIGGER audit_event_no_{act.lower()} BEFORE {act} ON audit_event "
            "BEGIN SELECT RAISE(ABORT, 'audit_event is append-only'); END"
        )


def _checks(table: str) -> tuple[sa.CheckConstraint, ...]:
    """What SQLite loses when a table is made anew, because it is not reflected."""
    if table != "job" or _is_postgres():
        return ()
    statuses = "'queued', 'running', 'cancelling', 'succeeded', 'failed', 'cancelled'"
    return (sa.CheckConstraint(f"status IN ({statuses})", name=op.f("ck_job_status_closed")),)


def _now() -> str:
    return "clock_timestamp()" if _is_postgres() else "strftime('%Y-%m-%d %H:%M:%f', 'now')"


def _is_postgres() -> bool:
    return op.get_bind().dialect.name == "postgresql"
