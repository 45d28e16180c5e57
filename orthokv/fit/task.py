"""One layer on its calibration blocks: what a basis costs there, and what a method may look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from orthokv.bases.basis import LayerBases, PartialBases
from orthokv.fit.moments import LayerMoments, run_and_measure
from orthokv.fit.walk import LayerWalk
from orthokv.models.architectures import architecture_of
from orthokv.runtime.seam import Seam
from orthokv.spec.geometry import Geometry


@dataclass(frozen=True)
class Comparison:
    """A compressed layer against the original: relative Frobenius error, and mean cosine over tokens (paper, Fig. 6)."""

    error: float
    cosine: float


@dataclass(frozen=True)
class LayerTask:
    """One layer that has run on the blocks of a walk: what a basis costs there.

    The first `fitted_count` blocks are for fitting and for the error surface; those behind are held out.
    """

    index: int
    walk: LayerWalk
    seam: Seam
    fitted_count: int

    @property
    def geometry(self) -> Geometry:
        return self.seam.geometry

    def loss(self, bases: LayerBases, blocks: list[int]) -> Tensor:
        """Squared relative error of the layer's output over some blocks, `||Z - Z~||^2 / ||Z||^2` (paper section 2)."""
        target = self._target(blocks)
        return (self._compressed(bases, blocks) - target).square().sum() / target.square().sum()

    @torch.no_grad()
    def compare(self, bases: LayerBases, blocks: list[int]) -> Comparison:
        """Error and cosine over some blocks, in slices of the walk's batch size."""
        difference = norm = cosine = 0.0
        tokens = 0
        for start in range(0, len(blocks), self.walk.batch_size):
            part = blocks[start : start + self.walk.batch_size]
            target, output = self._target(part), self._compressed(bases, part)
            difference += float((output - target).double().square().sum())
            norm += float(target.double().square().sum())
            cosine += float(nn.functional.cosine_similarity(output, target, dim=-1).double().sum())
            tokens += target.shape[0] * target.shape[1]
        return Comparison((difference / norm) ** 0.5, cosine / tokens)

    def _target(self, blocks: list[int]) -> Tensor:
        return self.walk.outputs[blocks].to(self.walk.device).float()

    def _compressed(self, bases: LayerBases, blocks: list[int]) -> Tensor:
        before = self.seam.state(self.index).bases
        # Bases are kept in float32 and used in the model's dtype; gradients come back through the cast.
        dtype = self.walk.inputs.dtype
        key, value = (None if basis is None else basis.to(dtype=dtype) for basis in (bases.key, bases.value))
        self.seam.set_bases(self.index, PartialBases(key, value, bases.codecs))
        try:
            return self.walk.forward(self.index, self.walk.inputs[blocks], blocks).float()
        finally:
            self.seam.set_bases(self.index, before)


@dataclass(frozen=True)
class LayerView(LayerTask):
    """What a method may use to fit a layer: besides its loss, the moments and the output projection.

    `output_weight` is float64 `[hidden, heads * head_dim]`.
    """

    moments: LayerMoments
    output_weight: Tensor


def view_layer(walk: LayerWalk, seam: Seam, layer: int, blocks: int | None = None) -> LayerView:
    """Run a layer and return everything that fitting it on the first `blocks` blocks needs (None: on all)."""
    blocks = len(walk.inputs) if blocks is None else blocks
    moments = run_and_measure(walk, seam, layer, blocks)
    architecture = architecture_of(seam.model.config)
    output = seam.modules[layer].get_submodule(architecture.output)
    weight = cast(Tensor, output.weight).detach().double()
    return LayerView(layer, walk, seam, blocks, moments, weight)
