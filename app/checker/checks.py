"""All checks over one database and one object store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from app.artifacts.models import Artifact
from app.audit.models import AuditEvent
from app.auth.models import Project
from app.checker.rules import RULES, Facts
from app.checkpoints.models import Checkpoint
from app.datasets.models import Dataset
from app.deletion.orphans import find_orphans
from app.idempotency.models import IdempotencyKey
from app.infra.database import SyncDatabase
from app.infra.storage import Storage
from app.jobs.models import Event, Job, Layer, Step
from app.jobs.vocabulary import StepStatus
from app.profiles.models import Profile

_BATCH = 200


T = TypeVar("T", Step, Event, Layer, Artifact, Profile, Checkpoint)


@dataclass(frozen=True, order=True)
class Violation:
    """One broken promise: which, about whom, and what was found."""

    invariant: str
    subject: str
    finding: str

    def __str__(self) -> str:
        return f"{self.invariant} {self.subject}: {self.finding}"


@dataclass
class Report:
    """What was looked at, and what is wrong with it."""

    jobs: int = 0
    events: int = 0
    layers: int = 0
    objects: int = 0
    violations: list[Violation] = field(default_factory=list)

    def add(self, invariant: str, subject: str, finding: str) -> None:
        self.violations.append(Violation(invariant, subject, finding))


@dataclass(frozen=True)
class _Object:
    owner: str
    project_id: str
    key: str
    bytes: int
    sha256: str


def check(database: SyncDatabase, storage: Storage, *, orphan_age: timedelta) -> Report:
    """Check everything. Objects without a row count as orphans once they are older than `orphan_age`.

    Every stored byte is read. Raises `StorageError` when the store does not answer.
    """

    def look(session: Session) -> tuple[Report, list[_Object]]:
        if session.get_bind().dialect.name == "postgresql":
            session.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"))
        return check_rows(session), list(_expected(session))

    report, expected = database.read(look)
    _compare(storage, expected, report)
    for key in find_orphans(database, storage, age=orphan_age):
        report.add("orphans", key, "no row refers to this object")
    report.violations.sort()
    return report


def check_rows(session: Session) -> Report:
    """What the tables alone can tell."""
    report = Report()
    after = ""
    while ids := list(
        session.execute(select(Job.id).where(Job.id > after).order_by(Job.id).limit(_BATCH)).scalars()
    ):
        after = ids[-1]
        for facts in _facts(session, ids):
            report.jobs += 1
            report.events += len(facts.events)
            report.layers += len(facts.layers)
            for name, rule in RULES.items():
                for finding in rule(facts):
                    report.add(name, facts.job.id, finding)
        session.expunge_all()
    for key, finding in _idempotency(session):
        report.add("idempotency", key, finding)
    for project_id, finding in _running_steps(session):
        report.add("quotas", project_id, finding)
    return report


def _facts(session: Session, ids: Sequence[str]) -> Iterator[Facts]:
    def of(model: type[T]) -> dict[str, list[T]]:
        found: dict[str, list[T]] = {job_id: [] for job_id in ids}
        for row in session.execute(select(model).where(model.job_id.in_(ids))).scalars():
            found[row.job_id].append(row)
        return found

    steps, events, layers = of(Step), of(Event), of(Layer)
    artifacts, profiles, checkpoints = of(Artifact), of(Profile), of(Checkpoint)
    for job in session.execute(select(Job).where(Job.id.in_(ids)).order_by(Job.id)).scalars():
        history = sorted(events[job.id], key=lambda event: event.seq)
        yield Facts(
            job,
            steps[job.id],
            history,
            layers[job.id],
            artifacts[job.id],
            profiles[job.id],
            checkpoints[job.id],
        )


def _idempotency(session: Session) -> Iterator[tuple[str, str]]:
    """A key stands for one resource, which exists (or was deleted on record) and is the project's own."""
    for row in session.execute(select(IdempotencyKey)).scalars():
        named = (row.location or "").rpartition("/")[2]
        answered = (row.body or {}).get("id")
        if row.status_code is None or answered != named:
            yield row.key, f"answers {answered} at {row.location}"
            continue
        if named.startswith("job_"):
            owned = select(Job.project_id).where(Job.id == named)
        elif named.startswith("ds_"):
            owned = select(Dataset.project_id).where(Dataset.id == named)
        else:
            continue
        owner = session.execute(owned).scalar_one_or_none()
        if owner is None and _was_deleted(session, named):
            continue
        if owner != row.project_id:
            yield row.key, f"stands for {named}, which {'does not exist' if owner is None else 'is foreign'}"


def _was_deleted(session: Session, subject_id: str) -> bool:
    statement = select(AuditEvent.id).where(
        AuditEvent.subject_id == subject_id, AuditEvent.action.like("%.deleted")
    )
    return session.execute(statement.limit(1)).scalar_one_or_none() is not None


def _running_steps(session: Session) -> Iterator[tuple[str, str]]:
    """No project runs more steps than it may."""
    running = func.count(Step.id)
    statement = (
        select(Project.id, Project.max_running_steps, running)
        .join(Job, Job.project_id == Project.id)
        .join(Step, Step.job_id == Job.id)
        .where(Step.status == StepStatus.RUNNING)
        .group_by(Project.id, Project.max_running_steps)
    )
    for project_id, limit, count in session.execute(statement):
        if limit is not None and count > limit:
            yield project_id, f"runs {count} steps and may run {limit}"


def _expected(session: Session) -> Iterator[_Object]:
    for artifact in session.execute(select(Artifact)).scalars():
        yield _Object(artifact.id, artifact.project_id, artifact.object_key, artifact.bytes, artifact.sha256)
    for dataset in session.execute(select(Dataset).where(Dataset.object_key.is_not(None))).scalars():
        key, size, sha256 = dataset.object_key, dataset.bytes, dataset.sha256
        yield _Object(dataset.id, dataset.project_id, key or "", size or 0, sha256 or "")


def _compare(storage: Storage, expected: Sequence[_Object], report: Report) -> None:
    """Every visible file exists with its digest, and what a project is charged is what is stored."""
    charged: dict[str, int] = {}
    stored: dict[str, int] = {}
    for one in expected:
        charged[one.project_id] = charged.get(one.project_id, 0) + one.bytes
        try:
            found = storage.digest(one.key)
        except FileNotFoundError:
            report.add("objects", one.owner, f"{one.key} does not exist")
            # Its absence is one finding, not two.
            stored[one.project_id] = stored.get(one.project_id, 0) + one.bytes
            continue
        report.objects += 1
        stored[one.project_id] = stored.get(one.project_id, 0) + found.bytes
        if found.sha256 != one.sha256:
            report.add("objects", one.owner, f"{one.key} has digest {found.sha256}, its row {one.sha256}")
    for project_id, amount in charged.items():
        if stored[project_id] != amount:
            report.add("quotas", project_id, f"is charged {amount} bytes and stores {stored[project_id]}")
