"""Showing a job or a download while it runs: a bar in a terminal, plain lines or nothing elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from orthokv_client.models import Artifact, Estimate, Job


def show(jobs: Iterable[Job], console: Console) -> Job:
    """Show each state of a job as it comes; returns the last."""
    return _bar(jobs, console) if console.is_terminal else _lines(jobs, console)


def summary(job: Job) -> list[str]:
    """What a finished job came to, a line each."""
    if job.status != "succeeded":
        error = job.error
        if error is None:
            return [f"{job.id} {job.status}"]
        best = "" if error.best is None else f" (best reached: {error.best:g})"
        return [f"{job.id} failed: {error.code}: {error.message}{best}"]
    result = job.result
    assert result is not None, "a job that succeeded has made something"
    measured = result.measured or {}
    figures = [
        f"{name} {measured[name]:.4g}"
        for name in ("kept", "perplexity", "perplexity_dense", "kl")
        if isinstance(measured.get(name), int | float)
    ]
    return [
        f"{job.id} succeeded: {', '.join(figures)}",
        f"profile {result.profile_id}",
        f"checkpoint {result.checkpoint_id}",
    ]


def estimated(estimate: Estimate) -> str:
    """One line about what a job would take."""
    minutes = estimate.minutes
    if minutes is None:
        return f"estimate: {estimate.basis}"
    sizes = ", ".join(
        f"{name} {size / 1e9:.2f} GB"
        for name, size in (
            ("GPU memory", estimate.gpu_memory_bytes),
            ("host memory on a CPU", estimate.host_memory_bytes),
            ("files", estimate.artifact_bytes),
            ("download", estimate.download_bytes),
        )
        if size
    )
    low, likely, high = map(_time, (minutes.low, minutes.likely, minutes.high))
    return f"estimate: {likely} ({low} to {high}; {estimate.basis}); {sizes}"


def _time(minutes: float) -> str:
    if minutes < 2:
        return f"{minutes * 60:.0f} s"
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _lines(jobs: Iterable[Job], console: Console) -> Job:
    shown = None
    for job in jobs:
        progress = job.progress
        # A log is read later: a line for each tenth is enough.
        state = (job.status, job.phase, progress and int(10 * progress.fraction))
        if state != shown:
            amount = "" if progress is None else f" {progress.done}/{progress.total} {progress.unit}"
            console.print(f"{job.status} {job.phase}{amount}", highlight=False, soft_wrap=True)
            shown = state
    return job


def _bar(jobs: Iterable[Job], console: Console) -> Job:
    columns = (
        TextColumn("{task.fields[status]:>10} {task.description:<12}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task, phase = bar.add_task("queued", total=None, status="", amount=""), "queued"
        for job in jobs:
            progress = job.progress
            if job.phase != phase or progress is None:
                # A bar keeps the total of its last phase: each has one of its own.
                bar.remove_task(task)
                phase = job.phase
                total = 1 if job.status == "succeeded" else None
                task = bar.add_task(phase, total=total, status=job.status, amount="")
            if progress is not None:
                amount = f"{progress.done}/{progress.total} {progress.unit}"
                bar.update(task, completed=progress.done, total=progress.total, amount=amount)
            elif job.status == "succeeded":
                bar.update(task, completed=1)
            bar.update(task, status=job.status)
    return job


class DownloadBar:
    """Bytes of a download, in a terminal."""

    def __init__(self, artifacts: Sequence[Artifact], console: Console) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._tasks = {
            artifact.id: self._bar.add_task(artifact.filename, total=artifact.bytes) for artifact in artifacts
        }

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self, artifact: Artifact, count: int) -> None:
        self._bar.advance(self._tasks[artifact.id], count)
