"""Which model types are supported, and what their configurations mean: facts as data, without torch and transformers.

Where a supported model keeps its modules stands in `orthokv.models.architectures`, on top of these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from orthokv.spec.errors import UnsupportedModel

SLIDING, CHUNKED, FULL = "sliding_attention", "chunked_attention", "full_attention"


@dataclass(frozen=True)
class ModelType:
    """What a model type makes of its `config.json`.

    Attributes:
        layers, heads, hidden_size, max_positions: where the configuration leaves them out.
        kv_heads: likewise; None: as many as query heads.
        head_dim: likewise; None: `hidden_size // heads`.
        names: what the configuration calls the fields that others call by the keys.
        grouped_heads: several query heads may share a KV head; elsewhere the configuration's word on it means nothing.
        sliding_window: where the configuration leaves it out; None: all layers see all tokens.
        window_switch: the window counts only where `use_sliding_window` says so.
        full_every: of so many layers the last one sees all tokens and the others a window, where none are listed.
        pattern_named: the configuration may say `full_every` itself (`sliding_window_pattern`).
        windows_from: the first layer with a window (`max_window_layers`), where none are listed.
        windows_without_rope: layers without rotary embedding have the window, where none are listed.
        rotary: keys carry rotary embedding; elsewhere keys before and after RoPE are the same.
        rotates: which layers do: `all`, those that `no_rope_layers` marks with 1 (`listed`), those with a window (`windowed`).
        tables_by_layer_type: rotary parameters are held for each of `layer_types`.
        rope_theta: where the configuration leaves it out.
        local_theta: that of sliding layers, with tables for each type.
        partial_rotary_factor: where the configuration leaves it out; None: it is not recorded.
        rope: rotary parameters where the configuration has none at all.
        original_positions: `original_max_position_embeddings` is a field of its own, and this where it is left out.
        rope_aliases: earlier names of rotary types.
    """

    layers: int = 32
    heads: int = 32
    hidden_size: int = 4096
    max_positions: int = 2048
    kv_heads: int | None = None
    head_dim: int | None = None
    names: Mapping[str, str] | None = None
    grouped_heads: bool = True
    sliding_window: int | None = None
    window_switch: bool = False
    full_every: int | None = None
    pattern_named: bool = False
    windows_from: int | None = None
    windows_without_rope: bool = False
    rotary: bool = True
    rotates: Literal["all", "listed", "windowed"] = "all"
    tables_by_layer_type: bool = False
    rope_theta: float = 10_000.0
    local_theta: float = 10_000.0
    partial_rotary_factor: float | None = None
    rope: Mapping[str, Any] | None = None
    original_positions: int | None = None
    rope_aliases: Mapping[str, str] | None = None

    @property
    def lists_layer_types(self) -> bool:
        """Whether `layer_types` belongs to its configuration."""
        return bool(self.full_every or self.windows_from or self.windows_without_rope)

    def name(self, field: str) -> str:
        """What its configuration calls a field."""
        return (self.names or {}).get(field, field)

    def rotated(self, layer_types: Sequence[str], no_rope_layers: Sequence[int] | None) -> tuple[bool, ...]:
        """Which layers use rotary embedding."""
        if not self.rotary:
            return (False,) * len(layer_types)
        if self.rotates == "listed":
            return tuple(bool(mark) for mark in no_rope_layers or ())
        if self.rotates == "windowed":
            return tuple(kind == SLIDING for kind in layer_types)
        return (True,) * len(layer_types)


_QWEN2 = ModelType(
    max_positions=32_768, kv_heads=32, sliding_window=4096, window_switch=True, windows_from=28
)
_COHERE = ModelType(layers=40, heads=64, hidden_size=8192, max_positions=8192, rope_theta=500_000.0)

MODEL_TYPES: dict[str, ModelType] = {
    "llama": ModelType(),
    "mistral": ModelType(max_positions=131_072, kv_heads=8, sliding_window=4096),
    "mixtral": ModelType(max_positions=131_072, kv_heads=8, rope_theta=1_000_000.0),
    "qwen2": _QWEN2,
    "qwen3": replace(_QWEN2, head_dim=128),
    "qwen3_moe": replace(_QWEN2, layers=24, hidden_size=2048, kv_heads=4, windows_from=None),
    "gemma2": ModelType(
        layers=26,
        heads=8,
        hidden_size=2304,
        max_positions=8192,
        kv_heads=4,
        head_dim=256,
        sliding_window=4096,
        full_every=2,
    ),
    "gemma3_text": ModelType(
        layers=26,
        heads=8,
        hidden_size=2304,
        max_positions=131_072,
        kv_heads=4,
        head_dim=256,
        sliding_window=4096,
        full_every=6,
        pattern_named=True,
        tables_by_layer_type=True,
        rope_theta=1_000_000.0,
    ),
    "phi": ModelType(layers=24, hidden_size=2048, partial_rotary_factor=0.5),
    "phi3": ModelType(
        hidden_size=3072,
        max_positions=4096,
        partial_rotary_factor=1.0,
        original_positions=4096,
        rope_aliases={"su": "longrope", "yarn": "longrope"},
    ),
    "gpt_neox": ModelType(
        layers=44,
        heads=64,
        hidden_size=6144,
        names={"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
        grouped_heads=False,
        partial_rotary_factor=0.25,
    ),
    "opt": ModelType(layers=12, heads=12, hidden_size=768, grouped_heads=False, rotary=False),
    "mpt": ModelType(
        layers=24,
        heads=16,
        hidden_size=2048,
        names={
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "hidden_size": "d_model",
            "max_position_embeddings": "max_seq_len",
        },
        grouped_heads=False,
        rotary=False,
    ),
    "olmo2": ModelType(),
    "cohere": _COHERE,
    "granite": ModelType(),
    "glm4": ModelType(layers=40, max_positions=131_072, kv_heads=2, head_dim=128, partial_rotary_factor=0.5),
    "smollm3": ModelType(
        layers=36,
        heads=16,
        hidden_size=2048,
        max_positions=32_768,
        kv_heads=4,
        windows_without_rope=True,
        rotates="listed",
        rope_theta=2_000_000.0,
    ),
    "stablelm": ModelType(hidden_size=2560, max_positions=4096, kv_heads=32, partial_rotary_factor=0.25),
    "starcoder2": ModelType(layers=30, heads=24, hidden_size=3072, max_positions=4096, kv_heads=2),
    "gpt_oss": ModelType(
        layers=36,
        heads=64,
        hidden_size=2880,
        max_positions=131_072,
        kv_heads=8,
        head_dim=64,
        sliding_window=128,
        full_every=2,
        rope_theta=150_000.0,
        rope={
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    ),
    "cohere2": replace(
        _COHERE,
        sliding_window=4096,
        full_every=4,
        pattern_named=True,
        rotates="windowed",
        rope_theta=10_000.0,
    ),
}

# Kinds of layers that hold a state instead of keys and values.
_RECURRENT_LAYERS = {"linear_attention", "mamba", "conv", "hybrid", "hybrid_sliding"}
_RECURRENT_MODELS = {"mamba", "mamba2", "falcon_mamba", "rwkv", "recurrent_gemma", "xlstm"}
_RECURRENT_MODELS |= {"jamba", "bamba", "zamba", "zamba2", "nemotron_h", "falcon_h1", "granitemoehybrid"}
# Released without a list of their layers.
_RECURRENT_MODELS |= {"qwen3_next", "minimax"}
# Their attention modules call neither the attention interface nor a forward of ours.
_OWN_ATTENTION = {"bloom", "falcon"}
# Where wrappers keep the configuration of their language model.
_PARTS = ("text_config", "thinker_config", "vlm_config", "decoder", "generator")


def model_type_of(config: Mapping[str, Any]) -> ModelType:
    """The entry of `MODEL_TYPES` for a configuration, as parsed JSON.

    Raises:
        UnsupportedModel: there is none, and the sentence names the model type and, where it is known, the reason; or the
            configuration has a feature that no release of a supported model has.
    """
    name = config.get("model_type")
    found = MODEL_TYPES.get(name) if isinstance(name, str) else None
    if found is None or _holds_more(config) or _recurrent(config):
        raise unsupported(config)
    if config.get("use_bidirectional_attention"):
        raise UnsupportedModel(f"this {name} sees later tokens: it has no use for a cache")
    if config.get("per_layer_config"):
        raise UnsupportedModel(f"layers of this {name} have configurations of their own (per_layer_config)")
    return found


def unsupported(config: Mapping[str, Any]) -> UnsupportedModel:
    """The refusal of an architecture."""
    name = str(config.get("model_type"))[:80]
    return UnsupportedModel(f"architecture {name!r} is not supported: {_reason(config)}")


def _reason(config: Mapping[str, Any]) -> str:
    name = config.get("model_type")
    if config.get("kv_lora_rank"):
        return "its cache holds latents already (MLA)"
    if _recurrent(config) or (isinstance(name, str) and name in _RECURRENT_MODELS):
        return "its linear-attention layers keep a state, not keys and values"
    if _holds_more(config) or config.get("is_encoder_decoder"):
        return "it holds more than a language model; give the text model alone"
    if isinstance(name, str) and name in _OWN_ATTENTION:
        return "its attention module computes attention itself, where nothing can be put in between"
    return f"supported are {', '.join(sorted(MODEL_TYPES))}"


def _recurrent(config: Mapping[str, Any]) -> bool:
    listed = config.get("layer_types")
    return isinstance(listed, Sequence) and any(
        kind in _RECURRENT_LAYERS for kind in listed if isinstance(kind, str)
    )


def _holds_more(config: Mapping[str, Any]) -> bool:
    return any(isinstance(config.get(part), Mapping) for part in _PARTS)
