"""Rows from before there were projects come through the migration, to the default project and back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app.infra.database import SyncDatabase
from app.migrate import alembic_config, upgrade
from app.principal import DEFAULT_PROJECT_ID
from tests.support.postgres import postgres_url

T = "2026-01-02 03:04:05.678"
ROWS: dict[str, dict[str, Any]] = {
    "dataset": {"id": "ds_1", "filename": "a", "format": "text", "created_at": T},
    "job": {
        "id": "job_1",
        "kind": "compress",
        "status": "running",
        "phase": "p",
        "version": 1,
        "event_seq": 1,
        "attempt": 1,
        "priority": 0,
        "model_id": "org/m",
        "dataset_id": "ds_1",
        "created_at": T,
        "spec": "{}",
        "metadata": "{}",
        "resolved": "{}",
    },
    "event": {"job_id": "job_1", "seq": 1, "type": "t", "data": "{}", "created_at": T},
    "step": {
        "id": "step_1",
        "job_id": "job_1",
        "name": "fit",
        "stage": 2,
        "ordinal": 0,
        "status": "running",
        "precedence": 0,
        "fence": 1,
        "attempts": 1,
        "failures": 0,
        "not_before": T,
    },
    "artifact": {
        "id": "art_1",
        "job_id": "job_1",
        "step_id": "step_1",
        "fence": 1,
        "filename": "f",
        "object_key": "k",
        "bytes": 1,
        "sha256": "0",
        "media_type": "x/y",
        "created_at": T,
    },
    "layer": {
        "artifact_id": "art_1",
        "job_id": "job_1",
        "step_id": "step_1",
        "layer": 0,
        "fence": 1,
        "attempt": 1,
        "metrics": "{}",
        "committed_at": T,
    },
    "profile": {
        "id": "prof_1",
        "job_id": "job_1",
        "summary": "{}",
        "json_artifact_id": "art_1",
        "tensors_artifact_id": "art_1",
        "plot_artifact_id": "art_1",
        "created_at": T,
    },
    "checkpoint": {
        "id": "ckpt_1",
        "job_id": "job_1",
        "profile_id": "prof_1",
        "form": "adapter",
        "budget": "{}",
        "plan": "{}",
        "measured": "{}",
        "created_at": T,
    },
    "checkpoint_file": {"checkpoint_id": "ckpt_1", "filename": "f", "artifact_id": "art_1"},
    "idempotency_key": {"key": "k", "fingerprint": "f", "created_at": T, "expires_at": T},
}
OWNED = ("dataset", "job", "artifact", "profile", "checkpoint", "idempotency_key")


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SyncDatabase]:
    """The first schema with one row of everything."""
    with postgres_url() as url:
        if request.param == "sqlite":
            url = f"sqlite:///{tmp_path / 'old.db'}"
        upgrade(url, "0001")
        database = SyncDatabase(url)
        database.write(fill)
        yield database
        database.close()


def fill(session: Session) -> None:
    for table, row in ROWS.items():
        names = ", ".join(f'"{name}"' for name in row)
        values = ", ".join(f":{name}" for name in row)
        session.execute(text(f"INSERT INTO {table} ({names}) VALUES ({values})"), row)
    session.execute(text("UPDATE job SET profile_id = 'prof_1'"))  # the circle


def count(session: Session) -> dict[str, int]:
    return {table: session.execute(text(f"SELECT count(*) FROM {table}")).scalar_one() for table in ROWS}


def url_of(database: SyncDatabase) -> str:
    return database.engine.url.render_as_string(hide_password=False)


def test_every_row_goes_to_the_default_project(database: SyncDatabase) -> None:
    upgrade(url_of(database))
    assert database.read(count) == dict.fromkeys(ROWS, 1)
    for table in OWNED:
        statement = text(f"SELECT project_id FROM {table}")
        owner = database.read(lambda session, statement=statement: session.execute(statement).scalar_one())
        assert owner == DEFAULT_PROJECT_ID, table
    command.downgrade(alembic_config(url_of(database)), "0002")
    assert database.read(count) == dict.fromkeys(ROWS, 1)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE job SET status = 'done'",
        "UPDATE job SET project_id = 'proj_of_nobody'",
        "UPDATE job SET project_id = NULL",
        "UPDATE artifact SET step_id = 'step_of_nobody'",
        "DELETE FROM job",
        "DELETE FROM project",
        "INSERT INTO idempotency_key (project_id, key, fingerprint, created_at, expires_at) "
        f"VALUES ('{DEFAULT_PROJECT_ID}', 'k', 'f', '{T}', '{T}')",
    ],
)
def test_constraints_hold_after_tables_were_made_anew(database: SyncDatabase, statement: str) -> None:
    upgrade(url_of(database))
    with pytest.raises(IntegrityError):
        database.write(lambda session: session.execute(text(statement)))


def test_tenants_are_not_thrown_together(database: SyncDatabase) -> None:
    upgrade(url_of(database))
    other = f"INSERT INTO project (id, name, created_at) VALUES ('proj_2', 'b', '{T}')"
    database.write(lambda session: session.execute(text(other)))
    with pytest.raises(RuntimeError, match="other projects than 'default' exist"):
        command.downgrade(alembic_config(url_of(database)), "0002")
    assert database.read(count) == dict.fromkeys(ROWS, 1)
