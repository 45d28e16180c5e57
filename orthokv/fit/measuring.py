"""A layer's error, measured at every pair of candidate ranks."""

from __future__ import annotations

import torch

from orthokv.bases.basis import Bases, Basis
from orthokv.fit.methods.base import FittedBases
from orthokv.fit.task import LayerTask
from orthokv.planning.profile import LayerProfile, Spread
from orthokv.spec.rankgrid import candidate_ranks
from orthokv.spec.settings import SPREAD_BLOCKS
from orthokv.spec.vocabulary import Sharing
from orthokv.text.blocks import evenly

# The error of some sequences is measured one by one, with this share of the widths.
SPREAD_SHARE = 0.25


@torch.no_grad()
def measure_layer(
    task: LayerTask, fitted: FittedBases | LayerProfile, samples: int, sharing: Sharing
) -> LayerProfile:
    """Measure a layer's error at every pair of candidate ranks, on `samples` evenly chosen calibration blocks.

    At one pair, a quarter of both widths, it is also measured sequence by sequence, on held-out ones too.
    """
    ranks_key, ranks_value = candidate_ranks(fitted.key.width), candidate_ranks(fitted.value.width)
    shape = (len(ranks_key), len(ranks_value))
    error, cosine = torch.zeros(shape, dtype=torch.float64), torch.ones(shape, dtype=torch.float64)
    device = task.walk.device
    key, value = fitted.key.to(device), fitted.value.to(device)
    several = spread_blocks(task.fitted_count, samples)
    blocks = [several[i] for i in evenly(len(several), samples)]
    for i, rank_key in enumerate(ranks_key):
        for j, rank_value in enumerate(ranks_value):
            if rank_key == key.rank and rank_value == value.rank and key.orthonormal and value.orthonormal:
                continue  # two orthogonal matrices: the layer is unchanged, and its error zero by construction
            bases = Bases(key.truncate(rank_key), value.truncate(rank_value))
            found = task.compare(bases, blocks)
            error[i, j], cosine[i, j] = found.error, found.cosine
    return LayerProfile(
        index=task.index,
        sharing=sharing,
        key=fitted.key,
        value=fitted.value,
        ranks_key=ranks_key,
        ranks_value=ranks_value,
        error=error,
        cosine=cosine,
        spectrum_key=fitted.spectrum_key,
        spectrum_value=fitted.spectrum_value,
        spread=_spread(task, key, value, several),
    )


def spread_blocks(count: int, samples: int) -> list[int]:
    """Which of `count` fitted blocks are looked at one by one; the error surface is measured on `samples` of these."""
    return evenly(count, max(samples, SPREAD_BLOCKS))


def _spread(task: LayerTask, key: Basis, value: Basis, fitting: list[int]) -> Spread | None:
    held_out = [
        task.fitted_count + i for i in evenly(len(task.walk.inputs) - task.fitted_count, SPREAD_BLOCKS)
    ]
    if not held_out:
        return None
    ranks = (max(1, round(SPREAD_SHARE * key.width)), max(1, round(SPREAD_SHARE * value.width)))
    bases = Bases(key.truncate(ranks[0]), value.truncate(ranks[1]))
    errors = [tuple(task.compare(bases, [block]).error for block in blocks) for blocks in (fitting, held_out)]
    return Spread(*ranks, *errors)
