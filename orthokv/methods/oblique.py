"""A learned pair: encoder and decoder move freely, from the weighted closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from orthokv.attention import Bases
from orthokv.basis import Basis, Sharing
from orthokv.capture import LayerView
from orthokv.errors import InvalidSetting
from orthokv.methods.base import FittedBases
from orthokv.methods.learning import Adam, descend
from orthokv.methods.weighted import Whitened, whitened_layer


@dataclass(frozen=True)
class Oblique:
    """Minimise the layer's output error over encoder and decoder, both of any shape.

    Attributes:
        steps: optimiser steps a layer.
        step_size: how far a column turns in a step at the start, in radians, about.

    The pair is moved in the whitened coordinates of :mod:`orthokv.methods.weighted`, where all directions matter alike, so
    that one step size fits all.
    """

    name: ClassVar[str] = "oblique"
    learned: ClassVar[bool] = True
    steps: int = 200
    step_size: float = 0.02

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InvalidSetting(f"steps must be at least 1, not {self.steps}")

    def fit(self, view: LayerView, sharing: Sharing, seed: int) -> FittedBases:
        geometry = view.geometry
        device = view.walk.device
        sides = whitened_layer(view, sharing)
        # Order: key encoder, key decoder, value encoder, value decoder.
        variables = [side.vectors.float().to(device).clone() for side in sides for _ in range(2)]
        roots = [m.float().to(device) for side in sides for m in (_scaled(side))]
        optimisers = [Adam(v) for v in variables]

        def basis(side: int, rank: int | None = None) -> Basis:
            encoder = roots[2 * side] @ variables[2 * side][..., :rank]
            decoder = roots[2 * side + 1] @ variables[2 * side + 1][..., :rank]
            return Basis(encoder, decoder, geometry.kv_heads, geometry.head_dim)

        def update(i: int, gradient: Tensor, factor: float) -> None:
            step = self.step_size * factor / variables[i].shape[-2] ** 0.5
            variables[i].sub_(step * optimisers[i].direction(gradient))

        losses = descend(
            view,
            variables,
            lambda rank_key, rank_value: Bases(basis(0, rank_key), basis(1, rank_value)),
            update,
            widths=(variables[0].shape[-1], variables[2].shape[-1]),
            steps=self.steps,
            seed=seed,
        )
        with torch.no_grad():
            return FittedBases(basis(0).to("cpu"), basis(1).to("cpu"), {"loss": losses})


def _scaled(side: Whitened) -> tuple[Tensor, Tensor]:
    """Both square roots, scaled so that latents have about the size of the activations (16-bit formats have limits)."""
    scale = side.root.diagonal(dim1=-2, dim2=-1).mean()
    return side.root / scale, side.inverse_root * scale
