"""A latent layer is to `transformers` what the stock layer in it is; caches outlive the process and the model's copy."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicIndexedLayer, DynamicLayer

import orthokv
from orthokv.bases.basis import PartialBases
from orthokv.checkpoint.write import write_checkpoint
from orthokv.models.geometry import geometry_of
from orthokv.planning.allocate import allocate
from orthokv.runtime.cache import LatentLayer
from orthokv.runtime.seam import Seam
from orthokv.spec.budget import Budget
from orthokv.spec.errors import InvalidSetting
from orthokv.spec.vocabulary import KEY_MODES, KeyMode
from tests.support.tiny import tiny_bases, tiny_folder, tiny_model, tiny_profile, tiny_seam, tiny_tokens

# What `transformers` reads of cache layers, in any of its files.
READ = (
    "_sliding_window_tensor",
    "batch_size",
    "cumulative_length",
    "cumulative_length_int",
    "device",
    "indexer_keys",
    "is_compileable",
    "is_croppable",
    "is_initialized",
    "is_sliding",
    "max_cache_len",
    "record_past",
    "sliding_window",
    "supports_early_init",
)


def caches(model: PreTrainedModel) -> dict[str, Callable[[], Any]]:
    return {
        "dynamic": lambda: DynamicCache(config=model.config),
        "lazy": DynamicCache,
        "static": lambda: StaticCache(config=model.config, max_cache_len=20),
    }


@torch.no_grad()
def fill(model: Any, cache: Cache, ids: Tensor, *sizes: int) -> Tensor:
    parts = ids.split(list(sizes), dim=1)
    return torch.cat([model(part, past_key_values=cache, use_cache=True).logits for part in parts], dim=1)


def equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])  # without windows, and with
def test_a_latent_layer_answers_as_the_stock_layer_would(name: str, kind: str) -> None:
    model, ids = tiny_model(name), tiny_tokens(2, 15)
    dense, latent = (caches(model)[kind]() for _ in range(2))
    with tiny_seam(model, "pre", tiny_bases(geometry_of(model.config), "head")):
        for size in (9, 5, 1):
            fill(model, latent, ids[:, :size], size)
    for size in (9, 5, 1):
        fill(model, dense, ids[:, :size], size)
    for cache in (dense, latent):
        cache.activate_past_recording()
    for stock, layer in zip(dense.layers, latent.layers, strict=True):
        assert isinstance(layer, LatentLayer)
        for attribute in READ:
            assert hasattr(layer, attribute) == hasattr(stock, attribute), attribute
            if hasattr(stock, attribute):
                assert equal(getattr(layer, attribute), getattr(stock, attribute)), attribute
        assert equal(layer.get_seq_length(), stock.get_seq_length())
        assert layer.get_max_length() == stock.get_max_length()
        assert [layer.get_mask_sizes(n) for n in (1, 5)] == [stock.get_mask_sizes(n) for n in (1, 5)]
        for held, whole in ((layer.keys, stock.keys), (layer.values, stock.values)):
            assert held is not None
            assert held.shape[:3] == whole.shape[:3]
            assert held.shape[3] < whole.shape[3]
    for question in (
        "is_compileable",
        "is_initialized",
        "is_croppable",
        "is_sliding",
        "is_linear",
        "is_dummy",
    ):
        assert getattr(latent, question) == getattr(dense, question), question
    assert len(latent) == len(dense)
    assert latent.get_max_length() == dense.get_max_length()
    assert latent.is_recording_past(0) == dense.is_recording_past(0)


def test_past_recording_ends_for_positions_too() -> None:
    """`generate` writes the attribute when it gives a cache back."""
    model, ids = tiny_model("mistral"), tiny_tokens(1, 20)
    with tiny_seam(model, "pre"):
        cache: Any = DynamicCache(config=model.config)
        cache.activate_past_recording()
        fill(model, cache, ids[:, :14], 14)
        cache.crop(-1)
        for layer in cache.layers:
            layer.record_past = False
        found = fill(model, cache, ids[:, 13:], 3, 4)
        with torch.no_grad():
            expected = model(ids, use_cache=False).logits[:, 13:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert {layer.keys.shape[-2] for layer in cache.layers} == {11}
    assert {book.layer.keys.shape[-2] for book in cache._orthokv_books.values()} == {11}


@pytest.mark.parametrize("kind", ["dynamic", "lazy", "static"])
def test_a_cache_goes_to_the_cpu_and_comes_back(kind: str) -> None:
    model, ids = tiny_model("gemma3_text"), tiny_tokens(1, 16)
    if kind == "lazy":  # its layers know of no window
        model = tiny_model("llama")
    with tiny_seam(model, "pre"):
        cache = caches(model)[kind]()
        fill(model, cache, ids[:, :10], 10)
        for layer in cache.layers:
            layer.offload()
            layer.prefetch()
        found = fill(model, cache, ids[:, 10:], 6)
        with torch.no_grad():
            expected = model(ids, use_cache=False).logits[:, 10:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_cache_can_be_sized_ahead_of_time(when: str, kind: str) -> None:
    """For full heads before its first use; once it holds latents, for these."""
    model, ids = tiny_model("llama"), tiny_tokens(1, 9)
    sizes = {
        "batch_size": 1,
        "num_heads": 4,
        "head_dim": 8,
        "dtype": torch.float32,
        "device": torch.device("cpu"),
    }
    with tiny_seam(model, "pre"):
        cache = caches(model)[kind]()
        if when == "after":
            fill(model, cache, ids.flip(1), 9)
            cache.reset()
        cache.early_initialization(**sizes)
        found = fill(model, cache, ids, 6, 3)
        with torch.no_grad():
            torch.testing.assert_close(found, model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)
    assert all(layer.keys.shape[-1] == 16 for layer in cache.layers)


def test_a_layer_that_keeps_more_than_keys_and_values_is_refused() -> None:
    model = tiny_model("llama")
    for kind in (DynamicIndexedLayer, type("OtherLayer", (DynamicLayer,), {})):
        cache = Cache(layers=[kind() for _ in range(3)])
        with (
            tiny_seam(model, "post"),
            pytest.raises(InvalidSetting, match=f"{kind.__name__} cannot hold latents"),
        ):
            fill(model, cache, tiny_tokens(1, 3), 3)


def test_a_cache_is_not_filled_with_one_side_alone() -> None:
    model = tiny_model("llama")
    with Seam(model, "post") as seam:
        full = tiny_bases(seam.geometry)[0]
        seam.set_bases(0, PartialBases(full.key, None))
        with pytest.raises(InvalidSetting, match="lacks a basis"):
            fill(model, DynamicCache(config=model.config), tiny_tokens(1, 3), 3)


# ------------------------------------------------------------------------------------- saved, copied, taken on


@pytest.fixture(scope="module", params=KEY_MODES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    return make_checkpoint(folder, request.param, 0.5)


def make_checkpoint(folder: Path, key_mode: KeyMode, kept: float) -> Path:
    profile = tiny_profile(tiny_folder(folder, "llama"), key_mode=key_mode)
    return write_checkpoint(profile, allocate(profile, Budget("kept", kept)), folder / "out").folder


@pytest.fixture
def started(checkpoint: Path) -> tuple[PreTrainedModel, Cache, Tensor, Tensor]:
    """A model, a cache with the first 9 tokens, all tokens, and the logits of the others."""
    model, ids = tiny_model("llama"), tiny_tokens(1, 14)
    orthokv.attach(model, checkpoint)
    whole, cache = DynamicCache(config=model.config), DynamicCache(config=model.config)
    expected = fill(model, whole, ids, 9, 5)[:, 9:]
    fill(model, cache, ids[:, :9], 9)
    return model, cache, ids, expected


Started = tuple[PreTrainedModel, Cache, Tensor, Tensor]


def test_a_cache_saved_to_disk_goes_on_in_another_process(
    checkpoint: Path, started: Started, tmp_path: Path
) -> None:
    _, cache, ids, expected = started
    torch.save({"cache": cache, "ids": ids[:, 9:]}, tmp_path / "cache.pt")
    code = """
        import sys, torch, orthokv
        from tests.support.tiny import tiny_model
        torch.set_num_threads(1)
        folder, checkpoint = sys.argv[1:]
        saved = torch.load(f"{folder}/cache.pt", weights_only=False)
        model = orthokv.attach(tiny_model("llama"), checkpoint)
        with torch.no_grad():
            logits = model(saved["ids"], past_key_values=saved["cache"], use_cache=True).logits
        torch.save(logits, f"{folder}/logits.pt")
    """
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path), str(checkpoint)],
        check=True,
        cwd=Path.cwd(),
    )
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)


def test_a_saved_cache_takes_the_bytes_that_it_holds_and_no_bases(started: Started, tmp_path: Path) -> None:
    _, cache, _, _ = started
    torch.save(cache, tmp_path / "cache.pt")
    assert (tmp_path / "cache.pt").stat().st_size < orthokv.cache_bytes(cache) + 16_000
    saved = torch.load(tmp_path / "cache.pt", weights_only=False)
    assert orthokv.cache_bytes(saved) == orthokv.cache_bytes(cache)


def test_a_cache_goes_on_with_a_deep_copy_of_its_model(started: Started) -> None:
    model, cache, ids, expected = started
    twin = copy.deepcopy(model)
    orthokv.detach(model)
    found = fill(twin, cache, ids[:, 9:], 5)
    assert torch.equal(found, expected)
    orthokv.detach(twin)
    assert not torch.allclose(fill(twin, DynamicCache(), ids, 14)[:, 9:], expected, atol=1e-3)


def test_a_cache_goes_on_after_its_checkpoint_was_attached_anew(checkpoint: Path, started: Started) -> None:
    model, cache, ids, expected = started
    orthokv.detach(model)
    orthokv.attach(model, checkpoint)
    assert torch.equal(fill(model, cache, ids[:, 9:], 5), expected)


def test_a_cache_of_another_checkpoint_or_codec_is_refused(
    checkpoint: Path, started: Started, tmp_path: Path
) -> None:
    model, cache, ids, _ = started
    key_mode: Any = orthokv.read_checkpoint(checkpoint).key_mode
    for other, codec in ((make_checkpoint(tmp_path, key_mode, 0.4), None), (checkpoint, "native")):
        orthokv.detach(model)
        orthokv.attach(model, other, codec=codec)
        with pytest.raises(InvalidSetting, match="another compressed model"):
            fill(model, copy.deepcopy(cache), ids[:, 9:], 5)


def test_bases_without_a_checkpoint_know_their_own_cache_alone() -> None:
    model, ids = tiny_model("llama"), tiny_tokens(1, 8)
    cache = DynamicCache(config=model.config)
    with tiny_seam(model, "post"):
        fill(model, cache, ids, 8)
        fill(model, cache, ids, 8)
    with tiny_seam(model, "post"), pytest.raises(InvalidSetting, match="another compressed model"):
        fill(model, cache, ids, 8)
