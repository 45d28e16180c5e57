"""GPU classes: a step runs only on workers of its job's class."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic import command
from fastapi.testclient import TestClient
from sqlalchemy import text

from app.infra.database import SyncDatabase
from app.jobs.repairs import resend_hints
from app.jobs.vocabulary import StepName
from app.main import create_app
from app.migrate import SchemaBehind, alembic_config, require_schema, upgrade
from app.principal import local_principal
from app.profiles.schemas import CheckpointCreate
from app.profiles.service import create_checkpoint
from app.settings import DEFAULT_GPU_CLASS, Settings
from tests.support.factories import (
    claim_next,
    finish,
    hurry,
    job_body,
    must_claim,
    put_layer,
    queue_job,
    read_job,
)
from tests.support.postgres import postgres_url
from tests.support.tenants import OWNER


def test_workers_claim_their_own_classes_only(database: SyncDatabase) -> None:
    plain, large = queue_job(database), queue_job(database, gpu_class="h100")
    assert claim_next(database, gpu_classes=("l4",)) is None
    first = claim_next(database, gpu_classes=("h100",))
    assert first is not None
    assert first.job_id == large.id
    assert claim_next(database, gpu_classes=("h100",)) is None
    second = claim_next(database)
    assert second is not None
    assert second.job_id == plain.id


def test_a_worker_of_several_classes_takes_the_first_of_all(database: SyncDatabase) -> None:
    jobs = [
        queue_job(database, gpu_class="l4"),
        queue_job(database, gpu_class="h100", priority=5),
        queue_job(database, gpu_class="l4", priority=1),
    ]
    leases = [claim_next(database, gpu_classes=("h100", "l4")) for _ in jobs]
    assert [lease and lease.job_id for lease in leases] == [jobs[1].id, jobs[2].id, jobs[0].id]


def test_all_steps_of_a_job_are_of_its_class(database: SyncDatabase) -> None:
    job = queue_job(database, gpu_class="h100")
    steps = []
    while (lease := claim_next(database, gpu_classes=("h100",))) is not None:
        steps.append(lease.step)
        if lease.step is StepName.FIT:
            for layer in range(3):
                put_layer(database, lease, layer)
        finish(database, lease)
    assert steps == list(StepName)
    done = read_job(database, job.id)
    assert done.result is not None
    profile_id = done.result.profile_id
    assert profile_id is not None
    body = CheckpointCreate.model_validate({"budget": {"metric": "kept", "value": 0.5}})
    again = database.write(
        create_checkpoint,
        profile_id=profile_id,
        body=body,
        principal=local_principal(),
        settings=Settings(gpu_classes=("h100",)),
    )
    assert again.gpu_class == "h100"
    assert claim_next(database) is None


class _Heard:
    """A dispatcher that notes the classes."""

    def __init__(self) -> None:
        self.classes: list[str] = []

    def hint(self, gpu_class: str = DEFAULT_GPU_CLASS) -> None:
        self.classes.append(gpu_class)

    def close(self) -> None: ...


def test_hints_are_sent_again_to_the_classes_that_wait(database: SyncDatabase) -> None:
    for gpu_class in ("l4", "h100", "l4"):
        queue_job(database, gpu_class=gpu_class)
    queue_job(database)
    must_claim(database)  # nothing of the default class waits any more
    hurry(database)
    heard = _Heard()
    assert database.read(resend_hints, heard, after_seconds=0.5) == 3
    assert heard.classes == ["h100", "l4"]


def test_the_api_takes_its_own_classes_only(settings: Settings) -> None:
    fleet = settings.model_copy(update={"gpu_classes": ("default", "h100")})
    with TestClient(create_app(fleet), headers=OWNER) as client:
        assert client.post("/v1/jobs", json=job_body()).json()["gpu_class"] == "default"
        assert client.post("/v1/jobs", json=job_body(gpu_class="h100")).json()["gpu_class"] == "h100"
        unknown = client.post("/v1/jobs", json=job_body(gpu_class="tpu"))
        assert unknown.status_code == 422
        assert unknown.json()["errors"][0]["pointer"] == "/gpu_class"
        assert client.post("/v1/jobs", json=job_body(gpu_class="H 100")).status_code == 422


@pytest.fixture(params=["sqlite", "postgres"])
def old_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database of before there were classes, with a job that waits."""
    if request.param == "sqlite":
        yield _with_old_job(f"sqlite:///{tmp_path / 'old.db'}")
    else:
        with postgres_url() as url:
            yield _with_old_job(url)


def _with_old_job(url: str) -> str:
    upgrade(url, "0001")
    database = SyncDatabase(url)
    job = (
        "INSERT INTO job (id, kind, status, phase, version, event_seq, attempt, priority, model_id, spec, "
        "metadata, resolved, created_at) VALUES ('job_old', 'compress', 'queued', 'resolving', 1, 0, 1, 0, "
        "'org/model', '{}', '{}', '{}', '2026-01-01 00:00:00.000')"
    )
    step = (
        "INSERT INTO step (id, job_id, name, stage, ordinal, status, precedence, fence, attempts, failures, "
        "not_before) VALUES ('step_old', 'job_old', 'resolve', 0, 0, 'ready', 0, 0, 0, 0, "
        "'2026-01-01 00:00:00.000')"
    )
    for statement in (job, step):
        database.write(lambda session, sql=statement: session.execute(text(sql)))
    database.close()
    return url


def test_a_waiting_job_of_before_is_of_the_default_class(old_url: str) -> None:
    with pytest.raises(SchemaBehind, match="orthokv migrate"):
        require_schema(old_url)
    upgrade(old_url)
    require_schema(old_url)
    database = SyncDatabase(old_url)
    assert claim_next(database, gpu_classes=("h100",)) is None
    assert must_claim(database).job_id == "job_old"
    database.close()
    command.downgrade(alembic_config(old_url), "0001")
    with pytest.raises(SchemaBehind):
        require_schema(old_url)


def test_a_database_without_any_schema_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SchemaBehind):
        require_schema(f"sqlite:///{tmp_path / 'empty.db'}")
