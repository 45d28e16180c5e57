"""Each test of the service runs on SQLite and on Postgres, on a schema that the migrations made."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from fastapi.testclient import TestClient
from pydantic import SecretStr
from sqlalchemy import text
from sqlalchemy.orm import Session

from app.auth.models import Project
from app.infra.database import SyncDatabase
from app.infra.storage import Storage
from app.main import create_app
from app.migrate import upgrade
from app.models import metadata
from app.principal import DEFAULT_PROJECT_ID
from app.settings import Settings
from tests.support.driven import Clients
from tests.support.factories import Script
from tests.support.paths import SCRIPTED_RUNNER
from tests.support.postgres import postgres_url
from tests.support.redis_server import PrivateRedis, redis_url
from tests.support.s3 import Bucket, new_bucket, s3_endpoint
from tests.support.tenants import OWNER, TOKEN

# The default renderer draws tracebacks with all locals, which takes seconds.
structlog.configure(
    processors=[structlog.processors.format_exc_info, structlog.processors.KeyValueRenderer()]
)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    with postgres_url() as url:
        upgrade(url)
        yield url


@pytest.fixture(scope="session")
def broker_url() -> Iterator[str]:
    with redis_url() as url:
        yield url


@pytest.fixture
def private_redis() -> Iterator[PrivateRedis]:
    with PrivateRedis() as server:
        yield server


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    with s3_endpoint() as endpoint:
        yield endpoint


@pytest.fixture
def bucket(s3: str) -> Bucket:
    return new_bucket(s3)


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("sqlite") / "template.db"
    upgrade(f"sqlite:///{file}")
    return file


def empty(url: str) -> None:
    """Delete every row but the one that the migrations made."""
    database = SyncDatabase(url)
    names = ", ".join(f'"{name}"' for name in metadata.tables)
    default = Project(id=DEFAULT_PROJECT_ID, name="default")

    def clear(session: Session) -> None:
        session.execute(text(f"TRUNCATE {names} CASCADE"))
        session.add(default)

    database.write(clear)
    database.close()


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty, migrated database."""
    if request.param == "postgres":
        url: str = request.getfixturevalue("postgres")
        empty(url)
        return url
    return copy_of(request.getfixturevalue("sqlite_template"), tmp_path)


def copy_of(template: Path, folder: Path) -> str:
    """URL of a copy of a migrated SQLite file."""
    shutil.copy(template, folder / "test.db")
    return f"sqlite:///{folder / 'test.db'}"


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """What the runner of this test will do."""
    return Script(tmp_path / "script")


@pytest.fixture
def settings(database_url: str, tmp_path: Path, script: Script) -> Settings:
    return Settings(
        data_dir=tmp_path / "data",
        database_url=database_url,
        auth_required=False,
        token=SecretStr(TOKEN),
        allowed_hosts=("testserver",),
        poll_seconds=0.02,
        idle_poll_seconds=0.05,
        lease_seconds=30,
        heartbeat_seconds=0.2,
        reaper_seconds=3600,  # tests sweep by hand
        webhook_senders=0,  # and send by hand
        drain_seconds=5,
        retry_backoff_seconds=0.01,
        progress_seconds=0.01,
        runner_command=(sys.executable, str(SCRIPTED_RUNNER), str(script.folder)),
    )


@pytest.fixture
def database(settings: Settings) -> Iterator[SyncDatabase]:
    database = SyncDatabase(settings.resolved_database_url)
    yield database
    database.close()


@pytest.fixture
def storage(settings: Settings) -> Storage:
    return Storage(settings.resolved_storage_url)


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    """Of the owner, or of nobody where keys alone count."""
    headers = {} if settings.auth_required else OWNER
    with TestClient(create_app(settings), raise_server_exceptions=False, headers=headers) as client:
        yield client


@pytest.fixture
def make(database_url: str) -> Iterator[Clients]:
    """Makes Python clients: synchronous beside SQLite, asynchronous beside Postgres, so that every test meets all four."""
    clients = Clients("sync" if database_url.startswith("sqlite") else "async")
    yield clients
    clients.close()
