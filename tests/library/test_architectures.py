"""The registry, the geometry read with it, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, DynamicCache, PreTrainedModel

from orthokv.models.architectures import ARCHITECTURES, architecture_of
from orthokv.models.fingerprint import matches, weight_fingerprints
from orthokv.models.geometry import attention_modules, geometry_of
from orthokv.runtime.cache import cache_bytes
from orthokv.runtime.seam import Seam
from orthokv.spec.errors import UnsupportedModel
from orthokv.spec.footprint import Footprint, held_tokens
from orthokv.spec.geometry import Geometry, check_key_mode
from tests.support.tiny import LAYERS, SLIDING_WINDOW, VARIANTS, tiny_config, tiny_model, tiny_tokens


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("deepseek_v2", "latents already"),
        ("deepseek_v3", "latents already"),
        ("glm4_moe_lite", "latents already"),
        ("minicpm3", "latents already"),
        ("longcat_flash", "latents already"),
        ("qwen3_next", "linear-attention"),
        ("mamba", "linear-attention"),
        ("mamba2", "linear-attention"),
        ("jamba", "linear-attention"),
        ("rwkv", "linear-attention"),
        ("recurrent_gemma", "linear-attention"),
        ("gemma3", "text model alone"),
        ("bloom", "computes attention itself"),
        ("falcon", "computes attention itself"),
        ("gpt2", "supported are cohere"),
    ],
)
def test_what_is_not_supported_is_refused_by_name_with_the_reason(model_type: str, reason: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"'{model_type}' is not supported: .*{reason}"):
        geometry_of(CONFIG_MAPPING[model_type]())


def test_a_model_that_sees_later_tokens_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="sees later tokens"):
        geometry_of(tiny_config("gemma3_text", use_bidirectional_attention=True))


@pytest.mark.parametrize("name", VARIANTS)
def test_the_geometry_survives_json(name: str) -> None:
    geometry = geometry_of(tiny_config(name))
    assert Geometry.from_dict(geometry.to_dict()) == geometry


def test_a_geometry_written_before_windows_were_recorded_is_still_read() -> None:
    geometry = geometry_of(tiny_config("llama"))
    old = {k: v for k, v in geometry.to_dict().items() if k not in ("windows", "rotated")}
    assert Geometry.from_dict(old) == geometry


@pytest.mark.parametrize(
    "wrong",
    [{"windows": [12]}, {"windows": [12, None, -1]}, {"windows": [12, None, "3"]}, {"rotated": [True]}],
)
def test_a_geometry_with_wrong_layers_is_refused(wrong: dict[str, Any]) -> None:
    data = geometry_of(tiny_config("gemma2")).to_dict()
    with pytest.raises(TypeError, match=f"geometry.{next(iter(wrong))}"):
        Geometry.from_dict({**data, **wrong})


@pytest.mark.parametrize("tokens", [1, SLIDING_WINDOW - 1, SLIDING_WINDOW, 3 * SLIDING_WINDOW])
@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_windows_are_those_of_the_stock_cache(name: str, tokens: int) -> None:
    model = tiny_model(name)
    geometry = geometry_of(model.config)
    cache = DynamicCache(config=model.config)
    model(tiny_tokens(1, tokens), past_key_values=cache, use_cache=True)
    held = [held_tokens(geometry.window(layer), tokens) for layer in range(LAYERS)]
    assert [layer.keys.shape[-2] for layer in cache.layers] == held  # type: ignore[union-attr]
    assert cache_bytes(cache) == sum(held) * 2 * geometry.kv_width * 4


@pytest.mark.parametrize(
    ("name", "books"),
    [
        ("llama", 1),
        ("mistral", 1),
        ("gemma3_text", 2),
        ("smollm3", 1),
        ("cohere2", 1),
        ("opt", 0),
        ("mpt", 0),
    ],
)
def test_positions_are_kept_once_for_each_window_of_layers_that_rotate(name: str, books: int) -> None:
    geometry = geometry_of(tiny_config(name))
    assert Footprint(geometry, "pre").fixed() == 4 * books
    assert Footprint(geometry, "post").fixed() == 0


@pytest.mark.parametrize("name", ["llama+dynamic", "phi3+longrope"])
def test_tables_that_change_with_the_length_serve_keys_after_rope_only(name: str) -> None:
    geometry = geometry_of(tiny_config(name))
    with pytest.raises(UnsupportedModel, match=repr(name.split("+")[1])):
        check_key_mode(geometry, "pre")
    check_key_mode(geometry, "post")


def test_one_changing_table_of_two_is_enough_to_refuse() -> None:
    config = tiny_config("gemma3_text")
    config.rope_parameters["full_attention"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}
    with pytest.raises(UnsupportedModel, match="'dynamic'"):
        check_key_mode(geometry_of(config), "pre")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_fingerprint_tells_other_keys_or_values_apart(name: str) -> None:
    model = tiny_model(name)
    before = weight_fingerprints(model)
    assert matches(model, before)
    for projection in architecture_of(model.config).projections:
        weight = attention_modules(model)[-1].get_submodule(projection).weight
        assert isinstance(weight, torch.Tensor)
        weight[-1, -1] += 1
        assert matches(model, before) is False
        weight[-1, -1] -= 1


@pytest.mark.parametrize("key_mode", ["pre", "post"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_observed_keys_are_turned_in_key_mode_post_only(name: str, key_mode: Any) -> None:
    """Equal tokens have equal first-layer keys before RoPE, and other keys at each position after it."""
    keys = observed_keys(tiny_model(name), key_mode, layer=0)
    turned = key_mode == "post" and ARCHITECTURES[name].rotary is not None
    same = torch.allclose(keys[:, :, 3], keys[:, :, 9], atol=1e-5)
    assert same is not (turned or name == "opt")  # opt adds positions to the hidden states


@torch.no_grad()
def observed_keys(model: PreTrainedModel, key_mode: Any, layer: int) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    with Seam(model, key_mode) as seam:
        seam.observe(layer, lambda query, key, value: seen.append(key))
        model(torch.full((1, 12), 7), use_cache=False)
    return seen[0]
