"""A codec packs latents into rows of known size; a cache holds those rows and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

import orthokv
from orthokv.models.geometry import geometry_of
from orthokv.runtime.codecs import PACKING, Codec, codec_of
from orthokv.runtime.policy import Policy
from orthokv.runtime.seam import seam_of
from orthokv.spec.codec import CodecSpec, codec_spec
from orthokv.spec.errors import InvalidSetting
from orthokv.spec.footprint import Footprint, LayerPlan, SidePlan
from orthokv.spec.geometry import Geometry
from orthokv.spec.vocabulary import CODECS, KEY_MODES, KeyMode
from tests.support.tiny import SLIDING_WINDOW, tiny_bases, tiny_model, tiny_seam, tiny_tokens

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BATCH, TOKENS = 2, 17  # more than a window


@dataclass(frozen=True)
class Blocks:
    """Eight bits a number, with a scale for each channel of four tokens: as KIVI packs keys, but for the bits."""

    name: str = "blocks"
    block: int = 4

    def pack(self, z: Tensor) -> Tensor:
        blocks = z.unflatten(-2, (-1, 4))
        scales = (blocks.abs().amax(-2, keepdim=True) / 127).clamp_min(1e-6).half()
        numbers = (blocks / scales.to(z.dtype)).round().clamp(-127, 127).to(torch.int8)
        parts = (numbers.flatten(-2).view(torch.uint8), scales.flatten(-2).view(torch.uint8))
        return torch.cat(parts, dim=-1)

    def unpack(self, rows: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
        numbers = rows[..., : 4 * rank].contiguous().view(torch.int8).unflatten(-1, (4, rank))
        scales = rows[..., 4 * rank :].contiguous().view(torch.float16).unsqueeze(-2)
        unpacked: Tensor = numbers.to(dtype) * scales.to(dtype)
        return unpacked.flatten(-3, -2)

    def row_bytes(self, rank: int) -> int:
        return 4 * rank + 2 * rank


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKING, "blocks", lambda dtype: Blocks())


def nbytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


# ------------------------------------------------------------------------------------------------ packing


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*CODECS, "blocks"])
def test_a_row_takes_the_bytes_that_its_codec_declares(name: str, dtype: torch.dtype, blocks: None) -> None:
    codec: Codec = codec_of(name, dtype)
    for rank in (1, 5, 16):
        z = torch.randn(2, 3, 8, rank).to(dtype)
        rows = codec.pack(z)
        assert rows.shape[:-2] == (2, 3)
        assert rows.shape[-2] == 8 // codec.block
        assert nbytes(rows) == 2 * 3 * (8 // codec.block) * codec.row_bytes(rank)
        back = codec.unpack(rows, rank, dtype)
        assert back.shape == z.shape
        assert back.dtype == dtype
        torch.testing.assert_close(back, z, rtol=0.02, atol=0.02)


def test_every_codec_has_its_sizes_and_every_size_its_codec() -> None:
    assert tuple(PACKING) == CODECS


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_native_codec_and_16_bits_of_16_are_the_identity(dtype: torch.dtype) -> None:
    z = torch.randn(1, 2, 6, 5).to(dtype)
    for name in ("native", *(["16-bit"] if dtype != torch.float32 else [])):
        codec = codec_of(name, dtype)
        assert codec.pack(z) is z
        assert codec.unpack(z, 5, dtype) is z


def test_sizes_are_whole_bytes() -> None:
    assert codec_spec("native", 4).row_bytes(3) == 12
    assert codec_spec("16-bit", 4).row_bytes(3) == 6
    assert CodecSpec("x", 3).row_bytes(3) == 2
    assert CodecSpec("x", 4, block=2, scale_bits=16).row_bytes(5) == 7
    with pytest.raises(InvalidSetting, match="'zip'"):
        codec_spec("zip", 2)


# -------------------------------------------------------------------------------------------------- holding


def caches(model: PreTrainedModel) -> dict[str, Callable[[], Cache]]:
    return {
        "dynamic": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=24),
    }


def declared(geometry: Geometry, key_mode: KeyMode, codec: Codec, bases: Any, policies: list[Policy]) -> int:
    """Bytes a sequence of tokens takes, by the sizes that the codec declares."""
    size = 0
    for layer, policy in zip(bases, policies, strict=True):
        for basis in (layer.key, layer.value):
            size += policy.held(TOKENS) * basis.groups * codec.row_bytes(basis.rank)
    if key_mode == "pre":
        shared = {policies[i] for i in range(geometry.layers) if geometry.uses_rope(i)}
        size += sum(4 * policy.held(TOKENS) for policy in shared)
    return size


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("key_mode", KEY_MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])  # without windows, and with
@torch.no_grad()
def test_a_live_cache_holds_the_bytes_that_its_codec_declares(
    name: str, codec: str, dtype: torch.dtype, key_mode: KeyMode, kind: str
) -> None:
    model: Any = tiny_model(name).to(dtype)  # type: ignore[arg-type]
    cache = caches(model)[kind]()
    geometry = geometry_of(model.config)
    bases = tiny_bases(geometry, "pair", codec)
    policies = [Policy.of(layer) for layer in cache.layers]
    with tiny_seam(model, key_mode, bases):
        for part in tiny_tokens(BATCH, TOKENS).split([9, 7, 1], dim=1):
            model(part, past_key_values=cache, use_cache=True)
    expected = declared(geometry, key_mode, codec_of(codec, dtype), bases, policies)
    assert orthokv.cache_bytes(cache) == BATCH * expected
    if kind == "dynamic":
        spec = codec_spec(codec, dtype.itemsize)
        plan = [
            LayerPlan(*(SidePlan(basis.rank, basis.groups, spec) for basis in (layer.key, layer.value)))
            for layer in bases
        ]
        assert Footprint(geometry, key_mode).cache_bytes(plan, TOKENS) == expected


def test_a_policy_knows_how_many_tokens_there_is_room_for() -> None:
    assert [Policy().held(n) for n in (0, 5, 30)] == [0, 5, 30]
    assert [Policy(window=SLIDING_WINDOW).held(n) for n in (5, 11, 30)] == [5, 11, 11]
    assert [Policy(capacity=24).held(n) for n in (0, 5, 30)] == [24, 24, 24]
    for policy in (Policy(), Policy(window=12), Policy(capacity=24), Policy(window=12, capacity=12)):
        assert Policy.of(policy.layer()) == policy


# --------------------------------------------------------------------------------------- several tokens a row


@pytest.fixture
def blocked(blocks: None) -> Iterator[PreTrainedModel]:
    model = tiny_model("llama")
    with tiny_seam(model, "pre") as seam:
        for i, layer in enumerate(tiny_bases(seam.geometry, codec="blocks", share=0.8)):
            seam.set_bases(i, layer)
        yield model


@torch.no_grad()
def fill(model: Any, cache: Cache, ids: Tensor, *sizes: int) -> Tensor:
    parts = ids.split(list(sizes), dim=1)
    return torch.cat([model(part, past_key_values=cache, use_cache=True).logits for part in parts], dim=1)


def test_tokens_wait_until_they_fill_a_block(blocked: PreTrainedModel) -> None:
    cache, ids = DynamicCache(config=blocked.config), tiny_tokens(BATCH, 20)
    sizes = []
    for n in range(1, 10):
        fill(blocked, cache, ids[:, n - 1 : n], 1)
        layer: Any = cache.layers[0]
        assert cache.get_seq_length() == n
        packed = 0 if layer.stock.packed is None else layer.stock.packed[0].shape[-2]
        assert (packed, layer.keys.shape[-2]) == divmod(n, 4)
        sizes.append(orthokv.cache_bytes(cache) // BATCH - 4 * n)  # without positions
    layers = tiny_bases(geometry_of(blocked.config), share=0.8)
    numbers = sum(b.latents_per_token for layer in layers for b in (layer.key, layer.value))
    assert sizes == [n // 4 * 6 * numbers + n % 4 * 2 * numbers for n in range(1, 10)]


def test_a_cache_of_blocks_gives_about_what_the_latents_give(blocked: PreTrainedModel) -> None:
    ids = tiny_tokens(BATCH, 13)
    found = fill(blocked, DynamicCache(config=blocked.config), ids, 6, 1, 1, 5)
    with torch.no_grad():
        uncached = blocked(ids, use_cache=False).logits
        seam = seam_of(blocked)
        assert seam is not None
        for i, layer in enumerate(tiny_bases(seam.geometry, share=0.8)):
            seam.set_bases(i, layer)
        exact = blocked(ids, use_cache=False).logits
    for logits in (found, uncached):
        assert 0 < float((logits - exact).norm() / exact.norm()) < 0.05


def test_sequences_of_blocks_change_places_and_are_copied(blocked: PreTrainedModel) -> None:
    ids, order = tiny_tokens(3, 11), torch.tensor([2, 0])
    for change, argument, rows in (
        ("reorder_cache", order, order),
        ("batch_select_indices", order, order),
        ("batch_repeat_interleave", 2, torch.tensor([0, 0, 1, 1, 2, 2])),
    ):
        cache, other = DynamicCache(config=blocked.config), DynamicCache(config=blocked.config)
        fill(blocked, cache, ids[:, :10], 10)
        cache = copy.deepcopy(cache)
        getattr(cache, change)(argument)
        found = fill(blocked, cache, ids[rows, 10:], 1)
        assert torch.allclose(found, fill(blocked, other, ids[rows], 10, 1)[:, 10:], atol=1e-5)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert orthokv.cache_bytes(cache) == 0


def test_tokens_are_taken_back_where_no_block_is_cut(blocked: PreTrainedModel) -> None:
    ids = tiny_tokens(1, 11)
    for removed, left in ((2, 9), (3, 8), (7, 4), (11, 0)):
        cache, other = DynamicCache(config=blocked.config), DynamicCache(config=blocked.config)
        fill(blocked, cache, ids, 11)
        cache.crop(-removed)
        assert cache.get_seq_length() == left
        if left:
            fill(blocked, other, ids[:, :left], left)
        assert orthokv.cache_bytes(cache) == orthokv.cache_bytes(other)
        more = tiny_tokens(1, 5, seed=1)
        assert torch.allclose(fill(blocked, cache, more, 5), fill(blocked, other, more, 5), atol=1e-5)


def test_what_would_cut_a_block_is_refused_in_a_sentence(blocks: None) -> None:
    model, ids = tiny_model("llama"), tiny_tokens(1, 11)
    with tiny_seam(model, "post", tiny_bases(geometry_of(model.config), codec="blocks")):
        cache: Any = DynamicCache(config=model.config)
        fill(model, cache, ids, 11)
        assert not cache.is_croppable
        size = orthokv.cache_bytes(cache)
        with pytest.raises(
            InvalidSetting, match="taking back 5 tokens would cut inside a packed block of 4 tokens"
        ):
            cache.crop(-5)
        assert (cache.get_seq_length(), orthokv.cache_bytes(cache)) == (11, size)
        with pytest.raises(InvalidSetting, match="of a fixed length would cut inside a packed block of 4"):
            fill(model, StaticCache(config=model.config, max_cache_len=16), ids, 11)
    model = tiny_model("mistral")
    with (
        tiny_seam(model, "post", tiny_bases(geometry_of(model.config), codec="blocks")),
        pytest.raises(InvalidSetting, match=r"a window .* would cut inside a packed block of 4"),
    ):
        fill(model, DynamicCache(config=model.config), ids, 11)
