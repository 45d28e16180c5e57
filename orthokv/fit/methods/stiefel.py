"""StiefAttention (Benfenati et al., arXiv 2601.21686): points on the Stiefel manifold that minimise a layer's output error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from orthokv.bases.basis import Bases, Basis, orthonormal
from orthokv.bases.manifold import RETRACTIONS, qr, tangent
from orthokv.fit.methods.base import FittedBases, descending_eigh, grouped_moment
from orthokv.fit.methods.learning import Adam, check_share, descend, order_tail
from orthokv.fit.methods.predictor import fit_predictor
from orthokv.fit.methods.weighted import whitened_layer
from orthokv.fit.task import LayerView
from orthokv.spec.errors import InvalidSetting
from orthokv.spec.vocabulary import Sharing

Parameterisation = Literal["direct", "predictor"]
Start = Literal["eigen", "weighted", "random"]


@dataclass(frozen=True)
class Stiefel:
    """Orthonormal bases, learned through the whole decoder layer (paper section 3).

    Attributes:
        parameterisation: ``"direct"`` moves the point itself, from a closed-form start. ``"predictor"`` is the paper's: an
            MLP maps the mean and variance of the activations to a matrix whose QR factor is the basis.
        steps: optimiser steps a layer (``direct``).
        epochs: largest number of passes over the blocks (``predictor``; the paper's 50).
        step_size: how far a column turns in a step at the start, in radians, about (``direct``).
        start: where ``direct`` starts: the singular vectors (``"eigen"``), the orthonormalised weighted closed form
            (``"weighted"``), or, to see what a start is worth, anywhere (``"random"``).
        retraction: a key of :data:`orthokv.bases.manifold.RETRACTIONS`.
        share: None trains every rank in turn; a share of the widths trains that rank alone (``direct``).
    """

    name: ClassVar[str] = "stiefel"
    learned: ClassVar[bool] = True
    refine_steps: ClassVar[int] = 0
    parameterisation: Parameterisation = "direct"
    steps: int = 200
    epochs: int = 50
    step_size: float = 0.05
    start: Start = "eigen"
    retraction: str = "cholesky"
    share: float | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "epochs"):
            if getattr(self, name) < 1:
                raise InvalidSetting(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.parameterisation not in ("direct", "predictor"):
            raise InvalidSetting(
                f"parameterisation must be 'direct' or 'predictor', not {self.parameterisation!r}"
            )
        if not self.step_size > 0:
            raise InvalidSetting(f"step_size must be above 0, not {self.step_size}")
        check_share(self.share)
        if self.start not in get_args(Start):
            raise InvalidSetting(f"start must be one of {', '.join(get_args(Start))}, not {self.start!r}")
        if self.retraction not in RETRACTIONS:
            raise InvalidSetting(
                f"retraction must be one of {', '.join(RETRACTIONS)}, not {self.retraction!r}"
            )

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
