"""StiefAttention (Benfenati et al., arXiv 2601.21686): points on the Stiefel manifold that minimise a layer's output error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from orthokv.bases.basis import Bases, Basis, orthonormal
from orthokv.bases.manifold import RETRACTIONS, qr, tangent
from orthokv.fit.methods.base import FittedBases, descending_eigh, grouped_moment
from orthokv.fit.methods.learning import Adam, descend, order_tail
from orthokv.fit.methods.predictor import fit_predictor
from orthokv.fit.methods.weighted import whitened_layer
from orthokv.fit.task import LayerView
from orthokv.spec.methods import StiefelSettings
from orthokv.spec.vocabulary import Sharing

Parameterisation = Literal["direct", "predictor"]
Start = Literal["eigen", "weighted", "random"]


@dataclass(frozen=True)
class Stiefel(StiefelSettings):
    """Orthonormal bases, learned through the whole decoder layer (paper section 3)."""

    def fit(self, view: LayerView, sharing: Sharing, seed: int) -> FittedBases:
        if self.parameterisation == "predictor":
            return fit_predictor(view, sharing, seed, epochs=self.epochs)
        geometry = view.geometry
        retract = RETRACTIONS[self.retraction]
        points = [p.float().to(view.walk.device) for p in self._start(view, sharing, seed)]
        optimisers = [Adam(p) for p in points]

        def basis(side: int, rank: int | None = None) -> Basis:
            return orthonormal(points[side][..., :rank], geometry.kv_heads, geometry.head_dim)

        def update(i: int, gradient: Tensor, factor: float) -> None:
            direction = optimisers[i].direction(tangent(points[i], gradient))
            step = self.step_size * factor / points[i].shape[-2] ** 0.5
            points[i].copy_(retract(points[i] - step * tangent(points[i], direction)))

        losses = descend(
            view,
            points,
            lambda rank_key, rank_value: Bases(basis(0, rank_key), basis(1, rank_value)),
            update,
            widths=(points[0].shape[-1], points[1].shape[-1]),
            steps=self.steps,
            seed=seed,
            share=self.share,
        )
        for point, name in zip(points, ("key", "value"), strict=True):
            point.copy_(order_tail(point, grouped_moment(view, sharing, name)))
        return FittedBases(basis(0), basis(1), {"loss": losses})

    def _start(self, view: LayerView, sharing: Sharing, seed: int) -> list[Tensor]:
        moments = [grouped_moment(view, sharing, name) for name in ("key", "value")]
        if self.start == "eigen":
            return [descending_eigh(moment)[1] for moment in moments]
        if self.start == "random":
            generator = torch.Generator().manual_seed(seed)
            # Drawn on the CPU, so that a seed means the same on every device.
            return [
                qr(torch.randn(m.shape, dtype=m.dtype, generator=generator).to(m.device)) for m in moments
            ]
        # QR keeps the spans of every prefix of the weighted encoder's columns, so the order of importance survives.
        return [torch.linalg.qr(side.root @ side.vectors)[0] for side in whitened_layer(view, sharing)]
