"""One job on the demo model: three workers make the bytes that one worker makes."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from app.migrate import upgrade
from tests.crash.test_fleet import started_by
from tests.crash.test_real import BODY
from tests.crash.test_scripted import digests
from tests.support.fleet import Api, Worker
from tests.support.postgres import postgres_url

pytestmark = [pytest.mark.crash, pytest.mark.slow]


def test_three_workers_make_the_bytes_of_one(tmp_path: Path) -> None:
    with ExitStack() as stack:
        database = stack.enter_context(postgres_url())
        upgrade(database)
        environment = {
            "ORTHOKV_DATABASE_URL": database,
            "ORTHOKV_STORAGE_URL": (tmp_path / "objects").as_uri(),
            "ORTHOKV_LAYERS_PER_FIT_STEP": "1",
            "ORTHOKV_IDLE_POLL_SECONDS": "0.1",
            "ORTHOKV_AUTH_REQUIRED": "false",  # keys have tests of their own
            "OMP_NUM_THREADS": "1",
        }
        api = stack.enter_context(
            Api(tmp_path / "api", {**environment, "ORTHOKV_DATA_DIR": str(tmp_path / "api")})
        )
        with Worker(tmp_path / "alone", {**environment, "ORTHOKV_LAYERS_PER_FIT_STEP": "6"}):
            alone = api.wait_for_end(api.post("/v1/jobs", BODY)["id"])
        for number in range(3):
            stack.enter_context(Worker(tmp_path / f"worker-{number}", environment))
        shared = api.wait_for_end(api.post("/v1/jobs", BODY)["id"])
        assert started_by(api, alone["id"], "fit") == ["alone"]
        assert set(started_by(api, shared["id"], "fit")) == {"worker-0", "worker-1", "worker-2"}
        assert len(started_by(api, shared["id"], "fit")) == 6
        assert digests(api, shared) == digests(api, alone)
