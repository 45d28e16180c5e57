"""Which ranks a plan may use, and the error that a profile expects there."""

from __future__ import annotations

import numpy as np

from orthokv.planning.knapsack import Floats, Ints
from orthokv.planning.profile import LayerProfile
from orthokv.spec.rankgrid import FREE, RankGrid


def interpolate(layer: LayerProfile, grid: RankGrid = FREE) -> tuple[Ints, Ints, Floats]:
    """The error surface on a grid: ranks_key `[a]`, ranks_value `[b]`, squared errors `[a, b]`."""
    grid_key, grid_value = (np.asarray(grid.ranks(ranks)) for ranks in (layer.ranks_key, layer.ranks_value))
    return grid_key, grid_value, squared_errors(layer, grid_key, grid_value)


def squared_errors(layer: LayerProfile, ranks_key: Ints, ranks_value: Ints) -> Floats:
    """Squared relative errors `[a, b]` at ranks `[a]` and `[b]`, not below the smallest measured ones.

    Between measured ranks the logarithm of the squared error is linear in the rank, which fits measured curves well; in
    the last stretch, towards an exact cache, the squared error itself is.
    """
    measured = np.asarray(layer.error, dtype=np.float64) ** 2
    along_value = np.stack([_along(np.asarray(layer.ranks_value), row, ranks_value) for row in measured])
    return np.stack([_along(np.asarray(layer.ranks_key), c, ranks_key) for c in along_value.T]).T


def _along(ranks: Ints, squared: Floats, grid: Ints) -> Floats:
    tiny = 1e-16
    found = np.exp(np.interp(grid, ranks, np.log(np.maximum(squared, tiny))))
    if len(ranks) > 1:
        last = grid >= ranks[-2]
        found[last] = np.interp(grid[last], ranks, squared)
    return found
