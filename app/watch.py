"""Showing a job while it runs: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

Job = dict[str, Any]


def show(jobs: Iterable[Job], console: Console) -> Job:
    """Show each state of a job as it comes; returns the last."""
    return _bar(jobs, console) if console.is_terminal else _lines(jobs, console)


def summary(job: Job) -> list[str]:
    """What a finished job came to, a line each."""
    if job["status"] != "succeeded":
        error = job["error"]
        if error is None:
            return [f"{job['id']} {job['status']}"]
        best = "" if error["best"] is None else f" (best reached: {error['best']:g})"
        return [f"{job['id']} failed: {error['code']}: {error['message']}{best}"]
    result = job["result"]
    measured = result["measured"]
    figures = [
        f"{name} {measured[name]:.4g}"
        for name in ("kept", "perplexity", "perplexity_dense", "kl")
        if isinstance(measured.get(name), int | float)
    ]
    return [
        f"{job['id']} succeeded: {', '.join(figures)}",
        f"profile {result['profile_id']}",
        f"checkpoint {result['checkpoint_id']}",
    ]


def _lines(jobs: Iterable[Job], console: Console) -> Job:
    job, shown = {}, None
    for job in jobs:
        progress = job["progress"]
        # A log is read later: a line for each tenth is enough.
        state = (job["status"], job["phase"], progress and int(10 * progress["fraction"]))
        if state != shown:
            amount = "" if progress is None else f" {progress['done']}/{progress['total']} {progress['unit']}"
            console.print(f"{job['status']} {job['phase']}{amount}", highlight=False, soft_wrap=True)
            shown = state
    return job


def _bar(jobs: Iterable[Job], console: Console) -> Job:
    columns = (
        TextColumn("{task.fields[status]:>10} {task.description:<12}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeElapsedColumn(),
    )
    job: Job = {}
    with Progress(*columns, console=console) as bar:
        task, phase = bar.add_task("queued", total=None, status="", amount=""), "queued"
        for job in jobs:
            progress = job["progress"]
            if job["phase"] != phase or progress is None:
                # A bar keeps the total of its last phase: each has one of its own.
                bar.remove_task(task)
                phase = job["phase"]
                total = 1 if job["status"] == "succeeded" else None
                task = bar.add_task(phase, total=total, status=job["status"], amount="")
            if progress is not None:
                amount = f"{progress['done']}/{progress['total']} {progress['unit']}"
                bar.update(task, completed=progress["done"], total=progress["total"], amount=amount)
            elif job["status"] == "succeeded":
                bar.update(task, completed=1)
            bar.update(task, status=job["status"])
    return job


def estimated(estimate: dict[str, Any]) -> str:
    """One line about what a job would take."""
    minutes = estimate["minutes"]
    if minutes is None:
        return f"estimate: {estimate['basis']}"
    low, likely, high = (_time(minutes[name]) for name in ("low", "likely", "high"))
    sizes = ", ".join(
        f"{name} {estimate[field] / 1e9:.2f} GB"
        for name, field in (
            ("GPU memory", "gpu_memory_bytes"),
            ("host memory on a CPU", "host_memory_bytes"),
            ("files", "artifact_bytes"),
            ("download", "download_bytes"),
        )
        if estimate[field]
    )
    return f"estimate: {likely} ({low} to {high}; {estimate['basis']}); {sizes}"


def _time(minutes: float) -> str:
    if minutes < 2:
        return f"{minutes * 60:.0f} s"
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
