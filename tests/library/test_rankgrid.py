"""Ranks that a plan may use, and errors between the measured ones."""

from __future__ import annotations

import numpy as np
import pytest

from orthokv.planning.surface import interpolate
from orthokv.spec.errors import InvalidSetting
from orthokv.spec.rankgrid import RankGrid, candidate_ranks
from orthokv.spec.vocabulary import SHARINGS, Sharing
from tests.library.test_allocate import profile_of


@pytest.mark.parametrize("multiple", [1, 3, 8, 16, 100])
@pytest.mark.parametrize("width", [64, 96, 100, 192, 1024])
def test_ranks_are_multiples_within_what_was_measured(width: int, multiple: int) -> None:
    measured = candidate_ranks(width)
    if multiple > width:
        with pytest.raises(InvalidSetting, match=f"multiple of {multiple} .* width {width}"):
            RankGrid(multiple).ranks(measured)
        return
    ranks = RankGrid(multiple).ranks(measured)
    assert list(ranks) == sorted(set(ranks))
    assert all(measured[0] <= r <= width and r % multiple == 0 for r in ranks)
    assert ranks[-1] == width // multiple * multiple or multiple < width / 32


def test_a_short_list_is_taken_as_it_is_and_combined_with_a_multiple() -> None:
    assert RankGrid(choices=(200, 96, 32, 2)).ranks(candidate_ranks(192)) == (32, 96)
    assert RankGrid(64, (32, 64, 100, 128)).ranks(candidate_ranks(192)) == (64, 128)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"multiple": 0}, "not 0"), ({"choices": (16, -4)}, "not -4")],
)
def test_a_grid_that_cannot_be_is_refused_with_its_value(options: dict[str, int], named: str) -> None:
    with pytest.raises(InvalidSetting, match=named):
        RankGrid(**options)


def test_a_list_with_no_usable_rank_is_refused_with_the_ranks_there_are() -> None:
    with pytest.raises(InvalidSetting, match=r"no rank of 2, 500 .* between 12, .* width 192"):
        RankGrid(choices=(2, 500)).ranks(candidate_ranks(192))


@pytest.mark.parametrize("sharing", SHARINGS)
def test_interpolation_passes_through_every_measured_error(sharing: Sharing) -> None:
    layer = profile_of("qwen3", sharing).layers[0]
    grid_key, grid_value, squared = interpolate(layer)
    for i, rank_key in enumerate(layer.ranks_key):
        for j, rank_value in enumerate(layer.ranks_value):
            at = (
                int(np.flatnonzero(grid_key == rank_key)[0]),
                int(np.flatnonzero(grid_value == rank_value)[0]),
            )
            assert squared[at] == pytest.approx(float(layer.error[i, j]) ** 2, rel=1e-6, abs=1e-15)


def test_interpolation_stays_between_its_neighbours_and_inside_the_measured_ranks() -> None:
    layer = profile_of("qwen3", "joint").layers[0]
    grid_key, grid_value, squared = interpolate(layer)
    assert (grid_key[0], grid_key[-1]) == (layer.ranks_key[0], layer.ranks_key[-1])
    assert (grid_value[0], grid_value[-1]) == (layer.ranks_value[0], layer.ranks_value[-1])
    assert (np.diff(squared, axis=0) <= 1e-12).all()
    assert (np.diff(squared, axis=1) <= 1e-12).all()
    assert squared[-1, -1] == 0


@pytest.mark.parametrize("width", [1, 2, 3, 8, 16, 64, 96, 128, 1024])
def test_candidate_ranks_rise_to_the_full_width(width: int) -> None:
    ranks = candidate_ranks(width)
    assert ranks[0] >= 1
    assert ranks[-1] == width
    assert list(ranks) == sorted(set(ranks))
