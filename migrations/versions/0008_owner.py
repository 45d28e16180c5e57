"""Which jobs the owner of a loopback server asked for.

Revision ID: 0008
Revises: 0007
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Whoever asked for the jobs there are: they may name what ORTHOKV_MODEL_ROOTS lists.
    op.add_column("job", sa.Column("by_owner", sa.Boolean(), server_default=sa.false(), nullable=False))


def downgrade() -> None:
    op.drop_column("job", "by_owner")
