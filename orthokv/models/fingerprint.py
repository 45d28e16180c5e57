"""Recognising a base model by its weights, in whatever 16- or 32-bit dtype it was loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from orthokv.models.architectures import architecture_of
from orthokv.models.geometry import attention_modules
from orthokv.models.streaming import weights_present
from orthokv.spec.vocabulary import WEIGHT_DTYPES

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in WEIGHT_DTYPES}


def _projections(model: PreTrainedModel) -> Iterator[Tensor]:
    """Key and value projections of each layer in turn; those of a streamed model are there only until the next is asked for."""
    for module in attention_modules(model):
        with weights_present(model, module):
            yield from _weights(model, module)


def _weights(model: PreTrainedModel, module: nn.Module) -> list[Tensor]:
    architecture = architecture_of(model.config)
    return [cast(Tensor, module.get_submodule(name).weight) for name in architecture.projections]


def _bytes(weight: Tensor, dtype: torch.dtype) -> bytes:
    raw = weight.detach().to(device="cpu", dtype=dtype).contiguous().view(torch.uint8)
    return raw.numpy().tobytes()


def weight_fingerprints(model: PreTrainedModel) -> dict[str, str]:
    """sha256 of all projections that make keys and values, once for each dtype that a user may load the model in.

    Only these weights decide what the bases must fit; hashing the rest of the model would refuse harmless changes, such as a
    resized vocabulary.
    """
    return _fingerprints(model, DTYPES)


def _fingerprints(model: PreTrainedModel, dtypes: dict[str, torch.dtype]) -> dict[str, str]:
    digests = {name: hashlib.sha256() for name in dtypes}
    for weight in _projections(model):
        for name, dtype in dtypes.items():
            digests[name].update(_bytes(weight, dtype))
    return {name: digest.hexdigest() for name, digest in digests.items()}


def matches(model: PreTrainedModel, fingerprints: dict[str, str]) -> bool | None:
    """Whether the loaded model has these weights; None where it cannot be told (weights quantised to other dtypes)."""
    stored = {w.dtype for module in attention_modules(model) for w in _weights(model, module)}
    for name, dtype in DTYPES.items():
        if stored == {dtype}:
            return _fingerprints(model, {name: dtype})[name] == fingerprints[name]
    return None
