"""A fleet in processes of their own: one API and any number of workers, on one database and object store."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.orthokv_server import PATIENCE_SECONDS, Server
from tests.support.paths import REPOSITORY

# What the entry points run, without the library's own command line around them.
_API = "import typer, app.cli; typer.run(app.cli.api)"
_WORKER = "import typer, workers.cli; typer.run(workers.cli.worker)"


class Api(Server):
    """`orthokv api`."""

    def _command(self) -> list[str]:
        return [_API]


class Worker:
    """`orthokv worker`. Its data folder is its own, as on a machine of its own."""

    def __init__(self, folder: Path, environment: Mapping[str, str], *arguments: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log_file = folder / "log"
        with self.log_file.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _WORKER, *arguments],
                env={
                    **os.environ,
                    **environment,
                    "ORTHOKV_DATA_DIR": str(folder / "data"),
                    "ORTHOKV_WORKER_NAME": folder.name,
                },
                stdout=log,
                stderr=log,
                cwd=REPOSITORY,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.stop()

    def stop(self) -> int:
        """SIGTERM; returns the exit status."""
        self.process.terminate()
        return self.process.wait(PATIENCE_SECONDS)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(PATIENCE_SECONDS)

    def log(self) -> str:
        return self.log_file.read_text()[-20_000:]
