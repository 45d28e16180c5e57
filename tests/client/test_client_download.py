"""Downloads with the Python client: from a folder, from a bucket through the API, and from a bucket that the API sends to."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as limits
from hypothesis import strategies as st
from sqlalchemy import text
from starlette.types import Receive, Scope, Send

from app.infra.database import SyncDatabase
from app.settings import Settings
from orthokv_client import (
    AsyncOrthoKV,
    DigestMismatch,
    DownloadInUse,
    NotEnoughSpace,
    NotFound,
    OrthoKV,
    Retry,
    UnexpectedAnswer,
    Unreachable,
    partfile,
)
from orthokv_client.models import Artifact
from orthokv_client.partfile import PartFile
from tests.support.cutting import cutting
from tests.support.driven import Clients
from tests.support.paths import REPOSITORY
from tests.support.serving import listening, planted, serving

SEGMENT = 300_000
CONTENT = os.urandom(2_500_003)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many segments of a small file, and no long pauses."""
    monkeypatch.setattr(partfile, "SEGMENT_BYTES", SEGMENT)
    monkeypatch.setattr(partfile, "COUNT_EVERY_BYTES", 50_000)
    monkeypatch.setattr("orthokv_client.download.PATIENT", Retry(attempts=6, first_seconds=0.01))


@pytest.fixture(params=["local", "bucket", "signed"])
def stored(request: pytest.FixtureRequest, settings: Settings) -> Settings:
    """The settings of a service that has its files there."""
    if request.param == "local":
        return settings
    bucket = request.getfixturevalue("bucket")
    return Settings.model_validate(
        {
            **settings.model_dump(),
            "storage_url": bucket.url,
            "storage_options": bucket.options,
            "signed_download_seconds": 60 if request.param == "signed" else None,
        }
    )


@pytest.fixture
def artifact_id(stored: Settings, tmp_path: Path) -> str:
    return planted(stored, CONTENT, tmp_path)


@pytest.fixture
def url(stored: Settings) -> Iterator[str]:
    with serving(stored) as url:
        yield url


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_comes_whole_under_its_name(make: Clients, url: str, artifact_id: str, out: Path) -> None:
    told: list[int] = []
    path = make(url).artifacts.download(artifact_id, out, progress=lambda _, count: told.append(count))
    assert (path, path.read_bytes()) == (out / "blocks.safetensors", CONTENT)
    assert names(out) == ["blocks.safetensors"]
    assert sum(told) == len(CONTENT)
    changed = path.stat().st_mtime_ns
    again = make(url).artifacts.download(artifact_id, out)
    assert again.stat().st_mtime_ns == changed  # what is there is not fetched again


@pytest.mark.parametrize("size", [0, 1, SEGMENT, SEGMENT + 1])
def test_files_of_any_size(make: Clients, settings: Settings, tmp_path: Path, out: Path, size: int) -> None:
    artifact_id = planted(settings, CONTENT[:size], tmp_path)
    with serving(settings) as url:
        assert make(url).artifacts.download(artifact_id, out).read_bytes() == CONTENT[:size]


def test_a_download_cut_anywhere_goes_on_there(make: Clients, url: str, artifact_id: str, out: Path) -> None:
    """Many connections that break at many places; nearly nothing is sent twice."""
    with cutting(url) as proxy:
        client = make(proxy.url)
        artifact = client.artifacts.get(artifact_id)
        proxy.cut(0, 1, 400, 700, 65_536, 100_000, 299_999, 300_900)
        assert client.artifacts.download(artifact, out).read_bytes() == CONTENT
        assert proxy.accepted > 8
        assert proxy.passed < len(CONTENT) + 8 * 70_000


def test_connections_are_bounded(make: Clients, settings: Settings, tmp_path: Path, out: Path) -> None:
    artifact_id = planted(settings, CONTENT, tmp_path)
    with serving(settings) as url, cutting(url) as proxy:
        artifact = make(url).artifacts.get(artifact_id)
        make(proxy.url).artifacts.download(artifact, out, connections=3)
        assert 2 <= proxy.most_open <= 3


def test_a_server_that_stays_away_leaves_what_came(
    make: Clients, settings: Settings, tmp_path: Path, out: Path
) -> None:
    artifact_id = planted(settings, CONTENT, tmp_path)
    with serving(settings) as url, cutting(url) as proxy:
        artifact = make(url).artifacts.get(artifact_id)
        proxy.cut(200_000, *[0] * 200)
        with pytest.raises(Unreachable, match="broke off"):
            make(proxy.url).artifacts.download(artifact, out, connections=1)
        (part,) = out.iterdir()
        with PartFile(out / artifact.filename, size=len(CONTENT), sha256=SHA256) as begun:
            assert 100_000 < len(CONTENT) - begun.missing < 200_000
        proxy.cut()
        make(proxy.url).artifacts.download(artifact, out)
        assert proxy.passed < len(CONTENT) - 90_000
        assert not part.exists()


KILLED = """
import os, signal, sys, threading
from pathlib import Path
from orthokv_client import OrthoKV, partfile
partfile.SEGMENT_BYTES, partfile.COUNT_EVERY_BYTES = {segment}, 50_000
left = int(sys.argv[4])
write, counting = os.pwrite, threading.Lock()
def until(descriptor, data, offset):
    global left
    with counting:
        if len(data) >= left:
            write(descriptor, data[:left], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        left -= len(data)
    return write(descriptor, data, offset)
os.pwrite = until
with OrthoKV(sys.argv[1]) as client:
    client.artifacts.download(sys.argv[2], Path(sys.argv[3]))
"""


@pytest.mark.crash
def test_a_killed_download_goes_on_to_the_same_digest(url: str, artifact_id: str, tmp_path: Path) -> None:
    """`kill -9` at the n-th byte written, of the file or of its counts, again and again until the file is there."""
    code = KILLED.format(segment=SEGMENT)

    @limits(
        max_examples=4,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
        database=None,
    )
    # Not all of them together write the whole file: each finds something left to do.
    @given(at=st.lists(st.integers(1, len(CONTENT) // 4 - 1), min_size=2, max_size=4))
    def run(at: list[int]) -> None:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        for place in at:
            arguments = [sys.executable, "-c", code, url, artifact_id, str(folder), str(place)]
            done = subprocess.run(arguments, cwd=REPOSITORY, check=False)
            assert done.returncode == -signal.SIGKILL
            assert not (folder / "blocks.safetensors").exists()
        with OrthoKV(url) as client:
            path = client.artifacts.download(artifact_id, folder)
        assert hashlib.sha256(path.read_bytes()).hexdigest() == SHA256
        assert names(folder) == ["blocks.safetensors"]

    run()


@pytest.mark.parametrize("complete", [False, True])
def test_a_kill_around_the_last_step(
    make: Clients, settings: Settings, tmp_path: Path, out: Path, complete: bool
) -> None:
    """All bytes are there, with their counts or already without them: only the check and the name are missing."""
    artifact_id = planted(settings, CONTENT, tmp_path)
    out.mkdir()
    with PartFile(out / "blocks.safetensors", size=len(CONTENT), sha256=SHA256) as part:
        part.reserve()
        for segment in range(part.segments):
            part.write(segment, CONTENT[slice(*part.rest(segment))])
            part.count(segment)
    if complete:
        os.truncate(part.path, len(CONTENT))
    with serving(settings) as url, cutting(url) as proxy:
        artifact = make(url).artifacts.get(artifact_id)
        assert make(proxy.url).artifacts.download(artifact, out).read_bytes() == CONTENT
        assert proxy.passed == 0


def test_damage_is_found_and_not_kept(
    make: Clients, stored: Settings, artifact_id: str, url: str, out: Path
) -> None:
    out.mkdir()
    with PartFile(out / "blocks.safetensors", size=len(CONTENT), sha256=SHA256) as part:
        part.reserve()
        part.write(2, b"\0" * 1000)
        part.count(2)
    with pytest.raises(DigestMismatch, match=r"blocks\.safetensors arrived damaged"):
        make(url).artifacts.download(artifact_id, out)
    assert names(out) == []
    assert make(url).artifacts.download(artifact_id, out).read_bytes() == CONTENT


def test_a_disk_without_room_is_said_before_the_first_byte(
    make: Clients, settings: Settings, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact_id = planted(settings, CONTENT, tmp_path)
    usage = namedtuple("usage", "total used free")
    with serving(settings) as url, cutting(url) as proxy:
        artifact = make(url).artifacts.get(artifact_id)
        with monkeypatch.context() as full:
            full.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, len(CONTENT) - 1))
            with pytest.raises(NotEnoughSpace, match=f"needs {len(CONTENT)} more bytes"):
                make(proxy.url).artifacts.download(artifact, out)
        assert proxy.accepted == 0
        assert make(url).artifacts.download(artifact, out).read_bytes() == CONTENT


def test_two_at_once_do_not_mix(make: Clients, settings: Settings, tmp_path: Path, out: Path) -> None:
    artifact_id = planted(settings, CONTENT, tmp_path)
    out.mkdir()
    with (
        serving(settings) as url,
        PartFile(out / "blocks.safetensors", size=len(CONTENT), sha256=SHA256),
        pytest.raises(DownloadInUse),
    ):
        make(url).artifacts.download(artifact_id, out)


def test_one_download_is_one_audit_event(
    make: Clients, url: str, artifact_id: str, out: Path, database: SyncDatabase
) -> None:
    def noted() -> int:
        statement = text("SELECT count(*) FROM audit_event WHERE action = 'artifact.downloaded'")
        return int(database.read(lambda session: session.execute(statement).scalar_one()))

    make(url).artifacts.download(artifact_id, out, connections=8)
    assert noted() == 1
    make(url).artifacts.download(artifact_id, out / "again")
    assert noted() == 1  # within the window
    with pytest.raises(NotFound):
        make(url).artifacts.download("art_" + "0" * 26, out)
    assert noted() == 1


class Elsewhere:
    """An API that sends to a store, and that store: what they are asked with, and what the store answers first."""

    def __init__(self, *refusals: int) -> None:
        self._refusals = list(refusals)
        self.store = ""
        self.location: str | None = None
        self.asked: list[tuple[str, dict[str, str]]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.asked.append((scope["path"], headers))
        answer: tuple[int, dict[str, str], bytes]
        if scope["path"].startswith("/v1/"):
            answer = (307, {"location": self.location or f"{self.store}/signed?secret=1"}, b"")
        elif self._refusals:
            answer = (self._refusals.pop(0), {}, b"<Error/>")
        else:
            first, last = map(int, headers["range"].removeprefix("bytes=").split("-"))
            place = f"bytes {first}-{last}/{len(CONTENT)}"
            answer = (206, {"content-range": place}, CONTENT[first : last + 1])
        status, more, body = answer
        raw = [
            (name.encode(), value.encode())
            for name, value in {**more, "content-length": str(len(body))}.items()
        ]
        await send({"type": "http.response.start", "status": status, "headers": raw})
        await send({"type": "http.response.body", "body": body})


def described(**changes: Any) -> Artifact:
    body = {
        "id": "art_" + "0" * 26,
        "filename": "x.bin",
        "bytes": len(CONTENT),
        "sha256": SHA256,
        "media_type": "application/octet-stream",
        "created_at": "2026-01-01T00:00:00Z",
        "url": "/v1/artifacts/art_0/content",
    }
    return Artifact.model_validate({**body, **changes})


KEY = "okv_0_hunter2_0"


@pytest.fixture
def sync() -> Iterator[Clients]:
    clients = Clients("sync")
    yield clients
    clients.close()


def test_the_store_never_sees_the_key(sync: Clients, out: Path) -> None:
    app = Elsewhere()
    with listening(app, lifespan="off") as api, listening(app, lifespan="off") as app.store:
        sync(api, api_key=KEY).artifacts.download(described(), out)
    asked = [headers for path, headers in app.asked if path == "/signed"]
    assert len(asked) == -(-len(CONTENT) // SEGMENT)
    assert not any("hunter2" in str(headers) for headers in asked)
    assert all("hunter2" in headers["authorization"] for path, headers in app.asked if path != "/signed")


def test_a_signature_that_has_run_out_is_asked_for_again(sync: Clients, out: Path) -> None:
    app = Elsewhere(403, 403, 503)
    with listening(app, lifespan="off") as api, listening(app, lifespan="off") as app.store:
        assert sync(api).artifacts.download(described(), out, connections=1).read_bytes() == CONTENT
    signed = sum(path == "/signed" for path, _ in app.asked)
    assert len(app.asked) == 2 * signed


@pytest.mark.parametrize("location", ["file:///etc/passwd", "/elsewhere"])
def test_a_place_that_is_no_url_is_not_followed(sync: Clients, out: Path, location: str) -> None:
    app = Elsewhere()
    app.location = location
    with listening(app, lifespan="off") as api, pytest.raises(UnexpectedAnswer, match="to no URL"):
        sync(api).artifacts.download(described(), out)


class Wrong:
    """A server that answers a range with something else."""

    def __init__(self, status: int, place: str | None, size: int) -> None:
        self._status, self._place, self._size = status, place, size

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        raw = [] if self._place is None else [(b"content-range", self._place.encode())]
        await send({"type": "http.response.start", "status": self._status, "headers": raw})
        await send({"type": "http.response.body", "body": b"x" * self._size})


@pytest.mark.parametrize(
    "app",
    [
        Wrong(200, None, len(CONTENT)),
        Wrong(206, None, SEGMENT),
        Wrong(206, f"bytes 1-{SEGMENT}/{len(CONTENT)}", SEGMENT),
        Wrong(206, f"bytes 0-{SEGMENT - 1}/{len(CONTENT) + 1}", SEGMENT),
        Wrong(206, f"bytes 0-{SEGMENT - 1}/{len(CONTENT)}", SEGMENT + 1),
    ],
    ids=["whole", "unsaid", "shifted", "other file", "too much"],
)
def test_another_range_than_asked_is_not_taken(sync: Clients, out: Path, app: Wrong) -> None:
    with listening(app, lifespan="off") as url, pytest.raises(UnexpectedAnswer):
        sync(url).artifacts.download(described(), out, connections=1)
    assert not (out / "x.bin").exists()


@pytest.mark.parametrize("name", ["../x", "/etc/x", "..", "", "a/b"])
def test_no_file_is_written_outside_of_the_folder(sync: Clients, out: Path, name: str) -> None:
    with pytest.raises(UnexpectedAnswer, match="outside of the folder"):
        sync("http://127.0.0.1:9").artifacts.download(described(filename=name), out)
    assert not out.exists()


class Trickle:
    """A server that sends a little of its answer, and the rest never."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        place = f"bytes 0-{SEGMENT - 1}/{len(CONTENT)}"
        headers = [(b"content-range", place.encode()), (b"content-length", str(SEGMENT).encode())]
        await send({"type": "http.response.start", "status": 206, "headers": headers})
        for _ in range(1000):
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
            await asyncio.sleep(0.01)
        await send({"type": "http.response.body", "body": b"x" * (SEGMENT - 1000)})


def test_an_asynchronous_download_that_is_cancelled_stops(out: Path) -> None:
    async def run(url: str) -> None:
        async with AsyncOrthoKV(url) as client:
            begun, loop = asyncio.Event(), asyncio.get_running_loop()

            def tell(_: Artifact, count: int) -> None:
                if count:
                    loop.call_soon_threadsafe(begun.set)

            task = asyncio.create_task(
                client.artifacts.download(described(), out, connections=1, progress=tell)
            )
            await begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    with listening(Trickle(), lifespan="off") as url:
        started = time.monotonic()
        asyncio.run(run(url))  # waits for its threads
        assert time.monotonic() - started < 5
    assert names(out) != ["x.bin"]
