"""Which heads of a layer share a basis, chosen layer by layer (`sharing="auto"`).

A wider group needs fewer numbers for the same error: heads of a layer carry much the same information. But a kernel that
rebuilds keys before RoPE does as many FLOP per byte of latent as the group is wide, whatever the rank; above a few hundred it
waits for arithmetic and not for memory. So each layer takes the narrowest group that is nearly as good at equal bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from orthokv.fit.measuring import measure_layer
from orthokv.fit.methods.base import Method
from orthokv.fit.task import LayerView
from orthokv.planning.profile import Candidate, LayerProfile
from orthokv.planning.surface import interpolate
from orthokv.spec.sharing import sharings_of
from orthokv.spec.vocabulary import Sharing, SharingChoice

# Errors are compared at these shares of a layer's uncompressed bytes.
COMPARED_KEPT = (0.5, 0.25, 0.125)
# A group is kept if its error at equal bytes is at most this much above that of the best.
SHARING_TOLERANCE = 0.03


def fit_layer(
    method: Method, view: LayerView, choice: SharingChoice, seed: int, samples: int
) -> LayerProfile:
    """Fit one layer and measure its errors on `samples` blocks; under `auto` in every form, of which one is kept."""
    return narrowest_good(
        {
            sharing: measure_layer(view, method.fit(view, sharing, seed).stored(), samples, sharing)
            for sharing in sharings_of(choice, view.geometry)
        }
    )


def narrowest_good(fitted: Mapping[Sharing, LayerProfile]) -> LayerProfile:
    """The narrowest form of a layer whose error at equal bytes is within `SHARING_TOLERANCE` of the best form's.

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
