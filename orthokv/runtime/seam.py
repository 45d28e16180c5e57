"""The one seam into `transformers`: calibration, evaluation and serving all go through it.

Four public hooks are used: a registered attention function (which sees queries, keys and values of every layer), the mask
function registered under the same name (without it, padded batches silently get no mask), and a forward pre-hook and a
forward hook on each attention module. No model code is copied or replaced, except where an attention module does not call
the attention interface (`Architecture.forward`).

What a call needs travels with it, in one `Call` that the pre-hook makes; modules and cache layers keep nothing of it, so
threads may share a model. The way of one call:

    decoder layer             attention module                   cache
         |
         |  cache, tables
         v
    _before_attention         Call(bases, tables, positions)
         |
         |  orthokv_call=call, cache=Storing(cache, call), identity tables in key mode `pre`
         v
    the module's forward      projects queries, keys, values
                              Storing.update ------------------> LatentLayer.update
                                                                   encode, pack, hold
                              call.keys, call.values,  <-----------notes what is held
                              call.held_positions
         |
         |  query, **kwargs with orthokv_call
         v
    _attention                Step of query, call.keys, call.values, and the turn that is still lacking
         |                    attend(step): kernel, or the model's own function over rebuilt heads
         v
    _after_attention          refuses a call that _attention has not seen

In key mode `pre` the module gets identity tables, so that queries and keys arrive un-rotated; the angles are applied in
`attend`, to the keys of all held tokens.
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
from orthokv.models.geometry import attention_modules, geometry_of, layer_rotaries
from orthokv.models.rotary import Rotary
from orthokv.runtime.attend import Attended, Held, Step, Stock, Turn, attend
from orthokv.runtime.blocks import block_of, pack_blocks
from orthokv.runtime.cache import Storing
from orthokv.runtime.call import Call
from orthokv.runtime.codecs import Codec, codec_of
from orthokv.spec.errors import InvalidSetting
from orthokv.spec.geometry import check_key_mode
from orthokv.spec.names import ATTENTION_PREFIX as PREFIX
from orthokv.spec.vocabulary import KeyMode

# Stock functions that can be wrapped. Flash kernels want equal K and V widths and get their masks another way.
INNER = ("sdpa", "eager")
# The keyword under which attention modules pass a call on to the attention function.
CALL = "orthokv_call"

Observer = Callable[[Tensor, Tensor, Tensor], None]


@dataclass
class SeamState:
    """What the seam keeps on each attention module, the same for all calls.

    `implementation` is what `config` must name for the attention function to be reached. `rotary` is set where the seam turns
    queries and keys: in key mode `pre`, in layers that use rotary embedding.
    """

    config: PreTrainedConfig
    implementation: str
    cache_argument: str
    rotary: Rotary | None
    bases: LayerBases | None = None
    observer: Observer | None = None


def seam_of(model: PreTrainedModel) -> Seam | None:
    """The seam installed on a model, if any."""
    return getattr(model, "_orthokv_seam", None)


class Seam:
    """The hooks of one model. As a context manager it removes itself at the end.

    Args:
        model: a supported causal language model, loaded with `sdpa` or `eager` attention.
        key_mode: whether keys are seen before or after rotary embedding.

    Raises:
        UnsupportedModel: unknown architecture, or a rotary embedding that `key_mode` cannot serve.
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
            self._handles.append(module.register_forward_hook(_after_attention, with_kwargs=True))
        if self._implementation != self._previous:
            self.model.set_attn_implementation(self._implementation)
        object.__setattr__(self.model, "_orthokv_seam", self)

    def state(self, layer: int) -> SeamState:
        return cast(SeamState, self.modules[layer]._orthokv)

    def set_bases(self, layer: int, bases: LayerBases | None) -> None:
        """Compress one layer (or stop doing so): takes effect at its next forward."""
        self.state(layer).bases = bases

    def observe(self, layer: int, observer: Observer | None) -> None:
        """Show one layer's queries `[B, H, T, d]`, keys and values `[B, kv_heads, T, d]` to `observer`."""
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
    call = Call(state.bases, tables=None, positions=None)
    kwargs = {**kwargs, CALL: call}
    if state.rotary is not None:
        cos, sin = kwargs["position_embeddings"]
        call.tables = state.rotary.rotation.once((cos, sin))
        kwargs["position_embeddings"] = (torch.ones_like(cos), torch.zeros_like(sin))
        if cache is not None:
            call.positions = kwargs["position_ids"]
            if state.bases is None:
                raise InvalidSetting("a cache is filled through the seam, but this layer has no bases")
    if cache is not None and state.bases is not None:
        kwargs[state.cache_argument] = Storing(cache, call)
    return args, kwargs


def _after_attention(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    if not cast(Call, kwargs[CALL]).attended:
        raise InvalidSetting(
            f"{type(module).__name__} computed attention without calling the function that its configuration names"
        )


def _stock(inner: str, module: nn.Module) -> Callable[..., Attended]:
    """The function that the model itself would have called; the eager one is its own, with softcaps and sinks."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", eager_attention_forward)
    return cast("Callable[..., Attended]", ALL_ATTENTION_FUNCTIONS.get_interface(inner, eager))


def _attention(
    inner: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> Attended:
    stock = _stock(inner, module)
    state = cast("SeamState | None", getattr(module, "_orthokv", None))
    if state is None:
        # Another model whose configuration was copied from one with a seam.
        return stock(module, query, key, value, attention_mask, **kwargs)
    call = cast("Call | None", kwargs.pop(CALL, None))
    if call is None:
        raise InvalidSetting(
            f"attention of {type(module).__name__} was reached without its call: run the module, not a part of it"
        )
    call.attended = True
    if state.observer is not None:
        if call.keys is not None:
            raise InvalidSetting("a layer is observed without a cache")
        state.observer(query, key, value)
    keys, values = call.keys, call.values
    if keys is None or values is None:
        # Without a cache the same round trip happens, so that scores agree with generation.
        keys, values = _hold(call.bases, key, value)
    return attend(
        Step(
            query,
            keys,
            values,
            _turn(state.rotary, call, query),
            Stock(
                stock,
                attention_mask,
                kwargs,
                is_causal=getattr(module, "is_causal", True),
                training=module.training,
                sinks=getattr(module, "sinks", None),
            ),
        )
    )


def _hold(bases: LayerBases | None, key: Tensor, value: Tensor) -> tuple[Held, Held]:
    """Keys and values of one call as a cache would hold them."""
    if bases is None:
        return Held(None, None, None, key), Held(None, None, None, value)
    key_codec, value_codec = (codec_of(name, key.dtype) for name in bases.codecs)
    block = block_of(key_codec, value_codec)
    return _hold_side(bases.key, key_codec, key, block), _hold_side(bases.value, value_codec, value, block)


def _hold_side(basis: Basis | None, codec: Codec, x: Tensor, block: int) -> Held:
    if basis is None:
        return Held(None, None, None, x)
    rows, waiting = pack_blocks(codec, basis.encode(x), block)
    return Held(basis, codec, rows, waiting)


def _turn(rotary: Rotary | None, call: Call, query: Tensor) -> Turn | None:
    if rotary is None:
        return None
    assert call.tables is not None
    positions = call.held_positions
    held = call.tables if positions is None else rotary.tables(positions, query)
    return Turn(rotary.rotation, call.tables, held)


def _register(inner: str) -> None:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> Attended:
        return _attention(inner, module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(PREFIX + inner, attention)
    AttentionMaskInterface.register(PREFIX + inner, ALL_MASK_ATTENTION_FUNCTIONS[inner])


for _name in INNER:
    _register(_name)


@contextmanager
def compressed(seam: Seam, bases: Sequence[LayerBases | None]) -> Iterator[None]:
    """All layers of a model use `bases` inside the block, and what they had before after it."""
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
