"""Datasets over HTTP."""

from __future__ import annotations

import base64
import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.main import create_app
from app.settings import Settings
from tests.support.tenants import OWNER

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
