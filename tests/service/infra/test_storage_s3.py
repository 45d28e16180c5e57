"""The object store in a bucket: the same promises, and URLs that the bucket itself answers."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx2
import pytest
from fastapi.testclient import TestClient

from app.artifacts.models import Artifact
from app.deletion.orphans import sweep_orphans
from app.infra.database import SyncDatabase
from app.infra.storage import Storage, StorageError, Stored, open_storage
from app.jobs.vocabulary import StepName
from app.main import create_app
from app.settings import Settings
from tests.service.infra.test_storage import chunks, source
from tests.support.factories import advance, queue_job
from tests.support.s3 import Bucket
from tests.support.tenants import OWNER

NOW = timedelta(seconds=-5)
LARGE = 12_000_000  # several parts of a multipart upload


@pytest.fixture
def store(bucket: Bucket) -> Storage:
    return Storage(bucket.url, bucket.options)


def open_uploads(bucket: Bucket) -> int:
    return httpx2.get(f"{bucket.endpoint}/{bucket.name}?uploads").text.count("<UploadId>")


async def collect(stream: AsyncIterator[bytes]) -> bytes:
    return b"".join([chunk async for chunk in stream])


@pytest.mark.parametrize("size", [0, 1000, LARGE])
def test_a_file_comes_back_as_it_was(store: Storage, tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    stored = store.put_file("jobs/a/1/x.bin", source(tmp_path, content))
    assert stored == Stored(size, hashlib.sha256(content).hexdigest())
    store.fetch("jobs/a/1/x.bin", tmp_path / "back", sha256=stored.sha256)
    assert (tmp_path / "back").read_bytes() == content


def test_a_stream_is_stored_and_read_by_ranges(store: Storage) -> None:
    parts = [os.urandom(1_000_000) for _ in range(12)]
    content = b"".join(parts)
    stored = asyncio.run(store.put_stream("datasets/d/1", chunks(*parts)))
    assert stored == Stored(len(content), hashlib.sha256(content).hexdigest())

    async def read(start: int, end: int) -> tuple[int, bytes]:
        opened = await store.open("datasets/d/1", start, end)
        assert opened is not None
        return opened.size, await collect(opened.chunks)

    for start, end in ((0, len(content)), (1, 2), (7, 6_000_001), (5, 5)):
        assert asyncio.run(read(start, end)) == (len(content), content[start:end])
    assert asyncio.run(store.open("datasets/d/2", 0, 1)) is None


def test_a_stream_that_breaks_leaves_nothing(store: Storage, bucket: Bucket) -> None:
    with pytest.raises(EOFError, match="gone"):
        asyncio.run(store.put_stream("d/up", chunks(b"x" * LARGE, error=EOFError("gone"))))
    assert list(store.list_older("d", NOW)) == []
    assert open_uploads(bucket) == 0


def test_an_altered_object_is_not_handed_out(store: Storage, tmp_path: Path) -> None:
    stored = store.put_file("a/x", source(tmp_path, b"as committed"))
    store.put_file("a/x", source(tmp_path, b"as tampered!"))
    with pytest.raises(StorageError, match="not the file that was committed"):
        store.fetch("a/x", tmp_path / "back", sha256=stored.sha256)


def test_a_missing_object_is_an_error_of_the_store(store: Storage, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot read x"):
        store.fetch("a/x", tmp_path / "back", sha256="0" * 64)


def test_only_old_objects_are_listed_and_deletion_deletes(store: Storage, tmp_path: Path) -> None:
    keys = [f"jobs/{number}" for number in range(5)]
    for key in keys:
        store.put_file(key, source(tmp_path, b"x"))
    assert list(store.list_older("jobs", timedelta(hours=1))) == []
    assert sorted(store.list_older("jobs", NOW)) == keys
    store.delete(keys[1:])
    assert list(store.list_older("jobs", NOW)) == keys[:1]


def test_the_sweep_deletes_what_no_row_knows(database: SyncDatabase, store: Storage, tmp_path: Path) -> None:
    job = queue_job(database)
    lease = advance(database, job.id, StepName.FIT)
    known = database.read(lambda session: [row.object_key for row in session.query(Artifact)])
    assert known, "calibrate has left a file"
    live = f"jobs/{job.id}/{lease.step_id}/{lease.fence}/layer-000.safetensors"
    orphan = f"jobs/{job.id}/{lease.step_id}/{lease.fence - 1}/layer-000.safetensors"
    for key in (*known, live, orphan):
        store.put_file(key, source(tmp_path, b"x"))
    assert sweep_orphans(database, store, age=NOW) == 1
    assert sorted(store.list_older("jobs", NOW)) == sorted([*known, live])


def test_a_bucket_that_is_away_is_an_error_of_the_store(bucket: Bucket, tmp_path: Path) -> None:
    missing = Storage(bucket.url.replace(bucket.name, "no-such-bucket"), bucket.options)
    with pytest.raises(StorageError, match="cannot store"):
        missing.put_file("a/x", source(tmp_path, b"x"))
    with pytest.raises(StorageError):
        asyncio.run(missing.check())


def test_an_unknown_option_is_refused_without_its_value() -> None:
    with pytest.raises(StorageError, match="nonsense") as refused:
        Storage("s3://bucket", {"nonsense": "very secret"})
    assert "very secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("gs://bucket/prefix", {}),
        ("abfs://container@account.dfs.core.windows.net/prefix", {"account_key": "c2VjcmV0"}),
        ("az://container/prefix", {"account_name": "account", "account_key": "c2VjcmV0"}),
    ],
)
def test_other_clouds_are_accepted(url: str, options: dict[str, str]) -> None:
    assert Storage(url, options).can_sign


@pytest.fixture
def in_bucket(settings: Settings, bucket: Bucket) -> Settings:
    """Settings that send downloads to the bucket."""
    return Settings.model_validate(
        {
            **settings.model_dump(),
            "storage_url": bucket.url,
            "storage_options": bucket.options,
            "signed_download_seconds": 60,
        }
    )


@pytest.fixture
def artifact(database: SyncDatabase, in_bucket: Settings, tmp_path: Path) -> Artifact:
    """A file of a job, with its bytes in the bucket."""
    job = queue_job(database)
    advance(database, job.id, StepName.FIT)
    path = source(tmp_path, b"0123456789")
    row = database.read(lambda session: session.query(Artifact).first())
    assert row is not None
    stored = open_storage(in_bucket).put_file(row.object_key, path)
    database.write(
        lambda session: session.query(Artifact).update({"bytes": stored.bytes, "sha256": stored.sha256})
    )
    row.bytes, row.sha256 = stored.bytes, stored.sha256
    return row


def test_downloads_are_sent_to_the_bucket_for_a_short_time(in_bucket: Settings, artifact: Artifact) -> None:
    path = f"/v1/artifacts/{artifact.id}/content"
    with TestClient(create_app(in_bucket), headers=OWNER) as client:
        answer = client.get(path, follow_redirects=False)
        assert answer.status_code == 307
        assert answer.headers["cache-control"] == "no-store"
        location = answer.headers["location"]
        assert parse_qs(urlsplit(location).query)["X-Amz-Expires"] == ["60"]
        assert httpx2.get(location).content == b"0123456789"
        assert httpx2.get(location, headers={"Range": "bytes=2-4"}).content == b"234"
        head = client.head(path, follow_redirects=False)
        assert (head.status_code, head.headers["content-length"]) == (200, "10")
        etag = head.headers["etag"]
        assert client.get(path, headers={"If-None-Match": etag}, follow_redirects=False).status_code == 304


def test_without_the_setting_the_api_sends_the_bytes(in_bucket: Settings, artifact: Artifact) -> None:
    streaming = in_bucket.model_copy(update={"signed_download_seconds": None})
    with TestClient(create_app(streaming), headers=OWNER) as client:
        answer = client.get(
            f"/v1/artifacts/{artifact.id}/content",
            headers={"Range": "bytes=2-4"},
            follow_redirects=False,
        )
        assert (answer.status_code, answer.content) == (206, b"234")


def test_a_store_that_cannot_sign_is_refused_at_the_start(settings: Settings) -> None:
    asked = settings.model_copy(update={"signed_download_seconds": 60.0})
    with pytest.raises(StorageError, match="ORTHOKV_SIGNED_DOWNLOAD_SECONDS needs a bucket"):
        open_storage(asked)


def test_settings_show_no_credential(in_bucket: Settings) -> None:
    shown = f"{in_bucket!r} {in_bucket.model_dump_json()}"
    assert in_bucket.storage_options["secret_access_key"].get_secret_value() == "secret"
    assert "'secret'" not in shown
    assert '"secret"' not in shown
