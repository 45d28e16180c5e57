"""The whole API against its own OpenAPI document: generated requests, and sequences of them along the links.

`schemathesis` reads the document from a running server, sends what fits it and what does not, and checks each answer:
no 5xx, a documented status, type, headers and body, and no way in without the key.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.infra.database import SyncDatabase
from app.infra.storage import Storage
from app.jobs.vocabulary import StepName
from app.principal import DEFAULT_PROJECT_ID
from tests.service.deletion.test_deletion import store_files
from tests.support.factories import advance, finish, queue_job
from tests.support.fleet import Api
from tests.support.paths import REPOSITORY
from tests.support.tenants import ALL, new_key

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "missing_required_header",
    "unsupported_method",
    "allow_header_conformance",
    "use_after_free",
    "ensure_resource_availability",
    "ignored_auth",
)
pytestmark = pytest.mark.slow
EXAMPLES = 8
SEED = 20


@pytest.fixture
def api(database_url: str, tmp_path: Path) -> Iterator[Api]:
    """The API on its own, with keys, on a database without jobs."""
    environment = {
        "ORTHOKV_DATABASE_URL": database_url,
        "ORTHOKV_DATA_DIR": str(tmp_path / "data"),
        "ORTHOKV_MODEL_ROOTS": '["/"]',
        "ORTHOKV_HUB_URL": "",
        "ORTHOKV_RATE_LIMIT_REQUESTS": "1000000",
        "ORTHOKV_MAX_WAIT_SECONDS": "0.1",
        "ORTHOKV_MAX_STREAM_SECONDS": "0.1",
    }
    with Api(tmp_path / "data", environment) as api:
        yield api


def test_every_answer_is_the_documents(
    api: Api, database: SyncDatabase, storage: Storage, tmp_path: Path
) -> None:
    job = queue_job(database)
    finish(database, advance(database, job.id, StepName.EVALUATE))
    store_files(database, storage, tmp_path)
    # Postgres differs in what it stores and refuses, which generated values find; what is sent by design is the same.
    postgres = database.engine.dialect.name == "postgresql"
    phases = "fuzzing,stateful" if postgres else "examples,coverage,fuzzing,stateful"
    key = new_key(database, DEFAULT_PROJECT_ID, ALL)
    command = [
        Path(sys.executable).with_name("schemathesis"),
        "run",
        f"{api.url}/openapi.json",
        f"--phases={phases}",
        f"--checks={','.join(CHECKS)}",
        f"--max-examples={EXAMPLES}",
        f"--seed={SEED}",
        "--no-shrink",
        "--continue-on-failure",
        "--generation-database=none",
        "--suppress-health-check=all",
        "--request-timeout=30",
        "--header",
        f"Authorization: Bearer {key}",
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "SCHEMATHESIS_HOOKS": "tests.service.http.contract_hooks",
    }
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=500, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-20_000:]}\n{done.stderr[-2_000:]}\n{api.log()[-5_000:]}"
