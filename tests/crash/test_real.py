"""`kill -9` in the middle of a real job on the demo model: the result is that of an unbroken run, byte by byte."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.crash.test_scripted import digests
from tests.support.orthokv_server import Server, until
from tests.support.paths import DEMO

pytestmark = pytest.mark.crash

BODY: dict[str, Any] = {
    "model": {"id": str(DEMO)},
    "dataset": {"source": "self", "num_samples": 4, "sequence_length": 64},
    "budget": {"metric": "kept", "value": 0.25},
    "method": {"steps": 40, "refine_steps": 20},
}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    environment = {
        "ORTHOKV_DRAIN_SECONDS": "0",
        "ORTHOKV_RETRY_BACKOFF_SECONDS": "0.05",
        "OMP_NUM_THREADS": "1",
    }
    with Server(tmp_path / "data", environment) as server:
        yield server


def test_kills_of_child_and_server_change_no_byte(server: Server) -> None:
    unbroken = digests(server, server.wait_for_end(server.post("/v1/jobs", BODY)["id"]))
    job_id = server.post("/v1/jobs", BODY)["id"]

    until(lambda: server.layers(job_id), "a layer is fitted")
    runner = server.runner()
    assert runner is not None
    runner.kill()
    runner.wait(30)
    safe = server.layers(job_id)
    assert 1 <= len(safe) < 6

    until(lambda: len(server.layers(job_id)) > len(safe), "another layer is fitted")
    server.kill()
    server.start()
    safe_before_restart = server.layers(job_id)
    assert set(safe) < set(safe_before_restart)
    assert len(safe_before_restart) < 6

    job = server.wait_for_end(job_id)
    assert digests(server, job) == unbroken
    layers = server.get(f"/v1/jobs/{job_id}/layers")["data"]
    assert [layer["layer"] for layer in layers] == list(range(6))
    # Each kill cost the layer in hand and no other: what was safe was never fitted again.
    assert [layer["attempt"] for layer in layers] == sorted(layer["attempt"] for layer in layers)
    assert {layer["attempt"] for layer in layers} == {1, 2, 3}
