"""A learned oblique projector: encoder and decoder move together, from the weighted closed form."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from orthokv.bases.basis import Bases, Basis
from orthokv.bases.manifold import duals
from orthokv.fit.methods.base import FittedBases
from orthokv.fit.methods.learning import Adam, descend
from orthokv.fit.methods.weighted import Whitened, whitened_layer
from orthokv.fit.task import LayerView
from orthokv.spec.methods import ObliqueSettings
from orthokv.spec.vocabulary import Sharing


@dataclass(frozen=True)
class Oblique(ObliqueSettings):
    """Minimise the layer's output error over invertible matrices `A`: encoder `A`, decoder `A^-T`.


    The first `r` columns of both are an oblique projector for every `r`, and the full rank is exact. Two free matrices
    would have no such order: what a few columns learn to shrink, the others could not add back. `A` is moved in the whitened
    coordinates of `orthokv.fit.methods.weighted`, where all directions matter alike, so that one step size fits all.
    """

    def fit(self, view: LayerView, sharing: Sharing, seed: int) -> FittedBases:
        geometry = view.geometry
        device = view.walk.device
        sides = whitened_layer(view, sharing)
        points = [side.vectors.float().to(device).clone() for side in sides]
        roots = [tuple(m.float().to(device) for m in _scaled(side)) for side in sides]
        optimisers = [Adam(point) for point in points]

        def pair(rank_key: int | None = None, rank_value: int | None = None) -> tuple[Basis, Basis]:
            key, value = (
                Basis(
                    root @ point[..., :rank],
                    inverse_root @ dual[..., :rank],
                    geometry.kv_heads,
                    geometry.head_dim,
                )
                for point, dual, (root, inverse_root), rank in zip(
                    points, duals(points), roots, (rank_key, rank_value), strict=True
                )
            )
            return key, value

        def update(i: int, gradient: Tensor, factor: float) -> None:
            step = self.step_size * factor / points[i].shape[-2] ** 0.5
            points[i].sub_(step * optimisers[i].direction(gradient))

        losses = descend(
            view,
            points,
            lambda rank_key, rank_value: Bases(*pair(rank_key, rank_value)),
            update,
            widths=(points[0].shape[-1], points[1].shape[-1]),
            steps=self.steps,
            seed=seed,
            share=self.share,
        )
        return FittedBases(*pair(), {"loss": losses})


def _scaled(side: Whitened) -> tuple[Tensor, Tensor]:
    """Both square roots, scaled so that latents have about the size of the activations (16-bit formats have limits)."""
    scale = side.root.diagonal(dim1=-2, dim2=-1).mean()
    return side.root / scale, side.inverse_root * scale
