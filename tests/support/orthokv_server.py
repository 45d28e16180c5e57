"""A real `orthokv serve` in processes of its own, for tests that talk to it and tests that kill it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx2
import psutil

from tests.support.paths import REPOSITORY

PATIENCE_SECONDS = 240.0
_ANNOUNCEMENT = "OrthoKV listening on "


class Server:
    """A server of one data folder: started, killed, started again."""

    def __init__(self, data: Path, environment: Mapping[str, str]) -> None:
        self.data = data
        self._environment = {**os.environ, **environment}
        self._process: subprocess.Popen[str] | None = None
        self.log_file = data.parent / f"{data.name}.log"
        self.url = ""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _command(self) -> list[str]:
        return [_SERVE, "--data", str(self.data)]

    @property
    def process(self) -> subprocess.Popen[str]:
        assert self._process is not None, "start the server first"
        return self._process

    def start(self) -> None:
        """Start and wait for the announcement of the URL."""
        with self.log_file.open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", *self._command(), "--port", "0"],
                env=self._environment,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=REPOSITORY,
            )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line.startswith(_ANNOUNCEMENT), f"no announcement:\n{self.log()}"
        self.url = line.removeprefix(_ANNOUNCEMENT).strip()

    def kill(self) -> None:
        """`kill -9` the server. Its worker and the worker's child die with it."""
        family = self.family()
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        _, alive = psutil.wait_procs(family, timeout=PATIENCE_SECONDS)
        assert not alive, f"these outlived the server: {alive}"

    def stop(self) -> int:
        """SIGTERM; returns the exit status."""
        self.process.terminate()
        return self.process.wait(PATIENCE_SECONDS)

    def family(self) -> list[psutil.Process]:
        family: list[psutil.Process] = psutil.Process(self.process.pid).children(recursive=True)
        return family

    def runner(self) -> psutil.Process | None:
        """The child that does the numerics, if one runs: the worker's child, with a command of its own."""
        for process in self.family():
            try:
                if any("runner" in part for part in process.cmdline()):
                    return process
            except psutil.Error:
                continue
        return None

    @property
    def headers(self) -> dict[str, str]:
        """With the owner's token, as it is since the last start."""
        folder = Path(self._environment.get("ORTHOKV_DATA_DIR", self.data))
        return {"Authorization": f"Bearer {(folder / 'token').read_text().strip()}"}

    def get(self, path: str, **query: Any) -> dict[str, Any]:
        response = httpx2.get(self.url + path, params=query, headers=self.headers, timeout=60)
        response.raise_for_status()
        body: dict[str, Any] = response.json()
        return body

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        response = httpx2.post(self.url + path, json=body, headers=self.headers, timeout=60)
        response.raise_for_status()
        answer: dict[str, Any] = response.json()
        return answer

    def job(self, job_id: str) -> dict[str, Any]:
        return self.get(f"/v1/jobs/{job_id}")

    def wait_for_end(self, job_id: str) -> dict[str, Any]:
        def ended() -> dict[str, Any] | None:
            job = self.job(job_id)
            return job if job["status"] in ("succeeded", "failed", "cancelled") else None

        job: dict[str, Any] = until(ended, f"job {job_id} ends")
        assert job["status"] == "succeeded", f"{job['error']}\n{self.log()}"
        return job

    def layers(self, job_id: str) -> list[int]:
        return [layer["layer"] for layer in self.get(f"/v1/jobs/{job_id}/layers")["data"]]

    def log(self) -> str:
        return self.log_file.read_text()[-20_000:]


def until(condition: Callable[[], Any], what: str) -> Any:
    """The first true value of a condition that another process brings about."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (value := condition()):
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.02)
    return value


# What the entry point of `orthokv serve` runs, without the library's own command line around it.
_SERVE = "import typer, app.cli; typer.run(app.cli.serve)"
