"""Attention of MPT through the attention interface.

`transformers` computes it inside the module, where no seam reaches. This forward computes the same, with the ALiBi bias
and the causal mask merged into one additive mask, as the interface wants it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from orthokv.spec.names import ATTENTION_PREFIX

# The model cannot be told to use it, as others are: its configuration stays as it is.
SEAM = f"{ATTENTION_PREFIX}eager"


def mpt_attention(
    self: Any,
    hidden_states: Tensor,
    position_bias: Tensor,
    past_key_values: Cache | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`MptAttention.forward`: `hidden_states` `[B, T, hidden]`, `position_bias` `[heads, 1, longest context]`.

    `attention_mask` `[B, 1, T, S]` is True where a token must not be seen.
    """
    batch, tokens, _width = hidden_states.shape
    qkv = self.Wqkv(hidden_states)
    if self.clip_qkv:
        qkv = qkv.clamp(min=-self.clip_qkv, max=self.clip_qkv)
    query, key, value = (
        x.reshape(batch, tokens, self.n_heads, self.head_dim).transpose(1, 2) for x in qkv.chunk(3, dim=2)
    )
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, self.layer_idx)
    # The bias counts back from the last key. What it adds to all keys alike, the softmax takes away again.
    bias = position_bias[:, :, -key.shape[-2] :].unsqueeze(0).to(query.dtype)
    if attention_mask is not None:
        # Half of the smallest number: scores are added to it, and a row of padding must not end as infinities.
        bias = bias.masked_fill(attention_mask, torch.finfo(query.dtype).min / 2)
    attention = ALL_ATTENTION_FUNCTIONS[SEAM]
    output, weights = attention(
        self,
        query,
        key,
        value,
        bias,
        scaling=self.softmax_scale,
        dropout=self.attn_dropout_p if self.training else 0.0,
        **kwargs,
    )
    return self.out_proj(output.reshape(batch, tokens, -1)), weights
