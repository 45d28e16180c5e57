"""What an evaluation says beyond its means."""

from __future__ import annotations

import math

import pytest
import torch

from orthokv.fit.divergence import model_logits
from orthokv.fit.methods.base import FittedBases
from orthokv.fit.methods.eigen import Eigen
from orthokv.fit.task import view_layer
from orthokv.fit.walk import LayerWalk
from orthokv.measure.quality import Quality, quality
from orthokv.runtime.seam import Seam, compressed
from tests.support.tiny import tiny_blocks, tiny_model


def found(*changes: float) -> Quality:
    mean = sum(changes) / len(changes)
    return Quality(math.exp(3 + mean), math.exp(3), 0.0, 100, changes)


# One-sided 95 % quantiles of Student's t from a table.
@pytest.mark.parametrize(("blocks", "quantile"), [(4, 2.353), (8, 1.895), (16, 1.753), (64, 1.669)])
def test_the_bound_is_students_t_of_the_blocks(blocks: int, quantile: float) -> None:
    changes = tuple(0.05 + 0.01 * (-1) ** i for i in range(blocks))
    error = 0.01 * (blocks / (blocks - 1)) ** 0.5 / blocks**0.5
    assert found(*changes).increase_bound == pytest.approx(math.expm1(0.05 + quantile * error), rel=0.02)


def test_the_bound_holds_for_most_samples_of_noisy_blocks() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = 0.03 + 0.02 * torch.randn(2000, 8, generator=generator)
    held = sum(found(*row).increase_bound >= math.expm1(0.03) for row in draws.tolist())
    assert 0.935 < held / 2000 < 0.965


def test_one_block_has_no_bound_of_its_own() -> None:
    assert found(0.1).increase_bound == found(0.1).increase == pytest.approx(math.expm1(0.1))


def test_the_changes_of_the_blocks_are_those_of_their_likelihoods() -> None:
    model, blocks = tiny_model("llama"), tiny_blocks(3, 12)
    with Seam(model, "pre") as seam:
        walk = LayerWalk(model, blocks.tokens, 4)
        bases = []
        for index in range(len(walk)):
            fitted: FittedBases = Eigen().fit(view_layer(walk, seam, index), "joint", 0)
            bases.append(fitted.bases(6, 10))
            walk.advance()
        measured = quality(seam, bases, blocks)
        for tokens, change in zip(blocks.tokens, measured.changes, strict=True):
            losses = []
            for layers in (bases, [None] * len(bases)):
                with compressed(seam, layers):
                    losses.append(torch.nn.functional.cross_entropy(model_logits(model, tokens), tokens[1:]))
            assert change == pytest.approx(float(losses[0] - losses[1]), abs=1e-5)
    assert measured.increase == pytest.approx(math.expm1(sum(measured.changes) / 3), rel=1e-4)
