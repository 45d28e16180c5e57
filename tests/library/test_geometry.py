"""A geometry read from `config.json` alone is the one that transformers' configuration has."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.utils import logging

from orthokv.models.architectures import ARCHITECTURES
from orthokv.models.geometry import geometry_of
from orthokv.spec.architectures import MODEL_TYPES
from orthokv.spec.config import MOST_LAYERS, geometry_from_config
from orthokv.spec.errors import InvalidModel, OrthoKVError, UnsupportedModel
from orthokv.spec.geometry import Geometry
from tests.support.tiny import VARIANTS, tiny_config

_LLAMA2: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
_LLAMA31: dict[str, Any] = {
    **_LLAMA2,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
_QWEN25: dict[str, Any] = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "torch_dtype": "bfloat16",
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
_MISTRAL: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}
_GEMMA2: dict[str, Any] = {
    "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 256000,
}
_GEMMA3: dict[str, Any] = {
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "max_position_embeddings": 131072,
    "model_type": "gemma3_text",
    "num_attention_heads": 8,
    "num_hidden_layers": 34,
    "num_key_value_heads": 4,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "rope_theta": 1000000.0,
    "sliding_window": 1024,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "vocab_size": 262144,
}
_PHI3: dict[str, Any] = {
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "model_type": "phi3",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "rope_scaling": {"long_factor": [1.25] * 48, "short_factor": [1.05] * 48, "type": "longrope"},
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "torch_dtype": "bfloat16",
    "vocab_size": 32064,
}
_PYTHIA: dict[str, Any] = {
    "architectures": ["GPTNeoXForCausalLM"],
    "hidden_act": "gelu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neox",
    "num_attention_heads": 8,
    "num_hidden_layers": 16,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_parallel_residual": True,
    "vocab_size": 50304,
}
_OPT: dict[str, Any] = {
    "activation_function": "relu",
    "do_layer_norm_before": True,
    "ffn_dim": 3072,
    "hidden_size": 768,
    "max_position_embeddings": 2048,
    "model_type": "opt",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "prefix": "</s>",
    "torch_dtype": "float16",
    "vocab_size": 50272,
    "word_embed_proj_dim": 768,
}
_MPT: dict[str, Any] = {
    "attn_config": {
        "alibi": True,
        "alibi_bias_max": 8,
        "attn_impl": "torch",
        "attn_pdrop": 0,
        "attn_type": "multihead_attention",
        "attn_uses_sequence_id": False,
        "clip_qkv": None,
        "prefix_lm": False,
        "qk_ln": False,
        "softmax_scale": None,
    },
    "d_model": 4096,
    "expansion_ratio": 4,
    "max_seq_len": 2048,
    "model_type": "mpt",
    "n_heads": 32,
    "n_layers": 32,
    "no_bias": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 50432,
}
_GPT_OSS: dict[str, Any] = {
    "head_dim": 64,
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "sliding_window": 128,
    "vocab_size": 201088,
}


def without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    assert config.keys() >= set(names)
    return {name: value for name, value in config.items() if name not in names}


# As released, with the fields that such files had and those that they left out.
RELEASED: dict[str, dict[str, Any]] = {
    "llama2": _LLAMA2,
    "llama1": without(_LLAMA2, "num_key_value_heads", "rope_scaling"),
    "llama, stretched": {**_LLAMA2, "rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 10000},
    "llama, dynamic": {**_LLAMA2, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "llama, partial": {**_LLAMA2, "partial_rotary_factor": 0.5},
    "llama3.1": _LLAMA31,
    "llama3.1, both forms": {**_LLAMA31, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
    "qwen2.5": _QWEN25,
    "qwen2.5, long": {
        **_QWEN25,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    },
    "qwen2.5, windows": {**_QWEN25, "use_sliding_window": True, "max_window_layers": 20},
    "qwen3": {**_QWEN25, "model_type": "qwen3", "num_attention_heads": 32},
    "qwen3_moe": {**_QWEN25, "model_type": "qwen3_moe", "use_sliding_window": True, "num_experts": 128},
    "mistral 0.1": _MISTRAL,
    "mistral 0.2": {**_MISTRAL, "sliding_window": None, "rope_theta": 1000000.0},
    "mistral, least": without(_MISTRAL, "rope_theta", "sliding_window", "num_key_value_heads"),
    "mixtral": {**_MISTRAL, "model_type": "mixtral", "sliding_window": None, "num_local_experts": 8},
    "starcoder2": {**_MISTRAL, "model_type": "starcoder2", "num_key_value_heads": 4},
    "gemma2": _GEMMA2,
    "gemma2, least": without(_GEMMA2, "head_dim", "sliding_window", "rope_theta"),
    "gemma3": _GEMMA3,
    "gemma3, least": without(
        _GEMMA3, "rope_scaling", "rope_theta", "rope_local_base_freq", "sliding_window_pattern", "head_dim"
    ),
    "phi3": _PHI3,
    "phi3, short": {**without(_PHI3, "rope_scaling"), "max_position_embeddings": 4096, "sliding_window": 2047},
    "phi4-mini": {**_PHI3, "partial_rotary_factor": 0.75, "rope_scaling": {
        "long_factor": [1] * 36, "short_factor": [1.0] * 36, "type": "longrope"}},
    "phi2": {"model_type": "phi", "hidden_size": 2560, "num_hidden_layers": 32, "partial_rotary_factor": 0.4},
    "stablelm": {"model_type": "stablelm", "num_key_value_heads": 32, "rope_theta": 10000},
    "glm4": {"model_type": "glm4", "num_key_value_heads": 2, "attention_bias": True, "head_dim": 128},
    "command-r": {"model_type": "cohere", "num_attention_heads": 64, "rope_theta": 8000000.0},
    "command-r7b": {
        "model_type": "cohere2",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "hidden_size": 4096,
        "order_of_interleaved_layers": "local_attn_first",
        "rope_theta": 50000,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
    },
    "smollm3": {"model_type": "smollm3", "no_rope_layer_interval": 4, "rope_theta": 5000000.0},
    "smollm3, windows": {"model_type": "smollm3", "use_sliding_window": True, "sliding_window": 64},
    "pythia": _PYTHIA,
    "pythia, least": without(_PYTHIA, "rotary_emb_base", "rotary_pct"),
    "opt": _OPT,
    "mpt": _MPT,
    "gpt-oss": _GPT_OSS,
    "gpt-oss, least": {"model_type": "gpt_oss"},
    "earlier names of layers": {**_GPT_OSS, "layer_types": ["attention"] * 24},
}  # fmt: skip


def by_transformers(folder: Path, config: dict[str, Any]) -> Geometry:
    (folder / "config.json").write_text(json.dumps(config))
    return geometry_of(AutoConfig.from_pretrained(folder))


def test_facts_and_places_are_of_the_same_architectures() -> None:
    assert list(MODEL_TYPES) == list(ARCHITECTURES)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_saved_configuration_is_read_as_transformers_has_it(name: str, tmp_path: Path) -> None:
    config = tiny_config(name)
    config.save_pretrained(tmp_path)
    found = geometry_from_config(json.loads((tmp_path / "config.json").read_text()))
    assert found == geometry_of(config)


@pytest.mark.parametrize("name", MODEL_TYPES)
def test_every_field_may_be_left_out(name: str, tmp_path: Path) -> None:
    least = {"model_type": name}
    assert geometry_from_config(least) == by_transformers(tmp_path, least)


@pytest.mark.parametrize("name", RELEASED)
def test_released_files_are_read_as_transformers_reads_them(name: str, tmp_path: Path) -> None:
    config = RELEASED[name]
    before = copy.deepcopy(config)
    assert geometry_from_config(config) == by_transformers(tmp_path, config)
    assert config == before


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "deepseek_v3", "kv_lora_rank": 512}, "latents already"),
        ({"model_type": "qwen3_next", "full_attention_interval": 4}, "linear-attention"),
        ({"model_type": "lfm2", "layer_types": ["conv", "full_attention"]}, "linear-attention"),
        ({"model_type": "rwkv"}, "linear-attention"),
        ({**_LLAMA2, "layer_types": ["linear_attention"] * 32}, "linear-attention"),
        ({"model_type": "gemma3", "text_config": _GEMMA3}, "text model alone"),
        ({"model_type": "qwen2_5_omni", "thinker_config": {"text_config": _QWEN25}}, "text model alone"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "text model alone"),
        ({**_LLAMA2, "text_config": _LLAMA2}, "text model alone"),
        ({"model_type": "falcon"}, "computes attention itself"),
        ({"model_type": "gpt2"}, "supported are cohere"),
        ({**_MISTRAL, "layer_types": ["sliding_attention"] * 32}, "'ministral' .* supported are cohere"),
    ],
)
def test_what_is_not_supported_is_refused_with_the_reason(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"is not supported: .*{reason}|{reason}"):
        geometry_from_config(config)


def refusable() -> list[str]:
    return [name for name in CONFIG_MAPPING if name not in MODEL_TYPES]


def test_the_library_refuses_in_the_same_words() -> None:
    """Of every other model type that transformers can make a configuration of."""
    compared = 0
    for name in refusable():
        try:
            config = CONFIG_MAPPING[name]()
        except Exception:  # wrappers that cannot be made of nothing
            continue
        with pytest.raises(UnsupportedModel) as ours:
            geometry_from_config({**config.to_dict(), "model_type": config.model_type})
        with pytest.raises(UnsupportedModel) as theirs:
            geometry_of(config)
        assert str(ours.value) == str(theirs.value)
        compared += 1
    assert compared > 500


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": None}, "model_type must be a word, not None"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a whole number from 1 to [0-9]+, not 0"),
        ({"num_attention_heads": "32"}, "num_attention_heads must be .*, not '32'"),
        ({"num_attention_heads": 32.0}, "num_attention_heads must be .*, not 32.0"),
        ({"num_attention_heads": True}, "num_attention_heads must be .*, not True"),
        ({"num_hidden_layers": 10**7}, f"num_hidden_layers must be .* to {MOST_LAYERS}, not 10000000"),
        ({"hidden_size": 10**4000}, "hidden_size must be .*, not a number of more than 64 bits"),
        ({"hidden_size": 8}, "head_dim must be .*, not 0"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be .*, not 0"),
        ({"sliding_window": -1}, "sliding_window must be .*, not -1"),
        ({"layer_types": ["full_attention"]}, "layer_types must be a list of 32 types"),
        ({"layer_types": ["foo"] * 32}, "an entry of layer_types must be .*, not 'foo'"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object, not 'linear'"),
        ({"rope_theta": "10000"}, "rope_parameters.rope_theta must be a number above 0, not '10000'"),
        ({"rope_theta": float("nan")}, "rope_theta must be a number above 0, not nan"),
        ({"rope_scaling": {"type": 5}}, "rope_parameters.rope_type must be a word, not 5"),
        ({"rope_scaling": {"factor": [[1]]}}, "rope_parameters.factor must be .*, not a list"),
    ],
)
def test_a_field_that_cannot_be_is_refused_in_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidModel, match=rf"^config\.json: .*{sentence}") as refused:
        geometry_from_config({**_LLAMA2, **changes})
    assert len(str(refused.value)) < 200


def test_heads_that_do_not_divide_are_refused_by_both_readings(tmp_path: Path) -> None:
    config = {**_LLAMA2, "num_key_value_heads": 5}
    for read in (geometry_from_config, lambda given: by_transformers(tmp_path, given)):
        with pytest.raises(UnsupportedModel, match="32 query heads do not divide into 5 KV heads"):
            read(config)


@lru_cache
def written(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(json.dumps(tiny_config(name).to_diff_dict()))
    return {**config, "model_type": name.split("+")[0]}


_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 70),
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.sampled_from(["", "linear", "yarn", "longrope", "sliding_attention", "full_attention", "12"]),
)
_FIELDS = st.sampled_from(
    ["rope_theta", "rope_type", "type", "factor", "full_attention", "sliding_attention", "short_factor"]
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_FIELDS, inner, max_size=4),
    max_leaves=6,
)
_READ = [
    "model_type", "num_hidden_layers", "n_layers", "num_attention_heads", "n_heads", "hidden_size", "d_model",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "max_seq_len", "sliding_window", "layer_types",
    "use_sliding_window", "max_window_layers", "sliding_window_pattern", "no_rope_layers", "no_rope_layer_interval",
    "attention_chunk_size", "rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq",
    "rotary_emb_base", "rotary_pct", "partial_rotary_factor", "original_max_position_embeddings",
    "use_bidirectional_attention", "text_config", "kv_lora_rank", "per_layer_config",
]  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn) -> dict[str, Any]:
    """A file with fields missing, and with others that hold anything."""
    config: dict[str, Any] = copy.deepcopy(
        draw(st.one_of(st.sampled_from(VARIANTS).map(written), st.sampled_from([*RELEASED.values()])))
    )
    for name in draw(st.lists(st.sampled_from(sorted(config)), max_size=4)):
        config.pop(name, None)
    for name in draw(st.lists(st.sampled_from(_READ), max_size=3)):
        config[name] = draw(_VALUES)
    return config


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(damaged())
def test_nothing_but_a_refusal_comes_of_a_damaged_file(config: dict[str, Any]) -> None:
    """And what transformers and the library take is the same geometry."""
    try:
        found = geometry_from_config(config)
    except OrthoKVError:
        return
    logging.set_verbosity_error()
    try:
        parsed = {name: value for name, value in copy.deepcopy(config).items() if name != "model_type"}
        expected = geometry_of(CONFIG_MAPPING[config["model_type"]](**parsed))
    except Exception:  # transformers checks more than the geometry
        return
    assert json.dumps(found.to_dict(), sort_keys=True) == json.dumps(expected.to_dict(), sort_keys=True)


def test_words_load_no_library_and_at_once() -> None:
    code = (
        "import sys, time; began = time.perf_counter(); import orthokv.spec, orthokv.spec.config;"
        "seconds = time.perf_counter() - began;"
        "print(seconds, *({'torch', 'transformers', 'numpy', 'safetensors', 'pydantic'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, *loaded = answer.stdout.split()
    assert loaded == []
    assert float(seconds) < 0.5, f"{seconds} s"
