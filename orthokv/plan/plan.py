"""A plan: ranks of every layer, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from orthokv.plan.profile import ErrorProfile
from orthokv.plan.surface import squared_errors
from orthokv.spec.budget import Budget
from orthokv.spec.footprint import POSITION_BYTES, held_tokens
from orthokv.spec.geometry import Geometry
from orthokv.spec.rankgrid import FREE, RankGrid
from orthokv.spec.vocabulary import KeyMode, SharingChoice

Allocation = Literal["knapsack", "greedy", "uniform", "pareto", "threshold"]


ALLOCATIONS: tuple[Allocation, ...] = ("knapsack", "greedy", "uniform", "pareto", "threshold")


LATENT_BYTES = 2


_SENSITIVITY_FLOOR = 0.01


@dataclass(frozen=True)
class Plan:
    """Ranks of every layer, and what they cost.

    Attributes:
        ranks: ``(rank_key, rank_value)`` per group, one pair a layer.
        bytes_per_token: latents (2 bytes each) and positions, of the whole model; what a live cache will hold.
        expected_error: error of each layer at its ranks, interpolated in the profile's measured surface.
        expected_kl: sum of ``sensitivity * error^2``; None without sensitivities.
        grid: the ranks that were allowed.
    """

    key_mode: KeyMode
    sharing: SharingChoice
    ranks: tuple[tuple[int, int], ...]
    bytes_per_token: int
    dense_bytes_per_token: int
    expected_error: tuple[float, ...]
    expected_kl: float | None
    budget: Budget
    allocation: Allocation
    grid: RankGrid = FREE

    @property
    def kept(self) -> float:
        return self.bytes_per_token / self.dense_bytes_per_token

    def to_dict(self) -> dict[str, Any]:
        return {
            "budget": {"metric": self.budget.metric, "value": self.budget.value},
            "allocation": self.allocation,
            "rank_multiple": self.grid.multiple,
            "rank_choices": list(self.grid.choices),
            "ranks": [{"key": k, "value": v} for k, v in self.ranks],
            "bytes_per_token": self.bytes_per_token,
            "dense_bytes_per_token": self.dense_bytes_per_token,
            "kept": self.kept,
            "expected_error": list(self.expected_error),
            "expected_kl": self.expected_kl,
        }


def position_bytes(geometry: Geometry, key_mode: KeyMode, tokens: int = 1) -> int:
    """Bytes that keys cached before RoPE need for the positions of ``tokens`` tokens (one copy for each window)."""
    if key_mode != "pre":
        return 0
    return POSITION_BYTES * sum(held_tokens(window, tokens) for window in geometry.rotated_windows())


def damage_weights(profile: ErrorProfile) -> list[float]:
    if any(layer.sensitivity is None for layer in profile.layers):
        return [1.0] * len(profile.layers)
    found = [max(float(layer.sensitivity or 0.0), 0.0) for layer in profile.layers]
    # A layer whose measured effect drowns in rounding is not free to ruin: it keeps a hundredth of the mean.
    floor = _SENSITIVITY_FLOOR * (sum(found) / len(found) or 1.0)
    return [max(sensitivity, floor) for sensitivity in found]


def latents_of(profile: ErrorProfile, ranks: Sequence[tuple[int, int]]) -> int:
    """Latent numbers that a token adds to the cache of the whole model."""
    return sum(
        layer.key.groups * rank_key + layer.value.groups * rank_value
        for layer, (rank_key, rank_value) in zip(profile.layers, ranks, strict=True)
    )


def plan_ranks(
    profile: ErrorProfile,
    budget: Budget,
    allocation: Allocation,
    ranks: Sequence[tuple[int, int]],
    grid: RankGrid = FREE,
) -> Plan:
    """The plan of given ranks, ``(rank_key, rank_value)`` a layer: what they cost and what error the profile expects."""
    errors: list[float] = []
    for layer, (rank_key, rank_value) in zip(profile.layers, ranks, strict=True):
        squared = squared_errors(layer, np.asarray([rank_key]), np.asarray([rank_value]))
        errors.append(float(squared[0, 0]) ** 0.5)
    known = all(layer.sensitivity is not None for layer in profile.layers)
    kl = sum(w * e**2 for w, e in zip(damage_weights(profile), errors, strict=True)) if known else None
    return Plan(
        key_mode=profile.key_mode,
        sharing=profile.sharing,
        ranks=tuple(ranks),
        bytes_per_token=LATENT_BYTES * latents_of(profile, ranks)
        + position_bytes(profile.geometry, profile.key_mode),
        dense_bytes_per_token=profile.geometry.dense_bytes_per_token,
        expected_error=tuple(errors),
        expected_kl=kl,
        budget=budget,
        allocation=allocation,
        grid=grid,
    )
