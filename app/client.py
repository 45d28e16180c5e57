"""A small synchronous client of the HTTP API, for the command line."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx2

_CHUNK_BYTES = 1 << 20
_WAIT_SECONDS = 30
_RECONNECT_SECONDS = 60.0
_DOWNLOAD_TRIES = 5


class Refused(Exception):
    """The server answered with a problem. `status` tells bad input (4xx) from a failure of its own."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status


class Unreachable(Exception):
    """No answer."""


class DigestMismatch(Exception):
    """A downloaded file is not the file that the server described."""


class Client:
    """One server."""

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        self._url = url
        self._http = httpx2.Client(
            base_url=url,
            headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
            # Answers to a long poll come late by design.
            timeout=httpx2.Timeout(30.0, read=_WAIT_SECONDS + 30.0),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def call(self, method: str, path: str, **kwargs: Any) -> dict[str, Any]:
        """The JSON object of an answer. Raises `Refused` and `Unreachable`."""
        try:
            response = self._http.request(method, path, **kwargs)
        except httpx2.TransportError as error:
            raise Unreachable(f"cannot reach {self._url}: {error}") from error
        _raise_for_problem(response)
        body: dict[str, Any] = response.json()
        return body

    def delete(self, path: str) -> None:
        """Delete a resource. Raises `Refused` and `Unreachable`."""
        try:
            response = self._http.delete(path)
        except httpx2.TransportError as error:
            raise Unreachable(f"cannot reach {self._url}: {error}") from error
        _raise_for_problem(response)

    def upload(self, file: Path, *, kind: str | None) -> str:
        """Create a dataset, send a file and confirm it; returns the dataset's id."""
        dataset = self.call("POST", "/v1/datasets", json={"filename": file.name, "format": kind})
        digest = hashlib.sha256()

        def chunks() -> Iterator[bytes]:
            with file.open("rb") as opened:
                while chunk := opened.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    yield chunk

        self.call("PUT", dataset["upload"]["url"], content=chunks())
        self.call("POST", f"/v1/datasets/{dataset['id']}/complete", json={"sha256": digest.hexdigest()})
        dataset_id: str = dataset["id"]
        return dataset_id

    def follow(self, job_id: str) -> Iterator[dict[str, Any]]:
        """The job now and after each change, until it has ended. Outlives a restart of the server."""
        job = self.call("GET", f"/v1/jobs/{job_id}")
        while True:
            yield job
            if job["status"] in ("succeeded", "failed", "cancelled"):
                return
            query = {"wait": _WAIT_SECONDS, "if_version": job["version"]}
            job = self._patiently(f"/v1/jobs/{job_id}", query)

    def download(self, artifact: dict[str, Any], folder: Path) -> Path:
        """One file into a folder.

        Resumed where an earlier try broke off, checked, then renamed into place.
        """
        target = folder / _plain_name(artifact["filename"])
        if target.is_file() and _sha256(target) == artifact["sha256"]:
            return target
        part = target.with_name(f".{target.name}.{artifact['sha256'][:16]}.part")
        for attempt in range(_DOWNLOAD_TRIES):
            try:
                self._fetch(artifact, part)
                break
            except httpx2.TransportError as error:
                if attempt == _DOWNLOAD_TRIES - 1:
                    raise Unreachable(f"the download of {target.name} broke off: {error}") from error
                time.sleep(2.0**attempt / 4)
        if _sha256(part) != artifact["sha256"]:
            part.unlink()
            raise DigestMismatch(f"{target.name} arrived damaged; download it again")
        os.replace(part, target)
        return target

    def _fetch(self, artifact: dict[str, Any], part: Path) -> None:
        done = part.stat().st_size if part.exists() else 0
        if done == artifact["bytes"]:
            part.touch()
            return
        headers = {"Range": f"bytes={done}-", "If-Range": f'"sha256-{artifact["sha256"]}"'} if done else {}
        # The bytes may be in a bucket, behind a signed URL.
        with self._http.stream("GET", artifact["url"], headers=headers, follow_redirects=True) as response:
            if response.is_error:
                response.read()
            _raise_for_problem(response)
            with part.open("ab" if response.status_code == 206 else "wb") as file:
                for chunk in response.iter_bytes(_CHUNK_BYTES):
                    file.write(chunk)

    def _patiently(self, path: str, query: dict[str, Any]) -> dict[str, Any]:
        """GET, again and again for a while when the server is away or not ready."""
        deadline = time.monotonic() + _RECONNECT_SECONDS
        while True:
            try:
                return self.call("GET", path, params=query)
            except (Unreachable, Refused) as error:
                if isinstance(error, Refused) and error.status < 500:
                    raise
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)


def _raise_for_problem(response: httpx2.Response) -> None:
    if response.is_success:
        return
    try:
        problem = response.json()
        fields = "".join(f" {field['pointer']} {field['message']}." for field in problem["errors"])
        detail = f"{problem['detail']}{fields}"
    except (ValueError, KeyError, TypeError):
        detail = f"the server answered {response.status_code}"
    raise Refused(response.status_code, detail)


def _plain_name(name: str) -> str:
    if Path(name).name != name or name in ("", ".", ".."):
        raise DigestMismatch("the server names a file outside of the folder")
    return name


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
