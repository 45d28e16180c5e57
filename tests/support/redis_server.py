"""A Redis for the tests: the first of these that works.

1. the server of `ORTHOKV_TEST_REDIS_URL`;
2. a server on 127.0.0.1:6379;
3. a private server from a binary on the PATH;
4. Debian's package, where we are root, then as 3;
5. a container.

A test that empties or kills its Redis begins at 3. Nothing is skipped in silence: where none works, the run
stops with one sentence.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator

import pytest
import redis

from tests.support.provision import free_port, install_debian_package, start_container, wait_for


@contextlib.contextmanager
def redis_url() -> Iterator[str]:
    """A Redis that others may use at the same time: tests take queues of their own."""
    with contextlib.ExitStack() as stack:
        url = (
            _configured()
            or _running()
            or _private(stack)
            or (_private(stack) if install_debian_package("redis-server") else None)
            or _container(stack)
        )
        yield _must(url)


class PrivateRedis:
    """A Redis of one test: emptied, killed, started again."""

    def __init__(self) -> None:
        self._port = free_port()
        self._stack = contextlib.ExitStack()
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"redis://127.0.0.1:{self._port}/0"

    def __enter__(self) -> PrivateRedis:
        self.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.kill()
        self._stack.close()

    def start(self) -> None:
        if _binary() is None:
            install_debian_package("redis-server")
        self._process = _start(self._stack, self._port)
        _must(wait_for(self.url, _answers) if self._process is not None else None)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def answers(self) -> bool:
        return _answers(self.url)

    def empty(self) -> None:
        with redis.Redis.from_url(self.url) as client:
            client.flushall()


def _must(url: str | None) -> str:
    if url is None:
        pytest.exit(
            "The tests need Redis: set ORTHOKV_TEST_REDIS_URL, start a server on 127.0.0.1:6379, put "
            "redis-server on the PATH, or make Docker available.",
            returncode=1,
        )
    return url


def _configured() -> str | None:
    url = os.environ.get("ORTHOKV_TEST_REDIS_URL")
    if url and not _answers(url):
        pytest.exit("ORTHOKV_TEST_REDIS_URL is set, but no server answers there.", returncode=1)
    return url or None


def _running() -> str | None:
    url = "redis://127.0.0.1:6379/0"
    return url if _answers(url) else None


def _private(stack: contextlib.ExitStack) -> str | None:
    port = free_port()
    process = _start(stack, port)
    if process is None:
        return None
    stack.callback(process.wait)
    stack.callback(process.send_signal, signal.SIGTERM)
    return wait_for(f"redis://127.0.0.1:{port}/0", _answers)


def _container(stack: contextlib.ExitStack) -> str | None:
    port = start_container(stack, "redis:7-alpine", 6379)
    return None if port is None else wait_for(f"redis://127.0.0.1:{port}/0", _answers)


def _binary() -> str | None:
    return shutil.which("redis-server") or shutil.which("valkey-server")


def _start(stack: contextlib.ExitStack, port: int) -> subprocess.Popen[bytes] | None:
    binary = _binary()
    if binary is None:
        return None
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="orthokv-redis-"))
    return subprocess.Popen(
        [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=folder,
    )


def _answers(url: str) -> bool:
    try:
        with redis.Redis.from_url(url, socket_connect_timeout=3, socket_timeout=3) as client:
            return bool(client.ping())
    except redis.RedisError:
        return False
