"""Bases after RoPE depend on absolute positions: they are calibrated where they will serve, and the far end is measured."""

from __future__ import annotations

import io
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.bench import MODEL, SHARED
from orthokv.bases.basis import Bases
from orthokv.fit.methods import Weighted
from orthokv.fit.refine import Refinement, refine
from orthokv.fit.sensitivity import separate_divergences
from orthokv.fit.task import view_layer
from orthokv.fit.walk import LayerWalk
from orthokv.measure.checkpoint import evaluate_checkpoint
from orthokv.measure.quality import quality
from orthokv.models.geometry import geometry_of
from orthokv.models.loading import load
from orthokv.models.source import load_model, load_tokenizer, resolve_model
from orthokv.models.streaming import StreamedWeights, stream_model
from orthokv.pipeline import build_profile, compress, fit_layers, prepare_blocks
from orthokv.planning.allocate import allocate
from orthokv.planning.bases import planned_bases
from orthokv.planning.profile import ErrorProfile
from orthokv.runtime.seam import Seam, compressed
from orthokv.spec.budget import Budget
from orthokv.spec.codec import codec_spec
from orthokv.spec.errors import InvalidDataset, InvalidSetting
from orthokv.spec.geometry import STATIC_ROPE, rope_types
from orthokv.spec.settings import FitSettings
from orthokv.spec.target import Target
from orthokv.text.blocks import Blocks, evenly, starts_over
from orthokv.text.packing import load_blocks
from orthokv.text.source import TextMixture, TextSource
from tests.support.requests import step_request
from tests.support.tiny import (
    LAYERS,
    MAX_POSITIONS,
    VARIANTS,
    tiny_blocks,
    tiny_config,
    tiny_folder,
    tiny_model,
    tiny_profile,
    tiny_text,
    tiny_tokens,
)
from workers.protocol import DatasetRef
from workers.runner import Wire, run

ROTATED = [name for name in VARIANTS if geometry_of(tiny_config(name)).rope is not None]
STATIC = [name for name in ROTATED if rope_types(geometry_of(tiny_config(name))) <= {*STATIC_ROPE, "dynamic"}]
LENGTH = 24
FAR = MAX_POSITIONS - LENGTH
PLACES = [0, 100, FAR, 100, 0, FAR, 31]
POST: dict[str, Any] = {"method": "eigen", "key_mode": "post", "num_samples": 16, "sequence_length": 16}


def at(tokens: Tensor, start: int) -> Tensor:
    """Position ids of `tokens` `[B, T]` that begin at `start`."""
    return torch.arange(start, start + tokens.shape[1]).unsqueeze(0)


def states_of(model: PreTrainedModel, tokens: Tensor, start: int) -> tuple[Tensor, ...]:
    """The model's own hidden states of one block `[T]`."""
    ids = tokens.unsqueeze(0)
    with torch.no_grad():
        output = model(ids, use_cache=False, output_hidden_states=True, position_ids=at(ids, start))
    return tuple(state[0] for state in output.hidden_states)


def close(found: Tensor, expected: Tensor, rtol: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


# ------------------------------------------------------------------------------------------- where blocks begin


@given(positions=st.integers(16, 5000), count=st.integers(1, 300))
def test_blocks_cover_the_range_and_no_place_has_more_of_them(positions: int, count: int) -> None:
    starts = starts_over(positions, 16, count)
    places = sorted(set(starts))
    assert len(starts) == count
    assert places[0] == 0
    assert places[-1] == (positions - 16 if count > 1 else 0)
    if count >= positions / 16:
        assert all(later - place <= 16 for place, later in itertools.pairwise(places))
    each = [starts.count(place) for place in places]
    assert max(each) - min(each) <= 1


@pytest.mark.parametrize("places", [4, 8, 32, 128])
@pytest.mark.parametrize("count", [8, 14, 16, 28, 32, 56, 64, 112, 128, 224, 448, 512])
def test_the_few_blocks_that_errors_are_measured_on_begin_all_over_the_range(count: int, places: int) -> None:
    starts = starts_over(places * 512, 512, count)
    several = [starts[i] / (places * 512) for i in evenly(count, 8)]
    assert min(several) <= 0.25
    assert max(several) >= 0.5


@pytest.mark.parametrize("count", [16, 64, 128])
def test_fitted_and_held_out_blocks_both_cover_the_range(count: int) -> None:
    blocks = tiny_blocks(count, 16)
    spread = blocks.spread(256, count // 8)
    parts = spread.split(count // 8)
    for part in parts:
        assert {0, 240} <= set(part.starts)
        assert len(set(part.starts)) == min(256 // 16, len(part))
        assert part.positions == 256
    text = {tuple(tokens.tolist()): start for part in parts for tokens, start in part}
    assert [text[tuple(tokens.tolist())] for tokens in blocks.tokens] == list(spread.starts)


def test_starts_go_with_the_blocks_and_not_into_their_digest(tmp_path: Path) -> None:
    blocks, path = tiny_blocks(3), tmp_path / "blocks.safetensors"
    placed = blocks.placed([5, 0, 7])
    assert placed.digest == blocks.digest
    assert placed.take([2, 0]).starts == (7, 5)
    placed.save(path)
    assert Blocks.load(path).starts == (5, 0, 7)
    assert [(int(tokens[0]), start) for tokens, start in placed] == [
        (int(row[0]), start) for row, start in zip(blocks.tokens, (5, 0, 7), strict=True)
    ]


def test_a_file_of_before_there_were_starts_begins_at_0_and_a_wrong_one_is_refused(tmp_path: Path) -> None:
    blocks, path = tiny_blocks(3), tmp_path / "blocks.safetensors"
    blocks.save(path)
    with safe_open(path, framework="pt") as file:
        described = json.loads(file.metadata()["orthokv"])
    for starts, right in (
        (None, True),
        ([1, 2, 3], True),
        ([1, 2], False),
        ([-1, 0, 0], False),
        ("x", False),
    ):
        changed = {**described, "starts": starts}
        if starts is None:
            del changed["starts"]
        save_file({"tokens": blocks.tokens}, path, {"orthokv": json.dumps(changed)})
        if right:
            assert Blocks.load(path).starts == tuple(starts or (0, 0, 0))
        else:
            with pytest.raises(InvalidDataset, match="begin"):
                Blocks.load(path)


# ----------------------------------------------------------------------------------------- one layer at a time


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("name", ROTATED)
def test_a_walk_gives_the_models_own_states_wherever_blocks_begin(name: str, batch_size: int) -> None:
    """In batches of blocks that begin at different positions too."""
    model, tokens = tiny_model(name), tiny_tokens(len(PLACES), LENGTH)
    states = [states_of(model, block, start) for block, start in zip(tokens, PLACES, strict=True)]
    walk = LayerWalk(model, tokens, batch_size, PLACES)
    for layer in range(LAYERS - 1):
        close(walk.inputs, torch.stack([found[layer] for found in states]), 1e-5)
        walk.run(layer)
        walk.advance()
    close(walk.inputs, torch.stack([found[LAYERS - 1] for found in states]))


@pytest.mark.parametrize("name", STATIC)
def test_a_later_start_turns_keys_and_changes_no_output(name: str) -> None:
    model, tokens = tiny_model(name), tiny_tokens(3, LENGTH)
    geometry = geometry_of(model.config)
    with Seam(model, "post") as seam:
        walks = [LayerWalk(model, tokens, 3, [start] * 3) for start in (0, FAR)]
        for layer in range(LAYERS):
            keys: list[Tensor] = []
            seam.observe(layer, lambda query, key, value, keys=keys: keys.append(key))  # type: ignore[misc]
            for walk in walks:
                walk.run(layer)
            seam.observe(layer, None)
            close(walks[1].outputs, walks[0].outputs)
            moved = float((keys[1] - keys[0]).norm() / keys[0].norm())
            assert moved > 0.1 if geometry.uses_rope(layer) else moved < 1e-4, (layer, moved)
            for walk in walks:
                walk.advance()


def test_tables_that_change_with_the_length_are_those_of_the_blocks_own_positions() -> None:
    """Longrope has other tables behind its original context of 64: blocks there agree with each other, not with the first."""
    model, tokens = tiny_model("phi3+longrope"), tiny_tokens(1, LENGTH).expand(3, -1)
    walk = LayerWalk(model, tokens, 3, [0, 100, FAR])
    walk.run(0)
    close(walk.outputs[1], walk.outputs[2])
    assert float((walk.outputs[0] - walk.outputs[1]).abs().max()) > 1e-3


def noted_calls(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The keyword arguments of every forward of the model from now on."""
    calls: list[dict[str, Any]] = []
    own = model.forward

    def noted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return own(*args, **kwargs)

    monkeypatch.setattr(model, "forward", noted)
    return calls


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "opt", "mpt", "phi3+longrope"])
def test_a_walk_from_0_is_bit_for_bit_the_layer_itself_and_says_nothing_of_positions(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = tiny_model(name), tiny_tokens(5, LENGTH)
    calls = noted_calls(model, monkeypatch)
    walk = LayerWalk(model, tokens, 2)
    assert len(calls) == 1 + 3 + 1  # the shape of the input, three batches, the layers' arguments
    assert all(call == {"use_cache": False} for call in calls)
    given: list[tuple[Any, dict[str, Any]]] = []
    layer = walk.layers[0]
    handle = layer.register_forward_pre_hook(lambda _, a, k: given.append((a, k)), with_kwargs=True)
    with torch.no_grad():
        for i in (0, 2, 4):
            model(tokens[i : i + 2], use_cache=False)
        handle.remove()
        expected = [layer(*args, **kwargs) for args, kwargs in given]
    walk.run(0)
    assert torch.equal(walk.outputs, torch.cat([x[0] if isinstance(x, tuple) else x for x in expected]))


def test_every_start_costs_one_forward_around_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(6, LENGTH)
    calls = noted_calls(model, monkeypatch)
    LayerWalk(model, tokens, 6, [0, 50, 0, 99, 50, 99])
    assert len(calls) == 1 + 3 + 3


# ----------------------------------------------------------------------------------------- all that is measured


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> ErrorProfile:
    return tiny_profile(tiny_folder(tmp_path_factory.mktemp("model"), "llama"), key_mode="post")


def textbook(
    model: PreTrainedModel, seam: Seam, bases: list[Any], tokens: Tensor, start: int
) -> tuple[float, float, float]:
    """Negative log-likelihood compressed and not, and KL, in nats a token, of one block `[T]`."""
    ids = tokens.unsqueeze(0)
    with torch.no_grad():
        with compressed(seam, [None] * LAYERS):
            dense = model(ids, use_cache=False, position_ids=at(ids, start)).logits[0, :-1].log_softmax(-1)
        with compressed(seam, bases):
            other = model(ids, use_cache=False, position_ids=at(ids, start)).logits[0, :-1].log_softmax(-1)
    losses = [-float(x.gather(-1, tokens[1:, None]).mean()) for x in (other, dense)]
    return losses[0], losses[1], float((dense.exp() * (dense - other)).sum(-1).mean())


def test_quality_and_sensitivity_are_those_at_the_blocks_own_positions(profile: ErrorProfile) -> None:
    model, places = tiny_model("llama"), [0, 200, 77, 200]
    blocks = tiny_blocks(4, 16, seed=7).placed(places)
    bases = planned_bases(
        model, profile, allocate(profile, Budget("kept", 0.4), codec=codec_spec("native", 4))
    )
    with Seam(model, "post") as seam:
        found = quality(seam, bases, blocks)
        separate = separate_divergences(seam, bases, blocks)
        nothing: list[Any] = [None] * LAYERS
        rows = [textbook(model, seam, list(bases), *block) for block in blocks]
        for layer in range(LAYERS):
            alone = [*nothing[:layer], bases[layer], *nothing[layer + 1 :]]
            expected = sum(textbook(model, seam, alone, *block)[2] for block in blocks) / 4
            assert separate[layer] == pytest.approx(expected, rel=1e-3)
    assert found.kl == pytest.approx(sum(row[2] for row in rows) / 4, rel=1e-3)
    assert found.changes == pytest.approx([row[0] - row[1] for row in rows], abs=1e-4)
    assert found.perplexity_dense == pytest.approx(math.exp(sum(row[1] for row in rows) / 4), rel=1e-5)
    with Seam(model, "post") as seam:
        assert quality(seam, bases, blocks.placed([0] * 4)).kl != pytest.approx(found.kl, rel=0.01)


def test_a_layers_error_is_measured_where_its_blocks_begin(profile: ErrorProfile) -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(3, 16)
    layer = profile.layers[0]
    bases = layer.bases(layer.ranks_key[2], layer.ranks_value[3])
    places = [0, 90, 200]
    with Seam(model, "post") as seam:
        mixed = view_layer(LayerWalk(model, tokens, 3, places), seam, 0)
        errors = [mixed.compare(bases, [i]).error for i in range(3)]
        assert float(mixed.loss(bases, [0, 1, 2])) ** 0.5 == pytest.approx(
            mixed.compare(bases, [0, 1, 2]).error, rel=1e-4
        )
        for i, start in enumerate(places):
            alone = view_layer(LayerWalk(model, tokens[i : i + 1], 3, [start]), seam, 0)
            assert errors[i] == pytest.approx(alone.compare(bases, [0]).error, rel=1e-4)
        first = view_layer(LayerWalk(model, tokens, 3), seam, 0)
        assert errors[1] != pytest.approx(first.compare(bases, [1]).error, rel=0.01)


def test_refinement_runs_the_model_where_the_blocks_begin(
    profile: ErrorProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = tiny_model("llama"), set()
    own = model.forward

    def noted(*args: Any, **kwargs: Any) -> Any:
        positions = kwargs.get("position_ids")
        seen.add(0 if positions is None else int(positions[0, 0]))
        return own(*args, **kwargs)

    monkeypatch.setattr(model, "forward", noted)
    calibration, checks = tiny_blocks(4).placed([0, 11, 22, 33]), tiny_blocks(2, seed=1).placed([44, 55])
    # On random tokens no step need be progress.
    refine(model, profile, calibration, [checks], Refinement(4, patience=10), 0)
    assert seen == {0, 11, 22, 33, 44, 55}


# -------------------------------------------------------------------------------------------------- the whole way


@pytest.fixture
def text(tmp_path: Path) -> TextSource:
    (tmp_path / "text.txt").write_text(tiny_text(600))
    return TextSource(str(tmp_path / "text.txt"))


@pytest.mark.parametrize(
    ("settings", "positions", "starts"),
    [
        ({"key_mode": "post"}, MAX_POSITIONS, [0, 240]),
        ({"key_mode": "post", "positions": 128}, 128, [0, 112]),
        ({"key_mode": "post", "positions": 16}, 16, [0]),
        ({"key_mode": "pre"}, 16, [0]),
    ],
)
def test_a_checkpoint_says_which_positions_it_was_calibrated_on(
    settings: dict[str, Any], positions: int, starts: list[int], text: TextSource, tmp_path: Path
) -> None:
    source = resolve_model(str(tiny_folder(tmp_path, "llama")))
    chosen = FitSettings(**{**POST, **settings}, refine_steps=2, profile_samples=1)
    made = compress(source, text, Target(Budget("kept", 0.5)), tmp_path / "out", chosen)
    config = made.checkpoint.config
    assert config["calibrated_positions"] == config["dataset"]["positions"] == positions
    assert made.measured["dataset"]["starts"] == starts  # of the two held-out blocks
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| calibrated positions | 0 to {positions - 1} |" in card
    limits = card.split("## Limits")[1]
    assert f"positions 0 to {positions - 1}" in limits
    assert ("blocks of 16 tokens were spread over the positions above" in limits) is (positions > 16)
    assert ("blocks that begin at positions 0, " in card) is (positions > 16)
    again = evaluate_checkpoint(
        load_model(source), made.checkpoint, tiny_blocks(2).placed([100, MAX_POSITIONS - 16])
    )
    assert again["dataset"]["starts"] == [100, MAX_POSITIONS - 16]


def test_each_text_of_a_mixture_covers_the_range(tmp_path: Path) -> None:
    source = resolve_model(str(tiny_folder(tmp_path, "llama")))
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(tiny_text(2000))
    mixture = TextMixture(tuple(TextSource(str(tmp_path / f"{name}.txt")) for name in ("one", "two")))
    blocks = prepare_blocks(source, mixture, FitSettings(**{**POST, "num_samples": 64}))
    for half in (blocks.starts[:32], blocks.starts[32:]):
        assert len(set(half)) > 12  # of 16 places
    held_out = blocks.split(8)[1].starts
    for part in (held_out[:4], held_out[4:]):
        assert min(part) < 120 < max(part)


def test_a_model_without_rotary_embedding_is_calibrated_as_before(text: TextSource, tmp_path: Path) -> None:
    source = resolve_model(str(tiny_folder(tmp_path, "opt")))
    assert set(prepare_blocks(source, text, FitSettings(**POST)).starts) == {0}


def test_a_streamed_model_gives_the_same_profile_and_reads_each_layer_once(
    text: TextSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = resolve_model(str(tiny_folder(tmp_path, "gemma3_text")))
    settings = FitSettings(**{**POST, "method": "weighted"}, profile_samples=1)
    blocks = prepare_blocks(source, text, settings)
    assert len(set(blocks.starts)) == 14
    profiles = []
    for build in (load_model, stream_model):
        model = build(source)
        reads: list[str] = []
        read = StreamedWeights.read

        def noted(self: StreamedWeights, *names: str, reads: Any = reads, read: Any = read) -> None:
            reads.extend(names)
            read(self, *names)

        with monkeypatch.context() as patch:
            patch.setattr(StreamedWeights, "read", noted)
            layers = list(fit_layers(model, blocks, settings))
        assert reads == ([f"model.layers.{i}." for i in range(LAYERS)] if build is stream_model else [])
        profiles.append(build_profile(model, source, blocks, layers, settings))
    whole, streamed = profiles
    assert streamed.to_dict() == whole.to_dict()
    for one, other in zip(streamed.layers, whole.layers, strict=True):
        assert torch.equal(one.key.encoder, other.key.encoder)


def test_the_steps_of_the_service_see_where_blocks_begin(text: TextSource, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "llama")
    inputs: dict[str, str] = {}
    (tmp_path / "work").mkdir()

    def step(name: str, positions: int = 200) -> dict[str, Any]:
        stream = io.StringIO()
        request = step_request(
            name,
            model=str(folder),
            workdir=str(tmp_path / "work"),
            dataset=[DatasetRef(source=text.source, format="text", field="text")],
            settings=FitSettings(**POST, sharing="joint", positions=positions),
            layers=[0, 1, 2],
            inputs=inputs,
        )
        run(request, Wire(stream))
        last: dict[str, Any] = json.loads(stream.getvalue().splitlines()[-1])
        return last

    assert step("resolve")["type"] == "result"
    assert step("calibrate")["type"] == "result"
    written = tmp_path / "work" / "blocks.safetensors"
    assert Blocks.load(written).positions == 200
    inputs["blocks.safetensors"] = str(written)
    assert step("fit")["type"] == "result"
    inputs |= {path.name: str(path) for path in (tmp_path / "work").glob("layer-*")}
    assert step("profile")["data"]["summary"]["dataset"]["positions"] == 200
    refused = step("resolve", positions=MAX_POSITIONS + 1)
    assert (refused["type"], refused["code"]) == ("error", "invalid_setting")
    assert "257 positions are more than the model's 256" in refused["message"]


# ------------------------------------------------------------------------------------------------------- refusals


def test_a_setting_that_would_have_no_effect_or_cannot_be_is_refused(
    text: TextSource, tmp_path: Path
) -> None:
    with pytest.raises(InvalidSetting, match="positions 64 has no effect in key mode 'pre'"):
        FitSettings(positions=64, sequence_length=16)
    with pytest.raises(InvalidSetting, match=r"at least sequence_length \(1024\), not 1023"):
        FitSettings(key_mode="post", positions=1023)
    source = resolve_model(str(tiny_folder(tmp_path, "llama")))
    for name, positions, words in (
        ("llama", 257, "257 positions are more than the model's 256"),
        ("opt", 64, r"no effect on a model without rotary embedding \(opt\)"),
    ):
        source = resolve_model(str(tiny_folder(tmp_path, name)))
        with pytest.raises(InvalidSetting, match=words):
            compress(
                source,
                text,
                Target(Budget("kept", 0.5)),
                tmp_path / "out",
                FitSettings(**POST, positions=positions),
            )
    assert not (tmp_path / "out").exists()


def test_blocks_that_do_not_cover_the_range_are_refused() -> None:
    settings = FitSettings(**POST, positions=64)
    with pytest.raises(InvalidSetting, match="64 are to be served, but the blocks reach 16"):
        next(fit_layers(tiny_model("llama"), tiny_blocks(16, 16), settings))


def test_blocks_are_placed_only_where_they_can_be() -> None:
    for starts in ([0], [0, -1]):
        with pytest.raises(InvalidSetting, match="cannot begin"):
            tiny_blocks(2).placed(starts)
    with pytest.raises(InvalidSetting, match="272 positions are more than the model's 256"):
        LayerWalk(tiny_model("llama"), tiny_tokens(2, 16), 2, [0, 256])
    with pytest.raises(InvalidSetting, match="without rotary embedding"):
        LayerWalk(tiny_model("mpt"), tiny_tokens(2, 16), 2, [0, 1])


# ------------------------------------------------------------------------------------------------- the far end

TEXT_LENGTH = 256


@pytest.mark.slow
def test_a_real_model_is_served_as_well_at_the_far_end_of_its_context_as_at_the_near_one() -> None:
    """Measured at half of the widths: 1.05 x the dense perplexity at the near end and 1.58 x at the far one when calibrated at
    the start only, 1.10 x at both when calibrated over the range."""
    calibration, unseen = (SHARED / "data" / f"books-{name}.jsonl" for name in ("calib", "eval"))
    for path in (MODEL, calibration, unseen):
        if not path.exists():
            pytest.skip(
                f"{path} is not there: a real model is measured on real text (see benchmarks/README.md)"
            )
    source = resolve_model(str(MODEL))
    model = load(source, "cpu")
    shape = {"num_samples": 4, "sequence_length": TEXT_LENGTH}
    evaluation = load_blocks(TextSource(str(unseen)), load_tokenizer(source), **shape)
    far = geometry_of(model.config).max_positions - TEXT_LENGTH
    cost: dict[str, dict[str, float]] = {}
    for name, positions in (("start", TEXT_LENGTH), ("range", None)):
        settings = FitSettings(
            "weighted", "joint", "post", num_samples=18, sequence_length=TEXT_LENGTH, positions=positions
        )
        blocks = prepare_blocks(source, TextSource(str(calibration)), settings)
        with Seam(model, "post") as seam:
            bases = half_ranks(seam, blocks.split(settings.holdout)[0])
            cost[name] = {
                end: quality(seam, bases, evaluation.placed([start] * 4)).increase
                for end, start in (("near", 0), ("far", far))
            }
    assert cost["start"]["far"] > 0.2
    assert cost["range"]["far"] < cost["start"]["far"] / 3
    assert cost["range"]["far"] < 1.5 * cost["range"]["near"]


def half_ranks(seam: Seam, blocks: Blocks) -> list[Bases]:
    """Closed-form bases of half the width in every layer: no profile, which takes most of a fit's time."""
    walk, found = LayerWalk(seam.model, blocks.tokens, 4, blocks.starts), []
    for layer in range(len(walk)):
        fitted = Weighted().fit(view_layer(walk, seam, layer), "joint", 0)
        found.append(fitted.bases(fitted.key.width // 2, fitted.value.width // 2))
        walk.advance()
    return found
