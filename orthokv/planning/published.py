"""The papers' own rules of choosing ranks, for comparison."""

from __future__ import annotations

from bisect import bisect_left

import numpy as np

from orthokv.planning.plan import plan_ranks
from orthokv.planning.profile import ErrorProfile
from orthokv.planning.surface import interpolate
from orthokv.spec.budget import Budget
from orthokv.spec.codec import CodecSpec
from orthokv.spec.errors import BudgetUnreachable, InvalidSetting
from orthokv.spec.rankgrid import FREE, RankGrid

# EigenAttention's rule: the energy threshold falls by this much a trial, and no rank below this share (released code).
THRESHOLD_STEP, SMALLEST_EIGEN_SHARE = 0.02, 0.45


# StiefAttention's depth weights (v1, section 4.3). Where early ends and late begins is not stated: a quarter each is ours.
EARLY_WEIGHT, LATE_WEIGHT, DEPTH_SHARE = 2.0, 1.75, 0.25


_BISECTIONS = 24


def depth_weights(layers: int) -> list[float]:
    """How much StiefAttention's allocation counts the error of each layer: 2 early, 1.75 late, 1 between."""
    edge = max(1, round(DEPTH_SHARE * layers))
    return [EARLY_WEIGHT if i < edge else LATE_WEIGHT if i >= layers - edge else 1.0 for i in range(layers)]


def threshold_ranks(
    profile: ErrorProfile, error_budget: float, grid: RankGrid = FREE
) -> list[tuple[int, int]]:
    """EigenAttention's rule, as released: one threshold on the summed singular values, for keys and values together.

    Per layer it starts at 1 and falls by 0.02 a trial; a rank counts the singular values whose cumulative share (of their
    sum, not of their squares) is below the threshold, the largest over the heads. The search ends when the layer's error
    passes the budget or a rank falls to 45 % of the width, then goes back one step. Errors are read from the profile. A grid
    rounds the ranks up, which the released code does not do.
    """
    found: list[tuple[int, int]] = []
    for layer in profile.layers:
        if layer.spectrum_key is None or layer.spectrum_value is None:
            raise InvalidSetting(
                "allocation 'threshold' needs the singular values, which only method 'eigen' has"
            )
        shares = [
            np.cumsum(np.asarray(s, dtype=np.float64), axis=-1)
            / np.asarray(s, dtype=np.float64).sum(-1, keepdims=True)
            for s in (layer.spectrum_key, layer.spectrum_value)
        ]
        grid_key, grid_value, squared = interpolate(layer)
        full = (layer.key.rank, layer.value.rank)
        best = full
        threshold = 1.0
        while threshold > THRESHOLD_STEP:
            threshold -= THRESHOLD_STEP
            pair = tuple(max(1, int((share < threshold).sum(-1).max())) for share in shares)
            # The error at the next smaller rank of the grid is not below the true one.
            i = int((np.searchsorted(grid_key, pair[0], side="right") - 1).clip(0))
            j = int((np.searchsorted(grid_value, pair[1], side="right") - 1).clip(0))
            small = any(r <= SMALLEST_EIGEN_SHARE * f for r, f in zip(pair, full, strict=True))
            if squared[i, j] ** 0.5 >= error_budget or small:
                break
            best = (pair[0], pair[1])
        if not grid.free:
            best = (
                _round_up(best[0], grid.ranks(layer.ranks_key)),
                _round_up(best[1], grid.ranks(layer.ranks_value)),
            )
        found.append(best)
    return found


def _round_up(rank: int, allowed: tuple[int, ...]) -> int:
    return allowed[min(bisect_left(allowed, rank), len(allowed) - 1)]


def threshold_within(
    profile: ErrorProfile, budget: Budget, grid: RankGrid, codec: CodecSpec
) -> list[tuple[int, int]]:
    """The threshold rule at the smallest error budget whose ranks keep no more than asked."""

    def kept(error_budget: float) -> float:
        ranks = threshold_ranks(profile, error_budget, grid)
        return plan_ranks(profile, budget, "threshold", ranks, grid, codec).kept

    low, high = 0.0, 1 + max(float(layer.error.max()) for layer in profile.layers)
    if (best := kept(high)) > budget.value:
        raise BudgetUnreachable(
            f"kept {budget.value:g} cannot be met: allocation 'threshold' stops where keys or values reach "
            f"{SMALLEST_EIGEN_SHARE:.0%} of their width, which keeps {best:.4f} of the cache",
            asked=budget.value,
            best=best,
        )
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if kept(middle) <= budget.value else (middle, high)
    return threshold_ranks(profile, high, grid)
