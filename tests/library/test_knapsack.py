"""The exact solver finds what trying everything finds; the greedy one spends what it spends as well as can be."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orthokv.planning.knapsack import Options, greedy, knapsack, pareto

claim = settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))


@st.composite
def options(draw: st.DrawFn) -> list[Options]:
    """Two to four layers with up to five options: small enough to try every combination."""
    found: list[Options] = []
    unit = draw(st.sampled_from([1, 2, 8]))
    for _ in range(draw(st.integers(1, 4))):
        n = draw(st.integers(1, 5))
        cost = np.array(draw(st.lists(st.integers(1, 12), min_size=n, max_size=n)), dtype=np.int64) * unit
        damage = np.array(draw(st.lists(st.floats(0, 10), min_size=n, max_size=n)), dtype=np.float64)
        ranks = np.stack([np.arange(n), np.arange(n)], axis=-1)
        found.append(Options(ranks, cost, np.sqrt(damage), damage))
    return found


def best_by_trying_all(layers: list[Options], budget: int) -> float | None:
    damages = [
        sum(float(layer.damage[i]) for layer, i in zip(layers, picks, strict=True))
        for picks in itertools.product(*(range(len(layer.bytes)) for layer in layers))
        if sum(int(layer.bytes[i]) for layer, i in zip(layers, picks, strict=True)) <= budget
    ]
    return min(damages, default=None)


@settings(deadline=None, max_examples=150)
@given(layers=options(), budget=st.integers(-5, 120))
def test_the_knapsack_finds_what_trying_every_combination_finds(layers: list[Options], budget: int) -> None:
    pruned = [pareto(layer) for layer in layers]
    picks = knapsack(pruned, budget)
    best = best_by_trying_all(layers, budget)
    if picks is None:
        assert best is None
        return
    assert best is not None
    assert sum(int(o.bytes[i]) for o, i in zip(pruned, picks, strict=True)) <= budget
    assert sum(float(o.damage[i]) for o, i in zip(pruned, picks, strict=True)) == pytest.approx(best)


@claim
@given(layers=options())
def test_pruning_keeps_only_options_that_no_cheaper_one_beats(layers: list[Options]) -> None:
    for layer in layers:
        kept = pareto(layer)
        assert (np.diff(kept.bytes) > 0).all()
        assert (np.diff(kept.damage) < 0).all()
        for cost, damage in zip(layer.bytes, layer.damage, strict=True):
            assert ((kept.bytes <= cost) & (kept.damage <= damage)).any()


def spent(layers: list[Options], picks: list[int]) -> tuple[int, float]:
    chosen = list(zip(layers, picks, strict=True))
    return sum(int(o.bytes[i]) for o, i in chosen), sum(float(o.damage[i]) for o, i in chosen)


@settings(deadline=None, max_examples=150)
@given(layers=options(), budget=st.integers(-5, 120))
def test_greedy_keeps_its_budget_and_leaves_nothing_that_could_be_spent(
    layers: list[Options], budget: int
) -> None:
    fronts = [pareto(layer) for layer in layers]
    picks = greedy(fronts, budget)
    if picks is None:
        assert best_by_trying_all(layers, budget) is None
        return
    cost, _ = spent(fronts, picks)
    assert cost <= budget
    for front, pick in zip(fronts, picks, strict=True):
        assert (front.bytes[pick + 1 :] - front.bytes[pick] > budget - cost).all()


@settings(deadline=None, max_examples=150)
@given(layers=options(), price=st.floats(0.001, 5))
def test_greedy_is_exact_where_one_price_of_a_byte_leads_to_the_budget(
    layers: list[Options], price: float
) -> None:
    """Every layer takes what is best at a price: no other choice of as many bytes does less damage (Everett 1963)."""
    fronts = [pareto(layer) for layer in layers]
    budget = sum(int(front.bytes[np.argmin(front.damage + price * front.bytes)]) for front in fronts)
    picks = greedy(fronts, budget)
    assert picks is not None
    assert spent(fronts, picks)[1] == pytest.approx(best_by_trying_all(layers, budget))
