"""Budgets that no profile of a geometry can meet, refused before anything is fitted."""

from __future__ import annotations

from orthokv.plan.plan import LATENT_BYTES, position_bytes
from orthokv.spec.budget import Budget
from orthokv.spec.errors import BudgetUnreachable
from orthokv.spec.geometry import Geometry
from orthokv.spec.rankgrid import FREE, RankGrid, candidate_ranks
from orthokv.spec.sharing import group_width, sharings_of
from orthokv.spec.vocabulary import KeyMode, Sharing, SharingChoice


def below_smallest(budget: Budget, best: float) -> BudgetUnreachable:
    return BudgetUnreachable(
        f"kept {budget.value:g} cannot be met: the smallest profiled ranks keep {best:.4f} of the cache",
        asked=budget.value,
        best=best,
    )


def check_reachable(
    geometry: Geometry,
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
        raise below_smallest(budget, best)
