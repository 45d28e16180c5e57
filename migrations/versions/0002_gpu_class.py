"""GPU classes: which workers may run a job.

Revision ID: 0002
Revises: 0001
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

READY = sa.text("status = 'ready'")
ORDER = ["precedence", "job_id", "stage", "ordinal"]


def upgrade() -> None:
    # The default stays: a server of before knows no classes, and its jobs belong to the default one.
    for table in ("job", "step"):
        op.add_column(
            table, sa.Column("gpu_class", sa.String(length=32), nullable=False, server_default="default")
        )
    _reindex(["gpu_class", *ORDER])


def downgrade() -> None:
    _reindex(ORDER)
    for table in ("step", "job"):
        op.drop_column(table, "gpu_class")


def _reindex(columns: list[str]) -> None:
    op.drop_index("ix_step_ready", table_name="step")
    op.create_index("ix_step_ready", "step", columns, postgresql_where=READY, sqlite_where=READY)
