"""Write a Llama of a given shape with random weights, for measuring memory and time at sizes that cannot be trained here.

    python -m benchmarks.make_model /tmp/llama-8b --tokenizer demo/demo-llama-3m

writes the shape of Llama 3.1 8B (the default of every option) in bfloat16: 15 GiB in shards of one decoder layer each, of which
one is in memory at a time. The same seed on the same device gives the same files. Figures of quality mean nothing on such a
model; keys and values have falling spectra, as trained ones do, so that nothing degenerates.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def parts(config: LlamaConfig, seed: int, dtype: torch.dtype, device: str) -> Iterator[dict[str, Tensor]]:
    """The model's tensors, a shard's worth at a time: embeddings, each decoder layer, norm and head."""
    hidden, wide, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    assert kv_heads is not None
    assert head_dim is not None

    def random(generator: torch.Generator, rows: int, columns: int, scale: float) -> Tensor:
        return (torch.randn(rows, columns, generator=generator, device=device) * scale).to(dtype)

    def spectral(generator: torch.Generator, rows: int, columns: int) -> Tensor:
        """Singular values fall by a factor of ten, in directions that no single head owns."""
        mixing = torch.linalg.qr(torch.randn(rows, rows, generator=generator, device=device))[0]
        falling = torch.logspace(0.3, -0.7, rows, device=device).unsqueeze(1)
        noise = torch.randn(rows, columns, generator=generator, device=device) * columns**-0.5
        product: Tensor = mixing @ (falling * noise)
        return product.to(dtype)

    generator = torch.Generator(device).manual_seed(seed)
    yield {"model.embed_tokens.weight": random(generator, config.vocab_size, hidden, 1.0)}
    for layer in range(config.num_hidden_layers):
        generator.manual_seed(seed * 100_003 + layer + 1)
        out = (2 * config.num_hidden_layers) ** -0.5  # keeps the residual stream from growing with the depth
        tensors = {
            "self_attn.q_proj": random(generator, heads * head_dim, hidden, 2 * hidden**-0.5),
            "self_attn.k_proj": spectral(generator, kv_heads * head_dim, hidden),
            "self_attn.v_proj": spectral(generator, kv_heads * head_dim, hidden),
            "self_attn.o_proj": random(generator, hidden, heads * head_dim, out * (heads * head_dim) ** -0.5),
            "mlp.gate_proj": random(generator, wide, hidden, hidden**-0.5),
            "mlp.up_proj": random(generator, wide, hidden, hidden**-0.5),
            "mlp.down_proj": random(generator, hidden, wide, out * wide**-0.5),
            "input_layernorm": torch.ones(hidden, dtype=dtype),
            "post_attention_layernorm": torch.ones(hidden, dtype=dtype),
        }
        yield {f"model.layers.{layer}.{name}.weight": tensor for name, tensor in tensors.items()}
    generator.manual_seed(seed * 100_003 + config.num_hidden_layers + 1)
    head = {"model.norm.weight": torch.ones(hidden, dtype=dtype)}
    if not config.tie_word_embeddings:
        head["lm_head.weight"] = random(generator, config.vocab_size, hidden, hidden**-0.5)
    yield head


def write_model(folder: Path, config: LlamaConfig, seed: int, dtype: str, device: str = "cpu") -> int:
    """Write configuration, shards and index into a new folder; returns the bytes of all weights."""
    folder.mkdir(parents=True)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = DTYPES[dtype]
    config.save_pretrained(folder)
    shards = config.num_hidden_layers + 2
    index: dict[str, str] = {}
    total = 0
    for i, tensors in enumerate(parts(config, seed, DTYPES[dtype], device), start=1):
        name = f"model-{i:05d}-of-{shards:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, name)
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        print(f"{i}/{shards} shards, {total / 2**30:.1f} GiB", flush=True)
    described = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(described, indent=1) + "\n")
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="does not exist yet")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--positions", type=int, default=131072)
    parser.add_argument("--tied", action="store_true", help="one matrix for the embeddings and the head")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="where the numbers are drawn, e.g. cuda")
    parser.add_argument("--tokenizer", type=Path, help="a folder whose tokenizer files are copied")
    given = parser.parse_args()
    config = LlamaConfig(
        vocab_size=given.vocabulary,
        hidden_size=given.hidden,
        intermediate_size=given.intermediate,
        num_hidden_layers=given.layers,
        num_attention_heads=given.heads,
        num_key_value_heads=given.kv_heads,
        head_dim=given.head_dim,
        max_position_embeddings=given.positions,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=given.tied,
    )
    write_model(given.folder, config, given.seed, given.dtype, given.device)
    if given.tokenizer is not None:
        for name in TOKENIZER_FILES:
            if (given.tokenizer / name).is_file():
                shutil.copyfile(given.tokenizer / name, given.folder / name)


if __name__ == "__main__":
    main()
