"""Profiles and checkpoints over HTTP."""

from __future__ import annotations

from pathlib import Path

from fastapi.testclient import TestClient

from app.artifacts.repository import files_of_job
from app.infra.database import SyncDatabase
from app.infra.storage import Storage, digest_file
from app.jobs.vocabulary import StepName
from tests.support.factories import complete, queue_job, read_job


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
