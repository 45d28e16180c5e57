"""What is deleted is gone at once for clients, and its bytes with the next sweep; what is needed cannot be deleted."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import threading
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select, text, update
from typer.testing import CliRunner

from app.artifacts.models import Artifact
from app.datasets.models import Dataset
from app.deletion.orphans import sweep_orphans
from app.deletion.sweeps import expire_jobs, forget_uploads, free_bytes
from app.infra.database import SyncDatabase, now
from app.infra.garbage import Garbage
from app.infra.storage import Storage, StorageError, open_storage
from app.jobs.lease import Failure, fail
from app.jobs.models import Job
from app.jobs.vocabulary import JobErrorCode, StepName
from app.main import create_app
from app.models import metadata
from app.principal import DEFAULT_PROJECT_ID
from app.projects.cli import projects
from app.projects.schemas import Limits
from app.projects.service import set_limits
from app.reaper import Reaper
from app.settings import Settings
from tests.support.factories import (
    POLICY,
    advance,
    complete,
    finish,
    job_body,
    must_claim,
    queue_job,
    read_job,
)
from tests.support.s3 import Bucket
from tests.support.tenants import ALL, OWNER, bearer, local_principal, new_key, new_project, principal_of

ALL_AGES = timedelta(seconds=-5)
DAY = 86_400.0


@pytest.fixture(params=["folder", "bucket"])
def settings(request: pytest.FixtureRequest, settings: Settings) -> Settings:
    """The object store as a folder and as a bucket."""
    if request.param == "folder":
        return settings
    bucket: Bucket = request.getfixturevalue("bucket")
    options = {"storage_url": bucket.url, "storage_options": bucket.options}
    return Settings.model_validate({**settings.model_dump(), **options})


@pytest.fixture
def storage(settings: Settings) -> Storage:
    return open_storage(settings)


@pytest.fixture
def stored_of(request: pytest.FixtureRequest, settings: Settings) -> Callable[[], int]:
    """Bytes of all objects, asked of the folder or the bucket itself."""
    bucket = settings.storage_url.startswith("s3://")
    if not bucket:
        folder = settings.data_dir / "objects"
        return lambda: sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    made: Bucket = request.getfixturevalue("bucket")

    def listed() -> int:
        answer = httpx2.get(f"{made.endpoint}/{made.name}?list-type=2").text
        return sum(int(part.partition("</Size>")[0]) for part in answer.split("<Size>")[1:])

    return listed


def upload(client: TestClient, content: bytes) -> str:
    made = client.post("/v1/datasets", json={"filename": "a.txt"}).json()
    client.put(made["upload"]["url"], content=content)
    digest = hashlib.sha256(content).hexdigest()
    client.post(f"/v1/datasets/{made['id']}/complete", json={"sha256": digest})
    dataset_id: str = made["id"]
    return dataset_id


def store_files(database: SyncDatabase, storage: Storage, tmp_path: Path) -> None:
    """Put the three bytes of every committed file into the store."""
    source = tmp_path / "source"
    source.write_bytes(b"abc")
    keys = database.read(lambda session: list(session.execute(select(Artifact.object_key)).scalars()))
    for key in keys:
        storage.put_file(key, source)


def succeeded(client: TestClient, database: SyncDatabase, **changes: Any) -> dict[str, Any]:
    job = client.post("/v1/jobs", json=job_body(**changes)).json()
    finish(database, advance(database, job["id"], StepName.EVALUATE))
    found: dict[str, Any] = client.get(f"/v1/jobs/{job['id']}").json()
    return found


def free(database: SyncDatabase, storage: Storage) -> int:
    return free_bytes(database, storage, age_seconds=-5)


def used(client: TestClient) -> int:
    count: int = client.get("/v1/usage").json()["stored_bytes"]["used"]
    return count


def left(database: SyncDatabase) -> dict[str, int]:
    """Rows by table, where there are any, but for the record and for what outlives all."""
    kept = {"project", "audit_event", "run_cost", "api_key"}
    names = [name for name in metadata.tables if name not in kept]

    def count(session: Any) -> dict[str, int]:
        counts = {
            name: session.execute(text(f'SELECT count(*) FROM "{name}"')).scalar_one() for name in names
        }
        return {name: number for name, number in counts.items() if number}

    return database.read(count)


def test_a_deleted_job_takes_all_that_it_made_and_the_bytes_are_freed(
    client: TestClient,
    database: SyncDatabase,
    storage: Storage,
    stored_of: Callable[[], int],
    tmp_path: Path,
) -> None:
    job = succeeded(client, database)
    store_files(database, storage, tmp_path)
    result = job["result"]
    manifest = client.get(f"/v1/checkpoints/{result['checkpoint_id']}/files").json()["data"]
    before = stored_of()
    assert before == used(client) > 0

    assert client.delete(f"/v1/jobs/{job['id']}").status_code == 204
    for path in (
        f"/v1/jobs/{job['id']}",
        f"/v1/jobs/{job['id']}/events",
        f"/v1/jobs/{job['id']}/layers",
        f"/v1/profiles/{result['profile_id']}",
        f"/v1/checkpoints/{result['checkpoint_id']}",
        f"/v1/artifacts/{manifest[0]['id']}",
        f"/v1/artifacts/{manifest[0]['id']}/content",
    ):
        assert client.get(path).status_code == 404, path
    assert client.delete(f"/v1/jobs/{job['id']}").status_code == 404
    assert used(client) == 0
    assert stored_of() == before  # a download that has begun may go on
    assert free_bytes(database, storage, age_seconds=3600) == 0

    assert free(database, storage) == before // 3
    assert stored_of() == 0
    assert left(database) == {}
    if not storage.can_sign:
        folders = [path.name for path in (tmp_path / "data" / "objects").rglob("*")]
        assert set(folders) <= {"jobs", "readiness"}


@pytest.mark.parametrize("state", ["queued", "running", "cancelling"])
def test_a_job_that_has_not_ended_is_kept(client: TestClient, database: SyncDatabase, state: str) -> None:
    job_id = queue_job(database).id
    if state != "queued":
        must_claim(database)
    if state == "cancelling":
        client.post(f"/v1/jobs/{job_id}/cancel")
    refused = client.delete(f"/v1/jobs/{job_id}")
    assert (refused.status_code, refused.json()["code"]) == (409, "conflict")
    assert refused.json()["detail"] == f"The job is {state}; cancel it first, or wait for its end."
    assert client.get(f"/v1/jobs/{job_id}").json()["status"] == state


def test_a_dataset_that_a_job_still_needs_is_kept(
    client: TestClient, database: SyncDatabase, storage: Storage, stored_of: Callable[[], int]
) -> None:
    first, second = upload(client, b"first"), upload(client, b"second text")
    body = {"id": first, "num_samples": 4, "sequence_length": 64, "also": [{"id": second}]}
    job = client.post("/v1/jobs", json=job_body(dataset=body)).json()
    for dataset_id in (first, second):
        refused = client.delete(f"/v1/datasets/{dataset_id}")
        assert refused.status_code == 409
        assert refused.json()["detail"] == "1 job has not ended and may still need this dataset."
    client.post(f"/v1/jobs/{job['id']}/cancel")
    assert client.delete(f"/v1/datasets/{first}").status_code == 204
    assert client.get(f"/v1/datasets/{first}").status_code == 404
    assert client.get(f"/v1/jobs/{job['id']}").json()["spec"]["dataset"]["id"] == first
    retried = client.post(f"/v1/jobs/{job['id']}/retry")
    assert (retried.status_code, retried.json()["detail"]) == (
        409,
        "A dataset that the job needs has been deleted.",
    )
    assert client.post("/v1/jobs", json=job_body(dataset={"id": first})).status_code == 404
    assert used(client) == len(b"second text")
    assert free(database, storage) == 1
    assert stored_of() == len(b"second text")


def test_a_profile_goes_alone_and_its_checkpoints_stay_whole(
    client: TestClient,
    database: SyncDatabase,
    storage: Storage,
    stored_of: Callable[[], int],
    tmp_path: Path,
) -> None:
    origin = succeeded(client, database)
    profile_id = origin["result"]["profile_id"]
    budget = {"budget": {"metric": "kept", "value": 0.5}}
    derived = client.post(f"/v1/profiles/{profile_id}/checkpoints", json=budget).json()
    for path in (f"/v1/profiles/{profile_id}", f"/v1/jobs/{origin['id']}"):
        refused = client.delete(path)
        assert refused.status_code == 409
        assert refused.json()["detail"] == "1 job has not ended and may still need the profile."
    complete(database, derived["id"])
    store_files(database, storage, tmp_path)
    before = stored_of()
    assert client.delete(f"/v1/profiles/{profile_id}").status_code == 204
    assert free(database, storage) == 3
    assert stored_of() == before - 9
    assert client.post(f"/v1/profiles/{profile_id}/checkpoints", json=budget).status_code == 404
    assert client.delete(f"/v1/jobs/{origin['id']}").status_code == 204
    free(database, storage)
    made = client.get(f"/v1/jobs/{derived['id']}").json()["result"]
    checkpoint = client.get(f"/v1/checkpoints/{made['checkpoint_id']}").json()
    assert checkpoint["profile_id"] == profile_id
    for file in client.get(f"{checkpoint['files_url']}").json()["data"]:
        database.write(
            lambda session: session.execute(
                update(Artifact).values(sha256=hashlib.sha256(b"abc").hexdigest())
            )
        )
        assert client.get(file["url"]).content == b"abc"


def test_a_failed_job_whose_profile_is_gone_is_not_retried(
    client: TestClient, database: SyncDatabase
) -> None:
    job = queue_job(database)
    lease = advance(database, job.id, StepName.PACKAGE)
    database.write(fail, lease, Failure(JobErrorCode.INTERNAL, "no", retryable=False), POLICY)
    result = read_job(database, job.id).result
    assert result is not None
    assert client.delete(f"/v1/profiles/{result.profile_id}").status_code == 204
    refused = client.post(f"/v1/jobs/{job.id}/retry")
    assert refused.json()["detail"] == "The profile that the job needs has been deleted."


def test_a_checkpoint_goes_with_the_files_that_were_measured_and_replaced(
    client: TestClient, database: SyncDatabase, storage: Storage, tmp_path: Path
) -> None:
    job = succeeded(client, database)
    store_files(database, storage, tmp_path)
    checkpoint_id = job["result"]["checkpoint_id"]
    assert client.delete(f"/v1/checkpoints/{checkpoint_id}").status_code == 204
    assert client.get(f"/v1/checkpoints/{checkpoint_id}").status_code == 404
    assert client.get(f"/v1/profiles/{job['result']['profile_id']}").status_code == 200
    assert free(database, storage) == 4 + 3  # of package and of evaluate
    assert client.delete(f"/v1/checkpoints/{checkpoint_id}").status_code == 404


def test_only_files_that_nothing_needs_are_deleted_one_by_one(
    client: TestClient, database: SyncDatabase, storage: Storage, tmp_path: Path
) -> None:
    job = succeeded(client, database)
    store_files(database, storage, tmp_path)
    layer = client.get(f"/v1/jobs/{job['id']}/layers").json()["data"][0]["artifact_id"]
    profile_id, checkpoint_id = job["result"]["profile_id"], job["result"]["checkpoint_id"]
    held = {
        client.get(f"/v1/profiles/{profile_id}").json()["files"]["tensors"]["id"]: profile_id,
        client.get(f"/v1/checkpoints/{checkpoint_id}/files").json()["data"][0]["id"]: checkpoint_id,
        database.read(_named, "blocks.safetensors"): profile_id,
    }
    for artifact_id, holder in held.items():
        refused = client.delete(f"/v1/artifacts/{artifact_id}")
        assert refused.status_code == 409
        assert refused.json()["detail"] == f"The file belongs to {holder}; delete that."
    assert client.delete(f"/v1/artifacts/{layer}").status_code == 204
    assert client.get(f"/v1/artifacts/{layer}").status_code == 404
    assert len(client.get(f"/v1/jobs/{job['id']}/layers").json()["data"]) == 2
    assert free(database, storage) == 1


def _named(session: Any, filename: str) -> str:
    found: str = session.execute(select(Artifact.id).where(Artifact.filename == filename)).scalar_one()
    return found


def test_a_layer_of_a_job_that_may_be_retried_is_kept(client: TestClient, database: SyncDatabase) -> None:
    job = queue_job(database)
    advance(database, job.id, StepName.PROFILE)
    client.post(f"/v1/jobs/{job.id}/cancel")
    layer = client.get(f"/v1/jobs/{job.id}/layers").json()["data"][0]["artifact_id"]
    assert client.delete(f"/v1/artifacts/{layer}").status_code == 409


def test_an_object_that_a_row_still_names_is_not_freed(
    client: TestClient, database: SyncDatabase, storage: Storage, stored_of: Callable[[], int]
) -> None:
    upload(client, b"text")

    def plant(session: Any) -> None:
        key = session.execute(select(Dataset.object_key)).scalar_one()
        session.add(Garbage(object_key=key, bytes=4))

    database.write(plant)
    assert free(database, storage) == 0
    assert stored_of() == 4
    assert left(database) == {"dataset": 1}


def test_an_upload_that_was_replaced_is_freed(
    client: TestClient, database: SyncDatabase, storage: Storage, stored_of: Callable[[], int]
) -> None:
    made = client.post("/v1/datasets", json={"filename": "a.txt"}).json()
    for content in (b"the first try", b"second"):
        client.put(made["upload"]["url"], content=content)
    assert stored_of() == 13 + 6
    assert free(database, storage) == 1
    assert stored_of() == 6


def test_a_sweep_that_dies_between_bytes_and_tombstone_is_repeated(
    client: TestClient, database: SyncDatabase, storage: Storage
) -> None:
    dataset_id = upload(client, b"text")
    key = database.read(lambda session: session.execute(select(Dataset.object_key)).scalar_one())
    client.delete(f"/v1/datasets/{dataset_id}")
    assert key is not None
    storage.delete([key])
    assert free(database, storage) == 1
    assert left(database) == {}


def set_retention(database: SyncDatabase, days: int) -> None:
    database.write(
        set_limits,
        project_id=DEFAULT_PROJECT_ID,
        limits=Limits(retention_days=days),
        principal=local_principal(),
    )


def age(database: SyncDatabase, job_id: str, days: float) -> None:
    values = {"finished_at": now(-days * DAY)}
    database.write(lambda session: session.execute(update(Job).where(Job.id == job_id).values(**values)))


def test_jobs_expire_with_their_files(
    client: TestClient,
    database: SyncDatabase,
    storage: Storage,
    stored_of: Callable[[], int],
    tmp_path: Path,
) -> None:
    old, young = succeeded(client, database), succeeded(client, database)
    store_files(database, storage, tmp_path)
    assert expire_jobs(database) == 0
    set_retention(database, 30)
    age(database, old["id"], 31)
    age(database, young["id"], 29)
    manifest = client.get(f"/v1/checkpoints/{young['result']['checkpoint_id']}/files").json()["data"]
    finished = datetime.fromisoformat(client.get(f"/v1/jobs/{young['id']}").json()["finished_at"])
    assert datetime.fromisoformat(manifest[0]["expires_at"]) == finished + timedelta(days=30)
    before = stored_of()
    assert expire_jobs(database) == 1
    assert client.get(f"/v1/jobs/{old['id']}").status_code == 404
    assert client.get(f"/v1/jobs/{young['id']}").status_code == 200
    free(database, storage)
    assert stored_of() == before // 2
    acts = client.get("/v1/audit_events", params={"action": "job.deleted"}).json()["data"]
    assert [(act["actor"], act["subject_id"]) for act in acts] == [("retention", old["id"])]


def test_an_expired_job_that_another_needs_waits_for_it(client: TestClient, database: SyncDatabase) -> None:
    origin = succeeded(client, database)
    set_retention(database, 30)
    age(database, origin["id"], 31)
    budget = {"budget": {"metric": "kept", "value": 0.5}}
    path = f"/v1/profiles/{origin['result']['profile_id']}/checkpoints"
    derived = client.post(path, json=budget).json()
    assert expire_jobs(database) == 0
    complete(database, derived["id"])
    assert expire_jobs(database) == 1


def test_without_an_end_or_a_limit_nothing_expires(client: TestClient, database: SyncDatabase) -> None:
    job = succeeded(client, database)
    running = queue_job(database)
    set_retention(database, 1)
    assert expire_jobs(database) == 0
    artifact = client.get(f"/v1/jobs/{job['id']}/layers").json()["data"][0]["artifact_id"]
    database.write(set_limits, project_id=DEFAULT_PROJECT_ID, limits=Limits(), principal=local_principal())
    assert client.get(f"/v1/artifacts/{artifact}").json()["expires_at"] is None
    age(database, job["id"], 1000)
    assert expire_jobs(database) == 0
    assert client.get(f"/v1/jobs/{running.id}").status_code == 200


def test_uploads_that_nobody_finished_are_forgotten(
    client: TestClient, database: SyncDatabase, storage: Storage, stored_of: Callable[[], int]
) -> None:
    ready = upload(client, b"ready")
    made = client.post("/v1/datasets", json={"filename": "a.txt"}).json()
    client.put(made["upload"]["url"], content=b"never confirmed")
    assert forget_uploads(database, age_seconds=DAY) == 0
    database.write(lambda session: session.execute(update(Dataset).values(created_at=now(-DAY - 1))))
    assert forget_uploads(database, age_seconds=DAY) == 1
    assert client.get(f"/v1/datasets/{made['id']}").status_code == 404
    assert client.get(f"/v1/datasets/{ready}").status_code == 200
    assert free(database, storage) == 1
    assert stored_of() == 5


def test_the_reaper_frees_what_was_deleted(
    client: TestClient,
    database: SyncDatabase,
    settings: Settings,
    storage: Storage,
    stored_of: Callable[[], int],
) -> None:
    dataset_id = upload(client, b"text")
    client.delete(f"/v1/datasets/{dataset_id}")
    api: Any = client.app
    for seconds, expected in ((300.0, 4), (0.0, 0)):
        reaper = Reaper(
            database,
            storage,
            api.state.dispatcher,
            settings.model_copy(update={"garbage_seconds": seconds}),
        )
        reaper.sweep()
        assert stored_of() == expected


def test_a_deletion_leaves_no_orphan(
    client: TestClient, database: SyncDatabase, storage: Storage, tmp_path: Path
) -> None:
    job = succeeded(client, database)
    store_files(database, storage, tmp_path)
    client.delete(f"/v1/jobs/{job['id']}")
    free(database, storage)
    assert sweep_orphans(database, storage, age=ALL_AGES) == 0


def test_deletions_are_recorded(client: TestClient, database: SyncDatabase) -> None:
    job = succeeded(client, database)
    dataset_id = upload(client, b"text")
    layer = client.get(f"/v1/jobs/{job['id']}/layers").json()["data"][0]["artifact_id"]
    subjects = {
        "artifact.deleted": ("artifacts", layer),
        "checkpoint.deleted": ("checkpoints", job["result"]["checkpoint_id"]),
        "profile.deleted": ("profiles", job["result"]["profile_id"]),
        "job.deleted": ("jobs", job["id"]),
        "dataset.deleted": ("datasets", dataset_id),
    }
    for action, (collection, subject) in subjects.items():
        assert client.delete(f"/v1/{collection}/{subject}").status_code == 204
        (act,) = client.get("/v1/audit_events", params={"action": action}).json()["data"]
        assert (act["actor"], act["subject_id"]) == ("local", subject)
        assert act["request_id"].startswith("req_")


def test_room_in_the_store_comes_back(client: TestClient, database: SyncDatabase) -> None:
    database.write(
        set_limits,
        project_id=DEFAULT_PROJECT_ID,
        limits=Limits(stored_bytes=10),
        principal=local_principal(),
    )
    first = upload(client, b"0123456789")
    assert client.post("/v1/jobs", json=job_body()).json()["code"] == "quota_exceeded"
    client.delete(f"/v1/datasets/{first}")
    assert client.post("/v1/jobs", json=job_body()).status_code == 201


def test_usage_shows_what_is_used_and_left(client: TestClient, database: SyncDatabase) -> None:
    limits = Limits(queued_jobs=5, stored_bytes=10, dataset_bytes=7, model_bytes=9, retention_days=3)
    database.write(set_limits, project_id=DEFAULT_PROJECT_ID, limits=limits, principal=local_principal())
    upload(client, b"1234")
    for _ in range(3):
        queue_job(database)
    must_claim(database)
    assert client.get("/v1/usage").json() == {
        "object": "usage",
        "project_id": DEFAULT_PROJECT_ID,
        "queued_jobs": {"used": 2, "limit": 5, "left": 3},
        "running_jobs": 1,
        "running_steps": {"used": 1, "limit": None, "left": None},
        "stored_bytes": {"used": 4, "limit": 10, "left": 6},
        "dataset_bytes": 7,
        "model_bytes": 9,
        "retention_days": 3,
    }
    other = bearer(new_key(database, new_project(database, "tenant")))
    assert client.get("/v1/usage", headers=other).json()["queued_jobs"]["used"] == 0


class TestProjects:
    def invoke(self, settings: Settings, *arguments: str) -> Any:
        environment = {"ORTHOKV_DATABASE_URL": settings.database_url}
        return CliRunner().invoke(projects, list(arguments), env=environment)

    def test_a_project_is_erased_and_nobody_elses_rows_are(
        self,
        client: TestClient,
        database: SyncDatabase,
        settings: Settings,
        storage: Storage,
        stored_of: Callable[[], int],
        tmp_path: Path,
    ) -> None:
        mine = succeeded(client, database)
        project_id = new_project(database, "tenant")
        key = new_key(database, project_id, ALL)
        client.headers.update(bearer(key))
        upload(client, b"text")
        succeeded(client, database)
        store_files(database, storage, tmp_path)
        del client.headers["Authorization"]
        both = stored_of()

        assert "tenant" in self.invoke(settings, "list").output
        refused = self.invoke(settings, "delete", "tenant")
        assert (refused.exit_code, "say --yes" in refused.output) == (2, True)
        assert self.invoke(settings, "delete", "tenant", "--yes").exit_code == 0
        assert client.get("/v1/jobs", headers=bearer(key)).status_code == 401
        assert "tenant" not in self.invoke(settings, "list").output
        free(database, storage)
        assert stored_of() == (both - 4) // 2
        assert client.get(f"/v1/jobs/{mine['id']}").status_code == 200
        client.delete(f"/v1/jobs/{mine['id']}")
        free(database, storage)
        assert left(database) == {}
        acts = client.get("/v1/audit_events", params={"project_id": project_id}).json()["data"]
        assert acts[0]["action"] == "project.deleted"

    def test_a_project_with_open_jobs_and_the_default_one_are_kept(
        self, client: TestClient, database: SyncDatabase, settings: Settings
    ) -> None:
        queue_job(database, principal_of(new_project(database, "tenant")))
        refused = self.invoke(settings, "delete", "tenant", "--yes")
        assert refused.exit_code == 2
        assert "1 job has not ended; cancel them first." in refused.output
        assert self.invoke(settings, "delete", "default", "--yes").exit_code == 2
        assert self.invoke(settings, "delete", "nobody", "--yes").exit_code == 2


def test_a_download_that_lost_its_file_does_not_end_the_server(
    client: TestClient, database: SyncDatabase, settings: Settings
) -> None:
    """The bytes vanish under a request that has found the row: an answer, and the server goes on."""
    job = succeeded(client, database)
    artifact = client.get(f"/v1/jobs/{job['id']}/layers").json()["data"][0]["artifact_id"]
    broken = client.get(f"/v1/artifacts/{artifact}/content")
    assert (broken.status_code, broken.json()["code"]) == (500, "internal")
    api = create_app(settings)
    with TestClient(api, raise_server_exceptions=False, headers=OWNER) as racing:
        opened = api.state.storage.open

        async def deleted_meanwhile(key: str, start: int, end: int) -> Any:
            assert client.delete(f"/v1/jobs/{job['id']}").status_code == 204
            return await opened(key, start, end)

        api.state.storage.open = deleted_meanwhile
        assert racing.get(f"/v1/artifacts/{artifact}/content").status_code == 404
        assert racing.get("/livez").status_code == 200


def test_creating_and_deleting_at_once_end_in_one_order(client: TestClient, database: SyncDatabase) -> None:
    """Either the job has its dataset, or there is no job."""
    for _ in range(5):
        dataset_id = upload(client, b"text")
        answers: dict[str, int] = {}

        def create(dataset_id: str = dataset_id, answers: dict[str, int] = answers) -> None:
            body = job_body(dataset={"id": dataset_id})
            answers["create"] = client.post("/v1/jobs", json=body).status_code

        def delete(dataset_id: str = dataset_id, answers: dict[str, int] = answers) -> None:
            answers["delete"] = client.delete(f"/v1/datasets/{dataset_id}").status_code

        threads = [threading.Thread(target=one) for one in (create, delete)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (answers["create"], answers["delete"]) in ((201, 409), (404, 204))


def test_a_download_under_way_ends_or_breaks_off_when_its_bytes_go(storage: Storage, tmp_path: Path) -> None:
    """Without the grace of the sweep: the rest of the file, or an error of the store, and nothing else."""
    source = tmp_path / "large"
    source.write_bytes(os.urandom(6_000_000))
    storage.put_file("jobs/a/b/1/large", source)

    async def read() -> bytes:
        opened = await storage.open("jobs/a/b/1/large", 0, 6_000_000)
        assert opened is not None
        stream = opened.chunks
        got = await anext(stream)
        storage.delete(["jobs/a/b/1/large"])
        return got + b"".join([chunk async for chunk in stream])

    with contextlib.suppress(StorageError):
        assert asyncio.run(read()) == source.read_bytes()
    assert asyncio.run(storage.size("jobs/a/b/1/large")) is None
