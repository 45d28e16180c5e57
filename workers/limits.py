"""How much memory, time and room in a file one step may take, and what ends one that takes more.

Files and descriptors are limited by the kernel (`workers/tether.py`). Memory is not: `RLIMIT_AS` and `RLIMIT_DATA` count
address space, of which CUDA reserves many times what there is, and would end every GPU job. So a thread of the
supervisor looks at what the child and its children really hold, in memory that the kernel cannot take back; model files
that are mapped do not count. One that grows faster than the thread looks is the kernel's: the child carries the
highest `oom_score_adj`. `RLIMIT_NPROC` counts every process and thread of the user, on the whole machine, and so
would limit the workers by each other: what a child starts is killed with its group instead.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from app.jobs.vocabulary import StepName
from app.settings import Settings

TETHER = Path(__file__).with_name("tether.py")
OPEN_FILES = 4096
_LOOK_SECONDS = 0.2
_SHARE_OF_MACHINE = 0.95
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


class CannotIsolate(Exception):
    """This machine or container gives a process no namespace without a network."""


class Excess(Enum):
    """Which limit a step exceeded."""

    MEMORY = "memory"
    TIME = "time"


@dataclass(frozen=True)
class Limits:
    """Limits of one step; None: none."""

    memory_bytes: int | None
    seconds: float | None
    file_bytes: int
    network: bool

    @classmethod
    def of(cls, settings: Settings, step: StepName) -> Limits:
        """The settings' limits; without one of their own for memory, nearly all that the machine or container has."""
        memory = settings.step_memory_bytes or _nearly_all_memory()
        network = step is StepName.RESOLVE or not settings.isolate_steps
        return cls(memory, settings.step_seconds, settings.step_file_bytes, network)

    @property
    def of_kernel(self) -> str:
        """For the tether."""
        return f"FSIZE={self.file_bytes},NOFILE={OPEN_FILES}" + ("" if self.network else ",NETWORK=0")


class Watchdog:
    """Looks after a child until `stop`, and calls `kill` when it exceeds a limit; `excess` then says which."""

    def __init__(self, session: int, limits: Limits, kill: Callable[[], None]) -> None:
        self._session = session
        self._limits = limits
        self._kill = kill
        self._ended = threading.Event()
        self._deadline = None if limits.seconds is None else time.monotonic() + limits.seconds
        self.excess: Excess | None = None
        self._thread = threading.Thread(target=self._look_until_ended, name="child-limits", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def _look_until_ended(self) -> None:
        while not self._ended.wait(_LOOK_SECONDS):
            self.excess = self._exceeded()
            if self.excess is not None:
                self._kill()
                return

    def _exceeded(self) -> Excess | None:
        if self._deadline is not None and time.monotonic() > self._deadline:
            return Excess.TIME
        limit = self._limits.memory_bytes
        if limit is not None and memory_of_session(self._session) > limit:
            return Excess.MEMORY
        return None


def require_isolation() -> None:
    """Raises `CannotIsolate`, before any job meets it."""
    refused = "ORTHOKV_ISOLATE_STEPS cannot be kept here"
    if sys.platform != "linux":
        raise CannotIsolate(f"{refused}: this is not Linux")
    command = [sys.executable, "-I", "-S", str(TETHER), str(os.getpid()), "NETWORK=0", "true"]
    tried = subprocess.run(command, check=False, capture_output=True, text=True)
    if tried.returncode != 0:
        _, _, reason = tried.stderr.strip().rpartition("\n")
        raise CannotIsolate(f"{refused}: {reason}")


def memory_of_session(session: int) -> int:
    """Bytes of memory that the processes of a session hold and the kernel cannot take back (Linux; elsewhere 0)."""
    total = 0
    # Five times a second over every process of the machine: plain calls, not paths.
    numbers = os.listdir("/proc") if os.path.isdir("/proc") else []
    for number in filter(str.isdecimal, numbers):
        with contextlib.suppress(OSError, ValueError):  # it has just ended
            if os.getsid(int(number)) == session:
                total += _memory_of(Path("/proc", number))
    return total


def _memory_of(process: Path) -> int:
    found = 0
    for line in (process / "status").read_text().splitlines():
        if line.startswith(("RssAnon:", "RssShmem:")):
            found += int(line.split()[1]) << 10
    return found


def _nearly_all_memory() -> int | None:
    if sys.platform != "linux":
        return None
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):  # no limit, or not this kind of cgroup
        memory = min(memory, int(_CGROUP_LIMIT.read_text()))
    return int(memory * _SHARE_OF_MACHINE)
