"""A Postgres for the tests: the first of these that works.

1. the server of `ORTHOKV_TEST_POSTGRES_URL`;
2. a server on 127.0.0.1:5432 that lets `postgres` or the current user in;
3. a private server from binaries on the PATH or in Debian's place;
4. Debian's package, where we are root, then as 3;
5. a container.

Nothing is skipped in silence: where none works, the run stops with one sentence.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from tests.support.provision import free_port, install_debian_package, start_container, wait_for


@contextlib.contextmanager
def postgres_url() -> Iterator[str]:
    """The URL of a new, empty database, dropped at the end."""
    with contextlib.ExitStack() as stack:
        server = _configured() or _running() or _private(stack) or _installed(stack) or _container(stack)
        if server is None:
            pytest.exit(
                "The tests need Postgres: set ORTHOKV_TEST_POSTGRES_URL, start a server on 127.0.0.1:5432, put "
                "initdb and postgres on the PATH, or make Docker available.",
                returncode=1,
            )
        yield stack.enter_context(_new_database(server))


@contextlib.contextmanager
def _new_database(server: str) -> Iterator[str]:
    name = f"orthokv_test_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        info = connection.info
        password = f":{info.password}" if info.password else ""
        url = f"postgresql://{info.user}{password}@{info.host}:{info.port}/{name}"
    try:
        yield url
    finally:
        with psycopg.connect(server, autocommit=True) as connection:
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def _configured() -> str | None:
    url = os.environ.get("ORTHOKV_TEST_POSTGRES_URL")
    if url and not _answers(url):
        pytest.exit("ORTHOKV_TEST_POSTGRES_URL is set, but no server answers there.", returncode=1)
    return url or None


def _running() -> str | None:
    users = dict.fromkeys(("postgres", getpass.getuser(), "root"))
    urls = (_conninfo(5432, user) for user in users)
    return next((url for url in urls if _answers(url)), None)


def _private(stack: contextlib.ExitStack) -> str | None:
    server = PrivatePostgres()
    if not server.make(stack):
        return None
    server.start()
    stack.callback(server.stop)
    return server.conninfo if wait_for(server.conninfo, _answers) else None


class PrivatePostgres:
    """A server of our own in a temporary folder and on a free port: killed, started again.

    Without `fsync`, so it survives the death of its processes and not that of the machine.
    """

    def __init__(self) -> None:
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._account: dict[str, Any] = {}
        self._command: list[str] = []
        self.conninfo = _conninfo(self._port, "postgres")
        self.url = f"postgresql://postgres@127.0.0.1:{self._port}/postgres"

    def make(self, stack: contextlib.ExitStack) -> bool:
        """Make the data folder, removed with the stack; False where that cannot be done."""
        binaries = _binaries()
        user = _unprivileged_user()
        if binaries is None or user is None:
            return False
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="orthokv-postgres-")))
        account = pwd.getpwnam(user)
        environment = {"PATH": os.environ["PATH"], "LC_ALL": "C", "HOME": str(folder)}
        self._account = {"cwd": folder, "env": environment}
        if os.getuid() == 0:
            os.chown(folder, account.pw_uid, account.pw_gid)
            self._account |= {"user": account.pw_uid, "group": account.pw_gid}
        data = folder / "data"
        options = {"listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": "off"}
        self._command = [str(binaries / "postgres"), "-D", str(data), "-p", str(self._port)]
        self._command += [f"-c{name}={value}" for name, value in options.items()]
        made = subprocess.run(
            [binaries / "initdb", "-D", data, "-U", "postgres", "--auth=trust", "-E", "UTF8", "--no-sync"],
            capture_output=True,
            check=False,
            **self._account,
        )
        return made.returncode == 0

    def start(self) -> None:
        self._process = subprocess.Popen(
            self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **self._account
        )

    def restart(self) -> None:
        """Start until it answers: the orphans of a killed server keep its memory for a moment."""
        while True:
            self.start()
            while self._process is not None and self._process.poll() is None:
                if _answers(self.conninfo):
                    return
                time.sleep(0.05)
            time.sleep(0.1)

    def family(self) -> list[psutil.Process]:
        """The server and its backends."""
        assert self._process is not None
        server = psutil.Process(self._process.pid)
        return [server, *server.children()]

    def kill(self) -> None:
        """`kill -9` of the server; its backends follow by themselves."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """A fast shutdown: it waits for no client."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait()


def _installed(stack: contextlib.ExitStack) -> str | None:
    return _private(stack) if install_debian_package("postgresql") else None


def _container(stack: contextlib.ExitStack) -> str | None:
    options = ["-e", "POSTGRES_HOST_AUTH_METHOD=trust"]
    arguments = ["-c", "fsync=off"]
    port = start_container(stack, "postgres:17-alpine", 5432, options=options, arguments=arguments)
    return None if port is None else wait_for(_conninfo(port, "postgres"), _answers)


def _binaries() -> Path | None:
    """Folder of initdb and postgres; of several Debian versions the newest."""
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else []
    folders += sorted(
        Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name), reverse=True
    )
    return next((f for f in folders if (f / "initdb").exists() and (f / "postgres").exists()), None)


def _unprivileged_user() -> str | None:
    """Postgres refuses to run as root."""
    if os.getuid() != 0:
        return getpass.getuser()
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    return None


def _conninfo(port: int, user: str) -> str:
    return make_conninfo(host="127.0.0.1", port=port, user=user, dbname="postgres", connect_timeout=3)


def _answers(url: str) -> bool:
    try:
        with psycopg.connect(url) as connection:
            row = connection.execute(
                "SELECT rolcreatedb OR rolsuper FROM pg_roles WHERE rolname = current_user"
            ).fetchone()
            return row is not None and bool(row[0])
    except psycopg.Error:
        return False
