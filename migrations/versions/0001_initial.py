"""The first schema: jobs, their steps, layers and events, and what they read and make.

Revision ID: 0001
Revises:
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

ID = sa.String(40).with_variant(sa.String(40, collation="C"), "postgresql")
JSON = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")
TIME = sa.DateTime(timezone=True).with_variant(sa.String(23), "sqlite")

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "dataset",
        sa.Column("id", ID, nullable=False),
        sa.Column("filename", sa.String(length=255), nullable=False),
        sa.Column("format", sa.String(length=16), nullable=False),
        sa.Column("object_key", sa.String(length=512), nullable=True),
        sa.Column("bytes", sa.BigInteger(), nullable=True),
        sa.Column("sha256", sa.String(length=64), nullable=True),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("completed_at", TIME, nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_dataset")),
        sa.UniqueConstraint("object_key", name=op.f("uq_dataset_object_key")),
    )
    op.create_table(
        "idempotency_key",
        sa.Column("key", sa.String(length=255), nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("status_code", sa.Integer(), nullable=True),
        sa.Column("body", JSON, nullable=True),
        sa.Column("location", sa.String(length=255), nullable=True),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("expires_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_idempotency_key")),
    )
    op.create_index(op.f("ix_idempotency_key_expires_at"), "idempotency_key", ["expires_at"], unique=False)

    op.create_table(
        "job",
        sa.Column("id", ID, nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("phase", sa.String(length=64), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("event_seq", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("model_id", sa.String(length=1024), nullable=False),
        sa.Column("dataset_id", ID, nullable=True),
        sa.Column("profile_id", ID, nullable=True),
        sa.Column("spec", JSON, nullable=False),
        sa.Column("metadata", JSON, nullable=False),
        sa.Column("progress", JSON, nullable=True),
        sa.Column("resolved", JSON, nullable=False),
        sa.Column("result", JSON, nullable=True),
        sa.Column("error", JSON, nullable=True),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("started_at", TIME, nullable=True),
        sa.Column("finished_at", TIME, nullable=True),
        sa.Column("cancel_requested_at", TIME, nullable=True),
        sa.CheckConstraint(
            "status IN ('queued', 'running', 'cancelling', 'succeeded', 'failed', 'cancelled')",
            name=op.f("ck_job_status_closed"),
        ),
        sa.ForeignKeyConstraint(["dataset_id"], ["dataset.id"], name=op.f("fk_job_dataset_id_dataset")),
        sa.ForeignKeyConstraint(
            ["profile_id"], ["profile.id"], name=op.f("fk_job_profile_id_profile"), use_alter=True
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_job")),
    )
    op.create_index(op.f("ix_job_model_id_id"), "job", ["model_id", "id"], unique=False)
    op.create_index(op.f("ix_job_status_id"), "job", ["status", "id"], unique=False)

    op.create_table(
        "event",
        sa.Column("job_id", ID, nullable=False),
        sa.Column("seq", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("type", sa.String(length=64), nullable=False),
        sa.Column("data", JSON, nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name=op.f("fk_event_job_id_job")),
        sa.PrimaryKeyConstraint("job_id", "seq", name=op.f("pk_event")),
    )
    op.create_table(
        "step",
        sa.Column("id", ID, nullable=False),
        sa.Column("job_id", ID, nullable=False),
        sa.Column("name", sa.String(length=32), nullable=False),
        sa.Column("stage", sa.Integer(), nullable=False),
        sa.Column("ordinal", sa.Integer(), nullable=False),
        sa.Column("layers", JSON, nullable=True),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("precedence", sa.Integer(), nullable=False),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("lease_owner", sa.String(length=255), nullable=True),
        sa.Column("lease_expires_at", TIME, nullable=True),
        sa.Column("not_before", TIME, nullable=False),
        sa.Column("error", JSON, nullable=True),
        sa.Column("started_at", TIME, nullable=True),
        sa.Column("finished_at", TIME, nullable=True),
        sa.CheckConstraint(
            "status IN ('pending', 'ready', 'running', 'succeeded', 'failed', 'cancelled')",
            name=op.f("ck_step_status_closed"),
        ),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name=op.f("fk_step_job_id_job")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_step")),
        sa.UniqueConstraint("job_id", "stage", "ordinal", name=op.f("uq_step_job_id_stage_ordinal")),
    )
    op.create_index(
        "ix_step_lease",
        "step",
        ["lease_expires_at"],
        unique=False,
        postgresql_where=sa.text("status = 'running'"),
        sqlite_where=sa.text("status = 'running'"),
    )

    op.create_index(
        "ix_step_ready",
        "step",
        ["precedence", "job_id", "stage", "ordinal"],
        unique=False,
        postgresql_where=sa.text("status = 'ready'"),
        sqlite_where=sa.text("status = 'ready'"),
    )

    op.create_table(
        "artifact",
        sa.Column("id", ID, nullable=False),
        sa.Column("job_id", ID, nullable=False),
        sa.Column("step_id", ID, nullable=False),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("filename", sa.String(length=255), nullable=False),
        sa.Column("object_key", sa.String(length=512), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("media_type", sa.String(length=128), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name=op.f("fk_artifact_job_id_job")),
        sa.ForeignKeyConstraint(["step_id"], ["step.id"], name=op.f("fk_artifact_step_id_step")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_artifact")),
        sa.UniqueConstraint("object_key", name=op.f("uq_artifact_object_key")),
        sa.UniqueConstraint("step_id", "filename", name=op.f("uq_artifact_step_id_filename")),
    )
    op.create_index(op.f("ix_artifact_job_id"), "artifact", ["job_id"], unique=False)

    op.create_table(
        "layer",
        sa.Column("artifact_id", ID, nullable=False),
        sa.Column("job_id", ID, nullable=False),
        sa.Column("step_id", ID, nullable=False),
        sa.Column("layer", sa.Integer(), nullable=False),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("metrics", JSON, nullable=False),
        sa.Column("committed_at", TIME, nullable=False),
        sa.ForeignKeyConstraint(["artifact_id"], ["artifact.id"], name=op.f("fk_layer_artifact_id_artifact")),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name=op.f("fk_layer_job_id_job")),
        sa.ForeignKeyConstraint(["step_id"], ["step.id"], name=op.f("fk_layer_step_id_step")),
        sa.PrimaryKeyConstraint("artifact_id", name=op.f("pk_layer")),
        sa.UniqueConstraint("job_id", "layer", name=op.f("uq_layer_job_id_layer")),
    )
    op.create_table(
        "profile",
        sa.Column("id", ID, nullable=False),
        sa.Column("job_id", ID, nullable=False),
        sa.Column("summary", JSON, nullable=False),
        sa.Column("json_artifact_id", ID, nullable=False),
        sa.Column("tensors_artifact_id", ID, nullable=False),
        sa.Column("plot_artifact_id", ID, nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name=op.f("fk_profile_job_id_job")),
        sa.ForeignKeyConstraint(
            ["json_artifact_id"], ["artifact.id"], name=op.f("fk_profile_json_artifact_id_artifact")
        ),
        sa.ForeignKeyConstraint(
            ["plot_artifact_id"], ["artifact.id"], name=op.f("fk_profile_plot_artifact_id_artifact")
        ),
        sa.ForeignKeyConstraint(
            ["tensors_artifact_id"], ["artifact.id"], name=op.f("fk_profile_tensors_artifact_id_artifact")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_profile")),
        sa.UniqueConstraint("job_id", name=op.f("uq_profile_job_id")),
    )
    # A job may start from a profile, and a profile comes from a job. SQLite has taken the job's half of the circle
    # at its creation; Postgres needs both tables first.
    if op.get_bind().dialect.name == "postgresql":
        op.create_foreign_key(op.f("fk_job_profile_id_profile"), "job", "profile", ["profile_id"], ["id"])

    op.create_table(
        "checkpoint",
        sa.Column("id", ID, nullable=False),
        sa.Column("job_id", ID, nullable=False),
        sa.Column("profile_id", ID, nullable=False),
        sa.Column("form", sa.String(length=16), nullable=False),
        sa.Column("budget", JSON, nullable=False),
        sa.Column("plan", JSON, nullable=False),
        sa.Column("measured", JSON, nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name=op.f("fk_checkpoint_job_id_job")),
        sa.ForeignKeyConstraint(
            ["profile_id"], ["profile.id"], name=op.f("fk_checkpoint_profile_id_profile")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_checkpoint")),
        sa.UniqueConstraint("job_id", name=op.f("uq_checkpoint_job_id")),
    )
    op.create_index(op.f("ix_checkpoint_profile_id"), "checkpoint", ["profile_id"], unique=False)

    op.create_table(
        "checkpoint_file",
        sa.Column("checkpoint_id", ID, nullable=False),
        sa.Column("filename", sa.String(length=255), nullable=False),
        sa.Column("artifact_id", ID, nullable=False),
        sa.ForeignKeyConstraint(
            ["artifact_id"], ["artifact.id"], name=op.f("fk_checkpoint_file_artifact_id_artifact")
        ),
        sa.ForeignKeyConstraint(
            ["checkpoint_id"], ["checkpoint.id"], name=op.f("fk_checkpoint_file_checkpoint_id_checkpoint")
        ),
        sa.PrimaryKeyConstraint("checkpoint_id", "filename", name=op.f("pk_checkpoint_file")),
    )


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.drop_constraint(op.f("fk_job_profile_id_profile"), "job", type_="foreignkey")
    for table in (
        "checkpoint_file",
        "checkpoint",
        "profile",
        "layer",
        "artifact",
        "step",
        "event",
        "job",
        "idempotency_key",
        "dataset",
    ):
        op.drop_table(table)
