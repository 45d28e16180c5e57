"""How far the predictions of a compressed model are from the uncompressed one's."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from orthokv.models.states import positions_from

# Tokens whose next-token distributions are compared at a time.
PART_TOKENS = 512


def model_logits(model: PreTrainedModel, tokens: Tensor, start: int = 0) -> Tensor:
    """Next-token logits `[tokens - 1, vocabulary]` of one block that begins at position `start`, as the model is now;
    differentiable, in its own dtype.
    """
    ids = tokens.unsqueeze(0).to(model.device)
    output = model(ids, use_cache=False, **positions_from(start, ids, model.device))
    logits: Tensor = output.logits[0, :-1]
    return logits


def kl_sum(dense: Tensor, other: Tensor) -> Tensor:
    """Sum over tokens of KL(dense || other), nats, from logits `[tokens, vocabulary]`; differentiable, float64."""
    p, q = dense.float().log_softmax(-1), other.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).double().sum()


def divergence(dense: Tensor, other: Tensor) -> float:
    """`kl_sum` in parts: four more tables of the logits' size would be the largest tensors of a run."""
    parts = zip(dense.split(PART_TOKENS), other.split(PART_TOKENS), strict=True)
    return float(torch.stack([kl_sum(p, q) for p, q in parts]).sum())
