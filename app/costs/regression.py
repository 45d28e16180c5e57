"""Seconds from arithmetic: a line for each step, fitted to past runs, with an honest spread.

`seconds = overhead + flop / rate`, by least squares of the relative error, so that a run of a second counts as much
as one of an hour. The spread is that of the jackknife+ (Barber, Candes, Ramdas, Tibshirani 2021) with ratios for
residuals: each run is predicted by the line through all others, and how far off that was is carried over. With n
runs the band of one step is meant to hold (n - 1) of n + 1 runs, at most nine in ten.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MIN_RUNS = 3
"""Fewer say nothing of a spread."""
_TAIL = 0.05


@dataclass(frozen=True)
class Run:
    """What a finished step has taken."""

    flop: float
    seconds: float


@dataclass(frozen=True)
class Band:
    """Seconds: what is to be expected, and what is not to be surprised by."""

    low: float
    likely: float
    high: float

    def __add__(self, other: Band) -> Band:
        return Band(self.low + other.low, self.likely + other.likely, self.high + other.high)


@dataclass(frozen=True)
class Line:
    overhead: float
    seconds_per_flop: float

    def __call__(self, flop: float) -> float:
        return self.overhead + self.seconds_per_flop * flop


@dataclass(frozen=True)
class _Sums:
    """The normal equations of `1 = overhead / seconds + rate * flop / seconds`."""

    aa: float = 0.0
    ab: float = 0.0
    bb: float = 0.0
    a: float = 0.0
    b: float = 0.0

    def plus(self, run: Run, sign: float = 1.0) -> _Sums:
        one, two = 1.0 / run.seconds, run.flop / run.seconds
        return _Sums(
            self.aa + sign * one * one,
            self.ab + sign * one * two,
            self.bb + sign * two * two,
            self.a + sign * one,
            self.b + sign * two,
        )

    def line(self) -> Line:
        """Neither an overhead nor a rate is below zero: where one would be, the other explains all."""
        determinant = self.aa * self.bb - self.ab * self.ab
        if determinant > 1e-9 * self.aa * self.bb:
            overhead = (self.a * self.bb - self.b * self.ab) / determinant
            rate = (self.b * self.aa - self.a * self.ab) / determinant
            if overhead >= 0 and rate >= 0:
                return Line(overhead, rate)
            if overhead < 0:
                return Line(0.0, self.b / self.bb)
        return Line(self.a / self.aa, 0.0)


def predict(runs: Sequence[Run], flop: float) -> Band:
    """What past runs say of another one. Needs `MIN_RUNS`."""
    if len(runs) < MIN_RUNS:
        raise ValueError(f"{len(runs)} runs are too few")
    sums = _sums(runs)
    likely = sums.line()(flop)
    carried: list[float] = []
    for run in runs:
        without = sums.plus(run, -1.0).line()
        carried.append(without(flop) * run.seconds / without(run.flop))
    carried.sort()
    cut = int(_TAIL * (len(carried) + 1))  # 0 below 19 runs: then the whole range
    low, high = carried[max(0, cut - 1)], carried[min(len(carried) - 1, len(carried) - cut)]
    return Band(min(low, likely), likely, max(high, likely))


def _sums(runs: Sequence[Run]) -> _Sums:
    sums = _Sums()
    for run in runs:
        sums = sums.plus(run)
    return sums
