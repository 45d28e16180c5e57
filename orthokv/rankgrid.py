"""Which ranks a plan may use, and the error that a profile expects there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from orthokv.errors import InvalidSetting
from orthokv.knapsack import Floats, Ints
from orthokv.profile import LayerProfile

# By default ranks are multiples of width / 32: fine enough to spend a budget, coarse enough to suit matrix units.
RANK_STEPS = 32


@dataclass(frozen=True)
class RankGrid:
    """Ranks per group that a plan may use.

    Attributes:
        multiple: every rank is a multiple of it; matrix units like 8 or 16.
        choices: if any, every rank is one of these: a server that compiles a kernel for each shape wants a short list.

    Both also bind the full rank: a width that is no multiple, or not in the list, is never cached whole.
    """

    multiple: int = 1
    choices: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.multiple < 1:
            raise InvalidSetting(f"rank multiple must be at least 1, not {self.multiple}")
        if any(rank < 1 for rank in self.choices):
            raise InvalidSetting(f"rank choices must be at least 1, not {min(self.choices)}")

    @property
    def free(self) -> bool:
        """Nothing was asked: rules may also use ranks between those of :meth:`ranks`."""
        return self == FREE

    def ranks(self, measured: tuple[int, ...]) -> Ints:
        """Usable ranks, ascending, for a basis that was measured at ``measured`` (the last is its width).

        Ranks below the smallest measured one are left out: their error would be extrapolated.

        Raises:
            InvalidSetting: there are none.
        """
        width = measured[-1]
        step = -(-max(1, width // RANK_STEPS) // self.multiple) * self.multiple
        candidates = self.choices or (*measured, *range(step, width + 1, step))
        found = sorted({r for r in candidates if measured[0] <= r <= width and r % self.multiple == 0})
        if not found:
            asked = f"of {', '.join(map(str, self.choices))} " if self.choices else ""
            raise InvalidSetting(
                f"no rank {asked}that is a multiple of {self.multiple} lies between {measured[0]}, the smallest "
                f"profiled rank, and the width {width}"
            )
        return np.asarray(found)


# Nothing asked: the default steps.
FREE = RankGrid()


def interpolate(layer: LayerProfile, grid: RankGrid = FREE) -> tuple[Ints, Ints, Floats]:
    """The error surface on a grid: ranks_key ``[a]``, ranks_value ``[b]``, squared errors ``[a, b]``."""
    grid_key, grid_value = grid.ranks(layer.ranks_key), grid.ranks(layer.ranks_value)
    return grid_key, grid_value, squared_errors(layer, grid_key, grid_value)


def squared_errors(layer: LayerProfile, ranks_key: Ints, ranks_value: Ints) -> Floats:
    """Squared relative errors ``[a, b]`` at ranks ``[a]`` and ``[b]``, not below the smallest measured ones.

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
