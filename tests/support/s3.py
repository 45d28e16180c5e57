"""A stand-in for an S3-compatible object store, from PyPI: a process of its own, started on a free port."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import httpx2

from tests.support.provision import free_port, wait_for


@dataclass(frozen=True)
class Bucket:
    """An empty bucket and how to reach it."""

    name: str
    endpoint: str

    @property
    def url(self) -> str:
        return f"s3://{self.name}/calibration"

    @property
    def options(self) -> dict[str, str]:
        return {
            "endpoint": self.endpoint,
            "region": "us-east-1",
            "access_key_id": "key",
            "secret_access_key": "secret",
        }

    @property
    def environment(self) -> dict[str, str]:
        """For a process that is to use the bucket."""
        return {"ORTHOKV_STORAGE_URL": self.url, "ORTHOKV_STORAGE_OPTIONS": json.dumps(self.options)}


@contextlib.contextmanager
def s3_endpoint() -> Iterator[str]:
    """URL of a server without any bucket."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        endpoint = wait_for(f"http://127.0.0.1:{port}", _answers)
        assert endpoint is not None, "the stand-in object store did not start"
        yield endpoint
    finally:
        process.terminate()
        process.wait()


def new_bucket(endpoint: str) -> Bucket:
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    httpx2.put(f"{endpoint}/{name}").raise_for_status()
    return Bucket(name, endpoint)


def _answers(endpoint: str) -> bool:
    try:
        return httpx2.get(endpoint, timeout=3).is_success
    except httpx2.TransportError:
        return False
