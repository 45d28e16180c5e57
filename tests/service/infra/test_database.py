"""The clock, transactions and migrations on both databases."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from alembic import command
from fastapi.testclient import TestClient
from sqlalchemy import func, inspect, select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from app.auth.repository import lock_project
from app.datasets.models import Dataset
from app.infra.database import Database, DatabaseUnusable, SyncDatabase, clock, now
from app.main import create_app
from app.migrate import alembic_config, upgrade
from app.principal import DEFAULT_PROJECT_ID
from app.settings import Settings
from tests.support.postgres import postgres_url
from tests.support.tenants import OWNER


def test_the_clock_is_the_present_in_utc(database: SyncDatabase) -> None:
    assert abs(database.read(clock) - datetime.now(UTC)) < timedelta(seconds=5)


def test_the_clock_moves_within_a_transaction(database: SyncDatabase) -> None:
    def watch(session: Session) -> None:
        first = clock(session)
        while clock(session) == first:  # ends only if it moves; the test's time limit is the failure
            pass
        assert clock(session) > first

    database.write(watch)


@pytest.mark.parametrize("seconds", [-3600.25, -0.001, 0.0, 0.5, 86_400.0])
def test_the_clock_adds_fractions_of_seconds(database: SyncDatabase, seconds: float) -> None:
    plain, moved = database.read(lambda session: session.execute(select(now(), now(seconds))).one())
    assert abs((moved - plain).total_seconds() - seconds) < 0.02


def test_stored_times_compare_with_the_clock(database: SyncDatabase) -> None:
    def store(session: Session) -> None:
        for name, offset in (("ds_past", -0.01), ("ds_future", 60.0)):
            row = Dataset(id=name, project_id=DEFAULT_PROJECT_ID, filename="x", format="text")
            row.created_at = now(offset)
            session.add(row)

    database.write(store)
    past = database.read(
        lambda session: session.execute(select(Dataset.id).where(Dataset.created_at < now())).scalars().all()
    )
    assert past == ["ds_past"]


def test_a_failing_transaction_leaves_nothing(database: SyncDatabase) -> None:
    def store_and_fail(session: Session) -> None:
        session.add(Dataset(id="ds_x", project_id=DEFAULT_PROJECT_ID, filename="x", format="text"))
        session.flush()
        raise RuntimeError("after the write")

    with pytest.raises(RuntimeError, match="after the write"):
        database.write(store_and_fail)
    assert database.read(lambda session: session.get(Dataset, "ds_x")) is None


def test_writers_that_wait_hold_up_no_reader(database_url: str, database: SyncDatabase) -> None:
    """Many of them, for a lock that another process holds."""
    waiting = 40

    def note(session: Session, number: int) -> None:
        lock_project(session, DEFAULT_PROJECT_ID)
        row = Dataset(id=f"ds_{number}", project_id=DEFAULT_PROJECT_ID, filename="x", format="text")
        session.add(row)

    async def crowd(asynchronous: Database) -> None:
        writers = [asyncio.create_task(asynchronous.write(note, number)) for number in range(waiting)]
        for _ in range(20):
            assert await asynchronous.read(stored) == 0
        released.set()
        await asyncio.gather(*writers)
        assert await asynchronous.read(stored) == waiting
        await asynchronous.close()

    def stored(session: Session) -> int:
        return session.execute(select(func.count()).select_from(Dataset)).scalar_one()

    def hold(session: Session) -> None:
        lock_project(session, DEFAULT_PROJECT_ID)
        held.set()
        released.wait(60)

    held, released = threading.Event(), threading.Event()
    holder = threading.Thread(target=database.write, args=(hold,))
    holder.start()
    try:
        assert held.wait(10)
        asyncio.run(crowd(Database(database_url)))
    finally:
        released.set()
        holder.join()


def test_a_request_that_gets_no_connection_in_time_is_told_so(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.infra.database._WAIT_SECONDS", 0.05)
    with TestClient(create_app(settings), headers=OWNER) as client:
        database = client.app.state.database  # type: ignore[attr-defined]
        monkeypatch.setattr(database, "_readers", asyncio.Semaphore(0))
        answer = client.get("/v1/jobs")
        assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
        assert answer.headers["Retry-After"] == "5"
        assert client.get("/readyz").status_code == 503


@pytest.fixture(params=["sqlite", "postgres"])
def bare_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database without any schema."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'bare.db'}"
        return
    with postgres_url() as url:
        yield url


def tables(url: str) -> set[str]:
    database = SyncDatabase(url)
    names = set(inspect(database.engine).get_table_names())
    database.close()
    return names


def test_migrations_make_exactly_the_models_and_can_be_undone(bare_url: str) -> None:
    upgrade(bare_url)
    command.check(alembic_config(bare_url))  # raises when models and schema differ
    assert "job" in tables(bare_url)
    command.downgrade(alembic_config(bare_url), "base")
    assert tables(bare_url) == {"alembic_version"}
    upgrade(bare_url)
    upgrade(bare_url)
    assert "job" in tables(bare_url)


def test_a_database_of_another_kind_is_refused() -> None:
    with pytest.raises(DatabaseUnusable, match="mysql"):
        SyncDatabase("mysql://localhost/x")


def test_a_server_that_says_nothing_is_not_waited_for_without_end() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        database = SyncDatabase(f"postgresql://nobody@127.0.0.1:{port}/none?connect_timeout=2")
        began = time.monotonic()
        with pytest.raises(OperationalError):
            database.read(lambda session: session.execute(text("SELECT 1")))
        assert time.monotonic() - began < 8
        database.close()


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
def test_every_connection_notices_a_dead_network(database: SyncDatabase) -> None:
    with database.engine.connect() as connection:
        driver = connection.connection.dbapi_connection
        assert driver is not None
        parameters = driver.info.get_parameters()
    assert parameters["tcp_user_timeout"] == "30000"
    assert parameters["connect_timeout"] == "10"


def test_a_file_that_cannot_be_written_is_an_error_of_the_database(tmp_path: Path) -> None:
    """As every other: a worker goes on, a request gets 503."""
    file = tmp_path / "orthokv.db"
    url = f"sqlite:///{file}"
    upgrade(url)
    database = SyncDatabase(f"sqlite:///file:{file}?mode=ro&uri=true")
    assert database.read(lambda session: session.execute(text("SELECT 1")).scalar_one()) == 1
    with pytest.raises(OperationalError, match="readonly"):
        database.write(lambda session: session.execute(text("DELETE FROM job")))
    database.close()
