"""A run: faults and clients side by side, then peace, then the reckoning."""

from __future__ import annotations

import os
import platform
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import select

from app.checker.checks import check
from app.deletion.orphans import sweep_orphans
from app.idempotency.models import IdempotencyKey
from app.infra.database import SyncDatabase
from app.jobs.models import Job
from app.jobs.vocabulary import TERMINAL
from tests.chaos.clients import Client
from tests.chaos.faults import WEIGHTS, Chaos, possible
from tests.chaos.reclaim import Watch
from tests.chaos.world import Plan, World

CLIENTS = 3
DRAIN_SECONDS = 900.0
_ALL = timedelta(seconds=-5)


def run(plan: Plan, *, minutes: float, seed: int, jobs: int = 0) -> dict[str, Any]:
    """Run and report. Every kind of fault that is possible comes once, then they come at random.

    A machine that is busy gets up to three times as long, until so many jobs were acknowledged.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="orthokv-chaos-") as folder, World(plan, Path(folder)) as world:
        database = SyncDatabase(world.database_url)
        rng = random.Random(seed)
        ended = threading.Event()
        outstanding = 2 if plan.real else 5
        clients = [
            Client(world.api, world.body, random.Random(rng.random()), ended, outstanding=outstanding)
            for _ in range(CLIENTS)
        ]
        watch = Watch(database)
        chaos = Chaos(world, watch, random.Random(rng.random()), long_seconds=min(120.0, minutes * 12))
        for client in clients:
            client.start()

        def enough() -> bool:
            return sum(len(client.said.jobs) for client in clients) >= jobs

        _break_things(chaos, seconds=minutes * 60, enough=enough)
        ended.set()
        world.heal()
        for client in clients:
            client.join()
        open_jobs = _drain(database)
        reclaimed = watch.close()
        world.stop()
        swept = sweep_orphans(database, world.storage, age=_ALL)
        report = check(database, world.storage, orphan_age=_ALL)
        broken = _compare(database, clients) + [f"{job} never ended" for job in open_jobs]
        statuses, codes, attempts = _jobs(database)
        database.close()
    return {
        "command": f"python -m tests.chaos --minutes {minutes:g} --seed {seed} --database {plan.database} "
        f"--broker {plan.broker}{' --real' if plan.real else ''}",
        "plan": asdict(plan),
        "minutes": minutes,
        "seed": seed,
        "machine": {"cores": os.cpu_count(), "python": platform.python_version()},
        "seconds": round(time.monotonic() - started, 1),
        "faults": dict(sorted(chaos.done.items())),
        "left_out": world.left_out,
        "jobs": {
            "acknowledged": sum(len(client.said.jobs) for client in clients),
            "cancels_acknowledged": sum(len(client.said.cancelled) for client in clients),
            "requests_repeated": dict(
                sorted(sum((c.said.repeated for c in clients), Counter[str]()).items())
            ),
            "ended": statuses,
            "failed_by_code": codes,
            "attempts_lost": attempts,
        },
        "layers": report.layers,
        "events": report.events,
        "objects": report.objects,
        "orphans_swept": swept,
        "reclaim_seconds": reclaimed,
        "refused_starts": world.refused_starts,
        "unexpected_deaths": world.deaths,
        "violations": [str(violation) for violation in report.violations] + broken,
    }


def _break_things(chaos: Chaos, *, seconds: float, enough: Callable[[], bool]) -> None:
    """Faults that last run beside others, but not beside their like."""
    names = possible(chaos.world)
    chaos.rng.shuffle(names)
    first = list(names)
    busy: dict[str, Any] = {}
    started = time.monotonic()
    with ThreadPoolExecutor(max_workers=len(names)) as pool:
        while (passed := time.monotonic() - started) < seconds or (passed < 3 * seconds and not enough()):
            name = first.pop() if first else _choose(chaos.rng, names)
            if name not in busy or busy[name].done():
                if name in busy:
                    busy[name].result()  # a fault that could not be made is an error of ours
                busy[name] = pool.submit(chaos.apply, name)
            time.sleep(chaos.rng.uniform(0.3, 2.7))
    for future in busy.values():
        future.result()


def _choose(rng: random.Random, names: list[str]) -> str:
    return rng.choices(names, [WEIGHTS.get(name, 1) for name in names])[0]


def _drain(database: SyncDatabase) -> list[str]:
    """Wait for every job; returns those that do not end."""
    deadline = time.monotonic() + DRAIN_SECONDS
    statement = select(Job.id).where(Job.status.not_in(TERMINAL))
    while open_jobs := database.read(lambda session: list(session.execute(statement).scalars())):
        if time.monotonic() > deadline:
            return open_jobs
        time.sleep(0.5)
    return []


def _compare(database: SyncDatabase, clients: list[Client]) -> list[str]:
    """What was acknowledged beside what is there."""
    jobs = database.read(lambda session: {r[0]: r[1] for r in session.execute(select(Job.id, Job.status))})
    keys = database.read(
        lambda session: {
            row[0]: row[1].rpartition("/")[2]
            for row in session.execute(select(IdempotencyKey.key, IdempotencyKey.location))
        }
    )
    found: list[str] = []
    for client in clients:
        said = client.said
        found += said.broken
        for key, job_id in said.jobs.items():
            if job_id not in jobs:
                found.append(f"{job_id} was acknowledged and does not exist")
            # A clock that jumped by a day has ended keys; one that is there says the truth.
            if keys.get(key, job_id) != job_id:
                found.append(f"{key} was acknowledged as {job_id} and stands for {keys[key]}")
        found += [
            f"the cancel of {job_id} was acknowledged, and it has {jobs[job_id]}"
            for job_id in said.cancelled
            if jobs.get(job_id) != "cancelled"
        ]
    acknowledged = {job_id for client in clients for job_id in client.said.jobs.values()}
    per_key = sum(len(client.said.jobs) for client in clients)
    if len(acknowledged) != per_key:
        found.append(f"{per_key} keys stand for {len(acknowledged)} jobs")
    return found


def _jobs(database: SyncDatabase) -> tuple[dict[str, int], dict[str, int], int]:
    from app.jobs.models import Event

    rows = database.read(lambda session: list(session.execute(select(Job.status, Job.error))))
    lost = database.read(
        lambda session: len(session.execute(select(Event.seq).where(Event.type == "attempt.lost")).all())
    )
    statuses = Counter(row[0] for row in rows)
    codes = Counter(row[1]["code"] for row in rows if row[0] == "failed" and row[1])
    return dict(sorted(statuses.items())), dict(sorted(codes.items())), lost
