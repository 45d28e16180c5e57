"""What a checkpoint gets beyond its profile: better bases at its own ranks, and nothing else changed."""

from __future__ import annotations

import io
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from orthokv.bases.basis import Basis
from orthokv.checkpoint.read import read_checkpoint
from orthokv.checkpoint.write import write_checkpoint
from orthokv.compare import MethodChoice, compare_methods
from orthokv.fit.polish import polish
from orthokv.measure.quality import quality
from orthokv.models.loading import load
from orthokv.models.source import resolve_model
from orthokv.models.streaming import stream_model
from orthokv.pipeline import compress, make_plan, polish_plan, prepare_blocks
from orthokv.planning.allocate import allocate
from orthokv.planning.bases import planned_bases
from orthokv.planning.plan import Plan, layer_plans
from orthokv.planning.profile import PROFILE_JSON, PROFILE_TENSORS, ErrorProfile
from orthokv.runtime.seam import Seam
from orthokv.spec.budget import Budget
from orthokv.spec.errors import InvalidSetting
from orthokv.spec.names import CONFIG
from orthokv.spec.progress import Step
from orthokv.spec.settings import FitSettings
from orthokv.spec.steps import polish_steps
from orthokv.spec.target import Target
from orthokv.text.blocks import Blocks
from orthokv.text.source import TextSource
from orthokv.text.written import self_text
from tests.support.requests import step_request
from tests.support.tiny import tiny_blocks, tiny_folder, tiny_model, tiny_profile, tiny_text
from workers.runner import Wire, run

KEPT = Budget("kept", 0.3)


def one_block(architecture: str) -> Blocks:
    """One block again and again: what progress is judged on is what is trained on, so that there is progress."""
    written = self_text(tiny_model(architecture), num_samples=1, sequence_length=32, seed=5)
    return Blocks.of(written.tokens.expand(8, -1), "one block")


def fitted(folder: Path, architecture: str = "llama", **settings: Any) -> tuple[ErrorProfile, Plan, Blocks]:
    blocks = one_block(architecture)
    chosen: dict[str, Any] = {"method": "weighted", "num_samples": 8, "sequence_length": 32, **settings}
    profile = tiny_profile(tiny_folder(folder, architecture), blocks, **chosen)
    return profile, allocate(profile, KEPT), blocks


def reverse(basis: Basis) -> Basis:
    return replace(basis, encoder=basis.encoder.flip(-1), decoder=basis.decoder.flip(-1))


def kl(model: Any, profile: ErrorProfile, plan: Plan, text: Blocks) -> float:
    with Seam(model, profile.key_mode) as seam:
        return quality(seam, planned_bases(model, profile, plan), text).kl


@pytest.mark.parametrize("method", ["eigen", "weighted"])  # a point of the manifold, and an oblique pair
@pytest.mark.parametrize(
    ("architecture", "sharing", "key_mode"),
    [("llama", "joint", "pre"), ("qwen2", "tied", "post"), ("opt", "head", "pre")],
)
def test_the_checkpoint_of_a_polished_plan_is_better_and_its_profile_the_same(
    architecture: str, sharing: str, key_mode: str, method: str, tmp_path: Path
) -> None:
    profile, plan, blocks = fitted(tmp_path, architecture, sharing=sharing, key_mode=key_mode, method=method)
    model = tiny_model(architecture)
    phases: list[Step] = []
    polished = polish(model, profile, plan, blocks, 40, phases.append)
    assert kl(model, polished, plan, blocks) < 0.95 * kl(model, profile, plan, blocks)
    assert {step.phase for step in phases} == {"polishing"}

    plain, better = (
        write_checkpoint(profile, plan, tmp_path / name, polished=given)
        for name, given in (("plain", None), ("better", polished))
    )
    for name in (PROFILE_JSON, PROFILE_TENSORS):
        assert (better.folder / name).read_bytes() == (plain.folder / name).read_bytes()
    assert better.config["method"] == {**plain.config["method"], "polish_steps": 40}
    assert better.config["cache"] == plain.config["cache"]
    for layer, bases in zip(polished.layers, read_checkpoint(better.folder).bases, strict=True):
        ranks = plan.ranks[layer.index]
        assert bases.key is not None
        assert torch.equal(bases.key.encoder, layer.bases(*ranks).key.encoder)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("refined", "asked", "expected"), [(12, None, 6), (3, None, 1), (0, None, 0), (12, 0, 0), (0, 5, 5)]
)
def test_a_plan_is_polished_half_as_long_as_its_profile_was_refined_unless_told_otherwise(
    refined: int, asked: int | None, expected: int, tmp_path: Path
) -> None:
    profile, plan, blocks = fitted(tmp_path, refine_steps=refined)
    assert polish_steps(refined, KEPT, asked) == expected
    polished = polish(tiny_model("llama"), profile, plan, blocks, asked)
    assert (polished is profile) is (expected == 0)
    assert polished.method.get("polish_steps", 0) == expected


def test_the_same_seed_polishes_to_the_same_bits(tmp_path: Path) -> None:
    profile, plan, blocks = fitted(tmp_path)
    first, again = (polish(tiny_model("llama"), profile, plan, blocks, 6) for _ in range(2))
    for one, other in zip(first.layers, again.layers, strict=True):
        assert torch.equal(one.key.encoder, other.key.encoder)
        assert torch.equal(one.value.decoder, other.value.decoder)


def test_what_cannot_be_polished_is_refused(tmp_path: Path) -> None:
    profile, plan, blocks = fitted(tmp_path)
    with pytest.raises(InvalidSetting, match="polish_steps must be a whole number, at least 0, not -1"):
        polish(tiny_model("llama"), profile, plan, blocks, -1)
    for others in (tiny_blocks(8, 32), blocks.placed([40] * 8)):
        with pytest.raises(InvalidSetting, match="the blocks that its profile was fitted on"):
            polish(tiny_model("llama"), profile, plan, others, 4)


def test_a_budget_on_layer_errors_has_the_bases_that_meet_it(tmp_path: Path) -> None:
    """The polish looks at predictions: it may raise the error of a layer, and the plan is right at its bound."""
    profile, _, blocks = fitted(tmp_path, refine_steps=4)
    budget = Budget("layer_error", 0.2)
    plan = allocate(profile, budget)
    assert polish(tiny_model("llama"), profile, plan, blocks) is profile
    with pytest.raises(InvalidSetting, match="a layer_error budget is not polished"):
        polish(tiny_model("llama"), profile, plan, blocks, 4)
    with pytest.raises(InvalidSetting, match="a layer_error budget is not polished"):
        compress(
            resolve_model(profile.model["id"]),
            TextSource("self"),
            Target(budget, polish_steps=4),
            tmp_path / "out",
        )
    assert not (tmp_path / "out").exists()


def test_full_ranks_have_nothing_to_gain(tmp_path: Path) -> None:
    profile, plan, blocks = fitted(tmp_path)
    full = [(layer.key.rank, layer.value.rank) for layer in profile.layers]
    plan = replace(plan, layers=layer_plans(profile, full))
    assert polish(tiny_model("llama"), profile, plan, blocks, 4) is profile


@pytest.mark.parametrize("asked", [None, 3])
def test_compress_writes_polished_bases(asked: int | None, tmp_path: Path) -> None:
    source = resolve_model(str(tiny_folder(tmp_path, "llama")))
    (tmp_path / "text.txt").write_text(tiny_text(4000))
    settings = FitSettings("weighted", num_samples=8, sequence_length=16, profile_samples=1, refine_steps=4)
    made = compress(
        source,
        TextSource(str(tmp_path / "text.txt")),
        Target(KEPT, polish_steps=asked),
        tmp_path / "out",
        settings,
        device="cpu",
    )
    assert made.checkpoint.config["method"]["polish_steps"] == (asked or 2)
    assert "polish_steps" not in ErrorProfile.load(tmp_path / "out").method
    model = load(source, "cpu")
    blocks = prepare_blocks(source, TextSource(str(tmp_path / "text.txt")), settings, model)
    polished = polish(model, made.profile, made.plan, blocks, asked)
    for layer, ranks, bases in zip(polished.layers, made.plan.ranks, made.checkpoint.bases, strict=True):
        assert bases.value is not None
        assert torch.equal(bases.value.encoder, layer.bases(*ranks).value.encoder)  # type: ignore[union-attr]


def test_a_streamed_model_is_polished_by_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Asked for, it is refused; where it would only be the default, one line says that it is left out."""
    profile, plan, blocks = fitted(tmp_path, refine_steps=4)
    streamed = stream_model(resolve_model(profile.model["id"]))
    with pytest.raises(InvalidSetting, match="polish_steps 4 needs the whole model"):
        polish(streamed, profile, plan, blocks, 4)
    choice = MethodChoice.parse("weighted:joint:polish_steps=4")
    reports: list[Step] = []
    with pytest.raises(InvalidSetting, match="polish_steps 4 needs the whole model"):
        compare_methods(
            streamed,
            resolve_model(profile.model["id"]),
            blocks,
            blocks,
            [0.5],
            [choice],
            FitSettings(num_samples=8, sequence_length=32),
            report=reports.append,
        )
    assert not reports, "refused before the first fit"
    with caplog.at_level(logging.WARNING, "orthokv"):
        assert polish(streamed, profile, plan, blocks) is profile
    assert "not polished" in caplog.text


def test_what_a_perplexity_budget_reached_is_what_the_polished_plan_reaches(tmp_path: Path) -> None:
    profile, _, blocks = fitted(tmp_path)
    model = tiny_model("llama")
    _, held_out = blocks.split(profile.dataset["held_out"])
    budget = Budget("perplexity_increase", 0.05)
    plan, reached = make_plan(profile, Target(budget), model=model, held_out=held_out)
    assert reached is not None
    polished, after = polish_plan(model, profile, plan, reached, blocks, 40)
    with Seam(model, profile.key_mode) as seam:
        found = quality(seam, planned_bases(model, polished, plan), held_out)
    assert after is not None
    assert (after.increase, after.bound) == (found.increase, found.increase_bound)
    assert after.increase < reached.increase
    assert polish_plan(model, profile, plan, reached, blocks, 0) == (profile, reached)


def test_a_polish_that_would_break_a_promise_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The divergence is what a polish brings down; that the perplexity rises with it must not cost a promise."""
    profile, _, blocks = fitted(tmp_path)
    # The least important columns first.
    worse = replace(
        profile,
        layers=tuple(
            replace(layer, key=reverse(layer.key), value=reverse(layer.value)) for layer in profile.layers
        ),
    )
    model = tiny_model("llama")
    _, held_out = blocks.split(profile.dataset["held_out"])
    plan, reached = make_plan(
        profile, Target(Budget("perplexity_increase", 0.05)), model=model, held_out=held_out
    )
    monkeypatch.setattr("orthokv.pipeline.polish", lambda *_: worse)
    taken, after = polish_plan(model, profile, plan, reached, blocks)
    assert taken is profile
    assert after is reached
    assert "the polish is not taken" in caplog.text
    taken, after = polish_plan(model, profile, plan, None, blocks)  # nothing was promised
    assert taken is worse


def test_a_refused_polish_leaves_no_checkpoint_and_reads_no_weights(tmp_path: Path) -> None:
    source = resolve_model(str(tiny_folder(tmp_path, "llama")))
    with pytest.raises(InvalidSetting, match="polish_steps must be a whole number"):
        compress(
            source, TextSource("self"), Target(KEPT, polish_steps=-1), tmp_path / "out", device="nowhere"
        )
    assert not (tmp_path / "out").exists()


def test_a_comparison_shows_what_checkpoints_would_be(tmp_path: Path) -> None:
    """Every line is what its checkpoint measures; `polish_steps` is a setting of a line as others are."""
    folder, blocks = tiny_folder(tmp_path, "llama"), one_block("llama")
    source = resolve_model(str(folder))
    settings = FitSettings(num_samples=8, sequence_length=32, profile_samples=1)
    choices = [
        MethodChoice.parse(f"weighted:joint:refine_steps=20:polish_steps={steps}") for steps in (0, 40)
    ]
    assert choices[1].settings(settings).options == {}
    plain, polished = compare_methods(
        load(source, "cpu"), source, blocks, blocks.take([0]), [0.3], choices, settings
    )
    assert polished.kl < plain.kl
    assert polished.method == "weighted (refine_steps=20, polish_steps=40)"
    assert polished.cache_bytes_per_token == plain.cache_bytes_per_token


@pytest.mark.parametrize("metric", ["kept", "perplexity_increase"])
@pytest.mark.parametrize("asked", [None, 0])
def test_the_service_packs_what_the_library_writes(asked: int | None, metric: str, tmp_path: Path) -> None:
    folder, work = tiny_folder(tmp_path, "llama"), tmp_path / "work"
    (work / "inputs").mkdir(parents=True)
    profile, _, blocks = fitted(tmp_path / "again", refine_steps=4)
    profile.save(work / "inputs")
    blocks.save(work / "inputs" / "blocks.safetensors")
    request = step_request(
        "package",
        model=str(folder),
        workdir=str(work),
        settings=FitSettings("weighted", num_samples=8, sequence_length=32, refine_steps=4),
        target=Target(Budget(metric, 0.3), polish_steps=asked),  # type: ignore[arg-type]
        inputs={path.name: str(path) for path in (work / "inputs").iterdir()},
    )
    said = io.StringIO()
    assert run(request, Wire(said)) == 0, said.getvalue()
    result = json.loads(said.getvalue().splitlines()[-1])["data"]

    source = resolve_model(str(folder))
    model = load(source, "cpu")
    _, held_out = blocks.split(1)
    plan, reached = make_plan(profile, Target(Budget(metric, 0.3)), model=model, held_out=held_out)  # type: ignore[arg-type]
    polished, reached = polish_plan(model, profile, plan, reached, blocks, asked)
    write_checkpoint(profile, plan, tmp_path / "own", base=source, polished=polished)
    assert json.loads((work / "checkpoint" / CONFIG).read_text())["method"].get("polish_steps") == (
        2 if asked is None else None
    )
    for name in (CONFIG, "orthokv.safetensors", PROFILE_TENSORS):
        assert (work / "checkpoint" / name).read_bytes() == (tmp_path / "own" / name).read_bytes()
    assert result["plan"]["polish_steps"] == (2 if asked is None else 0)
    assert (result["plan"]["reached"] is None) is (metric == "kept")
    if reached is not None:
        assert result["plan"]["reached"]["increase"] == pytest.approx(reached.increase, abs=1e-6)
