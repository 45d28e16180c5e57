"""A model's geometry, read from its configuration, where its layers are, and how each of them turns its keys."""

from __future__ import annotations

import json
from typing import Any

from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from orthokv.models.architectures import architecture_of
from orthokv.models.rotary import Rotary
from orthokv.spec.architectures import FULL, MODEL_TYPES, model_type_of
from orthokv.spec.config import build_geometry
from orthokv.spec.errors import UnsupportedModel
from orthokv.spec.geometry import Geometry


def geometry_of(config: PreTrainedConfig) -> Geometry:
    """Read the geometry of a model configuration.

    `orthokv.spec.config.geometry_from_config` reads the same off the file.

    Raises:
        UnsupportedModel: see `orthokv.spec.architectures.model_type_of`; or the KV heads do not divide the query heads.
        InvalidModel: a size is not a number that it can be.
    """
    kind = model_type_of(config.to_dict())
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    grouped = getattr(config, "num_key_value_heads", None) if kind.grouped_heads else None
    head_dim = getattr(config, "head_dim", None)
    rope: dict[str, Any] | None = None
    if kind.rotary:
        rope = json.loads(json.dumps(getattr(config, "rope_parameters", None) or {}))
    listed = getattr(config, "layer_types", None) or [FULL] * layers
    return build_geometry(
        str(config.model_type),
        layers=layers,
        heads=heads,
        hidden_size=config.hidden_size,
        kv_heads=heads if grouped is None else grouped,
        head_dim=config.hidden_size // heads if head_dim is None else head_dim,
        max_positions=getattr(config, kind.name("max_position_embeddings")),
        rope=rope,
        # As the stock cache has them: it is what will hold the tokens.
        windows=[getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers],
        rotated=kind.rotated(listed, getattr(config, "no_rope_layers", None)),
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
    if geometry.rope is None:
        return [None] * geometry.layers
    architecture = architecture_of(model.config)
    module = model.get_submodule(architecture.rotary)
    types = model.config.layer_types if MODEL_TYPES[geometry.model_type].tables_by_layer_type else None
    return [
        Rotary(architecture.rotation, module, () if types is None else (types[layer],))
        if geometry.uses_rope(layer)
        else None
        for layer in range(geometry.layers)
    ]
