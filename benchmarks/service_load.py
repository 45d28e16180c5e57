"""The service under load, on one machine: reads, submissions, pages, event streams, claims.

    python -m benchmarks.service_load --database sqlite
    python -m benchmarks.service_load --database postgres --out benchmarks/results/service-load-postgres.json

Starts the real API on the loopback over a database with 100,000 finished jobs, a million events and 10,000 queued jobs, and
ends it. Client, server and database share the machine's cores. Downloads: `benchmarks.service_download`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import multiprocessing
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import structlog
from sqlalchemy import text, update
from sqlalchemy.orm import Session

from app.infra.database import SyncDatabase
from app.infra.ids import new_id
from app.jobs import repository
from app.jobs.commits import commit_layer
from app.jobs.lease import Lease, claim
from app.jobs.models import Job
from app.jobs.states import record
from app.jobs.vocabulary import StepName
from app.migrate import upgrade
from app.principal import DEFAULT_PROJECT_ID
from benchmarks.http_load import Connection, at_most, at_rate, message, milliseconds
from benchmarks.seed_jobs import seed
from tests.support.factories import finish, job_body, produced
from tests.support.fleet import Api
from tests.support.postgres import postgres_url
from tests.support.tenants import new_key

CLAIMERS, CLAIMING_PROCESSES = 64, 4
COMMITTERS, COMMITS_PER_SECOND = 8, 80.0
STREAMS = 500
PAGE = 20
# Requests a second, within what one API process can answer: a read costs it 3 to 4 ms of one core, and client and
# database share the two cores with it.
RATES = {"sqlite": {"get": 200.0, "post": 20.0}, "postgres": {"get": 150.0, "post": 20.0}}


class Load:
    """A running API over a filled database, and what a client sends it."""

    def __init__(self, api: Api, database: SyncDatabase, jobs: list[str]) -> None:
        self.api, self.database, self.jobs = api, database, jobs
        self.port = int(api.url.rsplit(":", 1)[1])
        self.headers = {"Authorization": f"Bearer {new_key(database, DEFAULT_PROJECT_ID)}"}

    def get_job(self, number: int) -> bytes:
        # Strides through all jobs, so that no cache holds just a few.
        return message("GET", f"/v1/jobs/{self.jobs[number * 7919 % len(self.jobs)]}", self.headers)

    def post_job(self, number: int) -> bytes:
        body = json.dumps(job_body(metadata={"n": str(number)})).encode()
        return message("POST", "/v1/jobs", {**self.headers, "Idempotency-Key": new_id("key")}, body)

    def page_after(self, after: str | None) -> Callable[[int], bytes]:
        query = f"limit={PAGE}&status=succeeded" + (f"&after={after}" if after else "")
        return lambda _number: message("GET", f"/v1/jobs?{query}", self.headers)

    def resident_mib(self) -> float:
        family = [psutil.Process(self.api.process.pid), *self.api.family()]
        return float(sum(process.memory_info().rss for process in family)) / (1 << 20)


def fixed(load: Load, request: Callable[[int], bytes], rate: float, seconds: float) -> dict[str, Any]:
    # Before: the first requests of a kind make its statements, and each of the threads its connection.
    asyncio.run(at_most(load.port, request, seconds=2.0, connections=16))
    outcome = asyncio.run(at_rate(load.port, request, rate=rate, seconds=seconds, connections=32))
    return {"rate_per_second": rate, **outcome.to_dict()}


def fastest(load: Load, request: Callable[[int], bytes], seconds: float) -> dict[str, Any]:
    outcome = asyncio.run(at_most(load.port, request, seconds=seconds, connections=16))
    return {"connections": 16, **outcome.to_dict()}


def pages(load: Load, seconds: float) -> dict[str, Any]:
    """The first page and the thousandth: alike, because a page is found by the id that it follows."""
    thousandth = load.jobs[::-1][1000 * PAGE - 1] if len(load.jobs) > 1000 * PAGE else load.jobs[PAGE]
    found = {}
    for name, after in (("page_1", None), ("page_1000", thousandth)):
        request = load.page_after(after)
        found[name] = fixed(load, request, 20.0, seconds)
    return {**found, "ratio_of_p50": round(found["page_1000"]["p50_ms"] / found["page_1"]["p50_ms"], 2)}


@contextlib.contextmanager
def committing(url: str) -> Iterator[None]:
    """Eight workers that commit layers, in a process of their own."""
    stop = multiprocessing.get_context("spawn").Event()
    process = multiprocessing.get_context("spawn").Process(target=_commit, args=(url, stop), daemon=True)
    process.start()
    time.sleep(3)  # until it commits
    try:
        yield
    finally:
        stop.set()
        process.join()


def _quiet() -> None:
    """The service's own functions log in this process; what is measured goes without a line for each job."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))


def _commit(url: str, stop: Any) -> None:
    _quiet()
    database = SyncDatabase(url)

    def worker(number: int) -> None:
        pause = COMMITTERS / COMMITS_PER_SECOND
        while not stop.is_set():
            lease = _claim(database, f"committer-{number}")
            if lease is None:
                return
            layers = 3 if lease.step is StepName.FIT else 0
            for layer in range(layers):
                name = f"layer-{layer:03d}.safetensors"
                database.write(commit_layer, lease, produced(lease, name, layer=layer))
                time.sleep(pause)
            finish(database, lease)
            time.sleep(pause)

    threads = [threading.Thread(target=worker, args=(n,)) for n in range(COMMITTERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    database.close()


def _claim(database: SyncDatabase, owner: str) -> Lease | None:
    return database.write(claim, owner=owner, lease_seconds=3600.0, max_running_steps=None)


def claims(url: str, *, seconds: float, interval: float) -> dict[str, Any]:
    """64 idle workers on 10,000 queued jobs, each asking every `interval` seconds (0: as fast as it is answered)."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(CLAIMING_PROCESSES) as pool:
        share = CLAIMERS // CLAIMING_PROCESSES
        calls = [(url, n, share, seconds, interval) for n in range(CLAIMING_PROCESSES)]
        parts = pool.starmap(_claim_often, calls)
    times = [time_ for part in parts for time_, _ in part]
    claimed = [job for part in parts for _, job in part]
    return {
        "claimers": CLAIMERS,
        "asking_every_seconds": interval,
        "claims": len(claimed),
        "per_second": round(len(claimed) / seconds, 1),
        "claimed_twice": len(claimed) - len(set(claimed)),
        **milliseconds(times),
    }


def _claim_often(
    url: str, process: int, threads: int, seconds: float, interval: float
) -> list[tuple[float, str]]:
    _quiet()
    database = SyncDatabase(url, connections=threads)
    found: list[tuple[float, str]] = []
    start = time.perf_counter() + 3.0

    def claimer(number: int) -> None:
        # Before the clock starts: a worker that waits is connected, and its statements are made.
        _claim(database, f"claimer-{process}-{number}")
        # Workers poll out of step, those of different processes too.
        due = start + interval * (number * CLAIMING_PROCESSES + process) / CLAIMERS
        while due < start + seconds:
            time.sleep(max(0.0, due - time.perf_counter()))
            began = time.perf_counter()
            lease = _claim(database, f"claimer-{process}-{number}")
            if lease is not None:
                found.append((time.perf_counter() - began, lease.step_id))
            due = due + interval if interval else time.perf_counter()

    workers = [threading.Thread(target=claimer, args=(n,)) for n in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    database.close()
    return found


def streams(load: Load, seconds: float) -> dict[str, Any]:
    """Idle event streams: memory, database connections in use, and how late an event arrives."""
    return asyncio.run(_streams(load, seconds))


async def _streams(load: Load, seconds: float) -> dict[str, Any]:
    running = load.jobs[
        :STREAMS
    ]  # waiting for an event does not look at the status of a job but at its events
    load.database.write(_reopen, running)
    before = load.resident_mib()
    opened = [await _open_stream(load, job) for job in running]
    await asyncio.sleep(1.0)
    busy: int | None = None
    cpu = psutil.Process(load.api.process.pid)
    used = sum(cpu.cpu_times()[:2])
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        seen = await asyncio.to_thread(_busy_connections, load.database)
        busy = seen if busy is None or seen is None else max(busy, seen)
        await asyncio.sleep(0.1)
    share = (sum(cpu.cpu_times()[:2]) - used) / (time.perf_counter() - start)
    memory = load.resident_mib()
    sent: dict[str, float] = {}
    arrivals = [asyncio.create_task(_arrival(connection)) for connection in opened]
    await asyncio.to_thread(_send_events, load.database, running, sent)
    lags = [
        arrived - sent[job] for job, arrived in zip(running, await asyncio.gather(*arrivals), strict=True)
    ]
    for connection in opened:
        connection.close()
    return {
        "streams": STREAMS,
        "resident_mib_before": round(before, 1),
        "resident_mib_with_streams": round(memory, 1),
        "api_cpu_share_while_idle": round(share, 3),
        "database_connections_in_use_at_most": busy,
        "event_lag": milliseconds(lags),
    }


def _reopen(session: Session, jobs: list[str]) -> None:
    session.execute(update(Job).where(Job.id.in_(jobs)).values(status="running", finished_at=None))


async def _open_stream(load: Load, job: str) -> Connection:
    """A stream that has shown all past events."""
    connection = await Connection.open("127.0.0.1", load.port)
    headers = {**load.headers, "Accept": "text/event-stream", "Last-Event-ID": "1000"}
    connection.writer.write(message("GET", f"/v1/jobs/{job}/events", headers))
    head = await connection.reader.readuntil(b"\r\n\r\n")
    assert b" 200 " in head.split(b"\r\n")[0], head
    return connection


async def _arrival(connection: Connection) -> float:
    while b"event: benchmark" not in await connection.reader.readuntil(b"\n"):
        pass
    return time.perf_counter()


def _send_events(database: SyncDatabase, jobs: list[str], sent: dict[str, float]) -> None:
    def say(session: Session, job_id: str) -> None:
        job = repository.lock_job(session, job_id)
        assert job is not None
        job.event_seq = 1000  # after what the stream says it has seen
        record(session, job, "benchmark")

    for job in jobs:
        database.write(say, job)
        sent[job] = time.perf_counter()
        time.sleep(0.01)


def _busy_connections(database: SyncDatabase) -> int | None:
    """Connections of others that are in a transaction; on SQLite nobody can say: None."""
    if database.engine.dialect.name != "postgresql":
        return None
    query = text(
        "select count(*) from pg_stat_activity "
        "where datname = current_database() and pid <> pg_backend_pid() and state <> 'idle'"
    )
    return int(database.read(lambda session: session.execute(query).scalar_one()))


def run(kind: str, *, jobs: int, events: int, queued: int, seconds: float) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = (
            stack.enter_context(postgres_url())
            if kind == "postgres"
            else f"sqlite:///{folder / 'orthokv.db'}"
        )
        upgrade(url)
        database = SyncDatabase(url)
        stack.callback(database.close)
        began = time.perf_counter()
        ids = seed(database, finished=jobs, queued=queued, events=events)
        if kind == "postgres":
            with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.execute(text("VACUUM ANALYZE"))
        print(f"{jobs} jobs and {events} events stored in {time.perf_counter() - began:.0f} s", flush=True)
        environment = {
            "ORTHOKV_DATABASE_URL": url,
            "ORTHOKV_DATA_DIR": str(folder / "data"),
            "ORTHOKV_STORAGE_URL": (folder / "objects").as_uri(),
            "ORTHOKV_RATE_LIMIT_REQUESTS": "100000000",
            "ORTHOKV_MAX_QUEUED_JOBS": "1000000",
            "ORTHOKV_MAX_EVENT_STREAMS": str(STREAMS + 10),
            "ORTHOKV_MAX_EVENT_STREAMS_PER_KEY": str(STREAMS + 10),
        }
        (folder / "objects").mkdir()
        load = Load(stack.enter_context(Api(folder / "data", environment)), database, ids)
        rates = RATES[kind]
        found: dict[str, Any] = {}

        def note(name: str, result: dict[str, Any]) -> None:
            found[name] = result
            print(name, json.dumps(result), flush=True)

        note("get_job", fixed(load, load.get_job, rates["get"], seconds))
        note("get_job_fastest", fastest(load, load.get_job, seconds))
        note("list_jobs", pages(load, seconds))
        with committing(url):
            note("post_job_while_8_workers_commit", fixed(load, load.post_job, rates["post"], seconds))
        note("post_job_fastest", fastest(load, load.post_job, seconds))
        note("event_streams", streams(load, seconds))
        note("claim", claims(url, seconds=seconds, interval=2.0))
        note("claim_fastest", claims(url, seconds=seconds, interval=0.0))
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--database", choices=sorted(RATES), default="sqlite")
    parser.add_argument("--jobs", type=int, default=100_000)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--queued", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    _quiet()
    found = {
        "database": given.database,
        "machine": f"{os.cpu_count()} cores, {psutil.virtual_memory().total >> 30} GiB, {platform.platform()}",
        "stored": {"finished_jobs": given.jobs, "events": given.events, "queued_jobs": given.queued},
        **run(
            given.database, jobs=given.jobs, events=given.events, queued=given.queued, seconds=given.seconds
        ),
    }
    if given.out is not None:
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
