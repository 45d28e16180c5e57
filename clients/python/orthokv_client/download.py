"""Downloads: several ranges at once, resumed where they broke off, checked, and only then given their names."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import httpx2

from orthokv_client.errors import ApiError, StoreRefused, UnexpectedAnswer, Unreachable
from orthokv_client.models import Artifact
from orthokv_client.partfile import PartFile
from orthokv_client.protocol import PATIENT, Settings, problem

CONNECTIONS = 4
Progress = Callable[[Artifact, int], None]
"""Called with an artifact and how many bytes of it have come since the last call; by several threads."""

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)", re.ASCII)
_MAY_PASS = (408, 429, 500, 502, 503, 504)


class _Stopped(Exception):
    """Nobody waits for this download any more."""


def download(
    settings: Settings,
    artifacts: Sequence[Artifact],
    folder: Path,
    *,
    connections: int = CONNECTIONS,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> list[Path]:
    """Files into a folder, which is made; their paths.

    What is there already and has the right digest is left as it is. `connections` bounds how many are open at once.
    Raises `ApiError`, `Unreachable`, `DigestMismatch`, `NotEnoughSpace`, `DownloadInUse` and `OSError`.
    """
    if connections < 1:
        raise ValueError("connections must be at least 1")
    targets = [folder / _plain_name(artifact.filename) for artifact in artifacts]
    folder.mkdir(parents=True, exist_ok=True)
    tell = progress or (lambda artifact, count: None)
    limits = httpx2.Limits(max_connections=connections, max_keepalive_connections=connections)
    # Two clients: what a signed URL names is another's server, which must not see the key.
    timeout = httpx2.Timeout(settings.timeout_seconds)
    with (
        httpx2.Client(**{**settings.options(), "timeout": timeout}, limits=limits) as api,
        httpx2.Client(timeout=timeout, limits=limits, follow_redirects=False) as store,
        ThreadPoolExecutor(connections) as pool,
    ):
        source = _Source(settings, api, store, tell, stop or threading.Event())
        for artifact, target in zip(artifacts, targets, strict=True):
            if target.is_file() and _is(artifact, target):
                tell(artifact, artifact.bytes)
            else:
                source.fetch(artifact, target, pool)
    return targets


class _Source:
    """Where the bytes come from."""

    def __init__(
        self,
        settings: Settings,
        api: httpx2.Client,
        store: httpx2.Client,
        tell: Progress,
        stop: threading.Event,
    ) -> None:
        self._settings, self._api, self._store, self._tell, self._stop = settings, api, store, tell, stop

    def fetch(self, artifact: Artifact, target: Path, pool: ThreadPoolExecutor) -> None:
        with PartFile(target, size=artifact.bytes, sha256=artifact.sha256) as part:
            self._tell(artifact, part.size - part.missing)
            if part.missing:
                part.reserve()
                broken = threading.Event()
                jobs = [
                    pool.submit(self._segment, artifact, part, index, broken)
                    for index in range(part.segments)
                ]
                try:
                    _all_of(jobs)
                finally:
                    broken.set()
                    for job in jobs:
                        job.cancel()
                    wait(jobs)
            part.finish()

    def _segment(self, artifact: Artifact, part: PartFile, segment: int, broken: threading.Event) -> None:
        """One segment to its end. An attempt that brings something does not count as a failure."""
        failures = 0
        while True:
            start, end = part.rest(segment)
            if start == end:
                return
            pause = 0.0
            try:
                with self._range(artifact, start, end) as chunks:
                    for chunk in chunks:
                        if self._stop.is_set() or broken.is_set():
                            raise _Stopped
                        if len(chunk) > end - part.rest(segment)[0]:
                            raise UnexpectedAnswer("the server sends more than the range that was asked for")
                        part.write(segment, chunk)
                        self._tell(artifact, len(chunk))
            except httpx2.TransportError as error:
                failures = 1 if part.rest(segment)[0] > start else failures + 1
                if failures >= PATIENT.attempts:
                    raise Unreachable(f"the download of {artifact.filename} broke off: {error}") from error
                pause = PATIENT.pause(failures)
            except ApiError as error:
                failures += 1
                pause = max(PATIENT.pause(failures), error.retry_after_seconds or 0.0)
                may_pass = error.status in _MAY_PASS or isinstance(error, StoreRefused)
                if not may_pass or failures >= PATIENT.attempts or pause > 60:
                    raise
            finally:
                part.count(segment)
            if broken.wait(pause) or self._stop.is_set():
                raise _Stopped

    @contextmanager
    def _range(self, artifact: Artifact, start: int, end: int) -> Iterator[Iterator[bytes]]:
        """The bytes `start` to `end`, exclusive, from the API or from where it sends us."""
        asked = {"Accept-Encoding": "identity", "Range": f"bytes={start}-{end - 1}"}
        path = f"/v1/artifacts/{artifact.id}/content"
        ours = {**asked, "Accept": "*/*", "If-Range": f'"sha256-{artifact.sha256}"'}
        with self._api.stream("GET", path, headers=ours) as response:
            if response.status_code != 307:
                yield _body(response, artifact, start, end)
                return
            location = response.headers.get("Location", "")
        if not location.startswith(("http://", "https://")):
            raise UnexpectedAnswer("the server sends downloads to no URL")
        with self._store.stream("GET", location, headers=asked) as response:
            if response.status_code == 403:  # the signature has run out, for one: the API makes another
                raise StoreRefused("the object store refused a signed URL", status=403, code="unknown")
            yield _body(response, artifact, start, end)


def _body(response: httpx2.Response, artifact: Artifact, start: int, end: int) -> Iterator[bytes]:
    """Checked to be that range before a byte of it is taken."""
    if not response.is_success:
        response.read()
        raise problem(response)
    whole = (start, end) == (0, artifact.bytes)
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    given = tuple(map(int, match.groups())) if match else None
    is_range = response.status_code == 206 and given == (start, end - 1, artifact.bytes)
    if not is_range and not (response.status_code == 200 and whole):
        raise UnexpectedAnswer("the server does not send the range that was asked for")
    return response.iter_raw()


def _all_of(jobs: Sequence[Future[None]]) -> None:
    done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
    errors = [error for job in done if (error := job.exception()) is not None]
    # One that was stopped tells less than what stopped it.
    for error in sorted(errors, key=lambda error: isinstance(error, _Stopped)):
        raise error


def _plain_name(name: str) -> str:
    if Path(name).name != name or name in ("", ".", "..") or "\0" in name:
        raise UnexpectedAnswer("the server names a file outside of the folder")
    return name


def _is(artifact: Artifact, path: Path) -> bool:
    if path.stat().st_size != artifact.bytes:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == artifact.sha256
