"""Tiny models of every supported architecture, made in milliseconds and sharp enough that mistakes show.

A freshly initialised transformer attends almost uniformly, so a wrong position or a mixed-up head hardly moves its logits.
These have large query and key projections (attention far from uniform), biases and norms that are not the identity, and
keys and values whose energy falls off, as it does in trained models, so that low ranks mean something.
"""

from __future__ import annotations

import copy
import string
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from orthokv.bases.basis import Bases, Basis
from orthokv.models.architectures import ARCHITECTURES as REGISTRY
from orthokv.models.source import load_model, resolve_model
from orthokv.pipeline import build_profile, fit_layers
from orthokv.planning.profile import ErrorProfile
from orthokv.runtime.seam import Seam
from orthokv.spec.geometry import Geometry
from orthokv.spec.settings import FitSettings
from orthokv.spec.sharing import group_width
from orthokv.spec.vocabulary import KeyMode, Sharing
from orthokv.text.blocks import Blocks

ARCHITECTURES: tuple[str, ...] = tuple(REGISTRY)
# One for each kind of attention, for tests that multiply by something else: plain, windows with two rotary tables and norms, no
# rotary embedding, sinks, layers without positions, a forward of our own.
FAMILIES = ("llama", "gemma3_text", "opt", "gpt_oss", "smollm3", "mpt")
# Which heads share, as far as it makes a difference with the 4 KV heads that most of these models have: `quad` is `joint`.
GROUPINGS: tuple[Sharing, ...] = ("head", "tied", "pair", "joint")
# Softcaps, sinks and ALiBi are not in PyTorch's own attention: transformers refuses or ignores `sdpa` for these.
EAGER_ONLY = ("gemma2", "gpt_oss", "mpt")

VOCABULARY, PAD, BOS, UNKNOWN = 99, 0, 1, 2
LAYERS, HIDDEN, HEADS, MAX_POSITIONS = 3, 64, 8, 256
SLIDING_WINDOW = 12  # of every model that has one

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": MAX_POSITIONS,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_WINDOWS = {"sliding_window": SLIDING_WINDOW}
# A window in two layers of three, so that layers of both kinds are in one cache.
_MIXED = {**_WINDOWS, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}

# What each differs in from 3 layers of 8 heads over 64 numbers, with 4 KV heads. What is special about an architecture is
# switched on: norms, biases, windows, softcaps, sinks, experts, scales, partial rotation, layers without positions.
_SPECIAL: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 2, **_WINDOWS},
    "mixtral": {**_EXPERTS, **_WINDOWS},
    "qwen2": {},
    "qwen3": {"head_dim": 16},  # wider than hidden / heads, as in the released models
    "qwen3_moe": {
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "gemma2": {
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 30.0,
        **_MIXED,
    },
    "gemma3_text": {
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        **_MIXED,
    },
    "phi": {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "phi3": {
        "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.75},
        "original_max_position_embeddings": 64,
        **_WINDOWS,
    },
    "gpt_neox": {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": HIDDEN, "dropout": 0.0, "tie_word_embeddings": True},
    "mpt": {
        "hidden_size": 48,
        "num_attention_heads": 6,  # no power of two: the slopes of ALiBi are interleaved
        "max_seq_len": MAX_POSITIONS,
        "attn_config": {"clip_qkv": 2.0},
        "tie_word_embeddings": True,
    },
    "olmo2": {},
    "cohere": {"use_qk_norm": True, "logit_scale": 0.5},
    "granite": {
        "attention_multiplier": 0.5,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.0,
    },
    "glm4": {
        "head_dim": 16,
        "attention_bias": True,
        "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "stablelm": {
        "use_qkv_bias": True,
        "qk_layernorm": True,
        "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25},
    },
    "starcoder2": {**_WINDOWS},
    "gpt_oss": {
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "rope_theta": 1e4,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 64,
        },
        **_EXPERTS,
        **_MIXED,
    },
    "cohere2": {"logit_scale": 0.5, **_MIXED},
}


# Architectures under another rotary embedding than above: names that the functions below take as well.
_LONG = {"original_max_position_embeddings": 64, "rope_theta": 1e4}
ROPE: dict[str, dict[str, Any]] = {
    "llama+linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    "llama+llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        **_LONG,
    },
    "llama+yarn": {"rope_type": "yarn", "factor": 4.0, **_LONG},
    "llama+dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    "phi3+longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": [1.0, 1.1, 1.2],
        "long_factor": [2.0, 4.0, 8.0],
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.75,
    },
}
VARIANTS: tuple[str, ...] = (*ARCHITECTURES, *ROPE)


def tiny_config(name: str, **changes: Any) -> PreTrainedConfig:
    """The configuration of one of `VARIANTS`, with `changes`."""
    if name not in VARIANTS:
        raise ValueError(f"no tiny {name}; there are {', '.join(VARIANTS)}")
    architecture = name.split("+")[0]
    settings = {**_COMMON, **_SPECIAL[architecture]}
    if name in ROPE:
        settings["rope_parameters"] = ROPE[name]
    # A copy: the configuration completes the dictionaries that it is given.
    return CONFIG_MAPPING[architecture](**copy.deepcopy({**settings, **changes}))


def tiny_model(architecture: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A fresh float32 model in evaluation mode; the same seed gives the same weights, whatever the global generator."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        build: Any = AutoModelForCausalLM.from_config
        model = build(tiny_config(architecture, **changes), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_weights(name, parameter, generator))
    return cast(PreTrainedModel, model.eval().requires_grad_(False))


def _weights(name: str, parameter: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(parameter.shape, generator=generator)
    if any(part in name for part in ("q_norm", "k_norm", "q_layernorm", "k_layernorm")):
        return 2 + 0.3 * noise
    if "router" in name or name.endswith(("gate.weight", "sinks")):
        return noise
    if "norm" in name:
        return 1 + 0.2 * noise if name.endswith("weight") else 0.2 * noise
    if name.endswith("bias"):
        return 0.3 * noise
    if "wte" in name or "decoder.embed" in name:
        return 0.25 * noise  # mpt, opt: tied to the output
    if "embed" in name and "embed_out" not in name:
        return noise
    if "q_proj" in name:
        return 0.3 * noise
    if any(part in name for part in ("k_proj", "v_proj", "Wqkv", "query_key_value")):
        # Singular values fall by a factor of ten, in directions that no single head owns.
        mixing = torch.linalg.qr(torch.randn(len(noise), len(noise), generator=generator))[0]
        decay = torch.logspace(0.4, -0.6, len(noise)).unsqueeze(1)
        return cast(Tensor, 0.3 * mixing @ (decay * noise))
    return 0.15 * noise


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character of printable ASCII (and the line end); 99 entries, the specials included."""
    characters = [c for c in string.printable if c.isprintable()] + ["\n"]
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "<unk>", *characters])}
    assert len(vocabulary) == VOCABULARY
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=MAX_POSITIONS,
    )


def tiny_folder(tmp_path: Path, architecture: str, seed: int = 0, **changes: Any) -> Path:
    """A folder below `tmp_path` with the model and its tokenizer, as a user would have it."""
    folder = tmp_path / f"tiny-{architecture}-{seed}"
    tiny_model(architecture, seed, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_tokens(samples: int, length: int, seed: int = 0) -> Tensor:
    """Random token ids `[samples, length]` without the specials."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (samples, length), generator=generator)


def tiny_text(characters: int, seed: int = 0) -> str:
    """Random letters, one token each. No spaces: `transformers` gives qwen2 a pre-tokenizer of its own that drops them."""
    generator = torch.Generator().manual_seed(seed)
    letters = torch.randint(0, len(string.ascii_letters), (characters,), generator=generator).tolist()
    return "".join(string.ascii_letters[i] for i in letters)


def tiny_blocks(samples: int = 4, length: int = 16, seed: int = 0) -> Blocks:
    """Random calibration blocks."""
    return Blocks.of(tiny_tokens(samples, length, seed), f"tiny tokens (seed {seed})")


def tiny_bases(
    geometry: Geometry, sharing: Sharing = "joint", codec: str = "native", share: float = 0.5, seed: int = 0
) -> list[Bases]:
    """Random orthonormal bases for every layer, of other ranks for keys than for values; float32."""
    generator = torch.Generator().manual_seed(seed)

    def basis(share: float, *, keys: bool) -> Basis:
        stored, width = group_width(sharing, geometry.kv_heads, geometry.head_dim, keys=keys)
        square = torch.linalg.qr(torch.randn(stored, width, width, generator=generator))[0]
        encoder = square[..., : max(1, int(width * share))].contiguous()
        return Basis(encoder, encoder, geometry.kv_heads, geometry.head_dim)

    return [
        Bases(basis(share, keys=True), basis(1.25 * share, keys=False), (codec, codec))
        for _ in range(geometry.layers)
    ]


@contextmanager
def tiny_seam(model: PreTrainedModel, key_mode: KeyMode, bases: list[Bases] | None = None) -> Iterator[Seam]:
    """A model compressed by `tiny_bases` unless by others."""
    with Seam(model, key_mode) as seam:
        for layer, found in enumerate(bases or tiny_bases(seam.geometry)):
            key, value = (basis.to(dtype=model.dtype) for basis in (found.key, found.value))
            seam.set_bases(layer, replace(found, key=key, value=value))
        yield seam


def tiny_profile(folder: Path, blocks: Blocks | None = None, **settings: Any) -> ErrorProfile:
    """The profile of a model on disk (see `tiny_folder`), by the closed form unless `settings` say otherwise, on
    random tokens unless `blocks` are others.
    """
    chosen = FitSettings(
        **{"method": "eigen", "num_samples": 4, "sequence_length": 16, "profile_samples": 1, **settings}
    )
    source = resolve_model(str(folder))
    model = load_model(source)
    blocks = blocks or tiny_blocks(chosen.num_samples, chosen.sequence_length)
    return build_profile(model, source, blocks, list(fit_layers(model, blocks, chosen)), chosen)
