"""Attention over what a cache holds: one entry, `attend`, and one table of implementations.

The first implementation of `TABLE` whose limits fit a step computes it; `reference`, which has none, comes last. A kernel is
a function of a `Step` and a row of the table above the others: it needs neither the model nor `transformers`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from orthokv.bases.basis import Basis
from orthokv.models.rotary import Rotation, Tables
from orthokv.runtime.codecs import Codec
from orthokv.spec.vocabulary import KeyMode

Attended = tuple[Tensor, Tensor | None]


@dataclass
class Held:
    """Keys or values of all tokens attended to, as they are held.

    Attributes:
        codec: of the rows; None where nothing is packed.
        rows: packed tokens `[B, groups, R, n]`; None where none are.
        waiting: latents `[B, groups, S, rank]` behind them that fill no block yet; without a basis, heads.
        basis: of the latents; None where heads `[B, kv_heads, S, head_dim]` are held as they are.
    """

    basis: Basis | None
    codec: Codec | None
    rows: Tensor | None
    waiting: Tensor | None

    @property
    def rank(self) -> int | None:
        return None if self.basis is None else self.basis.rank

    @property
    def tokens(self) -> int:
        packed = 0 if self.rows is None or self.codec is None else self.rows.shape[-2] * self.codec.block
        return packed + (0 if self.waiting is None else self.waiting.shape[-2])

    def latents(self, dtype: torch.dtype) -> Tensor:
        """Everything held, unpacked: `[B, groups, S, rank]`."""
        if self.rows is None:
            assert self.waiting is not None
            return self.waiting.to(dtype)
        assert self.codec is not None
        assert self.basis is not None
        packed = self.codec.unpack(self.rows, self.basis.rank, dtype)
        return packed if self.waiting is None else torch.cat([packed, self.waiting.to(dtype)], dim=-2)

    def heads(self, dtype: torch.dtype) -> Tensor:
        """Everything held, as heads `[B, kv_heads, S, head_dim]`."""
        latents = self.latents(dtype)
        return latents if self.basis is None else self.basis.decode(latents)


@dataclass
class Turn:
    """The rotary embedding that queries and keys of a step still lack."""

    rotation: Rotation
    query: Tables
    key: Tables


@dataclass
class Stock:
    """The attention function that the model itself would have called, with what it was to be called with.

    The attributes behind `options` are what such functions read from the attention module.
    """

    function: Callable[..., Attended]
    mask: Tensor | None
    options: dict[str, Any]
    is_causal: bool
    training: bool
    sinks: Tensor | None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Attended:
        module = _Module(query.shape[1] // key.shape[1], self.is_causal, self.training, self.sinks)
        return self.function(module, query, key, value, self.mask, **self.options)


@dataclass
class _Module:
    """What stock functions read from the attention module; latents change the number of KV heads."""

    num_key_value_groups: int
    is_causal: bool
    training: bool
    sinks: Tensor | None


@dataclass
class Step:
    """Attention of one layer for some new tokens: `query` `[B, heads, T, head_dim]`."""

    query: Tensor
    keys: Held
    values: Held
    turn: Turn | None
    stock: Stock

    @property
    def key_mode(self) -> KeyMode:
        """`pre` where keys are still to be turned."""
        return "post" if self.turn is None else "pre"


# The largest rank: a number, as wide as a head, or any.
Limit = int | Literal["head"] | None


@dataclass(frozen=True)
class Implementation:
    """A way to compute a step, and the steps that it can compute: None is no limit.

    Only an implementation without limits of rank is asked where keys or values are held as they are.
    """

    name: str
    run: Callable[[Step], Attended]
    devices: tuple[str, ...] | None = None
    key_mode: KeyMode | None = None
    codecs: tuple[str, ...] | None = None
    query_tokens: int | None = None
    key_rank: Limit = None
    value_rank: Limit = None

    def fits(self, step: Step) -> bool:
        head_dim = step.query.shape[-1]
        return (
            (self.devices is None or step.query.device.type in self.devices)
            and (self.key_mode is None or step.key_mode == self.key_mode)
            and (self.query_tokens is None or step.query.shape[2] <= self.query_tokens)
            and _within(step.keys.rank, self.key_rank, head_dim)
            and _within(step.values.rank, self.value_rank, head_dim)
            and all(_packed_by(held, self.codecs) for held in (step.keys, step.values))
        )


def _within(rank: int | None, limit: Limit, head_dim: int) -> bool:
    if limit is None:
        return True
    return rank is not None and rank <= (head_dim if limit == "head" else limit)


def _packed_by(held: Held, codecs: tuple[str, ...] | None) -> bool:
    return codecs is None or (held.codec is not None and held.codec.name in codecs)


def _per_head(x: Tensor, heads: int) -> Tensor:
    """`[B, groups, S, n]` -> `[B, heads, S, n]`: the latents of a group for each of its heads; a view of one group."""
    batch, groups, tokens, numbers = x.shape
    if groups == heads:
        return x
    shared = x.unsqueeze(2).expand(-1, -1, heads // groups, -1, -1)
    return shared.reshape(batch, heads, tokens, numbers)


def reference(step: Step, *, latent_keys: bool = False, latent_values: bool = False) -> Attended:
    """The model's own function over rebuilt heads, or over the latents themselves of the sides that are named."""
    query, dtype = step.query, step.query.dtype
    if latent_keys:
        assert step.keys.basis is not None
        key, query = step.keys.latents(dtype), step.keys.basis.query_to_latent(query)
    else:
        key = step.keys.heads(dtype)
    if step.turn is not None:
        query = step.turn.rotation.turn(query, step.turn.query)
        key = step.turn.rotation.turn(key, step.turn.key)
    value = step.values.latents(dtype) if latent_values else step.values.heads(dtype)
    heads = max(key.shape[1], value.shape[1])
    output, weights = step.stock(query, _per_head(key, heads), _per_head(value, heads))
    if latent_values:
        assert step.values.basis is not None
        output = step.values.basis.output_from_latent(output)
    return output, weights


# One query token is bound by memory: attend to the latents themselves where they are not wider than a head. Longer queries
# are bound by arithmetic, which latents wider than a head would multiply: rebuild the heads first.
TABLE: tuple[Implementation, ...] = (
    Implementation(
        "latents",
        partial(reference, latent_keys=True, latent_values=True),
        key_mode="post",
        query_tokens=1,
        key_rank="head",
        value_rank="head",
    ),
    Implementation(
        "latent keys", partial(reference, latent_keys=True), key_mode="post", query_tokens=1, key_rank="head"
    ),
    Implementation(
        "latent values", partial(reference, latent_values=True), query_tokens=1, value_rank="head"
    ),
    Implementation("reference", reference),
)


def implementation(step: Step) -> Implementation:
    """The first of the table that can compute a step."""
    for candidate in TABLE:
        if candidate.fits(step):
            return candidate
    raise AssertionError("the last implementation has no limits")


def attend(step: Step) -> Attended:
    """Attention output `[B, T, heads, head_dim]` of a step, and its weights where the model's function gives them."""
    return implementation(step).run(step)
