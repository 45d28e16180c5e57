"""From a model and text to a measured checkpoint: each step is what it says, and leaves nothing behind where it fails."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

import orthokv
from orthokv.bases.basis import PartialBases
from orthokv.checkpoint.read import read_checkpoint
from orthokv.checkpoint.write import write_checkpoint
from orthokv.compare import MethodChoice, compare_methods
from orthokv.files.digests import verify_files
from orthokv.fit.divergence import model_logits
from orthokv.fit.sensitivity import sensitivities
from orthokv.fit.task import LayerTask, view_layer
from orthokv.fit.walk import LayerWalk
from orthokv.measure.checkpoint import evaluate_checkpoint
from orthokv.measure.quality import cache_size, quality
from orthokv.models.geometry import geometry_of
from orthokv.models.source import ModelSource, load_model, resolve_model
from orthokv.pipeline import build_profile, compress, fit_layers, make_plan, prepare_blocks
from orthokv.planning.allocate import allocate
from orthokv.planning.bases import planned_bases
from orthokv.planning.profile import ErrorProfile, LayerProfile
from orthokv.runtime.seam import Seam, compressed, seam_of
from orthokv.serving.generation import generate
from orthokv.spec.budget import Budget
from orthokv.spec.errors import (
    BudgetUnreachable,
    InvalidModel,
    InvalidSetting,
    OrthoKVError,
    UnsupportedModel,
)
from orthokv.spec.footprint import dense_bytes
from orthokv.spec.geometry import Geometry, check_key_mode
from orthokv.spec.methods import EigenSettings, PaluSettings, StiefelSettings
from orthokv.spec.progress import Step
from orthokv.spec.settings import FitSettings
from orthokv.spec.target import Target
from orthokv.spec.vocabulary import KEY_MODES
from orthokv.text.source import TextMixture, TextSource
from orthokv.text.written import self_text
from tests.support.tiny import (
    ARCHITECTURES,
    GROUPINGS,
    LAYERS,
    SLIDING_WINDOW,
    tiny_blocks,
    tiny_config,
    tiny_folder,
    tiny_model,
    tiny_profile,
    tiny_text,
    tiny_tokenizer,
    tiny_tokens,
)

QUICK = FitSettings(method="eigen", num_samples=4, sequence_length=16, profile_samples=1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    @cache
    def made(architecture: str = "llama") -> Path:
        return tiny_folder(tmp_path_factory.mktemp("model"), architecture)

    return made


@pytest.fixture(scope="session")
def profile(folder: Callable[..., Path]) -> Callable[..., ErrorProfile]:
    @cache
    def made(architecture: str = "llama", **settings: Any) -> ErrorProfile:
        return tiny_profile(folder(architecture), **settings)

    return made


@pytest.fixture
def text(tmp_path: Path) -> TextSource:
    path = tmp_path / "text.txt"
    path.write_text(tiny_text(400))
    return TextSource(str(path))


# ------------------------------------------------------------------------------------------ one layer at a time


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_walking_the_layers_gives_the_models_own_hidden_states(architecture: str, batch_size: int) -> None:
    model, tokens = tiny_model(architecture), tiny_tokens(5, 24)
    with torch.no_grad():
        states = model(tokens, use_cache=False, output_hidden_states=True).hidden_states
    walk = LayerWalk(model, tokens, batch_size)
    assert len(walk) == LAYERS
    for layer in range(LAYERS - 1):
        torch.testing.assert_close(walk.inputs, states[layer], rtol=1e-5, atol=1e-5)
        walk.run(layer)
        torch.testing.assert_close(walk.outputs, states[layer + 1], rtol=1e-4, atol=1e-4)
        walk.advance()


@pytest.mark.parametrize("key_mode", KEY_MODES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_empty_seam_changes_nothing(architecture: str, key_mode: Any) -> None:
    model, tokens = tiny_model(architecture), tiny_tokens(2, 24)
    with torch.no_grad():
        before = model(tokens, use_cache=False).logits
        with Seam(model, key_mode):
            within = model(tokens, use_cache=False).logits
        after = model(tokens, use_cache=False).logits
    torch.testing.assert_close(within, before, rtol=1e-5, atol=1e-5)
    assert torch.equal(after, before)


def test_a_layer_that_is_not_finite_is_named() -> None:
    model = tiny_model("llama")
    model.get_parameter("model.layers.1.mlp.up_proj.weight").data[0, 0] = float("nan")
    with pytest.raises(InvalidModel, match=r"layer 1 .*not finite"):
        list(fit_layers(model, tiny_blocks(), QUICK))
    assert seam_of(model) is None


def test_a_fit_that_fails_leaves_the_model_as_it_was() -> None:
    model = tiny_model("llama")
    before = model_logits(model, tiny_tokens(1, 8)[0])
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]

    def fail(step: Step) -> None:
        if step.done == 1:
            raise RuntimeError("the caller gives up")

    with pytest.raises(RuntimeError, match="gives up"):
        list(fit_layers(model, tiny_blocks(), QUICK, report=fail))
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()] == hooks
    assert torch.equal(model_logits(model, tiny_tokens(1, 8)[0]), before)


def test_a_fit_that_is_dropped_half_way_lets_go_of_the_model() -> None:
    model = tiny_model("llama")
    layers = fit_layers(model, tiny_blocks(), QUICK)
    next(layers)
    layers.close()  # type: ignore[attr-defined]
    assert seam_of(model) is None


@pytest.mark.parametrize("layers", [[3], [-1], [0, 99]])
def test_layers_that_the_model_does_not_have_are_refused(layers: list[int]) -> None:
    with pytest.raises(InvalidSetting, match=r"outside 0\.\.2"):
        list(fit_layers(tiny_model("llama"), tiny_blocks(), QUICK, layers))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("sharing", GROUPINGS)
def test_the_profile_holds_the_errors_that_a_view_measures(architecture: str, sharing: Any) -> None:
    model = tiny_model(architecture)
    chosen = FitSettings(
        method="eigen", sharing=sharing, num_samples=4, sequence_length=16, profile_samples=4
    )
    blocks = tiny_blocks()
    found = list(fit_layers(model, blocks, chosen))
    assert [layer.index for layer in found] == list(range(LAYERS))
    fitting, _ = blocks.split(chosen.holdout)
    with Seam(model, "pre") as seam:
        walk = LayerWalk(model, fitting.tokens, 4)
        view = view_layer(walk, seam, 0)
        layer = found[0]
        assert layer.error[-1, -1] == 0
        for i, j in ((0, 0), (2, 5), (-1, 0), (0, -1)):
            again = view.compare(
                layer.bases(layer.ranks_key[i], layer.ranks_value[j]), list(range(len(fitting)))
            )
            assert float(layer.error[i, j]) == pytest.approx(again.error, rel=1e-6)
            assert float(layer.cosine[i, j]) == pytest.approx(again.cosine, rel=1e-6)


def test_the_spread_is_measured_sequence_by_sequence_on_held_out_text_too() -> None:
    model = tiny_model("llama")
    chosen = FitSettings(method="eigen", num_samples=16, sequence_length=16, profile_samples=1)
    blocks = tiny_blocks(16, 16)
    fitting, held_out = blocks.split(chosen.holdout)
    for layer in list(fit_layers(model, blocks, chosen)):
        spread = layer.spread
        assert spread is not None
        assert (len(spread.fitting), len(spread.held_out)) == (8, 2)
        with Seam(model, "pre") as seam:
            # What a model with only this layer compressed makes of the same blocks, through a walk of its own.
            walk = LayerWalk(model, torch.cat([fitting.take([0]).tokens, held_out.tokens]), 4)
            for index in range(layer.index + 1):
                walk.run(index)
                if index < layer.index:
                    walk.advance()
            task = LayerTask(layer.index, walk, seam, 1)
            bases = layer.bases(spread.rank_key, spread.rank_value)
            assert task.compare(bases, [0]).error == pytest.approx(spread.fitting[0], rel=1e-5)
            for i in range(2):
                assert task.compare(bases, [1 + i]).error == pytest.approx(spread.held_out[i], rel=1e-5)


def test_too_little_text_is_said_and_enough_is_not(folder: Callable[..., Path]) -> None:
    """Two short sequences are fitted almost exactly at a rank that others are not."""
    little, enough = (
        tiny_profile(folder(), method="eigen", num_samples=n, sequence_length=length)
        for n, length in ((2, 6), (64, 64))
    )
    (warning,) = little.warnings
    assert "too little calibration text" in warning
    assert "on the 1 samples" in warning
    assert enough.warnings == []


def test_the_same_settings_give_the_same_profile_bit_by_bit(folder: Callable[..., Path]) -> None:
    options: dict[str, Any] = {"method": "stiefel", "steps": 4, "seed": 3}
    first, again = (tiny_profile(folder(), **options) for _ in range(2))
    assert first.to_dict() == again.to_dict()
    for one, other in zip(first.layers, again.layers, strict=True):
        for name, tensor in one.tensors().items():
            assert torch.equal(tensor, other.tensors()[name]), name


def test_another_seed_gives_another_profile(folder: Callable[..., Path]) -> None:
    one, other = (tiny_profile(folder(), method="stiefel", steps=4, seed=seed) for seed in (0, 1))
    assert not torch.equal(one.layers[0].key.encoder, other.layers[0].key.encoder)


def test_layers_that_went_through_files_make_the_same_profile(
    folder: Callable[..., Path], tmp_path: Path
) -> None:
    """What an interrupted job resumes from."""
    source = resolve_model(str(folder()))
    model, blocks = load_model(source), tiny_blocks()
    layers = list(fit_layers(model, blocks, QUICK))
    geometry = geometry_of(model.config)
    for layer in layers:
        layer.save(tmp_path / f"{layer.index}.safetensors", geometry)
    again = [LayerProfile.load(tmp_path / f"{i}.safetensors") for i in (2, 0, 1)]
    direct = build_profile(model, source, blocks, layers, QUICK)
    assert build_profile(model, source, blocks, again, QUICK).to_dict() == direct.to_dict()


# ---------------------------------------------------------------------------------------------- sensitivity


def test_sensitivity_times_squared_error_is_the_measured_divergence(
    profile: Callable[..., ErrorProfile],
) -> None:
    found = profile()
    model = tiny_model("llama")
    blocks = tiny_blocks(2, 16, seed=5)
    measured = sensitivities(model, found, blocks)
    with Seam(model, "pre") as seam:
        for layer, sensitivity in zip(found.layers, measured, strict=True):
            ranks = [
                min(r, key=lambda x: abs(x / r[-1] - 0.25)) for r in (layer.ranks_key, layer.ranks_value)
            ]
            at = layer.ranks_key.index(ranks[0]), layer.ranks_value.index(ranks[1])
            bases: list[Any] = [None] * LAYERS
            total = 0.0
            for block in blocks.tokens:
                dense = model_logits(model, block).log_softmax(-1)
                bases[layer.index] = layer.bases(*ranks)
                with compressed(seam, bases):
                    other = model_logits(model, block).log_softmax(-1)
                bases[layer.index] = None
                total += float((dense.exp() * (dense - other)).sum(-1).mean())
            expected = total / len(blocks)
            assert sensitivity * float(layer.error[at]) ** 2 == pytest.approx(expected, rel=1e-4)
            assert sensitivity > 0


# ---------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_quality_is_perplexity_and_divergence_as_the_textbook_has_them(
    architecture: str, profile: Callable[..., ErrorProfile]
) -> None:
    found = profile(architecture)
    model = tiny_model(architecture)
    blocks = tiny_blocks(3, 16, seed=7)
    plan = allocate(found, Budget("kept", 0.5))
    bases = planned_bases(model, found, plan)
    with Seam(model, "pre") as seam:
        measured = quality(seam, bases, blocks)
        with compressed(seam, bases), torch.no_grad():
            other = model(blocks.tokens, use_cache=False).logits[:, :-1].log_softmax(-1)
    with torch.no_grad():
        dense = model(blocks.tokens, use_cache=False).logits[:, :-1].log_softmax(-1)
    targets = blocks.tokens[:, 1:].unsqueeze(-1)
    assert measured.tokens == 3 * 15
    for value, scores in ((measured.perplexity_dense, dense), (measured.perplexity, other)):
        assert value == pytest.approx(math.exp(-float(scores.gather(-1, targets).mean())), rel=1e-4)
    kl = (dense.exp() * (dense - other)).sum(-1).mean()
    assert measured.kl == pytest.approx(float(kl), rel=1e-3)
    assert measured.kl > 0.01
    assert measured.increase == pytest.approx(measured.perplexity / measured.perplexity_dense - 1)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "opt"])
@pytest.mark.parametrize("key_mode", KEY_MODES)
@pytest.mark.parametrize("sharing", GROUPINGS)
def test_the_measured_cache_is_the_planned_cache(
    architecture: str, key_mode: str, sharing: str, profile: Callable[..., ErrorProfile]
) -> None:
    found = profile(architecture, key_mode=key_mode, sharing=sharing)
    model = tiny_model(architecture)
    plan = allocate(found, Budget("kept", 0.4))
    with Seam(model, found.key_mode) as seam:
        size = cache_size(seam, planned_bases(model, found, plan), tiny_tokens(1, 20)[0])
    assert size.bytes_per_token == plan.bytes_per_token
    assert size.bytes_per_token_dense == plan.dense_bytes_per_token
    assert size.kept == plan.kept <= 0.4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_evaluating_a_checkpoint_measures_everything_and_detaches(
    architecture: str, profile: Callable[..., ErrorProfile], tmp_path: Path
) -> None:
    found = profile(architecture)
    checkpoint = write_checkpoint(found, allocate(found, Budget("kept", 0.5)), tmp_path / "out")
    model, blocks = tiny_model(architecture), tiny_blocks(2, 10)
    before = model_logits(model, blocks.tokens[0])
    measured = evaluate_checkpoint(model, checkpoint, blocks, speed=True)
    assert seam_of(model) is None
    assert torch.equal(model_logits(model, blocks.tokens[0]), before)
    assert measured["cache_bytes_per_token"] == checkpoint.config["cache"]["bytes_per_token"]
    assert measured["cache_bytes_per_token_dense"] == checkpoint.config["cache"]["bytes_per_token_dense"]
    assert measured["tokens"] == 2 * 9
    assert measured["dataset"]["digest"] == blocks.digest
    assert measured["tokens_per_second"] > 0
    assert len(measured["layer_error"]) == len(measured["layer_cosine"]) == LAYERS
    assert all(0 < error < 2 for error in measured["layer_error"])
    assert all(-1 <= cosine <= 1 for cosine in measured["layer_cosine"])


def test_an_evaluation_that_fails_detaches(profile: Callable[..., ErrorProfile], tmp_path: Path) -> None:
    checkpoint = write_checkpoint(profile(), allocate(profile(), Budget("kept", 0.5)), tmp_path / "out")
    model = tiny_model("llama")

    def fail(step: Step) -> None:
        raise RuntimeError("the caller gives up")

    with pytest.raises(RuntimeError, match="gives up"):
        evaluate_checkpoint(model, checkpoint, tiny_blocks(), report=fail)
    assert seam_of(model) is None


# --------------------------------------------------------------------------------------------------- planning


def test_a_perplexity_budget_is_checked_on_held_out_text(profile: Callable[..., ErrorProfile]) -> None:
    found, model, held_out = profile(), tiny_model("llama"), tiny_blocks(2, 16, seed=8)
    plan, reached = make_plan(
        found, Target(Budget("perplexity_increase", 0.5)), model=model, held_out=held_out
    )
    assert reached is not None
    assert reached.increase <= reached.bound <= 0.5
    with Seam(model, "pre") as seam:
        again = quality(seam, planned_bases(model, found, plan), held_out).increase
    assert again == pytest.approx(reached.increase)
    assert plan.kept < 1
    assert seam_of(model) is None


def test_a_perplexity_budget_that_cannot_be_met_says_what_can(profile: Callable[..., ErrorProfile]) -> None:
    model = tiny_model("llama")
    # Its own text: on random tokens a worse model can have the lower perplexity.
    held_out = self_text(model, num_samples=8, sequence_length=32, seed=8)
    with pytest.raises(BudgetUnreachable) as caught:
        make_plan(profile(), Target(Budget("perplexity_increase", 1e-9)), model=model, held_out=held_out)
    assert caught.value.asked == 1e-9
    assert caught.value.best > 1e-9
    assert seam_of(model) is None


def test_a_perplexity_budget_needs_a_model_and_text(profile: Callable[..., ErrorProfile]) -> None:
    with pytest.raises(InvalidSetting, match="needs the model"):
        make_plan(profile(), Target(Budget("perplexity_increase", 0.1)))


# --------------------------------------------------------------------------------------------------- one way in


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "opt"])
def test_compress_goes_from_a_folder_and_text_to_a_measured_checkpoint(
    architecture: str, folder: Callable[..., Path], text: TextSource, tmp_path: Path
) -> None:
    steps: list[Step] = []

    def report(step: Step) -> None:
        steps.append(step)

    made = compress(
        resolve_model(str(folder(architecture))),
        text,
        Target(Budget("kept", 0.5), form="full"),
        tmp_path / "out",
        FitSettings(method="stiefel", steps=2, num_samples=8, sequence_length=16, profile_samples=1),
        report=report,
    )
    verify_files(tmp_path / "out")
    again = read_checkpoint(tmp_path / "out")
    assert again.config["measured"] == made.measured
    assert made.measured["kept"] <= 0.5 + 1e-9
    assert made.plan.kept <= 0.5
    assert made.reached is None
    assert [phase for phase, _ in itertools.groupby(step.phase for step in steps)] == [
        "fitting",
        "sensitivity",
        "evaluating",
    ]
    assert all(0 <= step.done <= step.total for step in steps)


def test_compress_on_the_models_own_text_depends_on_the_seed_only(
    folder: Callable[..., Path], tmp_path: Path
) -> None:
    source = resolve_model(str(folder()))
    digests = []
    for i, seed in enumerate((0, 0, 1)):
        chosen = FitSettings(method="eigen", num_samples=2, sequence_length=8, profile_samples=1, seed=seed)
        made = compress(source, TextSource("self"), Target(Budget("kept", 0.5)), tmp_path / str(i), chosen)
        digests.append(
            (made.profile.dataset["digest"], (tmp_path / str(i) / "orthokv.safetensors").read_bytes())
        )
    assert digests[0] == digests[1]
    assert digests[0][0] != digests[2][0]


def test_a_mixture_has_blocks_of_every_text_in_both_parts(
    folder: Callable[..., Path], text: TextSource, tmp_path: Path
) -> None:
    (tmp_path / "more.txt").write_text(tiny_text(4000, seed=9))
    parts = (text, TextSource(str(tmp_path / "more.txt")), TextSource("self"))
    source = resolve_model(str(folder()))
    chosen = FitSettings(method="eigen", num_samples=24, sequence_length=16)
    found = prepare_blocks(source, TextMixture(parts), chosen)
    apart = [prepare_blocks(source, part, replace(chosen, num_samples=8)) for part in parts]
    assert torch.equal(found.tokens, torch.cat([part.tokens for part in apart]))
    assert found.source == " + ".join(part.source for part in apart)
    for share in found.split(chosen.holdout):
        for part in apart:
            rows = {tuple(row) for row in part.tokens.tolist()}
            assert any(tuple(row) in rows for row in share.tokens.tolist())


def test_a_budget_that_cannot_be_met_leaves_nothing(
    folder: Callable[..., Path], text: TextSource, tmp_path: Path
) -> None:
    source = resolve_model(str(folder()))
    with pytest.raises(BudgetUnreachable):
        compress(source, text, Target(Budget("kept", 0.0001)), tmp_path / "deep" / "out", QUICK)
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"sharing": "none"}, "'none'"),
        ({"key_mode": "during"}, "'during'"),
        ({"method": "pca"}, "'pca'"),
        ({"method": "eigen", "steps": 3}, "'eigen' has no setting steps"),
        ({"method": "weighted", "parameterisation": "direct"}, "'weighted' has no setting parameterisation"),
        ({"num_samples": 1}, "num_samples must be at least 2"),
        ({"batch_size": 0}, "batch_size"),
        ({"profile_samples": 0}, "profile_samples"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_any_work(options: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidSetting, match=named):
        FitSettings(**options)


@pytest.mark.parametrize(("samples", "held_out"), [(2, 1), (7, 1), (16, 2), (64, 8)])
def test_one_block_in_eight_is_held_out(samples: int, held_out: int) -> None:
    assert FitSettings(num_samples=samples).holdout == held_out


def test_blocks_longer_than_the_model_are_refused(folder: Callable[..., Path], text: TextSource) -> None:
    source = resolve_model(str(folder()))
    with pytest.raises(InvalidSetting, match="257 exceeds the model's 256"):
        prepare_blocks(source, text, FitSettings(num_samples=2, sequence_length=257))


# ----------------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize(
    ("architecture", "kv_heads", "head_dim"),
    [("llama", 4, 8), ("mistral", 2, 8), ("qwen2", 4, 8), ("qwen3", 4, 16), ("opt", 8, 8)],
)
def test_the_geometry_is_that_of_the_projections(architecture: str, kv_heads: int, head_dim: int) -> None:
    geometry = geometry_of(tiny_config(architecture))
    assert (geometry.kv_heads, geometry.head_dim) == (kv_heads, head_dim)
    rows = {p.shape[0] for n, p in tiny_model(architecture).named_parameters() if n.endswith("k_proj.weight")}
    assert rows == {geometry.kv_width}
    assert dense_bytes(geometry) == LAYERS * 2 * 2 * geometry.kv_width
    assert Geometry.from_dict(geometry.to_dict()) == geometry


def test_the_rope_hash_tells_rotary_embeddings_apart() -> None:
    config = tiny_config("llama")
    before = geometry_of(config).rope_hash
    config.rope_parameters["rope_theta"] = 10001.0
    assert geometry_of(config).rope_hash != before


def test_rotary_tables_that_change_with_the_length_serve_keys_after_rope_only() -> None:
    config = tiny_config("llama")
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    geometry = geometry_of(config)
    with pytest.raises(UnsupportedModel, match="'dynamic'"):
        check_key_mode(geometry, "pre")
    check_key_mode(geometry, "post")


# ------------------------------------------------------------------------------------------------ generation


def checkpoint_of(found: ErrorProfile, out: Path) -> Any:
    return write_checkpoint(found, allocate(found, Budget("kept", 0.5)), out)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3", "opt"])
def test_a_generation_says_what_the_live_cache_held(
    architecture: str, profile: Callable[..., ErrorProfile], tmp_path: Path
) -> None:
    checkpoint = checkpoint_of(profile(architecture), tmp_path / "out")
    model = tiny_model(architecture)
    made = generate(model, tiny_tokenizer(), checkpoint, "abcdefgh", 3 * SLIDING_WINDOW)
    assert made.tokens == 3 * SLIDING_WINDOW
    assert made.kept == pytest.approx(checkpoint.config["cache"]["kept"])
    assert seam_of(model) is None


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_an_uncompressed_generation_says_what_a_16_bit_cache_holds(architecture: str) -> None:
    model = tiny_model(architecture)
    made = generate(model, tiny_tokenizer(), None, "abcdefgh", 3 * SLIDING_WINDOW)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tiny_tokens(1, made.cached_tokens), past_key_values=cache, use_cache=True)
    assert made.cache_bytes == orthokv.cache_bytes(cache) // 2  # the live one holds float32
    assert made.kept == 1


def test_a_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(InvalidSetting, match="no tokens"):
        generate(tiny_model("llama"), tiny_tokenizer(), None, "", 3)


def test_a_generation_that_fails_detaches(profile: Callable[..., ErrorProfile], tmp_path: Path) -> None:
    checkpoint = checkpoint_of(profile("opt"), tmp_path / "out")
    model = tiny_model("opt")
    with pytest.raises((IndexError, OrthoKVError)):
        generate(model, tiny_tokenizer(), checkpoint, "a" * 250, 20)
    assert seam_of(model) is None


def test_a_text_longer_than_learned_positions_is_refused_in_a_sentence() -> None:
    with pytest.raises(OrthoKVError, match="256"):
        generate(tiny_model("opt"), tiny_tokenizer(), None, "a" * 250, 20)


# -------------------------------------------------------------------------------------- compressed inputs


def test_with_propagate_a_layer_is_fitted_on_what_the_compressed_layers_before_it_produce() -> None:
    model, blocks = tiny_model("llama"), tiny_blocks(4, 16)
    settings = replace(QUICK, propagate=0.25)
    layers = list(fit_layers(model, blocks, settings))
    seen: list[torch.Tensor] = []
    with Seam(model, "pre") as seam:
        for layer in layers[:2]:
            ranks = [round(0.25 * basis.width) for basis in (layer.key, layer.value)]
            seam.set_bases(layer.index, layer.bases(*ranks))
        seam.observe(2, lambda query, key, value: seen.append(key))
        fitting, _ = blocks.split(settings.holdout)
        model(fitting.tokens, use_cache=False)
    rows = seen[0].transpose(1, 2).flatten(0, 1).flatten(1).double()
    expected = torch.linalg.svdvals(rows) / len(rows) ** 0.5
    assert layers[2].spectrum_key is not None
    torch.testing.assert_close(layers[2].spectrum_key[0].double(), expected, rtol=1e-3, atol=1e-4)
    uncompressed = list(fit_layers(model, blocks, QUICK))
    assert torch.equal(uncompressed[0].error, layers[0].error)
    assert not torch.allclose(uncompressed[2].error, layers[2].error, rtol=1e-3)


def test_compressed_to_their_whole_width_inputs_are_uncompressed() -> None:
    model, blocks = tiny_model("llama"), tiny_blocks(4, 16)
    plain, propagated = (list(fit_layers(model, blocks, replace(QUICK, propagate=p))) for p in (None, 1.0))
    for a, b in zip(plain, propagated, strict=True):
        torch.testing.assert_close(a.error, b.error, rtol=1e-3, atol=1e-5)


def test_with_propagate_layers_are_not_fitted_apart() -> None:
    model, blocks = tiny_model("llama"), tiny_blocks(4, 16)
    settings = replace(QUICK, propagate=0.5)
    assert [layer.index for layer in fit_layers(model, blocks, settings, [0, 1])] == [0, 1]
    with pytest.raises(InvalidSetting, match=r"layers \[1, 2\] leave some out"):
        list(fit_layers(model, blocks, settings, [1, 2]))


def test_a_profile_says_that_its_inputs_were_compressed(folder: Callable[..., Path]) -> None:
    assert tiny_profile(folder(), propagate=0.5).method["propagate"] == 0.5
    assert "propagate" not in tiny_profile(folder()).method


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5, float("nan")])
def test_propagate_is_a_share(share: float) -> None:
    with pytest.raises(InvalidSetting, match="propagate must be a share"):
        FitSettings(propagate=share)


# ------------------------------------------------------------------------------------------------- comparing


def test_methods_are_compared_at_equal_bytes_on_the_same_text(
    folder: Callable[..., Path], tmp_path: Path
) -> None:
    source: ModelSource = resolve_model(str(folder()))
    model: PreTrainedModel = load_model(source)
    choices = [MethodChoice.parse(text) for text in ("eigen:tied", "stiefel:joint", "stiefel:tied:predictor")]
    rows = compare_methods(
        model,
        source,
        tiny_blocks(),
        tiny_blocks(2, 16, seed=9),
        [0.5, 0.25],
        choices,
        FitSettings("stiefel", num_samples=4, sequence_length=16, profile_samples=1, steps=2, epochs=1),
        profiles=tmp_path,
    )
    assert [(row.method, row.sharing, row.kept_asked) for row in rows] == [
        (method, sharing, kept)
        for method, sharing in (("eigen", "tied"), ("stiefel", "joint"), ("stiefel (predictor)", "tied"))
        for kept in (0.5, 0.25)
    ]
    assert len({row.perplexity_dense for row in rows}) == 1
    assert all(row.kept <= row.kept_asked for row in rows)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "eigen-tied",
        "stiefel(predictor)-tied",
        "stiefel-joint",
    ]
    assert seam_of(model) is None


def test_a_choice_names_a_method_its_sharing_and_any_of_its_hyper_parameters() -> None:
    choice = MethodChoice.parse("stiefel:tied:predictor:epochs=5")
    made = choice.settings(FitSettings("stiefel", steps=9, epochs=2)).method_settings
    assert made == StiefelSettings(parameterisation="predictor", steps=9, epochs=5)
    assert str(choice) == "stiefel (predictor, epochs=5)"
    refined = MethodChoice.parse("weighted:joint:refine_steps=7").settings(FitSettings())
    assert (refined.method, refined.refine_steps) == ("weighted", 7)
    assert MethodChoice.parse("eigen:head:statistics=kq").settings(
        FitSettings()
    ).method_settings == EigenSettings("kq")
    assert MethodChoice.parse("palu:head:whitened=false").settings(
        FitSettings()
    ).method_settings == PaluSettings(whitened=False)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("eigen:head:statistics=q", "'q'"),
        ("eigen:head:colour=red", "no setting colour"),
        ("stiefel:joint:steps=many", "'stiefel'"),
    ],
)
def test_a_hyper_parameter_in_a_choice_is_checked_by_its_method(text: str, named: str) -> None:
    with pytest.raises(InvalidSetting, match=named):
        MethodChoice.parse(text).settings(FitSettings())


@pytest.mark.parametrize(
    "text",
    [
        "eigen",
        "eigen:",
        ":tied",
        "eigen:tied:direct:x",
        "eigen:none",
        "",
        "eigen:tied:",
        "eigen:tied:a=",
        "eigen:tied:=1",
    ],
)
def test_a_choice_that_is_no_method_and_sharing_is_refused_in_its_own_words(text: str) -> None:
    with pytest.raises(InvalidSetting, match="is not method:sharing"):
        MethodChoice.parse(text)


# ------------------------------------------------------------------------------------- what a seam refuses


def test_two_seams_on_one_model_are_refused() -> None:
    model = tiny_model("llama")
    with Seam(model, "pre"):
        with pytest.raises(InvalidSetting, match="already attached"):
            Seam(model, "post")
        assert seam_of(model) is not None
    assert seam_of(model) is None


def test_a_cache_filled_before_rope_without_bases_is_refused() -> None:
    model = tiny_model("llama")
    cache = DynamicCache(config=model.config)
    with Seam(model, "pre"), pytest.raises(InvalidSetting, match="no bases"):
        model(tiny_tokens(1, 4), past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("side", ["key", "value"])
def test_one_side_alone_can_be_compressed(side: str, profile: Callable[..., ErrorProfile]) -> None:
    """As a predictor does while it fits keys and values apart."""
    layer = profile().layers[0]
    half = (
        PartialBases(layer.key.truncate(8), None)
        if side == "key"
        else PartialBases(None, layer.value.truncate(8))
    )
    model, block = tiny_model("llama"), tiny_tokens(1, 12)[0]
    dense = model_logits(model, block)
    with Seam(model, "pre") as seam:
        seam.set_bases(0, half)
        assert not torch.allclose(model_logits(model, block), dense, atol=1e-3)
        seam.set_bases(0, PartialBases(None, None))
        torch.testing.assert_close(model_logits(model, block), dense, rtol=1e-5, atol=1e-5)


def test_hooks_do_not_pile_up_over_many_seams() -> None:
    model = tiny_model("llama")

    def hooks() -> int:
        return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())

    before = hooks()
    for _ in range(3):
        with Seam(model, "pre"):
            assert hooks() == before + 2 * LAYERS
    assert hooks() == before
    assert not any(isinstance(m, nn.Module) and "_orthokv" in vars(m) for m in model.modules())
