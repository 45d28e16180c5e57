"""A model's geometry from its `config.json`, by Python alone: no torch, no transformers.

It is what `orthokv.models.geometry.geometry_of` reads off the configuration that transformers makes of the same file; of any
age, with fields left out as in the releases.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from orthokv.spec.architectures import CHUNKED, FULL, SLIDING, ModelType, model_type_of
from orthokv.spec.errors import UnsupportedModel
from orthokv.spec.fields import MOST, invalid, optional, whole
from orthokv.spec.geometry import Geometry
from orthokv.spec.rope import rope_parameters

# No model has nearly so many; lists of layers are as long as a file says.
MOST_LAYERS = 1_000
# What layers were called before.
_EARLIER_TYPES = {"attention": FULL}


def geometry_from_config(config: Mapping[str, Any]) -> Geometry:
    """The geometry that a parsed `config.json` tells.

    Raises:
        UnsupportedModel: see `orthokv.spec.architectures.model_type_of`; or the KV heads do not divide the query heads.
        InvalidModel: a field is not what it has to be.
    """
    name = config.get("model_type")
    if not isinstance(name, str):
        raise invalid("model_type", "a word", name)
    if name == "mistral" and "layer_types" in config:
        # What transformers takes such a file for.
        config = {**config, "model_type": "ministral"}
    kind = model_type_of(config)
    layers = _field(kind, config, "num_hidden_layers", kind.layers, most=MOST_LAYERS)
    heads = _field(kind, config, "num_attention_heads", kind.heads)
    hidden_size = _field(kind, config, "hidden_size", kind.hidden_size)
    longest = kind.name("max_position_embeddings")
    max_positions = whole(longest, config.get(longest, kind.max_positions))
    kv_heads = optional(config, "num_key_value_heads", kind.kv_heads) if kind.grouped_heads else None
    head_dim = optional(config, "head_dim", kind.head_dim)
    no_rope_layers = _no_rope_layers(config, layers) if kind.rotates == "listed" else None
    window = _window(kind, config)
    types = _layer_types(kind, config, layers, window, no_rope_layers)
    spans = {SLIDING: window, CHUNKED: optional(config, "attention_chunk_size", None)}
    return build_geometry(
        name,
        layers=layers,
        heads=heads,
        hidden_size=hidden_size,
        kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=hidden_size // heads if head_dim is None else head_dim,
        max_positions=max_positions,
        rope=rope_parameters(kind, config, types, max_positions) if kind.rotary else None,
        windows=[spans.get(layer) for layer in types],
        rotated=kind.rotated(types, no_rope_layers),
    )


def build_geometry(
    model_type: str,
    *,
    rope: dict[str, Any] | None,
    windows: Sequence[int | None],
    rotated: Sequence[bool],
    **sizes: int,
) -> Geometry:
    """A geometry of what was read, by whichever way, checked.

    Raises:
        UnsupportedModel: the KV heads do not divide the query heads.
        InvalidModel: a size is not a number that it can be.
    """
    for name, size in sizes.items():
        whole(name, size, MOST_LAYERS if name == "layers" else MOST)
    for window in windows:
        if window is not None:
            whole("sliding_window", window)
    if sizes["heads"] % sizes["kv_heads"]:
        raise UnsupportedModel(
            f"{sizes['heads']} query heads do not divide into {sizes['kv_heads']} KV heads"
        )
    return Geometry(
        model_type=model_type,
        rope=rope,
        rope_hash=hashlib.sha256(json.dumps(rope, sort_keys=True).encode()).hexdigest(),
        windows=tuple(windows) if any(windows) else None,
        rotated=tuple(rotated) if len(set(rotated)) > 1 else None,
        **sizes,
    )


def _layer_types(
    kind: ModelType,
    config: Mapping[str, Any],
    layers: int,
    window: int | None,
    no_rope_layers: Sequence[int] | None,
) -> list[str]:
    """What each layer sees: as listed, or by the rule of a model type that lists none."""
    listed = config.get("layer_types")
    if listed is not None:
        return _listed_types(listed, layers)
    if kind.full_every is not None:
        every = kind.full_every
        if kind.pattern_named:
            every = whole("sliding_window_pattern", config.get("sliding_window_pattern", every))
        return [FULL if (layer + 1) % every == 0 else SLIDING for layer in range(layers)]
    if kind.windows_from is not None:
        first = whole("max_window_layers", config.get("max_window_layers", kind.windows_from), least=0)
        return [FULL if window is None or layer < first else SLIDING for layer in range(layers)]
    if kind.windows_without_rope:
        windows = window is not None and _switched_on(config)
        return [SLIDING if windows and not rotated else FULL for rotated in no_rope_layers or ()]
    if window is not None:
        return [SLIDING] * layers
    return [FULL if config.get("attention_chunk_size") is None else CHUNKED] * layers


def _listed_types(listed: object, layers: int) -> list[str]:
    if not isinstance(listed, list) or len(listed) != layers:
        raise invalid("layer_types", f"a list of {layers} types, one a layer", listed)
    types = [_EARLIER_TYPES.get(kind, kind) if isinstance(kind, str) else kind for kind in listed]
    for kind in types:
        if kind not in (SLIDING, CHUNKED, FULL):
            raise invalid("an entry of layer_types", f"{SLIDING}, {CHUNKED} or {FULL}", kind)
    return types


def _no_rope_layers(config: Mapping[str, Any], layers: int) -> list[int]:
    """For each layer 1 where it uses rotary embedding, and 0 where it does not."""
    listed = config.get("no_rope_layers")
    if listed is None:
        every = whole("no_rope_layer_interval", config.get("no_rope_layer_interval", 4))
        return [int((layer + 1) % every != 0) for layer in range(layers)]
    if not isinstance(listed, list) or len(listed) != layers or any(type(mark) is not int for mark in listed):
        raise invalid("no_rope_layers", f"a list of {layers} numbers, one a layer", listed)
    return listed


def _window(kind: ModelType, config: Mapping[str, Any]) -> int | None:
    window = optional(config, "sliding_window", kind.sliding_window)
    return window if not kind.window_switch or _switched_on(config) else None


def _switched_on(config: Mapping[str, Any]) -> bool:
    switch = config.get("use_sliding_window", False)
    if not isinstance(switch, bool):
        raise invalid("use_sliding_window", "true or false", switch)
    return switch


def _field(kind: ModelType, config: Mapping[str, Any], name: str, default: int, *, most: int = MOST) -> int:
    """A field under the name that all models share, or under the model's own."""
    used = name if name in config else kind.name(name)
    return whole(used, config.get(used, default), most)
