"""Progress of a long run, as data: a step of a phase, and who is told of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Step:
    """`done` of `total` `unit` in `phase`, for example 3 of 32 layers in `fitting`."""

    phase: str
    done: int
    total: int
    unit: str


class Reporter(Protocol):
    """Called as work goes on; must not raise."""

    def __call__(self, step: Step) -> None: ...


def silent(step: Step) -> None:
    """Report nothing."""


def counter(report: Reporter, phase: str, unit: str) -> Callable[[int, int], None]:
    """A `(done, total)` callback that reports under one phase."""
    return lambda done, total: report(Step(phase, done, total, unit))
