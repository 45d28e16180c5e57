"""The smallest plan that keeps a promise about perplexity, by bisection."""

from __future__ import annotations

from collections.abc import Callable

from orthokv.planning.allocate import allocate, options_of
from orthokv.planning.plan import Plan, plan_ranks
from orthokv.planning.profile import ErrorProfile
from orthokv.spec.budget import Budget
from orthokv.spec.codec import SIXTEEN_BIT, CodecSpec
from orthokv.spec.errors import BudgetUnreachable
from orthokv.spec.footprint import Footprint, dense_bytes
from orthokv.spec.rankgrid import FREE, RankGrid

# Bisection over bytes for a perplexity budget stops at this share of the cache.
_KEPT_TOLERANCE = 0.004


def smallest_kept(profile: ErrorProfile, grid: RankGrid = FREE, codec: CodecSpec = SIXTEEN_BIT) -> float:
    """The smallest share of the cache that a plan of this profile can keep."""
    smallest = sum(int(options_of(layer, grid, 1.0, codec=codec).bytes.min()) for layer in profile.layers)
    fixed = Footprint(profile.geometry, profile.key_mode).fixed()
    return (smallest + fixed) / dense_bytes(profile.geometry)


def allocate_for_perplexity(
    profile: ErrorProfile,
    budget: Budget,
    increase: Callable[[Plan], float],
    grid: RankGrid = FREE,
    codec: CodecSpec = SIXTEEN_BIT,
) -> tuple[Plan, float]:
    """The smallest cache whose perplexity increase, as `increase` has it, stays within the budget, and that increase.

    `increase` evaluates a plan on held-out text. Bisection over the share of bytes kept: the knapsack's damage falls with
    every byte, so the increase does too, up to the noise of the measurement.

    Raises:
        BudgetUnreachable: even the best plan that is smaller than the uncompressed cache exceeds the budget.
    """
    low, high = smallest_kept(profile, grid, codec), 1.0
    best = allocate(profile, Budget("kept", high), grid=grid, codec=codec)
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
        plan = allocate(profile, Budget("kept", middle), grid=grid, codec=codec)
        found = increase(plan)
        if found <= budget.value:
            best, reached, high = plan, found, middle
        else:
            low = middle
    return plan_ranks(profile, budget, "knapsack", best.ranks, grid, codec), reached
