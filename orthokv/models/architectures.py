"""The registry: which model types of ``transformers`` are supported, and where each keeps what the library needs.

A wrong guess about where rotary embedding, scaling or the output projection sits changes logits silently, so nothing is
guessed: a model type has an entry in :data:`ARCHITECTURES`, proven by every test of ``tests/library/test_invariants.py``, or is
refused with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from orthokv.models.mpt import mpt_attention
from orthokv.models.rotary import PLAIN, Rotation
from orthokv.spec.errors import UnsupportedModel


def _every_layer(config: Any, layer: int) -> bool:
    return True


@dataclass(frozen=True)
class Architecture:
    """One model type. Paths are dotted, and relative to the model, the decoder layer or its attention module.

    Attributes:
        models: what is known under this type, for the support table.
        special: what sets its attention apart, for the support table.
        layers: path of the decoder layers in the model.
        attention: path of the attention module in a layer.
        output: path of the output projection in the attention module.
        projections: paths of the linear maps that make keys and values.
        rotary: path of the module that makes the rotary tables; None where keys carry no rotary embedding, so that keys
            before and after RoPE are the same.
        rotates: whether a layer uses the tables; some models have layers without any position.
        tables_by_layer_type: the rotary module makes other tables for each of ``config.layer_types``.
        rotation: how its rotary embedding is written.
        grouped_heads: several query heads may share a KV head; elsewhere the configuration's word on it means nothing.
        cache_argument: what the attention module calls its cache.
        max_positions: what the configuration calls the longest context.
        forward: replaces the forward of an attention module that does not call the attention interface.
    """

    models: str
    special: str = ""
    layers: str = "model.layers"
    attention: str = "self_attn"
    output: str = "o_proj"
    projections: tuple[str, ...] = ("k_proj", "v_proj")
    rotary: str | None = "model.rotary_emb"
    rotates: Callable[[Any, int], bool] = _every_layer
    tables_by_layer_type: bool = False
    rotation: Rotation = PLAIN
    grouped_heads: bool = True
    cache_argument: str = "past_key_values"
    max_positions: str = "max_position_embeddings"
    forward: Callable[..., Any] | None = None


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("Llama 2 and 3, and what shares their code"),
    "mistral": Architecture("Mistral", "sliding window"),
    "mixtral": Architecture("Mixtral", "mixture of experts"),
    "qwen2": Architecture("Qwen2, Qwen2.5", "biases on q, k and v"),
    "qwen3": Architecture("Qwen3", "q and k norms"),
    "qwen3_moe": Architecture("Qwen3-MoE", "mixture of experts, q and k norms"),
    "gemma2": Architecture("Gemma 2", "softcapped scores, every other layer a sliding window"),
    "gemma3_text": Architecture(
        "Gemma 3 (text)",
        "two rotary tables (local, global), sliding windows, q and k norms",
        tables_by_layer_type=True,
    ),
    "phi": Architecture("Phi-1, Phi-2", "partial rotary embedding, biases", output="dense"),
    "phi3": Architecture(
        "Phi-3, Phi-4", "fused qkv, partial rotary embedding, sliding window", projections=("qkv_proj",)
    ),
    "gpt_neox": Architecture(
        "GPT-NeoX, Pythia",
        "fused qkv, partial rotary embedding, no grouped heads",
        layers="gpt_neox.layers",
        attention="attention",
        output="dense",
        projections=("query_key_value",),
        rotary="gpt_neox.rotary_emb",
        grouped_heads=False,
        cache_argument="layer_past",
    ),
    "opt": Architecture(
        "OPT",
        "learned positions, no grouped heads",
        layers="model.decoder.layers",
        output="out_proj",
        rotary=None,
        grouped_heads=False,
    ),
    "mpt": Architecture(
        "MPT",
        "ALiBi, fused qkv, a forward of ours",
        layers="transformer.blocks",
        attention="attn",
        output="out_proj",
        projections=("Wqkv",),
        rotary=None,
        grouped_heads=False,
        max_positions="max_seq_len",
        forward=mpt_attention,
    ),
    "olmo2": Architecture("OLMo-2", "q and k norms over all heads together"),
    "cohere": Architecture(
        "Cohere Command-R",
        "interleaved rotary embedding, q and k norms",
        rotation=Rotation(interleaved=True, layout="pairs", in_float32=True),
    ),
    "granite": Architecture("Granite 3", "scores with a multiplier of their own"),
    "glm4": Architecture(
        "GLM-4-0414",
        "interleaved and partial rotary embedding, biases",
        rotation=Rotation(interleaved=True),
    ),
    "smollm3": Architecture(
        "SmolLM3",
        "layers without rotary embedding",
        rotates=lambda config, layer: bool(config.no_rope_layers[layer]),
    ),
    "stablelm": Architecture("StableLM", "partial rotary embedding, q and k norms for each head"),
    "starcoder2": Architecture("StarCoder2", "sliding window, biases"),
    "gpt_oss": Architecture(
        "gpt-oss", "attention sinks, sliding windows, mixture of experts", rotation=Rotation(layout="once")
    ),
}
ARCHITECTURES["cohere2"] = replace(
    ARCHITECTURES["cohere"],
    models="Cohere Command-R7B, Command-A",
    special="interleaved rotary embedding in sliding-window layers, none in the others",
    rotates=lambda config, layer: config.layer_types[layer] == "sliding_attention",
)

# Kinds of cache layers that hold a state instead of keys and values.
_RECURRENT_LAYERS = {"linear_attention", "conv", "hybrid", "hybrid_sliding"}
_RECURRENT_MODELS = {"mamba", "mamba2", "falcon_mamba", "rwkv", "recurrent_gemma", "xlstm"}
_RECURRENT_MODELS |= {"jamba", "bamba", "zamba", "zamba2", "nemotron_h", "falcon_h1", "granitemoehybrid"}
# Their attention modules call neither the attention interface nor a forward of ours.
_OWN_ATTENTION = {"bloom", "falcon"}


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """The entry of :data:`ARCHITECTURES` for a configuration.

    Raises:
        UnsupportedModel: there is none; the sentence names the model type and, where it is known, the reason.
    """
    architecture = ARCHITECTURES.get(str(config.model_type))
    if architecture is None:
        raise UnsupportedModel(f"architecture {str(config.model_type)!r} is not supported: {_reason(config)}")
    return architecture


def _reason(config: Any) -> str:
    if getattr(config, "kv_lora_rank", None):
        return "its cache holds latents already (MLA)"
    recurrent = _RECURRENT_LAYERS & set(getattr(config, "layer_types", None) or ())
    if recurrent or config.model_type in _RECURRENT_MODELS:
        return "its linear-attention layers keep a state, not keys and values"
    if config.get_text_config(decoder=True) is not config:
        return "it holds more than a language model; give the text model alone"
    if config.model_type in _OWN_ATTENTION:
        return "its attention module computes attention itself, where nothing can be put in between"
    return f"supported are {', '.join(sorted(ARCHITECTURES))}"


def use_own_forward(architecture: Architecture, module: nn.Module) -> None:
    """Exchange the forward of an attention module where the architecture has one of ours."""
    if architecture.forward is not None:
        object.__setattr__(module, "forward", architecture.forward.__get__(module))


def restore_forward(architecture: Architecture, module: nn.Module) -> None:
    """Undo :func:`use_own_forward`."""
    if architecture.forward is not None:
        object.__delattr__(module, "forward")
