"""What can be refused before any work is done: from the geometry, the settings of the fit and the target alone."""

from __future__ import annotations

from orthokv.spec.budget import Budget
from orthokv.spec.codec import codec_spec
from orthokv.spec.errors import BudgetUnreachable
from orthokv.spec.footprint import Footprint, LayerPlan, SidePlan, dense_bytes
from orthokv.spec.geometry import Geometry, check_key_mode, check_positions
from orthokv.spec.rankgrid import candidate_ranks
from orthokv.spec.settings import FitSettings
from orthokv.spec.sharing import group_width, sharings_of
from orthokv.spec.target import Target
from orthokv.spec.vocabulary import Sharing


def check(geometry: Geometry, settings: FitSettings, target: Target | None = None) -> None:
    """Refuse what no fit of this model could serve. Settings and target alone have been checked when they were made.

    Args:
        target: None where only the fit is in question.

    Raises:
        UnsupportedModel: the key mode, under this rotary embedding.
        InvalidSetting: positions that the model does not have, KV heads that do not divide into the groups, or a rank grid
            that leaves no rank.
        BudgetUnreachable: a `kept` budget below the smallest share that can be kept.
    """
    check_key_mode(geometry, settings.key_mode)
    calibrated_positions(geometry, settings)
    sharings_of(settings.sharing, geometry)
    if target is None:
        return
    best = smallest_cache(geometry, settings, target) / dense_bytes(geometry)
    if target.budget.metric == "kept" and target.budget.value < best:
        raise below_smallest(target.budget, best)


def calibrated_positions(geometry: Geometry, settings: FitSettings) -> int:
    """The positions that calibration blocks cover, from 0: one block's, but in key mode `post` those to be served.

    Raises:
        InvalidSetting: see `orthokv.spec.geometry.check_positions`.
    """
    if settings.positions is not None:
        check_positions(geometry, settings.positions)
        return settings.positions
    if settings.key_mode == "post" and geometry.rope is not None:
        return geometry.max_positions
    return settings.sequence_length


def smallest_cache(geometry: Geometry, settings: FitSettings, target: Target) -> int:
    """Bytes a token of the smallest cache that a profile of this geometry can plan.

    Raises:
        InvalidSetting: the grid leaves no rank at all to a form that a layer may take.
    """
    codec = codec_spec(target.codec)

    def smallest(form: Sharing, *, keys: bool) -> SidePlan:
        _, width = group_width(form, geometry.kv_heads, geometry.head_dim, keys=keys)
        return SidePlan(target.grid.ranks(candidate_ranks(width))[0], geometry.kv_width // width, codec)

    forms = sharings_of(settings.sharing, geometry)
    layers = [LayerPlan(smallest(form, keys=True), smallest(form, keys=False)) for form in forms]
    smallest_layer = min(layers, key=lambda layer: layer.token_bytes)
    return Footprint(geometry, settings.key_mode).cache_bytes([smallest_layer] * geometry.layers)


def below_smallest(budget: Budget, best: float) -> BudgetUnreachable:
    """The refusal of a `kept` budget below `best`, the smallest share that can be kept."""
    return BudgetUnreachable(
        f"kept {budget.value:g} cannot be met: the smallest profiled ranks keep {best:.4f} of the cache",
        asked=budget.value,
        best=best,
    )
