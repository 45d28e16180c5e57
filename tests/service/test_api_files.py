"""Datasets, artifacts, profiles and checkpoints over HTTP."""

from __future__ import annotations

import base64
import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given
from hypothesis import settings as limits
from hypothesis import strategies as st
from sqlalchemy import update

from app.artifacts.models import Artifact
from app.artifacts.repository import files_of_job
from app.infra.database import SyncDatabase
from app.infra.storage import Storage, digest_file
from app.jobs.vocabulary import StepName
from app.main import create_app
from app.settings import Settings
from tests.service.factories import complete, finish, must_claim, queue_job, read_job
from tests.service.tenants import OWNER

CONTENT = os.urandom(10_000)
DIGEST = base64.b64encode(hashlib.sha256(CONTENT).digest()).decode()


def announce(client: TestClient, **body: Any) -> dict[str, Any]:
    response = client.post("/v1/datasets", json={"filename": "calibration.jsonl", **body})
    assert response.status_code == 201
    dataset: dict[str, Any] = response.json()
    return dataset


def objects(settings: Settings) -> list[Path]:
    return [path for path in (settings.data_dir / "objects").rglob("*") if path.is_file()]


class TestDatasets:
    def test_upload_complete_and_use(self, client: TestClient) -> None:
        dataset = announce(client)
        assert (dataset["status"], dataset["format"]) == ("awaiting_upload", "jsonl")
        uploaded = client.put(dataset["upload"]["url"], content=CONTENT).json()
        digest = hashlib.sha256(CONTENT).hexdigest()
        assert (uploaded["status"], uploaded["bytes"], uploaded["sha256"]) == (
            "uploaded",
            len(CONTENT),
            digest,
        )
        path = f"/v1/datasets/{dataset['id']}"
        for _ in range(2):  # confirming twice is harmless
            ready = client.post(f"{path}/complete", json={"sha256": digest})
            assert (ready.status_code, ready.json()["status"]) == (200, "ready")
        assert ready.json()["upload"] is None
        assert client.get(path).json() == ready.json()
        assert client.get("/v1/datasets").json()["data"] == [ready.json()]

    def test_a_ready_dataset_never_changes(self, client: TestClient, settings: Settings) -> None:
        dataset = announce(client)
        client.put(dataset["upload"]["url"], content=b"a")
        digest = hashlib.sha256(b"a").hexdigest()
        client.post(f"/v1/datasets/{dataset['id']}/complete", json={"sha256": digest})
        assert client.put(dataset["upload"]["url"], content=b"b").status_code == 409
        assert [path.read_bytes() for path in objects(settings)] == [b"a"]

    def test_a_wrong_digest_is_refused_and_the_upload_can_be_repeated(self, client: TestClient) -> None:
        dataset = announce(client)
        path = f"/v1/datasets/{dataset['id']}"
        assert client.post(f"{path}/complete", json={"sha256": "0" * 64}).status_code == 409
        client.put(dataset["upload"]["url"], content=b"damaged")
        response = client.post(f"{path}/complete", json={"sha256": hashlib.sha256(b"whole").hexdigest()})
        assert (response.status_code, response.json()["code"]) == (422, "digest_mismatch")
        client.put(dataset["upload"]["url"], content=b"whole")
        right = {"sha256": hashlib.sha256(b"whole").hexdigest()}
        assert client.post(f"{path}/complete", json=right).status_code == 200

    @pytest.mark.parametrize(
        ("headers", "status"),
        [
            ({"Content-Range": "bytes 0-4/10"}, 400),
            ({"Content-Encoding": "gzip"}, 415),
            ({"Content-Digest": "sha-256=:AAAA:"}, 422),
            ({"Content-Digest": "sha-256=:A:"}, 400),
            ({"Content-Digest": f"sha-256=:{DIGEST}:", "Repr-Digest": "sha-256=:AAAA:"}, 400),
        ],
    )
    def test_headers_that_make_the_bytes_others_are_refused_and_nothing_is_kept(
        self, client: TestClient, settings: Settings, headers: dict[str, str], status: int
    ) -> None:
        dataset = announce(client)
        response = client.put(dataset["upload"]["url"], content=CONTENT, headers=headers)
        assert response.status_code == status, response.text
        assert objects(settings) == []

    @pytest.mark.parametrize("name", ["Content-Digest", "Repr-Digest"])
    def test_an_upload_may_bring_its_digest(self, client: TestClient, name: str) -> None:
        url = announce(client)["upload"]["url"]
        headers = {name: f"sha-512=:AAAA:, sha-256=:{DIGEST}:"}
        assert client.put(url, content=CONTENT, headers=headers).status_code == 200

    def test_an_upload_that_is_too_large_leaves_nothing(self, settings: Settings) -> None:
        small = settings.model_copy(update={"max_dataset_bytes": 1000})
        with TestClient(create_app(small), headers=OWNER) as client:
            dataset = announce(client)
            assert dataset["upload"]["max_bytes"] == 1000
            response = client.put(dataset["upload"]["url"], content=b"x" * 1001)
            assert (response.status_code, response.json()["code"]) == (413, "body_too_large")
            assert objects(settings) == []
            assert client.put(dataset["upload"]["url"], content=b"x" * 1000).status_code == 200

    def test_an_upload_is_larger_than_any_other_body_may_be(self, settings: Settings) -> None:
        tight = settings.model_copy(update={"max_body_bytes": 100})
        with TestClient(create_app(tight), headers=OWNER) as client:
            dataset = announce(client)
            assert client.put(dataset["upload"]["url"], content=b"x" * 10_000).status_code == 200

    def test_the_format_comes_from_the_name_or_must_be_said(self, client: TestClient) -> None:
        assert announce(client, filename="A.PARQUET")["format"] == "parquet"
        assert announce(client, filename="notes", format="text")["format"] == "text"
        response = client.post("/v1/datasets", json={"filename": "archive.zip"})
        assert response.status_code == 422
        assert response.json()["errors"][0]["pointer"] == "/format"

    def test_the_server_chooses_the_place(self, client: TestClient, settings: Settings) -> None:
        dataset = announce(client, filename="../../../etc/passwd.txt")
        client.put(dataset["upload"]["url"], content=b"x")
        (path,) = objects(settings)
        assert path.parent.name == dataset["id"]
        assert "passwd" not in path.name

    def test_unknown_datasets_are_404(self, client: TestClient) -> None:
        path = "/v1/datasets/ds_" + "0" * 26
        assert client.get(path).status_code == 404
        assert client.put(f"{path}/content", content=b"x").status_code == 404
        assert client.post(f"{path}/complete", json={"sha256": "0" * 64}).status_code == 404


@pytest.fixture
def artifact(database: SyncDatabase, storage: Storage, tmp_path: Path) -> dict[str, Any]:
    """A committed artifact whose object holds CONTENT."""
    job_id = queue_job(database).id
    finish(database, must_claim(database))
    finish(database, must_claim(database))
    row = database.read(files_of_job, job_id, StepName.CALIBRATE)["blocks.safetensors"]
    path = tmp_path / "content"
    path.write_bytes(CONTENT)
    stored = storage.put_file(row.object_key, path)
    values = {"bytes": stored.bytes, "sha256": stored.sha256}
    database.write(
        lambda session: session.execute(update(Artifact).where(Artifact.id == row.id).values(values))
    )
    return {"id": row.id, "url": f"/v1/artifacts/{row.id}/content", **values}


class TestArtifacts:
    def test_the_whole_file_with_its_digest(self, client: TestClient, artifact: dict[str, Any]) -> None:
        response = client.get(artifact["url"])
        assert (response.status_code, response.content) == (200, CONTENT)
        headers = response.headers
        assert headers["etag"] == f'"sha256-{artifact["sha256"]}"'
        digest = base64.b64encode(hashlib.sha256(CONTENT).digest()).decode()
        assert headers["repr-digest"] == f"sha-256=:{digest}:"
        assert headers["content-length"] == str(len(CONTENT))
        assert headers["accept-ranges"] == "bytes"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["content-disposition"] == "attachment; filename*=UTF-8''blocks.safetensors"
        assert headers["cache-control"] == "private, max-age=31536000, immutable"

    @pytest.mark.parametrize("damage", ["gone", "short"])
    def test_a_file_that_the_store_lost_is_said_before_its_headers(
        self, client: TestClient, artifact: dict[str, Any], settings: Settings, damage: str
    ) -> None:
        (stored,) = [path for path in objects(settings) if path.stat().st_size == len(CONTENT)]
        if damage == "gone":
            stored.unlink()
        else:
            stored.write_bytes(stored.read_bytes()[:-1])
        for ask in (client.get, client.head):
            assert ask(f"/v1/artifacts/{artifact['id']}/content").status_code == 500

    def test_metadata(self, client: TestClient, artifact: dict[str, Any]) -> None:
        body = client.get(f"/v1/artifacts/{artifact['id']}").json()
        assert (body["filename"], body["bytes"], body["url"]) == (
            "blocks.safetensors",
            len(CONTENT),
            artifact["url"],
        )

    def test_head_has_the_headers_alone(self, client: TestClient, artifact: dict[str, Any]) -> None:
        response = client.head(artifact["url"], headers={"Range": "bytes=0-9"})
        assert (response.status_code, response.content) == (200, b"")
        assert response.headers["content-length"] == str(len(CONTENT))

    @limits(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(first=st.integers(0, len(CONTENT) - 1), length=st.integers(1, len(CONTENT)))
    def test_any_range_is_that_slice(
        self, client: TestClient, artifact: dict[str, Any], first: int, length: int
    ) -> None:
        response = client.get(artifact["url"], headers={"Range": f"bytes={first}-{first + length - 1}"})
        expected = CONTENT[first : first + length]
        assert (response.status_code, response.content) == (206, expected)
        last = first + len(expected) - 1
        assert response.headers["content-range"] == f"bytes {first}-{last}/{len(CONTENT)}"
        assert response.headers["content-length"] == str(len(expected))
        assert response.headers["etag"] == f'"sha256-{artifact["sha256"]}"'

    def test_a_download_broken_anywhere_resumes(self, client: TestClient, artifact: dict[str, Any]) -> None:
        for cut in (1, 4096, len(CONTENT) - 1):
            headers = {"Range": f"bytes={cut}-", "If-Range": f'"sha256-{artifact["sha256"]}"'}
            rest = client.get(artifact["url"], headers=headers)
            assert rest.status_code == 206
            assert CONTENT[:cut] + rest.content == CONTENT

    def test_a_range_of_another_representation_gets_the_whole(
        self, client: TestClient, artifact: dict[str, Any]
    ) -> None:
        headers = {"Range": "bytes=5-", "If-Range": '"sha256-else"'}
        response = client.get(artifact["url"], headers=headers)
        assert (response.status_code, response.content) == (200, CONTENT)

    def test_a_range_beyond_the_end_is_416(self, client: TestClient, artifact: dict[str, Any]) -> None:
        response = client.get(artifact["url"], headers={"Range": f"bytes={len(CONTENT)}-"})
        assert (response.status_code, response.json()["code"]) == (416, "range_not_satisfiable")
        assert response.headers["content-type"] == "application/problem+json"
        assert response.headers["content-range"] == f"bytes */{len(CONTENT)}"

    def test_who_has_it_gets_304(self, client: TestClient, artifact: dict[str, Any]) -> None:
        response = client.get(artifact["url"], headers={"If-None-Match": f'"sha256-{artifact["sha256"]}"'})
        assert (response.status_code, response.content) == (304, b"")

    def test_an_object_without_a_row_is_not_there(
        self, client: TestClient, storage: Storage, tmp_path: Path
    ) -> None:
        (tmp_path / "x").write_bytes(b"x")
        storage.put_file("jobs/a/b/1/art_" + "0" * 26, tmp_path / "x")
        for path in ("", "/content"):
            assert client.get(f"/v1/artifacts/art_{'0' * 26}{path}").status_code == 404


class TestProfilesAndCheckpoints:
    def test_a_finished_job_leads_to_both(self, client: TestClient, database: SyncDatabase) -> None:
        job = complete(database, queue_job(database).id)
        assert job.result is not None
        profile = client.get(f"/v1/profiles/{job.result.profile_id}").json()
        assert profile["job_id"] == job.id
        assert profile["spec"]["model"]["id"] == "org/model"
        assert profile["resolved"]["geometry"] == {"layers": 3}
        assert {name: file["filename"] for name, file in profile["files"].items()} == {
            "json": "profile.json",
            "tensors": "profile.safetensors",
            "plot": "profile.png",
        }
        assert client.get("/v1/profiles").json()["data"] == [profile]
        checkpoint = client.get(f"/v1/checkpoints/{job.result.checkpoint_id}").json()
        assert checkpoint["profile_id"] == profile["id"]
        assert checkpoint["measured"]["perplexity"] == 9.0
        query = {"profile_id": profile["id"]}
        assert client.get("/v1/checkpoints", params=query).json()["data"] == [checkpoint]

    def test_the_manifest_has_what_evaluate_wrote_again(
        self, client: TestClient, database: SyncDatabase
    ) -> None:
        job = complete(database, queue_job(database).id)
        assert job.result is not None
        manifest = client.get(f"/v1/checkpoints/{job.result.checkpoint_id}/files").json()
        evaluated = database.read(files_of_job, job.id, StepName.EVALUATE)
        packed = database.read(files_of_job, job.id, StepName.PACKAGE)
        by_name = {file["filename"]: file["id"] for file in manifest["data"]}
        assert list(by_name) == ["README.md", "SHA256SUMS", "orthokv.json", "orthokv.safetensors"]
        assert by_name["orthokv.json"] == evaluated["orthokv.json"].id
        assert by_name["orthokv.safetensors"] == packed["orthokv.safetensors"].id
        assert manifest["bytes"] == 12

    def test_the_plot_comes_by_its_media_type(
        self, client: TestClient, database: SyncDatabase, storage: Storage, tmp_path: Path
    ) -> None:
        job = complete(database, queue_job(database).id)
        plot = database.read(files_of_job, job.id, StepName.PROFILE)["profile.png"]
        picture = tmp_path / "plot"
        picture.write_bytes(b"PNG")
        storage.put_file(plot.object_key, picture)
        assert digest_file(picture).bytes == plot.bytes
        assert job.result is not None
        path = f"/v1/profiles/{job.result.profile_id}"
        response = client.get(path, headers={"Accept": "image/png"})
        assert (response.status_code, response.content) == (200, b"PNG")
        assert response.headers["content-disposition"].startswith("inline")
        assert response.headers["vary"] == "Accept"
        assert client.get(path, headers={"Accept": "*/*"}).json()["object"] == "profile"

    def test_another_budget_is_a_job_that_fits_nothing(
        self, client: TestClient, database: SyncDatabase
    ) -> None:
        first = complete(database, queue_job(database).id)
        assert first.result is not None
        path = f"/v1/profiles/{first.result.profile_id}/checkpoints"
        body = {
            "budget": {"metric": "layer_error", "value": 0.1},
            "form": "full",
            "rank_multiple": 8,
            "polish_steps": 0,
        }
        headers = {"Idempotency-Key": "again"}
        response = client.post(path, json=body, headers=headers)
        job = response.json()
        assert (response.status_code, response.headers["location"]) == (202, f"/v1/jobs/{job['id']}")
        assert client.post(path, json=body, headers=headers).json()["id"] == job["id"]
        assert job["kind"] == "checkpoint"
        assert (job["spec"]["rank_multiple"], job["spec"]["polish_steps"]) == (8, 0)
        assert [step["name"] for step in job["steps"]] == ["package", "evaluate"]
        done = complete(database, job["id"])
        assert done.result is not None
        assert done.result.profile_id == first.result.profile_id
        assert done.result.checkpoint_id != first.result.checkpoint_id
        checkpoint = client.get(f"/v1/checkpoints/{done.result.checkpoint_id}").json()
        assert (checkpoint["form"], checkpoint["budget"]) == ("full", body["budget"])
        assert read_job(database, first.id) == first

    def test_unknown_ones_are_404(self, client: TestClient) -> None:
        nobody = "0" * 26
        for path in (
            f"profiles/prof_{nobody}",
            f"checkpoints/ckpt_{nobody}",
            f"checkpoints/ckpt_{nobody}/files",
        ):
            assert client.get(f"/v1/{path}").status_code == 404
        body = {"budget": {"metric": "kept", "value": 0.5}}
        assert client.post(f"/v1/profiles/prof_{nobody}/checkpoints", json=body).status_code == 404
