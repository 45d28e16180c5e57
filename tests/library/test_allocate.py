"""A plan spends a budget as well as it can be spent, never more, and says truly what it costs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from orthokv.bases.basis import Basis, orthonormal
from orthokv.models.geometry import geometry_of
from orthokv.planning.allocate import allocate
from orthokv.planning.plan import Plan
from orthokv.planning.profile import ErrorProfile, LayerProfile
from orthokv.planning.published import depth_weights, threshold_ranks
from orthokv.planning.search import allocate_for_perplexity
from orthokv.planning.surface import interpolate
from orthokv.runtime.measure import live_bytes_per_token
from orthokv.spec.budget import METRICS, Budget
from orthokv.spec.errors import BudgetUnreachable, InvalidCheckpoint, InvalidSetting
from orthokv.spec.footprint import Footprint, dense_bytes
from orthokv.spec.geometry import Geometry
from orthokv.spec.rankgrid import RankGrid, candidate_ranks
from orthokv.spec.sharing import group_width
from orthokv.spec.vocabulary import KEY_MODES, SHARINGS, Allocation, KeyMode, Sharing
from tests.support.tiny import GROUPINGS, tiny_config

claim = settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))

Spectra = tuple[Tensor, Tensor]


def layer_profile(
    index: int,
    geometry: Geometry,
    sharing: Sharing,
    *,
    scale: float = 1.0,
    decay: float = 4.0,
    sensitivity: float | None = 1.0,
    spectra: Spectra | None = None,
) -> LayerProfile:
    """Errors that fall exponentially with both ranks, to zero at the full ones, as measured surfaces do."""
    bases: list[Basis] = []
    ranks: list[tuple[int, ...]] = []
    for keys in (True, False):
        stored, width = group_width(sharing, geometry.kv_heads, geometry.head_dim, keys=keys)
        bases.append(orthonormal(torch.eye(width).repeat(stored, 1, 1), geometry.kv_heads, geometry.head_dim))
        ranks.append(candidate_ranks(width))
    lost = [
        torch.tensor([np.exp(-decay * r / rs[-1]) - np.exp(-decay) for r in rs], dtype=torch.float64)
        for rs in ranks
    ]
    error = scale * (lost[0].unsqueeze(1) ** 2 + 0.5 * lost[1].unsqueeze(0) ** 2).sqrt()
    key, value = spectra or (None, None)
    return LayerProfile(
        index, sharing, bases[0], bases[1], ranks[0], ranks[1], error, 1 - error / 10, sensitivity, key, value
    )


def profile_of(
    architecture: str = "llama",
    sharing: Sharing = "joint",
    key_mode: KeyMode = "pre",
    scales: Sequence[float] = (1.0, 0.5, 2.0),
    sensitivities: Sequence[float | None] = (1.0, 1.0, 1.0),
    spectra: Spectra | None = None,
) -> ErrorProfile:
    geometry = geometry_of(tiny_config(architecture))
    layers = tuple(
        layer_profile(i, geometry, sharing, scale=scale, sensitivity=sensitivity, spectra=spectra)
        for i, (scale, sensitivity) in enumerate(zip(scales, sensitivities, strict=True))
    )
    dataset, method = {"sequence_length": 8, "positions": 8}, {"refine_steps": 0}
    return ErrorProfile(geometry, key_mode, sharing, layers, {"id": "x"}, dataset, method, 0)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize("value", [0.0, -0.5, 1.0001, 25.0, float("nan"), float("inf")])
def test_kept_outside_0_to_1_is_refused(value: float) -> None:
    with pytest.raises(InvalidSetting, match="kept must be above 0 and at most 1"):
        Budget("kept", value)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_budget_is_a_positive_number(metric: Any, value: float) -> None:
    with pytest.raises(InvalidSetting, match=metric):
        Budget(metric, value)


def test_kept_may_be_1() -> None:
    assert str(Budget("kept", 1.0)) == "kept <= 1"


def test_an_unknown_metric_is_refused_by_name() -> None:
    with pytest.raises(InvalidSetting, match="'bits'"):
        Budget("bits", 0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("given_", [{}, {"kept": 0.5, "layer_error": 0.1}])
def test_options_must_hold_exactly_one_budget(given_: dict[str, float]) -> None:
    with pytest.raises(InvalidSetting, match="exactly one"):
        Budget.from_options(**given_)


def test_options_that_are_none_do_not_count() -> None:
    assert Budget.from_options(kept=None, layer_error=0.1) == Budget("layer_error", 0.1)


# ------------------------------------------------------------------------------------------------ a plan


@pytest.mark.parametrize("key_mode", KEY_MODES)
@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("allocation", ["knapsack", "uniform"])
@pytest.mark.parametrize("kept", [0.2, 0.25, 0.5, 0.75, 1.0])
def test_a_plan_stays_within_its_bytes(
    kept: float, allocation: Any, sharing: Sharing, key_mode: KeyMode
) -> None:
    plan = allocate(profile_of("qwen3", sharing, key_mode), Budget("kept", kept), allocation)
    assert plan.bytes_per_token <= kept * plan.dense_bytes_per_token
    assert plan.kept <= kept
    assert plan.allocation == allocation


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "opt"])
@pytest.mark.parametrize("key_mode", KEY_MODES)
@pytest.mark.parametrize("sharing", GROUPINGS)
def test_the_bytes_of_a_plan_are_those_of_a_live_cache(
    sharing: Sharing, key_mode: KeyMode, architecture: str
) -> None:
    profile = profile_of(architecture, sharing, key_mode)
    for kept in (0.3, 0.6):
        plan = allocate(profile, Budget("kept", kept))
        bases = [layer.bases(*ranks) for layer, ranks in zip(profile.layers, plan.ranks, strict=True)]
        assert plan.bytes_per_token == live_bytes_per_token(profile.geometry, bases, key_mode)


def test_positions_are_paid_for_once_and_only_where_keys_are_rotated_later() -> None:
    rotated = geometry_of(tiny_config("llama"))
    learned = geometry_of(tiny_config("opt"))
    assert Footprint(rotated, "pre").fixed() == 4
    assert Footprint(rotated, "post").fixed() == 0
    assert Footprint(learned, "pre").fixed() == 0


def test_keeping_everything_is_exact_where_no_positions_are_stored() -> None:
    plan = allocate(profile_of("llama", key_mode="post"), Budget("kept", 1.0))
    assert plan.kept == 1.0
    assert plan.expected_error == (0.0, 0.0, 0.0)


@claim
@given(
    shares=st.lists(st.floats(0.15, 1.0), min_size=2, max_size=5),
    sensitivities=st.lists(st.floats(0, 5), min_size=3, max_size=3),
    sharing=st.sampled_from(SHARINGS),
)
def test_more_bytes_never_mean_more_expected_damage(
    shares: list[float], sensitivities: list[float], sharing: Sharing
) -> None:
    profile = profile_of(sharing=sharing, sensitivities=sensitivities)
    plans = [allocate(profile, Budget("kept", share)) for share in sorted(shares)]
    damages = [plan.expected_kl for plan in plans]
    for less, more in itertools.pairwise(damages):
        assert less is not None
        assert more is not None
        assert more <= less + 1e-12


def wide_profile(
    sharing: Sharing = "joint", sensitivities: Sequence[float | None] = (1.0, 1.0, 1.0), decay: float = 4.0
) -> ErrorProfile:
    """Heads of 64 numbers, 4 of them: ranks by the 8 or 16 are a choice among many."""
    geometry = replace(geometry_of(tiny_config("llama")), head_dim=64, hidden_size=512)
    layers = tuple(
        layer_profile(i, geometry, sharing, sensitivity=sensitivity, decay=decay)
        for i, sensitivity in enumerate(sensitivities)
    )
    return ErrorProfile(geometry, "pre", sharing, layers, {"id": "x"}, {"sequence_length": 8}, {}, 0)


GRIDS = (RankGrid(), RankGrid(8), RankGrid(16), RankGrid(choices=(8, 16, 32, 48, 64, 128, 192, 256)))


@settings(deadline=None, max_examples=60)
@given(
    kept=st.floats(0.3, 1.0),
    sensitivities=st.lists(st.floats(0.01, 5), min_size=3, max_size=3),
    decay=st.floats(0.5, 8),
    sharing=st.sampled_from(SHARINGS),
    grid=st.sampled_from(GRIDS),
    rule=st.sampled_from(["greedy", "uniform", "pareto"]),
)
def test_no_rule_beats_the_knapsack_at_its_own_objective_whatever_ranks_are_allowed(
    kept: float, sensitivities: list[float], decay: float, sharing: Sharing, grid: RankGrid, rule: Allocation
) -> None:
    profile = wide_profile(sharing, sensitivities, decay)
    if rule == "uniform" and grid.free:
        grid = RankGrid(2)  # unasked, uniform ranks fall between those of the other rules
    exact, other = (allocate(profile, Budget("kept", kept), a, grid) for a in ("knapsack", rule))
    assert exact.expected_kl is not None
    assert other.expected_kl is not None
    assert exact.expected_kl <= other.expected_kl * (1 + 1e-9)
    for plan in (exact, other):
        assert plan.kept <= kept
        for layer, (rank_key, rank_value) in zip(profile.layers, plan.ranks, strict=True):
            assert rank_key in grid.ranks(layer.ranks_key)
            assert rank_value in grid.ranks(layer.ranks_value)


@claim
@given(multiple=st.sampled_from([8, 16, 32]), error=st.floats(0.3, 0.9), sharing=st.sampled_from(SHARINGS))
def test_ranks_for_a_layer_error_are_rounded_too(multiple: int, error: float, sharing: Sharing) -> None:
    plan = allocate(wide_profile(sharing), Budget("layer_error", error), grid=RankGrid(multiple))
    assert all(rank % multiple == 0 for pair in plan.ranks for rank in pair)
    assert max(plan.expected_error) <= error * (1 + 1e-9)


def test_threshold_ranks_are_rounded_up_so_that_their_error_still_holds() -> None:
    spectrum = torch.linspace(3, 1, 64, dtype=torch.float64).unsqueeze(0)
    profile = wide_profile("tied")
    layers = tuple(replace(x, spectrum_key=spectrum, spectrum_value=spectrum) for x in profile.layers)
    profile = replace(profile, layers=layers)
    free, rounded = (threshold_ranks(profile, 0.05, grid) for grid in (RankGrid(), RankGrid(16)))
    assert any(rank % 16 for pair in free for rank in pair)
    for exact, found in zip(free, rounded, strict=True):
        assert found == tuple(-(-rank // 16) * 16 for rank in exact)


def test_a_plan_says_which_ranks_were_allowed() -> None:
    plan = allocate(wide_profile(), Budget("kept", 0.5), grid=RankGrid(16, (32, 64, 128)))
    assert plan.to_dict()["rank_multiple"] == 16
    assert plan.to_dict()["rank_choices"] == [32, 64, 128]


def test_depth_weights_are_those_of_the_paper() -> None:
    assert depth_weights(8) == [2, 2, 1, 1, 1, 1, 1.75, 1.75]
    assert depth_weights(1) == [2]


def test_the_pareto_rule_gives_early_layers_most_and_late_ones_more_than_those_between() -> None:
    profile = wide_profile(sensitivities=(None,) * 8)
    layer = [sum(pair) for pair in allocate(profile, Budget("kept", 0.4), "pareto").ranks]
    assert min(layer[:2]) >= max(layer[6:]) >= min(layer[6:]) >= max(layer[2:6])
    assert layer[0] > layer[3]


@claim
@given(error=st.floats(0.05, 0.9))
def test_the_pareto_rule_holds_a_weighted_error_in_every_layer(error: float) -> None:
    plan = allocate(wide_profile(), Budget("layer_error", error), "pareto")
    assert all(
        w * e <= error * (1 + 1e-9) for w, e in zip(depth_weights(3), plan.expected_error, strict=True)
    )


@pytest.mark.parametrize("rule", ["greedy", "pareto"])
def test_a_budget_that_a_rule_cannot_meet_says_what_it_can(rule: Allocation) -> None:
    with pytest.raises(BudgetUnreachable) as caught:
        allocate(wide_profile(), Budget("kept", 0.001), rule)
    assert allocate(wide_profile(), Budget("kept", caught.value.best + 1e-9), rule)


@pytest.mark.parametrize("rule", ["greedy", "uniform"])
def test_a_rule_for_bytes_refuses_an_error(rule: Allocation) -> None:
    with pytest.raises(InvalidSetting, match=f"'{rule}' is defined for a kept budget only"):
        allocate(wide_profile(), Budget("layer_error", 0.2), rule)


def test_a_layer_that_matters_more_gets_more_bytes() -> None:
    profile = profile_of(scales=(1, 1, 1), sensitivities=(0.1, 1.0, 10.0))
    ranks = [sum(pair) for pair in allocate(profile, Budget("kept", 0.4)).ranks]
    assert ranks[0] < ranks[1] < ranks[2]


def test_without_sensitivities_squared_errors_are_minimised_and_no_divergence_is_claimed() -> None:
    plan = allocate(profile_of(sensitivities=(None, None, None)), Budget("kept", 0.4))
    same = allocate(profile_of(), Budget("kept", 0.4))
    assert plan.ranks == same.ranks
    assert plan.expected_kl is None


def test_rounding_in_a_sensitivity_does_not_turn_error_into_gain() -> None:
    """A divergence near zero may come out as -1e-9 in float32: the layer must not be made worse on purpose."""
    noisy = profile_of(sensitivities=(1.0, -1e-9, 1.0))
    plan = allocate(noisy, Budget("kept", 1.0))
    assert plan.expected_kl is not None
    assert plan.expected_kl >= 0


def test_a_budget_below_the_smallest_profiled_ranks_says_what_can_be_reached() -> None:
    profile = profile_of()
    with pytest.raises(BudgetUnreachable) as caught:
        allocate(profile, Budget("kept", 0.0001))
    assert caught.value.asked == 0.0001
    reachable = allocate(profile, Budget("kept", caught.value.best + 1e-9))
    assert reachable.kept == pytest.approx(caught.value.best)
    assert f"{caught.value.best:.4f}" in str(caught.value)


def test_an_unreachable_uniform_budget_says_what_uniform_ranks_can_reach() -> None:
    """`best` is the closest value that a plan reaches, not the whole cache."""
    with pytest.raises(BudgetUnreachable) as caught:
        allocate(profile_of(), Budget("kept", 0.0001), "uniform")
    assert caught.value.best < 0.2


def test_uniform_ranks_are_the_same_share_everywhere() -> None:
    plan = allocate(profile_of("qwen3", "tied"), Budget("kept", 0.5), "uniform")
    assert len(set(plan.ranks)) == 1
    ((key, value),) = set(plan.ranks)
    assert key == value  # both widths are one head


def test_uniform_ranks_below_the_profile_do_not_claim_the_error_of_larger_ones() -> None:
    """At ranks that were never measured the expected error must not be that of the smallest measured ones."""
    profile = profile_of("llama", "joint", "post")
    smallest = profile.layers[0].ranks_key[0]
    kept = (smallest - 1) / 32
    try:
        plan = allocate(profile, Budget("kept", kept), "uniform")
    except BudgetUnreachable:
        return
    for layer, error in zip(profile.layers, plan.expected_error, strict=True):
        assert error > float(layer.error[0, 0])


def test_uniform_allocation_for_a_layer_error_is_uniform_or_refused() -> None:
    """A plan that calls itself uniform has the same ranks in every layer."""
    try:
        plan = allocate(profile_of(), Budget("layer_error", 0.3), "uniform")
    except InvalidSetting:
        return
    assert len(set(plan.ranks)) == 1


@claim
@given(bound=st.floats(0.01, 3.0), sharing=st.sampled_from(SHARINGS))
def test_a_layer_error_budget_holds_in_every_layer(bound: float, sharing: Sharing) -> None:
    plan = allocate(profile_of(sharing=sharing), Budget("layer_error", bound))
    assert max(plan.expected_error) <= bound * (1 + 1e-9)


@claim
@given(bound=st.floats(0.01, 1.0))
def test_a_layer_error_budget_takes_the_fewest_bytes_that_hold_it(bound: float) -> None:
    profile = profile_of()
    plan = allocate(profile, Budget("layer_error", bound))
    for layer, pair in zip(profile.layers, plan.ranks, strict=True):
        grid_key, grid_value, squared = interpolate(layer)
        cheaper = grid_key[:, None] + grid_value[None, :] < sum(pair)
        assert not (cheaper & (np.sqrt(squared) <= bound)).any()


def test_a_layer_error_that_no_rank_reaches_is_refused_with_the_layer_and_its_best() -> None:
    profile = profile_of()
    worse = replace(profile.layers[1], error=profile.layers[1].error + 0.25)
    profile = replace(profile, layers=(profile.layers[0], worse, profile.layers[2]))
    with pytest.raises(BudgetUnreachable, match="layer 1") as caught:
        allocate(profile, Budget("layer_error", 0.1))
    assert caught.value.best == pytest.approx(0.25)


def test_an_unknown_allocation_is_refused_by_name() -> None:
    with pytest.raises(InvalidSetting, match="'random'"):
        allocate(profile_of(), Budget("kept", 0.5), "random")  # type: ignore[arg-type]


def test_a_perplexity_budget_is_not_planned_without_the_model() -> None:
    with pytest.raises(InvalidSetting, match="needs the model"):
        allocate(profile_of(), Budget("perplexity_increase", 0.1))


def test_a_plan_can_be_written_as_json() -> None:
    plan = allocate(profile_of(), Budget("kept", 0.5))
    data = json.loads(json.dumps(plan.to_dict()))
    assert data["ranks"] == [{"key": k, "value": v} for k, v in plan.ranks]
    assert data["kept"] == plan.kept


# --------------------------------------------------------------------------- EigenAttention's threshold rule


def rule_by_hand(layer: LayerProfile, error_budget: float) -> tuple[int, int]:
    """The released loop in plain Python: thresholds 0.98, 0.96, ...; errors read where they were measured."""
    assert layer.spectrum_key is not None
    assert layer.spectrum_value is not None
    best = (layer.key.rank, layer.value.rank)
    for trial in range(1, 50):
        threshold = 1 - 0.02 * trial
        pair: list[int] = []
        for spectrum in (layer.spectrum_key, layer.spectrum_value):
            counts = []
            for values in spectrum.tolist():
                running, count = 0.0, 0
                for value in values:
                    running += value
                    count += running / sum(values) < threshold - 1e-12
                counts.append(count)
            pair.append(max(1, *counts))
        error = float(layer.error[layer.ranks_key.index(pair[0]), layer.ranks_value.index(pair[1])])
        if error >= error_budget or pair[0] <= 0.45 * layer.key.rank or pair[1] <= 0.45 * layer.value.rank:
            break
        best = (pair[0], pair[1])
    return best


def measured_everywhere(error: Callable[[int, int], float], spectra: Spectra) -> ErrorProfile:
    """A profile of llama's heads (8 numbers) whose error is given at every pair of ranks."""
    profile = profile_of("llama", "tied", spectra=spectra)
    ranks = tuple(range(1, 9))
    table = torch.tensor([[error(k, v) for v in ranks] for k in ranks], dtype=torch.float64)
    layers = tuple(
        replace(layer, ranks_key=ranks, ranks_value=ranks, error=table, cosine=1 - table)
        for layer in profile.layers
    )
    return replace(profile, layers=layers)


SPECTRA: Spectra = (
    torch.tensor([[30.0, 20, 15, 12, 9, 7, 4, 3]]),  # cumulative .30 .50 .65 .77 .86 .93 .97 1
    torch.tensor([[40.0, 25, 15, 8, 5, 4, 2, 1], [15.0, 14, 13, 13, 12, 12, 11, 10]] * 2),
)


def test_threshold_rule_on_a_spectrum_worked_out_by_hand() -> None:
    """Keys: .98 counts 7, .96 and .94 count 6, .92 to .88 count 5, .84 to .78 count 4, .76 counts 3 (below 45 %).

    Values: the flattest head rules, cumulative .15 .29 .42 .55 .67 .79 .90 1: down to .92 it counts 7, down to .80 6, at .78 5.
    """
    error = {7: 0.01, 6: 0.05, 5: 0.10, 4: 0.20, 3: 0.4}
    profile = measured_everywhere(lambda k, v: error.get(k, 0.01), SPECTRA)
    assert threshold_ranks(profile, 0.30) == [(4, 5)] * 3  # stopped by the 45 %
    assert threshold_ranks(profile, 0.15) == [(5, 6)] * 3
    assert threshold_ranks(profile, 0.07) == [(6, 7)] * 3
    assert threshold_ranks(profile, 0.02) == [(7, 7)] * 3
    assert threshold_ranks(profile, 0.005) == [(8, 8)] * 3  # the very first trial passes it: nothing is cut


@claim
@given(
    key=st.lists(st.floats(0.01, 10), min_size=8, max_size=8),
    value=st.lists(st.floats(0.01, 10), min_size=8, max_size=8),
    budget=st.floats(0.05, 1.5),
)
def test_threshold_rule_agrees_with_the_released_loop(
    key: list[float], value: list[float], budget: float
) -> None:
    spectra = tuple(torch.tensor([sorted(s, reverse=True)], dtype=torch.float64) for s in (key, value))
    profile = measured_everywhere(lambda k, v: (16 - k - v) / 10, (spectra[0], spectra[1]))
    assert threshold_ranks(profile, budget)[0] == rule_by_hand(profile.layers[0], budget)


def test_threshold_plan_holds_the_error_that_it_was_asked_for() -> None:
    """Ranks fall between measured ones: the error there must not be read off at a higher rank."""
    geometry = geometry_of(tiny_config("llama"))
    geometry = replace(geometry, head_dim=64, hidden_size=512)
    spectrum = torch.linspace(3, 1, 64, dtype=torch.float64).unsqueeze(0)
    layers = tuple(layer_profile(i, geometry, "tied", spectra=(spectrum, spectrum)) for i in range(3))
    profile = replace(profile_of("llama", "tied"), geometry=geometry, layers=layers)
    for bound in np.linspace(0.002, 0.1, 50):
        plan = allocate(profile, Budget("layer_error", float(bound)), "threshold")
        assert max(plan.expected_error) <= bound, (bound, plan.ranks[0])


def test_threshold_rule_never_goes_below_45_percent() -> None:
    profile = measured_everywhere(lambda k, v: 0.0, SPECTRA)
    for rank_key, rank_value in threshold_ranks(profile, 1.0):
        assert rank_key > 0.45 * 8
        assert rank_value > 0.45 * 8


def test_threshold_rule_needs_singular_values() -> None:
    with pytest.raises(InvalidSetting, match="singular values"):
        allocate(profile_of(), Budget("layer_error", 0.3), "threshold")


@settings(deadline=None, max_examples=8)
@given(kept=st.floats(0.3, 1.0))
def test_threshold_rule_spends_a_share_of_bytes_as_far_as_its_45_percent_allow(kept: float) -> None:
    profile = measured_everywhere(lambda k, v: (16 - k - v) / 10, SPECTRA)
    smallest = allocate_bytes(profile, (4, 5))  # the smallest ranks above 45 % of 8 that the rule finds
    if kept < smallest:
        with pytest.raises(BudgetUnreachable, match="stops where keys or values reach 45%") as caught:
            allocate(profile, Budget("kept", kept), "threshold")
        assert caught.value.best == pytest.approx(smallest)
        return
    plan = allocate(profile, Budget("kept", kept), "threshold")
    assert plan.kept <= kept
    # A slightly smaller error budget would not have fitted.
    tighter = [threshold_ranks(profile, budget)[0] for budget in np.linspace(0, 1.5, 76)]
    fitting = [pair for pair in tighter if allocate_bytes(profile, pair) <= kept]
    assert plan.ranks[0] == max(fitting, key=sum)


def allocate_bytes(profile: ErrorProfile, pair: tuple[int, int]) -> float:
    layer = profile.layers[0]
    latents = layer.key.groups * pair[0] + layer.value.groups * pair[1]
    dense = dense_bytes(profile.geometry)
    fixed = Footprint(profile.geometry, profile.key_mode).fixed()
    return (2 * latents * len(profile.layers) + fixed) / dense


# ------------------------------------------------------------------------------------ perplexity budgets


def increase_of(plan: Plan) -> float:
    """A stand-in for a measurement: proportional to the expected divergence."""
    assert plan.expected_kl is not None
    return plan.expected_kl


@claim
@given(value=st.floats(0.01, 4.0))
def test_the_perplexity_search_finds_a_small_plan_that_holds(value: float) -> None:
    profile = profile_of(key_mode="post")
    plan, reached = allocate_for_perplexity(profile, Budget("perplexity_increase", value), increase_of)
    assert reached <= value
    assert reached == pytest.approx(increase_of(plan))
    assert plan.budget.metric == "perplexity_increase"
    try:
        smaller = allocate(profile, Budget("kept", plan.kept - 0.02))
    except BudgetUnreachable:
        return
    assert increase_of(smaller) > value


def test_the_perplexity_search_asks_for_few_evaluations() -> None:
    asked: list[float] = []

    def increase(plan: Plan) -> float:
        asked.append(plan.kept)
        return increase_of(plan)

    allocate_for_perplexity(profile_of(), Budget("perplexity_increase", 0.3), increase)
    assert len(asked) <= 10


def test_a_perplexity_that_no_plan_reaches_says_the_best() -> None:
    with pytest.raises(BudgetUnreachable) as caught:
        allocate_for_perplexity(profile_of(), Budget("perplexity_increase", 0.01), lambda plan: 0.5)
    assert (caught.value.asked, caught.value.best) == (0.01, 0.5)


def test_a_perplexity_that_is_not_a_number_never_passes_a_budget() -> None:
    with pytest.raises(BudgetUnreachable):
        allocate_for_perplexity(profile_of(), Budget("perplexity_increase", 0.01), lambda plan: float("nan"))


# ----------------------------------------------------------------------------------------- profiles on disk


def test_a_profile_read_back_gives_the_same_plan(tmp_path: Path) -> None:
    profile = profile_of("qwen3", "tied", spectra=None)
    profile.save(tmp_path)
    loaded = ErrorProfile.load(tmp_path)
    assert loaded.to_dict() == profile.to_dict()
    assert allocate(loaded, Budget("kept", 0.4)) == allocate(profile, Budget("kept", 0.4))


def test_a_layer_read_back_is_the_layer_written(tmp_path: Path) -> None:
    profile = profile_of("llama", "head", spectra=SPECTRA)
    path = tmp_path / "layer.safetensors"
    profile.layers[1].save(path, profile.geometry)
    loaded = LayerProfile.load(path)
    assert loaded.to_dict() == profile.layers[1].to_dict()
    assert loaded.key.orthonormal
    assert loaded.spectrum_key is not None
    assert torch.equal(loaded.spectrum_key, SPECTRA[0])
    assert torch.equal(loaded.error, profile.layers[1].error)


@pytest.mark.parametrize("name", ["profile.json", "profile.safetensors"])
def test_a_profile_with_a_missing_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    profile_of().save(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(InvalidCheckpoint, match=f"{name} is missing"):
        ErrorProfile.load(tmp_path)


@pytest.mark.parametrize("name", ["profile.json", "profile.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_profile_is_refused_by_name(tmp_path: Path, name: str, share: float) -> None:
    profile_of().save(tmp_path)
    raw = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(raw[: int(share * len(raw))])
    with pytest.raises(InvalidCheckpoint, match=name):
        ErrorProfile.load(tmp_path)


def rewritten(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads((folder / "profile.json").read_text())
    change(data)
    (folder / "profile.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(format_version=2),
        lambda data: data.pop("format_version"),
        lambda data: data.pop("geometry"),
        lambda data: data["geometry"].update(colour="red"),
        lambda data: data["layers"].pop(),
        lambda data: data["layers"].reverse(),
        lambda data: data["layers"][0].update(index=7),
    ],
)
def test_a_profile_that_contradicts_itself_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    profile_of().save(tmp_path)
    rewritten(tmp_path, change)
    with pytest.raises(InvalidCheckpoint):
        ErrorProfile.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(key_mode="during"),
        lambda data: data.update(sharing="socialist"),
        lambda data: data["layers"][0].update(ranks_key=[1, 2]),
    ],
    ids=["key_mode", "sharing", "ranks"],
)
def test_a_profile_with_values_that_cannot_be_is_refused_when_read(
    tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    profile_of().save(tmp_path)
    rewritten(tmp_path, change)
    with pytest.raises(InvalidCheckpoint):
        ErrorProfile.load(tmp_path)
