"""Ranks that a plan may use, and those at which errors are measured."""

from __future__ import annotations

from dataclasses import dataclass

from orthokv.spec.errors import InvalidSetting

# By default ranks are multiples of width / 32: fine enough to spend a budget, coarse enough to suit matrix units.
RANK_STEPS = 32
# Where a layer's error is measured, as shares of the width; all are multiples of 1/32, the step of the allocator.
CANDIDATE_SHARES = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0)


@dataclass(frozen=True)
class RankGrid:
    """Ranks per group that a plan may use.

    Attributes:
        multiple: every rank is a multiple of it; matrix units like 8 or 16.
        choices: if any, every rank is one of these: a server that compiles a kernel for each shape wants a short list.

    Both also bind the full rank: a width that is not such a multiple, or not in the list, is never cached whole.
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
        """Nothing was asked: rules may also use ranks between those of `ranks`."""
        return self == FREE

    def ranks(self, measured: tuple[int, ...]) -> tuple[int, ...]:
        """Usable ranks, ascending, for a basis that was measured at `measured` (the last is its width).

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
        return tuple(found)


# Nothing asked: the default steps.
FREE = RankGrid()


def candidate_ranks(width: int) -> tuple[int, ...]:
    """The ranks at which errors are measured, ascending, ending at the full rank."""
    return tuple(sorted({max(1, round(share * width)) for share in CANDIDATE_SHARES}))
