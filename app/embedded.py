"""The embedded service.

API, worker, database and objects of one data folder, started and stopped together.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import structlog
from pydantic import SecretStr

from app.auth.exposure import require_key
from app.infra import tracing
from app.infra.ids import new_id
from app.infra.logs import configure
from app.infra.private import make_private
from app.infra.sealing import own_key
from app.metrics.port import api_metrics
from app.migrate import upgrade
from app.server import bound, leave_on_signals, serve_admitted
from app.settings import Settings, split_keys

log = structlog.get_logger(__name__)

_LOCK_PATIENCE_SECONDS = 5.0
_STOP_PATIENCE_SECONDS = 10.0
_RESTART_SECONDS = 1.0


class FolderInUse(Exception):
    """Another server has this data folder."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Hold the folder's lock; gives its descriptor. Raises `FolderInUse`.

    The worker inherits the descriptor, so the lock lasts until both are gone: whoever has it knows that no
    process of an earlier server still writes here.
    """
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        # The worker of a killed server dies with it, but not in the same instant.
        deadline = time.monotonic() + _LOCK_PATIENCE_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise FolderInUse(f"another OrthoKV server uses {folder}") from error
                time.sleep(0.05)
        yield descriptor
    finally:
        os.close(descriptor)


class EmbeddedWorker:
    """A supervisor process that is started again whenever it dies, and dies when this process does.

    A process of its own: what kills a worker (memory, above all) leaves the API up to say so, and the worker
    stops by the same signal, and resumes by the same way, as any other worker.
    """

    def __init__(self, settings: Settings, *, lock: int) -> None:
        self._lock = lock
        self._patience = settings.drain_seconds + _STOP_PATIENCE_SECONDS
        self._environment = {
            **os.environ,
            **_environment(settings),
            "ORTHOKV_WORKER_NAME": _worker_name(settings),
        }
        self._stop = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        # All starts happen in this one thread: "dies with its parent" means with the thread that started it.
        self._thread = threading.Thread(target=self._keep_running, name="worker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Let the worker drain, then end it."""
        self._stop.set()
        process = self._process
        if process is not None:
            process.terminate()
            try:
                process.wait(self._patience)
            except subprocess.TimeoutExpired:
                process.kill()
        self._thread.join()

    def _keep_running(self) -> None:
        while not self._stop.is_set():
            self._process = self._spawn()
            if self._stop.is_set():
                self._process.terminate()
            status = self._process.wait()
            if not self._stop.is_set():
                log.error("worker.died", status=status, restart_in_seconds=_RESTART_SECONDS)
                self._stop.wait(_RESTART_SECONDS)

    def _spawn(self) -> subprocess.Popen[bytes]:
        # Modules come from where Python is installed, never from the folder in which the server was started.
        module = (sys.executable, "-P", "-m")
        return subprocess.Popen(
            [*module, "workers.tether", str(os.getpid()), "", *module, "workers.supervisor"],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            pass_fds=(self._lock,),
            start_new_session=True,  # Ctrl-C in the terminal is for the server, which then drains the worker
        )


def run(
    settings: Settings, *, host: str, port: int, worker: bool, announce: Callable[[str, Settings], None]
) -> None:
    """Serve until SIGINT or SIGTERM. Raises `FolderInUse`, `Exposed` and `OSError` (the port is taken)."""
    configure()
    tracing.configure("orthokv-api")
    make_private(settings)
    with locked(settings.data_dir) as lock, bound(host, port) as listening, api_metrics(settings):
        upgrade(settings.resolved_database_url)
        require_key(settings, host)
        if not split_keys(settings.secret_keys):
            settings = settings.model_copy(update={"secret_keys": SecretStr(own_key(settings.data_dir))})
        leave_on_signals()  # the worker is still to be drained then
        embedded = EmbeddedWorker(settings, lock=lock) if worker else None
        if embedded is not None:
            embedded.start()
        try:
            serve_admitted(settings, listening, host=host, announce=announce)
        finally:
            if embedded is not None:
                embedded.stop()


def _environment(settings: Settings) -> dict[str, str]:
    """What the server was told other than by environment variables."""
    return {"ORTHOKV_DATA_DIR": str(settings.data_dir.resolve())}


def _worker_name(settings: Settings) -> str:
    """The folder's own worker name: kept in it, since another folder may share the same database."""
    file = settings.data_dir / "worker-name"
    if not file.exists():
        file.write_text(new_id("wk"))
    return file.read_text()
