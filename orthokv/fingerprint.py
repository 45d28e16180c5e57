"""Recognising a base model by its weights, in whatever 16- or 32-bit dtype it was loaded."""

from __future__ import annotations

import hashlib
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from orthokv.architectures import architecture_of
from orthokv.geometry import attention_modules

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def _projections(model: PreTrainedModel) -> list[Tensor]:
    architecture = architecture_of(model.config)
    return [
        cast(Tensor, module.get_submodule(name).weight)
        for module in attention_modules(model)
        for name in architecture.projections
    ]


def _digest(weights: list[Tensor], dtype: torch.dtype) -> str:
    digest = hashlib.sha256()
    for weight in weights:
        raw = weight.detach().to(device="cpu", dtype=dtype).contiguous().view(torch.uint8)
        digest.update(raw.numpy().tobytes())
    return digest.hexdigest()


def weight_fingerprints(model: PreTrainedModel) -> dict[str, str]:
    """sha256 of all projections that make keys and values, once for each dtype that a user may load the model in.

    Only these weights decide what the bases must fit; hashing the rest of the model would refuse harmless changes, such as a
    resized vocabulary.
    """
    weights = _projections(model)
    return {name: _digest(weights, dtype) for name, dtype in DTYPES.items()}


def matches(model: PreTrainedModel, fingerprints: dict[str, str]) -> bool | None:
    """Whether the loaded model has these weights; None where it cannot be told (weights quantised to other dtypes)."""
    weights = _projections(model)
    dtypes = {weight.dtype for weight in weights}
    for name, dtype in DTYPES.items():
        if dtypes == {dtype}:
            return _digest(weights, dtype) == fingerprints[name]
    return None
