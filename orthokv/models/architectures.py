"""The registry: which model types of `transformers` are supported, and where each keeps what the library needs.

A wrong guess about where rotary embedding, scaling or the output projection sits changes logits silently, so nothing is
guessed: a model type has an entry in `ARCHITECTURES`, proven by every test of `tests/library/test_invariants.py`, or is
refused with the reason. What its configuration means stands in `orthokv.spec.architectures`, under the same name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from orthokv.models.mpt import mpt_attention
from orthokv.models.rotary import PLAIN, Rotation
from orthokv.spec.architectures import unsupported


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
        rotary: path of the module that makes the rotary tables, where keys carry rotary embedding.
        rotation: how its rotary embedding is written.
        cache_argument: what the attention module calls its cache.
        forward: replaces the forward of an attention module that does not call the attention interface.
    """

    models: str
    special: str = ""
    layers: str = "model.layers"
    attention: str = "self_attn"
    output: str = "o_proj"
    projections: tuple[str, ...] = ("k_proj", "v_proj")
    rotary: str = "model.rotary_emb"
    rotation: Rotation = PLAIN
    cache_argument: str = "past_key_values"
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
        cache_argument="layer_past",
    ),
    "opt": Architecture(
        "OPT",
        "learned positions, no grouped heads",
        layers="model.decoder.layers",
        output="out_proj",
    ),
    "mpt": Architecture(
        "MPT",
        "ALiBi, fused qkv, a forward of ours",
        layers="transformer.blocks",
        attention="attn",
        output="out_proj",
        projections=("Wqkv",),
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
)


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """The entry of `ARCHITECTURES` for a configuration.

    Raises:
        UnsupportedModel: see `orthokv.spec.architectures.model_type_of`.
    """
    architecture = ARCHITECTURES.get(str(config.model_type))
    if architecture is None:
        raise unsupported(config.to_dict())
    return architecture


def use_own_forward(architecture: Architecture, module: nn.Module) -> None:
    """Exchange the forward of an attention module where the architecture has one of ours."""
    if architecture.forward is not None:
        object.__setattr__(module, "forward", architecture.forward.__get__(module))


def restore_forward(architecture: Architecture, module: nn.Module) -> None:
    """Undo `use_own_forward`."""
    if architecture.forward is not None:
        object.__delattr__(module, "forward")
