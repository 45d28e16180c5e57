"""`kill -9` at every named place of `app/infra/failpoints.py`: what was acknowledged ends once, the checker finds nothing."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest

from app.checker.checks import check
from app.deletion.orphans import sweep_orphans
from app.infra import failpoints
from app.infra.database import SyncDatabase
from app.infra.storage import Storage
from app.migrate import upgrade
from tests.support.factories import Script, job_body
from tests.support.fleet import Api, Worker
from tests.support.orthokv_server import until
from tests.support.paths import SCRIPTED_RUNNER
from tests.support.postgres import postgres_url

pytestmark = pytest.mark.crash

NO_AGE = timedelta(seconds=-5)


@pytest.fixture(scope="module")
def fleet(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """The environment of every process: short leases, a reaper that does not let itself be waited for."""
    folder = tmp_path_factory.mktemp("failpoints")
    with ExitStack() as stack:
        url = f"sqlite:///{folder / 'test.db'}"
        if request.param == "postgres":
            url = stack.enter_context(postgres_url())
        upgrade(url)
        script = Script(folder / "script")
        yield {
            "ORTHOKV_DATABASE_URL": url,
            "ORTHOKV_STORAGE_URL": (folder / "objects").as_uri(),
            "ORTHOKV_RUNNER_COMMAND": json.dumps([sys.executable, str(SCRIPTED_RUNNER), str(script.folder)]),
            "ORTHOKV_RUNNER_ENVIRONMENT": '["ORTHOKV_FAILPOINT", "ORTHOKV_FAILPOINT_DIR"]',
            "ORTHOKV_LEASE_SECONDS": "2",
            "ORTHOKV_HEARTBEAT_SECONDS": "0.3",
            "ORTHOKV_REAPER_SECONDS": "0.2",
            "ORTHOKV_IDLE_POLL_SECONDS": "0.05",
            "ORTHOKV_RETRY_BACKOFF_SECONDS": "0.05",
            "ORTHOKV_DRAIN_SECONDS": "0",
            "ORTHOKV_AUTH_REQUIRED": "false",  # keys have tests of their own
        }


@pytest.fixture(scope="module")
def api(fleet: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    folder = tmp_path_factory.mktemp("api") / "api"
    with Api(folder, {**fleet, "ORTHOKV_DATA_DIR": str(folder)}) as api:
        yield api


def armed(fleet: dict[str, str], folder: Path, name: str, nth: int = 1) -> dict[str, str]:
    folder.mkdir(exist_ok=True)
    return {
        **fleet,
        "ORTHOKV_FAILPOINT": f"{name}:kill:{nth}",
        "ORTHOKV_FAILPOINT_DIR": str(folder),
    }


def assert_sound(fleet: dict[str, str], jobs: int) -> None:
    """No violation, and nothing orphaned after a sweep."""
    database, storage = SyncDatabase(fleet["ORTHOKV_DATABASE_URL"]), Storage(fleet["ORTHOKV_STORAGE_URL"])
    sweep_orphans(database, storage, age=NO_AGE)
    report = check(database, storage, orphan_age=NO_AGE)
    database.close()
    assert report.violations == []
    assert report.jobs >= jobs


# Each place on one of the databases: `make test-crash` is to last minutes.
@pytest.mark.parametrize(
    ("fleet", "name", "nth"),
    [
        *(("postgres", name, 1) for name in failpoints.WORKER),
        *(("sqlite", name, nth) for name in failpoints.TRANSITION for nth in (1, 2)),
    ],
    indirect=["fleet"],
)
def test_a_kill_of_a_worker(api: Api, fleet: dict[str, str], tmp_path: Path, name: str, nth: int) -> None:
    kill_and_resume(api, fleet, tmp_path, name, nth)


@pytest.mark.parametrize("fleet", ["sqlite"], indirect=True)
@pytest.mark.parametrize("name", failpoints.CHILD)
def test_a_kill_of_a_child(api: Api, fleet: dict[str, str], tmp_path: Path, name: str) -> None:
    kill_and_resume(api, fleet, tmp_path, name, 1)


def kill_and_resume(api: Api, fleet: dict[str, str], tmp_path: Path, name: str, nth: int) -> None:
    fired = tmp_path / "fired"
    with ExitStack() as stack:
        worker = stack.enter_context(Worker(tmp_path / "worker", armed(fleet, fired, name, nth)))
        job_id = api.post("/v1/jobs", job_body())["id"]
        until((fired / name).exists, f"{name} is reached")
        if name not in failpoints.CHILD:
            assert worker.process.wait(60) == -9
            stack.enter_context(Worker(tmp_path / "worker", fleet))
        job = api.wait_for_end(job_id)
    assert {step["status"] for step in job["steps"]} == {"succeeded"}
    assert_sound(fleet, jobs=1)


class Client:
    """Repeats what was not answered, with the same key, until it is; starts the API again when it died."""

    def __init__(self, api: Api, again: Callable[[], Api]) -> None:
        self.api = api
        self._again = again

    def send(self, method: str, path: str, **content: Any) -> httpx2.Response:
        once = {"Idempotency-Key": uuid.uuid4().hex} if method == "POST" else {}
        while True:
            try:
                response = httpx2.request(
                    method, self.api.url + path, headers={**once, **self.api.headers}, timeout=60, **content
                )
                response.raise_for_status()
            except httpx2.TransportError:
                assert self.api.process.wait(60) == -9
                self.api = self._again()
            else:
                return response

    def upload(self, text: bytes, *, times: int) -> str:
        dataset: str = self.send("POST", "/v1/datasets", json={"filename": "a.txt"}).json()["id"]
        for _ in range(times):
            self.send("PUT", f"/v1/datasets/{dataset}/content", content=text)
        digest = hashlib.sha256(text).hexdigest()
        self.send("POST", f"/v1/datasets/{dataset}/complete", json={"sha256": digest})
        return dataset


def plant_orphan(fleet: dict[str, str]) -> None:
    """An object that no row refers to, older than what may still get one."""
    path = Path(urlsplit(fleet["ORTHOKV_STORAGE_URL"]).path, "datasets", "ds_gone", "up_gone")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"orphan")
    os.utime(path, (0, 0))


@pytest.mark.parametrize("fleet", ["postgres"], indirect=True)
@pytest.mark.parametrize("name", [*failpoints.API, "transition.recorded"])
def test_a_kill_of_the_api(fleet: dict[str, str], tmp_path: Path, name: str) -> None:
    fired = tmp_path / "fired"
    data = {"ORTHOKV_DATA_DIR": str(tmp_path / "api")}
    if name == "reaper.orphans":
        plant_orphan(fleet)
        data["ORTHOKV_ORPHAN_SWEEP_SECONDS"] = "0.2"
    with ExitStack() as stack:

        def start(environment: dict[str, str]) -> Api:
            return stack.enter_context(Api(tmp_path / "api", {**environment, **data}))

        first = start(armed(fleet, fired, name))
        client = Client(first, lambda: start(fleet))
        dataset = client.upload(b"calibration text", times=2)
        body = job_body(dataset={"id": dataset, "num_samples": 4, "sequence_length": 64})
        answers = [client.send("POST", "/v1/jobs", json=body).json()["id"] for _ in range(2)]
        cancelled, kept = answers
        client.send("POST", f"/v1/jobs/{cancelled}/cancel")
        if name == "reaper.returning":
            lost = stack.enter_context(
                Worker(tmp_path / "lost", armed(fleet, tmp_path / "lost-fired", "claim.committed"))
            )
            assert lost.process.wait(60) == -9
        until((fired / name).exists, f"{name} is reached")
        assert first.process.wait(60) == -9
        if client.api is first:  # nobody asked it anything since
            client.api = start(fleet)
        stack.enter_context(Worker(tmp_path / "worker", fleet))
        client.api.wait_for_end(kept)
        assert client.api.job(cancelled)["status"] == "cancelled"
    assert_sound(fleet, jobs=2)


def test_every_failpoint_is_killed_at() -> None:
    assert {*failpoints.CHILD, *failpoints.WORKER, *failpoints.API, *failpoints.TRANSITION} == set(
        failpoints.NAMES
    )


@pytest.mark.parametrize("fleet", ["sqlite"], indirect=True)
def test_a_failpoint_without_its_folder_has_no_effect(
    api: Api, fleet: dict[str, str], tmp_path: Path
) -> None:
    environment = {**fleet, "ORTHOKV_FAILPOINT": "claim.committed:kill"}
    with Worker(tmp_path / "worker", environment) as worker:
        api.wait_for_end(api.post("/v1/jobs", job_body())["id"])
        assert worker.process.poll() is None
