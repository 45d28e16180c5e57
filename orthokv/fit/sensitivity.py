"""How much the model's predictions depend on each layer's error."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from orthokv.bases.basis import LayerBases
from orthokv.fit.divergence import divergence
from orthokv.fit.walk import LayerWalk
from orthokv.models.states import empty_states
from orthokv.planning.bases import on_model
from orthokv.planning.profile import ErrorProfile, LayerProfile
from orthokv.runtime.seam import Seam, compressed
from orthokv.spec.progress import Reporter, Step, silent
from orthokv.text.blocks import Blocks, evenly


def separate_divergences(
    seam: Seam,
    bases: Sequence[LayerBases],
    blocks: Blocks,
    report: Reporter = silent,
    batch_size: int = 4,
) -> list[float]:
    """KL(dense || compressed) in nats, mean over tokens, of each layer compressed alone, at every layer.

    In one pass over the layers: the hidden states of a model with one compressed layer leave the uncompressed ones there.
    `layers + 1` sets of hidden states are held at its end.
    """
    n = len(blocks)
    with compressed(seam, [None] * len(bases)):
        walk = LayerWalk(seam.model, blocks.tokens, batch_size, blocks.starts)
        shape = (len(bases) * n, *walk.inputs.shape[1:])
        states = empty_states(shape, walk.inputs.dtype, walk.device)
        for i, layer in enumerate(bases):
            walk.through(i, states[: i * n], states[: i * n], list(range(n)) * i)
            seam.set_bases(i, layer)
            walk.through(i, walk.inputs, states[i * n : (i + 1) * n], range(n))
            seam.set_bases(i, None)
            walk.run(i)
            walk.advance()
            report(Step("sensitivity", i + 1, len(bases), "layers"))
        total = [0.0] * len(bases)
        for j in range(n):
            block = slice(j, j + 1)
            dense = walk.logits(walk.inputs[block], block)[0, :-1].float()
            for i in range(len(bases)):
                at = i * n + j
                total[i] += divergence(dense, walk.logits(states[at : at + 1], block)[0, :-1].float())
    tokens = n * (blocks.tokens.shape[1] - 1)
    return [kl / tokens for kl in total]


# Each layer's sensitivity is measured at about this share of its widths, where typical plans lie.
SENSITIVITY_SHARE = 0.25


SENSITIVITY_BLOCKS = 2


def sensitivities(
    model: PreTrainedModel, profile: ErrorProfile, blocks: Blocks, report: Reporter = silent
) -> list[float]:
    """KL divergence of the predictions per squared error of each layer, with only that layer compressed.

    The error in the denominator is the profile's own at the same ranks, so that `sensitivity * error^2` reproduces the
    measured divergence there.
    """
    points = [_sensitivity_point(layer) for layer in profile.layers]
    bases = [
        on_model(model, layer.bases(layer.ranks_key[a], layer.ranks_value[b]))
        for layer, (a, b) in zip(profile.layers, points, strict=True)
    ]
    some = blocks.take(evenly(len(blocks), SENSITIVITY_BLOCKS))
    with Seam(model, profile.key_mode) as seam:
        found = separate_divergences(seam, bases, some, report)
    return [
        max(kl, 0.0) / max(float(layer.error[a, b]) ** 2, 1e-12)
        for kl, layer, (a, b) in zip(found, profile.layers, points, strict=True)
    ]


def _sensitivity_point(layer: LayerProfile) -> tuple[int, int]:
    """Indices of the candidate ranks closest to `SENSITIVITY_SHARE` of the widths."""

    def closest(ranks: tuple[int, ...]) -> int:
        return min(range(len(ranks)), key=lambda i: abs(ranks[i] / ranks[-1] - SENSITIVITY_SHARE))

    return closest(layer.ranks_key), closest(layer.ranks_value)
