"""What the servers of the tests have in common: a free port, Debian's packages, a container, patience."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Sequence

START_SECONDS = 60.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for(url: str, answers: Callable[[str], bool]) -> str | None:
    """The URL, once a server answers there; None when that never happens."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if answers(url):
            return url
        time.sleep(0.1)
    return None


def install_debian_package(name: str) -> bool:
    """True when the package is there afterwards; only root on a Debian can do that."""
    if os.getuid() != 0 or shutil.which("apt-get") is None:
        return False
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    commands = (["apt-get", "update", "-qq"], ["apt-get", "install", "-qq", "-y", name])
    return all(
        subprocess.run(command, capture_output=True, env=environment, check=False).returncode == 0
        for command in commands
    )


def start_container(
    stack: contextlib.ExitStack,
    image: str,
    port: int,
    *,
    options: Sequence[str] = (),
    arguments: Sequence[str] = (),
) -> int | None:
    """The local port of a container's port; None without a working Docker."""
    if shutil.which("docker") is None:
        return None
    local = free_port()
    name = f"orthokv-test-{uuid.uuid4().hex[:12]}"
    command = ["docker", "run", "-d", "--rm", "--name", name, "-p", f"127.0.0.1:{local}:{port}"]
    command += [*options, image, *arguments]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        return None
    stack.callback(subprocess.run, ["docker", "stop", "-t", "1", name], capture_output=True, check=False)
    return local
