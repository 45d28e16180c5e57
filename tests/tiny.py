"""Tiny models of every supported architecture, made in milliseconds and sharp enough that mistakes show.

A freshly initialised transformer attends almost uniformly, so a wrong position or a mixed-up head hardly moves its logits.
These have large query and key projections (attention far from uniform), biases and norms that are not the identity, and
keys and values whose energy falls off, as it does in trained models, so that low ranks mean something.
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from orthokv.dataset import Blocks
from orthokv.pipeline import FitSettings, build_profile, fit_layers
from orthokv.profile import ErrorProfile
from orthokv.source import load_model, resolve_model

ARCHITECTURES: tuple[str, ...] = ("llama", "mistral", "qwen2", "qwen3", "opt")

VOCABULARY, PAD, BOS, UNKNOWN = 99, 0, 1, 2
LAYERS, HIDDEN, HEADS, MAX_POSITIONS = 3, 64, 8, 256
SLIDING_WINDOW = 12  # of mistral


def tiny_config(architecture: str) -> PreTrainedConfig:
    """3 layers of 8 heads over 64 numbers. llama, qwen2, qwen3: 4 KV heads; mistral: 2 and a window; opt: 8."""
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": MAX_POSITIONS,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": None,
    }
    rotary = {**common, "intermediate_size": 96, "tie_word_embeddings": False}
    match architecture:
        case "llama":
            return LlamaConfig(**rotary, num_key_value_heads=4)
        case "mistral":
            return MistralConfig(**rotary, num_key_value_heads=2, sliding_window=SLIDING_WINDOW)
        case "qwen2":
            return Qwen2Config(**rotary, num_key_value_heads=4)
        case "qwen3":
            # Heads wider than hidden / heads, as in the released models.
            return Qwen3Config(**rotary, num_key_value_heads=4, head_dim=16)
        case "opt":
            return OPTConfig(**common, ffn_dim=96, word_embed_proj_dim=HIDDEN, dropout=0.0)
    raise ValueError(f"no tiny {architecture}; there are {', '.join(ARCHITECTURES)}")


def tiny_model(architecture: str, seed: int = 0) -> PreTrainedModel:
    """A fresh float32 model in evaluation mode; the same seed gives the same weights, whatever the global generator."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        build: Any = AutoModelForCausalLM.from_config
        model = build(tiny_config(architecture), dtype=torch.float32, attn_implementation="sdpa")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_weights(name, parameter, generator))
    return cast(PreTrainedModel, model.eval().requires_grad_(False))


def _weights(name: str, parameter: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(parameter.shape, generator=generator)
    if "q_norm" in name or "k_norm" in name:
        return 2 + 0.3 * noise
    if "norm" in name:
        return 1 + 0.2 * noise if name.endswith("weight") else 0.2 * noise
    if name.endswith("bias"):
        return 0.3 * noise
    if "embed" in name:
        return 0.25 * noise if "decoder" in name else noise  # opt: tied to its output, and added to positions
    if "q_proj" in name:
        return 0.3 * noise
    if "k_proj" in name or "v_proj" in name:
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


def tiny_folder(tmp_path: Path, architecture: str, seed: int = 0) -> Path:
    """A folder below ``tmp_path`` with the model and its tokenizer, as a user would have it."""
    folder = tmp_path / f"tiny-{architecture}-{seed}"
    tiny_model(architecture, seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_tokens(samples: int, length: int, seed: int = 0) -> Tensor:
    """Random token ids ``[samples, length]`` without the specials."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (samples, length), generator=generator)


def tiny_text(characters: int, seed: int = 0) -> str:
    """Random letters, one token each. No spaces: ``transformers`` gives qwen2 a pre-tokenizer of its own that drops them."""
    generator = torch.Generator().manual_seed(seed)
    letters = torch.randint(0, len(string.ascii_letters), (characters,), generator=generator).tolist()
    return "".join(string.ascii_letters[i] for i in letters)


def tiny_blocks(samples: int = 4, length: int = 16, seed: int = 0) -> Blocks:
    """Random calibration blocks."""
    return Blocks.of(tiny_tokens(samples, length, seed), f"tiny tokens (seed {seed})")


def tiny_profile(folder: Path, **settings: Any) -> ErrorProfile:
    """The profile of a model on disk (see :func:`tiny_folder`), by the closed form unless ``settings`` say otherwise."""
    chosen = FitSettings(
        **{"method": "eigen", "num_samples": 4, "sequence_length": 16, "profile_samples": 1, **settings}
    )
    source = resolve_model(str(folder))
    model = load_model(source)
    blocks = tiny_blocks(chosen.num_samples, chosen.sequence_length)
    return build_profile(model, source, blocks, list(fit_layers(model, blocks, chosen)), chosen)
