"""A runner process: started with nothing it does not need, read line by line, killed as a whole group."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import IO

from workers.limits import TETHER, Excess, Limits, Watchdog
from workers.protocol import MAX_LINE_BYTES, Message, Request, parse

STDERR_TAIL_BYTES = 16_384
MAX_SAID_LINES = 500
MAX_SAID_CHARACTERS = 2_000

# What a Python program with torch and a model hub needs. Database and storage credentials are not among it.
_PASSED_ON = (
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "TZ",
    "PYTHONPATH",
    "VIRTUAL_ENV",
    "LD_LIBRARY_PATH",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "XDG_CACHE_HOME",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "HF_ENDPOINT",
    "SSL_CERT_FILE",
)


class Child:
    """One run of the runner."""

    def __init__(
        self,
        command: Sequence[str],
        request: Request,
        *,
        environment: Sequence[str],
        limits: Limits,
        on_line: Callable[[str], object],
    ) -> None:
        """Start it. `on_line` is called, in a thread, with the lines it writes to stderr, within bounds."""
        names = (*_PASSED_ON, *environment)
        passed_on = {name: os.environ[name] for name in names if name in os.environ}
        if not limits.network:
            passed_on["HF_HUB_OFFLINE"] = "1"  # the hub's client looks into its cache at once
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(TETHER), str(os.getpid()), limits.of_kernel, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**passed_on, "TMPDIR": request.workdir, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        self._watchdog = Watchdog(self._process.pid, limits, self.kill)
        self._tail = b""
        self._said = 0
        self._on_line = on_line
        self._tail_reader = threading.Thread(target=self._read_stderr, name="child-stderr", daemon=True)
        self._tail_reader.start()
        self._ender = threading.Thread(target=self._end_group, name="child-end", daemon=True)
        self._ender.start()
        stdin = self._pipe(self._process.stdin)
        with contextlib.suppress(BrokenPipeError):  # a child that died at once shows in its exit status
            stdin.write(request.model_dump_json().encode())
            stdin.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def excess(self) -> Excess | None:
        """The limit for which the child was killed."""
        return self._watchdog.excess

    def messages(self) -> Iterator[Message]:
        """Messages until the child closes its stdout. Raises `ProtocolError`."""
        stdout = self._pipe(self._process.stdout)
        while line := stdout.readline(MAX_LINE_BYTES + 1):
            if not line.endswith(b"\n") and len(line) <= MAX_LINE_BYTES:
                return  # killed in the middle of a line
            yield parse(line)

    def kill(self) -> None:
        """Kill the whole group, at once. Safe from any thread and after the end."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Exit status, negative for a signal."""
        self._ender.join()
        self._tail_reader.join()
        return self._process.wait()

    def stderr_tail(self) -> str:
        return self._tail.decode(errors="replace")

    def _end_group(self) -> None:
        """When the child ends, end what it left running.

        A grandchild that holds the pipes would hold us, too.
        """
        self._process.wait()
        self._watchdog.stop()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _read_stderr(self) -> None:
        stderr = self._pipe(self._process.stderr)
        begun = b""
        while chunk := os.read(stderr.fileno(), 65_536):
            self._tail = (self._tail + chunk)[-STDERR_TAIL_BYTES:]
            *lines, begun = (begun + chunk).split(b"\n")
            begun = begun[-STDERR_TAIL_BYTES:]
            for line in lines:
                self._pass_on(line)
        self._pass_on(begun)

    def _pass_on(self, line: bytes) -> None:
        # Of a progress bar that draws over itself, the last state.
        text = line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace").rstrip()
        if text and self._said <= MAX_SAID_LINES:
            self._said += 1
            over = self._said > MAX_SAID_LINES
            self._on_line("(more lines are not logged)" if over else text[:MAX_SAID_CHARACTERS])

    @staticmethod
    def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
        assert pipe is not None, "every stream of the child is a pipe"
        return pipe
