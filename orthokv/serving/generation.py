"""Text from a compressed model, with the size of the cache that it took."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from orthokv.checkpoint.read import Checkpoint
from orthokv.models.geometry import geometry_of
from orthokv.runtime.cache import cache_bytes
from orthokv.serving.attach import attach, detach
from orthokv.spec.errors import InvalidSetting
from orthokv.spec.footprint import dense_bytes


@dataclass(frozen=True)
class Generated:
    """A continuation and what the live cache held at its end; dense bytes are those of a 16-bit cache."""

    text: str
    tokens: int
    cached_tokens: int
    cache_bytes: int
    cache_bytes_dense: int

    @property
    def kept(self) -> float:
        return self.cache_bytes / self.cache_bytes_dense

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "kept": self.kept}


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    checkpoint: Checkpoint | None,
    prompt: str,
    max_new_tokens: int,
) -> Generated:
    """Greedy continuation of `prompt`; `checkpoint` None uses the model uncompressed.

    Raises:
        InvalidSetting: the prompt has no tokens, the number of new tokens is below 1, or the model has no such positions.
    """
    if max_new_tokens < 1:
        raise InvalidSetting(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    ids = torch.tensor([tokenizer(prompt)["input_ids"]], dtype=torch.long, device=model.device)
    if ids.numel() == 0:
        raise InvalidSetting("the prompt holds no tokens")
    geometry, total = geometry_of(model.config), ids.shape[1] + max_new_tokens
    if geometry.rope is None and total > geometry.max_positions:
        raise InvalidSetting(
            f"{total} tokens exceed the {geometry.max_positions} positions that the model has learned"
        )
    cache = DynamicCache(config=model.config)
    if checkpoint is not None:
        attach(model, checkpoint)
    try:
        run: Any = model.generate
        sequences = run(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,  # some released configurations (MPT) switch it off
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
        )
    finally:
        if checkpoint is not None:
            detach(model)
    # Counted on what the cache keeps, layer by layer: a sliding window keeps fewer tokens than it has seen.
    layers: list[Any] = cache.layers
    kept = sum(layer.keys.shape[-2] for layer in layers)
    dense = kept * dense_bytes(geometry) // len(layers)
    text = tokenizer.decode(sequences[0], skip_special_tokens=True)
    return Generated(
        text=str(text),
        tokens=int(sequences.shape[1] - ids.shape[1]),
        cached_tokens=kept // len(layers),
        cache_bytes=cache_bytes(cache) if checkpoint is not None else dense,
        cache_bytes_dense=dense,
    )
