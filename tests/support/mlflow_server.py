"""A real MLflow server on SQLite, from the environment that `make test-mlflow` installs it in, and a way to break it off."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2

PATIENCE_SECONDS = 180.0


def _command() -> str:
    given = os.environ.get("ORTHOKV_TEST_MLFLOW", str(Path(sys.prefix) / "mlflow-server" / "bin" / "mlflow"))
    found = shutil.which(given)
    assert found is not None, f"no MLflow server at {given}: run `make test-mlflow`"
    return found


@contextmanager
def mlflow_url() -> Iterator[str]:
    """URL of a server of its own with an empty store."""
    with tempfile.TemporaryDirectory(prefix="orthokv-mlflow-") as name, socket.socket() as taken:
        folder = Path(name)
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        taken.close()
        url = f"http://127.0.0.1:{port}"
        options = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
        options += ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
        options += ["--default-artifact-root", str(folder / "artifacts"), "--no-serve-artifacts"]
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(
                [_command(), "server", *options],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"},
                start_new_session=True,
            )
        try:
            _wait(url, process, folder / "log")
            yield url
        finally:
            os.killpg(process.pid, 15)
            process.wait(30)


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            if httpx2.get(f"{url}/health", timeout=5).is_success:
                return
        except httpx2.TransportError:
            pass
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-5000:]  # noqa: PT018
        time.sleep(0.1)


class Tracking:
    """What a server shows, by its own HTTP API."""

    def __init__(self, url: str) -> None:
        self.url = url

    def call(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        address = f"{self.url}/api/2.0/mlflow/{path}"
        answer = (
            httpx2.get(address, timeout=60) if body is None else httpx2.post(address, json=body, timeout=60)
        )
        assert answer.is_success, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def runs(self, experiment: str) -> dict[str, dict[str, Any]]:
        """Active runs by their job's id; one job with two runs is an error."""
        found = self.all_runs(experiment)
        runs = {tags(run["data"])["orthokv.job_id"]: run for run in found}
        assert len(runs) == len(found), "a job has two runs"
        return runs

    def all_runs(self, experiment: str, view: str = "ACTIVE_ONLY") -> list[dict[str, Any]]:
        shown = self.call(f"experiments/get-by-name?experiment_name={experiment}")["experiment"]
        query = {"experiment_ids": [shown["experiment_id"]], "run_view_type": view, "max_results": 1000}
        found: list[dict[str, Any]] = self.call("runs/search", query).get("runs", [])
        return found

    def history(self, run_id: str, key: str) -> list[tuple[int, float]]:
        """(step, value) of a metric, in the order of steps."""
        found = self.call(f"metrics/get-history?run_id={run_id}&metric_key={key}")["metrics"]
        return sorted((int(m.get("step", 0)), m["value"]) for m in found)

    def versions(self, name: str) -> list[dict[str, Any]]:
        found = self.call(f"model-versions/search?filter=name%3D%27{name}%27").get("model_versions", [])
        return sorted(found, key=lambda version: int(version["version"]))

    def alias(self, name: str) -> dict[str, str]:
        model = self.call(f"registered-models/get?name={name}")["registered_model"]
        return {alias["alias"]: alias["version"] for alias in model.get("aliases", [])}


def tags(data: dict[str, Any]) -> dict[str, str]:
    return {tag["key"]: tag["value"] for tag in data.get("tags", [])}


class Cut:
    """Stands before a server: passes on so many requests that change something, then nothing more.

    The last of them is done, but its answer is lost.
    """

    def __init__(self, url: str, changes: int) -> None:
        self.changes, self._target, self._lock = changes, url, threading.Lock()
        self.broke = False

    @contextmanager
    def serving(self) -> Iterator[str]:
        cut = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._pass_on()

            def do_POST(self) -> None:
                self._pass_on()

            do_PATCH = do_DELETE = do_POST

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def _pass_on(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                reads = self.command == "GET" or self.path.endswith(("search", "search-with-datasets"))
                with cut._lock:
                    if cut.changes < 1:
                        cut.broke = True
                        self.close_connection = True
                        return
                    cut.changes -= not reads
                    lost = cut.changes < 1 and not reads
                    cut.broke |= lost
                answer = httpx2.request(
                    self.command,
                    cut._target + self.path,
                    content=body,
                    headers={"Content-Type": "application/json"},
                    timeout=60,
                )
                if lost:
                    self.close_connection = True
                    return
                self.send_response(answer.status_code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer.content)))
                self.end_headers()
                self.wfile.write(answer.content)

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            thread = threading.Thread(
                target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
            )
            thread.start()
            try:
                yield f"http://127.0.0.1:{server.server_port}"
            finally:
                server.shutdown()
                thread.join()
