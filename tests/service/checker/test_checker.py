"""The checker finds nothing in a sound database, and each planted fault by its name, and no other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import select, update
from sqlalchemy.orm import Session
from typer.testing import CliRunner

from app.__main__ import commands
from app.artifacts.models import Artifact
from app.auth.models import Project
from app.checker.checks import check
from app.checkpoints.models import Checkpoint
from app.idempotency.models import IdempotencyKey
from app.infra.database import SyncDatabase
from app.infra.storage import Storage
from app.jobs import service
from app.jobs.models import Event, Job, Layer, Step
from app.jobs.repairs import return_lost
from app.principal import DEFAULT_PROJECT_ID, local_principal
from app.profiles.models import Profile
from app.settings import Settings
from tests.service.workers.test_supervisor import run_to_end
from tests.support.factories import POLICY, Script, expire, hurry, must_claim, queue_job

NOW = timedelta(seconds=-5)


@dataclass
class World:
    """A database with a job that ran through, with a lost attempt on the way, and one that runs."""

    session: Session
    storage: Storage
    done: str
    running: str
    tmp: Path

    def event(self, kind: str, nth: int = 0) -> Event:
        found = select(Event).where(Event.job_id == self.done, Event.type == kind).order_by(Event.seq)
        return self.session.execute(found).scalars().all()[nth]

    def change(self, event: Event, **data: object) -> None:
        event.data = {**event.data, **data}

    def append(self, kind: str) -> None:
        """One more event at the end, as if the code had written it."""
        job = self.session.get_one(Job, self.done)
        job.event_seq += 1
        job.version += 1
        self.session.add(Event(job_id=job.id, seq=job.event_seq, type=kind, data={}))

    def artifact(self) -> Artifact:
        found = select(Artifact).where(Artifact.job_id == self.done, Artifact.filename == "profile.png")
        return self.session.execute(found).scalar_one()

    def put(self, key: str, content: bytes) -> None:
        file = self.tmp / "planted"
        file.write_bytes(content)
        self.storage.put_file(key, file)


def two_ends(world: World) -> None:
    # A retry that the row knows nothing of: edges are allowed, ends are too many.
    world.session.execute(update(Event).where(Event.type == "job.created").values(type="job.failed"))


def no_edge(world: World) -> None:
    world.event("job.started").type = "job.queued-somehow"


def other_status(world: World) -> None:
    job = world.session.get_one(Job, world.running)
    last = select(Event).where(Event.job_id == job.id).order_by(Event.seq.desc()).limit(1)
    event = world.session.execute(last).scalar_one()
    event.type, event.data = "attempt.released", {"step": "calibrate", "ordinal": 0}


def gap(world: World) -> None:
    world.session.delete(world.event("phase.changed"))


def falling_fence(world: World) -> None:
    fits = select(Event).where(Event.job_id == world.done).order_by(Event.seq)
    claims = [
        e for e in world.session.execute(fits).scalars() if e.data.get("step") == "fit" and "worker" in e.data
    ]
    world.change(claims[1], fence=claims[0].data["fence"])
    # What was done under the claim stays what the newest claim's fence allows.
    for event in world.session.execute(fits).scalars():
        of_fit = event.type == "layer.committed" or (event.type, event.data.get("step")) == (
            "step.succeeded",
            "fit",
        )
        if event.seq > claims[1].seq and of_fit:
            world.change(event, fence=claims[0].data["fence"])
    layers = update(Layer).where(Layer.job_id == world.done).values(fence=claims[0].data["fence"])
    world.session.execute(layers)


def row_behind_its_claims(world: World) -> None:
    world.session.execute(update(Step).where(Step.job_id == world.done, Step.name == "fit").values(fence=1))


def stale_commit(world: World) -> None:
    event = world.event("step.succeeded", -1)
    world.change(event, fence=event.data["fence"] - 1)


def twice(world: World) -> None:
    job = world.session.get_one(Job, world.done)
    layer = world.event("layer.committed", -1)
    event = world.event("phase.changed", -1)
    assert event.seq > layer.seq
    event.type, event.data = "layer.committed", layer.data
    assert job.event_seq > event.seq


def layer_without_event(world: World) -> None:
    event = world.event("layer.committed")
    event.type = "phase.changed"


def layer_without_row(world: World) -> None:
    world.session.execute(update(Layer).where(Layer.job_id == world.done, Layer.layer == 0).values(layer=77))
    event = world.event("layer.committed")
    assert event.data["layer"] == 0
    world.change(event, layer=77)


def open_step(world: World) -> None:
    step = world.session.execute(
        select(Step).where(Step.job_id == world.done, Step.name == "resolve")
    ).scalar_one()
    step.status = "ready"


def lost_object(world: World) -> None:
    world.storage.delete([world.artifact().object_key])


def changed_object(world: World) -> None:
    artifact = world.artifact()
    world.put(artifact.object_key, b"y" * artifact.bytes)


def wrong_charge(world: World) -> None:
    world.artifact().bytes += 1


def over_the_limit(world: World) -> None:
    world.session.execute(update(Project).values(max_running_steps=0))


def unfinished_profile(world: World) -> None:
    files = world.session.execute(select(Artifact).where(Artifact.job_id == world.done)).scalars().first()
    assert files is not None
    world.session.add(
        Profile(
            id="prof_0",
            project_id=DEFAULT_PROJECT_ID,
            job_id=world.running,
            summary={},
            json_artifact_id=files.id,
            tensors_artifact_id=files.id,
            plot_artifact_id=files.id,
        )
    )


def unfinished_file(world: World) -> None:
    step = world.session.execute(
        select(Step).where(Step.job_id == world.running, Step.name == "resolve")
    ).scalar_one()
    artifact = world.artifact()
    artifact.job_id, artifact.step_id = world.running, step.id


def unfinished_checkpoint(world: World) -> None:
    world.session.execute(update(Checkpoint).values(job_id=world.running))


def orphan(world: World) -> None:
    world.put(f"jobs/{world.done}/step_0/1/layer-000.safetensors", b"never committed")


def lost_answer(world: World) -> None:
    world.session.execute(update(IdempotencyKey).values(location="/v1/jobs/job_0", body={"id": "job_0"}))


def another_answer(world: World) -> None:
    world.session.execute(update(IdempotencyKey).values(location=f"/v1/jobs/{world.running}"))


def success_after_cancel(world: World) -> None:
    event = world.event("phase.changed", -1)
    event.type = "job.cancelling"


FAULTS: list[tuple[str, Callable[[World], None]]] = [
    ("ends", two_ends),
    ("transitions", no_edge),
    ("transitions", other_status),
    ("events", gap),
    ("fences", falling_fence),
    ("fences", row_behind_its_claims),
    ("stale_commits", stale_commit),
    ("layers", twice),
    ("layers", layer_without_event),
    ("layers", layer_without_row),
    ("steps", open_step),
    ("objects", lost_object),
    ("objects", changed_object),
    ("quotas", wrong_charge),
    ("quotas", over_the_limit),
    ("visibility", unfinished_profile),
    ("visibility", unfinished_file),
    ("visibility", unfinished_checkpoint),
    ("orphans", orphan),
    ("idempotency", lost_answer),
    ("idempotency", another_answer),
    ("cancels", success_after_cancel),
]
# What cannot be broken alone: a success after a cancel is no allowed edge either, and so on.
ALSO = {success_after_cancel: {"transitions"}, two_ends: {"transitions"}}


@pytest.fixture
def prepared(database: SyncDatabase, settings: Settings, storage: Storage, script: Script) -> tuple[str, str]:
    """(a job that ran through, a job that runs)."""
    script.write({"step": "fit", "run": 0, "do": "die", "layer": 1})
    done = queue_job(database)
    run_to_end(database, settings, done.id)
    database.write(
        lambda session: session.add(
            IdempotencyKey(
                project_id=DEFAULT_PROJECT_ID,
                key="k",
                fingerprint="f",
                status_code=201,
                body={"id": done.id},
                location=f"/v1/jobs/{done.id}",
                expires_at=session.get_one(Job, done.id).created_at + timedelta(days=1),
            )
        )
    )
    running = queue_job(database).id
    must_claim(database)
    return done.id, running


def test_a_sound_database_has_no_violation(
    database: SyncDatabase, storage: Storage, prepared: tuple[str, str]
) -> None:
    report = check(database, storage, orphan_age=NOW)
    assert report.violations == []
    assert (report.jobs, report.layers, report.objects) == (2, 3, 14)
    assert report.events > 20


def test_what_leases_and_clients_do_is_no_violation(database: SyncDatabase, storage: Storage) -> None:
    principal = local_principal()
    job = queue_job(database)
    lease = must_claim(database)
    expire(database, lease)
    database.write(return_lost, POLICY)
    database.write(service.cancel, job_id=job.id, principal=principal)
    database.write(service.retry, job_id=job.id, principal=principal, settings=Settings())
    hurry(database)
    must_claim(database)
    database.write(service.cancel, job_id=job.id, principal=principal)
    assert check(database, storage, orphan_age=NOW).violations == []


@pytest.mark.parametrize(("invariant", "plant"), FAULTS, ids=lambda value: getattr(value, "__name__", value))
def test_a_planted_fault_is_found_by_its_name(
    database: SyncDatabase,
    storage: Storage,
    prepared: tuple[str, str],
    tmp_path: Path,
    invariant: str,
    plant: Callable[[World], None],
) -> None:
    def act(session: Session) -> None:
        plant(World(session, storage, *prepared, tmp_path))

    database.write(act)
    found = {violation.invariant for violation in check(database, storage, orphan_age=NOW).violations}
    assert found - ALSO.get(plant, set()) == {invariant}


def test_every_invariant_is_planted() -> None:
    from app.checker.rules import RULES

    assert {invariant for invariant, _plant in FAULTS} == {
        *RULES,
        "objects",
        "quotas",
        "orphans",
        "idempotency",
    }


class TestCommand:
    def run(self, settings: Settings, *arguments: str) -> tuple[int, str, str]:
        environment = {
            "ORTHOKV_DATABASE_URL": settings.resolved_database_url,
            "ORTHOKV_STORAGE_URL": settings.resolved_storage_url,
        }
        result = CliRunner().invoke(commands, ["check", *arguments], env=environment)
        return result.exit_code, result.stdout, result.stderr

    def test_it_says_what_it_looked_at(self, settings: Settings, prepared: tuple[str, str]) -> None:
        code, out, err = self.run(settings)
        assert (code, out) == (0, "")
        assert err.startswith("2 jobs, ")
        assert err.endswith(": 0 violations\n")

    def test_it_prints_a_line_for_each_violation(
        self,
        settings: Settings,
        database: SyncDatabase,
        storage: Storage,
        prepared: tuple[str, str],
        tmp_path: Path,
    ) -> None:
        database.write(lambda session: lost_object(World(session, storage, *prepared, tmp_path)))
        code, out, _err = self.run(settings)
        assert code == 1
        assert len(out.splitlines()) == 1
        assert out.startswith("objects art_")

    def test_orphans_count_once_they_are_old(
        self, settings: Settings, storage: Storage, prepared: tuple[str, str], tmp_path: Path
    ) -> None:
        file = tmp_path / "orphan"
        file.write_bytes(b"x")
        storage.put_file("jobs/job_0/step_0/1/x", file)
        assert self.run(settings)[0] == 0
        code, out, _err = self.run(settings, "--orphan-hours", "0")
        assert (code, out) == (1, "orphans jobs/job_0/step_0/1/x: no row refers to this object\n")

    @pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
    def test_a_folder_that_is_none_is_bad_input(self, settings: Settings, tmp_path: Path) -> None:
        result = CliRunner().invoke(commands, ["check", "--data", str(tmp_path / "nothing")])
        assert result.exit_code == 2
        assert "is not a data folder" in result.stderr
