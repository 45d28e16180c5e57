"""What a project may have queued, running and stored."""

from __future__ import annotations

import hashlib
import threading

import pytest
from fastapi.testclient import TestClient

from app.infra.database import SyncDatabase
from app.jobs.lease import Lease, claim
from app.main import create_app
from app.principal import DEFAULT_PROJECT_ID, local_principal
from app.projects import service as auth
from app.projects.schemas import Limits
from app.settings import Settings
from tests.support.factories import finish, job_body, must_claim, queue_job
from tests.support.paths import DEMO
from tests.support.tenants import OWNER, bearer, new_key, new_project, principal_of
from workers.orders import load_order


def set_limits(database: SyncDatabase, **limits: int) -> None:
    """Limits of the default project."""
    database.write(
        auth.set_limits,
        project_id=DEFAULT_PROJECT_ID,
        limits=Limits(**limits),
        principal=local_principal(),
    )


class TestQueuedJobs:
    def test_a_full_queue_is_429_until_a_job_starts(self, client: TestClient, database: SyncDatabase) -> None:
        set_limits(database, queued_jobs=2)
        for _ in range(2):
            assert client.post("/v1/jobs", json=job_body()).status_code == 201
        refused = client.post("/v1/jobs", json=job_body())
        assert (refused.status_code, refused.json()["code"]) == (429, "queue_full")
        assert refused.json()["detail"] == (
            "The project has 2 jobs queued and may have 2; wait until one has started."
        )
        assert refused.headers["retry-after"] == "30"
        must_claim(database)
        assert client.post("/v1/jobs", json=job_body()).status_code == 201

    def test_other_projects_have_their_own(self, client: TestClient, database: SyncDatabase) -> None:
        set_limits(database, queued_jobs=0)
        assert client.post("/v1/jobs", json=job_body()).status_code == 429
        other = bearer(new_key(database, new_project(database, "tenant")))
        assert client.post("/v1/jobs", json=job_body(), headers=other).status_code == 201

    def test_the_setting_is_the_default(self, settings: Settings) -> None:
        with TestClient(
            create_app(settings.model_copy(update={"max_queued_jobs": 0})), headers=OWNER
        ) as client:
            assert client.post("/v1/jobs", json=job_body()).json()["code"] == "queue_full"

    def test_a_retry_takes_a_place(self, client: TestClient, database: SyncDatabase) -> None:
        job = client.post("/v1/jobs", json=job_body()).json()["id"]
        client.post(f"/v1/jobs/{job}/cancel")
        set_limits(database, queued_jobs=0)
        assert client.post(f"/v1/jobs/{job}/retry").status_code == 429
        assert client.get(f"/v1/jobs/{job}").json()["status"] == "cancelled"

    def test_many_at_once_do_not_overfill(self, client: TestClient, database: SyncDatabase) -> None:
        set_limits(database, queued_jobs=3)
        statuses: list[int] = []
        threads = [
            threading.Thread(
                target=lambda: statuses.append(client.post("/v1/jobs", json=job_body()).status_code)
            )
            for _ in range(10)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(statuses) == [201] * 3 + [429] * 7


def claim_within(database: SyncDatabase, default: int | None) -> Lease | None:
    return database.write(claim, owner="w", lease_seconds=30.0, max_running_steps=default)


class TestRunningSteps:
    @pytest.mark.parametrize("own", [True, False])
    def test_steps_beyond_the_limit_wait(self, database: SyncDatabase, own: bool) -> None:
        if own:
            set_limits(database, running_steps=2)
        default = 1 if own else 2
        for _ in range(4):
            queue_job(database)
        held = [claim_within(database, default) for _ in range(3)]
        assert [lease is not None for lease in held] == [True, True, False]
        tenant = queue_job(database, principal_of(new_project(database, "tenant")))
        other = claim_within(database, default)
        assert other is not None
        assert other.job_id == tenant.id  # a busy project does not stand in the way of others
        assert held[0] is not None
        finish(database, held[0])
        assert claim_within(database, default) is not None
        assert claim_within(database, default) is None

    def test_claimers_at_once_do_not_exceed_it(self, database: SyncDatabase) -> None:
        set_limits(database, running_steps=3)
        for _ in range(20):
            queue_job(database)
        taken: list[Lease] = []

        def work() -> None:
            for _ in range(4):
                if (lease := claim_within(database, None)) is not None:
                    taken.append(lease)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(taken) == 3
        assert len({lease.step_id for lease in taken}) == 3


def put(client: TestClient, content: bytes) -> tuple[str, int, dict[str, object]]:
    made = client.post("/v1/datasets", json={"filename": "a.txt"}).json()
    response = client.put(made["upload"]["url"], content=content)
    return made["id"], response.status_code, response.json()


class TestStoredBytes:
    def test_an_upload_beyond_the_limit_is_403(self, client: TestClient, database: SyncDatabase) -> None:
        set_limits(database, stored_bytes=100)
        first, status, _ = put(client, b"x" * 60)
        assert status == 200
        _, status, problem = put(client, b"x" * 41)
        assert (status, problem["code"]) == (403, "quota_exceeded")
        assert problem["detail"] == (
            "The project stores 60 bytes and may store 100; there is no room for 41 more."
        )
        assert put(client, b"x" * 40)[1] == 200
        # A repeated upload counts by what it adds.
        assert client.put(f"/v1/datasets/{first}/content", content=b"y" * 60).status_code == 200
        assert client.put(f"/v1/datasets/{first}/content", content=b"y" * 61).status_code == 403
        assert client.put(f"/v1/datasets/{first}/content", content=b"y" * 10).status_code == 200

    def test_a_full_store_takes_no_job_and_no_first_byte(
        self, client: TestClient, database: SyncDatabase
    ) -> None:
        set_limits(database, stored_bytes=60)
        assert put(client, b"x" * 60)[1] == 200
        refused = client.post("/v1/jobs", json=job_body())
        assert (refused.status_code, refused.json()["code"]) == (403, "quota_exceeded")
        assert put(client, b"")[2]["detail"] == (
            "The project stores 60 bytes and may store 60; there is no room for more."
        )

    def test_what_jobs_make_counts(self, client: TestClient, database: SyncDatabase) -> None:
        queue_job(database)
        finish(database, must_claim(database))
        finish(database, must_claim(database))  # blocks.safetensors, of 3 bytes
        set_limits(database, stored_bytes=3)
        assert (
            client.post("/v1/jobs", json=job_body()).json()["detail"].startswith("The project stores 3 bytes")
        )
        set_limits(database, stored_bytes=4)
        assert client.post("/v1/jobs", json=job_body()).status_code == 201


def test_the_largest_dataset_of_a_project(client: TestClient, database: SyncDatabase) -> None:
    set_limits(database, dataset_bytes=5)
    made = client.post("/v1/datasets", json={"filename": "a.txt"}).json()
    assert made["upload"]["max_bytes"] == 5
    refused = client.put(made["upload"]["url"], content=b"123456")
    assert (refused.status_code, refused.json()["detail"]) == (413, "A dataset may have at most 5 bytes.")
    assert client.put(made["upload"]["url"], content=b"12345").status_code == 200
    digest = hashlib.sha256(b"12345").hexdigest()
    assert client.post(f"/v1/datasets/{made['id']}/complete", json={"sha256": digest}).status_code == 200


def test_the_largest_model_is_told_to_the_worker(database: SyncDatabase, settings: Settings) -> None:
    queue_job(database)
    lease = must_claim(database)
    servers = settings.model_copy(update={"max_model_bytes": 7})
    assert database.read(load_order, lease, settings).model.max_weight_bytes is None
    assert database.read(load_order, lease, servers).model.max_weight_bytes == 7
    set_limits(database, model_bytes=5)
    assert database.read(load_order, lease, servers).model.max_weight_bytes == 5


def test_a_model_beyond_the_limit_is_named_before_anybody_pays(
    client: TestClient, database: SyncDatabase
) -> None:
    set_limits(database, model_bytes=5)
    found = client.post("/v1/jobs:validate", json=job_body(model={"id": str(DEMO)})).json()
    assert not found["valid"]
    assert [problem["code"] for problem in found["problems"]] == ["model_too_large"]
    assert client.get("/v1/usage").json()["model_bytes"] == 5
