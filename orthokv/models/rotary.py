"""Rotary embedding of one layer, by the model's own module and function."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from orthokv.models.architectures import architecture_of
from orthokv.spec.architectures import MODEL_TYPES
from orthokv.spec.geometry import Geometry

Tables = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Rotary:
    """Makes a layer's tables for any positions, and applies them.

    Attributes:
        module: the model's rotary module.
        arguments: what it wants besides positions: the layer's type, in models with tables for each.
        half_tables: see :class:`~orthokv.models.architectures.Architecture`.
    """

    module: nn.Module
    arguments: tuple[str, ...]
    half_tables: bool

    def tables(self, positions: Tensor, like: Tensor) -> Tables:
        """Cosines and sines of ``positions`` ``[B, S]``, in the dtype and on the device of ``like``."""
        return cast(Tables, self.module(like, positions.to(like.device).long(), *self.arguments))

    def rotate(self, attention: nn.Module, x: Tensor, tables: Tables) -> Tensor:
        """``x`` ``[B, heads, S, head_dim]`` with as many leading numbers of each head turned as the tables cover."""
        function: Any = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        width = tables[0].shape[-1] * (2 if self.half_tables else 1)
        # Where a head is turned in part, some models split it in this function and some before it.
        turned, rest = x[..., :width], x[..., width:]
        # The empty second argument spares the function's work on the other side.
        turned = function(turned, turned[:, :0], *tables)[0]
        return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


def layer_rotaries(model: PreTrainedModel, geometry: Geometry) -> list[Rotary | None]:
    """One for each layer; None where a layer uses no rotary embedding."""
    if geometry.rope is None:
        return [None] * geometry.layers
    architecture = architecture_of(model.config)
    module = model.get_submodule(architecture.rotary)
    by_layer_type = MODEL_TYPES[geometry.model_type].tables_by_layer_type
    types = model.config.layer_types if by_layer_type else None
    return [
        Rotary(module, () if types is None else (types[layer],), architecture.half_tables)
        if geometry.uses_rope(layer)
        else None
        for layer in range(geometry.layers)
    ]
