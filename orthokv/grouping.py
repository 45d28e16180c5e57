"""Which heads of a layer share a basis, chosen layer by layer (``sharing="auto"``).

A wider group needs fewer numbers for the same error: heads of a layer carry much the same information. But a kernel that
rebuilds keys before RoPE does as many FLOP per byte of latent as the group is wide, whatever the rank; above a few hundred it
waits for arithmetic and not for memory. So each layer takes the narrowest group that is nearly as good at equal bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from orthokv.basis import GROUP_HEADS, Sharing, SharingChoice, group_width
from orthokv.capture import LayerView
from orthokv.geometry import AttentionGeometry
from orthokv.methods.base import Method
from orthokv.profile import Candidate, LayerProfile, measure_layer
from orthokv.rankgrid import interpolate

# What ``auto`` chooses from, narrowest first.
GROUPED: tuple[Sharing, ...] = ("pair", "quad", "joint")
# Errors are compared at these shares of a layer's uncompressed bytes.
COMPARED_KEPT = (0.5, 0.25, 0.125)
# A group is kept if its error at equal bytes is at most this much above that of the best.
SHARING_TOLERANCE = 0.03


def sharings_of(choice: SharingChoice, geometry: AttentionGeometry) -> tuple[Sharing, ...]:
    """The forms that a layer may take under a choice, narrowest first.

    For ``auto`` those of :data:`GROUPED` that divide the KV heads; a group that would hold all of them is ``joint``.

    Raises:
        InvalidSetting: the KV heads do not divide into the groups that were asked for.
    """
    heads = geometry.kv_heads
    if choice == "auto":
        return tuple(s for s in GROUPED if s == "joint" or _is_part(GROUP_HEADS[s], heads))
    group_width(choice, heads, geometry.head_dim, keys=True)
    return (choice,)


def _is_part(group: int, heads: int) -> bool:
    return group < heads and heads % group == 0


def fit_layer(
    method: Method, view: LayerView, choice: SharingChoice, seed: int, samples: int
) -> LayerProfile:
    """Fit one layer and measure its errors on ``samples`` blocks; under ``auto`` in every form, of which one is kept."""
    return narrowest_good(
        {
            sharing: measure_layer(view, method.fit(view, sharing, seed).stored(), samples, sharing)
            for sharing in sharings_of(choice, view.geometry)
        }
    )


def narrowest_good(fitted: Mapping[Sharing, LayerProfile]) -> LayerProfile:
    """The narrowest form of a layer whose error at equal bytes is within :data:`SHARING_TOLERANCE` of the best form's.

    Args:
        fitted: one layer in each form, narrowest first; the one that is returned notes what was compared.
    """
    layers = list(fitted.values())
    if len(layers) == 1:
        return layers[0]
    errors = np.array([[error_at_bytes(layer, kept) for kept in COMPARED_KEPT] for layer in layers])
    # Ranks of very narrow heads are coarse: where one form cannot be that small, nothing can be compared.
    reached = np.isfinite(errors).all(axis=0)
    kept = tuple(share for share, all_reach in zip(COMPARED_KEPT, reached, strict=True) if all_reach)
    candidates = tuple(
        Candidate(sharing, kept, tuple(row[reached].tolist()))
        for sharing, row in zip(fitted, errors, strict=True)
    )
    bound = (1 + SHARING_TOLERANCE) * min(candidate.mean_error for candidate in candidates)
    good = next(i for i, candidate in enumerate(candidates) if candidate.mean_error <= bound)
    return replace(layers[good], candidates=candidates)


def error_at_bytes(layer: LayerProfile, kept: float) -> float:
    """The smallest error that the layer's surface has within a share of its uncompressed bytes; infinite where none fits."""
    rank_key, rank_value, squared = interpolate(layer)
    numbers = layer.key.groups * rank_key[:, None] + layer.value.groups * rank_value
    fits = numbers <= kept * 2 * layer.key.kv_heads * layer.key.head_dim
    return float(squared[fits].min()) ** 0.5 if fits.any() else float("inf")
