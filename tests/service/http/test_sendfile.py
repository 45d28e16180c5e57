"""Files go to the socket by the kernel, to the byte, and nothing else about a response changes."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import httpx2
import pytest
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from starlette.types import Receive, Scope, Send

from app.http import sendfile
from app.http.sendfile import ZERO_COPY
from app.settings import Settings
from tests.support.orthokv_server import until
from tests.support.serving import listening, planted, serving
from tests.support.tenants import OWNER

CONTENT = os.urandom(9_000_001)


class FileApp:
    """An application that sends `?start-end` of a file, and remembers how its requests ended."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.ended: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        start, end = map(int, scope["query_string"].split(b"-"))
        headers = [(b"content-length", str(end - start).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        half = (start + end) // 2  # a body may come in several pieces
        for first, last in ((start, half), (half, end)):
            if first < last:
                await send({"type": ZERO_COPY, "file": self._file, "offset": first, "count": last - first})
        await send({"type": "http.response.body", "body": b""})
        self.ended.append((await receive())["type"])


@pytest.fixture(scope="module")
def app() -> Iterator[FileApp]:
    with tempfile.TemporaryFile() as file:
        file.write(CONTENT)
        file.flush()
        yield FileApp(file)


@pytest.fixture(scope="module")
def url(app: FileApp) -> Iterator[str]:
    with listening(app, lifespan="off") as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=url, timeout=60) as client:
        yield client


@limits(max_examples=30, deadline=None)
@given(ends=st.tuples(st.integers(0, len(CONTENT)), st.integers(0, len(CONTENT))).map(sorted))
def test_any_part_on_one_connection(client: httpx2.Client, ends: list[int]) -> None:
    """Kept alive: what follows on the connection is the next answer, not the rest of this one."""
    start, end = ends
    assert client.get(f"/?{start}-{end}").content == CONTENT[start:end]


def connection(url: str, query: str) -> socket.socket:
    parts = urlsplit(url)
    opened = socket.create_connection((parts.hostname, parts.port), timeout=60)
    opened.sendall(f"GET /?{query} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    return opened


def test_who_goes_away_meanwhile_leaves_nothing(url: str, app: FileApp, client: httpx2.Client) -> None:
    before, descriptors = len(app.ended), len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with connection(url, f"0-{len(CONTENT)}") as gone:
            assert gone.recv(1000)
    until(lambda: len(app.ended) == before + 5, "every request ends")
    assert app.ended[before:] == ["http.disconnect"] * 5
    until(lambda: len(os.listdir("/proc/self/fd")) <= descriptors, "every descriptor is closed")
    assert client.get("/?0-10").content == CONTENT[:10]


def test_who_takes_nothing_is_cut_off(
    url: str, app: FileApp, monkeypatch: pytest.MonkeyPatch, client: httpx2.Client
) -> None:
    monkeypatch.setattr(sendfile, "STALL_SECONDS", 0.2)
    before = len(app.ended)
    with connection(url, f"0-{len(CONTENT)}"):
        until(lambda: len(app.ended) == before + 1, "the stalled request ends")
        assert client.get("/?5-9").content == CONTENT[5:9]


def test_a_slow_reader_is_waited_for_while_it_takes_something(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sendfile, "STALL_SECONDS", 2.0)
    received = b""
    with connection(url, f"0-{len(CONTENT)}") as slow:
        while len(received.partition(b"\r\n\r\n")[2]) < len(CONTENT):
            received += slow.recv(300_000)
    assert received.partition(b"\r\n\r\n")[2] == CONTENT


def test_a_file_that_was_cut_breaks_the_connection(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"x" * 100)
    broken = pytest.raises(httpx2.RemoteProtocolError, match="without sending complete message body")
    with (tmp_path / "short").open("rb") as file, listening(FileApp(file), lifespan="off") as url, broken:
        httpx2.get(f"{url}/?0-1000")


def test_other_requests_are_answered_while_many_read(url: str, client: httpx2.Client) -> None:
    readers = [connection(url, f"0-{len(CONTENT)}") for _ in range(16)]
    try:
        assert client.get("/?1-4").content == CONTENT[1:4]
    finally:
        for reader in readers:
            reader.close()


def test_artifacts_are_sent_so(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The product's own route: bytes, headers, ranges; and not one byte of it through Python."""

    async def unread(*_: Any) -> Any:
        raise AssertionError("the file was read by the process")
        yield b""

    monkeypatch.setattr("app.infra.storage._read_local", unread)
    artifact_id = planted(settings, CONTENT, tmp_path)
    with serving(settings) as url:
        path = f"{url}/v1/artifacts/{artifact_id}/content"
        whole = httpx2.get(path, headers=OWNER)
        assert (whole.status_code, whole.content) == (200, CONTENT)
        assert whole.headers["content-length"] == str(len(CONTENT))
        part = httpx2.get(path, headers={"Range": "bytes=5-1000004", **OWNER})
        assert (part.status_code, part.content) == (206, CONTENT[5:1000005])
        assert part.headers["content-range"] == f"bytes 5-1000004/{len(CONTENT)}"
        assert httpx2.head(path, headers=OWNER).headers["content-length"] == str(len(CONTENT))
