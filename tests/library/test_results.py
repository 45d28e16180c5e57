"""Rows over seeds become means and spreads, and tables show what they were given."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orthokv.show.results import ComparisonRow, summarise
from orthokv.show.tables import details_markdown, ratios_markdown

ROW = ComparisonRow(
    "eigen", "tied", "pre", 0.5, 0.498, 1912, 12.0, 10.0, 0.2, 0.1, 3.0, 0.99, "books", "knapsack", 0, "cpu"
)


def seeds(*perplexities: float) -> list[ComparisonRow]:
    return [
        replace(ROW, method="stiefel", seed=seed, perplexity=perplexity)
        for seed, perplexity in enumerate(perplexities)
    ]


@given(perplexities=st.lists(st.floats(10, 100), min_size=2, max_size=5))
def test_a_summary_is_the_mean_and_the_spread_over_seeds(perplexities: list[float]) -> None:
    (found,) = summarise(seeds(*perplexities))
    assert found.seeds == len(perplexities)
    assert found.row.perplexity == pytest.approx(sum(perplexities) / len(perplexities))
    assert found.row.ratio == pytest.approx(found.row.perplexity / 10)
    assert found.spread == pytest.approx(stdev(p / 10 for p in perplexities), abs=1e-9)


def test_one_seed_has_no_spread() -> None:
    (found,) = summarise([ROW])
    assert found.row == ROW
    assert found.spread is None


@pytest.mark.parametrize("field", ["method", "sharing", "key_mode", "allocation", "text", "kept_asked"])
def test_only_seeds_are_averaged(field: str) -> None:
    other = replace(ROW, **{field: 0.25 if field == "kept_asked" else "post"})
    assert [found.row for found in summarise([ROW, other])] == [ROW, other]


def test_a_figure_that_one_seed_lacks_is_not_averaged_over_the_others() -> None:
    (found,) = summarise([replace(ROW, seconds=None), replace(ROW, seed=1)])
    assert found.row.seconds is None


def test_ratios_stand_by_method_and_budget_with_the_best_of_each_budget_bold() -> None:
    rows = [ROW, replace(ROW, kept_asked=0.25, perplexity=16.0), *seeds(11.0, 11.2, 11.4)]
    assert ratios_markdown(rows).splitlines() == [
        "| method | sharing | keys | ranks | 50 % | 25 % |",
        "| --- | --- | --- | --- | ---: | ---: |",
        "| eigen | tied | pre | knapsack | 1.200 | **1.600** |",
        "| stiefel | tied | pre | knapsack | **1.120 ± 0.020** |  |",
    ]


def test_details_hold_every_figure_of_a_row() -> None:
    line = details_markdown([ROW]).splitlines()[2]
    assert line == (
        "| eigen | tied | pre | knapsack | 1 | 50.0 % | 49.8 % | 1912 | 12.00 | 1.200 | 0.200 | 0.100 | 0.9900 | 3.0 |"
    )


def test_a_perplexity_that_overflows_is_shown_as_such() -> None:
    assert "| inf |" in ratios_markdown([replace(ROW, perplexity=math.inf)]).replace("**", "")


def test_names_cannot_break_a_table() -> None:
    assert "| a b |" in ratios_markdown([replace(ROW, method="a | b")])
