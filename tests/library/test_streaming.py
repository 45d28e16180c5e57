"""A model larger than the memory is read one decoder layer at a time, and nothing else about it changes."""

from __future__ import annotations

import json
import logging
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.make_model import write_model
from orthokv.cli import main
from orthokv.fit.walk import LayerWalk
from orthokv.measure.checkpoint import evaluate_checkpoint
from orthokv.models.fingerprint import matches, weight_fingerprints
from orthokv.models.geometry import decoder_layers
from orthokv.models.loading import load
from orthokv.models.source import ModelSource, load_model, resolve_model
from orthokv.models.states import spilled_to
from orthokv.models.streaming import StreamedWeights, stream_model, streamed_weights, streaming_reason
from orthokv.pipeline import Compressed, build_profile, compress, fit_layers, prepare_blocks
from orthokv.serving.attach import attach, detach
from orthokv.spec.budget import Budget
from orthokv.spec.errors import InvalidModel, InvalidSetting, StorageError
from orthokv.spec.settings import FitSettings
from orthokv.spec.target import Target
from orthokv.text.source import TextSource
from tests.support.tiny import (
    ARCHITECTURES,
    LAYERS,
    tiny_blocks,
    tiny_folder,
    tiny_model,
    tiny_text,
    tiny_tokenizer,
    tiny_tokens,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
QUICK = FitSettings(method="stiefel", steps=3, num_samples=8, sequence_length=16, profile_samples=2)


def stored(tmp_path: Path, architecture: str, dtype: torch.dtype = torch.float32) -> ModelSource:
    """A tiny model on disk in `dtype`, in several shards."""
    folder = tmp_path / f"{architecture}-{dtype}".replace("torch.", "")
    tiny_model(architecture).to(dtype).save_pretrained(folder, max_shard_size="40KB")
    tiny_tokenizer().save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return resolve_model(str(folder))


def loaded_layers(model: Any) -> list[int]:
    """Decoder layers whose weights are in memory."""
    return [
        i
        for i, layer in enumerate(decoder_layers(model))
        if all(p.untyped_storage().nbytes() >= p.numel() * p.itemsize for p in layer.parameters())
    ]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is read from the files, in order."""
    seen: list[str] = []
    read = StreamedWeights.read

    def noted(self: StreamedWeights, *prefixes: str) -> None:
        seen.extend(prefixes)
        read(self, *prefixes)

    monkeypatch.setattr(StreamedWeights, "read", noted)
    return seen


def layers_of(reads: list[str]) -> list[int]:
    """The numbers of the whole layers among them."""
    parts = [name.split(".layers.")[1].split(".") for name in reads if ".layers." in name]
    return [int(rest[0]) for rest in parts if rest[1] == ""]


# ------------------------------------------------------------------------------------------------ the same numbers


@pytest.mark.parametrize("computed", [None, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_streamed_model_is_bit_for_bit_the_whole_one(
    architecture: str, dtype: torch.dtype, computed: torch.dtype | None, tmp_path: Path
) -> None:
    source, tokens = stored(tmp_path, architecture, dtype), tiny_tokens(2, 24)
    whole, streamed = load_model(source, dtype=computed), stream_model(source, dtype=computed)
    assert streamed.dtype == whole.dtype
    assert streamed.device == whole.device
    assert not streamed.training
    with torch.no_grad():
        for _ in range(2):  # the second time every layer has been dropped once
            assert torch.equal(streamed(tokens).logits, whole(tokens).logits)
    assert weight_fingerprints(streamed) == weight_fingerprints(whole)
    assert matches(streamed, weight_fingerprints(whole))


def compressed(source: ModelSource, out: Path, text: TextSource, **given: Any) -> Compressed:
    return compress(
        source,
        text,
        Target(given.pop("budget", Budget("kept", 0.4)), polish_steps=given.pop("polish_steps", None)),
        out,
        QUICK,
        **given,
    )


@pytest.fixture
def text(tmp_path: Path) -> TextSource:
    (tmp_path / "text.txt").write_text(tiny_text(400))
    return TextSource(str(tmp_path / "text.txt"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_streamed_and_spilled_compression_writes_the_same_files(
    architecture: str, dtype: torch.dtype, text: TextSource, tmp_path: Path
) -> None:
    source, spill = stored(tmp_path, architecture, dtype), tmp_path / "spill"
    spill.mkdir()
    whole = compressed(source, tmp_path / "whole", text, streaming="off")
    with spilled_to(spill):
        streamed = compressed(source, tmp_path / "streamed", text, streaming="on")
    assert streamed.measured == whole.measured
    assert streamed.plan == whole.plan
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert len(names) >= 5
    for name in names:
        assert (tmp_path / "streamed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list(spill.iterdir())


def test_a_perplexity_budget_is_kept_by_a_streamed_model(text: TextSource, tmp_path: Path) -> None:
    source, budget = stored(tmp_path, "llama"), Budget("perplexity_increase", 0.2)
    whole, streamed = (
        compressed(source, tmp_path / mode, text, streaming=mode, budget=budget) for mode in ("off", "on")
    )
    assert streamed.reached == whole.reached
    assert streamed.plan == whole.plan


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_tied(tied: bool, tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
        )
        build: Any = AutoModelForCausalLM.from_config
        build(config).save_pretrained(tmp_path)
    source = resolve_model(str(tmp_path))
    whole, streamed = load_model(source), stream_model(source)
    assert (streamed.lm_head.weight is streamed.model.embed_tokens.weight) is tied  # type: ignore[union-attr]
    tokens = torch.arange(20).view(1, -1)
    assert torch.equal(streamed(tokens).logits, whole(tokens).logits)


# -------------------------------------------------------------------------------------------- one layer at a time


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_layer_at_most_is_in_memory(architecture: str, tmp_path: Path) -> None:
    model = stream_model(stored(tmp_path, architecture))
    assert loaded_layers(model) == []
    seen: list[list[int]] = []
    for layer in decoder_layers(model):
        layer.register_forward_hook(lambda *_: seen.append(loaded_layers(model)))
    list(fit_layers(model, tiny_blocks(4), QUICK))
    assert {tuple(found) for found in seen} == {(i,) for i in range(LAYERS)}


def test_each_stage_reads_each_layer_once(text: TextSource, reads: list[str], tmp_path: Path) -> None:
    source = stored(tmp_path, "llama")
    model, every = stream_model(source), list(range(LAYERS))
    blocks = prepare_blocks(source, text, QUICK, model)
    reads.clear()
    fitted = list(fit_layers(model, blocks, QUICK))
    assert layers_of(reads) == every
    reads.clear()
    build_profile(model, source, blocks, fitted, QUICK)
    assert layers_of(reads) == every
    assert len(reads) <= 2 * LAYERS  # and the attention of each, for the fingerprint
    whole = compressed(source, tmp_path / "out", text, streaming="off")
    reads.clear()
    measured = evaluate_checkpoint(model, whole.checkpoint, blocks.split(1)[1])
    assert (
        layers_of(reads) == every * 3
    )  # quality and layer errors; a live cache with and without compression
    assert measured == whole.measured


def test_a_layer_in_use_survives_a_look_at_another(tmp_path: Path) -> None:
    model = stream_model(stored(tmp_path, "llama"))
    tokens = tiny_tokens(1, 8)
    before = model(tokens).logits
    assert loaded_layers(model) == [LAYERS - 1]
    weight_fingerprints(model)
    assert loaded_layers(model) == [LAYERS - 1]
    assert torch.equal(model(tokens).logits, before)


def test_bases_attach_to_a_streamed_model(text: TextSource, tmp_path: Path) -> None:
    source, tokens = stored(tmp_path, "llama"), tiny_tokens(1, 12)
    checkpoint = compressed(source, tmp_path / "out", text).checkpoint
    whole, streamed = load_model(source), stream_model(source)
    dense = streamed(tokens).logits
    for model in (whole, streamed):
        attach(model, checkpoint)
    assert torch.equal(streamed(tokens).logits, whole(tokens).logits)
    assert not torch.equal(streamed(tokens).logits, dense)
    assert torch.equal(detach(streamed)(tokens).logits, dense)


PEAKS = """
import sys, torch
from orthokv.models.memory import peak_bytes
from orthokv.models.source import load_model, resolve_model
from orthokv.models.streaming import stream_model
torch.set_num_threads(1)
source = resolve_model(sys.argv[1])
peaks = [peak_bytes()]
for load in (stream_model, load_model):
    model = load(source, dtype=torch.float32)
    with torch.no_grad():
        model(torch.arange(8).view(1, -1))
    peaks.append(peak_bytes())
print(*peaks)
"""


def test_peak_memory_is_a_few_layers_whatever_the_depth(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=512,
        intermediate_size=4096,
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
    )
    write_model(tmp_path / "model", config, seed=0, dtype="bfloat16")
    layer = 4 * (3 * 512 * 4096 + 2 * 512 * 512 + 2 * 512 * 128)  # bytes in float32
    ran = subprocess.run(
        [sys.executable, "-c", PEAKS, str(tmp_path / "model")], check=True, capture_output=True, text=True
    )
    before, streamed, whole = (int(peak) for peak in ran.stdout.split())
    assert streamed - before < 5 * layer
    assert whole - before > 15 * layer


# ------------------------------------------------------------------------------------------------ when, and when not


def sparse_model(folder: Path, gib: int) -> ModelSource:
    """A model whose file claims `gib` of weights, in one bfloat16 tensor that was never written."""
    folder.mkdir()
    count = gib << 30
    header = json.dumps({"w": {"dtype": "BF16", "shape": [count // 2], "data_offsets": [0, count]}}).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + count)
    return ModelSource("giant", None, folder, "", ("model.safetensors",))


def test_auto_streams_what_does_not_fit_and_says_so(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    giant = sparse_model(tmp_path / "giant", 4096)
    reason = streaming_reason(giant, cpu, torch.float32)
    assert reason is not None
    assert "8192.0 GiB" in reason  # in the dtype of the computation, not the stored one
    assert streaming_reason(giant, cpu, torch.float32, "off") is None
    small = resolve_model(str(tiny_folder(tmp_path, "llama")))
    assert streaming_reason(small, cpu, None) is None
    assert streaming_reason(small, cpu, None, "on") is not None
    with pytest.raises(InvalidSetting, match="'never'"):
        streaming_reason(small, cpu, None, "never")  # type: ignore[arg-type]


def test_one_line_tells_that_a_model_is_streamed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = resolve_model(str(tiny_folder(tmp_path, "llama")))
    with caplog.at_level(logging.WARNING, logger="orthokv"):
        assert streamed_weights(load(source, "cpu")) is None
        assert not caplog.messages
        assert streamed_weights(load(source, "cpu", streaming="on")) is not None
    (said,) = caplog.messages
    assert "one decoder layer at a time" in said


def test_a_streamed_model_neither_writes_its_own_text_nor_is_timed(text: TextSource, tmp_path: Path) -> None:
    source = stored(tmp_path, "llama")
    model = stream_model(source)
    with pytest.raises(InvalidSetting, match="read once a token"):
        prepare_blocks(source, TextSource("self"), QUICK, model)
    checkpoint = compressed(source, tmp_path / "out", text).checkpoint
    assert "tokens_per_second" not in evaluate_checkpoint(model, checkpoint, tiny_blocks(2), speed=True)


# ---------------------------------------------------------------------------------------------------- bad weights


def altered(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], ModelSource]:
    def make(tmp_path: Path) -> ModelSource:
        folder = tiny_folder(tmp_path, "llama")
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return resolve_model(str(folder))

    return make


UP = "model.layers.1.mlp.up_proj.weight"
FAULTS = {
    "missing": lambda tensors: tensors.pop(UP),
    "missing outside": lambda tensors: tensors.pop("model.norm.weight"),
    "foreign": lambda tensors: tensors.update({"model.layers.7.extra.weight": torch.ones(3)}),
    "shape": lambda tensors: tensors.update({UP: torch.ones(3, 3)}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_weights_that_do_not_fit_are_refused_with_the_same_words(fault: str, tmp_path: Path) -> None:
    source = altered(FAULTS[fault])(tmp_path)
    with pytest.raises(InvalidModel) as whole:
        load_model(source)
    with pytest.raises(InvalidModel) as streamed:
        stream_model(source)
    assert str(streamed.value) == str(whole.value)


def test_a_weight_that_is_not_finite_is_named_when_its_layer_is_read(tmp_path: Path) -> None:
    source = altered(lambda tensors: tensors[UP].fill_(torch.inf))(tmp_path)
    model = stream_model(source)
    with pytest.raises(InvalidModel, match=rf"{UP} .*not finite"):
        model(tiny_tokens(1, 8))
    with pytest.raises(InvalidModel, match=r"model\.norm\.weight .*not finite"):
        stream_model(altered(lambda tensors: tensors["model.norm.weight"].fill_(torch.nan))(tmp_path / "b"))


def test_files_that_vanish_meanwhile_are_reported(tmp_path: Path) -> None:
    source = stored(tmp_path, "llama")
    model = stream_model(source)
    for shard in source.folder.glob("*.safetensors"):
        shard.unlink()
    with pytest.raises(InvalidModel, match="cannot be read"):
        model(tiny_tokens(1, 8))


# ------------------------------------------------------------------------------------------------ activations on disk


@pytest.mark.parametrize("dtype", DTYPES)
def test_spilled_hidden_states_are_those_of_memory(dtype: torch.dtype, tmp_path: Path) -> None:
    model, tokens = tiny_model("llama").to(dtype), tiny_tokens(5, 16)
    walks = [LayerWalk(model, tokens, 2)]
    with spilled_to(tmp_path):
        walks.append(LayerWalk(model, tokens, 2))
    for layer in range(LAYERS):
        for walk in walks:
            walk.run(layer)
        assert walks[1].outputs.dtype == dtype
        assert torch.equal(walks[0].outputs, walks[1].outputs)
        for walk in walks:
            walk.advance()
    mapped = Path("/proc/self/maps")
    if mapped.exists():
        assert str(tmp_path) in mapped.read_text()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_hold_the_hidden_states_is_named(tmp_path: Path) -> None:
    with spilled_to(tmp_path / "nowhere"), pytest.raises(StorageError, match="nowhere"):
        LayerWalk(tiny_model("llama"), tiny_tokens(2, 8), 2)


def test_the_command_line_streams_spills_and_prints_its_peak(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder, spill = tiny_folder(tmp_path, "llama"), tmp_path / "spill"
    (tmp_path / "text.txt").write_text(tiny_text(400))
    spill.mkdir()

    def run(out: str, *options: object) -> int:
        given = [
            folder,
            "--dataset",
            tmp_path / "text.txt",
            "--kept",
            "0.5",
            "--method",
            "eigen",
            "--device",
            "cpu",
        ]
        sizes = ["--num-samples", "4", "--sequence-length", "16", "--out", tmp_path / out]
        with pytest.raises(SystemExit) as ended:
            main(["compress", *map(str, [*given, *sizes, *options])])
        return int(ended.value.code or 0)

    assert run("out", "--streaming", "on", "--spill", spill) == 0
    assert "streamed from disk" in caplog.text
    last = capsys.readouterr().out.splitlines()[-1]
    assert float(last.removeprefix("peak memory ").removesuffix(" GiB")) > 0
    assert (tmp_path / "out" / "orthokv.json").is_file()
    assert run("other", "--spill", tmp_path / "nowhere") == 2
    assert "nowhere is not a folder" in capsys.readouterr().err
    assert run("other", "--streaming", "never") == 2
    assert "'never'" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
