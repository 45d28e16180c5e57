"""Profile + budget -> ranks of every layer.

Choosing one (rank_key, rank_value) per layer under a byte budget is a multiple-choice knapsack. It is small (about a
thousand options a layer) and solved exactly by dynamic programming over bytes. Other rules stand beside it for comparison:
`greedy`, `uniform`, and those of the papers (`pareto` of StiefAttention, `threshold` of EigenAttention).

What is minimised is the sum over layers of `sensitivity * error^2`: the KL divergence that a layer's error causes on the
model's predictions, measured with only that layer compressed. Without sensitivities (a profile that skipped the
measurement) it is the sum of squared errors.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import cache

import numpy as np

from orthokv.planning.knapsack import Options, greedy, knapsack, pareto
from orthokv.planning.plan import Plan, damage_weights, layer_plans, plan_ranks
from orthokv.planning.profile import ErrorProfile, LayerProfile
from orthokv.planning.published import depth_weights, threshold_ranks, threshold_within
from orthokv.planning.surface import interpolate
from orthokv.spec.budget import Budget
from orthokv.spec.check import below_smallest
from orthokv.spec.codec import SIXTEEN_BIT, CodecSpec
from orthokv.spec.errors import BudgetUnreachable, InvalidSetting
from orthokv.spec.footprint import Footprint, SidePlan, dense_bytes
from orthokv.spec.rankgrid import FREE, RankGrid
from orthokv.spec.vocabulary import ALLOCATIONS, Allocation

# Uniform ranks are a multiple of width / 128 where nothing else is asked: all layers step together, so steps must be fine.
_UNIFORM_STEPS = 128


def options_of(
    layer: LayerProfile, grid: RankGrid, weight: float, power: int = 2, codec: CodecSpec = SIXTEEN_BIT
) -> Options:
    """Every pair of allowed ranks; its damage is `weight * error^power`."""
    grid_key, grid_value, squared = interpolate(layer, grid)
    ranks = np.stack(np.meshgrid(grid_key, grid_value, indexing="ij"), axis=-1).reshape(-1, 2)
    keys = np.asarray([SidePlan(int(r), layer.key.groups, codec).token_bytes for r in grid_key])
    values = np.asarray([SidePlan(int(r), layer.value.groups, codec).token_bytes for r in grid_value])
    cost = (keys[:, None] + values).reshape(-1)
    error = np.sqrt(squared.reshape(-1))
    return Options(ranks, cost, error, weight * error**power)


def allocate(
    profile: ErrorProfile,
    budget: Budget,
    allocation: Allocation = "knapsack",
    grid: RankGrid = FREE,
    codec: CodecSpec = SIXTEEN_BIT,
) -> Plan:
    """Ranks for a `kept` or `layer_error` budget.

    Args:
        allocation: `knapsack` minimises the expected damage exactly; `greedy` takes the step of least damage per byte
            until the budget is met; `uniform` gives all layers, keys and values the same share of their width.
            `pareto` is StiefAttention's rule in the form that can be implemented from what is published: the fronts of
            bytes against *depth-weighted error* (`depth_weights`), walked down greedily to a `kept` budget, or for
            `layer_error` the cheapest pair whose weighted error is within it. `threshold` is EigenAttention's
            (`threshold_ranks`); for `kept` its error budget is raised until its ranks fit.
        grid: ranks that may be used; all rules respect it, and the knapsack is exact under it.
        codec: how latents are stored, which decides what a rank costs.

    Raises:
        BudgetUnreachable: no candidate is small (or good) enough.
        InvalidSetting: the budget needs the model to be evaluated (`perplexity_increase`), does not fit the rule, or no
            rank is left by the grid.
    """
    if budget.metric == "perplexity_increase":
        raise InvalidSetting("a perplexity budget needs the model: use allocate_for_perplexity")
    if allocation not in ALLOCATIONS:
        raise InvalidSetting(f"allocation must be one of {', '.join(ALLOCATIONS)}, not {allocation!r}")
    ranks = _ranks(profile, budget, allocation, grid, codec)
    return plan_ranks(profile, budget, allocation, ranks, grid, codec)


def _ranks(
    profile: ErrorProfile, budget: Budget, allocation: Allocation, grid: RankGrid, codec: CodecSpec
) -> list[tuple[int, int]]:
    if budget.metric == "layer_error":
        return _for_error(profile, budget, allocation, grid, codec)
    fixed, dense = Footprint(profile.geometry, profile.key_mode).fixed(), dense_bytes(profile.geometry)
    budget_bytes = int(budget.value * dense + 1e-9) - fixed
    if allocation == "uniform":
        return _uniform(profile, budget, budget_bytes, grid, codec)
    if allocation == "threshold":
        return threshold_within(profile, budget, grid, codec)
    if allocation == "pareto":
        weights, power = depth_weights(len(profile.layers)), 1
    else:
        weights, power = damage_weights(profile), 2
    fronts = [
        pareto(options_of(layer, grid, weight, power, codec))
        for layer, weight in zip(profile.layers, weights, strict=True)
    ]
    picks = (knapsack if allocation == "knapsack" else greedy)(fronts, budget_bytes)
    if picks is None:
        smallest = sum(int(o.bytes.min()) for o in fronts) + fixed
        raise below_smallest(budget, smallest / dense)
    return [o.pair(i) for o, i in zip(fronts, picks, strict=True)]


def _for_error(
    profile: ErrorProfile, budget: Budget, allocation: Allocation, grid: RankGrid, codec: CodecSpec
) -> list[tuple[int, int]]:
    if allocation == "threshold":
        return threshold_ranks(profile, budget.value, grid)
    if allocation in ("uniform", "greedy"):
        raise InvalidSetting(f"allocation {allocation!r} is defined for a kept budget only")
    count = len(profile.layers)
    weights = depth_weights(count) if allocation == "pareto" else [1.0] * count
    ranks = [
        _smallest(options_of(layer, grid, 1.0, codec=codec), budget.value / weight, layer.index)
        for layer, weight in zip(profile.layers, weights, strict=True)
    ]
    if plan_ranks(profile, budget, allocation, ranks, grid, codec).kept > 1:
        best = max(allocate(profile, Budget("kept", 1.0), grid=grid, codec=codec).expected_error)
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
    profile: ErrorProfile, budget: Budget, budget_bytes: int, grid: RankGrid, codec: CodecSpec
) -> list[tuple[int, int]]:
    """The largest common share of the widths that fits, not below the ranks that were measured."""

    @cache  # layers of one sharing have the same ranks
    def rank(share: int, measured: tuple[int, ...]) -> int:
        wanted = max(measured[0], share * measured[-1] // _UNIFORM_STEPS)
        if grid.free:
            return wanted
        allowed = grid.ranks(measured)
        return allowed[max(0, bisect_right(allowed, wanted) - 1)]

    def pairs(share: int) -> list[tuple[int, int]]:
        return [(rank(share, layer.ranks_key), rank(share, layer.ranks_value)) for layer in profile.layers]

    def cost(pairs: list[tuple[int, int]]) -> int:
        return sum(layer.token_bytes for layer in layer_plans(profile, pairs, codec))

    fitting = [p for p in map(pairs, range(1, _UNIFORM_STEPS + 1)) if cost(p) <= budget_bytes]
    if not fitting:
        fixed = Footprint(profile.geometry, profile.key_mode).fixed()
        raise below_smallest(budget, (cost(pairs(1)) + fixed) / dense_bytes(profile.geometry))
    return fitting[-1]
