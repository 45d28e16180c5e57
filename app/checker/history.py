"""A job's history, replayed from its events by rules of its own, not by the code that wrote them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from app.jobs.models import Event

# Event -> statuses from which it may come, and the status after it (None: the same).
_EDGES: dict[str, tuple[frozenset[str], str | None]] = {
    "job.started": (frozenset({"queued"}), "running"),
    "step.started": (frozenset({"running"}), None),
    "step.succeeded": (frozenset({"running"}), None),
    # A worker hears of a cancel with its next heartbeat; what it stores until then stays.
    "layer.committed": (frozenset({"running", "cancelling"}), None),
    "attempt.lost": (frozenset({"running"}), None),
    "attempt.released": (frozenset({"running"}), None),
    "job.cancelling": (frozenset({"running"}), "cancelling"),
    "job.cancelled": (frozenset({"queued", "running", "cancelling"}), "cancelled"),
    "job.succeeded": (frozenset({"running"}), "succeeded"),
    "job.failed": (frozenset({"running"}), "failed"),
    "job.retried": (frozenset({"failed", "cancelled"}), "queued"),
}
ENDS = frozenset({"job.succeeded", "job.failed", "job.cancelled"})

StepKey = tuple[str, int]
"""Name and ordinal."""


@dataclass
class Replay:
    """What the events say happened."""

    reached: str = "queued"
    """The status that they lead to."""
    ends: int = 0
    retries: int = 0
    illegal: list[str] = field(default_factory=list)
    """Events that could not follow those before them."""
    fences: dict[StepKey, int] = field(default_factory=dict)
    """The newest fence under which each step was claimed."""
    falling: list[str] = field(default_factory=list)
    """Claims whose fence is not above that of the claim before."""
    layers: list[tuple[int, int | None]] = field(default_factory=list)
    """(layer, fence) of each commit, in order."""
    stale: list[str] = field(default_factory=list)
    """Commits and successes under a fence that is not that of the newest claim."""
    after_cancel: list[int] = field(default_factory=list)
    """Numbers of successes after a cancel that no retry undid."""


def replay(events: Sequence[Event], step_of_layer: dict[int, StepKey]) -> Replay:
    """Replay events in the order of their numbers. Events from before fences were recorded are not judged by them."""
    found = Replay()
    running: set[StepKey] = set()
    cancelled = False
    for event in events:
        kind, data = event.type, event.data
        key: StepKey = (data.get("step", ""), data.get("ordinal", 0))
        sources, target = _EDGES.get(kind, (None, None))
        if sources is not None and found.reached not in sources:
            found.illegal.append(f"{kind} (event {event.seq}) while {found.reached}")
        if target is not None:
            found.reached = target
        match kind:
            case "job.started" | "step.started":
                running.add(key)
                _claim(found, event.seq, key, data)
            case "attempt.lost" | "attempt.released":
                running.discard(key)
                if not running:
                    found.reached = "queued"
            case "step.succeeded":
                running.discard(key)
                _judge(found, event.seq, key, data, "success")
            case "layer.committed":
                found.layers.append((data["layer"], data.get("fence")))
                _judge(found, event.seq, step_of_layer.get(data["layer"]), data, "commit")
            case "job.cancelling":
                cancelled = True
            case "job.retried":
                found.retries += 1
                cancelled = False
            case _:
                pass
        if kind in ENDS:
            found.ends += 1
            running.clear()
        if kind == "job.cancelled":
            cancelled = True
        if kind == "job.succeeded" and cancelled:
            found.after_cancel.append(event.seq)
    return found


def _claim(found: Replay, seq: int, key: StepKey, data: dict[str, Any]) -> None:
    fence = data.get("fence")
    if fence is None:
        return
    before = found.fences.get(key, 0)
    if fence <= before:
        found.falling.append(
            f"{key[0]} {key[1]} was claimed under fence {fence} (event {seq}) after {before}"
        )
    found.fences[key] = max(fence, before)


def _judge(found: Replay, seq: int, key: StepKey | None, data: dict[str, Any], what: str) -> None:
    fence = data.get("fence")
    if fence is None or key is None or key not in found.fences:
        return
    if fence != found.fences[key]:
        found.stale.append(
            f"{what} of {key[0]} {key[1]} under fence {fence} (event {seq}); the newest claim's is "
            f"{found.fences[key]}"
        )
