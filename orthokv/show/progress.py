"""Progress of a long run: a bar in a terminal, plain lines elsewhere, a callback for programs."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from orthokv.spec.progress import Step


class PlainReporter:
    """One line per phase and per tenth of its work, for logs and pipes."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self._last: tuple[str, int] | None = None

    def __call__(self, step: Step) -> None:
        tenth = 10 * step.done // max(step.total, 1)
        if (step.phase, tenth) == self._last:
            return
        self._last = (step.phase, tenth)
        self.stream.write(f"{step.phase}: {step.done}/{step.total} {step.unit}\n")
        self.stream.flush()


class BarReporter:
    """A live bar for each phase, on standard error."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("[bold]{task.description:<12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> BarReporter:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, step: Step) -> None:
        task = self._tasks.get(step.phase)
        if task is None:
            task = self._tasks[step.phase] = self._progress.add_task(
                step.phase, total=step.total, unit=step.unit
            )
        if step.done < self._progress.tasks[self._progress.task_ids.index(task)].completed:
            self._progress.reset(task)  # the phase comes again, as sensitivities do after a refinement
        self._progress.update(task, completed=step.done, total=step.total)
