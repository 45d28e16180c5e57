"""Profile + budget -> ranks of every layer.

Choosing one (rank_key, rank_value) per layer under a byte budget is a multiple-choice knapsack. It is small (about a
thousand options a layer) and solved exactly by dynamic programming over bytes. Other rules stand beside it for comparison:
``greedy``, ``uniform``, and those of the papers (``pareto`` of StiefAttention, ``threshold`` of EigenAttention).

What is minimised is the sum over layers of ``sensitivity * error^2``: the KL divergence that a layer's error causes on the
model's predictions, measured with only that layer compressed. Without sensitivities (a profile that skipped the
measurement) it is the sum of squared errors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np

from orthokv.basis import KeyMode, Sharing, SharingChoice, group_width
from orthokv.budget import Budget
from orthokv.errors import BudgetUnreachable, InvalidSetting
from orthokv.geometry import AttentionGeometry, held_tokens
from orthokv.grouping import sharings_of
from orthokv.knapsack import Ints, Options, greedy, knapsack, pareto
from orthokv.profile import ErrorProfile, LayerProfile, candidate_ranks
from orthokv.rankgrid import FREE, RankGrid, interpolate, squared_errors
from orthokv.runtime.cache import POSITION_BYTES

Allocation = Literal["knapsack", "greedy", "uniform", "pareto", "threshold"]
ALLOCATIONS: tuple[Allocation, ...] = ("knapsack", "greedy", "uniform", "pareto", "threshold")

LATENT_BYTES = 2
_SENSITIVITY_FLOOR = 0.01
# Bisection over bytes for a perplexity budget stops at this share of the cache.
_KEPT_TOLERANCE = 0.004
# EigenAttention's rule: the energy threshold falls by this much a trial, and no rank below this share (released code).
THRESHOLD_STEP, SMALLEST_EIGEN_SHARE = 0.02, 0.45
# StiefAttention's depth weights (v1, section 4.3). Where early ends and late begins is not stated: a quarter each is ours.
EARLY_WEIGHT, LATE_WEIGHT, DEPTH_SHARE = 2.0, 1.75, 0.25
# Uniform ranks are a multiple of width / 128 where nothing else is asked: all layers step together, so steps must be fine.
_UNIFORM_STEPS = 128
_BISECTIONS = 24


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


def position_bytes(geometry: AttentionGeometry, key_mode: KeyMode, tokens: int = 1) -> int:
    """Bytes that keys cached before RoPE need for the positions of ``tokens`` tokens (one copy for each window)."""
    if key_mode != "pre":
        return 0
    return POSITION_BYTES * sum(held_tokens(window, tokens) for window in geometry.rotated_windows())


def _options(layer: LayerProfile, grid: RankGrid, weight: float, power: int = 2) -> Options:
    """Every pair of allowed ranks; its damage is ``weight * error^power``."""
    grid_key, grid_value, squared = interpolate(layer, grid)
    ranks = np.stack(np.meshgrid(grid_key, grid_value, indexing="ij"), axis=-1).reshape(-1, 2)
    cost = LATENT_BYTES * (layer.key.groups * ranks[:, 0] + layer.value.groups * ranks[:, 1])
    error = np.sqrt(squared.reshape(-1))
    return Options(ranks, cost, error, weight * error**power)


def _weights(profile: ErrorProfile) -> list[float]:
    if any(layer.sensitivity is None for layer in profile.layers):
        return [1.0] * len(profile.layers)
    found = [max(float(layer.sensitivity or 0.0), 0.0) for layer in profile.layers]
    # A layer whose measured effect drowns in rounding is not free to ruin: it keeps a hundredth of the mean.
    floor = _SENSITIVITY_FLOOR * (sum(found) / len(found) or 1.0)
    return [max(sensitivity, floor) for sensitivity in found]


def depth_weights(layers: int) -> list[float]:
    """How much StiefAttention's allocation counts the error of each layer: 2 early, 1.75 late, 1 between."""
    edge = max(1, round(DEPTH_SHARE * layers))
    return [EARLY_WEIGHT if i < edge else LATE_WEIGHT if i >= layers - edge else 1.0 for i in range(layers)]


def allocate(
    profile: ErrorProfile,
    budget: Budget,
    allocation: Allocation = "knapsack",
    grid: RankGrid = FREE,
) -> Plan:
    """Ranks for a ``kept`` or ``layer_error`` budget.

    Args:
        allocation: ``knapsack`` minimises the expected damage exactly; ``greedy`` takes the step of least damage per byte
            until the budget is met; ``uniform`` gives all layers, keys and values the same share of their width.
            ``pareto`` is StiefAttention's rule in the form that can be implemented from what is published: the fronts of
            bytes against *depth-weighted error* (:func:`depth_weights`), walked down greedily to a ``kept`` budget, or for
            ``layer_error`` the cheapest pair whose weighted error is within it. ``threshold`` is EigenAttention's
            (:func:`threshold_ranks`); for ``kept`` its error budget is raised until its ranks fit.
        grid: ranks that may be used; all rules respect it, and the knapsack is exact under it.

    Raises:
        BudgetUnreachable: no candidate is small (or good) enough.
        InvalidSetting: the budget needs the model to be evaluated (``perplexity_increase``), does not fit the rule, or no
            rank is left by the grid.
    """
    if budget.metric == "perplexity_increase":
        raise InvalidSetting("a perplexity budget needs the model: use allocate_for_perplexity")
    if allocation not in ALLOCATIONS:
        raise InvalidSetting(f"allocation must be one of {', '.join(ALLOCATIONS)}, not {allocation!r}")
    if budget.metric == "layer_error":
        return plan_ranks(profile, budget, allocation, _for_error(profile, budget, allocation, grid), grid)
    fixed = position_bytes(profile.geometry, profile.key_mode)
    budget_bytes = int(budget.value * profile.geometry.dense_bytes_per_token + 1e-9) - fixed
    if allocation == "uniform":
        return plan_ranks(profile, budget, allocation, _uniform(profile, budget, budget_bytes, grid), grid)
    if allocation == "threshold":
        return plan_ranks(profile, budget, allocation, _threshold_within(profile, budget, grid), grid)
    if allocation == "pareto":
        weights, power = depth_weights(len(profile.layers)), 1
    else:
        weights, power = _weights(profile), 2
    fronts = [
        pareto(_options(layer, grid, weight, power))
        for layer, weight in zip(profile.layers, weights, strict=True)
    ]
    picks = (knapsack if allocation == "knapsack" else greedy)(fronts, budget_bytes)
    if picks is None:
        smallest = sum(int(o.bytes.min()) for o in fronts) + fixed
        raise _below_smallest(budget, smallest / profile.geometry.dense_bytes_per_token)
    return plan_ranks(
        profile, budget, allocation, [o.pair(i) for o, i in zip(fronts, picks, strict=True)], grid
    )


def _for_error(
    profile: ErrorProfile, budget: Budget, allocation: Allocation, grid: RankGrid
) -> list[tuple[int, int]]:
    if allocation == "threshold":
        return threshold_ranks(profile, budget.value, grid)
    if allocation in ("uniform", "greedy"):
        raise InvalidSetting(f"allocation {allocation!r} is defined for a kept budget only")
    count = len(profile.layers)
    weights = depth_weights(count) if allocation == "pareto" else [1.0] * count
    ranks = [
        _smallest(_options(layer, grid, 1.0), budget.value / weight, layer.index)
        for layer, weight in zip(profile.layers, weights, strict=True)
    ]
    if plan_ranks(profile, budget, allocation, ranks, grid).kept > 1:
        best = max(allocate(profile, Budget("kept", 1.0), grid=grid).expected_error)
        raise BudgetUnreachable(
            f"layer_error {budget.value:g} would need more bytes than the uncompressed cache has; "
            f"within them it reaches {best:.3g}",
            asked=budget.value,
            best=best,
        )
    return ranks


def _smallest(options: Options, bound: float, layer: int) -> tuple[int, int]:
    good = np.flatnonzero(options.error <= bound)
    if not len(good):
        best = float(options.error.min())
        raise BudgetUnreachable(
            f"layer_error {bound:g} cannot be met: layer {layer} reaches {best:.3g} at its largest ranks",
            asked=bound,
            best=best,
        )
    fitting = options.take(good)
    return fitting.pair(int(np.lexsort((fitting.error, fitting.bytes))[0]))


def _uniform(
    profile: ErrorProfile, budget: Budget, budget_bytes: int, grid: RankGrid
) -> list[tuple[int, int]]:
    """The largest common share of the widths that fits, not below the ranks that were measured."""

    @cache  # layers of one sharing have the same ranks
    def rank(share: int, measured: tuple[int, ...]) -> int:
        wanted = max(measured[0], share * measured[-1] // _UNIFORM_STEPS)
        if grid.free:
            return wanted
        allowed = grid.ranks(measured)
        return int(allowed[max(0, int(np.searchsorted(allowed, wanted, side="right")) - 1)])

    def pairs(share: int) -> list[tuple[int, int]]:
        return [(rank(share, layer.ranks_key), rank(share, layer.ranks_value)) for layer in profile.layers]

    def cost(pairs: list[tuple[int, int]]) -> int:
        return LATENT_BYTES * _latents(profile, pairs)

    fitting = [p for p in map(pairs, range(1, _UNIFORM_STEPS + 1)) if cost(p) <= budget_bytes]
    if not fitting:
        fixed = position_bytes(profile.geometry, profile.key_mode)
        raise _below_smallest(budget, (cost(pairs(1)) + fixed) / profile.geometry.dense_bytes_per_token)
    return fitting[-1]


def _latents(profile: ErrorProfile, ranks: Sequence[tuple[int, int]]) -> int:
    """Latent numbers that a token adds to the cache of the whole model."""
    return sum(
        layer.key.groups * rank_key + layer.value.groups * rank_value
        for layer, (rank_key, rank_value) in zip(profile.layers, ranks, strict=True)
    )


def _below_smallest(budget: Budget, best: float) -> BudgetUnreachable:
    return BudgetUnreachable(
        f"kept {budget.value:g} cannot be met: the smallest profiled ranks keep {best:.4f} of the cache",
        asked=budget.value,
        best=best,
    )


def check_reachable(
    geometry: AttentionGeometry,
    sharing: SharingChoice,
    key_mode: KeyMode,
    budget: Budget,
    grid: RankGrid = FREE,
) -> None:
    """Refuse, before anything is fitted, a ``kept`` budget that no profile of this geometry can meet.

    Raises:
        BudgetUnreachable: with the smallest share that can be kept.
        InvalidSetting: the KV heads do not divide into the groups of ``sharing``, or the grid leaves no rank at all to a form
            that a layer may take.
    """

    def smallest(form: Sharing, *, keys: bool) -> int:
        _, width = group_width(form, geometry.kv_heads, geometry.head_dim, keys=keys)
        return geometry.kv_width // width * int(grid.ranks(candidate_ranks(width))[0])

    forms = sharings_of(sharing, geometry)
    latents = min(smallest(form, keys=True) + smallest(form, keys=False) for form in forms)
    best = (
        LATENT_BYTES * latents * geometry.layers + position_bytes(geometry, key_mode)
    ) / geometry.dense_bytes_per_token
    if budget.metric == "kept" and budget.value < best:
        raise _below_smallest(budget, best)


def smallest_kept(profile: ErrorProfile, grid: RankGrid = FREE) -> float:
    """The smallest share of the cache that a plan of this profile can keep."""
    smallest = sum(int(_options(layer, grid, 1.0).bytes.min()) for layer in profile.layers)
    fixed = position_bytes(profile.geometry, profile.key_mode)
    return (smallest + fixed) / profile.geometry.dense_bytes_per_token


def threshold_ranks(
    profile: ErrorProfile, error_budget: float, grid: RankGrid = FREE
) -> list[tuple[int, int]]:
    """EigenAttention's rule, as released: one threshold on the summed singular values, for keys and values together.

    Per layer it starts at 1 and falls by 0.02 a trial; a rank counts the singular values whose cumulative share (of their
    sum, not of their squares) is below the threshold, the largest over the heads. The search ends when the layer's error
    passes the budget or a rank falls to 45 % of the width, then goes back one step. Errors are read from the profile. A grid
    rounds the ranks up, which the released code does not do.
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
        if not grid.free:
            best = (
                _round_up(best[0], grid.ranks(layer.ranks_key)),
                _round_up(best[1], grid.ranks(layer.ranks_value)),
            )
        found.append(best)
    return found


def _round_up(rank: int, allowed: Ints) -> int:
    return int(allowed[min(int(np.searchsorted(allowed, rank)), len(allowed) - 1)])


def _threshold_within(profile: ErrorProfile, budget: Budget, grid: RankGrid) -> list[tuple[int, int]]:
    """The threshold rule at the smallest error budget whose ranks keep no more than asked."""

    def kept(error_budget: float) -> float:
        return plan_ranks(
            profile, budget, "threshold", threshold_ranks(profile, error_budget, grid), grid
        ).kept

    low, high = 0.0, 1 + max(float(layer.error.max()) for layer in profile.layers)
    if (best := kept(high)) > budget.value:
        raise BudgetUnreachable(
            f"kept {budget.value:g} cannot be met: allocation 'threshold' stops where keys or values reach "
            f"{SMALLEST_EIGEN_SHARE:.0%} of their width, which keeps {best:.4f} of the cache",
            asked=budget.value,
            best=best,
        )
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if kept(middle) <= budget.value else (middle, high)
    return threshold_ranks(profile, high, grid)


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
    kl = sum(w * e**2 for w, e in zip(_weights(profile), errors, strict=True)) if known else None
    return Plan(
        key_mode=profile.key_mode,
        sharing=profile.sharing,
        ranks=tuple(ranks),
        bytes_per_token=LATENT_BYTES * _latents(profile, ranks)
        + position_bytes(profile.geometry, profile.key_mode),
        dense_bytes_per_token=profile.geometry.dense_bytes_per_token,
        expected_error=tuple(errors),
        expected_kl=kl,
        budget=budget,
        allocation=allocation,
        grid=grid,
    )


def allocate_for_perplexity(
    profile: ErrorProfile, budget: Budget, increase: Callable[[Plan], float], grid: RankGrid = FREE
) -> tuple[Plan, float]:
    """The smallest cache whose perplexity increase, as ``increase`` has it, stays within the budget, and that increase.

    ``increase`` evaluates a plan on held-out text. Bisection over the share of bytes kept: the knapsack's damage falls with
    every byte, so the increase does too, up to the noise of the measurement.

    Raises:
        BudgetUnreachable: even the best plan that is smaller than the uncompressed cache exceeds the budget.
    """
    low, high = smallest_kept(profile, grid), 1.0
    best = allocate(profile, Budget("kept", high), grid=grid)
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
        plan = allocate(profile, Budget("kept", middle), grid=grid)
        found = increase(plan)
        if found <= budget.value:
            best, reached, high = plan, found, middle
        else:
            low = middle
    return plan_ranks(profile, budget, "knapsack", best.ranks, grid), reached
