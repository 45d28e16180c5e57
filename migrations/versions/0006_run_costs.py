"""Deletion (tombstones of objects, rows that outlive what they were made from), retention, time budgets, run costs.

Revision ID: 0006
Revises: 0005
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

ID = sa.String(40).with_variant(sa.String(40, collation="C"), "postgresql")
TIME = sa.DateTime(timezone=True).with_variant(sa.String(23), "sqlite")

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

# What an ended job or a checkpoint names may be deleted before it: (table, column, what it refers to).
LOOSENED = (("job", "dataset_id", "dataset"), ("job", "profile_id", "profile"), ("checkpoint", "profile_id", "profile"))
# Deleting a row looks for rows that refer to it.
INDEXES = (
    ("job", "profile_id"),
    ("layer", "step_id"),
    ("checkpoint_file", "artifact_id"),
    ("profile", "json_artifact_id"),
    ("profile", "tensors_artifact_id"),
    ("profile", "plot_artifact_id"),
)


def upgrade() -> None:
    op.create_table(
        "garbage",
        sa.Column("object_key", sa.String(length=512), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("object_key", name=op.f("pk_garbage")),
    )
    op.create_index(op.f("ix_garbage_created_at"), "garbage", ["created_at"], unique=False)
    op.create_table(
        "run_cost",
        sa.Column("id", ID, nullable=False),
        sa.Column("gpu_class", sa.String(length=32), nullable=False),
        sa.Column("method", sa.String(length=32), nullable=False),
        sa.Column("step", sa.String(length=32), nullable=False),
        sa.Column("flop", sa.Float(), nullable=False),
        sa.Column("seconds", sa.Float(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_run_cost")),
    )
    op.create_index(
        op.f("ix_run_cost_gpu_class_method_step_id"),
        "run_cost",
        ["gpu_class", "method", "step", "id"],
        unique=False,
    )
    op.add_column("project", sa.Column("max_retention_days", sa.Integer(), nullable=True))
    op.add_column("job", sa.Column("max_runtime_minutes", sa.Integer(), nullable=True))
    op.add_column("job", sa.Column("deadline_at", TIME, nullable=True))
    for table, column, other in LOOSENED:
        with op.batch_alter_table(table, table_args=_checks(table)) as batch:
            batch.drop_constraint(f"fk_{table}_{column}_{other}", type_="foreignkey")
    for table, column in INDEXES:
        op.create_index(op.f(f"ix_{table}_{column}"), table, [column], unique=False)


def downgrade() -> None:
    for table, column in INDEXES:
        op.drop_index(op.f(f"ix_{table}_{column}"), table_name=table)
    for table, column, other in LOOSENED:
        lost = f"SELECT count(*) FROM {table} WHERE {column} IS NOT NULL AND {column} NOT IN (SELECT id FROM {other})"
        if op.get_bind().execute(sa.text(lost)).scalar_one():
            raise RuntimeError(f"rows of {table} name a {other} that was deleted: they would have to go first")
        with op.batch_alter_table(table, table_args=_checks(table)) as batch:
            batch.create_foreign_key(f"fk_{table}_{column}_{other}", other, [column], ["id"])
    op.drop_column("job", "deadline_at")
    op.drop_column("job", "max_runtime_minutes")
    op.drop_column("project", "max_retention_days")
    op.drop_table("run_cost")
    op.drop_table("garbage")


def _checks(table: str) -> tuple[sa.CheckConstraint, ...]:
    """What SQLite loses when a table is made anew, because it is not reflected."""
    if table != "job" or op.get_bind().dialect.name == "postgresql":
        return ()
    statuses = "'queued', 'running', 'cancelling', 'succeeded', 'failed', 'cancelled'"
    return (sa.CheckConstraint(f"status IN ({statuses})", name=op.f("ck_job_status_closed")),)
