"""What must hold of one job's rows: one function an invariant."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from app.artifacts.models import Artifact
from app.checker.history import Replay, replay
from app.checkpoints.models import Checkpoint
from app.jobs.models import Event, Job, Layer, Step
from app.profiles.models import Profile

_TERMINAL = {"succeeded", "failed", "cancelled"}
_OPEN = {"pending", "ready", "running"}


@dataclass
class Facts:
    """Every row of one job."""

    job: Job
    steps: list[Step]
    events: list[Event]
    layers: list[Layer]
    artifacts: list[Artifact]
    profiles: list[Profile]
    checkpoints: list[Checkpoint]

    def __post_init__(self) -> None:
        steps = {
            layer: (step.name, step.ordinal)
            for step in self.steps
            if step.name == "fit"
            for layer in step.layers or []
        }
        self.history: Replay = replay(self.events, steps)


def transitions(facts: Facts) -> Iterator[str]:
    """Only allowed edges, from `queued` to the status of the row."""
    yield from facts.history.illegal
    if not facts.history.illegal and facts.history.reached != facts.job.status:
        yield f"the row says {facts.job.status}, its events lead to {facts.history.reached}"


def ends(facts: Facts) -> Iterator[str]:
    """One end, or one for each retry before it."""
    expected = facts.history.retries + (facts.job.status in _TERMINAL)
    if facts.history.ends != expected:
        yield f"ended {facts.history.ends} times with {facts.history.retries} retries, now {facts.job.status}"


def events(facts: Facts) -> Iterator[str]:
    """Numbers without a gap, as many as the row has counted."""
    numbers = [event.seq for event in facts.events]
    if numbers != list(range(1, facts.job.event_seq + 1)):
        missing = sorted(set(range(1, facts.job.event_seq + 1)) - set(numbers))
        yield f"{len(numbers)} events where the row counts {facts.job.event_seq}; missing: {missing[:10]}"
    if facts.job.version < facts.job.event_seq:
        yield f"version {facts.job.version} is behind {facts.job.event_seq} events"


def fences(facts: Facts) -> Iterator[str]:
    """Fences rise with every claim, and a row is never behind its claims."""
    yield from facts.history.falling
    for step in facts.steps:
        newest = facts.history.fences.get((step.name, step.ordinal), 0)
        if step.fence < newest:
            yield f"{step.name} {step.ordinal} has fence {step.fence}, and was claimed under {newest}"


def stale_commits(facts: Facts) -> Iterator[str]:
    """Nothing is committed under a fence other than the newest claim's."""
    yield from facts.history.stale


def layers(facts: Facts) -> Iterator[str]:
    """Each layer is committed once, by a row and an event; a job that succeeded has them all."""
    committed = Counter(layer for layer, _fence in facts.history.layers)
    for layer, times in sorted(committed.items()):
        if times > 1:
            yield f"layer {layer} was committed {times} times"
    rows = {row.layer: row.fence for row in facts.layers}
    for layer, fence in facts.history.layers:
        if layer not in rows:
            yield f"layer {layer} has an event and no row"
        elif fence is not None and committed[layer] == 1 and rows[layer] != fence:
            yield f"layer {layer} has fence {rows[layer]}, its event {fence}"
    for layer in sorted(set(rows) - set(committed)):
        yield f"layer {layer} has a row and no event"
    if facts.job.status == "succeeded":
        owed = {layer for step in facts.steps if step.name == "fit" for layer in step.layers or []}
        for layer in sorted(owed - set(rows)):
            yield f"succeeded without layer {layer}"


def steps(facts: Facts) -> Iterator[str]:
    """Steps agree with their job: none open once it has ended, a lease exactly while running."""
    status = facts.job.status
    if status in _TERMINAL:
        for step in facts.steps:
            if step.status in _OPEN or (status == "succeeded" and step.status != "succeeded"):
                yield f"{step.name} {step.ordinal} is {step.status} in a job that has {status}"
        if facts.job.finished_at is None:
            yield f"{status} without a time"
    running = [step for step in facts.steps if step.status == "running"]
    if status == "queued" and (running or not any(step.status == "ready" for step in facts.steps)):
        yield "queued, but no step is ready or one is running"
    for step in facts.steps:
        if (step.status == "running") != (step.lease_owner is not None):
            yield f"{step.name} {step.ordinal} is {step.status}; its lease belongs to {step.lease_owner}"


def visibility(facts: Facts) -> Iterator[str]:
    """Files are visible of finished steps and of committed layers only, checkpoints of jobs that succeeded."""
    by_id = {step.id: step for step in facts.steps}
    layer_files = {layer.artifact_id for layer in facts.layers}
    for artifact in facts.artifacts:
        step = by_id.get(artifact.step_id)
        if artifact.id not in layer_files and (step is None or step.status != "succeeded"):
            yield f"{artifact.id} ({artifact.filename}) is visible, and its step has not succeeded"
    for checkpoint in facts.checkpoints:
        if facts.job.status != "succeeded":
            yield f"{checkpoint.id} is visible while the job is {facts.job.status}"
    if facts.profiles and not any(s.name == "profile" and s.status == "succeeded" for s in facts.steps):
        yield f"{facts.profiles[0].id} is visible, and its step has not succeeded"
    if facts.job.status == "succeeded" and len(facts.checkpoints) != 1:
        yield f"succeeded with {len(facts.checkpoints)} checkpoints"


def cancels(facts: Facts) -> Iterator[str]:
    """A job whose cancel was acknowledged does not succeed later, unless it was opened again."""
    for seq in facts.history.after_cancel:
        yield f"succeeded (event {seq}) after its cancel was acknowledged"


RULES: dict[str, Callable[[Facts], Iterator[str]]] = {
    "transitions": transitions,
    "ends": ends,
    "events": events,
    "fences": fences,
    "stale_commits": stale_commits,
    "layers": layers,
    "steps": steps,
    "visibility": visibility,
    "cancels": cancels,
}
