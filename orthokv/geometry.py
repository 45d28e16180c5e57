"""What a model's attention looks like: read once, checked at every load.

Only architectures in :data:`ARCHITECTURES` are accepted, because a wrong guess about where rotary embedding, scaling or
the output projection sits changes logits silently. Everything else is refused by name.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from orthokv.errors import UnsupportedModel


@dataclass(frozen=True)
class Architecture:
    """Where one model type of ``transformers`` keeps the parts that the library needs (dotted paths).

    ``rotary`` is None where keys carry no rotary embedding: before and after RoPE are then the same.
    """

    layers: str
    attention: str
    output: str
    key: str
    value: str
    rotary: str | None


_LLAMA = Architecture(
    layers="model.layers",
    attention="self_attn",
    output="o_proj",
    key="k_proj",
    value="v_proj",
    rotary="model.rotary_emb",
)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "opt": Architecture(
        layers="model.decoder.layers",
        attention="self_attn",
        output="out_proj",
        key="k_proj",
        value="v_proj",
        rotary=None,
    ),
}

# Rotary types whose tables depend on nothing but the position. Dynamic and long variants change the tables with the
# sequence length, so keys rebuilt later would be rotated by other angles than the stock model used.
STATIC_ROPE = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class AttentionGeometry:
    """Shape of a decoder's attention.

    ``rope_hash`` identifies the rotary parameters: bases fitted under one rotary embedding are wrong under another.
    """

    model_type: str
    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    rope: dict[str, Any] | None
    rope_hash: str

    @property
    def kv_width(self) -> int:
        """Numbers that one token adds to the keys (or to the values) of one layer."""
        return self.kv_heads * self.head_dim

    @property
    def dense_bytes_per_token(self) -> int:
        """Bytes that one token adds to the uncompressed 16-bit cache of the whole model."""
        return self.layers * 2 * self.kv_width * 2

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> AttentionGeometry:
        """Read the geometry of a model configuration.

        Raises:
            UnsupportedModel: the model type is not in :data:`ARCHITECTURES`, or its layers are not uniform.
        """
        architecture = architecture_of(config)
        heads = int(config.num_attention_heads)
        kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
        head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        if heads % kv_heads:
            raise UnsupportedModel(f"{heads} query heads do not divide into {kv_heads} KV heads")
        rope: dict[str, Any] | None = None
        if architecture.rotary is not None:
            rope = json.loads(json.dumps(getattr(config, "rope_parameters", None) or {}, sort_keys=True))
        return cls(
            model_type=str(config.model_type),
            layers=int(config.num_hidden_layers),
            hidden_size=int(config.hidden_size),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            max_positions=int(config.max_position_embeddings),
            rope=rope,
            rope_hash=hashlib.sha256(json.dumps(rope, sort_keys=True).encode()).hexdigest(),
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> AttentionGeometry:
        """The reverse of :meth:`to_dict`; TypeError for a missing, unknown or wrongly typed field."""
        geometry = cls(**data)
        for name in ("layers", "hidden_size", "heads", "kv_heads", "head_dim", "max_positions"):
            value = getattr(geometry, name)
            if type(value) is not int or value < 1:
                raise TypeError(f"geometry.{name} is {value!r}")
        return geometry


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """The entry of :data:`ARCHITECTURES` for a configuration, or :class:`UnsupportedModel` naming its model type."""
    architecture = ARCHITECTURES.get(str(config.model_type))
    if architecture is None:
        supported = ", ".join(sorted(ARCHITECTURES))
        raise UnsupportedModel(
            f"architecture {str(config.model_type)!r} is not supported (supported: {supported})"
        )
    return architecture


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The model's decoder layers, in order."""
    path = architecture_of(model.config).layers
    try:
        layers = model.get_submodule(path)
    except AttributeError:
        kind = type(model).__name__
        raise UnsupportedModel(f"{kind} has no {path}: load the model with AutoModelForCausalLM") from None
    assert isinstance(layers, nn.ModuleList)
    return layers


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The self-attention module of every decoder layer, in order."""
    name = architecture_of(model.config).attention
    return [layer.get_submodule(name) for layer in decoder_layers(model)]


def rotary_module(model: PreTrainedModel) -> nn.Module | None:
    """The module that makes the rotary tables, or None where the architecture has none."""
    path = architecture_of(model.config).rotary
    return None if path is None else model.get_submodule(path)


def check_key_mode(geometry: AttentionGeometry, key_mode: str) -> None:
    """Refuse a key mode that the model's rotary embedding cannot serve exactly."""
    rope_type = (geometry.rope or {}).get("rope_type", "default")
    if key_mode == "pre" and geometry.rope is not None and rope_type not in STATIC_ROPE:
        raise UnsupportedModel(
            f"key mode 'pre' needs rotary tables that do not change with the length; "
            f"this model's rope_type is {rope_type!r} (use key mode 'post')"
        )
