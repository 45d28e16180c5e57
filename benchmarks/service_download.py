"""How fast the API hands out a large artifact, beside nginx with sendfile on the same file in the same run.

    python -m benchmarks.service_download [--bytes 2147483648] [--rounds 7] [--nginx PATH] [--out FILE]

Loopback only. The API is `orthokv serve` as users start it, nginx has one worker process as the API has one. Rounds alternate
between the two, since the machine may have other work; speeds are medians, and the ratio is the median of the ratios of rounds
beside each other. Exit code 1 when a gate is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
from sqlalchemy.orm import Session

from app.artifacts.models import Artifact
from app.infra.database import SyncDatabase
from app.infra.keys import generate_token
from app.jobs import service
from app.jobs.commits import Produced, finish_step
from app.jobs.lease import claim
from app.jobs.schemas import JobCreate
from app.migrate import upgrade
from app.principal import local_principal
from app.settings import DEFAULT_GPU_CLASS, Settings

TOKEN = generate_token()
CONNECTIONS = (1, 8, 32)
MIN_SHARE = 0.8
MAX_GROWTH_BYTES = 50 << 20
CHUNK_BYTES = 4 << 20
RESULT = Path("benchmarks/results/service-download.json")

NGINX = """
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log stderr warn;
events {{ worker_connections 256; }}
http {{
  access_log off; sendfile on; tcp_nopush on; default_type application/octet-stream;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  server {{ listen 127.0.0.1:{port}; location / {{ root {root}; }} }}
}}
"""


def make_artifact(data: Path, size: int) -> tuple[str, Path]:
    """A data folder whose database knows one large file; its id and its path."""
    settings = Settings(data_dir=data)
    data.mkdir()
    upgrade(settings.resolved_database_url)
    database = SyncDatabase(settings.resolved_database_url)
    body = JobCreate.model_validate(
        {
            "model": {"id": "org/model"},
            "dataset": {"source": "self"},
            "budget": {"metric": "kept", "value": 0.5},
        }
    )
    database.write(service.create, body=body, principal=local_principal(), settings=settings)

    def run(files: list[Produced], result: dict[str, Any]) -> None:
        def work(session: Session) -> None:
            lease = claim(
                session,
                owner="benchmark",
                lease_seconds=60,
                max_running_steps=None,
                gpu_classes=[DEFAULT_GPU_CLASS],
            )
            assert lease is not None
            finish_step(session, lease, files=files, data=result, layers_per_fit_step=None)

        database.write(work)

    key = "jobs/benchmark/blocks.safetensors"
    path = data / "objects" / key
    path.parent.mkdir(parents=True)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for left in range(size, 0, -CHUNK_BYTES):
            chunk = os.urandom(min(CHUNK_BYTES, left))
            digest.update(chunk)
            file.write(chunk)
    run([], {"model": {"id": "org/model", "revision": "r", "digest": "d"}, "geometry": {"layers": 1}})
    large = Produced("blocks.safetensors", key, size, digest.hexdigest(), "application/octet-stream")
    run([large], {"dataset": {"digest": "d"}})
    artifact_id = database.read(lambda session: session.query(Artifact).one().id)
    database.close()
    return artifact_id, path


@contextlib.contextmanager
def api(data: Path) -> Iterator[tuple[str, int]]:
    """The product's own server; its URL and process id."""
    command = [
        sys.executable,
        "-m",
        "orthokv.cli",
        "serve",
        "--data",
        str(data),
        "--port",
        "0",
        "--no-worker",
    ]
    environment = {**os.environ, "ORTHOKV_TOKEN": TOKEN}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if "listening on " not in line:
                sys.exit("the API did not start")
            yield line.rsplit(" ", 1)[1].strip(), process.pid
        finally:
            process.terminate()


@contextlib.contextmanager
def nginx(program: str, root: Path, folder: Path) -> Iterator[tuple[str, int]]:
    """nginx on the same file; its URL and process id."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir()
    config = folder / "nginx.conf"
    user = "user root;" if os.geteuid() == 0 else ""
    config.write_text(user + NGINX.format(folder=folder, port=port, root=root))
    with subprocess.Popen([program, "-c", str(config), "-p", str(folder)]) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            for _ in range(100):
                try:
                    httpx2.get(url)
                    break
                except httpx2.TransportError:
                    time.sleep(0.05)
            else:
                sys.exit("nginx did not start")
            yield url, process.pid
        finally:
            process.terminate()


def timed(url: str, size: int, connections: int) -> float:
    """Bytes a second, read by a process of its own."""
    command = [sys.executable, "-m", "benchmarks.range_reader", url, str(size), str(connections)]
    environment = {**os.environ, "ORTHOKV_TOKEN": TOKEN}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(f"reading {url} failed: {done.stderr}")
    return size / float(done.stdout)


def cpu_seconds(pid: int) -> float:
    """What a server's processes have spent so far."""
    process = psutil.Process(pid)
    return sum(sum(one.cpu_times()[:2]) for one in (process, *process.children()))


class Watch:
    """The largest resident memory of a process, and its slowest `/livez`, while a block runs."""

    def __init__(self, url: str, pid: int) -> None:
        self._url, self._process = url, psutil.Process(pid)
        self.peak_bytes, self.slowest_seconds = 0, 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        with httpx2.Client(timeout=60) as client:
            while not self._stop.wait(0.02):
                began = time.perf_counter()
                client.get(f"{self._url}/livez")
                self.slowest_seconds = max(self.slowest_seconds, time.perf_counter() - began)
                self.peak_bytes = max(self.peak_bytes, self._process.memory_info().rss)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def machine() -> dict[str, Any]:
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def measure(size: int, rounds: int, program: str, folder: Path) -> dict[str, Any]:
    artifact_id, path = make_artifact(folder / "data", size)
    with (
        api(folder / "data") as (url, pid),
        nginx(program, path.parent, folder / "nginx") as (other, nginx_pid),
    ):
        ours, theirs = f"{url}/v1/artifacts/{artifact_id}/content", f"{other}/{path.name}"
        for warm in (ours, theirs):
            timed(warm, min(size, 64 << 20), 1)
        before = psutil.Process(pid).memory_info().rss
        rows: list[dict[str, Any]] = []
        for connections in CONNECTIONS:
            speeds: dict[str, list[float]] = {ours: [], theirs: []}
            spent: dict[str, list[float]] = {ours: [], theirs: []}
            for number in range(rounds):
                for target in (ours, theirs) if number % 2 else (theirs, ours):
                    server = pid if target == ours else nginx_pid
                    began = cpu_seconds(server)
                    speeds[target].append(timed(target, size, connections))
                    spent[target].append((cpu_seconds(server) - began) / (size / 2**30))
            # Apart from the timed rounds: who watches takes time from the two cores.
            with Watch(url, pid) as watch:
                timed(ours, size, connections)
            peak, slowest = watch.peak_bytes, watch.slowest_seconds
            api_speed, nginx_speed = (statistics.median(speeds[target]) for target in (ours, theirs))
            ratios = [mine / its for mine, its in zip(speeds[ours], speeds[theirs], strict=True)]
            rows.append(
                {
                    "connections": connections,
                    "api_mb_per_second": round(api_speed / 1e6),
                    "nginx_mb_per_second": round(nginx_speed / 1e6),
                    "ratio_of_medians": round(api_speed / nginx_speed, 3),
                    "median_of_ratios": round(statistics.median(ratios), 3),
                    "api_cpu_seconds_per_gib": round(statistics.median(spent[ours]), 3),
                    "nginx_cpu_seconds_per_gib": round(statistics.median(spent[theirs]), 3),
                    "memory_growth_mib": round((peak - before) / 2**20, 1),
                    "slowest_livez_ms": round(1000 * slowest, 1),
                }
            )
            sys.stderr.write(f"{json.dumps(rows[-1])}\n")
        grown = (psutil.Process(pid).memory_info().rss - before) / 2**20
    return {
        "bytes": size,
        "rounds": rounds,
        "load_average": round(os.getloadavg()[0], 1),
        "memory_before_mib": round(before / 2**20, 1),
        "memory_left_mib": round(grown, 1),
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bytes", type=int, default=2 << 30)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--nginx", default=shutil.which("nginx") or "/usr/sbin/nginx", help="the program")
    parser.add_argument("--out", type=Path, default=RESULT)
    asked = parser.parse_args()
    if not Path(asked.nginx).is_file():
        sys.exit(f"{asked.nginx} is not there: apt-get install nginx-light, or --nginx PATH")
    version = subprocess.run([asked.nginx, "-v"], capture_output=True, text=True, check=True).stderr.strip()
    with tempfile.TemporaryDirectory(prefix="orthokv-download-") as folder:
        found = measure(asked.bytes, asked.rounds, asked.nginx, Path(folder))
    rows = found["rows"]
    gates = {
        "share_of_nginx": min(row["median_of_ratios"] for row in rows),
        "share_of_nginx_at_least": MIN_SHARE,
        "memory_growth_mib": max(row["memory_growth_mib"] for row in rows),
        "memory_growth_mib_below": MAX_GROWTH_BYTES >> 20,
    }
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    document = {"machine": machine(), "nginx": version, **found, "gates": gates}
    asked.out.write_text(json.dumps(document, indent=2) + "\n")
    print(
        "connections  API MB/s  nginx MB/s  ratio  CPU s/GiB: API  nginx  memory growth MiB  slowest /livez ms"
    )
    for row in rows:
        print(
            f"{row['connections']:>11}  {row['api_mb_per_second']:>8}  {row['nginx_mb_per_second']:>10}  "
            f"{row['median_of_ratios']:>5}  {row['api_cpu_seconds_per_gib']:>14}  "
            f"{row['nginx_cpu_seconds_per_gib']:>5}  {row['memory_growth_mib']:>17}  {row['slowest_livez_ms']:>17}"
        )
    missed = gates["share_of_nginx"] < MIN_SHARE or gates["memory_growth_mib"] >= MAX_GROWTH_BYTES >> 20
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
