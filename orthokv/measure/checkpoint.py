"""A checkpoint against the same model without it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from orthokv.checkpoint.read import Checkpoint
from orthokv.measure.quality import cache_size, quality_by_layer, tokens_per_second
from orthokv.models.streaming import streamed_weights
from orthokv.runtime.seam import seam_of
from orthokv.serving.attach import attach, detach
from orthokv.spec.progress import Reporter, silent
from orthokv.text.blocks import Blocks


def evaluate_checkpoint(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    blocks: Blocks,
    *,
    speed: bool = False,
    report: Reporter = silent,
) -> dict[str, Any]:
    """Attach a checkpoint, measure it against the same model without it, and detach.

    Predictions and layers are measured where the blocks begin (`placed`), which in key mode
    `post` matters; bytes and speed do not depend on it.

    Returns:
        `perplexity`, `perplexity_dense`, `kl` (nats a token), `kept`, `cache_bytes_per_token`,
        `cache_bytes_per_token_dense`, `tokens`, `layer_error` and `layer_cosine` by layer, `dataset`; with `speed`
        also `tokens_per_second`, `tokens_per_second_dense` and `device`, but not of a model that is streamed from disk:
        it would be the disk's speed.
    """
    attach(model, checkpoint)
    try:
        seam = seam_of(model)
        assert seam is not None
        bases = [state for i in range(len(seam.modules)) if (state := seam.state(i).bases) is not None]
        found, layers = quality_by_layer(seam, bases, blocks, report)
        size = cache_size(seam, bases, blocks.tokens[0])
        measured: dict[str, Any] = {
            "perplexity": found.perplexity,
            "perplexity_dense": found.perplexity_dense,
            "kl": found.kl,
            "kept": size.kept,
            "cache_bytes_per_token": size.bytes_per_token,
            "cache_bytes_per_token_dense": size.bytes_per_token_dense,
            "tokens": found.tokens,
            "layer_error": [layer.error for layer in layers],
            "layer_cosine": [layer.cosine for layer in layers],
            "dtype": str(model.dtype).removeprefix("torch."),
            "dataset": {
                "source": blocks.source,
                "digest": blocks.digest,
                "num_samples": len(blocks),
                "sequence_length": int(blocks.tokens.shape[1]),
                "starts": sorted(set(blocks.starts)),
            },
        }
        if speed and streamed_weights(model) is None:
            prompt = blocks.tokens[0][: max(2, blocks.tokens.shape[1] // 2)]
            measured["tokens_per_second"], measured["tokens_per_second_dense"] = tokens_per_second(
                seam, bases, prompt
            )
            measured["device"] = device_name(model.device)
        return measured
    finally:
        detach(model)


def device_name(device: torch.device) -> str:
    """What a measurement says it ran on."""
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type}, {torch.get_num_threads()} threads"
    )
