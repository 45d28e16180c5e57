"""Artifacts over HTTP: the whole file, its ranges, its headers."""

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
from app.infra.storage import Storage
from app.jobs.vocabulary import StepName
from app.settings import Settings
from tests.support.factories import finish, must_claim, queue_job

CONTENT = os.urandom(10_000)
DIGEST = base64.b64encode(hashlib.sha256(CONTENT).digest()).decode()


def objects(settings: Settings) -> list[Path]:
    return [path for path in (settings.data_dir / "objects").rglob("*") if path.is_file()]


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
