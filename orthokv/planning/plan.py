"""A plan: ranks of every layer, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from orthokv.planning.profile import ErrorProfile
from orthokv.planning.surface import squared_errors
from orthokv.spec.budget import Budget
from orthokv.spec.codec import SIXTEEN_BIT, CodecSpec
from orthokv.spec.footprint import Footprint, LayerPlan, SidePlan, dense_bytes
from orthokv.spec.rankgrid import FREE, RankGrid
from orthokv.spec.vocabulary import Allocation, KeyMode, SharingChoice

_SENSITIVITY_FLOOR = 0.01


@dataclass(frozen=True)
class Plan:
    """Ranks of every layer, and what they cost.

    Attributes:
        layers: rank, groups and codec of the keys and of the values of each layer.
        bytes_per_token: latents and positions of the whole model; what a live cache will hold.
        expected_error: error of each layer at its ranks, interpolated in the profile's measured surface.
        expected_kl: sum of `sensitivity * error^2`, nats a token; None without sensitivities.
        dense_bytes_per_token: of the 16-bit cache of the uncompressed model.
        grid: the ranks that were allowed.
    """

    key_mode: KeyMode
    sharing: SharingChoice
    layers: tuple[LayerPlan, ...]
    bytes_per_token: int
    dense_bytes_per_token: int
    expected_error: tuple[float, ...]
    expected_kl: float | None
    budget: Budget
    allocation: Allocation
    grid: RankGrid = FREE

    @property
    def kept(self) -> float:
        """Planned bytes over those of the 16-bit cache."""
        return self.bytes_per_token / self.dense_bytes_per_token

    @property
    def ranks(self) -> tuple[tuple[int, int], ...]:
        """`(rank_key, rank_value)` per group, one pair a layer."""
        return tuple(layer.ranks for layer in self.layers)

    @property
    def codecs(self) -> set[str]:
        """Names of the codecs in use."""
        return {side.codec.name for layer in self.layers for side in (layer.key, layer.value)}

    def to_dict(self) -> dict[str, Any]:
        return {
            "budget": {"metric": self.budget.metric, "value": self.budget.value},
            "allocation": self.allocation,
            "rank_multiple": self.grid.multiple,
            "rank_choices": list(self.grid.choices),
            "ranks": [{"key": k, "value": v} for k, v in self.ranks],
            "codecs": [{"key": x.key.codec.name, "value": x.value.codec.name} for x in self.layers],
            "bytes_per_token": self.bytes_per_token,
            "dense_bytes_per_token": self.dense_bytes_per_token,
            "kept": self.kept,
            "expected_error": list(self.expected_error),
            "expected_kl": self.expected_kl,
        }


def damage_weights(profile: ErrorProfile) -> list[float]:
    if any(layer.sensitivity is None for layer in profile.layers):
        return [1.0] * len(profile.layers)
    found = [max(float(layer.sensitivity or 0.0), 0.0) for layer in profile.layers]
    # A layer whose measured effect drowns in rounding is not free to ruin: it keeps a hundredth of the mean.
    floor = _SENSITIVITY_FLOOR * (sum(found) / len(found) or 1.0)
    return [max(sensitivity, floor) for sensitivity in found]


def layer_plans(
    profile: ErrorProfile, ranks: Sequence[tuple[int, int]], codec: CodecSpec = SIXTEEN_BIT
) -> tuple[LayerPlan, ...]:
    """What is stored of each layer at the given ranks."""
    return tuple(
        LayerPlan(
            SidePlan(rank_key, layer.key.groups, codec), SidePlan(rank_value, layer.value.groups, codec)
        )
        for layer, (rank_key, rank_value) in zip(profile.layers, ranks, strict=True)
    )


def plan_ranks(
    profile: ErrorProfile,
    budget: Budget,
    allocation: Allocation,
    ranks: Sequence[tuple[int, int]],
    grid: RankGrid = FREE,
    codec: CodecSpec = SIXTEEN_BIT,
) -> Plan:
    """The plan of given ranks, `(rank_key, rank_value)` a layer: what they cost and what error the profile expects."""
    errors: list[float] = []
    for layer, (rank_key, rank_value) in zip(profile.layers, ranks, strict=True):
        squared = squared_errors(layer, np.asarray([rank_key]), np.asarray([rank_value]))
        errors.append(float(squared[0, 0]) ** 0.5)
    known = all(layer.sensitivity is not None for layer in profile.layers)
    kl = sum(w * e**2 for w, e in zip(damage_weights(profile), errors, strict=True)) if known else None
    layers = layer_plans(profile, ranks, codec)
    return Plan(
        key_mode=profile.key_mode,
        sharing=profile.sharing,
        layers=layers,
        bytes_per_token=Footprint(profile.geometry, profile.key_mode).cache_bytes(layers),
        dense_bytes_per_token=dense_bytes(profile.geometry),
        expected_error=tuple(errors),
        expected_kl=kl,
        budget=budget,
        allocation=allocation,
        grid=grid,
    )
