"""What must hold for every architecture, key mode and sharing: architecture section 5, one test an invariant."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

import orthokv
from orthokv.checkpoint.read import Checkpoint
from orthokv.checkpoint.write import write_checkpoint
from orthokv.models.geometry import geometry_of
from orthokv.models.source import ModelSource, load_model, resolve_model
from orthokv.pipeline import build_profile, compress, fit_layers, prepare_blocks
from orthokv.planning.plan import Plan, layer_plans
from orthokv.planning.profile import ErrorProfile, LayerProfile
from orthokv.spec.budget import Budget
from orthokv.spec.codec import codec_spec
from orthokv.spec.footprint import Footprint, dense_bytes
from orthokv.spec.geometry import STATIC_ROPE, rope_types
from orthokv.spec.settings import FitSettings
from orthokv.spec.sharing import sharings_of
from orthokv.spec.target import Target
from orthokv.spec.vocabulary import CODECS, KEY_MODES, KeyMode, SharingChoice
from orthokv.text.blocks import Blocks
from orthokv.text.source import TextSource
from tests.support.tiny import (
    ARCHITECTURES,
    FAMILIES,
    LAYERS,
    VARIANTS,
    tiny_config,
    tiny_folder,
    tiny_text,
)


def key_modes(name: str) -> list[KeyMode]:
    """Those that are not refused for the rotary embedding of a tiny model."""
    types = rope_types(geometry_of(tiny_config(name)))
    return [mode for mode in KEY_MODES if mode == "post" or types <= set(STATIC_ROPE)]


def sharings(name: str) -> tuple[SharingChoice, ...]:
    if name not in ARCHITECTURES:
        return ("joint",)
    if name not in FAMILIES:
        return ("tied", "joint")
    # Pairs are among the layers of auto, too; opt has 8 KV heads, so that four of them are not all.
    alone: dict[str, tuple[SharingChoice, ...]] = {"llama": ("pair",), "opt": ("quad",)}
    return ("head", "tied", "joint", "auto", *alone.get(name, ()))


def cases() -> Iterator[Any]:
    """Every variant in every form and key mode, which `make test-slow` runs. Not slow is a sample: all of `llama`, one form of
    each key mode of the other families, and of each other variant one form of one mode, both taken in turn.
    """
    for number, name in enumerate(VARIANTS):
        forms, modes = sharings(name), key_modes(name)
        for turn, mode in enumerate(modes):
            for form in forms:
                taken = form == forms[(number + turn) % len(forms)]
                taken &= name in FAMILIES or mode == modes[number // 2 % len(modes)]
                sampled = taken or name == "llama"
                yield pytest.param((name, mode, form), marks=() if sampled else pytest.mark.slow)


# Ranks differ by layer and between keys and values, as in any real plan.
LOW_RANK = ((0.5, 0.75), (0.25, 0.5), (0.75, 0.25))
NEW_TOKENS = 12


@dataclass
class Case:
    """A tiny model with its weights on disk, and checkpoints of it at low and at full rank."""

    name: str
    model: PreTrainedModel
    source: ModelSource
    low: Checkpoint
    full: Checkpoint


def planned(profile: ErrorProfile, shares: tuple[tuple[float, float], ...]) -> Plan:
    ranks = [
        (max(1, round(k * layer.key.width)), max(1, round(v * layer.value.width)))
        for layer, (k, v) in zip(profile.layers, shares, strict=True)
    ]
    layers = layer_plans(profile, ranks)
    size = Footprint(profile.geometry, profile.key_mode).cache_bytes(layers)
    dense = dense_bytes(profile.geometry)
    return Plan(
        profile.key_mode,
        profile.sharing,
        layers,
        size,
        dense,
        (0.0,) * len(ranks),
        None,
        Budget("kept", 1.0),
        "knapsack",
    )


def fit(model: PreTrainedModel, blocks: Blocks, settings: FitSettings) -> list[LayerProfile]:
    """For `auto` the layers take its forms in turn, so that one cache holds groups of several widths."""
    if settings.sharing != "auto":
        return list(fit_layers(model, blocks, settings))
    forms = sharings_of("auto", geometry_of(model.config))
    return [
        layer
        for index in range(LAYERS)
        for layer in fit_layers(model, blocks, replace(settings, sharing=forms[index % len(forms)]), [index])
    ]


def make_case(name: str, key_mode: KeyMode, sharing: SharingChoice, folder: Path, **changes: Any) -> Case:
    source = resolve_model(str(tiny_folder(folder / "model", name, **changes)))
    model = load_model(source)
    blocks = Blocks.of(torch.randint(2, 99, (4, 24), generator=torch.Generator().manual_seed(3)), "random")
    settings = FitSettings("eigen", sharing, key_mode, num_samples=4, sequence_length=24, profile_samples=1)
    profile = build_profile(model, source, blocks, fit(model, blocks, settings), settings)
    low = write_checkpoint(profile, planned(profile, LOW_RANK), folder / "low", form="full", base=source)
    full = write_checkpoint(profile, planned(profile, ((1.0, 1.0),) * 3), folder / "full")
    return Case(f"{name}-{key_mode}-{sharing}", model, source, low, full)


@pytest.fixture(scope="module", params=cases(), ids="-".join)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(
        *cast(tuple[str, KeyMode, SharingChoice], request.param), tmp_path_factory.mktemp("case")
    )


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    """Three sequences of 17 tokens, two of them padded on the left."""
    ids = torch.randint(2, 99, (3, 17), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    mask[1, :2] = 0
    return ids.masked_fill(mask == 0, 0), mask


@pytest.fixture
def low(case: Case) -> Iterator[PreTrainedModel]:
    """The model with low-rank latents stored in its own dtype, so that exactness can be asked for."""
    yield orthokv.attach(case.model, case.low, codec="native")
    orthokv.detach(case.model)


def positions(mask: Tensor) -> Tensor:
    """Positions as `generate` numbers them: padding does not count."""
    return (mask.cumsum(1) - 1).clamp_min(0)


def run(model: PreTrainedModel, ids: Tensor, mask: Tensor, **options: Any) -> Any:
    generate: Any = model.generate
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_dict_in_generate": True}
    return generate(ids, attention_mask=mask, use_cache=True, **{**settings, **options})


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    if mask is not None:
        options |= {"attention_mask": mask, "position_ids": positions(mask)}
    return cast(Tensor, model(ids, **options).logits)


def close(a: Tensor, b: Tensor) -> bool:
    """Equal up to float32 rounding, relative to the largest logit."""
    return float((a - b).abs().max()) <= 2e-5 * float(b.abs().max())


def test_cached_decode_equals_uncached(low: PreTrainedModel, batch: tuple[Tensor, Tensor]) -> None:
    ids, mask = batch
    made = run(low, ids, mask, output_logits=True)
    whole = torch.cat([mask, torch.ones(3, NEW_TOKENS, dtype=mask.dtype)], dim=1)
    uncached = logits(low, made.sequences, whole, use_cache=False)[:, 16:-1]
    assert close(torch.stack(made.logits, dim=1), uncached)


def test_low_rank_changes_the_model(low: PreTrainedModel, case: Case, batch: tuple[Tensor, Tensor]) -> None:
    """Without this, every equality here could hold because compression never happened."""
    ids, mask = batch
    compressed = logits(low, ids, mask)[mask.bool()]
    orthokv.detach(case.model)
    dense = logits(case.model, ids, mask)[mask.bool()]
    orthokv.attach(case.model, case.low, codec="native")
    assert float((compressed - dense).abs().max()) > 1e-2 * float(dense.abs().max())


def test_full_rank_equals_dense(case: Case, batch: tuple[Tensor, Tensor]) -> None:
    ids, mask = batch
    dense = run(case.model, ids, mask, output_logits=True)
    orthokv.attach(case.model, case.full, codec="native")
    try:
        full = run(case.model, ids, mask, output_logits=True)
    finally:
        orthokv.detach(case.model)
    assert torch.equal(full.sequences, dense.sequences)
    assert close(torch.stack(full.logits), torch.stack(dense.logits))


def test_left_padded_batch_equals_single_sequences(
    low: PreTrainedModel, batch: tuple[Tensor, Tensor]
) -> None:
    ids, mask = batch
    together = run(low, ids, mask, output_logits=True)
    for row in range(3):
        alone = ids[row : row + 1, mask[row].bool()]
        single = run(low, alone, torch.ones_like(alone), output_logits=True)
        assert torch.equal(single.sequences[0, -NEW_TOKENS:], together.sequences[row, -NEW_TOKENS:])
        assert close(torch.stack(single.logits)[:, 0], torch.stack(together.logits)[:, row])


def test_chunked_prefill_equals_one_prefill(low: PreTrainedModel, batch: tuple[Tensor, Tensor]) -> None:
    ids = batch[0][2:]
    once, parts = DynamicCache(config=low.config), DynamicCache(config=low.config)
    whole = logits(low, ids, past_key_values=once, use_cache=True)
    chunks = [
        logits(low, part, past_key_values=parts, use_cache=True) for part in ids.split([6, 1, 10], dim=1)
    ]
    assert close(torch.cat(chunks, dim=1), whole)
    assert orthokv.cache_bytes(parts) == orthokv.cache_bytes(once)


def test_beam_search_equals_dense_at_full_rank(case: Case, batch: tuple[Tensor, Tensor]) -> None:
    ids, mask = batch
    dense = run(case.model, ids, mask, num_beams=3)
    orthokv.attach(case.model, case.full, codec="native")
    try:
        full = run(case.model, ids, mask, num_beams=3)
    finally:
        orthokv.detach(case.model)
    assert torch.equal(full.sequences, dense.sequences)


def test_a_cache_can_be_copied_and_reused(low: PreTrainedModel, batch: tuple[Tensor, Tensor]) -> None:
    """Prefix caching: fill once, deep-copy, continue twice."""
    ids = batch[0][2:]
    prefix = DynamicCache(config=low.config)
    logits(low, ids[:, :9], past_key_values=prefix, use_cache=True)
    expected = logits(low, ids, use_cache=False)[:, 9:]
    for _ in range(2):
        found = logits(low, ids[:, 9:], past_key_values=copy.deepcopy(prefix), use_cache=True)
        assert close(found, expected)


def test_rows_of_a_cache_can_change_places(low: PreTrainedModel, batch: tuple[Tensor, Tensor]) -> None:
    ids, mask = batch
    order = torch.tensor([2, 0])
    for change, argument, rows in (
        ("reorder_cache", order, order),
        ("batch_select_indices", order, order),
        ("batch_repeat_interleave", 2, torch.tensor([0, 0, 1, 1, 2, 2])),
    ):
        cache = DynamicCache(config=low.config)
        options = {"past_key_values": cache, "use_cache": True}
        with torch.no_grad():
            low(ids[:, :14], attention_mask=mask[:, :14], position_ids=positions(mask)[:, :14], **options)
            getattr(cache, change)(argument)
            rest = {"attention_mask": mask[rows], "position_ids": positions(mask)[rows, 14:], **options}
            found = low(ids[rows, 14:], **rest).logits
        assert close(found, logits(low, ids, mask, use_cache=False)[rows, 14:])


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_can_be_emptied_and_filled_again(
    kind: str, low: PreTrainedModel, batch: tuple[Tensor, Tensor]
) -> None:
    ids = batch[0][2:]
    cache: Any = (
        DynamicCache(config=low.config)
        if kind == "dynamic"
        else StaticCache(config=low.config, max_cache_len=20)
    )
    logits(low, ids.flip(1), past_key_values=cache, use_cache=True)
    cache.reset()
    found = [logits(low, part, past_key_values=cache, use_cache=True) for part in ids.split([14, 3], dim=1)]
    assert close(torch.cat(found, dim=1), logits(low, ids, use_cache=False))


def test_speculation_changes_nothing(low: PreTrainedModel, batch: tuple[Tensor, Tensor]) -> None:
    """Prompt look-up proposes several tokens and takes the wrong ones out of the cache again."""
    ids = batch[0][2:, :8].repeat(1, 2)
    plain = run(low, ids, torch.ones_like(ids))
    speculative = run(low, ids, torch.ones_like(ids), prompt_lookup_num_tokens=4)
    assert torch.equal(speculative.sequences, plain.sequences)


def test_tokens_can_be_taken_back(low: PreTrainedModel, batch: tuple[Tensor, Tensor]) -> None:
    """Also out of a window that was full when the cache learned that this would happen."""
    ids = batch[0][2:]
    cache: Any = DynamicCache(config=low.config)
    logits(low, ids[:, :14], past_key_values=cache, use_cache=True)
    cache.activate_past_recording()
    logits(low, ids[:, :3], past_key_values=cache, use_cache=True)
    cache.crop(-3)
    found = logits(low, ids[:, 14:], past_key_values=cache, use_cache=True)
    assert close(found, logits(low, ids, use_cache=False)[:, 14:])


def test_static_cache_equals_dynamic(low: PreTrainedModel, batch: tuple[Tensor, Tensor]) -> None:
    ids, mask = batch
    dynamic, static = run(low, ids, mask), run(low, ids, mask, cache_implementation="static")
    assert torch.equal(static.sequences, dynamic.sequences)


def test_live_cache_bytes_equal_declared_bytes(case: Case, batch: tuple[Tensor, Tensor]) -> None:
    ids, mask = batch
    for codec in CODECS:
        for checkpoint in (case.low, case.full):
            orthokv.attach(case.model, checkpoint, codec=codec)
            try:
                cache = run(case.model, ids, mask, max_new_tokens=3).past_key_values
            finally:
                orthokv.detach(case.model)
            tokens = ids.shape[1] + 2  # the last token made is not cached
            declared = checkpoint.declared_bytes(sequences=3, tokens=tokens, codec=codec_spec(codec, 4))
            assert orthokv.cache_bytes(cache) == declared
            if checkpoint.geometry.windows is None and codec == "16-bit":
                assert declared == 3 * tokens * checkpoint.config["cache"]["bytes_per_token"]


def test_detach_leaves_the_model_untouched(case: Case, batch: tuple[Tensor, Tensor]) -> None:
    model = case.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected, implementation = logits(model, *batch), model.config._attn_implementation
    orthokv.attach(model, case.low)
    attached = model.state_dict()
    assert attached.keys() == before.keys()
    logits(model, *batch)
    orthokv.detach(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert model.config._attn_implementation == implementation
    assert not any("orthokv" in name for name, _ in model.named_modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(logits(model, *batch), expected)


FRESH = """
import json, sys, torch, orthokv
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
for line in sys.stdin:
    ids, folder = json.loads(line)
    ids = torch.tensor(ids)
    model = AutoModelForCausalLM.from_pretrained(folder)
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    with torch.no_grad():
        save_file({"logits": model(ids).logits, "made": made}, folder + ".safetensors")
    print("done", flush=True)
"""


@pytest.fixture(scope="module")
def fresh_process() -> Iterator[subprocess.Popen[str]]:
    """A process that has seen none of these models; it loads the folders it is told, with nothing but an import."""
    with subprocess.Popen(
        [sys.executable, "-c", FRESH], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def test_a_fresh_process_gives_the_same_logits(
    case: Case, fresh_process: subprocess.Popen[str], batch: tuple[Tensor, Tensor]
) -> None:
    ids = batch[0][2:]
    assert fresh_process.stdin is not None
    assert fresh_process.stdout is not None
    fresh_process.stdin.write(json.dumps([ids.tolist(), str(case.low.folder)]) + "\n")
    fresh_process.stdin.flush()
    assert fresh_process.stdout.readline() == "done\n"
    orthokv.attach(case.model, case.low)
    try:
        made = run(case.model, ids, torch.ones_like(ids)).sequences[:, : 17 + 6]
        here = logits(case.model, ids)
    finally:
        orthokv.detach(case.model)
    found = load_file(f"{case.low.folder}.safetensors")
    assert torch.equal(found["made"], made)
    assert close(found["logits"], here)


def middle_error(layer: LayerProfile) -> float:
    """The error at half the ranks."""
    return float(layer.error[len(layer.ranks_key) // 2, len(layer.ranks_value) // 2])


@pytest.mark.parametrize("name", VARIANTS)
def test_a_learned_fit_goes_from_text_to_a_measured_checkpoint(name: str, tmp_path: Path) -> None:
    """Calibration on every architecture: it improves on its start, meets its budget, and what it made can be evaluated."""
    source = resolve_model(str(tiny_folder(tmp_path, name)))
    text = tmp_path / "text.txt"
    text.write_text(tiny_text(8 * 24))
    settings = FitSettings(
        "stiefel", "tied", key_modes(name)[0], num_samples=8, sequence_length=24, profile_samples=8, steps=20
    )
    found = compress(source, TextSource(str(text)), Target(Budget("kept", 0.5)), tmp_path / "out", settings)
    blocks = prepare_blocks(source, TextSource(str(text)), settings)
    start = list(fit_layers(load_model(source), blocks, replace(settings, method="eigen", steps=None)))
    assert sum(map(middle_error, found.profile.layers)) < sum(map(middle_error, start))
    assert found.plan.kept <= 0.5
    declared = found.checkpoint.declared_bytes(sequences=1, tokens=24)
    assert found.measured["cache_bytes_per_token"] == declared / 24
    assert 0 < found.measured["kl"] < 10


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("llama+dynamic", {"max_position_embeddings": 20}),
        ("phi3+longrope", {"original_max_position_embeddings": 20}),
    ],
)
def test_tables_that_change_with_the_length_change_as_in_the_model(
    name: str, limit: dict[str, Any], batch: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    """Generating across the length at which the tables change: at full rank, what the model itself does."""
    ids, mask = batch
    case = make_case(name, "post", "joint", tmp_path, **limit)
    dense = run(case.model, ids, mask, output_logits=True)
    rotary = cast(Any, case.model.get_submodule("model.rotary_emb"))
    assert not torch.equal(rotary.inv_freq, rotary.original_inv_freq)
    orthokv.attach(case.model, case.full, codec="native")
    full = run(case.model, ids, mask, output_logits=True)
    assert close(torch.stack(full.logits), torch.stack(dense.logits))
