"""Groups of heads, chosen layer by layer: the rule, what it leaves behind, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orthokv.bases.basis import orthonormal
from orthokv.checkpoint.read import read_checkpoint
from orthokv.compare import MethodChoice, compare_methods
from orthokv.fit.grouping import COMPARED_KEPT, SHARING_TOLERANCE, error_at_bytes, narrowest_good
from orthokv.models.geometry import geometry_of
from orthokv.models.source import load_model, resolve_model
from orthokv.pipeline import build_profile, compress, fit_layers
from orthokv.planning.allocate import allocate
from orthokv.planning.profile import PROFILE_JSON, Candidate, ErrorProfile, LayerProfile
from orthokv.planning.search import smallest_kept
from orthokv.runtime.measure import live_bytes_per_token
from orthokv.show.plots import plot_plan, plot_profile
from orthokv.show.tables import profile_table
from orthokv.spec.budget import Budget
from orthokv.spec.check import check
from orthokv.spec.errors import BudgetUnreachable, InvalidSetting
from orthokv.spec.geometry import Geometry
from orthokv.spec.rankgrid import RankGrid, candidate_ranks
from orthokv.spec.settings import FitSettings
from orthokv.spec.sharing import GROUPED, group_width, sharings_of
from orthokv.spec.target import Target
from orthokv.spec.vocabulary import ALLOCATIONS, Allocation, Sharing, SharingChoice
from orthokv.text.source import TextSource
from tests.support.tiny import tiny_blocks, tiny_config, tiny_folder, tiny_model, tiny_text

claim = settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
HEADS, HEAD_DIM = 8, 16


def geometry_with(kv_heads: int) -> Geometry:
    return replace(geometry_of(tiny_config("llama")), kv_heads=kv_heads, head_dim=HEAD_DIM)


def layer_of(sharing: Sharing, scale: float, index: int = 0, **changes: Any) -> LayerProfile:
    """A made-up layer whose error falls with the share of the width, alike in every form but for `scale`."""
    stored, width = group_width(sharing, HEADS, HEAD_DIM, keys=True)
    key, value = (orthonormal(torch.eye(width).repeat(stored, 1, 1), HEADS, HEAD_DIM) for _ in range(2))
    ranks = candidate_ranks(width)
    lost = torch.tensor([np.exp(-4 * r / width) - np.exp(-4) for r in ranks], dtype=torch.float64)
    error = scale * (lost.unsqueeze(1) ** 2 + 0.5 * lost.unsqueeze(0) ** 2).sqrt()
    return LayerProfile(index, sharing, key, value, ranks, ranks, error, 1 - error / 10, 1.0, **changes)


def forms(**scales: float) -> dict[Sharing, LayerProfile]:
    return {sharing: layer_of(sharing, scale) for sharing, scale in scales.items()}  # type: ignore[misc, arg-type]


def mixed_profile() -> ErrorProfile:
    """One layer in each form."""
    layers = tuple(layer_of(s, 1.0 + i, i) for i, s in enumerate(("pair", "quad", "joint")))  # type: ignore[arg-type]
    return ErrorProfile(
        geometry_with(HEADS),
        "pre",
        "auto",
        layers,
        {"id": "x"},
        {"sequence_length": 8, "positions": 8},
        {"refine_steps": 0},
        seed=0,
    )


# ---------------------------------------------------------------------------------------------- the forms


@pytest.mark.parametrize(
    ("kv_heads", "expected"),
    [
        (1, ("joint",)),
        (2, ("joint",)),
        (3, ("joint",)),
        (4, ("pair", "joint")),
        (6, ("pair", "joint")),
        (8, ("pair", "quad", "joint")),
        (12, ("pair", "quad", "joint")),
    ],
)
def test_auto_has_the_groups_that_divide_the_heads_and_fits_no_form_twice(
    kv_heads: int, expected: tuple[Sharing, ...]
) -> None:
    assert sharings_of("auto", geometry_with(kv_heads)) == expected


@pytest.mark.parametrize(
    ("sharing", "kv_heads", "named"),
    [("pair", 3, "groups of 2 .* model's 3"), ("quad", 6, "groups of 4 .* model's 6")],
)
def test_groups_that_do_not_divide_are_refused_before_a_weight_is_read(
    sharing: SharingChoice, kv_heads: int, named: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidSetting, match=named):
        check(
            geometry_with(kv_heads), FitSettings(sharing=sharing, key_mode="pre"), Target(Budget("kept", 0.5))
        )
    changes = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": kv_heads}
    folder = tiny_folder(tmp_path, "llama", **changes)
    source = resolve_model(str(folder))
    for weights in folder.glob("*.safetensors"):
        weights.write_bytes(b"not weights")
    chosen = FitSettings("eigen", sharing, num_samples=4, sequence_length=16)
    with pytest.raises(InvalidSetting, match=named):
        compress(source, TextSource("none.txt"), Target(Budget("kept", 0.5)), tmp_path / "out", chosen)


def test_a_comparison_refuses_such_groups_before_the_first_fit(tmp_path: Path) -> None:
    source = resolve_model(str(tiny_folder(tmp_path, "mistral")))  # 2 KV heads
    choices = [MethodChoice.parse("eigen:joint"), MethodChoice.parse("eigen:quad")]
    said: list[object] = []
    with pytest.raises(InvalidSetting, match=r"groups of 4 .* model's 2"):
        compare_methods(
            load_model(source),
            source,
            tiny_blocks(),
            tiny_blocks(),
            [0.5],
            choices,
            FitSettings(),
            report=said.append,
        )
    assert said == []


# ----------------------------------------------------------------------------------------------- the rule


def test_forms_that_are_equal_at_equal_bytes_give_the_narrowest() -> None:
    assert narrowest_good(forms(pair=1.0, quad=1.0, joint=1.0)).sharing == "pair"


@pytest.mark.parametrize(
    ("scales", "chosen"),
    [
        ({"pair": 1 + 0.99 * SHARING_TOLERANCE, "quad": 1.0, "joint": 1.0}, "pair"),
        ({"pair": 1 + 1.01 * SHARING_TOLERANCE, "quad": 1.0, "joint": 1.0}, "quad"),
        ({"pair": 1.2, "quad": 1.1, "joint": 1.0}, "joint"),
        ({"pair": 1.2, "quad": 0.9, "joint": 1.0}, "quad"),  # a wider basis can be the worse one
        ({"pair": 1.02, "joint": 1.0}, "pair"),
        ({"pair": 1.5, "joint": 1.0}, "joint"),
    ],
)
def test_the_narrowest_form_within_the_tolerance_of_the_best_is_kept(
    scales: dict[str, float], chosen: str
) -> None:
    assert narrowest_good(forms(**scales)).sharing == chosen


@claim
@given(scales=st.lists(st.floats(0.01, 10), min_size=3, max_size=3))
def test_what_is_kept_is_never_worse_than_the_tolerance_and_says_what_it_was_compared_with(
    scales: list[float],
) -> None:
    fitted = forms(pair=scales[0], quad=scales[1], joint=scales[2])
    found = narrowest_good(fitted)
    assert [c.sharing for c in found.candidates] == ["pair", "quad", "joint"]
    for candidate in found.candidates:
        assert candidate.kept == COMPARED_KEPT
        layer = fitted[candidate.sharing]
        assert candidate.error == tuple(error_at_bytes(layer, kept) for kept in COMPARED_KEPT)
    means = {c.sharing: c.mean_error for c in found.candidates}
    assert means[found.sharing] <= (1 + SHARING_TOLERANCE) * min(means.values())
    assert found.error is fitted[found.sharing].error


def test_a_form_that_is_alone_is_kept_as_it_is() -> None:
    (layer,) = forms(joint=1.0).values()
    assert narrowest_good({"joint": layer}) is layer


def test_errors_count_as_ratios_at_every_size_of_the_cache() -> None:
    """Half the error at a small cache makes up for twice the error at a large one, where it is a hundred times smaller."""
    errors = ((0.002, 0.05, 0.2), (0.004, 0.05, 0.1), (0.0, 0.05, 0.2), (1e-9, 0.05, 0.2))
    one, other, exact, rounding = (Candidate("joint", COMPARED_KEPT, error).mean_error for error in errors)
    assert one == pytest.approx(other)
    assert exact == rounding < one


@pytest.mark.parametrize("sharing", ["pair", "quad", "joint"])
@pytest.mark.parametrize("kept", COMPARED_KEPT)
def test_the_error_at_a_size_is_the_best_split_between_keys_and_values(sharing: Sharing, kept: float) -> None:
    layer = layer_of(sharing, 1.0)
    found = error_at_bytes(layer, kept)
    profile = replace(mixed_profile(), layers=(layer,), key_mode="post", sharing=sharing)
    one = replace(profile, geometry=replace(profile.geometry, layers=1))
    assert found == pytest.approx(allocate(one, Budget("kept", kept)).expected_error[0])


def test_sizes_that_one_form_cannot_have_are_not_compared() -> None:
    coarse = layer_of("pair", 1.0)
    cut = 3  # the smallest measured rank is a quarter of the width
    coarse = replace(
        coarse,
        ranks_key=coarse.ranks_key[cut:],
        ranks_value=coarse.ranks_value[cut:],
        error=coarse.error[cut:, cut:],
        cosine=coarse.cosine[cut:, cut:],
    )
    assert error_at_bytes(coarse, 0.125) == float("inf")
    found = narrowest_good({"pair": coarse, "joint": layer_of("joint", 2.0)})
    assert found.sharing == "pair"
    assert {candidate.kept for candidate in found.candidates} == {(0.5, 0.25)}


# ------------------------------------------------------------------------- profiles whose layers differ


@pytest.mark.parametrize("allocation", [rule for rule in ALLOCATIONS if rule != "threshold"])
@pytest.mark.parametrize("grid", [RankGrid(), RankGrid(8)])
@pytest.mark.parametrize("kept", [0.3, 0.5, 1.0])
def test_a_plan_of_mixed_groups_stays_within_its_bytes_and_they_are_those_of_a_live_cache(
    kept: float, grid: RankGrid, allocation: Allocation
) -> None:
    profile = mixed_profile()
    plan = allocate(profile, Budget("kept", kept), allocation, grid)
    bases = [layer.bases(*ranks) for layer, ranks in zip(profile.layers, plan.ranks, strict=True)]
    assert plan.bytes_per_token == live_bytes_per_token(profile.geometry, bases, "pre")
    assert plan.kept <= kept
    assert smallest_kept(profile, grid) <= plan.kept


def test_uniform_gives_every_layer_the_same_share_of_its_own_width() -> None:
    profile = mixed_profile()
    plan = allocate(profile, Budget("kept", 0.5), "uniform")
    shares = {
        rank / layer.key.width
        for layer, ranks in zip(profile.layers, plan.ranks, strict=True)
        for rank in ranks
    }
    assert max(shares) - min(shares) < 1 / 32
    assert plan.kept > 0.47


def test_a_budget_below_every_form_is_refused_and_one_that_some_form_meets_is_not() -> None:
    geometry, grid = geometry_with(HEADS), RankGrid(8)
    smallest = {
        sharing: HEADS * HEAD_DIM // width * max(8, candidate_ranks(width)[0]) / (HEADS * HEAD_DIM)
        for sharing, width in (("pair", 32), ("quad", 64), ("joint", 128))
    }
    assert smallest["joint"] < smallest["pair"]
    check(
        geometry,
        FitSettings(sharing="auto", key_mode="post"),
        Target(Budget("kept", smallest["joint"]), grid=grid),
    )
    with pytest.raises(BudgetUnreachable) as refused:
        check(
            geometry,
            FitSettings(sharing="auto", key_mode="post"),
            Target(Budget("kept", smallest["joint"] - 0.01), grid=grid),
        )
    assert refused.value.best == pytest.approx(smallest["joint"])


def test_ranks_that_one_form_cannot_have_are_refused_before_anything_is_fitted() -> None:
    with pytest.raises(InvalidSetting, match=r"multiple of 64 .* width 32"):
        check(
            geometry_with(HEADS),
            FitSettings(sharing="auto", key_mode="pre"),
            Target(Budget("kept", 0.5), grid=RankGrid(64)),
        )


def test_the_tables_and_files_of_a_profile_say_what_was_chosen_and_between_what(tmp_path: Path) -> None:
    chosen = [narrowest_good(forms(pair=1.4, quad=q, joint=1.0)) for q in (1.0, 1.2, 1.0)]
    layers = tuple(replace(layer, index=i) for i, layer in enumerate(chosen))
    profile = replace(mixed_profile(), layers=layers)
    profile.save(tmp_path)
    again = ErrorProfile.load(tmp_path)
    assert [layer.sharing for layer in again.layers] == ["quad", "joint", "quad"]
    assert [layer.candidates for layer in again.layers] == [layer.candidates for layer in layers]
    layers[1].save(tmp_path / "layer.safetensors", profile.geometry)
    assert LayerProfile.load(tmp_path / "layer.safetensors").to_dict() == layers[1].to_dict()
    table = profile_table(again)
    assert [str(column.header) for column in table.columns[-4:]] == ["sharing", "pair", "quad", "joint"]
    cells = [list(column.cells) for column in table.columns[-4:]]
    assert cells[0] == ["quad", "joint", "quad"]
    for layer, *errors in zip(layers, *cells[1:], strict=True):
        assert errors == [f"{c.mean_error:#.3g}" for c in layer.candidates]


# --------------------------------------------------------------------------------------------- end to end


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_auto_gives_each_layer_as_a_fit_of_its_form_alone_would(architecture: str) -> None:
    model, blocks = tiny_model(architecture), tiny_blocks()
    chosen = FitSettings("weighted", "auto", num_samples=4, sequence_length=16, profile_samples=2)
    for layer in list(fit_layers(model, blocks, chosen)):
        alone = {
            candidate.sharing: next(
                iter(fit_layers(model, blocks, replace(chosen, sharing=candidate.sharing), [layer.index]))
            )
            for candidate in layer.candidates
        }
        assert tuple(alone) == sharings_of("auto", geometry_of(model.config))
        assert torch.equal(layer.key.encoder, alone[layer.sharing].key.encoder)
        assert torch.equal(layer.error, alone[layer.sharing].error)
        for candidate in layer.candidates:
            assert candidate.error == tuple(
                error_at_bytes(alone[candidate.sharing], kept) for kept in candidate.kept
            )


def test_auto_goes_from_text_to_a_refined_and_measured_checkpoint(tmp_path: Path) -> None:
    source = resolve_model(str(tiny_folder(tmp_path, "opt")))
    text = tmp_path / "text.txt"
    text.write_text(tiny_text(8 * 24))
    chosen = FitSettings(
        "weighted", "auto", num_samples=8, sequence_length=24, profile_samples=2, refine_steps=4
    )
    found = compress(source, TextSource(str(text)), Target(Budget("kept", 0.4)), tmp_path / "out", chosen)
    checkpoint = read_checkpoint(tmp_path / "out")
    assert checkpoint.sharing == "auto"
    assert [entry["sharing"] for entry in checkpoint.config["ranks"]] == [
        layer.sharing for layer in found.profile.layers
    ]
    assert all(len(layer.candidates) == 3 for layer in found.profile.layers)
    declared = checkpoint.declared_bytes(sequences=1, tokens=24)
    assert found.measured["cache_bytes_per_token"] == declared / 24
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(f"| {i} | {layer.sharing} |" in card for i, layer in enumerate(found.profile.layers))


def test_layers_of_different_widths_are_refined_together(tmp_path: Path) -> None:
    source = resolve_model(str(tiny_folder(tmp_path, "opt")))
    model, blocks = load_model(source), tiny_blocks(8)
    chosen = FitSettings(
        "weighted", "auto", num_samples=8, sequence_length=16, profile_samples=2, refine_steps=8
    )
    fitted = [
        layer
        for index, form in enumerate(GROUPED)
        for layer in fit_layers(model, blocks, replace(chosen, sharing=form), [index])
    ]
    refined = build_profile(model, source, blocks, fitted, chosen)
    assert [layer.sharing for layer in refined.layers] == list(GROUPED)
    for before, after in zip(fitted, refined.layers, strict=True):
        assert after.key.encoder.shape == before.key.encoder.shape
        assert not torch.equal(after.key.encoder, before.key.encoder)
        projector = after.key.encoder @ after.key.decoder.transpose(-1, -2)
        torch.testing.assert_close(
            projector, torch.eye(after.key.width).expand_as(projector), rtol=0, atol=1e-4
        )


def test_a_profile_of_mixed_groups_and_its_plan_are_plotted(tmp_path: Path) -> None:
    profile = mixed_profile()
    for path in (
        plot_profile(profile, tmp_path / "profile.png"),
        plot_plan(allocate(profile, Budget("kept", 0.5)), profile, tmp_path / "plan.png"),
    ):
        assert path.stat().st_size > 10_000


def test_a_profile_from_before_layers_could_differ_is_read(tmp_path: Path) -> None:
    profile = replace(
        mixed_profile(), layers=tuple(layer_of("quad", 1.0, i) for i in range(3)), sharing="quad"
    )
    profile.save(tmp_path)
    described = json.loads((tmp_path / PROFILE_JSON).read_text())
    for entry in described["layers"]:
        del entry["sharing"], entry["candidates"]
    (tmp_path / PROFILE_JSON).write_text(json.dumps(described))
    assert ErrorProfile.load(tmp_path).to_dict() == profile.to_dict()
