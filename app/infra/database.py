"""Engines, transactions, column types and the one clock, for SQLite and Postgres.

Statements and domain functions are written once, against a synchronous `Session`: the worker calls them
directly, the API in a thread. Nothing inside commits; `read` and `write` here are the boundary.
"""

from __future__ import annotations

import asyncio
import random
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, Concatenate, ParamSpec, TypeVar

from anyio import CapacityLimiter, to_thread
from sqlalchemy import (
    JSON,
    BindParameter,
    DateTime,
    Dialect,
    Engine,
    Float,
    MetaData,
    String,
    create_engine,
    event,
    literal,
    select,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.engine import URL, Connection, make_url
from sqlalchemy.engine.interfaces import DBAPICursor
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, Session
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeDecorator

P = ParamSpec("P")
T = TypeVar("T")

SQLITE_BUSY_SECONDS = 30
_POSTGRES_PATIENCE = {
    "connect_timeout": "10",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "30000",  # milliseconds
}


class DatabaseUnusable(Exception):
    """The URL names no database that can be used: an unknown kind, no server there, a file of another kind."""


class Base(DeclarativeBase):
    """Base of every model. The naming convention lets a migration name a constraint it has to change."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


# Byte order, whatever the server's locale: pages are cut by comparing ids.
Id = String(40).with_variant(String(40, collation="C"), "postgresql")
Json = JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")


class UtcDateTime(TypeDecorator[datetime]):
    """An aware UTC time.

    SQLite keeps the text that `strftime` gives, so columns compare with the clock as text.
    """

    impl = DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> Any:
        if dialect.name == "sqlite":
            return dialect.type_descriptor(String(23))
        return dialect.type_descriptor(DateTime(timezone=True))

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> Any:
        if value is None or dialect.name != "sqlite":
            return value
        return value.astimezone(UTC).replace(tzinfo=None).isoformat(sep=" ", timespec="milliseconds")

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if dialect.name == "sqlite":
            return datetime.fromisoformat(value).replace(tzinfo=UTC)
        moment: datetime = value
        return moment.astimezone(UTC)


class now(FunctionElement[datetime]):
    """The database's clock, plus seconds. The only clock that leases and ordering may use."""

    type = UtcDateTime()
    inherit_cache = True

    def __init__(self, plus_seconds: float | BindParameter[float] = 0.0) -> None:
        bound = plus_seconds if isinstance(plus_seconds, BindParameter) else literal(plus_seconds, Float)
        super().__init__(bound)


@compiles(now, "postgresql")
def _now_postgres(element: now, compiler: SQLCompiler, **kw: Any) -> str:
    # now() and CURRENT_TIMESTAMP stand still within a transaction; a lease must not.
    return f"(clock_timestamp() + {compiler.process(element.clauses, **kw)} * interval '1 second')"


@compiles(now, "sqlite")
def _now_sqlite(element: now, compiler: SQLCompiler, **kw: Any) -> str:
    # unixepoch('subsec') is NULL before SQLite 3.42, and a NULL clock never expires a lease; strftime is as
    # old as SQLite.
    seconds = compiler.process(element.clauses, **kw)
    return f"strftime('%Y-%m-%d %H:%M:%f', 'now', printf('%+.3f seconds', {seconds}))"


def clock(session: Session) -> datetime:
    """The database's time, read once so that all times of one change agree."""
    return session.execute(select(now())).scalar_one()


@dataclass(frozen=True)
class Timeouts:
    """What Postgres ends by itself; SQLite has no such limits, but one for the wait for its one writer."""

    statement_seconds: float
    lock_seconds: float


def _limits(url: URL, timeouts: Timeouts | None) -> dict[str, str]:
    """What Postgres is told to end by itself."""
    if timeouts is None or url.get_backend_name() != "postgresql":
        return {}
    statement, lock = round(timeouts.statement_seconds * 1000), round(timeouts.lock_seconds * 1000)
    return {"options": f"-c statement_timeout={statement} -c lock_timeout={lock}"}


def _driver_url(url: str) -> URL:
    parsed = make_url(url)
    backend = parsed.get_backend_name()
    if backend == "sqlite":
        return parsed.set(drivername="sqlite+pysqlite")
    if backend == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    raise DatabaseUnusable(f"database {backend!r} is not supported: use sqlite or postgresql")


def _patience(url: URL) -> dict[str, str]:
    """How long a connection to Postgres waits for a network that swallows packets; the URL may say otherwise.

    Without it the kernel's own patience holds: about 15 minutes, in which a worker can neither report nor end.
    """
    return {} if url.get_backend_name() == "sqlite" else {**_POSTGRES_PATIENCE, **_said(url)}


def _said(url: URL) -> dict[str, str]:
    return {name: str(value) for name, value in url.query.items() if name in _POSTGRES_PATIENCE}


def _prepare(engine: Engine) -> None:
    """Connection settings.

    On SQLite transactions begin by our own statement, so that writers take the lock first.
    """
    if engine.dialect.name != "sqlite":
        return

    @event.listens_for(engine, "connect")
    def on_connect(connection: Any, _record: ConnectionPoolEntry) -> None:
        connection.isolation_level = None  # the driver must not begin transactions behind our back
        cursor = connection.cursor()
        for pragma in (
            "journal_mode=WAL",
            "foreign_keys=ON",
            "synchronous=FULL",  # an acknowledged job survives a power cut
            f"busy_timeout={SQLITE_BUSY_SECONDS * 1000}",
        ):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def on_begin(connection: Connection) -> None:
        # A deferred transaction that turns writer fails at once when another wrote meanwhile, whatever
        # busy_timeout says.
        kind = connection.get_execution_options().get("sqlite_begin", "IMMEDIATE")
        begin = f"BEGIN {kind}"
        if kind == "DEFERRED":
            connection.exec_driver_sql(begin)
            return
        # SQLite's own waiting asks ever more rarely, down to ten times a second: who came late wins, and a
        # writer among eight waits half a second for a lock that is held for milliseconds.
        deadline = time.monotonic() + SQLITE_BUSY_SECONDS
        cursor = connection.connection.cursor()
        cursor.execute("PRAGMA busy_timeout=0")
        try:
            while (began := _try(cursor, begin)) is False and time.monotonic() < deadline:
                time.sleep(random.uniform(0.0005, 0.002))
            if not began:
                connection.exec_driver_sql(begin)  # by SQLAlchemy, so that what fails is one of its errors
        finally:
            cursor.execute(f"PRAGMA busy_timeout={SQLITE_BUSY_SECONDS * 1000}")
            cursor.close()


def _try(cursor: DBAPICursor, begin: str) -> bool | None:
    """Whether the transaction began; False: another writer has the lock; None: something else is in the way."""
    try:
        cursor.execute(begin)
    except sqlite3.Error as error:
        return False if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY else None
    return True


def after_commit(session: Session, call: Callable[[], object]) -> None:
    """Call this once the transaction is committed, and never if it is not: for metrics and logs."""
    session.info.setdefault(_REPORTS, []).append(call)


def _report(session: Session) -> None:
    for call in session.info.pop(_REPORTS, ()):
        call()


_REPORTS = "after_commit"
_READERS, _WRITERS = 10, 5  # threads of an API process, and connections
_WAIT_SECONDS = 30.0
_READ = {"sqlite_begin": "DEFERRED"}
_WRITE = {"sqlite_begin": "IMMEDIATE"}


class SyncDatabase:
    """Transactions of a worker.

    The same functions, without an event loop. Safe to use from several threads.
    """

    def __init__(self, url: str, timeouts: Timeouts | None = None, *, connections: int = 5) -> None:
        driver_url = _driver_url(url)
        self.engine = create_engine(
            driver_url,
            pool_size=connections,
            pool_pre_ping=driver_url.get_backend_name() != "sqlite",  # a file does not go away
            connect_args={**_patience(driver_url), **_limits(driver_url, timeouts)},
        )
        _prepare(self.engine)
        # SQLite has one writer: threads of this process wait here, not by asking the file again and again.
        self._writers = threading.Lock() if driver_url.get_backend_name() == "sqlite" else nullcontext()

    def _run(self, options: dict[str, str], call: Callable[[Session], T]) -> T:
        with Session(self.engine, expire_on_commit=False) as session:
            with session.begin():
                session.connection(execution_options=options)
                result = call(session)
            _report(session)
            return result

    def read(self, function: Callable[Concatenate[Session, P], T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._run(_READ, lambda session: function(session, *args, **kwargs))

    def write(
        self, function: Callable[Concatenate[Session, P], T], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        with self._writers:
            return self._run(_WRITE, lambda session: function(session, *args, **kwargs))

    def close(self) -> None:
        self.engine.dispose()


class Database:
    """Transactions of the API: each call is one transaction in a thread, committed at the end.

    One hop to a thread and back for a whole transaction is cheaper than an asynchronous driver's hop for each
    of its statements (four and more), and SQLite has no other way. Reads and writes have threads of their own:
    whoever waits for a lock holds up no reader. Raises `PoolTimeout` when none becomes free in time.
    """

    def __init__(self, url: str, timeouts: Timeouts | None = None) -> None:
        self._database = SyncDatabase(url, timeouts, connections=_READERS + _WRITERS)
        self._threads = CapacityLimiter(_READERS + _WRITERS)
        self._readers, self._writers = asyncio.Semaphore(_READERS), asyncio.Semaphore(_WRITERS)

    async def read(
        self, function: Callable[Concatenate[Session, P], T], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        call = partial(self._database.read, function, *args, **kwargs)
        return await self._in_thread(call, self._readers)

    async def write(
        self, function: Callable[Concatenate[Session, P], T], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        call = partial(self._database.write, function, *args, **kwargs)
        return await self._in_thread(call, self._writers)

    async def _in_thread(self, call: Callable[[], T], free: asyncio.Semaphore) -> T:
        try:
            async with asyncio.timeout(_WAIT_SECONDS):
                await free.acquire()
        except TimeoutError:
            raise PoolTimeout(f"no connection became free within {_WAIT_SECONDS} s") from None
        try:
            return await to_thread.run_sync(call, limiter=self._threads)
        finally:
            free.release()

    async def close(self) -> None:
        await to_thread.run_sync(self._database.close)
