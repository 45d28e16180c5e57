"""Everything that a chaos run may break, and how it is put right again."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil
import psycopg

from app.infra.storage import Storage
from app.migrate import upgrade
from tests.chaos.clock import Clock, make_clock
from tests.chaos.proxy import Proxy
from tests.crash.test_real import BODY as REAL_BODY
from tests.support.factories import Script, job_body
from tests.support.fleet import Api, Worker
from tests.support.paths import SCRIPTED_RUNNER
from tests.support.postgres import PrivatePostgres
from tests.support.redis_server import PrivateRedis
from tests.support.s3 import new_bucket, s3_endpoint

WORKERS = 3
LEASE_SECONDS = 4.0
DISK_BYTES = 256 << 20


@dataclass(frozen=True)
class Plan:
    """What is run. With `real` the jobs are those of the demo model, else a script's."""

    database: str = "postgres"
    broker: str = "celery"
    real: bool = False
    pace_seconds: float = 0.4


class Slot:
    """One place of a worker; whoever has it dies and is replaced."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.generation = 0
        self.worker: Worker | None = None
        self.log_start = 0
        """Where the log of the present life begins."""
        self.held_until = 0.0
        """Not started again before this moment."""

    @property
    def name(self) -> str:
        return f"worker-{self.number}-{self.generation}"


class World:
    """Servers, processes and a disk, all private."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan = plan
        self.folder = folder
        self.redis: PrivateRedis | None = None
        self.postgres: PrivatePostgres | None = None
        self.proxy: Proxy | None = None
        self.disk: Path | None = None
        self.clock: Clock | None = None
        self.left_out: dict[str, str] = {}
        self.deaths: list[str] = []
        """Processes that ended at work although nobody killed them, with the end of their logs."""
        self.refused_starts = 0
        """How often a process did not start, as when its database is away: it says so and ends."""
        self.slots = [Slot(number) for number in range(WORKERS)]
        self.guard = threading.RLock()
        self._stack = ExitStack()
        self._closing = threading.Event()
        self._keeper = threading.Thread(target=self._keep, daemon=True)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._stack = stack
            self._make()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_error: object) -> None:
        self._closing.set()
        self._stack.close()

    def _make(self) -> None:
        stack, plan = self._stack, self.plan
        self._make_disk()
        data = self.disk or self.folder
        self.database_url = f"sqlite:///{data / 'chaos.db'}"
        if plan.database == "postgres":
            self.postgres = PrivatePostgres()
            if not self.postgres.make(stack):
                raise SystemExit("chaos needs the binaries of Postgres")
            stack.callback(self.postgres.stop)
            self.postgres.restart()
            self.database_url = self.postgres.url
        upgrade(self.database_url)
        environment: dict[str, str] = {}
        if plan.database == "postgres":
            endpoint = stack.enter_context(s3_endpoint())
            self.proxy = Proxy(endpoint)
            stack.callback(self.proxy.close)
            bucket = new_bucket(endpoint)
            through = {**bucket.options, "endpoint": self.proxy.url}
            environment |= {
                "ORTHOKV_STORAGE_URL": bucket.url,
                "ORTHOKV_STORAGE_OPTIONS": json.dumps(through),
            }
            self.storage = Storage(bucket.url, bucket.options)
        else:
            environment["ORTHOKV_STORAGE_URL"] = (data / "objects").as_uri()
            self.storage = Storage(environment["ORTHOKV_STORAGE_URL"])
        if plan.broker == "celery":
            self.redis = stack.enter_context(PrivateRedis())
            environment["ORTHOKV_BROKER_URL"] = self.redis.url
        self.environment = environment | self._settings()
        self._make_clock()
        stack.callback(self._stop_processes)
        api = {**self.environment, "ORTHOKV_DATA_DIR": str(data / "api")}
        # SQLite's clock is that of the process that asks: a step of it is one of the whole machine.
        self.api = Api(self.folder / "api", api | (self._faked if plan.database == "sqlite" else {}))
        self.api.start()
        self._api_up = True
        for slot in self.slots:
            self._start(slot)
        self._keeper.start()

    def _settings(self) -> dict[str, str]:
        settings = {
            "ORTHOKV_DATABASE_URL": self.database_url,
            "ORTHOKV_LEASE_SECONDS": str(LEASE_SECONDS),
            "ORTHOKV_HEARTBEAT_SECONDS": "1",
            "ORTHOKV_REAPER_SECONDS": "0.5",
            "ORTHOKV_HINT_AFTER_SECONDS": "2",
            "ORTHOKV_IDLE_POLL_SECONDS": "0.5",
            "ORTHOKV_CANCEL_GRACE_SECONDS": "10",
            "ORTHOKV_RETRY_BACKOFF_SECONDS": "0.1",
            "ORTHOKV_MAX_FAILURES": "4",
            "ORTHOKV_DRAIN_SECONDS": "1",
            "ORTHOKV_LAYERS_PER_FIT_STEP": "2",
            "ORTHOKV_ORPHAN_SWEEP_SECONDS": "5",
            # Longer than the clock ever jumps: keys of before a longer jump are forgotten, as documented.
            "ORTHOKV_IDEMPOTENCY_HOURS": "72",
            "ORTHOKV_AUTH_REQUIRED": "false",
            "OMP_NUM_THREADS": "1",
        }
        if not self.plan.real:
            script = Script(self.folder / "script")
            content = {"layers": 4, "faults": [], "pace": self.plan.pace_seconds}
            (script.folder / "script.json").write_text(json.dumps(content))
            command = [sys.executable, str(SCRIPTED_RUNNER), str(script.folder)]
            settings["ORTHOKV_RUNNER_COMMAND"] = json.dumps(command)
        return settings

    def body(self, rng: Any) -> dict[str, Any]:
        """A request that differs from others."""
        if self.plan.real:
            return {**REAL_BODY, "method": {"steps": 10, "refine_steps": 5}, "seed": rng.randrange(100)}
        return job_body(seed=rng.randrange(1000), priority=rng.randrange(-2, 3))

    def _make_disk(self) -> None:
        disk = self.folder / "disk"
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(disk)]
        if os.getuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
            self.left_out["disk_full"] = "needs root, to mount a small disk"
            return
        self._stack.callback(subprocess.run, ["umount", "-l", str(disk)], check=True)
        self.disk = disk

    def _make_clock(self) -> None:
        self.clock = make_clock(self.folder)
        self._faked = {} if self.clock is None else self.clock.environment
        if self.clock is None:
            self.left_out["clock_step"] = "needs a C compiler"

    def _start(self, slot: Slot) -> None:
        # Under Postgres one worker alone has a clock that steps; the others go by the true one.
        faked = self._faked if self.plan.database == "sqlite" or slot.number == 0 else {}
        environment = {**self.environment, **faked}
        folder = (self.disk or self.folder) / slot.name
        log = folder / "log"
        slot.log_start = len(log.read_text()) if log.exists() else 0
        slot.worker = Worker(folder, environment)

    def _keep(self) -> None:
        """The process manager: what has died is started again, as systemd or Kubernetes would."""
        while not self._closing.wait(0.2):
            with self.guard:
                if self._closing.is_set():
                    return
                if self.api.process.poll() is not None:
                    if self._api_up and self.api.process.returncode != -9:
                        self.deaths.append(f"api ended with {self.api.process.returncode}: {self.api.log()}")
                    self._try_api()
                for slot in self.slots:
                    worker = slot.worker
                    if worker is not None and worker.process.poll() is not None:
                        self._note_end(slot, worker)
                        slot.worker = None
                    if slot.worker is None and time.monotonic() > slot.held_until:
                        with contextlib.suppress(OSError):  # the disk is full
                            self._start(slot)

    def _note_end(self, slot: Slot, worker: Worker) -> None:
        if worker.process.returncode == -9:
            return
        life = worker.log_file.read_text()[slot.log_start :]
        if "worker.started" in life:
            self.deaths.append(f"{slot.name} ended with {worker.process.returncode}: {life[-1500:]}")
        else:
            self.refused_starts += 1

    def _try_api(self) -> None:
        try:
            self.api.start()
            self._api_up = True
        except AssertionError:  # its database is away; the next round tries again
            self._api_up = False
            self.refused_starts += 1

    def heal(self) -> None:
        """Everything as it ought to be; workers are still at work."""
        if self.clock is not None:
            self.clock.set(0)
        if self.proxy is not None:
            self.proxy.set("pass")
        if self.disk is not None:
            (self.disk / "filler").unlink(missing_ok=True)
        if self.redis is not None and not self.redis.answers():
            self.redis.start()
        if self.postgres is not None:
            with contextlib.suppress(psycopg.Error), psycopg.connect(self.postgres.conninfo):
                return
            self.postgres.restart()

    def stop(self) -> None:
        """End workers and API; database and store stay."""
        self._stop_processes()

    def _stop_processes(self) -> None:
        self._closing.set()
        with self.guard:
            for slot in self.slots:
                if slot.worker is not None and slot.worker.process.poll() is None:
                    slot.worker.stop()
            if self.api.process.poll() is None:
                self.api.stop()

    def child_of(self, slot: Slot) -> psutil.Process | None:
        """The runner of a worker, if one runs."""
        if slot.worker is None:
            return None
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process(slot.worker.process.pid).children():
                return process
        return None
