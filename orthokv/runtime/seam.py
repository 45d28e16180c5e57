"""The one seam into ``transformers``: calibration, evaluation and serving all go through it.

Three public hooks are used: a registered attention function (which sees queries, keys and values of every layer), the mask
function registered under the same name (without it, padded batches silently get no mask), and a forward pre-hook on each
attention module. In key mode ``pre`` the pre-hook hands the stock forward identity rotary tables, so that queries and keys
arrive un-rotated; the real tables are applied here, with the model's own function. No model code is copied or replaced,
except where an attention module does not call the attention interface (``Architecture.forward``).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from orthokv.bases.basis import Basis, LayerBases
from orthokv.models.architectures import architecture_of, restore_forward, use_own_forward
from orthokv.models.geometry import attention_modules, geometry_of
from orthokv.models.rotary import Rotary, Tables, layer_rotaries
from orthokv.runtime.cache import LatentLayer, adopt_layer
from orthokv.spec.errors import InvalidSetting
from orthokv.spec.geometry import check_key_mode
from orthokv.spec.vocabulary import KeyMode

# Stock functions that can be wrapped. Flash kernels want equal K and V widths and get their masks another way.
INNER = ("sdpa", "eager")
PREFIX = "orthokv_"

Observer = Callable[[Tensor, Tensor, Tensor], None]


@dataclass
class _Call:
    """Handed from the pre-hook to the attention function of the same module call."""

    tables: Tables | None
    layer: LatentLayer | None


@dataclass
class SeamState:
    """What the seam keeps on each attention module.

    ``implementation`` is what ``config`` must name for the attention function to be reached. ``rotary`` is set where the seam
    turns queries and keys: in key mode ``pre``, in layers that use rotary embedding.
    """

    config: PreTrainedConfig
    implementation: str
    cache_argument: str
    rotary: Rotary | None
    bases: LayerBases | None = None
    observer: Observer | None = None
    call: _Call | None = None


@dataclass
class _StandIn:
    """What stock attention functions read from the module; latents change the number of KV heads."""

    num_key_value_groups: int
    is_causal: bool
    training: bool
    sinks: Tensor | None


def seam_of(model: PreTrainedModel) -> Seam | None:
    """The seam installed on a model, if any."""
    return getattr(model, "_orthokv_seam", None)


class Seam:
    """The hooks of one model. As a context manager it removes itself at the end.

    Args:
        model: a supported causal language model, loaded with ``sdpa`` or ``eager`` attention.
        key_mode: whether keys are seen before or after rotary embedding.

    Raises:
        UnsupportedModel: unknown architecture, or a rotary embedding that ``key_mode`` cannot serve.
        InvalidSetting: another seam is installed, or the attention implementation cannot be wrapped.
    """

    def __init__(self, model: PreTrainedModel, key_mode: KeyMode) -> None:
        self.geometry = geometry_of(model.config)
        check_key_mode(self.geometry, key_mode)
        if seam_of(model) is not None:
            raise InvalidSetting("this model is already attached; detach it first")
        inner = model.config._attn_implementation or "sdpa"
        if inner.removeprefix(PREFIX) not in INNER:
            raise InvalidSetting(
                f"attention implementation {inner!r} cannot be wrapped; load the model with one of {', '.join(INNER)}"
            )
        self.model = model
        self.key_mode = key_mode
        self._architecture = architecture_of(model.config)
        self._previous = inner.removeprefix(PREFIX)
        self._implementation = self._previous if self._architecture.forward else PREFIX + self._previous
        self.modules = attention_modules(model)
        self._handles: list[RemovableHandle] = []
        cache = self._architecture.cache_argument
        rotaries = layer_rotaries(model, self.geometry)
        self.install(
            [
                SeamState(model.config, self._implementation, cache, rotary if key_mode == "pre" else None)
                for rotary in rotaries
            ]
        )

    def install(self, states: list[SeamState]) -> None:
        """Put the hooks in place, with the given state for each layer."""
        for module, state in zip(self.modules, states, strict=True):
            # A plain attribute, not a submodule: nothing of it may reach the state dict.
            object.__setattr__(module, "_orthokv", state)
            use_own_forward(self._architecture, module)
            self._handles.append(module.register_forward_pre_hook(_before_attention, with_kwargs=True))
            self._handles.append(module.register_forward_hook(_after_attention, always_call=True))
        if self._implementation != self._previous:
            self.model.set_attn_implementation(self._implementation)
        object.__setattr__(self.model, "_orthokv_seam", self)

    def state(self, layer: int) -> SeamState:
        return cast(SeamState, self.modules[layer]._orthokv)

    def set_bases(self, layer: int, bases: LayerBases | None) -> None:
        """Compress one layer (or stop doing so): takes effect at its next forward."""
        self.state(layer).bases = bases

    def observe(self, layer: int, observer: Observer | None) -> None:
        """Show one layer's queries ``[B, H, T, d]``, keys and values ``[B, kv_heads, T, d]`` to ``observer``."""
        self.state(layer).observer = observer

    def remove(self) -> None:
        """Leave the model as it was found."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for module in self.modules:
            object.__delattr__(module, "_orthokv")
            restore_forward(self._architecture, module)
        if self._implementation != self._previous:
            self.model.set_attn_implementation(self._previous)
        object.__delattr__(self.model, "_orthokv_seam")

    def __enter__(self) -> Seam:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


# -------------------------------------------------------------------------------------------------- hooks


def _before_attention(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    state = cast(SeamState, module._orthokv)
    implementation = state.config._attn_implementation
    if implementation != state.implementation:
        raise InvalidSetting(
            f"the attention implementation was changed to {implementation!r} while bases are attached; detach first"
        )
    cache = kwargs.get(state.cache_argument)
    layer: LatentLayer | None = None
    if cache is not None and state.bases is not None:
        layer = adopt_layer(
            cache, cast(int, module.layer_idx), state.bases, positions=state.rotary is not None
        )
        layer.expected = True
    tables: Tables | None = None
    if state.rotary is not None:
        tables = kwargs["position_embeddings"]
        cos, sin = tables
        if layer is not None:
            layer.pending_positions = kwargs["position_ids"]
        elif cache is not None:
            raise InvalidSetting("a cache is filled through the seam, but this layer has no bases")
        kwargs = {**kwargs, "position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))}
    state.call = _Call(tables, layer)
    return args, kwargs


def _after_attention(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    cast(SeamState, module._orthokv).call = None


def _stock(inner: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The function that the model itself would have called; the eager one is its own, with softcaps and sinks."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", eager_attention_forward)
    return cast(
        "Callable[..., tuple[Tensor, Tensor | None]]", ALL_ATTENTION_FUNCTIONS.get_interface(inner, eager)
    )


def _stand_in(module: nn.Module, query: Tensor, key: Tensor) -> _StandIn:
    return _StandIn(
        num_key_value_groups=query.shape[1] // key.shape[1],
        is_causal=getattr(module, "is_causal", True),
        training=module.training,
        sinks=getattr(module, "sinks", None),
    )


def _attend(
    inner: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    stock = _stock(inner, module)
    state = cast("SeamState | None", getattr(module, "_orthokv", None))
    if state is None or state.call is None:
        return stock(module, query, key, value, attention_mask, **kwargs)
    call = state.call
    if state.observer is not None:
        state.observer(query, key, value)
    if state.bases is not None and call.layer is not None:
        bases = state.bases
        return _attend_cached(
            stock, module, state.rotary, bases, call, query, key, value, attention_mask, **kwargs
        )
    if state.bases is not None:
        # Without a cache the same round trip happens, so that scores agree with generation.
        key = _round_trip(key, state.bases.key, state.bases.store_dtype)
        value = _round_trip(value, state.bases.value, state.bases.store_dtype)
    if call.tables is not None:
        assert state.rotary is not None
        query = state.rotary.rotate(module, query, call.tables)
        key = state.rotary.rotate(module, key, call.tables)
    return stock(_stand_in(module, query, key), query, key, value, attention_mask, **kwargs)


def _per_head(x: Tensor, heads: int) -> Tensor:
    """``[B, groups, S, n]`` -> ``[B, heads, S, n]``: the latents of a group for each of its heads; a view of one group."""
    batch, groups, tokens, numbers = x.shape
    if groups == heads:
        return x
    shared = x.unsqueeze(2).expand(-1, -1, heads // groups, -1, -1)
    return shared.reshape(batch, heads, tokens, numbers)


def _round_trip(x: Tensor, basis: Basis | None, store_dtype: torch.dtype | None) -> Tensor:
    if basis is None:
        return x
    latent = basis.encode(x)
    if store_dtype is not None:
        latent = latent.to(store_dtype).to(x.dtype)
    return basis.decode(latent)


def _attend_cached(
    stock: Callable[..., tuple[Tensor, Tensor | None]],
    module: nn.Module,
    rotary: Rotary | None,
    bases: LayerBases,
    call: _Call,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention where ``key`` and ``value`` are what the cache returned: latents ``[B, groups, S, rank]``."""
    assert bases.key is not None
    assert bases.value is not None
    assert call.layer is not None
    key, value = key.to(query.dtype), value.to(query.dtype)
    head_dim = bases.key.head_dim
    # One query token is bound by memory: attend to the latents themselves where they are not wider than a head. Longer
    # queries are bound by arithmetic, which latents wider than a head would multiply: rebuild the heads first.
    decoding = query.shape[2] == 1
    latent_key = decoding and call.tables is None and bases.key.rank <= head_dim
    latent_value = decoding and bases.value.rank <= head_dim
    if latent_key:
        query = bases.key.query_to_latent(query)
    else:
        key = bases.key.decode(key)
    if call.tables is not None:
        assert rotary is not None
        query = rotary.rotate(module, query, call.tables)
        key = rotary.rotate(module, key, rotary.tables(call.layer.positions(), key))
    if not latent_value:
        value = bases.value.decode(value)
    heads = max(key.shape[1], value.shape[1])
    key, value = (_per_head(x, heads) for x in (key, value))
    output, weights = stock(_stand_in(module, query, key), query, key, value, attention_mask, **kwargs)
    if latent_value:
        output = bases.value.output_from_latent(output)
    return output, weights


def _register(inner: str) -> None:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        return _attend(inner, module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(PREFIX + inner, attention)
    AttentionMaskInterface.register(PREFIX + inner, ALL_MASK_ATTENTION_FUNCTIONS[inner])


for _name in INNER:
    _register(_name)


@contextmanager
def compressed(seam: Seam, bases: Sequence[LayerBases | None]) -> Iterator[None]:
    """All layers of a model use ``bases`` inside the block, and what they had before after it."""
    before = [seam.state(i).bases for i in range(len(bases))]
    try:
        for i, layer in enumerate(bases):
            seam.set_bases(i, layer)
        yield
    finally:
        for i, layer in enumerate(before):
            seam.set_bases(i, layer)


@contextmanager
def without_seam(seam: Seam) -> Iterator[None]:
    """The model without the seam, for what needs its own cache."""
    states = [seam.state(i) for i in range(len(seam.modules))]
    seam.remove()
    try:
        yield
    finally:
        seam.install(states)
