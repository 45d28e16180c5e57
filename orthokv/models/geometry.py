"""A model's geometry, read from its configuration, where its layers are, and how each of them turns its keys."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from orthokv.models.architectures import architecture_of
from orthokv.models.rotary import Rotary
from orthokv.spec.errors import UnsupportedModel
from orthokv.spec.geometry import Geometry


def geometry_of(config: PreTrainedConfig) -> Geometry:
    """Read the geometry of a model configuration.

    Raises:
        UnsupportedModel: see :func:`~orthokv.models.architectures.architecture_of`; or a feature that no release has.
    """
    architecture = architecture_of(config)
    layers, heads = int(config.num_hidden_layers), int(config.num_attention_heads)
    grouped = getattr(config, "num_key_value_heads", None) if architecture.grouped_heads else None
    kv_heads = int(grouped or heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    if heads % kv_heads:
        raise UnsupportedModel(f"{heads} query heads do not divide into {kv_heads} KV heads")
    if getattr(config, "use_bidirectional_attention", None):
        raise UnsupportedModel(f"this {config.model_type} sees later tokens: it has no use for a cache")
    rope: dict[str, Any] | None = None
    if architecture.rotary is not None:
        rope = json.loads(json.dumps(getattr(config, "rope_parameters", None) or {}, sort_keys=True))
    rotated = tuple(rope is not None and architecture.rotates(config, i) for i in range(layers))
    # As the stock cache has them: it is what will hold the tokens.
    windows = tuple(getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers)
    return Geometry(
        model_type=str(config.model_type),
        layers=layers,
        hidden_size=int(config.hidden_size),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=int(getattr(config, architecture.max_positions)),
        rope=rope,
        rope_hash=hashlib.sha256(json.dumps(rope, sort_keys=True).encode()).hexdigest(),
        windows=windows if any(windows) else None,
        rotated=rotated if len(set(rotated)) > 1 else None,
    )


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


def layer_rotaries(model: PreTrainedModel, geometry: Geometry) -> list[Rotary | None]:
    """One for each layer; None where a layer uses no rotary embedding."""
    architecture = architecture_of(model.config)
    if architecture.rotary is None:
        return [None] * geometry.layers
    module = model.get_submodule(architecture.rotary)
    types = model.config.layer_types if architecture.tables_by_layer_type else None
    return [
        Rotary(architecture.rotation, module, () if types is None else (types[layer],))
        if geometry.uses_rope(layer)
        else None
        for layer in range(geometry.layers)
    ]
