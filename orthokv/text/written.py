"""Text that a model writes itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from orthokv.models.repeatable import repeatable
from orthokv.spec.errors import InvalidDataset, InvalidModel, InvalidSetting
from orthokv.text.blocks import Blocks
from orthokv.text.packing import check_shape

# Samples that one forward of self_text draws a token for: one token of a few samples leaves a GPU idle.
_SAMPLES_TOGETHER = {"cuda": 64}


@torch.no_grad()
def self_text(
    model: PreTrainedModel,
    *,
    num_samples: int,
    sequence_length: int,
    seed: int,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Blocks:
    """Blocks that the model samples itself from BOS, with its own cache; EOS is never drawn.

    The random numbers depend on `seed` and the sample only, neither on `batch_size` nor on the global
    generator, which is left alone. By default as many samples are drawn together as the device is good for. `progress` is
    called with tokens drawn and tokens in all.

    Raises:
        InvalidDataset: the model has no BOS token.
        InvalidSetting: a setting is out of range.
        InvalidModel: its logits are not finite.
    """
    config = model.config.get_text_config(decoder=True)
    check_shape(num_samples, sequence_length, getattr(config, "max_position_embeddings", None))
    if batch_size is None:
        batch_size = _SAMPLES_TOGETHER.get(model.device.type, 8)
    if batch_size < 1:
        raise InvalidSetting(f"batch_size must be at least 1, not {batch_size}")
    if not isinstance(bos := getattr(config, "bos_token_id", None), int):
        raise InvalidDataset("the model's configuration has no bos_token_id, so it cannot write its own text")
    stops = [getattr(settings, "eos_token_id", None) for settings in (config, model.generation_config)]
    ends = [end for stop in stops for end in (stop if isinstance(stop, list) else [stop]) if end is not None]
    generator = torch.Generator().manual_seed(seed)
    # Drawn in float32 and widened, so that no number reaches 1 and no draw falls behind the last token.
    uniform = torch.rand(num_samples, sequence_length - 1, generator=generator).double()
    tokens = torch.full((num_samples, sequence_length), bos)
    total = uniform.numel()
    training = model.training
    model.train(mode=False)
    try:
        for start in range(0, num_samples, batch_size):
            rows, draws = tokens[start : start + batch_size], uniform[start : start + batch_size]
            cache = None
            for position in range(1, sequence_length):
                step = rows[:, position - 1 : position].to(model.device)
                with repeatable():
                    output = cast(Any, model)(input_ids=step, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                # Drawn on the CPU: sums over a vocabulary come out differently from run to run on a GPU.
                logits = output.logits[:, -1].float().cpu().double()
                rows[:, position] = draw(logits, draws[:, position - 1 : position], ends)
                if progress is not None:
                    progress(start * (sequence_length - 1) + position * len(rows), total)
    finally:
        model.train(training)
    return Blocks.of(tokens, f"self (seed {seed})")


def draw(logits: torch.Tensor, uniform: torch.Tensor, never: list[int]) -> torch.Tensor:
    """A token a row, by inverting the cumulative distribution: `[n, vocabulary]`, `[n, 1]` -> `[n]`."""
    logits[:, never] = -torch.inf
    heights = logits.softmax(-1).cumsum(-1)
    if not heights.isfinite().all():
        raise InvalidModel("the model's logits are not finite, so it cannot write its own text")
    return torch.searchsorted(heights, uniform * heights[:, -1:], right=True)[:, 0]
