"""Places at which a test can make a process die, pause or fail.

`ORTHOKV_FAILPOINT=NAME:ACTION[:N]` does ACTION (`kill`, `sleep` or `raise`) when the process comes by NAME for the N-th
time (1). It has an effect only where `ORTHOKV_FAILPOINT_DIR` names a folder, and only once for that folder: the
process leaves a file called NAME there first, so the one that takes over comes through. Imports nothing that takes
time, since the runner has failpoints, too.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

SLEEP_SECONDS = 5.0
ACTIONS = ("kill", "sleep", "raise")
STEPS = ("resolve", "calibrate", "fit", "profile", "package", "evaluate")
CHILD = tuple(f"child.{step}" for step in STEPS)
"""After a step's work, before its result is reported."""
WORKER = (
    "claim.committed",
    "heartbeat.before",
    "heartbeat.after",
    "upload.before",
    "upload.after",
    "layer.committed",
    "finish.before",
    "finish.after",
)
API = (
    "dataset.stored",
    "dataset.completing",
    "job.committed",
    "reaper.returning",
    "reaper.mid_sweep",
    "reaper.orphans",
)
TRANSITION = ("transition.enter", "transition.recorded", "transition.committed")
"""Of whichever process changes the status of a job."""
NAMES = (*CHILD, *WORKER, *API, *TRANSITION)


class FailpointRaised(Exception):
    """What the action `raise` raises: a defect that nobody expects."""


@dataclass
class _Armed:
    name: str
    action: str
    remaining: int
    folder: Path


_armed: _Armed | None = None


def arm(failpoint: str, folder: Path | None) -> None:
    """Set this process's failpoint; without a folder there is none. Raises `ValueError` for one that does not exist."""
    global _armed
    _armed = None
    if folder is None or not failpoint:
        return
    name, action, count = parse(failpoint)
    _armed = _Armed(name, action, count, folder)


def arm_from_environment() -> None:
    """As `arm`, for a process without settings: the runner, where `ORTHOKV_RUNNER_ENVIRONMENT` lets the variables in."""
    folder = os.environ.get("ORTHOKV_FAILPOINT_DIR")
    arm(os.environ.get("ORTHOKV_FAILPOINT", ""), Path(folder) if folder else None)


def parse(failpoint: str) -> tuple[str, str, int]:
    """(name, action, count). Raises `ValueError`."""
    name, _, rest = failpoint.partition(":")
    action, _, count = rest.partition(":")
    if name not in NAMES or action not in ACTIONS or not (count or "1").isdecimal() or count == "0":
        raise ValueError(f"must be NAME:ACTION[:N] with an action of {', '.join(ACTIONS)} and a known name")
    return name, action, int(count or "1")


def hit(name: str) -> None:
    """The process comes by this place."""
    if _armed is not None and _armed.name == name:
        _trigger(_armed)


def hit_after_commit(session: Session, name: str) -> None:
    """As `hit`, once the transaction of this session is committed."""
    if _armed is not None and _armed.name == name:
        from sqlalchemy import event

        event.listen(session, "after_commit", lambda _session: hit(name), once=True)


def _trigger(armed: _Armed) -> None:
    armed.remaining -= 1
    if armed.remaining != 0:
        return
    try:
        (armed.folder / armed.name).touch(exist_ok=False)
    except FileExistsError:
        return
    if armed.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if armed.action == "sleep":
        time.sleep(SLEEP_SECONDS)
    if armed.action == "raise":
        raise FailpointRaised(armed.name)
