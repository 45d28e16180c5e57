"""Profile + budget -> ranks of every layer.

Choosing one (rank_key, rank_value) per layer under a byte budget is a multiple-choice knapsack. It is small (about a
thousand options a layer) and solved exactly by dynamic programming over bytes.

What is minimised is the sum over layers of ``sensitivity * error^2``: the KL divergence that a layer's error causes on the
model's predictions, measured with only that layer compressed. Without sensitivities (a profile that skipped the
measurement) it is the sum of squared errors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from orthokv.basis import KeyMode, Sharing, group_width
from orthokv.budget import Budget
from orthokv.errors import BudgetUnreachable, InvalidSetting
from orthokv.geometry import AttentionGeometry, held_tokens
from orthokv.profile import ErrorProfile, LayerProfile, candidate_ranks
from orthokv.runtime.cache import POSITION_BYTES

Allocation = Literal["knapsack", "uniform", "threshold"]
ALLOCATIONS: tuple[Allocation, ...] = ("knapsack", "uniform", "threshold")

LATENT_BYTES = 2
# Ranks are multiples of width / 32: fine enough to spend a budget, coarse enough to suit matrix units.
RANK_STEPS = 32
_SENSITIVITY_FLOOR = 0.01
# Bisection over bytes for a perplexity budget stops at this share of the cache.
_KEPT_TOLERANCE = 0.004
# EigenAttention's rule: the energy threshold falls by this much a trial, and no rank below this share (released code).
THRESHOLD_STEP, SMALLEST_EIGEN_SHARE = 0.02, 0.45

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Plan:
    """Ranks of every layer, and what they cost.

    Attributes:
        ranks: ``(rank_key, rank_value)`` per group, one pair a layer.
        bytes_per_token: latents (2 bytes each) and positions, of the whole model; what a live cache will hold.
        expected_error: error of each layer at its ranks, interpolated in the profile's measured surface.
        expected_kl: sum of ``sensitivity * error^2``; None without sensitivities.
    """

    key_mode: KeyMode
    sharing: Sharing
    ranks: tuple[tuple[int, int], ...]
    bytes_per_token: int
    dense_bytes_per_token: int
    expected_error: tuple[float, ...]
    expected_kl: float | None
    budget: Budget
    allocation: Allocation

    @property
    def kept(self) -> float:
        return self.bytes_per_token / self.dense_bytes_per_token

    def to_dict(self) -> dict[str, Any]:
        return {
            "budget": {"metric": self.budget.metric, "value": self.budget.value},
            "allocation": self.allocation,
            "ranks": [{"key": k, "value": v} for k, v in self.ranks],
            "bytes_per_token": self.bytes_per_token,
            "dense_bytes_per_token": self.dense_bytes_per_token,
            "kept": self.kept,
            "expected_error": list(self.expected_error),
            "expected_kl": self.expected_kl,
        }


@dataclass(frozen=True)
class _Options:
    """Candidate rank pairs of one layer, flattened: ranks, bytes a token, squared error, damage."""

    ranks: Ints  # [n, 2]
    bytes: Ints
    error: Floats
    damage: Floats

    def take(self, index: Ints) -> _Options:
        return _Options(self.ranks[index], self.bytes[index], self.error[index], self.damage[index])


def position_bytes(geometry: AttentionGeometry, key_mode: KeyMode, tokens: int = 1) -> int:
    """Bytes that keys cached before RoPE need for the positions of ``tokens`` tokens (one copy for each window)."""
    if key_mode != "pre":
        return 0
    return POSITION_BYTES * sum(held_tokens(window, tokens) for window in geometry.rotated_windows())


def interpolate(layer: LayerProfile) -> tuple[Ints, Ints, Floats]:
    """The error surface on the allocator's grid: ranks_key ``[a]``, ranks_value ``[b]``, squared errors ``[a, b]``.

    Between measured ranks the logarithm of the squared error is linear in the rank, which fits measured curves well; in
    the last stretch, towards an exact cache, the squared error itself is.
    """
    measured = np.asarray(layer.error, dtype=np.float64) ** 2
    grids = [
        np.asarray(
            sorted(
                {
                    *ranks,
                    *range(max(1, ranks[-1] // RANK_STEPS), ranks[-1] + 1, max(1, ranks[-1] // RANK_STEPS)),
                }
            )
        )
        for ranks in (layer.ranks_key, layer.ranks_value)
    ]
    # Ranks below the smallest measured one would be extrapolated: leave them out.
    grid_key = grids[0][grids[0] >= layer.ranks_key[0]]
    grid_value = grids[1][grids[1] >= layer.ranks_value[0]]
    along_value = np.stack([_along(np.asarray(layer.ranks_value), row, grid_value) for row in measured])
    return (
        grid_key,
        grid_value,
        np.stack([_along(np.asarray(layer.ranks_key), c, grid_key) for c in along_value.T]).T,
    )


def _along(ranks: Ints, squared: Floats, grid: Ints) -> Floats:
    tiny = 1e-16
    found = np.exp(np.interp(grid, ranks, np.log(np.maximum(squared, tiny))))
    if len(ranks) > 1:
        last = grid >= ranks[-2]
        found[last] = np.interp(grid[last], ranks, squared)
    return found


def _options(layer: LayerProfile, weight: float) -> _Options:
    grid_key, grid_value, squared = interpolate(layer)
    ranks = np.stack(np.meshgrid(grid_key, grid_value, indexing="ij"), axis=-1).reshape(-1, 2)
    cost = LATENT_BYTES * (layer.key.groups * ranks[:, 0] + layer.value.groups * ranks[:, 1])
    error = squared.reshape(-1)
    return _Options(ranks, cost, np.sqrt(error), weight * error)


def _pareto(options: _Options) -> _Options:
    """Only options that no cheaper one beats, cheapest first."""
    order = np.lexsort((options.damage, options.bytes))
    best = np.minimum.accumulate(options.damage[order])
    keep = np.concatenate([[True], best[1:] < best[:-1]])
    return options.take(order[keep])


def _weights(profile: ErrorProfile) -> list[float]:
    if any(layer.sensitivity is None for layer in profile.layers):
        return [1.0] * len(profile.layers)
    found = [max(float(layer.sensitivity or 0.0), 0.0) for layer in profile.layers]
    # A layer whose measured effect drowns in rounding is not free to ruin: it keeps a hundredth of the mean.
    floor = _SENSITIVITY_FLOOR * (sum(found) / len(found) or 1.0)
    return [max(sensitivity, floor) for sensitivity in found]


def knapsack(options: list[_Options], budget_bytes: int) -> list[int] | None:
    """One option a layer with the least total damage within ``budget_bytes`` a token; None where nothing fits."""
    unit = int(np.gcd.reduce(np.concatenate([o.bytes for o in options])))
    size = budget_bytes // unit
    if size < sum(int(o.bytes.min()) // unit for o in options):
        return None
    total = np.zeros(size + 1)
    chosen: list[Ints] = []
    for layer in options:
        best = np.full(size + 1, np.inf)
        pick = np.full(size + 1, -1, dtype=np.int64)
        for i, (cost, damage) in enumerate(zip(layer.bytes // unit, layer.damage, strict=True)):
            if cost > size:
                break
            candidate = total[: size + 1 - cost] + damage
            better = candidate < best[cost:]
            best[cost:][better] = candidate[better]
            pick[cost:][better] = i
        total = best
        chosen.append(pick)
    left = int(np.argmin(total))
    found: list[int] = []
    for layer, pick in zip(reversed(options), reversed(chosen), strict=True):
        found.append(int(pick[left]))
        left -= int(layer.bytes[found[-1]]) // unit
    return found[::-1]


def allocate(profile: ErrorProfile, budget: Budget, allocation: Allocation = "knapsack") -> Plan:
    """Ranks for a ``kept`` or ``layer_error`` budget.

    ``uniform`` gives all layers, keys and values the same share of their width. ``threshold`` is EigenAttention's own rule
    for ``layer_error`` (see :func:`threshold_ranks`).

    Raises:
        BudgetUnreachable: no candidate is small (or good) enough.
        InvalidSetting: the budget needs the model to be evaluated (``perplexity_increase``), or does not fit the rule.
    """
    if budget.metric == "perplexity_increase":
        raise InvalidSetting("a perplexity budget needs the model: use allocate_for_perplexity")
    if allocation not in ALLOCATIONS:
        raise InvalidSetting(f"allocation must be one of {', '.join(ALLOCATIONS)}, not {allocation!r}")
    if allocation == "threshold":
        if budget.metric != "layer_error":
            raise InvalidSetting("allocation 'threshold' is defined for a layer_error budget only")
        return _plan(profile, budget, allocation, threshold_ranks(profile, budget.value))
    if allocation == "uniform" and budget.metric != "kept":
        raise InvalidSetting("allocation 'uniform' is defined for a kept budget only")
    weights = _weights(profile)
    every = [_options(layer, weight) for layer, weight in zip(profile.layers, weights, strict=True)]
    if budget.metric == "layer_error":
        ranks = [_smallest(o, budget.value, i) for i, o in enumerate(every)]
        plan = _plan(profile, budget, allocation, ranks)
        if plan.kept > 1:
            best = max(allocate(profile, Budget("kept", 1.0)).expected_error)
            raise BudgetUnreachable(
                f"layer_error {budget.value:g} would need more bytes than the uncompressed cache has; "
                f"within them it reaches {best:.3g}",
                asked=budget.value,
                best=best,
            )
        return plan
    fixed = position_bytes(profile.geometry, profile.key_mode)
    dense = profile.geometry.dense_bytes_per_token
    budget_bytes = int(budget.value * dense + 1e-9) - fixed
    if allocation == "uniform":
        return _plan(profile, budget, allocation, _uniform(profile, budget, budget_bytes))
    pruned = [_pareto(o) for o in every]
    picks = knapsack(pruned, budget_bytes)
    if picks is None:
        raise _below_smallest(budget, (sum(int(o.bytes.min()) for o in every) + fixed) / dense)
    ranks = [(int(o.ranks[i, 0]), int(o.ranks[i, 1])) for o, i in zip(pruned, picks, strict=True)]
    return _plan(profile, budget, allocation, ranks)


def _smallest(options: _Options, bound: float, layer: int) -> tuple[int, int]:
    good = np.flatnonzero(options.error <= bound)
    if not len(good):
        best = float(options.error.min())
        raise BudgetUnreachable(
            f"layer_error {bound:g} cannot be met: layer {layer} reaches {best:.3g} at full rank",
            asked=bound,
            best=best,
        )
    fitting = options.take(good)
    i = int(np.lexsort((fitting.error, fitting.bytes))[0])
    return int(fitting.ranks[i, 0]), int(fitting.ranks[i, 1])


def _uniform(profile: ErrorProfile, budget: Budget, budget_bytes: int) -> list[tuple[int, int]]:
    """The largest common share of the widths that fits, not below the ranks that were measured."""
    layer, count = profile.layers[0], len(profile.layers)
    steps = RANK_STEPS * 4

    def ranks(share: int) -> tuple[int, int]:
        pair = [max(1, share * basis.width // steps) for basis in (layer.key, layer.value)]
        return max(pair[0], layer.ranks_key[0]), max(pair[1], layer.ranks_value[0])

    def cost(pair: tuple[int, int]) -> int:
        return LATENT_BYTES * (layer.key.groups * pair[0] + layer.value.groups * pair[1]) * count

    fitting = [pair for pair in map(ranks, range(1, steps + 1)) if cost(pair) <= budget_bytes]
    if not fitting:
        fixed = position_bytes(profile.geometry, profile.key_mode)
        best = (cost(ranks(1)) + fixed) / profile.geometry.dense_bytes_per_token
        raise _below_smallest(budget, best)
    return [fitting[-1]] * count


def _below_smallest(budget: Budget, best: float) -> BudgetUnreachable:
    return BudgetUnreachable(
        f"kept {budget.value:g} cannot be met: the smallest profiled ranks keep {best:.4f} of the cache",
        asked=budget.value,
        best=best,
    )


def check_reachable(geometry: AttentionGeometry, sharing: Sharing, key_mode: KeyMode, budget: Budget) -> None:
    """Refuse, before anything is fitted, a ``kept`` budget that no profile of this geometry can meet.

    Raises:
        BudgetUnreachable: with the smallest share that can be kept.
    """
    if budget.metric != "kept":
        return
    latents = 0
    for keys in (True, False):
        _, width = group_width(sharing, geometry.kv_heads, geometry.head_dim, keys=keys)
        latents += geometry.kv_width // width * candidate_ranks(width)[0]
    best = (
        LATENT_BYTES * latents * geometry.layers + position_bytes(geometry, key_mode)
    ) / geometry.dense_bytes_per_token
    if budget.value < best:
        raise _below_smallest(budget, best)


def smallest_kept(profile: ErrorProfile) -> float:
    """The smallest share of the cache that a plan of this profile can keep."""
    smallest = sum(int(_options(layer, 1.0).bytes.min()) for layer in profile.layers)
    fixed = position_bytes(profile.geometry, profile.key_mode)
    return (smallest + fixed) / profile.geometry.dense_bytes_per_token


def threshold_ranks(profile: ErrorProfile, error_budget: float) -> list[tuple[int, int]]:
    """EigenAttention's rule, as released: one threshold on the summed singular values, for keys and values together.

    Per layer it starts at 1 and falls by 0.02 a trial; a rank counts the singular values whose cumulative share (of their
    sum, not of their squares) is below the threshold, the largest over the heads. The search ends when the layer's error
    passes the budget or a rank falls to 45 % of the width, then goes back one step. Errors are read from the profile.
    """
    found: list[tuple[int, int]] = []
    for layer in profile.layers:
        if layer.spectrum_key is None or layer.spectrum_value is None:
            raise InvalidSetting(
                "allocation 'threshold' needs the singular values, which only method 'eigen' has"
            )
        shares = [
            np.cumsum(np.asarray(s, dtype=np.float64), axis=-1)
            / np.asarray(s, dtype=np.float64).sum(-1, keepdims=True)
            for s in (layer.spectrum_key, layer.spectrum_value)
        ]
        grid_key, grid_value, squared = interpolate(layer)
        full = (layer.key.rank, layer.value.rank)
        best = full
        threshold = 1.0
        while threshold > THRESHOLD_STEP:
            threshold -= THRESHOLD_STEP
            pair = tuple(max(1, int((share < threshold).sum(-1).max())) for share in shares)
            # The error at the next smaller rank of the grid is not below the true one.
            i = int((np.searchsorted(grid_key, pair[0], side="right") - 1).clip(0))
            j = int((np.searchsorted(grid_value, pair[1], side="right") - 1).clip(0))
            small = any(r <= SMALLEST_EIGEN_SHARE * f for r, f in zip(pair, full, strict=True))
            if squared[i, j] ** 0.5 >= error_budget or small:
                break
            best = (pair[0], pair[1])
        found.append(best)
    return found


def _plan(
    profile: ErrorProfile, budget: Budget, allocation: Allocation, ranks: list[tuple[int, int]]
) -> Plan:
    errors: list[float] = []
    latents = 0
    for layer, (rank_key, rank_value) in zip(profile.layers, ranks, strict=True):
        grid_key, grid_value, squared = interpolate(layer)
        row = [float(np.interp(rank_value, grid_value, line)) for line in squared]
        errors.append(float(np.interp(rank_key, grid_key, row)) ** 0.5)
        latents += layer.key.groups * rank_key + layer.value.groups * rank_value
    known = all(layer.sensitivity is not None for layer in profile.layers)
    kl = sum(w * e**2 for w, e in zip(_weights(profile), errors, strict=True)) if known else None
    return Plan(
        key_mode=profile.key_mode,
        sharing=profile.sharing,
        ranks=tuple(ranks),
        bytes_per_token=latents * LATENT_BYTES + position_bytes(profile.geometry, profile.key_mode),
        dense_bytes_per_token=profile.geometry.dense_bytes_per_token,
        expected_error=tuple(errors),
        expected_kl=kl,
        budget=budget,
        allocation=allocation,
    )


def allocate_for_perplexity(
    profile: ErrorProfile, budget: Budget, increase: Callable[[Plan], float]
) -> tuple[Plan, float]:
    """The smallest cache whose measured perplexity increase stays within the budget, and that increase.

    ``increase`` evaluates a plan on held-out text. Bisection over the share of bytes kept: the knapsack's damage falls with
    every byte, so the increase does too, up to the noise of the measurement.

    Raises:
        BudgetUnreachable: even the best plan that is smaller than the uncompressed cache exceeds the budget.
    """
    low, high = smallest_kept(profile), 1.0
    best = allocate(profile, Budget("kept", high))
    reached = increase(best)
    if not reached <= budget.value:  # also where it is not a number
        raise BudgetUnreachable(
            f"perplexity_increase {budget.value:g} cannot be met: the best plan, at kept {best.kept:.3f}, "
            f"reaches {reached:.4g}",
            asked=budget.value,
            best=reached,
        )
    while high - low > _KEPT_TOLERANCE:
        middle = (low + high) / 2
        plan = allocate(profile, Budget("kept", middle))
        found = increase(plan)
        if found <= budget.value:
            best, reached, high = plan, found, middle
        else:
            low = middle
    return _plan(profile, budget, "knapsack", list(best.ranks)), reached
