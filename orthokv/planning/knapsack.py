"""One option a layer, least total damage within a number of bytes: the multiple-choice knapsack behind a plan.

`knapsack` is exact (dynamic programming over bytes), `greedy` is what most published rules do.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Options:
    """Candidate rank pairs of one layer, flattened: ranks `[n, 2]`, bytes a token, relative error, damage (each `[n]`)."""

    ranks: Ints
    bytes: Ints
    error: Floats
    damage: Floats

    def take(self, index: Ints) -> Options:
        return Options(self.ranks[index], self.bytes[index], self.error[index], self.damage[index])

    def pair(self, index: int) -> tuple[int, int]:
        return int(self.ranks[index, 0]), int(self.ranks[index, 1])


def pareto(options: Options) -> Options:
    """Only options that no cheaper one beats, cheapest first."""
    order = np.lexsort((options.damage, options.bytes))
    best = np.minimum.accumulate(options.damage[order])
    keep = np.concatenate([[True], best[1:] < best[:-1]])
    return options.take(order[keep])


def knapsack(options: list[Options], budget_bytes: int) -> list[int] | None:
    """One option a layer with the least total damage within `budget_bytes` a token; None where nothing fits."""
    unit = int(np.gcd.reduce(np.concatenate([o.bytes for o in options])))
    size = budget_bytes // unit
    if size < sum(int(o.bytes.min()) // unit for o in options):
        return None
    total = np.zeros(size + 1)
    chosen: list[Ints] = []
    for layer in options:
        best = np.full(size + 1, np.inf)
        pick = np.full(size + 1, -1, dtype=np.int64)
        for i, (cost, damage) in enumerate(zip(layer.bytes // unit, layer.damage, strict=True)):
            if cost > size:
                break
            candidate = total[: size + 1 - cost] + damage
            better = candidate < best[cost:]
            best[cost:][better] = candidate[better]
            pick[cost:][better] = i
        total = best
        chosen.append(pick)
    left = int(np.argmin(total))
    found: list[int] = []
    for layer, pick in zip(reversed(options), reversed(chosen), strict=True):
        found.append(int(pick[left]))
        left -= int(layer.bytes[found[-1]]) // unit
    return found[::-1]


def greedy(options: list[Options], budget_bytes: int) -> list[int] | None:
    """From the dearest option of every layer down, always the step that adds the least damage per byte saved.

    `options` are fronts as `pareto` makes them; None where nothing fits. Steps lead along the lower convex hull of
    a front, so that a layer's own steps come in order of their price. What the last one saved too much is spent again, on
    the options that take away most damage per byte.
    """
    steps: list[tuple[float, int, int]] = []
    found: list[int] = []
    for layer, front in enumerate(options):
        hull = _hull(front)
        found.append(hull[-1])
        for cheaper, dearer in pairwise(hull):
            steps.append((_price(front, cheaper, dearer), layer, cheaper))
    total = sum(int(o.bytes[i]) for o, i in zip(options, found, strict=True))
    for _, layer, cheaper in sorted(steps):
        if total <= budget_bytes:
            break
        total -= int(options[layer].bytes[found[layer]] - options[layer].bytes[cheaper])
        found[layer] = cheaper
    return _fill(options, found, budget_bytes - total) if total <= budget_bytes else None


def _fill(options: list[Options], found: list[int], left: int) -> list[int]:
    """Spend `left` bytes as long as any dearer option fits."""
    while True:
        fitting = [
            (_price(front, found[layer], i), layer, i)
            for layer, front in enumerate(options)
            for i in range(found[layer] + 1, _reach(front, found[layer], left))
        ]
        if not fitting:
            return found
        _, layer, dearer = max(fitting)
        left -= int(options[layer].bytes[dearer] - options[layer].bytes[found[layer]])
        found[layer] = dearer


def _reach(front: Options, present: int, left: int) -> int:
    """The first option that costs more than `left` bytes beyond the present one."""
    return int(np.searchsorted(front.bytes, front.bytes[present] + left, side="right"))


def _price(front: Options, cheaper: int, dearer: int) -> float:
    """Damage added per byte saved."""
    damage = front.damage[cheaper] - front.damage[dearer]
    return float(damage / (front.bytes[dearer] - front.bytes[cheaper]))


def _hull(front: Options) -> list[int]:
    """Corners of a front's lower convex hull, cheapest first."""
    corners: list[int] = []
    for i in range(len(front.bytes)):
        while len(corners) > 1 and _price(front, corners[-1], i) >= _price(front, corners[-2], corners[-1]):
            corners.pop()
        corners.append(i)
    return corners
